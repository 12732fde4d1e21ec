"""Which candidates may be active together: of which layers, how many of each, and within a budget?"""

from __future__ import annotations

import math

import numpy as np

from misa_kernels.draw.candidates import Candidates, Ints


def admissible(layer: Ints, max_per_layer: int | None) -> int:
    """Return how many of the candidates in these layers, int64[E], the quota lets in at a time."""
    if max_per_layer is None:
        return layer.size
    return int(np.minimum(np.unique(layer, return_counts=True)[1], max_per_layer).sum())


def windows(layer: Ints, depth_window: int | None) -> list[Ints]:
    """Cut the L layers that hold candidates into ceil(L / W) runs, as equal as can be, from the input up."""
    layers = np.unique(layer)
    return np.array_split(layers, math.ceil(layers.size / (depth_window or layers.size)))


def check_layers(layer: Ints, depth_window: int | None, max_per_layer: int | None) -> None:
    """Refuse options that are about layers where a candidate has none."""
    unknown = int(np.count_nonzero(layer < 0))
    for option, value in (("max_per_layer", max_per_layer), ("depth_window", depth_window)):
        if unknown and value is not None:
            raise ValueError(
                f"{option}={value!r} must be None where layers are unknown, here for {unknown} of {layer.size} "
                "candidates: make the groups with param_groups(model), which names the layers"
            )


def pack(order: Ints, candidates: Candidates, room: int, max_per_layer: int | None) -> Ints:
    """Go through `order`, take what still fits into `room` parameters and its layer's quota, and skip the others.

    A candidate that occurs again, or has a rival that was taken, is passed over.
    """
    quota = math.inf if max_per_layer is None else max_per_layer
    # By what stands for them and their rivals.
    taken: dict[int, int] = {}
    of_layer: dict[int, int] = {}
    sizes, layers = candidates.numel[order].tolist(), candidates.layer[order].tolist()
    rivals = candidates.rival[order].tolist() if candidates.rival.size else order.tolist()
    for b, rival, size, layer in zip(order.tolist(), rivals, sizes, layers, strict=True):
        if size <= room and rival not in taken and of_layer.get(layer, 0) < quota:
            taken[rival] = b
            of_layer[layer] = of_layer.get(layer, 0) + 1
            room -= size
    return np.array(list(taken.values()), dtype=np.int64)
