"""The mechanism behind the inferable quantizers: stored ranges, and a grid."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_qwrap.numerics import ranges
from keras_qwrap.numerics.channels import Channels
from keras_qwrap.numerics.checks import bad_value, brief, warn
from keras_qwrap.numerics.grids import (
    IntegerGrid,
    LookupGrid,
    check_num_bits,
    check_scale,
    float_array,
)
from keras_qwrap.numerics.rounding import fake_lookup, fake_quantize
from keras_qwrap.numerics.tensors import Tensor, float32_input, read, to_numpy
from keras_qwrap.quantizers.base import BaseKerasInferableQuantizer, arguments_of
from keras_qwrap.quantizers.config import QuantizationMethod


def check_threshold(name: str, threshold: Any) -> np.ndarray:
    """`threshold` as a float32 array of positive numbers."""
    array = float_array(name, threshold)
    if np.any(array <= 0):
        raise bad_value(name, threshold, "positive numbers", "Pass the bound of the range.")
    return array


def check_power_of_two(name: str, threshold: np.ndarray) -> None:
    """Refuse thresholds that are not powers of two."""
    if np.any(np.frexp(threshold)[0] != 0.5):
        raise bad_value(
            name,
            threshold.tolist(),
            "powers of two",
            "Round it up to the next power of two, or use a symmetric quantizer.",
        )


def check_range(min_range: Any, max_range: Any) -> ranges.Range:
    """A uniform range as two float32 arrays, widened to hold zero."""
    low, high = float_array("min_range", min_range), float_array("max_range", max_range)
    if low.shape != high.shape:
        raise bad_value(
            "max_range", max_range, f"as many numbers as min_range, {low.shape}", "Match the two."
        )
    if np.any(low >= high):
        raise bad_value(
            "min_range", min_range, f"numbers below max_range, {max_range}", "Swap or widen them."
        )
    return ranges.Range.of(low, high, np)


class RangeQuantizer(BaseKerasInferableQuantizer):
    """Stores ranges: constants or, once `initialize_quantization` ran, a layer's variables."""

    def __init__(self, channels: Channels, **values: np.ndarray) -> None:
        self._channels = channels
        self._constants = {name: channels.spread(name, array) for name, array in values.items()}
        self.quantizer_parameters: dict[str, Any] = {}

    def initialize_quantization(self, tensor_shape: tuple, name: str, layer: Any) -> dict:
        """Create one non-trainable variable for each range, holding it."""
        for constant in self._constants.values():
            self._channels.check_tensor(name, constant.shape, tensor_shape)
        self.quantizer_parameters = {
            role: layer.add_weight(
                name=role,
                shape=constant.shape,
                dtype="float32",
                initializer=lambda shape, dtype=None, value=constant: ops.convert_to_tensor(
                    value, dtype
                ),
                trainable=False,
            )
            for role, constant in self._constants.items()
        }
        return self.quantizer_parameters

    def changed_ranges(self) -> list[str]:
        given = self._constants.items()
        return [role for role, array in given if not np.array_equal(self._array(role), array)]

    def _tensor(self, role: str) -> Tensor:
        """A range for use in a computation."""
        if role in self.quantizer_parameters:
            return read(self.quantizer_parameters[role])
        return self._constants[role]

    def _array(self, role: str) -> np.ndarray:
        """A range as float32 numbers."""
        if role in self.quantizer_parameters:
            return to_numpy(self.quantizer_parameters[role])
        return self._constants[role]

    def _check_call(self, tensor: Tensor) -> None:
        for constant in self._constants.values():
            self._channels.check_tensor("inputs", constant.shape, tuple(tensor.shape))

    def __repr__(self) -> str:
        """Without ranges that are a layer's variables by now."""
        grid = vars(self).get("_grid")
        known = {name: getattr(grid, name, None) for name in ("signed", "narrow")}
        known |= {"lut_values": list(getattr(grid, "values", ()))}
        if grid is not None:
            known |= {"num_bits": self.num_bits} | self._channels.get_config()
        if not self.quantizer_parameters:
            known |= {k: self._channels.gather(array) for k, array in self._constants.items()}
        return brief(type(self).__name__, **arguments_of(self, known))

    def _config(self, **first: Any) -> dict:
        """`first`, then the ranges as plain numbers."""
        return first | {role: self._channels.gather(self._array(role)) for role in self._constants}


class IntegerQuantizer(RangeQuantizer):
    """Maps onto an integer grid."""

    _grid: IntegerGrid

    def _derive(self, xp: Any, get: Any) -> tuple[Any, Any]:
        """Scale and zero point (a whole float) in the array namespace `xp`."""
        raise NotImplementedError

    def __call__(self, inputs: Tensor) -> Tensor:
        """Quantize a float tensor; shape and dtype are kept, the arithmetic is float32."""
        x, dtype = float32_input(inputs)
        self._check_call(x)
        scale, zero_point = self._derive(ops, self._tensor)
        low, high = self._grid.lowest - zero_point, self._grid.highest - zero_point
        return ops.cast(fake_quantize(x, scale, low, high), dtype)

    @property
    def num_bits(self) -> int:
        return self._grid.num_bits

    @property
    def scale(self) -> np.ndarray:
        return np.asarray(self._derive(np, self._array)[0], dtype=np.float32)

    @property
    def zero_point(self) -> np.ndarray:
        return np.asarray(self._derive(np, self._array)[1], dtype=np.int32)

    def quantize_to_codes(self, x: Any) -> np.ndarray:
        return self._grid.encode(to_numpy(float32_input(x)[0]), self.scale, self.zero_point)

    def dequantize(self, codes: Any) -> np.ndarray:
        return self._grid.decode(codes, self.scale, self.zero_point)

    def dequantize_tensor(self, codes: Tensor) -> Tensor:
        scale, zero_point = self._derive(ops, self._tensor)
        return (ops.cast(codes, "float32") - zero_point) * scale


class SymmetricQuantizer(IntegerQuantizer):
    """A threshold and no zero point."""

    def __init__(self, grid: IntegerGrid, threshold: Any, channels: Channels) -> None:
        array = check_threshold("threshold", threshold)
        if QuantizationMethod.POWER_OF_TWO in self.quantization_method:
            check_power_of_two("threshold", array)
        super().__init__(channels, threshold=array)
        self._grid = grid
        check_scale(self.scale, grid.highest + 1, "threshold")

    def _derive(self, xp: Any, get: Any) -> tuple[Any, Any]:
        return ranges.symmetric_scale(get("threshold"), self.num_bits, self._grid.signed), 0


class UniformQuantizer(IntegerQuantizer):
    """A range from `min_range` to `max_range`, and a zero point."""

    def __init__(self, num_bits: int, min_range: Any, max_range: Any, channels: Channels) -> None:
        grid = IntegerGrid(check_num_bits(num_bits), signed=False)
        low, high = check_range(min_range, max_range)
        super().__init__(channels, min_range=low, max_range=high)
        self._grid = grid
        with np.errstate(all="ignore"):
            check_scale(self.scale, grid.highest, "max_range")

    def _derive(self, xp: Any, get: Any) -> tuple[Any, Any]:
        return ranges.uniform_scale_and_zero_point(
            get("min_range"), get("max_range"), self.num_bits, xp
        )


class LookupQuantizer(RangeQuantizer):
    """Maps onto a table of integers, scaled by a threshold."""

    def __init__(
        self,
        num_bits: int,
        lut_values: Sequence[int],
        threshold: Any,
        channels: Channels,
        signed: bool,
        lut_values_bitwidth: int,
        eps: float,
    ) -> None:
        array = check_threshold("threshold", threshold)
        if QuantizationMethod.LUT_POT_QUANTIZER in self.quantization_method:
            check_power_of_two("threshold", array)
        super().__init__(channels, threshold=array)
        self._num_bits = check_num_bits(num_bits)
        _check_widths(self._num_bits, check_num_bits(lut_values_bitwidth, "lut_values_bitwidth"))
        self._eps = _check_eps(eps)
        self._grid = _check_table(lut_values, self._num_bits, lut_values_bitwidth, signed)
        check_scale(self.scale, 2**self._grid.bitwidth, "threshold")

    def _derive(self, get: Any) -> tuple[Any, Any]:
        """Scale of the values, and the divisor before looking up, which includes `eps`."""
        bitwidth, signed = self._grid.bitwidth, self._grid.signed
        threshold = get("threshold")
        return (
            ranges.symmetric_scale(threshold, bitwidth, signed),
            ranges.symmetric_scale(threshold + np.float32(self._eps), bitwidth, signed),
        )

    def __call__(self, inputs: Tensor) -> Tensor:
        """Quantize a float tensor; shape and dtype are kept, the arithmetic is float32."""
        x, dtype = float32_input(inputs)
        self._check_call(x)
        scale, divisor = self._derive(self._tensor)
        grid = self._grid
        return ops.cast(
            fake_lookup(x, scale, divisor, grid.ascending, grid.bounds, grid.limits), dtype
        )

    @property
    def num_bits(self) -> int:
        return self._num_bits

    @property
    def scale(self) -> np.ndarray:
        return np.asarray(self._derive(self._array)[0], dtype=np.float32)

    @property
    def zero_point(self) -> np.ndarray:
        return np.zeros_like(self.scale, dtype=np.int32)

    def quantize_to_codes(self, x: Any) -> np.ndarray:
        return self._grid.encode(to_numpy(float32_input(x)[0]), self._derive(self._array)[1])

    def dequantize(self, codes: Any) -> np.ndarray:
        return self._grid.decode(codes, self.scale)

    def dequantize_tensor(self, codes: Tensor) -> Tensor:
        table = np.asarray(self._grid.values, dtype=np.float32)
        return ops.take(table, ops.cast(codes, "int32"), axis=0) * self._derive(self._tensor)[0]

    def _table_config(self) -> dict:
        return {"lut_values_bitwidth": self._grid.bitwidth, "eps": self._eps}


def _check_widths(num_bits: int, bitwidth: int) -> None:
    """Refuse indices wider than the table's entries, and warn where they are as wide."""
    if num_bits > bitwidth:
        fix = "Lower num_bits, or raise lut_values_bitwidth."
        raise bad_value("num_bits", num_bits, f"at most lut_values_bitwidth={bitwidth}", fix)
    if num_bits == bitwidth:
        warn(
            f"num_bits: received {num_bits}, as many as lut_values_bitwidth: a table of so many "
            "integers is an integer grid. Lower num_bits, or use a quantizer without a table."
        )


def _check_eps(eps: Any) -> float:
    array = float_array("eps", eps)
    if array.size != 1 or array.item() < 0:
        raise bad_value("eps", eps, "one number that is not negative", "Pass for example 1e-8.")
    return float(eps)


def _check_table(lut_values: Any, num_bits: int, bitwidth: int, signed: bool) -> LookupGrid:
    table = float_array("lut_values", lut_values)
    grid = LookupGrid(tuple(int(v) for v in table.ravel()), bitwidth, signed)
    lowest, highest = grid.limits
    if table.ndim != 1 or np.any(table != np.round(table)):
        raise bad_value("lut_values", lut_values, "a list of integers", "Round the table.")
    if len(set(grid.values)) != len(grid.values) or len(grid.values) > 2**num_bits:
        raise bad_value(
            "lut_values",
            lut_values,
            f"at most {2**num_bits} distinct integers for num_bits={num_bits}",
            "Shorten the table or raise num_bits.",
        )
    if np.any(table < lowest) or np.any(table > highest):
        raise bad_value(
            "lut_values",
            lut_values,
            f"integers from {lowest:.0f} to {highest:.0f}",
            "Raise lut_values_bitwidth or rescale the table.",
        )
    return grid
