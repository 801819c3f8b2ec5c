"""Files with a digest: changes are noticed, and what stops the writer leaves them whole."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras import layers
from reference import refused, to_numpy

import keras_qwrap as qi
from keras_qwrap import sealing
from keras_qwrap.sealing import check_seal, recorded_digest, write_whole

ENDINGS = [".keras", ".h5"]
X = np.random.default_rng(0).normal(size=(3, 6)).astype("float32")


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
    for loaded in (
        keras.models.load_model(path, compile=False),
        qi.keras_load_quantized_model(path),
    ):
        np.testing.assert_array_equal(to_numpy(loaded(X)), to_numpy(new(X)))
    assert h5py.is_hdf5(path) is (ending == ".h5")
    assert zipfile.is_zipfile(path) is (ending == ".keras")


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_changed_byte_is_noticed(ending, tmp_path):
    path = str(tmp_path / f"file{ending}")
    write_whole(path, partial(WRITERS[ending], "x" * 40))
    whole = Path(path).read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        Path(path).write_bytes(changed)
        refused(OSError, lambda: check_seal(path), path, "damaged")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_cut_file_is_noticed(ending, tmp_path):
    path = str(tmp_path / f"file{ending}")
    write_whole(path, partial(WRITERS[ending], "x" * 40))
    whole = Path(path).read_bytes()
    for size in range(0, len(whole), 7):
        Path(path).write_bytes(whole[:size])
        if ending == ".h5" and size >= 84:
            refused(OSError, lambda: check_seal(path), "digest", "damaged")
        else:
            assert check_seal(path) is False
            assert not h5py.is_hdf5(path)
            assert not zipfile.is_zipfile(path) or size > len(whole) - 84, "but the seal is there"


def test_a_file_that_keras_saved_has_no_seal(tmp_path):
    path = str(tmp_path / "model.keras")
    new = converted()
    new.save(path)
    assert check_seal(path) is False
    assert recorded_digest(path) is None
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
    script = Path(__file__).with_name("sealing_child.py")
    generator = random.Random(0)
    found = []
    for _ in range(times):
        command = [sys.executable, str(script), sealing.__file__, str(path), *made]
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
    command = [sys.executable, "-c", FILL, sealing.__file__, str(path), second, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "OSError" in done.stderr
    assert path.read_bytes() == before
    assert [left.name for left in place.iterdir()] == [path.name]
