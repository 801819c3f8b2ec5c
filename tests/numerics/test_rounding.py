"""The tensor functions: exact against numpy, gradients, and the same bits in every mode."""

import keras
import numpy as np
import pytest
from hypothesis import given
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
    nearest_index,
    same,
)

import keras_qwrap as qi

SCALES = st.floats(2.0**-20, 2.0**20, width=32)
EDGES = np.float32([np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, -3e38, 1e-40, 2.0**-126])


@given(arrays(), SCALES, st.integers(-300, 0), st.integers(1, 300))
def test_fake_quantize_is_the_formula(x, scale, lowest, highest):
    expected = integer_values(integer_codes(x, scale, 0, lowest, highest), scale, 0)
    same(qi.fake_quantize(x, np.float32(scale), lowest, highest), expected)
    same(qi.fake_quantize_covered(x, np.float32(scale), lowest, highest), expected)


@given(arrays(MODERATE), SCALES)
def test_unclipped_is_the_formula(x, scale):
    expected = integer_values(integer_codes(x, scale, 0, -(2**40), 2**40), scale, 0)
    same(qi.fake_quantize_unclipped(x, np.float32(scale)), expected)


def test_nan_stays_and_infinities_are_clipped():
    expected = np.float32([np.nan, 3.5, -4, 0, 0, 3.5, -4, 0, 0])
    for function in (qi.fake_quantize, qi.fake_quantize_covered):
        same(function(EDGES, 0.5, -8, 7), expected)
    same(qi.fake_quantize_unclipped(np.float32([np.nan, 1]), 0.5), np.float32([np.nan, 1]))
    values, bounds = [-1.0, 0.0, 1.0], [-0.5, 0.5]
    expected = np.float32([np.nan, 2, -2, 0, 0, 2, -2, 0, 0])
    same(qi.fake_lookup(EDGES, 2.0, 1.0, values, bounds, (-8.0, 7.0)), expected)


def test_ties_go_to_the_even_code():
    x = np.float32([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    expected = np.float32([-4, -2, -2, 0, 0, 2, 2, 4])
    for scale in (1.0, 0.25):
        for y in (
            qi.fake_quantize(x * scale, scale, -8, 7),
            qi.fake_quantize_covered(x * scale, scale, -8, 7),
            qi.fake_quantize_unclipped(x * scale, scale),
        ):
            same(y, expected * scale)


def test_scales_lows_and_highs_broadcast():
    """Each channel has its own step and its own range."""
    x = np.float32([[-10, 10, 0.7], [10, -10, 0.7]])
    scale, low, high = np.float32([[1, 2, 0.5]]), np.float32([-1, -2, -4]), np.float32([1, 3, 4])
    expected = np.float32([[-1, 6, 0.5], [1, -4, 0.5]])
    same(qi.fake_quantize(x, scale, low, high), expected)
    same(qi.fake_quantize_covered(x, scale, low, high), expected)


@pytest.mark.parametrize("function", [qi.fake_quantize, qi.fake_quantize_covered])
def test_dtype_and_shape_are_kept(function):
    for dtype in ("float16", "bfloat16", "float32"):
        y = function(ops.ones((2, 1, 3), dtype), 0.5, -8, 7)
        assert (tuple(y.shape), dtype_of(y)) == ((2, 1, 3), dtype)


def upstream_for(x):
    return np.linspace(-2, 3, x.size, dtype=np.float32).reshape(x.shape) + np.float32(0.1)


def test_gradient_is_upstream_within_half_a_step_around_the_range():
    """Inclusive at both ends, 0 one float beyond, 0 for NaN and infinities."""
    scale, low, high = np.float32(0.25), -8, 7
    ends = np.float32([(low - 0.5) * scale, (high + 0.5) * scale])
    beyond = np.nextafter(ends, np.float32([-np.inf, np.inf]))
    x = np.concatenate([ends, beyond, np.float32([0.3, -0.1, np.nan, np.inf, -np.inf])])
    dy = upstream_for(x)
    got = gradient(lambda t: qi.fake_quantize(t, scale, low, high), x, dy)
    same(got, np.float32([*dy[:2], 0, 0, *dy[4:6], 0, 0, 0]))


def test_gradient_mask_is_per_channel(random):
    x = random.normal(size=(50, 3)).astype("float32") * 2
    scale = np.float32([[0.1, 0.2, 0.4]])
    low, high = np.float32([[-8, 0, -3]]), np.float32([[7, 15, 12]])
    dy = upstream_for(x)
    inside = (x >= (low - np.float32(0.5)) * scale) & (x <= (high + np.float32(0.5)) * scale)
    assert 0 < inside.sum() < x.size
    got = gradient(lambda t: qi.fake_quantize(t, scale, low, high), x, dy)
    same(got, np.where(inside, dy, np.float32(0)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: qi.fake_quantize_unclipped(x, 0.1),
        lambda x: qi.fake_quantize_covered(x, 0.1, -8, 7),
    ],
)
def test_gradient_is_upstream_where_the_range_is_the_tensors_own(function):
    x = np.float32([-9.0, -0.4, 0.0, 0.33, 9.0])
    same(gradient(function, x, upstream_for(x)), upstream_for(x))


def test_gradient_of_lookup_is_upstream_where_nothing_is_clipped():
    """The limits of the table's width count, not its outermost entries."""
    limits = np.float32([-8, 7])
    ends = limits * np.float32(0.5)
    beyond = np.nextafter(ends, np.float32([-np.inf, np.inf]))
    x = np.concatenate([ends, beyond, np.float32([0.3, 3.0, np.nan])])
    dy = upstream_for(x)
    got = gradient(lambda t: qi.fake_lookup(t, 2.0, 0.5, [-1.0, 1.0], [0.0], (-8.0, 7.0)), x, dy)
    same(got, np.float32([*dy[:2], 0, 0, *dy[4:6], 0]))


def test_no_gradient_reaches_scale_and_range():
    """These functions are for ranges that are not learned."""
    x, dy = np.float32([0.3, 0.7, 9.0]), np.float32([1, 2, 3])
    start = np.float32(0.25)
    for function in (
        lambda s: qi.fake_quantize(x, s, -8, 7),
        lambda s: qi.fake_quantize(x, 0.25, s * -8, s * 28),
        lambda s: qi.fake_quantize_covered(x, s, -8, 7),
        lambda s: qi.fake_quantize_unclipped(x, s),
        lambda s: qi.fake_lookup(x, s, s, [-1.0, 1.0], [0.0], (-8.0, 7.0)),
    ):
        same(gradient(function, start, dy), np.float32(0))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_scale_may_be_a_variable(dtype):
    """Of Keras, as quantizers have it, whatever the dtype of the numbers."""
    scale = keras.Variable(0.5, dtype="float32")
    x = ops.cast([0.3, -9.0, 9.0], dtype)
    clipped, whole = np.array([0.5, -4, 3.5], dtype), np.array([0.5, -9, 9], dtype)
    same(qi.fake_quantize(x, scale, -8, 7), clipped)
    same(qi.fake_quantize_covered(x, scale, -8, 7), clipped)
    same(qi.fake_quantize_unclipped(x, scale), whole)


@given(arrays(MODERATE), st.sets(st.integers(-128, 127), min_size=2, max_size=9))
def test_lookup_takes_the_nearest_entry(x, entries):
    table = np.float32(sorted(entries))
    bounds = (table[1:] + table[:-1]) / 2
    scale, divisor = np.float32(0.3), np.float32(0.7)
    with np.errstate(over="ignore"):
        position = np.clip(x / divisor, np.float32(-128), np.float32(127))
    index = [nearest_index(p, sorted(entries)) for p in position.ravel()]
    expected = table[index].reshape(x.shape) * scale
    same(qi.fake_lookup(x, scale, divisor, table, bounds, (-128.0, 127.0)), expected)


def numbers_with_ties(random, scale):
    """Random numbers, all of whose second half lies midway between two multiples of `scale`."""
    x = random.normal(size=(2000, scale.size)).astype("float32") * 9
    codes = random.integers(-200, 200, size=(2000, scale.size)).astype("float32")
    ties = (codes + np.float32(0.5)) * scale
    return np.concatenate([x, ties, np.resize(EDGES, (len(EDGES), scale.size))])


@pytest.mark.tensorflow
def test_every_mode_gives_the_same_bits(random):
    """Scales in variables: graph compilers may not turn the division into a multiplication."""
    import tensorflow as tf

    scale = random.uniform(0.01, 0.2, size=16).astype("float32")
    low = random.integers(-128, -100, size=16).astype("float32")
    x = numbers_with_ties(random, scale)
    variables = [tf.Variable(scale), tf.Variable(low), tf.Variable(low + 255)]
    expected = integer_values(integer_codes(x, scale, 0, low, low + 255), scale, 0)
    for function in (qi.fake_quantize, qi.fake_quantize_covered):
        for y in in_every_mode(lambda t, f=function: f(t, *variables), x):
            same(y, expected)
    finite = x[: -len(EDGES)]
    expected = integer_values(integer_codes(finite, scale, 0, -(2**40), 2**40), scale, 0)
    for y in in_every_mode(lambda t: qi.fake_quantize_unclipped(t, variables[0]), finite):
        same(y, expected)


@pytest.mark.tensorflow
def test_lookup_gives_the_same_bits_in_every_mode(random):
    import tensorflow as tf

    scale = random.uniform(0.01, 0.2, size=16).astype("float32")
    x = numbers_with_ties(random, scale)
    table = np.float32([-99, -20, -19, 0, 3, 120])
    bounds = (table[1:] + table[:-1]) / 2
    divisor = scale * np.float32(1.01)
    s, d = tf.Variable(scale), tf.Variable(divisor)

    def look_up(t):
        return qi.fake_lookup(t, s, d, table, bounds, (-128.0, 127.0))

    eager, graph, xla = in_every_mode(look_up, x)
    assert len(np.unique(eager / scale)) > len(table)
    same(graph, eager)
    same(xla, eager)
    with np.errstate(over="ignore"):
        position = np.clip(x / divisor, np.float32(-128), np.float32(127))
    ordinary = ~np.isnan(position) & (np.abs(x) > 1e-30)
    index = [nearest_index(p, table.tolist()) for p in position[ordinary]]
    same(eager[ordinary], (table[index] * np.broadcast_to(scale, x.shape)[ordinary]))


@pytest.mark.tensorflow
def test_gradients_are_the_same_in_every_mode(random):
    import tensorflow as tf

    steps = np.float32([0.1, 0.3])
    scale = tf.Variable(steps)
    x = numbers_with_ties(random, steps)
    dy = upstream_for(x)

    def backward(t):
        with tf.GradientTape() as tape:
            tape.watch(t)
            y = qi.fake_quantize(t, scale, -128, 127)
        return tape.gradient(y, t, output_gradients=dy)

    eager, graph, xla = in_every_mode(backward, x)
    assert 0 < np.count_nonzero(eager) < x.size
    same(graph, eager)
    same(xla, eager)
