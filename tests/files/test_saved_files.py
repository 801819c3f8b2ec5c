"""Files of every version load for ever, as the very models that were saved."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from reference import refused, to_numpy
from saved_models import MODELS, SAVED

import keras_qwrap as qi

FILES = sorted(path for ending in (".keras", ".h5") for path in SAVED.glob(f"[0-9]*/*{ending}"))
LOADERS = [qi.keras_load_quantized_model, keras.models.load_model]


def expected(path):
    with np.load(path.with_suffix(".npz")) as arrays:
        return dict(arrays)


def test_every_version_kept_every_model():
    assert (SAVED / qi.__version__).is_dir()
    for folder in {path.parent for path in FILES}:
        names = {f"{name}{ending}" for name, (_, endings) in MODELS.items() for ending in endings}
        assert {path.name for path in FILES if path.parent == folder} == names


PAIRS = [
    (path, loader)
    for path in FILES
    for loader in LOADERS
    # Packed codes in `.h5` files are of this package alone.
    if path.name != "converted.h5" or loader is qi.keras_load_quantized_model
]


@pytest.mark.parametrize(
    ("path", "loader"),
    PAIRS,
    ids=lambda part: part.__name__ if callable(part) else f"{part.parent.name}/{part.name}",
)
def test_kept_files_load(path, loader):
    arrays = expected(path)
    model = loader(path, compile=False)
    weights = model.get_weights()
    assert len(weights) == len([name for name in arrays if name.startswith("weight_")])
    for i, weight in enumerate(weights):
        np.testing.assert_array_equal(weight, arrays[f"weight_{i}"])
    outputs = to_numpy(model(arrays["inputs"], training=False))
    np.testing.assert_allclose(outputs, arrays["outputs"], rtol=1e-5, atol=1e-6)
    assert len(qi.inspect_file(path).digest) == 64


def test_they_name_every_class():
    text = ""
    for path in FILES:
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                text += archive.read("config.json").decode()
    assert [name for name in qi.custom_objects() if f'"{name}"' not in text] == []


LOAD = """
import json, sys
import keras_qwrap
import numpy
for path in json.loads(sys.argv[1]):
    model = keras_qwrap.keras_load_quantized_model(path, compile=False)
    arrays = numpy.load(path.rpartition(".")[0] + ".npz")
    for i, weight in enumerate(model.get_weights()):
        numpy.testing.assert_array_equal(weight, arrays[f"weight_{i}"])
print("all")
"""


@pytest.mark.parametrize("path", [p for p in FILES if p.stem == "converted"], ids=lambda p: p.name)
def test_kept_files_load_with_codes_in_memory(path):
    arrays = expected(path)
    model = qi.keras_load_quantized_model(path, keep_codes=True)
    assert {v.dtype for v in model.variables} >= {"int8", "uint8"}
    for i, weight in enumerate(model.get_weights()):
        np.testing.assert_array_equal(weight, arrays[f"weight_{i}"])
    whole = qi.keras_load_quantized_model(path)
    np.testing.assert_array_equal(
        to_numpy(model(arrays["inputs"])), to_numpy(whole(arrays["inputs"]))
    )


@pytest.mark.slow
def test_a_process_that_imports_only_the_package_loads_them():
    paths = [str(path) for path in FILES if path.stem != "subclassed"]
    command = [sys.executable, "-W", "ignore", "-c", LOAD, json.dumps(paths)]
    assert subprocess.check_output(command, text=True).strip() == "all"


@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_files_of_a_newer_format_are_refused(ending, tmp_path):
    source = SAVED / qi.__version__ / f"converted{ending}"
    path = tmp_path / f"newer{ending}"
    old, new = '"format_version": 1', '"format_version": 3'
    if ending == ".h5":
        path.write_bytes(source.read_bytes()[512:])
        with h5py.File(path, "a") as file:
            file.attrs["model_config"] = file.attrs["model_config"].replace(old, new)
    else:
        with zipfile.ZipFile(source) as archive, zipfile.ZipFile(path, "w") as copy:
            for name in archive.namelist():
                text = archive.read(name)
                changed = text.replace(old.encode(), new.encode())
                copy.writestr(name, changed if name == "config.json" else text)
    for load in LOADERS:
        refused(ValueError, lambda load=load: load(path), "format_version", "newer", "upgrade")
    assert {layer.format_version for layer in qi.inspect_file(path).layers} == {3}


MCT = SAVED / "mct"


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("conv.keras", ".keras"),
        ("conv.keras", ".h5"),
        ("conv.h5", ".keras"),
        ("conv.h5", ".h5"),
        ("seq.keras", ".keras"),
    ],
)
@pytest.mark.filterwarnings("ignore:Layer 'permute'.*mask")
def test_models_of_mct_give_the_same_outputs(name, ending, tmp_path):
    path = tmp_path / f"migrated{ending}"
    qi.migrate_mct_file(MCT / name, path)
    with np.load((MCT / name).with_suffix(".npz")) as arrays:
        inputs, outputs = arrays["arr_0"], arrays["y"]
    model = qi.keras_load_quantized_model(path)
    np.testing.assert_allclose(to_numpy(model(inputs)), outputs, rtol=0, atol=1e-6)
    found = qi.inspect_file(path)
    assert all(layer.converted for layer in found.layers if layer.inner_class)
    bits = {q.num_bits for layer in found.layers for q in layer.quantizers}
    assert bits == ({8, 3, 4, 6, 2} if name.startswith("conv") else {5, 6})
    with zipfile.ZipFile((MCT / name).with_suffix(".keras")) as archive:
        old = json.loads(archive.read("config.json"))["config"]
    assert {layer["config"]["name"] for layer in old["layers"]} <= {x.name for x in model.layers}
    assert model.name == old["name"]


def with_config(path, change):
    with zipfile.ZipFile(MCT / "conv.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    change(config["config"]["layers"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (members | {"config.json": json.dumps(config)}).items():
            archive.writestr(name, data)
    return path


METADATA = {
    "class_name": "Custom>MetadataLayer",
    "config": {"name": "metadata_layer", "trainable": True, "metadata": {"author": "me"}},
    "name": "metadata_layer",
    "inbound_nodes": [],
}


@pytest.mark.tensorflow
@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_metadata_of_mct_is_left_out(ending, tmp_path):
    """`add_metadata` of mct_quantizers makes an attribute of it, which stands in no graph."""
    path = tmp_path / f"mct.{ending}"
    if ending == "keras":
        with_config(path, lambda layers: layers.append(METADATA))
    else:
        path.write_bytes((MCT / "conv.h5").read_bytes())
        with h5py.File(path, "a") as file:
            config = json.loads(file.attrs["model_config"])
            config["config"]["layers"].append(METADATA)
            file.attrs["model_config"] = json.dumps(config)
    models = []
    for source in (path, MCT / f"conv.{ending}"):
        qi.migrate_mct_file(source, tmp_path / "migrated.keras")
        models.append(qi.keras_load_quantized_model(tmp_path / "migrated.keras"))
    assert models[0].get_config() == models[1].get_config()
    for one, other in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_cannot_be_migrated_is_named(tmp_path):
    path, target = tmp_path / "model.keras", tmp_path / "new.keras"

    def named(*parts, of=None):
        refused(ValueError, lambda: qi.migrate_mct_file(of or path, target), "source", *parts)
        assert not target.exists()

    def place(class_name):
        return lambda layers: next(x for x in layers if x["class_name"] == class_name)

    def rename(old, new):
        with_config(path, lambda layers: place(old)(layers).update(class_name=new))

    rename("BatchNormalization", "TFOpLambda")
    named("batch_normalization (a TFOpLambda)")
    rename("Add", "my_package>Mine")
    named("add (a Mine)")
    leaky = place("LeakyReLU")
    with_config(path, lambda layers: leaky(layers)["config"].update(slopes=[3]))
    named("leaky_re_lu (slopes=[3])")
    holder = place("KerasActivationQuantizationHolder")
    with_config(
        path,
        lambda layers: holder(layers)["config"]["activation_holder_quantizer"].update(
            class_name="STEActivationQATQuantizer"
        ),
    )
    named("STEActivationQATQuantizer")
    wrapper = place("KerasQuantizationWrapper")
    with_config(path, lambda layers: wrapper(layers)["config"].update(weight_values={"0": [1]}))
    named("keras_quantization_wrapper (a quantized constant)")
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(path)
    named("model with MCT's wrappers")
    refused(OSError, lambda: qi.migrate_mct_file(tmp_path / "none.keras", target), "existing")
    refused(TypeError, lambda: qi.migrate_mct_file(3, target), "3", "a path")
    with_config(path, lambda layers: leaky(layers)["config"].update(slopes=True))
    named("leaky_re_lu (slopes=True)")
    for change in (
        lambda layers: wrapper(layers)["config"].pop("weights_quantizer"),
        lambda layers: holder(layers)["config"].pop("activation_holder_quantizer"),
        lambda layers: leaky(layers).pop("inbound_nodes"),
        lambda layers: leaky(layers).update(inbound_nodes=[[]]),
    ):
        named("as MCT saves it", of=with_config(path, change))
    damaged = tmp_path / "damaged.h5"
    damaged.write_bytes((MCT / "conv.h5").read_bytes())
    with h5py.File(damaged, "a") as file:
        del file["model_weights/batch_normalization"]
    named("arrays for", "batch_normalization/gamma", of=damaged)
    damaged = tmp_path / "damaged.keras"
    damaged.write_bytes((MCT / "conv.keras").read_bytes()[:-100])
    refused(OSError, lambda: qi.migrate_mct_file(damaged, target), "damaged.keras")
    assert not Path(target).exists()
