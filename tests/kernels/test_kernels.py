"""Which backend runs: by name, device, dtype and what is installed; never another one in silence."""

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
import triton
from torch import nn

from misa_kernels import MISA, kernels
from misa_kernels.kernels.native import CpuTable, CudaTable
from misa_kernels.kernels.plain import PlainStep
from misa_kernels.memory.codec import FORMATS
from misa_kernels.memory.storage import PRECISIONS, Storage

PLAIN = Storage()
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu_machine(monkeypatch):
    """A machine on which torch reports a CUDA device, without the interpreter."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_auto_takes_the_fused_step_where_it_can_run(gpu_machine):
    fused = kernels.select("auto", CUDA, {torch.float32, torch.bfloat16}, PLAIN)
    assert fused.__name__ == "TritonTable"
    assert kernels.select("triton", CUDA, {torch.float16}, PLAIN) is fused
    assert kernels.select("auto", CPU, {torch.float32}, PLAIN) is CpuTable
    assert kernels.select("auto", CUDA, {torch.float32, torch.float64}, PLAIN) is PlainStep
    assert kernels.select("reference", CUDA, {torch.float32}, PLAIN) is PlainStep


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("state_dtype", FORMATS)
def test_the_cpu_library_has_all_formats_but_those_of_triton(state_dtype, precision):
    storage, dtypes = Storage(state_dtype, precision), {torch.float32, torch.bfloat16}
    has = state_dtype in ("fp32", "bf16", "int8")
    assert kernels.select("auto", CPU, dtypes, storage) is (CpuTable if has else PlainStep)
    assert kernels.select("reference", CPU, dtypes, storage) is PlainStep
    if has:
        assert kernels.select("cpu", CPU, dtypes, storage) is CpuTable
        return
    optimizer = MISA(
        [nn.Parameter(torch.ones(2, 2))], delta=1.0, backend="cpu", state_dtype=state_dtype, param_precision=precision
    )
    message = f"'cpu' has no state_dtype={state_dtype!r} with param_precision={precision!r}: use backend='auto'"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        optimizer.step()


def plain_steps(backend, dtype=torch.float32, grad_dtype=None, **options):
    """Messages about the backend in a run whose memory is allocated twice, each at a line of this file."""
    param = nn.Parameter(torch.ones(4, 4, dtype=dtype))
    if grad_dtype is not None:
        param.grad_dtype = grad_dtype
    optimizer = MISA([param], delta=1.0, backend=backend, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            param.grad = torch.ones(4, 4, dtype=grad_dtype or dtype)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.backend == ("reference" if caught else {"auto": "cpu"}.get(backend, backend))
    assert {warning.filename for warning in caught} <= {__file__}
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"state_dtype": "fp8"}, "has state_dtype 'fp32', 'bf16', 'int8', not 'fp8'"),
        ({"state_dtype": "int8+int4"}, "has state_dtype 'fp32', 'bf16', 'int8', not 'int8+int4'"),
        ({"dtype": torch.float16}, "updates torch.float32, torch.bfloat16, not torch.float16"),
        ({"dtype": torch.float64}, "updates torch.float32, torch.bfloat16, not torch.float64"),
        ({"grad_dtype": torch.float64}, "updates torch.float32, torch.bfloat16, not torch.float64"),
        ({"state_dtype": "int8"}, None),
    ],
)
def test_auto_says_once_why_it_takes_plain_pytorch(options, reason):
    assert plain_steps("auto", **options) == [
        f"MISA steps in plain PyTorch, which is slow: backend 'cpu' {reason}; say backend='reference' if that is meant"
    ] * (reason is not None)
    assert plain_steps("reference", **options) == []


def test_what_each_backend_of_a_device_lacks_is_said(gpu_machine, monkeypatch):
    def why(dtype, storage, device=CUDA):
        return kernels.why_plain([SimpleNamespace(device=device, dtype=dtype)], storage)

    assert why(torch.float16, Storage("fp8")) is None
    assert "'triton' updates torch.float32, torch.bfloat16, torch.float16, not torch.float64; 'cuda' updates" in why(
        torch.float64, PLAIN
    )
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert "'triton' needs Triton 3.6, got 3.5.1: install torch 2.10 or later, which brings it; 'cuda' " in why(
        torch.float32, PLAIN
    )
    assert "'cuda' has state_dtype 'fp32', not 'int8'; say" in why(torch.float32, Storage("int8"))
    assert "'cuda' has no param_precision='split'; say" in why(torch.bfloat16, Storage(param_precision="split"))
    # Nothing is compiled for it.
    assert why(torch.float32, PLAIN, torch.device("mps")) is None


def test_the_cuda_library_has_float32_without_residuals(gpu_machine):
    for storage in (Storage("bf16"), Storage("int8"), Storage("fp8"), Storage(param_precision="split")):
        with pytest.raises(
            RuntimeError, match=f"'cuda' has no state_dtype={storage.state_dtype!r}.*use backend='auto'"
        ):
            kernels.select("cuda", CUDA, {torch.bfloat16}, storage)
    assert kernels.select("cuda", CUDA, {torch.bfloat16}, Storage(param_precision="stochastic")) is CudaTable


def test_old_triton_is_named_with_what_brings_a_new_one(gpu_machine, monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    with pytest.raises(ValueError, match="needs Triton 3.6, got 3.5.1: install torch 2.10 or later"):
        kernels.check("triton")
    assert kernels.select("auto", CUDA, {torch.float32}, PLAIN) is PlainStep


def test_triton_asked_for_is_never_replaced(gpu_machine):
    kernels.check("triton")
    optimizer = MISA([nn.Parameter(torch.ones(2, 2))], delta=1.0, backend="triton")
    with pytest.raises(RuntimeError, match="float32 weights or gradients on cpu.*use backend='auto'"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="float64"):
        kernels.select("triton", CUDA, {torch.float64}, PLAIN)


@pytest.mark.parametrize("backend, running", [("auto", "cpu"), ("cpu", "cpu"), ("reference", "reference")])
def test_optimizer_says_what_runs_its_steps(backend, running):
    param = nn.Parameter(torch.ones(2, 2))
    optimizer = MISA([param], delta=1.0, backend=backend)
    assert optimizer.backend is None
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.backend == running


def test_triton_without_a_gpu_is_refused_at_construction(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a CUDA device.*'auto' takes what there is"):
        MISA([nn.Parameter(torch.ones(2, 2))], delta=1.0, backend="triton")
