"""Straight-through quantizers: fixed ranges, or for weights a range taken from the weight."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_qwrap.numerics import ranges
from keras_qwrap.numerics.channels import Channels
from keras_qwrap.numerics.rounding import fake_quantize_covered, fake_quantize_unclipped
from keras_qwrap.numerics.tensors import Tensor, float32_input, to_numpy
from keras_qwrap.quantizers.base import BaseKerasInferableQuantizer, BaseKerasTrainableQuantizer
from keras_qwrap.quantizers.config import (
    PACKAGE,
    QuantizationMethod,
    QuantizationTarget,
    TrainableQuantizerWeightsConfig,
)
from keras_qwrap.quantizers.inferable import inferable_class
from keras_qwrap.quantizers.marks import mark_quantizer


class _GivenRange:
    """Computes by an inferable quantizer."""

    def __init__(self, quantizer: BaseKerasInferableQuantizer) -> None:
        self.quantizer = quantizer

    def initialize_quantization(self, tensor_shape: tuple, name: str, layer: Any) -> dict:
        return self.quantizer.initialize_quantization(tensor_shape, name, layer)

    def __call__(self, inputs: Tensor) -> Tensor:
        return self.quantizer(inputs)

    def convert2inferable(self) -> BaseKerasInferableQuantizer:
        return type(self.quantizer).from_config(self.quantizer.get_config())


class _OwnRange:
    """Computes by the range that the weight has at this moment."""

    def __init__(self, config: TrainableQuantizerWeightsConfig, rank: int) -> None:
        self.config = config
        self.channels: Channels = config.channels(rank)
        self._weight: Any = None

    def initialize_quantization(self, tensor_shape: tuple, name: str, layer: Any) -> dict:
        self._weight = layer.latent_weight(name)
        return {}

    def __call__(self, inputs: Tensor) -> Tensor:
        x, dtype = float32_input(inputs)
        return ops.cast(self._quantize(x), dtype)

    def convert2inferable(self) -> BaseKerasInferableQuantizer:
        weight, _ = float32_input(to_numpy(self._weight))
        config = self.config
        *lower, upper = (to_numpy(end) for end in self._ends(weight))
        if not config.min_threshold:
            upper = ranges.one_for_zeros(upper, weight, self.channels.reduced)
        cls = inferable_class(QuantizationTarget.Weights, config.quantization_method)
        values = [self.channels.gather(end) for end in (*lower, upper)]
        return cls(config.num_bits, *values, **self._other_arguments())

    def _other_arguments(self) -> dict:
        return self.channels.get_config()

    def _ends(self, x: Tensor) -> tuple[Tensor, ...]:
        """The threshold of a weight, or the lower and the upper end."""
        raise NotImplementedError

    def _quantize(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class _OwnThreshold(_OwnRange):
    def _other_arguments(self) -> dict:
        return super()._other_arguments() | {"narrow": True}

    def _ends(self, x: Tensor) -> tuple[Tensor, ...]:
        config = self.config
        find = ranges.symmetric_threshold
        if config.quantization_method is QuantizationMethod.POWER_OF_TWO:
            find = ranges.power_of_two_threshold
        return (find(x, self.channels.reduced, config.num_bits, config.min_threshold),)

    def _quantize(self, x: Tensor) -> Tensor:
        threshold = ops.stop_gradient(self._ends(x)[0])
        scale = ranges.symmetric_scale(threshold, self.config.num_bits, signed=True)
        return fake_quantize_unclipped(x, scale)


class _OwnEnds(_OwnRange):
    def _ends(self, x: Tensor) -> tuple[Tensor, ...]:
        config = self.config
        reduced = self.channels.reduced
        return ranges.uniform_range(x, reduced, config.num_bits, config.min_threshold)

    def _quantize(self, x: Tensor) -> Tensor:
        bits = self.config.num_bits
        low, high = (ops.stop_gradient(end) for end in self._ends(x))
        scale, zero_point = ranges.uniform_scale_and_zero_point(low, high, bits, ops)
        return fake_quantize_covered(x, scale, -zero_point, 2**bits - 1 - zero_point)


_ARGUMENTS = {
    "threshold": "threshold",
    "is_signed": "signed",
    "range_min": "min_range",
    "range_max": "max_range",
}
"""Params of a config -> what the constructors of inferable quantizers call them."""


class _STEQuantizer(BaseKerasTrainableQuantizer):
    """Computes by the range that the config gives, or else by the weight's own."""

    _needed: tuple[str, ...] = ("threshold",)
    _optional: tuple[str, ...] = ()

    def __init__(self, quantization_config: Any) -> None:
        super().__init__(quantization_config)
        self._by: _GivenRange | _OwnRange | None = None
        if self._check_params(self._needed, self._optional) and self.enabled:
            self._inferable(self._other_arguments())

    def _other_arguments(self, rank: int | None = None) -> dict:
        """Of the inferable quantizer, where no params say so; None for a rank not known yet."""
        return {}

    def _inferable(self, others: dict) -> BaseKerasInferableQuantizer:
        """The inferable quantizer of the range in the config."""
        config = self.quantization_config
        cls = inferable_class(self.quantization_target, config.quantization_method)
        given = {_ARGUMENTS[key]: value for key, value in config.params.items()}
        quantizer = cls(config.num_bits, **others | given)
        ends = [config.params[key] for key in reversed(self._needed)]
        width = ends[0] if len(ends) == 1 else np.subtract(*ends)
        self._check_floor(" - ".join(reversed(self._needed)), width)
        return quantizer

    def _find_range(self, rank: int) -> _GivenRange | _OwnRange:
        return _GivenRange(self._inferable(self._other_arguments(rank)))

    def initialize_quantization(self, tensor_shape: tuple, name: str, layer: Any) -> dict:
        self._by = self._find_range(len(tensor_shape))
        self.quantizer_parameters = self._by.initialize_quantization(tensor_shape, name, layer)
        return self.quantizer_parameters

    def __call__(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """Quantize a float tensor, in training as ever; shape and dtype are kept, in float32."""
        return self._built(self._by, "a call")(inputs)

    def convert2inferable(self) -> BaseKerasInferableQuantizer:
        """An inferable quantizer with the given range, or with the weight's present one."""
        return self._built(self._by, "a call").convert2inferable()


class _STEWeights(_STEQuantizer):
    _own: type[_OwnRange]

    def _find_range(self, rank: int) -> _GivenRange | _OwnRange:
        config = self.quantization_config
        return super()._find_range(rank) if config.params else self._own(config, rank)

    def _other_arguments(self, rank: int | None = None) -> dict:
        config = self.quantization_config
        if rank is None:
            # One that the weight may have: that of a range which has its shape, or a high one.
            axes = config.weights_channels_axis
            rank = max(np.ndim(value) for value in config.params.values())
            if rank <= len(axes):
                rank = max(0, *axes) + 1 + max(0, *(-axis for axis in axes))
        return config.channels(rank).get_config()


class _STEActivation(_STEQuantizer):
    def __init__(self, quantization_config: Any) -> None:
        super().__init__(quantization_config)
        if self.enabled:
            self._require_params(self._needed)


@keras.saving.register_keras_serializable(PACKAGE)
@mark_quantizer(
    QuantizationTarget.Weights,
    [QuantizationMethod.SYMMETRIC, QuantizationMethod.POWER_OF_TWO],
    ranges=["weight", "mse"],
)
class STEWeightQATQuantizer(_STEWeights):
    """Symmetric or power-of-two weights quantizer with a straight-through gradient.

    Without a threshold in the config, at every call `s = max(max|w|, min_threshold) * float32(1 /
    (2**(b-1) - 1))`, at least 2**-126, over the axes that are not kept, for POWER_OF_TWO rounded
    up to a power of two, and `y = round_half_even(w / s) * s`: the narrow grid, nothing is clipped,
    gradient `dw = dy`. Zeros alone have the threshold 1, if there is no `min_threshold`. No
    variable is created. A NaN or an infinity makes its channel NaN.

    With a threshold it computes as `WeightsSymmetricInferableQuantizer` or
    `WeightsPOTInferableQuantizer`; gradient: upstream inside half a step around the range, else 0.

    Args:
        quantization_config: `TrainableQuantizerWeightsConfig`; its params may hold `threshold`, a
            float or one for each channel.

    Raises:
        TypeError, ValueError: the config is of another kind, asks for another method, holds
            unknown params or a threshold out of bounds.

    Source: Bengio et al. 2013, arXiv:1308.3432 (straight-through estimator).

    Example:

    ```python
    import keras
    import keras_qwrap as qi

    config = qi.TrainableQuantizerWeightsConfig(qi.QuantizationMethod.SYMMETRIC, weights_n_bits=4)
    layer = qi.KerasQuantizationWrapper(
        keras.layers.Dense(3), {"kernel": qi.STEWeightQATQuantizer(config)}
    )
    layer.build((None, 5))
    codes, scale, zero_point = layer.get_codes()["kernel"]
    print(codes.shape, scale.shape, abs(codes).max())  # (5, 3) (1, 3) 7
    ```
    """

    _own = _OwnThreshold


@keras.saving.register_keras_serializable(PACKAGE)
@mark_quantizer(QuantizationTarget.Weights, [QuantizationMethod.UNIFORM], ranges=["weight"])
class STEUniformWeightQATQuantizer(_STEWeights):
    """Uniform weights quantizer with a straight-through gradient.

    Without a range in the config, at every call it takes the smallest and largest weight over the
    axes that are not kept, widened to hold zero, and rounds onto the grid of
    `WeightsUniformInferableQuantizer`; an end moves by at most half a step, gradient `dw = dy`.
    Zeros alone have the range 0 to 1, if there is no `min_threshold`.

    With a range it computes as that quantizer; gradient: upstream inside half a step around the
    range, else 0.

    Args:
        quantization_config: `TrainableQuantizerWeightsConfig`; its params may hold `range_min` and
            `range_max`, floats or one for each channel.

    Raises:
        TypeError, ValueError: the config is of another kind, asks for another method, holds
            unknown params or a range out of bounds.

    Source: Bengio et al. 2013, arXiv:1308.3432 (straight-through estimator).

    Example:

    ```python
    import keras
    import keras_qwrap as qi

    config = qi.TrainableQuantizerWeightsConfig(qi.QuantizationMethod.UNIFORM, weights_n_bits=4)
    layer = qi.KerasQuantizationWrapper(
        keras.layers.Dense(3), {"kernel": qi.STEUniformWeightQATQuantizer(config)}
    )
    layer.build((None, 5))
    print(layer.get_codes()["kernel"][0].min())  # 0
    ```
    """

    _needed = ("range_min", "range_max")
    _own = _OwnEnds


@keras.saving.register_keras_serializable(PACKAGE)
@mark_quantizer(
    QuantizationTarget.Activation, [QuantizationMethod.SYMMETRIC, QuantizationMethod.POWER_OF_TWO]
)
class STEActivationQATQuantizer(_STEActivation):
    """Symmetric or power-of-two activation quantizer with a straight-through gradient.

    Computes as `ActivationSymmetricInferableQuantizer` or `ActivationPOTInferableQuantizer`;
    gradient: upstream inside half a step around the range, else 0.

    Args:
        quantization_config: `TrainableQuantizerActivationConfig`; its params hold `threshold`, a
            float, and may hold `is_signed`, True by default.

    Raises:
        TypeError, ValueError: the config is of another kind, asks for another method, holds
            unknown params, no threshold or one out of bounds.

    Source: Bengio et al. 2013, arXiv:1308.3432 (straight-through estimator).

    Example:

    ```python
    import keras
    import keras_qwrap as qi

    config = qi.TrainableQuantizerActivationConfig(
        qi.QuantizationMethod.POWER_OF_TWO, 8, {"threshold": 2.0, "is_signed": False}
    )
    holder = qi.KerasActivationQuantizationHolder(qi.STEActivationQATQuantizer(config))
    print(keras.ops.convert_to_numpy(holder(keras.ops.array([[-1.0, 0.5, 9.0]]))))
    ```
    """

    _optional = ("is_signed",)

    def _other_arguments(self, rank: int | None = None) -> dict:
        return {"signed": True}


@keras.saving.register_keras_serializable(PACKAGE)
@mark_quantizer(QuantizationTarget.Activation, [QuantizationMethod.UNIFORM])
class STEUniformActivationQATQuantizer(_STEActivation):
    """Uniform activation quantizer with a straight-through gradient.

    Computes as `ActivationUniformInferableQuantizer`; gradient: upstream inside half a step around
    the range, else 0.

    Args:
        quantization_config: `TrainableQuantizerActivationConfig`; its params hold `range_min` and
            `range_max`, floats.

    Raises:
        TypeError, ValueError: the config is of another kind, asks for another method, holds
            unknown params, no range or one out of bounds.

    Source: Bengio et al. 2013, arXiv:1308.3432 (straight-through estimator).

    Example:

    ```python
    import keras
    import keras_qwrap as qi

    config = qi.TrainableQuantizerActivationConfig(
        qi.QuantizationMethod.UNIFORM, 8, {"range_min": -1.0, "range_max": 4.1}
    )
    holder = qi.KerasActivationQuantizationHolder(qi.STEUniformActivationQATQuantizer(config))
    print(keras.ops.convert_to_numpy(holder(keras.ops.array([[-9.0, 0.0, 9.0]]))))
    ```
    """

    _needed = ("range_min", "range_max")
