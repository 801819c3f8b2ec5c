"""Numbers as bytes: codes of a few bits behind a header, and the floats of configs as base64."""

import base64
import binascii
import json
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from keras_qwrap.numerics.checks import bad_value

_SIGNED = 128
_PREFIX = 3

_BLOCK = 2**18

_FLOATS = "__keras_qwrap_float32__"
_SHORTEST_LIST = 16


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


def unpack(packed: np.ndarray, num_bits: int, count: int, signed: bool = False) -> np.ndarray:
    """The inverse of `pack`: a vector of `count` integers, int32.

    `signed` ones are in two's complement of `num_bits` bits.
    """
    if num_bits in (8, 16):
        kind = np.dtype(f"<{'i' if signed else 'u'}{num_bits // 8}")
        return np.ascontiguousarray(packed).view(kind).astype(np.int32)
    values = np.empty(count, np.int32)
    powers = 2 ** np.arange(num_bits, dtype=np.int32)
    for first in range(0, count, _BLOCK):
        number = min(_BLOCK, count - first)
        start = first * num_bits // 8
        part = packed[start : start + packed_size(number, num_bits)]
        bits = np.unpackbits(part, count=number * num_bits, bitorder="little")
        values[first : first + number] = bits.reshape(number, num_bits) @ powers
    return _with_sign(values, num_bits) if signed else values


def _with_sign(values: np.ndarray, num_bits: int) -> np.ndarray:
    """What values from 0 to `2**num_bits - 1` are in two's complement."""
    return values - (values >> (num_bits - 1) << num_bits)


def frame(codes: np.ndarray, num_bits: int, signed: bool, path: str) -> np.ndarray:
    """The codes of a weight, packed, behind a header that says how to read them; bytes.

    - one byte: `num_bits + 128 * signed`,
    - two bytes, the lower first: the length of what follows,
    - `{"path": "kernel", "shape": [3, 4]}` in JSON,
    - the codes as `pack` lays them out; signed ones in two's complement of `num_bits` bits.

    Args:
        codes: integers that fit into `num_bits` bits.
        num_bits: 2 to 16.
        signed: whether codes may be negative.
        path: path of the weight in its layer.
    """
    text = _header(path, codes.shape)
    start = bytes([num_bits + _SIGNED * signed]) + len(text).to_bytes(2, "little") + text
    packed = pack(codes & (2**num_bits - 1), num_bits)
    return np.concatenate([np.frombuffer(start, np.uint8), packed])


def framed_size(path: str, shape: Sequence[int], num_bits: int) -> int:
    """Bytes that `frame` gives."""
    return _PREFIX + len(_header(path, shape)) + packed_size(prod(shape), num_bits)


def _header(path: str, shape: Sequence[int]) -> bytes:
    header = {"path": path, "shape": [int(size) for size in shape]}
    return json.dumps(header, separators=(",", ":")).encode("ascii")


class Header(NamedTuple):
    """What a frame says of its codes, which begin at byte `start`."""

    num_bits: int
    signed: bool
    path: str
    shape: tuple[int, ...]
    start: int


def read_header(framed: np.ndarray) -> Header | None:
    """The header of what `frame` gave; None for other arrays."""
    if framed.dtype != np.uint8 or framed.ndim != 1:
        return None
    try:
        num_bits, signed = int(framed[0]) % _SIGNED, bool(framed[0] >= _SIGNED)
        start = _PREFIX + int(framed[1]) + 256 * int(framed[2])
        text = framed[_PREFIX:start].tobytes()
        header = json.loads(text)
        path, shape = header["path"], tuple(header["shape"])
        exact = text == _header(path, shape) and framed.size == framed_size(path, shape, num_bits)
    except (IndexError, KeyError, TypeError, ValueError, RecursionError):
        return None
    if not (exact and num_bits in range(2, 17) and min(shape, default=0) >= 0):
        return None
    return Header(num_bits, signed, path, shape, start)


def is_framed(array: np.ndarray) -> bool:
    """Whether an array of a file is what `frame` gives."""
    return read_header(array) is not None


def unframe(framed: np.ndarray) -> tuple[np.ndarray, int, str]:
    """The codes (int32), their bits and the weight's path: the inverse of `frame`.

    Raises:
        ValueError: this is nothing that `frame` gives.
    """
    header = read_header(framed)
    if header is None:
        what = f"{framed.size} bytes, {framed[:40].tolist()}..."
        raise bad_value("codes", what, "packed codes with a header", "The file is damaged.")
    number = prod(header.shape)
    codes = unpack(framed[header.start :], header.num_bits, number, header.signed)
    return codes.reshape(header.shape), header.num_bits, header.path


def histogram(framed: np.ndarray) -> dict[int, int]:
    """How often each code occurs in what `frame` gave; those that do not occur are left out.

    Raises:
        ValueError: this is nothing that `frame` gives.
    """
    header = read_header(framed)
    bits = header.num_bits if header else 0
    if header is None or 8 % bits:
        codes = unframe(framed)[0]
        values, counts = np.unique(codes, return_counts=True)
    else:
        # Whole codes in each byte: count the bytes, and what they hold.
        parts = np.array_split(framed[header.start :], 1 + framed.size // _BLOCK)
        found = sum(np.bincount(part, minlength=256) for part in parts)
        held = np.arange(256)[:, None] >> np.arange(0, 8, bits) & 2**bits - 1
        weights = np.repeat(found, 8 // bits)
        counts = np.bincount(held.ravel(), weights, minlength=2**bits).astype(np.int64)
        counts[0] -= framed[header.start :].size * 8 // bits - prod(header.shape)
        values = np.arange(2**bits)
        values = _with_sign(values, bits) if header.signed else values
    pairs = zip(values.tolist(), counts.tolist(), strict=True)
    return {value: count for value, count in sorted(pairs) if count}


def compact(config: Any) -> Any:
    """`config` with each list of 16 floats or more as base64, if float32 holds them.

    That is, if each is the number of fewest digits that stands for its float32, as in the
    configs of this package's quantizers. `expand` gives back the very same floats.
    """
    if isinstance(config, dict):
        return {key: compact(value) for key, value in config.items()}
    if not isinstance(config, list):
        return config
    if len(config) < _SHORTEST_LIST or not all(type(number) is float for number in config):
        return [compact(value) for value in config]
    with np.errstate(over="ignore"):
        numbers = np.array(config, dtype="<f4")
    if _floats(numbers) != config:
        return config
    return {_FLOATS: base64.b64encode(numbers.tobytes()).decode("ascii")}


def expand(config: Any) -> Any:
    """The inverse of `compact`.

    Raises:
        ValueError: what should be base64 of float32 numbers is not.
    """
    if isinstance(config, list):
        return [expand(value) for value in config]
    if not isinstance(config, dict):
        return config
    if set(config) != {_FLOATS}:
        return {key: expand(value) for key, value in config.items()}
    try:
        return _floats(np.frombuffer(base64.b64decode(config[_FLOATS], validate=True), "<f4"))
    except (TypeError, ValueError, binascii.Error) as error:
        raise bad_value(
            "config", config[_FLOATS], "float32 numbers in base64", "The file is damaged."
        ) from error


def _floats(numbers: np.ndarray) -> list[float]:
    """The number of fewest digits that stands for each float32."""
    return [float(str(number)) for number in numbers]
