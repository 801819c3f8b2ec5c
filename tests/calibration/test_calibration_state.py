"""Calibration and bias correction move ranges and biases, and no state of the model."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from reference import to_numpy

import keras_qwrap as qi
from keras_qwrap.calibration.calibrate import calibrate
from keras_qwrap.layers.keras_internals import State


def recurrent(layer):
    return keras.Sequential(
        [keras.Input(batch_shape=(4, 7, 3)), layer, layers.Dense(2, name="dense")]
    )


LAYERS = {
    "lstm": lambda: layers.LSTM(3, stateful=True),
    "two cells": lambda: layers.RNN([layers.GRUCell(2), layers.LSTMCell(3)], stateful=True),
    "both ways": lambda: layers.Bidirectional(layers.GRU(2, stateful=True)),
}


def states(model):
    inside = [getattr(layer, "states", None) for layer in model._flatten_layers()]
    found = [state for state in keras.tree.flatten(inside) if state is not None]
    assert found
    return [to_numpy(state) for state in found]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n != "lstm" else n for n in LAYERS]
)
@pytest.mark.parametrize("recipe", ["w8a8", qi.Recipe.from_preset("w8a8", bias_correction=True)])
def test_recurrent_states_are_as_before(name, recipe, random):
    x = random.normal(size=(12, 7, 3)).astype("float32")
    quantized = qi.quantize_model(recurrent(LAYERS[name]()), recipe, x, 4, verbose=0)
    for state in states(quantized):
        np.testing.assert_array_equal(state, 0)
    converted = qi.convert_to_inferable(quantized)
    for each in np.split(x, 3):
        expected = to_numpy(quantized(each))
        np.testing.assert_array_equal(to_numpy(converted(each)), expected)
    before = states(quantized)
    assert max(np.abs(state).max() for state in before) > 0
    calibrate(quantized, x, batch_size=4, verbose=0)
    for state, expected in zip(states(quantized), before, strict=True):
        np.testing.assert_array_equal(state, expected)


# Keras' own `predict` carries no states from batch to batch on JAX.
@pytest.mark.tensorflow
def test_states_go_from_batch_to_batch_and_a_batch_that_is_run_again_starts_where_it_did(random):
    """Outliers make the first batch run twice; ranges are those of a run from batch to batch."""

    def ranges(data):
        keras.utils.set_random_seed(1)
        model = recurrent(layers.LSTM(3, stateful=True, name="lstm"))
        quantized = qi.quantize_model(model, {"weights": "float"})
        return model, calibrate(quantized, data, "minmax", 4, verbose=0)

    x = random.normal(size=(8, 7, 3)).astype("float32")
    x[0, 0, 0] = 1e6
    with pytest.warns(UserWarning, match="has outliers"):
        model, found = ranges(x)
    name = next(each for each in found if each.endswith("_quantizer"))
    clipped = np.clip(x, *found[name])
    outputs = [to_numpy(model.layers[0](part)) for part in np.split(clipped, 2)]
    ends = min(each.min() for each in outputs), max(each.max() for each in outputs)
    np.testing.assert_allclose(found["lstm"], ends, rtol=1e-4)


@keras.saving.register_keras_serializable("test_calibration_state")
class Counter(layers.Layer):
    """Adds a small random number and counts its calls."""

    def build(self, shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)
        self.scale = self.add_weight(shape=(), initializer="ones")
        self.seeds = keras.random.SeedGenerator(7)

    def call(self, inputs):
        self.calls.assign_add(1.0)
        return inputs * self.scale + 1e-3 * keras.random.uniform(ops.shape(inputs), seed=self.seeds)


def test_counters_and_seeds_are_as_before(random):
    model = keras.Sequential([keras.Input((3,)), Counter(), layers.Dense(2)])
    quantized = qi.quantize_model(model)
    before = [to_numpy(v).copy() for v in quantized.get_layer(model.layers[0].name).layer.variables]
    calibrate(quantized, random.normal(size=(8, 3)), batch_size=2, verbose=0)
    after = [to_numpy(v) for v in quantized.get_layer(model.layers[0].name).layer.variables]
    assert len(after) == 3
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


class Measured(layers.Layer):
    """Measures what it is called with."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.metric = keras.metrics.Mean(name="mean")

    def call(self, x):
        self.metric.update_state(x)
        return x


def test_metrics_of_layers_are_as_before():
    model = keras.Sequential([keras.Input((3,)), Measured(name="measured"), layers.Dense(2)])
    quantized = qi.quantize_model(model, "w8a8")
    metric = quantized.get_layer("measured").layer.metric
    metric.update_state([2.0, 4.0])
    calibrate(quantized, np.arange(24).reshape(8, 3), verbose=0)
    assert [float(to_numpy(v)) for v in metric.variables] == [6, 2]


def test_states_are_restored_and_weights_are_not():
    layer = Counter()
    layer.build((None, 3))
    state = State(layer)
    layer(np.ones((1, 3)))
    layer.scale.assign(5.0)
    state.restore()
    assert (float(to_numpy(layer.calls)), float(to_numpy(layer.scale))) == (0, 5)
