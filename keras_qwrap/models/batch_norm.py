"""Batch normalization taken into the layer before it: in codes and scales, or in float."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_qwrap.layers.keras_internals import GraphNode, sublayers
from keras_qwrap.layers.layer_table import OutputChannels, is_batch_normalization, row_of_outputs
from keras_qwrap.layers.remaking import made_again
from keras_qwrap.layers.weights import follow, weight_paths
from keras_qwrap.models.copying import Copier, check_graph
from keras_qwrap.models.graph import graphs_in
from keras_qwrap.numerics.channels import Channels, make_channels
from keras_qwrap.numerics.checks import bad_type, bad_value
from keras_qwrap.numerics.grids import SMALLEST_SCALE, IntegerGrid, check_scale, float_array
from keras_qwrap.numerics.tensors import to_numpy


@dataclass(frozen=True)
class FoldedWeights:
    """Codes (int32), scales that broadcast against them, and a bias `[n]` (both float32)."""

    codes: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


def fold_scales(
    codes: Any,
    scale: Any,
    bias: Any,
    gamma: Any,
    beta: Any,
    moving_mean: Any,
    moving_variance: Any,
    epsilon: float,
    channel_axis: int | tuple[int, ...],
    *,
    num_bits: int = 8,
    zero_point: Any = 0,
) -> FoldedWeights:
    """Quantized weights that compute what the given ones and the normalization after them do.

    With `m = gamma / sqrt(moving_variance + epsilon)` for each output channel:

        codes' = codes * sign(m)
        scale' = scale * |m|
        bias'  = beta + (bias - moving_mean) * m

    so that no code gets larger. Where `m` is zero, or so small that `scale * |m|` would be below
    2**-126, the codes become 0 and the scale stays as it is. Computed in float64.

    Args:
        codes: integers, the kernel on a signed grid.
        scale: one number, or one for each output channel: `[n]`, or a shape that broadcasts
            against `codes`.
        bias: `[n]`, or None for zeros.
        gamma, beta: `[n]`; None for ones (`scale=False`) and zeros (`center=False`).
        moving_mean, moving_variance, epsilon: as in the normalization.
        channel_axis: the axis of `codes` that holds output channels: -1 for Dense and
            convolutions, -2 for transposed ones, `(-2, -1)` for depthwise ones.
        num_bits: width of the codes.
        zero_point: has to be 0.

    Raises:
        ValueError: an argument does not fit; a result is not finite; or a channel with a negative
            `m` holds the lowest code, which cannot be negated.

    Example:

    ```python
    import keras_qwrap as qi

    folded = qi.fold_scales(
        codes=[[1, 100], [-7, 3]], scale=[0.5, 0.25], bias=None, gamma=[2.0, -1.0],
        beta=None, moving_mean=[1.0, 1.0], moving_variance=[3.0, 3.0], epsilon=1.0,
        channel_axis=-1,
    )
    print(folded.codes.tolist())  # [[1, -100], [-7, -3]]
    print(folded.scale.tolist())  # [[0.5, 0.125]]
    print(folded.bias.tolist())  # [-1.0, 0.5]
    ```
    """
    grid = IntegerGrid(num_bits, signed=True)
    codes = _check_codes(codes, grid, zero_point)
    channels = make_channels(True, channel_axis, codes.ndim)
    shape = channels.range_shape(codes.shape)
    count = math.prod(shape)
    norm = _Normalization(
        gamma=_vector("gamma", gamma, count, default=1.0),
        beta=_vector("beta", beta, count, default=0.0),
        mean=_vector("moving_mean", moving_mean, count),
        variance=_vector("moving_variance", moving_variance, count),
        epsilon=float(epsilon),
    )
    if np.any(norm.variance + norm.epsilon <= 0):
        expected = f"numbers above {-norm.epsilon}"
        raise bad_value("moving_variance", moving_variance, expected, "Check the statistics.")
    multiplier = norm.multiplier.reshape(shape)
    old_scale = _spread_scale(scale, channels, codes.shape)
    new_scale = old_scale * np.abs(multiplier)
    dead = new_scale < SMALLEST_SCALE
    flipped = (multiplier < 0) & ~dead
    if np.any((codes == grid.lowest) & flipped):
        raise bad_value(
            "codes",
            grid.lowest,
            f"codes from {grid.lowest + 1} on in channels with a negative gamma, which change sign",
            "Quantize on the narrow grid, as weights quantizers without a given threshold do.",
        )
    new_bias = norm.shift(_vector("bias", bias, count, default=0.0))
    folded = FoldedWeights(
        codes=np.where(dead, 0, np.where(flipped, -codes, codes)),
        scale=float_array("scale", np.where(dead, old_scale, new_scale)),
        bias=float_array("bias", new_bias),
    )
    check_scale(folded.scale, grid.highest, "scale")
    return folded


@dataclass(frozen=True)
class _Normalization:
    """`x -> x * multiplier + shift(0)` for each channel, float64."""

    gamma: np.ndarray | np.float64
    beta: np.ndarray | np.float64
    mean: np.ndarray
    variance: np.ndarray
    epsilon: float

    @property
    def multiplier(self) -> np.ndarray:
        """`gamma / sqrt(variance + epsilon)`."""
        return self.gamma / np.sqrt(self.variance + self.epsilon)

    def shift(self, bias: np.ndarray | float) -> np.ndarray:
        """`beta + (bias - mean) * multiplier`."""
        return self.beta + (bias - self.mean) * self.multiplier


def _check_codes(codes: Any, grid: IntegerGrid, zero_point: Any) -> np.ndarray:
    fix = "Pass the codes that `get_codes` gave, and their `num_bits`."
    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu" or codes.ndim == 0 or codes.size == 0:
        raise bad_type("codes", codes, "an array of integers, the codes of a kernel", fix)
    if not (grid.lowest <= codes.min() and codes.max() <= grid.highest):
        ends = (int(codes.min()), int(codes.max()))
        raise bad_value("codes", ends, f"codes from {grid.lowest} to {grid.highest}", fix)
    if np.any(np.asarray(zero_point) != 0):
        raise bad_value(
            "zero_point",
            np.asarray(zero_point).tolist(),
            "0, since codes change their sign where gamma is negative",
            "Quantize the weights by a symmetric or power-of-two quantizer.",
        )
    return codes.astype(np.int32)


def _vector(name: str, value: Any, count: int, default: float | None = None) -> np.ndarray:
    if value is None and default is not None:
        return np.full(count, default)
    vector = float_array(name, value).astype(np.float64)
    if vector.shape != (count,):
        expected = f"a vector of {count} numbers, one for each output channel"
        raise bad_value(name, vector.shape, expected, "Check `channel_axis`.")
    return vector


def _spread_scale(scale: Any, channels: Channels, shape: tuple[int, ...]) -> np.ndarray:
    """One scale for each output channel, in a shape that broadcasts against the codes."""
    given, wanted = float_array("scale", scale).astype(np.float64), channels.range_shape(shape)
    if np.any(given <= 0):
        raise bad_value("scale", float(given.min()), "positive numbers", "Pass the codes' scale.")
    if given.shape in ((math.prod(wanted),), tuple(shape[axis] for axis in channels.kept)):
        return given.reshape(wanted)
    try:
        return np.broadcast_to(given, wanted)
    except ValueError as error:
        raise bad_value(
            "scale",
            given.shape,
            f"one number, or a shape that broadcasts to {wanted}",
            "Check `channel_axis`: a scale may differ only between output channels.",
        ) from error


def fold_batch_norm(model: keras.Model) -> keras.Model:
    """A new float model without the batch normalizations that the layers before them can absorb.

    With `m = gamma / sqrt(moving_variance + epsilon)` for each output channel, the layer before
    gets `kernel * m` and the bias `beta + (bias - moving_mean) * m`, so that the outputs are those
    of `model` in inference, to float rounding. All other layers keep their names and weights;
    `model` is left as it is.

    Absorbed is a `BatchNormalization` that directly follows a Dense, EinsumDense or convolution
    layer of Keras (of a separable one, the pointwise part absorbs it), or a class that
    `register_layer` knows as linear with a weight to fold, also inside nested models.
    It stays where the layer before has an activation, constraint or activity regularizer of its
    own, is shared, has LoRA or integer weights, or gives its output to something else as well;
    where the two differ in their channel axis or compute dtype; where it is called with
    `training=True`; and where the result would not be finite.

    Args:
        model: a built Functional or Sequential model.

    Raises:
        TypeError: the model is neither Functional nor Sequential.
        ValueError: the model is not built, or a layer cannot be made again from its config.

    Example:

    ```python
    import keras
    import keras_qwrap as qi

    model = keras.Sequential([
        keras.Input((8, 8, 3)),
        keras.layers.Conv2D(4, 3, use_bias=False, name="conv"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.ReLU(name="relu"),
    ])
    folded = qi.fold_batch_norm(model)
    print([layer.name for layer in folded.layers])  # ['conv', 'relu']
    print(folded.get_layer("conv").use_bias)  # True
    ```
    """
    check_graph(model)
    folds = _find_folds(model)
    folder = _Folder(folds)
    new = folder.copy_model(model)
    # Only a copy shows how each layer is called.
    inference = [fold for fold in folds if id(fold.norm) not in folder.called_in_training]
    return new if len(inference) == len(folds) else _Folder(inference).copy_model(model)


@dataclass(frozen=True)
class _Fold:
    """A layer, the normalization that it absorbs, and what its copy is then made of."""

    layer: keras.Layer
    norm: keras.Layer
    path: str
    kernel: np.ndarray
    bias: np.ndarray
    config: dict


def _output_channels(layer: keras.Layer, rank: int, axis: int) -> OutputChannels | None:
    """How `layer`, whose output has `rank` axes, makes the channels along `axis`, if it does."""
    row = row_of_outputs(layer)
    if callable(row.fold):
        return row.fold(layer, rank, axis)
    first = getattr(layer, "data_format", None) == "channels_first"
    if row.fold is None or axis != (1 if first else rank - 1):
        return None
    needs_bias = getattr(layer, "bias", None) is None
    if needs_bias and "use_bias" not in layer.get_config():
        return None
    kept = (row.weights or {}).get(row.fold)
    axes = (kept,) if isinstance(kept, int) else kept
    if not isinstance(axes, tuple) or not isinstance(follow(layer, row.fold), keras.Variable):
        return None
    return OutputChannels(row.fold, axes, (-1,), {"use_bias": True} if needs_bias else {})


def normalized_nodes(model: keras.Model) -> list[tuple[GraphNode, keras.Layer]]:
    """Nodes whose output a batch normalization alone reads, and that; neither is called twice."""
    graphs = graphs_in(model)
    calls = Counter(id(node.operation) for graph in graphs for node in graph.nodes)
    found = []
    for graph in graphs:
        for node in graph.nodes:
            norm = node.operation
            if not is_batch_normalization(norm):
                continue
            source = graph.made_by(node.inputs[0])
            alone = graph.only_reader(node.inputs[0]) is node
            if source and alone and calls[id(source.operation)] == calls[id(norm)] == 1:
                found.append((source, norm))
    return found


def _find_folds(model: keras.Model) -> list[_Fold]:
    found = normalized_nodes(model)
    folds = [_fold(node.operation, len(node.outputs[0].shape), norm) for node, norm in found]
    return [fold for fold in folds if fold is not None]


def _fold(layer: keras.Layer, rank: int, norm: keras.Layer) -> _Fold | None:
    """What becomes of `layer` when it absorbs `norm`; None where it cannot."""
    output = _output_channels(layer, rank, norm.axis % rank)
    if output is None or not _is_linear(layer, norm):
        return None
    kernel, numbers = to_numpy(follow(layer, output.path)), _statistics(norm, output.bias_shape)
    shape = [1] * kernel.ndim
    for axis in output.axes:
        shape[axis] = kernel.shape[axis]
    if math.prod(shape) != math.prod(norm.moving_mean.shape):
        return None
    bias = getattr(layer, "bias", None)
    old_bias = 0.0 if bias is None else to_numpy(bias).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        new_bias = numbers.shift(old_bias).astype(kernel.dtype)
        wide = kernel.astype(np.float64) * numbers.multiplier.reshape(shape)
        new_kernel = wide.astype(kernel.dtype)
    has_channels = bias is None or new_bias.shape == tuple(bias.shape)
    if not (has_channels and np.isfinite(new_kernel).all() and np.isfinite(new_bias).all()):
        return None
    return _Fold(layer, norm, output.path, new_kernel, new_bias, output.config)


def _is_linear(layer: keras.Layer, norm: keras.Layer) -> bool:
    """Whether nothing but the kernel and bias acts between the layer's input and `norm`."""
    constraints = [v for name, v in layer.get_config().items() if name.endswith("_constraint")]
    return (
        getattr(layer, "activation", None) in (None, keras.activations.linear)
        and layer.compute_dtype == norm.compute_dtype
        and layer.activity_regularizer is None
        and norm.activity_regularizer is None
        and not any(constraints)
        and not getattr(layer, "lora_enabled", False)
        and getattr(layer, "quantization_mode", None) is None
    )


def _statistics(norm: keras.Layer, shape: tuple[int, ...]) -> _Normalization:
    def read(variable: keras.Variable) -> np.ndarray:
        return to_numpy(variable).astype(np.float64).reshape(shape)

    return _Normalization(
        gamma=read(norm.gamma) if norm.scale else np.float64(1),
        beta=read(norm.beta) if norm.center else np.float64(0),
        mean=read(norm.moving_mean),
        variance=read(norm.moving_variance),
        epsilon=norm.epsilon,
    )


class _Folder(Copier):
    """Copies a model without the absorbed normalizations."""

    def __init__(self, folds: list[_Fold]) -> None:
        super().__init__()
        self._folds = {id(fold.layer): fold for fold in folds}
        self._absorbed = {id(fold.norm) for fold in folds}
        self._folded: list[tuple[_Fold, keras.Layer]] = []
        self.called_in_training: set[int] = set()

    def copy_model(self, model: keras.Model) -> keras.Model:
        new = super().copy_model(model)
        for fold, layer in self._folded:
            kernel = follow(fold.layer, fold.path)
            for path, weight in weight_paths(fold.layer).items():
                value = fold.kernel if weight is kernel else to_numpy(weight).copy()
                follow(layer, path).assign(value)
            layer.bias.assign(fold.bias)
        return new

    def new_layer(self, layer: keras.Layer) -> keras.Layer | None:
        if id(layer) in self._absorbed:
            return None
        if id(layer) not in self._folds:
            return self.plain_copy(layer)
        fold = self._folds[id(layer)]
        if fold.config:
            new = type(layer).from_config(layer.get_config() | fold.config)
        else:
            new = made_again(layer)
        self._folded.append((fold, new))
        return new

    def call(self, layer: Any, new: Any, args: tuple, kwargs: dict) -> Any:
        in_training = kwargs.get("training") or any(value is True for value in args[1:])
        if in_training and isinstance(layer, (keras.layers.BatchNormalization, keras.Model)):
            self.called_in_training |= {id(inner) for inner in sublayers(layer)}
        if new is None:
            return args[0] if args else kwargs["inputs"]
        return super().call(layer, new, args, kwargs)
