"""Slices of columns: on every kernel that has them the bits of a contiguous copy, and nothing beside them changes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from emulated import EmulatedTable
from pairs import pairwise
from tables import (
    HYPER,
    OTHER,
    PLAIN,
    SOME_STORAGES,
    STOCHASTIC,
    STORAGES,
    Kernel,
    Row,
    Step,
    kernel_of,
    native_kernel,
    same_bits,
    triton_kernel,
)
from torch import nn

from misa_kernels import kernels
from misa_kernels.kernels import Settings, native, table
from misa_kernels.kernels.plain import PlainStep
from misa_kernels.kernels.table import ADOPT, FLUSH, MEASURE, WRITE_BACK
from misa_kernels.memory.arena import Arena
from misa_kernels.memory.storage import Storage
from misa_kernels.reference import Hyper

FP32, BF16 = torch.float32, torch.bfloat16
CPU = torch.device("cpu")
VARIANTS = [(a, b) for a in (FP32, BF16) for b in (FP32, BF16)]
NATIVE = [storage for storage in STORAGES if storage in kernels._storages("cpu")]
# Width, pitch and lines: a column, chunks that end within a line, one that has more than a chunk, no gaps at all,
# vectors, and a row whose elements are neighbours among the others.
LINES = [
    (1, 5, 300),
    (3, 4, 11_000),
    (16, 33, 2100),
    (48, 50, 700),
    (100, 101, 340),
    (33_000, 33_001, 2),
    (32_768, 32_769, 2),
    (64, 64, 600),
    (700, 900, 1),
    (16, 48, 700),
    (12, 20, 1000),
    (0, 0, 9000),
]
# Of kernels that take seconds a step where there is no GPU.
FEW = [(1, 5, 300), (100, 101, 90), (9000, 9001, 2), (16, 48, 700), (0, 0, 4097)]
# Around the lines that two chunks have an end of.
LONG = [(32_768, 32_769, 2), (32_772, 32_776, 2), (40_001, 40_003, 2)]
GPUS = [pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda")]
OTHERS = [(name, storage) for name in ("emulated", "cuda") for storage in (PLAIN, STOCHASTIC)]
OTHERS += [(name, storage) for name in ("interpreter", "triton") for storage in STORAGES]
OTHERS = [
    pytest.param(
        name,
        storage,
        id=f"{name} {storage}",
        marks=[pytest.mark.gpu] * (name in ("triton", "cuda"))
        + [pytest.mark.slow] * (name == "interpreter" and storage not in SOME_STORAGES),
    )
    for name, storage in OTHERS
]


@dataclass
class Both:
    """Rows in the lines of wider matrices, and the same rows without gaps."""

    step: Step
    copy: Step

    def __init__(self, storage, variants, lines, kernel=None):
        kernel = kernel or native_kernel("cpu")
        # A row that has no lines is one line, to be looked at.
        plain = [not width for width, _, _ in lines for _ in variants]
        lines = [(width or count, pitch or count, count if width else 1) for width, pitch, count in lines]
        shapes = [(width, pitch, count) for width, pitch, count in lines for _ in variants]
        dtypes = [variant for _ in lines for variant in variants]
        rows = [
            Row(width * count, *dtype, group=i % 2, start=i**9)
            for i, ((width, _, count), dtype) in enumerate(zip(shapes, dtypes, strict=True))
        ]
        lined = [
            row if alone else replace(row, width=width, pitch=pitch)
            for row, alone, (width, pitch, _) in zip(rows, plain, shapes, strict=True)
        ]
        self.step, self.copy = (Step(kernel, each, groups=(HYPER, OTHER), storage=storage) for each in (lined, rows))
        self.shapes = shapes
        # Within the matrix, not at its begin; where lines are vectors, on as many bytes as one.
        self.first = [8 if (width | pitch) % 4 == 0 else 2 for width, pitch, _ in shapes]
        sizes = [count * pitch + 8 for _, pitch, count in shapes]
        self.wide = [torch.randn(size).to(kernel.device, dtype) for size, (dtype, _) in zip(sizes, dtypes, strict=True)]
        self.begun = [wide.clone() for wide in self.wide]
        self.step.weights = [wide[first:] for wide, first in zip(self.wide, self.first, strict=True)]
        for i, weight in enumerate(self.copy.weights):
            weight.copy_(self.lines(self.wide[i], i).reshape(-1))

    def lines(self, wide, i):
        width, pitch, count = self.shapes[i]
        return wide.as_strided((count, width), (pitch, 1), self.first[i])

    def run(self, grads, **options):
        for step in (self.step, self.copy):
            step.run(grads, **options)

    def close(self, actions, keys):
        for step in (self.step, self.copy):
            hyper = [list(group.values()) for group in step.groups]
            step.table.close([weight.data_ptr() for weight in step.weights], hyper, actions, keys)

    def measure(self):
        found = []
        for step in (self.step, self.copy):
            hyper = [list(group.values()) for group in step.groups]
            found.append(step.table.measure([weight.data_ptr() for weight in step.weights], hyper))
        return found

    def check(self):
        for i, weight in enumerate(self.copy.weights):
            # Beside the slice it is as it was.
            expected = self.begun[i].clone()
            lines = self.lines(expected, i)
            lines.copy_(weight.view(lines.shape))
            assert same_bits([self.wide[i].view(torch.uint8)], [expected.view(torch.uint8)]), self.shapes[i]
            for name, view in self.step.views(i).items():
                assert same_bits([view.view(torch.uint8)], [self.copy.views(i)[name].view(torch.uint8)]), name
        a, b = self.step.table, self.copy.table
        assert torch.equal(a._ages, b._ages) and same_bits([a.sq_sums], [b.sq_sums])
        assert same_bits([a.control.view(torch.uint8)], [b.control.view(torch.uint8)])


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("storage", NATIVE, ids=str)
def test_steps_have_the_bits_of_a_contiguous_copy(storage, threads):
    """Whatever the dtypes, the instructions and the threads; with all that a step can be told."""
    library = native.library("cpu")
    instructions = library.misa_cpu_instructions()
    sets = [name for name in library.misa_cpu_built().split() if not library.misa_cpu_use_instructions(name)]
    try:
        for name in sets:
            assert library.misa_cpu_use_instructions(name) == 0
            both = Both(storage, VARIANTS, LINES)
            keys = range(5, 5 + len(both.shapes))
            for t, options in enumerate(
                (
                    {},
                    {"max_grad_norm": 1.0},
                    {"skip_nonfinite": True, "max_grad_norm": 5.0},
                    {"grad_scale": torch.tensor(3.0), "found_inf": torch.zeros(())},
                )
            ):
                threads(1 + 2 * (t % 2))
                both.run(both.copy.draw({t, 9 + t}), keys=keys, **options)
                both.check()
            moved = both.wide[0].clone()
            bad = both.copy.draw()
            bad[1][-1] = float("nan")
            both.run(bad, keys=keys, skip_nonfinite=True)
            assert both.step.table.control[2] == 1 and torch.equal(moved, both.wide[0])
            both.check()
    finally:
        assert library.misa_cpu_use_instructions(instructions) == 0


@pytest.mark.parametrize("name, storage", OTHERS)
def test_steps_and_ends_of_other_kernels_have_the_bits_of_a_contiguous_copy(name, storage, monkeypatch):
    both = Both(storage, [(FP32, BF16), (BF16, BF16)], FEW, kernel_of(name, monkeypatch))
    keys = range(5, 5 + len(both.shapes))
    for t, options in enumerate(({}, {"max_grad_norm": 1.0})):
        # Multiples of 1/8, whose squares add up without rounding: the CUDA library adds vectors in another order.
        grads = [None if grad is None else (grad * 8).round().clamp(-16, 16) / 8 for grad in both.copy.draw({t})]
        both.run(grads, keys=keys, **options)
        both.check()
    a, b = both.measure()
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0.0)
    assert (a[1] > 0).all()
    both.close([(ADOPT, WRITE_BACK, FLUSH | WRITE_BACK)[i % 3] for i in range(len(both.shapes))], keys)
    both.check()


@pytest.mark.parametrize("name", ["interpreter", "emulated", *GPUS])
def test_long_lines_have_the_bits_of_a_contiguous_copy(name, monkeypatch):
    both = Both(PLAIN, [(FP32, FP32)], LONG, kernel_of(name, monkeypatch))
    both.run([torch.ones_like(weight) for weight in both.copy.weights])
    both.check()


def test_slices_and_whole_tensors_share_a_launch(monkeypatch):
    kernel = triton_kernel("cpu", monkeypatch)
    step = Step(kernel, [Row(640), Row(640, width=16, pitch=32), Row(64, width=16, pitch=33), Row(64)])
    step.weights[1:3] = [torch.zeros(2000), torch.zeros(200)]
    step.run(step.draw())
    # By alignment, as ever.
    assert [(b.aligned, b.pitched, b.programs) for b in step.table._buckets] == [(True, True, 3), (False, True, 1)]
    whole = Step(kernel, [Row(640), Row(63)])
    whole.run(whole.draw())
    assert [b.pitched for b in whole.table._buckets] == [False, False]
    one, no_state = np.ones(1, dtype=np.int64), {FP32: {}}
    for numel, pitch in ((64, 2**30), (2**32, 32)):
        with pytest.raises(ValueError, match="of fewer than 2.32 elements.*use backend='reference'"):
            kernel.table(numel * one, 0 * one, 0 * one, 0 * one, [FP32], [FP32], no_state, PLAIN, CPU, one, pitch * one)


@pytest.mark.parametrize("storage", NATIVE, ids=str)
def test_rounds_end_with_the_bits_of_a_contiguous_copy(storage, threads):
    both = Both(storage, [(FP32, FP32), (BF16, FP32)], LINES)
    for t in range(2):
        # A row of age 0, too.
        both.run(both.copy.draw({4}), keys=[t] * len(both.shapes))
    for i in range(len(both.shapes)):
        # As somebody would set them.
        lines = both.lines(both.wide[i], i)
        lines[::7] = 0.375
        both.copy.weights[i].view(lines.shape)[::7] = 0.375
    threads(3)
    before = [wide.clone() for wide in both.wide]
    a, b = both.measure()
    assert torch.equal(a, b) and (a[1] > 0).all() and (a[0] > 0).sum() == len(both.shapes) - 1
    assert same_bits(before, both.wide)
    actions = [(ADOPT, WRITE_BACK, FLUSH | WRITE_BACK, ADOPT | FLUSH | WRITE_BACK)[i % 4] for i in range(len(before))]
    both.close(actions, [7 + i for i in range(len(before))])
    both.check()
    assert not same_bits(before, both.wide) and MEASURE not in actions


@pytest.mark.parametrize(
    "width, pitch",
    [(0, 1), (0, -1), (-1, 5), (3, 2), (7, 7), (10, 2**62), (2**62, 2**62), (50, 2**61), (1000, 1000), (3, 0)],
)
def test_lines_that_are_none_are_refused(width, pitch):
    step = Step(native_kernel("cpu"), [Row(100), Row(64)])
    step.run(step.draw())
    before, rows = step.bits(), step.table._rows
    rows[0, table.WIDTH], rows[0, table.PITCH] = width, pitch
    with pytest.raises(RuntimeError, match="a row is no whole number of lines, they overlap"):
        step.run(step.draw())
    with pytest.raises(RuntimeError, match="a row is no whole number of lines, they overlap"):
        step.table.close([weight.data_ptr() for weight in step.weights], None, [WRITE_BACK, 0], [0, 0])
    assert same_bits(before, step.bits())


# The layer above the tables: one matrix, of which a slice of columns, one of rows, and another matrix are trained.
OUT, IN = 31, 44


def slices(dtype, spans=((3, 19), (20, 21), (24, 40))):
    """Slices of columns, one of rows, and a whole matrix."""
    params = [nn.Parameter(torch.randn(OUT, IN, generator=torch.manual_seed(5)).to(dtype)) for _ in range(len(spans))]
    params += [nn.Parameter(torch.randn(OUT, IN, generator=torch.manual_seed(6)).to(dtype)) for _ in range(2)]
    shared = {"is_counted": True, "group": 0, "module": None}
    rows = [
        kernels.Row(
            slot=i,
            param=params[i],
            index=i,
            start=a,
            stop=(OUT - 1) * IN + b,
            offset=a,
            fellows=[i],
            width=b - a,
            pitch=IN,
            is_slice=True,
            **shared,
        )
        for i, (a, b) in enumerate(spans)
    ]
    n = len(rows)
    at = {"start": 5 * IN, "stop": 9 * IN, "offset": 5 * IN}
    rows.append(kernels.Row(slot=n, param=params[n], index=n, fellows=[n], is_slice=True, **at, **shared))
    whole = {"start": 0, "stop": OUT * IN, "offset": 0}
    rows.append(kernels.Row(slot=n + 1, param=params[n + 1], index=n + 1, fellows=[n + 1], **whole, **shared))
    return rows


def contiguous(rows):
    """The same rows as parameters of their own; those whose noise begins within a parameter remain so."""
    found = []
    for row in rows:
        param = nn.Parameter(row.weight().clone())
        start = row.noise_start
        found.append(
            replace(row, param=param, start=start, stop=start + row.numel, offset=0, width=0, pitch=0, is_slice=False)
        )
    return found


def test_what_a_row_says_of_itself():
    rows = slices(FP32)
    assert [row.numel for row in rows] == [16 * OUT, OUT, 16 * OUT, 4 * IN, OUT * IN]
    assert [row.noise_start for row in rows] == [0, 0, 0, 5 * IN, 0]
    for (a, b), row in zip(((3, 19), (20, 21), (24, 40)), rows, strict=False):
        expected = row.param.detach()[:, a:b].clone().reshape(-1)
        assert torch.equal(row.weight(), expected)
        for start, numel in ((0, 1), (5, OUT - 5), (17, 9), (0, OUT), (OUT - 1, 1)):
            got = row.weight(start, numel)
            assert got.is_contiguous() and torch.equal(got, expected[start : start + numel])
            before = row.param.detach().clone()
            row.put(got + 1, start)
            before[:, a:b] = expected.index_add(0, torch.arange(start, start + numel), torch.ones(numel)).view(OUT, -1)
            assert torch.equal(row.param, before)
            row.put(got, start)
            assert torch.equal(row.weight(), expected)
    block, version = rows[3], rows[3].param._version
    assert block.weight().data_ptr() == block.param[5].data_ptr() and torch.equal(
        block.weight(), block.param[5:9].view(-1)
    )
    block.put(block.weight())
    assert block.param._version == version
    block.put(torch.zeros(IN), IN)
    assert not block.param[6].any() and block.param[5].all() and block.param[7].all()


class Round:
    """The steps of a round over rows that all stay on."""

    def __init__(self, backend, rows, storage, **options):
        self.rows, numel = rows, [row.numel for row in rows]
        dtypes = [row.param.dtype for row in rows]
        self.arena = Arena(numel, dtypes, range(len(rows)), 0, CPU, storage=storage)
        self.arena.lend([], range(len(rows)), clear=True)
        for row in rows:
            if (master := self.arena.views(row.slot).get("master")) is not None:
                master.copy_(row.weight())
        settings = {"max_grad_norm": None, "skip_nonfinite": False, "root": False} | options
        self.step = kernels.prepare(backend, rows, self.arena, Settings(storage=storage, **settings))
        self.weights = [row.param.data_ptr() for row in rows]
        self.hyper = [Hyper(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)]

    def run(self, t, grads, **options):
        self.step.run(grads, self.weights, self.hyper, (3, t), **options)
        self.step.collect()

    def close(self):
        actions = [(FLUSH | WRITE_BACK, ADOPT)[i % 2] for i in range(len(self.rows))]
        self.step.rehearse(self.hyper)
        moved = self.step.measure(self.weights, self.hyper)
        self.step.close(actions, self.weights, self.hyper, (4, 9))
        return moved

    def bits(self):
        state = [view for row in self.rows for view in self.arena.views(row.slot).values()]
        numbers = [self.arena.age, self.arena.score_sum, self.arena.updates]
        return [x.detach().reshape(-1).view(torch.uint8).clone() for x in (*self.weights_now(), *state, *numbers)]

    def weights_now(self):
        return [row.weight() for row in self.rows]


def gradients(rows, t, nonfinite=False):
    """One of the shape of each slice, as autograd makes it; of the last one, that is in nobody's way, at times none."""
    random = torch.Generator().manual_seed(t)
    found = []
    for row in rows:
        shape = (OUT, row.width) if row.width else (row.numel // IN, IN)
        found.append(torch.randn(shape, generator=random).to(row.param.dtype))
    if nonfinite:
        found[0][-1, -1] = float("nan")
    if t == 2:
        found[1] = None
    return found


OPTIONS = {"plainly": {}, "clipped": {"max_grad_norm": 0.5, "skip_nonfinite": True}, "by root": {"root": True}}


@pytest.mark.parametrize(
    ("backend", "options", "dtype", "storage"), pairwise(["cpu", "reference"], OPTIONS, [FP32, BF16], STORAGES)
)
def test_rounds_of_slices_have_the_bits_of_matrices_of_their_own(backend, options, dtype, storage, monkeypatch):
    """In the tables of the library as in plain PyTorch, whose pieces end within lines here."""
    if backend == "cpu" and storage not in NATIVE:
        pytest.skip(f"the library has no {storage}")
    monkeypatch.setattr("misa_kernels.kernels.plain.PIECE", 384)
    table_ = native_kernel("cpu").table if backend == "cpu" else PlainStep
    rows = slices(dtype)
    begun = [row.param.detach().clone() for row in rows]
    # Both row slices and whole matrices keep their place in the noise, and have to keep the matrix around them.
    copies = [row if not row.width else copy for row, copy in zip(slices(dtype), contiguous(rows), strict=True)]
    ours, theirs = (Round(table_, each, storage, **OPTIONS[options]) for each in (rows, copies))
    for t in range(4):
        grads = gradients(rows, t, nonfinite=t == 1 and options == "clipped")
        for round_ in (ours, theirs):
            round_.run(t, [None if grad is None else grad.clone() for grad in grads])
        assert same_bits(ours.bits(), theirs.bits()), t
    assert not torch.equal(rows[0].weight(), begun[0][:, 3:19].reshape(-1))
    assert same_bits([ours.close()], [theirs.close()])
    assert same_bits(ours.bits(), theirs.bits())
    for row, before in zip(rows[:3], begun, strict=False):
        beside = [i for i in range(IN) if not row.offset <= i < row.offset + row.width]
        assert torch.equal(row.param[:, beside], before[:, beside])
    beside = [i for i in range(OUT) if not 5 <= i < 9]
    assert torch.equal(rows[3].param[beside], begun[3][beside])


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    ("name", "storage"),
    [
        ("cpu", PLAIN),
        ("cpu", Storage("bf16", "stochastic")),
        ("cpu", Storage("int8", "split")),
        ("interpreter", Storage("int8", "split")),
        ("emulated", PLAIN),
    ],
    ids=str,
)
def test_kernels_step_slices_as_plain_pytorch_does(name, dtype, storage, monkeypatch):
    library, plain = (
        Round(backend, slices(dtype), storage, max_grad_norm=0.5)
        for backend in (kernel_of(name, monkeypatch).table, PlainStep)
    )
    for t in range(4):
        grads = gradients(library.rows, t)
        for round_ in (library, plain):
            round_.run(t, grads)
    assert torch.equal(library.arena.age, plain.arena.age)
    torch.testing.assert_close(library.arena.score_sum, plain.arena.score_sum, rtol=1e-6, atol=0.0)
    compressed = storage.state_dtype != "fp32"
    for a, b in zip(library.weights_now(), plain.weights_now(), strict=True):
        # As in test_fused.py.
        rtol, atol = 1e-6 if dtype == FP32 else 2.0**-7, 1e-3 if compressed else 1e-6
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    torch.testing.assert_close(library.close(), plain.close(), rtol=1e-2 if compressed else 1e-5, atol=1e-9)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_gradient_of_the_whole_matrix_is_refused(backend):
    """It would be read from its begin, as if it were that of the slice."""
    round_ = Round(native_kernel("cpu").table if backend == "cpu" else PlainStep, slices(FP32), PLAIN)
    before = round_.bits()
    for number in range(4):
        grads = gradients(round_.rows, 0)
        grads[number] = torch.ones(OUT, IN)
        with pytest.raises(RuntimeError, match=rf"a gradient has {OUT * IN} elements and its weight"):
            round_.run(0, grads)
    assert same_bits(before, round_.bits())


def test_slices_of_rows_step_on_every_table():
    """Contiguous in the weight, and with a gradient of their own."""
    launch = pytest.importorskip("misa_kernels.kernels.launch") if kernels._interpreted() else None
    tables = [native_kernel("cpu").table, *([launch.TritonTable] if launch else [])]
    for each in tables:
        rows = slices(FP32, spans=())
        round_ = Round(each, rows, PLAIN)
        grads = gradients(rows, 0)
        expected = rows[0].param.detach().clone()
        # At age 1 the step is lr, whatever the gradient, and weight decay shrinks what it had.
        expected[5:9] = expected[5:9] * (1 - 1e-2 * 0.1) - 1e-2 * grads[0].sign()
        round_.run(0, grads)
        torch.testing.assert_close(rows[0].param.detach(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(rows[0].param[:5], slices(FP32, spans=())[0].param[:5])


@pytest.mark.parametrize("width, pitch", [(2**29, 2**29), (50, 2**32 + 50)])
def test_lines_that_are_too_long_for_the_cuda_library_are_refused(width, pitch):
    step = Step(Kernel(EmulatedTable, CPU), [Row(100)])
    before, rows = step.bits(), step.table._rows
    rows[0, table.WIDTH], rows[0, table.PITCH] = width, pitch
    if width > 100:
        rows[0, table.NUMEL] = 0
    for call in (
        lambda: step.run(step.draw()),
        lambda: step.table.close([step.weights[0].data_ptr()], None, [WRITE_BACK], [0]),
    ):
        with pytest.raises(RuntimeError, match="are longer than this library can tell"):
            call()
    assert same_bits(before, step.bits())
