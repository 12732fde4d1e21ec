"""What a round leaves to do, on every kernel: bit by bit what NumPy and plain PyTorch do with the same state."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tables import (
    HYPER,
    OTHER,
    PLAIN,
    SOME_STORAGES,
    STOCHASTIC,
    STORAGES,
    Row,
    Step,
    kernel_of,
    same_bits,
)

from misa_kernels import reference
from misa_kernels.kernels import table
from misa_kernels.kernels.table import ADOPT, FLUSH, MEASURE, WRITE_BACK
from misa_kernels.memory.storage import Storage

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
KERNELS = [
    "interpreter",
    "cpu",
    "emulated",
    *(pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda")),
]
LEAVE = WRITE_BACK | FLUSH
# One chunk and several, of every kernel; ends of vectors; nothing.
SIZES = (70_001, 1, 0, 128, 4097, 515)


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    return kernel_of(request.param, monkeypatch)


def trained(kernel, dtype, storage, sizes=SIZES, steps=3):
    """Rows after some steps, the last of them of age 0; every 7th element of the first set by somebody since."""
    rows = [Row(n, dtype, group=i % 2, start=2**32 - 70 * i, shift=i % 3 == 1) for i, n in enumerate(sizes)]
    rows.append(Row(300, dtype))
    step = Step(kernel, rows, groups=(HYPER, OTHER), storage=storage)
    for number in range(steps):
        grads = step.draw(missing={len(rows) - 1})
        step.run(grads, keys=[17 + number + 5 * i for i in range(len(rows))])
        step.expect(grads)
    step.weights[0][::7] = 0.375
    return step


def close(step, actions, keys=None):
    step.table.close(
        [weight.data_ptr() for weight in step.weights],
        [list(group.values()) for group in step.groups],
        actions,
        keys,
    )


def expected(step, i, action, key):
    """Weight and master of one row after an action."""
    row, age = step.rows[i], torch.tensor(int(step.age[i]), dtype=torch.int32)
    weight, views = step.weights[i].cpu().clone(), {name: view.cpu() for name, view in step.views(i).items()}
    if age == 0 or not len(weight):
        return weight, views.get("master")
    theta = step.storage.theta(views, weight).clone()
    if "master" in views:
        theta = torch.where(theta.to(row.dtype) == weight, theta, weight.float())
    master = theta.clone() if action & ADOPT and "master" in views else views.get("master")
    if action & FLUSH:
        lr, beta1, beta2, eps, decay = step.groups[row.group].values()
        m, v = (step.storage.decode(name, views, len(weight)) for name in ("exp_avg", "exp_avg_sq"))
        flushed = reference.momentum_flush(theta, m, v, reference.Hyper(lr, beta1, beta2, eps, decay), age)
        # The same once more: the square root of torch on a CPU may be off by an ulp.
        denom_scale = np.float32(1 / np.sqrt(1 - beta2 ** float(age)))
        ratio = m.numpy() / (denom_scale * np.sqrt(v.numpy()) + np.float32(eps))
        theta = theta - torch.from_numpy(np.float32(lr * beta1 / (1 - beta1) / (1 - beta1 ** float(age))) * ratio)
        torch.testing.assert_close(theta, flushed, rtol=2e-7, atol=1e-7)
    if action & WRITE_BACK:
        reference.store_weight(weight, theta, row.start, key)
    return weight, master


def check(step, actions, keys, exact=True):
    wanted = [expected(step, i, action, key) for i, (action, key) in enumerate(zip(actions, keys, strict=True))]
    state = [step.part(name, i) for i in range(len(step.rows)) for name in step.views(i) if name != "master"]
    ages, sums = step.table._ages.clone(), step.table.sq_sums.clone()
    close(step, actions, keys)
    for i, (weight, master) in enumerate(wanted):
        if exact or not actions[i] & FLUSH:
            assert torch.equal(step.weights[i].cpu().view(torch.uint8), weight.view(torch.uint8)), i
        else:
            # What is decoded may differ in its last bits, and be rounded up instead of down.
            ulp = torch.finfo(weight.dtype).eps * weight.float().abs() + 1e-6
            assert ((step.weights[i].cpu().float() - weight.float()).abs() <= ulp).all(), i
        if master is not None and step.age[i]:
            assert torch.equal(step.part("master", i).nan_to_num(9.0), master.nan_to_num(9.0)), i
    # Moments, residuals, ages and sums are read only.
    after = [step.part(name, i) for i in range(len(step.rows)) for name in step.views(i) if name != "master"]
    assert same_bits([x.view(torch.uint8) for x in state], [x.view(torch.uint8) for x in after])
    assert torch.equal(step.table._ages, ages) and torch.equal(step.table.sq_sums, sums)
    step.check_surroundings()


VARIANTS = [(FP32, PLAIN), (FP32, Storage("bf16")), (FP32, Storage("int8")), (FP16, PLAIN)]
VARIANTS += [(BF16, storage) for storage in SOME_STORAGES]


@pytest.mark.parametrize("dtype, storage", VARIANTS, ids=str)
@pytest.mark.parametrize("flush", [False, True])
def test_what_leaves_is_written_back_as_plain_pytorch_does(kernel, dtype, storage, flush):
    step = trained(kernel, dtype, storage)
    leave = LEAVE if flush else WRITE_BACK
    before = [weight.clone() for weight in step.weights]
    # Some stay, one stays and is left alone.
    actions = [leave, ADOPT, leave, leave, leave, 0, leave]
    check(step, actions, [1000 + i for i in range(7)], exact=storage.state_dtype in ("fp32", "bf16"))
    moved = [not torch.equal(a, b) for a, b in zip(step.weights, before, strict=True)]
    assert not any(moved[i] for i in (1, 2, 5, 6))
    assert moved[0] == (flush or dtype != FP32 and storage.param_precision != "stochastic")


def test_weights_that_somebody_set_win_over_their_masters(kernel):
    step = trained(kernel, BF16, PLAIN)
    step.weights[0][-1] = math.nan
    before = step.part("master", 0).clone()
    actions = [ADOPT] * len(step.rows)
    check(step, actions, [0] * len(actions))
    after = step.part("master", 0)
    assert (after[:-1:7].bfloat16() == 0.375).all() and after[-1].isnan()
    kept = torch.arange(len(after)) % 7 != 0
    kept[-1] = False
    assert torch.equal(after[kept], before[kept])


@pytest.mark.parametrize("dtype, storage", [(FP32, PLAIN), (BF16, PLAIN), (BF16, STOCHASTIC), (BF16, Storage("int8"))])
def test_the_last_update_is_measured(kernel, dtype, storage):
    step = trained(kernel, dtype, storage)
    before = step.written()
    moved = step.table.measure(
        [weight.data_ptr() for weight in step.weights], [list(group.values()) for group in step.groups]
    )
    assert moved.shape == (2, len(step.rows)) and moved.dtype == torch.float64
    assert same_bits(before, step.written())
    for i, row in enumerate(step.rows):
        lr, beta1, beta2, eps, _ = step.groups[row.group].values()
        update = np.zeros(1)
        if t := int(step.age[i]):
            m = step.storage.decode("exp_avg", step.views(i), row.numel).double().cpu().numpy()
            v = step.storage.decode("exp_avg_sq", step.views(i), row.numel).double().cpu().numpy()
            update = lr * m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps)
        np.testing.assert_allclose(moved[0, i].item(), np.square(update).sum(), rtol=1e-5)
        np.testing.assert_allclose(moved[1, i].item(), step.weights[i].double().square().sum().item(), rtol=1e-5)


def test_nothing_that_is_not_there_is_read(kernel):
    """A row without an action may have lost its memory; one of age 0 has a state that was never written."""
    step = trained(kernel, BF16, PLAIN)
    before = step.written()
    weights = [0 if i == 0 else weight.data_ptr() for i, weight in enumerate(step.weights)]
    hyper = [list(group.values()) for group in step.groups]
    step.table.close(weights, hyper, [0] * 6 + [LEAVE | ADOPT], [3] * 7)
    assert same_bits(before, step.written())


def test_a_stretch_of_rows_is_a_step_of_these_alone(kernel):
    """As hooks take it: two stretches, a row that has no gradient, and the end of the step."""
    steps = [trained(kernel, BF16, STOCHASTIC, steps=1) for _ in range(2)]
    grads = steps[0].draw()
    grads[3] = None
    keys = [90 + i for i in range(len(grads))]
    steps[0].run(grads, keys=keys)
    whole, parts = steps
    hyper = [list(group.values()) for group in parts.groups]
    for rows in (slice(4, 7), slice(0, 3), table.NONE):
        parts.table.step(
            [weight.data_ptr() for weight in parts.weights[rows]],
            [grad.data_ptr() for grad in grads[rows]],
            hyper,
            keys[rows],
            rows=rows,
        )
    assert same_bits(whole.bits(), parts.bits())
    assert torch.equal(whole.table.collect(), parts.table.collect())


def test_columns_and_flags_have_one_order_in_all_languages():
    """By name: what `misa.h` declares, what Python fills, and what Triton reads."""
    header = (Path(__file__).parents[2] / "csrc" / "misa.h").read_text()

    def fields(struct):
        body = header.split(f"typedef struct {struct} {{")[1].split("}")[0]
        lines = [line.split("//")[0].strip() for line in body.splitlines()]
        names = [name for line in lines if line for name in line.rstrip(";").replace("*", " ").split()[-1:]]
        return names

    def values(enum):
        body = header.split(f"enum {enum} {{")[1].split("}")[0]
        parts = [
            part.split("=") for line in body.splitlines() for part in line.split("//")[0].split(",") if "=" in part
        ]
        return {name.strip().removeprefix("MISA_"): int(value) for name, value in parts}

    columns = {name.upper(): number for number, name in enumerate(fields("MisaRow"))}
    assert {name: getattr(table, name) for name in columns} == columns
    assert len(columns) == table.ROW_COLUMNS
    assert values("MisaAction") == {name: getattr(table, name) for name in ("MEASURE", "ADOPT", "FLUSH", "WRITE_BACK")}
    assert {name: values("MisaFlag")[name] for name in ("NORMS", "UPDATE")} == {
        "NORMS": table.NORMS,
        "UPDATE": table.UPDATE,
    }
    hyper = header.split("typedef struct MisaHyper {")[1].split("}")[0].split("double")[1].strip().rstrip(";")
    for number, name in enumerate(hyper.split(", ")):
        assert getattr(table, name.upper()) == number
    from misa_kernels.kernels import native
    from misa_kernels.memory.storage import KEYS

    assert fields("MisaState") == [*KEYS, "elements"] == [name for name, _ in native.MisaState._fields_]
    assert [name for name, _ in native.MisaStep._fields_] == [name.split("[")[0] for name in fields("MisaStep")]
    formats = [values("MisaFormat")[f"STATE_{name.upper()}"] for name in native.STATE_DTYPES]
    assert formats == list(range(len(native.STATE_DTYPES)))

    kernels = pytest.importorskip("misa_kernels.kernels.triton_table")
    for name in (*columns, "ROW_COLUMNS", *map(str.upper, hyper.split(", ")), "HYPER_COLUMNS"):
        if hasattr(kernels, name):
            assert getattr(kernels, name).value == getattr(table, name), name


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_every_format_on_every_kernel(kernel, dtype, storage):
    step = trained(kernel, dtype, storage)
    check(step, [LEAVE] * 7, [5 * i for i in range(7)], exact=storage.state_dtype in ("fp32", "bf16"))
    assert MEASURE not in (ADOPT, FLUSH)
