"""Random converted models: layer kinds, widths, methods and axes, from a seed."""

import keras
import numpy as np
from keras import layers

import keras_qwrap as qi
from keras_qwrap.layers.weights import find_weight

METHODS = qi.QuantizationMethod
SERIES, IMAGE, FLAT, IDS = (5, 4), (6, 6, 3), (7,), (4,)

KINDS = {
    "dense": (FLAT, lambda n: layers.Dense(n), {"kernel": 2}),
    "einsum": (SERIES, lambda n: layers.EinsumDense("abc,cd->abd", (5, n)), {"kernel": 2}),
    "conv1d": (SERIES, lambda n: layers.Conv1D(n, 2), {"kernel": 3}),
    "conv2d": (IMAGE, lambda n: layers.Conv2D(n, 3, activation="relu"), {"kernel": 4}),
    "depthwise": (IMAGE, lambda n: layers.DepthwiseConv2D(2, depth_multiplier=n), {"kernel": 4}),
    "separable": (
        IMAGE,
        lambda n: layers.SeparableConv2D(n, 3),
        {"depthwise_kernel": 4, "pointwise_kernel": 4},
    ),
    "transpose": (IMAGE, lambda n: layers.Conv2DTranspose(n, 2), {"kernel": 4}),
    "embedding": (IDS, lambda n: layers.Embedding(9, n), {"embeddings": 2}),
    "lstm": (SERIES, lambda n: layers.LSTM(n), {"cell/kernel": 2, "cell/recurrent_kernel": 2}),
    "gru": (SERIES, lambda n: layers.GRU(n), {"cell/kernel": 2}),
    "bidirectional": (
        SERIES,
        lambda n: layers.Bidirectional(layers.SimpleRNN(n)),
        {"forward_layer/cell/kernel": 2, "backward_layer/cell/kernel": 2},
    ),
    "time": (SERIES, lambda n: layers.TimeDistributed(layers.Dense(n)), {"layer/kernel": 2}),
}


def quantizer(random, shape):
    """Any inferable quantizer for a weight of this shape."""
    bits = int(random.integers(2, 17))
    rank = len(shape)
    channels = {}
    sizes: tuple = ()
    if random.random() < 0.7:
        axes = sorted(random.choice(rank, int(random.integers(1, min(rank, 2) + 1)), replace=False))
        sizes = tuple(shape[axis] for axis in axes)
        axis = int(axes[0]) if len(axes) == 1 else tuple(int(axis) for axis in axes)
        channels = {"channel_axis": axis, "input_rank": rank}
    ends = random.uniform(0.1, 3, sizes).astype("float32").tolist()
    per_channel = bool(channels)
    kind = random.choice(["symmetric", "pot", "uniform", "lookup"])
    if kind == "symmetric":
        narrow = bool(random.integers(2))
        return qi.WeightsSymmetricInferableQuantizer(
            bits, ends, per_channel, **channels, narrow=narrow
        )
    if kind == "pot":
        ends = (2.0 ** random.integers(-3, 3, sizes)).tolist()
        return qi.WeightsPOTInferableQuantizer(bits, ends, per_channel, **channels)
    if kind == "uniform":
        low = (-random.uniform(0, 2, sizes)).tolist()
        return qi.WeightsUniformInferableQuantizer(bits, low, ends, per_channel, **channels)
    bits = min(bits, 7)  # Fewer than those of the table's entries.
    table = random.choice(np.arange(-128, 128), min(2**bits, 20), replace=False).tolist()
    return qi.WeightsLUTSymmetricInferableQuantizer(bits, table, ends, per_channel, **channels)


def random_model(seed):
    """A converted model of one to three wrapped layers side by side, and its inputs."""
    random = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    inputs, outputs, arrays = [], [], []
    for i, name in enumerate(random.choice(list(KINDS), int(random.integers(1, 4)))):
        shape, make, paths = KINDS[name]
        layer = make(int(random.integers(1, 6)))
        whole = shape is IDS
        inputs.append(keras.Input(shape, dtype="int32" if whole else "float32"))
        layer.name = f"{name}_{i}"
        probe = type(layer).from_config(layer.get_config())
        probe(np.zeros((1, *shape), "int32" if whole else "float32"))
        weights = {}
        for path in paths:
            weight = find_weight(probe, path)
            weights[path] = quantizer(random, tuple(weight.shape))
        outputs.append(qi.KerasQuantizationWrapper(layer, weights)(inputs[-1]))
        array = random.integers(0, 9, (2, *shape)) if whole else random.normal(size=(2, *shape))
        arrays.append(array.astype("int32" if whole else "float32"))
    model = qi.convert_to_inferable(keras.Model(inputs, outputs))
    return model, arrays
