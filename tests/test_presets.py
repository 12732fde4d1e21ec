"""Presets are keyword arguments; what is given explicitly wins."""

import pytest
import tiny

from misa_kernels import (
    MISA,
    CyclicSampler,
    ImportanceSampler,
    UniformSampler,
    authors,
    badam,
    lisa,
    paper,
    param_groups,
)


def test_presets_are_the_published_algorithms():
    assert paper() == {
        "sampler": ImportanceSampler(eta=1.0, least_recent=0),
        "keep_states": "none",
        "momentum_flush": True,
    }
    sampler = authors()["sampler"]
    assert (sampler.eta, sampler.importance_norm, sampler.exponent_clip) == (1.0, "norm", 5.0)
    assert (sampler.least_recent, sampler.least_recent_share) == (2, 1.0)
    assert badam() == {"sampler": CyclicSampler(granularity="layer"), "keep_states": "none"}
    assert lisa() == {"sampler": UniformSampler(granularity="layer"), "keep_states": "none"}


@pytest.mark.parametrize("preset", [paper, authors, badam, lisa])
def test_explicit_arguments_win(preset):
    assert preset(delta=0.5, keep_states="staying")["keep_states"] == "staying"
    model = tiny.build()
    optimizer = MISA(param_groups(model), **preset(delta=0.5, inner_steps=2))
    assert optimizer.inner_steps == 2
    tiny.train(model, optimizer, 6)
    assert len(optimizer.monitor.rounds) == 4
