"""Command line as ``python -m fastcov``."""

import sys

from fastcov.cli import main

if __name__ == "__main__":
    sys.exit(main())
