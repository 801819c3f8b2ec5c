"""`quantize_model` of models whose inputs are no dense floats, or that leave nothing to find."""

import keras
import numpy as np
import pytest
from keras import layers
from reference import to_numpy

import keras_qwrap as qi
from keras_qwrap.calibration import has_ranges_to_find


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
