"""What does the comparison look like? Loss over steps and over time, and what slices and MISA train."""

from __future__ import annotations

from pathlib import Path

import matplotlib

# Draws into files, on machines without a display too.
matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from PIL import Image

from examples.demo.measure import Cost
from examples.demo.runs import Rounds, Run

# Okabe and Ito's palette, which the colour-blind can tell apart, and markers for print in grey.
STYLES = {
    "AdamW": ("#000000", "o"),
    "slices": ("#D55E00", "*"),
    "LoRA": ("#E69F00", "s"),
    "MISA": ("#56B4E9", "^"),
    "MISA, window": ("#0072B2", "P"),
    "uniform": ("#CC79A7", "D"),
    "LISA": ("#009E73", "v"),
}


def draw(runs: list[Run], costs: dict[str, Cost], title: str, path: Path) -> None:
    """Draw the comparison and write it as a PNG.

    Args:
        runs: All fine-tuning runs; "slices" and "MISA" must be among them.
        costs: What a step of each method costs.
        title: Line above the picture.
        path: File to write.
    """
    figure, axes = plt.subplot_mosaic(
        [["steps", "slices"], ["time", "modules"]], figsize=(14, 9.5), width_ratios=[1.15, 1], layout="constrained"
    )
    figure.suptitle(title, fontsize=13)
    _losses(axes["steps"], runs, {run.method: 1.0 for run in runs})
    axes["steps"].set_title("At equal steps")
    axes["steps"].set_xlabel("fine-tuning step")
    _losses(axes["time"], runs, {run.method: costs[run.method].step_ms / 1e3 for run in runs})
    axes["time"].set_title("At equal time")
    axes["time"].set_xlabel("training time in seconds (steps × measured time of a step)")
    # In the order of the lines' ends, in the corner that falling lines leave empty.
    handles, labels = axes["steps"].get_legend_handles_labels()
    order = sorted(range(len(runs)), key=lambda number: -runs[number].losses[-1])
    axes["steps"].legend([handles[n] for n in order], [labels[n] for n in order], title="loss at the end")
    rounds = {run.method: run.rounds for run in runs if run.rounds is not None}
    _slices(axes["slices"], rounds["slices"])
    _modules(axes["modules"], rounds["MISA"])
    figure.savefig(path, dpi=110)
    plt.close(figure)
    # A quarter of the bytes. Other ways to choose colours take those of the lines for shades of the map's.
    octree = Image.Quantize.FASTOCTREE
    Image.open(path).convert("RGB").quantize(128, method=octree).save(path, optimize=True)


def _losses(axes: Axes, runs: list[Run], seconds: dict[str, float]) -> None:
    for run in runs:
        colour, marker = STYLES[run.method]
        axes.plot(
            np.array(run.steps) * seconds[run.method],
            run.losses,
            color=colour,
            marker=marker,
            markersize=9 if marker == "*" else 5,
            linewidth=2.6 if run.method == "slices" else 1.4,
            zorder=3 if run.method == "slices" else 2,
            label=f"{run.losses[-1]:.3f}  {run.method}",
        )
    # The fall from the common start would squeeze what differs into a few pixels.
    lowest = min(min(run.losses) for run in runs)
    highest = max(run.losses[1] for run in runs)
    axes.set_ylim(lowest - 0.04 * (highest - lowest), highest + 0.04 * (highest - lowest))
    axes.set_xlim(left=0)
    axes.set_ylabel("validation loss in nats a byte")
    axes.grid(alpha=0.3)


def _slices(axes: Axes, rounds: Rounds) -> None:
    """Show which columns of which matrices are trained, and how large their gradients are."""
    trained = [(rounds.parts[at], rounds.importance[-1][at]) for at in np.flatnonzero(rounds.active[-1])]
    # Each kind of matrix together, the first layer lowest.
    trained.sort(key=lambda entry: entry[0].matrix.rpartition(".")[2])
    # In a run of one round nothing has been drawn by importance.
    known = [importance for _, importance in trained if importance > 0]
    shades = LogNorm(min(known), max(known)) if known else None
    for row, (part, importance) in enumerate(trained):
        axes.barh(row, 100, color="#eeeeee", height=0.8)
        begin, width = 100 * part.first / part.size, 100 * (part.last - part.first) / part.size
        color = plt.cm.cividis(shades(importance)) if shades and importance > 0 else "#888888"
        axes.barh(row, width, left=begin, color=color, height=0.8)
    names = [f"{part.matrix.rpartition('.')[2]} {part.matrix.split('.')[1]}" for part, _ in trained]
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlim(0, 100)
    axes.set_xlabel("columns of the matrix, %: coloured ones are trained, in every round")
    axes.set_title("slices: a part of every layer")
    if shades:
        axes.figure.colorbar(ScalarMappable(shades, "cividis"), ax=axes, label="mean ‖g‖² over rounds")


def _modules(axes: Axes, rounds: Rounds) -> None:
    """Show how often MISA drew each module."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in rounds.names))
    share = np.zeros((len(kinds), max(rounds.layer) + 1))
    for name, layer, often in zip(rounds.names, rounds.layer, rounds.active.mean(0), strict=True):
        share[kinds.index(name.rpartition(".")[2]), layer] = 100 * often
    image = axes.imshow(share, aspect="auto", cmap="cividis", vmin=0)
    for (row, column), often in np.ndenumerate(share):
        axes.text(column, row, f"{often:.0f}", ha="center", va="center", color="black" if often > 50 else "white")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("layer, 0 nearest the input")
    axes.set_title("MISA: whole matrices, drawn by importance")
    axes.figure.colorbar(image, ax=axes, label=f"% of {len(rounds.active)} rounds in which it was trained")
