"""How fast is an iteration, and what is kept for backward, where slices, modules and LoRA train as many parameters?

python -m benchmarks.train slices --out benchmarks/results    a table, the goals, slices.json: minutes on a CPU
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import commands
from benchmarks.tables import cells, goal, goal_lines, spread
from benchmarks.train import e2e
from benchmarks.train.llama import Llama
from benchmarks.train.trainers import PLANS, Plan

# LoRA's rank is the largest that needs no more parameters.
PLAN = replace(PLANS["11m"], shape="12l", delta=0.03, checkpointing=False, lora_rank=5)
NAMES = ("adamw", "lora", "lora_down", "misa", "misa_slices")
# What was asked for: of slices over LoRA of all matrices.
SPEED, KEPT = 1.25, 0.75


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
    """Return of a peer the bytes "kept", a mean over rounds, and "trained", the most parameters with a gradient."""
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
    return {"kept": statistics.mean(kept), "trained": max(trained)}


def over_lora(peers: dict[str, Any], name: str, figure: str) -> float:
    """Return what one of the figures "speed" and "kept" of a peer is over that of LoRA of all matrices."""
    ratio: float = peers[name][figure] / peers["lora"][figure]
    return ratio


def measure(plan: Plan, deadline: float) -> Iterator[dict[str, Any]]:
    """Yield the record after each turn, with the goals when all have had one; "speed" is that in ordinary rounds."""
    kept = {name: kept_by(name, plan) for name in NAMES}
    for shape in e2e.measure(plan, torch.device("cpu"), deadline, NAMES):
        speed = {name: {"speed": peer["in_rounds_of_50"]["tokens_per_second"]} for name, peer in shape["peers"].items()}
        peers = {name: peer | kept[name] | speed[name] for name, peer in shape["peers"].items()}
        found = []
        if peers.keys() == kept.keys():
            for figure, limit in (("speed", SPEED), ("kept", KEPT)):
                ratio = over_lora(peers, "misa_slices", figure)
                found.append(goal(f"{figure}, misa_slices / lora", "12l", limit, ratio, least=figure == "speed"))
        yield {"shape": shape | {"peers": peers}, "goals": found}


def lines(content: dict[str, Any]) -> list[str]:
    """Return the record as a table in Markdown, and the goals."""
    plan, peers = content["shape"]["plan"], content["shape"]["peers"]
    rows = (
        (
            name,
            f"{peer['trained']:,}",
            f"{peer['speed']:,.0f}",
            f"{over_lora(peers, name, 'speed'):.2f}",
            *(spread(peer[key], 1) for key in ("forward_ms", "backward_ms")),
            f"{peer['kept'] / 1e6:.1f}",
            f"{over_lora(peers, name, 'kept'):.2f}",
        )
        for name, peer in peers.items()
    )
    header = "peer | trained at a time | tokens/s in rounds of 50 | over LoRA's | forward ms | backward ms"
    return [
        f"LLaMA of 12 layers and {content['shape']['parameters'] / 1e6:.1f}M parameters, {plan['dtype']}, "
        f"{plan['batch']} sequences of {plan['sequence']} tokens, no checkpointing, δ = {plan['delta']:g}, "
        f"{plan['turns']} turns. Kept: what autograd saves, weights left out, a mean over rounds.",
        "",
        *cells(f"{header} | kept for backward, MB | over LoRA's", rows),
        *goal_lines(content["goals"]),
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure, print and record; return the exit code."""
    args = commands.parse(commands.parser("train slices", __doc__, threads=1, device=False, limit=600.0), argv)
    commands.measured("slices", torch.device("cpu"), args.out, measure(PLAN, args.deadline), lines)
    return 0
