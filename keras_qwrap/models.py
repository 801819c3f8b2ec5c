"""Whole models: conversion for inference, and back to plain Keras."""

import keras

from keras_qwrap.copying import Copier, check_graph
from keras_qwrap.quantizing_layer import QuantizingLayer, refuse_inner_wrappers


def convert_to_inferable(model: keras.Model) -> keras.Model:
    """A new model for inference, whose outputs are those of `model`.

    Every wrapper and holder, also in nested models, is replaced by what its
    `convert_to_inferable_quantizers` gives; every other layer by a copy with the same weights.
    Names are kept, shared layers stay shared, and `model` is left as it is. Converting a
    converted model gives an equal one.

    Args:
        model: a built Functional or Sequential model.

    Raises:
        TypeError: the model is neither Functional nor Sequential.
        ValueError: the model is not built, or a wrapper sits inside a layer that is no model.

    Example:

    ```python
    import keras
    import keras_qwrap as qi

    config = qi.TrainableQuantizerWeightsConfig(qi.QuantizationMethod.SYMMETRIC, 8)
    dense = qi.KerasQuantizationWrapper(
        keras.layers.Dense(2), {"kernel": qi.STEWeightQATQuantizer(config)}
    )
    model = keras.Sequential([keras.Input((3,)), dense])
    converted = qi.convert_to_inferable(model)
    print(converted.layers[0].converted, model.layers[0].converted)  # True False
    ```
    """
    check_graph(model)
    return _Converter().copy_model(model)


class _Converter(Copier):
    def new_layer(self, layer: keras.Layer) -> keras.Layer:
        if isinstance(layer, QuantizingLayer):
            return layer.convert_to_inferable_quantizers()
        refuse_inner_wrappers(layer)
        return self.plain_copy(layer)
