"""What does one draw choose from? Param groups of an optimizer, cut into modules that fit the budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from typing import Any, Literal

from torch import Tensor, nn

from misa_kernels.draw.members import Member, layer_order, members, nothing_to_sample
from misa_kernels.draw.order import merged
from misa_kernels.draw.slices import Matrix, Slicing, slicing, starts_of
from misa_kernels.gradients.axes import Slice
from misa_kernels.outside.notices import names_of
from misa_kernels.ranks.shards import is_sharded, sharded_axes


@dataclass(frozen=True, slots=True)
class Block:
    """A contiguous range of rows of one parameter, mostly all of it, or a slice of its columns.

    Args:
        param: The parameter; no part of the value.
        index: Its position in the optimizer's order, over all groups.
        number: Which of the parameter's blocks this is, from 0, by rising `start`.
        start: First element of `param.view(-1)`.
        stop: One past the last element.
        axis: Of a slice the axis that it is a range of, 0 for rows and 1 for columns; None where it is none.
    """

    param: nn.Parameter = field(repr=False, compare=False)
    index: int
    number: int
    start: int
    stop: int
    axis: int | None = field(default=None, repr=False)

    @property
    def pitch(self) -> int:
        """Elements from one line of a slice of columns to the next; 0 where it is contiguous."""
        return self.param.shape[1] if self.width else 0

    @property
    def width(self) -> int:
        """Elements of such a line; 0 where it is contiguous."""
        if self.axis != 1:
            return 0
        first, last = self.ends
        return 0 if last - first == self.param.shape[1] else last - first

    @property
    def numel(self) -> int:
        """Number of parameters."""
        width = self.width
        return len(self.param) * width if width else self.stop - self.start

    @property
    def ends(self) -> tuple[int, int]:
        """First and last of the columns or rows that a slice is, the last not included."""
        rows, columns = self.param.shape
        if self.axis == 1:
            return self.start, self.stop - (rows - 1) * columns
        return self.start // columns, self.stop // columns

    @property
    def piece(self) -> Slice | None:
        """What backward makes the gradient of, where it is a slice."""
        return None if self.axis is None else Slice(self.axis, *self.ends)

    def shape_in(self, tensor: Tensor) -> tuple[int, ...]:
        """Return its shape within the parameter, or within what lies on this rank of it; rows may be -1."""
        if (piece := self.piece) is not None:
            return piece.shape_of(tensor)
        return tuple(tensor.shape) if self.numel == self.param.numel() else (-1, *tensor.shape[1:])


@dataclass(frozen=True, slots=True)
class Module:
    """What is drawn as one: usually a weight matrix, or all sampled tensors of a layer.

    Args:
        name: Its name.
        layer: Number of the lowest layer it lies in: 0 is nearest the input, -1 unknown.
        blocks: The tensors, or their parts, that make it up.
    """

    name: str
    layer: int
    blocks: tuple[Block, ...]

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(block.numel for block in self.blocks)

    @property
    def width(self) -> int:
        """Longest last axis among its tensors: the input features that a linear layer keeps for backward."""
        return max(block.width or (block.param.shape[-1] if block.param.ndim else 1) for block in self.blocks)

    @property
    def rival(self) -> int | None:
        """Position of the parameter of which this is a slice, and no other one is active then; None: of none."""
        return self.blocks[0].index if self.blocks[0].axis is not None else None


@dataclass(frozen=True, slots=True)
class Partition:
    """The parameters of an optimizer, sorted by how they are trained.

    Args:
        modules: What is sampled, in order of first appearance.
        dense: What is trained at every step.
        frozen: What is never trained, by role or because the user had frozen it.
        names: Name of every parameter, by its position in the optimizer's order.
        total_numel: N, the parameters that the user had not frozen, all roles included.
        budget: Most parameters that may be active at a time, dense ones apart.
        layers: Names of the layers, from the input to the output; empty where the groups do not tell.
        dense_layer: Number of the lowest layer that backward must reach for the sake of dense parameters; None
            where they need none, -1 where a group does not tell.
        split: Names of the modules that were cut into row blocks, being larger than the budget.
        slicing: Where the modules are slices, of what.
    """

    modules: list[Module]
    dense: list[Block]
    frozen: list[nn.Parameter]
    names: list[str]
    total_numel: int
    budget: int
    layers: list[str]
    dense_layer: int | None
    split: list[str]
    slicing: Slicing | None = None

    @property
    def most(self) -> int:
        """Most parameters that are active at a time: the budget, or what slices make of it in whole lines."""
        return self.budget if self.slicing is None else self.slicing.trained

    @property
    def trained(self) -> list[Block]:
        """The blocks of all that is ever trained."""
        return [*self.dense, *(block for module in self.modules for block in module.blocks)]


def partition(
    groups: Sequence[Mapping[str, Any]],
    delta: float,
    granularity: Literal["module", "layer", "slice"],
    oversized: Literal["error", "split"],
    chosen: Sequence[bool] | None = None,
    counted: Sequence[bool] | None = None,
    order: Sequence[str] = (),
    slices: Literal["auto", "down", "output", "all"] = "auto",
) -> Partition:
    """Cut param groups into modules, and sort out what is dense or frozen.

    Args:
        groups: Param groups as `torch.optim.Optimizer` holds them. "role", "modules", "layers" and "thawed" are those
            of `misa_kernels.param_groups` and may be missing: without a role, tensors of two dimensions or
            more are sampled and the others frozen, or dense if `delta` is 1; without "modules" every tensor
            is a module. A sampled tensor behind the last layer is a layer of its own.
        delta: Fraction of the parameters that may be active, in (0, 1].
        granularity: "module" joins tensors with equal entries in "modules", "layer" those in "layers"; "slice" makes
            slices of what has an entry in "slices", and freezes the rest.
        oversized: What becomes of a module larger than the budget: "error", or "split" into row blocks.
        chosen: Whether the user wants each parameter trained, by its position; None: its `requires_grad`.
        counted: Whether it belongs to N; None: as `chosen`.
        order: Names of layers in the order in which they run, where that is known; others follow those before them.
        slices: Of which matrices slices are made, see `slicing`.

    Returns:
        The partition. No parameter is changed.

    Raises:
        TypeError: For an integer parameter with a trained role, or a complex or sharded one to be trained.
        ValueError: For an unknown role, lists in a group that do not match its parameters, a parameter to be
            trained that is not contiguous, nothing to sample, no layers for `granularity="layer"`, or a
            module larger than the budget.
    """
    params = [param for group in groups for param in group["params"]]
    chosen = [param.requires_grad for param in params] if chosen is None else chosen
    counted = chosen if counted is None else counted
    found = list(members(groups, delta, chosen))
    layers = merged(layer_order(found, groups), {layer: number for number, layer in enumerate(order)})
    position: dict[str | None, int] = {None: -1} | {layer: number for number, layer in enumerate(layers)}
    total_numel = sum(member.numel for member in found if counted[member.place])
    budget = math.floor(delta * total_numel)

    sampled = [member for member in found if member.role == "sampled"]
    plan = _slicing(sampled, budget, slices) if granularity == "slice" and sampled else None
    modules: list[Module] = []
    split: list[Module] = []
    too_large: list[Module] = []
    for module in _slices(sampled, plan, position) if plan else _modules(sampled, position, granularity):
        if module.numel <= budget:
            modules.append(module)
            continue
        pieces = _split(module, budget) if oversized == "split" else []
        (split if pieces else too_large).append(module)
        modules.extend(pieces)
    if too_large:
        raise ValueError(_too_large(too_large, delta, total_numel, granularity, oversized))
    if not modules:
        raise ValueError(nothing_to_sample(found, groups, chosen))
    dense = [member for member in found if member.role == "dense"]
    # Without a layer in a group that names them, it lies behind the last.
    before_end = (member for member in dense if member.layer is not None or "layers" not in groups[member.group])
    return Partition(
        modules=modules,
        dense=[Block(member.param, member.place, 0, 0, member.numel) for member in dense],
        frozen=[member.param for member in found if member.role == "frozen"]
        + [member.param for member, width in zip(sampled, plan.widths if plan else (), strict=False) if not width],
        names=names_of(groups),
        total_numel=total_numel,
        budget=budget,
        layers=layers,
        dense_layer=min((position[member.layer] for member in before_end), default=None),
        split=[module.name for module in split],
        slicing=plan,
    )


def _slicing(sampled: Sequence[Member], budget: int, reach: str) -> Slicing:
    """Return how wide the slices are that a budget makes of sampled parameters."""
    shared = Counter(name for member in sampled for name in member.names)
    matrices = [_matrix(member, shared[member.names[0]] > 1) for member in sampled]
    return slicing(matrices, [member.numel for member in sampled], budget, reach)


def _matrix(member: Member, is_part: bool) -> Matrix | None:
    """Return how a parameter may be sliced; None where it is part of a module, or more than one."""
    if member.slices is None or is_part or len(member.names) > 1:
        return None
    part, axis = member.slices
    if axis not in (0, 1) or member.param.ndim != 2:
        raise ValueError(
            f"'slices' of {member.names[0]} is {member.slices!r} for shape {tuple(member.param.shape)} and must be "
            "None, or the part and 0 for rows or 1 for columns of a matrix"
        )
    return Matrix(part, axis, member.param.shape[axis], member.param.shape[1 - axis])


def _slices(sampled: Sequence[Member], plan: Slicing, position: Mapping[str | None, int]) -> Iterator[Module]:
    """Give the slices of each sliced parameter, one behind the other."""
    for member, width in zip(sampled, plan.widths, strict=True):
        if not width or member.slices is None:
            continue
        param, axis = member.param, member.slices[1]
        if axis in sharded_axes(param):
            what, other = ("columns", "rows") if axis else ("rows", "columns")
            raise ValueError(
                f"granularity='slice' takes {what} of {member.names[0]}, whose {what} are divided among ranks, and "
                f"each must have an equal part: shard it along its {other}, by shard_placement_fn of fully_shard(), "
                "leave it out by slices= of the sampler, or draw modules with granularity='module'"
            )
        for number, first in enumerate(starts_of(param.shape[axis], width)):
            ends = f"{first}:{first + width}"
            block = Block(param, member.place, number, *Slice(axis, first, first + width).extent_in(param), axis)
            yield Module(f"{member.names[0]}[{':, ' if axis else ''}{ends}]", position[member.layer], (block,))


def _modules(sampled: Sequence[Member], position: Mapping[str | None, int], granularity: str) -> list[Module]:
    """Join the row blocks of sampled parameters by name, in order of first appearance."""
    found: dict[str, tuple[int, list[Block]]] = {}
    for member in sampled:
        names = member.names
        if granularity == "layer":
            if member.layer is None:
                raise ValueError(
                    f"granularity='layer' needs the layer of every sampled parameter, and group {member.group} has "
                    "no 'layers': make the groups with param_groups(model)"
                )
            names = (member.layer,)
        size = member.numel // len(names)
        for number, name in enumerate(names):
            block = Block(member.param, member.place, number, number * size, (number + 1) * size)
            lowest, blocks = found.get(name, (position[member.layer], []))
            blocks.append(block)
            found[name] = min(lowest, position[member.layer]), blocks
    return [Module(name, lowest, tuple(blocks)) for name, (lowest, blocks) in found.items()]


def _split(module: Module, budget: int) -> list[Module]:
    """Cut a module that is one whole tensor into as few and as equal row blocks as fit; [] if none do."""
    block = module.blocks[0]
    rows = len(block.param) if block.param.ndim else 1
    row_numel = block.param.numel() // rows
    is_whole = len(module.blocks) == 1 and module.numel == block.param.numel()
    if not is_whole or row_numel > budget or is_sharded(block.param):
        return []
    pieces = math.ceil(rows / (budget // row_numel))
    cuts = pairwise(rows * piece // pieces for piece in range(pieces + 1))
    return [
        Module(
            f"{module.name}[rows {start}:{stop}]",
            module.layer,
            (Block(block.param, block.index, number, start * row_numel, stop * row_numel),),
        )
        for number, (start, stop) in enumerate(cuts)
    ]


def _too_large(modules: Sequence[Module], delta: float, total: int, granularity: str, oversized: str) -> str:
    """Return the error about modules larger than the budget; remedies for the largest serve them all."""
    module = max(modules, key=lambda module: module.numel)
    ten_thousandths = count(10_000 * module.numel // total)
    enough = next(d / 10_000 for d in ten_thousandths if math.floor(d / 10_000 * total) >= module.numel)
    remedies = ["make the groups with param_groups(model)", f"raise delta to {enough}", "give it the role 'frozen'"]
    limit = ""
    if granularity == "layer":
        remedies.append("draw modules with granularity='module'")
    elif oversized == "error":
        remedies.append("cut it into row blocks with oversized='split'")
    else:
        sharded = any(is_sharded(block.param) for block in module.blocks)
        what = "whole tensors, not sharded ones" if sharded else "whole tensors whose rows fit"
        limit = f", and oversized='split' cuts only single {what}"
    others = f" (the largest of {len(modules)} such modules)" if len(modules) > 1 else ""
    return (
        f"{module.name}{others} has {module.numel:,} parameters and must not exceed the budget of "
        f"{math.floor(delta * total):,}, delta={delta} of {total:,}{limit}: "
        f"{', '.join(remedies[:-1])}, or {remedies[-1]}"
    )
