"""Moving averages converted, saved and described by a config, and what they refuse."""

import json

import keras
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from moving_average_cases import FLOOR, METHODS, M, f32, hold, holding, make, moving_ranges, state
from reference import MODERATE, arrays, dtype_of, refused, same, to_numpy

import keras_qwrap as qi
from keras_qwrap.quantizers.moving_average import MovingAverageActivationQATQuantizer

ENDS = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=15)
@given(
    st.sampled_from(METHODS),
    st.integers(2, 16),
    ENDS,
    ENDS,
    arrays(MODERATE, [(16,)]),
)
@example(M.UNIFORM, 8, 1e-6, 2e-6, f32(np.linspace(-1, 1, 16)))
@example(M.SYMMETRIC, 8, -1e-40, 1.0, f32(np.linspace(-1, 1, 16)))
@example(M.POWER_OF_TWO, 2, -0.5, 0.25, f32(np.linspace(-1, 1, 16)))
def test_the_converted_quantizer_gives_the_same_outputs(method, bits, a, b, x):
    low, high = min(a, b), max(a, b)
    assume(high > 0 or low < 0)
    quantizer = make(method, bits, momentum=0.7)
    holder = hold(quantizer)
    holder(f32([low, high]), training=True)
    holder(f32([high / 3, high]), training=True)
    assume(quantizer.range is not None)
    expected = to_numpy(holder(x))
    converted = holder.convert_to_inferable_quantizers()
    same(converted(x), expected)
    config = json.loads(json.dumps(converted.get_config()))
    reloaded = type(converted).from_config(config)
    reloaded.build((16,))
    same(reloaded(x), expected)
    same(quantizer.dequantize(quantizer.quantize_to_codes(x)), expected)
    assert quantizer.num_bits == bits


def trained_model(method):
    config = qi.TrainableQuantizerWeightsConfig(M.SYMMETRIC, 4)
    wrapper = qi.KerasQuantizationWrapper(
        keras.layers.Dense(3),
        {"kernel": qi.STEWeightQATQuantizer(config)},
        make(method, 4, momentum=0.75),
    )
    holder = qi.KerasActivationQuantizationHolder(make(method, 5, momentum=0.5))
    model = keras.Sequential([keras.Input((4,)), holder, wrapper])
    model.compile(keras.optimizers.Adam(0.01), keras.losses.MeanSquaredError())
    return model


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_trained_converted_and_reloaded_models_are_equal(method, random, tmp_path):
    model = trained_model(method)
    x = f32(random.normal(size=(20, 4)))
    model.fit(x, x[:, :3], batch_size=6, epochs=2, verbose=0, shuffle=False)
    holder, wrapper = model.layers
    assert state(holder.activation_holder_quantizer, "steps") == 8
    assert state(wrapper.activation_quantizers[0], "steps") == 8
    *_, ends = moving_ranges([x[i : i + 6].ravel() for i in (0, 6, 12, 18)] * 2, 0.5)
    np.testing.assert_allclose(holder.activation_holder_quantizer.range, ends, rtol=1e-6)
    expected = model.predict(x, verbose=0)
    assert len(np.unique(expected)) <= 16
    converted = qi.convert_to_inferable(model)
    same(converted.predict(x, verbose=0), expected)
    expected = to_numpy(model(x))
    same(converted(x), expected)
    for source in (model, converted):
        for suffix in ("keras", "h5"):
            path = tmp_path / f"model.{suffix}"
            source.save(path)
            reloaded = keras.models.load_model(path, compile=False)
            same(reloaded(x), expected)
            for old, new in zip(source.variables, reloaded.variables, strict=True):
                same(new.value, to_numpy(old))


def test_variables():
    holder = hold(make())
    assert [
        (v.name, dtype_of(v), v.trainable, v.aggregation, tuple(v.shape)) for v in holder.variables
    ] == [
        ("output_0_min_range", "float32", False, "mean", ()),
        ("output_0_max_range", "float32", False, "mean", ()),
        ("output_0_steps", "int32", False, "only_first_replica", ()),
        ("output_0_delay", "int32", False, "only_first_replica", ()),
        ("output_0_frozen", "bool", False, "only_first_replica", ()),
    ]


def test_config():
    params = {"range_min": -1.0, "range_max": 2.0}
    quantizer = make(M.SYMMETRIC, 5, params, momentum=0.25, min_threshold=0.125)
    again = MovingAverageActivationQATQuantizer.from_config(
        json.loads(json.dumps(quantizer.get_config()))
    )
    assert again.get_config() == quantizer.get_config()
    assert again.momentum == 0.25
    assert again.quantization_config == quantizer.quantization_config
    assert type(np.float32(0.5).item()) is type(make(momentum=np.float32(0.5)).momentum)
    config = qi.TrainableQuantizerActivationConfig(M.UNIFORM)
    assert MovingAverageActivationQATQuantizer(config).momentum == 0.99


@pytest.mark.parametrize("momentum", [1.0, -0.1, 1.5, float("nan")])
def test_momentum_out_of_bounds(momentum):
    refused(ValueError, lambda: make(momentum=momentum), "momentum", "from 0 to below 1")


@pytest.mark.parametrize("momentum", ["0.9", None, True])
def test_momentum_of_another_type(momentum):
    refused(TypeError, lambda: make(momentum=momentum), "momentum", "from 0 to below 1")


@pytest.mark.parametrize(
    ("params", "error", "fragment"),
    [
        ({"range_min": -1.0}, ValueError, "range_max"),
        ({"range_max": 1.0}, ValueError, "range_min"),
        ({"threshold": 1.0}, ValueError, "threshold"),
        ({"range_min": -1.0, "range_max": 1.0, "x": 1}, ValueError, "'x'"),
        ({"range_min": 1.0, "range_max": 1.0}, ValueError, "min_range"),
        ({"range_min": 2.0, "range_max": 1.0}, ValueError, "min_range"),
        ({"range_min": 0.0, "range_max": FLOOR / 2}, ValueError, "min_threshold"),
        ({"range_min": [-1.0, -2.0], "range_max": [1.0, 2.0]}, ValueError, "one number"),
        ({"range_min": -1.0, "range_max": "one"}, TypeError, "max_range"),
        ({"range_min": -1.0, "range_max": float("nan")}, ValueError, "max_range"),
        ({"range_min": -1.0, "range_max": 1e38}, ValueError, "2**125"),
    ],
)
def test_params_that_are_refused(params, error, fragment):
    refused(error, lambda: make(params=params), fragment)


def test_configs_of_another_kind():
    weights = qi.TrainableQuantizerWeightsConfig(M.UNIFORM)
    refused(TypeError, lambda: MovingAverageActivationQATQuantizer(weights), "Activation")
    refused(ValueError, lambda: make(M.LUT_POT_QUANTIZER), "LUT_POT_QUANTIZER", "UNIFORM")


@pytest.mark.parametrize(
    ("ends", "error", "fragment"),
    [
        ((1.0, -1.0), ValueError, "low"),
        ((float("nan"), 1.0), ValueError, "low"),
        ((0.0, float("inf")), ValueError, "high"),
        ((-1e38, 0.0), ValueError, "2**125"),
        (("-1.0", 1.0), TypeError, "low"),
        (([-1.0, -2.0], 1.0), ValueError, "one number"),
    ],
)
def test_set_range_refuses(ends, error, fragment):
    holder = holding(-1.0, 2.0)
    quantizer = holder.activation_holder_quantizer
    refused(error, lambda: quantizer.set_range(*ends), "set_range", fragment)
    assert quantizer.range == (-1.0, 2.0)


def test_what_needs_variables_or_a_range():
    unbuilt = make()
    for action in (
        lambda: unbuilt(f32([1.0])),
        lambda: unbuilt.range,
        lambda: unbuilt.set_range(0.0, 1.0),
        unbuilt.convert2inferable,
    ):
        refused(ValueError, action, "built")
    quantizer = make()
    holder = hold(quantizer)
    refused(ValueError, quantizer.convert2inferable, "not calibrated", "set_range")
    refused(ValueError, holder.convert_to_inferable_quantizers, "not calibrated")
    refused(TypeError, lambda: quantizer(np.int32([1])), "float")


def test_a_disabled_one_passes_everything():
    quantizer = make(enable_activation_quantization=False)
    holder = hold(quantizer)
    x = f32([-9.3, 2.2])
    same(holder(x, training=True), x)
    assert not holder.variables
