"""The smallest and the largest member of every family of `keras.applications`, through everything.

Run `python -m benchmarks.architectures`; it measures each model in a process of its own: quantize
w8a8 and calibrate on random images, one training step, convert, save, reload. The outputs of every
layer, not only the last, must be the same bits after each of the last three. It writes
`architectures.json` and `architectures.md` beside this file after each model, and ends with an
error if one failed. `--select NAME ...` measures these, and keeps the figures of the others.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import applications, layers

import keras_qwrap as qi
from benchmarks.machine import machine

FAMILIES: dict[str, tuple[int, list[str]]] = {
    "VGG": (32, ["VGG16", "VGG19"]),
    "ResNet": (32, ["ResNet50", "ResNet152"]),
    "ResNetV2": (32, ["ResNet50V2", "ResNet152V2"]),
    "MobileNet": (32, ["MobileNet"]),
    "MobileNetV2": (32, ["MobileNetV2"]),
    "MobileNetV3Small": (32, ["MobileNetV3Small"]),
    "MobileNetV3Large": (32, ["MobileNetV3Large"]),
    "DenseNet": (32, ["DenseNet121", "DenseNet201"]),
    "InceptionV3": (75, ["InceptionV3"]),
    "InceptionResNetV2": (75, ["InceptionResNetV2"]),
    "Xception": (71, ["Xception"]),
    "NASNet": (32, ["NASNetMobile", "NASNetLarge"]),
    "EfficientNet": (32, ["EfficientNetB0", "EfficientNetB7"]),
    "EfficientNetV2": (32, ["EfficientNetV2B0", "EfficientNetV2L"]),
    "ConvNeXt": (32, ["ConvNeXtTiny", "ConvNeXtXLarge"]),
}
"""The side of the smallest images of each family, and its smallest and largest member."""

SIDES = {name: side for side, names in FAMILIES.values() for name in names} | {
    # Where images of 32 end as one pixel, batch normalization of four has no statistics to speak
    # of: with dropout between so many blocks, training then differs wildly from inference.
    "EfficientNetB7": 128,
    "EfficientNetV2L": 128,
}
IMAGES, CLASSES = 4, 10
STAGES = ("make", "quantize", "train", "convert", "save", "reload")
FOLDER = pathlib.Path(__file__).parent
ABOUT = f"""\
{IMAGES} random images, {CLASSES} classes, random weights, TensorFlow. Quantized: the share of the
parameters; activations: how many are quantized; bytes: of the weights, as the report counts them,
against float. Seconds of each stage, run once, eagerly; "make" includes settling the statistics of
batch normalization, "quantize" includes calibration. Whatever else runs on the machine slows them.
Peak memory is that of the process, which in the end holds the float, the quantized, the converted
and the reloaded model. Identical: so many layers give the same bits in the last three."""


def network(name: str, images: np.ndarray) -> keras.Model:
    """A random network whose batch normalization has the statistics of the images in inference.

    Without them the outputs of many deep random networks overflow or vanish, quantized or not.
    """
    make = getattr(applications, name)
    shape = images.shape[1:]
    model = make(weights=None, input_shape=shape, classes=CLASSES, classifier_activation=None)
    kinds = {layers.BatchNormalization: "momentum", layers.Dropout: "rate"}
    found = [(layer, kinds[type(layer)]) for layer in model.layers if type(layer) in kinds]
    before = [getattr(layer, name) for layer, name in found]
    for layer, attribute in found:
        setattr(layer, attribute, 0.0)
    model(images, training=True)
    for (layer, attribute), value in zip(found, before, strict=True):
        setattr(layer, attribute, value)
    return model


def every_output(model: keras.Model, images: np.ndarray) -> dict[str, np.ndarray]:
    """What each layer gives for the images, by its name."""
    names = [layer.name for layer in model.layers]
    tapped = keras.Model(model.input, [layer.output for layer in model.layers])
    outputs = tapped(images, training=False)
    return {k: keras.ops.convert_to_numpy(v) for k, v in zip(names, outputs, strict=True)}


def different(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> list[str]:
    """The names of outputs that are not equal, bit for bit; NaN equals NaN."""
    if list(first) != list(second):
        raise ValueError(f"layers {sorted(set(first) ^ set(second))} are in one model only")
    return [name for name in first if not np.array_equal(first[name], second[name], equal_nan=True)]


def left_in_float(report: dict) -> list[dict]:
    """Numbers of weights and parameters in float, for each layer class and reason."""
    found: dict[tuple[str, str], Counter] = {}
    for layer in report["layers"]:
        for weight in layer["left_in_float"]:
            what = "biases" if weight["path"] == "bias" else layer["class_name"]
            reason = weight["reason"].removeprefix(f"{layer['class_name']}: ")
            count = {"weights": 1, "parameters": int(np.prod(weight["shape"]))}
            found.setdefault((what, reason), Counter()).update(count)
    return [{"what": what, "why": why, **count} for (what, why), count in found.items()]


def live(name: str, row: dict) -> None:
    """Take a model through everything; what was found is in the row also when a stage fails."""

    @contextmanager
    def stage(of: str) -> Iterator[None]:
        row["failed"] = of
        start = time.perf_counter()
        yield
        spent = row["seconds"].get(of, 0.0) + time.perf_counter() - start
        row["seconds"][of] = round(spent, 2)

    keras.utils.set_random_seed(0)
    shape = (IMAGES, SIDES[name], SIDES[name], 3)
    images = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
    targets = np.arange(IMAGES) % CLASSES
    with stage("make"):
        model = network(name, images)
    row |= {"layers": len(model.layers), "parameters": model.count_params()}
    row["finite in float"] = bool(np.all(np.isfinite(model(images, training=False))))
    with stage("quantize"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantized = qi.quantize_model(model, "w8a8", images, batch_size=IMAGES, verbose=0)
    row["warnings"] = dict(Counter(_kind(str(warning.message)) for warning in caught))
    with stage("report"):
        report = qi.quantization_report(quantized).to_dict()
    row["totals"], row["left in float"] = report["totals"], left_in_float(report)
    row["weights not in the report"] = len(model.weights) - (
        row["totals"]["quantized_weights"] + row["totals"]["float_weights"]
    )
    before = [keras.ops.convert_to_numpy(v).copy() for v in quantized.trainable_variables]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    quantized.compile(keras.optimizers.SGD(1e-3), loss, run_eagerly=True)
    with stage("train"):
        quantized.train_on_batch(images, targets)
    pairs = zip(before, quantized.trainable_variables, strict=True)
    moved = sum(bool(np.any(old != keras.ops.convert_to_numpy(new))) for old, new in pairs)
    row["trained"] = {"moved": moved, "of": len(before)}
    del before
    with stage("compare"):
        expected = every_output(quantized, images)
    row["finite"] = all(bool(np.all(np.isfinite(output))) for output in expected.values())
    row["compared"] = {
        "tensors": len(expected),
        "numbers": sum(output.size for output in expected.values()),
    }
    with stage("convert"):
        converted = qi.convert_to_inferable(quantized)
    with stage("compare"):
        row["different after converting"] = different(expected, every_output(converted, images))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        with stage("save"):
            converted.save(path)
        with stage("reload"):
            reloaded = keras.models.load_model(path)
    with stage("compare"):
        row["different after reloading"] = different(expected, every_output(reloaded, images))
    row["failed"] = _broken(row)


def _kind(message: str) -> str:
    """A warning without the names in it."""
    return "the activation of ... " + message.split("' ", 1)[-1] if "' " in message else message


def _broken(row: dict) -> str:
    """What is not as it must be, "" if all is."""
    checks = {
        "no weight was trained": not row["trained"]["moved"],
        "outputs differ after converting": row["different after converting"],
        "outputs differ after reloading": row["different after reloading"],
        "the report is not complete": row["weights not in the report"],
        "activations are not calibrated": row["totals"]["uncalibrated_activations"],
    }
    return "; ".join(what for what, wrong in checks.items() if wrong)


def measure(name: str) -> dict:
    """The row of a model; runs in a process of its own."""
    row: dict = {"seconds": {}, "failed": "start"}
    try:
        live(name, row)
    except Exception as error:
        line = str(error).partition("\n")[0]
        row["failed"] = f"{row['failed']}: {type(error).__name__}: {line}"
    row["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def measure_alone(name: str) -> dict:
    """`measure` in a new process, so that memory is that of one model."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, name).result()
        except BrokenProcessPool:
            return {"failed": "the process was killed, probably for want of memory"}


def model_lines(results: dict[str, dict]) -> list[str]:
    """A table with a row for each model."""
    head = ["model", "side", "parameters", "quantized", "activations", "bytes", *STAGES]
    head += ["peak MiB", "identical"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name, side in SIDES.items():
        row = results.get(name, {"failed": "not measured yet"})
        if row["failed"]:
            lines.append(f"| {name} | {side} | {row['failed']} |" + " |" * (len(head) - 3))
            continue
        totals = row["totals"]
        cells = [
            name,
            str(side),
            f"{row['parameters']:,}",
            f"{100 * totals['quantized_parameters'] / row['parameters']:.2f} %",
            str(totals["quantized_activations"]),
            f"1/{totals['ratio']:.2f}",
            *(f"{row['seconds'][stage]:.1f}" for stage in STAGES),
            f"{row['peak MiB']:,}",
            f"{row['compared']['tensors']} outputs" + ("" if row["finite"] else ", not all finite"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def float_lines(results: dict[str, dict]) -> list[str]:
    """A table of what is left in float; families that are alike share a row. Then, why."""
    done = {name: row for name, row in results.items() if not row["failed"]}
    alike: dict[tuple[str, ...], dict[str, list[dict]]] = {}
    why: dict[str, set[str]] = {}
    for family, (_, names) in FAMILIES.items():
        rows = [done[name] for name in names if name in done]
        parts = [part for row in rows for part in row["left in float"]]
        for part in parts:
            why.setdefault(part["what"], set()).add(part["why"])
        if rows:
            kinds = tuple(sorted({part["what"] for part in parts}))
            alike.setdefault(kinds, {})[family] = rows
    lines = ["| families | parameters quantized | left in float |", "| --- | --- | --- |"]
    for kinds, families in alike.items():
        rows = [row for family in families.values() for row in family]
        quantized = _between([(row["totals"]["quantized_parameters"], row) for row in rows])
        parts = [
            f"{kind} {_between([(_in_float(row, kind), row) for row in rows])}" for kind in kinds
        ]
        lines.append(f"| {', '.join(families)} | {quantized} | {', '.join(parts)} |")
    return [*lines, "", *(f"- {kind}: {'; '.join(sorted(why[kind]))}" for kind in sorted(why))]


def _in_float(row: dict, kind: str) -> int:
    return sum(part["parameters"] for part in row["left in float"] if part["what"] == kind)


def _between(counts: list[tuple[int, dict]]) -> str:
    """The smallest and the largest share of a model's parameters."""
    shares = [100 * number / row["parameters"] for number, row in counts]
    low, high = f"{min(shares):.2f}", f"{max(shares):.2f}"
    return f"{high} %" if low == high else f"{low} to {high} %"


def write(results: dict[str, dict]) -> None:
    """The results as JSON, and as tables to read."""
    about = machine()
    text = json.dumps({"machine": about, "results": results}, indent=2)
    (FOLDER / "architectures.json").write_text(text + "\n")
    lines = ["# Architectures", "", "Written by `python -m benchmarks.architectures`.", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += ["", "## Models", "", ABOUT, "", *model_lines(results), ""]
    lines += ["## What is left in float", "", *float_lines(results), ""]
    (FOLDER / "architectures.md").write_text("\n".join(lines))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--select", nargs="+", choices=SIDES, help="only these models")
    selected = parser.parse_args().select
    file = FOLDER / "architectures.json"
    results = json.loads(file.read_text())["results"] if selected and file.exists() else {}
    for name in selected or SIDES:
        results[name] = measure_alone(name)
        print(name, json.dumps(results[name]), flush=True)
        write({known: results[known] for known in SIDES if known in results})
    failed = [name for name, row in results.items() if row["failed"]]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
