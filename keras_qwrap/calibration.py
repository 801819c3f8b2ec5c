"""Find the ranges of a model's activations in data, without training."""

from collections.abc import Mapping
from itertools import count
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_qwrap.copying import check_built
from keras_qwrap.errors import bad_value, warn
from keras_qwrap.quantizers.config import check_range_method
from keras_qwrap.quantizers.moving_average import MovingAverageActivationQATQuantizer
from keras_qwrap.quantizing_layer import QuantizingLayer, observed, quantizers_in
from keras_qwrap.range_search import END_METHODS, find_range
from keras_qwrap.streams import batches, number_of_batches
from keras_qwrap.substitution import State, layer_paths, state_kept
from keras_qwrap.tensors import Tensor

_SAMPLES = 4096
_FEW_SAMPLES = 256
_RESERVOIR = 2**16
_SEED = 20260101
_LARGEST = 2.0**125
_OUTLIER_RATIO = 100.0
_FEW_OUTLIER_RATIO = 1000.0
_TAIL = 0.001
_FEWEST_FOR_OUTLIERS = 16

Methods = str | Mapping[str, str] | None
Row = tuple[str, MovingAverageActivationQATQuantizer]
Found = tuple[QuantizingLayer, str, MovingAverageActivationQATQuantizer]


def calibrate(
    model: keras.Model,
    data: Any,
    method: Methods = None,
    batch_size: int = 32,
    steps: int | None = None,
    verbose: Any = "auto",
) -> dict[str, tuple[float, float]]:
    """Set the range of every `MovingAverageActivationQATQuantizer` in a model, in place.

    The data runs through the model once, in inference mode, with quantized weights; activations
    with a range to be found pass in float, those with a fixed one are quantized as ever. Seen are
    the ends of each activation, and a uniform sample of up to 65536 of its values, drawn with a
    fixed seed: memory does not grow with the data. `range_search.find_range` says what each
    method does with them; `moving_average` moves the ends from batch to batch as training does.

    An activation whose ends are more than 100 times as far apart as the central 99.8 % of its
    values, in a batch or in all, has outliers: they are clipped, for the layers that follow too,
    with a warning. Of fewer than 1000 values all but two count as central, and 1000 times is the
    limit; fewer than 16 are never searched. In later training with `fit` the ranges go on moving,
    unless frozen by `FreezeRanges(at_epoch=0)`. Nothing else changes: the states of stateful
    recurrent layers, too, are as before.

    Args:
        model: a built model that holds wrappers or holders with such quantizers.
        data: the model's inputs; every kind that `streams.batches` takes.
        method: None for each quantizer's own `range_method`, which a recipe gave it; or for all
            `"mse"`, `"minmax"`, `"moving_average"`, `"percentile"` or `"entropy"`; or a mapping
            from a wrapper's or holder's name to one of them, for all of that name.
        batch_size: rows of each batch, for arrays.
        steps: the most batches to take; needed for data without end.
        verbose: progress bar: `"auto"`, 0 or 1.

    Returns:
        The new ranges by the name of the wrapper or holder, followed by `/output_1` and so on
        for its further outputs. Where several have one name, those of the layers around them go
        before it, as in `encoder/dense`; what is still alike gets `_1` and so on behind it.

    Raises:
        TypeError, ValueError: the model is not built or holds no such quantizer, an unknown
            method or layer name, data that `streams.batches` refuses, or an activation with NaN
            or infinite values. No range is set then.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_qwrap as qi
    from keras_qwrap.calibration import calibrate
    from keras_qwrap.quantizers.moving_average import MovingAverageActivationQATQuantizer

    config = qi.TrainableQuantizerActivationConfig(qi.QuantizationMethod.UNIFORM, 8)
    quantizer = MovingAverageActivationQATQuantizer(config)
    holder = qi.KerasActivationQuantizationHolder(quantizer, name="input")
    model = keras.Sequential([keras.Input((3,)), holder])
    data = np.linspace(-1, 2, 30).reshape(10, 3)
    print(calibrate(model, data, "minmax", verbose=0))  # {'input': (-1.0, 2.0)}
    ```
    """
    rows = _rows(model)
    methods = _methods(_found(model), method)
    seen = [_Seen(name, quantizer.momentum) for name, quantizer in rows]
    number = _FEW_SAMPLES if set(methods) <= set(END_METHODS) else _SAMPLES
    observer = _Observer(model, [quantizer for _, quantizer in rows], number)
    progress = keras.utils.Progbar(
        number_of_batches(model, data, batch_size, steps),
        verbose=1 if verbose == "auto" else verbose,
    )
    shifts = np.random.default_rng(_SEED)
    with state_kept(model):
        for inputs in batches(model, data, batch_size, steps):
            _see(observer, inputs, int(shifts.integers(2**30)), seen)
            progress.add(1)
    ranges: list[tuple[float, float] | None] = []
    for (_, quantizer), one, chosen in zip(rows, seen, methods, strict=True):
        config = quantizer.quantization_config
        bits, grid = config.activation_n_bits, config.quantization_method
        ranges.append(find_range(*one.summary(chosen), chosen, bits, grid) if one.number else None)
    found = {}
    for (name, quantizer), ends in zip(rows, ranges, strict=True):
        if ends is not None:
            quantizer.set_range(*ends)
            found[name] = quantizer.range or ends
    for (_, quantizer), one in zip(rows, seen, strict=True):
        if quantizer.pass_whole_numbers and one.number:
            quantizer.set_whole_numbers(one.whole)
        one.warn()
    return found


def has_ranges_to_find(model: keras.Model) -> bool:
    """Whether there is anything to calibrate in a model."""
    return bool(_to_be_found(model))


def _to_be_found(model: keras.Model) -> list[Found]:
    return [
        (owner, role, quantizer)
        for owner, role, quantizer in quantizers_in(model)
        if isinstance(quantizer, MovingAverageActivationQATQuantizer) and quantizer.enabled
    ]


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

    Outputs, a row for each quantizer: `ends`, its least and greatest value and how many there
    were; `samples`, values at random positions, which differ from batch to batch; `whole`, whether
    all are whole numbers, for a quantizer that asks. With `bounds`,
    each activation is clipped to its row of them first.
    """

    def __init__(self, model: keras.Model, quantizers: list, number: int) -> None:
        super().__init__(name="calibration", dtype="float32", autocast=False)
        self.model = model
        self.order: list[int] = []
        self._rows = {id(quantizer): row for row, quantizer in enumerate(quantizers)}
        self._asking = [quantizer.pass_whole_numbers for quantizer in quantizers]
        self._number = number
        self._random = np.random.default_rng(_SEED).integers(2**30, size=number, dtype=np.int32)
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
        return {
            "ends": ops.stack([_ends(tensors) for tensors in seen.values()]),
            "samples": ops.stack([self._sample(t, inputs["shift"]) for t in seen.values()]),
            "whole": ops.stack([_whole(t if self._asking[row] else []) for row, t in seen.items()]),
        }

    def _sample(self, tensors: list[Tensor], shift: Tensor) -> Tensor:
        """Values from all calls in turn; a small tensor gives each of its values equally often."""
        if not tensors:
            return ops.zeros((self._number,))
        each = -(-self._number // len(tensors))
        index = ops.arange(each, dtype="int32")
        jitter = ops.convert_to_tensor(self._random[:each]) + shift
        drawn = []
        for tensor in tensors:
            size = ops.shape(tensor)[0]
            # One position, at random, in each of `each` parts of nearly the same width.
            width = ops.maximum(size // each, 1)
            spread = index * width + index * (size % each) // each
            spread = spread + ops.mod(jitter, width)
            cyclic = ops.mod(index + shift, size)
            drawn.append(ops.take(tensor, ops.where(size <= each, cyclic, spread)))
        return ops.reshape(ops.stack(drawn, axis=1), (-1,))[: self._number]


def _whole(tensors: list[Tensor]) -> Tensor:
    """Whether all numbers are whole; False where there are none."""
    each = [ops.all(ops.equal(tensor, ops.round(tensor))) for tensor in tensors]
    return ops.all(ops.stack(each)) if each else ops.convert_to_tensor(False)


def _ends(tensors: list[Tensor]) -> Tensor:
    if not tensors:
        return ops.zeros((3,))
    low = ops.min(ops.stack([ops.min(tensor) for tensor in tensors]))
    high = ops.max(ops.stack([ops.max(tensor) for tensor in tensors]))
    number = sum(ops.cast(ops.shape(tensor)[0], "float32") for tensor in tensors)
    return ops.stack([low, high, number])


def _see(observer: _Observer, inputs: Any, shift: int, seen: list["_Seen"]) -> None:
    """One batch; run again with outliers clipped, for the layers that follow, where there are."""
    feed = {"inputs": inputs, "shift": np.array(shift, np.int32)}
    bounds = np.array([[-np.inf, np.inf]] * len(seen), np.float32)
    state = State(observer.model)
    for _ in range(len(seen) + 1):
        state.restore()
        out = observer.predict_on_batch(feed)
        # Where outputs of several replicas are joined, the first one's come first.
        ends, samples = out["ends"][: len(seen)], out["samples"][: len(seen)]
        whole = out["whole"][: len(seen)]
        for one, row in zip(seen, ends, strict=True):
            one.check(row)
        outlying = [
            row
            for row in observer.order
            if np.isinf(bounds[row, 0])
            and not whole[row]
            and _bounds(*_of(samples[row], ends[row])) is not None
        ]
        if not outlying:
            break
        first = outlying[0]
        bounds[first] = _bounds(*_of(samples[first], ends[first]))
        seen[first].note_outliers(*ends[first][:2])
        feed["bounds"] = bounds
    for one, row, drawn, are_whole in zip(seen, ends, samples, whole, strict=True):
        one.whole = one.whole and (bool(are_whole) or row[2] == 0)
        one.add(row, drawn)


def _of(samples: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Samples without repetition, and the ends."""
    return samples[: int(ends[2])], float(ends[0]), float(ends[1])


def _bounds(samples: np.ndarray, low: float, high: float) -> tuple[float, float] | None:
    """Where to clip outliers; None where there are none."""
    if samples.size < _FEWEST_FOR_OUTLIERS:
        return None
    tail = int(_TAIL * samples.size)
    ratio = _OUTLIER_RATIO if tail else _FEW_OUTLIER_RATIO
    tail = max(1, tail)
    inner = np.partition(samples, (tail, samples.size - 1 - tail))
    least, most = float(inner[tail]), float(inner[-1 - tail])
    width = most - least
    if width == 0 or high - low <= ratio * width:
        return None
    return max(least - width / 2, low), min(most + width / 2, high)


class _Seen:
    """What was seen of one activation."""

    def __init__(self, name: str, momentum: float) -> None:
        self.number = 0
        self.whole = True
        self._name = name
        self._momentum = momentum
        self._ends = (np.inf, -np.inf)
        self._average = np.zeros(2)
        self._largest = 0.0
        self._samples = np.empty(_RESERVOIR, np.float32)
        self._random = np.random.default_rng(_SEED)
        self._outliers: tuple[float, float] | None = None

    def check(self, ends: np.ndarray) -> None:
        """Refuse NaN, infinity, and numbers too large for any range."""
        if not np.all(np.abs(ends[:2]) <= _LARGEST):
            raise bad_value(
                f"activation of '{self._name}'",
                f"values from {ends[0]} to {ends[1]}",
                "finite numbers below 2**125",
                "The model itself makes them from this data: look at the layers before.",
            )

    def note_outliers(self, low: float, high: float) -> None:
        """Remember the ends before clipping, for the warning."""
        before = self._outliers or (low, high)
        self._outliers = min(before[0], float(low)), max(before[1], float(high))

    def add(self, ends: np.ndarray, samples: np.ndarray) -> None:
        """A batch, each of its values as likely to stay in the sample as those before."""
        low, high, size = (float(number) for number in ends)
        if size == 0:
            return
        batch = np.array([min(low, 0.0), max(high, 0.0)])
        first = self._largest == 0
        step = 1.0 if first else 1 - self._momentum
        self._average += step * (batch - self._average)
        self._ends = min(low, self._ends[0]), max(high, self._ends[1])
        self._largest = max(size, self._largest)
        share = min(1.0, len(samples) / self._largest)
        samples = samples[: int(min(size, len(samples)))]
        number = int(np.ceil(share * size))
        if number < len(samples):
            samples = self._random.choice(samples, number, replace=False)
        index = np.arange(self.number, self.number + len(samples))
        drawn = self._random.integers(index + 1)
        place = np.where(index < _RESERVOIR, index, drawn)
        kept = place < _RESERVOIR
        self._samples[place[kept]] = samples[kept]
        self.number += len(samples)

    def summary(self, method: str) -> tuple[np.ndarray, float, float]:
        """Samples and ends for the search, without outliers."""
        samples = self._samples[: self.number]
        low, high = self._average if method == "moving_average" else self._ends
        bounds = None if self.whole else _bounds(samples, *self._ends)
        if bounds is not None:
            self.note_outliers(*self._ends)
            low, high = np.clip((low, high), *bounds)
            samples = samples[(samples >= low) & (samples <= high)]
        return samples, float(low), float(high)

    def warn(self) -> None:
        """Say what was unusual."""
        low, high = self._ends
        if self.number == 0:
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
