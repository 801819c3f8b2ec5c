"""Conversion for inference: of wrappers, and of whole models."""

import json
from contextlib import nullcontext

import keras
import numpy as np
import pytest
from keras import layers, ops
from layer_cases import Composite, activation, fixed, floats, weight
from reference import traced_operations

import keras_qwrap as qi

Wrapper = qi.KerasQuantizationWrapper


def to_numpy(tensor):
    return np.array(ops.convert_to_numpy(tensor))


def convolutional():
    """Wrappers, a holder, a shared layer, a nested Sequential, dropout, batch normalization."""
    inputs = keras.Input((6, 6, 2), name="image")
    held = qi.KerasActivationQuantizationHolder(activation(4.0), name="held")(inputs)
    conv = Wrapper(layers.Conv2D(2, 3, padding="same", name="conv"), {"kernel": weight(4)})
    hidden = conv(conv(held))
    hidden = Wrapper(layers.BatchNormalization(name="norm"), {"gamma": fixed(2.0)})(hidden)
    hidden = layers.Dropout(0.5, name="drop", seed=3)(layers.Flatten(name="flat")(hidden))
    nested = keras.Sequential(
        [
            keras.Input((72,)),
            Wrapper(layers.Dense(3, name="head"), {"kernel": weight(3)}, activation()),
            layers.Dense(2, name="float"),
        ],
        name="nested",
    )
    return keras.Model(inputs, nested(hidden), name="whole")


def trained():
    model = convolutional()
    model.compile(keras.optimizers.SGD(0.05), "mse")
    model.fit(floats(4, 6, 6, 2), floats(4, 2), verbose=0)
    return model


def names(model):
    return [layer.name for layer in model._flatten_layers()]


def test_converted_model_gives_the_same_bits_and_leaves_the_original_as_it_is():
    """On JAX, training has donated buffers by then."""
    model, x = trained(), floats(4, 6, 6, 2, seed=2)
    predicted, called = model.predict(x, verbose=0), to_numpy(model(x))
    weights, config = model.get_weights(), json.dumps(model.get_config(), default=str)
    trainable = [variable.path for variable in model.trainable_variables]
    converted = qi.convert_to_inferable(model)
    np.testing.assert_array_equal(converted.predict(x, verbose=0), predicted)
    np.testing.assert_array_equal(to_numpy(converted(x)), called)
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(after, before)
    assert json.dumps(model.get_config(), default=str) == config
    assert [variable.path for variable in model.trainable_variables] == trainable
    np.testing.assert_array_equal(model.predict(x, verbose=0), predicted)
    model.fit(x, floats(4, 2), verbose=0)
    assert not np.array_equal(to_numpy(model(x)), called)
    np.testing.assert_array_equal(to_numpy(converted(x)), called)


def test_converted_model_shares_no_object():
    model = trained()
    converted = qi.convert_to_inferable(model)
    mine = {id(layer) for layer in model._flatten_layers()}
    assert not any(id(layer) in mine for layer in converted._flatten_layers())
    mine = {id(variable) for variable in model.variables}
    assert not any(id(variable) in mine for variable in converted.variables)
    quantizers = [*model.get_layer("conv").weights_quantizers.values()]
    for quantizer in converted.get_layer("conv").weights_quantizers.values():
        assert isinstance(quantizer, qi.BaseKerasInferableQuantizer)
        assert quantizer not in quantizers


def test_names_sharing_and_structure_are_kept():
    model = trained()
    converted = qi.convert_to_inferable(model)
    assert type(converted) is type(model)
    assert names(converted) == names(model)
    assert [tensor.name for tensor in converted.inputs] == ["image"]
    assert len(converted.get_layer("conv")._inbound_nodes) == 2
    assert sum(layer.name == "conv" for layer in converted.layers) == 1
    assert type(converted.get_layer("nested")) is keras.Sequential


def test_converting_twice_gives_an_equal_model():
    model, x = trained(), floats(4, 6, 6, 2, seed=2)
    once = qi.convert_to_inferable(model)
    twice = qi.convert_to_inferable(once)
    assert json.dumps(twice.get_config(), default=str) == json.dumps(once.get_config(), default=str)
    for first, second in zip(once.get_weights(), twice.get_weights(), strict=True):
        np.testing.assert_array_equal(first, second, strict=True)
    np.testing.assert_array_equal(to_numpy(twice(x)), to_numpy(once(x)))


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_converted_model_reloads(ending, tmp_path):
    model, x = trained(), floats(4, 6, 6, 2, seed=2)
    converted = qi.convert_to_inferable(model)
    converted.save(tmp_path / f"model.{ending}")
    reloaded = keras.models.load_model(tmp_path / f"model.{ending}", compile=False)
    np.testing.assert_array_equal(to_numpy(reloaded(x)), to_numpy(model(x)))
    codes = reloaded.get_layer("conv").get_codes()["kernel"]
    for first, second in zip(codes, model.get_layer("conv").get_codes()["kernel"], strict=True):
        np.testing.assert_array_equal(first, second, strict=True)


def test_seed_states_and_statistics_are_copied():
    model = trained()
    converted = qi.convert_to_inferable(model)
    drop, norm = (converted.get_layer(name) for name in ("drop", "norm"))
    state = to_numpy(drop.seed_generator.state)
    np.testing.assert_array_equal(state, to_numpy(model.get_layer("drop").seed_generator.state))
    assert state[1] != 0
    for name in ("moving_mean", "moving_variance"):
        got = to_numpy(getattr(norm.layer, name))
        np.testing.assert_array_equal(got, to_numpy(getattr(model.get_layer("norm").layer, name)))
        assert len(np.unique(got)) > 1


def test_sequential_and_layers_without_quantizers():
    model = keras.Sequential([keras.Input((5,)), Composite(0.5), layers.Dense(2)])
    with pytest.warns(UserWarning, match="nothing is quantized"):
        converted = qi.convert_to_inferable(model)
    assert type(converted) is keras.Sequential
    np.testing.assert_array_equal(to_numpy(converted(floats(2, 5))), to_numpy(model(floats(2, 5))))


def test_layer_used_in_a_nested_model_and_outside_stays_shared():
    shared = Wrapper(layers.Dense(3, name="shared"), {"kernel": weight(3)})
    inputs = keras.Input((3,))
    inner = keras.Model(inputs, shared(inputs), name="inner")
    model = keras.Model(inputs, shared(inner(inputs)))
    converted = qi.convert_to_inferable(model)
    np.testing.assert_array_equal(to_numpy(converted(floats(2, 3))), to_numpy(model(floats(2, 3))))
    assert converted.get_layer("inner").get_layer("shared") is converted.get_layer("shared")


def test_operations_between_layers():
    """Arithmetic on tensors stands in the graph as operations that are no layers."""
    inputs = keras.Input((3,), name="x")
    dense = Wrapper(layers.Dense(3), {"kernel": weight(3)})
    model = keras.Model(inputs, ops.tanh(dense(inputs) * 0.5 + inputs))
    converted = qi.convert_to_inferable(model)
    np.testing.assert_array_equal(to_numpy(converted(floats(2, 3))), to_numpy(model(floats(2, 3))))


def test_inputs_keep_names_structure_and_dtype():
    """Also where the user named none, and in nested models."""
    inputs = {
        "a": keras.Input((3,), name="a"),
        "ids": keras.Input((2,), dtype="int32", name="ids"),
    }
    embedded = layers.Flatten()(layers.Embedding(4, 2)(inputs["ids"]))
    inner_input = keras.Input((3,))
    inner = keras.Model(inner_input, Wrapper(layers.Dense(4), {"kernel": weight()})(inner_input))
    model = keras.Model(inputs, inner(inputs["a"]) + embedded)
    converted = qi.convert_to_inferable(model)
    assert names(converted) == names(model)
    assert sorted(converted.input) == ["a", "ids"]
    assert converted.input["ids"].dtype == "int32"
    x = {"a": floats(2, 3), "ids": np.array([[0, 1], [2, 3]], "int32")}
    np.testing.assert_array_equal(to_numpy(converted(x)), to_numpy(model(x)))


def test_nested_in_a_sequential():
    def nested():
        return keras.Sequential([keras.Input((3,)), Wrapper(layers.Dense(3), {"kernel": weight()})])

    inputs = keras.Input((3,))
    functional = keras.Model(inputs, Wrapper(layers.Dense(2), {"kernel": weight()})(inputs))
    model = keras.Sequential([keras.Input((3,)), nested(), functional])
    converted = qi.convert_to_inferable(model)
    assert [layer.layers[-1].converted for layer in converted.layers] == [True, True]
    assert names(converted) == names(model)
    np.testing.assert_array_equal(to_numpy(converted(floats(2, 3))), to_numpy(model(floats(2, 3))))


def test_sequential_that_was_built_by_a_call():
    model = keras.Sequential([Wrapper(layers.Dense(3), {"kernel": weight(3)}), layers.Dense(2)])
    model(floats(2, 3))
    converted = qi.convert_to_inferable(model)
    np.testing.assert_array_equal(to_numpy(converted(floats(2, 3))), to_numpy(model(floats(2, 3))))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: layers.Dense(2), TypeError, "expected a Keras model"),
        (lambda: None, TypeError, "expected a Keras model"),
        (lambda: keras.Sequential([layers.Dense(2)]), ValueError, "pass an Input first"),
        (
            lambda: keras.Sequential(
                [
                    keras.Input((4, 3)),
                    layers.TimeDistributed(Wrapper(layers.Dense(2), {"kernel": weight()})),
                ]
            ),
            ValueError,
            r"TimeDistributed with \['dense.*Wrap the outer layer.*'layer/kernel'",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        qi.convert_to_inferable(make())


def test_subclassed_model_is_refused():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = Wrapper(layers.Dense(2), {"kernel": weight()})

        def call(self, inputs):
            return self.dense(inputs)

    model = Subclassed()
    model(floats(2, 3))
    with pytest.raises(TypeError, match="expected a Functional or Sequential model"):
        qi.convert_to_inferable(model)


def _converted_dense(**kwargs):
    wrapper = Wrapper(layers.Dense(3, **kwargs), {"kernel": weight(4)}, activation())
    wrapper.build((None, 4))
    return wrapper, wrapper.convert_to_inferable_quantizers()


def test_converted_wrapper():
    wrapper, converted = _converted_dense(name="dense")
    assert converted.name == "dense"
    assert (converted.converted, wrapper.converted) == (True, False)
    assert (converted.trainable_weights, wrapper.trainable) == ([], True)
    kernel = to_numpy(converted.layer.kernel)
    np.testing.assert_array_equal(kernel, wrapper.get_quantized_weights()["kernel"])
    np.testing.assert_array_equal(kernel, converted.get_quantized_weights()["kernel"])
    assert not np.array_equal(kernel, to_numpy(wrapper.layer.kernel))
    for first, second in zip(
        wrapper.get_codes()["kernel"], converted.get_codes()["kernel"], strict=True
    ):
        np.testing.assert_array_equal(first, second, strict=True)
    assert wrapper.num_weights_quantizers == converted.num_weights_quantizers == 1


def test_weight_assigned_off_its_grid_is_noticed():
    _, converted = _converted_dense()
    converted.latent_weight("kernel").assign(floats(4, 3))
    with pytest.raises(ValueError, match=r"not on the grid of 'kernel'"):
        converted.get_codes()


def test_training_a_converted_layer_is_refused():
    """Frozen, it may stand in a model that is trained; made trainable, it may not."""
    _, converted = _converted_dense()
    x = floats(2, 4)
    np.testing.assert_array_equal(to_numpy(converted(x, training=True)), to_numpy(converted(x)))
    converted.trainable = True
    converted(x, training=False)
    with pytest.raises(ValueError, match="made trainable, expected inference or trainable=False"):
        converted(x, training=True)
    model = keras.Sequential([keras.Input((4,)), converted])
    model.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(ValueError, match="made trainable"):
        model.fit(x, floats(2, 3), verbose=0)


def test_config_that_loses_an_argument_is_refused_by_conversion():
    class Forgetful(layers.Layer):
        def __init__(self, units=2, **kwargs):
            super().__init__(**kwargs)
            self.units = units

        def build(self, input_shape):
            self.kernel = self.add_weight(name="kernel", shape=(input_shape[-1], self.units))

        def call(self, inputs):
            return ops.matmul(inputs, self.kernel)

        def get_config(self):
            return layers.Layer.get_config(self)

    wrapper = Wrapper(Forgetful(5), {"kernel": weight(per_channel=False)})
    wrapper.build((None, 3))
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(3, 5\).*get_config"):
        wrapper.convert_to_inferable_quantizers()


@pytest.mark.tensorflow
@pytest.mark.parametrize("make", [lambda: layers.Dense(3), lambda: layers.Conv1D(2, 2)])
def test_converted_layer_adds_no_operation_to_the_graph(make):
    """Compared by type and number with the bare layer's; the unconverted one does add some."""
    bare, wrapper = make(), Wrapper(make(), {"kernel": weight()})
    bare.build((2, 5, 4))
    wrapper.build((2, 5, 4))
    converted = wrapper.convert_to_inferable_quantizers()
    found = [traced_operations(layer, (2, 5, 4)) for layer in (bare, converted, wrapper)]
    assert found[0] == found[1]
    assert len(found[2]) > len(found[0])


def test_layers_that_were_adapted_stay_so(tmp_path):
    """Statistics that no variable holds, in copies, converted and unwrapped models."""
    normalization = layers.Normalization()
    normalization.adapt(floats(32, 3) * 5 + 3)
    model = keras.Sequential([keras.Input((3,)), normalization, layers.Dense(2)])
    x = floats(4, 3)
    quantized = qi.quantize_model(model, "w16")
    np.testing.assert_allclose(to_numpy(quantized(x)), to_numpy(model(x)), atol=1e-3)
    expected = to_numpy(quantized(x))
    converted = qi.convert_to_inferable(quantized)
    others = [converted, qi.unwrap_model(quantized), qi.unwrap_model(converted)]
    calibrated = qi.quantize_model(model, "w8a8", x, verbose=0)
    for made, found in ((quantized, expected), (converted, expected), (calibrated, None)):
        for ending in (".keras", ".h5"):
            path = tmp_path / f"model{ending}"
            made.save(path)
            loaded = keras.models.load_model(path)
            found = to_numpy(made(x)) if found is None else found
            np.testing.assert_array_equal(to_numpy(loaded(x)), found)
    for other in others:
        np.testing.assert_array_equal(to_numpy(other(x)), expected)


TF_IDF = pytest.param(
    "tf_idf",
    marks=pytest.mark.skipif(
        keras.__version__.startswith("3.13."), reason="Keras 3.13 does not load its own file"
    ),
)


@pytest.mark.tensorflow
@pytest.mark.parametrize("recipe", ["w16", "w16a16"])
@pytest.mark.parametrize("mode", ["int", "multi_hot", TF_IDF])
@pytest.mark.parametrize("cls", [layers.StringLookup, layers.TextVectorization])
def test_vocabularies_that_were_adapted_stay(cls, mode, recipe, tmp_path):
    import tensorflow as tf

    lookup = cls(output_mode=mode)
    lookup.adapt(np.array([["a"], ["b"], ["c"], ["a"], ["d"]]))
    inputs = keras.Input((1,), dtype="string")
    x = lookup(inputs)
    if mode == "int":
        x = layers.GlobalAveragePooling1D()(layers.Embedding(9, 3)(x))
    model = keras.Model(inputs, layers.Dense(2)(x))
    words = tf.constant([["a"], ["c"], ["x"]])
    data = words if "a" in recipe else None
    left = mode == "tf_idf" and recipe == "w16a16"
    warned = pytest.warns(match="left as it is.*tf_idf") if left else nullcontext()
    with warned:
        quantized = qi.quantize_model(model, recipe, data, verbose=0)
    np.testing.assert_allclose(to_numpy(quantized(words)), to_numpy(model(words)), atol=1e-3)
    converted = qi.convert_to_inferable(quantized)
    converted.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for other in (converted, loaded):
        np.testing.assert_array_equal(to_numpy(other(words)), to_numpy(quantized(words)))
    plain = to_numpy(qi.unwrap_model(quantized)(words))
    np.testing.assert_allclose(
        plain, to_numpy(quantized(words)), rtol=0, atol=1e-3 if recipe == "w16a16" else 0
    )
