"""How is a model tuned by a small network beside it, of which alone there is a backward pass?

Quantised Side Tuning (arXiv 2401.07004): the base, of 4 bits or any other format, runs without gradients; a network of
a fraction 1 / r of its width takes what each of its layers puts out, and what it makes of that is added before the
head. Here hidden states are made narrower by means over r neighbours, so that no more than 1 / r of them is kept; what
comes back begins at zero, where the paper has a weight that begins at one for the base.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SideLayer(nn.Module):
    """Causal attention and a feed-forward network, each behind a norm.

    Args:
        width: Of what it maps, a multiple of `heads`.
        heads: Of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.silu(self.up(self.norms[1](x))))


class SideTuned(nn.Module):
    """A causal language model of transformers, frozen, and the network beside it.

    Args:
        base: With `get_decoder()` and `get_output_embeddings()`; its weights in any format.
        reduction: r, which divides the hidden size.
        heads: Of the side network's attention.

    Attributes:
        side: What is trained.
    """

    def __init__(self, base: nn.Module, reduction: int = 8, heads: int = 2) -> None:
        super().__init__()
        hidden, decoder = base.config.hidden_size, base.get_decoder()
        width = hidden // reduction
        if hidden % reduction or width % heads:
            raise ValueError(
                f"reduction={reduction}, heads={heads} must divide the hidden size {hidden}, and what is left of it"
            )
        self.base, self.reduction = base.requires_grad_(False), reduction
        layers = nn.ModuleList(SideLayer(width, heads) for _ in decoder.layers)
        self.side = nn.ModuleDict(
            {"layers": layers, "norm": nn.RMSNorm(width), "up": nn.Linear(width, hidden, bias=False)}
        )
        self.side["mix"] = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in decoder.layers)
        self.side.to(base.get_output_embeddings().weight.device)
        nn.init.zeros_(self.side["up"].weight)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **others: Any) -> SimpleNamespace:
        """Return "logits", and "loss" where there are labels; `others` go to the base."""
        narrow: list[Tensor] = []

        def note(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            narrow.append(hidden.unflatten(-1, (-1, self.reduction)).mean(-1).float())

        decoder = self.base.get_decoder()
        handles = [layer.register_forward_hook(note) for layer in decoder.layers]
        try:
            with torch.no_grad():
                hidden = decoder(input_ids=input_ids, use_cache=False, **others).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        x = torch.zeros_like(narrow[0])
        for layer, mix, own in zip(self.side["layers"], self.side["mix"], narrow, strict=True):
            x = layer(torch.lerp(own, x, mix.sigmoid()))
        hidden = hidden + self.side["up"](self.side["norm"](x)).to(hidden.dtype)
        logits = self.base.get_output_embeddings()(hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)
