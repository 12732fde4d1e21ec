"""How is a model tuned so that backward runs through its last layers alone? What early ones know is added before them.

SHERL (arXiv 2407.07523), after its abstract: an *early route* puts together what the early layers have put out, without
gradients, so that it is less redundant; a *late route* runs through few of the last layers, frozen too, with gradients.
Here each early output is brought to a small width, weighted by how little it is like the last of them (a softmax over
1 - cosine, and a trained weight each), and the sum, widened, is added to the input of the late layers; it begins at
zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.neighbours.side_tuning import layers_of


class LateTuned(nn.Module):
    """A causal language model of transformers, frozen, and what is trained of its early outputs.

    Args:
        base: With `get_decoder()`; its weights in any format.
        late: How many of the last layers backward runs through.
        width: That early outputs are brought to.

    Attributes:
        early: What is trained.
    """

    def __init__(self, base: nn.Module, late: int = 2, width: int = 32) -> None:
        super().__init__()
        layers, hidden = layers_of(base), base.config.hidden_size
        if not 0 < late < len(layers):
            raise ValueError(f"late={late} must be 1 to {len(layers) - 1} of the {len(layers)} layers")
        self.base, self.late = base.requires_grad_(False), late
        count = len(layers) - late
        self.early = nn.ModuleDict(
            {
                "narrow": nn.ModuleList(nn.Linear(hidden, width, bias=False) for _ in range(count)),
                "norm": nn.RMSNorm(width),
                "widen": nn.Linear(width, hidden, bias=False),
                "weights": nn.ParameterList([nn.Parameter(torch.zeros(count))]),
            }
        )
        self.early.to(next(base.parameters()).device)
        nn.init.zeros_(self.early["widen"].weight)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base, with what the early outputs add to its late layers; arguments and result are the base's."""
        early: list[Tensor] = []
        layers, dtype = layers_of(self.base), self.early["widen"].weight.dtype

        def note(_: nn.Module, __: Any, output: Any) -> None:
            early.append((output[0] if isinstance(output, tuple) else output).to(dtype))

        def join(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            # From here on with gradients, if the caller wants any.
            torch.set_grad_enabled(wanted)
            added = self._added(early)
            early.clear()
            if given:
                return (given[0] + added.to(given[0].dtype), *given[1:]), named
            return given, named | {"hidden_states": named["hidden_states"] + added.to(named["hidden_states"].dtype)}

        wanted = torch.is_grad_enabled()
        handles = [layer.register_forward_hook(note) for layer in layers[: -self.late]]
        handles.append(layers[-self.late].register_forward_pre_hook(join, with_kwargs=True))
        try:
            torch.set_grad_enabled(False)
            return self.base(*args, **kwargs | {"use_cache": False})
        finally:
            torch.set_grad_enabled(wanted)
            for handle in handles:
                handle.remove()

    def _added(self, early: list[Tensor]) -> Tensor:
        """Return what is added to the input of the late layers, of the shape of an early output."""
        with torch.no_grad():
            unlike = torch.stack([1 - F.cosine_similarity(own, early[-1], dim=-1) for own in early], -1)
        weights = (unlike + self.early["weights"][0]).softmax(-1)
        narrow = torch.stack([layer(own) for layer, own in zip(self.early["narrow"], early, strict=True)], -1)
        return self.early["widen"](self.early["norm"]((narrow * weights.unsqueeze(-2)).sum(-1)))
