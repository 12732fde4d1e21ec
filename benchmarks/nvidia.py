"""What do NVIDIA's tools say of the kernels: bad accesses, races, and bytes moved in device memory?

A machine without them is no failure: "absent" then holds a sentence.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

# A test under a sanitizer takes ten times as long and more; these run every kind of launch.
SMALL_TESTS = ("tests/test_fused.py", "-k", "rounds_equal and (default or stochastic or clip)")
FOUND = 99
DRAM_METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")


def find(tool: str) -> str | None:
    """Return the path of a tool on PATH or in the CUDA folder, or None."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders = [Path(home, sub) for home in (*homes, "/usr/local/cuda") for sub in ("bin", "compute-sanitizer")]
    folders += sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)
    return shutil.which(tool) or shutil.which(tool, path=os.pathsep.join(map(str, folders)))


def run(command: Sequence[str], deadline: float, **variables: str) -> tuple[int | None, str]:
    """Return the exit code, None for one stopped at the deadline, and what it printed."""
    # A session of its own, so that what a tool started ends with it.
    process = subprocess.Popen(
        command,
        cwd=record.ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output


def sanitize(tool: str, deadline: float) -> dict[str, Any]:
    """Run a few GPU tests under compute-sanitizer's `tool`; "ok" is False only where it found something or they failed.

    Args:
        tool: "memcheck" or "racecheck".
        deadline: Reading of `time.monotonic` at which it is stopped.
    """
    program = find("compute-sanitizer")
    if program is None:
        return {"tool": tool, "ok": True, "absent": "compute-sanitizer is neither on PATH nor in the CUDA folder"}
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    if tool == "memcheck":
        # torch asks the driver for what it may not have; that is no bad access.
        command += ["--report-api-errors", "no"]
    command += [sys.executable, "-m", "pytest", "-m", "gpu", *SMALL_TESTS, "-x", "-q"]
    command += ["-p", "no:benchmark", "-p", "no:cacheprovider"]
    started = time.monotonic()
    # Without the caching allocator every tensor is an allocation that the tool knows the end of.
    code, output = run(command, deadline, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    seconds = round(time.monotonic() - started, 1)
    return {"tool": tool, "seconds": seconds, "command": command} | judge(code, output)


def judge(code: int | None, output: str) -> dict[str, Any]:
    """Return "ok", the errors and hazards that compute-sanitizer counted, or why it counted none."""
    tail = output[-2000:]
    if "Device not supported" in output:
        return {"ok": True, "absent": "compute-sanitizer does not support this device: under gVisor it cannot"}
    if code is None:
        return {"ok": True, "absent": "compute-sanitizer did not end within the time limit", "tail": tail}
    found = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    passed = re.search(r"(\d+) passed", output)
    result = {"found": sum(int(a or b) for a, b in found), "passed": int(passed[1]) if passed else 0}
    # Without a summary it never looked, and without a passed test there was nothing to look at.
    result["ok"] = code == 0 and bool(found) and not result["found"] and result["passed"] > 0
    return result if result["ok"] else result | {"exit_code": code, "tail": tail}


def dram_bytes(deadline: float, peer: str) -> dict[str, Any]:
    """Return the bytes that one step of 64M elements by `peer` read and wrote in device memory, and those counted."""
    program = find("ncu")
    if program is None:
        return {"absent": "ncu is neither on PATH nor in the CUDA folder"}
    # Of three steps the last: the first does not read the state.
    command = [program, "--clock-control", "none", "--csv", "--print-units", "base"]
    command += ["--metrics", ",".join(DRAM_METRICS)]
    command += ["--kernel-name", "step_kernel", "--launch-skip", "2", "--launch-count", "1"]
    command += [sys.executable, "-m", "benchmarks.steps", "profile", "--peer", peer]
    code, output = run(command, deadline)
    if code is None:
        return {"absent": "ncu did not end within the time limit"}
    metrics = read_metrics(output)
    counted = re.search(r'"counted_bytes": (\d+)', output)
    if code or not counted or set(DRAM_METRICS) - metrics.keys():
        return {"absent": f"ncu gave no counters (exit code {code}): {output[-500:]}"}
    read, written = (metrics[name] for name in DRAM_METRICS)
    return {"peer": peer, "read_bytes": read, "written_bytes": written, "counted_bytes": int(counted[1])}


def read_metrics(output: str) -> dict[str, float]:
    """Return the metrics of one kernel from ncu's CSV, among whatever the program and ncu print besides."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    header = next((i for i, line in enumerate(lines) if '"Metric Name"' in line), len(lines))
    rows = csv.DictReader(lines[header:])
    values = {row["Metric Name"]: row["Metric Value"].replace(",", "") for row in rows}
    return {name: float(value) for name, value in values.items() if re.fullmatch(r"[\d.e+]+", value)}
