"""Writes one of two files in turn, for ever, without TensorFlow: to be killed."""

import importlib.util
import itertools
import shutil
import sys
from functools import partial


def load(path):
    """A module of the package without the package, which would import TensorFlow."""
    spec = importlib.util.spec_from_file_location("containers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(module, path, first, second):
    containers = load(module)
    for source in itertools.cycle((first, second)):
        containers.write_whole(path, partial(shutil.copyfile, source))
        print(source, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
