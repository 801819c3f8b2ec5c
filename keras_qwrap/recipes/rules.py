"""Rules: which layers of a model a recipe treats otherwise, and how."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np

from keras_qwrap.layers.weights import default_weights
from keras_qwrap.numerics.channels import check_bool
from keras_qwrap.numerics.checks import bad_type, bad_value, nearest, warn
from keras_qwrap.recipes.specs import ActivationSpec, Declared, WeightsSpec

FLOAT: Literal["float"] = "float"

SPECS: dict[str, type[Declared]] = {"weights": WeightsSpec, "activations": ActivationSpec}


def check_spec(name: str, spec: Any, cls: type) -> None:
    """Refuse anything but a spec of type `cls` and "float"."""
    if not isinstance(spec, cls) and not (isinstance(spec, str) and spec == FLOAT):
        fix = f"Pass for example {cls.__name__}(4)."
        raise bad_type(name, spec, f"'float' or of type {cls.__name__}", fix)


def with_specs(config: Any) -> Any:
    """`config` with specs where it holds dictionaries that describe them."""
    if not isinstance(config, Mapping):
        return config
    read = {
        name: cls.from_config(config[name])
        for name, cls in SPECS.items()
        if isinstance(config.get(name), Mapping)
    }
    return {**config, **read}


def without_specs(config: dict) -> dict:
    """`config` with dictionaries in the place of specs."""
    return {
        name: value.get_config() if isinstance(value, Declared) else value
        for name, value in config.items()
    }


def _class_names(layer: keras.Layer) -> list[str]:
    return [keras.saving.get_registered_name(base) for base in type(layer).__mro__]


def _checked_name(rule: Any, name: Any) -> str:
    if not isinstance(name, str):
        raise bad_type(f"name of {rule}", name, "a string", "Pass a layer's name.")
    return name


def _checked_pattern(rule: Any, pattern: Any) -> str:
    if not isinstance(pattern, str):
        fix = "Pass for example 'block[0-9]_conv'."
        raise bad_type(f"pattern of {rule}", pattern, "a string", fix)
    try:
        re.compile(pattern)
    except re.error as error:
        wrong = f"Python's `re` says: {error}."
        raise bad_value(f"pattern of {rule}", pattern, "a regular expression", wrong) from error
    return pattern


def _checked_layer_class(rule: Any, layer_class: Any) -> str:
    if isinstance(layer_class, type) and issubclass(layer_class, keras.Layer):
        return keras.saving.get_registered_name(layer_class)
    if isinstance(layer_class, str):
        return layer_class
    fix = "Pass for example keras.layers.Conv2D."
    raise bad_type(f"layer_class of {rule}", layer_class, "a layer class or its name", fix)


def _checked_position(rule: Any, position: Any) -> int:
    if isinstance(position, bool) or not isinstance(position, (int, np.integer)):
        fix = "Pass 0 for the first, -1 for the last."
        raise bad_type(f"position of {rule}", position, "an int", fix)
    return int(position)


def _checked_predicate(rule: Any, predicate: Any) -> Callable:
    if not callable(predicate):
        fix = "Pass for example lambda layer: layer.count_params() < 1000."
        raise bad_type(f"predicate of {rule}", predicate, "a function of a layer", fix)
    return predicate


_MATCHES: dict[str, Callable[[Any, Any], Any]] = {
    "name": _checked_name,
    "pattern": _checked_pattern,
    "layer_class": _checked_layer_class,
    "position": _checked_position,
    "predicate": _checked_predicate,
}
"""Arguments of a rule that say which layers it is for, and what checks each."""


@dataclass(frozen=True, repr=False)
class Rule(Declared):
    """How a recipe treats some layers; exactly one of the first five arguments says which.

    A rule sees the layers of a model and of models inside it, not layers inside other layers. A
    layer goes by its own name or by its path, as the report prints it: `encoder/dense` for `dense`
    in the model `encoder`, in a subclassed model the attributes that lead to it, as in `blocks/0`
    (or the names of the layers on that way). What the report prints after quantization is a `name`
    too: `image_quantizer` for the input `image`; in a subclassed model `net` the name `net` for all
    of it, `net/conv`, and `conv_output_0`.
    A shared layer has the path of its first use. What matches a model inside, by its name, path or
    class, is for all layers in it.

    Args:
        name: the name or path of a layer, or of a model inside.
        pattern: a regular expression that the whole of a name or path matches.
        layer_class: a layer class or its registered name; its subclasses match as well.
        position: 0 for the first layer, -1 for the last, and so on as in a list, among the layers
            that have weights to quantize.
        predicate: a function of a layer that returns True or False; it cannot be saved.
        weights: a `WeightsSpec`, "float" to leave weights in float, or None: as the recipe says.
        activations: an `ActivationSpec`, "float", or None: as the recipe says.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or none or several of the first
            five are given.

    Example:

    ```python
    from keras_qwrap.recipes.rules import Rule
    from keras_qwrap.recipes.specs import WeightsSpec

    print(Rule(pattern="block[0-9]_conv", weights=WeightsSpec(4)))
    print(Rule.leave_in_float(position=0).activations)  # float
    ```
    """

    name: str | None = None
    pattern: str | None = None
    layer_class: type[keras.Layer] | str | None = None
    position: int | None = None
    predicate: Callable[[keras.Layer], bool] | None = None
    weights: WeightsSpec | Literal["float"] | None = None
    activations: ActivationSpec | Literal["float"] | None = None

    def __post_init__(self) -> None:
        given = [match for match in _MATCHES if getattr(self, match) is not None]
        if len(given) != 1:
            fix = "Make a rule of each; the first that matches a layer decides."
            raise bad_value("rule", self, f"exactly one of {', '.join(_MATCHES)}", fix)
        match = given[0]
        object.__setattr__(self, match, _MATCHES[match](self, getattr(self, match)))
        for name, cls in SPECS.items():
            if getattr(self, name) is not None:
                check_spec(f"{name} of {self}", getattr(self, name), cls)

    @classmethod
    def leave_in_float(cls, **match: Any) -> "Rule":
        """A rule that leaves weights and activations in float; `match` says of which layers."""
        return cls(**match, weights=FLOAT, activations=FLOAT)

    def get_config(self) -> dict:
        """The given arguments as plain values; a predicate is refused."""
        if self.predicate is not None:
            fix = "Match by name, pattern, layer_class or position instead."
            expected = "no predicate, since a function cannot be saved"
            raise bad_type(f"predicate of {self}", self.predicate, expected, fix)
        return without_specs(self.given())

    @classmethod
    def from_config(cls, config: dict) -> "Rule":
        """The rule that `get_config` described."""
        try:
            return super().from_config(with_specs(config))
        except (TypeError, ValueError) as error:
            raise type(error)(f"rule {config}: {error}") from error

    def select(self, places: Sequence["Place"]) -> list[int]:
        """Indices of the layers that this rule matches, or whose surroundings it matches.

        Layers inside another one that is listed as well follow what is said of that one.
        """
        listed = {id(place.layer) for place in places}
        units = [[each for each in place.chain if id(each.layer) in listed] for place in places]
        if self.position is not None:
            outer = [unit[0] for unit in units if len(unit) == 1]
            counted = [id(place.layer) for place in outer if default_weights(place.layer)]
            inside = -len(counted) <= self.position < len(counted)
            wanted = {counted[self.position]} if inside else set()
        elif self.predicate is not None:
            layers = {id(place.layer): place.layer for place in places}
            wanted = {key for key, layer in layers.items() if self._answer(layer)}
        else:
            units = [list(place.chain) for place in places]
            found = {id(each.layer): each for unit in units for each in unit}
            wanted = {key for key, place in found.items() if self._matches(place)}
            wanted = wanted or {key for key, place in found.items() if self.name in place.also}
        return [i for i, unit in enumerate(units) if any(id(each.layer) in wanted for each in unit)]

    def _answer(self, layer: keras.Layer) -> bool:
        answer = self.predicate(layer) if self.predicate else False
        return check_bool(f"answer of {self} for layer '{layer.name}'", answer)

    def _matches(self, place: "Place") -> bool:
        if self.name is not None:
            return self.name in place.names
        if self.pattern is not None:
            return any(re.fullmatch(self.pattern, name) for name in place.names)
        return self.layer_class in _class_names(place.layer)

    def matches_nothing(self, places: Sequence["Place"]) -> None:
        """Refuse a name, and warn of anything else, that no layer has."""
        chained = [each for place in places for each in place.chain]
        names = [name for each in chained for name in (*each.names, *each.also)]
        if self.name is not None:
            expected = "the name of a layer of the model or of a model inside it, or its path"
            fix = f"Nearest names: {nearest(self.name, names)}."
            raise bad_value(f"name in {self}", self.name, expected, fix)
        hint = f"The layers are {nearest('', names)}."
        if self.pattern is not None:
            hint = f"Nearest names: {nearest(self.pattern, names)}."
        elif self.layer_class is not None:
            types = {type(each.layer) for place in places for each in place.chain}
            classes = [keras.saving.get_registered_name(cls) for cls in types]
            hint = f"Nearest classes: {nearest(str(self.layer_class), classes)}."
        warn(f"{self} matches no layer of the model. {hint}")


@dataclass(frozen=True)
class Place:
    """Where a layer stands in a model.

    Args:
        layer: the layer.
        path: names of the models around it and its own, joined by `/`; in a subclassed model the
            attributes that lead to it. Of a shared layer, the first.
        around: what it is in, outermost first.
        also: what a report calls what `quantize_model` makes of it; a rule may `name` it so too,
            where no layer of the float model has that name.

    Example:

    ```python
    import keras
    from keras_qwrap.recipes.rules import Place

    encoder = Place(keras.Sequential(name="encoder"), "encoder")
    dense = keras.layers.Dense(2, name="dense")
    print(Place(dense, "encoder/dense", (encoder,)).names[:2])  # ('dense', 'encoder/dense')
    ```
    """

    layer: keras.Layer
    path: str
    around: tuple["Place", ...] = ()
    also: tuple[str, ...] = ()

    @property
    def chain(self) -> tuple["Place", ...]:
        """What it is in, and itself."""
        return (*self.around, self)

    @property
    def names(self) -> tuple[str, ...]:
        """What rules may call it: its name, its path, and the names of all on its way."""
        return self.layer.name, self.path, "/".join(each.layer.name for each in self.chain)


def place_of(layer: keras.Layer | Place) -> Place:
    """The place of a layer that stands alone, under its own name."""
    return layer if isinstance(layer, Place) else Place(layer, layer.name)
