"""What an HDF5 file does not carry is refused before anything is written; all else is carried."""

import os

import keras
import numpy as np
import pytest
from keras import layers, ops
from reference import refused

import keras_qwrap as qi

X = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")


class Net(keras.Model):
    def __init__(self, units=4, **kwargs):
        super().__init__(**kwargs)
        self.units, self.dense = units, layers.Dense(units)

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        return super().get_config() | {"units": self.units}


class MadeWithWeights(Net):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense.build((None, 4))

    def get_config(self):
        return keras.Model.get_config(self)


class Tutorial(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4)

    def call(self, x):
        return self.dense(x)


class TutorialLayer(layers.Layer):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.dense(x)


class OfTensors(keras.Model):
    """A Functional model with a call of its own, which Keras notes no arguments of."""

    def __init__(self, inputs, outputs, **kwargs):
        super().__init__(inputs, outputs, **kwargs)

    def call(self, x):
        return 2 * super().call(x)


class OfUnits(keras.Model):
    """A Functional model that its class makes of plain values."""

    def __init__(self, units=3, **kwargs):
        inputs = keras.Input((4,))
        super().__init__(inputs, layers.Dense(units)(inputs), **kwargs)
        self.units = units

    def get_config(self):
        return {"units": self.units}


class WithGraph(layers.Layer):
    """The graph inside is none of its config."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.graph = functional(lambda x: layers.Dense(4)(x) * 2)

    def call(self, x):
        return self.graph(x)


class Double(keras.Operation):
    def call(self, x):
        return x * 2

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)


CLASSES = {
    cls.__name__: cls
    for cls in (Net, MadeWithWeights, Tutorial, TutorialLayer, OfTensors, OfUnits, WithGraph)
} | {"Double": Double, "QuantizedModel": qi.QuantizedModel}


def functional(function, shape=(4,)):
    inputs = keras.Input(shape)
    return keras.Model(inputs, function(inputs))


def sequential(*parts):
    return keras.Sequential([keras.Input((4,)), *parts])


def called(model):
    model(X)
    return model


def quantized(model, convert=False):
    new = qi.quantize_model(model, "w8a8", X, verbose=0)
    return qi.convert_to_inferable(new) if convert else new


def bfloat16(use_bias):
    dense = layers.Dense(3, use_bias=use_bias, dtype="bfloat16", name="dense")
    return qi.convert_to_inferable(qi.quantize_model(sequential(dense), "w8"))


REFUSED = {
    "quantized": (lambda: quantized(called(Net())), "QuantizedModel", "no graph", ".keras"),
    "converted": (lambda: quantized(called(Net()), True), "QuantizedModel", ".keras"),
    "quantized, made with weights": (
        lambda: quantized(called(MadeWithWeights())),
        "QuantizedModel",
        ".keras",
    ),
    "subclassed": (lambda: called(Net(name="net")), "'net' of class Net", "no graph", ".keras"),
    "operators": (
        lambda: functional(lambda x: layers.Dense(3)(x / 127.5 - 1)),
        "(TrueDivide), 'subtract",
        "Save it as .keras",
    ),
    "many operators": (lambda: functional(lambda x: x + 1 + 2 + 3 + 4 + 5), "and 1 more"),
    "a sum": (lambda: functional(lambda x: layers.Dense(4)(x) + x), "(Add)", "keras.layers.Add"),
    "functions": (lambda: functional(ops.relu), "(Relu)"),
    "functions in a model inside": (
        lambda: sequential(functional(lambda x: x * 2), layers.Dense(2)),
        "(Multiply)",
    ),
    "functions in a layer inside": (
        lambda: functional(
            lambda x: layers.TimeDistributed(functional(lambda y: y + y))(x), (5, 4)
        ),
        "(Add)",
    ),
    "functions in a wrapper": (
        lambda: functional(lambda x: qi.KerasQuantizationWrapper(functional(lambda y: y - y))(x)),
        "(Subtract)",
    ),
    "masks": (
        lambda: functional(lambda x: layers.LSTM(3)(layers.Masking()(x)), (5, 4)),
        "NotEqual",
    ),
    "quantized sum": (lambda: quantized(functional(lambda x: layers.Dense(4)(x) + x)), "(Add)"),
    "bfloat16": (
        lambda: sequential(layers.Dense(3, dtype="bfloat16")),
        "/kernel' of dtype bfloat16",
        ".keras",
    ),
    "bfloat16 besides codes": (lambda: bfloat16(True), "/bias' of dtype bfloat16"),
    "names of functions": (
        lambda: functional(lambda x: layers.Attention(name="attend")([x, x]), (5, 4)),
        "score_mode='dot' in layer 'attend'",
        ".keras",
    ),
    "tutorial": (lambda: called(Tutorial()), "Let Tutorial take **kwargs"),
    "tutorial inside": (lambda: sequential(Tutorial()), "Let Tutorial take **kwargs"),
    "tutorial layer": (lambda: sequential(TutorialLayer()), "Let TutorialLayer take **kwargs"),
    "arguments that nobody notes": (
        lambda: (lambda x: OfTensors(x, layers.Dense(3)(x)))(keras.Input((4,))),
        "OfTensors",
        "`inputs`, `outputs`",
        "`get_config`",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("ending", [".h5", ".hdf5"])
def test_what_no_loader_reads_is_refused(case, ending, tmp_path):
    if case == "names of functions" and keras.__version__.startswith("3.13"):
        pytest.skip("this Keras loads it")
    make, *fragments = REFUSED[case]
    model, path = make(), str(tmp_path / f"model{ending}")
    refused(ValueError, lambda: qi.save_quantized_model(model, path), *fragments)
    assert os.listdir(tmp_path) == []
    plain = tmp_path / "plain.h5"
    model.save(plain)
    for load in (qi.keras_load_quantized_model, keras.models.load_model):
        with pytest.raises((TypeError, ValueError, OSError)):
            load(plain, CLASSES, compile=False, safe_mode=False)


CARRIED = {
    "Sequential": lambda: quantized(sequential(layers.Dense(3))),
    "converted": lambda: quantized(sequential(layers.Dense(3)), True),
    "several inputs": lambda: (
        lambda a, b: keras.Model([a, b], layers.Add()([layers.Dense(3)(a), layers.Dense(3)(b)]))
    )(keras.Input((4,), name="a"), keras.Input((4,), name="b")),
    "shared": lambda: (lambda a, b, dense: keras.Model([a, b], [dense(a), dense(b)]))(
        keras.Input((4,)), keras.Input((4,)), layers.Dense(3)
    ),
    "model inside": lambda: sequential(functional(lambda x: layers.Dense(4)(x)), layers.Dense(2)),
    "subclassed inside": lambda: functional(lambda x: layers.Dense(2)(Net()(x))),
    "quantized model inside": lambda: functional(
        lambda x: layers.Dense(2)(quantized(called(Net()))(x))
    ),
    "wrapped subclassed": lambda: quantized(functional(lambda x: layers.Dense(2)(Net()(x)))),
    "wrapped tutorial layer": lambda: quantized(sequential(TutorialLayer()), True),
    "wrapped attention": lambda: quantized(
        functional(lambda x: layers.Attention()([layers.Reshape((2, 2))(x)] * 2))
    ),
    "made with weights": lambda: called(MadeWithWeights()),
    "Functional subclass": OfUnits,
    "functions that are layers too": lambda: functional(
        lambda x: ops.softmax(ops.concatenate([x, layers.Dense(4)(x)]))
    ),
    "a graph made by a constructor": lambda: sequential(WithGraph()),
    "an operation of the user's": lambda: functional(lambda x: Double()(layers.Dense(3)(x))),
    "Lambda": lambda: sequential(layers.Lambda(lambda x: x * 2), layers.Dense(3)),
    "mixed precision": lambda: sequential(layers.Dense(3, dtype="mixed_bfloat16")),
    "bfloat16 as codes": lambda: bfloat16(False),
    "not built": lambda: keras.Sequential([layers.Dense(3)]),
}


@pytest.mark.parametrize("case", CARRIED)
def test_what_is_read_is_written(case, tmp_path):
    model, path = CARRIED[case](), tmp_path / "model.h5"
    qi.save_quantized_model(model, path)
    new = qi.keras_load_quantized_model(path, CLASSES, compile=False, safe_mode=False)
    if not model.built:
        return
    number = len(getattr(model, "inputs", None) or [X])
    data = X if number == 1 else [X] * number
    for old, now in zip(
        keras.tree.flatten(model(data)), keras.tree.flatten(new(data)), strict=True
    ):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(ops.cast(old, "float32")),
            ops.convert_to_numpy(ops.cast(now, "float32")),
        )
