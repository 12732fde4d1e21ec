"""Runs one of the measurements of whole iterations: `python -m benchmarks.train e2e`."""

import sys

from benchmarks.commands import run

sys.exit(run("train", {"e2e": "e2e", "memory": "training_memory", "slices": "slices"}))
