"""Which values exist: codes, limits, encoding and decoding, all without any backend."""

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from reference import (
    FLOATS,
    MODERATE,
    arrays,
    integer_codes,
    integer_values,
    nearest_index,
    refused,
)

from keras_qwrap.numerics.grids import (
    SMALLEST_SCALE,
    IntegerGrid,
    LookupGrid,
    check_num_bits,
    check_scale,
    float_array,
)

GRIDS = st.builds(IntegerGrid, st.integers(2, 16), st.booleans(), st.booleans())
SCALES = st.floats(2.0**-30, 2.0**30, width=32)
ALL_GRIDS = [
    IntegerGrid(bits, signed, narrow)
    for bits in range(2, 17)
    for signed, narrow in ((True, False), (True, True), (False, False))
]


@pytest.mark.parametrize("grid", ALL_GRIDS, ids=str)
def test_limits(grid):
    codes = range(grid.lowest, grid.highest + 1)
    if not grid.signed:
        assert (grid.lowest, len(codes)) == (0, 2**grid.num_bits)
    elif grid.narrow:
        assert (grid.lowest, len(codes)) == (-grid.highest, 2**grid.num_bits - 1)
    else:
        assert (grid.lowest, len(codes)) == (-(2 ** (grid.num_bits - 1)), 2**grid.num_bits)


@pytest.mark.parametrize("grid", ALL_GRIDS, ids=str)
def test_decode_and_encode_are_inverse_on_every_code(grid, random):
    codes = np.arange(grid.lowest, grid.highest + 1, dtype=np.int32)
    scales = [1.0, SMALLEST_SCALE, 2.0**100, *random.uniform(1e-3, 1e3, size=3)]
    for scale in scales:
        for zero_point in (0, grid.lowest, grid.highest, int(random.choice(codes))):
            values = grid.decode(codes, scale, zero_point)
            assert values.dtype == np.float32
            np.testing.assert_array_equal(values, integer_values(codes, scale, zero_point))
            again = grid.encode(values, scale, zero_point)
            assert again.dtype == np.int32
            np.testing.assert_array_equal(again, codes)


@given(arrays(st.floats(width=32, allow_nan=False)), GRIDS, SCALES, st.data())
def test_encode_is_the_contracts_formula(x, grid, scale, data):
    """For infinities, subnormal and huge numbers too."""
    zero_point = data.draw(st.integers(grid.lowest, grid.highest))
    codes = grid.encode(x, scale, zero_point)
    expected = integer_codes(x, scale, zero_point, grid.lowest, grid.highest)
    np.testing.assert_array_equal(codes, expected)


@given(arrays(MODERATE), GRIDS, SCALES, st.data())
def test_error_is_at_most_half_a_step_inside_the_range(x, grid, scale, data):
    zero_point = data.draw(st.integers(grid.lowest, grid.highest))
    wide = np.float64(np.float32(scale))
    inside = np.clip(x, *((np.array([grid.lowest, grid.highest]) - zero_point) * wide))
    inside = inside.astype(np.float32)
    codes = grid.encode(inside, scale, zero_point).astype(np.float64)
    error = np.abs((codes - zero_point) * wide - inside)
    assert np.all(error <= wide * (0.5 + 2.0**-8)), error.max() / wide


def test_ties_go_to_even_before_the_zero_point_is_added():
    codes = IntegerGrid(8, signed=False).encode([0.5, 1.5, -0.5, -1.5], 1.0, 3)
    assert codes.tolist() == [3, 5, 3, 1]


def test_channels_have_their_own_scale_and_zero_point():
    grid = IntegerGrid(4, signed=False)
    scale, zero_point = np.float32([[0.5, 2.0]]), np.int32([[3, 8]])
    codes = grid.encode([[1, 4], [-9, 90]], scale, zero_point)
    assert codes.tolist() == [[5, 10], [0, 15]]
    assert grid.decode(codes, scale, zero_point).tolist() == [[1, 4], [-1.5, 14]]


def test_subnormal_numbers_count_as_zero():
    """The backends take them for zero; a scale of 2**-126 would give them a code else."""
    x = np.float32([0.9, 1.0, -0.9, -1.0]) * np.float32(SMALLEST_SCALE)
    assert IntegerGrid(4, True).encode(x, SMALLEST_SCALE).tolist() == [0, 1, 0, -1]
    grid = LookupGrid((-1, 1), 8, True)
    assert grid.encode(x, 2.0**-100).tolist() == [0, 1, 0, 0]
    assert LookupGrid((1, -1), 8, True).encode(x, 2.0**-100).tolist() == [0, 0, 0, 1]


def test_encode_refuses_nan():
    for grid in (IntegerGrid(8, True), LookupGrid((0, 1), 8, True)):
        refused(ValueError, lambda g=grid: g.encode([1.0, np.nan], 1.0), "NaN", "nan_to_num")


@pytest.mark.parametrize(
    ("grid", "low", "high"),
    [
        (IntegerGrid(4, True), -8, 7),
        (IntegerGrid(4, True, narrow=True), -7, 7),
        (IntegerGrid(4, False), 0, 15),
        (LookupGrid((7, 1, 3), 8, True), 0, 2),
    ],
)
def test_decode_refuses_what_is_no_code(grid, low, high):
    grid.decode([low, high], 1.0)
    for codes in ([low - 1], [high + 1]):
        refused(ValueError, lambda c=codes: grid.decode(c, 1.0), str(codes[0]), f"{low} to {high}")
    refused(TypeError, lambda: grid.decode([0.5], 1.0), "float64", "integers")
    assert grid.decode(np.zeros((0, 3)), 1.0).shape == (0, 3)


TABLES = st.lists(st.integers(-128, 127), min_size=1, max_size=16, unique=True)


@given(arrays(MODERATE), TABLES, st.floats(2.0**-7, 8, width=32))
@example(np.float32([0.0, -0.0, 1e-3, -1e-3]), [25, -25], 1.0)
@example(np.float32([0.5, 1.5, 2.5]), [2, 1, 0, 3], 1.0)
def test_lookup_encodes_to_the_nearest_entry(x, table, divisor):
    """In any order of the table; of two equally near entries the first one wins."""
    position = np.clip(x / np.float32(divisor), np.float32(-128), np.float32(127))
    assume(np.all((position == 0) | (np.abs(position) > 1e-30)))
    expected = [nearest_index(p, table) for p in position.ravel()]
    codes = LookupGrid(tuple(table), 8, True).encode(x, divisor)
    assert codes.dtype == np.int32
    assert codes.ravel().tolist() == expected


@given(st.lists(st.integers(0, 255), min_size=2, max_size=16, unique=True))
def test_lookup_ties_and_their_neighbours(table):
    """Every midpoint of the table, and the float32 numbers next to it."""
    ascending = np.sort(np.float32(table))
    middle = (ascending[1:] + ascending[:-1]) / 2
    x = np.concatenate([middle, np.nextafter(middle, np.float32(-9)), np.nextafter(middle, 999)])
    codes = LookupGrid(tuple(table), 8, False).encode(x, 1.0)
    assert codes.tolist() == [nearest_index(p, table) for p in np.float32(x)]


@given(TABLES, st.sampled_from([1.0, 0.37, 2.0**-126, 2.0**80]))
def test_lookup_decode_and_encode_are_inverse_on_every_code(table, scale):
    grid = LookupGrid(tuple(table), 8, True)
    codes = np.arange(len(table), dtype=np.int32)
    values = grid.decode(codes, scale)
    np.testing.assert_array_equal(values, np.float32(table) * np.float32(scale))
    np.testing.assert_array_equal(grid.encode(values, scale), codes)


def test_lookup_clips_to_its_bit_width():
    """An entry beyond the width could never be reached; limits depend on the sign."""
    assert LookupGrid((0,), 4, True).limits == (-8.0, 7.0)
    assert LookupGrid((0,), 4, False).limits == (0.0, 15.0)
    assert LookupGrid((-9, -8, 0), 4, True).encode([-100.0, np.inf], 1.0).tolist() == [1, 2]


@given(st.lists(FLOATS.filter(np.isfinite), min_size=1))
def test_float_array_keeps_float32_numbers(values):
    array = float_array("threshold", values)
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, np.float32(values))


@pytest.mark.parametrize("bits", [1, 17, 0, -8, 8.0, 8.5, "8", None, True, [8], np.float32(8)])
def test_num_bits_outside_2_to_16_are_refused(bits):
    error = ValueError if type(bits) is int else TypeError
    refused(error, lambda: check_num_bits(bits), "num_bits", repr(bits), "integer from 2 to 16")
    refused(error, lambda: check_num_bits(bits, "weights_n_bits"), "weights_n_bits: received")


def test_num_bits_may_be_numpy_integers():
    for bits in (2, 16, np.int64(8), np.uint8(4)):
        assert type(check_num_bits(bits)) is int


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        ([], ValueError, "at least one number"),
        (np.nan, ValueError, "finite"),
        ([1.0, -np.inf], ValueError, "finite"),
        (1e39, ValueError, "finite in float32"),
        (None, ValueError, "finite"),
        ("1.0", TypeError, "real numbers"),
        (["1"], TypeError, "real numbers"),
        (True, TypeError, "real numbers"),
        (1j, TypeError, "real numbers"),
        ([[1], [2, 3]], TypeError, "real numbers"),
        ({"a": 1}, TypeError, "real numbers"),
    ],
    ids=str,
)
def test_numbers_of_a_range_are_checked(value, error, expected):
    refused(error, lambda: float_array("threshold", value), "threshold", repr(value), expected)


def test_long_input_is_cut_in_messages():
    message = refused(ValueError, lambda: float_array("t", [np.nan] * 999), "... (of type list)")
    assert len(message) < 300


def test_subnormal_and_infinite_steps_are_refused():
    below = np.nextafter(np.float32(SMALLEST_SCALE), np.float32(0))
    refused(
        ValueError,
        lambda: check_scale(np.float32([1, below]), 127, "threshold"),
        "threshold",
        str(float(below)),
        "2**-126",
        "fewer bits",
    )
    refused(
        ValueError,
        lambda: check_scale(np.float32(2.0**121), 128, "max_range"),
        "max_range",
        str(2.0**121),
        "finite",
    )
    check_scale(np.float32([SMALLEST_SCALE, 2.0**120]), 127, "threshold")
