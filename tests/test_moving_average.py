"""The activation quantizer whose range is a moving average, against numpy."""

import json
import math

import keras
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from keras import ops
from reference import (
    MODERATE,
    arrays,
    dtype_of,
    gradient,
    in_every_mode,
    integer_codes,
    integer_values,
    refused,
    same,
    to_numpy,
)

import keras_qwrap as qi
from keras_qwrap.quantizers.moving_average import MovingAverageActivationQATQuantizer
from keras_qwrap.testing import check_quantizer

M = qi.QuantizationMethod
METHODS = [M.UNIFORM, M.SYMMETRIC, M.POWER_OF_TWO]
FLOOR = 2.0**-16
BATCHES = [[0.5, 2.0], [-1.0, 0.25], [3.0, 4.5], [-0.125, -0.5]]


def make(method=M.UNIFORM, bits=8, params=None, momentum=0.9, **options):
    config = qi.TrainableQuantizerActivationConfig(method, bits, params or {}, **options)
    return MovingAverageActivationQATQuantizer(config, momentum)


def hold(quantizer, shape=(None,)):
    holder = qi.KerasActivationQuantizationHolder(quantizer)
    holder.build(shape)
    return holder


def holding(low, high, *args, **kwargs):
    """A holder whose quantizer has a range."""
    quantizer = make(*args, **kwargs)
    holder = hold(quantizer)
    quantizer.set_range(low, high)
    return holder


def state(quantizer, role):
    return to_numpy(quantizer.quantizer_parameters[role]).item()


def f32(numbers):
    return np.asarray(numbers, np.float32)


def moving_ranges(batches, momentum):
    """The range after each batch; float32 as the quantizer is."""
    old, new = np.float32(momentum), np.float32(1 - momentum)
    low, high = np.float32(0), np.float32(0)
    for batch in batches:
        least, most = min(*f32(batch), np.float32(0)), max(*f32(batch), np.float32(0))
        begun = low < 0 or high > 0
        low = old * low + new * least if begun else least
        high = old * high + new * most if begun else most
        yield float(low), float(high)


def grid_of(low, high, method, bits):
    """Scale, zero point, lowest and highest code, of a range that is wide enough."""
    low, high = np.float32(low), np.float32(high)
    if method is M.UNIFORM:
        scale = (high - low) * np.float32(1 / (2**bits - 1))
        return scale, int(np.round(-low / scale)), 0, 2**bits - 1
    signed = low < 0
    lowest, highest = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    scale = high * np.float32(1 / highest)
    if signed:
        scale = max(scale, -low * np.float32(2.0 ** (1 - bits)))
    if method is M.POWER_OF_TWO:
        fraction, exponent = math.frexp(scale)
        scale = np.float32(2.0 ** (exponent if fraction > 0.5 else exponent - 1))
    return scale, 0, lowest, highest


def quantized(x, low, high, method, bits):
    scale, zero_point, lowest, highest = grid_of(low, high, method, bits)
    codes = integer_codes(x, scale, zero_point, lowest, highest)
    return integer_values(codes, scale, zero_point)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_the_range_follows_the_batches(momentum):
    quantizer = make(momentum=momentum)
    holder = hold(quantizer)
    for i, (batch, expected) in enumerate(
        zip(BATCHES, moving_ranges(BATCHES, momentum), strict=True)
    ):
        holder(f32(batch), training=True)
        assert quantizer.range == expected
        assert state(quantizer, "steps") == i + 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("ends", [(-1.3, 2.7), (0.0, 2.9), (-2.3, 0.0), (-3.1, 0.2), (-8.0, 7.9)])
def test_inference_uses_the_stored_range(method, bits, ends, random):
    holder = holding(*ends, method, bits)
    x = f32(random.normal(size=500) * 3)
    for training in (False, None):
        same(holder(x, training=training), quantized(x, *ends, method, bits))
    assert holder.activation_holder_quantizer.range == tuple(float(np.float32(e)) for e in ends)
    assert state(holder.activation_holder_quantizer, "steps") == 0


@pytest.mark.parametrize("method", METHODS)
def test_training_quantizes_by_the_new_range(method):
    holder = hold(make(method, 3))
    for batch, ends in zip(BATCHES, moving_ranges(BATCHES, 0.9), strict=True):
        same(holder(f32(batch), training=True), quantized(batch, *ends, method, 3))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ends", [(-1.0, 0.3), (-0.3, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("bits", [2, 8])
def test_nothing_in_the_range_is_clipped(method, ends, bits):
    """An end moves by at most half a step."""
    holder = holding(*ends, method, bits)
    step = holder.activation_holder_quantizer.scale
    assert np.all(np.abs(to_numpy(holder(f32(ends))) - f32(ends)) <= step * 0.5000001)


@pytest.mark.parametrize("training", [False, None])
def test_without_a_range_inference_changes_nothing(training):
    quantizer = make(bits=2)
    holder = hold(quantizer)
    x = f32([-3.3, 0.1, 1e30, np.nan, np.inf, 1e-30])
    same(holder(x, training=training), x)
    assert quantizer.range is None
    upstream = f32([1, 2, 3, 4, 5, 6])
    dx = gradient(lambda x: holder(x, training=training), f32([-3, 0, 1, 2, 3, 1e30]), upstream)
    same(dx, upstream)


def test_delay_passes_the_first_training_calls_and_moves_the_range_all_the_same():
    quantizer = make(bits=2)
    holder = hold(quantizer)
    quantizer.quantizer_parameters["delay"].assign(2)
    expected = list(moving_ranges(BATCHES, 0.9))
    for batch, ends in zip(BATCHES[:2], expected, strict=False):
        same(holder(f32(batch), training=True), f32(batch))
        assert quantizer.range == ends
        same(holder(f32(batch)), quantized(batch, *ends, M.UNIFORM, 2))
    same(holder(f32(BATCHES[2]), training=True), quantized(BATCHES[2], *expected[2], M.UNIFORM, 2))


def test_the_gradient_passes_whole_during_the_delay():
    quantizer = make(bits=2)
    holder = hold(quantizer)
    quantizer.quantizer_parameters["delay"].assign(1)
    quantizer.quantizer_parameters["frozen"].assign(True)
    quantizer.set_range(-1.0, 1.0)
    x, upstream = f32([-9.0, 0.2, 9.0]), f32([1.0, 2.0, 3.0])
    same(gradient(lambda x: holder(x, training=True), x, upstream), upstream)
    same(gradient(lambda x: holder(x, training=True), x, upstream), f32([0.0, 2.0, 0.0]))


def test_a_frozen_range_stays():
    quantizer = make()
    holder = hold(quantizer)
    quantizer.quantizer_parameters["frozen"].assign(True)
    holder(f32([-1.0, 2.0]), training=True)
    assert quantizer.range == (-1.0, 2.0), "the first batch sets a range that is not there yet"
    same(holder(f32([7.7]), training=True), quantized([7.7], -1.0, 2.0, M.UNIFORM, 8))
    assert quantizer.range == (-1.0, 2.0)
    assert state(quantizer, "steps") == 2
    quantizer.quantizer_parameters["frozen"].assign(False)
    holder(f32([-9.0, 9.0]), training=True)
    assert quantizer.range[0] < -1.0


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, 1e38, -1e38])
@pytest.mark.parametrize("others", [[0.5, 5.0, 7.0], [-5.0, -0.5, -7.0], [-1.0, 9.0, 3.0]])
def test_a_batch_that_is_not_finite_leaves_the_range(bad, others):
    for place in range(4):
        batch = np.insert(f32(others), place, np.copysign(np.float32(bad), bad))
        holder = holding(-1.0, 2.0)
        holder(batch, training=True)
        quantizer = holder.activation_holder_quantizer
        assert quantizer.range == (-1.0, 2.0)
        assert state(quantizer, "steps") == 1


def test_a_first_batch_of_nan_sets_no_range():
    quantizer = make()
    holder = hold(quantizer)
    same(holder(f32([np.nan, np.nan]), training=True), f32([np.nan, np.nan]))
    assert quantizer.range is None
    holder(f32([1.0, 3.0]), training=True)
    assert quantizer.range == (0.0, 3.0)


@pytest.mark.parametrize("x", [[0.0, 0.0], [-0.0, -0.0], [1e-40, -1e-40]])
def test_a_batch_of_zeros_sets_no_range(x):
    """Subnormal numbers count as zero, on every backend."""
    quantizer = make(M.SYMMETRIC)
    holder = hold(quantizer)
    same(holder(f32(x), training=True), f32(x))
    assert quantizer.range is None
    holder(f32([-1.0, 3.0]), training=True)
    assert quantizer.range == (-1.0, 3.0)


@pytest.mark.parametrize("method", METHODS)
def test_a_narrow_range_is_widened_to_min_threshold(method):
    holder = hold(make(method, 8, min_threshold=0.5))
    holder(f32([0.0, 1e-3]), training=True)
    x = f32([0.0, 0.1, 0.3, 9.0])
    same(
        holder(x),
        quantized(x, 0.0, 0.5 * 255 / 256, method, 8)
        if method is not M.UNIFORM
        else quantized(x, 0.0, 0.5, method, 8),
    )
    same(holder.convert_to_inferable_quantizers()(x), to_numpy(holder(x)))


def test_set_range():
    quantizer = make(min_threshold=0.5)
    hold(quantizer)
    for given_range, expected in {
        (-1.0, 2.0): (-1.0, 2.0),
        (1.0, 2.0): (0.0, 2.0),
        (-3, -2): (-3.0, 0.0),
        (0.0, 0.0): (0.0, 0.5),
        (-0.25, 0.125): (-0.25, 0.25),
    }.items():
        quantizer.set_range(*given_range)
        assert quantizer.range == expected
    assert state(quantizer, "steps") == 0


@pytest.mark.parametrize("method", METHODS)
def test_an_initial_range_in_the_config(method):
    quantizer = make(method, 4, {"range_min": -0.7, "range_max": 1.9}, momentum=0.5)
    holder = hold(quantizer)
    x = f32([-5.0, -0.3, 0.2, 5.0])
    same(holder(x), quantized(x, -0.7, 1.9, method, 4))
    holder(f32([-1.7, 0.1]), training=True)
    half = np.float32(0.5)
    expected = (
        half * np.float32(-0.7) + half * np.float32(-1.7),
        half * np.float32(1.9) + half * (np.float32(0.1)),
    )
    assert quantizer.range == tuple(float(end) for end in expected)


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


@pytest.mark.tensorflow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1000, 2**17])
def test_eager_graph_and_xla_agree(method, size, random):
    """The larger tensor is large enough for the fused kernel."""
    holder = holding(-1.3, 2.7, method, 8)
    converted = holder.convert_to_inferable_quantizers()
    x = f32(random.normal(size=size))
    expected = quantized(x, -1.3, 2.7, method, 8)
    for layer in (holder, converted):
        for output in in_every_mode(layer, x):
            same(output, expected)


@pytest.mark.tensorflow
def test_training_in_graphs_moves_the_range():
    import tensorflow as tf

    for compiled in (False, True):
        quantizer = make(bits=4, momentum=0.5)
        holder = hold(quantizer)
        step = tf.function(lambda x, h=holder: h(x, training=True), jit_compile=compiled)
        for batch, ends in zip(BATCHES, moving_ranges(BATCHES, 0.5), strict=True):
            same(step(tf.constant(f32(batch))), quantized(batch, *ends, M.UNIFORM, 4))
            assert quantizer.range == ends, "momenta of one half are exact in every mode"


@pytest.mark.tensorflow
@pytest.mark.parametrize("size", [1000, 2**17])
def test_the_gradient_in_graphs_masks_what_is_clipped(size, random):
    import tensorflow as tf

    holder = holding(-1.0, 1.0, M.SYMMETRIC, 4)
    x, upstream = f32(random.normal(size=size)), f32(random.normal(size=size))
    expected = gradient(holder, x, upstream)
    same(gradient(tf.function(lambda x: holder(x)), x, upstream), expected)
    assert 0 < np.count_nonzero(expected) < size


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_is_zero_where_values_are_clipped(method, training, random):
    holder = holding(-1.0, 0.7, method, 3)
    holder.activation_holder_quantizer.quantizer_parameters["frozen"].assign(True)
    x, upstream = f32(random.normal(size=400)) * 2, f32(random.normal(size=400))
    scale, zero_point, lowest, highest = grid_of(-1.0, 0.7, method, 3)
    steps = x.astype(np.float64) / np.float64(scale) + zero_point
    inside = (steps >= lowest - 0.5) & (steps <= highest + 0.5)
    assert 0 < inside.sum() < 400
    dx = gradient(lambda x: holder(x, training=training), x, upstream)
    same(dx, np.where(inside, upstream, np.float32(0)))


def test_a_stateless_call_returns_the_new_state():
    quantizer = make()
    holder = hold(quantizer)
    before = [variable.value for variable in holder.non_trainable_variables]
    y, after = holder.stateless_call([], before, f32([-1.0, 3.0]), training=True)
    same(y, quantized([-1.0, 3.0], -1.0, 3.0, M.UNIFORM, 8))
    assert [to_numpy(value).item() for value in after] == [-1.0, 3.0, 1, 0, False]
    assert quantizer.range is None


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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_inputs(dtype):
    quantizer = make(bits=4)
    holder = hold(quantizer)
    x = ops.cast(ops.convert_to_tensor([-1.0, 0.3, 2.0]), dtype)
    y = holder(x, training=True)
    assert dtype_of(y) == dtype
    assert quantizer.range == (-1.0, 2.0)
    exact = quantized(to_numpy(ops.cast(x, "float32")), -1.0, 2.0, M.UNIFORM, 4)
    same(ops.cast(y, "float32"), to_numpy(ops.cast(ops.cast(exact, dtype), "float32")))


@pytest.mark.parametrize("method", METHODS)
def test_contract(method, random):
    params = {"range_min": -1.1, "range_max": 1.7}
    check_quantizer(make(method, 4, params), random.normal(size=(2, 3, 4)))


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
