"""Where layers stand in a model: their order, their paths, and what is around them."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

import keras

from keras_qwrap.layers.holder import KerasActivationQuantizationHolder
from keras_qwrap.layers.keras_internals import GraphNode, graph_nodes, input_layer
from keras_qwrap.layers.weights import follow
from keras_qwrap.models.copying import unwrapped
from keras_qwrap.models.graph import is_graph
from keras_qwrap.models.subclassed import QuantizedModel, output_holder_name
from keras_qwrap.models.taps import Example, layer_outputs, quantizable_layers
from keras_qwrap.recipes.rules import Place


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
    return scope_name(f"{name}_quantizer")


def scope_name(name: str) -> str:
    """`name`, with `_` for what TensorFlow does not take in the name of a layer."""
    return re.sub(r"[^A-Za-z0-9_.\\>-]", "_", name)


def places_in_graph(model: keras.Model) -> list[Place]:
    """Layers and functions of a graph in order of execution, inputs first; each once.

    What is inside a nested graph, or inside a model that has none, stands where that one does. A
    wrapper stands for its layer, and holders do not count: the places in a float model are those
    in what was made of it.
    """
    found: dict[int, Place] = {}
    for place in _places(model, set()):
        if not isinstance(place.layer, KerasActivationQuantizationHolder):
            found.setdefault(id(place.layer), place)
    return list(found.values())


def _places(model: keras.Model, seen: set[int], around: tuple[Place, ...] = ()) -> Iterator[Place]:
    seen.add(id(model))
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
            if isinstance(operation, keras.Model) and not isinstance(operation, QuantizedModel):
                inside = quantizable_layers(operation)
                yield from places_by_path(operation, inside, place.chain)
        elif id(operation) not in seen:
            yield from _places(operation, seen, place.chain)


def graphs_in(model: keras.Model) -> list[keras.Model]:
    """A graph and those nested in it."""
    found = {id(model): model}
    waiting = [model]
    while waiting:
        for node in graph_nodes(waiting.pop()):
            if is_graph(node.operation) and id(node.operation) not in found:
                found[id(node.operation)] = node.operation
                waiting.append(node.operation)
    return list(found.values())


def places_by_path(
    model: keras.Model, layers: dict[str, keras.Layer], outer: tuple[Place, ...] = ()
) -> list[Place]:
    """Layers of a model without a graph: each is in what its path leads through."""

    def place(layer: keras.Layer, path: str, around: tuple[Place, ...]) -> Place:
        if outer:
            return Place(layer, f"{outer[-1].path}/{path}", around)
        names = Place(layer, path, around).names
        return Place(layer, path, around, tuple(f"{model.name}/{name}" for name in names))

    places = []
    for path, layer in layers.items():
        around = outer
        for end in (i for i, letter in enumerate(path) if letter == "/"):
            found = follow(model, path[:end])
            if isinstance(found, keras.Layer):
                around = (*around, place(found, path[:end], around))
        places.append(place(layer, path, around))
    return places


Units = dict[str, tuple[keras.Layer, list[keras.KerasTensor]]]


def units_in(model: keras.Model, example: Example | None) -> Units:
    """The inner layers of a model without a graph by path, with their outputs, in a call's order.

    Layers that the call does not run come last, with no outputs.
    """
    outputs = layer_outputs(model, example)
    layers = quantizable_layers(model)
    return {path: (layers[path], outputs.get(path, [])) for path in [*outputs, *layers]}


def places_of_units(model: keras.Model, units: Units) -> list[Place]:
    """The inner layers of a whole model without a graph, with the names that its report has."""
    places = places_by_path(model, {path: layer for path, (layer, _) in units.items()})
    holders = [
        [output_holder_name(path, i) for i in range(len(outputs))]
        for path, (_, outputs) in units.items()
    ]
    return [
        replace(place, also=(model.name, *place.also, *names))
        for place, names in zip(places, holders, strict=True)
    ]
