"""Rows in poisoned memory on any kind of table, and the same rows in float64 NumPy."""

from __future__ import annotations

import importlib
import math
import mmap
import os
import sys
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from emulated import EmulatedTable
from interpreter import quicken

from misa_kernels import kernels
from misa_kernels.kernels import native
from misa_kernels.kernels.table import DTYPES, RowTable
from misa_kernels.memory.codec import FORMATS, GROUP
from misa_kernels.memory.storage import PRECISIONS, Storage

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
OTHER = {"lr": 3e-3, "beta1": 0.8, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.0}
PLAIN, STOCHASTIC = Storage(), Storage(param_precision="stochastic")
# Each kernel is tested with those that it has.
STORAGES = [Storage(state_dtype, precision) for state_dtype in FORMATS for precision in PRECISIONS]
SOME_STORAGES = [PLAIN, STOCHASTIC, Storage("bf16", "split"), Storage("int8", "stochastic"), Storage("int8", "master")]
# Elements of poison around every weight and every row of state, which keep rows where an arena puts them.
GUARD = GROUP
POISON = 0x7FA1
# Bounds of float32 arithmetic against float64 after n steps, in units of n: theta and v see five roundings a
# step, 3e-7 of their size; m may cancel, so its error is relative to the largest gradient.
RTOL = 4e-7


class Kernel(NamedTuple):
    """A class of tables, and where its tensors are."""

    table: type[RowTable]
    device: torch.device


def missing(reason: str) -> None:
    """Skip a test whose tools are not here; in CI they must be."""
    (pytest.fail if "CI" in os.environ else pytest.skip)(reason)


def native_kernel(name: str) -> Kernel:
    reason = native.unusable(name)
    if reason:
        missing(f"the {name} library {reason}")
    if name == "cpu":
        return Kernel(native.CpuTable, torch.device("cpu"))
    return Kernel(native.CudaTable, torch.device("cuda", 0))


def kernel_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """The kernel of a library, of the CUDA library's source on the CPU, or of Triton there or on a GPU."""
    if name == "emulated":
        return Kernel(EmulatedTable, torch.device("cpu"))
    if name in ("cpu", "cuda"):
        return native_kernel(name)
    return triton_kernel("cpu" if name == "interpreter" else "cuda", monkeypatch)


def triton_kernel(device: str, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """On the CPU, Triton's interpreter."""
    triton = pytest.importorskip("triton")
    if device == "cuda":
        launch = importlib.import_module("misa_kernels.kernels.launch")
        return Kernel(launch.TritonTable, torch.device("cuda", 0))
    quicken()
    # The interpreter puts its own into these, and leaves them there: what is compiled after it would break.
    language = triton.language
    for owner in (language, language.core, language.math, language.tensor, language.core.tensor_descriptor_base):
        for name, value in list(vars(owner).items()):
            if callable(value) and name not in ("__class__", "__dict__", "__weakref__"):
                monkeypatch.setattr(owner, name, value)
    # Triton's own library is not for the interpreter where something imported it before.
    interpreter = importlib.import_module("triton.runtime.interpreter")
    for name in ("sum", "max", "min", "zeros"):
        function = getattr(triton.language, name)
        if isinstance(function, triton.JITFunction):
            monkeypatch.setattr(triton.language, name, interpreter.InterpretedFunction(function.fn))
    return Kernel(interpreted().TritonTable, torch.device("cpu"))


@cache
def interpreted() -> ModuleType:
    """A copy of the launcher for the interpreter, which nobody else sees: it is chosen at import."""
    package = importlib.import_module("misa_kernels.kernels")
    names = ("triton_codec", "triton_table", "triton_rounding", "triton", "triton_close", "launch")
    with patch.dict(os.environ, TRITON_INTERPRET="1"), patch.dict(sys.modules), patch.dict(vars(package)):
        for name in names:
            sys.modules.pop(f"{package.__name__}.{name}", None)
            vars(package).pop(name, None)
        return importlib.import_module(f"{package.__name__}.launch")


def rounds_fma_twice(kernel: Kernel) -> bool:
    """Whether this is an interpreter before that of Triton 3.9."""
    if kernel.device.type == "cuda" or issubclass(kernel.table, native.NativeTable):
        return False
    return tuple(map(int, importlib.import_module("triton").__version__.split(".")[:2])) < (3, 9)


@dataclass
class Row:
    """One tensor of a test; `shift` and `grad_shift` move it off its alignment, by elements.

    What makes a weight pitched is for the table alone: whoever gives it brings the weight.
    """

    numel: int
    dtype: torch.dtype = torch.float32
    grad_dtype: torch.dtype | None = None
    group: int = 0
    start: int = 0
    shift: int = 0
    grad_shift: int = 0
    width: int = 0
    pitch: int = 0


def poisoned(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """NaNs, or large numbers, of one bit pattern: reading one shows in the result, and writing one in the bits."""
    words = torch.full((-(-numel * dtype.itemsize // 2),), POISON, dtype=torch.int16, device=device)
    return words.view(dtype)[:numel]


class Step:
    """Rows with poisoned surroundings, and the same rows in float64 NumPy."""

    def __init__(self, kernel, rows, *, groups=(HYPER,), storage=PLAIN, seed=0):
        unknown = {row.dtype for row in rows}.union(row.grad_dtype or row.dtype for row in rows) - {
            *kernel.table.dtypes
        }
        if unknown:
            pytest.skip(f"{kernel.table.__name__} has no {', '.join(map(str, unknown))}")
        if storage not in kernels._storages(getattr(kernel.table, "name", "triton")):
            pytest.skip(f"{kernel.table.__name__} has no {storage}")
        self.storage = storage
        self.rows, self.device = rows, kernel.device
        device = kernel.device
        self.rng = np.random.default_rng(seed)
        self.groups = [dict(group) for group in groups]
        self.buffers = [poisoned(row.numel + row.shift + 2 * GUARD, row.dtype, device) for row in rows]
        self.weights = [
            buffer[GUARD + row.shift :][: row.numel] for buffer, row in zip(self.buffers, rows, strict=True)
        ]
        for weight in self.weights:
            weight.copy_(torch.from_numpy(self.rng.standard_normal(len(weight))))
        self.offset, end = [], dict.fromkeys(DTYPES, GUARD)
        for row in rows:
            self.offset.append(end[row.dtype])
            end[row.dtype] += -(-row.numel // GROUP) * GROUP + GUARD
        self.kinds = {
            # Stochastic rounding is for bfloat16.
            dtype: (replace(storage, param_precision="master") if dtype == torch.float16 else storage).buffers(dtype)
            for dtype in dict.fromkeys(row.dtype for row in rows)
        }
        self.state = {
            dtype: {name: poisoned(kind.numel(end[dtype]), kind.dtype, device) for name, kind in kinds.items()}
            for dtype, kinds in self.kinds.items()
        }
        self.grad_dtypes = [row.grad_dtype or row.dtype for row in rows]
        self.table = kernel.table(
            np.array([row.numel for row in rows], dtype=np.int64),
            np.array(self.offset, dtype=np.int64),
            np.array([row.group for row in rows], dtype=np.int64),
            np.array([row.start for row in rows], dtype=np.int64),
            [row.dtype for row in rows],
            self.grad_dtypes,
            self.state,
            storage,
            device,
            np.array([row.width for row in rows], dtype=np.int64),
            np.array([row.pitch for row in rows], dtype=np.int64),
        )
        self.theta = [weight.double().cpu().numpy() for weight in self.weights]
        self.m = [np.zeros(row.numel) for row in rows]
        self.v = [np.zeros(row.numel) for row in rows]
        self.largest = [0.0] * len(rows)
        self.age = np.zeros(len(rows), dtype=np.int64)
        self.sq_sum = np.zeros(len(rows))
        self.steps = 0

    def draw(self, missing=()):
        """Gradients of different scales, in memory of their own and of the alignment asked for."""
        grads = []
        for i, (row, dtype) in enumerate(zip(self.rows, self.grad_dtypes, strict=True)):
            values = torch.from_numpy(self.rng.standard_normal(row.numel) * 10.0 ** self.rng.uniform(-3, 1))
            buffer = torch.empty(row.numel + row.grad_shift, dtype=dtype, device=self.device)
            grad = buffer[row.grad_shift :]
            grads.append(None if i in missing else grad.copy_(values))
        return grads

    def run(self, grads, *, keys=None, **options):
        """One step of the kernel alone."""
        self.table.step(
            [weight.data_ptr() for weight in self.weights],
            [0 if grad is None else grad.data_ptr() for grad in grads],
            np.array([list(group.values()) for group in self.groups]),
            keys,
            **options,
        )

    def expect(self, grads, *, max_grad_norm=None, scale=1.0):
        """The same step in float64: Loshchilov and Hutter 2019, algorithm 2."""
        grads = [None if grad is None else grad.double().cpu().numpy() / scale for grad in grads]
        norm = math.sqrt(sum(np.square(grad).sum() for grad in grads if grad is not None))
        coefficient = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))
        for i, g in enumerate(grads):
            if g is None or not len(g):
                continue
            lr, beta1, beta2, eps, weight_decay = self.groups[self.rows[i].group].values()
            self.sq_sum[i] += np.square(g).sum()
            self.age[i] += 1
            g, t = g * coefficient, self.age[i]
            self.largest[i] = max(self.largest[i], np.abs(g).max())
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * g
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * g**2
            update = self.m[i] / (1 - beta1**t) / (np.sqrt(self.v[i] / (1 - beta2**t)) + eps)
            self.theta[i] = self.theta[i] - lr * (update + weight_decay * self.theta[i])
        self.steps += 1

    def both(self, grads, *, max_grad_norm=None):
        self.run(grads, max_grad_norm=max_grad_norm)
        self.expect(grads, max_grad_norm=max_grad_norm)

    def views(self, i):
        """What is stored of one row."""
        row, kinds = self.rows[i], self.kinds[self.rows[i].dtype]
        return {
            name: buffer[kinds[name].numel(self.offset[i]) :][: kinds[name].numel(row.numel)]
            for name, buffer in self.state[row.dtype].items()
        }

    def part(self, name, i):
        """State of one row, on the host."""
        view = self.views(i).get(name)
        return None if view is None else view.cpu()

    def check(self):
        collected = self.table.collect().cpu().numpy()
        np.testing.assert_array_equal(collected[:, 0], self.age)
        # Fixed-order float32 sums of 8 squares a lane, then float64.
        np.testing.assert_allclose(collected[:, 1], self.sq_sum, rtol=1e-6)
        tolerance = RTOL * max(self.steps, 1)
        for i in range(len(self.rows)):
            master, weight = self.part("master", i), self.weights[i].cpu()
            if self.age[i] == 0:
                np.testing.assert_array_equal(weight.double(), self.theta[i])
                continue
            theta = weight if master is None else master
            lr = self.groups[self.rows[i].group]["lr"]
            np.testing.assert_allclose(theta, self.theta[i], rtol=tolerance, atol=10 * lr * tolerance)
            np.testing.assert_allclose(self.part("exp_avg", i), self.m[i], rtol=0, atol=tolerance * self.largest[i])
            np.testing.assert_allclose(self.part("exp_avg_sq", i), self.v[i], rtol=tolerance)
            if master is not None:
                assert torch.equal(weight, master.to(weight.dtype))
        self.check_surroundings()

    def check_surroundings(self):
        """Not a bit of poison is touched around weights and state, nor in the state of a row of age 0."""
        for row, buffer in zip(self.rows, self.buffers, strict=True):
            begin = GUARD + row.shift
            untouched(torch.cat([buffer[:begin], buffer[begin + row.numel :]]))
        for dtype, buffers in self.state.items():
            for name, buffer in buffers.items():
                numel, keep = self.kinds[dtype][name].numel, torch.ones(len(buffer), dtype=torch.bool)
                for i, row in enumerate(self.rows):
                    if row.dtype == dtype and self.age[i]:
                        begin = numel(self.offset[i])
                        keep[begin : begin + numel(row.numel)] = False
                untouched(buffer, keep)

    def written(self):
        """Weights and state with their surroundings, as bytes."""
        tensors = [*self.buffers, *(buffer for buffers in self.state.values() for buffer in buffers.values())]
        return [tensor.view(torch.uint8).cpu().clone() for tensor in tensors]

    def bits(self):
        """Everything a step may write but `control`, as bytes."""
        return [*self.written(), *(x.view(torch.uint8).cpu().clone() for x in (self.table._ages, self.table.sq_sums))]


def untouched(x: torch.Tensor, where: torch.Tensor | slice = slice(None)) -> None:
    """Nothing was written over this poison, of which `where` chooses entries."""
    now, then = (
        words.view(torch.uint8).view(len(x), -1)[where] for words in (x.cpu(), poisoned(len(x), x.dtype, "cpu"))
    )
    assert torch.equal(now, then), f"{int((now != then).sum())} of {now.numel()} bytes were written"


def same_bits(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def mixed_rows(count, dtypes=DTYPES):
    """Rows of all these dtypes, some unaligned, in two groups."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(0, 300, count)
    return [
        Row(
            int(size),
            dtypes[i % len(dtypes)],
            group=i // 3 % 2,
            shift=int(rng.integers(2)),
            grad_shift=int(rng.integers(2)),
        )
        for i, size in enumerate(sizes)
    ]


def reserve(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the CPU, address space of which only the pages that are touched take memory."""
    if device.type == "cuda":
        return torch.empty(numel, dtype=dtype, device=device)
    # MAP_NORESERVE, which Python names from 3.13 on.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype)
