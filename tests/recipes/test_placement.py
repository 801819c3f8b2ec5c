"""Where activations are quantized: what fuses, what carries a grid, and which ranges are known."""

import re

import keras
import numpy as np
import pytest
from keras import layers, ops
from reference import same
from whole_number_layers import (
    Counting,
    Deeper,
    Mapped,
    Places,
    Rows,
    Shifted,
    Words,
    WordsCell,
    WordsModel,
)

from keras_qwrap.layers.layer_table import ROWS, Behaviour, is_identity
from keras_qwrap.models.placement import (
    carries_grid,
    exact_inputs,
    inputs_of_custom_layers,
)
from keras_qwrap.recipes.plan import plan


def placed(model):
    """`{operation name: kind of range}` of what is quantized in a model's graph."""
    planned = plan(model)
    graph = getattr(model, "operations", None) or model.layers
    operations = [op for op in graph if not isinstance(op, layers.InputLayer)]
    found = {op.name: [each.value for each in planned.outputs(op).ranges] for op in operations}
    return {name: ranges for name, ranges in found.items() if ranges}


def chain(*parts, shape=(8, 8, 3)):
    """A Functional model of layers or functions one after the other."""
    inputs = tensor = keras.Input(shape, name="input")
    for part in parts:
        tensor = part(tensor)
    return keras.Model(inputs, tensor)


def conv(name="conv", **kwargs):
    return layers.Conv2D(4, 3, padding="same", name=name, **kwargs)


def norm(name="norm"):
    return layers.BatchNormalization(name=name)


def relu(name="relu"):
    return layers.ReLU(name=name)


def drop(name="drop"):
    return layers.Dropout(0.1, name=name)


def linear(name="linear"):
    return layers.Activation("linear", name=name)


DATA, UNIT, SIGNED = ["data"], ["unit"], ["signed unit"]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((conv(), norm(), relu()), {"relu": DATA}),
        ((conv(), relu()), {"relu": DATA}),
        ((conv(), norm()), {"norm": DATA}),
        ((conv(),), {"conv": DATA}),
        ((conv(activation="relu"), norm()), {"conv": DATA, "norm": DATA}),
        ((conv(activation="relu"), relu()), {"conv": DATA, "relu": DATA}),
        ((norm(), relu()), {"relu": DATA}),
        ((relu(), norm("after")), {"relu": DATA, "after": DATA}),
        ((conv(), layers.MaxPooling2D(name="pool"), relu()), {"pool": DATA, "relu": DATA}),
        ((conv(), norm(), relu(), layers.GlobalMaxPooling2D(name="pool")), {"pool": DATA}),
        ((conv(), layers.AveragePooling2D(2, name="pool"), relu()), {"conv": DATA, "relu": DATA}),
        ((conv(activation="tanh"), layers.MaxPooling2D(name="pool")), {"conv": SIGNED}),
        ((layers.MaxPooling2D(name="pool"), conv()), {"conv": DATA}),
        (
            (layers.MaxPooling2D(name="pool"), layers.MaxPooling2D(name="again"), conv()),
            {"conv": DATA},
        ),
        ((conv(), layers.Flatten(name="flat"), layers.Dropout(0.1, name="drop")), {"conv": DATA}),
        ((conv(), drop(), norm(), drop("drop_2"), relu()), {"relu": DATA}),
        ((conv(), drop()), {"conv": DATA}),
        ((conv(), linear(), drop(), relu()), {"relu": DATA}),
        ((conv(), linear()), {"conv": DATA}),
        ((conv(), drop(), layers.MaxPooling2D(name="pool"), relu()), {"pool": DATA, "relu": DATA}),
        ((conv(), layers.Masking(name="mask"), relu()), {"mask": DATA, "relu": DATA}),
        ((layers.Masking(name="mask"), norm(), relu()), {"relu": DATA}),
        ((conv(activation="softmax"),), {"conv": UNIT}),
        ((conv(), layers.Softmax(name="softmax")), {"softmax": UNIT}),
        ((conv(), layers.Activation("tanh", name="tanh")), {"tanh": SIGNED}),
        ((conv(), layers.Activation("hard_sigmoid", name="gate")), {"gate": UNIT}),
        ((conv(activation="sigmoid"), relu()), {"conv": UNIT, "relu": DATA}),
    ],
)
def test_a_chain(parts, expected):
    fresh = [type(part).from_config(part.get_config()) for part in parts]
    assert placed(chain(*fresh)) == expected
    fresh = [type(part).from_config(part.get_config()) for part in parts]
    assert placed(keras.Sequential([keras.Input((8, 8, 3)), *fresh])) == expected


def test_an_output_that_is_read_twice_or_leaves_the_model_does_not_fuse():
    inputs = keras.Input((8, 8, 4))
    first = conv("first")(inputs)
    second = norm("second")(first)
    model = keras.Model(inputs, [relu()(second), layers.Add(name="sum")([first, second])])
    assert placed(model) == {"first": DATA, "second": DATA, "relu": DATA, "sum": DATA}
    tensor = conv("last")(inputs)
    assert placed(keras.Model(inputs, [tensor, relu()(tensor)])) == {"last": DATA, "relu": DATA}


def test_what_is_read_twice_or_leaves_the_model_behind_dropout_does_not_fuse():
    inputs = keras.Input((8, 8, 4))
    dropped = drop()(conv()(inputs))
    model = keras.Model(inputs, [relu()(dropped), norm()(dropped)])
    assert placed(model) == {"conv": DATA, "relu": DATA, "norm": DATA}
    dropped = drop()(conv()(inputs))
    assert placed(keras.Model(inputs, [dropped, relu()(dropped)])) == {"conv": DATA, "relu": DATA}


def test_a_residual_block_quantizes_both_summands_and_one_result():
    inputs = keras.Input((8, 8, 4))
    branch = norm("norm_b")(conv("conv_b")(relu("relu_a")(norm("norm_a")(conv("conv_a")(inputs)))))
    model = keras.Model(inputs, relu("relu_sum")(layers.Add(name="sum")([branch, inputs])))
    assert placed(model) == {"relu_a": DATA, "norm_b": DATA, "relu_sum": DATA}


def test_functions_between_layers():
    inputs = keras.Input((8, 8, 4))
    tensor = ops.relu(conv()(inputs) + inputs)
    tensor = ops.reshape(ops.multiply(tensor, tensor), (-1, 256))
    model = keras.Model(inputs, ops.softmax(tensor))
    kinds = sorted(placed(model).values())
    assert kinds == [["data"], ["data"], ["data"], ["unit"]]  # conv, relu, product, softmax


def test_a_shared_layer_fuses_only_if_it_does_so_everywhere():
    shared = conv("shared")
    inputs = keras.Input((8, 8, 4))
    once = shared(inputs)
    model = keras.Model(inputs, [relu("relu_1")(once), relu("relu_2")(shared(inputs))])
    assert placed(model) == {"relu_1": DATA, "relu_2": DATA}
    model = keras.Model(inputs, [relu("relu_3")(shared(inputs)), norm()(relu("r")(shared(inputs)))])
    assert "shared" not in placed(model)
    model = keras.Model(inputs, [relu("relu_4")(shared(inputs)), shared(inputs)])
    assert placed(model) == {"shared": DATA, "relu_4": DATA}


def test_several_outputs_integers_and_nested_models():
    inputs = keras.Input((5, 3))
    lstm = layers.LSTM(2, return_state=True, name="lstm")
    assert placed(keras.Model(inputs, lstm(inputs))) == {"lstm": ["data"] * 3}
    assert placed(keras.Model(inputs, ops.argmax(inputs, axis=-1))) == {}
    inner = keras.Sequential([keras.Input((5, 3)), layers.Dense(2)], name="inner")
    outer = keras.Model(inputs, layers.Dense(2, name="outer")(inner(inputs)))
    assert placed(outer) == {"outer": DATA}
    assert list(placed(inner).values()) == [DATA]


def test_what_carries_a_grid_is_quantized_where_its_input_is_no_float():
    inputs = keras.Input((8, 8, 3), dtype="uint8", name="input")
    flipped = layers.RandomFlip(name="flip")(inputs)
    model = keras.Model(inputs, conv()(layers.MaxPooling2D(name="pool")(flipped)))
    assert flipped.dtype == "float32"
    assert placed(model) == {"flip": DATA, "conv": DATA}


def lookup(mode="multi_hot"):
    return layers.IntegerLookup(vocabulary=[3, 5, 9], output_mode=mode)


@pytest.mark.tensorflow
@pytest.mark.parametrize("mode", ["multi_hot", "count", "tf_idf"])
def test_what_is_computed_as_integers_is_not_quantized_though_it_is_declared_as_floats(mode):
    """Keras declares counts, and what merging layers make of integers, as floats."""
    inputs = keras.Input((4,), dtype="int64", name="ids")
    weights = {"idf_weights": [0.1, 0.2, 0.3]} if mode == "tf_idf" else {}
    table = layers.IntegerLookup(vocabulary=[3, 5, 9], output_mode=mode, name="lookup", **weights)
    counts = table(inputs)
    assert counts.dtype == "float32"
    both = layers.Concatenate(name="both")([counts, more := keras.Input((4,), dtype="int64")])
    model = keras.Model([inputs, more], [both, counts * 0.5])
    floats = {"lookup": DATA, "both": DATA} if mode == "tf_idf" else {}
    assert placed(model) == floats | {model.output_names[1]: DATA}


@pytest.mark.tensorflow
def test_integers_declared_as_floats_are_followed_through_functions_and_nested_models():
    inputs = keras.Input((4,), dtype="int64")
    inner = keras.Model(inputs, lookup()(inputs), name="inner")
    first, second = keras.Input((4,), dtype="int64"), keras.Input((4,), dtype="int64")
    total = layers.ReLU(name="relu")(inner(first) + inner(second))
    pooled = layers.GlobalAveragePooling1D(name="pool")(layers.Reshape((2, 2))(total))
    model = keras.Model([first, second], [total, layers.Dense(2, name="dense")(total), pooled])
    assert placed(model) == {"dense": DATA, "pool": DATA}
    inner = keras.Sequential([keras.Input((4,)), layers.ReLU(name="deep")], name="floats")
    outside = keras.Model([first, second], inner(total) * 0.5)
    assert placed(inner) == {"deep": DATA}
    assert list(placed(outside).values()) == [DATA]


def test_what_makes_floats_of_integers_is_quantized():
    image = keras.Input((8, 8, 3), dtype="uint8")
    model = keras.Model(image, [layers.Rescaling(0.1, name="scaled")(image), image / 255])
    assert list(placed(model).values()) == [DATA, DATA]
    tokens = [keras.Input((4,), dtype="int32") for _ in range(2)]
    both = layers.Concatenate(name="both")(tokens)
    assert placed(keras.Model(tokens, [both, layers.Dense(2, name="dense")(both)])) == {
        "dense": DATA
    }


def test_a_product_with_a_number_is_dense():
    inputs = keras.Input((4,))
    product = inputs * 2.0
    assert list(placed(keras.Model(inputs, product)).values()) == [DATA]


def exact(model):
    """`{input name: names of what needs its exact values}`."""
    found = exact_inputs(model)
    return {t.name: [op.name for op in found[id(t)]] for t in model.inputs if id(t) in found}


def test_branches_that_only_a_normalization_reads_together_keep_their_own_grids():
    inputs = keras.Input((8, 8, 4))
    both = layers.Concatenate(name="both")([conv("one")(inputs), conv("two")(inputs)])
    model = keras.Model(inputs, norm()(both))
    assert placed(model) == {"one": DATA, "two": DATA, "norm": DATA}
    assert placed(keras.Model(inputs, relu()(both))) == {
        **{"one": DATA, "two": DATA, "both": DATA, "relu": DATA}
    }


def test_inputs_that_are_names_or_masks_are_left_as_they_are():
    ids = keras.Input((4,), name="ids")
    flat = layers.Flatten(name="flat")(drop()(ids))
    assert exact(keras.Model(ids, layers.Embedding(9, 2, name="table")(flat))) == {"ids": ["table"]}
    number = ops.cast(ids, "int32")
    outputs = [layers.Embedding(9, 2)(number), layers.Dense(2)(ids)]
    assert list(exact(keras.Model(ids, outputs))) == ["ids"]
    steps = keras.Input((4, 3), name="steps")
    masked = layers.Dense(2)(layers.Masking(name="mask")(steps))
    assert exact(keras.Model(steps, masked)) == {"steps": ["mask"]}


def test_names_are_left_as_they_are_behind_functions_too():
    ids = keras.Input((4,), name="ids")
    model = keras.Model(ids, layers.Embedding(9, 2, name="table")(ops.clip(ids - 1.0, 0, 8)))
    assert exact(model) == {"ids": ["table"]}
    assert placed(model) == {"table": DATA}


def ids_into(*parts, shape=(6,)):
    return chain(*parts, shape=shape)


READING = {
    "inside a layer": (lambda: ids_into(Words(name="reader")), True),
    "behind functions": (
        lambda: ids_into(lambda x: ops.clip(x - 1, 0, 8), Words(name="reader")),
        True,
    ),
    "joined with others": (
        lambda: ids_into(lambda x: ops.concatenate([x, x + 1], 1), Words(name="reader")),
        True,
    ),
    "joined by a layer": (
        lambda: ids_into(lambda x: layers.Concatenate()([x, x]), Words(name="reader")),
        True,
    ),
    "in a sum": (lambda: ids_into(lambda x: x * (x + 1) + x, Words(name="reader")), True),
    "where there is a choice": (
        lambda: ids_into(lambda x: ops.where(x * x > 4, x, 0 * x), layers.Embedding(9, 2)),
        True,
    ),
    "moved by a layer": (lambda: ids_into(layers.Rescaling(1, 1), Words(name="reader")), True),
    "joined for a dense layer": (
        lambda: ids_into(lambda x: ops.concatenate([x, x], 1), layers.Dense(2, name="reader")),
        False,
    ),
    "behind a reshape": (lambda: ids_into(layers.Reshape((2, 3)), Words(name="reader")), True),
    "in a nested model": (
        lambda: ids_into(
            keras.Sequential([keras.Input((6,)), Words(name="reader")], name="nested")
        ),
        True,
    ),
    "in a subclassed model": (lambda: ids_into(WordsModel(name="reader")), True),
    "in a model in a layer": (
        lambda: ids_into(
            layers.TimeDistributed(keras.Sequential([keras.Input((2,)), Words()]), name="reader"),
            shape=(3, 2),
        ),
        True,
    ),
    "at each step": (
        lambda: ids_into(
            layers.TimeDistributed(layers.Embedding(9, 2), name="reader"), shape=(3, 2)
        ),
        True,
    ),
    "at each of any number of steps": (
        lambda: ids_into(
            layers.TimeDistributed(layers.Embedding(9, 2), name="reader"), shape=(None, 2)
        ),
        True,
    ),
    "both ways": (
        lambda: ids_into(
            layers.Bidirectional(layers.RNN(WordsCell()), name="reader"), shape=(6, 1)
        ),
        True,
    ),
    "where state moves": (lambda: ids_into(Counting(name="reader")), True),
    "in a function": (lambda: ids_into(Mapped(name="reader")), True),
    "of rank 4": (lambda: ids_into(Words(name="reader"), shape=(2, 3, 4)), True),
    "as one-hot numbers": (lambda: ids_into(lambda x: ops.one_hot(x, 9), layers.Dense(2)), True),
    "as places": (
        lambda: ids_into(
            lambda x: ops.take_along_axis(ops.ones((1, 9)), x, axis=1), layers.Dense(2)
        ),
        True,
    ),
    "not at all": (lambda: ids_into(Places(name="reader"), shape=(6, 3)), False),
    "not at all, of rank 4": (lambda: ids_into(Places(name="reader"), shape=(2, 6, 3)), False),
    "by a dense layer": (lambda: ids_into(layers.Dense(2, name="reader")), False),
}


@pytest.mark.parametrize("how", READING)
def test_an_input_that_reaches_a_lookup_in_a_layer_is_left_as_it_is(how):
    """Wherever in it, not where the lookup reads something else; finding out leaves no trace."""
    make, reached = READING[how]
    model = make()
    variables = [np.array(ops.convert_to_numpy(variable)) for variable in model.variables]
    nodes = [len(layer._inbound_nodes) for layer in model._flatten_layers()]
    found = exact(model)
    assert list(found) == (["input"] if reached else [])
    if "reader" in [layer.name for layer in model.layers]:
        assert found == ({"input": ["reader"]} if reached else {})
    for variable, before in zip(model.variables, variables, strict=True):
        same(variable.value, before)
    assert [len(layer._inbound_nodes) for layer in model._flatten_layers()] == nodes


def test_one_of_two_inputs_of_a_layer_may_reach_its_lookup():
    ids, weights = keras.Input((4,), name="ids"), keras.Input((4,), name="weights")
    for outputs in (
        Deeper(name="deeper")(ids, weights),
        Deeper(name="deeper")(ids, weights=weights),
    ):
        assert exact(keras.Model([ids, weights], outputs)) == {"ids": ["deeper"]}


def test_what_only_a_lookup_in_a_layer_reads_is_not_quantized():
    """Ids that a layer makes; features that go beside the table of places are."""
    made = chain(Shifted(name="shifted"), Words(name="words"), shape=(6,))
    assert placed(made) == {"words": DATA}
    a, b = keras.Input((3,)), keras.Input((3,))
    joined = layers.Concatenate(name="joined")([a, Shifted(name="shifted")(b)])
    assert placed(keras.Model([a, b], Words(name="words")(joined))) == {"words": DATA}
    dense = layers.Dense(4, name="dense")
    assert placed(chain(dense, Places(name="places"), shape=(6, 3))) == {
        "dense": DATA,
        "places": DATA,
    }


def custom(model):
    found = inputs_of_custom_layers(model)
    return [tensor.name for tensor in model.inputs if id(tensor) in found]


@keras.saving.register_keras_serializable("test_placement")
class SameDense(layers.Dense):
    """What its parent is."""


@pytest.mark.parametrize(
    ("parts", "shape", "expected"),
    [
        ((Rows(),), (6,), True),
        ((Rows(),), (2, 3), True),
        ((Rows(),), (2, 3, 4), False),
        ((layers.Reshape((2, 3)), Rows()), (6,), True),
        ((lambda x: x + 1.0, Rows()), (6,), True),
        ((keras.Sequential([keras.Input((6,)), Rows()]),), (6,), True),
        ((layers.Lambda(lambda x: ops.one_hot(ops.cast(x, "int32"), 9)),), (6,), True),
        ((Shifted(), layers.Embedding(9, 2)), (6,), True),
        ((layers.Dense(2),), (6,), False),
        ((SameDense(2),), (6,), False),
        ((lambda x: Rows()(x) + layers.Dense(4)(x)[:, None],), (6,), False),
    ],
)
def test_inputs_that_only_layers_outside_keras_read(parts, shape, expected):
    assert custom(chain(*parts, shape=shape)) == (["input"] if expected else [])


def test_an_embedding_keeps_its_grid_behind_max_pooling():
    ids = keras.Input((4,), dtype="int32")
    table = layers.Embedding(9, 2, name="table")(ids)
    model = keras.Model(ids, layers.GlobalMaxPooling1D(name="pool")(table))
    assert placed(model) == {"table": DATA}


def test_an_input_that_only_normalization_reads_is_left_as_it_is():
    inputs = keras.Input((8, 8, 4), name="in")
    found = exact(keras.Model(inputs, [norm("a")(inputs), norm("b")(inputs)]))
    assert sorted(found["in"]) == ["a", "b"]
    assert exact(keras.Model(inputs, [norm("a")(inputs), conv()(inputs)])) == {}
    assert exact(keras.Model(inputs, conv()(inputs))) == {}
    assert exact(keras.Model(inputs, inputs * 1.0)) == {}


def test_inputs_are_followed_into_nested_models():
    first, second = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    inner = keras.Model(
        [first, second], [layers.Dense(2)(first), layers.Embedding(9, 2, name="table")(second)]
    )
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    assert exact(keras.Model([left, right], inner([left, right]))) == {"right": ["table"]}
    assert exact(keras.Model([left, right], inner([right, left]))) == {"left": ["table"]}


def test_a_subclass_counts_as_the_layer_it_is_derived_from():
    class OwnConv(layers.Conv2D):
        pass

    class OwnLayer(layers.Layer):
        def call(self, inputs):
            return inputs * 2.0

    model = chain(OwnConv(4, 3, name="own"), relu(), OwnLayer(name="other"))
    assert placed(model) == {"relu": DATA, "other": DATA}


ARGUMENTS = {
    "GaussianNoise": (1.0,),
    "RandomCrop": (4, 4),
    "RandomPosterization": (2,),
    "RandomTranslation": (0.5, 0.5),
}
NEEDS_ONE = re.compile(".*Dropout.*|Random(Brightness|Color|Contrast|Hue|Rot|Sat|Sharp|Zoom).*")
RANDOM = {name for name in dir(layers) if name.startswith("Random")}
IDENTITIES = {name for name, row in ROWS.items() if row.behaviour is Behaviour.IDENTITY}


# Keras asks JAX for 64-bit numbers in MixUp.
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype:UserWarning")
@pytest.mark.parametrize("name", sorted((IDENTITIES | RANDOM) - {"InputLayer"}))
def test_identities_leave_their_input_as_it_is_in_inference(name, random):
    """Every layer of Keras that only augments is one of them."""
    one = (0.5,) if NEEDS_ONE.match(name) else ()
    layer = getattr(layers, name)(*ARGUMENTS.get(name, one))
    rank = int(name[-2]) if name.startswith("Spatial") else 2
    x = random.uniform(0, 1, (2, *[6] * rank, 3)).astype("float32")
    kwargs = {} if name in ("ActivityRegularization", "Identity") else {"training": False}
    same(layer(x, **kwargs), x)
    assert is_identity(layer)
    assert carries_grid(layer)
