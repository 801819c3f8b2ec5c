"""Classes are found by their registered names, and by the names that users of MCT know."""

import inspect
import json

import keras
import numpy as np
import pytest

import keras_qwrap as qi
from keras_qwrap import testing
from keras_qwrap.quantizers import inferable

INFERABLE = [
    "ActivationLutPOTInferableQuantizer",
    "ActivationPOTInferableQuantizer",
    "ActivationSymmetricInferableQuantizer",
    "ActivationUniformInferableQuantizer",
    "WeightsLUTPOTInferableQuantizer",
    "WeightsLUTSymmetricInferableQuantizer",
    "WeightsPOTInferableQuantizer",
    "WeightsSymmetricInferableQuantizer",
    "WeightsUniformInferableQuantizer",
]
SERIALIZABLE = [
    *INFERABLE,
    "KerasActivationQuantizationHolder",
    "KerasQuantizationWrapper",
    "MovingAverageActivationQATQuantizer",
    "QuantizedModel",
    "STEActivationQATQuantizer",
    "STEUniformActivationQATQuantizer",
    "STEUniformWeightQATQuantizer",
    "STEWeightQATQuantizer",
    "TrainableQuantizerActivationConfig",
    "TrainableQuantizerWeightsConfig",
]
"""Names that saved files hold; a name may be added here, but never be changed or dropped."""


def quantized_model() -> keras.Model:
    config = qi.TrainableQuantizerWeightsConfig(qi.QuantizationMethod.SYMMETRIC, 4)
    wrapper = qi.KerasQuantizationWrapper(
        keras.layers.Dense(2, name="dense"), {"kernel": qi.STEWeightQATQuantizer(config)}
    )
    quantizer = qi.ActivationUniformInferableQuantizer(8, -1.0, 2.0)
    holder = qi.KerasActivationQuantizationHolder(quantizer)
    return keras.Sequential([keras.Input((3,)), holder, wrapper])


def test_custom_objects_are_the_serializable_classes():
    """Not those of what a program may import besides."""
    assert keras.saving.get_registered_object(f"keras_qwrap>{testing._Weight.__name__}")
    expected = {f"keras_qwrap>{name}": getattr(qi, name) for name in SERIALIZABLE}
    assert qi.custom_objects() == expected


@pytest.mark.parametrize("name", SERIALIZABLE)
def test_registered_under_package_and_name(name):
    cls = getattr(qi, name)
    assert keras.saving.get_registered_name(cls) == f"keras_qwrap>{name}"
    assert keras.saving.get_registered_object(f"keras_qwrap>{name}") is cls


def test_custom_objects_gives_a_new_dictionary():
    qi.custom_objects().clear()
    assert qi.custom_objects()


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_custom_objects_stand_in_for_registration(ending, tmp_path, monkeypatch):
    """The registry is emptied, as in a process where something else cleared it."""
    model, path = quantized_model(), tmp_path / f"model.{ending}"
    model.save(path)
    objects = qi.custom_objects()
    for name in objects:
        monkeypatch.delitem(keras.saving.get_custom_objects(), name)
    with pytest.raises((TypeError, ValueError), match="KerasActivationQuantizationHolder"):
        keras.models.load_model(path, compile=False)
    loaded = keras.models.load_model(path, custom_objects=objects, compile=False)
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    assert np.array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


METHOD = qi.QuantizationMethod
CHANNELS = {"per_channel": True, "channel_axis": 1, "input_rank": 2}
WEIGHTS_CONFIG = {
    "weights_quantization_method": METHOD.POWER_OF_TWO,
    "weights_n_bits": 5,
    "weights_quantization_params": {"threshold": [2.0, 0.5, 1.0]},
    "enable_weights_quantization": False,
    "weights_channels_axis": (1,),
    "weights_per_channel_threshold": False,
    "min_threshold": 2.0**-10,
}
ACTIVATION_CONFIG = {
    "activation_quantization_method": METHOD.POWER_OF_TWO,
    "activation_n_bits": 5,
    "activation_quantization_params": {"threshold": 2.0, "is_signed": False},
    "enable_activation_quantization": False,
    "min_threshold": 2.0**-10,
}


def weights_config(method, params):
    values = {"weights_quantization_method": method, "weights_quantization_params": params}
    return qi.TrainableQuantizerWeightsConfig(**WEIGHTS_CONFIG | ENABLED_WEIGHTS | values)


def activation_config(method, params):
    values = {"activation_quantization_method": method, "activation_quantization_params": params}
    enabled = {"enable_activation_quantization": True}
    return qi.TrainableQuantizerActivationConfig(**ACTIVATION_CONFIG | enabled | values)


ENABLED_WEIGHTS = {"enable_weights_quantization": True, "weights_per_channel_threshold": True}
SYMMETRIC = {"num_bits": 5, "threshold": [0.3, 0.5, 2.5]} | CHANNELS
POWER_OF_TWO = {"num_bits": 5, "threshold": [0.25, 0.5, 2.0]} | CHANNELS
TABLE = {"lut_values": [12, -9, 0, 3], "lut_values_bitwidth": 6, "eps": 2.0**-10}
UNIFORM = {"num_bits": 5, "min_range": [-0.3, -1.0, 0.0], "max_range": [0.5, 2.0, 1.0]} | CHANNELS
BOUNDS = {"range_min": [-0.5, -1.0, -2.0], "range_max": [0.5, 2.0, 1.0]}

ARGUMENTS = {
    "ActivationLutPOTInferableQuantizer": {"num_bits": 3, "threshold": 4.0, "signed": True} | TABLE,
    "ActivationPOTInferableQuantizer": {"num_bits": 5, "threshold": 4.0, "signed": False},
    "ActivationSymmetricInferableQuantizer": {"num_bits": 5, "threshold": 0.3, "signed": False},
    "ActivationUniformInferableQuantizer": {"num_bits": 5, "min_range": -0.3, "max_range": 1.7},
    "WeightsLUTPOTInferableQuantizer": POWER_OF_TWO | TABLE,
    "WeightsLUTSymmetricInferableQuantizer": SYMMETRIC | TABLE,
    "WeightsPOTInferableQuantizer": POWER_OF_TWO | {"narrow": True},
    "WeightsSymmetricInferableQuantizer": SYMMETRIC | {"narrow": True},
    "WeightsUniformInferableQuantizer": UNIFORM,
    "MovingAverageActivationQATQuantizer": {
        "quantization_config": activation_config(METHOD.SYMMETRIC, {}),
        "momentum": 0.25,
        "range_method": "percentile",
        "pass_whole_numbers": True,
    },
    "STEActivationQATQuantizer": {
        "quantization_config": activation_config(METHOD.SYMMETRIC, {"threshold": 0.3})
    },
    "STEUniformActivationQATQuantizer": {
        "quantization_config": activation_config(
            METHOD.UNIFORM, {"range_min": -0.3, "range_max": 0.7}
        )
    },
    "STEUniformWeightQATQuantizer": {"quantization_config": weights_config(METHOD.UNIFORM, BOUNDS)},
    "STEWeightQATQuantizer": {
        "quantization_config": weights_config(METHOD.SYMMETRIC, {"threshold": [0.3, 0.5, 2.5]})
    },
    "TrainableQuantizerActivationConfig": ACTIVATION_CONFIG,
    "TrainableQuantizerWeightsConfig": WEIGHTS_CONFIG,
}
"""Every argument of every class, none at its default."""


def plain(value):
    """An argument as its config should hold it."""
    if isinstance(value, METHOD):
        return value.name
    if isinstance(value, float):
        return float(np.float32(value))
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def rebuilt(thing):
    text = json.dumps(keras.saving.serialize_keras_object(thing))
    return keras.saving.deserialize_keras_object(json.loads(text))


def test_every_argument_is_tried_at_another_value_than_its_default():
    layers = {"KerasQuantizationWrapper", "KerasActivationQuantizationHolder", "QuantizedModel"}
    assert set(ARGUMENTS) | layers == set(SERIALIZABLE)
    for name, arguments in ARGUMENTS.items():
        parameters = inspect.signature(getattr(qi, name)).parameters
        assert set(parameters) == set(arguments)
        assert not [k for k, v in arguments.items() if v == parameters[k].default]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_config_loses_nothing(name):
    thing = getattr(qi, name)(**ARGUMENTS[name])
    config = thing.get_config()
    if "quantization_config" in ARGUMENTS[name]:
        inner = config["quantization_config"]["config"]
        assert inner == ARGUMENTS[name]["quantization_config"].get_config()
    else:
        assert plain(config) == plain(ARGUMENTS[name])
    again = rebuilt(thing)
    assert type(again) is type(thing)
    assert again.get_config() == config


@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize("name", [name for name in ARGUMENTS if "Quantizer" in name[-9:]])
def test_a_quantizer_survives_a_file(name, ending, tmp_path):
    quantizer = getattr(qi, name)(**ARGUMENTS[name])
    if quantizer.quantization_target is qi.QuantizationTarget.Weights:
        layer = qi.KerasQuantizationWrapper(keras.layers.Dense(3), {"kernel": quantizer})
    else:
        layer = qi.KerasActivationQuantizationHolder(quantizer)
    model = keras.Sequential([keras.Input((4,)), layer])
    model.save(tmp_path / f"model.{ending}")
    loaded = qi.keras_load_quantized_model(tmp_path / f"model.{ending}", compile=False)
    assert plain(loaded.layers[0].get_config()) == plain(layer.get_config())
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    expected = keras.ops.convert_to_numpy(model(x))
    assert len(np.unique(expected)) > 2
    assert np.array_equal(keras.ops.convert_to_numpy(loaded(x)), expected)


def test_seed_name_of_the_inferable_quantizers():
    assert qi.keras_inferable_quantizers is inferable
    for name in INFERABLE:
        assert getattr(qi.keras_inferable_quantizers, name) is getattr(qi, name)


def test_seed_names_of_the_configs():
    assert qi.NodeWeightsQuantizationConfig is qi.TrainableQuantizerWeightsConfig
    assert qi.NodeActivationQuantizationConfig is qi.TrainableQuantizerActivationConfig


def test_public_names_are_sorted_and_complete():
    """Complete: everything that the package's `__init__` imports or defines without `_`."""
    assert qi.__all__ == sorted(qi.__all__)
    assert len(set(qi.__all__)) == len(qi.__all__)
    assert dir(qi) == qi.__all__
    submodules = {name for name, value in vars(qi).items() if type(value) is type(qi)}
    public = {name for name in vars(qi) if not name.startswith("_")} - submodules
    assert public | {"__version__", "keras_inferable_quantizers"} == set(qi.__all__)


def test_members_of_the_enums_are_mcts():
    assert [member.name for member in qi.QuantizationTarget] == ["Weights", "Activation"]
    assert {member.name for member in qi.QuantizationMethod} == {
        "POWER_OF_TWO",
        "LUT_POT_QUANTIZER",
        "SYMMETRIC",
        "UNIFORM",
        "LUT_SYM_QUANTIZER",
    }
