"""What is refused of a file before anything is built from it.

A file may come from anywhere. So sizes are those that its bytes can stand for, nothing leads out of
it, and no code is in it.
"""

import io
import os
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import h5py
import numpy as np

from keras_qwrap.files.containers import FORMATS, Container, array_of, read_checked
from keras_qwrap.numerics.checks import bad_type, bad_value

_MOST_TIMES = 20
_ROOM = 2**28
_MOST_NODES = 10**6
_MOST = 2**24
_SIZES = frozenset(
    (
        *("amax_history_length", "batch_size", "beam_width", "block_size", "chain_depth"),
        *("crossing_dim", "depth_multiplier", "fft_length", "filter_size", "filters"),
        *("frame_length", "gptq_unpacked_column_size", "groups", "hashing_dim", "head_dim"),
        *("height", "indices_or_sections", "input_dim", "input_length", "kernel_size", "key_dim"),
        *("length", "max_tokens", "maximum_iterations", "minlength", "ngrams", "num", "num_bins"),
        *("num_bits", "num_chains", "num_classes", "num_discretization_bins", "num_heads"),
        *("num_key_value_heads", "num_labels", "num_mel_bins", "num_oov_indices", "num_ops"),
        *("num_query_heads", "num_regressors", "num_segments", "num_thresholds", "num_tokens"),
        *("output_dim", "output_sequence_length", "output_size", "pad_width", "pool_size"),
        *("power_iterations", "projection_dim", "repeats", "sequence_length", "size"),
        *("target_height", "target_width", "tile_grid_size", "units", "value_dim"),
        *("vocabulary_size", "width"),
    )
)
"""Constructor arguments of Keras and of this package that say how much there is of something."""

_MOST_ALONG_AXIS = 2**26
_MOST_ELEMENTS = 2**28
_SHAPES = frozenset(
    (
        *("__keras_qwrap_tensor__", "batch_input_shape", "batch_shape", "build_input_shape"),
        *("input_shape", "newshape", "noise_shape", "output_shape", "output_shapes", "shape"),
        *("shapes_dict", "target_shape"),
    )
)
"""Keys of shapes, besides `args` and `kwargs` of what a wrapper is built from."""

_CODE = ("__lambda__", "TorchModuleWrapper", "TFSMLayer")
_TRUST = "The file is damaged or hostile; if you trust it, `keras.models.load_model` loads it."


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes:
        path: the file.
        container: its bytes.
        digest: that in the seal, which was checked; None in a file without one.
        text: the config of the model, as JSON; in a `.keras` archive that of its training too.
        config: of the model.
        training: of optimizer, loss and metrics.
        keras_version: of the Keras that wrote it.
        arrays: by path in the HDF5 file; read-only.
        stored: bytes that all arrays take in the file.
    """

    path: str
    container: Container
    digest: str | None
    text: str | bytes
    config: Any
    training: Any
    keras_version: str | None
    arrays: dict[str, np.ndarray]
    stored: int

    @property
    def losses_and_metrics(self) -> Any:
        """`training` without the optimizer."""
        if not isinstance(self.training, dict):
            return self.training
        return {
            k: v for k, v in self.training.items() if k not in ("optimizer", "optimizer_config")
        }


def read_contents(path: Any) -> Contents:
    """What a file holds; refused where it is no model's, damaged or hostile.

    A sealed file has the bytes that were sealed, and a `.keras` archive those of its checksums. All
    that an archive holds, and all arrays, are at most 20 times as large as the bytes that they come
    from, and 256 MiB. Archives hold plain members, HDF5 files no links and no arrays that are
    stored elsewhere.

    Args:
        path: the file.

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
    kind = next((kind for kind in FORMATS if kind.holds(data)), None)
    if kind is None:
        raise bad_value(
            "path",
            path,
            "a .keras archive or an HDF5 file",
            "The file is truncated or damaged, or was not saved by Keras.",
        )
    try:
        return _contents(path, kind(data), digest)
    except ValueError:
        raise
    except Exception as error:
        raise OSError(
            f"path: received '{path}', expected {kind.title}; reading it failed with "
            f"{type(error).__name__}: {str(error)[:400]}. Save the model again."
        ) from error


def _contents(path: str, container: Container, digest: str | None) -> Contents:
    members = container.members()
    check_size(path, "members", sum(size for _, size in members), len(container.data))
    _check_names(path, [name for name, _ in members])
    lacks = container.lacks()
    if lacks is not None:
        raise bad_value("path", path, *lacks)
    container.check()
    try:
        found = container.description()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"path: received '{path}', expected a model's config as JSON in it; reading it failed "
            f"with {type(error).__name__}: {error}. The file is damaged, or was not saved by Keras."
        ) from error
    data = container.hdf5()
    with h5py.File(io.BytesIO(data), "r") as file:
        arrays, stored = _checked_arrays(path, data, file)
    return Contents(path, container, digest, **vars(found), arrays=arrays, stored=stored)


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
    endings = contents.container.endings
    if not contents.path.endswith(endings):
        expected = f"the ending {' or '.join(endings)}"
        raise bad_value("path", contents.path, expected, "Rename the file.")
    configs = [contents.config, contents.losses_and_metrics]
    _check_config(contents.path, configs, contents.stored, safe_mode)
    return contents


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


def _check_names(path: str, names: list[str]) -> None:
    for name in names:
        parts = name.replace("\\", "/").split("/")
        if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]:
            raise _hostile(path, f"the member {name!r}", "members inside the archive")
    if len(set(names)) < len(names):
        raise _hostile(path, "two members of one name", "one of each")


def _checked_arrays(path: str, data: bytes, file: h5py.File) -> tuple[dict[str, np.ndarray], int]:
    """The arrays, and the bytes that all of them take; each must be in the file, once."""
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
    return {name: array_of(part, data) for name, part in found.items()}, stored


class _Place(NamedTuple):
    """Where a value stands in a config: under which key, in a shape, and in whose arguments."""

    key: str = ""
    in_shape: bool = False
    is_config: bool = False
    is_argument: bool = False

    @property
    def is_size(self) -> bool:
        return self.is_argument and self.key in _SIZES


def _check_config(path: str, config: Any, stored: int, safe_mode: bool) -> None:
    """Refuse code, endless configs, and sizes and shapes that would fill the memory."""
    waiting: list[tuple[Any, _Place]] = [(config, _Place())]
    seen, most = 0, max(_MOST, stored)
    while waiting:
        node, place = waiting.pop()
        seen += 1
        if seen > _MOST_NODES:
            raise _hostile(path, "a config of more values", f"at most {_MOST_NODES:,}")
        if isinstance(node, dict):
            if safe_mode:
                _check_code(path, node)
            waiting += [(part, _place(str(key), node, place)) for key, part in node.items()]
        elif isinstance(node, list):
            _check_shape(path, node if place.in_shape else [])
            waiting += [(part, place) for part in node]
        elif isinstance(node, int) and abs(node) > most and place.is_size:
            raise _hostile(path, f"{place.key}={node}", f"at most {most:,}")


def _place(key: str, node: dict, around: _Place) -> _Place:
    """The place of the value of `key` in a dictionary that is itself at a place."""
    built = around.key == "build_config" and key in ("args", "kwargs")
    return _Place(
        key,
        in_shape=around.in_shape or key in _SHAPES or built,
        is_config=key == "config" and _is_of_house(node),
        is_argument=around.is_config,
    )


def _is_of_house(node: dict) -> bool:
    """Whether it describes an object of Keras or of this package."""
    name = str(node.get("registered_name") or node.get("class_name", ">"))
    return ">" not in name or name.startswith("keras_qwrap>")


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
