"""How is a model tuned by a small network beside it, of which alone there is a backward pass?

Quantised Side Tuning (arXiv 2401.07004): the base, of 4 bits or any other format, runs without gradients; a network of
a fraction 1 / r of its width takes what each of its layers puts out, and what it makes of that is added before the
head. Here hidden states are made narrower by means over r neighbours, so that no more than 1 / r of them is kept; what
comes back begins at zero, where the paper has a weight that begins at one for the base.
"""

from __future__ import annotations

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

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (batch, tokens, width) to the same shape; a mask says what each token sees, None: all before it."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.silu(self.up(self.norms[1](x))))


class SideTuned(nn.Module):
    """A causal language model of transformers, frozen, and the network beside it.

    Args:
        base: With `get_decoder()`, whose layers are a list; its weights in any format.
        reduction: r, which divides the hidden size.
        heads: Of the side network's attention.

    Attributes:
        side: What is trained.
    """

    def __init__(self, base: nn.Module, reduction: int = 8, heads: int = 2) -> None:
        super().__init__()
        hidden, layers = base.config.hidden_size, layers_of(base)
        width = hidden // reduction
        if hidden % reduction or width % heads:
            raise ValueError(
                f"reduction={reduction}, heads={heads} must divide the hidden size {hidden}, and what is left of it"
            )
        self.base, self.reduction = base.requires_grad_(False), reduction
        self.side = nn.ModuleDict(
            {
                "layers": nn.ModuleList(SideLayer(width, heads) for _ in layers),
                "norm": nn.RMSNorm(width),
                "up": nn.Linear(width, hidden, bias=False),
                "mix": nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in layers),
            }
        )
        self.side.to(next(base.parameters()).device)
        nn.init.zeros_(self.side["up"].weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Any:
        """Run the base, with what the side network adds before the head; arguments and result are the base's."""
        narrow: list[Tensor] = []
        dtype, wanted = self.side["up"].weight.dtype, torch.is_grad_enabled()

        def note(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            narrow.append(hidden.unflatten(-1, (-1, self.reduction)).mean(-1).to(dtype))

        def add(_: nn.Module, __: Any, output: Any) -> Any:
            # From here on with gradients, if the caller wants any.
            torch.set_grad_enabled(wanted)
            hidden = output.last_hidden_state
            output.last_hidden_state = hidden + self._added(narrow, attention_mask).to(hidden.dtype)
            return output

        handles = [layer.register_forward_hook(note) for layer in layers_of(self.base)]
        handles.append(self.base.get_decoder().register_forward_hook(add))
        try:
            torch.set_grad_enabled(False)
            return self.base(input_ids=input_ids, attention_mask=attention_mask, **others | {"use_cache": False})
        finally:
            torch.set_grad_enabled(wanted)
            for handle in handles:
                handle.remove()

    def _added(self, narrow: list[Tensor], attention_mask: Tensor | None) -> Tensor:
        """Return what is added to the last hidden state, from what each layer has put out."""
        tokens, mask = narrow[0].shape[1], None
        if attention_mask is not None:
            causal = torch.ones(tokens, tokens, dtype=torch.bool, device=narrow[0].device).tril()
            mask = causal & attention_mask[:, None, None, :].bool()
            # Of what is padding, too, something must be seen.
            mask = mask | torch.eye(tokens, dtype=torch.bool, device=mask.device)
        x = torch.zeros_like(narrow[0])
        for layer, mix, own in zip(self.side["layers"], self.side["mix"], narrow, strict=True):
            x = layer(torch.lerp(own, x, mix.sigmoid()), mask)
        added: Tensor = self.side["up"](self.side["norm"](x))
        return added


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Return the layers of a causal language model: the longest list in its decoder."""
    lists = [module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)
