"""Whole models: conversion for inference."""

from collections.abc import Callable

import keras

from keras_qwrap.errors import bad_type, bad_value
from keras_qwrap.quantizing_layer import QuantizingLayer
from keras_qwrap.substitution import sublayers
from keras_qwrap.wrapper import copy_variables


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
    if not isinstance(model, (keras.Sequential, keras.Model)):
        raise bad_type("model", model, "a Functional or Sequential model", "Pass a keras.Model.")
    if not model.built:
        raise bad_value("model", model.name, "a built model", "Call it, or pass an Input first.")
    copies: list[tuple[keras.Layer, keras.Layer]] = []
    new = keras.models.clone_model(model, clone_function=_copier(copies), recursive=True)
    for source, target in copies:
        copy_variables(source, target)
    return new


def _copier(copies: list) -> Callable[[keras.Layer], keras.Layer]:
    def copy(layer: keras.Layer) -> keras.Layer:
        if isinstance(layer, QuantizingLayer):
            return layer.convert_to_inferable_quantizers()
        inside = [inner.name for inner in sublayers(layer) if isinstance(inner, QuantizingLayer)]
        if inside:
            raise bad_value(
                "model",
                f"layer '{layer.name}', a {type(layer).__name__} with {inside} inside",
                "wrappers and holders that are layers of a Functional or Sequential model",
                "Wrap the outer layer, and name the inner weights by path ('layer/kernel').",
            )
        new = type(layer).from_config(layer.get_config())
        copies.append((layer, new))
        return new

    return copy
