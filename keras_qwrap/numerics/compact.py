"""Long lists of numbers in configs, in few characters and without loss."""

import base64
import binascii
from typing import Any

import numpy as np

from keras_qwrap.numerics.checks import bad_value

_MARK = "__keras_qwrap_float32__"
_SHORTEST = 16


def compact(config: Any) -> Any:
    """`config` with each list of 16 floats or more as base64, if float32 holds them.

    That is, if each is the number of fewest digits that stands for its float32, as in the
    configs of this package's quantizers. `expand` gives back the very same floats.

    Example:

    ```python
    from keras_qwrap.numerics.compact import compact, expand

    config = {"threshold": [0.1] * 100}
    print(len(str(compact(config))) < 600, expand(compact(config)) == config)  # True True
    ```
    """
    if isinstance(config, dict):
        return {key: compact(value) for key, value in config.items()}
    if not isinstance(config, list):
        return config
    if len(config) < _SHORTEST or not all(type(number) is float for number in config):
        return [compact(value) for value in config]
    with np.errstate(over="ignore"):
        numbers = np.array(config, dtype="<f4")
    if _floats(numbers) != config:
        return config
    return {_MARK: base64.b64encode(numbers.tobytes()).decode("ascii")}


def expand(config: Any) -> Any:
    """The inverse of `compact`.

    Raises:
        ValueError: what should be base64 of float32 numbers is not.
    """
    if isinstance(config, list):
        return [expand(value) for value in config]
    if not isinstance(config, dict):
        return config
    if set(config) != {_MARK}:
        return {key: expand(value) for key, value in config.items()}
    try:
        return _floats(np.frombuffer(base64.b64decode(config[_MARK], validate=True), "<f4"))
    except (TypeError, ValueError, binascii.Error) as error:
        raise bad_value(
            "config", config[_MARK], "float32 numbers in base64", "The file is damaged."
        ) from error


def _floats(numbers: np.ndarray) -> list[float]:
    """The number of fewest digits that stands for each float32."""
    return [float(str(number)) for number in numbers]
