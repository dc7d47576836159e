"""Command line as ``python -m fastcov_detection``."""

import sys

from fastcov_detection.cli import main

sys.exit(main())
