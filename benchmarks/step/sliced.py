"""MISA's step of slices of columns, without the layers and hooks around it: to be timed, and looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from misa_kernels import kernels
from misa_kernels.kernels import Row, Settings
from misa_kernels.memory.arena import Arena
from misa_kernels.memory.storage import Storage
from misa_kernels.reference import Hyper

# Of the columns of a matrix one in so many is trained where a step is timed.
WIDER = 4


class SlicedStep:
    """The steps of a round that trains some columns of matrices.

    Args:
        matrices: What they are columns of, contiguous, of shape (out, in).
        spans: Of each the first column, and one past the last.
        backend: A name of `kernels.BACKENDS`.
        storage: How moments and weights are stored.

    Attributes:
        gradients: Of each slice, shape (out, columns); who takes a step puts them here.
        param_groups: The learning rate, where schedules look for it.
        backend: What runs the steps.
        arena: The state.
    """

    def __init__(
        self, matrices: Sequence[Tensor], spans: Sequence[tuple[int, int]], backend: str, storage: Storage
    ) -> None:
        self.rows = [row_of(number, *given) for number, given in enumerate(zip(matrices, spans, strict=True))]
        device, dtypes = matrices[0].device, [matrix.dtype for matrix in matrices]
        self.arena = Arena([row.numel for row in self.rows], dtypes, range(len(dtypes)), 0, device, storage=storage)
        self.arena.lend([], range(len(dtypes)), clear=True)
        chosen = kernels.select(backend, device, set(dtypes), storage)
        settings = Settings(max_grad_norm=None, skip_nonfinite=False, storage=storage, root=False)
        self._steps = kernels.prepare(chosen, self.rows, self.arena, settings)
        self.backend = chosen.name
        self.gradients: list[Tensor | None] = [None] * len(dtypes)
        self.param_groups = [{"lr": 1e-2}]
        self._pointers = [matrix.data_ptr() for matrix in matrices]
        self._taken = 0

    def step(self) -> None:
        """Update all slices that have a gradient."""
        self._taken += 1
        hyper = [Hyper(lr=self.param_groups[0]["lr"], beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)]
        self._steps.run(self.gradients, self._pointers, hyper, (0, self._taken))


def row_of(number: int, matrix: Tensor, span: tuple[int, int]) -> Row:
    """Return columns of a matrix as what is trained; all of them are neighbours in memory."""
    (height, pitch), (first, last) = matrix.shape, span
    whole = last - first == pitch
    return Row(
        slot=number,
        param=nn.Parameter(matrix, requires_grad=False),
        index=number,
        start=first,
        stop=(height - 1) * pitch + last,
        offset=first,
        is_counted=True,
        group=0,
        fellows=[number],
        module=number,
        width=0 if whole else last - first,
        pitch=0 if whole else pitch,
        is_slice=True,
    )


class Timed(SlicedStep):
    """Steps as the benchmarks of updates take them: of columns with the shapes and the gradients of `weights`."""

    def __init__(self, weights: Sequence[Tensor], backend: str, storage: Storage) -> None:
        wide = [weight.new_zeros(len(weight), WIDER * weight[0].numel()) for weight in weights]
        spans = [(weight[0].numel(), 2 * weight[0].numel()) for weight in weights]
        super().__init__(wide, spans, backend, storage)
        self._weights = weights

    def step(self) -> None:
        """Take a step with the gradients that the weights have now."""
        self.gradients = [weight.grad for weight in self._weights]
        super().step()


def timed(backend: str, storage: Storage) -> Callable[[list[Tensor]], Timed]:
    """Return what makes such steps of weights; on a CPU on whatever runs there."""
    return lambda weights: Timed(weights, backend if weights[0].is_cuda else "auto", storage)


def differing_bits(ours: SlicedStep, theirs: SlicedStep) -> int:
    """Return how many elements of the slices and of their state have other bits in one than in the other."""
    count = 0
    for a, b in zip(ours.rows, theirs.rows, strict=True):
        pairs = [(a.weight(), b.weight())]
        views, other = ours.arena.views(a.slot), theirs.arena.views(b.slot)
        pairs += [(views[name], other[name]) for name in views]
        count += sum(int((bits(x) != bits(y)).sum()) for x, y in pairs)
    return count


def bits(x: Tensor) -> Tensor:
    """Return what is stored, as integers on the CPU."""
    return x.detach().cpu().reshape(-1).view(torch.int16 if x.element_size() == 2 else torch.int32)
