"""Whole models: conversion for inference."""

from functools import partial
from typing import Any

import keras

from keras_qwrap.errors import bad_type, bad_value
from keras_qwrap.quantizing_layer import QuantizingLayer, refuse_inner_wrappers
from keras_qwrap.weight_paths import copy_variables


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
    if not _is_graph(model):
        raise bad_type("model", model, "a Functional or Sequential model", "Pass a keras.Model.")
    if not model.built:
        raise bad_value("model", model.name, "a built model", "Call it, or pass an Input first.")
    copier = _Copier()
    new = copier.copy(model)
    for source, target in copier.plain:
        copy_variables(source, target)
    return new


def _is_graph(model: Any) -> bool:
    """Whether this is a Functional or Sequential model."""
    functional = isinstance(model, keras.Model) and hasattr(model, "operations")
    return functional or isinstance(model, keras.Sequential)


class _Copier:
    """Copies each layer once, so that shared ones stay shared; converts wrappers and holders."""

    def __init__(self) -> None:
        self.plain: list[tuple[keras.Layer, keras.Layer]] = []
        self._copies: dict[int, Any] = {}

    def copy(self, operation: Any) -> Any:
        """The copy of a layer, a nested model, or an operation between layers."""
        if id(operation) not in self._copies:
            self._copies[id(operation)] = self._new(operation)
        return self._copies[id(operation)]

    def _new(self, operation: Any) -> Any:
        if isinstance(operation, QuantizingLayer):
            return operation.convert_to_inferable_quantizers()
        if isinstance(operation, keras.Sequential):
            return keras.models.clone_model(operation, clone_function=self.copy)
        if _is_graph(operation):
            inputs = keras.tree.map_structure(partial(_new_input, operation), operation.input)
            return keras.models.clone_model(operation, inputs, clone_function=self.copy)
        new = type(operation).from_config(operation.get_config())
        if isinstance(operation, keras.Layer):
            refuse_inner_wrappers(operation)
            self.plain.append((operation, new))
        return new


def _new_input(model: keras.Model, tensor: keras.KerasTensor) -> keras.KerasTensor:
    """An input like one of `model`'s; Keras' cloning alone loses the names of input layers."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.InputLayer) and layer.output is tensor:
            return type(layer).from_config(layer.get_config()).output
    return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name)
