"""Rows of the report: what there is to say of one weight, one activation, one layer."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_qwrap.quantizers.config import QuantizationMethod
from keras_qwrap.quantizing_layer import Quantizer, inferable_twin
from keras_qwrap.tensors import to_numpy

Ends = tuple[float, float]


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that has a quantizer. None: unknown, since the quantizer does not say.

    Attributes:
        path: its path in the layer, such as `kernel`.
        num_bits: width of the codes.
        method: name of the `QuantizationMethod`.
        granularity: "per channel" or "per tensor".
        ranges: how many ranges there are.
        range: smallest and largest threshold, or for UNIFORM the lowest minimum and the highest
            maximum.
        codes_used: how many distinct codes occur in the weight.
        codes_total: how many codes there are.
        sqnr_db: `10 log10(sum w^2 / sum (w - q)^2)` of the latent weight `w` and the quantized
            weight `q`; inf where they are equal, None where conversion has replaced `w` by `q`.
        bytes_before: 4 for each number.
        bytes_after: packed codes, `ceil(numbers * num_bits / 8)`, and 4 bytes for each threshold,
            8 for the minimum and maximum of each UNIFORM range, and the packed table of a lookup
            quantizer; as before where `num_bits` is unknown.
    """

    path: str
    shape: tuple[int, ...]
    num_bits: int | None
    method: str | None
    granularity: str | None
    ranges: int | None
    range: Ends | None
    codes_used: int | None
    codes_total: int | None
    sqnr_db: float | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantizedActivation:
    """An output that has a quantizer. None: unknown.

    Attributes:
        name: `output_0`, `output_1`, ...
        range: ends of the grid: minimum and maximum, `(-t, t)` for a threshold `t`, `(0, t)` where
            the codes are unsigned.
        state: "quantized", "not calibrated" or "disabled"; only the first one is counted.
    """

    name: str
    num_bits: int | None
    method: str | None
    range: Ends | None
    state: str


@dataclass(frozen=True)
class FloatWeight:
    """A weight that has no quantizer, and why; float ones count 4 bytes for each number."""

    path: str
    shape: tuple[int, ...]
    bytes: int
    reason: str


@dataclass(frozen=True)
class UnquantizedOutputs:
    """The outputs of a layer or function that have no quantizer, and why.

    Attributes:
        state: "fused": it runs in one integer kernel with the layers that read it, and one
            quantizer stands behind all; "as its input": it carries the grid of its input, where
            that has one; "as its weights": entries of quantized weights; "no float": integers,
            for example; "float": what is left in float.
        fused_into: the names of the layers that read it, where `state` is "fused".
    """

    state: str
    reason: str
    fused_into: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerReport:
    """A layer that has weights, quantizers or outputs; a function between layers; an input.

    Attributes:
        path: names of the models and layers around it and its own, joined by `/`.
        class_name: of the layer itself, not of its wrapper.
        wrapped: whether a wrapper, or a holder, owns the quantizers.
        converted: whether the weights were replaced by quantized ones.
        outputs: None where a quantizer stands behind all of them, and where they are not known,
            since there is no graph.
    """

    path: str
    class_name: str
    wrapped: bool
    converted: bool
    weights: tuple[QuantizedWeight, ...] = ()
    activations: tuple[QuantizedActivation, ...] = ()
    left_in_float: tuple[FloatWeight, ...] = ()
    outputs: UnquantizedOutputs | None = None


def ask(question: Callable, *args: Any) -> Any:
    """What a quantizer answers; None where it does not know, as one of a user may not."""
    try:
        return question(*args)
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError):
        return None


def measure_weight(
    path: str, variable: keras.Variable, quantizer: Quantizer, quantized: np.ndarray | None
) -> QuantizedWeight:
    """What there is to say of a weight; `quantized` is its quantized value, None if unknown."""
    shape, w = tuple(variable.shape), to_numpy(variable).astype(np.float32)
    twin: Any = ask(inferable_twin, quantizer)
    config = ask(lambda: dict(twin.get_config())) or {}
    num_bits, method = _num_bits(quantizer, twin), _method(quantizer)
    ranges = ask(lambda: int(np.size(twin.scale)))
    codes = ask(lambda: np.asarray(twin.quantize_to_codes(w)))
    before = after = 4 * w.size
    if num_bits is not None:
        ends = 2 if method == QuantizationMethod.UNIFORM.name else 1
        table = len(config.get("lut_values", ())) * config.get("lut_values_bitwidth", 0)
        after = -(-w.size * num_bits // 8) + 4 * ends * (ranges or 0) + -(-table // 8)
    return QuantizedWeight(
        path=path,
        shape=shape,
        num_bits=num_bits,
        method=method,
        granularity=_granularity(ranges, config),
        ranges=ranges,
        range=ask(_weight_range, config),
        codes_used=None if codes is None else len(np.unique(codes)),
        codes_total=None if codes is None else ask(_number_of_codes, num_bits, config),
        sqnr_db=None if quantized is None else _sqnr_db(w, quantized),
        bytes_before=before,
        bytes_after=after,
    )


def _granularity(ranges: int | None, config: dict) -> str | None:
    if ranges is None:
        return None
    return "per channel" if config.get("per_channel", ranges > 1) else "per tensor"


def _weight_range(config: dict) -> Ends | None:
    low, high = ("threshold",) * 2 if "threshold" in config else ("min_range", "max_range")
    return float(np.min(config[low])), float(np.max(config[high]))


def _number_of_codes(num_bits: int, config: dict) -> int:
    if "lut_values" in config:
        return len(config["lut_values"])
    return 2**num_bits - bool(config.get("narrow"))


def _sqnr_db(w: np.ndarray, quantized: np.ndarray) -> float:
    signal = np.sum(np.square(w, dtype=np.float64))
    noise = np.sum(np.square(w.astype(np.float64) - quantized))
    return math.inf if noise == 0 else float(10 * np.log10(signal / noise))


def measure_activation(name: str, quantizer: Quantizer) -> QuantizedActivation:
    """What there is to say of an output."""
    twin: Any = ask(inferable_twin, quantizer) if quantizer.enabled else None
    state = "quantized" if quantizer.enabled else "disabled"
    if quantizer.enabled and ask(getattr, quantizer, "range", "given") is None:
        state = "not calibrated"
    return QuantizedActivation(
        name=name,
        num_bits=_num_bits(quantizer, twin),
        method=_method(quantizer),
        range=ask(lambda: _activation_range(twin.get_config())),
        state=state,
    )


def _activation_range(config: dict) -> Ends:
    if "threshold" not in config:
        return float(config["min_range"]), float(config["max_range"])
    threshold = float(config["threshold"])
    return (-threshold if config.get("signed", True) else 0.0), threshold


def _num_bits(quantizer: Quantizer, twin: Any) -> int | None:
    """As the inferable twin says, or else as the trainable quantizer's config does."""
    found = ask(lambda: int(twin.num_bits))
    config = getattr(quantizer, "quantization_config", None)
    for name in ("weights_n_bits", "activation_n_bits"):
        found = getattr(config, name, None) if found is None else found
    return found


def _method(quantizer: Quantizer) -> str | None:
    config = getattr(quantizer, "quantization_config", None)
    if config is not None:
        return config.quantization_method.name
    methods = quantizer.quantization_method
    return methods[0].name if len(methods) == 1 else None
