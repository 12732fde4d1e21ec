"""How a round runs on the plain PyTorch of `misa_kernels.reference`, on any device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from misa_kernels import reference
from misa_kernels.kernels.rows import Row, Settings, StepInput, check_size
from misa_kernels.kernels.table import ADOPT, ALL, FLUSH, NONE, WRITE_BACK
from misa_kernels.memory.arena import Arena
from misa_kernels.memory.storage import PIECE, split, state_noise
from misa_kernels.ranks.shards import Ranks, local
from misa_kernels.reference import Hyper, momentum_flush, noise_key, store_weight, update_ratio


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

    def run(self, step: StepInput, rows: slice = ALL) -> None:
        """Update some rows, as far as they have a gradient, and count it in the arena."""
        if rows is NONE:
            return
        arena, settings = self._arena, self._settings
        own = self._rows[rows]
        every = zip(own, self._views[rows], step.grads, strict=True)
        given = [(row, views, grad) for row, views, grad in every if grad is not None]
        for row, _, grad in given:
            check_size(grad, local(row.param).numel() or grad.numel())
        # One by one, so that what is decoded is there for one, unless all norms must be known before.
        at_once = settings.max_grad_norm is not None or settings.skip_nonfinite
        finite = None
        for some in [given] if at_once or not given else [[each] for each in given]:
            finite = self._update(step, some)
        if settings.root:
            if settings.ranks is not None:
                arena.sum_sq_norm(settings.ranks)
            arena.root_of_squares(row.fellows for row in own if row.slot == row.fellows[0])
        updated = {row.slot for row, _, _ in given}
        arena.advance(sorted(updated), [row.slot for row in own if not updated.isdisjoint(row.fellows)], finite)

    def _update(self, step: StepInput, given: Sequence[tuple[Row, Mapping[str, Tensor], Tensor]]) -> Tensor | None:
        """Update rows, given with their state and gradient; return whether it was applied, where it may not be."""
        arena, settings, storage = self._arena, self._settings, self._settings.storage
        present, stores = [], []
        for row, views, grad in given:
            weight = row.weight()
            moments = {name: storage.decode(name, views, len(weight)) for name in storage.codecs}
            whole = storage.theta(views, weight) if "residual" in views else weight
            present.append(
                reference.Row(
                    **moments,
                    master=views.get("master"),
                    age=arena.age[row.slot],
                    sq_norm=arena.sq_norm[row.slot],
                    start=row.start,
                    theta=whole,
                    grad=grad.reshape(-1)[row.offset : row.offset + len(weight)],
                    hyper=step.hyper[row.group],
                    noise_key=step.noise_key(row) if storage.param_precision == "stochastic" else None,
                )
            )
            stores.append((row, views, moments, whole))
        finite = reference.adamw_step(
            present,
            max_grad_norm=settings.max_grad_norm,
            skip_nonfinite=settings.skip_nonfinite,
            grad_scale=step.grad_scale,
            found_inf=step.found_inf,
            total=None
            if settings.ranks is None
            else self._total([row.is_counted for row, _, _ in given], settings.ranks),
        )
        for row, views, moments, whole in stores:
            self._store(step, row, views, moments, whole, None if finite is None else ~finite)
        return finite

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

    def measure(self, step: StepInput) -> Tensor:
        """Return Σ of the squares of the last update of each slot, and of its weight; see `RowTable.measure`."""
        sums = torch.zeros(2, len(self._arena.age), dtype=torch.float64, device=self._arena.device)
        for row in self._rows:
            for start in range(0, row.stop - row.start, PIECE):
                update, weight = self._measured(row, start, step.hyper[row.group])
                sums[0, row.slot] += update
                sums[1, row.slot] += weight
        return sums

    def _measured(self, row: Row, start: int, hyper: Hyper) -> tuple[Tensor, Tensor]:
        numel = min(PIECE, row.stop - row.start - start)
        views, age = self._arena.views(row.slot, start, numel), self._arena.age[row.slot]
        m, v = (self._settings.storage.decode(name, views, numel) for name in ("exp_avg", "exp_avg_sq"))
        step_size = hyper.lr / (1 - hyper.beta1 ** age.double().clamp(min=1))
        update = step_size.square() * update_ratio(m, v, hyper, age).double().square().sum()
        return torch.where(age > 0, update, 0.0), row.weight(start, numel).double().square().sum()

    def close(self, step: StepInput, actions: Sequence[int]) -> None:
        """Do with each row what is left to do when a round ends; see `RowTable.close`."""
        for row, action in zip(self._rows, actions, strict=True):
            if action:
                key = noise_key(step.seed, 2 * step.number + 1, row.index)
                for start in range(0, row.stop - row.start, PIECE):
                    weight = row.weight(start, min(PIECE, row.stop - row.start - start))
                    self._close(row, action, start, weight, step.hyper[row.group], key)

    def rehearse(self, step: StepInput) -> None:
        """Take the memory that `close` takes, and change nothing."""
        if self._rows:
            row = max(self._rows, key=lambda row: row.stop - row.start)
            weight = row.weight(0, min(PIECE, row.stop - row.start)).clone()
            self._close(row, FLUSH | WRITE_BACK, 0, weight, step.hyper[row.group], 0)

    def _close(self, row: Row, action: int, start: int, weight: Tensor, hyper: Hyper, key: int) -> None:
        storage, numel = self._settings.storage, len(weight)
        views, age = self._arena.views(row.slot, start, numel), self._arena.age[row.slot]
        plain = storage.theta({}, weight)
        theta = storage.theta(views, weight)
        if (master := views.get("master")) is not None:
            # Where a weight is no longer its master rounded, somebody set it.
            theta = torch.where(master.to(weight.dtype) == weight, master, plain)
            if action & ADOPT:
                master.copy_(torch.where(age > 0, theta, master))
        if not action & WRITE_BACK:
            return
        # A state without an update may never have been filled.
        theta = torch.where(age > 0, theta, plain)
        if action & FLUSH:
            m, v = (storage.decode(name, views, numel) for name in ("exp_avg", "exp_avg_sq"))
            theta = momentum_flush(theta, m, v, hyper, age)
        # Stochastic, or updates below half an ulp would be lost in every round.
        store_weight(weight, theta, row.start + start, key)
