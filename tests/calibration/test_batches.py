"""Any kind of data as checked batches of numpy arrays, and calibrations that run on them."""

import weakref

import keras
import numpy as np
import pytest
from keras import layers
from reference import refused

import keras_qwrap as qi
from keras_qwrap.calibration.batches import batches, number_of_batches
from keras_qwrap.quantizers.moving_average import MovingAverageActivationQATQuantizer

X = np.arange(30, dtype="float32").reshape(10, 3)
Y = np.full((10, 1), 7, "float32")
Z = -np.arange(20, dtype="float32").reshape(10, 2)


def one_input():
    return keras.Sequential([keras.Input((3,)), layers.Dense(2)])


def two_inputs(names=None):
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    inputs = [a, b] if names is None else dict(zip(names, (a, b), strict=True))
    return keras.Model(inputs, layers.Concatenate()([a, b]))


def holder():
    config = qi.TrainableQuantizerActivationConfig(qi.QuantizationMethod.UNIFORM, 8)
    quantizer = MovingAverageActivationQATQuantizer(config)
    return qi.KerasActivationQuantizationHolder(quantizer, name="only")


class Subclassed(keras.Model):
    def call(self, inputs):
        return keras.ops.concatenate(inputs) if isinstance(inputs, list) else inputs


class Items(keras.utils.PyDataset):
    """Batches of four rows; the last one is smaller."""

    def __init__(self, length=3, **kwargs):
        super().__init__(**kwargs)
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return X[4 * index : 4 * index + 4], Y[4 * index : 4 * index + 4]


class EndlessItems(Items):
    @property
    def num_batches(self):
        return None

    def __getitem__(self, index):
        return X[index : index + 4]


class Tensor:
    """What a PyTorch tensor on another device can do."""

    shape = X.shape

    def __array__(self, dtype=None, copy=None):
        raise TypeError("can't convert a device tensor")

    def __getitem__(self, rows):
        return Copied(X[rows])


class Copied:
    def __init__(self, array, steps=("detach", "cpu")):
        self.array, self.steps, self.dtype = array, steps, "float32"
        if steps:
            setattr(self, steps[0], lambda: Copied(array, steps[1:]))
        else:
            self.__class__ = Readable


class Readable(Copied):
    def __array__(self, dtype=None, copy=None):
        return self.array


def parts(array, size):
    return [array[i : i + size] for i in range(0, len(array), size)]


def check(found, expected, structure=None):
    """Equal batches of equal number, in numpy arrays of Keras' float type."""
    found = list(found)
    assert len(found) == len(expected)
    for got, wanted in zip(found, expected, strict=True):
        if structure is not None:
            assert isinstance(got, structure)
        got, wanted = keras.tree.flatten(got), keras.tree.flatten(wanted)
        assert len(got) == len(wanted)
        for a, b in zip(got, wanted, strict=True):
            assert type(a) is np.ndarray
            np.testing.assert_array_equal(a, b, strict=True)


SINGLE = {
    "array": lambda: X,
    "float64": lambda: X.astype("float64"),
    "Keras tensor": lambda: keras.ops.convert_to_tensor(X),
    "tensor elsewhere": Tensor,
    "with targets": lambda: (X, Y),
    "with sample weights": lambda: (X, Y, Y[:, 0]),
    "tuple of one": lambda: (X,),
    "list of one": lambda: [X],
    "dictionary": lambda: {"inputs": X, "label": Y},
    "generator": lambda: (x for x in parts(X, 4)),
    "generator with targets": lambda: zip(parts(X, 4), parts(Y, 4), strict=True),
    "list of batches": lambda: parts(X, 4),
    "lists of x and y": lambda: [[x, y] for x, y in zip(parts(X, 4), parts(Y, 4), strict=True)],
    "Keras dataset": Items,
}


@pytest.mark.parametrize("kind", SINGLE)
def test_one_input(kind):
    model = keras.Sequential([keras.Input((3,), name="inputs"), layers.Dense(2)])
    check(batches(model, SINGLE[kind](), 4), parts(X, 4), np.ndarray)


TWO = {
    "list": lambda: [X, Z],
    "tuple": lambda: (X, Z),
    "dictionary": lambda: {"b": Z, "a": X},
    "tuple and targets": lambda: ((X, Z), Y),
    "dictionary and targets": lambda: ({"b": Z, "a": X}, Y),
    "generator of pairs": lambda: zip(parts(X, 4), parts(Z, 4), strict=True),
    "generator with targets": lambda: (
        ([x, z], y) for x, z, y in zip(parts(X, 4), parts(Z, 4), parts(Y, 4), strict=True)
    ),
    "list of dictionaries": lambda: [
        {"b": z, "a": x} for x, z in zip(parts(X, 4), parts(Z, 4), strict=True)
    ],
}


@pytest.mark.parametrize("kind", TWO)
def test_two_inputs(kind):
    """As many arrays as inputs are inputs, not x and y."""
    expected = list(zip(parts(X, 4), parts(Z, 4), strict=True))
    check(batches(two_inputs(), TWO[kind](), 4), expected, list)


def test_model_with_named_inputs_takes_a_dictionary():
    model = two_inputs(["a", "b"])
    found = list(batches(model, {"a": X, "b": Z}, 10))
    assert set(found[0]) == {"a", "b"}
    np.testing.assert_array_equal(found[0]["b"], Z)
    refused(ValueError, lambda: list(batches(model, [X, Z])), "dictionary", "a", "b")


def test_subclassed_model_takes_what_is_given():
    model = Subclassed()
    check(batches(model, X, 4), parts(X, 4))
    check(batches(model, (X, Y), 4), parts(X, 4))
    check(batches(model, ([X, Z], Y), 10), [[X, Z]], list)
    check(batches(model, iter([([X, Z], Y)])), [[X, Z]], list)
    bad = iter([X, X[:, 0]])
    refused(ValueError, lambda: list(batches(model, bad)), "batch 1", "ranks", "[2]", "[1]")


def test_integers_and_bools_stay():
    model = keras.Sequential([keras.Input((3,), dtype="int32"), layers.Embedding(9, 2)])
    for dtype in ("uint8", "int64", "bool"):
        assert next(batches(model, X.astype(dtype))).dtype == dtype


@pytest.mark.tensorflow
def test_tensorflow_dataset():
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
    check(batches(one_input(), dataset), parts(X, 4))
    assert number_of_batches(one_input(), dataset) == 3
    named = tf.data.Dataset.from_tensor_slices(({"b": Z, "a": X}, Y)).batch(10)
    check(batches(two_inputs(), named), [[X, Z]])
    endless = dataset.repeat()
    check(batches(one_input(), endless, steps=4), [*parts(X, 4), X[:4]])
    refused(ValueError, lambda: batches(one_input(), endless), "steps", "no end")
    unbatched = tf.data.Dataset.from_tensor_slices(X)
    message = "shape (3,) for input"
    refused(ValueError, lambda: list(batches(one_input(), unbatched)), "batch 0", message)
    strings = tf.data.Dataset.from_tensors([["a", "b", "c"]])
    refused(TypeError, lambda: list(batches(one_input(), strings)), "object", "numbers")


def test_torch_loader():
    torch = pytest.importorskip("torch")
    x, y, z = (torch.tensor(array, requires_grad=True) for array in (X, Y, Z))
    data = torch.utils.data.TensorDataset(x.detach(), y.detach())
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    check(batches(one_input(), loader), parts(X, 4))
    assert number_of_batches(one_input(), loader) == 3
    check(batches(two_inputs(), (x, z), 4), list(zip(parts(X, 4), parts(Z, 4), strict=True)))
    check(batches(one_input(), x.bfloat16(), 10), [X])


def test_number_of_batches():
    model = one_input()
    assert number_of_batches(model, X, 4) == 3
    assert number_of_batches(model, X, 4, steps=2) == 2
    assert number_of_batches(model, (X, Y), 5) == 2
    assert number_of_batches(model, parts(X, 2)) == 5
    assert number_of_batches(model, iter(parts(X, 2))) is None
    assert number_of_batches(model, iter(parts(X, 2)), steps=3) == 3
    assert number_of_batches(model, Items()) == 3
    assert number_of_batches(model, EndlessItems()) is None


def test_steps_end_an_endless_stream_and_take_no_more():
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield X

    check(batches(one_input(), endless(), steps=3), [X] * 3)
    assert taken == [0, 1, 2]
    check(batches(one_input(), EndlessItems(), steps=2), [X[:4], X[1:5]])
    refused(ValueError, lambda: batches(one_input(), EndlessItems()), "steps", "no end")


@pytest.mark.parametrize("kind", ["subclassed", "graph"])
def test_no_batch_is_held_while_the_next_is_made(kind):
    model = Subclassed() if kind == "subclassed" else one_input()
    alive = []

    def generator():
        for _ in range(4):
            assert [ref for ref in alive if ref() is not None] == []
            batch = np.array(X)
            alive.append(weakref.ref(batch))
            yield (batch, None)
            del batch

    stream = batches(model, generator())
    for _ in range(4):
        assert next(stream).shape == (10, 3)
    assert next(stream, None) is None


BAD = {
    "string": (TypeError, lambda: "data.npy", ["array"]),
    "none": (TypeError, lambda: None, ["array"]),
    "number": (TypeError, lambda: 3, ["array"]),
    "function": (TypeError, lambda: lambda: iter([X]), ["call the generator function"]),
    "empty iterator": (ValueError, lambda: iter([]), ["no batch", "only once"]),
    "empty list": (ValueError, lambda: [], ["no batch"]),
    "empty array": (ValueError, lambda: X[:0], ["no batch"]),
    "empty batch": (ValueError, lambda: iter([X, X[:0]]), ["batch 1", "(0, 3)"]),
    "rank": (ValueError, lambda: X[..., None], ["batch 0", "(4, 3, 1)", "(None, 3)"]),
    "shape": (ValueError, lambda: iter([X, Z]), ["batch 1", "(10, 2)", "(None, 3)"]),
    "unbatched": (ValueError, lambda: iter(X), ["batch 0", "(3,)"]),
    "number of inputs": (ValueError, lambda: ([X, Z], Y), ["2 input(s)", "1 input(s)"]),
    "too many parts": (ValueError, lambda: (X, Y, Y, Y), ["4 parts"]),
    "rows": (ValueError, lambda: ([X, Z[:5]], Y), ["(10, 3)", "(5, 2)", "rows"]),
    "names": (ValueError, lambda: {"other": X}, ["other", "inputs"]),
    "objects": (TypeError, lambda: np.array([[X, "a", None]], object), ["object", "numbers"]),
    "strings": (TypeError, lambda: np.array([["a", "b", "c"]]), ["str", "numbers"]),
    "complex": (TypeError, lambda: X * 1j, ["complex", "numbers"]),
    "symbolic": (TypeError, lambda: keras.Input((3,)), ["data", "KerasTensor", "arrays"]),
    "symbolic batch": (TypeError, lambda: iter([X, keras.Input((3,))]), ["batch 1", "arrays"]),
    "scalar": (ValueError, lambda: iter([3.0]), ["batch 0", "()"]),
    "too large": (ValueError, lambda: X.astype("float64") * 1e300, ["batch 0", "infinite"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_data_is_refused(kind):
    error, make, fragments = BAD[kind]
    model = keras.Sequential([keras.Input((3,), name="inputs"), layers.Dense(2)])
    refused(error, lambda: list(batches(model, make(), 4)), *fragments)


def test_whole_data_without_rows_has_no_number_of_batches():
    symbolic = keras.Input((3,))
    for data in (symbolic, (symbolic, Y), {"inputs": symbolic}, [symbolic]):
        refused(TypeError, lambda data=data: number_of_batches(one_input(), data), "KerasTensor")
    refused(
        ValueError, lambda: number_of_batches(one_input(), np.float32(5)), "shapes [()]", "rows"
    )


def test_nan_and_infinity_are_counted_and_located():
    x = X.copy()
    x[5, 0], x[6, :2] = np.nan, (np.inf, -np.inf)
    message = refused(ValueError, lambda: list(batches(one_input(), x, 4)), "NaN")
    assert message.startswith("batch 1: received 3 of 12 values")


def test_rows_of_one_batch_differ():
    stream = iter([(X, Z), (X, Z[:5])])
    refused(ValueError, lambda: list(batches(two_inputs(), stream)), "batch 1", "rows")


@pytest.mark.parametrize("name", ["batch_size", "steps"])
def test_bad_counts(name):
    for value in (0, -1):
        for f in (batches, number_of_batches):
            refused(ValueError, lambda: f(one_input(), X, **{name: value}), name, "positive")  # noqa: B023
    for value in (2.5, "4", True):
        for f in (batches, number_of_batches):
            refused(TypeError, lambda: f(one_input(), X, **{name: value}), name, "positive")  # noqa: B023
    model = keras.Sequential([keras.Input((3,)), holder()])
    refused(ValueError, lambda: qi.calibrate(model, X, "minmax", **{name: 0}), name, "positive")


def test_calibration_of_endless_data_and_progress(capsys):
    model = keras.Sequential([keras.Input((3,)), holder()])

    def endless():
        while True:
            yield X, None

    qi.calibrate(model, endless(), steps=3)
    assert "3/3" in capsys.readouterr().out
    qi.calibrate(model, X, verbose=0)
    assert capsys.readouterr().out == ""


def test_a_method_for_what_has_no_range_to_be_found_is_refused():
    fixed = qi.ActivationSymmetricInferableQuantizer(8, threshold=1.0, signed=True)
    other = qi.KerasActivationQuantizationHolder(fixed, name="fixed")
    model = keras.Sequential([keras.Input((3,)), other, holder()])
    run = lambda: qi.calibrate(model, X, {"fixed": "mse"}, verbose=0)  # noqa: E731
    refused(ValueError, run, "['fixed']", "['only']")


@pytest.mark.tensorflow
def test_calibration_is_traced_once_for_each_shape():
    calls = []

    class Counting(layers.Layer):
        def call(self, inputs):
            calls.append(inputs.shape)
            return inputs

    model = keras.Sequential([keras.Input((3,)), holder(), Counting()])
    calls.clear()
    x = np.tile(X, (7, 1))
    qi.calibrate(model, x, batch_size=8, verbose=0)
    assert 1 <= len(calls) <= 3
    calls.clear()
    model.compile(run_eagerly=True)
    qi.calibrate(model, x, batch_size=8, verbose=0)
    assert len(calls) == 9


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float16"])
def test_calibration_of_other_dtypes(policy):
    model = keras.Sequential([keras.Input((3,), dtype=policy.split("_")[-1]), holder()])
    found = qi.calibrate(model, X - 7, "minmax", verbose=0)["only"]
    np.testing.assert_allclose(found, (-7, 22), rtol=1e-2)


@pytest.mark.tensorflow
def test_strings_where_the_model_takes_them():
    """Numbers stay checked in the other input."""
    words, numbers = keras.Input((1,), dtype="string", name="w"), keras.Input((3,), name="n")
    codes = layers.StringLookup(vocabulary=["a", "b"])(words)
    embedded = layers.Flatten()(layers.Embedding(3, 3, name="embedding")(codes))
    model = keras.Model([words, numbers], holder()(layers.Add()([embedded, numbers])))
    model.get_layer("embedding").set_weights([np.float32([[0] * 3, [100] * 3, [-9] * 3])])
    text = np.array([["a"], ["b"]] * 5)
    for given in (text, text.astype(object), text.astype("S")):
        found = qi.calibrate(model, [given, X], "minmax", verbose=0)
        assert found == {"only": (-6, 126)}
        check(batches(model, {"n": X, "w": given}), [[given, X]])
    refused(TypeError, lambda: list(batches(model, [text, X.astype(str)])), "str", "numbers")
    refused(TypeError, lambda: list(batches(model, [X[:, :1], X])), "float32", "strings")


def fixed(rows=4):
    return keras.Sequential([keras.Input(batch_shape=(rows, 3), name="x"), layers.Dense(2)])


def fixed_in_one_input():
    a, b = keras.Input((3,), name="a"), keras.Input(batch_shape=(4, 2), name="b")
    return keras.Model([a, b], layers.Concatenate()([a, b]))


@keras.saving.register_keras_serializable("test_streams")
class InFours(keras.Model):
    """Takes four rows only, or any number."""

    def __init__(self, fours=True, **kwargs):
        super().__init__(**kwargs)
        self.fours, self.dense = fours, layers.Dense(2, name="dense")

    def call(self, inputs):
        shape = (4, 2) if self.fours else (-1, 2)
        return keras.ops.reshape(self.dense(inputs), shape)

    def get_config(self):
        return super().get_config() | {"fours": self.fours}


def subclassed(fours):
    model = InFours(fours)
    model(X[:4])
    return qi.quantize_model(model, "w8a8")


LEFT_OUT = "last batch that is too small is left out"


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_a_fixed_batch_is_the_models_own(batch_size):
    """Whatever is asked for; what is left at the end is left out."""
    for model, data, batch in (
        (fixed(), X, X[:4]),
        (fixed_in_one_input(), [X, Z], [X[:4], Z[:4]]),
        (subclassed(True), X, X[:4]),
    ):
        with pytest.warns(UserWarning, match=LEFT_OUT):
            found = list(batches(model, data, batch_size))
        assert len(found) == 2 == number_of_batches(model, data, batch_size)
        check(found[:1], [batch])
    check(batches(fixed(5), X, batch_size), [X[:5], X[5:]])
    check(batches(fixed(1), X, batch_size), parts(X, 1))
    check(batches(subclassed(False), X, 5), [X[:5], X[5:]])


def test_a_small_last_batch_of_any_data_is_left_out():
    for data in (Items(), iter(parts(X, 4)), parts(X, 4), zip(parts(X, 4), parts(Y, 4), strict=1)):
        with pytest.warns(UserWarning, match=r"\(2, 3\).* expected shape \(4, 3\)"):
            check(batches(fixed(), data), [X[:4], X[4:8]])
    check(batches(fixed(), parts(X, 4), steps=2), [X[:4], X[4:8]])


BAD_FOR_FIXED = {
    "only": (lambda: X[:3], "batch 0"),
    "only one": (lambda: iter([X[:3]]), "batch 0"),
    "in the middle": (lambda: [X[:4], X[:3], X[:4]], "batch 1"),
    "two": (lambda: [X[:4], X[:3], X[:3]], "batch 1"),
    "larger": (lambda: [X[:4], X[:5]], "batch 1"),
    "other": (lambda: [X[:4], Z[:2]], "batch 1"),
}


@pytest.mark.parametrize("kind", BAD_FOR_FIXED)
def test_what_a_fixed_batch_cannot_take_is_refused(kind):
    make, where = BAD_FOR_FIXED[kind]
    refused(ValueError, lambda: list(batches(fixed(), make(), 4)), where, "(4, 3)")


@pytest.mark.parametrize("corrected", [False, True])
def test_models_with_a_fixed_batch_are_quantized_and_calibrated(corrected):
    recipe = qi.Recipe.from_preset("w8a8", bias_correction=corrected)
    with pytest.warns(UserWarning, match=LEFT_OUT) as record:
        quantized = qi.quantize_model(fixed(), recipe, X, verbose=0)
    left_out = [each.filename for each in record if LEFT_OUT in str(each.message)]
    assert left_out == [__file__] * (2 if corrected else 1)
    found = qi.calibrate(quantized, X[:8], "minmax", verbose=0)
    assert found["x_quantizer"] == (0, 23)
    with pytest.warns(UserWarning, match=LEFT_OUT):
        assert qi.calibrate(quantized, X, "minmax", verbose=0) == found
