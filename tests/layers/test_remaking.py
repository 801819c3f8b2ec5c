"""Classes as tutorials write them, which plain Keras cannot make again, and what is refused."""

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops
from reference import refused, same, to_numpy

import keras_qwrap as qi

X = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")


class Plain(keras.Model):
    """Takes nothing, and says nothing of itself."""

    def __init__(self):
        super().__init__()
        self.first = layers.Dense(5, activation="relu")
        self.second = layers.Dense(3)

    def call(self, x):
        return self.second(self.first(x))


class Block(layers.Layer):
    """No model; its argument has no default, and Keras notes it."""

    def __init__(self, units):
        super().__init__()
        self.dense = layers.Dense(units, activation="relu")
        self.dropout = layers.Dropout(0.5)

    def call(self, x, training=None):
        return self.dropout(self.dense(x), training=training)


class Built(layers.Layer):
    """Has a weight of its own, and a layer that is made when it is built."""

    def __init__(self):
        super().__init__()

    def build(self, input_shape):
        self.scale = self.add_weight(name="scale", shape=(input_shape[-1],), initializer="ones")
        self.dense = layers.Dense(input_shape[-1])
        self.dense.build(input_shape)

    def call(self, x):
        return x + self.scale * self.dense(x)

    def compute_output_shape(self, input_shape):
        return input_shape


class Small(layers.Dense):
    """A layer of Keras, of a fixed size."""

    def __init__(self):
        super().__init__(4, activation="tanh")


class Fixed(layers.Conv1D):
    """Takes some of the arguments of a layer of Keras, by its names."""

    def __init__(self, filters, name=None):
        super().__init__(filters, 2, padding="causal", name=name)


class Cell(layers.Layer):
    """A recurrent cell of the user's."""

    def __init__(self, units=3):
        super().__init__()
        self.state_size = units
        self.dense = layers.Dense(units, activation="tanh")

    def build(self, input_shape):
        self.dense.build((input_shape[0], input_shape[-1] + self.state_size))

    def call(self, x, states):
        state = self.dense(ops.concatenate([x, states[0]], -1))
        return state, [state]


def swish(x):
    return x * ops.sigmoid(x)


class WithFunction(keras.Model):
    """A default that Keras does not note; lists, dictionaries and layers that are shared."""

    def __init__(self, units=4, activation=swish):
        super().__init__()
        self.activation = activation
        self.blocks = [Block(units), Built()]
        self.by_name = {"small": Small(), "plain": Plain()}
        self.again = self.blocks[0].dense

    def call(self, x, training=None):
        for block in self.blocks:
            x = self.activation(
                block(x, training=training) if block is self.blocks[0] else block(x)
            )
        return self.by_name["plain"](self.by_name["small"](x)) + ops.sum(self.again.kernel)


class Lazy(keras.Model):
    """Makes its layer when it is built."""

    def __init__(self):
        super().__init__()

    def build(self, input_shape):
        self.dense = layers.Dense(input_shape[-1] - 2)
        self.dense.build(input_shape)

    def call(self, x):
        return self.dense(x)


class OwnConfig(keras.Model):
    """Its config holds its arguments, and nothing else."""

    def __init__(self, units):
        super().__init__()
        self.units = units
        self.dense = layers.Dense(units)

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        return {"units": self.units}


CLASSES = [Plain, Block, Built, Small, Fixed, Cell, WithFunction, Lazy, OwnConfig]
CUSTOM = {cls.__name__: cls for cls in CLASSES} | {"swish": swish}


def built(model):
    model(X)
    return model


def sequential(*inside):
    return keras.Sequential([keras.Input((6,)), *inside], name="outer")


def shared():
    inputs, block = keras.Input((6,)), Block(6)
    return keras.Model(inputs, layers.Dense(2)(block(block(inputs)) + Built()(inputs)))


def recurrent():
    inside = [layers.Reshape((3, 2)), layers.RNN(Cell(4), return_sequences=True)]
    return sequential(*inside, layers.TimeDistributed(Built()), Fixed(2, name="fixed"))


MODELS = {
    "model": lambda: built(Plain()),
    "function, list, dictionary": lambda: built(WithFunction()),
    "lazy": lambda: built(Lazy()),
    "own config": lambda: built(OwnConfig(3)),
    "layers": lambda: sequential(Block(5), Built(), Small()),
    "shared layer": shared,
    "nested model": lambda: sequential(layers.Dense(6), Plain(), OwnConfig(2)),
    "inside layers of Keras": recurrent,
}


def perturbed(make):
    """A model whose weights are none that a new one would have."""
    model = make()
    for i, variable in enumerate(model.variables):
        if "float" in variable.dtype:
            noise = np.random.default_rng(i).normal(size=variable.shape) / 4
            variable.assign(to_numpy(variable) + noise)
    return model


def names(model):
    """The names that are kept: the model's, and those of its graph."""
    inside = (
        model.layers if isinstance(model, keras.Sequential) or hasattr(model, "operations") else []
    )
    return [model.name, *(layer.name for layer in inside)]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_whole_life(name, tmp_path):
    model = perturbed(MODELS[name])
    given = [to_numpy(variable) for variable in model.variables]
    quantized = qi.quantize_model(model, "w8a8", X, verbose=0)
    for variable, before in zip(model.variables, given, strict=True):
        same(variable, before)
    quantized.compile("sgd", "mse", run_eagerly=True)
    quantized.train_on_batch(X, np.zeros(model(X).shape, "float32"))
    expected = to_numpy(quantized(X))
    converted = qi.convert_to_inferable(quantized)
    plain = qi.unwrap_model(converted)
    assert type(plain) is type(model)
    assert names(plain) == names(model)
    quantized.save(tmp_path / "quantized.keras")
    qi.save_quantized_model(converted, tmp_path / "converted.keras")
    loaded = keras.models.load_model(tmp_path / "quantized.keras", CUSTOM)
    sealed = qi.keras_load_quantized_model(tmp_path / "converted.keras", CUSTOM)
    with keras.saving.custom_object_scope(CUSTOM):
        copied = copy.deepcopy(quantized)
        assert keras.models.clone_model(converted).get_config() == converted.get_config()
    for other in (converted, loaded, sealed, copied):
        same(other(X), expected)
        assert names(qi.unwrap_model(other)) == names(model)


@pytest.mark.parametrize("name", MODELS)
def test_copies_compute_the_same(name):
    """In float: of weights that are quantized to 16 bits there is little to see."""
    model = perturbed(MODELS[name])
    quantized = qi.quantize_model(model, "w16")
    np.testing.assert_allclose(to_numpy(quantized(X)), to_numpy(model(X)), atol=5e-3)
    assert quantized.name == model.name


def test_a_file_holds_a_layer_that_has_nothing_to_quantize(tmp_path):
    """Plain Keras cannot load such a layer, so it does not stand in a file as it is."""

    class Scale(layers.Layer):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def call(self, x):
            return self.factor * x

    model = sequential(Scale(3.0), layers.Dense(2))
    quantized = qi.quantize_model(model, "w8")
    quantized.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", {"Scale": Scale})
    same(loaded(X), to_numpy(quantized(X)))
    plain = qi.unwrap_model(loaded)
    assert names(plain) == names(model)
    assert plain.layers[0].factor == 3.0


CALLED = []


def append(x):
    CALLED.append(x)


def test_a_config_calls_no_function():
    """Functions are among custom objects too, and no layers can be made by them."""
    config = qi.quantize_model(sequential(Block(4)), "w8").layers[0].get_config()
    config["layer"] |= {"class_name": "append", "registered_name": "append", "config": {"x": 1}}
    with keras.saving.custom_object_scope({"append": append}):
        wrapper = qi.KerasQuantizationWrapper
        refused(TypeError, lambda: wrapper.from_config(config), "a Keras layer")
    assert CALLED == []


class Words(keras.Model):
    """Its vocabulary is no weight, and part of a config of Keras' making."""

    def __init__(self):
        super().__init__()
        self.vectorize = layers.TextVectorization(20, output_sequence_length=3)
        self.normalize = layers.Normalization()
        self.embedding = layers.Embedding(20, 2)
        self.dense = layers.Dense(2)

    def call(self, inputs):
        found = self.embedding(self.vectorize(inputs["text"]))
        return self.dense(ops.sum(found, 1) + self.normalize(inputs["number"]))


@pytest.mark.tensorflow
def test_what_layers_inside_have_adapted_to_is_copied(tmp_path):
    x = {"text": ops.convert_to_tensor(["a b c", "c d"]), "number": np.float32([[1, 5], [3, 9]])}
    model = Words()
    model.vectorize.adapt(["a b", "d c a"])
    model.normalize.adapt(x["number"])
    model(x)
    quantized = qi.quantize_model(model, "w8", example=((x,), {}))
    converted = qi.convert_to_inferable(quantized)
    converted.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", {"Words": Words})
    for each in (converted, loaded):
        same(each(x), to_numpy(quantized(x)))
    np.testing.assert_allclose(to_numpy(quantized(x)), to_numpy(model(x)), atol=0.05)


def test_flags_and_names_of_what_is_inside_a_wrapper_are_kept(tmp_path):
    model = sequential(Block(4))
    model.layers[0].trainable = False
    quantized = qi.quantize_model(model, "w8")
    quantized.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", CUSTOM)
    for each in (quantized, loaded):
        inner = each.layers[0].layer
        assert (inner.name, inner.trainable) == (model.layers[0].name, False)


class Sized(keras.Model):
    """Keras notes the default, whatever is given."""

    def __init__(self, units=4, activation="relu", scale=1.0, function=swish):
        super().__init__()
        self.scale, self.function = scale, function
        self.dense = layers.Dense(units, activation=activation)

    def call(self, x):
        return self.function(self.scale * self.dense(x))


class Needy(keras.Model):
    def __init__(self, units, rate):
        super().__init__()
        self.dense = layers.Dense(units)

    def call(self, x):
        return self.dense(x)


class Random(keras.Model):
    """What a constructor finds outside of it is another thing each time."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(next(COUNT))

    def call(self, x):
        return self.dense(x)


class Features(layers.Layer):
    """A table that is no weight."""

    def __init__(self):
        super().__init__()
        self.table = np.random.default_rng(next(COUNT)).normal(size=(6, 4)).astype("float32")

    def call(self, x):
        return ops.matmul(x, self.table)


COUNT = itertools.count(1)


class Around(layers.Layer):
    """An argument that Keras cannot note."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, x):
        return self.layer(x)


class Pair(keras.Model):
    """Is made of models."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def call(self, x):
        return self.decoder(self.encoder(x))


class HandsOut(Around):
    def get_config(self):
        return {"layer": self.layer}


class Forgetful(Sized):
    """Forgets an argument that shapes no weight."""

    def get_config(self):
        return {"units": self.dense.units}


class Wrong(Sized):
    def get_config(self):
        return {"size": 3}


def other(x):
    return ops.tanh(x)


LIKE_SIZED = ("Sized.__init__ takes `units`, `activation`, `scale`, `function`", "`get_config`")


@pytest.mark.parametrize(
    ("make", "fragments"),
    [
        (lambda: Needy(3, 0.5), ["Needy.__init__ takes `units`, `rate`", "{'units': ..., 'rate'"]),
        (lambda: sequential(Around(layers.Dense(2))), ["Around.__init__ takes `layer`"]),
        (lambda: Sized(5), ["units=5", "expected 4", *LIKE_SIZED]),
        (lambda: Sized(activation="tanh"), ["activation='tanh'", "'relu'", *LIKE_SIZED]),
        (lambda: Sized(scale=2.0), ["scale=2.0", "expected 1.0", *LIKE_SIZED]),
        (lambda: Sized(function=other), ["function=", "other", *LIKE_SIZED]),
        (Random, ["units=", "Random.__init__ take what differs"]),
        (lambda: sequential(Features()), ["table=", "Features.__init__ take what differs"]),
        (lambda: sequential(HandsOut(layers.Dense(2))), ["hands out its own layers", "serialize"]),
        (lambda: Forgetful(4, "tanh"), ["activation='tanh'", "`Forgetful.get_config` return all"]),
        (lambda: Pair(Plain(), Plain()), ["Quantize encoder and decoder by themselves"]),
        (Wrong, ["'size'", "`Wrong.get_config` return all", "{'units': ..."]),
    ],
)
def test_what_cannot_be_made_again_says_what_it_lacks(make, fragments):
    with pytest.raises(ValueError, match="model: received") as caught:
        qi.quantize_model(built(make()), "w8")
    message = str(caught.value)
    assert [part for part in fragments if part not in message] == []
    assert "\n" not in message
    assert len(message) < 500


def test_a_layer_that_was_made_under_another_policy_is_refused():
    """Its constructor takes no dtype, and so do those of the layers inside."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = sequential(Block(3))
    finally:
        keras.config.set_dtype_policy("float32")
    refused(ValueError, lambda: qi.quantize_model(model, "w8"), "policy", "mixed_bfloat16")


def test_a_sequential_model_without_a_graph_is_refused_in_words():
    """Keras asks the layer inside for its output shape, and goes on without one."""
    timed = layers.TimeDistributed(Small()), layers.TimeDistributed(Featureless())
    model = keras.Sequential([keras.Input((3, 6)), *timed])
    refused(ValueError, lambda: qi.quantize_model(model, "w8"), "compute_output_shape")


class Featureless(layers.Layer):
    def call(self, x):
        return ops.sum(x, -1)


LOAD = """
import sys
import keras, keras_qwrap, numpy
from test_remaking import CUSTOM, X
model = keras.models.load_model(sys.argv[1], CUSTOM)
numpy.save(sys.argv[2], model.predict(X, verbose=0))
"""


@pytest.mark.slow
def test_a_fresh_process_predicts_the_same(tmp_path):
    model = perturbed(MODELS["function, list, dictionary"])
    quantized = qi.quantize_model(model, "w8a8", X, verbose=0)
    quantized.save(tmp_path / "model.keras")
    here, tests, root = Path(__file__).resolve().parents[:3]
    arguments = [str(tmp_path / "model.keras"), str(tmp_path / "y.npy")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (here, tests, root)))}
    subprocess.run(
        [sys.executable, "-c", LOAD, *arguments], cwd=tmp_path, env=environment, check=True
    )
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), quantized.predict(X, verbose=0))
