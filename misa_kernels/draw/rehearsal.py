"""Which active set should need the most memory, so that a run which fits with it fits to the end?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from misa_kernels.draw.candidates import Candidates, Ints
from misa_kernels.draw.order import Order
from misa_kernels.draw.packing import check_layers, pack, windows
from misa_kernels.draw.partition import Partition
from misa_kernels.draw.sampler import Sampler


def costliest_draw(partition: Partition, candidates: Candidates, sampler: Sampler, order: Order) -> Ints:
    """Return the admissible set that should need the most memory, of what a sampler draws from; see `costliest`."""
    window, first = sampler.depth_window, list[int]()
    if not order.is_known:
        # Any of the stacks may run first, and with it a window.
        first = [partition.layers.index(name) for name in order.first if name in partition.layers]
        window = None
    width, source = kept_inputs(partition, order.inputs)
    return costliest(candidates, width, partition.budget, window, sampler.max_per_layer, source, first)


def kept_inputs(partition: Partition, inputs: Mapping[str, tuple[int, int]]) -> tuple[Ints, Ints | None]:
    """Return how much of its input each candidate keeps for backward, and which candidates keep the same.

    Args:
        partition: The candidates are its modules.
        inputs: What an example has shown, see `Order`. Without, a candidate keeps its longest last axis a token.

    Returns:
        int64[B], elements, and int64[B], the number of the input, or None without an example.
    """
    width = [module.width for module in partition.modules]
    if not inputs:
        return np.array(width, dtype=np.int64), None
    seen = [
        [inputs[name] for block in module.blocks if (name := partition.names[block.index]) in inputs]
        for module in partition.modules
    ]
    # Of a matrix that no module of its own holds, the example shows nothing.
    tokens = float(np.median([sum(dict(own).values()) / width[b] for b, own in enumerate(seen) if own] or [1.0]))
    keys: list[tuple[int, ...]] = []
    for b, own in enumerate(seen):
        width[b] = sum(dict(own).values()) if own else round(width[b] * tokens)
        keys.append(tuple(dict(own)) if own else (-1 - b,))
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array(width, dtype=np.int64), np.array([numbers[key] for key in keys], dtype=np.int64)


def costliest(
    candidates: Candidates,
    width: Ints,
    budget: int,
    depth_window: int | None,
    max_per_layer: int | None = None,
    source: Ints | None = None,
    first: Sequence[int] = (),
) -> Ints:
    """Return the admissible set that should need the most memory, to rehearse the peak.

    The model, in order of weight. Everything above the lowest active layer keeps its activations: a smallest
    candidate of the lowest layer comes first (with a depth window, all come from the window that holds this
    layer), or one of each that may be the lowest. An active candidate keeps its input, unless that is kept anyway, and
    some share it (q, k, v): then one candidate per input, by width per parameter. Gradients and states go
    by size: the largest fill the rest, among equals the last registered, whose input is the likeliest to be
    one of its own (the output projection of attention). Being greedy, the kept widths fall short of the best
    set's, by less than twice the largest width. Where `max_per_layer` leaves budget over, that goes into wider or
    larger candidates in the place of others in their layers.

    Args:
        candidates: All candidates; importance and last_round have no effect.
        width: int64[B], how much of its input a candidate keeps; in any unit.
        budget: Upper bound on the parameters of the set.
        depth_window: The sampler's.
        max_per_layer: The sampler's.
        source: int64[B], number of that input; None: what lies in one layer and is equally wide reads the same.
        first: Layers of which any may be the lowest, where that is not known.

    Returns:
        int64[k], candidate numbers, ascending.

    Raises:
        ValueError: `depth_window` or `max_per_layer` is set and a candidate has no layer.
    """
    numel, layer = candidates.numel, candidates.layer
    check_layers(layer, depth_window, max_per_layer)
    eligible = np.flatnonzero(np.isin(layer, windows(layer, depth_window)[0]))
    largest = eligible[np.lexsort((-eligible, -numel[eligible]))]
    # Among equals the widest first, or narrow inputs would run out and leave room for shared ones only.
    densest = eligible[np.lexsort((-width[eligible], -width[eligible] / numel[eligible]))]
    inputs: dict[Any, int] = {}
    for b in densest[width[densest] > 0].tolist():
        # Nothing is known to be shared in an unknown layer: there each candidate is a layer of its own.
        own = (int(layer[b]) if layer[b] >= 0 else -1 - b, int(width[b])) if source is None else int(source[b])
        inputs.setdefault(own, b)
    reach = []
    for number in first or [layer[layer >= 0].min(initial=layer.max())]:
        lowest = densest[layer[densest] == number]
        reach += lowest[np.argsort(numel[lowest], kind="stable")][:1].tolist()
    # Where not all of them fit, as many as do.
    reach.sort(key=numel.__getitem__)
    order = np.array([*reach, *inputs.values(), *largest], dtype=np.int64)
    active = pack(order, candidates, budget, max_per_layer)
    if max_per_layer is not None:
        active = _widen(active, eligible, candidates, width, budget)
    return np.sort(active)


def _widen(active: Ints, eligible: Ints, candidates: Candidates, width: Ints, budget: int) -> Ints:
    """Exchange active candidates for others of their layers that keep more, or are larger, while the budget lasts."""
    numel, layer = candidates.numel, candidates.layer
    left = budget - int(numel[active].sum())
    members: dict[int, list[int]] = {}
    for b in active.tolist():
        members.setdefault(int(layer[b]), []).append(b)
    for b in eligible[np.lexsort((-numel[eligible], -width[eligible]))].tolist():
        own = members.get(int(layer[b]), [])
        if b in own:
            continue
        # The one with the same input gives way, or else the one that keeps the least.
        rivals = [a for a in own if width[a] == width[b]] or own
        a = min(rivals, key=lambda a: (width[a], numel[a]), default=b)
        if (width[a], numel[a]) < (width[b], numel[b]) and numel[b] - numel[a] <= left:
            own[own.index(a)] = b
            left -= int(numel[b] - numel[a])
    return np.array([b for own in members.values() for b in own], dtype=np.int64)
