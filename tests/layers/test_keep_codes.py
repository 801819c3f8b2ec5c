"""Converted models that hold integer codes in memory: the same models, smaller."""

import copy
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers
from layer_cases import CASES, METHODS, floats, weight
from reference import refused, to_numpy
from subclassed_models import Net
from subclassed_models import X as SUBCLASSED_X

import keras_qwrap as qi
from keras_qwrap.layers.packed import KEEP_CODES, CodesVariable

Wrapper = qi.KerasQuantizationWrapper


def kept(wrapper):
    """The same converted wrapper, which keeps its codes."""
    token = KEEP_CODES.set(True)
    try:
        new = Wrapper.from_config(wrapper.get_config())
        new.build_from_config(wrapper.get_build_config())
    finally:
        KEEP_CODES.reset(token)
    new.set_weights(wrapper.get_weights())
    return new


def codes_in(layer):
    return [v for v in layer.variables if v.dtype in ("int8", "uint8", "int16", "uint16")]


@pytest.mark.parametrize("case", [case for case in CASES if case.weights], ids=lambda c: c.name)
def test_outputs_and_codes_of_every_layer(case):
    wrapper = Wrapper(case.layer(), case.own_weights())
    wrapper(*case.inputs, **dict(case.call))
    converted = wrapper.convert_to_inferable_quantizers()
    small = kept(converted)
    for path, parts in converted.get_codes().items():
        for found, expected in zip(small.get_codes()[path], parts, strict=True):
            np.testing.assert_array_equal(found, expected)
    assert [v.shape for v in small.weights] == [v.shape for v in converted.weights]
    assert len(codes_in(small)) == len(converted.get_codes())
    assert not codes_in(converted)
    assert small.count_params() == converted.count_params()
    call = dict(case.call) | {"training": False}
    expected, found = (layer(*case.inputs, **call) for layer in (converted, small))
    for a, b in zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b))
    again = small.convert_to_inferable_quantizers()
    assert not codes_in(again)
    for a, b in zip(again.get_weights(), small.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def convolutional(bits=8):
    """Converted, with a nested model, batch normalization, a shared layer and dropout."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 2))
    shared = layers.Conv2D(2, 3, padding="same")
    x = layers.BatchNormalization()(shared(shared(inputs)))
    inner = keras.Sequential([keras.Input((6, 6, 2)), layers.Flatten(), layers.Dense(3)])
    model = keras.Model(inputs, layers.Dense(2)(layers.Dropout(0.5)(inner(x))))
    return qi.convert_to_inferable(qi.quantize_model(model, f"w{bits}"))


X = floats(4, 6, 6, 2)


def cleared_weights(layer):
    """Zeros for quantized weights, and all else as it is."""
    stored = [isinstance(weight, CodesVariable) for weight in layer.weights]
    pairs = zip(layer.get_weights(), stored, strict=True)
    return [np.zeros_like(array) if quantized else array for array, quantized in pairs]


@pytest.mark.parametrize("ending", [".keras", ".h5"])
@pytest.mark.parametrize("bits", [3, 8, 12])
def test_the_loader_decides(bits, ending, tmp_path):
    model = convolutional(bits)
    path = str(tmp_path / f"model{ending}")
    qi.save_quantized_model(model, path)
    small = qi.keras_load_quantized_model(path, keep_codes=True)
    assert len(codes_in(small)) == 3
    assert {v.dtype for v in codes_in(small)} == {"int16" if bits > 8 else "int8"}
    assert not codes_in(qi.keras_load_quantized_model(path))
    np.testing.assert_array_equal(to_numpy(small(X)), to_numpy(model(X)))
    np.testing.assert_array_equal(small.predict(X, verbose=0), model.predict(X, verbose=0))
    for other in (".h5", "_packed.h5", ".keras"):
        again = str(tmp_path / f"again{other}")
        if other == "_packed.h5":
            qi.save_quantized_model(small, again)
        else:
            small.save(again)
        for keep in (True, False):
            loaded = qi.keras_load_quantized_model(again, keep_codes=keep)
            assert bool(codes_in(loaded)) is keep
            np.testing.assert_array_equal(to_numpy(loaded(X)), to_numpy(model(X)))
    assert not codes_in(keras.models.load_model(again))
    weights = str(tmp_path / "model.weights.h5")
    model.save_weights(weights)
    cleared = qi.keras_load_quantized_model(path, keep_codes=True)
    for layer in cleared.layers:
        layer.set_weights(cleared_weights(layer))
    cleared.load_weights(weights)
    np.testing.assert_array_equal(to_numpy(cleared(X)), to_numpy(model(X)))


def test_what_else_is_done_with_models(tmp_path):
    model = convolutional()
    path = str(tmp_path / "model.keras")
    model.save(path)
    small = qi.keras_load_quantized_model(path, keep_codes=True)
    expected = to_numpy(model(X))
    clone = keras.models.clone_model(small)
    clone.set_weights(small.get_weights())
    converted = qi.convert_to_inferable(small)
    unwrapped = qi.unwrap_model(small)
    for other in (clone, converted, unwrapped, copy.deepcopy(small)):
        assert not codes_in(other)
        np.testing.assert_array_equal(to_numpy(other(X)), expected)
    report, same = (qi.quantization_report(each).to_dict() for each in (small, model))
    assert report == same


@pytest.mark.parametrize("method", ["symmetric", "uniform", "lookup"])
def test_every_kind_of_quantizer(method):
    table = {"lut_values": [-100, -20, 0, 30, 60, 127], "threshold": [0.7, 1.1]}
    channels = {"per_channel": True, "channel_axis": 1, "input_rank": 2}
    quantizer = {
        "symmetric": lambda: qi.WeightsSymmetricInferableQuantizer(8, [0.7, 1.1], **channels),
        "uniform": lambda: qi.WeightsUniformInferableQuantizer(8, [-1, 0], [0.5, 2.0], **channels),
        "lookup": lambda: qi.WeightsLUTSymmetricInferableQuantizer(3, **table, **channels),
    }[method]()
    wrapper = Wrapper(layers.Dense(2, kernel_initializer="normal"), {"kernel": quantizer})
    wrapper.build((None, 5))
    converted = wrapper.convert_to_inferable_quantizers()
    small = kept(converted)
    assert codes_in(small)[0].dtype == ("int8" if method == "symmetric" else "uint8")
    np.testing.assert_array_equal(to_numpy(small(floats(3, 5))), to_numpy(converted(floats(3, 5))))


@keras.saving.register_keras_serializable("test_keep_codes")
@qi.mark_quantizer(qi.QuantizationTarget.Weights, [METHODS.SYMMETRIC])
class Squares(qi.BaseKerasInferableQuantizer):
    """Of a user, on a grid without steps."""

    num_bits, scale, zero_point = 4, np.float32(1), np.int32(0)

    def __call__(self, inputs):
        return keras.ops.square(keras.ops.round(keras.ops.sqrt(keras.ops.abs(inputs))))

    def quantize_to_codes(self, x):
        return np.clip(np.round(np.sqrt(np.abs(np.float32(x)))), 0, 15).astype(np.int32)

    def dequantize(self, codes):
        return np.square(np.float32(codes))

    def get_config(self):
        return {}


@keras.saving.register_keras_serializable("test_keep_codes")
class SquaredTensors(Squares):
    """And what its codes are worth as tensors."""

    def dequantize_tensor(self, codes):
        return keras.ops.square(keras.ops.cast(codes, "float32"))


def test_quantizers_of_users():
    def made(quantizer):
        wrapper = Wrapper(layers.Dense(2, kernel_initializer="ones"), {"kernel": quantizer})
        wrapper.build((None, 3))
        wrapper.latent_weight("kernel").assign(floats(3, 2) * 30)
        return wrapper.convert_to_inferable_quantizers()

    converted = made(SquaredTensors())
    inputs = floats(2, 3)
    np.testing.assert_array_equal(to_numpy(kept(converted)(inputs)), to_numpy(converted(inputs)))
    refused(ValueError, lambda: kept(made(Squares())), "Squares", "dequantize_tensor", "keep_codes")


def test_parts_of_the_layer_read_as_in_a_layer_with_floats():
    wrapper = Wrapper(layers.Dense(2, name="dense"), {"kernel": weight()})
    wrapper.build((None, 3))
    converted = wrapper.convert_to_inferable_quantizers()
    small = kept(converted)
    expected = converted.get_quantized_weights()["kernel"]
    (codes,) = codes_in(small)
    for found in (small.latent_weight("kernel"), small.layer.kernel, codes.variable):
        np.testing.assert_array_equal(to_numpy(found), expected)
    assert small.layer.kernel.dtype == "float32"
    assert [v.path for v in small.variables] == [v.path for v in converted.variables]
    small.trainable = True
    assert not codes.trainable
    assert not any(variable is codes for variable in small.trainable_variables)


def test_codes_are_variables_of_integers_and_arrays_of_weights():
    wrapper = Wrapper(layers.Dense(2), {"kernel": weight(4)})
    wrapper.build((None, 3))
    small = kept(wrapper.convert_to_inferable_quantizers())
    (codes,) = codes_in(small)
    kernel = small.get_quantized_weights()["kernel"]
    assert any(each is codes for each in small.weights)
    assert (codes.dtype, tuple(codes.shape)) == ("int8", (3, 2))
    np.testing.assert_array_equal(to_numpy(codes.value), small.get_codes()["kernel"][0])
    for array in (np.asarray(codes), codes.numpy(), keras.ops.convert_to_numpy(codes)):
        np.testing.assert_array_equal(array, kernel, strict=True)
    before = to_numpy(codes.value)
    codes.assign(np.zeros_like(kernel))
    codes.assign(before)
    np.testing.assert_array_equal(np.asarray(codes), kernel)


def test_integers_are_weights_like_others():
    wrapper = Wrapper(layers.Dense(2, kernel_initializer="ones"), {"kernel": weight(4)})
    wrapper.build((None, 3))
    small = kept(wrapper.convert_to_inferable_quantizers())
    ones = np.ones((3, 2), int)
    weights = [ones if array.shape == ones.shape else array for array in small.get_weights()]
    for assign, value in ((small.layer.kernel.assign, ones), (small.set_weights, weights)):
        small.layer.kernel.assign(np.zeros((3, 2)))
        assign(value)
        np.testing.assert_array_equal(to_numpy(small.layer.kernel), ones)
    wrong = np.full((3, 2), 300)
    refused(ValueError, lambda: small.layer.kernel.assign(wrong), "not on the grid of 'kernel'")
    other = np.ones((5, 5))
    refused(ValueError, lambda: small.layer.kernel.assign(other), "(5, 5)", "(3, 2)")


@pytest.mark.tensorflow
def test_recurrent_layers_decode_once_in_a_call():
    import tensorflow as tf

    wrapper = Wrapper(layers.LSTM(2), {"cell/kernel": weight(), "cell/recurrent_kernel": weight()})
    wrapper.build((None, 4, 3))
    small = kept(wrapper.convert_to_inferable_quantizers())
    function = tf.function(small).get_concrete_function(tf.TensorSpec((2, 4, 3)))
    bodies = function.graph.as_graph_def().library.function
    casts = [node for body in bodies for node in body.node_def if node.op == "Cast"]
    assert bodies
    assert not [node.name for node in casts if node.attr["SrcT"].type == tf.int8.as_datatype_enum]


def test_wrappers_around_wrappers():
    inner = Wrapper(layers.Dense(2), {"kernel": weight()})
    outer = Wrapper(inner, {"layer/bias": weight(per_channel=False)})
    outer.build((None, 3))
    inner.latent_weight("kernel").assign(floats(3, 2))
    inner.layer.bias.assign(floats(2))
    converted = outer.convert_to_inferable_quantizers()
    small = kept(converted)
    assert len(codes_in(small)) == 2
    again = small.convert_to_inferable_quantizers()
    for other in (small, again):
        found = to_numpy(other(floats(4, 3)))
        np.testing.assert_array_equal(found, to_numpy(converted(floats(4, 3))))


@keras.saving.register_keras_serializable("test_keep_codes")
class Around(layers.Layer):
    """Builds a layer inside by calling it."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, inputs):
        return self.inner(inputs)

    def get_config(self):
        return super().get_config() | {"inner": keras.saving.serialize_keras_object(self.inner)}

    @classmethod
    def from_config(cls, config):
        inner = keras.saving.deserialize_keras_object(config.pop("inner"))
        return cls(inner, **config)


@keras.saving.register_keras_serializable("test_keep_codes")
class OfAnArray(layers.Layer):
    """Makes a variable of an array."""

    def build(self, shape):
        self.table = keras.Variable(np.arange(6, dtype=np.float32).reshape(3, 2), name="table")
        self.kernel = self.add_weight(shape=(3, 2), name="kernel")

    def call(self, inputs):
        return inputs @ self.kernel + inputs @ self.table


@pytest.mark.parametrize("kind", ["inside", "array"])
def test_layers_of_users(kind, tmp_path):
    layer = Wrapper(OfAnArray() if kind == "array" else layers.Dense(2), {"kernel": weight()})
    layer.build((None, 3))
    layer = layer.convert_to_inferable_quantizers()
    model = keras.Sequential([keras.Input((3,)), Around(layer) if kind == "inside" else layer])
    model.save(tmp_path / "model.keras")
    small = qi.keras_load_quantized_model(tmp_path / "model.keras", keep_codes=True)
    assert codes_in(small)
    np.testing.assert_array_equal(to_numpy(small(floats(4, 3))), to_numpy(model(floats(4, 3))))


def test_subclassed_models(tmp_path):
    net = Net()
    net(SUBCLASSED_X)
    model = qi.convert_to_inferable(qi.quantize_model(net, "w8"))
    model.save(tmp_path / "model.keras")
    small = qi.keras_load_quantized_model(tmp_path / "model.keras", keep_codes=True)
    assert codes_in(small)
    inputs = SUBCLASSED_X
    for other in (small, qi.convert_to_inferable(small), qi.unwrap_model(small)):
        np.testing.assert_array_equal(to_numpy(other(inputs)), to_numpy(model(inputs)))
    assert qi.quantization_report(small).to_dict() == qi.quantization_report(model).to_dict()


def test_wrong_arguments_are_refused(tmp_path):
    path = tmp_path / "model.keras"
    refused(TypeError, lambda: qi.keras_load_quantized_model(path, keep_codes="yes"), "'yes'")
    wrapper = Wrapper(layers.Dense(2), {"kernel": weight()})
    wrapper.build((None, 3))
    small = kept(wrapper.convert_to_inferable_quantizers())
    weights = [array + 0.01 if array.ndim == 2 else array for array in small.get_weights()]
    refused(ValueError, lambda: small.set_weights(weights), "not on the grid of 'kernel'")


@pytest.mark.tensorflow
def test_compiled_exported_and_checkpointed(tmp_path):
    import tensorflow as tf

    model = convolutional()
    model.save(tmp_path / "model.keras")
    small = qi.keras_load_quantized_model(tmp_path / "model.keras", keep_codes=True)
    expected = to_numpy(model(X))
    compiled = tf.function(small, jit_compile=True)
    np.testing.assert_allclose(to_numpy(compiled(X)), expected, atol=1e-5)
    small.export(str(tmp_path / "exported"), verbose=False)
    exported = tf.saved_model.load(str(tmp_path / "exported"))
    np.testing.assert_array_equal(to_numpy(exported.serve(X)), expected)
    other = qi.keras_load_quantized_model(tmp_path / "model.keras", keep_codes=True)
    path = tf.train.Checkpoint(small).save(str(tmp_path / "checkpoint"))
    other.set_weights(cleared_weights(other))
    tf.train.Checkpoint(other).restore(path)
    np.testing.assert_array_equal(to_numpy(other(X)), expected)


GROWTH = """
import ctypes, json, os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import keras_qwrap as qi

def resident():
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

qi.keras_load_quantized_model(sys.argv[1])
before = resident()
model = qi.keras_load_quantized_model(sys.argv[2], keep_codes=sys.argv[3] == "yes")
print(json.dumps(resident() - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_codes_take_less_memory(tmp_path):
    paths = []
    for units in (4, 2048):
        hidden = [layers.Dense(units) for _ in range(16)]
        model = keras.Sequential([keras.Input((units,)), *hidden])
        paths.append(str(tmp_path / f"{units}.keras"))
        qi.convert_to_inferable(qi.quantize_model(model, "w8")).save(paths[-1])
    grown = {}
    for keep in ("yes", "no"):
        command = [sys.executable, "-W", "ignore", "-c", GROWTH, *paths, keep]
        grown[keep] = json.loads(subprocess.check_output(command, text=True))
    assert grown["yes"] < 0.6 * grown["no"], grown
