"""How many tokens a second does a whole training iteration reach, at equal batch, and in which memory?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.train import e2e
from benchmarks.train.trainers import OURS, PLANS

NAMES = ("adamw", "lora", "misa_slices", "misa", "badam", "lora_down", "misa_window")
# Short rounds and turns, so that all peers see many draws in a minute.
PLAN = {
    "cuda": replace(PLANS["1b"], inner_steps=3, rounds=6, steps=8),
    "cpu": replace(PLANS["tiny"], inner_steps=3, rounds=2, steps=2, turns=1),
}


def measure(device: torch.device, deadline: float, so_far: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the record of `train.e2e.measure` for the 1B shape, and "refused" if parity found the step wrong."""
    plan = PLAN[device.type]
    # The default is what all of ours take.
    wrong = not so_far.get("parity", {}).get("variants", {}).get("bf16 misa", {"ok": True})["ok"]
    refused = [name for name in NAMES if wrong and name in OURS]
    for found in e2e.measure(plan, device, deadline, [name for name in NAMES if name not in refused]):
        yield found | {"refused": refused}
