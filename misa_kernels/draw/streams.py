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
# Query, key and value; and with the output projection.
_QKV, _WHOLE = 3, 4


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


def flows(linears: Sequence[Linear], norms: Iterable[int]) -> list[Flow]:
    """Return what each matrix of a layer has to do with the residual stream.

    Args:
        linears: The matrices, as they are registered.
        norms: Sizes of the layer's norms, one of which the stream has.
    """
    found = [NONE] * len(linears)
    touched = Counter(width for linear in linears for side in linear.widths for width in side)
    candidates = set(norms) & touched.keys() or touched.keys()
    if candidates:
        # Of two that are touched as often the one that is read first.
        first = {width: -i for i, linear in reversed([*enumerate(linears)]) for width in linear.widths.reads}
        width = max(candidates, key=lambda size: (touched[size], first.get(size, -len(linears)), size))
        numbers = [i for i, linear in enumerate(linears) if width in linear.widths.reads | linear.widths.writes]
        blocks = _Blocks(linears, width)
        loose, squares = blocks.gather(numbers, 0)
        for block in (*blocks.split(loose), *squares, *blocks.closed):
            for number, flow in zip(block, blocks.flows(block), strict=True):
                found[number] = flow
        for *readers, writer in blocks.joined:
            found[writer] = Flow("writes", "output")
            for number in readers:
                found[number] = Flow("reads", "qkv")
    return found


class _Blocks:
    """The attentions and feed-forward networks of a layer, as the numbers of their matrices.

    Args:
        linears: The matrices of the layer.
        width: That of the residual stream.

    Attributes:
        closed: Those that were found.
        joined: Attentions whose last matrix lies in another module than the others, and so is the output projection.
    """

    def __init__(self, linears: Sequence[Linear], width: int) -> None:
        self.closed: list[list[int]] = []
        self.joined: list[list[int]] = []
        self._linears, self._width = linears, width
        self._paths = [tuple(linear.path.split(".")) for linear in linears]

    def gather(self, numbers: Sequence[int], depth: int) -> tuple[list[int], list[list[int]]]:
        """Close the blocks among matrices of one module; return what is left, and groups of square matrices.

        A group of square matrices may be an attention, or lack an output projection that lies in the module around it.
        """
        inside: dict[str | int, list[int]] = {}
        for number in numbers:
            path = self._paths[number]
            inside.setdefault(path[depth] if depth < len(path) else number, []).append(number)
        loose: list[int] = []
        groups: list[list[int]] = []
        for key, own in inside.items():
            if isinstance(key, int):
                loose += own
            else:
                left, squares = self.gather(own, depth + 1)
                loose += left
                groups += squares
        is_square = all(map(self._is_square, loose))
        if len(groups) == 1 and len(loose) == 1 and is_square and len(groups[0]) != _WHOLE:
            self.joined.append([*groups[0], *loose])
            return [], []
        if is_square and len(loose) > 1:
            return [], [*groups, loose]
        split = self.split(loose)
        self.closed += split
        done = {number for block in split for number in block}
        return [number for number in loose if number not in done], groups

    def split(self, loose: Sequence[int]) -> list[list[int]]:
        """Return the blocks that matrices beside one another make; [] if some of what a block needs is missing."""
        reads = [n for n in loose if self._width in self._linears[n].widths.reads]
        writes = [n for n in loose if self._width in self._linears[n].widths.writes]
        if len(loose) < 2 or not reads or not writes or (len(reads) == 1 and reads == writes):
            return []
        # A feed-forward network beside an attention whose matrices lie in no module of their own.
        for writer in writes:
            own = [n for n in reads if n not in writes and self._fits(n, writer)]
            rest = [n for n in loose if n != writer and n not in own]
            # Key and value as wide as the stream, beside a query and an output that are wider.
            is_rest = len(rest) == 2 and all(map(self._is_square, rest))
            is_attention = len(rest) > 1 and any(n in writes for n in rest) and not is_rest
            if writer not in reads and 0 < len(own) < _QKV and is_attention:
                return [sorted([*own, writer]), *self.split(rest)]
        return [sorted(loose)]

    def flows(self, block: Sequence[int]) -> list[Flow]:
        """Return the flow of each matrix of a block."""
        own = [self._linears[number] for number in block]
        if any(linear.is_stacked for linear in own):
            # Their axes do not say which is read; what is registered last leads back.
            last = max(i for i, linear in enumerate(own) if linear.is_stacked)
            return [
                Flow("writes", "down") if i == last else Flow("reads", "up") if linear.is_stacked else NONE
                for i, linear in enumerate(own)
            ]
        squares = [number for number in block if self._is_square(number)]
        writers = [n for n in block if self._width in self._linears[n].widths.writes and n not in squares]
        is_open = len(squares) == len(block) and len(block) not in (2, _WHOLE)
        # Key and value of something else than the stream, of another width.
        is_cross = len(writers) == len(squares) == 2 and len(block) == _WHOLE and self._is_alike(*writers)
        is_fed = len(writers) + len(squares) < len(block) or not writers
        if is_cross:
            writers = squares[-1:]
        elif len(writers) > 1 or is_open or not is_fed:
            # Which of them leads back is unclear.
            return [NONE] * len(block)
        writer = writers[0] if writers else squares[-1]
        readers = [number for number in block if number != writer]
        is_feed_forward = len(readers) < _QKV and all(self._fits(number, writer) for number in readers)
        # A fused projection may be twice as wide as the output.
        is_feed_forward &= writer not in squares or len(squares) == len(block)
        into, back = ("up", "down") if is_feed_forward else ("qkv", "output")
        return [Flow("writes", back) if number == writer else Flow("reads", into) for number in block]

    def _is_square(self, number: int) -> bool:
        _, widths, is_stacked = self._linears[number]
        return not is_stacked and self._width in widths.reads and self._width in widths.writes

    def _is_alike(self, a: int, b: int) -> bool:
        return self._linears[a].widths == self._linears[b].widths

    def _fits(self, reader: int, writer: int) -> bool:
        """Whether a matrix writes what another reads, or it and a gate in one."""
        inner = self._linears[writer].widths.reads
        return not self._linears[reader].widths.writes.isdisjoint(inner | {2 * size for size in inner})
