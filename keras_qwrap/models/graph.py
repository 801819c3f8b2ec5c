"""Graphs of Functional and Sequential models: who makes a tensor, and who alone reads it."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_qwrap.layers.keras_internals import GraphNode, graph_nodes, has_own_call, sublayers


def has_graph(model: Any) -> bool:
    """Whether this is a Functional or Sequential model."""
    functional = isinstance(model, keras.Model) and hasattr(model, "operations")
    return functional or isinstance(model, keras.Sequential)


def is_graph(model: Any) -> bool:
    """Whether this is a Functional or Sequential model that computes what its graph says."""
    return has_graph(model) and not has_own_call(model)


class Graph:
    """Nodes between tensors.

    Args:
        nodes: in order of execution.
        outputs: the tensors that leave the graph.
    """

    def __init__(self, nodes: list[GraphNode], outputs: Sequence[keras.KerasTensor]) -> None:
        self.nodes = nodes
        self._made_by = {id(tensor): node for node in nodes for tensor in node.outputs}
        self._readers: dict[int, list[GraphNode]] = {}
        for node in nodes:
            for tensor in node.inputs:
                self._readers.setdefault(id(tensor), []).append(node)
        self._leaving = {id(tensor) for tensor in outputs}

    def made_by(self, tensor: keras.KerasTensor) -> GraphNode | None:
        """The node that a tensor comes from; None for what comes from outside."""
        return self._made_by.get(id(tensor))

    def only_reader(self, tensor: keras.KerasTensor) -> GraphNode | None:
        """The node that alone reads a tensor, and once; None where it leaves the graph as well."""
        readers = self._readers.get(id(tensor), [])
        return readers[0] if len(readers) == 1 and id(tensor) not in self._leaving else None


def graphs_in(model: keras.Model) -> list[Graph]:
    """The graphs of a model, and of the models inside it."""
    return [Graph(graph_nodes(each), each.outputs) for each in sublayers(model) if is_graph(each)]
