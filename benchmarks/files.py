"""Sizes of saved models, and the time to load them.

Run `python -m benchmarks.files`; it writes `files.json` and `files.md` beside this file. Sizes are
those of a converted model at 8, 4, 3 and 2 bits and of the float one, against a limit: the packed
codes, float32 for all that is not quantized, 8 KiB for each wrapped layer, and 3 %. Plain
`model.save` packs `.keras` alone. With them are the sizes of `mct.json`, where `benchmarks.mct` has
written it. Loads run interleaved, in random order, in one process; a ratio is the median over all
blocks. Small files are those of 50 Dense layers, a `Sequential` and a Functional model; `--loads`
measures these alone. `inspect_file` reads 100 MB of codes; `--inspect` measures that alone.
"""

import argparse
import json
import os
import tempfile
import time
from functools import partial

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import keras_qwrap as qi
from benchmarks.machine import FOLDER, machine, write
from benchmarks.stored import BITS, ENDINGS, stored_models
from benchmarks.timing import compare

SAVERS = {"model.save": keras.Model.save, "save_quantized_model": qi.save_quantized_model}


def limits(converted: keras.Model) -> tuple[int, float, float]:
    """How many weights are quantized, and the bytes that a file should not exceed.

    In the first limit the 8 KiB of a layer are also for its scales; in the second scales are part
    of what is not quantized.
    """
    wrappers = [layer for layer in converted.layers if hasattr(layer, "get_codes")]
    packed = quantized = scales = 0
    for wrapper in wrappers:
        for path, (codes, scale, _) in wrapper.get_codes().items():
            quantized += codes.size
            scales += scale.size
            packed += codes.size * wrapper.weights_quantizers[path].num_bits / 8
    others = 4 * (converted.count_params() - quantized - scales)
    most = packed + others + 8192 * len(wrappers)
    return quantized, 1.03 * most, 1.03 * (most + 4 * scales)


def sizes(model: keras.Model, folder: str) -> list[dict]:
    """A row for each width, format and way to save."""
    rows = []
    peer = mct_sizes()
    for ending in ENDINGS:
        path = os.path.join(folder, f"model{ending}")
        model.save(path)
        in_float = os.path.getsize(path)
        for bits in BITS:
            converted = qi.convert_to_inferable(qi.quantize_model(model, f"w{bits}", verbose=0))
            quantized, most, with_scales = limits(converted)
            for saver, save in SAVERS.items():
                if ending == ".h5" and save is keras.Model.save:
                    continue  # That holds floats.
                save(converted, path)
                size = os.path.getsize(path)
                row = {
                    "model": model.name,
                    "quantized weights": quantized,
                    "bits": bits,
                    "format": ending,
                    "saved by": saver,
                    "bytes": size,
                    "of the limit": round(size / most, 3),
                    "scales counted": round(size / with_scales, 3),
                    "float bytes": in_float,
                    "times smaller": round(in_float / size, 2),
                }
                if peer:
                    row["mct_quantizers"] = peer[model.name, bits, ending]
                rows.append(row)
                print(row, flush=True)
    return rows


def mct_sizes() -> dict[tuple[str, int, str], int]:
    """Bytes of mct_quantizers' files, by model, bits and format; none without `mct.json`."""
    path = FOLDER / "mct.json"
    rows = json.loads(path.read_text())["sizes"] if path.exists() else []
    return {(row["model"], row["bits"], row["format"]): row["bytes"] for row in rows}


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


def small_models() -> list[keras.Model]:
    """The same 50 layers as a `Sequential` and as a Functional model."""
    parts = [layers.Dense(32, activation="relu") for _ in range(50)]
    sequential = keras.Sequential([keras.Input((32,)), *parts], name="Sequential")
    inputs = x = keras.Input((32,))
    for _ in range(50):
        x = layers.Dense(32, activation="relu")(x)
    return [sequential, keras.Model(inputs, x, name="Functional")]


def small_loads(model: keras.Model, folder: str, instances: int, blocks: int) -> dict:
    """Milliseconds to load the float file of small layers, and sealed ones of w8 and w8a8."""
    plain, checked = keras.models.load_model, qi.keras_load_quantized_model
    path = os.path.join(folder, "float.keras")
    model.save(path)
    sides = {name: partial(plain, path) for name in ("load_model, float", "float again")}
    data = np.random.default_rng(0).normal(size=(64, 32)).astype("float32")
    for recipe in ("w8", "w8a8"):
        given = data if recipe == "w8a8" else None
        converted = qi.convert_to_inferable(qi.quantize_model(model, recipe, given, verbose=0))
        path = os.path.join(folder, f"{recipe}.keras")
        qi.save_quantized_model(converted, path)
        sides[f"load_model, {recipe}"] = partial(plain, path)
        sides[f"keras_load_quantized_model, {recipe}"] = partial(checked, path)
    return compare(
        {name: lambda load=load: load for name, load in sides.items()}, instances, blocks
    )


def inspections(folder: str) -> list[dict]:
    """Seconds that `inspect_file` takes for files of 100 MB, imports aside."""
    wide = [layers.Dense(4096, use_bias=False) for _ in range(6)]
    model = keras.Sequential([keras.Input((4096,)), *wide])
    converted = qi.convert_to_inferable(qi.quantize_model(model, "w8", verbose=0))
    rows = []
    for ending in ENDINGS:
        path = os.path.join(folder, f"large{ending}")
        qi.save_quantized_model(converted, path)
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            qi.inspect_file(path)
            seconds.append(time.perf_counter() - start)
        megabytes = round(os.path.getsize(path) / 1e6, 1)
        rows.append(
            {"inspect_file": ending, "MB": megabytes, "s": round(float(np.median(seconds)), 2)}
        )
        print(rows[-1], flush=True)
    return rows


def table(rows: list[dict]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(rows[0])} |", "| --- " * len(rows[0]) + "|"]
    return [*lines, *(f"| {' | '.join(map(str, row.values()))} |" for row in rows)]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=3, help="rounds of loading")
    parser.add_argument("--blocks", type=int, default=10, help="timed blocks in each round")
    parser.add_argument("--inspect", action="store_true", help="only measure inspect_file")
    parser.add_argument("--loads", action="store_true", help="only measure small files")
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    small = {}
    for model in [] if options.inspect else small_models():
        with tempfile.TemporaryDirectory() as folder:
            found = small_loads(model, folder, options.instances, options.blocks)
        small[f"50 Dense, {model.name}"] = found
        print(small, flush=True)
    if options.loads:
        return
    with tempfile.TemporaryDirectory() as folder:
        inspected = inspections(folder)
    if options.inspect:
        return
    rows, times = [], {}
    for model in stored_models(keras):
        with tempfile.TemporaryDirectory() as folder:
            rows += sizes(model, folder)
            times[model.name] = loads(model, folder, options.instances, options.blocks)
            print(times[model.name], flush=True)
    loaded = [
        {"model": model, "loaded by": side, "ms": found["ms"], "ratio to the first": found["ratio"]}
        for model, sides in (times | small).items()
        for side, found in sides.items()
    ]
    tables = [*table(rows), "", *table(loaded), "", *table(inspected)]
    data = {"sizes": rows, "loads": times | small, "inspections": inspected}
    write("files", "Saved files", machine(), data, tables)


if __name__ == "__main__":
    main()
