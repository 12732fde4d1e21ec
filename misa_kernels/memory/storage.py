"""What the state of a tensor is made of: its buffers for each choice of precision, and float32 into and out of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from misa_kernels.memory.codec import FORMATS, FP32, GROUP, Codec
from misa_kernels.reference import MASK32, lowbias32, noise16, noise32

# Of moments that somebody else keeps.
FOREIGN = "rule"
PRECISIONS = ("master", "split", "stochastic")
MOMENTS = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
# Elements at a time in plain PyTorch, outside of steps: noise and what is decoded take up to 100 bytes for each.
PIECE = 1 << 15
# Every key that a slot's state can have; everything else in `state` is one number a slot.
KEYS = (*MOMENTS, "master", "residual")


class Buffer(NamedTuple):
    """One tensor of a slot's state.

    Attributes:
        dtype: Of its entries.
        elements: Elements of the weight that an entry stands for.
        entries: Entries for so many elements.
    """

    dtype: torch.dtype
    elements: int
    entries: int = 1

    def numel(self, elements: int) -> int:
        """Return the entries that a weight of so many elements needs."""
        return -(-elements // self.elements) * self.entries


@dataclass(frozen=True)
class Storage:
    """How moments are stored, and what keeps updates below the resolution of 16-bit weights.

    Attributes:
        state_dtype: Key of `FORMATS`, or `FOREIGN`.
        param_precision: "master", a float32 copy; "split", the 16 bits that bfloat16 cuts off; "stochastic", nothing.
    """

    state_dtype: str = "fp32"
    param_precision: str = "master"

    @property
    def codecs(self) -> Mapping[str, Codec]:
        """How each moment is stored, by its key."""
        return {} if self.state_dtype == FOREIGN else FORMATS[self.state_dtype]

    @property
    def noisy(self) -> bool:
        """Whether a step rounds anything stochastically."""
        return self.param_precision == "stochastic" or self.state_dtype != "fp32"

    def buffers(self, weight: torch.dtype) -> dict[str, Buffer]:
        """Return the tensors of a slot's state by key; the moments of float64 weights are float64."""
        found = {}
        for name, codec in self.codecs.items():
            dtype = torch.promote_types(codec.dtype, weight) if codec is FP32 and weight.itemsize == 8 else codec.dtype
            found[name] = Buffer(dtype, codec.elements)
            if codec.scales:
                found[f"{name}_scale"] = Buffer(torch.float32, GROUP, codec.scales)
        if weight.itemsize == 2 and self.param_precision == "master":
            found["master"] = Buffer(torch.float32, 1)
        if weight.itemsize == 2 and self.param_precision == "split":
            found["residual"] = Buffer(torch.int16, 1)
        return found

    def moment_bytes(self, weight: torch.dtype) -> float:
        """Return the bytes that both moments of a parameter take."""
        buffers = [buffer for name, buffer in self.buffers(weight).items() if name in MOMENTS]
        return sum(buffer.numel(GROUP) * buffer.dtype.itemsize for buffer in buffers) / GROUP

    def decode(self, name: str, views: Mapping[str, Tensor], numel: int) -> Tensor:
        """Return a moment of shape (numel,): the stored tensor itself where it is not compressed."""
        codec = self.codecs[name]
        if codec is FP32:
            return views[name]
        codes = _groups(views[name], GROUP // codec.elements)
        scales = views[f"{name}_scale"].view(-1, codec.scales) if codec.scales else codes.new_empty(len(codes), 0)
        return codec.decode(codes, scales).flatten()[:numel]

    def encode(
        self, name: str, views: Mapping[str, Tensor], x: Tensor, noise: Tensor | None, keep: Tensor | None = None
    ) -> None:
        """Store a moment; where `keep`, a 0-dim bool, is true, leave what is stored."""
        codec = self.codecs[name]
        codes, scales = codec.encode(_groups(x, GROUP), None if noise is None else _groups(noise, GROUP))
        new = {name: codes.flatten()[: len(views[name])]}
        if codec.scales:
            new[f"{name}_scale"] = scales.flatten()
        for key, value in new.items():
            words = views[key]
            if value.dtype == torch.float8_e4m3fn:
                # torch.where knows no float8.
                words, value = words.view(torch.uint8), value.view(torch.uint8)
            words.copy_(value if keep is None else torch.where(keep, words, value))

    def theta(self, views: Mapping[str, Tensor], weight: Tensor) -> Tensor:
        """Return the weight with all its bits, of shape (numel,) in the arithmetic dtype: a master or a copy."""
        if "master" in views:
            return views["master"]
        if "residual" in views:
            return join(weight, views["residual"])
        return weight.to(torch.promote_types(weight.dtype, torch.float32))


def convert(
    saved: Mapping[str, Tensor],
    was: Storage,
    views: Mapping[str, Tensor],
    storage: Storage,
    weight: Tensor,
    start: int,
    noise_key: int,
) -> None:
    """Store a slot's state that was stored otherwise, a piece at a time.

    Args:
        saved: Its buffers, 1-D, by the keys of `was`.
        was: How they are stored.
        views: Where they go, by the keys of `storage`; modified in place.
        storage: How they are to be stored.
        weight: The weight, of shape (numel,).
        start: Index of its first element within the whole parameter.
        noise_key: Key of the parameter's rounding noise.
    """
    numel = len(weight)
    for at in range(0, numel, PIECE):
        part = weight[at : at + PIECE]
        before, now = (
            {
                name: x.view(-1).narrow(0, kinds[name].numel(at), kinds[name].numel(len(part)))
                for name, x in held.items()
            }
            for held, kinds in ((saved, was.buffers(weight.dtype)), (views, storage.buffers(weight.dtype)))
        )
        noise = state_noise(start + at, len(part), noise_key, weight.device)
        for name in storage.codecs:
            storage.encode(name, now, was.decode(name, before, len(part)), noise[name])
        theta = was.theta(before, part)
        if "master" in now:
            now["master"].copy_(theta)
        if "residual" in now:
            rounded, residual = split(theta)
            now["residual"].copy_(torch.where(rounded == part, residual, 0))


def state_noise(start: int, numel: int, key: int, device: torch.device) -> dict[str, Tensor]:
    """Return the rounding noise of both moments, int64 in [0, 65536).

    That of v is the upper half of the hash whose lower half rounds the weight, so that one hash an element is enough
    where m needs none.

    Args:
        start: Index of the first element within the whole parameter.
        numel: Number of elements.
        key: The parameter's noise key of this step.
        device: Where the moments are.
    """
    index = torch.arange(start, start + numel, device=device)
    return {"exp_avg": noise16(index, lowbias32(key + 1 & MASK32)), "exp_avg_sq": noise32(index, key) >> 16}


def join(weight: Tensor, residual: Tensor) -> Tensor:
    """Return the float32 numbers whose parts `split` gave."""
    return ((weight.view(torch.int16).int() << 16) + residual.int()).view(torch.float32)


def split(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Cut float32 into the nearest bfloat16, ties away from zero, and the 16 bits that are missing, as int16."""
    bits = theta.view(torch.int32)
    nan = theta.isnan()
    upper = torch.where(nan, bits >> 16 | 0x40, bits + 0x8000 >> 16)
    return upper.to(torch.int16).view(torch.bfloat16), torch.where(nan, 0, bits).to(torch.int16)


def _groups(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, -len(x) % width)).view(-1, width) if len(x) % width else x.view(-1, width)
