"""What have the commands in common? The name of a measurement, device, threads, time limit, folder of the record."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.tables import aligned


def run(folder: str, modules: Mapping[str, str]) -> int:
    """Run the `main` of the module that the first argument names with the others; return its exit code.

    Args:
        folder: Of `benchmarks`.
        modules: By the name of the measurement, the module in the folder.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{folder}", add_help=len(sys.argv) < 3)
    parser.add_argument("measurement", choices=modules, help="--help after it tells its options")
    chosen = parser.parse_args(sys.argv[1:2]).measurement
    code: int = importlib.import_module(f"benchmarks.{folder}.{modules[chosen]}").main(sys.argv[2:])
    return code


def parser(
    command: str, about: str | None, threads: int | None = None, device: bool = True, limit: float | None = None
) -> argparse.ArgumentParser:
    """Return a parser of --out and --threads, and of --device and --time-limit where there are such.

    Args:
        command: Behind "python -m benchmarks.".
        about: The docstring of the module, whose first line is shown.
        threads: The default; None for what torch takes.
        device: Whether there is a choice.
        limit: The default of the time limit in seconds; None if there is none.
    """
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{command}", description=(about or "").splitlines()[0])
    made.add_argument("--out", type=Path, help="folder of the record")
    made.add_argument("--threads", type=int, default=threads, help=f"of a CPU; default {threads or 'what torch takes'}")
    if device:
        made.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    made.set_defaults(time_limit=None)
    if limit is not None:
        made.add_argument("--time-limit", type=float, default=limit, help="seconds after which nothing new starts")
    return made


def parse(made: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments, "device" as torch's and "deadline" as a reading of `time.monotonic`; set the threads."""
    args = made.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device = torch.device(getattr(args, "device", "cpu"))
    limit = args.time_limit if args.time_limit is not None else float("inf")
    args.deadline = time.monotonic() + limit
    return args


def measured(
    name: str,
    device: torch.device,
    out: Path | None,
    states: Iterable[Mapping[str, Any]],
    lines: Callable[[dict[str, Any]], list[str]],
) -> dict[str, Any]:
    """Write a record after every state of a measurement, print its tables at the end, and return it.

    Args:
        name: Of the record.
        device: What it was taken on.
        out: Folder of the record; none is written if None.
        states: What the record holds besides, so far.
        lines: Return its tables in Markdown.
    """
    content = record.environment(device) | {"load_before": os.getloadavg()[0]}
    for state in states:
        content |= state
        if out is not None:
            record.write(out, name, content)
    print(aligned(lines(content)), flush=True)
    if out is not None:
        print(record.write(out, name, content))
    return content
