"""What the wrapper refuses, and that nothing of ours stays on what the user passed."""

import copy
import gc
import json

import keras
import numpy as np
import pytest
from keras import layers, ops
from layer_cases import Scale, activation, fixed, floats, register, weight

import keras_qwrap as qi

Wrapper = qi.KerasQuantizationWrapper


def to_numpy(tensor):
    return np.array(ops.convert_to_numpy(tensor))


def config(**kwargs):
    return qi.TrainableQuantizerWeightsConfig(qi.QuantizationMethod.SYMMETRIC, **kwargs)


def _wrong_arguments():
    built = Wrapper(layers.Dense(2))
    built.build((None, 3))
    dense = layers.Dense(2)
    twice = Wrapper(dense, {"kernel": weight()})
    return [
        (TypeError, lambda: Wrapper("dense"), "layer: received 'dense'", "a Keras layer"),
        (TypeError, lambda: Wrapper(layers.Dense), "layer: received <class", "a Keras layer"),
        (
            TypeError,
            lambda: Wrapper(dense, [weight()]),
            "weights_quantizers: received",
            "dictionar",
        ),
        (TypeError, lambda: Wrapper(dense, {0: weight()}), "received 0", "weight paths as keys"),
        (TypeError, lambda: Wrapper(dense, {"": weight()}), "received ''", "weight paths"),
        (TypeError, lambda: Wrapper(dense, {"kernel": 8}), "['kernel']: received 8", "quantizer"),
        (
            TypeError,
            lambda: Wrapper(dense, {"kernel": qi.STEWeightQATQuantizer}),
            "received <class",
            "Pass an instance",
        ),
        (
            ValueError,
            lambda: Wrapper(dense, {"kernel": activation()}),
            "weights_quantizers['kernel']",
            "a quantizer for weights",
        ),
        (
            ValueError,
            lambda: Wrapper(dense, {}, [weight()]),
            "activation_quantizers[0]",
            "a quantizer for activation",
        ),
        (TypeError, lambda: Wrapper(dense, {}, "int8"), "activation_quantizers[0]", "quantizer"),
        (ValueError, lambda: Wrapper(dense, dtype="float16"), "dtype: received", "wrapped layer"),
        (
            ValueError,
            lambda: twice.add_weights_quantizer("kernel", weight()),
            "received 'kernel', which has a quantizer already",
            "one quantizer for each weight",
        ),
        (
            ValueError,
            lambda: built.add_weights_quantizer("kernel", weight()),
            "which is built",
            "before the first call",
        ),
        (ValueError, lambda: twice.get_codes(), "which is not built", "Call it"),
        (ValueError, lambda: twice.get_quantized_weights(), "not built", "Call it"),
        (ValueError, lambda: twice.convert_to_inferable_quantizers(), "not built", "Call it"),
        (ValueError, lambda: twice.latent_weight("bias"), "name: received 'bias'", "one of"),
    ]


@pytest.mark.parametrize("row", range(17))
def test_wrong_arguments_are_refused(row):
    error, action, received, advice = _wrong_arguments()[row]
    with pytest.raises(error) as caught:
        action()
    assert received in str(caught.value)
    assert advice in str(caught.value)


def test_every_wrong_argument_is_tested():
    assert len(_wrong_arguments()) == 17


def refused_at_build(layer, weights, shape, *parts, error=ValueError, outputs=None):
    wrapper = Wrapper(layer, weights, outputs)
    with pytest.raises(error) as caught:
        wrapper.build(shape)
    for part in parts:
        assert part in str(caught.value)


def test_unknown_weight_lists_those_that_exist_and_the_nearest():
    refused_at_build(
        layers.LSTM(2),
        {"cell/kernle": weight()},
        (None, 4, 3),
        "received 'cell/kernle'",
        "cell/bias, cell/kernel, cell/recurrent_kernel",
        "The nearest is 'cell/kernel'.",
    )
    refused_at_build(layers.ReLU(), {"kernel": weight()}, (None, 3), "it has none")
    refused_at_build(layers.Dense(2), {"bias/0": weight()}, (None, 3), "bias/0", "bias, kernel")
    refused_at_build(layers.Dense(2, use_bias=False), {"bias": fixed()}, (None, 3), "kernel")
    refused_at_build(layers.RNN([layers.LSTMCell(2)]), {"cell/cells/7/kernel": fixed()}, (1, 4, 3))


def test_path_to_something_that_is_no_weight():
    for path, kind in (("units", "int"), ("name", "str"), ("call", "method")):
        refused_at_build(
            layers.Dense(2), {path: weight()}, (None, 3), kind, "keras.Variable", error=TypeError
        )


def test_threshold_count_that_does_not_fit_the_channels():
    refused_at_build(
        layers.Dense(2), {"kernel": weight(threshold=[1.0, 2.0, 3.0])}, (None, 4), "3", "2"
    )
    quantizer = qi.WeightsSymmetricInferableQuantizer(8, [1.0, 2.0], True, 0, 2)
    refused_at_build(layers.Dense(2), {"kernel": quantizer}, (None, 4), "channels")
    refused_at_build(layers.Conv1D(2, 3), {"kernel": quantizer}, (None, 4, 2), "rank 2")


def test_axis_that_the_weight_does_not_have():
    refused_at_build(layers.Dense(2), {"bias": weight(axis=1)}, (None, 4), "channel_axis", "rank 1")


def fixed_activation():
    return qi.ActivationSymmetricInferableQuantizer(8, 1.0, signed=True)


def test_number_of_activation_quantizers():
    two = [activation(), fixed_activation()]
    lstm = layers.LSTM(2, return_state=True)
    refused_at_build(lstm, {}, (None, 4, 3), "received 2", "3, one for each", outputs=two)
    refused_at_build(
        layers.Dense(2), {}, (None, 3), "expected 1, one for each", outputs=two[1:] * 2
    )


def test_number_of_outputs_that_a_later_call_changes():
    wrapper = Wrapper(layers.MultiHeadAttention(1, 2), {}, [activation()])
    x = floats(2, 3, 4)
    wrapper(x, x)
    with pytest.raises(ValueError, match=r"received 1 .*, expected 2, one for each output"):
        wrapper(x, x, return_attention_scores=True)
    wrapper = Wrapper(layers.MultiHeadAttention(1, 2), {}, [activation(), fixed_activation()])
    with pytest.raises(ValueError, match=r"received 2 .*, expected 1.*by calling it with them"):
        wrapper(x, x)


@register
class Integers(layers.Layer):
    def build(self, input_shape):
        self.table = self.add_weight(name="table", shape=(3,), dtype="int32", trainable=False)

    def call(self, inputs):
        return inputs


def test_integer_weight():
    refused_at_build(
        Integers(), {"table": fixed()}, (None, 3), "table", "'int32'", "floating", error=TypeError
    )


@pytest.mark.tensorflow
def test_call_that_is_a_traced_function():
    import tensorflow as tf

    class Traced(Scale):
        @tf.function
        def call(self, inputs):
            return inputs * self.factor

    refused_at_build(Traced(), {"factor": fixed()}, (None, 3), "`tf.function`", "Remove the deco")
    outer = keras.Sequential([keras.Input((3,)), Traced(name="inside")])
    refused_at_build(outer, {"layers/0/factor": fixed()}, (None, 3), "'inside'")


@pytest.mark.tensorflow
def test_raw_tensorflow_variable():
    import tensorflow as tf

    class Raw(layers.Layer):
        def build(self, input_shape):
            self.raw = tf.Variable(tf.ones((3,)))

        def call(self, inputs):
            return inputs * self.raw

    refused_at_build(Raw(), {"raw": fixed()}, (None, 3), "Variable", "add_weight")


def test_lora():
    layer = layers.Dense(2, lora_rank=1)
    refused_at_build(layer, {"kernel": weight()}, (None, 3), "without LoRA", "before wrapping")
    layer = layers.Dense(2)
    layer.build((None, 3))
    layer.enable_lora(1)
    refused_at_build(layer, {"kernel": weight()}, (None, 3), "without LoRA")


def test_layer_that_keras_has_quantized():
    layer = layers.Dense(2)
    layer.build((None, 3))
    layer.quantize("int8")
    refused_at_build(layer, {"kernel": weight()}, (None, 3), "quantization mode int8", "a float")
    policy = layers.Dense(2, dtype="int8_from_float32")
    refused_at_build(policy, {"kernel": weight()}, (None, 3), "a float layer")


def test_one_weight_by_two_paths():
    layer = layers.MultiHeadAttention(1, 2)
    quantizers = {"query/kernel": weight(), "query_dense/kernel": weight()}
    with pytest.raises(ValueError, match=r"another weight than 'query/kernel'"):
        Wrapper(layer, quantizers)(floats(1, 3, 4), floats(1, 3, 4))


def test_quantizer_that_changes_the_shape():
    class Wide(qi.STEWeightQATQuantizer):
        def __call__(self, inputs):
            return ops.concatenate([inputs, inputs])

    wrapper = Wrapper(layers.Dense(2), {"kernel": Wide(config())})
    with pytest.raises(ValueError, match=r"Wide: received \(6, 2\).*shape, \(3, 2\)"):
        wrapper(floats(1, 3))


def test_trainable_quantizer_belongs_to_one_layer():
    used = weight()
    owner = Wrapper(layers.Dense(2, name="owner"), {"kernel": used})
    with pytest.raises(ValueError, match=r"belongs to layer 'owner' already"):
        Wrapper(layers.Dense(2), {"kernel": used})
    with pytest.raises(ValueError, match=r"belongs to layer 'owner' already"):
        owner.add_weights_quantizer("bias", used)
    with pytest.raises(ValueError, match=r"used nowhere else"):
        Wrapper(layers.Dense(2), {"kernel": (both := weight(per_channel=False)), "bias": both})
    output = activation()
    with pytest.raises(ValueError, match=r"used nowhere else"):
        Wrapper(layers.LSTM(2, return_state=True), {}, [output] * 3)
    holder = qi.KerasActivationQuantizationHolder(held := activation(), name="holder")
    with pytest.raises(ValueError, match=r"belongs to layer 'holder' already"):
        qi.KerasActivationQuantizationHolder(held)
    with pytest.raises(ValueError, match=r"belongs to layer 'holder' already"):
        Wrapper(layers.Dense(2), {}, held)
    assert holder.owns(held)


def test_copy_of_a_trainable_quantizer_may_be_used():
    """Also after its layer is gone, the object itself."""
    used = weight(3)
    owner = Wrapper(layers.Dense(2), {"kernel": used})
    owner.build((None, 3))
    twin = copy.deepcopy(used)
    other = Wrapper(layers.Dense(2), {"kernel": twin})
    other.build((None, 3))
    other.latent_weight("kernel").assign(floats(3, 2))
    codes = other.get_codes()["kernel"][0]
    assert abs(codes).max() == 3
    assert not np.array_equal(codes, owner.get_codes()["kernel"][0])


def test_inferable_quantizer_may_be_shared_and_is_copied():
    quantizer = fixed(0.5)
    before = json.dumps(quantizer.get_config()), sorted(vars(quantizer))
    wrapper = Wrapper(layers.Dense(2), {"kernel": quantizer, "bias": quantizer})
    other = Wrapper(layers.Dense(2), {"kernel": quantizer})
    for each in (wrapper, other):
        each(floats(1, 3))
        assert not each.owns(quantizer)
    assert wrapper.weights_quantizers["kernel"] is not wrapper.weights_quantizers["bias"]
    assert (json.dumps(quantizer.get_config()), sorted(vars(quantizer))) == before
    assert quantizer.quantizer_parameters == {}


def _state(layer):
    return (
        json.dumps(layer.get_config(), default=str),
        sorted(vars(layer)),
        [(v.path, v.trainable, to_numpy(v).tolist()) for v in layer.variables],
        [type(inner) for inner in layer._flatten_layers()],
        layer.trainable,
    )


@pytest.mark.parametrize("make", [lambda: layers.Dense(2), lambda: layers.LSTM(2)])
def test_nothing_of_ours_stays_on_the_wrapped_layer(make, tmp_path):
    """A layer that was built before, through wrapping, calling, converting and saving."""
    layer = make()
    x = floats(2, 4, 3)
    layer(x)
    path = "cell/kernel" if isinstance(layer, layers.LSTM) else "kernel"
    call, before = layer.call, _state(layer)
    wrapper = Wrapper(layer, {path: weight(3)}, activation())
    model = keras.Sequential([keras.Input((4, 3)), wrapper])
    model(x, training=True)
    model.predict(x, verbose=0)
    qi.convert_to_inferable(model)
    model.save(tmp_path / "model.keras")
    wrapper.get_codes()
    assert _state(layer) == before
    assert layer.call == call
    del wrapper, model
    gc.collect()
    assert _state(layer) == before


def test_mappings_and_lists_of_the_user_are_copied():
    weights, outputs = {"kernel": weight()}, [activation()]
    wrapper = Wrapper(layers.Dense(2), weights, outputs)
    wrapper.add_weights_quantizer("bias", fixed())
    assert list(weights) == ["kernel"]
    weights.clear()
    outputs.clear()
    wrapper(floats(1, 3))
    assert (wrapper.num_weights_quantizers, wrapper.num_activation_quantizers) == (2, 1)


def test_newer_or_foreign_format_is_refused():
    for version, text in ((3, "newer"), (0, "damaged"), (None, "damaged"), (True, "damaged")):
        for layer in (
            Wrapper(layers.Dense(2)),
            qi.KerasActivationQuantizationHolder(activation()),
        ):
            saved = layer.get_config()
            with pytest.raises(ValueError, match=text):
                type(layer).from_config(saved | {"format_version": version})
            assert saved["format_version"] == 2
            assert type(layer).from_config(saved | {"format_version": 1}).get_config() == saved
