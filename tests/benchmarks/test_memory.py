"""Does PeakMemory count what tensors hold, no more and no less?"""

from __future__ import annotations

import pytest
import torch

from benchmarks.memory import PeakMemory

# The GPU's allocator rounds up to 512 bytes; these sizes are multiples of it.
FLOATS, BYTES = 1024, 4096


def test_peak_and_what_is_held_at_the_end(device: torch.device) -> None:
    with PeakMemory(device) as memory:
        first = torch.empty(FLOATS, device=device)
        second = torch.empty(2 * FLOATS, device=device)
        del first
        third = torch.empty(FLOATS, device=device)
        del second
    assert memory.peak_bytes == 4 * BYTES - BYTES
    assert memory.held_bytes == third.nbytes == BYTES


def test_a_view_costs_nothing_and_an_operator_costs_its_result(device: torch.device) -> None:
    with PeakMemory(device) as memory:
        x = torch.empty(64, FLOATS // 64, device=device)
        view = x.t()[:3]
        result = x.exp()
    assert memory.peak_bytes == memory.held_bytes == x.nbytes + result.nbytes == 2 * BYTES
    assert view.data_ptr() == x.data_ptr()


def test_what_was_there_before_does_not_count(device: torch.device) -> None:
    before = torch.empty(100 * FLOATS, device=device)
    with PeakMemory(device) as memory:
        before.add_(1)
        during = torch.empty(FLOATS, device=device)
    assert memory.peak_bytes == memory.held_bytes == during.nbytes


def test_activations_are_held_until_backward_for_what_needs_a_gradient(device: torch.device) -> None:
    x = torch.empty(FLOATS, device=device, requires_grad=True)
    with PeakMemory(device) as training:
        y = x
        for _ in range(10):
            y = y.exp()
    with PeakMemory(device) as inference, torch.no_grad():
        z = x
        for _ in range(10):
            z = z.exp()
    assert training.peak_bytes == 10 * BYTES
    assert inference.peak_bytes == 2 * BYTES


def test_release_counts_where_a_context_saw_the_allocation(device: torch.device) -> None:
    with PeakMemory(device) as first:
        seen = torch.empty(2 * FLOATS, device=device)
    with PeakMemory(device) as second:
        del seen
    assert first.held_bytes == 2 * BYTES
    assert second.held_bytes == -2 * BYTES and second.peak_bytes == 0


def test_it_can_be_used_again_and_passes_errors_on() -> None:
    memory = PeakMemory()
    with pytest.raises(KeyError), memory:
        torch.empty(FLOATS)
        raise KeyError
    assert memory.peak_bytes == BYTES
    with memory:
        pass
    assert memory.peak_bytes == 0


def test_a_bfloat16_product_costs_its_result_on_every_processor() -> None:
    x = torch.ones(256, 256, dtype=torch.bfloat16)
    before = torch._C._get_mkldnn_enabled()
    with PeakMemory() as memory:
        product = x @ x
    assert memory.peak_bytes == memory.held_bytes == product.nbytes
    # And outside the context such products are as fast as they were.
    assert torch._C._get_mkldnn_enabled() == before


def test_a_device_without_allocations_is_refused() -> None:
    with pytest.raises(ValueError, match="device=meta must be a cpu or cuda device"):
        PeakMemory("meta")
