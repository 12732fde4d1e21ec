"""How a round runs on a fused kernel: rows into its table, its ages and sums back into the arena."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from misa_kernels.kernels.rows import Row, Settings, check_size
from misa_kernels.kernels.table import ALL, NONE, SKIP, WRITE_BACK, RowTable
from misa_kernels.memory.arena import Arena, host, sent
from misa_kernels.ranks.shards import local
from misa_kernels.reference import Hyper, noise_key

DTYPE = attrgetter("dtype")


class FusedStep:
    """The steps of one round on the kernel of a table.

    Within the round, ages and sums live in the table, per chunk; `collect` brings them to the arena.

    Args:
        table: Which kernel.
        rows: The tensors that are trained.
        arena: Their state, lent.
        settings: What holds for all steps.
    """

    def __init__(self, table: type[RowTable], rows: Sequence[Row], arena: Arena, settings: Settings) -> None:
        self._rows = rows
        self._arena = arena
        self._settings = settings
        self._is_noisy = settings.storage.noisy
        self._params = [local(row.param) for row in rows]
        self._grad_dtypes = [getattr(row.param, "grad_dtype", None) or row.param.dtype for row in rows]
        # An empty part has a gradient with an address, see `run/parts.py`.
        sizes = [row.numel if row.is_slice else p.numel() for row, p in zip(rows, self._params, strict=True)]
        self._numels = [size or 4 for size in sizes]
        self._index = np.array([row.index for row in rows], dtype=np.int64)
        group = np.array([row.group for row in rows], dtype=np.int64)
        self._groups = int(group.max(initial=-1)) + 1
        offset = np.array([row.offset for row in rows], dtype=np.int64)
        self._weight_offset = offset * np.array([param.element_size() for param in self._params], dtype=np.int64)
        offset[[row.is_slice for row in rows]] = 0
        self._grad_offset = offset * np.array([dtype.itemsize for dtype in self._grad_dtypes], dtype=np.int64)
        self._pointers: Sequence[int] | None = None
        self._hyper: Sequence[Hyper] | None = None
        self._noise: tuple[int, int] | None = None
        self._table = table(
            numel=np.array([row.numel for row in rows], dtype=np.int64),
            offset=np.array([arena.offset(row.slot) for row in rows], dtype=np.int64),
            group=group,
            start=np.array([row.noise_start for row in rows], dtype=np.int64),
            weight_dtypes=[param.dtype for param in self._params],
            grad_dtypes=self._grad_dtypes,
            state={dtype: pool.buffers for dtype, pool in arena.pools.items()},
            storage=settings.storage,
            device=arena.device,
            width=np.array([row.width for row in rows], dtype=np.int64),
            pitch=np.array([row.pitch for row in rows], dtype=np.int64),
        )
        self._slots = scored = sent(host([row.slot for row in rows]), arena.device)
        age = arena.age[self._slots]
        self._table.set_ages(age)
        # A row's updates in this round less its age: what they were before, and steps in which it had no gradient but
        # another tensor of its module had.
        self._beyond_age = arena.updates[self._slots] - age
        if settings.root:
            # Rows of a module are neighbours, the first of them has its score where that is of its norm.
            firsts = np.flatnonzero([row.slot == row.fellows[0] for row in rows])
            scored = self._slots[sent(torch.from_numpy(firsts), arena.device)]
            chunks = np.add.reduceat(self._table.chunks.numpy(), firsts)
            self._first_chunks = np.cumsum(chunks) - chunks
            self._chunks_of_module = sent(torch.from_numpy(chunks), arena.device)
        # After a resume in mid-round this is not 0.
        self._scores = arena.score_sum[scored]
        self._total: Callable[[Tensor], Tensor] | None = None
        if (ranks := settings.ranks) is not None:
            # 0 for the chunks that another rank has, too.
            counted = host([row.is_counted for row in rows], torch.float64)
            self._counted = torch.repeat_interleave(counted, self._table.chunks).to(arena.device)
            self._total = lambda partials: ranks.sum((partials * self._counted).sum())
        # NumPy indexes 300 numbers in a fifth of torch's time, and on a CPU that is done in every step. What `collect`
        # does with these is written so that tensors and arrays, which share their memory, take it alike.
        counters = (self._slots, scored, arena.age, arena.updates, arena.score_sum)
        held: Any = (*counters, self._table.collected, age, self._beyond_age, self._scores, self._table.sq_sums)
        self._held = [x.numpy() for x in held] if table.eager else held

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
        """Launch the step of all rows; or of a stretch of them, as their gradients come, and in the end of `NONE`.

        Args:
            grads: The gradient of what this rank holds of each row's parameter, that of a slice alone, or None.
            weights: Address of what it holds of the parameter, for all rows; the same list as long as these stay.
            hyper: Hyperparameters of each param group; the same list in all calls of a step.
            noise: Seed and step of the noise, see `noise_key`.
            rows: Those that the gradients are of.
            grad_scale: What a GradScaler multiplied the gradients by, 0-dim, or None.
            found_inf: 0-dim, nonzero where a GradScaler found a nonfinite gradient, or None.
        """
        settings = self._settings
        copies: list[Tensor] = []
        pointers = addresses(grads, self._grad_dtypes[rows], self._numels[rows], copies)
        present = 0 not in pointers
        given = np.array(pointers, dtype=np.int64)
        np.add(given, self._grad_offset[rows], out=given, where=present or given != 0)
        self._table.step(
            self._weights_of(weights)[rows],
            given,
            self._new(hyper),
            self._keys_of(noise)[rows] if self._is_noisy else None,
            rows=rows,
            max_grad_norm=settings.max_grad_norm,
            skip_nonfinite=settings.skip_nonfinite,
            grad_scale=grad_scale,
            found_inf=found_inf,
            total=self._total,
        )
        written = self._params[rows]
        if not present:
            written = [param for param, pointer in zip(written, pointers, strict=True) if pointer]
        # Autograd must notice that saved weights are no longer what they were.
        torch.autograd.graph.increment_version(written)
        if rows is not ALL and rows is not NONE:
            return
        skipped = self._skipped(found_inf)
        if skipped is not None:
            self._arena.skipped.add_(skipped)
        if not present:
            self._count_fellows(grads, skipped)
        if settings.root:
            self._add_norms()
        if self._table.eager:
            self.collect()

    def _weights_of(self, pointers: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return where the weights of all rows are."""
        if pointers is not self._pointers:
            self._pointers, self._weights = pointers, np.array(pointers, dtype=np.int64) + self._weight_offset
        return self._weights

    def _new(self, hyper: Sequence[Hyper]) -> npt.NDArray[np.float64] | None:
        """Return the hyperparameters unless they are those of the call before."""
        if hyper is self._hyper:
            return None
        self._hyper = hyper
        return np.array(hyper[: self._groups], dtype=np.float64)

    def _keys_of(self, noise: tuple[int, int]) -> npt.NDArray[np.int64]:
        """Return the key of each row's noise."""
        if noise != self._noise:
            self._noise, self._keys = noise, noise_key(*noise, self._index)
        return self._keys

    def measure(self, weights: Sequence[int], hyper: Sequence[Hyper]) -> Tensor:
        """Return Σ of the squares of the last update of each slot, and of its weight; see `RowTable.measure`."""
        sums = self._table.measure(self._weights_of(weights), self._new(hyper))
        found = sums.new_zeros(2, len(self._arena.age))
        return found.index_copy_(1, self._slots, sums)

    def rehearse(self, hyper: Sequence[Hyper]) -> None:
        """Do nothing: `close` takes no memory."""

    def close(
        self, actions: Sequence[int], weights: Sequence[int], hyper: Sequence[Hyper], noise: tuple[int, int]
    ) -> None:
        """Do with each row what is left to do when a round ends; see `RowTable.close`."""
        self._table.close(self._weights_of(weights), self._new(hyper), actions, self._keys_of(noise))
        written = [param for param, action in zip(self._params, actions, strict=True) if action & WRITE_BACK]
        torch.autograd.graph.increment_version(written)

    def collect(self) -> None:
        """Bring ages, updates and scores of the arena up to date."""
        self._table.collect()
        at, scored, ages, updates, score_sum, collected, age, beyond_age, scores, _ = self._held
        # Into int32.
        age[:] = collected[:, 0]
        ages[at] = age
        updates[at] = age + beyond_age
        score_sum[scored] = scores if self._settings.root else scores + collected[:, 1]

    def _skipped(self, found_inf: Tensor | None) -> Tensor | None:
        """Return 1 or 0 on the device, whether the step was skipped; None if it cannot have been."""
        if self._settings.skip_nonfinite:
            return self._table.control[SKIP].int()
        return None if found_inf is None else (found_inf != 0).int().view(())

    def _count_fellows(self, grads: Sequence[Tensor | None], skipped: Tensor | None) -> None:
        present = {row.slot for row, grad in zip(self._rows, grads, strict=True) if grad is not None}
        for number, (row, grad) in enumerate(zip(self._rows, grads, strict=True)):
            if grad is None and not present.isdisjoint(row.fellows):
                self._beyond_age[number].add_(1 if skipped is None else 1 - skipped)

    def _add_norms(self) -> None:
        """Add ‖g‖ of the step, of the whole module where it has several tensors, to the scores."""
        ranks, (*_, scores, sums) = self._settings.ranks, self._held
        if self._table.eager and ranks is None:
            scores += np.sqrt(np.add.reduceat(sums, self._first_chunks))
        else:
            sums = self._table.sq_sums if ranks is None else self._table.sq_sums * self._counted
            sq_norms = torch.segment_reduce(sums, "sum", lengths=self._chunks_of_module, unsafe=True)
            self._scores.add_((sq_norms if ranks is None else ranks.sum(sq_norms)).sqrt_())
        self._held[-1][:] = 0.0


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
