"""Saving, loading and copying whole models: no bit changes, in any format."""

import copy
import json
import pickle

import keras
import numpy as np
import pytest
from keras import ops

import keras_qwrap as qi

SHAPE = (4, 4, 2)
X = np.random.default_rng(0).normal(size=(8, *SHAPE)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 2)).astype("float32")
M = qi.QuantizationMethod


def ste(method=M.SYMMETRIC, bits=8, params=None, **options):
    config = qi.TrainableQuantizerWeightsConfig(method, bits, params or {}, **options)
    uniform = method is M.UNIFORM
    return (qi.STEUniformWeightQATQuantizer if uniform else qi.STEWeightQATQuantizer)(config)


def ste_output(threshold):
    params = {"threshold": threshold, "is_signed": True}
    return qi.STEActivationQATQuantizer(
        qi.TrainableQuantizerActivationConfig(M.POWER_OF_TWO, 8, params)
    )


def wrap(layer, weights, output=None, **options):
    return qi.KerasQuantizationWrapper(layer, weights, output, **options)


def conv():
    return wrap(keras.layers.Conv2D(3, 2, name="conv"), {"kernel": ste(bits=4)}, ste_output(4.0))


def dense():
    return wrap(keras.layers.Dense(2, name="dense"), {"kernel": ste(M.UNIFORM, 3)})


def functional():
    inputs = keras.Input(SHAPE)
    x = qi.KerasActivationQuantizationHolder(ste_output(4.0))(inputs)
    x = keras.layers.BatchNormalization()(conv()(x))
    return keras.Model(inputs, dense()(keras.layers.Flatten()(x)))


def sequential():
    weights = {
        "cell/kernel": ste(M.UNIFORM, 8, {"range_min": -0.7, "range_max": 0.9}, **PER_TENSOR),
        "cell/recurrent_kernel": ste(M.POWER_OF_TWO, 4),
    }
    lstm = wrap(keras.layers.LSTM(3, name="lstm"), weights, ste_output(1.0))
    return keras.Sequential([keras.Input(SHAPE), keras.layers.Reshape((4, 8)), lstm, dense()])


PER_TENSOR = {"weights_per_channel_threshold": False}


def nested():
    inner = keras.Sequential([keras.Input(SHAPE), conv(), keras.layers.Flatten()], name="inner")
    inputs = keras.Input(SHAPE)
    return keras.Model(inputs, dense()(inner(inputs)))


@keras.saving.register_keras_serializable("test_saving")
class Subclassed(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.conv, self.dense, self.flatten = conv(), dense(), keras.layers.Flatten()

    def call(self, inputs):
        return self.dense(self.flatten(self.conv(inputs)))


def float_model():
    layers = [
        keras.layers.Flatten(),
        keras.layers.Dense(3, activation="relu"),
        keras.layers.Dense(2),
    ]
    return keras.Sequential([keras.Input(SHAPE), *layers])


@keras.saving.register_keras_serializable("test_saving")
class Net(keras.Model):
    """A model without a graph."""

    def __init__(self, **options):
        super().__init__(**options)
        self.first = keras.layers.Dense(3, activation="relu")
        self.second, self.flatten = keras.layers.Dense(2), keras.layers.Flatten()

    def call(self, inputs):
        return self.second(self.flatten(self.first(inputs)))


def without_graph():
    model = Net()
    model(X)
    return model


def with_ranges(make):
    """A maker of the model that `make` gives, quantized by data and trained for a little."""

    def maker(data):
        keras.utils.set_random_seed(0)
        model = qi.quantize_model(make(), "w8a8", data, verbose=0)
        train(model)
        return model

    return maker


STATEFUL_MAKERS = {"recipe": with_ranges(float_model), "without graph": with_ranges(without_graph)}

MAKERS = {
    "functional": functional,
    "sequential": sequential,
    "nested": nested,
    "subclassed": Subclassed,
}


JIT = keras.backend.backend() == "jax"
"""Compiling pays on JAX only, which has no other graphs."""


def train(model):
    model.compile(keras.optimizers.Adam(0.01), keras.losses.MeanSquaredError(), jit_compile=JIT)
    model.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0)


@pytest.fixture(scope="module")
def trained():
    keras.utils.set_random_seed(0)
    models = {name: make() for name, make in MAKERS.items()}
    for model in models.values():
        train(model)
    return models


@pytest.fixture(scope="module")
def models(trained):
    """Trained and converted models by name; a converted one only where there is a graph."""
    converted = {
        f"converted {name}": qi.convert_to_inferable(model)
        for name, model in trained.items()
        if name != "subclassed"
    }
    stateful = {name: make(X) for name, make in STATEFUL_MAKERS.items()}
    final = {f"converted {name}": qi.convert_to_inferable(m) for name, m in stateful.items()}
    return trained | converted | stateful | final | {"a user's": model_with(RegisteredScaled)}


GRAPHS = [f"{prefix}{name}" for name in list(MAKERS)[:3] for prefix in ("", "converted ")]
ALL = [*GRAPHS, "subclassed"]
STATEFUL = [f"{prefix}{name}" for name in STATEFUL_MAKERS for prefix in ("", "converted ")]
STATEFUL += ["a user's"]


def called(model):
    return ops.convert_to_numpy(model(X))


def same_outputs(model, copied, graph=False):
    """The same bits, and not just the same zeros; `graph` also compares the compiled outputs."""
    expected = called(model)
    assert len(np.unique(expected)) > 4
    assert np.array_equal(called(copied), expected)
    if graph:
        copied.compile(jit_compile=model.jit_compile)
        assert np.array_equal(copied.predict(X, verbose=0), model.predict(X, verbose=0))


def descriptions(model):
    """Of each wrapper and holder in a model: its config as JSON, and whether it is converted."""
    if isinstance(model, keras.Model):
        return [text for layer in model.layers for text in descriptions(layer)]
    if isinstance(model, qi.KerasQuantizationWrapper):
        return [(json.dumps(model.get_config()), model.converted)]
    is_holder = isinstance(model, qi.KerasActivationQuantizationHolder)
    return [(json.dumps(model.get_config()), None)] if is_holder else []


def reload(model, path, **options):
    model.save(path)
    return qi.keras_load_quantized_model(path, compile=False, **options)


def built(model):
    if not model.built:
        model(X)
    return model


def by_weights_file(model, folder):
    model.save_weights(folder / "model.weights.h5")
    fresh = built(type(model).from_config(model.get_config()))
    fresh.load_weights(folder / "model.weights.h5")
    return fresh


def with_weights_of(model, fresh):
    assert not np.array_equal(called(fresh), called(model))
    fresh.set_weights(model.get_weights())
    return fresh


COPIES = {
    ".keras": lambda model, folder: reload(model, folder / "model.keras"),
    ".weights.h5": by_weights_file,
    "to_json": lambda model, folder: with_weights_of(
        model, built(keras.models.model_from_json(model.to_json()))
    ),
    "clone_model": lambda model, folder: with_weights_of(
        model, built(keras.models.clone_model(model))
    ),
    "from_config": lambda model, folder: with_weights_of(
        model, built(type(model).from_config(model.get_config()))
    ),
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ALL)
def test_a_copy_gives_the_same_outputs(name, how, models, tmp_path):
    model = models[name]
    before = [ops.convert_to_numpy(v.value).copy() for v in model.variables]
    copied = COPIES[how](model, tmp_path)
    assert copied is not model
    same_outputs(model, copied, graph=how == ".keras")
    assert descriptions(copied) == descriptions(model) != []
    for variable in copied.variables:
        variable.assign(np.zeros(variable.shape, variable.dtype))
    for variable, value in zip(model.variables, before, strict=True):
        assert np.array_equal(ops.convert_to_numpy(variable.value), value), "a variable is shared"


@pytest.mark.parametrize("name", GRAPHS)
def test_h5_gives_the_same_outputs(name, models, tmp_path):
    model = models[name]
    loaded = reload(copy.deepcopy(model), tmp_path / "model.h5")
    same_outputs(model, loaded, graph=True)
    assert descriptions(loaded) == descriptions(model)


def test_h5_does_not_hold_a_subclassed_model(models, tmp_path):
    """Plain Keras cannot rebuild one either; the refusal must say so at least."""
    copy.deepcopy(models["subclassed"]).save(tmp_path / "model.h5")
    with pytest.raises(ValueError, match=r"names 'Subclassed'.*models without a graph"):
        qi.keras_load_quantized_model(tmp_path / "model.h5", compile=False)


@pytest.mark.parametrize("loss", ["mse", keras.losses.MeanSquaredError()])
def test_a_compiled_h5_is_as_good_as_a_plain_one(loss, tmp_path):
    """Keras restores no loss that is a string from `.h5`, and only a part of the optimizer."""

    def outcome(layer):
        model = keras.Sequential([keras.Input(SHAPE), keras.layers.Flatten(), layer])
        model.compile(keras.optimizers.Adam(), loss)
        model.fit(X, Y, verbose=0)
        slots = len(model.optimizer.variables)
        model.save(tmp_path / "model.h5")
        try:
            loaded = keras.models.load_model(tmp_path / "model.h5")
        except ValueError:
            return "refused"
        return type(loaded.optimizer), len(loaded.optimizer.variables) == slots

    assert outcome(dense()) == outcome(keras.layers.Dense(2))


def checkpoint(model, fresh, folder):
    import tensorflow as tf

    path = tf.train.Checkpoint(model=model).save(str(folder / "checkpoint"))
    status = tf.train.Checkpoint(model=fresh).restore(path)
    status.expect_partial().assert_existing_objects_matched()


def weights_file(model, fresh, folder):
    model.save_weights(folder / "model.weights.h5")
    fresh.load_weights(folder / "model.weights.h5")


STATES = {
    "checkpoint": pytest.param(checkpoint, marks=pytest.mark.tensorflow),
    ".weights.h5": weights_file,
    "set_weights": lambda model, fresh, folder: fresh.set_weights(model.get_weights()),
}


def states(model):
    """All variables but seeds, which Keras saves in no format."""
    return [variable for variable in model.variables if "seed_generator" not in variable.path]


@pytest.mark.parametrize("bring", STATES.values(), ids=STATES)
@pytest.mark.parametrize("name", [*ALL, *STATEFUL])
def test_all_state_is_brought_to_a_model_with_other_state(name, bring, models, tmp_path):
    """Every variable: a model remade from the config alone has many of the values already."""
    model = models[name]
    values = [ops.convert_to_numpy(v.value) for v in states(model)]
    fresh = built(type(model).from_config(model.get_config()))
    for variable, value in zip(states(fresh), values, strict=True):
        variable.assign(~value if value.dtype == bool else value + 1)
    bring(model, fresh, tmp_path)
    for variable, value in zip(states(fresh), values, strict=True):
        assert np.array_equal(ops.convert_to_numpy(variable.value), value), variable.path
    same_outputs(model, fresh)


@pytest.mark.slow
@pytest.mark.tensorflow
@pytest.mark.parametrize("maker", ["recipe", "without graph"])
def test_a_checkpoint_restores_ranges_that_other_data_gave(maker, tmp_path):
    """Into a model quantized anew: its config holds none of the ranges, its variables others."""
    model, other = STATEFUL_MAKERS[maker](X), STATEFUL_MAKERS[maker](X * 0.1)
    assert not np.array_equal(called(model), called(other))
    checkpoint(model, other, tmp_path)
    same_outputs(model, other, graph=True)
    converted, fresh = (
        qi.convert_to_inferable(model),
        qi.convert_to_inferable(STATEFUL_MAKERS[maker](X * 0.1)),
    )
    checkpoint(converted, fresh, tmp_path)
    same_outputs(model, fresh)
    # What checkpoints leave in a model is nothing that its copies lack.
    same_outputs(model, qi.convert_to_inferable(other))


@pytest.mark.tensorflow
def test_a_checkpoint_tells_alike_paths_apart(tmp_path):
    """Without the signs between their parts, `first/layer` and `first_layer` are the same."""

    class Alike(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = keras.layers.TimeDistributed(keras.layers.Dense(3))
            self.first_layer = keras.layers.Dense(2)

        def call(self, inputs):
            return self.first_layer(self.first(inputs))

    def quantized(data):
        model, quantizers = Alike(), {}
        model(data)
        for path in ("first/layer", "first_layer"):
            config = qi.TrainableQuantizerActivationConfig(M.UNIFORM, 8)
            quantizers[path] = qi.MovingAverageActivationQATQuantizer(config)
        new = qi.QuantizedModel(model, {}, quantizers)
        qi.calibrate(new, data, verbose=0)
        return new

    def ranges(model):
        return [holder.activation_holder_quantizer.range for holder in model.holders]

    data = X[:, 0]
    model, other = quantized(data), quantized(data * 0.1)
    assert all(a != b for a, b in zip(ranges(model), ranges(other), strict=True))
    checkpoint(model, other, tmp_path)
    assert ranges(other) == ranges(model)


@pytest.mark.tensorflow
@pytest.mark.parametrize("name", [*ALL, *STATEFUL])
def test_saved_model_serves_the_same_outputs(name, models, tmp_path):
    import tensorflow as tf

    expected = models[name].predict(X, verbose=0)
    models[name].export(tmp_path / "exported", verbose=False)
    assert np.array_equal(tf.saved_model.load(str(tmp_path / "exported")).serve(X), expected)
    tf.saved_model.save(models[name], str(tmp_path / "saved"))
    serve = tf.saved_model.load(str(tmp_path / "saved")).signatures["serving_default"]
    # Without a graph Keras serves the batches that the model was built with.
    (inputs,) = serve.structured_input_signature[1].values()
    rows = X[: inputs.shape[0]]
    (outputs,) = serve(tf.constant(rows)).values()
    assert np.array_equal(outputs, models[name].predict(rows, verbose=0))


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_training_resumes_where_it_stopped(name, tmp_path):
    """Optimizer state and losses of a reloaded `.keras` are those of the model that went on."""
    model = MAKERS[name]()
    train(model)
    model.save(tmp_path / "model.keras")
    resumed = qi.keras_load_quantized_model(tmp_path / "model.keras")
    for ours, theirs in zip(model.optimizer.variables, resumed.optimizer.variables, strict=True):
        assert np.array_equal(ops.convert_to_numpy(ours.value), ops.convert_to_numpy(theirs.value))
    losses = [
        m.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]
        for m in (model, resumed)
    ]
    assert losses[0] == losses[1]
    same_outputs(model, resumed)


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_two_wrapped_layers_of_one_inner_name(ending, tmp_path):
    layers = [
        wrap(keras.layers.Dense(3, name="d"), {"kernel": ste(bits=4)}, name=name) for name in "ab"
    ]
    model = keras.Sequential([keras.Input(SHAPE), keras.layers.Flatten(), *layers])
    same_outputs(model, reload(model, tmp_path / f"model.{ending}"))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_mixed_policy_survives(policy, tmp_path):
    layer = wrap(keras.layers.Dense(3, dtype=policy), {"kernel": ste()}, ste_output(4.0))
    model = keras.Sequential([keras.Input(SHAPE), keras.layers.Flatten(), layer])
    loaded = reload(model, tmp_path / "model.keras")
    assert loaded.layers[-1].layer.dtype_policy.name == policy
    assert np.array_equal(
        ops.convert_to_numpy(ops.cast(loaded(X), "float32")),
        ops.convert_to_numpy(ops.cast(model(X), "float32")),
    )


class Scaled(qi.BaseKerasTrainableQuantizer):
    """A user's quantizer: a trained step, and a constructor argument of its own."""

    def __init__(self, quantization_config, steps):
        super().__init__(quantization_config, qi.QuantizationTarget.Weights, [M.SYMMETRIC])
        self.steps = steps

    def initialize_quantization(self, tensor_shape, name, layer):
        step = layer.add_weight(name="step", shape=(), initializer=keras.initializers.Constant(0.1))
        self.quantizer_parameters = {"step": step}
        return self.quantizer_parameters

    def __call__(self, inputs):
        step = self.quantizer_parameters["step"] * 1.0
        return qi.fake_quantize(inputs, step, -self.steps, self.steps)

    def convert2inferable(self):
        raise NotImplementedError

    def get_config(self):
        return super().get_config() | {"steps": self.steps}


@keras.saving.register_keras_serializable("test_saving")
class RegisteredScaled(Scaled):
    """As its base, but registered."""


def model_with(cls):
    """Three quantizers whose variables have one name, in a layer."""
    quantizers = {
        path: cls(qi.TrainableQuantizerWeightsConfig(M.SYMMETRIC), steps)
        for path, steps in (("cell/kernel", 3), ("cell/recurrent_kernel", 4), ("cell/bias", 5))
    }
    lstm = wrap(keras.layers.LSTM(3, bias_initializer="normal", name="lstm"), quantizers)
    model = keras.Sequential([keras.Input(SHAPE), keras.layers.Reshape((4, 8)), lstm])
    for path, step in zip(quantizers, (0.07, 0.11, 0.13), strict=True):
        variable = quantizers[path].quantizer_parameters["step"]
        assert variable.name == f"{path.replace('/', '_')}_step"
        variable.assign(step)
    return model


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_a_registered_quantizer_of_a_user(ending, tmp_path):
    model = model_with(RegisteredScaled)
    same_outputs(model, reload(model, tmp_path / f"model.{ending}"))


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_a_quantizer_known_by_custom_objects_only(ending, tmp_path):
    model, path = model_with(Scaled), tmp_path / f"model.{ending}"
    same_outputs(model, reload(model, path, custom_objects={"Scaled": Scaled}))
    with keras.saving.custom_object_scope({"Scaled": Scaled}):
        same_outputs(model, keras.models.load_model(path, compile=False))


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_an_unknown_quantizer_is_named(ending, tmp_path):
    path = tmp_path / f"model.{ending}"
    model_with(Scaled).save(path)
    with pytest.raises(ValueError, match=r"names 'Scaled'.*custom_objects"):
        qi.keras_load_quantized_model(path, compile=False)
