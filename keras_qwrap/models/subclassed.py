"""`QuantizedModel`: a subclassed model, which has no graph, with quantized weights and outputs."""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np

from keras_qwrap.layers.building import Construction, as_list, as_mapping, with_training
from keras_qwrap.layers.holder import KerasActivationQuantizationHolder
from keras_qwrap.layers.keras_internals import replace_call, sign_build, sublayers
from keras_qwrap.layers.owner import (
    FORMAT_VERSION,
    Quantizer,
    check_format_version,
    converted_quantizer,
    deserialize_quantizers,
    inferable_twin,
    serialize_quantizer,
)
from keras_qwrap.layers.remaking import deserialize_layer
from keras_qwrap.layers.weights import find_weight, follow
from keras_qwrap.layers.wrapper import KerasQuantizationWrapper, layer_is_own
from keras_qwrap.models.copying import carry_compiled, check_float, warn_of_own_steps
from keras_qwrap.models.graph import is_graph
from keras_qwrap.models.taps import (
    Example,
    Taps,
    copy_built,
    find_layers,
)
from keras_qwrap.numerics.checks import bad_type, bad_value
from keras_qwrap.quantizers.config import PACKAGE


@keras.saving.register_keras_serializable(PACKAGE)
class QuantizedModel(keras.Model):
    """A copy of a subclassed model, with quantized weights and quantized outputs of inner layers.

    Weights are quantized as by a `KerasQuantizationWrapper` around the copy, the outputs of an
    inner layer as by a `KerasActivationQuantizationHolder` right behind it, wherever it is called.
    It is called, compiled, trained and saved as the model is. The given model is left as it is.

    A built model is copied with its weights and its `trainable` flags; one that is not built is
    copied from its config alone, and the new model is built by its first call.

    Limits: training uses Keras' own steps, not a `train_step` of the model's class. `fit` tells all
    inner layers that they train, also where the model's `call` takes no `training` (plain Keras
    then leaves Dropout off). An activity regularizer of an inner layer sees the quantized outputs.
    Legacy `.h5` files of subclassed models cannot be loaded, as in plain Keras: save to `.keras`.

    Args:
        model: a subclassed model, which its config describes completely, or whose constructor
            takes nothing.
        weights_quantizers: weight path -> quantizer, for example `"block/dense/kernel"`.
        activation_quantizers: path of an inner layer -> a quantizer for each of its outputs, in
            flattened order; one quantizer stands for a list of one. `"block/dense"`, `"layers/0"`.
        converted: the weights lie on their grids already, as `convert_to_inferable_quantizers`
            leaves them.
        example: the positional and keyword arguments of a call, `((x,), {})`, arrays or symbolic
            tensors. A built model's shapes, as float32, by default: needed where the call takes
            other dtypes or further tensors.
        **kwargs: `name` and `trainable` (the model's, by default).

    Raises:
        TypeError: what is given is no subclassed model, or no quantizers.
        ValueError: the model cannot be made again from its config, or not be called with float32
            tensors of the shapes that it was built with; it is quantized already; a quantizer is
            for a weight or layer that does not exist, or used elsewhere; the number of quantizers
            is not the number of outputs.

    Example:

    ```python
    import keras
    import keras_qwrap as qi

    class Net(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = keras.layers.Dense(3)

        def call(self, inputs):
            return self.dense(inputs)

    model = Net()
    model(keras.ops.zeros((1, 5)))
    config = qi.TrainableQuantizerWeightsConfig(qi.QuantizationMethod.SYMMETRIC, 8)
    output = qi.ActivationSymmetricInferableQuantizer(8, threshold=4.0, signed=True)
    quantized = qi.QuantizedModel(
        model, {"dense/kernel": qi.STEWeightQATQuantizer(config)}, {"dense": output}
    )
    print(quantized.get_codes()["dense/kernel"][0].shape)  # (5, 3)
    ```
    """

    def __init__(
        self,
        model: keras.Model,
        weights_quantizers: Mapping[str, Quantizer] | None = None,
        activation_quantizers: Mapping[str, Quantizer | Sequence[Quantizer]] | None = None,
        converted: bool = False,
        example: Example | None = None,
        **kwargs: Any,
    ) -> None:
        _check_float_model(model)
        copy, example = copy_built(model, example)
        signature = with_training(inspect.signature(model.call))
        call = partial(QuantizedModel.call, self)
        replace_call(self, call, signature)
        # The policy is what Keras asks, when it compiles, whether to scale the loss.
        policy = model.dtype_policy
        trainable = kwargs.get("trainable", model.trainable)
        given = {"name": model.name, **kwargs, "trainable": trainable}
        super().__init__(dtype=policy, autocast=False, **given)
        sign_build(self, inspect.signature(model.build))
        self.supports_masking = model.supports_masking
        with layer_is_own():
            self.wrapper = KerasQuantizationWrapper(
                copy, weights_quantizers, converted=converted, trainable=trainable
            )
        self._holders_of: dict[str, int] = {}
        self.holders: list[KerasActivationQuantizationHolder] = []
        for path, quantizers in sorted(_by_path(activation_quantizers).items()):
            self._holders_of[path] = len(quantizers)
            for i, quantizer in enumerate(quantizers):
                name = output_holder_name(path, i)
                attribute = f"holders_{len(self.holders)}"
                holder = KerasActivationQuantizationHolder(
                    quantizer, name=name, trainable=trainable
                )
                holder.frozen_with = partial(_is_frozen, copy, path)
                self.holders.append(holder)
                # TensorFlow's checkpoints see attributes, not what is in a list. Keras' own files
                # name what they hold by the first attribute in alphabetical order: the list.
                setattr(self, attribute, holder)
        self._construction = Construction()
        self._taps: Taps | None = None
        if example is not None:
            args, named = example
            self(*args, **named)
        if not kwargs.get("trainable", True):
            self.trainable = False

    @property
    def converted(self) -> bool:
        """Whether the weights lie on their grids already."""
        return self.wrapper.converted

    @property
    def model(self) -> keras.Model:
        """This model's own copy of the float model, with the latent weights."""
        return self.wrapper.layer

    @property
    def weights_quantizers(self) -> dict[str, Quantizer]:
        """Weight path -> quantizer."""
        return dict(self.wrapper.weights_quantizers)

    @property
    def activation_quantizers(self) -> dict[str, list[Quantizer]]:
        """Path of an inner layer -> the quantizers of its outputs."""
        return {
            path: [holder.activation_holder_quantizer for holder in holders]
            for path, holders in self._holders().items()
        }

    def _holders(self) -> dict[str, list[KerasActivationQuantizationHolder]]:
        rest = list(self.holders)
        return {path: [rest.pop(0) for _ in range(n)] for path, n in self._holders_of.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.built:
            self._construction.see_call(args, kwargs)
        return super().__call__(*args, **kwargs)

    def build(self, *args: Any, **kwargs: Any) -> None:
        """Build the copy, find its weights and layers, and create the quantizers' variables."""
        construction = self._construction
        construction.see_shapes(args, kwargs)
        if not self.wrapper.built:
            config = construction.to_config() or {}
            self.wrapper.build_from_config(config | {"output_shapes": None})
        holders = self._holders()
        if self._taps is None:
            self._taps = Taps(find_layers(self.model, list(holders)))
        if construction.output_shapes is None and holders:
            outputs = self._taps.outputs(self.model, self.inner_example())
            construction.output_shapes = [
                shape for path in holders for shape in self._output_shapes(path, outputs)
            ]
        for holder, shape in zip(self.holders, construction.output_shapes or [], strict=True):
            if not holder.built:
                holder.build(tuple(shape))
        self._taps.handle = partial(self._quantize_outputs, holders)

    def _output_shapes(self, path: str, outputs: dict[str, list]) -> list[tuple]:
        if path not in outputs:
            raise bad_value(
                "activation_quantizers",
                path,
                f"layers that '{self.name}' runs when it is called as in the example: "
                f"{', '.join(outputs) or 'none of the given'}",
                "Pass an `example` whose arguments reach the layer, or leave the layer out.",
            )
        self._check_number(path, len(outputs[path]))
        for tensor, holder in zip(outputs[path], self._holders()[path], strict=True):
            enabled = holder.activation_holder_quantizer.enabled
            if enabled and "float" not in keras.backend.standardize_dtype(tensor.dtype):
                fix = "Give that output a quantizer that is disabled, or leave the layer out."
                raise bad_type(f"activation_quantizers['{path}']", tensor.dtype, "floats", fix)
        return [tuple(tensor.shape) for tensor in outputs[path]]

    def _check_number(self, path: str, number: int) -> None:
        if number != self._holders_of[path]:
            raise bad_value(
                f"activation_quantizers['{path}']",
                self._holders_of[path],
                f"{number}, one quantizer for each output of the layer",
                "Where the call's arguments decide the outputs, pass them as `example`.",
            )

    def _quantize_outputs(self, holders: dict[str, list], path: str, tensors: list) -> list:
        self._check_number(path, len(tensors))
        return [holder(tensor) for holder, tensor in zip(holders[path], tensors, strict=True)]

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs; takes the arguments of its call, and `training`."""
        return self.wrapper(*args, **kwargs)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output specification: quantizers keep shape and dtype."""
        return self.wrapper.compute_output_spec(*args, **kwargs)

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output shape."""
        return self.wrapper.compute_output_shape(*args, **kwargs)

    def compute_mask(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output mask."""
        return self.wrapper.compute_mask(*args, **kwargs)

    def get_quantized_weights(self) -> dict[str, np.ndarray]:
        """`{path: quantized weight}`, float32, as the model computes with them in inference."""
        return self.wrapper.get_quantized_weights()

    def get_codes(self) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """`{path: (codes, scale, zero_point)}`, as `KerasQuantizationWrapper.get_codes` does."""
        return self.wrapper.get_codes()

    def convert_to_inferable_quantizers(self) -> "QuantizedModel":
        """A new model for inference, with the same outputs; converting it again gives an equal one.

        Raises:
            ValueError: the model is not built.
        """
        self._require_built("convert_to_inferable_quantizers")
        weights = self.wrapper.converted_weights()
        quantizers, activations = self.weights_quantizers, self.activation_quantizers
        new = type(self)(
            self.model,
            {path: inferable_twin(quantizers[path]) for path in weights},
            {path: [converted_quantizer(q) for q in qs] for path, qs in activations.items()},
            converted=True,
            example=self.inner_example(),
            name=self.name,
            trainable=False,
        )
        _assign(new.model, weights)
        carry_compiled(self, new)
        return new

    def unwrap(self) -> keras.Model:
        """A new model of the given one's class, with the dequantized weights and no quantizers.

        Frozen layers stay frozen; of a converted model, which is frozen as a whole, none is.

        Raises:
            ValueError: the model is not built.
        """
        self._require_built("unwrap")
        weights = self.get_quantized_weights()
        new, _ = copy_built(self.model, self.inner_example())
        _assign(new, weights)
        if self.converted:
            new.trainable = True
        carry_compiled(self, new)
        return new

    def inner_example(self) -> tuple[tuple, dict]:
        """Symbolic arguments of the copy's own call."""
        return self.wrapper.for_layer(*(self._construction.example or ((), {})))

    def example_inputs(self) -> Any:
        """Symbolic tensors in the structure of the call's first argument; None if not known.

        Their sizes are those that the model was built with.
        """
        args, kwargs = self._construction.example or ((), {})
        name = next(iter(inspect.signature(self.call).parameters))
        first = args[0] if args else kwargs.get(name)
        tensors = keras.tree.flatten(first)
        if not tensors or not all(isinstance(tensor, keras.KerasTensor) for tensor in tensors):
            return None
        names = iter([name] if len(tensors) == 1 else [f"{name}_{i}" for i in range(len(tensors))])
        return keras.tree.map_structure(
            lambda t: keras.KerasTensor(t.shape, t.dtype, name=next(names)), first
        )

    def _require_built(self, what: str) -> None:
        if not self.built:
            raise bad_value(what, self.name, "a built model", "Call it first.")

    def get_build_config(self) -> dict | None:
        """An example of a call, from which all variables are created, and what is trainable."""
        config = self._construction.to_config()
        flags = [bool(layer.trainable) for layer in sublayers(self)]
        return config and config | {"trainable": flags}

    def build_from_config(self, config: dict | None) -> None:
        """Build from what `get_build_config` gave."""
        if not config:
            return
        if not self.built:
            self._construction.from_config(config)
            self.build(*config["args"], **config["kwargs"])
        for layer, flag in zip(sublayers(self), config["trainable"], strict=True):
            if layer.trainable is not flag:
                layer.trainable = flag

    def get_config(self) -> dict:
        """The constructor's arguments as plain values, and the version of this format."""
        wrapper = self.wrapper.get_config()
        return {
            "name": self.name,
            "trainable": self.trainable,
            "model": wrapper["layer"],
            "weights_quantizers": wrapper["weights_quantizers"],
            "activation_quantizers": {
                path: [serialize_quantizer(quantizer) for quantizer in quantizers]
                for path, quantizers in self.activation_quantizers.items()
            },
            "converted": self.converted,
            "format_version": FORMAT_VERSION,
        }

    @classmethod
    def from_config(cls, config: dict, custom_objects: dict | None = None) -> "QuantizedModel":
        """The model that `get_config` described."""
        config = check_format_version(config)
        config["model"] = deserialize_layer(config["model"], custom_objects)
        for name in ("weights_quantizers", "activation_quantizers"):
            config[name] = deserialize_quantizers(config[name], custom_objects)
        return cls(**config)


def _check_float_model(model: Any) -> None:
    if not isinstance(model, keras.Model) or is_graph(model):
        raise bad_type(
            "model", model, "a subclassed model", "Functional and Sequential ones have a graph."
        )
    check_float(model)
    warn_of_own_steps(model)


def output_holder_name(path: str, i: int) -> str:
    """What the holder behind an output of an inner layer is called."""
    return f"{path.replace('/', '_')}_output_{i}"


def _is_frozen(model: keras.Model, path: str) -> bool:
    return not getattr(follow(model, path), "trainable", True)


def _by_path(quantizers: Any) -> dict[str, list[Quantizer]]:
    if quantizers is not None and not isinstance(quantizers, Mapping):
        raise bad_type(
            "activation_quantizers",
            quantizers,
            "a dictionary from layer path to quantizers",
            "Pass for example {'block/dense': quantizer}.",
        )
    return {path: as_list(given) for path, given in as_mapping(quantizers).items() if given}


def _assign(model: keras.Model, weights: dict[str, np.ndarray]) -> None:
    for path, weight in weights.items():
        find_weight(model, path).assign(weight)
