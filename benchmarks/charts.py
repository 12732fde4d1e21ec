"""How measurements are drawn: stacked bars of times, lines over axes in powers of ten; nothing without matplotlib."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Of the default cycle, told apart by the colour-blind too; the same part has the same colour in every chart.
COLORS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb")


def pyplot() -> Any:
    """Return matplotlib's pyplot without a window, or None where it is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    return plt


def bars(path: Path, panels: Mapping[str, Mapping[str, Mapping[str, float]]], label: str, source: Any) -> Path | None:
    """Draw a panel for each title, in two columns if they are many, and a bar for each name, cut into parts.

    Args:
        path: The PNG file.
        panels: By title, name of the bar and name of the part: a value.
        label: Of the axis of values.
        source: The measurements; the file remembers their `digest`.
    """
    plt = pyplot()
    panels = {title: names for title, names in panels.items() if names}
    if plt is None or not panels:
        return None
    columns = 2 if len(panels) > 3 else 1
    sizes = [0.6 + 0.32 * len(names) for names in panels.values()]
    heights = [max(sizes[first : first + columns]) for first in range(0, len(sizes), columns)]
    figure, axes = plt.subplots(
        len(heights),
        columns,
        figsize=(9 if columns == 1 else 13, sum(heights) + 0.6 * len(heights)),
        height_ratios=heights,
        squeeze=False,
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    parts = list(dict.fromkeys(part for names in panels.values() for cut in names.values() for part in cut))
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for row, cut in enumerate(names.values()):
            left = 0.0
            for part, value in cut.items():
                color = COLORS[parts.index(part) % len(COLORS)]
                axis.barh(row, value, left=left, color=color, height=0.7)
                left += value
            axis.text(left, row, f" {left:,.0f}" if left >= 100 else f" {left:.3g}", va="center", fontsize=8)
        axis.set_yticks(range(len(names)), list(names), fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.08)
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel(label)
    if len(parts) > 1:
        handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[i % len(COLORS)]) for i in range(len(parts))]
        names = [part.removesuffix("_ms") for part in parts]
        axes[0, 0].legend(handles, names, ncols=len(parts), fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))
    return saved(plt, figure, path, digest(source))


def lines(
    path: Path,
    panels: Mapping[str, tuple[str, Mapping[str, Sequence[tuple[float, float]]]]],
    label: str,
    source: Any,
    powers: bool = True,
) -> Path | None:
    """Draw a panel for each title.

    Args:
        path: The PNG file.
        panels: By title, the label of the horizontal axis and by name the points of a line.
        label: Of the vertical axes.
        source: As for `bars`.
        powers: Whether both axes are in powers of ten; if not, panels come in pairs of the same names.
    """
    plt = pyplot()
    if plt is None or not panels:
        return None
    columns = len(panels) if powers else 2
    size = (5 * columns, 4.2) if powers else (12, 4.6 * (len(panels) // 2))
    figure, axes = plt.subplots(len(panels) // columns, columns, figsize=size, squeeze=False)
    for place, (axis, (title, (below, by_name))) in enumerate(zip(axes.flat, panels.items(), strict=True)):
        for number, (name, points) in enumerate(by_name.items()):
            x, y = zip(*points, strict=True) if points else ((), ())
            style = "o-" if powers else ("-", "--", ":")[number // len(COLORS) % 3]
            draw = axis.loglog if powers else axis.plot
            # A single point has no line, and of few each shall be seen.
            mark = "os^"[number // len(COLORS) % 3]
            style = mark if len(x) == 1 else f"{mark}{style}" if len(x) < 4 and not powers else style
            color, named = COLORS[number % len(COLORS)], name if x else None
            draw(x, y, style, markersize=4, color=color, label=named)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel(below)
        axis.grid(True, alpha=0.3)
        if powers or place % 2:
            axis.legend(fontsize=8, **({} if powers else {"loc": "upper left", "bbox_to_anchor": (1.01, 1.02)}))
    axes[0, 0].set_ylabel(label)
    return saved(plt, figure, path, digest(source))


def saved(plt: Any, figure: Any, path: Path, drawn: str) -> Path:
    """Write the file with the digest of what is drawn, without the version of matplotlib, and forget the figure."""
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    shrink(path, drawn)
    return path


def shrink(path: Path, drawn: str) -> None:
    """Write a picture anew in 64 colours, which makes it a third as large, with the digest of what is drawn."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    noted = PngInfo()
    noted.add_text("Description", drawn)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True, pnginfo=noted)


def digest(source: Any) -> str:
    """Return what tells measurements apart, before and after they went through JSON."""
    return hashlib.sha256(json.dumps(source).encode()).hexdigest()


def shows(path: Path, source: Any) -> bool:
    """Return whether a file was drawn from these measurements."""
    return path.exists() and digest(source).encode() in path.read_bytes()
