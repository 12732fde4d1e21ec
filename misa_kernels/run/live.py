"""The live state: which slots are trained now, where their state lies, and what `optimizer.state` shows of it.

Others may write to `optimizer.state` at any time; what they wrote is taken into the arena before the next step.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Collection, Container, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from misa_kernels.clock import Clock
from misa_kernels.draw.partition import Block
from misa_kernels.kernels import Row
from misa_kernels.memory.arena import Arena
from misa_kernels.memory.storage import KEYS, MOMENTS, Storage, convert
from misa_kernels.outside.state import State
from misa_kernels.ranks.shards import like, local
from misa_kernels.reference import noise_key
from misa_kernels.run.layout import COUNTERS, SHOWN, Layout
from misa_kernels.run.parts import here


class LiveState:
    """Rows and arena of what is trained now, and `optimizer.state`, which shows views of it.

    Args:
        layout: What may be trained.
        storage: How state is stored.
        root: Whether scores add up ‖g‖ instead of ‖g‖².
        clock: Keys the noise of what is converted.

    Attributes:
        layout: As given, or as `move` was.
        storage: As given.
        root: As given.
        state: What the optimizer shows as its `state`.
        storage_in_state: How the moments in `state` are stored: as they were loaded, until the first step.
        arena: The memory, or None before the first step.
        rows: The row of each slot that is trained now; empty before the first step.
    """

    def __init__(self, layout: Layout, storage: Storage, root: bool, clock: Clock) -> None:
        self.layout = layout
        self.storage = self.storage_in_state = storage
        self.root = root
        self._clock = clock
        self.state = State()
        self.arena: Arena | None = None
        self.rows: dict[int, Row] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of moments, masters and residuals, 0 before the first step."""
        return 0 if self.arena is None else self.arena.nbytes

    # Where it begins, and a switch.

    def allocate(self, device: torch.device) -> dict[Tensor, dict[str, Any]]:
        """Allocate the arena on a device, and return what `state` had of each parameter, for `restore`."""
        layout, blocks = self.layout, self.layout.blocks
        whole = [block.numel for block in blocks]
        # Of shards, the parts here.
        rows = None if layout.ranks is None else list(map(layout.row, range(len(blocks))))
        self.arena = Arena(
            whole if rows is None else [row.numel for row in rows],
            [block.param.dtype for block in blocks],
            range(layout.dense),
            layout.partition.most,
            device,
            storage=self.storage,
            whole=None if rows is None else whole,
            counted=None if rows is None else [row.is_counted for row in rows],
        )
        loaded = {param: dict(own) for param, own in self.state.items()}
        self._show_numbers()
        return loaded

    def lend(self, leave: Collection[int], enter: Sequence[int], clear: bool) -> None:
        """Give the memory of the slots that leave to those that enter, at age 0.

        Args:
            leave: Slots that leave; their state is gone.
            enter: Slots that enter; one of `leave` may be among them.
            clear: Whether moments of what enters are set to 0, and masters to the weights.
        """
        assert self.arena is not None
        for slot in leave:
            del self.rows[slot]
            self._drop(slot)
        self.arena.lend(list(self.rows), enter, clear=clear)
        entering = {slot: self.layout.row(slot) for slot in enter}
        self.rows |= entering
        for slot, row in self.rows.items():
            self._show(row)
            if clear and slot in entering and "master" in (views := self.arena.views(slot)):
                views["master"].copy_(row.weight())

    def restore(self, loaded: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Put what was loaded into the arena; a slot of which not all was begins anew."""
        layout, arena = self.layout, self.arena
        assert arena is not None
        for param, own in loaded.items():
            for name, vector in arena.vectors.items():
                if name in own:
                    vector[layout.spans[param]].copy_(own[name].reshape(-1))
        if layout.ranks is not None and not (layout.ranks.is_first or self.root):
            # What was saved is the sum over ranks, and would be added up again.
            arena.score_sum.zero_()
        for slot, row in self.rows.items():
            own = loaded.get(row.param, {})
            moments = self.storage_in_state.buffers(row.param.dtype).keys() & set(MOMENTS)
            if "age" in own and own.keys() >= {layout.key(name, slot) for name in moments}:
                self._restore(row, own)
            else:
                self._begin(row)
        self.storage_in_state = self.storage

    def _restore(self, row: Row, own: Mapping[str, Any]) -> None:
        """Put what was loaded of one slot into the arena, converted if it was stored otherwise."""
        assert self.arena is not None
        keys = {name: self.layout.key(name, row.slot) for name in KEYS}
        block = self.layout.blocks[row.slot]
        saved = {name: here(own[key], block).to(self.arena.device) for name, key in keys.items() if key in own}
        views, weight = self.arena.views(row.slot), row.weight()
        # Of weights that were cast since they were saved there may be none in it, or more than they need now.
        if weight.element_size() != 2:
            saved = {name: value for name, value in saved.items() if name in MOMENTS}
        if "master" in views:
            views["master"].copy_(weight)
        if "residual" in views:
            views["residual"].zero_()
        if self.storage_in_state == self.storage:
            for name, value in saved.items():
                views[name].copy_(value)
        elif saved:
            key = noise_key(self._clock.seed, 2 * self._clock.steps + 1, row.index)
            convert(saved, self.storage_in_state, views, self.storage, weight, row.noise_start, key)

    def _begin(self, row: Row) -> None:
        """Let a slot that is trained begin anew, at age 0."""
        assert self.arena is not None
        views = self.arena.views(row.slot)
        for held in (self.arena.age[row.slot], *views.values()):
            held.zero_()
        if "master" in views:
            views["master"].copy_(row.weight())

    # What is shown of it.

    def _show_numbers(self) -> None:
        """Put the numbers of every slot where torch's tools look for them."""
        assert self.arena is not None
        self.state.put(self.layout.spans, {n: self.layout.pieces(v) for n, v in self.arena.vectors.items()})

    def _show(self, row: Row) -> None:
        """Put views of a slot's state there."""
        assert self.arena is not None
        block, shown, numel = self.layout.blocks[row.slot], {}, row.numel
        shape, whole = block.shape_in(local(row.param)), block.shape_in(row.param)
        for name, view in self.arena.views(row.slot).items():
            shaped = view.view(shape) if view.numel() == numel else view
            shown[self.layout.key(name, row.slot)] = like(shaped, row.param, whole)
        self.state[row.param].put(shown)

    def _keys(self, own: Mapping[str, Any], slot: int) -> list[str]:
        """Return under which keys an entry of the state holds what belongs to one slot, numbers apart."""
        return [key for name in KEYS if (key := self.layout.key(name, slot)) in own]

    def _drop(self, slot: int) -> None:
        """Drop from the state what belongs to one slot, numbers apart."""
        own = self.state[self.layout.blocks[slot].param]
        for key in self._keys(own, slot):
            own.drop(key)

    @property
    def score_sum(self) -> Tensor:
        """Scores of this round by slot, over all ranks, as of the last `collect`; all of them must ask for it."""
        assert self.arena is not None
        ranks, score_sum = self.layout.ranks, self.arena.score_sum
        return score_sum if ranks is None or self.root else self.arena.sum_over(ranks, score_sum)

    def ages(self) -> npt.NDArray[np.int64]:
        """Return the updates of each module since its activation, 0 where it is not active; waits."""
        ages = np.zeros(len(self.layout.blocks), dtype=np.int64)
        for param, span in self.layout.spans.items():
            # From the state, which has those that were loaded before the first step, too.
            own: Mapping[str, Any] = self.state.get(param, {})
            if "age" in own:
                ages[span] = own["age"].cpu()
        return self.layout.max(ages)

    # What somebody else wrote to it.

    def check(self) -> None:
        """Refuse what does not fit.

        Raises:
            ValueError: With the name of the first one.
        """
        storage = self.storage if self.arena is not None else self.storage_in_state
        for param, wanted in self.layout.sizes(storage).items():
            own: Mapping[str, Any] = self.state.get(param, {})
            for name in own.keys() & wanted.keys():
                if isinstance(own[name], Tensor) and own[name].numel() not in (wanted[name], 1):
                    raise ValueError(
                        f"optimizer.state has {name!r} of shape {tuple(own[name].shape)} for "
                        f"{self.layout.name_of(self.layout.spans[param].start)}, where {wanted[name]} elements belong: "
                        "write as many, or delete the entry to begin anew"
                    )

    def take_over(self) -> None:
        """Take what `state` has into the arena, and show that again; what is missing there begins anew."""
        assert self.arena is not None
        for param, span in self.layout.spans.items():
            own = self.state[param]
            for name, vector in self.arena.vectors.items():
                _take(vector[span], own.get(name, 0))
        for slot, row in self.rows.items():
            own, views = self.state[row.param], self.arena.views(slot)
            saved = {name: own[key] for name in views if (key := self.layout.key(name, slot)) in own}
            if "age" in own and saved.keys() >= views.keys() & set(MOMENTS):
                self._take_over(row, own, saved)
            else:
                self._begin(row)
        self._show_numbers()
        for row in self.rows.values():
            self._show(row)

    def _take_over(self, row: Row, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
        """Take over what an entry of `state` holds of one slot, `saved` being what the arena has a place for."""
        assert self.arena is not None
        views = self.arena.views(row.slot)
        for name, value in saved.items():
            _take(views[name], value, self.layout.blocks[row.slot])

    # Saved, loaded, moved to another layout.

    def to_save(self, saved: Mapping[Any, Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
        """Return a copy of the state, by position of the parameter, for a state dict; waits for the device.

        Scores are those over all ranks, and what means nothing is left out: moments and masters without an update.
        """
        copied = _detached(saved, self.layout)
        if self.arena is None:
            return copied
        if self.layout.ranks is not None:
            score_sum = self.score_sum
            for span in self.layout.spans.values():
                copied[self.layout.blocks[span.start].index]["score_sum"].copy_(score_sum[span])
        ages = self.arena.age.tolist()
        for slot, row in self.rows.items():
            if ages[slot] == 0:
                for key in self._keys(copied[row.index], slot):
                    del copied[row.index][key]
        return copied

    def load(self, own: Mapping[Tensor, Mapping[str, Any]], storage: Storage) -> None:
        """Show what was saved of each parameter and nothing else; there is no arena until the next step.

        Args:
            own: What was.
            storage: How it is stored.
        """
        self.storage_in_state = storage
        dict.clear(self.state)
        for param, tensors in own.items():
            kept = {name: _copied(value) for name, value in tensors.items() if name not in SHOWN}
            # An entry would make `state_dict()` another one than was saved.
            if kept:
                self.state[param].put(kept)
        self.state.changed[0] = False

    def put_away(self) -> None:
        """Show copies of what the arena holds, which is about to be forgotten."""
        self.storage_in_state = self.storage
        for param, own in _detached(self.state, self.layout).items():
            # What belongs to a round that has ended.
            for name in ("updates", "score_sum"):
                own.pop(name, None)
            dict.clear(self.state[param])
            self.state[param].put(own)

    def move(self, layout: Layout, leave: Sequence[int], same: Container[int]) -> None:
        """Go on with another layout.

        Args:
            layout: The layout.
            leave: Slots whose state is dropped.
            same: Positions of the parameters that are cut as before.
        """
        params = {block.index: block.param for block in layout.blocks}
        for slot in leave:
            param = self.layout.blocks[slot].param
            self._drop(slot)
            if "age" in self.state[param]:
                self.state[param]["age"][slot - self.layout.spans[param].start] = 0
        for param, index in {block.param: block.index for block in self.layout.blocks}.items():
            self.state.move(param, params[index] if index in same else None)
        self.layout = layout

    def forget(self) -> None:
        """Drop rows and arena; what is in `state` counts from now on."""
        self.arena = None
        self.rows = {}


def _detached(state: Mapping[Any, Mapping[str, Any]], layout: Layout) -> dict[Any, dict[str, Any]]:
    """Return a copy of a state whose tensors share no memory with it.

    Views of one vector (the scores of 20,000 modules, say) remain views of one vector, so that saving them
    writes one storage.

    Args:
        state: The state, by anything.
        layout: The layout of which its vectors are.
    """
    copies: dict[int, Tensor] = {}
    # The pieces of the copies, by name and the address of what they are copies of: a look there takes a tenth of what
    # `_base` and a view do.
    pieces: dict[str, dict[int, Tensor]] = {}

    def copied(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or name not in COUNTERS and name not in SHOWN:
            return _copied(value)
        piece = pieces[name].get(value.data_ptr()) if name in pieces else None
        if piece is not None and piece.numel() == value.numel():
            return piece
        base = value._base
        if base is None:
            return _copied(value)
        if id(base) not in copies:
            copies[id(base)] = base.detach().clone()
            pieces[name] = layout.pieces_by_address(copies[id(base)], base.data_ptr())
        return copies[id(base)].as_strided(value.size(), value.stride(), value.storage_offset())

    return {param: {name: copied(name, value) for name, value in own.items()} for param, own in state.items()}


def _copied(value: Any) -> Any:
    """Return a copy of a tensor, or of lists and dicts with those in them."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return tree_map(_copied, value) if isinstance(value, (list, tuple, dict, deque)) else copy.copy(value)


def _take(place: Tensor, value: Any, block: Block | None = None) -> None:
    """Take over a number, or as many as there are; of a block's tensor the part here."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        place.fill_(value.reshape(()) if isinstance(value, Tensor) else value)
        return
    part = value.flatten() if block is None or value.numel() != block.numel else here(value, block)
    if part.data_ptr() != place.data_ptr():
        place.copy_(part)
