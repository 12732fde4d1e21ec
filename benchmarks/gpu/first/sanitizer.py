"""Does any launch touch memory that is not its own? A few tests under compute-sanitizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu import nvidia


def measure(device: torch.device, deadline: float, so_far: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what memcheck found, see `benchmarks.gpu.nvidia.sanitize`."""
    yield {"absent": "no CUDA device"} if device.type == "cpu" else nvidia.sanitize("memcheck", deadline)
