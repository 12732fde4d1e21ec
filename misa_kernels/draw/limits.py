"""Which values may the options of a sampler have?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from numbers import Integral, Real
from typing import Any


def _is_number(x: Any) -> bool:
    return not isinstance(x, bool) and isinstance(x, Real) and math.isfinite(x)


def _is_integer(x: Any) -> bool:
    # least_recent=True is a mistake, although a bool counts as an integer.
    return not isinstance(x, bool) and isinstance(x, Integral)


# An option has the same rule in every sampler.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "eta": (
        lambda x: x == "auto" or (_is_number(x) and x >= 0),
        "'auto' or a finite number from 0 on: the concentration of p, 0 being uniform",
    ),
    "perplexity": (
        lambda x: _is_number(x) and x > 0,
        "a finite number above 0: the perplexity of p as a fraction of the candidates that fill the budget",
    ),
    "importance_beta": (
        lambda x: _is_number(x) and 0 <= x < 1,
        "in [0, 1): the decay of the importance estimate, 0 keeping the last round only",
    ),
    "importance_norm": (lambda x: x in ("sum", "norm"), "'sum' or 'norm'"),
    "exponent_clip": (
        lambda x: x is None or (_is_number(x) and x > 0),
        "None or a finite number above 0: the largest exponent eta s, None for no bound",
    ),
    "least_recent": (
        lambda x: _is_integer(x) and x >= 0,
        "an integer from 0 on: how many of the longest waiting enter first, 0 for none",
    ),
    "least_recent_share": (
        lambda x: _is_number(x) and 0 < x <= 1,
        "in (0, 1]: the fraction of the budget for the longest waiting; least_recent=0 keeps them out",
    ),
    "depth_window": (
        lambda x: x is None or (_is_integer(x) and x >= 1),
        "None or an integer from 1 on: the number of layers that a round draws from, None for all",
    ),
    "max_per_layer": (
        lambda x: x is None or (_is_integer(x) and x >= 1),
        "None or an integer from 1 on: how many candidates of one layer may be active, None for no limit",
    ),
    "granularity": (lambda x: x in ("module", "layer", "slice"), "'module', 'layer' or 'slice': what is drawn as one"),
    "slices": (
        lambda x: x in ("auto", "down", "output", "all"),
        "'auto', 'down', 'output' or 'all': the matrices that slices are made of",
    ),
    "hold_rounds": (
        lambda x: x in ("auto", "run") or (_is_integer(x) and x >= 1),
        "'auto', 'run' or an integer from 1 on: for how many rounds a set is trained",
    ),
    "oversized": (lambda x: x in ("error", "split"), "'error' or 'split': for modules above the budget"),
}


def check(sampler: object, options: Iterable[str]) -> None:
    """Refuse an option whose value breaks its rule."""
    for name in options:
        value = getattr(sampler, name)
        is_valid, rule = RULES[name]
        if not is_valid(value):
            raise ValueError(f"{name}={value!r} must be {rule}")


def check_own(sampler: Any) -> None:
    """Refuse options of one of our samplers that break their rules, or do not go together."""
    # A subclass may have options of its own.
    check(sampler, [field.name for field in fields(sampler) if field.name in RULES])
    for name in ("max_per_layer", "depth_window"):
        if sampler.granularity == "slice" and getattr(sampler, name) is not None:
            raise ValueError(
                f"{name}={getattr(sampler, name)!r} must be None with granularity='slice', which trains a slice of "
                "every layer at once: leave it out, or draw modules with granularity='module'"
            )
    if sampler.max_per_layer is not None and sampler.granularity == "layer":
        raise ValueError(
            f"max_per_layer={sampler.max_per_layer!r} must be None with granularity='layer', whose candidates are "
            "whole layers: leave it out, or draw modules with granularity='module'"
        )
