"""What does the comparison look like? Loss over steps and over time, and what MISA drew."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import matplotlib

# Draws into files, on machines without a display too.
matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

from examples.demo.measure import Cost
from examples.demo.runs import Rounds, Run
from misa_kernels.tools import plots

# Okabe and Ito's palette, which the colour-blind can tell apart, and markers for print in grey.
STYLES = {
    "AdamW": ("#000000", "o"),
    "LoRA": ("#E69F00", "s"),
    "LISA": ("#009E73", "v"),
    "uniform": ("#CC79A7", "D"),
    "MISA": ("#D55E00", "*"),
    "MISA, window": ("#0072B2", "P"),
    "MISA, slices": ("#56B4E9", "^"),
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
    # In the order of the lines' ends, in the corner that falling lines leave empty.
    handles, labels = axes["steps"].get_legend_handles_labels()
    order = sorted(range(len(runs)), key=lambda number: -runs[number].losses[-1])
    axes["steps"].legend([handles[n] for n in order], [labels[n] for n in order], title="loss at the end")
    drawn = next(run.rounds for run in runs if run.method == "MISA")
    assert drawn is not None
    plots.importance(_record(drawn), axes["rounds"])
    axes["rounds"].set_title("MISA: what each round trains (dots), and importance at its draw")
    axes["rounds"].set_xlabel(f"round, {drawn.inner_steps} steps each")
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
            markersize=8 if marker == "*" else 5,
            linewidth=1.6,
            label=f"{run.losses[-1]:.3f}  {run.method}",
        )
    # The fall from the common start would squeeze what differs into a few pixels.
    lowest = min(min(run.losses) for run in runs)
    highest = max(run.losses[1] for run in runs)
    axes.set_ylim(lowest - 0.04 * (highest - lowest), highest + 0.04 * (highest - lowest))
    axes.set_xlim(left=0)
    axes.set_ylabel("validation loss in nats a byte")
    axes.grid(alpha=0.3)


def _record(rounds: Rounds) -> SimpleNamespace:
    """Return what of a monitor came back from the process that trained."""
    layers = [f"layers.{layer}" for layer in range(max(rounds.layer) + 1)]
    active = [tuple(np.flatnonzero(drawn)) for drawn in rounds.active]
    records = [
        SimpleNamespace(round=number, importance=importance, active=drawn)
        for number, (importance, drawn) in enumerate(zip(rounds.importance, active, strict=True))
    ]
    return SimpleNamespace(names=rounds.names, layer=np.array(rounds.layer), layers=layers, parts=[], rounds=records)
