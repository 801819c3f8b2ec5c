"""The report against plain numpy: what is quantized and how well, what is not and why."""

import dataclasses
import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers
from layer_cases import METHODS, Composite, Scale, activation, fixed, floats, weight
from reference import shortest, sqnr

import keras_qwrap as qi
from keras_qwrap.layers.owner import QuantizingLayer
from keras_qwrap.quantizers.moving_average import MovingAverageActivationQATQuantizer
from keras_qwrap.reports.report import quantization_report
from keras_qwrap.reports.rows import QuantizedActivation, QuantizedWeight

Wrapper, Holder = qi.KerasQuantizationWrapper, qi.KerasActivationQuantizationHolder


def dense_with(kernel, quantizer, outputs=None):
    """A Sequential model of one wrapped Dense layer that has this kernel and no bias."""
    dense = layers.Dense(kernel.shape[1], use_bias=False, name="dense")
    wrapper = Wrapper(dense, {"kernel": quantizer}, outputs)
    model = keras.Sequential([keras.Input((kernel.shape[0],)), wrapper], name="model")
    dense.kernel.assign(kernel)
    return model


def holding(report):
    """The rows with weights or quantizers."""
    return [r for r in report.layers if r.weights or r.activations or r.left_in_float]


def kernel_row(kernel, quantizer):
    (layer,) = holding(quantization_report(dense_with(kernel, quantizer)))
    (row,) = layer.weights
    return row


KERNEL = floats(5, 3)


def test_symmetric_weight_per_channel():
    scale = np.max(np.abs(KERNEL), axis=0) * np.float32(1 / 7)
    codes = np.round(KERNEL / scale)
    assert kernel_row(KERNEL, weight(4)) == QuantizedWeight(
        path="kernel",
        shape=(5, 3),
        num_bits=4,
        method="SYMMETRIC",
        granularity="per channel",
        ranges=3,
        range=(shortest(8 * scale.min()), shortest(8 * scale.max())),
        codes_used=len(set(codes.ravel())),
        codes_total=15,
        sqnr_db=pytest.approx(sqnr(KERNEL, codes * scale), rel=1e-12),
        bytes_before=60,
        bytes_after=8 + 3 * 4,
    )


def test_uniform_weight_per_tensor():
    low, high = float(KERNEL.min()), float(KERNEL.max())
    scale = (np.float32(high) - np.float32(low)) * np.float32(1 / 31)
    zero_point = np.round(-np.float32(low) / scale)
    codes = np.clip(np.round(KERNEL / scale) + zero_point, 0, 31)
    assert kernel_row(KERNEL, weight(5, "UNIFORM", per_channel=False)) == QuantizedWeight(
        path="kernel",
        shape=(5, 3),
        num_bits=5,
        method="UNIFORM",
        granularity="per tensor",
        ranges=1,
        range=(shortest(low), shortest(high)),
        codes_used=len(set(codes.ravel())),
        codes_total=32,
        sqnr_db=pytest.approx(sqnr(KERNEL, (codes - zero_point) * scale), rel=1e-12),
        bytes_before=60,
        bytes_after=10 + 8,
    )


def test_uniform_ranges_are_those_of_all_channels():
    row = kernel_row(KERNEL, weight(8, "UNIFORM"))
    assert row.range == (shortest(min(0, KERNEL.min())), shortest(max(0, KERNEL.max())))
    assert (row.ranges, row.bytes_after) == (3, 15 + 3 * 8)


def test_power_of_two_weight_with_given_threshold():
    kernel = np.float32([[0.5, -1.0], [0.75, 0.0]])
    row = kernel_row(kernel, weight(3, "POWER_OF_TWO", threshold=[1.0, 2.0]))
    assert (row.method, row.range, row.codes_total) == ("POWER_OF_TWO", (1.0, 2.0), 8)
    assert row.codes_used == len({2, 3, -2, 0})
    assert row.sqnr_db == math.inf
    assert row.bytes_after == 2 + 8


def test_lookup_weight():
    """The codes are indices into the table, which is stored as well."""
    quantizer = qi.WeightsLUTSymmetricInferableQuantizer(
        num_bits=4,
        lut_values=[-25, 12, 85],
        threshold=2.0,
        per_channel=False,
        lut_values_bitwidth=6 + 2,
    )
    kernel = np.float32([[0.1, 2.0, 1.9], [0.2, 1.5, 0.15]])
    row = kernel_row(kernel, quantizer)
    nearest = np.abs(kernel[..., None] * 64 - [-25, 12, 85]).argmin(-1)
    assert (row.codes_used, row.codes_total) == (len(set(nearest.ravel())), 3) == (2, 3)
    assert row.sqnr_db == pytest.approx(sqnr(kernel, np.array([-25, 12, 85])[nearest] / 64))
    assert (row.method, row.range) == ("LUT_SYM_QUANTIZER", (2.0, 2.0))
    assert row.bytes_after == 3 + 4 + 3


def test_several_channel_axes():
    wrapper = Wrapper(
        layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False),
        {"kernel": weight(4, axis=(2, 3))},
    )
    model = keras.Sequential([keras.Input((5, 5, 3)), wrapper])
    row = holding(quantization_report(model))[0].weights[0]
    assert (row.granularity, row.ranges, row.bytes_after) == ("per channel", 6, 27 + 24)


@settings(max_examples=10)
@given(st.integers(2, 8), st.integers(0, 1000), st.sampled_from([1e-3, 1.0, 1e4]))
def test_codes_and_sqnr_are_numpys(bits, seed, size):
    w = floats(7, 2, seed=seed) * np.float32(size)
    scale = np.float32(np.max(np.abs(w))) * np.float32(1 / (2 ** (bits - 1) - 1))
    q = np.round(w / scale) * scale
    row = kernel_row(w, weight(bits, per_channel=False))
    assert row.codes_used == len(np.unique(q))
    assert row.sqnr_db == pytest.approx(sqnr(w, q), rel=1e-9)
    assert row.bytes_after == math.ceil(14 * bits / 8) + 4


def moving_average(**params):
    config = qi.TrainableQuantizerActivationConfig(METHODS.UNIFORM, 6, params)
    return MovingAverageActivationQATQuantizer(config)


def disabled_activation():
    config = qi.TrainableQuantizerActivationConfig(
        METHODS.SYMMETRIC, 6, {"threshold": 1.0}, enable_activation_quantization=False
    )
    return qi.STEActivationQATQuantizer(config)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: activation(4.0, 5), (5, "POWER_OF_TWO", (-4.0, 4.0), "quantized")),
        (lambda: activation(4.0, signed=False), (8, "POWER_OF_TWO", (0.0, 4.0), "quantized")),
        (
            lambda: qi.ActivationUniformInferableQuantizer(3, -1.0, 2.5),
            (3, "UNIFORM", (-1.0, 2.5), "quantized"),
        ),
        (moving_average, (6, "UNIFORM", None, "not calibrated")),
        (
            lambda: moving_average(range_min=-0.5, range_max=2.0),
            (6, "UNIFORM", (-0.5, 2.0), "quantized"),
        ),
        (disabled_activation, (6, "SYMMETRIC", None, "disabled")),
    ],
)
def test_activations(make, expected):
    """In wrappers and in holders."""
    inputs = keras.Input((5,))
    wrapped = Wrapper(layers.ReLU(name="relu"), {}, make())(inputs)
    model = keras.Model(inputs, Holder(make(), name="held")(wrapped))
    report = quantization_report(model)
    wanted = QuantizedActivation("output_0", *expected)
    assert [(row.path, row.activations) for row in holding(report)] == [
        ("relu", (wanted,)),
        ("held", (wanted,)),
    ]
    assert report.totals.quantized_activations == 2 * (expected[-1] == "quantized")
    assert report.totals.uncalibrated_activations == 2 * (expected[-1] == "not calibrated")


def test_several_outputs():
    wrapper = Wrapper(layers.LSTM(2, return_state=True), {}, [activation(2.0**i) for i in range(3)])
    inputs = keras.Input((4, 3))
    report = quantization_report(keras.Model(inputs, wrapper(inputs)))
    assert [(row.name, row.range) for row in holding(report)[0].activations] == [
        ("output_0", (-1.0, 1.0)),
        ("output_1", (-2.0, 2.0)),
        ("output_2", (-4.0, 4.0)),
    ]


class Subclassed(keras.Model):
    """Has wrappers and holders as attributes and in lists, and a weight of its own."""

    def __init__(self):
        super().__init__(name="subclassed")
        block = keras.Sequential([layers.Dense(3, name="a"), layers.Dense(2, name="b")])
        self.wrapper = Wrapper(block, {"layers/0/kernel": weight(4)}, name="block")
        self.holders = [Holder(activation(), name="held")]
        self.plain = layers.Dense(2, name="plain")
        self.factor = self.add_weight(name="factor", shape=(2, 2))

    def call(self, inputs):
        return self.plain(self.holders[0](self.wrapper(inputs))) @ self.factor


def subclassed():
    model = Subclassed()
    model(floats(2, 4))
    return model


def whole():
    """Nested models, a shared layer, wrappers inside a layer, floats of many kinds."""
    inputs = keras.Input((4, 3))
    shared = Wrapper(layers.Dense(3, name="shared"), {"kernel": weight(4), "bias": fixed()})
    timed = layers.TimeDistributed(
        Wrapper(layers.Dense(3, name="in"), {"kernel": weight(2)}), name="timed"
    )
    hidden = layers.BatchNormalization(name="norm")(timed(shared(shared(inputs))))
    nested = keras.Input((4, 3))
    inner = keras.Model(nested, Scale(name="scale")(shared(nested)), name="inner")
    outer = keras.Sequential([inner, layers.Flatten(), Composite(name="parts")], name="outer")
    lstm = Wrapper(layers.LSTM(2, name="lstm"), {"cell/kernel": weight()}, moving_average())
    return keras.Model(inputs, [outer(hidden), lstm(hidden)], name="whole")


@pytest.mark.parametrize("make", [whole, subclassed, lambda: qi.convert_to_inferable(nested())])
def test_every_weight_is_in_it_once(make):
    """Compared by shape with all weights of the model but the quantizers' own."""
    model = make()
    report = quantization_report(model)
    own = set()
    for layer in model._flatten_layers():
        if isinstance(layer, QuantizingLayer):
            inside = {id(v) for v in layer.layer.variables} if hasattr(layer, "layer") else set()
            own |= {id(v) for v in layer.variables} - inside
    wanted = sorted(
        tuple(v.shape) for v in model.variables if id(v) not in own and "float" in v.dtype
    )
    rows = [row for layer in report.layers for row in (*layer.weights, *layer.left_in_float)]
    assert sorted(row.shape for row in rows) == wanted
    names = [(layer.path, row.path) for layer in report.layers for row in layer.weights]
    names += [(layer.path, row.path) for layer in report.layers for row in layer.left_in_float]
    assert len(set(names)) == len(names)
    assert report.totals.bytes_before == 4 * sum(math.prod(shape) for shape in wanted)


def nested():
    inner = keras.Sequential(
        [keras.Input((3,)), Wrapper(layers.Dense(2, name="d"), {"kernel": weight(3)}, activation())]
    )
    return keras.Sequential([keras.Input((3,)), inner, layers.Dense(2, name="last")], name="nested")


def test_paths_and_order():
    found = holding(quantization_report(whole()))
    assert [layer.path for layer in found] == [
        "shared",
        "timed/in",
        "norm",
        "outer/inner/scale",
        "outer/parts",
        "lstm",
    ]
    rows = {layer.path: layer for layer in found}
    assert [row.path for row in rows["shared"].weights] == ["kernel", "bias"]
    assert [row.path for row in rows["lstm"].weights] == ["cell/kernel"]
    assert [r.path for r in rows["lstm"].left_in_float] == ["cell/recurrent_kernel", "cell/bias"]
    assert [layer.class_name for layer in found] == [
        *("Dense", "Dense", "BatchNormalization", "Scale", "Composite", "LSTM")
    ]
    assert [layer.wrapped for layer in found] == [True, True, False, False, False, True]
    rows = {layer.path: layer for layer in quantization_report(subclassed()).layers}
    assert sorted(rows) == ["block", "held", "plain", "subclassed"]
    assert [row.path for row in rows["block"].weights] == ["layers/0/kernel"]
    assert [row.path for row in rows["subclassed"].left_in_float] == ["factor"]


class Silent(qi.BaseKerasTrainableQuantizer):
    """Quantizes, and says nothing about it: no twin, so no codes and no scale."""

    def __init__(self, quantization_config):
        kinds = {qi.TrainableQuantizerWeightsConfig: "Weights"}
        target = kinds.get(type(quantization_config), "Activation")
        super().__init__(quantization_config, qi.QuantizationTarget[target], [METHODS.SYMMETRIC])

    def initialize_quantization(self, tensor_shape, name, layer):
        return {"range": layer.add_weight(shape=(), name="range")}

    def __call__(self, inputs):
        return keras.ops.round(inputs)


@qi.mark_quantizer(qi.QuantizationTarget.Weights, [METHODS.SYMMETRIC, METHODS.POWER_OF_TWO])
class SilentInferable(qi.BaseKerasInferableQuantizer):
    def __call__(self, inputs):
        return inputs * 2

    def get_config(self):
        return {}


def test_quantizers_that_say_nothing():
    kernel = np.float32([[1.2, -3.4], [0.3, 2.0]])
    silent = Silent(qi.TrainableQuantizerWeightsConfig(METHODS.SYMMETRIC, 5))
    output = Silent(qi.TrainableQuantizerActivationConfig(METHODS.SYMMETRIC, 6))
    report = quantization_report(dense_with(kernel, silent, output))
    (layer,) = holding(report)
    (row,), (outputs,) = layer.weights, layer.activations
    expected = pytest.approx(sqnr(kernel, np.round(kernel)))
    size = {"bytes_before": 16, "bytes_after": 3}
    unknown = (None,) * 5
    wanted = ("kernel", (2, 2), 5, "SYMMETRIC", *unknown, expected, *size.values())
    assert dataclasses.astuple(row) == wanted
    assert outputs == QuantizedActivation("output_0", 6, "SYMMETRIC", None, "quantized")
    row = kernel_row(kernel, SilentInferable())
    assert (row.num_bits, row.method, row.bytes_after) == (None, None, 16)
    assert row.sqnr_db == pytest.approx(0.0)
    report = quantization_report(dense_with(kernel, SilentInferable()))
    assert report.totals.ratio == 1.0
    line = str(report).splitlines()[3]
    assert " ".join(line.split()) == "dense Dense kernel 2x2 - - - -/- 0.0 dB 16 -> 16"


class Faulty(qi.WeightsSymmetricInferableQuantizer):
    """An inferable quantizer of a user's own, of which one method or property has a bug."""

    fault: tuple[str, Exception] = ("", Exception())

    def _or_fail(self, name, value):
        if name == self.fault[0]:
            raise self.fault[1]
        return value

    def get_config(self):
        return self._or_fail("get_config", super().get_config())

    @property
    def scale(self):
        return self._or_fail("scale", super().scale)

    def quantize_to_codes(self, x):
        return self._or_fail("quantize_to_codes", super().quantize_to_codes(x))

    def __call__(self, inputs):
        return self._or_fail("__call__", super().__call__(inputs))


class FaultyTrained(qi.STEWeightQATQuantizer):
    def convert2inferable(self):
        raise self.error


class FaultyActivation(qi.STEActivationQATQuantizer):
    """Its property `range`, or its conversion, has a bug."""

    fault: tuple[str, Exception]

    @property
    def range(self):
        if self.fault[0] == "range":
            raise self.fault[1]
        return 0.0, 1.0

    def convert2inferable(self):
        if self.fault[0] == "convert2inferable":
            raise self.fault[1]
        return super().convert2inferable()


class OwnError(Exception):
    """One that takes other arguments than a text."""

    def __init__(self, code, place):
        super().__init__(code, place)


BUGS = [
    AttributeError("'NoneType' object has no attribute 'numpy'"),
    KeyError("limit"),
    TypeError("unsupported operand"),
    ValueError("a bad value"),
    OwnError(3, "here"),
]


def surfaces(model, error, role):
    """The report raises the very error of the quantizer, and names it."""
    with pytest.raises(type(error)) as caught:
        quantization_report(model)
    assert caught.value is error
    (note,) = caught.value.__notes__
    assert note.startswith(f"The report asked the quantizer of '{role}' in layer 'dense'.")
    del error.__notes__


@pytest.mark.parametrize("error", BUGS, ids=lambda error: type(error).__name__)
def test_bugs_of_a_users_quantizer_are_not_hidden(error):
    for name in ("get_config", "scale", "quantize_to_codes", "__call__"):
        model = dense_with(KERNEL, Faulty(8, 4.0, per_channel=False))
        model.layers[0].weights_quantizers["kernel"].fault = (name, error)
        surfaces(model, error, "kernel")
    trained = FaultyTrained(qi.TrainableQuantizerWeightsConfig(METHODS.SYMMETRIC))
    trained.error = error
    surfaces(dense_with(KERNEL, trained), error, "kernel")
    config = qi.TrainableQuantizerActivationConfig(METHODS.SYMMETRIC, 6, {"threshold": 1.0})
    for name in ("range", "convert2inferable"):
        output = FaultyActivation(config)
        output.fault = (name, error)
        surfaces(dense_with(KERNEL, weight(), output), error, "output_0")


def test_what_a_users_quantizer_does_not_define_is_unknown():
    undefined = NotImplementedError("nobody knows")
    output = FaultyActivation(
        qi.TrainableQuantizerActivationConfig(METHODS.SYMMETRIC, 6, {"threshold": 1.0})
    )
    output.fault = ("convert2inferable", undefined)
    model = dense_with(KERNEL, Faulty(8, 4.0, per_channel=False), output)
    for name in ("scale", "quantize_to_codes"):
        model.layers[0].weights_quantizers["kernel"].fault = (name, undefined)
        (layer,) = holding(quantization_report(model))
        (row,), (outputs,) = layer.weights, layer.activations
        assert (row.num_bits, row.range) == (8, (4.0, 4.0))
        assert (row.ranges is None, row.codes_used is None) == (name == "scale", True)
        assert outputs == QuantizedActivation("output_0", 6, "SYMMETRIC", None, "quantized")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_reported_without_codes(value):
    kernel = KERNEL.copy()
    kernel[0, 0] = value
    for quantizer in (weight(4), weight(4, "UNIFORM"), weight(4, threshold=[1.0, 2.0, 4.0])):
        row = kernel_row(kernel, quantizer)
        assert (row.num_bits, row.codes_used, row.codes_total) == (4, None, None)


@pytest.mark.parametrize(
    ("config", "ends"),
    [
        ({"threshold": [0.5, 2.0]}, (0.5, 2.0)),
        ({"min_range": [-1.0, -0.5], "max_range": [1.0, 3.0]}, (-1.0, 3.0)),
        ({"min_range": -1.0}, None),
        ({"threshold": "high"}, None),
        ({"threshold": {"a": 1}}, None),
        ({"threshold": []}, None),
    ],
)
def test_what_a_users_config_calls_a_range_may_be_anything(config, ends):
    quantizer = SilentInferable()
    model = dense_with(KERNEL, quantizer)
    model.layers[0].weights_quantizers["kernel"].get_config = lambda: config
    (layer,) = holding(quantization_report(model))
    assert layer.weights[0].range == ends


def test_wrapped_wrapper():
    inner = Wrapper(layers.Dense(3, name="d"), {"kernel": weight(3)})
    model = keras.Sequential([keras.Input((4,)), Wrapper(inner, {"layer/bias": fixed()})])
    report = quantization_report(model)
    assert [(row.path, [w.path for w in row.weights]) for row in holding(report)] == [
        ("d", ["layer/bias"]),
        ("d/d", ["kernel"]),
    ]
    assert report.totals.float_weights == 0


def test_converted_and_reloaded_models(tmp_path):
    """A converted weight has no latent weight any more, hence no ratio to it."""
    model = nested()
    before = model.get_weights()
    report, converted = (
        quantization_report(each) for each in (model, qi.convert_to_inferable(model))
    )
    first, after = holding(report)[0], holding(converted)[0]
    (row,), (same,) = first.weights, after.weights
    assert (first.converted, after.converted) == (False, True)
    assert row.sqnr_db is not None
    assert same == dataclasses.replace(row, sqnr_db=None)
    assert converted.totals == report.totals
    assert after.activations == first.activations
    model.save(tmp_path / "model.keras")
    assert quantization_report(keras.models.load_model(tmp_path / "model.keras")) == report
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_totals():
    totals = quantization_report(nested()).totals
    after = math.ceil(6 * 3 / 8) + 2 * 4 + 2 * 4 + 6 * 4
    assert dataclasses.asdict(totals) == {
        "quantized_weights": 1,
        "quantized_parameters": 6,
        "float_weights": 3,
        "float_parameters": 2 + 4 + 2,
        "quantized_activations": 1,
        "uncalibrated_activations": 0,
        "float_activations": len({"the input", "last"}),
        "bytes_before": 56,
        "bytes_after": after,
        "ratio": 56 / after,
    }


def test_model_without_weights():
    report = quantization_report(keras.Sequential([keras.Input((3,)), layers.ReLU()], name="none"))
    assert (holding(report), report.totals.ratio) == ([], 1.0)
    assert report.totals.float_activations == len(report.layers) == 2


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: layers.Dense(2), TypeError, "received <Dense.*expected a Keras model"),
        (lambda: None, TypeError, "received None"),
        (lambda: keras.Sequential([layers.Dense(2)]), ValueError, "expected a built model"),
        (Subclassed, ValueError, "'subclassed'.*expected a built model"),
    ],
)
def test_what_is_no_built_model_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        quantization_report(make())
