"""An activation quantizer whose range follows the batches that it is trained on."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_qwrap.numerics import ranges
from keras_qwrap.numerics.channels import check_bool
from keras_qwrap.numerics.checks import bad_type, bad_value
from keras_qwrap.numerics.grids import float_array
from keras_qwrap.numerics.rounding import fake_quantize_where, normal
from keras_qwrap.numerics.search import RANGE_METHODS, check_range_method
from keras_qwrap.numerics.tensors import Tensor, as_tensor, float32_input, read, to_numpy
from keras_qwrap.quantizers.base import (
    BaseKerasInferableQuantizer,
    BaseKerasTrainableQuantizer,
)
from keras_qwrap.quantizers.config import (
    PACKAGE,
    QuantizationMethod,
    QuantizationTarget,
)
from keras_qwrap.quantizers.inferable import inferable_class
from keras_qwrap.quantizers.marks import mark_quantizer
from keras_qwrap.quantizers.stored_range import check_range

_LARGEST = np.float32(2.0**125)
"""Ends of larger magnitude may need a threshold that no power of two in float32 reaches."""

_UNKNOWN, _WHOLE, _OTHERS = 0, 1, -1
"""What calibration can have found of the numbers."""

_RANGE_KEYS = ("range_min", "range_max")
_ENDS = ("min_range", "max_range")


@keras.saving.register_keras_serializable(PACKAGE)
@mark_quantizer(
    QuantizationTarget.Activation,
    [QuantizationMethod.UNIFORM, QuantizationMethod.SYMMETRIC, QuantizationMethod.POWER_OF_TWO],
    ranges=RANGE_METHODS,
)
class MovingAverageActivationQATQuantizer(BaseKerasTrainableQuantizer):
    """Activation quantizer that learns its range while it is trained, or is given it.

    In training each batch's smallest and largest value, zero included, move the range:
    `range = momentum * range + (1 - momentum) * batch`; the first batch sets it. The tensor is
    then quantized by the new range. In inference the stored range is used; without one, the
    tensor passes unquantized. While there were zeros alone the range is 0 to 1 (to
    `min_threshold`, if there is one), and the first batch with others sets it.

    The grid follows from the range `[low, high]`, which is never narrower than `min_threshold`.
    UNIFORM: that of `ActivationUniformInferableQuantizer`. SYMMETRIC: that of
    `ActivationSymmetricInferableQuantizer`, signed where `low < 0`, with the threshold at which
    nothing in the range is clipped. POWER_OF_TWO: the next power of two. Gradient: upstream
    inside half a step around the range, else 0.

    The state is in variables of the layer: `min_range` and `max_range`, `steps` (training calls
    seen), `delay` (training calls that pass unquantized), `frozen` (a range, once there is one,
    stays as it is). An empty batch, or one with a NaN, an infinity or a value beyond 2**125,
    leaves the range as it was. Replicas of a `tf.distribute` strategy share the mean of their
    ranges.

    Args:
        quantization_config: `TrainableQuantizerActivationConfig`; its params may hold an initial
            range, `range_min` and `range_max`.
        momentum: share of the old range, from 0 to below 1.
        range_method: how `calibrate` finds the range, unless it is told: "mse", "minmax",
            "moving_average", "percentile" or "entropy".
        pass_whole_numbers: pass tensors unquantized, also once converted, if the data of the last
            calibration were whole numbers alone: ids, labels or lengths, which rounding to a grid
            would change. One more variable, `whole_numbers`, says so.

    Raises:
        TypeError, ValueError: the config is of another kind, asks for another method, holds
            unknown params or a range out of bounds, `momentum` is out of bounds, or `range_method`
            is unknown.

    Source: Jacob et al. 2018, arXiv:1712.05877 (moving averages of activation ranges).

    Example:

    ```python
    import keras
    import keras_qwrap as qi

    config = qi.TrainableQuantizerActivationConfig(qi.QuantizationMethod.UNIFORM, 8)
    quantizer = qi.MovingAverageActivationQATQuantizer(config, momentum=0.9)
    holder = qi.KerasActivationQuantizationHolder(quantizer)
    holder(keras.ops.array([[0.0, 1.0]]), training=True)
    holder(keras.ops.array([[-1.0, 2.0]]), training=True)
    print([round(end, 3) for end in quantizer.range])  # [-0.1, 1.1]
    ```
    """

    def __init__(
        self,
        quantization_config: Any,
        momentum: float = 0.99,
        range_method: str = "mse",
        pass_whole_numbers: bool = False,
    ) -> None:
        super().__init__(quantization_config)
        self.momentum = _check_momentum(momentum)
        self.range_method = check_range_method(range_method)
        self.pass_whole_numbers = check_bool("pass_whole_numbers", pass_whole_numbers)
        params = self._check_params(_RANGE_KEYS)
        self._first_range = ranges.Range(np.float32(0), np.float32(0))
        if params:
            low, high = (params[key] for key in _RANGE_KEYS)
            check_range(low, high)
            self._first_range = _check_ends(f"{self.quantization_config.kind} params", low, high)
            self._check_floor(
                " - ".join(reversed(_RANGE_KEYS)), np.subtract(*self._first_range[::-1])
            )

    @classmethod
    def from_spec(
        cls, quantization_config: Any, range: str, pass_whole_numbers: bool = False
    ) -> "MovingAverageActivationQATQuantizer":
        """One that `calibrate` gives its range by the spec's method."""
        return cls(quantization_config, range_method=range, pass_whole_numbers=pass_whole_numbers)

    def initialize_quantization(self, tensor_shape: tuple, name: str, layer: Any) -> dict:
        """Create the variables of the state."""
        low, high = self._first_range
        rows = [
            ("min_range", "float32", low, "mean"),
            ("max_range", "float32", high, "mean"),
            ("steps", "int32", 0, "only_first_replica"),
            ("delay", "int32", 0, "only_first_replica"),
            ("frozen", "bool", False, "only_first_replica"),
        ]
        if self.pass_whole_numbers:
            rows.append(("whole_numbers", "int32", _UNKNOWN, "only_first_replica"))
        self.quantizer_parameters = {
            role: layer.add_weight(
                name=role,
                shape=(),
                dtype=dtype,
                initializer=lambda shape, dtype=None, value=value: ops.convert_to_tensor(
                    value, dtype
                ),
                trainable=False,
                aggregation=aggregation,
            )
            for role, dtype, value, aggregation in rows
        }
        return self.quantizer_parameters

    def __call__(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        """Quantize a float tensor; shape and dtype are kept, the arithmetic is float32."""
        x, dtype = float32_input(inputs)
        self._built(self.quantizer_parameters, "a call")
        if training:
            self._see(x)
        on = ranges.was_seen(self._read("min_range"), self._read("max_range"), ops)
        if training:
            on = ops.logical_and(on, ops.greater(self._read("steps"), self._read("delay")))
        if self.pass_whole_numbers:
            on = ops.logical_and(on, ops.not_equal(self._read("whole_numbers"), _WHOLE))
        return ops.cast(fake_quantize_where(on, x, *self._derive()), dtype)

    def _see(self, x: Tensor) -> None:
        """Move the range towards a batch's, and count the batch."""
        lowest, highest = ranges.extremes(ops.stop_gradient(x))
        usable = ops.logical_and(ops.abs(lowest) <= _LARGEST, ops.abs(highest) <= _LARGEST)
        usable = ops.logical_and(usable, ops.size(x) > 0)
        batch = ranges.Range.of(lowest, highest, ops)
        old = self._read("min_range"), self._read("max_range")
        bits = self.quantization_config.num_bits
        began = ranges.has_range(old[0], old[1], bits, ops)
        stays = ops.logical_and(began, self._read("frozen"))
        moves = ops.logical_and(usable, ops.logical_not(stays))
        kept, added = np.float32(self.momentum), np.float32(1 - self.momentum)
        low, high = (
            ops.where(began, kept * start + added * end, end)
            for start, end in zip(old, batch, strict=True)
        )
        new = ranges.to_store(low, high, bits, ops)
        for role, start, end in zip(_ENDS, old, new, strict=True):
            self.quantizer_parameters[role].assign(ops.where(moves, end, start))
        self.quantizer_parameters["steps"].assign(self._read("steps") + 1)

    def _derive(self) -> tuple[Tensor, ...]:
        """Scale, and lowest and highest code minus the zero point, as float32 tensors."""
        config, ends = self.quantization_config, self._range(self._read, ops)
        grid = ranges.grid_of_range(ends, config.num_bits, config.grid, config.min_threshold, ops)
        return tuple(as_tensor(part, "float32") for part in grid)

    def _range(self, read: Callable[[str], Any], xp: Any) -> ranges.Range:
        """The range in use, if there is any; of variables that `read` reads by their names."""
        config = self.quantization_config
        floor = config.min_threshold
        low, high = (read(role) for role in _ENDS)
        high = ranges.stored_end(low, high, config.num_bits, floor, xp)
        if floor and config.quantization_method is QuantizationMethod.UNIFORM:
            high = ranges.widened_end(low, high, floor, xp)
        return ranges.Range(low, high)

    @property
    def range(self) -> tuple[float, float] | None:
        """The range; None where there is none yet."""
        self._built(self.quantizer_parameters, "range")
        if not ranges.was_seen(self._array("min_range"), self._array("max_range"), np):
            return None
        low, high = self._present_range()
        return low.item(), high.item()

    @property
    def whole_numbers(self) -> bool | None:  # type: ignore[override]
        """Whether the data of the last calibration were whole numbers alone; None if not known."""
        if "whole_numbers" not in self.quantizer_parameters:
            return None
        return {_WHOLE: True, _OTHERS: False}.get(self._array("whole_numbers").item())

    def set_whole_numbers(self, whole: bool) -> None:
        """Store whether there are whole numbers alone; only with `pass_whole_numbers`."""
        self.quantizer_parameters["whole_numbers"].assign(_WHOLE if whole else _OTHERS)

    @property
    def passes_input(self) -> bool:
        """Whether it is disabled, or passes whole numbers."""
        return not self.enabled or bool(self.whole_numbers)

    def set_range(self, low: float, high: float) -> None:
        """Store a range, widened to hold zero; two zeros say that there were zeros alone.

        Raises:
            TypeError, ValueError: an end is no finite number or beyond 2**125, `low > high`, or
                the layer is not built.
        """
        self._built(self.quantizer_parameters, "set_range")
        bits = self.quantization_config.num_bits
        least, most = _check_ends("set_range", low, high)
        for role, end in zip(_ENDS, ranges.to_store(least, most, bits, np), strict=True):
            self.quantizer_parameters[role].assign(end)

    def freeze_range(self) -> None:
        """Let training leave the range as it is, once there is one; saved with the model."""
        self.quantizer_parameters["frozen"].assign(True)

    def delay_quantization(self, steps: int) -> None:
        """Pass the tensor unquantized in the first `steps` training calls since it was built."""
        self.quantizer_parameters["delay"].assign(steps)

    def convert2inferable(self) -> BaseKerasInferableQuantizer:
        """An inferable quantizer with the stored range.

        Raises:
            ValueError: there is no range yet, or it passes whole numbers.
        """
        if self.whole_numbers:
            raise ValueError(
                f"{type(self).__name__}.convert2inferable: received a quantizer that passes whole "
                "numbers, expected one that quantizes: it has no inferable twin. Convert its "
                "wrapper or holder, which then holds a disabled quantizer."
            )
        if self.range is None:
            raise ValueError(
                f"{type(self).__name__}.convert2inferable: received a quantizer that is not "
                "calibrated, expected one with a range. Train it, calibrate the model, or call "
                "`set_range`."
            )
        config = self.quantization_config
        bits = config.num_bits
        ends = self._present_range()
        cls = inferable_class(self.quantization_target, config.quantization_method)
        if config.quantization_method is QuantizationMethod.UNIFORM:
            return cls(bits, *(end.item() for end in ends))
        threshold, signed = ranges.covering_threshold(
            ends, bits, config.grid, config.min_threshold, np
        )
        return cls(bits, threshold.item(), bool(signed))

    def get_config(self) -> dict:
        return super().get_config() | {
            "momentum": self.momentum,
            "range_method": self.range_method,
            "pass_whole_numbers": self.pass_whole_numbers,
        }

    def _read(self, role: str) -> Tensor:
        return read(self.quantizer_parameters[role])

    def _present_range(self) -> ranges.Range:
        """The range in use, in numpy."""
        return self._range(lambda role: normal(self._array(role), np), np)

    def _array(self, role: str) -> np.ndarray:
        return to_numpy(self.quantizer_parameters[role])


def _check_momentum(momentum: Any) -> float:
    fix = "Pass for example 0.99."
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float, np.number)):
        raise bad_type("momentum", momentum, "a number from 0 to below 1", fix)
    if not 0 <= momentum < 1:
        raise bad_value("momentum", momentum, "a number from 0 to below 1", fix)
    return float(momentum)


def _check_ends(name: str, low: Any, high: Any) -> ranges.Range:
    """A range as two float32 numbers, widened to hold zero."""
    ends = []
    for role, end in (("low", low), ("high", high)):
        array = float_array(f"{name}: {role}", end)
        if array.size != 1:
            raise bad_value(f"{name}: {role}", end, "one number", "The range is per tensor.")
        ends.append(array.reshape(()))
    if ends[0] > ends[1]:
        raise bad_value(f"{name}: low", low, f"a number up to high, {high}", "Swap the two.")
    widened = ranges.Range.of(ends[0], ends[1], np)
    if max(widened.high, -widened.low) > _LARGEST:
        fix = "Narrow the range; float32 cannot hold its grid."
        raise bad_value(name, (low, high), "a range inside +-2**125", fix)
    return widened
