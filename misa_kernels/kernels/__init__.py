"""Which code runs the steps: the one place that chooses a backend.

A backend is a class built at every switch from the rows, the arena and the settings of the run. Its
`run(StepInput)` takes a step: weights, moments and masters in place, without waiting for the device; its
`collect()` brings the arena's ages, scores and skips up to date, before they are read.
"""

from __future__ import annotations

from typing import Protocol

from misa_kernels.kernels.plain import PlainStep
from misa_kernels.kernels.rows import Row, Settings, StepInput

__all__ = ["BACKENDS", "Row", "Settings", "Step", "StepInput", "select"]

BACKENDS = ("auto", "reference")


class Step(Protocol):
    """The steps of one round."""

    def run(self, step: StepInput) -> None:
        """Take one step."""

    def collect(self) -> None:
        """Bring the arena's counters up to date."""


def select(backend: str) -> type[PlainStep]:
    """Return the class that runs the steps.

    Args:
        backend: "auto" (the fastest one there is) or "reference" (plain PyTorch, on any device).

    Raises:
        ValueError: For a name not in `BACKENDS`.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"backend={backend!r} must be one of {', '.join(map(repr, BACKENDS))}: this version has no fused "
            f"kernels; use 'auto'"
        )
    return PlainStep
