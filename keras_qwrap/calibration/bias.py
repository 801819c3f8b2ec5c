"""Bias correction: what quantized weights do to the mean of a layer's output, taken back."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_qwrap.calibration.batches import batches
from keras_qwrap.layers.keras_internals import graph_nodes, state_kept, sublayers
from keras_qwrap.layers.layer_table import Behaviour, behaviour_of
from keras_qwrap.layers.wrapper import KerasQuantizationWrapper
from keras_qwrap.models.batch_norm import normalized_nodes
from keras_qwrap.models.copying import Copier, check_graph
from keras_qwrap.models.graph import is_graph
from keras_qwrap.numerics.checks import bad_value
from keras_qwrap.numerics.tensors import Tensor, to_numpy


def correct_biases(
    model: keras.Model,
    float_model: keras.Model,
    data: Any,
    batch_size: int = 32,
    steps: int | None = None,
) -> None:
    """Shift the biases of a quantized model, in place, to keep the means of the float one.

    For each output channel of a wrapped Dense, EinsumDense or convolution layer, with `y` its
    output before its activation function, and means over examples and positions:

        bias' = bias + mean(y in float_model) - mean(y in model)

    where all layers before it are corrected already. This is found in one pass over the data: in
    each batch the layers are corrected in order of execution by the differences in that batch, and
    each bias moves by the mean of its differences over the batches, weighted by their rows.
    Activations whose range is not yet found pass in float, so correct before calibrating.

    A layer without a bias that only a batch normalization reads has the `moving_mean` of that
    normalization shifted instead. Left as they are: other layers without a bias, layers that are
    not wrapped, recurrent cells, layers that the model calls more than once, and layers whose
    activation function is a layer of its own.

    This is the empirical bias correction of M. Nagel, M. van Baalen, T. Blankevoort and
    M. Welling, "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019.

    Args:
        model: what `quantize_model` made of `float_model`, not trained since.
        float_model: a built Functional or Sequential model.
        data: inputs, as `batches.batches` takes them.
        batch_size: rows of each batch, for whole arrays.
        steps: the most batches to take; needed for data without end.

    Raises:
        TypeError: `float_model` is neither Functional nor Sequential.
        ValueError: it is not built, the data does not fit it, or nothing can be corrected.
    """
    check_graph(float_model)
    reference = Copier().copy_model(float_model)
    wanted_offsets, offsets = _offsets(reference), _offsets(model)
    wrapped = {id(layer) for owner in _wrappers(model) for layer in sublayers(owner.layer)}
    offsets = {
        path: offset
        for path, offset in offsets.items()
        if path in wanted_offsets and id(offset.layer) in wrapped
    }
    if not offsets:
        raise bad_value(
            "model",
            model.name,
            "a model with wrapped Dense, EinsumDense or convolution layers that have a bias",
            "Do without bias correction.",
        )
    wanted_offsets = {path: wanted_offsets[path] for path in offsets}
    found = {path: _Mean() for path in offsets}
    with state_kept(model):
        for inputs in batches(model, data, batch_size, steps):
            means = _means(reference, wanted_offsets, inputs)
            rows = len(keras.tree.flatten(inputs)[0])
            for path, difference in _differences(model, offsets, inputs, means):
                found[path].add(difference, rows)
    for path, mean in found.items():
        if mean.weight:
            offsets[path].move(mean.value)


def _means(
    model: keras.Model, offsets: Mapping[str, "_Offset"], inputs: Any
) -> dict[str, list[Tensor]]:
    """The mean of each layer's output in one batch, at each call: some layers call one in turn."""
    means: dict[str, list[Tensor]] = {path: [] for path in offsets}

    def measure(path: str, outputs: Tensor) -> Tensor:
        means[path].append(offsets[path].mean(outputs))
        return outputs

    with _before_activation(offsets, measure):
        model(inputs, training=False)
    return means


def _differences(
    model: keras.Model,
    offsets: Mapping[str, "_Offset"],
    inputs: Any,
    means: Mapping[str, list[Tensor]],
) -> list[tuple[str, np.ndarray]]:
    """What each layer's output lacks of `means` in one batch, if those before it lack nothing."""
    found: list[tuple[str, np.ndarray]] = []
    waiting = {path: iter(each) for path, each in means.items()}

    def shift(path: str, outputs: Tensor) -> Tensor:
        difference = next(waiting[path]) - offsets[path].mean(outputs)
        found.append((path, to_numpy(difference)))
        return outputs + ops.cast(difference, outputs.dtype)

    with _before_activation(offsets, shift):
        model(inputs, training=False)
    return found


@dataclass
class _Mean:
    """A weighted mean, of one array after another."""

    value: Any = 0.0
    weight: int = 0

    def add(self, value: np.ndarray, weight: int) -> None:
        self.weight += weight
        self.value = self.value + (value.astype(np.float64) - self.value) * (weight / self.weight)


@dataclass(frozen=True)
class _Offset:
    """What is added to a layer's output (`sign` 1), or subtracted from it (-1).

    `axis` is that of the output along which the variable lies; None for its last axes.
    """

    layer: keras.Layer
    variable: keras.Variable
    sign: int = 1
    axis: int | None = None

    def mean(self, outputs: Tensor) -> Tensor:
        """The mean of outputs over all that shares one number, in a shape that broadcasts."""
        rank, shape = len(outputs.shape), tuple(self.variable.shape)
        if self.axis is not None:
            shape = (-1,) + (1,) * (rank - 1 - self.axis % rank)
        shape = (1,) * (rank - len(shape)) + shape
        shared = tuple(axis for axis, size in enumerate(shape) if size == 1)
        return ops.mean(ops.cast(outputs, "float32"), axis=shared, keepdims=True)

    def move(self, difference: np.ndarray) -> None:
        """Let the outputs grow by `difference`."""
        old = to_numpy(self.variable)
        new = old.astype(np.float64) + self.sign * difference.reshape(old.shape)
        self.variable.assign(new.astype(old.dtype))


def _wrappers(model: keras.Model) -> list[KerasQuantizationWrapper]:
    found = [each for each in sublayers(model) if isinstance(each, KerasQuantizationWrapper)]
    return [each for each in found if each.is_weights_quantization]


def _inside(operation: Any) -> Any:
    return operation.layer if isinstance(operation, KerasQuantizationWrapper) else operation


def _offsets(model: keras.Model) -> dict[str, _Offset]:
    """By a path that is the same in float and quantized, the offset of every layer that has one."""
    norms = {id(_inside(node.operation)): norm for node, norm in normalized_nodes(model)}
    found: dict[str, _Offset] = {}
    calls = Counter(id(layer) for _, layer in _layers(model))
    for path, layer in _layers(model):
        # Calls of a shared layer need not come in the same order in both models.
        if calls[id(layer)] > 1 or behaviour_of(layer) is not Behaviour.LINEAR:
            continue
        activation = getattr(layer, "activation", None)
        if activation is None or isinstance(activation, keras.Layer):
            continue
        if getattr(layer, "bias", None) is not None:
            first = getattr(layer, "data_format", None) == "channels_first"
            found[path] = _Offset(layer, layer.bias, axis=1 if first else None)
        elif id(layer) in norms and activation is keras.activations.linear:
            norm = norms[id(layer)]
            found[path] = _Offset(layer, norm.moving_mean, -1, norm.axis)
    return found


def _layers(model: keras.Model, prefix: str = "") -> Iterator[tuple[str, keras.Layer]]:
    """The layers that a model calls, inner ones too, with their paths; once for each call."""
    for node in graph_nodes(model):
        layer = node.operation
        path = f"{prefix}{layer.name}/"
        if is_graph(layer):
            yield from _layers(layer, path)
        else:
            layers = sublayers(_inside(layer)) if isinstance(layer, keras.Layer) else []
            for i, inner in enumerate(layers):
                yield f"{path}{i}", inner


@contextmanager
def _before_activation(
    offsets: Mapping[str, _Offset], see: Callable[[str, Tensor], Tensor]
) -> Iterator[None]:
    """Let `see(path, outputs)` say what each layer's activation function gets."""
    layers = {path: offset.layer for path, offset in offsets.items()}
    functions = {path: layer.activation for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            layer.activation = partial(_activate, functions[path], see, path)
        yield
    finally:
        for path, layer in layers.items():
            layer.activation = functions[path]


def _activate(function: Callable, see: Callable, path: str, outputs: Tensor) -> Tensor:
    return function(see(path, outputs))
