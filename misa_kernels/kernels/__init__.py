"""Which code runs a step: the one place that chooses a backend.

A backend is a module with `adamw_step(rows, *, max_grad_norm, skip_nonfinite)` as in `misa_kernels.reference`.
"""

from __future__ import annotations

from types import ModuleType

from misa_kernels import reference

BACKENDS = ("auto", "reference")


def select(backend: str) -> ModuleType:
    """Return the module that runs the steps.

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
    return reference
