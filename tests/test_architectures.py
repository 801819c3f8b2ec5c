"""Whole architectures through the whole life of a quantized model; nothing may abort."""

import json

import keras
import numpy as np
import pytest
from keras import applications, layers

import keras_qwrap as qi

FAMILIES = {
    "VGG16": 32,
    "ResNet50": 32,
    "ResNet50V2": 32,
    "MobileNet": 32,
    "MobileNetV2": 32,
    "MobileNetV3Small": 32,
    "MobileNetV3Large": 32,
    "DenseNet121": 32,
    "InceptionV3": 75,
    "InceptionResNetV2": 75,
    "Xception": 71,
    "NASNetMobile": 32,
    "EfficientNetB0": 32,
    "EfficientNetV2B0": 64,
    "ConvNeXtTiny": 32,
}
"""Smallest member of each family of keras.applications, and the side of its smallest images."""

ALWAYS = ("MobileNetV2", "MobileNetV3Small", "VGG16")
"""Those of them that every run of the tests takes."""


def live(model, inputs, targets, tmp_path, loss):
    """Quantize, calibrate, train a step, convert, save and reload; all outputs must be equal."""
    given = [keras.ops.convert_to_numpy(v).copy() for v in model.variables]
    quantized = qi.quantize_model(model, "w8a8", inputs, batch_size=2, verbose=0)
    for before, variable in zip(given, model.variables, strict=True):
        np.testing.assert_array_equal(before, keras.ops.convert_to_numpy(variable))
    check_report(quantized, model)
    before = [keras.ops.convert_to_numpy(v).copy() for v in quantized.trainable_variables]
    quantized.compile(keras.optimizers.SGD(1e-3), loss, run_eagerly=True)
    quantized.train_on_batch(inputs, targets)
    after = [keras.ops.convert_to_numpy(v) for v in quantized.trainable_variables]
    assert any(np.any(a != b) for a, b in zip(before, after, strict=True))
    expected = outputs(quantized, inputs)
    converted = qi.convert_to_inferable(quantized)
    assert_same(outputs(converted, inputs), expected)
    converted.save(tmp_path / "model.keras")
    assert_same(outputs(keras.models.load_model(tmp_path / "model.keras"), inputs), expected)
    check_report(converted, model)
    return quantized


def outputs(model, inputs):
    tensors = keras.tree.flatten(model(inputs, training=False))
    return [keras.ops.convert_to_numpy(tensor) for tensor in tensors]


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert np.all(np.isfinite(a))
        np.testing.assert_array_equal(a, b)


def check_report(quantized, model):
    """Every weight of the float model is in the report, which is plain data."""
    report = qi.quantization_report(quantized)
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    totals = report.totals
    assert totals.quantized_weights + totals.float_weights == len(model.weights)
    assert totals.uncalibrated_activations == 0


def settle(model, images):
    """Give batch normalization the statistics that training would have given it."""
    norms = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    model(images, training=True)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def test_no_family_of_keras_applications_is_missing():
    """A family is a module; VGG has two."""

    def modules(names):
        return {getattr(applications, name).__module__.replace("vgg19", "vgg16") for name in names}

    assert modules(FAMILIES) == modules(name for name in dir(applications) if name[0].isupper())


@pytest.mark.slow
@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore:calibrate. the activation of")  # random weights: dead layers
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ALWAYS else pytest.mark.zoo) for n in FAMILIES]
)
def test_a_family_of_keras_applications(name, tmp_path):
    keras.utils.set_random_seed(0)
    side = FAMILIES[name]
    make = getattr(applications, name)
    model = make(weights=None, input_shape=(side, side, 3), classes=3, classifier_activation=None)
    images = np.random.default_rng(0).uniform(0, 255, (2, side, side, 3)).astype(np.float32)
    # Else activations in training are far beyond the ranges of inference, where gradients end.
    settle(model, images)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    quantized = live(model, images, np.array([0, 2]), tmp_path, loss)
    for layer in model.layers:
        if isinstance(layer, (layers.Conv2D, layers.DepthwiseConv2D, layers.Dense)):
            wrapper = quantized.get_layer(layer.name)
            assert isinstance(wrapper, qi.KerasQuantizationWrapper)
            assert wrapper.num_weights_quantizers >= 1


def tagger():
    tokens = keras.Input((6,), dtype="int32")
    tensor = layers.Embedding(11, 4, mask_zero=True)(tokens)
    tensor = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(tensor)
    model = keras.Model(tokens, layers.Dense(5, activation="softmax")(tensor))
    x = np.random.default_rng(0).integers(0, 11, (4, 6)).astype("int32")
    return model, x, np.zeros((4, 6), "int32"), "sparse_categorical_crossentropy"


def encoder():
    inputs = keras.Input((5, 8))
    attended = layers.MultiHeadAttention(2, 4)(inputs, inputs)
    tensor = layers.LayerNormalization()(layers.Add()([inputs, attended]))
    hidden = layers.Dense(8)(layers.Dense(16, activation="gelu")(tensor))
    tensor = layers.LayerNormalization()(tensor + hidden)
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling1D()(tensor)))
    x = np.random.default_rng(0).normal(size=(4, 5, 8)).astype("float32")
    return model, x, np.ones((4, 2), "float32"), "mse"


def unet():
    inputs = keras.Input((8, 8, 2))
    first = layers.Conv2D(4, 3, padding="same", activation="relu")(inputs)
    tensor = layers.MaxPooling2D()(first)
    tensor = layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same")(tensor))
    tensor = layers.ReLU()(tensor)
    up = layers.Conv2DTranspose(4, 2, strides=2)(tensor)
    tensor = layers.Concatenate()([first, up])
    model = keras.Model(inputs, layers.Conv2D(1, 1, activation="sigmoid")(tensor))
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 2)).astype("float32")
    return model, x, np.ones((4, 8, 8, 1), "float32"), "binary_crossentropy"


def two_and_two():
    left, right = keras.Input((4,), name="left"), keras.Input((3,), name="right")
    both = layers.Concatenate()([layers.Dense(4)(left), layers.Dense(4)(right)])
    model = keras.Model([left, right], [layers.Dense(2)(both), layers.Dense(1)(both * 2.0)])
    random = np.random.default_rng(0)
    x = [random.normal(size=(4, n)).astype("float32") for n in (4, 3)]
    return model, x, [np.ones((4, n), "float32") for n in (2, 1)], ["mse", "mse"]


def siamese():
    shared = keras.Sequential(
        [keras.Input((6,)), layers.Dense(8, activation="relu"), layers.Dense(3)], name="encoder"
    )
    first, second = keras.Input((6,)), keras.Input((6,))
    distance = keras.ops.abs(shared(first) - shared(second))
    model = keras.Model([first, second], layers.Dense(1, activation="sigmoid")(distance))
    random = np.random.default_rng(0)
    x = [random.normal(size=(4, 6)).astype("float32") for _ in range(2)]
    return model, x, np.ones((4, 1), "float32"), "binary_crossentropy"


@keras.saving.register_keras_serializable("test_architectures")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(8, activation="relu")
        self.norm = layers.BatchNormalization()
        self.last = layers.Dense(2)

    def call(self, inputs, training=None):
        return self.last(self.norm(self.first(inputs), training=training))


def subclassed():
    model = Subclassed()
    x = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    model(x)
    return model, x, np.ones((4, 2), "float32"), "mse"


@pytest.mark.slow
@pytest.mark.parametrize("make", [tagger, encoder, unet, two_and_two, siamese, subclassed])
def test_an_architecture(make, tmp_path):
    keras.utils.set_random_seed(0)
    model, inputs, targets, loss = make()
    live(model, inputs, targets, tmp_path, loss)
