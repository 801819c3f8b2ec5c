"""Names, order and refusals of `quantize_model` in nested, subclassed and unusual models."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_qwrap as qi
from keras_qwrap import Recipe, Rule


def rows(count=8, width=4):
    return np.random.default_rng(0).normal(size=(count, width)).astype("float32")


def wrapped(model):
    """Names of the wrapped layers, nested ones included."""
    rows = qi.quantization_report(model).layers
    wrappers = [row for row in rows if row.wrapped and not row.class_name.endswith("Holder")]
    return sorted(row.path.rpartition("/")[2] for row in wrappers)


def nested():
    base_in = keras.Input((4,))
    hidden = layers.Dense(4, name="b2")(layers.Dense(4, name="b1")(base_in))
    base = keras.Model(base_in, hidden, name="base")
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(2, name="head")(base(inputs)))


@pytest.mark.parametrize(("position", "left"), [(0, "b1"), (1, "b2"), (-1, "head")])
def test_positions_count_along_a_nested_graph(position, left):
    recipe = Recipe.from_preset("w8a8", rules=[Rule.leave_in_float(position=position)])
    assert wrapped(qi.quantize_model(nested(), recipe)) == sorted({"b1", "b2", "head"} - {left})


@keras.saving.register_keras_serializable("test_quantize_order")
class Chain(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.stem, self.body, self.head = (layers.Dense(4) for _ in range(3))

    def call(self, inputs):
        return self.head(self.body(self.stem(inputs)))


@pytest.mark.parametrize(("position", "left"), [(0, "stem"), (1, "body"), (-1, "head")])
def test_positions_count_along_a_call_of_a_subclassed_model(position, left):
    model = Chain()
    model(rows())
    recipe = Recipe.from_preset("w8a8", rules=[Rule.leave_in_float(position=position)])
    quantized = qi.quantize_model(model, recipe)
    kept = sorted({"stem", "body", "head"} - {left})
    assert sorted(quantized.weights_quantizers) == [f"{name}/kernel" for name in kept]
    assert sorted(quantized.activation_quantizers) == kept


@keras.saving.register_keras_serializable("test_quantize_order")
class Nameless(layers.Layer):
    """Keras' own config of it leaves out the name."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], self.units), name="kernel")

    def call(self, inputs):
        return ops.matmul(inputs, self.kernel)


def test_names_are_kept_where_a_config_has_none(tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2, name="last")(Nameless(3, name="own")(inputs)))
    quantized = qi.quantize_model(model, "w8a8", rows(), verbose=0)
    assert wrapped(quantized) == ["last", "own"]
    assert quantized.get_layer("own").layer.name == "own"
    expected = ops.convert_to_numpy(quantized(rows(), training=False))
    quantized.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded(rows(), training=False)), expected)


def encoder(name):
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Dense(3, name="same", activation="relu")(inputs), name=name)


def test_layers_of_the_same_name_in_nested_models_are_all_calibrated():
    inputs = keras.Input((4,))
    both = layers.Concatenate()([encoder("first")(inputs), encoder("second")(inputs)])
    quantized = qi.quantize_model(keras.Model(inputs, both), "w8a8", rows(), verbose=0)
    assert qi.quantization_report(quantized).totals.uncalibrated_activations == 0


def test_the_input_of_a_sequential_model_has_a_name_for_rules():
    model = keras.Sequential([keras.Input((4,), name="in"), layers.Dense(2, name="dense")])
    recipe = Recipe.from_preset("w8a8", rules=[Rule(name="in", activations="float")])
    assert [layer.name for layer in qi.quantize_model(model, recipe).layers] == ["dense"]
    assert len(qi.quantize_model(model, "w8a8").layers) == 2


def test_a_name_that_is_taken_is_not_given_twice():
    inputs = keras.Input((4,), name="in")
    model = keras.Model(inputs, layers.Dense(2, name="in_quantizer")(inputs))
    names = [layer.name for layer in qi.quantize_model(model).layers]
    assert names == ["in", "in_quantizer_1", "in_quantizer"]


def test_conversion_names_the_activations_without_range():
    with pytest.raises(ValueError, match=r"no range, of \['b1', 'b2', 'head', 'in.*_quantizer'\]"):
        qi.convert_to_inferable(qi.quantize_model(nested(), "w8a8"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"example": ((), {})}, "Only a subclassed model needs an example"),
        ({"calibration_data": rows(), "batch_size": 0}, "batch_size"),
        ({"calibration_data": rows(), "steps": -1}, "steps"),
    ],
)
def test_arguments_without_use_or_out_of_bounds(arguments, message):
    with pytest.raises(ValueError, match=message):
        qi.quantize_model(nested(), **arguments)


def test_folding_needs_a_graph():
    model = Chain()
    model(rows())
    with pytest.raises(ValueError, match="It has no graph"):
        qi.quantize_model(model, Recipe(fold_batch_norm=True))


def test_a_converted_composite_stays_frozen_when_it_is_reloaded(tmp_path):
    inputs = keras.Input((5, 4))
    model = keras.Model(inputs, layers.MultiHeadAttention(2, 2)(inputs, inputs))
    converted = qi.convert_to_inferable(qi.quantize_model(model, "w8"))
    assert converted.trainable_weights == []
    converted.save(tmp_path / "model.keras")
    assert keras.models.load_model(tmp_path / "model.keras").trainable_weights == []


class Unread:
    """Data that must not be looked at."""

    def __iter__(self):
        raise AssertionError


@pytest.mark.parametrize("recipe", ["w8", "w4"])
def test_data_that_a_recipe_has_no_use_for_is_not_read(recipe):
    """Whether it fits or not."""
    for data in (rows(), rows()[:, :1], iter([]), Unread(), "no data", 5):
        quantized = qi.quantize_model(nested(), recipe, data)
        assert qi.quantization_report(quantized, recipe) is not None
    model = Chain()
    model(rows())
    qi.quantize_model(model, "w8", Unread())
