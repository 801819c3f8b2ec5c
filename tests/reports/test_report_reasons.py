"""Why something is in float: the recipe's rules, fusion, carried grids, integers, refusals."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from layer_cases import activation, weight

import keras_qwrap as qi
from keras_qwrap import Recipe, Rule, quantization_report, quantize_model
from keras_qwrap.reports.rows import UnquantizedOutputs

GIVEN_NONE = UnquantizedOutputs("float", "no quantizer was given for it")
CARRIED = UnquantizedOutputs("as its input", "as its input, whose grid it carries")


def fused(*names):
    readers = " and ".join(f"'{name}'" for name in names)
    return UnquantizedOutputs("fused", f"fused into {readers}", names)


def left(reason):
    return UnquantizedOutputs("float", reason)


def unquantized(report):
    """`{path: outputs}` of all rows without output quantizers."""
    return {row.path: row.outputs for row in report.layers if row.outputs}


def quantized_outputs(report):
    return [row.path for row in report.layers if row.activations]


def reasons(report):
    """`{path: {weight: reason}}` of the weights that are quantized by default."""
    found = {}
    for row in report.layers:
        kernels = {w.path: w.reason for w in row.left_in_float if w.path.endswith("kernel")}
        found |= {row.path: kernels} if kernels else {}
    return found


def rows(*shape):
    return np.random.default_rng(0).normal(size=(8, *shape)).astype("float32")


def network():
    """A convolution with all that fuses, a residual sum, carriers, an integer output."""
    inputs = tensor = keras.Input((6, 6, 2), name="image")
    parts = [layers.Conv2D(3, 3, name="conv"), layers.BatchNormalization(name="norm")]
    for part in [*parts, layers.ReLU(name="relu"), layers.MaxPooling2D(name="pool")]:
        tensor = part(tensor)
    side = layers.Conv2D(3, 1, name="side")(tensor)
    tensor = layers.ReLU(name="after")(layers.Add(name="sum")([tensor, side]))
    head = layers.Dense(3, name="head")(layers.Flatten(name="flat")(tensor))
    doubled = head * 2.0
    doubled._keras_history.operation.name = "double"
    largest = ops.argmax(doubled, -1)
    largest._keras_history.operation.name = "largest"
    return keras.Model(inputs, [doubled, largest], name="network")


PLACED = {
    "conv": fused("norm"),
    "norm": fused("relu"),
    "relu": fused("pool"),
    "sum": fused("after"),
    "flat": CARRIED,
    "largest": UnquantizedOutputs("no float", "its dtype is int32"),
}
"""What `quantize_model` gives no quantizer in `network`, whatever the rules."""

HEAD = "rule Rule(name='head', weights='float', activations='float'): weights and activations stay"
W8 = "recipe 'w8': activations stay in float"
SIDE = "rule Rule(name='side', weights='float'): weights stay in float"
POOL = "rule Rule(layer_class='MaxPooling2D', activations='float'): activations stay in float"
RECIPES = {
    "w8a8": ("w8a8", PLACED, {}),
    "a layer": (
        Recipe.from_preset("w8a8", rules=[Rule.leave_in_float(name="head")]),
        PLACED | {"head": left(f"{HEAD} in float")},
        {"head": {"kernel": f"{HEAD} in float"}},
    ),
    "no activations": (
        "w8",
        dict.fromkeys(
            ["image", "conv", "norm", "relu", "pool", "side", "sum", "after", "flat", "head"],
            left(W8),
        )
        | {"double": left(W8), "largest": PLACED["largest"]},
        {},
    ),
    "in part": (
        {
            "rules": [
                {"name": "side", "weights": "float"},
                {"layer_class": "MaxPooling2D", "activations": "float"},
            ]
        },
        PLACED | {"pool": left(POOL)},
        {"side": {"kernel": SIDE}},
    ),
}


SLOW = ("w8a8", "a layer")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in RECIPES]
)
def test_a_recipe_is_told_of_the_quantized_the_converted_and_the_reloaded_model(name, tmp_path):
    recipe, outputs, weights = RECIPES[name]
    data = None if recipe == "w8" else rows(6, 6, 2)
    model = quantize_model(network(), recipe, data, verbose=0)
    converted = qi.convert_to_inferable(model)
    converted.save(tmp_path / "model.keras")
    for each in (model, converted, keras.models.load_model(tmp_path / "model.keras")):
        report = quantization_report(each, recipe)
        assert unquantized(report) == outputs
        assert reasons(report) == weights
        states = [why.state for why in outputs.values()]
        assert report.totals.float_activations == states.count("float")
    behind = [row.path for row in report.layers if row.class_name.endswith("Holder")]
    placed = {path.removesuffix("_quantizer") for path in quantized_outputs(report)}
    assert placed | set(outputs) == {operation.name for operation in network().operations}
    assert placed & set(outputs) == set()
    assert behind == ([] if recipe == "w8" else ["image_quantizer", "double"])


def test_without_the_recipe_only_placement_is_known():
    recipe, outputs, _ = RECIPES["a layer"]
    report = quantization_report(quantize_model(network(), recipe))
    assert unquantized(report) == outputs | {"head": GIVEN_NONE}
    assert reasons(report) == {"head": {"kernel": "not wrapped"}}


def test_text(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    recipe, *_ = RECIPES["a layer"]
    text = str(quantization_report(quantize_model(network(), recipe), recipe))
    wanted = f"""\
Outputs without a quantizer, because
  fused into what reads them
    conv -> norm, norm -> relu, relu -> pool, sum -> after
  as its input, whose grid it carries
    flat
  {HEAD} in float
    head
  its dtype is int32
    largest

Weights: """
    assert wanted in text
    assert "Activations: 0 quantized, 5 not calibrated, 1 in float\n" in text


def test_what_is_read_exactly_and_what_is_gathered():
    ids, steps = keras.Input((4,), name="ids"), keras.Input((4, 3), name="steps")
    table = layers.Embedding(9, 3, name="table")(layers.Reshape((4,), name="as_ids")(ids))
    masked = layers.BatchNormalization(name="norm")(layers.Masking(name="mask")(steps))
    model = keras.Model([ids, steps], layers.Add(name="sum")([table, masked]))
    found = unquantized(quantization_report(quantize_model(model), "w8a8"))
    gathered = "entries of its weights, on whose grid they lie"
    assert {path: found[path] for path in ("ids", "steps", "as_ids", "mask", "table")} == {
        "ids": left("exact values for 'table'"),
        "steps": left("exact values for 'mask'"),
        "as_ids": CARRIED,
        "mask": fused("norm"),
        "table": UnquantizedOutputs("as its weights", gathered),
    }
    leave = Recipe.from_preset("w8a8", rules=[Rule(name="table", weights="float")])
    found = unquantized(quantization_report(quantize_model(model, leave), leave))
    assert "table" not in found


def test_an_input_for_normalization():
    model = keras.Sequential([keras.Input((3,), name="in"), layers.BatchNormalization(name="n")])
    found = unquantized(quantization_report(quantize_model(model), "w8a8"))
    assert found == {"in": left("raw values for 'n'")}


def test_long_lists_are_wrapped(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    parts = [layers.ReLU(name=f"{'relu' * 6}-{i}") for i in range(9)]
    model = keras.Sequential([keras.Input((2,), name="input"), *parts])
    lines = str(quantization_report(model)).splitlines()
    listed = [line for line in lines if line.startswith("    ")]
    assert [len(line) <= 100 for line in listed] == [True] * 3
    assert " ".join(", ".join(p.name for p in parts).split()) in " ".join(" ".join(listed).split())


def test_values_and_records_hold_it():
    report = quantization_report(quantize_model(network()), "w8a8")
    plain = {row["path"]: row["outputs"] for row in report.to_dict()["layers"]}
    assert plain["conv"] == {
        "state": "fused",
        "reason": "fused into 'norm'",
        "fused_into": ["norm"],
    }
    assert plain["pool"] is None
    assert report.to_dict()["notes"] == []
    record = next(
        row for row in report.records() if row["layer"] == "norm" and row["tensor"] == "outputs"
    )
    told = {key: value for key, value in record.items() if value is not None}
    assert told == {
        "layer": "norm",
        "class_name": "BatchNormalization",
        "tensor": "outputs",
        "state": "fused",
        "reason": "fused into 'relu'",
    }


def test_inputs():
    """Of a whole model; a nested model's are its caller's tensors."""
    ids, inputs = keras.Input((3,), dtype="int32", name="ids"), keras.Input((4,), name="in")
    inner = keras.Sequential([keras.Input((4,), name="inner_in"), layers.Dense(2, name="d")])
    inner.name = "inner"
    merged = layers.Concatenate(name="both")(
        [layers.Flatten()(layers.Embedding(5, 2)(ids)), inner(inputs)]
    )
    model = keras.Model([ids, inputs], merged)
    recipe = Recipe.from_preset("w8a8", rules=[Rule(name="in", activations="float")])
    report = quantization_report(quantize_model(model, recipe), recipe)
    found = unquantized(report)
    assert found["ids"] == UnquantizedOutputs("no float", "its dtype is int32")
    assert found["in"] == left(
        "rule Rule(name='in', activations='float'): activations stay in float"
    )
    assert "inner/inner_in" not in found
    assert quantized_outputs(report)[-2:] == ["inner/d", "both"]


def branches():
    """Two branches that are equally long without holders, and not with them."""
    inputs = keras.Input((4,), name="in")
    a = layers.Dense(4, name="a2")(ops.exp(layers.Dense(4, name="a1")(inputs)))
    b = layers.Dense(4, name="b1")(inputs)
    b = layers.Dense(4, name="b3")(layers.Dense(4, name="b2")(b))
    return inputs, a, b


@pytest.mark.parametrize("turned", [False, True])
def test_positions_mean_the_same_layers_with_holders_in_between(turned):
    inputs, a, b = branches()
    summands = [b, a] if turned else [a, b]
    model = keras.Model(inputs, layers.Add(name="sum")(summands))
    names = ["b1", "b2", "b3", "a1", "a2"] if turned else ["a1", "a2", "b1", "b2", "b3"]
    for position, name in enumerate(names):
        rule = Rule.leave_in_float(position=position)
        recipe = Recipe.from_preset("w8a8", rules=[rule])
        quantized = quantize_model(model, recipe)
        told = {name: {"kernel": f"rule {rule}: weights and activations stay in float"}}
        assert reasons(quantization_report(quantized, recipe)) == told


def test_a_shared_layer_names_all_that_it_is_fused_into():
    inputs = keras.Input((4,), name="in")
    shared = layers.Dense(4, name="shared")
    first = layers.ReLU(name="first")(shared(inputs))
    model = keras.Model(inputs, layers.ELU(name="second")(shared(first)))
    report = quantization_report(quantize_model(model), "w8a8")
    assert unquantized(report) == {"shared": fused("first", "second")}
    assert "    shared -> first and second\n" in str(report)


@keras.saving.register_keras_serializable("test_report_reasons")
class Traced(layers.Dense):
    """Has a method that looks traced, which no wrapper supports."""

    def helper(self):
        """Not called."""

    helper.get_concrete_function = None


def test_a_layer_that_cannot_be_wrapped_says_so_whatever_the_recipe():
    parts = [keras.Input((4,), name="in"), Traced(3, name="traced"), layers.ReLU(name="relu")]
    model = keras.Sequential([*parts, Traced(2, name="last")])
    with pytest.warns(UserWarning, match="'(traced|last)' is left as it is"):
        quantized = quantize_model(model)
    rule = Rule.leave_in_float(name="last")
    for recipe in (None, "w8a8", Recipe.from_preset("w8a8", rules=[rule])):
        report = quantization_report(quantized, recipe)
        found = unquantized(report)
        assert found.pop("traced") == fused("relu")
        ((path, why),) = found.items()
        assert (path, why.state) == ("last", "float")
        assert why.reason.startswith("cannot be wrapped: layer: received layer 'last'")
        assert reasons(report)["last"] == {"kernel": why.reason}


def test_hand_made_models_need_no_recipe():
    """A wrapper without output quantizer, a holder behind a function, a disabled quantizer."""
    inputs = keras.Input((4,), name="in")
    dense = qi.KerasQuantizationWrapper(layers.Dense(4, name="dense"), {"kernel": weight()})(inputs)
    total = layers.Add(name="total")([dense, inputs])
    held = qi.KerasActivationQuantizationHolder(activation(), name="held")(total)
    last = qi.KerasQuantizationWrapper(layers.Dense(2, name="last"), {}, activation())(held)
    report = quantization_report(keras.Model(inputs, layers.Reshape((2, 1), name="shape")(last)))
    assert unquantized(report) == {"in": GIVEN_NONE, "dense": GIVEN_NONE, "shape": CARRIED}
    assert quantized_outputs(report) == ["held", "last"]
    twice = keras.Model(inputs, [total, held, last])
    assert unquantized(quantization_report(twice))["total"] == GIVEN_NONE


@pytest.mark.parametrize("quantizers", [[], [activation()]])
def test_what_reads_a_fused_output_carries_no_grid(quantizers):
    conv = qi.KerasQuantizationWrapper(layers.Conv2D(2, 3, name="conv"), {}, quantizers)
    parts = [keras.Input((6, 6, 2), name="in"), conv, layers.MaxPooling2D(name="pool")]
    found = unquantized(quantization_report(keras.Sequential([*parts, layers.ReLU(name="relu")])))
    if quantizers:
        assert found == {"in": GIVEN_NONE, "pool": CARRIED, "relu": GIVEN_NONE}
    else:
        fused_pair = {"conv": fused("pool"), "pool": GIVEN_NONE}
        assert found == {"in": GIVEN_NONE, "relu": GIVEN_NONE} | fused_pair


def test_outputs_of_which_only_some_are_floats():
    class Both(layers.Layer):
        def call(self, x):
            return x, ops.argmax(x, -1)

    inputs = keras.Input((4,), name="in")
    report = quantization_report(keras.Model(inputs, Both(name="both")(inputs)))
    assert unquantized(report)["both"] == left("its dtype is float32 and int32")


@keras.saving.register_keras_serializable("test_report_reasons")
class Net(keras.Model):
    """A subclassed model with a layer of each kind."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first, self.last = layers.Dense(4), layers.Dense(3)
        self.unused = layers.ReLU()
        self.flat = layers.Flatten()
        self.largest = Largest()

    def call(self, x):
        logits = self.last(self.flat(self.first(x)))
        return logits, self.largest(logits)


@keras.saving.register_keras_serializable("test_report_reasons")
class Largest(layers.Layer):
    def call(self, x):
        return ops.argmax(x, -1)


@pytest.mark.parametrize("position", [0, pytest.param(-1, marks=pytest.mark.slow)])
def test_a_subclassed_model(position, tmp_path):
    """It has no graph: it says so, and judges each inner layer alone."""
    model = Net(name="net")
    model(rows(4))
    rule = Rule.leave_in_float(position=position)
    recipe = Recipe.from_preset("w8a8", rules=[rule])
    quantized = quantize_model(model, recipe, rows(4), verbose=0)
    converted = qi.convert_to_inferable(quantized)
    converted.save(tmp_path / "model.keras")
    name = "last" if position else "first"
    why = f"rule {rule}: weights and activations stay in float"
    outputs = {"flat": CARRIED, "largest": UnquantizedOutputs("no float", "its dtype is int32")}
    for each in (quantized, converted, keras.models.load_model(tmp_path / "model.keras")):
        report = quantization_report(each, recipe)
        assert unquantized(report) == outputs | {name: left(why)}
        assert reasons(report) == {"net": {f"{name}/kernel": why}}
        assert unquantized(quantization_report(each)) == outputs | {name: GIVEN_NONE}
        (note,) = report.to_dict()["notes"]
        assert note.startswith("A subclassed model has no graph")
        assert " ".join(str(report).split()).count(note) == 1


def test_a_subclassed_model_inside_a_graph():
    net = Net(name="net")
    net(rows(4))
    inside = qi.QuantizedModel(net, {}, {"first": activation()})
    inputs = keras.Input((4,), name="in")
    found = unquantized(quantization_report(keras.Model(inputs, inside(inputs))))
    assert found == {
        "in": GIVEN_NONE,
        "net/flat": CARRIED,
        "net/last": GIVEN_NONE,
        "net/largest": UnquantizedOutputs("no float", "its dtype is int32"),
    }


def test_a_hand_made_subclassed_model_says_what_it_cannot_tell():
    net = Net(name="net")
    net(rows(4))
    report = quantization_report(net)
    assert unquantized(report) == {}
    assert "are listed in graphs inside only" in " ".join(str(report).split())
    with pytest.raises(ValueError, match=r"recipe: received .*None for 'net', a subclassed"):
        quantization_report(net, "w8a8")


def test_a_recipe_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="the name of a layer of the model"):
        quantization_report(network(), Recipe(rules=[Rule.leave_in_float(name="absent")]))
    with pytest.raises(TypeError, match="expected a preset, a Recipe or its config"):
        quantization_report(network(), 8)


def in_vain():
    """A network with each kind of layer whose weights, or outputs, are never quantized."""
    inputs = keras.Input((6, 6, 2), name="image")
    tensor = layers.Conv2D(3, 3, name="conv")(inputs)
    tensor = layers.BatchNormalization(name="norm")(tensor)
    tensor = layers.ReLU(name="relu")(tensor)
    tensor = layers.Dropout(0.5, name="drop")(tensor)
    tensor = layers.PReLU(name="slopes")(layers.Conv2D(3, 1, name="side")(tensor))
    tensor = layers.LayerNormalization(name="scaled")(tensor)
    tensor = layers.Dense(3, name="head")(layers.Flatten(name="flat")(tensor))
    return keras.Model(inputs, tensor, name="network")


W4, A4 = qi.WeightsSpec(4), qi.ActivationSpec(4)
BN = "BatchNormalization: normalization: scale, offset and statistics are small"
VAIN = [
    ({"name": "norm", "weights": W4}, f"on weights: 'norm' has no weight .*{BN}"),
    ({"layer_class": "BatchNormalization", "weights": W4}, "on weights: 'norm' has no weight"),
    ({"name": "slopes", "weights": W4}, "on weights: .*PReLU: slopes are part of"),
    ({"name": "drop", "weights": W4}, "on weights: .*Dropout has no weights of its own"),
    ({"name": "relu", "weights": W4}, "on weights: .*ReLU has no weights of its own"),
    ({"name": "image", "weights": W4}, "on weights: 'image' has no weight"),
    ({"pattern": "norm|drop|scaled", "weights": W4}, "'norm', 'drop', 'scaled' have no weight"),
    ({"name": "scaled", "weights": W4, "activations": A4}, "on weights: 'scaled' has no weight"),
    (
        {"name": "norm", "weights": W4, "activations": A4},
        r"on weights: 'norm' .*, and has no effect on activations: 'norm' has no quantizer",
    ),
    ({"name": "conv", "activations": A4}, "on activations: 'conv' has no quantizer of outputs"),
    ({"name": "flat", "activations": A4}, "on activations: 'flat' has no quantizer of outputs"),
    ({"name": "flat", "weights": W4, "activations": A4}, "on activations: 'flat' has no quant"),
]


@pytest.mark.parametrize(("rule", "text"), VAIN)
def test_a_rule_that_asks_for_what_is_never_quantized_warns_once_and_is_reported(rule, text):
    rule = Rule(**rule)
    recipe = Recipe.from_preset("w8a8", rules=[rule])
    with pytest.warns(UserWarning, match=text) as caught:
        quantized = quantize_model(in_vain(), recipe)
    ours = [warning for warning in caught if warning.category is UserWarning]
    assert [str(warning.message).count(str(rule)) for warning in ours] == [1]
    plain = quantize_model(in_vain(), "w8a8")
    for each in (quantized, qi.convert_to_inferable(quantize_model(in_vain(), "w8"))):
        report = quantization_report(each, recipe)
        told = [row for row in report.to_dict()["layers"] if str(rule) in str(row)]
        assert told or any(str(rule) in note for note in report.notes)
        assert str(rule) in " ".join(str(report).split())
    found, expected = quantization_report(quantized), quantization_report(plain)
    assert found.totals == expected.totals


REASONED = [
    ({"name": "norm", "weights": W4}, "norm", f"{BN}, and rescale each channel", "weights"),
    ({"name": "slopes", "weights": W4}, "slopes", "PReLU: slopes are part of", "weights"),
    ({"pattern": ".*", "weights": W4}, "norm", BN, "weights"),
    ({"layer_class": keras.Layer, "weights": W4}, "scaled", "LayerNormalization: ", "weights"),
    ({"name": "conv", "activations": A4}, "conv", "fused into 'norm'", "outputs"),
    ({"pattern": ".*", "activations": A4}, "flat", "as its input, whose grid", "outputs"),
    ({"name": "conv", "weights": W4, "activations": A4}, "conv", "fused into", "outputs"),
]


@pytest.mark.parametrize(("rule", "path", "reason", "of"), REASONED)
@pytest.mark.filterwarnings("ignore:Rule.* has no effect")
def test_the_reason_names_the_rule_that_has_no_effect(rule, path, reason, of):
    rule = Rule(**rule)
    recipe = Recipe.from_preset("w8a8", rules=[rule])
    report = quantization_report(quantize_model(in_vain(), recipe), recipe)
    (row,) = [row for row in report.layers if row.path == path]
    found = {weight.reason for weight in row.left_in_float if weight.path != "bias"}
    (found,) = {row.outputs.reason} if of == "outputs" else found
    assert found.startswith(reason)
    assert found.endswith(f"; rule {rule} has no effect on it")
    biases = [w.reason for w in row.left_in_float if w.path == "bias"]
    assert all(str(rule) not in text for text in biases)


EFFECTIVE = [
    {"pattern": ".*", "weights": W4, "activations": A4},
    {"layer_class": keras.Layer, "weights": W4},
    {"pattern": "conv|norm", "weights": W4},
    {"name": "conv", "weights": W4, "activations": A4},
    {"name": "relu", "weights": W4, "activations": A4},
    {"name": "image", "activations": A4},
    {"pattern": "norm|relu", "activations": A4},
    {"name": "norm", "weights": "float"},
    {"name": "flat"},
]


@pytest.mark.parametrize("rule", EFFECTIVE)
def test_a_rule_that_has_an_effect_does_not_warn(rule):
    recipe = Recipe.from_preset("w8a8", rules=[Rule(**rule)])
    report = quantization_report(quantize_model(in_vain(), recipe), recipe)
    assert report.notes == ()


def test_rules_in_vain_of_models_without_a_graph():
    class Net(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = layers.Dense(3)
            self.norm = layers.BatchNormalization()
            self.flat = layers.Flatten()

        def call(self, inputs):
            return self.flat(self.norm(self.dense(inputs)))

        def get_config(self):
            return {"name": self.name}

    model = Net(name="net")
    model(rows(4))
    rules = [Rule(name="norm", weights=W4), Rule(name="flat", activations=A4)]
    recipe = Recipe.from_preset("w8a8", rules=rules)
    with pytest.warns(UserWarning, match="has no effect on") as caught:
        quantized = quantize_model(model, recipe)
    texts = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert [text.startswith(str(rule)) for text, rule in zip(texts, rules, strict=True)] == [1, 1]
    report = quantization_report(quantized, recipe)
    assert any(note.startswith(f"{rules[0]} has no effect on weights") for note in report.notes)
    assert unquantized(report)["flat"].reason == (
        f"as its input, whose grid it carries; rule {rules[1]} has no effect on it"
    )
    reasons = {w.path: w.reason for row in report.layers for w in row.left_in_float}
    assert reasons["norm/gamma"].endswith(f"; rule {rules[0]} has no effect on it")
    assert str(rules[0]) not in reasons["dense/bias"]


def test_a_rule_for_weights_that_cannot_be_replaced():
    model = in_vain()
    model.get_layer("head").enable_lora(1)
    rule = Rule(name="head", weights=W4)
    recipe = Recipe.from_preset("w8", rules=[rule])
    with pytest.warns(UserWarning, match="no effect on weights: 'head'.*without LoRA"):
        quantized = quantize_model(model, recipe)
    (row,) = [row for row in quantization_report(quantized, recipe).layers if row.path == "head"]
    assert {w.reason.endswith(f"; rule {rule} has no effect on it") for w in row.left_in_float} == {
        True
    }
