"""What do param groups say of each parameter, and can it be trained so?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, repeat
from operator import attrgetter
from typing import Any, NamedTuple

from torch import nn

from misa_kernels.outside.notices import listed, names_of
from misa_kernels.ranks.shards import is_sharded, local


class Member(NamedTuple):
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


def members(groups: Sequence[Mapping[str, Any]], delta: float, chosen: Sequence[bool]) -> Iterator[Member]:
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
            own_role = _role(param, names[index], thawed if chosen[index] else role, delta, chosen[index])
            modules = (entry,) if isinstance(entry, str) else tuple(entry)
            if own_role == "sampled" and len(modules) != 1:
                rows = len(param) if param.ndim else 1
                if not modules or rows % len(modules):
                    raise ValueError(
                        f"{names[index]} has {rows} rows and {len(modules)} names in 'modules', which "
                        "must divide the rows equally: give it one name, or one for each of its row blocks"
                    )
                if is_sharded(param):
                    raise ValueError(
                        f"{names[index]} is sharded and holds {len(modules)} modules, and must be one to be sharded: "
                        "make the groups with param_groups(model, experts='whole')"
                    )
            if layer is None and own_role == "sampled" and "layers" in group:
                layer = modules[0]
            yield Member(param, index, param.numel(), g, own_role, modules, layer, cut)


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


def layer_order(members: Sequence[Member], groups: Sequence[Mapping[str, Any]]) -> list[str]:
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
    for _, own in groupby(members, key=attrgetter("group")):
        last: str | None = None
        for layer in (member.layer for member in own if member.layer is not None):
            if layer not in following:
                following[layer] = following[last]
                following[last] = layer
            last = layer
    layers: list[str] = []
    reached: str | None = None
    while (reached := following[reached]) is not None:
        layers.append(reached)
    return layers


def nothing_to_sample(members: Sequence[Member], groups: Sequence[Mapping[str, Any]], chosen: Sequence[bool]) -> str:
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
    thaw = f", that is, set it for {listed(frozen, 1)}" if frozen else ""
    return (
        f"{error}{thaw}; or use torch.optim.AdamW, since there is nothing to sample where all that is trained is "
        f"dense, here {listed(dense, 1)}"
    )
