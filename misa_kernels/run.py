"""All that changes in a run of MISA, and how it follows what others do: new parameters, new flags, saved states.

Frameworks make optimizers of their own with a copy of an optimizer's attributes, so those lead to the one run there is.
Its parameters know it, too, and it knows nothing of the optimizer, where the step and the end of a round are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import is_
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from misa_kernels import checkpoint, kernels, options
from misa_kernels.clock import Clock
from misa_kernels.draw import linears
from misa_kernels.draw.coverage import LONGEST_ROUND, Coverage, modules_a_round, most_modules_a_round, round_length
from misa_kernels.draw.order import recall
from misa_kernels.draw.rehearsal import costliest, kept_inputs
from misa_kernels.draw.sampler import Draw, ImportanceSampler, Sampler, checked, described, rounds_held
from misa_kernels.draw.scores import Ints
from misa_kernels.gradients.hooks import Slice, SliceGradients
from misa_kernels.layout import SCORES, Layout, form_of
from misa_kernels.meeting import Meeting
from misa_kernels.memory.storage import FOREIGN, Storage
from misa_kernels.monitor import Monitor
from misa_kernels.outside.flags import Flags
from misa_kernels.outside.notices import warn
from misa_kernels.outside.recompiles import Recompiles
from misa_kernels.outside.state import State
from misa_kernels.outside.tracing import not_traced, refuse_capture
from misa_kernels.ranks.agreement import refuse_engines, together, wrapper_of
from misa_kernels.ruled import Ruled
from misa_kernels.scores import Scores
from misa_kernels.trained import Trained

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Run:
    """A run of MISA on param groups. Its constructor takes the parameters as its last act, after all that may fail.

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
        gradients: What makes those of slices.
        order: What is known of the order of the layers.
        layout: What can be drawn.
        scores: What is known of it.
        trained: What is trained now, with its state.
        active: int64[k], numbers of the active modules, ascending.
        monitor: The record.
        recompiles: Whether `torch.compile` keeps up with the draws.
        meeting: What the ranks that train together compare; None before the first step, or where there are none.
        room: After `rehearse()`, memory of the gradients that another draw may have; until the end of the first step.
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
        self.gradients = SliceGradients(lambda: None if (own := follow()) is None else own())
        refuse_engines(self.flags.params)
        try:
            self.layout = self._lay_out()
        except ValueError as error:
            raise ValueError("; and ".join([str(error), *self.flags.advice])) from None
        self.scores = Scores(self.layout, self.sampler)
        root = self.sampler.importance_norm == "norm"
        kind = Trained if given.rule is None else Ruled
        self.trained = kind(self.layout, groups, given, self.storage, root, self.clock)
        self.inner_steps = self._resolve_inner_steps()
        self.monitor = Monitor(self.layout.partition, self.scores.candidates, self.clock, self.trained.ages)
        self.recompiles = Recompiles(self.scores.candidates.layer, self.sampler.max_per_layer)
        self.meeting: Meeting | None = None
        self.room: Tensor | None = None
        self.ended: str | None = None
        self.has_met = self._is_rehearsed = False
        self._hooks: dict[Tensor, Any] = {}
        draw = self.draw()

        partition = self.layout.partition
        options.notify(groups, partition, self.storage, given.delta, draw.active.size == len(partition.modules))
        for advice in self.flags.advice:
            warn(advice)
        if self.sampler.depth_window is not None and not self.order.is_known:
            warn(
                f"depth_window={self.sampler.depth_window} counts the layers of several stacks as they are registered, "
                f"{self.order.first[0]} first, until the first step shows how they run: make the groups with "
                "param_groups(model, example=...), or name them in order in param_groups(model, layers=[...])"
            )
        if given.total_steps is not None and (short := self.coverage(given.total_steps).advice) is not None:
            warn(short)
        self.flags.hold(self)
        self.order.watch()
        self._hook()
        self.scores.show(self.trained.state)
        self.show(draw.active)
        self.record(draw)

    def _lay_out(self) -> Layout:
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
        candidates, partition = self.scores.candidates, self.layout.partition
        return Coverage(
            total_steps=total_steps,
            inner_steps=self.inner_steps,
            modules=len(partition.modules),
            modules_a_round=modules_a_round(candidates, partition.budget, self.sampler),
            most_a_round=most_modules_a_round(candidates, self.sampler),
            delta=partition.budget / partition.total_numel,
            held_rounds=rounds_held(self.sampler),
            slicing=partition.slicing,
        )

    @property
    def skipped_steps(self) -> int:
        """Steps left out for nonfinite gradients since construction; waits for the device."""
        arena = self.trained.arena
        return self.clock.skipped_steps + (0 if arena is None else int(arena.skipped))

    # What a step begins with.

    @not_traced
    def receive(self, param: Tensor) -> None:
        """Use the gradient of a parameter within `backward()`, once for each: the host's time counts."""
        if self.flags.lent:
            return
        if not self.trained.is_within_step:
            for group in self.groups:
                options.check_place("lr", group["lr"])
        if self.trained.arena is None or self.trained.state.changed[0]:
            with torch.no_grad():
                self.allocate()
        self.trained.receive(param)

    def allocate(self) -> None:
        """Allocate the state, or take over what somebody wrote to it."""
        if self.trained.arena is not None:
            self._reconcile()
            return
        if not self.clock.steps:
            self.flags.compare()
        self.follow()
        self._look_for_strangers()
        self._reconcile()
        self.trained.allocate(self.layout.slots_of(self.active.tolist()))
        if self.given.backend == "auto" and self.trained.backend == "reference":
            params = [block.param for block in self.layout.blocks]
            if (reason := kernels.why_plain(params, self.storage)) is not None:
                self.flags.warn_once("backend", reason)
        if self._is_rehearsed and not self.clock.steps:
            partition = self.layout.partition
            numel = partition.budget - int(self.scores.candidates.numel[self.active].sum())
            params = [block.param for module in partition.modules for block in module.blocks]
            most = max(params, key=Tensor.element_size)
            self.room = torch.empty(numel, dtype=most.dtype, device=most.device)

    def _reconcile(self) -> None:
        """Take over what somebody else wrote to `state`: a common way to begin anew is to clear it."""
        state = self.trained.state
        if not state.changed[0]:
            return
        # Copies that are recorded instead of made would be lost.
        refuse_capture()
        self.trained.reconcile()
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
        partition, sampler = self.layout.partition, self.sampler
        window, quota = sampler.depth_window, sampler.max_per_layer
        first: list[int] = []
        if not self.order.is_known:
            # Any of the stacks may run first, and with it a window.
            first = [partition.layers.index(name) for name in self.order.first if name in partition.layers]
            window = None
        width, source = kept_inputs(partition, self.order.inputs)
        return costliest(self.scores.candidates, width, partition.budget, window, quota, source, first)

    def show(self, active: Ints) -> None:
        """Make a set the active one for all that look: toggle `requires_grad`, show what is active."""
        chosen, slices = self.flags.chosen, self.layout.slices_of(active.tolist())
        sliced = {block.index for block in slices if chosen[block.index]}
        whole = self.layout.indices_of(active.tolist()).difference(block.index for block in slices)
        self.flags.train({index for index in whole if chosen[index]}, sliced)
        self.active = active
        self._slice()
        self._look_for_strangers()
        self.scores.activate(active, self.clock.round)
        if self.meeting is not None:
            self.meeting.begin_round()

    def _slice(self) -> None:
        """Let backward make the gradients of the active slices, as far as the user wants them trained."""
        slices: dict[nn.Parameter, tuple[Slice, list[nn.Module]]] = {}
        names: dict[nn.Parameter, str] = {}
        for block in self.layout.slices_of(self.active.tolist()):
            if block.index in self.flags.sliced and (piece := block.piece) is not None:
                slices[block.param] = piece, linears.linears_of(block.param)
                names[block.param] = self.layout.partition.names[block.index]
        for param in [param for param, (_, modules) in slices.items() if not modules]:
            del slices[param]
            sentence = (
                f"granularity='slice' finds no linear layer with the weight {names[param]}: make the groups with "
                "param_groups(model), of the model that is trained, and keep that and its layers"
            )
            if not self.clock.steps:
                raise RuntimeError(sentence)
            self.flags.warn_once("lost", f"{sentence}; no slice of it is trained from now on")
        self.gradients.train(slices, names)

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

    def _look_for_strangers(self) -> None:
        """Say once that a layer was wrapped or exchanged, as by an adapter, for what has parameters of its own.

        Slices go on without a sign of it: nobody need switch a weight off that requires no gradient.
        """
        if self.layout.partition.slicing is None:
            return
        known = set(map(id, self.flags.params))
        for index, param in enumerate(self.flags.params):
            for module in linears.successors_of(param):
                own = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in known]
                if own:
                    self.flags.warn_once(
                        "strangers",
                        f"where the layer with the weight {self.layout.partition.names[index]} was, there is a "
                        f"{type(module).__name__} now, as when adapters are attached, and MISA does not train what it "
                        f"has of its own, such as {own[0]}: call param_groups(model) on the model as it is now, or "
                        "leave that to another optimizer",
                    )
                    return

    def follow(self) -> None:
        """Before the first step: go on with what was exchanged, resized, cast or frozen since then, or refuse it.

        Nothing tells of an exchange, so all that looks at parameters before the first step asks here; until then the
        old ones stay in memory.
        """
        if self.trained.arena is not None or self.ended is not None:
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
        layout, earlier, places = self._lay_out(), self.layout, self.layout.places_of(self.active.tolist())
        self.flags.settle()
        self.flags.exchange(now)
        self.move(layout)
        draw = self.draw()
        needed = self.scores.candidates.numel[self.active].sum()
        if layout.is_like(earlier) and needed <= layout.partition.budget:
            self.settle(places, self.active)
        else:
            self.settle(self.staying(places), self.costliest() if self._is_rehearsed else draw.active)
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

    def lay_out_anew(self) -> Layout | None:
        """Return the layout of what the user wants trained now; None if there is none, as when all of it is frozen."""
        while True:
            try:
                layout = self._lay_out()
            except (TypeError, ValueError) as error:
                if refused := self.flags.refuse():
                    warn(f"{refused}, thawed in mid-run, stays frozen: {error}")
                    continue
                self.flags.warn_once(
                    "layout",
                    "all that could be sampled is frozen now, so nothing is trained until some of it is thawed within "
                    "`with optimizer.thawed():`",
                )
                return None
            self.flags.settle()
            return layout

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
        self.trained.exchange(layout, staying & layout.places_of(active.tolist()) | always)
        self._hook()
        self.scores.show(self.trained.state)
        self.show(active)

    def staying(self, places: set[tuple[int, int]]) -> set[tuple[int, int]]:
        """Return of which of the places that leave the state is kept if they are drawn again."""
        return places if self.given.keep_states == "staying" else set()

    def _hook(self) -> None:
        """With `release_gradients`, hook what may be trained; torch takes no hook of what requires no gradient."""
        if not self.given.release_gradients:
            return
        run = weakref.ref(self)

        def hook(param: Tensor) -> None:
            # A parameter must not keep its optimizer alive.
            if (receiver := run()) is not None:
                receiver.receive(param)

        for param in self.layout.spans.keys() - self._hooks.keys():
            required = param.requires_grad
            param.requires_grad_(True)
            self._hooks[param] = cast(Any, param).register_post_accumulate_grad_hook(hook)
            param.requires_grad_(required)

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
        self._is_rehearsed = True
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
        self.trained.release()
        for own in self.trained.state.values():
            for name in [name for name in own if name not in SCORES]:
                own.drop(name)
        self._end(why)

    def abandon(self) -> None:
        """End the run of an optimizer that is gone: the weights stay as they are."""
        if self.ended is None:
            self._end("its optimizer was deleted", is_late=True)

    def _end(self, why: str, is_late: bool = False) -> None:
        self.ended = why
        self.order.close()
        self.gradients.close()
        for handle in self._hooks.values():
            handle.remove()
        self.trained.forget()
        self.flags.give_back(is_late)

    # Saved states, and copies.

    @not_traced
    def prepare_to_save(self) -> None:
        """Bring weights, masters and `state` into agreement."""
        refuse_capture("state_dict()")
        self.follow()
        if self.ended is None:
            self._reconcile()
            self.trained.adopt()

    @not_traced
    def complete(self, state_dict: dict[str, Any]) -> None:
        """Make a state dict, as torch makes it, independent of the arena, and add the position of the run."""
        clock = replace(self.clock, skipped_steps=self.skipped_steps)
        order = self.order.names if self.order.is_told else None
        checkpoint.write(state_dict, self.trained, clock, self.scores.unheard(), self._described(), order)

    def _described(self) -> tuple[int, str, float]:
        return self.inner_steps, described(self.sampler), float(self.given.delta)

    @not_traced
    @torch.no_grad()
    def load(self, state_dict: dict[str, Any]) -> None:
        """Resume from a saved state; see `MISA.load_state_dict`."""
        if self.ended is not None:
            raise RuntimeError(f"load_state_dict() came after {self.ended}: construct a new MISA and load into that")
        refuse_capture("load_state_dict()")
        self.follow()
        saved = checkpoint.read(state_dict, self.groups, self.layout, self.scores, self.trained.rule)
        if saved.order is not None and saved.order != self.layout.partition.layers:
            self._reorder(saved.order)
        made = f" ('auto' with total_steps={self.given.total_steps})" if self.given.inner_steps == "auto" else ""
        saved.warn_of_differences(self.storage, self._described(), made)

        for name in checkpoint.NUMBERS:
            setattr(self.clock, name, saved.position[name])
        self.scores.load(saved.scores, saved.position.get("unheard", ()))
        self.trained.load(saved.own, saved.storage, saved.hyperparameters)
        self.scores.show(self.trained.state)
        self.show(saved.active)
        self.record(self.draw())

    def _reorder(self, names: Sequence[str]) -> None:
        """Number the layers as another run has seen them run; modules and state stay as they are."""
        self.order.take(names)
        places = self.layout.places_of(self.active.tolist())
        self.move(self._lay_out())
        self.settle(places, self.active)

    def to_copy(self, state_dict: Callable[[], dict[str, Any]]) -> tuple[Any, ...]:
        """Return what `resume_copy` needs: flags, whether the run was rehearsed, and its state unless it has ended."""
        saved = None if self.ended is not None else state_dict()
        return *self.flags.choices(), self._is_rehearsed, saved

    def linears(self) -> list[nn.Module]:
        """Return the layers that slices are trained in, which a copy must know before it begins."""
        if self.layout.partition.slicing is None:
            return []
        return [module for param in self.layout.spans for module in linears.linears_of(param)]

    def resume_copy(
        self, held: dict[str, Any], shown: set[int], is_rehearsed: bool, state_dict: dict[str, Any] | None
    ) -> None:
        """Go on as the run whose `to_copy` this is, being new and on copies of its parameters."""
        self._is_rehearsed = is_rehearsed
        if state_dict is None:
            self.release()
        else:
            self.load(state_dict)
        self.flags.choose(held, shown)

    def exchange_state(self, state: Any) -> None:
        """Take a copy of what somebody assigned to `optimizer.state`, as far as it is of the parameters here."""
        if state is not self.trained.state:
            known = set(self.flags.params)
            self.trained.state = State({param: own for param, own in dict(state).items() if param in known})
