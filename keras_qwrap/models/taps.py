"""Models without a graph: copies of them, and the layers inside by path, with their outputs."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import keras
from keras import tree

from keras_qwrap.layers.building import Construction, shapes_of
from keras_qwrap.layers.keras_internals import output_specs, replace_call, sublayers
from keras_qwrap.layers.layer_table import is_identity
from keras_qwrap.layers.refusals import refuse_raw_variables
from keras_qwrap.layers.remaking import made_again, refuse_other_policies
from keras_qwrap.layers.weights import copy_flags, copy_variables, follow, own_weights, walk
from keras_qwrap.models.graph import has_graph
from keras_qwrap.numerics.checks import bad_type, bad_value

Example = tuple[Sequence, Mapping[str, Any]]


def quantizable_layers(model: keras.Model) -> dict[str, keras.Layer]:
    """The inner layers of a model that compute something as units, by their attribute paths.

    Units are the layers without layers inside them, and Keras' own layers that have some, such as
    MultiHeadAttention, LSTM or Bidirectional. Nested models and a user's own composite layers are
    descended into; they are units besides only where they own weights. Layers that leave their
    input as it is in inference (Dropout, Identity, ...) are left out.
    """
    found: dict[int, tuple[str, keras.Layer]] = {}
    for path, part in walk(model, _is_open):
        if isinstance(part, keras.Layer) and part is not model and _is_unit(part):
            found.setdefault(id(part), (path, part))
    return dict(sorted(found.values(), key=lambda item: item[0]))


def _is_open(layer: keras.Layer) -> bool:
    """Whether a layer is descended into: a model, or a composite layer of the user's."""
    if isinstance(layer, keras.Model):
        return True
    from_keras = any(
        getattr(keras.layers, cls.__name__, None) is cls
        for cls in type(layer).__mro__
        if cls is not keras.layers.Layer
    )
    return len(sublayers(layer)) > 1 and not from_keras


def _is_unit(layer: keras.Layer) -> bool:
    if is_identity(layer):
        return False
    return not _is_open(layer) or bool(own_weights(layer))


def find_layers(model: keras.Model, paths: Sequence[str]) -> dict[str, keras.Layer]:
    """The layers inside a model that the paths name; a path may be any that leads to a layer."""
    inside = {id(layer) for layer in sublayers(model) if layer is not model}
    found: dict[str, keras.Layer] = {}
    for path in paths:
        layer = follow(model, path)
        if id(layer) not in inside:
            existing = list(quantizable_layers(model))
            nearest = difflib.get_close_matches(path, existing, n=1, cutoff=0.0)
            raise bad_value(
                "activation_quantizers",
                path,
                f"a layer inside '{model.name}': {', '.join(existing) or 'it has none'}",
                f"The nearest is '{nearest[0]}'." if nearest else "Leave it out.",
            )
        for other, taken in found.items():
            if taken is layer:
                raise bad_value(
                    "activation_quantizers",
                    path,
                    f"another layer than '{other}', which it names as well",
                    "Drop one of the two.",
                )
        found[path] = layer
    return found


class Taps:
    """Passes the output tensors of inner layers through `handle(path, tensors)`.

    Keras runs a layer through its attribute `call`; each layer here gets one that runs the old
    one first. So the layers must not be anybody else's.
    """

    def __init__(self, layers: Mapping[str, keras.Layer]) -> None:
        self.handle: Callable[[str, list], list] = lambda path, tensors: tensors
        for path, layer in layers.items():
            call = partial(self._run, layer.call, path)
            replace_call(layer, call, inspect.signature(layer.call))

    def _run(self, call: Callable, path: str, *args: Any, **kwargs: Any) -> Any:
        outputs = call(*args, **kwargs)
        flat = tree.flatten(outputs)
        places = [i for i, part in enumerate(flat) if hasattr(part, "dtype")]
        handled = self.handle(path, [flat[i] for i in places])
        for i, tensor in zip(places, handled, strict=True):
            flat[i] = tensor
        return tree.pack_sequence_as(outputs, flat)

    def outputs(self, model: keras.Model, example: Example) -> dict[str, list[keras.KerasTensor]]:
        """Symbolic outputs of the layers that a call of the model runs, by path, in order."""
        before = self.handle
        order: list[str] = []

        def record(*args: Any, **kwargs: Any) -> dict[str, list]:
            seen: dict[str, list] = {}

            def note(path: str, tensors: list) -> list:
                seen.setdefault(path, list(tensors))
                return tensors

            self.handle = note
            model.call(*args, **kwargs)
            order[:] = seen
            return seen

        try:
            args, kwargs = example
            found = output_specs(record, args, dict(kwargs))
            return {path: found[path] for path in order}
        finally:
            self.handle = before


def layer_outputs(
    model: keras.Model, example: Example | None = None
) -> dict[str, list[keras.KerasTensor]]:
    """Symbolic outputs of each of the `quantizable_layers` by path, in the order of a call.

    Layers that the call does not run are left out; of a layer that it runs several times, the
    first outputs are given. The model is left as it is.

    Args:
        model: a subclassed model that can be made again from its config.
        example: as for `QuantizedModel`; needed where the model is not built.

    Raises:
        ValueError: as `QuantizedModel`.
    """
    copy, example = copy_built(model, example)
    if example is None:
        raise bad_value("model", model.name, "a built model", "Call it, or pass `example`.")
    return Taps(quantizable_layers(copy)).outputs(copy, example)


def copy_built(
    model: keras.Model, example: Example | None
) -> tuple[keras.Model, tuple[tuple, dict] | None]:
    """A copy of a model, and the symbolic arguments of a call; None for a model not built.

    The copy has the model's weights and trainable flags.
    """
    refuse_raw_variables(model)
    copy = made_again(model)
    refuse_other_policies(model, copy)
    construction = Construction()
    if example is not None:
        construction.see_call(*_check_example(example))
    elif model.built and has_graph(model):
        sequential = isinstance(model, keras.Sequential)
        construction.see_call((model.inputs[0] if sequential else model.input,), {})
    elif model.built:
        construction.see_shapes(*shapes_of(model))
    else:
        return copy, None
    args, kwargs = construction.example or ((), {})
    try:
        copy(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"model: received '{model.name}', which cannot be called with {args} and {kwargs} "
            f"(a {type(error).__name__}), expected a model that can. Pass "
            "`example=(args, kwargs)`, the arguments of a call, with their dtypes."
        ) from error
    if model.built:
        copy_flags(model, copy)
        copy_variables(model, copy)
    return copy, (args, kwargs)


def _check_example(example: Any) -> tuple[tuple, dict]:
    pair = isinstance(example, (tuple, list)) and len(example) == 2
    if not pair or not isinstance(example[0], (tuple, list)) or not isinstance(example[1], Mapping):
        raise bad_type("example", example, "positional and keyword arguments", "Pass ((x,), {}).")
    return tuple(example[0]), dict(example[1])
