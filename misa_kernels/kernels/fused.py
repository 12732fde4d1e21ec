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
    name: str
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
        self._weight_pointers: Sequence[int] | None = None
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
        age = arena.age[self._slots]
        self._launch.set_ages(age)
        # After a resume in mid-round this is not 0.
        self._score_before = arena.score_sum[self._slots]
        # A row's updates in this round less its age: what they were before, and steps in which it had no gradient but
        # another tensor of its module had.
        self._beyond_age = arena.updates[self._slots] - age

    def run(self, step: StepInput) -> None:
        """Launch the step."""
        # In one pass: with hundreds of tensors the host's time is in such loops.
        copies: list[Tensor] = []
        pointers = [
            0
            if grad is None
            else grad.data_ptr()
            if grad.dtype is dtype and grad.is_contiguous()
            else stray(grad, dtype, copies)
            for grad, dtype in zip(step.grads, self._grad_dtypes, strict=True)
        ]
        for hyper in step.hyper:
            if isinstance(hyper.lr, Tensor) and hyper.lr.device.type != "cpu":
                raise TypeError(
                    f"lr is a tensor on {hyper.lr.device}, and reading it would wait for the device: use a float or a "
                    "tensor on the CPU"
                )
        if step.weight_pointers is not self._weight_pointers:
            self._weight_pointers = step.weight_pointers
            self._weights = np.array(step.weight_pointers, dtype=np.int64) + self._weight_offset
        grads = np.array(pointers, dtype=np.int64)
        settings = self._settings
        self._launch.step(
            self._weights,
            np.where(grads == 0, 0, grads + self._grad_offset),
            np.array(step.hyper[: self._groups], dtype=np.float64),
            noise_keys(step.seed, 2 * step.number, self._index) if settings.storage.noisy else None,
            max_grad_norm=settings.max_grad_norm,
            skip_nonfinite=settings.skip_nonfinite,
            grad_scale=step.grad_scale,
            found_inf=step.found_inf,
        )
        # Autograd must notice that saved weights are no longer what they were.
        written = [param for param, pointer in zip(self._params, pointers, strict=True) if pointer]
        torch.autograd.graph.increment_version(written)
        skipped = self._skipped(step.found_inf)
        if skipped is not None:
            self._arena.skipped.add_(skipped)
        if not grads.all():
            self._count_fellows(step.grads, skipped)
        if settings.root:
            self._add_norms()

    def collect(self) -> None:
        """Bring ages, updates and scores of the arena up to date."""
        collected = self._launch.collect()
        age = collected[:, 0].int()
        self._arena.age.index_copy_(0, self._slots, age)
        self._arena.updates.index_copy_(0, self._slots, age + self._beyond_age)
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
                self._beyond_age[number].add_(1 if skipped is None else 1 - skipped)

    def _add_norms(self) -> None:
        """Add ‖g‖ of the step, of the whole module where it has several tensors, to the scores."""
        self._arena.sq_norm.index_copy_(0, self._slots, self._launch.collect()[:, 1])
        self._launch.clear_sums()
        self._arena.root_of_squares(row.fellows for row in self._rows if row.slot == row.fellows[0])
        self._arena.score_sum.add_(self._arena.sq_norm)


def stray(grad: Tensor, dtype: torch.dtype, copies: list[Tensor]) -> int:
    """Return the address of a contiguous copy of `grad`, which is kept in `copies`.

    Raises:
        TypeError: If it is not of `dtype`.
    """
    if grad.dtype != dtype:
        raise TypeError(
            f"a gradient is {grad.dtype} but must be {dtype} in this round: set the parameter's grad_dtype before the "
            "first step"
        )
    copies.append(grad.contiguous())
    return copies[-1].data_ptr()
