"""Of which matrices does a budget train slices, along which axis, and how wide?

A slice is a range of columns or rows of one weight matrix. In a round one slice of each of many matrices is trained, an
equal share of each, so that every layer moves a little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

# What is sliced, in the order in which a budget is spent: each adds matrices to those before.
REACHES = ("down", "output", "all")
# A budget that is a larger part of the matrices than this goes on to the next ones. On a small model an eighth of the
# down projections was better than as much of all matrices, .45 of them within half a point, and all of them worse.
FULL = 0.5
# Columns or rows that a slice is made of, 16 bytes of 8-bit states and a sector of bfloat16, unless that leaves so much
# of the budget unspent, as in small models.
UNIT, UNSPENT = 16, 0.05


class Matrix(NamedTuple):
    """A matrix that may be sliced.

    Attributes:
        part: "down", "output", or anything else, see `streams.Flow`.
        axis: The axis along which it is cut: of the inner features of its layer where it has any.
        size: How many columns or rows there are along that axis,
        line: and how many elements has each.
    """

    part: str | None
    axis: int
    size: int
    line: int


@dataclass(frozen=True)
class Slicing:
    """What is sliced, and how.

    Attributes:
        reach: One of `REACHES`.
        widths: Columns or rows of a slice of each matrix; 0 where it is not sliced.
        numel: Parameters of the sliced matrices,
        trained: and how many of these are trained at a time.
        unsliced: Sampled parameters that are not trained, in matrices beyond the reach and such as cannot be sliced,
        uncut: and how many of these are in the latter.
        is_known: Whether it was seen of any matrix that it leads back to the residual stream.
        lines: For each kind of sliced matrix a line of text.
    """

    reach: str
    widths: list[int] = field(repr=False)
    numel: int
    trained: int
    unsliced: int
    uncut: int
    is_known: bool
    lines: tuple[str, ...]

    @property
    def share(self) -> float:
        """Fraction of the sliced matrices that is trained at a time."""
        return self.trained / self.numel

    def __str__(self) -> str:
        """Return what is sliced in one line, and what is not trained."""
        rest = f"; {self.unsliced:,} parameters of other matrices are not trained" if self.unsliced else ""
        return f"{'; '.join(self.lines)}{rest}"


def slicing(matrices: Sequence[Matrix | None], numels: Sequence[int], budget: int, reach: str) -> Slicing:
    """Spend a budget on slices, as nearly an equal share of each matrix as whole units allow.

    Args:
        matrices: Of each sampled tensor how it may be sliced, None where it cannot be.
        numels: Its elements.
        budget: Most parameters that may be trained at a time.
        reach: One of `REACHES`, or "auto": the first of which the budget is at most half, as what leads back to the
            residual stream is worth the most, and of that no more than a part.

    Raises:
        ValueError: If nothing can be sliced, or not one line of each matrix fits.
    """
    chosen: list[int] = []
    for name in REACHES if reach == "auto" else (reach,):
        reach, chosen = name, [n for n, matrix in enumerate(matrices) if matrix is not None and _is_in(matrix, name)]
        if chosen and budget <= FULL * sum(numels[n] for n in chosen):
            break
    if not chosen:
        raise ValueError(_nothing(matrices, reach))
    own = [matrix for n in chosen if (matrix := matrices[n]) is not None]
    whole = sum(matrix.size * matrix.line for matrix in own)
    widths = _widths(own, budget, UNIT)
    if _spent(own, widths) < (1 - UNSPENT) * min(budget, whole) or 0 in widths:
        widths = _widths(own, budget, 1)
    if 0 in widths:
        raise ValueError(_too_little(own, own[widths.index(0)], budget))
    all_widths = [0] * len(matrices)
    for n, width in zip(chosen, widths, strict=True):
        all_widths[n] = width
    return Slicing(
        reach=reach,
        widths=all_widths,
        numel=whole,
        trained=_spent(own, widths),
        unsliced=sum(numels) - whole,
        uncut=sum(numel for matrix, numel in zip(matrices, numels, strict=True) if matrix is None),
        is_known=any(matrix is not None and matrix.part in ("down", "output") for matrix in matrices),
        lines=_lines(matrices, all_widths),
    )


def axis_of(part: str | None, reads: int) -> int:
    """Return the axis along which a matrix is cut, given its part and the axis that its input has.

    What leads back to the stream is cut along its inner features, all else along its outer ones.
    """
    return reads if part in ("down", "output") else 1 - reads


def starts_of(size: int, width: int) -> list[int]:
    """Return where the slices of a matrix begin: as few as reach all of it, spread evenly, so that they may overlap."""
    count = math.ceil(size / width)
    unit = math.gcd(size, width, UNIT)
    return [round(n * (size - width) / max(count - 1, 1) / unit) * unit for n in range(count)]


def _is_in(matrix: Matrix, reach: str) -> bool:
    return reach == "all" or matrix.part == "down" or (reach == "output" and matrix.part == "output")


def _spent(matrices: Sequence[Matrix], widths: Sequence[int]) -> int:
    return sum(matrix.line * width for matrix, width in zip(matrices, widths, strict=True))


def _widths(matrices: Sequence[Matrix], budget: int, unit: int) -> list[int]:
    """Return the width of a slice of each matrix, in whole units; 0 where none fits."""
    share = min(1.0, budget / sum(matrix.size * matrix.line for matrix in matrices))
    ideal = [share * matrix.size for matrix in matrices]
    # A matrix that is trained whole need not be a multiple of the unit.
    least = 1 if unit == 1 and sum(matrix.line for matrix in matrices) <= budget else 0
    widths = [
        matrix.size if share == 1 else max(int(x // unit) * unit, least)
        for matrix, x in zip(matrices, ideal, strict=True)
    ]
    left = budget - _spent(matrices, widths)
    while left < 0:
        # So that each has a line, those that have the most beyond their share give some.
        n = max((n for n in range(len(matrices)) if widths[n] > least), key=lambda n: (widths[n] - ideal[n], n))
        widths[n] -= 1
        left += matrices[n].line
    # What whole units leave goes to those that lack the most, among equals to the upper layers.
    for n in sorted(range(len(matrices)), key=lambda n: (widths[n] - ideal[n], -n)):
        matrix, more = matrices[n], min(unit, matrices[n].size - widths[n])
        if 0 < more * matrix.line <= left and widths[n] < ideal[n]:
            widths[n] += more
            left -= more * matrix.line
    return widths


def _too_little(matrices: Sequence[Matrix], without: Matrix, budget: int) -> str:
    """Return the error where a matrix has no slice."""
    needed = sum(matrix.line for matrix in matrices)
    return (
        f"granularity='slice' with a budget of {budget:,} has no room for one line of {without.line:,} parameters of "
        f"each of {len(matrices)} matrices, which are {needed:,}: raise delta, or draw modules with "
        "granularity='module'"
    )


def _lines(matrices: Sequence[Matrix | None], widths: Sequence[int]) -> tuple[str, ...]:
    kinds: dict[tuple[str, int, int], list[int]] = {}
    for matrix, width in zip(matrices, widths, strict=True):
        if matrix is not None and width:
            kinds.setdefault((matrix.part or "other", matrix.axis, matrix.size), []).append(width)
    lines = []
    for (part, axis, size), own in kinds.items():
        low, high = min(own), max(own)
        span = f"{low}" if low == high else f"{low} to {high}"
        lines.append(f"{len(own)} x {part}: {span} of {size} {'columns' if axis else 'rows'}")
    return tuple(lines)


def _nothing(matrices: Sequence[Matrix | None], reach: str) -> str:
    """Return the error where nothing is sliced."""
    known = any(matrix is not None for matrix in matrices)
    what = f"slices={reach!r} finds none of {len(matrices)} matrices" if known else "finds no matrix to slice"
    plain = "make the groups with param_groups(model), of a model with linear layers that keep the forward of nn.Linear"
    remedy = "take slices='all'" if known else plain
    return (
        f"granularity='slice' {what}, and must find one: {remedy}, or draw modules with granularity='module', which "
        "may be adapters, stacked experts and convolutions, too"
    )
