"""How much does a GPU among many hold and send? Weights, gradients and states; activations are `step`'s.

Weights are bfloat16 where they are frozen and where they have a float32 master. Sources: collectives are rings, as
NCCL's for large tensors; what FSDP2 (torch.distributed.fsdp.fully_shard) gathers, reduces and keeps whole was compared
with its calls and its shards in runs of gloo processes, `tests/tools/test_planner.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from misa_kernels.tools.planner.shapes import LlamaShape

BF16_BYTES, FP32_BYTES = 2, 4
# Two moments and a master in float32.
STATE_BYTES = 3 * FP32_BYTES


@dataclass(frozen=True)
class Need:
    """What one GPU holds and sends.

    Args:
        weights: Bytes of weights, its shard or all of them.
        gradients: Bytes of gradients at the end of backward.
        states: Bytes of moments and masters, or float32 weights.
        gathered: Bytes that FSDP2 holds for the layer at work and the next one, and its gradients.
        sent: Bytes that the GPU sends in a step.
    """

    weights: float
    gradients: float
    states: float
    gathered: float
    sent: float

    @property
    def resident(self) -> float:
        """Bytes held at once, activations left out."""
        return self.weights + self.gradients + self.states + self.gathered


def ring(numel_bytes: float, ranks: int) -> float:
    """Return the bytes that a rank sends to gather or to scatter a tensor; an all-reduce is both."""
    return numel_bytes * (ranks - 1) / ranks


def unsharded(outside_bytes: float, layer_bytes: float, gradient_bytes: float) -> float:
    """Return the bytes of FSDP2's whole units: what lies outside the layers, two layers, and gradients of one.

    The unit outside the layers stays whole from forward to backward; the next layer is gathered during the one at work.
    """
    return outside_bytes + 2 * layer_bytes + gradient_bytes


def _fsdp2(
    shape: LlamaShape, ranks: int, weights: float, gradients: float, states: float, in_layer: float, depth: int
) -> Need:
    """Return what FSDP2 needs of these bytes in all; a layer has gradients of `in_layer` elements at most."""
    layer, outside = BF16_BYTES * shape.layer_numel, BF16_BYTES * shape.outside_numel
    # All weights are gathered for forward, and the layers of `depth` for backward.
    gathers = ring(BF16_BYTES * shape.numel + layer * depth, ranks)
    return Need(
        weights=weights / ranks,
        gradients=gradients / ranks,
        states=states / ranks,
        gathered=0 if ranks == 1 else unsharded(outside, layer, BF16_BYTES * in_layer),
        sent=gathers + ring(gradients, ranks),
    )


def adamw_fsdp2(shape: LlamaShape, ranks: int) -> Need:
    """AdamW on all weights: float32 shards, bfloat16 in forward and backward, gradients summed in float32."""
    whole = FP32_BYTES * shape.numel
    return _fsdp2(shape, ranks, whole, whole, 2 * whole, shape.layer_numel, shape.layers)


def lora_fsdp2(shape: LlamaShape, ranks: int, rank: int = 16) -> Need:
    """AdamW on float32 LoRA adapters of all matrices, the frozen bfloat16 weights sharded."""
    adapters = shape.lora_numel(rank)
    whole = FP32_BYTES * adapters
    need = _fsdp2(
        shape,
        ranks,
        BF16_BYTES * shape.numel + whole,
        whole,
        2 * whole,
        adapters / shape.layers,
        shape.layers,
    )
    # Forward and backward gather the adapters, too.
    return replace(need, sent=need.sent + ring(2 * whole, ranks))


def misa_fsdp2(shape: LlamaShape, ranks: int, delta: float, depth: int | None = None) -> Need:
    """MISA with masters, bfloat16 weights sharded.

    Args:
        shape: Of the model.
        ranks: GPUs.
        delta: Fraction δ of the parameters that is active.
        depth: Layers that backward runs through; all if None.
    """
    active = delta * shape.numel
    depth = shape.layers if depth is None else depth
    bytes_of = BF16_BYTES * shape.numel, BF16_BYTES * active, STATE_BYTES * active
    return _fsdp2(shape, ranks, *bytes_of, min(active, shape.layer_numel), depth)


def misa_replicate(shape: LlamaShape, ranks: int, delta: float) -> Need:
    """MISA with masters, the whole model on every GPU: only the gradients of the active set travel."""
    active = delta * shape.numel
    gradients = BF16_BYTES * active
    return Need(BF16_BYTES * shape.numel, gradients, STATE_BYTES * active, 0, 2 * ring(gradients, ranks))
