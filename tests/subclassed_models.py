"""Subclassed models that the tests share, and their inputs."""

import keras
import numpy as np
from keras import ops

import keras_qwrap as qi

METHOD = qi.QuantizationMethod

X = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
IDS = np.array([[1, 2, 0, 0], [3, 4, 5, 0]], "int32")


@keras.saving.register_keras_serializable("test_subclassed")
class Block(keras.layers.Layer):
    """A composite layer of the user's, with a random layer."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense = keras.layers.Dense(units)
        self.dropout = keras.layers.Dropout(0.5)

    def call(self, x, training=None):
        return x + self.dropout(self.dense(x), training=training)

    def get_config(self):
        return super().get_config() | {"units": self.units}


@keras.saving.register_keras_serializable("test_subclassed")
class Net(keras.Model):
    """State, losses, a list, a composite layer, a nested model and a layer used twice."""

    def __init__(self, units=4, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first = keras.layers.Dense(units, activation="relu")
        self.norm = keras.layers.BatchNormalization()
        self.blocks = [Block(units), Block(units)]
        self.head = keras.Sequential(
            [keras.layers.Dense(3), keras.layers.Activation("tanh")], name="head"
        )

    def call(self, x, training=None):
        x = self.norm(self.first(x), training=training)
        for block in [*self.blocks, self.blocks[0]]:
            x = block(x, training=training)
        self.add_loss(0.1 * ops.mean(x))
        return self.head(x)

    def get_config(self):
        return super().get_config() | {"units": self.units}


class Sequences(keras.Model):
    """Masks, integer inputs, composite layers of Keras, layers with several outputs."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = keras.layers.Embedding(7, 4, mask_zero=True)
        self.lstm = keras.layers.LSTM(3, return_sequences=True, return_state=True)
        self.attention = keras.layers.MultiHeadAttention(2, 2)
        self.both = keras.layers.Bidirectional(keras.layers.LSTM(2))

    def call(self, ids):
        sequence, state, cell = self.lstm(self.embedding(ids))
        sequence = self.attention(sequence, sequence)
        return {"both": self.both(sequence), "state": state, "cell": cell}


class Masked(keras.Model):
    """Hands the mask of its input on."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.dense = keras.layers.Dense(3)

    def call(self, x, mask=None):
        return self.dense(x)


class Tower(keras.Model):
    """Two tensors to call it with, of which one is an integer; an output that is no float."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.a = keras.layers.Dense(3)
        self.b = keras.layers.Dense(3)
        self.add = keras.layers.Add()
        self.unused = keras.layers.Activation("relu")
        self.largest = keras.layers.Lambda(lambda x: ops.argmax(x, -1))

    def call(self, x, index, scale=1.0):
        y = self.add([self.a(x), self.b(ops.one_hot(index, 4))])
        return y * scale, self.largest(y)


class Named(keras.Model):
    """A dictionary in, a list out."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.a = keras.layers.Dense(3)
        self.b = keras.layers.Dense(2)

    def call(self, inputs):
        return [self.a(inputs["x"]), self.b(inputs["y"])]


class Unserializable(keras.Model):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.dense = keras.layers.Dense(1)

    def call(self, x):
        return self.function(self.dense(x))


class OwnStep(Named):
    def train_step(self, *args):
        return super().train_step(*args)


class Scaled(Block):
    """A composite layer with a weight of its own."""

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.scale = self.add_weight(name="scale", shape=(), initializer="ones")


def weight(bits=4):
    config = qi.TrainableQuantizerWeightsConfig(METHOD.SYMMETRIC, bits)
    return qi.STEWeightQATQuantizer(config)


def output(threshold, bits=6, enable=True):
    config = qi.TrainableQuantizerActivationConfig(
        METHOD.POWER_OF_TWO, bits, {"threshold": threshold}, enable_activation_quantization=enable
    )
    return qi.STEActivationQATQuantizer(config)


def built(model, *args):
    model(*args)
    return model
