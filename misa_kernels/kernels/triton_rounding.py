"""How do the Triton kernels round float32 to a weight of 16 bits, with which noise, and keep the bits that it lacks?"""

from __future__ import annotations

import triton
import triton.language as tl

from misa_kernels.kernels.triton_codec import INTERPRETED, bf16_rounded, bits_of


@triton.jit
def lowbias32(x):
    """Hash 32 bits to 32 bits; C. Wellons' constants, https://nullprogram.com/blog/2018/07/31/."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise32(first, index, key):
    """Return 32 bits of noise for the elements `first + index`; `first` int64, `index` below 2^32.

    Philox would cost half of the memory time of the step.
    """
    low = first.to(tl.uint32) + index.to(tl.uint32)
    high = (first >> 32).to(tl.uint32)
    # The upper half of the 64-bit index is one of two scalars: their keys are made once a program.
    here = tl.where(high != 0, lowbias32(high ^ key), key)
    beyond = lowbias32((high + 1) ^ key)
    key = tl.where(low < first.to(tl.uint32), beyond, here)
    return lowbias32(low ^ key)


@triton.jit
def bf16_nearest(x):
    """Round to nearest, ties to even."""
    if INTERPRETED:
        # Its own conversion truncates. On a GPU these integers would be 8 of 60 instructions an element.
        return bf16_rounded(x, 0x7FFF + ((x.to(tl.uint32, bitcast=True) >> 16) & 1))
    else:
        return x.to(tl.bfloat16)


@triton.jit
def fp16_rounded(x, noise):
    """Round float32 to one of its two neighbours in float16, the nearer with higher probability; `noise` 16 bits."""
    nearest = x.to(tl.float16)
    bits = nearest.to(tl.int16, bitcast=True).to(tl.int32)
    bits -= (tl.abs(nearest.to(tl.float32)) > tl.abs(x)).to(tl.int32)
    low = tl.abs(bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32))
    high = tl.abs((bits + 1).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32))
    finite = tl.abs(x) < float("inf")
    share = tl.where(finite, tl.div_rn(tl.abs(x) - low, high - low) * 65536, 0.0).to(tl.int32)
    bits += (share + noise.to(tl.int32) >= 65536).to(tl.int32)
    return tl.where(finite, bits.to(tl.int16).to(tl.float16, bitcast=True), nearest)


@triton.jit
def nearest_of(x, DTYPE: tl.constexpr):
    """Return float32 rounded to a dtype, as float32."""
    rounded = bf16_nearest(x) if DTYPE == tl.bfloat16 else x.to(DTYPE)
    return rounded.to(tl.float32)


@triton.jit
def split(theta):
    """Cut float32 into the nearest bfloat16, ties away from zero, and the 16 bits that are missing, as int16."""
    bits = bits_of(theta)
    nan = theta != theta
    upper = tl.where(nan, (bits >> 16) | 0x40, (bits + 0x8000) >> 16)
    residual = tl.where(nan, 0, bits).to(tl.uint16)
    return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True), residual.to(tl.int16, bitcast=True)


@triton.jit
def join(weight, residual):
    """Return the float32 numbers whose parts `split` gave."""
    upper = weight.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return (upper + residual.to(tl.int32)).to(tl.float32, bitcast=True)
