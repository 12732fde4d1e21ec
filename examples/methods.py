"""Which methods are compared, and how is each one built? One line differs between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from examples.model import Llama
from misa_kernels import MISA, ImportanceSampler, UniformSampler, badam, lisa, param_groups

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
        about: What the method trains, in a few words.
    """

    lr: float
    build: Build
    about: str


def adamw(model: Llama, lr: float, steps: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train all parameters at all times."""
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


def lora(model: Llama, lr: float, steps: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train low-rank additions to all matrices of all layers, with as much state as the others have."""
    from peft import LoraConfig, get_peft_model

    rank = lora_rank(model)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=lora_targets(model))
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, config)
    return wrapped, torch.optim.AdamW((p for p in wrapped.parameters() if p.requires_grad), lr=lr)


def badam_layers(model: Llama, lr: float, steps: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train one layer at a time, in turn."""
    return model, MISA(param_groups(model), lr=lr, delta=DELTA, total_steps=steps, seed=seed, **badam())


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


def misa_window(model: Llama, lr: float, steps: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """As `misa`, all modules of a round from one half of the layers, so that backward can stop early."""
    sampler = ImportanceSampler(depth_window=len(model.layers) // 2)
    return model, MISA(param_groups(model), lr=lr, delta=DELTA, total_steps=steps, seed=seed, sampler=sampler)


METHODS = {
    "AdamW": Method(1e-3, adamw, "all parameters"),
    "LoRA": Method(4e-3, lora, "low-rank additions"),
    "BAdam": Method(2e-3, badam_layers, "a layer at a time, in turn"),
    "LISA": Method(2e-3, lisa_layers, "a layer at a time, at random"),
    "uniform": Method(2e-3, uniform, "modules, equally likely"),
    "MISA": Method(2e-3, misa, "modules by importance"),
    "MISA, window": Method(2e-3, misa_window, "modules by importance, half the depth a round"),
}


def matrices(model: Llama) -> dict[str, nn.Linear]:
    """Return the matrices inside the layers, by name: what all methods but AdamW confine themselves to."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def lora_targets(model: Llama) -> list[str]:
    """Return the names of the matrices that LoRA adds to: all inside the layers."""
    return list(matrices(model))


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
    """Return the memory of AdamW's two averages, `exp_avg` and `exp_avg_sq`, in bytes."""
    states = (state.get(key) for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    return sum(state.numel() * state.element_size() for state in states if state is not None)
