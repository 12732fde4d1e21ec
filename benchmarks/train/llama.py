"""What a LLaMA of a given shape computes, in plain PyTorch with random weights: the model that is timed.

Module names are those of transformers' LlamaModel, so that adapters find their targets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from examples.loops.chunked_loss import chunked_cross_entropy
from misa_kernels.tools.planner.shapes import LINEARS as LINEARS
from misa_kernels.tools.planner.shapes import PRESETS
from misa_kernels.tools.planner.shapes import LlamaShape as Shape

# Of rotary embeddings; what a step costs does not depend on it.
ROPE_BASE = 10_000.0
# Tokens whose logits are held at a time: of the 8B model 4096 would need 2.1 GB in float32, and twice that in backward.
LOSS_CHUNK = 256


SHAPES = {
    "tiny": Shape(vocab=256, hidden=32, intermediate=88, layers=4, heads=4, kv_heads=2),
    # Llama 3 8B at a 32nd of its widths: every matrix, and every activation of a 32nd as many tokens, takes a 1024th of
    # the bytes.
    "8b/1024": Shape(vocab=4008, hidden=128, intermediate=448, layers=32, heads=4, kv_heads=1),
    # The model of the pre-training experiments.
    "130m": Shape(vocab=32_000, hidden=768, intermediate=2048, layers=12, heads=12, kv_heads=12),
    "1b": PRESETS["llama3.2-1b"],
    "8b": PRESETS["llama3-8b"],
}


class Llama(nn.Module):
    """Decoder that returns the mean cross-entropy of the next token.

    Attributes:
        backward_depth: Number of layers that the backward pass of the last forward runs through.
        loss_chunk: Tokens whose logits are held at a time.
    """

    def __init__(self, shape: Shape, checkpointing: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.checkpointing = checkpointing
        self.backward_depth = 0
        self.loss_chunk = LOSS_CHUNK
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        if shape.tied:
            self.lm_head.weight = self.embed_tokens.weight
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Return what the head sees, of shape (batch, sequence, hidden), for int64 tokens."""
        x = self.embed_tokens(tokens)
        head_size = self.shape.hidden // self.shape.heads
        rotation = rotary_angles(tokens.shape[1], head_size, ROPE_BASE, x.device, x.dtype)
        self.backward_depth = 0
        for layer in self.layers:
            x = call(layer, x, *rotation, checkpointed=self.checkpointing)
            # Backward reaches down to the first layer whose output asks for a gradient.
            self.backward_depth += int(x.requires_grad)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean loss, 0-dim float32, of predicting tokens[:, 1:] of shape (batch, sequence)."""
        hidden = self.hidden_states(tokens)[:, :-1].flatten(0, 1)
        return chunked_cross_entropy(hidden, self.lm_head.weight, tokens[:, 1:].flatten(), self.loss_chunk)


def build(shape: Shape, dtype: str, checkpointing: bool, chunk: int, device: torch.device) -> Llama:
    """Return the model, its weights drawn on the device in the dtype of this name; `chunk` is its `loss_chunk`."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with device:
            model = Llama(shape, checkpointing)
    finally:
        torch.set_default_dtype(default)
    model.loss_chunk = chunk
    return model


class Layer(nn.Module):
    """One decoder block: attention and a gated MLP, each behind a norm and added to its input."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return (batch, sequence, hidden) for the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Causal attention with grouped key and value heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_size = shape.hidden // shape.heads
        self.q_proj = nn.Linear(shape.hidden, shape.heads * self.head_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * self.head_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * self.head_size, bias=False)
        self.o_proj = nn.Linear(shape.heads * self.head_size, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return (batch, sequence, hidden) for the same shape."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, sequence, hidden) for the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def call(function: Callable[..., Tensor], *inputs: Tensor, checkpointed: bool) -> Tensor:
    """Call, and when `checkpointed` keep the inputs alone for the backward pass, not the activations."""
    if checkpointed:
        # The re-entrant kind yields no gradients when the inputs ask for none, as below the active set. Nothing here is
        # random, so that no generator state need be kept for each call.
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(*inputs)


def rotary_angles(
    length: int, size: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the rotary embedding, each of shape (length, size)."""
    frequency = base ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency).repeat(1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return (batch, heads, sequence, size) with the halves of `size` rotated as pairs by the angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
