"""Runs one of the measurements of a step: `python -m benchmarks.step cpu`."""

import sys

from benchmarks.commands import run

sys.exit(run("step", {"cpu": "cpu", "growth": "growth", "round_end": "round_end", "launcher": "launcher"}))
