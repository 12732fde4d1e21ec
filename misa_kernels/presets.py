"""Published algorithms as keyword arguments of `MISA`.

Every preset takes overrides: an argument given explicitly wins, as in `MISA(params, **paper(delta=0.01))`.
"""

from __future__ import annotations

from typing import Any

from misa_kernels.draw.sampler import CyclicSampler, ImportanceSampler, UniformSampler


def paper(**overrides: Any) -> dict[str, Any]:
    """MISA as printed in arXiv 2511.00056: η = 1, all state dropped each round, with the line-16 flush.

    Args:
        **overrides: Keyword arguments of `MISA` that win over the preset.
    """
    sampler = ImportanceSampler(eta=1.0, least_recent=0)
    return {"sampler": sampler, "keep_states": "none", "momentum_flush": True} | overrides


def authors(**overrides: Any) -> dict[str, Any]:
    """MISA as in its authors' code, without its defects: scores are (mean ‖g‖)², the exponent is at most 5.

    The two least recently used modules enter every round whatever part of the budget they take.

    Args:
        **overrides: Keyword arguments of `MISA` that win over the preset.
    """
    sampler = ImportanceSampler(
        eta=1.0, importance_norm="norm", exponent_clip=5.0, least_recent=2, least_recent_share=1.0
    )
    return {"sampler": sampler, "keep_states": "staying", "momentum_flush": False} | overrides


def badam(**overrides: Any) -> dict[str, Any]:
    """BAdam (arXiv 2404.02827): whole layers in turn, as many as `delta` has room for.

    Args:
        **overrides: Keyword arguments of `MISA` that win over the preset.
    """
    return {"sampler": CyclicSampler(granularity="layer"), "keep_states": "none"} | overrides


def slices(**overrides: Any) -> dict[str, Any]:
    """A thin part of every layer for the whole run: the same columns of each matrix, drawn once at random.

    It wants larger learning rates than AdamW: .75 / delta times AdamW's were within a factor of 1.5 of the best ones in
    fine-tuning SmolLM2 at δ = .01 and .03 (benchmarks/results/pretrained.md), which are about twice LoRA's.

    Args:
        **overrides: Keyword arguments of `MISA` that win over the preset.
    """
    return {"sampler": UniformSampler(granularity="slice")} | overrides


def lisa(**overrides: Any) -> dict[str, Any]:
    """LISA (arXiv 2403.17919): whole layers at random, as many as `delta` has room for.

    LISA proper keeps embeddings and head always on: give them the role "dense".

    Args:
        **overrides: Keyword arguments of `MISA` that win over the preset.
    """
    return {"sampler": UniformSampler(granularity="layer"), "keep_states": "none"} | overrides
