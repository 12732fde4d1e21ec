"""The arena: capacity bounds every admissible set, contents survive moves, newcomers start from zero."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from misa_kernels.memory import arena as arena_module
from misa_kernels.memory.arena import ALIGNMENT, Arena, capacity, move_down, padded
from misa_kernels.memory.codec import FORMATS
from misa_kernels.memory.storage import PRECISIONS, Storage


def as_bytes(buffer):
    return buffer.view(torch.uint8)


@given(st.integers(0, 500), st.integers(1, 500), st.integers(1, 700), st.integers(1, 64))
def test_move_down_equals_a_copy_through_a_second_buffer(target, shift, numel, piece):
    buffer = torch.arange(target + shift + numel + 5)
    expected = buffer.clone()
    expected[target : target + numel] = buffer[target + shift : target + shift + numel]
    original, arena_module.MOVE_ELEMENTS = arena_module.MOVE_ELEMENTS, piece
    try:
        move_down(buffer, target + shift, target, numel)
    finally:
        arena_module.MOVE_ELEMENTS = original
    assert torch.equal(buffer[: target + numel], expected[: target + numel])
    # What lies behind the source is somebody else's.
    assert torch.equal(buffer[target + shift + numel :], expected[target + shift + numel :])


@given(
    st.lists(st.integers(1, 300), max_size=3),
    st.lists(st.integers(1, 300), min_size=1, max_size=9),
    st.integers(1, 1500),
)
@settings(max_examples=150)
def test_capacity_holds_every_admissible_set(always, candidates, budget):
    room = capacity(always, candidates, budget) - sum(map(padded, always))
    for mask in range(2 ** len(candidates)):
        chosen = [size for i, size in enumerate(candidates) if mask >> i & 1]
        if sum(chosen) <= budget:
            assert sum(map(padded, chosen)) <= room
    assert room <= sum(map(padded, candidates))


@given(
    st.lists(st.integers(1, 400), min_size=4, max_size=12),
    st.lists(st.sets(st.integers(0, 11)), min_size=2, max_size=8),
    st.builds(Storage, st.sampled_from(sorted(FORMATS)), st.sampled_from(PRECISIONS)),
)
@settings(max_examples=150)
def test_contents_survive_any_sequence_of_switches(numel, sets, storage):
    dtypes = [torch.bfloat16 if i % 3 == 0 else torch.float32 for i in range(len(numel))]
    arena = Arena(numel, dtypes, [0], sum(numel), torch.device("cpu"), storage=storage)
    for pool in arena.pools.values():
        for buffer in pool.buffers.values():
            as_bytes(buffer).fill_(255)
    nbytes = arena.nbytes
    arena.lend([], [0])
    expected = {0: 1}
    for view in arena.views(0).values():
        as_bytes(view).fill_(1)
    for number, drawn in enumerate(sets, start=1):
        drawn = {slot for slot in drawn if 0 < slot < len(numel)}
        keep = [slot for slot in expected if slot in drawn or slot == 0]
        enter = sorted(drawn - set(keep))
        arena.lend(keep, enter)
        for slot in enter:
            expected[slot] = 12 * number + slot
            for name, view in arena.views(slot).items():
                # Masters are left for the caller to fill.
                assert name == "master" or not as_bytes(view).any()
                as_bytes(view).fill_(expected[slot])
        expected = {slot: expected[slot] for slot in [*keep, *enter]}
        for slot, value in expected.items():
            views, kinds = arena.views(slot), storage.buffers(dtypes[slot])
            assert views.keys() == kinds.keys()
            assert arena.offset(slot) % ALIGNMENT == 0
            for name, view in views.items():
                assert view.dtype == kinds[name].dtype
                assert view.shape == (-(-numel[slot] // kinds[name].elements) * kinds[name].entries,)
                assert (as_bytes(view) == value).all(), name
                # In a group of its own, with the scale that belongs to it.
                assert view.storage_offset() == arena.offset(slot) // kinds[name].elements * kinds[name].entries
    assert arena.nbytes == nbytes


def test_round_is_read_in_slot_order_and_skips_count_nothing():
    arena = Arena([4] * 5, [torch.float32] * 5, [], 20, torch.device("cpu"), storage=Storage())
    arena.lend([], [1, 3, 4])
    for finite, missing in ((True, []), (False, []), (True, [3]), (None, [])):
        arena.sq_norm[[1, 3, 4]] = torch.tensor([1.0, 10.0, 100.0 if finite is not False else torch.nan]).double()
        arena.sq_norm[missing] = 0.0
        updated = [slot for slot in (1, 3, 4) if slot not in missing]
        arena.advance(updated, updated, None if finite is None else torch.tensor(finite))
    (score_sum, updates), skipped = arena.read_round(arena.score_sum, arena.updates)
    np.testing.assert_array_equal(score_sum, [0, 3, 0, 20, 300])
    np.testing.assert_array_equal(updates, [0, 3, 0, 2, 3])
    assert arena.age.tolist() == [0, 3, 0, 2, 3]
    assert skipped == 1
    arena.lend([4], [0, 1])
    assert arena.age.tolist() == [0, 0, 0, 0, 3]
    assert not arena.read_round(arena.score_sum)[0].any()
