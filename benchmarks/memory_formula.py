"""How much memory should a training step of a LLaMA take? Counted from its shapes, part by part; runs nothing.

Nothing here shares code with what `training_memory` measures. Widths are those of a `Shape`: h hidden, f intermediate,
k keys and values, V vocabulary; e is the bytes of an element and n the tokens of a batch.

A linear layer saves its input where its weight is trained, and its weight, which exists anyhow, where its input needs a
gradient. What needs no gradient saves nothing: layers below the lowest active module, and the inputs of frozen linears.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from benchmarks.llama import LINEARS, Shape

# Float32 tensors of the logits' size in the backward pass of cross-entropy: log-probabilities, their gradient, and that
# of the logits.
LOGITS = 3


@dataclass(frozen=True)
class Run:
    """A training run, as far as its memory goes.

    Attributes:
        shape: Of the model.
        tokens: n.
        element: e, 2 for bfloat16 and 4 for float32 weights.
        chunk: Tokens whose logits are held at once.
        checkpointing: Whether a layer keeps its input alone.
        active: Linears trained in each layer; those of LoRA stay frozen and are not named here.
        dense: Whether embedding, norms and head are trained, too.
        rank: Of LoRA's adapters on all linears; 0 for none.
        state_elements: Parameters that have optimizer state.
        state_bytes: Bytes of moments, masters or residuals for each of them.
        released: Whether a gradient is freed before the next one comes.
        fused_norms: Whether a norm keeps its input as it is (GPUs) or in float32 (CPUs).
    """

    shape: Shape
    tokens: int
    element: int
    chunk: int
    checkpointing: bool
    active: Mapping[int, Set[str]] = field(default_factory=dict)
    dense: bool = False
    rank: int = 0
    state_elements: int = 0
    state_bytes: float = 0.0
    released: bool = False
    fused_norms: bool = False


def sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Return output and input features of the linears of a layer."""
    h, f, k = shape.hidden, shape.intermediate, shape.hidden // shape.heads * shape.kv_heads
    return dict(zip(LINEARS, ((h, h), (k, h), (k, h), (h, h), (f, h), (f, h), (h, f)), strict=True))


def kept_by_layer(run: Run, active: Set[str], reached: bool) -> dict[str, int]:
    """Return the bytes a token that one layer keeps for backward, by tensor, each once whoever shares it.

    Args:
        run: The run.
        active: Linears trained here.
        reached: Whether the layer's input needs a gradient.
    """
    e, h, f, k = run.element, run.shape.hidden, run.shape.intermediate, sizes(run.shape)["k_proj"][0]
    kept: dict[str, int] = {}

    def norm(name: str, needs: bool) -> bool:
        if needs:
            kept[f"input of {name}"], kept[f"1 / rms of {name}"] = h * (e if run.fused_norms else 4), 4
        if run.dense and not run.fused_norms:
            kept[f"{name} before its weight"] = 4 * h
        return needs or run.dense

    def linear(name: str, source: str, needs: bool) -> bool:
        trained = name in active or run.rank > 0
        if trained:
            kept[source] = sizes(run.shape)[name][1] * e
        if run.rank:
            kept[f"A x of {name}"] = run.rank * e
        return needs or trained

    x = norm("norm 1", reached)
    q, key, v = [linear(name, "output of norm 1", x) for name in LINEARS[:3]]
    if q or key or v:
        # Keys and queries after the rotation, whose angles all layers share.
        kept |= {"q": h * e, "k": k * e, "v": k * e, "output of attention": h * e, "log-sum-exp": 4 * run.shape.heads}
    x = linear("o_proj", "output of attention", q or key or v) or reached
    x2 = norm("norm 2", x)
    gate, up = [linear(name, "output of norm 2", x2) for name in LINEARS[4:6]]
    if gate:
        kept |= {"gate": f * e, "up": f * e}
    if up:
        kept["silu"] = f * e
    linear("down_proj", "silu * up", gate or up)
    return kept


def count(run: Run) -> dict[str, float]:
    """Return the bytes of each part and of the peak.

    The peak is the largest over the moments of a backward pass: when it begins, holding everything kept and one chunk's
    logits; in each layer on the way down, when gradients above it are there and the activations below it still are; and
    at its end.

    Returns:
        "weights", of model and adapters; "states"; "activations", what the forward pass leaves; "gradients", held
        after the backward pass; "working", what the moment of the peak holds beyond these; "peak".
    """
    shape, e, n = run.shape, run.element, run.tokens
    h, f, layers = shape.hidden, shape.intermediate, range(shape.layers)
    linears = sizes(shape)
    adapters = run.rank * sum(map(sum, linears.values()))
    embedding, head = shape.vocab * h * e, 0 if shape.tied else shape.vocab * h * e
    norms = (2 * shape.layers + 1) * h * e
    matrices = {name: e * rows * columns for name, (rows, columns) in linears.items()}
    weights = embedding + head + norms + shape.layers * (sum(matrices.values()) + adapters * e)
    states = run.state_elements * run.state_bytes

    trained = [run.active.get(layer, set()) for layer in layers]
    lowest = 0 if run.dense or run.rank else min((layer for layer in layers if trained[layer]), default=shape.layers)
    inside = [
        n * sum(kept_by_layer(run, trained[layer], layer > lowest or run.dense).values()) if layer >= lowest else 0
        for layer in layers
    ]
    # A layer that is checkpointed keeps its input, whether that needs a gradient or not.
    kept = [n * h * e if layer >= lowest else 0 for layer in layers] if run.checkpointing else inside
    # Input of the last norm, its output, which the chunks of the loss share, and the rotation's cosine and sine.
    kept_last = n * (h * (e if run.fused_norms else 4) + 4 + h * e + 2 * h // shape.heads * e)
    kept_last += 4 * n * h * (run.dense and not run.fused_norms)

    gradients = [sum(matrices[name] for name in names) + adapters * e for names in trained]
    held = float(sum(gradients) + run.dense * (embedding + head + norms))
    logits = LOGITS * 4 * run.chunk * shape.vocab
    # The head's gradients of two chunks and their sum, which autograd does not take in place.
    head_sums = 3 * run.dense * head if run.chunk < n else 0
    moments = [sum(kept) + kept_last + n * h * e + max(logits + run.dense * head, head_sums)]
    for layer in layers:
        above = sum(gradients[layer + 1 :]) + run.dense * head
        if run.released:
            above = 0
        # The MLP's backward: the gradient of what leaves the layer, of silu * up, of silu, and of up.
        passing = n * e * (h + 3 * f) if layer >= lowest else 0
        last = matrices["down_proj"] if "down_proj" in trained[layer] else 0
        again = inside[layer] if run.checkpointing else 0
        moments.append(sum(kept[: layer + 1]) + again + passing + above + last)
    if run.released:
        held = 0.0
    moments.append(held + n * h * e)
    peak = max(moments)
    total = {"weights": weights, "states": states, "activations": sum(kept) + kept_last, "gradients": held}
    return total | {"during the step": peak, "peak": weights + states + peak}
