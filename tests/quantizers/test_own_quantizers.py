"""Quantizers outside the package do all that ours do, by what the base class says that they may."""

import keras
import numpy as np
import pytest
from keras import ops
from reference import refused, same, to_numpy

import keras_qwrap as qi
from keras_qwrap.quantizers import marks

M, T = qi.QuantizationMethod, qi.QuantizationTarget
X = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
CONFIG = qi.TrainableQuantizerActivationConfig(M.SYMMETRIC, 8)


@keras.saving.register_keras_serializable("own")
@qi.mark_quantizer(T.Activation, [M.SYMMETRIC])
class PeakQuantizer(qi.BaseKerasTrainableQuantizer):
    """Keeps the largest magnitude that it ever saw as its threshold."""

    def initialize_quantization(self, tensor_shape, name, layer):
        for role, dtype in (("peak", "float32"), ("frozen", "bool")):
            self.quantizer_parameters[role] = layer.add_weight(
                role, shape=(), dtype=dtype, initializer="zeros", trainable=False
            )
        return self.quantizer_parameters

    def __call__(self, inputs, training=None):
        peak = self.quantizer_parameters["peak"]
        if training:
            larger = ops.maximum(peak, ops.max(ops.abs(inputs)))
            frozen = ops.convert_to_tensor(self.quantizer_parameters["frozen"])
            peak.assign(ops.where(frozen, ops.convert_to_tensor(peak), larger))
        return qi.fake_quantize(inputs, ops.maximum(peak, 1e-6) / 128, -128, 127)

    @property
    def range(self):
        peak = float(str(ops.convert_to_numpy(self.quantizer_parameters["peak"])))
        return (-peak, peak) if peak else None

    def set_range(self, low, high):
        self.quantizer_parameters["peak"].assign(max(-low, high))

    def freeze_range(self):
        self.quantizer_parameters["frozen"].assign(True)

    def convert2inferable(self):
        return qi.ActivationSymmetricInferableQuantizer(8, self.range[1], signed=True)


def model_with(quantizer):
    holder = qi.KerasActivationQuantizationHolder(quantizer, name="held")
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), holder])


@pytest.fixture
def calibrated():
    model = model_with(PeakQuantizer(CONFIG))
    floats = np.abs(to_numpy(model.layers[0](X))).max()
    found = qi.calibrate(model, X, "minmax", verbose=0)
    assert list(found) == ["held"]
    assert np.float32(found["held"][1]) == floats
    return model


def test_is_calibrated_by_its_own_method_or_a_given_one(calibrated):
    quantizer = calibrated.layers[-1].activation_holder_quantizer
    peak = quantizer.range[1]
    quantizer.range_method = "percentile"
    (own,) = qi.calibrate(calibrated, X, verbose=0).values()
    (given,) = qi.calibrate(calibrated, X, "minmax", verbose=0).values()
    assert own[1] < given[1] == peak


def test_freezes(calibrated):
    calibrated.compile("sgd", "mse")
    far = 9 * X, np.zeros((64, 2))
    quantizer = calibrated.layers[-1].activation_holder_quantizer
    before = quantizer.range
    calibrated.fit(*far, verbose=0, callbacks=[qi.FreezeRanges(at_epoch=0)])
    assert quantizer.range == before
    quantizer.quantizer_parameters["frozen"].assign(False)
    calibrated.fit(*far, verbose=0)
    assert quantizer.range[1] > before[1]


def test_says_what_it_cannot_do(calibrated):
    calibrated.compile("sgd", "mse")
    with pytest.raises(NotImplementedError, match="PeakQuantizer must define delay_quantization"):
        calibrated.fit(X, X[:, :2], verbose=0, callbacks=[qi.DelayQuantization(2)])


def test_is_reported_and_missed_until_it_has_a_range(calibrated):
    def row(model):
        (found,) = qi.quantization_report(model).layers[-1].activations
        return found.state, found.num_bits, found.method, found.range

    ends = calibrated.layers[-1].activation_holder_quantizer.range
    assert row(calibrated) == ("quantized", 8, "SYMMETRIC", ends)
    fresh = model_with(PeakQuantizer(CONFIG))
    assert row(fresh)[0] == "not calibrated"
    refused(ValueError, lambda: qi.convert_to_inferable(fresh), "'held'")


def test_is_saved_inspected_and_converted(calibrated, tmp_path):
    quantizer, path = calibrated.layers[-1].activation_holder_quantizer, tmp_path / "m.keras"
    qi.save_quantized_model(calibrated, path)
    same(qi.keras_load_quantized_model(path)(X), to_numpy(calibrated(X)))
    (held,) = qi.inspect_file(path).layers
    (found,) = held.quantizers
    assert (found.class_name, found.num_bits, found.range) == ("PeakQuantizer", 8, quantizer.range)
    same(qi.convert_to_inferable(calibrated)(X), to_numpy(calibrated(X)))


@pytest.fixture
def learned(monkeypatch):
    """A weights quantizer whose step is trained, which recipes know by a word of its own."""
    monkeypatch.setattr(marks, "_OFFERED", dict(marks._OFFERED))

    @keras.saving.register_keras_serializable("own")
    @qi.mark_quantizer(T.Weights, [M.SYMMETRIC, M.POWER_OF_TWO], ranges=["learned"])
    class LearnedQuantizer(qi.BaseKerasTrainableQuantizer):
        def initialize_quantization(self, tensor_shape, name, layer):
            step = layer.add_weight("step", shape=(), initializer=lambda *_, **__: ops.array(0.125))
            self.quantizer_parameters = {"step": step}
            return self.quantizer_parameters

        def __call__(self, inputs):
            return qi.fake_quantize(inputs, self.quantizer_parameters["step"], -8, 7)

        def convert2inferable(self):
            step = ops.convert_to_numpy(self.quantizer_parameters["step"])
            return qi.WeightsSymmetricInferableQuantizer(4, step * 8, per_channel=False)

    return LearnedQuantizer


def test_a_recipe_takes_a_class_by_its_word(learned, tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense")])
    recipe = qi.Recipe(qi.WeightsSpec(4, range="learned"), "float")
    assert qi.Recipe.from_json(recipe.to_json()) == recipe
    quantized = qi.quantize_model(model, recipe)
    assert type(quantized.get_layer("dense").weights_quantizers["kernel"]) is learned
    assert qi.quantization_report(quantized).layers[-1].weights[0].range == (1.0, 1.0)
    converted = qi.convert_to_inferable(quantized)
    same(converted(X), to_numpy(quantized(X)))
    qi.save_quantized_model(converted, tmp_path / "m.keras")
    same(qi.keras_load_quantized_model(tmp_path / "m.keras")(X), to_numpy(quantized(X)))


def test_a_word_belongs_to_one_class(learned):
    fragments = ["'uniform'", "'learned'", "method 'symmetric' or 'power_of_two'"]
    refused(ValueError, lambda: qi.WeightsSpec(4, "uniform", range="learned"), *fragments)
    mark = qi.mark_quantizer(T.Weights, [M.POWER_OF_TWO], ranges=["learned"])
    refused(ValueError, lambda: mark(PeakQuantizer), "'learned'", "LearnedQuantizer has it")
    refused(TypeError, lambda: qi.mark_quantizer(T.Weights, [M.UNIFORM], ranges="learned"))
    assert qi.mark_quantizer(T.Weights, [M.SYMMETRIC], ranges=["learned"])(learned) is learned
