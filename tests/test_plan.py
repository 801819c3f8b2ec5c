"""What a recipe decides of the layers of a model: rules in order, reasons, warnings."""

import keras
import numpy as np
import pytest
from reference import refused

from keras_qwrap.recipes import Decision, Recipe
from keras_qwrap.rules import Rule
from keras_qwrap.specs import ActivationSpec, WeightsSpec

W4 = WeightsSpec(4)
A4 = ActivationSpec(4)


@keras.saving.register_keras_serializable("mine")
class Block(keras.layers.Dense):
    pass


class Unregistered(keras.layers.Dense):
    pass


def built(layer: keras.Layer, *shape: int) -> keras.Layer:
    layer.build((None, *shape))
    return layer


@pytest.fixture
def layers() -> list[keras.Layer]:
    """First and last of them have no weights to quantize."""
    return [
        built(keras.layers.BatchNormalization(name="norm"), 8, 8, 3),
        built(keras.layers.Conv2D(2, 3, name="conv1"), 8, 8, 3),
        built(keras.layers.Conv2D(2, 3, name="conv10"), 6, 6, 2),
        built(keras.layers.Flatten(name="flat"), 4, 4, 2),
        built(Block(4, name="block"), 32),
        built(Unregistered(4, name="head"), 4),
        built(keras.layers.Activation("softmax", name="scores"), 4),
    ]


def chosen(rule: Rule, layers: list[keras.Layer]) -> list[str]:
    """Names of the layers that the rule decides about."""
    plan = Recipe(rules=[rule]).plan(layers)
    return [
        layer.name for layer, decision in zip(layers, plan, strict=True) if decision.weights == W4
    ]


@pytest.mark.parametrize(
    ("match", "names"),
    [
        ({"name": "conv1"}, ["conv1"]),
        ({"pattern": "conv1"}, ["conv1"]),
        ({"pattern": "conv1.*"}, ["conv1", "conv10"]),
        ({"pattern": ".*o.*"}, ["norm", "conv1", "conv10", "block", "scores"]),
        ({"layer_class": keras.layers.Conv2D}, ["conv1", "conv10"]),
        ({"layer_class": "Conv2D"}, ["conv1", "conv10"]),
        ({"layer_class": keras.layers.Dense}, ["block", "head"]),
        ({"layer_class": Block}, ["block"]),
        ({"layer_class": "mine>Block"}, ["block"]),
        ({"layer_class": Unregistered}, ["head"]),
        ({"position": 0}, ["conv1"]),
        ({"position": 1}, ["conv10"]),
        ({"position": -1}, ["head"]),
        ({"position": -4}, ["conv1"]),
        ({"predicate": lambda layer: len(layer.weights) == 4}, ["norm"]),
        ({"predicate": lambda layer: np.bool_(layer.name == "flat")}, ["flat"]),
    ],
)
def test_what_a_rule_matches(layers, match, names):
    assert chosen(Rule(**match, weights=W4), layers) == names


def test_the_first_matching_rule_decides_as_a_whole(layers):
    rules = [
        Rule(name="head"),
        Rule(name="block", activations=A4),
        Rule(pattern="block|conv10", weights=W4, activations="float"),
        Rule(pattern=".*", weights="float", activations=ActivationSpec(16)),
    ]
    plan = dict(zip((x.name for x in layers), Recipe(rules=rules).plan(layers), strict=True))
    assert plan["head"] == Decision(WeightsSpec(), ActivationSpec(), "")
    assert plan["block"] == Decision(WeightsSpec(), A4, "")
    assert (plan["conv10"].weights, plan["conv10"].activations) == (W4, None)
    reason = (
        "rule Rule(pattern='.*', weights='float', activations=ActivationSpec(num_bits=16)): "
        "weights stay in float"
    )
    assert plan["conv1"] == Decision(None, ActivationSpec(16), reason)


def test_reasons(layers):
    def reason(recipe: Recipe) -> str:
        return recipe.plan(layers[1:2])[0].reason

    assert reason(Recipe.from_preset("w8a8")) == ""
    assert reason(Recipe.from_preset("w8")) == "recipe 'w8': activations stay in float"
    assert reason(Recipe("float", A4)) == "recipe: weights stay in float"
    rule = Rule(name="conv1", weights="float")
    assert reason(Recipe.from_preset("w4", rules=[rule])) == (
        "rule Rule(name='conv1', weights='float'): weights stay in float; "
        "recipe 'w4': activations stay in float"
    )
    rule = Rule.leave_in_float(name="conv1")
    assert reason(Recipe(rules=[rule])) == f"rule {rule}: weights and activations stay in float"
    opted_in = Recipe("float", "float", [Rule(name="conv1", weights=W4)])
    assert reason(opted_in) == "recipe: activations stay in float"


def test_first_and_last_layer_are_easily_exempt(layers):
    ends = [Rule.leave_in_float(position=0), Rule.leave_in_float(position=-1)]
    plan = Recipe.from_preset("w4a8", rules=ends).plan(layers)
    inside = [layer.name for layer, d in zip(layers, plan, strict=True) if d.weights]
    assert inside == ["norm", "conv10", "flat", "block", "scores"]
    Recipe(rules=ends).plan(layers[:2])


def test_a_name_that_is_not_there_is_refused(layers):
    recipe = Recipe(rules=[Rule(name="cnv1", weights="float")])
    refused(
        ValueError,
        lambda: recipe.plan(layers),
        "Rule(name='cnv1', weights='float')",
        "the name of a layer of the model",
        "'conv1', 'conv10'",
    )


@pytest.mark.parametrize(
    ("match", "fragments"),
    [
        ({"pattern": "con1"}, ["Rule(pattern='con1')", "'conv1'"]),
        ({"pattern": "onv1"}, ["Rule(pattern='onv1')", "'conv1'"]),
        ({"layer_class": keras.layers.Conv3D}, ["Rule(layer_class='Conv3D')", "'Conv2D'"]),
        ({"layer_class": "Block"}, ["Rule(layer_class='Block')", "'mine>Block'"]),
        ({"layer_class": "Unregistred"}, ["'Unregistered'"]),
        ({"position": 4}, ["Rule(position=4)", "'block'"]),
        ({"position": -5}, ["Rule(position=-5)"]),
        ({"predicate": lambda layer: False}, ["<lambda>", "'block'"]),
    ],
)
def test_a_rule_that_matches_nothing_warns(layers, match, fragments):
    with pytest.warns(UserWarning, match="matches no layer of the model") as caught:
        plan = Recipe(rules=[Rule(**match)]).plan(layers)
    assert plan == Recipe().plan(layers)
    (warning,) = caught
    assert warning.filename == __file__
    for fragment in fragments:
        assert fragment in str(warning.message)


def test_a_rule_behind_a_wider_one_warns(layers):
    """The usual mistake: the general rule first."""
    wide = Rule(layer_class=keras.layers.Dense, weights="float")
    narrow = Rule(name="head", weights=W4)
    with pytest.warns(UserWarning, match="no effect") as caught:
        Recipe(rules=[wide, narrow]).plan(layers)
    (warning,) = caught
    assert warning.filename == __file__
    assert str(warning.message) == (
        f"{narrow} has no effect: earlier rules decide about every layer that it matches: {wide}. "
        "Put special rules before general ones."
    )
    Recipe(rules=[narrow, wide]).plan(layers)
    Recipe(rules=[wide, Rule(name="head", weights="float")]).plan(layers)


def test_an_empty_model():
    assert Recipe().plan([]) == []
