"""How a round runs on the plain PyTorch of `misa_kernels.reference`, on any device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from misa_kernels import reference
from misa_kernels.kernels.rows import Row, Settings, check_size
from misa_kernels.kernels.table import ADOPT, ALL, FLUSH, NONE, WRITE_BACK
from misa_kernels.memory.arena import Arena
from misa_kernels.memory.storage import PIECE, split, state_noise
from misa_kernels.ranks.shards import local
from misa_kernels.reference import Hyper, momentum_flush, noise_key, store_weight, update_ratio


class PlainStep:
    """The steps of one round, without a table; its methods are those of `FusedStep`.

    Args:
        rows: The tensors that are trained.
        arena: Their state, lent.
        settings: What holds for all steps.
    """

    name = "reference"
    # As in `RowTable`; the reference reads moments and masters of age 0, too.
    eager = True
    # Whether all tensors must be updated in one go.
    is_at_once = False

    def __init__(self, rows: Sequence[Row], arena: Arena, settings: Settings) -> None:
        self._rows = rows
        self._arena = arena
        self._settings = settings

    def run(
        self,
        grads: Sequence[Tensor | None],
        weights: Sequence[int],
        hyper: Sequence[Hyper],
        noise: tuple[int, int],
        rows: slice = ALL,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Update some rows, as far as they have a gradient, and count it in the arena; see `FusedStep.run`."""
        if rows is NONE:
            return
        arena, settings = self._arena, self._settings
        own = self._rows[rows]
        given = [(row, grad) for row, grad in zip(own, grads, strict=True) if grad is not None]
        for row, grad in given:
            # Of a part without elements the gradient only tells that there is one.
            check_size(grad, (row.numel if row.is_slice else local(row.param).numel()) or grad.numel())
        # One by one, so that what is decoded is there for one, unless all norms must be known before.
        at_once = self.is_at_once or settings.max_grad_norm is not None or settings.skip_nonfinite
        finite = None
        for some in [given] if at_once or not given else [[each] for each in given]:
            finite = self._update(some, hyper, noise, grad_scale, found_inf)
        if settings.root:
            if settings.ranks is not None:
                arena.sum_sq_norm(settings.ranks)
            arena.root_of_squares(row.fellows for row in own if row.slot == row.fellows[0])
        updated = {row.slot for row, _ in given}
        arena.advance(sorted(updated), [row.slot for row in own if not updated.isdisjoint(row.fellows)], finite)

    def _update(
        self,
        given: Sequence[tuple[Row, Tensor]],
        hyper: Sequence[Hyper],
        noise: tuple[int, int],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Tensor | None:
        """Update rows, given with their gradient; return whether it was applied, where it may not be."""
        arena, settings, storage = self._arena, self._settings, self._settings.storage
        decoded = []
        for row, grad in given:
            views, weight, key = arena.views(row.slot), row.weight(), noise_key(*noise, row.index)
            operands = reference.Operands(
                **{name: storage.decode(name, views, len(weight)) for name in storage.codecs},
                master=views.get("master"),
                age=arena.age[row.slot],
                sq_norm=arena.sq_norm[row.slot],
                start=row.noise_start,
                theta=storage.theta(views, weight) if "residual" in views else weight,
                grad=row.gradient(grad),
                hyper=hyper[row.group],
                noise_key=key if storage.param_precision == "stochastic" else None,
            )
            decoded.append((operands, views, weight, key, row))
        ranks, counted = settings.ranks, [row.is_counted for row, _ in given]
        finite = reference.adamw_step(
            [operands for operands, *_ in decoded],
            max_grad_norm=settings.max_grad_norm,
            skip_nonfinite=settings.skip_nonfinite,
            grad_scale=grad_scale,
            found_inf=found_inf,
            total=None if ranks is None else lambda norms: ranks.sum((norms * norms.new_tensor(counted)).sum()),
        )
        # What is stored as it is has been updated in place.
        skipped = None if finite is None else ~finite
        for operands, views, weight, key, row in decoded:
            numbers = state_noise(operands.start, len(weight), key, weight.device) if storage.noisy else {}
            for name in storage.codecs:
                if (x := getattr(operands, name)) is not views[name]:
                    storage.encode(name, views, x, numbers.get(name), skipped)
            if "residual" in views:
                rounded, residual = split(operands.theta)
                weight.copy_(rounded)
                views["residual"].copy_(residual)
            row.put(weight)
        return finite

    def collect(self) -> None:
        """Do nothing: the arena's counters are up to date after every step."""

    def measure(self, weights: Sequence[int], hyper: Sequence[Hyper]) -> Tensor:
        """Return Σ of the squares of the last update of each slot, and of its weight; see `RowTable.measure`."""
        sums = torch.zeros(2, len(self._arena.age), dtype=torch.float64, device=self._arena.device)
        for row in self._rows:
            h, age = hyper[row.group], self._arena.age[row.slot]
            step_size = h.lr / (1 - h.beta1 ** age.double().clamp(min=1))
            for start, weight in pieces(row):
                views = self._arena.views(row.slot, start, len(weight))
                update = update_ratio(*self._moments(views, len(weight)), h, age).double().square().sum()
                sums[0, row.slot] += torch.where(age > 0, step_size.square() * update, 0.0)
                sums[1, row.slot] += weight.double().square().sum()
        return sums

    def close(
        self, actions: Sequence[int], weights: Sequence[int], hyper: Sequence[Hyper], noise: tuple[int, int]
    ) -> None:
        """Do with each row what is left to do when a round ends; see `RowTable.close`."""
        for row, action in zip(self._rows, actions, strict=True):
            for start, weight in pieces(row) if action else ():
                self._close(row, action, start, weight, hyper[row.group], noise_key(*noise, row.index))
                if action & WRITE_BACK:
                    row.put(weight, start)

    def rehearse(self, hyper: Sequence[Hyper]) -> None:
        """Take the memory that `close` takes, and change nothing."""
        if self._rows:
            row = max(self._rows, key=lambda row: row.numel)
            for start, weight in islice(pieces(row), 1):
                self._close(row, FLUSH | WRITE_BACK, start, weight.clone(), hyper[row.group], 0)

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
            theta = momentum_flush(theta, *self._moments(views, numel), hyper, age)
        # Stochastic, or updates below half an ulp would be lost in every round.
        store_weight(weight, theta, row.noise_start + start, key)

    def _moments(self, views: Mapping[str, Tensor], numel: int) -> tuple[Tensor, Tensor]:
        decode = self._settings.storage.decode
        return decode("exp_avg", views, numel), decode("exp_avg_sq", views, numel)


def pieces(row: Row) -> Iterator[tuple[int, Tensor]]:
    """Give the weight of a row in pieces, each with the position of its first element.

    They are copies of a pitched slice, and may begin and end within its lines: groups of a codec may not.
    """
    for start in range(0, row.numel, PIECE):
        yield start, row.weight(start, min(PIECE, row.numel - start))
