"""Does the simulation do what the specification says, in cases small enough to work out by hand?"""

from __future__ import annotations

import math

import numpy as np
import pytest
from simulation import (
    DENSE,
    FROZEN,
    PRESETS,
    Group,
    Options,
    Simulation,
    log_softmax,
    perplexity_of,
    solve_eta,
    window,
)


def one_module(group: Group, theta: list[float] | None = None, **options) -> Simulation:
    """A single module, always active, in a single layer."""
    values = np.array([1.0] if theta is None else theta)
    return Simulation([values], [0], [0], [0], [group], Options(delta=1.0, **options))


def modules(sizes: list[int], **options) -> Simulation:
    """One module of ones a size, each its own layer, under plain hyperparameters."""
    n = len(sizes)
    theta = [np.ones(size) for size in sizes]
    return Simulation(theta, list(range(n)), list(range(n)), [0] * n, [Group()], Options(**options))


def test_two_adamw_steps_by_hand():
    simulation = one_module(Group(lr=0.1, betas=(0.5, 0.75), eps=1.0, weight_decay=0.5), inner_steps=9)
    # m = 1, v = 1, m^ = 2, v^ = 4: theta = 1 * .95 - .1 * 2 / (2 + 1)
    simulation.step({0: np.array([2.0])})
    first = 0.95 - 0.2 / 3
    assert simulation.theta[0][0] == pytest.approx(first, rel=1e-15)
    # g = -1: m = 0, v = 1, so that only the decay acts
    simulation.step({0: np.array([-1.0])})
    assert simulation.theta[0][0] == pytest.approx(first * 0.95, rel=1e-15)
    # g = 3: m = 1.5, v = 3, m^ = 1.5 / .875, v^ = 3 / (1 - 27/64)
    simulation.step({0: np.array([3.0])})
    third = first * 0.95**2 - 0.1 * (1.5 / 0.875) / (math.sqrt(3 * 64 / 37) + 1)
    assert simulation.theta[0][0] == pytest.approx(third, rel=1e-15)
    assert simulation.ages == [3]


def test_importance_is_the_corrected_average_of_the_mean_squared_norm():
    simulation = one_module(Group(), theta=[1.0, 1.0], inner_steps=2)
    for g in ([3.0, 4.0], [0.0, 1.0], [0.0, 2.0], [2.0, 2.0]):
        simulation.step({0: np.array(g)})
    # means 13 and 6: G = .8 * (.2 * 13) + .2 * 6, corrected by 1 - .64
    assert simulation.G[0] == pytest.approx(3.28, rel=1e-15)
    assert simulation.count[0] == 2
    assert simulation.corrected_scores()[0] == pytest.approx(3.28 / 0.36, rel=1e-14)


@pytest.mark.parametrize(("norm", "score"), [("sum", 25.0), ("norm", 25.0)])
def test_first_score_under_each_norm(norm, score):
    simulation = one_module(Group(), theta=[1.0, 1.0], inner_steps=1, importance_norm=norm)
    simulation.step({0: np.array([3.0, 4.0])})
    assert simulation.corrected_scores()[0] == pytest.approx(score, rel=1e-14)


def test_module_without_an_update_keeps_importance_and_age():
    simulation = one_module(Group(), inner_steps=2, momentum_flush=True, keep_states="none")
    simulation.step({0: np.array([1.0])})
    simulation.step({0: None})
    raw, theta = simulation.G[0], simulation.theta[0].copy()
    assert raw == pytest.approx(0.2)  # one applied update, not two
    simulation.step({0: None})
    simulation.step({})
    assert (simulation.G[0], simulation.count[0]) == (raw, 1)
    assert simulation.theta[0] == theta  # neither decayed nor flushed


def test_flush_after_one_step_is_beta1_over_one_minus_beta1_times_that_step():
    plain = one_module(Group(weight_decay=0.3), inner_steps=1)
    flushed = one_module(Group(weight_decay=0.3), inner_steps=1, momentum_flush=True, keep_states="none")
    for simulation in (plain, flushed):
        simulation.step({0: np.array([0.25])})
    direction = 1e-3 * 0.25 / (0.25 + 1e-8)
    assert plain.theta[0] - flushed.theta[0] == pytest.approx(9 * direction, rel=1e-10)


def test_staying_state_is_neither_flushed_nor_reset():
    simulation = one_module(Group(weight_decay=0.0), inner_steps=1, momentum_flush=True)
    simulation.step({0: np.array([1.0])})
    assert simulation.theta[0][0] == pytest.approx(1 - 1e-3, rel=1e-10)
    assert simulation.ages == [1]


def test_flush_after_two_steps_by_hand():
    group = Group(lr=1.0, betas=(0.5, 0.5), eps=0.0, weight_decay=0.0)
    theta = {}
    for flush in (False, True):
        options = {"inner_steps": 2, "keep_states": "none", "momentum_flush": flush}
        simulation = one_module(group, theta=[0.0, 0.0], **options)
        simulation.step({0: np.array([2.0, 4.0])})
        simulation.step({0: np.array([2.0, 0.0])})
        theta[flush] = simulation.theta[0]
    # m = (1.5, 1), v = (3, 4), both corrected by 1 - .25; beta1 / (1 - beta1) = 1
    expected = np.array([2.0, 4 / 3]) / np.sqrt([4.0, 16 / 3])
    np.testing.assert_allclose(theta[False] - theta[True], expected, rtol=1e-14)


def test_clipping_takes_the_norm_of_active_and_dense_and_scores_come_before_it():
    group = Group(lr=1.0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0)
    simulation = Simulation(
        [np.zeros(1), np.zeros(1), np.zeros(1)],
        [0, DENSE, FROZEN],
        [0, -1, -1],
        [0, 0, 0],
        [group],
        Options(delta=0.5, inner_steps=1, max_grad_norm=1.0),
    )
    simulation.step({0: np.array([3.0]), 1: np.array([4.0]), 2: np.array([100.0])})
    # clipped to .6 and .8; the direction is g / (|g| + 1)
    np.testing.assert_allclose(np.concatenate(simulation.theta), [-0.6 / 1.6, -0.8 / 1.8, 0.0], rtol=1e-6)
    assert simulation.corrected_scores()[0] == pytest.approx(9.0, rel=1e-14)


def test_skipped_step_counts_for_the_round_and_for_nothing_else():
    simulation = one_module(Group(), theta=[1.0, 2.0], inner_steps=2, skip_nonfinite=True)
    simulation.step({0: np.array([1.0, np.nan])})
    assert simulation.ages == [0]
    np.testing.assert_array_equal(simulation.theta[0], [1.0, 2.0])
    simulation.step({0: np.array([2.0, 0.0])})
    assert [r.skipped_steps for r in simulation.rounds] == [1, 0]
    assert simulation.corrected_scores()[0] == pytest.approx(4.0)


def test_eta_solved_for_two_candidates():
    # eta = log 3 makes p = (1/4, 3/4), whose perplexity is 4 / 3^(3/4)
    target = 4 / 3**0.75
    assert solve_eta(np.array([0.0, 1.0]), target) == pytest.approx(math.log(3), rel=1e-10)
    assert solve_eta(np.array([5e8, 5e8 + 1e3]), target) == pytest.approx(math.log(3) / 1e3, rel=1e-8)
    assert solve_eta(np.array([7.0, 7.0]), target) == 0.0
    assert solve_eta(np.array([1.0, 2.0]), 2.0) == 0.0


def test_eta_reaches_its_target_for_scores_over_twelve_orders_of_magnitude():
    scores = 10.0 ** np.linspace(-9, 3, 40)
    for target in (1.5, 4.0, 20.0, 39.0):
        eta = solve_eta(scores, target)
        assert perplexity_of(log_softmax(eta * scores)) == pytest.approx(target, rel=1e-9)


def test_auto_eta_aims_at_half_the_modules_of_an_average_round():
    simulation = modules([10] * 8, delta=0.5, inner_steps=1)
    for step in range(6):
        simulation.step({b: np.full(10, 0.1 * (1 + b + step)) for b in simulation.active})
    assert simulation.rounds[-1].perplexity == pytest.approx(2.0, rel=1e-9)


def test_float_eta_clipped_and_unscored_candidates_at_the_mean():
    simulation = modules([1, 1, 1, 1], delta=0.5, inner_steps=1, eta=1.0, exponent_clip=1.5)
    first, second = simulation.active
    simulation.step({first: np.array([1.0]), second: np.array([2.0])})
    # scores 1 and 4, the others 2.5; all but the first clipped at 1.5
    w = np.full(4, 1.5)
    w[first] = 1.0
    np.testing.assert_allclose(simulation.p, np.exp(w) / np.exp(w).sum(), rtol=1e-14)
    assert np.isnan(simulation.rounds[-1].importance).sum() == 2


def test_longest_waiting_take_half_of_the_budget_at_most():
    # One candidate outweighs all others, so that the weighted part of a draw is known.
    simulation = modules([10] * 10, delta=0.3, inner_steps=1, eta=1e3)
    for step in range(60):
        waited = sorted(simulation.last_round)
        before = simulation.last_round.copy()
        simulation.step({b: np.full(10, 10.0 if b == 0 else 0.1) for b in simulation.active})
        chosen = sorted(before[simulation.active])
        assert len(simulation.active) == 3
        assert chosen[0] == waited[0], step
    late = [r.active for r in simulation.rounds[20:]]
    assert all(0 in active for active in late)


def test_longest_waiting_bound_and_its_absence():
    # Budget 30, of which two candidates of 10 are more than half, but less than all.
    for share, bound in ((0.5, 1), (1.0, 2)):
        simulation = modules([10] * 10, delta=0.3, inner_steps=1, least_recent_share=share)
        assert len(simulation._longest_waiting(list(range(10)), np.linspace(0, 1, 10))) == bound


def test_draw_fills_the_budget_with_what_still_fits():
    simulation = modules([7, 5, 3, 2], delta=0.5, inner_steps=1, least_recent=0, eta=1.0)
    sizes = np.array([7, 5, 3, 2])
    for _ in range(50):
        simulation.step({b: np.ones(sizes[b]) for b in simulation.active})
        room = 8 - sizes[simulation.active].sum()
        assert room >= 0
        assert all(sizes[b] > room for b in range(4) if b not in simulation.active)


def test_first_draws_follow_the_recipe():
    # Equal p: the order is that of the Gumbel numbers alone.
    simulation = modules([1] * 6, delta=0.5, inner_steps=1, least_recent=0, seed=11)
    for number in range(3):
        key = np.array([11, number], dtype=np.uint64)
        gumbel = np.random.Generator(np.random.Philox(key=key)).gumbel(size=6)
        assert simulation.active == sorted(np.argsort(-gumbel)[:3])
        simulation.step({b: np.ones(1) for b in simulation.active})


def test_cyclic_visits_in_order():
    simulation = modules([2, 2, 2, 2, 2], delta=0.4, inner_steps=1, **PRESETS["badam"])
    visited = []
    for _ in range(5):
        visited.append(tuple(simulation.active))
        simulation.step({b: np.ones(2) for b in simulation.active})
    assert visited == [(0, 1), (2, 3), (0, 4), (1, 2), (3, 4)]


def test_window_shows_every_layer_once_a_cycle():
    for cycle in range(4):
        seen = [layer for n in range(3 * cycle, 3 * cycle + 3) for layer in window(7, 3, n, seed=5)]
        assert sorted(seen) == list(range(7))
    assert window(7, 7, 3, seed=5) == set(range(7))


def test_depth_counts_layers_from_the_output_down():
    simulation = modules([1, 1, 1, 1], delta=0.25, inner_steps=1)
    for _ in range(8):
        assert simulation.rounds[-1].backward_depth == 4 - simulation.active[0]
        simulation.step({simulation.active[0]: np.ones(1)})
