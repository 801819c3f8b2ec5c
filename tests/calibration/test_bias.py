"""Bias correction: exact oracles, every kind of linear layer, and the recipe option."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_qwrap as qi
from keras_qwrap.calibration.bias import correct_biases


def normal(*shape):
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def numpy_of(value):
    return keras.ops.convert_to_numpy(value)


def outputs_of(model, x):
    return numpy_of(model(x, training=False))


def randomize(model):
    """Weights that a 3-bit grid rounds hard, one-sided so that means move."""
    new = [np.abs(normal(*weight.shape)) + 0.1 for weight in model.get_weights()]
    model.set_weights(new)
    return model


def sequential(shape, *stack):
    return randomize(keras.Sequential([keras.Input(shape), *stack]))


def channel_means(outputs, axis=-1):
    kept = axis % outputs.ndim
    return outputs.mean(axis=tuple(i for i in range(outputs.ndim) if i != kept), dtype=np.float64)


def two_layers():
    """Kernels whose 4-bit scales are exactly 1, and data whose means are exact in float32."""
    model = keras.Sequential(
        [
            keras.Input((2,)),
            layers.Dense(2, activation="relu", name="first"),
            layers.Dense(1, name="second"),
        ]
    )
    kernels = [[[7.0, -1.25], [2.5, 7.0]], [[7.0], [-3.75]]]
    weights = [kernels[0], [1.0, -4.0], kernels[1], [0.5]]
    model.set_weights([np.array(weight, np.float32) for weight in weights])
    data = np.array([[1, 2], [-3, 2], [0, 1], [2, -4], [5, 1], [-1, -1], [1, 0], [0, 3]])
    return model, data.astype(np.float32)


def reference(model, data, batch_size):
    """The two biases of `two_layers`, corrected in float64 numpy."""
    w1, b1, w2, b2 = (weight.astype(np.float64) for weight in model.get_weights())
    q1, q2 = np.rint(w1), np.rint(w2)
    shifts, weights = [], []
    for start in range(0, len(data), batch_size):
        x = data[start : start + batch_size].astype(np.float64)
        y1, y2 = x @ w1 + b1, np.maximum(x @ w1 + b1, 0) @ w2 + b2
        d1 = y1.mean(axis=0) - (x @ q1 + b1).mean(axis=0)
        d2 = y2.mean(axis=0) - (np.maximum(x @ q1 + b1 + d1, 0) @ q2 + b2).mean(axis=0)
        shifts.append([*d1, *d2])
        weights.append(len(x))
    mean = np.average(shifts, axis=0, weights=weights)
    return [b1 + mean[:2], b2 + mean[2:]]


def biases(quantized):
    return [numpy_of(quantized.get_layer(name).layer.bias) for name in ("first", "second")]


@pytest.mark.parametrize("batch_size", [8, 4, 1])
def test_biases_are_those_of_the_formula(batch_size):
    model, data = two_layers()
    quantized = qi.quantize_model(model, "w4")
    correct_biases(quantized, model, data, batch_size)
    expected = reference(model, data, batch_size)
    for found, wanted in zip(biases(quantized), expected, strict=True):
        assert np.array_equal(found, wanted)
    assert not np.array_equal(expected[0], [1.0, -4.0])


def test_batches_count_by_their_rows():
    model, data = two_layers()
    quantized = qi.quantize_model(model, "w4")
    correct_biases(quantized, model, [data[:6], data[6:7]])
    np.testing.assert_allclose(
        np.concatenate(biases(quantized)), np.concatenate(reference(model, data[:7], 6)), rtol=1e-5
    )


def test_steps_limit_the_batches():
    model, data = two_layers()
    quantized = qi.quantize_model(model, "w4")
    correct_biases(quantized, model, data, batch_size=4, steps=1)
    assert np.array_equal(biases(quantized)[0], reference(model, data[:4], 4)[0])


FIRST = "channels_first"
LAYERS = {
    "Dense": ((4,), lambda: layers.Dense(3), -1),
    "Dense on sequences": ((5, 4), lambda: layers.Dense(3), -1),
    "one channel": ((5, 4), lambda: layers.Dense(1), -1),
    "EinsumDense": ((4,), lambda: layers.EinsumDense("ab,bc->ac", (3,), bias_axes="c"), -1),
    "EinsumDense, bias first": (
        (5, 4),
        lambda: layers.EinsumDense("abc,cd->adb", (3, 5), bias_axes="d"),
        1,
    ),
    "Conv1D": ((6, 2), lambda: layers.Conv1D(3, 3), -1),
    "Conv2D": ((6, 6, 2), lambda: layers.Conv2D(3, 3), -1),
    "Conv2D, channels first": ((2, 6, 6), lambda: layers.Conv2D(3, 3, data_format=FIRST), 1),
    "Conv3D": ((4, 4, 4, 2), lambda: layers.Conv3D(3, 2), -1),
    "Conv1DTranspose": ((4, 2), lambda: layers.Conv1DTranspose(3, 3), -1),
    "Conv2DTranspose": ((4, 4, 2), lambda: layers.Conv2DTranspose(3, 3), -1),
    "DepthwiseConv1D": ((6, 2), lambda: layers.DepthwiseConv1D(3, depth_multiplier=2), -1),
    "DepthwiseConv2D": ((6, 6, 2), lambda: layers.DepthwiseConv2D(3), -1),
    "SeparableConv2D": ((6, 6, 2), lambda: layers.SeparableConv2D(3, 3), -1),
    "nested model": ((4,), lambda: keras.Sequential([keras.Input((4,)), layers.Dense(3)]), -1),
    "TimeDistributed": ((3, 4), lambda: layers.TimeDistributed(layers.Dense(3)), -1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_channel_means_of_every_linear_layer_are_kept(name):
    shape, make, axis = LAYERS[name]
    model = sequential(shape, make())
    data = np.abs(normal(16, *shape))
    quantized = qi.quantize_model(model, "w3")
    wanted = channel_means(outputs_of(model, data), axis)
    before = np.abs(channel_means(outputs_of(quantized, data), axis) - wanted)
    correct_biases(quantized, model, data, batch_size=16)
    after = np.abs(channel_means(outputs_of(quantized, data), axis) - wanted)
    assert before.max() > 1e-2
    assert after.max() < 1e-5 * np.abs(wanted).max()


def test_attention_projections_are_corrected():
    inputs = keras.Input((5, 4))
    outputs = layers.MultiHeadAttention(2, 3, name="attention")(inputs, inputs)
    model = randomize(keras.Model(inputs, outputs))
    data = np.abs(normal(16, 5, 4))
    quantized = qi.quantize_model(model, "w3")
    before = np.abs(channel_means(outputs_of(quantized, data) - outputs_of(model, data)))
    correct_biases(quantized, model, data, batch_size=16)
    after = np.abs(channel_means(outputs_of(quantized, data) - outputs_of(model, data)))
    assert before.min() > 1e-2
    assert after.max() < 1e-4


@pytest.mark.parametrize("axis", [-1, 1])
def test_a_normalization_takes_the_shift_of_a_layer_without_bias(axis):
    convolution = layers.Conv2D(2, 3, use_bias=False, name="conv")
    model = sequential((6, 4, 2), convolution, layers.BatchNormalization(axis, name="norm"))
    data = np.abs(normal(16, 6, 4, 2))
    quantized = qi.quantize_model(model, "w3")
    correct_biases(quantized, model, data, batch_size=16)
    wanted = channel_means(outputs_of(model, data), axis)
    np.testing.assert_allclose(
        channel_means(outputs_of(quantized, data), axis), wanted, rtol=1e-4, atol=1e-4
    )
    old, new = model.get_layer("norm"), quantized.get_layer("norm")
    moved = numpy_of(old.moving_mean) - numpy_of(new.moving_mean)
    assert np.abs(moved).min() > 1e-2
    for name in ("gamma", "beta", "moving_variance"):
        assert np.array_equal(numpy_of(getattr(old, name)), numpy_of(getattr(new, name)))


def test_a_normalization_that_others_feed_too_is_left_alone():
    first, second = keras.Input((4,)), keras.Input((4,))
    norm = layers.BatchNormalization(name="norm")
    parts = [norm(layers.Dense(3, use_bias=False)(tensor)) for tensor in (first, second)]
    model = randomize(keras.Model([first, second], layers.Dense(2, name="head")(sum(parts))))
    quantized = qi.quantize_model(model, "w3")
    correct_biases(quantized, model, [np.abs(normal(8, 4)), 2 * np.abs(normal(8, 4))])
    old, new = model.get_layer("norm"), quantized.get_layer("norm")
    assert np.array_equal(numpy_of(old.moving_mean), numpy_of(new.moving_mean))


def siamese():
    """A nested encoder on two inputs, whose layer is called outside as well."""
    inputs = keras.Input((4,))
    shared = layers.Dense(4, activation="relu", name="shared")
    encoder = keras.Model(inputs, shared(inputs), name="encoder")
    first, second = keras.Input((4,)), keras.Input((4,))
    difference = layers.Subtract()([shared(encoder(first)), shared(encoder(second))])
    return randomize(keras.Model([first, second], layers.Dense(2, name="head")(difference)))


def test_a_layer_that_is_called_more_than_once_is_left_as_it_is():
    """Its calls need not come in the same order in both models."""
    model = siamese()
    x = [np.abs(normal(8, 4)), 2 * np.abs(normal(8, 4))]
    quantized = qi.quantize_model(model, "w3")
    correct_biases(quantized, model, x, batch_size=8)
    for name, changed in {"encoder": False, "head": True}.items():
        old, new = model.get_layer(name), quantized.get_layer(name)
        old = old.get_layer("shared") if name == "encoder" else old
        new = new.get_layer("shared") if name == "encoder" else new
        same = np.array_equal(numpy_of(old.bias), numpy_of(new.layer.bias))
        assert same is not changed


def test_a_normalization_behind_an_activation_is_left_as_it_is():
    model = sequential(
        (3,),
        layers.Dense(4, use_bias=False, activation="relu"),
        layers.BatchNormalization(name="norm"),
        layers.Dense(2),
    )
    quantized = qi.quantize_model(model, "w3")
    before = numpy_of(quantized.get_layer("norm").moving_mean)
    correct_biases(quantized, model, normal(8, 3))
    np.testing.assert_array_equal(numpy_of(quantized.get_layer("norm").moving_mean), before)


def test_what_a_rule_leaves_in_float_is_not_corrected():
    model, data = two_layers()
    recipe = qi.Recipe.from_preset(
        "w4", rules=[qi.Rule.leave_in_float(name="second")], bias_correction=True
    )
    quantized = qi.quantize_model(model, recipe, data, verbose=0)
    assert np.array_equal(numpy_of(quantized.get_layer("second").bias), [0.5])
    assert not np.array_equal(numpy_of(quantized.get_layer("first").layer.bias), [1.0, -4.0])


def test_recurrent_layers_and_activation_layers_are_left_as_they_are():
    model = sequential(
        (5, 3),
        layers.LSTM(4, name="lstm"),
        layers.Dense(4, activation=layers.ReLU(), name="own"),
        layers.Dense(2, name="head"),
    )
    quantized = qi.quantize_model(model, "w3")
    correct_biases(quantized, model, normal(8, 5, 3))
    for name, changed in {"lstm": False, "own": False, "head": True}.items():
        old, new = model.get_layer(name), quantized.get_layer(name).layer
        bias = [numpy_of(getattr(layer, "cell", layer).bias) for layer in (old, new)]
        assert np.array_equal(*bias) != changed


class HalfUsed(keras.Layer):
    """Calls one of two layers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.used, self.idle = layers.Dense(2), layers.Dense(2)

    def build(self, shape):
        self.used.build(shape)
        self.idle.build(shape)

    def call(self, inputs):
        return self.used(inputs)


def test_a_layer_that_is_never_called_is_left_as_it_is():
    model = sequential((4,), HalfUsed(name="half"))
    quantized = qi.quantize_model(model, "w3")
    correct_biases(quantized, model, np.abs(normal(8, 4)))
    old, new = model.get_layer("half"), quantized.get_layer("half").layer
    assert np.array_equal(numpy_of(old.idle.bias), numpy_of(new.idle.bias))
    assert not np.array_equal(numpy_of(old.used.bias), numpy_of(new.used.bias))


def test_a_mixed_precision_layer_keeps_its_means_to_half_precision():
    model = sequential((4,), layers.Dense(3, dtype="mixed_float16"))
    data = np.abs(normal(16, 4))
    quantized = qi.quantize_model(model, "w3")
    correct_biases(quantized, model, data, batch_size=16)
    wanted = channel_means(outputs_of(model, data))
    found = channel_means(outputs_of(quantized, data))
    np.testing.assert_allclose(found, wanted, rtol=2e-3)


def test_the_models_are_as_before_apart_from_the_biases():
    model, data = two_layers()
    functions = [layer.activation for layer in model.layers]
    before = model.get_weights()
    quantized = qi.quantize_model(model, "w4")
    inner = [quantized.get_layer(name).layer for name in ("first", "second")]
    given = [layer.activation for layer in inner]
    correct_biases(quantized, model, data)
    assert [layer.activation for layer in model.layers] == functions
    assert [layer.activation for layer in inner] == given
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.array_equal(old, new)
    with pytest.raises(ValueError, match="batch 0"):
        correct_biases(quantized, model, [data, data[:, :1]][::-1])
    assert [layer.activation for layer in inner] == given


def test_the_recipe_option_corrects_before_it_calibrates():
    model, data = two_layers()
    recipe = qi.Recipe.from_preset("w4a8", bias_correction=True)
    found = qi.quantize_model(model, recipe, data, batch_size=1, steps=6, verbose=0)
    by_hand = qi.quantize_model(model, "w4a8")
    correct_biases(by_hand, model, data, 1, 6)
    qi.calibrate(by_hand, data, batch_size=1, steps=6, verbose=0)
    for one, other in zip(biases(found), biases(by_hand), strict=True):
        assert np.array_equal(one, other)
    assert np.array_equal(outputs_of(found, data), outputs_of(by_hand, data))
    plain = qi.quantize_model(model, "w4a8", data, verbose=0)
    assert not np.array_equal(outputs_of(found, data), outputs_of(plain, data))
    converted = qi.convert_to_inferable(found)
    assert np.array_equal(outputs_of(found, data), outputs_of(converted, data))


def test_the_recipe_option_works_with_weights_alone_and_with_folding():
    model = sequential(
        (6, 2), layers.Conv1D(3, 2, use_bias=False, name="conv"), layers.BatchNormalization()
    )
    data = np.abs(normal(8, 6, 2))
    recipe = qi.Recipe.from_preset("w3", fold_batch_norm=True, bias_correction=True)
    quantized = qi.quantize_model(model, recipe, data)
    wanted = channel_means(outputs_of(model, data))
    np.testing.assert_allclose(channel_means(outputs_of(quantized, data)), wanted, rtol=1e-4)


@pytest.mark.parametrize("data", [None, iter([np.zeros((2, 2))])], ids=["none", "iterator"])
def test_data_is_needed_twice(data):
    recipe = qi.Recipe.from_preset("w4a8", bias_correction=True)
    with pytest.raises(ValueError, match=r"calibration_data: .* data that can be read twice"):
        qi.quantize_model(two_layers()[0], recipe, data, verbose=0)


def test_what_cannot_be_corrected_is_refused():
    class Subclassed(keras.Model):
        def call(self, inputs):
            return inputs

    model = Subclassed()
    model.build((None, 2))
    recipe = qi.Recipe.from_preset("w4", bias_correction=True)
    with pytest.raises(ValueError, match="bias_correction=False for a subclassed model"):
        qi.quantize_model(model, recipe, np.zeros((2, 2)))
    without = sequential((4,), layers.Dense(2, use_bias=False))
    with pytest.raises(ValueError, match="layers that have a bias"):
        qi.quantize_model(without, recipe, np.zeros((2, 4)))
