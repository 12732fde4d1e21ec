"""How large may each method be in so many bytes of training memory, and how is it built?

Training bytes are what a method adds to the frozen model: optimizer states, gradients held at once, and extra
weights. Activations are left out, and so is what lives within one call of `step()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

from examples.methods import matrices
from examples.model import Llama
from misa_kernels import MISA, param_groups

FP32_BYTES = 4
# Elements that share a scale in MISA's formats, and in bitsandbytes.
BLOCK, BNB_BLOCK = 128, 256
# Two tables of 256 float32 decode the 8-bit states of a bitsandbytes optimizer.
BNB_TABLES_BYTES = 2 * 256 * FP32_BYTES
# Steps between two singular value decompositions of GaLore.
GAP = 50
# Both moments of a parameter and its part of the scales.
MISA_STATE_BYTES = {"fp32": 2 * 4.0, "int8": 2 * (1 + 4 / BLOCK)}
Size = int | float


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning in a given memory.

    Attributes:
        states: Formats of optimizer state that it can have.
        size: Maps model, format and training bytes to the largest δ or rank that needs no more.
        training_bytes: Maps model, format and δ or rank to training bytes.
        build: Maps model, format, δ or rank, learning rate, steps of the training and seed to the model to train
            (LoRA wraps it) and its optimizer.
    """

    states: tuple[str, ...]
    size: Callable[[Llama, str, int], Size]
    training_bytes: Callable[[Llama, str, Size], int]
    build: Callable[[Llama, str, Size, float, int, int], tuple[nn.Module, torch.optim.Optimizer]]


def parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def largest_rank(training_bytes: Callable[[Llama, str, Size], int]) -> Callable[[Llama, str, int], int]:
    """Return a function that finds the largest rank whose training bytes fit into a budget."""

    def rank(model: Llama, state: str, budget_bytes: int) -> int:
        full = min(min(matrix.weight.shape) for matrix in matrices(model).values())
        fitting = [rank for rank in range(1, full + 1) if training_bytes(model, state, rank) <= budget_bytes]
        if not fitting:
            raise ValueError(
                f"budget_bytes={budget_bytes} must be at least {training_bytes(model, state, 1)}, the bytes of rank 1"
            )
        return fitting[-1]

    return rank


def adamw_states_bytes(state: str, sizes: list[int]) -> int:
    """Return the bytes of the two moments of tensors of these sizes, as torch and bitsandbytes hold them.

    Args:
        state: "fp32" for torch's AdamW, "int8" for that of bitsandbytes with all tensors in 8 bits.
        sizes: Elements of each tensor.
    """
    if state == "fp32":
        return 2 * FP32_BYTES * sum(sizes)
    return 2 * sum(size + FP32_BYTES * math.ceil(size / BNB_BLOCK) for size in sizes) + BNB_TABLES_BYTES


def adamw_bytes(model: Llama, state: str, size: Size) -> int:
    """Return the training bytes of AdamW on all parameters."""
    return FP32_BYTES * parameters(model) + adamw_states_bytes(state, [p.numel() for p in model.parameters()])


def adamw(
    model: Llama, state: str, size: Size, lr: float, steps: int, seed: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train all parameters at all times, whatever the memory."""
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


def lora_bytes(model: Llama, state: str, rank: Size) -> int:
    """Return the training bytes of LoRA: adapters, all their gradients, and states."""
    sizes = [int(rank) * features for matrix in matrices(model).values() for features in matrix.weight.shape]
    return 2 * FP32_BYTES * sum(sizes) + adamw_states_bytes(state, sizes)


def lora(
    model: Llama, state: str, rank: Size, lr: float, steps: int, seed: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train adapters of all matrices of all layers."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=int(rank), lora_alpha=2 * int(rank), target_modules=list(matrices(model)))
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, config)
    adapters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    if state == "fp32":
        return wrapped, torch.optim.AdamW(adapters, lr=lr)
    from bitsandbytes.optim import AdamW8bit

    return wrapped, AdamW8bit(adapters, lr=lr, weight_decay=1e-2, min_8bit_size=1)


def update_in_backward(
    optimizer: torch.optim.Optimizer, parameters: list[Tensor], after: Callable[[Tensor], None] = lambda parameter: None
) -> None:
    """Update each parameter as soon as it has its gradient, and free that.

    Args:
        optimizer: An optimizer that passes over parameters without gradient.
        parameters: Its parameters.
        after: Called with a parameter after its update.
    """

    def update(parameter: Tensor) -> None:
        # No other has a gradient at this moment. GaLore's 8-bit step waits for a GPU that need not be there.
        with mock.patch("torch.cuda.synchronize"):
            optimizer.step()
        parameter.grad = None
        after(parameter)

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(update)


def galore_bytes(model: Llama, state: str, rank: Size) -> int:
    """Return the training bytes of GaLore: projectors, states of the projected, the largest gradient."""
    shapes = [matrix.weight.shape for matrix in matrices(model).values()]
    projectors = sum(int(rank) * min(shape) for shape in shapes)
    states = adamw_states_bytes(state, [int(rank) * max(shape) for shape in shapes])
    return FP32_BYTES * (projectors + max(shape.numel() for shape in shapes)) + states


def galore(
    model: Llama, state: str, rank: Size, lr: float, steps: int, seed: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train all matrices of all layers through projections, each in backward, as soon as it has its gradient."""
    from galore_torch import GaLoreAdamW, GaLoreAdamW8bit

    trained = [matrix.weight for matrix in matrices(model).values()]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is weight for weight in trained))
    group = {"params": trained, "rank": int(rank), "update_proj_gap": GAP, "scale": 1.0, "proj_type": "std"}
    if state == "fp32":
        optimizer = GaLoreAdamW([group], lr=lr, eps=1e-8, weight_decay=1e-2, no_deprecation_warning=True)
    else:
        optimizer = GaLoreAdamW8bit([group], lr=lr, weight_decay=1e-2, min_8bit_size=1)

    def cut(parameter: Tensor) -> None:
        projector = optimizer.state[parameter]["projector"]
        if projector.ortho_matrix.untyped_storage().nbytes() > projector.ortho_matrix.nbytes:
            # A slice of the singular vectors would keep all of them in memory, more than everything else together.
            projector.ortho_matrix = projector.ortho_matrix.clone()

    update_in_backward(optimizer, trained, cut)
    return model, optimizer


def misa_bytes(model: Llama, state: str, delta: Size) -> int:
    """Return the training bytes of MISA: states and gradients of the active set."""
    return math.ceil(int(delta * parameters(model)) * (MISA_STATE_BYTES[state] + FP32_BYTES))


def misa_delta(model: Llama, state: str, budget_bytes: int) -> float:
    """Return the largest budget whose training bytes fit."""
    return min(1.0, budget_bytes / (MISA_STATE_BYTES[state] + FP32_BYTES) / parameters(model))


def misa(
    model: Llama, state: str, delta: Size, lr: float, steps: int, seed: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train an active set."""
    return model, MISA(param_groups(model), lr=lr, delta=delta, total_steps=steps, state_dtype=state, seed=seed)


METHODS = {
    "AdamW": Method(("fp32",), lambda model, state, budget_bytes: 1.0, adamw_bytes, adamw),
    "LoRA": Method(("fp32", "int8"), largest_rank(lora_bytes), lora_bytes, lora),
    "GaLore": Method(("fp32", "int8"), largest_rank(galore_bytes), galore_bytes, galore),
    "MISA": Method(tuple(MISA_STATE_BYTES), misa_delta, misa_bytes, misa),
}
