"""`quantize_model` keeps names: those of outputs too, where a holder makes them."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from reference import refused, to_numpy

import keras_qwrap as qi
from keras_qwrap import KerasActivationQuantizationHolder as Holder


def rows(random, count=16):
    return random.normal(size=(count, 6)).astype("float32")


def two_heads():
    """A sum, and a layer, make the outputs; the sum is read besides."""
    inputs = keras.Input((6,), name="in")
    total = layers.Dense(2, name="left")(inputs) + layers.Dense(2, name="right")(inputs)
    second = layers.Dense(2, name="second")(ops.tanh(total) * 2.0)
    model = keras.Model(inputs, [total, second])
    losses = dict.fromkeys(model.output_names, "mse")
    metrics = {model.output_names[0]: ["mae"]}
    model.compile("sgd", loss=losses, metrics=metrics)
    return model


def test_outputs_keep_their_names_and_the_compile_state_fits(random, tmp_path):
    model, x = two_heads(), rows(random)
    quantized = qi.quantize_model(model, "w8a8", x, verbose=0)
    total = model.output_names[0]
    assert isinstance(quantized.get_layer(total), Holder)
    targets = dict.fromkeys(model.output_names, np.zeros((16, 2)))
    quantized.fit(x, targets, verbose=0)
    converted = qi.convert_to_inferable(quantized)
    converted.save(tmp_path / "model.keras")
    for each in (quantized, converted, keras.models.load_model(tmp_path / "model.keras")):
        assert each.output_names == model.output_names
        for layer in model.layers:
            assert each.get_layer(layer.name).name == layer.name
        for output, expected in zip(each(x), quantized(x), strict=True):
            np.testing.assert_array_equal(to_numpy(output), to_numpy(expected))
    assert np.isfinite(each.evaluate(x, targets, verbose=0)).all()


def test_a_function_behind_which_nothing_is_quantized_keeps_its_name():
    model = two_heads()
    quantized = qi.quantize_model(model, "w8")
    assert {op.name for op in quantized.operations} == {op.name for op in model.operations}
    names = {op.name for op in qi.quantize_model(model, "w8a8").operations}
    tanh, product = (
        op.name for op in model.operations if type(op).__name__ in ("Tanh", "Multiply")
    )
    assert {tanh, f"{tanh}_quantizer", product, f"{product}_quantizer"} <= names


def test_outputs_of_nested_models_keep_their_names():
    def inner(name):
        inputs = keras.Input((6,))
        return keras.Model(inputs, layers.Dense(6)(inputs) + inputs, name=name)

    inputs, (first, second) = keras.Input((6,)), (inner("first"), inner("second"))
    model = keras.Model(inputs, second(first(inputs)) * 0.5)
    quantized = qi.quantize_model(model)
    assert quantized.output_names == model.output_names
    for part in (first, second):
        assert quantized.get_layer(part.name).output_names == part.output_names


def test_names_that_are_taken_are_not_given_twice():
    inputs = keras.Input((6,))
    total = inputs + 1.0
    name = total._keras_history.operation.name
    other = layers.Dense(2, name=f"{name}_unquantized")(inputs)
    model = keras.Model(inputs, [total, other])
    quantized = qi.quantize_model(model)
    assert quantized.output_names == model.output_names
    assert f"{name}_unquantized_1" in [operation.name for operation in quantized.operations]


@pytest.mark.parametrize("leaving", [[1], [0, 1]])
def test_outputs_of_one_function(leaving, random):
    """Where several leave the model they have one name, which layers cannot have."""
    inputs, x = keras.Input((6,)), rows(random)
    moments = ops.moments(layers.Dense(6)(inputs), axes=[-1])
    model = keras.Model(inputs, [moments[i] for i in leaving])
    quantized = qi.quantize_model(model, "w8a8", x, verbose=0)
    name = model.output_names[0]
    expected = [name] if len(leaving) == 1 else [f"{name}_{i}_quantizer" for i in leaving]
    assert quantized.output_names == expected
    pairs = zip(keras.tree.flatten(quantized(x)), keras.tree.flatten(model(x)), strict=True)
    for output, wanted in pairs:
        np.testing.assert_allclose(to_numpy(output), to_numpy(wanted), atol=0.2)


def test_a_function_that_is_called_twice_has_a_holder_behind_each_call():
    inputs = keras.Input((6,))
    first = ops.square(inputs)
    square = first._keras_history.operation
    quantized = qi.quantize_model(keras.Model(inputs, [first, square(layers.Dense(6)(inputs))]))
    names = [f"{square.name}_quantizer", f"{square.name}_quantizer_1"]
    assert sorted(quantized.output_names) == names


@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize("name", ["my in", "in:0", "größe"])
def test_inputs_whose_names_are_no_scopes(name, functional, random):
    inputs, x = keras.Input((6,), name=name), rows(random)
    dense = layers.Dense(2, name="dense")
    model = keras.Model(inputs, dense(inputs)) if functional else keras.Sequential([inputs, dense])
    quantized = qi.quantize_model(model, "w8a8", x, verbose=0)
    assert quantized.inputs[0].name == name
    np.testing.assert_array_equal(quantized.predict(x, verbose=0), to_numpy(quantized(x)))
    named = qi.quantize_model(model, "w8a8", {name: x}, verbose=0)
    np.testing.assert_array_equal(named.predict(x, verbose=0), to_numpy(quantized(x)))


def test_unwrapping_gives_functions_their_names_back(random):
    model, x = two_heads(), rows(random)
    quantized = qi.quantize_model(model, "w8a8", x, verbose=0)
    for each in (quantized, qi.convert_to_inferable(quantized)):
        plain = qi.unwrap_model(each)
        assert [op.name for op in plain.operations] == [op.name for op in model.operations]
        assert plain.output_names == model.output_names
        plain.fit(x, dict.fromkeys(model.output_names, np.zeros((16, 2))), verbose=0)


def unnamed_sequential():
    return keras.Sequential([keras.Input((6,)), layers.Dense(2, name="dense")], name="model")


def built_sequential():
    model = keras.Sequential([layers.Dense(2, name="dense")], name="model")
    model.build((None, 6))
    return model


def of_inputs(*names, layer="dense"):
    inputs = [keras.Input((6,), name=name) for name in names]
    outputs = layers.Dense(2, name=layer)(layers.Concatenate(name="all")(inputs * 2))
    return keras.Model(inputs, outputs, name="model")


UNNAMED = [
    (unnamed_sequential, ["input"]),
    (built_sequential, ["input"]),
    (lambda: of_inputs(None), ["input"]),
    (lambda: of_inputs(None, None), ["input", "input_1"]),
    (lambda: of_inputs("mine", None), ["mine", "input"]),
    (lambda: of_inputs("input", None), ["input", "input_1"]),
    (lambda: of_inputs(None, None, layer="input"), ["input_1", "input_2"]),
    (lambda: of_inputs("input_layers"), ["input_layers"]),
]


@pytest.mark.parametrize(("make", "names"), UNNAMED)
def test_inputs_without_a_name_are_called_the_same_in_every_run(make, names):
    """Keras counts them in the whole process; what stands behind them, and the report, do not."""
    for _ in range(2):
        model = make()
        quantized = qi.quantize_model(model, "w8a8")
        holders = [layer.name for layer in quantized.layers if isinstance(layer, Holder)]
        assert holders[: len(names)] == [f"{name}_quantizer" for name in names]
        for each in (model, qi.quantize_model(model, "w8")):
            rows = qi.quantization_report(each).layers
            assert [row.path for row in rows if row.class_name == "InputLayer"] == names
        assert quantized.get_layer("dense" if names[0] != "input_1" else "input").built


def test_inputs_of_models_inside_are_called_the_same_in_every_run():
    for _ in range(2):
        model = keras.Sequential([keras.Input((6,)), unnamed_sequential()])
        rows = qi.quantization_report(model, "w8").layers
        assert [row.path for row in rows if row.outputs] == ["input", "model/dense"]


@pytest.mark.parametrize("generated", [False, True])
def test_rules_name_an_input_as_the_report_does_or_as_keras_does(generated):
    model = of_inputs(None, None)
    name = model.inputs[1]._keras_history.operation.name if generated else "input_1"
    rule = qi.Rule.leave_in_float(name=name)
    recipe = qi.Recipe.from_preset("w8a8", rules=[rule])
    quantized = qi.quantize_model(model, recipe)
    assert [x.name for x in quantized.layers if isinstance(x, Holder)] == ["input_quantizer"]
    (row,) = [r for r in qi.quantization_report(quantized, recipe).layers if r.path == "input_1"]
    assert row.outputs.reason == f"rule {rule}: weights and activations stay in float"


def test_calibration_names_an_input_without_a_name(random):
    quantized = qi.quantize_model(unnamed_sequential(), "w8a8")
    found = qi.calibrate(quantized, rows(random), {"input_quantizer": "minmax"}, verbose=0)
    assert list(found) == ["input_quantizer", "dense"]


class Blocks(keras.Model):
    """Layers in a list, and a model inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [layers.Dense(4, name="first"), layers.Dense(4, name="second")]
        self.encoder = keras.Sequential([layers.Dense(3, name="dense")], name="encoder")
        self.normalization = layers.BatchNormalization()

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.normalization(self.encoder(x))


def without_graph():
    model = Blocks(name="net")
    model(np.ones((1, 6), "float32"))
    return model


NAMED_AS_PRINTED = {
    "input": lambda: of_inputs("image", "other"),
    "no names": lambda: of_inputs(None, None),
    "no scope": lambda: of_inputs("my image"),
    "Sequential": unnamed_sequential,
    "nested": lambda: keras.Sequential([keras.Input((6,)), unnamed_sequential()]),
    "no graph": without_graph,
    "no graph inside": lambda: keras.Sequential([keras.Input((6,)), Blocks(name="net")]),
}


def quantized_parts(model, *rules):
    """What the report says has a quantizer, functions left out, which follow no rule."""
    recipe = qi.Recipe.from_preset("w8a8", rules=rules)
    report = qi.quantization_report(qi.quantize_model(model, recipe), recipe)
    rows = [row for row in report.layers if row.weights or row.activations]
    return [row.path for row in rows if not row.path.startswith("multiply")]


@pytest.mark.parametrize("case", NAMED_AS_PRINTED)
def test_a_rule_may_name_all_that_the_report_says_is_quantized(case):
    model = NAMED_AS_PRINTED[case]()
    names = quantized_parts(model)
    assert len(names) > 1
    for name in names:
        rest = quantized_parts(model, qi.Rule.leave_in_float(name=name))
        assert set(rest) <= set(names) - {name}
        assert rest or name == model.name


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (("net/blocks/0", "net/first", "first", "blocks/0"), {"blocks_0_output_0"}),
        (("net/encoder", "encoder"), {"encoder_layers_0_output_0"}),
        (("net/encoder/dense", "encoder/dense", "dense"), {"encoder_layers_0_output_0"}),
    ],
)
def test_names_in_a_model_without_a_graph_may_begin_with_its_own(names, left):
    model = without_graph()
    every = set(quantized_parts(model))
    for name in names:
        assert every - set(quantized_parts(model, qi.Rule.leave_in_float(name=name))) == left


def test_names_of_layers_come_before_those_of_what_stands_behind_them():
    inputs = keras.Input((6,), name="image")
    dense = layers.Dense(2, name="image_quantizer")(inputs)
    model = keras.Model(inputs, layers.Dense(2, name="head")(dense))
    rest = quantized_parts(model, qi.Rule.leave_in_float(name="image_quantizer"))
    assert rest == ["image_quantizer_1", "head"]


def test_patterns_see_the_names_of_the_float_model_alone():
    model = without_graph()
    for pattern in ("net.*", ".*_output_0"):
        rule = qi.Rule.leave_in_float(pattern=pattern)
        with pytest.warns(UserWarning, match="matches no layer"):
            names = quantized_parts(model, rule)
        assert names == quantized_parts(model)


@pytest.mark.parametrize(
    ("make", "wrong", "near"),
    [
        (lambda: of_inputs("image"), "image_quantiser", "image_quantizer"),
        (without_graph, "net/blocks/2", "net/blocks/0"),
        (without_graph, "blocks_0_outputs_0", "blocks_0_output_0"),
    ],
)
def test_errors_name_what_may_be_named(make, wrong, near):
    rule = qi.Rule.leave_in_float(name=wrong)
    refused(ValueError, lambda: quantized_parts(make(), rule), f"'{wrong}'", f"'{near}'")
