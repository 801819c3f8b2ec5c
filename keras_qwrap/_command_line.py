"""What `python -m keras_qwrap` takes; the help, the version and mistakes are printed here.

Python imports a package before its `__main__`, and this one imports TensorFlow, which takes seconds
and prints lines of its own. So this comes first of all, and needs nothing else.
"""

import argparse
import sys
from pathlib import Path

from keras_qwrap._version import __version__


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m keras_qwrap", description="Quantization-aware training for Keras 3."
    )
    made.add_argument("--version", action="version", version=f"keras_qwrap {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="command")
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
    return made


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


def _is_about_to_run() -> bool:
    """Whether this is `python -m keras_qwrap`, whose `__main__` Python is still looking for.

    "-m" stands in the place of the module's name for so long.
    """
    before = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv[1:])]
    return sys.argv[:1] == ["-m"] and before[-2:] == ["-m", "keras_qwrap"]


if _is_about_to_run():
    parser().parse_args()
