"""The tensors trained now: their rows for the kernels, and what happens when they enter and leave."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from misa_kernels.clock import Clock
from misa_kernels.draw.partition import Block
from misa_kernels.gradients.sliced import SlicedGradient
from misa_kernels.kernels import Backend, Row, Settings, Step, prepare, select
from misa_kernels.kernels.table import ADOPT, ALL, FLUSH, NONE, WRITE_BACK
from misa_kernels.layout import NUMBERS, SCORES, Layout
from misa_kernels.memory.arena import Arena
from misa_kernels.memory.storage import KEYS, MOMENTS, Storage, convert
from misa_kernels.options import Options
from misa_kernels.outside.state import State
from misa_kernels.outside.tracing import refuse_capture
from misa_kernels.outside.weights import Weights
from misa_kernels.ranks.shards import is_sharded, like, local, local_like
from misa_kernels.reference import Hyper, noise_key
from misa_kernels.release import Arrivals

# `map` runs it without the interpreter.
GRAD = attrgetter("grad")


class Trained:
    """Always-on and active tensors with their state, which `optimizer.state` shows as views.

    Args:
        layout: What may be trained.
        groups: The optimizer's live `param_groups`.
        options: Its other arguments.
        storage: How state is stored.
        root: Whether scores add up ‖g‖ instead of ‖g‖².
        clock: Keys the noise of stochastic rounding.

    Attributes:
        layout: As given, or as `exchange` was.
        state: What the optimizer shows as its `state`.
        storage_in_state: How the moments in `state` are stored: as they were loaded, until the first step.
        arena: The memory, or None before the first step.
        rows: The row of each slot that is trained now; empty before the first step.
        rule: What updates, where that is not AdamW of ours: the classes of its optimizers.
        defaults: The hyperparameters of its first group that it updates.
    """

    rule: str | None = None
    defaults: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        layout: Layout,
        groups: list[dict[str, Any]],
        options: Options,
        storage: Storage,
        root: bool,
        clock: Clock,
    ) -> None:
        self.layout = layout
        self._groups = groups
        self._options = options
        self._storage = self.storage_in_state = storage
        self._root = root
        self._clock = clock
        self.state = State()
        self.arena: Arena | None = None
        self.rows: dict[int, Row] = {}
        self._backend: Backend | None = None
        self._step: Step | None = None
        self._weights = Weights([], [], False)
        # The gradients that came in this step, see `receive`, and its hyperparameters.
        self._arrivals: Arrivals | None = None
        self._has_slices = False
        self._hyper: list[Hyper] | None = None

    @property
    def backend(self) -> str | None:
        """Name of what runs the steps, None before the first one."""
        return None if self._backend is None else self._backend.name

    @property
    def nbytes(self) -> int:
        """Bytes of moments, masters and residuals, 0 before the first step."""
        return 0 if self.arena is None else self.arena.nbytes

    @property
    def is_within_step(self) -> bool:
        """Whether gradients have come, with `release_gradients`, that `update` has not counted yet."""
        return bool(self._arrivals)

    # A step.

    def update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Take one optimizer step on all tensors that have a gradient.

        Args:
            grad_scale: What a GradScaler multiplied the gradients by, or None.
            found_inf: Nonzero where a GradScaler found a nonfinite gradient, or None.

        Raises:
            TypeError: For a gradient that is not dense; nothing is changed.
            RuntimeError: Within the capture of a CUDA graph; nothing is changed.
        """
        refuse_capture()
        if self._arrivals:
            self._use_gradients()
        else:
            # Of a step that failed some may be left.
            self._hyper = None
        self._adopt()
        rows = ALL
        grads = list(map(GRAD, self._weights.params))
        if self._has_slices:
            grads = self._parts_in(grads, ALL)
        if self.layout.ranks is not None:
            blocks = self.layout.blocks
            grads = [
                None if grad is None else _part_of_grad(grad, blocks[slot])
                for grad, slot in zip(grads, self.rows, strict=True)
            ]
        if self._arrivals:
            grads = self._arrivals.left_over(grads)
            if all(grad is None for grad in grads):
                grads, rows = [], NONE
        self._run(grads, rows, grad_scale, found_inf)
        self._hyper = None
        if self._arrivals:
            self._arrivals.begin()

    def receive(self, param: Tensor) -> None:
        """Update what waited only for this gradient, and free the gradients that nothing waits for any longer.

        A module of several tensors is updated when the last of their gradients is there, since its score is that of
        all of them; small ones wait for one another; `update` takes what is left over.

        Args:
            param: The parameter whose gradient is complete.

        Raises:
            RuntimeError: If it has had one since the last step, or within the capture of a CUDA graph.
        """
        refuse_capture()
        if self._arrivals is None:
            self._arrivals = Arrivals(list(self.rows.values()))
        if self._arrivals.has(param):
            raise RuntimeError(
                f"release_gradients=True got a second gradient of shape {tuple(param.shape)} before step(), and the "
                "first is used up: call step() after every backward(), or leave release_gradients out to accumulate"
            )
        if not self._arrivals:
            self._hyper = None
        was_waiting = self._arrivals.is_waiting
        if self._arrivals.note(param):
            self._use_gradients()
        elif self._arrivals.is_waiting and not was_waiting:
            # At the end of this backward pass, which may be one within another.
            torch.autograd.Variable._execution_engine.queue_callback(self._use_gradients)

    @torch.no_grad()
    def _use_gradients(self) -> None:
        """Update what all gradients of have come, and free these."""
        for rows in self._arrivals.use() if self._arrivals is not None else ():
            self._adopt(rows)
            grads = list(map(GRAD, self._weights.params[rows]))
            self._run(self._parts_in(grads, rows) if self._has_slices else grads, rows)

    def _parts_in(self, grads: Sequence[Tensor | None], rows: slice) -> list[Tensor | None]:
        """Return what of the gradients of some rows belongs to these, where they are slices."""
        own = zip(list(self.rows)[rows], grads, strict=True)
        return [None if grad is None else _part_in(grad, self.layout.blocks[slot]) for slot, grad in own]

    def _hyper_now(self) -> list[Hyper]:
        if self._hyper is None:
            self._hyper = [
                Hyper(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"])
                for group in self._groups
                for beta1, beta2 in (group["betas"],)
            ]
        return self._hyper

    def _run(
        self,
        grads: Sequence[Tensor | None],
        rows: slice,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        assert self._step is not None
        try:
            noise = self._clock.seed, 2 * self._clock.steps
            self._step.run(grads, self._weights.pointers, self._hyper_now(), noise, rows, grad_scale, found_inf)
        except (NotImplementedError, RuntimeError):
            # Asked only now: the layout of 300 gradients takes a quarter of the host's time in a step. A sparse
            # one has neither an address nor a flat view, so nothing has been launched.
            for slot, grad in zip(list(self.rows)[rows], grads, strict=True):
                if grad is not None and grad.layout is not torch.strided:
                    raise TypeError(
                        f"the gradient of {self.layout.name_of(slot)} is {grad.layout}: MISA updates dense gradients; "
                        "use sparse=False in the embedding, or give it the role 'frozen'"
                    ) from None
            raise
        if self._weights.is_refined:
            self._weights.note_versions(rows)

    # The end of a round, and a switch.

    def read_round(self) -> tuple[npt.NDArray[np.float64], int]:
        """Return five rows of numbers by slot, over all ranks, and the steps skipped in this round; waits.

        The rows are the scores and the updates of this round, the updates since activation, and the two of
        `RowTable.measure`.
        """
        assert self.arena is not None and self._step is not None
        self.collect()
        arena, ranks = self.arena, self.layout.ranks
        moved = self._step.measure(self._weights.pointers, self._hyper_now())
        self._hyper = None
        moved = moved if ranks is None else arena.sum_over(ranks, moved)
        return arena.read_round(self.score_sum, arena.updates, arena.age, *moved)

    def rehearse(self) -> None:
        """Take the memory that the end of a round takes, and change nothing."""
        assert self.arena is not None and self._step is not None
        self.read_round()
        self._step.rehearse(self._hyper_now())
        self._hyper = None
        self.arena.rehearse()
        # The tables of two rounds are there at once.
        self._made()

    def switch(self, leave: Iterable[int], enter: Sequence[int], frozen: Container[int] = ()) -> None:
        """Retire the slots that leave and train those that enter, at age 0, beside the ones that stay.

        A slot may leave and enter at once, and then starts afresh. Before the first step nothing happens.

        Args:
            leave: Slots that leave, flushed if that is on, and written back.
            enter: Slots that enter.
            frozen: Those that leave for good, without a flush.
        """
        if self.arena is None:
            return
        assert self._backend is not None
        self._adopt()
        leave = set(leave)
        self._close({slot: self._leaving(row, frozen) if slot in leave else ADOPT for slot, row in self.rows.items()})
        for slot in leave:
            del self.rows[slot]
            self._drop(slot)
        fill = self._backend.eager
        self.arena.lend(list(self.rows), enter, clear=fill)
        entering = {slot: self.layout.row(slot) for slot in enter}
        self.rows |= entering
        for slot, row in self.rows.items():
            self._show(row)
            if fill and slot in entering and "master" in (views := self.arena.views(slot)):
                views["master"].copy_(row.weight())
        self._prepare()

    def _leaving(self, row: Row, frozen: Container[int] = ()) -> int:
        """Return what is to be done with a row that leaves."""
        flush = self._options.momentum_flush and row.module is not None and row.slot not in frozen
        return WRITE_BACK | FLUSH if flush else WRITE_BACK

    def _close(self, actions: Mapping[int, int]) -> None:
        """Do with each slot what is left to do, where its state holds anything that its weight lacks."""
        assert self.arena is not None
        due = [
            action if (action := actions.get(slot, 0)) & FLUSH or self.arena.refines(slot) else 0 for slot in self.rows
        ]
        if any(due):
            assert self._step is not None
            noise = self._clock.seed, 2 * self._clock.steps + 1
            self._step.close(due, self._weights.pointers, self._hyper_now(), noise)
            self._hyper = None

    def _prepare(self) -> None:
        """Begin to train the rows of now."""
        assert self.arena is not None
        self._has_slices = self.layout.partition.slicing is not None
        self._weights.watch(list(self.rows), [n for n, slot in enumerate(self.rows) if self.arena.refines(slot)])
        self._step = self._made()
        self._arrivals = None

    def _select(self, device: torch.device, dtypes: Collection[torch.dtype]) -> Backend:
        return select(self._options.backend, device, dtypes, self._storage)

    def _made(self) -> Step:
        """Return the steps of the rows that are trained now."""
        assert self.arena is not None and self._backend is not None
        return prepare(self._backend, list(self.rows.values()), self.arena, self._settings())

    def _settings(self) -> Settings:
        options = self._options
        return Settings(
            max_grad_norm=options.max_grad_norm,
            skip_nonfinite=options.skip_nonfinite,
            storage=self._storage,
            root=self._root,
            ranks=self.layout.ranks,
        )

    def exchange(self, layout: Layout, kept: Container[tuple[int, int]]) -> None:
        """Go on with another layout; the state goes into `state` until the next step allocates the arena anew.

        Args:
            layout: The layout.
            kept: Places, see `Layout.places_of`, whose state stays, if it is trained now and the parameter is cut as
                before.
        """
        cuts, params = layout.cuts(), {block.index: block.param for block in layout.blocks}
        same = {index for index, cut in self.layout.cuts().items() if cuts.get(index) == cut}
        blocks = self.layout.blocks
        places = ((block.index, block.start) for block in blocks)
        leave = [n for n, place in enumerate(places) if place[0] not in same or place not in kept]
        if self.arena is not None:
            # What is frozen from now on moves no more than its master lets it.
            frozen = {slot for slot in leave if blocks[slot].index not in params}
            self.switch([slot for slot in leave if slot in self.rows], [], frozen)
            self.collect()
            held = _detached(self.state, self.layout)
            self.forget()
            self.storage_in_state = self._storage
            for param, own in held.items():
                # What belongs to a round that has ended.
                for name in ("updates", "score_sum"):
                    own.pop(name, None)
                dict.clear(self.state[param])
                self.state[param].put(own)
        for slot in leave:
            param = blocks[slot].param
            self._drop(slot)
            if "age" in self.state[param]:
                self.state[param]["age"][slot - self.layout.spans[param].start] = 0
        for param, index in {block.param: block.index for block in blocks}.items():
            self.state.move(param, params[index] if index in same else None)
        self.layout = layout

    # The state: where it begins, what is shown of it, what somebody else wrote to it.

    def allocate(self, enter: Iterable[int]) -> None:
        """Allocate the arena where the weights are now, lend it, and move loaded state into it.

        Args:
            enter: The sampled slots to begin with.

        Raises:
            RuntimeError: If the weights are on several devices, or on none, or within the capture of a CUDA graph.
        """
        refuse_capture()
        layout, blocks, ranks = self.layout, self.layout.blocks, self.layout.ranks
        devices = {block.param.device for block in blocks}
        if len(devices) > 1 or "meta" in {device.type for device in devices}:
            raise RuntimeError(
                f"the parameters are on {', '.join(sorted(map(str, devices)))}: MISA needs them on one device that "
                "holds data"
            )
        for block in blocks:
            if block.param.numel() and not (is_sharded(block.param) or block.param.untyped_storage().nbytes()):
                raise RuntimeError(
                    f"{layout.partition.names[block.index]} has no memory any more, as when FSDP2 had gathered it at "
                    "construction: call reshard() on the model before, or construct before its first forward"
                )
        device = devices.pop()
        dtypes = [block.param.dtype for block in blocks]
        grad_dtypes = {getattr(block.param, "grad_dtype", None) or block.param.dtype for block in blocks}
        self._backend = self._select(device, {*dtypes, *grad_dtypes})
        whole = [block.numel for block in blocks]
        # Of shards, the parts here.
        rows = None if ranks is None else list(map(layout.row, range(len(blocks))))
        self.arena = Arena(
            whole if rows is None else [row.numel for row in rows],
            dtypes,
            range(layout.dense),
            layout.partition.most,
            device,
            storage=self._storage,
            whole=None if rows is None else whole,
            counted=None if rows is None else [row.is_counted for row in rows],
        )
        loaded = {param: dict(own) for param, own in self.state.items()}
        names = [layout.name_of(slot) for slot in range(len(blocks))]
        self._weights = Weights([block.param for block in blocks], names, ranks is not None)
        self._show_numbers()
        self.switch([], [*range(layout.dense), *enter])
        for param, own in loaded.items():
            for name, vector in self.arena.vectors.items():
                if name in own:
                    vector[layout.spans[param]].copy_(own[name].reshape(-1))
        if ranks is not None and not (ranks.is_first or self._root):
            # What was saved is the sum over ranks, and would be added up again.
            self.arena.score_sum.zero_()
        for slot, row in self.rows.items():
            own = loaded.get(row.param, {})
            moments = self.storage_in_state.buffers(row.param.dtype).keys() & set(MOMENTS)
            if "age" in own and own.keys() >= {layout.key(name, slot) for name in moments}:
                self._restore(row, own)
            else:
                self._begin(row)
        self.storage_in_state = self._storage
        # Once more, with the ages and sums that were loaded.
        self._prepare()
        self._close(dict.fromkeys(self.rows, ADOPT))

    def _restore(self, row: Row, own: Mapping[str, Any]) -> None:
        """Put what was loaded of one slot into the arena, converted if it was stored otherwise."""
        assert self.arena is not None
        keys = {name: self.layout.key(name, row.slot) for name in KEYS}
        block = self.layout.blocks[row.slot]
        saved = {name: _here(own[key], block).to(self.arena.device) for name, key in keys.items() if key in own}
        views, weight = self.arena.views(row.slot), row.weight()
        # Of weights that were cast since they were saved there may be none in it, or more than they need now.
        if weight.element_size() != 2:
            saved = {name: value for name, value in saved.items() if name in MOMENTS}
        if "master" in views:
            views["master"].copy_(weight)
        if "residual" in views:
            views["residual"].zero_()
        if self.storage_in_state == self._storage:
            for name, value in saved.items():
                views[name].copy_(value)
        elif saved:
            key = noise_key(self._clock.seed, 2 * self._clock.steps + 1, row.index)
            convert(saved, self.storage_in_state, views, self._storage, weight, row.noise_start, key)

    def _begin(self, row: Row) -> None:
        """Let a slot that is trained begin anew, at age 0."""
        assert self.arena is not None
        views = self.arena.views(row.slot)
        for held in (self.arena.age[row.slot], *views.values()):
            held.zero_()
        if "master" in views:
            views["master"].copy_(row.weight())

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

    def load(
        self,
        own: Mapping[Tensor, Mapping[str, Any]],
        storage: Storage,
        hyperparameters: Sequence[Mapping[str, Any]],
    ) -> None:
        """Drop all state, and take over what was saved of each parameter, until the next step allocates the arena.

        Args:
            own: What was.
            storage: How it is stored.
            hyperparameters: Those of each group.
        """
        for group, values in zip(self._groups, hyperparameters, strict=True):
            group.update(values)
        self.forget()
        self.storage_in_state = storage
        dict.clear(self.state)
        for param, tensors in own.items():
            kept = {name: _copied(value) for name, value in tensors.items() if name not in SCORES}
            # An entry would make `state_dict()` another one than was saved.
            if kept:
                self.state[param].put(kept)
        self.state.changed[0] = False

    def reconcile(self) -> None:
        """Take over what somebody wrote into `state`; what is missing there begins anew.

        Raises:
            ValueError: For a tensor that does not fit; nothing is changed.
        """
        self._check_state()
        if self.arena is None:
            return
        # Or what is prepared below would pass for what was there in the last step.
        self._adopt()
        self.collect()
        for param, span in self.layout.spans.items():
            own = self.state[param]
            for name, vector in self.arena.vectors.items():
                _take(vector[span], own.get(name, 0))
        for slot, row in self.rows.items():
            own, views = self.state[row.param], self.arena.views(slot)
            saved = {name: own[key] for name in views if (key := self.layout.key(name, slot)) in own}
            if "age" in own and saved.keys() >= views.keys() & set(MOMENTS):
                self._take_over_state(row, own, saved)
            else:
                self._begin(row)
        self._show_numbers()
        for row in self.rows.values():
            self._show(row)
        self._prepare()

    def _take_over_state(self, row: Row, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
        """Take over what an entry of `state` holds of one slot, `saved` being what the arena has a place for."""
        assert self.arena is not None
        views = self.arena.views(row.slot)
        for name, value in saved.items():
            _take(views[name], value, self.layout.blocks[row.slot])

    def _check_state(self) -> None:
        storage = self._storage if self.arena is not None else self.storage_in_state
        for param, wanted in self.layout.sizes(storage).items():
            own: Mapping[str, Any] = self.state.get(param, {})
            for name in own.keys() & wanted.keys():
                if isinstance(own[name], Tensor) and own[name].numel() not in (wanted[name], 1):
                    raise ValueError(
                        f"optimizer.state has {name!r} of shape {tuple(own[name].shape)} for "
                        f"{self.layout.name_of(self.layout.spans[param].start)}, where {wanted[name]} elements belong: "
                        "write as many, or delete the entry to begin anew"
                    )

    def collect(self) -> None:
        """Bring what `state` shows of ages and scores up to date."""
        if self._step is not None:
            self._step.collect()

    @property
    def score_sum(self) -> Tensor:
        """Scores of this round by slot, over all ranks, as of the last `collect`; all of them must ask for it."""
        assert self.arena is not None
        ranks, score_sum = self.layout.ranks, self.arena.score_sum
        return score_sum if ranks is None or self._root else self.arena.sum_over(ranks, score_sum)

    def ages(self) -> npt.NDArray[np.int64]:
        """Return the updates of each module since its activation, 0 where it is not active; waits."""
        self.collect()
        ages = np.zeros(len(self.layout.blocks), dtype=np.int64)
        for param, span in self.layout.spans.items():
            # From the state, which has those that were loaded before the first step, too.
            own: Mapping[str, Any] = self.state.get(param, {})
            if "age" in own:
                ages[span] = own["age"].cpu()
        return self.layout.max(ages)

    def to_save(self, saved: Mapping[Any, Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
        """Return a copy of the state, by position of the parameter, for a state dict; waits for the device.

        Scores are those over all ranks, and what means nothing is left out: moments and masters without an update.
        """
        self.collect()
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

    # The weights, which others may have written to, and the end.

    def before_last(self) -> None:
        """Before the last step of a round, refuse weights of another form than in the first; see `Weights`."""
        # What is off now may be drawn.
        self._weights.check_all()

    def adopt(self) -> None:
        """Let the weights win over masters wherever they differ, however somebody wrote to them."""
        if self.arena is not None:
            self._adopt()
            self._close(dict.fromkeys(self.rows, ADOPT))

    def _adopt(self, rows: slice = ALL) -> None:
        """Take over into the masters what torch tells that was written to the weights; refuse weights that changed."""
        if not self._weights.are_as_left(rows):
            self._weights.check(rows)
            self._take_over(rows, self.rows)

    def _take_over(self, rows: slice, slots: Container[int]) -> None:
        """Let the state of some slots follow their weights, where somebody exchanged these or wrote to them."""
        assert self.arena is not None
        adopted, trained = {}, list(self.rows)
        for slot in (trained[row] for row in self._weights.accept(rows)):
            if slot not in slots:
                continue
            if "master" in (views := self.arena.views(slot)):
                adopted[slot] = ADOPT
            else:
                # What the old weight lacked means nothing to the new one.
                views["residual"].zero_()
        self._close(adopted)

    def release(self) -> None:
        """Flush and write back all that is trained, and forget it; what somebody resized or cast is left as it is."""
        if self.arena is not None:
            # What the flush and the write-back do depends on the ages.
            self.collect()
            kept = {slot for slot in self.rows if self._weights.changed(slot) is None}
            self._take_over(ALL, kept)
            self._close({slot: self._leaving(self.rows[slot]) for slot in kept})
        self.forget()

    def forget(self) -> None:
        """Drop rows and arena, writing nothing back; what is in `state` counts from now on."""
        self.arena = self._step = None
        self.rows = {}
        self._weights = Weights([], [], False)
        self._arrivals = self._hyper = None


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
        if not isinstance(value, Tensor) or name not in NUMBERS and name not in SCORES:
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


def _here(tensor: Tensor, block: Block) -> Tensor:
    """Return the part of a tensor of a block's shape that belongs to what lies here of its parameter, 1-D."""
    return local_like(tensor, block.param, block.shape_in(block.param))


def _part_of_grad(grad: Tensor, block: Block) -> Tensor:
    """Return the part of a block's gradient that belongs to what lies here of its parameter."""
    part = _here(grad, block)
    # A part without elements has no address, by which the kernels know that there is a gradient.
    return part if part.numel() else part.new_zeros(4)


def _part_in(grad: Tensor, block: Block) -> Tensor:
    """Return the part of a gradient that belongs to a slice; all of it where it is no slice, and dense."""
    if (piece := block.piece) is None:
        return grad
    axis, first, last = piece
    if isinstance(grad, SlicedGradient):
        if (grad.axis, grad.first, grad.part.shape[axis]) == (axis, first, last - first):
            return grad.part
        # Somebody has put one of an earlier round back.
        grad = grad.dense()
    return grad.narrow(axis, first, last - first).contiguous()


def _take(place: Tensor, value: Any, block: Block | None = None) -> None:
    """Take over a number, or as many as there are; of a block's tensor the part here."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        place.fill_(value.reshape(()) if isinstance(value, Tensor) else value)
        return
    part = value.flatten() if block is None or value.numel() != block.numel else _here(value, block)
    if part.data_ptr() != place.data_ptr():
        place.copy_(part)
