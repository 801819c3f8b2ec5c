"""Time of making, calibrating and training quantized models, against the float model's.

Run `python -m benchmarks.whole_models`; it writes `whole_models.json` and `whole_models.md` beside
this file. The sides of a ratio run interleaved in one process; a figure is a median over blocks.
"""

import argparse
import json
import os
import pathlib
import resource
import time
from collections.abc import Callable, Iterator
from functools import partial

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import keras_qwrap as qi
from benchmarks.machine import machine
from benchmarks.overhead import compare


def convolutions() -> keras.Model:
    """Three convolutions with batch normalization, 32x32 images."""
    inputs = tensor = keras.Input((32, 32, 3))
    for filters in (32, 64, 64):
        tensor = layers.Conv2D(filters, 3, padding="same", use_bias=False)(tensor)
        tensor = layers.ReLU()(layers.BatchNormalization()(tensor))
        tensor = layers.MaxPooling2D()(tensor)
    return keras.Model(inputs, layers.Dense(10)(layers.Flatten()(tensor)))


def perceptron() -> keras.Model:
    """Three layers of 1024 units."""
    inputs = tensor = keras.Input((1024,))
    for _ in range(3):
        tensor = layers.Dense(1024, activation="relu")(tensor)
    return keras.Model(inputs, layers.Dense(10)(tensor))


def separable() -> keras.Model:
    """Depthwise and pointwise convolutions, 32x32 images."""
    inputs = keras.Input((32, 32, 3))
    tensor = layers.Conv2D(32, 3, padding="same", use_bias=False)(inputs)
    for filters in (64, 64, 64):
        for layer in (
            layers.DepthwiseConv2D(3, padding="same", use_bias=False),
            layers.Conv2D(filters, 1, use_bias=False),
        ):
            tensor = layers.ReLU()(layers.BatchNormalization()(layer(tensor)))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(tensor)))


NETWORKS: dict[str, tuple[Callable[[], keras.Model], int]] = {
    "three convolutions, batch 64": (convolutions, 64),
    "three 1024-wide layers, batch 64": (perceptron, 64),
    "depthwise-separable, batch 32": (separable, 32),
}


def network(name: str, quantize: bool) -> tuple[keras.Model, np.ndarray]:
    """A network, quantized w8a8 and calibrated or not, and a batch for it."""
    keras.utils.set_random_seed(0)
    make, batch = NETWORKS[name]
    model = make()
    x = np.random.default_rng(0).normal(size=(batch, *model.input_shape[1:])).astype(np.float32)
    return (qi.quantize_model(model, "w8a8", x, verbose=0) if quantize else model), x


def training_step(name: str, quantize: bool, xla: bool) -> Callable[[], None]:
    """A function that runs one compiled training step and waits for it."""
    model, x = network(name, quantize)
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    images, targets = tf.constant(x), tf.random.normal((len(x), 10))

    @tf.function(jit_compile=xla)
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    return lambda: step(images, targets).numpy()


def inference(name: str, quantize: bool, xla: bool) -> Callable[[], None]:
    """A function that runs the compiled model once and waits for it."""
    model, x = network(name, quantize)
    call = tf.function(lambda x: tf.reduce_sum(model(x, training=False)), jit_compile=xla)
    images = tf.constant(x)
    return lambda: call(images).numpy()


def ratios(instances: int, blocks: int) -> list[dict]:
    """Quantized against float: training steps and inference."""
    rows = []
    for name in NETWORKS:
        for what, make in (("training step", training_step), ("inference", inference)):
            for xla in (False, True):
                sides = {"float": False, "float again": False, "w8a8": True}
                makers = {side: partial(make, name, q, xla) for side, q in sides.items()}
                title = f"{name}: {what}, {'XLA' if xla else 'graph'}"
                rows.append({"title": title, "sides": compare(makers, instances, blocks)})
                print(json.dumps(rows[-1]), flush=True)
    return rows


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
    model = convolutions()
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
    """Growth of the largest resident size from 10 to 1000 batches of calibration."""
    model = qi.quantize_model(convolutions())
    random = np.random.default_rng(0)

    def stream(batches: int) -> Iterator[np.ndarray]:
        for _ in range(batches):
            yield random.normal(size=(16, 32, 32, 3)).astype(np.float32)

    sizes = []
    for batches in (10, 10, 1000):
        qi.calibrate(model, stream(batches), verbose=0)
        sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    title = "calibrate: growth of peak memory from 10 to 1000 batches, MiB"
    return {"title": title, "ratio": round(sizes[2] - sizes[1], 1)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=5, help="freshly built pairs")
    parser.add_argument("--blocks", type=int, default=10, help="timed blocks for each pair")
    arguments = parser.parse_args()
    single = [copying(5), calibration("minmax", 5), calibration("mse", 5), memory()]
    print(json.dumps(single), flush=True)
    rows = ratios(arguments.instances, arguments.blocks)
    folder, about = pathlib.Path(__file__).parent, machine()
    text = json.dumps({"machine": about, "single": single, "ratios": rows}, indent=2)
    (folder / "whole_models.json").write_text(text + "\n")
    lines = ["# Whole models", "", "Written by `python -m benchmarks.whole_models`.", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += ["", "| what | figure |", "| --- | --- |"]
    lines += [f"| {row['title']} | {row['ratio']} |" for row in single]
    lines += ["", "| what | side | ms | ratio to the first |", "| --- | --- | --- | --- |"]
    for row in rows:
        for name, side in row["sides"].items():
            lines.append(f"| {row['title']} | {name} | {side['ms']:.3f} | {side['ratio']:.3f} |")
    (folder / "whole_models.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
