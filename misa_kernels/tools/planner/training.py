"""How is a model trained, and what does MISA keep then for each parameter that it trains?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from misa_kernels.kernels.ruled import PIECE
from misa_kernels.memory.storage import Storage

# What plain PyTorch takes an element where it rounds stochastically, or cuts float32 in two: measured.
ROUNDING_BYTES = {"master": 0, "split": 13, "stochastic": 49}


@dataclass(frozen=True)
class Setup:
    """What is trained on, and how.

    Attributes:
        batch: Sequences in a step on one GPU.
        sequence: Tokens of each.
        dtype: Of the weights, "bfloat16" or "float32".
        checkpointing: Whether layers keep their inputs alone.
        loss_chunk: Tokens whose logits are held at once; 0 for all, as in transformers' own loss.
        delta: MISA's δ.
        depth_window: MISA's, see `ImportanceSampler`.
        state_dtype: MISA's.
        param_precision: MISA's.
        release_gradients: Whether MISA and the methods in `RELEASED` free each gradient within backward.
        rank: Of LoRA's and QLoRA's adapters.
        world_size: GPUs over which FSDP2 shards weights, gradients and states.
        offload_activations: Whether what the forward pass keeps for backward lies in host memory, as with torch's
            `save_on_cpu`, TRL's `activation_offloading` and torchtune's `OffloadActivations`; weights are not moved.
        rule_bytes: Bytes of state that the rule of `MISA(rule=...)` keeps for a trained parameter; None: MISA's own
            AdamW.
    """

    batch: int = 1
    sequence: int = 2048
    dtype: str = "bfloat16"
    checkpointing: bool = True
    loss_chunk: int = 0
    delta: float = 0.03
    depth_window: int | None = None
    state_dtype: str = "fp32"
    param_precision: str = "master"
    release_gradients: bool = False
    rank: int = 16
    world_size: int = 1
    offload_activations: bool = False
    rule_bytes: float | None = None

    @property
    def element(self) -> int:
        """Bytes of an element of the weights."""
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def frees_gradients(self) -> bool:
        """Whether MISA frees each gradient within backward."""
        return self.release_gradients and self.rule_bytes is None


def own_bytes(options: Setup) -> float:
    """Return the bytes of state for a trained parameter of MISA."""
    own = state_bytes(options, options.state_dtype, options.param_precision)
    if options.rule_bytes is None:
        return own
    return own - Storage(options.state_dtype).moment_bytes(getattr(torch, options.dtype)) + options.rule_bytes


def work_of_rule(options: Setup, numel: int, largest: int, columns: int = 0) -> int:
    """Return the bytes that a step by a rule of the user's works with, that of the rule itself apart.

    Source: `RuledStep`: a copy of what is trained before the last step of a round, gradients in float32, copies of what
    stands in for 16-bit weights without masters, and of the weights of columns; and what their rounding takes.

    Args:
        options: How it is trained.
        numel: Parameters that are.
        largest: Of one tensor of them.
        columns: Of slices of columns.
    """
    if options.rule_bytes is None:
        return 0
    if options.dtype != "bfloat16":
        return 4 * numel + 4 * columns
    widened = 4 * (1 + (options.param_precision != "master"))
    return numel * (4 + widened) + 2 * columns + ROUNDING_BYTES[options.param_precision] * min(PIECE, largest)


def state_bytes(options: Setup, state_dtype: str = "fp32", param_precision: str = "master") -> float:
    """Return the bytes of state for a trained parameter of MISA, or with the defaults of float32 AdamW.

    Source: `Storage.buffers`, which the optimizer allocates by.
    """
    buffers = Storage(state_dtype, param_precision).buffers(getattr(torch, options.dtype))
    return sum(kind.entries / kind.elements * kind.dtype.itemsize for kind in buffers.values())
