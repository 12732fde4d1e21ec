"""What does each way of training need for one model, in its costliest step, and which of them fit into a card?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

import numpy as np
import torch

from misa_kernels.draw.rehearsal import costliest
from misa_kernels.draw.scores import Candidates
from misa_kernels.memory.arena import MOVE_ELEMENTS
from misa_kernels.memory.storage import Storage
from misa_kernels.release import HELD_BYTES, LAUNCHES
from misa_kernels.tools.planner.shapes import LINEARS, LlamaShape
from misa_kernels.tools.planner.step import Memory, Workload, count

# What each row of a plan is, and what it assumes.
METHODS = {
    "AdamW": "all weights, float32 moments and, for bfloat16 weights, float32 masters",
    "AdamW 8-bit": "bitsandbytes: all weights, moments of a byte with a scale for 256 of them, no masters",
    "FlashOptim": "flashoptim: all weights, in 24 bits if bfloat16; moments of a byte with a scale for 32 of them",
    "LoRA": "peft: float32 adapters on the matrices of the layers, AdamW",
    "QLoRA": "LoRA on these matrices in NF4 with double quantisation; embedding, head and norms stay as they are",
    "BAdam": "one layer's matrices at a time, float32 moments and masters",
    "LISA": "two layers' matrices at a time, embedding and head always, float32 moments and masters",
    "MISA": "the costliest set of matrices it may draw",
}
# LISA (arXiv 2403.17919), section 4: two layers at a time beside embedding and head.
LISA_LAYERS = 2
# bitsandbytes 0.50, optim/optimizer.py: a byte for each moment, and a float32 scale for 256 of them.
BITSANDBYTES_BYTES = 2 * (1 + 4 / 256)
# flashoptim 0.1.4, optimizers.py: a byte for each moment, a float16 scale for 32 of them.
FLASHOPTIM_BYTES = 2 * (1 + 2 / 32)
# `fit` looks for delta in steps of this.
DELTA_STEP = 1e-4


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
        release_gradients: Whether MISA and flashoptim free each gradient within backward.
        rank: Of LoRA's and QLoRA's adapters.
        world_size: GPUs over which FSDP2 shards weights, gradients and states.
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


def state_bytes(options: Setup, state_dtype: str = "fp32", param_precision: str = "master") -> float:
    """Return the bytes of state for a trained parameter of MISA, or with the defaults of float32 AdamW.

    Source: `Storage.buffers`, which the optimizer allocates by.
    """
    buffers = Storage(state_dtype, param_precision).buffers(getattr(torch, options.dtype))
    return sum(kind.entries / kind.elements * kind.dtype.itemsize for kind in buffers.values())


def costliest_set(shape: LlamaShape, delta: float, depth_window: int | None) -> dict[int, set[str]]:
    """Return the matrices of each layer in the admissible draw that needs the most memory.

    Source: `misa_kernels.draw.rehearsal.costliest`, with which `MISA.rehearse` makes the first round.

    Raises:
        ValueError: If the largest matrix does not fit into δ N.
    """
    budget, largest = math.floor(delta * shape.numel), max(shape.matrix_numel.values())
    if largest > budget:
        least = math.ceil(largest / shape.numel / DELTA_STEP) * DELTA_STEP
        raise ValueError(
            f"delta={delta:g} must leave room for the largest matrix, {largest:,} of {shape.numel:,} parameters: "
            f"give {least:.4f} or more"
        )
    candidates = Candidates.fresh(
        numel=np.array([*shape.matrix_numel.values()] * shape.layers),
        layer=np.repeat(np.arange(shape.layers), len(LINEARS)),
    )
    width = np.array([columns for _, columns in shape.matrices.values()] * shape.layers)
    active: dict[int, set[str]] = {}
    for number in costliest(candidates, width, budget, depth_window).tolist():
        active.setdefault(number // len(LINEARS), set()).add(LINEARS[number % len(LINEARS)])
    return active


def memory(method: str, shape: LlamaShape, options: Setup) -> Memory:
    """Return what a step takes on one GPU.

    Args:
        method: A key of `METHODS`.
        shape: Of the model.
        options: How it is trained; transformers' own norms are assumed, and an update that needs nothing beyond its
            state, as torch's fused AdamW and MISA's step do.

    Raises:
        ValueError: If MISA's δ has no room for the largest matrix.
    """
    everything: Mapping[int, Set[str]] = dict.fromkeys(range(shape.layers), frozenset(LINEARS))
    wide, tokens = state_bytes(options), options.batch * options.sequence
    narrow = options.dtype == "bfloat16"
    matrices = sum(shape.matrix_numel.values())
    run = Workload(
        shape=shape,
        tokens=tokens,
        element=2 if narrow else 4,
        chunk=min(options.loss_chunk or tokens, tokens),
        checkpointing=options.checkpointing,
        ranks=options.world_size,
        state_bytes=wide,
    )
    if method in ("AdamW", "AdamW 8-bit", "FlashOptim"):
        of_state = {"AdamW": wide, "AdamW 8-bit": BITSANDBYTES_BYTES, "FlashOptim": FLASHOPTIM_BYTES + narrow}[method]
        run = replace(run, active=everything, dense=True, outside=True, state_elements=shape.numel)
        run = replace(run, state_bytes=of_state, released=options.release_gradients and method == "FlashOptim")
    elif method in ("LoRA", "QLoRA"):
        # peft makes adapters float32 unless autocast_adapter_dtype=False.
        run = replace(run, rank=options.rank, adapter_element=4, quantised=method == "QLoRA", state_bytes=8)
        run = replace(run, state_elements=shape.lora_numel(options.rank))
    elif method == "BAdam":
        run = replace(run, active={0: set(LINEARS)}, state_elements=matrices)
    elif method == "LISA":
        active = {0: set(LINEARS), shape.layers - 1: set(LINEARS)}
        trained = len(active) * matrices + shape.outside_numel - shape.hidden
        run = replace(run, active=active, outside=True, state_elements=trained)
    else:
        run = replace(
            run,
            active=costliest_set(shape, options.delta, options.depth_window),
            # Allocated once, for any draw.
            state_elements=min(math.floor(options.delta * shape.numel), shape.layers * matrices),
            state_bytes=state_bytes(options, options.state_dtype, options.param_precision),
            released=options.release_gradients,
            waiting=HELD_BYTES,
            alone=LAUNCHES,
            # States of modules that stay move through a buffer.
            round_end=4 * min(MOVE_ELEMENTS, max(shape.matrix_numel.values())),
        )
    return count(run)


def weights_and_states(numel: float, options: Setup) -> dict[str, tuple[float, float, float]]:
    """Return the bytes of weights, gradients and states of what needs no more than the number of parameters."""
    element, narrow = (2, True) if options.dtype == "bfloat16" else (4, False)
    own = state_bytes(options, options.state_dtype, options.param_precision)
    trained = {
        "AdamW": (numel, state_bytes(options), False),
        "AdamW 8-bit": (numel, BITSANDBYTES_BYTES, False),
        "FlashOptim": (numel, FLASHOPTIM_BYTES + narrow, options.release_gradients),
        "MISA": (options.delta * numel, own, options.release_gradients),
    }
    share = 1 / options.world_size
    return {
        name: (element * numel * share, element * active * share * (not released), active * of_state * share)
        for name, (active, of_state, released) in trained.items()
    }


def fit(shape: LlamaShape, options: Setup, cap_bytes: float) -> float | None:
    """Return a δ with which MISA's peak stays within the cap, while with `DELTA_STEP` more it does not.

    1 if that fits, None if no admissible δ does.
    """
    low = math.ceil(max(shape.matrix_numel.values()) / shape.numel / DELTA_STEP)
    high = round(1 / DELTA_STEP)

    def fits(steps: int) -> bool:
        return memory("MISA", shape, replace(options, delta=steps * DELTA_STEP)).peak <= cap_bytes

    if not fits(low):
        return None
    if fits(high):
        return 1.0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return round(low * DELTA_STEP, 4)


def advice(shape: LlamaShape, options: Setup, peaks: Mapping[str, float], cap_bytes: float) -> str:
    """Return in words what to take where so many bytes may be used, given the peak of each method."""
    first = "AdamW fits, and learns more a step than what trains less. " if peaks["AdamW"] <= cap_bytes else ""
    largest = fit(shape, options, cap_bytes)
    if largest is not None:
        return first + f"MISA fits, up to --delta {largest:g}."
    narrow = options.dtype == "bfloat16"
    lean = replace(options, state_dtype="int8", release_gradients=True)
    lean = replace(lean, param_precision="split" if narrow else "master")
    largest = fit(shape, lean, cap_bytes)
    if largest is not None:
        flags = "--state-dtype int8 --release-gradients" + " --param-precision split" * narrow
        return first + f"MISA fits with {flags}, up to --delta {largest:g}."
    why = "MISA fits with no delta"
    weights = (2 if narrow else 4) * shape.numel / options.world_size
    if weights > cap_bytes:
        why = f"The {options.dtype} weights alone, {weights / 2**30:.1f} GiB, do not fit"
    if peaks["QLoRA"] <= cap_bytes:
        return (
            f"{first}{why}: QLoRA, whose matrices have 4 bits, is the better choice here, with a peak of "
            f"{peaks['QLoRA'] / 2**30:.1f} GiB."
        )
    return f"{first}{why}, nor does QLoRA: take more GPUs (--world-size), shorter sequences, or --loss-chunk 1024."
