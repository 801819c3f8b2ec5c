"""What `keras_load_quantized_model` reads of an archive is what `keras.models.load_model` reads."""

import io
import json
import zipfile

import h5py
import keras
import numpy as np
import pytest

import keras_qwrap as qi

X = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
DTYPES = ["float16", "bfloat16", "int8", "uint16", "bool"]


@keras.saving.register_keras_serializable("tests")
class Kinds(keras.layers.Layer):
    """Has weights of many dtypes and shapes."""

    def build(self, input_shape):
        for i, dtype in enumerate(DTYPES):
            name = f"of_{dtype}"
            self.add_weight((2, i), name=name, dtype=dtype, initializer="ones", trainable=False)
        self.add_weight((), name="scalar", initializer="ones")

    def call(self, inputs):
        return inputs


@keras.saving.register_keras_serializable("tests")
class Keeper(keras.layers.Layer):
    """Saves what it likes, under the names that it likes."""

    def build(self, input_shape):
        self.first = self.add_weight((3,), name="first", initializer="zeros")
        self.second = self.add_weight((), name="second", initializer="zeros")
        self.seen: dict = {}

    def call(self, inputs):
        return inputs + self.first * self.second

    def save_own_variables(self, store):
        store["part/first"] = self.first
        store["part/inner/second"] = self.second
        store["big_endian"] = np.arange(3, dtype=">f8")

    def load_own_variables(self, store):
        self.first.assign(store["part/first"])
        self.second.assign(store["part/inner/second"])
        self.seen = {
            "keys": sorted(store.keys()),
            "length": len(store),
            "part": "part" in store,
            "inner": "part/inner" in store,
            "none": "none" in store,
            "array": store["big_endian"].tolist(),
        }
        store["big_endian"][0] = 1  # It is the layer's own.
        with pytest.raises(KeyError):
            store["none"]


@keras.saving.register_keras_serializable("tests")
class Listed(keras.layers.Layer):
    """Holds layers in lists inside a list."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # Keras 3.13 saves nothing of lists in lists: what is made is then the same each time.
        dense = [keras.layers.Dense(3, kernel_initializer="ones") for _ in range(2)]
        self.rows = [dense, [keras.layers.ReLU()]]

    def build(self, input_shape):
        for layer in self.rows[0]:
            layer.build(input_shape)

    def call(self, inputs):
        for row in self.rows:
            for layer in row:
                inputs = layer(inputs)
        return inputs


@keras.saving.register_keras_serializable("tests")
class OwnSequential(keras.Sequential):
    """A class of the user's that has all from Keras."""


def chained() -> keras.Model:
    return keras.Sequential(
        [keras.Input((3,), name="given"), keras.layers.Dense(3), keras.layers.Dropout(0.5, seed=1)],
        name="outer",
    )


def nested() -> keras.Model:
    inner = keras.Sequential([keras.layers.Dense(3), chained(), keras.layers.ReLU()], name="inner")
    inputs = keras.Input((3,))
    return keras.Model(inputs, keras.layers.Add()([inner(inputs), inner(inner(inputs))]))


def built_late(*layers: keras.layers.Layer) -> keras.Model:
    model = keras.Sequential(layers)
    model.build((None, 3))
    return model


def around(layer: keras.layers.Layer) -> keras.Model:
    return keras.Sequential([keras.Input((3,)), layer])


def with_own_sequential() -> keras.Model:
    return around(OwnSequential([keras.layers.Dense(3), keras.layers.ReLU()]))


MODELS = {
    "chained": chained,
    "nested": nested,
    "built late": lambda: built_late(keras.layers.Dense(3), keras.layers.BatchNormalization()),
    "of one layer": lambda: built_late(keras.layers.Dense(3)),
    "of a model": lambda: keras.Sequential([chained(), keras.layers.Dense(2)]),
    "own class": with_own_sequential,
    "kinds": lambda: around(Kinds()),
    "keeper": lambda: around(Keeper()),
    "listed": lambda: around(Listed()),
}


def with_other_values(model: keras.Model) -> keras.Model:
    random = np.random.default_rng(1)
    for weight in model.variables:
        if not weight.dtype.startswith(("uint", "key")):
            weight.assign(random.integers(0, 2, tuple(weight.shape)) + (weight.dtype != "bool"))
    return model


def assert_alike(one: keras.Model, other: keras.Model) -> None:
    assert one.name == other.name
    assert one.input_shape == other.input_shape
    assert [layer.name for layer in one.layers] == [layer.name for layer in other.layers]
    for mine, theirs in zip(one.variables, other.variables, strict=True):
        assert (mine.name, mine.dtype) == (theirs.name, theirs.dtype)
        assert np.array_equal(*map(keras.ops.convert_to_numpy, (mine, theirs)))
    assert np.array_equal(one.predict(X, verbose=0), other.predict(X, verbose=0))


def both(path):
    return qi.keras_load_quantized_model(path), keras.models.load_model(path)


@pytest.mark.parametrize("name", MODELS)
def test_models_and_their_arrays_are_those_that_keras_loads(name, tmp_path):
    keras.backend.clear_session()
    model, path = with_other_values(MODELS[name]()), tmp_path / "model.keras"
    model.save(path)
    assert_alike(*both(path))


def test_a_layer_sees_the_store_that_keras_gives(tmp_path):
    model, path = around(Keeper()), tmp_path / "model.keras"
    model.save(path)
    mine, of_keras = (loaded.layers[0].seen for loaded in both(path))
    assert dict(mine) == dict(of_keras)
    assert mine["keys"] == ["big_endian", "part"]


def members_of(path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_members(path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_a_model_whose_file_names_its_input_by_shape_alone(tmp_path):
    path = tmp_path / "model.keras"
    with_other_values(built_late(keras.layers.Dense(3))).save(path)
    members = members_of(path)
    config = json.loads(members["config.json"])
    del config["build_config"], config["config"]["layers"][0]
    write_members(path, members | {"config.json": json.dumps(config).encode()})
    assert_alike(*both(path))


def rewritten(path, write) -> None:
    """Let `write(file, name, dataset)` write each array of an archive anew."""
    members = members_of(path)
    old, new = io.BytesIO(members["model.weights.h5"]), io.BytesIO()
    with h5py.File(old, "r") as read, h5py.File(new, "w") as written:

        def visit(name, part):
            if isinstance(part, h5py.Dataset):
                write(written, name, part)

        read.visititems(visit)
    write_members(path, members | {"model.weights.h5": new.getvalue()})


STORAGES = {
    "compressed": lambda file, name, old: file.create_dataset(name, data=old, compression="gzip"),
    "in chunks": lambda file, name, old: file.create_dataset(name, data=old, chunks=True),
    "never written": lambda file, name, old: file.create_dataset(
        name, old.shape, "f4", fillvalue=2.0
    ),
    "of TensorFlow 2.13": lambda file, name, old: file.create_dataset(
        name.replace("layers", "_layer_checkpoint_dependencies"), data=old
    ),
}


@pytest.mark.parametrize("storage", STORAGES)
def test_arrays_are_read_however_they_are_stored(storage, tmp_path):
    layers = [keras.layers.Dense(3), keras.layers.BatchNormalization()]
    model, path = keras.Sequential([keras.Input((3,)), *layers]), tmp_path / "model.keras"
    with_other_values(model).save(path)
    rewritten(path, STORAGES[storage])
    assert_alike(*both(path))
