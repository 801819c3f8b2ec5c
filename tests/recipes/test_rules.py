"""Rules one by one: what they refuse, and that they cannot be saved with a function."""

import dataclasses

import keras
import numpy as np
import pytest
from reference import refused

from keras_qwrap.recipes.recipe import Recipe
from keras_qwrap.recipes.rules import ActivationSpec, Place, Rule, WeightsSpec


def small(layer: keras.Layer) -> bool:
    return layer.count_params() < 10


MATCHES = {
    "name": "conv1",
    "pattern": "conv[0-9]",
    "layer_class": "Conv2D",
    "position": -1,
    "predicate": small,
}


def test_fields():
    names = [field.name for field in dataclasses.fields(Rule)]
    assert names == [*MATCHES, "weights", "activations"]
    assert {field.default for field in dataclasses.fields(Rule)} == {None}


@pytest.mark.parametrize("name", MATCHES)
def test_leave_in_float(name):
    match = {name: MATCHES[name]}
    assert Rule.leave_in_float(**match) == Rule(**match, weights="float", activations="float")
    assert getattr(Rule(**match), name) == MATCHES[name]


def test_a_class_is_kept_by_its_registered_name():
    assert Rule(layer_class=keras.layers.Convolution2D).layer_class == "Conv2D"
    assert Rule(layer_class=keras.layers.Dense) == Rule(layer_class="Dense")
    assert Rule(layer_class=keras.Sequential).layer_class == "Sequential"


def test_texts():
    assert str(Rule(predicate=small, weights="float")) == "Rule(predicate=small, weights='float')"
    rule = Rule(position=0, weights=WeightsSpec(4), activations=ActivationSpec(method="symmetric"))
    assert str(rule) == (
        "Rule(position=0, weights=WeightsSpec(num_bits=4), "
        "activations=ActivationSpec(method='symmetric'))"
    )


@pytest.mark.parametrize("action", [Rule.get_config, lambda rule: Recipe(rules=[rule]).to_json()])
def test_a_function_cannot_be_saved(action):
    rule = Rule(predicate=small)
    refused(TypeError, lambda: action(rule), "Rule(predicate=small)", "cannot be saved", "pattern")


def test_a_predicate_must_answer():
    layer = keras.layers.Dense(1, name="head")
    rule = Rule(predicate=lambda layer: None)
    refused(
        TypeError, lambda: rule.select([Place(layer, "head")]), "Rule(predicate=", "'head'", "None"
    )


BAD_RULES = [
    ({}, ValueError, ["Rule()", "exactly one of name, pattern", "predicate"]),
    ({"weights": "float"}, ValueError, ["Rule(weights='float')", "exactly one of"]),
    (
        {"name": "a", "pattern": "b"},
        ValueError,
        ["Rule(name='a', pattern='b')", "exactly one of", "a rule of each"],
    ),
    ({"position": 0, "predicate": small}, ValueError, ["Rule(position=0, predicate=small)"]),
    ({"name": 3}, TypeError, ["name of Rule(name=3)", "a string"]),
    ({"pattern": 3}, TypeError, ["pattern of Rule(pattern=3)", "a string"]),
    ({"pattern": "a("}, ValueError, ["pattern of Rule(pattern='a(')", "regular", "position 1"]),
    ({"layer_class": int}, TypeError, ["layer_class of Rule(layer_class=int)", "a layer class"]),
    ({"layer_class": 3}, TypeError, ["Rule(layer_class=3)", "keras.layers.Conv2D"]),
    (
        {"layer_class": (keras.layers.Dense, keras.layers.Conv2D)},
        TypeError,
        ["layer_class of", "a layer class or its name"],
    ),
    ({"position": 0.0}, TypeError, ["position of Rule(position=0.0)", "an int"]),
    ({"position": True}, TypeError, ["position of Rule(position=True)", "an int"]),
    ({"position": "first"}, TypeError, ["Rule(position='first')", "0 for the first"]),
    ({"predicate": "small"}, TypeError, ["Rule(predicate='small')", "a function of a layer"]),
    (
        {"name": "a", "weights": "flaot"},
        TypeError,
        ["weights of Rule(name='a', weights='flaot')", "'float' or of type WeightsSpec"],
    ),
    (
        {"name": "a", "weights": ActivationSpec()},
        TypeError,
        ["weights of Rule(name='a', weights=ActivationSpec())"],
    ),
    ({"name": "a", "weights": 4}, TypeError, ["weights of Rule(name='a', weights=4)"]),
    ({"name": "a", "weights": np.ones(2)}, TypeError, ["weights of Rule(name='a'"]),
    (
        {"name": "a", "activations": {"num_bits": 4}},
        TypeError,
        ["activations of Rule(name='a'", "'float' or of type ActivationSpec"],
    ),
]


@pytest.mark.parametrize(("arguments", "error", "fragments"), BAD_RULES)
def test_bad_rules_are_refused(arguments, error, fragments):
    refused(error, lambda: Rule(**arguments), *fragments)


def test_every_argument_has_bad_rows():
    fields = {field.name for field in dataclasses.fields(Rule)}
    assert fields == {name for arguments, _, _ in BAD_RULES for name in arguments}
