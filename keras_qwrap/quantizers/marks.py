"""What each quantizer is for, as the class itself states it; recipes choose by it."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from keras_qwrap.numerics.checks import bad_type, bad_value
from keras_qwrap.quantizers.config import QuantizationMethod, QuantizationTarget, check_member

Offer = tuple[QuantizationTarget, QuantizationMethod, str]

_OFFERED: dict[Offer, type] = {}
"""Target, method and a spec's word for the range -> the class that recipes take for them."""


def mark_quantizer(
    quantization_target: QuantizationTarget,
    quantization_method: Sequence[QuantizationMethod],
    identifier: Any = None,
    ranges: Sequence[str] = (),
) -> Callable[[type], type]:
    """Class decorator that states what a quantizer is for.

    Args:
        quantization_target: weights or activations.
        quantization_method: the methods that the class supports.
        identifier: any name by which a project finds its quantizer again; kept as
            `cls.identifier`, the class' own name by default.
        ranges: for recipes take trainable classes from here: a `WeightsSpec` or `ActivationSpec`
            with one of these words as its `range`, and one of the methods, is made with this class.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: another class has one of these ranges, for one of the methods, already.

    Example:

    ```python
    import keras_qwrap as qi

    @qi.mark_quantizer(qi.QuantizationTarget.Weights, [qi.QuantizationMethod.SYMMETRIC])
    class MyQuantizer(qi.BaseKerasTrainableQuantizer):
        def initialize_quantization(self, tensor_shape, name, layer):
            return {}

        def __call__(self, inputs):
            return inputs

        def convert2inferable(self):
            return qi.WeightsSymmetricInferableQuantizer(8, 1.0, per_channel=False)

    print(MyQuantizer.quantization_target)  # QuantizationTarget.Weights
    ```
    """
    target = check_member("quantization_target", quantization_target, QuantizationTarget)
    methods = check_methods(quantization_method)
    if not isinstance(ranges, (list, tuple)) or any(not isinstance(word, str) for word in ranges):
        raise bad_type("ranges", ranges, "a list of strings", "Pass for example ['learned'].")

    def mark(cls: type) -> type:
        marks = {"quantization_target": target, "quantization_method": methods}
        marks["identifier"] = cls.__name__ if identifier is None else identifier
        for name, value in marks.items():
            setattr(cls, name, value)
        for method, word in product(methods, ranges):
            _offer(cls, (target, method, word))
        return cls

    return mark


def check_methods(methods: Any) -> list[QuantizationMethod]:
    """A list of methods, refused if it is empty or holds anything else."""
    if not isinstance(methods, (list, tuple)) or not methods:
        raise bad_type(
            "quantization_method",
            methods,
            "a list of QuantizationMethod",
            "Pass for example [QuantizationMethod.SYMMETRIC].",
        )
    return [check_member("quantization_method", m, QuantizationMethod) for m in methods]


def _offer(cls: type, offer: Offer) -> None:
    """Let recipes take the class; one that is defined again, as in a notebook, replaces itself."""
    other = _OFFERED.setdefault(offer, cls)
    if _name(other) != _name(cls):
        raise bad_value(
            "ranges",
            offer[2],
            f"words that no other class for {offer[0].name.lower()} has",
            f"{other.__name__} has it for {offer[1].name}.",
        )
    _OFFERED[offer] = cls


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def offered(target: QuantizationTarget) -> dict[tuple[str, str], type]:
    """Method, in small letters, and range of a spec -> the class that recipes take for them."""
    return {
        (method.name.lower(), word): cls
        for (kind, method, word), cls in _OFFERED.items()
        if kind is target
    }
