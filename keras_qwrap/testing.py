"""The contract that every quantizer and every wrapped layer keeps, as checks for your own.

A broken promise raises an `AssertionError` that says which one, with the numbers.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_qwrap.layers.holder import KerasActivationQuantizationHolder
from keras_qwrap.layers.owner import (
    Quantizer,
    copy_quantizer,
    deserialize_quantizers,
    inferable_twin,
    serialize_quantizer,
)
from keras_qwrap.layers.wrapper import KerasQuantizationWrapper
from keras_qwrap.models.convert import convert_to_inferable
from keras_qwrap.numerics.tensors import to_numpy
from keras_qwrap.quantizers.base import BaseKerasInferableQuantizer
from keras_qwrap.quantizers.config import QuantizationTarget


def check_quantizer(
    quantizer: Quantizer, inputs: Any, idempotent: bool = True, seed: int = 0
) -> None:
    """Check a quantizer against the contract, on copies made from its config.

    Its config survives JSON; shape and float dtype are kept; every output is exactly
    `dequantize(quantize_to_codes(x))`, in eager and compiled execution, inside a wrapper or
    holder and after conversion; integers and NaN to encode are refused; quantizing again on the
    same grid changes nothing; a training step reaches the tensor before it.

    Args:
        quantizer: an unbuilt quantizer for weights or activations; not changed.
        inputs: float array of the shape to quantize. A weight of rank 0 is not checked.
        idempotent: whether the grid promises `q(q(x)) == q(x)`; lookup grids do not.
        seed: for the random numbers of the check.

    Raises:
        AssertionError: the contract is broken.

    Example:

    ```python
    import numpy as np
    import keras_qwrap as qi
    from keras_qwrap.testing import check_quantizer

    quantizer = qi.ActivationSymmetricInferableQuantizer(8, threshold=2.0, signed=True)
    check_quantizer(quantizer, np.random.default_rng(0).normal(size=(4, 3)))
    ```
    """
    inputs = np.asarray(inputs, dtype=np.float32)
    before = json.dumps(quantizer.get_config())
    _check_config(quantizer)
    layer = _host(quantizer, inputs)
    hosted = _hosted_quantizer(layer)
    expected = to_numpy(hosted(ops.convert_to_tensor(inputs)))
    if isinstance(quantizer, BaseKerasInferableQuantizer):
        own = to_numpy(quantizer(ops.convert_to_tensor(inputs)))
        _equal(own, expected, "a copy made from the config gives the same outputs")
    _equal(expected.shape, inputs.shape, "the output's shape is the input's")
    codes = hosted.quantize_to_codes(inputs)
    highest = 2**hosted.num_bits
    _holds(np.ptp(codes) < highest, f"codes fit into {hosted.num_bits} bits")
    _equal(hosted.dequantize(codes), expected, "outputs are the values of their codes")
    if idempotent:
        again = to_numpy(inferable_twin(hosted)(ops.convert_to_tensor(expected)))
        _equal(again, expected, "quantizing again on the same grid changes nothing")
    for dtype in ("float16", "bfloat16"):
        output = hosted(ops.cast(inputs, dtype))
        got = keras.backend.standardize_dtype(output.dtype)
        _equal(got, dtype, "the output's dtype is the input's")
    _refused(TypeError, lambda: hosted(ops.cast(inputs, "int32")), "integer inputs are refused")
    _refused(
        ValueError,
        lambda: hosted.quantize_to_codes(np.full_like(inputs, np.nan)),
        "NaN to encode is refused",
    )
    _check_hosted(layer, inputs, expected, seed)
    _equal(json.dumps(quantizer.get_config()), before, "the given quantizer is not changed")


def _check_config(quantizer: Quantizer) -> None:
    config = quantizer.get_config()
    rebuilt = type(quantizer).from_config(json.loads(json.dumps(config)))
    _equal(rebuilt.get_config(), config, "get_config survives JSON and from_config")
    with keras.saving.custom_object_scope({type(quantizer).__name__: type(quantizer)}):
        again = deserialize_quantizers(serialize_quantizer(quantizer))
    _equal(type(again), type(quantizer), "Keras deserializes to the same class")
    _equal(again.get_config(), config, "Keras deserializes to the same config")


@keras.saving.register_keras_serializable("keras_qwrap")
class _Weight(keras.layers.Layer):
    """Adds a single weight of a given shape to zero times its input."""

    def __init__(self, shape: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shape = tuple(shape)

    def build(self, input_shape: tuple) -> None:
        self.weight = self.add_weight(name="weight", shape=self.shape, initializer="ones")

    def call(self, inputs: Any) -> Any:
        return ops.sum(inputs) * 0.0 + ops.expand_dims(ops.convert_to_tensor(self.weight), 0)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return (1, *self.shape)

    def get_config(self) -> dict:
        return super().get_config() | {"shape": list(self.shape)}


def _host(quantizer: Quantizer, inputs: np.ndarray) -> Any:
    """A built wrapper around one weight that holds `inputs`, or a built holder."""
    own = copy_quantizer(quantizer)
    if quantizer.quantization_target is QuantizationTarget.Activation:
        holder = KerasActivationQuantizationHolder(own)
        holder.build(inputs.shape)
        return holder
    wrapper = KerasQuantizationWrapper(_Weight(inputs.shape), {"weight": own})
    wrapper.build((1, 1))
    wrapper.latent_weight("weight").assign(inputs)
    return wrapper


def _hosted_quantizer(layer: Any) -> Quantizer:
    if isinstance(layer, KerasQuantizationWrapper):
        return layer.weights_quantizers["weight"]
    return layer.activation_holder_quantizer


def _check_hosted(layer: Any, inputs: np.ndarray, expected: np.ndarray, seed: int) -> None:
    """The layer gives `expected`, compiled and converted too, and passes gradients on."""
    is_wrapper = isinstance(layer, KerasQuantizationWrapper)
    fed = np.ones((1, 1), np.float32) if is_wrapper else inputs
    expected = expected[None] if is_wrapper else expected
    converted = layer.convert_to_inferable_quantizers()
    for name, each in (("trainable", layer), ("converted", converted)):
        _equal(to_numpy(each(fed)), expected, f"the {name} layer gives the same")
        for jit_compile in _jit_choices():
            function = _compiled(each, fed.shape, jit_compile)
            what = f"the {name} layer gives the same compiled (jit_compile={jit_compile})"
            _equal(to_numpy(function(fed)), expected, what)
    twin = inferable_twin(_hosted_quantizer(converted))
    _holds(isinstance(twin, BaseKerasInferableQuantizer), "conversion gives inferable quantizers")
    if not is_wrapper:
        bias = _Weight(inputs.shape[1:])
        model = keras.Sequential([keras.Input(inputs.shape[1:]), bias, layer])
        _moves(model, inputs[:1], [bias.weight], seed)
    else:
        model = keras.Sequential([keras.Input((1,)), layer])
        _moves(model, fed, [layer.latent_weight("weight")], seed)


def _jit_choices() -> list[bool]:
    return {"tensorflow": [False, True], "jax": [True]}.get(keras.backend.backend(), [False])


def _compiled(layer: Any, shape: tuple, jit_compile: bool) -> Any:
    inputs = keras.Input(batch_shape=shape)
    model = keras.Model(inputs, layer(inputs))
    model.compile(jit_compile=jit_compile)
    return lambda x: model.predict(x, batch_size=len(x), verbose=0)


def _moves(model: keras.Model, inputs: Any, variables: list[keras.Variable], seed: int) -> None:
    """One training step changes every one of `variables`."""
    keras.utils.set_random_seed(seed)
    before = [to_numpy(variable).copy() for variable in variables]
    random = np.random.default_rng(seed)
    targets = tree.map_structure(lambda y: to_numpy(y) + random.normal(size=y.shape), model(inputs))
    losses = tree.map_structure(lambda _: "mse", targets)
    model.compile(keras.optimizers.SGD(0.5), losses)
    try:
        model.fit(inputs, targets, epochs=1, verbose=0)
    except (ValueError, RuntimeError) as error:
        raise AssertionError(f"broken: a training step runs; it failed with {error}") from error
    for variable, old in zip(variables, before, strict=True):
        _holds(not np.array_equal(to_numpy(variable), old), f"training moves {variable.path}")


def check_wrapper(
    layer: keras.Layer,
    inputs: Sequence[Any],
    weights_quantizers: Mapping[str, Quantizer] | None = None,
    activation_quantizers: Sequence[Quantizer] | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    files: Sequence[str] = ("keras", "h5"),
    seed: int = 0,
) -> None:
    """Check a layer under a wrapper against the contract, on copies made from the configs.

    The output equals the bare layer's fed with the quantized weights; a Functional model gives
    the same; a training step reaches every quantized weight; conversion (also compiled), a second
    conversion, and a reload from every file format change no bit; the given layer and quantizers
    are left as they were.

    Args:
        layer: the layer, built or not; not changed.
        inputs: arrays, or structures of them, for the positional arguments of its call.
        weights_quantizers: weight path -> quantizer.
        activation_quantizers: one for each output.
        call_kwargs: further arguments of its call; arrays become inputs of the model.
        files: endings of the files to save and reload.
        seed: for the random numbers of the check.

    Raises:
        AssertionError: the contract is broken.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_qwrap as qi
    from keras_qwrap.testing import check_wrapper

    config = qi.TrainableQuantizerWeightsConfig(qi.QuantizationMethod.SYMMETRIC, 8)
    check_wrapper(
        keras.layers.Dense(3),
        [np.random.default_rng(0).normal(size=(4, 5)).astype("float32")],
        {"kernel": qi.STEWeightQATQuantizer(config)},
    )
    ```
    """
    keras.utils.set_random_seed(seed)
    call_kwargs = dict(call_kwargs or {})
    weights_quantizers = dict(weights_quantizers or {})
    activation_quantizers = list(activation_quantizers or [])
    before = _snapshot(layer, weights_quantizers, activation_quantizers)
    wrapper = KerasQuantizationWrapper(
        type(layer).from_config(layer.get_config()),
        {path: copy_quantizer(quantizer) for path, quantizer in weights_quantizers.items()},
        [copy_quantizer(quantizer) for quantizer in activation_quantizers],
    )
    expected = tree.map_structure(to_numpy, wrapper(*inputs, **call_kwargs))
    _check_against_bare(layer, wrapper, inputs, call_kwargs, expected)
    model = _functional(wrapper, inputs, call_kwargs)
    inputs = [*inputs, *(v for v in call_kwargs.values() if isinstance(v, np.ndarray))]
    _check_model(model, inputs, expected, "a Functional model")
    if model.trainable_variables:
        moved = [wrapper.latent_weight(path) for path in weights_quantizers]
        _moves(model, list(inputs), moved, seed)
    expected = tree.map_structure(to_numpy, model(list(inputs)))
    converted = convert_to_inferable(model)
    again = convert_to_inferable(converted)
    for what, each in (("the", model), ("the converted", converted), ("the reconverted", again)):
        _check_model(each, inputs, expected, f"{what} model")
    compiled = _predict(model, inputs)
    for got, wanted in zip(_predict(converted, inputs), compiled, strict=True):
        _equal(got, wanted, "the converted model gives the same compiled")
    for ending in files:
        for what, each in (("the", model), ("the converted", converted)):
            reloaded = _reload(each, ending)
            _check_model(reloaded, inputs, expected, f"{what} model reloaded from .{ending}")
    after = _snapshot(layer, weights_quantizers, activation_quantizers)
    _equal(after, before, "the given layer and quantizers are not changed")


def _snapshot(layer: keras.Layer, weights: Mapping, activations: Sequence) -> tuple:
    return (
        json.dumps(layer.get_config(), default=str),
        sorted(vars(layer)),
        [to_numpy(variable).tolist() for variable in layer.variables],
        [json.dumps(q.get_config()) for q in (*weights.values(), *activations)],
    )


def _check_against_bare(
    layer: keras.Layer,
    wrapper: KerasQuantizationWrapper,
    inputs: Sequence,
    call_kwargs: dict,
    expected: Any,
) -> None:
    """The wrapper's output is the bare layer's with quantized weights, its outputs quantized."""
    bare = type(layer).from_config(layer.get_config())
    bare(*inputs, **call_kwargs)
    quantized = wrapper.get_quantized_weights()
    replaced = {id(wrapper.latent_weight(path)): value for path, value in quantized.items()}
    for mine, theirs in zip(wrapper.layer.variables, bare.variables, strict=True):
        theirs.assign(replaced.get(id(mine), to_numpy(mine)))
    outputs = tree.flatten(bare(*inputs, **call_kwargs))
    for i, quantizer in enumerate(wrapper.activation_quantizers):
        outputs[i] = inferable_twin(quantizer)(outputs[i])
    for got, wanted in zip(tree.flatten(expected), outputs, strict=True):
        _equal(got, to_numpy(wanted), "the output is the bare layer's with quantized weights")
    for path, (codes, scale, zero_point) in wrapper.get_codes().items():
        twin = inferable_twin(wrapper.weights_quantizers[path])
        _equal(twin.dequantize(codes), quantized[path], f"'{path}' is the values of its codes")
        shapes = np.broadcast_shapes(codes.shape, scale.shape, zero_point.shape)
        _equal(shapes, codes.shape, f"scale and zero point of '{path}' broadcast to its codes")


def _functional(wrapper: Any, inputs: Sequence, call_kwargs: dict) -> keras.Model:
    """A model of the wrapper; arrays among `call_kwargs` are inputs as well, after the others."""
    symbols = tree.map_structure(_input_like, list(inputs))
    named = {
        key: _input_like(value) if isinstance(value, np.ndarray) else value
        for key, value in call_kwargs.items()
    }
    further = [named[key] for key, value in call_kwargs.items() if isinstance(value, np.ndarray)]
    return keras.Model([*symbols, *further], wrapper(*symbols, **named))


def _input_like(array: Any) -> keras.KerasTensor:
    return keras.Input(np.shape(array)[1:], dtype=np.asarray(array).dtype.name)


def _check_model(model: keras.Model, inputs: Sequence, expected: Any, what: str) -> None:
    for got, wanted in zip(tree.flatten(model(list(inputs))), tree.flatten(expected), strict=True):
        _equal(to_numpy(got), wanted, f"{what} gives the same outputs")


def _predict(model: keras.Model, inputs: Sequence) -> list[np.ndarray]:
    model.compile(jit_compile=False)
    batch_size = len(tree.flatten(inputs)[0])
    return tree.flatten(model.predict(list(inputs), batch_size=batch_size, verbose=0))


def _reload(model: keras.Model, ending: str) -> keras.Model:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"model.{ending}")
        model.save(path)
        return keras.models.load_model(path, compile=False)


def _holds(condition: bool, promise: str) -> None:
    if not condition:
        raise AssertionError(f"broken: {promise}")


def _equal(got: Any, expected: Any, promise: str) -> None:
    if isinstance(expected, np.ndarray):
        same = np.shape(got) == expected.shape and np.array_equal(got, expected, equal_nan=True)
        detail = f"; {np.sum(np.asarray(got) != expected)} values differ" if not same else ""
        _holds(same, f"{promise}{detail}")
    else:
        _holds(got == expected, f"{promise}: got {got}, expected {expected}")


def _refused(error: type[Exception], action: Any, promise: str) -> None:
    try:
        action()
    except error:
        return
    raise AssertionError(f"broken: {promise}, with a {error.__name__}")
