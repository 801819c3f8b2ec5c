"""Back to plain Keras: the layers of a quantized model, with their dequantized weights."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops
from layer_cases import CASES, Composite, activation, fixed, floats, weight

import keras_qwrap as qi
from keras_qwrap.layers.owner import QuantizingLayer, observed
from keras_qwrap.models.convert import unwrap_model

Wrapper, Holder = qi.KerasQuantizationWrapper, qi.KerasActivationQuantizationHolder


def to_numpy(tensor):
    return np.array(ops.convert_to_numpy(tensor))


def same_outputs(model, other, x):
    keras.tree.map_structure(
        lambda a, b: np.testing.assert_array_equal(to_numpy(a), to_numpy(b)), model(x), other(x)
    )


def narrow(w, bits):
    """Reference: symmetric, a scale for each index of the last axis, taken from the weight."""
    highest = 2 ** (bits - 1) - 1
    largest = np.max(np.abs(w), axis=tuple(range(w.ndim - 1)), keepdims=True)
    scale = np.maximum(largest, np.float32(2.0**-16)) * np.float32(1 / highest)
    return np.round(w / scale) * scale


def convolutional(activations):
    """A shared layer, nested models of both kinds, dropout, batch normalization."""

    def quantizer():
        return activation(2.0, 3) if activations else None

    def held(x, name):
        return Holder(activation(2.0, 3), name=name)(x) if activations else x

    inputs = keras.Input((6, 6, 2), name="image")
    conv = Wrapper(
        layers.Conv2D(2, 3, padding="same", name="conv", bias_initializer="normal"),
        {"kernel": weight(4)},
        quantizer(),
    )
    hidden = conv(conv(held(inputs, "held")))
    hidden = Wrapper(layers.BatchNormalization(name="norm"), {"gamma": fixed(2.0)})(hidden)
    hidden = layers.Dropout(0.5, name="drop", seed=3)(layers.Flatten(name="flat")(hidden))
    inner_inputs = keras.Input((72,), name="inner_image")
    dense = Wrapper(layers.Dense(3, name="dense"), {"kernel": weight(3)})(inner_inputs)
    functional = keras.Model(inner_inputs, held(dense, "inner_held"), name="functional")
    sequential = [Wrapper(layers.Dense(3, name="head"), {"kernel": weight(3)}, quantizer())]
    if activations:
        sequential = [Holder(activation(2.0, 3), name="first"), *sequential]
    sequential = keras.Sequential(
        [keras.Input((3,)), *sequential, layers.Dense(2, name="float")], name="sequential"
    )
    hidden = layers.Rescaling(0.5)(layers.Activation("tanh")(functional(hidden)))
    outputs = sequential(hidden)
    return keras.Model(inputs, held(outputs, "last"), name="whole")


def trained(activations=False):
    model = convolutional(activations)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    model.fit(floats(4, 6, 6, 2), floats(4, 2), verbose=0)
    return model


def wrapped_layers(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, QuantizingLayer)]


@pytest.mark.parametrize("converted", [False, True])
def test_without_activations_the_outputs_are_the_same(converted):
    model, x = trained(), floats(4, 6, 6, 2, seed=2)
    plain = unwrap_model(qi.convert_to_inferable(model) if converted else model)
    same_outputs(plain, model, x)
    np.testing.assert_array_equal(plain.predict(x, verbose=0), model.predict(x, verbose=0))


def test_weights_are_dequantized_and_the_others_as_they_are():
    model = trained(activations=True)
    plain = unwrap_model(model)
    conv, was = plain.get_layer("conv"), model.get_layer("conv").layer
    np.testing.assert_array_equal(to_numpy(conv.kernel), narrow(to_numpy(was.kernel), 4))
    assert not np.array_equal(to_numpy(conv.kernel), to_numpy(was.kernel))
    np.testing.assert_array_equal(to_numpy(conv.bias), to_numpy(was.bias))
    assert np.any(to_numpy(conv.bias) != 0)
    norm, was = plain.get_layer("norm"), model.get_layer("norm").layer
    gamma = np.clip(np.round(to_numpy(was.gamma) * np.float32(64)), -128, 127) / np.float32(64)
    np.testing.assert_array_equal(to_numpy(norm.gamma), gamma)
    np.testing.assert_array_equal(to_numpy(norm.moving_mean), to_numpy(was.moving_mean))
    assert np.any(to_numpy(norm.moving_mean) != 0)
    for outer, inner in (("functional", "dense"), ("sequential", "head")):
        got = to_numpy(plain.get_layer(outer).get_layer(inner).kernel)
        was = to_numpy(model.get_layer(outer).get_layer(inner).layer.kernel)
        np.testing.assert_array_equal(got, narrow(was, 3))
    state = to_numpy(plain.get_layer("drop").seed_generator.state)
    np.testing.assert_array_equal(state, to_numpy(model.get_layer("drop").seed_generator.state))
    assert state[1] != 0


def test_activation_quantizers_are_dropped():
    """The outputs are those of the float model with quantized weights, no longer the model's."""
    model, x = trained(activations=True), floats(4, 6, 6, 2, seed=2)
    plain = unwrap_model(model)
    assert not np.array_equal(to_numpy(plain(x)), to_numpy(model(x)))
    with observed(model, lambda quantizer, tensor: tensor):
        same_outputs(plain, model, x)


def test_only_plain_layers_are_left_and_names_are_kept():
    model = trained(activations=True)
    plain = unwrap_model(model)
    assert wrapped_layers(plain) == []
    assert "keras_qwrap" not in json.dumps(keras.saving.serialize_keras_object(plain))
    holders = {"held", "inner_held", "first", "last"}
    for new, old in (
        (plain, model),
        (plain.get_layer("functional"), model.get_layer("functional")),
        (plain.get_layer("sequential"), model.get_layer("sequential")),
    ):
        assert [each.name for each in new.layers] == [
            each.name for each in old.layers if each.name not in holders
        ]
        assert type(new) is type(old)
        assert new.name == old.name
    assert isinstance(plain.get_layer("conv"), layers.Conv2D)
    assert len(plain.get_layer("conv")._inbound_nodes) == 2
    assert plain.inputs[0].name == "image"


def test_the_given_model_is_left_as_it_is():
    model, x = trained(activations=True), floats(4, 6, 6, 2, seed=2)
    before, config = to_numpy(model(x)), json.dumps(model.get_config(), default=str)
    weights = model.get_weights()
    plain = unwrap_model(model)
    mine = {id(part) for part in (*model._flatten_layers(), *model.variables)}
    assert not any(id(part) in mine for part in (*plain._flatten_layers(), *plain.variables))
    for variable in plain.trainable_variables:
        variable.assign(np.zeros(variable.shape, "float32"))
    np.testing.assert_array_equal(to_numpy(model(x)), before)
    assert json.dumps(model.get_config(), default=str) == config
    for old, new in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_plain_model_trains_and_keeps_its_compile_settings():
    model = trained()
    plain = unwrap_model(model)
    assert plain.loss == "mse"
    assert type(plain.optimizer) is type(model.optimizer)
    assert plain.optimizer.get_config() == model.optimizer.get_config()
    before = to_numpy(plain.get_layer("conv").kernel)
    plain.fit(floats(4, 6, 6, 2), floats(4, 2), verbose=0)
    assert not np.array_equal(to_numpy(plain.get_layer("conv").kernel), before)


def flags(model):
    return [(layer.name, layer.trainable) for layer in model._flatten_layers() if layer.weights]


@pytest.mark.slow
def test_what_conversion_froze_can_be_trained_again():
    """Quantized again, it trains as the first time; what the user froze stays frozen."""
    model = trained(activations=True)
    model.get_layer("sequential").get_layer("float").trainable = False
    converted = qi.convert_to_inferable(model)
    assert converted.trainable_variables == []
    plain = unwrap_model(converted)
    assert flags(plain) == flags(unwrap_model(model))
    assert [name for name, flag in flags(plain) if not flag] == ["float"]
    again = qi.quantize_model(plain, "w8")
    again.compile("sgd", "mse")
    before = to_numpy(again.get_layer("conv").layer.kernel)
    again.fit(floats(4, 6, 6, 2), floats(4, 2), verbose=0)
    assert not np.array_equal(to_numpy(again.get_layer("conv").layer.kernel), before)


def test_a_nested_model_that_the_user_froze_stays_frozen():
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(3, name="in")], name="inner")
    inner.trainable = False
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.Dense(2, name="out")(inner(inputs)))
    converted = qi.convert_to_inferable(qi.quantize_model(model, "w8"))
    assert flags(unwrap_model(converted)) == flags(model)


def test_an_output_of_a_holder_gets_the_name_of_the_layer_before():
    inputs = keras.Input((3,))
    held = Holder(activation(1.0, 2), name="held")(layers.Dense(2, name="dense")(inputs))
    model = keras.Model(inputs, held)
    assert model.output_names == ["held"]
    assert unwrap_model(model).output_names == ["dense"]


def test_nothing_wrapped_gives_an_equal_copy():
    model = keras.Sequential([keras.Input((5,)), Composite(0.5), layers.Dense(2)], name="same")
    with pytest.warns(UserWarning, match="nothing is quantized"):
        plain = unwrap_model(model)
    assert json.dumps(plain.get_config()) == json.dumps(model.get_config())
    for old, new in zip(model.variables, plain.variables, strict=True):
        assert old is not new
        np.testing.assert_array_equal(to_numpy(old), to_numpy(new))
    same_outputs(plain, model, floats(2, 5))


def is_array(value):
    return isinstance(value, np.ndarray)


def as_model(layer, case):
    """A Functional model of one layer, and the arrays to call it with."""
    arguments = (case.inputs, case.call)
    symbols = keras.tree.map_structure(
        lambda x: keras.Input(batch_shape=x.shape, dtype=x.dtype.name) if is_array(x) else x,
        arguments,
    )
    flat = zip(keras.tree.flatten(arguments), keras.tree.flatten(symbols), strict=True)
    pairs = [(array, symbol) for array, symbol in flat if is_array(array)]
    outputs = layer(*symbols[0], **symbols[1])
    return keras.Model([symbol for _, symbol in pairs], outputs), [array for array, _ in pairs]


@pytest.mark.parametrize("case", [c for c in CASES if c.weights], ids=lambda case: case.name)
def test_every_layer(case):
    wrapper = Wrapper(case.layer(), case.own_weights())
    model, x = as_model(wrapper, case)
    plain = unwrap_model(model)
    assert type(plain.get_layer(wrapper.name)) is type(wrapper.layer)
    assert wrapped_layers(plain) == []
    same_outputs(plain, model, x)
    expected = [to_numpy(variable) for variable in wrapper.layer.weights]
    quantized = wrapper.get_quantized_weights()
    for path in quantized:
        found = [v is wrapper.latent_weight(path) for v in wrapper.layer.weights]
        expected[found.index(True)] = quantized[path]
    for got, wanted in zip(plain.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_renamed_wrapper_keeps_its_name():
    wrapper = Wrapper(layers.Dense(3, name="inner"), {"kernel": weight(3)}, name="outer")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, wrapper(inputs, training=False))
    plain = unwrap_model(model)
    assert plain.get_layer("outer").get_config()["name"] == "outer"
    same_outputs(plain, model, floats(2, 4))


def test_a_wrapped_wrapper():
    """The outer one quantizes the bias, the inner one the kernel."""
    inner = Wrapper(layers.Dense(3, bias_initializer="normal"), {"kernel": weight(3)})
    outer = Wrapper(inner, {"layer/bias": weight(2, per_channel=False)})
    model = keras.Sequential([keras.Input((4,)), outer])
    plain = unwrap_model(model)
    kernel = to_numpy(inner.layer.kernel)
    np.testing.assert_array_equal(to_numpy(plain.layers[0].kernel), narrow(kernel, 3))
    same_outputs(plain, model, floats(2, 4))


def test_disabled_quantizer_leaves_the_weight_in_float():
    config = qi.TrainableQuantizerWeightsConfig(
        qi.QuantizationMethod.SYMMETRIC, 2, enable_weights_quantization=False
    )
    wrapper = Wrapper(layers.Dense(3), {"kernel": qi.STEWeightQATQuantizer(config)})
    plain = unwrap_model(keras.Sequential([keras.Input((4,)), wrapper]))
    np.testing.assert_array_equal(to_numpy(plain.layers[0].kernel), to_numpy(wrapper.layer.kernel))


def test_models_of_holders_alone():
    """A Sequential model without layers would not be built; in a Functional one it is passed."""
    inputs, x = keras.Input((3,)), floats(2, 3)
    held = Holder(activation(1.0, 2), name="held")(inputs=inputs)
    functional = keras.Model(inputs, layers.Identity()(held))
    sequential = keras.Sequential([keras.Input((3,)), Holder(activation(1.0, 2))])
    nested = keras.Sequential([keras.Input((3,)), sequential, layers.Dense(2)])
    for model in (functional, sequential):
        np.testing.assert_array_equal(to_numpy(unwrap_model(model)(x)), x)
        assert not np.array_equal(to_numpy(model(x)), x)
    kernel = to_numpy(nested.layers[1].kernel)
    np.testing.assert_allclose(to_numpy(unwrap_model(nested)(x)), x @ kernel, rtol=1e-5)


def test_masks_pass_where_a_holder_was():
    inputs = keras.Input((4,), dtype="int32")
    hidden = layers.Embedding(5, 3, mask_zero=True)(inputs)
    hidden = Holder(activation(8.0, 16))(hidden)
    model = keras.Model(inputs, layers.GlobalAveragePooling1D()(hidden))
    x = np.array([[1, 2, 0, 0], [3, 0, 0, 0]], "int32")
    plain = unwrap_model(model)
    table = to_numpy(plain.layers[1].embeddings)
    expected = np.stack([(table[1] + table[2]) / np.float32(2), table[3]])
    np.testing.assert_allclose(to_numpy(plain(x)), expected, rtol=1e-6)


def test_mixed_precision():
    dense = layers.Dense(3, dtype="mixed_bfloat16")
    model = keras.Sequential([keras.Input((4,)), Wrapper(dense, {"kernel": weight(4)})])
    plain = unwrap_model(model)
    assert plain.layers[0].dtype_policy.name == "mixed_bfloat16"
    np.testing.assert_array_equal(
        to_numpy(plain.layers[0].kernel), narrow(to_numpy(dense.kernel), 4)
    )
    x = floats(2, 4)
    got, expected = (to_numpy(ops.cast(each(x), "float32")) for each in (plain, model))
    np.testing.assert_array_equal(got, expected)


def off_its_grid():
    model = qi.convert_to_inferable(
        keras.Sequential([keras.Input((3,)), Wrapper(layers.Dense(2), {"kernel": weight()})])
    )
    model.layers[0].latent_weight("kernel").assign(floats(3, 2))
    return model


def wrapper_inside():
    inner = Wrapper(layers.Dense(2), {"kernel": weight()})
    return keras.Sequential([keras.Input((4, 3)), layers.TimeDistributed(inner)])


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: layers.Dense(2), TypeError, "expected a Keras model"),
        (lambda: None, TypeError, "expected a Keras model"),
        (lambda: keras.Sequential([layers.Dense(2)]), ValueError, "pass an Input first"),
        (wrapper_inside, ValueError, r"TimeDistributed with \['dense.*Wrap the outer layer"),
        (off_its_grid, ValueError, "not on the grid of 'kernel'"),
    ],
)
def test_what_cannot_be_unwrapped_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        unwrap_model(make())


LOAD = """
import json, sys
sys.modules["keras_qwrap"] = None
import keras, numpy
x = numpy.load("inputs.npy")
for ending in ("keras", "h5"):
    model = keras.models.load_model(f"model.{ending}", compile=False)
    numpy.save(f"{ending}.npy", model.predict(x, verbose=0))
"""


@pytest.mark.slow
def test_a_process_without_the_package_loads_it(tmp_path):
    x = floats(4, 6, 6, 2, seed=2)
    plain = unwrap_model(trained(activations=True))
    np.save(tmp_path / "inputs.npy", x)
    for ending in ("keras", "h5"):
        plain.save(tmp_path / f"model.{ending}")
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        cwd=tmp_path,
        env=os.environ | {"KERAS_BACKEND": keras.backend.backend()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = plain.predict(x, verbose=0)
    assert len(np.unique(expected)) > 4
    for ending in ("keras", "h5"):
        np.testing.assert_array_equal(np.load(tmp_path / f"{ending}.npy"), expected)
