"""What does a launch through Triton cost the host, and a whole step? Measured without a GPU, on a stub of its driver.

python -m benchmarks.step launcher              a table of microseconds
python -m benchmarks.step launcher --out DIR    the same, and DIR/launcher.json

The kernels are compiled for sm_90 and all of Triton's Python runs, up to the C function that hands the arguments to
CUDA. That function, the driver's launch, contexts, events and copies to the device are not in these figures.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks import commands
from benchmarks.step.update import Task, quantiles, take_turns
from benchmarks.tables import cells
from misa_kernels import MISA, kernels
from misa_kernels.kernels import launch

CAPABILITY = 90
# What a multiprocessor of an H100 has.
LIMITS = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}
THREADS = 1024
REPEATS = 300
TENSORS = (60, 240)
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "bf16 master": {"dtype": torch.bfloat16},
    "bf16 stochastic": {"dtype": torch.bfloat16, "param_precision": "stochastic"},
    "bf16 master clipped": {"dtype": torch.bfloat16, "max_grad_norm": 1.0},
}


class Call(NamedTuple):
    """What a launch hands to CUDA: grid, stream, the loaded function, the kernel and its arguments."""

    grid: tuple[int, int, int]
    stream: int
    function: str
    kernel: Any
    arguments: tuple[Any, ...]


class Driver:
    """Stands for Triton's CUDA driver, and launches nothing.

    Attributes:
        device: Index of the current device.
        calls: What was launched, if `keep` is on.
    """

    def __init__(self, keep: bool = False) -> None:
        self.device, self.keep = 0, keep
        self.calls: list[Call] = []
        self.utils = SimpleNamespace(
            load_binary=self._load, unload_module=lambda module: None, get_device_properties=lambda device: LIMITS
        )

    def _load(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        # A function belongs to the device that it was loaded on.
        return object(), f"{name} on {device}", 0, 0, THREADS

    def get_current_device(self) -> int:
        """Return its index."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        """Return a number of its own for each device."""
        return 100 + device

    def get_current_target(self) -> GPUTarget:
        """Return the GPU that the kernels are compiled for."""
        return GPUTarget("cuda", CAPABILITY, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return what launches one compiled kernel; it runs the hooks of profilers, as Triton's own does."""

        def launched(
            x: int,
            y: int,
            z: int,
            stream: int,
            function: str,
            packed: Any,
            made: Any,
            enter: Any,
            leave: Any,
            *args: Any,
        ) -> None:
            if enter is not None:
                enter(made)
            if self.keep:
                self.calls.append(Call((x, y, z), stream, function, metadata, args))
            if leave is not None:
                leave(made)

        return launched


@contextmanager
def stubbed(keep: bool = False) -> Iterator[Driver]:
    """Let `backend="triton"` take CPU tensors, compile for a GPU that is not there, and launch nothing."""
    stub, before = Driver(keep), driver._active
    functions = launch.kernels.step_kernel, launch.collect_kernel, launch.close_kernel
    caches = [function.device_caches for function in functions]
    patches = [
        # A device of type "cpu" is what the interpreter has.
        patch.object(launch, "INTERPRETED", True),
        patch.object(kernels, "_interpreted", lambda: True),
        patch.object(kernels, "_no_triton", lambda: None),
    ]
    try:
        driver.set_active(stub)
        for function in functions:
            function.device_caches = defaultdict(function.create_binder)
        with patches[0], patches[1], patches[2]:
            yield stub
    finally:
        for function, cache in zip(functions, caches, strict=True):
            for compiled, *_ in function.device_caches.values():
                for kernel in compiled.values():
                    # There is nothing to unload, and by then there may be no driver.
                    kernel.module = None
            function.device_caches = cache
        driver.set_active(before)


class Subject:
    """An optimizer with so many small tensors, two gradients for each, and the parts of its step."""

    def __init__(self, tensors: int, dtype: torch.dtype, **options: Any) -> None:
        self.params = [nn.Parameter(torch.ones(4, 4, dtype=dtype)) for _ in range(tensors)]
        self.grads = [[torch.ones_like(param) for param in self.params] for _ in range(2)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.optimizer = MISA(self.params, delta=1.0, inner_steps=10**9, backend="triton", **options)
        self.number = 0
        self.exchange()
        for _ in range(3):
            self.optimizer.step()
        step = self.optimizer._run.updater._step
        self.launch: launch.TritonTable = step._table
        self.arguments = step._weights, [grad.data_ptr() for grad in self.grads[1]], list(self.launch._hyper.copy())

    def exchange(self) -> None:
        """Give every tensor its other gradient, and the group another lr: nothing of the tables stays."""
        self.number += 1
        for param, grad in zip(self.params, self.grads[self.number % 2], strict=True):
            param.grad = grad
        self.optimizer.param_groups[0]["lr"] = 1e-3 / self.number

    def through_jit(self) -> None:
        """Launch once as Triton's `step_kernel[grid](...)` does."""
        self.launch._compiled.clear()
        self.launch_once()

    def launch_once(self) -> None:
        """Launch once."""
        self.launch._launch(self.launch._buckets[0], None, None, float("inf"), 0, update=True, controlled=False)

    def table_step(self) -> None:
        """Take the step of the tables alone."""
        self.launch.step(*self.arguments)


def measure(subject: Subject, repeats: int) -> dict[str, dict[str, float]]:
    """Return microseconds of each part of a step, taken in turn."""
    # What comes before a part, untimed, leaves the tables as they are in a run.
    parts: dict[str, tuple[Task, Task]] = {
        "launch through the JIT": (subject.through_jit, subject.through_jit),
        "launch": (subject.launch_once, subject.launch_once),
        "Launch.step": (subject.table_step, subject.table_step),
        "optimizer.step": (subject.optimizer.step, subject.optimizer.step),
        "optimizer.step, uploading": (subject.exchange, subject.optimizer.step),
    }
    tasks, before = ({name: part[place] for name, part in parts.items()} for place in (1, 0))
    times = take_turns(tasks, repeats, before)
    return {name: quantiles(seconds * 1e6) for name, seconds in times.items()}


def lines(content: dict[str, Any]) -> list[str]:
    """Return the record as a table in Markdown."""
    parts = list(next(iter(content["host_us"].values())))
    rows = [
        (name, *(f"{us['median']:.0f} ({us['p20']:.0f} to {us['p80']:.0f})" for us in of.values()))
        for name, of in content["host_us"].items()
    ]
    text = "Microseconds on a stub of Triton's driver, medians, in parentheses p20 to p80: without CUDA's own launch."
    return [text, "", *cells(f"a step of | {' | '.join(parts)}", rows)]


def states(repeats: int) -> Iterator[dict[str, Any]]:
    """Yield what the record holds after every optimizer."""
    figures: dict[str, Any] = {}
    with stubbed():
        for tensors in TENSORS:
            for name, options in KINDS.items():
                figures[f"{tensors} tensors, {name}"] = measure(Subject(tensors, **options), repeats)
                yield {"capability": CAPABILITY, "repeats": repeats, "host_us": figures}


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write the record if asked to."""
    parser = commands.parser("step launcher", __doc__, device=False)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    args = commands.parse(parser, argv)
    commands.measured("launcher", args.device, args.out, states(args.repeats), lines)
    return 0
