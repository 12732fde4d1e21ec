"""How large may each method be in so many bytes of training memory, and how are AdamW, LoRA, DoRA and GaLore built?

Training bytes are what a method adds to the frozen model: optimizer states, gradients held at once, and extra
weights. Activations are left out, and so is what lives within one call of `step()`. LoRA's and GaLore's states are the
8-bit ones of bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

from examples.demo.methods import matrices
from examples.demo.model import Llama

FP32_BYTES = 4
# Elements that share a scale in MISA's formats, and in bitsandbytes.
BLOCK, BNB_BLOCK = 128, 256
# Two tables of 256 float32 decode the 8-bit states of a bitsandbytes optimizer.
BNB_TABLES_BYTES = 2 * 256 * FP32_BYTES
# Steps between two singular value decompositions of GaLore.
GAP = 50
# Both moments of a parameter and its part of the scales.
MISA_STATE_BYTES = {"fp32": 2 * 4.0, "int8": 2 * (1 + 4 / BLOCK)}
Built = tuple[nn.Module, torch.optim.Optimizer]
# Chooses matrices of a model, by name.
Choice = Callable[[Llama], dict[str, nn.Linear]]


def parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def misa_bytes(model: Llama, state: str, delta: float) -> int:
    """Return the training bytes of MISA: states and gradients of the active set."""
    return math.ceil(int(delta * parameters(model)) * (MISA_STATE_BYTES[state] + FP32_BYTES))


def adamw_bytes(model: Llama) -> int:
    """Return the training bytes of torch's AdamW on all parameters: two moments and a gradient."""
    return 3 * FP32_BYTES * parameters(model)


def bnb_states_bytes(sizes: list[int]) -> int:
    """Return the bytes of both moments of tensors of these sizes, as bitsandbytes holds them."""
    return 2 * sum(size + FP32_BYTES * math.ceil(size / BNB_BLOCK) for size in sizes) + BNB_TABLES_BYTES


def down(model: Llama) -> dict[str, nn.Linear]:
    """Return the last matrix of each layer's feed-forward network, by name."""
    return {name: matrix for name, matrix in matrices(model).items() if name.endswith("down_proj")}


def lora_bytes(model: Llama, rank: int, of: Choice = matrices, dora: bool = False) -> int:
    """Return the training bytes of LoRA: adapters, all their gradients, and states; of DoRA, magnitudes besides."""
    sizes = [rank * features for matrix in of(model).values() for features in matrix.weight.shape]
    if dora:
        sizes += [matrix.out_features for matrix in of(model).values()]
    return 2 * FP32_BYTES * sum(sizes) + bnb_states_bytes(sizes)


def galore_bytes(model: Llama, rank: int) -> int:
    """Return the training bytes of GaLore: projectors, states of the projected, the largest gradient."""
    shapes = [matrix.weight.shape for matrix in matrices(model).values()]
    projectors = sum(rank * min(shape) for shape in shapes)
    states = bnb_states_bytes([rank * max(shape) for shape in shapes])
    return FP32_BYTES * (projectors + max(shape.numel() for shape in shapes)) + states


def largest_rank(method: str, model: Llama, budget_bytes: int) -> int:
    """Return the largest rank whose training bytes fit into a budget.

    Raises:
        ValueError: If not even rank 1 fits.
    """
    training_bytes, _ = LOW_RANK[method]
    full = min(min(matrix.weight.shape) for matrix in matrices(model).values())
    fitting = [rank for rank in range(1, full + 1) if training_bytes(model, rank) <= budget_bytes]
    if not fitting:
        raise ValueError(f"budget_bytes={budget_bytes} must be at least {training_bytes(model, 1)}, those of rank 1")
    return fitting[-1]


def lora(model: Llama, rank: int, lr: float, seed: int, of: Choice = matrices, dora: bool = False) -> Built:
    """Return the model with adapters of these matrices, and what trains them."""
    from bitsandbytes.optim import AdamW8bit
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(of(model)), use_dora=dora)
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, config)
    adapters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
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


def galore(model: Llama, rank: int, lr: float, seed: int) -> Built:
    """Return what trains all matrices of all layers through projections, each as soon as it has its gradient."""
    from galore_torch import GaLoreAdamW8bit

    trained = [matrix.weight for matrix in matrices(model).values()]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is weight for weight in trained))
    group = {"params": trained, "rank": rank, "update_proj_gap": GAP, "scale": 1.0, "proj_type": "std"}
    optimizer = GaLoreAdamW8bit([group], lr=lr, weight_decay=1e-2, min_8bit_size=1)

    def cut(parameter: Tensor) -> None:
        projector = optimizer.state[parameter]["projector"]
        if projector.ortho_matrix.untyped_storage().nbytes() > projector.ortho_matrix.nbytes:
            # A slice of the singular vectors would keep all of them in memory, more than everything else together.
            projector.ortho_matrix = projector.ortho_matrix.clone()

    update_in_backward(optimizer, trained, cut)
    return model, optimizer


LOW_RANK: dict[str, tuple[Callable[[Llama, int], int], Callable[[Llama, int, float, int], Built]]] = {
    "LoRA": (lora_bytes, lora),
    "LoRA, down": (partial(lora_bytes, of=down), partial(lora, of=down)),
    "DoRA": (partial(lora_bytes, dora=True), partial(lora, dora=True)),
    "GaLore": (galore_bytes, galore),
}
