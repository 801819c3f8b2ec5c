"""The same arrays in fewer bytes, and how many bytes files may take."""

import os
import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras import layers
from reference import to_numpy

import keras_qwrap as qi
from keras_qwrap.files.containers import write_whole

ENDINGS = [".keras", ".h5"]

ATTRIBUTES = {
    "text": "naïve" * 9,
    "long text": "x" * 100_000,
    "names": np.array([b"a", b"abc"]),
    "none": np.array([], dtype="S1"),
    "number": np.float32(0.1),
    "big": np.arange(3, dtype=">i8"),
    **{f"more {i}": i for i in range(9)},
}
ARRAYS = {
    "floats": np.arange(6, dtype="float32").reshape(2, 3),
    "half": np.array([np.nan, np.inf, -0.0], "float16"),
    "bits": np.array([True, False]),
    "scalar": np.int32(7),
    "nothing": np.zeros((0, 3), "uint8"),
    "words": np.array([b"ab", b"c"]),
}


def fill(file):
    for group in (file, file.create_group("a/b"), file.create_group("ü")):
        for name, value in ATTRIBUTES.items():
            group.attrs[name] = value
        for name, value in ARRAYS.items():
            group[name] = value
            group[name].attrs["dtype"] = "bfloat16"
    file.create_group("empty")


def everything(file):
    """All groups, arrays and attributes: names, dtypes and bytes."""
    found = {"": attributes(file)}

    def add(name, part):
        array = (part.dtype.str, part.shape, part[()].tobytes()) if hasattr(part, "dtype") else None
        found[name] = (attributes(part), array)

    file.visititems(add)
    return found


def attributes(part):
    values = {name: np.asarray(value) for name, value in part.attrs.items()}
    return {name: (value.dtype.str, value.shape, value.tolist()) for name, value in values.items()}


def test_an_hdf5_file_keeps_everything(tmp_path):
    path = str(tmp_path / "file.h5")
    before = {}

    def write(name):
        with h5py.File(name, "w", libver="v108") as file:
            fill(file)
            before.update(everything(file))

    write_whole(path, write)
    assert os.listdir(tmp_path) == ["file.h5"]
    with h5py.File(path) as file:
        assert everything(file) == before
        assert len(before) == 3 * len(ARRAYS) + 5


def test_an_archive_keeps_everything(tmp_path):
    path, arrays = str(tmp_path / "model.keras"), str(tmp_path / "arrays.h5")
    with h5py.File(arrays, "w") as file:
        file["a/b/c"] = np.arange(3.0)
        before = everything(file)
    sizes = []

    def write(name):
        with zipfile.ZipFile(name, "w") as archive:
            archive.writestr("config.json", "{}")
            archive.write(arrays, "model.weights.h5")
            archive.writestr("assets/model.weights.h5", b"no HDF5", zipfile.ZIP_DEFLATED)
        sizes.append(os.path.getsize(name))

    write_whole(path, write)
    assert os.path.getsize(path) < sizes[0]
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["config.json", "model.weights.h5", "assets/model.weights.h5"]
        assert archive.read("config.json") == b"{}"
        assert archive.read("assets/model.weights.h5") == b"no HDF5"
        with archive.open("model.weights.h5") as member, h5py.File(member) as file:
            assert everything(file) == before


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_compiled_model_loads_as_it_was_saved(ending, tmp_path):
    path = str(tmp_path / f"model{ending}")
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4), layers.BatchNormalization()])
    model = qi.quantize_model(model, "w4")
    model.compile("adam", keras.losses.MeanSquaredError())
    random = np.random.default_rng(0)
    model.fit(random.normal(size=(8, 6)), random.normal(size=(8, 4)), verbose=0)
    qi.save_quantized_model(model, path)
    loaded = keras.models.load_model(path, compile=ending == ".keras")
    pairs = list(zip(model.weights, loaded.weights, strict=True))
    if ending == ".keras":
        pairs += zip(model.optimizer.variables, loaded.optimizer.variables, strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b), strict=True)


def many_layers():
    """Four convolutions with much around them; 1.2 million weights."""
    inputs = x = keras.Input((4, 4, 64))
    for filters in (128, 256, 256, 64):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    model = keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))
    for variable in model.variables:
        variable.assign(np.random.default_rng(0).normal(size=variable.shape))
    return model


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_files_are_as_small_as_packed_codes(bits, tmp_path):
    """Within 3 % of codes, floats of what is not quantized, and 8 KiB for each wrapped layer,
    which also holds its scales.
    """
    converted = qi.convert_to_inferable(qi.quantize_model(many_layers(), f"w{bits}", verbose=0))
    wrappers = [layer for layer in converted.layers if hasattr(layer, "get_codes")]
    rows = [row for wrapper in wrappers for row in wrapper.get_codes().values()]
    weights = sum(codes.size for codes, _, _ in rows)
    assert weights > 10**6
    floats = converted.count_params() - weights - sum(scale.size for _, scale, _ in rows)
    most = 1.03 * (weights * bits / 8 + 4 * floats + 8192 * len(wrappers))
    for ending in ENDINGS:
        path = str(tmp_path / f"model{ending}")
        qi.save_quantized_model(converted, path)
        assert os.path.getsize(path) <= most


@pytest.mark.parametrize("after", [bytes(18), bytes(range(1, 19))])
def test_arrays_that_hold_the_marks_of_an_archive(after, tmp_path):
    """An archive ends with these bytes; an HDF5 file that holds them is none."""
    bias = np.zeros(4096, np.float32)
    marks = b"PK\5\6" + after + b"\0\0"
    bias[: len(marks) // 4] = np.frombuffer(marks, np.float32)
    model = keras.Sequential([keras.Input((1,)), layers.Dense(4096)])
    model.layers[0].bias.assign(bias)
    plain, sealed = tmp_path / "plain.h5", tmp_path / "sealed.h5"
    model.save(plain)
    qi.save_quantized_model(model, sealed)
    assert zipfile.is_zipfile(plain)
    for path in (plain, sealed):
        loaded = qi.keras_load_quantized_model(path)
        np.testing.assert_array_equal(to_numpy(loaded.layers[0].bias), bias)
        assert qi.inspect_file(path).stored_bytes >= bias.nbytes
