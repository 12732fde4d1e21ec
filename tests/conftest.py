"""What all tests share: the devices, the threads and the settings of hypothesis."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from hypothesis import settings

# Two pytest-xdist workers with a thread a core each would wait for one another. Child processes inherit
# the variable, this process has read it already.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# An example's time on a shared core says nothing about the code.
settings.register_profile("misa", deadline=None, print_blob=True)
settings.load_profile("misa")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    # What was imported is no garbage. Going through all of it takes a collection of a test's own up to half a second,
    # and there is one in every measurement of memory.
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
