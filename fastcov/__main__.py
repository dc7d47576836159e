"""Command line as ``python -m fastcov``."""

import sys

from fastcov.cli import main

sys.exit(main())
