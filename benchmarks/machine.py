"""Where and with what the figures of a benchmark were measured."""

import datetime
import os
import pathlib
import platform
from importlib.metadata import version

import keras

import keras_qwrap as qi


def machine() -> dict[str, str]:
    """Date, processor and versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].partition(":")[2].strip() if names else model
    return {
        "date": datetime.date.today().isoformat(),
        "processor": f"{model}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "tensorflow": version("tensorflow"),
        "keras": keras.__version__,
        "keras_qwrap": qi.__version__,
    }
