"""How a round runs on a fused kernel: rows into its tables, its ages and sums back into the arena."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from misa_kernels.arena import Arena
from misa_kernels.kernels.rows import Row, Settings, StepInput
from misa_kernels.kernels.table import SKIP, RowTable
from misa_kernels.reference import noise_keys


class FusedStep:
    """The steps of one round; with the `table` of a subclass a backend as `misa_kernels.kernels` describes it.

    Within the round, ages and sums live with the launch, per chunk; `collect` brings them to the arena.

    Args:
        rows: The tensors that are trained.
        arena: Their state, lent.
        settings: What holds for all steps.
    """

    # At age 0 the kernels read neither moments nor master.
    reads_fresh_state = False
    table: type[RowTable]

    def __init__(self, rows: Sequence[Row], arena: Arena, settings: Settings) -> None:
        self._rows = rows
        self._arena = arena
        self._settings = settings
        self._params = [row.param for row in rows]
        self._groups = max((row.group for row in rows), default=-1) + 1
        self._index = np.array([row.index for row in rows], dtype=np.int64)
        start = np.array([row.start for row in rows], dtype=np.int64)
        itemsize = np.array([param.element_size() for param in self._params], dtype=np.int64)
        self._weight_offset = start * itemsize
        self._grad_dtypes = [getattr(param, "grad_dtype", None) or param.dtype for param in self._params]
        self._grad_offset = start * np.array([dtype.itemsize for dtype in self._grad_dtypes], dtype=np.int64)
        self._launch = self.table(
            numel=np.array([row.stop - row.start for row in rows], dtype=np.int64),
            offset=np.array([arena.offset(row.slot) for row in rows], dtype=np.int64),
            group=np.array([row.group for row in rows], dtype=np.int64),
            start=start,
            weight_dtypes=[param.dtype for param in self._params],
            grad_dtypes=self._grad_dtypes,
            state={dtype: pool.buffers for dtype, pool in arena.pools.items()},
            device=arena.device,
        )
        self._slots = torch.tensor([row.slot for row in rows], dtype=torch.int64).to(arena.device)
        # After a resume in mid-round these are not 0.
        self._age_before = arena.age[self._slots]
        self._updates_before = arena.updates[self._slots]
        self._score_before = arena.score_sum[self._slots]
        # Steps in which a row had no gradient but another tensor of its module had.
        self._fellow_updates = torch.zeros_like(self._updates_before)
        self._launch.set_ages(self._age_before)

    def run(self, step: StepInput) -> None:
        """Launch the step."""
        grads = [grad if grad is None or grad.is_contiguous() else grad.contiguous() for grad in step.grads]
        for grad, dtype in zip(grads, self._grad_dtypes, strict=True):
            if grad is not None and grad.dtype != dtype:
                raise TypeError(
                    f"a gradient is {grad.dtype} but must be {dtype} in this round: set the parameter's grad_dtype "
                    "before the first step"
                )
        for hyper in step.hyper:
            if isinstance(hyper.lr, Tensor) and hyper.lr.device.type != "cpu":
                raise TypeError(
                    f"lr is a tensor on {hyper.lr.device}, and reading it would wait for the device: use a float or a "
                    "tensor on the CPU"
                )
        weights = np.array(step.weight_pointers, dtype=np.int64)
        pointers = np.array([0 if grad is None else grad.data_ptr() for grad in grads], dtype=np.int64)
        settings = self._settings
        self._launch.step(
            weights + self._weight_offset,
            np.where(pointers == 0, 0, pointers + self._grad_offset),
            np.array(step.hyper[: self._groups], dtype=np.float64),
            noise_keys(step.seed, 2 * step.number, self._index) if settings.storage.noisy else None,
            max_grad_norm=settings.max_grad_norm,
            skip_nonfinite=settings.skip_nonfinite,
            grad_scale=step.grad_scale,
            found_inf=step.found_inf,
        )
        # Autograd must notice that saved weights are no longer what they were.
        torch.autograd.graph.increment_version(self._params)
        skipped = self._skipped(step.found_inf)
        if skipped is not None:
            self._arena.skipped.add_(skipped)
        if not pointers.all():
            self._count_fellows(step.grads, skipped)
        if settings.root:
            self._add_norms()

    def collect(self) -> None:
        """Bring ages, updates and scores of the arena up to date."""
        collected = self._launch.collect()
        age = collected[:, 0].int()
        self._arena.age.index_copy_(0, self._slots, age)
        updates = age - self._age_before + self._updates_before + self._fellow_updates
        self._arena.updates.index_copy_(0, self._slots, updates)
        if not self._settings.root:
            self._arena.score_sum.index_copy_(0, self._slots, self._score_before + collected[:, 1])

    def _skipped(self, found_inf: Tensor | None) -> Tensor | None:
        """Return 1 or 0 on the device, whether the step was skipped; None if it cannot have been."""
        if self._settings.skip_nonfinite:
            return self._launch.control[SKIP].int()
        return None if found_inf is None else (found_inf != 0).int().view(())

    def _count_fellows(self, grads: Sequence[Tensor | None], skipped: Tensor | None) -> None:
        present = {row.slot for row, grad in zip(self._rows, grads, strict=True) if grad is not None}
        for number, (row, grad) in enumerate(zip(self._rows, grads, strict=True)):
            if grad is None and not present.isdisjoint(row.fellows):
                self._fellow_updates[number].add_(1 if skipped is None else 1 - skipped)

    def _add_norms(self) -> None:
        """Add ‖g‖ of the step, of the whole module where it has several tensors, to the scores."""
        self._arena.sq_norm.index_copy_(0, self._slots, self._launch.collect()[:, 1])
        self._launch.clear_sums()
        self._arena.root_of_squares(row.fellows for row in self._rows if row.slot == row.fellows[0])
        self._arena.score_sum.add_(self._arena.sq_norm)
