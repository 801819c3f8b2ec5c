"""Dtype policies: the layer keeps its own, quantizers compute in float32."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from layer_cases import activation, floats, weight

import keras_qwrap as qi

Wrapper = qi.KerasQuantizationWrapper


def to_numpy(tensor):
    return np.array(ops.convert_to_numpy(tensor))


@pytest.fixture
def global_policy():
    """Sets Keras' global policy, and puts it back."""
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


def reference(kernel, bits):
    """Codes and scale per column, float32 arithmetic, in numpy."""
    highest = 2 ** (bits - 1) - 1
    scale = np.abs(kernel).max(0, keepdims=True) * np.float32(1 / highest)
    return np.round(kernel / scale).astype(np.int32), scale


def model_of(policy=None):
    def quantized(layer, path):
        return Wrapper(layer, {path: weight(8)}, activation(8.0))

    return keras.Sequential(
        [
            keras.Input((8, 6)),
            quantized(layers.Conv1D(8, 3, activation="relu", dtype=policy), "kernel"),
            quantized(layers.GRU(4, dtype=policy), "cell/kernel"),
            quantized(layers.Dense(2, dtype=policy), "kernel"),
        ]
    )


class Net(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(1, use_bias=False, kernel_initializer="zeros")

    def call(self, x):
        return self.dense(x)


@pytest.mark.parametrize("again", [False, True])
def test_the_loss_of_subclassed_models_is_scaled(global_policy, again):
    """Its gradient, 1e-8, is zero in float16."""
    global_policy("mixed_float16")
    x = np.ones((4, 3), "float32")
    kernels = []
    for quantize in (False, True):
        model = Net()
        model(x)
        arguments = {"optimizer": keras.optimizers.SGD(1e6), "loss": tiny}
        model.compile(**arguments, jit_compile=False)
        if quantize:
            model = qi.quantize_model(model, "w8")
            if again:
                arguments["optimizer"] = keras.optimizers.SGD(1e6)
                model.compile(**arguments, jit_compile=False)
        model.fit(x, np.zeros((4, 1)), verbose=0)
        kernels.append(to_numpy(model.trainable_variables[0]))
    assert np.all(kernels[0] != 0)
    np.testing.assert_allclose(kernels[1], kernels[0], rtol=1e-3)


def tiny(y, prediction):
    return ops.mean(prediction) * 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("globally", [False, True])
def test_mixed_policies_train_save_and_reload(policy, globally, global_policy, tmp_path):
    if globally:
        global_policy(policy)
    model = model_of(None if globally else policy)
    assert [layer.layer.dtype_policy.name for layer in model.layers] == [policy] * 3
    assert all(layer.dtype_policy.name == "float32" for layer in model.layers)
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
    model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=False)
    x = floats(8, 8, 6)
    before = model.get_weights()
    losses = model.fit(x, floats(8, 2), epochs=3, verbose=0).history["loss"]
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0]
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())
    moved = [not np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True)]
    assert sum(moved) >= 5
    expected = to_numpy(ops.cast(model(x), "float32"))
    converted = qi.convert_to_inferable(model)
    for name, each in (("trained", model), ("converted", converted)):
        each.save(tmp_path / f"{name}.keras")
        reloaded = keras.models.load_model(tmp_path / f"{name}.keras", compile=False)
        for model_ in (each, reloaded):
            np.testing.assert_array_equal(to_numpy(ops.cast(model_(x), "float32")), expected)
    for layer, twin in zip(model.layers, reloaded.layers, strict=True):
        for path, codes in layer.get_codes().items():
            np.testing.assert_array_equal(twin.get_codes()[path][0], codes[0])


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_codes_are_those_of_float32_arithmetic(policy):
    """And the layer computes with them rounded to its compute dtype, nothing else."""
    kernel = floats(64, 32)
    wrapper = Wrapper(layers.Dense(32, use_bias=False, dtype=policy), {"kernel": weight(8)})
    wrapper.build((None, 64))
    wrapper.latent_weight("kernel").assign(kernel)
    codes, scale = reference(kernel, 8)
    got, got_scale, _ = wrapper.get_codes()["kernel"]
    np.testing.assert_array_equal(got, codes)
    np.testing.assert_array_equal(got_scale, scale)
    compute = policy.removeprefix("mixed_")
    outputs = wrapper(ops.cast(np.eye(64), compute))
    assert keras.backend.standardize_dtype(outputs.dtype) == compute
    wanted = ops.cast(ops.cast(codes * scale, compute), "float32")
    np.testing.assert_array_equal(to_numpy(ops.cast(outputs, "float32")), to_numpy(wanted))


@pytest.mark.parametrize(
    "policy", ["float16", "bfloat16", pytest.param("float64", marks=pytest.mark.tensorflow)]
)
def test_pure_policies_of_a_dense_layer(policy, tmp_path):
    """The weight is stored in the policy's dtype and quantized in float32.

    JAX has no float64 by default, and products of float64 are float32 on torch, unwrapped too.
    """
    kernel = floats(16, 8)
    wrapper = Wrapper(layers.Dense(8, use_bias=False, dtype=policy), {"kernel": weight(6)})
    wrapper.build((None, 16))
    latent = wrapper.latent_weight("kernel")
    latent.assign(ops.cast(kernel, policy))
    assert latent.dtype == policy
    stored = to_numpy(ops.cast(ops.convert_to_tensor(latent), "float32"))
    codes, scale = reference(stored, 6)
    np.testing.assert_array_equal(wrapper.get_codes()["kernel"][0], codes)
    outputs = wrapper(ops.cast(np.eye(16), policy))
    assert keras.backend.standardize_dtype(outputs.dtype) == policy
    wanted = to_numpy(ops.cast(ops.cast(codes * scale, policy), "float32"))
    np.testing.assert_array_equal(to_numpy(ops.cast(outputs, "float32")), wanted)
    model = keras.Sequential([keras.Input((16,)), wrapper])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(floats(4, 16), floats(4, 8), verbose=0)
    assert np.all(np.isfinite(to_numpy(ops.cast(ops.convert_to_tensor(latent), "float32"))))
    converted = qi.convert_to_inferable(model)
    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    for first, second in zip(
        wrapper.get_codes()["kernel"], converted.layers[0].get_codes()["kernel"], strict=True
    ):
        np.testing.assert_array_equal(first, second)
    x = floats(2, 16)
    expected = to_numpy(ops.cast(model(x), "float32"))
    for each in (converted, reloaded):
        np.testing.assert_array_equal(to_numpy(ops.cast(each(x), "float32")), expected)


class OwnCall(layers.Layer):
    """Says nothing of its outputs: Keras finds out by running `call`."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], 2), name="kernel")

    def call(self, inputs):
        return ops.matmul(inputs, self.kernel)


MADE = {
    "Flatten": layers.Flatten,
    "Reshape": lambda **options: layers.Reshape((3, 2), **options),
    "Permute": lambda **options: layers.Permute((2, 1), **options),
    "Identity": layers.Identity,
    "Cropping1D": lambda **options: layers.Cropping1D((1, 0), **options),
    "Dropout": lambda **options: layers.Dropout(0.5, **options),
    "Softmax": layers.Softmax,
    "Conv1D": lambda **options: layers.Conv1D(2, 1, **options),
    "LSTM": lambda **options: layers.LSTM(2, recurrent_initializer="zeros", **options),
    "LayerNormalization": layers.LayerNormalization,
    "Add": layers.Add,
    "Attention": layers.Attention,
    "of a user": OwnCall,
}


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32", "bfloat16"])
@pytest.mark.parametrize("name", MADE)
def test_the_symbolic_dtype_is_that_of_a_call(name, policy):
    """For inputs of a dtype that is not the layer's, as a wrapper hands them on."""
    bare, layer = (MADE[name](dtype=policy) for _ in range(2))
    several = name in ("Add", "Attention")
    for dtype in ("float32", "float16"):
        inputs = keras.Input((2, 3), dtype=dtype)
        x = np.ones((1, 2, 3), dtype)
        symbolic = Wrapper(layer)([inputs, inputs] if several else inputs)
        real = Wrapper(layer)([x, x] if several else x)
        # On torch Keras traces such a layer in float32, whatever its policy.
        if not (name == "of a user" and keras.backend.backend() == "torch"):
            assert symbolic.dtype == keras.backend.standardize_dtype(real.dtype)
        assert symbolic.dtype == bare([inputs, inputs] if several else inputs).dtype


def test_a_model_declares_the_dtypes_that_it_computes(global_policy):
    global_policy("mixed_float16")
    inputs = keras.Input((2, 3))
    x = layers.Flatten()(layers.Conv1D(2, 1)(inputs))
    model = keras.Model(inputs, [layers.Permute((2, 1))(inputs), layers.Reshape((4, 1))(x)])
    data = floats(4, 2, 3)
    for each in (model, qi.quantize_model(model, "w8a8", data, verbose=0)):
        declared = [output.dtype for output in each.outputs]
        assert declared == [keras.backend.standardize_dtype(y.dtype) for y in each(data)]
        assert declared == ["float16", "float16"]
