"""The activation quantizer whose range is a moving average, against numpy."""

import numpy as np
import pytest
from keras import ops
from moving_average_cases import (
    BATCHES,
    METHODS,
    M,
    f32,
    grid_of,
    hold,
    holding,
    make,
    moving_ranges,
    quantized,
    state,
)
from reference import dtype_of, gradient, in_every_mode, same, to_numpy


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


def test_an_empty_batch_leaves_the_range_as_it_was():
    quantizer = make(momentum=0.5)
    holder = hold(quantizer)
    empty = f32(BATCHES[0])[:0]
    holder(empty, training=True)
    assert quantizer.range is None
    holder(f32(BATCHES[0]), training=True)
    before = quantizer.range
    assert holder(empty, training=True).shape == empty.shape
    assert quantizer.range == before


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


ZEROS = [[0.0, 0.0], [-0.0, -0.0], [1e-40, -1e-40]]
"""Subnormal numbers count as zero, on every backend."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("x", ZEROS)
@pytest.mark.parametrize("frozen", [False, True])
def test_zeros_alone_have_the_range_to_one_until_there_are_others(method, x, frozen):
    quantizer = make(method)
    holder = hold(quantizer)
    quantizer.quantizer_parameters["frozen"].assign(frozen)
    for _ in range(2):
        same(holder(f32(x), training=True), f32([0.0, 0.0]))
        assert quantizer.range == (0.0, 1.0)
    others = f32([-3.0, 0.0, 0.3, 0.7, 2.0])
    same(holder(others), quantized(others, 0.0, 1.0, method, 8))
    same(holder.convert_to_inferable_quantizers()(others), to_numpy(holder(others)))
    holder(f32([-1.0, 3.0]), training=True)
    assert quantizer.range == (-1.0, 3.0)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_alone_have_the_floor_where_there_is_one(method):
    quantizer = make(method, min_threshold=0.25)
    holder = hold(quantizer)
    holder(f32([0.0]), training=True)
    assert quantizer.range == (0.0, 0.25)
    x = f32([-1.0, 0.1, 0.2, 3.0])
    same(holder(x), quantized(x, 0.0, 0.25, method, 8))
    same(holder.convert_to_inferable_quantizers()(x), to_numpy(holder(x)))


def test_a_range_that_fades_away_is_that_of_zeros():
    """As where an activation dies in training."""
    quantizer = make(momentum=0.25)
    holder = hold(quantizer)
    holder(f32([-1.0, 2.0]), training=True)
    for _ in range(70):
        holder(f32([0.0]), training=True)
        assert quantizer.range is not None
    assert quantizer.range == (0.0, 1.0)
    holder(f32([5.0]), training=True)
    assert quantizer.range == (0.0, 5.0)


def test_a_calibrated_range_of_zeros_is_set_by_training():
    quantizer = make()
    holder = hold(quantizer)
    quantizer.set_range(0.0, 0.0)
    assert (quantizer.range, state(quantizer, "steps")) == ((0.0, 1.0), 0)
    holder(f32([0.0]), training=True)
    assert quantizer.range == (0.0, 1.0)
    holder(f32([-1.0, 3.0]), training=True)
    assert quantizer.range == (-1.0, 3.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("bits", "power"), [(2, -24), (8, -30), (16, -100)])
def test_tiny_activations_are_quantized_as_large_ones(method, bits, power, random):
    """By powers of two everything scales exactly."""
    x, unit = f32(random.normal(size=200)), np.float32(2.0**power)
    upstream = f32(random.normal(size=200))
    quantizer, other = make(method, bits), make(method, bits)
    holder, small = hold(quantizer), hold(other)
    expected = to_numpy(holder(x, training=True)) * unit
    same(small(x * unit, training=True), expected)
    assert other.range == tuple(end * float(unit) for end in quantizer.range)
    same(small(x * unit * 2), to_numpy(holder(x * 2)) * unit)
    same(small.convert_to_inferable_quantizers()(x * unit), expected)
    clipped = gradient(holder, x * 2, upstream)
    same(gradient(small, x * unit * 2, upstream), clipped)


def ends_near_the_smallest(random):
    """Ranges whose steps would be subnormal numbers, or just are not."""
    exponents = random.uniform(-126, -105, size=(40, 2))
    kept = random.choice([0.0, 1.0], p=[0.2, 0.8], size=(40, 2))
    return f32([-1.0, 1.0]) * f32(2.0**exponents * kept)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_no_step_is_subnormal(method, bits, random):
    """Trained and converted, codes and values are the same."""
    quantizer = make(method, bits)
    holder = hold(quantizer)
    for ends in ends_near_the_smallest(random)[:: 1 if bits == 8 else 4]:
        quantizer.set_range(*ends)
        assert quantizer.range is not None
        assert quantizer.scale >= 2.0**-126
        x = f32(random.normal(size=9)) * np.abs(ends).max()
        expected = to_numpy(holder(x))
        same(holder.convert_to_inferable_quantizers()(x), expected)
        same(quantizer.dequantize(quantizer.quantize_to_codes(x)), expected)


@pytest.mark.tensorflow
@pytest.mark.parametrize("method", METHODS)
def test_steps_near_the_smallest_are_the_same_in_every_mode(method, random):
    import tensorflow as tf

    quantizer = make(method, 8)
    holder = hold(quantizer)
    modes = [holder, tf.function(lambda x: holder(x))]
    modes.append(tf.function(lambda x: holder(x), jit_compile=True))
    for ends in ends_near_the_smallest(random):
        quantizer.set_range(*ends)
        x = tf.constant(f32(random.normal(size=9)) * np.abs(ends).max())
        expected = quantizer.dequantize(quantizer.quantize_to_codes(x))
        for mode in modes:
            same(mode(x), expected)


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
