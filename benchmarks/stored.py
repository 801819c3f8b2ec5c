"""The models whose files are measured, in Keras 3 and in Keras 2.

`keras` is an argument everywhere, so that both make the same models.
"""

from typing import Any

import numpy as np

BITS = (8, 4, 3, 2)
ENDINGS = (".keras", ".h5")


def convolutions(keras: Any) -> Any:
    """Eight convolutions with batch normalization, and a head; 2.3 million quantized weights."""
    layers = keras.layers
    inputs = x = keras.Input((32, 32, 3))
    for i, filters in enumerate((64, 64, 128, 128, 256, 256, 256, 256)):
        x = layers.Conv2D(filters, 3, 2 if i in (2, 4) else 1, "same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    outputs = layers.Dense(10)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, outputs, name="convolutions")


def perceptron(keras: Any) -> Any:
    """Three wide layers, with a range for each of their 2058 outputs; 1.9 million weights."""
    layers = keras.layers
    widths = [layers.Dense(1024, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input((784,)), *widths, layers.Dense(10)], name="perceptron")


def stored_models(keras: Any) -> list[Any]:
    """Both, with random weights."""
    models = [convolutions(keras), perceptron(keras)]
    for model in models:
        for variable in model.variables:
            variable.assign(np.random.default_rng(0).normal(size=variable.shape))
    return models
