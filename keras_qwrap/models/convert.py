"""Whole models: conversion for inference, and back to plain Keras."""

from typing import Any

import keras
import numpy as np

from keras_qwrap.layers.holder import KerasActivationQuantizationHolder, unquantized_name
from keras_qwrap.layers.keras_internals import input_layer, sublayers
from keras_qwrap.layers.owner import QuantizingLayer, quantizers_in, refuse_inner_wrappers
from keras_qwrap.layers.wrapper import KerasQuantizationWrapper
from keras_qwrap.models.copying import Copier, check_graph
from keras_qwrap.models.graph import is_graph
from keras_qwrap.models.subclassed import QuantizedModel
from keras_qwrap.numerics.checks import warn


def convert_to_inferable(model: keras.Model) -> keras.Model:
    """A new model for inference, whose outputs are those of `model`.

    Every wrapper and holder, also in nested models, is replaced by what its
    `convert_to_inferable_quantizers` gives; every other layer by a copy with the same weights.
    Names are kept, shared layers stay shared, and `model` is left as it is. Converting a
    converted model gives an equal one.

    Args:
        model: a built Functional or Sequential model, or a `QuantizedModel`.

    Raises:
        TypeError: the model is of another kind.
        ValueError: the model is not built, or a wrapper sits inside a layer that is no model.

    Warns:
        UserWarning: nothing in the model is quantized.

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
    _check_calibrated(model)
    if isinstance(model, QuantizedModel):
        return model.convert_to_inferable_quantizers()
    check_graph(model)
    _warn_of_floats("convert_to_inferable", model)
    return _Converter().copy_model(model)


def _check_calibrated(model: Any) -> None:
    found = quantizers_in(model) if isinstance(model, keras.Layer) else []
    names = [owner.name for owner, _, quantizer in found if quantizer.needs_range]
    if names:
        raise ValueError(
            f"convert_to_inferable: received model '{model.name}' with activations that have no "
            f"range, of {sorted(names)}, expected a calibrated or trained model. Call `calibrate`."
        )


def _warn_of_floats(what: str, model: keras.Model) -> None:
    if not quantizers_in(model):
        warn(
            f"{what}: received model '{model.name}', in which nothing is quantized: the new model "
            "is a copy of it. Quantize it first, with `quantize_model`."
        )


class _Converter(Copier):
    def new_layer(self, layer: keras.Layer) -> keras.Layer:
        if isinstance(layer, (QuantizingLayer, QuantizedModel)):
            return layer.convert_to_inferable_quantizers()
        refuse_inner_wrappers(layer)
        return self.plain_copy(layer)


def unwrap_model(model: keras.Model) -> keras.Model:
    """A new model of plain Keras layers, which hold the dequantized weights of `model`.

    Every wrapper, also in nested models, is replaced by a copy of its layer under the wrapper's
    name, with the weights of `get_quantized_weights`: `w = (code - zero_point) * scale`, and all
    others as they are. Holders disappear. Every other layer is replaced by a copy with the same
    weights, shared layers stay shared, and `model` is left as it is. Files of the new model load
    without this package.

    Activations are no longer quantized: the outputs equal those of `model` in inference only where
    no activation is quantized. Activity regularizers of wrappers and holders go with them, and
    where a holder made an output, its entry in `output_names` is that of the layer before. A
    function that `quantize_model` renamed gets back the name that its holder had.

    Frozen layers stay frozen, except that what conversion froze can be trained again: all that
    converted wrappers and a converted `QuantizedModel` held, whatever it was before.

    Args:
        model: a built Functional or Sequential model, quantization-aware, converted or plain; or
            a `QuantizedModel`.

    Raises:
        TypeError: the model is of another kind.
        ValueError: the model is not built, a wrapper sits inside a layer that is no model, or a
            converted layer's weight is no longer on its grid.

    Warns:
        UserWarning: nothing in the model is quantized.

    Example:

    ```python
    import keras
    import keras_qwrap as qi

    config = qi.TrainableQuantizerWeightsConfig(qi.QuantizationMethod.SYMMETRIC, 8)
    dense = qi.KerasQuantizationWrapper(
        keras.layers.Dense(2, name="dense"), {"kernel": qi.STEWeightQATQuantizer(config)}
    )
    model = keras.Sequential([keras.Input((3,)), dense])
    plain = qi.unwrap_model(model)
    print(type(plain.get_layer("dense")).__name__)  # Dense
    kernel = keras.ops.convert_to_numpy(plain.layers[0].kernel)
    print((kernel == dense.get_quantized_weights()["kernel"]).all())  # True
    ```
    """
    if isinstance(model, QuantizedModel):
        return model.unwrap()
    check_graph(model)
    _warn_of_floats("unwrap_model", model)
    return _Unwrapper().copy_model(model)


class _Unwrapper(Copier):
    def __init__(self) -> None:
        super().__init__()
        self._dequantized: list[tuple[keras.Layer, keras.Layer, dict[int, np.ndarray]]] = []

    def copy_model(self, model: keras.Model) -> keras.Model:
        new = super().copy_model(model)
        for graph in [each for each in sublayers(new) if is_graph(each) and not each.trainable]:
            # Keras hands the flag on to the layers only where it changes.
            graph.trainable = True
            graph.trainable = False
        for source, target, weights in self._dequantized:
            for old, variable in zip(source.variables, target.variables, strict=True):
                if id(old) in weights:
                    variable.assign(weights[id(old)])
        return new

    def new_layer(self, layer: keras.Layer) -> keras.Layer | None:
        if isinstance(layer, KerasActivationQuantizationHolder):
            return None
        if isinstance(layer, QuantizedModel):
            return layer.unwrap()
        inner, weights = _unwrapped(layer)
        refuse_inner_wrappers(inner)
        new = self.plain_copy(inner)
        new.name = layer.name
        if getattr(layer, "converted", False):
            new.trainable = True
        self._dequantized.append((inner, new, weights))
        return new

    def call(self, layer: Any, new: Any, args: tuple, kwargs: dict) -> Any:
        if new is None:
            inputs = args[0] if args else kwargs["inputs"]
            before = input_layer(inputs)
            renamed = before.name.startswith(unquantized_name(layer.name))
            if renamed and not isinstance(before, keras.Layer):
                before.name = layer.name
            return inputs
        return new(*args, **kwargs)

    def sequential_layers(self, model: keras.Sequential) -> list[keras.Layer]:
        """Never empty, since Keras does not build a Sequential model without layers."""
        return super().sequential_layers(model) or [keras.layers.Identity()]


def _unwrapped(layer: keras.Layer) -> tuple[keras.Layer, dict[int, np.ndarray]]:
    """The layer inside all wrappers, and its quantized weights by the `id` of their variables."""
    weights: dict[int, np.ndarray] = {}
    while isinstance(layer, KerasQuantizationWrapper):
        for path, weight in layer.get_quantized_weights().items():
            weights[id(layer.latent_weight(path))] = weight
        layer = layer.layer
    return layer, weights
