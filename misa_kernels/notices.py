"""Warnings that point at the user's line, however deep within torch and MISA they arise."""

from __future__ import annotations

import sys
import warnings

INNER = ("misa_kernels", "torch", "contextlib", "functools")


def warn(sentence: str) -> None:
    """Give a UserWarning where the user called something of ours."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] in INNER:
        level, frame = level + 1, frame.f_back
    warnings.warn(sentence, stacklevel=level)
