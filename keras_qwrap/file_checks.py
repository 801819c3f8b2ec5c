"""What is checked of a file before a model is built from it.

A file may come from anywhere. So sizes are those that its bytes can stand for, nothing leads out of
it, and no code is in it.
"""

import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import h5py

from keras_qwrap.errors import bad_value
from keras_qwrap.sealing import check_seal
from keras_qwrap.substitution import described_model, variables_deferred

_MOST_TIMES = 20
_ROOM = 2**26
_MOST_NODES = 10**6
_CODE = ("Lambda", "__lambda__", "TorchModuleWrapper", "TFSMLayer")


@dataclass(frozen=True)
class Contents:
    """The config in a file, the bytes of its arrays, and whether it is of the legacy format."""

    path: str
    config: Any
    stored: int
    legacy: bool


def checked_contents(path: str) -> Contents:
    """What a file holds; refused where it is no model's, damaged or hostile.

    - A sealed file has the bytes that were sealed, and a `.keras` archive those of its checksums.
    - Archives and arrays are at most 20 times as large as the bytes that they come from, and
      64 MiB.
    - Archives hold plain members, HDF5 files no links and no arrays that are stored elsewhere.
    - Configs hold no code: no Lambda layer, no marshalled function.

    Raises:
        OSError: the file does not exist, or is damaged.
        ValueError: it is whole, but not a model's, or hostile.
    """
    if not os.path.isfile(path):
        raise OSError(f"path: received '{path}', expected an existing file. Check the name.")
    check_seal(path)
    if zipfile.is_zipfile(path):
        endings: tuple[str, ...] = (".keras",)
        contents = _read(_read_archive, path, "a whole .keras archive")
    elif h5py.is_hdf5(path):
        endings = (".h5", ".hdf5")
        contents = _read(_read_hdf5, path, "a whole HDF5 file")
    else:
        raise bad_value(
            "path",
            path,
            "a .keras archive or an HDF5 file",
            "The file is truncated or damaged, or was not saved by Keras.",
        )
    if not path.endswith(endings):
        raise bad_value("path", path, f"the ending {' or '.join(endings)}", "Rename the file.")
    _check_config(path, contents.config)
    return contents


def _read(read: Callable[[str], Contents], path: str, expected: str) -> Contents:
    try:
        return read(path)
    except ValueError:
        raise
    except Exception as error:
        raise OSError(
            f"path: received '{path}', expected {expected}; reading it failed with "
            f"{type(error).__name__}: {str(error)[:400]}. Save the model again."
        ) from error


def check_variables(contents: Contents, custom_objects: Mapping[str, Any] | None) -> None:
    """Refuse a config whose variables are far larger than what the file holds.

    The model is built for this without its variables. One that cannot be (it fails in any case, or
    a layer of the user's makes a variable of an array that it has) is not checked.

    Raises:
        ValueError: the variables need more than 20 times the bytes of the arrays, and 64 MiB.
    """
    config = contents.config
    if isinstance(config, dict):
        config = {key: value for key, value in config.items() if key != "compile_config"}
    try:
        with variables_deferred():
            model = described_model(config, custom_objects, contents.legacy)
    except Exception:
        return
    needed = sum(prod(v.shape) * _itemsize(v.dtype) for v in model.variables)
    _check_size(contents.path, "variables", needed, contents.stored)


def _itemsize(dtype: str) -> int:
    return max(1, int("".join(filter(str.isdecimal, dtype)) or 8) // 8)


def _check_size(path: str, what: str, size: int, source: int) -> None:
    if size > _MOST_TIMES * source + _ROOM:
        raise _hostile(
            path,
            f"{what} of {size:,} bytes that come from {source:,}",
            f"at most {_MOST_TIMES} times as many and {_ROOM:,}",
        )


def _hostile(path: str, received: str, expected: str) -> ValueError:
    return ValueError(
        f"path: received '{path}' with {received}, expected {expected}. The file is damaged or "
        "hostile; do not load it."
    )


def _read_archive(path: str) -> Contents:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        size = sum(member.file_size for member in members)
        _check_size(path, "members", size, os.path.getsize(path))
        _check_names(path, names)
        missing = sorted({"config.json", "model.weights.h5"} - set(names))
        if missing:
            raise bad_value(
                "path", path, f"a .keras archive that holds {missing}", "It was not saved by Keras."
            )
        damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"'{damaged}' in it is damaged")
        with h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r") as file:
            stored = _check_arrays(path, file)
        return Contents(path, _parsed(path, archive.read("config.json")), stored, legacy=False)


def _check_names(path: str, names: list[str]) -> None:
    for name in names:
        parts = name.replace("\\", "/").split("/")
        if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
            raise _hostile(path, f"the member {name!r}", "members inside the archive")
    if len(set(names)) < len(names):
        raise _hostile(path, "two members of one name", "one of each")


def _read_hdf5(path: str) -> Contents:
    with h5py.File(path, "r") as file:
        if "model_config" not in file.attrs:
            raise bad_value(
                "path",
                path,
                "an HDF5 file with a model's config",
                "A file of weights alone is loaded with `model.load_weights`.",
            )
        stored = _check_arrays(path, file)
        return Contents(path, _parsed(path, file.attrs["model_config"]), stored, legacy=True)


def _parsed(path: str, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"path: received '{path}', expected a model's config as JSON in it; reading it failed "
            f"with {type(error).__name__}: {error}. The file is damaged, or was not saved by Keras."
        ) from error


def _check_arrays(path: str, file: h5py.File) -> int:
    """The bytes of all arrays, which must be in the file."""
    total = 0

    def visit(name: str, link: Any) -> None:
        nonlocal total
        if not isinstance(link, h5py.HardLink):
            raise _hostile(path, f"a link '{name}'", "groups and arrays")
        part = file[name]
        if not isinstance(part, h5py.Dataset):
            return
        if part.is_virtual or part.external:
            raise _hostile(path, f"'{name}' in other files", "arrays in this one")
        _check_size(path, f"'{name}'", part.nbytes, part.id.get_storage_size())
        total += part.nbytes

    file.visititems_links(visit)
    return total


def _check_config(path: str, config: Any) -> None:
    """Refuse code, and configs of endless size."""
    waiting, seen = [config], 0
    while waiting:
        node = waiting.pop()
        seen += 1
        if seen > _MOST_NODES:
            raise _hostile(path, "a config of more values", f"at most {_MOST_NODES:,}")
        if isinstance(node, dict):
            name = node.get("class_name")
            if isinstance(name, str) and name.rpartition(">")[2] in _CODE:
                raise ValueError(
                    f"path: received '{path}' with a {name}, expected layers without code in the "
                    "file. Write a layer class in place of it. If you trust the file, Keras loads "
                    "it with `safe_mode=False`."
                )
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node
