"""How MISA trains: the step, the round, the switch between active sets, and the state that survives it."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable
from operator import is_
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from misa_kernels import arguments, checkpoint, kernels
from misa_kernels.active import ActiveSet
from misa_kernels.coverage import LONGEST_ROUND, Coverage, round_length
from misa_kernels.distributed import Agreement, group_of, refuse_engines
from misa_kernels.monitor import Monitor
from misa_kernels.partition import Module, partition
from misa_kernels.recompiles import Recompiles
from misa_kernels.sampler import (
    Candidates,
    Draw,
    ImportanceSampler,
    Sampler,
    admissible,
    costliest,
    fold,
    scores,
)
from misa_kernels.shards import is_sharded, ranks_of
from misa_kernels.slots import SCORES, Slots
from misa_kernels.storage import Storage

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class MISA(torch.optim.Optimizer):
    r"""AdamW on a sampled few of a model's modules, drawn anew every `inner_steps` steps.

    Implements *MISA: Memory-Efficient LLMs Optimization with Module-wise Importance Sampling*
    (arXiv 2511.00056). In a round, only the active modules have `requires_grad`, so gradients, optimizer
    states and the activations that only the others would need do not exist. At the end of a round the
    importance of each active module becomes :math:`G_b \leftarrow \beta G_b + (1-\beta)\,\overline{\|g_b\|^2}`
    and the next set is drawn with :math:`p_b \propto \exp(\eta\, s_b)`, s being the corrected G.

    The constructor sets `requires_grad` of every parameter it is given; `release()` restores it.

    Args:
        params: Parameters, named parameters, or groups of either, as for `torch.optim.AdamW`. A group may
            say `role`: "sampled", "dense" (always on) or "frozen"; without it, tensors of two dimensions or
            more are sampled and the others frozen (dense when `delta` is 1).
            `misa_kernels.param_groups(model)` makes groups that know the model's modules and layers.
        lr: Step size α; a float or a 0-dim tensor, may change at any step.
        betas: Decay β₁, β₂ of the two moments.
        eps: Term ε added to the denominator.
        weight_decay: Decoupled weight decay, as in AdamW.
        delta: Upper bound δ of active sampled parameters over all parameters given, in (0, 1]; those the
            user had frozen do not count.
        inner_steps: Optimizer steps T in a round; "auto" is 50, or with `total_steps` 5 to 50, such that a
            module is visited three times on average.
        total_steps: Planned length of the run in optimizer steps, for `inner_steps="auto"` and for a warning where the
            run is too short to visit each module three times; see `coverage`.
        sampler: How modules are drawn; `ImportanceSampler()` if None.
        keep_states: "staying": a module drawn again in the next round keeps its moments, age and master;
            "none": all are dropped at every switch, as in the paper.
        momentum_flush: At the end of a round apply what is left in the momentum of modules whose state is
            dropped (the paper's line 16).
        v_floor: The AMSGrad-type maximum of the paper's proof, one a module; `backend="reference"` only.
        param_precision: What keeps updates below the resolution of 16-bit weights: "master", a float32 copy
            of the active ones; for bfloat16 also "split", the 16 bits that its weights lack of float32, or
            "stochastic", stochastic rounding.
        state_dtype: How the two moments are stored: "fp32", 8 bytes a parameter; "bf16", 4, rounded stochastically;
            "int8", 2.06, in groups of 128 with a scale; "fp8", 2.13, E4M3 with COAT's range expansion; or
            "int8+int4", 1.56, the second moment in 4 bits.
        max_grad_norm: Clip gradients to this global norm, over active and dense tensors, inside the step;
            scores are taken before it. None: no clipping.
        skip_nonfinite: Leave everything untouched in a step whose gradients hold NaN or Inf, and count it.
        release_gradients: Update a module within `backward()`, as soon as its gradients are there, and free them;
            `step()` then counts the step and ends rounds. Call it after every `backward()`; not for gradient
            accumulation, GradScaler, `max_grad_norm` and `skip_nonfinite`. With activation checkpointing, 32 layers
            and `delta=.25` the peak of a step falls by 87 % of the gradients' bytes at a quarter as many tokens as
            the hidden size and by 67 % at as many; without, the activations are the peak, and it stays.
        seed: Seed of the draws and of stochastic rounding.
        process_group: The ranks of torch.distributed that train this model together, each with its own copy; all
            there are if None. Their draws and gradients are compared at the beginning and the end of every round.
            `misa_kernels.distributed.replicate` averages the gradients.
        backend: "triton", one launch a step on CUDA devices; "cuda", the compiled library for them; "cpu", that for
            CPUs; "reference", plain PyTorch on any device; or "auto", the first of these that can run, which warns
            before it takes the last for want of a library.
        **adamw_only: `amsgrad`, `maximize`, `foreach`, `capturable`, `differentiable` and `fused` of AdamW,
            accepted at their defaults so that existing calls keep working.

    Raises:
        TypeError: For an argument of the wrong kind, or integer or complex parameters with a trained role.
        ValueError: For an argument out of range, an empty or duplicated parameter list, a module larger than
            the budget, or no module to sample.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        delta: float = 0.03,
        inner_steps: int | str = "auto",
        total_steps: int | None = None,
        sampler: Sampler | None = None,
        keep_states: str = "staying",
        momentum_flush: bool = False,
        v_floor: bool = False,
        param_precision: str = "master",
        state_dtype: str = "fp32",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        release_gradients: bool = False,
        seed: int = 0,
        process_group: ProcessGroup | None = None,
        backend: str = "auto",
        **adamw_only: bool | None,
    ) -> None:
        self._constructing = True
        arguments.check_adamw_only(adamw_only)
        arguments.check_constructor(
            delta=delta,
            inner_steps=inner_steps,
            total_steps=total_steps,
            sampler=sampler,
            keep_states=keep_states,
            momentum_flush=momentum_flush,
            v_floor=v_floor,
            param_precision=param_precision,
            state_dtype=state_dtype,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            release_gradients=release_gradients,
            seed=seed,
            process_group=process_group,
            backend=backend,
        )
        kernels.check(backend)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(arguments.copied_groups(params), defaults)
        self._constructing = False

        self.sampler: Sampler = ImportanceSampler() if sampler is None else sampler
        self._keep_states = keep_states

        arguments.check_unclaimed(self.param_groups)
        refuse_engines([param for group in self.param_groups for param in group["params"]])
        self._partition = partition(self.param_groups, delta, self.sampler.granularity, self.sampler.oversized)
        self._storage = Storage(state_dtype, param_precision)
        arguments.check_trainable(self._partition, self._storage)
        self._process_group = process_group
        self._given = [param for group in self.param_groups for param in group["params"]]
        arguments.check_sharded(self._given, self._partition, self._storage, release_gradients, v_floor)
        self._dtypes = [param.dtype for param in self._given]
        ranks = ranks_of(self._given, group_of(process_group))
        self._slots = Slots(self._partition, self.param_groups, ranks)
        self._candidates = Candidates(
            numel=np.array([module.numel for module in self._partition.modules]),
            layer=np.array([module.layer for module in self._partition.modules]),
            importance=np.zeros(len(self._partition.modules)),
            count=np.zeros(len(self._partition.modules), dtype=np.int64),
            last_round=np.full(len(self._partition.modules), -1),
        )
        self._trained = ActiveSet(
            self._slots,
            self._partition.names,
            self.param_groups,
            self.state,
            budget=self._partition.budget,
            momentum_flush=momentum_flush,
            v_floor=v_floor,
            backend=backend,
            settings=kernels.Settings(
                max_grad_norm=max_grad_norm,
                skip_nonfinite=skip_nonfinite,
                storage=self._storage,
                root=self.sampler.importance_norm == "norm",
                ranks=ranks,
            ),
            seed=int(seed),
        )
        self.inner_steps = self._resolve_inner_steps(inner_steps, total_steps)
        self.monitor = Monitor(self._partition, self._candidates, self._trained.ages)
        self._recompiles = Recompiles(self._candidates.layer, getattr(self.sampler, "max_per_layer", None))
        self._round = self._round_step = self._skipped_steps = 0
        self._released = self._idle_before = False
        draw = self._draw()
        self._agreement: Agreement | None = None
        self._compared = False
        self._meet(draw.active.tolist())

        arguments.notify(self.param_groups, self._partition, delta)
        # Of which it has warned, if it had to.
        self.total_steps = total_steps
        if total_steps is not None and (advice := self.coverage(total_steps).advice) is not None:
            warnings.warn(advice, stacklevel=2)
        self.register_state_dict_pre_hook(lambda optimizer: cast(MISA, optimizer)._follow())
        self.register_state_dict_post_hook(_complete)
        arguments.claim(self.param_groups)
        # While they still require gradients, without which torch takes no hook.
        hooked = self._slots.spans if release_gradients else ()
        self._hooks = [cast(Any, param).register_post_accumulate_grad_hook(_hook(self)) for param in hooked]
        self._thawable = [param for param in self._given if param.requires_grad]
        for param in self._partition.frozen:
            if param.requires_grad:
                param.requires_grad_(False)
                param.grad = None
        self._active = np.arange(len(self._partition.modules))
        self._bind_scores()
        self._activate(draw.active)
        self._record(draw)

    @property
    def modules(self) -> list[Module]:
        """What is drawn, by number."""
        self._follow()
        return self._partition.modules

    # torch.amp.GradScaler then leaves unscaling and skipping to the step, which needs no look at the device.
    _step_supports_amp_scaling = True

    def _resolve_inner_steps(self, inner_steps: int | str, total_steps: int | None) -> int:
        if not isinstance(inner_steps, str):
            return int(inner_steps)
        if total_steps is None:
            return LONGEST_ROUND
        return round_length(total_steps, len(self._partition.modules), self._modules_a_round())

    def _modules_a_round(self) -> float:
        numel = self._candidates.numel
        fitting = self._partition.budget / float(numel.mean())
        # Where all are of one size, as layers mostly are, a part of one does not fit.
        fitting = fitting if numel.min() < numel.max() else math.floor(fitting)
        return min(max(fitting, 1.0), self._most_modules_a_round())

    def _most_modules_a_round(self) -> float:
        """Return how many modules a round could train on average, however large the budget."""
        layer, window = self._candidates.layer, getattr(self.sampler, "depth_window", None)
        windows = 1 if window is None else math.ceil(len(np.unique(layer)) / window)
        return admissible(layer, getattr(self.sampler, "max_per_layer", None)) / windows

    def coverage(self, total_steps: int) -> Coverage:
        """Return how often a run visits each module on average, and advice where that is less than three times.

        Args:
            total_steps: Optimizer steps of the whole run.

        Raises:
            TypeError: If it is not a whole number.
            ValueError: If it is below 1.
        """
        arguments.check_count("total_steps", total_steps, 1, "a whole number >= 1: optimizer steps of the run")
        delta = self._partition.budget / self._partition.total_numel
        return Coverage(
            total_steps=total_steps,
            inner_steps=self.inner_steps,
            modules=len(self._partition.modules),
            modules_a_round=self._modules_a_round(),
            most_a_round=self._most_modules_a_round(),
            delta=delta,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; during construction only, since the modules and the budget are fixed by it.

        Raises:
            RuntimeError: After construction.
        """
        if not self._constructing:
            raise RuntimeError(
                "add_param_group() came after construction, but modules and budget are fixed by then: give all "
                "groups to MISA(...), those to be trained later with the role they shall have"
            )
        super().add_param_group(param_group)
        arguments.check_hyperparameters(param_group)

    @property
    def active(self) -> list[int]:
        """Numbers of the active modules, ascending; `optimizer.modules[i].name` is the name of one."""
        return cast(list[int], self._active.tolist())

    @property
    def backend(self) -> str | None:
        """What runs the steps: "triton", "cuda", "cpu" or "reference"; None before the first step."""
        return self._trained.backend

    @property
    def releases_gradients(self) -> bool:
        """Whether `release_gradients` is on."""
        return bool(self._hooks)

    @property
    def state_bytes(self) -> int:
        """Bytes of moments and masters; 0 before the first step."""
        return 0 if self._trained.arena is None else self._trained.arena.nbytes

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the active modules and the dense tensors; every `inner_steps`-th call also ends the round.

        A tensor whose gradient is None keeps its age and score. Between the ends of rounds nothing waits for
        the device.

        Args:
            closure: Reevaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: After `release()`, or if a weight changed its device or dtype since the first step.
            TypeError: For a sparse gradient; nothing is changed.
        """
        if self._released:
            raise RuntimeError("step() came after release(): construct a new MISA to go on training")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # A GradScaler leaves these here for the call instead of unscaling and skipping by itself.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):
            # The int 0, from a scaler that found no gradient at all.
            found_inf = None
        if self._hooks and (grad_scale is not None or found_inf is not None):
            raise RuntimeError(
                "release_gradients=True has already applied the scaled gradients of a GradScaler: train in bfloat16 "
                "without one, or leave release_gradients out"
            )
        self._allocate()
        self._trained.update(grad_scale, found_inf)
        if self._hooks:
            self.zero_grad()
        self._round_step += 1
        if self._agreement is not None and not self._compared:
            self._compare_gradients(self._agreement)
        if self._round_step >= self.inner_steps:
            self._end_round()
        return loss

    def _allocate(self) -> None:
        if self._trained.arena is None:
            self._follow()
            self._trained.allocate(self._slots_of(self._active.tolist()))

    def _follow(self) -> None:
        """Go on with the tensors that accelerate's FSDP2 puts into `param_groups` for those given.

        Nothing tells of the exchange, so all that looks at parameters before the first step asks here; until then the
        old ones stay in memory.
        """
        if self._trained.arena is not None:
            return
        now = [param for group in self.param_groups for param in group["params"]]
        if len(now) == len(self._given) and all(map(is_, now, self._given)):
            return
        arguments.check_exchanged(self._given, now, bool(self._hooks))
        arguments.check_cast(self._dtypes, now, self._partition)
        arguments.check_sharded(now, self._partition, self._storage, bool(self._hooks), self._trained.v_floor)
        new = dict(zip(self._given, now, strict=True))
        ranks = ranks_of(now, group_of(self._process_group))
        for before, after in new.items():
            after.requires_grad_(before.requires_grad)
            if before in self.state:
                self.state[after] = self.state.pop(before)
        self._partition.exchange(new)
        scores, self._slots = self._slots.scores, Slots(self._partition, self.param_groups, ranks)
        self._slots.scores = scores
        self._trained.exchange(self._slots, ranks)
        self._given, self._thawable = now, [new[param] for param in self._thawable]
        arguments.claim(self.param_groups)
        self._meet(self.active)

    @torch.no_grad()
    def _receive(self, param: Tensor) -> None:
        """Use the gradient of a parameter within `backward()`."""
        self._allocate()
        self._trained.receive(param)

    def _end_round(self) -> None:
        """Fold the scores, draw the next active set and make it active."""
        read, skipped = self._trained.read_round()
        sums, update, weight = (self._slots.sum(row)[self._active] for row in read[[0, 3, 4]])
        counts, age = (self._slots.max(row.astype(np.int64))[self._active] for row in read[1:3])
        mean = sums / np.maximum(counts, 1)
        ended = self.monitor.current
        ended.skipped_steps, ended.age = skipped, age
        norm = mean if self.sampler.importance_norm == "norm" else np.sqrt(mean)
        ended.grad_norm = np.where(counts > 0, norm, np.nan)
        ended.update_ratio = np.sqrt(update / np.where(counts * weight > 0, weight, np.nan))
        if self.sampler.importance_norm == "mean":
            mean /= self._candidates.numel[self._active]
        ended.unscored = fold(self._candidates, self._active, mean, counts > 0, self.sampler.importance_beta)
        if not counts.any() and not skipped:
            self._warn_of_idle_round()
        self._skipped_steps += skipped
        self._round += 1
        self._recompiles.check(self._round)
        self._round_step = 0
        draw = self._draw()
        if self._agreement is not None:
            self._agreement.check(
                f"the active set of round {self._round}",
                [(self._partition.modules[number].name, number) for number in draw.active.tolist()],
                "load the same state dict on all of them, or begin anew",
            )
        self._activate(draw.active)
        self._record(draw)

    def _meet(self, active: list[int]) -> None:
        """Compare with the other ranks, as soon as there are any, what they were constructed with."""
        group = group_of(self._process_group)
        if self._agreement is not None or group is None:
            return
        self._agreement = Agreement(group)
        names = self._partition.names
        tensors = [(name, (*param.shape, param.dtype)) for name, param in zip(names, self._given, strict=True)]
        run = {"seed": self._trained.seed, "inner_steps": self.inner_steps, "sampler": self.sampler}
        budget = {"the budget": self._partition.budget, "the first active set": active}
        self._agreement.check(
            "what MISA is constructed with",
            [*tensors, *run.items(), *budget.items()],
            "give every rank the same model, groups and arguments",
        )

    def _compare_gradients(self, agreement: Agreement) -> None:
        """Compare what the first step of a round, or after a resume, saw; waits for the device."""
        self._compared = True
        arena = self._trained.arena
        assert arena is not None
        self._trained.collect()
        (sq_norm, updates), skipped = arena.read_round(arena.score_sum, arena.updates)
        # Of a sharded parameter every rank has another part.
        rows = [(slot, row) for slot, row in self._trained.rows.items() if not is_sharded(row.param)]
        seen = [(self._partition.names[row.index], (sq_norm[slot], int(updates[slot]), skipped)) for slot, row in rows]
        agreement.check(
            f"the gradients' squared norms in the first step of round {self._round}",
            seen,
            "average gradients before step() with misa_kernels.distributed.replicate(model, optimizer), or wrap the "
            "model in DistributedDataParallel(find_unused_parameters=True) before MISA freezes any of it",
        )

    def _warn_of_idle_round(self) -> None:
        if not self._idle_before:
            self._idle_before = True
            first = self._partition.modules[self._active[0]].name
            warnings.warn(
                f"round {self._round} ended without a gradient for any of its {len(self._active)} active modules "
                f"({first}, ...), so none was trained: mostly the model is another than the one whose parameters MISA "
                "was given, or checkpointing is re-entrant; watch_backward(model, optimizer) tells",
                stacklevel=3,
            )

    def _draw(self) -> Draw:
        return self.sampler.draw(self._candidates, self._partition.budget, self._round, self._trained.seed)

    def _slots_of(self, numbers: Iterable[int]) -> list[int]:
        return [slot for number in numbers for slot in self._slots.of[number]]

    def _activate(self, active: npt.NDArray[np.int64]) -> None:
        """Make `active` the active set: retire what leaves, toggle `requires_grad`, lend the arena anew."""
        self._compared = False
        before, after = self._active.tolist(), active.tolist()
        keep = set(before) & set(after) if self._keep_states == "staying" else set()
        self._trained.switch(
            self._slots_of(number for number in before if number not in keep),
            self._slots_of(number for number in after if number not in keep),
        )
        trained = {block.param for number in after for block in self._partition.modules[number].blocks}
        for number in before:
            for block in self._partition.modules[number].blocks:
                if block.param not in trained:
                    block.param.requires_grad_(False)
                    block.param.grad = None
        for param in trained:
            param.requires_grad_(True)
        self._active = active
        self._candidates.last_round[active] = self._round
        self._publish_scores()

    def _publish_scores(self) -> None:
        active = np.zeros(len(self._partition.modules), dtype=np.bool_)
        active[self._active] = True
        self._slots.spread("importance", self._candidates.importance)
        self._slots.spread("importance_count", self._candidates.count)
        self._slots.spread("last_round", self._candidates.last_round)
        self._slots.spread("active", active)

    def _bind_scores(self) -> None:
        """Put the scores of every candidate where torch's tools look for them."""
        for param, span in self._slots.spans.items():
            if span.start >= self._slots.dense:
                self.state[param].update({name: vector[span] for name, vector in self._slots.scores.items()})

    def _record(self, draw: Draw) -> None:
        self.monitor.begin_round(
            self._round,
            self._trained.steps - self._round_step,
            self.active,
            scores(self._candidates, self.sampler.importance_beta, self.sampler.importance_norm),
            draw.probability,
            draw.perplexity,
        )

    def rehearse(self) -> None:
        """Make the first round train the costliest admissible set, so that its first two steps show the peak memory.

        Which modules are drawn decides how deep backward runs and which activations are kept; a run whose
        first two steps fit after this call fits to the end (the state is allocated at the end of the first). The rounds
        that follow are drawn as always.

        Raises:
            RuntimeError: After the first step.
        """
        if self._trained.steps or self._released:
            raise RuntimeError("rehearse() came after the first step(): call it right after construction")
        self._follow()
        width = np.array([module.width for module in self._partition.modules])
        window, quota = (getattr(self.sampler, name, None) for name in ("depth_window", "max_per_layer"))
        self._candidates.last_round[:] = -1
        self._activate(costliest(self._candidates, width, self._partition.budget, window, quota))
        self.monitor.rounds.clear()
        self._record(self._draw())

    @torch.no_grad()
    def release(self) -> None:
        """End the run: flush if that is on, write masters back, free all state, restore `requires_grad`.

        Scores stay in `state`; `step()` raises from then on. A second call does nothing.
        """
        if self._released:
            return
        self._follow()
        for handle in self._hooks:
            handle.remove()
        # What the flush and the write-back do depends on the ages.
        self._trained.collect()
        self._trained.retire(list(self._trained.rows))
        self._trained.forget()
        for own in self.state.values():
            for name in [name for name in own if name not in SCORES]:
                del own[name]
        for param in self._thawable:
            param.requires_grad_(True)
        arguments.disclaim(self.param_groups)
        self._released = True

    @property
    def skipped_steps(self) -> int:
        """Steps left out for nonfinite gradients since construction; reading it waits for the device."""
        arena = self._trained.arena
        return self._skipped_steps + (0 if arena is None else int(arena.skipped))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a saved state: hyperparameters, scores, active set, position in the round, moments, masters.

        The tensors may be on any device; they are copied. `requires_grad` follows the active set loaded.

        Args:
            state_dict: What `state_dict()` returned, of an optimizer built in the same way.

        Raises:
            ValueError: If it does not fit this optimizer; nothing is changed.
            RuntimeError: After `release()`.
        """
        if self._released:
            raise RuntimeError("load_state_dict() came after release(): construct a new MISA and load into that")
        self._follow()
        saved = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            saved = hook(self, saved) or saved
        storage = checkpoint.storage_of(saved)
        own = checkpoint.match(saved, self.param_groups, self._slots.sizes(storage))
        values = self._slots.read(own)
        active = np.flatnonzero(self._slots.first(values["active"]))
        needed = int(self._candidates.numel[active].sum())
        if needed > self._partition.budget:
            raise ValueError(
                f"state dict has {needed} active parameters but delta allows {self._partition.budget}: use the delta "
                "it was saved with"
            )

        for group, saved_group in zip(self.param_groups, saved["param_groups"], strict=True):
            group.update(checkpoint.hyperparameters(saved_group))
        position = saved["param_groups"][0]
        self._round, self._round_step = position["round"], position["round_step"]
        self._trained.steps, self._trained.seed = position["steps"], position["seed"]
        self._skipped_steps = position["skipped_steps"]
        self._candidates.importance[:] = self._slots.first(values["importance"])
        self._candidates.count[:] = self._slots.first(values["importance_count"])
        self._candidates.last_round[:] = self._slots.first(values["last_round"])
        self._trained.forget()
        self._trained.storage_in_state = storage
        if storage != self._storage:
            warnings.warn(f"MISA converts a state dict with {storage} to {self._storage}", stacklevel=2)
        self.state.clear()
        for param, tensors in own.items():
            kept = {name: value.detach().clone() for name, value in tensors.items() if name not in SCORES}
            # An entry would make `state_dict()` another one than was saved.
            if kept:
                self.state[param].update(kept)
        self._bind_scores()
        self._activate(active)
        self._record(self._draw())
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __repr__(self) -> str:
        """Say in one line what is trained now."""
        share = self.monitor.current.active_fraction
        layers = f" in {len(self._partition.layers)} layers" if self._partition.layers else ""
        return (
            f"MISA({len(self._active)} of {len(self._partition.modules)} modules{layers} active, {share:.2%} of "
            f"{self._partition.total_numel:,} parameters; round {self._round}, step {self._round_step} of "
            f"{self.inner_steps})"
        )

    def __str__(self) -> str:
        """Add the modules, the active and the most important ones first; waits for the device."""
        return f"{self!r}\n{self.monitor}"


def _hook(optimizer: MISA) -> Callable[[Tensor], None]:
    """Return what runs when a gradient is complete; a parameter must not keep its optimizer alive."""
    alive = weakref.ref(optimizer)

    def hook(param: Tensor) -> None:
        if (receiver := alive()) is not None:
            receiver._receive(param)

    return hook


def _complete(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Make a state dict independent of the arena and add the position of the run (a post hook of torch's)."""
    assert isinstance(optimizer, MISA)
    optimizer._trained.collect()
    state_dict["state"] = checkpoint.detach(state_dict["state"])
    optimizer._trained.put_scores(state_dict["state"])
    for group in state_dict["param_groups"]:
        # A scheduler writes to an lr that is a tensor.
        group.update({name: value.detach().clone() for name, value in group.items() if isinstance(value, Tensor)})
    for param, name in optimizer._trained.fresh():
        state_dict["state"][param].pop(name, None)
    position = (
        optimizer._round,
        optimizer._round_step,
        optimizer._trained.steps,
        optimizer._trained.seed,
        optimizer.skipped_steps,
        optimizer._trained.storage_in_state.state_dtype,
        optimizer._trained.storage_in_state.param_precision,
    )
    state_dict["param_groups"][0].update(zip(checkpoint.POSITION, position, strict=True))
