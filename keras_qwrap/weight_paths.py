"""Weights by name: attribute paths on a layer, and the short names of well-known layers."""

import difflib
from typing import Any

import keras

from keras_qwrap.errors import bad_type, bad_value
from keras_qwrap.substitution import is_rematerialized, sublayers
from keras_qwrap.tensors import to_numpy

ALIASES = {
    "MultiHeadAttention": {
        "query": "query_dense",
        "key": "key_dense",
        "value": "value_dense",
        "output": "output_dense",
    },
    "GroupedQueryAttention": {
        "query": "query_dense",
        "key": "key_dense",
        "value": "value_dense",
        "output": "output_dense",
    },
}
"""Class name -> short first part of a path -> attribute. Private attributes are found as well."""


def weight_paths(layer: keras.Layer) -> dict[str, keras.Variable]:
    """Every variable of a built layer by the shortest attribute path that leads to it.

    Example:

    ```python
    import keras
    from keras_qwrap.weight_paths import weight_paths

    layer = keras.layers.LSTM(2)
    layer.build((None, 3, 4))
    print(sorted(weight_paths(layer)))  # ['cell/bias', 'cell/kernel', 'cell/recurrent_kernel']
    ```
    """
    wanted = {id(variable) for variable in layer.weights}
    paths: dict[int, tuple[str, keras.Variable]] = {}
    visited: set[int] = set()
    level: list[tuple[str, Any]] = [("", layer)]
    while level:
        following: list[tuple[str, Any]] = []
        for prefix, parent in level:
            if id(parent) in visited:
                continue
            visited.add(id(parent))
            for name, child in _children(parent):
                path = f"{prefix}{name}"
                if isinstance(child, keras.Variable):
                    if id(child) in wanted:
                        paths.setdefault(id(child), (path, child))
                elif isinstance(child, (keras.Layer, list, tuple, dict)):
                    following.append((f"{path}/", child))
        level = following
    return dict(sorted(paths.values(), key=lambda item: item[0]))


_BOOKKEEPING = {
    "_layers",
    "_trainable_variables",
    "_non_trainable_variables",
    "_metrics",
    "_seed_generators",
    "_functional",
    "_operations",
    "_operations_by_depth",
    "_nodes",
    "_nodes_by_depth",
}
"""Lists that Keras keeps on every layer: paths through them would not be the user's names."""


def _children(parent: Any) -> list[tuple[str, Any]]:
    if isinstance(parent, dict):
        return [(str(key), child) for key, child in parent.items() if isinstance(key, str)]
    if isinstance(parent, (list, tuple)):
        return [(str(index), child) for index, child in enumerate(parent)]
    attributes = dict(vars(parent)) | dict(getattr(parent, "_modules", {}))
    if isinstance(parent, keras.Model) and isinstance(getattr(parent, "layers", None), list):
        attributes["layers"] = parent.layers
    return [
        (_public_name(parent, name, child), child)
        for name, child in attributes.items()
        if name not in _BOOKKEEPING
    ]


def _public_name(parent: Any, name: str, child: Any) -> str:
    public = name.lstrip("_")
    return public if getattr(type(parent), public, None) and _get(parent, public) is child else name


def _get(parent: Any, part: str) -> Any:
    """Attribute, key or index `part` of `parent`; None where there is none."""
    if isinstance(parent, dict):
        return parent.get(part)
    if isinstance(parent, (list, tuple)):
        return parent[int(part)] if part.isdecimal() and int(part) < len(parent) else None
    return getattr(parent, part, getattr(parent, f"_{part}", None))


def find_weight(layer: keras.Layer, path: str) -> keras.Variable:
    """The variable of a built layer that `path` names.

    Args:
        layer: a built layer.
        path: attributes, list indices and dictionary keys joined by `/`; the first part may be one
            of the layer's `ALIASES`.

    Raises:
        ValueError: there is no such weight; the message lists those that exist.
        TypeError: what the path leads to is not a floating-point `keras.Variable`.
    """
    first, _, rest = path.partition("/")
    for cls in type(layer).__mro__:
        first = ALIASES.get(cls.__name__, {}).get(first, first)
    found: Any = layer
    for part in [first, *rest.split("/")] if rest else [first]:
        found = _get(found, part)
    if isinstance(found, keras.Variable) and any(found is v for v in layer.weights):
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
    """Each path with the variable that it names; two paths to one variable are refused."""
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
        found.append((path, variable))
    return found


def check_supported(layer: keras.Layer) -> None:
    """Refuse layers whose weights cannot be replaced, or would be replaced silently in part."""
    for inner in sublayers(layer):
        where = f"layer '{inner.name}'"
        if _has_traced_function(inner):
            raise bad_value(
                "layer",
                where,
                "a layer whose `call` and other methods are no `tf.function`",
                "A traced function keeps the weights that it was traced with. Remove the "
                "decorator; the whole model may be compiled instead.",
            )
        if is_rematerialized(inner):
            raise bad_value(
                "layer",
                where,
                "a layer that is made outside a `keras.RematScope`",
                "Rematerialization runs the layer again with its float weights.",
            )
    refuse_replaced_weights(layer)


def _has_traced_function(layer: keras.Layer) -> bool:
    members = [member for cls in type(layer).__mro__ for member in vars(cls).values()]
    if not isinstance(layer, keras.Model):
        members += vars(layer).values()
    return any(hasattr(member, "get_concrete_function") for member in members)


def refuse_replaced_weights(layer: keras.Layer) -> None:
    """Refuse layers whose weights Keras' LoRA or quantization stands in for."""
    for inner in sublayers(layer):
        where = f"layer '{inner.name}'"
        if getattr(inner, "lora_enabled", False):
            raise bad_value(
                "layer",
                where,
                "a layer without LoRA",
                "Merge or remove LoRA's weights before wrapping; they would stay float.",
            )
        if getattr(inner, "quantization_mode", None) is not None:
            raise bad_value(
                "layer",
                f"{where} with quantization mode {inner.quantization_mode}",
                "a float layer",
                "Do not call Keras' own `quantize` on a layer that is wrapped.",
            )


def copy_variables(source: keras.Layer, target: keras.Layer) -> None:
    """Assign every variable of `source`, seed states included, to its counterpart in `target`."""
    pairs = list(zip(source.variables, target.variables, strict=False))
    shapes_differ = any(tuple(a.shape) != tuple(b.shape) for a, b in pairs)
    if len(source.variables) != len(target.variables) or shapes_differ:
        raise bad_value(
            "layer",
            [tuple(v.shape) for v in target.variables],
            f"variables of shapes {[tuple(v.shape) for v in source.variables]} in a copy of "
            f"layer '{source.name}' made from its config",
            "Let the layer's `get_config` return every argument that shapes its variables.",
        )
    for a, b in pairs:
        b.assign(to_numpy(a).copy())
