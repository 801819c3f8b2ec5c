"""Loading quantized models, and the classes that a saved file may name."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from math import prod
from typing import Any

import keras
import numpy as np

from keras_qwrap.files.containers import (
    IN_NO_LAYER,
    OF_OPTIMIZER,
    Archive,
    Legacy,
    write_whole,
)
from keras_qwrap.files.legacy import refuse_unloadable
from keras_qwrap.files.limits import Contents, check_size, checked_contents
from keras_qwrap.layers.building import packed_in
from keras_qwrap.layers.keras_internals import (
    compile_as_described,
    described_model,
    load_state,
    variables_watched,
)
from keras_qwrap.layers.owner import quantizers_in
from keras_qwrap.layers.packed import (
    KEEP_CODES,
    load_legacy_weights,
    packed_arrays,
)
from keras_qwrap.numerics.channels import check_bool
from keras_qwrap.numerics.checks import bad_type, bad_value, innermost, no_model, warn
from keras_qwrap.quantizers.base import BaseKerasInferableQuantizer
from keras_qwrap.quantizers.config import PACKAGE

_OF_WEIGHTS = tuple(f".weights{ending}" for ending in Legacy.endings)


def custom_objects() -> dict[str, type]:
    """Every serializable class of this package by its registered name.

    Importing the package registers them, so that plain `keras.models.load_model` finds them; the
    dictionary is for code that passes `custom_objects` explicitly.

    Example:

    ```python
    import keras_qwrap as qi

    print(qi.custom_objects()["keras_qwrap>KerasQuantizationWrapper"].__name__)
    ```
    """
    registered = keras.saving.get_custom_objects().items()
    # Those of `keras_qwrap.testing` are for tests alone.
    own = (f"{PACKAGE}>", f"{PACKAGE}>_")
    return {n: cls for n, cls in registered if n.startswith(own[0]) and not n.startswith(own[1])}


def save_quantized_model(model: keras.Model, path: str | os.PathLike) -> None:
    """Save a model, whole or not at all, with a digest.

    As `model.save(path)`, but into a file beside `path` that then takes its place: when the
    process is killed or the disk is full, `path` leads to the old file or to the new one, never to
    a part. The SHA-256 digest of all bytes is recorded in the file, where Keras and other readers
    skip it, and `keras_load_quantized_model` checks it before it opens the file. The file is also
    smaller, by 2 KB or more for each layer.

    Args:
        model: a Keras model, quantized or not.
        path: where to; the name ends with `.keras`, or with `.h5` or `.hdf5` for a model of layers
            alone. An existing file is replaced.

    Raises:
        TypeError: `model` is no model, or `path` no path.
        ValueError: the name ends otherwise; Keras cannot save the model in that format; or nothing
            could load it from HDF5: models without a graph, such as a `QuantizedModel`, functions
            between layers, bfloat16 variables, `Attention` with the score mode "dot".
        OSError: the file cannot be written; what was there is left as it was.

    Example:

    ```python
    import os, tempfile
    import keras
    import keras_qwrap as qi

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    converted = qi.convert_to_inferable(qi.quantize_model(model, "w8"))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        qi.save_quantized_model(converted, path)
        print(qi.keras_load_quantized_model(path).name == model.name)  # True
    ```
    """
    if not isinstance(model, keras.Model):
        raise no_model(model)
    if not isinstance(path, (str, os.PathLike)):
        raise bad_type("path", path, "a path", "Pass the name of a .keras or .h5 file.")
    path = os.fsdecode(path)
    if path.lower().endswith(_OF_WEIGHTS):
        raise bad_value(
            "path",
            path,
            "the ending .keras or .h5, for a whole model",
            "`model.save_weights(path)` saves weights alone; or leave `.weights` out.",
        )
    if not path.endswith((*Archive.endings, *Legacy.endings)):
        fix = "Give it another ending: .keras, or .h5 for models of layers alone."
        raise bad_value("path", path, "the ending .keras or .h5", fix)
    if path.endswith(Legacy.endings):
        refuse_unloadable(model, set(packed_in(model)))
    # Into an archive, layers write packed codes themselves.
    packed = packed_arrays(model, packed_in(model)) if path.endswith(Legacy.endings) else {}
    write_whole(path, model.save, {name: weight.packed for name, weight in packed.items()})


def keras_load_quantized_model(
    path: str | os.PathLike,
    custom_objects: Mapping[str, Any] | None = None,
    compile: bool = True,
    keep_codes: bool = False,
    safe_mode: bool = True,
) -> keras.Model:
    """Load a `.keras` or `.h5` file as `keras.models.load_model` does.

    In a file of `save_quantized_model` any damage is recognized, before it is opened. Of what plain
    `model.save` wrote, a damaged `.keras` archive is recognized too; an `.h5` file then has no
    checksum: a damage that leaves it readable goes unnoticed, and some crash the HDF5 library.
    Before anything is built, sizes, links and configs are checked, so that a hostile file neither
    fills the memory nor leads elsewhere, and holds no code.

    Keras restores no compiled `.h5` whose loss or metric is a string such as "mse" (pass
    `compile=False`). Prefer `.keras`.

    Args:
        path: the file.
        custom_objects: classes and functions of your own that are not registered, by name.
        compile: restore the optimizer, loss and metrics too.
        keep_codes: let converted layers hold integer codes in memory, of one or two bytes each, and
            decode them at every call: smaller, slower to load and to run, with the same outputs.
            What is made of the model (a clone, a conversion, an unwrapped model) holds floats.
        safe_mode: refuse files with code in them, such as a `Lambda` around a Python function. With
            False that code is run: only for files that are yours.

    Raises:
        TypeError: `path` is no path, or `keep_codes` or `safe_mode` no bool.
        OSError: the file cannot be read: it does not exist, is truncated or is damaged.
        ValueError: it can be read, but holds no model that this package and Keras can rebuild.

    Example:

    ```python
    import os, tempfile
    import keras
    import keras_qwrap as qi

    quantizer = qi.WeightsSymmetricInferableQuantizer(8, 1.0, per_channel=False)
    dense = qi.KerasQuantizationWrapper(keras.layers.Dense(2), {"kernel": quantizer})
    model = keras.Sequential([keras.Input((3,)), dense])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.keras")
        model.save(path)
        print(qi.keras_load_quantized_model(path).name == model.name)  # True
    ```
    """
    check_bool("keep_codes", keep_codes)
    contents = checked_contents(path, check_bool("safe_mode", safe_mode))
    allowance = Allowance(contents)
    token = KEEP_CODES.set(keep_codes)
    try:
        legacy = contents.container.legacy
        model = build_model(contents.text, legacy, allowance, custom_objects, safe_mode)
        if compile:
            _count_metrics(contents, allowance, custom_objects)
        _load_weights(model, contents, custom_objects, safe_mode, compile)
        _check_ranges(model)
        return model
    except Exception as error:
        allowance.check()
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(_why_not_loaded(contents, error)) from error
    finally:
        KEEP_CODES.reset(token)


def _load_weights(
    model: keras.Model,
    contents: Contents,
    custom_objects: Mapping[str, Any] | None,
    safe_mode: bool,
    compile: bool,
) -> None:
    """Compile a model if its file says so, and give it its weights and the optimizer's."""
    training = contents.training if compile else None
    file, arrays = contents.container, contents.arrays
    if isinstance(file, Archive):
        if training:
            compile_as_described(model, training, custom_objects, False, safe_mode)
        load_state(model, arrays, file.zip)
    elif isinstance(file, Legacy):
        of_model = file.listed(IN_NO_LAYER, arrays)
        load_legacy_weights(model, file.weights(arrays), of_model, packed_in(model))
        if training:
            compile_as_described(model, training, custom_objects, True, safe_mode)
            _load_legacy_optimizer(model, file.listed(OF_OPTIMIZER, arrays))


def _load_legacy_optimizer(model: keras.Model, state: list[np.ndarray] | None) -> None:
    if state is None:
        return
    model.optimizer.build(model.trainable_variables)
    try:
        model.optimizer.set_weights(state)
    except ValueError as error:
        warn(f"The state of the optimizer in the file does not fit and is left out: {error}")


def _check_ranges(model: keras.Model) -> None:
    """Refuse ranges of inferable quantizers, which a file holds twice, where it says two things."""
    for owner, role, quantizer in quantizers_in(model):
        if not isinstance(quantizer, BaseKerasInferableQuantizer):
            continue
        for name in quantizer.changed_ranges():
            raise bad_value(
                f"layer '{owner.name}', '{role}'",
                f"a variable with another {name} than the quantizer's config",
                "the same in both",
                "The file was changed; save the model again.",
            )


class Allowance:
    """Refuses variables that are far larger in all than what a file holds.

    Args:
        contents: of the file.
    """

    def __init__(self, contents: Contents) -> None:
        self._contents, self._needed = contents, 0

    def take(self, variable: keras.Variable) -> None:
        """Count a variable, of which only shape and dtype are asked.

        Raises:
            ValueError: as `check`.
        """
        self._needed += prod(variable.shape) * _itemsize(variable.dtype)
        self.check()

    def check(self) -> None:
        """Refuse the file if what was counted so far is too much.

        Raises:
            ValueError: it is.
        """
        check_size(self._contents.path, "variables", self._needed, self._contents.stored)


def build_model(
    text: str | bytes,
    legacy: bool,
    allowance: Allowance,
    custom_objects: Mapping[str, Any] | None = None,
    safe_mode: bool = True,
) -> keras.Model:
    """The model that the config of a file describes, without its weights, and not compiled.

    Its variables are counted before they take memory. What Keras cannot build while they are (a
    layer of a user's makes a variable of an array) is built without.
    """
    described = partial(described_model, text, custom_objects, legacy, safe_mode)
    try:
        with variables_watched(allowance.take):
            return described()
    except Exception:
        allowance.check()
        return described()


def _count_metrics(
    contents: Contents, allowance: Allowance, custom_objects: Mapping[str, Any] | None
) -> None:
    """Count the variables of metrics; optimizers have a few for each of the model's."""
    for metric in _described(contents.losses_and_metrics):
        with suppress(Exception), variables_watched(allowance.take):
            keras.metrics.deserialize(metric, custom_objects)
    allowance.check()


def _described(config: Any) -> Iterator[dict]:
    """The outermost objects that a config describes."""
    if isinstance(config, dict) and "class_name" in config:
        yield config
    elif isinstance(config, (dict, list)):
        for part in config.values() if isinstance(config, dict) else config:
            yield from _described(part)


def _itemsize(dtype: str) -> int:
    return max(1, int("".join(filter(str.isdecimal, dtype)) or 8) // 8)


_UNKNOWN = re.compile(r"(?:Could not locate (?:class|function)|Unknown [a-z_ ]+:) '([^']+)'")
"""How Keras says that it does not know a name."""


def _why_not_loaded(contents: Contents, error: BaseException) -> str:
    """What the file lacks, first of all; and what to do."""
    error = innermost(error)
    line = " ".join(str(error).split())
    without = "compile=False leaves out loss, metrics and optimizer."
    unknown = _UNKNOWN.search(line)
    if unknown:
        known_as = unknown[1].rpartition(">")[2]
        # Of a registered class the first words give the name alone, the config at the end all.
        registered = re.search(f"'registered_name': '([^']*>{re.escape(known_as)})'", line)
        name = (registered or unknown)[1]
        rest = " Functions between layers, and models without a graph, need a .keras file."
        return (
            f"path: received '{contents.path}', which names {name!r}, expected classes and "
            f"functions that Keras knows here. Pass custom_objects={{{name!r}: {known_as}}}, or "
            f"import the module that registers it; {without}"
            f"{rest if contents.container.legacy else ''}"
        )
    reason = f"{type(error).__name__}: {line if len(line) <= 400 else f'{line[:397]}...'}"
    damaged = "" if contents.digest else "is damaged, "
    return (
        f"path: received '{contents.path}', of which no model can be made ({reason}), expected a "
        f"model that Keras saved and can rebuild here. The file {damaged}was written by another "
        f"version, or is of classes that have changed since; {without}"
    )
