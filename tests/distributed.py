"""A whole model, its data and its records, for programs that train on several devices.

Devices are set when a process starts, so that each such test runs programs of its own.
"""

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

import keras_qwrap as qi
from keras_qwrap.layers.owner import quantizers_in

BATCH = 4
DELAY = 2
STEPS = 3
"""Of each of the two epochs."""
X = np.random.default_rng(0).normal(size=(STEPS * BATCH, 6, 6, 2)).astype("float32")
Y = np.tanh(X[:, :2, 0, 0])
RANGED = ["image_quantizer", "relu", "head"]
"""Names of the layers with a moving average, in order of execution."""


def float_model(norm: bool) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input(X.shape[1:], name="image"),
            keras.layers.Conv2D(3, 3, name="conv"),
            *([keras.layers.BatchNormalization(name="norm")] if norm else []),
            keras.layers.ReLU(name="relu"),
            keras.layers.Flatten(name="flat"),
            keras.layers.Dense(2, name="head"),
        ],
        name="net",
    )


def compiled(model: keras.Model) -> keras.Model:
    loss = keras.losses.MeanSquaredError()
    jit = keras.backend.backend() == "jax"
    model.compile(keras.optimizers.Adam(0.01, name="adam"), loss, jit_compile=jit)
    return model


def train(model: keras.Model, values: Callable = lambda v: [v.numpy()]) -> list[dict]:
    """Fit for two epochs, of which the second has frozen ranges.

    Returns:
        The state after each step; on JAX, which holds no variables meanwhile, after each epoch.
    """
    states = []

    def note(number: int, logs: dict) -> None:
        states.append(state_of(model, values))

    event = "on_epoch_end" if keras.backend.backend() == "jax" else "on_train_batch_end"

    model.fit(
        X,
        Y,
        batch_size=BATCH,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=[
            qi.DelayQuantization(DELAY),
            qi.FreezeRanges(1),
            keras.callbacks.LambdaCallback(**{event: note}),
        ],
    )
    return states


def state_of(model: keras.Model, values: Callable) -> dict:
    """Variables of the moving averages, `{layer: {role: a value for each replica}}`."""
    return {
        owner.name: {
            role: [np.asarray(value).item() for value in values(variable)]
            for role, variable in quantizer.quantizer_parameters.items()
        }
        for owner, role, quantizer in quantizers_in(model)
        if role.startswith("output")
    }


def averaged(shared: np.ndarray | None, parts: list[np.ndarray]) -> np.ndarray:
    """The range after a step: the mean over the replicas, each of which saw a part of the batch."""
    momentum, rest = np.float32(0.99), np.float32(1 - 0.99)
    own = []
    for part in parts:
        if part.size:
            ends = np.array([min(part.min(), 0), max(part.max(), 0)], np.float32)
            own.append(ends if shared is None else momentum * shared + rest * ends)
        else:
            own.append(shared)
    return np.mean(own, axis=0, dtype=np.float32)


def ends_of(state: dict, name: str) -> list[float]:
    """The range of a layer in a state, on the first replica."""
    return [state[name][role][0] for role in ("min_range", "max_range")]


def codes_of(model: keras.Model) -> dict:
    return {
        name: model.get_layer(name).get_codes()["kernel"][0].tolist() for name in ("conv", "head")
    }


def save(model: keras.Model, folder: str, name: str) -> None:
    model.save(f"{folder}/{name}.keras")
    model.save(f"{folder}/{name}.h5")


def start(program: str, *arguments: Any, **environment: str) -> subprocess.Popen:
    """A process that runs `program`, with this file at hand."""
    tests = Path(__file__).resolve().parent
    paths = {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | paths | {"TF_CPP_MIN_LOG_LEVEL": "3"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen) -> Any:
    """What the last line of the process' output says, as JSON."""
    out, error = process.communicate()
    assert process.returncode == 0, error[-3000:]
    return json.loads(out.splitlines()[-1])


def structure(path: Path) -> dict:
    """All of a saved model but the weights' values: entries, configs, and names, shapes, dtypes."""
    if path.suffix == ".h5":
        return _structure_of_h5(path)
    with zipfile.ZipFile(path) as archive:
        parts: dict[str, Any] = dict.fromkeys(archive.namelist())
        config = archive.read("config.json").decode()
        # Where an object was in memory.
        parts["config.json"] = json.loads(re.sub(r'("shared_object_id": )\d+', r"\g<1>0", config))
        parts["model.weights.h5"] = _structure_of_h5(io.BytesIO(archive.read("model.weights.h5")))
    return parts


def _structure_of_h5(file: Any) -> dict:
    rows = {}

    def see(name: str, item: Any) -> None:
        attributes = {key: _plain(value) for key, value in item.attrs.items()}
        kind = (item.shape, str(item.dtype)) if isinstance(item, h5py.Dataset) else "group"
        rows[name] = kind, attributes

    with h5py.File(file, "r") as opened:
        see("/", opened)
        opened.visititems(see)
    return rows


def _plain(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("{"):
        return json.loads(value)
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
