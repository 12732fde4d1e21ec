"""What does the comparison look like? Loss over steps and over time, and what MISA drew."""

from __future__ import annotations

from pathlib import Path

import matplotlib

# Draws into files, on machines without a display too.
matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from examples.measure import Cost
from examples.runs import Rounds, Run

# Okabe and Ito's palette, which the colour-blind can tell apart, and markers for print in grey.
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
        costs: What a step of each method costs.
        title: Line above the picture.
        path: File to write.
    """
    figure, axes = plt.subplot_mosaic(
        [["steps", "rounds"], ["time", "rounds"]], figsize=(14, 9.5), width_ratios=[1, 1.1], layout="constrained"
    )
    figure.suptitle(title, fontsize=13)
    _losses(axes["steps"], runs, {run.method: 1.0 for run in runs})
    axes["steps"].set_title("At equal steps")
    axes["steps"].set_xlabel("fine-tuning step")
    _losses(axes["time"], runs, {run.method: costs[run.method].step_ms / 1e3 for run in runs})
    axes["time"].set_title("At equal time")
    axes["time"].set_xlabel("training time in seconds (steps × measured time of a step)")
    figure.legend(
        *axes["steps"].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(runs),
        title="validation loss at the end, in nats a byte",
    )
    drawn = next(run.rounds for run in runs if run.method == "MISA")
    assert drawn is not None
    _heatmap(axes["rounds"], drawn)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _losses(axes: Axes, runs: list[Run], seconds: dict[str, float]) -> None:
    for run in runs:
        colour, marker = STYLES[run.method]
        axes.plot(
            np.array(run.steps) * seconds[run.method],
            run.losses,
            color=colour,
            marker=marker,
            markersize=8 if marker == "*" else 5,
            linewidth=1.6,
            label=f"{run.method}: {run.losses[-1]:.3f}",
        )
    # The fall from the common start would squeeze what differs into a few pixels.
    lowest = min(min(run.losses) for run in runs)
    highest = max(run.losses[1] for run in runs)
    axes.set_ylim(lowest - 0.04 * (highest - lowest), highest + 0.04 * (highest - lowest))
    axes.set_xlim(left=0)
    axes.set_ylabel("validation loss in nats a byte")
    axes.grid(alpha=0.3)


def _heatmap(axes: Axes, rounds: Rounds) -> None:
    """One row a module, those of the layer nearest the output at the top; one column a round."""
    number, modules = rounds.importance.shape
    order = sorted(range(modules), key=lambda module: rounds.layer[module])
    importance = np.ma.masked_invalid(rounds.importance[:, order].T)
    colours = plt.get_cmap("cividis").with_extremes(bad="#e4e4e4")
    edges = np.arange(number + 1) + 0.5, np.arange(modules + 1) - 0.5
    image = axes.pcolormesh(*edges, np.ma.masked_less_equal(importance, 0), cmap=colours, norm=LogNorm())
    row, column = np.nonzero(rounds.active[:, order].T)
    axes.plot(column + 1, row, "o", markersize=4, color="white", markeredgecolor="black", markeredgewidth=0.7)

    layers = np.array([rounds.layer[module] for module in order])
    for layer in np.unique(layers):
        rows = np.flatnonzero(layers == layer)
        axes.axhline(rows[0] - 0.5, color="white", linewidth=2)
        axes.annotate(
            f"layer {layer}",
            xy=(0, rows.mean()),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-46, 0),
            textcoords="offset points",
            rotation=90,
            ha="center",
            va="center",
        )
    axes.set_yticks(range(modules), [rounds.names[module].rsplit(".", 1)[-1] for module in order], fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel(f"round, {rounds.inner_steps} steps each")
    axes.set_title("MISA: modules trained in each round (dots)\nand their importance at the draw (grey: no score yet)")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.015, fraction=0.04, aspect=50)
    bar.set_label("importance: squared norm of the gradient, mean over a round, then over rounds")
