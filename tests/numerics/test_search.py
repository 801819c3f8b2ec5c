"""Ranges found in numbers: never wider than what was seen, and better by the measure they claim."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import layers, ops
from reference import refused, to_numpy

import keras_qwrap as qi
from keras_qwrap.numerics.search import GRIDS, RANGE_METHODS, find_range, weights_threshold
from keras_qwrap.quantizers.moving_average import MovingAverageActivationQATQuantizer

SYMMETRIC, POT, UNIFORM = GRIDS
SAMPLED = ("percentile", "mse", "entropy")

SAMPLES = hnp.arrays(
    np.float32, st.integers(1, 60), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
)
FEW = settings(max_examples=40)


def quantized(x, low, high, bits, method):
    """By the quantizer that calibration sets, in inference."""
    config = qi.TrainableQuantizerActivationConfig(method, bits, min_threshold=2.0**-110)
    holder = qi.KerasActivationQuantizationHolder(MovingAverageActivationQATQuantizer(config))
    holder.build((None,))
    holder.activation_holder_quantizer.set_range(low, high)
    return to_numpy(holder(ops.convert_to_tensor(np.float32(x))))


def error(x, low, high, bits, method):
    y = quantized(x, low, high, bits, method).astype("float64")
    return np.mean((y - x.astype("float64")) ** 2)


def ends(x):
    return min(float(x.min()), 0.0), max(float(x.max()), 0.0)


@FEW
@given(SAMPLES, st.sampled_from(RANGE_METHODS), st.integers(2, 16), st.sampled_from(GRIDS))
def test_range_holds_zero_and_lies_within_what_was_seen(x, method, bits, grid):
    low, high = find_range(x, x.min(), x.max(), method, bits, grid)
    assert type(low) is float
    assert type(high) is float
    widest = ends(x)
    assert widest[0] <= low <= 0 <= high <= widest[1]
    if widest != (0, 0):
        assert low < high


@FEW
@given(SAMPLES, st.integers(2, 16), st.sampled_from(GRIDS))
def test_error_is_at_most_that_of_the_whole_range(x, bits, grid):
    found = find_range(x, x.min(), x.max(), "mse", bits, grid)
    if found == ends(x):
        return
    before = error(x, *ends(x), bits, grid)
    assert error(x, *found, bits, grid) <= before * (1 + 1e-5)


def laplace(random, size=20000, shift=0.0):
    return (random.laplace(size=size) + shift).astype("float32")


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_error_is_nearly_the_least_there_is(grid, bits, random):
    """Against the ends tried one by one, through the quantizer itself."""
    x = laplace(random, 3000, -0.5)
    low, high = ends(x)
    factors = np.exp2(-np.arange(0, 5, 0.25 if grid == UNIFORM else 0.05))
    if grid == UNIFORM:
        tried = [(low * a, high * b) for a in factors for b in factors]
    else:
        tops = max(-low, high) * factors
        tried = [(max(low, -t), min(high, t * (1 - 2.0 ** (1 - bits)))) for t in tops]

    def in_numpy(ends):
        if grid == UNIFORM:
            scale = (ends[1] - ends[0]) / (2**bits - 1)
            zero = np.rint(-ends[0] / scale)
            codes = np.clip(np.rint(x / scale), -zero, 2**bits - 1 - zero)
        else:
            half = 2 ** (bits - 1)
            scale = max(-ends[0] / half, ends[1] / (half - 1))
            scale = 2.0 ** np.ceil(np.log2(scale)) if grid == POT else scale
            codes = np.clip(np.rint(x / scale), -half, half - 1)
        return np.mean((codes * scale - x) ** 2)

    least = min(map(in_numpy, tried))
    found = find_range(x, low, high, "mse", bits, grid)
    assert error(x, *found, bits, grid) <= least * 1.02


def test_power_of_two_range_does_not_reach_the_next_power(random):
    """The upper end of a clipped range must not round to twice the threshold."""
    x = laplace(random)
    for bits in range(2, 17):
        low, high = find_range(x, x.min(), x.max(), "mse", bits, POT)
        config = qi.TrainableQuantizerActivationConfig(POT, bits)
        quantizer = MovingAverageActivationQATQuantizer(config)
        qi.KerasActivationQuantizationHolder(quantizer).build((None,))
        quantizer.set_range(low, high)
        scale = float(quantizer.scale)
        clipped = (low, high) != ends(x)
        assert not clipped or high <= scale * (2 ** (bits - 1) - 1) < max(-2 * low, 2 * high)


@pytest.mark.parametrize("unit", [2.0**-80, 1.0, 2.0**100])
@pytest.mark.parametrize("method", SAMPLED)
def test_tiny_and_huge_numbers(method, unit, random):
    """Ranges scale with the numbers, whose squares float32 cannot hold."""
    x = laplace(random, 5000)
    expected = find_range(x, x.min(), x.max(), method, 4, UNIFORM)
    found = find_range(x * np.float32(unit), *np.multiply(unit, ends(x)), method, 4, UNIFORM)
    np.testing.assert_allclose(np.divide(found, unit), expected, rtol=1e-6)


def test_min_max_needs_no_samples():
    for method in ("minmax", "moving_average"):
        assert find_range([], -1.5, 3, method, 8, UNIFORM) == (-1.5, 3.0)
        assert find_range([2.0], 2, 3, method, 8, UNIFORM) == (0.0, 3.0)
        assert find_range([-2.0], -3, -2, method, 8, UNIFORM) == (-3.0, 0.0)
    for method in RANGE_METHODS:
        assert find_range([0.0, 0.0], 0, 0, method, 8, SYMMETRIC) == (0.0, 0.0)
        assert find_range([], -1, 2, method, 8, POT) == (-1.0, 2.0)


def test_percentile_is_numpys(random):
    x = laplace(random)
    found = find_range(x, x.min(), x.max(), "percentile", 8, UNIFORM)
    ordered = np.sort(x.astype("float64"))
    position = 0.0001 * (len(x) - 1)
    whole = int(position)
    for got, values in ((found[0], ordered), (found[1], ordered[::-1])):
        step = values[whole + 1] - values[whole]
        np.testing.assert_allclose(got, values[whole] + step * (position - whole), rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", SAMPLED)
def test_a_weight_is_a_number_of_equal_samples(method, bits, random):
    x = laplace(random, 2000)
    weights = random.integers(1, 4, size=len(x))
    found = find_range(x, *ends(x), method, bits, UNIFORM, weights)
    repeated = np.repeat(x, weights)
    wanted = find_range(repeated, *ends(x), method, bits, UNIFORM)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_many_samples_stand_for_the_same_as_few_with_weights(random):
    """Also where a part of them is searched, rare ones in the tails included."""
    x = np.concatenate([random.random(50000), np.full(15, 6)]).astype("float32")
    for samples, weights in ((x, None), (x[40000:], np.r_[np.full(10000, 5), np.ones(15)])):
        assert find_range(samples, 0, 6, "mse", 8, UNIFORM, weights) == (0, 6)


def migacz(x, levels):
    """The published search, in loops: |x| in 2048 bins, the first `i` of them in 128 levels."""
    counts, edges = np.histogram(np.abs(x), 2048, (0, np.abs(x).max()))
    divergences = {}
    for i in range(levels, 2049, 16):
        p = counts[:i].astype(float)
        p[-1] += counts[i:].sum()
        q = np.zeros(i)
        for level in range(levels):
            bins = [b for b in range(i) if b * levels // i == level and counts[b] > 0]
            for b in bins:
                q[b] = sum(counts[c] for c in bins) / len(bins)
        p, q = p / p.sum(), np.maximum(q / q.sum(), 1e-9)
        divergences[edges[i]] = np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))
    return divergences


@pytest.mark.parametrize("bits", [4, 5])
def test_entropy_is_the_published_search(bits, random):
    x = np.abs(laplace(random, 50000)) ** 1.2
    found = find_range(x, x.min(), x.max(), "entropy", bits, UNIFORM)
    divergences = migacz(x, 2**bits)
    # Neighbours on this curve differ by far more than chance, by where the bins' edges fall.
    nearest = sorted(divergences, key=lambda top: abs(top - found[1]))[:5]
    assert min(divergences[top] for top in nearest) <= min(divergences.values()) * 1.05
    assert found[1] < 0.7 * x.max()


def test_entropy_leaves_zeros_out(random):
    """Zeros, however many, are on every grid."""
    x = np.abs(laplace(random))
    padded = np.concatenate([x, np.zeros(10 * len(x), "float32")])
    alone, among = (find_range(v, 0, x.max(), "entropy", 8, UNIFORM) for v in (x, padded))
    assert alone == among


@pytest.mark.parametrize("method", ["mse", "entropy"])
@pytest.mark.parametrize("grid", GRIDS)
def test_few_bits_clip_more(method, grid, random):
    x = laplace(random)
    widths = [np.ptp(find_range(x, *ends(x), method, bits, grid)) for bits in (4, 8)]
    assert widths[0] < widths[1]


def test_bad_arguments():
    refused(ValueError, lambda: find_range([1.0], 0, 1, "max", 8, UNIFORM), "max", "entropy")
    bad = [([np.nan], 0, 1), ([1.0], -np.inf, 1), ([1.0], 0, np.nan), ([1.0], 2, 1)]
    for samples, low, high in bad:
        refused(ValueError, lambda a=samples, b=low, c=high: find_range(a, b, c, "mse", 8, POT))


def weight_error(weight, threshold, bits):
    """In float64, for thresholds that broadcast."""
    half = 2 ** (bits - 1)
    step = np.float64(threshold) / half
    return (np.clip(np.rint(weight / step), -half, half - 1) * step - weight) ** 2


@pytest.mark.parametrize("method", ["symmetric", POT])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_thresholds_have_nearly_the_least_error(method, bits, random):
    weight = random.normal(size=(3, 3, 20, 6)).astype("float32") * np.float32([1, 9, 1e-3, 2, 3, 4])
    found = weights_threshold(weight, (3,), bits, method)
    assert found.shape == (6,)
    assert found.dtype == np.float32
    widest = np.abs(weight).max((0, 1, 2)) * 2 ** (bits - 1) / (2 ** (bits - 1) - 1)
    if method == POT:
        widest = 2.0 ** np.ceil(np.log2(widest))
        np.testing.assert_array_equal(np.frexp(found)[0], 0.5)
    assert np.all(found <= widest * (1 + 1e-6))
    factors = 2.0 ** -np.arange(0, 4, 1 if method == POT else 0.02)
    tried = [weight_error(weight, widest * f, bits).sum((0, 1, 2)) for f in factors]
    errors = weight_error(weight, found, bits).sum((0, 1, 2))
    assert np.all(errors <= np.min(tried, axis=0) * 1.05)
    assert np.all(errors <= tried[0] * (1 + 1e-6))


def test_weight_thresholds_channel_by_channel(random, monkeypatch):
    """Each channel alone gives the same, on any axes and in blocks of any size."""
    weight = random.normal(size=(4, 5, 3)).astype("float32")
    found = weights_threshold(weight, (0, 2), 4, SYMMETRIC)
    assert found.shape == (4, 3)
    for i in range(4):
        for j in range(3):
            alone = weights_threshold(weight[i, :, j], None, 4, SYMMETRIC)
            assert alone.shape == ()
            assert alone == found[i, j]
    monkeypatch.setattr("keras_qwrap.numerics.search._BLOCK", 10)
    np.testing.assert_array_equal(weights_threshold(weight, (0, 2), 4, SYMMETRIC), found)
    np.testing.assert_array_equal(weights_threshold(weight, (0, -1), 4, SYMMETRIC), found)


def test_weight_thresholds_fit_the_quantizer(random):
    weight = random.normal(size=(5, 4)).astype("float32")
    for method in (SYMMETRIC, POT):
        found = weights_threshold(weight, -1, 4, method)
        config = qi.TrainableQuantizerWeightsConfig(method, 4, {"threshold": found})
        wrapper = qi.KerasQuantizationWrapper(
            layers.Dense(4), {"kernel": qi.STEWeightQATQuantizer(config)}
        )
        wrapper.build((None, 5))
        np.testing.assert_array_equal(
            wrapper.get_codes()["kernel"][1].ravel(), found / np.float32(8)
        )


@pytest.mark.parametrize("method", [SYMMETRIC, POT])
def test_dead_channels_have_the_floor(method):
    """Or one, without a floor; tiny ones are none of them."""
    weight = np.float32([[0, 1, 2.0**-60, 1e-40, 2.0**-126], [0, -2, 0, 0, 0]])
    found = weights_threshold(weight, -1, 8, method)
    assert found[0] == found[3] == 1
    assert 2.0**-60 <= found[2] <= 2.0**-59
    assert found[4] == 2.0**-119, "a step of 2**-126"
    floored = weights_threshold(weight, -1, 8, method, 2.0**-16)
    assert np.all(floored[[0, 2, 3, 4]] == 2.0**-16)
    assert weights_threshold(weight, -1, 8, method, 0.3)[0] == (0.5 if method == POT else 0.3)
    assert np.all(weights_threshold(weight * np.float32(2.0**100), -1, 8, method)[1:3] > 2.0**30)


@pytest.mark.parametrize("method", [SYMMETRIC, POT])
@pytest.mark.parametrize("axis", [-1, None])
def test_tiny_weights_are_searched_as_large_ones(method, axis, random):
    weight = random.normal(size=(200, 5)).astype("float32") * np.float32(2.0 ** np.arange(5))
    expected = weights_threshold(weight, axis, 4, method)
    for unit in (2.0**-30, 2.0**-100):
        found = weights_threshold(weight * np.float32(unit), axis, 4, method)
        np.testing.assert_array_equal(found, expected * np.float32(unit))


def test_bad_weights():
    weight = np.ones((2, 3), "float32")
    refused(ValueError, lambda: weights_threshold(weight * np.nan, -1, 8, SYMMETRIC), "finite")
    refused(ValueError, lambda: weights_threshold(weight, -1, 8, UNIFORM), "symmetric")
    refused(ValueError, lambda: weights_threshold(weight, 2, 8, SYMMETRIC), "axes")
    refused(ValueError, lambda: find_range([1.0], 0, 1, "mse", 8, "nearest"), "symmetric")
