"""What do NVIDIA's tools say of the kernels: bad accesses, races, and bytes moved in device memory?

A machine without them is no failure: "absent" then holds a sentence.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.gpu.first.part import kill_tree

# Every kind of launch of both kernels, on tensors that end where their allocation does. Some 25 variants for Triton.
SMALL_TESTS = ("tests/kernels/test_cuda.py", "tests/kernels/test_fused.py", "-m", "gpu", "-k")
SMALL_TESTS += ("large or few or rounds_equal and dtype1 and (stochastic or int8)",)
PYTEST = ("-x", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider")
# Of mangled names: Triton's kernels, and those in the namespace of csrc. What torch launches besides is not looked at,
# or a run would take minutes.
KERNELS = "regex=^(step|collect|close)_kernel|4misa"
FOUND = 99
# What the warm-up may take of the time, and what is left for the tool to sum up when the tests are stopped.
WARM_UP, GRACE_S = 0.4, 8.0
# Stops the tests in time for the tool around them to say what it has seen of those that ended.
STOPPED = """
import signal, sys, pytest
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))
code = pytest.main(sys.argv[2:])
sys.exit(0 if code == pytest.ExitCode.INTERRUPTED else code)
"""
DRAM_METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")


def find(tool: str) -> str | None:
    """Return the path of a tool on PATH or in the CUDA folder, or None."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders = [Path(home, sub) for home in (*homes, "/usr/local/cuda") for sub in ("bin", "compute-sanitizer")]
    folders += sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)
    return shutil.which(tool) or shutil.which(tool, path=os.pathsep.join(map(str, folders)))


def run(command: Sequence[str], deadline: float, **variables: str) -> tuple[int | None, str]:
    """Return the exit code, None for one stopped at the deadline, and what it printed until then."""
    # A file, because whoever has a pipe open can be waited for without end. A session of its own, so that what a tool
    # started and left ends with it.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=record.ROOT,
            env=os.environ | variables | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = None
        try:
            code = process.wait(timeout=max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return code, output.read().decode(errors="replace")


def sanitize(tool: str, deadline: float) -> dict[str, Any]:
    """Run a few GPU tests under compute-sanitizer's `tool`; "ok" is False only where it found something or they failed.

    Args:
        tool: "memcheck" or "racecheck".
        deadline: Reading of `time.monotonic` at which it is stopped; tests that have ended by then count.

    Returns:
        "tool"; "ok"; "found", errors; "warnings"; "passed", tests; "seconds"; "command"; "planted", kernels of which
        memcheck saw an overrun that was made for it, where there was time to ask; "tail", the end of what it printed
        where that is not as it should be; or "absent", a sentence that says why there is no finding.
    """
    program = find("compute-sanitizer")
    if program is None:
        return {"tool": tool, "ok": True, "absent": "compute-sanitizer is neither on PATH nor in the CUDA folder"}
    started = time.monotonic()
    # It waits for the first call of CUDA, for 10 seconds of its own accord: torch may still be loading then.
    options = ["--target-processes", "application-only", "--launch-timeout", "0", "--kernel-name", KERNELS]
    options = [program, "--tool", tool, "--error-exitcode", str(FOUND), *options]
    if tool == "memcheck":
        # torch asks the driver for what it may not have; that is no bad access.
        options += ["--report-api-errors", "no"]
    # Triton compiles here, on several cores, and no tool is in the way.
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    warm_up = [sys.executable, "-m", "pytest", *SMALL_TESTS, *PYTEST, *workers]
    run(warm_up, started + WARM_UP * (deadline - started))
    # Without the caching allocator every tensor is an allocation that the tool knows the end of.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    seconds = max(deadline - time.monotonic() - GRACE_S, 1.0)
    command = [*options, sys.executable, "-c", STOPPED, f"{seconds:.1f}", *SMALL_TESTS, *PYTEST]
    result = judge(*run(command, deadline, **alone))
    if tool == "memcheck" and result["ok"] and "absent" not in result and time.monotonic() + GRACE_S < deadline:
        options += ["--destroy-on-device-error", "kernel", sys.executable, "-c"]
        code, output = run([*options, "from benchmarks.gpu import nvidia; nvidia.overrun()"], deadline, **alone)
        if code is not None:
            result["planted"] = sorted(set(re.findall(r"= +at .*?(step|update)_kernel", output)))
            if "step" not in result["planted"]:
                result |= {"absent": "memcheck does not see an overrun that was planted", "tail": output[-2000:]}
    return {"tool": tool, "seconds": round(time.monotonic() - started, 1), "command": command} | result


def overrun() -> None:
    """Take steps that read beyond a gradient, on both kernels where they are: what memcheck has to find."""
    # Imported here: who asks for bytes of device memory need not wait for torch and Triton.
    import numpy as np
    import torch

    from misa_kernels.kernels import native
    from misa_kernels.kernels.launch import TritonTable
    from misa_kernels.memory.storage import Storage

    device, zero, dtypes = torch.device("cuda"), np.zeros(1, dtype=np.int64), [torch.float32]
    for table in (TritonTable, native.CudaTable) if native.path("cuda") else (TritonTable,):
        state = {name: torch.zeros(512, device=device) for name in ("exp_avg", "exp_avg_sq")}
        weight, grad = torch.zeros(512, device=device), torch.zeros(500, device=device)
        rows = table(zero + 512, zero, zero, zero, dtypes, dtypes, {torch.float32: state}, Storage(), device)
        rows.step([weight.data_ptr()], [grad.data_ptr()], [[1e-3, 0.9, 0.99, 1e-8, 0.0]])
        # What is wrong shows when it is waited for, and the next kernel has its turn nevertheless.
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()


def judge(code: int | None, output: str) -> dict[str, Any]:
    """Return "ok", the errors and warnings that compute-sanitizer counted, or why it counted none."""
    tail = {"tail": output[-2000:]}
    if "Device not supported" in output:
        return {"ok": True, "absent": "compute-sanitizer does not support this device: under gVisor it cannot"}
    sums = re.findall(r"ERROR SUMMARY: (\d+) |RACECHECK SUMMARY: .*\((\d+) errors?, (\d+) warnings?\)", output)
    # One by one, where it was killed before it could sum up; they may stand behind pytest's dots.
    reported = len(re.findall(r"={5} (?:Invalid __|Error: Race reported)", output))
    errors = max(sum(int(accesses or races) for accesses, races, _ in sums), reported)
    warnings = sum(int(hazards or 0) for _, _, hazards in sums)
    ends = re.findall(r"^.* in \d+\.\d+s.*$", output, re.MULTILINE)
    passed, failed = (
        re.search(rf"(\d+) {outcome}", ends[-1] if ends else "") for outcome in ("passed", "(?:failed|error)")
    )
    result: dict[str, Any] = {"found": errors, "warnings": warnings, "passed": int(passed[1]) if passed else 0}
    # racecheck warns of hazards that warps have on purpose, and may give its exit code for them.
    ended = code == 0 or (code == FOUND and warnings > 0)
    sound = ended and bool(sums) and not errors and not failed
    stopped = code is None or "KeyboardInterrupt" in output
    if stopped and not errors and not failed and not (sound and result["passed"]):
        return {"ok": True, "absent": "compute-sanitizer did not end a test within the time limit"} | tail
    if stopped:
        result["stopped"] = "at the time limit"
    # Without a summary it never looked, and without a passed test there was nothing to look at.
    result["ok"] = sound and result["passed"] > 0
    return result if result["ok"] and not warnings else result | {"exit_code": code} | tail


def dram_bytes(deadline: float, peer: str) -> dict[str, Any]:
    """Return the bytes that one step of 64M elements by `peer` read and wrote in device memory, and those counted."""
    program = find("ncu")
    if program is None:
        return {"absent": "ncu is neither on PATH nor in the CUDA folder"}
    # Of three steps the last: the first does not read the state.
    command = [program, "--clock-control", "none", "--csv", "--print-units", "base"]
    command += ["--metrics", ",".join(DRAM_METRICS)]
    command += ["--kernel-name", "step_kernel", "--launch-skip", "2", "--launch-count", "1"]
    command += [sys.executable, "-m", "benchmarks.step.apart", "profile", "--peer", peer]
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
