"""Frozen means frozen: ranges of layers that are not trained do not move; flags are handed on."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from moving_average_cases import hold, make, state
from reference import to_numpy

import keras_qwrap as qi

X = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
M = qi.QuantizationMethod


class Counting(qi.BaseKerasTrainableQuantizer):
    """A user's weights quantizer, which counts the calls in training."""

    def __init__(self, quantization_config):
        super().__init__(quantization_config, qi.QuantizationTarget.Weights, [M.SYMMETRIC])

    def initialize_quantization(self, tensor_shape, name, layer):
        count = layer.add_weight(name="count", shape=(), initializer="zeros", trainable=False)
        self.quantizer_parameters = {"count": count}
        return self.quantizer_parameters

    def __call__(self, inputs, training=None):
        if training:
            self.quantizer_parameters["count"].assign_add(1.0)
        return inputs


def counting():
    return Counting(qi.TrainableQuantizerWeightsConfig(M.SYMMETRIC))


def count(quantizer):
    return to_numpy(quantizer.quantizer_parameters["count"]).item()


def trained(model, data):
    """The paths of what moves in an epoch on other data, though no gradient trains it."""
    rest = [v for v in model.non_trainable_variables if "seed" not in v.path]
    before = {v.path: to_numpy(v).copy() for v in rest}
    if model.trainable_variables:
        model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=False)
        model.fit(data, np.zeros(model(data).shape), batch_size=8, verbose=0)
    else:  # Keras warns of fitting nothing.
        model(data, training=True)
    return {v.path for v in rest if not np.array_equal(to_numpy(v), before[v.path])}


def test_a_frozen_holder_uses_the_stored_range():
    quantizer = make()
    holder = hold(quantizer)
    holder(np.float32([0, 4]), training=True)
    holder.trainable = False
    stored = quantizer.range
    outputs = holder(np.float32([0.3, 9.0]), training=True)
    assert quantizer.range == stored
    assert state(quantizer, "steps") == 1
    assert np.array_equal(outputs, holder(np.float32([0.3, 9.0]), training=False))


@pytest.mark.parametrize("delay", [0, 5])
def test_a_frozen_holder_without_a_range_passes_floats(delay):
    """No delay counts either: with a range it quantizes at once."""
    quantizer = make()
    holder = hold(quantizer)
    holder.trainable = False
    quantizer.quantizer_parameters["delay"].assign(delay)
    x = np.float32([0.1234, 9.0])
    assert np.array_equal(holder(x, training=True), x)
    assert quantizer.range is None
    quantizer.set_range(0, 1)
    assert np.array_equal(holder(x, training=True), holder(x))
    assert to_numpy(holder(x, training=True)).max() == 1


def test_a_thawed_holder_goes_on():
    quantizer = make()
    holder = hold(quantizer)
    holder.trainable = False
    holder(np.float32([0, 4]), training=True)
    holder.trainable = True
    holder(np.float32([0, 4]), training=True)
    assert quantizer.range == (0.0, 4.0)


@pytest.mark.parametrize("frozen", ["wrapper", "layer", "weight's layer", None])
def test_a_users_weights_quantizer_is_frozen_with_its_weight(frozen):
    quantizer = counting()
    block = Block()
    wrapper = qi.KerasQuantizationWrapper(block, {"dense/kernel": quantizer})
    wrapper(X)
    if frozen:
        parts = {"wrapper": wrapper, "layer": block, "weight's layer": block.dense}
        parts[frozen].trainable = False
    wrapper(X, training=True)
    assert count(quantizer) == (0 if frozen else 1)


@pytest.mark.parametrize("flag", [True, False])
def test_a_wrapper_has_the_flag_of_its_layer_unless_it_is_given_one(flag):
    layer = layers.Dense(2, trainable=flag)
    assert qi.KerasQuantizationWrapper(layer).trainable is flag
    assert qi.KerasQuantizationWrapper(layer, trainable=not flag).trainable is not flag
    assert layer.trainable is flag


@keras.saving.register_keras_serializable("test_frozen")
class Block(layers.Layer):
    """A layer with layers inside, whose flags are in no config."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense, self.norm = layers.Dense(6, name="inner"), layers.BatchNormalization()

    def call(self, inputs, training=None):
        return self.norm(self.dense(inputs), training=training)


def backbone():
    inputs = keras.Input((6,))
    x = layers.Dense(5, activation="relu", name="first")(inputs / 2)
    x = layers.Dense(5, name="second")(x) + x
    return keras.Model(inputs, ops.tanh(x * 3), name="backbone")


def with_head(frozen):
    """A nested backbone with functions in it and behind it, and a head."""
    inner = backbone()
    inputs = keras.Input((6,), name="image")
    x = inner(inputs)
    x = layers.Dense(4, name="between")(x * 2)
    model = keras.Model(inputs, layers.Dense(2, name="head")(x - 1))
    if frozen == "model":
        inner.trainable = False
    else:
        for layer in inner.layers:
            layer.trainable = False
    return model


@pytest.mark.parametrize("frozen", ["model", "layers"])
def test_ranges_in_a_frozen_backbone_stay(frozen):
    """Those of layers and functions inside, and of the function that only frozen layers feed."""
    model = with_head(frozen)
    quantized = qi.quantize_model(model, "w8a8", X, verbose=0)
    inner = quantized.get_layer("backbone")
    flags = {layer.name: layer.trainable for layer in inner.layers}
    thawed = {name for name, flag in flags.items() if flag}
    # No layer stands before the division, so that it is frozen with the model alone.
    assert all("divide" in name or "input" in name for name in thawed)
    assert any("divide" in name for name in thawed) == (frozen == "layers")
    flags = {layer.name: layer.trainable for layer in quantized.layers}
    holders = {name: flag for name, flag in flags.items() if name.endswith("_quantizer")}
    assert holders == {
        "image_quantizer": True,
        next(n for n in holders if "multiply" in n): False,
        next(n for n in holders if "subtract" in n): True,
    }
    moved = trained(quantized, 10 * X)
    names = {path.split("/")[0] for path in moved}
    owners = {name.rpartition("_quantizer")[0].rstrip("_0123456789") or name for name in names}
    expected = {"image", "between", "subtract", "head"}
    assert owners == expected | ({"true_divide"} if frozen == "layers" else set())


def test_a_frozen_model_has_frozen_holders():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    model.trainable = False
    quantized = qi.quantize_model(model, "w8a8", X, verbose=0)
    assert [layer.trainable for layer in quantized.layers] == [False, False]
    assert trained(quantized, 10 * X) == set()


def test_a_shared_function_needs_all_layers_before_to_be_frozen():
    inputs = keras.Input((6,))
    frozen, free = layers.Dense(3, trainable=False)(inputs), layers.Dense(3)(inputs)
    model = keras.Model(inputs, [ops.exp(frozen), ops.exp(free), frozen * free, ops.exp(inputs)])
    quantized = qi.quantize_model(model, "w8a8", X, verbose=0)
    flags = [quantized.get_layer(name).trainable for name in quantized.output_names]
    assert flags == [False, True, True, True]


def test_flags_of_layers_inside_layers_are_handed_on():
    block = Block(name="block")
    model = keras.Sequential([keras.Input((6,)), block, layers.Dense(2)])
    block.dense.trainable = False
    model.compile("adam", "mse")
    copies = [qi.quantize_model(model, "w8"), qi.quantize_model(model, "w8a8", X, verbose=0)]
    copies += [qi.unwrap_model(copies[0]), qi.unwrap_model(qi.convert_to_inferable(copies[0]))]
    found = [getattr(c.get_layer("block"), "layer", c.get_layer("block")) for c in copies]
    assert [each.trainable for each in found] == [True] * 4
    # What conversion froze can be trained again, whatever it was before.
    assert [each.dense.trainable for each in found] == [False, False, False, True]
    for copy in copies:
        assert len(copy.optimizer.variables) == 2 + 2 * len(copy.trainable_variables)


@keras.saving.register_keras_serializable("test_frozen")
class Net(keras.Model):
    """A backbone and a head, without a graph."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.backbone, self.head = Block(), layers.Dense(2)

    def call(self, inputs):
        return self.head(self.backbone(inputs))


@pytest.mark.parametrize("ending", [None, "keras"])
def test_ranges_of_frozen_layers_of_a_subclassed_model_stay(ending, tmp_path):
    model = Net()
    model(X)
    model.backbone.trainable = False
    quantized = qi.quantize_model(model, "w8a8", X, verbose=0)
    if ending:
        quantized.save(tmp_path / "model.keras")
        quantized = keras.models.load_model(tmp_path / "model.keras")
    moved = trained(quantized, 10 * X)
    assert moved
    assert all("head" in path for path in moved)
    # Flags that are set later count as well.
    quantized.model.backbone.trainable = True
    assert any("backbone" in path for path in trained(quantized, 100 * X))
    quantized.model.head.trainable = False
    assert all("head" not in path for path in trained(quantized, 1000 * X))


def test_a_frozen_subclassed_model_is_frozen_as_a_whole():
    model = Net()
    model(X)
    model.trainable = False
    quantized = qi.quantize_model(model, "w8a8", X, verbose=0)
    assert not quantized.trainable
    assert trained(quantized, 10 * X) == set()


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_flags_survive_files(ending, tmp_path):
    layer = layers.Dense(3, trainable=False, name="dense")
    model = keras.Sequential([keras.Input((6,)), layer, layers.Dense(2, name="head")])
    quantized = qi.quantize_model(model, "w8a8", X, verbose=0)
    quantized.save(tmp_path / f"model.{ending}")
    loaded = keras.models.load_model(tmp_path / f"model.{ending}", compile=False)
    assert [layer.trainable for layer in loaded.layers] == [True, False, True]
    before = loaded.get_layer("dense").activation_quantizers[0].range
    assert all("dense/" not in path for path in trained(loaded, 10 * X))
    assert loaded.get_layer("dense").activation_quantizers[0].range == before
