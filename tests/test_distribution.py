"""Training on several devices, in a process of its own, since devices are set at start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json
import sys
import numpy as np
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras
import keras_qwrap as qi

class Learned(qi.BaseKerasTrainableQuantizer):
    def __init__(self, quantization_config):
        target, method = qi.QuantizationTarget.Activation, qi.QuantizationMethod.SYMMETRIC
        super().__init__(quantization_config, target, [method])

    def initialize_quantization(self, tensor_shape, name, layer):
        mean = tf.VariableAggregation.MEAN
        self.largest = layer.add_weight(
            "largest", shape=(), initializer="zeros", trainable=False, aggregation=mean
        )
        return {"largest": self.largest}

    def __call__(self, inputs, training):
        if training:
            self.largest.assign(keras.ops.maximum(self.largest, keras.ops.max(inputs)))
        return inputs

keras.utils.set_random_seed(0)
strategy = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"])
method = qi.QuantizationMethod.SYMMETRIC
with strategy.scope():
    weights = qi.STEWeightQATQuantizer(qi.TrainableQuantizerWeightsConfig(method, 4))
    output = Learned(qi.TrainableQuantizerActivationConfig(method))
    layer = qi.KerasQuantizationWrapper(keras.layers.Dense(2), {"kernel": weights}, output)
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile("sgd", "mse", jit_compile=False)
before = model.get_weights()
x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
model.fit(x, x[:, :2] * 2, batch_size=4, epochs=2, verbose=0)
values = lambda v: [np.asarray(r.numpy()).tolist() for r in strategy.experimental_local_results(v)]
print(json.dumps({
    "replicas": strategy.num_replicas_in_sync,
    "moved": [not np.array_equal(a, b) for a, b in zip(before, model.get_weights())],
    "largest": values(output.largest.value),
    "kernel": values(layer.layer.kernel.value),
    "codes": layer.get_codes()["kernel"][0].tolist(),
}))
"""


@pytest.mark.slow
@pytest.mark.tensorflow
def test_mirrored_strategy_keeps_the_replicas_equal():
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["replicas"] == 2
    assert all(result["moved"])
    for name in ("largest", "kernel"):
        first, second = result[name]
        assert first == second
    assert result["largest"][0] > 0
    assert max(abs(code) for row in result["codes"] for code in row) == 7
