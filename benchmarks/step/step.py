"""What does a step cost on this CPU? The peers of `benchmarks.step.cpu`, each on its own, for pytest-benchmark.

`python -m benchmarks.step cpu` lets them take turns, which is fairer where the machine has other work too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.step.cpu import CASES, CPU_PEERS, initial, prepare

# The notice of what is sampled is for people who train.
pytestmark = pytest.mark.filterwarnings("ignore:MISA samples:UserWarning")


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
