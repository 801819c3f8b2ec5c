"""All that this package takes from non-public Keras, so that a change of Keras is mended here.

In sections: what is inside a layer; signatures; calls with variables replaced; state; building and
symbolic calls; variables; graphs; files.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Signature
from typing import Any
from zipfile import ZipFile

import keras
import numpy as np
from keras import ops
from keras.src import backend
from keras.src.backend.common import global_state
from keras.src.legacy.saving import json_utils
from keras.src.legacy.saving.saving_options import keras_option_scope
from keras.src.legacy.saving.saving_utils import (
    compile_args_from_training_config,
    model_from_config,
    try_build_compiled_arguments,
)
from keras.src.models.functional import Functional, functional_like_constructor
from keras.src.saving import saving_lib
from keras.src.saving.serialization_lib import ObjectSharingScope, SafeModeScope
from keras.src.utils.python_utils import is_default
from keras.src.utils.tracking import DotNotTrackScope

from keras_qwrap.numerics.tensors import Tensor, to_numpy

# --- What is inside a layer, and how it is called.


def sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """`layer` and all layers inside it."""
    return layer._flatten_layers()


def layer_paths(model: keras.Layer) -> dict[int, str]:
    """By `id`, the names of the layers around each layer of a model, and its own."""
    paths: dict[int, str] = {}
    waiting: list[tuple[keras.Layer, str]] = [(model, "")]
    while waiting:
        outer, prefix = waiting.pop(0)
        inside = [layer for layer in sublayers(outer) if layer is not outer]
        deeper = {id(deep) for layer in inside for deep in sublayers(layer) if deep is not layer}
        for layer in inside:
            if id(layer) not in deeper and id(layer) not in paths:
                paths[id(layer)] = f"{prefix}{layer.name}"
                waiting.append((layer, f"{prefix}{layer.name}/"))
    return paths


def is_of_user(cls: type) -> bool:
    """Whether a class is neither one of Keras nor of this package."""
    return cls.__module__.split(".")[0] not in ("keras", "keras_qwrap")


def own_variables(layer: keras.Layer) -> tuple[list[keras.Variable], list[keras.Variable]]:
    """What a layer, without those inside it, made to be trained, and what not, frozen or not."""
    return list(layer._trainable_variables), list(layer._non_trainable_variables)


def named_parts(layer: Any) -> dict[str, Any]:
    """What a layer holds, by the names of its attributes, as public as they are to be had."""
    # PyTorch keeps the layers inside apart from the attributes.
    attributes = dict(vars(layer)) | dict(getattr(layer, "_modules", {}))
    if isinstance(layer, keras.Model) and isinstance(getattr(layer, "layers", None), list):
        attributes["layers"] = layer.layers
    return {
        _public_name(layer, name, part): part
        for name, part in attributes.items()
        if name not in _BOOKKEEPING
    }


def part_named(layer: Any, name: str) -> Any:
    """The attribute of this name, or that which Keras calls so behind an underscore, or None."""
    return getattr(layer, name, getattr(layer, f"_{name}", None))


def _public_name(layer: Any, name: str, part: Any) -> str:
    public = name.lstrip("_")
    is_property = getattr(type(layer), public, None) is not None
    return public if is_property and part_named(layer, public) is part else name


_BOOKKEEPING = {
    "_layers",
    "_trainable_variables",
    "_non_trainable_variables",
    "_metrics",
    "_seed_generators",
    "_functional",
    "_operations",
    "_operations_by_depth",
    "_nodes",
    "_nodes_by_depth",
}
"""Lists that Keras keeps on every layer: paths through them would not be the user's names."""


# --- What Keras reads off signatures: it passes arguments on, and notes shapes, by their names.


def replace_call(layer: keras.Layer, call: Callable, signature: Signature) -> None:
    """Let Keras run `call` for `layer.call`, and see it as having `signature`.

    Keras looks at the attribute of the object, by which it passes `training` and `mask` on.
    """
    call.__signature__ = signature  # type: ignore[attr-defined]
    layer.call = call


def sign_build(layer: keras.Layer, signature: Signature) -> None:
    """Let Keras see `layer.build` as having `signature`, and note the shapes given by its names.

    Keras reads the signature of the class's method, whatever it is told of the instance's; by what
    it has noted, it then shows output shapes and exports models that have no graph.
    """
    build = layer.build

    def signed(*args: Any, **kwargs: Any) -> None:
        build(*args, **kwargs)
        layer._build_shapes_dict = signature.bind(*args, **kwargs).arguments

    signed.__signature__ = signature  # type: ignore[attr-defined]
    layer.build = signed


# --- A call with some variables replaced.

Replacements = Sequence[tuple[keras.Variable, Callable[[], Tensor]]]


class _Overlay(keras.StatelessScope):
    """Lays tensors over a few variables; every other read, write and loss falls through.

    Writes go through at once rather than on exit, so that they also work inside the traced body
    of a loop. A write to a replaced variable renews its replacement.
    """

    def __init__(self, replacements: Replacements) -> None:
        self._renew = {id(variable): make for variable, make in replacements}
        super().__init__(
            [(variable, make()) for variable, make in replacements], collect_losses=True
        )

    def get_current_value(self, variable: keras.Variable) -> Tensor:
        value = super().get_current_value(variable)
        if value is None and self.original_scope is not None:
            return self.original_scope.get_current_value(variable)
        return value

    def add_update(self, update: tuple[keras.Variable, Tensor]) -> None:
        variable, value = update
        self.__exit__()
        try:
            variable.assign(value)
            if id(variable) in self._renew:
                renewed = self._renew[id(variable)]()
                self.state_mapping[id(variable)] = backend.cast(renewed, variable.dtype)
        finally:
            self.__enter__()

    def add_loss(self, loss: Tensor) -> None:
        outer = self.original_scope
        if outer is None:
            super().add_loss(loss)
        elif outer.collect_losses:
            outer.add_loss(loss)


def call_with(
    layer: keras.Layer,
    replacements: Replacements,
    args: Sequence,
    kwargs: dict,
) -> tuple[Any, list[Tensor]]:
    """Call `layer` while each variable in `replacements` reads as the tensor that is made for it.

    Returns:
        The layer's outputs, and the losses that it added and that no outer scope has taken; without
        replacements the layer keeps its losses itself.
    """
    if not replacements:
        return layer(*args, **kwargs), []
    with _Overlay(replacements) as overlay:
        outputs = layer(*args, **kwargs)
    return outputs, overlay.losses


# --- State that a call may move.


class State:
    """What running a layer in inference may move, as it is now.

    States of recurrent layers (which are none of their variables), seeds, metrics, and what layers
    of the user's count in variables that are not trained.
    """

    def __init__(self, layer: keras.Layer) -> None:
        moving: list[Any] = []
        for inner in sublayers(layer):
            moving += keras.tree.flatten(getattr(inner, "states", None))
            moving += [generator.state for generator in inner._seed_generators]
            moving += [variable for metric in inner._metrics for variable in metric.variables]
            if is_of_user(type(inner)):
                moving += inner._non_trainable_variables
        found = {id(part): part for part in moving if isinstance(part, keras.Variable)}
        self._values = [(variable, to_numpy(variable).copy()) for variable in found.values()]

    def restore(self) -> None:
        """Set back what has moved."""
        for variable, value in self._values:
            if not np.array_equal(to_numpy(variable), value):
                variable.assign(value)


@contextmanager
def state_kept(layer: keras.Layer) -> Iterator[None]:
    """Set back, at the end, what running the layer in inference has moved."""
    state = State(layer)
    try:
        yield
    finally:
        state.restore()


# --- Building, and calls with symbolic tensors, which compute nothing.


def build_layer(layer: keras.Layer, shapes: Sequence, named_shapes: dict, example: tuple) -> None:
    """Create the state of `layer` and of all layers inside it.

    Args:
        layer: the layer; nothing is done if it is built through and through.
        shapes: positional arguments for `layer.build`.
        named_shapes: keyword arguments for `layer.build`.
        example: positional and keyword arguments for `layer.call`, with symbolic tensors; used
            where layers are created by calling them.
    """
    if not layer.built:
        if is_default(layer.build):
            _build_by_tracing(layer, example)
        layer.build(*shapes, **named_shapes)
    if not all(inner.built for inner in sublayers(layer)):
        _build_by_tracing(layer, example)


def _build_by_tracing(layer: keras.Layer, example: tuple) -> None:
    args, kwargs = example
    with keras.name_scope(layer.name, caller=layer):
        output_specs(layer.call, args, kwargs)


def specs_of_call(layer: keras.Layer, args: tuple, kwargs: dict) -> Any:
    """What a call of a layer returns, as symbolic tensors; nothing is noted in the layer.

    `compute_output_spec` alone does not know that a call converts inputs, and reads variables, in
    the dtype of the layer's policy.
    """

    def converted(part: Any) -> Any:
        if isinstance(part, keras.KerasTensor):
            return layer.dtype_policy.convert_input(part, layer.autocast, layer.input_dtype)
        return part

    if layer._convert_input_args:
        args, kwargs = keras.tree.map_structure(converted, (args, kwargs))
    computes_floats = layer.autocast and "float" in layer.compute_dtype
    with backend.AutocastScope(layer.compute_dtype if computes_floats else None):
        return layer.compute_output_spec(*args, **kwargs)


def output_specs(function: Callable, args: Sequence, kwargs: dict) -> Any:
    """What `function` would return, as symbolic tensors; nothing is computed and no state moves."""
    return backend.compute_output_spec(function, *args, **kwargs)


def is_rematerialized(layer: keras.Layer) -> bool:
    """Whether the layer recomputes its activations when gradients are taken."""
    return getattr(layer, "_remat_mode", None) is not None


# --- Variables: seen before they take memory, and replaced for good.


@contextmanager
def variables_watched(see: Callable[[keras.Variable], None]) -> Iterator[None]:
    """Call `see` with each variable that is made in here, before it takes memory.

    It has its shape and dtype then. Variables that are made of arrays fail.
    """
    watch = _Watch(see)
    before = global_state.get_global_attribute("uninitialized_variables")
    global_state.set_global_attribute("uninitialized_variables", watch)
    try:
        with watch:
            yield
        watch.give_values()
    finally:
        global_state.set_global_attribute("uninitialized_variables", before)


class _Watch(_Overlay):
    """Shows each variable before it is made; all else is as outside of the scope.

    In a stateless scope Keras puts new variables into a list until they may be given values. This
    object takes the place of that list, and gives the value at once, unless a layer is traced.
    """

    def __init__(self, see: Callable[[keras.Variable], None]) -> None:
        super().__init__([])
        self.initialize_variables = False
        self._see = see
        self._waiting: dict[int, keras.Variable] = {}

    def append(self, variable: keras.Variable) -> None:
        """Show a variable, and let it have its value."""
        self._see(variable)
        self._waiting[id(variable)] = variable
        self._give_value(variable)

    def _give_value(self, variable: keras.Variable) -> None:
        if backend.get_stateless_scope() is self and id(variable) in self._waiting:
            self.__exit__()
            try:
                self._waiting.pop(id(variable))._deferred_initialize()
            finally:
                self.__enter__()

    def give_values(self) -> None:
        """Let all variables have their values; outside of the scope."""
        while self._waiting:
            self._waiting.popitem()[1]._deferred_initialize()

    def get_current_value(self, variable: keras.Variable) -> Tensor:
        self._give_value(variable)
        return super().get_current_value(variable)

    def add_update(self, update: tuple[keras.Variable, Tensor]) -> None:
        self._give_value(update[0])
        super().add_update(update)


def zeros_in_order_of(variable: keras.Variable) -> Callable | str:
    """An initializer of zeros that lie in memory as the variable's value does, if it has one.

    On torch an initializer may transpose, and the order in memory decides that of later sums.
    """
    if variable._value is None:
        return "zeros"
    return lambda shape, dtype: ops.cast(ops.zeros_like(variable._value), dtype)


def put_in_place_of(
    old: keras.Variable, new: keras.Variable, read: Callable, write: Callable, layer: keras.Layer
) -> None:
    """Let `new` take the place of `old` among the variables of `layer` and the layers inside it.

    `old` loses its value. It reads as `read(shape, dtype=dtype)` at every time: Keras asks the
    initializer of a variable that has no value. `write(value)` is what assigning to it does.
    """
    old._value, old._initializer = None, read
    old._deferred_initialize = _nothing
    old.assign = write
    new._path = old._path
    for inner in sublayers(layer):
        for variables in (inner._trainable_variables, inner._non_trainable_variables):
            for i, variable in enumerate(variables):
                if variable is old:
                    variables[i] = new
        for name, value in list(vars(inner).items()):
            if value is old and hasattr(inner, "_track_trackable"):
                with DotNotTrackScope():
                    inner._track_trackable(new, name, overwrite=True)
        if hasattr(inner, "_torch_params"):
            inner._track_variables()


def _nothing() -> None:
    """What a variable does that never has a value of its own when it is to be given one."""


# --- Graphs of Functional and Sequential models.


@dataclass(frozen=True)
class GraphNode:
    """One use of an operation (a layer, a nested model, or a function) in a model's graph."""

    operation: Any
    inputs: list[keras.KerasTensor]
    outputs: list[keras.KerasTensor]
    arguments: tuple = ()
    """Positional and keyword arguments of the call."""


def graph_nodes(model: keras.Model) -> list[GraphNode]:
    """The nodes of a built Functional or Sequential model in order of execution, inputs excluded.

    Tensors are the same objects wherever they meet: as outputs, as inputs of other nodes, and in
    `model.inputs` and `model.outputs`.
    """
    by_depth = getattr(model, "_functional", model)._nodes_by_depth
    return [
        GraphNode(
            node.operation,
            list(node.input_tensors),
            list(node.outputs),
            (node.arguments.args, node.arguments.kwargs),
        )
        for depth in sorted(by_depth, reverse=True)
        for node in by_depth[depth]
        if not node.is_input
    ]


def traced_nodes(layer: keras.Layer, arguments: tuple) -> tuple[Any, list[GraphNode]]:
    """The graph of what a layer's `call` does with symbolic arguments, in order of execution.

    Only what is called by `call` itself has a node, not what is inside of that. No state moves.

    Args:
        layer: a built layer.
        arguments: positional and keyword arguments of the call.

    Returns:
        The arguments with the tensors that the graph begins with, and its nodes.

    Raises:
        Exception: of any kind, where the call does what symbolic tensors do not allow.
    """
    args, kwargs = keras.tree.map_structure(_placeholder, arguments)
    inside = [(part, part._inbound_nodes, part._outbound_nodes) for part in sublayers(layer)]
    before = [(len(inbound), len(outbound)) for _, inbound, outbound in inside]
    try:
        with keras.StatelessScope():
            outputs = layer.call(*args, **kwargs)
        nodes = _nodes_behind(keras.tree.flatten(outputs))
    finally:
        for (_, inbound, outbound), (ins, outs) in zip(inside, before, strict=True):
            del inbound[ins:], outbound[outs:]
    return (args, kwargs), nodes


def _placeholder(value: Any) -> Any:
    """A symbolic tensor without a history, whose sizes are all known, for each one that has one."""
    if not isinstance(value, keras.KerasTensor):
        return value
    shape = tuple(_ANY_SIZE if size is None else size for size in value.shape)
    return keras.KerasTensor(shape, value.dtype)


_ANY_SIZE = 83
"""What stands for an axis of unknown length: a number that no layer is made for."""


def _nodes_behind(outputs: list) -> list[GraphNode]:
    found: dict[int, GraphNode] = {}

    def visit(tensor: Any) -> None:
        history = getattr(tensor, "_keras_history", None)
        if history is None or history.operation is None:
            return
        node = history.operation._inbound_nodes[history.node_index]
        if id(node) not in found:
            for each in node.input_tensors:
                visit(each)
            arguments = (node.arguments.args, node.arguments.kwargs)
            found[id(node)] = GraphNode(
                node.operation, list(node.input_tensors), list(node.outputs), arguments
            )

    for tensor in outputs:
        visit(tensor)
    return list(found.values())


def has_own_call(model: keras.Model) -> bool:
    """Whether the class of a Functional or Sequential model computes more than its graph."""
    return type(model).call not in (Functional.call, keras.Sequential.call)


def has_symbolic_inputs(model: keras.Sequential) -> bool:
    """Whether a Sequential model that is built has run its layers on symbolic inputs."""
    return model._functional is not None


def rebuilt(
    model: keras.Model, inputs: Any, make: Callable[[Any], Any], call: Callable
) -> keras.Model:
    """A Functional model's graph on new inputs, as a new model of the same name.

    `call(make(operation), *args, **kwargs)` gives the outputs of each operation. The new model is
    of the same class, if that is constructed from inputs and outputs.
    """
    outputs = model._run_through_graph(inputs, operation_fn=make, call_fn=call)
    kind = type(model) if functional_like_constructor(type(model)) else keras.Model
    return kind(inputs, outputs, name=model.name)


def input_layer(tensor: keras.KerasTensor) -> keras.Layer:
    """The layer behind one of a model's inputs."""
    return tensor._keras_history.operation


def new_input(tensor: keras.KerasTensor) -> keras.KerasTensor:
    """The symbolic input of a new model that is like `tensor`, one of another model's inputs."""
    layer = input_layer(tensor)
    return type(layer).from_config(layer.get_config()).output


def compile_arguments(model: keras.Model) -> dict | None:
    """The very arguments that `Model.compile` was called with; None if it was not."""
    if not (model.compiled and hasattr(model, "_compile_config")):
        return None
    return dict(model._compile_config.config)


# --- Files: models from configs, and their state from arrays.


def described_model(
    text: str | bytes, custom_objects: Mapping[str, Any] | None, legacy: bool, safe_mode: bool
) -> keras.Model:
    """The model that the config of a `.keras` file, or of a legacy `.h5` file, describes.

    It is not compiled.
    """
    if legacy:
        known = {**(custom_objects or {}), **keras.saving.get_custom_objects()}
        with keras_option_scope(use_legacy_config=True), SafeModeScope(safe_mode):
            return model_from_config(json_utils.decode(text), custom_objects=known)
    config = json.loads(text, object_hook=_at_once)
    if isinstance(config, dict):
        config["compile_config"] = None
    known = {**(custom_objects or {}), _AT_ONCE: _Sequential}
    with ObjectSharingScope():
        return keras.saving.deserialize_keras_object(config, known, safe_mode)


_AT_ONCE = "keras_qwrap>Sequential"


def _at_once(part: dict) -> dict:
    """Let `_Sequential` make the Sequential models that a config describes."""
    if (part.get("module"), part.get("class_name")) == ("keras", "Sequential"):
        return part | {"registered_name": _AT_ONCE}
    return part


class _Sequential:
    """Makes a Sequential model of all its layers at once.

    Keras' own `from_config` adds them one by one, and runs all of them anew after each.
    """

    @staticmethod
    def from_config(config: dict) -> keras.Sequential:
        layers = [keras.saving.deserialize_keras_object(layer) for layer in config["layers"]]
        model = keras.Sequential(layers, name=config["name"])
        if not has_symbolic_inputs(model) and config.get("build_input_shape"):
            model.build(config["build_input_shape"])
        return model


def load_state(model: keras.Model, arrays: Mapping[str, Any], archive: ZipFile) -> None:
    """Give a model the state in a `.keras` archive, whose arrays have these paths."""
    failed: set[int] = set()
    errors: dict[int, tuple] = {}
    assets = None
    try:
        if any(name.startswith("assets/") for name in archive.namelist()):
            assets = saving_lib.DiskIOStore("assets", archive=archive, mode="r")
        with _skipped_attributes_kept(model):
            saving_lib._load_state(
                model,
                weights_store=_Arrays(arrays),
                assets_store=assets,
                inner_path="",
                visited_saveables=set(),
                failed_saveables=failed,
                error_msgs=errors,
            )
    finally:
        if assets is not None:
            assets.close()
    if failed:
        saving_lib._raise_loading_failure(errors)


class _Arrays(saving_lib.H5IOStore):
    """Arrays that are read already, in place of a file that Keras searches at every step."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays = arrays
        self._groups: dict[str, dict[str, None]] = {}
        for path in arrays:
            while path:
                path, _, name = path.rpartition("/")
                self._groups.setdefault(path, {})[name] = None
        self._group = ""

    def __bool__(self) -> bool:
        return True

    def get(self, path: str) -> "_Arrays":
        # So were layers called in files of TensorFlow 2.13.
        paths = (path, path.replace("layers", "_layer_checkpoint_dependencies"))
        groups = [f"{each}/vars".lstrip("/") for each in paths]
        self._group = next((group for group in groups if group in self._groups), groups[0])
        return self

    def has_path(self, path: str) -> bool:
        return path in self._groups

    def __getitem__(self, key: str) -> Any:
        # A copy, as a file gives: a backend may share memory with what it is given.
        return np.array(self._arrays[f"{self._group}/{key}"])

    def __contains__(self, key: object) -> bool:
        path = f"{self._group}/{key}"
        return path in self._arrays or path in self._groups

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> Any:
        return self._groups.get(self._group, {}).keys()


@contextmanager
def _skipped_attributes_kept(model: keras.Model) -> Iterator[None]:
    """Let Keras find out once, not for each layer, which attributes hold no state.

    It keeps what it found, but under another name than that by which it looks for it.
    """
    kinds = {layer._obj_type() for layer in sublayers(model)}
    names = {f"saving_attr_skiplist_{kind}": kind for kind in kinds}
    before = {name: global_state.get_global_attribute(name) for name in names}
    for name, kind in names.items():
        global_state.set_global_attribute(name, saving_lib.get_attr_skipset(kind))
    try:
        yield
    finally:
        for name, value in before.items():
            global_state.set_global_attribute(name, value)


def compile_as_described(
    model: keras.Model,
    config: dict,
    custom_objects: Mapping[str, Any] | None,
    legacy: bool,
    safe_mode: bool,
) -> None:
    """Compile a model as the file says that it was."""
    with keras.saving.custom_object_scope(custom_objects or {}), SafeModeScope(safe_mode):
        if not legacy:
            model.compile_from_config(config)
            model.compiled = True
            return
        config = json_utils.decode(json.dumps(config))
        model.compile(**compile_args_from_training_config(config, custom_objects))
        try_build_compiled_arguments(model)
