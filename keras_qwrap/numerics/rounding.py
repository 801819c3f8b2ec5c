"""Pure tensor functions: a float tensor onto a grid, with a straight-through gradient.

They compute in the dtype they are given (the quantizers give float32) and in one order of
operations, which eager execution, `tf.function` and XLA evaluate to the same bits. `x / scale`
keeps that property only while `scale` is no graph constant; see the README on exactness.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_qwrap.numerics.compiled import fused
from keras_qwrap.numerics.grids import SMALLEST_SCALE
from keras_qwrap.numerics.tensors import Tensor, as_tensor, float_tensor


def fake_quantize(x: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Round to multiples of `scale` and clip, for a range that is fixed.

    `y = clip(round_half_even(x / scale), lowest, highest) * scale`

    Gradient: `dx = dy` where `(lowest - 1/2) * scale <= x <= (highest + 1/2) * scale`, else 0;
    none for `scale`, `lowest` and `highest`.

    Args:
        x: float tensor of any shape.
        scale: step, broadcastable to `x`, positive.
        lowest: lowest code minus the zero point, broadcastable to `x`.
        highest: highest code minus the zero point, broadcastable to `x`.

    Returns:
        Tensor of the shape and dtype of `x`. NaN stays NaN, infinities are clipped.

    Example:

    ```python
    import numpy as np
    from keras_qwrap.numerics.rounding import fake_quantize

    y = fake_quantize(np.float32([0.3, -9.0, 9.0]), 0.5, -8, 7)
    print(np.asarray(y))  # [ 0.5 -4.   3.5]
    ```
    """
    x = float_tensor(x)
    return _clipped(x, *(as_tensor(a, x.dtype) for a in (scale, lowest, highest)))


def fake_quantize_unclipped(x: Tensor, scale: Tensor) -> Tensor:
    """Round to multiples of `scale`, for a range that was taken from `x` itself.

    `y = round_half_even(x / scale) * scale`

    Gradient: `dx = dy`, since nothing is clipped; none for `scale`.

    Args:
        x: float tensor of any shape.
        scale: step, broadcastable to `x`, positive, large enough for every `x / scale` to lie on
            the grid.

    Example:

    ```python
    import numpy as np
    from keras_qwrap.numerics.rounding import fake_quantize_unclipped

    print(np.asarray(fake_quantize_unclipped(np.float32([0.3, -0.9]), 0.25)))  # [ 0.25 -1.  ]
    ```
    """
    x = float_tensor(x)
    return _unclipped(x, ops.convert_to_tensor(scale, dtype=x.dtype))


def fake_quantize_covered(x: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """As `fake_quantize`, for a range taken from `x` itself whose ends moved onto the grid.

    `y = clip(round_half_even(x / scale), lowest, highest) * scale`

    Gradient: `dx = dy`, since clipping moves a value by no more than rounding does; none for
    `scale`, `lowest` and `highest`.

    Example:

    ```python
    import numpy as np
    from keras_qwrap.numerics.rounding import fake_quantize_covered

    print(np.asarray(fake_quantize_covered(np.float32([0.3, 3.5]), 1.0, 0, 3)))  # [0. 3.]
    ```
    """
    x = float_tensor(x)
    return _covered(x, *(as_tensor(a, x.dtype) for a in (scale, lowest, highest)))


def fake_lookup(
    x: Tensor, scale: Tensor, divisor: Tensor, values: Any, bounds: Any, limits: tuple
) -> Tensor:
    """The nearest entry of a table.

    `y = values[index] * scale`, where `index` counts the `bounds` that lie strictly below
    `clip(x / divisor, *limits)`.

    Gradient: `dx = dy` where `limits[0] <= x / divisor <= limits[1]`, else 0.

    Args:
        x: float tensor of any shape.
        scale: value of one table unit, broadcastable to `x`.
        divisor: width of one table unit when looking up, broadcastable to `x`.
        values: table entries in ascending order, an array of shape `(n,)`.
        bounds: where one entry gives way to the next, ascending, an array of shape `(n - 1,)`.
        limits: lowest and highest number that the table's bit width can hold.

    Example:

    ```python
    import numpy as np
    from keras_qwrap.numerics.rounding import fake_lookup

    y = fake_lookup(np.float32([0.4, -2.0]), 0.5, 0.5, [-1.0, 1.0], [0.0], (-2.0, 1.0))
    print(np.asarray(y))  # [ 0.5 -0.5]
    ```
    """
    values, bounds = np.asarray(values, np.float32), np.asarray(bounds, np.float32)

    @ops.custom_gradient
    def look_up(x: Tensor, scale: Tensor, divisor: Tensor) -> tuple:
        position = _divide(x, divisor)

        def grad(*args: Tensor, upstream: Tensor = None) -> tuple:
            dy = _upstream(args, upstream)
            above = ops.greater_equal(position, limits[0])
            inside = ops.logical_and(above, ops.less_equal(position, limits[1]))
            dx = ops.where(inside, dy, ops.zeros_like(dy))
            return dx, ops.zeros_like(scale), ops.zeros_like(divisor)

        clipped = ops.clip(position, *limits)
        index = ops.searchsorted(bounds, ops.reshape(clipped, (-1,)), side="left")
        found = ops.reshape(ops.take(values, index, axis=0), ops.shape(clipped))
        return ops.multiply(ops.where(ops.isnan(position), position, found), scale), grad

    x = float_tensor(x)
    return look_up(x, *(as_tensor(a, x.dtype) for a in (scale, divisor)))


def _divide(x: Tensor, scale: Tensor) -> Tensor:
    """`x / scale`, correctly rounded.

    JAX's compiler multiplies by the reciprocal of a divisor that it sees to be broadcast, which
    misses some ties; a divisor chosen element by element it divides by. NaN stays NaN.

    Subnormal numbers count as zero, also on torch, which computes with them.
    """
    if keras.backend.backend() == "torch":
        x = ops.where(ops.abs(x) < SMALLEST_SCALE, 0.0, x)
    if keras.backend.backend() == "jax":
        scale = ops.where(ops.isnan(x), x, scale)
    return ops.divide(x, scale)


def _upstream(args: tuple, upstream: Tensor) -> Tensor:
    """The incoming gradient: Keras hands it over by keyword on torch, else as the last one."""
    return args[-1] if upstream is None else upstream


@fused
def _round(x: Tensor, scale: Tensor) -> Tensor:
    return ops.multiply(ops.round(_divide(x, scale)), scale)


@fused
def _round_and_clip(x: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    return ops.multiply(ops.clip(ops.round(_divide(x, scale)), lowest, highest), scale)


@fused
def _masked(x: Tensor, dy: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """`dy` where `x` is inside half a step around the range, else 0."""
    above = ops.greater_equal(x, (lowest - 0.5) * scale)
    below = ops.less_equal(x, (highest + 0.5) * scale)
    return ops.where(ops.logical_and(above, below), dy, 0.0)


@ops.custom_gradient
def _clipped(x: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    def grad(*args: Tensor, upstream: Tensor = None) -> tuple:
        dx = _masked(x, _upstream(args, upstream), scale, lowest, highest)
        return dx, *(ops.zeros_like(a) for a in (scale, lowest, highest))

    return _round_and_clip(x, scale, lowest, highest), grad


@ops.custom_gradient
def _unclipped(x: Tensor, scale: Tensor) -> Tensor:
    def grad(*args: Tensor, upstream: Tensor = None) -> tuple:
        return _upstream(args, upstream), ops.zeros_like(scale)

    return _round(x, scale), grad


@ops.custom_gradient
def _covered(x: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    def grad(*args: Tensor, upstream: Tensor = None) -> tuple:
        return _upstream(args, upstream), *(ops.zeros_like(a) for a in (scale, lowest, highest))

    return _round_and_clip(x, scale, lowest, highest), grad
