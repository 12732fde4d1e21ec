"""Which parts run, how long each may take, and how what they report comes onto the disk."""

from __future__ import annotations

import collections
import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.gpu.first.part import MARK, kill_tree

# A call to such a machine should last five minutes at most, and the stage 280 s: torch is imported before these begin,
# from a cold disk.
LIMIT_S = 265.0
# What each part may take at most, in the order of their worth. What one leaves, those after it have.
PARTS = {"engagement": 25.0, "parity": 60.0, "step": 70.0, "train": 80.0, "eight": 45.0, "sanitizer": 240.0}
# Before it is killed, a part has this long to end what it has begun.
GRACE_S = 4.0
# Of what else a part printed, lines that are kept where it failed.
TAIL = 25


def run(device: torch.device, names: Sequence[str], out: Path, deadline: float) -> int:
    """Run parts in turn, write first.json whenever one reports, print the table; 1 if something of ours failed.

    Args:
        device: Where.
        names: Keys of `PARTS`, which run in the order of that.
        out: Folder of the record.
        deadline: Reading of `time.monotonic` at which all have ended.
    """
    content = record.environment(device) | {"stage": "first", "parts": {}}
    for name in [name for name in PARTS if name in names]:
        begun = time.monotonic()
        until = min(begun + PARTS[name], deadline)
        part: dict[str, Any] = {"state": "running", "limit_s": round(until - begun, 1)}
        content["parts"][name] = part
        if until - begun <= GRACE_S:
            part["state"] = "left out at the time limit"
        path = record.write(out, "first", content)
        if part["state"] != "running":
            continue
        command = [sys.executable, "-m", "benchmarks.gpu.first.part", name, "--device", device.type, "--leashed"]
        command += ["--until", f"{until - GRACE_S:.3f}", "--record", str(path)]
        for report in reports(command, until):
            part |= report | {"seconds": round(time.monotonic() - begun, 1)}
            record.write(out, "first", content)
        say(f"{name}: {part['state']} after {part['seconds']} s")
    # Here, since a record must come of a package that does not import, too.
    from benchmarks.gpu.first import table

    content["goals"] = table.goals(content["parts"])
    say(str(record.write(out, "first", content)))
    say(table.table(content))
    return 0 if table.sound(content["parts"]) else 1


def say(text: str) -> None:
    """Print, if anybody still reads."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def reports(command: Sequence[str], until: float) -> Iterator[dict[str, Any]]:
    """Yield what a part reports, and at its end "state", with the last lines of what else it printed if that is bad.

    At `until`, a reading of `time.monotonic`, it is killed with all that it started.
    """
    process = subprocess.Popen(
        command,
        cwd=record.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=pass_on, args=(process.stdout, lines), daemon=True).start()
    tail: collections.deque[str] = collections.deque(maxlen=TAIL)
    state = ""
    while not state:
        left = until - time.monotonic()
        try:
            line = lines.get(timeout=max(left, 0.0))
        except queue.Empty:
            left = 0.0
        # Asked first, for a part may print without end.
        if left <= 0:
            state = "stopped at its limit"
        elif line is None:
            code = wait(process, max(left, 1.0))
            state = f"failed with exit code {code}" if code else "done" if code == 0 else "stopped at its limit"
        elif (report := read(line)) is not None:
            yield report
        elif line.strip():
            tail.append(line.rstrip()[:300])
    if process.poll() is None:
        kill_tree(process.pid)
        # A process may hang in the driver.
        wait(process, 5.0)
    yield {"state": state} | ({} if state == "done" else {"tail": list(tail)})


def read(line: str) -> dict[str, Any] | None:
    """Return the report in a line, None where there is none."""
    with contextlib.suppress(ValueError):
        found = json.loads(line.removeprefix(MARK)) if line.startswith(MARK) else None
        if isinstance(found, dict):
            return found
    return None


def wait(process: subprocess.Popen[str], seconds: float) -> int | None:
    """Return the exit code of a process, None if it has not ended by then."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(seconds)
    return None


def pass_on(stream: Any, lines: queue.SimpleQueue[str | None]) -> None:
    """Put every line of a stream into a queue, and None at its end."""
    for line in stream:
        lines.put(line)
    lines.put(None)
