"""Any kind of data as batches of numpy arrays that fit a model's inputs.

No framework is imported: tensors of all of them are recognized by what they can do.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import count, islice, repeat
from typing import Any

import keras
import numpy as np

from keras_qwrap.models.subclassed import QuantizedModel
from keras_qwrap.numerics.checks import Told, bad_type, bad_value, warn

_KINDS = "an array or several, a dataset, a generator or another iterable of batches"


def batches(
    model: keras.Model, data: Any, batch_size: int = 32, steps: int | None = None
) -> Iterator[Any]:
    """The inputs in `data`, one batch at a time, in the structure that `model` takes.

    Targets and sample weights are dropped. No batch is held while the next one is made. Arrays
    for a model whose inputs have a fixed batch are cut into batches of that size; a last batch
    that is smaller than it is left out, with a warning, in data of any kind.

    Args:
        model: a built model.
        data: one of
            - an array;
            - a dictionary of arrays, by input name, or a tuple or list of as many arrays as the
              model has inputs (of a subclassed model that is no `QuantizedModel` they are not
              known: a list is then an iterable of batches);
            - a tuple `(x, y)` or `(x, y, sample_weight)`, where `x` is one of the above;
            - a `keras.utils.PyDataset`;
            - an iterable of batches, each one of the first three, such as a `tf.data.Dataset`, a
              PyTorch `DataLoader`, a generator or a list.
        batch_size: rows of each batch, for whole arrays and a model without a fixed batch.
        steps: the most batches to take; needed for data without end.

    Raises:
        TypeError, ValueError: the model's call needs several arguments; `data` is of no such
            kind, or without end, or yields no whole batch; a batch has another number of inputs or
            shape than the model (a `QuantizedModel` takes all sizes that it can be called with),
            values that are no numbers where the model takes numbers, NaN or infinity.
    """
    _check_counts(batch_size, steps)
    _check_call(model)
    expected = _expected_inputs(model)
    raw = _raw_batches(data, expected, _fixed_rows(expected) or batch_size)
    if steps is None and _is_endless(data):
        raise bad_value("steps", None, "a number of batches", "The data has no end of its own.")
    return _checked(islice(raw, steps), _Check(model, expected))


def number_of_batches(
    model: keras.Model, data: Any, batch_size: int = 32, steps: int | None = None
) -> int | None:
    """How many batches there will be, at most; None where only running through them can tell."""
    _check_counts(batch_size, steps)
    known: Any = None
    expected = _expected_inputs(model)
    whole = _whole_inputs(data, expected)
    fixed = _fixed_rows(expected)
    if whole is not None:
        known = _rows(whole) // fixed if fixed else -(-_rows(whole) // batch_size)
    elif isinstance(data, keras.utils.PyDataset):
        known = data.num_batches
    elif hasattr(data, "cardinality"):
        known = int(data.cardinality())
    elif hasattr(data, "__len__"):
        known = len(data)
    if known is None or not 0 <= known < float("inf"):
        return steps
    return int(known) if steps is None else min(int(known), steps)


def _check_counts(batch_size: Any, steps: Any) -> None:
    _check_count("batch_size", batch_size)
    if steps is not None:
        _check_count("steps", steps)


def _check_count(name: str, value: Any) -> None:
    fix = "Pass for example 32."
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise bad_type(name, value, "a positive whole number", fix)
    if value < 1:
        raise bad_value(name, value, "a positive whole number", fix)


def _check_call(model: keras.Model) -> None:
    parameters = inspect.signature(model.call).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p.name for p in parameters if p.kind in positional and p.default is p.empty]
    if len(needed) > 1:
        raise bad_value(
            "model",
            Told(f"'{model.name}', whose call needs {needed}"),
            "a model whose call needs one argument",
            "Let that be a list or a dictionary, and give others, such as `training`, a default; "
            "or train the model, which finds ranges as well.",
        )


def _expected_inputs(model: keras.Model) -> Any:
    """The symbolic inputs in the model's structure; None where a subclassed model has none."""
    if isinstance(model, keras.Sequential):
        return model.inputs[0]
    if isinstance(model, QuantizedModel):
        return _as_fixed_as_needed(model, model.example_inputs())
    return model.input if hasattr(model, "operations") else None


def _fixed_rows(expected: Any) -> int | None:
    """The rows of every batch of a model that takes no other number; None for other models."""
    tensors = [] if expected is None else keras.tree.flatten(expected)
    return next((tensor.shape[0] for tensor in tensors if tensor.shape[0] is not None), None)


def _as_fixed_as_needed(model: QuantizedModel, example: Any) -> Any:
    """An example of inputs; its batch is open unless the model takes only that of the example."""

    def resized(rows: int | None) -> Any:
        return keras.tree.map_structure(
            lambda t: keras.KerasTensor((rows, *t.shape[1:]), t.dtype, name=t.name), example
        )

    rows = _fixed_rows(example)
    if rows is None or _failure(model, resized(rows + 1)) is None:
        return resized(None)
    return resized(rows if _failure(model, resized(rows)) is None else None)


def _failure(model: keras.Model, inputs: Any) -> Exception | None:
    """What goes wrong where a model is called with these symbolic inputs; None for nothing."""
    try:
        model.compute_output_spec(inputs)
    except Exception as error:
        return error
    return None


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and hasattr(value, "shape")


def _without_targets(batch: Any, expected: Any) -> Any:
    """`x` of `x`, `(x, y)` or `(x, y, sample_weight)`.

    As many arrays as the model has inputs, several of them, are its inputs.
    """
    if not isinstance(batch, (list, tuple)):
        return batch
    number = len(keras.tree.flatten(expected))
    if number > 1 and len(batch) == number and all(_is_array(part) for part in batch):
        return list(batch)
    if not 1 <= len(batch) <= 3:
        raise bad_value(
            "data",
            Told(f"{len(batch)} parts"),
            "x, (x, y) or (x, y, sample_weight), where x holds all inputs",
            "Put several inputs into one list or dictionary.",
        )
    return keras.utils.unpack_x_y_sample_weight(tuple(batch))[0]


def _whole_inputs(data: Any, expected: Any) -> Any:
    """The inputs where `data` holds whole arrays; None where it is an iterable of batches."""
    if _holds_plain_numbers(data):
        what = Told("Python numbers in lists")
        raise bad_type("data", what, _KINDS, "Make NumPy arrays of them: numpy.array(x).")
    if _is_array(data) or isinstance(data, Mapping):
        return data
    if isinstance(data, tuple):
        return _without_targets(data, expected)
    number = 0 if expected is None else len(keras.tree.flatten(expected))
    as_many = isinstance(data, list) and len(data) == number
    return list(data) if as_many and all(_is_array(part) for part in data) else None


def _raw_batches(data: Any, expected: Any, batch_size: int) -> Iterator[Any]:
    whole = _whole_inputs(data, expected)
    if whole is not None:
        return _slices(whole, batch_size)
    if isinstance(data, keras.utils.PyDataset):
        indices = count() if _is_endless(data) else range(data.num_batches)
        items = map(data.__getitem__, indices)
        return map(partial(_without_targets, expected=expected), items)
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        fix = "Call the generator function first." if callable(data) else "Pass the model's inputs."
        raise bad_type("data", data, _KINDS, fix)
    return map(partial(_without_targets, expected=expected), data)


def _holds_plain_numbers(data: Any) -> bool:
    """Whether this is what `tolist` of an array gives, or a list of such."""
    while isinstance(data, (list, tuple)) and data:
        data = data[0]
    return isinstance(data, (bool, int, float))


def _is_endless(data: Any) -> bool:
    if isinstance(data, keras.utils.PyDataset):
        return data.num_batches in (None, float("inf"))
    return hasattr(data, "cardinality") and int(data.cardinality()) == -1


def _rows(whole: Any) -> int:
    """The length of the first axis of all whole arrays."""
    arrays = keras.tree.flatten(whole)
    for array in arrays:
        _refuse_symbolic("data", array)
    shapes = [tuple(getattr(array, "shape", ())) for array in arrays]
    lengths = {shape[0] if shape else None for shape in shapes}
    if len(lengths) != 1 or None in lengths:
        raise bad_value(
            "data",
            Told(f"inputs of shapes {shapes}"),
            "arrays with the same number of rows",
            "Stack the examples along the first axis.",
        )
    return shapes[0][0]


def _refuse_symbolic(where: str, value: Any) -> None:
    if isinstance(value, keras.KerasTensor):
        raise bad_type(where, value, "values", "Pass arrays; a symbolic tensor holds none.")


def _slices(whole: Any, batch_size: int) -> Iterator[Any]:
    """Whole arrays cut along their first axis."""
    starts = range(0, _rows(whole), batch_size)
    return (
        keras.tree.map_structure(lambda array, i=start: array[i : i + batch_size], whole)
        for start in starts
    )


def _checked(raw: Iterator[Any], check: "_Check") -> Iterator[Any]:
    """Batches as numpy arrays; none of them is held while the next one is made."""
    yield from filter(_is_given, map(check, raw))
    if check.short is not None and check.index == 0:
        raise check.short
    if check.short is not None:
        warn(f"A last batch that is too small is left out. {check.short}")
    if check.index == 0:
        raise bad_value(
            "data", Told("no batch"), "at least one", "A generator gives its batches only once."
        )


def _is_given(inputs: Any) -> bool:
    return inputs is not None


class _Check:
    """Turns each batch into numpy arrays in the model's structure, or refuses it.

    For a batch that is smaller than a fixed one there is None and `short`, the error that it is
    unless it is the last one.
    """

    def __init__(self, model: keras.Model, expected: Any) -> None:
        self.expected = expected
        self.index = 0
        self.short: ValueError | None = None
        self._failure: Exception | None = None
        self._model = model
        self._taken: set[tuple] = set()
        self._ranks: list[int] | None = None

    def __call__(self, inputs: Any) -> Any:
        where = f"batch {self.index}"
        if self.short is not None:
            raise self.short
        if self.expected is not None:
            inputs = _matched(inputs, self.expected, where)
        tensors = keras.tree.flatten(self.expected)
        dtypes = repeat("") if self.expected is None else (tensor.dtype for tensor in tensors)
        arrays = keras.tree.map_structure(
            lambda value: _array(value, where, next(dtypes, "")), inputs
        )
        flat = keras.tree.flatten(arrays)
        if len({len(array) for array in flat}) != 1:
            shapes = [array.shape for array in flat]
            raise bad_value(where, shapes, "inputs with as many rows as each other", "Match them.")
        if self.expected is not None:
            wrong = [
                (array.shape, tensor)
                for array, tensor in zip(flat, keras.tree.flatten(self.expected), strict=True)
                if not _fits(array, tensor)
            ]
            if wrong and not self._is_taken(arrays):
                shape, tensor = wrong[0]
                short = all(_is_short(*each) for each in wrong)
                fix = "Batch the data, and give it the shape that the model was built for."
                error = bad_value(
                    where,
                    Told(f"shape {shape} for input '{tensor.name}'"),
                    f"shape {tuple(tensor.shape)}",
                    "The model takes whole batches alone: give as many rows." if short else fix,
                )
                if not short:
                    raise error from self._failure
                self.short = error
                return None
        ranks = [array.ndim for array in flat]
        if self._ranks not in (None, ranks):
            raise bad_value(
                where,
                Told(f"inputs of ranks {ranks}"),
                f"{self._ranks} as before",
                "Match the batches.",
            )
        self._ranks = ranks
        self.index += 1
        return arrays

    def _is_taken(self, arrays: Any) -> bool:
        """Whether a model without graph takes other sizes than those it was built with."""
        flat, tensors = keras.tree.flatten(arrays), keras.tree.flatten(self.expected)
        same_ranks = [array.ndim for array in flat] == [len(tensor.shape) for tensor in tensors]
        if not same_ranks or not isinstance(self._model, QuantizedModel):
            return False
        shapes = tuple(array.shape for array in flat)
        if shapes not in self._taken:
            specs = keras.tree.map_structure(
                lambda array, tensor: keras.KerasTensor(array.shape, tensor.dtype),
                arrays,
                self.expected,
            )
            self._failure = _failure(self._model, specs)
            if self._failure is not None:
                return False
            self._taken.add(shapes)
        return True


def _matched(inputs: Any, expected: Any, where: str) -> Any:
    """The inputs in the structure of the expected ones; other keys of a dictionary are left out."""
    fix = "Pass the inputs in the model's structure."
    if isinstance(inputs, Mapping):
        tensors = keras.tree.flatten(expected)
        keys = list(expected) if isinstance(expected, Mapping) else [t.name for t in tensors]
        if not set(keys) <= set(inputs):
            raise bad_value(where, Told(f"inputs {list(inputs)}"), f"inputs {keys}", fix)
        if isinstance(expected, Mapping):
            return {key: _matched(inputs[key], expected[key], where) for key in keys}
        return keras.tree.map_structure(lambda tensor: inputs[tensor.name], expected)
    flat = [inputs] if _is_array(inputs) else keras.tree.flatten(inputs)
    number = len(keras.tree.flatten(expected))
    if len(flat) != number:
        raise bad_value(where, Told(f"{len(flat)} input(s)"), f"{number} input(s)", fix)
    if isinstance(expected, Mapping) and number > 1:
        raise bad_value(
            where, Told("inputs without names"), f"a dictionary of {list(expected)}", fix
        )
    return keras.tree.pack_sequence_as(expected, flat)


def _array(value: Any, where: str, dtype: str) -> np.ndarray:
    """A tensor of any framework as an array of finite numbers, floats in Keras' own float type.

    Where the model's input has dtype "string", an array of strings.
    """
    _refuse_symbolic(where, value)
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if "bfloat16" in str(value.dtype) else value
    array = np.asarray(value)
    is_float = "float" in array.dtype.name
    expected, fix = "numbers", "Convert the values to float32 or integers."
    fits = is_float or array.dtype.kind in "biu"
    if dtype == "string":
        expected, fix = "strings", "The model's input is of dtype string."
        fits = array.dtype.kind in "OSUT"
    if not fits:
        raise bad_type(where, Told(f"values of dtype {array.dtype.name}"), expected, fix)
    if array.ndim == 0 or array.size == 0:
        raise bad_value(
            where, Told(f"an array of shape {array.shape}"), "a batch of examples", "Drop it."
        )
    if is_float:
        with np.errstate(over="ignore"):
            array = array.astype(keras.config.floatx(), copy=False)
        finite = np.isfinite(array)
        if not finite.all():
            number = array.size - np.count_nonzero(finite)
            raise bad_value(
                where,
                Told(f"{number} of {array.size} values that are NaN or infinite"),
                "finite numbers",
                "Remove or replace them (`numpy.nan_to_num`).",
            )
    return array


def _is_short(shape: tuple, tensor: keras.KerasTensor) -> bool:
    """Whether all that is wrong with a shape are rows that are missing."""
    rows, *sizes = tensor.shape
    if rows is None or len(shape) != len(tensor.shape) or shape[0] >= rows:
        return False
    return all(wanted in (None, given) for wanted, given in zip(sizes, shape[1:], strict=True))


def _fits(array: np.ndarray, tensor: keras.KerasTensor) -> bool:
    shape = tuple(tensor.shape)
    return len(shape) == array.ndim and all(
        wanted in (None, given) for wanted, given in zip(shape, array.shape, strict=True)
    )
