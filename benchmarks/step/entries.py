"""What do a step and a switch cost on this CPU, each on its own, for pytest-benchmark?

`python -m benchmarks.step cpu` lets the peers take turns, which is fairer where the machine has other work too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.step.cpu import CASES, CPU_PEERS, initial, prepare
from misa_kernels import MISA, CyclicSampler, ImportanceSampler, UniformSampler

# The notice of what is sampled is for people who train.
pytestmark = pytest.mark.filterwarnings("ignore:MISA samples:UserWarning")
# Tensors so small that the update is all overhead; 200 of them are active.
MODULES, DELTA = 20_000, 0.01


@pytest.mark.parametrize("name", CPU_PEERS)
@pytest.mark.parametrize("case", CASES)
def test_step(benchmark: Any, case: Any, name: str) -> None:
    """MISA keeps float32 moments and masters of bfloat16 weights, torch's AdamW bfloat16 moments alone."""
    peer = CPU_PEERS[name]
    benchmark.group = f"LLaMA of {case}, {peer.dtype}, {torch.get_num_threads()} threads"
    try:
        step, *_ = prepare(peer, initial(CASES[case], peer.dtype))
    # Missing, or not for CPUs.
    except (ImportError, NotImplementedError) as error:
        pytest.skip(str(error))
    benchmark.pedantic(step, rounds=5)


@pytest.mark.parametrize("inner_steps", [1, 1_000_000], ids=["with switch", "without"])
@pytest.mark.parametrize("sampler", [ImportanceSampler(), UniformSampler(), CyclicSampler()])
def test_switch(benchmark: Any, sampler: Any, inner_steps: int) -> None:
    """The difference of the two lines of a sampler is its switch."""
    benchmark.group = f"{MODULES} modules, {type(sampler).__name__}"
    weights = [torch.zeros(4, 4, requires_grad=True) for _ in range(MODULES)]
    optimizer = MISA(weights, delta=DELTA, inner_steps=inner_steps, sampler=sampler)

    def new_gradients() -> None:
        for number in optimizer.active:
            weights[number].grad = torch.full((4, 4), 1.0 + number)

    benchmark.pedantic(optimizer.step, setup=new_gradients, rounds=20, warmup_rounds=3)
