"""What a wrapper is made from: its arguments, its layer's signature, and an example of a call."""

import inspect
from collections.abc import Mapping
from typing import Any

import keras
from keras import tree

from keras_qwrap.layers.keras_internals import build_layer, sublayers
from keras_qwrap.layers.packed import Packed
from keras_qwrap.layers.remaking import made_again
from keras_qwrap.layers.weights import copy_flags, copy_variables, find_weights
from keras_qwrap.numerics.checks import Told, bad_type, bad_value


def with_training(signature: inspect.Signature) -> inspect.Signature:
    """`signature` with an argument `training`, by keyword, if it has none."""
    if "training" in signature.parameters:
        return signature
    parameters = list(signature.parameters.values())
    catch_all = parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    training = inspect.Parameter("training", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters.insert(len(parameters) - bool(catch_all), training)
    return signature.replace(parameters=parameters)


class Construction:
    """How a wrapper is built: a plain object, since Keras would track, and save, what it holds.

    Attributes:
        shapes: the arguments that `build` was called with.
        example: positional and keyword arguments of a call, with symbolic tensors.
        output_shapes: shapes of the wrapped layer's outputs, if they are quantized.
        quantized: path and variable of each weight that has a quantizer.
        packed: what packs each quantized variable of a converted layer, by its `id`.
    """

    def __init__(self) -> None:
        self.shapes: tuple[tuple, dict] | None = None
        self.example: tuple[tuple, dict] | None = None
        self.output_shapes: list[tuple] | None = None
        self.quantized: list[tuple[str, keras.Variable]] = []
        self.packed: Packed = {}

    def find_quantized(self, layer: keras.Layer, paths: list[str]) -> None:
        """Find the weights; one that a wrapper inside quantizes already is refused."""
        taken = {
            id(variable): inner.name
            for inner in sublayers(layer)
            for _, variable in getattr(getattr(inner, "_construction", None), "quantized", [])
        }
        # A wrapper's own names for its weights are not those of a wrapper around it.
        own = dict(getattr(getattr(layer, "_construction", None), "quantized", []))
        named = [(path, own[path]) for path in paths if path in own]
        self.quantized = [] if named else find_weights(layer, paths)
        for path, variable in named or self.quantized:
            if id(variable) in taken:
                what = f"'{path}', which wrapper '{taken[id(variable)]}' inside quantizes already"
                fix = "Drop one of the two quantizers."
                raise bad_value("weights_quantizers", Told(what), "a weight without quantizer", fix)

    def see_call(self, args: tuple, kwargs: dict) -> None:
        """Take the arguments of the first call as the example."""
        self.example = tree.map_structure(_symbolic, (args, kwargs))

    def see_shapes(self, args: tuple, kwargs: dict) -> None:
        """Take the arguments of `build`, and an example from them if there is none."""
        self.shapes = (args, kwargs)
        self.example = self.example or _symbolic_arguments(args, kwargs)

    def to_config(self) -> dict | None:
        """Plain values, from which `from_config` restores all but `quantized`."""
        if self.shapes is None:
            return None
        args, kwargs = self.shapes
        call = [_plain(part) for part in self.example or ((), {})]
        return {
            "args": list(args),
            "kwargs": dict(kwargs),
            "call": call,
            "output_shapes": self.output_shapes,
        }

    def from_config(self, config: dict) -> None:
        """Restore what `to_config` gave; the layer is then built from `shapes`."""
        self.shapes = (tuple(config["args"]), config["kwargs"])
        args, kwargs = (_from_plain(part) for part in config["call"])
        self.example = (tuple(args), kwargs)
        self.output_shapes = config["output_shapes"]


def packed_in(layer: keras.Layer) -> Packed:
    """What packs the quantized weights of all converted layers in `layer`."""
    found: Packed = {}
    for inner in sublayers(layer):
        construction = getattr(inner, "_construction", None)
        found |= construction.packed if isinstance(construction, Construction) else {}
    return found


def shapes_of(layer: keras.Layer) -> tuple[tuple, dict]:
    """The positional and keyword arguments that a layer was built with."""
    config = _untracked(layer.get_build_config() or {})
    given = (config["input_shape"],) if "input_shape" in config else ()
    return given, config.get("shapes_dict", {})


def _untracked(shapes: Any) -> Any:
    """Plain lists and dictionaries in place of those that Keras tracks."""
    if isinstance(shapes, dict):
        return {key: _untracked(part) for key, part in shapes.items()}
    if isinstance(shapes, list):
        return [_untracked(part) for part in shapes]
    return tuple(_untracked(part) for part in shapes) if isinstance(shapes, tuple) else shapes


def copy_layer(layer: keras.Layer) -> keras.Layer:
    """A layer like `layer`; if that is built, with its weights and its `trainable` flags."""
    copy = made_again(layer)
    if layer.built:
        args, kwargs = shapes_of(layer)
        if args or kwargs:
            build_layer(copy, args, kwargs, _symbolic_arguments(args, kwargs))
        else:
            copy.build_from_config(layer.get_build_config() or {})
        copy_flags(layer, copy)
        copy_variables(layer, copy)
    return copy


_TENSOR = "__keras_qwrap_tensor__"


def _plain(value: Any) -> Any:
    """A structure of symbolic tensors and plain values, for a config; None for other values."""
    if isinstance(value, keras.KerasTensor):
        return {_TENSOR: [list(value.shape), value.dtype]}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value if isinstance(value, (bool, int, float, str)) else None


def _from_plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        shape, dtype = value[_TENSOR]
        return keras.KerasTensor(tuple(shape), dtype)
    return {key: _from_plain(item) for key, item in value.items()}


def _symbolic(value: Any) -> Any:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return keras.KerasTensor(tuple(value.shape), keras.backend.standardize_dtype(value.dtype))
    return value


def _symbolic_arguments(shapes: tuple, named_shapes: dict) -> tuple[tuple, dict]:
    """Call arguments, symbolic float tensors, from the shapes that `build` was given."""
    if len(shapes) + len(named_shapes) == 1:
        shapes, named_shapes = (*shapes, *named_shapes.values()), {}
    args = tuple(_symbolic_tensors(shape) for shape in shapes)
    kwargs = {
        name.removesuffix("_shape"): _symbolic_tensors(shape)
        for name, shape in named_shapes.items()
        if shape is not None
    }
    return args, kwargs


def _symbolic_tensors(shapes: Any) -> Any:
    return tree.map_shape_structure(lambda shape: keras.KerasTensor(tuple(shape)), shapes)


def as_mapping(quantizers: Any) -> Mapping[str, Any]:
    """The quantizers of weights, by path."""
    if quantizers is None:
        return {}
    if not isinstance(quantizers, Mapping):
        raise bad_type(
            "weights_quantizers",
            quantizers,
            "a dictionary from weight path to quantizer",
            "Pass for example {'kernel': quantizer}.",
        )
    return quantizers


def as_list(quantizers: Any) -> list:
    """The quantizers of outputs; one stands for a list of one."""
    if quantizers is None:
        return []
    return list(quantizers) if isinstance(quantizers, (list, tuple)) else [quantizers]
