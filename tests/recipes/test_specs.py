"""Specs: what they refuse, and the quantizers that are made from them."""

import keras
import numpy as np
import pytest
from reference import refused, same, to_numpy

import keras_qwrap as qi
from keras_qwrap.quantizers.moving_average import MovingAverageActivationQATQuantizer
from keras_qwrap.recipes.rules import (
    ActivationSpec,
    WeightsSpec,
    activation_quantizer,
    weights_quantizer,
)

M = qi.QuantizationMethod
METHODS = {"symmetric": M.SYMMETRIC, "power_of_two": M.POWER_OF_TWO, "uniform": M.UNIFORM}

BAD_SPECS = [
    (WeightsSpec, {"num_bits": 1}, ValueError, ["num_bits: received 1 ", "2 to 16"]),
    (WeightsSpec, {"num_bits": 17}, ValueError, ["num_bits: received 17 ", "2 to 16"]),
    (WeightsSpec, {"num_bits": "8"}, TypeError, ["num_bits: received '8'", "2 to 16"]),
    (WeightsSpec, {"method": "uniforn"}, ValueError, ["method: received 'uniforn'", "'uniform'."]),
    (WeightsSpec, {"method": M.LUT_SYM_QUANTIZER}, ValueError, ["'lut_sym_quantizer'"]),
    (WeightsSpec, {"method": qi.QuantizationTarget.Weights}, TypeError, ["method", "its name"]),
    (ActivationSpec, {"method": "asymmetric"}, ValueError, ["'asymmetric'", "Nearest: 'uniform'."]),
    (WeightsSpec, {"per_channel": 1}, TypeError, ["per_channel: received 1", "True or False"]),
    (WeightsSpec, {"range": "minmax"}, ValueError, ["range: received 'minmax'", "'weight', 'mse'"]),
    (
        WeightsSpec,
        {"method": "uniform", "range": "mse"},
        ValueError,
        ["range: received 'mse'", "method 'uniform'", "'symmetric' or 'power_of_two'"],
    ),
    (ActivationSpec, {"num_bits": 1}, ValueError, ["num_bits: received 1 ", "2 to 16"]),
    (ActivationSpec, {"method": "pot"}, ValueError, ["method: received 'pot'", "'power_of_two'"]),
    (ActivationSpec, {"range": "weight"}, ValueError, ["range: received 'weight'", "'minmax'"]),
    (ActivationSpec, {"range": "min_max"}, ValueError, ["range", "Nearest: 'minmax'"]),
    (ActivationSpec, {"range": None}, TypeError, ["range: received None", "'entropy'"]),
]


@pytest.mark.parametrize(("cls", "arguments", "error", "fragments"), BAD_SPECS)
def test_bad_specs_are_refused(cls, arguments, error, fragments):
    refused(error, lambda: cls(**arguments), *fragments)


@pytest.mark.parametrize("cls", [WeightsSpec, ActivationSpec])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_or_its_name_in_any_letters(cls, method):
    """Kept as the one name, so that specs are equal, and saved alike."""
    spec = cls(method=method)
    for given in (METHODS[method], method.upper(), method.title()):
        same_spec = cls(method=given)
        assert (same_spec, same_spec.method, type(same_spec.method)) == (spec, method, str)
        assert same_spec.get_config() == spec.get_config()
        assert hash(same_spec) == hash(spec)
        assert str(same_spec) == str(spec)


@pytest.mark.parametrize("cls", [WeightsSpec, ActivationSpec])
def test_texts(cls):
    assert str(cls()) == f"{cls.__name__}()"
    assert str(cls(4, method="power_of_two")) == (
        f"{cls.__name__}(num_bits=4, method='power_of_two')"
    )


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_weights_quantizer(method, per_channel):
    """Bits, method, channels and a range from the weight reach the grid."""
    spec = WeightsSpec(3, method, per_channel)
    quantizer = weights_quantizer(spec, -1, 2)
    layer = qi.KerasQuantizationWrapper(
        keras.layers.Dense(2, use_bias=False), {"kernel": quantizer}
    )
    layer.build((None, 3))
    layer.layer.kernel.assign([[-3.0, 0.125], [1.0, 0.25], [0.5, 0.75]])
    codes, scale, zero_point = layer.get_codes()["kernel"]
    scale = to_numpy(scale).ravel()
    expected = {
        ("symmetric", True): np.float32([3, 0.75]) * np.float32(1 / 3),
        ("symmetric", False): np.float32([3]) * np.float32(1 / 3),
        ("power_of_two", True): np.float32([1, 0.25]),
        ("power_of_two", False): np.float32([1]),
        ("uniform", True): np.float32([4, 0.75]) * np.float32(1 / 7),
        ("uniform", False): np.float32([4]) * np.float32(1 / 7),
    }[method, per_channel]
    same(scale, expected)
    assert np.max(codes) - np.min(codes) <= 7
    assert quantizer.quantization_config.quantization_method is METHODS[method]
    assert np.any(zero_point) == (method == "uniform")


@pytest.mark.parametrize(
    ("axes", "rank", "kept"),
    [
        (-1, 2, (1,)),
        (1, 2, (1,)),
        ((2, 3), 4, (2, 3)),
        ((-2, -1), 4, (2, 3)),
        (None, 2, None),
        (0, 1, None),
        ((0, 1), 2, None),
    ],
)
def test_channel_axes(axes, rank, kept):
    """Without an axis to share a range along, there is one range."""
    config = weights_quantizer(WeightsSpec(), axes, rank).quantization_config
    assert config.weights_per_channel_threshold == (kept is not None)
    if kept is not None:
        assert config.weights_channels_axis == kept


@pytest.mark.parametrize("method", ["symmetric", "power_of_two"])
def test_a_threshold_of_least_squared_error_is_given(method):
    quantizer = weights_quantizer(
        WeightsSpec(4, method, range="mse"), -1, 2, {"threshold": [1.0, 2.0]}
    )
    layer = qi.KerasQuantizationWrapper(keras.layers.Dense(2), {"kernel": quantizer})
    layer.build((None, 3))
    layer.layer.kernel.assign(np.full((3, 2), 100.0))
    same(layer.get_quantized_weights()["kernel"], np.float32([[0.875, 1.75]] * 3))


BAD_REQUESTS = [
    (WeightsSpec(range="mse"), -1, 2, None, ValueError, ["params", "None", "threshold", "mse"]),
    (WeightsSpec(range="mse"), -1, 2, {}, ValueError, ["params", "{}", "range='mse'"]),
    (WeightsSpec(), -1, 2, {"threshold": 1.0}, ValueError, ["params", "nothing with range 'weig"]),
    (WeightsSpec(), 2, 2, None, ValueError, ["channel_axis", "rank 2"]),
    (WeightsSpec(), "last", 2, None, TypeError, ["channel_axis", "'last'"]),
    (WeightsSpec(), (1, 0), 2, None, ValueError, ["channel_axis", "ascending"]),
    (WeightsSpec(range="mse"), -1, 2, {"range_max": 1}, ValueError, ["range_max", "threshold"]),
]


@pytest.mark.parametrize(("spec", "axes", "rank", "params", "error", "fragments"), BAD_REQUESTS)
def test_what_does_not_fit_is_refused(spec, axes, rank, params, error, fragments):
    refused(error, lambda: weights_quantizer(spec, axes, rank, params), *fragments)


@pytest.mark.parametrize("method", METHODS)
def test_activation_quantizer(method):
    quantizer = activation_quantizer(ActivationSpec(3, method))
    assert type(quantizer) is MovingAverageActivationQATQuantizer
    config = qi.TrainableQuantizerActivationConfig(METHODS[method], 3)
    assert quantizer.quantization_config == config


def test_an_activation_quantizer_is_on_the_grid_of_its_spec():
    holder = qi.KerasActivationQuantizationHolder(activation_quantizer(ActivationSpec(2)))
    x = keras.ops.array([[0.0, 0.9, 1.6, 3.0]])
    same(holder(x), np.float32([[0.0, 0.9, 1.6, 3.0]]))
    same(holder(x, training=True), np.float32([[0, 1, 2, 3]]))
    same(holder(x), np.float32([[0, 1, 2, 3]]))
