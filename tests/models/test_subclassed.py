"""Subclassed models: quantized weights and outputs of inner layers, in a model without a graph."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops
from reference import integer_codes, integer_values, refused, same, to_numpy
from subclassed_models import IDS, Masked, Named, Net, Sequences, Tower, X, output, weight

import keras_qwrap as qi
from keras_qwrap.layers.owner import observed, quantizers_in
from keras_qwrap.models.subclassed import QuantizedModel
from keras_qwrap.models.taps import layer_outputs


def weights_of_net():
    return {path: weight() for path in ("first/kernel", "blocks/0/dense/kernel", PATH_IN_HEAD)}


PATH_IN_HEAD = "head/layers/0/kernel"
THRESHOLDS = {"first": 4.0, "norm": 2.0, "blocks/0": 8.0, "blocks/1/dense": 2.0, "head": 1.0}


def built_net():
    model = Net(name="net")
    model(X)
    model(X, training=True)
    return model


def quantized_net(model=None):
    outputs = {path: output(threshold) for path, threshold in THRESHOLDS.items()}
    return QuantizedModel(model or built_net(), weights_of_net(), outputs)


def quantized_kernel(kernel, bits=4):
    """Per output channel, onto the narrow grid."""
    kernel = to_numpy(kernel)
    highest = 2 ** (bits - 1) - 1
    scale = np.abs(kernel).max(axis=0) * np.float32(1 / highest)
    return integer_values(integer_codes(kernel, scale, 0, -highest, highest), scale, 0)


def quantized_tensor(x, path, bits=6):
    lowest = -(2 ** (bits - 1))
    scale = THRESHOLDS[path] / -lowest
    return integer_values(integer_codes(to_numpy(x), scale, 0, lowest, -lowest - 1), scale, 0)


def by_hand(model, x):
    """What Net computes with quantized weights and outputs, layer by layer."""
    for layer in (model.first, model.blocks[0].dense, model.head.layers[0]):
        layer.kernel.assign(quantized_kernel(layer.kernel))
    x = quantized_tensor(model.norm(quantized_tensor(model.first(x), "first")), "norm")
    x = quantized_tensor(model.blocks[0](x), "blocks/0")
    x = x + quantized_tensor(model.blocks[1].dense(x), "blocks/1/dense")
    x = quantized_tensor(model.blocks[0](x), "blocks/0")
    return quantized_tensor(model.head(x), "head")


def variables(model):
    return [to_numpy(variable) for variable in model.variables]


def equal_trees(got, expected):
    pairs = zip(keras.tree.flatten(got), keras.tree.flatten(expected), strict=True)
    for a, b in pairs:
        same(a, to_numpy(b))


def test_outputs_are_those_of_the_float_model_quantized_by_hand():
    model = built_net()
    quantized = quantized_net(model)
    same(quantized(X), by_hand(model, X))
    assert quantized.name == "net"


def test_the_given_model_is_left_as_it_is():
    model = built_net()
    before, attributes, outputs = variables(model), sorted(vars(model)), model(X)
    quantized = quantized_net(model)
    quantized.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    quantized.fit(X, X[:, :3], verbose=0)
    layer_outputs(model)
    for old, new in zip(before, variables(model), strict=True):
        same(new, old)
    same(model(X), to_numpy(outputs))
    assert sorted(vars(model)) == attributes
    assert not any("call" in vars(layer) for layer in (model.first, model.norm, *model.blocks))


@pytest.mark.slow
def test_training_is_that_of_the_float_model_where_nothing_is_quantized():
    """Dropout seeds, moving statistics, added losses: all go on as ever."""
    model = built_net()
    quantized = QuantizedModel(model, {}, {"first": output(1.0, enable=False)})
    for each in (model, quantized):
        each.compile(keras.optimizers.SGD(0.1), "mse")
    losses = []
    for each in (model, quantized):
        keras.utils.set_random_seed(0)
        losses.append(each.fit(X, X[:, :3], epochs=2, shuffle=False, verbose=0).history)
    np.testing.assert_array_equal(losses[0]["loss"], losses[1]["loss"])
    for old, new in zip(variables(model), variables(quantized.model), strict=True):
        same(new, old)


@pytest.mark.slow
def test_training_moves_latent_weights_and_reloads(tmp_path):
    quantized = quantized_net()
    before = {v.path: to_numpy(v) for v in quantized.model.trainable_variables}
    quantized.compile(keras.optimizers.Adam(0.1), "mse")
    quantized.fit(X, X[:, :3], epochs=2, verbose=0)
    unmoved = [
        v.path
        for v in quantized.model.trainable_variables
        if np.array_equal(to_numpy(v), before[v.path])
    ]
    assert unmoved == []
    quantized.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")
    same(reloaded(X), to_numpy(quantized(X)))
    same(reloaded.predict(X, verbose=0), quantized.predict(X, verbose=0))
    assert reloaded.get_config() == quantized.get_config()
    assert len(reloaded.optimizer.variables) == len(quantized.optimizer.variables)
    quantized.save_weights(tmp_path / "model.weights.h5")
    clone = keras.models.clone_model(quantized)
    clone.build_from_config(quantized.get_build_config())
    clone.load_weights(tmp_path / "model.weights.h5")
    same(clone(X), to_numpy(quantized(X)))
    same(copy.deepcopy(quantized)(X), to_numpy(quantized(X)))


@pytest.mark.slow
def test_conversion_gives_the_same_outputs_and_nothing_to_train(tmp_path):
    quantized = quantized_net()
    quantized.compile(keras.optimizers.Adam(0.1), "mse")
    converted = quantized.convert_to_inferable_quantizers()
    again = converted.convert_to_inferable_quantizers()
    converted.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")
    for each in (converted, again, reloaded):
        same(each(X), to_numpy(quantized(X)))
        assert each.converted
        assert each.name == "net"
        assert each.trainable_variables == []
        assert each.get_config() == converted.get_config()
    for path, kernel in quantized.get_quantized_weights().items():
        same(converted.wrapper.latent_weight(path), kernel)
        codes, scale, zero_point = converted.get_codes()[path]
        same(integer_values(codes, scale, zero_point), kernel)
        same(codes, quantized.get_codes()[path][0])
    assert not quantized.converted
    assert converted.compiled
    same(converted.predict(X, verbose=0), quantized.predict(X, verbose=0))
    owners = [q for _, _, q in quantizers_in(converted)]
    assert all(isinstance(q, qi.BaseKerasInferableQuantizer) for q in owners)


def test_unwrapped_is_a_plain_model_with_dequantized_weights():
    quantized = quantized_net()
    plain = quantized.unwrap()
    assert type(plain) is Net
    assert plain.name == "net"
    same(plain.first.kernel, quantized.get_quantized_weights()["first/kernel"])
    same(plain.norm.moving_mean, to_numpy(quantized.model.norm.moving_mean))
    assert quantizers_in(plain) == []


def test_frozen_layers_stay_frozen(tmp_path):
    """`trainable` flags of inner layers are in no subclassed model's config."""
    model = built_net()
    model.blocks[1].trainable = False
    quantized = quantized_net(model)
    quantized.model.first.trainable = False
    quantized.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")
    for each in (quantized, reloaded):
        net = each.model
        flags = [net.first.trainable, net.norm.trainable, net.blocks[1].dense.trainable]
        assert flags == [False, True, False]
    assert quantized.unwrap().first.trainable is False
    converted = quantized.convert_to_inferable_quantizers()
    assert all(layer.trainable for layer in converted.unwrap()._flatten_layers())
    assert model.first.trainable


@pytest.mark.slow
def test_masks_integer_inputs_and_several_outputs(tmp_path):
    """The quantizers of lstm have different thresholds, so that their order is seen."""
    model = Sequences()
    model(IDS)
    shapes = {path: [t.shape for t in ts] for path, ts in layer_outputs(model).items()}
    assert shapes == {
        "attention": [(2, 4, 3)],
        "both": [(2, 4)],
        "embedding": [(2, 4, 4)],
        "lstm": [(2, 4, 3), (2, 3), (2, 3)],
    }
    quantized = QuantizedModel(
        model,
        {"embedding/embeddings": weight(8), "both/forward_layer/cell/kernel": weight(8)},
        {"embedding": output(0.0625), "lstm": [output(0.125), output(0.0078125), output(0.25)]},
    )
    got = quantized(IDS)
    same(quantized(IDS[:1, :2])["state"], to_numpy(got["state"])[:1])
    for name, threshold in {"state": 0.0078125, "cell": 0.25}.items():
        steps = to_numpy(got[name]) / np.float32(threshold / 32)
        np.testing.assert_array_equal(steps, np.round(steps))
        assert steps.any()
        assert np.abs(steps).max() <= 32
    quantized.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras", {"Sequences": Sequences})
    equal_trees(reloaded(IDS), got)
    equal_trees(quantized.convert_to_inferable_quantizers()(IDS), got)


def test_several_tensors_and_dtypes_from_an_example():
    """The integer input would fail as the float32 that a built model's shapes stand for."""
    index = np.arange(8, dtype="int32") % 4
    quantized = QuantizedModel(
        Tower(), {"a/kernel": weight()}, {"add": output(2.0)}, example=((X, index), {"scale": 2.0})
    )
    total, largest = quantized(X, index, scale=4.0)
    steps = to_numpy(total) / np.float32(4 * 2.0 / 32)
    np.testing.assert_array_equal(steps, np.round(steps))
    same(largest, np.argmax(to_numpy(total), -1).astype(to_numpy(largest).dtype))
    converted = quantized.convert_to_inferable_quantizers()
    equal_trees(converted(X, index=index), quantized(X, index))


def test_a_dictionary_in_and_a_list_out(tmp_path):
    x = {"x": X, "y": X[:, :2]}
    model = Named()
    model(x)
    quantized = QuantizedModel(model, {"b/kernel": weight()}, {"a": output(1.0)})
    quantized.compile("sgd", ["mse", "mse"], run_eagerly=True)
    quantized.fit(x, [X[:, :3], X[:, :2]], verbose=0)
    quantized.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras", {"Named": Named})
    equal_trees(reloaded(x), quantized(x))


def test_a_model_that_is_not_built_is_built_by_its_first_call():
    quantized = quantized_net(Net())
    assert not quantized.built
    refused(ValueError, quantized.convert_to_inferable_quantizers, "a built model")
    first = to_numpy(quantized(X))
    same(quantized.convert_to_inferable_quantizers()(X), first)


def test_mixed_precision_quantizes_in_float32():
    """A scale in the compute dtype would be another one: 0.7000123 / 128 is no bfloat16."""
    quantizer = qi.ActivationSymmetricInferableQuantizer(8, threshold=0.7000123, signed=True)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = built_net()
        quantized = QuantizedModel(model, {}, {"first": quantizer})
    finally:
        keras.config.set_dtype_policy("float32")
    refused(ValueError, lambda: QuantizedModel(model), "policy", "mixed_bfloat16")
    seen = []

    def observer(quantizer, tensor):
        seen.append((tensor, quantizer(tensor)))

    with observed(quantized, observer):
        quantized(X)
    (tensor, result), scale = seen[0], np.float32(0.7000123) / np.float32(128)
    values = integer_values(
        integer_codes(to_numpy(ops.cast(tensor, "float32")), scale, 0, -128, 127), scale, 0
    )
    assert keras.backend.standardize_dtype(result.dtype) == "bfloat16"
    same(ops.cast(result, "float32"), to_numpy(ops.cast(ops.cast(values, "bfloat16"), "float32")))


def test_the_mask_of_the_input_is_handed_on():
    model = Masked()
    x = np.where(IDS[..., None] == 0, 0, IDS[..., None]).astype("float32")
    masked = keras.layers.Masking()(x)
    same(model(masked)._keras_mask, IDS != 0)
    quantized = QuantizedModel(model, {"dense/kernel": weight()}, {"dense": output(2.0)})
    same(quantized(masked)._keras_mask, IDS != 0)


@pytest.mark.slow
@pytest.mark.tensorflow
def test_a_function_traced_by_tensorflow_gives_the_same():
    import tensorflow as tf

    quantized = quantized_net()
    for jit_compile in (False, True):
        traced = tf.function(lambda x: quantized(x, training=False), jit_compile=jit_compile)
        np.testing.assert_allclose(to_numpy(traced(X)), to_numpy(quantized(X)), atol=1 / 32)
    same(tf.function(lambda x: quantized(x, training=False))(X), to_numpy(quantized(X)))


LOAD = """
import sys
import keras, keras_qwrap, numpy
sys.path.insert(0, sys.argv[1])
import subclassed_models
x = numpy.load(sys.argv[3])
numpy.save(sys.argv[4], keras.models.load_model(sys.argv[2]).predict(x, verbose=0))
"""


@pytest.mark.slow
def test_a_fresh_process_predicts_the_same(tmp_path):
    quantized = quantized_net()
    quantized.compile(jit_compile=False)
    quantized.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", X)
    tests = Path(__file__).resolve().parents[1]
    paths = [str(tests), *(str(tmp_path / n) for n in ("model.keras", "x.npy", "y.npy"))]
    environment = os.environ | {"PYTHONPATH": str(tests.parent)}
    subprocess.run([sys.executable, "-c", LOAD, *paths], cwd=tmp_path, env=environment, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), quantized.predict(X, verbose=0))


def test_config_is_plain():
    config = quantized_net().get_config()
    assert json.loads(json.dumps(config)) == config
    assert QuantizedModel.from_config(config).get_config() == config
    newer = config | {"format_version": 3}
    refused(ValueError, lambda: QuantizedModel.from_config(newer), "newer")
