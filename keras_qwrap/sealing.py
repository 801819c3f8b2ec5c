"""Files that are whole or not there, with a digest that is checked before anything reads them.

Of a `.keras` file the digest is the comment of the zip archive, at its end; of an HDF5 file it is
the user block, 512 bytes at its start. Both are parts of these formats that other readers skip.
"""

import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from typing import BinaryIO

_TITLE = b"keras_qwrap sha256 "
_SEAL_SIZE = len(_TITLE) + 64 + 1
_BLOCK_SIZE = 512
_HDF5 = b"\x89HDF\r\n\x1a\n"
_ARCHIVE = b"PK"
_ARCHIVE_END, _ARCHIVE_END_SIZE = b"PK\5\6", 22
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
    from keras_qwrap.sealing import check_seal, write_whole

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


def is_archive(path: str) -> bool:
    """Whether a file begins as archives do; HDF5 files may hold all other marks of them."""
    with open(path, "rb") as file:
        return file.read(len(_ARCHIVE)) == _ARCHIVE


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
        digest = _digest(file, place)
        file.seek(place)
        file.write(_TITLE + digest.encode("ascii") + b"\n")
        file.flush()
        os.fsync(file.fileno())


def recorded_digest(path: str) -> str | None:
    """The digest that a file's seal records, in hexadecimal; None where there is no seal."""
    with open(path, "rb") as file:
        return _recorded(file)[1]


def check_seal(path: str) -> bool:
    """Whether a file is sealed, which is then checked: none of its bytes has changed.

    Raises:
        OSError: the bytes are not those that were sealed, the seal is damaged, or there is no such
            file.
    """
    with open(path, "rb") as file:
        place, recorded = _recorded(file)
        if recorded is None:
            _check_no_seal(path, file)
            return False
        found = _digest(file, place)
    if found != recorded:
        raise OSError(
            f"path: received '{path}', whose bytes have the digest {found[:12]}..., expected "
            f"{recorded[:12]}..., which was recorded when it was saved. The file is damaged or was "
            "changed; save the model again, or get the file again."
        )
    return True


def _recorded(file: BinaryIO) -> tuple[int, str | None]:
    """Where the seal of a file is, and the digest in it."""
    end = file.seek(0, os.SEEK_END)
    for place in (0, max(end - _SEAL_SIZE, 0)):
        file.seek(place)
        found = file.read(_SEAL_SIZE)
        if len(found) == _SEAL_SIZE and found.startswith(_TITLE) and found.endswith(b"\n"):
            return place, found[len(_TITLE) : -1].decode("ascii", "replace")
    return 0, None


def _check_no_seal(path: str, file: BinaryIO) -> None:
    """Refuse what is in a seal's place and is none, in a file that Keras leaves empty there."""
    if is_archive(path):
        place = file.seek(0, os.SEEK_END) - _SEAL_SIZE - _ARCHIVE_END_SIZE
        damaged = place >= 0 and _has(file, place, _ARCHIVE_END)
    else:
        damaged = _has(file, _BLOCK_SIZE, _HDF5) and not _has(file, 0, _HDF5)
    if damaged:
        raise OSError(
            f"path: received '{path}', expected a file without a seal or with a whole one. It is "
            "damaged; save the model again, or get the file again."
        )


def _has(file: BinaryIO, place: int, signature: bytes) -> bool:
    file.seek(place)
    return file.read(len(signature)) == signature


def _digest(file: BinaryIO, place: int) -> str:
    """SHA-256 of all bytes of a file but the seal at `place`, in hexadecimal."""
    digest = hashlib.sha256()
    file.seek(0)
    for size in (place, 2**62):
        while chunk := file.read(min(size, _CHUNK)):
            digest.update(chunk)
            size -= len(chunk)
        file.seek(place + _SEAL_SIZE)
    return digest.hexdigest()
