"""Batch normalization folded into codes and scales: the same numbers, exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops

from keras_qwrap.models.batch_norm import fold_scales


def to_numpy(tensor):
    return np.array(ops.convert_to_numpy(tensor))


def set_kernel(layer, kernel, bias=None):
    layer.set_weights([kernel] if bias is None else [kernel, bias])


SCALE_CASES = {
    "dense": (lambda bias: layers.Dense(4, use_bias=bias), (5,), -1),
    "conv": (lambda bias: layers.Conv2D(4, 2, use_bias=bias), (4, 4, 3), -1),
    "grouped": (lambda bias: layers.Conv1D(4, 2, groups=2, use_bias=bias), (5, 4), 2),
    "transposed": (lambda bias: layers.Conv2DTranspose(4, 2, use_bias=bias), (3, 3, 2), -2),
    "depthwise": (
        lambda bias: layers.DepthwiseConv2D(2, depth_multiplier=2, use_bias=bias),
        (4, 4, 2),
        (2, 3),
    ),
}


def normalized(y, gamma, beta, mean, variance, epsilon):
    """Batch normalization in float64, over the last axis, written out."""
    gamma = 1.0 if gamma is None else gamma
    beta = 0.0 if beta is None else beta
    return (y.astype(np.float64) - mean) / np.sqrt(variance + epsilon) * gamma + beta


def built(make, shape, bias):
    layer = make(bias)
    layer.build((None, *shape))
    return layer


@pytest.mark.parametrize("name", SCALE_CASES)
@pytest.mark.parametrize(
    ("gamma", "center"), [(None, False), ([2.0, -0.5, 0.0, -4.0], True), ([-1.0] * 4, False)]
)
def test_folded_integers_compute_what_kernel_and_normalization_do_exactly(
    name, gamma, center, random
):
    """With powers of two and small integers every number is exact, so that `==` must hold."""
    make, shape, axis = SCALE_CASES[name]
    plain, biased = built(make, shape, False), built(make, shape, True)
    codes = random.integers(-7, 8, plain.kernel.shape)
    axes = [a % codes.ndim for a in (axis if isinstance(axis, tuple) else (axis,))]
    keep = [codes.shape[a] if a in axes else 1 for a in range(codes.ndim)]
    scale = np.array([0.5, 2.0, 0.25, 1.0], np.float32)
    bias, mean = np.array([1.0, -2.0, 0.5, 0.0]), np.array([0.5, 3.0, -1.0, 2.0])
    variance, epsilon = np.array([0.75, 3.75, 15.75, 0.0]), 0.25
    beta = np.array([-1.0, 0.25, 3.0, 0.5]) if center else None
    x = random.integers(-4, 5, (2, *shape)).astype("float32")

    set_kernel(biased, codes * scale.reshape(keep), bias)
    expected = normalized(to_numpy(biased(x)), gamma, beta, mean, variance, epsilon)
    folded = fold_scales(codes, scale, bias, gamma, beta, mean, variance, epsilon, axis, num_bits=4)
    assert (folded.codes.dtype, folded.scale.dtype, folded.bias.dtype) == (
        np.int32,
        np.float32,
        np.float32,
    )
    assert folded.scale.shape == tuple(keep)
    assert folded.bias.shape == (4,)

    set_kernel(plain, folded.codes.astype("float32"))
    sums = to_numpy(plain(x))
    np.testing.assert_array_equal(sums, np.round(sums))
    np.testing.assert_array_equal(sums * folded.scale.reshape(-1) + folded.bias, expected)
    set_kernel(biased, folded.codes * folded.scale, folded.bias)
    np.testing.assert_array_equal(to_numpy(biased(x)), expected)
    flipped = np.zeros(4) if gamma is None else np.array(gamma) <= 0
    unchanged = np.broadcast_to(~flipped.astype(bool).reshape(keep), codes.shape)
    np.testing.assert_array_equal(folded.codes[unchanged], codes[unchanged])


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(1e-3, 1e3))
def test_any_statistics_fold_to_rounding(seed, size):
    random = np.random.default_rng(seed)
    codes = random.integers(-127, 128, (6, 3))
    scale, variance = size * random.uniform(0.1, 1, (1, 3)), random.uniform(0, 5, 3)
    gamma, beta, mean, bias = random.normal(size=(4, 3))
    folded = fold_scales(codes, scale, bias, gamma, beta, mean, variance, 1e-3, -1)
    x = random.normal(size=(8, 6))
    expected = normalized(x @ (codes * scale) + bias, gamma, beta, mean, variance, 1e-3)
    got = x @ (folded.codes * folded.scale.astype(np.float64)) + folded.bias
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(np.abs(folded.codes), np.abs(codes))
    assert np.all(folded.scale > 0)


def fold(codes=((1, 2), (3, 4)), scale=0.5, axis=-1, **kwargs):
    arguments = {
        "bias": None,
        "gamma": [1.0, 1.0],
        "beta": None,
        "moving_mean": [0.0, 0.0],
        "moving_variance": [1.0, 1.0],
        "epsilon": 0.0,
    }
    return fold_scales(codes, scale, channel_axis=axis, **(arguments | kwargs))


def test_a_channel_without_gamma_holds_zeros_and_a_usable_scale():
    folded = fold(gamma=[0.0, 1e-45], bias=[3.0, 3.0], beta=[1.5, 2.5])
    np.testing.assert_array_equal(folded.codes, 0)
    np.testing.assert_array_equal(folded.scale, [[0.5, 0.5]])
    np.testing.assert_array_equal(folded.bias, [1.5, 2.5])


@pytest.mark.parametrize("scale", [0.5, [0.5], [[0.5]], [0.5, 0.5], [[0.5, 0.5]]])
def test_spellings_of_the_scale(scale):
    np.testing.assert_array_equal(fold(scale=scale).scale, np.float32([[0.5, 0.5]]))


def test_the_lowest_code_changes_no_sign():
    lowest = ((-128, 2), (3, 4))
    assert fold(lowest).codes.min() == -128
    assert fold(lowest, gamma=[1.0, -1.0]).codes.tolist() == [[-128, -2], [3, -4]]
    assert fold(lowest, gamma=[0.0, -1.0]).codes.tolist() == [[0, -2], [0, -4]]
    with pytest.raises(ValueError, match=r"-128 .*codes from -127 on .*narrow grid"):
        fold(lowest, gamma=[-1.0, 1.0])
    with pytest.raises(ValueError, match=r"-8 .*codes from -7 on"):
        fold(((-8, 2), (3, 4)), gamma=[-1.0, 1.0], num_bits=4)


REFUSED = {
    "zero point": ({"zero_point": [0, 3]}, ValueError, r"zero_point: received \[0, 3\]"),
    "float codes": ({"codes": [[1.0, 2.0]]}, TypeError, "an array of integers"),
    "no codes": ({"codes": np.zeros((0, 2), int)}, TypeError, "an array of integers"),
    "too wide": ({"num_bits": 3}, ValueError, r"received \(1, 4\) .*codes from -4 to 3"),
    "scale of inputs": ({"scale": [[0.5], [1.0]]}, ValueError, r"broadcasts to \(1, 2\)"),
    "scale of zero": ({"scale": [0.5, 0.0]}, ValueError, "positive numbers"),
    "huge scale": ({"scale": 1e38}, ValueError, "scale: received a range whose step is"),
    "gamma": ({"gamma": [1.0]}, ValueError, r"gamma: received \(1,\) .*vector of 2 numbers"),
    "mean": ({"moving_mean": None}, ValueError, "moving_mean: received None"),
    "NaN": ({"beta": [np.nan, 0.0]}, ValueError, "beta: .*finite"),
    "variance": ({"moving_variance": [0.0, 1.0]}, ValueError, "numbers above -0.0"),
    "axis": ({"axis": 2}, ValueError, "axes from -2 to 1"),
    "bias": ({"bias": [3e38, 0], "gamma": [9.0, 1.0]}, ValueError, "bias: .*finite in float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    arguments, kind, match = REFUSED[name]
    with pytest.raises(kind, match=match):
        fold(**arguments)
