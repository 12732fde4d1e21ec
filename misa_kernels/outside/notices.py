"""What is said to the user: warnings that point at their line, however deep they arise, with names of parameters."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

INNER = ("misa_kernels", "torch", "contextlib", "functools")


def warn(sentence: str) -> None:
    """Give a UserWarning where the user called something of ours."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] in INNER:
        level, frame = level + 1, frame.f_back
    warnings.warn(sentence, stacklevel=level)


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return names as part of a sentence: the first ones, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def names_of(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the name of every parameter, or its place where the groups have no names."""
    names: list[str] = []
    for g, group in enumerate(groups):
        if "param_names" in group:
            names.extend(group["param_names"])
        else:
            names.extend(f"group {g}, parameter {i}" for i in range(len(group["params"])))
    return names
