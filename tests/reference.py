"""What the numeric tests share: references in plain numpy, gradients, modes, refusals."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import ops

BACKEND = keras.backend.backend()
FEWER = settings(max_examples=15 if BACKEND == "jax" else 50)
"""For tests that JAX compiles anew for each example."""

FLOATS = st.floats(width=32)
MODERATE = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


SHAPES = [(5,), (3, 4), (2, 1, 3), (2, 3, 2, 2)]
"""Few, since JAX compiles every operation anew for each."""


def arrays(elements: st.SearchStrategy = FLOATS, shapes: list[tuple] = SHAPES) -> st.SearchStrategy:
    """float32 arrays."""
    return st.sampled_from(shapes).flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=elements)
    )


def to_numpy(tensor: Any) -> np.ndarray:
    return np.array(ops.convert_to_numpy(tensor))


def dtype_of(tensor: Any) -> str:
    return keras.backend.standardize_dtype(tensor.dtype)


def same(got: Any, expected: Any) -> None:
    """Equal in every value, NaN included; -0.0 equals 0.0."""
    np.testing.assert_array_equal(to_numpy(got), expected, strict=True)


def round_half_even(x: np.ndarray) -> np.ndarray:
    """Without numpy's rounding: the neighbour that is nearer, of two equally near the even one."""
    low = np.floor(x)
    rest = x - low
    up = (rest > 0.5) | ((rest == 0.5) & (np.mod(low, 2) == 1))
    return np.where(np.isinf(x), x, low + up.astype(x.dtype))


def integer_codes(x: Any, scale: Any, zero_point: Any, lowest: int, highest: int) -> np.ndarray:
    """`clip(round_half_even(x / scale) + zero_point, lowest, highest)`; the division in float32.

    Subnormal numbers count as zero.
    """
    x, scale = np.float32(x), np.float32(scale)
    x = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)
    with np.errstate(over="ignore", invalid="ignore"):
        quotient = (x / scale).astype(np.float64)
        return np.clip(round_half_even(quotient) + np.asarray(zero_point), lowest, highest)


def integer_values(codes: np.ndarray, scale: Any, zero_point: Any) -> np.ndarray:
    return (codes - zero_point).astype(np.float32) * np.float32(scale)


def nearest_index(position: float, table: list[int]) -> int:
    """Index of the entry nearest to a number, exactly; of equally near ones the first."""
    distances = [abs(Fraction(float(position)) - entry) for entry in table]
    return distances.index(min(distances))


def gradient(function: Callable, x: Any, upstream: Any) -> np.ndarray:
    """Gradient of `sum(function(x) * upstream)` with respect to `x`."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        x = tf.convert_to_tensor(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return to_numpy(
            tape.gradient(
                y,
                x,
                output_gradients=tf.convert_to_tensor(upstream),
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )
        )
    if BACKEND == "jax":
        import jax

        _, pull_back = jax.vjp(function, ops.convert_to_tensor(x))
        return to_numpy(pull_back(ops.convert_to_tensor(upstream))[0])
    x = ops.convert_to_tensor(x).requires_grad_(True)
    function(x).backward(ops.convert_to_tensor(upstream))
    return np.zeros(x.shape, np.float32) if x.grad is None else to_numpy(x.grad)


def in_every_mode(function: Callable, *inputs: Any) -> list[np.ndarray]:
    """Outputs in eager mode, in a `tf.function`, and under XLA."""
    import tensorflow as tf

    inputs = [tf.convert_to_tensor(x) for x in inputs]
    modes = (function, tf.function(function), tf.function(function, jit_compile=True))
    return [to_numpy(mode(*inputs)) for mode in modes]


def traced_operations(layer: Callable, shape: tuple) -> list[str]:
    """The types of the operations in the graph that a call of `layer` makes, in order."""
    import tensorflow as tf

    traced = tf.function(lambda x: layer(x)).get_concrete_function(tf.TensorSpec(shape))
    inner = [node.op for f in traced.graph.as_graph_def().library.function for node in f.node_def]
    return sorted([op.type for op in traced.graph.get_operations()] + inner)


def refused(error: type[Exception], action: Callable, *fragments: str) -> str:
    """`action` raises just `error`, whose message says all three: received, expected, and why."""
    with pytest.raises(error) as caught:
        action()
    message = str(caught.value)
    assert type(caught.value) is error, message
    for fragment in ("received", "expected", *fragments):
        assert fragment.lower() in message.lower(), f"{fragment!r} is not in: {message}"
    assert message.endswith((".", ").", "}.", "'.")), message
    return message


def shortest(number):
    """A float32 as the float of the fewest digits that stand for it."""
    return float(str(np.float32(number)))


def sqnr(w, q):
    """Power of the signal over that of the error, dB."""
    w, q = np.float64(w), np.float64(q)
    return 10 * math.log10(np.sum(w * w) / np.sum((w - q) ** 2))
