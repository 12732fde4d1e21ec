"""How what is trained now is updated: its gradients and weights for the step of the round, and what a switch does."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from misa_kernels.clock import Clock
from misa_kernels.kernels import Backend, Row, Settings, Step, prepare, select
from misa_kernels.kernels.table import ADOPT, ALL, FLUSH, NONE, WRITE_BACK
from misa_kernels.memory.storage import Storage
from misa_kernels.options import Options
from misa_kernels.outside.tracing import refuse_capture
from misa_kernels.outside.weights import Weights, place_of
from misa_kernels.reference import Hyper
from misa_kernels.run.arrivals import Arrivals
from misa_kernels.run.layout import Layout
from misa_kernels.run.live import LiveState
from misa_kernels.run.parts import gradient_here, gradient_of

# `map` runs it without the interpreter.
GRAD = attrgetter("grad")


class Updater:
    """Updates always-on and active tensors.

    Args:
        live: Their rows and state.
        groups: The optimizer's live `param_groups`.
        options: Its other arguments.
        clock: Keys the noise of stochastic rounding.

    Attributes:
        live: As given.
        rule: What updates, where that is not AdamW of ours: the classes of its optimizers.
        defaults: The hyperparameters of its first group that it updates.
    """

    rule: str | None = None
    defaults: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, live: LiveState, groups: list[dict[str, Any]], options: Options, clock: Clock) -> None:
        self.live = live
        self._groups = groups
        self._options = options
        self._clock = clock
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
            grads = self._of_slices(grads, ALL)
        if self.live.layout.ranks is not None:
            blocks = self.live.layout.blocks
            grads = [
                None if grad is None else gradient_here(grad, blocks[slot])
                for grad, slot in zip(grads, self.live.rows, strict=True)
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
            self._arrivals = Arrivals(list(self.live.rows.values()))
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
            self._run(self._of_slices(grads, rows) if self._has_slices else grads, rows)

    def _of_slices(self, grads: Sequence[Tensor | None], rows: slice) -> list[Tensor | None]:
        """Return what of the gradients of some rows belongs to these, where they are slices."""
        own, blocks = zip(list(self.live.rows)[rows], grads, strict=True), self.live.layout.blocks
        return [None if grad is None else gradient_of(grad, blocks[slot]) for slot, grad in own]

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
            for slot, grad in zip(list(self.live.rows)[rows], grads, strict=True):
                if grad is not None and grad.layout is not torch.strided:
                    raise TypeError(
                        f"the gradient of {self.live.layout.name_of(slot)} is {grad.layout}: MISA updates dense "
                        "gradients; use sparse=False in the embedding, or give it the role 'frozen'"
                    ) from None
            raise
        if self._weights.is_refined:
            self._weights.note_versions(rows)

    # Rounds: the first, the end of one, a switch.

    def allocate(self, enter: Iterable[int]) -> None:
        """Allocate the state where the weights are now, lend it, and move loaded state into it.

        Args:
            enter: The sampled slots to begin with.

        Raises:
            RuntimeError: If the weights are on several devices, or on none, or within the capture of a CUDA graph.
        """
        refuse_capture()
        layout = self.live.layout
        params, names = [block.param for block in layout.blocks], list(map(layout.name_of, range(len(layout.blocks))))
        device = place_of(params, names)
        grad_dtypes = {getattr(param, "grad_dtype", None) or param.dtype for param in params}
        self._backend = self._select(device, {param.dtype for param in params} | grad_dtypes)
        loaded = self.live.allocate(device)
        self._weights = Weights(params, names, layout.ranks is not None)
        self.switch([], [*range(layout.dense), *enter])
        self.live.restore(loaded)
        # Once more, with the ages and sums that were loaded.
        self._prepare()
        self._close(dict.fromkeys(self.live.rows, ADOPT))

    def read_round(self) -> tuple[npt.NDArray[np.float64], int]:
        """Return five rows of numbers by slot, over all ranks, and the steps skipped in this round; waits.

        The rows are the scores and the updates of this round, the updates since activation, and the two of
        `RowTable.measure`.
        """
        arena, ranks = self.live.arena, self.live.layout.ranks
        assert arena is not None and self._step is not None
        self.collect()
        moved = self._step.measure(self._weights.pointers, self._hyper_now())
        self._hyper = None
        moved = moved if ranks is None else arena.sum_over(ranks, moved)
        return arena.read_round(self.live.score_sum, arena.updates, arena.age, *moved)

    def rehearse(self) -> None:
        """Take the memory that the end of a round takes, and change nothing."""
        assert self.live.arena is not None and self._step is not None
        self.read_round()
        self._step.rehearse(self._hyper_now())
        self._hyper = None
        self.live.arena.rehearse()
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
        if self.live.arena is None:
            return
        assert self._backend is not None
        self._adopt()
        leave, rows = set(leave), self.live.rows
        self._close({slot: self._leaving(row, frozen) if slot in leave else ADOPT for slot, row in rows.items()})
        self.live.lend(leave, enter, clear=self._backend.eager)
        self._prepare()

    def _leaving(self, row: Row, frozen: Container[int] = ()) -> int:
        """Return what is to be done with a row that leaves."""
        flush = self._options.momentum_flush and row.module is not None and row.slot not in frozen
        return WRITE_BACK | FLUSH if flush else WRITE_BACK

    def _close(self, actions: Mapping[int, int]) -> None:
        """Do with each slot what is left to do, where its state holds anything that its weight lacks."""
        arena = self.live.arena
        assert arena is not None
        due = [
            action if (action := actions.get(slot, 0)) & FLUSH or arena.refines(slot) else 0 for slot in self.live.rows
        ]
        if any(due):
            assert self._step is not None
            noise = self._clock.seed, 2 * self._clock.steps + 1
            self._step.close(due, self._weights.pointers, self._hyper_now(), noise)
            self._hyper = None

    def _prepare(self) -> None:
        """Begin to train the rows of now."""
        live = self.live
        assert live.arena is not None
        self._has_slices = live.layout.partition.slicing is not None
        self._weights.watch(list(live.rows), [n for n, slot in enumerate(live.rows) if live.arena.refines(slot)])
        self._step = self._made()
        self._arrivals = None

    def _select(self, device: torch.device, dtypes: Collection[torch.dtype]) -> Backend:
        return select(self._options.backend, device, dtypes, self.live.storage)

    def _made(self) -> Step:
        """Return the steps of the rows that are trained now."""
        assert self.live.arena is not None and self._backend is not None
        return prepare(self._backend, list(self.live.rows.values()), self.live.arena, self._settings())

    def _settings(self) -> Settings:
        options, live = self._options, self.live
        return Settings(
            max_grad_norm=options.max_grad_norm,
            skip_nonfinite=options.skip_nonfinite,
            storage=live.storage,
            root=live.root,
            ranks=live.layout.ranks,
        )

    def move(self, layout: Layout, kept: Container[tuple[int, int]]) -> None:
        """Go on with another layout; the state goes into `state` until the next step allocates the arena anew.

        Args:
            layout: The layout.
            kept: Places, see `Layout.places_of`, whose state stays, if it is trained now and the parameter is cut as
                before.
        """
        before, cuts = self.live.layout, layout.cuts()
        same = {index for index, cut in before.cuts().items() if cuts.get(index) == cut}
        places = ((block.index, block.start) for block in before.blocks)
        leave = [n for n, place in enumerate(places) if place[0] not in same or place not in kept]
        if self.live.arena is not None:
            # What is frozen from now on moves no more than its master lets it.
            frozen = {slot for slot in leave if before.blocks[slot].index not in cuts}
            self.switch([slot for slot in leave if slot in self.live.rows], [], frozen)
            self.collect()
            self.live.put_away()
            self.forget()
        self.live.move(layout, leave, same)

    # The state.

    def collect(self) -> None:
        """Bring what `state` shows of ages and scores up to date."""
        if self._step is not None:
            self._step.collect()

    def ages(self) -> npt.NDArray[np.int64]:
        """Return the updates of each module since its activation, 0 where it is not active; waits."""
        self.collect()
        return self.live.ages()

    def to_save(self, saved: Mapping[Any, Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
        """Return a copy of the state for a state dict; see `LiveState.to_save`."""
        self.collect()
        return self.live.to_save(saved)

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
        self.live.load(own, storage)

    def reconcile(self) -> None:
        """Take over what somebody wrote into `state`; what is missing there begins anew.

        Raises:
            ValueError: For a tensor that does not fit; nothing is changed.
        """
        self.live.check()
        if self.live.arena is None:
            return
        # Or what is prepared below would pass for what was there in the last step.
        self._adopt()
        self.collect()
        self.live.take_over()
        self._prepare()

    # The weights, which others may have written to, and the end.

    def before_last(self) -> None:
        """Before the last step of a round, refuse weights of another form than in the first; see `Weights`."""
        # What is off now may be drawn.
        self._weights.check_all()

    def adopt(self) -> None:
        """Let the weights win over masters wherever they differ, however somebody wrote to them."""
        if self.live.arena is not None:
            self._adopt()
            self._close(dict.fromkeys(self.live.rows, ADOPT))

    def _adopt(self, rows: slice = ALL) -> None:
        """Take over into the masters what torch tells that was written to the weights; refuse weights that changed."""
        if not self._weights.are_as_left(rows):
            self._weights.check(rows)
            self._follow_weights(rows, self.live.rows)

    def _follow_weights(self, rows: slice, slots: Container[int]) -> None:
        """Let the state of some slots follow their weights, where somebody exchanged these or wrote to them."""
        assert self.live.arena is not None
        adopted, trained = {}, list(self.live.rows)
        for slot in (trained[row] for row in self._weights.accept(rows)):
            if slot not in slots:
                continue
            if "master" in (views := self.live.arena.views(slot)):
                adopted[slot] = ADOPT
            else:
                # What the old weight lacked means nothing to the new one.
                views["residual"].zero_()
        self._close(adopted)

    def release(self) -> None:
        """Flush and write back all that is trained, and forget it; what somebody resized or cast is left as it is."""
        if self.live.arena is not None:
            # What the flush and the write-back do depends on the ages.
            self.collect()
            kept = {slot for slot in self.live.rows if self._weights.changed(slot) is None}
            self._follow_weights(ALL, kept)
            self._close({slot: self._leaving(self.live.rows[slot]) for slot in kept})
        self.forget()

    def forget(self) -> None:
        """Drop rows and arena, writing nothing back; what is in `state` counts from now on."""
        self.live.forget()
        self._step = None
        self._weights = Weights([], [], False)
        self._arrivals = self._hyper = None
