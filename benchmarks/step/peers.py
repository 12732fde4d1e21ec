"""What is compared in the update benchmarks: MISA's step, torch's AdamW, and other packages' compressed AdamWs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.step.sliced import timed
from misa_kernels import MISA
from misa_kernels.memory.storage import Storage

FP32, BF16 = torch.float32, torch.bfloat16
LR = 1e-4
MAX_NORM = 1.0
# Bitsandbytes and torchao keep the moments of smaller tensors as they are.
SMALLEST_COMPRESSED = 4096
GALORE_RANK = 64


def misa(weights: list[Tensor], backend: str = "triton", **options: Any) -> MISA:
    """Return MISA with everything active, in a round without end; no fallback to the reference on a GPU."""
    if not weights[0].is_cuda and backend == "triton":
        backend = "reference"
    optimizer = MISA(weights, lr=LR, backend=backend, **{"delta": 1.0, "inner_steps": 10**6} | options)
    if len(optimizer.active) != len(weights):
        raise RuntimeError(f"{len(optimizer.active)} of {len(weights)} modules are active: all must be")
    return optimizer


# MISA as it is timed beside others; peers that name the same one share its state.
CLIPPED = partial(misa, max_grad_norm=MAX_NORM)
ON_CUDA, CLIPPED_ON_CUDA = partial(misa, backend="cuda"), partial(misa, backend="cuda", max_grad_norm=MAX_NORM)
WITHOUT_MASTER = partial(misa, param_precision="stochastic")
# Every step ends a round, in which every module leaves and enters.
ENDING = partial(misa, inner_steps=1, keep_states="none")


def fused(weights: list[Tensor]) -> torch.optim.Optimizer:
    """Torch's fused AdamW; its moments have the dtype of the weights."""
    return torch.optim.AdamW(weights, lr=LR, fused=True)


def foreach(weights: list[Tensor]) -> torch.optim.Optimizer:
    """Torch's AdamW of one kernel an operation."""
    return torch.optim.AdamW(weights, lr=LR, foreach=True)


def misa_stored(state_dtype: str, param_precision: str = "stochastic") -> Callable[[list[Tensor]], MISA]:
    """MISA with moments stored so; on a CPU in the C++ library where that knows the format."""

    def make(weights: list[Tensor]) -> MISA:
        backend = "triton" if weights[0].is_cuda else "auto"
        return misa(weights, backend, state_dtype=state_dtype, param_precision=param_precision)

    return make


def bitsandbytes(bits: int) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """Bitsandbytes' AdamW, a launch and a wait for the device a tensor."""

    def make(weights: list[Tensor]) -> torch.optim.Optimizer:
        from bitsandbytes.optim import AdamW8bit, AdamW32bit

        if bits == 8:
            check_compressible(weights, 1)
        return (AdamW8bit if bits == 8 else AdamW32bit)(weights, lr=LR)

    return make


def torchao(name: str, block: int) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """One of torchao's AdamWs, a function that it compiles at the first step for each shape of tensors."""

    def make(weights: list[Tensor]) -> torch.optim.Optimizer:
        import torchao.optim

        check_compressible(weights, block)
        return getattr(torchao.optim, name)(weights, lr=LR, block_size=block)

    return make


def check_compressible(weights: list[Tensor], block: int) -> None:
    """Raise where a package would keep moments as they are, and the times would be those of another format.

    Raises:
        ValueError: For a tensor that is too small, or not a whole number of blocks.
    """
    for weight in weights:
        if weight.numel() < SMALLEST_COMPRESSED or weight.numel() % block:
            raise ValueError(
                f"a tensor has {weight.numel()} elements, which must be {SMALLEST_COMPRESSED} or more and a multiple "
                f"of {block}: the moments of others stay uncompressed"
            )


def flashoptim(master_weight_bits: int | None) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """FlashOptim's AdamW of 8-bit moments; 24 bits are a bfloat16 weight and 8 bits of correction."""

    def make(weights: list[Tensor]) -> torch.optim.Optimizer:
        from flashoptim import FlashAdamW

        return FlashAdamW(weights, lr=LR, master_weight_bits=master_weight_bits)

    return make


def optimi(weights: list[Tensor]) -> torch.optim.Optimizer:
    """Optimi's AdamW on Triton: moments and Kahan's correction in the weights' bfloat16."""
    from optimi import AdamW

    return AdamW(weights, lr=LR, betas=(0.9, 0.999), eps=1e-8, triton=weights[0].is_cuda)


def badam_block(weights: list[Tensor]) -> torch.optim.Optimizer:
    """The BlockOptimizer of BAdam's package, all weights in one block that never changes: AdamW of float32 copies."""
    import contextlib
    import io
    import warnings

    from badam import BlockOptimizer

    named = [(f"layers.0.{number}", weight) for number, weight in enumerate(weights)]
    # It prints the block, and warns of float32 weights.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        made: torch.optim.Optimizer = BlockOptimizer(fused(weights), named, [["layers.0."]], 10**9)
    # Its step takes the gradients away.
    gradients: list[Tensor | None] = []

    def keep(*arguments: Any) -> None:
        gradients[:] = [weight.grad for weight in weights]

    def give_back(*arguments: Any) -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient

    made.register_step_pre_hook(keep)
    made.register_step_post_hook(give_back)
    return made


def galore(rank: int) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """GaLore's AdamW between two projections: those of the warm-up's first step, for the next million."""

    def make(weights: list[Tensor]) -> torch.optim.Optimizer:
        from galore_torch import GaLoreAdamW

        options = {"rank": rank, "update_proj_gap": 10**6, "scale": 0.25, "proj_type": "std"}
        made: torch.optim.Optimizer = GaLoreAdamW([{"params": weights, **options}], lr=LR, weight_decay=1e-2)
        return made

    return make


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
    moved_bytes: float
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
    "bf16 misa stochastic": Peer(BF16, 22, WITHOUT_MASTER),
    "fp32 misa clip": Peer(FP32, 32, CLIPPED),
    "bf16 misa clip": Peer(BF16, 30, CLIPPED),
    "fp32 misa cuda": Peer(FP32, 28, ON_CUDA),
    "bf16 misa cuda": Peer(BF16, 28, ON_CUDA),
    "bf16 misa cuda clip": Peer(BF16, 30, CLIPPED_ON_CUDA),
    # To fp32 6, clip 12, AdamW 28, back 6.
    "bf16 masters+clip": Peer(BF16, 52, Masters),
    # Moments in bf16: less is moved, and less is kept of what is learned.
    "bf16 fused": Peer(BF16, 14, fused),
    "bf16 fused+norm": Peer(BF16, 16, fused, norms),
    "bf16 fused+clip": Peer(BF16, 20, fused, clip),
    "bf16 round end": Peer(BF16, 0, ENDING),
    "fp32 foreach": Peer(FP32, 80, foreach),
    "bf16 foreach": Peer(BF16, 40, foreach),
}

# The same steps of slices of columns, in the bytes of those of whole tensors.
SLICES = {
    "bf16 misa slices": Peer(BF16, 28, timed("triton", Storage())),
    "fp32 misa slices": Peer(FP32, 28, timed("triton", Storage())),
    "bf16 misa slices cuda": Peer(BF16, 28, timed("cuda", Storage())),
}


# bfloat16 weights with moments below float32, in the order of their worth. MISA takes ‖g‖² in the same pass and rounds
# weights stochastically; the others round to nearest and have no norms. Of the bytes, weight and gradient are 6, and
# the rest is the state twice: codes, and float32 scales for 128 elements (two in fp8; for 256 in bitsandbytes and
# torchao's 8 bits), float16 ones for 32 in flashoptim. Those of packages are the fewest that any kernels could move.
FORMATS = {
    "bf16 misa int8": Peer(BF16, 10.125, misa_stored("int8")),
    "bf16 bnb 8bit": Peer(BF16, 10.0625, bitsandbytes(8)),
    "bf16 torchao 8bit": Peer(BF16, 10.0625, torchao("AdamW8bit", 256)),
    "bf16 misa fp8": Peer(BF16, 10.25, misa_stored("fp8")),
    "bf16 misa int8+int4": Peer(BF16, 9.125, misa_stored("int8+int4")),
    "bf16 misa bf16": Peer(BF16, 14, misa_stored("bf16")),
    "bf16 misa stochastic": Peer(BF16, 22, misa_stored("fp32")),
    # A copy is read and written and the weight written alone, or the 16 missing bits read and written.
    "bf16 misa int8 split": Peer(BF16, 14.125, misa_stored("int8", "split")),
    "bf16 misa int8 master": Peer(BF16, 16.125, misa_stored("int8", "master")),
    "bf16 flashoptim": Peer(BF16, 12.25, flashoptim(24)),
    "bf16 flashoptim 16bit": Peer(BF16, 10.25, flashoptim(None)),
    "bf16 fused": PEERS["bf16 fused"],
    "bf16 optimi": Peer(BF16, 18, optimi),
    "bf16 bnb 32bit": Peer(BF16, 22, bitsandbytes(32)),
    "bf16 torchao fp8": Peer(BF16, 10.0625, torchao("AdamWFp8", 256)),
    "bf16 torchao 4bit": Peer(BF16, 8.125, torchao("AdamW4bit", 128)),
    # Gradients to float32 6, AdamW 28, back by way of another copy 10.
    "bf16 badam": Peer(BF16, 44, badam_block),
    # Its products' bytes are not counted.
    "bf16 galore": Peer(BF16, 0, galore(GALORE_RANK)),
}
