"""`add_weight` of wrapper and holder, through which quantizers create their variables."""

import numpy as np
import pytest
from keras import layers, ops
from layer_cases import activation, fixed

import keras_qwrap as qi

Wrapper = qi.KerasQuantizationWrapper


def to_numpy(tensor):
    return np.array(ops.convert_to_numpy(tensor))


def owner():
    """A holder, which owns `add_weight` as a wrapper does."""
    return qi.KerasActivationQuantizationHolder(activation())


@pytest.mark.parametrize(
    "add",
    [
        lambda layer: layer.add_weight("v", shape=4, initializer="ones", trainable=False),
        lambda layer: layer.add_weight("v", (4,), "float32", "ones", None, False),
        lambda layer: layer.add_weight("v", [np.int64(4)], initializer="ones", trainable=False),
        lambda layer: layer.add_weight((4,), "ones", "float32", name="v", trainable=False),
        lambda layer: layer.add_weight(name="v", shape=4, initializer="ones", trainable=False),
        lambda layer: layer.add_weight(
            "v",
            shape=(4,),
            initializer="ones",
            trainable=False,
            synchronization="auto",
            use_resource=True,
            aggregation=None,
        ),
    ],
)
def test_add_weight_in_the_styles_of_keras_2_and_3(add):
    layer = owner()
    variable = add(layer)
    np.testing.assert_array_equal(to_numpy(variable), np.ones(4, "float32"), strict=True)
    assert (variable.name, variable.trainable) == ("v", False)
    assert any(variable is mine for mine in layer.non_trainable_weights)


def test_add_weight_defaults_and_refusals():
    layer = owner()
    assert layer.add_weight("scalar", shape=(), trainable=None).trainable
    assert tuple(layer.add_weight("other").shape) == ()
    with pytest.raises(TypeError, match=r"received \['shape'\] by position and by keyword"):
        layer.add_weight("v", 4, shape=4)
    with pytest.raises(TypeError, match="received 4 positional arguments, expected at most 3"):
        layer.add_weight((4,), "zeros", "float32", True)


def test_names_of_variables_are_unique_in_a_layer():
    layer = owner()
    assert [layer.add_weight(name, shape=()).name for name in ("v", "a/v", "v", "a_v", "v")] == [
        "v",
        "a_v",
        "v_1",
        "a_v_1",
        "v_2",
    ]


@pytest.mark.tensorflow
def test_tensorflow_aggregations_are_understood():
    import tensorflow as tf

    for kind, expected in (("MEAN", "mean"), ("SUM", "sum"), ("ONLY_FIRST_REPLICA", None)):
        aggregation = getattr(tf.VariableAggregation, kind)
        variable = owner().add_weight("v", shape=(), aggregation=aggregation)
        assert variable.aggregation == (expected or "only_first_replica")
    assert owner().add_weight("v", aggregation=tf.VariableAggregation.NONE).aggregation == "none"


def test_quantizers_variables_are_named_by_the_tensor_they_quantize():
    lstm = layers.LSTM(2)
    paths = ("cell/kernel", "cell/recurrent_kernel")
    wrapper = Wrapper(lstm, {path: fixed() for path in paths}, activation())
    wrapper.build((None, 4, 3))
    own = {variable.name for variable in wrapper.variables} - {v.name for v in lstm.variables}
    assert own == {
        "cell_kernel_threshold",
        "cell_recurrent_kernel_threshold",
        "output_0_threshold",
    }
