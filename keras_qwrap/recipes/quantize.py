"""`quantize_model`: a whole float model, made quantization-aware by a recipe."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import keras
import numpy as np

from keras_qwrap.calibration.batches import batches
from keras_qwrap.calibration.bias import correct_biases
from keras_qwrap.calibration.calibrate import calibrate, has_ranges_to_find
from keras_qwrap.layers.holder import KerasActivationQuantizationHolder, unquantized_name
from keras_qwrap.layers.keras_internals import GraphNode, graph_nodes, input_layer, sublayers
from keras_qwrap.layers.layer_table import Behaviour, OutputRange, behaviour_of, output_range
from keras_qwrap.layers.refusals import refusal
from keras_qwrap.layers.remaking import loads_by_itself
from keras_qwrap.layers.weights import (
    default_weights,
    find_weight,
    follow,
    variables_of_weights,
    weight_paths,
    weight_reason,
)
from keras_qwrap.layers.wrapper import KerasQuantizationWrapper
from keras_qwrap.models.batch_norm import fold_batch_norm
from keras_qwrap.models.copying import (
    Copier,
    carry_compiled,
    check_built,
    check_float,
    is_graph,
    unwrapped,
)
from keras_qwrap.models.placement import (
    can_be_quantized,
    carries_grid,
    exact_inputs,
    inputs_of_custom_layers,
    output_ranges,
)
from keras_qwrap.models.subclassed import QuantizedModel, output_holder_name
from keras_qwrap.models.taps import Example, layer_outputs, quantizable_layers
from keras_qwrap.numerics.checks import bad_value, naming, warn
from keras_qwrap.numerics.search import weights_threshold
from keras_qwrap.numerics.tensors import to_numpy
from keras_qwrap.quantizers.base import BaseKerasTrainableQuantizer
from keras_qwrap.quantizers.config import QuantizationMethod, TrainableQuantizerActivationConfig
from keras_qwrap.quantizers.ste import STEActivationQATQuantizer
from keras_qwrap.recipes.recipe import Decision, Recipe, as_recipe
from keras_qwrap.recipes.rules import FLOAT, Place, Rule
from keras_qwrap.recipes.specs import (
    ActivationSpec,
    WeightsSpec,
    activation_quantizer,
    weights_quantizer,
)


def quantize_model(
    model: keras.Model,
    recipe: str | dict | Recipe = "w8a8",
    calibration_data: Any = None,
    batch_size: int = 32,
    steps: int | None = None,
    verbose: str | int = "auto",
    example: Example | None = None,
) -> keras.Model:
    """A new quantization-aware model that computes as `model` does, on the grids of a recipe.

    Every layer whose weights are quantized or whose output is, is a `KerasQuantizationWrapper` of
    the same name in the new model; inputs and functions between layers have a
    `KerasActivationQuantizationHolder` behind them, `<name>_quantizer` (`input_quantizer` where an
    input has no name). Behind a function that
    makes an output of the model it has the function's name, so that `output_names` are the same,
    and the function is `<name>_unquantized`. Weights are copied, layers stay shared, and
    `model` is left as it is. Activation ranges come from `calibration_data`, from a later
    `calibrate`, or from training; until then activations pass unquantized in inference. Inputs that
    lookups read stay as they are; so do those of rank 3 or less that only layers outside Keras
    read, if calibration finds whole numbers alone in them. With `bias_correction` the recipe also
    shifts biases, by the same data.

    A layer of a graph that cannot be wrapped is left in float, with a warning. A subclassed model
    becomes a `QuantizedModel`. `quantization_report(quantized, recipe)` says what was left in
    float, and why.

    Args:
        model: a built Keras model without quantized layers.
        recipe: a preset such as "w8a8", a `Recipe`, or its dictionary.
        calibration_data: inputs as `calibrate` takes them; not read where the recipe quantizes
            weights alone.
        batch_size: rows of an array in each calibration step, as `calibrate` takes them.
        steps: calibration steps; all data by default.
        verbose: progress display of the calibration: "auto", 0 or 1.
        example: for a subclassed model, arguments of a call as `QuantizedModel` takes them.

    Raises:
        TypeError: `model` is no Keras model.
        ValueError: it is not built, quantized already, or holds a layer that cannot be made again
            from its config; the recipe does not fit it; the data does not.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_qwrap as qi

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="dense")])
    images = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    quantized = qi.quantize_model(model, "w8a8", images, verbose=0)
    print(type(quantized.get_layer("dense")).__name__)  # KerasQuantizationWrapper
    ```
    """
    recipe = as_recipe(recipe)
    check_built(model)
    check_float(model)
    if example is not None and is_graph(model):
        raise bad_value("example", example, "None", "Only a subclassed model needs an example.")
    _check_options(model, recipe, calibration_data)
    if recipe.fold_batch_norm:
        model = fold_batch_norm(model)
    if is_graph(model):
        quantizer = _GraphQuantizer(model, recipe)
        new = quantizer.copy_model(model)
        _warn_of_rules_in_vain(quantizer.planned, quantizer.quantized)
    else:
        new = _quantize_subclassed(model, recipe, example)
    if recipe.bias_correction:
        correct_biases(new, model, calibration_data, batch_size, steps)
    if calibration_data is not None and has_ranges_to_find(new):
        calibrate(new, calibration_data, None, batch_size, steps, verbose)
    elif calibration_data is not None and _finds_ranges(recipe) and not recipe.bias_correction:
        for _ in batches(new, calibration_data, batch_size, steps):
            pass  # Refuses data that does not fit, though nothing is to be found in it.
    return new


def _check_options(model: keras.Model, recipe: Recipe, data: Any) -> None:
    """Refuse no data where it is needed, and what only a graph allows."""
    for option in ("fold_batch_norm", "bias_correction"):
        if getattr(recipe, option) and not is_graph(model):
            expected = f"{option}=False for a subclassed model"
            raise bad_value("recipe", recipe, expected, "It has no graph.")
    if recipe.bias_correction and (data is None or isinstance(data, Iterator)):
        raise bad_value(
            "calibration_data",
            data,
            "data that can be read twice, for bias_correction",
            "Pass an array, a dataset or a list of batches.",
        )


def _finds_ranges(recipe: Recipe) -> bool:
    specs = [recipe.activations, *(rule.activations for rule in recipe.rules)]
    return any(isinstance(spec, ActivationSpec) for spec in specs)


def ordered_nodes(model: keras.Model) -> list[GraphNode]:
    """The nodes of a graph in an order of execution that holders between them do not change.

    Each node stands right behind what it needs, and what the first outputs need comes first.
    (Keras orders by the distance from the outputs, which holders change.)
    """
    made_by = {id(tensor): node for node in graph_nodes(model) for tensor in node.outputs}
    ordered: dict[int, GraphNode] = {}
    stack = [made_by[id(t)] for t in reversed(model.outputs) if id(t) in made_by]
    while stack:
        before = [made_by[id(t)] for t in reversed(stack[-1].inputs) if id(t) in made_by]
        waiting = [node for node in before if id(node) not in ordered]
        if waiting and id(stack[-1]) not in ordered:
            stack += waiting
        else:
            ordered.setdefault(id(stack[-1]), stack.pop())
    return list(ordered.values())


_UNNAMED = re.compile(r"(input_layer|keras_tensor)(_\d+)?")


def input_names(model: keras.Model) -> list[str]:
    """What the inputs of a graph are called: as the user does, else `input`, `input_1`, ...

    Keras counts the inputs that have no name in a whole process, so that its own names for them
    differ from run to run.
    """
    names = [input_layer(tensor).name for tensor in model.inputs]
    taken = {operation.name for operation in getattr(model, "operations", model.layers)}
    tries = (f"input_{number}" if number else "input" for number in itertools.count())
    free = (name for name in tries if name not in taken)
    return [next(free) if _UNNAMED.fullmatch(name) else name for name in names]


def input_quantizer_name(name: str) -> str:
    """What the holder behind an input is called."""
    return _scope_name(f"{name}_quantizer")


def _places(
    model: keras.Model, graphs: dict[int, keras.Model], around: tuple[Place, ...] = ()
) -> Iterator[Place]:
    """Layers and functions of a graph in order of execution; a nested model's, where it stands."""
    graphs[id(model)] = model
    inputs = map(input_layer, model.inputs)
    nodes = [
        (layer, name, () if around else (input_quantizer_name(name),))
        for layer, name in zip(inputs, input_names(model), strict=True)
    ]
    nodes += [(unwrapped(n.operation), n.operation.name, ()) for n in ordered_nodes(model)]
    for operation, name, also in nodes:
        place = Place(operation, f"{around[-1].path}/{name}" if around else name, around, also)
        if not is_graph(operation):
            yield place
            yield from _places_inside(place) if _is_open(operation) else ()
        elif id(operation) not in graphs:
            yield from _places(operation, graphs, place.chain)


def _is_open(operation: Any) -> bool:
    """Whether an operation of a graph is a model without a graph, whose layers are seen too."""
    return isinstance(operation, keras.Model) and not isinstance(operation, QuantizedModel)


def _places_inside(outer: Place) -> Iterator[Place]:
    for path, layer in quantizable_layers(outer.layer).items():
        yield _place_inside(outer.layer, path, layer, outer.chain)


def _place_inside(
    model: keras.Model, path: str, layer: keras.Layer, outer: tuple[Place, ...] = ()
) -> Place:
    """Where a layer of a model without a graph is: in the layers that its path leads through."""

    def place(layer: keras.Layer, path: str, around: tuple[Place, ...]) -> Place:
        if outer:
            return Place(layer, f"{outer[-1].path}/{path}", around)
        names = Place(layer, path, around).names
        return Place(layer, path, around, tuple(f"{model.name}/{name}" for name in names))

    parts = path.split("/")
    around = outer
    for number in range(1, len(parts)):
        before = "/".join(parts[:number])
        found = follow(model, before)
        if isinstance(found, keras.Layer):
            around = (*around, place(found, before, around))
    return place(layer, path, around)


Planned = list[tuple[Place, Decision]]
"""Layers in order, and what a recipe says of each."""


def by_id(planned: Planned) -> dict[int, Decision]:
    """What is decided of each layer, by its `id`."""
    return {id(place.layer): decision for place, decision in planned}


def plan_graph(
    model: keras.Model, recipe: Recipe
) -> tuple[Planned, dict[int, Decision], list[keras.Model]]:
    """What a recipe says of each layer of a graph, and of functions too, by `id`; nested graphs.

    It says the same of a float model and of what was made of it: a wrapper stands for its layer,
    and holders do not count. Functions between layers follow no rule.
    """
    graphs: dict[int, keras.Model] = {}
    found: dict[int, Place] = {}
    for place in _places(model, graphs):
        found.setdefault(id(place.layer), place)
    layers = [
        place
        for place in found.values()
        if isinstance(place.layer, keras.Layer)
        and not isinstance(place.layer, KerasActivationQuantizationHolder)
    ]
    planned = list(zip(layers, recipe.plan(layers), strict=True))
    decisions = dict.fromkeys(found, recipe.decide(None)) | by_id(planned)
    return planned, decisions, list(graphs.values())


Units = dict[str, tuple[keras.Layer, list[keras.KerasTensor]]]


def units_in(model: keras.Model, example: Example | None) -> Units:
    """The inner layers of a subclassed model by path, with their outputs, in the order of a call.

    Layers that the call does not run come last, with no outputs.
    """
    outputs = layer_outputs(model, example)
    layers = quantizable_layers(model)
    return {path: (layers[path], outputs.get(path, [])) for path in [*outputs, *layers]}


def plan_units(model: keras.Model, units: Units, recipe: Recipe) -> Planned:
    """What a recipe says of each of the inner layers of a subclassed model."""
    places = []
    for path, (layer, outputs) in units.items():
        place = _place_inside(model, path, layer)
        holders = [output_holder_name(path, i) for i in range(len(outputs))]
        places.append(replace(place, also=(model.name, *place.also, *holders)))
    return list(zip(places, recipe.plan(places), strict=True))


def _places_by_rule(planned: Planned) -> list[tuple[Rule, list[Place]]]:
    """The rules that decide about anything, and about what."""
    found: dict[int, tuple[Rule, list[Place]]] = {}
    for place, decision in planned:
        if decision.rule:
            found.setdefault(id(decision.rule), (decision.rule, []))[1].append(place)
    return list(found.values())


def _asks_for_weights(rule: Rule, places: list[Place]) -> bool:
    """Whether a rule wants weights quantized, of layers that have any for that."""
    asks = isinstance(rule.weights, WeightsSpec)
    return asks and any(default_weights(place.layer) for place in places)


def weights_in_vain(planned: Planned) -> dict[int, str]:
    """Why rules that ask to quantize weights, by their `id`, have no effect on any.

    Where layers have no weights at all, and the rule asks for activations too, nothing is missing.
    """
    return {
        id(rule): f"{rule} has no effect on weights: {_listed(places)} no weight that is ever "
        f"quantized ({refusal(places[0].layer) or weight_reason(places[0].layer)})"
        for rule, places in _places_by_rule(planned)
        if isinstance(rule.weights, WeightsSpec)
        and not _asks_for_weights(rule, places)
        and (any(place.layer.weights for place in places) or rule.activations in (None, FLOAT))
    }


def _listed(places: list[Place]) -> str:
    """The first of the layers, with the verb for what they lack."""
    names = [f"'{place.path}'" for place in places[:4]]
    rest = [f"{len(places) - 4} more"] if places[4:] else []
    return f"{', '.join(names + rest)} {'have' if places[1:] else 'has'}"


def _warn_of_rules_in_vain(planned: Planned, quantized: set[int]) -> None:
    """Say which rules ask for what they cannot have.

    `quantized` holds the `id` of each layer whose outputs have a quantizer. A rule that has an
    effect on weights may ask for activations that are quantized behind another layer.
    """
    vain = weights_in_vain(planned)
    for rule, places in _places_by_rule(planned):
        text = vain.get(id(rule), "")
        asks = isinstance(rule.activations, ActivationSpec) and not _asks_for_weights(rule, places)
        if asks and not any(id(place.layer) in quantized for place in places):
            text = f"{text}, and" if text else str(rule)
            text += (
                f" has no effect on activations: {_listed(places)} no quantizer of outputs; the "
                "activations are quantized behind other layers, keep the grid that they have, or "
                "are no floats"
            )
        if text:
            warn(f"{text}. `quantization_report(model, recipe)` says what is done instead.")


def decided_weights(layer: keras.Layer, decisions: Mapping[int, Decision]) -> dict[int, Decision]:
    """What is decided of the variables of a layer, by their `id`.

    The innermost of the layers that are decided about, of all around a variable, has the say.
    """
    inside = [inner for inner in sublayers(layer) if id(inner) in decisions]
    found: dict[int, Decision] = {}
    for inner in sorted(inside, key=lambda each: len(sublayers(each)), reverse=True):
        found |= {id(v): decisions[id(inner)] for v in variables_of_weights(inner)}
    return found


def _weights_quantizers(
    layer: keras.Layer, decisions: Mapping[int, Decision]
) -> dict[str, BaseKerasTrainableQuantizer]:
    """The quantizers of a layer's weights, by path."""
    variables = weight_paths(layer)
    decided = decided_weights(layer, decisions)
    made = {}
    for path, axes in default_weights(layer).items():
        decision = decided.get(id(variables[path]))
        if decision and decision.weights:
            made[path] = _weight_quantizer(layer, path, axes, decision.weights)
    return made


def _weight_quantizer(
    layer: keras.Layer, path: str, axes: int | tuple[int, ...] | None, spec: WeightsSpec
) -> BaseKerasTrainableQuantizer:
    weight = to_numpy(find_weight(layer, path)).astype(np.float32)
    if not np.isfinite(weight).all():
        received = f"layer '{layer.name}' whose weight '{path}' is not finite"
        raise bad_value("model", received, "finite weights", "Train it again, or leave it out.")
    number = len(axes) if isinstance(axes, tuple) else 1
    kept = axes if spec.per_channel and number < weight.ndim else None
    params = None
    if spec.range == "mse":
        params = {"threshold": weights_threshold(weight, kept, spec.num_bits, str(spec.method))}
    with naming(f"layer '{layer.name}', weight '{path}'"):
        return weights_quantizer(spec, kept, weight.ndim, params)


def _gathers(layer: keras.Layer, decision: Decision) -> bool:
    """Whether outputs are entries of a weight, on a grid that is fine enough for them."""
    if behaviour_of(layer) is not Behaviour.GATHER or not decision.weights:
        return False
    coarse = decision.activations and decision.activations.num_bits < decision.weights.num_bits
    return not coarse and list(default_weights(layer).values()) == [None]


def _output_quantizer(spec: ActivationSpec, output: OutputRange) -> BaseKerasTrainableQuantizer:
    if output is OutputRange.DATA:
        return activation_quantizer(spec)
    params = {"threshold": 1.0, "is_signed": output is OutputRange.SIGNED_UNIT}
    config = TrainableQuantizerActivationConfig(
        QuantizationMethod.POWER_OF_TWO, spec.num_bits, params
    )
    return STEActivationQATQuantizer(config)


def _is_supported(layer: keras.Layer) -> bool:
    """Whether a layer can be wrapped; says what is left in float if not."""
    why = refusal(layer)
    if why:
        warn(f"Layer '{layer.name}' is left in float. {why}")
    return not why


class _GraphQuantizer(Copier):
    """Makes the quantized copy of a Functional or Sequential model."""

    def __init__(self, model: keras.Model, recipe: Recipe) -> None:
        super().__init__()
        self._model = model
        self._outputs: dict[int, list[OutputRange]] = {}
        self.planned, self._decisions, graphs = plan_graph(model, recipe)
        self.quantized: set[int] = set()
        for graph in graphs:
            self._outputs |= output_ranges(graph)
        self._exact = exact_inputs(model)
        self._of_custom_layers = inputs_of_custom_layers(model)
        self._held: dict[int, keras.KerasTensor] = {}
        names = [{op.name for op in getattr(g, "operations", g.layers)} for g in graphs]
        self._taken = set().union(*names)
        self._making = {key: place for graph in graphs for key, place in _making_outputs(graph)}
        self._frozen = _frozen_functions(model)

    def new_layer(self, layer: keras.Layer) -> keras.Layer:
        decision = self._decisions[id(layer)]
        copy = self.plain_copy(layer)
        outputs = [] if _gathers(layer, decision) else self._outputs.get(id(layer), [])
        weights = _weights_quantizers(layer, self._decisions)
        quantized = weights or (outputs and decision.activations)
        # A wrapper loads what Keras saves of a layer, and cannot load.
        needed = quantized or not loads_by_itself(layer)
        if not needed or not _is_supported(layer):
            return copy
        activations = []
        if decision.activations:
            activations = [_output_quantizer(decision.activations, output) for output in outputs]
        self.quantized |= {id(layer)} if activations else set()
        return KerasQuantizationWrapper(copy, weights, activations)

    def call(self, layer: Any, new: Any, args: tuple, kwargs: dict) -> Any:
        args, kwargs = keras.tree.map_structure(
            lambda value: self._held.get(id(value), value), (args, kwargs)
        )
        spec = None
        if not isinstance(layer, keras.Layer) and id(layer) in self._outputs:
            spec = self._decisions[id(layer)].activations
        if spec is None:
            return new(*args, **kwargs)
        kinds = self._outputs[id(layer)]
        stems = [f"{layer.name}_{i}" for i in range(len(kinds))] if kinds[1:] else [layer.name]
        names = [f"{stem}_quantizer" for stem in stems]
        making = self._making.get(id(layer))
        if making is not None and _scope_name(layer.name) == layer.name:
            new.name = self._free(unquantized_name(layer.name))
            self._taken.remove(layer.name)
            names[making] = layer.name
        outputs = new(*args, **kwargs)
        trainable = id(layer) not in self._frozen
        held = [
            self._holder(name, _output_quantizer(spec, kind), trainable)(tensor)
            for name, kind, tensor in zip(names, kinds, keras.tree.flatten(outputs), strict=True)
        ]
        return keras.tree.pack_sequence_as(outputs, held)

    def new_inputs(self, model: keras.Model) -> Any:
        inputs = super().new_inputs(model)
        if model is self._model:
            news = keras.tree.flatten(inputs)
            for old, new, name in zip(model.inputs, news, input_names(model), strict=True):
                quantizer = self._input_quantizer(old)
                if quantizer:
                    holder = self._holder(input_quantizer_name(name), quantizer, model.trainable)
                    self._held[id(new)] = holder(new)
        return inputs

    def sequential_layers(self, model: keras.Sequential) -> list[keras.Layer]:
        layers = super().sequential_layers(model)
        quantizer = self._input_quantizer(model.inputs[0]) if model is self._model else None
        if quantizer is None:
            return layers
        name = input_quantizer_name(input_names(model)[0])
        return [self._holder(name, quantizer, model.trainable), *layers]

    def _input_quantizer(self, tensor: keras.KerasTensor) -> BaseKerasTrainableQuantizer | None:
        spec = self._decisions[id(input_layer(tensor))].activations
        if not spec or not can_be_quantized(tensor) or id(tensor) in self._exact:
            return None
        self.quantized |= {id(input_layer(tensor))}
        return activation_quantizer(spec, id(tensor) in self._of_custom_layers)

    def _holder(
        self, name: str, quantizer: BaseKerasTrainableQuantizer, trainable: bool
    ) -> keras.Layer:
        name = self._free(_scope_name(name))
        return KerasActivationQuantizationHolder(quantizer, name=name, trainable=trainable)

    def _free(self, name: str) -> str:
        """`name`, or what comes next where it is taken; taken from now on."""
        tries = (f"{name}_{number}" if number else name for number in itertools.count())
        free = next(each for each in tries if each not in self._taken)
        self._taken.add(free)
        return free


def _frozen_functions(model: keras.Model) -> set[int]:
    """The `id` of each function of a graph, or of one inside it, whose results training leaves.

    It is in a frozen model, or all layers that it depends on are frozen, and there is one.
    """
    before: dict[int, set[bool]] = {}

    def visit(graph: keras.Model, given: list[set[bool]], trainable: bool) -> list[set[bool]]:
        """What is known, behind a graph's outputs, of the layers before: which flags they have."""
        trainable = trainable and graph.trainable
        known = {id(tensor): flags for tensor, flags in zip(graph.inputs, given, strict=True)}
        for node in ordered_nodes(graph):
            read = [known.get(id(tensor), set()) for tensor in node.inputs]
            if is_graph(node.operation):
                made = visit(node.operation, read, trainable)
            else:
                found = set().union(*read)
                if isinstance(node.operation, keras.Layer):
                    found |= {trainable and node.operation.trainable}
                seen = {False} if not trainable else found or {True}
                before[id(node.operation)] = before.get(id(node.operation), set()) | seen
                made = [found] * len(node.outputs)
            known |= {id(tensor): flags for tensor, flags in zip(node.outputs, made, strict=True)}
        return [known.get(id(tensor), set()) for tensor in graph.outputs]

    visit(model, [set()] * len(model.inputs), True)
    return {key for key, flags in before.items() if flags == {False}}


def _scope_name(name: str) -> str:
    """`name`, with `_` for what TensorFlow does not take in the name of a layer."""
    return re.sub(r"[^A-Za-z0-9_.\\>-]", "_", name)


def _making_outputs(graph: keras.Model) -> Iterator[tuple[int, int]]:
    """The `id` of each operation that makes one output of a graph, and which of its outputs it is.

    One that makes several is left out: they have one name.
    """
    leaving = {id(tensor) for tensor in graph.outputs}
    calls = Counter(id(node.operation) for node in graph_nodes(graph))
    for node in graph_nodes(graph):
        places = [i for i, tensor in enumerate(node.outputs) if id(tensor) in leaving]
        if len(places) == calls[id(node.operation)] == 1:
            yield id(node.operation), places[0]


def _quantize_subclassed(
    model: keras.Model, recipe: Recipe, example: Example | None
) -> keras.Model:
    """The quantized copy of a model without graph."""
    units = units_in(model, example)
    planned = plan_units(model, units, recipe)
    decisions = by_id(planned)
    weights = _weights_quantizers(model, decisions)
    activations: dict[str, list[BaseKerasTrainableQuantizer]] = {}
    for path, (layer, outputs) in units.items():
        decision = decisions[id(layer)]
        wanted = decision.activations
        floats = all(can_be_quantized(tensor) for tensor in outputs)
        apart = not (carries_grid(layer) or _gathers(layer, decision))
        if wanted and outputs and floats and apart:
            kind = output_range(layer)
            activations[path] = [_output_quantizer(wanted, kind) for _ in outputs]
    _warn_of_rules_in_vain(planned, {id(units[path][0]) for path in activations})
    new = QuantizedModel(model, weights, activations, example=example)
    carry_compiled(model, new)
    return new
