"""Which active set should need the most memory, so that a run which fits with it fits to the end?"""

from __future__ import annotations

import numpy as np

from misa_kernels.draw.sampler import check_layers, pack, windows
from misa_kernels.draw.scores import Candidates, Ints


def costliest(
    candidates: Candidates, width: Ints, budget: int, depth_window: int | None, max_per_layer: int | None = None
) -> Ints:
    """Return the admissible set that should need the most memory, to rehearse the peak.

    The model, in order of weight. Everything above the lowest active layer keeps its activations: a smallest
    candidate of the lowest layer comes first (with a depth window, all come from the window that holds this
    layer). An active candidate keeps its input, `width` numbers a token, and candidates of one layer with one
    width mostly share it (q, k, v): then one candidate per input, by width per parameter. Gradients and states go
    by size: the largest fill the rest, among equals the last registered, whose input is the likeliest to be
    one of its own (the output projection of attention). Being greedy, the kept widths fall short of the best
    set's, by less than twice the largest width. Where `max_per_layer` leaves budget over, that goes into wider or
    larger candidates in the place of others in their layers.

    Args:
        candidates: All candidates; importance and last_round have no effect.
        width: int64[B], input features of the candidate.
        budget: Upper bound on the parameters of the set.
        depth_window: The sampler's.
        max_per_layer: The sampler's.

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
    inputs: dict[tuple[int, int], int] = {}
    for b in densest.tolist():
        # Nothing is known to be shared in an unknown layer: there each candidate is a layer of its own.
        inputs.setdefault((int(layer[b]) if layer[b] >= 0 else -1 - b, int(width[b])), b)
    lowest = densest[layer[densest] == layer[layer >= 0].min(initial=layer.max())]
    reach = lowest[np.argsort(numel[lowest], kind="stable")][:1]
    order = np.concatenate([reach, [*inputs.values()], largest])
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
