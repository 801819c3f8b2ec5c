"""Random models through files: not a bit changes, also in a new process."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from random_models import random_model
from reference import to_numpy

import keras_qwrap as qi

FORMATS = (".keras", ".h5", "sealed.keras", "sealed.h5", ".weights.h5")
CHILD = """
import os, sys
import keras
import numpy as np
import keras_qwrap as qi
folder = sys.argv[1]
for name in sorted(os.listdir(folder)):
    if name.endswith(".npz"):
        continue
    model = qi.keras_load_quantized_model(os.path.join(folder, name), compile=False)
    arrays = np.load(os.path.join(folder, f"{name}.in.npz"))
    outputs = model([arrays[key] for key in arrays])
    outputs = [keras.ops.convert_to_numpy(output) for output in keras.tree.flatten(outputs)]
    np.savez(os.path.join(folder, f"{name}.out.npz"), *outputs)
"""


def codes(model):
    rows = {}
    for layer in model.layers:
        if hasattr(layer, "get_codes"):
            for path, parts in layer.get_codes().items():
                rows[layer.name, path] = parts
    return rows


def same(first, second):
    assert list(first) == list(second)
    for key in first:
        for a, b in zip(first[key], second[key], strict=True):
            np.testing.assert_array_equal(a, b, strict=True)


def outputs_of(model, arrays):
    return {0: [to_numpy(tensor) for tensor in keras.tree.flatten(model(arrays))]}


def through(model, path, ending):
    """The model after a file of a format."""
    if ending == ".weights.h5":
        model.save_weights(path)
        fresh = keras.models.clone_model(model)
        fresh.load_weights(path)
        return fresh
    if ending.startswith("sealed"):
        qi.save_quantized_model(model, path)
        return qi.keras_load_quantized_model(path)
    model.save(path)
    return keras.models.load_model(path, compile=False)


def check_round_trips(seeds, folder):
    """A tenth of the models through a new process as well."""
    expected = {}
    for seed in seeds:
        model, arrays = random_model(seed)
        ending = FORMATS[seed % len(FORMATS)]
        path = str(folder / f"model_{seed}{ending}")
        outputs = outputs_of(model, arrays)
        again = through(model, path, ending)
        same(codes(model), codes(again))
        same(outputs, outputs_of(again, arrays))
        if ending == ".keras":
            other = through(again, str(folder / f"again_{seed}.h5"), "sealed.h5")
            same(codes(model), codes(other))
            same(outputs, outputs_of(other, arrays))
        if seed % 20 < 2:
            new = folder / "new"
            new.mkdir(exist_ok=True)
            name = f"{seed}.h5" if seed % 2 else f"{seed}.keras"
            model.save(str(new / name))
            np.savez(new / f"{name}.in.npz", *arrays)
            expected[name] = outputs
        keras.backend.clear_session()
    command = [sys.executable, "-c", CHILD, str(folder / "new")]
    subprocess.run(command, check=True, capture_output=True)
    for name, outputs in expected.items():
        with np.load(folder / "new" / f"{name}.out.npz") as arrays:
            same(outputs, {0: [arrays[key] for key in arrays]})
    return len(expected)


@pytest.mark.parametrize("part", range(2))
def test_random_models(part, tmp_path):
    """`RANDOM_MODELS=500 pytest tests/test_random_models.py` takes them all."""
    number = int(os.environ.get("RANDOM_MODELS", "20"))
    assert check_round_trips(range(part, number, 2), tmp_path) == number // 20
