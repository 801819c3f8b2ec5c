"""Keras' own layer test around the wrapper: configs, build, shapes, dtypes, training, saving."""

import pytest
from keras import layers
from keras.src.testing import TestCase
from layer_cases import activation, fixed, weight

import keras_qwrap as qi

SHAPE = (2, 4, 3)

LAYERS = {
    "dense": (layers.Dense, {"units": 2}, {"kernel": weight}, True, SHAPE, (2, 4, 2)),
    "conv2d": (
        layers.Conv2D,
        {"filters": 3, "kernel_size": 2},
        {"kernel": weight, "bias": fixed},
        True,
        (2, 4, 4, 2),
        (2, 3, 3, 3),
    ),
    "depthwise": (
        layers.DepthwiseConv2D,
        {"kernel_size": 2},
        {"kernel": lambda: weight(axis=(2, 3))},
        False,
        (2, 4, 4, 2),
        (2, 3, 3, 2),
    ),
    "lstm": (layers.LSTM, {"units": 2}, {"cell/kernel": weight}, True, SHAPE, (2, 2)),
    "bidirectional": (
        lambda **kwargs: layers.Bidirectional(layers.GRU(2), **kwargs),
        {},
        {"forward_layer/cell/kernel": weight},
        True,
        SHAPE,
        (2, 4),
    ),
    "batch_normalization": (
        layers.BatchNormalization,
        {},
        {"gamma": lambda: fixed(2.0)},
        True,
        SHAPE,
        SHAPE,
    ),
    "layer_normalization": (
        layers.LayerNormalization,
        {},
        {"beta": lambda: fixed(2.0)},
        False,
        SHAPE,
        SHAPE,
    ),
    "dropout": (layers.Dropout, {"rate": 0.5}, {}, True, SHAPE, SHAPE),
    "embedding": (
        layers.Embedding,
        {"input_dim": 4, "output_dim": 3},
        {"embeddings": weight},
        True,
        (2, 4),
        (2, 4, 3),
    ),
}


SEED_GENERATORS = {"dropout": 1, "lstm": 1, "bidirectional": 2}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed:UserWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_run_layer_test(name):
    """A function makes the layer, so that each of Keras' checks gets new quantizers.

    Keras passes `dtype` to it, which is the wrapped layer's, and compares the wrapper's config.
    """
    cls, arguments, weights, quantizes_output, input_shape, output_shape = LAYERS[name]

    def make(name=None, trainable=True, dtype=None, **kwargs):
        return qi.KerasQuantizationWrapper(
            cls(dtype=dtype, **kwargs),
            {path: quantizer() for path, quantizer in weights.items()},
            activation() if quantizes_output else None,
            name=name,
            trainable=trainable,
        )

    wrapper = make(**arguments)
    wrapper.build(input_shape)
    case = TestCase()
    case.setUp()
    case.run_layer_test(
        make,
        init_kwargs=arguments,
        input_shape=input_shape,
        input_dtype="int32" if name == "embedding" else "float32",
        expected_output_shape=output_shape,
        expected_num_trainable_weights=len(wrapper.trainable_weights),
        expected_num_non_trainable_weights=len(wrapper.non_trainable_weights),
        expected_num_seed_generators=SEED_GENERATORS.get(name, 0),
        expected_num_losses=0,
        supports_masking=cls is not layers.Conv2D and wrapper.layer.supports_masking,
        run_mixed_precision_check=name != "embedding",
        run_training_check=name != "dropout",
    )
