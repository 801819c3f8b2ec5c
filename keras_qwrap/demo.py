"""The demo: digits in float, with quantization, converted, saved, reloaded, and compared.

It uses nothing but the public names of the package, and can be read as an example.
"""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import keras_qwrap as qi

ACTIVATION_BITS = 8
BATCH_SIZE = 32
ENDINGS = (".keras", ".h5")
CODES = "their integer codes"
QUANTIZED_TENSORS = ("pixels", "relu_1", "relu_2", "hidden", "logits")

Arrays = dict[str, Any]


@dataclass(frozen=True)
class Quantization:
    """How `build_model` quantizes.

    Args:
        weight_bits: width of the weights' codes.
        ranges: name of a layer whose output is quantized -> smallest and largest value.
    """

    weight_bits: int
    ranges: dict[str, tuple[float, float]]


def build_model(quantization: Quantization | None = None) -> keras.Model:
    """The network, in float or, from the same lines, with quantized weights and activations."""
    layers = keras.layers

    def hold(name: str) -> keras.Layer:
        if quantization is None:
            return layers.Identity(name=name)
        quantizer = _activation_quantizer(*quantization.ranges[name])
        return qi.KerasActivationQuantizationHolder(quantizer, name=name)

    def wrap(layer: keras.Layer, weight: str | None = None) -> keras.Layer:
        if quantization is None:
            return layer
        weights = {weight: _weights_quantizer(quantization.weight_bits)} if weight else {}
        ends = quantization.ranges.get(layer.name)
        outputs = [_activation_quantizer(*ends)] if ends else []
        return qi.KerasQuantizationWrapper(layer, weights, outputs)

    image = keras.Input((8, 8, 1), name="image")
    x = hold("pixels")(image)
    x = wrap(layers.Conv2D(16, 3, padding="same", use_bias=False, name="conv_1"), "kernel")(x)
    x = layers.BatchNormalization(name="norm_1")(x)
    x = wrap(layers.ReLU(name="relu_1"))(x)
    x = wrap(layers.Conv2D(32, 3, 2, padding="same", use_bias=False, name="conv_2"), "kernel")(x)
    x = layers.BatchNormalization(name="norm_2")(x)
    x = wrap(layers.ReLU(name="relu_2"))(x)
    x = layers.Flatten(name="flatten")(x)
    x = wrap(layers.Dense(64, activation="relu", name="hidden"), "kernel")(x)
    x = wrap(layers.Dense(10, name="logits"), "kernel")(x)
    return keras.Model(image, x)


def _weights_quantizer(num_bits: int) -> qi.STEWeightQATQuantizer:
    """Symmetric, with a range for each output channel, taken from the weight at every call."""
    return qi.STEWeightQATQuantizer(
        qi.TrainableQuantizerWeightsConfig(
            qi.QuantizationMethod.SYMMETRIC,
            weights_n_bits=num_bits,
            weights_channels_axis=-1,
            weights_per_channel_threshold=True,
        )
    )


def _activation_quantizer(lowest: float, highest: float) -> qi.STEActivationQATQuantizer:
    """Symmetric where values may be negative, else unsigned with a power of two as threshold."""
    method, threshold, signed = qi.QuantizationMethod.SYMMETRIC, max(-lowest, highest), True
    if lowest >= 0:
        method, signed = qi.QuantizationMethod.POWER_OF_TWO, False
        threshold = 2.0 ** np.ceil(np.log2(highest))
    return qi.STEActivationQATQuantizer(
        qi.TrainableQuantizerActivationConfig(
            method, ACTIVATION_BITS, {"threshold": float(threshold), "is_signed": signed}
        )
    )


def find_ranges(model: keras.Model, images: np.ndarray) -> dict[str, tuple[float, float]]:
    """Smallest and largest value over `images` of every tensor that will be quantized."""
    probe = keras.Model(model.inputs, [model.get_layer(name).output for name in QUANTIZED_TENSORS])
    values = probe.predict(images, verbose=0)
    return {
        name: (float(value.min()), float(value.max()))
        for name, value in zip(QUANTIZED_TENSORS, values, strict=True)
    }


def copy_weights(source: keras.Model, target: keras.Model) -> None:
    """Give every layer of `target` the weights of the layer of that name in the float `source`."""
    for layer in target.layers:
        if isinstance(layer, qi.KerasQuantizationWrapper):
            layer.layer.set_weights(source.get_layer(layer.name).get_weights())
        elif not isinstance(layer, qi.KerasActivationQuantizationHolder):
            layer.set_weights(source.get_layer(layer.name).get_weights())


def load_data(seed: int) -> tuple[tuple, tuple]:
    """Training and test images with their labels: 1437 and 360 digits of 8x8 pixels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images[..., None] / 16).astype("float32")
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits.target, test_size=0.2, random_state=seed, stratify=digits.target
    )
    return (x_train, y_train), (x_test, y_test)


def predict(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """The model's outputs, in one batch."""
    return model.predict(images, batch_size=len(images), verbose=0)


def collect_codes(model: keras.Model) -> Arrays:
    """Integer codes, scales and zero points of every quantized weight."""
    return {
        f"{layer.name}/{path}/{role}": array
        for layer in model.layers
        if isinstance(layer, qi.KerasQuantizationWrapper)
        for path, arrays in layer.get_codes().items()
        for role, array in zip(("codes", "scale", "zero_point"), arrays, strict=True)
    }


@dataclass(frozen=True)
class Result:
    """What a model gives.

    Args:
        outputs: on the test images.
        codes: integer codes, scales and zero points by name; none for the float model.
        size: of its file in bytes, where it has one.
    """

    outputs: np.ndarray
    codes: Arrays
    size: int | None = None

    @property
    def weight_bits(self) -> int:
        """Width that the codes need in two's complement, 32 where there are none."""
        codes = [array for name, array in self.codes.items() if name.endswith("/codes")]
        furthest = [max(int(array.max()), -int(array.min()) - 1) for array in codes]
        return max(furthest).bit_length() + 1 if furthest else 32


def reload(folder: str) -> None:
    """Load the saved models in `folder`, and write what they give beside them.

    The demo calls this in a new process, which knows nothing but the files.
    """
    images = np.load(Path(folder, "images.npy"))
    for ending in ENDINGS:
        model = qi.keras_load_quantized_model(Path(folder, f"model{ending}"), compile=False)
        np.save(Path(folder, f"outputs{ending}.npy"), predict(model, images))
        np.savez(Path(folder, f"codes{ending}.npz"), **collect_codes(model))


def reload_in_new_process(folder: Path) -> dict[str, Result]:
    """What the saved models in `folder` give, by ending."""
    script = "import sys; from keras_qwrap.demo import reload; reload(sys.argv[1])"
    command = [sys.executable, "-c", script, str(folder)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"Reloading failed with {process.returncode}:\n{process.stderr}")
    results = {}
    for ending in ENDINGS:
        with np.load(folder / f"codes{ending}.npz") as file:
            codes = dict(file)
        outputs = np.load(folder / f"outputs{ending}.npy")
        results[ending] = Result(outputs, codes, (folder / f"model{ending}").stat().st_size)
    return results


def compare(results: dict[str, Result]) -> dict[str, bool]:
    """Row of the table -> whether it is bit for bit what the row's model was made from."""
    quantized, converted = results["quantized"], results["converted"]
    reloaded = {name: results[name] for name in results if name.startswith("reloaded")}
    return {
        "converted": np.array_equal(quantized.outputs, converted.outputs),
        **{
            name: np.array_equal(converted.outputs, result.outputs)
            for name, result in reloaded.items()
        },
        CODES: all(_identical(quantized.codes, result.codes) for result in reloaded.values()),
    }


def _identical(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def render(results: dict[str, Result], labels: np.ndarray, same: dict[str, bool]) -> Table:
    """The table that the demo prints."""
    columns = ("", "accuracy", "weight bits", "file size", "outputs identical")
    table = Table(*columns, caption="Files of the converted model hold packed integers.")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, result in results.items():
        accuracy = np.mean(result.outputs.argmax(-1) == labels)
        size = "" if result.size is None else f"{result.size / 1000:.0f} kB"
        table.add_row(name, f"{accuracy:.2%}", str(result.weight_bits), size, _cell(same.get(name)))
    table.add_row(CODES, "", "", "", _cell(same[CODES]))
    return table


def _cell(same: bool | None) -> str:
    return {None: "", True: "yes", False: "no"}[same]


class _Bar(keras.callbacks.Callback):
    """A progress bar over all batches, with the loss of the last epoch."""

    def __init__(self, progress: Progress, title: str, batches: int) -> None:
        super().__init__()
        self.progress = progress
        self.task = progress.add_task(title, total=batches, loss="")

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.progress.advance(self.task)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        self.progress.update(self.task, loss=f"loss {(logs or {})['loss']:.4f}")


def train(
    model: keras.Model, data: tuple, epochs: int, learning_rate: float, title: str, console: Console
) -> None:
    """Fit with Adam and a learning rate that falls to zero, showing a progress bar."""
    batches = epochs * -(-len(data[0]) // BATCH_SIZE)
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, batches)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(schedule), loss)
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = _Bar(progress, title, batches)
        model.fit(*data, batch_size=BATCH_SIZE, epochs=epochs, verbose=0, callbacks=[bar])


def run(bits: int, epochs: int, seed: int, output: str | None = None) -> int:
    """Train, convert, save, reload, compare and print; 1 if any comparison says no, else 0."""
    console = Console()
    keras.utils.set_random_seed(seed)
    data, (images, labels) = load_data(seed)
    model = build_model()
    train(model, data, epochs, 3e-3, "Training in float", console)
    quantized = build_model(Quantization(bits, find_ranges(model, data[0])))
    copy_weights(model, quantized)
    train(quantized, data, max(1, epochs // 2), 1e-3, "Training with quantization", console)
    converted = qi.convert_to_inferable(quantized)
    results = {
        "float": Result(predict(model, images), {}),
        "quantized": Result(predict(quantized, images), collect_codes(quantized)),
        "converted": Result(predict(converted, images), collect_codes(converted)),
    }
    with tempfile.TemporaryDirectory() as folder:
        for ending in ENDINGS:
            qi.save_quantized_model(converted, Path(folder, f"model{ending}"))
            if output is not None:
                shutil.copy(Path(folder, f"model{ending}"), output)
        np.save(Path(folder, "images.npy"), images)
        reloaded = reload_in_new_process(Path(folder))
        results |= {f"reloaded {ending}": result for ending, result in reloaded.items()}
        results["float"] = replace(results["float"], size=_float_size(model, folder))
    same = compare(results)
    console.print(render(results, labels, same))
    return 0 if all(same.values()) else 1


def _float_size(model: keras.Model, folder: str) -> int:
    """Size of a `.keras` file of the float model without its optimizer."""
    copy = build_model()
    copy.set_weights(model.get_weights())
    path = Path(folder, "float.keras")
    copy.save(path)
    return path.stat().st_size
