"""Models in the files of Sony's MCT, which are Keras 2 models, as models of this package."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any, TypeAlias

import keras
import numpy as np

from keras_qwrap.files.containers import Legacy
from keras_qwrap.files.limits import Contents, checked_contents
from keras_qwrap.files.saving import Allowance, build_model, save_quantized_model
from keras_qwrap.layers.holder import KerasActivationQuantizationHolder
from keras_qwrap.layers.keras_internals import own_variables, part_named, sublayers
from keras_qwrap.layers.owner import FORMAT_VERSION, QuantizingLayer
from keras_qwrap.layers.weights import find_weight, own_weights
from keras_qwrap.layers.wrapper import KerasQuantizationWrapper
from keras_qwrap.models.convert import convert_to_inferable
from keras_qwrap.numerics.checks import Told, bad_value
from keras_qwrap.quantizers import inferable
from keras_qwrap.quantizers.base import BaseKerasInferableQuantizer
from keras_qwrap.quantizers.config import PACKAGE

_WRAPPER, _HOLDER = KerasQuantizationWrapper.__name__, KerasActivationQuantizationHolder.__name__
_QUANTIZERS = {
    name
    for name, value in vars(inferable).items()
    if isinstance(value, type) and issubclass(value, BaseKerasInferableQuantizer)
}
_METADATA = "MetadataLayer"
_MODELS = ("Functional", "Sequential", "Model")
_RENAMED = {"depthwise_kernel": "kernel"}
_DEPTHWISE = ("DepthwiseConv1D", "DepthwiseConv2D")
_UNUSED = (
    "_initializer",
    "_regularizer",
    "_constraint",
    "_shape",
    "implementation",
    "input_length",
)
"""Ends of arguments without effect on outputs, where a layer of Keras 3 does not take them."""

Slots: TypeAlias = "list[keras.Variable | None]"
"""Where stored arrays go; None for the counters that this package does not have."""

Pair: TypeAlias = "tuple[keras.Variable | None, np.ndarray]"


def migrate_mct_file(source: str | os.PathLike, destination: str | os.PathLike) -> None:
    """Save the model of an MCT file as a converted model of this package.

    The file holds a Keras 2 model with mct_quantizers' wrappers, holders and inferable quantizers,
    as MCT exports it. Layers keep their names, weights and quantizers; the layer that holds MCT's
    metadata, and computes nothing, is left out. The weights are quantized by the same grids: a
    value in the middle between two codes may get the other one, and outputs differ by the last bits
    of float32.

    Args:
        source: a `.keras` or `.h5` file that mct_quantizers 1.5 to 1.7 wrote.
        destination: where to, as for `save_quantized_model`.

    Raises:
        OSError: the file does not exist, is damaged, or cannot be written.
        ValueError: it holds no model of MCT, or parts that cannot be migrated; the message names
            them: layers that are no layers of Keras, functions between layers, quantizers that
            are being trained, and quantized constants.

    Example:

    ```python
    import os, tempfile
    import keras_qwrap as qi

    with tempfile.TemporaryDirectory() as folder:
        try:
            qi.migrate_mct_file(os.path.join(folder, "mct.keras"), "model.keras")
        except OSError as error:
            print(str(error).partition("received")[0])  # source:
    ```
    """
    with _called("source"):
        contents = checked_contents(source)
    try:
        model = _migrated(contents)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"source: received '{contents.path}', expected a model as MCT saves it; reading it "
            f"failed with {type(error).__name__}: {str(error)[:400]}. The file is damaged, or was "
            "written by another version."
        ) from error
    with _called("destination"):
        save_quantized_model(convert_to_inferable(model), destination)


@contextmanager
def _called(name: str) -> Iterator[None]:
    """Let errors about the argument `path` of what is called in here speak of `name`."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        if not str(error).startswith("path:"):
            raise
        kind = next(cls for cls in (OSError, TypeError, ValueError) if isinstance(error, cls))
        raise kind(name + str(error).removeprefix("path")) from error


def _migrated(contents: Contents) -> keras.Model:
    """The model of a file, with its weights and not yet converted."""
    config = _without_metadata(contents.config)
    _check_parts(contents.path, config)
    config = _translated(config)
    model = build_model(json.dumps(config), True, Allowance(contents))
    file, arrays = contents.container, contents.arrays
    if isinstance(file, Legacy):
        pairs = list(_from_hdf5(model, file.weights(arrays)))
    else:
        pairs = list(_from_archive(model, _nested(arrays)["layers"]))
    given = [(slot, array) for slot, array in pairs if slot is not None]
    for slot, array in given:
        slot.assign(np.array(array))  # A backend may share memory with what it is given.
    _check_all_given(contents.path, model, {id(slot) for slot, _ in given})
    return model


def _check_all_given(source: str, model: keras.Model, given: set[int]) -> None:
    """Refuse a file that does not have all weights of the model."""
    layers = [layer for layer in sublayers(model) if not isinstance(layer, QuantizingLayer)]
    missing = [v.path for layer in layers for v in own_weights(layer) if id(v) not in given]
    if missing:
        raise bad_value(
            "source",
            source,
            f"arrays for {', '.join(sorted(missing))}",
            "The file is damaged, or these layers are others in Keras 3.",
        )


def _without_metadata(node: Any) -> Any:
    """A config without the layers that only hold MCT's metadata, and stand in no graph."""
    if isinstance(node, dict):
        return {key: _without_metadata(part) for key, part in node.items()}
    if isinstance(node, list):
        return [_without_metadata(part) for part in node if not _is_metadata(part)]
    return node


def _is_metadata(node: Any) -> bool:
    if not isinstance(node, dict) or node.get("inbound_nodes"):
        return False
    return str(node.get("class_name")).rpartition(">")[2] == _METADATA


def _check_parts(source: str, config: Any) -> None:
    """Refuse what cannot be migrated, and what is not MCT's."""
    layers = [node for node in _nodes(config) if "class_name" in node and "config" in node]
    names = {id(node): str(node["class_name"]).rpartition(">")[2] for node in layers}
    own = any(_name_of(node).startswith(f"{PACKAGE}>") for node in layers)
    if own or not any(name in (_WRAPPER, _HOLDER) for name in names.values()):
        fix = "Keras loads other files."
        if own:
            fix = "It is one of this package already: load it by `keras_load_quantized_model`."
        raise bad_value("source", source, "a model with MCT's wrappers or holders", fix)
    wrong = set()
    for node in layers:
        name, inside = names[id(node)], node["config"]
        if name == _WRAPPER and isinstance(inside, dict) and inside.get("weight_values"):
            wrong.add(f"{inside.get('name')} (a quantized constant)")
        if _is_layer(node) and not (
            name in (_WRAPPER, _HOLDER, *_MODELS) or hasattr(keras.layers, name)
        ):
            wrong.add(f"{inside.get('name')} (a {name})")
        wrong |= {
            f"{inside.get('name')} ({key}={value})"
            for key, value in (
                _unknown(name, _renamed(name, inside)) if _is_layer(node) else {}
            ).items()
            if not (
                key.endswith(_UNUSED) or value in (None, False) or (key, value) == ("groups", 1)
            )
        }
        if "Quantizer" in name and name not in _QUANTIZERS:
            wrong.add(name)
    if wrong:
        raise bad_value(
            "source",
            source,
            "a model of Keras' own layers with inferable quantizers",
            f"It cannot be migrated with {', '.join(sorted(wrong))} in it; build it anew on Keras "
            "3, and quantize it with `quantize_model`.",
        )


def _name_of(node: dict) -> str:
    return str(node.get("registered_name") or node["class_name"])


def _is_layer(node: dict) -> bool:
    return isinstance(node["config"], dict) and "name" in node["config"]


def _nodes(node: Any) -> Iterator[dict]:
    """Every dictionary in a config."""
    if isinstance(node, dict):
        yield node
        for part in node.values():
            yield from _nodes(part)
    elif isinstance(node, list):
        for part in node:
            yield from _nodes(part)


def _translated(node: Any) -> Any:
    """A config as Keras 3 and this package have it."""
    if isinstance(node, list):
        return [_translated(part) for part in node]
    if not isinstance(node, dict):
        return node
    node = {key: _translated(part) for key, part in node.items() if key != "build_config"}
    name, config = node.get("class_name"), node.get("config")
    if not isinstance(name, str) or not isinstance(config, dict):
        return node
    name = name.rpartition(">")[2]
    if name in _QUANTIZERS:
        registered = f"{PACKAGE}>{name}"
        return {
            "module": None,
            "class_name": name,
            "registered_name": registered,
            "config": config,
        }
    if name in (_WRAPPER, _HOLDER):
        return node | {
            "module": None,
            "class_name": f"{PACKAGE}>{name}",
            "registered_name": f"{PACKAGE}>{name}",
            "config": _quantizing(name, config),
        }
    if name in _MODELS:
        kept = {key: part for key, part in node.items() if key not in ("module", "registered_name")}
        return kept | {"config": _graph(config)}
    return node | {"config": _plain(name, config)}


def _graph(config: dict) -> dict:
    """The config of a model: Keras 3 counts the calls of a nested model from 0, Keras 2 from 1."""
    layers = config.get("layers")
    if not isinstance(layers, list) or "input_layers" not in config:
        return config
    first = {layer["config"]["name"]: int(layer["class_name"] in _MODELS) for layer in layers}

    def reference(found: Any) -> bool:
        return isinstance(found, list) and len(found) >= 3 and str(found[0]) in first

    def tensor(found: Any) -> Any:
        if reference(found):
            history = [found[0], found[1] - first[found[0]], found[2]]
            inside = {"shape": [None], "dtype": "float32", "keras_history": history}
            return {"class_name": "__keras_tensor__", "config": inside}
        return [tensor(part) for part in found] if isinstance(found, list) else found

    def node(inputs: list) -> dict:
        inputs = [inputs] if reference(inputs) else inputs
        kwargs = {key: tensor(value) for key, value in inputs[0][3].items()}
        tensors = [tensor(found[:3]) for found in inputs]
        return {"args": tensors if len(tensors) == 1 else [tensors], "kwargs": kwargs}

    def end(found: Any) -> Any:
        if reference(found):
            return [found[0], found[1] - first[found[0]], found[2]]
        ends = [end(part) for part in found]
        return ends[0] if len(ends) == 1 else ends

    called = [
        layer | {"inbound_nodes": [node(inputs) for inputs in layer["inbound_nodes"]]}
        for layer in layers
    ]
    ends = {key: end(config[key]) for key in ("input_layers", "output_layers")}
    return config | {"layers": called} | ends


def _quantizing(name: str, config: dict) -> dict:
    """The config of a wrapper or a holder."""
    common = {key: config[key] for key in ("name", "trainable") if key in config}
    common["format_version"] = FORMAT_VERSION
    if name == _HOLDER:
        quantizer = config["activation_holder_quantizer"]
        return common | {"activation_holder_quantizer": quantizer}
    layer = config["layer"]
    renamed = _RENAMED if layer.get("class_name") in _DEPTHWISE else {}
    quantizers = {renamed.get(path, path): q for path, q in config["weights_quantizer"].items()}
    return common | {
        "layer": layer,
        "weights_quantizers": quantizers,
        "activation_quantizers": [],
        "converted": False,
    }


def _plain(name: str, config: dict) -> dict:
    """The config of one of Keras' layers, or of another object of Keras."""
    config = _renamed(name, config)
    unknown = _unknown(name, config)
    config = {key: value for key, value in config.items() if key not in unknown}
    if name == "InputLayer":
        config["batch_shape"] = config.pop("batch_input_shape", None)
    axis = config.get("axis")
    if name == "BatchNormalization" and isinstance(axis, list) and len(axis) == 1:
        config["axis"] = axis[0]
    return config


def _renamed(name: str, config: dict) -> dict:
    if name != "LeakyReLU" or "alpha" not in config:
        return config
    config = dict(config)
    return config | {"negative_slope": config.pop("alpha")}


def _unknown(name: str, config: dict) -> dict:
    """The arguments that a layer of Keras 3 does not take."""
    cls = getattr(keras.layers, name, None)
    if cls is None or name == "InputLayer":
        return {}
    constructors = [base.__init__ for base in cls.__mro__ if "__init__" in vars(base)]
    taken = {key for function in constructors for key in signature(function).parameters}
    return {key: value for key, value in config.items() if key not in taken}


def _from_hdf5(model: keras.Model, saved: dict[str, list[np.ndarray]]) -> Iterator[Pair]:
    """Variables and arrays of a legacy file: a list for each layer, trainable ones first."""
    for layer in model.layers:
        if layer.name in saved:
            trainable, others = _in_order(layer)
            yield from _paired(layer, [*trainable, *others], saved[layer.name])


def _in_order(layer: keras.Layer) -> tuple[Slots, Slots]:
    """Trainable and other variables of a layer in Keras 2's order."""
    if isinstance(layer, keras.Model):
        parts = [_in_order(part) for part in layer.layers]
        return [v for part in parts for v in part[0]], [v for part in parts for v in part[1]]
    if isinstance(layer, KerasActivationQuantizationHolder):
        return [], [None]
    if not isinstance(layer, KerasQuantizationWrapper):
        return list(layer.trainable_weights), list(layer.non_trainable_weights)
    quantized = _quantized(layer)
    inner = layer.layer
    rest = [v for v in inner.trainable_weights if all(v is not taken for taken in quantized)]
    return [*quantized, *rest], [*inner.non_trainable_weights, None]


def _quantized(wrapper: KerasQuantizationWrapper) -> list[keras.Variable]:
    return [find_weight(wrapper.layer, path) for path in wrapper.weights_quantizers]


def _nested(arrays: Mapping[str, np.ndarray]) -> dict:
    """Arrays by path as dictionaries in each other."""
    root: dict = {}
    for path, array in arrays.items():
        *groups, name = path.split("/")
        inner = root
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = array
    return root


def _from_archive(model: keras.Model, saved: dict) -> Iterator[Pair]:
    """Variables and arrays of a `.keras` file: groups as layers are in each other."""
    for layer, group in _listed(model.layers, saved):
        yield from _from_group(layer, group)


def _listed(layers: list, groups: dict) -> Iterator[tuple[Any, dict]]:
    """The group of each layer in a list: they are named by class, and counted."""
    taken: Counter = Counter()
    for layer in layers:
        stem = _snake_case(type(layer).__name__)
        yield layer, groups.get(f"{stem}_{taken[stem]}" if taken[stem] else stem, {})
        taken[stem] += 1


def _from_group(layer: keras.Layer, group: dict) -> Iterator[Pair]:
    if isinstance(layer, keras.Model):
        yield from _from_archive(layer, group.get("layers", {}))
    elif isinstance(layer, KerasActivationQuantizationHolder):
        yield from _paired(layer, [None], _own(group))
    elif isinstance(layer, KerasQuantizationWrapper):
        quantized = _quantized(layer)
        yield from _paired(layer, [*quantized, None], _own(group))
        yield from _from_layer(layer.layer, group.get("layer", {}), quantized)
    else:
        yield from _from_layer(layer, group, [])


def _from_layer(layer: keras.Layer, group: dict, taken: list[keras.Variable]) -> Iterator[Pair]:
    """Those of one of Keras' layers, and of the layers that are its attributes."""
    own = [variable for variables in own_variables(layer) for variable in variables]
    yield from _paired(layer, [v for v in own if all(v is not t for t in taken)], _own(group))
    for name in group:
        part = part_named(layer, name)
        if isinstance(part, keras.Layer):
            yield from _from_layer(part, group[name], taken)
        elif isinstance(part, list):
            for listed, inner in _listed(part, group[name]):
                yield from _from_layer(listed, inner, taken)


def _own(group: dict) -> list[np.ndarray]:
    arrays = group.get("vars", {})
    return [arrays[str(i)] for i in range(len(arrays))]


def _paired(layer: keras.Layer, slots: Slots, arrays: list[np.ndarray]) -> Iterator[Pair]:
    shapes = [() if slot is None else tuple(slot.shape) for slot in slots]
    found = [array.shape for array in arrays]
    if shapes != found:
        raise bad_value(
            "source",
            Told(f"arrays of shapes {found} for layer '{layer.name}'"),
            f"shapes {shapes}",
            "The file is damaged, or this layer is another one in Keras 3.",
        )
    yield from zip(slots, arrays, strict=True)


def _snake_case(name: str) -> str:
    """How Keras names groups: `Conv2DTranspose` is `conv2d_transpose`."""
    return re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()
