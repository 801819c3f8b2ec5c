"""Recipes: presets, exact JSON, and every refusal with its text."""

import dataclasses
import json
import re

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import refused

from keras_qwrap.recipes.recipe import Recipe, as_recipe
from keras_qwrap.recipes.rules import ActivationSpec, Rule, WeightsSpec

W4 = WeightsSpec(4)
A4 = ActivationSpec(4)
BITS = st.integers(2, 16)
WEIGHTS_SPECS = st.builds(
    WeightsSpec,
    BITS,
    st.sampled_from(["symmetric", "power_of_two"]),
    st.booleans(),
    st.sampled_from(["weight", "mse"]),
) | st.builds(WeightsSpec, BITS, st.just("uniform"), st.booleans())
ACTIVATION_SPECS = st.builds(
    ActivationSpec,
    BITS,
    st.sampled_from(["uniform", "symmetric", "power_of_two"]),
    st.sampled_from(["mse", "minmax", "moving_average", "percentile", "entropy"]),
)
MATCHES = (
    st.fixed_dictionaries({"name": st.text()})
    | st.fixed_dictionaries({"pattern": st.text().map(re.escape)})
    | st.fixed_dictionaries(
        {"layer_class": st.sampled_from([keras.layers.Dense, keras.Layer, "mine>Block"])}
    )
    | st.fixed_dictionaries({"position": st.integers()})
)
OPTIONAL = st.sampled_from([None, "float"])
RULES = st.builds(
    lambda match, weights, activations: Rule(**match, weights=weights, activations=activations),
    MATCHES,
    OPTIONAL | WEIGHTS_SPECS,
    OPTIONAL | ACTIVATION_SPECS,
)
RECIPES = st.builds(
    Recipe, WEIGHTS_SPECS, st.just("float") | ACTIVATION_SPECS, st.lists(RULES), st.booleans()
)


PRESETS = {
    "w8a8": (WeightsSpec(8), ActivationSpec(8)),
    "w8": (WeightsSpec(8), "float"),
    "w4a8": (WeightsSpec(4), ActivationSpec(8)),
    "w4": (WeightsSpec(4), "float"),
    "w2": (WeightsSpec(2), "float"),
    "w16a12": (WeightsSpec(16), ActivationSpec(12)),
    "w8a8-pot": (WeightsSpec(8, "power_of_two"), ActivationSpec(8, "power_of_two")),
    "w3-pot": (WeightsSpec(3, "power_of_two"), "float"),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    recipe = Recipe.from_preset(preset)
    assert (recipe.weights, recipe.activations) == PRESETS[preset]
    assert recipe == Recipe(*PRESETS[preset]) == as_recipe(preset)
    assert recipe.preset == preset


def test_defaults_are_w8a8():
    """Spelled out here, so that a changed default of a spec is seen."""
    assert Recipe() == Recipe.from_preset("w8a8")
    assert Recipe().get_config() == {
        "weights": {
            "num_bits": 8,
            "method": "symmetric",
            "per_channel": True,
            "range": "weight",
        },
        "activations": {"num_bits": 8, "method": "uniform", "range": "mse"},
        "rules": [],
        "fold_batch_norm": False,
        "bias_correction": False,
    }


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(WeightsSpec(8, per_channel=False)),
        Recipe(WeightsSpec(8, "power_of_two")),
        Recipe(activations=ActivationSpec(range="minmax")),
        Recipe("float"),
    ],
)
def test_what_is_no_preset_has_none(recipe):
    assert recipe.preset is None


def test_a_preset_takes_further_arguments():
    rules = [Rule.leave_in_float(name="conv1")]
    recipe = Recipe.from_preset("w4", rules=rules, fold_batch_norm=True, bias_correction=True)
    assert recipe == Recipe(WeightsSpec(4), "float", rules, True, True)


BAD_PRESETS = [
    ("w8a8-pod", ["'w8a8-pod'", "w<bits>", "-pot or nothing", "'w8a8-pot'"]),
    ("w8b8", ["'w8b8'", "'w8a8'"]),
    ("W8A8", ["'W8A8'", "w<bits>"]),
    ("w08", ["'w08'", "'w8'"]),
    ("w8a", ["'w8a'", "'w8a8'"]),
    ("w8-", ["'w8-'", "'w8'"]),
    ("w8a8-", ["'w8a8-'", "'w8a8'"]),
    ("w8 ", ["'w8 '", "'w8'"]),
    ("w8\n", ["'w8'"]),
    ("w\u0664", ["w<bits>"]),
    ("", ["''", "w<bits>"]),
    ("int8", ["'int8'", "w<bits>"]),
    ("w1a8", ["preset 'w1a8'", "received 1 ", "2 to 16"]),
    ("w8a17", ["preset 'w8a17'", "received 17 ", "2 to 16"]),
]


@pytest.mark.parametrize(("preset", "fragments"), BAD_PRESETS)
def test_bad_presets_are_refused(preset, fragments):
    refused(ValueError, lambda: as_recipe(preset), *fragments)


@pytest.mark.parametrize("text", ["conv1", "conv\n", "\u00e9t\u00e9", "a'b\"c\\", "\ud800"])
def test_any_name_survives_json(text):
    recipe = Recipe(rules=[Rule(name=text, weights="float")])
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.slow
@given(RECIPES)
@settings(max_examples=100)
def test_json_round_trip(recipe):
    text = recipe.to_json()
    copies = [
        Recipe.from_json(text),
        Recipe.from_config(recipe.get_config()),
        Recipe.from_config(json.loads(text)),
        as_recipe(recipe.get_config()),
    ]
    for copy in copies:
        assert copy == recipe
        assert hash(copy) == hash(recipe)
        assert repr(copy) == repr(recipe)
        assert copy.to_json() == text
    for rule in recipe.rules:
        assert Rule.from_config(rule.get_config()) == rule


@given(RECIPES)
@settings(max_examples=50)
def test_the_repr_is_the_code(recipe):
    assert eval(repr(recipe)) == recipe


def test_json_is_readable():
    """What is not given in a rule is not written."""
    rules = [Rule.leave_in_float(position=0), Rule(layer_class=keras.layers.Dense, weights=W4)]
    text = Recipe("float", A4, rules).to_json()
    assert text.startswith('{\n  "weights": "float",\n  "activations": {\n    "num_bits": 4,\n')
    assert json.loads(text)["rules"] == [
        {"position": 0, "weights": "float", "activations": "float"},
        {"layer_class": "Dense", "weights": dataclasses.asdict(W4)},
    ]


def test_missing_keys_are_defaults():
    config = {"weights": {"num_bits": 4}, "rules": [{"name": "a", "activations": {"num_bits": 16}}]}
    expected = Recipe(W4, ActivationSpec(), [Rule(name="a", activations=ActivationSpec(16))])
    assert as_recipe(config) == Recipe.from_json(json.dumps(config)) == expected
    assert as_recipe({}) == Recipe()
    assert config["rules"] == [{"name": "a", "activations": {"num_bits": 16}}]


def test_as_recipe_keeps_a_recipe():
    recipe = Recipe(W4)
    assert as_recipe(recipe) is recipe


OTHER_VALUES = [
    (WeightsSpec, {"num_bits": 3, "method": "power_of_two", "per_channel": False, "range": "mse"}),
    (ActivationSpec, {"num_bits": 3, "method": "symmetric", "range": "entropy"}),
    (Recipe, {"weights": W4, "activations": A4, "rules": (Rule(name="a"),)}),
    (Recipe, {"fold_batch_norm": True, "bias_correction": True}),
]


@pytest.mark.parametrize(("cls", "arguments"), OTHER_VALUES)
def test_every_field_is_kept_and_matters(cls, arguments):
    for name, value in arguments.items():
        changed = cls(**{name: value})
        assert getattr(changed, name) == value
        assert changed != cls()
        assert cls.from_config(changed.get_config()) == changed
        assert f"{name}=" in repr(changed)
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.weights = None


def test_all_fields_have_other_values():
    for cls in (WeightsSpec, ActivationSpec, Recipe):
        names = {name for c, arguments in OTHER_VALUES if c is cls for name in arguments}
        assert names == {field.name for field in dataclasses.fields(cls)}


def test_numpy_numbers_become_plain():
    spec = WeightsSpec(np.int64(4), per_channel=np.bool_(False))
    rule = Rule(position=np.int32(1), weights=spec)
    assert json.loads(json.dumps(rule.get_config()))["weights"]["num_bits"] == 4
    assert type(rule.position) is int
    assert type(spec.per_channel) is bool


BAD_RECIPES = [
    (
        lambda: Recipe(weights="int8"),
        TypeError,
        ["weights", "'int8'", "'float' or of type WeightsSpec"],
    ),
    (lambda: Recipe(weights=None), TypeError, ["weights", "None", "WeightsSpec(4)"]),
    (lambda: Recipe(weights=A4), TypeError, ["weights", "ActivationSpec(num_bits=4)"]),
    (
        lambda: Recipe(activations=W4),
        TypeError,
        ["activations", "'float' or of type ActivationSpec"],
    ),
    (lambda: Recipe(rules=Rule(name="a")), TypeError, ["rules", "Rule(name='a')", "a list of"]),
    (lambda: Recipe(rules=[{"name": "a"}]), TypeError, ["rules", "{'name': 'a'}", "a list of"]),
    (lambda: Recipe(fold_batch_norm=1), TypeError, ["fold_batch_norm", "True or False"]),
    (lambda: Recipe(bias_correction="yes"), TypeError, ["bias_correction", "True or False"]),
    (lambda: Recipe("float", "float"), ValueError, ["something to quantize", "WeightsSpec"]),
    (
        lambda: Recipe("float", "float", [Rule.leave_in_float(name="a"), Rule(name="b")]),
        ValueError,
        ["something to quantize"],
    ),
    (lambda: Recipe.from_preset(8), TypeError, ["preset", "received 8 ", "'w8a8'"]),
    (lambda: as_recipe(8), TypeError, ["recipe", "received 8 ", "'w8a8'"]),
    (lambda: as_recipe(None), TypeError, ["recipe", "None", "a preset"]),
    (
        lambda: as_recipe({"weight": "float"}),
        ValueError,
        ["key of Recipe", "'weight'", "'weights'"],
    ),
    (lambda: as_recipe({8: "float"}), TypeError, ["key of Recipe", "received 8 "]),
    (lambda: as_recipe({"weights": {"bits": 8}}), ValueError, ["key of WeightsSpec", "'num_bits'"]),
    (lambda: as_recipe({"weights": 8}), TypeError, ["weights", "received 8 "]),
    (lambda: as_recipe({"rules": {"name": "a"}}), TypeError, ["rules", "a list of Rule objects"]),
    (
        lambda: as_recipe({"rules": [{"nam": "a"}]}),
        ValueError,
        ["rule {'nam': 'a'}", "key of Rule", "'name'"],
    ),
    (
        lambda: as_recipe({"rules": [{"name": "a", "weights": {"num_bits": 1}}]}),
        ValueError,
        ["rule {'name': 'a', 'weights': {'num_bits': 1}}", "received 1 ", "2 to 16"],
    ),
    (lambda: as_recipe({"rules": ["w8"]}), TypeError, ["rule w8", "a dictionary of its arguments"]),
    (lambda: Recipe.from_config([]), TypeError, ["Recipe", "[]", "a dictionary"]),
    (lambda: Recipe.from_json("{"), ValueError, ["text", "'{'", "in JSON", "line 1"]),
    (lambda: Recipe.from_json(b"\xff"), ValueError, ["text", "in JSON", "codec"]),
    (lambda: Recipe.from_json(None), TypeError, ["text", "None", "in JSON", "to_json"]),
    (lambda: Recipe.from_json(5), TypeError, ["text", "received 5 ", "in JSON", "to_json"]),
    (lambda: Recipe.from_json("[]"), TypeError, ["Recipe", "[]", "a dictionary"]),
    (
        lambda: Recipe.from_json('{"weights": "float", "weights": {}}'),
        ValueError,
        ["JSON key", "'weights'", "each key once"],
    ),
]


@pytest.mark.parametrize(("action", "error", "fragments"), BAD_RECIPES)
def test_bad_recipes_are_refused(action, error, fragments):
    refused(error, action, *fragments)
