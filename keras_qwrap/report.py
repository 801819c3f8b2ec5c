"""The report: what of a model is quantized, how well, what is left in float, and why."""

import importlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import keras
import numpy as np

from keras_qwrap.errors import bad_type, bad_value
from keras_qwrap.quantizers.config import QuantizationTarget
from keras_qwrap.quantizing_layer import QuantizingLayer, quantizers_in
from keras_qwrap.report_rows import (
    FloatWeight,
    LayerReport,
    ask,
    measure_activation,
    measure_weight,
)
from keras_qwrap.substitution import sublayers
from keras_qwrap.weight_paths import (
    check_supported,
    default_weights,
    own_weights,
    weight_paths,
    weight_reason,
)


@dataclass(frozen=True)
class Totals:
    """Sums over all layers; `ratio` is `bytes_before / bytes_after`, 1 for a model of nothing."""

    quantized_weights: int
    quantized_parameters: int
    float_weights: int
    float_parameters: int
    quantized_activations: int
    uncalibrated_activations: int
    bytes_before: int
    bytes_after: int
    ratio: float


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantization_report` found: a row for each layer; `str` of it is a table.

    Example:

    ```python
    import keras
    import keras_qwrap as qi
    from keras_qwrap.report import quantization_report

    quantizer = qi.WeightsSymmetricInferableQuantizer(4, threshold=2.0, per_channel=False)
    dense = qi.KerasQuantizationWrapper(keras.layers.Dense(8), {"kernel": quantizer})
    report = quantization_report(keras.Sequential([keras.Input((16,)), dense]))
    print(report.totals.bytes_before, report.totals.bytes_after)  # 544 100
    print(report.to_dict()["layers"][0]["weights"][0]["range"])  # [2.0, 2.0]
    ```
    """

    model: str
    layers: tuple[LayerReport, ...]

    @property
    def totals(self) -> Totals:
        """Sums over all layers."""
        weights = [weight for layer in self.layers for weight in layer.weights]
        floats = [weight for layer in self.layers for weight in layer.left_in_float]
        states = [activation.state for layer in self.layers for activation in layer.activations]
        rest = sum(weight.bytes for weight in floats)
        before = sum(weight.bytes_before for weight in weights) + rest
        after = sum(weight.bytes_after for weight in weights) + rest
        return Totals(
            quantized_weights=len(weights),
            quantized_parameters=sum(math.prod(weight.shape) for weight in weights),
            float_weights=len(floats),
            float_parameters=sum(math.prod(weight.shape) for weight in floats),
            quantized_activations=states.count("quantized"),
            uncalibrated_activations=states.count("not calibrated"),
            bytes_before=before,
            bytes_after=after,
            ratio=before / after if after else 1.0,
        )

    def to_dict(self) -> dict:
        """All of it as values that JSON knows; an infinite or undefined number as a string."""
        return {
            "model": self.model,
            "layers": [_plain(asdict(layer)) for layer in self.layers],
            "totals": _plain(asdict(self.totals)),
        }

    def records(self) -> list[dict]:
        """A flat dictionary for each weight and each quantized output, with the same keys."""
        keys = (
            *("layer", "class_name", "tensor", "state", "shape", "num_bits", "method"),
            *("granularity", "ranges", "range_min", "range_max", "codes_used", "codes_total"),
            *("sqnr_db", "bytes_before", "bytes_after", "reason"),
        )
        rows = []
        for layer in self.layers:
            first = {"layer": layer.path, "class_name": layer.class_name}
            parts: tuple[Any, ...] = (*layer.weights, *layer.activations, *layer.left_in_float)
            for part in parts:
                row = {"state": "quantized", **asdict(part), **first}
                row["tensor"] = row.get("path", row.get("name"))
                row["range_min"], row["range_max"] = row.get("range") or (None, None)
                if isinstance(part, FloatWeight):
                    row |= {"state": "float", "bytes_before": part.bytes, "bytes_after": part.bytes}
                rows.append({key: row.get(key) for key in keys})
        return rows

    def to_dataframe(self) -> Any:
        """`records` as a `pandas.DataFrame`.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError(
                "to_dataframe: received no pandas to import, expected the package to be "
                "installed. Run `pip install pandas`, or use `records()` or `to_dict()`."
            ) from error
        return pandas.DataFrame(self.records())

    def __str__(self) -> str:
        return "\n".join(_text(self))


def quantization_report(model: keras.Model) -> QuantizationReport:
    """What of a model is quantized and how, what is left in float and why.

    Every weight of the model is in it once: as quantized, or as left in float with the reason.
    Layers inside nested models have paths, `outer/inner`; shared layers appear once; layers with
    neither weights nor quantizers are left out. Nothing is changed.

    Args:
        model: a built model: quantization-aware, converted, reloaded, or plain.

    Raises:
        TypeError: what is given is no model.
        ValueError: the model is not built.

    Example:

    ```python
    import keras
    import keras_qwrap as qi
    from keras_qwrap.report import quantization_report

    config = qi.TrainableQuantizerWeightsConfig(qi.QuantizationMethod.SYMMETRIC, 4)
    conv = qi.KerasQuantizationWrapper(
        keras.layers.Conv2D(8, 3, name="conv"), {"kernel": qi.STEWeightQATQuantizer(config)}
    )
    model = keras.Sequential([keras.Input((8, 8, 3)), conv])
    report = quantization_report(model)
    print(report.layers[0].weights[0].granularity)  # per channel
    print(report.layers[0].weights[0].codes_total)  # 15
    print(report.layers[0].left_in_float[0].path)  # bias
    print(report)
    ```
    """
    if not isinstance(model, keras.Model):
        raise bad_type("model", model, "a Keras model", "Put the layer into a keras.Sequential.")
    if not model.built:
        raise bad_value("model", model.name, "a built model", "Call it, or pass an Input first.")
    walk = _Walk()
    walk.visit(model, "")
    return QuantizationReport(model.name, tuple(walk.rows))


class _Walk:
    """Visits layers and the layers inside them; each layer and each weight is seen once."""

    def __init__(self) -> None:
        self.rows: list[LayerReport] = []
        self._seen: set[int] = set()

    def visit(self, layer: keras.Layer, path: str) -> None:
        """Add the rows of a layer, whose path ends with its name; the model's own path is ""."""
        if id(layer) in self._seen:
            return
        self._seen.add(id(layer))
        if isinstance(layer, QuantizingLayer):
            self._visit_quantizing(layer, path)
            return
        if isinstance(layer, keras.Model) or _holds_quantizers(layer):
            for child in _children(layer):
                self.visit(child, f"{path}/{child.name}" if path else child.name)
        floats = self._left_in_float(layer, {})
        if floats:
            name = path or layer.name
            row = LayerReport(name, type(layer).__name__, False, False, (), (), floats)
            self.rows.append(row)

    def _visit_quantizing(self, layer: QuantizingLayer, path: str) -> None:
        inner: keras.Layer = getattr(layer, "layer", layer)
        converted: bool = getattr(layer, "converted", False)
        quantized = {} if converted else ask(getattr(layer, "get_quantized_weights", dict)) or {}
        weights, activations, disabled = [], [], {}
        for owner, role, quantizer in quantizers_in(layer):
            if owner is not layer:
                continue
            if quantizer.quantization_target is QuantizationTarget.Activation:
                activations.append(measure_activation(role, quantizer))
                continue
            variable = ask(owner.latent_weight, role)
            if variable is not None and quantizer.enabled:
                self._seen.add(id(variable))
                weights.append(measure_weight(role, variable, quantizer, quantized.get(role)))
            elif variable is not None:
                disabled[id(variable)] = "its quantizer is disabled"
        nested = inner is not layer and _holds_quantizers(inner)
        floats = () if nested else self._left_in_float(inner, disabled, wrapped=True)
        parts = (tuple(weights), tuple(activations), floats)
        self.rows.append(LayerReport(path, type(inner).__name__, True, converted, *parts))
        if nested:
            self.visit(inner, f"{path}/{inner.name}")
        self._seen |= {id(variable) for variable in layer.weights}

    def _left_in_float(
        self, layer: keras.Layer, known: dict[int, str], wrapped: bool = False
    ) -> tuple[FloatWeight, ...]:
        """The weights of a layer that were not seen yet; `known` holds reasons by `id`."""
        rest = [] if isinstance(layer, QuantizingLayer) else layer.weights
        rest = [variable for variable in rest if id(variable) not in self._seen]
        self._seen |= {id(variable) for variable in rest}
        if not rest:
            return ()
        paths = {id(variable): path for path, variable in weight_paths(layer).items()}
        reasons = _Reasons(layer, wrapped)
        floats = []
        for variable in rest:
            shape = tuple(variable.shape)
            size = 4 if "float" in variable.dtype else np.dtype(variable.dtype).itemsize
            reason = known.get(id(variable)) or reasons.why(variable)
            name = paths.get(id(variable), variable.name)
            floats.append(FloatWeight(name, shape, size * math.prod(shape), reason))
        return tuple(floats)


def _holds_quantizers(layer: keras.Layer) -> bool:
    return any(isinstance(inner, QuantizingLayer) for inner in sublayers(layer))


def _children(layer: keras.Layer) -> list[keras.Layer]:
    """The layers that are inside a layer, but not inside one of these."""
    if isinstance(layer, keras.Model):
        return layer.layers
    inside = [part for part in sublayers(layer) if part is not layer]
    deeper = {id(part) for child in inside for part in sublayers(child) if part is not child}
    return [child for child in inside if id(child) not in deeper]


class _Reasons:
    """Why weights of a layer, or of the layers inside it, are in float."""

    def __init__(self, layer: keras.Layer, wrapped: bool) -> None:
        self._layer = layer
        self._usual = "no quantizer was given for it" if wrapped else "not wrapped"
        self._refusal = "" if wrapped or isinstance(layer, keras.Model) else _refusal(layer)
        self._default = _default_ids(layer)
        self._owners: dict[int, keras.Layer] = {}
        for inner in sublayers(layer):
            for variable in own_weights(inner):
                self._owners.setdefault(id(variable), inner)

    def why(self, variable: keras.Variable) -> str:
        """In a few words."""
        if "float" not in variable.dtype:
            return f"its dtype is {variable.dtype}"
        if self._refusal:
            return self._refusal
        if id(variable) in self._default:
            return self._usual
        owner = self._owners.get(id(variable), self._layer)
        decided_outside = owner is not self._layer and id(variable) in _default_ids(owner)
        return weight_reason(self._layer if decided_outside else owner)


def _default_ids(layer: keras.Layer) -> set[int]:
    """The `id` of each weight that is quantized by default."""
    paths = weight_paths(layer)
    return {id(paths[path]) for path in default_weights(layer)}


def _refusal(layer: keras.Layer) -> str:
    try:
        check_supported(layer)
    except ValueError as error:
        return f"cannot be wrapped: {error}"
    return ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


_HEADER = ("layer", "class", "tensor", "shape", "bits", "method", "range", "codes", "SQNR", "bytes")


def _text(report: QuantizationReport) -> list[str]:
    rows = [_HEADER, *(_cells(record) for record in report.records() if record["state"] != "float")]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    because: dict[str, list[str]] = {}
    for layer in report.layers:
        for weight in layer.left_in_float:
            because.setdefault(weight.reason, []).append(f"{layer.path}: {weight.path}")
    floats = [f"  {reason}\n    {', '.join(names)}" for reason, names in because.items()]
    totals = report.totals
    return [
        f"Quantization of model '{report.model}'",
        *(["", *table] if len(table) > 1 else []),
        *(["", "Not quantized, because", *floats] if floats else []),
        "",
        f"Weights: {totals.quantized_weights} quantized ({totals.quantized_parameters:,} numbers), "
        f"{totals.float_weights} in float ({totals.float_parameters:,} numbers)",
        f"Activations: {totals.quantized_activations} quantized, "
        f"{totals.uncalibrated_activations} not calibrated",
        f"Bytes: {totals.bytes_before:,} in float, {totals.bytes_after:,} quantized, "
        f"{totals.ratio:.2f} times smaller",
    ]


def _cells(record: dict) -> tuple[str, ...]:
    def show(value: Any, form: str = "{}") -> str:
        return "-" if value is None else form.format(value)

    is_weight = record["shape"] is not None
    ends = f"{show(record['range_min'], '{:.4g}')}..{show(record['range_max'], '{:.4g}')}"
    if record["state"] != "quantized":
        ends = record["state"]
    elif record["range_min"] is None:
        ends = "-"
    elif record["granularity"] == "per channel":
        ends = f"{ends} ({record['ranges']} channels)"
    weight_cells = (
        f"{show(record['codes_used'])}/{show(record['codes_total'])}",
        "exact" if record["sqnr_db"] == math.inf else show(record["sqnr_db"], "{:.1f} dB"),
        f"{show(record['bytes_before'], '{:,}')} -> {show(record['bytes_after'], '{:,}')}",
    )
    return (
        record["layer"],
        record["class_name"],
        record["tensor"],
        "x".join(map(str, record["shape"])) if is_weight else "",
        show(record["num_bits"]),
        show(record["method"]).lower(),
        ends,
        *(weight_cells if is_weight else ("", "", "")),
    )
