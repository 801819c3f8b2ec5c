"""What the copies that `quantize_model`, conversion and unwrapping make keep of a model."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from layer_cases import floats
from reference import refused, to_numpy

import keras_qwrap as qi

X, Y = floats(16, 6), np.zeros((16, 2), "float32")


class Raw(layers.Layer):
    """Holds a variable of the backend's own."""

    def __init__(self, make, **kwargs):
        super().__init__(**kwargs)
        self.make = make

    def build(self, shape):
        self.parts = {"raw": [self.make((6, 2))]}

    def call(self, inputs):
        return ops.matmul(inputs, ops.convert_to_tensor(self.parts["raw"][0]))

    def get_config(self):
        return super().get_config() | {"make": self.make}


class AroundRaw(keras.Model):
    """A subclassed model with such a layer inside."""

    def __init__(self, make, **kwargs):
        super().__init__(**kwargs)
        self.make, self.raw = make, Raw(make, name="raw")

    def call(self, inputs):
        return self.raw(inputs)

    def get_config(self):
        return super().get_config() | {"make": self.make}


def raw_variable():
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return lambda shape: tf.Variable(tf.ones(shape))
    torch = pytest.importorskip("torch")
    return lambda shape: torch.nn.Parameter(torch.ones(shape))


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="arrays of jax are no variables")
@pytest.mark.parametrize("recipe", ["w8", qi.Recipe("float")])
def test_variables_that_are_not_of_keras_are_refused(recipe):
    make = raw_variable()
    graph = keras.Sequential([keras.Input((6,)), Raw(make, name="raw"), layers.Dense(2)])
    subclassed = AroundRaw(make)
    subclassed(X)
    wrapper = qi.KerasQuantizationWrapper(Raw(make, name="raw"))
    found = ("layer 'raw' with a", "at 'parts/raw/0'", "Keras variables", "add_weight")
    refused(ValueError, lambda: qi.quantize_model(graph, recipe), *found)
    refused(ValueError, lambda: qi.quantize_model(subclassed, recipe), *found)
    refused(ValueError, lambda: wrapper(X), *found)


@keras.saving.register_keras_serializable("test_copies")
class Twice(keras.Sequential):
    """Computes more than its layers."""

    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training)


class TwiceItsGraph(keras.Model):
    """Is made from inputs and outputs, and computes more."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training)


class FixedGraph(keras.Model):
    """Makes its own graph, by a constructor that takes nothing."""

    def __init__(self):
        inputs = keras.Input((6,))
        super().__init__(inputs, layers.Dense(2)(inputs))

    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training)


def functional(kind):
    inputs = keras.Input((6,))
    return kind(inputs, layers.Dense(2)(inputs))


def test_a_model_with_a_call_of_its_own_is_no_graph(tmp_path):
    sequential, fixed = Twice([keras.Input((6,)), layers.Dense(2)]), FixedGraph()
    nested = keras.Sequential([keras.Input((6,)), Twice([keras.Input((6,)), layers.Dense(2)])])
    for model in (sequential, nested, fixed):
        quantized = qi.quantize_model(model, "w16")
        np.testing.assert_allclose(to_numpy(quantized(X)), to_numpy(model(X)), atol=1e-3)
        converted = qi.convert_to_inferable(quantized)
        path = tmp_path / "model.keras"
        converted.save(path)
        loaded = qi.keras_load_quantized_model(path, {"FixedGraph": FixedGraph})
        for other in (converted, loaded, qi.unwrap_model(converted)):
            np.testing.assert_array_equal(to_numpy(other(X)), to_numpy(quantized(X)))


def test_a_functional_model_with_a_call_of_its_own_is_copied_whole():
    model = functional(TwiceItsGraph)
    quantized = qi.quantize_model(model, "w16")
    np.testing.assert_allclose(to_numpy(quantized(X)), to_numpy(model(X)), atol=1e-3)


class OwnStep(keras.Sequential):
    """Trains in its own way."""

    def train_step(self, *args):
        return super().train_step(*args)


def test_training_steps_that_a_copy_does_not_have_are_named():
    model = OwnStep([keras.Input((6,)), layers.Dense(2)])
    with pytest.warns(UserWarning, match="class OwnStep has its own train_step"):
        quantized = qi.quantize_model(model, "w8")
    assert type(qi.convert_to_inferable(quantized)) is keras.Sequential


def squared(y, prediction):
    return ops.mean((y - prediction) ** 2)


class Largest(keras.metrics.Metric):
    """Not registered."""

    def __init__(self, scale, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale
        self.largest = self.add_variable((), "zeros", name="largest")

    def update_state(self, y, prediction, sample_weight=None):
        self.largest.assign(self.scale * ops.max(prediction))

    def result(self):
        return ops.convert_to_tensor(self.largest)

    def get_config(self):
        return super().get_config() | {"scale": self.scale}


class Slow(keras.optimizers.SGD):
    """Not registered either."""


class Opaque(keras.optimizers.SGD):
    """Cannot be made again."""

    def get_config(self):
        raise NotImplementedError("no config")


def compiled(model, optimizer):
    model.compile(
        optimizer, loss=squared, metrics=[Largest(3.0, name="largest"), "mae"], run_eagerly=True
    )
    return model


@pytest.mark.parametrize("kind", [keras.Model, Twice])
def test_compiled_with_what_is_not_registered(kind):
    model = Twice([keras.Input((6,)), layers.Dense(2)]) if kind is Twice else functional(kind)
    optimizer = Slow(0.125)
    compiled(model, optimizer).fit(X, Y, verbose=0)
    metric = model.get_metrics_result()["largest"]
    quantized = qi.quantize_model(model, "w8")
    for made in (quantized, qi.convert_to_inferable(quantized), qi.unwrap_model(quantized)):
        assert made.compiled
        assert made.run_eagerly
        assert made.loss is squared
        assert type(made.optimizer) is Slow
        assert made.optimizer is not optimizer
        assert float(made.optimizer.learning_rate) == 0.125
        results = made.evaluate(X, Y, verbose=0, return_dict=True)
        expected = 3 * np.max(to_numpy(made(X)))
        np.testing.assert_allclose(results["largest"], expected, rtol=1e-6)
    assert model.get_metrics_result()["largest"] == metric
    quantized.fit(X, Y, verbose=0)


def test_what_cannot_be_made_again_is_left_out_with_a_warning():
    model = compiled(functional(keras.Model), Opaque())
    with pytest.warns(UserWarning, match="is not compiled as the given one is .no config."):
        quantized = qi.quantize_model(model, "w8")
    assert not quantized.compiled


class Distilled(keras.Model):
    """Compiles with an argument of its own, and says so."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

    def compile(self, optimizer, loss, alpha, **kwargs):
        keras.Model.compile(self, optimizer=optimizer, loss=loss, **kwargs)
        self.alpha = alpha

    def get_compile_config(self):
        return {"optimizer": self.optimizer, "loss": self.loss, "alpha": self.alpha}

    def compile_from_config(self, config):
        made = keras.saving.deserialize_keras_object
        self.compile(made(config["optimizer"]), made(config["loss"]), config["alpha"])


def test_compiled_in_a_way_of_its_own():
    model = functional(Distilled)
    optimizer = keras.optimizers.SGD(0.125)
    model.compile(optimizer, keras.losses.MeanSquaredError("sum"), alpha=0.9)
    model.fit(X, Y, verbose=0)
    quantized = qi.quantize_model(model, "w8")
    assert type(quantized) is Distilled
    assert quantized.alpha == 0.9
    assert quantized.loss.reduction == "sum"
    assert quantized.optimizer is not optimizer
    assert float(quantized.optimizer.learning_rate) == 0.125
    quantized.fit(X, Y, verbose=0)
    assert (int(optimizer.iterations), int(quantized.optimizer.iterations)) == (1, 1)


class Noting(keras.Sequential):
    """Only takes notice of being compiled."""

    def compile(self, *args, **kwargs):
        super().compile(*args, **kwargs)
        self.noted = True


class Halved(Noting):
    """Has an argument of its own that nothing notes."""

    def compile(self, *args, alpha=0.5, **kwargs):
        super().compile(*args, **kwargs)


class Unfinished(Distilled):
    """Leaves to Keras what Keras does not do for such classes."""

    compile_from_config = keras.Model.compile_from_config

    def get_compile_config(self):
        return {"optimizer": "sgd"}


class Passed(Unfinished):
    def compile_from_config(self, config):
        super().compile_from_config(config)


def test_a_class_that_compiles_in_no_way_that_can_be_followed():
    model = Halved([keras.Input((6,)), layers.Dense(2)])
    model.compile("sgd", "mse", alpha=0.9)
    graph = functional(Unfinished)
    graph.compile("sgd", "mse", alpha=0.9)
    passed = functional(Passed)
    passed.compile("sgd", "mse", alpha=0.9)
    with pytest.warns(UserWarning, match="its `compile` takes .'alpha'., and no"):
        quantized = qi.quantize_model(graph, "w8")
    assert not quantized.compiled
    with pytest.warns(UserWarning, match="method is custom"):
        assert not qi.quantize_model(passed, "w8").compiled
    assert qi.quantize_model(model, "w8").compiled  # a plain Sequential model, as Keras trains it


class DistilledByCode(keras.Model):
    """No graph."""

    compile = Distilled.compile
    get_compile_config = Distilled.get_compile_config
    compile_from_config = Distilled.compile_from_config

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(2)

    def call(self, x):
        return self.dense(x)


def test_a_class_that_only_adds_to_compile():
    model = Noting([keras.Input((6,)), layers.Dense(2)])
    model.compile(Slow(0.125), squared)
    by_code = DistilledByCode()
    by_code(X)
    by_code.compile(Slow(0.125), squared, alpha=0.5)
    for given in (model, by_code):
        quantized = qi.quantize_model(given, "w8")
        assert type(quantized) is not type(given)
        assert type(quantized.optimizer) is Slow
        assert quantized.optimizer is not given.optimizer
        assert quantized.loss is squared
        quantized.fit(X, Y, verbose=0)


def test_compiled_for_evaluation_alone():
    model = functional(keras.Model)
    model.compile(optimizer=None, loss="mse")
    quantized = qi.quantize_model(model, "w16")
    expected = model.evaluate(X, Y, verbose=0)
    assert quantized.optimizer is None
    assert quantized.evaluate(X, Y, verbose=0) == pytest.approx(expected, rel=1e-3)


class Whitened(layers.Layer):
    """A quantized weight beside what is adapted."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 2), name="kernel")
        self.adapted = self.add_weight(shape=(shape[-1],), name="adapted", trainable=False)
        self.finalize_state()

    def finalize_state(self):
        self.mean = to_numpy(self.adapted).copy()

    def load_own_variables(self, store):
        super().load_own_variables(store)
        self.finalize_state()

    def call(self, x):
        return ops.matmul(ops.subtract(x, self.mean), self.kernel)


def test_adapted_layers_with_quantized_weights():
    model = keras.Sequential([keras.Input((3,)), Whitened(name="whitened")])
    model.layers[0].adapted.assign([1.0, 2.0, 3.0])
    model.layers[0].finalize_state()
    x = floats(4, 3)
    quantized = qi.quantize_model(model, "w16")
    np.testing.assert_allclose(to_numpy(quantized(x)), to_numpy(model(x)), atol=1e-3)
    converted = qi.convert_to_inferable(quantized)
    again = qi.convert_to_inferable(converted)
    for other in (converted, again, qi.unwrap_model(quantized), qi.unwrap_model(converted)):
        np.testing.assert_array_equal(to_numpy(other(x)), to_numpy(quantized(x)))


@pytest.mark.parametrize("kind", ["functional", "sequential", "nested"])
def test_frozen_models_stay_frozen(kind):
    model = functional(keras.Model)
    if kind == "sequential":
        model = keras.Sequential([keras.Input((6,)), layers.Dense(3), layers.Dense(2)])
    inner = model
    if kind == "nested":
        model = keras.Sequential([keras.Input((6,)), model, layers.Dense(2)])
    inner.trainable = False
    inner.layers[-1].trainable = True
    quantized = qi.quantize_model(model, "w8")
    found = quantized.layers[0] if kind == "nested" else quantized
    assert not found.trainable
    assert found.layers[-1].trainable
    assert len(quantized.trainable_variables) == len(model.trainable_variables)


class Keyed(layers.Layer):
    """Keeps a weight under a key that is no part of a path."""

    def build(self, shape):
        self.parts = {"a/b": self.add_weight(shape=(6, 2), name="slashed")}
        self.kernel = self.add_weight(shape=(6, 2), name="kernel")

    def call(self, inputs):
        return ops.matmul(inputs, self.parts["a/b"]) + ops.matmul(inputs, self.kernel)


def test_a_weight_that_no_path_names_stays_in_float():
    model = keras.Sequential([keras.Input((6,)), Keyed()])
    quantized = qi.quantize_model(model, "w16")
    assert list(quantized.layers[0].weights_quantizers) == ["kernel"]
    np.testing.assert_allclose(to_numpy(quantized(X)), to_numpy(model(X)), atol=1e-3)
    assert "slashed" in str(qi.quantization_report(quantized))


@pytest.mark.parametrize("cell", [layers.LSTM, layers.SimpleRNN])
def test_the_state_of_stateful_layers_is_copied(cell):
    model = keras.Sequential([keras.Input(batch_shape=(4, 5, 3)), cell(2, stateful=True)])
    inputs = floats(4, 5, 3)
    quantized = qi.quantize_model(model, "w8")
    quantized.predict(inputs, batch_size=4, verbose=0)
    converted = qi.convert_to_inferable(quantized)
    found, expected = (
        each.predict(inputs, batch_size=4, verbose=0) for each in (converted, quantized)
    )
    np.testing.assert_array_equal(found, expected)
