"""Where does each tensor lie: in which layer, or before, between or behind the layers, and how do these follow?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from misa_kernels.draw.adapters import wrappers
from misa_kernels.draw.matrices import Widths, is_known
from misa_kernels.draw.order import Order, Trace
from misa_kernels.draw.roles import EMBEDDING, EXPERTS, MATRIX, Kind, Place, kinds_of
from misa_kernels.draw.streams import NONE, Flow, Linear, flows
from misa_kernels.draw.tree import Layer, Node

BEFORE, BEHIND = "before the first layer", "behind the last layer"
UNSURE = "a table, or a matrix that nothing tells from one"


@dataclass(slots=True)
class Spot:
    """Where a tensor lies.

    Attributes:
        layer: Name of its layer; None outside of them.
        why: What tells what it is, in words.
        lowest: The lowest layer that backward must run through to train it; None behind the last.
        flow: What it has to do with the residual stream.
    """

    layer: str | None
    why: str
    lowest: str | None = None
    flow: Flow = NONE


def spots_of(
    nodes: Sequence[Node], places: Sequence[Place], stack: Sequence[Layer], trace: Trace | None, is_ordered: bool
) -> tuple[list[Kind], list[Spot], Order]:
    """Return what each tensor is, where it lies, and the order of the layers.

    Args:
        nodes: The modules of a model.
        places: Its parameters.
        stack: Its layers; where there are none, each matrix is one.
        trace: What a forward pass showed; without, modules count as run as they are registered.
        is_ordered: Whether the layers are in the order in which they run.
    """
    inside: dict[int, str] = {}
    for layer in stack:
        due = [layer.module]
        while due:
            module = due.pop()
            if id(module) not in inside:
                inside[id(module)] = layer.name
                due += [child for child in module._modules.values() if child is not None]
    kinds = kinds_of(places, nodes, inside)
    when = _moments(places, trace)
    spots = _beside(places, kinds, stack, inside, when) if stack else _alone(nodes, places, kinds)
    in_time = sorted(range(len(places)), key=when.__getitem__)
    following: str | None = None
    for i in reversed(in_time):
        following = spots[i].layer or following
        spots[i].lowest = following
    _add_flows(places, kinds, stack, spots)
    return kinds, spots, _order(nodes[0].module, places, spots, stack, trace, in_time, is_ordered)


def _moments(places: Sequence[Place], trace: Trace | None) -> list[int]:
    """Return a number for each tensor that rises with the time at which it is used."""
    if trace is None:
        return list(range(len(places)))
    found, last = [], -1
    for place in places:
        last = trace.calls.get(id(place.owner), last)
        found.append(last)
    return found


def _alone(nodes: Sequence[Node], places: Sequence[Place], kinds: Sequence[Kind]) -> list[Spot]:
    """Return where the tensors of a model without a stack lie: what is beside a matrix is in the same layer as it."""
    layers: dict[int, str] = {}
    for path, wrapper in wrappers((node.name, node.module) for node in nodes):
        for part in wrapper.modules():
            layers.setdefault(id(part), path)
    own = [layers.get(id(place.owner), kind.module) for place, kind in zip(places, kinds, strict=True)]
    for place, kind, name in zip(places, kinds, own, strict=True):
        if kind.is_matrix:
            layers.setdefault(id(place.owner), name)
    return [
        Spot(name if kind.is_matrix else layers.get(id(place.owner)), kind.what)
        for place, kind, name in zip(places, kinds, own, strict=True)
    ]


def _beside(
    places: Sequence[Place],
    kinds: Sequence[Kind],
    stack: Sequence[Layer],
    inside: Mapping[int, str],
    when: Sequence[int],
) -> list[Spot]:
    """Return where the tensors of a model with layers lie; a matrix between them is a layer, and what is beside it."""
    spots = []
    for place, kind in zip(places, kinds, strict=True):
        layer = inside.get(id(place.node.module))
        spots.append(Spot(layer, f"{kind.what} of a layer" if layer is not None else kind.what))
    outside = [i for i, spot in enumerate(spots) if spot.layer is None and kinds[i].what == MATRIX]
    moments = [moment for moment, spot in zip(when, spots, strict=True) if spot.layer is not None]
    if not outside or not moments:
        return spots
    begin, end = min(moments), max(moments)
    # When each width is written first, and read last.
    written: dict[int, int] = {}
    read: dict[int, int] = {}
    # And what the matrix before has written.
    latest: dict[int, frozenset[int]] = {}
    before: frozenset[int] = frozenset()
    for i in sorted(range(len(places)), key=when.__getitem__):
        latest[when[i]] = before
        if (mapped := kinds[i].widths) is not None:
            before = mapped.writes
    for moment, place, kind in zip(when, places, kinds, strict=True):
        reads, writes = kind.widths or ((), ())
        for width in reads:
            read[width] = max(read.get(width, moment), moment)
        for width in place.param.shape[-1:] if kind.what == EMBEDDING else writes:
            written[width] = min(written.get(width, moment), moment)
    staged = {
        path
        for layer in stack
        for path in _above(layer.name)[1:]
        if path and (not layer.stack or path.startswith(f"{layer.stack}."))
    }
    between: dict[int, str] = {}
    for i in outside:
        place, kind = places[i], kinds[i]
        widths = kind.widths or Widths(frozenset(), frozenset())
        # Part of a stage, it is what leads to the layers of this one or from them to the next.
        is_in_stage = any(path in staged for path in _above(place.node.name))
        if not is_known(place.owner) and widths.reads == widths.writes and not _has_bias(place):
            spots[i].why = UNSURE
        elif (when[i] < begin and not is_in_stage) or not (
            _is_fed(widths.reads, written, when[i]) or _is_flattened(widths.reads, latest.get(when[i], ()))
        ):
            # What a patch embedding reads, nothing before it has written.
            spots[i].why = BEFORE
        elif (when[i] > end and not is_in_stage) or not _is_used(widths.writes, read, when[i]):
            # What a head writes, nothing behind it reads.
            spots[i].why = BEHIND
        else:
            between.setdefault(id(place.owner), kind.module.partition(".parametrizations.")[0])
            spots[i] = Spot(between[id(place.owner)], "matrix between layers")
    names = set(between.values())
    for spot, place in zip(spots, places, strict=True):
        if spot.layer is None and names:
            spot.layer = next((path for path in _above(place.node.name) if path in names), None)
    return spots


def _has_bias(place: Place) -> bool:
    """Whether a tensor is the only matrix of its module, beside a vector as long as one of its axes."""
    vectors = {len(param) for param in place.owner._parameters.values() if param is not None and param.ndim == 1}
    return len(place.node.matrices) == 1 and not vectors.isdisjoint(place.param.shape)


def _is_fed(reads: Iterable[int], written: Mapping[int, int], moment: int) -> bool:
    """Whether something of these widths was written before; up to four may be joined, and half be taken."""
    sizes = {2 * width for width in reads if width > 3} | {
        width // n for width in reads for n in (1, 2, 3, 4) if width % n == 0
    }
    return any(written.get(size, moment) < moment for size in sizes if size > 1)


def _is_flattened(reads: Iterable[int], before: Iterable[int]) -> bool:
    """Whether a matrix reads all that the one before it writes at several places."""
    return any(width % size == 0 for width in reads for size in before if size > 1)


def _is_used(writes: Iterable[int], read: Mapping[int, int], moment: int) -> bool:
    """Whether something behind reads these widths, or each of up to four parts of them."""
    sizes = {width // n for width in writes for n in (1, 2, 3, 4) if width % n == 0}
    return any(read.get(size, moment) > moment for size in sizes if size > 1)


def _above(path: str) -> list[str]:
    """Return a path and those above it, up to the model's."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts), -1, -1)]


def _add_flows(places: Sequence[Place], kinds: Sequence[Kind], stack: Sequence[Layer], spots: Sequence[Spot]) -> None:
    """Fill in what the matrices of the layers have to do with the residual stream; nothing is known of convolutions."""
    members: dict[str | None, list[int]] = {layer.name: [] for layer in stack}
    for i, spot in enumerate(spots):
        if spot.layer in members:
            members[spot.layer].append(i)
    # Layers are mostly alike.
    known: dict[Any, list[Flow]] = {}
    for layer, own in members.items():
        start = len(layer or "") + 1 if layer else 0
        numbers, linears, norms, held = [], [], [], set()
        for i in own:
            node, kind = places[i].node, kinds[i]
            if kind.widths is None or kind.what not in (MATRIX, EXPERTS):
                continue
            # Nor of tensors of three axes whose class is unknown.
            if kind.what == EXPERTS or (places[i].param.ndim == 2 and not isinstance(node.module, nn.RNNBase)):
                numbers.append(i)
                held.add(node.name)
                linears.append(Linear(node.name[start:], kind.widths, kind.what == EXPERTS))
        for i in own:
            if places[i].param.ndim == 1 and places[i].node.name not in held:
                norms.append(len(places[i].param))
        key = tuple(linears), tuple(norms)
        if key not in known:
            known[key] = flows(linears, norms)
        for i, flow in zip(numbers, known[key], strict=True):
            spots[i].flow = flow


def _order(
    model: nn.Module,
    places: Sequence[Place],
    spots: Sequence[Spot],
    stack: Sequence[Layer],
    trace: Trace | None,
    in_time: Sequence[int],
    is_ordered: bool,
) -> Order:
    """Return the layers in the order in which they come, as given, as called, or as registered."""
    modules = {layer.name: layer.module for layer in stack}
    stacks = {layer.name: layer.stack for layer in stack}
    roots = set(stacks.values()) - {""}
    owners: dict[str, nn.Module] = dict(modules) if is_ordered else {}
    for i in in_time:
        name = spots[i].layer
        if name is not None and name not in owners:
            owners[name] = modules.get(name, places[i].owner)
            stacks.setdefault(name, next((path for path in _above(name) if path in roots), name))
    inputs = {} if trace is None else {p.name: trace.inputs[id(p.owner)] for p in places if id(p.owner) in trace.inputs}
    is_seen = trace is not None and all(id(module) in trace.calls for module in owners.values())
    return Order(model, owners, stacks, is_known=is_ordered or is_seen, inputs=inputs, is_told=trace is not None)
