"""The quantized weights of converted layers as files hold them: packed integer codes."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_qwrap.layers.keras_internals import put_in_place_of, sublayers, zeros_in_order_of
from keras_qwrap.layers.weights import own_weights
from keras_qwrap.numerics.checks import Told, bad_type, bad_value
from keras_qwrap.numerics.packing import frame, framed_size, is_framed, unframe
from keras_qwrap.numerics.tensors import Tensor, read, to_numpy
from keras_qwrap.quantizers.base import BaseKerasInferableQuantizer


class PackedWeight:
    """Turns a quantized variable into packed codes, for files, and back.

    `packing.frame` says how codes are packed: they follow a header that names the weight.

    Args:
        path: path of the weight in its layer.
        variable: the variable, which holds dequantized weights.
        quantizer: says which codes they have.
    """

    def __init__(
        self, path: str, variable: keras.Variable, quantizer: BaseKerasInferableQuantizer
    ) -> None:
        self._weight_path, self.variable, self._quantizer = path, variable, quantizer
        self._packed_shape = (framed_size(path, variable.shape, quantizer.num_bits),)

    def codes(self) -> np.ndarray:
        """The codes of the variable's values, int32.

        Raises:
            ValueError: they are not on the quantizer's grid.
        """
        return self.codes_of(to_numpy(self.variable))

    def codes_of(self, weight: np.ndarray) -> np.ndarray:
        """The codes of an array of the variable's shape and dtype, int32.

        Raises:
            ValueError: it is not on the quantizer's grid.
        """
        codes = self._quantizer.quantize_to_codes(weight)
        if not np.array_equal(self._dequantized(codes), weight):
            raise ValueError(
                f"{self.variable.path}: received values that are not on the grid of "
                f"'{self._weight_path}' in its converted layer, expected those that conversion "
                "wrote. Others were assigned since; convert the trained layer again."
            )
        return codes

    def codes_to_keep(self, weight: np.ndarray) -> np.ndarray:
        """`codes_of`, which `decoded` turns into the same bits, in `codes_dtype`.

        Raises:
            ValueError: they are not on the quantizer's grid, or it decodes tensors otherwise.
        """
        codes = self.codes_of(weight).astype(self.codes_dtype())
        if not np.array_equal(to_numpy(self.decoded(ops.convert_to_tensor(codes))), weight):
            raise bad_value(
                "keep_codes",
                True,
                f"a {type(self._quantizer).__name__} whose `dequantize_tensor` gives what its "
                "`dequantize` gives",
                "Define it, or load with keep_codes=False.",
            )
        return codes

    def decoded(self, codes: Tensor) -> Tensor:
        """The weights that a tensor of codes stands for, in the variable's dtype."""
        return ops.cast(self._quantizer.dequantize_tensor(codes), self.variable.dtype)

    def codes_dtype(self) -> str:
        """The smallest dtype, of one or two bytes, that holds all codes of the quantizer."""
        shape = np.broadcast_shapes(
            np.shape(self._quantizer.scale), (1,) * len(self.variable.shape)
        )
        lowest = self._quantizer.quantize_to_codes(np.full(shape, -3e38, np.float32)).min()
        return f"{'int' if lowest < 0 else 'uint'}{8 if self._quantizer.num_bits <= 8 else 16}"

    def _dequantized(self, codes: np.ndarray) -> np.ndarray:
        weights = self._quantizer.dequantize(codes)
        dtype = self.variable.dtype
        return weights if weights.dtype == dtype else to_numpy(ops.cast(weights, dtype))

    def packed(self) -> np.ndarray:
        """The packed codes, uint8.

        Raises:
            ValueError: the weight is not on its grid, or its codes have more bits than the
                quantizer says.
        """
        codes, bits = self.codes(), self._quantizer.num_bits
        signed = bool(codes.size) and bool(codes.min() < 0)
        lowest = -(2 ** (bits - 1)) if signed else 0
        if codes.size and not (lowest <= codes.min() and codes.max() < lowest + 2**bits):
            raise bad_value(
                type(self._quantizer).__name__,
                (int(codes.min()), int(codes.max())),
                f"codes of '{self._weight_path}' from {lowest} to {lowest + 2**bits - 1}",
                "Let `num_bits` give their width.",
            )
        return frame(codes, bits, signed, self._weight_path)

    def unpacked(self, packed: Any) -> np.ndarray:
        """The weights that packed codes stand for, in the variable's shape and dtype.

        Raises:
            TypeError, ValueError: they are not what `packed` gives.
        """
        bits, shape = self._quantizer.num_bits, tuple(self.variable.shape)
        fix = "The file is damaged, or is not of this model."
        packed = np.asarray(packed)
        if packed.dtype != np.uint8:
            raise bad_type(self.variable.path, packed.dtype.name, "packed codes, uint8", fix)
        if packed.shape != self._packed_shape:
            expected = f"packed codes of shape {self._packed_shape}"
            raise bad_value(self.variable.path, packed.shape, expected, fix)
        codes, found_bits, path = unframe(packed)
        if (found_bits, path, codes.shape) != (bits, self._weight_path, shape):
            found = Told(f"{found_bits} bits for '{path}' of shape {codes.shape}")
            expected = f"{bits} bits for '{self._weight_path}' of shape {shape}"
            raise bad_value(self.variable.path, found, expected, fix)
        return self._dequantized(codes)


KEEP_CODES: ContextVar[bool] = ContextVar("keep_codes", default=False)
"""Whether converted layers that are built keep integer codes in place of their weights."""


class CodesVariable(keras.Variable):
    """Integer codes in the place of a converted layer's weight, which is decoded at every read.

    Its dtype and its value, which Keras computes, traces and checkpoints with, are those of the
    codes. As an array (`numpy`, `get_weights`, plain `.h5` files) it is the weight, and weights are
    encoded when they are assigned; only what has the dtype of the codes is taken as codes. It is
    never trainable.

    Args:
        packed: the weight.
    """

    def __init__(self, packed: PackedWeight) -> None:
        self._packed = packed
        super().__init__(
            zeros_in_order_of(packed.variable),
            shape=tuple(packed.variable.shape),
            dtype=packed.codes_dtype(),
            trainable=False,
            autocast=False,
            name=packed.variable.name,
        )

    def numpy(self) -> np.ndarray:
        """The weights."""
        return to_numpy(self.variable)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.numpy(), dtype)

    @property
    def variable(self) -> keras.Variable:
        """The variable whose place it takes, and which reads as the decoded weight."""
        return self._packed.variable

    @property
    def trainable(self) -> bool:
        """Never; setting it changes nothing."""
        return False

    @trainable.setter
    def trainable(self, value: bool) -> None:
        pass

    def decoded(self, *_: Any, **__: Any) -> Tensor:
        """The weights; arguments, as an initializer's, change nothing."""
        return self._packed.decoded(self.value)

    def assign(self, value: Any) -> Tensor:
        """Hold the codes of these weights, or these codes.

        Raises:
            ValueError: the weights are not on the grid, or would not be decoded to the same bits.
        """
        if keras.backend.standardize_dtype(getattr(value, "dtype", "float32")) == self.dtype:
            return super().assign(value)
        return self.encode(value)

    def encode(self, weights: Any) -> Tensor:
        """Hold the codes of these weights, whatever their dtype.

        Raises:
            ValueError: as `assign`.
        """
        array = ops.cast(ops.convert_to_tensor(weights), self.variable.dtype)
        if tuple(array.shape) != tuple(self.shape):
            fix = "Assign weights of that shape."
            raise bad_value(self.path, tuple(array.shape), f"shape {tuple(self.shape)}", fix)
        return super().assign(self._packed.codes_to_keep(to_numpy(array)))


Row = tuple[str, keras.Variable, BaseKerasInferableQuantizer]
Packed = dict[int, PackedWeight]


def store_packed(layer: keras.Layer, rows: Iterable[Row]) -> Packed:
    """Let `layer` and the layers inside it save and load packed codes.

    What a layer writes into a file under some key stays there, except that packed codes take the
    place of quantized variables. Where `KEEP_CODES` says so, codes also take their place in the
    layer.

    Args:
        layer: a built layer that computes with dequantized weights.
        rows: path, variable and quantizer of each quantized weight.

    Returns:
        What packs each variable, by its `id`, and by that of the codes in its place.
    """
    packed = {id(variable): PackedWeight(path, variable, q) for path, variable, q in rows}
    for each in list(packed.values()) if KEEP_CODES.get() else ():
        codes = CodesVariable(each)
        put_in_place_of(each.variable, codes, codes.decoded, codes.encode, layer)
        packed[id(codes)] = each
    for inner in sublayers(layer):
        if any(id(variable) in packed for variable in own_weights(inner)):
            save, load = inner.save_own_variables, inner.load_own_variables
            if isinstance(save, partial) and save.func is _save:
                save.args[1].update(packed)
                continue
            inner.save_own_variables = partial(_save, save, packed)
            inner.load_own_variables = partial(_load, save, load, packed)
    return packed


def kept_weights(packed: Packed) -> list[tuple[keras.Variable, Callable]]:
    """The variables whose places codes have taken, and what decodes them, once for each call."""
    return [
        (each.variable, partial(read, each.variable))
        for key, each in packed.items()
        if key != id(each.variable)
    ]


@contextmanager
def zeros_for_random(layer: keras.Layer) -> Iterator[None]:
    """Let weights that are made in here begin as zeros where random numbers would be drawn.

    A converted layer is given its weights, so that drawing them would be half of the time that
    loading takes. Layers that `layer` creates only when it is built draw theirs, and so do all on
    torch: there the draw decides the order of a weight in memory, and with it that of sums.
    """
    draws = keras.backend.backend() == "torch"
    inside = [inner for inner in sublayers(layer) if not (draws or inner.built)]
    for inner in inside:
        inner.add_weight = partial(_add_weight, inner.add_weight)
    try:
        yield
    finally:
        for inner in inside:
            if "add_weight" in vars(inner):
                del inner.add_weight


def _add_weight(add_weight: Callable, *args: Any, **kwargs: Any) -> keras.Variable:
    if hasattr(keras.initializers.get(kwargs.get("initializer")), "seed"):
        kwargs["initializer"] = "zeros"
    return add_weight(*args, **kwargs)


def _save(save: Callable, packed: Packed, store: Any) -> None:
    save(_Writer(store, packed))


def _load(save: Callable, load: Callable, packed: Packed, store: Any) -> None:
    saved: dict[str, Any] = {}
    save(saved)
    load(_Reader(store, {k: packed[id(v)] for k, v in saved.items() if id(v) in packed}))


def packed_arrays(model: keras.Model, packed: Packed) -> dict[str, PackedWeight]:
    """What packs arrays of a legacy `.h5` file, in which Keras writes floats, by their names."""
    return {
        f"model_weights/{layer.name}/{weight.path}": packed[id(weight)]
        for layer in model.layers
        for weight in layer.weights
        if id(weight) in packed
    }


def load_legacy_weights(
    model: keras.Model,
    of_layers: Mapping[str, list[np.ndarray]],
    of_model: list[np.ndarray] | None,
    packed: Packed,
) -> None:
    """Give a model the weights of a legacy `.h5` file, as Keras does, or packed codes of them.

    Args:
        model: the model.
        of_layers: the weights of each layer that has some, in order.
        of_model: those that are in no layer; None where the file says nothing of them.
        packed: what packs the model's quantized weights.

    Raises:
        ValueError: they are not those of the model.
    """
    layers = [layer for layer in model.layers if layer.weights]
    _check_number("layers with weights", len(of_layers), len(layers))
    for arrays, layer in zip(of_layers.values(), layers, strict=True):
        weights = [*layer.trainable_weights, *layer.non_trainable_weights]
        _load_arrays(layer, weights, arrays, packed)
    if of_model is not None:
        _load_arrays(model, own_weights(model), of_model, packed)


def _load_arrays(layer: keras.Layer, weights: list, arrays: list, packed: Packed) -> None:
    framed = [array for array in arrays if is_framed(array)]
    # Version 0.1.0 put packed codes behind all that is trained, Keras puts them where floats were.
    coded = [weight for weight in weights if framed and id(weight) in packed]
    floats = [array for array in arrays if not is_framed(array)]
    others = [weight for weight in weights if all(weight is not each for each in coded)]
    _check_number(f"packed weights of layer '{layer.name}'", len(framed), len(coded))
    _check_number(f"weights of layer '{layer.name}'", len(floats), len(others))
    for weight, array in zip(others, floats, strict=True):
        weight.assign(np.array(array))  # A backend may share memory with what it is given.
    for weight, array in zip(coded, framed, strict=True):
        weight.assign(packed[id(weight)].unpacked(array))
    if hasattr(layer, "finalize_state") and weights:
        layer.finalize_state()


def _check_number(what: str, found: int, expected: int) -> None:
    if found != expected:
        fix = "The file is damaged, or is not of this model."
        raise bad_value(what, found, f"{expected}, as in the model", fix)


class _Store:
    """A store that Keras reads from or writes to."""

    def __init__(self, store: Any, packed: dict) -> None:
        self._store, self._packed = store, packed

    def __getitem__(self, key: str) -> Any:
        return self._store[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._store[key] = value

    def __contains__(self, key: str) -> bool:
        return key in self._store

    def __len__(self) -> int:
        return len(self._store)

    def keys(self) -> Any:
        """Those of the store."""
        return self._store.keys()


class _Writer(_Store):
    """Is given packed codes in place of quantized variables."""

    def __setitem__(self, key: str, value: Any) -> None:
        packed = self._packed.get(id(value))
        self._store[key] = packed.packed() if packed else value


class _Reader(_Store):
    """Gives dequantized weights where the store holds packed codes."""

    def __getitem__(self, key: str) -> Any:
        value = self._store[key]
        return self._packed[key].unpacked(value) if key in self._packed else value
