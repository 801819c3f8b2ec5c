"""A wrapper whose layer, quantizers or use change under it: refused, or followed, not ignored."""

import copy

import keras
import numpy as np
import pytest
from keras import layers, ops
from layer_cases import Composite, activation, fixed, floats, register, weight

import keras_qwrap as qi
from keras_qwrap.layers.weights import find_weight

Wrapper = qi.KerasQuantizationWrapper


def to_numpy(tensor):
    return np.array(ops.convert_to_numpy(tensor))


def built(layer=None, **kwargs):
    wrapper = Wrapper(layer or layers.Dense(3), {"kernel": weight(4)}, **kwargs)
    wrapper.build((2, 4))
    return wrapper


def test_lora_enabled_after_building_is_refused_at_the_call():
    wrapper = built()
    wrapper.layer.enable_lora(2)
    for action in (lambda: wrapper(floats(2, 4)), wrapper.get_codes, wrapper.get_quantized_weights):
        with pytest.raises(ValueError, match="without LoRA"):
            action()


def test_a_layer_that_keras_quantizes_after_building_is_refused_at_the_call():
    wrapper = built()
    wrapper.layer.quantize("int8")
    with pytest.raises(ValueError, match="quantization mode int8"):
        wrapper(floats(2, 4))


def test_rematerialized_layers_are_refused():
    """Their second run, for the gradients, would see float weights."""
    with keras.RematScope(mode="full"):
        dense = layers.Dense(3)
    with pytest.raises(ValueError, match="RematScope"):
        Wrapper(dense, {"kernel": weight()}).build((2, 4))


@pytest.mark.tensorflow
@pytest.mark.parametrize("where", ["class", "instance"])
def test_a_traced_method_is_refused(where):
    import tensorflow as tf

    class Traced(layers.Dense):
        def __init__(self, units):
            super().__init__(units)
            if where == "instance":
                self.product = tf.function(lambda x: tf.matmul(x, self.kernel))

        def call(self, inputs):
            return self.product(inputs)

    if where == "class":
        Traced.product = tf.function(lambda self, x: tf.matmul(x, self.kernel))
    with pytest.raises(ValueError, match=r"no `tf.function`"):
        Wrapper(Traced(3), {"kernel": weight()}).build((2, 4))


@pytest.mark.tensorflow
def test_a_model_that_was_trained_can_be_wrapped():
    """Its own compiled steps are no methods of its call."""
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    inner.compile("sgd", "mse")
    inner.fit(floats(4, 4), floats(4, 2), verbose=0)
    assert Wrapper(inner, {"layers/0/kernel": weight()})(floats(2, 4)).shape == (2, 2)


def test_an_inner_wrapper_is_converted_with_the_outer_one():
    inner = Wrapper(layers.Dense(3, bias_initializer="normal"), {"kernel": weight(3)})
    outer = Wrapper(inner, {"layer/bias": fixed(0.25, 2)}, activation())
    expected = to_numpy(outer(floats(2, 4)))
    converted = outer.convert_to_inferable_quantizers()
    assert converted.layer.converted
    assert not inner.converted
    np.testing.assert_array_equal(to_numpy(converted(floats(2, 4))), expected)
    again = converted.convert_to_inferable_quantizers()
    np.testing.assert_array_equal(to_numpy(again(floats(2, 4))), expected)
    wrapper = Wrapper(keras.Sequential([keras.Input((4,)), built()]))
    wrapper(floats(2, 4))
    with pytest.raises(ValueError, match="inside"):
        wrapper.convert_to_inferable_quantizers()


@register
class Doubling(Wrapper):
    """A wrapper of a user's, which adds to the call."""

    def call(self, inputs, training=None):
        return 2 * super().call(inputs, training=training)


def test_a_subclass_may_define_its_call(tmp_path):
    keras.utils.set_random_seed(0)
    wrapper = built()
    doubling = Doubling(layers.Dense(3), {"kernel": weight(4)})
    model = keras.Sequential([keras.Input((4,)), doubling])
    doubling.set_weights(wrapper.get_weights())
    expected = 2 * to_numpy(wrapper(floats(2, 4)))
    np.testing.assert_array_equal(to_numpy(model(floats(2, 4))), expected)
    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(reloaded(floats(2, 4))), expected)


def test_a_trainable_quantizer_in_a_converted_wrapper_is_refused():
    with pytest.raises(ValueError, match="an inferable quantizer, since converted=True"):
        Wrapper(layers.Dense(3), {"kernel": weight()}, converted=True)


def test_weights_that_left_their_grid_are_not_given_out():
    converted = built().convert_to_inferable_quantizers()
    converted.latent_weight("kernel").assign(floats(4, 3))
    with pytest.raises(ValueError, match="not on the grid of 'kernel'"):
        converted.get_quantized_weights()


def test_a_failed_build_says_the_same_again():
    wrapper = Wrapper(layers.Dense(3), {"bias": weight(), "kernal": weight()})
    for _ in range(2):
        with pytest.raises(ValueError, match=r"received 'kernal'.*nearest is 'kernel'"):
            wrapper.build((2, 4))


def test_a_failed_constructor_claims_no_quantizer():
    quantizer = weight()
    with pytest.raises(ValueError, match="quantizer for activation") as failure:
        Wrapper(layers.Dense(3), {"kernel": quantizer}, weight())
    wrapper = Wrapper(layers.Dense(3), {"kernel": quantizer})
    assert wrapper.owns(quantizer)
    assert failure.value is not None


def test_a_quantizer_added_later_is_claimed():
    wrapper = Wrapper(layers.Dense(3))
    quantizer = weight()
    wrapper.add_weights_quantizer("kernel", quantizer)
    with pytest.raises(ValueError, match="used nowhere else"):
        Wrapper(layers.Dense(3), {"kernel": quantizer})
    Wrapper(layers.Dense(3), {"kernel": copy.deepcopy(quantizer)})


def test_a_quantizer_class_without_marks_is_refused():
    class Unmarked(qi.BaseKerasInferableQuantizer):
        pass

    with pytest.raises(TypeError, match="mark_quantizer"):
        qi.KerasActivationQuantizationHolder(Unmarked())


def test_a_holder_takes_one_tensor():
    holder = qi.KerasActivationQuantizationHolder(activation())
    with pytest.raises(ValueError, match="one tensor"):
        holder([floats(2, 4), floats(2, 4)])


def test_a_disabled_activation_quantizer_needs_no_range():
    config = qi.TrainableQuantizerActivationConfig(
        qi.QuantizationMethod.SYMMETRIC, enable_activation_quantization=False
    )
    wrapper = built(activation_quantizers=qi.STEActivationQATQuantizer(config))
    bare = built()
    bare.set_weights(wrapper.get_weights())
    expected = to_numpy(bare(floats(2, 4)))
    np.testing.assert_array_equal(to_numpy(wrapper(floats(2, 4))), expected)


def test_a_config_does_not_share_its_lists():
    config = qi.TrainableQuantizerWeightsConfig(
        qi.QuantizationMethod.SYMMETRIC, 8, {"threshold": [1.0, 2.0]}
    )
    config.get_config()["weights_quantization_params"]["threshold"][0] = 77.0
    assert config.weights_quantization_params == {"threshold": [1.0, 2.0]}


SUM_IN_ANOTHER_ORDER = 1e-6 if keras.backend.backend() == "torch" else 0
"""PyTorch sums products of weights that require no gradient in another order."""


def snapshot(layer):
    """What a layer and the layers inside it are made of: attributes, flags, values."""
    parts = layer._flatten_layers()
    return [
        (part, dict(vars(part)), part.trainable, [to_numpy(v) for v in part.variables])
        for part in parts
    ]


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize(
    ("layer", "inputs", "path"),
    [
        (lambda: layers.Dense(2), floats(2, 3), "kernel"),
        (
            lambda: layers.Bidirectional(layers.LSTM(2)),
            floats(2, 4, 3),
            "forward_layer/cell/kernel",
        ),
        (lambda: layers.SeparableConv1D(2, 2), floats(2, 4, 3), "pointwise_kernel"),
        (Composite, floats(2, 3), "first/kernel"),
        (
            lambda: keras.Sequential([keras.Input((3,)), layers.Dense(2, name="dense")]),
            floats(2, 3),
            "layers/0/kernel",
        ),
    ],
    ids=["dense", "bidirectional", "separable", "composite", "model"],
)
def test_a_converted_wrapper_has_a_layer_of_its_own(layer, inputs, path, trainable, tmp_path):
    """Nothing is installed in the given layer, and nothing in it is frozen."""
    given = layer()
    given(inputs)
    quantizer = qi.WeightsSymmetricInferableQuantizer(8, 2.0, per_channel=False)
    variable = find_weight(given, path)
    variable.assign(quantizer(to_numpy(variable)))
    before, outputs = snapshot(given), to_numpy(given(inputs))
    wrapper = Wrapper(given, {path: quantizer}, converted=True, trainable=trainable)
    np.testing.assert_allclose(
        to_numpy(wrapper(inputs, training=False)), outputs, rtol=0, atol=SUM_IN_ANOTHER_ORDER
    )
    for (part, names, flag, values), (same, now, still, found) in zip(
        before, snapshot(given), strict=True
    ):
        assert part is same
        assert names.keys() == now.keys()
        assert all(names[name] is now[name] for name in names if callable(names[name]))
        assert flag is still
        for a, b in zip(values, found, strict=True):
            np.testing.assert_array_equal(a, b)
    inside = {id(part) for part in given._flatten_layers()}
    assert not [part for part in wrapper._flatten_layers() if id(part) in inside]
    assert wrapper.layer.name == given.name
    variable.assign(to_numpy(variable) * 0)
    np.testing.assert_allclose(
        to_numpy(wrapper(inputs, training=False)), outputs, rtol=0, atol=SUM_IN_ANOTHER_ORDER
    )
    model = keras.Sequential([keras.Input(inputs.shape[1:]), wrapper])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        to_numpy(loaded(inputs, training=False)), outputs, rtol=0, atol=SUM_IN_ANOTHER_ORDER
    )


def test_a_converted_wrapper_of_a_layer_that_is_not_built():
    given = layers.Dense(2, kernel_initializer="ones")
    quantizer = qi.WeightsSymmetricInferableQuantizer(8, 2.0, per_channel=False)
    wrapper = Wrapper(given, {"kernel": quantizer}, converted=True)
    wrapper.build((None, 3))
    assert not given.built
    np.testing.assert_array_equal(to_numpy(wrapper(np.ones((1, 3), "float32"))), [[3.0, 3.0]])


def test_made_from_its_config_a_converted_wrapper_copies_no_layer(monkeypatch):
    quantizer = qi.WeightsSymmetricInferableQuantizer(8, 2.0, per_channel=False)
    wrapper = Wrapper(layers.Dense(2), {"kernel": quantizer}, converted=True)
    wrapper.build((None, 3))
    config, made = wrapper.get_config(), []
    real = layers.Dense.from_config.__func__
    counted = classmethod(lambda cls, config: made.append(cls) or real(cls, config))
    monkeypatch.setattr(layers.Dense, "from_config", counted)
    Wrapper.from_config(config)
    assert len(made) == 1
    wrapper.convert_to_inferable_quantizers()
    assert len(made) == 2
