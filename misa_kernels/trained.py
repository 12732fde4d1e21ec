"""The tensors trained now: their rows for the kernels, and what happens when they enter and leave."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from misa_kernels import checkpoint
from misa_kernels.kernels import Backend, Row, Settings, Step, StepInput, select
from misa_kernels.kernels.table import ADOPT, ALL, FLUSH, NONE, WRITE_BACK
from misa_kernels.layout import Slots
from misa_kernels.memory.arena import Arena
from misa_kernels.memory.storage import KEYS, MOMENTS, PIECE, split, state_noise
from misa_kernels.outside.state import State
from misa_kernels.ranks.shards import Ranks, is_sharded, like, local, local_like
from misa_kernels.reference import Hyper, noise_key
from misa_kernels.release import Arrivals

VERSION = attrgetter("_version")
DTYPE = attrgetter("dtype")


class ActiveSet:
    """Always-on and active tensors with their state, which `optimizer.state` shows as views.

    Args:
        slots: The numbering of everything that may be trained.
        names: Name of every parameter by its position in the optimizer, for messages.
        groups: The optimizer's live `param_groups`.
        budget: δN, in elements.
        momentum_flush: Whether a sampled tensor that leaves gets the paper's line 16.
        backend: Name of what runs the steps, see `kernels.check`.
        settings: What holds for all steps.
        seed: Seed of stochastic rounding.

    Attributes:
        slots: As given, or as `exchange` was.
        state: What the optimizer shows as its `state`.
        arena: The memory, or None before the first step.
        rows: The row of each slot that is trained now; empty before the first step.
        steps: Updates so far, applied or not; keys the noise of stochastic rounding.
    """

    def __init__(
        self,
        slots: Slots,
        names: Sequence[str],
        groups: list[dict[str, Any]],
        *,
        budget: int,
        momentum_flush: bool,
        backend: str,
        settings: Settings,
        seed: int,
    ) -> None:
        self.slots = slots
        self._names = names
        self._groups = groups
        self.state = State()
        self._budget = budget
        self._momentum_flush = momentum_flush
        self._backend_name = backend
        self._backend: Backend | None = None
        self._settings = settings
        self._storage = settings.storage
        # How the moments in `state` are stored: as they were loaded, until the first step.
        self.storage_in_state = settings.storage
        self.seed = seed
        self.steps = 0
        self.arena: Arena | None = None
        self.rows: dict[int, Row] = {}
        self._step: Step | None = None
        # The gradients that came in this step, see `receive`, and its hyperparameters.
        self._arrivals: Arrivals | None = None
        self._hyper: list[Hyper] | None = None
        # The parameter of each row, and what changes when somebody else exchanges its memory or, if the arena holds
        # bits that the weight lacks, writes to it.
        self._params: list[Tensor] = []
        self._pointers: list[int] = []
        self._numels: list[int] = []
        # All that may be trained, by slot, as it was in the first step.
        self._form: list[tuple[torch.Size, torch.dtype]] = []
        self._all: list[Tensor] = []
        self._all_numels: list[int] = []
        self._refined: list[int] = []
        self._refined_params: list[Tensor] = []
        self._versions: list[int] = []

    @property
    def backend(self) -> str | None:
        """Name of what runs the steps, None before the first one."""
        return None if self._backend is None else self._backend.name

    @property
    def is_within_step(self) -> bool:
        """Whether gradients have come, with `release_gradients`, that `update` has not counted yet."""
        return bool(self._arrivals)

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
        grads = [param.grad for param in self._params]
        rows = ALL
        if self._settings.ranks is not None:
            grads = [None if g is None else self._part_of_grad(g, p) for g, p in zip(grads, self._params, strict=True)]
        if self._arrivals:
            grads = self._arrivals.left_over(grads)
            if all(grad is None for grad in grads):
                grads, rows = [], NONE
        self._run(grads, rows, grad_scale, found_inf)
        self.steps += 1
        self._hyper = None
        if self._arrivals:
            self._arrivals.begin()

    def _part_of_grad(self, grad: Tensor, param: Tensor) -> Tensor:
        part = local(grad) if is_sharded(grad) and grad.placements == param.placements else local_like(grad, param)  # type: ignore[attr-defined]
        # A part without elements has no address, by which the kernels know that there is a gradient.
        return part if part.numel() else part.new_zeros(4)

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
            self._run([param.grad for param in self._params[rows]], rows)

    def _input(
        self,
        grads: Sequence[Tensor | None] = (),
        rows: slice = ALL,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> StepInput:
        if self._hyper is None:
            self._hyper = [Hyper.of(group) for group in self._groups]
        return StepInput(
            grads=grads,
            weight_pointers=self._pointers if rows is ALL else self._pointers[rows],
            hyper=self._hyper,
            seed=self.seed,
            number=self.steps,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )

    def _run(
        self,
        grads: Sequence[Tensor | None],
        rows: slice,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        assert self._step is not None
        try:
            self._step.run(self._input(grads, rows, grad_scale, found_inf), rows)
        except (NotImplementedError, RuntimeError):
            # Asked only now: the layout of 300 gradients takes a quarter of the host's time in a step. A sparse
            # one has neither an address nor a flat view, so nothing has been launched.
            self._refuse_sparse(grads, rows)
            raise
        if self._refined:
            self._versions[self._refined_in(rows)] = self._read_versions(rows)

    def exchange(self, slots: Slots, ranks: Ranks | None, budget: int, kept: Container[tuple[int, int]]) -> None:
        """Go on with another numbering; the state goes into `state` until the next step allocates the arena anew.

        Args:
            slots: The numbering.
            ranks: Those that hold the parameters.
            budget: δN, in elements.
            kept: Position of the parameter and first element of each block whose state stays, if it is trained now and
                the parameter is cut as before.
        """
        cuts, params = _cuts(slots), {block.index: block.param for block in slots.blocks}
        same = {index for index, cut in _cuts(self.slots).items() if cuts.get(index) == cut}
        blocks = enumerate(self.slots.blocks)
        leave = [n for n, block in blocks if block.index not in same or (block.index, block.start) not in kept]
        if self.arena is not None:
            # What is frozen from now on moves no more than its master lets it.
            frozen = {slot for slot in leave if self.slots.blocks[slot].index not in params}
            self.switch([slot for slot in leave if slot in self.rows], [], frozen)
            self.collect()
            held = checkpoint.detach(self.state)
            self.forget()
            self.storage_in_state = self._storage
            for param, own in held.items():
                # What belongs to a round that has ended.
                for name in ("updates", "score_sum"):
                    own.pop(name, None)
                dict.clear(self.state[param])
                self.state[param].put(own)
        for slot in leave:
            param = self.slots.blocks[slot].param
            for name in KEYS:
                self.state[param].drop(self.slots.key(name, slot))
            if "age" in self.state[param]:
                self.state[param]["age"][slot - self.slots.spans[param].start] = 0
        for param, index in {block.param: block.index for block in self.slots.blocks}.items():
            self.state.move(param, params[index] if index in same else None)
        self.slots = slots
        self._budget = budget
        self._settings = replace(self._settings, ranks=ranks)

    def allocate(self, enter: Iterable[int]) -> None:
        """Allocate the arena where the weights are now, lend it, and move loaded state into it.

        Args:
            enter: The sampled slots to begin with.

        Raises:
            RuntimeError: If the weights are on several devices, or on none, or within the capture of a CUDA graph.
        """
        refuse_capture()
        blocks = self.slots.blocks
        devices = {block.param.device for block in blocks}
        if len(devices) > 1 or "meta" in {device.type for device in devices}:
            raise RuntimeError(
                f"the parameters are on {', '.join(sorted(map(str, devices)))}: MISA needs them on one device that "
                "holds data"
            )
        dtypes = [block.param.dtype for block in blocks]
        device, ranks = devices.pop(), self._settings.ranks
        grad_dtypes = {getattr(block.param, "grad_dtype", None) or block.param.dtype for block in blocks}
        self._backend = select(self._backend_name, device, {*dtypes, *grad_dtypes}, self._storage)
        self.arena = Arena(
            [part.numel for part in self.slots.parts],
            dtypes,
            range(self.slots.dense),
            self._budget,
            device,
            storage=self._storage,
            whole=None if ranks is None else [block.stop - block.start for block in blocks],
            counted=None if ranks is None else [part.is_first for part in self.slots.parts],
        )
        loaded = {param: dict(own) for param, own in self.state.items()}
        self._form = [(block.param.shape, block.param.dtype) for block in blocks]
        self._all = [block.param for block in blocks]
        self._all_numels = list(map(Tensor.numel, self._all))
        self._show_vectors()
        self.switch([], [*range(self.slots.dense), *enter])
        for param, own in loaded.items():
            for name, vector in self.arena.vectors.items():
                if name in own:
                    vector[self.slots.spans[param]].copy_(own[name].reshape(-1))
        if ranks is not None and not (ranks.is_first or self._settings.root):
            # What was saved is the sum over ranks, and would be added up again.
            self.arena.score_sum.zero_()
        for slot, row in self.rows.items():
            own = loaded.get(row.param, {})
            moments = self.storage_in_state.buffers(row.param.dtype).keys() & set(MOMENTS)
            if "age" in own and own.keys() >= {self.slots.key(name, slot) for name in moments}:
                self._restore(slot, row, own)
            else:
                self._begin(row)
        self.storage_in_state = self._storage
        # Once more, with the ages and sums that were loaded.
        self._prepare()
        self._close(dict.fromkeys(self.rows, ADOPT))

    def _show_vectors(self) -> None:
        assert self.arena is not None
        for param, span in self.slots.spans.items():
            self.state[param].put({name: vector[span] for name, vector in self.arena.vectors.items()})

    def _restore(self, slot: int, row: Row, own: dict[str, Any]) -> None:
        """Put what was loaded of one slot into the arena, converted if it was stored otherwise."""
        assert self.arena is not None
        keys = {name: self.slots.key(name, slot) for name in KEYS}
        saved = {
            name: local_like(own[key], row.param).to(self.arena.device) for name, key in keys.items() if key in own
        }
        views, weight = self.arena.views(slot), row.weight()
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
        elif "exp_avg" in saved:
            kinds = self.storage_in_state.buffers(weight.dtype)
            for start in range(0, len(weight), PIECE):
                numel = min(PIECE, len(weight) - start)
                piece = {
                    name: value.reshape(-1).narrow(0, kinds[name].numel(start), kinds[name].numel(numel))
                    for name, value in saved.items()
                }
                self._convert(row, start, row.weight(start, numel), piece, self.arena.views(slot, start, numel))

    def _convert(
        self, row: Row, start: int, weight: Tensor, saved: Mapping[str, Tensor], views: Mapping[str, Tensor]
    ) -> None:
        """Store a piece of a row, from an element of it on, as rows are stored now."""
        noise_of = noise_key(self.seed, 2 * self.steps + 1, row.index)
        noise = state_noise(row.start + start, len(weight), noise_of, weight.device)
        for name in self._storage.codecs:
            x = self.storage_in_state.decode(name, saved, len(weight))
            self._storage.encode(name, views, x, noise[name])
        theta = self.storage_in_state.theta(saved, weight)
        if "master" in views:
            views["master"].copy_(theta)
        if "residual" in views:
            rounded, residual = split(theta)
            views["residual"].copy_(torch.where(rounded == weight, residual, 0))

    def switch(self, leave: Iterable[int], enter: Sequence[int], frozen: Container[int] = ()) -> None:
        """Retire the slots that leave and train those that enter, at age 0, beside the ones that stay.

        A slot may leave and enter at once, and then starts afresh. Before the first step nothing happens.

        Args:
            leave: Slots that leave.
            enter: Slots that enter.
            frozen: Those that leave for good, without a flush.
        """
        if self.arena is None:
            return
        self.retire(leave, frozen)
        assert self._backend is not None
        fill = self._backend.reads_fresh_state
        self.arena.lend(list(self.rows), enter, clear=fill)
        entering = {slot: self.slots.row(slot) for slot in enter}
        self.rows |= entering
        for slot, row in self.rows.items():
            self._show(slot, row)
            if fill and slot in entering and "master" in (views := self.arena.views(slot)):
                views["master"].copy_(row.weight())
        self._prepare()

    def _show(self, slot: int, row: Row) -> None:
        """Put views of a slot's state where torch's tools look for them."""
        assert self.arena is not None
        held, shown, numel = local(row.param), {}, row.stop - row.start
        shape = held.shape if numel == held.numel() else (-1, *held.shape[1:])
        for name, view in self.arena.views(slot).items():
            shaped = view.view(shape) if view.numel() == numel else view
            shown[self.slots.key(name, slot)] = like(shaped, row.param)
        self.state[row.param].put(shown)

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
        for param, span in self.slots.spans.items():
            own = self.state[param]
            for name, vector in self.arena.vectors.items():
                _take(vector[span], own.get(name, 0), param)
            for slot in range(span.start, span.stop):
                if slot not in self.rows:
                    continue
                views = self.arena.views(slot)
                saved = {name: own[key] for name in views if (key := self.slots.key(name, slot)) in own}
                if "age" in own and saved.keys() >= views.keys() & set(MOMENTS):
                    for name, value in saved.items():
                        _take(views[name], value, param)
                else:
                    self._begin(self.rows[slot])
        self._show_vectors()
        for slot, row in self.rows.items():
            self._show(slot, row)
        self._prepare()

    def _check_state(self) -> None:
        storage = self._storage if self.arena is not None else self.storage_in_state
        for param, wanted in self.slots.sizes(storage).items():
            own: Mapping[str, Any] = self.state.get(param, {})
            for name in own.keys() & wanted.keys():
                if isinstance(own[name], Tensor) and own[name].numel() not in (wanted[name], 1):
                    raise ValueError(
                        f"optimizer.state has {name!r} of shape {tuple(own[name].shape)} for "
                        f"{self._name_of(param)}, where {wanted[name]} elements belong: write as many, or delete the "
                        "entry to begin anew"
                    )

    def _begin(self, row: Row) -> None:
        """Let a slot that is trained begin anew, at age 0."""
        assert self.arena is not None
        views = self.arena.views(row.slot)
        for held in (self.arena.age[row.slot], *views.values()):
            held.zero_()
        if "master" in views:
            views["master"].copy_(row.weight())

    def _name_of(self, param: Tensor) -> str:
        return str(self._names[self.slots.blocks[self.slots.spans[param].start].index])

    def _prepare(self) -> None:
        assert self.arena is not None and self._backend is not None
        self._params = [row.param for row in self.rows.values()]
        self._pointers = [local(param).data_ptr() for param in self._params]
        self._numels = [param.numel() for param in map(local, self._params)]
        self._refined = [number for number, slot in enumerate(self.rows) if self.arena.refines(slot)]
        self._refined_params = [self._params[number] for number in self._refined]
        self._versions = self._read_versions(ALL)
        self._step = self._backend(list(self.rows.values()), self.arena, self._settings)
        self._arrivals = None

    def read_round(self) -> tuple[npt.NDArray[np.float64], int]:
        """Return five rows of numbers by slot, over all ranks, and the steps skipped in this round; waits.

        The rows are the scores and the updates of this round, the updates since activation, and the two of
        `RowTable.measure`.
        """
        assert self.arena is not None and self._step is not None
        self.collect()
        arena, ranks = self.arena, self._settings.ranks
        moved = self._step.measure(self._input())
        self._hyper = None
        moved = moved if ranks is None else arena.sum_over(ranks, moved)
        return arena.read_round(self.score_sum, arena.updates, arena.age, *moved)

    def rehearse(self) -> None:
        """Take the memory that the end of a round takes, and change nothing."""
        assert self.arena is not None and self._step is not None and self._backend is not None
        self.read_round()
        self._step.rehearse(self._input())
        self._hyper = None
        self.arena.rehearse()
        # The tables of two rounds are there at once.
        self._backend(list(self.rows.values()), self.arena, self._settings)

    def ages(self) -> npt.NDArray[np.int64]:
        """Return the updates of each candidate since its activation, 0 where it is not active; waits."""
        self.collect()
        ages = np.zeros(len(self.slots.blocks), dtype=np.int64)
        for param, span in self.slots.spans.items():
            # From the state, which has those that were loaded before the first step, too.
            own: Mapping[str, Any] = self.state.get(param, {})
            if "age" in own:
                ages[span] = own["age"].cpu()
        return self.slots.max(ages)

    @property
    def score_sum(self) -> Tensor:
        """Scores of this round by slot, over all ranks, as of the last `collect`; all of them must ask for it."""
        assert self.arena is not None
        ranks = self._settings.ranks
        score_sum = self.arena.score_sum
        return score_sum if ranks is None or self._settings.root else self.arena.sum_over(ranks, score_sum)

    def collect(self) -> None:
        """Bring what `state` shows of ages and scores up to date."""
        if self._step is not None:
            self._step.collect()

    def put_scores(self, saved: dict[Any, dict[str, Any]]) -> None:
        """Make the scores in a copy of the state those over all ranks.

        Args:
            saved: The state by position of the parameter.
        """
        if self.arena is None or self._settings.ranks is None:
            return
        score_sum = self.score_sum
        for span in self.slots.spans.values():
            index = self.slots.blocks[span.start].index
            saved[index]["score_sum"].copy_(score_sum[span])

    def fresh(self) -> list[tuple[int, str]]:
        """Return parameter and state key of moments and masters without an update, whose contents mean nothing.

        Waits for the device.
        """
        if self.arena is None:
            return []
        ages = self.arena.age.tolist()
        return [
            (row.index, self.slots.key(name, slot))
            for slot, row in self.rows.items()
            if ages[slot] == 0
            for name in KEYS
        ]

    def retire(self, leave: Iterable[int], frozen: Container[int] = ()) -> None:
        """Flush unless frozen, write back and forget the slots given; before the first step there is nothing to do."""
        if self.arena is None:
            return
        self._adopt()
        leave = set(leave)
        self._close({slot: self._leaving(row, frozen) if slot in leave else ADOPT for slot, row in self.rows.items()})
        for slot in leave:
            own = self.state[self.rows.pop(slot).param]
            for name in self.arena.pools[self.arena.dtypes[slot]].kinds:
                own.drop(self.slots.key(name, slot))

    def release(self) -> None:
        """Flush and write back all that is trained, and forget it; what somebody resized or cast is left as it is."""
        if self.arena is not None:
            # What the flush and the write-back do depends on the ages.
            self.collect()
            kept = {slot for slot in self.rows if self._changed(slot) is None}
            self._take_over([local(param).data_ptr() for param in self._params], self._read_versions(ALL), ALL, kept)
            self._close({slot: self._leaving(self.rows[slot]) for slot in kept})
        self.forget()

    def _leaving(self, row: Row, frozen: Container[int] = ()) -> int:
        """Return what is to be done with a row that leaves."""
        flush = self._momentum_flush and row.module is not None and row.slot not in frozen
        return WRITE_BACK | FLUSH if flush else WRITE_BACK

    def _close(self, actions: Mapping[int, int]) -> None:
        """Do with each slot what is left to do, where its state holds anything that its weight lacks."""
        assert self.arena is not None
        due = [
            action if (action := actions.get(slot, 0)) & FLUSH or self.arena.refines(slot) else 0 for slot in self.rows
        ]
        if any(due):
            assert self._step is not None
            self._step.close(self._input(), due)
            self._hyper = None

    def forget(self) -> None:
        """Drop rows and arena, writing nothing back; what is in `state` counts from now on."""
        self.arena = self._step = None
        self.rows = {}
        self._params, self._pointers, self._numels, self._versions = [], [], [], []
        self._refined, self._refined_params = [], []
        self._arrivals = self._hyper = None

    def check_form(self) -> None:
        """Refuse weights that changed, of all that may be trained: before a round ends and others are drawn.

        Raises:
            RuntimeError: With the name of the first one.
        """
        if self.arena is None:
            return
        # Faster than shapes: with 20,000 modules the difference is 50 ms.
        if list(map(Tensor.numel, self._all)) == self._all_numels and list(map(DTYPE, self._all)) == self.arena.dtypes:
            return
        for slot in range(len(self._all)):
            self._check_form(slot)

    def _check_form(self, slot: int) -> None:
        if (changed := self._changed(slot)) is not None:
            raise RuntimeError(changed)

    def _changed(self, slot: int) -> str | None:
        """Return a sentence on how a weight differs from what it was in the first step, None if it does not."""
        assert self.arena is not None
        block, (shape, dtype) = self.slots.blocks[slot], self._form[slot]
        param, name, device = block.param, self._names[block.index], self.arena.device
        if param.device != device or param.dtype != dtype:
            return (
                f"{name} is {param.dtype} on {param.device} but was {dtype} on {device} in the first step: move and "
                "cast the model before training"
            )
        if param.shape != shape:
            return (
                f"{name} is {tuple(param.shape)} but was {tuple(shape)} in the first step: resize before training, or "
                "call release() and construct a new MISA"
            )
        if not local(param).is_contiguous():
            return (
                f"{name} has strides {param.stride()} for shape {tuple(shape)} and must be contiguous: set param.data "
                "= param.data.contiguous()"
            )
        return None

    def adopt(self) -> None:
        """Let the weights win over masters wherever they differ, however somebody wrote to them."""
        if self.arena is not None:
            self._adopt()
            self._close(dict.fromkeys(self.rows, ADOPT))

    def _adopt(self, rows: slice = ALL) -> None:
        """Take over into the masters what torch tells that was written to the weights; refuse weights that changed."""
        assert self.arena is not None
        held = self._params[rows] if self._settings.ranks is None else list(map(local, self._params[rows]))
        pointers = list(map(Tensor.data_ptr, held))
        versions = self._read_versions(rows) if self._refined else []
        if (
            pointers == self._pointers[rows]
            and (not self._refined or versions == self._versions[self._refined_in(rows)])
            and list(map(Tensor.numel, held)) == self._numels[rows]
            and all(map(Tensor.is_contiguous, held))
        ):
            return
        slots = list(self.rows)[rows]
        for slot in slots:
            self._check_form(slot)
        self._take_over(pointers, versions, rows, slots)

    def _take_over(self, pointers: list[int], versions: list[int], rows: slice, slots: Container[int]) -> None:
        """Let the state follow the weights of some slots whose address or version is another than it was."""
        assert self.arena is not None
        before = dict(zip(self._refined, self._versions, strict=True))
        now = dict(zip(self._refined[self._refined_in(rows)], versions, strict=True))
        numbers = range(len(self._params))[rows]
        moved = {n for n, pointer in zip(numbers, pointers, strict=True) if pointer != self._pointers[n]}
        adopted = {}
        for number, slot in enumerate(self.rows):
            if number in now and slot in slots and (now[number] != before[number] or number in moved):
                if "master" in (views := self.arena.views(slot)):
                    adopted[slot] = ADOPT
                else:
                    # What the old weight lacked means nothing to the new one.
                    views["residual"].zero_()
        # Another list, by which the step knows that there are other addresses.
        self._pointers = [*self._pointers]
        self._pointers[rows] = pointers
        self._versions[self._refined_in(rows)] = versions
        self._close(adopted)

    def _refined_in(self, rows: slice) -> slice:
        """Return where the refined ones of some rows are in the list of them."""
        if rows is ALL:
            return ALL
        return slice(bisect_left(self._refined, rows.start), bisect_left(self._refined, rows.stop))

    def _read_versions(self, rows: slice) -> list[int]:
        # Twice a step: `local` would take more than half of the time.
        params = self._refined_params[self._refined_in(rows)]
        return list(map(VERSION, params if self._settings.ranks is None else map(local, params)))

    def _refuse_sparse(self, grads: Sequence[Tensor | None], rows: slice) -> None:
        for row, grad in zip(list(self.rows.values())[rows], grads, strict=True):
            if grad is not None and grad.layout is not torch.strided:
                raise TypeError(
                    f"the gradient of {self._names[row.index]} is {grad.layout}: MISA updates dense gradients; use "
                    "sparse=False in the embedding, or give it the role 'frozen'"
                ) from None


def refuse_capture() -> None:
    """Raise RuntimeError where what is launched would be recorded in a CUDA graph instead of run."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
        raise RuntimeError(
            "a step of MISA is being captured in a CUDA graph, whose replays would repeat its learning rates, its "
            "noise and the addresses of its round: capture forward and backward alone, anew in every round and "
            "without release_gradients, and call step() outside"
        )


def _take(place: Tensor, value: Any, param: Tensor) -> None:
    if not isinstance(value, Tensor) or value.numel() == 1:
        place.fill_(value.reshape(()) if isinstance(value, Tensor) else value)
    elif (part := local_like(value, param) if value.numel() == param.numel() else value.flatten()).data_ptr() != (
        place.data_ptr()
    ):
        place.copy_(part)


def _cuts(slots: Slots) -> dict[int, list[int]]:
    """Return where the blocks of each parameter end."""
    cuts: dict[int, list[int]] = {}
    for block in slots.blocks:
        cuts.setdefault(block.index, []).append(block.stop)
    return cuts
