"""The report: what of a model is quantized, how well, what is left in float, and why."""

import html
import importlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import keras

from keras_qwrap.layers.owner import quantizers_in
from keras_qwrap.models.copying import check_built
from keras_qwrap.models.graph import is_graph
from keras_qwrap.models.subclassed import QuantizedModel
from keras_qwrap.numerics.checks import bad_value, brief
from keras_qwrap.recipes.plan import plan
from keras_qwrap.recipes.recipe import Recipe, as_recipe
from keras_qwrap.reports.rows import FloatWeight, LayerReport, row_of
from keras_qwrap.reports.text import html_list, html_table, paragraph, text_table


@dataclass(frozen=True)
class Totals:
    """Sums over all layers; `ratio` is `bytes_before / bytes_after`, 1 for a model of nothing.

    `float_activations` counts the layers whose outputs are left in float: neither quantized, nor
    fused into the next layer, nor on the grid of their input.
    """

    quantized_weights: int
    quantized_parameters: int
    float_weights: int
    float_parameters: int
    quantized_activations: int
    uncalibrated_activations: int
    float_activations: int
    bytes_before: int
    bytes_after: int
    ratio: float


@dataclass(frozen=True, repr=False)
class QuantizationReport:
    """What `quantization_report` found: a row for each layer.

    `str` of it is a table no wider than the terminal (or the variable COLUMNS); notebooks show
    it as HTML.

    Example:

    ```python
    import keras
    import keras_qwrap as qi

    quantizer = qi.WeightsSymmetricInferableQuantizer(4, threshold=2.0, per_channel=False)
    dense = qi.KerasQuantizationWrapper(keras.layers.Dense(8), {"kernel": quantizer})
    report = qi.quantization_report(keras.Sequential([keras.Input((16,)), dense]))
    print(report.totals.bytes_before, report.totals.bytes_after)  # 544 100
    print(report.to_dict()["layers"][1]["weights"][0]["range"])  # [2.0, 2.0]
    ```
    """

    model: str
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def totals(self) -> Totals:
        """Sums over all layers."""
        weights = [weight for layer in self.layers for weight in layer.weights]
        floats = [weight for layer in self.layers for weight in layer.left_in_float]
        states = [activation.state for layer in self.layers for activation in layer.activations]
        outputs = [layer.outputs.state for layer in self.layers if layer.outputs]
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
            float_activations=outputs.count("float"),
            bytes_before=before,
            bytes_after=after,
            ratio=before / after if after else 1.0,
        )

    def to_dict(self) -> dict:
        """All of it as values that JSON knows; an infinite or undefined number as a string."""
        return {
            "model": self.model,
            "notes": list(self.notes),
            "layers": [_for_json(asdict(layer)) for layer in self.layers],
            "totals": _for_json(asdict(self.totals)),
        }

    def records(self) -> list[dict]:
        """A flat dictionary for each weight and output, with the same keys.

        All outputs of a layer that have no quantizer are one, with `outputs` as `tensor`.
        """
        keys = (
            *("layer", "class_name", "tensor", "state", "shape", "num_bits", "method"),
            *("granularity", "ranges", "range_min", "range_max", "codes_used", "codes_total"),
            *("sqnr_db", "bytes_before", "bytes_after", "reason"),
        )
        rows = []
        for layer in self.layers:
            first = {"layer": layer.path, "class_name": layer.class_name}
            parts: list[Any] = [*layer.weights, *layer.activations, *layer.left_in_float]
            for part in [*parts, layer.outputs] if layer.outputs else parts:
                row = {"state": "quantized", **asdict(part), **first}
                row["tensor"] = row.get("path", row.get("name", "outputs"))
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

    def __repr__(self) -> str:
        totals = self.totals
        return brief(
            "QuantizationReport",
            self.model,
            quantized_weights=totals.quantized_weights,
            quantized_activations=totals.quantized_activations,
            bytes_before=totals.bytes_before,
            bytes_after=totals.bytes_after,
        )

    def __str__(self) -> str:
        return "\n".join(_lines(self))

    def _repr_html_(self) -> str:
        """What notebooks show."""
        return _html(self)


def quantization_report(
    model: keras.Model, recipe: str | dict | Recipe | None = None
) -> QuantizationReport:
    """What of a model is quantized and how, what is left in float and why.

    Every weight of the model is in it once: as quantized, or as left in float with the reason. So
    are the outputs of every layer and function of a graph, and its inputs: behind a quantizer, or
    with the reason why there is none. Layers inside nested models have paths, `outer/inner`;
    shared layers appear once. Nothing is changed.

    Args:
        model: a built model: quantization-aware, converted, reloaded, or plain.
        recipe: what `quantize_model` made it from; the report then tells which rule left what in
            float. A model itself keeps no rules.

    Raises:
        TypeError: what is given is no model, or no recipe.
        ValueError: the model is not built, or the recipe does not fit it.

    Example:

    ```python
    import keras
    import keras_qwrap as qi

    config = qi.TrainableQuantizerWeightsConfig(qi.QuantizationMethod.SYMMETRIC, 4)
    conv = qi.KerasQuantizationWrapper(
        keras.layers.Conv2D(8, 3, name="conv"), {"kernel": qi.STEWeightQATQuantizer(config)}
    )
    model = keras.Sequential([keras.Input((8, 8, 3)), conv])
    report = qi.quantization_report(model)
    row = next(row for row in report.layers if row.path == "conv")
    print(row.weights[0].granularity, row.weights[0].codes_total)  # per channel 15
    print(row.left_in_float[0].path)  # bias
    print(row.outputs.reason)  # no quantizer was given for it
    print(report)
    ```
    """
    check_built(model)
    given = None if recipe is None else as_recipe(recipe)
    if given is not None and not (is_graph(model) or isinstance(model, QuantizedModel)):
        raise bad_value(
            "recipe",
            given,
            f"None for '{model.name}', a subclassed model that is no QuantizedModel",
            "Pass the model that `quantize_model` made from the recipe.",
        )
    planned = plan(model, given)
    vain = [of_weights for of_weights, _ in planned.rules_in_vain() if of_weights]
    rows = tuple(row_of(part) for part in planned.parts)
    return QuantizationReport(model.name, rows, (*_notes(model), *vain))


def _notes(model: keras.Model) -> tuple[str, ...]:
    notes = []
    unknown = sorted(
        owner.name
        for owner, _, quantizer in quantizers_in(model)
        if quantizer.pass_whole_numbers and quantizer.enabled and quantizer.whole_numbers is None
    )
    if unknown:
        notes.append(f"{', '.join(unknown)}: {_MAY_BE_WHOLE}")
    if isinstance(model, QuantizedModel):
        notes.append(f"{_NO_GRAPH}: each inner layer's outputs are judged alone, none as fused")
    elif not is_graph(model):
        notes.append(f"{_NO_GRAPH}: outputs without a quantizer are listed in graphs inside only")
    return tuple(notes)


_MAY_BE_WHOLE = (
    "only layers outside Keras read this input. Should it hold whole numbers (ids, labels, "
    "lengths), quantizing changes them: calibrate with such data, and it is left as it is"
)
_NO_GRAPH = "A subclassed model has no graph of its activations"


def _for_json(value: Any) -> Any:
    """Lists in the place of tuples, and strings in the place of numbers that JSON lacks."""
    if isinstance(value, dict):
        return {key: _for_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


_HEADER = ("layer", "class", "tensor", "shape", "bits", "method", "range", "codes", "SQNR", "bytes")


_STACKS = ((0, 1), (2, 3), (4, 5), (6,), (7, 8), (9,))
"""Columns one above the other in a narrow terminal."""

_FUSED = "fused into what reads them"


def _lines(report: QuantizationReport) -> list[str]:
    rows = _rows(report)
    lines = paragraph(_title(report))
    lines += ["", *text_table(rows, _STACKS)] if len(rows) > 1 else []
    for title, reasons in _sections(report):
        lines += ["", title]
        for reason, names in reasons.items():
            lines += [*paragraph(reason, "  "), *paragraph(", ".join(names), "    ", "")]
    for note in report.notes:
        lines += ["", *paragraph(note)]
    return [*lines, "", *(line for total in _sums(report) for line in paragraph(total))]


def _html(report: QuantizationReport) -> str:
    rows = _rows(report)
    parts = [f"<p>{html.escape(_title(report))}</p>", html_table(rows) if len(rows) > 1 else ""]
    for title, reasons in _sections(report):
        parts.append(f"<p>{html.escape(title)}</p>")
        parts.append(html_list(f"{reason}: {', '.join(each)}" for reason, each in reasons.items()))
    parts += [f"<p>{html.escape(note)}</p>" for note in report.notes]
    return f"<div>{''.join(parts)}{html_list(_sums(report))}</div>"


def _title(report: QuantizationReport) -> str:
    return f"Quantization of model '{report.model}'"


def _rows(report: QuantizationReport) -> list[tuple[str, ...]]:
    return [_HEADER, *(_cells(record) for record in report.records() if not record["reason"])]


def _sections(report: QuantizationReport) -> list[tuple[str, dict[str, list[str]]]]:
    """What is in float: by reason, names."""
    floats: dict[str, list[str]] = {}
    outputs: dict[str, list[str]] = {}
    for layer in report.layers:
        for weight in layer.left_in_float:
            floats.setdefault(weight.reason, []).append(f"{layer.path}: {weight.path}")
        if layer.outputs and layer.outputs.fused_into:
            into = " and ".join(layer.outputs.fused_into)
            _, *despite = layer.outputs.reason.partition("; ")
            reason = _FUSED + "".join(despite)
            outputs.setdefault(reason, []).append(f"{layer.path} -> {into}")
        elif layer.outputs:
            outputs.setdefault(layer.outputs.reason, []).append(layer.path)
    sections = [
        ("Weights in float, because", floats),
        ("Outputs without a quantizer, because", outputs),
    ]
    return [(title, reasons) for title, reasons in sections if reasons]


def _sums(report: QuantizationReport) -> list[str]:
    totals = report.totals
    return [
        f"Weights: {totals.quantized_weights} quantized ({totals.quantized_parameters:,} numbers), "
        f"{totals.float_weights} in float ({totals.float_parameters:,} numbers)",
        f"Activations: {totals.quantized_activations} quantized, "
        f"{totals.uncalibrated_activations} not calibrated, "
        f"{totals.float_activations} in float",
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
        record["class_name"].removeprefix("KerasActivationQuantization"),
        record["tensor"],
        "x".join(map(str, record["shape"])) if is_weight else "",
        show(record["num_bits"]),
        show(record["method"]).lower(),
        ends,
        *(weight_cells if is_weight else ("", "", "")),
    )
