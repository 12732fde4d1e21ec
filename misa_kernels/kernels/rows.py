"""What the steps of a round are told once: which tensors, and under which settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from misa_kernels.memory.storage import Storage
from misa_kernels.ranks.shards import Ranks, local


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor, or row block of one, or the part of it on this rank, that is trained in this round.

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

    def weight(self, start: int = 0, numel: int | None = None) -> Tensor:
        """Return the weight as it is now, of shape (stop - start,), or so many of its elements from `start` on."""
        first = self.offset + start
        last = self.offset + self.stop - self.start if numel is None else first + numel
        whole = local(self.param).detach().view(-1)
        return whole if first == 0 and last == whole.numel() else whole[first:last]


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
    """Raise RuntimeError unless a gradient has as many elements as its weight."""
    if grad.numel() != numel:
        raise RuntimeError(
            f"a gradient has {grad.numel()} elements and its weight {numel}, which was resized in between: call "
            "zero_grad() after that"
        )
