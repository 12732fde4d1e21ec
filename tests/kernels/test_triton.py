"""What is the Triton step's own: buckets, uploads, compilations, capture; its results are in test_steps.py."""

from __future__ import annotations

import copy
import sys
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tables import (
    HYPER,
    OTHER,
    PLAIN,
    Kernel,
    Row,
    Step,
    interpreted,
    missing,
    mixed_rows,
    reserve,
    same_bits,
    triton_kernel,
)
from torch import nn

from misa_kernels import MISA
from misa_kernels.kernels import unusable


@pytest.fixture
def kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return triton_kernel(device.type, monkeypatch)


def test_300_tensors_take_one_launch(kernel):
    step = Step(kernel, [Row(n) for n in range(0, 1200, 4)])
    with patch.object(kernel.table, "_launch", autospec=True, side_effect=kernel.table._launch) as spy:
        step.both(step.draw())
    assert spy.call_count == 1
    step.check()


def test_rows_are_grouped_by_alignment_in_every_step(kernel):
    rows = [Row(20_000), Row(512), Row(700)]
    step = Step(kernel, rows)
    for shift in (0, 1, 0, 3):
        rows[0].grad_shift = shift
        step.run(step.draw())
        assert [bucket.aligned for bucket in step.table._buckets] == [True, False][: 1 + (shift > 0)]


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse memory")
def test_offsets_beyond_32_bits(kernel):
    """Both kinds: an element far into its tensor, and a row far into the arena; only the last chunks are run."""
    device = kernel.device
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of GPU memory")
    large, tail = 2**31 + 3 * kernel.table.chunk, 100
    numel = np.array([large + tail, tail], dtype=np.int64)
    offset = np.array([0, -(-(large + tail) // 64) * 64], dtype=np.int64)
    end = int(offset[1]) + tail
    state = {name: reserve(end, torch.float32, device) for name in ("exp_avg", "exp_avg_sq", "master")}
    weight, grad = reserve(large + tail, torch.bfloat16, device), reserve(large + tail, torch.bfloat16, device)
    small = torch.ones(tail, dtype=torch.bfloat16, device=device)
    weight[-tail:], grad[-tail:] = 1.0, 2.0
    zero = np.zeros(2, dtype=np.int64)
    dtypes = [torch.bfloat16] * 2
    round_ = kernel.table(numel, offset, zero, zero, dtypes, dtypes, {torch.bfloat16: state}, PLAIN, device)
    (bucket,) = round_._buckets
    round_._buckets = [bucket._replace(first_program=bucket.programs - 2, programs=2)]
    small_grad = torch.full_like(small, 2.0)
    round_.step([weight.data_ptr(), small.data_ptr()], [grad.data_ptr(), small_grad.data_ptr()], [list(HYPER.values())])
    # At age 1 the step is lr, whatever the gradient.
    expected = 1 - 1e-2 * 0.1 - 1e-2
    for begin in (large, int(offset[1])):
        np.testing.assert_allclose(state["master"][begin : begin + tail].cpu(), expected, rtol=1e-6)
        np.testing.assert_allclose(state["exp_avg"][begin : begin + tail].cpu(), 0.2, rtol=1e-6)
    assert round_._ages.sum() == 2
    np.testing.assert_allclose(round_.sq_sums.sum().item(), 2 * tail * 4.0)


def test_wrong_uses_are_named():
    table = interpreted().TritonTable
    one = np.ones(1, dtype=np.int64)
    state = {dtype: {} for dtype in (torch.float16, torch.float64)}
    cases = [
        (torch.float16, torch.device("cpu"), ValueError, "float16 weights must have a master"),
        (torch.float64, torch.device("cpu"), ValueError, "torch.float64 must be one of"),
        (torch.float32, torch.device("cuda"), RuntimeError, "TRITON_INTERPRET=1"),
    ]
    for dtype, device, error, message in cases:
        with pytest.raises(error, match=message):
            table(one, one, one, one, [dtype], [dtype], state, PLAIN, device)


def test_unchanged_tables_are_not_uploaded_again(kernel):
    step = Step(kernel, [Row(64)])
    grads = step.draw()
    step.run(grads)
    with patch.object(step.table._table_upload.tensor, "copy_", create=True) as copy:
        step.run(grads)
        assert not copy.called
    step.groups[0]["lr"] = 0.5
    before = step.weights[0].clone()
    step.run(grads)
    assert (step.weights[0] - before).abs().max() > 0.05


@pytest.mark.gpu
def test_steps_never_wait_and_never_compile_again(monkeypatch):
    kernel = triton_kernel("cuda", monkeypatch)
    step = Step(kernel, mixed_rows(30), groups=(HYPER, OTHER))
    options = {"max_grad_norm": 1.0, "skip_nonfinite": True}
    step.run(step.draw(), **options)
    grads = step.draw()
    step_kernel = sys.modules[kernel.table.__module__].kernels.step_kernel
    variants = sum(len(cache[0]) for cache in step_kernel.device_caches.values())
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    try:
        torch.cuda.set_sync_debug_mode("error")
        for t in range(1000):
            step.groups[0]["lr"] = 1e-3 / (t + 1)
            step.groups[1]["beta1"] = 0.5 + t / 3000
            step.run(grads, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
    for seed in range(20):
        other = Step(kernel, mixed_rows(30 + seed), groups=(HYPER, OTHER), seed=seed)
        other.run(other.draw(), **options)
    assert sum(len(cache[0]) for cache in step_kernel.device_caches.values()) == variants


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch):
    """A block in which torch says that the current stream is being captured."""

    @contextmanager
    def block():
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "is_initialized", lambda: True)
            patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            yield

    return block


def optimizer_of(model: nn.Module, **options) -> MISA:
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    return MISA(list(model.parameters()), delta=1.0, inner_steps=100, **options)


def all_bits(model: nn.Module, optimizer: MISA) -> list[torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return [x.clone() for x in (*model.parameters(), *(x for own in state.values() for x in own.values()))]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_step_is_refused_while_a_graph_is_captured(capturing, steps, backend):
    model, untouched = (nn.Linear(6, 5, bias=False).bfloat16() for _ in range(2))
    untouched.load_state_dict(model.state_dict())
    optimizer, expected = (optimizer_of(each, backend=backend) for each in (model, untouched))
    for _ in range(steps):
        optimizer.step()
        expected.step()
    before = all_bits(model, optimizer)
    with capturing(), pytest.raises(RuntimeError, match="captured in a CUDA graph.*call step\\(\\) outside"):
        optimizer.step()
    assert same_bits(before, all_bits(model, optimizer))
    optimizer.step()
    expected.step()
    assert same_bits(all_bits(untouched, expected), all_bits(model, optimizer))


def test_released_gradients_are_refused_while_a_graph_is_captured(capturing):
    model = nn.Linear(6, 5, bias=False)
    optimizer = MISA(list(model.parameters()), delta=1.0, release_gradients=True)
    before = model.weight.detach().clone()
    with capturing(), pytest.raises(RuntimeError, match="captured in a CUDA graph.*without release_gradients"):
        model(torch.ones(2, 6)).sum().backward()
    assert torch.equal(model.weight, before) and optimizer.backend is None


def another(model, optimizer):
    MISA(list(model.parameters()), delta=1.0)


@pytest.mark.parametrize(
    "what, call",
    [
        ("state_dict", lambda model, optimizer: optimizer.state_dict()),
        ("state_dict", lambda model, optimizer: copy.deepcopy((model, optimizer))),
        ("load_state_dict", lambda model, optimizer: optimizer.load_state_dict(optimizer.saved)),
        ("release", lambda model, optimizer: optimizer.release()),
        ("release", another),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.filterwarnings("ignore:MISA takes 1 parameters over")
def test_what_copies_is_refused_while_a_graph_is_captured(capturing, backend, what, call):
    model, untouched = (nn.Linear(6, 5, bias=False).bfloat16() for _ in range(2))
    untouched.load_state_dict(model.state_dict())
    optimizer, expected = (optimizer_of(each, backend=backend) for each in (model, untouched))
    for each in (optimizer, expected):
        each.step()
        each.saved = each.state_dict()
        each.step()
    with capturing(), pytest.raises(RuntimeError, match=f"^{what}.. came within the capture of a CUDA graph.*after$"):
        call(model, optimizer)
    assert same_bits(all_bits(untouched, expected), all_bits(model, optimizer))
    for each in (optimizer, expected):
        each.step()
        each.release()
    assert torch.equal(untouched.weight, model.weight)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_what_was_written_to_the_state_outlasts_a_capture(capturing, backend):
    model = nn.Linear(6, 5, bias=False)
    optimizer = optimizer_of(model, backend=backend)
    optimizer.step()
    optimizer.state[model.weight]["exp_avg"] = torch.full((5, 6), 7.0)
    # Where copies are recorded, the memory stays as it is.
    with capturing(), patch("misa_kernels.run.live._take", lambda *args: None):
        with pytest.raises(RuntimeError, match="captured in a CUDA graph"):
            optimizer.step()
        # Nothing of it is on the device.
        optimizer.zero_grad()
    model.weight.grad = torch.zeros(5, 6)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[model.weight]["exp_avg"], torch.full((5, 6), 6.3))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda", "reference"])
def test_a_capture_on_a_gpu_is_refused(backend):
    if unusable(backend):
        missing(f"{backend} {unusable(backend)}")
    model = nn.Linear(64, 32, bias=False).cuda()
    optimizer = optimizer_of(model, backend=backend)
    optimizer.step()
    before = all_bits(model, optimizer)
    with pytest.raises(RuntimeError, match="captured in a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert same_bits(before, all_bits(model, optimizer))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_rounds_tables_are_not_lent_again_while_they_are_read(backend):
    """A switch in each second step, on a stream of its own that is late, while the one that allocated writes poison."""
    if unusable(backend):
        missing(f"{backend} {unusable(backend)}")
    finals = []
    for late in (False, True):
        torch.manual_seed(0)
        model = nn.ParameterList(nn.Parameter(torch.randn(40, 24, device="cuda")) for _ in range(12))
        groups = [{"params": list(model), "role": "sampled"}]
        optimizer = MISA(groups, delta=0.4, inner_steps=2, lr=1e-2, max_grad_norm=1.0, backend=backend)
        stream = torch.cuda.Stream() if late else torch.cuda.current_stream()
        # Transposed, so that the step makes copies of them, too.
        given = [torch.randn(24, 40, device="cuda").t() for _ in model]
        for number in range(60):
            for param, grad in zip(model, given, strict=True):
                param.grad = grad if param.requires_grad else None
            # The tables of the first round are of the default stream.
            with torch.cuda.stream(stream if number else torch.cuda.current_stream()):
                if late and number:
                    stream.wait_stream(torch.cuda.default_stream())
                    torch.cuda._sleep(2_000_000)
                optimizer.step()
            if late:
                poison = [torch.full((size,), -1, dtype=torch.int64, device="cuda") for size in (8, 64, 512, 4096) * 8]
                del poison
            torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        finals.append(all_bits(model, optimizer))
    assert same_bits(*finals)


@pytest.mark.gpu
def test_uploads_do_not_overtake_the_device(monkeypatch):
    """Many more steps than buffers while the device is busy: each must see its own hyperparameters."""
    kernel = triton_kernel("cuda", monkeypatch)
    slow, fast = (Step(kernel, [Row(100_000)]) for _ in range(2))
    grads = fast.draw()
    for step in (slow, fast):
        if step is slow:
            torch.cuda._sleep(500_000_000)
        for t in range(20):
            step.groups[0]["lr"] = 1e-2 * (1 + t)
            step.run(grads)
            if step is fast:
                torch.cuda.synchronize()
    assert same_bits(slow.bits(), fast.bits())
