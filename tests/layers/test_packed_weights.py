"""Files of converted layers hold packed codes, and nothing else of a quantized weight."""

import h5py
import keras
import numpy as np
import pytest
from keras import layers
from layer_cases import CASES, METHODS, Composite, floats, weight
from reference import refused, to_numpy, traced_operations

import keras_qwrap as qi
from keras_qwrap.layers.building import packed_in
from keras_qwrap.layers.keras_internals import sublayers
from keras_qwrap.numerics.packing import frame, framed_size

Wrapper = qi.KerasQuantizationWrapper


class Store(dict):
    """A place for what a layer saves, in numpy as in a file."""

    def __setitem__(self, key, value):
        super().__setitem__(key, keras.ops.convert_to_numpy(value))


def saved(layer):
    stores = [(inner, Store()) for inner in sublayers(layer)]
    for inner, store in stores:
        inner.save_own_variables(store)
    return stores


def converted(layer, inputs, weights, call=()):
    wrapper = Wrapper(layer, weights)
    wrapper(*inputs, **dict(call))
    return wrapper.convert_to_inferable_quantizers()


def packers(layer):
    """What packs each quantized weight of a layer."""
    return list(packed_in(layer).values())


def arrays_in(path):
    """All arrays of an HDF5 file."""
    found = []
    with h5py.File(path) as file:
        file.visititems(lambda _, part: found.append(part))
        return [part[()] for part in found if isinstance(part, h5py.Dataset)]


def check_weights(layer, values):
    """To all but files they are variables of floats: by types, shapes and values."""
    assert all(isinstance(each, keras.Variable) for each in layer.weights)
    for each in layer.weights:
        array = np.asarray(each)
        assert (array.shape, array.dtype.name) == (tuple(each.shape), each.dtype)
    for path, value in values.items():
        (kernel,) = [each for each in layer.weights if each is layer.latent_weight(path)]
        np.testing.assert_array_equal(np.asarray(kernel), value)


@pytest.mark.parametrize("case", [case for case in CASES if case.weights], ids=lambda c: c.name)
def test_every_quantized_weight_is_packed(case):
    layer = converted(case.layer(), case.inputs, case.own_weights(), case.call)
    codes, values = layer.get_codes(), layer.get_quantized_weights()
    bits = {path: layer.weights_quantizers[path].num_bits for path in codes}
    check_weights(layer, values)
    stores = saved(layer)
    arrays = [array for _, store in stores for array in store.values()]
    sizes = sorted(array.size for array in arrays if array.dtype == np.uint8)
    assert sizes == sorted(framed_size(path, codes[path][0].shape, bits[path]) for path in codes)
    floats_left = [array for array in arrays if array.dtype != np.uint8]
    quantized = {id(layer.latent_weight(path)) for path in codes}
    variables = [variable for variable in layer.variables if "float" in variable.dtype]
    assert len(floats_left) == len([v for v in variables if id(v) not in quantized])
    for variable in variables:
        variable.assign(np.full(variable.shape, 0.5, variable.dtype))
    for inner, store in stores:
        inner.load_own_variables(store)
    for path, value in values.items():
        np.testing.assert_array_equal(to_numpy(layer.latent_weight(path)), value)


def test_codes_of_eight_bits_are_bytes():
    layer = converted(layers.Dense(2), [floats(1, 3)], {"kernel": weight(8)})
    arrays = [array for _, store in saved(layer) for array in store.values()]
    (packed,) = [array for array in arrays if array.dtype == np.uint8]
    header = b'{"path":"kernel","shape":[3,2]}'
    assert packed[:-6].tobytes() == bytes([8 + 128, len(header), 0]) + header
    codes = layer.get_codes()["kernel"][0]
    np.testing.assert_array_equal(packed[-6:].view(np.int8), codes.ravel())
    (packer,) = packers(layer)
    np.testing.assert_array_equal(packer.packed(), packed)


def test_weights_are_set_and_counted_as_ever():
    bare, inputs = layers.Dense(2), floats(1, 3)
    layer = converted(bare, [inputs], {"kernel": weight(8)})
    kernel = layer.get_quantized_weights()["kernel"]
    assert layer.count_params() == bare.count_params() + 2
    before = layer.get_weights()
    (found,) = [array for array in before if array.shape == (3, 2)]
    np.testing.assert_array_equal(found, kernel)
    outputs = to_numpy(layer(inputs))
    layer.set_weights([np.zeros_like(array) for array in before])
    assert not to_numpy(layer(inputs)).any()
    layer.set_weights(before)
    np.testing.assert_array_equal(to_numpy(layer(inputs)), outputs)


def test_codes_without_negative_ones_are_not_signed():
    layer = converted(layers.Dense(2), [floats(1, 3)], {"kernel": weight(4, "UNIFORM")})
    packed = packers(layer)[0].packed()
    codes = layer.get_codes()["kernel"][0].ravel()
    assert packed[0] == 4
    assert packed[-3:].tolist() == (codes[::2] + 16 * codes[1::2]).tolist()


@pytest.mark.parametrize("ending", [".keras", ".h5", ".weights.h5"])
def test_all_formats_are_packed(ending, tmp_path):
    inner = keras.Sequential([keras.Input((64,)), layers.Dense(64, name="in")], name="inner")
    inputs = keras.Input((64,))
    model = keras.Model(inputs, layers.Dense(64, name="out")(inner(inputs)))
    new = qi.convert_to_inferable(qi.quantize_model(model, "w2"))
    path = str(tmp_path / f"model{ending}")
    if ending == ".weights.h5":
        new.save_weights(path)
    else:
        qi.save_quantized_model(new, path)
    if ending == ".keras":
        loaded = keras.models.load_model(path)
    elif ending == ".h5":
        loaded = qi.keras_load_quantized_model(path)
    else:
        loaded = qi.convert_to_inferable(qi.quantize_model(keras.models.clone_model(model), "w2"))
        loaded.load_weights(path)
    x = floats(4, 64)
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(new(x)))
    if ending != ".keras":
        found = arrays_in(path)
        sizes = [part.size for part in found if part.dtype == np.uint8]
        assert sizes == [3 + 33 + 64 * 64 // 4] * 2
        assert sum(part.size for part in found if part.dtype != np.uint8) == 4 * 64


@pytest.mark.parametrize("load", [keras.models.load_model, qi.keras_load_quantized_model])
def test_plain_h5_files_hold_floats(load, tmp_path):
    """As everything that reads Keras' files expects, and exact."""
    inner = keras.Sequential([keras.Input((4, 6)), layers.LSTM(5)], name="inner")
    inputs = keras.Input((4, 6))
    model = keras.Model(inputs, layers.Dense(3)(inner(inputs)))
    new, path = qi.convert_to_inferable(qi.quantize_model(model, "w3")), str(tmp_path / "model.h5")
    new.save(path)
    assert all(array.dtype == np.float32 for array in arrays_in(path))
    loaded, x = load(path), floats(2, 4, 6)
    for a, b in zip(loaded.get_weights(), new.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(new(x)))
    assert len(packed_in(loaded)) == 3
    qi.save_quantized_model(loaded, path)
    assert len([array for array in arrays_in(path) if array.dtype == np.uint8]) == 3


def test_packed_h5_files_of_trainable_converted_layers(tmp_path):
    """Keras writes what is trained first, and packed codes are not trained."""
    layer = converted(layers.LSTM(3), [floats(1, 4, 2)], {"cell/recurrent_kernel": weight(4)})
    other = converted(layers.Dense(2), [floats(1, 3)], {"kernel": weight(5)})
    model = keras.Sequential([keras.Input((4, 2)), layer, other])
    path, x = str(tmp_path / "model.h5"), floats(2, 4, 2)
    for flags in [(True, True), (True, False), (False, False)]:
        layer.trainable, other.trainable = flags
        qi.save_quantized_model(model, path)
        loaded = qi.keras_load_quantized_model(path)
        np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(model(x)))
        assert tuple(each.trainable for each in loaded.layers) == flags


def test_many_names_in_an_h5_file(tmp_path):
    """HDF5 takes at most 64 KB of them at once; Keras cuts the list."""
    parts = [layers.Dense(2, name=f"{'n' * 3000}_{i}") for i in range(24)]
    model = keras.Sequential([keras.Input((2,)), *parts])
    path, x = tmp_path / "model.h5", floats(2, 2)
    qi.save_quantized_model(model, path)
    with h5py.File(path) as file:
        assert {"layer_names0", "layer_names1"} <= set(file["model_weights"].attrs)
    np.testing.assert_array_equal(
        to_numpy(qi.keras_load_quantized_model(path)(x)), to_numpy(model(x))
    )


def test_packed_h5_files_of_other_models_are_refused(tmp_path):
    path = tmp_path / "model.h5"
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="dense")])
    plain = tmp_path / "plain.h5"
    qi.save_quantized_model(qi.convert_to_inferable(qi.quantize_model(model, "w4")), path)
    load = qi.keras_load_quantized_model

    def changed(change):
        plain.write_bytes(path.read_bytes()[512:])
        with h5py.File(plain, "a") as file:
            (group,) = [part for part in file["model_weights"].values() if len(part) > 0]
            change(group, list(group.attrs["weight_names"]))
        return plain

    def without(group, names):
        group.attrs["weight_names"] = names[1:]

    def twice(group, names):
        group.attrs["weight_names"] = [names[0], *names]

    def empty(group, names):
        group.attrs["weight_names"] = np.array([], "S1")

    for change, part in [
        (without, "weights of layer"),
        (twice, "weights of layer"),
        (empty, "layers with weights"),
    ]:
        refused(ValueError, lambda change=change: load(changed(change)), str(plain), part)


def test_a_layer_that_is_not_converted_keeps_its_floats():
    wrapper = Wrapper(layers.Dense(2, use_bias=False), {"kernel": weight(4)})
    wrapper(floats(1, 3))
    (kernel,) = [array for _, store in saved(wrapper) for array in store.values()]
    np.testing.assert_array_equal(kernel, to_numpy(wrapper.layer.kernel))


def test_weights_inside_a_composite_layer_with_state_of_others():
    weights = {"first/kernel": weight(3), "blocks/1/kernel": weight(5)}
    layer = converted(Composite(0.5), [floats(2, 3)], weights)
    sizes = [packer.packed().size for packer in packers(layer)]
    expected = [framed_size("first/kernel", (3, 4), 3), framed_size("blocks/1/kernel", (3, 2), 5)]
    assert sorted(sizes) == sorted(expected)
    assert not layer.trainable_weights


def damaged(change):
    layer = converted(layers.Dense(2), [floats(1, 3)], {"kernel": weight(4)})
    (packer,) = packers(layer)
    return lambda: packer.unpacked(change(packer.packed()))


def test_what_is_no_packed_weight_is_refused():
    layer = converted(layers.Dense(2), [floats(1, 3)], {"kernel": weight(4)})
    (packer,) = packers(layer)
    kernel = to_numpy(layer.latent_weight("kernel"))
    refused(TypeError, lambda: packer.unpacked(kernel), "float32", "uint8")
    refused(ValueError, damaged(lambda p: p[:-1]), "(36,)", "(37,)")
    refused(ValueError, damaged(lambda p: np.array([5, *p[1:]], np.uint8)), "packed codes")
    refused(ValueError, damaged(lambda p: np.array([*p[:-3], *[0x88] * 3], np.uint8)), "-7 to 7")
    other = frame(np.zeros((2, 3), np.int32), 4, True, "kernel")
    refused(ValueError, damaged(lambda p: other), "(2, 3)", "(3, 2)")
    other = frame(np.zeros((3, 2), np.int32), 4, True, "keynel")
    refused(ValueError, damaged(lambda p: other), "'keynel'", "'kernel'")


@qi.mark_quantizer(qi.QuantizationTarget.Weights, [METHODS.SYMMETRIC])
class Halves(qi.BaseKerasInferableQuantizer):
    """Of a user, and without clipping."""

    num_bits, scale, zero_point = 3, np.float32(0.5), np.int32(0)

    def __call__(self, inputs):
        return keras.ops.round(inputs * 2) / 2

    def quantize_to_codes(self, x):
        return np.round(np.float32(x) * 2).astype(np.int32)

    def dequantize(self, codes):
        return np.float32(codes) / 2

    def get_config(self):
        return {}


def test_codes_of_a_user_must_have_the_bits_that_they_should():
    layer = converted(
        layers.Dense(2, kernel_initializer="ones"), [floats(1, 2)], {"kernel": Halves()}
    )
    assert packers(layer)[0].packed()[[0, -2, -1]].tolist() == [3, 0b10010010, 0b0100]
    layer.latent_weight("kernel").assign(np.float32([[1, 2], [1.5, -2]]))
    refused(ValueError, packers(layer)[0].packed, "Halves", "(-4, 4)", "from -4 to 3", "num_bits")
    layer.latent_weight("kernel").assign(np.float32([[1, 1], [1.5, -2]]))
    assert packers(layer)[0].packed()[[0, -2, -1]].tolist() == [3 + 128, 0b11010010, 0b1000]


@pytest.mark.tensorflow
def test_converted_layers_draw_no_weights(monkeypatch):
    """Neither kernels nor those of cells; what is not random stays, and nothing stays behind."""

    def draw(*_args, **_kwargs):
        raise AssertionError("random weights were drawn")

    wrapper = qi.KerasQuantizationWrapper(layers.LSTM(3), {"cell/kernel": weight()})
    wrapper.build((None, 4, 2))
    converted = wrapper.convert_to_inferable_quantizers()
    config, built = converted.get_config(), converted.get_build_config()
    for name in ("GlorotUniform", "Orthogonal"):
        monkeypatch.setattr(getattr(keras.initializers, name), "__call__", draw)
    copy = qi.KerasQuantizationWrapper.from_config(config)
    copy.build_from_config(built)
    np.testing.assert_array_equal(to_numpy(copy.layer.cell.bias), [0] * 3 + [1] * 3 + [0] * 6)
    assert all("add_weight" not in vars(inner) for inner in sublayers(copy.layer))
    with pytest.raises(AssertionError, match="random"):
        type(wrapper).from_config(wrapper.get_config()).build_from_config(built)


@pytest.mark.tensorflow
@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_a_loaded_model_runs_the_operations_of_the_float_model(ending, tmp_path):
    """By type and number; with quantized outputs there are more."""
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 3, activation="relu")(inputs)
    x = layers.BatchNormalization()(layers.DepthwiseConv2D(3, depth_multiplier=2)(x))
    x = layers.LSTM(3)(layers.Reshape((4, 8))(x))
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(4, "relu"), layers.Dropout(0.5)])
    model = keras.Model(inputs, layers.Dense(2)(inner(x)))
    found = {}
    for recipe, data in {"w4": None, "w4a8": floats(8, 6, 6, 2)}.items():
        path = str(tmp_path / f"model{ending}")
        quantized = qi.quantize_model(model, recipe, data, verbose=0)
        qi.save_quantized_model(qi.convert_to_inferable(quantized), path)
        loaded = qi.keras_load_quantized_model(path, compile=False)
        assert len(packed_in(loaded)) == 6
        found[recipe] = traced_operations(loaded, (2, 6, 6, 2))
    expected = traced_operations(model, (2, 6, 6, 2))
    assert found["w4"] == expected
    assert expected.count("Conv2D") == 1
    assert len(found["w4a8"]) > len(expected)


@pytest.mark.parametrize("ending", [".keras", ".h5", ".weights.h5"])
def test_a_wrapper_around_a_wrapper_saves_both_its_weights(ending, tmp_path):
    inner = Wrapper(layers.SeparableConv1D(3, 2), {"depthwise_kernel": weight()})
    outer = Wrapper(inner, {"layer/pointwise_kernel": weight()})
    model = keras.Sequential([keras.Input((4, 2)), outer])
    new = qi.convert_to_inferable(model)
    path = str(tmp_path / f"model{ending}")
    if ending == ".weights.h5":
        new.save_weights(path)
        loaded = qi.convert_to_inferable(keras.models.clone_model(model))
        loaded.load_weights(path)
    else:
        qi.save_quantized_model(new, path)
        loaded = qi.keras_load_quantized_model(path)
    np.testing.assert_array_equal(
        to_numpy(loaded(floats(2, 4, 2))), to_numpy(model(floats(2, 4, 2)))
    )


@keras.saving.register_keras_serializable("test_packed")
class Counting(layers.Dense):
    """Reads the store that it saves to."""

    def save_own_variables(self, store):
        super().save_own_variables(store)
        store["count"] = np.float32([len(store), "0" in store, len(list(store.keys()))])

    def load_own_variables(self, store):
        assert store["count"].tolist() == [2, 1, 2]
        self.kernel.assign(store["0"])
        self.bias.assign(store["1"])


def test_a_layer_may_read_what_it_saves(tmp_path):
    model = keras.Sequential([keras.Input((3,)), Wrapper(Counting(2), {"kernel": weight()})])
    model.layers[0].layer.bias.assign([1.0, 2.0])
    qi.convert_to_inferable(model).save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(loaded(floats(2, 3))), to_numpy(model(floats(2, 3))))
