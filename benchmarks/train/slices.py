"""How fast is an iteration, and what is kept for backward, where slices, modules and LoRA train as many parameters?

python -m benchmarks.train slices --out benchmarks/results              a table, goals, slices.json: minutes on a CPU
python -m benchmarks.train slices --compiled --out benchmarks/results   the same with layers compiled one by one, and
                                                                        without: slices_compiled.json
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import commands
from benchmarks.train import e2e, e2e_table
from benchmarks.train.llama import Llama
from benchmarks.train.trainers import PLANS, Plan

# LoRA's rank is the largest that needs no more parameters.
PLAN = replace(PLANS["11m"], shape="12l", delta=0.03, checkpointing=False, lora_rank=5)
NAMES = ("adamw", "lora", "lora_down", "misa", "misa_slices")
BESIDE_COMPILED = ("adamw", "adamw_compiled", "misa_slices", "misa_slices_compiled")


def kept_bytes(model: Llama, tokens: Tensor) -> int:
    """Return the bytes of all tensors that a forward pass keeps for backward, weights left out."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # As long as it lives no address is given out twice.
        loss = model(tokens)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    del loss
    return sum(size for address, size in kept.items() if address not in weights)


def kept_by(name: str, plan: Plan, rounds: int = 24) -> dict[str, float]:
    """Return "kept_bytes", a mean over rounds, and "trained", the most parameters with a gradient, of a peer."""
    model, tokens = e2e.build_model(plan, torch.device("cpu")), e2e.tokens_of(plan, torch.device("cpu"))
    peer = e2e.begin(model, tokens, name, replace(plan, inner_steps=1), 0)
    kept, trained = [], []
    for _ in range(rounds if peer.rounds else 1):
        kept.append(kept_bytes(model, tokens))
        model(tokens).backward()
        grads = (weight.grad for weight in model.parameters() if weight.grad is not None)
        trained.append(sum(getattr(grad, "part", grad).numel() for grad in grads))
        peer.optimizer.step()
        peer.optimizer.zero_grad()
    peer.close()
    return {"kept_bytes": statistics.mean(kept), "trained": max(trained)}


def measure(plan: Plan, deadline: float) -> Iterator[dict[str, Any]]:
    """Yield the record after each turn."""
    kept = {name: kept_by(name, plan) for name in NAMES}
    for shape in e2e.measure(plan, torch.device("cpu"), deadline, NAMES):
        shapes = [shape | {"peers": {name: peer | kept[name] for name, peer in shape["peers"].items()}}]
        yield {"shapes": shapes, "goals": e2e_table.goals(shapes)}


def measure_compiled(plan: Plan, deadline: float) -> Iterator[dict[str, Any]]:
    """Yield the record after each turn of compiled peers beside eager ones."""
    for shape in e2e.measure(plan, torch.device("cpu"), deadline, BESIDE_COMPILED):
        yield {"shapes": [shape], "goals": e2e_table.goals([shape])}


def main(argv: list[str] | None = None) -> int:
    """Measure, print and record; return the exit code."""
    parser = commands.parser("train slices", __doc__, threads=1, device=False, limit=600.0)
    parser.add_argument("--compiled", action="store_true", help="layers compiled one by one beside eager ones")
    args = commands.parse(parser, argv)
    states = measure_compiled(PLAN, args.deadline) if args.compiled else measure(PLAN, args.deadline)
    name = "slices_compiled" if args.compiled else "slices"
    commands.measured(name, torch.device("cpu"), args.out, states, e2e_table.lines)
    return 0
