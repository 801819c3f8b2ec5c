"""Calibration data of a subclassed model: checked against the arguments that it was built with."""

import keras
import numpy as np
import pytest
from keras import ops
from reference import refused

import keras_qwrap as qi
from keras_qwrap.calibration.batches import batches
from keras_qwrap.models.subclassed import QuantizedModel
from keras_qwrap.quantizers.moving_average import MovingAverageActivationQATQuantizer

X = np.arange(40, dtype="float32").reshape(8, 5)
Z = -np.arange(16, dtype="float32").reshape(8, 2)


class Pair(keras.Model):
    """Takes a list or a dictionary, and widths that fit its kernel only."""

    def __init__(self, keys=(0, 1), **kwargs):
        super().__init__(**kwargs)
        self.keys = keys
        self.dense = keras.layers.Dense(2, kernel_initializer="ones")
        self.both = keras.layers.Add()

    def call(self, inputs):
        first, second = (inputs[key] for key in self.keys)
        return self.both([self.dense(first), second])

    def get_config(self):
        return super().get_config() | {"keys": list(self.keys)}


class Mean(keras.Model):
    """Takes sequences of any length."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(1, kernel_initializer="ones")

    def call(self, x):
        return self.dense(ops.mean(x, axis=1))


def quantized(model, x, layer):
    model(x)
    config = qi.TrainableQuantizerActivationConfig(qi.QuantizationMethod.UNIFORM, 8)
    return QuantizedModel(model, {}, {layer: MovingAverageActivationQATQuantizer(config)})


class Tower(keras.Model):
    """Cannot be called with one argument."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.a = keras.layers.Dense(3)

    def call(self, x, y, scale=1.0):
        return self.a(x) * y * scale


def test_models_that_data_cannot_be_passed_to():
    example = tuple(keras.KerasTensor((None, width)) for width in (5, 3))
    data = (X, X[:, :3])
    tower = Tower()
    tower(*data)
    model = qi.quantize_model(tower, "w8a8", example=(example, {}))
    refused(ValueError, lambda: qi.calibrate(model, data, verbose=0), "needs ['x', 'y']", "list")


def pair(keys=(0, 1)):
    x = {"a": X, "b": Z} if keys == ("a", "b") else [X, Z]
    return quantized(Pair(keys), x, "both")


def calibrated(model, data, **kwargs):
    (found,) = qi.calibrate(model, data, "minmax", verbose=0, **kwargs).values()
    return found


SUMS = X.sum(1, keepdims=True) + Z
ENDS = (0.0, float(SUMS.max()))


@pytest.mark.parametrize(
    "data", [[X, Z], (X, Z), ([X, Z], X), [[X[:4], Z[:4]], [X[4:], Z[4:]]], iter([([X, Z], X)])]
)
def test_a_list_of_all_inputs_is_what_it_is_for_functional_models(data):
    assert calibrated(pair(), data, batch_size=3) == ENDS


def test_names_of_inputs_are_those_of_a_dictionary():
    model = pair(("a", "b"))
    assert calibrated(model, {"b": Z, "a": X, "label": Z}) == ENDS
    refused(ValueError, lambda: calibrated(model, {"a": X}), "['a']", "['a', 'b']")
    refused(ValueError, lambda: calibrated(model, [X, Z]), "dictionary")


def test_a_reloaded_model_knows_its_inputs(tmp_path):
    model = pair()
    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras", {"Pair": Pair})
    assert calibrated(reloaded, [X, Z]) == ENDS
    refused(ValueError, lambda: calibrated(reloaded, [X, X[:, :3]]), "inputs_1", "(None, 2)")


BAD = {
    "width": (ValueError, lambda: [X[:, :4], Z], ["batch 0", "(8, 4)", "'inputs_0'", "(None, 5)"]),
    "rank": (ValueError, lambda: [X[:, None], Z], ["batch 0", "(8, 1, 5)", "(None, 5)"]),
    "number": (ValueError, lambda: ([X], Z), ["batch 0", "1 input(s)", "2 input(s)"]),
    "strings": (TypeError, lambda: [X.astype(str), Z], ["batch 0", "numbers"]),
    "NaN": (ValueError, lambda: [X * np.nan, Z], ["batch 0", "40 of 40"]),
    "later": (ValueError, lambda: iter([[X, Z], [X, X]]), ["batch 1", "(8, 5)", "(None, 2)"]),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_data_is_refused(kind):
    error, make, fragments = BAD[kind]
    refused(error, lambda: calibrated(pair(), make()), *fragments)


def test_sizes_that_the_model_takes_are_taken():
    """A model without graph does not tell which sizes are fixed; calling it does, once for each.

    First of all with another number of rows: whether the batch is fixed.
    """
    model = quantized(Mean(), np.ones((2, 4, 3), "float32"), "dense")
    assert calibrated(model, [np.full((2, length, 3), length, "float32") for length in (4, 6)]) == (
        0.0,
        18.0,
    )
    calls = []
    spec = model.compute_output_spec
    model.compute_output_spec = lambda x: calls.append(x.shape) or spec(x)
    x = np.ones((4, 6, 3), "float32")
    assert len(list(batches(model, x, 2))) == 2
    assert calls == [(3, 4, 3), (2, 6, 3)]
    refused(ValueError, lambda: list(batches(model, x[..., :2])), "(4, 6, 2)", "(None, 4, 3)")


class Picky(Mean):
    def call(self, inputs):
        if inputs.shape[1] == 3:
            raise ZeroDivisionError("a bug of the model's own")
        return super().call(inputs)


def test_why_a_model_does_not_take_a_size_is_told():
    """The error of a user's own call is behind the refusal of the data."""
    model = Picky()
    model(np.zeros((1, 4, 2), "float32"))
    quantized = QuantizedModel(model)
    assert [batch.shape for batch in batches(quantized, [np.zeros((2, 5, 2))])] == [(2, 5, 2)]
    with pytest.raises(ValueError, match=r"shape \(2, 3, 2\) for input") as caught:
        list(batches(quantized, [np.zeros((2, 3, 2))]))
    assert "a bug of the model's own" in str(caught.value.__cause__)
