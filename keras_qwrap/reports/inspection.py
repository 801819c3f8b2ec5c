"""What a saved file holds, read without building anything from it."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import keras
import numpy as np

from keras_qwrap.files.containers import Chain
from keras_qwrap.files.limits import Contents, read_contents
from keras_qwrap.layers.owner import Quantizer, inferable_twin
from keras_qwrap.numerics.checks import bad_value
from keras_qwrap.numerics.packing import expand, histogram, read_header
from keras_qwrap.quantizers.config import QuantizationTarget
from keras_qwrap.reports.rows import measure_activation
from keras_qwrap.reports.text import text_table

_QUANTIZING = ("KerasQuantizationWrapper", "KerasActivationQuantizationHolder", "QuantizedModel")


@dataclass(frozen=True)
class InspectedQuantizer:
    """A quantizer, and the codes that the file holds of its weight.

    Attributes:
        role: path of the weight, `output_0`, or for a `QuantizedModel` `layer: output_0`.
        class_name: the quantizer's.
        num_bits: width of the codes; None if the config does not say.
        range: as in the report: of a weight the least and the greatest threshold or end, of an
            output `(-t, t)` or `(0, t)` for a threshold `t`. None if there is none yet, if the file
            does not hold it, and for quantizers whose classes are not registered.
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
    """What `inspect_file` found; `str` of it is a table, no wider than the terminal.

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
        return "\n".join(
            [
                f"{self.path}: {self.bytes:,} bytes, {self.stored_bytes:,} of them weights",
                f"Keras {self.keras_version or 'of unknown version'}, "
                f"SHA-256 {self.digest + ', checked' if self.digest else 'not recorded'}",
                *(["", *text_table(rows, _STACKS)] if len(rows) > 1 else ["No quantized layers."]),
            ]
        )


_STACKS = ((0, 1), (2, 3), (4, 5), (6, 7), (8,))
"""Columns one above the other in a narrow terminal."""


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

    No layer is built, so that this works without the classes that a model is made of, and for files
    that cannot be loaded. Quantizers whose classes are registered are asked for their ranges, with
    the variables that the file holds.

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
    contents = read_contents(path)
    try:
        layers = list(_layers(contents.config, (), root=True))
        arrays = (_Named if contents.container.legacy else _Numbered)(contents)
        found = tuple(_inspected(chain, name, node, arrays) for chain, name, node in layers)
    except RecursionError as error:
        raise bad_value(
            "path", contents.path, "a config of less depth", "The file is damaged or hostile."
        ) from error
    return InspectedFile(
        contents.path,
        len(contents.container.data),
        contents.keras_version,
        contents.digest,
        sum(array.nbytes for array in contents.arrays.values()),
        found,
    )


_ENDS = ("threshold", "min_range", "max_range")
_FIRST = ("kernel", "depthwise_kernel", "embeddings")
_SECOND = ("recurrent_kernel", "pointwise_kernel")
"""Kernels of Keras' own layers, in the order in which they are stored."""


class _Arrays:
    """The arrays of a file, by the names of the layers that they are in."""

    def __init__(self, contents: Contents) -> None:
        self._packed: dict[tuple[Chain, str], list[np.ndarray]] = {}
        self._named: dict[Chain, dict[str, np.ndarray]] = {}
        around = contents.container.layers_around(contents.arrays)
        for path, array in contents.arrays.items():
            self._named.setdefault(around[path], {})[path.rpartition("/")[2]] = array
            header = read_header(array)
            if header is not None:
                self._packed.setdefault((around[path], header.path), []).append(array)

    def take(self, names: Chain, role: str) -> np.ndarray | None:
        """The stored codes of a weight; each are given once."""
        keys = [key for key in self._packed if key[1] == role and self._packed[key]]
        exact = [key for key in keys if key[0][: len(names)] == names]
        inside = [key for key in keys if key[0][:1] == names[:1] and names[-1] in key[0]]
        found = exact or inside
        return self._packed[found[0]].pop(0) if found else None

    def variables(self, names: Chain) -> list[tuple[str | None, np.ndarray]]:
        """Those of a layer itself, in order, with their names if the file says them."""
        raise NotImplementedError

    def weight(self, names: Chain, role: str, of_keras: bool) -> np.ndarray | None:
        """The floats of a weight inside a layer; None if several arrays can be they."""
        *outer, leaf = role.split("/")
        groups = {
            chain: sorted(key for key, array in arrays.items() if self._may_be(leaf, key, array))
            for chain, arrays in self._named.items()
            if self._is_inside(chain, names, bool(outer))
        }
        groups = {chain: keys for chain, keys in groups.items() if keys}
        # `cell` is called `lstm_cell`, `output_dense` `attention_output`.
        named = [c for c in groups if outer and c[-1].split("_")[-1] == outer[-1].split("_")[0]]
        chains = named or list(groups)
        keys = groups[chains[0]] if len(chains) == 1 else []
        if len(keys) == 2 and of_keras and leaf in (*_FIRST, *_SECOND):
            keys = keys[:1] if leaf in _FIRST else keys[1:]
        return self._named[chains[0]][keys[0]] if len(keys) == 1 else None

    def _may_be(self, leaf: str, key: str, array: np.ndarray) -> bool:
        """Whether an array may be the kernel of that name."""
        return array.ndim > 1 and array.dtype.kind == "f"

    def _is_inside(self, chain: Chain, names: Chain, deep: bool) -> bool:
        """Whether arrays are in the layer that a wrapper is around, or `deep` inside of it."""
        raise NotImplementedError


class _Numbered(_Arrays):
    """In an archive each layer has a group, in which its variables are numbered."""

    def variables(self, names: Chain) -> list[tuple[str | None, np.ndarray]]:
        own = self._named.get(names, {})
        order = sorted(own, key=int) if all(map(str.isdecimal, own)) else own
        return [(None, own[number]) for number in order]

    def _is_inside(self, chain: Chain, names: Chain, deep: bool) -> bool:
        more = len(chain) - len(names)
        return chain[: len(names)] == names and (more > 0 if deep else more == 1)


class _Named(_Arrays):
    """A legacy file has the outermost layers, and in each the paths of variables."""

    def variables(self, names: Chain) -> list[tuple[str | None, np.ndarray]]:
        found = [
            c for c in self._named if len(c) > 1 and c[:1] == names[:1] and c[-1:] == names[-1:]
        ]
        inner = [c for c in found if c[-2] == names[-2]] if len(names) > 1 else []
        return list(self._named.get(min(inner or found, key=len, default=()), {}).items())

    def _may_be(self, leaf: str, key: str, array: np.ndarray) -> bool:
        return key == leaf and super()._may_be(leaf, key, array)

    def _is_inside(self, chain: Chain, names: Chain, deep: bool) -> bool:
        return chain[:1] == names[:1] and set(names[-2:]) <= set(chain)


class _Stored:
    """Stands for a layer in which quantizers create variables: they get those of the file."""

    def __init__(self, variables: list[tuple[str | None, np.ndarray]]) -> None:
        self._variables = variables
        self._prefix, self._weight, self._lacks_weight = "", cast(Any, None), False

    def add_weight(self, name: str, shape: tuple, **_: Any) -> np.ndarray:
        """The next one, or that of this name."""
        wanted = f"{self._prefix}_{name}"
        places = [i for i, (key, _) in enumerate(self._variables) if key in (None, wanted)]
        if not places or self._variables[places[0]][1].shape != tuple(shape):
            raise LookupError(wanted)
        return self._variables.pop(places[0])[1]

    def latent_weight(self, name: str) -> np.ndarray:
        """The floats of the weight, where they were found."""
        self._lacks_weight = self._weight is None
        return self._weight

    def range_of(
        self, quantizer: Quantizer | None, name: str, shape: tuple, floats: np.ndarray | None
    ) -> tuple[float, float] | None:
        """The range of the next quantizer, as in the report; None where it is not known."""
        self._prefix, self._weight, self._lacks_weight = name, floats, False
        if quantizer is None:
            self._forget_numbers()
            return None
        try:
            if quantizer.enabled:
                quantizer.initialize_quantization(shape, name, self)
        except (LookupError, TypeError, ValueError):
            self._forget_numbers()
        if self._lacks_weight:
            return None
        try:
            if quantizer.quantization_target is QuantizationTarget.Activation:
                return measure_activation(name, quantizer).range
            config = inferable_twin(quantizer).get_config()
            return _ends([config[key] for key in _ENDS if key in config])
        except (AttributeError, LookupError, TypeError, ValueError):
            return None

    def _forget_numbers(self) -> None:
        """By number it is not known which variables follow those of an unknown quantizer."""
        self._variables = [pair for pair in self._variables if pair[0] is not None]


def _layers(node: Any, chain: Chain, root: bool = False) -> Iterator[tuple[Chain, str, dict]]:
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


def _inspected(chain: Chain, class_name: str, config: dict, arrays: _Arrays) -> InspectedLayer:
    inner = _dict(config.get("layer", config.get("model")))
    of_keras = str(inner.get("module")).split(".")[0] == "keras"
    names = (*chain, str(config.get("name")))
    weights = [
        (role, node, arrays.take(names, role), arrays.weight(names, role, of_keras))
        for role, node in sorted(_dict(config.get("weights_quantizers")).items())
    ]
    outputs = list(
        _outputs(config.get("activation_quantizers", config.get("activation_holder_quantizer")))
    )
    stored = _Stored(arrays.variables(names))
    quantizers = [
        _quantizer(role, node, stored, packed, floats) for role, node, packed, floats in weights
    ]
    order = list(_dict(config.get("weights_quantizers")))
    quantizers.sort(key=lambda quantizer: order.index(quantizer.role))
    for role, node in outputs:
        if class_name == _QUANTIZING[-1]:
            # It has a holder for each output.
            holder = role.replace(": ", "_").replace("/", "_")
            stored = _Stored(arrays.variables((*chain, holder)))
        quantizers.append(_quantizer(role, node, stored))
    return InspectedLayer(
        "/".join(names),
        class_name,
        inner.get("class_name"),
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


def _quantizer(
    role: str,
    node: Any,
    stored: _Stored,
    packed: np.ndarray | None = None,
    floats: np.ndarray | None = None,
) -> InspectedQuantizer:
    config = _expanded(_dict(_dict(node).get("config")))
    # A trainable quantizer's config has another one inside.
    inner = _dict(config.get("quantization_config", config))
    inner = _dict(inner.get("config", inner))
    bits = next((inner[key] for key in inner if key.endswith(("num_bits", "n_bits"))), None)
    found: dict[str, Any] = {}
    header = None if packed is None else read_header(packed)
    if packed is not None and header is not None:
        found = {"shape": header.shape, "codes": histogram(packed), "bytes": packed.size}
    # Of a weight that is not found the rank is unknown; most ranges do not depend on it.
    shape = found.get("shape", (1,) * 8 if floats is None else floats.shape)
    name = role.rpartition(": ")[2].replace("/", "_")
    ends = stored.range_of(_made(node, config), name, shape, floats)
    return InspectedQuantizer(role, str(_dict(node).get("class_name")), bits, ends, **found)


def _made(node: Any, config: dict) -> Quantizer | None:
    """The quantizer that a config describes, if all classes in it are registered."""
    waiting, names = [node], set()
    while waiting:
        part = waiting.pop()
        if isinstance(part, (dict, list)):
            waiting += part.values() if isinstance(part, dict) else part
        if isinstance(part, dict) and "class_name" in part:
            names.add(str(part.get("registered_name")))
    classes = {name: keras.saving.get_registered_object(name) for name in names}
    cls = classes.get(str(_dict(node).get("registered_name")))
    known = all(isinstance(each, type) for each in classes.values())
    if not known or not isinstance(cls, type) or not issubclass(cls, Quantizer):
        return None
    try:
        return cls.from_config(config)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


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
