"""Layers and models made again: from their configs, or by constructors that take nothing."""

import inspect
from collections.abc import Mapping
from types import FunctionType, NoneType
from typing import Any

import keras
import numpy as np

from keras_qwrap.layers.keras_internals import is_of_user, sublayers
from keras_qwrap.numerics.checks import Told, bad_value, innermost

_OF_EVERY_LAYER = ("name", "trainable", "dtype")
"""What is in the config of every layer, and what a constructor need not take."""

_OF_TENSORFLOW = "_self_"
"""How attributes begin that checkpoints leave in what they hold."""

_FAILURES = (TypeError, ValueError, NotImplementedError, AttributeError, KeyError)
"""What configs that lack something, or hold too much, end in."""


def made_again(operation: Any) -> Any:
    """A new layer, model or operation of the same class, config and name.

    Classes as tutorials write them can be made again too: without `get_config`, with constructors
    that take neither `name` nor `**kwargs`, registered or not.

    Raises:
        ValueError: it cannot be made again; the message names what its class lacks.
    """
    classes = classes_of_user(operation)
    try:
        config = _as_taken(_config(operation), type(operation), classes)
        with keras.saving.custom_object_scope(classes):
            new = _made(type(operation), config)
    except _FAILURES as error:
        raise _cannot(operation, error) from error
    new.name = operation.name
    if isinstance(operation, keras.Layer):
        _refuse_shared(operation, new)
        _restore(new, _lacking(operation, config))
    return new


def _refuse_shared(given: keras.Layer, made: keras.Layer) -> None:
    own = {id(layer) for layer in sublayers(given)}
    shared = [layer.name for layer in sublayers(made) if id(layer) in own]
    if shared:
        raise bad_value(
            "model",
            Told(f"'{given.name}', whose `get_config` hands out its own layers {shared}"),
            "a config of plain values",
            "Return `keras.saving.serialize_keras_object(layer)`, and define a `from_config` that "
            "deserializes it.",
        )


def serialize_layer(layer: keras.Layer) -> dict[str, Any]:
    """A layer as Keras serializes it, unbuilt, with arguments that its constructor takes.

    What else `deserialize_layer` has to restore is an entry of its own.

    Raises:
        ValueError: as `made_again`.
    """
    cls = type(layer)
    try:
        if _can_be_made_of_nothing(layer):
            found: dict[str, Any] = {
                "module": cls.__module__,
                "class_name": cls.__name__,
                "config": {},
                "registered_name": keras.saving.get_registered_name(cls),
            }
        else:
            found = keras.saving.serialize_keras_object(layer)
    except _FAILURES as error:
        raise _cannot(layer, error) from error
    found.pop("build_config", None)
    config = _as_taken(found["config"], cls, classes_of_user(layer))
    lacking = _lacking(layer, config)
    return found | {"config": config} | ({"attributes": lacking} if lacking else {})


def deserialize_layer(config: Any, custom_objects: Mapping[str, Any] | None = None) -> Any:
    """The layer that `serialize_layer` described; what is no layer is for the caller to refuse."""
    attributes: dict = {}
    if isinstance(config, dict) and "attributes" in config:
        config = dict(config)
        attributes = config.pop("attributes")
    name = config["registered_name"] if attributes else None
    cls = keras.saving.get_registered_object(name, custom_objects=custom_objects)
    if isinstance(cls, type) and issubclass(cls, keras.Layer):
        with keras.saving.custom_object_scope(custom_objects or {}):
            layer = _made(cls, config["config"])
    else:
        layer = keras.saving.deserialize_keras_object(config, custom_objects=custom_objects)
    if isinstance(layer, keras.Layer):
        _restore(layer, attributes)
    return layer


def _made(cls: Any, config: dict) -> Any:
    """What a class makes of a config.

    `from_config` of Keras' own layers adds arguments, which a constructor of the user's refuses.
    """
    plain = all(isinstance(part, (bool, int, float, str, NoneType)) for part in config.values())
    return cls(**config) if plain and _taken(cls) is not None else cls.from_config(config)


def loads_by_itself(layer: keras.Layer) -> bool:
    """Whether Keras can load the layer from what it saves of it."""
    if all(_taken(cls) is None for cls in classes_of_user(layer).values()):
        return True
    return serialize_layer(layer)["config"] == keras.saving.serialize_keras_object(layer)["config"]


def stubborn_classes(layer: keras.Layer) -> list[str]:
    """The classes, among those of a layer that does not load by itself, that are to blame.

    Their constructors do not take what Keras saves of every layer.
    """
    taken = {cls.__name__: _taken(cls) for cls in classes_of_user(layer).values()}
    needed = set(_OF_EVERY_LAYER)
    return sorted(name for name, kept in taken.items() if kept is not None and not needed <= kept)


def classes_of_user(operation: Any) -> dict[str, type]:
    """The classes of the user's among an operation and the layers inside it, by registered name."""
    inside = sublayers(operation) if isinstance(operation, keras.Layer) else [operation]
    classes = {type(layer) for layer in inside if is_of_user(type(layer))}
    return {keras.saving.get_registered_name(cls): cls for cls in classes}


def _owner(cls: type, method: str) -> type:
    return next(base for base in cls.__mro__ if method in vars(base))


def _defines(cls: type, method: str) -> bool:
    """Whether a class has a method of the user's, not that of Keras."""
    return is_of_user(cls) and is_of_user(_owner(cls, method))


def _parameters(cls: type) -> list[inspect.Parameter]:
    """What the constructor of a class of the user's takes."""
    return list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]


def _arguments(cls: type) -> dict[str, inspect.Parameter]:
    """Of these, what a config has to hold; nothing where the constructor is that of Keras."""
    if not _defines(cls, "__init__"):
        return {}
    taken = [part for part in _parameters(cls) if part.kind is not part.VAR_KEYWORD]
    return {part.name: part for part in taken if part.name not in _OF_EVERY_LAYER}


def _taken(cls: type) -> set[str] | None:
    """What may be in the config that a class is made from; None where Keras' config will do."""
    if not is_of_user(cls) or _defines(cls, "from_config") or issubclass(cls, keras.Sequential):
        return None
    parameters = _parameters(cls)
    if any(part.kind is part.VAR_KEYWORD for part in parameters):
        return None
    return {part.name for part in parameters}


def _as_taken(config: dict, cls: type, classes: Mapping[str, type]) -> dict:
    """A config without what the constructors of the class, and of `classes` inside, refuse.

    What a `get_config` of the user's returns is all kept, but for what Keras puts there.
    """
    if all(_taken(each) is None for each in classes.values()):
        return config
    kept, own = _taken(cls), _defines(cls, "get_config")
    return {
        key: _fit(part, classes)
        for key, part in config.items()
        if kept is None or key in kept or (own and key not in _OF_EVERY_LAYER)
    }


def _fit(part: Any, classes: Mapping[str, type]) -> Any:
    if isinstance(part, (list, tuple)):
        return type(part)([_fit(each, classes) for each in part])
    if not isinstance(part, dict):
        return part
    config, cls = part.get("config"), classes.get(str(part.get("registered_name")))
    if cls is not None and isinstance(config, dict):
        return part | {"config": _as_taken(config, cls, classes)}
    return {key: _fit(each, classes) for key, each in part.items()}


def _lacking(layer: keras.Layer, config: Mapping) -> dict[str, Any]:
    """What the config of a layer of the user's does not say of it, though it is in every layer."""
    if not is_of_user(type(layer)) or all(name in config for name in _OF_EVERY_LAYER):
        return {}
    return {"name": layer.name, "trainable": layer.trainable, "dtype": layer.dtype_policy.name}


def _restore(layer: keras.Layer, attributes: Mapping[str, Any]) -> None:
    """Give a new layer what its constructor did not take."""
    if not attributes:
        return
    layer.name = attributes["name"]
    if layer.trainable is not attributes["trainable"]:
        layer.trainable = attributes["trainable"]
    _check_policy(layer, attributes["dtype"])


def _check_policy(layer: keras.Layer, given: str) -> None:
    if layer.dtype_policy.name != given:
        raise bad_value(
            "model",
            Told(f"layer '{layer.name}' with dtype policy {given}"),
            f"{layer.dtype_policy.name}, which a copy made from the model's config has",
            "Set the same global dtype policy again, or let `get_config` return the dtype.",
        )


def refuse_other_policies(given: keras.Layer, made: keras.Layer) -> None:
    """Refuse a copy whose layers have other dtype policies than the given one's."""
    for old, new in zip(sublayers(given), sublayers(made), strict=False):
        _check_policy(new, old.dtype_policy.name)


def _config(operation: Any) -> dict:
    return {} if _can_be_made_of_nothing(operation) else operation.get_config()


def _can_be_made_of_nothing(operation: Any) -> bool:
    """Whether there is no config, and the constructor of the class needs none.

    Keras notes the arguments of a constructor where they are plain values.
    """
    cls = type(operation)
    if not is_of_user(cls) or _defines(cls, "get_config"):
        return False
    try:
        operation.get_config()
    except NotImplementedError:
        needed = [part for part in _arguments(cls).values() if part.default is part.empty]
        return all(part.kind is part.VAR_POSITIONAL for part in needed)
    return False


def _cannot(operation: Any, error: Exception) -> ValueError:
    """The error for what cannot be made again: what went wrong first, and what to do."""
    cause = innermost(error)
    # Of a Lambda, Keras speaks of loading a file, which nobody does.
    silent = isinstance(cause, NotImplementedError) or isinstance(operation, keras.layers.Lambda)
    lines = [] if silent else str(cause).strip().splitlines()
    reason = f" ({lines[0].strip()})" if lines else ""
    return ValueError(
        f"model: received '{operation.name}' of class {type(operation).__name__}, which cannot be "
        f"made again from its config{reason}, expected a config from which its class makes the "
        f"same. {advice(operation)}"
    )


def advice(operation: Any) -> str:
    """The one thing that a class lacks, or what to do without it."""
    cls, name = type(operation), type(operation).__name__
    if isinstance(operation, keras.layers.Lambda):
        if operation.function.__name__ != "<lambda>":
            return "Register its function by `keras.saving.register_keras_serializable`."
        return (
            "Replace the Lambda by a layer class; or call "
            "`keras.config.enable_unsafe_deserialization()` first, which lets Keras copy code."
        )
    if not is_of_user(cls):
        return "Mend the `get_config` of the layers inside."
    arguments = _arguments(cls)
    models = [each for each in arguments if isinstance(getattr(operation, each, None), keras.Model)]
    if models:
        return f"Quantize {' and '.join(models)} by themselves, and make a {name} of the results."
    returned = "{" + ", ".join(f"'{argument}': ..." for argument in arguments) + "}"
    if _defines(cls, "get_config"):
        return f"Let `{name}.get_config` return all that {name}.__init__ takes: {returned}."
    if not arguments:
        return f"Let {name}.__init__ take what differs, and add `get_config` that returns it."
    taken = ", ".join(f"`{argument}`" for argument in arguments)
    return (
        f"{name}.__init__ takes {taken}, which Keras cannot save: add to {name} `get_config` that "
        f"returns {returned}."
    )


def check_layers_alike(source: keras.Layer, target: keras.Layer) -> None:
    """Refuse a built copy whose layers are not those that it was made from.

    Raises:
        ValueError: layers inside differ in class or dtype policy.
    """
    olds, news = sublayers(source), sublayers(target)
    if not any(is_of_user(type(layer)) for layer in olds):
        return
    classes = [[type(layer).__name__ for layer in layers] for layers in (olds, news)]
    if classes[0] != classes[1]:
        raise _not_alike(source, f"layers {_short(classes[0])}", classes[1])
    refuse_other_policies(source, target)


def check_values_alike(source: keras.Layer, target: keras.Layer) -> None:
    """Refuse a copy that has all states of what it was made from, and is another one still.

    Configs may lack arguments (Keras notes the defaults of a model's constructor, not what it was
    given), and constructors may make what is random, or set from outside.

    Raises:
        ValueError: Keras' configs of layers inside differ, or what constructors of the user's set.
    """
    pairs = list(zip(sublayers(source), sublayers(target), strict=True))
    if not any(is_of_user(type(old)) for old, _ in pairs):
        return
    of_keras = vars(keras.Model(name="plain"))
    for old, new in pairs:
        if _is_described_by_keras(old):
            _refuse_differences(source, old, *(_essence(_config(layer)) for layer in (old, new)))
        if _is_automatic(type(old)):
            # The arguments of layers that are no models are in their configs.
            noted = not isinstance(old, keras.Model) and not _can_be_made_of_nothing(old)
            kinds = (np.ndarray,) if noted else _PLAIN
            given, made = (
                {
                    name: value
                    for name, value in vars(layer).items()
                    if not (name in of_keras or name.startswith(_OF_TENSORFLOW))
                    and isinstance(value, kinds)
                }
                for layer in (old, new)
            )
            _refuse_differences(source, old, given, made)


def _is_automatic(cls: type) -> bool:
    """Whether Keras makes the configs of a class of the user's from constructors' arguments."""
    owner = _owner(cls, "get_config")
    return is_of_user(cls) and owner in (keras.Operation, keras.Layer, keras.Model)


def _is_described_by_keras(layer: keras.Layer) -> bool:
    if isinstance(layer, (keras.Model, keras.layers.Lambda)):
        return False
    return _owner(type(layer), "get_config").__module__.split(".")[0] == "keras"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_differences(source: keras.Layer, old: keras.Layer, given: dict, made: dict) -> None:
    for name in given.keys() & made.keys():
        if not _is_equal(given[name], made[name]):
            where = f" in layer '{old.name}'" if old is not source else ""
            raise _not_alike(source, f"{name}={_short(given[name])}{where}", made[name])


def _not_alike(source: keras.Layer, given: str, made: Any) -> ValueError:
    return bad_value(
        "model",
        Told(f"'{source.name}' of class {type(source).__name__} with {given}"),
        f"{_short(made)}, which a copy made again has",
        advice(source),
    )


_INCIDENTAL = (*_OF_EVERY_LAYER, "seed", "build_config", "compile_config")
_PLAIN = (np.ndarray, FunctionType, NoneType, bool, int, float, str)


def _is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, FunctionType) and isinstance(b, FunctionType):
        return (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)
    return np.array_equal(a, b)


def _essence(part: Any) -> Any:
    """A config without what says how the layer is called, built and started."""
    if isinstance(part, dict):
        return {
            key: _essence(each)
            for key, each in part.items()
            if key not in _INCIDENTAL and not str(key).endswith("initializer")
        }
    if isinstance(part, (list, tuple)):
        return [_essence(each) for each in part]
    return part.tolist() if isinstance(part, np.ndarray) else part
