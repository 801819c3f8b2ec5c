"""Which weights of Keras' layers are quantized by default, and whether the axes are right."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops
from layer_cases import Composite, Listed, Scale, floats, weight
from reference import refused, to_numpy

import keras_qwrap as qi
from keras_qwrap.layers.weights import default_weights, find_weight, weight_paths


@dataclass(frozen=True)
class Case:
    """A layer, its inputs, and what its default weights must be.

    `channels`: how many trailing axes of the output are channels, for layers whose output channels
    the kept axes are checked against.
    """

    name: str
    layer: Callable[[], keras.Layer]
    inputs: list[Any]
    expected: dict[str, Any]
    channels: int = 0
    call: dict[str, Any] = field(default_factory=dict)


FLAT, SERIES, IMAGE, VIDEO = (3, 5), (2, 4, 3), (2, 5, 5, 3), (1, 4, 4, 4, 2)
TOKENS = np.array([[0, 5, 2], [2, 1, 4], [3, 3, 0]], "int32")
KERNEL, CELL = {"kernel": -1}, {"kernel": -1, "recurrent_kernel": -1}
RNN_CELL = {f"cell/{path}": axis for path, axis in CELL.items()}
SEPARABLE = {"depthwise_kernel": (-2, -1), "pointwise_kernel": -1}
ATTENTION = {f"{name}/kernel": (1, 2) for name in ("query", "key", "value")}


def conv_lstm_cell():
    return layers.ConvLSTM2D(2, 2, padding="same").cell


def einsum_case(equation, output_shape, inputs, axes, channels=1):
    def make():
        return layers.EinsumDense(equation, output_shape)

    return Case(f"einsum {equation}", make, [floats(*inputs)], {"kernel": axes}, channels)


CASES = [
    Case("dense", lambda: layers.Dense(4), [floats(*FLAT)], KERNEL, 1),
    Case("dense_no_bias", lambda: layers.Dense(2, use_bias=False), [floats(*SERIES)], KERNEL, 1),
    Case("conv1d", lambda: layers.Conv1D(2, 3), [floats(*SERIES)], KERNEL, 1),
    Case("conv2d", lambda: layers.Conv2D(4, 3), [floats(*IMAGE)], KERNEL, 1),
    Case("conv3d", lambda: layers.Conv3D(3, 2), [floats(*VIDEO)], KERNEL, 1),
    Case(
        "conv1d_transpose",
        lambda: layers.Conv1DTranspose(2, 3),
        [floats(*SERIES)],
        {"kernel": -2},
        1,
    ),
    Case(
        "conv2d_transpose",
        lambda: layers.Conv2DTranspose(4, 3, strides=2),
        [floats(*IMAGE)],
        {"kernel": -2},
        1,
    ),
    Case(
        "conv3d_transpose",
        lambda: layers.Conv3DTranspose(3, 2),
        [floats(*VIDEO)],
        {"kernel": -2},
        1,
    ),
    Case(
        "depthwise_conv1d",
        lambda: layers.DepthwiseConv1D(2, depth_multiplier=2),
        [floats(*SERIES)],
        {"kernel": (-2, -1)},
        1,
    ),
    Case(
        "depthwise_conv2d",
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
        [floats(*IMAGE)],
        {"kernel": (-2, -1)},
        1,
    ),
    Case(
        "separable_conv1d",
        lambda: layers.SeparableConv1D(6, 2, depth_multiplier=2),
        [floats(*SERIES)],
        SEPARABLE,
        1,
    ),
    Case(
        "separable_conv2d",
        lambda: layers.SeparableConv2D(6, 2, depth_multiplier=2),
        [floats(*IMAGE)],
        SEPARABLE,
        1,
    ),
    einsum_case("...x,xy->...y", 4, FLAT, 1),
    einsum_case("abc,dc->abd", (None, 2), SERIES, 0),
    einsum_case("abc,cde->abde", (None, 2, 3), SERIES, (1, 2), 2),
    einsum_case("abcd,cde->abe", (None, 4), IMAGE, 2),
    einsum_case("abc,bdc->abd", (4, 2), SERIES, (0, 1), 2),
    einsum_case("ab,b->ab", 5, FLAT, None, 0),
    einsum_case("ab,b->a", (), FLAT, None, 0),
    Case("embedding", lambda: layers.Embedding(6, 3), [TOKENS], {"embeddings": None}),
    Case("tied", lambda: layers.ReversibleEmbedding(6, 3), [TOKENS], {"embeddings": None}),
    Case(
        "reversible_embedding",
        lambda: layers.ReversibleEmbedding(6, 5, tie_weights=False),
        [floats(*FLAT)],
        {"embeddings": None, "reverse_embeddings": -1},
        1,
        {"reverse": True},
    ),
    Case(
        "simple_rnn_cell",
        lambda: layers.SimpleRNNCell(3),
        [floats(*FLAT), [floats(3, 3)]],
        CELL,
        1,
    ),
    Case(
        "lstm_cell",
        lambda: layers.LSTMCell(3),
        [floats(*FLAT), [floats(3, 3), floats(3, 3, seed=1)]],
        CELL,
        1,
    ),
    Case("gru_cell", lambda: layers.GRUCell(3), [floats(*FLAT), [floats(3, 3)]], CELL, 1),
    Case(
        "conv_lstm_cell",
        conv_lstm_cell,
        [floats(*IMAGE), [floats(2, 5, 5, 2), floats(2, 5, 5, 2, seed=1)]],
        CELL,
        1,
    ),
    Case("lstm", lambda: layers.LSTM(3), [floats(*SERIES)], RNN_CELL),
    Case("conv_lstm1d", lambda: layers.ConvLSTM1D(2, 2), [floats(1, 3, 4, 2)], RNN_CELL),
    Case(
        "stacked_cells",
        lambda: layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)]),
        [floats(*SERIES)],
        {f"cell/cells/{i}/{path}": axis for i in (0, 1) for path, axis in CELL.items()},
    ),
    Case(
        "bidirectional",
        lambda: layers.Bidirectional(layers.GRU(2)),
        [floats(*SERIES)],
        {f"{way}_layer/{path}": -1 for way in ("forward", "backward") for path in RNN_CELL},
    ),
    Case(
        "time_distributed",
        lambda: layers.TimeDistributed(layers.Conv1DTranspose(2, 3)),
        [floats(2, 2, 4, 3)],
        {"layer/kernel": -2},
    ),
    Case(
        "multi_head_attention",
        lambda: layers.MultiHeadAttention(2, 3),
        [floats(*SERIES), floats(*SERIES)],
        ATTENTION | {"output/kernel": 2},
    ),
    Case(
        "group_query_attention",
        lambda: layers.GroupQueryAttention(2, 4, 2),
        [floats(*SERIES), floats(*SERIES)],
        ATTENTION | {"output/kernel": 2},
    ),
    Case("spectral", lambda: layers.SpectralNormalization(layers.Dense(2)), [floats(*FLAT)], {}),
    Case("batch_normalization", layers.BatchNormalization, [floats(*FLAT)], {}),
    Case("layer_normalization", lambda: layers.LayerNormalization((1, 2)), [floats(*SERIES)], {}),
    Case("group_normalization", lambda: layers.GroupNormalization(3), [floats(*SERIES)], {}),
    Case("rms_normalization", layers.RMSNormalization, [floats(*SERIES)], {}),
    Case("normalization", layers.Normalization, [floats(*FLAT)], {}),
    Case("prelu", layers.PReLU, [floats(*IMAGE)], {}),
    Case("attention", lambda: layers.Attention(True, "concat"), [[floats(*SERIES)] * 2], {}),
    Case("additive_attention", layers.AdditiveAttention, [[floats(*SERIES)] * 2], {}),
    Case(
        "stft_spectrogram",
        lambda: layers.STFTSpectrogram("stft", 8, 4, 8, trainable=True),
        [floats(1, 16, 1)],
        {},
    ),
    Case("relu", layers.ReLU, [floats(*FLAT)], {}),
    Case(
        "composite",
        Composite,
        [floats(*FLAT)],
        {"first/kernel": -1, "blocks/0/kernel": -1, "blocks/1/kernel": -1},
    ),
    Case(
        "sequential",
        lambda: keras.Sequential([layers.Conv1D(2, 2), layers.Flatten(), Composite()]),
        [floats(*SERIES)],
        {"layers/0/kernel": -1, "layers/2/first/kernel": -1}
        | {f"layers/2/blocks/{i}/kernel": -1 for i in (0, 1)},
    ),
    Case("unknown_largest_rank", Listed, [floats(*FLAT)], {"lst/0": -1, "lst/1": -1}),
    Case("unknown_vector_only", Scale, [floats(*FLAT)], {}),
]
PROBED = [case for case in CASES if case.channels]
ids = {"ids": lambda case: case.name}


class Keyed(layers.Layer):
    """Keras tracks and saves what dictionaries hold, whatever the keys."""

    def __init__(self):
        super().__init__()
        self.parts = {1: layers.Dense(2), "b": {0: layers.Dense(2)}}

    def call(self, x):
        return self.parts["b"][0](self.parts[1](x))


def test_integer_keys_of_dictionaries_are_parts_of_paths():
    layer = Keyed()
    layer(floats(2, 3))
    assert list(default_weights(layer)) == ["parts/1/kernel", "parts/b/0/kernel"]
    assert len(weight_paths(layer)) == len(layer.weights) == 4
    assert find_weight(layer, "parts/b/0/kernel") is layer.parts["b"][0].kernel
    refused(ValueError, lambda: find_weight(layer, "parts/2/kernel"), "parts/1/kernel")


def built(case: Case) -> keras.Layer:
    """Built by a symbolic call, which compiles nothing."""
    layer = case.layer()
    symbolic = keras.tree.map_structure(
        lambda a: keras.KerasTensor(a.shape, str(a.dtype)), case.inputs
    )
    layer(*symbolic, **case.call)
    return layer


@pytest.mark.parametrize("case", CASES, **ids)
def test_default_weights(case):
    layer = built(case)
    found = default_weights(layer)
    assert found == case.expected
    paths = weight_paths(layer)
    assert list(found) == [path for path in paths if path in found]


def changed_channels(case, layer, variable, index):
    """The output channels that doubling `variable[index]` changes."""

    def run():
        outputs = keras.tree.flatten(layer(*case.inputs, **case.call))[0]
        values = ops.convert_to_numpy(outputs)
        return values.reshape(-1, int(np.prod(values.shape[-case.channels :])))

    before, original = run(), np.array(ops.convert_to_numpy(variable))
    doubled = original.copy()
    doubled[index] *= 2
    variable.assign(doubled)
    after = run()
    variable.assign(original)
    return np.flatnonzero(np.abs(after - before).max(axis=0) > 1e-6).tolist(), before.shape[-1]


@pytest.mark.parametrize("case", PROBED, **ids)
def test_kept_axes_are_those_of_the_output_channels(case, random):
    """Each index of the kept axes belongs to one output channel, and each channel has one."""
    layer = built(case)
    for path, axes in case.expected.items():
        if axes is None:
            continue
        variable = find_weight(layer, path)
        for other in layer.trainable_variables:
            other.assign(
                random.uniform(0.5, 1.0, other.shape) * random.choice([-1, 1], other.shape)
            )
        if path == "depthwise_kernel":
            pointwise = layer.pointwise_kernel
            pointwise.assign(np.eye(pointwise.shape[-1]).reshape(pointwise.shape))
        rank = len(variable.shape)
        kept = [a % rank for a in (axes if isinstance(axes, tuple) else (axes,))]
        hit = []
        for channel in np.ndindex(*(variable.shape[a] for a in kept)):
            index: list[Any] = [slice(None)] * rank
            for axis, position in zip(kept, channel, strict=True):
                index[axis] = position
            changed, number = changed_channels(case, layer, variable, tuple(index))
            assert len(changed) == 1, f"{path}: {channel} changes channels {changed}"
            hit += changed
        gates = len(hit) // number
        assert sorted(hit) == sorted(list(range(number)) * gates)
        assert gates == 1 or case.name.endswith("cell")


ATTENTION_NAMES = [
    f"{part}/{weight}"
    for part in ("key", "output", "query", "value")
    for weight in ("bias", "kernel")
]


def attention(cls):
    layer = (
        layers.MultiHeadAttention(2, 3) if cls == "multi" else layers.GroupQueryAttention(4, 2, 2)
    )
    layer.build((None, 5, 4), (None, 5, 4))
    return layer


@pytest.mark.parametrize("cls", ["multi", "group"])
def test_weights_of_attention_go_by_their_short_names(cls):
    """In lists, in the report, and in what is saved; the attributes themselves name them too."""
    layer = attention(cls)
    assert list(weight_paths(layer)) == ATTENTION_NAMES
    for name in ATTENTION_NAMES:
        part, weight = name.split("/")
        for path in (name, f"{part}_dense/{weight}", f"_{part}_dense/{weight}"):
            assert find_weight(layer, path) is weight_paths(layer)[name]
    refused(ValueError, lambda: find_weight(layer, "kernel"), ", ".join(ATTENTION_NAMES))
    inputs = keras.Input((5, 4), name="in")
    model = keras.Model(inputs, attention(cls)(inputs, inputs))
    quantized = qi.quantize_model(model, "w4")
    report = qi.quantization_report(quantized)
    kernels = [name for name in ATTENTION_NAMES if name.endswith("kernel")]
    (row,) = [row for row in report.layers if row.weights]
    assert [weight.path for weight in row.weights] == kernels
    assert sorted(weight.path for weight in row.left_in_float) == [
        name for name in ATTENTION_NAMES if name.endswith("bias")
    ]
    assert list(quantized.layers[-1].get_codes()) == kernels


class Attending(keras.Model):
    """With attention inside a list and a bidirectional layer beside it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [attention("multi")]

    def call(self, inputs):
        return self.parts[0](inputs, inputs)

    def get_config(self):
        return {"name": self.name}


def test_short_names_work_anywhere_in_a_path():
    model = Attending()
    model(keras.ops.zeros((1, 5, 4)))
    assert list(weight_paths(model)) == [f"parts/0/{name}" for name in ATTENTION_NAMES]
    for path in ("parts/0/query/kernel", "parts/0/query_dense/kernel"):
        quantizer = weight(8)
        quantized = qi.QuantizedModel(model, {path: quantizer})
        assert list(quantized.get_codes()) == [path]
        assert quantized.get_codes()[path][0].shape == (4, 2, 3)


def test_paths_of_files_that_hold_the_attributes_names(tmp_path):
    """Those that were saved before the short names were shown keep their own."""
    inputs = keras.Input((5, 4), name="in")
    old = {f"{name}_dense/kernel": weight(4, axis=(1, 2)) for name in ("query", "key")}
    wrapper = qi.KerasQuantizationWrapper(attention("multi"), old)
    model = keras.Model(inputs, wrapper(inputs, inputs))
    for each in (model, qi.convert_to_inferable(model)):
        each.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
        assert list(again.layers[-1].get_codes()) == sorted(old)
        x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32")
        np.testing.assert_array_equal(to_numpy(again(x)), to_numpy(each(x)))
