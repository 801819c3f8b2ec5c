"""The plan: what is done with each weight and each tensor of a model, and why.

One function makes it, of a float model and of what was made of it, of graphs and of models without
one: a wrapper stands for its layer. `quantize_model` carries it out, the report prints it. Without
a recipe, decisions are read off wrappers, holders and their state.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import keras

from keras_qwrap.layers.holder import KerasActivationQuantizationHolder
from keras_qwrap.layers.keras_internals import GraphNode, graph_nodes, input_layer, sublayers
from keras_qwrap.layers.layer_table import Axes, Behaviour, OutputRange, behaviour_of, output_range
from keras_qwrap.layers.owner import Quantizer, QuantizingLayer
from keras_qwrap.layers.refusals import refusal
from keras_qwrap.layers.weights import (
    default_weights,
    own_weights,
    variables_of_weights,
    weight_paths,
    weight_reason,
)
from keras_qwrap.layers.wrapper import KerasQuantizationWrapper
from keras_qwrap.models.copying import unwrapped
from keras_qwrap.models.graph import is_graph
from keras_qwrap.models.placement import (
    as_computed,
    can_be_quantized,
    carries_grid,
    exact_inputs,
    fusions,
    inputs_of_custom_layers,
    is_normalization,
)
from keras_qwrap.models.subclassed import QuantizedModel
from keras_qwrap.models.taps import Example
from keras_qwrap.quantizers.config import QuantizationTarget
from keras_qwrap.recipes.places import (
    Units,
    input_names,
    ordered_nodes,
    places_in_graph,
    places_of_units,
    units_in,
)
from keras_qwrap.recipes.recipe import Decision, Recipe
from keras_qwrap.recipes.rules import FLOAT, ActivationSpec, Place, Rule, WeightsSpec

_NOT_GIVEN = "no quantizer was given for it"


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


_CARRIED = UnquantizedOutputs("as its input", "as its input, whose grid it carries")
_GATHERED = UnquantizedOutputs("as its weights", "entries of its weights, on whose grid they lie")
_WHOLE_NUMBERS = UnquantizedOutputs(
    "float", "calibration found whole numbers alone, and only layers outside Keras read them"
)


@dataclass(frozen=True)
class PlannedWeight:
    """What is done with one weight.

    Attributes:
        path: in the layer that was asked about.
        spec: how the recipe quantizes it; None: it does not, or there is no recipe.
        axes: the kept axes, where it is quantized by default.
        quantizer: that the weight has in this model already; None: it is in float.
        reason: why it is in float; "" where it is not.
    """

    path: str
    variable: keras.Variable
    spec: WeightsSpec | None = None
    axes: Axes = None
    quantizer: Quantizer | None = None
    reason: str = ""


@dataclass(frozen=True)
class PlannedOutputs:
    """What is done with the outputs of a layer, function or input.

    Attributes:
        ranges: how the range of each is known; empty where they have no grid of their own, since
            they are fused, carry the grid of the input, are no floats, ...
        spec: how the recipe quantizes them; None: it does not, or there is no recipe.
        unquantized: why they have no quantizer in this model; None where they have one.
        may_be_whole: of an input: whether it may hold whole numbers that must stay as they are.
    """

    ranges: tuple[OutputRange, ...] = ()
    spec: ActivationSpec | None = None
    unquantized: UnquantizedOutputs | None = None
    may_be_whole: bool = False


@dataclass(frozen=True)
class Part:
    """A layer, function or input with all that it owns: what a report has one row for.

    Attributes:
        path: names of the models and layers around it and its own, joined by `/`.
        operation: a wrapper or holder, where there is one.
        weights: each weight of a model is in one part; those that have a quantizer come first.
        activations: the quantizers of its outputs, by role.
        unquantized: why outputs have no quantizer; None where they have, or are not known.
    """

    path: str
    operation: Any
    weights: tuple[PlannedWeight, ...] = ()
    activations: Mapping[str, Quantizer] = field(default_factory=dict)
    unquantized: UnquantizedOutputs | None = None


def plan(
    model: keras.Model, recipe: Recipe | None = None, example: Example | None = None
) -> "Plan":
    """What a recipe does with a built model, or did with the one that this was made of.

    Args:
        model: a model with or without a graph, quantized or not.
        recipe: None: what is quantized is read off the model.
        example: for a float model without a graph, arguments of a call.

    Raises:
        ValueError: a rule names a layer that is not there; a float model without a graph cannot
            be called with the example.

    Warns:
        UserWarning: a rule matches no layer, or has no effect because of earlier rules.
    """
    return Plan(model, recipe, example)


class Plan:
    """Decisions and their reasons, for each weight and each tensor of a model; see `plan`."""

    def __init__(self, model: keras.Model, recipe: Recipe | None, example: Example | None) -> None:
        self._model = model
        self._outputs: dict[int, PlannedOutputs] = {}
        self._decisions: dict[int, Decision] = {}
        self._planned: list[tuple[Place, Decision]] = []
        self._refusals: dict[int, str] = {}
        self._graphs: set[int] = set()
        self._outputs_of_units: Units = {}
        if not is_graph(model) and (recipe is not None or isinstance(model, QuantizedModel)):
            self._outputs_of_units = _units(model, example)
        if recipe is not None:
            self._decide(recipe)
        if is_graph(model):
            self._place_graph(model)
        self._place_units(model, self._outputs_of_units)

    def _decide(self, recipe: Recipe) -> None:
        """Ask the recipe about each layer; functions between layers follow no rule."""
        if is_graph(self._model):
            places = places_in_graph(self._model)
        else:
            places = places_of_units(_float(self._model), self._outputs_of_units)
        ruled = [place for place in places if isinstance(place.layer, keras.Layer)]
        self._planned = list(zip(ruled, recipe.plan(ruled), strict=True))
        self._decisions = dict.fromkeys((id(place.layer) for place in places), recipe.decide(None))
        self._decisions |= {id(place.layer): decision for place, decision in self._planned}

    @property
    def units(self) -> dict[str, keras.Layer]:
        """The inner layers of a model without a graph, by path."""
        return {path: layer for path, (layer, _) in self._outputs_of_units.items()}

    # Weights.

    def refusal(self, layer: keras.Layer) -> str:
        """Why a layer cannot be wrapped, whatever is planned for it; "" where it can."""
        if id(layer) not in self._refusals:
            self._refusals[id(layer)] = refusal(layer)
        return self._refusals[id(layer)]

    def weights(self, layer: keras.Layer, wrapped: bool = False) -> list[PlannedWeight]:
        """What is done with the weights of a built layer, those of layers inside included.

        Args:
            layer: a layer without its wrapper.
            wrapped: whether it has one, with no quantizer for these weights.
        """
        by_path = weight_paths(layer)
        paths = {id(variable): path for path, variable in by_path.items()}
        axes = {id(by_path[path]): kept for path, kept in default_weights(layer).items()}
        decided = self._decided(layer)
        effective = {id(decided[key]) for key in axes if key in decided}
        open_to_wrap = wrapped or isinstance(layer, keras.Model)
        refused = "" if open_to_wrap else self.refusal(layer)
        why_by_class = _reasons_by_class(layer)
        planned = []
        for variable in variables_of_weights(layer):
            key = id(variable)
            decision = decided.get(key)
            if "float" not in variable.dtype:
                reason = f"its dtype is {variable.dtype}"
            elif refused:
                reason = f"cannot be wrapped: {refused}"
            elif key not in axes:
                reason = why_by_class(variable)
            elif decision and not decision.weights:
                reason = decision.reason
            else:
                reason = _NOT_GIVEN if wrapped else "not wrapped"
            if refused or id(decision) not in effective:
                reason += _despite(decision, "weights")
            spec = decision.weights if decision and key in axes else None
            path = paths.get(key, variable.name)
            planned.append(PlannedWeight(path, variable, spec, axes.get(key), None, reason))
        return planned

    def _decided(self, layer: keras.Layer) -> dict[int, Decision]:
        """What is decided of the variables of a layer, by their `id`.

        The innermost of the layers that are decided about, of all around a variable, has the say.
        """
        inside = [inner for inner in sublayers(layer) if id(inner) in self._decisions]
        found: dict[int, Decision] = {}
        for inner in sorted(inside, key=lambda each: len(sublayers(each)), reverse=True):
            found |= {id(v): self._decisions[id(inner)] for v in variables_of_weights(inner)}
        return found

    # Outputs.

    def outputs(self, operation: Any) -> PlannedOutputs:
        """What is done with the outputs of a layer (or its wrapper), a function or an input."""
        return self._outputs.get(id(operation), PlannedOutputs())

    def _place_graph(self, graph: keras.Model) -> None:
        """Plan the outputs in a graph, and in those inside it."""
        if id(graph) in self._graphs:
            return
        self._graphs.add(id(graph))
        nodes = graph_nodes(graph)
        quantized = {id(unwrapped(n.operation)) for n in nodes if _quantizes_outputs(n.operation)}
        fused = fusions(
            [replace(n, operation=unwrapped(n.operation)) for n in nodes], graph.outputs
        )
        # What has a quantizer is not fused: what reads it reads codes.
        fused = {key: readers for key, readers in fused.items() if key not in quantized}
        behind = {id(reader) for readers in fused.values() for reader in readers}
        computed = as_computed(graph)
        held = _held(nodes, graph.outputs)
        for node in nodes:
            inner = unwrapped(node.operation)
            if is_graph(inner):
                self._place_graph(inner)
            elif not isinstance(inner, QuantizedModel):
                read = [computed.get(id(tensor), tensor) for tensor in node.inputs]
                made = [computed.get(id(tensor), tensor) for tensor in node.outputs]
                placed = _fused(fused.get(id(inner), [])) or self._placed_alone(
                    inner, read if id(inner) not in behind else None, _weighs(node.operation)
                )
                has_quantizer = id(inner) in quantized or held.issuperset(map(id, node.outputs))
                self._place(node.operation, made, placed, has_quantizer)
        if graph is self._model:
            self._place_inputs(graph, held)

    def _place_inputs(self, model: keras.Model, held: set[int]) -> None:
        """Plan the inputs of the whole model; a nested one's are tensors of what is around it."""
        exact, whole = exact_inputs(model), inputs_of_custom_layers(model)
        for tensor in model.inputs:
            placed = _read_exactly(exact.get(id(tensor), []))
            key = id(tensor)
            self._place(input_layer(tensor), [tensor], placed, key in held, key in whole)

    def _place_units(self, model: keras.Model, units: Units) -> None:
        """Plan the outputs of the inner layers of a model without a graph, each judged alone."""
        is_quantized = isinstance(model, QuantizedModel)
        weights = model.weights_quantizers if is_quantized else {}
        quantized = model.activation_quantizers if is_quantized else {}
        for path, (layer, tensors) in units.items():
            has_weights = any(weight.startswith(f"{path}/") for weight in weights)
            placed = self._placed_alone(layer, [], has_weights)
            if tensors:
                self._place(layer, tensors, placed, path in quantized)

    def _placed_alone(
        self, layer: Any, read: list[keras.KerasTensor] | None, has_quantizer: bool
    ) -> UnquantizedOutputs | None:
        """Why outputs have no grid of their own, whoever reads them; None where they have one.

        Args:
            layer: a layer, without its wrapper, or a function.
            read: its inputs; None where the input is fused with it, and so has no grid.
            has_quantizer: whether weights have one already.
        """
        if behaviour_of(layer) is Behaviour.GATHER and (has_quantizer or self._gathers(layer)):
            return _GATHERED
        carries = read is not None and carries_grid(layer) and all(map(can_be_quantized, read))
        return _CARRIED if carries else None

    def _gathers(self, table: keras.Layer) -> bool:
        """Whether the entries of a table will be on a grid that is fine enough for the outputs."""
        decision = self._decisions.get(id(table))
        if not decision or not decision.weights:
            return False
        coarse = decision.activations and decision.activations.num_bits < decision.weights.num_bits
        return not coarse and list(default_weights(table).values()) == [None]

    def _place(
        self,
        operation: Any,
        tensors: list[keras.KerasTensor],
        placed: UnquantizedOutputs | None,
        has_quantizer: bool,
        may_be_whole: bool = False,
    ) -> None:
        """Plan the outputs of an operation where it is used; one that is used twice, by the first
        place where they have a grid of their own.

        Args:
            operation: a wrapper, a layer, a function or an input.
            tensors: the outputs.
            placed: why they have no grid of their own; None where they have one.
            has_quantizer: whether they are quantized in this model.
            may_be_whole: as `PlannedOutputs` has it.
        """
        if self.outputs(operation).ranges and self.outputs(operation).unquantized:
            return
        layer = unwrapped(operation)
        decision = self._decisions.get(id(layer))
        no_floats = _no_floats(tensors)
        refused = ""
        if isinstance(layer, keras.Layer) and not (has_quantizer or placed or no_floats):
            refused = self.refusal(layer)
        if no_floats:
            why = no_floats
        elif refused:
            why = UnquantizedOutputs("float", f"cannot be wrapped: {refused}")
        elif decision and not decision.activations:
            why = UnquantizedOutputs("float", decision.reason)
        else:
            why = placed or UnquantizedOutputs("float", _NOT_GIVEN)
        if why.reason != _NOT_GIVEN:
            why = replace(why, reason=why.reason + _despite(decision, "activations"))
        grid = not (placed or no_floats)
        self._outputs[id(operation)] = PlannedOutputs(
            (output_range(layer),) * len(tensors) if grid else (),
            decision.activations if decision and grid else None,
            None if has_quantizer else why,
            may_be_whole,
        )

    # Rules without effect.

    def rules_in_vain(self) -> list[tuple[str, str]]:
        """What rules ask of weights, and what of activations, that they cannot have; "": nothing.

        Where layers have no weights at all, and the rule asks for activations too, nothing is
        missing. A rule that has an effect on weights may ask for activations that are quantized
        behind another layer.
        """
        texts = []
        for rule, places in self._places_by_rule():
            layers = [place.layer for place in places]
            asks = isinstance(rule.weights, WeightsSpec)
            effect = asks and any(default_weights(layer) for layer in layers)
            misses = any(layer.weights for layer in layers) or rule.activations in (None, FLOAT)
            weights = activations = ""
            if asks and not effect and misses:
                why = self.refusal(layers[0]) or weight_reason(layers[0])
                weights = (
                    f"{rule} has no effect on weights: {_listed(places)} no weight that is ever "
                    f"quantized ({why})"
                )
            vain = not any(self.outputs(each).spec and not self.refusal(each) for each in layers)
            if isinstance(rule.activations, ActivationSpec) and not effect and vain:
                activations = (
                    f" has no effect on activations: {_listed(places)} no quantizer of outputs; "
                    "the activations are quantized behind other layers, keep the grid that they "
                    "have, or are no floats"
                )
            texts.append((weights, activations and f"{', and' if weights else rule}{activations}"))
        return texts

    def _places_by_rule(self) -> list[tuple[Rule, list[Place]]]:
        """The rules that decide about anything, and about what."""
        found: dict[int, tuple[Rule, list[Place]]] = {}
        for place, decision in self._planned:
            if decision.rule:
                found.setdefault(id(decision.rule), (decision.rule, []))[1].append(place)
        return list(found.values())

    # Parts.

    @property
    def parts(self) -> list[Part]:
        """All that has weights, quantizers, or outputs without one; in order of execution."""
        return list(self._parts(self._model, "", set()))

    def _parts(self, operation: Any, path: str, seen: set[int]) -> Iterator[Part]:
        """Those of a layer or function, and of what is inside it, that were not seen yet.

        The path ends with its name; the whole model's is "". `seen` holds the `id` of each
        operation and variable.
        """
        if id(operation) in seen:
            return
        seen.add(id(operation))
        if isinstance(operation, QuantizingLayer):
            yield from self._quantizing_parts(operation, path, seen)
            return
        units: Units = {}
        if isinstance(operation, QuantizedModel):
            units = self._outputs_of_units if operation is self._model else _units(operation, None)
            self._place_units(operation, units)
        if is_graph(operation):
            self._place_graph(operation)
        if isinstance(operation, keras.Model) or _holds_quantizers(operation):
            for name, child in _children(operation):
                yield from self._parts(child, f"{path}/{name}" if path else name, seen)
        weights = self._unseen_weights(operation, seen)
        unquantized = self.outputs(operation).unquantized
        if weights or unquantized:
            name = path or operation.name
            yield Part(name, operation, tuple(weights), unquantized=unquantized)
        for name, (layer, _) in units.items():
            unquantized = self.outputs(layer).unquantized
            if unquantized:
                yield Part(f"{path}/{name}" if path else name, layer, unquantized=unquantized)

    def _quantizing_parts(
        self, layer: QuantizingLayer, path: str, seen: set[int]
    ) -> Iterator[Part]:
        """A wrapper or holder with its quantizers; and what is inside it, if that has some too."""
        inner: keras.Layer = getattr(layer, "layer", layer)
        unquantized = self.outputs(layer).unquantized
        weights, activations, disabled = [], {}, set()
        for role, quantizer in layer.own_quantizers().items():
            if quantizer.quantization_target is QuantizationTarget.Activation:
                if quantizer.pass_whole_numbers and quantizer.passes_input:
                    unquantized = _WHOLE_NUMBERS
                else:
                    activations[role] = quantizer
            elif isinstance(layer, KerasQuantizationWrapper) and layer.built:
                variable = layer.latent_weight(role)
                if quantizer.enabled:
                    seen.add(id(variable))
                    weights.append(PlannedWeight(role, variable, quantizer=quantizer))
                else:
                    disabled.add(id(variable))
        nested = inner is not layer and _holds_quantizers(inner)
        if not nested:
            weights += self._unseen_weights(inner, seen, disabled, wrapped=True)
        yield Part(path, layer, tuple(weights), activations, unquantized)
        if nested:
            yield from self._parts(inner, f"{path}/{inner.name}", seen)
        seen |= {id(variable) for variable in variables_of_weights(layer)}

    def _unseen_weights(
        self,
        operation: Any,
        seen: set[int],
        disabled: Collection[int] = (),
        wrapped: bool = False,
    ) -> list[PlannedWeight]:
        """The weights of a layer without quantizer, that no part had yet."""
        has_own = isinstance(operation, keras.Layer) and not isinstance(operation, QuantizingLayer)
        own = variables_of_weights(operation) if has_own else []
        rest = {id(variable) for variable in own} - seen
        seen |= rest
        found = self.weights(operation, wrapped) if rest else []
        reasons = dict.fromkeys(disabled, "its quantizer is disabled")
        return [
            replace(weight, reason=reasons.get(id(weight.variable), weight.reason))
            for weight in found
            if id(weight.variable) in rest
        ]


def _float(model: keras.Model) -> keras.Model:
    return model.model if isinstance(model, QuantizedModel) else model


def _units(model: keras.Model, example: Example | None) -> Units:
    """The inner layers of a model without a graph, with their outputs."""
    if isinstance(model, QuantizedModel):
        return units_in(model.model, model.inner_example())
    return units_in(model, example)


def _despite(decision: Decision | None, what: str) -> str:
    """Which rule asks to quantize `what` nevertheless, behind the reason why it is not."""
    rule = decision and decision.rule
    asks = rule and getattr(rule, what) not in (None, FLOAT)
    return f"; rule {rule} has no effect on it" if asks else ""


def _listed(places: list[Place]) -> str:
    """The first of the layers, with the verb for what they lack."""
    names = [f"'{place.path}'" for place in places[:4]]
    rest = [f"{len(places) - 4} more"] if places[4:] else []
    return f"{', '.join(names + rest)} {'have' if places[1:] else 'has'}"


def _reasons_by_class(layer: keras.Layer) -> Callable[[keras.Variable], str]:
    """Why weights of a layer are not quantized by default: its class, or that of the owner."""
    owners: dict[int, keras.Layer] = {}
    for inner in sublayers(layer):
        for variable in own_weights(inner):
            owners.setdefault(id(variable), inner)

    def why(variable: keras.Variable) -> str:
        owner = owners.get(id(variable), layer)
        # What the owner's class would quantize, a row of a layer around it leaves in float.
        overruled = owner is not layer and any(
            weight_paths(owner)[path] is variable for path in default_weights(owner)
        )
        return weight_reason(layer if overruled else owner)

    return why


def _quantizes_outputs(operation: Any) -> bool:
    """Whether this is a wrapper or holder with quantizers for outputs, be they disabled or not."""
    return isinstance(operation, QuantizingLayer) and any(
        quantizer.quantization_target is QuantizationTarget.Activation
        for quantizer in operation.own_quantizers().values()
    )


def _weighs(operation: Any) -> bool:
    """Whether this is a wrapper with quantizers for weights."""
    return isinstance(operation, KerasQuantizationWrapper) and operation.is_weights_quantization


def _held(nodes: list[GraphNode], ends: list[keras.KerasTensor]) -> set[int]:
    """The tensors of a graph, by `id`, that only holders read."""
    bare = {id(tensor) for tensor in ends}
    held: set[int] = set()
    for node in nodes:
        is_holder = isinstance(node.operation, KerasActivationQuantizationHolder)
        (held if is_holder else bare).update(id(tensor) for tensor in node.inputs)
    return held - bare


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


def _no_floats(tensors: list[keras.KerasTensor]) -> UnquantizedOutputs | None:
    """Why tensors cannot be quantized; None where they can."""
    dtypes = sorted({keras.backend.standardize_dtype(tensor.dtype) for tensor in tensors})
    floats = ["float" in dtype for dtype in dtypes]
    if not all(floats):
        state = "float" if any(floats) else "no float"
        return UnquantizedOutputs(state, f"its dtype is {' and '.join(dtypes)}")
    if not all(map(can_be_quantized, tensors)):
        return UnquantizedOutputs("float", "it is sparse or ragged")
    return None


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
