"""The straight-through quantizers: what their configs do, and what they refuse."""

import json

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from reference import gradient, refused, same, to_numpy

import keras_qwrap as qi
from keras_qwrap.testing import _host, _hosted_quantizer

M = qi.QuantizationMethod
W, A = qi.TrainableQuantizerWeightsConfig, qi.TrainableQuantizerActivationConfig
X = np.linspace(-2.9, 2.9, 60, dtype=np.float32).reshape(3, 5, 4)


def built(cls, config, x=X):
    return _hosted_quantizer(_host(cls(config), x))


def weights(*args, x=X, **kwargs):
    config = W(*args, **kwargs)
    uniform = config.quantization_method is M.UNIFORM
    cls = qi.STEUniformWeightQATQuantizer if uniform else qi.STEWeightQATQuantizer
    return built(cls, config, x)


def activation(*args, **kwargs):
    config = A(*args, **kwargs)
    uniform = config.quantization_method is M.UNIFORM
    return built(
        qi.STEUniformActivationQATQuantizer if uniform else qi.STEActivationQATQuantizer, config
    )


PER_CHANNEL = {"per_channel": True, "channel_axis": -1, "input_rank": 3}
GIVEN = [
    (
        weights(M.SYMMETRIC, 3, {"threshold": [0.7, 1.1, 2.0, 3.0]}),
        qi.WeightsSymmetricInferableQuantizer(3, [0.7, 1.1, 2.0, 3.0], **PER_CHANNEL),
    ),
    (
        weights(M.POWER_OF_TWO, 3, {"threshold": [1.0, 0.5, 2.0, 4.0]}),
        qi.WeightsPOTInferableQuantizer(3, [1.0, 0.5, 2.0, 4.0], **PER_CHANNEL),
    ),
    (
        weights(M.UNIFORM, 3, {"range_min": [-1.0] * 4, "range_max": [1.0, 2, 3, 4]}),
        qi.WeightsUniformInferableQuantizer(3, [-1.0] * 4, [1.0, 2, 3, 4], **PER_CHANNEL),
    ),
    (
        weights(M.SYMMETRIC, 3, {"threshold": 0.7}, weights_per_channel_threshold=False),
        qi.WeightsSymmetricInferableQuantizer(3, 0.7, False),
    ),
    (
        activation(M.SYMMETRIC, 3, {"threshold": 0.7}),
        qi.ActivationSymmetricInferableQuantizer(3, 0.7, True),
    ),
    (
        activation(M.POWER_OF_TWO, 3, {"threshold": 2.0, "is_signed": False}),
        qi.ActivationPOTInferableQuantizer(3, 2.0, False),
    ),
    (
        activation(M.UNIFORM, 3, {"range_min": -1.0, "range_max": 1.5}),
        qi.ActivationUniformInferableQuantizer(3, -1.0, 1.5),
    ),
]


@pytest.mark.parametrize(("quantizer", "twin"), GIVEN)
def test_with_a_given_range_it_computes_as_its_inferable_twin(quantizer, twin):
    """Outputs, gradients, codes; and conversion gives just that twin."""
    dy = np.linspace(1, 2, X.size, dtype=np.float32).reshape(X.shape)
    same(quantizer(X), to_numpy(twin(X)))
    masked = gradient(twin, X, dy)
    assert 0 < np.count_nonzero(masked) < X.size
    same(gradient(quantizer, X, dy), masked)
    converted = quantizer.convert2inferable()
    assert type(converted) is type(twin)
    assert converted.get_config() == twin.get_config()
    np.testing.assert_array_equal(quantizer.quantize_to_codes(X), twin.quantize_to_codes(X))
    assert set(quantizer.quantizer_parameters) == {
        name for name in ("threshold", "min_range", "max_range") if name in twin.get_config()
    }
    assert not any(v.trainable for v in quantizer.quantizer_parameters.values())


@pytest.mark.parametrize("method", [M.SYMMETRIC, M.POWER_OF_TWO, M.UNIFORM])
def test_without_a_range_it_has_no_variable_and_follows_the_weight(method):
    quantizer = weights(method, 4)
    assert quantizer.quantizer_parameters == {}
    before = to_numpy(quantizer(X))
    same(quantizer(X * 4), before * 4)
    twin = quantizer.convert2inferable()
    same(twin(X), before)
    assert not np.array_equal(to_numpy(twin(X * 4)), before * 4)


ARGUMENTS = [
    ({"weights_n_bits": 3}, X),
    ({"weights_quantization_method": M.POWER_OF_TWO}, X),
    ({"weights_quantization_params": {"threshold": [1.0, 2.0, 3.0, 4.0]}}, X),
    ({"weights_channels_axis": 1}, X),
    ({"weights_channels_axis": (0, 2)}, X),
    ({"weights_per_channel_threshold": False}, X),
    ({"min_threshold": 100.0}, X),
]


@pytest.mark.parametrize(("change", "x"), ARGUMENTS, ids=lambda v: str(v)[:40])
def test_every_argument_of_a_weights_config_matters(change, x):
    base = {"weights_quantization_method": M.SYMMETRIC, "weights_n_bits": 4}
    before, after = (weights(**base | more, x=x) for more in ({}, change))
    assert not np.array_equal(to_numpy(before(x)), to_numpy(after(x)))
    copy = type(after).from_config(json.loads(json.dumps(after.get_config())))
    same(_hosted_quantizer(_host(copy, x))(x), to_numpy(after(x)))


@pytest.mark.parametrize(
    "change",
    [
        {"activation_n_bits": 3},
        {"activation_quantization_method": M.UNIFORM}
        | {"activation_quantization_params": {"range_min": -1.0, "range_max": 2.0}},
        {"activation_quantization_params": {"threshold": 1.0}},
        {"activation_quantization_params": {"threshold": 2.0, "is_signed": False}},
    ],
    ids=str,
)
def test_every_argument_of_an_activation_config_matters(change):
    base = {
        "activation_quantization_method": M.POWER_OF_TWO,
        "activation_n_bits": 4,
        "activation_quantization_params": {"threshold": 2.0},
    }
    before, after = (activation(**base | more) for more in ({}, change))
    assert not np.array_equal(to_numpy(before(X)), to_numpy(after(X)))
    copy = type(after).from_config(json.loads(json.dumps(after.get_config())))
    same(_hosted_quantizer(_host(copy, X))(X), to_numpy(after(X)))


def test_activations_are_signed_unless_told_otherwise():
    assert activation(M.SYMMETRIC, 8, {"threshold": 2.0}).quantize_to_codes([-9.0]) == [-128]


@settings(max_examples=30)
@given(st.permutations(range(3)), st.integers(1, 2))
def test_any_axes_that_a_weight_has(order, count):
    axes = tuple(sorted(order[:count]))
    shape = [X.shape[axis] for axis in axes]
    threshold = np.linspace(0.5, 2, int(np.prod(shape))).reshape(shape)
    twin = qi.WeightsSymmetricInferableQuantizer(4, threshold, True, axes, 3)
    for given_axes in (axes, tuple(axis - 3 for axis in axes)):
        quantizer = weights(M.SYMMETRIC, 4, {"threshold": threshold}, True, given_axes)
        same(quantizer(X), to_numpy(twin(X)))


@pytest.mark.parametrize("axes", [(0, -1), (0, -2), (1, -1)])
def test_axes_counted_from_both_ends(axes):
    """The rank is not known before building, so that the order of such axes is not either."""
    threshold = np.linspace(0.5, 2, X.shape[axes[0]] * X.shape[axes[1]])
    threshold = threshold.reshape(X.shape[axes[0]], X.shape[axes[1]])
    twin = qi.WeightsSymmetricInferableQuantizer(4, threshold, True, axes, 3)
    quantizer = weights(M.SYMMETRIC, 4, {"threshold": threshold}, True, axes)
    same(quantizer(X), to_numpy(twin(X)))


@pytest.mark.parametrize("config", [{"enable_weights_quantization": False}, {}])
def test_a_disabled_weights_quantizer_leaves_the_weight_in_float(config, random):
    dense = keras.layers.Dense(3, name="dense")
    quantizer = qi.STEWeightQATQuantizer(W(M.SYMMETRIC, 2, {"threshold": [0.3] * 3}, **config))
    wrapper = qi.KerasQuantizationWrapper(dense, {"kernel": quantizer})
    x = ops.array(random.normal(size=(4, 5)), "float32")
    y, bare = to_numpy(wrapper(x)), to_numpy(dense(x))
    converted = wrapper.convert_to_inferable_quantizers()
    same(converted(x), y)
    if config:
        same(y, bare)
        assert quantizer.enabled is False
        assert len(wrapper.weights) == 2
        assert (wrapper.get_codes(), converted.weights_quantizers) == ({}, {})
    else:
        assert not np.array_equal(y, bare)
        assert list(converted.weights_quantizers) == ["kernel"]


def test_a_disabled_activation_quantizer_leaves_the_output_in_float(random):
    config = A(M.SYMMETRIC, 2, {"threshold": 0.5}, enable_activation_quantization=False)
    dense = keras.layers.Dense(3)
    quantizer = qi.STEActivationQATQuantizer(config)
    wrapper = qi.KerasQuantizationWrapper(dense, None, [quantizer])
    x = ops.array(random.normal(size=(4, 5)), "float32")
    same(wrapper(x), to_numpy(dense(x)))
    same(wrapper.convert_to_inferable_quantizers()(x), to_numpy(dense(x)))
    holder = qi.KerasActivationQuantizationHolder(qi.STEActivationQATQuantizer(config))
    same(holder(x), to_numpy(x))
    same(holder.convert_to_inferable_quantizers()(x), to_numpy(x))


SYM, UNI = qi.STEWeightQATQuantizer, qi.STEUniformWeightQATQuantizer
ACT, ACT_UNI = qi.STEActivationQATQuantizer, qi.STEUniformActivationQATQuantizer
BAD = [
    (SYM, M.SYMMETRIC, {"treshold": 1.0}, ["['treshold']", "['threshold']"]),
    (SYM, M.SYMMETRIC, {"threshold": 1.0, "is_signed": True}, ["['is_signed']"]),
    (SYM, M.SYMMETRIC, {"range_min": -1.0, "range_max": 1.0}, ["range_min", "range_max"]),
    (UNI, M.UNIFORM, {"threshold": 1.0}, ["['threshold']", "range_min", "range_max"]),
    (UNI, M.UNIFORM, {"range_min": -1.0}, ["range_max", "both range_min and range_max"]),
    (UNI, M.UNIFORM, {"range_max": 1.0}, ["lacks ['range_min']"]),
    (ACT, M.SYMMETRIC, {}, ["activation_quantization_params", "{}", "a threshold"]),
    (ACT, M.SYMMETRIC, {"is_signed": False}, ["is_signed", "a threshold"]),
    (ACT, M.SYMMETRIC, {"threshold": 1.0, "signed": True}, ["['signed']", "is_signed"]),
    (ACT, M.SYMMETRIC, {"threshold": [1.0, 2.0]}, ["[1.0, 2.0]", "per tensor"]),
    (ACT_UNI, M.UNIFORM, {}, ["both range_min and range_max", "range_max"]),
    (ACT_UNI, M.UNIFORM, {"threshold": 1.0}, ["['threshold']", "range_min"]),
    (SYM, M.SYMMETRIC, {"threshold": [1.0, 2.0**-3]}, ["threshold", "min_threshold"]),
    (SYM, M.POWER_OF_TWO, {"threshold": [1.0, 3.0]}, ["3.0", "powers of two"]),
    (SYM, M.SYMMETRIC, {"threshold": [1.0, -3.0]}, ["-3.0", "positive"]),
    (SYM, M.SYMMETRIC, {"threshold": [np.nan]}, ["nan", "finite"]),
    (SYM, M.SYMMETRIC, {"threshold": []}, ["[]", "at least one"]),
    (SYM, M.SYMMETRIC, {"threshold": 1.0}, ["1.0", "1 dimension", "channel"]),
    (UNI, M.UNIFORM, {"range_min": [0.0], "range_max": [2.0**-3]}, ["min_threshold"]),
    (UNI, M.UNIFORM, {"range_min": [2.0], "range_max": [1.0]}, ["min_range", "below max_range"]),
    (UNI, M.UNIFORM, {"range_min": [0.0, 0.0], "range_max": [1.0]}, ["max_range", "(2,)"]),
    (ACT, M.SYMMETRIC, {"threshold": 2.0**-3}, ["threshold", "min_threshold"]),
    (ACT, M.POWER_OF_TWO, {"threshold": 3.0}, ["3.0", "powers of two"]),
    (ACT_UNI, M.UNIFORM, {"range_min": 0.0, "range_max": 2.0**-3}, ["min_threshold"]),
]


@pytest.mark.parametrize(("cls", "method", "params", "fragments"), BAD)
def test_bad_params_are_refused_at_construction(cls, method, params, fragments):
    config = (A if "Activation" in cls.__name__ else W)(method, 8, params, min_threshold=0.25)
    refused(ValueError, lambda: cls(config), *fragments)


def test_a_flag_that_is_none():
    config = A(M.SYMMETRIC, 8, {"threshold": 1.0, "is_signed": 1})
    refused(TypeError, lambda: ACT(config), "signed", "True or False")


def test_a_given_threshold_may_equal_the_floor():
    config = W(M.SYMMETRIC, 8, {"threshold": [0.1]}, min_threshold=0.1)
    assert SYM(config).enabled


@pytest.mark.parametrize("tiny", [2.0**-17, 1e-9, 1e-30])
def test_a_given_range_may_be_tiny(tiny):
    """Without `min_threshold`, as long as its steps are no subnormal numbers."""
    ends = {"range_min": [-tiny, 0.0], "range_max": [tiny, 1.0]}
    assert UNI(W(M.UNIFORM, 8, ends)).enabled
    assert SYM(W(M.SYMMETRIC, 8, {"threshold": [tiny, 1.0]}, min_threshold=0)).enabled
    assert ACT(A(M.SYMMETRIC, 8, {"threshold": tiny})).enabled
    assert ACT_UNI(A(M.UNIFORM, 8, {"range_min": 0.0, "range_max": tiny})).enabled


@pytest.mark.parametrize("axis", [-1, 3, (2, 3), (-2, -1), 0])
@pytest.mark.parametrize(
    ("cls", "method", "values"),
    [
        (SYM, M.SYMMETRIC, {"threshold": (0.5, 1.5)}),
        (SYM, M.POWER_OF_TWO, {"threshold": (0.5, 2.0)}),
        (UNI, M.UNIFORM, {"range_min": (-0.5, -1.5), "range_max": (0.25, 1.0)}),
    ],
)
def test_given_ranges_may_have_the_shape_of_the_weight(cls, method, values, axis, random):
    weight = random.normal(size=(2, 2, 2, 2)).astype("float32")
    kept = {a % 4 for a in (axis if isinstance(axis, tuple) else (axis,))}
    shape = [2 if a in kept else 1 for a in range(4)]

    def made(form):
        params = {k: np.resize(v, 2 ** len(kept)).reshape(form) for k, v in values.items()}
        config = W(method, 4, params, weights_channels_axis=axis)
        assert W.from_config(config.get_config()) == config
        return _hosted_quantizer(_host(cls(config), weight))

    flat = made([2] * len(kept))
    same(made(shape)(weight), to_numpy(flat(weight)))
    assert made(shape).convert2inferable().get_config() == flat.convert2inferable().get_config()


MOVING = qi.MovingAverageActivationQATQuantizer
CALLED = [
    (SYM, W(M.SYMMETRIC, 4)),
    (SYM, W(M.POWER_OF_TWO, 4, {"threshold": [1.0, 2.0]})),
    (UNI, W(M.UNIFORM, 4)),
    (UNI, W(M.UNIFORM, 4, {"range_min": [-1.0, -1.0], "range_max": [1.0, 2.0]})),
    (ACT, A(M.SYMMETRIC, 4, {"threshold": 1.0})),
    (ACT_UNI, A(M.UNIFORM, 4, {"range_min": -1.0, "range_max": 1.0})),
    (MOVING, A(M.UNIFORM, 4, {"range_min": -1.0, "range_max": 1.0})),
]


@pytest.mark.parametrize(("cls", "config"), CALLED)
def test_training_may_be_told(cls, config, random):
    """By position or by name; it changes nothing but a range that moves."""
    weight = random.uniform(-1, 1, size=(3, 2)).astype("float32")
    weight[0] = [-1.0, 1.0]
    quantizer = _hosted_quantizer(_host(cls(config), weight))
    expected = to_numpy(quantizer(weight))
    for args, kwargs in [((), {"training": False}), ((None,), {}), ((True,), {})]:
        same(quantizer(weight, *args, **kwargs), expected)


def test_a_number_of_thresholds_that_does_not_fit_is_refused_when_built():
    config = W(M.SYMMETRIC, 8, {"threshold": [1.0, 2.0]})
    wrapper = qi.KerasQuantizationWrapper(keras.layers.Dense(3), {"kernel": SYM(config)})
    refused(ValueError, lambda: wrapper.build((None, 5)), "kernel", "(5, 3)", "[2] channels", "[3]")


@pytest.mark.parametrize("params", [{}, {"threshold": [1.0] * 3}])
def test_an_axis_that_the_weight_lacks_is_refused_when_built(params):
    config = W(M.SYMMETRIC, 8, params, weights_channels_axis=3)
    wrapper = qi.KerasQuantizationWrapper(keras.layers.Dense(3), {"kernel": SYM(config)})
    refused(ValueError, lambda: wrapper.build((None, 5)), "channel_axis", "3", "rank 2")


def test_a_call_before_building_says_what_to_do():
    for quantizer in (
        SYM(W(M.SYMMETRIC)),
        UNI(W(M.UNIFORM)),
        ACT(A(M.SYMMETRIC, 8, {"threshold": 1.0})),
    ):
        for action in (lambda q=quantizer: q(X), quantizer.convert2inferable):
            refused(ValueError, action, type(quantizer).__name__, "initialize_quantization")


def test_integer_inputs_are_refused():
    for quantizer in (weights(M.SYMMETRIC), activation(M.SYMMETRIC, 8, {"threshold": 1.0})):
        refused(TypeError, lambda q=quantizer: q(np.ones(X.shape, "int32")), "int32", "float")
