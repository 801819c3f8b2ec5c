"""Find the ranges of a model's activations in data, without training."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_qwrap.calibration.batches import batches, number_of_batches
from keras_qwrap.layers.keras_internals import State, layer_paths, state_kept
from keras_qwrap.layers.owner import QuantizingLayer, observed, quantizers_in
from keras_qwrap.models.copying import check_built
from keras_qwrap.numerics.checks import Told, bad_value, warn
from keras_qwrap.numerics.ranges import Range
from keras_qwrap.numerics.search import check_range_method, find_range, needs_samples
from keras_qwrap.numerics.tensors import Tensor
from keras_qwrap.quantizers.base import BaseKerasTrainableQuantizer

_SAMPLES = 256
_FEW_SAMPLES = 16
_OUTERMOST = 8
_MOST_SAMPLES = 2**15
_OUTER_SHARE = 2**13
_PART = 128
_RESERVOIR = 2**16
_SEED = 20260101
_LARGEST = 2.0**125
_OUTLIER_RATIO = 100.0
_FEW_OUTLIER_RATIO = 1000.0
_TAIL = 0.001
_FEWEST_FOR_OUTLIERS = 16

Methods = str | Mapping[str, str] | None
Row = tuple[str, BaseKerasTrainableQuantizer]
Found = tuple[QuantizingLayer, str, BaseKerasTrainableQuantizer]


def calibrate(
    model: keras.Model,
    data: Any,
    method: Methods = None,
    batch_size: int = 32,
    steps: int | None = None,
    verbose: Any = "auto",
) -> dict[str, tuple[float, float]]:
    """Set the range of every activation quantizer in a model that takes one, in place.

    That is every `MovingAverageActivationQATQuantizer`, and those of your own that define
    `set_range`.

    The data runs through the model once, in inference mode, with quantized weights; activations
    with a range to be found pass in float, those with a fixed one are quantized as ever. Of each
    activation its ends are seen, the smallest and the largest values of each batch (8 for each
    row and one in 8192, on either side), and, drawn with a fixed seed, up to 256 of the others for
    each row, which stand for all of these. Up to 65536 values are kept, with what they stand for:
    memory does not grow with the data. `search.find_range` says what each method does with
    them; `moving_average` alone depends on how the data is cut: it moves the ends from batch to
    batch as training does.

    An activation whose ends are more than 100 times as far apart as the central 99.8 % of its
    values, in a batch or in all, has outliers: they are clipped, for the layers that follow too,
    with a warning. Of fewer than 1000 values all but two count as central, and 1000 times is the
    limit; fewer than 16 are never searched. In later training with `fit` the ranges go on moving,
    unless frozen by `FreezeRanges(at_epoch=0)`. Nothing else changes: the states of stateful
    recurrent layers, too, are as before.

    Args:
        model: a built model that holds wrappers or holders with such quantizers.
        data: the model's inputs; every kind that `batches.batches` takes.
        method: None for each quantizer's own `range_method`, which a recipe gave it; or for all
            `"mse"`, `"minmax"`, `"moving_average"`, `"percentile"` or `"entropy"`; or a mapping
            from a wrapper's or holder's name to one of them, for all of that name.
        batch_size: rows of each batch, for arrays; a model with a fixed batch takes its own.
        steps: the most batches to take; needed for data without end.
        verbose: progress bar: `"auto"`, 0 or 1.

    Returns:
        The new ranges by the name of the wrapper or holder, followed by `/output_1` and so on
        for its further outputs. Where several have one name, those of the layers around them go
        before it, as in `encoder/dense`; what is still alike gets `_1` and so on behind it.

    Raises:
        TypeError, ValueError: the model is not built or holds no such quantizer, an unknown
            method or layer name, data that `batches.batches` refuses, or an activation with NaN
            or infinite values. No range is set then.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_qwrap as qi

    config = qi.TrainableQuantizerActivationConfig(qi.QuantizationMethod.UNIFORM, 8)
    quantizer = qi.MovingAverageActivationQATQuantizer(config)
    holder = qi.KerasActivationQuantizationHolder(quantizer, name="input")
    model = keras.Sequential([keras.Input((3,)), holder])
    data = np.linspace(-1, 2, 30).reshape(10, 3)
    print(qi.calibrate(model, data, "minmax", verbose=0))  # {'input': (-1.0, 2.0)}
    ```
    """
    rows = _rows(model)
    methods = _methods(_found(model), method)
    seen = [_Seen(name, quantizer.momentum) for name, quantizer in rows]
    samples = _SAMPLES if any(map(needs_samples, methods)) else _FEW_SAMPLES
    observer = _Observer(model, [quantizer for _, quantizer in rows], samples)
    progress = keras.utils.Progbar(
        number_of_batches(model, data, batch_size, steps),
        verbose=1 if verbose == "auto" else verbose,
    )
    number = 0
    with state_kept(model):
        for inputs in batches(model, data, batch_size, steps):
            _see(observer, inputs, number, seen)
            number += len(keras.tree.flatten(inputs)[0])
            progress.add(1)
    ranges: list[tuple[float, float] | None] = []
    for (_, quantizer), one, chosen in zip(rows, seen, methods, strict=True):
        config = quantizer.quantization_config
        bits, grid = config.num_bits, config.grid
        values, weights, low, high = one.summary(chosen)
        found = find_range(values, low, high, chosen, bits, grid, weights) if one.reached else None
        ranges.append(found)
    new = {}
    for (name, quantizer), ends in zip(rows, ranges, strict=True):
        if ends is not None:
            quantizer.set_range(*ends)
            new[name] = quantizer.range or ends
    for (_, quantizer), one in zip(rows, seen, strict=True):
        if quantizer.pass_whole_numbers and one.reached:
            quantizer.set_whole_numbers(one.whole)
        one.warn()
    return new


def has_ranges_to_find(model: keras.Model) -> bool:
    """Whether there is anything to calibrate in a model."""
    return bool(_to_be_found(model))


def _to_be_found(model: keras.Model) -> list[Found]:
    return [found for found in quantizers_in(model) if found[2].takes_range]  # type: ignore


def _found(model: keras.Model) -> list[Found]:
    """Owner, role and quantizer of every range to be found."""
    check_built(model)
    found = _to_be_found(model)
    if not found:
        raise bad_value(
            "model",
            model.name,
            "a model with a MovingAverageActivationQATQuantizer in a wrapper or holder",
            "Quantize its activations first; fixed ranges need no calibration.",
        )
    return found


def _methods(found: list[Found], method: Methods) -> list[str]:
    """How each range is found: as `method` says, else as its quantizer does."""
    if not isinstance(method, Mapping):
        if method is not None:
            check_range_method(method, "method")
        return [method or quantizer.range_method for _, _, quantizer in found]
    names = {owner.name for owner, _, _ in found}
    unknown = [name for name in method if name not in names]
    if unknown:
        fix = "Name wrappers and holders whose ranges are to be found."
        raise bad_value("method", unknown, f"names among {sorted(names)}", fix)
    for name, chosen in method.items():
        check_range_method(chosen, f"method of '{name}'")
    return [method.get(owner.name, quantizer.range_method) for owner, _, quantizer in found]


def _rows(model: keras.Model) -> list[Row]:
    """Name, of which none is there twice, and quantizer of every range to be found."""
    found = _found(model)
    owners = {id(owner): owner.name for owner, _, _ in found}
    repeated = len(set(owners.values())) < len(owners)
    paths = layer_paths(model) if repeated else {}
    names = list(owners.values())
    rows = []
    for owner, role, quantizer in found:
        once = names.count(owner.name) == 1
        name = owner.name if once else paths.get(id(owner), str(owner.path))
        rows.append((name if role == "output_0" else f"{name}/{role}", quantizer))
    return _told_apart(rows)


def _told_apart(rows: list[Row]) -> list[Row]:
    """The rows, with `_1` and so on behind a name that is there already."""
    given = {name for name, _ in rows}
    used: set[str] = set()
    unique = []
    for name, quantizer in rows:
        if name in used:
            tries = (f"{name}_{i}" for i in count(1))
            name = next(each for each in tries if each not in given | used)
        used.add(name)
        unique.append((name, quantizer))
    return unique


class _Observer(keras.Model):
    """Runs a model while its activations pass in float, and returns what they were.

    Outputs, a row for each quantizer: `ends`, its least and greatest value; `whole`, whether all
    are whole numbers, for a quantizer that asks; `counts`, how many values it had, how many of the
    least and of the greatest are given, and how many are given in all. These `values` follow each
    other, the outermost before a sample of all. With `bounds`,
    each activation is clipped to its row of them first.
    """

    def __init__(self, model: keras.Model, quantizers: list, samples: int) -> None:
        super().__init__(name="calibration", dtype="float32", autocast=False)
        self.model = model
        self.order: list[int] = []
        self.samples = samples
        self._rows = {id(quantizer): row for row, quantizer in enumerate(quantizers)}
        self._asking = [quantizer.pass_whole_numbers for quantizer in quantizers]
        random = np.random.default_rng(_SEED)
        self.random = random.integers(2**30, size=_MOST_SAMPLES + 1, dtype=np.int32)
        self.run_eagerly = model.run_eagerly
        if keras.backend.backend() != "jax":
            # XLA would take longer to compile than a calibration to run.
            self.jit_compile = False

    def call(self, inputs: dict, training: bool | None = None) -> dict:
        bounds = inputs.get("bounds")
        seen: dict[int, list[Tensor]] = {row: [] for row in self._rows.values()}

        def observe(quantizer: Any, tensor: Tensor) -> Tensor | None:
            row = self._rows.get(id(quantizer))
            if row is None:
                return None
            if bounds is not None:
                low, high = (ops.cast(bounds[row, end], tensor.dtype) for end in (0, 1))
                tensor = ops.minimum(ops.maximum(tensor, low), high)
            if row not in self.order:
                self.order.append(row)
            seen[row].append(ops.reshape(ops.cast(tensor, "float32"), (-1,)))
            return tensor

        with observed(self.model, observe):
            self.model(inputs["inputs"])
        rows = ops.shape(keras.tree.flatten(inputs["inputs"])[0])[0]
        flat = [ops.concatenate(tensors) if tensors else None for tensors in seen.values()]
        found = [self._summary(x, rows, inputs["before"]) for x in flat]
        ends, counts, values = zip(*found, strict=True)
        return {
            "ends": ops.stack(ends),
            "whole": ops.stack(
                [_whole(x, asking) for x, asking in zip(flat, self._asking, strict=True)]
            ),
            "counts": ops.stack(counts),
            "values": ops.concatenate(values),
        }

    def _summary(self, x: Tensor | None, rows: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        """Ends, counts, and values: the outermost, and one at random in each of equal parts.

        The parts, and the places in them, do not depend on how the rows are cut into batches.
        """
        if x is None:
            return ops.zeros((2,), "float32"), ops.zeros((3,), "int32"), ops.zeros((0,), "float32")
        size = ops.shape(x)[0]
        number = _lesser(size, _lesser(self.samples * rows, _MOST_SAMPLES))
        outer = _lesser(_OUTERMOST * rows + size // _OUTER_SHARE, (size - number) // 2)
        ends, outermost = _outermost(x, outer)
        index = ops.arange(number, dtype="int32")
        width = size // number
        random = ops.convert_to_tensor(self.random, "int32")
        jitter = ops.take(random, (index + ops.cast(before, "int32")) % len(self.random))
        place = index * width + index * (size % number) // number + jitter % width
        counts = [ops.cast(count, "int32") for count in (size, outer, 2 * outer + number)]
        values = ops.concatenate([outermost, ops.take(x, place)])
        return ends, ops.stack(counts), values


def _whole(x: Tensor | None, asking: bool) -> Tensor:
    """1 where all numbers are whole, 0 where not, where there are none, and where nobody asks.

    Several workers of TensorFlow gather no bools.
    """
    if x is None or not asking:
        return ops.zeros((), "int32")
    return ops.cast(ops.all(ops.equal(x, ops.round(x))), "int32")


def _lesser(a: Any, b: Any) -> Any:
    """The lesser of two counts; a number, where both are, as shapes need it."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else ops.minimum(a, b)


def _outermost(x: Tensor, number: Any) -> tuple[Tensor, Tensor]:
    """The least and the greatest value; the `number` least ones, and the greatest, in no order.

    They are in those parts of the tensor whose ends are outermost, or behind the last part: much
    faster than to look for them among all values.
    """
    signs = ops.convert_to_tensor([[-1.0], [1.0]], "float32")
    size = ops.shape(x)[0]
    # Torch, where sizes are known, reduces nothing that is empty.
    width = 1 if isinstance(size, int) and size < _PART else _PART
    parts = size // width
    cut = ops.reshape(x[: parts * width], (-1, width))
    left = signs * x[parts * width :]
    greatest = signs * ops.stack([ops.min(cut, axis=1), ops.max(cut, axis=1)])
    ends = signs[:, 0] * ops.max(ops.concatenate([greatest, left], axis=1), axis=1)
    which = ops.top_k(greatest, _lesser(number, parts), sorted=False)[1]
    near = signs * ops.reshape(ops.take(cut, which, axis=0), (2, -1))
    found = ops.top_k(ops.concatenate([near, left], axis=1), number, sorted=False)[0]
    return ends, ops.reshape(signs * found, (-1,))


@dataclass(frozen=True)
class _Batch:
    """What a batch holds of one activation: its ends, whether all are whole, sorted values.

    A weight is the number of values that one stands for.
    """

    ends: np.ndarray
    whole: bool
    size: int
    values: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(
        cls, ends: np.ndarray, whole: np.ndarray, counts: np.ndarray, values: np.ndarray
    ) -> "_Batch":
        """From the outputs of an observer: the outermost values stand for themselves."""
        size, outer, _ = (int(count) for count in counts)
        low, high, drawn = np.split(values, (outer, 2 * outer))
        if outer:
            drawn = drawn[(drawn >= low.max()) & (drawn <= high.min())]
        weight = (size - 2 * outer) / max(len(drawn), 1)
        weights = np.repeat([1, weight, 1], [outer, len(drawn), outer])
        values = np.concatenate([np.sort(part) for part in (low, drawn, high)])
        return cls(ends, bool(whole), size, values, weights)

    def bounds(self) -> tuple[float, float] | None:
        """Where to clip its outliers; None where there are none."""
        return None if self.whole else _bounds(self.values, self.weights, *self.ends)


def _see(observer: _Observer, inputs: Any, number: int, seen: list["_Seen"]) -> None:
    """One batch; run again with outliers clipped, for the layers that follow, where there are.

    `number` is that of the rows before.
    """
    before = number * observer.samples % len(observer.random)
    feed = {"inputs": inputs, "before": np.array(before, np.int32)}
    bounds = np.array([[-np.inf, np.inf]] * len(seen), np.float32)
    state = State(observer.model)
    for _ in range(len(seen) + 1):
        state.restore()
        found = _found_in(observer.predict_on_batch(feed), len(seen))
        for one, batch in zip(seen, found, strict=True):
            one.check(batch.ends)
        outlying = [
            row
            for row in observer.order
            if np.isinf(bounds[row, 0]) and found[row].bounds() is not None
        ]
        if not outlying:
            break
        first = outlying[0]
        bounds[first] = found[first].bounds()
        seen[first].note_outliers(*found[first].ends)
        feed["bounds"] = bounds
    for one, batch in zip(seen, found, strict=True):
        one.add(batch)


def _found_in(outputs: dict[str, np.ndarray], number: int) -> list[_Batch]:
    # Where outputs of several replicas are joined, the first one's come first.
    counts = outputs["counts"][:number]
    values = np.split(outputs["values"], np.cumsum(counts[:, 2]))[:number]
    ends, whole = outputs["ends"][:number], outputs["whole"][:number]
    rows = zip(ends, whole, counts, values, strict=True)
    return [_Batch.of(*row) for row in rows]


def _bounds(
    values: np.ndarray, weights: np.ndarray, low: float, high: float
) -> tuple[float, float] | None:
    """Where to clip outliers of sorted values; None where there are none."""
    reached = np.cumsum(weights, dtype=np.float64)
    if len(reached) == 0 or round(reached[-1]) < _FEWEST_FOR_OUTLIERS:
        return None
    tail = int(_TAIL * reached[-1])
    ratio = _OUTLIER_RATIO if tail else _FEW_OUTLIER_RATIO
    tail = max(1, tail)
    least = float(values[np.searchsorted(reached, tail, "right")])
    most = float(values[np.searchsorted(reached, reached[-1] - tail, "left")])
    width = most - least
    if width == 0 or high - low <= ratio * width:
        return None
    return max(least - width / 2, float(low)), min(most + width / 2, float(high))


class _Seen:
    """What was seen of one activation."""

    def __init__(self, name: str, momentum: float) -> None:
        self.reached = False
        self.whole = True
        self._name = name
        self._momentum = momentum
        self._ends = (np.inf, -np.inf)
        self._average = np.zeros(2)
        self._values = np.empty(0, np.float32)
        self._weights = np.empty(0, np.float32)
        self._lightest = 1.0
        self._inner = (-np.inf, np.inf)
        self._random = np.random.default_rng(_SEED)
        self._outliers: tuple[float, float] | None = None

    def check(self, ends: np.ndarray) -> None:
        """Refuse NaN, infinity, and numbers too large for any range."""
        if not np.all(np.abs(ends[:2]) <= _LARGEST):
            raise bad_value(
                f"activation of '{self._name}'",
                Told(f"values from {ends[0]} to {ends[1]}"),
                "finite numbers below 2**125",
                "The model itself makes them from this data: look at the layers before.",
            )

    def note_outliers(self, low: float, high: float) -> None:
        """Remember the ends before clipping, for the warning."""
        before = self._outliers or (low, high)
        self._outliers = min(before[0], float(low)), max(before[1], float(high))

    def add(self, batch: _Batch) -> None:
        """A batch; where there is no room for all values, light ones make way, by chance."""
        if batch.size == 0:
            return
        low, high = (float(end) for end in batch.ends)
        step = 1 - self._momentum if self.reached else 1.0
        self._average += step * (Range.of(low, high, np) - self._average)
        self._ends = min(low, self._ends[0]), max(high, self._ends[1])
        self.reached = True
        self.whole = self.whole and batch.whole
        values, weights = batch.values, batch.weights
        if self._lightest > 1:
            values, weights = self._fewer(values, weights)
        self._values = np.concatenate([self._values, values])
        self._weights = np.concatenate([self._weights, weights.astype(np.float32)])
        if len(self._values) > _RESERVOIR:
            self._lightest = 2 * float(np.sum(self._weights, dtype=np.float64)) / _RESERVOIR
            places = [_RESERVOIR // 64, -1 - _RESERVOIR // 64]
            low, high = np.partition(self._values, places)[places]
            self._inner = float(low), float(high)
            self._values, self._weights = self._fewer(self._values, self._weights)

    def _fewer(self, values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A part of the values that stands for all: none but the outermost with a small weight."""
        inside = (values >= self._inner[0]) & (values <= self._inner[1])
        chances = np.where(inside, weights / self._lightest, 1)
        kept = self._random.random(len(values)) < chances
        heavier = np.where(inside, np.maximum(weights, self._lightest), weights)
        return values[kept], heavier[kept]

    def summary(self, method: str) -> tuple[np.ndarray, np.ndarray, float, float]:
        """Values, their weights, and ends for the search, without outliers."""
        order = np.argsort(self._values)
        values, weights = self._values[order], self._weights[order]
        low, high = self._average if method == "moving_average" else self._ends
        bounds = None if self.whole else _bounds(values, weights, *self._ends)
        if bounds is not None:
            self.note_outliers(*self._ends)
            low, high = np.clip((low, high), *bounds)
            inside = (values >= low) & (values <= high)
            values, weights = values[inside], weights[inside]
        return values, weights, float(low), float(high)

    def warn(self) -> None:
        """Say what was unusual."""
        low, high = self._ends
        if not self.reached:
            text = "was not reached by this data; its range is left as it was."
        elif self._outliers is not None:
            text = f"has outliers from {self._outliers[0]:g} to {self._outliers[1]:g}: clipped."
        elif low == high == 0:
            text = "is always 0; the first training batch with other values sets its range."
        elif low == high:
            text = f"is always {low:g}; its range holds only that and zero."
        else:
            return
        warn(f"calibrate: the activation of '{self._name}' {text}")
