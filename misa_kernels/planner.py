"""How much memory and traffic will a way of training need? Pure arithmetic, before anything is allocated.

Sizes are bytes on one GPU, activations and what lives within one operator left out. Weights are bfloat16 where they are
frozen and where they have a float32 master; collectives are rings, as NCCL's for large tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

BF16_BYTES, FP32_BYTES = 2, 4
# Two moments and a master in float32.
STATE_BYTES = 3 * FP32_BYTES


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a LLaMA.

    Args:
        vocab: Tokens in the vocabulary.
        hidden: Width between the layers.
        intermediate: Width of the gated MLP.
        layers: Number of layers.
        heads: Query heads.
        kv_heads: Heads of keys and values.
        tied: Whether the embedding is the output head, too.
    """

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool = False

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(output, input) features of the seven matrices of a layer: q, k, v, o, gate, up, down."""
        kv = self.hidden // self.heads * self.kv_heads
        h, i = self.hidden, self.intermediate
        return (h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)

    @property
    def layer_numel(self) -> int:
        """Parameters of a layer: matrices and two norms."""
        return sum(rows * columns for rows, columns in self.matrices) + 2 * self.hidden

    @property
    def outside_numel(self) -> int:
        """Parameters outside the layers: embedding, head and last norm."""
        return (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden

    @property
    def numel(self) -> int:
        """All parameters, N."""
        return self.layers * self.layer_numel + self.outside_numel

    def lora_numel(self, rank: int) -> int:
        """Return the parameters of LoRA adapters on all matrices of all layers."""
        return self.layers * rank * sum(rows + columns for rows, columns in self.matrices)


SHAPES = {
    "llama3-8b": LlamaShape(128_256, 4096, 14_336, layers=32, heads=32, kv_heads=8),
    "llama3-70b": LlamaShape(128_256, 8192, 28_672, layers=80, heads=64, kv_heads=8),
    "llama3-405b": LlamaShape(128_256, 16_384, 53_248, layers=126, heads=128, kv_heads=8),
}


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


def gathers(shape: LlamaShape, ranks: int, depth: int) -> float:
    """Return the bytes a rank sends for FSDP2's all-gathers of bfloat16 weights: forward, and `depth` layers back."""
    forward = BF16_BYTES * shape.numel
    # What lies outside the layers is one unit, kept from forward to backward.
    return ring(forward + BF16_BYTES * shape.layer_numel * depth, ranks)


def unsharded(shape: LlamaShape, trained: float) -> float:
    """Return the bytes of FSDP2's whole units: those outside the layers, two layers, gradients of one.

    Args:
        shape: Of the model.
        trained: Elements of a layer that have gradients, at most.
    """
    return BF16_BYTES * (shape.outside_numel + 2 * shape.layer_numel + trained)


def adamw_fsdp2(shape: LlamaShape, ranks: int) -> Need:
    """AdamW on all weights: float32 shards, bfloat16 in forward and backward, gradients summed in float32."""
    share = shape.numel / ranks
    return Need(
        weights=FP32_BYTES * share,
        gradients=FP32_BYTES * share,
        states=2 * FP32_BYTES * share,
        gathered=0 if ranks == 1 else unsharded(shape, shape.layer_numel),
        sent=gathers(shape, ranks, shape.layers) + ring(FP32_BYTES * shape.numel, ranks),
    )


def lora_fsdp2(shape: LlamaShape, ranks: int, rank: int = 16) -> Need:
    """AdamW on float32 LoRA adapters of all matrices, the frozen bfloat16 weights sharded."""
    adapters = shape.lora_numel(rank)
    return Need(
        weights=(BF16_BYTES * shape.numel + FP32_BYTES * adapters) / ranks,
        gradients=FP32_BYTES * adapters / ranks,
        states=2 * FP32_BYTES * adapters / ranks,
        gathered=0 if ranks == 1 else unsharded(shape, adapters / shape.layers),
        sent=gathers(shape, ranks, shape.layers) + ring(FP32_BYTES * 3 * adapters, ranks),
    )


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
    return Need(
        weights=BF16_BYTES * shape.numel / ranks,
        gradients=BF16_BYTES * active / ranks,
        states=STATE_BYTES * active / ranks,
        gathered=0 if ranks == 1 else unsharded(shape, min(active, shape.layer_numel)),
        sent=gathers(shape, ranks, depth) + ring(BF16_BYTES * active, ranks),
    )


def misa_replicate(shape: LlamaShape, ranks: int, delta: float) -> Need:
    """MISA with masters, the whole model on every GPU: only the gradients of the active set travel."""
    active = delta * shape.numel
    return Need(
        weights=BF16_BYTES * shape.numel,
        gradients=BF16_BYTES * active,
        states=STATE_BYTES * active,
        gathered=0,
        sent=2 * ring(BF16_BYTES * active, ranks),
    )
