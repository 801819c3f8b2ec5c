"""The values that calibration keeps of an activation, and what each stands for."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_qwrap.calibration import calibrate as calibration


def batch(values, weight=1.0):
    values = np.sort(np.asarray(values, "float32"))
    size = round(len(values) * weight)
    return calibration._Batch(values[[0, -1]], False, size, values, np.full(len(values), weight))


def seen_of(batches):
    seen = calibration._Seen("x", 0.9)
    for each in batches:
        seen.add(each)
    return seen.summary("minmax")


@settings(max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_all_values_are_kept_while_there_is_room(sizes):
    values = np.arange(1, sum(sizes) + 1, dtype="float32")
    parts = np.split(values, np.cumsum(sizes)[:-1])
    kept, weights, low, high = seen_of(map(batch, parts))
    assert (low, high) == (1, len(values))
    np.testing.assert_array_equal(kept, values)
    np.testing.assert_array_equal(weights, np.ones(len(values)))


def test_a_part_stands_for_all_and_the_outermost_for_themselves(monkeypatch):
    monkeypatch.setattr(calibration, "_RESERVOIR", 6400)
    values = np.random.default_rng(0).permutation(100_000).astype("float32")
    kept, weights, low, high = seen_of(map(batch, np.split(values, 100)))
    assert (low, high) == (0, 99_999)
    assert len(kept) <= 6400
    assert len(set(kept)) == len(kept)
    np.testing.assert_array_equal(kept[:50], np.arange(50))
    np.testing.assert_array_equal(kept[-50:], np.arange(99_950, 100_000))
    np.testing.assert_array_equal(weights[[*range(50), *range(-50, 0)]], np.ones(100))
    fifths = np.histogram(kept, 5, (0, 100_000), weights=weights)[0]
    np.testing.assert_allclose(fifths, 20_000, rtol=0.1)


def test_weights_count_not_batches(monkeypatch):
    """Few values that stand for many, then many that stand for themselves, and the other way."""
    monkeypatch.setattr(calibration, "_RESERVOIR", 6400)
    heavy = [batch(np.arange(500) + 500 * i, 64) for i in range(10)]
    light = [batch(1e5 + np.arange(4000) + 4000 * i) for i in range(10)]
    for order in (heavy + light, light + heavy):
        kept, weights, *_ = seen_of(order)
        assert len(kept) <= 6400
        np.testing.assert_allclose(weights[kept < 1e5].sum(), 320_000, rtol=0.05)
        np.testing.assert_allclose(weights[kept >= 1e5].sum(), 40_000, rtol=0.2)
