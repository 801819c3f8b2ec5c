"""What is to be quantized, and how: targets, methods and configurations."""

import copy
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from keras_qwrap.numerics.channels import Channels, check_bool, check_channel_axis, make_channels
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


def _check_min_threshold(name: str, value: Any) -> float:
    array = float_array(name, value)
    if array.size != 1 or array.item() < 0:
        fix = "Pass 0, for ranges as small as the data, or for example 2**-16."
        raise bad_value(name, value, "one number that is not negative", fix)
    return float(value)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "_quantization_method": as_method,
    "_n_bits": lambda name, value: check_num_bits(value, name),
    "_quantization_params": _plain_params,
    "_channels_axis": lambda name, value: check_channel_axis(value, name),
    "_per_channel_threshold": check_bool,
    "enable_weights_quantization": check_bool,
    "enable_activation_quantization": check_bool,
    "min_threshold": _check_min_threshold,
}
"""Name of an argument, without the word for weights or activation -> its check."""


class _Config:
    """What the two configs share: they differ in a word in the names of their arguments."""

    kind: ClassVar[str]
    """That word."""

    def __post_init__(self) -> None:
        for entry in fields(self):  # type: ignore[arg-type]
            check = _CHECKS[entry.name.removeprefix(self.kind)]
            object.__setattr__(self, entry.name, check(entry.name, getattr(self, entry.name)))

    @property
    def quantization_method(self) -> QuantizationMethod:
        return getattr(self, f"{self.kind}_quantization_method")

    @property
    def grid(self) -> str:
        """The method's name as `numerics` has it."""
        return self.quantization_method.name.lower()

    @property
    def num_bits(self) -> int:
        return getattr(self, f"{self.kind}_n_bits")

    @property
    def params(self) -> dict:
        return getattr(self, f"{self.kind}_quantization_params")

    @property
    def enabled(self) -> bool:
        return getattr(self, f"enable_{self.kind}_quantization")

    def disabled(self) -> Any:
        """This config, with the tensor left in float."""
        return replace(self, **{f"enable_{self.kind}_quantization": False})  # type: ignore[type-var]

    def __repr__(self) -> str:
        values, named = self.given()
        return brief(type(self).__name__, *values, **named)

    def given(self) -> tuple[list, dict]:
        """The method's name and the number of bits; and what differs from its default."""
        cls: Any = type(self)
        plain = cls(self.quantization_method)
        others = [entry.name for entry in fields(cls)][2:]
        named = {name: getattr(self, name) for name in others}
        named = {name: value for name, value in named.items() if value != getattr(plain, name)}
        return [self.quantization_method.name, self.num_bits], named

    def get_config(self) -> dict:
        """The constructor's arguments as plain values: enums by name, tuples as lists."""
        plain: dict[str, Any] = {}
        for entry in fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            value = value.name if isinstance(value, enum.Enum) else value
            plain[entry.name] = list(value) if isinstance(value, tuple) else copy.deepcopy(value)
        return plain

    @classmethod
    def from_config(cls, config: dict) -> Any:
        """The config that `get_config` described."""
        return cls(**config)


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

    kind: ClassVar[str] = "weights"
    weights_quantization_method: QuantizationMethod
    weights_n_bits: int = 8
    weights_quantization_params: dict = field(default_factory=dict)
    enable_weights_quantization: bool = True
    weights_channels_axis: int | tuple[int, ...] = -1
    weights_per_channel_threshold: bool = True
    min_threshold: float = 0.0

    def channels(self, rank: int) -> Channels:
        """The kept axes of a weight of this rank."""
        axes = self.weights_channels_axis
        return make_channels(self.weights_per_channel_threshold, axes, rank)


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

    kind: ClassVar[str] = "activation"
    activation_quantization_method: QuantizationMethod
    activation_n_bits: int = 8
    activation_quantization_params: dict = field(default_factory=dict)
    enable_activation_quantization: bool = True
    min_threshold: float = 0.0
