"""Which modules of a model are its layers? What repeats in its module tree, seen from inside.

A *stack* is a module whose children repeat a class, a *unit* one of these children. Units are layers if each reads what
another writes, as heads beside one another do not. Where stacks nest, the innermost units that hold several matrices
are the layers: the blocks of a stage, but not the experts of a layer, which has an attention beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from misa_kernels.draw.adapters import bare
from misa_kernels.draw.matrices import Widths, class_of, is_list, is_lost, is_norm, is_vector, matrices_of


@dataclass(slots=True, eq=False)
class Node:
    """A module of a model, and what lies beneath it.

    Args:
        name: Its name in the model, the first of several.
        module: The module.
        inner: The module without what peft has wrapped around it.
        matrices: Its own weight matrices, by the names of the tensors.
        parts: Those of its children that nothing before them holds, too, without adapters.
        kind: What it has in common with others of its class.
        count: How many weight matrices it holds.
        several: How many tensors it holds that are no vectors.
        has_norm: Whether there is a norm in it.
        reads: Widths that its matrices may read.
        writes: Widths that its last matrix may write.
    """

    name: str
    module: nn.Module
    inner: nn.Module
    matrices: dict[str, Widths]
    parts: list[Node] = field(default_factory=list)
    kind: object = None
    count: int = 0
    several: int = 0
    has_norm: bool = False
    reads: frozenset[int] = frozenset()
    writes: frozenset[int] = frozenset()

    @property
    def is_sequential(self) -> bool:
        """Whether its class is Sequential."""
        return isinstance(self.inner, nn.Sequential) or class_of(self.inner) == "Sequential"

    @property
    def is_dict(self) -> bool:
        """Whether its class is ModuleDict."""
        return isinstance(self.inner, nn.ModuleDict) or class_of(self.inner) == "ModuleDict"

    def follows(self, other: Node) -> bool:
        """Whether it may read what another leaves: what that writes last, or leads back to a width that it has read."""
        return not self.reads.isdisjoint(other.writes) or not self.reads.isdisjoint(other.returns())

    def returns(self) -> set[int]:
        """Return the widths that one of its matrices reads and a later one, of another width, writes."""
        read: set[int] = set()
        found: set[int] = set()
        for widths in self.each():
            if widths.reads.isdisjoint(widths.writes):
                found |= read & widths.writes
            read |= widths.reads
        return found

    def each(self) -> Iterator[Widths]:
        """Yield the widths of its matrices, as they are registered."""
        yield from self.matrices.values()
        for part in self.parts:
            yield from part.each()

    def rows(self) -> Counter[int]:
        """Return how many of its matrices may write each width."""
        return Counter(width for widths in self.each() for width in widths.writes)


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of a model.

    Args:
        name: Its name in the model.
        module: The module.
        stack: Name of the outermost stack that it lies in, whose layers run in their order.
    """

    name: str
    module: nn.Module
    stack: str


def nodes_of(model: nn.Module) -> list[Node]:
    """Return the modules of a model, each once, in the order and under the names of `model.named_modules()`."""
    found: list[Node] = []
    _visit(model, "", {}, found)
    return found


def layers_of(root: Node) -> list[Layer]:
    """Return the layers of a model in the order in which they are registered; none if nothing repeats in it."""
    found = _find(root)
    found = [unit for unit in found if not unit.is_spare] or found
    # Beside layers that lead on, units that lead nowhere are heads, whatever is in them.
    on = {unit.stack for unit in found if unit.leads_on and unit.node.count > 1}
    found = [unit for unit in found if unit.leads_on or unit.stack in on or not on]
    # Behind layers of several matrices and norms, what has less is a head.
    large = {unit.stack for unit in found if unit.node.count > 1 and unit.node.has_norm}
    last = max((number for number, unit in enumerate(found) if unit.stack in large), default=len(found))
    return [Layer(unit.node.name, unit.node.module, unit.stack) for unit in found[: last + 1]]


def _visit(module: nn.Module, name: str, seen: dict[int, Node], found: list[Node]) -> Node:
    """Return a module as a node, and add it and what lies beneath it to what was found."""
    inner = bare(module)
    own = matrices_of(inner)
    node = seen[id(module)] = Node(name, module, inner, own)
    found.append(node)
    if is_lost(inner) or isinstance(inner, torch.jit.ScriptModule):
        node.kind = class_of(inner), tuple(name for name, _ in inner._parameters.items())
    else:
        node.kind = type(inner)
    node.count, node.several = len(own), sum(not is_vector(p) for p in module._parameters.values() if p is not None)
    # Recurrent networks do without.
    node.has_norm = not own and is_norm(inner) or isinstance(inner, nn.RNNBase)
    for widths in own.values():
        node.reads |= widths.reads
        node.writes = widths.writes
    if not module._modules:
        return node
    prefix = f"{name}." if name else ""
    for attribute, child in module._modules.items():
        if child is not None and id(child) not in seen:
            part = _visit(child, prefix + attribute, seen, found)
            node.several += part.several
            # What computes a weight from others is no module of the model, nor are adapters.
            if inner is module and not isinstance(module, ParametrizationList):
                node.parts.append(part)
    if inner is not module and id(inner) in seen:
        node.parts = seen[id(inner)].parts
    for part in node.parts:
        node.count += part.count
        node.has_norm |= part.has_norm
        node.reads |= part.reads
        node.writes = part.writes or node.writes
    if is_lost(inner):
        names = tuple(part.name[len(prefix) :] for part in node.parts)
        node.kind = node.kind, names, tuple(part.kind for part in node.parts)
    return node


@dataclass(frozen=True, slots=True, eq=False)
class _Unit:
    """A unit of a stack.

    Args:
        node: The module.
        stack: Name of the outermost stack around it.
        beside: How many units its own stack has.
        is_plain: Whether it lies in a list of several in which no class repeats.
        is_spare: Whether it counts only where there is no other stack.
        leads_on: Whether it reads what a unit beside it leaves, or leaves what that reads.
    """

    node: Node
    stack: str
    beside: int
    is_plain: bool = False
    is_spare: bool = False
    leads_on: bool = True


def _find(node: Node, around: str = "") -> list[_Unit]:
    """Return the units beneath a node, of the innermost stacks that hold several matrices each.

    Args:
        node: The node.
        around: Whether it lies in a unit of a "list" or of "attributes".
    """
    if isinstance(node.inner, nn.RNNBase) and not around and node.count:
        return [_Unit(node, node.name, 1)]
    if not node.parts:
        return []
    units = _units(node, around)
    names = {unit.name for unit in units}
    inside_of = "list" if is_list(node.inner) else "attributes"
    inner = {child.name: _find(child, inside_of if child.name in names else around) for child in node.parts}
    for child in node.parts:
        if _is_between(child, node.parts):
            inner[child.name] = []
    kinds = Counter(unit.kind for unit in units)
    is_plain = len(units) > 1 and max(kinds.values()) == 1
    if (is_plain or node.is_dict) and any(not unit.is_plain for own in inner.values() for unit in own):
        # Towers, or a backbone and a head.
        units, names = [], set()
    is_spare = node.is_sequential and all(not unit.parts and unit.count == 1 for unit in units)
    inside = _inside(units, inner)
    linked = _linked(units)
    found = []
    for child in node.parts:
        if child.name not in names:
            found += inner[child.name]
        elif child.name not in inside:
            found.append(_Unit(child, node.name, len(units), is_plain, is_spare, id(child) in linked))
        elif is_list(node.inner):
            found += [replace(unit, stack=node.name) for unit in inside[child.name]]
        else:
            found += inside[child.name]
    return found


def _units(node: Node, around: str) -> list[Node]:
    """Return which children of a node are the units of a stack; [] if it is none."""
    able = [child for child in node.parts if child.count]
    count = Counter(child.kind for child in able)
    units = [child for child in able if count[child.kind] > 1]
    if not is_list(node.inner):
        # Layers as attributes; but what a layer has two of, such as an attention, are none.
        if around == "attributes" and len(count) == 1 and sum(unit.count for unit in able) == node.count:
            # But for stages made of nothing else.
            units = able
        elif around:
            return []
        units = [unit for unit in units if unit.count > 1 and unit.parts and not is_list(unit.inner)]
        return units if _is_chain(units) else []
    if units:
        first, last = able.index(units[0]), able.index(units[-1])
        # At the ends a class of its own is an embedding or a head, unless it carries the same width on.
        if not node.is_sequential and not node.is_dict:
            while first > 0 and _is_like(able[first - 1], able[first]):
                first -= 1
            while last + 1 < len(able) and _is_like(able[last + 1], able[last]):
                last += 1
        units = able[first : last + 1]
        if any(unit.count > 1 for unit in units):
            # So is a single matrix.
            while units[0].count == 1:
                del units[0]
            while units[-1].count == 1:
                del units[-1]
    elif len(able) == len(node.parts) and not any(not child.parts for child in able):
        units = able
    return units if _is_chain(units) else []


def _is_like(end: Node, unit: Node) -> bool:
    """Whether a module at an end may be a unit of another class."""
    return end.count > 1 and end.follows(unit) and unit.follows(end)


def _is_chain(units: Sequence[Node]) -> bool:
    """Whether modules may run one behind the other: each reads what a neighbour writes, or has norms and matrices."""
    linked = _linked(units)
    return all(id(unit) in linked or (unit.has_norm and unit.count > 1) for unit in units)


def _linked(units: Sequence[Node]) -> set[int]:
    """Return which modules read what the one before them leaves, or the other way round, by their identity."""
    pairs = [*pairwise(units)] if len(units) > 1 else [(unit, unit) for unit in units]
    return {id(unit) for before, behind in pairs if behind.follows(before) for unit in (before, behind)}


def _is_between(node: Node, siblings: Sequence[Node]) -> bool:
    """Whether a list of single matrices stands beside a list of as many stages, each before one of these."""
    if not is_list(node.inner) or node.count != len(node.parts):
        return False
    return any(
        is_list(other.inner) and len(other.parts) == len(node.parts) and other.count > node.count for other in siblings
    )


def _inside(units: Sequence[Node], inner: Mapping[str, Sequence[_Unit]]) -> dict[str, list[_Unit]]:
    """Return the layers inside of those units that are stages, by their names; {} if the units are layers."""
    several = {
        unit.name: [own for own in inner[unit.name] if own.node.count > 1 and not own.is_plain] for unit in units
    }
    # One layer in each of several stages repeats, too, unless there is more in these.
    total = {name: sum(own.node.count for own in found) for name, found in several.items()}
    count = Counter(
        own.node.kind
        for unit in units
        for own in several[unit.name]
        if own.beside > 1 or total[unit.name] == unit.count
    )
    repeated = {name: [own for own in found if count[own.node.kind] > 1] for name, found in several.items()}
    if not any(repeated[unit.name] and _is_stage(unit, repeated[unit.name]) for unit in units):
        return {}
    # A single matrix beside stages, such as a transition, is no stage.
    return {
        unit.name: repeated[unit.name] or several[unit.name] for unit in units if several[unit.name] or unit.count < 2
    }


def _is_stage(unit: Node, inside: Sequence[_Unit]) -> bool:
    """Whether a unit is no more than the layers inside of it; a layer has more beside its experts or heads."""
    total = sum(own.node.count for own in inside)
    beside = unit.count - total
    rows = unit.rows()
    for own in inside:
        rows -= own.node.rows()
    if any(own.beside > 1 and rows[own.beside] for own in inside):
        # A router writes a number for each expert.
        return False
    least = min(own.node.count for own in inside)
    return least > beside or (total > beside and all(own.node.has_norm for own in inside))
