"""The contract of the wrapper around every kind of layer, a row each."""

import pytest
from layer_cases import CASES

from keras_qwrap.testing import check_wrapper


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layer_keeps_the_contract(case):
    """Output, gradients, conversion and both file formats; see `check_wrapper`."""
    check_wrapper(case.layer(), case.inputs, case.weights, case.outputs, case.call)


def test_matrix_is_wide():
    assert len({case.name for case in CASES}) == len(CASES) >= 36
    assert len({type(case.layer()) for case in CASES}) >= 30
