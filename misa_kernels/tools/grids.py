"""How is a number of every module drawn as a field of colours: over the rounds, or of slices along their matrices?

The rows are modules or matrices, by kind and layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from misa_kernels.monitor import Monitor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999")
# Smallest cell, in points, that can hold a dot.
DOT = 3.0
# Cells that the columns or rows of a matrix are drawn in.
CELLS = 600


def height_of(monitor: Monitor) -> float:
    """Return the height of a figure, in inches, in which the rows can be told apart."""
    rows = len({part.matrix for part in monitor.parts}) or len(monitor.names)
    return min(max(2.0 + 0.14 * rows, 5.0), 11.0)


def kinds_of(monitor: Monitor) -> list[str]:
    """Return what each module is called within its layer: `q_proj`, or as much more as tells kinds apart."""
    kinds = []
    for name, layer in zip(monitor.names, monitor.layer, strict=True):
        own = re.sub(r"\[(rows |:, )?\d+:.*", "", name)
        if layer >= 0:
            own = own.removeprefix(monitor.layers[layer]).lstrip(".") or "layer"
        kinds.append(re.sub(r"\d+", "#", own))
    short = {kind: kind.rsplit(".", 1)[-1] for kind in kinds}
    return [short[kind] for kind in kinds] if len({*short.values()}) == len(short) else kinds


def by_round(monitor: Monitor, value: Any) -> npt.NDArray[np.float64]:
    """Return a number for each module (row) in each round (column); NaN in rounds that have no record."""
    first = monitor.rounds[0].round
    found = np.full((len(monitor.names), monitor.rounds[-1].round - first + 1), np.nan)
    for record in monitor.rounds:
        found[:, record.round - first] = value(record)
    return found


def heatmap(
    monitor: Monitor, axes: Axes, values: npt.NDArray[np.float64], cells: dict[str, Any], meaning: str
) -> tuple[list[int], float]:
    """Draw modules × rounds; return the module of each row from the bottom, and a cell's shorter side in points."""
    from matplotlib.ticker import MaxNLocator

    first, rounds = monitor.rounds[0].round, values.shape[1]
    ends = first - 0.5, first + rounds - 0.5
    order, points = _grid(axes, values, kinds_of(monitor), monitor.layer.tolist(), ends, cells, meaning)
    axes.set_ylabel(axes.get_ylabel().replace("matrix", "module"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("round")
    return order, min(points)


def matrices(
    monitor: Monitor, axes: Axes, value: Mapping[int, float], cells: dict[str, Any], meaning: str, is_sum: bool
) -> bool:
    """Draw matrices × their columns or rows, of a value for some slices; return whether the active ones are marked.

    Args:
        monitor: Of a run in slices.
        axes: Where to draw.
        value: By the number of the slice.
        cells: How they are coloured.
        meaning: Of the colours.
        is_sum: Whether the values of slices that overlap are added; else their mean is shown.
    """
    own: dict[str, list[int]] = {}
    for number, part in enumerate(monitor.parts):
        own.setdefault(part.matrix, []).append(number)
    kinds, values = kinds_of(monitor), np.full((len(own), CELLS), np.nan)
    for row, numbers in enumerate(own.values()):
        size = monitor.parts[numbers[0]].size
        total, count = np.zeros(size), np.zeros(size)
        for number in numbers:
            if number in value:
                reach = slice(*monitor.parts[number][2:4])
                total[reach] += value[number]
                count[reach] += 1
        line = np.where(count > 0, total if is_sum else total / np.maximum(count, 1), np.nan)
        # A slice below a cell is seen, too.
        values[row] = np.fmax.reduceat(line, np.arange(CELLS) * size // CELLS)
    first = [numbers[0] for numbers in own.values()]
    words = [f"{kinds[i]}\n{'columns' if monitor.parts[i].axis else 'rows'}" for i in first]
    layers = [int(monitor.layer[i]) for i in first]
    cells = cells | {"cmap": cells["cmap"].with_extremes(bad="#e4e4e4")}
    order, points = _grid(axes, np.ma.masked_invalid(values), words, layers, (0.0, 100.0), cells, meaning)
    axes.set_xlabel("columns or rows of the matrix, %")
    if points[1] > 2 * DOT:
        axes.hlines(np.arange(1, len(order)) - 0.5, 0, 100, color="white", linewidth=0.8, zorder=1)
    if points[1] < DOT:
        return False
    place = {matrix: row for row, matrix in enumerate(list(own)[i] for i in order)}
    for part in (monitor.parts[i] for i in monitor.current.active):
        ends = [100 * part.first / part.size, 100 * part.last / part.size]
        width = min(0.3 * points[1], 4.0)
        axes.plot(ends, [place[part.matrix]] * 2, color=COLOURS[5], linewidth=width, solid_capstyle="butt")
    return True


def _grid(
    axes: Axes,
    values: npt.NDArray[np.float64],
    kinds: Sequence[str],
    layers: Sequence[int],
    ends: tuple[float, float],
    cells: dict[str, Any],
    meaning: str,
) -> tuple[list[int], tuple[float, float]]:
    """Draw a group of rows for each kind, in it layer 0 at the bottom.

    Returns:
        The number of each row from the bottom, and the sides of a cell in points.
    """
    place = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    order = sorted(range(len(kinds)), key=lambda i: (-place[kinds[i]], layers[i], i))
    box, dpi = axes.get_window_extent(), axes.figure.dpi
    points = 72 / dpi * np.array([box.width / values.shape[1], box.height / len(order)])
    # Cells below a pixel would vanish here and there: their mean does not.
    smooth = "auto" if points.min() < 72 / dpi else "nearest"
    extent = (*ends, -0.5, len(order) - 0.5)
    image = axes.imshow(values[order], extent=extent, aspect="auto", origin="lower", interpolation=smooth, **cells)
    ticks: dict[int, str] = {}
    for kind, group in groupby(range(len(order)), lambda row: kinds[order[row]]):
        rows = list(group)
        axes.axhline(rows[0] - 0.5, color="white", linewidth=1.4)
        axes.axhline(rows[0] - 0.5, color="#666666", linewidth=0.6)
        axes.annotate(
            kind, (0, np.mean(rows)), xycoords=axes.get_yaxis_transform(), xytext=(-28, 0), textcoords="offset points",
            ha="right", va="center",
        )  # fmt: skip
        # The bottom row of each layer, as far as the labels have room.
        bottoms = {layers[order[row]]: row for row in reversed(rows)}
        known = sorted(layer for layer in bottoms if layer >= 0)
        room = max(1, int(len(rows) * points[1] // 9))
        ticks |= {bottoms[layer]: str(layer) for layer in known[:: -(-len(known) // room) or 1]}
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=7)
    longest = max(len(line) for kind in place for line in kind.split("\n"))
    axes.set_ylabel("kind of matrix, and its layer (0 nearest the input)", labelpad=24 + 6.5 * longest)
    if np.ma.count(values):
        axes.figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04, aspect=40, label=meaning)
    return order, (float(points[0]), float(points[1]))
