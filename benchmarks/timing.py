"""Interleaved timing of compiled functions; the same code times Keras 3 and Keras 2."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

SECONDS_A_BLOCK = 0.03
SECONDS_AN_INSTANCE = 4.0
FEWEST_BLOCKS = 3

Run = Callable[[], Any]


def compare(
    makers: Mapping[str, Callable[[], Run]], instances: int, blocks: int
) -> dict[str, dict[str, float]]:
    """Median milliseconds of each side, and the median of its ratio to the first one's.

    Both are medians over all blocks of several freshly made instances; within a block the sides
    run one after the other, in random order. Slow functions get fewer blocks.
    """
    names = list(makers)
    milliseconds: dict[str, list[float]] = {name: [] for name in names}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    order = np.random.default_rng(0)
    for _ in range(instances):
        runs = {name: make() for name, make in makers.items()}
        seconds = {}
        for name, run in runs.items():
            for _ in range(3):
                start = time.perf_counter()
                run()
                seconds[name] = time.perf_counter() - start
        repeats = max(1, int(SECONDS_A_BLOCK / seconds[names[0]]))
        end = time.perf_counter() + SECONDS_AN_INSTANCE
        for done in range(blocks):
            if done >= FEWEST_BLOCKS and time.perf_counter() > end:
                break
            block = {}
            for name in order.permutation(names):
                start = time.perf_counter()
                for _ in range(repeats):
                    runs[name]()
                block[name] = (time.perf_counter() - start) / repeats * 1e3
            for name in names:
                milliseconds[name].append(block[name])
                ratios[name].append(block[name] / block[names[0]])
    return {
        name: {
            "ms": round(float(np.median(milliseconds[name])), 4),
            "ratio": round(float(np.median(ratios[name])), 3),
        }
        for name in names
    }


def training_step(model: Any, optimizer: Any, x: tf.Tensor, y: tf.Tensor, xla: bool) -> Run:
    """A function that runs one compiled training step and waits for it."""
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=xla)
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    return lambda: step(x, y).numpy()


def inference(model: Any, x: tf.Tensor, xla: bool) -> Run:
    """A function that runs the compiled model once and waits for it."""
    call = tf.function(lambda x: tf.reduce_sum(model(x, training=False)), jit_compile=xla)
    return lambda: call(x).numpy()
