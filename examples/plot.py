"""What does the comparison look like? Loss over steps and over time, and what MISA drew."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from examples.measure import Cost
from examples.runs import Rounds, Run

# Okabe and Ito's palette, which the colour-blind can tell apart; markers for print in grey.
STYLES = {
    "AdamW": ("#000000", "o"),
    "LoRA": ("#E69F00", "s"),
    "BAdam": ("#56B4E9", "^"),
    "LISA": ("#009E73", "v"),
    "uniform": ("#CC79A7", "D"),
    "MISA": ("#D55E00", "*"),
    "MISA, window": ("#0072B2", "P"),
}


def draw(runs: list[Run], costs: dict[str, Cost], title: str, path: Path) -> None:
    """Draw the comparison and write it as a PNG.

    Args:
        runs: All fine-tuning runs; "MISA" must be among them.
        costs: What a step of each costs.
        title: Line above the picture.
        path: File to write.
    """
    figure, axes = plt.subplot_mosaic(
        [["steps", "rounds"], ["time", "rounds"]],
        figsize=(14, 9),
        width_ratios=[1, 1.15],
        layout="constrained",
    )
    figure.suptitle(title, fontsize=13)
    _losses(axes["steps"], runs, {run.method: 1.0 for run in runs}, "fine-tuning step")
    axes["steps"].set_title("At equal steps")
    axes["steps"].legend(loc="upper right", fontsize=9)
    seconds = {run.method: costs[run.method].step_ms / 1e3 for run in runs}
    _losses(axes["time"], runs, seconds, "training time in seconds (steps × measured time of a step)")
    axes["time"].set_title("At equal time")
    drawn = next(run.rounds for run in runs if run.method == "MISA")
    assert drawn is not None
    _heatmap(axes["rounds"], drawn)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _losses(axes: Axes, runs: list[Run], scale: dict[str, float], label: str) -> None:
    for run in runs:
        colour, marker = STYLES[run.method]
        steps = np.array(run.steps) * scale[run.method]
        text = f"{run.method}  {run.losses[-1]:.3f}"
        axes.plot(steps, run.losses, color=colour, marker=marker, markersize=5, linewidth=1.6, label=text)
    axes.set_xlabel(label)
    axes.set_ylabel("validation loss in nats a byte")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)


def _heatmap(axes: Axes, rounds: Rounds) -> None:
    """One row a module, the layer nearest the output at the top; one column a round."""
    number, modules = rounds.importance.shape
    order = sorted(range(modules), key=lambda module: rounds.layer[module])
    importance = np.ma.masked_invalid(rounds.importance[:, order].T)
    importance = np.ma.masked_less_equal(importance, 0)
    colours = plt.get_cmap("cividis").with_extremes(bad="#e8e8e8")
    image = axes.pcolormesh(
        np.arange(number + 1) + 0.5, np.arange(modules + 1) - 0.5, importance, cmap=colours, norm=LogNorm()
    )
    row, column = np.nonzero(rounds.active[:, order].T)
    axes.plot(
        column + 1, row, "o", markersize=3.2, color="white", markeredgecolor="black", markeredgewidth=0.6
    )

    layers = np.array(rounds.layer)[order]
    for edge in np.nonzero(np.diff(layers))[0]:
        axes.axhline(edge + 0.5, color="white", linewidth=1.6)
    axes.set_yticks(range(modules), [rounds.names[module] for module in order], fontsize=6.5)
    axes.set_xlabel("round")
    axes.set_title("What MISA drew (dots) and how important each module was (colour; grey: no score yet)")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, fraction=0.05)
    bar.set_label("importance: mean square of the gradient's norm")
