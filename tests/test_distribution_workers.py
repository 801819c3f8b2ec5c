"""Two processes on one machine train one model; `fit` works where plain Keras' does."""

import json
import socket

import numpy as np
import pytest
from distributed import DELAY, RANGED, STEPS, X, averaged, ends_of, result, start

pytestmark = [pytest.mark.slow, pytest.mark.tensorflow]

WORKER = """
import json
import os
import sys

workers, index = json.loads(sys.argv[1]), int(sys.argv[2])
task = {"type": "worker", "index": index}
os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
import tensorflow as tf

strategy = tf.distribute.MultiWorkerMirroredStrategy()
import keras
import numpy as np
import keras_qwrap as qi
from distributed import BATCH, DELAY, X, Y, codes_of, compiled, float_model, state_of

def values(variable):
    return [variable.numpy()]

keras.utils.set_random_seed(0)
"""

LOOP = (
    WORKER
    + """
with strategy.scope():
    model = qi.quantize_model(float_model(norm=True), "w8a8")
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(model.trainable_variables)
    calibrated = qi.calibrate(model, X, "minmax", verbose=0)

def step(x, y):
    with tf.GradientTape() as tape:
        errors = keras.ops.square(model(x, training=True) - y)
        loss = keras.ops.sum(errors) / (BATCH * Y.shape[1])
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply(gradients, model.trainable_variables)
    return loss

@tf.function
def train_step(batch):
    return strategy.reduce("SUM", strategy.run(step, args=batch), axis=None)

data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH)
batches = strategy.experimental_distribute_dataset(data)
callbacks = keras.callbacks.CallbackList([qi.DelayQuantization(DELAY), qi.FreezeRanges(1)])
callbacks.set_model(model)
callbacks.on_train_begin()
losses, states = [], []
for epoch in range(2):
    callbacks.on_epoch_begin(epoch)
    for batch in batches:
        losses.append(float(train_step(batch)))
        states.append(state_of(model, values))
print(json.dumps({
    "replicas": strategy.num_replicas_in_sync,
    "calibrated": calibrated,
    "losses": losses,
    "states": states,
    "weights": [v.numpy().tolist() for v in model.trainable_variables],
    "codes": codes_of(model),
}))
"""
)

FIT = (
    WORKER
    + """
def outcome(model, *callbacks):
    try:
        model.fit(X, Y, batch_size=BATCH, epochs=2, verbose=0, callbacks=callbacks)
    except Exception as error:
        return repr(error)[:1000]
    return "trained"

with strategy.scope():
    plain = compiled(float_model(norm=True))
    model = compiled(qi.quantize_model(plain, "w8a8"))
print(json.dumps({
    "plain": outcome(plain),
    "wrapped": outcome(model, qi.DelayQuantization(DELAY), qi.FreezeRanges(1)),
    "state": state_of(model, values),
}))
"""
)


def together(program, number):
    """The results of `number` workers, which find each other at free ports."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    workers = json.dumps(addresses)
    processes = [start(program, workers, index) for index in range(number)]
    return [result(process) for process in processes]


def test_a_custom_loop_keeps_two_workers_equal():
    first, second = together(LOOP, 2)
    assert first == second
    assert first["replicas"] == 2
    assert len(set(first["losses"])) == 2 * STEPS
    assert sorted(first["calibrated"]) == sorted(RANGED)
    assert first["calibrated"]["image_quantizer"] == [X.min().item(), X.max().item()]
    shared = np.float32(first["calibrated"]["image_quantizer"])
    for batch, state in zip(np.split(X, STEPS), first["states"], strict=False):
        shared = averaged(shared, np.split(batch, 2))
        assert ends_of(state, "image_quantizer") == shared.tolist()
    for name, calibrated in first["calibrated"].items():
        ends = [tuple(ends_of(state, name)) for state in first["states"]]
        assert len({tuple(calibrated), *ends[:STEPS]}) == STEPS + 1
        assert set(ends[STEPS:]) == {ends[STEPS - 1]}
        for number, state in enumerate(first["states"], 1):
            assert state[name]["steps"] == [number]
            assert state[name]["delay"] == [DELAY]
            assert state[name]["frozen"] == [number > STEPS]


@pytest.mark.parametrize("number", [1, 2])
def test_fit_works_where_it_does_without_wrappers(number):
    """With one worker it does; with two, plain Keras 3.15 fails."""
    workers = together(FIT, number)
    assert len(workers) == number
    for worker in workers:
        assert number > 1 or worker["plain"] == "trained"
        assert worker["plain"] != "trained" or worker["wrapped"] == "trained"
        for name in RANGED:
            assert worker["state"][name]["steps"] == [
                2 * STEPS if worker["wrapped"] == "trained" else 0
            ]
