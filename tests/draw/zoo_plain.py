"""What is right for models of plain torch, as they are written and as torch's own tools hand them back?"""

from __future__ import annotations

import warnings
from collections import OrderedDict

import torch
from torch import nn
from zoo import Kind, Row

TOKENS = torch.tensor([[3, 1, 4, 1]])
WIDE = torch.ones(1, 3, 8)


class Block(nn.Module):
    """Attention of one head and a feed-forward network, written with linear modules alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)
        self.feed = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        weights = (self.query(y) @ self.key(y).transpose(1, 2)).softmax(-1)
        x = x + self.out(weights @ self.value(y))
        return x + self.feed(x)


class Model(nn.Module):
    """Tokens in, scores out; `blocks` is what the layers lie in."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = blocks
        self.head = nn.Linear(8, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embed(tokens)))


class Attributes(nn.Module):
    """The layers are attributes with a number at the end; the last one runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layer0, self.layer1, self.layer2 = Block(), Block(), Block()
        self.head = nn.Linear(8, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer1(self.layer0(self.layer2(self.embed(tokens)))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.lstm = nn.LSTM(8, 12, num_layers=2)
        self.head = nn.Linear(12, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])


class Translator(nn.Module):
    """What the decoder reads is projected; the encoder is registered behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Embedding(16, 8)
        self.decoder = nn.GRU(8, 12)
        self.bridge = nn.Linear(24, 12)
        self.source = nn.Embedding(16, 8)
        self.encoder = nn.GRU(8, 12, bidirectional=True)
        self.head = nn.Linear(12, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        _, states = self.encoder(self.source(tokens))
        first = self.bridge(torch.cat(list(states), dim=-1))
        return self.head(self.decoder(self.target(tokens), first[None])[0])


class Between(nn.Module):
    """Recurrent modules on both sides of the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.before = nn.GRU(8, 8, batch_first=True)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.behind = nn.LSTM(8, 8, batch_first=True)
        self.heads = nn.ModuleList([nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(8, 16)])

    def forward(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        x = self.before(self.embed(tokens))[0]
        for block in self.blocks:
            x = block(x)
        x = self.behind(x)[0]
        return [head(x) for head in self.heads]


class Head(nn.Module):
    """One head of an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 4)


class Heads(nn.Module):
    """A layer whose heads are a list of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([Head(), Head()])
        self.out = nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)


class Experts(nn.Module):
    """A feed-forward network of raw stacked matrices and of a list of modules, with a router."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.router = nn.Linear(8, 3)
        self.up = nn.Parameter(torch.zeros(3, 8, 12))
        self.down = nn.Parameter(torch.zeros(3, 12, 8))
        self.up_bias = nn.Parameter(torch.zeros(3, 12))
        self.listed = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(1, 1, 8))
        self.shift = nn.Parameter(torch.zeros(8, 1))


def exported() -> nn.Module:
    model = Model(nn.Sequential(Block(), Block()))
    with torch.device("cpu"):
        return torch.export.unflatten(torch.export.export(model, (TOKENS,)))


def traced() -> nn.Module:
    with warnings.catch_warnings():
        # That it is deprecated is for those who write such a model, not for those who hold one.
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(Model(nn.Sequential(Block(), Block())), TOKENS)


def symbolic() -> nn.Module:
    return torch.fx.symbolic_trace(Model(nn.Sequential(Block(), Block(), Block())))


BLOCK = Kind("query key value", "out", "feed.1", "feed.3")
MULTI = Kind("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")
CROSS = Kind("multihead_attn.in_proj_weight", "multihead_attn.out_proj")

ROWS = {
    "blocks in a Sequential": Row(
        lambda: Model(nn.Sequential(Block(), Block())), {"blocks.{0-1}": BLOCK}, rest=23, example=(TOKENS,)
    ),
    "blocks between their ends": Row(
        lambda: nn.Sequential(
            OrderedDict(
                embed=nn.Embedding(16, 8), first=Block(), second=Block(), norm=nn.LayerNorm(8), head=nn.Linear(8, 16)
            )
        ),
        {"first": BLOCK, "second": BLOCK},
        rest=25,
        example=(TOKENS,),
    ),
    "blocks as attributes": Row(
        Attributes, {"layer{0-2}": BLOCK}, rest=33, example=(TOKENS,), order="layer2 layer0 layer1"
    ),
    "stages of blocks": Row(
        lambda: Model(nn.Sequential(*(nn.Sequential(Block(), Block()) for _ in range(2)))),
        {"blocks.{0-1}.{0-1}": BLOCK},
        rest=43,
        example=(TOKENS,),
    ),
    "blocks of torch.fx": Row(symbolic, {"blocks.{0-2}": BLOCK}, rest=33, example=(TOKENS,)),
    "blocks of torch.jit": Row(traced, {"blocks.{0-1}": BLOCK}, rest=23, example=(TOKENS,)),
    "blocks of torch.export": Row(exported, {"blocks.{0-1}": BLOCK}, rest=23, example=(TOKENS,)),
    "torch's Transformer": Row(
        lambda: nn.Transformer(8, 2, 2, 2, 12, batch_first=True),
        {"encoder.layers.{0-1}": MULTI, "decoder.layers.{0-1}": MULTI | CROSS},
        rest=44,
        example=(WIDE, WIDE),
    ),
    "experts": Row(
        lambda: nn.ModuleDict({"embed": nn.Embedding(16, 8), "layers": nn.ModuleList([Experts(), Experts()])}),
        {"layers.{0-1}": Kind(unjudged="up down listed.{0-2}.{0,2} router")},
        rest=25,
    ),
    "heads in a list": Row(
        lambda: nn.ModuleList([Heads(), Heads()]),
        {"{0-1}": Kind("heads.{0-1}.{query,key,value}", "out", "up", "down")},
        rest=18,
    ),
    # Recurrent modules are sampled wherever they stand; linear heads behind them are no stack.
    "blocks between a GRU and an LSTM": Row(
        Between,
        {"blocks.{0-1}": BLOCK},
        outside="before.weight_{ih,hh}_l0 behind.weight_{ih,hh}_l0",
        rest=31,
        example=(TOKENS,),
    ),
    # Elements of a stack without anything inside: each is a layer.
    "a multilayer perceptron": Row(
        lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
        {"{0,2,4}": Kind(none="weight")},
        rest=3,
        example=(WIDE,),
    ),
    "an LSTM between embedding and head": Row(
        Recurrent, {}, outside="lstm.weight_{ih,hh}_l{0,1}", rest=7, example=(TOKENS,)
    ),
    "two GRUs and a bridge": Row(
        Translator,
        {},
        outside="decoder.weight_{ih,hh}_l0 bridge encoder.weight_{ih,hh}_l0{,_reverse}",
        rest=11,
        example=(TOKENS,),
        order="encoder bridge decoder",
    ),
}
