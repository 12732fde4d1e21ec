"""Runs a stage on a GPU: `python -m benchmarks.gpu --stage first`."""

import sys

from benchmarks.gpu.stages import main

sys.exit(main())
