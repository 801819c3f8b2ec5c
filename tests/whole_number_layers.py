"""Layers of a user's that take ids and lengths as floats, or hold a table for something else."""

import keras
from keras import layers, ops

register = keras.saving.register_keras_serializable("whole_number_layers")
WORDS = 2000


@register
class Words(layers.Layer):
    """A table of words inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = layers.Embedding(WORDS, 4)
        self.drop = layers.Dropout(0.5)

    def build(self, ids_shape):
        self.table.build(ids_shape)

    def call(self, ids, training=None):
        return self.drop(self.table(ops.abs(ids)), training=training)


@register
class Deeper(layers.Layer):
    """The layer with the table inside is inside, and only one of two inputs goes there."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.words = Words()

    def build(self, ids_shape, weights_shape=None):
        self.words.build(ids_shape)

    def call(self, ids, weights):
        return self.words(ids) * ops.expand_dims(weights, -1)


@register
class Counting(layers.Layer):
    """Counts its calls, which nobody may notice who only looks into it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = layers.Embedding(WORDS, 4)

    def build(self, ids_shape):
        self.table.build(ids_shape)
        self.calls = self.add_weight(name="calls", initializer="zeros", trainable=False)

    def call(self, ids):
        self.calls.assign_add(1.0)
        return self.table(ids)


@register
class Mapped(layers.Layer):
    """Looks up inside a function that a function is given."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = layers.Embedding(WORDS, 4)

    def build(self, ids_shape):
        self.table.build(ids_shape)

    def call(self, ids):
        return ops.vectorized_map(self.table, ids)


@register
class Places(layers.Layer):
    """A table of places, as in transformers: the inputs themselves are not looked up."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table, self.dense = layers.Embedding(6, 4), layers.Dense(4)

    def build(self, inputs_shape):
        self.table.build((6,))
        self.dense.build(inputs_shape)

    def call(self, inputs):
        return self.dense(inputs) + self.table(ops.arange(6))


@register
class WordsCell(layers.Layer):
    """A cell of a recurrent layer that looks up its inputs."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table = layers.Embedding(WORDS, 4)
        self.state_size = self.output_size = 4

    def build(self, inputs_shape):
        self.table.build((None,))

    def call(self, inputs, states):
        outputs = self.table(inputs[:, 0]) + states[0]
        return outputs, [outputs]


@register
class WordsModel(keras.Model):
    """A subclassed model that holds the table."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.table, self.dense = layers.Embedding(WORDS, 4), layers.Dense(3)

    def call(self, ids):
        return self.dense(self.table(ids))


@register
class Rows(layers.Layer):
    """Takes rows of a weight by function, so that only data tell what it reads."""

    def build(self, ids_shape):
        self.rows = self.add_weight(name="rows", shape=(WORDS, 4), initializer="normal")

    def call(self, ids):
        return ops.take(self.rows, ops.cast(ids, "int32"), axis=0)


@register
class Shifted(layers.Layer):
    """Ids to other ids."""

    def call(self, ids):
        return WORDS - 1 - ids


@register
class FirstOnes(layers.Layer):
    """Rows of the features up to a length, which is a float, by segment."""

    def call(self, features, lengths, segments):
        steps = ops.arange(ops.shape(features)[1], dtype="float32")
        inside = ops.cast(ops.less(steps, lengths), "float32")
        weights = inside * ops.cast(ops.equal(segments, 1001.0), "float32")
        return ops.sum(features * ops.expand_dims(weights, -1), axis=1)

    def compute_output_shape(self, features_shape, lengths_shape, segments_shape):
        return (features_shape[0], features_shape[2])
