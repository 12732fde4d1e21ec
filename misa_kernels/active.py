"""The tensors trained now: their rows for the kernels, and what happens when they enter and leave."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from misa_kernels.arena import Arena
from misa_kernels.checkpoint import ELEMENTWISE
from misa_kernels.reference import Hyper, Row, momentum_flush, noise_key, store_weight
from misa_kernels.slots import SCORES, Slots


class ActiveSet:
    """Always-on and active tensors with their state, which `optimizer.state` shows as views.

    Args:
        slots: The numbering of everything that may be trained.
        names: Name of every parameter by its position in the optimizer, for messages.
        groups: The optimizer's live `param_groups`.
        state: The optimizer's live `state`.
        budget: δN, in elements.
        momentum_flush: Whether a sampled tensor that leaves gets the paper's line 16.
        v_floor: Whether the proof's floor is kept.
        param_precision: "master" or "stochastic".
        seed: Seed of stochastic rounding.

    Attributes:
        arena: The memory, or None before the first step.
        rows: The row of each slot that is trained now; empty before the first step.
        steps: Updates so far, applied or not; keys the noise of stochastic rounding.
    """

    def __init__(
        self,
        slots: Slots,
        names: Sequence[str],
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        *,
        budget: int,
        momentum_flush: bool,
        v_floor: bool,
        param_precision: str,
        seed: int,
    ) -> None:
        self._slots = slots
        self._names = names
        self._groups = groups
        self._state = state
        self._budget = budget
        self._momentum_flush = momentum_flush
        self._v_floor = v_floor
        self._param_precision = param_precision
        self.seed = seed
        self.steps = 0
        self.arena: Arena | None = None
        self.rows: dict[int, Row] = {}
        # What each weight with a master looked like after our last write.
        self._written: dict[Tensor, tuple[int, int]] = {}

    def update(self, backend: ModuleType, *, max_grad_norm: float | None, skip_nonfinite: bool, root: bool) -> None:
        """Take one optimizer step on all tensors that have a gradient.

        Args:
            backend: See `kernels.select`.
            max_grad_norm: Global norm to clip to, or None.
            skip_nonfinite: Whether to leave everything as it is when a gradient is not finite.
            root: Whether scores add up ‖g‖ instead of ‖g‖².
        """
        assert self.arena is not None
        present = {slot: row for slot, row in self.rows.items() if self._has_gradient(slot)}
        self._refresh(present)
        for slot, row in present.items():
            block = self._slots.blocks[slot]
            assert block.param.grad is not None
            row.grad = block.param.grad.reshape(-1)[block.start : block.stop]
        finite = backend.adamw_step(list(present.values()), max_grad_norm=max_grad_norm, skip_nonfinite=skip_nonfinite)
        for row in present.values():
            # The row outlives the gradient, which the user may want gone.
            row.grad = row.theta
        self._remember(present)
        missing = [slot for slot in self.rows if slot not in present]
        for slot in missing:
            self.rows[slot].sq_norm.zero_()
        if root:
            self._root_of_squares(self.arena)
        self.arena.advance(
            missing, [slot for slot in missing if present.keys().isdisjoint(self._fellows(slot))], finite
        )
        self.steps += 1

    def allocate(self, enter: Iterable[int]) -> None:
        """Allocate the arena where the weights are now, lend it, and move loaded state into it.

        Args:
            enter: The sampled slots to begin with.

        Raises:
            RuntimeError: If the weights are on several devices, or on none.
        """
        blocks = self._slots.blocks
        devices = {block.param.device for block in blocks}
        if len(devices) > 1 or "meta" in {device.type for device in devices}:
            raise RuntimeError(
                f"the parameters are on {', '.join(sorted(map(str, devices)))}: MISA needs them on one device that "
                "holds data"
            )
        self.arena = Arena(
            [block.stop - block.start for block in blocks],
            [block.param.dtype for block in blocks],
            range(self._slots.dense),
            self._budget,
            devices.pop(),
            masters=self._param_precision == "master",
            v_floor=self._v_floor,
        )
        loaded = {param: dict(own) for param, own in self._state.items()}
        for param, span in self._slots.spans.items():
            self._state[param].update({name: vector[span] for name, vector in self.arena.vectors.items()})
        self.switch([], [*range(self._slots.dense), *enter])
        for param, own in loaded.items():
            for name, value in own.items():
                if name not in SCORES and name in self._state[param]:
                    live = self._state[param][name]
                    live.copy_(value.reshape(live.shape))
        for row in self.rows.values():
            if row.master is not None:
                adopt_weight(row.master, row.theta)

    def switch(self, leave: Iterable[int], enter: Sequence[int]) -> None:
        """Retire the slots that leave and train those that enter, at age 0, beside the ones that stay.

        A slot may leave and enter at once, and then starts afresh. Before the first step nothing happens.
        """
        if self.arena is None:
            return
        self.retire(leave)
        stay = list(self.rows)
        self.arena.lend(stay, enter)
        for slot in [*stay, *enter]:
            block, views = self._slots.blocks[slot], self.arena.views(slot)
            theta = block.param.detach().view(-1)[block.start : block.stop]
            shape = block.param.shape if len(theta) == block.param.numel() else (-1, *block.param.shape[1:])
            self._state[block.param].update(
                {self._slots.key(name, slot): view.view(shape) for name, view in views.items()}
            )
            floors = None if slot < self._slots.dense else self.arena.v_floor
            self.rows[slot] = Row(
                exp_avg=views["exp_avg"],
                exp_avg_sq=views["exp_avg_sq"],
                master=views.get("master"),
                age=self.arena.age[slot],
                sq_norm=self.arena.sq_norm[slot],
                v_floor=None if floors is None else floors[self._fellows(slot)[0]],
                start=block.start,
                theta=theta,
                grad=theta,
                hyper=Hyper.of(self._groups[self._slots.group[slot]]),
                noise_key=None,
            )
        entered = {slot: self.rows[slot] for slot in enter}
        for row in entered.values():
            if row.master is not None:
                row.master.copy_(row.theta)
        self._remember(entered)

    def retire(self, leave: Iterable[int]) -> None:
        """Flush, write back and forget the slots given."""
        rows = {slot: self.rows.pop(slot) for slot in leave}
        flushed = {slot for slot in rows if self._momentum_flush and slot >= self._slots.dense}
        written = {slot: row for slot, row in rows.items() if slot in flushed or row.master is not None}
        self._refresh(written)
        for slot, row in written.items():
            theta = row.theta.to(row.exp_avg.dtype) if row.master is None else row.master
            if slot in flushed:
                theta = momentum_flush(theta, row.exp_avg, row.exp_avg_sq, row.hyper, row.age)
            # Stochastic, or updates below half an ulp would be lost in every round. Odd numbers, since the even
            # ones key the noise of the steps.
            key = noise_key(self.seed, 2 * self.steps + 1, self._slots.blocks[slot].index)
            store_weight(row.theta, theta, row.start, key)
        for slot in rows:
            param = self._slots.blocks[slot].param
            for name in ELEMENTWISE:
                self._state[param].pop(self._slots.key(name, slot), None)
            self._written.pop(param, None)

    def forget(self) -> None:
        """Drop rows and arena, writing nothing back; what is in `state` counts from now on."""
        self.arena = None
        self.rows = {}
        self._written = {}

    def _has_gradient(self, slot: int) -> bool:
        param = self._slots.blocks[slot].param
        if param.grad is not None and param.grad.layout is not torch.strided:
            raise TypeError(
                f"the gradient of {self._name(slot)} is {param.grad.layout}: MISA updates dense gradients; use "
                "sparse=False in the embedding, or give it the role 'frozen'"
            )
        return param.grad is not None

    def _refresh(self, rows: dict[int, Row]) -> None:
        """Bring rows up to date with weights, hyperparameters and the noise of this step."""
        hyper = [Hyper.of(group) for group in self._groups]
        for slot, row in rows.items():
            block = self._slots.blocks[slot]
            param = block.param
            if param.device != row.age.device or param.dtype != row.theta.dtype:
                raise RuntimeError(
                    f"{self._name(slot)} is {param.dtype} on {param.device} but was {row.theta.dtype} on "
                    f"{row.age.device} in the first step: move and cast the model before training"
                )
            row.theta = param.detach().view(-1)[block.start : block.stop]
            row.hyper = hyper[self._slots.group[slot]]
            if self._param_precision == "stochastic" and param.dtype.itemsize == 2:
                row.noise_key = noise_key(self.seed, 2 * self.steps, block.index)
            if row.master is not None and self._written.get(param) != _fingerprint(param):
                adopt_weight(row.master, row.theta)

    def _remember(self, rows: dict[int, Row]) -> None:
        for slot, row in rows.items():
            if row.master is not None:
                param = self._slots.blocks[slot].param
                self._written[param] = _fingerprint(param)

    def _root_of_squares(self, arena: Arena) -> None:
        """Turn ‖g‖² of the step into ‖g‖, of the whole module where it has several tensors."""
        for number in {int(self._slots.candidate[slot]) for slot in self.rows if slot >= self._slots.dense}:
            first, *others = self._slots.of[number]
            for slot in others:
                arena.sq_norm[first].add_(arena.sq_norm[slot])
                arena.sq_norm[slot].zero_()
        arena.sq_norm.sqrt_()

    def _fellows(self, slot: int) -> Sequence[int]:
        """Return the slots of the module that a slot belongs to; a dense slot stands alone."""
        return [slot] if slot < self._slots.dense else self._slots.of[int(self._slots.candidate[slot])]

    def _name(self, slot: int) -> str:
        return self._names[self._slots.blocks[slot].index]


def adopt_weight(master: Tensor, theta: Tensor) -> None:
    """Where a 16-bit weight is no longer its master rounded, somebody set it: take it over into the master."""
    master.copy_(torch.where(master.to(theta.dtype) == theta, master, theta.to(master.dtype)))


def _fingerprint(param: Tensor) -> tuple[int, int]:
    """Return what changes when somebody else writes to a weight or exchanges its memory."""
    return param._version, param.data_ptr()
