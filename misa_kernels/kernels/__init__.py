"""Which code runs the steps: the one place that chooses a backend.

A backend is a class built at every switch from the rows, the arena and the settings of the run. Its
`run(StepInput)` takes a step: weights, moments and masters in place, without waiting for the device; its
`collect()` brings the arena's ages, scores and skips up to date, before they are read.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection, Sequence
from typing import Protocol

import torch

from misa_kernels.arena import Arena
from misa_kernels.kernels.plain import PlainStep
from misa_kernels.kernels.rows import Row, Settings, StepInput

__all__ = ["BACKENDS", "Backend", "Row", "Settings", "Step", "StepInput", "check", "select"]

BACKENDS = ("auto", "triton", "reference")
# What the Triton kernel reads and writes.
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Step(Protocol):
    """The steps of one round."""

    def run(self, step: StepInput) -> None:
        """Take one step."""

    def collect(self) -> None:
        """Bring the arena's counters up to date."""


class Backend(Protocol):
    """A class whose objects are steps."""

    reads_fresh_state: bool

    def __call__(self, rows: Sequence[Row], arena: Arena, settings: Settings) -> Step:
        """Prepare the steps of a round."""


def check(backend: str) -> None:
    """Raise unless a backend of this name can run on this machine.

    Args:
        backend: "auto" (the fastest one there is), "triton" (one launch a step on CUDA devices) or "reference"
            (plain PyTorch, on any device).

    Raises:
        ValueError: For a name not in `BACKENDS`, or one whose needs are not met.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(map(repr, BACKENDS))}")
    reason = _no_triton() if backend == "triton" else None
    if reason:
        raise ValueError(f"backend='triton' {reason}; 'auto' takes what there is")


def select(backend: str, device: torch.device, dtypes: Collection[torch.dtype]) -> Backend:
    """Return the class that runs the steps.

    Args:
        backend: A name that `check` has passed.
        device: Where the weights are.
        dtypes: Their dtypes.

    Raises:
        RuntimeError: If the backend asked for cannot run there.
    """
    known = all(dtype in TRITON_DTYPES for dtype in dtypes)
    if backend == "triton":
        if device.type != ("cpu" if _interpreted() else "cuda") or not known:
            raise RuntimeError(
                f"backend='triton' got {', '.join(sorted(map(str, dtypes)))} weights on {device}, and updates float32, "
                "bfloat16 and float16 on CUDA devices: use backend='auto'"
            )
    elif backend == "reference" or device.type != "cuda" or not known or _no_triton():
        return PlainStep
    # Imported here: a user without a GPU need not wait for Triton.
    from misa_kernels.kernels.fused import FusedStep

    return FusedStep


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _no_triton() -> str | None:
    """Return why the Triton kernel cannot run on this machine, None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton: pip install 'triton>=3.6'"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        return f"needs Triton 3.6, got {triton.__version__}: install torch 2.10 or later, which brings it"
    if not (torch.cuda.is_available() or _interpreted()):
        return "needs a CUDA device, and torch sees none here"
    return None
