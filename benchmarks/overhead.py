"""Time of wrapped layers against bare ones, and of the weight quantizer against TensorFlow's.

Run `python -m benchmarks.overhead`; it writes `overhead.json` and `overhead.md` beside this file.
Both sides run interleaved, block by block in random order, in one process. A ratio is the median
over all blocks of several freshly built pairs. Each table has a row that times two identical bare
layers: what differs from 1 there is noise.
"""

import argparse
import json
import os
from collections.abc import Callable
from functools import partial

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_qwrap as qi
from benchmarks.machine import machine, write
from benchmarks.timing import Run, compare, inference, training_step
from keras_qwrap.numerics.rounding import fake_quantize

GIVEN, FROM_WEIGHT, BARE, CONVERTED = "given range", "range from the weight", "bare", "converted"

CASES: dict[str, tuple[Callable[[], keras.Layer], tuple, list[str]]] = {
    "Conv2D 3x3, 64 -> 64, 32x32, batch 64": (
        lambda: keras.layers.Conv2D(64, 3, padding="same"),
        (64, 32, 32, 64),
        ["kernel"],
    ),
    "DepthwiseConv2D 3x3, 64, 32x32, batch 8": (
        lambda: keras.layers.DepthwiseConv2D(3, padding="same"),
        (8, 32, 32, 64),
        ["kernel"],
    ),
    "Dense 1024 -> 1024, batch 32": (lambda: keras.layers.Dense(1024), (32, 1024), ["kernel"]),
    "LSTM 64 -> 64, 32 steps, batch 32": (
        lambda: keras.layers.LSTM(64),
        (32, 32, 64),
        ["cell/kernel", "cell/recurrent_kernel"],
    ),
}


def make_layer(case: str, kind: str) -> keras.Layer:
    """The bare layer, or the wrapped one with 8 bits per channel."""
    make, shape, paths = CASES[case]
    layer = make()
    if kind == BARE:
        return layer
    axes: tuple[int, ...] = (2, 3) if "Depthwise" in case else (-1,)
    layer.build(shape)
    quantizers = {}
    for path in paths:
        params = {}
        if kind == GIVEN:
            weight = layer
            for part in path.split("/"):
                weight = getattr(weight, part)
            values = keras.ops.convert_to_numpy(weight)
            kept = tuple(axis % values.ndim for axis in axes)
            reduced = tuple(axis for axis in range(values.ndim) if axis not in kept)
            params = {"threshold": np.abs(values).max(axis=reduced)}
        config = qi.TrainableQuantizerWeightsConfig(
            qi.QuantizationMethod.SYMMETRIC, 8, params, weights_channels_axis=axes
        )
        quantizers[path] = qi.STEWeightQATQuantizer(config)
    wrapper = qi.KerasQuantizationWrapper(layer, quantizers)
    if kind == CONVERTED:
        wrapper.build(shape)
        wrapper = wrapper.convert_to_inferable_quantizers()
    return wrapper


def timed(case: str, kind: str, what: str, xla: bool) -> Run:
    """A function that runs the layer, as a model of its own, once."""
    keras.utils.set_random_seed(0)
    shape = CASES[case][1]
    model = keras.Sequential([keras.Input(shape[1:]), make_layer(case, kind)])
    x = tf.random.normal(shape)
    if what == "inference":
        return inference(model, x, xla)
    y = tf.random.normal(model.compute_output_shape(shape))
    return training_step(model, keras.optimizers.Adam(), x, y, xla)


def weight_quantizer(name: str, backward: bool, xla: bool) -> Run:
    """Quantize a 3x3x512x512 kernel per channel, 8 bits, with or without the gradient."""
    weight = tf.Variable(tf.random.normal((3, 3, 512, 512)) * 0.05)
    bound = tf.Variable(tf.reduce_max(tf.abs(weight), axis=(0, 1, 2)))
    upstream = tf.random.normal(weight.shape)

    def quantize(w: tf.Tensor) -> tf.Tensor:
        if name == "tf.quantization":
            return tf.quantization.fake_quant_with_min_max_vars_per_channel(
                w, -bound, bound, num_bits=8, narrow_range=True
            )
        if name == GIVEN:
            return fake_quantize(w, bound * np.float32(1 / 128), -128, 127)
        return from_weight(w)

    config = qi.TrainableQuantizerWeightsConfig(qi.QuantizationMethod.SYMMETRIC, 8)
    from_weight = qi.STEWeightQATQuantizer(config)
    from_weight.initialize_quantization(weight.shape, "kernel", _Latent(weight))

    @tf.function(jit_compile=xla)
    def run() -> tuple:
        w = tf.convert_to_tensor(weight)
        if not backward:
            return (quantize(w),)
        with tf.GradientTape() as tape:
            tape.watch(w)
            y = quantize(w)
        return y, tape.gradient(y, w, upstream)

    return lambda: [tf.identity(t[0, 0, 0, 0]).numpy() for t in run()]


class _Latent:
    """Stands for the wrapper where a quantizer is timed alone."""

    def __init__(self, weight: tf.Variable) -> None:
        self.weight = weight

    def latent_weight(self, name: str) -> tf.Variable:
        return self.weight


def measure(selected: str, instances: int, blocks: int) -> list[dict]:
    """All comparisons whose title contains `selected`."""
    rows: list[tuple[str, dict]] = []
    for xla in (False, True):
        mode = "XLA" if xla else "graph"
        for case in CASES:
            for what, kinds in (
                ("training step", (FROM_WEIGHT, GIVEN)),
                ("inference", (FROM_WEIGHT, GIVEN, CONVERTED)),
            ):
                sides = {"bare": BARE, "bare again": BARE} | {kind: kind for kind in kinds}
                makers = {
                    name: partial(timed, case, kind, what, xla) for name, kind in sides.items()
                }
                rows.append((f"{case}: {what}, {mode}", makers))
        for backward in (False, True):
            what = "forward and backward" if backward else "forward"
            makers = {
                name: partial(weight_quantizer, name, backward, xla)
                for name in ("tf.quantization", GIVEN, FROM_WEIGHT)
            }
            rows.append((f"Weight quantizer, 3x3x512x512 per channel: {what}, {mode}", makers))
    results = []
    for title, makers in rows:
        if selected in title:
            result = compare(makers, instances, blocks)
            print(title, json.dumps(result), flush=True)
            results.append({"title": title, "sides": result})
    return results


def table(results: list[dict]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| what | side | ms | ratio to the first |", "| --- | --- | --- | --- |"]
    for row in results:
        for name, side in row["sides"].items():
            lines.append(f"| {row['title']} | {name} | {side['ms']:.3f} | {side['ratio']:.3f} |")
    return lines


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--select", default="", help="only titles that contain this text")
    parser.add_argument("--instances", type=int, default=5, help="freshly built pairs")
    parser.add_argument("--blocks", type=int, default=15, help="timed blocks for each pair")
    arguments = parser.parse_args()
    results = measure(arguments.select, arguments.instances, arguments.blocks)
    if not arguments.select:
        write("overhead", "Overhead", machine(), {"results": results}, table(results))


if __name__ == "__main__":
    main()
