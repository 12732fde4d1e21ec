"""What does a run look like? Figures of a monitor's record, drawn by matplotlib, an extra of the package.

Every function takes matplotlib `Axes` to draw into, or makes a `Figure`, and returns the figure; its `savefig(path)`
writes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from misa_kernels.monitor import Monitor
from misa_kernels.tools.grids import COLOURS, DOT, by_round, heatmap, height_of, kinds_of, matrices

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# For print in grey, beside the colours.
MARKERS = "os^Dv*PX"


def importance(monitor: Monitor, axes: Axes | None = None) -> Figure:
    """Draw the importance of each module at each draw; dots mark what was drawn, where they fit.

    Of a run in slices, draw each matrix from its first to its last column or row, in the importance of its slices now;
    lines mark those that are trained now.

    Args:
        monitor: `optimizer.monitor`.
        axes: Where to draw; None: a new figure.

    Raises:
        ImportError: Without matplotlib; this and the other functions.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    axes = _axes(10, height_of(monitor)) if axes is None else axes
    if monitor.parts:
        now = monitor.current.importance
        marked = matrices(
            monitor,
            axes,
            {i: score for i, score in enumerate(now.tolist()) if score > 0},
            {"cmap": colormaps["cividis"], "norm": LogNorm() if np.any(now > 0) else None},
            "importance: mean ‖g‖² over rounds (grey: no score yet)",
            is_sum=False,
        )
        axes.set_title("Importance of the slices" + (", and those trained now (lines)" if marked else ""))
        return _figure(axes)
    scores = np.ma.masked_invalid(by_round(monitor, lambda record: record.importance))
    scores = np.ma.masked_less_equal(scores, 0)
    cells = {"cmap": colormaps["cividis"].with_extremes(bad="#e4e4e4"), "norm": LogNorm() if scores.count() else None}
    order, cell = heatmap(monitor, axes, scores, cells, "importance: mean ‖g‖² over rounds (grey: no score yet)")
    axes.set_title("Importance of the modules at each draw" + (", and those drawn (dots)" if cell >= DOT else ""))
    if cell >= DOT:
        row = {number: row for row, number in enumerate(order)}
        dots = [(record.round, row[number]) for record in monitor.rounds for number in record.active]
        axes.plot(
            *zip(*dots, strict=True),
            "o",
            color="white",
            markersize=min(0.55 * cell, 4.0),
            markeredgewidth=0.5,
            markeredgecolor="black",
        )
    return _figure(axes)


def selections(monitor: Monitor, axes: Axes | None = None) -> Figure:
    """Draw which modules were trained in each round, in the colour of the share of rounds in which each was.

    Of a run in slices, draw each matrix from its first to its last column or row, in the colour of how many of these
    rounds trained them; lines mark those that are trained now.

    Args:
        monitor: `optimizer.monitor`.
        axes: Where to draw; None: a new figure.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    axes = _axes(10, height_of(monitor)) if axes is None else axes
    # Without the pale end, which would not show on white.
    blues = colormaps["Blues"]
    if monitor.parts:
        count = Counter(number for record in monitor.rounds for number in record.active)
        most = len(monitor.rounds)
        # A colour for each number.
        colours = ListedColormap(blues(np.linspace(0.35, 1, min(most, 256))))
        cells = {"cmap": colours, "vmin": 0.5, "vmax": most + 0.5}
        marked = matrices(monitor, axes, count, cells, f"rounds that train it, of {most} (grey: none)", is_sum=True)
        axes.set_title("What is trained of each matrix" + (", and what is now (lines)" if marked else ""))
        if (bar := axes.images[0].colorbar) is not None:
            bar.set_ticks(MaxNLocator(integer=True, min_n_ticks=1))
        return _figure(axes)
    active = by_round(monitor, lambda record: np.isin(np.arange(len(monitor.names)), record.active))
    colours = ListedColormap(blues(np.linspace(0.4, 1, 256)))
    share = np.ma.masked_array(np.nanmean(active, axis=1, keepdims=True) * np.ones_like(active), active != 1)
    heatmap(
        monitor, axes, 100 * share, {"cmap": colours, "vmin": 0.0}, "share of these rounds that train the module, %"
    )
    axes.set_title("Modules trained in each round")
    return _figure(axes)


def gradient_norms(monitor: Monitor, axes: Axes | None = None) -> Figure:
    """Draw the gradient norm of each kind of module over the depth, the median of the rounds recorded.

    Args:
        monitor: `optimizer.monitor`.
        axes: Where to draw; None: a new figure.
    """
    from matplotlib.ticker import MaxNLocator

    axes = _axes(8, 5) if axes is None else axes
    seen: dict[str, dict[int, list[float]]] = {}
    kinds = kinds_of(monitor)
    for record in monitor.rounds:
        for number, norm in zip(record.active, record.grad_norm, strict=False):
            if np.isfinite(norm):
                seen.setdefault(kinds[number], {}).setdefault(int(monitor.layer[number]), []).append(norm)
    for i, kind in enumerate(kind for kind in dict.fromkeys(kinds) if kind in seen):
        layers = sorted(seen[kind])
        norms = [np.median(seen[kind][layer]) for layer in layers]
        line = ("-", "--", ":", "-.")[i // 8 % 4]
        style: dict[str, Any] = {"color": COLOURS[i % 8], "marker": MARKERS[i % 8], "linestyle": line}
        axes.plot(layers, norms, label=kind, markersize=5, linewidth=1.4, **style)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("layer, 0 nearest the input")
    axes.set_ylabel("gradient norm ‖g‖ of a module, median of its rounds")
    axes.set_title("Gradient norm by kind and depth")
    axes.grid(alpha=0.3)
    if seen:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return _figure(axes)


def losses(monitor: Monitor, values: Sequence[float], axes: Axes | None = None) -> Figure:
    """Draw the loss over the steps, with the rounds marked above.

    Args:
        monitor: `optimizer.monitor`.
        values: The loss of each call of `step()` from the first on.
        axes: Where to draw; None: a new figure.
    """
    from matplotlib.ticker import FixedLocator, MaxNLocator

    axes = _axes(9, 4.5) if axes is None else axes
    loss, steps = np.asarray(values, dtype=np.float64), np.arange(1, len(values) + 1)
    axes.plot(steps, loss, color=COLOURS[4], linewidth=0.8, label="each step")
    width = min(max(len(loss) // 50, 1), 100)
    if width > 1:
        mean = np.convolve(loss, np.ones(width) / width, "valid")
        axes.plot(steps[width - 1 :], mean, color=COLOURS[0], linewidth=2, label=f"mean of the last {width}")
        axes.legend(frameon=False, loc="upper right")
    rounds = [record for record in monitor.rounds if record.first_step < len(loss)]
    # So many lines can be told apart; the ticks above name some of the rounds that begin there.
    every = -(-len(rounds) // 60) or 1
    for record in rounds[::every]:
        axes.axvline(record.first_step + 0.5, color="#bbbbbb", linewidth=0.7, zorder=0)
    named = rounds[:: -(-len(rounds) // 12) or 1]
    above = axes.secondary_xaxis("top")
    above.xaxis.set_major_locator(FixedLocator([record.first_step + 0.5 for record in named]))
    above.set_xticklabels([str(record.round) for record in named])
    above.set_xlabel("beginning of round" + ("" if every == 1 else f" (a line every {every} rounds)"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0, len(loss) + 1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    return _figure(axes)


def memory(
    parts: Mapping[str, Mapping[str, float]], axes: Axes | None = None, room_bytes: float | None = None
) -> Figure:
    """Draw the memory of one way of training or several, a bar each, stacked by part.

    Args:
        parts: For the name of each bar, the bytes of its parts by name: weights, gradients, ...
        axes: Where to draw; None: a new figure.
        room_bytes: What the card has room for, a line.
    """
    axes = _axes(9, 1.6 + 0.45 * len(parts)) if axes is None else axes
    most = max((sum(own.values()) for own in parts.values()), default=0)
    unit, size = next(
        (u, s) for u, s in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1)) if most >= s or s == 1
    )
    names = list(dict.fromkeys(name for own in parts.values() for name in own))
    left = np.zeros(len(parts))
    for i, name in enumerate(names):
        width = np.array([own.get(name, 0) / size for own in parts.values()])
        axes.barh(list(parts), width, left=left, color=COLOURS[i % 8], label=name, edgecolor="white", height=0.7)
        left += width
    for row, total in enumerate(left):
        # White behind it, since the line of the card may run through.
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.annotate(f"{total:.1f}", (total, row), (4, 0), textcoords="offset points", va="center", bbox=box)
    if room_bytes is not None:
        room = room_bytes / size
        axes.axvline(room, color="black", linestyle="--", label=f"room on the card, {room:.1f}")
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"memory in {unit}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(names) + 1, frameon=False, columnspacing=1.2)
    return _figure(axes)


def _axes(width: float, height: float) -> Axes:
    # Not pyplot's, which would keep the figure and may want a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").subplots()


def _figure(axes: Axes) -> Figure:
    # Of a subfigure the whole.
    figure: Figure = axes.figure.figure
    return figure
