"""`KerasActivationQuantizationHolder`: quantizes a tensor, as a layer of its own."""

from typing import Any

import keras

from keras_qwrap.layers.owner import (
    FORMAT_VERSION,
    Quantizer,
    QuantizingLayer,
    check_format_version,
    converted_quantizer,
    deserialize_quantizers,
    serialize_quantizer,
)
from keras_qwrap.numerics.checks import bad_value
from keras_qwrap.numerics.tensors import Tensor
from keras_qwrap.quantizers.config import PACKAGE, QuantizationTarget


def unquantized_name(name: str) -> str:
    """What a function is called where the holder behind it has its name."""
    return f"{name}_unquantized"


@keras.saving.register_keras_serializable(PACKAGE)
class KerasActivationQuantizationHolder(QuantizingLayer):
    """Quantizes its input, for example a model's, or a sum's.

    `outputs = activation_holder_quantizer(inputs)`; shape, dtype and mask are kept, the gradient
    is the quantizer's. None, which an optional input of a model may be, stays None.

    Args:
        activation_holder_quantizer: an activation quantizer.
        **kwargs: `name`, `trainable`, `activity_regularizer`.

    Raises:
        TypeError, ValueError: what is given is no activation quantizer, or a trainable one that is
            used elsewhere.

    Example:

    ```python
    import keras
    import keras_qwrap as qi

    quantizer = qi.ActivationSymmetricInferableQuantizer(8, threshold=1.0, signed=True)
    inputs = keras.Input((4,))
    outputs = qi.KerasActivationQuantizationHolder(quantizer)(inputs)
    print(keras.Model(inputs, outputs).output_shape)  # (None, 4)
    ```
    """

    def __init__(self, activation_holder_quantizer: Quantizer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        self.activation_holder_quantizer = self._adopt(
            activation_holder_quantizer,
            QuantizationTarget.Activation,
            "activation_holder_quantizer",
        )
        self._claim()

    def build(self, input_shape: tuple) -> None:
        """Create the quantizer's variables; several inputs are refused."""
        if any(isinstance(part, (list, tuple, dict)) for part in input_shape):
            raise bad_value("inputs", input_shape, "one tensor", "Use a holder for each tensor.")
        self._initialize(self.activation_holder_quantizer, tuple(input_shape), "output_0")

    def call(self, inputs: Tensor | None, training: bool | None = None) -> Tensor | None:
        """The quantized tensor."""
        if inputs is None:
            return None
        return self._quantize(self.activation_holder_quantizer, inputs, training)

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> keras.KerasTensor:
        """The input's specification."""
        return keras.KerasTensor(inputs.shape, inputs.dtype)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """The input's shape."""
        return input_shape

    def convert_to_inferable_quantizers(self) -> "KerasActivationQuantizationHolder":
        """A new holder for inference, with the same outputs.

        Raises:
            ValueError: the holder is not built.
        """
        build_config = self.get_build_config()
        if not self.built or build_config is None:
            raise ValueError(
                f"convert_to_inferable_quantizers: received holder '{self.name}', which is not "
                "built, expected a built one. Call it first."
            )
        config = check_format_version(self.get_config())
        config["activation_holder_quantizer"] = converted_quantizer(
            self.activation_holder_quantizer
        )
        new = type(self)(**config | {"trainable": False})
        new.build_from_config(build_config)
        return new

    def get_config(self) -> dict:
        """The constructor's arguments as plain values, and the version of this format."""
        return {
            **super().get_config(),
            "activation_holder_quantizer": serialize_quantizer(self.activation_holder_quantizer),
            "format_version": FORMAT_VERSION,
        }

    @classmethod
    def from_config(cls, config: dict) -> "KerasActivationQuantizationHolder":
        """The holder that `get_config` described."""
        config = check_format_version(config)
        config["activation_holder_quantizer"] = deserialize_quantizers(
            config["activation_holder_quantizer"]
        )
        return cls(**config)
