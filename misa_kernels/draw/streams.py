"""Which matrices of a layer read the residual stream, which write to it, and as part of what?

Where an attention or a feed-forward network lies in one module or in several, its matrices come together in the module
tree; the widths between which they map tell the rest. What stays unclear is left open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from misa_kernels.draw.matrices import Widths


class Flow(NamedTuple):
    """What a matrix has to do with the residual stream of its layer.

    Attributes:
        stream: "reads" or "writes"; None if neither, or unclear.
        part: "qkv" and "output" of an attention, "up" (a gate, too) and "down" of a feed-forward network, or None.
    """

    stream: str | None = None
    part: str | None = None


NONE = Flow()


class Linear(NamedTuple):
    """A matrix of a layer.

    Attributes:
        path: Name of the module that it is a tensor of, from the layer on.
        widths: What it maps.
        is_stacked: Whether it holds the matrices of several experts.
    """

    path: str
    widths: Widths
    is_stacked: bool = False

    def is_square(self, width: int) -> bool:
        """Whether it may read and write this width."""
        return width in self.widths.reads and width in self.widths.writes


def flows(linears: Sequence[Linear], norms: Iterable[int]) -> list[Flow]:
    """Return what each matrix of a layer has to do with the residual stream.

    Args:
        linears: The matrices, as they are registered.
        norms: Sizes of the layer's norms, one of which the stream has.
    """
    found = [NONE] * len(linears)
    touched = Counter(width for linear in linears for side in linear.widths for width in side)
    candidates = set(norms) & touched.keys() or touched.keys()
    if not candidates:
        return found
    width = max(candidates, key=lambda size: (touched[size], size))
    numbers = [i for i, linear in enumerate(linears) if width in linear.widths.reads | linear.widths.writes]
    paths = [tuple(linear.path.split(".")) for linear in linears]
    blocks, loose = _blocks(linears, paths, numbers, 0, width)
    for block in blocks:
        for number, flow in zip(block, _block(linears, block, width), strict=True):
            found[number] = flow
    for number in loose:
        linear = linears[number]
        if not linear.is_square(width) and not linear.is_stacked:
            found[number] = Flow("reads" if width in linear.widths.reads else "writes")
    return found


def _blocks(
    linears: Sequence[Linear], paths: Sequence[tuple[str, ...]], numbers: Sequence[int], depth: int, width: int
) -> tuple[list[list[int]], list[int]]:
    """Return the blocks among matrices of one module, and those that are left for a block of the module around it."""
    inside: dict[str | int, list[int]] = {}
    for number in numbers:
        path = paths[number]
        inside.setdefault(path[depth] if depth < len(path) else number, []).append(number)
    blocks, loose = [], []
    for key, own in inside.items():
        if isinstance(key, int):
            loose += own
        else:
            found, left = _blocks(linears, paths, own, depth + 1, width)
            blocks += found
            loose += left
    squares = sum(linears[number].is_square(width) for number in loose)
    reads = sum(width in linears[number].widths.reads for number in loose)
    writes = sum(width in linears[number].widths.writes for number in loose)
    # Query, key and value alone: their output projection lies elsewhere.
    is_open = squares == len(loose) and squares % 2 == 1
    if len(loose) > 1 and reads and writes and not is_open:
        return [*blocks, sorted(loose)], []
    return blocks, loose


def _block(linears: Sequence[Linear], block: Sequence[int], width: int) -> list[Flow]:
    """Return the flow of each matrix of an attention or a feed-forward network."""
    own = [linears[number] for number in block]
    if any(linear.is_stacked for linear in own):
        # Their axes do not say which is read; what is registered last leads back.
        last = max(i for i, linear in enumerate(own) if linear.is_stacked)
        return [
            Flow("writes", "down") if i == last else Flow("reads", "up" if linear.is_stacked else None)
            for i, linear in enumerate(own)
        ]
    squares = [i for i, linear in enumerate(own) if linear.is_square(width)]
    writers = [i for i, linear in enumerate(own) if width in linear.widths.writes and i not in squares]
    if not writers:
        writers = squares[-1:]
    elif len(writers) > 1 and squares:
        return [NONE if i in squares else Flow("writes" if i in writers else "reads") for i in range(len(own))]
    if len(writers) > 1:
        return [Flow("writes" if i in writers else "reads") for i in range(len(own))]
    inner = own[writers[0]].widths.reads
    readers = [linear for i, linear in enumerate(own) if i not in writers]
    fits = all(linear.widths.writes & (inner | {2 * size for size in inner}) for linear in readers)
    is_square = writers[0] in squares and len(squares) < len(own)
    is_feed_forward = fits and len(readers) < 3 and not is_square
    names = ("up", "down") if is_feed_forward else ("qkv", "output")
    return [Flow("writes", names[1]) if i in writers else Flow("reads", names[0]) for i in range(len(own))]
