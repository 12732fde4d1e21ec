"""How fast is MISA's step on its own, beside other AdamWs, and how far from what the memory allows?

Every peer updates the same number of elements with the same gradients, interleaved in one process. Two times
are taken: the device's, from an L2 without their data and with the host far ahead; and the host's, from an idle
device until `step()` returns and until the device is done. Gradients are new in every step, and so is the learning
rate; the host's time is taken of a steady step too, which finds both as they were.
"""

from __future__ import annotations

import gc
import itertools
import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.memory import PeakMemory
from benchmarks.step.peers import LR, PEERS, Peer
from misa_kernels import MISA

# The first update of a state does not read it.
WARM_UP = 3
REPEATS = {"cuda": 20, "cpu": 3}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**22}
# A peer whose step takes longer is timed as often as there are turns in this time, where peers sit out turns.
SECONDS = 6.0
Task = Callable[[], object]
# What is timed, the weights that it updates, and what knows its state.
Ready = tuple[Callable[[], object], list[Tensor], Any]
TIMES = ("device_us", "host_us", "wall_us", "steady_host_us", "steady_wall_us")
# How long the device is kept from the step, for the host to get ahead: 2 ms at 2 GHz, and longer if that failed.
DELAY_CYCLES = (4_000_000, 16_000_000, 64_000_000)


@dataclass(frozen=True)
class Case:
    """How many active elements, in how many tensors of equal size, of how many columns."""

    elements: int
    tensors: int
    columns: int = 64

    def shape(self) -> tuple[int, int]:
        """Return the shape of one tensor."""
        return max(self.elements // (self.tensors * self.columns), 1), self.columns

    def shapes(self) -> list[tuple[int, int]]:
        """Return the shapes of all tensors."""
        return [self.shape()] * self.tensors

    def numel(self) -> int:
        """Return the elements there are, which the division leaves somewhat below `elements`."""
        return sum(rows * columns for rows, columns in self.shapes())


@dataclass(frozen=True)
class Matrices:
    """The active matrices of a model, by shape.

    Attributes:
        counts: How many there are of each shape.
    """

    counts: Mapping[tuple[int, int], int]

    def shapes(self) -> list[tuple[int, int]]:
        """Return the shapes of all tensors."""
        return [shape for shape, count in self.counts.items() for _ in range(count)]

    def numel(self) -> int:
        """Return their elements."""
        return sum(rows * columns for rows, columns in self.shapes())

    @property
    def tensors(self) -> int:
        """Their number."""
        return sum(self.counts.values())


M = 2**20
# In the order of their worth: what the time limit cuts off is at the end.
CASES = {
    "cuda": [
        *(Case(elements * M, 60) for elements in (64, 16, 4, 1, 240)),
        *(Case(elements * M, tensors) for elements, tensors in ((4, 300), (4, 7), (64, 300), (64, 7))),
        Case(1024 * M, 60),
        Case(240 * M, 7),
        Case(1024 * M, 300),
    ],
    "cpu": [Case(6000, 7)],
}
# For `FORMATS`: of whole blocks, and three cases of one shape, since torchao compiles for each again.
FORMAT_CASES = {
    "cuda": [
        Case(64 * M, 60, columns=256),
        *(Case(elements * M, tensors, columns=256) for elements, tensors in ((240, 60), (64, 16), (16, 4))),
    ],
    "cpu": [Case(3 * 5376, 3, columns=256)],
}


@dataclass
class Samples:
    """Microseconds of each repetition.

    Attributes:
        device_us: Device time of a step.
        host_us: Until `step()` returns, on an idle device.
        wall_us: Until the device is done, too.
        steady_host_us: The host's in a step with the gradients and the learning rate of the one before.
        steady_wall_us: The same until the device is done.
        host_bound: Repetitions in which the device had to wait for the host.
    """

    device_us: list[float] = field(default_factory=list)
    host_us: list[float] = field(default_factory=list)
    wall_us: list[float] = field(default_factory=list)
    steady_host_us: list[float] = field(default_factory=list)
    steady_wall_us: list[float] = field(default_factory=list)
    host_bound: int = 0


def wait(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timer:
    """Times steps on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.cuda = device.type == "cuda"
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if self.cuda else 2**16
        self._scratch = torch.empty(4 * cache_bytes // 4, device=device)
        if self.cuda:
            self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def _flush(self) -> None:
        # Written, so that nothing else is left in the L2; then read, so that the writing back is not the step's.
        self._scratch.fill_(1.0)
        self._scratch.sum()

    def device_us(self, step: Callable[[], object], before: Callable[[], object] = lambda: None) -> tuple[float, bool]:
        """Return the device's microseconds of one step, and whether it had to wait for the host.

        Args:
            step: What is timed; more than once where the host was late.
            before: What comes before it each time, untimed.
        """
        if not self.cuda:
            before()
            self._flush()
            return self.wall_us(step)[1], False
        for cycles in DELAY_CYCLES:
            before()
            wait(self._device)
            torch.cuda._sleep(cycles)
            self._flush()
            self._start.record()
            step()
            self._end.record()
            ahead = not self._start.query()
            wait(self._device)
            if ahead:
                break
        return self._start.elapsed_time(self._end) * 1e3, not ahead

    def wall_us(self, step: Callable[[], object]) -> tuple[float, float]:
        """Return the microseconds until a step returns, and until the device is idle again."""
        self._flush()
        wait(self._device)
        started = time.perf_counter()
        step()
        returned = time.perf_counter()
        wait(self._device)
        return (returned - started) * 1e6, (time.perf_counter() - started) * 1e6

    def copy_bandwidth(self, repeats: int) -> dict[str, float]:
        """Return bytes read and written a second by a copy on the device."""
        size = COPY_BYTES[self._device.type]
        source = torch.randint(256, (size,), dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        times = [self.device_us(lambda: target.copy_(source))[0] for _ in range(repeats + WARM_UP)][WARM_UP:]
        return quantiles([2 * source.nbytes / us / 1e3 for us in times])


def take_turns(tasks: dict[str, Task], repeats: int, before: Mapping[str, Task] | None = None) -> dict[str, np.ndarray]:
    """Return the seconds of every repetition of each task, one after another, in reverse order every other time.

    Those of slow tasks end with NaN: they sit out the turns for which they have no time.

    Args:
        tasks: What is timed, by name.
        repeats: How often.
        before: What comes before each, untimed.
    """
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(repeats):
        for name in list(tasks)[:: -1 if number % 2 else 1]:
            if number > 2 and np.nansum(times[name]) > SECONDS:
                times[name].append(float("nan"))
                continue
            if before is not None:
                before[name]()
            started = time.perf_counter()
            tasks[name]()
            times[name].append(time.perf_counter() - started)
    return {name: np.array(seconds) for name, seconds in times.items()}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return the median, and percentiles by name: p10, p20, p80 and p90."""
    found = np.percentile(values, [50, 10, 20, 80, 90]).tolist()
    return dict(zip(("median", "p10", "p20", "p80", "p90"), found, strict=True))


def measure(
    cases: Sequence[Case | Matrices],
    device: torch.device,
    deadline: float,
    repeats: int,
    peers: Mapping[str, Peer] = PEERS,
) -> Iterator[dict]:
    """Measure all peers in each case, and yield a record of each case.

    Gradients lie elsewhere and the learning rate is another in every step, as in training: a step that finds both as
    they were has nothing to upload, and only what is called steady is its.

    Args:
        cases: What to update.
        device: Where.
        deadline: Reading of `time.monotonic` after which no case starts that is not expected to end by then.
        repeats: Repetitions of each kind of time.
        peers: Who updates it.

    Yields:
        "elements", "tensors", "copy_gb_per_s", "peers" (see `measure_peers`), or "left_out" with the reason.
    """
    longest = 0.0
    for case in cases:
        head = {"elements": case.numel(), "tensors": case.tensors}
        started = time.monotonic()
        if started + longest > deadline:
            yield head | {"left_out": "time limit"}
            continue
        timer = Timer(device)
        try:
            bandwidth = timer.copy_bandwidth(repeats)
            yield head | {"copy_gb_per_s": bandwidth, "peers": measure_peers(case, timer, device, repeats, peers)}
        except torch.OutOfMemoryError as error:
            yield head | {"left_out": f"memory: {error}".splitlines()[0]}
        gc.collect()
        if timer.cuda:
            torch.cuda.empty_cache()
        longest = max(longest, time.monotonic() - started)


def measure_peers(
    case: Case | Matrices, timer: Timer, device: torch.device, repeats: int, peers: Mapping[str, Peer]
) -> dict[str, dict[str, Any]]:
    """Return of each peer its times, bytes moved, and the most memory that a step takes beyond the state."""
    ready, results = prepare(case, timer, device, peers)
    samples = {name: Samples() for name in ready}
    # The gradients of a step, and those of the next.
    sets = {dtype: gradients_of(case, dtype, device) for dtype in {peers[name].dtype for name in ready}}
    # Of each optimizer, which some share: or the first step of one might find what the last of another left.
    turns: dict[int, Iterator[int]] = defaultdict(partial(itertools.count, 1))
    for number in range(repeats):
        for name in list(ready)[:: -1 if number % 2 else 1]:
            (step, weights, optimizer), taken = ready[name], samples[name]
            before = partial(renew, weights, optimizer, sets[peers[name].dtype], turns[id(optimizer)])
            try:
                device_us, late = timer.device_us(step, before)
                before()
                host_us, wall_us = timer.wall_us(step)
                steady_host_us, steady_wall_us = timer.wall_us(step)
            except torch.OutOfMemoryError as error:
                # What a step needs for itself, the peers built after its warm-up may have taken.
                results[name] = failure(error)
                del ready[name]
                continue
            taken.device_us.append(device_us)
            taken.host_us.append(host_us)
            taken.wall_us.append(wall_us)
            taken.steady_host_us.append(steady_host_us)
            taken.steady_wall_us.append(steady_wall_us)
            taken.host_bound += late
    for name, (step, weights, optimizer) in ready.items():
        with PeakMemory(device) as memory:
            step()
        taken, moved = samples[name], peers[name].moved_bytes * case.numel()
        results[name] = {
            **{key: quantiles(getattr(taken, key)) for key in TIMES},
            "host_bound": taken.host_bound,
            "moved_bytes": moved,
            "gb_per_s": moved / float(np.median(taken.device_us)) / 1e3,
            "extra_bytes": memory.peak_bytes,
            **({"backend": optimizer.backend} if isinstance(optimizer, MISA) else {}),
        }
        if not all(bool(weight.isfinite().all()) for weight in weights):
            results[name] = {"error": "ArithmeticError: the weights are not finite, and such times mean nothing"}
    return {name: results[name] for name in peers}


def gradients_of(case: Case | Matrices, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Return two sets of gradients, at addresses of their own."""
    generator = torch.Generator(device).manual_seed(1)
    return random(case, dtype, generator), random(case, dtype, generator)


def renew(weights: list[Tensor], optimizer: Any, sets: Sequence[list[Tensor]], turns: Iterator[int]) -> None:
    """Give the weights the gradients of the other set, and the optimizer another learning rate."""
    number = next(turns)
    gradients = sets[number % 2]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    for group in getattr(optimizer, "param_groups", ()):
        lr = LR / (1.0 + 1e-3 * number)
        if isinstance(group["lr"], Tensor):
            # Torchao's, which refuses any other.
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def prepare(
    case: Case | Matrices, timer: Timer, device: torch.device, peers: Mapping[str, Peer]
) -> tuple[dict[str, Ready], dict[str, dict[str, Any]]]:
    """Build and warm up all peers; return what is to be timed of each with its weights, and errors of the others."""
    generator = torch.Generator(device).manual_seed(0)
    dtypes = {peer.dtype: None for peer in peers.values()}
    gradients = {dtype: random(case, dtype, generator) for dtype in dtypes}
    optimizers: dict[tuple[torch.dtype, Any], tuple[list[Tensor], Any]] = {}
    ready: dict[str, Ready] = {}
    errors: dict[str, dict[str, Any]] = {}
    for name, peer in peers.items():
        key = peer.dtype, peer.make
        try:
            if key not in optimizers:
                weights = random(case, peer.dtype, generator)
                for weight, gradient in zip(weights, gradients[peer.dtype], strict=True):
                    weight.requires_grad_().grad = gradient
                optimizers[key] = weights, peer.make(weights)
            weights, optimizer = optimizers[key]
            step = whole_step(peer, weights, optimizer)
            for _ in range(WARM_UP):
                step()
            wait(device)
            ready[name] = step, weights, optimizer
        # Whatever one peer fails at, the numbers of the others are kept; the record shows the failure.
        except Exception as error:
            errors[name] = failure(error)
        weights = optimizer = step = None
        if name in errors:
            # Here, where no traceback holds on to the tensors any more.
            if key not in {(peers[other].dtype, peers[other].make) for other in ready}:
                optimizers.pop(key, None)
            gc.collect()
            if timer.cuda:
                torch.cuda.empty_cache()
    return ready, errors


def failure(error: Exception) -> dict[str, Any]:
    """Return what the record says of a peer that failed."""
    return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def random(case: Case | Matrices, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Return tensors of normal numbers."""
    return [torch.randn(shape, generator=generator, device=generator.device, dtype=dtype) for shape in case.shapes()]


def whole_step(peer: Peer, weights: list[Tensor], optimizer: Any) -> Callable[[], object]:
    """Return what is timed."""
    before = peer.before
    if before is None:
        return optimizer.step
    return lambda: (before(weights), optimizer.step())


def launches(
    case: Case | Matrices, device: torch.device, peers: Mapping[str, Peer] = PEERS
) -> dict[str, dict[str, Any]]:
    """Return how many kernels, copies and fills a step of each peer puts on the device, and the kernels by name.

    After all timing: the profiler's hooks stay, and would slow down every launch that comes later.
    """
    timer = Timer(device)
    ready, _ = prepare(case, timer, device, peers)
    return {name: launches_of(step, device) for name, (step, *_) in ready.items()}


def launches_of(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Return what a step puts on the device, see `count_launches`."""
    with torch.profiler.profile() as profiler:
        step()
        wait(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return count_launches(json.loads(path.read_text())["traceEvents"])


def count_launches(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count what ran on the device in a trace of torch's profiler, and add up the microseconds of its kernels."""
    counts = Counter(event.get("cat") for event in events if event.get("ph") == "X")
    kernels = [event for event in events if event.get("cat") == "kernel"]
    return {
        **{kind: counts[kind] for kind in ("kernel", "gpu_memcpy", "gpu_memset")},
        "kernel_us": sum(event["dur"] for event in kernels),
        "names": dict(Counter(event["name"][:80] for event in kernels)),
    }
