"""Compares what is counted with the record: `python -m benchmarks.gate`."""

import sys

from benchmarks.gate.counts import main

sys.exit(main())
