"""What `keras_load_quantized_model` refuses before it builds anything, and what it does not."""

import inspect
import json
import random
import re
import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras import layers, ops
from layer_cases import Composite, floats, weight
from reference import refused, to_numpy

import keras_qwrap as qi
from keras_qwrap.files import limits

load = qi.keras_load_quantized_model


def saved(folder, *parts, ending=".keras", compiled=False):
    """A file of a small model that begins with these layers."""
    wrapper = qi.KerasQuantizationWrapper(layers.Dense(2, name="dense"), {"kernel": weight()})
    model = keras.Sequential([keras.Input((3,)), *parts, wrapper])
    if compiled:
        metric = keras.metrics.AUC(3, multi_label=True, num_labels=2)
        model.compile(loss=keras.losses.MeanSquaredError(), metrics=[metric])
        model.fit(floats(2, 3), np.ones((2, 2)), verbose=0)
    model.save(folder / f"model{ending}")
    return folder / f"model{ending}"


def with_config(path, old, new):
    """Change the config in a file, as text."""
    if path.suffix == ".h5":
        with h5py.File(path, "a") as file:
            for name in ("model_config", "training_config"):
                if name in file.attrs:
                    file.attrs[name] = file.attrs[name].replace(old, new)
        return path
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    assert old.encode() in members["config.json"]
    members["config.json"] = members["config.json"].replace(old.encode(), new.encode())
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def with_arrays(path, change):
    """Change the HDF5 file of a `.keras` archive."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    weights = path.with_suffix(".weights")
    weights.write_bytes(members["model.weights.h5"])
    with h5py.File(weights, "a") as file:
        change(file)
    members["model.weights.h5"] = weights.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_huge_variables_are_refused(ending, tmp_path):
    path = saved(tmp_path, layers.Dense(5, name="wide"), ending=ending)
    path = with_config(path, '"units": 5', '"units": 16000000')
    path = with_config(path, "[null, 5]", "[null, 16000000]") if ending == ".keras" else path
    refused(ValueError, lambda: load(path), str(path), "variables of 384,000", "hostile")


@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_huge_metrics_are_refused(ending, tmp_path):
    path = saved(tmp_path, ending=ending, compiled=True)
    assert load(path).compiled
    path = with_config(path, '"num_labels": 2', '"num_labels": 15000000')
    refused(ValueError, lambda: load(path), "variables of 360,000", "hostile")
    assert not load(path, compile=False).compiled


def test_huge_arrays_are_refused_even_one_by_one(tmp_path):
    def change(file):
        for i in range(9):
            file.create_dataset(f"more/{i}", shape=(2**25,), dtype="u1", chunks=(1024,))

    path = with_arrays(saved(tmp_path), change)
    refused(ValueError, lambda: load(path), "arrays of", "hostile", "keras.models.load_model")


def test_links_are_refused(tmp_path):
    def soft(file):
        file["more"] = h5py.SoftLink("/layers")

    def outer(file):
        file["more"] = h5py.ExternalLink("/etc/passwd", "/")

    def again(file):
        file["more"] = file["layers/keras_quantization_wrapper/layer/vars/0"]

    def around(file):
        file["more"] = file["/"]

    def elsewhere(file):
        layout = h5py.VirtualLayout(shape=(4,), dtype="f4")
        layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape=(4,))
        file.create_virtual_dataset("more", layout)

    for change, part in [(soft, "link"), (outer, "link"), (again, "second"), (around, "second")]:
        path = with_arrays(saved(tmp_path), change)
        refused(ValueError, lambda path=path: load(path), f"{part}", "'more'", "hostile")
    path = with_arrays(saved(tmp_path), elsewhere)
    refused(ValueError, lambda: load(path), "'more' in other files", "hostile")


def test_archives_are_plain_and_small(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    for name in ("../evil", "/evil", "C:\\evil", "assets/../../evil", "a\\..\\b"):
        path.write_bytes(whole)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, b"evil")
        refused(ValueError, lambda: load(path), "the member", "inside the archive")
    path.write_bytes(whole)
    with (
        pytest.warns(UserWarning, match="Duplicate"),
        zipfile.ZipFile(path, "a") as archive,
    ):
        archive.writestr("config.json", b"{}")
    refused(ValueError, lambda: load(path), "two members of one name")
    path.write_bytes(whole)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("bomb", "w") as bomb,
    ):
        for _ in range(300):
            bomb.write(bytes(2**20))
    refused(ValueError, lambda: load(path), "members of", "hostile")


def test_huge_inputs_and_endless_configs_are_refused(tmp_path):
    path = saved(tmp_path, layers.Normalization(mean=0.0, variance=1.0))
    path = with_config(path, "3]", "300000000]")
    refused(ValueError, lambda: load(path), "a shape [None, 300000000]", "67108864 elements")
    path = with_config(saved(tmp_path), '"units": 2', f'"units": {json.dumps([0] * 10**6)}')
    refused(ValueError, lambda: load(path), "a config of more values", "1,000,000")


@keras.saving.register_keras_serializable("test_hostile")
def plus_one(x):
    """Named by a file, not stored in it."""
    return x + 1


@keras.saving.register_keras_serializable("test_hostile")
class Lambda(layers.Layer):
    """Of a user, and no code."""

    def call(self, inputs):
        return inputs


def test_code_is_refused_and_registered_functions_are_not(tmp_path):
    for ending in (".keras", ".h5"):
        path = saved(tmp_path, layers.Lambda(lambda x: x + 1, output_shape=(3,)), ending=ending)
        refused(ValueError, lambda path=path: load(path), "code in the file")
    path = saved(tmp_path, layers.Lambda(plus_one, output_shape=(3,)), Lambda())
    np.testing.assert_array_equal(
        to_numpy(load(path)(floats(2, 3))), to_numpy(keras.models.load_model(path)(floats(2, 3)))
    )


@keras.saving.register_keras_serializable("test_hostile")
class Scaled(layers.Layer):
    """Makes a variable of an array, and another one that no file holds."""

    def build(self, shape):
        self.scale = keras.Variable(np.float32([2.0] * shape[-1]), name="scale")
        self.table = keras.Variable(np.zeros(10**6, np.float32), trainable=False, name="table")

    def call(self, inputs):
        return inputs * self.scale

    def save_own_variables(self, store):
        pass

    def load_own_variables(self, store):
        pass


def test_layers_of_users_are_not_taken_for_hostile(tmp_path):
    model = keras.models.load_model(saved(tmp_path, Scaled()))
    loaded = load(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(loaded(floats(2, 3))), to_numpy(model(floats(2, 3))))


@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_loading_draws_what_keras_draws_and_sets_nothing_back(ending, tmp_path, monkeypatch):
    path = saved(tmp_path, layers.Dropout(0.5), ending=ending)
    states = []
    for loader in (load, keras.models.load_model):
        random.seed(0)
        loader(path)
        states.append(random.getstate())
    assert states[0] == states[1]
    monkeypatch.setattr(random, "setstate", None)
    monkeypatch.setattr(random, "seed", None)
    load(path)


@keras.saving.register_keras_serializable("test_hostile")
class Assigned(layers.Layer):
    """Assigns, reads and traces its variables while it is built, and saves none of them."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(3,), initializer="zeros", name="scale")
        self.scale.assign([2.0, 3.0, 4.0])
        self.twice = self.add_weight(shape=(3,), initializer="random_normal", name="twice")
        self.twice.assign(2 * self.scale)
        self.inner = Composite()
        self.inner(keras.KerasTensor((1, 3)))
        kernel = self.inner.first.kernel
        np.testing.assert_array_equal(to_numpy(kernel), to_numpy(kernel))
        self.inner.first.bias.assign(to_numpy(self.inner.first.bias) + 1)
        self.scale.assign_add(self.inner.first.bias[:3])

    def call(self, inputs):
        return inputs * self.scale + self.twice

    def save_own_variables(self, store):
        pass

    def load_own_variables(self, store):
        pass


def test_layers_are_built_as_ever_while_variables_are_counted(tmp_path):
    path = saved(tmp_path, Assigned())
    expected = keras.models.load_model(path)
    loaded = load(path)
    for a, b in zip(loaded.variables, expected.variables, strict=True):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b))
    inputs = floats(2, 3)
    np.testing.assert_array_equal(to_numpy(loaded(inputs)), to_numpy(expected(inputs)))


def test_a_model_is_built_once_and_its_file_read_once(tmp_path, monkeypatch):
    built, opened = [], []
    monkeypatch.setattr(Built, "seen", built)
    path = saved(tmp_path, Built())
    built.clear()
    real = open
    monkeypatch.setattr("builtins.open", lambda *a, **k: opened.append(a[0]) or real(*a, **k))
    load(path)
    assert built == ["built"]
    assert opened.count(str(path)) == 1


@keras.saving.register_keras_serializable("test_hostile")
class Built(layers.Layer):
    """Notes that it is built."""

    seen = None

    def build(self, shape):
        self.seen.append("built")

    def call(self, inputs):
        return inputs


@keras.saving.register_keras_serializable("test_hostile")
class Coded(layers.Layer):
    """Holds whatever function it is given."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, inputs):
        return self.function(inputs)

    def get_config(self):
        function = keras.saving.serialize_keras_object(self.function)
        return super().get_config() | {"function": function}

    @classmethod
    def from_config(cls, config):
        function = keras.saving.deserialize_keras_object(config.pop("function"))
        return cls(function, **config)


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_code_of_ones_own_is_run_where_one_says_so(ending, tmp_path):
    parts = [layers.Lambda(lambda x: x + 1, output_shape=(3,), name="own")]
    parts += [Coded(lambda x: x * 2)] if ending == ".keras" else []
    path = saved(tmp_path, *parts, ending=ending)
    expected = keras.models.load_model(path, safe_mode=False)
    inputs = floats(2, 3)
    loaded = load(path, safe_mode=False)
    np.testing.assert_array_equal(to_numpy(loaded(inputs)), to_numpy(expected(inputs)))
    for call in (lambda: load(path), lambda: load(path, safe_mode=True)):
        refused(ValueError, call, str(path), "code in the file", "safe_mode=False")
    refused(TypeError, lambda: load(path, safe_mode="no"), "safe_mode", "'no'")
    huge = with_config(path, '"units": 2', '"units": 60000000')
    refused(ValueError, lambda: load(huge, safe_mode=False), "units=60000000", "hostile")


@keras.saving.register_keras_serializable("test_hostile")
class Sized(layers.Layer):
    """Of a user, with a large number of its own."""

    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.size = size

    def call(self, inputs):
        return inputs

    def get_config(self):
        return super().get_config() | {"size": self.size}


@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_huge_numbers_and_shapes_are_refused_wherever_they_are(ending, tmp_path):
    path = saved(tmp_path, layers.Discretization(bin_boundaries=[0.5]), ending=ending)
    with_config(path, '"num_bins": null', '"num_bins": 60000000')
    refused(ValueError, lambda: load(path), "num_bins=60000000", "at most 16,777,216")
    parts = [layers.Reshape((3, 1)), layers.Conv1D(4, 2), layers.Flatten()]
    for old, new in [
        ('"filters": 4', '"filters": -60000000'),
        ('"kernel_size": [2]', '"kernel_size": [60000000]'),
    ]:
        path = with_config(saved(tmp_path, *parts, ending=ending), old, new)
        refused(ValueError, lambda path=path: load(path), "60000000", "at most 16,777,216")
    path = saved(tmp_path, Sized(10**9), ending=ending)
    assert load(path).layers[0].size == 10**9
    path = saved(tmp_path, layers.Dropout(0.5, seed=1234567890), ending=ending)
    assert load(path).layers[0].seed == 1234567890


def test_shapes_of_wrappers_are_shapes(tmp_path):
    inner = layers.Normalization(mean=0.0, variance=1.0)
    model = keras.Sequential([keras.Input((3,)), qi.KerasQuantizationWrapper(inner)])
    model.save(tmp_path / "model.keras")
    path = with_config(tmp_path / "model.keras", "[null, 3]", "[null, 150000000]")
    refused(ValueError, lambda: load(path), "a shape [None, 150000000]", "67108864")


@pytest.mark.parametrize(
    "key",
    [
        *("units", "filters", "groups", "max_tokens", "chain_depth", "repeats", "ngrams", "num"),
        *("indices_or_sections", "power_iterations", "input_dim", "vocabulary_size", "height"),
        *("output_sequence_length", "width", "depth_multiplier", "num_bits", "num_thresholds"),
    ],
)
def test_huge_sizes_are_refused_by_their_keys(key, tmp_path):
    path = with_config(saved(tmp_path), '"units": 2', f'"{key}": {10**12}')
    refused(ValueError, lambda: load(path), f"{key}={10**12}", "at most 16,777,216")


MODULES = ("layers", "metrics", "losses", "initializers", "constraints", "regularizers")
SOUNDS_LIKE_A_SIZE = re.compile(
    "num_|.*(units|filters|groups|tokens|ngrams|depth|repeats|sections|iterations|dim|size|length"
    "|height|width|multiplier|num)$"
)
NO_SIZES = {"pad_to_max_tokens", "ndim", "min_ndim", "max_ndim"}


def test_every_argument_of_keras_that_sounds_like_a_size_is_one():
    """A new version of Keras may have more of them."""
    classes = [cls for name in MODULES for cls in vars(getattr(keras, name)).values()]
    named = {
        name
        for cls in classes
        if isinstance(cls, type)
        for base in cls.__mro__
        if "__init__" in vars(base)
        for name in inspect.signature(base.__init__).parameters
        if SOUNDS_LIKE_A_SIZE.match(name)
    }
    assert len(named) > 30
    assert named - NO_SIZES <= limits._SIZES


@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_a_number_is_a_size_only_where_it_is_an_argument(ending, tmp_path):
    """Here it is the weight of a loss, by the name of a layer."""
    inputs = keras.Input((3,))
    outputs = {name: layers.Dense(1, name=name)(inputs) for name in ("length", "input_shape")}
    model = keras.Model(inputs, outputs)
    losses = {name: keras.losses.MeanSquaredError() for name in outputs}
    weights = dict.fromkeys(outputs, 10**9)
    model.compile("sgd", losses, loss_weights=weights)
    model.save(tmp_path / f"model{ending}")
    assert load(tmp_path / f"model{ending}").get_compile_config()["loss_weights"] == weights


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"args": []', '"args": [[null, 70000000]]'),
        ('"kwargs": {"input_shape": [null, 3]}', '"kwargs": {"x": [null, 70000000]}'),
        ('[[null, 3], "float32"]', '[[null, 70000000], "float32"]'),
        ('"output_shapes": null', '"output_shapes": [[null, 20000, 20000]]'),
    ],
)
def test_all_that_wrappers_are_built_from_is_checked(old, new, tmp_path):
    path = with_config(saved(tmp_path), old, new)
    refused(ValueError, lambda: load(path), "a shape [None, ", "0000", "67108864 elements")


def test_a_shape_without_end_is_refused_at_once(tmp_path):
    path = with_config(saved(tmp_path), "[null, 3]", json.dumps([2**26] * 400_000))
    refused(ValueError, lambda: load(path), "a shape [67108864, ", "hostile")


CONSTANTS = {
    "indices": (lambda x: ops.take(x, [3, 17, 25, 40, 51, 63, 33], axis=-1), (64,), [".keras"]),
    "number": (lambda x: layers.Dense(6)(x) - ops.cast(x > 0, "float32") * 10**9, (6,), [".keras"]),
    "array": (lambda x: x * np.int32([99, 100, 101, 102, 103, 104]), (6,), [".keras"]),
    "clip": (lambda x: ops.clip(x, -(10**9), 10**9), (6,), [".keras"]),
    "relu": (layers.ReLU(max_value=10**8), (6,), [".keras", ".h5"]),
    "masking": (lambda x: layers.LSTM(2)(layers.Masking(-999999999)(x)), (5, 3), [".keras"]),
    "rescaling": (layers.Rescaling(1.0, offset=20_000_000), (6,), [".keras", ".h5"]),
    "normalization": (layers.Normalization(mean=3, variance=10**9), (6,), [".keras", ".h5"]),
}


@pytest.mark.parametrize(
    ("name", "ending"), [(name, ending) for name in CONSTANTS for ending in CONSTANTS[name][2]]
)
def test_large_constants_are_no_sizes(name, ending, tmp_path):
    function, shape, _ = CONSTANTS[name]
    inputs = keras.Input(shape)
    model = keras.Model(inputs, layers.Dense(2)(function(inputs)))
    quantized = qi.quantize_model(model, "w8a8", floats(4, *shape), verbose=0)
    for saved_model in (quantized, qi.convert_to_inferable(quantized)):
        path = tmp_path / f"model{ending}"
        qi.save_quantized_model(saved_model, path)
        np.testing.assert_array_equal(
            to_numpy(load(path)(floats(4, *shape))), to_numpy(saved_model(floats(4, *shape)))
        )


def test_large_outputs_of_layers_are_not_taken_for_hostile(tmp_path):
    inputs = keras.Input((128, 128, 128, 1))
    x = layers.Conv3D(64, 1)(inputs)
    model = keras.Model(inputs, layers.GlobalAveragePooling3D()(layers.ReLU()(x)))
    qi.save_quantized_model(qi.quantize_model(model, "w8"), tmp_path / "model.keras")
    assert load(tmp_path / "model.keras").count_params() == model.count_params()
