"""Rows of the report: what there is to say of one weight, one activation, one layer."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_qwrap.layers.owner import Quantizer, QuantizingLayer, inferable_twin
from keras_qwrap.layers.wrapper import KerasQuantizationWrapper
from keras_qwrap.numerics.tensors import to_numpy
from keras_qwrap.quantizers.base import BaseKerasInferableQuantizer
from keras_qwrap.quantizers.config import QuantizationMethod
from keras_qwrap.recipes.plan import Part, PlannedWeight, UnquantizedOutputs

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


def row_of(part: Part) -> LayerReport:
    """The row of a part of a model: what there is to say of its weights and outputs."""
    layer = part.operation
    owns = isinstance(layer, QuantizingLayer)
    converted: bool = getattr(layer, "converted", False) if owns else False
    inner = getattr(layer, "layer", layer) if owns else layer
    quantized: dict[str, np.ndarray] = {}
    if isinstance(layer, KerasQuantizationWrapper) and layer.built and not converted:
        with asking(part.path, *layer.weights_quantizers):
            quantized = layer.get_quantized_weights()
    weights, floats, activations = [], [], []
    for weight in part.weights:
        if weight.quantizer is None:
            floats.append(_float_weight(weight))
            continue
        with asking(part.path, weight.path):
            value = quantized.get(weight.path)
            weights.append(measure_weight(weight.path, weight.variable, weight.quantizer, value))
    for role, quantizer in part.activations.items():
        with asking(part.path, role):
            activations.append(measure_activation(role, quantizer, layer.built))
    parts = (tuple(weights), tuple(activations), tuple(floats), part.unquantized)
    return LayerReport(part.path, type(inner).__name__, owns, converted, *parts)


def _float_weight(weight: PlannedWeight) -> FloatWeight:
    dtype, shape = weight.variable.dtype, tuple(weight.variable.shape)
    size = 4 if "float" in dtype else np.dtype(dtype).itemsize
    return FloatWeight(weight.path, shape, size * math.prod(shape), weight.reason)


def known(question: Callable, *args: Any) -> Any:
    """What a quantizer answers; None where its class does not define the answer.

    Any other error is one of the quantizer's own, and is not hidden.
    """
    try:
        return question(*args)
    except NotImplementedError:
        return None


@contextmanager
def asking(layer: str, *roles: str) -> Iterator[None]:
    """Say of an error which quantizers, of a layer, were asked."""
    try:
        yield
    except Exception as error:
        of = ", ".join(f"'{role}'" for role in roles)
        error.add_note(
            f"The report asked the quantizer of {of} in layer '{layer}'. What a quantizer does not "
            "know it leaves undefined, or raises NotImplementedError for."
        )
        raise


def measure_weight(
    path: str, variable: keras.Variable, quantizer: Quantizer, quantized: np.ndarray | None
) -> QuantizedWeight:
    """What there is to say of a weight; `quantized` is its quantized value, None if unknown."""
    shape, w = tuple(variable.shape), to_numpy(variable).astype(np.float32)
    finite = bool(np.isfinite(w).all())
    # A range that is taken from the weight is none where that is not finite.
    asked = finite or isinstance(quantizer, BaseKerasInferableQuantizer)
    twin: Any = known(inferable_twin, quantizer) if asked else None
    config: dict = {}
    ranges = codes = None
    if twin is not None:
        config = known(twin.get_config) or {}
        ranges = known(lambda: int(np.size(twin.scale)))
        codes = known(lambda: np.asarray(twin.quantize_to_codes(w))) if finite else None
    num_bits, method = _num_bits(quantizer, twin), _method(quantizer)
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
        range=_ends(config, "threshold") or _ends(config, "min_range", "max_range"),
        codes_used=None if codes is None else len(np.unique(codes)),
        codes_total=None if codes is None else _number_of_codes(num_bits, config),
        sqnr_db=None if quantized is None or not finite else _sqnr_db(w, quantized),
        bytes_before=before,
        bytes_after=after,
    )


def _granularity(ranges: int | None, config: dict) -> str | None:
    if ranges is None:
        return None
    return "per channel" if config.get("per_channel", ranges > 1) else "per tensor"


def _ends(config: dict, *keys: str) -> Ends | None:
    """The least and the greatest of the numbers in a config; None where they are not there."""
    try:
        numbers = [np.asarray(config[key], np.float64) for key in keys if key in config]
    except (TypeError, ValueError):
        return None  # A class of the user's may mean something else by such a name.
    if len(numbers) < len(keys) or any(array.size == 0 for array in numbers):
        return None
    return float(np.min(numbers[0])), float(np.max(numbers[-1]))


def _number_of_codes(num_bits: int | None, config: dict) -> int | None:
    if "lut_values" in config:
        return len(config["lut_values"])
    return None if num_bits is None else 2**num_bits - bool(config.get("narrow"))


def _sqnr_db(w: np.ndarray, quantized: np.ndarray) -> float:
    signal = np.sum(np.square(w, dtype=np.float64))
    noise = np.sum(np.square(w.astype(np.float64) - quantized))
    return math.inf if noise == 0 else float(10 * np.log10(signal / noise))


def measure_activation(name: str, quantizer: Quantizer, built: bool = True) -> QuantizedActivation:
    """What there is to say of an output; one that is not built has no range yet."""
    state = "quantized" if quantizer.enabled else "disabled"
    if quantizer.enabled and not (built and _has_range(quantizer)):
        state = "not calibrated"
    twin: Any = known(inferable_twin, quantizer) if state == "quantized" else None
    config = {} if twin is None else known(twin.get_config) or {}
    ends = _ends(config, "threshold")
    if ends is not None:
        ends = (-ends[1] if config.get("signed", True) else 0.0), ends[1]
    return QuantizedActivation(
        name=name,
        num_bits=_num_bits(quantizer, twin),
        method=_method(quantizer),
        range=ends or _ends(config, "min_range", "max_range"),
        state=state,
    )


def _has_range(quantizer: Any) -> bool:
    """Whether a quantizer has its range; one that has no such attribute is not asked."""
    # `getattr` with a default would hide an AttributeError that the attribute itself raises.
    defined = inspect.getattr_static(quantizer, "range", None) is not None
    return not defined or known(lambda: quantizer.range) is not None


def _num_bits(quantizer: Quantizer, twin: Any) -> int | None:
    """As the inferable twin says, or else as the trainable quantizer's config does."""
    found = None if twin is None else known(lambda: twin.num_bits)
    config = getattr(quantizer, "quantization_config", None)
    for name in ("weights_n_bits", "activation_n_bits"):
        found = getattr(config, name, None) if found is None else found
    return None if found is None else int(found)


def _method(quantizer: Quantizer) -> str | None:
    config = getattr(quantizer, "quantization_config", None)
    if config is not None:
        return config.quantization_method.name
    methods = quantizer.quantization_method
    return methods[0].name if len(methods) == 1 else None
