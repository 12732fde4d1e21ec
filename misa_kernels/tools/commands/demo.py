"""Train a small real model by seven methods at equal state memory; print a table and draw what happened."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import misa_kernels

EXAMPLES = """examples:
  python -m misa_kernels demo --quick            a minute, rough figures
  python -m misa_kernels demo --out out/demo     5 to 10 minutes on two cores

It runs examples/demo.py of a checkout: the current folder, or the one that is installed with `pip install -e .`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's arguments."""
    parser.add_argument("--quick", action="store_true", help="about a minute: short trainings, rough figures")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and draws (%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Run the demo of the checkout.

    Raises:
        ValueError: If there is no checkout.
    """
    roots = [Path.cwd(), Path(misa_kernels.__file__).parents[1]]
    root = next((root for root in roots if (root / "examples" / "demo.py").is_file()), None)
    if root is None:
        raise ValueError("the demo is not in the installed package: clone the repository and run `make demo` there")
    command = [sys.executable, "-m", "examples.demo", "--out", str(options.out.resolve()), "--seed", str(options.seed)]
    command += ["--quick"] * options.quick + (["--device", options.device] if options.device else [])
    return subprocess.run(command, cwd=root).returncode
