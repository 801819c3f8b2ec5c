"""Seeing the activations that a model quantizes, and listing its quantizers."""

import keras
import numpy as np
import pytest
from reference import refused, same, to_numpy

import keras_qwrap as qi
from keras_qwrap.layers.owner import observed, quantizers_in
from keras_qwrap.quantizers.moving_average import MovingAverageActivationQATQuantizer

M = qi.QuantizationMethod
X = np.random.default_rng(0).normal(size=(2, 5, 3)).astype("float32")


def weights():
    return qi.STEWeightQATQuantizer(qi.TrainableQuantizerWeightsConfig(M.SYMMETRIC, 4))


def fixed():
    return qi.ActivationSymmetricInferableQuantizer(4, 2.0, signed=True)


def moving(**options):
    config = qi.TrainableQuantizerActivationConfig(M.UNIFORM, 4, **options)
    return MovingAverageActivationQATQuantizer(config)


def nested_model():
    """A holder, and a model in the model with a recurrent layer of two outputs and a dense one."""
    recurrent = qi.KerasQuantizationWrapper(
        keras.layers.LSTM(2, return_sequences=True, name="recurrent"),
        {"cell/kernel": weights(), "cell/recurrent_kernel": weights()},
        fixed(),
    )
    dense = qi.KerasQuantizationWrapper(
        keras.layers.Dense(2, name="dense"), {"kernel": weights()}, moving()
    )
    inner = keras.Sequential([keras.Input((5, 3)), recurrent, dense], name="inner")
    inputs = keras.Input((5, 3))
    held = qi.KerasActivationQuantizationHolder(moving(), name="held")(inputs)
    return keras.Model(inputs, inner(held))


def test_quantizers_in_a_model():
    model = nested_model()
    rows = quantizers_in(model)
    assert sorted((owner.name, role) for owner, role, _ in rows) == [
        ("dense", "kernel"),
        ("dense", "output_0"),
        ("held", "output_0"),
        ("recurrent", "cell/kernel"),
        ("recurrent", "cell/recurrent_kernel"),
        ("recurrent", "output_0"),
    ]
    for owner, role, quantizer in rows:
        assert owner.owns(quantizer)
        of_weights = quantizer.quantization_target is qi.QuantizationTarget.Weights
        assert of_weights == (role in getattr(owner, "weights_quantizers", {}))
    assert quantizers_in(keras.layers.Dense(2)) == []


def test_quantizers_of_several_outputs_and_of_converted_layers():
    layer = qi.KerasQuantizationWrapper(
        keras.layers.LSTM(2, return_state=True), {}, [fixed(), moving(), fixed()]
    )
    roles = [(role, quantizer) for _, role, quantizer in quantizers_in(layer)]
    outputs = layer.activation_quantizers
    assert roles == [(f"output_{i}", quantizer) for i, quantizer in enumerate(outputs)]
    wrapper = qi.KerasQuantizationWrapper(keras.layers.Dense(2), {"kernel": weights()}, fixed())
    wrapper(X)
    converted = wrapper.convert_to_inferable_quantizers()
    assert [role for _, role, _ in quantizers_in(converted)] == ["kernel", "output_0"]


def test_an_observer_sees_every_activation_and_no_weight():
    model = nested_model()
    expected = to_numpy(model(X))
    seen = []
    with observed(model, lambda quantizer, tensor: seen.append((quantizer, to_numpy(tensor)))):
        same(model(X), expected)
    owners = [model.get_layer("held"), *model.get_layer("inner").layers]
    assert len(seen) == len(owners) == 3
    assert all(owner.owns(quantizer) for owner, (quantizer, _) in zip(owners, seen, strict=True))
    assert {q.quantization_target for q, _ in seen} == {qi.QuantizationTarget.Activation}
    same(seen[0][1], X)
    assert [tensor.shape for _, tensor in seen] == [(2, 5, 3), (2, 5, 2), (2, 5, 2)]


def test_what_an_observer_returns_takes_the_place_of_the_output():
    model = nested_model()
    before = to_numpy(model(X))
    with observed(model, lambda quantizer, tensor: tensor * 0.0 + 0.3):
        same(model(X), np.full((2, 5, 2), np.float32(0.3)))
        model(X, training=True)
    moved = [q.range for *_, q in quantizers_in(model) if q.takes_range]
    assert moved == [None, None], "a quantizer that is replaced is not called"
    same(model(X), before)


def test_floats_pass_through_a_model_that_is_observed_so():
    """What calibration does: with every tensor passed on, only weights are quantized."""
    holder = qi.KerasActivationQuantizationHolder(
        qi.ActivationSymmetricInferableQuantizer(2, 1.0, True)
    )
    with observed(holder, lambda quantizer, tensor: tensor):
        same(holder(X), X)
    assert len(np.unique(to_numpy(holder(X)))) <= 4


def test_disabled_quantizers_are_not_observed():
    holder = qi.KerasActivationQuantizationHolder(moving(enable_activation_quantization=False))
    with observed(holder, lambda quantizer, tensor: pytest.fail("called")):
        same(holder(X), X)


def test_the_observer_is_removed_also_after_an_error():
    model = nested_model()
    expected = to_numpy(model(X))

    def fail(quantizer, tensor):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), observed(model, fail):
        model(X)
    same(model(X), expected)
    with observed(model, fail), pytest.raises(RuntimeError, match="stop"):
        model(X)


def test_a_second_observer_is_refused_and_the_first_one_stays():
    holder = qi.KerasActivationQuantizationHolder(fixed())
    model = keras.Sequential([keras.Input((5, 3)), holder])
    with observed(holder, lambda quantizer, tensor: tensor):

        def twice():
            with observed(model, lambda quantizer, tensor: tensor):
                pytest.fail("entered")

        refused(ValueError, twice, "not observed")
        same(model(X), X)


def test_an_observed_model_is_saved_without_its_observer(tmp_path):
    model = nested_model()
    expected = to_numpy(model(X))
    with observed(model, lambda quantizer, tensor: tensor):
        model.save(tmp_path / "model.keras")
    same(keras.models.load_model(tmp_path / "model.keras")(X), expected)
