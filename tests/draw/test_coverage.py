"""How often modules are visited: counted in runs, and whether each remedy that is advised would do."""

import re
import warnings

import numpy as np
import pytest
import tiny
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from misa_kernels import MISA, ImportanceSampler, UniformSampler, badam, lisa, param_groups
from misa_kernels.draw.coverage import Coverage


def visits_of(optimizer, rounds):
    """Draw rounds without training; a uniform or cyclic draw does not depend on gradients."""
    visits = np.zeros(len(optimizer.modules))
    for number in range(rounds):
        candidates = optimizer._run.scores.candidates
        active = optimizer.sampler.draw(candidates, optimizer._partition.budget, number, 0).active
        candidates.last_round[active] = number
        visits[active] += 1
    return visits


@pytest.mark.parametrize(
    ("options", "tolerance"),
    # Matrices of two sizes: a budget is filled with few large or many small ones, and not to the last element.
    [
        ({"sampler": UniformSampler()}, 0.1),
        (badam(), 1e-9),
        (lisa(), 1e-9),
        ({"sampler": UniformSampler(max_per_layer=1), "delta": 0.5}, 1e-9),
        ({"sampler": UniformSampler(max_per_layer=2, depth_window=4), "delta": 0.7}, 1e-9),
    ],
    ids=["uniform", "badam", "lisa", "one a layer", "two a layer in a window"],
)
def test_visits_are_those_that_draws_make(options, tolerance):
    model = tiny.build(layers=8)
    # Room for one whole layer in eight, hence more than an eighth of its matrices.
    optimizer = MISA(param_groups(model), **({"delta": 0.13, "inner_steps": 5} | options))
    planned = optimizer.coverage(2000)
    assert planned.rounds == 400
    counted = visits_of(optimizer, planned.rounds)
    assert counted.mean() == pytest.approx(planned.visits, rel=tolerance)


@given(
    total_steps=st.integers(1, 100_000),
    inner_steps=st.integers(1, 200),
    modules=st.integers(1, 3000),
    share=st.floats(0.002, 1.0),
    most_share=st.floats(0.1, 1.0),
)
# 3 * 6 / 1.8 is more than 10 by one bit.
@example(total_steps=1, inner_steps=1, modules=6, share=1.0, most_share=0.3)
def test_every_remedy_is_enough(total_steps, inner_steps, modules, share, most_share):
    most = max(most_share * modules, 1.0)
    drawn = min(max(share * modules, 1.0), most)

    def coverage(total_steps, inner_steps):
        return Coverage(total_steps, inner_steps, modules, drawn, most, share)

    planned = coverage(total_steps, inner_steps)
    advice = planned.advice
    if advice is None:
        assert planned.visits >= 3
        return
    assert planned.visits < 3
    if found := re.search(r"set inner_steps=(\d+)", advice):
        shorter = int(found[1])
        assert 5 <= shorter < inner_steps
        assert coverage(total_steps, shorter).visits >= 3 - 1e-9
    if found := re.search(r"raise delta to ([\d.]+)", advice):
        growth = float(found[1]) / share
        assert 1 < growth and growth * planned.modules_a_round <= most * 1.01 + 1
        assert planned.visits * growth >= 3 - 1e-9
    steps = int(re.search(r"train for ([\d,]+) steps", advice)[1].replace(",", ""))
    assert coverage(steps, inner_steps).visits >= 3 - 1e-9
    # A round less would not be.
    fewer = coverage(max(steps - inner_steps, 1), inner_steps)
    assert fewer.visits < 3 or steps == inner_steps


def test_a_run_that_is_too_short_warns_at_construction_with_the_remedies_in_numbers():
    model = tiny.build()
    with pytest.warns(UserWarning, match=r"a run of 40 steps in rounds of 5 .*raise delta to .*train for .* steps"):
        optimizer = MISA(param_groups(model), delta=0.1, total_steps=40)
    assert optimizer.coverage(40).visits < 3 <= optimizer.coverage(4000).visits
    optimizer.release()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MISA(param_groups(model), delta=0.1, total_steps=2000).release()
        MISA(param_groups(model), delta=0.1).release()


def test_a_larger_delta_is_not_advised_where_the_sampler_sets_the_limit():
    sampler = ImportanceSampler(max_per_layer=1)
    advice = MISA(param_groups(tiny.build()), delta=0.5, inner_steps=5, sampler=sampler).coverage(40).advice
    assert "train for" in advice and "delta" not in advice


@pytest.mark.parametrize("wrong", [0, -3, 2.5, True, "100"])
def test_coverage_takes_whole_numbers(wrong):
    optimizer = MISA(param_groups(tiny.build()), delta=0.1)
    with pytest.raises((TypeError, ValueError), match="total_steps"):
        optimizer.coverage(wrong)


def test_a_round_without_any_gradient_is_reported_once():
    trained, other = tiny.build(), tiny.build()
    optimizer = MISA(param_groups(trained), delta=0.2, inner_steps=2)
    with pytest.warns(UserWarning, match="round 0 ended without a gradient for any of its") as caught:
        tiny.train(other, optimizer, 6)
    # Three rounds.
    assert len([w for w in caught if "without a gradient" in str(w.message)]) == 1


def test_a_round_of_skipped_steps_is_not_idle():
    model = tiny.build()
    optimizer = MISA(param_groups(model), delta=0.2, inner_steps=2, skip_nonfinite=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            loss = tiny.loss_of(model, tiny.batch(step))
            (loss * torch.tensor(float("nan"))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.skipped_steps == 4
