"""Does MISA engage here? Who steps which weights, what the memory gives, and what a step asks of the host."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.step.update import REPEATS, Timer, failure, launches_of, wait
from misa_kernels import MISA, kernels
from misa_kernels.kernels import native
from misa_kernels.memory.storage import PRECISIONS, Storage

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = ("fp32", "int8", "bf16", "fp8")
# Six matrices of which two or so are active, beside an always-on vector; three rounds and a step of a fourth. Of sizes
# that share a launch.
SHAPES = [(64, 96), (96, 64), (64, 64), (128, 32), (36, 65), (64, 96)]
INNER_STEPS, STEPS = 3, 10
LR = 1e-2


def measure(device: torch.device, deadline: float, so_far: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what is known so far: "machine", "backends", "copy_gb_per_s", "step", "asks", "libraries"; see below."""
    # They compile while the rest is measured.
    builds = start_builds(device)
    found: dict[str, Any] = {"machine": machine(device)}
    for name, look in (
        ("backends", backends),
        ("step", equals_reference),
        ("asks", asks),
        ("copy_gb_per_s", lambda device: Timer(device).copy_bandwidth(REPEATS[device.type])),
    ):
        begun = time.monotonic()
        try:
            found[name] = look(device)
        # Whatever one look fails at, the others are taken; the record shows the failure.
        except Exception as error:
            found[name] = failure(error)
        found.setdefault("seconds_of", {})[name] = round(time.monotonic() - begun, 2)
        yield found
    found["libraries"] = end_builds(builds, deadline)
    # Once more, with what has been built meanwhile.
    found["backends"] = backends(device)
    yield found


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the device says of itself."""
    if device.type == "cpu":
        return {"capability": torch.backends.cpu.get_cpu_capability()}
    properties = torch.cuda.get_device_properties(device)
    query = ("name", "driver_version", "clocks.sm", "clocks.mem", "power.limit", "temperature.gpu", "utilization.gpu")
    return {
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "free_bytes": torch.cuda.mem_get_info(device)[0],
        "nvidia_smi": record.output_of("nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader"),
    }


def backends(device: torch.device) -> dict[str, str]:
    """Return who steps weights of each dtype, kept and stored in each way, and why others do not."""
    found = {}
    with warnings.catch_warnings():
        # That the reference is slow is what this tells.
        warnings.simplefilter("ignore")
        for name, dtype in DTYPES.items():
            for precision in PRECISIONS if name == "bf16" else PRECISIONS[:1]:
                for state in FORMATS:
                    way = name if name == "fp32" else f"{name} {precision}"
                    storage = Storage(state, precision)
                    found[f"{way}, {state}"] = kernels.select("auto", device, {dtype}, storage).name
    return found | {f"no {name}": why for name in ("triton", "cuda", "cpu") if (why := kernels.unusable(name))}


def small_run(device: torch.device, backend: str) -> tuple[MISA, list[Tensor], Callable[[], None]]:
    """Return MISA of a few bfloat16 matrices, its weights, and what gives those that train their next gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [*SHAPES, (100,)]
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device, torch.bfloat16)) for shape in shapes]
    groups = [{"params": params[:-1], "role": "sampled"}, {"params": params[-1:], "role": "dense"}]
    optimizer = MISA(groups, lr=LR, delta=0.4, inner_steps=INNER_STEPS, backend=backend)

    def feed() -> None:
        for param in params:
            gradient = torch.randn(param.shape, generator=generator).to(device, torch.bfloat16)
            param.grad = gradient if param.requires_grad else None

    return optimizer, params, feed


def equals_reference(device: torch.device) -> dict[str, Any]:
    """Train over some rounds beside the reference, masters and all.

    Returns:
        "backend"; "first_step_s", with what is compiled in it; "other_sets", rounds in which others were drawn; "off",
        elements of weights that differ by more than a unit in the last place, which the last bit of a master may
        decide, and more than float32 rounds an update; "elements".
    """
    runs = [small_run(device, name) for name in ("auto", "reference")]
    first_s, other_sets = 0.0, 0
    for step in range(STEPS):
        for optimizer, _, feed in runs:
            feed()
            wait(device)
            begun = time.monotonic()
            optimizer.step()
            wait(device)
            if step == 0 and optimizer is runs[0][0]:
                first_s = time.monotonic() - begun
        other_sets += runs[0][0].active != runs[1][0].active
    off = elements = 0
    for ours, plain in zip(runs[0][1], runs[1][1], strict=True):
        # So that NaN counts.
        x, y = ours.detach().float(), plain.detach().float()
        off += int((~((x - y).abs() <= 2.0**-7 * y.abs() + LR * 2.0**-20)).sum())
        elements += ours.numel()
    return {
        "backend": runs[0][0].backend,
        "first_step_s": first_s,
        "other_sets": other_sets,
        "off": off,
        "elements": elements,
    }


def asks(device: torch.device) -> dict[str, Any]:
    """Count what a step within a round, and one that ends it, ask of the device, and how often the host waits for it.

    Returns:
        "step" and "end_of_round", each with "syncs", None on a CPU, and "launches", see `count_launches`.
    """
    optimizer, _, feed = small_run(device, "auto")
    found: dict[str, Any] = {"step": {}, "end_of_round": {}}
    for key, count in ((None, None), ("syncs", syncs_of), ("launches", launches_of)):
        for step in range(1, INNER_STEPS + 1):
            feed()
            # The first round compiles, and the first step of each is its own.
            if key is None or count is None or step < INNER_STEPS - 1:
                optimizer.step()
            else:
                found["step" if step < INNER_STEPS else "end_of_round"][key] = count(optimizer.step, device)
    return found


def syncs_of(step: Callable[[], object], device: torch.device) -> int | None:
    """Return how often torch saw the host wait for the device in a step; None on a CPU."""
    if device.type != "cuda":
        step()
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Not the warning that the mode itself does not see everything.
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def start_builds(device: torch.device) -> dict[str, subprocess.Popen[str]]:
    """Begin to compile the libraries that are not there."""
    commands = {"cuda": [sys.executable, "-m", "benchmarks.gpu.nvcc"]} if device.type == "cuda" else {}
    if native.path("cpu") is None:
        # As `make native` does, where there may be no make.
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        into = f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={native.FOLDER}"
        configure = ["cmake", "-S", ".", "-B", "build/first", *generator, into, "-DMISA_CUDA=OFF"]
        commands["cpu"] = ["sh", "-c", f"{shlex.join(configure)} && cmake --build build/first --parallel"]
    return {
        name: subprocess.Popen(
            command, cwd=record.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        for name, command in commands.items()
    }


def end_builds(builds: dict[str, subprocess.Popen[str]], deadline: float) -> dict[str, str]:
    """Wait for the libraries; return what was done for each, or why it cannot be used."""
    done = {}
    for name, process in builds.items():
        try:
            printed, _ = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
            done[name] = printed.strip().splitlines()[-1] if printed.strip() else f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            done[name] = "was not compiled within the time limit"
    return done | {f"no {name}": why for name in ("cuda", "cpu") if (why := native.unusable(name))}
