"""Whole models on several devices of one machine: replicas, saved files, exact ranges."""

import numpy as np
import pytest
from distributed import BATCH, DELAY, RANGED, STEPS, X, averaged, ends_of, result, start, structure

pytestmark = [pytest.mark.slow, pytest.mark.tensorflow]

TWO_DEVICES = """
import json
import sys
import numpy as np
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras
import keras_qwrap as qi
from distributed import RANGED, X, Y, codes_of, compiled, float_model, save, state_of, train

folder = sys.argv[1]
strategy = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"])

def values(variable):
    return [each.numpy() for each in strategy.experimental_local_results(variable.value)]
"""

MIRRORED = (
    TWO_DEVICES
    + """
def first_outputs(model):
    plain = qi.unwrap_model(model)
    wanted = {name: plain.get_layer(name).output for name in RANGED[1:]}
    halves = [keras.Model(plain.inputs[0], wanted)(half) for half in (X[:2], X[2:4])]
    return {name: [half[name].numpy().tolist() for half in halves] for name in wanted}

keras.utils.set_random_seed(0)
with strategy.scope():
    model = compiled(qi.quantize_model(float_model(norm=False), "w8a8"))
first = first_outputs(model)
before = [values(v)[0].tolist() for v in model.trainable_variables]
states = train(model, values)
outputs = model.predict(X, verbose=0)
converted = qi.convert_to_inferable(model)
with strategy.scope():
    converted_inside = qi.convert_to_inferable(model)
save(model, folder, "trained")
save(converted, folder, "converted")
save(converted_inside, folder, "converted_inside")
np.save(f"{folder}/outputs.npy", outputs)
with strategy.scope():
    layers = [keras.Input((2,), name="row"), keras.layers.Dense(2, name="dense")]
    uneven = compiled(qi.quantize_model(keras.Sequential(layers), "w8a8"))
uneven.fit(X[:5, 0, 0], Y[:5], batch_size=4, shuffle=False, verbose=0)
print(json.dumps({
    "replicas": strategy.num_replicas_in_sync,
    "first": first,
    "states": states,
    "uneven": state_of(uneven, values),
    "before": before,
    "after": [[each.tolist() for each in values(v)] for v in model.trainable_variables],
    "codes": codes_of(model),
    "outputs": [m.predict(X, verbose=0).tolist() for m in (converted, converted_inside)],
}))
"""
)

ALONE = """
import json
import sys
import keras
import numpy as np
import tensorflow as tf
import keras_qwrap as qi
from distributed import X, codes_of, compiled, float_model, save, train

folder = sys.argv[1]
model = compiled(qi.quantize_model(float_model(norm=False), "w8a8"))
train(model)
save(model, folder, "alone")
found = {}
for name in ("trained", "converted", "converted_inside"):
    for ending in ("keras", "h5"):
        loaded = qi.keras_load_quantized_model(f"{folder}/{name}.{ending}", compile=False)
        found[f"{name}.{ending}"] = loaded.predict(X, verbose=0).tolist(), codes_of(loaded)
again = qi.keras_load_quantized_model(f"{folder}/trained.keras")
save(qi.convert_to_inferable(again), folder, "alone_converted")
print(json.dumps({
    "strategy": tf.distribute.has_strategy(),
    "iterations": int(again.optimizer.iterations.numpy()),
    "states": train(again)[-1],
    "found": found,
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mirrored")


@pytest.fixture(scope="module")
def mirrored(folder):
    return result(start(MIRRORED, folder))


@pytest.fixture(scope="module")
def alone(mirrored, folder):
    return result(start(ALONE, folder))


def test_state_and_weights_are_equal_on_the_replicas(mirrored):
    assert mirrored["replicas"] == 2
    assert len(mirrored["states"]) == 2 * STEPS
    for number, state in enumerate(mirrored["states"], 1):
        assert sorted(state) == sorted(RANGED)
        for roles in state.values():
            assert all(len(values) == 2 and values[0] == values[1] for values in roles.values())
            assert roles["steps"][0] == number
            assert roles["delay"][0] == DELAY
            assert roles["frozen"][0] == (number > STEPS)
    for before, (first, second) in zip(mirrored["before"], mirrored["after"], strict=True):
        assert first == second != before


@pytest.mark.parametrize("name", RANGED)
def test_ranges_move_until_they_are_frozen(mirrored, name):
    ends = [tuple(ends_of(state, name)) for state in mirrored["states"]]
    assert len(set(ends[:STEPS])) == STEPS
    assert set(ends[STEPS:]) == {ends[STEPS - 1]}


def test_the_range_is_the_mean_of_the_replicas_moving_averages(mirrored):
    shared = None
    for batch, state in zip(np.split(X, STEPS), mirrored["states"], strict=False):
        shared = averaged(shared, np.split(batch, 2))
        assert ends_of(state, "image_quantizer") == shared.tolist()


@pytest.mark.parametrize("name", RANGED[1:])
def test_first_ranges_are_those_of_the_layers_outputs(mirrored, name):
    """The kernels are quantized and the activations are not yet, as in the unwrapped model."""
    halves = [np.float32(half) for half in mirrored["first"][name]]
    assert ends_of(mirrored["states"][0], name) == averaged(None, halves).tolist()


def test_a_replica_without_rows_leaves_its_range_as_it_was(mirrored):
    """The last batch has one row, for the first replica. (TensorFlow convolves no empty batch.)"""
    rows = X[: BATCH + 1, 0, 0]
    shared = averaged(None, np.split(rows[:BATCH], 2))
    expected = averaged(shared, [rows[BATCH:], rows[:0]])
    assert ends_of(mirrored["uneven"], "row_quantizer") == expected.tolist() != shared.tolist()
    assert mirrored["uneven"]["row_quantizer"]["steps"] == [2, 2]


def test_conversion_and_files_give_the_same_without_a_strategy(mirrored, alone, folder):
    outputs = np.load(folder / "outputs.npy").tolist()
    assert len({number for row in outputs for number in row}) > 8
    assert mirrored["outputs"] == [outputs, outputs]
    assert not alone["strategy"]
    for name, (found, codes) in alone["found"].items():
        assert found == outputs, name
        assert codes == mirrored["codes"], name
    assert alone["iterations"] == 2 * STEPS
    last = mirrored["states"][-1]
    for name, roles in alone["states"].items():
        steps = [last[name]["steps"][0] + 2 * STEPS]
        frozen = {role: values[:1] for role, values in last[name].items()}
        assert roles == frozen | {"steps": steps}


@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize(
    ("name", "single"),
    [
        ("trained", "alone"),
        ("converted", "alone_converted"),
        ("converted_inside", "alone_converted"),
    ],
)
def test_files_have_the_single_device_format(name, single, ending, alone, folder):
    found = structure(folder / f"{name}.{ending}")
    expected = structure(folder / f"{single}.{ending}")
    assert list(found) == list(expected)
    for part, content in expected.items():
        assert found[part] == content, part
