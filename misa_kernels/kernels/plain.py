"""How a round runs on the plain PyTorch of `misa_kernels.reference`, on any device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from misa_kernels import reference
from misa_kernels.arena import Arena
from misa_kernels.kernels.rows import Row, Settings, StepInput, check_size
from misa_kernels.shards import Ranks, local
from misa_kernels.storage import split, state_noise


class PlainStep:
    """The steps of one round; a backend as `misa_kernels.kernels` describes it.

    Args:
        rows: The tensors that are trained.
        arena: Their state, lent.
        settings: What holds for all steps.
    """

    name = "reference"
    # The reference reads moments and masters at age 0.
    reads_fresh_state = True

    def __init__(self, rows: Sequence[Row], arena: Arena, settings: Settings) -> None:
        self._rows = rows
        self._arena = arena
        self._settings = settings
        self._views = [arena.views(row.slot) for row in rows]

    def run(self, step: StepInput) -> None:
        """Update everything that has a gradient, and count it in the arena."""
        arena, settings, storage = self._arena, self._settings, self._settings.storage
        present, stores, counted = [], [], []
        for row, grad in zip(self._rows, step.grads, strict=True):
            if grad is not None:
                check_size(grad, local(row.param).numel() or grad.numel())
        for row, views, grad in zip(self._rows, self._views, step.grads, strict=True):
            if grad is None:
                arena.sq_norm[row.slot].zero_()
                continue
            weight = row.weight()
            moments = {name: storage.decode(name, views, len(weight)) for name in storage.codecs}
            whole = storage.theta(views, weight) if "residual" in views else weight
            present.append(
                reference.Row(
                    **moments,
                    master=views.get("master"),
                    age=arena.age[row.slot],
                    sq_norm=arena.sq_norm[row.slot],
                    v_floor=None if arena.v_floor is None or row.module is None else arena.v_floor[row.fellows[0]],
                    start=row.start,
                    theta=whole,
                    grad=grad.reshape(-1)[row.offset : row.offset + len(weight)],
                    hyper=step.hyper[row.group],
                    noise_key=step.noise_key(row) if storage.param_precision == "stochastic" else None,
                )
            )
            stores.append((row, views, moments, whole))
            counted.append(row.is_counted)
        finite = reference.adamw_step(
            present,
            max_grad_norm=settings.max_grad_norm,
            skip_nonfinite=settings.skip_nonfinite,
            grad_scale=step.grad_scale,
            found_inf=step.found_inf,
            total=None if settings.ranks is None else self._total(counted, settings.ranks),
        )
        for row, views, moments, whole in stores:
            self._store(step, row, views, moments, whole, None if finite is None else ~finite)
        if settings.root:
            if settings.ranks is not None:
                arena.sum_sq_norm(settings.ranks)
            arena.root_of_squares(row.fellows for row in self._rows if row.slot == row.fellows[0])
        missing = {row.slot for row, grad in zip(self._rows, step.grads, strict=True) if grad is None}
        idle = [row.slot for row in self._rows if missing.issuperset(row.fellows)]
        arena.advance(missing, idle, finite)

    def _total(self, counted: list[bool], ranks: Ranks) -> Callable[[Tensor], Tensor]:
        """Return what sums the squared norms of rows over all ranks."""
        share = torch.tensor(counted, dtype=torch.float64, device=self._arena.device)
        return lambda sq_norms: ranks.sum((sq_norms * share).sum())

    def _store(
        self,
        step: StepInput,
        row: Row,
        views: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
        theta: Tensor,
        skipped: Tensor | None,
    ) -> None:
        """Write back what was decoded; what is stored as it is has been updated in place."""
        storage = self._settings.storage
        noise = state_noise(row.start, len(theta), step.noise_key(row), theta.device) if storage.noisy else {}
        for name, x in moments.items():
            if x is not views[name]:
                storage.encode(name, views, x, noise.get(name), skipped)
        if "residual" in views:
            weight, residual = split(theta)
            row.weight().copy_(weight)
            views["residual"].copy_(residual)

    def collect(self) -> None:
        """Do nothing: the arena's counters are up to date after every step."""
