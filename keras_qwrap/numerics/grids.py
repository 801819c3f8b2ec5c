"""Which values exist: integer grids and lookup grids, with exact encoding and decoding."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_qwrap.numerics.checks import bad_type, bad_value
from keras_qwrap.numerics.rounding import SMALLEST_SCALE, divide, normal, to_steps


def check_num_bits(num_bits: Any, name: str = "num_bits") -> int:
    """`num_bits` as an `int`, refused unless it is an integer from 2 to 16."""
    fix = "Pass the width of the integers, for example 8."
    if isinstance(num_bits, bool) or not isinstance(num_bits, (int, np.integer)):
        raise bad_type(name, num_bits, "an integer from 2 to 16", fix)
    if not 2 <= num_bits <= 16:
        raise bad_value(name, num_bits, "an integer from 2 to 16", fix)
    return int(num_bits)


def float_array(name: str, value: Any) -> np.ndarray:
    """`value` as a non-empty, finite float32 array; anything else is refused."""
    fix = "Pass a float, or a list or array of floats."
    try:
        given = np.asarray(value)
        wide = None if given.dtype.kind in "bcSU" else given.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise bad_type(name, value, "real numbers", fix) from error
    if wide is None:
        raise bad_type(name, value, "real numbers", fix)
    with np.errstate(over="ignore"):
        array = wide.astype(np.float32)
    if array.size == 0:
        raise bad_value(name, value, "at least one number", fix)
    if not np.all(np.isfinite(array)):
        raise bad_value(name, value, "numbers that are finite in float32", fix)
    return array


def check_scale(scale: np.ndarray, largest_code: int, source: str) -> None:
    """Refuse steps whose multiples float32 cannot hold exactly; `source` names the argument."""
    if np.any(scale < SMALLEST_SCALE):
        raise ValueError(
            f"{source}: received a range whose step is {np.min(scale)}, expected one of at least "
            "2**-126. A smaller step is subnormal in float32; widen the range or use fewer bits."
        )
    with np.errstate(over="ignore"):
        if not np.all(np.isfinite(scale * np.float32(largest_code))):
            raise ValueError(
                f"{source}: received a range whose step is {np.max(scale)}, expected one whose "
                "ends are finite in float32. Narrow the range."
            )


def _numbers_to_encode(x: Any) -> np.ndarray:
    """`x` in float32; subnormal numbers count as zero, as the backends compute; NaN is refused."""
    x = np.asarray(x, dtype=np.float32)
    if np.any(np.isnan(x)):
        raise ValueError(
            "Received NaN to encode, expected numbers: NaN has no integer code. "
            "Find where the NaN comes from, or replace it first (`numpy.nan_to_num`)."
        )
    return normal(x, np)


def _check_codes(codes: Any, lowest: int, highest: int) -> np.ndarray:
    """`codes` as an array of integers from `lowest` to `highest`; anything else is refused."""
    codes = np.asarray(codes)
    fix = "Pass the codes that `quantize_to_codes` gave."
    if codes.size and codes.dtype.kind not in "iu":
        raise bad_type("codes", codes.dtype.name, "integers", fix)
    if codes.size and not (lowest <= codes.min() and codes.max() <= highest):
        ends = (int(codes.min()), int(codes.max()))
        raise bad_value("codes", ends, f"codes from {lowest} to {highest}", fix)
    return codes.astype(np.int32, copy=False)


@dataclass(frozen=True)
class IntegerGrid:
    """Codes `lowest..highest`, each worth `(code - zero_point) * scale`.

    Args:
        num_bits: width of the codes, 2 to 16.
        signed: two's complement codes if True, else codes from 0.
        narrow: leave out the lowest signed code, so that the grid is symmetric about zero.
    """

    num_bits: int
    signed: bool
    narrow: bool = False

    @property
    def lowest(self) -> int:
        return -(2 ** (self.num_bits - 1)) + self.narrow if self.signed else 0

    @property
    def highest(self) -> int:
        return 2 ** (self.num_bits - 1) - 1 if self.signed else 2**self.num_bits - 1

    def encode(self, x: Any, scale: Any, zero_point: Any = 0) -> np.ndarray:
        """`clip(round_half_even(x / scale) + zero_point, lowest, highest)` as int32.

        Raises:
            ValueError: `x` holds NaN.
        """
        x = _numbers_to_encode(x)
        zero_point = np.asarray(zero_point, dtype=np.int32)
        with np.errstate(over="ignore"):
            steps = to_steps(x, np.asarray(scale, dtype=np.float32), np)
        low = np.asarray(self.lowest - zero_point, dtype=np.float32)
        high = np.asarray(self.highest - zero_point, dtype=np.float32)
        return np.clip(steps, low, high).astype(np.int32) + zero_point

    def decode(self, codes: Any, scale: Any, zero_point: Any = 0) -> np.ndarray:
        """`(codes - zero_point) * scale` as float32; codes off the grid are refused."""
        codes = _check_codes(codes, self.lowest, self.highest)
        zero_point = np.asarray(zero_point, dtype=np.int32)
        steps = codes - zero_point if np.any(zero_point) else codes
        return steps.astype(np.float32) * np.asarray(scale, dtype=np.float32)


@dataclass(frozen=True)
class LookupGrid:
    """A table of integers; a code is an index into it, worth `table[code] * scale`.

    Args:
        values: the table, distinct integers that `bitwidth` bits can hold, in any order.
        bitwidth: width of the table's entries, 2 to 16.
        signed: whether entries may be negative.
    """

    values: tuple[int, ...]
    bitwidth: int
    signed: bool

    @property
    def limits(self) -> tuple[float, float]:
        """Lowest and highest integer that `bitwidth` bits can hold."""
        grid = IntegerGrid(self.bitwidth, self.signed)
        return float(grid.lowest), float(grid.highest)

    @property
    def ascending(self) -> np.ndarray:
        """The table's entries in ascending order, float32."""
        return np.sort(np.asarray(self.values, dtype=np.float32))

    @property
    def bounds(self) -> np.ndarray:
        """Numbers at and below which the lower of two neighbouring entries is taken, float32.

        That is their midpoint, where the lower one comes first in the table, or else the
        largest float32 below it: of two equally near entries the first one wins. Below zero that
        is -2**-126, since the backends take subnormal numbers for zero.
        """
        values = np.asarray(self.values, dtype=np.float32)
        order = np.argsort(values)
        middle = (values[order][:-1] + values[order][1:]) / np.float32(2)
        lower_wins = order[:-1] < order[1:]
        below = np.nextafter(middle, np.float32(-np.inf))
        below[middle == 0] = -np.float32(SMALLEST_SCALE)
        return np.where(lower_wins, middle, below)

    def encode(self, x: Any, divisor: Any) -> np.ndarray:
        """Index of the entry nearest to `clip(x / divisor, *limits)`, int32.

        Raises:
            ValueError: `x` holds NaN.
        """
        x = _numbers_to_encode(x)
        with np.errstate(over="ignore"):
            position = divide(x, np.asarray(divisor, dtype=np.float32), np)
            position = np.clip(position, *self.limits)
        order = np.argsort(np.asarray(self.values))
        return order[np.searchsorted(self.bounds, position, side="left")].astype(np.int32)

    def decode(self, codes: Any, scale: Any) -> np.ndarray:
        """`table[codes] * scale` as float32; indices outside the table are refused."""
        codes = _check_codes(codes, 0, len(self.values) - 1)
        table = np.asarray(self.values, dtype=np.float32)
        return table[codes] * np.asarray(scale, dtype=np.float32)
