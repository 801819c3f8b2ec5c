"""Why a weight is in float, and why an output has no quantizer."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import keras

from keras_qwrap.layers.holder import KerasActivationQuantizationHolder
from keras_qwrap.layers.keras_internals import GraphNode, graph_nodes, input_layer, sublayers
from keras_qwrap.layers.layer_table import Behaviour, behaviour_of
from keras_qwrap.layers.owner import quantizers_in
from keras_qwrap.layers.refusals import refusal
from keras_qwrap.layers.weights import (
    default_weights,
    own_weights,
    weight_paths,
    weight_reason,
)
from keras_qwrap.models.copying import is_graph, unwrapped
from keras_qwrap.models.placement import (
    as_computed,
    can_be_quantized,
    carries_grid,
    exact_inputs,
    fusions,
    is_normalization,
)
from keras_qwrap.models.subclassed import QuantizedModel
from keras_qwrap.quantizers.config import QuantizationTarget
from keras_qwrap.recipes.quantize import decided_weights
from keras_qwrap.recipes.recipe import Decision
from keras_qwrap.recipes.specs import ActivationSpec, WeightsSpec
from keras_qwrap.reports.rows import UnquantizedOutputs

Decisions = Mapping[int, Decision]
"""What the recipe says of layers and functions, by their `id`; empty where there is no recipe."""

_NOT_GIVEN = "no quantizer was given for it"

WHOLE_NUMBERS = UnquantizedOutputs(
    "float", "calibration found whole numbers alone, and only layers outside Keras read them"
)
"""Why an input's quantizer passes it."""


class WeightReasons:
    """Why weights of a layer, or of the layers inside it, are in float."""

    def __init__(self, layer: keras.Layer, wrapped: bool, decisions: Decisions) -> None:
        self._layer = layer
        self._usual = _NOT_GIVEN if wrapped else "not wrapped"
        self._refusal = "" if wrapped or isinstance(layer, keras.Model) else _refusal(layer)
        self._default = _default_ids(layer)
        self._owners: dict[int, keras.Layer] = {}
        self._decided = decided_weights(layer, decisions)
        for inner in sublayers(layer):
            for variable in own_weights(inner):
                self._owners.setdefault(id(variable), inner)

    def why(self, variable: keras.Variable) -> str:
        """In a few words; with the rule that asks for something else, where one does."""
        decision = self._decided.get(id(variable))
        asks = decision and decision.rule and isinstance(decision.rule.weights, WeightsSpec)
        has_effect = any(self._decided.get(key) is decision for key in self._default)
        vain = asks and (self._refusal or not has_effect)
        return self._why(variable, decision) + (_despite(decision) if vain else "")

    def _why(self, variable: keras.Variable, decision: Decision | None) -> str:
        if "float" not in variable.dtype:
            return f"its dtype is {variable.dtype}"
        if self._refusal:
            return self._refusal
        if id(variable) in self._default:
            return decision.reason if decision and not decision.weights else self._usual
        owner = self._owners.get(id(variable), self._layer)
        decided_outside = owner is not self._layer and id(variable) in _default_ids(owner)
        return weight_reason(self._layer if decided_outside else owner)


def _despite(decision: Decision | None) -> str:
    return f"; rule {decision.rule} has no effect on it" if decision else ""


def despite_rule(outputs: UnquantizedOutputs, decision: Decision | None) -> UnquantizedOutputs:
    """Why outputs have no quantizer, with the rule that asks for one, where one does."""
    asks = decision and decision.rule and isinstance(decision.rule.activations, ActivationSpec)
    if not asks or outputs.reason == _NOT_GIVEN:
        return outputs
    return replace(outputs, reason=outputs.reason + _despite(decision))


def _default_ids(layer: keras.Layer) -> set[int]:
    """The `id` of each weight that is quantized by default."""
    paths = weight_paths(layer)
    return {id(paths[path]) for path in default_weights(layer)}


def _refusal(layer: keras.Layer) -> str:
    why = refusal(layer)
    return f"cannot be wrapped: {why}" if why else ""


def outputs_in_graph(
    graph: keras.Model, inputs: bool, decisions: Decisions
) -> dict[int, UnquantizedOutputs]:
    """The operations of a graph that have outputs without a quantizer, by `id`; and why.

    Nested models are left out; their own graphs hold what they give.

    Args:
        graph: a Functional or Sequential model, quantized or not.
        inputs: whether the graph's inputs count, as those of a whole model do.
        decisions: what the recipe says.
    """
    nodes = graph_nodes(graph)
    fused = fusions([replace(n, operation=unwrapped(n.operation)) for n in nodes], graph.outputs)
    bare = {id(tensor) for tensor in graph.outputs}
    held: set[int] = set()
    for node in nodes:
        is_holder = isinstance(node.operation, KerasActivationQuantizationHolder)
        (held if is_holder else bare).update(id(tensor) for tensor in node.inputs)
    if inputs:
        nodes = [GraphNode(input_layer(tensor), [], [tensor]) for tensor in graph.inputs] + nodes
    exact = exact_inputs(graph)
    computed = as_computed(graph)
    found: dict[int, UnquantizedOutputs] = {}
    for node in nodes:
        operation = node.operation
        behind = all(id(t) in held and id(t) not in bare for t in node.outputs)
        models = is_graph(operation) or isinstance(operation, QuantizedModel)
        if not (behind or models or has_output_quantizers(operation)):
            inner = unwrapped(operation)
            if inner is not operation and operation.is_weights_quantization:
                placed = on_grid_of_weights(inner)
            else:
                placed = _read_exactly(exact.get(id(node.outputs[0]), []))
            placed = _fused(fused.get(id(inner), [])) or placed
            outputs = [computed.get(id(tensor), tensor) for tensor in node.outputs]
            why = why_unquantized(inner, outputs, placed, decisions)
            found[id(operation)] = despite_rule(why, decisions.get(id(inner)))
    return found


def has_output_quantizers(operation: Any) -> bool:
    """Whether a wrapper or holder has quantizers for its outputs, be they disabled or not."""
    return isinstance(operation, keras.Layer) and any(
        owner is operation and quantizer.quantization_target is QuantizationTarget.Activation
        for owner, _, quantizer in quantizers_in(operation)
    )


def _fused(readers: list[Any]) -> UnquantizedOutputs | None:
    names = tuple(dict.fromkeys(reader.name for reader in readers))
    return UnquantizedOutputs("fused", f"fused into {_quoted(names)}", names) if names else None


def _read_exactly(readers: list[Any]) -> UnquantizedOutputs | None:
    names = tuple(dict.fromkeys(reader.name for reader in readers))
    raw = bool(readers) and all(map(is_normalization, readers))
    what = "raw values" if raw else "exact values"
    return UnquantizedOutputs("float", f"{what} for {_quoted(names)}") if names else None


def _quoted(names: tuple[str, ...]) -> str:
    return " and ".join(f"'{name}'" for name in names)


def on_grid_of_weights(layer: keras.Layer) -> UnquantizedOutputs | None:
    """What there is to say of a layer with quantized weights whose outputs are entries of them."""
    if behaviour_of(layer) is not Behaviour.GATHER:
        return None
    return UnquantizedOutputs("as its weights", "entries of its weights, on whose grid they lie")


def why_unquantized(
    operation: Any,
    outputs: list[keras.KerasTensor],
    placed: UnquantizedOutputs | None,
    decisions: Decisions,
) -> UnquantizedOutputs:
    """Why the outputs of a layer or function, without its wrapper, have no quantizer.

    `placed` is what is known of them from what stands around it, if that is anything.
    """
    dtypes = sorted({keras.backend.standardize_dtype(tensor.dtype) for tensor in outputs})
    floats = ["float" in dtype for dtype in dtypes]
    if not all(floats):
        state = "float" if any(floats) else "no float"
        return UnquantizedOutputs(state, f"its dtype is {' and '.join(dtypes)}")
    if not all(can_be_quantized(tensor) for tensor in outputs):
        return UnquantizedOutputs("float", "it is sparse or ragged")
    if (
        not placed
        and carries_grid(operation)
        and not isinstance(operation, keras.layers.InputLayer)
    ):
        placed = UnquantizedOutputs("as its input", "as its input, whose grid it carries")
    refusal = "" if placed or not isinstance(operation, keras.Layer) else _refusal(operation)
    if refusal:
        return UnquantizedOutputs("float", refusal)
    decision = decisions.get(id(operation))
    if decision and not decision.activations:
        return UnquantizedOutputs("float", decision.reason)
    return placed or UnquantizedOutputs("float", _NOT_GIVEN)
