"""The contract of the wrapper around every kind of layer, a row each."""

import pytest
from layer_cases import CASES

from keras_qwrap.testing import check_wrapper

ORDER_OF_SUMS = ("gru", "lstm_initial_state")
"""PyTorch sums a frozen layer's products with time-major inputs in another order than a trainable
layer's, also without a wrapper, and a converted layer is frozen."""

QUICK = ("conv2d", "dense", "depthwise_conv2d", "multi_head_attention", "simple_rnn")
"""One row for each way to hold weights; all together take a minute."""


def _row(case):
    marks = [pytest.mark.tensorflow] if case.name in ORDER_OF_SUMS else []
    marks += [pytest.mark.slow] if case.name not in QUICK else []
    return pytest.param(case, id=case.name, marks=marks)


@pytest.mark.parametrize("case", [_row(case) for case in CASES])
def test_layer_keeps_the_contract(case):
    """Output, gradients, conversion and both file formats; see `check_wrapper`."""
    check_wrapper(case.layer(), case.inputs, case.weights, case.outputs, case.call)


def test_matrix_is_wide():
    assert set(QUICK) <= {case.name for case in CASES}
    assert len({case.name for case in CASES}) == len(CASES) >= 36
    assert len({type(case.layer()) for case in CASES}) >= 30
