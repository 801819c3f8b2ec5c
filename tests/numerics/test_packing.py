"""Packed integers against a bit string that is written out; floats in configs, without loss."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import refused, shortest

from keras_qwrap.numerics.packing import (
    compact,
    expand,
    frame,
    framed_size,
    histogram,
    pack,
    packed_size,
    unframe,
    unpack,
)


def written_out(values, num_bits):
    """Bytes of the string of all bits, the lowest of each value first."""
    bits = "".join(format(value, f"0{num_bits}b")[::-1] for value in values)
    bits += "0" * (-len(bits) % 8)
    return [int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8)]


@given(
    st.integers(2, 16).flatmap(
        lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=40))
    )
)
def test_bits_lie_one_behind_the_other(drawn):
    num_bits, values = drawn
    packed = pack(np.array(values, np.int32), num_bits)
    assert packed.dtype == np.uint8
    assert packed.tolist() == written_out(values, num_bits)
    assert packed.size == packed_size(len(values), num_bits)
    unpacked = unpack(packed, num_bits, len(values))
    assert unpacked.dtype == np.int32
    assert unpacked.tolist() == values


@pytest.mark.parametrize("num_bits", [2, 3, 8, 13, 16])
def test_many_values_of_any_layout(num_bits):
    """More than are packed at a time, and not in C order."""
    shape = (700, 401, 2)
    values = np.random.default_rng(num_bits).integers(0, 2**num_bits, shape[::-1]).T
    packed = pack(values, num_bits)
    assert packed.size == packed_size(values.size, num_bits)
    start = 699 * 401 * 2 // 8 * 8
    tail = written_out(values.ravel().tolist()[start:], num_bits)
    assert packed[start * num_bits // 8 :].tolist() == tail
    assert np.array_equal(unpack(packed, num_bits, values.size).reshape(shape), values)


SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@given(st.integers(2, 16), SHAPES, st.booleans(), st.text(max_size=20), st.data())
def test_frames_hold_all_that_is_needed(num_bits, shape, signed, path, data):
    lowest = -(2 ** (num_bits - 1)) if signed else 0
    size = int(np.prod(shape))
    values = st.integers(lowest, lowest + 2**num_bits - 1)
    drawn = data.draw(st.lists(values, min_size=size, max_size=size))
    codes = np.array(drawn, np.int32).reshape(shape)
    framed = frame(codes, num_bits, signed, path)
    assert framed.dtype == np.uint8
    assert framed.size == framed_size(path, shape, num_bits)
    found, found_bits, found_path = unframe(framed)
    assert (found_bits, found_path, found.dtype, found.shape) == (num_bits, path, np.int32, shape)
    assert np.array_equal(found, codes)
    values, counts = np.unique(codes, return_counts=True)
    assert histogram(framed) == dict(zip(values.tolist(), counts.tolist(), strict=True))


@given(st.data())
def test_damaged_frames_are_refused_or_other_codes(data):
    framed = frame(np.arange(6).reshape(2, 3), 5, False, "kernel")
    changed = framed.copy()
    place = data.draw(st.integers(0, framed.size - 1))
    changed[place] = data.draw(st.integers(0, 255))
    start = framed.size - packed_size(6, 5)
    if place >= start or changed[place] == framed[place]:
        assert unframe(changed)[0].shape == (2, 3)
    elif place == 0 and changed[0] == 5 + 128:
        assert unframe(changed)[0].size == 6, "as many bytes"
    elif place < 3 or framed[place] in b'{}":,[]':
        with pytest.raises(ValueError, match="packed codes with a header"):
            unframe(changed)


@pytest.mark.parametrize("size", range(45))
def test_cut_frames_are_refused(size):
    framed = frame(np.arange(20).reshape(4, 5), 5, True, "kernel")
    assert framed.size > 45
    with pytest.raises(ValueError, match="packed codes with a header"):
        unframe(framed[:size])


NUMBERS = st.floats(width=32, allow_nan=False)


@given(st.lists(NUMBERS, max_size=40), st.booleans())
def test_no_float_is_lost(numbers, short):
    numbers = [shortest(number) for number in numbers] if short else numbers
    config = {"a": {"b": numbers, "rows": [numbers, numbers[:3]]}, "n": 3, "t": [True] * 20}
    there = json.loads(json.dumps(compact(config)))
    back = expand(there)
    assert str(back) == str(config), "also the signs of zeros"
    assert back == config
    if short and len(numbers) >= 16:
        assert not isinstance(there["a"]["b"], list)


def test_a_thousand_thresholds_take_less_than_six_bytes_each():
    numbers = [shortest(x) for x in np.random.default_rng(0).uniform(0, 1, 1000)]
    assert len(json.dumps(compact(numbers))) < 5500
    assert expand(compact(numbers)) == numbers


@pytest.mark.parametrize(
    "numbers", [[0.1 + 1e-12] * 20, [1] * 20, ["x"] * 20, [1e300] * 20, [0.5] * 15, [[0.5]] * 20]
)
def test_what_float32_does_not_hold_is_left(numbers):
    assert compact(numbers) == numbers


@pytest.mark.parametrize("damaged", ["AAA", "AAAAAAA=", "#", 3, None, ["AAAA"]])
def test_damage_is_refused(damaged):
    config = {"threshold": {next(iter(compact([0.5] * 16))): damaged}}
    refused(ValueError, lambda: expand(config), "base64")
