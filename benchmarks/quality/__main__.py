"""Trains what is missing, or makes its table: `python -m benchmarks.quality run`."""

import sys

from benchmarks.quality.command import main

sys.exit(main())
