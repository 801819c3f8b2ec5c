"""Freezing ranges and delaying quantization, also across a stop and a resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from reference import BACKEND, refused, same, to_numpy

import keras_qwrap as qi
from keras_qwrap.calibration.schedules import DelayQuantization, FreezeRanges
from keras_qwrap.layers.owner import quantizers_in
from keras_qwrap.quantizers.moving_average import MovingAverageActivationQATQuantizer

M = qi.QuantizationMethod
ROOT = Path(__file__).resolve().parents[2]
X = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
Y = np.tanh(X[:, :2])
STEPS = 3
"""Training steps of an epoch, in batches of 4."""


def moving(bits=4, momentum=0.75, **options):
    config = qi.TrainableQuantizerActivationConfig(M.UNIFORM, bits, **options)
    return MovingAverageActivationQATQuantizer(config, momentum)


def dense(units, quantizer):
    config = qi.TrainableQuantizerWeightsConfig(M.SYMMETRIC, 4)
    weights = {"kernel": qi.STEWeightQATQuantizer(config)}
    return qi.KerasQuantizationWrapper(keras.layers.Dense(units), weights, quantizer)


def new_model(compiled=True, **options):
    holder = qi.KerasActivationQuantizationHolder(moving(momentum=0.5, **options))
    layers = [keras.Input((4,)), holder, dense(3, moving(**options)), dense(2, None)]
    model = keras.Sequential(layers)
    if compiled:
        loss = keras.losses.MeanSquaredError()
        model.compile(keras.optimizers.Adam(0.01), loss, jit_compile=BACKEND == "jax")
    return model


def train(model, epochs, *callbacks, initial_epoch=0):
    model.fit(
        X,
        Y,
        batch_size=4,
        epochs=epochs,
        initial_epoch=initial_epoch,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
    )


def moving_ones(model):
    found = [quantizer for *_, quantizer in quantizers_in(model)]
    return [q for q in found if isinstance(q, MovingAverageActivationQATQuantizer)]


def states(model, role):
    return [to_numpy(q.quantizer_parameters[role]).item() for q in moving_ones(model)]


class Ranges(keras.callbacks.Callback):
    """Notes the ranges at the end of each epoch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append([quantizer.range for quantizer in moving_ones(self.model)])


def equal_variables(model, other):
    """Weights, ranges, steps and the optimizer's state."""
    for mine, others in (
        (model.variables, other.variables),
        (model.optimizer.variables, other.optimizer.variables),
    ):
        assert len(mine) == len(others) > 0
        for a, b in zip(mine, others, strict=True):
            np.testing.assert_array_equal(to_numpy(a), to_numpy(b), err_msg=a.path, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("at_epoch", [0, 2])
def test_ranges_freeze_at_the_beginning_of_an_epoch(at_epoch):
    model, free = new_model(), new_model()
    free.set_weights(model.get_weights())
    ranges, moved = Ranges(), Ranges()
    train(model, 4, FreezeRanges(at_epoch), ranges)
    train(free, 4, moved)
    last = max(at_epoch - 1, 0)
    if at_epoch:
        assert ranges.seen[: last + 1] == moved.seen[: last + 1]
    else:
        assert ranges.seen[0][0] == (min(X[:4].min(), 0), X[:4].max()), "the first batch's"
    assert all(seen == ranges.seen[last] for seen in ranges.seen[last:])
    assert all(a != b for a, b in zip(moved.seen[-1], moved.seen[last], strict=True))
    assert states(model, "frozen") == [True, True]
    assert states(model, "steps") == [4 * STEPS] * 2


def test_an_epoch_too_late_freezes_nothing():
    model = new_model()
    train(model, 2, FreezeRanges(2))
    assert states(model, "frozen") == [False, False]


@pytest.mark.slow
def test_frozen_ranges_stay_frozen_without_the_callback(tmp_path):
    model = new_model()
    train(model, 1, FreezeRanges(0))
    model.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    before = Ranges()
    before.set_model(resumed)
    before.on_epoch_end(0)
    train(resumed, 1, after := Ranges())
    assert after.seen == before.seen


@pytest.mark.slow
def test_the_delay_trains_with_float_activations():
    """As a model whose activation quantizers are disabled; the ranges are found meanwhile."""
    model, floating = new_model(), new_model(enable_activation_quantization=False)
    floating.set_weights([to_numpy(v) for v in model.variables if "output_0" not in v.name])
    train(model, 2, DelayQuantization(2 * STEPS))
    train(floating, 2)
    kept = [v for v in model.variables if "output_0" not in v.name]
    for a, b in zip(kept, floating.variables, strict=True):
        same(a.value, to_numpy(b))
    assert all(quantizer.range is not None for quantizer in moving_ones(model))
    assert not np.array_equal(to_numpy(model(X)), to_numpy(floating(X))), "inference quantizes"
    train(model, 3, DelayQuantization(2 * STEPS), initial_epoch=2)
    train(floating, 3, initial_epoch=2)
    assert not np.array_equal(to_numpy(kept[0]), to_numpy(floating.variables[0]))


@pytest.mark.slow
def test_the_delay_is_absolute_and_counts_from_the_first_step():
    """Set again, as for a resumed training, it does not begin anew."""
    model, other = new_model(), new_model()
    other.set_weights(model.get_weights())
    delay = DelayQuantization(STEPS + 1)
    train(model, 3, delay)
    for epoch in range(3):
        train(other, epoch + 1, delay, initial_epoch=epoch)
    equal_variables(model, other)
    assert states(model, "delay") == [STEPS + 1] * 2


@pytest.mark.slow
def test_validation_quantizes_during_the_delay():
    model = new_model()
    train(model, 1, DelayQuantization(1000))
    converted = qi.convert_to_inferable(model)
    same(model.predict(X, verbose=0), converted.predict(X, verbose=0))
    converted.compile(loss=keras.losses.MeanSquaredError())
    losses = [m.evaluate(X, Y, verbose=0) for m in (model, converted)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_resumed_training_goes_on_as_an_uninterrupted_one(tmp_path):
    """The delay ends and the ranges freeze after the resume."""
    callbacks = [DelayQuantization(2 * STEPS + 1), FreezeRanges(3)]
    model, whole = new_model(), new_model()
    whole.set_weights(model.get_weights())
    train(whole, 5, *callbacks)
    train(model, 2, *callbacks)
    model.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    equal_variables(resumed, model)
    train(resumed, 5, *callbacks, initial_epoch=2)
    equal_variables(resumed, whole)
    assert states(resumed, "frozen") == [True, True]
    assert states(resumed, "steps") == [5 * STEPS] * 2
    same(resumed.predict(X, verbose=0), whole.predict(X, verbose=0))


RESUME = """
import json, sys
import numpy, keras
import keras_qwrap
from keras_qwrap.calibration.schedules import DelayQuantization, FreezeRanges
path, data, result, steps = json.loads(sys.argv[1])
model = keras.models.load_model(path)
loaded = numpy.load(data)
callbacks = [DelayQuantization(2 * steps + 1), FreezeRanges(3)]
model.fit(loaded["x"], loaded["y"], batch_size=4, epochs=5, initial_epoch=2, shuffle=False,
          verbose=0, callbacks=callbacks)
model.save(result)
"""


@pytest.mark.slow
def test_a_training_resumed_in_another_process(tmp_path):
    callbacks = [DelayQuantization(2 * STEPS + 1), FreezeRanges(3)]
    model, whole = new_model(), new_model()
    whole.set_weights(model.get_weights())
    train(whole, 5, *callbacks)
    train(model, 2, *callbacks)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", x=X, y=Y)
    arguments = [str(tmp_path / name) for name in ("model.keras", "data.npz", "result.keras")]
    run(RESUME, json.dumps([*arguments, STEPS]))
    equal_variables(keras.models.load_model(tmp_path / "result.keras"), whole)


def run(program, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


MIRRORED = """
import json
import numpy as np
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras
import keras_qwrap as qi
from keras_qwrap.calibration.schedules import DelayQuantization, FreezeRanges
from keras_qwrap.quantizers.moving_average import MovingAverageActivationQATQuantizer

keras.utils.set_random_seed(0)
strategy = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"])
with strategy.scope():
    config = qi.TrainableQuantizerActivationConfig(qi.QuantizationMethod.UNIFORM, 8)
    quantizer = MovingAverageActivationQATQuantizer(config, momentum=0.5)
    holder = qi.KerasActivationQuantizationHolder(quantizer)
    model = keras.Sequential([keras.Input((3,)), holder, keras.layers.Dense(2)])
    model.compile("sgd", "mse", jit_compile=False)
x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
x[4:] *= 4
model.fit(x, x[:, :2] * 2, batch_size=4, epochs=1, verbose=0, shuffle=False,
          callbacks=[DelayQuantization(1), FreezeRanges(1)])
values = lambda v: [r.numpy().tolist() for r in strategy.experimental_local_results(v)]
roles = quantizer.quantizer_parameters
print(json.dumps({"x": x.tolist()} | {name: values(v.value) for name, v in roles.items()}))
"""


@pytest.mark.slow
@pytest.mark.tensorflow
def test_mirrored_replicas_hold_the_same_range():
    """It is the mean of the replicas' ranges; each of them sees its half of a batch."""
    result = json.loads(run(MIRRORED).splitlines()[-1])
    x = np.float32(result["x"]).reshape(2, 2, -1)
    low = np.minimum(x.min(axis=-1), 0).mean(axis=-1)
    high = np.maximum(x.max(axis=-1), 0).mean(axis=-1)
    for role, (first, second) in (("min_range", low), ("max_range", high)):
        one, other = result[role]
        assert one == other == pytest.approx(0.5 * first + 0.5 * second, rel=1e-6)
    assert result["steps"] == [2, 2]
    assert result["delay"] == [1, 1]
    assert result["frozen"] == [False, False]


@pytest.mark.parametrize("callback", [FreezeRanges, DelayQuantization])
def test_models_that_are_refused(callback):
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    disabled = new_model(enable_activation_quantization=False)
    for model in (plain, disabled):
        model.compile("sgd", "mse")
        refused(ValueError, lambda m=model: train(m, 1, callback(1)), "without moving-average")
    unbuilt = keras.Sequential([dense(2, moving())])
    scheduled = callback(1)
    scheduled.set_model(unbuilt)
    refused(ValueError, scheduled.on_train_begin, "not built", unbuilt.name)


@pytest.mark.parametrize(
    ("callback", "name"), [(FreezeRanges, "at_epoch"), (DelayQuantization, "steps")]
)
def test_arguments_that_are_refused(callback, name):
    for value in (-1, 2**31):
        refused(ValueError, lambda v=value: callback(v), name, "from 0")
    for value in (1.0, "1", None, True):
        refused(TypeError, lambda v=value: callback(v), name, "integer")
    assert getattr(callback(np.int64(3)), name) == 3
