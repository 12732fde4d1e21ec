"""The compiled library for CPUs: the same bits however it runs, and a refusal of whatever could crash it."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import (
    HYPER,
    OTHER,
    PLAIN,
    SOME_STORAGES,
    STOCHASTIC,
    STORAGES,
    Row,
    Step,
    native_kernel,
    reserve,
    same_bits,
)

from misa_kernels import MISA
from misa_kernels.kernels import native, table
from misa_kernels.memory.storage import Storage

HEADER = (Path(__file__).parents[2] / "csrc/misa.h").read_text()
STATUS = {name: int(number) for name, number in re.findall(r"MISA_(BAD_\w+) = (\d+)", HEADER)}
CLIP, SKIP_NONFINITE = (int(re.search(rf"MISA_{name} = (\d+)", HEADER)[1]) for name in ("CLIP", "SKIP_NONFINITE"))
# Two chunks and one element, so that several threads have several chunks each.
SIZES = (0, 1, 511, 65_537)
# Elements from one special number to the next.
OFTEN = 97
VARIANTS = [(a, b) for a in native.NativeTable.dtypes for b in native.NativeTable.dtypes]
# NaNs of either sign, quiet and signalling, with payloads in either half; infinities; subnormals and zeros.
NANS = [0x7FC00000, 0xFFC12345, 0x7F800001, 0xFFA00000]
SPECIAL = [0x7F800000, 0xFF800000, 1, 0x807FFFFF, 0x00400000, 0, 0x80000000, 0x7F7FFFFF]


@pytest.fixture
def kernel():
    return native_kernel("cpu")


@pytest.fixture
def library(kernel):
    """The library, afterwards on the instructions and torch on the threads that they were on."""
    loaded, threads = native.library("cpu"), torch.get_num_threads()
    instructions = loaded.misa_cpu_instructions()
    yield loaded
    torch.set_num_threads(threads)
    assert loaded.misa_cpu_use_instructions(instructions) == 0


def available(library):
    """What the library was built for and this processor has, worst first."""
    return [name for name in reversed(library.misa_cpu_built().split()) if not library.misa_cpu_use_instructions(name)]


def sprinkle(tensor, words):
    """Put the float32 numbers of these bits, and what bfloat16 keeps of them, here and there."""
    words = np.resize(np.array(words, np.uint32), len(tensor[::OFTEN]))
    if tensor.dtype == torch.float32:
        tensor.view(torch.int32)[::OFTEN] = torch.from_numpy(words.view(np.int32))
    else:
        tensor.view(torch.int16)[::OFTEN] = torch.from_numpy((words >> 16).astype(np.uint16).view(np.int16))


def run(kernel, storage, special, **options):
    rows = [Row(size, *dtypes, group=i % 2, start=i**9) for size in SIZES for i, dtypes in enumerate(VARIANTS)]
    step = Step(kernel, rows, groups=(HYPER, OTHER), storage=storage)
    for weight in step.weights:
        sprinkle(weight, NANS + SPECIAL)
    for t in range(3):
        grads = step.draw({t, len(rows) - 1 - t})
        # The sums of the other rows stay finite.
        for grad in grads[::3]:
            if grad is not None:
                sprinkle(grad, np.roll(special, t))
        step.run(grads, keys=range(t, t + len(rows)), **options)
    return [*step.bits(), step.table.control.view(torch.uint8).clone(), step.table.collect().view(torch.uint8).clone()]


PLAINLY = {"special": NANS + SPECIAL}
CLIPPED = {"special": SPECIAL[2:7], "max_grad_norm": 1.0, "skip_nonfinite": True}
SCALED = {"special": SPECIAL[2:7], "max_grad_norm": 1e9, "grad_scale": torch.tensor(3.0)}


@pytest.mark.parametrize(
    "storage, options",
    [
        *((storage, PLAINLY) for storage in SOME_STORAGES),
        *((storage, CLIPPED) for storage in SOME_STORAGES),
        *((storage, SCALED) for storage in (PLAIN, STOCHASTIC)),
        *(
            pytest.param(storage, PLAINLY, marks=pytest.mark.slow)
            for storage in STORAGES
            if storage not in SOME_STORAGES
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, Storage) else "-".join(value),
)
def test_threads_and_instructions_change_no_bit(kernel, library, storage, options):
    sets = available(library)
    assert sets[0] == b"baseline"
    expected = None
    for name in sets:
        assert library.misa_cpu_use_instructions(name) == 0
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            bits = run(kernel, storage, **options)
            expected = expected or bits
            assert same_bits(bits, expected), f"{threads} threads, {name}"


FLAGS = {"avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"}, "avx2": {"avx2", "fma"}, "baseline": set()}


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_the_best_instructions_are_in_use_from_the_start(library, tmp_path):
    has = set(re.search(r"^(?:flags|Features)\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    best = next(name for name in library.misa_cpu_built().decode().split() if FLAGS[name] <= has)
    # Under another name it is loaded, and chooses, once more.
    fresh = ctypes.CDLL(shutil.copy(native.path("cpu"), tmp_path / "fresh.so"))
    fresh.misa_cpu_instructions.restype = ctypes.c_char_p
    assert fresh.misa_cpu_instructions().decode() == best


def test_unknown_instructions_are_refused(library):
    before = library.misa_cpu_instructions()
    assert library.misa_cpu_use_instructions(None) == STATUS["BAD_POINTER"]
    for name in (b"", b"avx", b"avx5120", b"AVX2", bytes(10_000)):
        assert library.misa_cpu_use_instructions(name) == STATUS["BAD_INSTRUCTIONS"]
    assert library.misa_cpu_instructions() == before


def repeated(numel, dtype):
    """Memory of which every 64 MiB are the same, but for the last."""
    libc, piece = ctypes.CDLL(None), 2**26
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    space = reserve(-(-numel * dtype.itemsize // piece) * piece // dtype.itemsize, dtype, torch.device("cpu"))
    file = os.memfd_create("piece")
    os.ftruncate(file, piece)
    map_fixed, writable = 0x10, mmap.PROT_READ | mmap.PROT_WRITE
    for begin in range(0, space.nbytes - piece, piece):
        address = space.data_ptr() + begin
        assert libc.mmap(address, piece, writable, mmap.MAP_SHARED | map_fixed, file, 0) == address
    os.close(file)
    return space[:numel]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that can be mapped again")
def test_elements_beyond_32_bits(kernel, library):
    tail = 100
    numel = 2**31 + library.misa_cpu_chunk() + tail
    weight, grad, exp_avg, exp_avg_sq = (repeated(numel, torch.float32) for _ in range(4))
    weight[-tail:], grad[-tail:] = 1.0, 2.0
    zero, dtypes = np.zeros(1, dtype=np.int64), [torch.float32]
    state = {torch.float32: {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}}
    rows = kernel.table(np.array([numel]), zero, zero, zero, dtypes, dtypes, state, PLAIN, kernel.device)
    rows.step([weight.data_ptr()], [grad.data_ptr()], [list(HYPER.values())])
    # At age 1 the step is lr, whatever the gradient.
    np.testing.assert_allclose(weight[-tail:], 1 - 1e-2 * 0.1 - 1e-2, rtol=1e-6)
    np.testing.assert_allclose(exp_avg[-tail:], 0.2, rtol=1e-6)
    assert rows.collect().tolist() == [[1.0, 4.0 * tail]]


def test_what_it_does_not_know_is_named(kernel):
    one = np.ones(1, dtype=np.int64)
    for dtype in (torch.float16, torch.float64):
        with pytest.raises(ValueError, match=f"{dtype} must be one of torch.float32, torch.bfloat16: use backend"):
            kernel.table(one, one, one, one, [dtype], [dtype], {dtype: {}}, PLAIN, kernel.device)


def test_every_status_has_a_message(library):
    messages = {library.misa_message(status) for status in (0, *STATUS.values())}
    unknown = library.misa_message(-1)
    assert sorted(STATUS.values()) == [*range(1, 1 + len(STATUS))]
    assert len(messages) == 1 + len(STATUS) and unknown not in messages
    for status in (-(2**31), 1 + len(STATUS), 999, 1000, 2**31 - 1):
        assert library.misa_message(status) == unknown


def test_a_norm_that_is_none_is_refused_by_both(kernel):
    """As in C, so at the public boundary: silent NaN weights are nobody's wish."""
    step = Step(kernel, [Row(64)])
    for norm in (math.nan, math.inf, 0.0, -1.0):
        with pytest.raises(RuntimeError, match="max_grad_norm is not a finite number above 0"):
            step.run(step.draw(), max_grad_norm=norm)
        with pytest.raises(ValueError, match="max_grad_norm=.* must be None or a number > 0"):
            MISA([torch.nn.Parameter(torch.ones(2, 2))], delta=1.0, max_grad_norm=norm)
    step.check()


LEAST, LARGEST = -(2**63), 2**63 - 1


def but(*right):
    return lambda old: st.integers(LEAST, LARGEST).filter(lambda value: value not in (right or (old,)))


def beyond(largest, least=0):
    """Below `least`, or above what `largest` makes of the right value."""
    return lambda old: st.integers(LEAST, least - 1) | st.integers(largest(old) + 1, LARGEST)


def off(alignment):
    return lambda old: st.integers(1, alignment - 1).map(lambda shift: old + shift)


def null(old):
    return st.none()


def some(old):
    return st.integers(1, LARGEST)


# By field: what it must not be, given what it is, and what that is called. In a row of one chunk and in one of three,
# each of which ends where its buffers do.
ELEMENTS = (100, 70_000)
ROW_REFUSED = [
    ("weight", null, "BAD_POINTER"),
    ("weight", off(2), "BAD_ALIGNMENT"),
    ("grad", off(2), "BAD_ALIGNMENT"),
    ("numel", beyond(lambda old: old), "BAD_SIZE"),
    ("offset", beyond(lambda old: old), "BAD_SIZE"),
    ("start", beyond(lambda old: LARGEST - ELEMENTS[0]), "BAD_SIZE"),
    ("first_chunk", but(), "BAD_SIZE"),
    ("group", beyond(lambda old: 1), "BAD_GROUP"),
    ("weight_dtype", but(0, 1), "BAD_DTYPE"),
    ("grad_dtype", but(0, 1), "BAD_DTYPE"),
]
REFUSED = [
    ("step.bytes", but(), "BAD_VERSION"),
    ("step.row_bytes", but(), "BAD_VERSION"),
    ("step.row_count", but(), "BAD_SIZE"),
    ("step.chunk_count", but(), "BAD_SIZE"),
    ("step.group_count", lambda old: st.integers(LEAST, -1), "BAD_SIZE"),
    ("step.group_count", lambda old: st.integers(0, old - 1), "BAD_GROUP"),
    ("step.flags", lambda old: st.integers(LEAST, LARGEST).filter(lambda flags: flags & ~15), "BAD_FLAG"),
    ("step.max_grad_norm", lambda old: st.floats(max_value=0.0) | st.sampled_from([math.nan, math.inf]), "BAD_NORM"),
    *[(f"step.{name}", null, "BAD_POINTER") for name in ("rows", "hyper", "age", "sq_sum", "partial", "control")],
    *[(f"step.{name}", off(8), "BAD_ALIGNMENT") for name in ("rows", "hyper", "sq_sum", "partial")],
    *[(f"step.{name}", off(4), "BAD_ALIGNMENT") for name in ("age", "control", "grad_scale", "found_inf")],
    ("state.elements", lambda old: st.integers(LEAST, old - 1), "BAD_SIZE"),
    *[(f"state.{name}", null, "BAD_POINTER") for name in ("exp_avg", "exp_avg_sq")],
    *[(f"state.{name}", off(4), "BAD_ALIGNMENT") for name in ("exp_avg", "exp_avg_sq", "master")],
    *[(f"{row}.{name}", wrong, status) for row in ("row0", "row1") for name, wrong, status in ROW_REFUSED],
    *[(f"float32.{name}", some, "BAD_POINTER") for name in ("master", "residual")],
    ("state.residual", some, "BAD_POINTER"),
    ("step.format", but(0, 1, 2), "BAD_DTYPE"),
    # Scales are missing.
    ("step.format", lambda old: st.just(2), "BAD_POINTER"),
]
SPLIT_INT8 = Storage("int8", "split")
INT8_REFUSED = [
    *[(f"state.{name}", null, "BAD_POINTER") for name in ("exp_avg_scale", "exp_avg_sq_scale")],
    *[(f"state.{name}", off(4), "BAD_ALIGNMENT") for name in ("exp_avg_scale", "exp_avg_sq_scale")],
    ("state.residual", off(2), "BAD_ALIGNMENT"),
    ("state.master", some, "BAD_POINTER"),
    (
        "row1.offset",
        lambda old: st.integers(1, old).map(lambda shift: old - shift).filter(lambda at: at % 128),
        "BAD_ALIGNMENT",
    ),
]
BF16_REFUSED = [(f"state.{name}", off(2), "BAD_ALIGNMENT") for name in ("exp_avg", "exp_avg_sq")]
ALL_REFUSED = [
    *((PLAIN, *case) for case in REFUSED),
    *((Storage("bf16"), *case) for case in BF16_REFUSED),
    *((SPLIT_INT8, *case) for case in INT8_REFUSED),
]
# What must be right to collect, too.
COLLECTED = {"bytes", "row_bytes", "row_count", "chunk_count", "rows", "age", "sq_sum", "first_chunk"}


@pytest.fixture
def sound(kernel, request):
    """A step of two rows, of float32 and bfloat16, that has run once."""
    rows = [Row(ELEMENTS[0]), Row(ELEMENTS[1], torch.bfloat16, group=1)]
    step = Step(kernel, rows, groups=(HYPER, OTHER), storage=getattr(request, "param", PLAIN))
    for i in range(2):
        step.table._struct.state[i].elements = step.offset[i] + ELEMENTS[i]
    step.grads = step.draw()
    one = torch.ones(())
    step.run(step.grads, max_grad_norm=1.0, grad_scale=one, found_inf=torch.zeros(()))
    step.controls = one, torch.zeros(())
    struct = step.table._struct
    struct.grad_scale, struct.found_inf = (tensor.data_ptr() for tensor in step.controls)
    return step


def everything(step):
    """All bytes that a step reads or writes."""
    table = step.table
    tensors = [table._partials, table.control, table.collected, *step.grads, *step.controls]
    host = [torch.frombuffer(bytearray(table._struct), dtype=torch.uint8), torch.from_numpy(table._tables.copy())]
    return [*step.bits(), *host, *(x.reshape(-1).view(torch.uint8).clone() for x in tensors)]


def fields(step, where):
    """Getter and setter of a field of the step, of a row, or of the state of float32 or of the second row."""
    owner, name = where.split(".")
    if owner.startswith("row"):
        row, column = step.table._rows[int(owner[3:])], getattr(table, name.upper())
        return (lambda: int(row[column])), (lambda value: row.__setitem__(column, 0 if value is None else value))
    struct = step.table._struct
    struct = {"step": struct, "float32": struct.state[0], "state": struct.state[1]}[owner]
    return (lambda: getattr(struct, name)), (lambda value: setattr(struct, name, value))


@pytest.mark.parametrize(
    "sound, where, wrong, status",
    ALL_REFUSED,
    ids=[f"{storage.state_dtype}-{where}-{status}" for storage, where, _, status in ALL_REFUSED],
    indirect=["sound"],
)
def test_wrong_fields_are_refused_and_change_nothing(library, sound, where, wrong, status):
    get, put = fields(sound, where)
    right, reference = get(), ctypes.byref(sound.table._struct)
    collected = sound.table.collected.data_ptr()

    @settings(max_examples=30)
    @given(wrong(right))
    def refused(value):
        put(value)
        before = everything(sound)
        results = [library.misa_cpu_step(reference, 2)]
        if where.split(".")[1] in COLLECTED:
            results.append(library.misa_cpu_collect(reference, collected))
        after = everything(sound)
        put(right)
        assert same_bits(before, after)
        assert set(results) == {STATUS[status]}

    refused()
    # It was this value alone that was wrong.
    assert library.misa_cpu_step(reference, 2) == 0
    assert library.misa_cpu_collect(reference, collected) == 0


def test_wrong_arguments_are_refused_and_change_nothing(library, sound):
    reference, collected = ctypes.byref(sound.table._struct), sound.table.collected.data_ptr()
    odd = ctypes.cast(ctypes.addressof(sound.table._struct) + 1, ctypes.POINTER(native.MisaStep))
    before = everything(sound)
    for threads in (0, -1, -(2**31)):
        assert library.misa_cpu_step(reference, threads) == STATUS["BAD_SIZE"]
    for step, status in ((None, "BAD_POINTER"), (odd, "BAD_ALIGNMENT")):
        assert library.misa_cpu_step(step, 1) == STATUS[status]
        assert library.misa_cpu_collect(step, collected) == STATUS[status]
    assert library.misa_cpu_collect(reference, None) == STATUS["BAD_POINTER"]
    assert library.misa_cpu_collect(reference, collected + 4) == STATUS["BAD_ALIGNMENT"]
    sizes = {"bytes": ctypes.sizeof(native.MisaStep), "row_bytes": 8 * table.ROW_COLUMNS}
    nothing = native.MisaStep(**sizes, row_count=-1)
    assert library.misa_cpu_step(nothing, 1) == library.misa_cpu_collect(nothing, None) == STATUS["BAD_SIZE"]
    assert same_bits(before, everything(sound))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the library is linked to its runtime")
@pytest.mark.parametrize(
    ("visible", "bundled", "opened"),
    [
        (True, ["libgomp-0123abcd.so.1"], []),
        (False, ["libgomp-0123abcd.so.1"], ["libgomp-0123abcd.so.1"]),
        (False, [], ["libgomp.so.1"]),
    ],
)
def test_torchs_openmp_runtime_goes_before_the_machines(monkeypatch, tmp_path, visible, bundled, opened):
    loaded = []

    def load(name: str | None, mode: int = ctypes.DEFAULT_MODE) -> SimpleNamespace:
        if name is None:
            return SimpleNamespace(GOMP_parallel=None) if visible else SimpleNamespace()
        assert mode == ctypes.RTLD_GLOBAL
        loaded.append(Path(name).name)
        return SimpleNamespace()

    (tmp_path / "lib").mkdir()
    for name in bundled:
        (tmp_path / "lib" / name).touch()
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(ctypes, "CDLL", load)
    native.show_openmp.__wrapped__()
    assert loaded == opened
