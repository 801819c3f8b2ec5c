"""Sizes of the files that Sony's mct_quantizers writes of the models of `benchmarks.files`.

It needs Keras 2, and so an environment of its own:

    python -m venv mct && . mct/bin/activate
    python -m pip install tensorflow tf_keras mct-quantizers
    python -m benchmarks.mct

It writes `mct.json` and `mct.md` beside this file; `python -m benchmarks.files`, in the environment
of keras_qwrap, puts its sizes beside ours. Kernels have inferable symmetric quantizers with a range
for each channel.
"""

import os
import tempfile
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TF_USE_LEGACY_KERAS"] = "1"

import tf_keras
from mct_quantizers import KerasQuantizationWrapper
from mct_quantizers.keras.quantizers import WeightsSymmetricInferableQuantizer

from benchmarks.machine import machine, write
from benchmarks.stored import BITS, ENDINGS, stored_models

PACKAGES = ("tensorflow", "tf_keras", "mct_quantizers")


def wrapped(layer: Any, bits: int) -> Any:
    """A copy of the layer; with a quantized kernel, if it has one."""
    copy = type(layer).from_config(layer.get_config())
    if not hasattr(layer, "kernel"):
        return copy
    kernel = layer.kernel.numpy()
    axis = kernel.ndim - 1
    ends = np.abs(kernel).max(axis=tuple(range(axis))).tolist()
    quantizer = WeightsSymmetricInferableQuantizer(bits, ends, True, axis, kernel.ndim)
    return KerasQuantizationWrapper(copy, {"kernel": quantizer})


def quantize(model: Any, bits: int) -> Any:
    """The model with quantized kernels, and its weights."""
    new = tf_keras.models.clone_model(model, clone_function=lambda layer: wrapped(layer, bits))
    for layer, copy in zip(model.layers, new.layers, strict=True):
        values = {variable.name.split("/")[-1]: variable for variable in layer.variables}
        for variable in copy.variables:
            name = variable.name.split("/")[-1]
            if name in values:
                variable.assign(values.pop(name))
        assert not values
    return new


def main() -> None:
    """Measure, print and write."""
    rows = []
    for model in stored_models(tf_keras):
        for bits in BITS:
            quantized = quantize(model, bits)
            for ending in ENDINGS:
                with tempfile.TemporaryDirectory() as folder:
                    path = os.path.join(folder, f"model{ending}")
                    quantized.save(path)
                    size = os.path.getsize(path)
                row = {"model": model.name, "bits": bits, "format": ending, "bytes": size}
                rows.append(row)
                print(row, flush=True)
    tables = [f"| {' | '.join(rows[0])} |", "| --- " * len(rows[0]) + "|"]
    tables += [f"| {' | '.join(map(str, row.values()))} |" for row in rows]
    write("mct", "Files of mct_quantizers", machine(PACKAGES), {"sizes": rows}, tables)


if __name__ == "__main__":
    main()
