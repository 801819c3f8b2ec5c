"""Classes are found by their registered names, and by the names that users of MCT know."""

import keras
import numpy as np
import pytest

import keras_qwrap as qi
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
    expected = {f"keras_qwrap>{name}": getattr(qi, name) for name in SERIALIZABLE}
    assert qi.custom_objects() == expected


def test_no_public_class_is_registered_and_left_out():
    everything = keras.saving.get_custom_objects()
    registered = {name for name in everything if name.startswith("keras_qwrap>")}
    public = {name for name in registered if not name.startswith("keras_qwrap>_")}
    assert public == set(qi.custom_objects())


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
