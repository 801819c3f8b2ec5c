"""How refusals are worded, what they suggest, and where warnings point."""

import ast
import inspect
from pathlib import Path

import keras
import numpy as np
import pytest
from reference import refused

import keras_qwrap as qi
from keras_qwrap.numerics.checks import bad_type, bad_value, nearest
from keras_qwrap.numerics.search import RANGE_METHODS
from keras_qwrap.recipes.recipe import as_recipe

GRIDS = ("symmetric", "power_of_two", "uniform")


def test_numbers_are_told_from_texts_and_texts_read_as_they_are():
    """A text stands in quotes; what else it may look like has its type behind it."""
    error = bad_value("num_bits", 1, "2 to 16", "Use 8.")
    assert str(error) == "num_bits: received 1 (of type int), expected 2 to 16. Use 8."
    error = bad_type("num_bits", "1", "an int", "Use 8.")
    assert str(error) == "num_bits: received '1', expected an int. Use 8."
    assert type(bad_value("x", 1, "", "")) is ValueError
    assert type(error) is TypeError


def test_long_values_are_cut():
    text = str(bad_value("x", [10] * 100, "less", "Fix it."))
    assert text.startswith("x: received [10, 10,")
    assert "... (of type list), expected less. Fix it." in text
    assert len(text) < 180


SUGGESTED = [
    (GRIDS, "uniform", ["asymmetric", "Asymmetric", "affine", "zero-point", "asym", "uniforn"]),
    (GRIDS, "symmetric", ["sym", "symmetrical", "SYMMETRIC", "symetric"]),
    (GRIDS, "power_of_two", ["pot", "POT", "po2", "power-of-two", "powerOfTwo", "pow2"]),
    (RANGE_METHODS, "minmax", ["max", "min_max", "min-max", "MinMax", "absmax"]),
    (RANGE_METHODS, "entropy", ["kl", "KL", "kl_divergence", "KLD"]),
    (RANGE_METHODS, "moving_average", ["ema", "MovingAverageMinMax", "moving average"]),
    (RANGE_METHODS, "mse", ["MSE", "l2", "squared_error"]),
    (RANGE_METHODS, "percentile", ["quantile", "percentiles"]),
]


@pytest.mark.parametrize(
    ("names", "meant", "word"),
    [(names, meant, word) for names, meant, words in SUGGESTED for word in words],
)
def test_words_of_others_are_understood(names, meant, word):
    assert nearest(word, names) == repr(meant)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *[(given, "'w8a8', 'w8'") for given in ("int8", "INT8", "8", "8-bit")],
        *[(given, "'w4a8', 'w4'") for given in ("int4", "4", "4bit")],
        *[(given, "'w8a8'") for given in ("W8A8", "w8-a8", "w8_a8", "a8w8", "8x8", "static")],
        *[("W6A7", "'w6a7'"), ("w5", None), ("dynamic", "'w8'"), ("fp16", "'w16a16'")],
        *[("w8a8_pot", "'w8a8-pot'"), ("po2", "'w8a8-pot'")],
    ],
)
def test_a_preset_that_others_write_otherwise(given, meant):
    if meant is None:
        assert as_recipe(given).preset == given
    else:
        assert refused(ValueError, lambda: as_recipe(given)).endswith(f"Nearest: {meant}.")


def test_a_number_is_no_recipe_but_says_how_many_bits():
    refused(TypeError, lambda: as_recipe(8), "received 8 ", "Pass for example 'w8a8', 'w8'.")
    refused(TypeError, lambda: as_recipe(4), "received 4 ", "Pass for example 'w4a8', 'w4'.")
    refused(TypeError, lambda: as_recipe(None), "Pass for example 'w8a8'.")


def test_words_for_arguments_of_specs():
    for key, meant in (("bits", "num_bits"), ("per_tensor", "per_channel"), ("observer", "range")):
        config = {"weights": {key: 4}}
        refused(ValueError, lambda config=config: as_recipe(config), f"Nearest: '{meant}'.")


ON_MODELS = [
    qi.quantize_model,
    lambda model: qi.calibrate(model, np.zeros((1, 2))),
    qi.convert_to_inferable,
    qi.unwrap_model,
    qi.quantization_report,
    qi.fold_batch_norm,
    lambda model: qi.save_quantized_model(model, "copy.keras"),
]


@pytest.mark.parametrize("action", ON_MODELS)
def test_what_is_given_in_place_of_a_model(action):
    given = {
        "m.keras": "Load the file first, with keras_qwrap.keras_load_quantized_model('m.keras').",
        Path("m.h5"): "keras_load_quantized_model('m.h5').",
        keras.layers.Dense(2): "a model first: keras.Sequential([keras.Input(...), layer]).",
        keras.Model: "Make an object of it: Model(...).",
    }
    for model, fix in given.items():
        with pytest.raises(TypeError, match=r"^model: received .*, expected a ") as caught:
            action(model)
        assert str(caught.value).endswith(fix)


def net(name="net"):
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense")], name=name)


def vain(model):
    return qi.Recipe(rules=[qi.Rule(pattern="nothing", weights="float")])


def shadowed(model):
    rules = [qi.Rule(name="dense", weights="float"), qi.Rule(name="dense", activations="float")]
    return qi.Recipe(rules=rules)


def dead(model):
    model.layers[0].set_weights([np.zeros((3, 2)), np.zeros(2)])
    return "w8a8"


class OwnStep(keras.Sequential):
    def train_step(self, data):
        return super().train_step(data)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("recipe", [vain, shadowed, dead, None])
def test_warnings_point_at_the_line_of_the_user(recipe, nested):
    """However deep in the package they arise, and through Keras too."""
    model = net() if recipe else OwnStep([keras.Input((3,)), *net().layers])
    given = recipe(model) if recipe else "w8a8"
    if nested:
        inputs = keras.Input((3,))
        model = keras.Model(inputs, keras.layers.Activation("tanh")(model(inputs)))
    data = np.random.default_rng(0).normal(size=(8, 3))
    with pytest.warns(UserWarning, match="no layer|no effect|is always|own train_step") as caught:
        qi.quantize_model(model, given, data, verbose=0)
    ours = [warning for warning in caught if warning.category is UserWarning]
    ((file, line),) = {(warning.filename, warning.lineno) for warning in ours}
    assert file == __file__
    lines, first = inspect.getsourcelines(test_warnings_point_at_the_line_of_the_user)
    assert lines[line - first].strip().startswith("qi.quantize_model(model, given")


def test_only_the_one_helper_warns():
    """Every other place would have to count the frames between it and the user's line."""
    for path in Path(qi.__file__).parent.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        names = {name.name for node in nodes for name in getattr(node, "names", [])}
        assert ("warnings" in names) == (path.name == "checks.py"), path
