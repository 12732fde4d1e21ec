"""How large may each method be in so many bytes of training memory, and how are AdamW, LoRA, DoRA and GaLore built?

Training bytes are what a method adds to the frozen model: optimizer states, gradients held at once, and extra
weights. Activations are left out, and so is what lives within one call of `step()`. LoRA's and GaLore's states are the
8-bit ones of bitsandbytes, or 8-bit ones of MISA, 1 % larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

from misa_kernels import MISA

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
Choice = Callable[[nn.Module], dict[str, nn.Linear]]
# Makes an optimizer of these parameters with this learning rate.
AdamW = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Return the list of a model's layers: of its lists of modules the one with most parameters."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return max(lists, key=parameters)


def matrices(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the matrices inside the layers, by name: what all methods but AdamW confine themselves to."""
    inside = {id(module) for module in layers_of(model).modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in model.named_modules() if id(module) in inside}


def parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def misa_bytes(model: nn.Module, state: str, delta: float) -> int:
    """Return the training bytes of MISA: states and gradients of the active set."""
    return math.ceil(int(delta * parameters(model)) * (MISA_STATE_BYTES[state] + FP32_BYTES))


def adamw_bytes(model: nn.Module) -> int:
    """Return the training bytes of torch's AdamW on all parameters: two moments and a gradient."""
    return 3 * FP32_BYTES * parameters(model)


def bnb_states_bytes(sizes: list[int]) -> int:
    """Return the bytes of both moments of tensors of these sizes, as bitsandbytes holds them."""
    return 2 * sum(size + FP32_BYTES * math.ceil(size / BNB_BLOCK) for size in sizes) + BNB_TABLES_BYTES


def down(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the last matrix of each layer's feed-forward network, by name."""
    return {name: matrix for name, matrix in matrices(model).items() if name.endswith("down_proj")}


def lora_bytes(model: nn.Module, rank: int, of: Choice = matrices, dora: bool = False) -> int:
    """Return the training bytes of LoRA: adapters, all their gradients, and states; of DoRA, magnitudes besides."""
    sizes = [rank * features for matrix in of(model).values() for features in matrix.weight.shape]
    if dora:
        sizes += [matrix.out_features for matrix in of(model).values()]
    return 2 * FP32_BYTES * sum(sizes) + bnb_states_bytes(sizes)


def galore_bytes(model: nn.Module, rank: int) -> int:
    """Return the training bytes of GaLore: projectors, states of the projected, the largest gradient."""
    shapes = [matrix.weight.shape for matrix in matrices(model).values()]
    projectors = sum(min(rank, *shape) * min(shape) for shape in shapes)
    states = bnb_states_bytes([min(rank, *shape) * max(shape) for shape in shapes])
    return FP32_BYTES * (projectors + max(shape.numel() for shape in shapes)) + states


def largest_rank(method: str, model: nn.Module, budget_bytes: int) -> int:
    """Return the largest rank whose training bytes fit into a budget.

    Raises:
        ValueError: If not even rank 1 fits.
    """
    training_bytes, _ = LOW_RANK[method]
    fitting = [rank for rank in ranks(method, model) if training_bytes(model, rank) <= budget_bytes]
    if not fitting:
        raise ValueError(f"budget_bytes={budget_bytes} must be at least {training_bytes(model, 1)}, those of rank 1")
    return fitting[-1]


def nearest_rank(method: str, model: nn.Module, budget_bytes: int) -> int:
    """Return the rank whose training bytes are nearest to a budget."""
    training_bytes, _ = LOW_RANK[method]
    return min(ranks(method, model), key=lambda rank: abs(training_bytes(model, rank) - budget_bytes))


def ranks(method: str, model: nn.Module) -> range:
    """Return the ranks that a method can have; GaLore projects what is smaller than its rank to its own size."""
    sides = [min(matrix.weight.shape) for matrix in (down if method == "LoRA, down" else matrices)(model).values()]
    return range(1, (max if method == "GaLore" else min)(sides) + 1)


def bitsandbytes_adamw(trained: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return AdamW with the 8-bit states that most who train adapters take; slow on CPUs."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(trained, lr=lr, weight_decay=1e-2, min_8bit_size=1)


def misa_adamw(trained: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return AdamW with the 8-bit states of MISA, which on CPUs takes a fiftieth of the time of bitsandbytes'."""
    return MISA(trained, lr=lr, delta=1.0, weight_decay=1e-2, state_dtype="int8")


def lora(
    model: nn.Module,
    rank: int,
    lr: float,
    seed: int,
    of: Choice = matrices,
    dora: bool = False,
    adamw: AdamW = bitsandbytes_adamw,
) -> Built:
    """Return the model with adapters of these matrices, and what trains them."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(of(model)), use_dora=dora)
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, config)
    return wrapped, adamw([parameter for parameter in wrapped.parameters() if parameter.requires_grad], lr)


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


def galore(model: nn.Module, rank: int, lr: float, seed: int) -> Built:
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


LOW_RANK: dict[str, tuple[Callable[[nn.Module, int], int], Callable[..., Built]]] = {
    "LoRA": (lora_bytes, lora),
    "LoRA, down": (partial(lora_bytes, of=down), partial(lora, of=down)),
    "DoRA": (partial(lora_bytes, dora=True), partial(lora, dora=True)),
    "GaLore": (galore_bytes, galore),
}
# Those with an optimizer of their choice.
ADAPTERS = ("LoRA", "LoRA, down", "DoRA")
