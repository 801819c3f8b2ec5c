"""What a converted layer holds where its inferable quantizer has another grid, or has none."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops
from layer_cases import weight
from reference import to_numpy

import keras_qwrap as qi

M = qi.QuantizationMethod
X = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
register = keras.saving.register_keras_serializable("test_conversion")


class Mine(qi.BaseKerasTrainableQuantizer):
    """Computes on signed codes times 1/8."""

    step, lowest, highest = 1 / 8, -8, 7

    def __init__(self, quantization_config):
        super().__init__(quantization_config, qi.QuantizationTarget.Weights, [M.SYMMETRIC])

    def initialize_quantization(self, tensor_shape, name, layer):
        return {}

    def __call__(self, inputs):
        return qi.fake_quantize(inputs, self.step, self.lowest, self.highest)


@register
class AnotherGrid(Mine):
    """Its inferable quantizer has a step of 2/15."""

    def convert2inferable(self):
        return qi.WeightsUniformInferableQuantizer(4, -1.0, 1.0, per_channel=False)


@register
class RoundsDown(Mine):
    """Rounds otherwise than its inferable quantizer, on the same grid, as learned rounding does."""

    def __call__(self, inputs):
        return super().__call__(ops.floor(inputs * 8) / 8)

    def convert2inferable(self):
        return qi.WeightsSymmetricInferableQuantizer(4, 1.0, per_channel=False)


@register
@qi.mark_quantizer(qi.QuantizationTarget.Weights, [M.SYMMETRIC])
class Signs(qi.BaseKerasInferableQuantizer):
    """Defines no codes."""

    def __init__(self, value):
        self.value = value

    def __call__(self, inputs):
        return ops.where(inputs < 0, -self.value, self.value)

    def get_config(self):
        return {"value": self.value}


@register
class SignsInTraining(Mine):
    def __call__(self, inputs):
        return Signs(0.5)(inputs) + 0 * inputs

    def convert2inferable(self):
        return Signs(0.5)


@register
class OtherSigns(SignsInTraining):
    def convert2inferable(self):
        return Signs(0.25)


def quantizer(cls):
    return cls(qi.TrainableQuantizerWeightsConfig(M.SYMMETRIC, 4))


def model_with(cls, policy=None):
    keras.utils.set_random_seed(0)
    dense = layers.Dense(
        5, kernel_initializer=keras.initializers.RandomUniform(-1, 1), dtype=policy
    )
    wrapper = qi.KerasQuantizationWrapper(dense, {"kernel": quantizer(cls)}, name="dense")
    return keras.Sequential([keras.Input((6,)), wrapper])


def latent(model):
    return to_numpy(model.layers[0].layer.kernel).astype(np.float32)


def computed(cls, model):
    """What the trained quantizer makes of the latent weight."""
    return to_numpy(quantizer(cls)(ops.convert_to_tensor(latent(model))))


@pytest.mark.parametrize("cls", [RoundsDown, SignsInTraining])
def test_what_the_inferable_quantizer_can_hold_is_held_as_it_was_computed(cls, tmp_path):
    model = model_with(cls)
    converted = qi.convert_to_inferable(model)
    assert np.array_equal(to_numpy(converted(X)), to_numpy(model(X)))
    assert np.array_equal(to_numpy(converted.layers[0].layer.kernel), computed(cls, model))
    again = qi.convert_to_inferable(converted)
    for ending in ("keras", "h5"):
        again.save(tmp_path / f"model.{ending}")
        loaded = keras.models.load_model(tmp_path / f"model.{ending}")
        assert np.array_equal(to_numpy(loaded(X)), to_numpy(model(X)))


@pytest.mark.parametrize("cls", [AnotherGrid, OtherSigns])
def test_what_it_cannot_hold_becomes_what_it_makes_of_the_latent_weight(cls, tmp_path):
    """A warning names the layer, the weight, how many values differ, and by how much."""
    model = model_with(cls)
    twin = quantizer(cls).convert2inferable()
    wanted = to_numpy(twin(ops.convert_to_tensor(latent(model))))
    trained = computed(cls, model)
    number = np.count_nonzero(wanted != trained)
    most = np.abs(wanted.astype(np.float64) - trained).max()
    text = f"layer 'dense', weight 'kernel': {number} of 30 values .* by up to {most:.3g}"
    with pytest.warns(UserWarning, match=text):
        converted = qi.convert_to_inferable(model)
    assert number > 0
    assert np.array_equal(to_numpy(converted.layers[0].layer.kernel), wanted)
    again = qi.convert_to_inferable(converted)
    for ending in ("keras", "h5"):
        again.save(tmp_path / f"model.{ending}")
        loaded = keras.models.load_model(tmp_path / f"model.{ending}")
        assert np.array_equal(to_numpy(loaded(X)), to_numpy(converted(X)))
    plain = qi.unwrap_model(model)
    assert np.array_equal(to_numpy(plain.layers[0].kernel), trained)


@pytest.mark.parametrize("cls", [RoundsDown, AnotherGrid])
def test_codes_before_conversion_are_those_that_it_leaves(cls):
    model = model_with(cls)
    codes, scale, zero_point = model.layers[0].get_codes()["kernel"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = qi.convert_to_inferable(model)
    assert np.array_equal(converted.layers[0].get_codes()["kernel"][0], codes)
    values = (codes - zero_point).astype(np.float32) * scale
    assert np.array_equal(values, converted.layers[0].get_quantized_weights()["kernel"])
    latent_codes = quantizer(cls).convert2inferable().quantize_to_codes(latent(model))
    assert np.array_equal(codes, latent_codes) == (cls is AnotherGrid)


def test_a_quantizer_without_codes_has_none_to_give():
    wrapper = model_with(SignsInTraining).layers[0]
    for each in (wrapper, wrapper.convert_to_inferable_quantizers()):
        with pytest.raises(ValueError, match=r"layer 'dense', weight 'kernel'.*quantize_to_codes"):
            each.get_codes()
        assert set(np.unique(each.get_quantized_weights()["kernel"])) == {-0.5, 0.5}


@pytest.mark.parametrize("policy", ["bfloat16", "float16"])
def test_equal_is_meant_in_the_dtype_of_the_variable(policy):
    """A value of the grid, rounded to the variable's dtype, is held."""
    model = model_with(RoundsDown, policy)
    converted = qi.convert_to_inferable(model)
    held, trained = (m.layers[0].get_quantized_weights()["kernel"] for m in (converted, model))
    assert np.array_equal(held, trained)


def test_without_graph(tmp_path):
    model = Net()
    model(X)
    quantized = qi.QuantizedModel(model, {"dense/kernel": quantizer(AnotherGrid)})
    codes = quantized.get_codes()["dense/kernel"][0]
    with pytest.warns(UserWarning, match="weight 'dense/kernel': .* of 30 values"):
        converted = qi.convert_to_inferable(quantized)
    assert np.array_equal(converted.get_codes()["dense/kernel"][0], codes)
    converted.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(to_numpy(loaded(X)), to_numpy(converted(X)))


@register
class Net(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(5)

    def call(self, inputs):
        return self.dense(inputs)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
@pytest.mark.parametrize("method", ["SYMMETRIC", "POWER_OF_TWO", "UNIFORM"])
@pytest.mark.parametrize("graph", [True, False])
def test_weights_without_a_grid_are_named(value, method, graph):
    """Not finite, or so near to float32's largest number that no grid holds them."""
    if graph:
        dense = layers.Dense(5, name="dense")
        quantized = qi.KerasQuantizationWrapper(dense, {"kernel": weight(8, method)})
        quantized.build((None, 6))
        kernel, where = dense.kernel, "layer 'dense', weight 'kernel'"
    else:
        model = Net(name="net")
        model(X)
        quantized = qi.QuantizedModel(model, {"dense/kernel": weight(8, method)})
        kernel, where = quantized.model.dense.kernel, "layer 'net', weight 'dense/kernel'"
    array = to_numpy(kernel).copy()
    array[0] = [value, -value, 0.1, value, 0.2]
    array[1] = -array[0]
    kernel.assign(array)
    for action in (quantized.convert_to_inferable_quantizers, quantized.get_codes):
        with pytest.raises(ValueError, match=where):
            action()


@pytest.mark.parametrize("value", [np.nan, 3.4e38])
def test_weights_without_a_grid_are_named_with_a_given_threshold(value):
    dense = layers.Dense(5, name="dense")
    given = weight(8, per_channel=False, threshold=1.0)
    wrapper = qi.KerasQuantizationWrapper(dense, {"kernel": given})
    wrapper.build((None, 6))
    dense.kernel.assign(np.full((6, 5), value))
    if np.isnan(value):
        with pytest.raises(ValueError, match=r"layer 'dense', weight 'kernel': .*not finite"):
            wrapper.convert_to_inferable_quantizers()
    else:
        wrapper.convert_to_inferable_quantizers()
