"""Where the activations of a model are quantized: once behind what integer hardware fuses.

The rules, for each operation of a Functional or Sequential graph:

- A linear layer's output that only a batch normalization reads, and a linear layer's, batch
  normalization's or sum's output that only an activation function reads, is not quantized: the
  pair runs as one integer kernel, also with layers between the two that leave their input as it
  is in inference (dropout, ...).
- So do a concatenation and the batch normalization that alone reads it, and, with max pooling, what
  it alone reads, unless its grid is known: the largest code is the code of the largest value.
- Operations that move values or choose among them (pooling, reshape, padding, cropping, ...) carry
  the grid of their input; those that average or interpolate carry its scale, as integer kernels do.
- Softmax and sigmoid lie in `[0, 1)`, tanh in `[-1, 1)`: their grids are known.
- Everything else is quantized onto a grid that is found from data. Integer tensors are not, nor
  those that Keras declares as floats and computes as integers (what lookups count, and sums or
  concatenations of such), nor sparse and ragged ones.
- A model's input is left as it is where something needs its exact values (token ids, the value that
  stands for a masked step), be it inside a layer, also behind functions of that input alone, or
  behind sums, products and concatenations; and where only batch normalization or `Normalization`
  reads it, made for inputs of unlike sizes; so is whatever else is read for its exact values.
- An input of rank 3 or less that only layers outside Keras read may hold whole numbers (labels,
  lengths, indices): its quantizer passes them, if calibration finds that its data hold no others.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_qwrap.layers.keras_internals import (
    GraphNode,
    graph_nodes,
    output_specs,
    sublayers,
    traced_nodes,
)
from keras_qwrap.layers.layer_table import (
    LOOKUPS,
    Behaviour,
    OutputRange,
    activation_name,
    behaviour_of,
    is_custom,
    is_identity,
    may_look_up,
    output_range,
    row_of_outputs,
)
from keras_qwrap.models.copying import unwrapped
from keras_qwrap.models.graph import Graph, is_graph

_CARRIERS = frozenset({Behaviour.CARRIER, Behaviour.MAX_POOLING})

_MAKING_NUMBERS = frozenset({Behaviour.SUM, Behaviour.MIXTURE, Behaviour.CONCATENATION})
"""What makes of numbers those that a lookup reads: joins, shifts or masks them."""

_NORMALIZATIONS = frozenset({Behaviour.BATCH_NORMALIZATION, Behaviour.NORMALIZATION})

_BEFORE_NORMALIZATION = frozenset({Behaviour.CONCATENATION, Behaviour.MASKING})
"""What, beside linear layers, runs in one kernel with the batch normalization behind it."""

_BEFORE_ACTIVATION = frozenset({Behaviour.SUM, Behaviour.BATCH_NORMALIZATION})
"""What, beside linear layers, runs in one kernel with the activation function behind it."""

_HIGHEST_RANK_OF_WHOLE_NUMBERS = 3
"""Rank, with the batch, of the inputs that may hold ids or lengths; others hold pixels."""


def can_be_quantized(tensor: keras.KerasTensor) -> bool:
    """Whether a tensor is of floats, and neither sparse nor ragged."""
    return _are_float([tensor]) and not (tensor.sparse or getattr(tensor, "ragged", False))


def as_computed(model: keras.Model) -> dict[int, keras.KerasTensor]:
    """What a graph computes unlike Keras declares it, by the declared tensor's `id`.

    Lookups declare their counts as floats, as merging layers do with all that they make of
    integers, and products with a number are declared sparse.
    """
    found: dict[int, keras.KerasTensor] = {}
    for node in graph_nodes(model):
        made: list[Any] = []
        if is_graph(node.operation):
            inside = as_computed(node.operation)
            made = [inside.get(id(tensor), tensor) for tensor in node.operation.outputs]
        elif _may_be_declared_wrong(node, found):
            made = _traced(node, found)
        for declared, tensor in zip(node.outputs, made, strict=False):
            known = isinstance(tensor, keras.KerasTensor)
            if known and can_be_quantized(tensor) != can_be_quantized(declared):
                found[id(declared)] = tensor
    return found


def _may_be_declared_wrong(node: GraphNode, known: dict[int, keras.KerasTensor]) -> bool:
    if any(tensor.sparse for tensor in node.outputs):
        return True
    if any(_are_float([known.get(id(tensor), tensor)]) for tensor in node.inputs):
        return False
    variables = getattr(node.operation, "variables", [])
    made_by_floats = any("float" in variable.dtype for variable in variables)
    return _are_float(node.outputs) and not made_by_floats


def _traced(node: GraphNode, known: dict[int, keras.KerasTensor]) -> list[Any]:
    """The outputs that an operation gives when it runs; none where it cannot be traced."""
    args, kwargs = keras.tree.map_structure(
        lambda value: known.get(id(value), value), node.arguments
    )
    try:
        return keras.tree.flatten(output_specs(node.operation, args, kwargs))
    except Exception:  # A `call` of the user's may raise anything; the declared outputs hold then.
        return []


def fusions(nodes: list[GraphNode], ends: list[keras.KerasTensor]) -> dict[int, list[Any]]:
    """The operations that run in one integer kernel with what reads them, by `id`: the readers.

    `nodes` are those of a graph, and `ends` its outputs. An operation with several nodes is there
    if it fuses in all of them.
    """
    graph = Graph(nodes, ends)

    def only_reader(
        tensor: keras.KerasTensor, skipped: Callable[[GraphNode], bool]
    ) -> tuple[GraphNode, keras.KerasTensor] | None:
        """The one node that reads a tensor, behind those that are skipped, and what it reads."""
        node = graph.only_reader(tensor)
        if node is None:
            return None
        return only_reader(node.outputs[0], skipped) if skipped(node) else (node, tensor)

    def fused_reader(operation: Any, tensor: keras.KerasTensor) -> Any:
        lookup = only_reader(tensor, _leads_to_lookups)
        if lookup and _needs_exactly(*lookup):
            carries = is_graph(operation) or carries_grid(operation)
            return None if carries else lookup[0].operation
        reader = only_reader(tensor, lambda node: is_identity(node.operation))
        return reader[0].operation if reader and _fuses(operation, reader[0].operation) else None

    into: dict[int, list[Any]] = {}
    apart = set()
    for node in nodes:
        for tensor in node.outputs:
            reader = fused_reader(node.operation, tensor)
            if reader is not None:
                into.setdefault(id(node.operation), []).append(reader)
            else:
                apart.add(id(node.operation))
    return {key: behind for key, behind in into.items() if key not in apart}


def exact_inputs(model: keras.Model) -> dict[int, list[Any]]:
    """The inputs of a graph that are left as they are, by `id`: the operations that need it."""
    found = {}
    for tensor in model.inputs:
        exact = [
            unwrapped(node.operation)
            for node, read in _readers(tensor, model, _leads_to_lookups)
            if _needs_exactly(node, read, unknown=True) or not any(map(_is_float, node.outputs))
        ]
        operations = [unwrapped(node.operation) for node, _ in _readers(tensor, model)]
        if operations and all(map(is_normalization, operations)):
            exact = operations
        if exact:
            layers = [operation for operation in exact if isinstance(operation, keras.Layer)]
            found[id(tensor)] = list(dict.fromkeys(layers or exact))
    return found


def inputs_of_custom_layers(model: keras.Model) -> set[int]:
    """The inputs of a graph, by `id`, that may hold whole numbers for layers outside Keras."""
    found = set()
    for tensor in model.inputs:
        readers = [unwrapped(node.operation) for node, _ in _readers(tensor, model)]
        low = len(tensor.shape) <= _HIGHEST_RANK_OF_WHOLE_NUMBERS
        if low and readers and all(map(is_custom, readers)):
            found.add(id(tensor))
    return found


def _passes_on(node: GraphNode) -> bool:
    """Whether an operation only moves values, or is a function of one tensor alone."""
    function = not isinstance(node.operation, keras.Layer) and len(node.inputs) == 1
    if function:
        return behaviour_of(node.operation) not in LOOKUPS | {Behaviour.INDEXING}
    return carries_grid(unwrapped(node.operation))


def _leads_to_lookups(node: GraphNode) -> bool:
    """Whether a lookup behind an operation needs the exact values of what the operation reads."""
    return _passes_on(node) or behaviour_of(unwrapped(node.operation)) in _MAKING_NUMBERS


def _readers(
    tensor: keras.KerasTensor,
    model: keras.Model,
    skipped: Callable[[GraphNode], bool] = _passes_on,
) -> Iterator[tuple[GraphNode, keras.KerasTensor]]:
    """What reads a tensor, behind what is skipped, and the tensor that it reads."""
    for node in graph_nodes(model):
        operation = unwrapped(node.operation)
        places = [place for place, each in enumerate(node.inputs) if each is tensor]
        if is_graph(operation):
            for place in places:
                yield from _readers(operation.inputs[place], operation, skipped)
        elif places and skipped(node) and _are_float(node.outputs):
            for output in node.outputs:
                yield from _readers(output, model, skipped)
        elif places:
            yield node, tensor


def _needs_exactly(node: GraphNode, tensor: keras.KerasTensor, unknown: bool = False) -> bool:
    """Whether a tensor reaches, in an operation, what needs its exact values.

    `unknown` is the answer where a lookup is inside, and what reaches it cannot be traced. Of a
    layer without one nothing is known but what calibration finds.
    """
    operation = unwrapped(node.operation)
    row = row_of_outputs(operation)
    if row.behaviour in LOOKUPS:
        return True
    if not isinstance(operation, keras.Layer):
        return bool(row.exact) and _is_argument(node, tensor, row.exact)
    if not any(map(may_look_up, sublayers(operation))):
        return False
    try:
        begin, nodes = traced_nodes(operation, node.arguments)
    except Exception:  # A `call` of the user's may raise anything where it is traced alone.
        return unknown
    pairs = zip(keras.tree.flatten(node.arguments), keras.tree.flatten(begin), strict=True)
    reached = {id(new) for old, new in pairs if old is tensor}
    for inner in nodes:
        read = [each for each in inner.inputs if id(each) in reached]
        behaviour = behaviour_of(inner.operation)
        if read and behaviour is Behaviour.CALLING:
            return unknown
        to_integers = behaviour is Behaviour.CAST and not _are_float(inner.outputs)
        if any(to_integers or _needs_exactly(inner, each, unknown) for each in read):
            return True
        reached.update(id(output) for output in inner.outputs if read)
    return False


def _is_argument(node: GraphNode, tensor: keras.KerasTensor, names: frozenset[str]) -> bool:
    args, kwargs = node.arguments
    given = inspect.signature(node.operation.call).bind(*args, **kwargs).arguments
    return any(given.get(name) is tensor for name in names)


def carries_grid(operation: Any) -> bool:
    """Whether outputs lie on the grid of a float input, as those of pooling or reshaping do."""
    return behaviour_of(operation) in _CARRIERS or is_identity(operation)


def is_normalization(operation: Any) -> bool:
    """Whether an operation is made for inputs of unlike sizes."""
    return behaviour_of(operation) in _NORMALIZATIONS


def _is_float(tensor: keras.KerasTensor) -> bool:
    return "float" in keras.backend.standardize_dtype(tensor.dtype)


def _are_float(tensors: list[keras.KerasTensor]) -> bool:
    return all(map(_is_float, tensors))


def _fuses(operation: Any, reader: Any) -> bool:
    """Whether the one reader of an output, if there is one, runs in the same integer kernel."""
    behaviour, reading = behaviour_of(operation), behaviour_of(reader)
    linear = behaviour is Behaviour.LINEAR and activation_name(operation) in ("", "linear")
    if reading is Behaviour.BATCH_NORMALIZATION:
        return linear or behaviour in _BEFORE_NORMALIZATION
    if reading is Behaviour.MAX_POOLING:
        moved = is_graph(operation) or carries_grid(operation) or behaviour is Behaviour.GATHER
        return not moved and output_range(operation) is OutputRange.DATA
    return reading is Behaviour.ACTIVATION and (linear or behaviour in _BEFORE_ACTIVATION)
