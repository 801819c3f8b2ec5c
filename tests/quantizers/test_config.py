"""The two configurations: every argument kept, checked, and read by a quantizer."""

import inspect
import json

import keras
import numpy as np
import pytest
from keras import ops
from reference import refused

import keras_qwrap as qi

M = qi.QuantizationMethod
WEIGHTS = {
    "weights_quantization_method": M.UNIFORM,
    "weights_n_bits": 3,
    "weights_quantization_params": {"range_min": [-1.0, -2.0], "range_max": [0.5, 1.5]},
    "enable_weights_quantization": False,
    "weights_channels_axis": (0, 2),
    "weights_per_channel_threshold": False,
    "min_threshold": 0.25,
}
ACTIVATION = {
    "activation_quantization_method": M.SYMMETRIC,
    "activation_n_bits": 3,
    "activation_quantization_params": {"threshold": 2.0, "is_signed": False},
    "enable_activation_quantization": False,
    "min_threshold": 0.25,
}
BOTH = [
    pytest.param(qi.TrainableQuantizerWeightsConfig, WEIGHTS, id="weights"),
    pytest.param(qi.TrainableQuantizerActivationConfig, ACTIVATION, id="activation"),
]


def test_the_seeds_names_are_the_same_classes():
    assert qi.NodeWeightsQuantizationConfig is qi.TrainableQuantizerWeightsConfig
    assert qi.NodeActivationQuantizationConfig is qi.TrainableQuantizerActivationConfig


def test_methods_and_targets():
    methods = ["POWER_OF_TWO", "SYMMETRIC", "UNIFORM", "LUT_POT_QUANTIZER", "LUT_SYM_QUANTIZER"]
    assert sorted(M.__members__) == sorted(methods)
    assert sorted(qi.QuantizationTarget.__members__) == ["Activation", "Weights"]


@pytest.mark.parametrize(("cls", "arguments"), BOTH)
def test_every_argument_is_kept(cls, arguments):
    """Each differs from its default, and comes back from JSON and from Keras."""
    parameters = inspect.signature(cls).parameters
    assert set(arguments) == set(parameters)
    least = cls(next(iter(arguments.values())))
    config = cls(**arguments)
    for name, value in arguments.items():
        assert getattr(config, name) == value
        if parameters[name].default is not inspect.Parameter.empty:
            assert getattr(least, name) != value
    plain = config.get_config()
    assert set(plain) == set(parameters)
    copies = [
        cls.from_config(json.loads(json.dumps(plain))),
        keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(config)),
        cls(*arguments.values()),
    ]
    for copy in copies:
        assert copy == config
        assert copy.get_config() == plain


@pytest.mark.parametrize(("cls", "arguments"), BOTH)
def test_a_config_is_fixed_and_owns_its_params(cls, arguments):
    (name,) = (name for name in arguments if name.endswith("params"))
    params = {"threshold": np.float32([1.5, 2.5])}
    config = cls(**arguments | {name: params})
    params["threshold"][0] = 99
    params["more"] = 1
    config.get_config()[name]["threshold"] = 0
    assert getattr(config, name) == {"threshold": [1.5, 2.5]}
    with pytest.raises(AttributeError):
        config.min_threshold = 1.0


@pytest.mark.parametrize(
    "value",
    [
        np.float32([1.5, 2.5]),
        (1.5, 2.5),
        [np.float64(1.5), np.float32(2.5)],
        ops.array([1.5, 2.5]),
    ],
    ids=["array", "tuple", "numpy scalars", "tensor"],
)
def test_params_become_plain_numbers(value):
    """Only such survive in `.keras` and `.h5` files alike."""
    config = qi.TrainableQuantizerWeightsConfig(M.SYMMETRIC, 8, {"threshold": value})
    threshold = config.weights_quantization_params["threshold"]
    assert threshold == [1.5, 2.5]
    assert [type(number) for number in threshold] == [float, float]


def test_axes_are_a_tuple():
    for axis, kept in ((-1, (-1,)), ([0, 1], (0, 1)), ((2,), (2,)), (np.int64(3), (3,))):
        config = qi.TrainableQuantizerWeightsConfig(M.SYMMETRIC, weights_channels_axis=axis)
        assert config.weights_channels_axis == kept


def test_methods_may_be_given_by_name():
    assert qi.TrainableQuantizerWeightsConfig("UNIFORM").quantization_method is M.UNIFORM
    assert qi.TrainableQuantizerActivationConfig("UNIFORM").quantization_method is M.UNIFORM
    for method in M:
        for name in (method.name, method.name.lower(), method.name.title()):
            for cls in (
                qi.TrainableQuantizerWeightsConfig,
                qi.TrainableQuantizerActivationConfig,
            ):
                config = cls(name)
                assert config == cls(method)
                assert config.quantization_method is method
                assert config.get_config() == cls(method).get_config()


METHOD = [
    (8, TypeError, ["received 8", "QuantizationMethod", "POWER_OF_TWO, SYMMETRIC, UNIFORM"]),
    ("asymmetric", TypeError, ["'asymmetric'", "QuantizationMethod", "Nearest: 'UNIFORM'."]),
    ("symetric", TypeError, ["'symetric'", "QuantizationMethod", "POWER_OF_TWO, SYMMETRIC"]),
    (None, TypeError, ["None", "QuantizationMethod"]),
    (qi.QuantizationTarget.Weights, TypeError, ["Target.Weights", "QuantizationMethod"]),
]
BITS = [
    (1, ValueError, ["received 1", "2 to 16"]),
    (17, ValueError, ["received 17", "2 to 16"]),
    (8.5, TypeError, ["8.5", "2 to 16"]),
    (True, TypeError, ["True", "2 to 16"]),
    ("8", TypeError, ["'8'", "2 to 16"]),
]
PARAMS = [
    ([1.0], TypeError, ["[1.0]", "dictionary"]),
    (1.0, TypeError, ["1.0", "dictionary"]),
    ({1: 2.0}, TypeError, ["{1: 2.0}", "string keys"]),
]
FLAG = [
    (1, TypeError, ["received 1", "True or False"]),
    ("yes", TypeError, ["'yes'", "True or False"]),
]
AXIS = [
    (None, TypeError, ["None", "int or a tuple of ints"]),
    (1.0, TypeError, ["1.0", "int or a tuple of ints"]),
    ((), TypeError, ["()", "int or a tuple of ints"]),
    ((0, "1"), TypeError, ["(0, '1')", "int or a tuple of ints"]),
]
FLOOR = [
    (-1.0, ValueError, ["-1.0", "not negative"]),
    (np.nan, ValueError, ["nan", "finite"]),
    ([1.0, 2.0], ValueError, ["[1.0, 2.0]", "one number"]),
    ("1", TypeError, ["'1'", "real numbers"]),
]
KINDS = [
    ("method", METHOD),
    ("n_bits", BITS),
    ("params", PARAMS),
    ("enable", FLAG),
    ("channels_axis", AXIS),
    ("per_channel", FLAG),
    ("min_threshold", FLOOR),
]
BAD = [
    pytest.param(cls, arguments, name, *row, id=f"{name}={row[0]}")
    for cls, arguments in (parameter.values for parameter in BOTH)
    for name in arguments
    for kind, rows in KINDS
    if kind in name
    for row in rows
]


@pytest.mark.parametrize(("cls", "arguments", "name", "value", "error", "fragments"), BAD)
def test_bad_arguments_are_refused(cls, arguments, name, value, error, fragments):
    refused(error, lambda: cls(**arguments | {name: value}), f"{name}: received", *fragments)


@pytest.mark.parametrize("value", [0, 0.0, 1e-40, 2.0**-16, np.float32(0.5)])
@pytest.mark.parametrize(("cls", "arguments"), BOTH)
def test_any_floor_will_do(cls, arguments, value):
    config = cls(**arguments | {"min_threshold": value})
    assert config.min_threshold == float(value)
    assert cls.from_config(config.get_config()) == config
    assert cls(M.UNIFORM).min_threshold == 0


def test_every_argument_has_bad_rows():
    tested = {(parameter.values[0], parameter.values[2]) for parameter in BAD}
    assert len(tested) == len(WEIGHTS) + len(ACTIVATION)


def test_candidates_of_a_bit_search_are_no_argument():
    with pytest.raises(TypeError, match="weights_quantization_candidates"):
        qi.TrainableQuantizerWeightsConfig(M.SYMMETRIC, weights_quantization_candidates=[])


def test_texts_are_short():
    cls = qi.TrainableQuantizerWeightsConfig
    assert repr(cls(M.SYMMETRIC)) == "TrainableQuantizerWeightsConfig('SYMMETRIC', 8)"
    config = cls(M.UNIFORM, 4, {"range_min": [-1.0] * 1000, "range_max": 2.0})
    assert repr(config) == (
        "TrainableQuantizerWeightsConfig('UNIFORM', 4, weights_quantization_params="
        "{'range_max': 2.0, 'range_min': [-1.0, -1.0, -1.0, -1.0, ...]})"
    )
    for config in (
        cls(M.SYMMETRIC, 3, {"threshold": 2.0}, False, (0, 1), False, 0.25),
        qi.TrainableQuantizerActivationConfig(M.POWER_OF_TWO, 5, {"threshold": 2.0}, False, 0.5),
    ):
        assert eval(repr(config), vars(qi)) == config
