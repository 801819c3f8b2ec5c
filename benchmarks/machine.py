"""Where and with what the figures of a benchmark were measured, and the files that hold them."""

import datetime
import importlib
import json
import os
import pathlib
import platform
from collections.abc import Sequence

FOLDER = pathlib.Path(__file__).parent


def machine(packages: Sequence[str] = ("tensorflow", "keras", "keras_qwrap")) -> dict[str, str]:
    """Date, processor and versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].partition(":")[2].strip() if names else model
    about = {
        "date": datetime.date.today().isoformat(),
        "processor": f"{model}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }
    return about | {name: importlib.import_module(name).__version__ for name in packages}


def write(name: str, title: str, about: dict[str, str], data: dict, tables: list[str]) -> None:
    """What `python -m benchmarks.<name>` found, as JSON and as tables to read."""
    text = json.dumps({"machine": about} | data, indent=2)
    (FOLDER / f"{name}.json").write_text(text + "\n")
    lines = [f"# {title}", "", f"Written by `python -m benchmarks.{name}`.", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    (FOLDER / f"{name}.md").write_text("\n".join([*lines, "", *tables]) + "\n")
