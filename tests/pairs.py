"""Fewer cases than all combinations, in which any two values still meet."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any


def pairwise(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return rows of one value an axis, the same in every run: each pair of values of two axes is in one of them.

    A fault that two values together bring out shows as it would in the full product; of those that take three, only
    some do.
    """
    lists = [list(axis) for axis in axes]
    product = list(itertools.product(*map(range, map(len, lists))))
    # Each row as the pairs that it holds: the numbers of two axes and of their values.
    held = {row: set(itertools.combinations(enumerate(row), 2)) for row in product}
    # Beyond the first time, pairs come equally often.
    seen, chosen = Counter(dict.fromkeys(set().union(*held.values()), 0)), []
    while not all(seen.values()):
        best = max(product, key=lambda row: (sum(not seen[pair] for pair in held[row]), -sum(map(seen.get, held[row]))))
        seen.update(held[best])
        chosen.append(best)
    return [tuple(values[i] for values, i in zip(lists, row, strict=True)) for row in sorted(chosen)]
