"""Data parallelism of `keras.distribution`, which is that of JAX: two devices of one host."""

import numpy as np
import pytest
from distributed import DELAY, RANGED, STEPS, X, ends_of, result, start, structure

PROGRAM = """
import json
import sys
import keras
import numpy as np
import keras_qwrap as qi
from distributed import X, codes_of, compiled, float_model, train

folder = sys.argv[1]

def values(variable):
    return [np.asarray(shard.data) for shard in variable.value.addressable_shards]

def trained(name):
    keras.utils.set_random_seed(0)
    model = compiled(qi.quantize_model(float_model(norm=True), "w8a8"))
    states = train(model, values)
    model.save(f"{folder}/{name}.keras")
    return model, states

_, alone = trained("alone")
keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
model, states = trained("parallel")
kernel = model.get_layer("head").layer.kernel
outputs = model.predict(X, verbose=0)
converted = qi.convert_to_inferable(model).predict(X, verbose=0)
codes = codes_of(model)
keras.distribution.set_distribution(None)
loaded = keras.models.load_model(f"{folder}/parallel.keras")
print(json.dumps({
    "alone": alone,
    "states": states,
    "kernels": [value.tolist() for value in values(kernel)],
    "outputs": [o.tolist() for o in (outputs, converted, loaded.predict(X, verbose=0))],
    "codes": [codes, codes_of(loaded)],
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def found(folder):
    return result(start(PROGRAM, folder, XLA_FLAGS="--xla_force_host_platform_device_count=2"))


def test_two_devices_train_as_one(found):
    """The batch is one array: the model's input has the very range that one device finds.

    Gradients are summed in another order, which later layers show in the last bits.
    """
    assert len(found["states"]) == 2
    for epoch, (state, alone) in enumerate(zip(found["states"], found["alone"], strict=True), 1):
        assert sorted(state) == sorted(RANGED)
        for name in RANGED:
            for role, (first, second) in state[name].items():
                assert first == second
                np.testing.assert_allclose([first], alone[name][role], rtol=1e-6, err_msg=name)
            assert state[name]["steps"][0] == epoch * STEPS
            assert state[name]["delay"][0] == DELAY
            assert state[name]["frozen"][0] == (epoch == 2)
        assert ends_of(state, "image_quantizer") == ends_of(alone, "image_quantizer")
        assert all(ends_of(state, name) == ends_of(found["states"][0], name) for name in RANGED)
    assert ends_of(found["states"][0], "image_quantizer")[0] not in (0, X.min())
    first, second = found["kernels"]
    assert first == second


def test_conversion_and_the_file_give_the_same_without_a_distribution(found):
    outputs, converted, loaded = found["outputs"]
    assert len({number for row in outputs for number in row}) > 8
    assert outputs == converted == loaded
    trained, loaded = found["codes"]
    assert trained == loaded


def test_the_file_has_the_single_device_format(found, folder):
    assert structure(folder / "parallel.keras") == structure(folder / "alone.keras")
