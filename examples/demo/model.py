"""What model does the demo train? A small LLaMA: RMSNorm, rotary positions, SwiGLU, tied embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the model; the defaults make 419 thousand parameters in eight layers.

    Attributes:
        vocabulary: Number of distinct tokens; 256, since the tokens are bytes.
        width: Length of the vector that stands for a token between the layers.
        hidden: Length of the vector inside the feed-forward part.
        layers: Number of transformer layers.
        heads: Number of attention heads; must divide `width`.
        context: Longest sequence, in tokens.
    """

    vocabulary: int = 256
    width: int = 64
    hidden: int = 176
    layers: int = 8
    heads: int = 4
    context: int = 256


def rotary_angles(context: int, head_width: int, base: float = 10000.0) -> Tensor:
    """Return the angle by which each pair of features is turned at each position.

    Args:
        context: Number of positions.
        head_width: Features of one head, even; feature i is paired with feature i + head_width / 2.
        base: The slowest pair turns by about 1 / `base` radians a position.

    Returns:
        Angles in radians, float32, shape (context, head_width / 2).
    """
    speed = base ** -(torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    return torch.outer(torch.arange(context, dtype=torch.float64), speed).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of features of `x` by its position's angle.

    Args:
        x: Queries or keys, shape (batch, heads, positions, head_width).
        cos: Cosines of the angles, shape (positions, head_width / 2).
        sin: Sines of the angles, same shape.

    Returns:
        The turned vectors, same shape and dtype as `x`.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention: a token looks at itself and at what came before."""

    def __init__(self, config: LlamaConfig) -> None:
        """Make the four projections, each (width, width) and without bias."""
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, config.width, bias=False)
        self.v_proj = nn.Linear(config.width, config.width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map (batch, positions, width) to the same shape."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        """Make the three projections, without bias."""
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.width, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, positions, width) to the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One transformer layer: attention, then feed-forward, each added to its own input."""

    def __init__(self, config: LlamaConfig) -> None:
        """Make the two parts and the norm in front of each."""
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map (batch, positions, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Llama(nn.Module):
    """Byte-level language model; the embedding also serves, transposed, as the output projection."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig | None = None) -> None:
        """Make a model with random weights.

        Args:
            config: The sizes; the default ones if None.
        """
        super().__init__()
        self.config = config = config or LlamaConfig()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        angles = rotary_angles(config.context, config.width // config.heads)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # The matrices that write into the residual stream start smaller, the more layers add to it.
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.08 / (2 * config.layers) ** 0.5 if writes else 0.08)

    def forward(self, tokens: Tensor) -> Tensor:
        """Score every possible next token at every position.

        Args:
            tokens: Integers below `vocabulary`, shape (batch, positions), positions <= `context`.

        Returns:
            Logits, shape (batch, positions, vocabulary).
        """
        positions = tokens.shape[1]
        cos, sin = self.cos[:positions], self.sin[:positions]
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embedding.weight)
