"""Which methods are compared, and how is each one built? One line differs between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from examples.demo.model import Llama
from misa_kernels import MISA, ImportanceSampler, UniformSampler, lisa, param_groups, slices

# An eighth of the parameters is trained at a time: room for one of the eight layers.
DELTA = 0.125

Build = Callable[[Llama, float, int, int], tuple[nn.Module, torch.optim.Optimizer]]


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning.

    Attributes:
        lr: Highest learning rate.
        build: Maps the model, the learning rate, the number of steps of the training and a seed to the
            model to train (LoRA wraps it) and its optimizer.
    """

    lr: float
    build: Build


def adamw(model: Llama, lr: float, steps: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train all parameters at all times."""
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


def lora(model: Llama, lr: float, steps: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train low-rank additions to all matrices of all layers, with as much state as the others have."""
    from peft import LoraConfig, get_peft_model

    rank = lora_rank(model)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(matrices(model)))
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, config)
    return wrapped, torch.optim.AdamW((p for p in wrapped.parameters() if p.requires_grad), lr=lr)


def lisa_layers(model: Llama, lr: float, steps: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train one layer at a time, drawn at random."""
    return model, MISA(param_groups(model), lr=lr, delta=DELTA, total_steps=steps, seed=seed, **lisa())


def uniform(model: Llama, lr: float, steps: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train some modules at a time, all equally likely."""
    sampler = UniformSampler()
    return model, MISA(param_groups(model), lr=lr, delta=DELTA, total_steps=steps, seed=seed, sampler=sampler)


def misa(model: Llama, lr: float, steps: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train some modules at a time, those with large gradients more often."""
    return model, MISA(param_groups(model), lr=lr, delta=DELTA, total_steps=steps, seed=seed)


def misa_slices(model: Llama, lr: float, steps: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train a few columns of the last matrices of all attentions and feed-forward networks, the same in all rounds."""
    return model, MISA(param_groups(model), lr=lr, delta=DELTA, total_steps=steps, seed=seed, **slices())


def misa_window(model: Llama, lr: float, steps: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """As `misa`, all modules of a round from one half of the layers, so that backward can stop early."""
    sampler = ImportanceSampler(depth_window=len(model.layers) // 2)
    return model, MISA(param_groups(model), lr=lr, delta=DELTA, total_steps=steps, seed=seed, sampler=sampler)


# Validation losses of the full demo (torch 2.13, CPU, seed 0) by learning rate; the best is used.
#
# lr            .001   .002   .003    .004    .006    .008    .012   .016
# AdamW        1.438  1.383  1.369  [1.366]  1.367
# LoRA                               1.634   1.601  [1.593]  1.605  1.629
# LISA                1.791         [1.719]  1.724   1.727
# uniform             1.785          1.708  [1.682]  1.688   1.718
# MISA                1.771          1.703  [1.689]  1.694
# MISA, window        1.771          1.703  [1.696]  1.708
# slices                             1.641          [1.617]  1.629
#
# Another seed moves a loss by about .01: at .006, seeds 0, 1 and 2 gave 1.682, 1.700 and 1.697 (uniform),
# 1.689, 1.696 and 1.693 (MISA), 1.696, 1.683 and 1.714 (MISA, window).
METHODS = {
    "AdamW": Method(4e-3, adamw),
    "slices": Method(8e-3, misa_slices),
    "LoRA": Method(8e-3, lora),
    "MISA": Method(6e-3, misa),
    "MISA, window": Method(6e-3, misa_window),
    "uniform": Method(6e-3, uniform),
    "LISA": Method(4e-3, lisa_layers),
}


def matrices(model: Llama) -> dict[str, nn.Linear]:
    """Return the matrices inside the layers, by name: what all methods but AdamW confine themselves to."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def lora_rank(model: Llama) -> int:
    """Return the highest rank at which LoRA's optimizer state fits into the bytes that the others have.

    A rank costs in_features + out_features parameters a matrix; both kinds of state are two float32 for
    each trained parameter, so equal bytes are equal numbers of trained parameters.

    Args:
        model: The model without LoRA.

    Returns:
        The rank, at least 1.
    """
    budget = int(DELTA * sum(parameter.numel() for parameter in model.parameters()))
    per_rank = sum(matrix.in_features + matrix.out_features for matrix in matrices(model).values())
    return max(1, budget // per_rank)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the memory of AdamW's two averages, `exp_avg` and `exp_avg_sq`, of slices numbered ones, in bytes."""
    named = (item for state in optimizer.state.values() for item in state.items())
    return sum(state.nbytes for key, state in named if key.startswith("exp_avg"))
