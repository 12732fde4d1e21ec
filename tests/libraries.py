"""Libraries that tests compare with and that users need not have."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest


def required(name: str) -> Any:
    """Import a library that is optional elsewhere but not in CI."""
    try:
        return importlib.import_module(name)
    except ImportError:
        (pytest.fail if "CI" in os.environ else pytest.skip)(f"needs {name}: pip install {name}")
