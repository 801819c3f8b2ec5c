"""`keras_load_quantized_model`: what it takes, and how it refuses damaged and foreign files."""

import io
import json
import os
import pathlib
import zipfile

import h5py
import keras
import numpy as np
import pytest
from reference import to_numpy

import keras_qwrap as qi

X = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
REFUSALS = (OSError, ValueError)


class FilesUnregisteredDense(keras.layers.Dense):
    """A class that no file names by package, and that loading must be told of."""


def small_model(layer: keras.layers.Layer | None = None) -> keras.Model:
    keras.utils.set_random_seed(0)
    config = qi.TrainableQuantizerWeightsConfig(qi.QuantizationMethod.SYMMETRIC, 4)
    wrapper = qi.KerasQuantizationWrapper(
        layer or keras.layers.Dense(2, name="dense"),
        {"kernel": qi.STEWeightQATQuantizer(config)},
        qi.ActivationUniformInferableQuantizer(8, -1.0, 2.0),
    )
    return keras.Sequential([keras.Input((3,)), wrapper])


@pytest.fixture(scope="module")
def model():
    model = small_model()
    model.compile(keras.optimizers.Adam(), keras.losses.MeanSquaredError())
    model.fit(X, X[:, :2], verbose=0)
    return model


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """The bytes of the model's files by ending.

    The archive is written first: writing `.h5` makes Keras forget the model's optimizer.
    """
    folder = tmp_path_factory.mktemp("saved")
    for ending in ("keras", "h5"):
        model.save(folder / f"model.{ending}")
    return {e: (folder / f"model.{e}").read_bytes() for e in ("keras", "h5")}


def refused(path, kind=REFUSALS, match="expected"):
    """The call fails with a message that names the file and is no wall of text."""
    with pytest.raises(kind, match=match) as caught:
        qi.keras_load_quantized_model(path, compile=False)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize("ending", ["keras", "h5", "hdf5"])
@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_loads_from_every_kind_of_path(ending, kind, model, saved, tmp_path):
    path = tmp_path / f"model.{ending}"
    path.write_bytes(saved[ending.replace("hdf5", "h5")])
    loaded = qi.keras_load_quantized_model(kind(path), compile=False)
    assert np.array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))


def test_loads_a_path_relative_to_the_working_directory(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("model.keras").write_bytes(saved["keras"])
    assert qi.keras_load_quantized_model("model.keras").built


def test_loads_a_path_like_object_of_another_class(saved, tmp_path):
    class Elsewhere:
        def __fspath__(self):
            return str(tmp_path / "model.keras")

    (tmp_path / "model.keras").write_bytes(saved["keras"])
    assert qi.keras_load_quantized_model(Elsewhere()).built


def test_compile_decides_over_the_optimizer(model, saved, tmp_path):
    path = tmp_path / "model.keras"
    path.write_bytes(saved["keras"])
    compiled = qi.keras_load_quantized_model(path)
    assert compiled.compiled
    assert len(compiled.optimizer.variables) == len(model.optimizer.variables)
    bare = qi.keras_load_quantized_model(path, compile=False)
    assert not bare.compiled
    assert not hasattr(bare, "optimizer")


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_custom_objects_are_used_and_missed(ending, tmp_path):
    model, path = small_model(FilesUnregisteredDense(2, name="dense")), tmp_path / f"m.{ending}"
    model.save(path)
    objects = {"FilesUnregisteredDense": FilesUnregisteredDense}
    loaded = qi.keras_load_quantized_model(path, custom_objects=objects, compile=False)
    assert type(loaded.layers[0].layer) is FilesUnregisteredDense
    message = refused(path, ValueError, "which names 'FilesUnregisteredDense'")
    assert "custom_objects" in message


@pytest.mark.parametrize("path", [None, 3, b"model.keras", ["model.keras"], object()])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(TypeError, match=r"path: received .*expected a path"):
        qi.keras_load_quantized_model(path)


@pytest.mark.parametrize("name", ["missing.keras", "missing.h5", "no/such/folder.keras", ""])
def test_a_missing_file_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(name, OSError, "expected an existing file")


@pytest.mark.parametrize("name", ["folder.keras", "folder.h5", "folder"])
def test_a_directory_is_refused(name, tmp_path):
    (tmp_path / name).mkdir()
    refused(tmp_path / name, OSError, "expected an existing file")


@pytest.mark.parametrize("name", ["a.keras", "a.h5", "a.txt", "a"])
@pytest.mark.parametrize("content", [b"", b"some text\n" * 50, b"PK\x03\x04", b"\x89HDF\r\n\x1a\n"])
def test_a_file_of_another_kind_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name)


@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999])
def test_a_truncated_file_is_refused(ending, share, saved, tmp_path):
    path, content = tmp_path / f"model.{ending}", saved[ending]
    path.write_bytes(content[: int(len(content) * share)])
    refused(path)


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_in_an_archive_is_refused_or_harmless(seed, model, saved, tmp_path):
    """Every byte of a member is under its checksum; a few of the directory carry no meaning."""
    random, path = np.random.default_rng(seed), tmp_path / "model.keras"
    harmless = 0
    for _ in range(25):
        content = bytearray(saved["keras"])
        content[random.integers(len(content))] ^= 1 << int(random.integers(8))
        path.write_bytes(content)
        loaded = loaded_or_refused(path)
        if loaded is not None:
            harmless += 1
            assert np.array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))
    assert harmless <= 5


def test_damaged_weights_in_an_archive_are_found_before_anything_is_built(saved, tmp_path):
    content, path = bytearray(saved["keras"]), tmp_path / "model.keras"
    content[content.index(b"\x89HDF") + 1000] ^= 1
    path.write_bytes(content)
    refused(path, OSError, "'model.weights.h5' in it is damaged")


def loaded_or_refused(path):
    try:
        return qi.keras_load_quantized_model(path, compile=False)
    except REFUSALS as error:
        message = str(error)
    assert str(path) in message
    return None


def positions(content: bytes, *words: bytes) -> list[int]:
    return [content.index(word) + len(word) // 2 for word in words]


def test_a_flipped_bit_in_a_config_of_hdf5_is_refused(saved, tmp_path):
    """HDF5 has no checksums; what the config then says must still be refused politely.

    The places are chosen: HDF5's own structures, when damaged, can crash its library.
    """
    words = [b'"class_name": "Sequential"', b'"config"', b"keras_qwrap>Kera", b"format_version"]
    words += [b'"weights_quantizers"', b'"quantization_config"', b'{"name"']
    content, path = saved["h5"], tmp_path / "model.h5"
    for place in positions(content, *words):
        for bit in (0, 3, 7):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            refused(path)


def test_an_archive_without_a_model_is_refused(saved, tmp_path):
    path = tmp_path / "model.keras"
    path.write_bytes(saved["keras"])
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for missing in ("config.json", "model.weights.h5"):
        write_archive(path, {name: data for name, data in members.items() if name != missing})
        refused(path, ValueError, missing)
    write_archive(path, {})
    refused(path, ValueError)


def write_archive(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b'{"module": "keras", "class_name": "NoSuchModel", "config": {}}',
        b'{"module": "no_such_module", "class_name": "Model", "config": {}}',
        b"\xff\xfe\x00",
    ],
)
def test_an_archive_with_a_foreign_config_is_refused(config, saved, tmp_path):
    path = tmp_path / "model.keras"
    path.write_bytes(saved["keras"])
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    write_archive(path, members | {"config.json": config})
    refused(path, ValueError)


def test_a_damaged_weights_file_inside_a_sound_archive_is_refused(saved, tmp_path):
    path = tmp_path / "model.keras"
    path.write_bytes(saved["keras"])
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    weights = members["model.weights.h5"]
    for damaged in (b"", b"no weights", weights[: len(weights) // 2]):
        write_archive(path, members | {"model.weights.h5": damaged})
        refused(path)


@pytest.mark.parametrize("name", ["model.weights.h5", "weights.h5"])
def test_a_file_of_weights_alone_is_refused(name, model, tmp_path):
    model.save_weights(tmp_path / "model.weights.h5")
    os.replace(tmp_path / "model.weights.h5", tmp_path / name)
    refused(tmp_path / name, ValueError, "load_weights")


@pytest.mark.parametrize("config", ["", "{", "null", "[]", "{}", '{"class_name": "Nothing"}'])
def test_an_hdf5_file_with_a_foreign_config_is_refused(config, tmp_path):
    with h5py.File(tmp_path / "model.h5", "w") as file:
        file.attrs["model_config"] = config
    refused(tmp_path / "model.h5", ValueError)


def test_a_foreign_model_of_unknown_class_is_refused(saved, tmp_path):
    path = tmp_path / "model.h5"
    path.write_bytes(saved["h5"])
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        config["config"]["layers"][1]["class_name"] = "other_package>Wrapper"
        file.attrs["model_config"] = json.dumps(config)
    refused(path, ValueError, "other_package>Wrapper")


@pytest.mark.parametrize(
    ("ending", "name"),
    [("keras", "model.h5"), ("h5", "model.keras"), ("keras", "model.zip"), ("h5", "model")],
)
def test_a_wrong_ending_is_refused(ending, name, saved, tmp_path):
    (tmp_path / name).write_bytes(saved[ending])
    refused(tmp_path / name, ValueError, "ending .*Rename the file")


@pytest.mark.parametrize("error", [KeyError("k"), RuntimeError("r"), MemoryError("m")])
def test_what_h5py_raises_on_damage_becomes_an_oserror(error, saved, tmp_path, monkeypatch):
    """The HDF5 library answers some damaged files in these ways."""
    path = tmp_path / "model.h5"
    path.write_bytes(saved["h5"])
    monkeypatch.setattr(h5py, "File", raising(error))
    refused(path, OSError, type(error).__name__)


@pytest.mark.parametrize(
    "error", [AssertionError("a"), ImportError("i"), OverflowError("o"), RecursionError("r")]
)
def test_what_rebuilding_raises_becomes_a_valueerror(error, saved, tmp_path, monkeypatch):
    path = tmp_path / "model.keras"
    path.write_bytes(saved["keras"])
    monkeypatch.setattr(keras.saving, "deserialize_keras_object", raising(error))
    refused(path, ValueError, type(error).__name__)


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


def test_an_interruption_is_not_swallowed(saved, tmp_path, monkeypatch):
    path = tmp_path / "model.keras"
    path.write_bytes(saved["keras"])
    monkeypatch.setattr(keras.saving, "deserialize_keras_object", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        qi.keras_load_quantized_model(path)


def edit_config(path, edit):
    """Apply `edit` to every dictionary in the model's config that holds a format version."""

    def walk(value):
        if isinstance(value, dict):
            if "format_version" in value:
                edit(value)
            for child in value.values():
                walk(child)
        elif isinstance(value, list):
            for child in value:
                walk(child)
        return value

    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            file.attrs["model_config"] = json.dumps(walk(json.loads(file.attrs["model_config"])))
        return
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["config.json"] = json.dumps(walk(json.loads(members["config.json"])))
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


VERSIONED = {
    "wrapper": lambda: small_model().layers[0],
    "holder": lambda: qi.KerasActivationQuantizationHolder(
        qi.ActivationPOTInferableQuantizer(8, 2.0, signed=True)
    ),
}


@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize("kind", VERSIONED)
def test_the_format_version_is_checked(kind, ending, tmp_path):
    path = tmp_path / f"model.{ending}"
    model = keras.Sequential([keras.Input((3,)), VERSIONED[kind]()])
    model.save(path)
    edit_config(path, lambda config: config.update(format_version=config["format_version"]))
    assert qi.keras_load_quantized_model(path, compile=False).built
    edit_config(path, lambda config: config.update(format_version=3))
    with pytest.raises(ValueError, match=r"format_version: received 3 .*upgrade the package"):
        qi.keras_load_quantized_model(path, compile=False)
    for garbage in (None, 0, -1, True, 1.0, "1", [], {}):
        edit_config(path, lambda config, value=garbage: config.update(format_version=value))
        with pytest.raises(ValueError, match=r"format_version: received .*damaged or foreign"):
            qi.keras_load_quantized_model(path, compile=False)
    edit_config(path, lambda config: config.pop("format_version"))
    with pytest.raises(ValueError, match="format_version: received None"):
        qi.keras_load_quantized_model(path, compile=False)


def converted(top):
    """A model with a threshold of its kernel and a range of its outputs up to `top`."""
    keras.utils.set_random_seed(0)
    kernel = qi.WeightsPOTInferableQuantizer(8, top, per_channel=False)
    output = qi.ActivationUniformInferableQuantizer(8, -1.0, top)
    layer = qi.KerasQuantizationWrapper(
        keras.layers.Dense(2), {"kernel": kernel}, output, name="dense"
    )
    return keras.Sequential([keras.Input((3,)), layer])


@pytest.mark.parametrize("name", ["kernel_threshold", "output_0_max_range"])
@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_a_range_that_is_another_in_the_config_is_refused(name, ending, tmp_path):
    path = tmp_path / f"model.{ending}"
    model = converted(4.0)
    # The config is written from the variables, and tells what they are now.
    (variable,) = (v for v in model.variables if v.name == name)
    variable.assign(8.0)
    model.save(path)
    assert qi.keras_load_quantized_model(path)(X).shape == (4, 2)
    mark = "kernel" if name == "kernel_threshold" else "output_0"
    with_array(path, 8.0, 16.0)
    refused(path, ValueError, f"layer 'dense', '{mark}'.*{name.removeprefix(f'{mark}_')}")


def with_array(path, old, new):
    """Change the only array of a file that holds this number alone."""
    data = path.read_bytes()
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        data = members["model.weights.h5"]
    with h5py.File(stream := io.BytesIO(data), "a") as file:
        found = []
        file.visititems(lambda _, part: found.append(part) if hasattr(part, "dtype") else None)
        (array,) = (each for each in found if each.size == 1 and each[()].item() == old)
        array[...] = np.full(array.shape, new, array.dtype)
    if path.suffix == ".keras":
        write_archive(path, members | {"model.weights.h5": stream.getvalue()})
    else:
        path.write_bytes(stream.getvalue())


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_a_model_that_was_given_other_ranges_is_saved_with_them(ending, tmp_path):
    source, model, path = converted(4.0), converted(2.0), tmp_path / f"model.{ending}"
    source.save_weights(tmp_path / "source.weights.h5")
    model.load_weights(tmp_path / "source.weights.h5")
    qi.save_quantized_model(model, path)
    loaded = qi.keras_load_quantized_model(path)
    np.testing.assert_array_equal(to_numpy(loaded(X)), to_numpy(source(X)))
