"""Twelve styles of models through the whole life of a quantized model; every step is exact.

Written as tutorials write them: custom layers with and without `get_config`, whole numbers that are
floats, labels as inputs, training steps of one's own, open image sizes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from reference import same, to_numpy

import keras_qwrap as qi

pytestmark = [pytest.mark.slow, pytest.mark.tensorflow]

ROWS = 16
TOLERANCE = 3e-3
"""Root of the mean squared error of a w16a16 model, over the spread of the float outputs."""


@dataclass
class Style:
    """A float model, what it is trained with, and the classes that its files name."""

    model: keras.Model
    x: Any
    y: Any = None
    loss: Any = "mse"
    classes: list[type] = field(default_factory=list)
    endings: tuple[str, ...] = ("keras", "h5")
    """Keras' own `.h5` holds neither subclassed models nor functions between layers."""
    train: Callable | None = None
    more: list[Any] = field(default_factory=list)
    """Further inputs, of other sizes."""

    @property
    def custom_objects(self) -> dict[str, type]:
        return {cls.__name__: cls for cls in self.classes}


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype("float32")


def integers(highest: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(0, highest, size=shape)


def images(size: int, channels: int = 3) -> np.ndarray:
    """Smooth, as pictures are, in [0, 1]."""
    coarse = np.abs(floats(ROWS, 4, 4, channels))
    repeats = size // 4
    return (coarse / coarse.max()).repeat(repeats, 1).repeat(repeats, 2)


# Convolutions


def unet() -> Style:
    def block(x, filters):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        return layers.Activation("relu")(layers.BatchNormalization()(x))

    inputs = keras.Input((16, 16, 3))
    first = block(inputs, 4)
    second = block(layers.MaxPooling2D()(first), 8)
    x = block(layers.Dropout(0.1)(layers.MaxPooling2D()(second)), 8)
    x = layers.Conv2DTranspose(8, 2, strides=2, padding="same")(x)
    x = block(layers.Concatenate()([x, second]), 8)
    x = layers.UpSampling2D(interpolation="bilinear")(x)
    x = block(layers.Concatenate()([x, first]), 4)
    outputs = layers.Conv2D(2, 1, activation="softmax")(x)
    x = images(16)
    return Style(
        keras.Model(inputs, outputs),
        x,
        (x.mean(-1) > 0.2).astype("int32"),
        "sparse_categorical_crossentropy",
    )


def wavenet() -> Style:
    inputs = keras.Input((64, 1))
    x = layers.Conv1D(8, 2, padding="causal")(inputs)
    skips = []
    for dilation in (1, 2, 4):
        options = {"padding": "causal", "dilation_rate": dilation}
        filtered = layers.Conv1D(8, 2, activation="tanh", **options)(x)
        gate = layers.Conv1D(8, 2, activation="sigmoid", **options)(x)
        gated = layers.Multiply()([filtered, gate])
        skips.append(layers.Conv1D(8, 1)(gated))
        x = layers.Add()([layers.Conv1D(8, 1)(gated), x])
    x = layers.ReLU()(layers.Add()(skips))
    outputs = layers.Conv1D(1, 1)(x)
    wave = np.sin(np.cumsum(np.abs(floats(ROWS, 65, 1)), 1)).astype("float32")
    return Style(keras.Model(inputs, outputs), wave[:, :-1], wave[:, 1:])


class Distance(layers.Layer):
    """How far two codes are apart."""

    def call(self, left, right):
        return ops.abs(left - right)


def siamese() -> Style:
    encoder = keras.Sequential(
        [
            keras.Input((16, 16, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(8, activation="sigmoid"),
        ],
        name="encoder",
    )
    left, right = keras.Input((16, 16, 1), name="left"), keras.Input((16, 16, 1), name="right")
    outputs = layers.Dense(1, activation="sigmoid")(Distance()(encoder(left), encoder(right)))
    pictures = images(16, 1)
    return Style(
        keras.Model([left, right], outputs),
        [pictures, pictures[::-1].copy()],
        integers(2, ROWS, 1),
        "binary_crossentropy",
        [Distance],
    )


def detection() -> Style:
    """A pyramid of features, boxes and classes at two scales, for pictures of any size."""
    inputs = keras.Input((None, None, 3))
    x = layers.Rescaling(2.0, -1.0)(inputs)
    levels = []
    for filters in (4, 8, 8):
        x = layers.Conv2D(filters, 3, strides=2, padding="same", activation="relu")(x)
        levels.append(layers.Conv2D(8, 1, padding="same")(x))
    fine = layers.Add()([levels[1], layers.UpSampling2D(2)(levels[2])])
    boxes, classes = layers.Conv2D(4, 3, padding="same"), layers.Conv2D(2, 3, padding="same")
    flat = layers.Reshape((-1, 4)), layers.Reshape((-1, 2))
    outputs = {
        "boxes": layers.Concatenate(1)([flat[0](boxes(level)) for level in (fine, levels[2])]),
        "classes": layers.Activation("sigmoid", name="scores")(
            layers.Concatenate(1)([flat[1](classes(level)) for level in (fine, levels[2])])
        ),
    }
    x = images(16)
    y = {"boxes": floats(ROWS, 20, 4), "classes": integers(2, ROWS, 20, 2)}
    loss = {"boxes": "huber", "classes": "binary_crossentropy"}
    return Style(keras.Model(inputs, outputs), x, y, loss, more=[images(32)[:, :24]])


class GAN(keras.Model):
    """Two models and a training step of one's own, which knows nothing of quantization."""

    def __init__(self, generator, discriminator):
        super().__init__()
        self.generator, self.discriminator = generator, discriminator

    def compile(self, optimizers, loss):
        super().compile()
        self.optimizers, self.loss_fn = optimizers, loss

    def train_step(self, real):
        count = tf.shape(real)[0]
        noise = tf.random.normal((count, 6), seed=0)
        with tf.GradientTape() as tape:
            fake = self.generator(noise, training=True)
            scores = self.discriminator(tf.concat([real, fake], 0), training=True)
            loss = self.loss_fn(tf.concat([tf.ones((count, 1)), tf.zeros((count, 1))], 0), scores)
        weights = self.discriminator.trainable_weights
        self.optimizers[0].apply(tape.gradient(loss, weights), weights)
        with tf.GradientTape() as tape:
            scores = self.discriminator(self.generator(noise, training=True), training=True)
            fooled = self.loss_fn(tf.ones((count, 1)), scores)
        weights = self.generator.trainable_weights
        self.optimizers[1].apply(tape.gradient(fooled, weights), weights)
        return {"loss": loss, "fooled": fooled}


def dcgan() -> Style:
    generator = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(4 * 4 * 8, use_bias=False),
            layers.BatchNormalization(),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Reshape((4, 4, 8)),
            layers.Conv2DTranspose(8, 4, strides=2, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Conv2DTranspose(1, 4, strides=2, padding="same", activation="tanh"),
        ],
        name="generator",
    )
    discriminator = keras.Sequential(
        [
            keras.Input((16, 16, 1)),
            layers.Conv2D(4, 4, strides=2, padding="same"),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Dropout(0.3),
            layers.Flatten(),
            layers.Dense(1, activation="sigmoid"),
        ],
        name="discriminator",
    )
    real = 2 * images(16, 1) - 1

    def train(quantized):
        judge = qi.quantize_model(discriminator, "w8a8", real, verbose=0)
        gan = GAN(quantized, judge)
        gan.compile(
            [keras.optimizers.Adam(1e-3) for _ in range(2)], keras.losses.BinaryCrossentropy()
        )
        gan.fit(real, batch_size=8, verbose=0)

    return Style(generator, floats(ROWS, 6), train=train)


# Attention


class Patches(layers.Layer):
    """Without weights and without `get_config`: its arguments are plain numbers."""

    def __init__(self, patch_size):
        super().__init__()
        self.patch_size = patch_size

    def call(self, pictures):
        patches = ops.image.extract_patches(pictures, self.patch_size)
        return ops.reshape(patches, (-1, patches.shape[1] * patches.shape[2], patches.shape[3]))


class PatchEncoder(layers.Layer):
    """A projection, and a table of positions that whole numbers made in the call look up."""

    def __init__(self, num_patches, projection_dim):
        super().__init__()
        self.num_patches = num_patches
        self.projection = layers.Dense(projection_dim)
        self.position_embedding = layers.Embedding(num_patches, projection_dim)

    def call(self, patches):
        positions = ops.arange(0, self.num_patches)
        return self.projection(patches) + self.position_embedding(positions)


def transformer_block(x, heads, dim, width):
    attended = layers.MultiHeadAttention(heads, dim, dropout=0.1)(
        *[layers.LayerNormalization(epsilon=1e-6)(x)] * 2
    )
    x = layers.Add()([attended, x])
    y = layers.LayerNormalization(epsilon=1e-6)(x)
    y = layers.Dense(width, activation="gelu")(y)
    return layers.Add()([layers.Dense(x.shape[-1])(layers.Dropout(0.1)(y)), x])


def vision_transformer() -> Style:
    inputs = keras.Input((16, 16, 3))
    x = PatchEncoder(16, 12)(Patches(4)(inputs))
    for _ in range(2):
        x = transformer_block(x, 2, 6, 24)
    x = layers.LayerNormalization(epsilon=1e-6)(x)
    outputs = layers.Dense(3)(layers.Dropout(0.2)(layers.Flatten()(x)))
    return Style(
        keras.Model(inputs, outputs),
        images(16),
        integers(3, ROWS),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        [Patches, PatchEncoder],
    )


class TokenAndPositionEmbedding(layers.Layer):
    """As in the tutorial: the layer of one's own that reads the ids holds the table."""

    def __init__(self, length, vocabulary, dim, **kwargs):
        super().__init__(**kwargs)
        self.length, self.vocabulary, self.dim = length, vocabulary, dim
        self.tokens = layers.Embedding(vocabulary, dim)
        self.positions = layers.Embedding(length, dim)

    def call(self, ids):
        return self.tokens(ids) + self.positions(ops.arange(ops.shape(ids)[-1]))

    def get_config(self):
        arguments = {"length": self.length, "vocabulary": self.vocabulary, "dim": self.dim}
        return {**super().get_config(), **arguments}


class TransformerBlock(layers.Layer):
    """A composite layer of the user's, post-norm, without `get_config`."""

    def __init__(self, dim, heads, width, rate=0.1):
        super().__init__()
        self.attention = layers.MultiHeadAttention(heads, dim)
        self.feed_forward = keras.Sequential([layers.Dense(width, "relu"), layers.Dense(dim)])
        # Not in a list: Keras' layers in lists are in no checkpoint of TensorFlow.
        self.norm = layers.LayerNormalization(epsilon=1e-6)
        self.last_norm = layers.LayerNormalization(epsilon=1e-6)
        self.dropout = layers.Dropout(rate)

    def call(self, inputs, training=None):
        attended = self.dropout(self.attention(inputs, inputs), training=training)
        x = self.norm(inputs + attended)
        return self.last_norm(x + self.dropout(self.feed_forward(x), training=training))


def text_transformer() -> Style:
    """The ids are floats: `Input((10,))` has no other dtype by default."""
    inputs = keras.Input((10,))
    x = TokenAndPositionEmbedding(10, 2000, 8)(inputs)
    x = TransformerBlock(8, 2, 16)(x)
    x = layers.Dense(8, activation="relu")(layers.GlobalAveragePooling1D()(x))
    outputs = layers.Dense(2, activation="softmax")(x)
    return Style(
        keras.Model(inputs, outputs),
        integers(2000, ROWS, 10).astype("float32"),
        integers(2, ROWS),
        "sparse_categorical_crossentropy",
        [TokenAndPositionEmbedding, TransformerBlock],
    )


def time_series_transformer() -> Style:
    inputs = keras.Input((32, 1))
    x = layers.Conv1D(6, 3, strides=2)(inputs)
    for _ in range(2):
        attended = layers.MultiHeadAttention(2, 8, dropout=0.1)(x, x)
        x = layers.LayerNormalization(epsilon=1e-6)(layers.Dropout(0.1)(attended) + x)
        y = layers.Conv1D(4, 1, activation="relu")(x)
        x = layers.LayerNormalization(epsilon=1e-6)(layers.Conv1D(6, 1)(layers.Dropout(0.1)(y)) + x)
    x = layers.GlobalAveragePooling1D()(x)
    outputs = layers.Dense(2, activation="softmax")(layers.Dense(8, activation="relu")(x))
    return Style(
        keras.Model(inputs, outputs),
        floats(ROWS, 32, 1).cumsum(1),
        integers(2, ROWS),
        "sparse_categorical_crossentropy",
        endings=("keras",),
    )


def mobilevit() -> Style:
    def convolution(x, filters, strides=1):
        return layers.Conv2D(filters, 3, strides=strides, padding="same", activation="swish")(x)

    inputs = keras.Input((16, 16, 3))
    x = convolution(layers.Rescaling(1 / 0.5, offset=-1)(inputs), 8, 2)
    depthwise = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    x = x + layers.Conv2D(8, 1)(ops.silu(layers.BatchNormalization()(depthwise)))
    local = layers.Conv2D(8, 1, activation="swish")(convolution(x, 8))
    folded = ops.reshape(local, (-1, 4, 2, 4, 2, 8))
    folded = ops.reshape(ops.transpose(folded, (0, 2, 4, 1, 3, 5)), (-1, 4, 16, 8))
    attended = transformer_block(folded, 2, 8, 16)
    unfolded = ops.transpose(ops.reshape(attended, (-1, 2, 2, 4, 4, 8)), (0, 3, 1, 4, 2, 5))
    x = layers.Concatenate()([x, layers.Conv2D(8, 1)(ops.reshape(unfolded, (-1, 8, 8, 8)))])
    x = layers.GlobalAveragePooling2D()(convolution(x, 8))
    outputs = layers.Dense(3, activation="softmax")(x)
    return Style(
        keras.Model(inputs, outputs),
        images(16),
        integers(3, ROWS),
        "sparse_categorical_crossentropy",
        endings=("keras",),
    )


# Inputs that are not all measurements


class CTCLayer(layers.Layer):
    """Adds the loss of the labels that it takes as floats, and hands the predictions on."""

    def call(self, labels, predictions):
        length = ops.full((ops.shape(labels)[0],), labels.shape[1], "int32")
        steps = ops.full((ops.shape(labels)[0],), predictions.shape[1], "int32")
        targets = ops.cast(labels, "int32")
        self.add_loss(ops.mean(ops.ctc_loss(targets, predictions, length, steps, mask_index=11)))
        return ops.softmax(predictions)


def ctc() -> Style:
    pictures = keras.Input((32, 8, 1), name="image")
    labels = keras.Input((4,), name="label")
    x = layers.Conv2D(4, 3, padding="same", activation="relu")(pictures)
    x = layers.Reshape((16, 16))(layers.MaxPooling2D((2, 2))(x))
    x = layers.Dense(8, activation="relu")(x)
    x = layers.Bidirectional(layers.LSTM(8, return_sequences=True))(x)
    outputs = CTCLayer(name="ctc_loss")(labels, layers.Dense(12)(x))
    x = {"image": images(32, 1)[:, :, ::4], "label": integers(11, ROWS, 4).astype("float32")}
    return Style(keras.Model([pictures, labels], outputs), x, loss=None, classes=[CTCLayer])


class GraphConvolution(layers.Layer):
    """Mixes the features of neighbours; which they are is a second input, of 0 and 1."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, shapes):
        features, _ = shapes
        self.kernel = self.add_weight(name="kernel", shape=(features[-1], self.units))
        self.bias = self.add_weight(name="bias", shape=(self.units,), initializer="zeros")

    def call(self, inputs):
        features, adjacency = inputs
        degree = ops.maximum(ops.sum(adjacency, -1, keepdims=True), 1.0)
        return ops.matmul(adjacency / degree, ops.matmul(features, self.kernel)) + self.bias

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def graph_network() -> Style:
    features, adjacency = keras.Input((8, 5)), keras.Input((8, 8))
    x = layers.ReLU()(GraphConvolution(8)([features, adjacency]))
    x = layers.ReLU()(GraphConvolution(8)([layers.Dropout(0.1)(x), adjacency]))
    outputs = layers.Dense(3)(layers.GlobalAveragePooling1D()(x))
    links = integers(2, ROWS, 8, 8).astype("float32")
    return Style(
        keras.Model([features, adjacency], outputs),
        [floats(ROWS, 8, 5), np.maximum(links, links.swapaxes(1, 2))],
        floats(ROWS, 3),
        classes=[GraphConvolution],
    )


# Without a graph


class Residual(layers.Layer):
    """No `get_config`, no arguments, a layer that is made when it is built."""

    def __init__(self):
        super().__init__()
        self.normalize = layers.BatchNormalization()

    def build(self, input_shape):
        self.dense = layers.Dense(input_shape[-1])

    def call(self, x, training=None):
        return x + ops.relu(self.normalize(self.dense(x), training=training))


class MyModel(keras.Model):
    """Word for word the style of the tutorials: neither arguments nor `get_config`."""

    def __init__(self):
        super().__init__()
        self.conv1 = layers.Conv2D(4, 3, activation="relu")
        self.flatten = layers.Flatten()
        self.d1 = layers.Dense(8, activation="relu")
        self.residual = Residual()
        self.d2 = layers.Dense(3)

    def call(self, x):
        return self.d2(self.residual(self.d1(self.flatten(self.conv1(x)))))


def tutorial() -> Style:
    model = MyModel()
    model(images(16))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Style(
        model, images(16), integers(3, ROWS), loss, [MyModel, Residual], endings=("keras",)
    )


# The life of each of them

STYLES = [
    unet,
    vision_transformer,
    text_transformer,
    ctc,
    siamese,
    wavenet,
    graph_network,
    dcgan,
    detection,
    mobilevit,
    time_series_transformer,
    tutorial,
]
ALWAYS = [text_transformer, siamese, graph_network, detection, tutorial]
"""Those of them that every run of the tests takes."""


def outputs(model: keras.Model, x: Any) -> list[np.ndarray]:
    return [to_numpy(tensor) for tensor in keras.tree.flatten(model(x, training=False))]


def assert_same(model: keras.Model, inputs: list[Any], expected: list[list[np.ndarray]]) -> None:
    for x, arrays in zip(inputs, expected, strict=True):
        for got, array in zip(outputs(model, x), arrays, strict=True):
            same(got, array)


def relative_error(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    errors = [np.sqrt(np.mean((a - b) ** 2)) / b.std() for a, b in zip(got, expected, strict=True)]
    return float(max(errors))


def train(style: Style, quantized: keras.Model) -> None:
    if style.train is not None:
        style.train(quantized)
        return
    quantized.compile(keras.optimizers.Adam(1e-3), style.loss, jit_compile=False)
    quantized.fit(style.x, style.y, batch_size=8, verbose=0)


def moved(data: Any) -> Any:
    """Other data of the same structure: ranges found in it are other ones.

    Whole numbers stay whole: a converted model has no range for those that it leaves alone.
    """

    def change(part: np.ndarray) -> np.ndarray:
        whole = np.array_equal(part, np.round(part))
        return part[:8] if whole else (part[:8] * 0.5).astype(part.dtype)

    return keras.tree.map_structure(change, data)


@pytest.fixture(
    params=[pytest.param(s, marks=[] if s in ALWAYS else pytest.mark.zoo) for s in STYLES],
    ids=lambda make: make.__name__,
)
def style(request: pytest.FixtureRequest) -> Style:
    made = request.param()
    # A batch normalization that has seen nothing is the identity, and biases start at zero.
    for i, variable in enumerate(made.model.variables):
        if "float" in variable.dtype and len(variable.shape) == 1:
            noise = np.random.default_rng(i).uniform(-0.1, 0.1, variable.shape)
            variable.assign_add(noise.astype("float32"))
    return made


def test_sixteen_bits_are_as_good_as_floats(style):
    expected = outputs(style.model, style.x)
    quantized = qi.quantize_model(style.model, "w16a16", style.x, verbose=0)
    assert relative_error(outputs(quantized, style.x), expected) < TOLERANCE
    if style.loss is None:
        assert float(sum(quantized.losses)) == pytest.approx(
            float(sum(style.model.losses)), rel=0.01
        )


def test_the_whole_life_is_exact(style, tmp_path):
    inputs = [style.x, *style.more]
    quantized = qi.quantize_model(style.model, "w8a8", style.x, verbose=0)
    qi.calibrate(quantized, style.x, verbose=0)
    before = [to_numpy(variable) for variable in quantized.trainable_variables]
    train(style, quantized)
    after = [to_numpy(variable) for variable in quantized.trainable_variables]
    assert any(np.any(a != b) for a, b in zip(before, after, strict=True))
    expected = [outputs(quantized, x) for x in inputs]
    converted = qi.convert_to_inferable(quantized)
    assert_same(converted, inputs, expected)
    for model in (quantized, converted):
        check_files(style, model, inputs, expected, tmp_path)
    other = qi.quantize_model(style.model, "w8a8", moved(style.x), verbose=0)
    for model, target in ((quantized, other), (converted, qi.convert_to_inferable(other))):
        path = tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
        tf.train.Checkpoint(model=target).restore(path).assert_existing_objects_matched()
        assert_same(target, inputs, expected)


def check_files(style, model, inputs, expected, folder):
    """Of Keras' own `.h5` files, which lose the names of losses, only the outputs count."""
    classes, path = style.custom_objects, folder / "model.keras"
    model.save(path)
    assert_same(keras.models.load_model(path, classes), inputs, expected)
    for ending in style.endings:
        path = folder / f"sealed.{ending}"
        qi.save_quantized_model(model, path)
        loaded = qi.keras_load_quantized_model(path, classes, compile=False)
        assert_same(loaded, inputs, expected)
