"""How much memory does a GPU have, by its name or as a size?"""

from __future__ import annotations

import re

# MiB of the whole memory. None was read off a card here, so that a per cent may be wrong; a size in GB is exact.
CARDS = {
    "T4": 15_360,
    "RTX 3060": 12_288,
    "RTX 3090": 24_576,
    "RTX 4080": 16_376,
    "RTX 4090": 24_564,
    "RTX 5090": 32_607,
    "RTX A6000": 49_140,
    "A10G": 23_028,
    "L4": 23_034,
    "L40S": 46_068,
    "V100 32GB": 32_768,
    "A100 40GB": 40_960,
    "A100 80GB": 81_920,
    "H100": 81_559,
    "H200": 143_771,
    "B200": 183_359,
}
# What CUDA's context, its libraries' workspaces and the allocator's gaps may take: an assumption, not measured.
RESERVED_BYTES = 2**30


def capacity_bytes(card: str) -> int:
    """Return the bytes of a card: a key of `CARDS`, in any spelling of case and blanks, or a size such as "24GB".

    A GB counts as a GiB, since that is what it means on the box of a card.

    Raises:
        ValueError: If it is neither.
    """
    names = {_plain(name): size for name, size in CARDS.items()}
    if _plain(card) in names:
        return names[_plain(card)] * 2**20
    size = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(?:g|gb|gib)", card.strip().lower())
    if size is None or float(size[1]) == 0:
        raise ValueError(f"--gpu={card!r} must be a size such as 24GB or one of {', '.join(CARDS)}")
    return int(float(size[1]) * 2**30)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("nvidia"))
