"""The inferable quantizers: on the grid for any tensor, their ranges, arguments and configs."""

import json

import keras
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from keras import ops
from reference import (
    FEWER,
    MODERATE,
    arrays,
    dtype_of,
    gradient,
    integer_codes,
    integer_values,
    nearest_index,
    refused,
    same,
    to_numpy,
)

import keras_qwrap as qi

THRESHOLDS = st.floats(2.0**-20, 2.0**20, width=32)
WEIGHTS = [qi.WeightsSymmetricInferableQuantizer, qi.WeightsUniformInferableQuantizer]


@st.composite
def integer_quantizers(draw, shape):
    """Any integer quantizer for tensors of a shape, per tensor or along any axes."""
    bits, rank = draw(st.integers(2, 16)), len(shape)
    kept = tuple(sorted(draw(st.sets(st.integers(0, rank - 1)))))
    channels = {"per_channel": bool(kept)}
    if kept:
        channels |= {"channel_axis": kept if len(kept) > 1 else kept[0] - rank, "input_rank": rank}
    count = [shape[axis] for axis in kept]
    first, second = (
        np.reshape(draw(st.lists(THRESHOLDS, min_size=n, max_size=n)), count)
        for n in [int(np.prod(count))] * 2
    )
    kind = draw(st.sampled_from(["symmetric", "narrow", "pot", "unsigned", "uniform"]))
    if kind == "unsigned":
        return qi.ActivationSymmetricInferableQuantizer(bits, float(first.ravel()[0]), False)
    if kind == "uniform":
        sign = draw(st.sampled_from([-1, 0, 1]))
        return qi.WeightsUniformInferableQuantizer(
            bits, sign * first, sign * first + second, **channels
        )
    if kind == "pot":
        return qi.WeightsPOTInferableQuantizer(bits, 2.0 ** np.round(np.log2(first)), **channels)
    return qi.WeightsSymmetricInferableQuantizer(bits, first, narrow=kind == "narrow", **channels)


@FEWER
@given(arrays(), st.data())
def test_every_output_is_the_value_of_a_code(x, data):
    """For NaN, infinities, subnormal and huge numbers, any width, axes and kind of grid."""
    try:
        quantizer = data.draw(integer_quantizers(x.shape))
    except ValueError as error:
        assume("numbers below max_range" not in str(error))
        raise
    scale, zero_point = quantizer.scale, quantizer.zero_point
    assert (scale.dtype, zero_point.dtype) == (np.float32, np.int32)
    low, high = quantizer._grid.lowest, quantizer._grid.highest
    codes = integer_codes(x, scale, zero_point, low, high)
    y = to_numpy(quantizer(x))
    same(y, integer_values(codes, scale, zero_point))
    same(quantizer(y), y)
    numbers = np.where(np.isnan(x), np.float32(0), x)
    given_codes = quantizer.quantize_to_codes(numbers)
    np.testing.assert_array_equal(given_codes[~np.isnan(x)], codes[~np.isnan(x)])
    same(quantizer.dequantize(given_codes), to_numpy(quantizer(numbers)))
    copy = type(quantizer).from_config(json.loads(json.dumps(quantizer.get_config())))
    assert copy.get_config() == quantizer.get_config()
    same(copy(x), y)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_there_are_just_the_values_of_the_codes(bits):
    x = np.linspace(-9, 9, 40001, dtype=np.float32)
    for quantizer, count in (
        (qi.WeightsSymmetricInferableQuantizer(bits, 3.0, False), 2**bits),
        (qi.WeightsSymmetricInferableQuantizer(bits, 3.0, False, narrow=True), 2**bits - 1),
        (qi.ActivationSymmetricInferableQuantizer(bits, 3.0, False), 2**bits),
        (qi.ActivationUniformInferableQuantizer(bits, -2.0, 3.0), 2**bits),
        (
            qi.WeightsLUTSymmetricInferableQuantizer(
                bits, range(-2, 2), 3.0, False, lut_values_bitwidth=9
            ),
            4,
        ),
    ):
        assert len(np.unique(to_numpy(quantizer(x)))) == count


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("t", [1.0, 2.7])
def test_ranges_of_the_thresholds(bits, t):
    """Signed `[-t, t - t / 2**(b-1)]`, unsigned `[0, t - t / 2**b]`."""
    x = np.float32([-100, 100])
    t = np.float32(t)
    signed = np.float32([-t, t - np.float64(t) / 2 ** (bits - 1)])
    unsigned = np.float32([0, t - np.float64(t) / 2**bits])
    same(qi.WeightsSymmetricInferableQuantizer(bits, t, False)(x), signed)
    same(qi.ActivationSymmetricInferableQuantizer(bits, [t], True)(x), signed)
    same(qi.ActivationSymmetricInferableQuantizer(bits, np.array([t]), False)(x), unsigned)


def test_uniform_ranges_are_moved_so_that_zero_is_on_the_grid():
    x = np.float32([-100, 0, 100])
    for cls, rest in ((qi.ActivationUniformInferableQuantizer, []), (WEIGHTS[1], [False])):
        y = to_numpy(cls(4, -1.0, 3.2, *rest)(x))
        np.testing.assert_allclose(y, [-1.12, 0, 3.08], rtol=1e-6)
        above, below = cls(4, 1.5, 3.0, *rest)(x), cls(4, -3.0, -1.5, *rest)(x)
        np.testing.assert_allclose(to_numpy(above), [0, 0, 3], rtol=1e-6)
        np.testing.assert_allclose(to_numpy(below), [-3, 0, 0], rtol=1e-6)
        assert cls(4, 1.5, 3.0, *rest).get_config()["min_range"] == 0
        assert cls(4, -3.0, -1.5, *rest).zero_point == 15


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 2), (1, 2), (-3, -2, -1)])
def test_each_channel_is_quantized_as_a_tensor_of_its_own(axis, random):
    shape = (3, 2, 4)
    x = random.normal(size=shape).astype("float32") * 2
    axes = axis if isinstance(axis, tuple) else (axis,)
    count = [shape[a] for a in axes]
    threshold = random.uniform(0.5, 2, size=count).astype("float32")
    ends = (threshold * -0.3, threshold)
    table = [-100, 20, 7, 90]
    for cls, given_args, ranges_ in (
        (WEIGHTS[0], [], [threshold]),
        (WEIGHTS[1], [], ends),
        (qi.WeightsLUTSymmetricInferableQuantizer, [table], [threshold]),
    ):
        whole = cls(4, *given_args, *ranges_, True, axis, 3)
        y = to_numpy(whole(x))
        assert len(np.unique(whole.scale)) == threshold.size
        for index in np.ndindex(*count):
            at = [slice(None)] * 3
            for a, i in zip(axes, index, strict=True):
                at[a % 3] = i
            alone = cls(4, *given_args, *(r[index] for r in ranges_), False)
            same(alone(x[tuple(at)]), y[tuple(at)])


@pytest.mark.parametrize("cls", [qi.WeightsLUTSymmetricInferableQuantizer])
@FEWER
@given(
    x=arrays(MODERATE),
    table=st.lists(st.integers(-128, 127), min_size=1, max_size=8, unique=True),
    threshold=st.floats(2.0**-7, 2.0**10, width=32),
    width=st.integers(8, 16),
    eps=st.sampled_from([0.0, 1e-8, 0.25]),
)
def test_lookup_formula_of_weights(cls, x, table, threshold, width, eps):
    check_lookup(cls(3, table, threshold, False, None, None, width, eps), x, table, True)


@FEWER
@given(
    x=arrays(MODERATE),
    table=st.lists(st.integers(0, 127), min_size=1, max_size=8, unique=True),
    exponent=st.integers(-7, 10),
    width=st.integers(8, 16),
    eps=st.sampled_from([0.0, 1e-8, 0.25]),
    signed=st.booleans(),
)
def test_lookup_formula_of_activations(x, table, exponent, width, eps, signed):
    cls = qi.ActivationLutPOTInferableQuantizer
    check_lookup(cls(3, table, 2.0**exponent, signed, width, eps), x, table, signed)


def check_lookup(quantizer, x, table, signed):
    """`clip(x / (t + eps) * 2**(w-s))`, the nearest entry by brute force, `lut / 2**(w-s) * t`."""
    config = quantizer.get_config()
    threshold, eps = np.float32(config["threshold"]), np.float32(config["eps"])
    unit = np.float32(2.0 ** (config["lut_values_bitwidth"] - signed))
    position = x / (threshold + eps) * unit
    position = np.clip(position, -unit if signed else np.float32(0), unit - 1)
    assume(np.all((position == 0) | (np.abs(position) > 1e-30)))
    codes = np.reshape([nearest_index(p, table) for p in position.ravel()], x.shape)
    y = to_numpy(quantizer(x))
    np.testing.assert_array_equal(quantizer.quantize_to_codes(x), codes)
    same(y, np.float32(table)[codes] / unit * threshold)
    same(quantizer.dequantize(codes), y)
    same(quantizer.scale, np.asarray(threshold / unit))
    assert quantizer.zero_point == 0


@pytest.mark.parametrize("table", [[25, -25], [-25, 25], [2, 0, 1, 3], [96, -64, 32, 0]])
def test_of_two_equally_near_entries_the_first_one_wins(table):
    ascending = np.sort(np.float32(table))
    ties = (ascending[1:] + ascending[:-1]) / 2
    quantizer = qi.WeightsLUTPOTInferableQuantizer(2, table, 1.0, False, eps=0.0)
    expected = np.float32([table[nearest_index(tie, table)] for tie in ties])
    same(quantizer(ties / np.float32(128)), expected / np.float32(128))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_arithmetic_is_float32_whatever_the_input(dtype, random):
    """Codes are those of float32 arithmetic on the values given; the output has their dtype."""
    x = ops.convert_to_tensor(random.normal(size=(200,)) * 2)
    x = x if dtype == "float64" else ops.cast(x, dtype)
    in_float32 = ops.cast(x, "float32")
    for quantizer in (
        qi.WeightsSymmetricInferableQuantizer(8, 1.7, False),
        qi.ActivationUniformInferableQuantizer(8, -1.0, 3.1),
        qi.WeightsLUTSymmetricInferableQuantizer(2, [-90, -3, 5, 99], 1.7, False),
    ):
        y = quantizer(x)
        assert dtype_of(y) == dtype_of(x)
        same(y, to_numpy(ops.cast(quantizer(in_float32), y.dtype)))
        codes = quantizer.quantize_to_codes(x)
        np.testing.assert_array_equal(codes, quantizer.quantize_to_codes(in_float32))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64", "bool"])
def test_integer_inputs_are_refused(dtype):
    for quantizer in (
        qi.WeightsSymmetricInferableQuantizer(8, 1.0, False),
        qi.WeightsLUTSymmetricInferableQuantizer(2, [0, 1], 1.0, False),
    ):
        x = np.ones(3, dtype)
        for action in (quantizer, quantizer.quantize_to_codes):
            message = refused(TypeError, lambda a=action, x=x: a(x), "inputs", "float tensor")
            assert "int" in message or dtype in message


def test_tensors_that_do_not_fit_the_channels_are_refused():
    quantizer = qi.WeightsSymmetricInferableQuantizer(8, [1.0, 2.0], True, -1, 2)
    refused(ValueError, lambda: quantizer(np.ones((2, 3), "float32")), "inputs", "(2, 3)", "[2]")
    refused(ValueError, lambda: quantizer(np.ones(2, "float32")), "rank 2", "input_rank")


def test_gradient_is_upstream_in_the_range_and_half_a_step_around(random):
    x = random.normal(size=(300,)).astype("float32") * 3
    dy = random.normal(size=(300,)).astype("float32")
    for quantizer, lowest, highest in (
        (qi.WeightsSymmetricInferableQuantizer(4, 2.0, False), -8.5, 7.5),
        (qi.WeightsSymmetricInferableQuantizer(4, 2.0, False, narrow=True), -7.5, 7.5),
        (qi.ActivationSymmetricInferableQuantizer(4, 2.0, False), -0.5, 15.5),
        (qi.ActivationUniformInferableQuantizer(4, -1.0, 2.75), -4.5, 11.5),
        (qi.WeightsLUTPOTInferableQuantizer(2, [-90, 5, 99], 2.0, False, eps=0.0), -128, 127),
    ):
        inside = (x >= lowest * quantizer.scale) & (x <= highest * quantizer.scale)
        assert 0 < inside.sum() < x.size
        same(gradient(quantizer, x, dy), np.where(inside, dy, np.float32(0)))


def test_one_name_for_everything_inferable():
    for name in dir(qi):
        if name.endswith("InferableQuantizer") and not name.startswith("Base"):
            cls = getattr(qi, name)
            assert getattr(qi.keras_inferable_quantizers, name) is cls
            assert keras.saving.get_registered_name(cls) == f"keras_qwrap>{name}"
