"""What does one draw choose from? Param groups of an optimizer, cut into modules that fit the budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise, repeat
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from misa_kernels.draw.order import merged
from misa_kernels.draw.slices import Matrix, Slicing, slicing, starts_of
from misa_kernels.gradients.axes import Slice
from misa_kernels.outside.notices import names_of
from misa_kernels.ranks.shards import is_sharded, local, sharded_axes


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
        return self.param.shape[1] if self.axis == 1 and self.width else 0

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
        width = 0 if self.axis is None else self.width
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
    members = list(_members(groups, delta, chosen))
    layers = merged(_layer_order(members, groups), {layer: number for number, layer in enumerate(order)})
    position = {layer: number for number, layer in enumerate(layers)}
    counts = chosen if counted is None else counted
    total_numel = sum(member.numel for member in members if counts[member.place])
    budget = math.floor(delta * total_numel)

    sampled = [member for member in members if member.role == "sampled"]
    plan = _slicing(sampled, budget, slices) if granularity == "slice" and sampled else None
    modules = [] if plan is None else list(_slices(sampled, plan, position))
    split: list[Module] = []
    too_large: list[Module] = []
    for module in _modules(sampled, position, granularity) if plan is None else ():
        if module.numel <= budget:
            modules.append(module)
            continue
        pieces = _split(module, budget) if oversized == "split" else []
        (split if pieces else too_large).append(module)
        modules.extend(pieces)
    if too_large:
        raise ValueError(_too_large(too_large, delta, total_numel, granularity, oversized))
    if not modules:
        raise ValueError(_nothing_to_sample(members, groups, chosen))
    dense = [member for member in members if member.role == "dense"]
    # Without a layer in a group that names them, it lies behind the last.
    before_end = (member for member in dense if member.layer is not None or "layers" not in groups[member.group])
    reached = [-1 if member.layer is None else position[member.layer] for member in before_end]
    return Partition(
        modules=modules,
        dense=[Block(member.param, member.place, 0, 0, member.numel) for member in dense],
        frozen=[member.param for member in members if member.role == "frozen"]
        + [member.param for member, width in zip(sampled, plan.widths if plan else (), strict=False) if not width],
        names=names_of(groups),
        total_numel=total_numel,
        budget=budget,
        layers=layers,
        dense_layer=min(reached, default=None),
        split=[module.name for module in split],
        slicing=plan,
    )


class _Member(NamedTuple):
    """A parameter of a group, and what the group says of it.

    Args:
        param: The parameter.
        place: Its position in the optimizer's order.
        numel: Its elements.
        group: Number of the group.
        role: "sampled", "dense" or "frozen".
        names: Those of the modules that its equal row blocks belong to.
        layer: Name of its layer, None if it is unknown or there is none.
        slices: Part and axis if it may be sliced, else None.
    """

    param: nn.Parameter
    place: int
    numel: int
    group: int
    role: str
    names: tuple[str, ...]
    layer: str | None
    slices: tuple[str | None, int] | None


def _members(groups: Sequence[Mapping[str, Any]], delta: float, chosen: Sequence[bool]) -> Iterator[_Member]:
    """Yield every parameter once, at its first place, after checking what its group says."""
    names = names_of(groups)
    seen: set[int] = set()
    index = -1
    for g, group in enumerate(groups):
        role, size = group.get("role"), len(group["params"])
        if role not in (None, "sampled", "dense", "frozen"):
            raise ValueError(
                f"role={role!r} of group {g} must be 'sampled', 'dense' or 'frozen': give it one of these or none"
            )
        for key in ("modules", "layers", "slices", "thawed"):
            if key in group and len(group[key]) != size:
                raise ValueError(
                    f"{key!r} of group {g} has {len(group[key])} entries and must have one for each of its "
                    f"{size} parameters: make the groups with param_groups(model)"
                )
        # Where somebody thaws what a group calls frozen, it has another role.
        meant = group["thawed"] if role == "frozen" and "thawed" in group else repeat(role)
        entries = group["modules"] if "modules" in group else names[index + 1 :]
        layers = group["layers"] if "layers" in group else repeat(None)
        slices = group["slices"] if "slices" in group else repeat(None)
        for param, thawed, entry, layer, cut in zip(group["params"], meant, entries, layers, slices, strict=False):
            index += 1
            if id(param) in seen:
                continue
            seen.add(id(param))
            own_role = thawed if chosen[index] else role
            if own_role != "frozen":
                own_role = _role(param, names[index], own_role, delta, chosen[index])
            modules = (entry,) if isinstance(entry, str) else tuple(entry)
            if own_role == "sampled" and len(modules) != 1 and (not modules or _rows(param) % len(modules)):
                raise ValueError(
                    f"{names[index]} has {_rows(param)} rows and {len(modules)} names in 'modules', which "
                    "must divide the rows equally: give it one name, or one for each of its row blocks"
                )
            if own_role == "sampled" and len(modules) > 1 and is_sharded(param):
                raise ValueError(
                    f"{names[index]} is sharded and holds {len(modules)} modules, and must be one to be sharded: make "
                    "the groups with param_groups(model, experts='whole')"
                )
            if layer is None and own_role == "sampled" and "layers" in group:
                layer = modules[0]
            yield _Member(param, index, param.numel(), g, own_role, modules, layer, cut)


def _role(param: nn.Parameter, name: str, role: str | None, delta: float, is_chosen: bool) -> str:
    """Return how a parameter is trained, after refusing what cannot be."""
    if role in ("sampled", "dense") and not (param.is_floating_point() or param.is_complex()):
        raise TypeError(f"{name} is {param.dtype} and must be of a floating dtype to be {role}: freeze it")
    if role == "frozen" or not is_chosen or not param.numel():
        return "frozen"
    if role is None:
        role = "sampled" if param.ndim >= 2 else "dense" if delta == 1 else "frozen"
    if role == "frozen":
        return role
    if param.is_complex():
        raise TypeError(f"{name} is {param.dtype} and must be real to be {role}: freeze it")
    is_plain = type(param) is nn.Parameter
    # Tensors made of inner ones, such as torchao's. Plain subclasses, such as bitsandbytes', pass.
    if not is_plain and hasattr(param, "__tensor_flatten__") and not is_sharded(param):
        raise TypeError(
            f"{name} is a {type(param).__name__} and must be a plain tensor or a DTensor to be {role}: freeze it"
        )
    if not (param if is_plain else local(param)).is_contiguous():
        raise ValueError(
            f"{name} has strides {param.stride()} for shape {tuple(param.shape)} and must be contiguous to "
            f"be {role}: set param.data = param.data.contiguous()"
        )
    return role


def _layer_order(members: Sequence[_Member], groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the layers as they first appear among sampled parameters, the others between them.

    A layer without a sampled one follows the one that precedes it in its own group: among the norms a
    layer keeps its place even if the user froze its matrices, and thaws them later.
    """
    sampled = dict.fromkeys(
        member.layer
        for member in members
        if member.layer is not None and member.role == "sampled" and groups[member.group].get("role") != "frozen"
    )
    # A linked list, from each layer to the next one; None stands before the first and behind the last.
    following: dict[str | None, str | None] = dict(zip([None, *sampled], [*sampled, None], strict=True))
    group = -1
    last: str | None = None
    for member in members:
        if member.group != group:
            group, last = member.group, None
        if member.layer is not None:
            if member.layer not in following:
                following[member.layer] = following[last]
                following[last] = member.layer
            last = member.layer
    layers: list[str] = []
    layer = following[None]
    while layer is not None:
        layers.append(layer)
        layer = following[layer]
    return layers


def _slicing(sampled: Sequence[_Member], budget: int, reach: str) -> Slicing:
    """Return how wide the slices are that a budget makes of sampled parameters."""
    shared = Counter(name for member in sampled for name in member.names)
    matrices = [_matrix(member, shared[member.names[0]] > 1) for member in sampled]
    return slicing(matrices, [member.numel for member in sampled], budget, reach)


def _matrix(member: _Member, is_part: bool) -> Matrix | None:
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


def _slices(sampled: Sequence[_Member], plan: Slicing, position: Mapping[str, int]) -> Iterator[Module]:
    """Give the slices of each sliced parameter, one behind the other."""
    for member, width in zip(sampled, plan.widths, strict=True):
        if not width or member.slices is None:
            continue
        param, axis, layer = member.param, member.slices[1], -1 if member.layer is None else position[member.layer]
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
            yield Module(f"{member.names[0]}[{':, ' if axis else ''}{ends}]", layer, (block,))


def _modules(sampled: Sequence[_Member], position: Mapping[str, int], granularity: str) -> list[Module]:
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
        layer = -1 if member.layer is None else position[member.layer]
        for number, name in enumerate(names):
            block = Block(member.param, member.place, number, number * size, (number + 1) * size)
            lowest, blocks = found.get(name, (layer, []))
            blocks.append(block)
            found[name] = min(lowest, layer), blocks
    return [Module(name, lowest, tuple(blocks)) for name, (lowest, blocks) in found.items()]


def _split(module: Module, budget: int) -> list[Module]:
    """Cut a module that is one whole tensor into as few and as equal row blocks as fit; [] if none do."""
    block = module.blocks[0]
    rows = _rows(block.param)
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


def _rows(param: nn.Parameter) -> int:
    return len(param) if param.ndim else 1


def _nothing_to_sample(members: Sequence[_Member], groups: Sequence[Mapping[str, Any]], chosen: Sequence[bool]) -> str:
    """Return the error where no parameter is sampled, which also tells what is trained, and what thawing would help."""
    names = names_of(groups)
    error = (
        f"none of the {len(members)} parameters can be sampled, and one must be: pass weight matrices "
        "with requires_grad=True, without a role or with the role 'sampled'"
    )
    if not (dense := [names[member.place] for member in members if member.role == "dense"]):
        return error
    meant = [role for group in groups for role in group.get("thawed", [group.get("role")] * len(group["params"]))]
    frozen = [
        names[member.place]
        for member in members
        if not chosen[member.place]
        and (meant[member.place] == "sampled" or meant[member.place] is None and member.param.ndim >= 2)
    ]
    thaw = f", that is, set it for {_listed(frozen)}" if frozen else ""
    return (
        f"{error}{thaw}; or use torch.optim.AdamW, since there is nothing to sample where all that is trained is "
        f"dense, here {_listed(dense)}"
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


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
