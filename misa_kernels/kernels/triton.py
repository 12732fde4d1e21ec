"""What a GPU computes in one step: AdamW of all active tensors, ‖g‖² for the scores, clipping, rounding.

A *row* is one tensor or row block, a *chunk* a fixed number of its elements: the work of one program. Weights
and gradients stay where torch put them, and a table of rows says where. A *bucket* is the rows that share
weight dtype, gradient dtype and alignment, hence one compiled variant and one launch. Each chunk has its own
age and its own sum of squares, written by its program alone: no races, no atomics on floats, and two runs give
the same bits. `misa_kernels/kernels/launch.py` fills the tables.
"""

from __future__ import annotations

import triton
import triton.language as tl

from misa_kernels.kernels import triton_codec
from misa_kernels.kernels.triton_codec import BF16, FP32, bf16_rounded, reciprocal
from misa_kernels.kernels.triton_rounding import bf16_nearest, join, lowbias32, noise32, split
from misa_kernels.kernels.triton_table import (
    BETA1,
    BETA2,
    COEFFICIENT,
    EPS,
    FIRST_CHUNK,
    GRAD,
    GROUP,
    HYPER_COLUMNS,
    KEY,
    LR,
    NORM,
    NUMEL,
    OFFSET,
    ROW_COLUMNS,
    SKIP,
    START,
    WEIGHT,
    WEIGHT_DECAY,
    lines_from,
    place,
)

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
# The oldest version that the kernels were compiled and tested with; torch 2.10 brings it.
if VERSION < (3, 6):
    raise ImportError(f"triton is {triton.__version__} but misa_kernels needs 3.6: install torch 2.10 or later")
# Whether `kernel[grid](*arguments)` on what a launch returns takes all arguments, constexprs among them, as Triton's
# tutorial of the fused softmax shows. Before 3.3 it took those that are none, so a later version must be looked at.
LAUNCHES_COMPILED = VERSION <= (3, 9)

# float64 numbers that `sum_in_order` holds at once: 8 a thread.
SUM_BLOCK = tl.constexpr(1024)


@triton.jit
def adamw(
    theta,
    g,
    m,
    v,
    decay,
    step_size,
    beta1,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    denom_scale,
    eps,
    EXACT: tl.constexpr,
):
    """Return θ, m and v after one AdamW update: csrc/adamw.h line by line, and where `EXACT` its bits."""
    m = tl.fma(beta1, m, one_minus_beta1 * g)
    v = tl.fma(beta2, v, one_minus_beta2 * (g * g))
    if EXACT:
        denom = tl.fma(denom_scale, tl.sqrt_rn(v), eps)
        ratio = tl.div_rn(m, denom)
    else:
        denom = tl.fma(denom_scale, tl.sqrt(v), eps)
        ratio = m * reciprocal(denom)
    theta = tl.fma(-step_size, ratio, decay * theta)
    return theta, m, v


@triton.jit
def powers(base1, base2, exponent):
    """Return both float64 bases to an int32 power, by squaring: the same bits in any language.

    Both in one loop, so that their latencies overlap.
    """
    power1 = tl.cast(1.0, tl.float64)
    power2 = tl.cast(1.0, tl.float64)
    while exponent > 0:
        power1 = tl.where(exponent % 2 == 1, power1 * base1, power1)
        power2 = tl.where(exponent % 2 == 1, power2 * base2, power2)
        base1 = base1 * base1
        base2 = base2 * base2
        exponent = exponent // 2
    return power1, power2


@triton.jit
def sum_in_order(x_ptr, count):
    """Return the sum of float64 numbers, whose order of addition depends on `count` alone."""
    lanes = tl.arange(0, SUM_BLOCK)
    total = tl.zeros((SUM_BLOCK,), tl.float64)
    # A `for` over a bound from memory fails in the interpreter of Triton 3.6 with NumPy 2.4.
    i = count * 0
    while i < count:
        # .cg: other programs wrote these, and the L1 cache of this one may hold what was there before.
        total += tl.load(x_ptr + i + lanes, mask=i + lanes < count, other=0.0, cache_modifier=".cg")
        i += SUM_BLOCK
    return tl.sum(total)


@triton.jit
def write_control(control_ptr, sq_norm, found_inf_ptr, max_grad_norm, skip_nonfinite):
    """Write min(1, max_grad_norm / (‖g‖ + 1e-6)), ‖g‖ and whether the update must be skipped."""
    norm = tl.sqrt(sq_norm)
    ratio = max_grad_norm / (norm + 1e-6)
    # Not tl.minimum, which would turn NaN into 1.
    tl.store(control_ptr + COEFFICIENT, tl.where(ratio > 1, 1.0, ratio).to(tl.float32))
    tl.store(control_ptr + NORM, norm.to(tl.float32))
    finite = sq_norm < float("inf")
    skip = tl.where(finite, 0, skip_nonfinite)
    if found_inf_ptr is not None:
        skip = tl.where(tl.load(found_inf_ptr) != 0, 1, skip)
    tl.store(control_ptr + SKIP, skip.to(tl.float32))


@triton.jit(do_not_specialize=["first_program", "programs", "skip_nonfinite"])
def step_kernel(
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
    sq_sum_ptr,
    partial_ptr,
    arrived_ptr,
    control_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    first_program,
    programs,
    max_grad_norm,
    skip_nonfinite,
    WEIGHT_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    M_CODEC: tl.constexpr,
    V_CODEC: tl.constexpr,
    ALIGNED: tl.constexpr,
    PITCHED: tl.constexpr,
    UPDATE: tl.constexpr,
    CONTROLLED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Update one chunk, or with `UPDATE` off only sum its squares.

    Args:
        program_ptr: int32[programs, 2], row and number of the chunk within the row.
        row_ptr: int64[rows, 13], see `RowTable`.
        hyper_ptr: float64[groups, 5].
        exp_avg_ptr: Codes of m of all rows of one weight dtype; no state is read at age 0.
        exp_avg_scale_ptr: float32, the scales of m, or None.
        exp_avg_sq_ptr: Codes of v.
        exp_avg_sq_scale_ptr: float32, those of v, or None.
        master_ptr: float32, the weights; None for float32 weights and without masters.
        residual_ptr: int16, the lower halves of the weights, see `split`; or None. bfloat16 weights with neither are
            rounded stochastically.
        age_ptr: int32[chunks], updates so far.
        sq_sum_ptr: float64[chunks], ‖g‖² of each chunk is added to it.
        partial_ptr: float64[chunks], ‖g‖² of this step from the norm launch to the update.
        arrived_ptr: int32, how many programs of the norm launches are done; 0 before and after.
        control_ptr: float32[3], see `RowTable.control`.
        grad_scale_ptr: float32, what gradients were multiplied by, or None.
        found_inf_ptr: float32, nonzero to skip the step, or None.
        first_program: Position of the bucket in the table of programs.
        programs: Programs of all buckets.
        max_grad_norm: Norm to clip to; infinity for none.
        skip_nonfinite: 1 to skip the step when ‖g‖² is not finite.
        WEIGHT_DTYPE: Dtype of the weights.
        GRAD_DTYPE: Dtype of the gradients.
        M_CODEC: How m is stored, a number of `triton_codec.CODECS`.
        V_CODEC: How v is.
        ALIGNED: Whether all weight and gradient pointers are multiples of 16 and all sizes, lines and pitches of 4.
        PITCHED: Whether weights may be in lines with gaps between them; off in the norm launch.
        UPDATE: Off in the norm launch.
        CONTROLLED: Whether a norm launch came before this update.
        BLOCK: Elements at a time.
        BLOCKS: Blocks of a chunk.
    """
    if UPDATE:
        # Coefficient 0 would not do: 0 * NaN is NaN, and the weight decay would still act.
        if CONTROLLED:
            if tl.load(control_ptr + SKIP) != 0:
                return
        elif found_inf_ptr is not None:
            if tl.load(found_inf_ptr) != 0:
                return
    program_ptr += 2 * (tl.program_id(0) + first_program)
    row_ptr += ROW_COLUMNS * tl.load(program_ptr)
    number = tl.load(program_ptr + 1)
    grad = tl.load(row_ptr + GRAD)
    numel = tl.load(row_ptr + NUMEL)
    if UPDATE:
        if grad == 0:
            return
    else:
        # A missing gradient is a tensor without elements, whose norm is 0 and whose program arrives too.
        numel = tl.where(grad == 0, 0, numel)

    start = number.to(tl.int64) * (BLOCK * BLOCKS)
    chunk = tl.load(row_ptr + FIRST_CHUNK) + number
    state = tl.load(row_ptr + OFFSET) + start
    weight_ptr = tl.load(row_ptr + WEIGHT).to(tl.pointer_type(WEIGHT_DTYPE))
    if PITCHED:
        gap, column, factor, end, begun = lines_from(row_ptr, start)
        weight_ptr += begun
    else:
        weight_ptr += start
    grad_ptr = grad.to(tl.pointer_type(GRAD_DTYPE)) + start
    remaining = tl.minimum(tl.maximum(numel - start, 0), BLOCK * BLOCKS).to(tl.int32)
    if ALIGNED:
        # What the host has checked; with it the masked accesses of the last block are vectors too. A chunk of a pitched
        # weight begins at a multiple of 4 elements.
        weight_ptr = tl.multiple_of(weight_ptr, 8 if PITCHED and WEIGHT_DTYPE != tl.float32 else 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        remaining = tl.multiple_of(remaining, 4)
    if ALIGNED or exp_avg_scale_ptr is not None:
        # Keeps a group in one warp where single elements are moved, too.
        state = tl.multiple_of(state, 16)
    if grad_scale_ptr is not None:
        unscale = tl.div_rn(1.0, tl.load(grad_scale_ptr))

    if UPDATE:
        # The IEEE division and root take 31 instructions an element more, which spill on sm_90 where the memory time
        # of int8 allows 70 in all. The approximate ones are off by 2^-22, codes by 2^-9 and more.
        EXACT: tl.constexpr = M_CODEC == FP32
        ROUNDED: tl.constexpr = WEIGHT_DTYPE == tl.bfloat16 and master_ptr is None and residual_ptr is None
        age = tl.load(age_ptr + chunk)
        # State that nobody has written yet is not read. A limit, because a mask of two conditions would be
        # int32 in the interpreter.
        written = tl.where(age > 0, remaining, 0)
        if ALIGNED:
            written = tl.multiple_of(written, 4)
        hyper_ptr += HYPER_COLUMNS * tl.load(row_ptr + GROUP)
        lr = tl.load(hyper_ptr + LR)
        beta1 = tl.load(hyper_ptr + BETA1)
        beta2 = tl.load(hyper_ptr + BETA2)
        # In float64 and rounded once: 1 - beta2^t in float32 is off by 1e-5 at small t.
        beta1_t, beta2_t = powers(beta1, beta2, age + 1)
        decay = (1 - lr * tl.load(hyper_ptr + WEIGHT_DECAY)).to(tl.float32)
        step_size = (lr / (1 - beta1_t)).to(tl.float32)
        denom_scale = (1 / tl.sqrt(1 - beta2_t)).to(tl.float32)
        one_minus_beta1 = (1 - beta1).to(tl.float32)
        one_minus_beta2 = (1 - beta2).to(tl.float32)
        beta1 = beta1.to(tl.float32)
        beta2 = beta2.to(tl.float32)
        eps = tl.load(hyper_ptr + EPS).to(tl.float32)
        first = tl.load(row_ptr + START) + start
        key = tl.load(row_ptr + KEY).to(tl.uint32)
        state_key = lowbias32(key + 1)
        if CONTROLLED:
            coefficient = tl.load(control_ptr + COEFFICIENT)

    squares = tl.zeros((BLOCK,), tl.float32)
    for i in range(BLOCKS):
        begin = i * BLOCK
        # 4 elements: 16 bytes of float32, 8 of bfloat16, 4 of codes. 8 would be 16 bytes of two of them, and a trip
        # through shared memory to change between the layouts.
        index = triton_codec.neighbours(begin, BLOCK, 4)
        inside = index < remaining
        g = tl.load(grad_ptr + index, mask=inside, other=0.0).to(tl.float32)
        if grad_scale_ptr is not None:
            g = g * unscale
        if not CONTROLLED:
            squares = tl.fma(g, g, squares)
        if UPDATE:
            if CONTROLLED:
                g = g * coefficient
            m = triton_codec.load(exp_avg_ptr, exp_avg_scale_ptr, state, begin, written, BLOCK, M_CODEC, ALIGNED)
            v = triton_codec.load(exp_avg_sq_ptr, exp_avg_sq_scale_ptr, state, begin, written, BLOCK, V_CODEC, ALIGNED)
            weights = weight_ptr + (place(index, gap, column, factor, end, ALIGNED) if PITCHED else index)
            if master_ptr is None:
                theta = tl.load(weights, mask=inside, other=0.0)
                if residual_ptr is not None:
                    theta = join(theta, tl.load(residual_ptr + state + index, mask=index < written, other=0))
                theta = theta.to(tl.float32)
            else:
                weight = tl.load(weights, mask=index < remaining - written, other=0.0).to(tl.float32)
                theta = tl.load(master_ptr + state + index, mask=index < written, other=weight)
            theta, m, v = adamw(
                theta,
                g,
                m,
                v,
                decay,
                step_size,
                beta1,
                beta2,
                one_minus_beta1,
                one_minus_beta2,
                denom_scale,
                eps,
                EXACT,
            )
            # One hash rounds v and the weight; m needs one of its own, but in bfloat16 alone.
            noise = noise32(first, index, key) if V_CODEC != FP32 or ROUNDED else 0
            m_noise = noise32(first, index, state_key) & 0xFFFF if M_CODEC == BF16 else 0
            triton_codec.store(m, m_noise, exp_avg_ptr, exp_avg_scale_ptr, state, begin, remaining, M_CODEC, ALIGNED)
            triton_codec.store(
                v, noise >> 16, exp_avg_sq_ptr, exp_avg_sq_scale_ptr, state, begin, remaining, V_CODEC, ALIGNED
            )
            if master_ptr is not None:
                tl.store(master_ptr + state + index, theta, mask=inside)
            if WEIGHT_DTYPE == tl.bfloat16:
                if residual_ptr is not None:
                    theta, residual = split(theta)
                    tl.store(residual_ptr + state + index, residual, mask=inside)
                elif master_ptr is None:
                    theta = bf16_rounded(theta, noise & 0xFFFF)
                else:
                    theta = bf16_nearest(theta)
            tl.store(weights, theta.to(WEIGHT_DTYPE), mask=inside)

    if CONTROLLED:
        sq_norm = tl.load(partial_ptr + chunk)
    else:
        sq_norm = tl.sum(squares.to(tl.float64))
    if UPDATE:
        # A warp that is late must not read the age of the next step.
        tl.debug_barrier()
        tl.store(age_ptr + chunk, age + 1)
        tl.store(sq_sum_ptr + chunk, tl.load(sq_sum_ptr + chunk) + sq_norm)
    else:
        tl.store(partial_ptr + chunk, sq_norm)
        # Release what was stored, acquire what the others stored.
        if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == programs - 1:
            write_control(
                control_ptr, sum_in_order(partial_ptr, programs), found_inf_ptr, max_grad_norm, skip_nonfinite
            )
            tl.store(arrived_ptr, 0)
