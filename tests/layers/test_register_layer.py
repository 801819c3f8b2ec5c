"""Layers that users register, and subclasses: what one row, or none, makes of them."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from layer_cases import floats
from reference import refused, to_numpy

import keras_qwrap as qi
from keras_qwrap.layers import layer_table


@pytest.fixture(autouse=True)
def own_table(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(layer_table, "ROWS", dict(layer_table.ROWS))


@keras.saving.register_keras_serializable("test_register_layer")
class Projection(layers.Layer):
    """Like Dense, with a transposed kernel; and one that may have no bias."""

    def __init__(self, units=4, use_bias=True, **kwargs):
        super().__init__(**kwargs)
        self.units, self.use_bias = units, use_bias

    def build(self, input_shape):
        shape = (self.units, input_shape[-1])
        self.matrix = self.add_weight(name="m", shape=shape, initializer="normal")
        self.bias = self.add_weight(name="b", shape=shape[:1]) if self.use_bias else None

    def call(self, inputs):
        outputs = ops.matmul(inputs, ops.transpose(self.matrix))
        return outputs if self.bias is None else outputs + self.bias

    def get_config(self):
        return super().get_config() | {"units": self.units, "use_bias": self.use_bias}


@keras.saving.register_keras_serializable("test_register_layer")
class WithBias(Projection):
    """Always has a bias, and says nothing of it in its config."""

    def __init__(self, units=4, **kwargs):
        super().__init__(units, **kwargs)

    def get_config(self):
        config = super().get_config()
        del config["use_bias"]
        return config


@keras.saving.register_keras_serializable("test_register_layer")
class WithoutBias(WithBias):
    """Never has one, so that it has no room for an offset."""

    def __init__(self, units=4, **kwargs):
        super().__init__(units, **kwargs)
        self.use_bias = False


@keras.saving.register_keras_serializable("test_register_layer")
class Doubled(Projection):
    """With a `call` of its own."""

    def call(self, inputs):
        return super().call(inputs) * 2.0


@keras.saving.register_keras_serializable("test_register_layer")
class OwnDense(layers.Dense):
    """What its parent is."""


@keras.saving.register_keras_serializable("test_register_layer")
class OwnConv(layers.Conv2D):
    """Keeps `call`, which Keras makes of `convolution_op`."""

    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel - ops.mean(kernel))


@keras.saving.register_keras_serializable("test_register_layer")
class SquaredDense(layers.Dense):
    """Of a kind of its own."""

    def call(self, inputs):
        return super().call(inputs) ** 2


@keras.saving.register_keras_serializable("test_register_layer")
class OwnEmbedding(layers.Embedding):
    """What its parent is."""


@keras.saving.register_keras_serializable("test_register_layer")
class ScaledEmbedding(layers.Embedding):
    """As in Transformers."""

    def call(self, inputs):
        return super().call(inputs) * 3.0


def as_linear(cls=Projection, **more):
    qi.register_layer(cls, {"matrix": 0}, behaviour="linear", fold="matrix", **more)


def model_of(*parts, shape=(3,), dtype="float32"):
    x = inputs = keras.Input(shape, dtype=dtype, name="in")
    for part in parts:
        x = part(x)
    return keras.Model(inputs, x)


def quantized_outputs(model):
    """The layers of a model whose outputs get a quantizer of their own."""
    report = qi.quantization_report(qi.quantize_model(model, "w8a8"))
    return [row.path.removesuffix("_quantizer") for row in report.layers if row.outputs is None]


def normalized(layer, shape=(3,)):
    """A model of a layer and a batch normalization with statistics that are no default."""
    model = model_of(layer, layers.BatchNormalization(name="norm"), shape=shape)
    for number, weight in enumerate(model.weights):
        weight.assign(1.5 + np.abs(floats(*weight.shape, seed=number)))
    return model


def folded(model, shape=(5, 3)):
    """The names of what is left when batch normalizations are folded; the outputs stay."""
    new = qi.fold_batch_norm(model)
    x = floats(*shape)
    np.testing.assert_allclose(to_numpy(new(x)), to_numpy(model(x)), rtol=1e-4, atol=1e-4)
    return [layer.name for layer in new.layers[1:]]


def test_a_registered_linear_layer_is_placed_as_one():
    parts = [Projection(name="first"), layers.ReLU(name="relu")]
    assert quantized_outputs(model_of(*parts)) == ["in", "first", "relu"]
    as_linear()
    assert quantized_outputs(model_of(*parts)) == ["in", "relu"]
    (_, scale, _) = qi.quantize_model(model_of(*parts), "w8a8").layers[2].get_codes()["matrix"]
    assert scale.shape == (4, 1)


@pytest.mark.parametrize(
    ("layer", "left"),
    [
        (lambda: Projection(name="first"), ["first"]),
        (lambda: Projection(use_bias=False, name="first"), ["first"]),
        (lambda: WithBias(name="first"), ["first"]),
        (lambda: WithoutBias(name="first"), ["first", "norm"]),
        (lambda: Doubled(name="first"), ["first", "norm"]),
    ],
)
def test_batch_normalization_is_folded_into_a_registered_layer(layer, left):
    assert folded(normalized(layer())) == ["first", "norm"]
    as_linear()
    assert folded(normalized(layer())) == left


def test_an_axis_that_makes_no_output_channels_folds_nothing():
    qi.register_layer(Projection, {"matrix": 1}, behaviour="linear", fold="matrix")
    assert folded(normalized(Projection(name="first"))) == ["first", "norm"]


def test_biases_of_a_registered_layer_are_corrected(random):
    as_linear()
    model = model_of(Projection(name="first"), layers.Dense(2, name="last"))
    x = random.normal(size=(8, 3)).astype("float32")
    recipe = qi.Recipe.from_preset("w4a8", bias_correction=True)
    assert qi.quantize_model(model, recipe, x, verbose=0)(x).shape == (8, 2)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ["in", "own", "last"]),
        ({"behaviour": "carrier"}, ["in", "last"]),
        ({"behaviour": "identity"}, ["in", "last"]),
        ({"behaviour": "lookup"}, ["own", "last"]),
    ],
)
def test_what_a_registered_behaviour_means_for_its_neighbours(arguments, expected):
    class Own(layers.Layer):
        def call(self, inputs):
            return inputs

    qi.register_layer(Own, **arguments)
    with keras.saving.custom_object_scope({"Own": Own}):
        model = model_of(Own(name="own"), layers.Dense(2, name="last"), shape=(4, 4, 3))
        assert quantized_outputs(model) == expected


@pytest.mark.parametrize(("outputs", "low"), [("unit", 0.0), ("signed unit", -1.0)])
def test_a_registered_range_is_the_grid(outputs, low):
    qi.register_layer(Doubled, outputs=outputs)
    report = qi.quantization_report(qi.quantize_model(model_of(Doubled(name="own")), "w8a8"))
    assert report.layers[-1].activations[0].range == (low, 1.0)


@keras.saving.register_keras_serializable("test_register_layer")
class Around(layers.Layer):
    """With a layer inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(2)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, inputs):
        return self.dense(inputs)


def test_layers_inside_are_left_alone_where_the_row_says_so():
    model = model_of(Around(name="around"), layers.Dense(2, name="last"))
    assert list(qi.quantize_model(model, "w8").layers[1].get_codes()) == ["dense/kernel"]
    qi.register_layer(Around, {}, reason="it is small", whole=True)
    assert type(qi.quantize_model(model, "w8").layers[1]) is Around


def test_a_subclass_is_what_its_parent_is_where_it_keeps_the_call():
    relu = layers.ReLU(name="relu")
    assert quantized_outputs(model_of(OwnDense(4, name="own"), relu)) == ["in", "relu"]
    assert folded(normalized(OwnDense(4, name="own"))) == ["own"]
    ids = {"shape": (5,), "dtype": "int32"}
    assert quantized_outputs(model_of(OwnEmbedding(9, 2, name="own"), **ids)) == []


def test_a_subclass_with_its_own_call_is_a_custom_layer():
    relu = layers.ReLU(name="relu")
    squared = model_of(SquaredDense(4, name="own"), relu)
    assert quantized_outputs(squared) == ["in", "own", "relu"]
    assert folded(normalized(SquaredDense(4, name="own"))) == ["own", "norm"]
    ids = {"shape": (5,), "dtype": "int32"}
    scaled = model_of(ScaledEmbedding(9, 2, name="own"), **ids)
    assert quantized_outputs(scaled) == ["own"]
    images = {"shape": (6, 6, 2)}
    centered = model_of(OwnConv(3, 2, name="own"), relu, **images)
    assert quantized_outputs(centered) == ["in", "own", "relu"]
    assert folded(normalized(OwnConv(3, 2, name="own"), (6, 6, 2)), (2, 6, 6, 2)) == ["own", "norm"]


def test_a_lookup_inside_a_call_of_ones_own_is_seen():
    """Its input stays float, with data or without."""
    model = model_of(ScaledEmbedding(9, 2, name="own"), shape=(5,))
    assert quantized_outputs(model) == ["own"]


def test_the_registered_row_of_a_subclass_goes_before_its_call():
    qi.register_layer(SquaredDense, behaviour="linear")
    relu = layers.ReLU(name="relu")
    assert quantized_outputs(model_of(SquaredDense(4, name="own"), relu)) == ["in", "relu"]
    assert folded(normalized(SquaredDense(4, name="own"))) == ["own", "norm"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"behaviour": "liner"},
            "behaviour: received 'liner', expected one of 'unknown', 'linear'",
        ),
        ({"outputs": "units"}, "outputs: received 'units', expected one of 'data', 'unit'"),
        ({"fold": "matrix"}, "fold: received 'matrix', expected a path among `weights`"),
        ({"fold": "matrix", "behaviour": "sum"}, "with behaviour='linear'"),
        ({"weights": {"matrix": None}, "fold": "matrix", "behaviour": "linear"}, "that keeps axes"),
        ({"weights": None, "fold": "matrix", "behaviour": "linear"}, "a path among `weights`"),
    ],
)
def test_wrong_rows_are_refused(arguments, message):
    before = dict(layer_table.ROWS)
    arguments = {"weights": {"matrix": 0}} | arguments
    refused(ValueError, lambda: qi.register_layer(Projection, **arguments), message)
    assert before == layer_table.ROWS
