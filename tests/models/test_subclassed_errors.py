"""Subclassed models: their inner layers by path, and what is refused."""

import keras
import numpy as np
import pytest
from reference import refused
from subclassed_models import (
    Named,
    Net,
    OwnStep,
    Scaled,
    Sequences,
    Tower,
    Unserializable,
    X,
    built,
    output,
    weight,
)

from keras_qwrap.models.subclassed import QuantizedModel
from keras_qwrap.models.taps import layer_outputs, quantizable_layers


def test_units_are_leaves_and_composites_of_keras_by_their_paths():
    assert list(quantizable_layers(Net())) == [
        "blocks/0/dense",
        "blocks/1/dense",
        "first",
        "head/layers/0",
        "head/layers/1",
        "norm",
    ]
    assert list(quantizable_layers(Sequences())) == ["attention", "both", "embedding", "lstm"]
    own = list(quantizable_layers(keras.Sequential([Scaled(2), keras.layers.Dropout(0.5)])))
    assert own == ["layers/0/dense"]
    model = keras.Sequential([keras.Input((2,)), Scaled(2)])
    assert list(quantizable_layers(model)) == ["layers/0", "layers/0/dense"]


def tower(activations, **kwargs):
    x, index = X, np.zeros(8, "int32")
    return QuantizedModel(Tower(), {}, activations, example=((x, index), {}), **kwargs)


@pytest.mark.parametrize(
    ("error", "action", "fragments"),
    [
        (TypeError, lambda: QuantizedModel(keras.Sequential()), ["graph"]),
        (TypeError, lambda: QuantizedModel("model"), ["subclassed"]),
        (ValueError, lambda: QuantizedModel(QuantizedModel(Named())), ["float model"]),
        (ValueError, lambda: QuantizedModel(Unserializable(len)), ["get_config"]),
        (
            ValueError,
            lambda: QuantizedModel(built(Tower(), X, np.zeros(8, "int32"))),
            ["example=(args, kwargs)"],
        ),
        (ValueError, lambda: layer_outputs(Net()), ["example"]),
        (ValueError, lambda: tower({"ad": output(1.0)}), ["'add'", "'ad'"]),
        (ValueError, lambda: tower({"a/kernel": output(1.0)}), ["a layer inside"]),
        (ValueError, lambda: tower({"unused": output(1.0)}), ["'unused'", "example"]),
        (ValueError, lambda: tower({"a": output(1.0), "layers/0": output(1.0)}), ["'a'"]),
        (ValueError, lambda: tower({"a": [output(1.0), output(2.0)]}), ["2", "1, one"]),
        (TypeError, lambda: tower({"a": weight}), ["quantizer"]),
        (ValueError, lambda: tower({"a": weight()}), ["activation"]),
        (TypeError, lambda: tower([output(1.0)]), ["dictionary"]),
        (TypeError, lambda: tower({"largest": output(1.0)}), ["int", "floats"]),
        (TypeError, lambda: QuantizedModel(Net(), example=X), ["example"]),
        (ValueError, lambda: QuantizedModel(Net()).unwrap(), ["built"]),
    ],
)
def test_refusals(error, action, fragments):
    refused(error, action, *fragments)


def test_a_model_with_its_own_train_step_is_warned_about():
    with pytest.warns(UserWarning, match="Keras' own training steps.*its own train_step"):
        QuantizedModel(OwnStep())
