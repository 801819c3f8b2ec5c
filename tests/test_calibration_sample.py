"""The sample of an activation's values that calibration keeps."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_qwrap import calibration


@settings(max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 16))
def test_sample_is_complete_or_uniform(sizes, capacity):
    """Every value once while there is room; then a part of them, none twice."""
    before = calibration._RESERVOIR
    calibration._RESERVOIR = capacity
    try:
        seen = calibration._Seen("x", 0.9)
        values = np.arange(1, sum(sizes) + 1, dtype="float32")
        for part in np.split(values, np.cumsum(sizes)[:-1]):
            seen.add(np.array([part[0], part[-1], len(part)]), part)
        samples, low, high = seen.summary("minmax")
    finally:
        calibration._RESERVOIR = before
    assert (low, high) == (1, len(values))
    assert len(samples) == min(capacity, len(values))
    assert len(set(samples)) == len(samples)
    assert set(samples) <= set(values)


def test_sample_has_no_preference_for_early_or_late_batches(monkeypatch):
    monkeypatch.setattr(calibration, "_RESERVOIR", 2000)
    seen = calibration._Seen("x", 0.9)
    for i in range(50):
        part = np.arange(1000 * i, 1000 * (i + 1), dtype="float32")
        seen.add(np.array([part[0], part[-1], 1000]), part)
    samples = seen.summary("minmax")[0]
    fifths = np.histogram(samples, 5, (0, 50000))[0]
    assert np.all(np.abs(fifths - 400) < 80), fifths
