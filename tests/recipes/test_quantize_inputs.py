"""`quantize_model` of models whose inputs are no dense floats, or that leave nothing to find."""

import keras
import numpy as np
import pytest
from keras import layers
from reference import in_every_mode, refused, same, to_numpy
from whole_number_layers import WORDS, FirstOnes, Rows, Words

import keras_qwrap as qi
from keras_qwrap.calibration.calibrate import has_ranges_to_find


def classifier(*head):
    embedding = layers.Embedding(10, 4, name="table")
    return keras.Sequential([keras.Input((5,), dtype="int32"), embedding, *head])


def identity():
    inputs = keras.Input((5,))
    return keras.Model(inputs, inputs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: classifier(
            layers.GlobalAveragePooling1D(), layers.Dense(1, activation="sigmoid", name="head")
        ),
        lambda: classifier(layers.Flatten(), layers.Dense(3, activation="softmax")),
        classifier,
        pytest.param(
            identity,
            marks=pytest.mark.skipif(
                keras.__version__.startswith("3.13."), reason="Keras 3.13 makes no such model"
            ),
        ),
    ],
)
@pytest.mark.parametrize("recipe", ["w8a8", qi.Recipe.from_preset("w8a8", bias_correction=True)])
def test_data_is_taken_where_all_grids_are_known(make, recipe, random):
    model, tokens = make(), random.integers(0, 10, (16, 5))
    if recipe != "w8a8" and len(model.layers) < 3:
        pytest.skip("no layer has a bias")
    quantized = qi.quantize_model(model, recipe, tokens, verbose=0)
    assert not has_ranges_to_find(quantized)
    found, expected = quantized.predict(tokens, verbose=0), model.predict(tokens, verbose=0)
    np.testing.assert_allclose(found, expected, atol=0.02)
    if len(model.layers) > 1:
        converted = qi.convert_to_inferable(quantized)
        np.testing.assert_array_equal(converted.predict(tokens, verbose=0), found)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((4, 3), "int32"), "shape"),
        (np.full((4, 5), np.nan, "float32"), "NaN"),
        (iter([]), "no batch"),
        (iter([np.zeros((4, 5)), np.zeros((4, 6))]), "shape"),
    ],
)
def test_data_that_does_not_fit_is_refused_though_nothing_is_found_in_it(data, message):
    model = classifier(layers.GlobalAveragePooling1D(), layers.Dense(1, activation="sigmoid"))
    with pytest.raises(ValueError, match=message):
        qi.quantize_model(model, "w8a8", data, verbose=0)


@keras.saving.register_keras_serializable("test_quantize_inputs")
class AddIfGiven(layers.Layer):
    def call(self, inputs, more=None):
        return inputs if more is None else inputs + more

    def compute_output_shape(self, inputs_shape, more_shape=None):
        return inputs_shape


def test_optional_inputs(random, tmp_path):
    """They are quantized where they are given."""
    first, second = keras.Input((5,), name="first"), keras.Input((5,), name="second", optional=True)
    outputs = layers.Dense(2, name="dense")(AddIfGiven(name="sum")(first, second))
    model = keras.Model([first, second], outputs)
    x = random.normal(size=(8, 5)).astype("float32")
    quantized = qi.quantize_model(model, "w8a8", [x, x], verbose=0)
    zeros = to_numpy(quantized([x, np.zeros_like(x)]))
    assert isinstance(quantized.get_layer("second_quantizer"), qi.KerasActivationQuantizationHolder)
    assert not np.array_equal(to_numpy(quantized([x, x])), zeros)
    converted = qi.convert_to_inferable(quantized)
    converted.save(tmp_path / "model.keras")
    for each in (quantized, converted, keras.models.load_model(tmp_path / "model.keras")):
        np.testing.assert_array_equal(to_numpy(each([x, None])), zeros)
    np.testing.assert_allclose(zeros, to_numpy(model([x, None])), atol=0.1)


def sparse(x):
    import tensorflow as tf

    return tf.sparse.from_dense(x)


@pytest.mark.tensorflow
def test_sparse_inputs_and_what_is_sparse_of_them_are_left_in_float(random):
    """Keras declares a product with a number sparse, be it or not."""
    first, second = keras.Input((6,), sparse=True, name="sparse"), keras.Input((6,), name="dense")
    doubled, halved = first * 2.0, second * 0.5
    names = [tensor._keras_history.operation.name for tensor in (doubled, halved)]
    parts = [layers.Dense(2, name=f"dense_{i}")(each) for i, each in enumerate((doubled, halved))]
    parts.append(layers.Dense(2, name="dense_2")(first))
    parts.append(layers.Dense(2, name="dense_3")(doubled + halved))
    model = keras.Model([first, second], layers.Add(name="sum")(parts))
    x = np.maximum(random.normal(size=(16, 6)), 0).astype("float32")
    quantized = qi.quantize_model(model, "w8a8", [x, x], verbose=0)
    holders = [layer.name for layer in quantized.layers if layer.name.endswith("_quantizer")]
    assert "dense_quantizer" in holders
    assert f"{names[1]}_quantizer" in holders
    assert not {"sparse_quantizer", f"{names[0]}_quantizer"} & set(holders)
    dense = to_numpy(quantized([x, x]))
    found = to_numpy(quantized([sparse(x), keras.ops.convert_to_tensor(x)]))
    np.testing.assert_allclose(found, dense, atol=1e-4)
    np.testing.assert_allclose(found, to_numpy(model([x, x])), atol=0.3)
    rows = {row.path: row.outputs for row in qi.quantization_report(quantized, "w8a8").layers}
    for name in ("sparse", names[0]):
        assert (rows[name].state, rows[name].reason) == ("float", "it is sparse or ragged")
    assert np.isfinite(to_numpy(qi.convert_to_inferable(quantized)([x, x]))).all()


@pytest.mark.tensorflow
def test_counts_of_lookups_are_left_as_they_are_and_reported(random):
    ids = random.choice([3, 5, 9], (16, 4))
    inputs = keras.Input((4,), dtype="int64")
    lookups = [
        layers.IntegerLookup(vocabulary=[3, 5, 9], output_mode=mode, name=mode)
        for mode in ("multi_hot", "count")
    ]
    both = layers.Concatenate(name="both")([lookup(inputs) for lookup in lookups])
    model = keras.Model(inputs, layers.Dense(2, name="dense")(both))
    quantized = qi.quantize_model(model, "w8a8", ids, verbose=0)
    found = quantized.predict(ids, verbose=0)
    np.testing.assert_allclose(found, model.predict(ids, verbose=0), atol=0.1)
    rows = {row.path: row.outputs for row in qi.quantization_report(quantized, "w8a8").layers}
    for name in ("multi_hot", "count", "both"):
        assert (rows[name].state, rows[name].reason) == ("no float", "its dtype is int64")


def reading(layer, shape=(6,)):
    inputs = keras.Input(shape, name="ids")
    features = layers.GlobalAveragePooling1D(name="pool")(layer(inputs))
    return keras.Model(inputs, layers.Dense(2, name="dense")(features))


def spread(x):
    return np.sqrt(np.mean(np.square(x - x.mean(0))))


def saved_and_reloaded(model, ending, path, make):
    """`make` makes a model of the same layers, with other state."""
    path = path / f"model.{ending}"
    if ending == "weights.h5":
        model.save_weights(path)
        new = make()
        new.load_weights(path)
        return new
    qi.save_quantized_model(model, path)
    return qi.keras_load_quantized_model(path, compile=False)


def holder_of(model):
    return model.get_layer("ids_quantizer")


FILES = ["keras", *(pytest.param(end, marks=pytest.mark.slow) for end in ("h5", "weights.h5"))]


@pytest.mark.parametrize("given", [True, False])
def test_ids_that_reach_a_lookup_in_a_layer_are_exact_with_data_or_without(given, random):
    model, ids = reading(Words(name="words")), random.integers(0, WORDS, (64, 6)).astype("float32")
    quantized = qi.quantize_model(model, "w16a8", ids if given else None, verbose=0)
    assert "ids_quantizer" not in [layer.name for layer in quantized.layers]
    words = quantized.get_layer("words")
    assert len(np.unique(to_numpy(words.layer.table(ids)), axis=0)) > 1
    qi.calibrate(quantized, ids, verbose=0)
    error = to_numpy(quantized(ids)) - to_numpy(model(ids))
    assert spread(error) < 0.02 * spread(to_numpy(model(ids)))
    rows = {row.path: row.outputs for row in qi.quantization_report(quantized, "w16a8").layers}
    assert (rows["ids"].state, rows["ids"].reason) == ("float", "exact values for 'words'")


@pytest.mark.parametrize("ending", FILES)
def test_whole_numbers_for_a_layer_of_ones_own_pass_once_calibrated(ending, random, tmp_path):
    """Trained, converted and reloaded; up to the last whole number that float32 can tell apart."""
    model, ids = reading(Rows(name="rows")), random.integers(0, WORDS, (64, 6)).astype("float32")
    quantized = qi.quantize_model(model, "w16a16", ids, verbose=0)
    expected = to_numpy(quantized(ids))
    error = expected - to_numpy(model(ids))
    assert spread(error) < 3e-3 * spread(to_numpy(model(ids)))
    converted = qi.convert_to_inferable(quantized)
    again = qi.convert_to_inferable(converted)
    made = [lambda: qi.quantize_model(model, "w16a16"), lambda: qi.convert_to_inferable(quantized)]
    others = [
        saved_and_reloaded(each, ending, tmp_path, make)
        for each, make in zip((quantized, converted), made, strict=True)
    ]
    large = np.float32([[2**24, 2**24 - 1, -3, 0, 12345, 5]])
    for each in (quantized, converted, again, *others):
        same(each(ids), expected)
        same(holder_of(each)(large), large)
        same(holder_of(each)(large + 0.25), large + np.float32(0.25))
    for each in (quantized, others[0]):
        same(holder_of(each)(large, training=True), large)
        quantizer = holder_of(each).activation_holder_quantizer
        assert quantizer.whole_numbers is quantizer.passes_input is True
        refused(ValueError, quantizer.convert2inferable, "whole numbers", "holder")


@pytest.mark.slow
@pytest.mark.tensorflow
def test_whole_numbers_pass_in_every_mode(random):
    ids = random.integers(0, WORDS, (64, 6)).astype("float32")
    quantized = qi.quantize_model(reading(Rows()), "w8a8", ids, verbose=0)
    converted = qi.convert_to_inferable(quantized)
    for each in (quantized, converted):
        for found in in_every_mode(holder_of(each), ids):
            same(found, ids)
    for found in in_every_mode(lambda x: holder_of(quantized)(x, training=True), ids):
        same(found, ids)


def test_other_numbers_for_a_layer_of_ones_own_are_quantized(random):
    """The last calibration decides, by all of its data."""
    ids = random.integers(0, 200, (64, 6)).astype("float32")
    quantized = qi.quantize_model(reading(Rows()), "w8a8", ids, verbose=0)
    quantizer = holder_of(quantized).activation_holder_quantizer
    assert quantizer.whole_numbers is True
    fractions = ids.copy()
    fractions[40, 2] += 0.5
    qi.calibrate(quantized, fractions, batch_size=8, verbose=0)
    assert quantizer.whole_numbers is quantizer.passes_input is False
    converted = qi.convert_to_inferable(quantized)
    for each in (quantized, converted):
        assert len(np.unique(to_numpy(holder_of(each)(fractions + 0.3)))) <= 256
    same(converted(ids), to_numpy(quantized(ids)))
    qi.calibrate(quantized, ids, batch_size=8, verbose=0)
    assert quantizer.whole_numbers is True


def test_without_data_the_report_warns(random):
    ids = random.integers(0, WORDS, (64, 6)).astype("float32")
    quantized = qi.quantize_model(reading(Rows()), "w8a8")
    (note,) = qi.quantization_report(quantized, "w8a8").notes
    assert "ids_quantizer" in note
    assert "calibrate" in note
    quantized.compile("sgd", "mse")
    quantized.fit(ids, np.zeros((64, 2)), verbose=0)
    assert len(np.unique(to_numpy(holder_of(quantized)(ids)))) <= 256
    report = qi.quantization_report(quantized, "w8a8")
    assert report.notes == (note,)
    assert note in " ".join(str(report).split())
    qi.calibrate(quantized, ids, verbose=0)
    for each in (quantized, qi.convert_to_inferable(quantized)):
        report = qi.quantization_report(each)
        assert report.notes == ()
        (row,) = [row for row in report.layers if row.path == "ids_quantizer"]
        assert (row.activations, row.outputs.state) == ((), "float")
        assert "whole numbers" in row.outputs.reason
        assert "calibration found whole numbers" in " ".join(str(report).split())


def test_ids_with_a_long_tail_are_not_clipped_while_others_are_calibrated(random):
    """Neither the ids, nor what the layers behind see of them."""
    ids = random.integers(0, 4, (64, 40)).astype("float32")
    ids[3, 5] = WORDS - 1
    model = reading(Rows(name="rows"), shape=(40,))
    rows = np.full((WORDS, 4), 0.25, "float32")
    rows[-1] = 0.5
    model.get_layer("rows").rows.assign(rows)
    quantized = qi.quantize_model(model, "w8a8")
    found = qi.calibrate(quantized, ids, "minmax", verbose=0)
    assert found["rows"] == (0.0, 0.5)
    same(holder_of(quantized)(ids), ids)


@pytest.mark.parametrize("named", [False, True])
def test_lengths_and_segments_beside_features(named, random):
    """The features are fractions, and quantized; in whatever structure the inputs come."""
    shapes = {"features": (5, 3), "lengths": (1,), "segments": (5,)}
    inputs = {name: keras.Input(shape, name=name) for name, shape in shapes.items()}
    outputs = layers.Dense(2)(FirstOnes(name="first")(*inputs.values()))
    model = keras.Model(inputs if named else list(inputs.values()), outputs)
    data = {
        "features": random.normal(size=(64, 5, 3)),
        "lengths": random.integers(1, 6, (64, 1)),
        "segments": random.choice([3, 1000, 1001], (64, 5)),
    }
    data = {name: values.astype("float32") for name, values in data.items()}
    x = data if named else list(data.values())
    quantized = qi.quantize_model(model, "w16a16", x, verbose=0)
    expected, found = to_numpy(model(x)), to_numpy(quantized(x))
    assert spread(found - expected) < 3e-3 * spread(expected)
    for name, whole in (("features", False), ("lengths", True), ("segments", True)):
        holder = quantized.get_layer(f"{name}_quantizer")
        assert holder.activation_holder_quantizer.whole_numbers is whole
    same(qi.convert_to_inferable(quantized)(x), found)


def test_a_sequential_model_of_whole_numbers(random, tmp_path):
    ids = random.integers(0, WORDS, (64, 6)).astype("float32")
    parts = [Rows(), layers.Flatten(), layers.Dense(2)]
    model = keras.Sequential([keras.Input((6,), name="ids"), *parts])
    quantized = qi.quantize_model(model, "w8a8", ids, verbose=0)
    holder = quantized.layers[0]
    assert holder.activation_holder_quantizer.whole_numbers is True
    same(holder(ids), ids)
    same(saved_and_reloaded(quantized, "keras", tmp_path, None)(ids), to_numpy(quantized(ids)))
