"""The walk through a model that makes the rows of its report."""

import math
from typing import Any

import keras
import numpy as np

from keras_qwrap.copying import is_graph
from keras_qwrap.errors import bad_value
from keras_qwrap.quantize import ordered_nodes, plan_graph, units_in
from keras_qwrap.quantizers.config import QuantizationTarget
from keras_qwrap.quantizing_layer import QuantizingLayer, quantizers_in
from keras_qwrap.recipes import Recipe
from keras_qwrap.report_reasons import (
    WHOLE_NUMBERS,
    Decisions,
    WeightReasons,
    on_grid_of_weights,
    outputs_in_graph,
    why_unquantized,
)
from keras_qwrap.report_rows import (
    FloatWeight,
    LayerReport,
    UnquantizedOutputs,
    ask,
    measure_activation,
    measure_weight,
)
from keras_qwrap.subclassed import QuantizedModel
from keras_qwrap.substitution import input_layer, sublayers
from keras_qwrap.weight_paths import variables_of_weights, weight_paths


def rows_of(model: keras.Model, recipe: Recipe | None) -> tuple[LayerReport, ...]:
    """The rows of a built model's report, in order of execution.

    Raises:
        ValueError: the recipe does not fit the model, or the model is of no kind that
            `quantize_model` makes from a recipe.
    """
    if recipe is not None and not (is_graph(model) or isinstance(model, QuantizedModel)):
        raise bad_value(
            "recipe",
            recipe,
            f"None for '{model.name}', a subclassed model that is no QuantizedModel",
            "Pass the model that `quantize_model` made from the recipe.",
        )
    walk = _Walk(recipe)
    walk.visit(model, "")
    return tuple(walk.rows)


class _Walk:
    """Visits layers and the layers inside them; each layer and each weight is seen once."""

    def __init__(self, recipe: Recipe | None) -> None:
        self.rows: list[LayerReport] = []
        self._recipe = recipe
        self._decisions: Decisions = {}
        self._outputs: dict[int, UnquantizedOutputs] = {}
        self._seen: set[int] = set()

    def visit(self, operation: Any, path: str) -> None:
        """Add the rows of a layer or function; its path ends with its name, the model's is ""."""
        if id(operation) in self._seen:
            return
        self._seen.add(id(operation))
        if isinstance(operation, QuantizingLayer):
            self._visit_quantizing(operation, path)
            return
        units = self._units(operation, path) if isinstance(operation, QuantizedModel) else []
        if is_graph(operation):
            if self._recipe is not None and not path:
                self._decisions, _ = plan_graph(operation, self._recipe)
            self._outputs |= outputs_in_graph(operation, not path, self._decisions)
        if isinstance(operation, keras.Model) or _holds_quantizers(operation):
            for child in _children(operation):
                self.visit(child, f"{path}/{child.name}" if path else child.name)
        floats = self._left_in_float(operation, {})
        outputs = self._outputs.get(id(operation))
        if floats or outputs:
            name, kind = path or operation.name, type(operation).__name__
            row = LayerReport(name, kind, False, False, left_in_float=floats, outputs=outputs)
            self.rows.append(row)
        self.rows += units

    def _units(self, model: QuantizedModel, path: str) -> list[LayerReport]:
        """Rows of the inner layers whose outputs have no quantizer."""
        units = units_in(model.model, model.inner_example())
        inner = {id(layer): layer for layer, _ in units.values()}
        if self._recipe is not None and not path:
            plan = self._recipe.plan(list(inner.values()))
            self._decisions = dict(zip(inner, plan, strict=True))

        def placed(name: str, layer: keras.Layer) -> UnquantizedOutputs | None:
            quantized = any(weight.startswith(f"{name}/") for weight in model.weights_quantizers)
            return on_grid_of_weights(layer) if quantized else None

        return [
            LayerReport(
                f"{path}/{name}" if path else name,
                type(layer).__name__,
                False,
                False,
                outputs=why_unquantized(layer, outputs, placed(name, layer), self._decisions),
            )
            for name, (layer, outputs) in units.items()
            if outputs and name not in model.activation_quantizers
        ]

    def _visit_quantizing(self, layer: QuantizingLayer, path: str) -> None:
        inner: keras.Layer = getattr(layer, "layer", layer)
        converted: bool = getattr(layer, "converted", False)
        quantized = {} if converted else ask(getattr(layer, "get_quantized_weights", dict)) or {}
        weights, activations, disabled = [], [], {}
        outputs = self._outputs.get(id(layer))
        for owner, role, quantizer in quantizers_in(layer):
            if owner is not layer:
                continue
            if quantizer.quantization_target is QuantizationTarget.Activation:
                if quantizer.pass_whole_numbers and quantizer.passes_input:
                    outputs = WHOLE_NUMBERS
                else:
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
        parts = (tuple(weights), tuple(activations), floats, outputs)
        self.rows.append(LayerReport(path, type(inner).__name__, True, converted, *parts))
        if nested:
            self.visit(inner, f"{path}/{inner.name}")
        self._seen |= {id(variable) for variable in variables_of_weights(layer)}

    def _left_in_float(
        self, operation: Any, known: dict[int, str], wrapped: bool = False
    ) -> tuple[FloatWeight, ...]:
        """The weights of a layer that were not seen yet; `known` holds reasons by `id`."""
        has_own = isinstance(operation, keras.Layer) and not isinstance(operation, QuantizingLayer)
        own = variables_of_weights(operation) if has_own else []
        rest = [variable for variable in own if id(variable) not in self._seen]
        self._seen |= {id(variable) for variable in rest}
        if not rest:
            return ()
        paths = {id(variable): path for path, variable in weight_paths(operation).items()}
        reasons = WeightReasons(operation, wrapped, self._decisions)
        floats = []
        for variable in rest:
            shape = tuple(variable.shape)
            size = 4 if "float" in variable.dtype else np.dtype(variable.dtype).itemsize
            reason = known.get(id(variable)) or reasons.why(variable)
            name = paths.get(id(variable), variable.name)
            floats.append(FloatWeight(name, shape, size * math.prod(shape), reason))
        return tuple(floats)


def _holds_quantizers(operation: Any) -> bool:
    inside = sublayers(operation) if isinstance(operation, keras.Layer) else []
    return any(isinstance(inner, QuantizingLayer) for inner in inside)


def _children(layer: keras.Layer) -> list[Any]:
    """What is inside a layer, but not inside one of these; a graph's in order of execution."""
    if is_graph(layer):
        inputs = [input_layer(tensor) for tensor in layer.inputs]
        return [*inputs, *(node.operation for node in ordered_nodes(layer)), *layer.layers]
    if isinstance(layer, keras.Model):
        return layer.layers
    inside = [part for part in sublayers(layer) if part is not layer]
    deeper = {id(part) for child in inside for part in sublayers(child) if part is not child}
    return [child for child in inside if id(child) not in deeper]
