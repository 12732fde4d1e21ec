"""Which backend runs: by name, device, dtype and what is installed; never another one in silence."""

import re

import pytest
import torch
import triton
from torch import nn

from misa_kernels import MISA, kernels
from misa_kernels.codec import FORMATS
from misa_kernels.kernels.native import CpuStep, CudaStep
from misa_kernels.kernels.plain import PlainStep
from misa_kernels.storage import PRECISIONS, Storage

PLAIN = Storage()
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu_machine(monkeypatch):
    """A machine on which torch reports a CUDA device, without the interpreter."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_auto_takes_the_fused_step_where_it_can_run(gpu_machine):
    fused = kernels.select("auto", CUDA, {torch.float32, torch.bfloat16}, PLAIN)
    assert fused.__name__ == "TritonStep"
    assert kernels.select("triton", CUDA, {torch.float16}, PLAIN) is fused
    assert kernels.select("auto", CPU, {torch.float32}, PLAIN) is CpuStep
    assert kernels.select("auto", CUDA, {torch.float32, torch.float64}, PLAIN) is PlainStep
    assert kernels.select("reference", CUDA, {torch.float32}, PLAIN) is PlainStep


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("state_dtype", FORMATS)
def test_the_cpu_library_has_all_formats_but_those_of_triton(state_dtype, precision):
    storage, dtypes = Storage(state_dtype, precision), {torch.float32, torch.bfloat16}
    has = state_dtype in ("fp32", "bf16", "int8")
    assert kernels.select("auto", CPU, dtypes, storage) is (CpuStep if has else PlainStep)
    assert kernels.select("reference", CPU, dtypes, storage) is PlainStep
    if has:
        assert kernels.select("cpu", CPU, dtypes, storage) is CpuStep
        return
    optimizer = MISA(
        [nn.Parameter(torch.ones(2, 2))], delta=1.0, backend="cpu", state_dtype=state_dtype, param_precision=precision
    )
    message = f"'cpu' has no state_dtype={state_dtype!r} with param_precision={precision!r}: use backend='auto'"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        optimizer.step()


def test_the_cuda_library_has_float32_without_residuals(gpu_machine):
    for storage in (Storage("bf16"), Storage("int8"), Storage("fp8"), Storage(param_precision="split")):
        with pytest.raises(
            RuntimeError, match=f"'cuda' has no state_dtype={storage.state_dtype!r}.*use backend='auto'"
        ):
            kernels.select("cuda", CUDA, {torch.bfloat16}, storage)
    assert kernels.select("cuda", CUDA, {torch.bfloat16}, Storage(param_precision="stochastic")) is CudaStep


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
