"""Weights by name: attribute paths on a layer, and those that are quantized by default."""

import difflib
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_qwrap.layers.keras_internals import (
    named_parts,
    own_variables,
    part_named,
    sublayers,
)
from keras_qwrap.layers.layer_table import Axes, Row, aliases_of, find_row
from keras_qwrap.layers.remaking import check_layers_alike, check_values_alike
from keras_qwrap.numerics.checks import Told, bad_type, bad_value
from keras_qwrap.numerics.tensors import to_numpy, variable_of


def variables_of_weights(layer: keras.Layer) -> list[keras.Variable]:
    """The variables of `layer.weights`, where codes may stand for some of them."""
    return [variable_of(weight) for weight in layer.weights]


def weight_paths(layer: keras.Layer) -> dict[str, keras.Variable]:
    """Every variable of a built layer by the shortest attribute path that leads to it.

    Layers inside that have an alias (see `register_layer`) go by it.

    Example:

    ```python
    import keras
    import keras_qwrap as qi

    layer = keras.layers.LSTM(2)
    layer.build((None, 3, 4))
    print(sorted(qi.weight_paths(layer)))  # ['cell/bias', 'cell/kernel', 'cell/recurrent_kernel']
    ```
    """
    wanted = {id(variable) for variable in variables_of_weights(layer)}
    paths: dict[int, tuple[str, keras.Variable]] = {}
    for path, found in walk(layer, lambda part: True):
        if id(found) in wanted:
            paths.setdefault(id(found), (path, found))
    return dict(sorted(paths.values(), key=lambda item: item[0]))


def walk(layer: keras.Layer, is_open: Callable[[keras.Layer], bool]) -> Iterator[tuple[str, Any]]:
    """All that attribute paths lead to, shortest paths first; nothing is gone through twice.

    Of the layers inside, those that `is_open` says are gone through as well.
    """
    visited: set[int] = set()
    waiting: deque[tuple[str, Any]] = deque([("", layer)])
    while waiting:
        prefix, parent = waiting.popleft()
        if id(parent) in visited:
            continue
        visited.add(id(parent))
        for name, child in _children(parent):
            path = f"{prefix}{name}"
            yield path, child
            holds = isinstance(child, (list, tuple, dict))
            if holds or (isinstance(child, keras.Layer) and is_open(child)):
                waiting.append((f"{path}/", child))


def _children(parent: Any) -> list[tuple[str, Any]]:
    """Named parts of a layer, list or dictionary: attributes, indices, or keys."""
    if isinstance(parent, dict):
        return list(_entries(parent).items())
    if isinstance(parent, (list, tuple)):
        return [(str(index), child) for index, child in enumerate(parent)]
    aliases = aliases_of(parent) if isinstance(parent, keras.Layer) else {}
    named = [(alias, part_named(parent, attribute)) for alias, attribute in aliases.items()]
    short = {id(inside): alias for alias, inside in named if isinstance(inside, keras.Layer)}
    return [(short.get(id(child)) or name, child) for name, child in named_parts(parent).items()]


def _entries(parent: dict) -> dict[str, Any]:
    """What a dictionary holds, by its keys as they are written: `{1: dense}` has `"1"`.

    A key with a slash would be no part of a path.
    """
    keys = [key for key in parent if isinstance(key, (str, int)) and "/" not in str(key)]
    return {str(key): parent[key] for key in keys}


def _get(parent: Any, part: str) -> Any:
    """Attribute, key or index `part` of `parent`; None where there is none."""
    if isinstance(parent, dict):
        return _entries(parent).get(part)
    if isinstance(parent, (list, tuple)):
        return parent[int(part)] if part.isdecimal() and int(part) < len(parent) else None
    return part_named(parent, part)


def follow(layer: keras.Layer, path: str) -> Any:
    """What `path` leads to, None where that is nothing."""
    found: Any = layer
    for part in path.split("/"):
        aliases = aliases_of(found) if isinstance(found, keras.Layer) else {}
        found = _get(found, aliases.get(part, part))
    return found


def find_weight(layer: keras.Layer, path: str) -> keras.Variable:
    """The variable of a built layer that `path` names.

    Args:
        layer: a built layer.
        path: attributes, list indices and dictionary keys joined by `/`; an attribute may go by
            its alias (see `register_layer`).

    Raises:
        ValueError: there is no such weight; the message lists those that exist.
        TypeError: what the path leads to is not a floating-point `keras.Variable`.
    """
    found = follow(layer, path)
    if isinstance(found, keras.Variable) and any(found is v for v in variables_of_weights(layer)):
        if "float" not in found.dtype:
            raise bad_type(path, found.dtype, "a floating-point weight", "Leave it out.")
        return found
    if found is None or isinstance(found, (keras.Layer, list, dict)):
        existing = list(weight_paths(layer))
        nearest = difflib.get_close_matches(path, existing, n=1, cutoff=0.0)
        raise bad_value(
            "weights_quantizers",
            path,
            f"a weight of layer '{layer.name}': {', '.join(existing) or 'it has none'}",
            f"The nearest is '{nearest[0]}'." if nearest else "Wrap a layer that has weights.",
        )
    raise bad_type(
        path,
        type(found).__name__,
        "a keras.Variable of the layer",
        "Create the weight with `self.add_weight`; raw tf.Variables cannot be replaced.",
    )


def find_weights(layer: keras.Layer, paths: list[str]) -> list[tuple[str, keras.Variable]]:
    """Each path with the variable that it names.

    Raises:
        ValueError: no weight is there, two paths name one variable, or two paths are the same
            once `/` is written as `_`, as in the names of the quantizers' variables.
        TypeError: as `find_weight`.
    """
    found: list[tuple[str, keras.Variable]] = []
    for path in paths:
        variable = find_weight(layer, path)
        for other, taken in found:
            if taken is variable:
                raise bad_value(
                    "weights_quantizers",
                    path,
                    f"another weight than '{other}', which it names as well",
                    "Drop one of the two.",
                )
            if other.replace("/", "_") == path.replace("/", "_"):
                raise bad_value(
                    "weights_quantizers",
                    path,
                    f"a path that differs from '{other}' in more than '/' and '_'",
                    "Their quantizers' variables would have the same names. Rename an attribute "
                    "of the layer, or quantize one of the two.",
                )
        found.append((path, variable))
    return found


def default_weights(layer: keras.Layer) -> dict[str, Axes]:
    """The weights of a built layer that are quantized by default, and the axes that are kept.

    The layers inside count with it. Each layer class follows its row in
    `layer_table.ROWS`; a row of an outer layer goes before those of the layers inside. Where
    there is no row, the trainable floating-point weights of largest rank that the class itself
    owns are taken if that rank is 2 or more, with a range for each index of the last axis.

    Args:
        layer: a built layer; layers inside that are not built yet have no weights.

    Returns:
        `{path: axes}` in the order of `weight_paths`; axes None stand for one range for the whole
        weight. A weight with several owners is there once. `weight_reason` says why the others
        are not there.

    Raises:
        ValueError: the layer is not built, or registered axes do not fit the weight.
    """
    if not layer.built:
        raise bad_value(
            "layer",
            Told(f"layer '{layer.name}', which is not built"),
            "a built layer",
            "Call it or build it first.",
        )
    inside = sublayers(layer)
    rows = [(inner, find_row(inner)) for inner in inside]
    whole = [inner for inner, row in rows if row is not None and row[1].whole]
    spoken_for = {id(part) for outer in whole for part in sublayers(outer) if part is not outer}
    axes: dict[int, Axes] = {}
    for inner, row in rows:
        if id(inner) not in spoken_for:
            for variable, kept in _own_defaults(inner, row):
                axes.setdefault(id(variable), kept)
    return {
        path: axes[id(variable)]
        for path, variable in weight_paths(layer).items()
        if id(variable) in axes
    }


def _own_defaults(
    layer: keras.Layer, row: tuple[str, Row] | None
) -> list[tuple[keras.Variable, Axes]]:
    """The variables of a layer that its row, or the default rule, quantizes."""
    if row is None:
        return [(variable, -1) for variable in _largest_kernels(layer)]
    found = []
    for path, axes in (row[1].weights or {}).items():
        variable = follow(layer, path)
        if _is_float_weight(layer, variable):
            kept = axes(layer) if callable(axes) else axes
            _check_axes_fit(f"{row[0]}: '{path}'", kept, len(variable.shape))
            found.append((variable, kept))
    return found


def _is_float_weight(layer: keras.Layer, found: Any) -> bool:
    if not isinstance(found, keras.Variable) or "float" not in found.dtype or 0 in found.shape:
        return False
    return any(found is weight for weight in variables_of_weights(layer))


def _check_axes_fit(name: str, axes: Axes, rank: int) -> None:
    kept = axes if isinstance(axes, tuple) else () if axes is None else (axes,)
    if any(not -rank <= axis < rank for axis in kept):
        raise bad_value(
            name,
            axes,
            f"axes of a weight of rank {rank}",
            "Register other axes with `register_layer`.",
        )


def own_weights(layer: keras.Layer) -> list[keras.Variable]:
    """The weights of a layer that no layer inside it owns."""
    parts = [part for part in sublayers(layer) if part is not layer]
    inside = {id(weight) for part in parts for weight in variables_of_weights(part)}
    return [weight for weight in variables_of_weights(layer) if id(weight) not in inside]


def _largest_kernels(layer: keras.Layer) -> list[keras.Variable]:
    """The default rule; frozen layers count as if they were trainable."""
    trainable = {id(variable) for variable in own_variables(layer)[0]}
    kernels = [
        weight
        for weight in own_weights(layer)
        if id(weight) in trainable and _is_float_weight(layer, weight) and len(weight.shape) >= 2
    ]
    rank = max((len(weight.shape) for weight in kernels), default=0)
    return [weight for weight in kernels if len(weight.shape) == rank]


def weight_reason(layer: keras.Layer) -> str:
    """Why weights that a layer itself owns stay float by default, in a few words for a report."""
    name = type(layer).__name__
    row = find_row(layer)
    if row is not None:
        named = row[1].weights or {}
        missing = [p for p in named if not _is_float_weight(layer, follow(layer, p))]
        absent = f"; this layer has no float weight {', '.join(missing)}" if missing else ""
        return f"{row[0]}: {row[1].reason}{absent}"
    if not own_weights(layer):
        return f"{name} has no weights of its own"
    if not _largest_kernels(layer):
        return f"no row for {name}: it has no trainable float weight of rank 2 or more"
    return f"no row for {name}: the default rule quantizes its largest kernels only"


def copy_variables(source: keras.Layer, target: keras.Layer) -> None:
    """Assign every variable of `source`, seed states included, to its counterpart in `target`.

    Raises:
        ValueError: the target is no copy of the source.
    """
    check_layers_alike(source, target)
    pairs = list(zip(source.variables, target.variables, strict=False))
    shapes_differ = any(tuple(a.shape) != tuple(b.shape) for a, b in pairs)
    if len(source.variables) != len(target.variables) or shapes_differ:
        check_values_alike(source, target)
        raise bad_value(
            "layer",
            [tuple(v.shape) for v in target.variables],
            f"variables of shapes {[tuple(v.shape) for v in source.variables]} in a copy of "
            f"layer '{source.name}' made from its config",
            "Let the layer's `get_config` return every argument that shapes its variables.",
        )
    for a, b in pairs:
        b.assign(to_numpy(variable_of(a)).copy())
    for part, copied in zip(sublayers(source), sublayers(target), strict=True):
        _copy_untracked(part, copied)
    check_values_alike(source, target)


def _copy_untracked(source: Any, target: Any) -> None:
    """What layers keep outside their variables: adapted state, and that of stateful layers."""
    states = keras.tree.flatten(getattr(source, "states", None))
    for a, b in zip(states, keras.tree.flatten(getattr(target, "states", None)), strict=False):
        if isinstance(a, keras.Variable) and isinstance(b, keras.Variable):
            b.assign(to_numpy(a).copy())
    if hasattr(source, "finalize_state"):
        store: dict[str, Any] = {}
        # The methods of the classes: those of a converted layer take and give packed codes.
        type(source).save_own_variables(source, store)
        arrays = {key: to_numpy(variable_of(part)).copy() for key, part in store.items()}
        type(target).load_own_variables(target, arrays)
    if hasattr(source, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            source.save_assets(folder)
            target.load_assets(folder)


def copy_flags(source: keras.Layer, target: keras.Layer) -> None:
    """Make trainable in `target` what is in `source`: configs hold no flags of layers inside."""
    for old, new in zip(sublayers(source), sublayers(target), strict=False):
        if old.trainable is not new.trainable:
            new.trainable = old.trainable
