"""How weights and activations are quantized, as plain data; and the quantizers made from it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from keras_qwrap.numerics.channels import check_bool, check_channel_axis, make_channels
from keras_qwrap.numerics.checks import bad_type, bad_value, nearest
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
    from keras_qwrap.recipes.specs import WeightsSpec

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
    from keras_qwrap.recipes.specs import ActivationSpec

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

    Example:

    ```python
    from keras_qwrap.recipes.specs import WeightsSpec, weights_quantizer

    quantizer = weights_quantizer(WeightsSpec(4), channel_axes=-1, rank=2)
    print(quantizer.quantization_config.weights_n_bits)  # 4
    ```
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

    Example:

    ```python
    from keras_qwrap.recipes.specs import ActivationSpec, activation_quantizer

    quantizer = activation_quantizer(ActivationSpec(num_bits=4))
    print(quantizer.quantization_config.activation_n_bits)  # 4
    ```
    """
    config = TrainableQuantizerActivationConfig(as_method("method", spec.method), spec.num_bits)
    cls: Any = offered(QuantizationTarget.Activation)[str(spec.method), spec.range]
    return cls.from_spec(config, spec.range, pass_whole_numbers)
