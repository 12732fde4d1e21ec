"""Which parts has a run of MISA, and how does it follow what users exchange, freeze and thaw?

Frameworks make optimizers of their own with a copy of an optimizer's attributes, so those lead to the one run there is.
Its parameters know it, too, and it knows nothing of the optimizer, where the step and the end of a round are.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from misa_kernels import advice, kernels, options
from misa_kernels.clock import Clock
from misa_kernels.draw import linears
from misa_kernels.draw.candidates import Ints
from misa_kernels.draw.coverage import LONGEST_ROUND, Coverage, coverage, modules_a_round, round_length
from misa_kernels.draw.order import recall
from misa_kernels.draw.rehearsal import costliest_draw
from misa_kernels.draw.sampler import Draw, ImportanceSampler, Sampler, checked
from misa_kernels.memory.storage import FOREIGN, Storage
from misa_kernels.monitor import Monitor
from misa_kernels.outside.flags import Flags
from misa_kernels.outside.notices import warn
from misa_kernels.outside.recompiles import Recompiles
from misa_kernels.outside.state import State
from misa_kernels.outside.tracing import not_traced, refuse_capture
from misa_kernels.ranks.agreement import refuse_engines, together, wrapper_of
from misa_kernels.run.arrivals import hooked
from misa_kernels.run.layout import SHOWN, Layout, form_of
from misa_kernels.run.live import LiveState
from misa_kernels.run.meeting import Meeting
from misa_kernels.run.ruled import ruled_updater
from misa_kernels.run.scores import Scores
from misa_kernels.run.slice_layers import SliceLayers
from misa_kernels.run.updater import Updater

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Run:
    """A run of MISA on param groups. Its constructor takes the parameters after all that may fail.

    Args:
        groups: The optimizer's live `param_groups`.
        given: Its other arguments.
        known: The user's flags, see `Flags`.

    Attributes:
        groups: As given.
        given: As given.
        sampler: What draws.
        storage: How state is stored.
        inner_steps: Steps T in a round.
        clock: The position.
        flags: Who set `requires_grad`.
        slice_layers: The layers that make gradients of slices.
        order: What is known of the order of the layers.
        layout: What can be drawn.
        scores: What is known of it.
        live: Rows and state of what is trained now.
        updater: What updates it.
        active: int64[k], numbers of the active modules, ascending.
        monitor: The record.
        recompiles: Whether `torch.compile` keeps up with the draws.
        meeting: What the ranks that train together compare; None before the first step, or where there are none.
        room: After `rehearse()`, memory of the gradients that another draw may have; until the end of the first step.
        is_rehearsed: Whether the first round trains the costliest set.
        has_met: Whether it was found out in the first step who trains together.
        ended: Why the run has ended, as the rest of a sentence; None while it lasts.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        given: options.Options,
        known: tuple[Sequence[bool], Sequence[bool]] | None = None,
    ) -> None:
        self.groups = groups
        self.order = recall(groups)
        self.given = given
        self.sampler: Sampler = ImportanceSampler() if given.sampler is None else given.sampler
        self.storage = Storage(given.state_dtype if given.rule is None else FOREIGN, given.param_precision)
        self.clock = Clock(int(given.seed))
        self.flags = Flags(groups, known)
        follow = weakref.WeakMethod(self.follow)
        self.slice_layers = SliceLayers(self.flags, lambda: None if (own := follow()) is None else own())
        refuse_engines(self.flags.params)
        try:
            self.layout = self.lay_out()
        except ValueError as error:
            raise ValueError("; and ".join([str(error), *self.flags.advice])) from None
        self.scores = Scores(self.layout, self.sampler)
        root = self.sampler.importance_norm == "norm"
        if given.rule is None:
            self.live = LiveState(self.layout, self.storage, root, self.clock)
            self.updater = Updater(self.live, groups, given, self.clock)
        else:
            self.updater = ruled_updater(self.layout, groups, given, self.storage, root, self.clock)
            self.live = self.updater.live
        self.inner_steps = self._resolve_inner_steps()
        self.monitor = Monitor(self.layout.partition, self.scores.candidates, self.clock, self.updater.ages)
        self.recompiles = Recompiles(self.scores.candidates.layer, self.sampler.max_per_layer)
        self.meeting: Meeting | None = None
        self.room: Tensor | None = None
        self.ended: str | None = None
        self.has_met = self.is_rehearsed = False
        self._hooks: dict[Tensor, Any] = {}
        draw = self.draw()
        are_all_active = draw.active.size == len(self.layout.partition.modules)
        advice.notify(groups, self.layout.partition, self.storage, given.delta, are_all_active)
        for sentence in self.flags.advice:
            warn(sentence)
        if self.sampler.depth_window is not None and not self.order.is_known:
            advice.notify_of_order(self.sampler.depth_window, self.order.first)
        if given.total_steps is not None and (short := self.coverage(given.total_steps).advice) is not None:
            warn(short)
        self.slice_layers.check(self.layout)
        self.flags.claim(self)
        self.order.watch()
        self._hook()
        self.scores.show(self.live.state)
        self.show(draw.active)
        self.record(draw)

    def lay_out(self) -> Layout:
        """Return what can be drawn, as groups, flags and the order of the layers are now."""
        flags = self.flags
        known = self.order.names if self.order.is_told else ()
        return Layout(self.groups, self.given, self.sampler, self.storage, flags.chosen, flags.counted, known)

    def _resolve_inner_steps(self) -> int:
        inner_steps, total_steps = self.given.inner_steps, self.given.total_steps
        if not isinstance(inner_steps, str):
            return int(inner_steps)
        if total_steps is None or self.layout.partition.slicing is not None:
            return LONGEST_ROUND
        candidates, budget = self.scores.candidates, self.layout.partition.budget
        return round_length(total_steps, candidates.numel.size, modules_a_round(candidates, budget, self.sampler))

    def coverage(self, total_steps: int) -> Coverage:
        """Return how often a run of so many steps visits each module."""
        return coverage(self.layout.partition, self.scores.candidates, self.sampler, total_steps, self.inner_steps)

    @property
    def skipped_steps(self) -> int:
        """Steps left out for nonfinite gradients since construction; waits for the device."""
        arena = self.live.arena
        return self.clock.skipped_steps + (0 if arena is None else int(arena.skipped))

    # What a step begins with.

    @not_traced
    def receive(self, param: Tensor) -> None:
        """Use the gradient of a parameter within `backward()`, once for each: the host's time counts."""
        if self.flags.lent:
            return
        if not self.updater.is_within_step:
            for group in self.groups:
                options.check_place("lr", group["lr"])
        if self.live.arena is None or self.live.state.changed[0]:
            with torch.no_grad():
                self.make_ready()
        self.updater.receive(param)

    def make_ready(self) -> None:
        """Allocate the state, or take over what somebody wrote to it."""
        if self.live.arena is not None:
            self.reconcile()
            return
        if not self.clock.steps:
            self.flags.compare()
        self.follow()
        self.slice_layers.look_for_strangers(self.layout)
        self.reconcile()
        self.updater.allocate(self.layout.slots_of(self.active.tolist()))
        if self.given.backend == "auto" and self.updater.backend == "reference":
            params = [block.param for block in self.layout.blocks]
            if (reason := kernels.why_plain(params, self.storage)) is not None:
                self.flags.warn_once("backend", reason)
        if self.is_rehearsed and not self.clock.steps:
            partition = self.layout.partition
            numel = partition.budget - int(self.scores.candidates.numel[self.active].sum())
            sampled = (block.param for module in partition.modules for block in module.blocks)
            most = max(sampled, key=Tensor.element_size)
            self.room = torch.empty(numel, dtype=most.dtype, device=most.device)

    def reconcile(self) -> None:
        """Take over what somebody else wrote to `state`: a common way to begin anew is to clear it."""
        state = self.live.state
        if not state.changed[0]:
            return
        # Copies that are recorded instead of made would be lost.
        refuse_capture()
        self.updater.reconcile()
        self.scores.take(state)
        self.scores.activate(self.active, self.clock.round)
        self.scores.show(state)
        state.changed[0] = False

    def meet(self, group: ProcessGroup | None) -> None:
        """Compare with the other ranks what they begin with, and from now on what they see; None if there are none."""
        # Not at construction: other ranks may never come to construct a MISA.
        if group is not None:
            self.follow()
            if self.layout.partition.slicing is not None and wrapper_of(self.flags.params) is not None:
                raise RuntimeError(
                    "DistributedDataParallel averages gradients of whole parameters, and with granularity='slice' "
                    "there are none: train the model itself and average with "
                    "misa_kernels.distributed.replicate(model, optimizer)"
                )
            self.meeting = Meeting(group, self.layout, self.clock, self.active, self.sampler, self.inner_steps)
        self.has_met = True

    # What a round begins with.

    def draw(self) -> Draw:
        """Draw a set for the round of now."""
        candidates, budget = self.scores.candidates, self.layout.partition.budget
        drawn = self.sampler.draw(candidates, budget, self.clock.round, self.clock.seed)
        return checked(drawn, candidates, budget, self.sampler)

    def costliest(self) -> Ints:
        """Return the admissible set that should need the most memory."""
        return costliest_draw(self.layout.partition, self.scores.candidates, self.sampler, self.order)

    def show(self, active: Ints) -> None:
        """Make a set the active one for all that look: toggle `requires_grad`, show what is active."""
        chosen, slices = self.flags.chosen, self.layout.slices_of(active.tolist())
        sliced = {block.index for block in slices if chosen[block.index]}
        whole = self.layout.indices_of(active.tolist()).difference(block.index for block in slices)
        self.flags.train({index for index in whole if chosen[index]}, sliced)
        self.active = active
        self._slice()
        self.slice_layers.look_for_strangers(self.layout)
        self.scores.activate(active, self.clock.round)
        if self.meeting is not None:
            self.meeting.begin_round()

    def _slice(self) -> None:
        self.slice_layers.train(self.layout, self.active.tolist(), is_first=not self.clock.steps)

    def record(self, draw: Draw) -> None:
        """Begin the record of a round."""
        self.monitor.begin_round(
            self.clock.round,
            self.clock.steps - self.clock.round_step,
            self.active.tolist(),
            self.scores.corrected(),
            draw.probability,
            draw.perplexity,
        )

    # What the user exchanges, freezes and thaws.

    def follow(self) -> None:
        """Before the first step: go on with what was exchanged, resized, cast or frozen since then, or refuse it.

        Nothing tells of an exchange, so all that looks at parameters before the first step asks here; until then the
        old ones stay in memory.
        """
        if self.live.arena is not None or self.ended is not None:
            return
        before = self.flags.params
        now = [param for group in self.groups for param in group["params"]]
        is_same = len(now) == len(before) and all(map(is_, now, before))
        is_due = self.flags.due and not self.clock.steps
        if self.order.is_pending and together(self.given.process_group, before) is None:
            is_due |= self.order.learn()
        if is_same and form_of(now) == self.layout.form and not is_due:
            return
        if not is_same:
            # accelerate's FSDP2 puts its own tensors into `param_groups`.
            options.check_exchanged(before, now, self.given.release_gradients)
            linears.exchange(before, now)
            options.check_cast([dtype for _, dtype in self.layout.form], now, self.layout.partition)
        self.flags.compare()
        layout, earlier, places = self.lay_out(), self.layout, self.layout.places_of(self.active.tolist())
        self.flags.note_laid_out()
        self.flags.exchange(now)
        self.move(layout)
        draw = self.draw()
        needed = self.scores.candidates.numel[self.active].sum()
        if layout.is_like(earlier) and needed <= layout.partition.budget:
            self.settle(places, self.active)
        else:
            self.settle(self.staying(places), self.costliest() if self.is_rehearsed else draw.active)
        self.record(draw)

    def learn_order(self) -> bool:
        """Take over how the layers were seen to run, on all ranks as on the first; whether that is news."""
        if not self.order.is_pending:
            return False
        is_news = self.order.learn() if self.meeting is None else self.order.learn(self.meeting.share)
        if not self.order.is_told:
            self.flags.warn_once(
                "order",
                f"no layer was seen to run in round {self.clock.round - 1}, as in a model under torch.compile, so its "
                "stacks of layers count as run as they are registered: make the groups with "
                "param_groups(model, example=...)",
            )
        return is_news

    def lay_out_anew(self, is_due: bool) -> tuple[Layout | None, bool]:
        """Return another layout where one is due, and whether rounds pause, as nothing wanted can be drawn."""
        while is_due and not self.flags.is_suspended:
            try:
                layout = self.lay_out()
            except (TypeError, ValueError) as error:
                if refused := self.flags.refuse():
                    warn(f"{refused}, thawed in mid-run, stays frozen: {error}")
                    continue
                self.flags.warn_once(
                    "layout",
                    "all that could be sampled is frozen now, so nothing is trained until some of it is thawed within "
                    "`with optimizer.thawed():`",
                )
                return None, True
            self.flags.note_laid_out()
            return layout, False
        return None, self.flags.is_suspended

    def move(self, layout: Layout) -> None:
        """Go on with another layout, to which `settle` brings the state, too."""
        scores = Scores(layout, self.sampler)
        numbers = scores.carry(self.scores)
        new = {old: number for number, old in enumerate(numbers.tolist()) if old >= 0}
        self.layout, self.scores = layout, scores
        self.active = np.array([new[old] for old in self.active.tolist() if old in new], dtype=np.int64)
        self.monitor.renumber(layout.partition, scores.candidates, numbers)
        self.recompiles = Recompiles(scores.candidates.layer, self.sampler.max_per_layer)

    def settle(self, staying: set[tuple[int, int]], active: Ints) -> None:
        """Bring the state to the layout of now, and train a set in it; of `staying`, what stays keeps its state."""
        layout = self.layout
        always = {(block.index, block.start) for block in layout.partition.dense}
        self.updater.move(layout, staying & layout.places_of(active.tolist()) | always)
        self._hook()
        self.scores.show(self.live.state)
        self.show(active)

    def staying(self, places: set[tuple[int, int]]) -> set[tuple[int, int]]:
        """Return of which of the places that leave the state is kept if they are drawn again."""
        return places if self.given.keep_states == "staying" else set()

    def _hook(self) -> None:
        """With `release_gradients`, hook what may be trained."""
        if not self.given.release_gradients:
            return
        run = weakref.ref(self)

        def hook(param: Tensor) -> None:
            # A parameter must not keep its optimizer alive.
            if (receiver := run()) is not None:
                receiver.receive(param)

        for param in self.layout.spans.keys() - self._hooks.keys():
            self._hooks[param] = hooked(param, hook)

    @contextmanager
    def thawed(self) -> Iterator[None]:
        """Show the flags that the user chose; see `MISA.thawed`."""
        if self.ended is not None:
            yield
            return
        self.follow()
        with self.flags.thawed():
            yield
        if self.ended is None and self.layout.partition.slicing is not None:
            self._slice()
        self.follow()

    # The costliest round, and the end.

    @not_traced
    def rehearse(self) -> None:
        """Make the costliest set active before the first step; see `MISA.rehearse`."""
        if self.clock.steps or self.ended is not None:
            raise RuntimeError("rehearse() came after the first step(): call it right after construction")
        self.follow()
        if not self.order.is_known:
            warn(
                f"rehearse() cannot know which of {len(self.order.first)} stacks of layers runs first, so later rounds "
                "may need more memory than the first: make the groups with param_groups(model, example=...)"
            )
        self.is_rehearsed = True
        self.scores.candidates.last_round[:] = -1
        self.show(self.costliest())
        self.monitor.rounds.clear()
        self.record(self.draw())

    @not_traced
    @torch.no_grad()
    def release(self, why: str = "release()") -> None:
        """End the run and leave the weights as trained; see `MISA.release`."""
        if self.ended is not None:
            return
        refuse_capture("release()")
        self.updater.release()
        for own in self.live.state.values():
            for name in [name for name in own if name not in SHOWN]:
                own.drop(name)
        self._end(why)

    def abandon(self) -> None:
        """End the run of an optimizer that is gone: the weights stay as they are."""
        if self.ended is None:
            self._end("its optimizer was deleted", is_late=True)

    def _end(self, why: str, is_late: bool = False) -> None:
        self.ended = why
        self.order.close()
        self.slice_layers.close()
        for handle in self._hooks.values():
            handle.remove()
        self.updater.forget()
        self.flags.give_back(is_late)

    def exchange_state(self, state: Any) -> None:
        """Take a copy of what somebody assigned to `optimizer.state`, as far as it is of the parameters here."""
        if state is not self.live.state:
            known = set(self.flags.params)
            self.live.state = State({param: own for param, own in dict(state).items() if param in known})
