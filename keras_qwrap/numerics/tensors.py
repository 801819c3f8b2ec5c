"""Variables and tensors: reading them, and taking float ones in."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_qwrap.numerics.checks import bad_type

Tensor = Any


def read(variable: keras.Variable) -> Tensor:
    """The present value of a variable as a tensor, never as the backend's own variable."""
    value = variable.value
    return value.read_value() if hasattr(value, "read_value") else value


def variable_of(weight: Any) -> keras.Variable:
    """The variable that a weight is, or whose place its codes take."""
    return getattr(weight, "variable", weight)


def to_numpy(value: Any) -> np.ndarray:
    """A variable, a tensor or an array as an array."""
    return ops.convert_to_numpy(read(value) if isinstance(value, keras.Variable) else value)


def as_tensor(value: Any, dtype: str | None = None) -> Tensor:
    """A variable, a tensor or numbers as a tensor."""
    value = read(value) if isinstance(value, keras.Variable) else value
    return ops.convert_to_tensor(value, dtype=dtype)


def float_tensor(inputs: Any) -> Tensor:
    """`inputs` as a tensor of floats; integers are refused."""
    tensor = as_tensor(inputs)
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    if "float" not in dtype:
        raise bad_type(
            "inputs", dtype, "a float tensor", "Cast it to a float dtype, or do not quantize it."
        )
    return tensor


def float32_input(inputs: Any) -> tuple[Tensor, str]:
    """`inputs` as a float32 tensor, and the dtype it had; integers are refused."""
    tensor = float_tensor(inputs)
    return ops.cast(tensor, "float32"), keras.backend.standardize_dtype(tensor.dtype)
