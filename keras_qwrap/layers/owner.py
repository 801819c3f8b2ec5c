"""The base of wrapper and holder: a layer that owns quantizers."""

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import keras

from keras_qwrap.layers.keras_internals import sublayers
from keras_qwrap.numerics.checks import Told, bad_type, bad_value
from keras_qwrap.numerics.packing import compact, expand
from keras_qwrap.numerics.tensors import Tensor, read
from keras_qwrap.quantizers.base import (
    BaseKerasInferableQuantizer,
    BaseKerasTrainableQuantizer,
    check_config_is_complete,
)
from keras_qwrap.quantizers.config import QuantizationTarget

Quantizer = BaseKerasTrainableQuantizer | BaseKerasInferableQuantizer
Observer = Callable[[Quantizer, Tensor], Tensor | None]

FORMAT_VERSION = 2
"""Version of the wrapper's and the holder's config; files of a newer one are refused.

Version 1 lacks arguments of the moving averages, which have the default there.
"""

_KERAS_2_ORDER = ("name", "shape", "dtype", "initializer", "regularizer", "trainable", "constraint")
_KERAS_3_ORDER = ("shape", "initializer", "dtype")


class QuantizingLayer(keras.layers.Layer):
    """A float32 layer that adopts quantizers, creates their variables and calls them.

    Its own dtype is float32, without autocasting, whatever the global policy: scales and
    rounding are float32. A wrapped layer keeps its policy. A frozen layer (`trainable=False`) calls
    its quantizers as in inference, also in training.
    """

    weights_quantizers: Mapping[str, Quantizer] = MappingProxyType({})

    def __init__(self, **kwargs: Any) -> None:
        dtype = keras.dtype_policies.get(kwargs.pop("dtype", "float32"))
        if dtype.name != "float32":
            raise bad_value(
                "dtype", dtype.name, "float32", "Set the dtype policy on the wrapped layer instead."
            )
        super().__init__(dtype="float32", autocast=False, **kwargs)
        self._adopted: list[Quantizer] = []
        self._prefix = ""
        self._taken_names: list[str] = []
        self._claims = False
        self._observer: Observer | None = None
        self.frozen_with: Callable[[], bool] = bool
        """Whether something else, which this layer belongs to, is frozen; by default it is not."""

    def owns(self, quantizer: Quantizer) -> bool:
        """Whether this very object is one of the layer's quantizers."""
        return self._claims and self._holds(quantizer)

    def _holds(self, quantizer: Quantizer) -> bool:
        return any(quantizer is mine for mine in self._adopted)

    def _claim(self) -> None:
        """Own what is adopted; called when nothing can go wrong any more in the constructor."""
        self._claims = True

    def _adopt(self, quantizer: Any, target: QuantizationTarget, role: str) -> Quantizer:
        """A trainable quantizer itself, claimed for this layer, or a copy of an inferable one."""
        if not isinstance(quantizer, (BaseKerasTrainableQuantizer, BaseKerasInferableQuantizer)):
            raise bad_type(
                role,
                quantizer,
                "a trainable or inferable quantizer",
                "Pass an instance, for example STEWeightQATQuantizer(config).",
            )
        if getattr(quantizer, "quantization_target", None) is None:
            raise TypeError(
                f"{role}: received a {type(quantizer).__name__} without quantization target and "
                "methods, expected both. Mark the class with `mark_quantizer`, and call "
                "`super().__init__(quantization_config, ...)` in a trainable one."
            )
        if quantizer.quantization_target is not target:
            raise bad_value(
                role,
                quantizer,
                f"a quantizer for {target.name.lower()}",
                f"{type(quantizer).__name__} is for {quantizer.quantization_target.name.lower()}.",
            )
        if isinstance(quantizer, BaseKerasInferableQuantizer):
            quantizer = copy_quantizer(quantizer)
        else:
            owner: Any = quantizer._owner() if quantizer._owner is not None else None
            here = self._holds(quantizer)
            if here or (owner is not None and owner.owns(quantizer)):
                raise bad_value(
                    role,
                    quantizer,
                    "a trainable quantizer that is used nowhere else",
                    f"This object belongs to layer '{(self if here else owner).name}' already; it "
                    "holds that layer's variables. Create one for each use.",
                )
            quantizer._owner = weakref.ref(self)
        self._adopted.append(quantizer)
        return quantizer

    def _initialize(self, quantizer: Quantizer, shape: tuple, name: str) -> None:
        """Let a quantizer create its variables, named `<name>_<role>`."""
        if not quantizer.enabled:
            return
        self._prefix = f"{name}_"
        try:
            quantizer.initialize_quantization(shape, name, self)
        finally:
            self._prefix = ""

    def add_weight(self, *args: Any, **kwargs: Any) -> keras.Variable:
        """`keras.Layer.add_weight`, which also takes Keras 2's arguments and an int as shape.

        A string as first argument means Keras 2's order: name, shape, dtype, initializer, ...;
        `synchronization` and `use_resource` are ignored, as every Keras 3 variable has one kind.
        While a quantizer is initialized its tensor's name is put in front of `name`.
        """
        order = _KERAS_2_ORDER if args and isinstance(args[0], str) else _KERAS_3_ORDER
        if len(args) > len(order):
            raise TypeError(
                f"add_weight: received {len(args)} positional arguments, expected at most "
                f"{len(order)}: {', '.join(order)}. Pass the others by keyword."
            )
        positional = dict(zip(order, args, strict=False))
        twice = sorted(set(positional) & set(kwargs))
        if twice:
            raise TypeError(
                f"add_weight: received {twice} by position and by keyword, expected one of the two."
            )
        kwargs = {"autocast": False, **positional, **kwargs}
        kwargs.pop("synchronization", None)
        kwargs.pop("use_resource", None)
        if kwargs.get("trainable", True) is None:
            kwargs["trainable"] = True
        if "aggregation" in kwargs:
            aggregation = kwargs["aggregation"]
            kwargs["aggregation"] = getattr(aggregation, "name", aggregation or "none").lower()
        shape = kwargs.get("shape")
        if shape is not None:
            kwargs["shape"] = tuple(shape) if hasattr(shape, "__iter__") else (int(shape),)
        kwargs["name"] = self._unique_name(kwargs.get("name") or "variable")
        variable = super().add_weight(**kwargs)
        # A quantizer keeps it in a plain object, where TensorFlow's checkpoints find nothing: they
        # see the attributes of a layer.
        attribute = kwargs["name"]
        setattr(self, f"variable_{attribute}" if hasattr(self, attribute) else attribute, variable)
        return variable

    def _unique_name(self, role: str) -> str:
        stem = f"{self._prefix}{role}".replace("/", "_")
        name, count = stem, 1
        while name in self._taken_names:
            name, count = f"{stem}_{count}", count + 1
        self._taken_names.append(name)
        return name

    def _quantize(self, quantizer: Any, tensor: Tensor, training: Any) -> Tensor:
        if not quantizer.enabled:
            return tensor
        if self._observer is not None and _is_for_activations(quantizer):
            replaced = self._observer(quantizer, tensor)
            if replaced is not None:
                return replaced
        if "training" in inspect.signature(quantizer.__call__).parameters:
            # Of a frozen layer not even ranges move.
            frozen = not self.trainable or self.frozen_with()
            return quantizer(tensor, training=False if frozen else training)
        return quantizer(tensor)

    def _quantize_weight(
        self, quantizer: Quantizer, variable: keras.Variable, training: Any
    ) -> Tensor:
        trained = training if variable.trainable else False
        tensor = self._quantize(quantizer, read(variable), trained)
        if tuple(tensor.shape) != tuple(variable.shape):
            raise bad_value(
                type(quantizer).__name__,
                tuple(tensor.shape),
                f"a tensor of the weight's shape, {tuple(variable.shape)}",
                "A quantizer must keep the shape of its input.",
            )
        return tensor

    def finalize_state(self) -> None:
        """Let adapted layers inside use what they were given; Keras calls this after `.h5`."""
        for inner in sublayers(self):
            if inner is not self and hasattr(inner, "finalize_state"):
                inner.finalize_state()

    def own_quantizers(self) -> dict[str, Quantizer]:
        """The layer's quantizers by role: a weight's path, or `output_0`, ..."""
        outputs = [quantizer for quantizer in self._adopted if _is_for_activations(quantizer)]
        named = {f"output_{i}": quantizer for i, quantizer in enumerate(outputs)}
        return dict(self.weights_quantizers) | named

    def __repr__(self) -> str:
        inner = getattr(self, "layer", None)
        of = {"layer": type(inner).__name__} if inner is not None else {}
        facts = {"name": self.name, "built": self.built} | of | self.own_quantizers()
        return f"<{type(self).__name__} {', '.join(f'{k}={v}' for k, v in facts.items())}>"

    def get_config(self) -> dict:
        """The constructor's arguments; the dtype is always float32 and left out."""
        config = super().get_config()
        del config["dtype"]
        return config


def quantizers_in(layer: keras.Layer) -> list[tuple[QuantizingLayer, str, Quantizer]]:
    """Every quantizer in `layer` and the layers inside it: its owner, its role, itself.

    The role is a weight's path, or `output_0`, ... The owners come in no particular order.
    """
    return [
        (owner, role, quantizer)
        for owner in _owners(layer)
        for role, quantizer in owner.own_quantizers().items()
    ]


def _is_for_activations(quantizer: Quantizer) -> bool:
    return quantizer.quantization_target is QuantizationTarget.Activation


def _owners(layer: keras.Layer) -> list[QuantizingLayer]:
    return [inner for inner in sublayers(layer) if isinstance(inner, QuantizingLayer)]


@contextmanager
def observed(layer: keras.Layer, observer: Observer) -> Iterator[None]:
    """Call `observer(quantizer, tensor)` wherever `layer` quantizes an activation.

    A tensor that it returns takes the place of the quantizer's output; with None the quantizer is
    called as ever. Functions that are traced already stay as they are: call `layer` itself, or
    trace it anew.

    Raises:
        ValueError: the layer is observed already.
    """
    owners = _owners(layer)
    if any(owner._observer is not None for owner in owners):
        raise bad_value("layer", layer.name, "a layer that is not observed", "Observe it once.")
    for owner in owners:
        owner._observer = observer
    try:
        yield
    finally:
        for owner in owners:
            owner._observer = None


def copy_quantizer(quantizer: Quantizer) -> Quantizer:
    """A new quantizer of the same class and config."""
    return type(quantizer).from_config(_checked_config(quantizer))


def inferable_twin(quantizer: Quantizer) -> BaseKerasInferableQuantizer:
    """The quantizer itself if inferable, else its converted twin."""
    if isinstance(quantizer, BaseKerasInferableQuantizer):
        return quantizer
    twin = quantizer.convert2inferable()
    if not isinstance(twin, BaseKerasInferableQuantizer):
        raise bad_type(
            f"{type(quantizer).__name__}.convert2inferable()",
            twin,
            "an inferable quantizer",
            "Return for example a WeightsSymmetricInferableQuantizer.",
        )
    return twin


def converted_quantizer(quantizer: Any) -> Quantizer:
    """What an activation quantizer becomes: its twin; a disabled copy where it passes its input."""
    if not quantizer.passes_input:
        return inferable_twin(quantizer)
    copy: Any = copy_quantizer(quantizer)
    copy.quantization_config = copy.quantization_config.disabled()
    return copy


def serialize_quantizer(quantizer: Quantizer) -> dict:
    """A quantizer as plain values; refused where its config would lose an argument."""
    _checked_config(quantizer)
    return compact(keras.saving.serialize_keras_object(quantizer))


def deserialize_quantizers(config: Any, custom_objects: dict | None = None) -> Any:
    """The quantizers that `serialize_quantizer` made plain, in the structure they are in."""
    return keras.saving.deserialize_keras_object(expand(config), custom_objects=custom_objects)


def _checked_config(quantizer: Quantizer) -> dict:
    config = quantizer.get_config()
    check_config_is_complete(quantizer, config)
    return config


def check_format_version(config: dict) -> dict:
    """`config` without its format version, refused if a newer package wrote it."""
    config = dict(config)
    version = config.pop("format_version", None)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise bad_value(
            "format_version", version, "a whole number from 1", "The config is damaged or foreign."
        )
    if version > FORMAT_VERSION:
        raise bad_value(
            "format_version",
            version,
            f"at most {FORMAT_VERSION}",
            "A newer keras_qwrap wrote this; upgrade the package to read it.",
        )
    return config


def refuse_inner_wrappers(layer: keras.Layer) -> None:
    """Refuse to convert a layer with wrappers or holders inside: they would be left as they are."""
    inside = [inner.name for inner in sublayers(layer) if isinstance(inner, QuantizingLayer)]
    if inside:
        raise bad_value(
            "model",
            Told(f"layer '{layer.name}' of class {type(layer).__name__} with {inside} inside"),
            "wrappers and holders that are layers of a Functional or Sequential model",
            "Wrap the outer layer, and name the inner weights by path ('layer/kernel').",
        )
