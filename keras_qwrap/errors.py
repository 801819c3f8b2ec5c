"""How this package refuses: what was received, what was expected, what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def _describe(value: Any) -> str:
    text = repr(value)
    if len(text) > 120:
        text = f"{text[:117]}..."
    return text if isinstance(value, str) else f"{text} (of type {type(value).__name__})"


def bad_value(name: str, received: Any, expected: str, fix: str) -> ValueError:
    """A `ValueError` for argument `name`.

    Example:

    ```python
    from keras_qwrap.errors import bad_value

    error = bad_value("num_bits", 1, "an integer from 2 to 16", "Use 8 for int8.")
    print(error)  # num_bits: received 1 (of type int), expected an integer from 2 to 16. Use ...
    ```
    """
    return ValueError(f"{name}: received {_describe(received)}, expected {expected}. {fix}")


def bad_type(name: str, received: Any, expected: str, fix: str) -> TypeError:
    """A `TypeError` for argument `name`, worded as `bad_value` words it."""
    return TypeError(f"{name}: received {_describe(received)}, expected {expected}. {fix}")


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Put `where`, which names a part of a model, in front of what is refused in here.

    Example:

    ```python
    from keras_qwrap.errors import bad_value, naming

    try:
        with naming("layer 'dense'"):
            raise bad_value("threshold", 0.0, "a positive number", "Pass one.")
    except ValueError as error:
        print(error)  # layer 'dense': threshold: received 0.0 (of type float), expected a posi...
    ```
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{where}: {error}") from error
