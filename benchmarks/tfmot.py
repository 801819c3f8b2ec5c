"""Time of models quantized by TensorFlow's Model Optimization toolkit, against the float models.

It needs Keras 2, and so an environment of its own:

    python -m venv tfmot && . tfmot/bin/activate
    python -m pip install tensorflow tf_keras tensorflow-model-optimization
    python -m benchmarks.tfmot

It writes `tfmot.json` and `tfmot.md` beside this file; `python -m benchmarks.whole_models`, in the
environment of keras_qwrap, puts its ratios beside ours. Networks, training step and timing are the
same code; each side is compared with the float model of its own Keras.
"""

import argparse
import os
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["TF_USE_LEGACY_KERAS"] = "1"

import tensorflow_model_optimization as tfmot
import tf_keras

from benchmarks.machine import machine, write
from benchmarks.networks import measure, ratio_table

PACKAGES = ("tensorflow", "tf_keras", "tensorflow_model_optimization")


def quantize(model: Any, x: np.ndarray) -> Any:
    """The model with 8 bits for weights and activations; it finds ranges while it trains."""
    return tfmot.quantization.keras.quantize_model(model)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--select", default="", help="only titles that contain this text")
    parser.add_argument("--instances", type=int, default=2, help="freshly built pairs")
    parser.add_argument("--blocks", type=int, default=30, help="timed blocks for each pair")
    arguments = parser.parse_args()
    rows = measure(tf_keras, quantize, arguments.select, arguments.instances, arguments.blocks)
    if not arguments.select:
        title = "TensorFlow's Model Optimization toolkit"
        write("tfmot", title, machine(PACKAGES), {"ratios": rows}, ratio_table(rows))


if __name__ == "__main__":
    main()
