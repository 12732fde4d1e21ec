"""The MISA optimizer: construction, the step, the end of a round, release. What else there is, the imports tell."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from misa_kernels.draw.candidates import HEARING, SILENT, Bools, Floats, Ints, hear
from misa_kernels.draw.linears import find
from misa_kernels.draw.sampler import Sampler
from misa_kernels.interface import Interface
from misa_kernels.kernels.user_rules import RuleFactory
from misa_kernels.options import (
    Options,
    check_adamw_only,
    check_hyperparameters,
    check_place,
    check_rules_own,
    copied_groups,
)
from misa_kernels.outside.garbage import kept
from misa_kernels.outside.notices import listed
from misa_kernels.outside.tracing import not_traced
from misa_kernels.ranks.agreement import together
from misa_kernels.run.resume import complete, prepare_to_save, resume_copy, to_copy
from misa_kernels.run.run import Run

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class MISA(Interface):
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
        lr: Step size α; a float or a 0-dim tensor on the CPU, may change at any step.
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
        param_precision: What keeps updates below the resolution of 16-bit weights: "master", a float32 copy
            of the active ones; for bfloat16 also "split", the 16 bits that its weights lack of float32, or
            "stochastic", stochastic rounding.
        state_dtype: How the two moments are stored: "fp32", 8 bytes a parameter; "bf16", 4, rounded stochastically;
            "int8", 2.06, in groups of 128 with a scale; "fp8", 2.13, E4M3 with COAT's range expansion; or
            "int8+int4", 1.56, the second moment in 4 bits. The last two have no kernel on CPUs.
        max_grad_norm: Clip gradients to this global norm, over active and dense tensors, inside the step;
            scores are taken before it. None: no clipping.
        skip_nonfinite: Leave everything untouched in a step whose gradients hold NaN or Inf, and count it.
        release_gradients: Update a module within `backward()`, as soon as its gradients are there, and free them; of
            more than 32 modules, small ones wait for one another, up to 256 KiB. `step()` then counts the step and ends
            rounds. Call it after every `backward()`; not for gradient accumulation, GradScaler, `max_grad_norm` and
            `skip_nonfinite`. With activation checkpointing, 32 layers
            and `delta=.25` the peak of a step falls by 87 % of the gradients' bytes at a quarter as many tokens as
            the hidden size and by 67 % at as many; without, the activations are the peak, and it stays.
        seed: Seed of the draws and of stochastic rounding.
        process_group: The ranks of torch.distributed that train this model together, each with its own copy. What
            they begin with is compared in the first step, their gradients in the first of each round, and their draws;
            all raise where two differ or one does not come. If None, ranks are compared that train together by
            DTensors, DistributedDataParallel or `misa_kernels.distributed.replicate`, which averages the gradients,
            and no others: give it where you average gradients yourself.
        backend: "triton", one launch a step on CUDA devices; "cuda", the compiled library for them; "cpu", that for
            CPUs; "reference", plain PyTorch on any device; or "auto", the first of these that can run, which says once
            why it takes the last, where there are kernels for the device.
        rule: What updates instead of AdamW: a function that makes a `torch.optim.Optimizer` of a list of parameters,
            such as `lambda params: torch.optim.Muon(params, lr=.02)`. It is called for each param group, once at
            construction and then whenever other things are active, with these: parameters that stand in for matrices,
            or for slices of them, in their shape, in float32 where weights have 16 bits (`param_precision` holds). What
            enters begins with fresh state, what stays keeps its own (`keep_states` holds). Hyperparameters are the
            rule's own, and are found in `param_groups`. `skip_nonfinite` and GradScaler wait for the device. Not beside
            `lr`, `betas`, `eps`, `weight_decay`, `state_dtype`, `backend`, `momentum_flush`, `release_gradients`, and
            not for sharded parameters.
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
        param_precision: str = "master",
        state_dtype: str = "fp32",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        release_gradients: bool = False,
        seed: int = 0,
        process_group: ProcessGroup | None = None,
        backend: str = "auto",
        rule: RuleFactory | None = None,
        **adamw_only: bool | None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in Options.__dataclass_fields__}
        check_adamw_only(adamw_only)
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        if rule is not None:
            check_rules_own(defaults, MISA.__init__.__defaults__)
            defaults = {}
        self._begin(params, defaults, Options(**given))

    @kept()
    def _begin(
        self,
        params: Params,
        defaults: dict[str, Any],
        options: Options,
        known: tuple[Sequence[bool], Sequence[bool]] | None = None,
    ) -> None:
        torch.optim.Optimizer.__init__(self, copied_groups(params, options.rule is None), defaults)
        for group in self.param_groups if options.rule is None else ():
            check_hyperparameters(group)
        self._run = Run(self.param_groups, options, known)
        # Of a rule, which schedulers ask for, too.
        self.defaults.update(self._run.updater.defaults)
        # Of an optimizer that nobody holds any more the model shows nothing.
        weakref.finalize(self, self._run.abandon).atexit = False
        self.register_state_dict_pre_hook(lambda optimizer: prepare_to_save(cast(MISA, optimizer)._run))
        self.register_state_dict_post_hook(lambda optimizer, saved: complete(cast(MISA, optimizer)._run, saved))

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
            RuntimeError: After `release()`, within `thawed()`, within the capture of a CUDA graph, if a weight changed
                its device, dtype or shape since the first step, or if ranks begin with different things; nothing is
                changed. After the update, if the ranks' gradients or draws differ.
            TypeError: For a sparse gradient, or an lr that is a tensor on a device; nothing is changed.
            ValueError: For a tensor in `state` that does not fit; nothing is changed.
        """
        loss, releases_gradients = None, self._run.given.release_gradients
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # A GradScaler leaves these here for the call instead of unscaling and skipping by itself.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):
            # The int 0, from a scaler that found no gradient at all.
            found_inf = None
        if releases_gradients and (grad_scale is not None or found_inf is not None):
            raise RuntimeError(
                "release_gradients=True has already applied the scaled gradients of a GradScaler: train in bfloat16 "
                "without one, or leave release_gradients out"
            )
        _step(self._run, grad_scale, found_inf)
        if releases_gradients:
            self.zero_grad()
        return loss

    def rehearse(self) -> None:
        """Make the first round train the costliest admissible set, so that its first two steps show the peak memory.

        Which modules are drawn decides how deep backward runs and which activations are kept; a run whose
        first two steps fit after this call fits to the end (the state is allocated at the end of the first, which also
        takes, for a moment, what the end of a round takes). The rounds that follow are drawn as always. Of a model
        whose layers lie in several stacks this holds if it is known which runs first, from an example given to
        `param_groups`; a warning says where it is not.

        Raises:
            RuntimeError: After the first step.
        """
        self._run.rehearse()

    def release(self) -> None:
        """End the run: flush if that is on, write masters back, free all state, restore `requires_grad`.

        Scores stay in `state`; `step()` raises from then on. A second call does nothing. An optimizer that is deleted
        without it restores `requires_grad`, too, as soon as Python collects it, and leaves the weights as they are; one
        whose parameters another MISA is constructed with is released then.

        Raises:
            RuntimeError: Within the capture of a CUDA graph; nothing is changed.
        """
        self._run.release()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle it with its parameters, position and state, as `copy.deepcopy((model, optimizer))` does."""
        run = self._run
        if run.given.process_group is not None:
            raise TypeError(
                "a MISA with process_group=... cannot be copied or pickled, as the group cannot: save "
                "optimizer.state_dict(), and load it into a MISA constructed on the copy"
            )
        rest = to_copy(run, self.state_dict)
        return type(self)._copied, (
            self.param_groups,
            self.defaults,
            run.given,
            run.slice_layers.layers(run.layout),
            *rest,
        )

    @classmethod
    def _copied(
        cls,
        groups: list[dict[str, Any]],
        defaults: dict[str, Any],
        options: Options,
        layers: list[nn.Module],
        held: dict[str, Any],
        *rest: Any,
    ) -> MISA:
        """Return the copy of an optimizer on copies of its parameters and of the layers that it trains slices of."""
        optimizer = cls.__new__(cls)
        find(layers)
        with warnings.catch_warnings():
            # Said when the original was constructed.
            warnings.simplefilter("ignore", UserWarning)
            optimizer._begin(groups, defaults, options, held["laid_out"])
            resume_copy(optimizer._run, held, *rest)
        return optimizer


@not_traced
def _step(run: Run, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Take a step, which may be the last of its round; see `Updater.update` for the arguments.

    Properties and methods are asked only where there is something to do: the host's time in a step counts.
    """
    flags, clock, live, updater = run.flags, run.clock, run.live, run.updater
    if run.ended is not None:
        raise RuntimeError(f"step() came after {run.ended}: construct a new MISA to go on training")
    if flags.lent:
        raise RuntimeError("step() came within thawed(), where MISA does not train: call it outside of the block")
    for group in run.groups:
        if type(group["lr"]) is not float:
            check_place("lr", group["lr"])
    if flags.sentinel is not None and flags.sentinel.requires_grad:
        flags.put_back()
    if live.arena is None or live.state.changed[0]:
        run.make_ready()
    if not run.has_met:
        run.meet(together(run.given.process_group, flags.params))
    is_last = clock.round_step + 1 >= run.inner_steps
    if is_last:
        updater.before_last()
    updater.update(grad_scale, found_inf)
    clock.steps, clock.round_step = clock.steps + 1, clock.round_step + 1
    if run.room is not None:
        updater.rehearse()
        run.room = None
    if run.meeting is not None:
        run.meeting.compare_gradients(updater, clock.round)
    if is_last:
        end_round(run)


def end_round(run: Run) -> None:
    """Fold the scores, take over what the user froze and thawed, draw the next active set and make it active."""
    sums, counts, skipped = _fold(run)
    run.clock.round, run.clock.round_step = run.clock.round + 1, 0
    run.recompiles.check(run.clock.round)
    run.flags.compare(is_idle=not counts.any())
    before = run.layout.places_of(run.active.tolist())
    # Where nothing of what is drawn may be trained, the round goes on for another one.
    layout, is_paused = run.lay_out_anew(run.learn_order() or run.flags.due)
    if not is_paused:
        # Zeros alone are none: an expert of a stacked weight has these where no token comes to it.
        _hear(run, (counts > 0) & (sums != 0), skipped > 0)
    if layout is not None:
        run.move(layout)
    draw = run.draw()
    active = run.active if is_paused else draw.active
    if run.meeting is not None:
        run.meeting.compare_draw(active, run.layout.partition, run.clock.round)
    if is_paused:
        run.updater.switch([], [])
        run.scores.publish(active)
    elif layout is not None:
        run.settle(run.staying(before), active)
    else:
        keep = set(run.active.tolist()) & set(active.tolist()) if run.given.keep_states == "staying" else set()
        leave, enter = ([n for n in numbers.tolist() if n not in keep] for numbers in (run.active, active))
        run.updater.switch(run.layout.slots_of(leave), run.layout.slots_of(enter))
        run.show(active)
    run.record(draw)


def _fold(run: Run) -> tuple[Floats, Ints, int]:
    """Fold what the round has measured into the scores and its record.

    Returns:
        Scores and updates of each active module in this round, float64[k] and int64[k], and the steps skipped in it.
    """
    read, skipped = run.updater.read_round()
    active, layout, ended = run.active, run.layout, run.monitor.current
    sums, update, weight = (layout.sum(row)[active] for row in read[[0, 3, 4]])
    counts, age = (layout.max(row.astype(np.int64))[active] for row in read[1:3])
    mean = sums / np.maximum(counts, 1)
    ended.skipped_steps, ended.age = skipped, age
    norm = mean if run.sampler.importance_norm == "norm" else np.sqrt(mean)
    ended.grad_norm = np.where(counts > 0, norm, np.nan)
    ended.update_ratio = np.sqrt(update / np.where(counts * weight > 0, weight, np.nan))
    ended.unscored = run.scores.fold(active, mean, counts > 0)
    run.clock.skipped_steps += skipped
    if not counts.any() and not skipped:
        first = layout.partition.modules[active[0]].name
        run.flags.warn_once(
            "idle",
            f"round {run.clock.round} ended without a gradient for any of its {len(active)} active modules "
            f"({first}, ...), so none was trained: mostly the model is another than the one whose parameters MISA was "
            "given, or checkpointing is re-entrant; watch_backward(model, optimizer) tells",
        )
    return sums, counts, skipped


def _hear(run: Run, came: Bools, is_vague: bool) -> None:
    """Note which active modules had a gradient, and say once that those without are drawn rarely.

    Args:
        run: The run.
        came: bool[k], whether a gradient came.
        is_vague: Whether steps were skipped, so that one that did not come may have been among these.
    """
    known = came | (not is_vague)
    silent = hear(run.scores.candidates, run.active[known], came[known])
    # Where no gradient ever came that is said, and something else is wrong.
    if silent.size and run.scores.candidates.count.any():
        names = [run.layout.partition.modules[number].name for number in silent]
        otherwise = ""
        if run.layout.partition.slicing is not None:
            # Their gradients come from hooks on layers, which other code may not call.
            otherwise = ", draw with granularity='module' what is used otherwise than by calling its layer"
        run.flags.warn_once(
            "silent",
            f"{listed(names)} had no gradient, or zeros only, in {SILENT} rounds in which they were "
            f"active, so such modules are drawn one at a time and once in {HEARING} rounds until one comes: freeze "
            "with requires_grad_(False), before param_groups(model) or within `with optimizer.thawed():`, what is not "
            f"in use{otherwise}, or wait, as each is drawn again as before from its first gradient on",
        )
