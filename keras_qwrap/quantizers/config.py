"""What is to be quantized, and how: targets, methods and configurations."""

import copy
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_qwrap.numerics.channels import check_bool, check_channel_axis
from keras_qwrap.numerics.checks import bad_type, bad_value, brief, nearest
from keras_qwrap.numerics.grids import check_num_bits, float_array

PACKAGE = "keras_qwrap"


class QuantizationTarget(enum.Enum):
    """What a quantizer quantizes.

    Example:

    ```python
    import keras_qwrap as qi

    print(qi.WeightsPOTInferableQuantizer.quantization_target is qi.QuantizationTarget.Weights)
    ```
    """

    Weights = "Weights"
    Activation = "Activation"


class QuantizationMethod(enum.Enum):
    """Which grid a quantizer maps onto.

    `POWER_OF_TWO` and `SYMMETRIC`: codes times a step, zero is code 0. `UNIFORM`: a range with a
    zero point. `LUT_POT_QUANTIZER` and `LUT_SYM_QUANTIZER`: a table of values.

    Example:

    ```python
    import keras_qwrap as qi

    print([method.name for method in qi.WeightsPOTInferableQuantizer.quantization_method])
    ```
    """

    POWER_OF_TWO = "POWER_OF_TWO"
    SYMMETRIC = "SYMMETRIC"
    UNIFORM = "UNIFORM"
    LUT_POT_QUANTIZER = "LUT_POT_QUANTIZER"
    LUT_SYM_QUANTIZER = "LUT_SYM_QUANTIZER"


def check_member(name: str, value: Any, kind: type[enum.Enum]) -> Any:
    """`value` as a member of the enum `kind`; a member's name is accepted, as configs hold it."""
    if isinstance(value, kind):
        return value
    if isinstance(value, str) and value in kind.__members__:
        return kind[value]
    near = f" Nearest: {nearest(value, kind.__members__)}." if isinstance(value, str) else ""
    fix = f"Choose one of {', '.join(kind.__members__)}.{near}"
    raise bad_type(name, value, f"a {kind.__name__}", fix)


def as_method(name: str, value: Any) -> QuantizationMethod:
    """A method, or its name in capitals or small letters, as specs hold it, as a method."""
    known = isinstance(value, str) and value.upper() in QuantizationMethod.__members__
    return check_member(name, value.upper() if known else value, QuantizationMethod)


def _plain_params(name: str, params: Any) -> dict:
    """A copy of a parameter dictionary that holds plain Python values, so that it serializes."""
    if params is None:
        return {}
    if not isinstance(params, Mapping) or any(not isinstance(key, str) for key in params):
        raise bad_type(name, params, "a dictionary with string keys", "Pass for example {}.")
    return {key: _plain(value) for key, value in params.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)) or ops.is_tensor(value):
        return ops.convert_to_numpy(value).tolist()
    return value


def _check_min_threshold(value: Any) -> float:
    array = float_array("min_threshold", value)
    if array.size != 1 or array.item() < 0:
        fix = "Pass 0, for ranges as small as the data, or for example 2**-16."
        raise bad_value("min_threshold", value, "one number that is not negative", fix)
    return float(value)


def _plain_config(config: Any) -> dict:
    """A config dataclass as plain values: enums by name, tuples as lists."""
    plain = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        if isinstance(value, enum.Enum):
            value = value.name
        elif isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, dict):
            value = copy.deepcopy(value)
        plain[entry.name] = value
    return plain


class _Config:
    """What the two configs share: a short repr."""

    def __repr__(self) -> str:
        values, named = self.given()
        return brief(type(self).__name__, *values, **named)

    def given(self) -> tuple[list, dict]:
        """The method's name and the number of bits; and what differs from its default."""
        method, bits, *others = fields(self)  # type: ignore[arg-type]
        named = {entry.name: getattr(self, entry.name) for entry in others}
        kind: Any = type(self)
        plain = kind(getattr(self, method.name))
        named = {name: value for name, value in named.items() if value != getattr(plain, name)}
        return [getattr(self, method.name).name, getattr(self, bits.name)], named


@keras.saving.register_keras_serializable(PACKAGE)
@dataclass(frozen=True, repr=False)
class TrainableQuantizerWeightsConfig(_Config):
    """How a trainable quantizer quantizes a weight.

    Args:
        weights_quantization_method: which grid, or its name.
        weights_n_bits: width of the codes, 2 to 16.
        weights_quantization_params: `{"threshold": ...}`, or `{"range_min": ..., "range_max":
            ...}` for uniform grids: a float, or one for each channel; a quantizer of your own may
            read other keys. Without a range the straight-through quantizers take it from the
            weight at every call.
        enable_weights_quantization: False leaves the weight in float.
        weights_channels_axis: the kept axis, or several.
        weights_per_channel_threshold: a range for each index of the kept axes, or one for all.
        min_threshold: floor under a range that is taken from the weight; a given one must not be
            smaller. With 0 a range is as small as the weight, down to steps of 2**-126.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of its bounds.

    Example:

    ```python
    import keras_qwrap as qi

    config = qi.TrainableQuantizerWeightsConfig(qi.QuantizationMethod.SYMMETRIC, weights_n_bits=4)
    print(config.weights_channels_axis)  # (-1,)
    ```
    """

    weights_quantization_method: QuantizationMethod
    weights_n_bits: int = 8
    weights_quantization_params: dict = field(default_factory=dict)
    enable_weights_quantization: bool = True
    weights_channels_axis: int | tuple[int, ...] = -1
    weights_per_channel_threshold: bool = True
    min_threshold: float = 0.0

    def __post_init__(self) -> None:
        checked = {
            "weights_quantization_method": as_method(
                "weights_quantization_method", self.weights_quantization_method
            ),
            "weights_n_bits": check_num_bits(self.weights_n_bits, "weights_n_bits"),
            "weights_quantization_params": _plain_params(
                "weights_quantization_params", self.weights_quantization_params
            ),
            "enable_weights_quantization": check_bool(
                "enable_weights_quantization", self.enable_weights_quantization
            ),
            "weights_channels_axis": check_channel_axis(
                self.weights_channels_axis, "weights_channels_axis"
            ),
            "weights_per_channel_threshold": check_bool(
                "weights_per_channel_threshold", self.weights_per_channel_threshold
            ),
            "min_threshold": _check_min_threshold(self.min_threshold),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def quantization_method(self) -> QuantizationMethod:
        return self.weights_quantization_method

    @property
    def enabled(self) -> bool:
        return self.enable_weights_quantization

    def get_config(self) -> dict:
        """The constructor's arguments as plain values."""
        return _plain_config(self)

    @classmethod
    def from_config(cls, config: dict) -> "TrainableQuantizerWeightsConfig":
        """The config that `get_config` described."""
        return cls(**config)


@keras.saving.register_keras_serializable(PACKAGE)
@dataclass(frozen=True, repr=False)
class TrainableQuantizerActivationConfig(_Config):
    """How a trainable quantizer quantizes an activation, per tensor.

    Args:
        activation_quantization_method: which grid, or its name.
        activation_n_bits: width of the codes, 2 to 16.
        activation_quantization_params: `{"threshold": ..., "is_signed": ...}`, or `{"range_min":
            ..., "range_max": ...}` for uniform grids; a quantizer of your own may read other keys.
        enable_activation_quantization: False leaves the activation in float.
        min_threshold: floor under a range that is found; a given one must not be smaller. With 0
            a range is as small as the data, down to steps of 2**-126.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of its bounds.

    Example:

    ```python
    import keras_qwrap as qi

    config = qi.TrainableQuantizerActivationConfig(
        qi.QuantizationMethod.POWER_OF_TWO, 8, {"threshold": 4.0, "is_signed": False}
    )
    print(config.activation_n_bits)  # 8
    ```
    """

    activation_quantization_method: QuantizationMethod
    activation_n_bits: int = 8
    activation_quantization_params: dict = field(default_factory=dict)
    enable_activation_quantization: bool = True
    min_threshold: float = 0.0

    def __post_init__(self) -> None:
        checked = {
            "activation_quantization_method": as_method(
                "activation_quantization_method", self.activation_quantization_method
            ),
            "activation_n_bits": check_num_bits(self.activation_n_bits, "activation_n_bits"),
            "activation_quantization_params": _plain_params(
                "activation_quantization_params", self.activation_quantization_params
            ),
            "enable_activation_quantization": check_bool(
                "enable_activation_quantization", self.enable_activation_quantization
            ),
            "min_threshold": _check_min_threshold(self.min_threshold),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def quantization_method(self) -> QuantizationMethod:
        return self.activation_quantization_method

    @property
    def enabled(self) -> bool:
        return self.enable_activation_quantization

    def get_config(self) -> dict:
        """The constructor's arguments as plain values."""
        return _plain_config(self)

    def disabled(self) -> "TrainableQuantizerActivationConfig":
        """This config, with the activation left in float."""
        return replace(self, enable_activation_quantization=False)

    @classmethod
    def from_config(cls, config: dict) -> "TrainableQuantizerActivationConfig":
        """The config that `get_config` described."""
        return cls(**config)
