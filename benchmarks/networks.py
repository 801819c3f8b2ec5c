"""The networks that are timed in float and in w8a8, in Keras 3 and in Keras 2.

`keras` is an argument everywhere, so that both make the same networks.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.timing import Run, compare, inference, training_step

Quantize = Callable[[Any, np.ndarray], Any]


def convolutions(keras: Any) -> Any:
    """Three convolutions with batch normalization, 32x32 images."""
    layers = keras.layers
    inputs = tensor = keras.Input((32, 32, 3))
    for filters in (32, 64, 64):
        tensor = layers.Conv2D(filters, 3, padding="same", use_bias=False)(tensor)
        tensor = layers.ReLU()(layers.BatchNormalization()(tensor))
        tensor = layers.MaxPooling2D()(tensor)
    return keras.Model(inputs, layers.Dense(10)(layers.Flatten()(tensor)))


def perceptron(keras: Any) -> Any:
    """Three layers of 1024 units."""
    inputs = tensor = keras.Input((1024,))
    for _ in range(3):
        tensor = keras.layers.Dense(1024, activation="relu")(tensor)
    return keras.Model(inputs, keras.layers.Dense(10)(tensor))


def separable(keras: Any) -> Any:
    """Depthwise and pointwise convolutions, 32x32 images."""
    layers = keras.layers
    inputs = keras.Input((32, 32, 3))
    tensor = layers.Conv2D(32, 3, padding="same", use_bias=False)(inputs)
    for filters in (64, 64, 64):
        for layer in (
            layers.DepthwiseConv2D(3, padding="same", use_bias=False),
            layers.Conv2D(filters, 1, use_bias=False),
        ):
            tensor = layers.ReLU()(layers.BatchNormalization()(layer(tensor)))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(tensor)))


NETWORKS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "three convolutions, batch 64": (convolutions, 64),
    "three 1024-wide layers, batch 64": (perceptron, 64),
    "depthwise-separable, batch 32": (separable, 32),
}
WHAT = ("training step", "inference")


def timed(keras: Any, quantize: Quantize | None, name: str, what: str, xla: bool) -> Run:
    """A function that runs a network, quantized or not, once."""
    keras.utils.set_random_seed(0)
    make, batch = NETWORKS[name]
    model = make(keras)
    random = np.random.default_rng(0)
    x = random.normal(size=(batch, *model.input_shape[1:])).astype(np.float32)
    if quantize is not None:
        model = quantize(model, x)
    images = tf.constant(x)
    if what == "inference":
        return inference(model, images, xla)
    targets = tf.constant(random.normal(size=(batch, 10)), tf.float32)
    return training_step(model, keras.optimizers.Adam(), images, targets, xla)


def measure(
    keras: Any, quantize: Quantize, selected: str, instances: int, blocks: int
) -> list[dict]:
    """Quantized against float, in all cells whose title contains `selected`."""
    rows = []
    for name in NETWORKS:
        for what in WHAT:
            for xla in (False, True):
                title = f"{name}: {what}, {'XLA' if xla else 'graph'}"
                if selected not in title:
                    continue
                sides = {"float": None, "float again": None, "w8a8": quantize}
                makers = {
                    side: partial(timed, keras, chosen, name, what, xla)
                    for side, chosen in sides.items()
                }
                rows.append({"title": title, "sides": compare(makers, instances, blocks)})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def ratio_table(rows: list[dict], peer: dict[str, float] | None = None) -> list[str]:
    """Lines of a Markdown table; `peer` holds another toolkit's ratios by title."""
    heads = ["what", "float, ms", "float again", "w8a8, ms", "w8a8"]
    heads += ["tfmot's w8a8"] if peer else []
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in rows:
        bare, again, quantized = (row["sides"][side] for side in ("float", "float again", "w8a8"))
        times = f"{bare['ms']:.2f} | {again['ratio']:.2f} | {quantized['ms']:.2f}"
        lines.append(f"| {row['title']} | {times} | {quantized['ratio']:.2f} |")
        if peer:
            lines[-1] += f" {peer[row['title']]:.2f} |"
    return lines
