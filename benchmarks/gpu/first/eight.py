"""Does Llama 3 8B train under 24 GiB, how fast, and in the memory that the planner says? Beside LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.train.training_memory import under_the_cap

# What is trained, and for how many rounds of two steps after the costliest.
PLAN = {"cuda": ("8b x 2", 5), "cpu": ("tiny", 1)}


def measure(device: torch.device, deadline: float, so_far: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the record of `benchmarks.train.training_memory.under_the_cap`."""
    plan, rounds = PLAN[device.type]
    return under_the_cap(plan, device, deadline, ("misa_slices", "lora", "misa"), rounds)
