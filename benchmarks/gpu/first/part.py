"""A part of the stage `first`, in a process of its own.

python -m benchmarks.gpu.first.part NAME --device cpu

Its record so far is a line of JSON each time that something is known. It ends with whoever holds its standard input.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from benchmarks.gpu import wheels

# What a line of the record begins with, among whatever else is printed.
MARK = "record: "


def main(argv: list[str] | None = None) -> int:
    """Run the part that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.first.part", description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a module of benchmarks.gpu.first")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--until", type=float, help="reading of time.monotonic() after which nothing new is begun")
    parser.add_argument("--record", type=Path, help="what the parts before have found")
    parser.add_argument("--leashed", action="store_true", help="end with all children when standard input does")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + 60 if args.until is None else args.until
    if args.leashed:
        threading.Thread(target=end_with_stdin, daemon=True).start()
    sys.path.append(str(wheels.FOLDER))
    so_far = json.loads(args.record.read_text())["parts"] if args.record else {}
    module = importlib.import_module(f"benchmarks.gpu.first.{args.name}")
    for found in module.measure(torch.device(args.device), deadline, so_far):
        # On a line of its own, whatever else has begun one.
        print("\n" + MARK + json.dumps(found), flush=True)
    return 0


def end_with_stdin() -> None:
    """Kill this process and all that it started when whoever started it is gone: nobody reads what is measured then."""
    # Not through sys.stdin, whose lock a main thread that exits would have to wait for.
    while os.read(0, 1):
        pass
    kill_tree(os.getpid())


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants, those in sessions of their own too, which a signal to a group would miss."""
    pids = [pid]
    for parent in pids:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                pids += map(int, children.read_text().split())
    # Where the system does not list children, those of its session; this process, if it is among them, last.
    with contextlib.suppress(ProcessLookupError):
        if pid != os.getpid() and os.getsid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
    for each in reversed(pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
