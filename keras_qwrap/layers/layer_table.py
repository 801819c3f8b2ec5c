"""Data: which weights of which Keras layer are quantized by default, and along which axes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras

from keras_qwrap.layers.keras_internals import is_of_user
from keras_qwrap.numerics.channels import check_channel_axis
from keras_qwrap.numerics.checks import bad_type, bad_value

Axes = int | tuple[int, ...] | None
"""The axes that are kept (`channel_axis`); None: one range for the whole weight."""


@dataclass(frozen=True)
class Row:
    """What is quantized by default of the weights that a layer class owns.

    Args:
        weights: weight path -> the axes that are kept, those of the layer's output channels, or a
            function from a built layer to them. Weights that a layer does not have are skipped.
        reason: why all other weights of the class stay float.
        whole: whether the row speaks for the layers inside as well, so that their own rows do
            not count.

    Example (a kernel `[inputs, units]` has a range for each unit):

    ```python
    from keras_qwrap.layers.layer_table import Row

    row = Row({"kernel": -1}, reason="the bias is small")
    print(row.weights["kernel"], row.whole)  # -1 False
    ```
    """

    weights: Mapping[str, Axes | Callable[[keras.Layer], Axes]]
    reason: str
    whole: bool = False


def einsum_axes(layer: keras.Layer) -> Axes:
    """Kept axes of an `EinsumDense` kernel: those whose letters appear in the output as well.

    `"abc,cde->abde"` keeps axes (1, 2) of `cde`. Where nothing or everything would be kept, as in
    the elementwise `"ab,b->ab"`, a range for each weight would be no compression: None.
    """
    _, _, kernel_and_output = layer.equation.partition(",")
    kernel, _, output = kernel_and_output.partition("->")
    kept = tuple(axis for axis, letter in enumerate(kernel) if letter in output)
    if not kept or len(kept) == len(kernel):
        return None
    return kept[0] if len(kept) == 1 else kept


_BIAS = "a bias is small, and integer kernels add it in 32 bits"
_NORMALIZATION = "normalization: scale, offset and statistics are small, and rescale each channel"
_TABLE = "the table is all there is"
_FOREIGN = "another framework computes with these weights, which cannot be replaced during a call"
_KERNEL = Row({"kernel": -1}, _BIAS)
_TRANSPOSED = Row({"kernel": -2}, _BIAS)
_DEPTHWISE = Row({"kernel": (-2, -1)}, _BIAS)
_SEPARABLE = Row({"depthwise_kernel": (-2, -1), "pointwise_kernel": -1}, _BIAS)
_CELL = Row({"kernel": -1, "recurrent_kernel": -1}, _BIAS)

ROWS: dict[str | type, Row] = {
    "Dense": _KERNEL,
    "EinsumDense": Row({"kernel": einsum_axes}, _BIAS),
    "Conv1D": _KERNEL,
    "Conv2D": _KERNEL,
    "Conv3D": _KERNEL,
    "Conv1DTranspose": _TRANSPOSED,
    "Conv2DTranspose": _TRANSPOSED,
    "Conv3DTranspose": _TRANSPOSED,
    "DepthwiseConv1D": _DEPTHWISE,
    "DepthwiseConv2D": _DEPTHWISE,
    "SeparableConv1D": _SEPARABLE,
    "SeparableConv2D": _SEPARABLE,
    # A lookup copies codes. Only with one scale for the table are these the codes of the output,
    # which an integer gather hands on; and only then can the same codes, transposed, also be the
    # kernel of tied output logits, whose channels are the rows.
    "Embedding": Row({"embeddings": None}, _TABLE),
    "ReversibleEmbedding": Row({"embeddings": None, "reverse_embeddings": -1}, _TABLE),
    "SimpleRNNCell": _CELL,
    "LSTMCell": _CELL,
    "GRUCell": _CELL,
    "ConvLSTMCell": _CELL,
    "BatchNormalization": Row({}, _NORMALIZATION),
    "LayerNormalization": Row({}, _NORMALIZATION),
    "GroupNormalization": Row({}, _NORMALIZATION),
    "RMSNormalization": Row({}, _NORMALIZATION),
    "SpectralNormalization": Row(
        {},
        "the layer overwrites its kernel in training; quantized, the kernel would lose what "
        "training adds to it",
        whole=True,
    ),
    "Normalization": Row({}, "mean and variance of the input data are small"),
    "PReLU": Row({}, "slopes are part of the activation function"),
    "Attention": Row({}, "the scales of attention scores are single numbers"),
    "AdditiveAttention": Row({}, "the scale of attention scores is one vector"),
    "STFTSpectrogram": Row({}, "the kernels are a fixed transform into features"),
    "IntegerLookup": Row({}, "counts and weights of a vocabulary are no kernels"),
    "StringLookup": Row({}, "counts and weights of a vocabulary are no kernels"),
    "JaxLayer": Row({}, "the function's parameters are of unknown layout"),
    "TFSMLayer": Row({}, _FOREIGN),
    "TorchModuleWrapper": Row({}, _FOREIGN),
    "QuantizingLayer": Row({}, "its weights have their quantizers already", whole=True),
}
"""A class of Keras, or of this package, by name, or a registered class itself -> its row.

Rows count for subclasses too. Classes that only hold other layers, or no weights, need none.
"""

_ATTENTION = {
    "query": "query_dense",
    "key": "key_dense",
    "value": "value_dense",
    "output": "output_dense",
}

ALIASES: dict[str | type, Mapping[str, str]] = {
    "MultiHeadAttention": _ATTENTION,
    "GroupedQueryAttention": _ATTENTION,
}
"""A class as in `ROWS` -> short name in a path -> attribute."""


def _keys(layer: keras.Layer) -> list[str | type]:
    """What the classes of a layer are called in `ROWS` and `ALIASES`, nearest first."""
    keys: list[str | type] = []
    for cls in type(layer).__mro__:
        if not issubclass(cls, keras.Layer):
            continue  # Backends have bases of `keras.Layer`, and one is called JaxLayer as well.
        keys.append(cls)
        if not is_of_user(cls):
            keys.append(cls.__name__)
    return keys


def find_row(layer: keras.Layer) -> tuple[str, Row] | None:
    """The row of a layer's class, or of its nearest base, with that class' name; None without."""
    for key in _keys(layer):
        if key in ROWS:
            return key if isinstance(key, str) else key.__name__, ROWS[key]
    return None


def aliases_of(layer: keras.Layer) -> dict[str, str]:
    """The short names of a layer's attributes in paths -> the attributes."""
    found: dict[str, str] = {}
    for key in reversed(_keys(layer)):
        found |= ALIASES.get(key, {})
    return found


def register_layer_weights(
    layer_class: type,
    weights: Mapping[str, Axes],
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Say which weights of a layer class are quantized by default, and along which axes.

    Counts for subclasses that have no row of their own. Registering a class again replaces what
    was registered; classes of Keras may be registered as well.

    Args:
        layer_class: a `keras.Layer` class.
        weights: weight path -> the axis or axes that are kept, those of the output channels, or
            None for one range for the whole weight. Paths may lead to layers inside, as in
            `"dense/kernel"`; all weights of the class that are not named stay float.
        aliases: short names in paths -> attribute; a layer inside is shown by its short name.

    Raises:
        TypeError, ValueError: no layer class, a path that is no string or is empty, axes that are
            no ints or repeat themselves.

    Example:

    ```python
    import keras
    from keras_qwrap.layers.layer_table import register_layer_weights
    from keras_qwrap.layers.weights import default_weights

    class Projection(keras.Layer):
        def build(self, input_shape):
            self.matrix = self.add_weight(name="matrix", shape=(4, input_shape[-1]))
            self.mixing = self.add_weight(name="mixing", shape=(4, 4))

    register_layer_weights(Projection, {"matrix": 0})
    layer = Projection()
    layer.build((None, 3))
    print(default_weights(layer))  # {'matrix': 0}
    ```
    """
    if not isinstance(layer_class, type) or not issubclass(layer_class, keras.Layer):
        raise bad_type(
            "layer_class", layer_class, "a subclass of keras.Layer", "Pass the class itself."
        )
    row = Row(
        {path: _check_axes(path, axes) for path, axes in _check_paths("weights", weights)},
        f"the weights registered for {layer_class.__name__} do not include them",
    )
    checked = dict(_check_paths("aliases", {} if aliases is None else aliases))
    for name, attribute in checked.items():
        if not isinstance(attribute, str) or not attribute or "/" in f"{name}{attribute}":
            raise bad_value(
                f"aliases['{name}']",
                attribute,
                "the name of one attribute for one part of a path",
                "Pass for example {'query': 'query_dense'}.",
            )
    ROWS[layer_class] = row
    ALIASES[layer_class] = checked


def _check_paths(name: str, mapping: Any) -> list[tuple[str, Any]]:
    if not isinstance(mapping, Mapping):
        raise bad_type(name, mapping, "a dictionary", "Pass for example {'kernel': -1}.")
    for path in mapping:
        if not isinstance(path, str) or not all(path.split("/")):
            raise bad_type(
                name,
                path,
                "weight paths as keys: attributes joined by '/'",
                "Use for example 'kernel' or 'cell/kernel'.",
            )
    return list(mapping.items())


def _check_axes(path: str, axes: Any) -> Axes:
    if axes is None:
        return None
    name = f"weights['{path}']"
    kept = check_channel_axis(axes, name)
    negative = [axis for axis in kept if axis < 0]
    if list(kept) != sorted(set(kept)) or (negative and len(negative) < len(kept)):
        raise bad_value(
            name,
            axes,
            "distinct axes in ascending order, counted from one end",
            "Pass for example -1, (1, 2) or (-2, -1); None keeps no axis.",
        )
    return kept if isinstance(axes, (tuple, list)) else kept[0]
