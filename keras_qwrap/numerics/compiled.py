"""One kernel for a chain of elementwise operations, in TensorFlow graphs."""

import functools
import platform
from collections.abc import Callable

import keras

from keras_qwrap.numerics.tensors import Tensor

SMALLEST_FUSED = 2**16
"""Number of elements from which one compiled kernel is worth its launch."""


def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` of tensors, compiled by XLA where TensorFlow would run it operation by operation.

    That is in a graph, for a first argument of known shape with at least `SMALLEST_FUSED`
    elements; the result is the same to the bit. Elsewhere, on other backends, and where
    TensorFlow comes without a compiler (outside Linux), it is called as it is.
    """
    if keras.backend.backend() != "tensorflow" or platform.system() != "Linux":
        return function
    import tensorflow as tf

    @functools.wraps(function)
    def choose(x: Tensor, *rest: Tensor) -> Tensor:
        size = x.shape.num_elements()
        if not tf.inside_function() or size is None or size < SMALLEST_FUSED:
            return function(x, *rest)
        compiled = tf.function(function, autograph=False, jit_compile=True)
        return compiled.get_concrete_function(x, *rest)(x, *rest)

    return choose
