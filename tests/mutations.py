"""Damaged and hostile files, and what loading them comes to, in a process that may die of it.

`python tests/mutations.py .keras 10000` takes that many, from seed 0, and ends with an error if one
of them did harm.
"""

import argparse
import collections
import copy
import io
import json
import os
import random
import select
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np

from keras_qwrap.files.containers import SEAL_SIZE, Archive, seal

SECONDS, MEBIBYTES = 10, 1024
DEPTHS = (50, 900, 5000)

CHILD = """
import hashlib, json, os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import keras
import numpy as np
import keras_qwrap as qi

def fingerprint(model):
    digest = hashlib.sha256(json.dumps(model.get_config(), sort_keys=True, default=str).encode())
    for variable in model.variables:
        digest.update(np.ascontiguousarray(keras.ops.convert_to_numpy(variable)).tobytes())
    return digest.hexdigest()

def mebibytes(what):
    with open("/proc/self/status") as file:
        (found,) = [line.split()[1] for line in file if line.startswith(what)]
    return int(found) // 1024

for number, line in enumerate(sys.stdin):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is that from now on
    before = mebibytes("VmRSS")
    try:
        result = {"loaded": fingerprint(qi.keras_load_quantized_model(line.strip()))}
    except (ValueError, OSError) as error:
        result = {"refused": f"{type(error).__name__}: {error}"[:300]}
    except BaseException as error:
        result = {"wrong error": f"{type(error).__name__}: {error}"[:300]}
    grown = mebibytes("VmHWM") - before
    if number % 20 == 0:  # It takes several times as long as loading.
        keras.backend.clear_session()
    print(json.dumps(result | {"grown": grown}), flush=True)
"""

HOSTILE = [
    *(None, True, False, 0, 1, -1, 2, 17, 10**6, 10**9, 2**31, 2**63, 10**30, -(10**9), 0.5, 1e308),
    *(float("nan"), float("inf"), "", "x" * 10_000, "os.system", "__import__('os').abort()"),
    *([], {}, [None], [10**9] * 4, [-1, -1], [[]] * 50, {"class_name": "Lambda", "config": {}}),
    {
        "module": "os",
        "class_name": "system",
        "config": {"command": "true"},
        "registered_name": None,
    },
    {"module": "builtins", "class_name": "function", "config": "eval", "registered_name": "eval"},
    {"class_name": "__lambda__", "config": {"value": "4wEAAAA="}},
    {"class_name": "__numpy__", "config": {"value": [1e9], "dtype": "float32"}},
    {"class_name": "__tensor__", "config": {"value": [1.0] * 10, "dtype": "float32"}},
    {"__keras_qwrap_float32__": "AAAA"},
    {"__keras_qwrap_float32__": 7},
    {"__keras_qwrap_tensor__": [[10**9, 10**9], "float32"]},
    [1e-30] * 20_000,
]


def text_of(config: dict) -> str:
    """JSON, with a deep list where there is its mark."""
    text = json.dumps(config)
    for depth in DEPTHS:
        text = text.replace(f'"@{depth}@"', "[" * depth + "]" * depth)
    return text


class Loader:
    """A child process that loads files; a new one when it dies or does not answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen | None = None

    def start(self) -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        command = [sys.executable, "-W", "ignore", "-c", CHILD]
        return subprocess.Popen(command, text=True, bufsize=1, cwd=self.folder, **pipes)

    def load(self, path: Path, seconds: float) -> dict:
        """What became of a file."""
        self.process = self.process or self.start()
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self.stop()
        return {"crashed" if ready else "hung": True}

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.process = None


def places(node: object) -> Iterator[tuple[object, object]]:
    """Every container and key in a config."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(items):
        yield node, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def changed_config(config: dict, chance: random.Random) -> dict:
    """A config in which one to three places are other than they were."""
    config = copy.deepcopy(config)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        found = list(places(config))
        parent, key = chance.choice(found)
        kind = chance.random()
        if kind < 0.12:
            del parent[key]
        elif kind < 0.2 and isinstance(parent, dict):
            parent[f"{key}_x"] = parent[key]
        elif kind < 0.35:
            other, where = chance.choice(found)
            parent[key] = copy.deepcopy(other[where]) if where in _keys(other) else None
        elif kind < 0.4:
            parent[key] = f"@{chance.choice(DEPTHS)}@"
        elif kind < 0.55 and isinstance(parent[key], (int, float)):
            parent[key] = parent[key] * chance.choice((-1, 2, 10, 1000, 10**6)) + chance.choice(
                (0, 1)
            )
        else:
            parent[key] = copy.deepcopy(chance.choice(HOSTILE))
    return config


def _keys(parent: object) -> list:
    return list(parent) if isinstance(parent, dict) else list(range(len(parent)))


def change_arrays(file: h5py.File, chance: random.Random) -> None:
    """Make one array of an HDF5 file other than it was, or a group a link."""
    arrays: list[str] = []
    file.visititems(lambda name, part: arrays.append(name) if hasattr(part, "dtype") else None)
    name = chance.choice(arrays)
    value = file[name][()]
    del file[name]
    kind = chance.randrange(12)
    if kind == 0:
        return
    if kind == 1:
        file[name] = h5py.ExternalLink("/etc/passwd", "/")
    elif kind == 2:
        file[name] = h5py.SoftLink("/")
    elif kind == 3:
        file.create_dataset(name, shape=(10**9,), dtype="f4", chunks=(1024,))
    elif kind == 4:
        file.create_dataset(name, shape=(10**5,), dtype="f4", compression="gzip")[:] = 0
    elif kind == 5:
        file[name] = value.astype(chance.choice(("f2", "f8", "i8", "?", "S3")))
    elif kind == 6:
        file[name] = np.full_like(value, 255 if value.dtype == np.uint8 else np.nan)
    elif kind == 7:
        file[name] = np.append(value.ravel(), value.ravel()[:1])
    elif kind == 8:
        layout = h5py.VirtualLayout(shape=(4,), dtype="f4")
        layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape=(4,))
        file.create_virtual_dataset(name, layout)
    elif kind == 9:
        file.create_group(name)
    elif kind == 10:
        for i in range(40):
            file.create_dataset(f"{name}/{i}", shape=(2**26,), dtype="u1", chunks=(1024,))
    else:
        flat = np.array(value).ravel()
        if flat.size:
            place = chance.randrange(flat.size)
            flat[place] = flat[place] + 1
        file[name] = flat.reshape(value.shape)
        file[f"{name}_more"] = value


def structural(base: bytes, ending: str, path: Path, chance: random.Random) -> None:
    """Write a file of another structure, with the digest that it should have."""
    path.write_bytes(base)
    if ending == ".h5":
        bare = path.read_bytes()[512:]
        path.write_bytes(bare)
        with h5py.File(path, "a") as file:
            if chance.random() < 0.7:
                name = chance.choice(("model_config", "model_config", "training_config"))
                config = changed_config(json.loads(file.attrs[name]), chance)
                file.attrs[name] = text_of(config)
            else:
                change_arrays(file, chance)
        path.write_bytes(sealed(bytes(512) + path.read_bytes(), 0))
        return
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    kind = chance.random()
    if kind < 0.65:
        config = changed_config(json.loads(members["config.json"]), chance)
        members["config.json"] = text_of(config).encode()
    elif kind < 0.9:
        stream = io.BytesIO(members["model.weights.h5"])
        with h5py.File(stream, "a") as file:
            change_arrays(file, chance)
        members["model.weights.h5"] = stream.getvalue()
    elif kind < 0.93:
        del members[chance.choice(list(members))]
    elif kind < 0.96:
        name = chance.choice(
            ("../../evil", "/tmp/evil", "C:\\evil", "assets/../../evil", "a\\..\\b")
        )
        members[name] = b"evil"
    elif kind < 0.98:
        members[chance.choice(list(members))] = bytes(2**28)
    else:
        members["model.weights.h5"] = b"no HDF5"
    packed = zipfile.ZIP_DEFLATED if chance.random() < 0.3 or kind > 0.95 else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", packed) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.comment = bytes(SEAL_SIZE)
    whole = path.read_bytes()
    path.write_bytes(sealed(whole, Archive.seal_place(len(whole))))


def sealed(data: bytes, place: int) -> bytes:
    """A file with its digest."""
    room = bytearray(data)
    seal(room, place)
    return bytes(room)


def bytewise(base: bytes, ending: str, path: Path, chance: random.Random) -> None:
    """Write a file of other bytes, with the digest that it had."""
    data = bytearray(base)
    for _ in range(chance.choice((1, 1, 2, 5, 50))):
        place = chance.randrange(len(data))
        size = min(chance.choice((1, 4, 64, 1024)), len(data) - place)
        kind = chance.randrange(7)
        if kind < 2:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 2:
            data[place : place + size] = chance.randbytes(size)
        elif kind == 3:
            data[place : place + size] = bytes(size)
        elif kind == 4 and len(data) > 2 * size:
            del data[place : place + size]
        elif kind == 5:
            data[place:place] = chance.randbytes(size)
        elif len(data) > 100:
            del data[max(place, 1) :]
    path.write_bytes(data)


KINDS: dict[str, Callable] = {"structural": structural, "bytewise": bytewise}


def harm(kind: str, result: dict, whole: str) -> str:
    """What is wrong with what became of a file; "" if nothing is."""
    if "loaded" in result and kind == "bytewise" and result["loaded"] != whole:
        return "another model was loaded"
    for wrong in ("crashed", "hung", "wrong error"):
        if wrong in result:
            return f"{wrong}: {result[wrong]}"
    if result["grown"] > MEBIBYTES:
        return f"grew by {result['grown']} MiB"
    message = result.get("refused", "message: some").partition(": ")[2]
    return "" if message else "refused without a message"


def run(base: Path, number: int, seed: int = 0) -> tuple[collections.Counter, list[str]]:
    """How often each thing became of mutated files, and the harm that was done."""
    ending = base.suffix
    outcomes: collections.Counter = collections.Counter()
    harms = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "inner"
        folder.mkdir()
        loader = Loader(folder)
        whole = loader.load(base, 120)["loaded"]
        path = folder / f"file{ending}"
        try:
            for i in range(number):
                chance = random.Random(f"{seed} {i}")
                kind = chance.choice(list(KINDS))
                KINDS[kind](base.read_bytes(), ending, path, chance)
                fresh = loader.process is None
                result = loader.load(path, 120 if fresh else SECONDS)
                found = harm(kind, result, whole)
                what = found or next(iter(result))
                if what == "loaded":
                    what = "loaded whole" if result["loaded"] == whole else "loaded as another"
                outcomes[f"{kind}: {what}"] += 1
                if found:
                    harms.append(f"{seed} {i} {kind}: {found}")
                left = sorted(os.listdir(name)) + sorted(os.listdir(folder))
                if left != ["inner", path.name]:
                    harms.append(f"{seed} {i} {kind}: wrote {left}")
        finally:
            loader.stop()
    return outcomes, harms


def base_file(folder: Path, ending: str) -> Path:
    """A sealed file of a small converted model of many kinds of parts."""
    import keras
    from keras import layers

    import keras_qwrap as qi

    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(20, 3, name="conv")(inputs)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    inner = keras.Sequential([keras.Input((4, 4, 20)), layers.Flatten(), layers.Dense(3)])
    model = keras.Model(inputs, layers.Dense(2, activation="softmax")(inner(x)))
    images = np.random.default_rng(0).normal(size=(8, 6, 6, 2)).astype("float32")
    recipe = qi.Recipe(qi.WeightsSpec(4), qi.ActivationSpec(8))
    converted = qi.convert_to_inferable(qi.quantize_model(model, recipe, images, verbose=0))
    converted.compile(loss=keras.losses.MeanSquaredError(), metrics=[keras.metrics.MeanIoU(2)])
    path = folder / f"base{ending}"
    qi.save_quantized_model(converted, path)
    return path


def main() -> int:
    """Print what became of the files; 1 if harm was done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ending", choices=(".keras", ".h5"))
    parser.add_argument("number", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        base = base_file(Path(name), options.ending)
        outcomes, harms = run(base, options.number, options.seed)
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:6d}  {outcome}")
    print(*harms, sep="\n")
    return 1 if harms else 0


if __name__ == "__main__":
    sys.exit(main())
