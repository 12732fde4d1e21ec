"""What does the step that ends a round cost, over a plain one: time, operators, memory?

python -m benchmarks.step round_end --device cpu --out DIR    a table and the goals; DIR/round_end.json

Twice as many matrices as fit are drawn in turn, and no state is kept: all that is active leaves, and as many enter.
What is active has a gradient. The steps of a round take turns by nature. Time is the process's own on a CPU, by default
on one thread, since others spin while they wait; on a GPU it is from an idle device to an idle device.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import commands
from benchmarks.gate.counts import Operators
from benchmarks.memory import PeakMemory
from benchmarks.step.peers import BF16, FP32, LR
from benchmarks.step.update import M, quantiles, wait
from benchmarks.tables import cells, goal, goal_lines
from misa_kernels import MISA, CyclicSampler

# By the name of a case: weights, and the options that tell it from others.
CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    f"{precision}, {states} states{', flush' * flush}": (
        FP32 if precision == "fp32" else BF16,
        {"state_dtype": states, "momentum_flush": flush}
        | ({} if precision == "fp32" else {"param_precision": precision.removeprefix("bf16 ")}),
    )
    for states in ("fp32", "int8")
    for precision in ("bf16 master", "bf16 split", "bf16 stochastic", "fp32")
    for flush in (False, True)
}
# Matrices that are active, and the elements of one: as they are timed, and once more where only counts are taken.
ACTIVE, ELEMENTS, LARGER = 8, M, 4 * M
# The steps of a round; the first after a switch finds caches that hold other data.
KINDS = ("first step", "plain step", "round end")
REPEATS = {"cuda": 20, "cpu": 9}
# The limits of a round's end, whatever the size of the matrices but for the time.
TIMES_PLAIN, EXTRA_BYTES = 4.0, 4e6


class Rounds:
    """An optimizer all of whose active matrices leave at every end of a round.

    Args:
        name: Of the case.
        active: Matrices that are active at a time; there are twice as many.
        elements: Of a matrix.
        device: Where.

    Attributes:
        active: As given.
    """

    def __init__(self, name: str, active: int, elements: int, device: torch.device) -> None:
        dtype, options = CASES[name]
        generator = torch.Generator(device).manual_seed(0)
        rows = 2 ** ((elements.bit_length() - 1) // 2)
        self.active = active
        self._weights, self._gradients = (
            [
                torch.randn(rows, elements // rows, generator=generator, device=device, dtype=dtype)
                for _ in range(2 * active)
            ]
            for _ in range(2)
        )
        for weight in self._weights:
            weight.requires_grad_()
        common = {"lr": LR, "delta": 0.5, "inner_steps": len(KINDS), "sampler": CyclicSampler(), "keep_states": "none"}
        self.optimizer = MISA(self._weights, **common, **options)
        if len(self.optimizer.active) != active:
            raise RuntimeError(f"{len(self.optimizer.active)} of {2 * active} matrices are active, not a half")

    def ready(self) -> Callable[[], object]:
        """Return the next step, once what is active has its gradients, and nothing else."""
        active = set(self.optimizer.active)
        for number, (weight, gradient) in enumerate(zip(self._weights, self._gradients, strict=True)):
            weight.grad = gradient if number in active else None
        return self.optimizer.step

    def times(self, repeats: int, device: torch.device) -> dict[str, list[float]]:
        """Return the seconds of every step of so many rounds, by kind."""
        clock = time.perf_counter if device.type == "cuda" else time.process_time
        found: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(repeats):
            for seconds in found.values():
                step = self.ready()
                wait(device)
                started = clock()
                step()
                wait(device)
                seconds.append(clock() - started)
        return found

    def counts(self, device: torch.device) -> dict[str, Any]:
        """Return "operators" a module that a round's end has beyond a plain step, and the "extra_bytes" it holds."""
        self.ready()()
        counted = []
        for _ in KINDS[1:]:
            step = self.ready()
            with Operators() as operators:
                step()
            counted.append(operators.count)
        for _ in KINDS[1:]:
            self.ready()()
        step = self.ready()
        with PeakMemory(device) as memory:
            step()
        return {"operators": (counted[1] - counted[0]) / self.active, "extra_bytes": memory.peak_bytes}


def measure(
    device: torch.device,
    deadline: float,
    repeats: int,
    active: int = ACTIVE,
    sizes: tuple[int, int] = (ELEMENTS, LARGER),
) -> Iterator[dict[str, Any]]:
    """Measure all cases, and yield a record of each.

    Args:
        device: Where.
        deadline: Reading of `time.monotonic` after which no case starts that is not expected to end by then.
        repeats: Rounds that are timed.
        active: Matrices that are active at a time.
        sizes: Elements of a matrix, those that are timed and larger ones.

    Yields:
        "case", "active", "elements"; "ms" of each of `KINDS` and "ratio", a round's end over the plain step before it,
        both with median and percentiles; "operators", "extra_bytes" as `Rounds.counts` has them, and in "larger" the
        same of larger matrices. Or "left_out" with the reason.
    """
    longest = 0.0
    for name in CASES:
        head = {"case": name, "active": active, "elements": sizes[0]}
        started = time.monotonic()
        if started + longest > deadline:
            yield head | {"left_out": "time limit"}
            continue
        try:
            rounds = Rounds(name, active, sizes[0], device)
            # The first allocates, the second reads what it wrote.
            rounds.times(2, device)
            seconds = rounds.times(repeats, device)
            ratios = [end / plain for end, plain in zip(seconds["round end"], seconds["plain step"], strict=True)]
            found = {"ms": {kind: quantiles([1e3 * s for s in of]) for kind, of in seconds.items()}}
            found |= {"ratio": quantiles(ratios), "backend": rounds.optimizer.backend} | rounds.counts(device)
            del rounds
            larger = Rounds(name, active, sizes[1], device)
            larger.times(1, device)
            yield head | found | {"larger": {"elements": sizes[1]} | larger.counts(device)}
            del larger
        except torch.OutOfMemoryError as error:
            yield head | {"left_out": f"memory: {error}".splitlines()[0]}
        gc.collect()
        longest = max(longest, time.monotonic() - started)


def goals(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what was asked for and the figures, of the cases that were measured."""
    measured = [case for case in cases if "left_out" not in case]
    found = [
        goal("round end / plain step", f"{case['case']}, {size(case)}", TIMES_PLAIN, case["ratio"]["median"])
        for case in measured
        if case["case"].startswith("bf16")
    ]
    if not measured:
        return found
    # The worst of all, or the list would be endless.
    growth, most, name = max(
        # As few as one is none.
        (c["larger"]["operators"] / max(c["operators"], 1.0), c["larger"]["operators"], c["case"])
        for c in measured
    )
    found.append(goal("operators a module, of larger ones / of smaller", f"{name}: {most:.0f}", 1.0, growth))
    for part in (lambda case: case, lambda case: case["larger"]):
        worst = max(measured, key=lambda case: part(case)["extra_bytes"])
        where = f"{worst['case']}, {size(worst | part(worst))}"
        found.append(goal("transient MB", where, EXTRA_BYTES / 1e6, part(worst)["extra_bytes"] / 1e6))
    return found


def size(case: dict[str, Any]) -> str:
    """Return how many matrices leave, of how many elements."""
    return f"{case['active']} x {case['elements'] / M:.3g}M"


def lines(content: dict[str, Any]) -> list[str]:
    """Return a table in Markdown, a case a line, and the goals."""
    rows = []
    for case in content["cases"]:
        if "left_out" in case:
            rows.append((case["case"], f"left out: {case['left_out']}"))
            continue
        both = case, case["larger"]
        rows.append(
            (
                case["case"],
                *(f"{case['ms'][kind]['median']:.1f}" for kind in KINDS),
                f"{case['ratio']['median']:.1f}",
                *(f"{of['operators']:.0f}" for of in both),
                *(f"{of['extra_bytes'] / 1e6:.1f}" for of in both),
            )
        )
    text = (
        f"{size(content['cases'][0])} elements leave and as many enter; medians. Operators of torch are those beyond a "
        f"plain step's, a module that leaves; they and the most extra memory once more for {LARGER // M}M "
        "elements a matrix."
    )
    columns = ("", *(f"{kind} ms" for kind in KINDS), "end / plain", "operators", "larger", "extra MB", "larger")
    return [text, "", *cells(" | ".join(columns), rows), *goal_lines(content["goals"])]


def run(device: torch.device, deadline: float, out: Path | None) -> int:
    """Measure, write round_end.json after every case, print the table and the goals."""

    def states() -> Iterator[dict[str, Any]]:
        cases = []
        for case in measure(device, deadline, REPEATS[device.type]):
            cases.append(case)
            yield {"cases": cases, "goals": goals(cases)}

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "MISA samples")
        commands.measured("round_end", device, out, states(), lines)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Measure what the command line names."""
    args = commands.parse(commands.parser("step round_end", __doc__, threads=1, limit=440.0), argv)
    return run(args.device, args.deadline, args.out)
