"""How MISA trains: the step, the round, the switch between active sets. All that changes in a run is here.

`MISA` is what users hold of it. Frameworks make optimizers of their own with a copy of its attributes, so those lead to
the one run there is; its parameters know it, too, and it knows nothing of the optimizer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from operator import is_
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._C._dynamo import eval_frame

from misa_kernels import checkpoint, kernels
from misa_kernels import options as arguments
from misa_kernels.draw.coverage import LONGEST_ROUND, Coverage, modules_a_round, most_modules_a_round, round_length
from misa_kernels.draw.partition import Module
from misa_kernels.draw.sampler import Draw, ImportanceSampler, Sampler, checked, costliest, described, fold, scores
from misa_kernels.layout import SCORES, Layout, form_of
from misa_kernels.memory.storage import Storage
from misa_kernels.monitor import Monitor
from misa_kernels.outside.flags import Choices, Flags
from misa_kernels.outside.notices import warn
from misa_kernels.outside.recompiles import Recompiles
from misa_kernels.outside.state import State
from misa_kernels.ranks.agreement import Agreement, refuse_engines, together
from misa_kernels.ranks.shards import is_sharded
from misa_kernels.trained import ActiveSet, refuse_capture

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Method = TypeVar("Method", bound=Callable[..., Any])
# Whether dynamo looks at frames here; older versions of torch do not tell.
dynamo_callback = getattr(eval_frame, "get_eval_frame_callback", lambda: True)


def not_traced(method: Method) -> Method:
    """Hide a method from dynamo, which traces with tensors that hold nothing, and whose addresses lead nowhere."""
    disabled = torch._disable_dynamo(method)  # type: ignore[attr-defined]

    @wraps(method)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        # torch's own wrapper takes longer, and mostly for nothing. Dynamo answers the first question itself.
        if torch.compiler.is_dynamo_compiling():
            return disabled(*args, **kwargs)
        return (method if dynamo_callback() is None else disabled)(*args, **kwargs)

    return cast(Method, guarded)


class Run:
    """A run of MISA on param groups. Its constructor takes the parameters as its last act, after all that may fail.

    Args:
        groups: The optimizer's live `param_groups`.
        options: Its other arguments.
        known: The user's flags, see `Flags`.

    Attributes:
        groups: As given.
        options: As given.
        sampler: What draws.
        flags: Who set `requires_grad`.
        layout: What can be drawn.
        trained: What is trained now, with its state.
        active: int64[k], numbers of the active modules, ascending.
        monitor: The record of the run.
        inner_steps: Steps T in a round.
        round: Number of the round, from 0.
        round_step: Steps taken in it.
        skipped_before: Steps skipped in earlier rounds.
        ended: Why the run has ended, as the rest of a sentence; None while it lasts.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        options: arguments.Options,
        known: tuple[Sequence[bool], Sequence[bool]] | None = None,
    ) -> None:
        self.groups = groups
        self.options = options
        self.sampler: Sampler = ImportanceSampler() if options.sampler is None else options.sampler
        self._storage = Storage(options.state_dtype, options.param_precision)
        self.flags = Flags(groups, known)
        refuse_engines(self.flags.params)
        try:
            self.layout = self._lay_out()
        except ValueError as error:
            raise ValueError("; and ".join([str(error), *self.flags.advice])) from None
        self.trained = ActiveSet(
            self.layout.slots,
            self.layout.partition.names,
            groups,
            budget=self.layout.partition.budget,
            momentum_flush=options.momentum_flush,
            backend=options.backend,
            settings=kernels.Settings(
                max_grad_norm=options.max_grad_norm,
                skip_nonfinite=options.skip_nonfinite,
                storage=self._storage,
                root=self.sampler.importance_norm == "norm",
                ranks=self.layout.ranks,
            ),
            seed=int(options.seed),
        )
        self.inner_steps = self._resolve_inner_steps()
        self.monitor = Monitor(self.layout.partition, self.layout.candidates, self.trained.ages)
        self._recompiles = Recompiles(self.layout.candidates.layer, self.sampler.max_per_layer)
        self.round = self.round_step = self.skipped_before = 0
        self.ended: str | None = None
        self._idle_before = self._rehearsed = self._met = self._compared = False
        self._room: Tensor | None = None
        self._hooks: dict[Tensor, Any] = {}
        # Not made here: other ranks may never come to construct a MISA.
        self._agreement: Agreement | None = None
        draw = self._draw()

        arguments.notify(groups, self.layout.partition, options.delta)
        for advice in self.flags.advice:
            warn(advice)
        if options.total_steps is not None and (short := self.coverage(options.total_steps).advice) is not None:
            warn(short)
        self.flags.hold(self)
        self._hook()
        self.active = draw.active
        self._bind_scores()
        self._show(draw.active)
        self._record(draw)

    def _lay_out(self) -> Layout:
        flags = self.flags
        return Layout.of(self.groups, self.options, self.sampler, self._storage, flags.chosen, flags.counted)

    def _resolve_inner_steps(self) -> int:
        inner_steps, total_steps = self.options.inner_steps, self.options.total_steps
        if not isinstance(inner_steps, str):
            return int(inner_steps)
        if total_steps is None:
            return LONGEST_ROUND
        candidates, budget = self.layout.candidates, self.layout.partition.budget
        return round_length(total_steps, candidates.numel.size, modules_a_round(candidates, budget, self.sampler))

    def coverage(self, total_steps: int) -> Coverage:
        """Return how often a run of so many steps visits each module."""
        candidates, partition = self.layout.candidates, self.layout.partition
        return Coverage(
            total_steps=total_steps,
            inner_steps=self.inner_steps,
            modules=len(partition.modules),
            modules_a_round=modules_a_round(candidates, partition.budget, self.sampler),
            most_a_round=most_modules_a_round(candidates, self.sampler),
            delta=partition.budget / partition.total_numel,
        )

    @property
    def modules(self) -> list[Module]:
        """What is drawn, by number."""
        self.follow()
        return self.layout.partition.modules

    @property
    def skipped_steps(self) -> int:
        """Steps left out for nonfinite gradients since construction; waits for the device."""
        arena = self.trained.arena
        return self.skipped_before + (0 if arena is None else int(arena.skipped))

    def refuse_ended(self, what: str, remedy: str) -> None:
        """Raise RuntimeError if the run has ended."""
        if self.ended is not None:
            raise RuntimeError(f"{what} came after {self.ended}: {remedy}")

    def refuse_captured(self, what: str) -> None:
        """Raise RuntimeError where copies would be recorded in a CUDA graph instead of made."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            raise RuntimeError(
                f"{what} came within the capture of a CUDA graph, which records copies instead of making them: call it "
                "before or after"
            )

    # A step.

    @not_traced
    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Take a step, which may be the last of its round; see `ActiveSet.update` for the arguments.

        Properties and methods are asked only where there is something to do: the host's time in a step counts.
        """
        flags = self.flags
        if self.ended is not None:
            self.refuse_ended("step()", "construct a new MISA to go on training")
        if flags.lent:
            raise RuntimeError("step() came within thawed(), where MISA does not train: call it outside of the block")
        for group in self.groups:
            if type(group["lr"]) is not float:
                arguments.check_place("lr", group["lr"])
        if flags.sentinel is not None and flags.sentinel.requires_grad:
            flags.put_back()
        if self.trained.arena is None or self.trained.state.changed[0]:
            self.allocate()
        if not self._met:
            self.meet(together(self.options.process_group, self.flags.params))
        is_last = self.round_step + 1 >= self.inner_steps
        if is_last:
            self.trained.check_form()
        self.trained.update(grad_scale, found_inf)
        self.round_step += 1
        if self._room is not None:
            self.trained.rehearse()
            self._room = None
        if self._agreement is not None and not self._compared:
            self._compare_gradients(self._agreement)
        if is_last:
            self._end_round()

    @not_traced
    def receive(self, param: Tensor) -> None:
        """Use the gradient of a parameter within `backward()`, once for each: the host's time counts."""
        if self.flags.lent:
            return
        if not self.trained.is_within_step:
            for group in self.groups:
                if type(group["lr"]) is not float:
                    arguments.check_place("lr", group["lr"])
        if self.trained.arena is None or self.trained.state.changed[0]:
            with torch.no_grad():
                self.allocate()
        self.trained.receive(param)

    def allocate(self) -> None:
        """Make the state ready for a step: allocated, and as it is in `state`."""
        if self.trained.arena is None:
            if not self.trained.steps:
                self.flags.compare()
            self.follow()
            self._reconcile()
            self.trained.allocate(self.layout.slots_of(self.active.tolist()))
            self._warn_of_plain_steps()
            if self._rehearsed and not self.trained.steps:
                self._room = self._room_of_gradients()
        else:
            self._reconcile()

    def _warn_of_plain_steps(self) -> None:
        """Say, once, that "auto" has found nothing faster."""
        if self.options.backend == "auto" and self.trained.backend == "reference":
            params = [block.param for block in self.layout.slots.blocks]
            if (reason := kernels.why_plain(params, self._storage)) is not None:
                self.flags.warn_once("backend", reason)

    def _room_of_gradients(self) -> Tensor:
        """Return the memory of the gradients that another draw may have beyond those of the costliest one."""
        partition = self.layout.partition
        numel = partition.budget - int(self.layout.candidates.numel[self.active].sum())
        params = [self.flags.params[block.index] for module in partition.modules for block in module.blocks]
        most = max(params, key=Tensor.element_size)
        return torch.empty(numel, dtype=most.dtype, device=most.device)

    def _reconcile(self) -> None:
        """Take over what somebody else wrote to `state`: a common way to begin anew is to clear it."""
        state = self.trained.state
        if not state.changed[0]:
            return
        # Copies that are recorded instead of made would be lost.
        refuse_capture()
        self.trained.reconcile()
        slots, candidates = self.layout.slots, self.layout.candidates
        found = {name: vector.clone() for name, vector in slots.scores.items()}
        for param, span in slots.spans.items():
            own = state[param]
            for name, fresh in (("importance", 0.0), ("importance_count", 0), ("last_round", -1)):
                value = own.get(name, fresh)
                found[name][span] = value.reshape(-1).cpu() if isinstance(value, Tensor) else value
        candidates.importance[:] = slots.first(found["importance"])
        candidates.count[:] = slots.first(found["importance_count"])
        candidates.last_round[:] = slots.first(found["last_round"])
        candidates.last_round[self.active] = self.round
        self._publish_scores()
        self._bind_scores()
        state.changed[0] = False

    def follow(self) -> None:
        """Before the first step: go on with what was exchanged, resized, cast or frozen since then, or refuse it.

        Nothing tells of an exchange, so all that looks at parameters before the first step asks here; until then the
        old ones stay in memory.
        """
        if self.trained.arena is not None or self.ended is not None:
            return
        before, options = self.flags.params, self.options
        now = [param for group in self.groups for param in group["params"]]
        is_same = len(now) == len(before) and all(map(is_, now, before))
        is_due = self.flags.due and not self.trained.steps
        if is_same and form_of(now) == self.layout.form and not is_due:
            return
        if not is_same:
            # accelerate's FSDP2 puts its own tensors into `param_groups`.
            arguments.check_exchanged(before, now, options.release_gradients)
            arguments.check_cast([dtype for _, dtype in self.layout.form], now, self.layout.partition)
        self.flags.compare()
        layout, earlier, active = self._lay_out(), self.layout, self._blocks(self.active)
        self.flags.settle()
        self.flags.exchange(now)
        self._move(layout)
        draw = self._draw()
        needed = layout.candidates.numel[self.active].sum()
        if layout.is_like(earlier) and needed <= layout.partition.budget:
            self._settle(active, self.active)
        else:
            self._settle(self._staying(active), self._costliest() if self._rehearsed else draw.active)
        self._record(draw)

    # A round.

    def _end_round(self) -> None:
        """Fold the scores, take over what the user froze and thawed, draw the next active set and make it active."""
        is_idle = self._fold()
        self.round += 1
        self._recompiles.check(self.round)
        self.round_step = 0
        self.flags.compare(is_idle=is_idle)
        is_held, layout, before = self.flags.is_suspended, None, self._blocks(self.active)
        if self.flags.due and not is_held:
            layout = self._lay_out_anew()
            is_held = layout is None
        if layout is not None:
            self._move(layout)
        draw = self._draw()
        # Where nothing of what is drawn may be trained, the round goes on for another one.
        active = self.active if is_held else draw.active
        if self._agreement is not None:
            self._agreement.check(
                f"the active set of round {self.round}",
                [(self.layout.partition.modules[number].name, number) for number in active.tolist()],
                "load the same state dict on all of them, or begin anew",
            )
        if is_held:
            self.trained.switch([], [])
            self._publish_scores()
        elif layout is None:
            self._activate(active)
        else:
            self._settle(self._staying(before), active)
        self._record(draw)

    def _fold(self) -> bool:
        """Fold what the round has measured into the candidates' scores and its record; whether that is nothing."""
        read, skipped = self.trained.read_round()
        slots, candidates, sampler = self.layout.slots, self.layout.candidates, self.sampler
        sums, update, weight = (slots.sum(row)[self.active] for row in read[[0, 3, 4]])
        counts, age = (slots.max(row.astype(np.int64))[self.active] for row in read[1:3])
        mean = sums / np.maximum(counts, 1)
        ended = self.monitor.current
        ended.skipped_steps, ended.age = skipped, age
        norm = mean if sampler.importance_norm == "norm" else np.sqrt(mean)
        ended.grad_norm = np.where(counts > 0, norm, np.nan)
        ended.update_ratio = np.sqrt(update / np.where(counts * weight > 0, weight, np.nan))
        ended.unscored = fold(candidates, self.active, mean, counts > 0, sampler.importance_beta)
        if not counts.any() and not skipped:
            self._warn_of_idle_round()
        self.skipped_before += skipped
        return not counts.any()

    def _warn_of_idle_round(self) -> None:
        if not self._idle_before:
            self._idle_before = True
            first = self.layout.partition.modules[self.active[0]].name
            warn(
                f"round {self.round} ended without a gradient for any of its {len(self.active)} active modules "
                f"({first}, ...), so none was trained: mostly the model is another than the one whose parameters MISA "
                "was given, or checkpointing is re-entrant; watch_backward(model, optimizer) tells"
            )

    def _lay_out_anew(self) -> Layout | None:
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

    def _move(self, layout: Layout) -> None:
        """Go on with another layout, to which `_settle` brings the state, too."""
        numbers = layout.carry(self.layout)
        new = {old: number for number, old in enumerate(numbers.tolist()) if old >= 0}
        self.layout = layout
        self.active = np.array([new[old] for old in self.active.tolist() if old in new], dtype=np.int64)
        self.monitor.renumber(layout.partition, layout.candidates, numbers)
        self._recompiles = Recompiles(layout.candidates.layer, self.sampler.max_per_layer)

    def _settle(self, staying: set[tuple[int, int]], active: npt.NDArray[np.int64]) -> None:
        """Bring the state to the layout of now, and train a set in it; of `staying`, what stays keeps its state."""
        layout = self.layout
        kept = staying & self._blocks(active) | {(block.index, block.start) for block in layout.partition.dense}
        self.trained.exchange(layout.slots, layout.ranks, layout.partition.budget, kept)
        self._hook()
        self._bind_scores()
        self._show(active)

    def _staying(self, blocks: set[tuple[int, int]]) -> set[tuple[int, int]]:
        return blocks if self.options.keep_states == "staying" else set()

    def _blocks(self, active: npt.NDArray[np.int64]) -> set[tuple[int, int]]:
        """Return parameter and first element of the blocks of some modules."""
        modules = self.layout.partition.modules
        return {(block.index, block.start) for number in active.tolist() for block in modules[number].blocks}

    def _draw(self) -> Draw:
        candidates, budget = self.layout.candidates, self.layout.partition.budget
        return checked(
            self.sampler.draw(candidates, budget, self.round, self.trained.seed), candidates, budget, self.sampler
        )

    def _costliest(self) -> npt.NDArray[np.int64]:
        partition, candidates = self.layout.partition, self.layout.candidates
        width = np.array([module.width for module in partition.modules])
        window, quota = self.sampler.depth_window, self.sampler.max_per_layer
        return costliest(candidates, width, partition.budget, window, quota)

    def _activate(self, active: npt.NDArray[np.int64]) -> None:
        """Make `active` the active set: retire what leaves, lend the arena anew, toggle `requires_grad`."""
        before, after = self.active.tolist(), active.tolist()
        keep = set(before) & set(after) if self.options.keep_states == "staying" else set()
        slots_of = self.layout.slots_of
        self.trained.switch(
            slots_of([n for n in before if n not in keep]), slots_of([n for n in after if n not in keep])
        )
        self._show(active)

    def _show(self, active: npt.NDArray[np.int64]) -> None:
        """Toggle `requires_grad`, and publish what is active."""
        self._compared = False
        chosen = self.flags.chosen
        self.flags.train({index for index in self.layout.indices_of(active.tolist()) if chosen[index]})
        self.active = active
        self.layout.candidates.last_round[active] = self.round
        self._publish_scores()

    def _publish_scores(self) -> None:
        slots, candidates = self.layout.slots, self.layout.candidates
        active = np.zeros(candidates.numel.size, dtype=np.bool_)
        active[self.active] = True
        slots.spread("importance", candidates.importance)
        slots.spread("importance_count", candidates.count)
        slots.spread("last_round", candidates.last_round)
        slots.spread("active", active)

    def _bind_scores(self) -> None:
        """Put the scores of every candidate where torch's tools look for them."""
        slots = self.layout.slots
        for param, span in slots.spans.items():
            if span.start >= slots.dense:
                self.trained.state[param].put({name: vector[span] for name, vector in slots.scores.items()})

    def _record(self, draw: Draw) -> None:
        self.monitor.begin_round(
            self.round,
            self.trained.steps - self.round_step,
            self.active.tolist(),
            scores(self.layout.candidates, self.sampler.importance_beta, self.sampler.importance_norm),
            draw.probability,
            draw.perplexity,
        )

    def _hook(self) -> None:
        """With `release_gradients`, hook what may be trained; torch takes no hook of what requires no gradient."""
        if not self.options.release_gradients:
            return
        run = weakref.ref(self)

        def hook(param: Tensor) -> None:
            # A parameter must not keep its optimizer alive.
            if (receiver := run()) is not None:
                receiver.receive(param)

        for param in self.layout.slots.spans.keys() - self._hooks.keys():
            required = param.requires_grad
            param.requires_grad_(True)
            self._hooks[param] = cast(Any, param).register_post_accumulate_grad_hook(hook)
            param.requires_grad_(required)

    # Several processes.

    def meet(self, group: ProcessGroup | None) -> None:
        """Compare with the other ranks what they begin with, and from now on what they see; None if there are none."""
        if group is not None:
            self.follow()
            names, form = self.layout.partition.names, self.layout.form
            tensors = [(name, (*shape, dtype)) for name, (shape, dtype) in zip(names, form, strict=True)]
            agreement = Agreement(group)
            agreement.check(
                "what MISA begins with",
                [
                    *tensors,
                    ("seed", self.trained.seed),
                    ("inner_steps", self.inner_steps),
                    ("sampler", described(self.sampler)),
                    ("the budget", self.layout.partition.budget),
                    ("round", self.round),
                    ("step in the round", self.round_step),
                    ("the active set", self.active.tolist()),
                ],
                "give every rank the same model, groups, arguments and state dict",
            )
            self._agreement = agreement
        self._met = True

    def _compare_gradients(self, agreement: Agreement) -> None:
        """Compare what the first step of a round, or after a resume, saw; waits for the device."""
        self._compared = True
        arena = self.trained.arena
        assert arena is not None
        self.trained.collect()
        (sq_norm, updates), skipped = arena.read_round(arena.score_sum, arena.updates)
        # Of a sharded parameter every rank has another part.
        rows = [(slot, row) for slot, row in self.trained.rows.items() if not is_sharded(row.param)]
        names = self.layout.partition.names
        seen = [(names[row.index], (sq_norm[slot], int(updates[slot]), skipped)) for slot, row in rows]
        agreement.check(
            f"the gradients' squared norms in the first step of round {self.round}",
            seen,
            "average gradients before step() with misa_kernels.distributed.replicate(model, optimizer), or wrap the "
            "model in DistributedDataParallel(find_unused_parameters=True) before MISA freezes any of it",
        )

    # Before, after, and beside the steps.

    @not_traced
    def rehearse(self) -> None:
        """Make the costliest set active; see `MISA.rehearse`."""
        if self.trained.steps or self.ended is not None:
            raise RuntimeError("rehearse() came after the first step(): call it right after construction")
        self.follow()
        self._rehearsed = True
        self.layout.candidates.last_round[:] = -1
        self._activate(self._costliest())
        self.monitor.rounds.clear()
        self._record(self._draw())

    def put_back(self) -> None:
        """Switch off what somebody switched on that is not active; see `Flags.put_back`."""
        if self.ended is None:
            self.flags.put_back()

    @contextmanager
    def thawed(self) -> Iterator[None]:
        """Show the flags that the user chose; see `MISA.thawed`."""
        if self.ended is not None:
            yield
            return
        self.follow()
        with self.flags.thawed():
            yield
        self.follow()

    @not_traced
    @torch.no_grad()
    def release(self, why: str = "release()") -> None:
        """End the run and leave the weights as trained; see `MISA.release`."""
        if self.ended is not None:
            return
        self.refuse_captured("release()")
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
        for handle in self._hooks.values():
            handle.remove()
        self.trained.forget()
        self.flags.give_back(is_late)

    @not_traced
    def prepare_to_save(self) -> None:
        """Bring weights, masters and `state` into agreement."""
        self.refuse_captured("state_dict()")
        self.follow()
        if self.ended is None:
            self._reconcile()
            self.trained.adopt()

    @not_traced
    def complete(self, state_dict: dict[str, Any]) -> None:
        """Make a state dict, as torch makes it, independent of the arena, and add the position of the run."""
        self.trained.collect()
        state_dict["state"] = checkpoint.detach(state_dict["state"])
        self.trained.put_scores(state_dict["state"])
        for group in state_dict["param_groups"]:
            # A scheduler writes to an lr that is a tensor.
            group.update({name: value.detach().clone() for name, value in group.items() if isinstance(value, Tensor)})
        for param, name in self.trained.fresh():
            state_dict["state"][param].pop(name, None)
        storage = self.trained.storage_in_state
        position = (
            *(self.round, self.round_step, self.trained.steps, self.trained.seed, self.skipped_steps),
            *(storage.state_dtype, storage.param_precision),
            *self._given(),
        )
        state_dict["param_groups"][0].update(zip(checkpoint.POSITION, position, strict=True))

    def _given(self) -> tuple[int, str, float]:
        return self.inner_steps, described(self.sampler), float(self.options.delta)

    @not_traced
    @torch.no_grad()
    def load(self, state_dict: dict[str, Any]) -> None:
        """Resume from a saved state; see `MISA.load_state_dict`."""
        self.refuse_ended("load_state_dict()", "construct a new MISA and load into that")
        self.refuse_captured("load_state_dict()")
        self.follow()
        saved = checkpoint.read(state_dict, self.groups, self.layout)
        self._warn_of_differences(saved)

        for group, hyperparameters in zip(self.groups, saved.hyperparameters, strict=True):
            group.update(hyperparameters)
        position, candidates = saved.position, self.layout.candidates
        self.round, self.round_step = position["round"], position["round_step"]
        self.trained.steps, self.trained.seed = position["steps"], position["seed"]
        self.skipped_before = position["skipped_steps"]
        candidates.importance[:] = saved.scores["importance"]
        candidates.count[:] = saved.scores["importance_count"]
        candidates.last_round[:] = saved.scores["last_round"]
        self.trained.forget()
        self.trained.storage_in_state = saved.storage
        state = self.trained.state
        dict.clear(state)
        for param, tensors in saved.own.items():
            kept = {name: value.detach().clone() for name, value in tensors.items() if name not in SCORES}
            # An entry would make `state_dict()` another one than was saved.
            if kept:
                state[param].put(kept)
        state.changed[0] = False
        self._bind_scores()
        self._show(saved.active)
        self._record(self._draw())

    def _warn_of_differences(self, saved: checkpoint.Saved) -> None:
        if saved.storage != self._storage:
            warn(f"MISA converts a state dict with {saved.storage} to {self._storage}")
        options, pairs = self.options, zip(checkpoint.GIVEN, self._given(), strict=True)
        made = (
            {"inner_steps": f" ('auto' with total_steps={options.total_steps})"}
            if options.inner_steps == "auto"
            else {}
        )
        other = [
            f"{name}={saved.position[name]} where this optimizer has {ours}{made.get(name, '')}"
            for name, ours in pairs
            if saved.position.get(name, ours) != ours
        ]
        if other:
            warn(
                f"the state dict was saved with {', and '.join(other)}, which holds from here on: construct MISA as it "
                "was to go on as the run would have"
            )

    def to_copy(self, state_dict: Callable[[], dict[str, Any]]) -> tuple[Choices, bool, dict[str, Any] | None]:
        """Return what `resume_copy` needs: flags, whether the run was rehearsed, and its state unless it has ended."""
        saved = None if self.ended is not None else state_dict()
        return self.flags.choices(), self._rehearsed, saved

    def resume_copy(self, choices: Choices, rehearsed: bool, state_dict: dict[str, Any] | None) -> None:
        """Go on as the run whose `to_copy` this is, being new and on copies of its parameters."""
        self._rehearsed = rehearsed
        if state_dict is None:
            self.release()
        else:
            self.load(state_dict)
        self.flags.choose(choices)

    def __repr__(self) -> str:
        """Say in one line what is trained now."""
        partition, share = self.layout.partition, self.monitor.current.active_fraction
        layers = f" in {len(partition.layers)} layers" if partition.layers else ""
        return (
            f"MISA({len(self.active)} of {len(partition.modules)} modules{layers} active, {share:.2%} of "
            f"{partition.total_numel:,} parameters; round {self.round}, step {self.round_step} of {self.inner_steps})"
        )

    def exchange_state(self, state: Any) -> None:
        """Take a copy of what somebody assigned to `optimizer.state`, as far as it is of the parameters here."""
        if state is not self.trained.state:
            known = set(self.flags.params)
            self.trained.state = State({param: own for param, own in dict(state).items() if param in known})
