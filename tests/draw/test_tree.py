"""Are the layers those that a reader of the model would name, whatever it is made of?"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from misa_kernels import MISA, lisa, param_groups
from misa_kernels.draw.tree import layers_of, nodes_of


class Raw(nn.Module):
    """A layer without modules of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wo = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16, 16))


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)


class Mixture(nn.Module):
    """A layer of a list of experts, a router and an attention of so many matrices."""

    def __init__(self, attention: int) -> None:
        super().__init__()
        self.attention = nn.ModuleList([nn.ReLU(), *[nn.Linear(16, 16) for _ in range(attention)]])
        self.router = nn.Linear(16, 3)
        self.experts = nn.ModuleList([Expert() for _ in range(3)])


class Model(nn.Module):
    """Parts by their names, in the order given."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def several(make: Callable[[], nn.Module], count: int) -> nn.ModuleList:
    return nn.ModuleList([make() for _ in range(count)])


def head(out: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, out))


def normed(out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, out))


class Normed(nn.Module):
    """A head."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = normed(12), nn.Linear(12, 5)


def text(layers: int = 2) -> Model:
    return Model(emb=nn.Embedding(50, 16), layers=several(Block, layers), head=nn.Linear(16, 50))


def stage(width: int, *blocks: nn.Module) -> Model:
    return Model(blocks=nn.ModuleList(blocks), down=nn.Linear(width, 2 * width))


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "weights as attributes": (lambda: Model(layers=several(Raw, 4), head=nn.Linear(16, 50)), ["layers.{0-3}"]),
    "weights as attributes, heads in a list": (
        lambda: Model(layers=several(Raw, 8), heads=several(head, 2)),
        ["layers.{0-7}"],
    ),
    "linear layers in a list": (
        lambda: Model(layers=several(lambda: nn.Linear(16, 16), 4), head=nn.Linear(16, 50)),
        ["layers.{0-3}"],
    ),
    "GRUs in a list": (
        lambda: Model(layers=several(lambda: nn.GRU(16, 16), 4), head=nn.Linear(16, 50)),
        ["layers.{0-3}"],
    ),
    "classifiers in a list": (
        lambda: Model(layers=several(Block, 2), heads=several(lambda: nn.Linear(16, 5), 3)),
        ["layers.{0-1}"],
    ),
    "box heads": (
        lambda: Model(layers=several(Block, 2), heads=several(lambda: nn.Sequential(head(4)), 2)),
        ["layers.{0-1}"],
    ),
    "heads with norms in a list": (
        lambda: Model(layers=several(Block, 2), heads=several(lambda: normed(5), 2)),
        ["layers.{0-1}"],
    ),
    "heads with norms as attributes": (
        lambda: Model(layers=several(Block, 2), a=Normed(), b=Normed()),
        ["layers.{0-1}"],
    ),
    "a gate registered last, and no norms": (
        lambda: Model(
            layers=several(lambda: Model(up=nn.Linear(16, 64), down=nn.Linear(64, 16), gate=nn.Linear(16, 4)), 3),
            head=nn.Linear(16, 50),
        ),
        ["layers.{0-2}"],
    ),
    "projections of several widths in a list": (
        lambda: Model(
            inputs=nn.ModuleList([nn.Sequential(nn.Conv2d(c, 16, 1), nn.GroupNorm(4, 16)) for c in (4, 8, 12)]),
            layers=several(Block, 2),
        ),
        ["layers.{0-1}"],
    ),
    "one layer": (lambda: text(1), ["layers.0"]),
    "two models in a list": (lambda: several(text, 2), ["0.layers.{0-1}", "1.layers.{0-1}"]),
    "an encoder and a decoder of one class": (
        lambda: Model(encoder=text(), decoder=text()),
        ["encoder.layers.{0-1}", "decoder.layers.{0-1}"],
    ),
    "a model and two dense modules in one Sequential": (
        lambda: nn.Sequential(text(), *[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2)]),
        ["0.layers.{0-1}"],
    ),
    "a mixture whose experts hold most": (lambda: several(lambda: Mixture(4), 2), ["{0-1}"]),
    "a mixture without much else": (lambda: several(lambda: Mixture(1), 2), ["{0-1}"]),
    "stages": (
        lambda: nn.ModuleList([stage(16, Block(16), Block(16)), stage(32, Block(32)), stage(64, Block(64))]),
        ["0.blocks.{0-1}", "1.blocks.0", "2.blocks.0"],
    ),
    "stages of one matrix a block": (
        lambda: nn.Sequential(*[nn.Sequential(*[nn.Sequential(nn.Linear(4, 4)) for _ in range(2)]) for _ in range(2)]),
        ["{0-1}"],
    ),
    "two attentions in each layer": (
        lambda: several(lambda: Model(own=Expert(), other=Expert(), up=nn.Linear(16, 16)), 2),
        ["{0-1}"],
    ),
    "layers as attributes beside heads as attributes": (
        lambda: Model(**{f"block{n}": Block() for n in range(3)}, a=head(), b=head()),
        ["block{0-2}"],
    ),
}


@pytest.mark.parametrize(("make", "layers"), MODELS.values(), ids=MODELS)
def test_layers(make: Callable[[], nn.Module], layers: list[str]):
    found = [layer.name for layer in layers_of(nodes_of(make())[0])]
    wanted = [
        f"{before}{number}{behind[1:]}"
        for before, span, behind in (
            (layer.partition("{")[0], layer.partition("{")[2].partition("}")[0], layer[layer.find("}") :])
            if "{" in layer
            else (layer, "", "}")
            for layer in layers
        )
        for number in (range(int(span[0]), int(span[-1]) + 1) if span else [""])
    ]
    assert found == wanted


def test_most_of_a_model_frozen_by_default_is_said():
    model = Model(stem=nn.Linear(600, 16), layers=several(Block, 2), pool=nn.Linear(16, 512), head=nn.Linear(512, 3))
    with pytest.warns(UserWarning, match=r"freezes 3 matrices outside of the layers, 88% .* stem\.weight"):
        groups = param_groups(model)
    assert {found.name: found.why for found in groups.found if found.name.endswith(("stem.weight", "pool.weight"))} == {
        "stem.weight": "before the first layer",
        "pool.weight": "behind the last layer",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param_groups(model, "pretrain")
        param_groups(model, frozen=[model.stem], sampled=[model.pool])
        # Embeddings and the output head are expected.
        param_groups(Model(emb=nn.Embedding(5000, 16), layers=several(Block, 2), head=nn.Linear(16, 5000)))


def test_a_recurrent_network_behind_convolutions_is_a_layer():
    cnn = nn.Sequential(*[nn.Sequential(nn.Conv1d(16, 16, 3), nn.ReLU()) for _ in range(3)])
    model = Model(cnn=cnn, rnn=nn.LSTM(16, 128, 2, bidirectional=True), fc=nn.Linear(256, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = param_groups(model)
    assert groups.layers == ["cnn.0", "cnn.1", "cnn.2", "rnn"]
    assert {found.name for found in groups.found if found.role == "sampled"} == {
        *(f"cnn.{number}.0.weight" for number in range(3)),
        *(name for name, _ in model.named_parameters() if name.startswith("rnn.weight")),
    }
    MISA(groups, delta=0.3)


def test_whole_layers_of_a_model_of_stages_fit_a_small_budget():
    model = nn.ModuleList([stage(16, *[Block(16) for _ in range(6)]), stage(32, *[Block(32) for _ in range(6)])])
    optimizer = MISA(param_groups(model), delta=0.1, **lisa())
    assert len(optimizer.monitor.layers) == 13
    assert max(module.numel for module in optimizer.modules) < 0.1 * sum(p.numel() for p in model.parameters())


class Own(nn.Module):
    """A linear layer of one's own."""

    def __init__(self, width: int, has_bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width))
        self.bias = nn.Parameter(torch.zeros(width)) if has_bias else None


@pytest.mark.parametrize(
    ("between", "role"),
    [
        (nn.Linear(16, 16), "sampled"),
        # Two outputs side by side, three parts in one, and all that several places hold.
        (nn.Linear(32, 16), "sampled"),
        (nn.Linear(16, 48), "sampled"),
        (nn.Linear(16 * 9, 16), "sampled"),
        (Own(16), "sampled"),
        (Own(16, has_bias=False), "frozen"),
        (nn.Conv2d(3, 16, 4), "frozen"),
        (nn.Linear(16, 7), "frozen"),
    ],
    ids=["as wide", "joined", "fused", "flattened", "an own class", "or a table", "patches", "a head"],
)
def test_what_lies_between_two_towers(between: nn.Module, role: str):
    model = Model(first=several(Block, 2), between=between, second=several(Block, 2))
    (found,) = [found for found in param_groups(model).found if found.name == "between.weight"]
    assert found.role == role


def test_stacks_beside_one_another_are_watched_without_a_layer():
    model = Model(ups=several(lambda: nn.Linear(16, 8), 2), downs=several(lambda: nn.Linear(8, 16), 2))
    assert not param_groups(model).order.is_known


def test_rehearsal_of_stacks_in_unknown_order_says_so():
    model = Model(text=several(Block, 2), vision=several(Block, 2))
    with pytest.warns(UserWarning, match="cannot know which of 2 stacks"):
        MISA(param_groups(model), delta=0.3).rehearse()
