"""Command line as ``python -m fastcov_detection``."""

import sys

from fastcov_detection.cli import main

if __name__ == "__main__":
    sys.exit(main())
