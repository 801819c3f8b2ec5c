"""The table of layer weights: complete, sound for unknown layers, and open to users."""

import inspect
import re

import keras
import numpy as np
import pytest
from keras import layers
from layer_cases import Composite, Listed, Mixer, Scale, activation, weight

import keras_qwrap as qi
from keras_qwrap.layers import layer_table
from keras_qwrap.layers.keras_internals import sublayers
from keras_qwrap.layers.layer_table import ROWS, find_row
from keras_qwrap.layers.weights import (
    default_weights,
    find_weight,
    find_weights,
    own_weights,
    weight_reason,
)


@pytest.fixture(autouse=True)
def own_tables(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(layer_table, "ROWS", dict(ROWS))


MEMBERS = [getattr(layers, name) for name in dir(layers)]
LAYER_CLASSES = {c for c in MEMBERS if isinstance(c, type) and issubclass(c, keras.Layer)}
PUBLIC = sorted(LAYER_CLASSES, key=lambda cls: cls.__name__)
FOREIGN = {"FlaxLayer", "JaxLayer", "TFSMLayer", "TorchModuleWrapper"}
NEEDS_TENSORFLOW = {"HashedCrossing", "Hashing", "IntegerLookup", "StringLookup"}
NEEDS_TENSORFLOW |= {"TextVectorization", "Pipeline"}

MAKERS = {"add_weight", "add_variable", "Variable", "Parameter"}


def names_in(code):
    inner = [names_in(const) for const in code.co_consts if inspect.iscode(const)]
    return set(code.co_names).union(*inner)


def makes_weights(cls):
    """Whether a method of the class, or of its bases but `keras.Layer`, creates variables."""
    owners = [base for base in cls.__mro__ if issubclass(base, keras.Layer)]
    members = [m for owner in owners if owner is not keras.Layer for m in vars(owner).values()]
    return any(MAKERS & names_in(m.__code__) for m in members if inspect.isfunction(m))


def test_every_public_class_whose_code_creates_weights_has_a_row():
    """Fails when Keras adds a layer with weights: give it a row."""
    assert len(PUBLIC) > 130
    makers = [cls for cls in PUBLIC if makes_weights(cls)]
    names = {cls.__name__ for cls in makers}
    assert {"Dense", "Conv3DTranspose", "LSTMCell", "BatchNormalization", "PReLU"} <= names
    rows = {name for name, row in ROWS.items() if row.weights is not None}
    without = [c.__name__ for c in makers if not rows & {base.__name__ for base in c.__mro__}]
    assert without == []


def test_no_row_is_left_over():
    """Fails when Keras renames or drops a class; two rows are for classes that are not public."""
    names = {cls.__name__ for cls in PUBLIC}
    functions = {name.replace("_", "").lower() for name in dir(keras.ops)}
    unknown = [n for n in ROWS if n not in names and n.lower() not in functions]
    assert sorted(unknown) == ["ConvLSTMCell", "QuantizingLayer"]


SMALL = {
    "activation": "relu",
    "axes": 1,
    "cell": lambda: layers.LSTMCell(2),
    "cells": lambda: [layers.LSTMCell(2), layers.GRUCell(2)],
    "dims": (1, 2, 3),
    "equation": "...x,xy->...y",
    "factor": 0.1,
    "filters": 2,
    "function": "relu",
    "groups": 1,
    "head_dim": 2,
    "height": 2,
    "height_factor": 0.1,
    "input_dim": 4,
    "kernel_size": 2,
    "key_dim": 2,
    "layer": lambda: layers.LSTM(2),
    "layers": lambda: [layers.Rescaling(2.0)],
    "max_number": 2,
    "n": 2,
    "num_bins": 4,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "num_query_heads": 2,
    "output_dim": 2,
    "output_shape": 2,
    "output_size": 2,
    "pool_size": 2,
    "rate": 0.5,
    "scale": 2.0,
    "stddev": 0.5,
    "target_shape": (-1,),
    "units": 2,
    "width": 2,
    "width_factor": 0.1,
}
"""Small values of required arguments, by name, and below of arguments of single classes."""

OTHERS = {
    "CategoryEncoding": {"num_tokens": 4},
    "Discretization": {"num_bins": 4},
    "GroupNormalization": {"groups": 1},
    "InputLayer": {"shape": (4,)},
    "Lambda": {"function": keras.ops.abs},
    "RandomPosterization": {"factor": 4},
    "SpectralNormalization": {"layer": lambda: layers.Dense(2)},
    "TimeDistributed": {"layer": lambda: layers.Dense(2)},
}

SHAPES = [(2, 8, 8, 3), (2, 8, 3), (2, 8), (1, 8, 8, 8, 3), (1, 2, 8, 8, 8, 3)]


def small_arguments(cls):
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD
    required = [p.name for p in parameters if p.kind is named and p.default is p.empty]
    chosen = {name: SMALL[name] for name in required} | OTHERS.get(cls.__name__, {})
    return {
        k: v() if inspect.isfunction(v) and v.__name__ == "<lambda>" else v
        for k, v in chosen.items()
    }


def small(cls):
    """A small built layer of any class of Keras: built with the first shapes that it takes."""
    errors = []
    for shape in SHAPES:
        for shapes in ([shape], [[shape, shape]], [shape, shape]):
            layer = cls(**small_arguments(cls))
            try:
                layer.build(*shapes)
            except (ValueError, TypeError, IndexError) as error:
                errors.append(error)
            else:
                return layer
    raise AssertionError(f"{cls.__name__}: no shape will do: {errors}")


def _row(cls):
    marks = [pytest.mark.tensorflow] if cls.__name__ in NEEDS_TENSORFLOW else []
    return pytest.param(cls, id=cls.__name__, marks=marks)


@pytest.mark.filterwarnings("ignore:`build\\(\\)` was called on layer:UserWarning")
@pytest.mark.parametrize("cls", [_row(c) for c in PUBLIC if c.__name__ not in FOREIGN])
def test_no_weight_of_a_keras_layer_meets_the_default_rule(cls):
    """Whatever owns a weight in a built layer, classes that are not public among it, has a row."""
    layer = small(cls)
    owners = [inner for inner in sublayers(layer) if own_weights(inner)]
    assert [type(inner).__name__ for inner in owners if find_row(inner) is None] == []
    default_weights(layer)
    assert all(weight_reason(inner) for inner in sublayers(layer))


def built(layer, shape=(2, 5)):
    layer.build(shape)
    return layer


class Block(layers.Layer):
    """A user's layer: a kernel of its own, a state, a layer inside and a weight of that layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.tied = self.dense.kernel
        self.kernel = self.add_weight(name="kernel", shape=(input_shape[-1], 3))
        self.offset = self.add_weight(name="offset", shape=(3,))
        self.state = self.add_weight(name="state", shape=(3, 3), trainable=False)
        self.table = self.add_weight(
            name="t", shape=(2, 2), dtype="int32", initializer="zeros", trainable=False
        )


def test_unknown_layer_with_layers_inside():
    layer = built(Block())
    assert default_weights(layer) == {"kernel": -1, "tied": -1}
    assert weight_reason(layer) == (
        "no row for Block: the default rule quantizes its largest kernels only"
    )


def test_a_frozen_layer_is_quantized_as_any_other():
    layer = built(Block())
    layer.trainable = False
    assert default_weights(layer) == {"kernel": -1, "tied": -1}


def test_a_subclass_follows_the_row_of_its_base():
    class Projection(layers.Dense):
        def build(self, input_shape):
            super().build(input_shape)
            self.extra = self.add_weight(name="extra", shape=(2, 3, 4))

    assert default_weights(built(Projection(2))) == {"kernel": -1}


def test_a_namesake_of_a_keras_layer_is_unknown():
    namesake = type("PReLU", (Listed,), {})
    layer = built(namesake())
    assert default_weights(layer) == {"lst/0": -1, "lst/1": -1}
    assert weight_reason(layer).startswith("no row for PReLU")


def test_a_weight_with_two_owners_is_there_once():
    shared = layers.Dense(5)
    model = keras.Sequential([keras.Input((5,)), shared, layers.ReLU(), shared])
    assert default_weights(model) == {"layers/0/kernel": -1}


def test_a_row_can_speak_for_the_layers_inside():
    """Spectral normalization writes to the kernel of the layer inside."""
    model = keras.Sequential(
        [keras.Input((5,)), layers.SpectralNormalization(layers.Dense(2)), layers.Dense(3)]
    )
    assert default_weights(model) == {"layers/1/kernel": -1}
    assert "overwrites its kernel" in weight_reason(model.layers[0])


def test_what_is_quantized_already_is_left_out():
    wrapped = qi.KerasQuantizationWrapper(layers.Dense(4), {"kernel": weight()}, activation())
    model = keras.Sequential([keras.Input((5,)), wrapped, layers.Dense(3)])
    assert default_weights(model) == {"layers/1/kernel": -1}
    assert weight_reason(wrapped) == "QuantizingLayer: its weights have their quantizers already"


def test_default_weights_can_be_wrapped():
    layer = Composite()
    layer(np.zeros((2, 5), "float32"))
    quantizers = {p: weight(axis=axes) for p, axes in default_weights(layer).items()}
    wrapper = qi.KerasQuantizationWrapper(layer, quantizers)
    wrapper(np.zeros((2, 5), "float32"))
    assert sorted(wrapper.get_codes()) == ["blocks/0/kernel", "blocks/1/kernel", "first/kernel"]


def test_weights_that_keras_quantized_are_left_out():
    layer = built(layers.Dense(4))
    layer.quantize("int8")
    assert default_weights(layer) == {}
    assert weight_reason(layer).endswith("; this layer has no float weight kernel")


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Scale(), "no row for Scale: it has no trainable float weight of rank 2 or more"),
        (layers.ReLU(), "ReLU has no weights of its own"),
        (layers.Dense(2), "Dense: a bias is small, and integer kernels add it in 32 bits"),
    ],
)
def test_reasons(layer, reason):
    assert weight_reason(built(layer)) == reason


class Part(Mixer):
    """A layer to register: two kernels."""


def part():
    layer = Part()
    layer.build((2, 3), (2, 4))
    return layer


def test_registered_weights():
    assert default_weights(part()) == {"left": -1, "right": -1}
    qi.register_layer_weights(Part, {"right": 0}, {"r": "right"})
    layer = part()
    assert default_weights(layer) == {"right": 0}
    assert find_weight(layer, "r") is layer.right
    assert weight_reason(layer) == "Part: the weights registered for Part do not include them"
    subclass = type("Smaller", (Part,), {})()
    subclass.build((2, 3), (2, 4))
    assert default_weights(subclass) == {"right": 0}
    base = Mixer()
    base.build((2, 3), (2, 4))
    assert default_weights(base) == {"left": -1, "right": -1}


def test_registering_again_replaces():
    qi.register_layer_weights(Part, {"right": 0}, {"r": "right"})
    qi.register_layer_weights(Part, {"left": [0, 1], "right": None, "absent": -1})
    layer = part()
    assert default_weights(layer) == {"left": (0, 1), "right": None}
    assert weight_reason(layer).endswith("; this layer has no float weight absent")
    with pytest.raises(ValueError, match="a weight of layer"):
        find_weight(layer, "r")


def test_registered_classes_of_keras_and_paths_through_layers_go_before_their_rows():
    qi.register_layer_weights(layers.Embedding, {"embeddings": 0})
    assert default_weights(built(layers.Embedding(4, 2))) == {"embeddings": 0}
    qi.register_layer_weights(Block, {"inner/kernel": None}, {"inner": "dense"})
    assert default_weights(built(Block())) == {"tied": None}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Part(), {}), TypeError, "layer_class: received <Part .*expected a subclass of keras.L"),
        ((dict, {}), TypeError, "layer_class: received <class 'dict'>"),
        ((Part, ["left"]), TypeError, r"weights: received \['left'\] .*expected a dictionary"),
        ((Part, {0: -1}), TypeError, "weights: received 0 .*expected weight paths as keys"),
        ((Part, {"a//b": -1}), TypeError, "weights: received 'a//b', "),
        ((Part, {"left": 1.0}), TypeError, r"weights\['left'\]: received 1.0 .*expected an int"),
        ((Part, {"left": True}), TypeError, r"weights\['left'\]: received True"),
        ((Part, {"left": ()}), TypeError, r"weights\['left'\]: received \(\)"),
        ((Part, {"left": (1, 0)}), ValueError, r"expected distinct axes in ascending order"),
        ((Part, {"left": (-1, 1)}), ValueError, r"received \(-1, 1\) .*counted from one end"),
        ((Part, {}, "left"), TypeError, "aliases: received 'left', expected a dictionary"),
        ((Part, {}, {"l": 3}), ValueError, r"aliases\['l'\]: received 3 .*one attribute"),
        ((Part, {}, {"l/m": "left"}), ValueError, r"aliases\['l/m'\]: received 'left'"),
    ],
)
def test_wrong_registrations_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        qi.register_layer_weights(*arguments)
    assert Part not in layer_table.ROWS


def test_axes_that_the_weight_does_not_have_are_refused():
    qi.register_layer_weights(Part, {"left": 2})
    message = re.escape("Part: 'left': received 2 (of type int), expected axes of a weight of rank")
    with pytest.raises(ValueError, match=message):
        default_weights(part())


def test_a_layer_that_is_not_built_is_refused():
    with pytest.raises(ValueError, match=r"which is not built.*expected a built layer\. Call it"):
        default_weights(layers.Dense(2))


def test_paths_that_give_the_same_names_are_refused():
    """The names of quantizers' variables are paths with `/` written as `_`."""
    layer = layers.Layer()
    layer.a_b, layer.a = Composite(), Composite()
    layer.a_b.c, layer.a.b_c = built(layers.Dense(2)), built(layers.Dense(3))
    layer.built = True
    assert len(find_weights(layer, ["a_b/c/kernel"])) == 1
    message = "received 'a/b_c/kernel', expected a path that differs from 'a_b/c/kernel' in more"
    with pytest.raises(ValueError, match=message):
        find_weights(layer, ["a_b/c/kernel", "a/b_c/kernel"])
