"""Files that are whole or not there, with a digest that is checked before anything reads them.

Of a `.keras` file the digest is the comment of the zip archive, at its end; of an HDF5 file it is
the user block, 512 bytes at its start. Both are parts of these formats that other readers skip.
"""

import hashlib
import os
import re
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator

_TITLE = b"keras_qwrap sha256 "
_SEAL_SIZE = len(_TITLE) + 64 + 1
_BLOCK_SIZE = 512
_HDF5 = b"\x89HDF\r\n\x1a\n"
_ARCHIVE = b"PK"
_ARCHIVE_END = b"PK\5\6"
_END_RECORD = struct.Struct("<4s4H2LH")
_LONGEST_COMMENT = 2**16
_TRACE_SIZE = 10
_CHUNK = 2**20


def write_whole(path: str, write: Callable[[str], None]) -> None:
    """Let `write(name)` write a file, seal it, and put it where `path` says, all at once.

    `name` is beside the file that `path` leads to, and ends as it does. When this process is killed
    or the disk is full, `path` leads to the old file or to the new one, whole; a hidden file may be
    left beside it.

    Raises:
        OSError: the file cannot be written; `path` is left as it is.

    Example:

    ```python
    import os, tempfile, zipfile
    from keras_qwrap.files.sealing import check_seal, write_whole

    def write(name):
        with zipfile.ZipFile(name, "w") as archive:
            archive.writestr("a.txt", "hello")

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.zip")
        write_whole(path, write)
        print(os.listdir(folder), check_seal(path))  # ['a.zip'] True
    ```
    """
    path = os.path.realpath(path)
    folder = os.path.dirname(path)
    if os.path.isdir(path) or not os.path.isdir(folder):
        raise OSError(
            f"path: received '{path}', expected the name of a file in a folder that exists. Make "
            "the folder first, or choose another name."
        )
    with tempfile.TemporaryDirectory(prefix=".saving.", dir=folder) as scratch:
        temporary = os.path.join(scratch, f"whole{os.path.splitext(path)[1]}")
        write(temporary)
        seal(temporary)
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


def is_archive(data: bytes) -> bool:
    """Whether a file begins as archives do; HDF5 files may hold all other marks of them."""
    return data.startswith(_ARCHIVE)


def is_hdf5(data: bytes) -> bool:
    """Whether the bytes are those of an HDF5 file."""
    return any(data.startswith(_HDF5, place) for place in (0, *_places_of_hdf5(len(data))))


def seal(path: str) -> None:
    """Add the digest to an archive or HDF5 file that has none, and let the disk have all of it.

    Raises:
        OSError: the file is neither, or cannot be written.
    """
    with open(path, "rb") as file:
        is_hdf5 = file.read(len(_HDF5)) == _HDF5
    if is_hdf5:
        bare = f"{path}.bare"
        os.replace(path, bare)
        with open(bare, "rb") as source, open(path, "wb") as target:
            target.write(bytes(_BLOCK_SIZE))
            shutil.copyfileobj(source, target, _CHUNK)
        os.remove(bare)
    else:
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = bytes(_SEAL_SIZE)
    with open(path, "r+b") as file:
        place = 0 if is_hdf5 else file.seek(0, os.SEEK_END) - _SEAL_SIZE
        file.seek(0)
        digest = _digest(file.read(), place)
        file.seek(place)
        file.write(_TITLE + digest.encode("ascii") + b"\n")
        file.flush()
        os.fsync(file.fileno())


def check_seal(path: str) -> bool:
    """Whether a file is sealed, which is then checked: none of its bytes has changed.

    Raises:
        OSError: the bytes are not those that were sealed, the seal is damaged, or there is no such
            file.
    """
    return read_checked(path)[1] is not None


def read_checked(path: str) -> tuple[bytes, str | None]:
    """All bytes of a file, and the digest in its seal, in hexadecimal; None where it has none.

    Raises:
        OSError: as `check_seal`.
    """
    with open(path, "rb") as file:
        data = file.read()
    place = _seal_place(path, data)
    if place is None:
        return data, None
    recorded = data[place + len(_TITLE) : place + _SEAL_SIZE - 1].decode("ascii", "replace")
    found = _digest(data, place)
    if found != recorded:
        raise OSError(
            f"path: received '{path}', whose bytes have the digest {found[:12]}..., expected "
            f"{recorded[:12]}..., which was recorded when it was saved. The file is damaged or was "
            "changed; save the model again, or get the file again."
        )
    return data, recorded


def _seal_place(path: str, data: bytes) -> int | None:
    """Where the seal of a file is; None in a file without any trace of one.

    Raises:
        OSError: a part of a seal is there, or something else is in its place.
    """
    if data.startswith(_HDF5):
        # Keras writes nothing behind an HDF5 file, and nothing in front of it.
        damaged = _has_trace(data[_end_of_hdf5(data) :])
    else:
        for place in (0, max(len(data) - _SEAL_SIZE, 0)):
            if _is_seal(data[place : place + _SEAL_SIZE]):
                return place
        damaged = _is_damaged_archive(data) if is_archive(data) else is_hdf5(data)
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
        comment_size == _SEAL_SIZE
        or _has_trace(behind)
        or _has_trace(in_front)
        or (comment_size != len(behind) and _has_digits(behind))
    )


def _is_seal(part: bytes) -> bool:
    return len(part) == _SEAL_SIZE and part.startswith(_TITLE) and part.endswith(b"\n")


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


def _digest(data: bytes, place: int) -> str:
    """SHA-256 of all bytes but the seal at `place`, in hexadecimal."""
    digest = hashlib.sha256(memoryview(data)[:place])
    digest.update(memoryview(data)[place + _SEAL_SIZE :])
    return digest.hexdigest()
