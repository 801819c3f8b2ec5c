"""What a saved file holds, read without building anything from it."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import h5py
import numpy as np

from keras_qwrap.compact import expand
from keras_qwrap.errors import bad_value
from keras_qwrap.file_checks import read_contents
from keras_qwrap.packing import histogram, read_header

_QUANTIZING = ("KerasQuantizationWrapper", "KerasActivationQuantizationHolder", "QuantizedModel")


@dataclass(frozen=True)
class InspectedQuantizer:
    """A quantizer, and the codes that the file holds of its weight.

    Attributes:
        role: path of the weight, `output_0`, or for a `QuantizedModel` `layer: output_0`.
        class_name: the quantizer's.
        num_bits: width of the codes; None if the config does not say.
        range: the least and the greatest of its thresholds or ends, or None.
        shape: of the weight, if its codes are stored.
        codes: the codes that occur, with their counts, or None.
        bytes: of the stored codes, 0 if there are none.
    """

    role: str
    class_name: str
    num_bits: int | None
    range: tuple[float, float] | None
    shape: tuple[int, ...] | None = None
    codes: dict[int, int] | None = None
    bytes: int = 0


@dataclass(frozen=True)
class InspectedLayer:
    """A wrapper, a holder or a `QuantizedModel`, by its path through nested models."""

    path: str
    class_name: str
    inner_class: str | None
    converted: bool
    format_version: Any
    quantizers: tuple[InspectedQuantizer, ...]


@dataclass(frozen=True)
class InspectedFile:
    """What `inspect_file` found; `str` of it is a table.

    Attributes:
        path: the file.
        bytes: its size.
        keras_version: of the Keras that wrote it.
        digest: SHA-256 that `save_quantized_model` recorded, or None; the bytes were checked.
        stored_bytes: of all arrays in the file.
        layers: those that quantize.
    """

    path: str
    bytes: int
    keras_version: str | None
    digest: str | None
    stored_bytes: int
    layers: tuple[InspectedLayer, ...]

    def to_dict(self) -> dict:
        """Everything as plain values, ready for JSON."""
        return json.loads(json.dumps(asdict(self)))

    def __str__(self) -> str:
        head = ("layer", "class", "tensor", "quantizer", "bits", "range", "shape", "codes", "bytes")
        rows: list[tuple[str, ...]] = [head]
        for layer in self.layers:
            name = layer.inner_class or layer.class_name
            rows += [(layer.path, name, *_cells(quantizer)) for quantizer in layer.quantizers]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join(
            [
                f"{self.path}: {self.bytes:,} bytes, {self.stored_bytes:,} of them weights",
                f"Keras {self.keras_version or 'of unknown version'}, "
                f"SHA-256 {self.digest + ', checked' if self.digest else 'not recorded'}",
                *(["", *table] if len(rows) > 1 else ["No quantized layers."]),
            ]
        )


def _cells(quantizer: InspectedQuantizer) -> tuple[str, ...]:
    ends = quantizer.range
    return (
        quantizer.role,
        quantizer.class_name,
        "-" if quantizer.num_bits is None else str(quantizer.num_bits),
        "-" if ends is None else f"{ends[0]:.4g}..{ends[1]:.4g}",
        "x".join(map(str, quantizer.shape or ())),
        "" if quantizer.codes is None else str(len(quantizer.codes)),
        f"{quantizer.bytes:,}" if quantizer.bytes else "",
    )


def inspect_file(path: str | os.PathLike) -> InspectedFile:
    """What a `.keras` or `.h5` file holds: layers, quantizers, codes, sizes, versions, digest.

    Only zipfile, json and h5py read it. Nothing is built, so that this works without the classes
    that a model is made of, and for files that cannot be loaded.

    Args:
        path: the file.

    Raises:
        OSError: there is no such file, it is damaged, or its bytes do not match its digest.
        ValueError: it is neither a `.keras` archive nor an HDF5 file with a model in it.

    Example:

    ```python
    import os, tempfile
    import keras
    import keras_qwrap as qi

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense")])
    converted = qi.convert_to_inferable(qi.quantize_model(model, "w4"))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        qi.save_quantized_model(converted, path)
        (layer,) = qi.inspect_file(path).layers
    print(layer.path, layer.quantizers[0].role, layer.quantizers[0].num_bits)  # dense kernel 4
    ```
    """
    contents = read_contents(path, _arrays)
    arrays, stored = contents.found
    try:
        layers = list(_layers(contents.config, (), root=True))
        found = tuple(_inspected(chain, name, node, arrays) for chain, name, node in layers)
    except RecursionError as error:
        raise bad_value(
            "path", contents.path, "a config of less depth", "The file is damaged or hostile."
        ) from error
    return InspectedFile(
        contents.path,
        len(contents.data),
        contents.keras_version,
        contents.digest,
        stored,
        found,
    )


Arrays = dict[tuple[tuple[str, ...], str], list[np.ndarray]]
"""Stored codes by the names of the layers they are in, and the path of the weight."""


def _arrays(file: h5py.File) -> tuple[Arrays, int]:
    """The stored codes, and the bytes of all arrays."""
    found: Arrays = {}
    stored = 0
    names: list[str] = []
    file.visit(names.append)
    for name in names:
        part = file[name]
        if not isinstance(part, h5py.Dataset):
            continue
        stored += part.nbytes
        if part.dtype == np.uint8 and part.ndim == 1:
            array = part[()]
            header = read_header(array)
            if header is not None:
                found.setdefault((_chain(file, name), header.path), []).append(array)
    return found, stored


def _chain(file: h5py.File, name: str) -> tuple[str, ...]:
    """Names of the layers that an array is in, outermost first."""
    parts = name.split("/")
    if parts[0] == "model_weights":
        return tuple(parts[1:-1])
    groups = ["/".join(parts[:i]) for i in range(1, len(parts))]
    chain = [file[f"{group}/vars"].attrs.get("name") for group in groups if f"{group}/vars" in file]
    return tuple(str(name) for name in chain if name)


def _layers(
    node: Any, chain: tuple[str, ...], root: bool = False
) -> Iterator[tuple[tuple[str, ...], str, dict]]:
    """Names around it, class name and config of each quantizing layer in a config."""
    if isinstance(node, list):
        for part in node:
            yield from _layers(part, chain)
    if not isinstance(node, dict):
        return
    name, config = str(node.get("class_name")).rpartition(">")[2], node.get("config")
    if name in _QUANTIZING and isinstance(config, dict):
        yield chain, name, config
        chain = (*chain, str(config.get("name")))
    elif isinstance(config, dict) and "layers" in config and not root:
        chain = (*chain, str(config.get("name")))
    for part in node.values():
        yield from _layers(part, chain)


def _inspected(
    chain: tuple[str, ...], class_name: str, config: dict, arrays: Arrays
) -> InspectedLayer:
    inner = config.get("layer", config.get("model"))
    names = (*chain, str(config.get("name")))
    weights = config.get("weights_quantizers")
    quantizers = [
        _quantizer(role, node, _take(arrays, names, role))
        for role, node in (weights.items() if isinstance(weights, dict) else ())
    ]
    quantizers += [
        _quantizer(role, node, None)
        for role, node in _outputs(
            config.get("activation_quantizers", config.get("activation_holder_quantizer"))
        )
    ]
    return InspectedLayer(
        "/".join(names),
        class_name,
        inner.get("class_name") if isinstance(inner, dict) else None,
        bool(config.get("converted", False)),
        config.get("format_version"),
        tuple(quantizers),
    )


def _outputs(node: Any) -> Iterator[tuple[str, Any]]:
    """Role and config of each activation quantizer."""
    if isinstance(node, dict) and "class_name" not in node:
        for path, quantizers in node.items():
            yield from ((f"{path}: {role}", each) for role, each in _outputs(quantizers))
    else:
        nodes = node if isinstance(node, list) else [node] if node else []
        yield from ((f"output_{i}", each) for i, each in enumerate(nodes))


def _take(arrays: Arrays, names: tuple[str, ...], role: str) -> np.ndarray | None:
    """The stored codes of a weight; each are given once."""
    keys = [key for key in arrays if key[1] == role and arrays[key]]
    exact = [key for key in keys if key[0][: len(names)] == names]
    inside = [key for key in keys if key[0][:1] == names[:1] and names[-1] in key[0]]
    found = exact or inside
    return arrays[found[0]].pop(0) if found else None


def _quantizer(role: str, node: Any, packed: np.ndarray | None) -> InspectedQuantizer:
    config = _expanded(_dict(_dict(node).get("config")))
    # A trainable quantizer's config has another one inside.
    inner = _dict(config.get("quantization_config", config))
    inner = _dict(inner.get("config", inner))
    bits = next((inner[key] for key in inner if key.endswith(("num_bits", "n_bits"))), None)
    ends = [inner[key] for key in ("threshold", "min_range", "max_range") if key in inner]
    stored: dict[str, Any] = {}
    if packed is not None:
        header = read_header(packed)
        if header is not None:
            stored = {"shape": header.shape, "codes": histogram(packed), "bytes": packed.size}
    return InspectedQuantizer(role, str(_dict(node).get("class_name")), bits, _ends(ends), **stored)


def _dict(node: Any) -> dict:
    return node if isinstance(node, dict) else {}


def _expanded(config: dict) -> dict:
    try:
        return expand(config)
    except ValueError:
        return config


def _ends(values: list) -> tuple[float, float] | None:
    try:
        numbers = [np.asarray(value, np.float64) for value in values if value is not None]
        return min(float(n.min()) for n in numbers), max(float(n.max()) for n in numbers)
    except (TypeError, ValueError):
        return None
