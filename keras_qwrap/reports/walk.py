"""The walk through a model that makes the rows of its report."""

import math
from typing import Any

import keras
import numpy as np

from keras_qwrap.layers.keras_internals import input_layer, sublayers
from keras_qwrap.layers.owner import QuantizingLayer
from keras_qwrap.layers.weights import variables_of_weights, weight_paths
from keras_qwrap.layers.wrapper import KerasQuantizationWrapper
from keras_qwrap.models.copying import is_graph
from keras_qwrap.models.subclassed import QuantizedModel
from keras_qwrap.numerics.checks import bad_value
from keras_qwrap.quantizers.config import QuantizationTarget
from keras_qwrap.recipes.quantize import (
    by_id,
    input_names,
    ordered_nodes,
    plan_graph,
    plan_units,
    units_in,
    weights_in_vain,
)
from keras_qwrap.recipes.recipe import Recipe
from keras_qwrap.reports.reasons import (
    WHOLE_NUMBERS,
    Decisions,
    WeightReasons,
    despite_rule,
    on_grid_of_weights,
    outputs_in_graph,
    why_unquantized,
)
from keras_qwrap.reports.rows import (
    FloatWeight,
    LayerReport,
    UnquantizedOutputs,
    asking,
    measure_activation,
    measure_weight,
)


def rows_of(
    model: keras.Model, recipe: Recipe | None
) -> tuple[tuple[LayerReport, ...], tuple[str, ...]]:
    """The rows of a built model's report, in order of execution; and which rules ask in vain.

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
    return tuple(walk.rows), tuple(walk.notes)


class _Walk:
    """Visits layers and the layers inside them; each layer and each weight is seen once."""

    def __init__(self, recipe: Recipe | None) -> None:
        self.rows: list[LayerReport] = []
        self.notes: list[str] = []
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
                planned, self._decisions, _ = plan_graph(operation, self._recipe)
                self.notes += weights_in_vain(planned).values()
            self._outputs |= outputs_in_graph(operation, not path, self._decisions)
        if isinstance(operation, keras.Model) or _holds_quantizers(operation):
            for name, child in _children(operation):
                self.visit(child, f"{path}/{name}" if path else name)
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
        if self._recipe is not None and not path:
            planned = plan_units(model.model, units, self._recipe)
            self._decisions = by_id(planned)
            self.notes += weights_in_vain(planned).values()

        def placed(name: str, layer: keras.Layer) -> UnquantizedOutputs | None:
            quantized = any(weight.startswith(f"{name}/") for weight in model.weights_quantizers)
            return on_grid_of_weights(layer) if quantized else None

        def why(name: str, layer: keras.Layer, outputs: list) -> UnquantizedOutputs:
            found = why_unquantized(layer, outputs, placed(name, layer), self._decisions)
            return despite_rule(found, self._decisions.get(id(layer)))

        return [
            LayerReport(
                f"{path}/{name}" if path else name,
                type(layer).__name__,
                False,
                False,
                outputs=why(name, layer, outputs),
            )
            for name, (layer, outputs) in units.items()
            if outputs and name not in model.activation_quantizers
        ]

    def _visit_quantizing(self, layer: QuantizingLayer, path: str) -> None:
        inner: keras.Layer = getattr(layer, "layer", layer)
        converted: bool = getattr(layer, "converted", False)
        weights, activations, disabled = [], [], {}
        outputs = self._outputs.get(id(layer))
        quantized = {}
        if isinstance(layer, KerasQuantizationWrapper) and layer.built and not converted:
            with asking(path, *layer.weights_quantizers):
                quantized = layer.get_quantized_weights()
        for role, quantizer in layer.own_quantizers().items():
            with asking(path, role):
                if quantizer.quantization_target is QuantizationTarget.Activation:
                    if quantizer.pass_whole_numbers and quantizer.passes_input:
                        outputs = WHOLE_NUMBERS
                    else:
                        activations.append(measure_activation(role, quantizer, layer.built))
                elif isinstance(layer, KerasQuantizationWrapper) and layer.built:
                    variable = layer.latent_weight(role)
                    if quantizer.enabled:
                        self._seen.add(id(variable))
                        values = quantized.get(role)
                        weights.append(measure_weight(role, variable, quantizer, values))
                    else:
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


def _children(layer: keras.Layer) -> list[tuple[str, Any]]:
    """What is inside a layer by name, not inside one of these; a graph's in order of execution."""
    if is_graph(layer):
        inputs = list(zip(input_names(layer), map(input_layer, layer.inputs), strict=True))
        operations = [node.operation for node in ordered_nodes(layer)]
        return inputs + [(part.name, part) for part in (*operations, *layer.layers)]
    if isinstance(layer, keras.Model):
        return [(part.name, part) for part in layer.layers]
    inside = [part for part in sublayers(layer) if part is not layer]
    deeper = {id(part) for child in inside for part in sublayers(child) if part is not child}
    return [(child.name, child) for child in inside if id(child) not in deeper]
