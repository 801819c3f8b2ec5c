"""What a file holds, read with zipfile, json and h5py alone, and checked.

A file may come from anywhere. So sizes are those that its bytes can stand for, nothing leads out of
it, and no code is in it.
"""

import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import h5py

from keras_qwrap.errors import bad_type, bad_value
from keras_qwrap.sealing import check_seal, is_archive

_MOST_TIMES = 20
_ROOM = 2**28
_MOST_NODES = 10**6
_MOST = 2**24
_COUNTS = (
    *("units", "filters", "groups", "tokens", "ngrams", "depth", "repeats", "sections"),
    *("iterations", "dim", "size", "length", "height", "width", "multiplier", "num"),
)
"""Ends of keys of sizes, besides those that begin with `num_`; other numbers are values."""

_MOST_ALONG_AXIS = 2**26
_MOST_ELEMENTS = 2**28
_SHAPES = ("shape", "shapes", "__keras_qwrap_tensor__")
"""Ends of keys of shapes, besides `args` and `kwargs` of what a wrapper is built from."""

_CODE = ("__lambda__", "TorchModuleWrapper", "TFSMLayer")
_TRUST = "The file is damaged or hostile; if you trust it, `keras.models.load_model` loads it."


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        path: the file.
        config: of the model.
        training: of its loss and metrics; the optimizer is left out.
        stored: bytes that all arrays take in the file.
        keras_version: of the Keras that wrote it.
        legacy: whether it is an HDF5 file.
        found: what was looked for in the arrays.
    """

    path: str
    config: Any
    training: Any
    stored: int
    keras_version: str | None
    legacy: bool
    found: Any


def read_contents(path: Any, look: Callable[[h5py.File], Any] = lambda file: None) -> Contents:
    """What a file holds; refused where it is no model's, damaged or hostile.

    A sealed file has the bytes that were sealed, and a `.keras` archive those of its checksums. All
    that an archive holds, and all arrays, are at most 20 times as large as the bytes that they come
    from, and 256 MiB. Archives hold plain members, HDF5 files no links and no arrays that are
    stored elsewhere.

    Args:
        path: the file.
        look: a function of the HDF5 file of arrays, once that is checked.

    Raises:
        TypeError: `path` is no path.
        OSError: the file does not exist, or is damaged.
        ValueError: it is whole, but not a model's, or hostile.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise bad_type("path", path, "a path", "Pass the name of a .keras or .h5 file.")
    path = os.fsdecode(path)
    if not os.path.isfile(path):
        raise OSError(f"path: received '{path}', expected an existing file. Check the name.")
    check_seal(path)
    if is_archive(path):
        return _read(_read_archive, path, look, "a whole .keras archive")
    if h5py.is_hdf5(path):
        return _read(_read_hdf5, path, look, "a whole HDF5 file")
    raise bad_value(
        "path",
        path,
        "a .keras archive or an HDF5 file",
        "The file is truncated or damaged, or was not saved by Keras.",
    )


def checked_contents(path: Any) -> Contents:
    """`read_contents` of a file that a model can be built from.

    Raises:
        TypeError, OSError, ValueError: as `read_contents`; and for a name that does not end as
            Keras wants it, and configs that are endless, hold code, shapes of more than 2^26
            elements along an axis or 2^28 in all or, in Keras' own objects, sizes above 2^24 and
            the bytes of the arrays. Other numbers may be as large as they like.
    """
    contents = read_contents(path)
    endings = (".h5", ".hdf5") if contents.legacy else (".keras",)
    if not contents.path.endswith(endings):
        expected = f"the ending {' or '.join(endings)}"
        raise bad_value("path", contents.path, expected, "Rename the file.")
    _check_config(contents.path, [contents.config, contents.training], contents.stored)
    return contents


def _read(
    read: Callable[[str, Callable], Contents], path: str, look: Callable, expected: str
) -> Contents:
    try:
        return read(path, look)
    except ValueError:
        raise
    except Exception as error:
        raise OSError(
            f"path: received '{path}', expected {expected}; reading it failed with "
            f"{type(error).__name__}: {str(error)[:400]}. Save the model again."
        ) from error


def check_size(path: str, what: str, size: int, source: int) -> None:
    """Refuse what is far larger than the bytes that it comes from."""
    if size > _MOST_TIMES * source + _ROOM:
        raise _hostile(
            path,
            f"{what} of {size:,} bytes that come from {source:,}",
            f"at most {_MOST_TIMES} times as many and {_ROOM:,}",
        )


def _hostile(path: str, received: str, expected: str) -> ValueError:
    return ValueError(f"path: received '{path}' with {received}, expected {expected}. {_TRUST}")


def _read_archive(path: str, look: Callable) -> Contents:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        size = sum(member.file_size for member in members)
        check_size(path, "members", size, os.path.getsize(path))
        _check_names(path, names)
        missing = sorted({"config.json", "model.weights.h5"} - set(names))
        if missing:
            raise bad_value(
                "path", path, f"a .keras archive that holds {missing}", "It was not saved by Keras."
            )
        damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"'{damaged}' in it is damaged")
        config = _parsed(path, archive.read("config.json"))
        metadata = archive.read("metadata.json") if "metadata.json" in names else "{}"
        version = _part(_parsed(path, metadata), "keras_version")
        with h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r") as file:
            stored = _check_arrays(path, file)
            found = look(file)
    training = _without(_part(config, "compile_config"), "optimizer")
    config = _without(config, "compile_config")
    return Contents(path, config, training, stored, version, legacy=False, found=found)


def _read_hdf5(path: str, look: Callable) -> Contents:
    with h5py.File(path, "r") as file:
        if "model_config" not in file.attrs:
            raise bad_value(
                "path",
                path,
                "an HDF5 file with a model's config",
                "A file of weights alone is loaded with `model.load_weights`.",
            )
        config = _parsed(path, file.attrs["model_config"])
        training = _parsed(path, file.attrs.get("training_config", "{}"))
        version = file.attrs.get("keras_version")
        stored = _check_arrays(path, file)
        found = look(file)
    training = _without(training, "optimizer_config")
    return Contents(path, config, training, stored, version, legacy=True, found=found)


def _part(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, dict) else None


def _without(config: Any, key: str) -> Any:
    if not isinstance(config, dict):
        return config
    return {name: part for name, part in config.items() if name != key}


def _check_names(path: str, names: list[str]) -> None:
    for name in names:
        parts = name.replace("\\", "/").split("/")
        if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
            raise _hostile(path, f"the member {name!r}", "members inside the archive")
    if len(set(names)) < len(names):
        raise _hostile(path, "two members of one name", "one of each")


def _parsed(path: str, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"path: received '{path}', expected a model's config as JSON in it; reading it failed "
            f"with {type(error).__name__}: {error}. The file is damaged, or was not saved by Keras."
        ) from error


def _check_arrays(path: str, file: h5py.File) -> int:
    """The bytes that all arrays take; each must be in the file, once."""
    # Nothing is done in the callback: h5py loses what is raised there.
    links: list[tuple[str, Any]] = []
    file.visititems_links(lambda name, link: links.append((name, link)))
    size = stored = 0
    seen = {h5py.h5o.get_info(file.id).addr}
    for name, link in links:
        if not isinstance(link, h5py.HardLink):
            raise _hostile(path, f"a link '{name}'", "groups and arrays")
        part = file[name]
        place = h5py.h5o.get_info(part.id).addr
        if place in seen:
            raise _hostile(path, f"a second link '{name}'", "one to each group and array")
        seen.add(place)
        if isinstance(part, h5py.Dataset):
            if part.is_virtual or part.external:
                raise _hostile(path, f"'{name}' in other files", "arrays in this one")
            size += part.nbytes
            stored += part.id.get_storage_size()
    check_size(path, "arrays", size, stored)
    return stored


def _check_config(path: str, config: Any, stored: int) -> None:
    """Refuse code, endless configs, and sizes and shapes that would fill the memory."""
    waiting: list[tuple[str, Any, bool, bool]] = [("", config, False, False)]
    seen, most = 0, max(_MOST, stored)
    while waiting:
        key, node, in_shape, of_user = waiting.pop()
        seen += 1
        if seen > _MOST_NODES:
            raise _hostile(path, "a config of more values", f"at most {_MOST_NODES:,}")
        in_shape = in_shape or key.endswith(_SHAPES)
        if isinstance(node, dict):
            _check_code(path, node)
            if "class_name" in node:
                name = str(node.get("registered_name") or node["class_name"])
                of_user = ">" in name and not name.startswith("keras_qwrap>")
            built = key == "build_config"
            for name, part in node.items():
                shaped = in_shape or (built and name in ("args", "kwargs"))
                waiting.append((str(name), part, shaped, of_user))
        elif isinstance(node, list):
            _check_shape(path, node if in_shape else [])
            waiting += [(key, part, in_shape, of_user) for part in node]
        elif isinstance(node, int) and abs(node) > most and _is_size(key) and not of_user:
            raise _hostile(path, f"{key}={node}", f"at most {most:,}")


def _is_size(key: str) -> bool:
    return key.startswith("num_") or key.endswith(_COUNTS)


def _check_shape(path: str, shape: list) -> None:
    sizes = [abs(n) for n in shape if isinstance(n, int)]
    if max(sizes, default=0) > _MOST_ALONG_AXIS or prod(map(float, sizes)) > _MOST_ELEMENTS:
        expected = f"at most {_MOST_ALONG_AXIS} elements along an axis and {_MOST_ELEMENTS} in all"
        raise _hostile(path, f"a shape {shape}"[:200], expected)


def _check_code(path: str, node: dict) -> None:
    config = node.get("config")
    marshalled = isinstance(config, dict) and config.get("function_type") == "lambda"
    if node.get("class_name") in _CODE or marshalled:
        raise ValueError(
            f"path: received '{path}' with a {node.get('class_name')}, expected layers without "
            "code in the file. Write a layer class in place of it."
        )
