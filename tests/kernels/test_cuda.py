"""csrc/adamw_cuda.cu where there is no GPU: its kernels compiled for the CPU, its errors without a driver."""

from __future__ import annotations

import math
import os
import subprocess
from types import SimpleNamespace

import emulated
import numpy as np
import pytest
import torch
from emulated import EmulatedTable

from benchmarks.gpu import nvcc
from misa_kernels.kernels import native, table
from misa_kernels.memory.storage import Storage

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = [(FP32, FP32), (FP32, BF16), (BF16, FP32), (BF16, BF16)]
STATE = ("exp_avg", "exp_avg_sq", "master")
CPU, GPU = torch.device("cpu"), torch.device("cuda")

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs g++ or clang++")


class Rows:
    """Rows of all dtypes, the first hundred in 11 groups, on one kind of table; of every seven one is unaligned."""

    def __init__(self, make, sizes, stochastic, device=CPU):
        generator = torch.Generator().manual_seed(0)
        self.numel, self.dtypes = np.array(sizes, dtype=np.int64), [DTYPES[i % 4] for i in range(len(sizes))]
        self.weights = [
            torch.randn(n + 1, generator=generator).to(device, DTYPES[i % 4][0])[int(i % 7 == 2) :][:n]
            for i, n in enumerate(sizes)
        ]
        width = -(-self.numel // 64) * 64
        offset = np.cumsum(width) - width
        self.state = {
            dtype: {name: torch.full((int(width.sum()),), math.nan, device=device) for name in STATE}
            for dtype in (FP32, BF16)
        }
        del self.state[FP32]["master"]
        if stochastic:
            del self.state[BF16]["master"]
        start = np.arange(len(sizes)) * (2**32 - 1000)
        weight_dtypes, grad_dtypes = zip(*self.dtypes, strict=True)
        group = np.where(np.arange(len(sizes)) < 100, np.arange(len(sizes)) % 11, 0)
        storage = Storage(param_precision="stochastic" if stochastic else "master")
        rows = self.numel, offset, group, start, weight_dtypes, grad_dtypes
        self.table = make(*rows, self.state, storage, device)

    def step(self, grads, lr=1e-2, **options):
        hyper = [(lr / (group + 1), 0.9 - group / 100, 0.99, 1e-8, 0.1) for group in range(11)]
        pointers = [0 if grad is None else grad.data_ptr() for grad in grads]
        weights = [weight.data_ptr() for weight in self.weights]
        self.table.step(weights, pointers, hyper[: len(self.table._hyper)], range(len(grads)), **options)

    def bits(self):
        """All that a step writes but ages and sums, which each library keeps by chunks of its own."""
        state = [buffer for buffers in self.state.values() for buffer in buffers.values()]
        tensors = [*self.weights, *state, self.table.control]
        return [tensor.clone().cpu().view(torch.uint8) for tensor in tensors]


def triton_table(*arguments):
    """Triton's table, on tensors without anything around them: for `benchmarks.gpu.nvidia`, too."""
    from misa_kernels.kernels.launch import TritonTable

    return TritonTable(*arguments)


def gradients(rows, seed, missing=()):
    """Multiples of 1/8 up to 2: their squares add up without rounding, in whatever order."""
    generator = torch.Generator().manual_seed(seed)
    grads = [
        (torch.randint(-16, 17, (n,), generator=generator) / 8).to(rows.table._device, dtype)
        for n, (_, dtype) in zip(rows.numel, rows.dtypes, strict=True)
    ]
    return [None if i in missing else grad for i, grad in enumerate(grads)]


STEPS = {
    "first": {},
    "clip": {"max_grad_norm": 0.5},
    "loose clip": {"max_grad_norm": 1e9, "skip_nonfinite": True},
    "scaler": {"grad_scale": torch.tensor(1024.0), "found_inf": torch.tensor(0.0)},
    "scaler and clip": {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(0.0), "max_grad_norm": 1.0},
    "overflow": {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(1.0)},
    "overflow and clip": {"found_inf": torch.tensor(1.0), "max_grad_norm": 1.0},
    "nonfinite": {"skip_nonfinite": True},
}


needs_library = pytest.mark.skipif(native.path("cuda") is None, reason="the library cuda is not built")
on_a_gpu = [pytest.mark.gpu, needs_library]
LARGE = [0, 1, 15, 1023, 4097, 8192, 20_001, 64, 9000, 8195, 3000, 16_384]
# A bucket of each dtype: more would be more variants for Triton to compile.
FEW = [0, 20_001, 4097, 16_384, 9000]
# More rows and groups than one launch holds, and more blocks than a GPU has room for.
MANY, HUGE = [n % 7 for n in range(400)], [2_000_001, 1_000_000, 3_000_000, 100, 0, 999_999, 64, 3, 500_000]


@pytest.mark.parametrize("stochastic", [False, True], ids=["master", "stochastic"])
@pytest.mark.parametrize(
    "make, device, sizes, steps",
    [
        pytest.param(EmulatedTable, CPU, LARGE, STEPS, id="large"),
        pytest.param(EmulatedTable, CPU, MANY, ("first", "clip"), id="many"),
        pytest.param(native.CudaTable, GPU, LARGE, STEPS, id="GPU large", marks=on_a_gpu),
        pytest.param(native.CudaTable, GPU, MANY, STEPS, id="GPU many", marks=on_a_gpu),
        pytest.param(native.CudaTable, GPU, HUGE, STEPS, id="GPU huge", marks=on_a_gpu),
        pytest.param(triton_table, GPU, FEW, ("first", "clip"), id="GPU few", marks=pytest.mark.gpu),
    ],
)
def test_kernels_give_the_bits_of_the_cpu_library(make, device, sizes, steps, stochastic):
    # A GPU gives the bits of the same source on the CPU.
    peer = native.CpuTable if make is EmulatedTable else EmulatedTable
    cpu, cuda = Rows(peer, sizes, stochastic), Rows(make, sizes, stochastic, device)
    for number, name in enumerate(steps):
        for rows in (cpu, cuda):
            grads = gradients(rows, number, missing=() if number % 2 == 0 else {3, 6, 9, number})
            if name == "nonfinite":
                grads[8][1] = math.inf
            place = rows.table._device
            options = {key: x.to(place) if torch.is_tensor(x) else x for key, x in STEPS[name].items()}
            rows.step(grads, **options)
        assert all(map(torch.equal, cuda.bits(), cpu.bits())), name
        assert torch.equal(cuda.table.collect().cpu(), cpu.table.collect()), name
        assert cuda.table._arrived == 0
    # Of age 0, and of ages apart by the gradients that were missing.
    assert len(set(cpu.table.collect()[:, 0].tolist())) > 2


@pytest.mark.gpu
@needs_library
def test_a_captured_step_replays():
    captured, eager = (Rows(native.CudaTable, LARGE, stochastic=False, device=GPU) for _ in range(2))
    grads = gradients(eager, 0)
    for rows in (captured, eager):
        rows.step(grads, max_grad_norm=1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step(grads, max_grad_norm=1.0)
        captured.table.collect()
    for _ in range(3):
        graph.replay()
        eager.step(grads, max_grad_norm=1.0)
    assert all(map(torch.equal, captured.bits(), eager.bits()))
    assert torch.equal(captured.table.collected, eager.table.collect())


def test_collect_of_more_rows_than_a_launch_holds():
    rows = Rows(EmulatedTable, [0] * 1003 + [20_000], stochastic=False)
    rows.table.set_ages(torch.arange(1004))
    rows.table.sq_sums.copy_(torch.arange(1006.0))
    expected = torch.stack([torch.arange(1004.0), torch.arange(1004.0)], 1).double()
    expected[1003, 1] = 1003 + 1004 + 1005
    assert torch.equal(rows.table.collect(), expected)


def test_threads_of_a_block_do_not_race(tmp_path):
    source = emulated.ROOT / "tests" / "emulation" / "steps.cpp"
    try:
        emulated.compile_emulation(tmp_path / "steps", "-O1", "-g", "-fsanitize=thread", str(source))
    except AssertionError as error:
        if "tsan" not in str(error):
            raise
        pytest.skip("the compiler has no ThreadSanitizer")
    done = subprocess.run([tmp_path / "steps"], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("0 3 12291.8\n", 0), done.stderr


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The library as nvcc makes it."""
    if nvcc.missing():
        pytest.skip(nvcc.missing())
    file = tmp_path_factory.mktemp("cuda") / "libmisa_cuda.so"
    nvcc.compile_library(file, [80, 90])
    return native.load("cuda", file)


@pytest.fixture
def rows():
    """Four rows that have taken a step, so that all that the library is told is valid."""
    rows = Rows(EmulatedTable, [100] * 4, stochastic=False)
    rows.step(gradients(rows, 0), max_grad_norm=1.0)
    return rows


def test_library_says_what_it_was_built_for(library):
    assert library.misa_cuda_built() == b"80 90"
    assert library.misa_cuda_runtime_version() >= 12000
    assert library.misa_cuda_chunk() == 8192


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device would follow pointers of the host")
def test_without_a_driver_every_call_is_an_error(library, rows):
    assert library.misa_cuda_driver_version() == 0
    before = rows.bits()
    rows.table._library = library
    # What this machine lacks decides which error it is.
    message = "the cuda library: .*(driver version is insufficient|no CUDA-capable device|driver).*status 1[0-9]{3}"
    with pytest.raises(RuntimeError, match=message):
        rows.step(gradients(rows, 0))
    with pytest.raises(RuntimeError, match=message):
        rows.table.collect()
    assert all(map(torch.equal, before, rows.bits()))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("bytes", 8, "different versions"),
        ("rows", None, "a pointer is NULL"),
        ("hyper", None, "a pointer is NULL"),
        ("partial", None, "a pointer is NULL"),
        ("arrived", None, "a pointer is NULL"),
        ("control", None, "a pointer is NULL"),
        ("row_count", -1, "a size is negative"),
        ("chunk_count", 5, "chunks do not add up"),
        ("group_count", 2, "a group that is not there"),
        ("flags", 16, "unknown flag"),
        ("format", 1, "a format of the state"),
        ("format", 2, "a pointer is NULL"),
        ("format", 3, "a format of the state"),
    ],
)
def test_wrong_arguments_are_refused_before_any_call_of_cuda(library, rows, name, value, message):
    setattr(rows.table._struct, name, value)
    check_refused(library, rows, message)


@pytest.mark.parametrize("format", [0, 1, 2])
def test_what_only_the_cpu_library_stores_is_refused(library, rows, format):
    """In bfloat16 or 8 bits, with all that they need, or split weights."""
    rows.table._struct.format = format
    for state in rows.table._struct.state:
        state.exp_avg_scale = state.exp_avg_sq_scale = state.exp_avg
        if format == 0:
            state.residual, state.master = state.master, None
    check_refused(library, rows, "a format of the state")


@pytest.mark.parametrize(
    "column, value, message",
    [
        (table.NUMEL, -1, "a size is negative"),
        (table.OFFSET, 10**6, "a row reaches beyond its buffer"),
        (table.WEIGHT, 0, "a pointer is NULL"),
        (table.GRAD, 1, "an address is not a multiple"),
        (table.WEIGHT_DTYPE, 2, "a dtype, or a format"),
        (table.FIRST_CHUNK, 7, "chunks do not add up"),
    ],
)
def test_wrong_rows_are_refused_before_any_call_of_cuda(library, rows, column, value, message):
    rows.table._rows[1, column] = value
    check_refused(library, rows, message)


def check_refused(library, rows, message):
    before = rows.bits()
    status = library.misa_cuda_step(rows.table._reference, 0, None)
    assert 0 < status < 1000 and message in library.misa_message(status).decode()
    assert all(map(torch.equal, before, rows.bits()))


def test_wrong_device_is_an_error_of_cuda(rows):
    library, before = emulated.library(), rows.bits()
    assert library.misa_cuda_step(rows.table._reference, 7, None) == 1101
    assert library.misa_message(1101) == b"invalid device ordinal"
    assert all(map(torch.equal, before, rows.bits()))


@pytest.mark.parametrize(
    "built, gpus, usable",
    [
        (b"80 90", [(9, 0)], True),
        (b"80 90", [(8, 9)], True),
        (b"75 86", [(8, 0)], False),
        (b"90", [(8, 0)], False),
        # PTX of the newest.
        (b"80 90", [(10, 3)], True),
        (b"80 90", [(7, 5)], False),
        (b"80 90", [(7, 5), (8, 0)], True),
    ],
)
def test_a_library_without_code_for_the_gpu_is_not_usable(monkeypatch, built, gpus, usable):
    functions = {"built": built, "runtime_version": 13000, "driver_version": 13000}
    fake = SimpleNamespace(**{f"misa_cuda_{name}": lambda value=value: value for name, value in functions.items()})
    monkeypatch.setattr(native, "library", lambda name: fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", gpus.__getitem__)
    reason = native.unusable("cuda")
    if usable:
        assert reason is None
    else:
        number = "".join(map(str, gpus[0]))
        assert f"sm_{number} here" in reason and f"-DMISA_CUDA_ARCHITECTURES={number}" in reason


@pytest.mark.skipif(nvcc.missing() is not None, reason=str(nvcc.missing()))
def test_the_benchmarks_build_the_library_for_the_gpus_here(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "no GPU" in nvcc.ensure_library() and not list(tmp_path.iterdir())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (9, 0))
    (file,) = nvcc.ensure_library() and tmp_path.iterdir()
    assert native.load("cuda", file).misa_cuda_built() == b"90"
    # Never over a file that a process may have loaded, which would end that process.
    before = file.stat().st_ino
    os.utime(file, (0, 0))
    nvcc.ensure_library()
    assert list(tmp_path.iterdir()) == [file] and file.stat().st_ino != before
