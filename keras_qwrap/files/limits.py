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
import numpy as np

from keras_qwrap.files.sealing import is_archive, is_hdf5, read_checked
from keras_qwrap.numerics.checks import bad_type, bad_value

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
_ARRAYS, _CONFIG, _METADATA = "model.weights.h5", "config.json", "metadata.json"


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        path: the file.
        data: all its bytes.
        hdf5: the bytes of the HDF5 file that holds the arrays: a part of the archive, or all.
        arrays: by path in that file; read-only.
        text: the config of the model, as JSON; in a `.keras` archive that of its training too.
        config: of the model.
        training: of optimizer, loss and metrics.
        stored: bytes that all arrays take in the file.
        keras_version: of the Keras that wrote it.
        digest: that in the seal, which was checked; None in a file without one.
        legacy: whether it is an HDF5 file.
        found: what was looked for in the arrays.
    """

    path: str
    data: bytes
    hdf5: bytes
    arrays: dict[str, Any]
    text: str | bytes
    config: Any
    training: Any
    stored: int
    keras_version: str | None
    digest: str | None
    legacy: bool
    found: Any

    @property
    def losses_and_metrics(self) -> Any:
        """`training` without the optimizer."""
        return _without(self.training, "optimizer", "optimizer_config")


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
    data, digest = read_checked(path)
    if is_archive(data):
        return _read(_read_archive, path, data, digest, look, "a whole .keras archive")
    if is_hdf5(data):
        return _read(_read_hdf5, path, data, digest, look, "a whole HDF5 file")
    raise bad_value(
        "path",
        path,
        "a .keras archive or an HDF5 file",
        "The file is truncated or damaged, or was not saved by Keras.",
    )


def checked_contents(path: Any, safe_mode: bool = True) -> Contents:
    """`read_contents` of a file that a model can be built from.

    Args:
        path: the file.
        safe_mode: refuse code in the file.

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
    configs = [contents.config, contents.losses_and_metrics]
    _check_config(contents.path, configs, contents.stored, safe_mode)
    return contents


def _read(
    read: Callable, path: str, data: bytes, digest: str | None, look: Callable, expected: str
) -> Contents:
    try:
        return read(path, data, digest, look)
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


def _read_archive(path: str, data: bytes, digest: str | None, look: Callable) -> Contents:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        check_size(path, "members", sum(member.file_size for member in members), len(data))
        _check_names(path, names)
        missing = sorted({_CONFIG, _ARRAYS} - set(names))
        if missing:
            raise bad_value(
                "path", path, f"a .keras archive that holds {missing}", "It was not saved by Keras."
            )
        kept = {name: _member(archive, name) for name in (_CONFIG, _METADATA, _ARRAYS)}
        for name in set(names) - set(kept):
            _member(archive, name)
    config = _parsed(path, kept[_CONFIG])
    with h5py.File(io.BytesIO(kept[_ARRAYS]), "r") as file:
        stored, arrays = _checked_arrays(path, kept[_ARRAYS], file)
        found = look(file)
    return Contents(
        path,
        data,
        hdf5=kept[_ARRAYS],
        arrays=arrays,
        text=kept[_CONFIG],
        config=_without(config, "compile_config"),
        training=_part(config, "compile_config"),
        stored=stored,
        keras_version=_part(_parsed(path, kept[_METADATA]), "keras_version"),
        digest=digest,
        legacy=False,
        found=found,
    )


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """The bytes of a member, which have its checksum; an empty object where there is none."""
    try:
        return archive.read(name)
    except KeyError:
        return b"{}"
    except zipfile.BadZipFile as error:
        raise zipfile.BadZipFile(f"'{name}' in it is damaged") from error


def _read_hdf5(path: str, data: bytes, digest: str | None, look: Callable) -> Contents:
    with h5py.File(io.BytesIO(data), "r") as file:
        if "model_config" not in file.attrs:
            raise bad_value(
                "path",
                path,
                "an HDF5 file with a model's config",
                "A file of weights alone is loaded with `model.load_weights`.",
            )
        text = file.attrs["model_config"]
        stored, arrays = _checked_arrays(path, data, file)
        return Contents(
            path,
            data,
            hdf5=data,
            arrays=arrays,
            text=text,
            config=_parsed(path, text),
            training=_parsed(path, file.attrs.get("training_config", "null")),
            stored=stored,
            keras_version=file.attrs.get("keras_version"),
            digest=digest,
            legacy=True,
            found=look(file),
        )


def _part(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, dict) else None


def _without(config: Any, *keys: str) -> Any:
    if not isinstance(config, dict):
        return config
    return {name: part for name, part in config.items() if name not in keys}


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


def _checked_arrays(path: str, data: bytes, file: h5py.File) -> tuple[int, dict[str, Any]]:
    """The bytes that all arrays take, and the arrays; each must be in the file, once."""
    size = stored = 0
    found: dict[str, h5py.h5d.DatasetID] = {}
    seen = {h5py.h5o.get_info(file.id).addr}
    root = h5py.h5g.open(file.id, b"/")
    waiting = [("", root, iter(root))]
    while waiting:
        outer, group, links = waiting[-1]
        link = next(links, None)
        if link is None:
            waiting.pop()
            continue
        name = f"{outer}{link.decode(errors='replace')}"
        if group.links.get_info(link).type != h5py.h5l.TYPE_HARD:
            raise _hostile(path, f"a link '{name}'", "groups and arrays")
        part = h5py.h5o.open(group, link)
        place = h5py.h5o.get_info(part).addr
        if place in seen:
            raise _hostile(path, f"a second link '{name}'", "one to each group and array")
        seen.add(place)
        if isinstance(part, h5py.h5g.GroupID):
            waiting.append((f"{name}/", part, iter(part)))
        elif isinstance(part, h5py.h5d.DatasetID):
            layout = part.get_create_plist()
            if layout.get_layout() == h5py.h5d.VIRTUAL or layout.get_external_count():
                raise _hostile(path, f"'{name}' in other files", "arrays in this one")
            size += prod(part.shape or ()) * part.dtype.itemsize
            stored += part.get_storage_size()
            found[name] = part
    check_size(path, "arrays", size, stored)
    return stored, {name: _array(part, data) for name, part in found.items()}


def _array(part: h5py.h5d.DatasetID, data: bytes) -> Any:
    """An array of an HDF5 file, which is not copied where it lies there as it does in memory."""
    dtype, size = part.dtype, part.get_storage_size()
    if size and size == prod(part.shape) * dtype.itemsize and dtype.kind in "biuf":
        offset = part.get_offset()
        if offset is not None:  # It is neither compressed nor in chunks.
            return np.frombuffer(data, dtype, prod(part.shape), offset).reshape(part.shape)
    dataset = h5py.Dataset(part)
    # HDF5 knows no bfloat16: Keras says by an attribute what such bytes are.
    named = dataset.attrs.get("dtype") if dtype.kind == "V" else None
    return dataset[()] if named is None else np.array(dataset, dtype=named)


def _check_config(path: str, config: Any, stored: int, safe_mode: bool) -> None:
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
            if safe_mode:
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
            "code in the file. Write a layer class in place of it; or load it with safe_mode=False "
            "if it is yours, which runs the code."
        )
