"""How does a folder's command find the measurement that it names?"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping


def run(folder: str, modules: Mapping[str, str]) -> int:
    """Run the `main` of the module that the first argument names with the others; return its exit code.

    Args:
        folder: Of `benchmarks`.
        modules: By the name of the measurement, the module in the folder.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{folder}", add_help=len(sys.argv) < 3)
    parser.add_argument("measurement", choices=modules, help="--help after it tells its options")
    chosen = parser.parse_args(sys.argv[1:2]).measurement
    code: int | None = importlib.import_module(f"benchmarks.{folder}.{modules[chosen]}").main(sys.argv[2:])
    return code or 0
