"""Data: all that is known of a layer class, in one row; users add rows by `register_layer`."""

import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras

from keras_qwrap.layers.keras_internals import is_of_user
from keras_qwrap.numerics.channels import check_channel_axis
from keras_qwrap.numerics.checks import bad_type, bad_value, nearest

Axes = int | tuple[int, ...] | None
"""The axes that are kept (`channel_axis`); None: one range for the whole weight."""


class Behaviour(enum.Enum):
    """What a layer or function makes of its inputs, in inference."""

    UNKNOWN = "unknown"
    LINEAR = "linear"
    """Products with a kernel, a bias, and then the function in the attribute `activation`."""
    SUM = "sum"
    MIXTURE = "mixture"
    """Joins, scales or masks its inputs: its outputs are on no grid of theirs."""
    CONCATENATION = "concatenation"
    BATCH_NORMALIZATION = "batch_normalization"
    NORMALIZATION = "normalization"
    """Of input data, by fixed statistics."""
    ACTIVATION = "activation"
    """A function of each value, which integer kernels apply behind products and sums."""
    CARRIER = "carrier"
    """Moves values, chooses among them or averages them: its outputs are on its input's grid."""
    MAX_POOLING = "max_pooling"
    """A carrier of maxima."""
    IDENTITY = "identity"
    """A carrier that leaves its input as it is, but for what it does in training."""
    LOOKUP = "lookup"
    """Needs the exact values of its input: token ids, or a value that stands for something."""
    GATHER = "gather"
    """A lookup whose outputs are entries of its weight."""
    MASKING = "masking"
    """A lookup that hands its input on."""
    INDEXING = "indexing"
    """Needs the exact values of some arguments, and takes floats for them."""
    CAST = "cast"
    CALLING = "calling"
    """Is given functions, into which nobody can see."""


class OutputRange(enum.Enum):
    """How the range of an operation's outputs is known."""

    DATA = "data"
    UNIT = "unit"
    SIGNED_UNIT = "signed unit"


@dataclass(frozen=True)
class OutputChannels:
    """How a layer makes its output channels: the weight at `path`, along its `axes`.

    `bias_shape` is that of a vector of them that broadcasts against the bias, `config` what makes
    sure that there is one.
    """

    path: str
    axes: tuple[int, ...]
    bias_shape: tuple[int, ...]
    config: dict


@dataclass(frozen=True)
class Row:
    """All that is known of a layer class, or of the class of a function between layers.

    Args:
        weights: of the weights that the class owns, those that are quantized by default: path ->
            the axes that are kept, those of the layer's output channels, or a function from a
            built layer to them. Weights that a layer does not have are skipped. None says nothing
            of weights.
        reason: why all other weights of the class stay float.
        behaviour: what the outputs are.
        fold: the path of the weight that makes the output channels, along the axes that `weights`
            keeps, so that it can absorb a batch normalization; or a function from a layer, the
            rank of its output and the axis of the channels to `OutputChannels`, or to None.
        outputs: the known range of the outputs; that of a linear layer is its activation's.
        aliases: short names in paths -> attributes.
        exact: names of the arguments whose exact values are needed.
        whole: whether the row speaks for the layers inside as well, so that their own rows do
            not count.
    """

    weights: Mapping[str, Axes | Callable[[keras.Layer], Axes]] | None = None
    reason: str = ""
    behaviour: Behaviour = Behaviour.UNKNOWN
    fold: str | Callable[[keras.Layer, int, int], OutputChannels | None] | None = None
    outputs: OutputRange = OutputRange.DATA
    aliases: Mapping[str, str] = field(default_factory=dict)
    exact: frozenset[str] = frozenset()
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


def einsum_channels(layer: keras.Layer, rank: int, axis: int) -> OutputChannels | None:
    """The axis of an `EinsumDense` kernel whose letter stands in the output at `axis`."""
    operands, result = layer.equation.replace(" ", "").split("->")
    kernel = operands.split(",")[1]
    before, _, after = result.partition("...")
    label = (before + "." * (rank - len(before) - len(after)) + after)[axis]
    if label not in kernel:
        return None
    bias_shape = (-1,) + (1,) * (rank - 1 - axis)
    config = {} if layer.bias_axes else {"bias_axes": label}
    return OutputChannels("kernel", (kernel.index(label),), bias_shape, config)


_BIAS = "a bias is small, and integer kernels add it in 32 bits"
_NORMALIZATION = "normalization: scale, offset and statistics are small, and rescale each channel"
_TABLE = "the table is all there is"
_FOREIGN = "another framework computes with these weights, which cannot be replaced during a call"
_VOCABULARY = "counts and weights of a vocabulary are no kernels"

_KERNEL = Row({"kernel": -1}, _BIAS, Behaviour.LINEAR, fold="kernel")
_TRANSPOSED = Row({"kernel": -2}, _BIAS, Behaviour.LINEAR, fold="kernel")
_DEPTHWISE = Row({"kernel": (-2, -1)}, _BIAS, Behaviour.LINEAR, fold="kernel")
_SEPARABLE = Row(
    {"depthwise_kernel": (-2, -1), "pointwise_kernel": -1},
    _BIAS,
    Behaviour.LINEAR,
    fold="pointwise_kernel",
)
_CELL = Row({"kernel": -1, "recurrent_kernel": -1}, _BIAS)
_RESCALING = Row({}, _NORMALIZATION)
_WORDS = Row({}, _VOCABULARY, Behaviour.LOOKUP)
_ATTENTION = Row(
    aliases={
        "query": "query_dense",
        "key": "key_dense",
        "value": "value_dense",
        "output": "output_dense",
    }
)
_UNIT = Row(behaviour=Behaviour.ACTIVATION, outputs=OutputRange.UNIT)
_SIGNED_UNIT = Row(behaviour=Behaviour.ACTIVATION, outputs=OutputRange.SIGNED_UNIT)


def _rows(behaviour: Behaviour, names: str, ranks: tuple[int, ...] = ()) -> dict[Any, Row]:
    """One row for all classes of these names; with `ranks`, for `Name1D`, `Name2D`, ..."""
    all_names = [f"{name}{rank}D" for name in names.split() for rank in ranks] or names.split()
    return dict.fromkeys(all_names, Row(behaviour=behaviour))


ROWS: dict[str | type, Row] = {
    "Dense": _KERNEL,
    "EinsumDense": Row({"kernel": einsum_axes}, _BIAS, Behaviour.LINEAR, fold=einsum_channels),
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
    "Embedding": Row({"embeddings": None}, _TABLE, Behaviour.GATHER),
    "ReversibleEmbedding": Row(
        {"embeddings": None, "reverse_embeddings": -1}, _TABLE, Behaviour.LOOKUP
    ),
    "SimpleRNNCell": _CELL,
    "LSTMCell": _CELL,
    "GRUCell": _CELL,
    "ConvLSTMCell": _CELL,
    "MultiHeadAttention": _ATTENTION,
    "GroupedQueryAttention": _ATTENTION,
    "BatchNormalization": Row({}, _NORMALIZATION, Behaviour.BATCH_NORMALIZATION),
    "LayerNormalization": _RESCALING,
    "GroupNormalization": _RESCALING,
    "RMSNormalization": _RESCALING,
    "SpectralNormalization": Row(
        {},
        "the layer overwrites its kernel in training; quantized, the kernel would lose what "
        "training adds to it",
        whole=True,
    ),
    "Normalization": Row(
        {}, "mean and variance of the input data are small", Behaviour.NORMALIZATION
    ),
    "PReLU": Row({}, "slopes are part of the activation function", Behaviour.ACTIVATION),
    "Attention": Row({}, "the scales of attention scores are single numbers"),
    "AdditiveAttention": Row({}, "the scale of attention scores is one vector"),
    "STFTSpectrogram": Row({}, "the kernels are a fixed transform into features"),
    "IntegerLookup": _WORDS,
    "StringLookup": _WORDS,
    "JaxLayer": Row({}, "the function's parameters are of unknown layout"),
    "TFSMLayer": Row({}, _FOREIGN),
    "TorchModuleWrapper": Row({}, _FOREIGN),
    "QuantizingLayer": Row({}, "its weights have their quantizers already", whole=True),
    "Softmax": _UNIT,
    "Sigmoid": _UNIT,
    "HardSigmoid": _UNIT,
    "Tanh": _SIGNED_UNIT,
    "HardTanh": _SIGNED_UNIT,
    **_rows(
        Behaviour.ACTIVATION,
        "Activation ELU LeakyReLU ReLU Celu Elu Gelu Glu HardShrink HardSilu LeakyRelu LogSigmoid "
        "Relu Relu6 Selu Silu SoftShrink Softplus Softsign SparsePlus TanhShrink Threshold",
    ),
    **_rows(Behaviour.SUM, "Add Subtract"),
    **_rows(Behaviour.CONCATENATION, "Concatenate"),
    **_rows(
        Behaviour.MIXTURE,
        "Append Hstack Maximum Minimum Multiply Rescaling Stack Vstack Where",
    ),
    **_rows(Behaviour.MAX_POOLING, "GlobalMaxPooling MaxPooling", (1, 2, 3)),
    **_rows(Behaviour.MAX_POOLING, "MaxPool"),
    **_rows(
        Behaviour.CARRIER,
        "AdaptiveAveragePooling AdaptiveMaxPooling AveragePooling Cropping GlobalAveragePooling "
        "UpSampling ZeroPadding",
        (1, 2, 3),
    ),
    **_rows(
        Behaviour.CARRIER,
        "AveragePool BroadcastTo CenterCrop Copy Diagonal ExpandDims Flatten Flip GetItem Max "
        "Moveaxis Pad Permute Ravel Repeat RepeatVector Reshape Roll Slice Split Squeeze "
        "StopGradient Swapaxes Take Tile Transpose Unstack",
    ),
    **_rows(Behaviour.IDENTITY, "SpatialDropout", (1, 2, 3)),
    **_rows(
        Behaviour.IDENTITY,
        "ActivityRegularization AlphaDropout AugMix CutMix Dropout GaussianDropout GaussianNoise "
        "Identity InputLayer MixUp RandAugment RandomBrightness RandomColorDegeneration "
        "RandomColorJitter RandomContrast RandomCrop RandomElasticTransform RandomErasing "
        "RandomFlip RandomGaussianBlur RandomGrayscale RandomHue RandomInvert RandomPerspective "
        "RandomPosterization RandomRotation RandomSaturation RandomSharpness RandomShear "
        "RandomTranslation RandomZoom",
    ),
    **_rows(
        Behaviour.LOOKUP,
        "CategoryEncoding Discretization HashedCrossing Hashing MultiHot OneHot",
    ),
    **_rows(Behaviour.MASKING, "Masking"),
    "CTCLoss": Row(
        behaviour=Behaviour.INDEXING, exact=frozenset({"target", "target_length", "output_length"})
    ),
    "SparseCategoricalCrossentropy": Row(behaviour=Behaviour.INDEXING, exact=frozenset({"target"})),
    "TakeAlongAxis": Row(behaviour=Behaviour.INDEXING, exact=frozenset({"indices"})),
    **_rows(Behaviour.CAST, "Cast"),
    **_rows(
        Behaviour.CALLING,
        "AssociativeScan Cond ForiLoop Map Scan Switch VectorizedMap WhileLoop",
    ),
}
"""A class of Keras, or of this package, by name, or a registered class itself -> its row.

Layers and functions of one name share a row. What a row says of weights counts for subclasses too,
what it says of outputs only for those that keep what their parent computes. Classes that only
hold other layers, or no weights, need no row.
"""

LOOKUPS = frozenset({Behaviour.LOOKUP, Behaviour.GATHER, Behaviour.MASKING})
"""What needs the exact values of its input."""


def rows_of(operation: Any) -> Iterator[tuple[type, Row]]:
    """The classes of a layer or function that have a row, nearest first, with their rows.

    A registered class of Keras may have two.
    """
    for cls in type(operation).__mro__:
        # Backends have bases of `keras.Layer`, and one is called JaxLayer as well.
        if issubclass(cls, keras.Operation):
            keys: tuple[str | type, ...] = (cls,) if is_of_user(cls) else (cls, cls.__name__)
            yield from ((cls, ROWS[key]) for key in keys if key in ROWS)


def find_row(layer: keras.Layer) -> tuple[str, Row] | None:
    """The nearest row that speaks of a layer's weights, with its class' name; None without."""
    found = ((cls.__name__, row) for cls, row in rows_of(layer) if row.weights is not None)
    return next(found, None)


def aliases_of(layer: keras.Layer) -> dict[str, str]:
    """The short names of a layer's attributes in paths -> the attributes."""
    found: dict[str, str] = {}
    for _, row in reversed(list(rows_of(layer))):
        found |= row.aliases
    return found


def row_of_outputs(operation: Any) -> Row:
    """The row that says what a layer or function computes; an empty one where none does.

    A subclass is what its parent is where it keeps the parent's `call`; with a `call` of its own
    nothing is known of what it computes, unless it has a row of its own.
    """
    for cls, row in rows_of(operation):
        if row.behaviour is not Behaviour.UNKNOWN or row.outputs is not OutputRange.DATA:
            return row if _computes_as(type(operation), cls) else Row()
    return Row()


def _computes_as(cls: type, parent: type) -> bool:
    # Keras' convolutions are meant to be changed by either.
    names = ("call", "convolution_op")
    return all(getattr(cls, name, None) is getattr(parent, name, None) for name in names)


def behaviour_of(operation: Any) -> Behaviour:
    """What a layer or function does."""
    return row_of_outputs(operation).behaviour


def is_custom(operation: Any) -> bool:
    """Whether an operation is a layer that computes what its user wrote, and no row says what."""
    known = behaviour_of(operation) is not Behaviour.UNKNOWN
    if known or not isinstance(operation, keras.Layer):
        return False
    owner = next(cls for cls in type(operation).__mro__ if "call" in vars(cls))
    return is_of_user(owner) or isinstance(operation, keras.layers.Lambda)


def is_identity(operation: Any) -> bool:
    """Whether an operation leaves its input as it is in inference.

    In training its outputs are off the grid of the input, and the layer behind takes them so.
    """
    behaviour = behaviour_of(operation)
    linear = getattr(operation, "activation", None) is keras.activations.linear
    return behaviour is Behaviour.IDENTITY or (behaviour is Behaviour.ACTIVATION and linear)


def is_batch_normalization(operation: Any) -> bool:
    """Whether an operation is Keras' batch normalization, and computes as that does."""
    keras_own = isinstance(operation, keras.layers.BatchNormalization)
    return keras_own and behaviour_of(operation) is Behaviour.BATCH_NORMALIZATION


def may_look_up(operation: Any) -> bool:
    """Whether an operation is a lookup, or derived from one and may be one inside its `call`."""
    return any(row.behaviour in LOOKUPS for _, row in rows_of(operation))


def activation_name(operation: Any) -> str:
    """What the function in a layer's attribute `activation` is called; empty without one."""
    function: Callable | None = getattr(operation, "activation", None)
    return getattr(function, "__name__", "unknown" if function else "")


def output_range(operation: Any) -> OutputRange:
    """How the range of an operation's outputs is known; a linear layer's by its activation."""
    row = row_of_outputs(operation)
    applies = row.behaviour is Behaviour.ACTIVATION and hasattr(operation, "activation")
    if not applies and row.behaviour is not Behaviour.LINEAR:
        return row.outputs
    # A function goes by the name of its operation: `hard_sigmoid` is what HardSigmoid is.
    words = activation_name(operation).split("_")
    row = ROWS.get("".join(word.capitalize() for word in words), Row())
    return row.outputs if row.behaviour is Behaviour.ACTIVATION else OutputRange.DATA


def register_layer(
    layer_class: type,
    weights: Mapping[str, Axes] | None = None,
    *,
    behaviour: str = "unknown",
    fold: str | None = None,
    outputs: str = "data",
    aliases: Mapping[str, str] | None = None,
    reason: str | None = None,
    whole: bool = False,
) -> None:
    """Say what a layer class is: its weights, what it computes, and what it can absorb.

    What is said of weights and names counts for subclasses too, what is said of outputs only for
    those that keep the class' `call`. Registering a class again replaces what was registered;
    what is not said of it is looked up in its bases. Classes of Keras may be registered as well.

    Args:
        layer_class: a `keras.Layer` class.
        weights: weight path -> the axis or axes that are kept, those of the output channels, or
            None for one range for the whole weight. Paths may lead to layers inside, as in
            `"dense/kernel"`; all weights of the class that are not named stay float. Without a
            dictionary the class has the weights of its bases, or the default rule.
        behaviour: what the outputs are, in inference:
            "linear" (products of the input with a weight, a bias, and then the function in the
            attribute `activation`, if there is one): an activation function or batch normalization
            behind it runs in the same integer kernel;
            "sum": of its inputs; so does an activation function behind it;
            "activation": a function of each value; nothing is quantized before it;
            "carrier" or "max_pooling": values of the input, moved, chosen or averaged, or their
            maxima: the outputs need no quantizer of their own;
            "identity": the input, as it is;
            "lookup": the input's exact values are needed, and stay float; "gather": a lookup whose
            outputs are entries of its one weight, on whose grid they are;
            "unknown": the outputs are quantized, onto a grid that is found from data.
            (The remaining ones are "mixture", "concatenation", "batch_normalization",
            "normalization", "masking", "indexing", "cast" and "calling": Keras' own.)
        fold: of a linear class, the one of `weights` that makes the output channels (the last axis
            of the output; the one behind the batch with `data_format="channels_first"`) along its
            kept axes. `fold_batch_norm` then multiplies it. The bias is in the attribute `bias`;
            a layer without one absorbs nothing, unless its config has `use_bias`.
        outputs: "data", or the range that they are known to have: "unit" `[0, 1)`, or
            "signed unit" `[-1, 1)`; with "linear" that is the activation function's.
        aliases: short names in paths -> attribute; a layer inside is shown by its short name.
        reason: why all other weights of the class stay float, for the report.
        whole: whether the layers inside are left alone, whatever is known of their classes.

    Raises:
        TypeError, ValueError: no layer class, a path that is no string or is empty, axes that are
            no ints or repeat themselves, an unknown behaviour or range, a `fold` without axes.

    Example:

    ```python
    import keras
    import keras_qwrap as qi

    class Projection(keras.layers.Layer):
        def build(self, input_shape):
            self.matrix = self.add_weight(name="matrix", shape=(4, input_shape[-1]))
            self.bias = self.add_weight(name="bias", shape=(4,))

        def call(self, inputs):
            return keras.ops.matmul(inputs, keras.ops.transpose(self.matrix)) + self.bias

    qi.register_layer(Projection, {"matrix": 0}, behaviour="linear", fold="matrix")
    model = keras.Sequential([keras.Input((3,)), Projection(), keras.layers.BatchNormalization()])
    print([type(layer).__name__ for layer in qi.fold_batch_norm(model).layers])  # ['Projection']
    ```
    """
    if not isinstance(layer_class, type) or not issubclass(layer_class, keras.Layer):
        raise bad_type(
            "layer_class", layer_class, "a subclass of keras.Layer", "Pass the class itself."
        )
    kept = None
    if weights is not None:
        kept = {path: _check_axes(path, axes) for path, axes in _check_paths("weights", weights)}
    usual = f"the weights registered for {layer_class.__name__} do not include them"
    known = _member(Behaviour, "behaviour", behaviour)
    if fold is not None and (known is not Behaviour.LINEAR or (kept or {}).get(fold) is None):
        raise bad_value(
            "fold",
            fold,
            "a path among `weights` that keeps axes, with behaviour='linear'",
            "Pass for example weights={'kernel': -1}, behaviour='linear', fold='kernel'.",
        )
    ROWS[layer_class] = Row(
        kept,
        usual if reason is None else reason,
        known,
        fold,
        _member(OutputRange, "outputs", outputs),
        _check_aliases({} if aliases is None else aliases),
        whole=whole,
    )


def register_layer_weights(
    layer_class: type,
    weights: Mapping[str, Axes],
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Say which weights of a layer class are quantized by default: `register_layer` with no more.

    Args:
        layer_class: a `keras.Layer` class.
        weights, aliases: as for `register_layer`.

    Raises:
        TypeError, ValueError: as `register_layer`.

    Example:

    ```python
    import keras
    import keras_qwrap as qi

    class Projection(keras.Layer):
        def build(self, input_shape):
            self.matrix = self.add_weight(name="matrix", shape=(4, input_shape[-1]))

        def call(self, inputs):
            return keras.ops.matmul(inputs, keras.ops.transpose(self.matrix))

    qi.register_layer_weights(Projection, {"matrix": 0})
    model = qi.quantize_model(keras.Sequential([keras.Input((3,)), Projection()]), "w4")
    print(model.layers[0].get_codes()["matrix"][1].shape)  # (4, 1)
    ```
    """
    if weights is None:
        raise bad_type("weights", weights, "a dictionary", "Pass for example {'kernel': -1}.")
    register_layer(layer_class, weights, aliases=aliases)


def _member(kind: Any, name: str, value: Any) -> Any:
    """The member of an enum that has this value."""
    values = [member.value for member in kind]
    if value not in values:
        expected = f"one of {', '.join(map(repr, values))}"
        raise bad_value(name, value, expected, f"The nearest: {nearest(str(value), values)}.")
    return kind(value)


def _check_aliases(aliases: Any) -> dict[str, str]:
    checked = dict(_check_paths("aliases", aliases))
    for name, attribute in checked.items():
        if not isinstance(attribute, str) or not attribute or "/" in f"{name}{attribute}":
            raise bad_value(
                f"aliases['{name}']",
                attribute,
                "the name of one attribute for one part of a path",
                "Pass for example {'query': 'query_dense'}.",
            )
    return checked


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
