"""Packed integers against a bit string that is written out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_qwrap.packing import pack, packed_size, unpack


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
