"""The two formats in which Keras saves a model, behind one interface, and a digest in both.

A file is written whole or not at all, and sealed: it holds the SHA-256 digest of its other bytes,
which is checked before anything reads them. In a `.keras` archive the digest is the comment of the
archive, at its end; in an HDF5 file it is in the user block, 512 bytes at its start. Both are parts
of these formats that other readers skip.

This module imports no other of the package, so that it runs without Keras.
"""

import hashlib
import io
import json
import os
import re
import shutil
import struct
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import count, takewhile
from math import prod
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5f, h5fd, h5g, h5p

_TITLE = b"keras_qwrap sha256 "
SEAL_SIZE = len(_TITLE) + 64 + 1
_BLOCK_SIZE = 512
_HDF5 = b"\x89HDF\r\n\x1a\n"
_ARCHIVE = b"PK"
_ARCHIVE_END = b"PK\5\6"
_END_RECORD = struct.Struct("<4s4H2LH")
_LONGEST_COMMENT = 2**16
_TRACE_SIZE = 10

_CONFIG, _METADATA, _ARRAYS = "config.json", "metadata.json", "model.weights.h5"
_WEIGHTS = "model_weights"
IN_NO_LAYER, OF_OPTIMIZER = f"{_WEIGHTS}/top_level_model_weights", "optimizer_weights"
"""Groups of legacy files beside those of layers."""

Chain = tuple[str, ...]
"""The names of the layers that something is in, outermost first."""

Arrays = Mapping[str, np.ndarray]
"""The arrays of a file by their paths in its HDF5 file."""

Makers = Mapping[str, Callable[[], np.ndarray]]
"""What makes arrays, by their paths in an HDF5 file."""


@dataclass(frozen=True)
class Description:
    """What a file says of its model.

    Attributes:
        text: the config of the model, as JSON; in a `.keras` archive that of its training too.
        config: of the model.
        training: of optimizer, loss and metrics.
        keras_version: of the Keras that wrote it.
    """

    text: str | bytes
    config: Any
    training: Any
    keras_version: str | None


class Container(ABC):
    """The bytes of a file of one of the formats; all is read when it is asked for.

    Attributes:
        legacy: whether it is an HDF5 file.
        title: what the file should be.
        endings: of its name.
        data: all its bytes.
    """

    legacy: bool
    title: str
    endings: tuple[str, ...]

    def __init__(self, data: bytes) -> None:
        self.data = data

    @staticmethod
    @abstractmethod
    def holds(data: bytes) -> bool:
        """Whether a file with these bytes is of this format."""

    @staticmethod
    @abstractmethod
    def rewritten(source: str, replaced: Makers) -> io.BytesIO:
        """The file `source` in fewer bytes, with other arrays where some are made, and with room
        for a seal.
        """

    @staticmethod
    @abstractmethod
    def seal_place(size: int) -> int:
        """Where the seal is in a file of so many bytes."""

    def members(self) -> list[tuple[str, int]]:
        """Names and sizes of the files in it."""
        return []

    @abstractmethod
    def lacks(self) -> tuple[str, str] | None:
        """What a file with a model would be, and what to do, if this is none."""

    def check(self) -> None:
        """Compare all that has a checksum with it.

        Raises:
            zipfile.BadZipFile: it has another one.
        """
        return

    @abstractmethod
    def description(self) -> Description:
        """What the file says of its model.

        Raises:
            TypeError, ValueError, RecursionError: that is no JSON.
        """

    @abstractmethod
    def hdf5(self) -> bytes:
        """The bytes of the HDF5 file that holds the arrays."""

    @abstractmethod
    def layers_around(self, paths: Iterable[str]) -> dict[str, Chain]:
        """The layers that each of these arrays is in."""


class Archive(Container):
    """A `.keras` archive."""

    legacy, title, endings = False, "a whole .keras archive", (".keras",)

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.zip = zipfile.ZipFile(io.BytesIO(data))
        self._read: dict[str, bytes] = {}

    @staticmethod
    def holds(data: bytes) -> bool:
        """HDF5 files may hold all marks of an archive but this one."""
        return data.startswith(_ARCHIVE)

    @staticmethod
    def rewritten(source: str, replaced: Makers) -> io.BytesIO:
        made = io.BytesIO()
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(made, "w") as new:
            for member in old.infolist():
                content: Any = old.read(member)
                if member.filename == _ARRAYS:
                    content = _tight(io.BytesIO(content), {}, 0).getbuffer()
                new.writestr(member, content)
            new.comment = bytes(SEAL_SIZE)
        return made

    @staticmethod
    def seal_place(size: int) -> int:
        return max(size - SEAL_SIZE, 0)

    def members(self) -> list[tuple[str, int]]:
        return [(member.filename, member.file_size) for member in self.zip.infolist()]

    def lacks(self) -> tuple[str, str] | None:
        missing = sorted({_CONFIG, _ARRAYS} - set(self.zip.namelist()))
        if not missing:
            return None
        return f"a .keras archive that holds {missing}", "It was not saved by Keras."

    def check(self) -> None:
        for name in self.zip.namelist():
            content = self._member(name)
            if name in (_CONFIG, _METADATA, _ARRAYS):
                self._read[name] = content

    def _member(self, name: str) -> bytes:
        """The bytes of a member, which have its checksum."""
        if name in self._read:
            return self._read[name]
        try:
            return self.zip.read(name)
        except zipfile.BadZipFile as error:
            raise zipfile.BadZipFile(f"'{name}' in it is damaged") from error

    def description(self) -> Description:
        text, metadata = self._member(_CONFIG), {}
        with suppress(KeyError):
            metadata = json.loads(self._member(_METADATA))
        found = json.loads(text)
        config, training = found, None
        if isinstance(found, dict):
            config = {key: part for key, part in found.items() if key != "compile_config"}
            training = found.get("compile_config")
        version = metadata.get("keras_version") if isinstance(metadata, dict) else None
        return Description(text, config, training, version)

    def hdf5(self) -> bytes:
        return self._member(_ARRAYS)

    def layers_around(self, paths: Iterable[str]) -> dict[str, Chain]:
        with h5py.File(io.BytesIO(self.hdf5()), "r") as file:

            @cache
            def around(path: str) -> Chain:
                outer = path.rpartition("/")[0]
                if not outer:
                    return ()
                own = f"{outer}/vars"
                name = file[own].attrs.get("name") if own in file else None
                return (*around(outer), str(name)) if name else around(outer)

            return {path: around(path) for path in paths}


class Legacy(Container):
    """An HDF5 file, as Keras writes it where the name ends with `.h5`."""

    legacy, title, endings = True, "a whole HDF5 file", (".h5", ".hdf5")

    @staticmethod
    def holds(data: bytes) -> bool:
        return any(data.startswith(_HDF5, place) for place in (0, *_places_of_hdf5(len(data))))

    @staticmethod
    def rewritten(source: str, replaced: Makers) -> io.BytesIO:
        return _tight(source, replaced, _BLOCK_SIZE)

    @staticmethod
    def seal_place(size: int) -> int:
        return 0

    def lacks(self) -> tuple[str, str] | None:
        with self._file() as file:
            if "model_config" in file.attrs:
                return None
        return (
            "an HDF5 file with a model's config",
            "A file of weights alone is loaded with `model.load_weights`.",
        )

    def description(self) -> Description:
        with self._file() as file:
            attributes = file.attrs
            text = attributes["model_config"]
            training = json.loads(attributes.get("training_config", "null"))
            return Description(text, json.loads(text), training, attributes.get("keras_version"))

    def hdf5(self) -> bytes:
        return self.data

    def layers_around(self, paths: Iterable[str]) -> dict[str, Chain]:
        """The outermost layer, and what the name of the variable says of those inside."""
        parts = {path: path.split("/") for path in paths}
        return {
            path: tuple(names[1:-1]) if names[0] == _WEIGHTS else ()
            for path, names in parts.items()
        }

    def weights(self, arrays: Arrays) -> dict[str, list[np.ndarray]]:
        """The weights of each layer that has some, as layers and weights are ordered."""
        with self._file() as file:
            names = _names(file[_WEIGHTS], "layer_names")
            listed = {name: _listed(file, f"{_WEIGHTS}/{name}", arrays) for name in names}
        return {name: found for name, found in listed.items() if found}

    def listed(self, group: str, arrays: Arrays) -> list[np.ndarray] | None:
        """The arrays of a group in order; None if the file has no such group."""
        with self._file() as file:
            return _listed(file, group, arrays)

    def _file(self) -> h5py.File:
        return h5py.File(io.BytesIO(self.data), "r")


FORMATS: tuple[type[Container], ...] = (Archive, Legacy)


def _listed(file: h5py.File, group: str, arrays: Arrays) -> list[np.ndarray] | None:
    names = _names(file[group], "weight_names") if group in file else None
    return None if names is None else [arrays[f"{group}/{name}"] for name in names]


def _names(group: h5py.Group, key: str) -> list[str]:
    """A list of names; Keras cuts long ones into several."""
    cut = takewhile(group.attrs.__contains__, (f"{key}{i}" for i in count()))
    keys = [key] if key in group.attrs else list(cut)
    names = [name for each in keys for name in group.attrs[each]]
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def array_of(part: h5d.DatasetID, data: bytes) -> np.ndarray:
    """An array of an HDF5 file, which is not copied where it lies there as it does in memory."""
    dtype, size = part.dtype, part.get_storage_size()
    if size and size == prod(part.shape) * dtype.itemsize and dtype.kind in "biuf":
        offset = part.get_offset()
        if offset is not None:  # It is neither compressed nor in chunks.
            return np.frombuffer(data, dtype, prod(part.shape), offset).reshape(part.shape)
    dataset = h5py.Dataset(part)
    # HDF5 knows no bfloat16: Keras says by an attribute what such bytes are.
    named = dataset.attrs.get("dtype") if dtype.kind == "V" else None
    return np.asarray(dataset[()]) if named is None else np.array(dataset, dtype=named)


def write_whole(path: str, write: Callable[[str], object], replaced: Makers | None = None) -> None:
    """Let `write(name)` write a file; make it smaller, seal it, and put it where `path` says.

    `name` is beside the file that `path` leads to, and ends as it does. When this process is killed
    or the disk is full, `path` leads to the old file or to the new one, whole; a hidden file may be
    left beside it.

    Args:
        path: where to.
        write: writes an archive or an HDF5 file.
        replaced: makes arrays that take the place of those of an HDF5 file.

    Raises:
        OSError: the file cannot be written; `path` is left as it is.
    """
    path = os.path.realpath(path)
    folder = os.path.dirname(path)
    if os.path.isdir(path) or not os.path.isdir(folder):
        raise OSError(
            f"path: received '{path}', expected the name of a file in a folder that exists. Make "
            "the folder first, or choose another name."
        )
    with tempfile.TemporaryDirectory(prefix=".saving.", dir=folder) as scratch:
        loose = os.path.join(scratch, f"loose{os.path.splitext(path)[1]}")
        write(loose)
        with open(loose, "rb") as file:
            kind = Archive if Archive.holds(file.read(len(_ARCHIVE))) else Legacy
        whole = kind.rewritten(loose, replaced or {}).getbuffer()
        os.remove(loose)
        seal(whole, kind.seal_place(len(whole)))
        temporary = os.path.join(scratch, "whole")
        with open(temporary, "wb") as file:
            file.write(whole)
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(path):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _tight(source: str | io.BytesIO, replaced: Makers, block: int) -> io.BytesIO:
    """The same arrays and attributes in fewer bytes, behind a user block of `block` bytes.

    Keras lets HDF5 write groups that its first release reads too, of 1 KB each, two or more for
    every layer: beside weights of 2 bits that is a tenth of a file. HDF5 1.8 and later have smaller
    ones. Without times in them the same arrays also make the same bytes.
    """
    made = io.BytesIO()
    creation, access = h5p.create(h5p.FILE_CREATE), h5p.create(h5p.FILE_ACCESS)
    creation.set_userblock(block)
    creation.set_obj_track_times(False)
    access.set_fileobj_driver(h5fd.fileobj_driver, made)
    access.set_libver_bounds(h5f.LIBVER_V18, h5f.LIBVER_LATEST)
    target = h5f.create(repr(made).encode(), h5f.ACC_TRUNC, creation, access)
    with h5py.File(source, "r") as old, h5py.File(target) as new:
        _copy(old, new, replaced)
    return made


def _copy(source: h5py.Group, target: h5py.Group, replaced: Makers) -> None:
    creation = h5p.create(h5p.GROUP_CREATE)
    creation.set_obj_track_times(False)
    for name, part in source.items():
        make = replaced.get(part.name.lstrip("/"))
        if isinstance(part, h5py.Group):
            inner = h5py.Group(h5g.create(target.id, name.encode(), gcpl=creation))
            _copy(part, inner, replaced)
        elif make is not None:
            target[name] = make()
        else:
            source.copy(part, target, name)
    # The longest text comes last, since HDF5 doubles its room for one that follows.
    for name, value in sorted(source.attrs.items(), key=_length):
        target.attrs[name] = value


def _length(attribute: tuple[str, object]) -> int:
    return len(attribute[1]) if isinstance(attribute[1], str) else 0


def seal(data: bytearray | memoryview, place: int) -> None:
    """Put the digest of a file into the room that its bytes have for it."""
    digest = _digest(data, place)
    data[place : place + SEAL_SIZE] = _TITLE + digest.encode("ascii") + b"\n"


def read_checked(path: str) -> tuple[bytes, str | None]:
    """All bytes of a file, and the digest in its seal, in hexadecimal; None where it has none.

    Raises:
        OSError: the bytes are not those that were sealed, the seal is damaged, or there is no such
            file.
    """
    with open(path, "rb") as file:
        data = file.read()
    place = _seal_place(path, data)
    if place is None:
        return data, None
    recorded = data[place + len(_TITLE) : place + SEAL_SIZE - 1].decode("ascii", "replace")
    found = _digest(data, place)
    if found != recorded:
        raise OSError(
            f"path: received '{path}', whose bytes have the digest {found[:12]}..., expected "
            f"{recorded[:12]}..., which was recorded when it was saved. The file is damaged or was "
            "changed; save the model again, or get the file again."
        )
    return data, recorded


def _digest(data: bytes | bytearray | memoryview, place: int) -> str:
    """SHA-256 of all bytes but the seal at `place`, in hexadecimal."""
    digest = hashlib.sha256(memoryview(data)[:place])
    digest.update(memoryview(data)[place + SEAL_SIZE :])
    return digest.hexdigest()


def _seal_place(path: str, data: bytes) -> int | None:
    """Where the seal of a file is; None in a file without any trace of one.

    Raises:
        OSError: a part of a seal is there, or something else is in its place.
    """
    if data.startswith(_HDF5):
        # Keras writes nothing behind an HDF5 file, and nothing in front of it.
        damaged = _has_trace(data[_end_of_hdf5(data) :])
    else:
        # What is damaged may have the seal of one format and the beginning of none.
        for place in (kind.seal_place(len(data)) for kind in FORMATS):
            if _is_seal(data[place : place + SEAL_SIZE]):
                return place
        damaged = _is_damaged_archive(data) if Archive.holds(data) else Legacy.holds(data)
    if damaged:
        raise OSError(
            f"path: received '{path}', expected a file without a seal or with a whole one. It is "
            "damaged; save the model again, or get the file again."
        )
    return None


def _is_damaged_archive(data: bytes) -> bool:
    """Whether there are traces of a seal in front of an archive or behind it.

    In it there may be whole files, as assets. What zipfile cannot open is left to it.
    """
    record = _end_record(data)
    if record is None:
        return False
    start, comment_size = record
    behind = data[start + _END_RECORD.size :]
    in_front = data[: max(start - sum(_directory(data, start)), 0)]
    return (
        comment_size == SEAL_SIZE
        or _has_trace(behind)
        or _has_trace(in_front)
        or (comment_size != len(behind) and _has_digits(behind))
    )


def _is_seal(part: bytes) -> bool:
    return len(part) == SEAL_SIZE and part.startswith(_TITLE) and part.endswith(b"\n")


def _has_trace(part: bytes) -> bool:
    """Whether a part of the title is there."""
    return any(_TITLE[i : i + _TRACE_SIZE] in part for i in range(len(_TITLE) - _TRACE_SIZE + 1))


def _has_digits(part: bytes) -> bool:
    """Whether a part of a digest is there; a row of equal digits is none."""
    return any(len(set(found)) > 5 for found in re.findall(rb"[0-9a-f]{16,}", part))


def _end_record(data: bytes) -> tuple[int, int] | None:
    """Where the end record of an archive is, as zipfile finds it, and the size of its comment."""
    last = len(data) - _END_RECORD.size
    if last >= 0 and data.startswith(_ARCHIVE_END, last) and data.endswith(b"\0\0"):
        return last, 0
    start = data.rfind(_ARCHIVE_END, max(last - _LONGEST_COMMENT, 0))
    if not 0 <= start <= last:
        return None
    return start, _END_RECORD.unpack_from(data, start)[-1]


def _directory(data: bytes, start: int) -> tuple[int, int]:
    """Size and place of an archive's directory, as its end record has them."""
    return _END_RECORD.unpack_from(data, start)[5:7]


def _places_of_hdf5(size: int) -> Iterator[int]:
    """Where HDF5 looks for the beginning of a file, the very beginning aside."""
    place = _BLOCK_SIZE
    while place < size:
        yield place
        place *= 2


def _end_of_hdf5(data: bytes) -> int:
    """Where an HDF5 file says that it ends; the end of the data where it does not say so."""
    version = data[len(_HDF5) : len(_HDF5) + 1]
    first = {b"\0": 24, b"\1": 28, b"\2": 12, b"\3": 12}.get(version)
    at = 13 if version in (b"\0", b"\1") else 9
    if first is None or len(data) <= at:
        return len(data)
    # Three addresses: of the beginning, of something else, and of the end.
    size = data[at]
    return int.from_bytes(data[first + 2 * size : first + 3 * size], "little") or len(data)
