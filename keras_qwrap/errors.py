"""How this package refuses: what was received, what was expected, what to do."""

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


def innermost(error: BaseException) -> BaseException:
    """The innermost error that `error` quotes: Keras puts whole configs around each message."""
    inner = error.__cause__ or error.__context__
    while inner is not None and str(inner) and str(inner) in str(error):
        error, inner = inner, inner.__cause__ or inner.__context__
    return error
