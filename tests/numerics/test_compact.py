"""Long lists in configs: shorter, and the same floats."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import refused, shortest

from keras_qwrap.numerics.compact import compact, expand

NUMBERS = st.floats(width=32, allow_nan=False)


@given(st.lists(NUMBERS, max_size=40), st.booleans())
def test_nothing_is_lost(numbers, short):
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
