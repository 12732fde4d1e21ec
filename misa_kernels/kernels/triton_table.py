"""How do the Triton kernels read a table of rows: which column is what, and where are the elements of a weight?

The columns are those of `misa_kernels/kernels/table.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from misa_kernels.kernels import table

WEIGHT, GRAD, NUMEL = tl.constexpr(table.WEIGHT), tl.constexpr(table.GRAD), tl.constexpr(table.NUMEL)
OFFSET, GROUP, START = tl.constexpr(table.OFFSET), tl.constexpr(table.GROUP), tl.constexpr(table.START)
KEY, FIRST_CHUNK, ACTION = tl.constexpr(table.KEY), tl.constexpr(table.FIRST_CHUNK), tl.constexpr(table.ACTION)
WIDTH, PITCH, ROW_COLUMNS = tl.constexpr(table.WIDTH), tl.constexpr(table.PITCH), tl.constexpr(table.ROW_COLUMNS)
LR, BETA1, BETA2 = tl.constexpr(table.LR), tl.constexpr(table.BETA1), tl.constexpr(table.BETA2)
EPS, WEIGHT_DECAY = tl.constexpr(table.EPS), tl.constexpr(table.WEIGHT_DECAY)
HYPER_COLUMNS = tl.constexpr(table.HYPER_COLUMNS)
# Of `control`, which the last program of the norm launch writes.
COEFFICIENT, NORM, SKIP = tl.constexpr(table.COEFFICIENT), tl.constexpr(table.NORM), tl.constexpr(table.SKIP)
MEASURE, ADOPT = tl.constexpr(table.MEASURE), tl.constexpr(table.ADOPT)
FLUSH, WRITE_BACK = tl.constexpr(table.FLUSH), tl.constexpr(table.WRITE_BACK)
# Elements of a line above which no chunk has two ends of one.
LONG_LINE = tl.constexpr(2**15)


@triton.jit
def lines_from(row_ptr, start):
    """Return what `place` asks of the lines of a weight from its element `start` on, and where that element is.

    A row whose elements are neighbours has a gap of 0, and it is no matter what its lines are. Divisions of 64 bits
    would spill on sm_100; no pitched row has 2^32 elements.

    Returns:
        Elements between two lines, position of the element in its line, a number that divides by a line's elements,
        where a line longer than a chunk ends, and position of the element in the weight.
    """
    width = tl.load(row_ptr + WIDTH)
    gap = tl.load(row_ptr + PITCH) - width
    width = tl.maximum(width, 1).to(tl.uint32)
    line = start.to(tl.uint32) // width
    column = start.to(tl.uint32) - line * width
    # n // width = 2n * factor / 2^32, rounded up once: exact where n * width < 2^31, T. Granlund and P. L. Montgomery,
    # https://dl.acm.org/doi/10.1145/178243.178249.
    factor = (tl.cast(2**31, tl.uint32) + (width - 1)) // width
    is_long = width > LONG_LINE
    factor = tl.where(is_long, 0, factor)
    end = tl.where(is_long, width, 2**31 - 1).to(tl.int32)
    return gap.to(tl.int32), column.to(tl.int32), factor, end, start + line.to(tl.int64) * gap


@triton.jit
def place(index, gap, column, factor, end, ALIGNED: tl.constexpr):
    """Return where elements of a weight are, from the first of its chunk on, with what `lines_from` returned.

    Where lines are multiples of 4, so are the neighbours that a thread holds, and all is computed once for these.
    """
    column += index
    line = tl.umulhi((2 * column).to(tl.uint32), factor).to(tl.int32) + (column >= end).to(tl.int32)
    found = line.to(tl.int64) * gap.to(tl.int64) + index
    return tl.max_contiguous(tl.multiple_of(found, 4), 4) if ALIGNED else found
