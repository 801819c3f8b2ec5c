"""Specs and rules: how weights and activations are quantized, and of which layers otherwise.

Both are plain data; the quantizers that specs describe are made here as well.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import keras
import numpy as np

from keras_qwrap.layers.weights import default_weights
from keras_qwrap.numerics.channels import check_bool, check_channel_axis, make_channels
from keras_qwrap.numerics.checks import bad_type, bad_value, nearest, warn
from keras_qwrap.numerics.grids import check_num_bits
from keras_qwrap.quantizers.base import BaseKerasTrainableQuantizer
from keras_qwrap.quantizers.config import (
    QuantizationMethod,
    QuantizationTarget,
    TrainableQuantizerActivationConfig,
    TrainableQuantizerWeightsConfig,
    as_method,
)
from keras_qwrap.quantizers.marks import offered


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse `value` unless it is one of the names in `choices`."""
    expected = f"one of {list(choices)}"
    if not isinstance(value, str):
        raise bad_type(name, value, expected, "Pass its name.")
    if value not in choices:
        raise bad_value(name, value, expected, f"Nearest: {nearest(value, choices)}.")


def _method_name(value: Any, choices: Iterable[str]) -> str:
    """A method, or its name in any letters, as specs hold it."""
    name = value.name if isinstance(value, QuantizationMethod) else value
    name = name.lower() if isinstance(name, str) else name
    check_choice("method", name, choices)
    return name


def _check_spec(spec: Any, target: QuantizationTarget) -> None:
    """Refuse a spec unless a quantizer of the target offers its method, found by its range."""
    choices = offered(target)
    object.__setattr__(spec, "num_bits", check_num_bits(spec.num_bits))
    methods = list(dict.fromkeys(method for method, _ in choices))
    object.__setattr__(spec, "method", _method_name(spec.method, methods))
    check_choice("range", spec.range, dict.fromkeys(word for _, word in choices))
    if (spec.method, spec.range) not in choices:
        ranges = " or ".join(repr(word) for method, word in choices if method == spec.method)
        others = " or ".join(repr(method) for method, word in choices if word == spec.range)
        fix = f"Choose method {others}, or range {ranges}."
        raise bad_value("range", spec.range, f"{ranges} with method {spec.method!r}", fix)


class Declared:
    """What specs, rules and recipes share: a short repr, and plain dictionaries."""

    def __repr__(self) -> str:
        given = [
            f"{name}={getattr(value, '__qualname__', repr(value))}"
            for name, value in self.given().items()
        ]
        return f"{type(self).__name__}({', '.join(given)})"

    def given(self) -> dict:
        """The arguments that differ from their defaults."""
        values = ((entry, getattr(self, entry.name)) for entry in fields(self))  # type: ignore[arg-type]
        return {
            entry.name: value
            for entry, value in values
            # 1 equals True, and arrays, which may be refused next, cannot be compared to None.
            if type(value) is not type(entry.default) or value != entry.default
        }

    def get_config(self) -> dict:
        """The constructor's arguments as plain values."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_config(cls, config: dict) -> Any:
        """The object that `get_config` described; arguments may be missing, not unknown."""
        if not isinstance(config, Mapping):
            fix = "Pass what `get_config` returned."
            raise bad_type(cls.__name__, config, "a dictionary of its arguments", fix)
        known = [entry.name for entry in fields(cls)]  # type: ignore[arg-type]
        for key in config:
            check_choice(f"key of {cls.__name__}", key, known)
        return cls(**config)


@dataclass(frozen=True, repr=False)
class WeightsSpec(Declared):
    """How a recipe quantizes weights.

    Args:
        num_bits: width of the codes, 2 to 16.
        method: "symmetric", "power_of_two" or "uniform"; or the `QuantizationMethod`.
        per_channel: a range for each output channel, or one for the whole weight.
        range: "weight", taken from the weight at every call; or "mse", found once, when the model
            is quantized: the threshold with the smallest squared error. "mse" finds thresholds,
            which method "uniform" does not have.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of its bounds.

    Example:

    ```python
    from keras_qwrap import WeightsSpec

    print(WeightsSpec(4, per_channel=False))  # WeightsSpec(num_bits=4, per_channel=False)
    ```
    """

    num_bits: int = 8
    method: str | QuantizationMethod = "symmetric"
    per_channel: bool = True
    range: str = "weight"

    def __post_init__(self) -> None:
        _check_spec(self, QuantizationTarget.Weights)
        object.__setattr__(self, "per_channel", check_bool("per_channel", self.per_channel))


@dataclass(frozen=True, repr=False)
class ActivationSpec(Declared):
    """How a recipe quantizes activations, per tensor.

    Args:
        num_bits: width of the codes, 2 to 16.
        method: "uniform", "symmetric" or "power_of_two"; or the `QuantizationMethod`.
        range: how calibration finds the range, now and later: "mse", "minmax", "moving_average",
            "percentile" or "entropy".

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of its bounds.

    Example:

    ```python
    from keras_qwrap import ActivationSpec

    print(ActivationSpec(range="percentile").get_config()["method"])  # uniform
    ```
    """

    num_bits: int = 8
    method: str | QuantizationMethod = "uniform"
    range: str = "mse"

    def __post_init__(self) -> None:
        _check_spec(self, QuantizationTarget.Activation)


def weights_quantizer(
    spec: WeightsSpec,
    channel_axes: int | tuple[int, ...] | None,
    rank: int,
    params: dict | None = None,
) -> BaseKerasTrainableQuantizer:
    """The trainable quantizer of a weight.

    Args:
        spec: how it quantizes.
        channel_axes: the kept axes; None for one range for the whole weight, as it also has where
            all axes would be kept.
        rank: rank of the weight.
        params: `{"threshold": ...}` for range "mse"; None for range "weight".

    Raises:
        TypeError, ValueError: the weight lacks these axes, or `params` do not fit the spec.

    """
    if (spec.range == "mse") != bool(params):
        expected = "a threshold with range 'mse', and nothing with range 'weight'"
        raise bad_value("params", params, expected, f"The spec is {spec}.")
    kept: tuple[int, ...] = ()
    if channel_axes is not None:
        kept = make_channels(True, check_channel_axis(channel_axes), rank).kept
    config = TrainableQuantizerWeightsConfig(
        as_method("method", spec.method),
        spec.num_bits,
        params or {},
        weights_channels_axis=kept or -1,
        weights_per_channel_threshold=spec.per_channel and 0 < len(kept) < rank,
    )
    cls: Any = offered(QuantizationTarget.Weights)[str(spec.method), spec.range]
    return cls.from_spec(config, spec.range)


def activation_quantizer(
    spec: ActivationSpec, pass_whole_numbers: bool = False
) -> BaseKerasTrainableQuantizer:
    """The trainable quantizer of an activation; it has no range before calibration or training.

    With `pass_whole_numbers` it passes its tensor if calibration finds whole numbers alone in it.

    """
    config = TrainableQuantizerActivationConfig(as_method("method", spec.method), spec.num_bits)
    cls: Any = offered(QuantizationTarget.Activation)[str(spec.method), spec.range]
    return cls.from_spec(config, spec.range, pass_whole_numbers)


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
    from keras_qwrap import Rule, WeightsSpec

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
