"""The picture of docs/design.md: the rooms of the package, and a step, a switch and a saved state running through them.

From the repository's root: `python docs/parts.py` writes docs/parts.png.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch
from PIL import Image

OUT = Path(__file__).resolve().parent / "parts.png"
# Left, bottom, width, height; title; what it holds.
BOXES = [
    (
        2,
        87,
        96,
        10,
        "optimizer.py",
        "construction · the step · the end of a round · release   (interface.py: what torch finds)",
    ),
    (2, 60, 18, 12, "run/checkpoint.py", "keys and checks;\nresume.py: saves, loads"),
    (24, 60, 19, 12, "run/run.py", "holds the parts;\nfollows the user"),
    (47, 60, 15, 12, "run/scores.py", "importance\nof each module"),
    (66, 60, 19, 12, "run/updater.py", "updates, switches;\nlive.py: rows, state"),
    (88, 60, 10, 12, "monitor.py", "a record\na round"),
    (2, 32, 26, 13, "outside/", "what others do: flags, copies,\nweights, state, compilers"),
    (32, 32, 22, 13, "draw/", "what can be sampled,\nand what comes next"),
    (58, 32, 21, 13, "kernels/", "one table,\none fused step"),
    (83, 32, 15, 13, "memory/", "where state lies,\nin which formats"),
    (2, 9, 26, 12, "ranks/ · run/meeting.py", "shards; do all ranks\nhold the same?"),
    (32, 9, 22, 12, "run/layout.py · clock.py", "permanent numbers;\nthe position"),
    (58, 9, 21, 12, "csrc/ · triton.py", "gradient read once:\n‖g‖² and AdamW"),
    (83, 9, 15, 12, "gradients/", "backward of\nslices alone"),
]
STEP, SWITCH, SAVED = "#1f5fa8", "#c05a10", "#2a7d3f"


# Stops of each arrow, the place of its label, and the label.
PATHS = [
    (STEP, [(27, 87), (27, 72)], (17.2, 81), "1 first: allocate"),
    (STEP, [(69, 87), (69, 72)], (62.3, 81), "2 update"),
    (STEP, [(67, 60), (67, 45)], (62.3, 50), "3 run"),
    (STEP, [(66, 32), (66, 21)], (58.8, 27), "4 launch"),
    (SWITCH, [(73, 87), (73, 72)], (73.5, 84), "a read"),
    (SWITCH, [(54, 87), (54, 72)], (54.6, 81), "b fold"),
    (SWITCH, [(36, 87), (36, 72)], (36.6, 81), "c compare, draw"),
    (SWITCH, [(26, 60), (26, 45)], (14.5, 50), "c flags.compare"),
    (SWITCH, [(40, 60), (40, 45)], (40.6, 50), "d draw"),
    (SWITCH, [(80, 87), (80, 72)], (80.6, 79), "e switch"),
    (SWITCH, [(74, 60), (74, 45)], (74.5, 50), "e close"),
    (SWITCH, [(84, 60), (84, 52), (90, 52), (90, 45)], (85, 54), "e lend"),
    (SWITCH, [(93, 87), (93, 72)], (93.5, 79), "f"),
    (SAVED, [(24, 66), (20, 66)], (20.3, 68), "s, r"),
    (SAVED, [(11, 60), (11, 56), (54, 56), (54, 60)], (49.5, 57.8), "r"),
    (SAVED, [(54, 56), (71, 56), (71, 60)], (60, 57.5), "s, r"),
]


def main() -> None:
    """Draw and save it."""
    figure, axes = plt.subplots(figsize=(11.5, 9), dpi=110)
    axes.set(xlim=(0, 100), ylim=(0, 100))
    axes.axis("off")
    for left, bottom, width, height, title, text in BOXES:
        box = FancyBboxPatch(
            (left, bottom), width, height, boxstyle="round,pad=0,rounding_size=1.2", fc="#f6f6f3", ec="#55554f", lw=1
        )
        axes.add_patch(box)
        axes.text(left + width / 2, bottom + height - 2.8, title, ha="center", va="center", weight="bold", size=10)
        axes.text(left + width / 2, bottom + (height - 4) / 2, text, ha="center", va="center", size=8.4, color="#333")
    for colour, stops, place, label in PATHS:
        axes.plot([x for x, _ in stops[:-1]], [y for _, y in stops[:-1]], color=colour, lw=1.7)
        arrow = {"arrowstyle": "-|>", "color": colour, "lw": 1.7, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", stops[-1], stops[-2], arrowprops=arrow)
        axes.text(*place, label, color=colour, size=8.4, ha="left", va="center")
    for x, colour, text in (
        (2, STEP, "a step, 1 to 4"),
        (24, SWITCH, "the end of a round, a to f"),
        (55, SAVED, "a saved state, s written and r read"),
    ):
        axes.plot([x, x + 4], [3, 3], color=colour, lw=2.5)
        axes.text(x + 5, 3, text, va="center", size=9.5, color=colour)
    figure.savefig(OUT, bbox_inches="tight", pad_inches=0.1)
    # A third of the bytes.
    Image.open(OUT).convert("RGB").quantize(64).save(OUT, optimize=True)


if __name__ == "__main__":
    main()
