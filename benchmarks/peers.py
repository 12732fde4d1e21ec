"""What is compared in the update benchmark: MISA's step and torch's AdamW, each with and without norm and clipping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from misa_kernels import MISA

FP32, BF16 = torch.float32, torch.bfloat16
LR = 1e-4
MAX_NORM = 1.0


def misa(weights: list[Tensor], backend: str = "triton", **options: Any) -> MISA:
    """Return MISA with everything active, in a round without end; no fallback to the reference on a GPU."""
    if not weights[0].is_cuda and backend == "triton":
        backend = "reference"
    optimizer = MISA(weights, lr=LR, backend=backend, **{"delta": 1.0, "inner_steps": 10**6} | options)
    if len(optimizer.active) != len(weights):
        raise RuntimeError(f"{len(optimizer.active)} of {len(weights)} modules are active: all must be")
    return optimizer


def misa_clip(weights: list[Tensor]) -> MISA:
    """MISA that clips by the global norm."""
    return misa(weights, max_grad_norm=MAX_NORM)


def misa_cuda(weights: list[Tensor]) -> MISA:
    """MISA on the CUDA library."""
    return misa(weights, backend="cuda")


def misa_cuda_clip(weights: list[Tensor]) -> MISA:
    """The same, clipping by the global norm."""
    return misa(weights, backend="cuda", max_grad_norm=MAX_NORM)


def misa_stochastic(weights: list[Tensor]) -> MISA:
    """MISA without master."""
    return misa(weights, param_precision="stochastic")


def misa_round_end(weights: list[Tensor]) -> MISA:
    """MISA whose every step ends a round, in which every module leaves and enters."""
    return misa(weights, inner_steps=1, keep_states="none")


def fused(weights: list[Tensor]) -> torch.optim.Optimizer:
    """Torch's fused AdamW; its moments have the dtype of the weights."""
    return torch.optim.AdamW(weights, lr=LR, fused=True)


def foreach(weights: list[Tensor]) -> torch.optim.Optimizer:
    """Torch's AdamW of one kernel an operation."""
    return torch.optim.AdamW(weights, lr=LR, foreach=True)


class Masters:
    """Mixed precision as it is done without a kernel of one's own: fp32 copies, fused AdamW, and back."""

    def __init__(self, weights: list[Tensor]) -> None:
        self._weights = weights
        self._masters = [weight.detach().float() for weight in weights]
        for master in self._masters:
            master.grad = torch.empty_like(master)
        self._adamw = fused(self._masters)

    @torch.no_grad()
    def step(self) -> None:
        """Clip and update."""
        torch._foreach_copy_([master.grad for master in self._masters], [weight.grad for weight in self._weights])
        clip(self._masters)
        self._adamw.step()
        torch._foreach_copy_(self._weights, self._masters)


def norms(weights: list[Tensor]) -> None:
    """‖g‖ of each tensor, which is what importance needs."""
    torch._foreach_norm([weight.grad for weight in weights])


def clip(weights: list[Tensor]) -> None:
    """Torch's clipping by the global norm."""
    torch.nn.utils.clip_grad_norm_(weights, MAX_NORM, foreach=True)


@dataclass(frozen=True)
class Peer:
    """A way to update the weights.

    Attributes:
        dtype: Of weights and gradients.
        moved_bytes: Bytes an element that the step must read and write, as its kernels are cut; 0 if unknown.
        make: Returns an object with `step()`; peers of the same dtype and `make` share it.
        before: What is done with the gradients before it, as part of the step.
    """

    dtype: torch.dtype
    moved_bytes: int
    make: Callable[[list[Tensor]], Any]
    before: Callable[[list[Tensor]], None] | None = None


# In the order of their worth: what the device has no memory for is at the end. Of 28 bytes, fp32: weight 4 + 4,
# gradient 4, moments 8 + 8; bf16: gradient 2, weight 2, moments 8 + 8, master 8. The norm reads the gradient
# again; torch's clipping also reads and writes it. foreach makes eight passes, sqrt into memory of its own.
PEERS = {
    "fp32 misa": Peer(FP32, 28, misa),
    "fp32 fused": Peer(FP32, 28, fused),
    "fp32 fused+norm": Peer(FP32, 32, fused, norms),
    "fp32 fused+clip": Peer(FP32, 40, fused, clip),
    "bf16 misa": Peer(BF16, 28, misa),
    "bf16 misa stochastic": Peer(BF16, 22, misa_stochastic),
    "fp32 misa clip": Peer(FP32, 32, misa_clip),
    "bf16 misa clip": Peer(BF16, 30, misa_clip),
    "fp32 misa cuda": Peer(FP32, 28, misa_cuda),
    "bf16 misa cuda": Peer(BF16, 28, misa_cuda),
    "bf16 misa cuda clip": Peer(BF16, 30, misa_cuda_clip),
    # To fp32 6, clip 12, AdamW 28, back 6.
    "bf16 masters+clip": Peer(BF16, 52, Masters),
    # Moments in bf16: less is moved, and less is kept of what is learned.
    "bf16 fused": Peer(BF16, 14, fused),
    "bf16 fused+norm": Peer(BF16, 16, fused, norms),
    "bf16 fused+clip": Peer(BF16, 20, fused, clip),
    "bf16 round end": Peer(BF16, 0, misa_round_end),
    "fp32 foreach": Peer(FP32, 80, foreach),
    "bf16 foreach": Peer(BF16, 40, foreach),
}
