"""A round on optimizers of the user's: scores, clipping, and what stands in for each row, in plain PyTorch.

What stands in has all bits that a master or residual has beyond the weight, the shape of what it stands for, and a
gradient of that shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from misa_kernels import reference
from misa_kernels.kernels.plain import PlainStep
from misa_kernels.kernels.rows import Row, Settings
from misa_kernels.kernels.table import ADOPT
from misa_kernels.kernels.user_rules import Rules
from misa_kernels.memory.arena import Arena, host, sent
from misa_kernels.memory.storage import split
from misa_kernels.reference import Hyper, noise_key, store_weight

# Elements that are rounded at a time.
PIECE = 1 << 20


class RuledStep(PlainStep):
    """The steps of one round on optimizers of the user's.

    Args:
        rows: The tensors that are trained.
        arena: Their ages, scores and masters.
        settings: What holds for all steps.
        rules: The optimizers.

    Attributes:
        is_measured: Whether the next step notes how far it moves each tensor.
    """

    name = "rule"
    is_at_once = True

    def __init__(self, rows: Sequence[Row], arena: Arena, settings: Settings, rules: Rules) -> None:
        super().__init__(rows, arena, settings)
        self._rules = rules
        self.is_measured = False
        self._moved = torch.zeros(2, len(arena.age), dtype=torch.float64, device=arena.device)
        rules.begin({row.slot: (row.group, self._theta(row, row.weight())) for row in rows})

    def _theta(self, row: Row, weight: Tensor) -> Tensor:
        return self._settings.storage.theta(self._arena.views(row.slot), weight).view(shape_of(row))

    def _update(
        self,
        given: Sequence[tuple[Row, Tensor]],
        hyper: Sequence[Hyper],
        noise: tuple[int, int],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Tensor | None:
        """Update rows; waits for the device where the step may be skipped, as an optimizer cannot be told there."""
        arena, settings, rows = self._arena, self._settings, [row for row, _ in given]
        grads = [row.gradient(grad) for row, grad in given]
        unscale = None if grad_scale is None else 1 / grad_scale.double()
        sq_norms = _sq_norms(grads, arena.device)
        if unscale is not None:
            sq_norms = sq_norms * unscale.square()
        index = sent(host([row.slot for row in rows]), arena.device)
        arena.sq_norm.index_copy_(0, index, sq_norms)
        coefficient, finite = reference.scale_of(
            sq_norms, settings.max_grad_norm, settings.skip_nonfinite, unscale, found_inf
        )
        if not rows or finite is not None and not finite:
            return finite
        weights = [row.weight() for row in rows]
        thetas = [self._theta(row, weight) for row, weight in zip(rows, weights, strict=True)]
        before = [theta.clone() for theta in thetas] if self.is_measured else None
        grads = [grad.to(theta.dtype).view(theta.shape) for grad, theta in zip(grads, thetas, strict=True)]
        if coefficient is not None:
            grads = [grad * coefficient.to(grad.dtype) for grad in grads]
        updated = self._rules.step([row.slot for row in rows], thetas, grads)
        if before is not None:
            torch._foreach_sub_(before, updated)
            self._moved.zero_()
            for line, values in enumerate((before, updated)):
                self._moved[line].index_copy_(0, index, _sq_norms(values, arena.device))
            self.is_measured = False
        for row, weight, theta in zip(rows, weights, updated, strict=True):
            self._store(row, weight, theta.reshape(-1), noise_key(*noise, row.index))
        return finite

    def _store(self, row: Row, weight: Tensor, theta: Tensor, key: int) -> None:
        views, is_rounded = self._arena.views(row.slot), self._settings.storage.param_precision == "stochastic"
        if weight.data_ptr() == theta.data_ptr():
            # What stood in for the weight was the weight, under another version.
            torch.autograd.graph.increment_version(weight)
        elif "residual" in views or is_rounded:
            # What rounding works with takes up to 60 bytes an element.
            for at in range(0, len(theta), PIECE):
                target, part = weight[at : at + PIECE], theta[at : at + PIECE]
                if is_rounded:
                    store_weight(target, part, row.noise_start + at, key)
                    continue
                rounded, residual = split(part)
                target.copy_(rounded)
                views["residual"][at : at + PIECE].copy_(residual)
        else:
            if "master" in views and views["master"].data_ptr() != theta.data_ptr():
                views["master"].copy_(theta)
            weight.copy_(theta)
        row.put(weight)

    def _close(self, row: Row, action: int, start: int, weight: Tensor, hyper: Hyper, key: int) -> None:
        master = self._arena.views(row.slot, start, len(weight)).get("master")
        if action & ADOPT and master is not None:
            # One without an update has been filled, too.
            is_ours = master.to(weight.dtype) == weight
            master.copy_(torch.where(is_ours, master, weight.to(master.dtype)))
        super()._close(row, action, start, weight, hyper, key)

    def measure(self, weights: Sequence[int], hyper: Sequence[Hyper]) -> Tensor:
        """Return Σ of the squares of what the measured step moved of each slot, decay included, and of its weight."""
        return self._moved.clone()

    def rehearse(self, hyper: Sequence[Hyper]) -> None:
        """Let the next step take the memory that the last one of a round takes."""
        self.is_measured = True


def shape_of(row: Row) -> tuple[int, ...]:
    """Return the shape of what stands in for a row: an expert of a stacked weight is the matrix that it is."""
    shape = tuple(row.param.shape)
    if row.width:
        return row.numel // row.width, row.width
    if row.numel == row.param.numel():
        return shape
    lines = row.numel // prod(shape[1:])
    return shape[1:] if lines == 1 and len(shape) > 2 else (lines, *shape[1:])


def _sq_norms(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return Σx² of each tensor, float64[k] on the device, which is not waited for."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device=device)
    wide = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=wide)).double().square()
