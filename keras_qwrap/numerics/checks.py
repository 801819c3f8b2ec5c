"""How this package refuses and warns: what was received, what was expected, what to do; where."""

import difflib
import os
import re
import reprlib
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class Told(str):
    """What was received, in words: it stands in a message as it is, not as a string in quotes."""


def _describe(value: Any) -> str:
    if isinstance(value, Told):
        return str(value)
    text = repr(value)
    if len(text) > 120:
        text = f"{text[:117]}..."
    return text if isinstance(value, str) else f"{text} (of type {type(value).__name__})"


_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 4
_SHORT.maxother = _SHORT.maxstring = 60


def brief(kind: str, *values: Any, **named: Any) -> str:
    """The repr of an object of this kind with these arguments; long values are cut."""
    parts = [*map(_SHORT.repr, values), *(f"{k}={_SHORT.repr(v)}" for k, v in named.items())]
    return f"{kind}({', '.join(parts)})"


def bad_value(name: str, received: Any, expected: str, fix: str) -> ValueError:
    """A `ValueError` for argument `name`."""
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


def no_model(received: Any, expected: str = "a Keras model") -> TypeError:
    """A `TypeError` for an argument `model` that is something else, or a model of another kind."""
    fix = "Wrap the layer in a model first: keras.Sequential([keras.Input(...), layer])."
    if isinstance(received, (str, os.PathLike)):
        path = os.fspath(received)
        fix = f"Load the file first, with keras_qwrap.keras_load_quantized_model({path!r})."
    elif isinstance(received, type):
        fix = f"Make an object of it: {received.__name__}(...)."
    return bad_type("model", received, expected, fix)


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Put `where`, which names a part of a model, in front of what is refused in here."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{where}: {error}") from error


_INSIDE = frozenset({"keras_qwrap", "keras", "tensorflow", "jax", "torch", "contextlib"})
"""Packages whose lines lie between a line of the user's and what it leads to."""


def warn(message: str) -> None:
    """Warn at the line of the user's that led here: the nearest one outside this package and Keras.

    A fixed `stacklevel` would point into the package wherever it is called from another place.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame.f_globals) in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def _package(names: dict[str, Any]) -> str:
    return str(names.get("__name__")).partition(".")[0]


_MEANT = {
    "uniform": "affine asymmetric asymmetrical asym zeropoint",
    "symmetric": "sym symmetrical signed absmax",
    "poweroftwo": "pot po2 pow2 powerof2 shift log2",
    "minmax": "min max minimum maximum minimummaximum range absmax",
    "movingaverage": "ema average mean movingaverageminmax exponentialmovingaverage running",
    "mse": "mean meansquarederror squarederror leastsquares l2 histogram",
    "percentile": "quantile clip",
    "entropy": "kl kld kldivergence relativeentropy tensorrt",
    "weight": "own dynamic live",
    "w8a8": "8 8bit int8 uint8 qint8 fp8 float8 8x8 a8w8 int8int8 static ptq qat default",
    "w8": "8 8bit int8 dynamic weightonly",
    "w4a8": "4 4bit int4 uint4 a8w4",
    "w4": "4 4bit int4 uint4 weightonly",
    "w2": "2 2bit int2 ternary",
    "w8a16": "16x8 a16w8 int16",
    "w16a16": "16 16bit 16x16 int16 fp16 float16 half bf16 bfloat16 fp32 float32",
    "w8a8pot": "pot po2 poweroftwo",
    "numbits": "bits nbits bitwidth precision weightsnbits activationnbits",
    "perchannel": "pertensor granularity channelaxis axis weightsperchannelthreshold",
    "method": "scheme mode quantizationmethod",
    "range": "calibration calibrationmethod observer rangemethod threshold",
}
"""What is meant here <- words for it elsewhere; in small letters and digits alone."""


def nearest(wanted: str, names: Iterable[str]) -> str:
    """Those of the names that may be meant by `wanted`, for an error message."""
    names = sorted(set(names))
    word = _plain(wanted)
    meant = [here for here, words in _MEANT.items() if word in words.split()]
    near = [name for name in names if word and _plain(name) == word]
    near = near or [name for here in meant for name in names if _plain(name) == here]
    near = near or difflib.get_close_matches(wanted, names) or names[:8]
    return ", ".join(map(repr, near)) or "none"


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())
