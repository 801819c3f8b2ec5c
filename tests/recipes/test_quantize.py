"""`quantize_model`: what is wrapped, what is kept, what is refused."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from reference import refused

import keras_qwrap as qi
from keras_qwrap import KerasActivationQuantizationHolder as Holder
from keras_qwrap import KerasQuantizationWrapper as Wrapper
from keras_qwrap import Recipe, Rule, WeightsSpec


def images(count=8, shape=(6, 6, 2)):
    return np.random.default_rng(1).normal(size=(count, *shape)).astype("float32")


def small():
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((6, 6, 2), name="image"),
            layers.Conv2D(3, 3, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(name="relu"),
            layers.Flatten(name="flat"),
            layers.Dense(2, name="dense", activation="softmax"),
        ]
    )


def kinds(model):
    """`{name: (weights with a quantizer, number of activation quantizers)}` of a model's layers."""
    found = {}
    for layer in model.layers:
        if isinstance(layer, Wrapper):
            found[layer.name] = (list(layer.weights_quantizers), len(layer.activation_quantizers))
        elif isinstance(layer, Holder):
            found[layer.name] = ([], 1)
    return found


def fake(x, low, high, bits=8):
    """Independent reference of the uniform grid over a range that holds zero."""
    low, high = np.float32(min(low, 0)), np.float32(max(high, 0))
    scale = (high - low) * np.float32(1 / (2**bits - 1))
    zero = np.round(-low / scale)
    return (np.clip(np.round(x / scale), -zero, 2**bits - 1 - zero) * scale).astype(np.float32)


def test_a_small_network_has_the_quantizers_that_integer_hardware_has():
    model = qi.quantize_model(small())
    assert kinds(model) == {
        "image_quantizer": ([], 1),
        "conv": (["kernel"], 0),
        "relu": ([], 1),
        "dense": (["kernel"], 1),
    }
    assert [layer.name for layer in model.layers][1:] == [layer.name for layer in small().layers]
    assert kinds(qi.quantize_model(small(), "w4")) == {
        "conv": (["kernel"], 0),
        "dense": (["kernel"], 0),
    }
    functional = small()
    functional = keras.Model(functional.inputs, functional.outputs)
    assert kinds(qi.quantize_model(functional)) == kinds(model)


def test_outputs_are_those_of_a_network_written_out_by_hand():
    model, x = small(), images()
    quantized = qi.quantize_model(model)
    sizes = {"image_quantizer": (-1.5, 2.0), "relu": (0.0, 1.25)}
    holder, relu = quantized.get_layer("image_quantizer"), quantized.get_layer("relu")
    holder.activation_holder_quantizer.set_range(*sizes["image_quantizer"])
    relu.activation_quantizers[0].set_range(*sizes["relu"])
    kernels = {}
    for name in ("conv", "dense"):
        weight = ops.convert_to_numpy(model.get_layer(name).kernel)
        reduced = tuple(range(weight.ndim - 1))
        largest = np.abs(weight).max(axis=reduced, keepdims=True)
        scale = largest * np.float32(1 / 127)
        kernels[name] = np.round(weight / scale) * scale
    by_hand = keras.models.clone_model(model)
    by_hand.set_weights(model.get_weights())
    for name, kernel in kernels.items():
        by_hand.get_layer(name).kernel.assign(kernel)
    head = keras.Sequential(by_hand.layers[:3])
    hidden = ops.convert_to_numpy(head(fake(x, *sizes["image_quantizer"])))
    probabilities = keras.Sequential(by_hand.layers[3:])(fake(hidden, *sizes["relu"]))
    expected = np.clip(np.round(ops.convert_to_numpy(probabilities) * 256), 0, 255) / 256
    found = ops.convert_to_numpy(quantized(x, training=False))
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_the_given_model_is_left_as_it_is():
    model = small()
    model.compile("adam", "sparse_categorical_crossentropy")
    config, weights = model.get_config(), model.get_weights()
    quantized = qi.quantize_model(model, "w8a8", images(), verbose=0)
    quantized.fit(images(), np.zeros(8), verbose=0)
    assert model.get_config() == config
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert not {id(v) for v in model.variables} & {id(v) for v in quantized.variables}


def test_rules_decide_layer_by_layer():
    recipe = Recipe.from_preset(
        "w8a8",
        rules=[Rule.leave_in_float(name="dense"), Rule(name="conv", weights=WeightsSpec(3))],
    )
    model = qi.quantize_model(small(), recipe)
    assert "dense" not in kinds(model)
    assert model.get_layer("conv").weights_quantizers["kernel"].num_bits == 3
    assert kinds(qi.quantize_model(small(), recipe.get_config())) == kinds(model)
    without = Recipe.from_preset("w8a8", rules=[Rule.leave_in_float(name="image")])
    sequential = small()
    functional = keras.Model(sequential.inputs, sequential.outputs)
    assert "image_quantizer" not in kinds(qi.quantize_model(functional, without))


def test_per_tensor_and_least_squares_ranges():
    model = small()
    weights = WeightsSpec(4, per_channel=False)
    wrapper = qi.quantize_model(model, Recipe(weights, "float")).get_layer("conv")
    assert wrapper.get_codes()["kernel"][1].size == 1
    kernel = ops.convert_to_numpy(model.get_layer("conv").kernel)
    errors = []
    for found in ("weight", "mse"):
        recipe = Recipe(WeightsSpec(3, range=found), "float")
        wrapper = qi.quantize_model(model, recipe).get_layer("conv")
        errors.append(np.sum((wrapper.get_quantized_weights()["kernel"] - kernel) ** 2))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("layer", [layers.DepthwiseConv2D(3), layers.SeparableConv2D(4, 3)])
@pytest.mark.parametrize("found", ["weight", "mse"])
def test_kernels_with_two_kept_axes(layer, found):
    layer = type(layer).from_config(layer.get_config())
    model = keras.Sequential([keras.Input((6, 6, 2)), layer])
    recipe = Recipe(WeightsSpec(8, range=found), "float")
    wrapper = qi.quantize_model(model, recipe).layers[0]
    (path,) = [path for path in wrapper.weights_quantizers if "pointwise" not in path]
    assert wrapper.get_codes()[path][1].shape == (1, 1, 2, 1)


@keras.saving.register_keras_serializable("test_quantize")
class Scaled(layers.Layer):
    def build(self, shape):
        self.factors = self.add_weight(shape=(shape[-1],), name="factors")

    def call(self, inputs):
        return inputs * self.factors


@pytest.mark.parametrize("found", ["weight", "mse"])
def test_a_weight_whose_axes_are_all_kept_has_one_range(found):
    qi.register_layer_weights(Scaled, {"factors": -1})
    model = keras.Sequential([keras.Input((4,)), Scaled()])
    recipe = Recipe(WeightsSpec(4, range=found), "float")
    wrapper = qi.quantize_model(model, recipe).layers[0]
    assert wrapper.get_codes()["factors"][1].size == 1


def test_functions_and_several_inputs_have_holders_behind_them():
    first, second = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    tokens = keras.Input((4,), dtype="int32", name="tokens")
    total = ops.multiply(first + second, ops.cast(tokens, "float32"))
    left, right = ops.split(total, 2, axis=-1)
    model = keras.Model({"a": first, "b": second, "tokens": tokens}, [left, ops.tanh(right)])
    quantized = qi.quantize_model(model)
    names = list(kinds(quantized))
    assert names[:2] == ["a_quantizer", "b_quantizer"]
    assert sum("add" in name for name in names) == 1
    assert sum("multiply" in name for name in names) == 1
    assert sum("tanh" in name for name in names) == 1
    assert sum("cast" in name for name in names) == 1
    assert len(names) == 6
    batch = {"a": images(2, (4,)), "b": images(2, (4,)), "tokens": np.ones((2, 4), "int32")}
    outputs = quantized(batch, training=True)
    codes = ops.convert_to_numpy(outputs[1]) * 128
    np.testing.assert_array_equal(codes, np.round(codes))


def test_nested_models_share_and_have_no_holders_of_their_own():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="deep")], name="inner")
    first, second = keras.Input((4,)), keras.Input((4,))
    model = keras.Model(
        [first, second], layers.Subtract(name="minus")([inner(first), inner(second)])
    )
    quantized = qi.quantize_model(model)
    assert len([name for name in kinds(quantized) if name.endswith("_quantizer")]) == 2
    assert kinds(quantized.get_layer("inner")) == {"deep": (["kernel"], 1)}
    wrapper = quantized.get_layer("inner").get_layer("deep")
    assert len(quantized.variables) == len({id(v) for v in quantized.variables})
    x = images(3, (4,))
    quantized.compile("sgd", "mse")
    quantized.fit([x, -x], np.ones((3, 4)), verbose=0)
    assert (
        int(ops.convert_to_numpy(wrapper.activation_quantizers[0].quantizer_parameters["steps"]))
        == 2
    )


def test_folding_is_done_before_quantizing():
    model, x = small(), images()
    model.get_layer("norm").moving_variance.assign([0.5, 2.0, 3.0])
    recipe = Recipe.from_preset("w8a8", fold_batch_norm=True)
    quantized = qi.quantize_model(model, recipe)
    assert [layer.name for layer in quantized.layers] == [
        "image_quantizer",
        "conv",
        "relu",
        "flat",
        "dense",
    ]
    plain = qi.unwrap_model(quantized)
    np.testing.assert_allclose(plain.predict(x, verbose=0), model.predict(x, verbose=0), atol=0.02)


def test_a_model_from_a_legacy_h5_file(tmp_path):
    small().save(tmp_path / "legacy.h5")
    model = keras.models.load_model(tmp_path / "legacy.h5", compile=False)
    assert kinds(qi.quantize_model(model)) == kinds(qi.quantize_model(small()))


def test_a_layer_that_cannot_be_wrapped_is_left_in_float_with_a_warning():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="adapted"), layers.Dense(2)])
    model.get_layer("adapted").enable_lora(2)
    with pytest.warns(UserWarning, match="'adapted' is left as it is.*LoRA"):
        quantized = qi.quantize_model(model)
    assert "adapted" not in kinds(quantized)
    x = images(2, (4,))
    assert quantized(x, training=False).shape == (2, 2)


@keras.saving.register_keras_serializable("test_quantize")
class Forgetful(layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def get_config(self):
        return {"name": self.name}

    def call(self, inputs):
        return inputs


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: layers.Dense(2), TypeError, "a Keras model"),
        (lambda: keras.Sequential([layers.Dense(2)]), ValueError, "a built model"),
        (lambda: qi.quantize_model(small()), ValueError, "unwrap_model"),
        (
            lambda: keras.Sequential([keras.Input((2,)), Forgetful(3, name="lost")]),
            ValueError,
            "'lost' of class Forgetful, which cannot be made again",
        ),
    ],
)
def test_bad_models(make, error, message):
    with pytest.raises(error, match=message):
        qi.quantize_model(make())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="dense")])
    model.layers[0].kernel.assign([[1.0, value], [2.0, 3.0]])
    found = "layer 'dense' whose weight 'kernel' is not finite"
    refused(ValueError, lambda: qi.quantize_model(model, "w8"), found)


def test_weights_for_which_no_threshold_is_large_enough_are_named():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="dense")])
    model.layers[0].kernel.assign([[1.0, 3.4e38], [2.0, 3.0]])
    recipe = qi.Recipe(weights=qi.WeightsSpec(8, range="mse"))
    refused(ValueError, lambda: qi.quantize_model(model, recipe), "layer 'dense', weight 'kernel'")


def test_a_weight_without_elements_is_left_in_float():
    model = keras.Sequential([keras.Input((0,)), keras.layers.Dense(2, name="dense")])
    with pytest.warns(UserWarning, match="nothing is quantized"):
        converted = qi.convert_to_inferable(qi.quantize_model(model, "w8"))
    assert not isinstance(converted.get_layer("dense"), qi.KerasQuantizationWrapper)
    assert "no float weight kernel" in str(qi.quantization_report(converted))


def test_a_lambda_is_copied_or_refused():
    """Keras 3.13 makes one again from its config, later versions refuse."""
    model = keras.Sequential([keras.Input((2,)), layers.Lambda(lambda x: x + 1.0, name="fun")])
    try:
        quantized = qi.quantize_model(model)
    except ValueError as error:
        message = str(error)
    else:
        x = images(3, (2,))
        np.testing.assert_array_equal(quantized(x, training=False), model(x))
        return
    assert "'fun' of class Lambda, which cannot be made again" in message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((4, 5, 6, 2), "float32"), "shape"),
        (np.full((4, 6, 6, 2), np.nan, "float32"), "finite|NaN"),
        (iter([]), "empty|batch"),
        (np.zeros((0, 6, 6, 2), "float32"), "empty|batch|row"),
        (np.full((4, 6, 6, 2), "a"), "dtype|number"),
    ],
)
def test_bad_calibration_data(data, message):
    with pytest.raises((TypeError, ValueError), match=message):
        qi.quantize_model(small(), "w8a8", data, verbose=0)


@pytest.mark.parametrize("recipe", ["w8b8", {"weight": {}}, Recipe(rules=[Rule(name="nowhere")])])
def test_bad_recipes(recipe):
    with pytest.raises(ValueError, match=r"w8b8|weight|nowhere"):
        qi.quantize_model(small(), recipe)


@keras.saving.register_keras_serializable("test_quantize")
class Tagger(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding = layers.Embedding(9, 4)
        self.blocks = [layers.LSTM(3, return_sequences=True), layers.Dropout(0.1)]
        self.head = layers.Dense(2, activation="softmax")

    def call(self, tokens, training=None):
        tensor = self.embedding(tokens)
        for block in self.blocks:
            tensor = block(tensor, training=training)
        return self.head(tensor)


@pytest.mark.slow
def test_a_subclassed_model_has_the_weights_and_outputs_of_its_layers_quantized():
    model = Tagger()
    tokens = np.random.default_rng(0).integers(0, 9, (8, 5)).astype("int32")
    model(tokens)
    model.compile("sgd", "sparse_categorical_crossentropy")
    recipe = Recipe.from_preset("w8a8", rules=[Rule.leave_in_float(layer_class=layers.Embedding)])
    example = ((keras.KerasTensor((None, 5), "int32"),), {})
    quantized = qi.quantize_model(model, recipe, tokens, verbose=0, example=example)
    assert isinstance(quantized, qi.QuantizedModel)
    assert sorted(quantized.weights_quantizers) == [
        "blocks/0/cell/kernel",
        "blocks/0/cell/recurrent_kernel",
        "head/kernel",
    ]
    assert sorted(quantized.activation_quantizers) == ["blocks/0", "head"]
    assert quantized.activation_quantizers["blocks/0"][0].range is not None
    expected = ops.convert_to_numpy(quantized(tokens, training=False))
    np.testing.assert_array_equal(expected, np.round(expected * 256) / 256)
    quantized.fit(tokens, np.zeros((8, 5)), verbose=0)
    expected = ops.convert_to_numpy(quantized(tokens, training=False))
    converted = qi.convert_to_inferable(quantized)
    np.testing.assert_array_equal(ops.convert_to_numpy(converted(tokens, training=False)), expected)
