"""Layers that cannot be quantized, since their weights cannot be replaced or copied."""

from typing import Any

import keras

from keras_qwrap.layers.keras_internals import is_of_user, is_rematerialized, sublayers
from keras_qwrap.layers.weights import walk
from keras_qwrap.numerics.checks import Told, bad_value


def check_supported(layer: keras.Layer) -> None:
    """Refuse layers whose weights cannot be replaced, or would be replaced silently in part."""
    for inner in sublayers(layer):
        where = Told(f"layer '{inner.name}'")
        if _has_traced_function(inner):
            raise bad_value(
                "layer",
                where,
                "a layer whose `call` and other methods are no `tf.function`",
                "A traced function keeps the weights that it was traced with. Remove the "
                "decorator; the whole model may be compiled instead.",
            )
        if is_rematerialized(inner):
            raise bad_value(
                "layer",
                where,
                "a layer that is made outside a `keras.RematScope`",
                "Rematerialization runs the layer again with its float weights.",
            )
        if getattr(inner, "output_mode", None) == "tf_idf":
            raise bad_value(
                "layer",
                Told(f"{where} with output mode tf_idf"),
                "a lookup of another mode",
                "Keras cannot run a copy of it before it has its vocabulary.",
            )
    refuse_replaced_weights(layer)
    refuse_raw_variables(layer)


def refusal(layer: keras.Layer) -> str:
    """Why a layer cannot be wrapped; "" where it can."""
    try:
        check_supported(layer)
    except ValueError as error:
        return str(error)
    return ""


def _has_traced_function(layer: keras.Layer) -> bool:
    classes = [cls for cls in type(layer).__mro__ if is_of_user(cls)]
    members = [member for cls in classes for member in vars(cls).values()]
    if not isinstance(layer, keras.Model):
        members += vars(layer).values()
    return any(hasattr(member, "get_concrete_function") for member in members)


def refuse_replaced_weights(layer: keras.Layer) -> None:
    """Refuse layers whose weights Keras' LoRA or quantization stands in for."""
    for inner in sublayers(layer):
        where = Told(f"layer '{inner.name}'")
        if getattr(inner, "lora_enabled", False):
            raise bad_value(
                "layer",
                where,
                "a layer without LoRA",
                "Merge or remove LoRA's weights before wrapping; they would stay float.",
            )
        if getattr(inner, "quantization_mode", None) is not None:
            raise bad_value(
                "layer",
                Told(f"{where} with quantization mode {inner.quantization_mode}"),
                "a float layer",
                "Do not call Keras' own `quantize` on a layer that is wrapped.",
            )


def refuse_raw_variables(layer: keras.Layer) -> None:
    """Refuse variables of the backend itself: Keras neither saves them nor can copy them.

    Those of Keras' own layers are what these layers save and copy in a way of their own.
    """
    for inner in sublayers(layer):
        found = walk(inner, lambda part: False) if is_of_user(type(inner)) else []
        for path, part in found:
            if _is_raw_variable(part):
                raise bad_value(
                    "layer",
                    Told(f"layer '{inner.name}' with a {type(part).__name__} at '{path}'"),
                    "a layer whose variables are Keras variables",
                    "Create it with `self.add_weight`; Keras neither saves nor copies others.",
                )


_RAW_VARIABLES = {("tensorflow", "Variable"), ("torch", "Parameter")}


def _is_raw_variable(found: Any) -> bool:
    names = ((cls.__module__.split(".")[0], cls.__name__) for cls in type(found).__mro__)
    return not _RAW_VARIABLES.isdisjoint(names)
