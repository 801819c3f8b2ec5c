"""Batch normalization folded in float models: the same outputs, to rounding."""

import json

import keras
import numpy as np
import pytest
from keras import layers, ops
from layer_cases import Scale, floats

from keras_qwrap.models.batch_norm import fold_batch_norm

BatchNorm = layers.BatchNormalization


def to_numpy(tensor):
    return np.array(ops.convert_to_numpy(tensor))


def randomize(model, seed=5):
    """Random weights everywhere; gammas of both signs, statistics far from the initial ones."""
    random = np.random.default_rng(seed)
    for variable in model.weights:
        if "float" in variable.dtype:
            values = random.normal(size=variable.shape)
            values = np.abs(values) + 0.1 if "variance" in variable.path else values
            variable.assign(values.astype(variable.dtype))
    return model


def sequential(shape, *stack):
    return keras.Sequential([keras.Input(shape), *stack])


def names(model):
    return [layer.name for layer in model._flatten_layers() if "input" not in layer.name]


def check_same(model, folded, x, predict=False):
    expected, got = (each.predict(x, verbose=0) if predict else each(x) for each in (model, folded))
    for a, b in zip(keras.tree.flatten(expected), keras.tree.flatten(got), strict=True):
        a, b = to_numpy(a), to_numpy(b)
        assert a.std() > 1e-3
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * np.abs(a).max())


def norms(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, BatchNorm)]


EINSUMS = {
    "einsum": ("abc,cd->abd", (None, 4), None),
    "einsum ellipsis": ("...x,xy->...y", 4, "y"),
    "einsum heads": ("abc,cde->abde", (None, 2, 4), "de"),
}
ABSORBING = {
    "dense": (layers.Dense(4, use_bias=False), (5,)),
    "dense rank 3": (layers.Dense(4), (3, 5)),
    "conv 1d": (layers.Conv1D(4, 2, dilation_rate=2), (6, 3)),
    "conv 2d": (layers.Conv2D(4, 3, use_bias=False, padding="same", strides=2), (5, 5, 3)),
    "conv 3d": (layers.Conv3D(4, 2), (3, 3, 3, 2)),
    "conv groups": (layers.Conv2D(4, 2, groups=2), (4, 4, 6)),
    "depthwise 1d": (layers.DepthwiseConv1D(2, depth_multiplier=2, use_bias=False), (5, 2)),
    "depthwise 2d": (layers.DepthwiseConv2D(2, depth_multiplier=3), (4, 4, 2)),
    "separable 1d": (layers.SeparableConv1D(4, 2), (5, 3)),
    "separable 2d": (layers.SeparableConv2D(4, 2, use_bias=False, depth_multiplier=2), (4, 4, 3)),
    "transposed 1d": (layers.Conv1DTranspose(4, 2), (5, 3)),
    "transposed 2d": (layers.Conv2DTranspose(4, 3, strides=2, use_bias=False), (3, 3, 2)),
    "transposed 3d": (layers.Conv3DTranspose(3, 2), (2, 2, 2, 2)),
    **{
        name: (layers.EinsumDense(equation, shape, bias_axes=bias), (3, 5))
        for name, (equation, shape, bias) in EINSUMS.items()
    },
}


def fresh(layer):
    return type(layer).from_config(layer.get_config())


@pytest.mark.parametrize("name", ABSORBING)
def test_layer_absorbs_the_normalization(name):
    layer, shape = ABSORBING[name]
    model = randomize(sequential(shape, fresh(layer), BatchNorm(), layers.ReLU()))
    folded = fold_batch_norm(model)
    assert norms(folded) == []
    assert len(folded.layers) == 2
    assert folded.layers[0].bias is not None
    check_same(model, folded, floats(6, *shape))


@pytest.mark.parametrize("name", ["conv 1d", "conv 2d", "depthwise 2d", "transposed 2d"])
def test_channels_first(name):
    """Not computed, since TensorFlow has no such convolutions on CPUs: the weights are compared."""
    layer, shape = ABSORBING[name]
    config = fresh(layer).get_config()
    first = type(layer).from_config(config | {"data_format": "channels_first"})
    moved = (shape[-1], *shape[:-1])
    model = randomize(sequential(shape, fresh(layer), BatchNorm()))
    inputs = keras.Input(moved)
    other = keras.Model(inputs, BatchNorm(axis=1)(first(inputs)))
    other.set_weights(model.get_weights())
    expected, got = fold_batch_norm(model).get_weights(), fold_batch_norm(other).get_weights()
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_array_equal(a, b)


EINSUMS_OFF_THE_LAST_AXIS = {
    "new bias": (layers.EinsumDense("abc,cd->adb", (4, 3)), 1, True),
    "bias of the axis": (layers.EinsumDense("abc,cd->adb", (4, 3), bias_axes="d"), 1, True),
    "bias of both": (layers.EinsumDense("abc,cd->adb", (4, 3), bias_axes="db"), 1, True),
    "negative": (layers.EinsumDense("abc,cde->aebd", (2, 3, 4), bias_axes="ed"), -3, True),
    "bias elsewhere": (layers.EinsumDense("abc,cd->adb", (4, 3), bias_axes="b"), 1, False),
    "input axis": (layers.EinsumDense("abc,cd->adb", (4, 3)), 2, False),
    "ellipsis": (layers.EinsumDense("...x,xy->...y", 4), 1, False),
}


@pytest.mark.parametrize("name", EINSUMS_OFF_THE_LAST_AXIS)
def test_einsum_absorbs_along_axes_that_its_kernel_has(name):
    layer, axis, absorbed = EINSUMS_OFF_THE_LAST_AXIS[name]
    model = randomize(sequential((3, 5), fresh(layer), BatchNorm(axis=axis)))
    folded = fold_batch_norm(model)
    assert (norms(folded) == []) == absorbed
    check_same(model, folded, floats(6, 3, 5))


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_normalization_without_gamma_or_beta(scale, center):
    norm = BatchNorm(scale=scale, center=center, epsilon=0.3)
    model = randomize(sequential((5,), layers.Dense(4), norm))
    folded = fold_batch_norm(model)
    assert norms(folded) == []
    check_same(model, folded, floats(6, 5))


def residual():
    """Two inputs and outputs, a residual block, operator nodes, a concatenation."""
    image, side = keras.Input((6, 6, 3), name="image"), keras.Input((4,), name="side")
    x = layers.Conv2D(4, 3, padding="same", use_bias=False, name="conv1")(image)
    x = skip = layers.ReLU(name="relu1")(BatchNorm(name="norm1")(x))
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="conv2")(x)
    x = layers.ReLU(6.0, name="relu2")(BatchNorm(name="norm2")(x))
    x = layers.Conv2D(4, 1, use_bias=False, name="conv3")(x)
    x = layers.Add(name="add")([BatchNorm(name="norm3")(inputs=x), skip])
    pooled = layers.GlobalAveragePooling2D(name="pool")(x * 0.5)
    merged = layers.Concatenate(name="concat")(
        [pooled, BatchNorm(name="norm4")(layers.Dense(3, name="dense")(side))]
    )
    outputs = {"a": layers.Dense(2, name="head")(merged), "b": merged}
    return randomize(keras.Model([image, side], outputs, name="residual"))


def test_residual_blocks_and_several_inputs():
    model = residual()
    folded = fold_batch_norm(model)
    assert type(folded) is type(model)
    assert (folded.name, [t.name for t in folded.inputs]) == ("residual", ["image", "side"])
    assert set(names(folded)) == {name for name in names(model) if not name.startswith("norm")}
    check_same(model, folded, [floats(4, 6, 6, 3), floats(4, 4)], predict=True)


def test_the_given_model_is_left_as_it_is():
    model, x = residual(), [floats(4, 6, 6, 3), floats(4, 4)]
    model.compile("sgd", "mse")
    weights, config = model.get_weights(), json.dumps(model.get_config(), default=str)
    nodes = {layer.name: len(layer._inbound_nodes) for layer in model.layers}
    before = model.predict(x, verbose=0)
    folded = fold_batch_norm(model)
    randomize(folded, seed=9)
    assert nodes == {layer.name: len(layer._inbound_nodes) for layer in model.layers}
    assert json.dumps(model.get_config(), default=str) == config
    for a, b in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    after = model.predict(x, verbose=0)
    for key in before:
        np.testing.assert_array_equal(after[key], before[key])
    mine = {id(layer) for layer in model._flatten_layers()}
    assert not any(id(layer) in mine for layer in folded._flatten_layers())


def test_other_layers_keep_their_weights_exactly():
    model = residual()
    folded = fold_batch_norm(model)
    for a, b in zip(
        model.get_layer("head").get_weights(), folded.get_layer("head").get_weights(), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_nested_models_are_folded_inside_and_stay_shared():
    """An encoder used twice, in a model in a model; a convolution that ends a nested model is
    normalized outside, so that it stays."""
    encoder = keras.Sequential(
        [
            keras.Input((5, 5, 2)),
            layers.Conv2D(3, 2, name="conv"),
            BatchNorm(name="norm"),
            layers.ReLU(name="relu"),
        ],
        name="encoder",
    )
    inner = keras.Input((5, 5, 2))
    hidden = BatchNorm(name="middle")(layers.Conv2D(4, 1, name="before")(encoder(inner)))
    tower = keras.Model(inner, layers.Conv2D(2, 1, name="last")(hidden), name="tower")
    left, right = keras.Input((5, 5, 2)), keras.Input((5, 5, 2))
    joined = layers.Subtract(name="minus")([BatchNorm(name="outside")(tower(left)), tower(right)])
    model = randomize(keras.Model([left, right], [joined, encoder(right)]))
    folded = fold_batch_norm(model)
    assert [layer.name for layer in norms(folded)] == ["outside"]
    new = folded.get_layer("encoder")
    assert type(new) is keras.Sequential
    assert [layer.name for layer in new.layers] == ["conv", "relu"]
    assert folded.get_layer("tower").get_layer("encoder") is new
    assert set(names(folded)) == set(names(model)) - {"norm", "middle"}
    check_same(model, folded, [floats(4, 5, 5, 2), floats(4, 5, 5, 2, seed=1)])


def shared_convolution(x):
    conv = layers.Conv2D(3, 1)
    return BatchNorm()(conv(conv(x)))


def shared_normalization(x):
    norm = BatchNorm()
    return layers.Add()([norm(layers.Conv2D(3, 1)(x)), norm(layers.Conv2D(3, 1)(x))])


def shared_with_a_nested_model(x):
    conv = layers.Conv2D(3, 1)
    inputs = keras.Input((4, 4, 3))
    return BatchNorm()(conv(keras.Model(inputs, layers.ReLU()(conv(inputs)))(x)))


def used_twice(x):
    y = layers.Conv2D(3, 1)(x)
    return layers.Add()([BatchNorm()(y), y])


def output_as_well(x):
    y = layers.Conv2D(3, 1)(x)
    return [BatchNorm()(y), y]


def after(layer):
    return lambda x: BatchNorm()(layer()(x))


def nested_in_training(x):
    inputs = keras.Input((4, 4, 3))
    return keras.Model(inputs, BatchNorm()(layers.Conv2D(3, 1)(inputs)))(x, training=True)


@keras.saving.register_keras_serializable("test_folding")
class Squared(layers.Conv2D):
    """A subclass that computes something else."""

    def call(self, inputs):
        return super().call(inputs) ** 2


STAYING = {
    "shared convolution": shared_convolution,
    "shared normalization": shared_normalization,
    "shared with a nested model": shared_with_a_nested_model,
    "used twice": used_twice,
    "output as well": output_as_well,
    "activation inside": after(lambda: layers.Conv2D(3, 1, activation="relu")),
    "activation between": lambda x: BatchNorm()(layers.ReLU()(layers.Conv2D(3, 1)(x))),
    "constraint": after(lambda: layers.Conv2D(3, 1, kernel_constraint="non_neg")),
    "LoRA": after(lambda: layers.Dense(3, lora_rank=1)),
    "integers": after(lambda: layers.Dense(3, dtype="int8_from_float32")),
    "activity": after(lambda: layers.Conv2D(3, 1, activity_regularizer="l2")),
    "activity after": lambda x: BatchNorm(activity_regularizer="l2")(layers.Conv2D(3, 1)(x)),
    "another axis": lambda x: BatchNorm(axis=1)(layers.Conv2D(3, 1)(x)),
    "subclass": after(lambda: Squared(3, 1)),
    "another layer": after(Scale),
    "input": lambda x: BatchNorm()(x),
    "no linear layer": lambda x: BatchNorm()(x * 2.0),
    "another dtype": lambda x: BatchNorm(dtype="mixed_float16")(layers.Conv2D(3, 1)(x)),
}


@pytest.mark.parametrize("name", STAYING)
def test_normalization_stays(name):
    inputs = keras.Input((4, 4, 3))
    model = randomize(keras.Model(inputs, STAYING[name](inputs)))
    folded = fold_batch_norm(model)
    assert names(folded) == names(model)
    for a, b in zip(model.get_weights(), folded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    check_same(model, folded, floats(4, 4, 4, 3))


@pytest.mark.parametrize("call", [{"training": True}, {"training": False}, {}])
def test_normalization_called_in_training_stays(call):
    """Batch statistics cannot be folded; beside it another one is."""
    inputs = keras.Input((4, 4, 3))
    x = BatchNorm(name="other")(layers.Conv2D(3, 1, name="first", use_bias=False)(inputs))
    x = layers.Conv2D(3, 1, name="second", use_bias=False)(x)
    model = randomize(keras.Model(inputs, BatchNorm(name="norm")(x, **call)))
    folded = fold_batch_norm(model)
    assert [n.name for n in norms(folded)] == (["norm"] if call.get("training") else [])
    assert folded.get_layer("first").use_bias
    assert folded.get_layer("second").use_bias != bool(call.get("training"))
    x = floats(4, 4, 4, 3)
    np.testing.assert_allclose(to_numpy(folded(x)), to_numpy(model(x)), rtol=1e-4, atol=1e-4)


def test_nested_model_called_in_training_keeps_its_normalizations():
    inputs = keras.Input((4, 4, 3))
    model = randomize(keras.Model(inputs, nested_in_training(inputs)))
    folded = fold_batch_norm(model)
    assert len(norms(folded)) == 1
    x = floats(4, 4, 4, 3)
    np.testing.assert_allclose(to_numpy(folded(x)), to_numpy(model(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("weight", "statistics"),
    [(1e3, {"gamma": 3e38}), (0.0, {"beta": -3e38, "moving_mean": 3e38})],
    ids=["kernel", "bias"],
)
def test_what_is_not_finite_is_not_folded(weight, statistics):
    model = sequential((5,), layers.Dense(4), BatchNorm())
    model.layers[0].kernel.assign(np.full((5, 4), weight))
    for name, value in statistics.items():
        getattr(model.layers[1], name).assign(np.full(4, value))
    assert len(norms(fold_batch_norm(model))) == 1


def test_one_normalization_for_each_layer():
    model = randomize(sequential((5,), layers.Dense(4), BatchNorm(name="a"), BatchNorm(name="b")))
    folded = fold_batch_norm(model)
    assert [norm.name for norm in norms(folded)] == ["b"]
    check_same(model, folded, floats(6, 5))
    assert norms(fold_batch_norm(folded)) == []
    check_same(model, fold_batch_norm(folded), floats(6, 5))


def test_half_precision_folds_in_float32_variables():
    policy = keras.DTypePolicy("mixed_bfloat16")
    model = sequential((5,), layers.Dense(4, dtype=policy), BatchNorm(dtype=policy))
    folded = fold_batch_norm(randomize(model))
    assert norms(folded) == []
    assert folded.layers[0].kernel.dtype == "float32"
    x = floats(6, 5)
    a, b = (to_numpy(ops.cast(m(x), "float32")) for m in (model, folded))
    np.testing.assert_allclose(b, a, rtol=0.05, atol=0.05 * np.abs(a).max())


def test_masks_and_frozen_layers_are_kept():
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(5, 4, mask_zero=True)(tokens)
    x = BatchNorm(trainable=False)(layers.Dense(4, name="dense", trainable=False)(x))
    model = randomize(keras.Model(tokens, layers.SimpleRNN(3)(x)))
    folded = fold_batch_norm(model)
    assert norms(folded) == []
    check_same(model, folded, np.array([[1, 2, 0, 0, 0, 0], [3, 3, 4, 1, 0, 0]]))
    assert not folded.get_layer("dense").trainable


def test_compiled_model_trains_after_folding():
    model = randomize(sequential((5,), layers.Dense(4), BatchNorm(), layers.Dense(2)))
    model.compile(keras.optimizers.SGD(0.01), "mse")
    folded = fold_batch_norm(model)
    before = folded.get_weights()
    folded.fit(floats(8, 5), floats(8, 2), verbose=0)
    assert not np.array_equal(before[0], folded.get_weights()[0])


def test_folded_model_reloads(tmp_path):
    model, x = residual(), [floats(4, 6, 6, 3), floats(4, 4)]
    folded = fold_batch_norm(model)
    folded.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")
    expected, got = folded.predict(x, verbose=0), reloaded.predict(x, verbose=0)
    for key in expected:
        np.testing.assert_array_equal(got[key], expected[key])


def test_what_is_no_built_graph_is_refused():
    with pytest.raises(TypeError, match="expected a Keras model"):
        fold_batch_norm(layers.Dense(2))
    with pytest.raises(ValueError, match="a built model"):
        fold_batch_norm(keras.Sequential([layers.Dense(2), BatchNorm()]))
