"""What a file holds, read without building it, against the model that was saved."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras import layers
from layer_cases import Composite, activation, floats, weight
from reference import refused
from saved_models import converted as converted_with_all
from saved_models import trained

import keras_qwrap as qi
from keras_qwrap import cli
from keras_qwrap.models.subclassed import QuantizedModel
from keras_qwrap.numerics.packing import framed_size

ENDINGS = [".keras", ".h5"]
Wrapper = qi.KerasQuantizationWrapper


def nested():
    """Layers of the same name in two nested models, an LSTM, and outputs of several kinds."""
    parts = []
    for name in ("left", "right"):
        deep = [keras.Input((4, 5)), layers.Dense(5, name="same")]
        inner = keras.Sequential(deep, name=f"deep_{name}")
        parts.append(keras.Sequential([keras.Input((4, 5)), inner, layers.Dense(5)], name=name))
    inputs = keras.Input((4, 5))
    x = layers.LSTM(3, name="lstm")(parts[1](parts[0](inputs)))
    model = keras.Model(inputs, layers.Dense(2, name="same")(x), name="model")
    for variable in model.variables:
        variable.assign(np.random.default_rng(0).normal(size=variable.shape).astype(variable.dtype))
    return model


def wrappers(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, Wrapper)]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_weight_is_found_with_its_codes(ending, tmp_path):
    rules = [qi.Rule(name="lstm", weights=qi.WeightsSpec(5))]
    recipe = qi.Recipe(qi.WeightsSpec(8), qi.ActivationSpec(8), rules=rules)
    quantized = qi.quantize_model(nested(), recipe, floats(8, 4, 5), verbose=0)
    converted = qi.convert_to_inferable(quantized)
    path = str(tmp_path / f"model{ending}")
    qi.save_quantized_model(converted, path)
    found = qi.inspect_file(path)
    expected = {}
    for wrapper in wrappers(converted):
        for role, (codes, _, _) in wrapper.get_codes().items():
            values, counts = np.unique(codes, return_counts=True)
            bits = wrapper.weights_quantizers[role].num_bits
            histogram = tuple(zip(values.tolist(), counts.tolist(), strict=True))
            size = framed_size(role, codes.shape, bits)
            row = (wrapper.name, role, bits, codes.shape, histogram, size)
            expected[row] = expected.get(row, 0) + 1
    got = {}
    for layer in found.layers:
        for each in layer.quantizers:
            if not each.role.startswith("output"):
                histogram = tuple(each.codes.items())
                name = layer.path.split("/")[-1]
                row = (name, each.role, each.num_bits, each.shape, histogram, each.bytes)
                got[row] = got.get(row, 0) + 1
    assert got == expected != {}
    paths = [layer.path for layer in found.layers if layer.class_name == Wrapper.__name__]
    assert paths.count("left/deep_left/same") == paths.count("right/deep_right/same") == 1
    assert all(layer.converted for layer in found.layers if layer.inner_class)
    assert {layer.format_version for layer in found.layers} == {2}
    assert found.bytes == Path(path).stat().st_size > found.stored_bytes
    assert found.keras_version == keras.__version__
    assert len(found.digest) == 64


def test_the_codes_of_layers_with_one_name_are_their_own(tmp_path):
    """Left and right differ; so would a mixture of the two."""
    converted = qi.convert_to_inferable(qi.quantize_model(nested(), "w4"))
    for ending in ENDINGS:
        path = str(tmp_path / f"model{ending}")
        qi.save_quantized_model(converted, path)
        rows = {layer.path: layer.quantizers[0] for layer in qi.inspect_file(path).layers}
        for side in ("left", "right"):
            wrapper = converted.get_layer(side).get_layer(f"deep_{side}").get_layer("same")
            codes = wrapper.get_codes()["kernel"][0]
            values, counts = np.unique(codes, return_counts=True)
            expected = dict(zip(values.tolist(), counts.tolist(), strict=True))
            assert rows[f"{side}/deep_{side}/same"].codes == expected


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_model_in_training_has_no_codes(ending, tmp_path):
    wrapper = Wrapper(
        layers.Dense(3, name="dense"),
        {"kernel": weight(6, threshold=[1.0, 2.0, 4.0])},
        activation(16.0, 7),
        name="wrapped",
    )
    held = qi.KerasActivationQuantizationHolder(
        qi.ActivationUniformInferableQuantizer(5, -1.0, 3.0), name="held"
    )
    model = keras.Sequential([keras.Input((2,)), held, wrapper])
    path = str(tmp_path / f"model{ending}")
    model.save(path)
    holder, layer = qi.inspect_file(path).layers
    assert (holder.path, holder.inner_class, holder.quantizers[0].range) == ("held", None, (-1, 3))
    assert (layer.path, layer.inner_class, layer.converted) == ("wrapped", "Dense", False)
    kernel, output = layer.quantizers
    assert (kernel.role, kernel.num_bits, kernel.codes, kernel.bytes) == ("kernel", 6, None, 0)
    assert (output.role, output.num_bits) == ("output_0", 7)
    assert (kernel.class_name, output.class_name) == (
        "STEWeightQATQuantizer",
        "STEActivationQATQuantizer",
    )


@keras.saving.register_keras_serializable("test_inspection")
class Net(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.part = Composite()

    def call(self, inputs):
        return self.part(inputs)


def test_a_subclassed_model(tmp_path):
    net = Net(name="net")
    net(floats(2, 3))
    weights = {"part/first/kernel": weight(3), "part/blocks/1/kernel": weight(5)}
    quantized = QuantizedModel(net, weights, {"part/first": activation()})
    converted = quantized.convert_to_inferable_quantizers()
    path = str(tmp_path / "model.keras")
    converted.save(path)
    (layer,) = qi.inspect_file(path).layers
    assert (layer.path, layer.class_name, layer.inner_class) == ("net", "QuantizedModel", "Net")
    bits = {each.role: (each.num_bits, each.shape) for each in layer.quantizers}
    assert bits == {
        "part/first/kernel": (3, (3, 4)),
        "part/blocks/1/kernel": (5, (3, 2)),
        "part/first: output_0": (8, None),
    }


def in_report(model):
    """Bits and range of each quantizer that the report has a row for."""
    found = {}
    for layer in qi.quantization_report(model).layers:
        for row in layer.weights:
            found[layer.path, row.path] = row.num_bits, row.range
        for row in layer.activations:
            found[layer.path, row.name] = row.num_bits, row.range
    return found


def in_file(model, path):
    qi.save_quantized_model(model, path)
    return {
        (layer.path, each.role): (each.num_bits, each.range)
        for layer in qi.inspect_file(path).layers
        for each in layer.quantizers
    }


def softmax():
    """Its outputs cannot leave 0..1; convolutions, an embedding, and per-channel weights."""
    inputs = keras.Input((6, 6, 2))
    x = layers.ReLU()(layers.SeparableConv2D(3, 3)(layers.Conv2D(2, 1)(inputs)))
    x = layers.Dense(3, activation="softmax")(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, x)


def attention():
    inputs = keras.Input((4,), dtype="int32")
    x = layers.Embedding(9, 4)(inputs)
    x = layers.MultiHeadAttention(2, 3)(x, x)
    x = layers.Bidirectional(layers.GRU(2, return_sequences=True))(layers.Add()([x, x]))
    return keras.Model(inputs, layers.TimeDistributed(layers.Dense(2))(x))


RECIPES = {
    "w8a8": "w8a8",
    "symmetric": qi.Recipe(
        qi.WeightsSpec(4, method="uniform"), qi.ActivationSpec(8, method="symmetric")
    ),
    "power of two": qi.Recipe(
        qi.WeightsSpec(3, method="power_of_two", per_channel=False),
        qi.ActivationSpec(8, method="power_of_two"),
    ),
}
MODELS_OF = {
    "softmax": (softmax, floats(8, 6, 6, 2)),
    "nested": (nested, floats(8, 4, 5)),
    "attention": (attention, np.arange(32, dtype="int32").reshape(8, 4) % 9),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", MODELS_OF)
def test_ranges_are_those_of_the_report(name, recipe, ending, tmp_path):
    make, data = MODELS_OF[name]
    quantized = qi.quantize_model(make(), RECIPES[recipe], data, verbose=0)
    path = str(tmp_path / f"model{ending}")
    stored = in_file(quantized, path)
    outputs = {key: row for key, row in stored.items() if key[1].removeprefix("output_").isdigit()}
    assert outputs
    assert [key for key, row in outputs.items() if row[1] is None] == []
    converted = qi.convert_to_inferable(quantized)
    for model in (quantized, converted):
        expected, got = in_report(model), in_file(model, path)
        unknown = [key for key in got if got[key][1] is None]
        assert {key: row for key, row in got.items() if key not in unknown} == {
            key: row for key, row in expected.items() if key not in unknown
        }
        # Generated names say no more of inner kernels in files of trained models than these.
        allowed = {"forward_layer", "backward_layer"} if model is quantized else set()
        assert {role.split("/")[0] for _, role in unknown} <= allowed
    if name == "softmax":
        ends = {found[1] for (path, _), found in got.items() if path.startswith("dense")}
        assert (0.0, 1.0) in ends


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("make", [trained, converted_with_all], ids=lambda make: make.__name__)
def test_ranges_of_every_quantizer_are_those_of_the_report(make, ending, tmp_path):
    model, _ = make()
    path = str(tmp_path / f"model{ending}")
    for each in (model, qi.convert_to_inferable(model)):
        got = in_file(each, path)
        assert got == in_report(each)
        assert all(found[1] is not None for found in got.values())


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_not_calibrated_has_no_range(ending, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="dense")])
    quantized = qi.quantize_model(model, "w4a8")
    path = str(tmp_path / f"model{ending}")
    got = in_file(quantized, path)
    assert got == in_report(quantized)
    assert got["dense", "output_0"] == (8, None)
    assert got["dense", "kernel"][1] is not None
    rows = [line.split() for line in str(qi.inspect_file(path)).splitlines()[-3:]]
    assert sum("-" in row for row in rows) == 2


def test_ranges_of_a_subclassed_model(tmp_path):
    net = Net(name="net")
    net(floats(2, 3))
    quantized = qi.quantize_model(net, "w4a8", floats(8, 3), verbose=0)
    for model in (quantized, qi.convert_to_inferable(quantized)):
        got = in_file(model, str(tmp_path / "model.keras"))
        expected = [row for (_, role), row in in_report(model).items() if "output" in role]
        assert sorted(r for (_, role), r in got.items() if "output" in role) == sorted(expected)


@keras.saving.register_keras_serializable("test_inspection")
@qi.mark_quantizer(qi.QuantizationTarget.Activation, [qi.QuantizationMethod.SYMMETRIC])
class Own(qi.BaseKerasInferableQuantizer):
    """Of a user, with a variable of its own."""

    num_bits, scale, zero_point = 8, np.float32(1), np.int32(0)

    def initialize_quantization(self, tensor_shape, name, layer):
        layer.add_weight("limit", shape=(), initializer="ones", trainable=False)
        return {}

    def __call__(self, inputs):
        return inputs

    def get_config(self):
        return {}


@pytest.mark.parametrize("ending", ENDINGS)
def test_quantizers_of_unknown_classes_are_not_asked(ending, tmp_path, monkeypatch):
    """Nor are the variables that follow theirs taken for others."""
    monkeypatch.delitem(keras.saving.get_custom_objects(), "test_inspection>Own")
    config = qi.TrainableQuantizerActivationConfig(qi.QuantizationMethod.UNIFORM)
    moving = qi.MovingAverageActivationQATQuantizer(config)
    lstm = layers.LSTM(2, return_state=True)
    wrapper = Wrapper(lstm, {"cell/kernel": weight(4)}, [activation(4.0), Own(), moving])
    inputs = keras.Input((4, 3))
    model = keras.Model(inputs, wrapper(inputs))
    moving.set_range(-1.0, 2.0)
    got = in_file(model, str(tmp_path / f"model{ending}"))
    ranges = {role: found[1] for (_, role), found in got.items()}
    assert ranges["output_0"] == (-4.0, 4.0)
    assert ranges["output_1"] is None
    assert ranges["output_2"] == ((-1.0, 2.0) if ending == ".h5" else None)


SCRIPT = """
import sys
import keras_qwrap as qi
print(len(qi.inspect_file(sys.argv[1]).layers))
"""


def test_neither_the_classes_nor_a_whole_config_are_needed(tmp_path):
    path, broken = str(tmp_path / "model.keras"), str(tmp_path / "broken.keras")
    model = keras.Sequential([keras.Input((3,)), Wrapper(Composite(), {"first/kernel": weight(4)})])
    qi.convert_to_inferable(model).save(path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(broken, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data.replace(b"Composite", b"Gone"))
    refused(ValueError, lambda: qi.keras_load_quantized_model(broken), "Gone")
    assert qi.inspect_file(broken).layers[0].inner_class == "Gone"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, broken], capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"


def test_a_plain_model_has_no_layers_to_show(tmp_path):
    path = str(tmp_path / "model.keras")
    keras.Sequential([keras.Input((3,)), layers.Dense(2)]).save(path)
    found = qi.inspect_file(path)
    assert (found.layers, found.digest, found.stored_bytes) == ((), None, 32)
    assert str(found).endswith("No quantized layers.")


def saved(tmp_path, ending=".keras"):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="dense")])
    path = str(tmp_path / f"model{ending}")
    qi.save_quantized_model(qi.convert_to_inferable(qi.quantize_model(model, "w4")), path)
    return path


def test_the_table_and_the_dictionary(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    path = saved(tmp_path)
    found = qi.inspect_file(path)
    text = str(found).splitlines()
    assert found.digest in text[1]
    assert text[-2].split() == [
        *("layer", "class", "tensor", "quantizer", "bits", "range", "shape", "codes", "bytes")
    ]
    assert text[-1].split()[:5] == [
        *("dense", "Dense", "kernel", "WeightsSymmetricInferableQuantizer", "4")
    ]
    there = json.loads(json.dumps(found.to_dict()))
    assert there == found.to_dict()
    assert there["layers"][0]["quantizers"][0]["shape"] == [3, 2]


def test_the_table_fits_into_a_narrow_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    table = str(qi.inspect_file(saved(tmp_path))).splitlines()[3:]
    assert max(map(len, table)) <= 70
    assert [line.split()[:3] for line in table[:3]] == [
        ["layer", "tensor", "bits"],
        ["class", "quantizer", "range"],
        ["dense", "kernel", "4"],
    ]


def test_the_command_line(tmp_path, capsys):
    path = saved(tmp_path)
    assert cli.main(["inspect", path]) == 0
    assert capsys.readouterr().out == f"{qi.inspect_file(path)}\n"
    assert cli.main(["inspect", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == qi.inspect_file(path).to_dict()
    assert cli.main(["inspect", str(tmp_path / "none.keras")]) == 1
    assert "none.keras" in capsys.readouterr().err


def test_what_cannot_be_read_is_refused(tmp_path):
    for ending in ENDINGS:
        whole = bytearray(Path(saved(tmp_path, ending)).read_bytes())
        whole[len(whole) // 2] ^= 1
        (tmp_path / "damaged").write_bytes(whole)
        refused(OSError, lambda: qi.inspect_file(tmp_path / "damaged"), "digest", "damaged")
    (tmp_path / "text").write_text("hello")
    refused(ValueError, lambda: qi.inspect_file(tmp_path / "text"), "text", ".keras")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("a", "b")
    refused(ValueError, lambda: qi.inspect_file(tmp_path / "other.zip"), "other.zip", ".keras")
    refused(TypeError, lambda: qi.inspect_file(None), "None", "path")
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        file["x"] = np.arange(3)
    refused(ValueError, lambda: qi.inspect_file(tmp_path / "weights.h5"), "weights.h5", "config")


def test_hostile_files_are_refused_or_shown(tmp_path):
    """Neither endless arrays nor configs that no class would have written get through."""
    path = tmp_path / "model.h5"

    def written(config, arrays=()):
        with h5py.File(path, "w") as file:
            file.attrs["model_config"] = config
            for i, size in enumerate(arrays):
                file.create_dataset(f"model_weights/{i}", shape=(size,), dtype="u1", chunks=(1024,))
        return path

    whole = '{"class_name": "Sequential", "config": {"layers": []}}'
    refused(ValueError, lambda: qi.inspect_file(written(whole, [10**13])), "arrays of", "hostile")
    refused(ValueError, lambda: qi.inspect_file(written(whole, [2**26] * 5)), "arrays of")
    for text in ("[" * 5000 + "]" * 5000, "{", ""):
        refused(ValueError, lambda text=text: qi.inspect_file(written(text)), "model.h5", "JSON")
    deep = "[" * 900 + "]" * 900
    assert qi.inspect_file(written(deep)).layers == ()
    for part in (3, {"config": 3}, {"config": {"quantization_config": {"config": 3}}}):
        quantizers = {"kernel": part}
        config = {"name": "w", "layer": 3, "weights_quantizers": quantizers}
        node = {"class_name": "KerasQuantizationWrapper", "config": config}
        (layer,) = qi.inspect_file(written(json.dumps([node]))).layers
        assert layer.quantizers[0].num_bits is None
    damaged = {"threshold": {"__keras_qwrap_float32__": "no base64"}, "num_bits": 4}
    config["weights_quantizers"] = {"kernel": {"class_name": "Q", "config": damaged}}
    (layer,) = qi.inspect_file(written(json.dumps([node]))).layers
    assert (layer.quantizers[0].num_bits, layer.quantizers[0].range) == (4, None)
