"""What does a switch cost with 20,000 modules: a step that ends a round, beside one that does not?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from misa_kernels import MISA, CyclicSampler, ImportanceSampler, UniformSampler

# The notice of what is sampled is for people who train.
pytestmark = pytest.mark.filterwarnings("ignore:MISA samples:UserWarning")

MODULES = 20_000
# Tensors so small that the update is all overhead; 200 of them are active.
DELTA = 0.01

SAMPLERS = {"importance": ImportanceSampler, "uniform": UniformSampler, "cyclic": CyclicSampler}


@pytest.mark.parametrize("inner_steps", [1, 1_000_000], ids=["with switch", "without"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_switch(benchmark: Any, sampler: str, inner_steps: int) -> None:
    """The difference of the two lines of a sampler is its switch."""
    benchmark.group = f"{MODULES} modules, {sampler}"
    weights = [torch.zeros(4, 4, requires_grad=True) for _ in range(MODULES)]
    optimizer = MISA(weights, delta=DELTA, inner_steps=inner_steps, sampler=SAMPLERS[sampler]())

    def new_gradients() -> None:
        for number in optimizer.active:
            weights[number].grad = torch.full((4, 4), 1.0 + number)

    benchmark.pedantic(optimizer.step, setup=new_gradients, rounds=20, warmup_rounds=3)
