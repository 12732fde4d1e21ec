"""What is a row? One tensor that is trained in a round, or a part of it; and what holds for all steps of the round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from misa_kernels.memory.storage import Storage
from misa_kernels.ranks.shards import Ranks, local


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor, or row block or slice of one, or the part of it on this rank, that is trained in this round.

    A slice of the columns of a matrix is *pitched*: its element k is element `offset` + (k // width) * pitch + k %
    width of what this rank holds. Gradient and state of a slice are its own and contiguous.

    Attributes:
        slot: Its number in the arena.
        param: The parameter.
        index: Position of the parameter in the optimizer; keys the rounding noise.
        start: Index of its first element within the whole parameter, flattened.
        stop: One past the last.
        offset: Position of the first element in what this rank holds of the parameter, flattened.
        is_counted: Whether its ‖g‖² counts in sums over ranks: no other rank before this one has the same elements.
        group: Number of its param group.
        fellows: Slots of all tensors of its module, this one among them.
        module: Number of the module, None for an always-on tensor.
        width: Elements of a line of a pitched slice; 0 where all elements are neighbours.
        pitch: Elements from the begin of one line to that of the next; 0 where all elements are neighbours.
        is_slice: Whether its gradient is that of these elements alone, not that of the whole parameter.
    """

    slot: int
    param: nn.Parameter
    index: int
    start: int
    stop: int
    offset: int
    is_counted: bool
    group: int
    fellows: Sequence[int]
    module: int | None
    width: int = 0
    pitch: int = 0
    is_slice: bool = False

    @property
    def numel(self) -> int:
        """How many elements are trained."""
        extent = self.stop - self.start
        return ((extent - self.width) // self.pitch + 1) * self.width if self.width else extent

    @property
    def noise_start(self) -> int:
        """What the first element counts as in rounding noise, and its neighbour as one more.

        The index within the whole parameter; of a pitched slice that within the slice, which is rounded as a
        contiguous copy of it would be.
        """
        return self.start // self.pitch * self.width if self.width else self.start

    def weight(self, start: int = 0, numel: int | None = None) -> Tensor:
        """Return the weight as it is now, of shape (self.numel,), or so many of its elements from `start` on.

        Of a pitched slice it is a copy, which `put` brings back.
        """
        numel = self.numel - start if numel is None else numel
        if not self.width:
            first, whole = self.offset + start, local(self.param).detach().view(-1)
            return whole if first == 0 and numel == whole.numel() else whole[first : first + numel]
        copy = torch.empty(numel, dtype=self.param.dtype, device=local(self.param).device)
        for part, held in self._parts(copy, start):
            held.copy_(part)
        return copy

    def gradient(self, grad: Tensor) -> Tensor:
        """Return the gradient of these elements, 1-D, from that of the whole parameter, or of a slice its own."""
        first = 0 if self.is_slice else self.offset
        return grad.reshape(-1)[first : first + self.numel]

    def put(self, values: Tensor, start: int = 0) -> None:
        """Make some neighbouring elements of the weight what `weight(start, len(values))` has become.

        There is nothing to do where that is the weight's own memory.
        """
        if self.width:
            for part, held in self._parts(values, start):
                part.copy_(held)
            return
        weight = self.weight(start, len(values))
        if weight.data_ptr() != values.data_ptr():
            weight.copy_(values)

    def _parts(self, values: Tensor, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Give views of the weight of a pitched slice from an element on, each with its part of `values`."""
        whole, width, done = local(self.param).detach().view(-1), self.width, 0
        while done < len(values):
            line, column = divmod(start + done, width)
            left = len(values) - done
            # The rest of a line, whole lines, the begin of a line.
            shape = (1, min(width - column, left)) if column or left < width else (left // width, width)
            first = whole.storage_offset() + self.offset + line * self.pitch + column
            part = whole.as_strided(shape, (self.pitch, 1), first)
            yield part, values[done : done + part.numel()].view(shape)
            done += part.numel()


@dataclass(frozen=True)
class Settings:
    """What holds for all steps of a run.

    Attributes:
        max_grad_norm: Global norm to clip to, or None.
        skip_nonfinite: Whether a step with nonfinite gradients leaves everything as it is.
        storage: How moments and the lower bits of 16-bit weights are stored.
        root: Whether scores add up ‖g‖ instead of ‖g‖².
        ranks: Where parameters are sharded, what sums over the ranks; else None.
    """

    max_grad_norm: float | None
    skip_nonfinite: bool
    storage: Storage
    root: bool
    ranks: Ranks | None = None


def check_size(grad: Tensor, numel: int) -> None:
    """Raise RuntimeError unless a gradient has as many elements as what it is of."""
    if grad.numel() != numel:
        raise RuntimeError(
            f"a gradient has {grad.numel()} elements and its weight {numel}, which was resized in between: call "
            "zero_grad() after that"
        )
