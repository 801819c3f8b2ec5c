"""How a scale follows from a range, and how a range is found in a weight.

Every function computes in float32 by multiplications with constants, never by a division by one,
so that a graph compiler cannot change its result. The argument `xp` is the array namespace:
`numpy` where a quantizer is constructed, `keras.ops` where it is called. Both give the same bits.
"""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_qwrap.numerics.grids import IntegerGrid
from keras_qwrap.numerics.rounding import SMALLEST_SCALE, normal, to_steps
from keras_qwrap.numerics.tensors import Tensor, to_numpy

Reduced = tuple[int, ...] | None
"""The axes that share one range, `Channels.reduced`; None for all of them."""

_POWERS_OF_TWO = np.float32(2.0) ** np.arange(-126, 128, dtype=np.float32)


class Range(NamedTuple):
    """Two ends, numbers or one for each channel, between which zero lies: `low <= 0 <= high`."""

    low: Any
    high: Any

    @classmethod
    def of(cls, low: Any, high: Any, xp: Any) -> "Range":
        """The ends, widened to hold zero."""
        return cls(xp.minimum(low, np.float32(0)), xp.maximum(high, np.float32(0)))


def symmetric_scale(threshold: Tensor, num_bits: int, signed: bool) -> Tensor:
    """Step of the grid `[-t, t - t/2**(b-1)]` (signed) or `[0, t - t/2**b]` (unsigned).

    `scale = threshold / 2**(num_bits - signed)`, exactly: the factor is a power of two.
    """
    return threshold * np.float32(2.0 ** (int(signed) - num_bits))


def uniform_scale_and_zero_point(
    min_range: Tensor, max_range: Tensor, num_bits: int, xp: Any
) -> tuple[Tensor, Tensor]:
    """Step and zero point (a whole float) of `2**num_bits` codes over a range that holds zero.

    `scale = (max - min) * float32(1 / (2**num_bits - 1))`, `zero_point = round(-min / scale)`.
    """
    highest = 2**num_bits - 1
    scale = (max_range - min_range) * np.float32(1 / highest)
    return scale, to_steps(-min_range, scale, xp)


def largest_magnitude(weight: Tensor, axes: Reduced) -> Tensor:
    """`max |weight|` over `axes`, which are kept with length 1.

    The bits of non-negative floats order as integers do, and integer maxima run at several times
    the speed of float ones in graphs and under XLA.
    """
    mask = ops.convert_to_tensor(0x7FFFFFFF, "int32")
    bits = ops.bitwise_and(ops.view(weight, dtype="int32"), mask)
    return ops.view(ops.max(bits, axis=axes, keepdims=True), dtype="float32")


def symmetric_threshold(
    weight: Tensor, axes: Reduced, num_bits: int, min_threshold: float
) -> Tensor:
    """Threshold whose narrow signed grid ends exactly at the largest magnitude.

    `t = s * 2**(b-1)` with `s = max(|w|, min_threshold) * float32(1 / (2**(b-1) - 1))`, at least
    2**-126.
    """
    largest = largest_magnitude(weight, axes)
    if min_threshold:
        largest = ops.maximum(largest, np.float32(min_threshold))
    step = ops.maximum(
        largest * np.float32(1 / (2 ** (num_bits - 1) - 1)), np.float32(SMALLEST_SCALE)
    )
    return step * np.float32(2.0 ** (num_bits - 1))


def one_for_zeros(threshold: np.ndarray, weight: Tensor, axes: Reduced) -> np.ndarray:
    """Thresholds, with 1 for each channel of zeros: any threshold rounds these alike."""
    zeros = to_numpy(largest_magnitude(weight, axes)) < np.float32(SMALLEST_SCALE)
    return np.where(zeros, np.float32(1), threshold)


def power_of_two_threshold(
    weight: Tensor, axes: Reduced, num_bits: int, min_threshold: float
) -> Tensor:
    """The smallest power of two that is not below `symmetric_threshold`.

    Found by comparing with all powers of two, which is exact in every mode of execution.
    """
    return next_power_of_two(symmetric_threshold(weight, axes, num_bits, min_threshold), ops)


def next_power_of_two(wanted: Tensor, xp: Any) -> Tensor:
    """The smallest power of two, from 2**-126, that is not below `wanted`."""
    enough = xp.greater_equal(_POWERS_OF_TWO, xp.expand_dims(wanted, -1))
    return xp.min(xp.where(enough, _POWERS_OF_TWO, np.float32(np.inf)), axis=-1)


def uniform_range(weight: Tensor, axes: Reduced, num_bits: int, min_threshold: float) -> Range:
    """Smallest and largest value over `axes`, widened to hold zero and enough for a uniform grid.

    The width is at least `min_threshold`, and 2**b steps of 2**-125.
    """
    least, most = (find(weight, axis=axes, keepdims=True) for find in (ops.min, ops.max))
    low, high = (normal(end, ops) for end in Range.of(least, most, ops))
    width = max(min_threshold, 2.0 ** (num_bits - 125))
    return Range(low, normal(widened_end(low, high, width, ops), ops))


def widened_end(low: Tensor, high: Tensor, width: float, xp: Any) -> Tensor:
    """The upper end of a range that is at least `width` wide."""
    return xp.maximum(high, low + np.float32(width))


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of `x`; both, or one of them, NaN where `x` holds NaN.

    Where no value is negative the first is zero or any of them, where none is positive the second
    is: zero is to be included. Both are zero where `x` is empty. As integers, since float minima
    are slow under XLA, and drop a NaN in TensorFlow's graphs; torch has no maxima of unsigned
    integers, and keeps NaN.
    """
    if keras.backend.backend() == "torch":
        return normal(ops.min(x, initial=0.0), ops), normal(ops.max(x, initial=0.0), ops)
    lowest, highest = (
        ops.max(ops.view(x, dtype=dtype), initial=0) for dtype in ("uint32", "int32")
    )
    return ops.view(lowest, dtype="float32"), ops.view(highest, dtype="float32")


def least_range(num_bits: int) -> float:
    """Largest magnitude up to which numbers count as zero: their steps would be below 2**-126."""
    return 2.0 ** (num_bits - 126)


def to_store(low: Tensor, high: Tensor, num_bits: int, xp: Any) -> tuple[Tensor, Tensor]:
    """The range of numbers that were seen, as it is stored.

    For zeros alone it reaches to `least_range`; two zeros stand for nothing seen.
    """
    return low, widened_end(low, high, least_range(num_bits), xp)


def was_seen(low: Tensor, high: Tensor, xp: Any) -> Tensor:
    """Whether a stored range stands for any numbers, be they zeros alone."""
    return xp.maximum(high, -low) >= np.float32(SMALLEST_SCALE)


def has_range(low: Tensor, high: Tensor, num_bits: int, xp: Any) -> Tensor:
    """Whether a stored range stands for any numbers but zeros."""
    return xp.maximum(high, -low) > np.float32(least_range(num_bits))


def stored_end(low: Tensor, high: Tensor, num_bits: int, min_threshold: float, xp: Any) -> Tensor:
    """The upper end of a stored range; for zeros alone `min_threshold`, or 1 without one."""
    end = min_threshold if min_threshold > least_range(num_bits) else 1.0
    return xp.where(has_range(low, high, num_bits, xp), high, np.float32(end))


def covering_threshold(
    ends: Range, num_bits: int, grid: str, min_threshold: float, xp: Any
) -> tuple[Tensor, Tensor]:
    """Threshold of a grid, "symmetric" or "power_of_two", that clips nothing in a range.

    Signed where `low < 0`: `t = max(-low, high * float32(1 / (2**(b-1) - 1)) * 2**(b-1))`, else
    unsigned: `t = high * float32(1 / (2**b - 1)) * 2**b`; at least `min_threshold`, and rounded up
    to a power of two if it has to be one.

    Returns:
        The threshold, and whether the grid is signed.
    """
    low, high = ends
    signed = low < np.float32(-least_range(num_bits))
    above = _top_threshold(high, num_bits)
    both = xp.maximum(-low, _top_threshold(high, num_bits - 1))
    threshold = xp.where(signed, both, above)
    if min_threshold:
        threshold = xp.maximum(threshold, np.float32(min_threshold))
    if grid == "power_of_two":
        threshold = next_power_of_two(threshold, xp)
    return threshold, signed


def _top_threshold(high: Tensor, num_bits: int) -> Tensor:
    """Threshold of the grid whose highest code, `2**num_bits - 1`, is worth `high`."""
    return high * np.float32(1 / (2**num_bits - 1)) * np.float32(2.0**num_bits)


def grid_of_range(
    ends: Range, num_bits: int, grid: str, min_threshold: float, xp: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Step, and lowest and highest number of steps, of the grid that follows from a range.

    A range for each of several grids gives arrays. `grid` is "uniform" (with a zero point),
    "symmetric" or "power_of_two" (of a threshold; signed where the range is).
    """
    if grid == "uniform":
        scale, zero_point = uniform_scale_and_zero_point(*ends, num_bits, xp)
        return scale, -zero_point, 2**num_bits - 1 - zero_point
    threshold, signed = covering_threshold(ends, num_bits, grid, min_threshold, xp)
    step = symmetric_scale(threshold, num_bits, signed=False)
    both, above = IntegerGrid(num_bits, signed=True), IntegerGrid(num_bits, signed=False)
    return (
        xp.where(signed, np.float32(2) * step, step),
        xp.where(signed, np.float32(both.lowest), np.float32(above.lowest)),
        xp.where(signed, np.float32(both.highest), np.float32(above.highest)),
    )
