"""How much memory does a training step of a decoder take? Counted from its shapes, part by part; runs nothing.

Widths are those of a `LlamaShape`: h hidden, f intermediate, q queries, k keys and values, V vocabulary; e is the bytes
of an element and n the tokens of a batch. Attention is a fused one without a mask.

Sources: what torch's autograd saves. A linear layer saves its input where its weight is trained, and its weight, which
exists anyhow, where its input needs a gradient. For a slice of columns `gradients/hooks.py` saves a copy of these
columns of the input, for one of rows all of it. What needs no gradient saves nothing: layers below the lowest active
module, and the inputs of frozen linears. Each part was compared with bytes counted allocation by allocation:
`benchmarks/results/training_memory.md` for a LLaMA in plain PyTorch, `tests/tools/test_plan.py` for models of
transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Literal

from misa_kernels.gradients.axes import Slice
from misa_kernels.tools.planner.fsdp import unsharded
from misa_kernels.tools.planner.shapes import LINEARS, LlamaShape

# Float32 tensors of the logits' size in the backward pass of cross-entropy: log-probabilities, their gradient, and that
# of the logits.
LOGITS = 3
# A slice of a sharded weight has its gradient averaged in float32, beside the gradient itself.
AVERAGED_BYTES = 4
# QLoRA (arXiv 2305.14314), section 3: 4 bits, a scale of 8 bits for 64 elements, and one of 32 bits for 256 of these.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Workload:
    """A training run, as far as its memory goes.

    Attributes:
        shape: Of the model.
        tokens: n.
        element: e, 2 for bfloat16 and 4 for float32 weights.
        chunk: Tokens whose logits are held at once, n for all of them.
        checkpointing: Whether a layer keeps its input alone.
        active: Linears trained in each layer; those of LoRA stay frozen and are not named here.
        sliced: Linears of each layer that are trained in a slice, and in which; they are not in `active`.
        dense: Whether norms and biases are trained, too.
        outside: Whether embedding and head are.
        rank: Of LoRA's adapters on all linears; 0 for none.
        adapter_element: Bytes of an adapter's element. Where it is not e, as in peft, which makes adapters of
            16-bit models float32, every adapted linear keeps a copy of its input in the adapters' dtype.
        quantised: Whether the matrices of the layers are NF4, as QLoRA's; slices are then parameters beside them.
        state_elements: Parameters that have optimizer state.
        state_bytes: Bytes of moments, masters or residuals for each of them.
        released: Whether a gradient is freed before the next one comes.
        waiting: The most bytes of small gradients that wait for one another where they are released.
        alone: Active matrices or slices of which none waits; among twice as many, one waits for another, and so on.
        round_end: Bytes that the end of a round takes beside weights, gradients and states.
        paged: Bytes of states that lie in host memory but while their tensor is updated.
        update_outside: Bytes that the update of one tensor works with, the most of any outside the layers,
        update_within: and of any matrix within.
        offloaded: Whether what the forward pass keeps lies in host memory until its layer's backward.
        norms: Who computes them: "fused" keeps the input as it is (torch on GPUs), "torch" in float32 (torch on
            CPUs), as "transformers" does in its own code.
        ranks: GPUs over which FSDP2 shards weights, gradients and states.
    """

    shape: LlamaShape
    tokens: int
    element: int
    chunk: int
    checkpointing: bool
    active: Mapping[int, Set[str]] = field(default_factory=dict)
    sliced: Mapping[int, Mapping[str, Slice]] = field(default_factory=dict)
    dense: bool = False
    outside: bool = False
    rank: int = 0
    adapter_element: int = 0
    quantised: bool = False
    state_elements: int = 0
    state_bytes: float = 0.0
    released: bool = False
    waiting: int = 0
    alone: int = 1
    round_end: int = 0
    paged: float = 0.0
    update_outside: float = 0.0
    update_within: float = 0.0
    offloaded: bool = False
    norms: Literal["fused", "torch", "transformers"] = "transformers"
    ranks: int = 1


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        weights: Of model and adapters.
        states: Moments, masters and residuals.
        gradients: Held after the backward pass.
        kept: Activations that the forward pass leaves, without the loss's.
        activations: The most that activations, loss and what backward works with take at once.
        peak_gradients: Gradients at the moment of the peak.
        peak_activations: Everything else at this moment, beyond weights and states.
        paged: States in host memory, which are on the GPU one tensor's at a time, while that is updated.
        offloaded: Activations in host memory, when backward begins.
    """

    weights: float
    states: float
    gradients: float
    kept: float
    activations: float
    peak_gradients: float
    peak_activations: float
    paged: float = 0.0
    offloaded: float = 0.0

    @property
    def peak(self) -> float:
        """The most that is held at once."""
        return self.weights + self.states + self.peak_gradients + self.peak_activations


def norm_bytes(run: Workload) -> tuple[int, int]:
    """Return the bytes an element that a norm keeps of its input, and, to train its weight, of what it multiplies.

    Source: LlamaRMSNorm turns its input into float32 and multiplies its weight by e-byte numbers; GemmaRMSNorm and
    torch's rms_norm on CPUs multiply in float32; torch's fused one recomputes.
    """
    if run.norms == "fused":
        return run.element, 0
    return 4, run.element if run.norms == "transformers" and not run.shape.float32_norms else 4


def kept_by_layer(run: Workload, active: Set[str], sliced: Mapping[str, Slice], reached: bool) -> dict[str, int]:
    """Return the bytes a token that one layer keeps for backward, by tensor, each once whoever shares it.

    Args:
        run: The run.
        active: Linears trained here,
        sliced: and those of which a slice is.
        reached: Whether the layer's input needs a gradient.
    """
    shape, e, matrices = run.shape, run.element, run.shape.matrices
    h, f, q_width, k_width = shape.hidden, shape.intermediate, matrices["q_proj"][0], matrices["k_proj"][0]
    kept: dict[str, int] = {}

    def norm(name: str, needs: bool, width: int = h, rows: int = 1) -> bool:
        if needs:
            kept[f"input of {name}"], kept[f"1 / rms of {name}"] = width * norm_bytes(run)[0], 4 * rows
        if run.dense:
            kept[f"{name} before its weight"] = width * norm_bytes(run)[1]
        return needs or run.dense

    def linear(name: str, source: str, needs: bool) -> bool:
        columns, piece = matrices[name][1], sliced.get(name)
        if piece is not None and piece.axis == 1 and piece.last - piece.first < columns:
            kept[f"{source}, columns of {name}'s slice"] = (piece.last - piece.first) * e
        elif piece is not None or name in active or run.rank and run.adapter_element == e:
            kept[source] = columns * e
        elif run.rank:
            kept[f"{source} for {name}'s adapter"] = columns * run.adapter_element
        if run.rank:
            kept[f"A x of {name}"] = run.rank * run.adapter_element
        return needs or piece is not None or name in active or run.rank > 0

    x = norm("norm 1", reached)
    q, key, v = [linear(name, "output of norm 1", x) for name in LINEARS[:3]]
    if shape.qk_norm:
        q, key = norm("q norm", q, q_width, shape.heads), norm("k norm", key, k_width, shape.kv_heads)
    attention = q or key or v
    if attention:
        # Keys and queries after the rotation, whose angles all layers share.
        kept |= {"q": q_width * e, "k": k_width * e, "v": k_width * e}
        kept |= {"output of attention": q_width * e, "log-sum-exp": 4 * shape.heads}
    attention = linear("o_proj", "output of attention", attention)
    if shape.norms > 2:
        attention = norm("norm behind attention", attention)
    x = norm("norm 2", attention or reached)
    gate, up = [linear(name, "output of norm 2", x) for name in LINEARS[4:6]]
    if gate:
        kept |= {"gate": f * e, "up": f * e}
    if up:
        kept["silu"] = f * e
    down = linear("down_proj", "silu * up", gate or up)
    if shape.norms > 2:
        norm("norm behind MLP", down)
    return kept


def passing_bytes(run: Workload, kept: Mapping[str, int]) -> float:
    """Return the most that the backward pass of an MLP, the widest part of a layer, holds beyond what was kept.

    Args:
        run: The run.
        kept: What `kept_by_layer` says of the layer.
    """
    e, a, h, f = run.element, run.adapter_element, run.shape.hidden, run.shape.intermediate
    # The gradient of what leaves the layer, of silu * up, of silu, and of up; the input of down_proj is gone by then.
    into_down = sum(size for name, size in kept.items() if name.startswith("silu * up"))
    gated = e * (h + 3 * f) - into_down
    # Before that, down_proj's: the gradient of its input, and of an adapter's copy, which is cast and added.
    down = e * (h + f)
    if run.rank:
        down = e * (h + 2 * f) if a == e else (e + a) * h + (3 * e + a) * f
    if run.offloaded and not run.checkpointing:
        # Each operator's own come back for it alone.
        gated, down = gated + into_down + kept.get("silu", 0) + kept.get("up", 0), down + into_down
    dequantised = e * max(run.shape.matrix_numel.values()) + run.tokens * e * (h + f) if run.quantised else 0
    return max(run.tokens * max(gated, down), dequantised)


def count(run: Workload) -> Memory:
    """Return the bytes of each part and of the peak.

    The peak is the largest over the moments of a backward pass: when it begins, holding everything kept and one chunk's
    logits; in each layer on the way down, when gradients above it are there and the activations below it still are; at
    its end; and at the end of a round. FSDP2 shards what lasts, and holds its whole units (`fsdp.unsharded`) meanwhile.
    """
    shape, e, n = run.shape, run.element, run.tokens
    h, layers = shape.hidden, range(shape.layers)
    matrices = {name: e * numel for name, numel in shape.matrix_numel.items()}
    adapters = run.adapter_element * shape.lora_numel(run.rank) // shape.layers
    vectors = e * (shape.layers * shape.vector_numel + h)
    embedding, head = shape.vocab * h * e, 0 if shape.tied else shape.vocab * h * e
    in_layer = sum(shape.matrix_numel.values()) * (NF4_BYTES if run.quantised else e) + adapters
    weights = embedding + head + vectors + shape.layers * in_layer

    # Bytes of the gradients of each layer.
    trained = [
        {name: matrices[name] for name in run.active.get(layer, ())}
        | {name: e * shape.slice_numel(name, piece) for name, piece in run.sliced.get(layer, {}).items()}
        for layer in layers
    ]
    beside = [run.quantised * sum(own.values()) for own in trained]
    weights += sum(beside)
    everywhere = run.dense or run.outside or run.rank
    lowest = 0 if everywhere else min((layer for layer in layers if trained[layer]), default=shape.layers)
    tensors = [
        kept_by_layer(run, run.active.get(layer, set()), run.sliced.get(layer, {}), layer > lowest or run.outside)
        if layer >= lowest
        else {}
        for layer in layers
    ]
    inside = [n * sum(each.values()) for each in tensors]
    # A layer that is checkpointed keeps its input, whether that needs a gradient or not.
    kept = [n * h * e if layer >= lowest else 0 for layer in layers] if run.checkpointing else inside
    # Input of the last norm, its output where the chunks of the loss share it or the head is trained, and the
    # rotation's cosine and sine.
    kept_last = n * (h * norm_bytes(run)[0] + 4 + 2 * shape.head_width * e)
    kept_last += n * h * (norm_bytes(run)[1] * run.dense + e * (run.outside or run.chunk < n))

    gradients = [sum(own.values()) + adapters for own in trained]
    held: float = sum(gradients) + run.dense * vectors + run.outside * (embedding + head)
    head_gradient = (head or embedding) if run.outside else 0
    logits = LOGITS * 4 * run.chunk * shape.vocab
    if run.chunk < n:
        # The head's gradients of two chunks and their sum, which autograd does not take in place.
        loss = n * h * e + max(logits + head_gradient, 3 * head_gradient)
    else:
        # The logits' gradient in e bytes replaces float32 ones before the head's backward begins.
        loss = max(logits, (4 + e) * n * shape.vocab, e * n * (shape.vocab + h) + head_gradient)
    smallest = min((size for own in trained for size in own.values()), default=0)
    together = math.ceil(sum(map(len, trained)) / run.alone)
    waiting = min(run.waiting, max(together - 1, 0) * smallest)
    # Of what is kept, what is on the GPU when its backward has not begun; checkpoints do not offload the rotation.
    there, there_last = kept, kept_last
    if run.offloaded:
        there, there_last = [0 for _ in kept], n * 2 * shape.head_width * e * run.checkpointing
        # Beside the logits' gradient, the head's input comes back to train it.
        loss = max(loss, n * (e * shape.vocab + 2 * h * e) + head_gradient) if run.chunk == n else loss
    # (gradients, all else) of each moment.
    moments: list[tuple[float, float]] = [(0, sum(there) + there_last + loss)]
    outside, within = run.update_outside / run.ranks, run.update_within / run.ranks
    if run.released and run.outside:
        moments.append((head_gradient / run.ranks, sum(there) + there_last + n * h * e + outside))
        # Tied weights have one gradient, the sum of both.
        moments.append(((1 + shape.tied) * embedding / run.ranks, n * h * e))
        moments.append((embedding / run.ranks, n * h * e + outside))
    for layer in layers:
        above: float = sum(gradients[layer + 1 :]) + head_gradient
        above = min(above, waiting) + head_gradient * shape.tied if run.released else above
        passing = passing_bytes(run, tensors[layer]) if layer >= lowest else 0
        last = trained[layer].get("down_proj", 0)
        again = inside[layer] if run.checkpointing else 0
        back = kept[layer] if run.offloaded and run.checkpointing else 0
        held_here = sum(there[: layer + 1]) + back + again
        moments.append((above / run.ranks + last, held_here + passing))
        if run.offloaded and not run.checkpointing:
            # At its first norm, in float32, all of the layer's gradients are there.
            moments.append(((above + gradients[layer]) / run.ranks, n * h * (2 * e + 4 * 4)))
        if run.released:
            moments.append((above / run.ranks + last, held_here + n * e * (h + shape.intermediate) + within))
    held = 0.0 if run.released else held
    working = 0.0 if run.released else max(outside, within)
    moments += [(held / run.ranks, n * h * e), (held / run.ranks, max(run.round_end, working))]
    layer_bytes = in_layer + max(beside) + e * shape.vector_numel
    sliced = [] if run.quantised else [trained[layer] for layer in run.sliced]
    averaged = [AVERAGED_BYTES * size / e for own in sliced for size in own.values()]
    whole = unsharded(embedding + head + h * e, layer_bytes, max(averaged or gradients)) if run.ranks > 1 else 0
    peak_gradients, peak_activations = max(moments, key=sum)
    return Memory(
        weights=weights / run.ranks,
        states=run.state_elements * run.state_bytes / run.ranks,
        gradients=held / run.ranks,
        kept=sum(there) + there_last,
        activations=max(activations for _, activations in moments) + whole,
        peak_gradients=peak_gradients,
        peak_activations=peak_activations + whole,
        paged=run.paged / run.ranks,
        # The log-probabilities, too, where no chunks make them again.
        offloaded=(sum(kept) + kept_last - there_last + 4 * n * shape.vocab * (run.chunk == n)) * run.offloaded,
    )
