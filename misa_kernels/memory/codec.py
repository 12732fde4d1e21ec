"""How a state tensor is stored: formats below float32, each as two plain PyTorch functions.

These are the specification that `kernels/triton_codec.py` and `csrc/codec.h` are tested against. A compressed
tensor is cut into groups of `GROUP` elements from its own beginning; a group has its own scale, and a scale of 0
decodes to zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from misa_kernels.reference import round_stochastic

GROUP = 128
# Stretches the soft-sign: small momenta are stored this many times more finely than by equal steps, plus one.
SOFTNESS = 3.0
# The smallest and the largest number of E4M3, and log2 of the range that a group is stretched over, as in COAT.
E4M3_MIN = 2.0**-9
E4M3_MAX = 448.0
E4M3_LOG2_RANGE = math.log2(E4M3_MAX**2 / 2)


@dataclass(frozen=True)
class Codec:
    """How one state tensor is stored.

    Attributes:
        dtype: Of the codes.
        elements: Elements in a code.
        scales: float32 numbers a group; none for formats that store each element by itself.
        encode: Maps float32 of shape (groups, GROUP) and noise in [0, 65536) to codes of shape
            (groups, GROUP / elements) and scales of shape (groups, scales).
        decode: Its inverse up to rounding.
    """

    dtype: torch.dtype
    elements: int
    scales: int
    encode: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor], Tensor]


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax(dim=1, keepdim=True)


def _share(x: Tensor, scale: Tensor) -> Tensor:
    """Return x / scale, 0 where the scale is."""
    return x / torch.where(scale == 0, 1.0, scale)


def _threshold(noise: Tensor | None) -> Tensor | float:
    """Return what is added before the floor: a half rounds to nearest, noise stochastically."""
    return 0.5 if noise is None else noise / 65536


def _no_scales(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], 0, dtype=torch.float32)


def encode_bf16(x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round stochastically: to nearest, an average whose decay is small would never move."""
    assert noise is not None
    return round_stochastic(x, torch.bfloat16, noise), _no_scales(x)


def encode_soft_sign(x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Signed 8 bits: f(y) = (1 + a) y / (1 + a |y|) of y = x / max|x|, in equal steps."""
    scale = _largest(x)
    y = _share(x, scale)
    code = torch.round(127.0 * ((1.0 + SOFTNESS) * y / (1.0 + SOFTNESS * y.abs())))
    return code.nan_to_num().to(torch.int8), scale


def decode_soft_sign(code: Tensor, scale: Tensor) -> Tensor:
    """Invert `encode_soft_sign`."""
    f = code.float() / 127.0
    return f / ((1.0 + SOFTNESS) - SOFTNESS * f.abs()) * scale


def root_code(x: Tensor, levels: int, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Store √x ≥ 0 in equal steps from 1 / levels to 1 of its maximum, without zero.

    A second moment that decoded to 0 beside a momentum that does not would make an update without bound. Rounded
    stochastically, since β₂ moves it by less than half a step: to nearest it would stand still from age 100 on.
    """
    root = x.sqrt()
    scale = _largest(root)
    code = torch.floor(levels * _share(root, scale) + _threshold(noise)) - 1
    return code.nan_to_num().clamp(0, levels - 1).to(torch.uint8), scale


def root_value(code: Tensor, scale: Tensor, levels: int) -> Tensor:
    """Invert `root_code`."""
    return ((code.float() + 1) / levels * scale).square()


def encode_root4(x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """4 bits of √x; the lower half of a byte is the even element."""
    code, scale = root_code(x, 16, noise)
    return code[:, 0::2] | code[:, 1::2] << 4, scale


def decode_root4(code: Tensor, scale: Tensor) -> Tensor:
    """Invert `encode_root4`."""
    return root_value(torch.stack([code & 15, code >> 4], dim=2).flatten(1), scale, 16)


def encode_e4m3(x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """FP8 with the range expansion of COAT (arXiv 2410.19313): sign(x) (|x| / s)^k.

    s is the geometric mean of the largest and the smallest |x| > 0 of the group, and k stretches them over the
    range of E4M3, in steps of 1 / 16. Without noise, rounded to nearest.
    """
    size = x.abs()
    largest = _largest(x)
    smallest = torch.where(size > 0, size, math.inf).amin(dim=1, keepdim=True)
    smallest = torch.where(largest > 0, smallest, 0.0)
    scale = largest.sqrt() * smallest.sqrt()
    spread = largest.log2() - smallest.log2()
    power = torch.floor(16.0 * E4M3_LOG2_RANGE / spread) / 16.0
    power = torch.where(largest > 0, power.clamp(1 / 16, 16.0), 1.0)
    # Beside an infinite element all others are far below the smallest code; they must not pass for zeros.
    code = torch.exp2(power * _share(size, scale).log2()).clamp(E4M3_MIN, E4M3_MAX)
    if noise is not None:
        # 3 bits of mantissa, and equal steps below 2^-6.
        step = torch.exp2((code.frexp().exponent - 4).clamp(min=-9))
        code = (torch.floor(code / step + _threshold(noise)) * step).clamp(max=E4M3_MAX)
    code = torch.where(size != 0, code, 0.0).copysign(x)
    return code.to(torch.float8_e4m3fn), torch.cat([scale, power], dim=1)


def decode_e4m3(code: Tensor, scale: Tensor) -> Tensor:
    """Invert `encode_e4m3`."""
    y = code.float()
    size = torch.where(y != 0, torch.exp2(y.abs().log2() / scale[:, 1:]) * scale[:, :1], 0.0)
    return size.copysign(y)


FP32 = Codec(torch.float32, 1, 0, lambda x, noise: (x, _no_scales(x)), lambda code, scale: code)
BF16 = Codec(torch.bfloat16, 1, 0, encode_bf16, lambda code, scale: code.float())
SOFT_SIGN = Codec(torch.int8, 1, 1, encode_soft_sign, decode_soft_sign)
ROOT8 = Codec(
    torch.uint8, 1, 1, lambda x, noise: root_code(x, 256, noise), lambda code, scale: root_value(code, scale, 256)
)
ROOT4 = Codec(torch.uint8, 2, 1, encode_root4, decode_root4)
E4M3 = Codec(torch.float8_e4m3fn, 1, 2, lambda x, noise: encode_e4m3(x, None), decode_e4m3)
E4M3_DITHERED = Codec(torch.float8_e4m3fn, 1, 2, encode_e4m3, decode_e4m3)

# By `state_dtype`: how m and v are stored.
FORMATS: Mapping[str, Mapping[str, Codec]] = {
    "fp32": {"exp_avg": FP32, "exp_avg_sq": FP32},
    "bf16": {"exp_avg": BF16, "exp_avg_sq": BF16},
    "int8": {"exp_avg": SOFT_SIGN, "exp_avg_sq": ROOT8},
    "fp8": {"exp_avg": E4M3, "exp_avg_sq": E4M3_DITHERED},
    "int8+int4": {"exp_avg": SOFT_SIGN, "exp_avg_sq": ROOT4},
}
