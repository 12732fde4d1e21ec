"""How a round runs on a fused kernel: rows into its tables, its ages and sums back into the arena."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from misa_kernels.kernels.rows import Row, Settings, StepInput, check_size
from misa_kernels.kernels.table import ALL, NONE, SKIP, WRITE_BACK, RowTable
from misa_kernels.memory.arena import Arena, host, sent
from misa_kernels.ranks.shards import local
from misa_kernels.reference import Hyper, noise_keys

DTYPE = attrgetter("dtype")


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
        self._noisy = settings.storage.noisy
        self._params = [local(row.param) for row in rows]
        self._groups = max((row.group for row in rows), default=-1) + 1
        self._index = np.array([row.index for row in rows], dtype=np.int64)
        start = np.array([row.start for row in rows], dtype=np.int64)
        itemsize = np.array([param.element_size() for param in self._params], dtype=np.int64)
        offset = np.array([row.offset for row in rows], dtype=np.int64)
        self._weight_offset = offset * itemsize
        self._weight_offsets = self._weight_offset.tolist()
        self._weight_pointers: Sequence[int] | None = None
        self._hyper: Sequence[Hyper] | None = None
        self._keys: tuple[Any, npt.NDArray[np.int64]] = None, self._index
        self._grad_dtypes = [getattr(row.param, "grad_dtype", None) or row.param.dtype for row in rows]
        # An empty part has a gradient with an address, see `ActiveSet`.
        self._numels = [param.numel() or 4 for param in self._params]
        self._grad_offset = offset * np.array([dtype.itemsize for dtype in self._grad_dtypes], dtype=np.int64)
        self._grad_offsets = self._grad_offset.tolist()
        # Rows of a module are neighbours, the first of them has its score where that is of its norm.
        self._is_first = np.array([row.slot == row.fellows[0] for row in rows], dtype=np.bool_)
        self._launch = self.table(
            numel=np.array([row.stop - row.start for row in rows], dtype=np.int64),
            offset=np.array([arena.offset(row.slot) for row in rows], dtype=np.int64),
            group=np.array([row.group for row in rows], dtype=np.int64),
            start=start,
            weight_dtypes=[param.dtype for param in self._params],
            grad_dtypes=self._grad_dtypes,
            state={dtype: pool.buffers for dtype, pool in arena.pools.items()},
            storage=settings.storage,
            device=arena.device,
        )
        self._counted: Tensor | None = None
        self._slots = sent(host([row.slot for row in rows]), arena.device)
        age = arena.age[self._slots]
        self._launch.set_ages(age)
        # After a resume in mid-round this is not 0.
        self._score_before = arena.score_sum[self._slots]
        if settings.root:
            firsts, chunks = np.flatnonzero(self._is_first), self._launch.chunks.numpy()
            self._first_chunks = (np.cumsum(chunks) - chunks)[firsts]
            self._chunks_of_module = sent(
                torch.from_numpy(np.diff(self._first_chunks, append=chunks.sum())), arena.device
            )
            self._slots_of_modules = self._slots[sent(torch.from_numpy(firsts), arena.device)]
            self._norms = arena.score_sum[self._slots_of_modules]
        # A row's updates in this round less its age: what they were before, and steps in which it had no gradient but
        # another tensor of its module had.
        self._beyond_age = arena.updates[self._slots] - age

    def run(self, step: StepInput, rows: slice = ALL) -> None:
        """Launch the step of some rows, or of all."""
        if rows is not ALL:
            self._run_some(step, rows)
            return
        copies: list[Tensor] = []
        pointers = addresses(step.grads, self._grad_dtypes, self._numels, copies)
        present = 0 not in pointers
        grads = np.array(pointers, dtype=np.int64)
        settings = self._settings
        self._launch.step(
            self._weights_of(step),
            grads + self._grad_offset if present else np.where(grads == 0, 0, grads + self._grad_offset),
            self._new(step.hyper),
            self._noise(step) if self._noisy else None,
            max_grad_norm=settings.max_grad_norm,
            skip_nonfinite=settings.skip_nonfinite,
            grad_scale=step.grad_scale,
            found_inf=step.found_inf,
            total=None if settings.ranks is None else self._total,
        )
        # Autograd must notice that saved weights are no longer what they were.
        written = self._params if present else [p for p, pointer in zip(self._params, pointers, strict=True) if pointer]
        torch.autograd.graph.increment_version(written)
        skipped = self._skipped(step.found_inf)
        if skipped is not None:
            self._arena.skipped.add_(skipped)
        if not present:
            self._count_fellows(step.grads, skipped)
        self._end_step()

    def _run_some(self, step: StepInput, rows: slice) -> None:
        """Launch the step of rows whose gradients have come; mostly of one, where NumPy would be slower."""
        copies: list[Tensor] = []
        pointers = addresses(step.grads, self._grad_dtypes[rows], self._numels[rows], copies)
        self._launch.step(
            [x + at for x, at in zip(step.weight_pointers, self._weight_offsets[rows], strict=True)],
            [x + at for x, at in zip(pointers, self._grad_offsets[rows], strict=True)],
            self._new(step.hyper),
            self._noise(step)[rows] if self._noisy else None,
            rows=rows,
        )
        torch.autograd.graph.increment_version(self._params[rows])
        if rows is NONE:
            self._end_step()

    def _weights_of(self, step: StepInput) -> npt.NDArray[np.int64]:
        """Return where the weights of all rows are."""
        if step.weight_pointers is not self._weight_pointers:
            self._weight_pointers = step.weight_pointers
            self._weights = np.array(step.weight_pointers, dtype=np.int64) + self._weight_offset
        return self._weights

    def _new(self, hyper: Sequence[Hyper]) -> npt.NDArray[np.float64] | None:
        """Return the hyperparameters unless they are those of the call before."""
        if hyper is self._hyper:
            return None
        self._hyper = hyper
        return np.array(hyper[: self._groups], dtype=np.float64)

    def _noise(self, step: StepInput) -> npt.NDArray[np.int64]:
        """Return the key of each row's noise in this step."""
        if self._keys[0] != (step.seed, step.number):
            self._keys = (step.seed, step.number), noise_keys(step.seed, 2 * step.number, self._index)
        return self._keys[1]

    def _end_step(self) -> None:
        """Take what is added up of whole steps."""
        if self._settings.root:
            self._add_norms()

    def measure(self, step: StepInput) -> Tensor:
        """Return Σ of the squares of the last update of each slot, and of its weight; see `RowTable.measure`."""
        sums = self._launch.measure(self._weights_of(step), self._new(step.hyper))
        found = sums.new_zeros(2, len(self._arena.age))
        return found.index_copy_(1, self._slots, sums)

    def rehearse(self, step: StepInput) -> None:
        """Do nothing: `close` takes no memory."""

    def close(self, step: StepInput, actions: Sequence[int]) -> None:
        """Do with each row what is left to do when a round ends; see `RowTable.close`."""
        self._launch.close(
            self._weights_of(step),
            self._new(step.hyper),
            np.array(actions, dtype=np.int64),
            noise_keys(step.seed, 2 * step.number + 1, self._index),
        )
        written = [param for param, action in zip(self._params, actions, strict=True) if action & WRITE_BACK]
        torch.autograd.graph.increment_version(written)

    def collect(self) -> None:
        """Bring ages, updates and scores of the arena up to date."""
        collected = self._launch.collect()
        age = collected[:, 0].int()
        self._arena.age.index_copy_(0, self._slots, age)
        self._arena.updates.index_copy_(0, self._slots, age + self._beyond_age)
        if self._settings.root:
            self._arena.score_sum.index_copy_(0, self._slots_of_modules, self._norms)
        else:
            self._arena.score_sum.index_copy_(0, self._slots, self._score_before + collected[:, 1])

    def _total(self, partials: Tensor) -> Tensor:
        """Return ‖g‖² over all ranks, from the sums of squares of the chunks on this one."""
        ranks = self._settings.ranks
        assert ranks is not None
        return ranks.sum(self._counted_once(partials).sum())

    def _counted_once(self, sums: Tensor) -> Tensor:
        """Return sums of chunks without those that another rank has, too."""
        if self._counted is None:
            counted = host([row.is_counted for row in self._rows], torch.float64)
            self._counted = torch.repeat_interleave(counted, self._launch.chunks).to(self._arena.device)
        return sums * self._counted

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
        sums, ranks = self._launch.sq_sums, self._settings.ranks
        counted = sums if ranks is None else self._counted_once(sums)
        sq_norms = torch.segment_reduce(counted, "sum", lengths=self._chunks_of_module, unsafe=True)
        self._norms.add_((sq_norms if ranks is None else ranks.sum(sq_norms)).sqrt_())
        sums.zero_()


def addresses(
    grads: Sequence[Tensor | None], dtypes: list[torch.dtype], numels: list[int], copies: list[Tensor]
) -> list[int]:
    """Return where each gradient lies, 0 for None; of those that are not contiguous, where their copies do.

    With hundreds of tensors the host's time is in such loops, and `map` runs the usual one without the interpreter.

    Raises:
        TypeError: If one is not of its dtype.
        RuntimeError: If one is of another size than its weight.
    """
    given: Sequence[Any] = grads
    try:
        found = list(map(Tensor.data_ptr, given))
        if (
            list(map(DTYPE, given)) == dtypes
            and list(map(Tensor.numel, given)) == numels
            and all(map(Tensor.is_contiguous, given))
        ):
            return found
    except TypeError:
        # None is among them.
        pass
    return [
        0 if grad is None else address(grad, dtype, numel, copies)
        for grad, dtype, numel in zip(grads, dtypes, numels, strict=True)
    ]


def address(grad: Tensor, dtype: torch.dtype, numel: int, copies: list[Tensor]) -> int:
    """Return the address of a gradient, or of a contiguous copy, which is kept in `copies`.

    Raises:
        TypeError: If it is not of `dtype`.
        RuntimeError: If it has other elements than `numel`.
    """
    check_size(grad, numel)
    if grad.dtype != dtype:
        raise TypeError(
            f"a gradient is {grad.dtype} but must be {dtype} in this round: set the parameter's grad_dtype before the "
            "first step"
        )
    if not grad.is_contiguous():
        grad = grad.contiguous()
        copies.append(grad)
    return grad.data_ptr()
