"""Which axes of a tensor keep a range of their own."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_qwrap.numerics.checks import bad_type, bad_value

MAX_RANK = 32
"""The highest rank of an array in every version of numpy."""


@dataclass(frozen=True)
class Channels:
    """The kept axes of a tensor of a given rank; none of them means one range for the tensor.

    A depthwise kernel `[3, 3, 8, 4]` with `kept=(2, 3)` has 32 ranges, `[1, 1, 8, 4]`; with none,
    it has one, `[]`.

    Args:
        kept: kept axes, ascending, counted from 0.
        rank: rank of the tensor, None where no axis is kept and any rank will do.
    """

    kept: tuple[int, ...] = ()
    rank: int | None = None

    @property
    def reduced(self) -> tuple[int, ...] | None:
        """The axes that share one range; None, all of them, where no axis is kept."""
        if self.rank is None:
            return None
        return tuple(axis for axis in range(self.rank) if axis not in self.kept)

    def get_config(self) -> dict:
        """The three constructor arguments of a quantizer that say so."""
        kept: Any = list(self.kept) or None
        return {
            "per_channel": bool(self.kept),
            "channel_axis": self.kept[0] if len(self.kept) == 1 else kept,
            "input_rank": self.rank,
        }

    def range_shape(self, tensor_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a range that broadcasts against a tensor of shape `tensor_shape`."""
        if not self.kept:
            return ()
        return tuple(n if axis in self.kept else 1 for axis, n in enumerate(tensor_shape))

    def spread(self, name: str, values: np.ndarray) -> np.ndarray:
        """Values, one for each channel, as an array that broadcasts against the tensor.

        They may have that shape already.
        """
        if not self.kept:
            if values.size != 1:
                raise bad_value(
                    name,
                    values.tolist(),
                    "one number, since the range is per tensor",
                    "Pass one; weights quantizers take several with per_channel=True.",
                )
            return values.reshape(())
        if values.ndim == self.rank and values.shape == self.range_shape(values.shape):
            return values
        if values.ndim != len(self.kept):
            raise bad_value(
                name,
                values.tolist(),
                f"an array with {len(self.kept)} dimension(s), one for each channel axis, or with "
                f"{self.rank}, of length 1 along the others",
                "Pass one for each channel, or per_channel=False for one range (in a config: "
                "weights_per_channel_threshold=False).",
            )
        shape = [1] * (self.rank or 0)
        for axis, length in zip(self.kept, values.shape, strict=True):
            shape[axis] = length
        return values.reshape(shape)

    def gather(self, spread: np.ndarray) -> float | list:
        """The inverse of `spread`, for a config: numbers of as few digits as float32 needs."""
        numbers = np.array([float(str(number)) for number in spread.ravel()])
        if not self.kept:
            return numbers.item()
        return numbers.reshape([spread.shape[axis] for axis in self.kept]).tolist()

    def check_tensor(self, name: str, range_shape: tuple, tensor_shape: tuple) -> None:
        """Refuse a tensor whose rank or channels do not fit ranges of shape `range_shape`."""
        if not self.kept:
            return
        if len(tensor_shape) != self.rank:
            raise bad_value(
                name,
                tuple(tensor_shape),
                f"a tensor of rank {self.rank}",
                "Set `input_rank` to the rank of the tensor that is quantized.",
            )
        needed = [tensor_shape[axis] for axis in self.kept]
        given = [range_shape[axis] for axis in self.kept]
        if needed != given:
            raise bad_value(
                name,
                tuple(tensor_shape),
                f"{given} channels along axes {list(self.kept)}, as many as there are ranges",
                f"Pass {needed} thresholds or ranges, or another `channel_axis`.",
            )


def check_bool(name: str, value: Any) -> bool:
    """`value`, refused unless it is a bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise bad_type(name, value, "True or False", "Pass a bool.")
    return bool(value)


def check_channel_axis(channel_axis: Any, name: str = "channel_axis") -> tuple[int, ...]:
    """`channel_axis`, an int or several, as a tuple of ints."""
    axes = channel_axis if isinstance(channel_axis, (list, tuple)) else (channel_axis,)
    if not axes or any(isinstance(a, bool) or not isinstance(a, (int, np.integer)) for a in axes):
        raise bad_type(
            name, channel_axis, "an int or a tuple of ints", "Name the axes that are kept."
        )
    return tuple(int(axis) for axis in axes)


def make_channels(per_channel: Any, channel_axis: Any, input_rank: Any) -> Channels:
    """The `Channels` that the three constructor arguments describe, or an error."""
    if not check_bool("per_channel", per_channel):
        return Channels()
    if channel_axis is None or input_rank is None:
        missing = "channel_axis" if channel_axis is None else "input_rank"
        raise bad_value(
            missing,
            None,
            f"`{missing}` together with per_channel=True",
            "Pass channel_axis (the kept axis) and input_rank (the tensor's rank).",
        )
    if isinstance(input_rank, bool) or not isinstance(input_rank, (int, np.integer)):
        raise bad_type("input_rank", input_rank, "an int", "Pass the tensor's rank.")
    if not 1 <= input_rank <= MAX_RANK:
        expected = f"an int from 1 to {MAX_RANK}"
        raise bad_value("input_rank", input_rank, expected, "Pass the tensor's rank.")
    axes = check_channel_axis(channel_axis)
    if any(not -input_rank <= axis < input_rank for axis in axes):
        raise bad_value(
            "channel_axis",
            channel_axis,
            f"axes from {-input_rank} to {input_rank - 1} for a tensor of rank {input_rank}",
            "Name an axis that the tensor has.",
        )
    kept = tuple(axis % int(input_rank) for axis in axes)
    if list(kept) != sorted(set(kept)):
        raise bad_value(
            "channel_axis", channel_axis, "distinct axes in ascending order", "Sort the axes."
        )
    return Channels(kept, int(input_rank))
