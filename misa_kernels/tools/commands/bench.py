"""How fast is MISA's fused step on this machine, beside torch's fused AdamW?

MISA takes the norm of every gradient in the same pass, since its draw needs them; torch's AdamW is timed alone and with
`torch._foreach_norm` beside it, which is the same work. The three take turns on tensors of their own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

import misa_kernels

EXAMPLES = """examples:
  python -m misa_kernels bench
  python -m misa_kernels bench --device cuda --dtype bfloat16 --elements 256e6
  python -m misa_kernels bench --elements 1e6 --tensors 100 --json

GB/s: bytes of weights, gradients and state that a step has to move, over its time. Of bfloat16 weights MISA has float32
masters and moments, torch moments in bfloat16: less to move, and less precise.
"""
# Bytes that a step reads and writes for an element, by dtype: weight, gradient, two moments, and MISA's master.
BYTES = {
    "float32": {"MISA": 28, "AdamW": 28, "AdamW and norms": 32},
    "bfloat16": {"MISA": 28, "AdamW": 14, "AdamW and norms": 16},
}
WARM_UP = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where, how much and how often."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="(%(default)s)")
    parser.add_argument("--dtype", choices=tuple(BYTES), default="float32", help="of the weights (%(default)s)")
    parser.add_argument("--elements", type=float, default=16e6, help="in all (%(default)g)")
    parser.add_argument("--tensors", type=int, default=16, help="of equal size (%(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Time and print.

    Raises:
        ValueError: For sizes that leave nothing to time, or a device that is not there.
    """
    size = int(options.elements) // options.tensors if options.tensors > 0 else 0
    if size < 1 or options.repeats < 1:
        raise ValueError(
            f"--elements={options.elements:g} --tensors={options.tensors} --repeats={options.repeats} must be numbers "
            "above 0, with an element or more for each tensor"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda needs a CUDA device, and torch sees none here")
    steps, backend = prepare(options.device, getattr(torch, options.dtype), options.tensors, size)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.repeats):
        for name in list(steps)[:: -1 if turn % 2 else 1]:
            seconds[name].append(timed(steps[name], options.device))
    elements = size * options.tensors
    found: dict[str, Any] = {
        name: {
            "ms": 1e3 * median(times),
            "gb_per_s": BYTES[options.dtype][name] * elements / median(times) / 1e9,
            "times_misa": median(own / ours for own, ours in zip(times, seconds["MISA"], strict=True)),
        }
        for name, times in seconds.items()
    }
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    if options.json:
        setting = {"elements": elements, "tensors": options.tensors, "dtype": options.dtype, "repeats": options.repeats}
        versions = {"device": where, "torch": torch.__version__, "backend": backend}
        print(json.dumps(versions | setting | {"steps": found}, indent=1))
        return 0
    print(f"{options.tensors} tensors, {elements:,} elements, {options.dtype}; {where}; torch {torch.__version__}")
    print(f"MISA's backend: {backend}; medians of {options.repeats} turns\n")
    print(f"{'':<16}{'ms':>10}{'GB/s':>10}{'x MISA':>10}")
    for name, row in found.items():
        print(f"{name:<16}{row['ms']:>10.2f}{row['gb_per_s']:>10.1f}{row['times_misa']:>10.2f}")
    return 0


def prepare(device: str, dtype: torch.dtype, tensors: int, size: int) -> tuple[dict[str, Callable[[], object]], str]:
    """Return the step of each, warmed up on equal weights and gradients of its own, and MISA's backend."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, size, generator=generator).to(device, dtype)
    weights = {
        name: [start[0].clone().requires_grad_() for _ in range(tensors)]
        for name in ("MISA", "AdamW", "AdamW and norms")
    }
    for own in weights.values():
        for weight in own:
            weight.grad = start[1].clone()
    groups = [{"params": weights["MISA"], "role": "sampled"}]
    misa = misa_kernels.MISA(groups, delta=1.0, inner_steps=10**9)
    adamw, beside = (torch.optim.AdamW(weights[name], fused=True) for name in ("AdamW", "AdamW and norms"))
    gradients = [gradient for weight in weights["AdamW and norms"] if (gradient := weight.grad) is not None]

    def with_norms() -> None:
        torch._foreach_norm(gradients)
        beside.step()

    steps: dict[str, Callable[[], object]] = {"MISA": misa.step, "AdamW": adamw.step, "AdamW and norms": with_norms}
    for _ in range(WARM_UP):
        for step in steps.values():
            step()
    return steps, str(misa.backend)


def timed(step: Callable[[], object], device: str) -> float:
    """Return the seconds of a step, until the device has done it."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
