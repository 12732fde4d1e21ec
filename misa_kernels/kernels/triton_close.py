"""What does a GPU compute when a round ends? Size of the last update, masters, momentum, weights; ages and sums.

Beside the step of `misa_kernels/kernels/triton.py`, over the tables of the round.
"""

from __future__ import annotations

import triton
import triton.language as tl

from misa_kernels.kernels import triton_codec
from misa_kernels.kernels.triton import powers, sum_in_order
from misa_kernels.kernels.triton_codec import bf16_rounded
from misa_kernels.kernels.triton_rounding import fp16_rounded, join, nearest_of, noise32
from misa_kernels.kernels.triton_table import (
    ACTION,
    ADOPT,
    BETA1,
    BETA2,
    EPS,
    FIRST_CHUNK,
    FLUSH,
    GROUP,
    HYPER_COLUMNS,
    KEY,
    LR,
    MEASURE,
    NUMEL,
    OFFSET,
    ROW_COLUMNS,
    START,
    WEIGHT,
    WRITE_BACK,
    lines_from,
    place,
)


@triton.jit
def update_ratio(m, v, denom_scale, eps):
    """Return m / (√v + ε) with bias corrections, the last update over its step size: csrc/adamw.h, and its bits."""
    return tl.div_rn(m, denom_scale * tl.sqrt_rn(v) + eps)


@triton.jit
def momentum_flush(theta, ratio, flush_size):
    """Return θ after what is left in its momentum: csrc/adamw.h, and its bits."""
    return theta - flush_size * ratio


@triton.jit(do_not_specialize=["first_program", "chunks"])
def close_kernel(
    program_ptr,
    row_ptr,
    hyper_ptr,
    exp_avg_ptr,
    exp_avg_scale_ptr,
    exp_avg_sq_ptr,
    exp_avg_sq_scale_ptr,
    master_ptr,
    residual_ptr,
    age_ptr,
    moved_ptr,
    first_program,
    chunks,
    WEIGHT_DTYPE: tl.constexpr,
    M_CODEC: tl.constexpr,
    V_CODEC: tl.constexpr,
    ALIGNED: tl.constexpr,
    PITCHED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Do with one chunk what the action of its row says, when a round ends; see `RowTable.close`.

    The arguments are those of `step_kernel`, and `moved_ptr`, float64[2, chunks], where `MEASURE` puts the sums of
    squares of the last update and of the weight, or None; `chunks` counts those of all rows.
    """
    program_ptr += 2 * (tl.program_id(0) + first_program)
    row_ptr += ROW_COLUMNS * tl.load(program_ptr)
    action = tl.load(row_ptr + ACTION).to(tl.int32)
    if action == 0:
        return
    number = tl.load(program_ptr + 1)
    start = number.to(tl.int64) * (BLOCK * BLOCKS)
    chunk = tl.load(row_ptr + FIRST_CHUNK) + number
    state = tl.load(row_ptr + OFFSET) + start
    weight_ptr = tl.load(row_ptr + WEIGHT).to(tl.pointer_type(WEIGHT_DTYPE))
    if PITCHED:
        gap, column, factor, end, begun = lines_from(row_ptr, start)
        weight_ptr += begun
    else:
        weight_ptr += start
    remaining = tl.minimum(tl.maximum(tl.load(row_ptr + NUMEL) - start, 0), BLOCK * BLOCKS).to(tl.int32)
    age = tl.load(age_ptr + chunk)
    # Limits instead of branches: what is not wanted is neither read nor written.
    written = tl.where(age > 0, remaining, 0)
    with_moments = tl.where((action & (MEASURE | FLUSH)) != 0, written, 0)
    flushed = tl.where((action & FLUSH) != 0, written, 0)
    adopted = tl.where((action & ADOPT) != 0, written, 0)
    left = tl.where((action & WRITE_BACK) != 0, written, 0)
    if ALIGNED:
        weight_ptr = tl.multiple_of(weight_ptr, 8 if PITCHED and WEIGHT_DTYPE != tl.float32 else 16)
        remaining, written = tl.multiple_of(remaining, 4), tl.multiple_of(written, 4)
        with_moments = tl.multiple_of(with_moments, 4)
        adopted, left = tl.multiple_of(adopted, 4), tl.multiple_of(left, 4)
    if ALIGNED or exp_avg_scale_ptr is not None:
        state = tl.multiple_of(state, 16)
    hyper_ptr += HYPER_COLUMNS * tl.load(row_ptr + GROUP)
    lr = tl.load(hyper_ptr + LR)
    beta1 = tl.load(hyper_ptr + BETA1)
    beta1_t, beta2_t = powers(beta1, tl.load(hyper_ptr + BETA2), tl.maximum(age, 1))
    step_size = lr / (1 - beta1_t)
    flush_size = (lr * beta1 / (1 - beta1) / (1 - beta1_t)).to(tl.float32)
    denom_scale = (1 / tl.sqrt(1 - beta2_t)).to(tl.float32)
    eps = tl.load(hyper_ptr + EPS).to(tl.float32)
    first = tl.load(row_ptr + START) + start
    key = tl.load(row_ptr + KEY).to(tl.uint32)

    updates = tl.zeros((BLOCK,), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    for i in range(BLOCKS):
        begin = i * BLOCK
        index = triton_codec.neighbours(begin, BLOCK, 4)
        held_at = weight_ptr + (place(index, gap, column, factor, end, ALIGNED) if PITCHED else index)
        stored = tl.load(held_at, mask=index < remaining, other=0.0)
        weight = stored.to(tl.float32)
        weights = tl.fma(weight, weight, weights)
        m = triton_codec.load(exp_avg_ptr, exp_avg_scale_ptr, state, begin, with_moments, BLOCK, M_CODEC, ALIGNED)
        v = triton_codec.load(exp_avg_sq_ptr, exp_avg_sq_scale_ptr, state, begin, with_moments, BLOCK, V_CODEC, ALIGNED)
        ratio = tl.where(index < with_moments, update_ratio(m, v, denom_scale, eps), 0.0)
        updates = tl.fma(ratio, ratio, updates)
        theta = weight
        if master_ptr is not None:
            held = tl.load(master_ptr + state + index, mask=index < written, other=0.0)
            theta = tl.where((nearest_of(held, WEIGHT_DTYPE) == weight) & (index < written), held, weight)
            tl.store(master_ptr + state + index, theta, mask=index < adopted)
        if residual_ptr is not None:
            theta = join(stored, tl.load(residual_ptr + state + index, mask=index < written, other=0))
        theta = tl.where(index < flushed, momentum_flush(theta, ratio, flush_size), theta)
        if WEIGHT_DTYPE == tl.bfloat16:
            theta = bf16_rounded(theta, noise32(first, index, key) & 0xFFFF)
        elif WEIGHT_DTYPE == tl.float16:
            theta = fp16_rounded(theta, noise32(first, index, key) & 0xFFFF)
        tl.store(held_at, theta, mask=index < left)
    if moved_ptr is not None:
        tl.store(moved_ptr + chunk, step_size * step_size * tl.sum(updates.to(tl.float64)))
        tl.store(moved_ptr + chunks + chunk, tl.sum(weights.to(tl.float64)))


@triton.jit
def collect_kernel(row_ptr, age_ptr, sq_sum_ptr, collected_ptr, CHUNK: tl.constexpr):
    """Write age and ‖g‖² summed over the chunks of one row into its line of float64[rows, 2]."""
    row = tl.program_id(0)
    row_ptr += ROW_COLUMNS * row
    first_chunk = tl.load(row_ptr + FIRST_CHUNK)
    chunks = tl.maximum((tl.load(row_ptr + NUMEL) + CHUNK - 1) // CHUNK, 1)
    tl.store(collected_ptr + 2 * row, tl.load(age_ptr + first_chunk).to(tl.float64))
    tl.store(collected_ptr + 2 * row + 1, sum_in_order(sq_sum_ptr + first_chunk, chunks))
