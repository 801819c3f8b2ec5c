"""How a range is found in numbers that were seen: activations by samples, weights per channel.

Everything here is numpy. A range `(low, high)` always holds zero.
"""

from typing import Any

import numpy as np

from keras_qwrap.numerics import ranges
from keras_qwrap.numerics.channels import make_channels
from keras_qwrap.numerics.checks import bad_value, nearest
from keras_qwrap.numerics.grids import float_array
from keras_qwrap.numerics.ranges import Range, grid_of_range
from keras_qwrap.numerics.rounding import SMALLEST_SCALE, to_steps

GRIDS = ("symmetric", "power_of_two", "uniform")
"""The grids that a range is found for: of a threshold, of a power of two, with a zero point."""

_PERCENT = 99.99
_BINS = 2048
_TAIL = 1024
_MIDDLE = 4096
_COARSE = np.exp2(-np.arange(0, 8, 1 / 12))
_WIDE = np.exp2(np.arange(-5, 1.1, 1 / 8))
_NEAR = np.exp2(np.arange(-4, 4.1) / 48)
_FINE = np.exp2(np.arange(-28, 28.1) / 128)
_SMOOTHED = 9
_BLURRED = 17
_WEIGHT_COARSE = np.exp2(-np.r_[0:0.25:16j, 0.3:1:12j, 1.1:4:18j])
_WEIGHT_FINE = np.exp2(np.arange(-1, 1.1, 1 / 4) / 6)
_BLOCK = 2**17


def find_range(
    samples: Any,
    low: float,
    high: float,
    method: str,
    num_bits: int,
    grid: str,
    weights: Any = None,
) -> Range:
    """The range for an activation quantizer, inside `low..high` widened to hold zero.

    - `minmax`, `moving_average`: `low` and `high` themselves.
    - `percentile`: the 0.01th and the 99.99th percentile of the samples.
    - `mse`: the clipped range with the least mean squared error between the samples and their
      values on the grid that a quantizer derives from it.
    - `entropy`: the clipped range whose grid keeps most information: the least Kullback-Leibler
      divergence between the samples' histogram of 2048 bins and the histogram that the grid leaves
      of it (S. Migacz, "8-bit Inference with TensorRT", GPU Technology Conference 2017). Zeros,
      which every grid holds, are left out of the histogram, and it is smoothed over 17 bins, since
      chance alone makes the bins of a sample differ.

    Args:
        samples: the numbers seen, or a part of them; finite.
        low: the least number seen.
        high: the greatest number seen.
        method: one of `RANGE_METHODS`.
        num_bits: width of the codes.
        grid: one of `GRIDS`.
        weights: how many of the numbers seen each sample stands for; by default all as many.

    Raises:
        ValueError: an unknown method, or numbers that are not finite.
    """
    check_range_method(method, "method")
    _check_grid(grid)
    samples = np.asarray(samples, dtype=np.float32).ravel()
    weight = np.ones(samples.size) if weights is None else np.asarray(weights, np.float64).ravel()
    ends = np.asarray([low, high], dtype=np.float32)
    if not (np.all(np.isfinite(samples)) and np.all(np.isfinite(ends)) and low <= high):
        raise bad_value(
            "samples, low, high", (low, high), "finite numbers, low <= high", "Remove NaN first."
        )
    widest = Range(*(float(end) for end in Range.of(ends[0], ends[1], np)))
    if not needs_samples(method) or samples.size == 0 or widest == (0.0, 0.0):
        return widest
    # Powers of two scale exactly, and keep the squares of huge and tiny numbers in float32.
    unit = 2.0 ** np.frexp(max(-widest[0], widest[1]))[1]
    scaled = Range(widest.low / unit, widest.high / unit)
    x = np.clip(samples / unit, *scaled).astype(np.float32)
    found = _FINDERS[method](x, weight, scaled, num_bits, grid)
    low, high = max(found.low * unit, widest.low), min(found.high * unit, widest.high)
    return Range(float(low), float(high))


def needs_samples(method: str) -> bool:
    """Whether a method looks at the numbers seen, not at their ends alone."""
    return _FINDERS[method] is not _ends


def check_range_method(method: Any, name: str = "range_method") -> str:
    """`method`, refused unless it is one of `RANGE_METHODS`."""
    if not isinstance(method, str) or method not in _FINDERS:
        fix = f"Nearest: {nearest(str(method), _FINDERS)}."
        raise bad_value(name, method, f"one of {', '.join(_FINDERS)}", fix)
    return method


def _check_grid(grid: Any, known: tuple[str, ...] = GRIDS) -> None:
    if grid not in known:
        raise bad_value("grid", grid, f"one of {', '.join(known)}", "Choose one of them.")


def _ends(x: np.ndarray, weight: np.ndarray, widest: Range, num_bits: int, grid: str) -> Range:
    return widest


def _percentile(
    x: np.ndarray, weight: np.ndarray, widest: Range, num_bits: int, grid: str
) -> Range:
    """Each number stands at as many ranks in a row as its weight says."""
    order = np.argsort(x)
    last = np.cumsum(weight[order]) - 1
    ranks = np.stack([last - weight[order] + 1, last], axis=1)
    wanted = np.array([100 - _PERCENT, _PERCENT]) / 100 * last[-1]
    low, high = np.interp(wanted, ranks.ravel(), np.repeat(x[order].astype(np.float64), 2))
    return Range(*(float(end) for end in Range.of(low, high, np)))


def _grids(low: Any, high: Any, num_bits: int, grid: str) -> tuple[np.ndarray, ...]:
    """Step, lowest and highest number of steps of the grids that quantizers derive from ranges."""
    ends = Range(np.asarray(low, np.float32), np.asarray(high, np.float32))
    return grid_of_range(ends, num_bits, grid, 0.0, np)


def _errors(
    x: np.ndarray,
    weight: np.ndarray,
    candidates: tuple[np.ndarray, np.ndarray],
    num_bits: int,
    grid: str,
) -> np.ndarray:
    """Weighted sum of squared errors of `x` for each candidate range."""
    step, lowest, highest = (a[:, None] for a in _grids(*candidates, num_bits, grid))
    y = to_steps(x, step, np)
    np.clip(y, lowest, highest, out=y)
    y *= step
    y -= x
    np.square(y, out=y)
    return y @ weight


def _mean_around(row: Any, number: int) -> np.ndarray:
    """The mean of each number of a row and those beside it, `number` in all; mirrored at the ends.

    What chance, which differs from sample to sample, adds to one of them is less in the mean.
    """
    padded = np.pad(row, number // 2, mode="symmetric")
    return np.convolve(padded, np.full(number, 1 / number), "valid")


def _thinned(x: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A part of the numbers, and how many each stands for; the tails are kept whole."""
    if x.size <= 2 * _TAIL + _MIDDLE:
        return x, weight
    order = np.argsort(x)
    x, weight = x[order], weight[order]
    reached = np.cumsum(weight[_TAIL:-_TAIL])
    each = reached[-1] / _MIDDLE
    middle = _TAIL + np.searchsorted(reached, (np.arange(_MIDDLE) + 0.5) * each)
    return (
        np.concatenate([x[:_TAIL], x[middle], x[-_TAIL:]]),
        np.concatenate([weight[:_TAIL], np.full(_MIDDLE, each), weight[-_TAIL:]]),
    )


def _least_error(
    x: np.ndarray, weight: np.ndarray, widest: Range, num_bits: int, grid: str
) -> Range:
    """First both ends are moved together, then each alone, in finer steps.

    Last, the mean of the errors around each range is what counts: a single error also says how
    these very samples happen to fall on a grid, which the next ones do not.
    """
    nonzero = x != 0  # Zero is on every grid.
    x, weight = x[nonzero], weight[nonzero]
    if x.size == 0:
        return widest
    part, share = _thinned(x, weight)
    share = share.astype(np.float32)

    def best(lows: Any, highs: Any, smoothed: int = 1) -> Range:
        lows, highs = np.broadcast_arrays(np.maximum(lows, widest[0]), np.minimum(highs, widest[1]))
        errors = _errors(part, share, (lows, highs), num_bits, grid)
        which = int(np.argmin(_mean_around(errors, smoothed)))
        return Range(float(lows[which]), float(highs[which]))

    low, high = best(*_clipped(widest, _COARSE, grid, num_bits))
    if grid == "symmetric":
        low, high = best(*_clipped(Range(low, high), _FINE, grid, num_bits, widest), _SMOOTHED)
    elif grid == "uniform":
        low, high = best(low, np.unique(high * _WIDE))
        low, high = best(np.unique(low * _WIDE), high)
        for factors in (_NEAR**2, _NEAR):
            lows, highs = np.meshgrid(np.unique(low * factors), np.unique(high * factors))
            low, high = best(lows.ravel(), highs.ravel())
        low, high = best(low, np.unique(high * _FINE), _SMOOTHED)
        low, high = best(np.unique(low * _FINE), high, _SMOOTHED)
    given = _error(x, weight, widest, num_bits, grid)
    found = _error(x, weight, Range(low, high), num_bits, grid)
    return Range(low, high) if found < given else widest


def _error(x: np.ndarray, weight: np.ndarray, ends: Range, num_bits: int, grid: str) -> float:
    """Weighted sum of squared errors of numbers on the grid of a range, in float64."""
    step, lowest, highest = _grids(*ends, num_bits, grid)
    y = np.clip(to_steps(x, step, np), lowest, highest) * step
    return float(np.square(y.astype(np.float64) - x) @ weight)


def _clipped(
    ends: Range,
    factors: np.ndarray,
    grid: str,
    num_bits: int,
    widest: Range | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Ranges clipped to `factors` times the largest magnitude of `ends`.

    For a power of two the magnitudes are those that fill the grid of a power of two.
    """
    low, high = widest or ends
    if grid == "uniform":
        top = max(-ends[0], ends[1]) * factors
        return np.maximum(low, -top), np.minimum(high, top)
    step, lowest, highest = (float(a) for a in _grids(*ends, num_bits, grid))
    steps = step * factors
    if grid == "power_of_two":
        steps = step * np.exp2(-np.arange(8.0))
    return np.maximum(low, lowest * steps), np.minimum(high, highest * steps)


def _least_divergence(
    x: np.ndarray, weight: np.ndarray, widest: Range, num_bits: int, grid: str
) -> Range:
    nonzero = x != 0
    if not nonzero.any():
        return widest
    counts, edges = np.histogram(x[nonzero], _BINS, widest, weights=weight[nonzero])
    counts = _mean_around(counts, _BLURRED)
    centres = (edges[:-1] + edges[1:]) / 2
    width = edges[1] - edges[0]
    # A window of fewer bins than the grid has steps could tell nothing.
    factors = np.arange(_BINS, 0, -16) / _BINS
    lows, highs = _clipped(widest, factors, grid, num_bits)
    steps = _grids(lows, highs, num_bits, grid)[0]
    enough = (highs - lows) / width >= 2**num_bits
    enough[0] = True
    divergences = [
        _divergence(counts, centres, low, high, step, width)
        for low, high, step in zip(lows[enough], highs[enough], steps[enough], strict=True)
    ]
    smoothed = 1 if grid == "power_of_two" else _SMOOTHED
    which = int(np.argmin(_mean_around(divergences, smoothed)))
    return Range(float(lows[enough][which]), float(highs[enough][which]))


def _divergence(
    counts: np.ndarray, centres: np.ndarray, low: float, high: float, step: float, width: float
) -> float:
    """Between the clipped histogram and the one that a step leaves of it."""
    first, last = np.searchsorted(centres, [low - width / 2, high + width / 2])
    inside = counts[first:last].astype(np.float64)
    expected = inside.copy()
    expected[0] += counts[:first].sum()
    expected[-1] += counts[last:].sum()
    levels = np.floor((centres[first:last] - centres[first] + width / 2) / step).astype(np.int64)
    present = inside > 0
    total = np.bincount(levels, inside)
    bins = np.bincount(levels, present)
    left = np.where(present, (total / np.maximum(bins, 1))[levels], 0)
    seen = expected > 0
    p = expected[seen] / expected.sum()
    q = np.maximum(left[seen] / max(left.sum(), 1), 1e-4 / _BINS)
    return float(np.sum(p * np.log(p / q)))


_FINDERS = {
    "minmax": _ends,
    "moving_average": _ends,
    "percentile": _percentile,
    "mse": _least_error,
    "entropy": _least_divergence,
}
RANGE_METHODS = tuple(_FINDERS)
"""How calibration can find an activation's range; `find_range` says what each does."""


def weights_threshold(
    weight: Any,
    channel_axes: int | tuple[int, ...] | None,
    num_bits: int,
    grid: str,
    min_threshold: float = 0.0,
) -> np.ndarray:
    """The threshold of each channel whose grid has the least mean squared error.

    The grid is that of a given threshold, `[-t, t - t/2**(b-1)]`. No threshold is greater than
    the one that clips nothing, `max|w| * 2**(b-1) / (2**(b-1) - 1)`, or the power of two above it,
    and no error is greater than with that one.

    Args:
        weight: finite numbers of any shape.
        channel_axes: the kept axes, ascending; None for one threshold.
        num_bits: width of the codes.
        grid: "symmetric" or "power_of_two".
        min_threshold: floor under the thresholds; with 0 they are as small as the channel, down to
            a step of 2**-126, and 1 for one of zeros.

    Returns:
        float32 array with one dimension for each kept axis.

    Raises:
        TypeError, ValueError: another method, axes that the weight lacks, or weights that are not
            finite.
    """
    weight = float_array("weight", weight)
    _check_grid(grid, GRIDS[:2])
    per_channel = channel_axes is not None
    kept = make_channels(per_channel, channel_axes, max(weight.ndim, 1)).kept
    rows = np.moveaxis(weight, kept, range(len(kept)))
    shape = rows.shape[: len(kept)]
    rows = rows.reshape(int(np.prod(shape)), -1)
    per_block = max(1, _BLOCK // rows.shape[1])
    blocks = [rows[i : i + per_block] for i in range(0, len(rows), per_block)]
    found = np.concatenate([_thresholds(block, num_bits, grid) for block in blocks])
    floor = np.float32(max(min_threshold, 2.0 ** (num_bits - 127)))
    if grid == "power_of_two":
        floor = ranges.next_power_of_two(floor, np)
    found = np.maximum(found, floor)
    if not min_threshold:
        found[np.abs(rows).max(axis=1) < np.float32(SMALLEST_SCALE)] = 1
    return found.reshape(shape)


def _thresholds(rows: np.ndarray, num_bits: int, grid: str) -> np.ndarray:
    """One threshold for each row."""
    half = np.float32(2 ** (num_bits - 1))
    top = np.max(np.abs(rows), axis=1)
    unit = np.minimum(ranges.next_power_of_two(top, np), np.float32(2.0**127))
    x = rows / unit[:, None]
    widest = top / unit * (half / (half - 1))
    if grid == "power_of_two":
        widest = ranges.next_power_of_two(widest, np)
        rounds = [np.exp2(-np.arange(6.0))]
    else:
        rounds = [_WEIGHT_COARSE, _WEIGHT_FINE]
    error, best = _row_errors(x, widest, half), widest
    for factors in rounds:
        centre = best
        for factor in factors.astype(np.float32):
            threshold = np.minimum(centre * factor, widest)
            new = _row_errors(x, threshold, half)
            best = np.where(new < error, threshold, best)
            error = np.minimum(new, error)
    with np.errstate(over="ignore"):
        return best * unit


def _row_errors(x: np.ndarray, threshold: np.ndarray, half: np.float32) -> np.ndarray:
    """Sum of squared errors of each row on the grid of its threshold."""
    step = np.where(threshold > 0, threshold / half, np.float32(1))[:, None]
    y = to_steps(x, step, np)
    np.clip(y, -half, half - 1, out=y)
    y *= step
    y -= x
    return np.einsum("ij,ij->i", y, y, dtype=np.float64)
