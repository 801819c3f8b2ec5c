"""The wrapper as a layer: where it can stand, how it is called, what it looks like to Keras."""

import copy
import json

import keras
import numpy as np
import pytest
from keras import layers, ops
from layer_cases import Composite, activation, fixed, floats, register, weight

import keras_qwrap as qi

Wrapper = qi.KerasQuantizationWrapper


def to_numpy(tensor):
    return np.array(ops.convert_to_numpy(tensor))


def wrapped_dense(units=3, bits=4, **kwargs):
    return Wrapper(layers.Dense(units, **kwargs), {"kernel": weight(bits)}, activation())


def narrow_codes(kernel, bits):
    """Codes of a kernel whose channels are columns, by the formula of the docs, in numpy."""
    highest = 2 ** (bits - 1) - 1
    scale = np.abs(kernel).max(0, keepdims=True) * np.float32(1 / highest)
    return np.round(kernel / scale).astype(np.int32), scale


def test_quantized_dense_is_the_numpy_formula():
    kernel = floats(4, 3)
    wrapper = Wrapper(layers.Dense(3), {"kernel": weight(4)})
    wrapper.build((None, 4))
    wrapper.latent_weight("kernel").assign(kernel)
    codes, scale = narrow_codes(kernel, 4)
    got_codes, got_scale, zero_point = wrapper.get_codes()["kernel"]
    np.testing.assert_array_equal(got_codes, codes)
    np.testing.assert_array_equal(got_scale, scale)
    assert np.all(zero_point == 0)
    assert (got_codes.dtype, got_scale.dtype, zero_point.dtype) == (np.int32, np.float32, np.int32)
    quantized = wrapper.get_quantized_weights()["kernel"]
    np.testing.assert_array_equal(quantized, codes.astype("float32") * scale, strict=True)
    np.testing.assert_array_equal(to_numpy(wrapper(np.eye(4, dtype="float32"))), quantized)
    np.testing.assert_array_equal(to_numpy(wrapper.layer.kernel), kernel)


def test_shared_layer_called_twice_has_one_set_of_weights():
    wrapper = wrapped_dense(4)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, wrapper(wrapper(inputs)))
    x = floats(2, 4)
    np.testing.assert_array_equal(to_numpy(model(x)), to_numpy(wrapper(wrapper(x))))
    assert len(model.weights) == len(wrapper.weights)


def test_wrapper_in_wrapper():
    """The outer wrapper quantizes the bias, the inner one the kernel; both show."""
    inner = Wrapper(layers.Dense(3, bias_initializer="normal"), {"kernel": weight(3)})
    outer = Wrapper(inner, {"layer/bias": fixed(0.25, 2)})
    got = to_numpy(outer(floats(2, 4)))
    kernel = inner.get_quantized_weights()["kernel"]
    bias = np.clip(np.round(to_numpy(inner.layer.bias) / 0.125), -2, 1) * np.float32(0.125)
    bare = layers.Dense(3)
    bare.build((None, 4))
    bare.set_weights([kernel, bias])
    np.testing.assert_array_equal(got, to_numpy(bare(floats(2, 4))))
    assert len(np.unique(bias)) > 1


def test_a_weight_is_quantized_by_one_wrapper_only():
    inner = Wrapper(layers.Dense(3), {"kernel": weight(3)}, name="inner")
    with pytest.raises(ValueError, match="wrapper 'inner' inside quantizes already"):
        Wrapper(inner, {"layer/kernel": weight(2)})(floats(2, 4))


def test_wrapper_inside_time_distributed():
    layer = layers.TimeDistributed(wrapped_dense())
    model = keras.Sequential([keras.Input((4, 2)), layer])
    x = floats(2, 4, 2)
    each = np.stack([to_numpy(layer.layer(x[:, i])) for i in range(4)], 1)
    np.testing.assert_array_equal(to_numpy(model(x)), each)


@register
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = Wrapper(layers.Dense(4, activation="relu"), {"kernel": weight(4)})
        self.second = wrapped_dense(2)

    def call(self, inputs):
        return self.second(self.first(inputs))


def _sequential():
    return keras.Sequential([keras.Input((3,)), wrapped_dense(4), wrapped_dense(2)])


def _nested():
    inputs = keras.Input((3,))
    return keras.Model(inputs, layers.Dense(2)(_sequential()(inputs)))


@pytest.mark.slow
@pytest.mark.parametrize("make", [Subclassed, _sequential, _nested])
def test_models_train_save_and_reload(make, tmp_path):
    model = make()
    x, y = floats(4, 3), floats(4, 2)
    model.compile("adam", "mse")
    before = [to_numpy(v) for v in (model(x), model.trainable_variables)[1]]
    model.fit(x, y, verbose=0)
    moved = [
        not np.array_equal(a, to_numpy(b))
        for a, b in zip(before, model.trainable_variables, strict=True)
    ]
    assert all(moved)
    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(reloaded(x)), to_numpy(model(x)))
    np.testing.assert_array_equal(
        reloaded.predict(x, verbose=0), model.predict(x, verbose=0), strict=True
    )


def _fit(**compile_arguments):
    keras.utils.set_random_seed(1)
    model = _sequential()
    model.compile(keras.optimizers.SGD(0.25), "mse", **compile_arguments)
    model.fit(floats(8, 3), floats(8, 2, seed=1), batch_size=4, epochs=2, shuffle=False, verbose=0)
    return model


@pytest.mark.tensorflow
def test_eager_graph_and_xla_give_the_same_codes():
    """The identity matrix as input shows the quantized kernel itself, without a sum."""
    kernel = floats(64, 32)
    wrapper = Wrapper(layers.Dense(32, use_bias=False), {"kernel": weight(5)}, activation(2.0, 12))
    model = keras.Sequential([keras.Input((64,)), wrapper])
    wrapper.latent_weight("kernel").assign(kernel)
    codes, scale = narrow_codes(kernel, 5)
    output_scale = np.float32(2.0 / 2**11)
    expected = np.clip(np.round(codes * scale / output_scale), -(2**11), 2**11 - 1) * output_scale
    for arguments in ({"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}):
        model.compile(**arguments)
        got = model.predict(np.eye(64, dtype="float32"), batch_size=64, verbose=0)
        np.testing.assert_array_equal(got, expected)


def test_eager_and_compiled_outputs_are_the_same():
    model = _sequential()
    expected = to_numpy(model(floats(8, 3)))
    model.compile(jit_compile=False)
    np.testing.assert_array_equal(model.predict(floats(8, 3), verbose=0), expected)


def test_training_is_the_same_eager_and_compiled():
    """Same codes; the float weights may differ in their last bits."""
    models = [_fit(run_eagerly=True), _fit(jit_compile=False)]
    codes = [[layer.get_codes()["kernel"][0] for layer in model.layers] for model in models]
    for first, second in zip(*codes, strict=True):
        np.testing.assert_array_equal(first, second)


def test_shapes_and_specs_are_the_layers():
    bare = layers.Conv2D(4, 3, strides=2, dtype="float16")
    wrapper = Wrapper(bare, {"kernel": weight()}, activation())
    assert wrapper.compute_output_shape((None, 9, 9, 3)) == (None, 4, 4, 4)
    spec = wrapper.compute_output_spec(keras.KerasTensor((2, 9, 9, 3), "float16"))
    assert (spec.shape, spec.dtype) == ((2, 4, 4, 4), "float16")
    assert not wrapper.built


def test_several_outputs_keep_their_structure():
    layer = layers.LSTM(3, return_state=True)
    outputs = Wrapper(layer, {}, [activation(), activation(), activation()])(
        keras.KerasTensor((None, 4, 2))
    )
    assert [tuple(output.shape) for output in outputs] == [(None, 3)] * 3


def test_name_is_the_layers_and_can_be_set():
    model = keras.Sequential([keras.Input((3,)), Wrapper(layers.Dense(2, name="head"))])
    assert model.get_layer("head") is model.layers[0]
    assert Wrapper(layers.Dense(2, name="head"), name="other").name == "other"
    lines = []
    model.summary(print_fn=lambda line, **_: lines.append(line))
    assert "head" in "".join(lines)


def test_parameters_are_counted_once():
    wrapper = Wrapper(layers.Dense(3), {"kernel": weight()}, activation())
    wrapper.build((None, 4))
    assert wrapper.count_params() == 4 * 3 + 3 + 1
    assert len(wrapper.trainable_weights) == 2
    assert len({variable.path for variable in wrapper.variables}) == len(wrapper.variables)


def test_trainable_flags_are_the_layers_and_survive_saving(tmp_path):
    model = keras.Sequential([keras.Input((3,)), wrapped_dense(), wrapped_dense(trainable=False)])
    assert [len(layer.trainable_weights) for layer in model.layers] == [2, 0]
    model.layers[0].trainable = False
    assert model.trainable_weights == []
    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")
    assert reloaded.trainable_weights == []
    reloaded.layers[0].trainable = True
    assert len(reloaded.trainable_weights) == 2


def test_clone_model_and_json_rebuild_the_wrapper():
    model = _sequential()
    rebuilt = keras.models.model_from_json(model.to_json())
    for copied in (keras.models.clone_model(model), rebuilt):
        copied.set_weights(model.get_weights())
        x = floats(2, 3)
        np.testing.assert_array_equal(to_numpy(copied(x)), to_numpy(model(x)))
        first, second = copied.layers[0].get_config(), model.layers[0].get_config()
        assert json.dumps(first, default=str) == json.dumps(second, default=str)
        assert not copied.layers[0].owns(model.layers[0].weights_quantizers["kernel"])


def test_deepcopy_stands_alone():
    wrapper = wrapped_dense()
    before = to_numpy(wrapper(floats(2, 4)))
    twin = copy.deepcopy(wrapper)
    np.testing.assert_array_equal(to_numpy(twin(floats(2, 4))), before)
    twin.latent_weight("kernel").assign(floats(4, 3))
    np.testing.assert_array_equal(to_numpy(wrapper(floats(2, 4))), before)
    assert not np.array_equal(to_numpy(twin(floats(2, 4))), before)


@register
class Shapes(qi.BaseKerasTrainableQuantizer):
    """Leaves activations as they are and remembers the shape it was initialized with."""

    def __init__(self, quantization_config):
        super().__init__(
            quantization_config, qi.QuantizationTarget.Activation, [qi.QuantizationMethod.UNIFORM]
        )

    def initialize_quantization(self, tensor_shape, name, layer):
        self.seen = (tensor_shape, name, layer)
        scale = layer.add_weight("scale", shape=tensor_shape[-1], trainable=False)
        return {"scale": scale}

    def __call__(self, inputs):
        return inputs


def _shapes():
    config = qi.TrainableQuantizerActivationConfig(qi.QuantizationMethod.UNIFORM)
    return Shapes(config)


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (lambda: layers.Conv2D(4, 3), (None, 8, 7, 3), [(None, 6, 5, 4)]),
        (lambda: layers.Dense(2), (5, 3), [(5, 2)]),
        (lambda: layers.LSTM(3, return_state=True), (None, 4, 2), [(None, 3)] * 3),
        (lambda: Composite(), (None, 5), [(None, 2)]),
    ],
)
def test_activation_quantizers_get_the_real_output_shapes(layer, shape, expected):
    quantizers = [_shapes() for _ in expected]
    wrapper = Wrapper(layer(), {}, quantizers)
    wrapper.build(shape)
    assert [q.seen for q in quantizers] == [
        (shape, f"output_{i}", wrapper) for i, shape in enumerate(expected)
    ]


def test_disabled_quantizer_leaves_the_weight_in_float():
    config = qi.TrainableQuantizerWeightsConfig(
        qi.QuantizationMethod.SYMMETRIC, 2, enable_weights_quantization=False
    )
    wrapper = Wrapper(layers.Dense(3), {"kernel": qi.STEWeightQATQuantizer(config)})
    got = to_numpy(wrapper(floats(2, 4)))
    np.testing.assert_array_equal(got, to_numpy(wrapper.layer(floats(2, 4))))
    assert wrapper.get_codes() == {}
    converted = wrapper.convert_to_inferable_quantizers()
    np.testing.assert_array_equal(to_numpy(converted(floats(2, 4))), got)


def test_quantizers_are_counted():
    wrapper = Wrapper(layers.Dense(3), {"kernel": weight()})
    assert (wrapper.is_weights_quantization, wrapper.num_weights_quantizers) == (True, 1)
    assert (wrapper.is_activation_quantization, wrapper.num_activation_quantizers) == (False, 0)
    wrapper.add_weights_quantizer("bias", fixed())
    assert wrapper.num_weights_quantizers == 2
    holder = Wrapper(layers.Dense(3), activation_quantizers=[activation()])
    assert (holder.is_weights_quantization, holder.num_weights_quantizers) == (False, 0)
    assert (holder.is_activation_quantization, holder.num_activation_quantizers) == (True, 1)


@pytest.mark.parametrize("method", ["MultiHead", "LSTM"])
def test_outputs_that_the_call_decides(method, tmp_path):
    """Built by a call whose arguments decide the number of outputs; the file remembers it."""
    quantizers = [activation(4.0), activation(1.0)]
    if method == "MultiHead":
        wrapper = Wrapper(layers.MultiHeadAttention(1, 2), {"query/kernel": weight()}, quantizers)
        inputs = [keras.Input((3, 4)), keras.Input((3, 4))]
        outputs = wrapper(*inputs, return_attention_scores=True)
        x = [floats(2, 3, 4), floats(2, 3, 4, seed=1)]
    else:
        layer = layers.LSTM(2, return_state=True, return_sequences=True)
        wrapper = Wrapper(layer, {"cell/kernel": weight()}, [*quantizers, activation(2.0)])
        inputs = [keras.Input((3, 4))]
        outputs = wrapper(*inputs)
        x = [floats(2, 3, 4)]
    model = keras.Model(inputs, outputs)
    expected = [to_numpy(y) for y in model(x)]
    for path in (tmp_path / "model.keras", tmp_path / "model.h5"):
        model.save(path)
        reloaded = keras.models.load_model(path, compile=False)
        for got, wanted in zip(reloaded(x), expected, strict=True):
            np.testing.assert_array_equal(to_numpy(got), wanted)
    converted = wrapper.convert_to_inferable_quantizers()
    kwargs = {"return_attention_scores": True} if method == "MultiHead" else {}
    for got, wanted in zip(converted(*x, **kwargs), expected, strict=True):
        np.testing.assert_array_equal(to_numpy(got), wanted)


def test_a_reloaded_weight_is_found_by_the_same_path(tmp_path):
    """The wrapper builds its layer in both cases, so that a layout by path fits in both."""
    wrapper = wrapped_dense(name="conv")
    model = keras.Sequential([keras.Input((4,)), wrapper])
    model.save(tmp_path / "model.keras")
    (again,) = keras.models.load_model(tmp_path / "model.keras").layers
    assert wrapper.layer.kernel.path.endswith("conv/conv/kernel")
    assert again.layer.kernel.path.endswith("conv/conv/kernel")
