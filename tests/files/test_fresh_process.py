"""What one process saved, another one loads that imports only this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_qwrap as qi

ROOT = Path(__file__).resolve().parents[2]
X = np.random.default_rng(0).normal(size=(8, 6, 6, 2)).astype("float32")
METHOD = qi.QuantizationMethod

LOAD = """
import json, sys
import keras_qwrap
loader, paths, inputs, outputs = json.loads(sys.argv[1])
import numpy, keras
load = {
    "keras_load_quantized_model": keras_qwrap.keras_load_quantized_model,
    "load_model": keras.models.load_model,
}[loader]
x = numpy.load(inputs)
models = {name: load(path, compile=False) for name, path in paths.items()}
numpy.savez(outputs, **{name: model.predict(x, verbose=0) for name, model in models.items()})
"""


def weights(method, **options):
    return qi.TrainableQuantizerWeightsConfig(method, 4, **options)


def trained_model():
    output = qi.TrainableQuantizerActivationConfig(METHOD.POWER_OF_TWO, 8, {"threshold": 4.0})
    inputs = keras.Input(X.shape[1:])
    x = qi.KerasActivationQuantizationHolder(qi.STEActivationQATQuantizer(output))(inputs)
    x = qi.KerasQuantizationWrapper(
        keras.layers.Conv2D(3, 3),
        {"kernel": qi.STEWeightQATQuantizer(weights(METHOD.SYMMETRIC))},
        qi.STEActivationQATQuantizer(output),
    )(x)
    x = keras.layers.BatchNormalization()(x)
    x = qi.KerasQuantizationWrapper(
        keras.layers.LSTM(3),
        {
            "cell/kernel": qi.STEUniformWeightQATQuantizer(weights(METHOD.UNIFORM)),
            "cell/recurrent_kernel": qi.STEWeightQATQuantizer(weights(METHOD.POWER_OF_TWO)),
        },
    )(keras.layers.Reshape((4, 12))(x))
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    model.compile(keras.optimizers.Adam(0.01), keras.losses.MeanSquaredError())
    model.fit(X, X[:, 0, 0], epochs=2, verbose=0)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Paths of the saved files and the outputs they must give, by name."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    model = trained_model()
    paths, expected = {}, {}
    for state, each in (("trained", model), ("converted", qi.convert_to_inferable(model))):
        outputs = each.predict(X, verbose=0)
        for ending in ("keras", "h5"):
            paths[f"{state}_{ending}"] = str(folder / f"{state}.{ending}")
            expected[f"{state}_{ending}"] = outputs
            each.save(paths[f"{state}_{ending}"])
    return paths, expected


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["keras_load_quantized_model", "load_model"])
def test_a_fresh_process_predicts_the_same(loader, saved, tmp_path):
    """From an unrelated working directory, every file gives the same bits."""
    paths, expected = saved
    np.save(tmp_path / "inputs.npy", X)
    job = [loader, paths, str(tmp_path / "inputs.npy"), str(tmp_path / "outputs.npz")]
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(job)],
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"PYTHONPATH": str(ROOT), "KERAS_BACKEND": keras.backend.backend()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "outputs.npz") as outputs:
        assert sorted(outputs.files) == sorted(expected)
        for name, wanted in expected.items():
            assert len(np.unique(wanted)) > 4
            assert np.array_equal(outputs[name], wanted), name
            assert np.array_equal(wanted, expected["trained_keras"]), name
