"""Ranges taken from a weight: exact against numpy, in every mode, and the same after converting."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from keras import ops
from reference import (
    FEWER,
    arrays,
    gradient,
    in_every_mode,
    integer_codes,
    integer_values,
    same,
    to_numpy,
)

import keras_qwrap as qi
from keras_qwrap.numerics import ranges
from keras_qwrap.numerics.channels import Channels
from keras_qwrap.testing import _host, _hosted_quantizer

SYMMETRIC, POT, UNIFORM = (
    qi.QuantizationMethod[name] for name in ("SYMMETRIC", "POWER_OF_TWO", "UNIFORM")
)
FLOOR = 2.0**-16
BITS = st.integers(2, 16)
WEIGHTS = arrays(st.floats(-1e4, 1e4, width=32, allow_subnormal=False))
SMALLEST = 2.0**-126


def hosted(method, bits, weight, axis=-1, per_channel=True, **params):
    """A straight-through quantizer in a built wrapper around one weight."""
    config = qi.TrainableQuantizerWeightsConfig(
        method,
        bits,
        weights_channels_axis=axis,
        weights_per_channel_threshold=per_channel,
        **params,
    )
    cls = qi.STEUniformWeightQATQuantizer if method is UNIFORM else qi.STEWeightQATQuantizer
    layer = _host(cls(config), np.float32(weight))
    return _hosted_quantizer(layer), layer


def largest(weight, kept):
    reduced = tuple(axis for axis in range(weight.ndim) if axis not in kept)
    return np.max(np.abs(weight), axis=reduced, keepdims=True)


def symmetric_step(weight, kept, bits):
    """Its floor is 2**-126; a channel of zeros has the threshold 1."""
    top = largest(weight, kept)
    step = np.maximum(top * np.float32(1 / (2 ** (bits - 1) - 1)), np.float32(SMALLEST))
    return np.where(top < SMALLEST, np.float32(2.0 ** (1 - bits)), step)


@FEWER
@given(WEIGHTS, BITS, st.data())
def test_symmetric_step_and_codes(weight, bits, data):
    """`max|w| * float32(1 / (2**(b-1) - 1))`, the narrow grid, whose last code is reached."""
    axes = st.sets(st.integers(0, weight.ndim - 1), min_size=1)
    kept = tuple(sorted(data.draw(axes)))
    quantizer, layer = hosted(SYMMETRIC, bits, weight, kept)
    step = symmetric_step(weight, kept, bits)
    same(quantizer.scale, step)
    last = 2 ** (bits - 1) - 1
    codes = integer_codes(weight, step, 0, -last, last)
    same(quantizer(weight), integer_values(codes, step, 0))
    codes_given = layer.get_codes()["weight"][0]
    np.testing.assert_array_equal(codes_given, codes)
    reached = largest(codes, kept)[largest(weight, kept) * np.float32(1 / last) >= SMALLEST]
    assert np.all(reached == last)


def power_of_two_at_least(number):
    """By exponent and mantissa, where the package compares with a table."""
    mantissa, exponent = np.frexp(np.float64(number))
    return np.float32(np.ldexp(1.0, exponent - (mantissa == 0.5)))


@FEWER
@given(WEIGHTS, BITS)
def test_power_of_two_step(weight, bits):
    quantizer, _ = hosted(POT, bits, weight)
    step = power_of_two_at_least(symmetric_step(weight, (weight.ndim - 1,), bits))
    same(quantizer.scale, step.astype(np.float32))
    codes = integer_codes(weight, step, 0, -(2**30), 2**30)
    same(quantizer(weight), integer_values(codes, step, 0))
    assert np.abs(codes).max() <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", range(2, 17))
def test_power_of_two_is_found_exactly_next_to_powers_of_two(bits):
    """The largest magnitude whose step is a power of two, and its two float32 neighbours."""
    last = 2 ** (bits - 1) - 1
    for exponent in (-20, -1, 0, 7, 90):
        at = np.float32(last * 2.0**exponent)
        around = np.float32([np.nextafter(at, np.float32(0)), at, np.nextafter(at, np.inf)])
        steps = around * np.float32(1 / last)
        found = [
            to_numpy(ranges.power_of_two_threshold(ops.array([top]), (0,), bits, FLOOR / 2**9))
            for top in around
        ]
        for step, threshold in zip(steps, found, strict=True):
            wanted = power_of_two_at_least(step) * 2.0 ** (bits - 1)
            same(threshold, np.float32([wanted]))


@FEWER
@given(WEIGHTS, BITS, st.data())
def test_uniform_step_zero_point_and_codes(weight, bits, data):
    """From the smallest to the largest weight, zero included; clipped by half a step at most."""
    kept = (data.draw(st.integers(0, weight.ndim - 1)),)
    reduced = tuple(axis for axis in range(weight.ndim) if axis not in kept)
    low = np.minimum(weight.min(axis=reduced, keepdims=True), np.float32(0))
    high = np.maximum(weight.max(axis=reduced, keepdims=True), np.float32(0))
    high = np.where(high == low, np.float32(1), high)
    assume(np.all(high - low >= 2.0 ** (bits - 126)))
    step = (high - low) * np.float32(1 / (2**bits - 1))
    zero_point = np.rint(-low / step).astype(np.int32)
    quantizer, layer = hosted(UNIFORM, bits, weight, kept[0])
    same(quantizer.scale, step)
    same(quantizer.zero_point, zero_point)
    codes = integer_codes(weight, step, zero_point, 0, 2**bits - 1)
    expected = integer_values(codes, step, zero_point)
    same(quantizer(weight), expected)
    np.testing.assert_array_equal(layer.get_codes()["weight"][0], codes)
    error = np.abs(np.float64(expected) - weight)
    assert np.all(error <= np.float64(step) * 1.02), (error / step).max()


@pytest.mark.parametrize(("method", "bits"), [(SYMMETRIC, 8), (POT, 4), (UNIFORM, 2)])
def test_per_tensor_takes_one_range_for_all(method, bits, random):
    weight = random.normal(size=(3, 4)).astype("float32") * np.float32([1, 2, 3, 4])
    alone, _ = hosted(method, bits, weight, per_channel=False)
    flat, _ = hosted(method, bits, weight.reshape(-1, 1))
    assert alone.scale.shape == ()
    same(alone.scale, flat.scale.reshape(()))
    same(alone(weight), to_numpy(flat(weight.reshape(-1, 1))).reshape(3, 4))


@pytest.mark.parametrize(("method", "bits"), [(SYMMETRIC, 8), (POT, 16), (UNIFORM, 4)])
@pytest.mark.parametrize("floor", [FLOOR, 0.5, 2.0**-110])
def test_min_threshold_is_a_floor_under_the_range(method, bits, floor):
    """An all-zero channel keeps a usable step; one above the floor is not touched."""
    weight = np.float32([[0, floor / 4, 3], [0, -floor / 8, -2]])
    quantizer, _ = hosted(method, bits, weight, min_threshold=floor)
    width = 2**bits - 1 if method is UNIFORM else 2 ** (bits - 1) - 1
    least = np.float32(floor) * np.float32(1 / width)
    scale = quantizer.scale[0]
    assert scale[0] == (power_of_two_at_least(least) if method is POT else least)
    assert scale[2] >= (5 if method is UNIFORM else 3) / width * 0.999
    y = to_numpy(quantizer(weight))
    assert np.all(np.isfinite(y))
    assert np.all(y[:, 0] == 0)
    assert np.all(np.abs(y - weight) <= scale * 1.001)


@pytest.mark.parametrize(("bits", "power"), [(2, -24), (8, -30), (16, -100)])
@pytest.mark.parametrize("method", [SYMMETRIC, POT, UNIFORM])
@pytest.mark.parametrize("per_channel", [True, False])
def test_tiny_weights_are_quantized_as_large_ones(method, bits, per_channel, power, random):
    """By powers of two everything scales exactly; also where one channel alone is tiny."""
    weight, unit = random.normal(size=(6, 4)).astype("float32"), np.float32(2.0**power)
    quantizer, layer = hosted(method, bits, weight, per_channel=per_channel)
    expected, codes = to_numpy(quantizer(weight)), layer.get_codes()["weight"][0]
    units = np.float32([unit, 1, unit, 1]) if per_channel else unit
    small, layer = hosted(method, bits, weight * units, per_channel=per_channel)
    same(small(weight * units), expected * units)
    same(small.convert2inferable()(weight * units), expected * units)
    np.testing.assert_array_equal(layer.get_codes()["weight"][0], codes)
    upstream = random.normal(size=(6, 4)).astype("float32")
    same(gradient(small, weight * units, upstream), upstream)


@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize("method", [SYMMETRIC, POT, UNIFORM])
def test_a_channel_of_zeros_has_the_threshold_one(method, bits):
    """As it has where its numbers are subnormal."""
    weight = np.float32([[0, 1e-40, 2], [-0.0, -1e-40, -1]])
    quantizer, layer = hosted(method, bits, weight)
    config = quantizer.convert2inferable().get_config()
    if method is UNIFORM:
        assert (config["min_range"][:2], config["max_range"][:2]) == ([0, 0], [1, 1])
    else:
        assert config["threshold"][:2] == [1, 1]
    assert np.all(to_numpy(quantizer(weight))[:, :2] == 0)
    assert np.all(layer.get_codes()["weight"][0][:, :2] == 0)


def near_the_smallest(random):
    """Weights whose steps would be subnormal numbers, or just are not; zeros among them."""
    weight = 2.0 ** random.uniform(-128, -105, size=300) * random.uniform(-1, 1, size=(4, 300))
    return np.float32(weight * (random.random((4, 300)) < 0.7))


@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize("method", [SYMMETRIC, POT, UNIFORM])
def test_no_step_is_subnormal(method, bits, random):
    weight = near_the_smallest(random)
    quantizer, layer = hosted(method, bits, weight)
    expected = to_numpy(quantizer(weight))
    assert np.all(quantizer.scale >= SMALLEST)
    assert np.any(quantizer.scale < SMALLEST * 2.5)
    same(quantizer.convert2inferable()(weight), expected)
    codes, scale, zero_point = layer.get_codes()["weight"]
    same(integer_values(codes, scale, zero_point), expected)


@pytest.mark.tensorflow
@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize("method", [SYMMETRIC, POT, UNIFORM])
def test_steps_near_the_smallest_are_the_same_in_every_mode(method, bits, random):
    weight = near_the_smallest(random)
    quantizer, _ = hosted(method, bits, weight)
    eager, graph, xla = in_every_mode(quantizer, weight)
    same(graph, eager)
    same(xla, eager)


@pytest.mark.parametrize(("method", "bits"), [(SYMMETRIC, 8), (POT, 4), (UNIFORM, 8)])
def test_gradient_is_upstream_itself(method, bits, random):
    """No part of it goes through the range, which depends on the weight as well."""
    weight = random.normal(size=(4, 3)).astype("float32")
    upstream = random.normal(size=(4, 3)).astype("float32")
    quantizer, _ = hosted(method, bits, weight)
    same(gradient(quantizer, weight, upstream), upstream)


@pytest.mark.parametrize(("method", "bits"), [(SYMMETRIC, 8), (POT, 4), (UNIFORM, 8)])
@pytest.mark.parametrize("axis", [-1, 0, (0, 2), None])
def test_converting_changes_no_bit(method, bits, axis, random):
    weight = random.normal(size=(3, 5, 4)).astype("float32")
    quantizer, _ = hosted(method, bits, weight, -1 if axis is None else axis, axis is not None)
    twin = quantizer.convert2inferable()
    same(twin(weight), to_numpy(quantizer(weight)))
    again = type(twin).from_config(twin.get_config())
    same(again(weight), to_numpy(quantizer(weight)))


@pytest.mark.tensorflow
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_every_mode_finds_the_same_range(bits, random):
    """4,000 channels, the first ones with ranges next to powers of two."""
    weight = random.normal(size=(3, 4000)).astype("float32") * 0.1
    near = np.float32(2.0 ** random.integers(-9, 9, size=999) * (2 ** (bits - 1) - 1))
    weight[0, :999] = np.nextafter(near, random.choice(np.float32([0, np.inf]), size=999))

    def symmetric(w):
        return ranges.symmetric_threshold(w, (0,), bits, FLOOR)

    def power_of_two(w):
        return ranges.power_of_two_threshold(w, (0,), bits, FLOOR)

    def uniform(w):
        low, high = ranges.uniform_range(w, (0,), bits, FLOOR)
        scale, zero_point = ranges.uniform_scale_and_zero_point(low, high, bits, ops)
        return ops.concatenate([low, high, scale, zero_point])

    for function in (symmetric, power_of_two, uniform):
        eager, graph, xla = in_every_mode(function, weight)
        same(graph, eager)
        same(xla, eager)
    step = symmetric_step(weight, (1,), bits)
    same(symmetric(weight), step * np.float32(2.0 ** (bits - 1)))
    wanted = power_of_two_at_least(step) * np.float32(2.0 ** (bits - 1))
    same(power_of_two(weight), wanted.astype(np.float32))


@pytest.mark.tensorflow
@pytest.mark.parametrize(("method", "bits"), [(SYMMETRIC, 8), (POT, 4), (UNIFORM, 8)])
def test_every_mode_gives_the_same_bits(method, bits, random):
    """Range, division and multiplication in one graph."""
    weight = random.normal(size=(300, 64)).astype("float32")
    quantizer, _ = hosted(method, bits, weight)
    eager, graph, xla = in_every_mode(quantizer, weight)
    same(graph, eager)
    same(xla, eager)


@given(st.floats(-1e3, 0, width=32), st.floats(2.0**-9, 1e3, width=32), BITS)
def test_numpy_and_keras_give_the_same_scale_and_zero_point(low, high, bits):
    low, high = np.float32([low]), np.float32([high])
    by_numpy = ranges.uniform_scale_and_zero_point(low, high, bits, np)
    by_keras = ranges.uniform_scale_and_zero_point(ops.array(low), ops.array(high), bits, ops)
    for a, b in zip(by_numpy, by_keras, strict=True):
        same(b, a)


@pytest.mark.parametrize("method", [SYMMETRIC, POT, UNIFORM])
@pytest.mark.parametrize("top", [2.0**126, 1e38, 1e-38])
def test_huge_and_tiny_weights(method, top):
    """Ranges up to 2**126 are finite, and a subnormal weight is floored like a zero."""
    weight = np.float32([[top, 1.0], [-top / 4, 0.5]])
    quantizer, _ = hosted(method, 8, weight)
    y = to_numpy(quantizer(weight))
    assert np.all(np.isfinite(y)), y
    same(quantizer.convert2inferable()(weight), y)


def test_largest_magnitude_is_kept_per_channel(random):
    weight = random.normal(size=(2, 3, 4)).astype("float32")
    for kept in ((0,), (1, 2), (0, 1, 2)):
        reduced = Channels(kept, 3).reduced
        same(ranges.largest_magnitude(ops.array(weight), reduced), largest(weight, kept))
    for_all = ops.reshape(ranges.largest_magnitude(ops.array(weight), None), ())
    same(for_all, np.abs(weight).max(keepdims=True).reshape(()))
