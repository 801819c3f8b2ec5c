"""Messages whole, as a user reads them: what went wrong comes first, and the advice holds."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_qwrap as qi

X = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")


def message(error, action):
    with pytest.raises(error) as caught:
        action()
    assert type(caught.value) is error
    return str(caught.value)


def weight():
    config = qi.TrainableQuantizerWeightsConfig(qi.QuantizationMethod.SYMMETRIC, 8)
    return qi.STEWeightQATQuantizer(config)


def sequential(*parts, name="net"):
    return keras.Sequential([keras.Input((3,)), *parts], name=name)


def dense():
    return sequential(layers.Dense(2, name="dense"))


class Block(layers.Layer):
    def call(self, x):
        return x * 2


class Net(keras.Model):
    def call(self, x):
        return x


class Fixed(layers.Layer):
    """Its constructor makes more of its argument than plain values."""

    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.size = int(size)

    def call(self, x):
        return x


def twice(x):
    return 2 * x


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_a_class_that_is_not_passed_is_named_first(ending, tmp_path):
    path = str(tmp_path / f"m.{ending}")
    qi.save_quantized_model(sequential(Block()), path)
    rest = " Functions between layers, and models without a graph, need a .keras file."
    assert message(ValueError, lambda: qi.keras_load_quantized_model(path)) == (
        f"path: received '{path}', which names 'Block', expected classes and functions that Keras "
        "knows here. Pass custom_objects={'Block': Block}, or import the module that registers it; "
        f"compile=False leaves out loss, metrics and optimizer.{rest if ending == 'h5' else ''}"
    )
    assert qi.keras_load_quantized_model(path, {"Block": Block}).layers[0].built


def test_a_registered_name_and_a_function_are_named(tmp_path):
    path = str(tmp_path / "m.keras")

    class Own(qi.STEWeightQATQuantizer):
        pass

    keras.saving.register_keras_serializable("somewhere")(Own)
    config = qi.TrainableQuantizerWeightsConfig(qi.QuantizationMethod.SYMMETRIC, 8)
    model = sequential(qi.KerasQuantizationWrapper(layers.Dense(2), {"kernel": Own(config)}))
    qi.save_quantized_model(model, path)
    del keras.saving.get_custom_objects()["somewhere>Own"]
    with pytest.raises(ValueError, match=r"Pass custom_objects=\{'somewhere>Own': Own\}"):
        qi.keras_load_quantized_model(path)
    model = dense()
    model.compile("sgd", twice)
    model.save(path)
    with pytest.raises(ValueError, match=r"names 'twice', .*compile=False leaves out loss"):
        qi.keras_load_quantized_model(path)


@pytest.mark.parametrize("sealed", [True, False])
def test_a_reason_comes_before_what_may_be_done(sealed, tmp_path):
    path = str(tmp_path / "m.keras")
    model = sequential(layers.Dense(2, activation=Block()))
    (qi.save_quantized_model if sealed else keras.Model.save)(*((model, path)))

    class Other(layers.Layer):
        @classmethod
        def from_config(cls, config):
            raise KeyError("size")

    damaged = "" if sealed else "is damaged, "
    assert message(
        ValueError, lambda: qi.keras_load_quantized_model(path, {"Block": Other})
    ).endswith(
        "m.keras', of which no model can be made (KeyError: 'size'), expected a model that Keras "
        f"saved and can rebuild here. The file {damaged}was written by another version, or is of "
        "classes that have changed since; compile=False leaves out loss, metrics and optimizer."
    )


@pytest.mark.parametrize("data", [X.tolist(), [X.tolist()] * 2, (X.tolist(), [1.0]), [1, 2]])
def test_lists_of_numbers_are_told_to_be_arrays(data):
    quantized = qi.quantize_model(dense(), "w8a8")
    for action in (
        lambda: qi.calibrate(quantized, data),
        lambda: qi.quantize_model(dense(), "w8a8", data),
    ):
        assert message(TypeError, action) == (
            "data: received Python numbers in lists, expected an array or several, a dataset, a "
            "generator or another iterable of batches. Make NumPy arrays of them: numpy.array(x)."
        )


def test_words_are_not_quoted_as_if_they_had_been_passed():
    quantized = qi.quantize_model(dense(), "w8a8")
    assert message(ValueError, lambda: qi.calibrate(quantized, [])) == (
        "data: received no batch, expected at least one. A generator gives its batches only once."
    )
    assert message(ValueError, lambda: qi.quantize_model(quantized)) == (
        "model: received 'net' with quantized layers ['input_quantizer', 'dense'], expected a "
        "float model. Quantize the float model, or unwrap this one by `unwrap_model` first."
    )


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_a_file_of_this_package_is_not_migrated(ending, tmp_path):
    path = str(tmp_path / f"m.{ending}")
    qi.save_quantized_model(qi.convert_to_inferable(qi.quantize_model(dense(), "w8")), path)
    assert message(ValueError, lambda: qi.migrate_mct_file(path, "new.keras")) == (
        f"source: received '{path}', expected a model with MCT's wrappers or holders. It is one "
        "of this package already: load it by `keras_load_quantized_model`."
    )


def test_errors_name_the_arguments_of_migrate_mct_file(tmp_path):
    missing = str(tmp_path / "no.keras")
    assert message(OSError, lambda: qi.migrate_mct_file(missing, "new.keras")) == (
        f"source: received '{missing}', expected an existing file. Check the name."
    )
    assert message(TypeError, lambda: qi.migrate_mct_file(3, "new.keras")).startswith("source: ")


@pytest.mark.parametrize(
    ("model", "fix"),
    [
        (lambda: Net(name="net"), "Call it once: `model(x)`."),
        (
            lambda: keras.Sequential([layers.Dense(2)], name="net"),
            "Call it, or pass an Input first.",
        ),
    ],
)
@pytest.mark.parametrize("action", [qi.quantize_model, qi.quantization_report])
def test_models_that_are_not_built(model, fix, action):
    expected = f"model: received 'net', expected a built model. {fix}"
    assert message(ValueError, lambda: action(model())) == expected


@pytest.mark.parametrize(
    ("preset", "near"),
    [
        ("w8-sym", "'w8', 'w8-pot'"),
        ("w8a8-symmetric", "'w8a8', 'w8a8-pot'"),
        ("w8a8-power", "'w8a8-pot'"),
        ("w6a8-shift", "'w6a8-pot'"),
    ],
)
def test_presets_with_another_method(preset, near):
    assert message(ValueError, lambda: qi.Recipe.from_preset(preset)) == (
        f"preset: received '{preset}', expected w<bits> for weights, then a<bits> for activations "
        f"or nothing, then -pot or nothing, such as 'w8a8'. Nearest: {near}."
    )


def test_a_preset_in_the_place_of_a_spec():
    for name in ("weights", "activations"):
        text = message(TypeError, lambda name=name: qi.Recipe(**{name: "w8a8"}))
        assert text.endswith("A preset makes a recipe by Recipe.from_preset('w8a8').")
        assert text.startswith(f"{name}: received 'w8a8', expected 'float' or of type ")


@pytest.mark.parametrize("name", ["kernel", "layer/kernel"])
def test_a_wrapper_in_a_wrapper(name):
    inner = qi.KerasQuantizationWrapper(layers.Dense(2, name="dense"), {"kernel": weight()})
    outer = qi.KerasQuantizationWrapper(inner, {name: weight()})
    assert message(ValueError, lambda: outer(X)) == (
        f"weights_quantizers: received '{name}', which wrapper 'dense' inside quantizes already, "
        "expected a weight without quantizer. Drop one of the two quantizers."
    )


def test_a_layer_that_cannot_be_made_again():
    text = message(ValueError, lambda: qi.quantize_model(sequential(Fixed(object_of(3)))))
    assert text.startswith(
        "model: received 'fixed' of class Fixed, which cannot be made again from its config"
    )


def object_of(number):
    class Number:
        def __int__(self):
            return number

    return Number()


@pytest.mark.skipif(keras.__version__.startswith("3.13"), reason="this Keras copies code")
def test_what_to_do_with_a_lambda():
    model = sequential(layers.Lambda(lambda x: x * 2, name="double"), layers.Dense(2))
    assert message(ValueError, lambda: qi.quantize_model(model)) == (
        "model: received 'double' of class Lambda, which cannot be made again from its config, "
        "expected a config from which its class makes the same. Replace the Lambda by a layer "
        "class; or call `keras.config.enable_unsafe_deserialization()` first, which lets Keras "
        "copy code."
    )
    model = sequential(layers.Lambda(twice, name="double"), layers.Dense(2))
    with pytest.raises(ValueError, match="Register its function by `keras"):
        qi.quantize_model(model)


def test_layers_that_keras_has_quantized_are_left_as_they_are():
    model = dense()
    model.layers[0].quantize("int8")
    expected = (
        "Layer 'dense' is left as it is. layer: received layer 'dense' with quantization mode "
        "int8, expected a float layer. Do not call Keras' own `quantize` on a layer that is "
        "wrapped."
    )
    with pytest.warns(UserWarning, match="left as it is") as caught:
        qi.quantize_model(model, "w8a8")
    assert [str(each.message) for each in caught if each.category is UserWarning] == [expected]


@pytest.mark.parametrize("action", [qi.convert_to_inferable, qi.unwrap_model])
def test_a_model_in_which_nothing_is_quantized(action):
    model = dense()
    with pytest.warns(UserWarning, match="nothing is quantized") as caught:
        new = action(model)
    assert [str(each.message) for each in caught if each.category is UserWarning] == [
        f"{action.__name__}: received model 'net', in which nothing is quantized: the new model is "
        "a copy of it. Quantize it first, with `quantize_model`."
    ]
    np.testing.assert_array_equal(new.predict(X, verbose=0), model.predict(X, verbose=0))
