"""Rebuild a Functional or Sequential model layer by layer, nested models and sharing included."""

import inspect
from typing import Any

import keras

from keras_qwrap.layers.keras_internals import (
    compile_arguments,
    has_symbolic_inputs,
    new_input,
    rebuilt,
    sublayers,
)
from keras_qwrap.layers.owner import QuantizingLayer
from keras_qwrap.layers.refusals import refuse_raw_variables
from keras_qwrap.layers.remaking import made_again
from keras_qwrap.layers.weights import copy_flags, copy_variables
from keras_qwrap.layers.wrapper import KerasQuantizationWrapper
from keras_qwrap.models.graph import is_graph
from keras_qwrap.numerics.checks import Told, bad_type, bad_value, no_model, warn


def unwrapped(operation: Any) -> Any:
    """The layer inside all wrappers."""
    while isinstance(operation, KerasQuantizationWrapper):
        operation = operation.layer
    return operation


def check_built(model: Any) -> None:
    """Refuse what is no built model."""
    if not isinstance(model, keras.Model):
        raise no_model(model)
    if not model.built:
        sequential = isinstance(model, keras.Sequential)
        fix = "Call it, or pass an Input first." if sequential else "Call it once: `model(x)`."
        raise bad_value("model", model.name, "a built model", fix)
    if isinstance(model, keras.Sequential) and not has_symbolic_inputs(model):
        raise bad_value(
            "model",
            Told(f"'{model.name}', a Sequential model of which Keras could not make a graph"),
            "layers that can say the shapes of their outputs",
            "Define `compute_output_shape` in layers of your own inside others (TimeDistributed).",
        )


def check_graph(model: Any) -> None:
    """Refuse what is no built Functional or Sequential model."""
    if isinstance(model, keras.Model) and not is_graph(model):
        fix = "It has no graph; `quantize_model` makes a QuantizedModel of it."
        raise bad_type("model", model, "a Functional or Sequential model", fix)
    check_built(model)


def check_float(model: keras.Model) -> None:
    """Refuse a model with wrappers or holders inside."""
    inside = [layer.name for layer in sublayers(model) if isinstance(layer, QuantizingLayer)]
    if inside:
        raise bad_value(
            "model",
            Told(f"'{model.name}' with quantized layers {inside[:8]}"),
            "a float model",
            "Quantize the float model, or unwrap this one by `unwrap_model` first.",
        )


class Copier:
    """Makes a new model in which each layer is what `new_layer` makes of the old one.

    Each layer is made once, so that shared ones stay shared. Names are kept, compile settings are
    carried over, and the given model is left as it is. A subclass overrides `new_layer`, and
    `call` where it has to change the graph between layers.
    """

    def __init__(self) -> None:
        self._copies: dict[int, Any] = {}
        self._plain: list[tuple[keras.Layer, keras.Layer]] = []
        self._models: list[tuple[keras.Model, keras.Model]] = []

    def copy_model(self, model: keras.Model) -> keras.Model:
        """The new model; the weights of plain copies are those of the given model's layers."""
        new = self._copy(model)
        for source, target in self._plain:
            copy_variables(source, target)
            # `new_layer` may have thawed the copy on purpose.
            if source.trainable is target.trainable:
                copy_flags(source, target)
        # An optimizer is built for the variables that are to be trained.
        for source, target in self._models:
            carry_compiled(source, target)
        return new

    def new_layer(self, layer: keras.Layer) -> keras.Layer | None:
        """What takes the place of a layer that is no model; None leaves it out.

        A Functional model leaves a layer out only if `call` does without it.
        """
        return self.plain_copy(layer)

    def call(self, layer: Any, new: Any, args: tuple, kwargs: dict) -> Any:
        """Outputs of `new`, which stands for `layer`, in a Functional model's graph."""
        return new(*args, **kwargs)

    def new_inputs(self, model: keras.Model) -> Any:
        """Symbolic inputs of a new Functional model, in the structure of the old one's."""
        return keras.tree.map_structure(new_input, model.input)

    def sequential_layers(self, model: keras.Sequential) -> list[keras.Layer]:
        """The layers that take the place of a Sequential model's."""
        made = [self._copy(layer) for layer in model.layers]
        return [layer for layer in made if layer is not None]

    def plain_copy(self, layer: keras.Layer) -> keras.Layer:
        """A copy made from the layer's config, to which its weights are copied at the end."""
        refuse_raw_variables(layer)
        new = made_again(layer)
        self._plain.append((layer, new))
        return new

    def _copy(self, operation: Any) -> Any:
        if id(operation) not in self._copies:
            new = self._new(operation)
            self._copies[id(operation)] = new
        return self._copies[id(operation)]

    def _new(self, operation: Any) -> Any:
        if is_graph(operation):
            sequential = isinstance(operation, keras.Sequential)
            new = self._new_sequential(operation) if sequential else self._new_functional(operation)
            _carry_flag(operation, new)
            self._models.append((operation, new))
            if type(new) is not type(operation):
                warn_of_own_steps(operation)
            return new
        if isinstance(operation, keras.Layer):
            return self.new_layer(operation)
        return made_again(operation)

    def _new_functional(self, model: keras.Model) -> keras.Model:
        return rebuilt(model, self.new_inputs(model), self._stand_in, self._call)

    def _stand_in(self, operation: Any) -> "_StandIn":
        return _StandIn(operation, self._copy(operation))

    def _call(self, stand_in: "_StandIn", *args: Any, **kwargs: Any) -> Any:
        return self.call(stand_in.old, stand_in.new, args, kwargs)

    def _new_sequential(self, model: keras.Sequential) -> keras.Model:
        layers = self.sequential_layers(model)
        first = [new_input(model.inputs[0])] if model.built else []
        return keras.Sequential([*first, *layers], name=model.name)


def _carry_flag(source: keras.Model, target: keras.Model) -> None:
    """Freeze a model where the other one is, and leave the layers inside as they are."""
    if not source.trainable:
        flags = [(layer, layer.trainable) for layer in sublayers(target) if layer is not target]
        target.trainable = False
        for layer, flag in flags:
            layer.trainable = flag


def carry_compiled(source: keras.Model, target: keras.Model) -> None:
    """Compile `target` as `source` is, with an optimizer and metrics of its own.

    A class with its own `compile_from_config` is asked for what it would save.
    """
    arguments = compile_arguments(source)
    if arguments is None:
        return
    try:
        if type(target) is type(source) and _own_methods(source, ("compile_from_config",)):
            config = source.get_compile_config()
            serialized = keras.saving.serialize_keras_object
            target.compile_from_config({key: serialized(part) for key, part in config.items()})
        else:
            _check_compile(target)
            target.compile(**keras.tree.map_structure(_anew, arguments))
    except (TypeError, ValueError, NotImplementedError, AttributeError, KeyError) as error:
        warn(
            f"The new model '{target.name}' is not compiled as the given one is ({error}). Compile "
            "it before training."
        )
        return
    optimizer = getattr(target, "optimizer", None)
    if target.built and optimizer is not None and not optimizer.built:
        optimizer.build(target.trainable_variables)


def _check_compile(model: keras.Model) -> None:
    """Refuse arguments of `compile` that Keras does not know, and so has not noted."""
    known = inspect.signature(keras.Model.compile).parameters
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(type(model).compile).parameters.values()
    own = [p.name for p in parameters if p.kind not in variadic and p.name not in known]
    if own:
        raise ValueError(f"its `compile` takes {own}, and no `compile_from_config` of its own does")


def _own_methods(model: keras.Model, names: tuple[str, ...]) -> list[str]:
    """Those of Keras' methods that the class of a model replaces."""
    return [name for name in names if getattr(type(model), name) is not getattr(keras.Model, name)]


def _anew(part: Any) -> Any:
    if isinstance(part, (keras.Optimizer, keras.Metric)):
        return type(part).from_config(part.get_config())
    return part


_STEPS = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")


def warn_of_own_steps(model: keras.Model) -> None:
    """Say which of Keras' training steps the class of a model replaces, and its copy does not."""
    own = _own_methods(model, _STEPS)
    if own:
        warn(
            f"The new model uses Keras' own training steps: received '{model.name}', whose class "
            f"{type(model).__name__} has its own {', '.join(own)}. Train it with a loop of your "
            "own where that is not what you want."
        )


class _StandIn:
    """An operation together with what takes its place."""

    def __init__(self, old: Any, new: Any) -> None:
        self.old, self.new = old, new
