"""How much memory did tensors hold at once? Counted allocation by allocation, on the CPU as on the GPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch


class PeakMemory:
    """Context that measures the tensor memory allocated within it.

    On CUDA the figures come from PyTorch's caching allocator. On the CPU PyTorch's profiler reports every
    allocation and release, those inside an operator included, and their running sum is taken. The size of
    the process would say little: it contains the libraries and whatever the C library has kept back. oneDNN is off
    meanwhile: on processors that multiply bfloat16 it packs whole matrices, and figures would depend on the machine.

    Memory that was there before the context does not count. Its release inside counts against `held_bytes`, on the
    CPU only if an earlier context saw an allocation at its address: what is made in one context and freed in the
    next makes that one's figures too low, so take a step's forward and backward pass in one. The profiler keeps a
    record for every operator: measure a few steps, not thousands, and do not time them.

    Attributes:
        peak_bytes: Most bytes held at once, beyond those held at the start; set when the context ends.
        held_bytes: Bytes still held when the context ends.

    Example:
        >>> with PeakMemory() as memory:
        ...     x = torch.zeros(1000)
        >>> memory.peak_bytes
        4000
    """

    peak_bytes: int
    held_bytes: int

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Choose what to measure.

        Args:
            device: "cpu" or a CUDA device.

        Raises:
            ValueError: If the device is of another kind.
        """
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"device={device} must be a cpu or cuda device: others report no allocations")

    def __enter__(self) -> PeakMemory:
        """Begin to count, after garbage of before is gone: it would count as given back here."""
        # What the first pass frees may hold the last of something else.
        gc.collect()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before_bytes = torch.cuda.memory_allocated(self.device)
        else:
            self._onednn = _switch_onednn(False)
            self._profiler = torch.autograd.profiler.profile(profile_memory=True)
            with _silent():
                self._profiler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop counting and set `peak_bytes` and `held_bytes`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self._before_bytes
            self.held_bytes = torch.cuda.memory_allocated(self.device) - self._before_bytes
        else:
            with _silent():
                self._profiler.__exit__(kind, error, trace)
            _switch_onednn(self._onednn)
            self.peak_bytes, self.held_bytes = self._sum_cpu_events()

    def _sum_cpu_events(self) -> tuple[int, int]:
        # The profiler's public tables add up what an operator allocates; only the raw events keep the order.
        results = self._profiler.kineto_results
        assert results is not None
        events = (event for event in results.events() if event.name() == "[memory]")
        cpu = (event for event in events if event.device_type().name == "CPU")
        peak = held = 0
        for event in sorted(cpu, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak, held


def _switch_onednn(on: bool) -> bool:
    # Returns whether it was on. The flags' own context manager warns of a TF32 that it sets too.
    was: bool = torch.backends.mkldnn.set_flags(on, _fp32_precision=None)[0]
    return was


@contextmanager
def _silent() -> Iterator[None]:
    # The profiler's C++ part announces start and stop on the process's stderr, whatever its log level says.
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)
