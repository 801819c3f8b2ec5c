"""Seeds and strictness that every test shares.

TEST_SEED=<number> changes the seed, and lets hypothesis search anew instead of repeating itself.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import hypothesis
import keras
import numpy as np
import pytest

SEED = int(os.environ.get("TEST_SEED", "0"))

collect_ignore = [] if keras.backend.backend() == "jax" else ["test_distribution_jax.py"]
"""Tests of what only another backend has."""

hypothesis.settings.register_profile(
    "keras_qwrap",
    deadline=None,
    database=None,
    derandomize="TEST_SEED" not in os.environ,
    print_blob=True,
)
hypothesis.settings.load_profile("keras_qwrap")


def pytest_report_header() -> str:
    return f"seed: TEST_SEED={SEED}, Keras backend: {keras.backend.backend()}"


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds every random number generator; printed by the header and with a failing test."""
    print(f"TEST_SEED={SEED}")
    keras.utils.set_random_seed(SEED)
    return SEED


@pytest.fixture
def random(seed: int) -> np.random.Generator:
    """A generator of its own for each test."""
    return np.random.default_rng(seed)
