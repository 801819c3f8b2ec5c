"""Files with a digest: changes are noticed, and what stops the writer leaves them whole."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import h5py
import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies
from keras import layers
from reference import refused, to_numpy

import keras_qwrap as qi
from keras_qwrap.files import containers
from keras_qwrap.files.containers import read_checked, write_whole

ENDINGS = [".keras", ".h5"]
X = np.random.default_rng(0).normal(size=(3, 6)).astype("float32")


def check_seal(path):
    """Whether a file is sealed, which is then checked."""
    return read_checked(path)[1] is not None


def model(seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((6,)), layers.Dense(4), layers.Dense(2)], name="model")


def converted(seed=0):
    return qi.convert_to_inferable(qi.quantize_model(model(seed), "w4"))


@keras.saving.register_keras_serializable("test_sealing")
class Noted(keras.Model):
    """Its config is as long as its note."""

    def __init__(self, note="", **kwargs):
        super().__init__(**{"name": "noted", **kwargs})
        self.note, self.dense = note, layers.Dense(2, name="dense")

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        return {"note": self.note}


def test_weights_of_an_archive_may_lie_where_those_of_a_sealed_file_do(tmp_path):
    path, place = tmp_path / "model.keras", 512
    for _ in range(2):
        net = Noted("a" * (512 - place))
        net(X)
        net.save(path)
        place = path.read_bytes().index(b"\x89HDF")
    assert place == 512
    assert not check_seal(path)
    loaded = qi.keras_load_quantized_model(path)
    np.testing.assert_array_equal(to_numpy(loaded(X)), to_numpy(net(X)))


def archive(text, name):
    with zipfile.ZipFile(name, "w") as file:
        file.writestr("config.json", text)


def hdf5(text, name):
    with h5py.File(name, "w") as file:
        file.create_group("a/b").attrs["text"] = text
        file["numbers"] = np.arange(9.0)


WRITERS = {".keras": archive, ".h5": hdf5}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_saved_model_loads_everywhere(ending, tmp_path):
    new, path = converted(), str(tmp_path / f"model{ending}")
    qi.save_quantized_model(new, path)
    assert os.listdir(tmp_path) == [f"model{ending}"]
    assert check_seal(path) is True
    loaders = [qi.keras_load_quantized_model]
    # In `.h5` it does not know packed codes.
    loaders += [keras.models.load_model] if ending == ".keras" else []
    for loader in loaders:
        np.testing.assert_array_equal(to_numpy(loader(path)(X)), to_numpy(new(X)))
    assert h5py.is_hdf5(path) is (ending == ".h5")
    assert zipfile.is_zipfile(path) is (ending == ".keras")


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_changed_byte_is_noticed(ending, tmp_path):
    path = str(tmp_path / f"file{ending}")
    write_whole(path, partial(WRITERS[ending], "x" * 40))
    whole = Path(path).read_bytes()
    for place in (
        [*range(700), *range(700, len(whole), 13)] if ending == ".h5" else range(len(whole))
    ):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        Path(path).write_bytes(changed)
        refused(OSError, lambda: check_seal(path), path, "damaged")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bytes of a bare file and of a sealed one, by ending."""
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for ending, write in WRITERS.items():
        bare, whole = folder / f"bare{ending}", folder / f"whole{ending}"
        write("x" * 40, bare)
        write_whole(str(whole), partial(write, "x" * 40))
        found[ending] = bare.read_bytes(), whole.read_bytes()
    return found


def noticed(path, data):
    """Neither is the file taken for a whole one, nor can it be opened as one without a seal."""
    Path(path).write_bytes(data)
    if zipfile.is_zipfile(path) if data.startswith(b"PK") else h5py.is_hdf5(path):
        refused(OSError, lambda: check_seal(str(path)), str(path), "damaged")
    else:
        with suppress(OSError):
            assert check_seal(str(path)) is False


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_cut_is_noticed(ending, files, tmp_path):
    whole = files[ending][1]
    middle = range(100, len(whole) - 200, 37)
    for size in [*range(100), *middle, *range(len(whole) - 200, len(whole))]:
        noticed(tmp_path / "file", whole[:size])


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("fill", [b"\0", b"x", b"\n", b"PK\5\6"])
def test_bytes_in_front_and_behind_are_noticed(ending, fill, files, tmp_path):
    """HDF5 looks for its beginning at 512, 1024, 2048, ...; zipfile for its end in 65,557 bytes."""
    whole = files[ending][1]
    for size in (1, 2, 21, 22, 84, 428, 512, 1536, 3584, 7680, 65_000, 65_451, 65_536, 70_000):
        more = (fill * size)[:size]
        noticed(tmp_path / "file", whole + more)
        noticed(tmp_path / "file", more + whole)
        noticed(tmp_path / "file", more + whole + more)


@pytest.mark.parametrize("first", ENDINGS)
@pytest.mark.parametrize("second", ENDINGS)
def test_two_files_in_one_are_noticed(first, second, files, tmp_path):
    for a in files[first]:
        for b in files[second]:
            if files[first][1] == a or files[second][1] == b:
                noticed(tmp_path / "file", a + b)
                noticed(tmp_path / "file", a + b[:-30])
                noticed(tmp_path / "file", a + b + bytes(1000))


def test_a_damaged_seal_of_an_archive_is_noticed(files, tmp_path):
    whole, path = files[".keras"][1], tmp_path / "file"
    end, length = len(whole) - 84, slice(len(whole) - 86, len(whole) - 84)
    digest = whole[end + 19 : -1]
    for size in (0, 1, 11, 19, 63, 64, 65, 83, 85, 128, 256, 340, 2**15, 2**16 - 1):
        changed = bytearray(whole)
        changed[length] = size.to_bytes(2, "little")
        noticed(path, changed)
        noticed(path, changed[:-1])
        noticed(path, changed + b"more")
        noticed(path, changed[:end] + b"keras_qwrap")
        if size != len(digest):
            noticed(path, changed[:end] + digest)
        changed[end + 3 : end + 12] = bytes(9)
        noticed(path, changed)
    for place in range(end, len(whole)):
        for part in (b"\0", bytes(8), b"x" * 84):
            noticed(path, (whole[:place] + part)[: len(whole)] + whole[place + len(part) :])
    noticed(path, whole[:end] + bytes(84))
    noticed(path, whole[:end] + 2 * whole[end:])
    noticed(path, whole[:40] + whole[end:] + whole[40:end])
    for comment in (whole[end:-1], whole[end:] + b" ", b"my " + whole[end:], b"keras_qwrap sha2"):
        path.write_bytes(whole)
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = comment
        noticed(path, path.read_bytes())


def test_a_damaged_seal_of_an_hdf5_file_is_noticed(files, tmp_path):
    whole, path = files[".h5"][1], tmp_path / "file"
    for block in (bytes(512), b"x" * 512, whole[1:512] + b"\0", bytes(84) + whole[84:512]):
        noticed(path, block + whole[512:])
    for size in (512, 1536, 3584):
        noticed(path, whole[:512] + bytes(size) + whole[512:])
        noticed(path, bytes(size) + whole)
        noticed(path, bytes(size + 512) + whole[512:])
    assert h5py.is_hdf5(path)


edits = strategies.lists(
    strategies.tuples(
        strategies.floats(0, 1, exclude_max=True),
        strategies.sampled_from(["flip", "insert", "delete", "replace", "cut"]),
        strategies.binary(min_size=1, max_size=600),
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("ending", ENDINGS)
@hypothesis.given(edits=edits)
@hypothesis.settings(
    max_examples=150, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_any_edits_are_noticed(ending, edits, files, tmp_path):
    whole = files[ending][1]
    data = bytearray(whole)
    for share, kind, part in edits:
        place = int(share * len(data))
        if kind == "flip" and data:
            data[place] ^= 1 << part[0] % 8
        elif kind == "insert":
            data[place:place] = part
        elif kind == "delete":
            del data[place : place + len(part)]
        elif kind == "replace":
            data[place : place + len(part)] = part
        elif kind == "cut":
            del data[place:]
    if data != whole:
        noticed(tmp_path / "file", bytes(data))


ODD = [b"\n", bytes(1), bytes(84), bytes(65_000), b"x" * 84, b"keras", b"PK", b"0" * 64 + b"\n"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_odd_bytes_behind_a_file_without_a_seal_are_none(ending, tmp_path):
    path, new = tmp_path / f"model{ending}", converted()
    new.save(path)
    bare = path.read_bytes()
    for odd in ODD:
        path.write_bytes(bare + odd)
        assert not check_seal(path)
    loaded = qi.keras_load_quantized_model(path)
    np.testing.assert_array_equal(to_numpy(loaded(X)), to_numpy(new(X)))


def test_comments_of_others_and_files_in_archives_are_none(files, tmp_path):
    path = tmp_path / "file.zip"
    for comment in (b"", b"sha256 " + b"0123456789abcdef" * 4, b"made by hand", bytes(500)):
        archive("x", path)
        with zipfile.ZipFile(path, "a") as file:
            file.comment = comment
            for ending, (_, whole) in files.items():
                file.writestr(f"assets/model{ending}", whole)
        assert not check_seal(path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_damaged_models_are_not_loaded(ending, tmp_path):
    path = tmp_path / f"model{ending}"
    qi.save_quantized_model(converted(), path)
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:-84], whole + bytes(65_000), bytes(512) + whole):
        path.write_bytes(data)
        refused(OSError, lambda: qi.keras_load_quantized_model(path), str(path), "damaged")
        refused(OSError, lambda: qi.inspect_file(path), str(path), "damaged")


def test_a_file_that_keras_saved_has_no_seal(tmp_path):
    path = str(tmp_path / "model.keras")
    new = converted()
    new.save(path)
    assert check_seal(path) is False
    assert read_checked(path) == (Path(path).read_bytes(), None)
    loaded = qi.keras_load_quantized_model(path)
    np.testing.assert_array_equal(to_numpy(loaded(X)), to_numpy(new(X)))


def test_damage_is_found_before_the_file_is_opened(tmp_path, monkeypatch):
    path = str(tmp_path / "model.h5")
    qi.save_quantized_model(converted(), path)
    whole = bytearray(Path(path).read_bytes())
    whole[len(whole) // 2] ^= 1
    Path(path).write_bytes(whole)
    monkeypatch.setattr(h5py, "File", None)
    refused(OSError, lambda: qi.keras_load_quantized_model(path), "digest", "damaged")


def test_the_mode_of_a_file_is_kept(tmp_path):
    path = str(tmp_path / "model.keras")
    qi.save_quantized_model(model(), path)
    assert os.stat(path).st_mode & 0o777 == 0o666 & ~_umask()
    os.chmod(path, 0o640)
    qi.save_quantized_model(model(1), path)
    assert os.stat(path).st_mode & 0o777 == 0o640


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_fails_leaves_the_old_file(tmp_path):
    path = str(tmp_path / "model.keras")
    qi.save_quantized_model(model(), path)
    before = Path(path).read_bytes()

    def fail(name):
        Path(name).write_bytes(b"half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_whole(path, fail)
    assert Path(path).read_bytes() == before
    assert os.listdir(tmp_path) == ["model.keras"]


def test_wrong_arguments_are_refused(tmp_path):
    good = str(tmp_path / "model.keras")
    refused(TypeError, lambda: qi.save_quantized_model(layers.Dense(2), good), "Dense", "model")
    refused(TypeError, lambda: qi.save_quantized_model(model(), 3), "int", "path")
    refused(
        ValueError, lambda: qi.save_quantized_model(model(), str(tmp_path / "a.zip")), ".zip", ".h5"
    )
    for name in ("a.weights.h5", "a.weights.hdf5", "a.WEIGHTS.h5", "a.Weights.H5", ".weights.h5"):
        path = str(tmp_path / name)
        refused(
            ValueError,
            lambda path=path: qi.save_quantized_model(model(), path),
            path,
            "`model.save_weights(path)`",
            "the ending .keras or .h5",
        )
    assert os.listdir(tmp_path) == []
    (tmp_path / "some.weights.h5").mkdir()
    for name in ("some.weights.h5/model.h5", "weights.h5", "my_weights.hdf5", "a.weights.keras"):
        qi.save_quantized_model(model(), str(tmp_path / name))
        assert qi.keras_load_quantized_model(str(tmp_path / name)).name == "model"
    (tmp_path / "folder.keras").mkdir()
    for name in ("none/model.keras", "folder.keras"):
        path = str(tmp_path / name)
        refused(OSError, lambda path=path: qi.save_quantized_model(model(), path), path, "folder")


def test_links_are_followed_and_long_names_fit(tmp_path):
    target, link = tmp_path / f"{'n' * 249}.keras", tmp_path / "link.keras"
    target.write_bytes(b"old")
    link.symlink_to(target)
    qi.save_quantized_model(model(), link)
    assert link.is_symlink()
    assert check_seal(str(target))
    assert sorted(os.listdir(tmp_path)) == sorted([target.name, link.name])


def sources(folder, ending):
    """Two files of unlike sizes, and what they are when sealed."""
    made = {}
    for name, size in {"first": 300_000, "second": 700_000}.items():
        bare, whole = str(folder / f"{name}{ending}"), str(folder / f"{name}.whole{ending}")
        WRITERS[ending](random.Random(name).randbytes(size).hex()[:30_000], bare)
        if ending == ".keras":
            with zipfile.ZipFile(bare, "a") as file:
                file.writestr("data", random.Random(name).randbytes(size))
        else:
            with h5py.File(bare, "a") as file:
                file["data"] = np.frombuffer(random.Random(name).randbytes(size), np.uint8)
        write_whole(whole, partial(shutil.copyfile, bare))
        made[bare] = Path(whole).read_bytes()
    return made


def kill_at_random(tmp_path, ending, times):
    """Kill a process that is writing; how often each file was found."""
    made = sources(tmp_path, ending)
    place = tmp_path / "place"
    place.mkdir()
    path = place / f"model{ending}"
    first = next(iter(made))
    write_whole(str(path), partial(shutil.copyfile, first))
    script = Path(__file__).resolve().parents[1] / "sealing_child.py"
    generator = random.Random(0)
    found = []
    for _ in range(times):
        command = [sys.executable, str(script), containers.__file__, str(path), *made]
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(generator.uniform(0, 0.02))
        child.kill()
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        assert check_seal(str(path)) is True
        found.append(list(made.values()).index(path.read_bytes()))
        for left in place.iterdir():
            if left != path:
                shutil.rmtree(left)
    return found


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_killed_writer_leaves_a_whole_file(ending, tmp_path):
    assert len(kill_at_random(tmp_path, ending, 10)) == 10


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_three_hundred_killed_writers_leave_whole_files(ending, tmp_path):
    assert set(kill_at_random(tmp_path, ending, 150)) == {0, 1}


FILL = """
import functools, resource, runpy, shutil, signal, sys
module, path, source, limit = sys.argv[1:]
write_whole = runpy.run_path(module)["write_whole"]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
write_whole(path, functools.partial(shutil.copyfile, source))
"""


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("limit", [0, 1_000, 200_000, 699_999, 720_000])
def test_a_full_disk_leaves_the_old_file(ending, limit, tmp_path):
    """A limit on the size of files stands for the disk."""
    first, second = sources(tmp_path, ending)
    place = tmp_path / "place"
    place.mkdir()
    path = place / f"model{ending}"
    write_whole(str(path), partial(shutil.copyfile, first))
    before = path.read_bytes()
    command = [sys.executable, "-c", FILL, containers.__file__, str(path), second, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "OSError" in done.stderr
    assert path.read_bytes() == before
    assert [left.name for left in place.iterdir()] == [path.name]
