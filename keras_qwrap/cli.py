"""The command line: `python -m keras_qwrap`."""

import argparse
import importlib.util
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from keras_qwrap._version import __version__
from keras_qwrap.reports.inspection import inspect_file

DEMO_PACKAGES = ("rich", "sklearn")
"""Modules of the extra `demo`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0 for success, 1 for failure, 2 for what is missing."""
    options = _parser().parse_args(arguments)
    return _demo(options) if options.command == "demo" else _inspect(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m keras_qwrap", description="Quantization-aware training for Keras 3."
    )
    parser.add_argument("--version", action="version", version=f"keras_qwrap {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="train, quantize, convert, save, reload and compare a small model",
        description="Trains a convolutional network on scikit-learn's digits, in float and then "
        "with quantization; converts it, saves it, reloads it in a new process, and compares the "
        "outputs. The exit status is 1 if they differ.",
    )
    demo.add_argument("--bits", type=_bits, default=8, help="width of the weights, 2 to 16 (8)")
    demo.add_argument(
        "--epochs", type=_count, default=12, help="in float; half as many with quantization (12)"
    )
    demo.add_argument(
        "--seed", type=_seed, default=0, help="of data split, weights and batches (0)"
    )
    demo.add_argument("--output", type=_folder, help="folder to keep the saved models in")
    inspect = commands.add_parser(
        "inspect",
        help="show what a saved model holds",
        description="Shows the quantized layers, codes, sizes, versions and digest of a .keras or "
        ".h5 file, without building the model. The exit status is 1 if the file cannot be read.",
    )
    inspect.add_argument("file", metavar="FILE", help="a .keras or .h5 file")
    inspect.add_argument("--json", action="store_true", help="everything, as JSON")
    return parser


def _whole(text: str, lowest: int, highest: float) -> int:
    if not text.isdecimal() or not lowest <= int(text) <= highest:
        limit = f"from {lowest} to {highest}" if highest < float("inf") else f"from {lowest}"
        raise argparse.ArgumentTypeError(f"received {text!r}, expected a whole number {limit}")
    return int(text)


def _bits(text: str) -> int:
    return _whole(text, 2, 16)


def _count(text: str) -> int:
    return _whole(text, 1, float("inf"))


def _seed(text: str) -> int:
    return _whole(text, 0, 2**32 - 1)


def _folder(text: str) -> str:
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"received {text!r}, expected a folder: {error}"
        ) from error
    return text


def _inspect(options: argparse.Namespace) -> int:
    try:
        found = inspect_file(options.file)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)
    return 0


def _demo(options: argparse.Namespace) -> int:
    missing = [name for name in DEMO_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"The demo needs {' and '.join(missing)}, which cannot be imported. Install the extra "
            "`demo`: python -m pip install 'keras_qwrap[demo]', or '.[demo]' in a checkout.",
            file=sys.stderr,
        )
        return 2
    for library in ("absl", "tensorflow"):
        logging.getLogger(library).setLevel(logging.ERROR)
    from keras_qwrap import demo

    return demo.run(options.bits, options.epochs, options.seed, options.output)
