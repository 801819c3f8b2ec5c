"""Recipes: what to quantize in a whole model, and how, as plain data that reads and saves well."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import keras

from keras_qwrap.numerics.channels import check_bool
from keras_qwrap.numerics.checks import bad_type, bad_value, nearest, warn
from keras_qwrap.recipes.rules import (
    FLOAT,
    SPECS,
    ActivationSpec,
    Declared,
    Place,
    Rule,
    WeightsSpec,
    check_spec,
    place_of,
    with_specs,
    without_specs,
)


@dataclass(frozen=True)
class Decision:
    """What a recipe says of one layer.

    Args:
        weights: how its weights are quantized; None leaves them in float.
        activations: how its outputs are quantized; None leaves them in float.
        reason: why something stays in float; "" where nothing does.
        rule: the rule that decided; None where none did.

    """

    weights: WeightsSpec | None
    activations: ActivationSpec | None
    reason: str = ""
    rule: Rule | None = field(default=None, compare=False)


_PRESET = re.compile(
    "w(?P<weights>[1-9][0-9]*)(a(?P<activations>[1-9][0-9]*))?(-(?P<method>[a-z][a-z0-9_]*))?"
)
_METHODS = {
    "": (WeightsSpec(), ActivationSpec()),
    "pot": (WeightsSpec(method="power_of_two"), ActivationSpec(method="power_of_two")),
}
"""What stands after the dash of a preset -> specs, of which the preset gives the bits."""

_COMMON = ("w8a8", "w8", "w8a16", "w16a16", "w4a8", "w4", "w2")
_TAILS = [f"-{method}" if method else "" for method in _METHODS]


def _preset_specs(preset: Any) -> tuple[WeightsSpec, ActivationSpec | Literal["float"]]:
    if not isinstance(preset, str):
        raise bad_type("preset", preset, "a string", "Pass for example 'w8a8'.")
    found = _PRESET.fullmatch(preset)
    if found is None or (found["method"] or "") not in _METHODS:
        bits = re.match("w[1-9][0-9]*(a[1-9][0-9]*)?", preset.lower())
        known = [f"{start}{tail}" for start in ([bits[0]] if bits else _COMMON) for tail in _TAILS]
        plain = re.sub("[^a-z0-9]", "", preset.lower())
        known += [plain] if _PRESET.fullmatch(plain) else []
        ends = " or ".join(filter(None, _TAILS))
        expected = f"w<bits> for weights, then a<bits> for activations or nothing, then {ends} or "
        expected += "nothing, such as 'w8a8'"
        raise bad_value("preset", preset, expected, f"Nearest: {nearest(preset.lower(), known)}.")
    weights, activations = _METHODS[found["method"] or ""]
    try:
        weights = replace(weights, num_bits=int(found["weights"]))
        if found["activations"] is None:
            return weights, FLOAT
        return weights, replace(activations, num_bits=int(found["activations"]))
    except ValueError as error:
        raise ValueError(f"preset {preset!r}: {error}") from error


@dataclass(frozen=True, repr=False)
class Recipe(Declared):
    """What to quantize in a whole model, and how.

    The first rule that matches a layer decides about it as a whole: what that rule does not give
    is as the recipe says, whatever later rules say.

    Args:
        weights: a `WeightsSpec`, or "float".
        activations: an `ActivationSpec`, or "float".
        rules: exceptions, in order.
        fold_batch_norm: fold batch normalization into the layer before it, in float, before
            anything is quantized.
        bias_correction: shift biases by what quantized weights do to the mean of each layer's
            output; `quantize_model` then needs calibration data. `bias.correct_biases` has
            the formula.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or nothing would be quantized.

    Example:

    ```python
    from keras_qwrap import Recipe, Rule

    recipe = Recipe.from_preset("w4a8", rules=[Rule.leave_in_float(position=0)])
    print(recipe.rules)  # (Rule(position=0, weights='float', activations='float'),)
    print(Recipe.from_json(recipe.to_json()) == recipe)  # True
    ```
    """

    weights: WeightsSpec | Literal["float"] = field(default=WeightsSpec())
    activations: ActivationSpec | Literal["float"] = field(default=ActivationSpec())
    rules: Sequence[Rule] = ()
    fold_batch_norm: bool = False
    bias_correction: bool = False

    def __post_init__(self) -> None:
        for name, cls in SPECS.items():
            spec = getattr(self, name)
            if isinstance(spec, str) and _PRESET.fullmatch(spec):
                expected = f"'float' or of type {cls.__name__}"
                fix = f"A preset makes a recipe by Recipe.from_preset({spec!r})."
                raise bad_type(name, spec, expected, fix)
            check_spec(name, spec, cls)
        rules = self.rules
        if not isinstance(rules, (list, tuple)) or any(not isinstance(r, Rule) for r in rules):
            raise bad_type(
                "rules", rules, "a list of Rule objects", "Pass for example [Rule(...)]."
            )
        object.__setattr__(self, "rules", tuple(rules))
        for name in ("fold_batch_norm", "bias_correction"):
            object.__setattr__(self, name, check_bool(name, getattr(self, name)))
        if not any(d.weights or d.activations for d in map(self.decide, (None, *rules))):
            fix = "Give a WeightsSpec or an ActivationSpec, here or in a rule."
            raise bad_value("recipe", self, "something to quantize", fix)

    @classmethod
    def from_preset(cls, preset: str, **options: Any) -> "Recipe":
        """The recipe of a preset `w<bits>[a<bits>][-<method>]`; `options` are further arguments.

        Without `a<bits>` activations stay in float. The method "pot" makes all scales powers of
        two, for hardware that shifts instead of multiplying.
        """
        weights, activations = _preset_specs(preset)
        return cls(weights, activations, **options)

    @property
    def preset(self) -> str | None:
        """The preset that `weights` and `activations` are; None where there is none."""
        if isinstance(self.weights, str):
            return None
        bits = f"w{self.weights.num_bits}"
        if not isinstance(self.activations, str):
            bits += f"a{self.activations.num_bits}"
        names = [f"{bits}{tail}" for tail in _TAILS]
        mine = (self.weights, self.activations)
        return next((name for name in names if _preset_specs(name) == mine), None)

    def get_config(self) -> dict:
        """The constructor's arguments as plain values; a rule with a predicate is refused."""
        rules = [rule.get_config() for rule in self.rules]
        return without_specs(super().get_config() | {"rules": rules})

    @classmethod
    def from_config(cls, config: dict) -> "Recipe":
        """The recipe that `get_config` described."""
        config = with_specs(config)
        if isinstance(config, Mapping) and isinstance(config.get("rules"), (list, tuple)):
            config["rules"] = [
                rule if isinstance(rule, Rule) else Rule.from_config(rule)
                for rule in config["rules"]
            ]
        return super().from_config(config)

    def to_json(self) -> str:
        """This recipe as text to read, to edit, and for `from_json`."""
        return json.dumps(self.get_config(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """The recipe that `to_json` wrote."""
        if not isinstance(text, (str, bytes, bytearray)):
            raise bad_type("text", text, "a recipe in JSON", "Pass what `to_json` returned.")
        try:
            config = json.loads(text, object_pairs_hook=_without_repeated_keys)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise bad_value("text", text, "a recipe in JSON", f"It breaks at: {error}.") from error
        return cls.from_config(config)

    def plan(self, layers: Sequence[keras.Layer | Place]) -> list[Decision]:
        """What is done with each layer of a model, given in the model's order and built.

        Layers that are inside models are given with their places.

        Raises:
            ValueError: a rule names a layer that is not there.

        Warns:
            UserWarning: a rule matches no layer, or has no effect because of earlier rules.
        """
        places = [place_of(layer) for layer in layers]
        deciding: dict[int, Rule] = {}
        for rule in self.rules:
            chosen = rule.select(places)
            if not chosen:
                rule.matches_nothing(places)
            elif all(index in deciding for index in chosen):
                self._check_effect(rule, [deciding[index] for index in chosen])
            deciding = dict.fromkeys(chosen, rule) | deciding
        return [self.decide(deciding.get(index)) for index in range(len(places))]

    def _check_effect(self, rule: Rule, earlier: list[Rule]) -> None:
        """Warn of a rule that never decides, unless the earlier rules decide the same."""
        own = self.decide(rule)
        if any(not _same(self.decide(other), own) for other in earlier):
            others = ", ".join(dict.fromkeys(map(str, earlier)))
            warn(
                f"{rule} has no effect: earlier rules decide about every layer that it matches: "
                f"{others}. Put special rules before general ones."
            )

    def decide(self, rule: Rule | None) -> Decision:
        """What is done with a layer that a rule decides about; None: with all the others."""
        source = f"recipe {self.preset!r}" if self.preset else "recipe"
        specs: dict[str, Any] = {}
        kept: dict[str, list[str]] = {}
        for name in SPECS:
            given = getattr(rule, name, None)
            spec = getattr(self, name) if given is None else given
            specs[name] = None if spec == FLOAT else spec
            if spec == FLOAT:
                kept.setdefault(f"rule {rule}" if given else source, []).append(name)
        reasons = [f"{source}: {' and '.join(what)} stay in float" for source, what in kept.items()]
        return Decision(**specs, reason="; ".join(reasons), rule=rule)


def _same(first: Decision, second: Decision) -> bool:
    return (first.weights, first.activations) == (second.weights, second.activations)


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise bad_value("JSON key", key, "each key once", "Delete one of them.")
    return dict(pairs)


def as_recipe(recipe: "str | dict | Recipe") -> Recipe:
    """A preset, a dictionary as `Recipe.get_config` returns it, or a recipe, as a recipe."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        return Recipe.from_preset(recipe)
    if isinstance(recipe, Mapping):
        return Recipe.from_config(recipe)
    likely = nearest(str(recipe), _COMMON) if isinstance(recipe, int) else "'w8a8'"
    fix = f"Pass for example {likely}."
    raise bad_type("recipe", recipe, "a preset, a Recipe or its config", fix)
