"""Sizes of saved models, and the time to load them.

Run `python -m benchmarks.files`; it writes `files.json` and `files.md` beside this file. Sizes are
those of a converted model at 8, 4, 3 and 2 bits and of the float one, against a limit: the packed
codes, float32 for all that is not quantized, 8 KiB for each wrapped layer, and 3 %. Loads run
interleaved, in random order, in one process; a ratio is the median over all blocks.
"""

import argparse
import os
import tempfile
from functools import partial

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import keras_qwrap as qi
from benchmarks.machine import machine, write
from benchmarks.timing import compare

BITS = (8, 4, 3, 2)
ENDINGS = (".keras", ".h5")


def convolutions() -> keras.Model:
    """Eight convolutions with batch normalization, and a head; 2.4 million quantized weights."""
    inputs = x = keras.Input((32, 32, 3))
    for i, filters in enumerate((64, 64, 128, 128, 256, 256, 256, 256)):
        x = layers.Conv2D(filters, 3, 2 if i in (2, 4) else 1, "same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    outputs = layers.Dense(10)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, outputs, name="convolutions")


def perceptron() -> keras.Model:
    """Three wide layers, with a range for each of their 2058 outputs; 1.9 million weights."""
    widths = [layers.Dense(1024, activation="relu") for _ in range(2)]
    return keras.Sequential([keras.Input((784,)), *widths, layers.Dense(10)], name="perceptron")


def limit(converted: keras.Model) -> tuple[int, float]:
    """How many weights are quantized, and the bytes that a file should not exceed."""
    wrappers = [layer for layer in converted.layers if hasattr(layer, "get_codes")]
    packed = quantized = own = 0
    for wrapper in wrappers:
        for path, (codes, _, _) in wrapper.get_codes().items():
            quantized += codes.size
            packed += codes.size * wrapper.weights_quantizers[path].num_bits / 8
        own += sum(v.value.shape.num_elements() for v in wrapper.variables)
        own -= sum(v.value.shape.num_elements() for v in wrapper.layer.variables)
    every = sum(v.value.shape.num_elements() for v in converted.variables)
    others = 4 * (every - quantized - own)
    return quantized, 1.03 * (packed + others + 8192 * len(wrappers))


def sizes(model: keras.Model, folder: str) -> list[dict]:
    """A row for each width and format."""
    rows = []
    for ending in ENDINGS:
        path = os.path.join(folder, f"float{ending}")
        model.save(path)
        in_float = os.path.getsize(path)
        for bits in BITS:
            converted = qi.convert_to_inferable(qi.quantize_model(model, f"w{bits}"))
            path = os.path.join(folder, f"{model.name}_{bits}{ending}")
            converted.save(path)
            quantized, most = limit(converted)
            size = os.path.getsize(path)
            rows.append(
                {
                    "model": model.name,
                    "quantized weights": quantized,
                    "bits": bits,
                    "format": ending,
                    "bytes": size,
                    "of the limit": round(size / most, 3),
                    "float bytes": in_float,
                    "times smaller": round(in_float / size, 2),
                }
            )
            print(rows[-1], flush=True)
    return rows


def loads(model: keras.Model, folder: str, instances: int, blocks: int) -> dict:
    """Milliseconds to load the float and the packed 8-bit file, and a sealed one of each."""
    paths = {name: os.path.join(folder, f"{name}.keras") for name in ("float", "packed")}
    converted = qi.convert_to_inferable(qi.quantize_model(model, "w8"))
    model.save(paths["float"])
    converted.save(paths["packed"])
    sealed = {name: os.path.join(folder, f"sealed_{name}.keras") for name in paths}
    qi.save_quantized_model(model, sealed["float"])
    qi.save_quantized_model(converted, sealed["packed"])
    plain, checked = keras.models.load_model, qi.keras_load_quantized_model
    sides = {
        "load_model, float": partial(plain, paths["float"]),
        "load_model, float again": partial(plain, paths["float"]),
        "load_model, packed": partial(plain, paths["packed"]),
        "keras_load_quantized_model, float": partial(checked, sealed["float"]),
        "keras_load_quantized_model, packed": partial(checked, sealed["packed"]),
    }
    makers = {name: partial(lambda load: load, load) for name, load in sides.items()}
    return compare(makers, instances, blocks)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=3, help="rounds of loading")
    parser.add_argument("--blocks", type=int, default=10, help="timed blocks in each round")
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    rows, times = [], {}
    for model in (convolutions(), perceptron()):
        for variable in model.variables:
            variable.assign(np.random.default_rng(0).normal(size=variable.shape))
        with tempfile.TemporaryDirectory() as folder:
            rows += sizes(model, folder)
            times[model.name] = loads(model, folder, options.instances, options.blocks)
            print(times[model.name], flush=True)
    tables = [f"| {' | '.join(rows[0])} |", "| --- " * len(rows[0]) + "|"]
    tables += [f"| {' | '.join(map(str, row.values()))} |" for row in rows]
    tables += ["", "| model | loaded by | ms | ratio to the first |", "| --- " * 4 + "|"]
    tables += [
        f"| {model} | {side} | {found['ms']} | {found['ratio']} |"
        for model, sides in times.items()
        for side, found in sides.items()
    ]
    write("files", "Saved files", machine(), {"sizes": rows, "loads": times}, tables)


if __name__ == "__main__":
    main()
