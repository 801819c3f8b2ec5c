"""`KerasActivationQuantizationHolder`: a quantizer as a layer."""

import json

import keras
import numpy as np
import pytest
from keras import layers, ops
from layer_cases import activation, fixed, floats, weight

import keras_qwrap as qi

Holder = qi.KerasActivationQuantizationHolder


def to_numpy(tensor):
    return np.array(ops.convert_to_numpy(tensor))


def on_grid(x, threshold, bits, signed=True):
    """The symmetric grid of the docs in numpy."""
    scale = np.float32(threshold / 2 ** (bits - signed))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return np.clip(np.round(x / scale), low, high) * scale


def test_output_is_the_numpy_formula():
    x = floats(5, 4) * 3
    for signed in (True, False):
        holder = Holder(activation(4.0, 5, signed=signed))
        got = to_numpy(holder(x))
        np.testing.assert_array_equal(got, on_grid(x, 4.0, 5, signed), strict=True)
    uniform = qi.ActivationUniformInferableQuantizer(4, -1.0, 2.75)
    expected = (np.clip(np.round(x * 4), -4, 11) / 4).astype("float32")
    np.testing.assert_array_equal(to_numpy(Holder(uniform)(x)), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_is_the_inputs(dtype):
    x = ops.cast(floats(2, 3), dtype)
    holder = Holder(activation(2.0, 4))
    assert keras.backend.standardize_dtype(holder(x).dtype) == dtype
    spec = holder.compute_output_spec(keras.KerasTensor((None, 3), dtype))
    assert (spec.dtype, spec.shape) == (dtype, (None, 3))
    assert holder.compute_output_shape((None, 3)) == (None, 3)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="int32"):
        Holder(activation())(np.ones((2, 3), "int32"))


def test_mask_is_kept():
    embedding, lstm = layers.Embedding(4, 3, mask_zero=True), layers.LSTM(2)
    x = np.array([[1, 2, 0, 0]], "int32")
    padded = to_numpy(lstm(Holder(activation(0.5, 16))(embedding(x))))
    short = to_numpy(lstm(Holder(activation(0.5, 16))(embedding(x[:, :2]))))
    np.testing.assert_allclose(padded, short, rtol=1e-5)


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_model_with_holders_trains_saves_converts(ending, tmp_path):
    inputs = keras.Input((3,))
    first = Holder(activation(2.0, 6), name="first")(inputs)
    hidden = layers.Dense(2)(first)
    outputs = Holder(activation(4.0, 8), name="last")(hidden)
    model = keras.Model(inputs, outputs)
    x = floats(4, 3)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    kernel = to_numpy(model.layers[2].kernel)
    model.fit(x, floats(4, 2), verbose=0)
    assert not np.array_equal(to_numpy(model.layers[2].kernel), kernel)
    expected = to_numpy(model(x))
    np.testing.assert_array_equal(expected, on_grid(expected, 4.0, 8))
    converted = qi.convert_to_inferable(model)
    assert [layer.name for layer in converted.layers] == [layer.name for layer in model.layers]
    for each in (model, converted):
        each.save(tmp_path / f"model.{ending}")
        reloaded = keras.models.load_model(tmp_path / f"model.{ending}", compile=False)
        np.testing.assert_array_equal(to_numpy(reloaded(x)), expected)
    quantizer = reloaded.get_layer("last").activation_holder_quantizer
    assert type(quantizer) is qi.ActivationPOTInferableQuantizer


def test_gradient_stops_outside_the_range():
    """Half a step around the range still passes it: 4 bits around 1 end at -1 and 0.875."""
    x = np.array([[-1.1, -1.05, 0.3, 0.93, 0.95]], "float32")
    bias = layers.EinsumDense("ab,b->ab", output_shape=(5,), kernel_initializer="ones")
    model = keras.Sequential([keras.Input((5,)), bias, Holder(activation(1.0, 4)), Sum()])
    model.compile(keras.optimizers.SGD(1.0), "mae", jit_compile=False)
    model.fit(x, np.full((1, 1), -100.0, "float32"), verbose=0)
    moved = to_numpy(bias.kernel) != 1.0
    np.testing.assert_array_equal(moved, [False, True, True, True, False])


class Sum(layers.Layer):
    def call(self, inputs):
        return ops.sum(inputs, axis=-1, keepdims=True)


def test_conversion_gives_a_new_holder_and_is_idempotent():
    holder = Holder(quantizer := activation(2.0, 4), name="here")
    x = floats(2, 3)
    expected = to_numpy(holder(x))
    converted = holder.convert_to_inferable_quantizers()
    again = converted.convert_to_inferable_quantizers()
    for each in (converted, again):
        assert each.name == "here"
        assert not each.trainable
        np.testing.assert_array_equal(to_numpy(each(x)), expected)
    assert json.dumps(again.get_config()) == json.dumps(converted.get_config())
    assert holder.activation_holder_quantizer is quantizer
    assert holder.trainable
    with pytest.raises(ValueError, match="Call it first"):
        Holder(activation()).convert_to_inferable_quantizers()


def test_disabled_quantizer_passes_its_input():
    config = qi.TrainableQuantizerActivationConfig(
        qi.QuantizationMethod.SYMMETRIC, 2, {"threshold": 1.0}, False
    )
    holder = Holder(qi.STEActivationQATQuantizer(config))
    x = floats(2, 3)
    np.testing.assert_array_equal(to_numpy(holder(x)), x)
    np.testing.assert_array_equal(to_numpy(holder.convert_to_inferable_quantizers()(x)), x)


@pytest.mark.parametrize(
    ("quantizer", "error", "text"),
    [
        (lambda: weight(), ValueError, "a quantizer for activation"),
        (lambda: fixed(), ValueError, "WeightsSymmetricInferableQuantizer is for weights"),
        (lambda: None, TypeError, "activation_holder_quantizer: received None"),
        (lambda: [activation()], TypeError, "a trainable or inferable quantizer"),
    ],
)
def test_wrong_quantizers_are_refused(quantizer, error, text):
    with pytest.raises(error, match=text):
        Holder(quantizer())
