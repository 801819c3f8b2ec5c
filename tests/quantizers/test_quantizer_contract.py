"""The public contract check, a row for each class and mode of quantizer."""

import keras
import numpy as np
import pytest

import keras_qwrap as qi
from keras_qwrap.testing import check_quantizer

M = qi.QuantizationMethod


def weights(method, bits=8, params=None, **kwargs):
    config = qi.TrainableQuantizerWeightsConfig(method, bits, params or {}, **kwargs)
    uniform = config.quantization_method is M.UNIFORM
    return (qi.STEUniformWeightQATQuantizer if uniform else qi.STEWeightQATQuantizer)(config)


def activation(method, bits, params):
    config = qi.TrainableQuantizerActivationConfig(method, bits, params)
    uniform = config.quantization_method is M.UNIFORM
    return (qi.STEUniformActivationQATQuantizer if uniform else qi.STEActivationQATQuantizer)(
        config
    )


def moving_average(method, bits):
    params = {"range_min": -1.1, "range_max": 1.7}
    config = qi.TrainableQuantizerActivationConfig(method, bits, params)
    return qi.MovingAverageActivationQATQuantizer(config)


LAST = {"per_channel": True, "channel_axis": -1, "input_rank": 3}
BOTH = {"per_channel": True, "channel_axis": (0, 2), "input_rank": 3}
FOUR = [0.5, 1.0, 2.0, 4.0]
PER_TENSOR = {"weights_per_channel_threshold": False}
TABLE = [-100, -3, 20, 5]
ROWS = {
    "weights symmetric": qi.WeightsSymmetricInferableQuantizer(8, 1.7, False),
    "weights symmetric channels": qi.WeightsSymmetricInferableQuantizer(4, FOUR, **LAST),
    "weights symmetric two axes": qi.WeightsSymmetricInferableQuantizer(4, [FOUR] * 2, **BOTH),
    "weights symmetric narrow": qi.WeightsSymmetricInferableQuantizer(2, 1.7, False, narrow=True),
    "weights symmetric 16 bits": qi.WeightsSymmetricInferableQuantizer(16, 1.7, False),
    "weights pot": qi.WeightsPOTInferableQuantizer(8, 2.0, False),
    "weights pot channels": qi.WeightsPOTInferableQuantizer(3, FOUR, **LAST),
    "weights uniform": qi.WeightsUniformInferableQuantizer(8, -1.1, 2.3, False),
    "weights uniform channels": qi.WeightsUniformInferableQuantizer(2, [-1.0] * 4, FOUR, **LAST),
    "activation symmetric signed": qi.ActivationSymmetricInferableQuantizer(8, 2.9, True),
    "activation symmetric unsigned": qi.ActivationSymmetricInferableQuantizer(4, 2.9, False),
    "activation pot signed": qi.ActivationPOTInferableQuantizer(8, 2.0, True),
    "activation pot unsigned": qi.ActivationPOTInferableQuantizer(2, 4.0, False),
    "activation uniform": qi.ActivationUniformInferableQuantizer(8, -1.3, 2.7),
    "ste symmetric": weights(M.SYMMETRIC),
    "ste symmetric per tensor": weights(M.SYMMETRIC, 4, **PER_TENSOR),
    "ste symmetric two axes": weights(M.SYMMETRIC, 2, weights_channels_axis=(0, 2)),
    "ste symmetric given": weights(M.SYMMETRIC, 4, {"threshold": FOUR}),
    "ste symmetric floor": weights(M.SYMMETRIC, 8, min_threshold=5.0),
    "ste pot": weights(M.POWER_OF_TWO, 4),
    "ste pot given": weights(M.POWER_OF_TWO, 8, {"threshold": 2.0}, **PER_TENSOR),
    "ste uniform": weights(M.UNIFORM, 8),
    "ste uniform first axis": weights(M.UNIFORM, 3, weights_channels_axis=0),
    "ste uniform given": weights(M.UNIFORM, 4, {"range_min": [-1.0] * 4, "range_max": FOUR}),
    "ste activation symmetric": activation(M.SYMMETRIC, 8, {"threshold": 2.9}),
    "ste activation pot": activation(M.POWER_OF_TWO, 4, {"threshold": 4.0, "is_signed": False}),
    "ste activation uniform": activation(M.UNIFORM, 8, {"range_min": -1.0, "range_max": 2.0}),
    "moving average symmetric": moving_average(M.SYMMETRIC, 4),
    "moving average pot": moving_average(M.POWER_OF_TWO, 8),
    "moving average uniform": moving_average(M.UNIFORM, 3),
}
QUICK = ("weights symmetric channels", "activation pot signed", "ste uniform", "moving average pot")
LOOKUP_ROWS = {
    "weights lookup": qi.WeightsLUTSymmetricInferableQuantizer(2, TABLE, 1.7, False),
    "weights lookup channels": qi.WeightsLUTSymmetricInferableQuantizer(
        2, TABLE, FOUR, **LAST, lut_values_bitwidth=9, eps=0.1
    ),
    "weights lookup pot": qi.WeightsLUTPOTInferableQuantizer(3, TABLE, FOUR, **LAST),
    "activation lookup pot signed": qi.ActivationLutPOTInferableQuantizer(2, TABLE, 2.0, True),
    "activation lookup pot unsigned": qi.ActivationLutPOTInferableQuantizer(
        2, [0, 200, 30], 4.0, False
    ),
}


def inputs(random):
    return random.normal(size=(2, 3, 4)).astype("float32")


@pytest.mark.parametrize(
    "row", [row if row in QUICK else pytest.param(row, marks=pytest.mark.slow) for row in ROWS]
)
def test_contract(row, random):
    check_quantizer(ROWS[row], inputs(random))


@pytest.mark.slow
@pytest.mark.parametrize("row", LOOKUP_ROWS)
def test_contract_of_lookup(row, random):
    """Its grid does not promise that quantizing twice changes nothing."""
    check_quantizer(LOOKUP_ROWS[row], inputs(random), idempotent=False)


def test_there_is_a_row_for_every_class():
    classes = {type(quantizer) for quantizer in (ROWS | LOOKUP_ROWS).values()}
    public = {
        value
        for name, value in vars(qi).items()
        if name.endswith("Quantizer") and not name.startswith("Base")
    }
    assert classes == public


@pytest.mark.parametrize("shape", [(5,), (2, 1, 3, 2)])
def test_contract_at_other_ranks(shape, random):
    check_quantizer(weights(M.SYMMETRIC, 4), random.normal(size=shape), seed=1)


@keras.saving.register_keras_serializable("test_quantizer_contract")
class Broken(qi.WeightsSymmetricInferableQuantizer):
    """Keeps the contract; each subclass breaks one promise."""


def breaking(**members):
    cls = type("Broken", (Broken,), members)
    return keras.saving.register_keras_serializable("test_quantizer_contract")(cls)


def off_the_grid(self, x):
    return Broken.__call__(self, x) * 1.0001


def other_codes(self, x):
    return np.minimum(Broken.quantize_to_codes(self, x), 3)


def wide_codes(self, x):
    return Broken.quantize_to_codes(self, x) * 40


def always_float32(self, x):
    return keras.ops.cast(Broken.__call__(self, x), "float32")


def no_gradient(self, x):
    return keras.ops.stop_gradient(Broken.__call__(self, x)) + x * 0.0


def a_threshold_more(self):
    return Broken.get_config(self) | {"threshold": 9.0}


@pytest.mark.parametrize(
    ("members", "promise"),
    [
        ({"__call__": off_the_grid}, "outputs are the values of their codes"),
        ({"quantize_to_codes": other_codes}, "outputs are the values of their codes"),
        ({"quantize_to_codes": wide_codes}, "codes fit into 4 bits"),
        ({"__call__": always_float32}, "the output's dtype is the input's"),
        ({"__call__": no_gradient}, "training moves"),
        ({"get_config": a_threshold_more}, "config"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_broken_promise_is_found(members, promise, random):
    """The check itself must be able to fail."""
    quantizer = breaking(**members)(4, 2.0, False)
    with pytest.raises(AssertionError, match=promise):
        check_quantizer(quantizer, inputs(random))
