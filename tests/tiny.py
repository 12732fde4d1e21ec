"""A small model of decoder blocks and a loss on it, for the tests of the optimizer."""

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, WIDTH, HIDDEN = 32, 16, 40


class Decoder(nn.Module):
    """One block: causal single-head attention and a gated MLP, 7 matrices, 2 norms."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        q, k, v = (linear(h).unsqueeze(1) for linear in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Tiny(nn.Module):
    """Embedding, `layers` blocks, norm and head."""

    def __init__(self, layers: int = 4, width: int = WIDTH, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Decoder(width, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(layers: int = 4, dtype: torch.dtype = torch.float32, device: str = "cpu", **sizes: int) -> Tiny:
    torch.manual_seed(0)
    return Tiny(layers, **sizes).to(device=device, dtype=dtype)


def batch(step: int, device: str | torch.device = "cpu", length: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(VOCABULARY, (4, length), generator=generator).to(device)


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> list[float]:
    """Take `steps` steps; batch n is the same in every run."""
    losses = []
    device = next(model.parameters()).device
    for step in range(start, start + steps):
        loss = loss_of(model, batch(step, device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
