"""What does a step cost on this CPU beside torch's AdamW, all tensors active and no round ending?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from misa_kernels import MISA

# The notice of what is sampled is for people who train.
pytestmark = pytest.mark.filterwarnings("ignore:MISA samples:UserWarning")

# 16 weights of 512 x 512: 4.2 million elements, enough to leave the caches.
SIZE = 512
TENSORS = 16

OPTIMIZERS: dict[str, Any] = {
    "misa": lambda params: MISA(params, delta=1.0, inner_steps=1_000_000),
    "adamw-foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "adamw-fused": lambda params: torch.optim.AdamW(params, fused=True),
}


def weights_with_gradients(dtype: torch.dtype) -> list[Tensor]:
    """Return random weights, each with a random gradient."""
    generator = torch.Generator().manual_seed(0)
    weights = []
    for _ in range(TENSORS):
        weight = torch.randn(SIZE, SIZE, generator=generator).to(dtype).requires_grad_()
        weight.grad = torch.randn(SIZE, SIZE, generator=generator).to(dtype)
        weights.append(weight)
    return weights


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_step(benchmark: Any, name: str, dtype: torch.dtype) -> None:
    """MISA keeps float32 moments and masters of bfloat16 weights, torch's AdamW bfloat16 moments alone."""
    benchmark.group = f"step of {TENSORS} x {SIZE}^2 {dtype}, {torch.get_num_threads()} threads"
    optimizer = OPTIMIZERS[name](weights_with_gradients(dtype))
    benchmark.pedantic(optimizer.step, rounds=20, warmup_rounds=3)
