"""What a quantizer is: the two base classes, and the questions that all quantizers answer."""

import inspect
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_qwrap.numerics.checks import bad_type, bad_value, brief
from keras_qwrap.numerics.tensors import Tensor
from keras_qwrap.quantizers.config import (
    QuantizationMethod,
    QuantizationTarget,
    TrainableQuantizerActivationConfig,
    TrainableQuantizerWeightsConfig,
    check_member,
)
from keras_qwrap.quantizers.marks import check_methods

_CONFIG_OF = {
    QuantizationTarget.Weights: TrainableQuantizerWeightsConfig,
    QuantizationTarget.Activation: TrainableQuantizerActivationConfig,
}


_STATED = ("quantization_target", "quantization_method")


def check_config_is_complete(quantizer: Any, config: Mapping) -> None:
    """Refuse a config that misses an argument of the quantizer's constructor."""
    catch_alls = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(type(quantizer)).parameters.values()
    missing = [p.name for p in parameters if p.kind not in catch_alls and p.name not in config]
    # What the class states itself, marked by `mark_quantizer`, is there without a config.
    stated = {name: getattr(type(quantizer), name, None) for name in _STATED}
    missing = [name for name in missing if stated.get(name) != getattr(quantizer, name, name)]
    if missing:
        raise ValueError(
            f"{type(quantizer).__name__}.get_config: received {sorted(config)}, expected every "
            f"argument of the constructor; {missing} would be lost in a saved file. Override "
            "`get_config` and add them to what `super().get_config()` returns."
        )


def arguments_of(quantizer: Any, known: Mapping[str, Any]) -> dict:
    """Of the values that are known by name, those that a quantizer's constructor was given."""
    parameters = inspect.signature(type(quantizer)).parameters.values()
    given = [p for p in parameters if p.name in known]
    return {p.name: known[p.name] for p in given if repr(known[p.name]) != repr(p.default)}


class _Quantizer:
    """What the rest of the package asks any quantizer, with the answers of one that says nothing.

    A class answers otherwise by an attribute or a property of that name.
    """

    quantization_target: QuantizationTarget
    """Weights or activations."""
    quantization_method: list[QuantizationMethod]
    """The methods that the class supports."""
    identifier: Any = None
    """Any name by which a project finds its quantizer again."""
    enabled: Any = True
    """Whether it quantizes at all; if not, it is never called."""
    passes_input: Any = False
    """Whether it leaves tensors in float, now and once it is converted."""
    takes_range: Any = False
    """Whether `calibrate` finds its range in data, and hands it to `set_range`."""
    needs_range: Any = False
    """Whether calibration or training must find its range before it can be converted."""
    range: Any = None
    """Its ends, `(low, high)`: of the grid of an activation, or as a report shows them: the least
    and the greatest of the thresholds, or of the ends, of a weight. None where there are none yet,
    and for a class that does not say."""
    pass_whole_numbers: Any = False
    """Whether calibration tells it if its data are whole numbers, which it then passes."""
    whole_numbers: bool | None = None
    """Whether calibration found whole numbers alone; None if not known."""


class BaseKerasInferableQuantizer(_Quantizer):
    """A quantizer whose parameters are fixed.

    A subclass gives `__call__`, `get_config`, `num_bits`, `scale`, `zero_point`,
    `quantize_to_codes` and `dequantize`, and is marked with `mark_quantizer`. A subclass that
    reads variables overrides `initialize_quantization` as well.

    Example (signs, with one threshold; only what a call and a saved file need):

    ```python
    import keras
    import keras_qwrap as qi

    @keras.saving.register_keras_serializable("my_package")
    @qi.mark_quantizer(qi.QuantizationTarget.Activation, [qi.QuantizationMethod.SYMMETRIC])
    class SignQuantizer(qi.BaseKerasInferableQuantizer):
        def __init__(self, threshold):
            self.threshold = threshold

        def __call__(self, inputs):
            return keras.ops.sign(inputs) * self.threshold

        def get_config(self):
            return {"threshold": self.threshold}

    holder = qi.KerasActivationQuantizationHolder(SignQuantizer(0.5))
    print(keras.ops.convert_to_numpy(holder(keras.ops.array([[-3.0, 2.0]]))))  # [[-0.5  0.5]]
    ```
    """

    def initialize_quantization(self, tensor_shape: tuple, name: str, layer: Any) -> dict:
        """Create the quantizer's variables through `layer.add_weight`; none by default."""
        return {}

    def changed_ranges(self) -> list[str]:
        """Names of the variables that do not hold what the constructor was given; none by default.

        A file holds both, and loading refuses it where they differ.
        """
        return []

    def __call__(self, inputs: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(inputs).")

    @property
    def has_codes(self) -> bool:
        """Whether the class defines codes; a weight without them is saved as floats."""
        return type(self).quantize_to_codes is not BaseKerasInferableQuantizer.quantize_to_codes

    @property
    def num_bits(self) -> int:
        """Width of the codes."""
        raise NotImplementedError(f"{type(self).__name__} must define num_bits.")

    @property
    def scale(self) -> np.ndarray:
        """Step between neighbouring codes, float32, broadcastable to the tensor."""
        raise NotImplementedError(f"{type(self).__name__} must define scale.")

    @property
    def zero_point(self) -> np.ndarray:
        """Code of zero, int32, broadcastable to the tensor."""
        raise NotImplementedError(f"{type(self).__name__} must define zero_point.")

    def quantize_to_codes(self, x: Any) -> np.ndarray:
        """Integer codes of `x`, int32; NaN is refused."""
        raise NotImplementedError(f"{type(self).__name__} must define quantize_to_codes(x).")

    def dequantize(self, codes: Any) -> np.ndarray:
        """Values of integer codes, float32."""
        raise NotImplementedError(f"{type(self).__name__} must define dequantize(codes).")

    def dequantize_tensor(self, codes: Tensor) -> Tensor:
        """`dequantize` of a tensor of codes: `(codes - zero_point) * scale`, unless overridden.

        Loaded models that keep codes compute with it.
        """
        steps = ops.subtract(ops.cast(codes, "float32"), np.asarray(self.zero_point, np.float32))
        return ops.multiply(steps, np.asarray(self.scale, np.float32))

    def __repr__(self) -> str:
        return brief(type(self).__name__, **arguments_of(self, vars(self)))

    def get_config(self) -> dict:
        """The constructor's arguments as plain values."""
        raise NotImplementedError(f"{type(self).__name__} must define get_config().")

    @classmethod
    def from_config(cls, config: dict) -> "BaseKerasInferableQuantizer":
        """The quantizer that `get_config` described."""
        return cls(**config)


class BaseKerasTrainableQuantizer(_Quantizer):
    """A quantizer that is trained with its layer, and gives an inferable twin afterwards.

    A subclass defines `initialize_quantization`, which creates variables through
    `layer.add_weight` and returns them, `__call__(inputs)` or `__call__(inputs, training)`, and
    `convert2inferable`. Target and methods are passed to this constructor or given by
    `mark_quantizer`. An object belongs to the one wrapper or holder that it is given to.

    A quantizer of activations that also defines `set_range` and `range` is calibrated by
    `calibrate` and reported as not calibrated before; one whose range training moves defines
    `freeze_range`, for `FreezeRanges`, and may define `delay_quantization`.

    Args:
        quantization_config: a `TrainableQuantizerWeightsConfig` or a
            `TrainableQuantizerActivationConfig`, according to the target.
        quantization_target: weights or activations.
        quantization_method: the methods that the class supports.

    Raises:
        TypeError: the config is not of the target's kind, or no target is known.
        ValueError: the config asks for a method that the class does not support.

    Example:

    ```python
    import keras
    import keras_qwrap as qi

    @keras.saving.register_keras_serializable("my_package")
    class MyWeightQuantizer(qi.BaseKerasTrainableQuantizer):
        def __init__(self, quantization_config):
            super().__init__(
                quantization_config,
                qi.QuantizationTarget.Weights,
                [qi.QuantizationMethod.SYMMETRIC],
            )

        def initialize_quantization(self, tensor_shape, name, layer):
            limit = layer.add_weight("limit", shape=(), initializer="ones")
            self.quantizer_parameters = {"limit": limit}
            return self.quantizer_parameters

        def __call__(self, inputs):
            scale = self.quantizer_parameters["limit"] / 128
            return qi.fake_quantize(inputs, scale, -128, 127)

        def convert2inferable(self):
            limit = keras.ops.convert_to_numpy(self.quantizer_parameters["limit"])
            return qi.WeightsSymmetricInferableQuantizer(8, limit, per_channel=False)

    config = qi.TrainableQuantizerWeightsConfig(qi.QuantizationMethod.SYMMETRIC)
    wrapped = qi.KerasQuantizationWrapper(
        keras.layers.Dense(2), {"kernel": MyWeightQuantizer(config)}
    )
    print(tuple(wrapped(keras.ops.ones((1, 3))).shape))  # (1, 2)
    ```
    """

    range_method: str = "mse"
    """How `calibrate` finds its range, unless it is told: one of its methods."""
    momentum: float = 0.99
    """Share of the old range where `calibrate` moves it from batch to batch, as training would."""
    _owner: weakref.ref | None = None

    def __init__(
        self,
        quantization_config: Any,
        quantization_target: QuantizationTarget | None = None,
        quantization_method: Sequence[QuantizationMethod] | None = None,
    ) -> None:
        if quantization_target is not None:
            self.quantization_target = check_member(
                "quantization_target", quantization_target, QuantizationTarget
            )
        if quantization_method is not None:
            self.quantization_method = check_methods(quantization_method)
        if not hasattr(self, "quantization_target") or not hasattr(self, "quantization_method"):
            raise TypeError(
                f"{type(self).__name__}: received no quantization target and methods, expected "
                "both. Pass them to super().__init__ or mark the class with `mark_quantizer`."
            )
        expected: Any = _CONFIG_OF[self.quantization_target]
        if not isinstance(quantization_config, expected):
            raise bad_type(
                "quantization_config",
                quantization_config,
                f"a {expected.__name__}",
                f"{type(self).__name__} quantizes {self.quantization_target.name.lower()}.",
            )
        if quantization_config.quantization_method not in self.quantization_method:
            raise bad_value(
                "quantization_config",
                quantization_config.quantization_method.name,
                f"one of {', '.join(m.name for m in self.quantization_method)}",
                f"{type(self).__name__} supports no other method.",
            )
        self.quantization_config: Any = quantization_config
        self.quantizer_parameters: dict[str, Any] = {}

    def _check_params(self, needed: Sequence[str], optional: Sequence[str] = ()) -> dict:
        """The config's params, refused with unknown keys, or with some of those needed, not all."""
        config = self.quantization_config
        known = sorted([*needed, *optional])
        unknown = sorted(set(config.params) - set(known))
        if unknown:
            fix = f"{type(self).__name__} reads no others."
            raise bad_value(
                f"{config.kind}_quantization_params", unknown, f"keys among {known}", fix
            )
        if config.params:
            self._require_params(needed)
        return config.params

    def _require_params(self, needed: Sequence[str]) -> None:
        """Refuse a config without these params, for a range that the quantizer cannot know."""
        config = self.quantization_config
        missing = [key for key in needed if key not in config.params]
        if missing:
            raise bad_value(
                f"{config.kind}_quantization_params",
                config.params,
                f"both {' and '.join(needed)}" if len(needed) > 1 else f"a {needed[0]}",
                f"{type(self).__name__} lacks {missing}.",
            )

    def _check_floor(self, name: str, width: Any) -> None:
        """Refuse a given range that is narrower than the config's `min_threshold`."""
        floor = self.quantization_config.min_threshold
        if np.any(np.asarray(width, dtype=np.float32) < np.float32(floor)):
            fix = "Widen the range or lower min_threshold."
            raise bad_value(name, width, f"a range of at least min_threshold={floor}", fix)

    def _built(self, part: Any, what: str) -> Any:
        """What `initialize_quantization` made, refused while there is none."""
        if not part:
            raise ValueError(
                f"{type(self).__name__}: received {what} before `initialize_quantization`, "
                "expected a built wrapper or holder. Call or build the layer first."
            )
        return part

    @property
    def enabled(self) -> bool:
        """False where the config leaves the tensor in float."""
        return self.quantization_config.enabled

    @property
    def passes_input(self) -> bool:
        """Whether it leaves tensors in float, now and once it is converted."""
        return not self.enabled

    def initialize_quantization(self, tensor_shape: tuple, name: str, layer: Any) -> dict:
        """Create the quantizer's variables, once for each build.

        Args:
            tensor_shape: shape of the tensor that will be quantized.
            name: its name: a weight's path with `_` for `/`, or `output_0`.
            layer: the wrapper or holder; `layer.add_weight` creates a variable.

        Returns:
            The created variables by name.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define initialize_quantization(tensor_shape, name, layer)."
        )

    def __call__(self, inputs: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(inputs).")

    @classmethod
    def from_spec(
        cls, quantization_config: Any, range: str, pass_whole_numbers: bool = False
    ) -> "BaseKerasTrainableQuantizer":
        """The quantizer that a recipe puts where a spec asks for this class.

        Args:
            quantization_config: what the constructor takes.
            range: the spec's word for how the range is found.
            pass_whole_numbers: whether it should pass whole numbers, if it can.
        """
        return cls(quantization_config)

    @property
    def takes_range(self) -> bool:
        """Whether it quantizes activations, and defines `set_range`."""
        defined = type(self).set_range is not BaseKerasTrainableQuantizer.set_range
        target = self.quantization_target is QuantizationTarget.Activation
        return self.enabled and defined and target

    @property
    def needs_range(self) -> bool:
        """Whether it is built, and has no range yet."""
        waits = self.takes_range and not self.passes_input and bool(self.quantizer_parameters)
        return waits and self.range is None

    def set_range(self, low: float, high: float) -> None:
        """Store a range; two zeros say that there were zeros alone."""
        raise NotImplementedError(f"{type(self).__name__} must define set_range(low, high).")

    def set_whole_numbers(self, whole: bool) -> None:
        """Store whether there are whole numbers alone; only with `pass_whole_numbers`."""
        raise NotImplementedError(f"{type(self).__name__} must define set_whole_numbers(whole).")

    def freeze_range(self) -> None:
        """Let training leave the range as it is, from now on; by default it does so anyway."""

    def delay_quantization(self, steps: int) -> None:
        """Pass the tensor unquantized in the first `steps` training calls."""
        raise NotImplementedError(f"{type(self).__name__} must define delay_quantization(steps).")

    def convert2inferable(self) -> BaseKerasInferableQuantizer:
        """An inferable quantizer that gives the same outputs."""
        raise NotImplementedError(f"{type(self).__name__} must define convert2inferable().")

    @property
    def num_bits(self) -> int:
        """Width of the codes, of the inferable twin."""
        return self.convert2inferable().num_bits

    @property
    def scale(self) -> np.ndarray:
        """Step between neighbouring codes, of the inferable twin."""
        return self.convert2inferable().scale

    @property
    def zero_point(self) -> np.ndarray:
        """Code of zero, of the inferable twin."""
        return self.convert2inferable().zero_point

    def quantize_to_codes(self, x: Any) -> np.ndarray:
        """Integer codes of `x`, of the inferable twin."""
        return self.convert2inferable().quantize_to_codes(x)

    def dequantize(self, codes: Any) -> np.ndarray:
        """Values of integer codes, of the inferable twin."""
        return self.convert2inferable().dequantize(codes)

    def __repr__(self) -> str:
        known = dict(vars(self))
        config: Any = known.pop("quantization_config", None)
        values, named = config.given() if config else ([], {})
        return brief(type(self).__name__, *values, **named, **arguments_of(self, known))

    def get_config(self) -> dict:
        """`{"quantization_config": ...}`; a subclass with further arguments must extend it.

        Raises:
            ValueError: the constructor has further arguments and `get_config` is not overridden.
        """
        config = {
            "quantization_config": keras.saving.serialize_keras_object(self.quantization_config)
        }
        if type(self).get_config is BaseKerasTrainableQuantizer.get_config:
            check_config_is_complete(self, config)
        return config

    @classmethod
    def from_config(cls, config: dict) -> "BaseKerasTrainableQuantizer":
        """The quantizer that `get_config` described."""
        return cls(
            **{
                key: keras.saving.deserialize_keras_object(value)
                if isinstance(value, dict) and "class_name" in value
                else value
                for key, value in config.items()
            }
        )
