"""Moving averages converted, saved and described by a config, and what they refuse."""

import json

import keras
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from moving_average_cases import METHODS, M, f32, hold, holding, make, moving_ranges, state
from reference import MODERATE, arrays, dtype_of, refused, same, to_numpy

import keras_qwrap as qi
from keras_qwrap.quantizers.moving_average import MovingAverageActivationQATQuantizer

ENDS = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=15)
@given(
    st.sampled_from(METHODS),
    st.integers(2, 16),
    ENDS,
    ENDS,
    arrays(MODERATE, [(16,)]),
)
@example(M.UNIFORM, 8, 1e-6, 2e-6, f32(np.linspace(-1, 1, 16)))
@example(M.SYMMETRIC, 8, -1e-40, 1.0, f32(np.linspace(-1, 1, 16)))
@example(M.POWER_OF_TWO, 2, -0.5, 0.25, f32(np.linspace(-1, 1, 16)))
def test_the_converted_quantizer_gives_the_same_outputs(method, bits, a, b, x):
    low, high = min(a, b), max(a, b)
    assume(high > 0 or low < 0)
    quantizer = make(method, bits, momentum=0.7)
    holder = hold(quantizer)
    holder(f32([low, high]), training=True)
    holder(f32([high / 3, high]), training=True)
    assume(quantizer.range is not None)
    expected = to_numpy(holder(x))
    converted = holder.convert_to_inferable_quantizers()
    same(converted(x), expected)
    config = json.loads(json.dumps(converted.get_config()))
    reloaded = type(converted).from_config(config)
    reloaded.build((16,))
    same(reloaded(x), expected)
    same(quantizer.dequantize(quantizer.quantize_to_codes(x)), expected)
    assert quantizer.num_bits == bits


def trained_model(method):
    config = qi.TrainableQuantizerWeightsConfig(M.SYMMETRIC, 4)
    wrapper = qi.KerasQuantizationWrapper(
        keras.layers.Dense(3),
        {"kernel": qi.STEWeightQATQuantizer(config)},
        make(method, 4, momentum=0.75),
    )
    holder = qi.KerasActivationQuantizationHolder(make(method, 5, momentum=0.5))
    model = keras.Sequential([keras.Input((4,)), holder, wrapper])
    model.compile(keras.optimizers.Adam(0.01), keras.losses.MeanSquaredError())
    return model


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_trained_converted_and_reloaded_models_are_equal(method, random, tmp_path):
    model = trained_model(method)
    x = f32(random.normal(size=(20, 4)))
    model.fit(x, x[:, :3], batch_size=6, epochs=2, verbose=0, shuffle=False)
    holder, wrapper = model.layers
    assert state(holder.activation_holder_quantizer, "steps") == 8
    assert state(wrapper.activation_quantizers[0], "steps") == 8
    *_, ends = moving_ranges([x[i : i + 6].ravel() for i in (0, 6, 12, 18)] * 2, 0.5)
    np.testing.assert_allclose(holder.activation_holder_quantizer.range, ends, rtol=1e-6)
    expected = model.predict(x, verbose=0)
    assert len(np.unique(expected)) <= 16
    converted = qi.convert_to_inferable(model)
    same(converted.predict(x, verbose=0), expected)
    expected = to_numpy(model(x))
    same(converted(x), expected)
    for source in (model, converted):
        for suffix in ("keras", "h5"):
            path = tmp_path / f"model.{suffix}"
            source.save(path)
            reloaded = keras.models.load_model(path, compile=False)
            same(reloaded(x), expected)
            for old, new in zip(source.variables, reloaded.variables, strict=True):
                same(new.value, to_numpy(old))


def test_variables():
    holder = hold(make())
    assert [
        (v.name, dtype_of(v), v.trainable, v.aggregation, tuple(v.shape)) for v in holder.variables
    ] == [
        ("output_0_min_range", "float32", False, "mean", ()),
        ("output_0_max_range", "float32", False, "mean", ()),
        ("output_0_steps", "int32", False, "only_first_replica", ()),
        ("output_0_delay", "int32", False, "only_first_replica", ()),
        ("output_0_frozen", "bool", False, "only_first_replica", ()),
    ]


def test_config():
    params = {"range_min": -1.0, "range_max": 2.0}
    options = {"momentum": 0.25, "range_method": "percentile", "min_threshold": 0.125}
    quantizer = make(M.SYMMETRIC, 5, params, **options)
    again = MovingAverageActivationQATQuantizer.from_config(
        json.loads(json.dumps(quantizer.get_config()))
    )
    assert again.get_config() == quantizer.get_config()
    assert (again.momentum, again.range_method) == (0.25, "percentile")
    old = quantizer.get_config()
    del old["range_method"]
    assert MovingAverageActivationQATQuantizer.from_config(old).range_method == "mse"
    assert again.quantization_config == quantizer.quantization_config
    assert type(np.float32(0.5).item()) is type(make(momentum=np.float32(0.5)).momentum)
    config = qi.TrainableQuantizerActivationConfig(M.UNIFORM)
    assert MovingAverageActivationQATQuantizer(config).momentum == 0.99


@pytest.mark.parametrize("momentum", [1.0, -0.1, 1.5, float("nan")])
def test_momentum_out_of_bounds(momentum):
    refused(ValueError, lambda: make(momentum=momentum), "momentum", "from 0 to below 1")


@pytest.mark.parametrize("method", ["max", None, 1, "MSE"])
def test_an_unknown_range_method(method):
    refused(ValueError, lambda: make(range_method=method), "range_method", "percentile", "entropy")


@pytest.mark.parametrize("momentum", ["0.9", None, True])
def test_momentum_of_another_type(momentum):
    refused(TypeError, lambda: make(momentum=momentum), "momentum", "from 0 to below 1")


@pytest.mark.parametrize(
    ("params", "error", "fragment"),
    [
        ({"range_min": -1.0}, ValueError, "range_max"),
        ({"range_max": 1.0}, ValueError, "range_min"),
        ({"threshold": 1.0}, ValueError, "threshold"),
        ({"range_min": -1.0, "range_max": 1.0, "x": 1}, ValueError, "'x'"),
        ({"range_min": 1.0, "range_max": 1.0}, ValueError, "min_range"),
        ({"range_min": 2.0, "range_max": 1.0}, ValueError, "min_range"),
        ({"range_min": 0.0, "range_max": 2.0**-17}, ValueError, "min_threshold"),
        ({"range_min": [-1.0, -2.0], "range_max": [1.0, 2.0]}, ValueError, "one number"),
        ({"range_min": -1.0, "range_max": "one"}, TypeError, "max_range"),
        ({"range_min": -1.0, "range_max": float("nan")}, ValueError, "max_range"),
        ({"range_min": -1.0, "range_max": 1e38}, ValueError, "2**125"),
    ],
)
def test_params_that_are_refused(params, error, fragment):
    refused(error, lambda: make(params=params, min_threshold=2.0**-16), fragment)


def test_configs_of_another_kind():
    weights = qi.TrainableQuantizerWeightsConfig(M.UNIFORM)
    refused(TypeError, lambda: MovingAverageActivationQATQuantizer(weights), "Activation")
    refused(ValueError, lambda: make(M.LUT_POT_QUANTIZER), "LUT_POT_QUANTIZER", "UNIFORM")


@pytest.mark.parametrize(
    ("ends", "error", "fragment"),
    [
        ((1.0, -1.0), ValueError, "low"),
        ((float("nan"), 1.0), ValueError, "low"),
        ((0.0, float("inf")), ValueError, "high"),
        ((-1e38, 0.0), ValueError, "2**125"),
        (("-1.0", 1.0), TypeError, "low"),
        (([-1.0, -2.0], 1.0), ValueError, "one number"),
    ],
)
def test_set_range_refuses(ends, error, fragment):
    holder = holding(-1.0, 2.0)
    quantizer = holder.activation_holder_quantizer
    refused(error, lambda: quantizer.set_range(*ends), "set_range", fragment)
    assert quantizer.range == (-1.0, 2.0)


def test_what_needs_variables_or_a_range():
    unbuilt = make()
    for action in (
        lambda: unbuilt(f32([1.0])),
        lambda: unbuilt.range,
        lambda: unbuilt.set_range(0.0, 1.0),
        unbuilt.convert2inferable,
    ):
        refused(ValueError, action, "built")
    quantizer = make()
    holder = hold(quantizer)
    refused(ValueError, quantizer.convert2inferable, "not calibrated", "set_range")
    refused(ValueError, holder.convert_to_inferable_quantizers, "not calibrated")
    refused(TypeError, lambda: quantizer(np.int32([1])), "float")
    config = quantizer.quantization_config
    quantizer = MovingAverageActivationQATQuantizer(config, pass_whole_numbers=True)
    hold(quantizer)
    quantizer.set_range(0, 9)
    assert quantizer.convert2inferable().num_bits == 8
    quantizer.set_whole_numbers(True)
    refused(ValueError, quantizer.convert2inferable, "passes whole numbers", "wrapper or holder")


def test_a_disabled_one_passes_everything():
    quantizer = make(enable_activation_quantization=False)
    holder = hold(quantizer)
    x = f32([-9.3, 2.2])
    same(holder(x, training=True), x)
    assert not holder.variables


def dead_model(kind):
    """Activations that are always zero."""
    dead = keras.layers.Dense(4, activation="relu", bias_initializer="lecun_uniform", name="dead")
    live = keras.layers.Dense(2, name="live")
    inputs = keras.Input((3,), name="inputs")
    if kind == "graph":
        zeros = dead(inputs)
        model = keras.Model(inputs, live(keras.layers.Multiply()([zeros, zeros])))
    else:
        model = Dead(dead, live)
        model(keras.ops.zeros((1, 3)))
    dead.bias.assign([-1e3] * 4)
    live.bias.assign([0.5, -0.5])
    return model


class Dead(keras.Model):
    def __init__(self, dead, live, **kwargs):
        super().__init__(**kwargs)
        self.dead, self.live = dead, live

    def call(self, inputs):
        return self.live(self.dead(inputs))

    def get_config(self):
        config = {name: keras.saving.serialize_keras_object(getattr(self, name)) for name in PARTS}
        return super().get_config() | config

    @classmethod
    def from_config(cls, config):
        made = {name: keras.saving.deserialize_keras_object(config.pop(name)) for name in PARTS}
        return cls(**made, **config)


PARTS = ("dead", "live")
keras.saving.register_keras_serializable("test_moving_average_conversion")(Dead)


def dead_quantizer(model):
    if isinstance(model, qi.QuantizedModel):
        return model.activation_quantizers["dead"][0]
    return model.get_layer("dead").activation_quantizers[0]


@pytest.mark.parametrize(
    ("kind", "ending"),
    [
        ("graph", "keras"),
        pytest.param("graph", "h5", marks=pytest.mark.slow),
        pytest.param("graph", "weights.h5", marks=pytest.mark.slow),
        pytest.param("subclassed", "keras", marks=pytest.mark.slow),
        pytest.param("subclassed", "weights.h5", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("how", ["calibrated", "trained"])
def test_a_dead_activation_converts_and_is_saved(how, kind, ending, random, tmp_path):
    x = f32(random.normal(size=(8, 3)))
    model = qi.quantize_model(dead_model(kind), "w8a8")
    refused(ValueError, lambda: qi.convert_to_inferable(model), "range", "calibrate")
    if how == "trained":
        model.compile("sgd", keras.losses.MeanSquaredError())
        model.fit(x, np.zeros((8, 2)), verbose=0)
    else:
        with pytest.warns(UserWarning, match="'.*' is always 0;"):
            found = qi.calibrate(model, x, verbose=0)
        assert list(found.values()).count((0.0, 1.0)) == (2 if kind == "graph" else 1)
    expected = to_numpy(model(x))
    assert np.any(expected)
    path = tmp_path / f"model.{ending}"
    if ending == "weights.h5":
        model.save_weights(path)
        reloaded = qi.quantize_model(dead_model(kind), "w8a8")
        reloaded.load_weights(path)
    else:
        qi.save_quantized_model(model, path)
        reloaded = qi.keras_load_quantized_model(path, compile=False)
    for each in (model, reloaded):
        assert dead_quantizer(each).range == (0.0, 1.0)
        converted = qi.convert_to_inferable(each)
        for same_one in (each, converted, qi.convert_to_inferable(converted)):
            same(same_one(x), expected)
        twin = dead_quantizer(each).convert2inferable()
        assert twin.get_config() == {"num_bits": 8, "min_range": 0.0, "max_range": 1.0}
    qi.save_quantized_model(converted, tmp_path / "converted.keras")
    same(qi.keras_load_quantized_model(tmp_path / "converted.keras")(x), expected)
    dead_quantizer(reloaded)(f32([[-0.5, 2.5]]), training=True)
    assert dead_quantizer(reloaded).range == (-0.5, 2.5)


@pytest.mark.parametrize("unit", [2.0**-30, 2.0**-100])
@pytest.mark.parametrize("range_method", ["mse", "minmax", "percentile"])
def test_a_model_of_tiny_numbers_is_quantized_as_a_large_one(unit, range_method, random, tmp_path):
    """Weights and inputs; from calibration to the reloaded file. By powers of two all is exact."""
    x = f32(random.normal(size=(64, 5)))
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4, use_bias=False)])
    activations = qi.ActivationSpec(range=range_method)
    recipe = qi.Recipe(qi.WeightsSpec(4, range="mse"), activations)
    expected = to_numpy(qi.quantize_model(model, recipe, x, verbose=0)(x))
    small = f32(unit)
    halves = np.sqrt(small) if range_method == "mse" else small
    model.set_weights([model.get_weights()[0] * np.float32(halves)])
    inputs = x * np.float32(small / halves)
    quantized = qi.quantize_model(model, recipe, inputs, verbose=0)
    same(quantized(inputs), expected * small)
    converted = qi.convert_to_inferable(quantized)
    qi.save_quantized_model(converted, tmp_path / "model.keras")
    for each in (converted, qi.keras_load_quantized_model(tmp_path / "model.keras")):
        same(each(inputs), expected * small)
