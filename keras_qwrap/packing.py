"""Integers of a few bits, packed without gaps."""

import numpy as np

_BLOCK = 2**18


def packed_size(count: int, num_bits: int) -> int:
    """Bytes that `count` integers of `num_bits` bits take: `ceil(count * num_bits / 8)`."""
    return -(-count * num_bits // 8)


def pack(values: np.ndarray, num_bits: int) -> np.ndarray:
    """Integers from 0 to `2**num_bits - 1` as a vector of bytes.

    Bit `j` of value `i` (in C order, `j = 0` the lowest) is bit `(i * num_bits + j) % 8` of byte
    `(i * num_bits + j) // 8`; bits left over at the end are 0. At 8 bits these are the values
    themselves, at 16 bits their little-endian bytes.

    Args:
        values: integers of any shape.
        num_bits: 2 to 16.

    Example:

    ```python
    import numpy as np
    from keras_qwrap.packing import pack, unpack

    packed = pack(np.array([1, 2, 3]), 4)
    print(packed, unpack(packed, 4, 3))  # [33  3] [1 2 3]
    ```
    """
    flat = np.ascontiguousarray(values, dtype="<u2").reshape(-1)
    if num_bits == 8:
        return flat.astype(np.uint8)
    if num_bits == 16:
        return flat.view(np.uint8)
    packed = np.empty(packed_size(flat.size, num_bits), np.uint8)
    for first in range(0, flat.size, _BLOCK):
        part = flat[first : first + _BLOCK].view(np.uint8).reshape(-1, 2)
        bits = np.unpackbits(part, axis=1, count=num_bits, bitorder="little")
        start = first * num_bits // 8
        done = np.packbits(bits, bitorder="little")
        packed[start : start + done.size] = done
    return packed


def unpack(packed: np.ndarray, num_bits: int, count: int) -> np.ndarray:
    """The inverse of `pack`: a vector of `count` integers, int32."""
    if num_bits == 8:
        return packed.astype(np.int32)
    if num_bits == 16:
        return np.ascontiguousarray(packed).view("<u2").astype(np.int32)
    values = np.empty(count, np.int32)
    powers = 2 ** np.arange(num_bits, dtype=np.int32)
    for first in range(0, count, _BLOCK):
        number = min(_BLOCK, count - first)
        start = first * num_bits // 8
        part = packed[start : start + packed_size(number, num_bits)]
        bits = np.unpackbits(part, count=number * num_bits, bitorder="little")
        values[first : first + number] = bits.reshape(number, num_bits) @ powers
    return values
