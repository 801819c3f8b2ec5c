"""The report in words: reasons, the printed table, plain values, records and data frames."""

import dataclasses
import html.parser
import json
import math
import re
import sys
import types

import keras
import numpy as np
import pytest
from keras import layers
from layer_cases import METHODS, Scale, activation, fixed, weight

import keras_qwrap as qi
from keras_qwrap.quantizers.moving_average import MovingAverageActivationQATQuantizer
from keras_qwrap.reports.report import QuantizationReport, quantization_report
from keras_qwrap.reports.rows import FloatWeight

Wrapper = qi.KerasQuantizationWrapper


def reasons(layer, shape, **quantizers):
    wrapped = Wrapper(layer, quantizers) if quantizers else layer
    row = quantization_report(keras.Sequential([keras.Input(shape), wrapped])).layers[1]
    return {weight.path: weight.reason for weight in row.left_in_float}


def test_reasons():
    bias = "Dense: a bias is small, and integer kernels add it in 32 bits"
    assert reasons(layers.Dense(2), (3,), kernel=weight()) == {"bias": bias}
    assert reasons(layers.Dense(2), (3,)) == {"kernel": "not wrapped", "bias": bias}
    missing = {"kernel": "no quantizer was given for it"}
    assert reasons(layers.Dense(2), (3,), bias=fixed()) == missing
    off = qi.STEWeightQATQuantizer(
        qi.TrainableQuantizerWeightsConfig(METHODS.SYMMETRIC, enable_weights_quantization=False)
    )
    disabled = {"kernel": "its quantizer is disabled", "bias": bias}
    assert reasons(layers.Dense(2), (3,), kernel=off) == disabled
    norm = reasons(layers.BatchNormalization(), (3,))
    assert sorted(norm) == ["beta", "gamma", "moving_mean", "moving_variance"]
    assert all(reason.startswith("BatchNormalization: ") for reason in norm.values())


def test_reasons_of_layers_inside_a_layer():
    found = reasons(layers.Bidirectional(layers.SimpleRNN(2)), (4, 3))
    assert found["forward_layer/cell/kernel"] == "not wrapped"
    assert found["backward_layer/cell/bias"].startswith("SimpleRNNCell: a bias is small")
    found = reasons(layers.SpectralNormalization(layers.Dense(2)), (3,))
    assert found["kernel"].startswith("SpectralNormalization: the layer overwrites")
    assert found["layer/bias"].startswith("Dense: a bias")


def test_reason_of_a_layer_that_cannot_be_wrapped():
    dense = layers.Dense(2)
    model = keras.Sequential([keras.Input((3,)), dense])
    dense.enable_lora(1)
    found = [row.reason for row in quantization_report(model).layers[1].left_in_float]
    assert len(found) == len(dense.weights) == 4
    assert all("cannot be wrapped: layer: received " in reason for reason in found)
    assert all("a layer without LoRA" in reason for reason in found)


def test_reason_of_integers():
    class Counting(layers.Layer):
        def build(self, input_shape):
            self.count = self.add_weight(shape=(3,), dtype="int16", trainable=False, name="count")

        def call(self, inputs):
            return inputs

    model = keras.Sequential([keras.Input((3,)), Counting(name="counting")])
    row = quantization_report(model).layers[1]
    assert row.left_in_float == (FloatWeight("count", (3,), 6, "its dtype is int16"),)


KNOWN = np.float32([[1.75, -0.5], [0.25, 1.0], [0.0, 0.5]])
CLIPPED = np.float32([[0.75, -0.5], [0.25, 0.375], [0.0, 0.375]])
SQNR = 10 * math.log10(np.sum(KNOWN**2) / np.sum((KNOWN - CLIPPED) ** 2))


def known_model():
    """Two channels of 3 bits with steps 1/4 and 1/8; an output that is not calibrated."""
    config = qi.TrainableQuantizerActivationConfig(METHODS.UNIFORM, 6)
    relu = Wrapper(layers.ReLU(name="relu"), {}, MovingAverageActivationQATQuantizer(config))
    dense = layers.Dense(2, use_bias=False, name="dense")
    wrapper = Wrapper(dense, {"kernel": weight(3, threshold=[1.0, 0.5])}, activation(4.0))
    parts = [keras.Input((3,), name="in"), relu, wrapper, Scale(name="own")]
    model = keras.Sequential(parts, name="known")
    dense.kernel.assign(KNOWN)
    return model


DB = f"{SQNR:.1f} dB"
TEXT = f"""\
Quantization of model 'known'

layer  class  tensor    shape  bits  method        range                codes  SQNR    bytes
relu   ReLU   output_0         6     uniform       not calibrated
dense  Dense  kernel    3x2    3     symmetric     0.5..1 (2 channels)  4/8    {DB}  24 -> 11
dense  Dense  output_0         8     power_of_two  -4..4

Weights in float, because
  no row for Scale: it has no trainable float weight of rank 2 or more
    own: factor

Outputs without a quantizer, because
  no quantizer was given for it
    in, own

Weights: 1 quantized (6 numbers), 1 in float (2 numbers)
Activations: 1 quantized, 1 not calibrated, 2 in float
Bytes: 32 in float, 19 quantized, 1.68 times smaller"""


NARROW = f"""\
Quantization of model 'known'

layer  tensor    bits          range          codes   bytes
class  shape     method                       SQNR
relu   output_0  6             not
ReLU             uniform       calibrated
dense  kernel    3             0.5..1         4/8     24 -> 11
Dense  3x2       symmetric     (2 channels)   {DB}
dense  output_0  8             -4..4
Dense            power_of_two

Weights in float, because
  no row for Scale: it has no trainable float weight of rank 2
    or more
    own: factor

Outputs without a quantizer, because
  no quantizer was given for it
    in, own

Weights: 1 quantized (6 numbers), 1 in float (2 numbers)
Activations: 1 quantized, 1 not calibrated, 2 in float
Bytes: 32 in float, 19 quantized, 1.68 times smaller"""


def test_text(monkeypatch):
    """As wide as it is, or in a narrow terminal with columns one above the other."""
    report = quantization_report(known_model())
    monkeypatch.setenv("COLUMNS", "100")
    assert str(report) == TEXT
    monkeypatch.setenv("COLUMNS", "62")
    assert str(report) == NARROW


def lengthy():
    """Long names of layers, models and weights, several channels, a note and long reasons."""
    inputs = keras.Input((5, 4), name="a_sequence_of_tokens_of_some_kind")
    inside = keras.Sequential([layers.Dense(4, name="projection")], name="encoder_with_a_long_name")
    tensor = inside(
        layers.MultiHeadAttention(2, 3, name="self_attention_of_block1")(inputs, inputs)
    )
    tensor = layers.Bidirectional(layers.LSTM(3), name="bidirectional")(tensor)
    tensor = layers.BatchNormalization(name="normalization_of_all")(tensor)
    model = keras.Model(inputs, tensor, name="a_model_whose_name_is_also_rather_long")
    rule = qi.Rule(name="normalization_of_all", weights=qi.WeightsSpec(2))
    recipe = qi.Recipe.from_preset("w4a8", rules=[rule])
    with pytest.warns(UserWarning, match="has no effect on weights"):
        return quantization_report(qi.quantize_model(model, recipe), recipe)


def test_the_text_is_no_wider_than_the_terminal_and_loses_nothing(monkeypatch):
    report = lengthy()
    monkeypatch.setenv("COLUMNS", "1000")
    whole = sorted("".join(str(report).split()))
    for width in (300, 120, 100, 80, 79, 60, 40, 30):
        monkeypatch.setenv("COLUMNS", str(width))
        text = str(report)
        assert max(map(len, text.splitlines())) <= width
        assert sorted("".join(text.split())) == whole
        assert "\n".join(line.rstrip() for line in text.splitlines()) == text


def test_a_line_stands_for_the_report():
    assert repr(quantization_report(known_model())) == (
        "QuantizationReport('known', quantized_weights=1, quantized_activations=1, "
        "bytes_before=32, bytes_after=19)"
    )


class Cells(html.parser.HTMLParser):
    """The texts in a page, and the marks around them."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.marks, self._open = [], set(), []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        assert attributes == []
        self._open.append(tag)
        self.marks.add(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_notebooks_show_a_table(monkeypatch):
    """All of the text, in HTML that needs nothing else, and in which names are no marks."""
    report = quantization_report(known_model())
    page = Cells(report._repr_html_())
    assert page.marks == {"div", "p", "table", "tr", "th", "td", "ul", "li"}
    monkeypatch.setenv("COLUMNS", "1000")
    for line in str(report).splitlines():
        for part in filter(None, re.split("  +", line)):
            assert any(part in text for text in page.texts), part
    evil = "<script>alert('&')</script>"
    layers = [dataclasses.replace(layer, path=evil) for layer in report.layers]
    changed = dataclasses.replace(report, model=evil, layers=tuple(layers), notes=(evil,))
    page = Cells(changed._repr_html_())
    assert "script" not in page.marks
    assert sum(evil in text for text in page.texts) > 5
    assert lengthy()._repr_html_().count("<tr>") == 1 + 9 + 5


def test_nothing_quantized(monkeypatch):
    report = quantization_report(keras.Sequential([keras.Input((3,)), layers.ReLU()], name="bare"))
    assert "table" not in Cells(report._repr_html_()).marks
    assert str(report).startswith("Quantization of model 'bare'\n")


def test_plain_values():
    exact, known = known_model(), known_model()
    exact.get_layer("dense").layer.kernel.assign(CLIPPED)
    for model in (known, exact, keras.Sequential([keras.Input((3,)), layers.Dense(2)])):
        report = quantization_report(model)
        plain = report.to_dict()
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain
        assert sorted(plain) == ["layers", "model", "notes", "totals"]
        assert plain["totals"] == dataclasses.asdict(report.totals)
        assert [row["path"] for row in plain["layers"]] == [row.path for row in report.layers]
    plain = quantization_report(exact).to_dict()["layers"][2]
    assert plain["weights"][0]["sqnr_db"] == "inf"
    assert float(plain["weights"][0]["sqnr_db"]) == math.inf
    assert plain["weights"][0]["shape"] == [3, 2]
    assert "exact" in str(quantization_report(exact))


def test_records():
    given, relu, kernel, output, factor, last = quantization_report(known_model()).records()
    for record, layer in ((given, "in"), (last, "own")):
        assert (record["layer"], record["tensor"], record["state"]) == (layer, "outputs", "float")
        assert record["reason"] == "no quantizer was given for it"
    assert list(given) == list(relu) == list(kernel) == list(output) == list(factor)
    assert (relu["layer"], relu["tensor"], relu["state"]) == ("relu", "output_0", "not calibrated")
    assert (relu["shape"], relu["range_min"], relu["bytes_before"]) == (None, None, None)
    assert (kernel["class_name"], kernel["tensor"], kernel["state"]) == (
        *("Dense", "kernel", "quantized"),
    )
    assert (kernel["range_min"], kernel["range_max"], kernel["codes_total"]) == (0.5, 1.0, 8)
    assert (kernel["bytes_before"], kernel["bytes_after"], kernel["reason"]) == (24, 11, None)
    assert (output["range_min"], output["range_max"], output["num_bits"]) == (-4.0, 4.0, 8)
    assert (factor["state"], factor["bytes_before"], factor["bytes_after"]) == ("float", 8, 8)
    assert factor["reason"].startswith("no row for Scale")


def test_data_frame(monkeypatch):
    report = quantization_report(known_model())
    stub = types.ModuleType("pandas")
    stub.DataFrame = lambda rows: ("frame", rows)
    monkeypatch.setitem(sys.modules, "pandas", stub)
    assert report.to_dataframe() == ("frame", report.records())
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="Run `pip install pandas`"):
        report.to_dataframe()


def test_rows_are_values():
    report = quantization_report(known_model())
    assert isinstance(report, QuantizationReport)
    assert report == quantization_report(known_model())
    for value in (report, report.layers[0], report.layers[2].weights[0], report.totals):
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.bytes_before = 1
