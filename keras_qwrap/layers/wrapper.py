"""`KerasQuantizationWrapper`: any Keras layer, with quantized weights and outputs."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_qwrap.layers.building import (
    Construction,
    as_list,
    as_mapping,
    copy_layer,
    with_training,
)
from keras_qwrap.layers.conversion import ConvertedWeight, converted_weight
from keras_qwrap.layers.keras_internals import (
    build_layer,
    call_with,
    replace_call,
    sign_build,
    specs_of_call,
    sublayers,
)
from keras_qwrap.layers.owner import (
    FORMAT_VERSION,
    Quantizer,
    QuantizingLayer,
    check_format_version,
    converted_quantizer,
    deserialize_quantizers,
    inferable_twin,
    refuse_inner_wrappers,
    serialize_quantizer,
)
from keras_qwrap.layers.packed import kept_weights, store_packed, zeros_for_random
from keras_qwrap.layers.refusals import check_supported, refuse_replaced_weights
from keras_qwrap.layers.remaking import deserialize_layer, made_again, serialize_layer
from keras_qwrap.layers.weights import copy_variables
from keras_qwrap.numerics.channels import check_bool
from keras_qwrap.numerics.checks import bad_type, bad_value
from keras_qwrap.numerics.tensors import Tensor, read, to_numpy
from keras_qwrap.quantizers.base import BaseKerasTrainableQuantizer
from keras_qwrap.quantizers.config import PACKAGE, QuantizationTarget

_LAYER_IS_OWN: ContextVar[bool] = ContextVar("layer_is_own", default=False)


@contextmanager
def layer_is_own() -> Iterator[None]:
    """Let converted wrappers that are made in here take the layer itself, which nobody else has."""
    token = _LAYER_IS_OWN.set(True)
    try:
        yield
    finally:
        _LAYER_IS_OWN.reset(token)


@keras.saving.register_keras_serializable(PACKAGE)
class KerasQuantizationWrapper(QuantizingLayer):
    """Runs a layer with quantized weights, and quantizes its outputs.

    `outputs = activation_quantizer(layer(inputs; weight <- weights_quantizer(weight)))`

    The layer's variables stay the float (latent) weights, which training updates; each call lays
    the quantized tensors over them. Gradients are those of the quantizers. Anything the layer
    does goes on as ever: masks, `training`, state, losses, several inputs and outputs.

    Args:
        layer: the layer to wrap; it is built and trained, and otherwise left as it is.
        weights_quantizers: weight path -> quantizer. A path is made of attributes:
            `"kernel"`, `"cell/recurrent_kernel"`, `"query/kernel"`.
        activation_quantizers: a quantizer for each output, in flattened order; one quantizer
            stands for a list of one.
        converted: the layer's weights lie on their grids already, as
            `convert_to_inferable_quantizers` leaves them: a copy of the layer is wrapped, whose
            weights are used as they are, and not trained.
        **kwargs: `name` and `trainable` (the wrapped layer's, by default),
            `activity_regularizer`.

    Raises:
        TypeError, ValueError: at construction for wrong arguments, for a quantizer of the other
            target and for a trainable quantizer used elsewhere; when built for a weight that does
            not exist, ranges that do not fit, a number of activation quantizers that is not the
            number of outputs, and layers that cannot be wrapped: with a `tf.function` as `call`,
            LoRA, or Keras' own quantization.

    Example:

    ```python
    import keras
    import keras_qwrap as qi

    weights = qi.TrainableQuantizerWeightsConfig(qi.QuantizationMethod.SYMMETRIC, 8)
    output = qi.TrainableQuantizerActivationConfig(
        qi.QuantizationMethod.POWER_OF_TWO, 8, {"threshold": 8.0}
    )
    layer = qi.KerasQuantizationWrapper(
        keras.layers.Conv2D(4, 3, name="conv"),
        weights_quantizers={"kernel": qi.STEWeightQATQuantizer(weights)},
        activation_quantizers=qi.STEActivationQATQuantizer(output),
    )
    model = keras.Sequential([keras.Input((8, 8, 3)), layer])
    print(model.output_shape, layer.name)  # (None, 6, 6, 4) conv
    ```
    """

    def __init__(
        self,
        layer: keras.Layer,
        weights_quantizers: Mapping[str, Quantizer] | None = None,
        activation_quantizers: Quantizer | Sequence[Quantizer] | None = None,
        converted: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(layer, keras.Layer):
            raise bad_type("layer", layer, "a Keras layer", "Pass for example Dense(8).")
        if check_bool("converted", converted) and not _LAYER_IS_OWN.get():
            layer = copy_layer(layer)
        self._layer_signature = inspect.signature(layer.call)
        self._signature = with_training(self._layer_signature)
        if type(self).call is KerasQuantizationWrapper.call:
            call = partial(KerasQuantizationWrapper.call, self)
            replace_call(self, call, self._signature)
        super().__init__(**{"name": layer.name, "trainable": layer.trainable, **kwargs})
        sign_build(self, inspect.signature(layer.build))
        self.layer = layer
        self.supports_masking = layer.supports_masking
        self.converted = converted
        self.weights_quantizers: dict[str, Quantizer] = {}
        for path, quantizer in as_mapping(weights_quantizers).items():
            self.add_weights_quantizer(path, quantizer)
        self.activation_quantizers = [
            self._adopt(quantizer, QuantizationTarget.Activation, f"activation_quantizers[{i}]")
            for i, quantizer in enumerate(as_list(activation_quantizers))
        ]
        self._construction = Construction()
        self._claim()

    def add_weights_quantizer(self, name: str, quantizer: Quantizer) -> None:
        """Quantize the weight at path `name` as well; possible until the wrapper is built.

        Raises:
            ValueError: the wrapper is built, or the weight has a quantizer already.
            TypeError: `name` is no string, or `quantizer` no quantizer.
        """
        if not isinstance(name, str) or not name:
            raise bad_type(
                "weights_quantizers", name, "weight paths as keys", "Use for example 'kernel'."
            )
        if self.built:
            raise ValueError(
                f"add_weights_quantizer: received '{name}' for layer '{self.name}', which is "
                "built, expected one that is not. Add quantizers before the first call."
            )
        if name in self.weights_quantizers:
            raise ValueError(
                f"add_weights_quantizer: received '{name}', which has a quantizer already, "
                "expected another weight. Pass one quantizer for each weight."
            )
        role = f"weights_quantizers['{name}']"
        adopted = self._adopt(quantizer, QuantizationTarget.Weights, role)
        if self.converted and isinstance(adopted, BaseKerasTrainableQuantizer) and adopted.enabled:
            raise bad_value(
                role,
                quantizer,
                "an inferable quantizer, since converted=True",
                "Convert a trained wrapper with `convert_to_inferable_quantizers`.",
            )
        self.weights_quantizers[name] = adopted

    @property
    def is_weights_quantization(self) -> bool:
        """Whether any weight has a quantizer."""
        return bool(self.weights_quantizers)

    @property
    def is_activation_quantization(self) -> bool:
        """Whether the outputs have quantizers."""
        return bool(self.activation_quantizers)

    @property
    def num_weights_quantizers(self) -> int:
        """Number of weights that have a quantizer."""
        return len(self.weights_quantizers)

    @property
    def num_activation_quantizers(self) -> int:
        """Number of outputs that have a quantizer."""
        return len(self.activation_quantizers)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.built:
            self._construction.see_call(args, kwargs)
        return super().__call__(*args, **kwargs)

    def build(self, *args: Any, **kwargs: Any) -> None:
        """Build the wrapped layer, find its weights, and create the quantizers' variables."""
        self._construction.see_shapes(args, kwargs)
        example = self.for_layer(*(self._construction.example or ((), {})))
        check_supported(self)
        with zeros_for_random(self.layer) if self.converted else nullcontext():
            build_layer(self.layer, args, kwargs, example)
        check_supported(self)
        self._construction.find_quantized(self.layer, sorted(self.weights_quantizers))
        shapes = self._find_output_shapes(*example) if self.activation_quantizers else []
        for path, variable in self._construction.quantized:
            name = path.replace("/", "_")
            self._initialize(self.weights_quantizers[path], tuple(variable.shape), name)
        for i, shape in enumerate(shapes):
            self._initialize(self.activation_quantizers[i], tuple(shape), f"output_{i}")
        if self.converted:
            rows = [(path, variable, inferable_twin(q)) for path, q, variable in self._enabled()]
            rows = [row for row in rows if row[2].has_codes]
            self._construction.packed = store_packed(self.layer, rows)
            if not self.trainable:
                for inner in sublayers(self.layer):
                    inner.trainable = False

    def _find_output_shapes(self, args: tuple, kwargs: dict) -> list[tuple]:
        shapes = self._construction.output_shapes
        if shapes is None:
            specs = tree.flatten(self.layer.compute_output_spec(*args, **kwargs))
            shapes = self._construction.output_shapes = [tuple(spec.shape) for spec in specs]
        self._check_number_of_outputs(len(shapes))
        return shapes

    def _check_number_of_outputs(self, number: int) -> None:
        if number != len(self.activation_quantizers):
            raise bad_value(
                "activation_quantizers",
                len(self.activation_quantizers),
                f"{number}, one for each output of layer '{self.layer.name}'",
                "Where the call's arguments decide the outputs, build the wrapper by calling it "
                "with them.",
            )

    def latent_weight(self, name: str) -> keras.Variable:
        """The float variable of a quantized weight; `name` is its path, with `/` or `_`."""
        for path, variable in self._construction.quantized:
            if name in (path, path.replace("/", "_")):
                return variable
        raise bad_value(
            "name",
            name,
            f"one of {[path for path, _ in self._construction.quantized]}",
            "Build the layer first.",
        )

    def get_build_config(self) -> dict | None:
        """Shapes of inputs and outputs, from which `build_from_config` creates all variables."""
        return self._construction.to_config()

    def build_from_config(self, config: dict) -> None:
        """Build from what `get_build_config` gave."""
        if config:
            self._construction.from_config(config)
            self.build(*config["args"], **config["kwargs"])

    def for_layer(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Arguments of this layer's call as the wrapped layer takes them."""
        if "training" in self._layer_signature.parameters:
            return args, kwargs
        return args, {key: value for key, value in kwargs.items() if key != "training"}

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped layer's outputs; takes the arguments of its call, and `training`."""
        refuse_replaced_weights(self.layer)
        training = self._signature.bind(*args, **kwargs).arguments.get("training")
        args, kwargs = self.for_layer(args, kwargs)
        if self.converted:
            self._refuse_training(training)
            replacements = kept_weights(self._construction.packed)
        else:
            replacements = [
                (variable, partial(self._quantize_weight, quantizer, variable, training))
                for _, quantizer, variable in self._enabled()
            ]
        outputs, losses = call_with(self.layer, replacements, args, kwargs)
        for loss in losses:
            self.add_loss(loss)
        return self._quantize_outputs(outputs, training) if self.activation_quantizers else outputs

    def _refuse_training(self, training: Any) -> None:
        if self.trainable and self.weights_quantizers and training is True:
            raise ValueError(
                f"Layer '{self.name}': received training=True on a converted layer that was made "
                "trainable, expected inference or trainable=False: training would move the "
                "weights off their grid. Train the unconverted model and convert it again."
            )

    def _quantize_outputs(self, outputs: Any, training: Any) -> Any:
        flat = tree.flatten(outputs)
        self._check_number_of_outputs(len(flat))
        pairs = zip(self.activation_quantizers, flat, strict=True)
        quantized = [self._quantize(quantizer, tensor, training) for quantizer, tensor in pairs]
        return tree.pack_sequence_as(outputs, quantized)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped layer's output specification: quantizers keep shape and dtype."""
        args, kwargs = self.for_layer(args, kwargs)
        return specs_of_call(self.layer, args, kwargs)

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped layer's output shape."""
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_mask(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped layer's output mask."""
        return self.layer.compute_mask(*args, **kwargs)

    def get_quantized_weights(self) -> dict[str, np.ndarray]:
        """`{path: quantized weight}`, float32, as the layer computes with them in inference.

        Raises:
            ValueError: as `get_codes`.
        """
        self._require_built("get_quantized_weights")
        for packed in self._construction.packed.values():
            packed.codes()  # Refuses what is no longer on its grid.
        return {
            path: to_numpy(self._computed(quantizer, variable)).astype(np.float32)
            for path, quantizer, variable in self._enabled()
        }

    def _computed(self, quantizer: Quantizer, variable: keras.Variable) -> Tensor:
        """What the layer computes with in inference."""
        weight = read(variable)
        return weight if self.converted else self._quantize(quantizer, weight, False)

    def converted_weights(self) -> dict[str, np.ndarray]:
        """What conversion leaves of each quantized weight, by path.

        Raises:
            TypeError, ValueError: the layer is not built, a weight is not finite or too large for
                a grid, or a converted one is no longer on its grid.

        Warns:
            UserWarning: a weight will not be what the layer computes with now.
        """
        self._require_built("converted_weights")
        if self.converted:
            return self.get_quantized_weights()
        weights = {}
        for path, quantizer, variable in self._enabled():
            found = self._converted(path, quantizer, variable)
            found.warn_of_difference(self._named(path))
            weights[path] = found.values
        return weights

    def _converted(
        self, path: str, quantizer: Quantizer, variable: keras.Variable
    ) -> ConvertedWeight:
        computed = self._computed(quantizer, variable)
        return converted_weight(self._named(path), quantizer, variable, computed)

    def _named(self, path: str) -> str:
        return f"layer '{self.name}', weight '{path}'"

    def get_codes(self) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """`{path: (codes, scale, zero_point)}`: int32, float32 and int32 arrays.

        They are those that conversion leaves, or has left. `(codes - zero_point) * scale` is the
        quantized weight (before it is rounded to the variable's dtype, if that is not float32).
        Codes of a lookup quantizer are table indices.

        Raises:
            ValueError: the layer is not built, a weight is not finite or its quantizer defines no
                codes, or a converted layer's weight was changed and is no longer on its grid.
        """
        self._require_built("get_codes")
        codes = {}
        for path, quantizer, variable in self._enabled():
            packed = self._construction.packed.get(id(variable))
            if packed:
                codes[path] = (packed.codes(), quantizer.scale, quantizer.zero_point)
                continue
            _, found, twin, _ = self._converted(path, quantizer, variable)
            if found is None:
                expected = "a quantizer that defines `quantize_to_codes`"
                raise bad_value(self._named(path), twin, expected, "Its weight is held as floats.")
            codes[path] = (found, twin.scale, twin.zero_point)
        return codes

    def _enabled(self) -> list[tuple[str, Quantizer, keras.Variable]]:
        rows = [
            (path, self.weights_quantizers[path], v) for path, v in self._construction.quantized
        ]
        return [row for row in rows if row[1].enabled]

    def _require_built(self, what: str) -> None:
        refuse_replaced_weights(self.layer)
        if not self.built:
            name = f"layer '{self.name}', which is not built"
            raise bad_value(what, name, "a built one", "Call it or build it first.")

    def convert_to_inferable_quantizers(self) -> "KerasQuantizationWrapper":
        """A new wrapper for inference, with the same outputs.

        It has its own copy of the layer, whose quantized weights are computed once and not
        trained; its quantizers are inferable. Converting it again gives an equal one.

        Where the inferable quantizer that `convert2inferable` gives for a weight has another grid,
        which cannot hold what the trained one computes, the weight becomes what the inferable one
        makes of the latent weight, with a warning.

        Raises:
            ValueError: the wrapper is not built, or a weight is not finite or too large for a grid.
        """
        self._require_built("convert_to_inferable_quantizers")
        weights = {} if self.converted else self.converted_weights()
        config = check_format_version(self.get_config()) | {
            "layer": self._copy_layer(),
            "weights_quantizers": {
                path: inferable_twin(quantizer) for path, quantizer, _ in self._enabled()
            },
            "activation_quantizers": [
                converted_quantizer(quantizer) for quantizer in self.activation_quantizers
            ],
            "converted": True,
            "trainable": False,
        }
        with layer_is_own():
            new = type(self)(**config)
        new.build_from_config(self.get_build_config() or {})
        if not isinstance(self.layer, QuantizingLayer):
            copy_variables(self.layer, new.layer)
        for path, weight in weights.items():
            new.latent_weight(path).assign(weight)
        return new

    def _copy_layer(self) -> keras.Layer:
        if isinstance(self.layer, QuantizingLayer):
            return self.layer.convert_to_inferable_quantizers()
        refuse_inner_wrappers(self.layer)
        return made_again(self.layer)

    def get_config(self) -> dict:
        """The arguments as plain values (long ranges packed), and the version of this format."""
        return {
            **super().get_config(),
            "layer": serialize_layer(self.layer),
            "weights_quantizers": {
                path: serialize_quantizer(quantizer)
                for path, quantizer in self.weights_quantizers.items()
            },
            "activation_quantizers": [
                serialize_quantizer(quantizer) for quantizer in self.activation_quantizers
            ],
            "converted": self.converted,
            "format_version": FORMAT_VERSION,
        }

    @classmethod
    def from_config(cls, config: dict) -> "KerasQuantizationWrapper":
        """The wrapper that `get_config` described."""
        config = check_format_version(config)
        config["layer"] = deserialize_layer(config["layer"])
        for name in ("weights_quantizers", "activation_quantizers"):
            config[name] = deserialize_quantizers(config[name])
        with layer_is_own():
            return cls(**config)
