"""The same arrays in fewer bytes: HDF5 groups as HDF5 1.8 and later can write them.

Keras lets HDF5 write groups that its first release reads too, of 1 KB each, two or more for every
layer: beside weights of 2 bits that is a tenth of a file.
"""

import io
import os
import zipfile
from collections.abc import Callable, Mapping

import h5py
import numpy as np

from keras_qwrap.files.sealing import is_archive

_LIBRARY = "v108"
_ARRAYS = "model.weights.h5"

Makers = Mapping[str, Callable[[], np.ndarray]]
"""What makes arrays, by their names."""


def tighten(path: str, replaced: Makers | None = None) -> None:
    """Write a `.keras` archive or HDF5 file anew, with the same members, arrays and attributes.

    Args:
        path: the file.
        replaced: what makes the arrays that take the place of those of an HDF5 file, by name.

    Example:

    ```python
    import os, tempfile
    import h5py
    from keras_qwrap.files.tightening import tighten

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.h5")
        with h5py.File(path, "w") as file:
            file["a/b/c"] = [1.0, 2.0]
        before = os.path.getsize(path)
        tighten(path)
        with h5py.File(path) as file:
            print(file["a/b/c"][:], os.path.getsize(path) < before / 2)  # [1. 2.] True
    ```
    """
    loose = f"{path}.loose"
    os.replace(path, loose)
    with open(loose, "rb") as file:
        archive = is_archive(file.read(4))
    if archive:
        _tighten_archive(loose, path)
    else:
        _tighten_hdf5(loose, path, replaced or {})
    os.remove(loose)


def _tighten_archive(loose: str, path: str) -> None:
    with zipfile.ZipFile(loose) as source, zipfile.ZipFile(path, "w") as target:
        for member in source.infolist():
            content = source.read(member)
            if member.filename == _ARRAYS:
                arrays = io.BytesIO()
                _tighten_hdf5(io.BytesIO(content), arrays, {})
                content = arrays.getvalue()
            target.writestr(member, content)


def _tighten_hdf5(loose: str | io.BytesIO, path: str | io.BytesIO, replaced: Makers) -> None:
    with h5py.File(loose, "r") as source, h5py.File(path, "w", libver=_LIBRARY) as target:
        _copy(source, target, replaced)


def _copy(source: h5py.Group, target: h5py.Group, replaced: Makers) -> None:
    for name, part in source.items():
        make = replaced.get(part.name.lstrip("/"))
        if isinstance(part, h5py.Group):
            _copy(part, target.create_group(name), replaced)
        elif make is not None:
            target[name] = make()
        else:
            source.copy(part, target, name)
    # The longest text comes last, since HDF5 doubles its room for one that follows.
    for name, value in sorted(source.attrs.items(), key=_length):
        target.attrs[name] = value


def _length(attribute: tuple[str, object]) -> int:
    return len(attribute[1]) if isinstance(attribute[1], str) else 0
