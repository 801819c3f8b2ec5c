"""`python -m keras_qwrap`."""

import sys

from keras_qwrap.cli import main

if __name__ == "__main__":
    sys.exit(main())
