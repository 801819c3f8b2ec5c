"""The command line: `python -m keras_qwrap`."""

import argparse
import importlib.util
import json
import logging
import sys
from collections.abc import Sequence

from keras_qwrap._command_line import parser
from keras_qwrap.reports.inspection import inspect_file

DEMO_PACKAGES = ("rich", "sklearn")
"""Modules of the extra `demo`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0 for success, 1 for failure, 2 for what is missing."""
    options = parser().parse_args(arguments)
    return _demo(options) if options.command == "demo" else _inspect(options)


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
