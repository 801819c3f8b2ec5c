"""Straight-through quantizers: fixed ranges, or for weights a range taken from the weight."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_qwrap.numerics import ranges
from keras_qwrap.numerics.channels import Channels, make_channels
from keras_qwrap.numerics.checks import bad_value
from keras_qwrap.numerics.rounding import fake_quantize_covered, fake_quantize_unclipped
from keras_qwrap.numerics.tensors import Tensor, float32_input, to_numpy
from keras_qwrap.quantizers.base import (
    BaseKerasInferableQuantizer,
    BaseKerasTrainableQuantizer,
)
from keras_qwrap.quantizers.config import PACKAGE, QuantizationMethod, QuantizationTarget
from keras_qwrap.quantizers.inferable import (
    ActivationPOTInferableQuantizer,
    ActivationSymmetricInferableQuantizer,
    ActivationUniformInferableQuantizer,
    WeightsPOTInferableQuantizer,
    WeightsSymmetricInferableQuantizer,
    WeightsUniformInferableQuantizer,
)
from keras_qwrap.quantizers.marks import mark_quantizer


def _check_keys(quantizer: Any, params: dict, known: set[str]) -> None:
    unknown = sorted(set(params) - known)
    if unknown:
        raise bad_value(
            "quantization params",
            unknown,
            f"keys among {sorted(known)}",
            f"{type(quantizer).__name__} reads no others.",
        )


def _check_floor(name: str, width: Any, min_threshold: float) -> None:
    if np.any(np.asarray(width, dtype=np.float32) < np.float32(min_threshold)):
        raise bad_value(
            name,
            width,
            f"a range of at least min_threshold={min_threshold}",
            "Widen the range or lower min_threshold.",
        )


class _STEQuantizer(BaseKerasTrainableQuantizer):
    """Delegates to an inferable quantizer where the range is given."""

    def __init__(self, quantization_config: Any) -> None:
        super().__init__(quantization_config)
        self._fixed: BaseKerasInferableQuantizer | None = None

    def _fixed_quantizer(self, rank: int) -> BaseKerasInferableQuantizer:
        raise NotImplementedError

    def initialize_quantization(self, tensor_shape: tuple, name: str, layer: Any) -> dict:
        self._fixed = self._fixed_quantizer(len(tensor_shape))
        self.quantizer_parameters = self._fixed.initialize_quantization(tensor_shape, name, layer)
        return self.quantizer_parameters

    def __call__(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """Quantize a float tensor, in training as ever; shape and dtype are kept, in float32."""
        return self._initialized(self._fixed)(inputs)

    def convert2inferable(self) -> BaseKerasInferableQuantizer:
        """An inferable quantizer with the same range."""
        fixed = self._initialized(self._fixed)
        return type(fixed).from_config(fixed.get_config())

    def _initialized(self, part: Any) -> Any:
        if part is None:
            raise ValueError(
                f"{type(self).__name__}: received a call before `initialize_quantization`, "
                "expected a built wrapper or holder. Call or build the layer first."
            )
        return part


class _STEWeights(_STEQuantizer):
    """Takes the range from the weight at every call, where none is given."""

    _range_keys: frozenset[str]

    def __init__(self, quantization_config: Any) -> None:
        super().__init__(quantization_config)
        params = self.quantization_config.weights_quantization_params
        _check_keys(self, params, set(self._range_keys))
        self._range_is_given = bool(params)
        self._channels: Channels | None = None
        self._weight: Any = None
        if self._range_is_given:
            self._fixed_quantizer(self._possible_rank())

    def _possible_rank(self) -> int:
        """A rank that the weight may have: that of a range which has its shape, or a high one."""
        config = self.quantization_config
        axes = config.weights_channels_axis
        given = max(np.ndim(value) for value in config.weights_quantization_params.values())
        return given if given > len(axes) else max(0, *axes) + 1 + max(0, *(-a for a in axes))

    def _channel_arguments(self, rank: int) -> dict:
        config = self.quantization_config
        if not config.weights_per_channel_threshold:
            return {"per_channel": False}
        axis = config.weights_channels_axis
        return {"per_channel": True, "channel_axis": axis, "input_rank": rank}

    def initialize_quantization(self, tensor_shape: tuple, name: str, layer: Any) -> dict:
        if self._range_is_given:
            return super().initialize_quantization(tensor_shape, name, layer)
        arguments = {"channel_axis": None, "input_rank": None}
        self._channels = make_channels(**arguments | self._channel_arguments(len(tensor_shape)))
        self._weight = layer.latent_weight(name)
        return self.quantizer_parameters

    def __call__(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """Quantize a float tensor, in training as ever; shape and dtype are kept, in float32."""
        if self._range_is_given:
            return super().__call__(inputs, training)
        x, dtype = float32_input(inputs)
        return ops.cast(self._quantize_by_own_range(x, self._initialized(self._channels)), dtype)

    def convert2inferable(self) -> BaseKerasInferableQuantizer:
        """An inferable quantizer with the given range, or with the weight's present one."""
        if self._range_is_given:
            return super().convert2inferable()
        channels = self._initialized(self._channels)
        weight, _ = float32_input(to_numpy(self._weight))
        return self._own_range_quantizer(
            weight, channels, self._channel_arguments(channels.rank or 0)
        )

    def _quantize_by_own_range(self, x: Tensor, channels: Channels) -> Tensor:
        raise NotImplementedError

    def _own_range_quantizer(
        self, weight: Tensor, channels: Channels, arguments: dict
    ) -> BaseKerasInferableQuantizer:
        raise NotImplementedError


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

    _range_keys = frozenset({"threshold"})

    def _class(self) -> type[WeightsSymmetricInferableQuantizer]:
        method = self.quantization_config.quantization_method
        if method is QuantizationMethod.POWER_OF_TWO:
            return WeightsPOTInferableQuantizer
        return WeightsSymmetricInferableQuantizer

    def _fixed_quantizer(self, rank: int) -> BaseKerasInferableQuantizer:
        config = self.quantization_config
        threshold = config.weights_quantization_params["threshold"]
        quantizer = self._class()(config.weights_n_bits, threshold, **self._channel_arguments(rank))
        _check_floor("threshold", threshold, config.min_threshold)
        return quantizer

    def _threshold(self, x: Tensor, channels: Channels) -> Tensor:
        config = self.quantization_config
        find = ranges.symmetric_threshold
        if config.quantization_method is QuantizationMethod.POWER_OF_TWO:
            find = ranges.power_of_two_threshold
        return find(x, channels.reduced, config.weights_n_bits, config.min_threshold)

    def _quantize_by_own_range(self, x: Tensor, channels: Channels) -> Tensor:
        threshold = ops.stop_gradient(self._threshold(x, channels))
        bits = self.quantization_config.weights_n_bits
        return fake_quantize_unclipped(x, ranges.symmetric_scale(threshold, bits, signed=True))

    def _own_range_quantizer(
        self, weight: Tensor, channels: Channels, arguments: dict
    ) -> BaseKerasInferableQuantizer:
        threshold = to_numpy(self._threshold(weight, channels))
        if not self.quantization_config.min_threshold:
            threshold = ranges.one_for_zeros(threshold, weight, channels.reduced)
        bits = self.quantization_config.weights_n_bits
        return self._class()(bits, channels.gather(threshold), **arguments, narrow=True)


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

    _range_keys = frozenset({"range_min", "range_max"})

    def _fixed_quantizer(self, rank: int) -> BaseKerasInferableQuantizer:
        config = self.quantization_config
        low, high = _given_range(self, config.weights_quantization_params)
        quantizer = WeightsUniformInferableQuantizer(
            config.weights_n_bits, low, high, **self._channel_arguments(rank)
        )
        _check_floor("range_max - range_min", np.subtract(high, low), config.min_threshold)
        return quantizer

    def _range(self, x: Tensor, channels: Channels) -> tuple[Tensor, Tensor]:
        config = self.quantization_config
        bits, floor = config.weights_n_bits, config.min_threshold
        return ranges.uniform_range(x, channels.reduced, bits, floor)

    def _quantize_by_own_range(self, x: Tensor, channels: Channels) -> Tensor:
        config = self.quantization_config
        low, high = self._range(x, channels)
        scale, zero_point = ranges.uniform_scale_and_zero_point(
            ops.stop_gradient(low), ops.stop_gradient(high), config.weights_n_bits, ops
        )
        highest = 2**config.weights_n_bits - 1
        return fake_quantize_covered(x, scale, -zero_point, highest - zero_point)

    def _own_range_quantizer(
        self, weight: Tensor, channels: Channels, arguments: dict
    ) -> BaseKerasInferableQuantizer:
        low, high = map(to_numpy, self._range(weight, channels))
        if not self.quantization_config.min_threshold:
            high = ranges.one_for_zeros(high, weight, channels.reduced)
        bits = self.quantization_config.weights_n_bits
        ends = channels.gather(low), channels.gather(high)
        return WeightsUniformInferableQuantizer(bits, *ends, **arguments)


def _given_range(quantizer: Any, params: dict) -> tuple[Any, Any]:
    missing = [key for key in ("range_min", "range_max") if key not in params]
    if missing:
        raise bad_value(
            "quantization params",
            sorted(params),
            "both range_min and range_max",
            f"{type(quantizer).__name__} lacks {missing}.",
        )
    return params["range_min"], params["range_max"]


@keras.saving.register_keras_serializable(PACKAGE)
@mark_quantizer(
    QuantizationTarget.Activation, [QuantizationMethod.SYMMETRIC, QuantizationMethod.POWER_OF_TWO]
)
class STEActivationQATQuantizer(_STEQuantizer):
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

    def __init__(self, quantization_config: Any) -> None:
        super().__init__(quantization_config)
        params = self.quantization_config.activation_quantization_params
        _check_keys(self, params, {"threshold", "is_signed"})
        if self.enabled and "threshold" not in params:
            fix = "Pass {'threshold': t}; a quantizer cannot know an activation's range."
            raise bad_value("activation_quantization_params", params, "a threshold", fix)
        if self.enabled:
            self._fixed_quantizer(0)

    def _fixed_quantizer(self, rank: int) -> BaseKerasInferableQuantizer:
        config = self.quantization_config
        params = config.activation_quantization_params
        cls = ActivationSymmetricInferableQuantizer
        if config.quantization_method is QuantizationMethod.POWER_OF_TWO:
            cls = ActivationPOTInferableQuantizer
        quantizer = cls(
            config.activation_n_bits, params["threshold"], params.get("is_signed", True)
        )
        _check_floor("threshold", params["threshold"], config.min_threshold)
        return quantizer


@keras.saving.register_keras_serializable(PACKAGE)
@mark_quantizer(QuantizationTarget.Activation, [QuantizationMethod.UNIFORM])
class STEUniformActivationQATQuantizer(_STEQuantizer):
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

    def __init__(self, quantization_config: Any) -> None:
        super().__init__(quantization_config)
        params = self.quantization_config.activation_quantization_params
        _check_keys(self, params, {"range_min", "range_max"})
        if self.enabled:
            self._fixed_quantizer(0)

    def _fixed_quantizer(self, rank: int) -> BaseKerasInferableQuantizer:
        config = self.quantization_config
        low, high = _given_range(self, config.activation_quantization_params)
        quantizer = ActivationUniformInferableQuantizer(config.activation_n_bits, low, high)
        _check_floor("range_max - range_min", np.subtract(high, low), config.min_threshold)
        return quantizer
