"""What users hold of a run of MISA: the arguments, the properties, and what torch expects of an optimizer."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor

from misa_kernels import options as arguments
from misa_kernels.draw.coverage import Coverage
from misa_kernels.draw.partition import Module, Partition
from misa_kernels.draw.sampler import Sampler
from misa_kernels.monitor import Monitor
from misa_kernels.outside.flags import Choices
from misa_kernels.run import Run

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
# What refuses to clip gradients that an optimizer unscales by itself.
LIGHTNING = ("lightning", "pytorch_lightning")


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
        **adamw_only: bool | None,
    ) -> None:
        arguments.check_adamw_only(adamw_only)
        options = arguments.Options(
            delta=delta,
            inner_steps=inner_steps,
            total_steps=total_steps,
            sampler=sampler,
            keep_states=keep_states,
            momentum_flush=momentum_flush,
            param_precision=param_precision,
            state_dtype=state_dtype,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            release_gradients=release_gradients,
            seed=seed,
            process_group=process_group,
            backend=backend,
        )
        self._begin(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, options)

    def _begin(
        self,
        params: Params,
        defaults: dict[str, Any],
        options: arguments.Options,
        known: tuple[Sequence[bool], Sequence[bool]] | None = None,
    ) -> None:
        super().__init__(arguments.copied_groups(params), defaults)
        self._run = Run(self.param_groups, options, known)
        # Of an optimizer that nobody holds any more the model shows nothing.
        weakref.finalize(self, self._run.abandon).atexit = False
        self.register_state_dict_pre_hook(lambda optimizer: cast(MISA, optimizer)._run.prepare_to_save())
        self.register_state_dict_post_hook(lambda optimizer, saved: cast(MISA, optimizer)._run.complete(saved))

    @property
    def state(self) -> Any:
        """State by parameter, as torch's optimizers have it: scores, moments, ages, masters.

        What somebody writes counts from the next step on: tensors are taken over, and what is missing begins anew.
        Clearing it, or assigning an empty one, resets the optimizer within its round.
        """
        return self._run.trained.state

    @state.setter
    def state(self, value: Any) -> None:
        # torch's constructor, before there is a run, assigns an empty one.
        if "_run" in self.__dict__:
            self._run.exchange_state(value)

    @property
    def modules(self) -> list[Module]:
        """What is drawn, by number."""
        return self._run.modules

    @property
    def active(self) -> list[int]:
        """Numbers of the active modules, ascending; `optimizer.modules[i].name` is the name of one."""
        return cast(list[int], self._run.active.tolist())

    @property
    def monitor(self) -> Monitor:
        """The record of the run."""
        return self._run.monitor

    @property
    def sampler(self) -> Sampler:
        """What draws."""
        return self._run.sampler

    @property
    def inner_steps(self) -> int:
        """Optimizer steps T in a round."""
        return self._run.inner_steps

    @property
    def total_steps(self) -> int | None:
        """Planned length of the run, as given."""
        return self._run.options.total_steps

    @property
    def backend(self) -> str | None:
        """What runs the steps: "triton", "cuda", "cpu" or "reference"; None before the first step."""
        return self._run.trained.backend

    @property
    def max_grad_norm(self) -> float | None:
        """Global norm that gradients are clipped to inside the step, or None."""
        return self._run.options.max_grad_norm

    @property
    def releases_gradients(self) -> bool:
        """Whether `release_gradients` is on."""
        return self._run.options.release_gradients

    @property
    def is_released(self) -> bool:
        """Whether the run has ended, by `release()` or another MISA on its parameters."""
        return self._run.ended is not None

    @property
    def state_bytes(self) -> int:
        """Bytes of moments and masters; 0 before the first step."""
        arena = self._run.trained.arena
        return 0 if arena is None else arena.nbytes

    @property
    def skipped_steps(self) -> int:
        """Steps left out for nonfinite gradients since construction; reading it waits for the device."""
        return self._run.skipped_steps

    @property
    def _partition(self) -> Partition:
        return self._run.layout.partition

    @property
    def _released(self) -> bool:
        """Whether the run has ended, under the name that this had before."""
        return self.is_released

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler leaves unscaling and skipping to the step, which need not look at the device."""
        if self.max_grad_norm is not None or self.releases_gradients:
            return True
        # Lightning asks to know whether it may unscale and clip before, which a step takes as well.
        return not str(sys._getframe(1).f_globals.get("__name__")).startswith(LIGHTNING)

    def coverage(self, total_steps: int) -> Coverage:
        """Return how often a run visits each module on average, and advice where that is less than three times.

        Args:
            total_steps: Optimizer steps of the whole run.

        Raises:
            TypeError: If it is not a whole number.
            ValueError: If it is below 1.
        """
        arguments.check_count("total_steps", total_steps, 1, "a whole number >= 1: optimizer steps of the run")
        return self._run.coverage(total_steps)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; during construction only, since the modules and the budget are fixed by it.

        Raises:
            RuntimeError: After construction.
        """
        if "_run" in self.__dict__:
            raise RuntimeError(
                "add_param_group() came after construction, but modules and budget are fixed by then: give all "
                "groups to MISA(...), those to be trained later with the role they shall have"
            )
        super().add_param_group(param_group)
        arguments.check_hyperparameters(param_group)

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
        run = self._run
        loss, releases_gradients = None, run.options.release_gradients
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
        run.step(grad_scale, found_inf)
        if releases_gradients:
            self.zero_grad()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients; where somebody switched the whole model on, switch off what is not active in this round."""
        self._run.put_back()
        super().zero_grad(set_to_none)

    def thawed(self) -> AbstractContextManager[None]:
        """Show, for a block, which parameters are trained over the whole run, not those of this round.

        Within it `requires_grad` is what the user has chosen, for code that reads it: moving averages, checkpoints of
        trainable parameters, `torch.autograd.grad` over all parameters, copies of the model. What is changed within is
        a choice, too: what is frozen is not trained any more, what is thawed can be drawn from the next round on.
        `step()` raises within it, and gradients of modules that are not active in this round are dropped at its end.

        Example::

            with optimizer.thawed():
                ema.step(model.parameters())
                torch.save({n: p for n, p in model.named_parameters() if p.requires_grad}, path)
        """
        return self._run.thawed()

    def rehearse(self) -> None:
        """Make the first round train the costliest admissible set, so that its first two steps show the peak memory.

        Which modules are drawn decides how deep backward runs and which activations are kept; a run whose
        first two steps fit after this call fits to the end (the state is allocated at the end of the first, which also
        takes, for a moment, what the end of a round takes). The rounds that follow are drawn as always.

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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a saved state: hyperparameters, scores, active set, position in the round, moments, masters.

        The tensors may be on any device; they are copied. `requires_grad` follows the active set loaded. Other
        `inner_steps`, another sampler, `delta` or storage than were saved are named in a warning and hold.

        Args:
            state_dict: What `state_dict()` returned, of an optimizer built in the same way.

        Raises:
            ValueError: If it does not fit this optimizer; nothing is changed.
            RuntimeError: After `release()`, or within the capture of a CUDA graph.
        """
        saved = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            saved = hook(self, saved) or saved
        self._run.load(saved)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __copy__(self) -> NoReturn:
        """Refuse: two optimizers of the same parameters would undo each other's rounds."""
        raise TypeError(
            "copy.copy(optimizer) would train the same parameters twice: use copy.deepcopy((model, optimizer)), or "
            "optimizer.state_dict()"
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle it with its parameters, position and state, as `copy.deepcopy((model, optimizer))` does."""
        run = self._run
        if run.options.process_group is not None:
            raise TypeError(
                "a MISA with process_group=... cannot be copied or pickled, as the group cannot: save "
                "optimizer.state_dict(), and load it into a MISA constructed on the copy"
            )
        rest = run.to_copy(self.state_dict)
        return _copied, (type(self), self.param_groups, self.defaults, run.options, *rest)

    def __repr__(self) -> str:
        """Say in one line what is trained now."""
        return repr(self._run)

    def __str__(self) -> str:
        """Add the modules, the active and the most important ones first; waits for the device."""
        return f"{self!r}\n{self.monitor}"


def _copied(
    kind: type[MISA],
    groups: list[dict[str, Any]],
    defaults: dict[str, Any],
    options: arguments.Options,
    choices: Choices,
    *rest: Any,
) -> MISA:
    """Return the copy of an optimizer on copies of its parameters."""
    optimizer = kind.__new__(kind)
    with warnings.catch_warnings():
        # Said when the original was constructed.
        warnings.simplefilter("ignore", UserWarning)
        optimizer._begin(groups, defaults, options, choices.held["laid_out"])
        optimizer._run.resume_copy(choices, *rest)
    return optimizer
