"""Models that a legacy `.h5` file does not carry: Keras writes it, and cannot load it."""

import inspect
from collections.abc import Iterator
from typing import Any

import keras

from keras_qwrap.layers.remaking import (
    advice,
    classes_of_user,
    loads_by_itself,
    stubborn_classes,
)
from keras_qwrap.models.graph import has_graph
from keras_qwrap.numerics.checks import Told, bad_value, innermost

_LAYERS_TOO = frozenset({"Concatenate", "Softmax"})
"""Functions whose configs, looked up by name alone, are those of layers that do the same."""

_UNREADABLE = ("bfloat16", "float8")
"""How the dtypes begin that are bytes without a meaning in HDF5."""


def refuse_unloadable(model: keras.Model, packed: set[int]) -> None:
    """Refuse a model that no loader reads from HDF5, whatever classes it is given.

    Args:
        model: it is left as it is.
        packed: the `id` of each variable that is written as integer codes.

    Raises:
        ValueError: it is one.
    """
    config = model.get_config()
    if not loads_by_itself(model):
        names = " and ".join(stubborn_classes(model))
        raise _unfit(
            model,
            f"with {names}, whose constructor does not take all that Keras saves of a layer",
            "classes that Keras can make again",
            f"Let {names} take **kwargs and hand them to `super().__init__`.",
        )
    if not (has_graph(model) and "layers" in config):
        _refuse_without_weights(model, config)
    nodes = list(_nodes(config))
    functions = [f"'{node['name']}' ({node['class_name']})" for node in nodes if _is_function(node)]
    if functions:
        more = f" and {len(functions) - 4} more" if functions[4:] else ""
        raise _unfit(
            model,
            f"with functions between its layers: {', '.join(functions[:4])}{more}",
            "layers alone in an HDF5 file",
            f"{_SAVE_AS_KERAS} Layers such as keras.layers.Add may also take their places.",
        )
    for node in nodes:
        _refuse_mistaken_strings(model, node)
    for variable in [v for layer in model.layers for v in layer.weights]:
        dtype = keras.backend.standardize_dtype(variable.dtype)
        if dtype.startswith(_UNREADABLE) and id(variable) not in packed:
            what = f"with the variable '{variable.path}' of dtype {dtype}"
            raise _unfit(model, what, "a dtype that HDF5 knows")


_SAVE_AS_KERAS = "Save it as .keras."


def _unfit(model: keras.Model, what: str, expected: str, fix: str = _SAVE_AS_KERAS) -> ValueError:
    return bad_value("model", Told(f"'{model.name}' {what}"), expected, fix)


def _refuse_without_weights(model: keras.Model, config: dict) -> None:
    """Refuse a model without weights where its class makes it anew: the file holds no shapes."""
    kind = type(model).__name__
    try:
        with keras.saving.custom_object_scope(classes_of_user(model)):
            made = type(model).from_config(config)
    except Exception as error:
        what = f"of class {kind}, which cannot be made of its config ({innermost(error)})"
        expected = "a class that Keras can make again"
        raise _unfit(model, what, expected, advice(model)) from error
    if len(made.weights) != len(model.weights):
        what = f"of class {kind}, which has no graph"
        raise _unfit(model, what, "a Functional or Sequential model in an HDF5 file")


def _nodes(config: Any) -> Iterator[dict]:
    """What stands in the graphs that a config describes, one inside another too."""
    if isinstance(config, dict):
        if "inbound_nodes" in config:
            yield config
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for part in config:
            yield from _nodes(part)


def _is_function(node: dict) -> bool:
    """Whether this is a function of Keras; the classes of a user are found by their names."""
    package, *rooms = str(node["module"]).split(".")
    return package == "keras" and "ops" in rooms and node["class_name"] not in _LAYERS_TOO


def _refuse_mistaken_strings(model: keras.Model, node: dict) -> None:
    """Refuse arguments that Keras takes for its functions of the same name when it loads them.

    Keras 3.13 does not, but then the file would depend on who loads it.
    """
    if node["module"] != "keras.layers":
        return
    for key, value in node["config"].items():
        mistaken = isinstance(value, str) and inspect.isfunction(getattr(keras.layers, value, None))
        if mistaken and key != "name":
            what = f"with {key}={value!r} in layer '{node['name']}'"
            raise _unfit(
                model, what, "in an HDF5 file no argument that names a function of keras.layers"
            )
