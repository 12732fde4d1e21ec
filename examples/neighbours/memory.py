"""What does a training step take in memory by each of the ways around MISA? Peaks of SmolLM2, counted on the CPU.

From the repository's root: `python -m examples.neighbours.memory [--tokens N]`.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.memory import PeakMemory
from benchmarks.tables import cells
from examples.finetune import load
from examples.neighbours import trained_scales
from examples.neighbours.forward_only import ForwardGradients
from examples.neighbours.four_bits import quantise
from examples.neighbours.late_layers import LateTuned
from examples.neighbours.side_tuning import SideTuned
from misa_kernels import MISA, UniformSampler, param_groups, slices
from misa_kernels.slice_adapters import add_slices

RANK, DELTA, LR = 8, 0.03, 1e-4
# Takes a step on token numbers.
Step = Callable[[Tensor], None]


def backward_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """Return the step of an ordinary loop."""

    def step(tokens: Tensor) -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW of what requires a gradient."""
    return torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=LR)


def with_lora(model: nn.Module) -> nn.Module:
    """Return the model with adapters of all matrices in its layers."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))


def in_four_bits(model: nn.Module) -> nn.Module:
    """Return the model with the matrices of its layers in NF4."""
    quantise(model)
    return model


def plain(model: nn.Module) -> Step:
    """Train all that requires a gradient."""
    return backward_step(model, adamw(model))


def lora(model: nn.Module) -> Step:
    """Train adapters."""
    adapted = with_lora(model)
    return backward_step(adapted, adamw(adapted))


def misa(model: nn.Module, **options: Any) -> Step:
    """Train what MISA draws, modules in the costliest round."""
    optimizer = MISA(param_groups(model), lr=LR, delta=DELTA, **options)
    if not options:
        optimizer.rehearse()
    return backward_step(model, optimizer)


def sliced_base(model: nn.Module) -> Step:
    """Train slices beside a base of 4 bits."""
    add_slices(in_four_bits(model), DELTA)
    return backward_step(model, adamw(model))


def scales(model: nn.Module) -> Step:
    """Train the scales of a base of 4 bits."""
    model.requires_grad_(False)
    trained_scales.quantise(model.model.layers)
    return backward_step(model, adamw(model))


def beside(kind: Callable[[nn.Module], nn.Module], model: nn.Module) -> Step:
    """Train a network beside a base of 4 bits."""
    whole = kind(in_four_bits(model))
    return backward_step(whole, adamw(whole))


def forward_only(model: nn.Module) -> Step:
    """Train what MISA draws, without backward."""

    def rule(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=LR)

    optimizer = MISA(param_groups(model), delta=DELTA, sampler=UniformSampler(), rule=rule)
    gradients = ForwardGradients(optimizer)

    def step(tokens: Tensor) -> None:
        gradients(lambda: model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference(model: nn.Module) -> Step:
    """Train nothing."""

    def step(tokens: Tensor) -> None:
        with torch.no_grad():
            model(input_ids=tokens, labels=tokens)

    return step


METHODS: dict[str, Callable[[nn.Module], Step]] = {
    "inference": inference,
    "AdamW": plain,
    f"LoRA, rank {RANK}": lora,
    f"MISA, modules, δ = {DELTA}": misa,
    f"MISA, slices, δ = {DELTA}": lambda model: misa(model, **slices()),
    f"forward passes alone, modules, δ = {DELTA}": forward_only,
    "inference, 4 bits": lambda model: inference(in_four_bits(model)),
    f"QLoRA, rank {RANK}": lambda model: lora(in_four_bits(model)),
    f"slices over 4 bits, δ = {DELTA}": sliced_base,
    "scales of 4 bits (PEQA)": scales,
    "side network over 4 bits (QST)": lambda model: beside(SideTuned, model),
    "last 2 layers over 4 bits (SHERL)": lambda model: beside(LateTuned, model),
}


def peaks(base: nn.Module, tokens: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, bytes before and most bytes within two steps, weights included."""
    ids = torch.arange(tokens).remainder(base.config.vocab_size).unsqueeze(0)
    for name, method in METHODS.items():
        gc.collect()
        with PeakMemory() as weights:
            step = method(copy.deepcopy(base))
        gc.collect()
        with PeakMemory() as memory:
            for _ in range(2):
                step(ids)
        yield name, weights.held_bytes, weights.held_bytes + memory.peak_bytes
        del step


def main(arguments: list[str] | None = None) -> None:
    """Measure with the command-line arguments given, those of the process if None."""
    parser = argparse.ArgumentParser(prog="python -m examples.neighbours.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256, help="of the one sequence in a step (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/neighbours"), help="where to write (%(default)s)")
    options = parser.parse_args(arguments)
    base = load(None, torch.float32)[0].train()
    rows = [(name, f"{held / 1e6:,.0f}", f"{peak / 1e6:,.0f}") for name, held, peak in peaks(base, options.tokens)]
    lines = [
        "```",
        f"python -m examples.neighbours.memory --tokens {options.tokens}",
        "```",
        "",
        *cells("what is trained | weights, MB | peak of a step, MB", rows),
        f"SmolLM2-135M, one sequence of {options.tokens} tokens, no checkpointing, AdamW with float32 states but for "
        "forward passes alone, which SGD follows. Bytes that tensors take, counted on a CPU; embeddings are of float32 "
        "and the logits of 49,152 tokens are a large part of each peak.",
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "memory.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
