"""Which backend can run, and which one does "auto" take? Optimizers of the user's are no backend: see `run/ruled.py`.

A backend is the table of a kernel, or plain PyTorch; `prepare` makes the steps of a round of it, at every switch. Their
`run` takes a step, of weights, moments and masters in place, without waiting for the device; `collect` brings the
arena's ages, scores and skips up to date, before they are read; `measure` and `close` do what is left when a round
ends, without memory of their own.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from misa_kernels.kernels import native, table
from misa_kernels.kernels.fused import FusedStep
from misa_kernels.kernels.plain import PlainStep
from misa_kernels.kernels.rows import Row, Settings
from misa_kernels.kernels.table import RowTable
from misa_kernels.memory.arena import Arena
from misa_kernels.memory.codec import FORMATS
from misa_kernels.memory.storage import PRECISIONS, Storage

__all__ = ["BACKENDS", "Backend", "Row", "Settings", "Step", "check", "prepare", "select", "unusable", "why_plain"]

BACKENDS = ("auto", "triton", "cuda", "cpu", "reference")
# What "auto" takes, best first. The CUDA library comes after Triton because nobody has measured them side by side
# yet: `make gpu STAGE=bench` does.
PREFERRED = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}
Backend: TypeAlias = type[RowTable] | type[PlainStep]
Step: TypeAlias = FusedStep | PlainStep


def check(backend: str) -> None:
    """Raise unless a backend of this name can run on this machine.

    Args:
        backend: "auto" (the fastest one there is), "triton" (one launch a step on CUDA devices), "cuda" (the same from
            the compiled library), "cpu" (the compiled library for CPUs) or "reference" (plain PyTorch, on any device).

    Raises:
        ValueError: For a name not in `BACKENDS`, or one whose needs are not met.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(map(repr, BACKENDS))}")
    reason = unusable(backend)
    if reason:
        raise ValueError(f"backend={backend!r} {reason}; 'auto' takes what there is")


def select(backend: str, device: torch.device, dtypes: Collection[torch.dtype], storage: Storage) -> Backend:
    """Return what runs the steps, for `prepare`.

    Args:
        backend: A name that `check` has passed.
        device: Where the weights are.
        dtypes: Their dtypes, and those of their gradients.
        storage: How moments and weights are stored.

    Raises:
        RuntimeError: If the backend asked for cannot run there.
    """
    if backend == "reference":
        return PlainStep
    if backend == "auto":
        usable = [name for name in PREFERRED.get(device.type, ()) if _unfit(name, dtypes, storage) is None]
        return _table(usable[0]) if usable else PlainStep
    device_type = "cpu" if backend == "cpu" or _interpreted() else "cuda"
    if device.type != device_type or not all(dtype in _dtypes(backend) for dtype in dtypes):
        raise RuntimeError(
            f"backend={backend!r} got {', '.join(sorted(map(str, dtypes)))} weights or gradients on {device}, and "
            f"updates {', '.join(map(str, _dtypes(backend)))} on {device_type.upper()} devices: use backend='auto'"
        )
    if storage not in _storages(backend):
        raise RuntimeError(
            f"backend={backend!r} has no state_dtype={storage.state_dtype!r} with "
            f"param_precision={storage.param_precision!r}: use backend='auto'"
        )
    return _table(backend)


def prepare(backend: Backend, rows: Sequence[Row], arena: Arena, settings: Settings) -> Step:
    """Return the steps of a round; the arguments are those of `FusedStep`."""
    if issubclass(backend, PlainStep):
        return backend(rows, arena, settings)
    return FusedStep(backend, rows, arena, settings)


def why_plain(params: Sequence[Tensor], storage: Storage) -> str | None:
    """Return why "auto" takes plain PyTorch although there are kernels for the device, as a sentence; None otherwise.

    Args:
        params: What may be trained, all on one device.
        storage: How moments and weights are stored.
    """
    dtypes = {dtype for p in params for dtype in (p.dtype, getattr(p, "grad_dtype", None) or p.dtype)}
    reasons = {name: _unfit(name, dtypes, storage) for name in PREFERRED.get(params[0].device.type, ())}
    if not reasons or None in reasons.values():
        return None
    said = "; ".join(f"{name!r} {reason}" for name, reason in reasons.items())
    return f"MISA steps in plain PyTorch, which is slow: backend {said}; say backend='reference' if that is meant"


def unusable(backend: str) -> str | None:
    """Return why a backend cannot run on this machine, as the rest of a sentence, or None if it can."""
    if backend == "triton":
        return _no_triton()
    return native.unusable(backend) if backend in ("cpu", "cuda") else None


def _unfit(backend: str, dtypes: Collection[torch.dtype], storage: Storage) -> str | None:
    """Return why a backend cannot run such steps here, as the rest of a sentence, or None if it can."""
    has, lacking = _storages(backend), sorted(map(str, set(dtypes).difference(_dtypes(backend))))
    if lacking:
        return f"updates {', '.join(map(str, _dtypes(backend)))}, not {', '.join(lacking)}"
    if storage not in has:
        formats = [name for name in FORMATS if Storage(name, storage.param_precision) in has]
        if not formats:
            return f"has no param_precision={storage.param_precision!r}"
        return f"has state_dtype {', '.join(map(repr, formats))}, not {storage.state_dtype!r}"
    return unusable(backend)


def _dtypes(backend: str) -> tuple[torch.dtype, ...]:
    return table.DTYPES if backend == "triton" else native.NativeTable.dtypes


def _storages(backend: str) -> set[Storage]:
    formats = {"triton": tuple(FORMATS), "cpu": native.STATE_DTYPES, "cuda": ("fp32",)}[backend]
    precisions = ("master", "stochastic") if backend == "cuda" else PRECISIONS
    return {Storage(name, precision) for name in formats for precision in precisions}


def _table(backend: str) -> type[RowTable]:
    if backend != "triton":
        return native.CpuTable if backend == "cpu" else native.CudaTable
    # Imported here: a user without a GPU need not wait for Triton.
    from misa_kernels.kernels.launch import TritonTable

    return TritonTable


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
