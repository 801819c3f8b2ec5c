"""Callbacks that schedule the ranges of activation quantizers during training."""

from typing import Any

import keras
import numpy as np

from keras_qwrap.layers.owner import quantizers_in
from keras_qwrap.numerics.checks import bad_type, bad_value
from keras_qwrap.quantizers.base import BaseKerasTrainableQuantizer

_MOST_STEPS = 2**31 - 1


class _RangeCallback(keras.callbacks.Callback):
    """Finds the quantizers of the model that take a range, when training begins."""

    def __init__(self) -> None:
        super().__init__()
        self._quantizers: list[BaseKerasTrainableQuantizer] = []

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Find the quantizers.

        Raises:
            ValueError: the model has none, or is not built.
        """
        found = [row for row in quantizers_in(self.model) if row[2].takes_range]
        self._quantizers = [quantizer for _, _, quantizer in found]  # type: ignore[misc]
        what = type(self).__name__
        if not self._quantizers:
            raise ValueError(
                f"{what}: received model '{self.model.name}' without moving-average quantizers, "
                "expected at least one. Leave the callback out."
            )
        if not all(owner.built for owner, _, _ in found):
            raise ValueError(
                f"{what}: received model '{self.model.name}', which is not built, expected a "
                "built one. Call it, or pass an Input first."
            )


class FreezeRanges(_RangeCallback):
    """Stops all moving averages of activation ranges from the beginning of an epoch on.

    A range that does not exist yet is still set by the next batch. What is frozen is saved with
    the model and stays frozen; nothing here thaws it.

    Args:
        at_epoch: first epoch, counted from 0, in which ranges no longer move.

    Raises:
        TypeError, ValueError: `at_epoch` is no integer from 0, or, when training begins, the
            model has no moving-average quantizers or is not built.

    Example:

    ```python
    import keras
    import keras_qwrap as qi

    config = qi.TrainableQuantizerActivationConfig(qi.QuantizationMethod.UNIFORM, 8)
    quantizer = qi.MovingAverageActivationQATQuantizer(config)
    holder = qi.KerasActivationQuantizationHolder(quantizer)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2), holder])
    model.compile("sgd", "mse")
    x = keras.ops.ones((4, 2))
    model.fit(x, x, epochs=3, verbose=0, callbacks=[qi.FreezeRanges(at_epoch=1)])
    print(bool(keras.ops.convert_to_numpy(quantizer.quantizer_parameters["frozen"])))  # True
    ```
    """

    def __init__(self, at_epoch: int) -> None:
        super().__init__()
        self.at_epoch = _check_count("at_epoch", at_epoch)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Freeze the ranges if it is time."""
        if epoch >= self.at_epoch:
            for quantizer in self._quantizers:
                quantizer.freeze_range()


class DelayQuantization(_RangeCallback):
    """Trains with float activations at first, while the moving averages find their ranges.

    Each activation quantizer passes its tensor unquantized in the first `steps` training calls,
    counted since it was built; the count is saved with the model, so that a resumed training goes
    on as an uninterrupted one. A layer that is called several times in a step counts every call.
    Validation and inference quantize as soon as there is a range. Weights are quantized from the
    start: their range is exact at every step, and has nothing to wait for.

    Args:
        steps: number of training calls.

    Raises:
        TypeError, ValueError: `steps` is no integer from 0 to 2**31 - 1, or, when training begins,
            the model has no moving-average quantizers or is not built.

    Example:

    ```python
    import keras
    import keras_qwrap as qi

    config = qi.TrainableQuantizerActivationConfig(qi.QuantizationMethod.UNIFORM, 2)
    quantizer = qi.MovingAverageActivationQATQuantizer(config)
    holder = qi.KerasActivationQuantizationHolder(quantizer)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2), holder])
    model.compile("sgd", "mse")
    x = keras.ops.ones((4, 2))
    model.fit(x, x, epochs=3, verbose=0, callbacks=[qi.DelayQuantization(steps=2)])
    print(int(keras.ops.convert_to_numpy(quantizer.quantizer_parameters["steps"])))  # 3
    ```
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = _check_count("steps", steps)

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Set the delay of every quantizer."""
        super().on_train_begin(logs)
        for quantizer in self._quantizers:
            quantizer.delay_quantization(self.steps)


def _check_count(name: str, value: Any) -> int:
    fix = "Pass for example 1000."
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise bad_type(name, value, "an integer from 0", fix)
    if not 0 <= value <= _MOST_STEPS:
        raise bad_value(name, value, "an integer from 0 to 2**31 - 1", fix)
    return int(value)
