"""How is it written down what is right for an architecture: its layers, their matrices and the ends of these?

The rows lie in `zoo_text.py`, `zoo_vision.py`, `zoo_several.py`, `zoo_plain.py` and `zoo_recorded.py`. They were read
off the architectures by eye, without a look at what the code makes of them. Names are patterns: "a.{0-2}.{b,c}" stands
for six, the leftmost brace turning slowest; braces nest, and several patterns stand with a space between. The name of a
module stands for its `weight`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

# What a part of a transformer's layer does with the residual stream.
STREAM = {"qkv": "reads", "up": "reads", "output": "writes", "down": "writes", "none": None}


def expand(patterns: str) -> list[str]:
    return [name for pattern in patterns.split() for name in _expand(pattern)]


def _expand(pattern: str) -> list[str]:
    before, brace, behind = pattern.partition("{")
    if not brace:
        return [pattern]
    choices, depth, end = [""], 0, 0
    while depth or behind[end] != "}":
        sign = behind[end]
        depth += (sign == "{") - (sign == "}")
        if sign == "," and depth == 0:
            choices.append("")
        else:
            choices[-1] += sign
        end += 1
    if span := re.fullmatch(r"(\d+)-(\d+)", choices[0]):
        choices = [str(number) for number in range(int(span[1]), int(span[2]) + 1)]
    return [name for choice in choices for name in _expand(before + choice + behind[end + 1 :])]


@dataclass(frozen=True)
class Kind:
    """The sampled matrices of one kind of layer, named from the layer on, by what they do with the residual stream.

    Attributes:
        qkv: Read it for an attention: query, key and value, of cross-attention, too.
        output: Write to it behind an attention.
        up: Read it for a feed-forward network, gates too.
        down: Write to it behind one.
        none: Do neither: convolutions, matrices that lie between two others, those that read positions or conditions.
        unjudged: Sampled, but the stream may be told or not: routers, state space models, networks that are half one.
    """

    qkv: str = ""
    output: str = ""
    up: str = ""
    down: str = ""
    none: str = ""
    unjudged: str = ""

    def __or__(self, other: Kind) -> Kind:
        return Kind(**{part: f"{getattr(self, part)} {getattr(other, part)}".strip() for part in vars(self)})

    def within(self, path: str) -> Kind:
        """The same matrices, named from one module further out."""
        return Kind(
            **{part: " ".join(f"{path}.{name}" for name in names.split()) for part, names in vars(self).items()}
        )

    def parts(self) -> dict[str, str]:
        return {name: part for part, names in vars(self).items() for name in expand(names)}


@dataclass(frozen=True)
class Row:
    """What is right for one architecture.

    Attributes:
        build: Makes the model, on torch's default device.
        layers: The kind of each layer.
        outside: Matrices that are sampled outside of the stacks, each one's module being a layer.
        rest: How many others there are, without those that are open.
        open: Parameters of which nothing is asked, since it is not clear what is right for them.
        example: Inputs that show the order of execution.
        order: All layers in that order, where it isn't that of registration.
    """

    build: Callable[[], nn.Module]
    layers: dict[str, Kind]
    outside: str = ""
    rest: int = 0
    open: str = ""
    example: dict[str, Any] | tuple[Any, ...] | None = None
    order: str = ""


@dataclass
class Right:
    """A row, spelled out for the model that it builds.

    Attributes:
        layer: The layer of each sampled parameter.
        part: What each sampled parameter does with the residual stream, as `Kind` has it; those outside do nothing.
        open: Names of parameters of which nothing is asked.
        layers: Names of the layers in order of registration.
    """

    layer: dict[str, str] = field(default_factory=dict)
    part: dict[str, str] = field(default_factory=dict)
    open: set[str] = field(default_factory=set)
    layers: list[str] = field(default_factory=list)


def spell_out(row: Row, model: nn.Module) -> Right:
    """Raises KeyError where the table names what the model doesn't have."""
    places = {name: place for place, (name, _) in enumerate(model.named_parameters())}

    def parameter(name: str) -> str:
        (found,) = [full for full in (name, f"{name}.weight") if full in places] or [None]
        if found is None:
            raise KeyError(name)
        return found

    right = Right(open={parameter(name) for name in expand(row.open)})
    for pattern, kind in row.layers.items():
        for layer in expand(pattern):
            for name, part in kind.parts().items():
                full = parameter(f"{layer}.{name}" if name else layer)
                right.layer[full], right.part[full] = layer, part
    for name in map(parameter, expand(row.outside)):
        owner = name.rpartition(".")[0].removesuffix(".parametrizations.weight")
        right.layer[name], right.part[name] = owner, "none"
    right.layers = list(dict.fromkeys(right.layer[name] for name in sorted(right.layer, key=places.__getitem__)))
    return right
