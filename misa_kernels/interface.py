"""What torch, frameworks and users find on an optimizer beside its steps: properties, flags, loading, reset, copies."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor

from misa_kernels.draw.coverage import Coverage
from misa_kernels.draw.partition import Module, Partition
from misa_kernels.draw.sampler import Sampler
from misa_kernels.gradients.axes import Slice
from misa_kernels.monitor import Monitor
from misa_kernels.options import check_count
from misa_kernels.outside.garbage import kept
from misa_kernels.run.resume import load, reset
from misa_kernels.run.run import Run

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# What refuses to clip gradients that an optimizer unscales by itself.
LIGHTNING = ("lightning", "pytorch_lightning")


class Interface(torch.optim.Optimizer):
    """The part of `MISA` that only asks its run, or hands on to it; see there."""

    _run: Run

    @property
    def state(self) -> Any:
        """State by parameter, as torch's optimizers have it: scores, moments, ages, masters.

        What somebody writes counts from the next step on: tensors are taken over, and what is missing begins anew.
        Clearing it, or assigning an empty one, resets the optimizer within its round.
        """
        return self._run.live.state

    @state.setter
    def state(self, value: Any) -> None:
        # torch's constructor, before there is a run, assigns an empty one.
        if "_run" in self.__dict__:
            self._run.exchange_state(value)

    @property
    def modules(self) -> list[Module]:
        """What is drawn, by number."""
        self._run.follow()
        return self._partition.modules

    @property
    def active(self) -> list[int]:
        """Numbers of the active modules, ascending; `optimizer.modules[i].name` is the name of one."""
        return cast(list[int], self._run.active.tolist())

    @property
    def trained(self) -> dict[Tensor, Slice | None]:
        """What is trained in this round, dense parameters included, and of a slice where it lies; else None."""
        run = self._run
        pieces = {block.index: block.piece for block in run.layout.slices_of(run.active.tolist())}
        return {
            run.flags.params[index]: pieces.get(index)
            for index in sorted(run.layout.indices_of(run.active.tolist()))
            if run.flags.chosen[index]
        }

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
        return self._run.given.total_steps

    @property
    def backend(self) -> str | None:
        """What runs the steps: "triton", "cuda", "cpu", "reference", or "rule"; None before the first step."""
        return self._run.updater.backend

    @property
    def max_grad_norm(self) -> float | None:
        """Global norm that gradients are clipped to inside the step, or None."""
        return self._run.given.max_grad_norm

    @property
    def releases_gradients(self) -> bool:
        """Whether `release_gradients` is on."""
        return self._run.given.release_gradients

    @property
    def is_released(self) -> bool:
        """Whether the run has ended, by `release()` or another MISA on its parameters."""
        return self._run.ended is not None

    @property
    def state_bytes(self) -> int:
        """Bytes of moments and masters, and of all that a `rule` keeps; 0 before the first step."""
        return self._run.live.nbytes

    @property
    def skipped_steps(self) -> int:
        """Steps left out for nonfinite gradients since construction; reading it waits for the device."""
        return self._run.skipped_steps

    @property
    def _partition(self) -> Partition:
        return self._run.layout.partition

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler leaves unscaling and skipping to the step, which need not look at the device."""
        if self.max_grad_norm is not None or self.releases_gradients:
            return True
        # Lightning asks to know whether it may unscale and clip before, which a step takes as well.
        return not str(sys._getframe(1).f_globals.get("__name__")).startswith(LIGHTNING)

    def compare_with(self, process_group: ProcessGroup | None) -> None:
        """Compare what is begun with among the ranks of a group; `misa_kernels.distributed.replicate` calls it.

        Args:
            process_group: Those that train together, None if it is one alone.

        Raises:
            RuntimeError: On all of them, where two differ or one does not come.
        """
        self._run.meet(process_group)

    def coverage(self, total_steps: int) -> Coverage:
        """Return how often a run visits each module on average, and advice where that is less than three times.

        Args:
            total_steps: Optimizer steps of the whole run.

        Raises:
            TypeError: If it is not a whole number.
            ValueError: If it is below 1.
        """
        check_count("total_steps", total_steps, 1, "a whole number >= 1: optimizer steps of the run")
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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients; where somebody switched the whole model on, switch off what is not active in this round."""
        self._run.flags.put_back()
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

    @kept()
    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on, beside the weights: tensors and plain types, copied."""
        return super().state_dict()

    @kept()
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
        load(self._run, saved)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @kept()
    def reset_state(self) -> None:
        """Forget what gradients have told: moments, masters, scores, counts, the record of rounds, gradients.

        What is left is what an optimizer has that was constructed just now, at this step and with these
        hyperparameters: a set is drawn anew from equal scores, and the round begins again. So nothing in it depends on
        data that shall be forgotten but the weights themselves; 16-bit weights keep no bits beside. Zeros are written
        where moments, masters and scores were; the memory of gradients and of what a rule kept is given back as it is.
        Under several ranks call it on all of them.

        Raises:
            RuntimeError: After `release()`, between `backward()` and `step()` with `release_gradients`, or within the
                capture of a CUDA graph; nothing is changed.
        """
        reset(self._run)
        self.zero_grad()

    def __copy__(self) -> NoReturn:
        """Refuse: two optimizers of the same parameters would undo each other's rounds."""
        raise TypeError(
            "copy.copy(optimizer) would train the same parameters twice: use copy.deepcopy((model, optimizer)), or "
            "optimizer.state_dict()"
        )

    def __repr__(self) -> str:
        """Say in one line what is trained now."""
        run, partition, share = self._run, self._partition, self.monitor.current.active_fraction
        layers = f" in {len(partition.layers)} layers" if partition.layers else ""
        what = "modules" if partition.slicing is None else "slices"
        return (
            f"MISA({len(run.active)} of {len(partition.modules)} {what}{layers} active, {share:.2%} of "
            f"{partition.total_numel:,} parameters; round {run.clock.round}, step {run.clock.round_step} of "
            f"{run.inner_steps})"
        )

    def __str__(self) -> str:
        """Add what is sliced, and the modules, the active and the most important first; waits for the device."""
        slicing = self._partition.slicing
        return "\n".join([repr(self), *([] if slicing is None else [f"slices: {slicing}"]), str(self.monitor)])
