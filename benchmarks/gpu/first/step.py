"""How long does the step take on matrices of real models, beside torch's AdamW and other packages'?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.first.parity import VARIANTS, excused
from benchmarks.step.peers import FORMATS, PEERS, SLICES
from benchmarks.step.update import Case, M, Matrices, launches
from benchmarks.step.update import measure as measure_cases

# What 3 % of a LLaMA of 1B, 8B and 130M parameters may be: 32M, 240M and 4M elements. Then tensors so small that a step
# is all overhead, as many as the goal for the host's time speaks of.
CASES = {
    "cuda": (
        Matrices({(8192, 2048): 1, (2048, 2048): 3, (512, 2048): 3}),
        Matrices({(14_336, 4096): 2, (4096, 4096): 6, (1024, 4096): 5}),
        Matrices({(2048, 768): 2, (768, 768): 2}),
        Case(M, 60),
    ),
    "cpu": (Matrices({(176, 64): 1, (64, 64): 3, (16, 64): 3}), Case(4096, 60)),
}
REPEATS = {"cuda": 20, "cpu": 3}
# What it takes to build all peers once more and to look at a step of each.
LAUNCHES_S = 12.0
NAMES = (
    *("bf16 misa", "bf16 misa stochastic", "bf16 misa int8", "fp32 misa", "bf16 misa clip", "fp32 misa clip"),
    *("fp32 fused", "fp32 fused+norm", "fp32 fused+clip", "bf16 fused", "bf16 fused+norm", "bf16 fused+clip"),
    *("bf16 misa cuda", "fp32 misa cuda", "bf16 misa cuda clip"),
    *SLICES,
    # Of out/peers; torchao compiles for half a minute.
    *("bf16 bnb 8bit", "bf16 flashoptim", "bf16 optimi"),
)


def measure(device: torch.device, deadline: float, so_far: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield "cases" as `update.measure` does, "refused" peers that parity found wrong, and "launches"."""
    every = PEERS | FORMATS | SLICES
    variants = so_far.get("parity", {}).get("variants", {})
    wrong = [name for name in NAMES if not variants.get(name, {"ok": True})["ok"]]
    # A library that is not there says so once more as a peer.
    refused = [name for name in wrong if not excused(variants[name])]
    peers = {name: every[name] for name in NAMES if name not in refused}
    found: dict[str, Any] = {
        "refused": refused,
        "unproven": [name for name in NAMES if name in VARIANTS and name not in variants],
        "cases": [],
    }
    cases = CASES[device.type]
    for case in measure_cases(cases, device, deadline, REPEATS[device.type], peers):
        found["cases"].append(case)
        yield found
    # Last, since the profiler's hooks would slow down every launch after it.
    if time.monotonic() < deadline - LAUNCHES_S:
        yield found | {"launches": launches(cases[0], device, peers)}
