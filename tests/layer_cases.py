"""The matrix of layers that the wrapper is checked around: data, and the layers of a user."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import layers, ops

import keras_qwrap as qi

METHODS = qi.QuantizationMethod
register = keras.saving.register_keras_serializable("layer_cases")


def weight(bits=8, method="SYMMETRIC", axis=-1, per_channel=True, **params):
    """A straight-through weights quantizer; without `params` it takes its range from the weight."""
    config = qi.TrainableQuantizerWeightsConfig(
        METHODS[method],
        bits,
        params,
        weights_channels_axis=axis,
        weights_per_channel_threshold=per_channel,
    )
    uniform = method == "UNIFORM"
    return (qi.STEUniformWeightQATQuantizer if uniform else qi.STEWeightQATQuantizer)(config)


def fixed(threshold=1.0, bits=8):
    """An inferable weights quantizer, one threshold for the tensor."""
    return qi.WeightsSymmetricInferableQuantizer(bits, threshold, per_channel=False)


def activation(threshold=8.0, bits=8, method="POWER_OF_TWO", signed=True):
    """A straight-through activation quantizer."""
    params = {"threshold": threshold, "is_signed": signed}
    config = qi.TrainableQuantizerActivationConfig(METHODS[method], bits, params)
    return qi.STEActivationQATQuantizer(config)


def floats(*shape, seed=0):
    """Normally distributed float32 numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@register
class Scale(layers.Layer):
    """Multiplies by a weight of its own."""

    def build(self, input_shape):
        self.factor = self.add_weight(name="factor", shape=(input_shape[-1],))

    def call(self, inputs):
        return inputs * self.factor


@register
class Listed(layers.Layer):
    """Holds its weights in a list and a dictionary."""

    def build(self, input_shape):
        size = input_shape[-1]
        self.lst = [self.add_weight(name=f"part_{i}", shape=(size, 2)) for i in range(2)]
        self.table = {"shift": self.add_weight(name="shift", shape=(2,))}

    def call(self, inputs):
        product = ops.matmul(inputs, self.lst[0]) * ops.matmul(inputs, self.lst[1])
        return product + self.table["shift"]

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 2)


@register
class Composite(layers.Layer):
    """Has layers inside, dropout among them, and no `build`."""

    def __init__(self, rate=0.0, **kwargs):
        super().__init__(**kwargs)
        self.rate = rate
        self.first = layers.Dense(4, activation="tanh")
        self.dropout = layers.Dropout(rate, seed=3)
        self.blocks = [layers.Dense(3), layers.Dense(2)]

    def call(self, inputs, training=False):
        hidden = self.dropout(self.first(inputs), training=training)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def get_config(self):
        return super().get_config() | {"rate": self.rate}


@register
class Mixer(layers.Layer):
    """Takes two tensors and a keyword that decides how they are joined."""

    def build(self, first_shape, second_shape):
        self.left = self.add_weight(name="left", shape=(first_shape[-1], 3))
        self.right = self.add_weight(name="right", shape=(second_shape[-1], 3))

    def call(self, first, second, *, subtract=False):
        a, b = ops.matmul(first, self.left), ops.matmul(second, self.right)
        return a - b if subtract else a + b

    def compute_output_shape(self, first_shape, second_shape):
        return (*first_shape[:-1], 3)


@register
class Unbuilt(layers.Layer):
    """Takes two tensors and creates its weights by calling its layer, without `build`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)

    def call(self, first, second):
        return self.dense(first) + second


def _sequential():
    return keras.Sequential(
        [keras.Input((5,)), layers.Dense(4, activation="relu"), layers.Dense(2)], name="inner"
    )


def _functional():
    inputs = keras.Input((5,))
    shared = layers.Dense(5)
    hidden = shared(shared(inputs))
    return keras.Model(inputs, [layers.Dense(2)(hidden), hidden], name="inner")


@dataclass(frozen=True)
class Case:
    """A layer, its inputs, and the quantizers to wrap it with."""

    name: str
    layer: Callable[[], keras.Layer]
    inputs: list[Any]
    weights: dict[str, Any] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)
    call: dict[str, Any] = field(default_factory=dict)

    def own_weights(self) -> dict[str, Any]:
        """Copies of the quantizers: a trainable one belongs to the one wrapper that it is given."""
        return {path: type(q).from_config(q.get_config()) for path, q in self.weights.items()}


IMAGE, VIDEO, SERIES, FLAT = (2, 5, 5, 3), (1, 4, 4, 4, 2), (2, 4, 3), (3, 5)
POT = {"method": "POWER_OF_TWO"}
UNIFORM = {"method": "UNIFORM"}

CASES = [
    Case("dense", lambda: layers.Dense(4), [floats(*FLAT)], {"kernel": weight()}, [activation()]),
    Case(
        "dense_bias_pot",
        lambda: layers.Dense(4, bias_initializer="normal"),
        [floats(2, 3, 5)],
        {"kernel": weight(4, **POT), "bias": weight(8, **UNIFORM, per_channel=False)},
    ),
    Case(
        "dense_given_ranges",
        lambda: layers.Dense(2),
        [floats(*FLAT)],
        {"kernel": weight(6, threshold=[1.5, 2.0])},
        [qi.ActivationUniformInferableQuantizer(5, -3.0, 4.0)],
    ),
    Case("conv1d", lambda: layers.Conv1D(2, 3), [floats(*SERIES)], {"kernel": weight(5)}),
    Case(
        "conv2d",
        lambda: layers.Conv2D(4, 3, strides=2, padding="same", activation="relu"),
        [floats(*IMAGE)],
        {"kernel": weight(4), "bias": fixed()},
        [activation(signed=False)],
    ),
    Case("conv3d", lambda: layers.Conv3D(2, 2), [floats(*VIDEO)], {"kernel": weight(**UNIFORM)}),
    Case(
        "depthwise_conv1d",
        lambda: layers.DepthwiseConv1D(2, depth_multiplier=2),
        [floats(*SERIES)],
        {"kernel": weight(axis=(1, 2))},
    ),
    Case(
        "depthwise_conv2d",
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
        [floats(*IMAGE)],
        {"kernel": weight(4, axis=(2, 3), **POT)},
    ),
    Case(
        "separable_conv1d",
        lambda: layers.SeparableConv1D(3, 2),
        [floats(*SERIES)],
        {"depthwise_kernel": weight(axis=1), "pointwise_kernel": weight(3)},
    ),
    Case(
        "separable_conv2d",
        lambda: layers.SeparableConv2D(3, 2),
        [floats(*IMAGE)],
        {"depthwise_kernel": weight(axis=(2, 3)), "pointwise_kernel": weight(**UNIFORM)},
    ),
    Case(
        "conv1d_transpose",
        lambda: layers.Conv1DTranspose(2, 3, strides=2),
        [floats(*SERIES)],
        {"kernel": weight(axis=1)},
    ),
    Case(
        "conv2d_transpose",
        lambda: layers.Conv2DTranspose(2, 3),
        [floats(*IMAGE)],
        {"kernel": weight(axis=2), "bias": fixed()},
    ),
    Case(
        "conv3d_transpose",
        lambda: layers.Conv3DTranspose(2, 2),
        [floats(*VIDEO)],
        {"kernel": weight(axis=-2)},
    ),
    Case(
        "einsum_dense",
        lambda: layers.EinsumDense("abc,cde->abde", output_shape=(None, 2, 3), bias_axes="e"),
        [floats(*SERIES)],
        {"kernel": weight(5, axis=(1, 2)), "bias": fixed()},
    ),
    Case(
        "embedding",
        lambda: layers.Embedding(6, 3),
        [np.array([[0, 5, 2], [2, 2, 1]], "int32")],
        {"embeddings": weight(4, axis=0)},
    ),
    Case(
        "lstm",
        lambda: layers.LSTM(3),
        [floats(*SERIES)],
        {"cell/kernel": weight(), "cell/recurrent_kernel": weight(4), "cell/bias": fixed()},
        [activation(1.0)],
    ),
    Case(
        "lstm_initial_state",
        lambda: layers.LSTM(3),
        [floats(*SERIES), [floats(2, 3), floats(2, 3, seed=1)]],
        {"cell/kernel": weight(), "cell/recurrent_kernel": weight(4)},
    ),
    Case(
        "lstm_return_state",
        lambda: layers.LSTM(3, return_state=True, return_sequences=True, unroll=True),
        [floats(*SERIES)],
        {"cell/recurrent_kernel": weight(**UNIFORM)},
        [activation(1.0), activation(2.0), activation(4.0)],
    ),
    Case(
        "gru",
        lambda: layers.GRU(3, return_sequences=True),
        [floats(*SERIES)],
        {"cell/kernel": fixed(), "cell/recurrent_kernel": weight(axis=0)},
    ),
    Case(
        "simple_rnn",
        lambda: layers.SimpleRNN(3),
        [floats(*SERIES)],
        {"cell/kernel": weight(3), "cell/recurrent_kernel": weight(3)},
    ),
    Case(
        "rnn_stacked_cells",
        lambda: layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)]),
        [floats(*SERIES)],
        {"cell/cells/0/kernel": weight(), "cell/cells/1/recurrent_kernel": weight(5)},
    ),
    Case(
        "conv_lstm2d",
        lambda: layers.ConvLSTM2D(2, 2),
        [floats(1, 3, 4, 4, 2)],
        {"cell/kernel": weight(), "cell/recurrent_kernel": weight(6)},
    ),
    Case(
        "bidirectional",
        lambda: layers.Bidirectional(layers.LSTM(2)),
        [floats(*SERIES)],
        {"forward_layer/cell/kernel": weight(), "backward_layer/cell/recurrent_kernel": weight(4)},
        [activation(1.0)],
    ),
    Case(
        "time_distributed",
        lambda: layers.TimeDistributed(layers.Dense(2)),
        [floats(*SERIES)],
        {"layer/kernel": weight(4)},
    ),
    Case(
        "multi_head_attention",
        lambda: layers.MultiHeadAttention(2, 3),
        [floats(2, 3, 4), floats(2, 5, 4, seed=1)],
        {
            "query/kernel": weight(axis=(1, 2)),
            "key/kernel": weight(axis=(1, 2)),
            "value_dense/kernel": weight(5, axis=(1, 2)),
            "output/kernel": weight(4, **POT),
        },
        [activation()],
    ),
    Case(
        "attention_by_keyword",
        lambda: layers.MultiHeadAttention(2, 3),
        [floats(2, 3, 4)],
        {"query/kernel": weight(axis=(1, 2)), "output_dense/bias": fixed()},
        call={"value": floats(2, 5, 4, seed=1), "key": floats(2, 5, 4, seed=2)},
    ),
    Case(
        "attention_scores",
        lambda: layers.MultiHeadAttention(1, 3),
        [floats(2, 3, 4), floats(2, 3, 4, seed=1)],
        {"query/kernel": weight(axis=(1, 2))},
        [activation(), qi.ActivationSymmetricInferableQuantizer(8, 1.0, signed=False)],
        call={"return_attention_scores": True},
    ),
    Case(
        "group_query_attention",
        lambda: layers.GroupQueryAttention(2, 4, 2),
        [floats(2, 3, 4), floats(2, 3, 4, seed=1)],
        {"query/kernel": weight(axis=(1, 2)), "value/kernel": fixed(), "output/kernel": weight()},
    ),
    Case(
        "layer_normalization",
        lambda: layers.LayerNormalization(),
        [floats(*FLAT)],
        {"gamma": fixed(2.0), "beta": fixed(2.0)},
    ),
    Case(
        "group_normalization",
        lambda: layers.GroupNormalization(2),
        [floats(2, 3, 4)],
        {"gamma": weight(**UNIFORM, per_channel=False)},
    ),
    Case(
        "rms_normalization",
        lambda: layers.RMSNormalization(),
        [floats(*FLAT)],
        {"scale": fixed(2.0, bits=6)},
    ),
    Case(
        "batch_normalization",
        lambda: layers.BatchNormalization(),
        [floats(4, 3)],
        {"gamma": fixed(2.0), "beta": weight(per_channel=False), "moving_mean": fixed(4.0)},
        [activation()],
    ),
    Case(
        "prelu",
        lambda: layers.PReLU(alpha_initializer="uniform"),
        [floats(*FLAT)],
        {"alpha": weight(3, per_channel=False)},
    ),
    Case(
        "add_of_a_list",
        lambda: layers.Add(),
        [[floats(2, 3), floats(2, 3, seed=1)]],
        outputs=[activation(2.0, 4)],
    ),
    Case("custom", lambda: Scale(), [floats(*FLAT)], {"factor": weight(4, per_channel=False)}),
    Case(
        "list_attribute",
        lambda: Listed(),
        [floats(*FLAT)],
        {"lst/1": weight(4), "table/shift": fixed()},
    ),
    Case(
        "composite_without_build",
        lambda: Composite(),
        [floats(*FLAT)],
        {"first/kernel": weight(), "blocks/1/kernel": weight(4, **POT)},
        [activation()],
    ),
    Case(
        "two_inputs_without_build",
        lambda: Unbuilt(),
        [floats(2, 5), floats(2, 3)],
        {"dense/kernel": weight()},
        [activation()],
    ),
    Case(
        "two_inputs_and_a_keyword",
        lambda: Mixer(),
        [floats(2, 3), floats(2, 4)],
        {"left": weight(), "right": weight(3)},
        call={"subtract": True},
    ),
    Case(
        "whole_sequential",
        _sequential,
        [floats(*FLAT)],
        {"layers/0/kernel": weight(4), "layers/1/kernel": weight(), "layers/1/bias": fixed()},
        [activation()],
    ),
    Case(
        "whole_functional",
        _functional,
        [floats(*FLAT)],
        {"layers/1/kernel": weight(4), "layers/2/kernel": weight()},
        [activation(), activation(4.0)],
    ),
]
