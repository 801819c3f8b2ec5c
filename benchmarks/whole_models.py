"""Time of making, calibrating, training and running quantized models, against the float model's.

Run `python -m benchmarks.whole_models`; it writes `whole_models.json` and `whole_models.md` beside
this file, with the ratios of `tfmot.json`, where `benchmarks.tfmot` has written it. The sides of a
ratio run interleaved in one process; a figure is a median over blocks.
"""

import argparse
import json
import os
import pathlib
import resource
import time
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import keras_qwrap as qi
from benchmarks.machine import FOLDER, machine, write
from benchmarks.networks import convolutions, measure, ratio_table

METHODS = ("minmax", "mse", "percentile", "entropy")


def quantize(model: keras.Model, x: np.ndarray) -> keras.Model:
    """The model in w8a8, calibrated."""
    return qi.quantize_model(model, "w8a8", x, verbose=0)


def copying(repeats: int) -> dict:
    """`quantize_model` on 300 layers against cloning the model and copying its weights."""
    inputs = tensor = keras.Input((8, 8, 8))
    for _ in range(100):
        tensor = layers.Conv2D(8, 3, padding="same")(tensor)
        tensor = layers.ReLU()(layers.BatchNormalization()(tensor))
    model = keras.Model(inputs, tensor)
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        keras.models.clone_model(model).set_weights(model.get_weights())
        middle = time.perf_counter()
        qi.quantize_model(model)
        found.append((time.perf_counter() - middle) / (middle - start))
    title = "quantize_model, 300 layers, against clone_model and set_weights"
    return {"title": title, "ratio": round(float(np.median(found)), 2)}


def calibration(method: str, repeats: int) -> dict:
    """Images a second of `calibrate` against the float model's `predict`, 200 batches of 32."""
    model = convolutions(keras)
    x = np.random.default_rng(0).normal(size=(6400, 32, 32, 3)).astype(np.float32)
    quantized = qi.quantize_model(model)
    model.predict(x[:64], verbose=0)
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        model.predict(x, batch_size=32, verbose=0)
        middle = time.perf_counter()
        qi.calibrate(quantized, x, method, verbose=0)
        found.append((middle - start) / (time.perf_counter() - middle))
    title = f"calibrate, {method}, whole call: throughput against predict"
    return {"title": title, "ratio": round(float(np.median(found)), 2)}


def memory() -> dict:
    """Growth of resident memory from the 10th to the 1000th batch of one calibration."""
    model = qi.quantize_model(convolutions(keras))
    random = np.random.default_rng(0)
    sizes = []

    def stream() -> Iterator[np.ndarray]:
        for batch in range(1, 1001):
            if batch in (10, 1000):
                pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
                sizes.append(pages * resource.getpagesize() / 2**20)
            yield random.normal(size=(16, 32, 32, 3)).astype(np.float32)

    qi.calibrate(model, stream(), verbose=0)
    title = "calibrate: growth of memory from the 10th to the 1000th batch, MiB"
    return {"title": title, "ratio": round(sizes[1] - sizes[0], 1)}


def tfmot_ratios() -> dict[str, float]:
    """The ratios of `tfmot.json` by title; none where there is no such file."""
    path = FOLDER / "tfmot.json"
    rows = json.loads(path.read_text())["ratios"] if path.exists() else []
    return {row["title"]: row["sides"]["w8a8"]["ratio"] for row in rows}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--select", help="only ratios whose title contains this text")
    parser.add_argument("--instances", type=int, default=2, help="freshly built pairs")
    parser.add_argument("--blocks", type=int, default=30, help="timed blocks for each pair")
    arguments = parser.parse_args()
    selected, counts = arguments.select, (arguments.instances, arguments.blocks)
    if selected is not None:
        print("\n".join(ratio_table(measure(keras, quantize, selected, *counts), tfmot_ratios())))
        return
    figures = [copying(5), *(calibration(method, 5) for method in METHODS), memory()]
    print(json.dumps(figures), flush=True)
    rows = measure(keras, quantize, "", *counts)
    table = ["| what | figure |", "| --- | --- |"]
    table += [f"| {figure['title']} | {figure['ratio']} |" for figure in figures]
    table += ["", *ratio_table(rows, tfmot_ratios())]
    write("whole_models", "Whole models", machine(), {"single": figures, "ratios": rows}, table)


if __name__ == "__main__":
    main()
