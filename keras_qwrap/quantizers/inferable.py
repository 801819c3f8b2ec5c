"""Quantizers whose ranges are fixed, for weights and for activations."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_qwrap.numerics.channels import Channels, check_bool, make_channels
from keras_qwrap.numerics.grids import IntegerGrid, check_num_bits
from keras_qwrap.quantizers.config import PACKAGE, QuantizationMethod, QuantizationTarget
from keras_qwrap.quantizers.marks import mark_quantizer
from keras_qwrap.quantizers.stored_range import (
    LookupQuantizer,
    SymmetricQuantizer,
    UniformQuantizer,
)


@keras.saving.register_keras_serializable(PACKAGE)
@mark_quantizer(QuantizationTarget.Weights, [QuantizationMethod.SYMMETRIC])
class WeightsSymmetricInferableQuantizer(SymmetricQuantizer):
    """Signed symmetric grid for weights.

    `y = clip(round_half_even(x / s), -2**(b-1), 2**(b-1) - 1) * s` with `s = threshold / 2**(b-1)`:
    the range is `[-t, t - s]`. Gradient: upstream inside half a step around the range, else 0.

    Args:
        num_bits: width `b` of the codes, 2 to 16.
        threshold: bound `t`, one positive float, or one for each channel; also in a
            shape that broadcasts against the weight, `(1, 1, 1, 8)`.
        per_channel: whether each index of `channel_axis` has its own threshold.
        channel_axis: the kept axis, or a tuple of kept axes.
        input_rank: rank of the tensors that will be quantized.
        narrow: leave out the lowest code, as kernels on integer hardware want it.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of its bounds.

    Example:

    ```python
    import numpy as np
    import keras_qwrap as qi

    quantizer = qi.WeightsSymmetricInferableQuantizer(
        num_bits=8, threshold=[2.0, 1.0], per_channel=True, channel_axis=-1, input_rank=2
    )
    print(np.asarray(quantizer(np.float32([[0.3, 0.3], [9.0, -9.0]]))))
    print(quantizer.quantize_to_codes(np.float32([[0.3, 0.3]])))  # [[19 38]]
    ```
    """

    def __init__(
        self,
        num_bits: int,
        threshold: Any,
        per_channel: bool,
        channel_axis: int | tuple[int, ...] | None = None,
        input_rank: int | None = None,
        narrow: bool = False,
    ) -> None:
        grid = IntegerGrid(check_num_bits(num_bits), True, check_bool("narrow", narrow))
        super().__init__(grid, threshold, make_channels(per_channel, channel_axis, input_rank))

    def get_config(self) -> dict:
        return (
            self._config(num_bits=self.num_bits)
            | self._channels.get_config()
            | {"narrow": self._grid.narrow}
        )


@keras.saving.register_keras_serializable(PACKAGE)
@mark_quantizer(QuantizationTarget.Weights, [QuantizationMethod.POWER_OF_TWO])
class WeightsPOTInferableQuantizer(WeightsSymmetricInferableQuantizer):
    """Signed symmetric grid for weights whose thresholds are powers of two.

    As `WeightsSymmetricInferableQuantizer`; every step is a power of two as well, so that
    hardware rescales by shifting.

    Raises:
        ValueError: also for a threshold that is no power of two.

    Example:

    ```python
    import numpy as np
    import keras_qwrap as qi

    quantizer = qi.WeightsPOTInferableQuantizer(num_bits=4, threshold=2.0, per_channel=False)
    print(np.asarray(quantizer(np.float32([0.3, -0.4, 5.0]))))  # [ 0.25 -0.5   1.75]
    ```
    """


@keras.saving.register_keras_serializable(PACKAGE)
@mark_quantizer(QuantizationTarget.Weights, [QuantizationMethod.UNIFORM])
class WeightsUniformInferableQuantizer(UniformQuantizer):
    """Uniform grid over an arbitrary range for weights, moved so that zero lies on it.

    `s = (max - min) / (2**b - 1)`, `z = round(-min / s)`,
    `y = (clip(round_half_even(x / s) + z, 0, 2**b - 1) - z) * s`. A range without zero is widened
    to hold it. Gradient: upstream inside half a step around the range, else 0.

    Args:
        num_bits: width `b` of the codes, 2 to 16.
        min_range: lower end, one float, or one for each channel.
        max_range: upper end, likewise.
        per_channel: whether each index of `channel_axis` has its own range.
        channel_axis: the kept axis, or a tuple of kept axes.
        input_rank: rank of the tensors that will be quantized.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of its bounds.

    Example:

    ```python
    import numpy as np
    import keras_qwrap as qi

    quantizer = qi.WeightsUniformInferableQuantizer(4, -1.0, 3.2, per_channel=False)
    print(np.round(np.asarray(quantizer(np.float32([-9.0, 9.0]))), 2))  # [-1.12  3.08]
    ```
    """

    def __init__(
        self,
        num_bits: int,
        min_range: Any,
        max_range: Any,
        per_channel: bool,
        channel_axis: int | tuple[int, ...] | None = None,
        input_rank: int | None = None,
    ) -> None:
        channels = make_channels(per_channel, channel_axis, input_rank)
        super().__init__(num_bits, min_range, max_range, channels)

    def get_config(self) -> dict:
        return self._config(num_bits=self.num_bits) | self._channels.get_config()


@keras.saving.register_keras_serializable(PACKAGE)
@mark_quantizer(QuantizationTarget.Weights, [QuantizationMethod.LUT_SYM_QUANTIZER])
class WeightsLUTSymmetricInferableQuantizer(LookupQuantizer):
    """Lookup table for weights: each weight becomes the nearest of a few values.

    `v = clip(x / (threshold + eps) * 2**(w-1), -2**(w-1), 2**(w-1) - 1)` with
    `w = lut_values_bitwidth`; `y = lut_values[i] / 2**(w-1) * threshold`, `i` the index of the
    entry nearest to `v`, of two equally near ones the first. Codes are these indices. Gradient:
    upstream where nothing is clipped, else 0.

    Args:
        num_bits: width of the indices, 2 to 16; at most `lut_values_bitwidth`, better less.
        lut_values: the table, at most `2**num_bits` distinct integers.
        threshold: scale of the table, one positive float, or one for each channel.
        per_channel: whether each index of `channel_axis` has its own threshold.
        channel_axis: the kept axis, or a tuple of kept axes.
        input_rank: rank of the tensors that will be quantized.
        lut_values_bitwidth: width `w` of the table's entries.
        eps: added to the threshold before dividing.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of its bounds.

    Example:

    ```python
    import numpy as np
    import keras_qwrap as qi

    quantizer = qi.WeightsLUTSymmetricInferableQuantizer(
        num_bits=2, lut_values=[-64, 0, 32, 96], threshold=1.0, per_channel=False
    )
    print(np.asarray(quantizer(np.float32([-0.9, 0.1, 0.3]))))  # [-0.5   0.    0.25]
    ```
    """

    def __init__(
        self,
        num_bits: int,
        lut_values: Sequence[int],
        threshold: Any,
        per_channel: bool,
        channel_axis: int | tuple[int, ...] | None = None,
        input_rank: int | None = None,
        lut_values_bitwidth: int = 8,
        eps: float = 1e-8,
    ) -> None:
        channels = make_channels(per_channel, channel_axis, input_rank)
        super().__init__(num_bits, lut_values, threshold, channels, True, lut_values_bitwidth, eps)

    def get_config(self) -> dict:
        first = self._config(num_bits=self.num_bits, lut_values=list(self._grid.values))
        return first | self._channels.get_config() | self._table_config()


@keras.saving.register_keras_serializable(PACKAGE)
@mark_quantizer(QuantizationTarget.Weights, [QuantizationMethod.LUT_POT_QUANTIZER])
class WeightsLUTPOTInferableQuantizer(WeightsLUTSymmetricInferableQuantizer):
    """Lookup table for weights whose thresholds are powers of two.

    As `WeightsLUTSymmetricInferableQuantizer`.

    Raises:
        ValueError: also for a threshold that is no power of two.

    Example:

    ```python
    import numpy as np
    import keras_qwrap as qi

    quantizer = qi.WeightsLUTPOTInferableQuantizer(2, [-64, 0, 64], 2.0, per_channel=False)
    print(quantizer.quantize_to_codes(np.float32([-0.9, 0.1, 1.1])))  # [0 1 2]
    ```
    """


@keras.saving.register_keras_serializable(PACKAGE)
@mark_quantizer(QuantizationTarget.Activation, [QuantizationMethod.SYMMETRIC])
class ActivationSymmetricInferableQuantizer(SymmetricQuantizer):
    """Symmetric or unsigned grid for activations, per tensor.

    Signed: as `WeightsSymmetricInferableQuantizer`. Unsigned:
    `y = clip(round_half_even(x / s), 0, 2**b - 1) * s` with `s = threshold / 2**b`: the range is
    `[0, t - s]`. Gradient: upstream inside half a step around the range, else 0.

    Args:
        num_bits: width `b` of the codes, 2 to 16.
        threshold: bound `t`, one positive float, or a list of one.
        signed: whether negative values are kept.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of its bounds.

    Example:

    ```python
    import numpy as np
    import keras_qwrap as qi

    quantizer = qi.ActivationSymmetricInferableQuantizer(8, threshold=[4.0], signed=False)
    print(np.asarray(quantizer(np.float32([-1.0, 0.5, 9.0]))))  # [0.       0.5      3.984375]
    ```
    """

    def __init__(self, num_bits: int, threshold: Any, signed: bool) -> None:
        grid = IntegerGrid(check_num_bits(num_bits), check_bool("signed", signed))
        super().__init__(grid, threshold, Channels())

    def get_config(self) -> dict:
        return self._config(num_bits=self.num_bits) | {"signed": self._grid.signed}


@keras.saving.register_keras_serializable(PACKAGE)
@mark_quantizer(QuantizationTarget.Activation, [QuantizationMethod.POWER_OF_TWO])
class ActivationPOTInferableQuantizer(ActivationSymmetricInferableQuantizer):
    """Symmetric or unsigned grid for activations whose threshold is a power of two.

    As `ActivationSymmetricInferableQuantizer`.

    Raises:
        ValueError: also for a threshold that is no power of two.

    Example:

    ```python
    import numpy as np
    import keras_qwrap as qi

    quantizer = qi.ActivationPOTInferableQuantizer(3, threshold=2.0, signed=True)
    print(np.asarray(quantizer(np.float32([-9.0, 0.6, 9.0]))))  # [-2.   0.5  1.5]
    ```
    """


@keras.saving.register_keras_serializable(PACKAGE)
@mark_quantizer(QuantizationTarget.Activation, [QuantizationMethod.UNIFORM])
class ActivationUniformInferableQuantizer(UniformQuantizer):
    """Uniform grid over an arbitrary range for activations, per tensor.

    As `WeightsUniformInferableQuantizer`.

    Args:
        num_bits: width of the codes, 2 to 16.
        min_range: lower end, one float, or a list of one.
        max_range: upper end, likewise.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of its bounds.

    Example:

    ```python
    import numpy as np
    import keras_qwrap as qi

    quantizer = qi.ActivationUniformInferableQuantizer(8, min_range=-1.0, max_range=4.1)
    print(quantizer.zero_point, quantizer.quantize_to_codes(np.float32([0.0, 9.0])))  # 50 [ 50 255]
    ```
    """

    def __init__(self, num_bits: int, min_range: Any, max_range: Any) -> None:
        super().__init__(num_bits, min_range, max_range, Channels())

    def get_config(self) -> dict:
        return self._config(num_bits=self.num_bits)


@keras.saving.register_keras_serializable(PACKAGE)
@mark_quantizer(QuantizationTarget.Activation, [QuantizationMethod.LUT_POT_QUANTIZER])
class ActivationLutPOTInferableQuantizer(LookupQuantizer):
    """Lookup table for activations, per tensor, whose threshold is a power of two.

    As `WeightsLUTSymmetricInferableQuantizer`; an unsigned table spans `0..2**w - 1`, and its unit
    is `threshold / 2**w`.

    Args:
        num_bits: width of the indices, 2 to 16; at most `lut_values_bitwidth`, better less.
        lut_values: the table, at most `2**num_bits` distinct integers.
        threshold: scale of the table, a power of two, or a list of one.
        signed: whether the table may hold negative entries.
        lut_values_bitwidth: width `w` of the table's entries.
        eps: added to the threshold before dividing.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of its bounds.

    Example:

    ```python
    import numpy as np
    import keras_qwrap as qi

    quantizer = qi.ActivationLutPOTInferableQuantizer(2, [0, 64, 192], 4.0, signed=False)
    print(np.asarray(quantizer(np.float32([-1.0, 1.2, 9.0]))))  # [0. 1. 3.]
    ```
    """

    def __init__(
        self,
        num_bits: int,
        lut_values: Sequence[int],
        threshold: Any,
        signed: bool,
        lut_values_bitwidth: int = 8,
        eps: float = 1e-8,
    ) -> None:
        signed = check_bool("signed", signed)
        super().__init__(
            num_bits, lut_values, threshold, Channels(), signed, lut_values_bitwidth, eps
        )

    def get_config(self) -> dict:
        first = self._config(num_bits=self.num_bits, lut_values=list(self._grid.values))
        return first | {"signed": self._grid.signed} | self._table_config()


_BY_METHOD: dict[tuple[QuantizationTarget, QuantizationMethod], type] = {
    (cls.quantization_target, method): cls
    for cls in (
        WeightsSymmetricInferableQuantizer,
        WeightsPOTInferableQuantizer,
        WeightsUniformInferableQuantizer,
        ActivationSymmetricInferableQuantizer,
        ActivationPOTInferableQuantizer,
        ActivationUniformInferableQuantizer,
    )
    for method in cls.quantization_method
}


def inferable_class(target: QuantizationTarget, method: QuantizationMethod) -> Any:
    """The class of inferable quantizers that maps onto the integer grid of a method."""
    return _BY_METHOD[target, method]
