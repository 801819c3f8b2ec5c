"""THE rounding rule, and the tensor functions that put a float tensor onto a grid by it.

Numbers are counted in steps of the scale (`to_steps`). What is stored is a code, `code = steps +
zero_point`: the number zero is no steps, and has the zero point as its code. Computing is in steps
alone, so the ends of a grid are given as *lowest and highest code minus the zero point*: between
rounding and multiplying nothing is added, which compilers might contract and round otherwise.

The functions compute in the dtype they are given (the quantizers give float32) and in one order of
operations, which eager execution, `tf.function` and XLA evaluate to the same bits. `x / scale`
keeps that property only while `scale` is no graph constant; see the README on exactness.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_qwrap.numerics.compiled import fused
from keras_qwrap.numerics.tensors import Tensor, as_tensor, float_tensor

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""2**-126: below it a float32 step is subnormal, and its multiples are not exact."""


def to_steps(x: Tensor, scale: Tensor, xp: Any) -> Tensor:
    """The whole number of steps nearest to `x`; of two equally near ones the even one.

    Everything that rounds onto a grid does it here: `xp` is `keras.ops`, or `numpy` with numbers
    that are `normal`. Both give the same bits.
    """
    return xp.round(divide(x, scale, xp))


def divide(x: Tensor, scale: Tensor, xp: Any) -> Tensor:
    """`x / scale`, correctly rounded. NaN stays NaN, and subnormal numbers count as zero."""
    if xp is np:
        return x / scale
    if keras.backend.backend() == "torch":
        # The other backends take subnormal numbers for zero themselves.
        x = normal(x, ops)
    if keras.backend.backend() == "jax":
        # Its compiler multiplies by the reciprocal of a divisor that it sees to be broadcast, which
        # misses some ties; a divisor chosen element by element it divides by.
        scale = ops.where(ops.isnan(x), x, scale)
    return ops.divide(x, scale)


def normal(x: Tensor, xp: Any) -> Tensor:
    """`x`, with zero for subnormal numbers, as some backends compute."""
    return xp.where(xp.abs(x) < SMALLEST_SCALE, xp.zeros_like(x), x)


def fake_quantize(x: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Round to multiples of `scale` and clip, for a range that is fixed.

    `y = clip(round_half_even(x / scale), lowest, highest) * scale`

    Gradient: `dx = dy` where `(lowest - 1/2) * scale <= x <= (highest + 1/2) * scale`, else 0;
    none for `scale`, `lowest` and `highest`.

    Args:
        x: float tensor of any shape.
        scale: step, broadcastable to `x`, positive.
        lowest: lowest code minus the zero point, broadcastable to `x`: computing is in steps, and
            the number zero, whose code is the zero point, is no steps.
        highest: highest code minus the zero point, likewise.

    Returns:
        Tensor of the shape and dtype of `x`. NaN stays NaN, infinities are clipped.

    Example:

    ```python
    import numpy as np
    import keras_qwrap as qi

    y = qi.fake_quantize(np.float32([0.3, -9.0, 9.0]), 0.5, -8, 7)
    print(np.asarray(y))  # [ 0.5 -4.   3.5]
    ```
    """
    return _clipped(*_of_one_dtype(x, scale, lowest, highest))


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
    import keras_qwrap as qi

    print(np.asarray(qi.fake_quantize_unclipped(np.float32([0.3, -0.9]), 0.25)))  # [ 0.25 -1.  ]
    ```
    """
    return _covered(*_of_one_dtype(x, scale))


def fake_quantize_covered(x: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """As `fake_quantize`, for a range taken from `x` itself whose ends moved onto the grid.

    `y = clip(round_half_even(x / scale), lowest, highest) * scale`

    Gradient: `dx = dy`, since clipping moves a value by no more than rounding does; none for
    `scale`, `lowest` and `highest`.

    Example:

    ```python
    import numpy as np
    import keras_qwrap as qi

    print(np.asarray(qi.fake_quantize_covered(np.float32([0.3, 3.5]), 1.0, 0, 3)))  # [0. 3.]
    ```
    """
    return _covered(*_of_one_dtype(x, scale, lowest, highest))


def fake_quantize_where(
    on: Tensor, x: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor
) -> Tensor:
    """`fake_quantize` of a float32 tensor where `on` is true; elsewhere `x`, with gradient `dy`.

    In one gradient, since a selection outside of it costs as much as the quantizer.
    """
    # Nothing is outside of an endless grid: the gradient needs no selection of its own.
    lowest = ops.where(on, lowest, -np.float32(np.inf))
    highest = ops.where(on, highest, np.float32(np.inf))
    return _selected(x, scale, lowest, highest, ops.cast(on, "float32"))


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
    import keras_qwrap as qi

    y = qi.fake_lookup(np.float32([0.4, -2.0]), 0.5, 0.5, [-1.0, 1.0], [0.0], (-2.0, 1.0))
    print(np.asarray(y))  # [ 0.5 -0.5]
    ```
    """
    values, bounds = np.asarray(values, np.float32), np.asarray(bounds, np.float32)

    @ops.custom_gradient
    def look_up(x: Tensor, scale: Tensor, divisor: Tensor) -> tuple:
        position = divide(x, divisor, ops)

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

    return look_up(*_of_one_dtype(x, scale, divisor))


def _of_one_dtype(x: Any, *numbers: Any) -> tuple[Tensor, ...]:
    """A float tensor, and tensors of its dtype; variables are read."""
    x = float_tensor(x)
    return x, *(as_tensor(number, x.dtype) for number in numbers)


def _upstream(args: tuple, upstream: Tensor) -> Tensor:
    """The incoming gradient: Keras hands it over by keyword on torch, else as the last one."""
    return args[-1] if upstream is None else upstream


@fused
def _values(x: Tensor, scale: Tensor, *ends: Tensor) -> Tensor:
    """The values of `x` on the grid, which may have a lowest and a highest step."""
    steps = to_steps(x, scale, ops)
    return ops.multiply(ops.clip(steps, *ends) if ends else steps, scale)


@fused
def _values_where(x: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor, on: Tensor) -> Tensor:
    return ops.where(on > 0, _values(x, scale, lowest, highest), x)


@fused
def _inside(x: Tensor, dy: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """`dy` where `x` is inside half a step around the range, else 0."""
    above = ops.greater_equal(x, (lowest - 0.5) * scale)
    below = ops.less_equal(x, (highest + 0.5) * scale)
    return ops.where(ops.logical_and(above, below), dy, 0.0)


def _straight_through(values: Callable[..., Tensor], clips: bool) -> Callable[..., Tensor]:
    """`values(x, scale, lowest, highest, ...)` with the gradient `dy` for `x`, and none for others.

    Where it `clips`, the gradient is 0 outside of the range.
    """

    @ops.custom_gradient
    def quantize(x: Tensor, *others: Tensor) -> tuple:
        def grad(*args: Tensor, upstream: Tensor = None) -> tuple:
            dy = _upstream(args, upstream)
            dx = _inside(x, dy, *others[:3]) if clips else dy
            return dx, *(ops.zeros_like(other) for other in others)

        return values(x, *others), grad

    return quantize


_clipped = _straight_through(_values, clips=True)
_covered = _straight_through(_values, clips=False)
_selected = _straight_through(_values_where, clips=True)
