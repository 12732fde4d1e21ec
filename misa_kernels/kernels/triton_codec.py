"""How the Triton step reads and writes state: the formats of `misa_kernels/memory/codec.py`, one by one in its order.

A format decodes and encodes a tile of shape (groups, GROUP) in registers. A thread holds 4 neighbours, so a group is
a row of one warp, and its scale needs no shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from misa_kernels.memory import codec

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
# Triton 3.6 does when it lays out a store, whatever `scales_at` says of its pointers.
SEES_NEIGHBOURS = tl.constexpr(triton.__version__.startswith("3.6."))

GROUP = tl.constexpr(codec.GROUP)
SOFTNESS = tl.constexpr(codec.SOFTNESS)
E4M3_MAX = tl.constexpr(codec.E4M3_MAX)
E4M3_LOG2_RANGE = tl.constexpr(codec.E4M3_LOG2_RANGE)
# float32 that large have no fraction: what is added to it is rounded, and stands in the lower bits.
ROUNDING = tl.constexpr(1.5 * 2.0**23)
# Bits of the smallest normal number.
TINY = tl.constexpr(0x00800000)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)

# By the number that stands for each as a constexpr.
CODECS = (codec.FP32, codec.BF16, codec.SOFT_SIGN, codec.ROOT8, codec.ROOT4, codec.E4M3, codec.E4M3_DITHERED)
FP32, BF16, SOFT_SIGN, ROOT8, ROOT4, E4M3, E4M3_DITHERED = (tl.constexpr(i) for i in range(len(CODECS)))


@triton.jit
def reciprocal(x):
    """Return 1 / x to 1 ulp; here as in `log2` and `exp2` subnormal numbers count as 0."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def log2(x):
    """Return log2 x to 2^-22."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def exp2(x):
    """Return 2^x to 2 ulp."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def bits_of(x):
    """Return the bits of float32 as uint32."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def nearest(x, factor):
    """Return the integer nearest to x · factor < 2^22, in the lower bits of an int32."""
    return tl.fma(x, factor, ROUNDING).to(tl.int32, bitcast=True)


@triton.jit
def largest(x):
    """Return the maximum of each group of x >= 0, NaN if it has one, whose bits are beyond those of infinity.

    As integers, because a warp takes the maximum of these in one instruction.
    """
    return tl.max(bits_of(x), axis=1, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def share_factor(scale):
    """Return 1 / scale, and something finite where the scale is 0."""
    return tl.minimum(reciprocal(scale), LARGEST_FLOAT)


@triton.jit
def bf16_rounded(x, increment):
    """Add to the bits of float32 and cut off the lower half; NaN stays NaN, infinity infinity."""
    bits = bits_of(x)
    finite = (bits & 0x7F800000) != 0x7F800000
    # A payload in the lower half alone would leave infinity.
    quiet = tl.where((bits & 0x007FFFFF) != 0, bits | 0x00400000, bits)
    bits = tl.where(finite, bits + increment, quiet)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def encode_soft_sign(x):
    """Return int8 and the scale: f(y) = (1 + a) y / (1 + a |y|) of y = x / max|x|, in equal steps."""
    scale = largest(tl.abs(x))
    y = x * share_factor(scale)
    f = y * reciprocal(tl.fma(SOFTNESS, tl.abs(y), 1.0))
    return nearest(f, 127.0 * (1.0 + SOFTNESS)).to(tl.int8), scale


@triton.jit
def decode_soft_sign(code, scale):
    """Invert `encode_soft_sign`."""
    f = code.to(tl.float32)
    return f * reciprocal(tl.fma(-SOFTNESS, tl.abs(f), 127.0 * (1.0 + SOFTNESS))) * scale


@triton.jit
def root_code(x, noise, LEVELS: tl.constexpr):
    """Return √x in equal steps from 1 / LEVELS to 1 of its maximum, rounded stochastically, and the maximum."""
    root = tl.sqrt(x)
    scale = largest(root)
    # The middle of the noise's step, between -1.5 and -0.5: the nearest integer is then the floor, less 1.
    threshold = tl.fma(noise.to(tl.float32), 1.0 / 65536, 0.5 / 65536 - 1.5)
    code = tl.fma(root, LEVELS * share_factor(scale), threshold)
    return nearest(tl.minimum(tl.maximum(code, 0.0), LEVELS - 1.0), 1.0).to(tl.uint8), scale


@triton.jit
def root_value(code, scale, LEVELS: tl.constexpr):
    """Invert `root_code`."""
    step = scale * (1.0 / LEVELS)
    root = tl.fma(code.to(tl.float32), step, step)
    return root * root


@triton.jit
def encode_root4(x, noise):
    """Return 4 bits of √x, the lower half of a byte the even element, and the scale."""
    code, scale = root_code(x, noise, 16)
    low, high = tl.split(tl.reshape(code, (x.shape[0], GROUP // 2, 2)))
    return low | (high << 4), scale


@triton.jit
def decode_root4(code, scale):
    """Invert `encode_root4`."""
    return root_value(tl.reshape(tl.join(code & 15, code >> 4), (code.shape[0], GROUP)), scale, 16)


@triton.jit
def encode_e4m3(x, increment):
    """Return E4M3 of sign(x) (|x| / s)^k as uint8, s and k.

    20 bits are cut off after `increment` was added: half of them to round to nearest, noise to do so stochastically.
    No code is beyond 2^8.66: k stretches the group over E4M3_LOG2_RANGE, or is 1 / 16 and the group less than 2^277.
    """
    size = tl.abs(x)
    high = log2(largest(size))
    # 0 wraps around to the largest of all, and back where the whole group is 0.
    smallest = tl.min(bits_of(size) - TINY, axis=1, keep_dims=True) + TINY
    low = log2(smallest.to(tl.float32, bitcast=True))
    middle = 0.5 * (high + low)
    scale = exp2(middle)
    steps = tl.minimum(tl.maximum(16.0 * E4M3_LOG2_RANGE * reciprocal(high - low), 1.0), 256.0)
    power = tl.where(scale > 0, steps.to(tl.int32).to(tl.float32) * (1 / 16), 1.0)
    # -1000, so that the difference to log2 0 is no NaN.
    code = exp2(tl.fma(power, log2(size), -power * tl.maximum(middle, -1000.0)))
    # 2^-120 turns E4M3, its subnormal numbers too, into the upper 12 bits of float32.
    bits = bits_of(code * 2.0**-120) + increment
    return (bits >> 20 | bits_of(x) >> 24 & 0x80).to(tl.uint8), scale, power


@triton.jit
def decode_e4m3(code, scale, power):
    """Invert `encode_e4m3`."""
    bits = code.to(tl.uint32)
    y = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 2.0**120
    size = exp2(log2(y) * reciprocal(power)) * scale
    return (bits_of(size) | (bits & 0x80) << 24).to(tl.float32, bitcast=True)


@triton.jit
def neighbours(begin, COUNT: tl.constexpr, TOGETHER: tl.constexpr):
    """Return begin, begin + 1, ..., of which a thread holds so many together."""
    return tl.max_contiguous(tl.multiple_of(begin + tl.arange(0, COUNT), TOGETHER), TOGETHER)


@triton.jit
def codes_at(code_ptr, offset, begin, limit, BLOCK: tl.constexpr, CODEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Return pointers to the codes of a tile, and which of them exist; the arguments are those of `load`."""
    ELEMENTS: tl.constexpr = 2 if CODEC == ROOT4 else 1
    TOGETHER: tl.constexpr = 4 // ELEMENTS
    limit = (limit + (ELEMENTS - 1)) // ELEMENTS
    if ALIGNED:
        limit = tl.multiple_of(limit, TOGETHER)
    index = neighbours(begin // ELEMENTS, BLOCK // ELEMENTS, TOGETHER)
    return code_ptr + offset // ELEMENTS + index, index < limit


@triton.jit
def scales_at(scale_ptr, offset, begin, limit, GROUPS: tl.constexpr, CODEC: tl.constexpr):
    """Return pointers to the first scale of each group of a tile, and which of the groups exist.

    That scales are neighbours is hidden from the compiler, which would bring them together through shared memory.
    """
    SCALES: tl.constexpr = 2 if CODEC == E4M3 or CODEC == E4M3_DITHERED else 1
    group = begin // GROUP + tl.arange(0, GROUPS)[:, None]
    scales = tl.max_contiguous(scale_ptr + SCALES * (offset // GROUP) + SCALES * group, (1, 1))
    return scales, group < (limit + (GROUP - 1)) // GROUP


@triton.jit
def store_scale(scales, scale, exist):
    """Write one number a group, by the first lane of the warp that has the group: 32 columns are its lanes."""
    SHAPE: tl.constexpr = (scale.shape[0], 32)
    lane = tl.arange(0, 32)[None, :]
    if SEES_NEIGHBOURS:
        # Groups would be spread over the lanes, through shared memory with four barriers in the loop. Here what the
        # masked lanes point to are the neighbours.
        scales = tl.multiple_of(scales + lane, (1, 1))
    tl.store(tl.broadcast_to(scales, SHAPE), tl.broadcast_to(scale, SHAPE), mask=exist & (lane == 0))


@triton.jit
def load(code_ptr, scale_ptr, offset, begin, limit, BLOCK: tl.constexpr, CODEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a tile of a moment as float32[BLOCK].

    Args:
        code_ptr: The buffer of codes.
        scale_ptr: That of scales, or None.
        offset: int64, where the chunk begins in them, in elements: a multiple of GROUP.
        begin: Where the tile begins in the chunk: a multiple of GROUP.
        limit: Elements of the chunk that exist. The others are what a code of 0 stands for: nothing, or a step of
            a root in a group that has a full one, so that they never are the largest.
        BLOCK: Elements of the tile.
        CODEC: A number of `CODECS`.
        ALIGNED: Whether `limit` is a multiple of 4.
    """
    codes, exist = codes_at(code_ptr, offset, begin, limit, BLOCK, CODEC, ALIGNED)
    code = tl.load(codes, mask=exist, other=0)
    if CODEC == FP32 or CODEC == BF16:
        x = code.to(tl.float32)
    else:
        GROUPS: tl.constexpr = BLOCK // GROUP
        code = tl.reshape(code, (GROUPS, code.shape[0] // GROUPS))
        scales, exist = scales_at(scale_ptr, offset, begin, limit, GROUPS, CODEC)
        scale = tl.load(scales, mask=exist, other=0.0)
        if CODEC == SOFT_SIGN:
            x = decode_soft_sign(code, scale)
        elif CODEC == ROOT8:
            x = root_value(code, scale, 256)
        elif CODEC == ROOT4:
            x = decode_root4(code, scale)
        else:
            x = decode_e4m3(code, scale, tl.load(scales + 1, mask=exist, other=1.0))
        x = tl.reshape(x, (BLOCK,))
    return x


@triton.jit
def store(x, noise, code_ptr, scale_ptr, offset, begin, limit, CODEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Write a tile of a moment; the arguments are those of `load`, and `noise` 16 random bits an element."""
    BLOCK: tl.constexpr = x.shape[0]
    GROUPS: tl.constexpr = BLOCK // GROUP
    if CODEC == FP32:
        code = x
    elif CODEC == BF16:
        code = bf16_rounded(x, noise)
    else:
        x = tl.reshape(x, (GROUPS, GROUP))
        scales, exist = scales_at(scale_ptr, offset, begin, limit, GROUPS, CODEC)
        if CODEC == SOFT_SIGN:
            code, scale = encode_soft_sign(x)
        elif CODEC == ROOT8:
            code, scale = root_code(x, tl.reshape(noise, (GROUPS, GROUP)), 256)
        elif CODEC == ROOT4:
            code, scale = encode_root4(x, tl.reshape(noise, (GROUPS, GROUP)))
        else:
            if CODEC == E4M3:
                increment = 0x80000
            else:
                increment = tl.reshape(noise, (GROUPS, GROUP)) << 4
            code, scale, power = encode_e4m3(x, increment)
            store_scale(scales + 1, power, exist)
        store_scale(scales, scale, exist)
        code = tl.reshape(code, (code.shape[0] * code.shape[1],))
    codes, exist = codes_at(code_ptr, offset, begin, limit, BLOCK, CODEC, ALIGNED)
    tl.store(codes, code, mask=exist)
