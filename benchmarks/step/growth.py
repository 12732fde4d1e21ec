"""How does the cost of a step grow with elements and tensors, of a switch with modules, of an iteration with hooks?

python -m benchmarks.step growth --device cpu --out DIR    DIR/growth.json with slopes and goals, DIR/growth.png

Host and device together, from an idle device to an idle device. A slope is that of a straight line through the larger
half of the points, both axes logarithmic: 1 where twice as much costs twice the time, 0 where it costs no more.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import charts, commands
from benchmarks.step.peers import BF16, FP32, LR
from benchmarks.step.update import quantiles, wait
from benchmarks.tables import cells, goal, goal_lines
from misa_kernels import MISA

# Where a series ends on a device: bytes of a float32 step's weights, gradients and moments, and torch's beside ours.
BYTES_AN_ELEMENT = 2 * 16
MEMORY_BYTES = {"cpu": 14 * 2**30, "cuda": 72 * 2**30}
ELEMENTS = [1024 * 4**power for power in range(11)]
TENSORS = [1, 10, 100, 1000, 5000, 20_000]
MODULES = [100, 300, 1000, 3000, 10_000, 20_000]
RELEASED = [50, 100, 200, 400]
# Of a tensor in the series over tensors and modules: so small that the host's time is what counts.
SMALL = 64
# Of the modules that are active, of float32 and, with masters, of bfloat16 weights.
DELTAS = {FP32: 0.01, BF16: 0.03}
# How many times as long as with held gradients an iteration that releases them may take, and how it may grow.
RELEASED_GOAL, LINEAR_GOAL = 2.5, 1.1
# A measurement goes on for as long, and takes as many repetitions at least and at most.
SECONDS, FEWEST, MOST = 1.0, 7, 200
Series = Iterator[tuple[int, dict[str, Callable[[], object]]]]


def optimizers(weights: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Return the steps of MISA and of torch's fused AdamW, on weights and gradients of their own."""
    steps: dict[str, Callable[[], object]] = {}
    for name in ("MISA", "torch fused"):
        own = [weight.clone().requires_grad_() for weight in weights]
        for weight in own:
            weight.grad = torch.full_like(weight, 1e-3)
        if name == "MISA":
            steps[name] = MISA(own, lr=LR, delta=1.0, inner_steps=10**9).step
        else:
            steps[name] = torch.optim.AdamW(own, lr=LR, fused=True).step
    return steps


def over_elements(device: torch.device, largest: int | None) -> Series:
    """Yield, for more and more elements in eight tensors, the steps on them."""
    limit = MEMORY_BYTES[device.type] // BYTES_AN_ELEMENT
    for elements in ELEMENTS:
        if elements <= min(limit, largest or limit):
            yield elements, optimizers([torch.ones(8, elements // 64, device=device) for _ in range(8)])


def over_tensors(device: torch.device, largest: int | None) -> Series:
    """Yield, for more and more small tensors, the steps on them."""
    for tensors in TENSORS:
        if tensors <= (largest or tensors):
            yield tensors, optimizers([torch.ones(8, SMALL // 8, device=device) for _ in range(tensors)])


def over_modules(device: torch.device, largest: int | None, dtype: torch.dtype = FP32) -> Series:
    """Yield, for more and more small modules, a step that ends a round, and one that does not."""
    for modules in MODULES:
        if modules <= (largest or modules):
            found: dict[str, Callable[[], object]] = {}
            for name, inner_steps in (("step that switches", 1), ("step within a round", 10**9)):
                weights = [torch.ones(8, SMALL // 8, device=device, dtype=dtype) for _ in range(modules)]
                optimizer = MISA(
                    [weight.requires_grad_() for weight in weights], lr=LR, delta=DELTAS[dtype], inner_steps=inner_steps
                )
                found[name] = switching(weights, optimizer)
            yield modules, found


def over_released(device: torch.device, largest: int | None) -> Series:
    """Yield, for more and more small tensors, an iteration that holds its gradients, and one that releases them."""
    for tensors in RELEASED:
        if tensors <= (largest or tensors):
            names = ("held", "released")
            yield tensors, {name: iteration(tensors, device, release_gradients=name == "released") for name in names}


def iteration(tensors: int, device: torch.device, **options: Any) -> Callable[[], object]:
    """Return forward, backward and step of so many small layers."""
    weights = [torch.eye(8, SMALL // 8, device=device).requires_grad_() for _ in range(tensors)]
    optimizer = MISA(weights, lr=LR, delta=1.0, inner_steps=10**9, **options)
    x = torch.ones(4, 8, device=device)

    def run() -> None:
        y = x
        for weight in weights:
            y = torch.tanh(y @ weight)
        y.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def switching(weights: list[Tensor], optimizer: MISA) -> Callable[[], object]:
    """Return a step; gradients of what is active come back after it, outside the clock, see `seconds_of`."""
    gradient = torch.full_like(weights[0], 1e-3, requires_grad=False)

    def prepare() -> None:
        for number in optimizer.active:
            weights[number].grad = gradient

    prepare()

    def step() -> None:
        optimizer.step()

    step.prepare = prepare  # type: ignore[attr-defined]
    return step


SERIES: dict[str, tuple[str, Callable[[torch.device, int | None], Series]]] = {
    "elements": ("active parameters, in 8 tensors", over_elements),
    "tensors": (f"active tensors of {SMALL} elements", over_tensors),
    "modules": (f"modules, of which {DELTAS[FP32]:.0%} are active", over_modules),
    "bf16 modules": (
        f"bf16 modules, of which {DELTAS[BF16]:.0%} are active and have masters",
        partial(over_modules, dtype=BF16),
    ),
    "released": (f"layers of {SMALL} elements in an iteration", over_released),
}
TITLES = {"released": "an iteration, gradients held or released"} | {
    name: f"a switch against {name}" for name in ("modules", "bf16 modules")
}


def seconds_of(steps: dict[str, Callable[[], object]], device: torch.device) -> dict[str, np.ndarray]:
    """Return the seconds of each repetition of each step, taking turns, until their time is up."""
    times: dict[str, list[float]] = {name: [] for name in steps}

    def once(name: str) -> None:
        getattr(steps[name], "prepare", lambda: None)()
        wait(device)
        started = time.perf_counter()
        steps[name]()
        wait(device)
        times[name].append(time.perf_counter() - started)

    for name in steps:
        # The first allocates, the second reads what it wrote; a round's first is slower too.
        for _ in range(3):
            once(name)
        times[name].clear()
    begun = time.monotonic()
    for number in range(MOST):
        if number >= FEWEST and time.monotonic() - begun > SECONDS:
            break
        for name in list(steps)[:: -1 if number % 2 else 1]:
            once(name)
    return {name: np.array(seconds) for name, seconds in times.items()}


def slope(points: list[tuple[float, float]]) -> float | None:
    """Return the slope of the larger half of the points on logarithmic axes; None of fewer than two."""
    upper = points[len(points) // 2 :] if len(points) > 2 else points
    if len(upper) < 2:
        return None
    x, y = np.log(np.array(upper, dtype=np.float64).T)
    return float(np.polyfit(x, y, 1)[0])


def measure(device: torch.device, deadline: float, largest: int | None = None) -> Iterator[dict[str, Any]]:
    """Measure all series, and yield what there is after each point.

    Args:
        device: Where.
        deadline: Reading of `time.monotonic` after which no point is begun.
        largest: Of every series; None for what the device has memory for.

    Yields:
        By series, "axis", "lines": by name the points as "n" and "us" with median, p10 and p90, and the "slopes".
    """
    found: dict[str, Any] = {}
    for name, (axis, series) in SERIES.items():
        lines: dict[str, list[dict[str, Any]]] = {}
        found[name] = {"axis": axis, "lines": lines, "slopes": {}, "left_out": []}
        points = series(device, largest)
        while True:
            if time.monotonic() > deadline:
                found[name]["left_out"] = ["time limit"]
                break
            try:
                n, steps = next(points)
                taken = seconds_of(steps, device)
            except StopIteration:
                break
            except torch.OutOfMemoryError as error:
                found[name]["left_out"] = [f"{error}".splitlines()[0]]
                break
            # Before the next ones are built.
            steps.clear()
            gc.collect()
            for line, seconds in taken.items():
                lines.setdefault(line, []).append({"n": n, "us": quantiles(seconds * 1e6)})
            found[name]["slopes"] = {line: slope(pairs(of)) for line, of in lines.items()}
            yield found
    yield found


def pairs(points: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return the points of a line as (n, median)."""
    return [(point["n"], point["us"]["median"]) for point in points]


def goals(series: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the goals of released gradients and their figures, of the sizes that were measured."""
    lines = series.get("released", {}).get("lines", {})
    released, held = (pairs(lines.get(name, [])) for name in ("released", "held"))
    found = [
        goal("released / held gradients, an iteration", f"{n} tensors", RELEASED_GOAL, ours / theirs)
        for (n, ours), (_, theirs) in zip(released, held, strict=True)
    ]
    if len(released) > 1:
        ends = [released[0], released[-1]]
        where = f"{ends[0][0]} to {ends[1][0]} tensors"
        found.append(goal("slope of an iteration, released gradients", where, LINEAR_GOAL, slope(ends)))
    return found


def lines(content: dict[str, Any]) -> list[str]:
    """Return the ends of all lines, and their slopes, as tables in Markdown."""
    rows = []
    for series in content["series"].values():
        for name, points in series["lines"].items():
            slope = series["slopes"][name]
            ends = (f"{point['n']:,}: {point['us']['median']:,.0f}" for point in (points[0], points[-1]))
            rows.append((series["axis"], name, *ends, "" if slope is None else f"{slope:.2f}"))
    note = (
        "Slopes are those of the larger half of the points on logarithmic axes: 1 is twice the time for twice as many."
    )
    table = cells("against | what | µs of the fewest | µs of the most | slope", rows)
    return [*table, note, "", *goal_lines(content.get("goals", []))]


def draw(series: dict[str, Any], path: Path) -> Path | None:
    """Draw all series; None without matplotlib."""
    panels = {}
    for name, found in series.items():
        lines = {f"{line}: {found['slopes'][line] or 0:.2f}": pairs(points) for line, points in found["lines"].items()}
        if lines:
            panels[f"{TITLES.get(name, f'a step against {name}')}, with slopes"] = (found["axis"], lines)
    return charts.lines(path, panels, "microseconds, median", source=series) if panels else None


def run(device: torch.device, deadline: float, out: Path | None, largest: int | None = None) -> int:
    """Measure, write growth.json after every point and growth.png at the end, print the table."""
    states = ({"series": series, "goals": goals(series)} for series in measure(device, deadline, largest))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "MISA samples")
        content = commands.measured("growth", device, out, states, lines)
    if out is not None:
        draw(content["series"], out / "growth.png")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Measure what the command line names."""
    args = commands.parse(commands.parser("step growth", __doc__, limit=440.0), argv)
    return run(args.device, args.deadline, args.out)
