"""What a recipe decides of the layers of a model: rules in order, reasons, warnings."""

import keras
import numpy as np
import pytest
from reference import refused

import keras_qwrap as qi
from keras_qwrap.recipes.recipe import Decision, Recipe
from keras_qwrap.recipes.rules import ActivationSpec, Rule, WeightsSpec
from keras_qwrap.reports.report import QuantizationReport

W4 = WeightsSpec(4)
A4 = ActivationSpec(4)


@keras.saving.register_keras_serializable("mine")
class Special(keras.layers.Dense):
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
        built(Special(4, name="block"), 32),
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
        ({"layer_class": Special}, ["block"]),
        ({"layer_class": "mine>Special"}, ["block"]),
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
        ({"layer_class": "Special"}, ["Rule(layer_class='Special')", "'mine>Special'"]),
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


def branch(name: str, *inside: keras.Layer) -> keras.Model:
    """A Functional model of a Dense layer `first`, what is given, and another one, `last`."""
    inputs = tensor = keras.Input((4,), name=f"{name}_in")
    for layer in (
        keras.layers.Dense(4, name="first"),
        *inside,
        keras.layers.Dense(4, name="last"),
    ):
        tensor = layer(tensor)
    return keras.Model(inputs, tensor, name=name)


class Block(keras.layers.Layer):
    """A composite layer of a user's own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(4, name="dense")

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, inputs):
        return self.dense(inputs)


class Net(keras.Model):
    """A subclassed model with layers in attributes, a list, a nested model and a composite."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.stem = keras.layers.Dense(4, name="named_stem")
        self.blocks = [keras.layers.Dense(4, name=name) for name in ("zero", "one")]
        self.encoder = keras.Sequential([keras.layers.Dense(4, name="inner")], name="named_encoder")
        self.block = Block(name="named_block")

    def call(self, inputs):
        tensor = self.stem(inputs)
        for layer in self.blocks:
            tensor = layer(tensor)
        return self.block(self.encoder(tensor))

    def get_config(self):
        return {"name": self.name}


def net(name: str = "net") -> keras.Model:
    model = Net(name=name)
    model(np.zeros((1, 4), "float32"))
    return model


def nested() -> keras.Model:
    """Models in models with equal names inside, one that is shared, one without a graph."""
    deep = branch("deep")
    shared = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="first")], name="seq")
    inputs = tensor = keras.Input((4,), name="in")
    for layer in (
        branch("left", deep),
        branch("right"),
        shared,
        keras.layers.Dense(4, name="first"),
        shared,
        Net(name="net"),
    ):
        tensor = layer(tensor)
    return keras.Model(inputs, tensor, name="outer")


LEFT = ["left/first", "left/deep/first", "left/deep/last", "left/last"]
RIGHT = ["right/first", "right/last"]
NET = ["stem", "blocks/0", "blocks/1", "encoder/layers/0", "block/dense"]
FIRST = ["left/first", "left/deep/first", "right/first", "seq/first", "first"]
IN_NET = [f"net/{path}" for path in NET]
BY_NAMES = {
    "net/named_stem": "net/stem",
    "net/zero": "net/blocks/0",
    "net/one": "net/blocks/1",
    "net/named_encoder/inner": "net/encoder/layers/0",
    "net/named_block/dense": "net/block/dense",
}
"""The paths by names that the report prints of a model that is left as it is."""

ADDRESSED = [
    ({"name": "left"}, LEFT),
    ({"name": "right"}, RIGHT),
    ({"name": "left/deep"}, LEFT[1:3]),
    ({"name": "deep"}, LEFT[1:3]),
    ({"name": "left/first"}, ["left/first"]),
    ({"name": "left/deep/first"}, ["left/deep/first"]),
    ({"name": "right/last"}, ["right/last"]),
    ({"name": "seq"}, ["seq/first"]),
    ({"name": "seq/first"}, ["seq/first"]),
    ({"name": "first"}, FIRST),
    ({"pattern": "right"}, RIGHT),
    ({"pattern": "right/.*"}, RIGHT),
    ({"pattern": "left/[^/]*"}, LEFT),
    ({"pattern": "left/(first|last)"}, ["left/first", "left/last"]),
    ({"pattern": ".*/first"}, FIRST[:-1]),
    ({"pattern": "(left|right)/.*last"}, ["left/deep/last", "left/last", "right/last"]),
    ({"pattern": "deep|right"}, [*LEFT[1:3], *RIGHT]),
    ({"layer_class": keras.Sequential}, ["seq/first", "net/encoder/layers/0"]),
    ({"layer_class": Net}, IN_NET),
    ({"position": 0}, ["left/first"]),
    ({"position": 2}, ["left/deep/last"]),
    ({"position": -1}, IN_NET),
    ({"predicate": lambda layer: layer.name == "net"}, IN_NET),
    ({"name": "net"}, IN_NET),
    ({"name": "net/stem"}, ["net/stem"]),
    ({"name": "named_stem"}, ["net/stem"]),
    ({"name": "net/blocks/1"}, ["net/blocks/1"]),
    ({"pattern": "net/blocks/.*"}, ["net/blocks/0", "net/blocks/1"]),
    ({"name": "net/encoder"}, ["net/encoder/layers/0"]),
    ({"name": "named_block"}, ["net/block/dense"]),
    *(({"name": by_names}, [path]) for by_names, path in BY_NAMES.items()),
]


def kept_by(report: QuantizationReport, rule: Rule) -> list[str]:
    """Paths of the layers whose kernels are in float because of the rule, the report says."""
    paths = []
    for row in report.layers:
        for weight in row.left_in_float:
            if weight.reason == f"rule {rule}: weights and activations stay in float":
                inside = weight.path.rpartition("/")[0]
                path = "/".join(filter(None, (row.path, inside)))
                paths.append(BY_NAMES.get(path, path))
    return sorted(paths)


@pytest.fixture(scope="module")
def models() -> tuple[keras.Model, keras.Model]:
    return nested(), net()


def names(cases: list) -> list[str]:
    """The same in every process: functions have no other name than their argument."""
    return [
        ", ".join(
            f"{k} {'' if callable(v) and not isinstance(v, type) else v}" for k, v in m.items()
        )
        for m, _ in cases
    ]


@pytest.mark.parametrize(("match", "paths"), ADDRESSED, ids=names(ADDRESSED))
def test_layers_in_models_inside_go_by_their_paths(match, paths, models):
    rule = Rule.leave_in_float(**match)
    report = qi.quantization_report(models[0], Recipe.from_preset("w8", rules=[rule]))
    assert kept_by(report, rule) == sorted(paths)


def test_a_predicate_is_asked_of_layers_not_of_models_that_hold_them(models):
    """One such as "anything but Dense" would hold of the models, and so of all Dense layers."""
    asked = []
    rule = Rule(predicate=lambda layer: bool(asked.append(layer.name)), weights="float")
    with pytest.warns(UserWarning, match="matches no layer"):
        qi.quantization_report(models[0], Recipe(rules=[rule]))
    assert {"first", "last", "net", "zero", "inner"} <= set(asked)
    assert not {"left", "right", "deep", "seq", "named_encoder"} & set(asked)


@pytest.mark.parametrize("number", [2, 5, 12, -1, -7, -12])
def test_quantized_and_converted_models_follow_the_rules_of_the_report(number, models):
    match, paths = ADDRESSED[number]
    rule = Rule.leave_in_float(**match)
    recipe = Recipe.from_preset("w8", rules=[rule])
    quantized = qi.quantize_model(models[0], recipe)
    for each in (quantized, qi.convert_to_inferable(quantized)):
        report = qi.quantization_report(each, recipe)
        assert kept_by(report, rule) == sorted(paths)
        assert report.totals.quantized_weights == len(LEFT + RIGHT + NET) + 2 - len(paths)


IN_SUBCLASSED = [
    ({"name": "stem"}, ["stem"]),
    ({"name": "named_stem"}, ["stem"]),
    ({"name": "blocks/0"}, ["blocks/0"]),
    ({"pattern": "blocks/.*"}, ["blocks/0", "blocks/1"]),
    ({"name": "encoder"}, ["encoder/layers/0"]),
    ({"name": "named_encoder"}, ["encoder/layers/0"]),
    ({"name": "encoder/layers/0"}, ["encoder/layers/0"]),
    ({"name": "inner"}, ["encoder/layers/0"]),
    ({"name": "block"}, ["block/dense"]),
    ({"name": "block/dense"}, ["block/dense"]),
    ({"layer_class": Block}, ["block/dense"]),
    ({"pattern": "(stem|block/.*)"}, ["stem", "block/dense"]),
    ({"position": 0}, ["stem"]),
    ({"position": -1}, ["block/dense"]),
]


@pytest.mark.parametrize(("match", "paths"), IN_SUBCLASSED, ids=names(IN_SUBCLASSED))
def test_layers_of_subclassed_models_go_by_the_attributes_that_lead_to_them(match, paths, models):
    rule = Rule.leave_in_float(**match)
    recipe = Recipe.from_preset("w8a8", rules=[rule])
    quantized = qi.quantize_model(models[1], recipe)
    report = qi.quantization_report(quantized, recipe)
    assert [path.removeprefix("net/") for path in kept_by(report, rule)] == sorted(paths)
    outputs = [row.path for row in report.layers if row.outputs and str(rule) in row.outputs.reason]
    assert sorted(outputs) == sorted(paths)


def test_equal_names_are_told_apart_by_what_they_are_in():
    rules = [Rule(name="left/first", weights=W4), Rule(name="first", weights=WeightsSpec(2))]
    model = keras.Sequential([keras.Input((4,)), branch("left"), branch("right")])
    quantized = qi.quantize_model(model, Recipe.from_preset("w8", rules=rules))
    bits = {
        row.path: row.weights[0].num_bits
        for row in qi.quantization_report(quantized).layers
        if row.weights
    }
    assert bits == {"left/first": 4, "left/last": 8, "right/first": 2, "right/last": 8}


def test_errors_list_the_names_and_paths_of_models_inside(models):
    model = models[0]
    for name, fragments in (
        ("rihgt", ["'right'"]),
        ("left/frist", ["'left/first'"]),
        ("deap", ["'deep'"]),
        ("net/blocks/7", ["'net/blocks/0'", "'net/blocks/1'"]),
    ):
        recipe = Recipe(rules=[Rule(name=name)])
        refused(ValueError, lambda recipe=recipe: qi.quantize_model(model, recipe), *fragments)
    recipe = Recipe(rules=[Rule(pattern="rihgt.*", weights="float")])
    with pytest.warns(UserWarning, match=r"matches no layer of the model.*'right"):
        qi.quantize_model(model, recipe)
