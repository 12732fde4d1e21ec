"""What was found of each parameter of a model, and how is it shown?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from torch import nn

from misa_kernels.draw.order import Order


class Found(NamedTuple):
    """What was found of a parameter.

    Attributes:
        name: Its name in the model.
        param: The parameter.
        layer: Name of the layer that it lies in, None outside of them.
        modules: Name of the module that it makes, or of the modules that its equal row blocks make.
        role: "sampled", "dense" or "frozen".
        why: What tells.
        stream: Whether it "reads" the residual stream of its layer or "writes" to it; None if neither, or unclear.
        part: "qkv" or "output" of an attention, "up" or "down" of a feed-forward network; None if unclear.
    """

    name: str
    param: nn.Parameter
    layer: str | None
    modules: tuple[str, ...]
    role: str
    why: str
    stream: str | None
    part: str | None


class Groups(list[dict[str, Any]]):
    """Param groups, as `param_groups` returns them: a list for `MISA`, which prints as a table of what was found.

    Attributes:
        found: A `Found` for each parameter, in the order of `model.named_parameters()`.
        order: The layers, and what is known of the order in which they run.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], found: Sequence[Found], order: Order) -> None:
        super().__init__(groups)
        self.found = list(found)
        self.order = order

    @property
    def layers(self) -> list[str]:
        """Names of the layers, in the order in which they run as far as that is known, else as they are registered."""
        return list(self.order.names)

    def __str__(self) -> str:
        """Return a table of layer, tensor, shape, role and reason; equal lines of equal layers are one."""
        lines: dict[tuple[str, ...], list[Found]] = {}
        for found in self.found:
            layer = found.layer or ""
            inside = found.name.startswith(f"{layer}.") if layer else False
            name = found.name[len(layer) + 1 :] if inside else found.name
            flow = f", {found.stream} the stream as {found.part}" if found.part else ""
            shape = " x ".join(map(str, found.param.shape)) or "1"
            stack = layer.rstrip("0123456789") if inside else layer
            lines.setdefault((stack, name, shape, found.role, found.why + flow), []).append(found)
        head = ("layer", "tensor", "shape", "role", "why")
        rows = [head, *((_span([f.layer for f in found]), *key[1:]) for key, found in lines.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        total = sum(found.param.numel() for found in self.found) or 1
        shares = [
            f"{sum(f.param.numel() for f in own) / total:.1%} {role} ({len(own)} tensors)"
            for role in ("sampled", "dense", "frozen")
            if (own := [found for found in self.found if found.role == role])
        ]
        order = "" if self.order.is_known else "; the order of the stacks shows in the first step, or from example=..."
        return "\n".join([*table, f"{', '.join(shares)}, in {len(self.order.names)} layers{order}"])


def _span(layers: Sequence[str | None]) -> str:
    """Return layers of one stack as `name.0-31`."""
    names = list(dict.fromkeys(layer or "" for layer in layers))
    if len(names) == 1:
        return names[0]
    stack = names[0].rstrip("0123456789")
    numbers = [int(name[len(stack) :]) for name in names]
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return stack + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
