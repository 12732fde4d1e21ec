"""Does each sampler draw from the distribution that the specification gives it, within the budget?"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import softmax

from misa_kernels.draw.candidates import Candidates, fold, scores
from misa_kernels.draw.rehearsal import costliest
from misa_kernels.draw.sampler import CyclicSampler, ImportanceSampler, UniformSampler

SAMPLERS = [ImportanceSampler(), UniformSampler(), CyclicSampler()]
NAMES = ["importance", "uniform", "cyclic"]
# Tests of frequencies run on fixed seeds; a correct sampler fails one seed in a thousand.
SIGNIFICANCE = 1e-3
seeds = st.integers(0, 2**64 - 1)


def make(numel, *, score=None, layer=None, last_round=None) -> Candidates:
    """Candidates with these corrected scores: after 1000 folds the correction is 1 to the last bit."""
    size = len(numel)
    return Candidates(
        numel=np.array(numel, dtype=np.int64),
        layer=np.arange(size) if layer is None else np.array(layer),
        importance=np.zeros(size) if score is None else np.array(score, dtype=np.float64),
        count=np.full(size, 0 if score is None else 1000),
        last_round=np.full(size, -1) if last_round is None else np.array(last_round),
    )


def run(sampler, candidates: Candidates, budget: int, rounds: int, seed: int = 0) -> list[list[int]]:
    """Active sets of consecutive rounds, with last_round kept as the optimizer keeps it."""
    sets = []
    for number in range(rounds):
        active = sampler.draw(candidates, budget, number, seed).active
        candidates.last_round[active] = number
        sets.append(active.tolist())
    return sets


def assert_frequencies(counts, probabilities) -> None:
    """Chi-square test of counts against probabilities; outcomes expected less than five times are pooled."""
    counts, expected = np.array(counts, float), np.array(probabilities, float) * sum(counts)
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    possible = expected > 0
    assert not counts[~possible].any(), "an outcome of probability 0 came up"
    pvalue = stats.chisquare(counts[possible], expected[possible]).pvalue
    assert pvalue > SIGNIFICANCE, f"p-value {pvalue:.1e} of {counts} against {expected}"


# The weighted draw


def in_order(weight, number: int, seed: int) -> list[int]:
    """Draw all, one by one, each with its share of the weight that is left, by the round's own random numbers.

    Descending weights times exponentials of Gumbel's are such draws (Yellott 1977). A sampler that takes other ones in
    one round of many is found at once, where frequencies find it in many rounds.
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, number], dtype=np.uint64)))
    return np.argsort(-(np.log(weight) + rng.gumbel(size=len(weight)))).tolist()


def what_fits(order: list[int], numel: list[int], budget: int, layer=None, quota=None) -> tuple[int, ...]:
    """Take in this order what leaves the budget, and the quota of its layer, unbroken."""
    taken: list[int] = []
    for b in order:
        full = quota is not None and [layer[j] for j in taken].count(layer[b]) == quota
        if sum(numel[j] for j in taken) + numel[b] <= budget and not full:
            taken.append(b)
    return tuple(sorted(taken))


def test_first_candidate_taken_follows_p():
    p = np.array([0.4, 0.25, 0.17, 0.1, 0.05, 0.03])
    candidates = make([7] * 6, score=np.log(p / p.min()))
    sampler = ImportanceSampler(eta=1.0, least_recent=0)
    first = [sampler.draw(candidates, 7, number, seed=1).active.item() for number in range(10_000)]
    assert first == [in_order(p, number, seed=1)[0] for number in range(10_000)]
    assert_frequencies(np.bincount(first, minlength=6), p)


def set_probabilities(numel: list[int], weight: list[float], room: int) -> dict[tuple[int, ...], float]:
    """Every possible set: draw one that fits, with its share of the weight of those that fit, and go on."""
    found: Counter[tuple[int, ...]] = Counter()

    def go_on(taken: tuple[int, ...], room: int, probability: float) -> None:
        fitting = [b for b in range(len(numel)) if b not in taken and numel[b] <= room]
        if not fitting:
            found[tuple(sorted(taken))] += probability
        for b in fitting:
            share = weight[b] / sum(weight[j] for j in fitting)
            go_on((*taken, b), room - numel[b], probability * share)

    go_on((), room, 1.0)
    return found


@pytest.mark.parametrize(
    ("sampler", "numel", "weight", "budget"),
    [
        (ImportanceSampler(eta=2.0, least_recent=0), [5, 3, 2, 4, 1, 7], [8, 4, 4, 2, 1, 1], 9),
        (ImportanceSampler(eta=2.0, least_recent=0), [4, 4, 9, 2], [1, 1, 9, 3], 10),
        (UniformSampler(), [5, 3, 2, 4, 1, 7], [1] * 6, 9),
    ],
)
def test_sets_follow_sequential_draws_that_skip_what_does_not_fit(sampler, numel, weight, budget):
    candidates = make(numel, score=np.log(weight) / 2)
    expected = set_probabilities(numel, weight, budget)
    sets = [tuple(sampler.draw(candidates, budget, number, seed=2).active.tolist()) for number in range(4000)]
    assert sets == [what_fits(in_order(weight, number, seed=2), numel, budget) for number in range(4000)]
    draws = Counter(sets)
    assert draws.keys() <= expected.keys()
    assert_frequencies([draws[active] for active in expected], list(expected.values()))


def test_random_numbers_are_those_of_seed_and_round():
    # A resumed run must see the same numbers in later versions, so their source is part of the format.
    gumbel = np.random.Generator(np.random.Philox(key=np.array([9, 4], dtype=np.uint64))).gumbel(size=50)
    active = UniformSampler().draw(make([1] * 50), 20, round=4, seed=9).active
    assert active.tolist() == sorted(np.argsort(gumbel)[-20:])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=NAMES)
def test_draw_depends_on_its_arguments_alone(sampler):
    candidates = make(range(1, 41), score=np.arange(40.0), last_round=np.arange(40) % 7)
    before = dataclasses.asdict(candidates)
    alone = sampler.draw(candidates, 200, round=5, seed=3)
    for number in (0, 5, 7, 4):
        sampler.draw(candidates, 150, number, seed=number)
    again = sampler.draw(candidates, 200, round=5, seed=3)
    assert again.active.tolist() == alone.active.tolist()
    assert again.probability.tolist() == alone.probability.tolist()
    assert (again.eta, again.perplexity) == (alone.eta, alone.perplexity)
    for field, value in before.items():
        np.testing.assert_array_equal(getattr(candidates, field), value)


@pytest.mark.parametrize("sampler", [ImportanceSampler(), UniformSampler()], ids=["importance", "uniform"])
def test_seeds_and_rounds_give_different_draws(sampler):
    candidates = make([1] * 60, score=np.ones(60))
    keys = [(number, seed) for number in range(20) for seed in (0, 1, 2**64 - 1)]
    sets = {tuple(sampler.draw(candidates, 20, number, seed).active.tolist()) for number, seed in keys}
    assert len(sets) == len(keys)


# The budget

sizes = st.lists(st.one_of(st.integers(1, 12), st.integers(1, 10**12)), min_size=1, max_size=40)


@given(numel=sizes, data=st.data(), seed=seeds, sampler=st.sampled_from(SAMPLERS))
def test_budget_holds_and_nothing_that_fits_is_left_out(numel, data, seed, sampler):
    budget = data.draw(st.integers(1, sum(numel) + 1), label="budget")
    last_round = data.draw(st.lists(st.integers(-1, 5), min_size=len(numel), max_size=len(numel)))
    candidates = make(numel, score=np.linspace(0, 1, len(numel)), last_round=last_round)
    draw = sampler.draw(candidates, budget, round=6, seed=seed)
    assert draw.active.dtype == np.int64
    active = draw.active.tolist()
    assert active == sorted(set(active))
    room = budget - sum(numel[b] for b in active)
    assert room >= 0
    if not isinstance(sampler, CyclicSampler):
        assert all(size > room for b, size in enumerate(numel) if b not in active)
    assert draw.probability.shape == (len(numel),)
    assert math.fsum(draw.probability) == pytest.approx(1, rel=1e-12)


# eta="auto"


def target(numel, score, budget: int, perplexity: float) -> float:
    """clip(perplexity K, k, E) with K = clip(budget / mean numel, 1, E), in rational arithmetic."""
    size = len(numel)
    fitting = min(max(Fraction(budget * size, sum(numel)), Fraction(1)), Fraction(size))
    return min(max(float(perplexity * fitting), list(score).count(max(score))), size)


# Millionths of a decade, so that two scores are equal or clearly different.
decades = st.integers(-12_000_000, 0).map(lambda millionths: 10 ** (millionths / 1e6))


@given(
    score=st.lists(st.one_of(decades, st.sampled_from([0.0, 1e-12, 1e-6, 1.0])), min_size=1, max_size=80),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
    perplexity=st.floats(0.01, 3),
    data=st.data(),
)
@example(score=[1.0], scale=1.0, perplexity=0.5, data=None)
@example(score=[0.3] * 7, scale=1.0, perplexity=0.1, data=None)
@example(score=[0.0] * 7, scale=1.0, perplexity=0.1, data=None)
@example(score=[1.0] * 5 + [1e-9, 0.0], scale=1.0, perplexity=0.1, data=None)
@example(score=[0.0, 1e-12], scale=1.0, perplexity=0.5, data=None)
@example(score=list(np.logspace(-12, 0, 16)), scale=1.0, perplexity=0.5, data=None)
@example(score=list(np.logspace(-12, 0, 16)), scale=1.0, perplexity=0.99, data=None)
def test_auto_eta_meets_the_perplexity(score, scale, perplexity, data):
    score = np.array(score) * scale
    numel = [3 + b % 5 for b in range(len(score))]
    budget = 10 * len(score) if data is None else data.draw(st.integers(1, 8 * len(score)), label="budget")
    sampler = ImportanceSampler(perplexity=perplexity)
    draw = sampler.draw(make(numel, score=score), budget, round=0, seed=0)
    expected = target(numel, score, budget, perplexity)
    assert math.exp(stats.entropy(draw.probability)) == pytest.approx(expected, rel=1e-2)
    assert draw.perplexity == pytest.approx(math.exp(stats.entropy(draw.probability)), rel=1e-9)
    np.testing.assert_allclose(draw.probability, softmax(draw.eta * score), rtol=1e-9, atol=1e-200)
    if expected == len(score):
        assert draw.eta == 0.0


@pytest.mark.parametrize("size", [1, 2, 16, 17, 400])
def test_equal_scores_are_drawn_uniformly(size):
    draw = ImportanceSampler().draw(make([1] * size, score=[0.1] * size), size, round=0, seed=0)
    assert draw.eta == 0.0
    np.testing.assert_allclose(draw.probability, 1 / size, rtol=1e-12)


def test_rounding_ranks_nothing():
    # The same score folded once, twice, ... and the mean of these differ in the last bits.
    candidates = make([1] * 20)
    for number in range(10):
        which = np.arange(number + 1)
        fold(candidates, which, np.full(which.size, 0.1), np.full(which.size, True), beta=0.8)
    s = scores(candidates, 0.8, "sum")
    assert len(set(s[:10])) > 1
    draw = ImportanceSampler().draw(candidates, 4, round=0, seed=0)
    assert draw.eta == 0.0 and draw.perplexity == pytest.approx(20)


@pytest.mark.parametrize("options", [{"eta": 2.0}, {"eta": 2.0, "importance_norm": "norm"}, {}])
def test_unscored_candidates_count_as_the_mean_score(options):
    sampler = ImportanceSampler(**options)
    some = make([1, 2, 3, 4, 5], score=[1.0, 0.0, 3.0, 0.5, 0.0])
    some.count[[1, 4]] = 0
    mean = math.sqrt((1 + 9 + 0.25) / 3) if "importance_norm" in options else 4.5 / 3
    all_of_them = make([1, 2, 3, 4, 5], score=[1.0, mean, 3.0, 0.5, mean])
    got, expected = (sampler.draw(c, 6, round=0, seed=0) for c in (some, all_of_them))
    np.testing.assert_allclose(got.probability, expected.probability, rtol=1e-9)


def test_unscored_candidates_count_as_the_mean_over_all_windows():
    candidates = make([1] * 4, score=[5.0, 0.0, 1.0, 0.0])
    candidates.count[[1, 3]] = 0
    sampler = ImportanceSampler(eta=1.0, depth_window=2)
    for number in range(2):
        p = sampler.draw(candidates, 2, number, seed=0).probability
        expected = softmax([5.0, 3.0]) if p[0] else softmax([1.0, 3.0])
        np.testing.assert_allclose(p[p > 0], expected, rtol=1e-12)


def test_without_any_score_p_is_uniform():
    for eta in ("auto", 500.0):
        p = ImportanceSampler(eta=eta).draw(make([3, 1, 4, 1]), 5, round=0, seed=0).probability
        np.testing.assert_allclose(p, 0.25, rtol=1e-12)


# A number as eta


@pytest.mark.parametrize("eta", [0.0, 1e-3, 1.0, 37.5])
def test_number_as_eta_is_the_formula_of_the_paper(eta):
    score = [0.0, 0.3, 1.7, 0.3, 9.0]
    weight = [math.exp(eta * s) for s in score]
    draw = ImportanceSampler(eta=eta).draw(make([2] * 5, score=score), 4, round=0, seed=0)
    np.testing.assert_allclose(draw.probability, np.array(weight) / math.fsum(weight), rtol=1e-12)
    assert draw.eta == eta
    assert draw.perplexity == pytest.approx(math.exp(stats.entropy(weight)), rel=1e-12)


@pytest.mark.parametrize("eta", [1.0, 0.2])
def test_formula_of_the_authors_code(eta):
    norm = [0.5, 1.0, 2.0, 3.0, 50.0]
    weight = [math.exp(min(5.0, eta * g**2)) for g in norm]
    sampler = ImportanceSampler(eta=eta, importance_norm="norm", exponent_clip=5.0)
    draw = sampler.draw(make([2] * 5, score=norm), 4, round=0, seed=0)
    np.testing.assert_allclose(draw.probability, np.array(weight) / math.fsum(weight), rtol=1e-12)


def test_underflow_of_p_does_not_stop_the_draw():
    score = [2.0, 5.0, 1.0, 4.0, 3.0]
    sampler = ImportanceSampler(eta=1e6, least_recent=0)
    for number in range(50):
        draw = sampler.draw(make([1] * 5, score=score), 3, number, seed=0)
        assert draw.probability.tolist() == [0, 1, 0, 0, 0]
        assert draw.active.tolist() == [1, 3, 4]


# Importance


@given(
    beta=st.floats(0, 0.99),
    values=st.lists(st.tuples(st.floats(0, 1e12), st.booleans()), min_size=1, max_size=30),
)
def test_fold_is_a_corrected_running_mean(beta, values):
    candidates = make([1, 1, 1])
    for value, applied in values:
        left_out = fold(candidates, np.array([0, 2]), np.array([value, 1.0]), np.array([applied, True]), beta)
        assert left_out == 0
    folded = [value for value, applied in values if applied]
    # The newest value weighs 1, the one before beta, ...; dividing by their sum is what the correction does.
    weights = [beta**age for age in reversed(range(len(folded)))]
    expected = math.fsum(w * v for w, v in zip(weights, folded, strict=True)) / (math.fsum(weights) or 1)
    s = scores(candidates, beta, "sum")
    assert candidates.count.tolist() == [len(folded), 0, len(values)]
    assert candidates.importance[1] == 0 and math.isnan(s[1])
    assert s[2] == pytest.approx(1, rel=1e-11)
    if folded:
        assert s[0] == pytest.approx(expected, rel=1e-11)
        assert candidates.importance[0] == pytest.approx(expected * (1 - beta ** len(folded)), rel=1e-11)
        assert scores(candidates, beta, "norm")[0] == pytest.approx(expected**2, rel=1e-11)
    else:
        assert candidates.importance[0] == 0 and math.isnan(s[0])


def test_nonfinite_scores_are_left_out_and_counted():
    candidates = make([1] * 5, score=[1.0, 2.0, 3.0, 4.0, 5.0])
    value = np.array([math.nan, math.inf, 8.0, math.nan])
    left_out = fold(candidates, np.array([0, 1, 3, 4]), value, np.array([True, True, True, False]), beta=0.5)
    assert left_out == 2
    assert candidates.importance.tolist() == [1.0, 2.0, 3.0, 6.0, 5.0]
    assert candidates.count.tolist() == [1000, 1000, 1000, 1001, 1000]


# Which come first

# With this eta the weighted draw takes the highest scores, so that the set shows what came before it.
GREEDY = 1e6


@pytest.mark.parametrize(
    ("least_recent", "share", "oldest"), [(0, 0.5, 0), (2, 0.5, 2), (9, 0.5, 4), (9, 1.0, 8), (9, 0.1, 1)]
)
def test_longest_waiting_enter_up_to_their_share(least_recent, share, oldest):
    candidates = make([1] * 20, score=range(20), last_round=[*range(9), *[50] * 11])
    sampler = ImportanceSampler(eta=GREEDY, least_recent=least_recent, least_recent_share=share)
    active = sampler.draw(candidates, 8, round=51, seed=0).active.tolist()
    assert active == [*range(oldest), *range(20 - (8 - oldest), 20)]


def test_longest_waiting_of_more_than_half_the_budget_enters_alone():
    candidates = make([7, 1, 1, 1], score=[0, 0, 2, 1], last_round=[0, 1, 2, 3])
    active = ImportanceSampler(eta=GREEDY).draw(candidates, 8, round=4, seed=0).active
    assert active.tolist() == [0, 2]


def test_longest_waiting_that_does_not_fit_lets_the_next_one_in():
    candidates = make([2, 3, 2, 1, 1, 1, 1], score=[0, 0, 0, 1, 2, 3, 4], last_round=[0, 1, 2, 3, 3, 3, 3])
    active = ImportanceSampler(eta=GREEDY, least_recent=3).draw(candidates, 8, round=4, seed=0).active
    assert active.tolist() == [0, 2, 3, 4, 5, 6]


def test_longest_waiting_is_chosen_at_random_among_equals():
    candidates = make([1] * 5, score=[9, 9, 1, 1, 1], last_round=[3, 3, 2, 2, 2])
    sampler = ImportanceSampler(eta=GREEDY, least_recent=1)
    entered = [sampler.draw(candidates, 1, number, seed=0).active.item() for number in range(3000)]
    assert_frequencies(np.bincount(entered, minlength=5), [0, 0, 1 / 3, 1 / 3, 1 / 3])


@pytest.mark.parametrize("least_recent", [1, 2])
def test_no_candidate_waits_longer_than_there_are_candidates(least_recent):
    numel = [1 + b % 4 for b in range(15)]
    sampler = ImportanceSampler(eta=GREEDY, least_recent=least_recent)
    sets = run(sampler, make(numel, score=range(15)), budget=6, rounds=120)
    for b in range(15):
        visits = [-1, *(number for number, active in enumerate(sets) if b in active), 120]
        assert max(np.diff(visits)) <= 15
    # Importance alone would leave some out for ever.
    alone = run(dataclasses.replace(sampler, least_recent=0), make(numel, score=range(15)), 6, rounds=120)
    assert 0 not in itertools.chain(*alone)


# Depth windows


@pytest.mark.parametrize("sampler", [ImportanceSampler, UniformSampler])
@pytest.mark.parametrize(("layers", "width"), [(1, 1), (7, 3), (8, 4), (8, 1), (12, 5), (5, 5), (5, 9)])
def test_window_shows_every_layer_once_a_cycle(sampler, layers, width):
    candidates = make([1] * (3 * layers), layer=np.arange(3 * layers) % layers)
    windows = math.ceil(layers / width)
    for cycle in range(5):
        seen: list[list[int]] = []
        for number in range(cycle * windows, (cycle + 1) * windows):
            draw = sampler(depth_window=width).draw(candidates, 2, number, seed=4)
            inside = np.unique(candidates.layer[draw.probability > 0]).tolist()
            assert inside == list(range(inside[0], inside[-1] + 1))
            assert set(candidates.layer[draw.active]) <= set(inside)
            assert np.count_nonzero(draw.probability) == 3 * len(inside)
            seen.append(inside)
        assert sorted(itertools.chain(*seen)) == list(range(layers))
        lengths = [len(inside) for inside in seen]
        assert max(lengths) <= width and max(lengths) - min(lengths) <= 1


def test_order_of_the_windows_is_random_in_each_cycle():
    candidates = make([1] * 4)
    sampler = UniformSampler(depth_window=1)
    layer = [sampler.draw(candidates, 1, number, seed=0).active.item() for number in range(4 * 2400)]
    orders = Counter(map(tuple, np.reshape(layer, (-1, 4)).tolist()))
    every = list(itertools.permutations(range(4)))
    assert orders.keys() <= set(every)
    assert_frequencies([orders[order] for order in every], [1 / 24] * 24)


def test_window_skips_layers_without_candidates():
    candidates = make([1] * 4, layer=[0, 5, 6, 90])
    drawn = [UniformSampler(depth_window=2).draw(candidates, 2, number, seed=0).active for number in (0, 1)]
    assert sorted(active.tolist() for active in drawn) == [[0, 1], [2, 3]]


def test_window_of_all_layers_changes_nothing():
    candidates = make([1 + b % 3 for b in range(30)], score=range(30), layer=np.arange(30) // 5)
    for number in range(20):
        without, wide = (
            ImportanceSampler(depth_window=width).draw(candidates, 12, number, seed=6) for width in (None, 6)
        )
        assert wide.active.tolist() == without.active.tolist()


def test_window_holds_for_the_longest_waiting():
    candidates = make([1] * 8, score=range(8), layer=np.arange(8) // 2)
    sampler = ImportanceSampler(depth_window=1, least_recent=8, least_recent_share=1.0)
    sets = [sampler.draw(candidates, 8, number, seed=0).active.tolist() for number in range(4)]
    assert sorted(sets) == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("width", [1, 2, 50])
def test_window_needs_the_layer_of_every_candidate(width):
    candidates = make([1] * 4, layer=[0, -1, 1, -1])
    message = rf"depth_window={width} must be None .* 2 of 4 .* param_groups\(model\)"
    for sampler in (ImportanceSampler(depth_window=width), UniformSampler(depth_window=width)):
        with pytest.raises(ValueError, match=message):
            sampler.draw(candidates, 2, round=0, seed=0)
    with pytest.raises(ValueError, match=message):
        costliest(candidates, np.ones(4, dtype=np.int64), 2, width)


# A quota a layer

QUOTA_SAMPLERS = [
    ImportanceSampler,
    UniformSampler,
    lambda **options: ImportanceSampler(least_recent=9, least_recent_share=1.0, **options),
]


@given(numel=sizes, data=st.data(), seed=seeds, sampler=st.sampled_from(QUOTA_SAMPLERS), quota=st.integers(1, 3))
def test_quota_and_budget_hold_and_nothing_that_fits_both_is_left_out(numel, data, seed, sampler, quota):
    budget = data.draw(st.integers(max(numel), sum(numel) + 1), label="budget")
    last_round = data.draw(st.lists(st.integers(-1, 5), min_size=len(numel), max_size=len(numel)))
    layer = data.draw(st.lists(st.integers(0, 5), min_size=len(numel), max_size=len(numel)))
    candidates = make(numel, score=np.linspace(0, 1, len(numel)), layer=layer, last_round=last_round)
    draw = sampler(max_per_layer=quota).draw(candidates, budget, round=6, seed=seed)
    active = draw.active.tolist()
    assert active == sorted(set(active))
    room = budget - sum(numel[b] for b in active)
    of_layer = Counter(layer[b] for b in active)
    assert room >= 0
    assert max(of_layer.values()) <= quota
    assert all(numel[b] > room or of_layer[layer[b]] == quota for b in range(len(numel)) if b not in active)


@pytest.mark.parametrize("weight", [[8, 4, 4, 2, 1, 1], [1] * 6])
@pytest.mark.parametrize("quota", [1, 2])
def test_sets_follow_sequential_draws_that_skip_full_layers(weight, quota):
    numel, layer, budget = [5, 3, 2, 4, 1, 7], [0, 0, 0, 1, 1, 2], 12
    expected: Counter[tuple[int, ...]] = Counter()
    # In any order of the candidates, drawn without replacement: what does not fit then is passed over for good.
    for order in itertools.permutations(range(6)):
        probability = math.prod(weight[b] / sum(weight[j] for j in order[i:]) for i, b in enumerate(order))
        expected[what_fits(order, numel, budget, layer, quota)] += probability
    candidates = make(numel, score=np.log(weight), layer=layer)
    if len(set(weight)) == 1:
        sampler = UniformSampler(max_per_layer=quota)
    else:
        sampler = ImportanceSampler(eta=1.0, least_recent=0, max_per_layer=quota)
    sets = [tuple(sampler.draw(candidates, budget, number, seed=2).active.tolist()) for number in range(4000)]
    assert sets == [what_fits(in_order(weight, number, seed=2), numel, budget, layer, quota) for number in range(4000)]
    draws = Counter(sets)
    assert draws.keys() <= expected.keys()
    assert_frequencies([draws[active] for active in expected], list(expected.values()))


def test_quota_that_never_binds_changes_nothing():
    candidates = make([1 + b % 3 for b in range(30)], score=range(30), layer=np.arange(30) // 5, last_round=range(30))
    for sampler in QUOTA_SAMPLERS:
        for number in range(20):
            without, wide = (sampler(max_per_layer=quota).draw(candidates, 12, number, seed=6) for quota in (None, 5))
            assert wide.active.tolist() == without.active.tolist()
            assert wide.probability.tolist() == without.probability.tolist()


@pytest.mark.parametrize(("quota", "budget", "fitting"), [(1, 40, 3), (2, 40, 5), (1, 2, 2), (None, 40, 9)])
def test_auto_eta_counts_what_the_quota_admits(quota, budget, fitting):
    # Layers of 4, 4 and 1: with quota 1 a round has at most 3, with quota 2 at most 5, whatever the budget.
    candidates = make([1] * 9, score=np.logspace(-3, 0, 9), layer=[0, 0, 0, 0, 1, 1, 1, 1, 2])
    draw = ImportanceSampler(perplexity=0.8, max_per_layer=quota).draw(candidates, budget, round=0, seed=0)
    assert draw.perplexity == pytest.approx(0.8 * fitting, rel=1e-3)


def test_quota_holds_inside_a_window():
    candidates = make([1] * 12, layer=np.arange(12) // 3)
    for number in range(20):
        active = UniformSampler(max_per_layer=1, depth_window=2).draw(candidates, 12, number, seed=0).active
        assert sorted(candidates.layer[active]) in ([0, 1], [2, 3])


def test_every_candidate_gets_its_turn_under_a_quota():
    # The scores would never let the first five of a layer in.
    candidates = make([1] * 24, score=[0, 0, 0, 0, 0, 9] * 4, layer=np.arange(24) // 6)
    sets = run(ImportanceSampler(max_per_layer=1), candidates, budget=4, rounds=30)
    assert set().union(*sets) == set(range(24))


def test_quota_needs_the_layer_of_every_candidate():
    candidates = make([1] * 4, layer=[0, -1, 1, -1])
    message = r"max_per_layer=1 must be None .* 2 of 4 .* param_groups\(model\)"
    for sampler in (ImportanceSampler(max_per_layer=1), UniformSampler(max_per_layer=1)):
        with pytest.raises(ValueError, match=message):
            sampler.draw(candidates, 2, round=0, seed=0)
    with pytest.raises(ValueError, match=message):
        costliest(candidates, np.ones(4, dtype=np.int64), 2, None, 1)


@pytest.mark.parametrize("sampler", [ImportanceSampler, UniformSampler])
def test_quota_of_whole_layers_is_refused(sampler):
    with pytest.raises(ValueError, match=r"max_per_layer=2 must be None with granularity='layer'.*leave it out"):
        sampler(max_per_layer=2, granularity="layer")


# In turn


def test_cyclic_takes_its_turn():
    sets = run(CyclicSampler(), make([3] * 6), budget=7, rounds=7)
    assert sets == [[0, 1], [2, 3], [4, 5]] * 2 + [[0, 1]]
    assert run(CyclicSampler(), make([3] * 4), budget=5, rounds=9) == [[b] for b in [0, 1, 2, 3] * 2 + [0]]


def test_cyclic_stops_at_the_first_that_does_not_fit():
    # 4 would still fit beside 0 and 1, but it is not its turn.
    assert run(CyclicSampler(), make([3, 1, 4, 4, 1]), budget=5, rounds=3) == [[0, 1], [2], [3, 4]]


@settings(max_examples=50)
@given(numel=st.lists(st.integers(1, 9), min_size=1, max_size=12), extra=st.integers(0, 9))
def test_cyclic_always_serves_the_longest_waiting(numel, extra):
    candidates = make(numel)
    for number in range(3 * len(numel)):
        draw = CyclicSampler().draw(candidates, max(numel) + extra, number, seed=0)
        assert candidates.last_round[draw.active].min() == candidates.last_round.min()
        assert draw.eta == 0.0 and draw.perplexity == len(numel)
        np.testing.assert_allclose(draw.probability, 1 / len(numel))
        candidates.last_round[draw.active] = number


# Speed


@pytest.mark.parametrize("sampler", SAMPLERS, ids=NAMES)
def test_draw_of_twenty_thousand_is_fast(sampler):
    def seconds(size: int) -> float:
        rng = np.random.default_rng(0)
        candidates = make(rng.integers(1, 1000, size), score=10 ** rng.uniform(-12, 0, size))
        candidates.last_round[: size // 2] = 0
        budget = int(candidates.numel.sum()) // 30
        times = []
        for number in range(5):
            start = time.process_time()
            sampler.draw(candidates, budget, number, seed=0)
            times.append(time.process_time() - start)
        return min(times)

    few, many = seconds(20_000), seconds(160_000)
    assert few < 0.05
    # Eight times as many: 8 to 10 for n log n, 64 for n squared.
    assert many < 30 * max(few, 1e-3)


# The costliest set


def kept_width(active, layer, width) -> int:
    """Numbers a token that the active ones keep for their weight gradients: one input a (layer, width)."""
    return sum(w for _, w in {(layer[b], width[b]) for b in active})


@st.composite
def small_models(draw):
    size = draw(st.integers(1, 8))
    numel = draw(st.lists(st.integers(1, 12), min_size=size, max_size=size))
    layer = sorted(draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)))
    width = draw(st.lists(st.integers(1, 5), min_size=size, max_size=size))
    return numel, layer, width, draw(st.integers(max(numel), sum(numel) + 1))


@given(model=small_models(), window=st.sampled_from([None, 1, 2, 3]))
def test_costliest_is_admissible_deep_and_near_the_widest(model, window):
    numel, layer, width, budget = model
    found = costliest(make(numel, layer=layer), np.array(width), budget, window)
    assert found.dtype == np.int64
    active = found.tolist()
    assert active == sorted(set(active))
    room = budget - sum(numel[b] for b in active)
    assert room >= 0
    present = sorted(set(layer))
    inside = present if window is None else np.array_split(present, -(-len(present) // window))[0].tolist()
    eligible = [b for b in range(len(numel)) if layer[b] in inside]
    assert set(active) <= set(eligible)
    assert all(numel[b] > room for b in eligible if b not in active)
    assert min(layer[b] for b in active) == present[0]
    deep = (
        chosen
        for n in range(1, len(eligible) + 1)
        for chosen in itertools.combinations(eligible, n)
        if sum(numel[b] for b in chosen) <= budget and layer[chosen[0]] == present[0]
    )
    widest = max(kept_width(chosen, layer, width) for chosen in deep)
    assert kept_width(active, layer, width) > widest - 2 * max(width)


@pytest.mark.parametrize("delta", [0.03, 0.125, 0.25])
@pytest.mark.parametrize("window", [None, 8])
def test_costliest_keeps_more_than_any_set_drawn_from_a_transformer(delta, window):
    # q, k, v, o, gate, up, down of 16 layers, with two key heads for eight query heads.
    shapes = [(64, 64), (16, 64), (16, 64), (64, 64), (172, 64), (172, 64), (64, 172)] * 16
    numel = [rows * columns for rows, columns in shapes]
    width = [columns for _, columns in shapes]
    layer = np.arange(len(shapes)) // 7
    candidates = make(numel, layer=layer)
    budget = math.floor(delta * sum(numel))
    active = costliest(candidates, np.array(width), budget, window).tolist()
    kept = kept_width(active, layer, width)
    drawn = [
        UniformSampler(depth_window=window).draw(candidates, budget, number, seed=0).active for number in range(1000)
    ]
    assert layer[active].min() == 0
    assert kept >= max(kept_width(other, layer, width) for other in drawn)
    # The rest of the budget is used up, too: less is left than the smallest module has.
    assert budget - sum(numel[b] for b in active) < min(numel)


@given(model=small_models(), quota=st.integers(1, 3))
def test_costliest_under_a_quota_is_admissible_deep_and_near_the_widest(model, quota):
    numel, layer, width, budget = model
    active = costliest(make(numel, layer=layer), np.array(width), budget, None, quota).tolist()
    assert active == sorted(set(active))
    assert sum(numel[b] for b in active) <= budget
    assert max(Counter(layer[b] for b in active).values()) <= quota
    assert min(layer[b] for b in active) == layer[0]
    admissible = (
        chosen
        for n in range(1, len(numel) + 1)
        for chosen in itertools.combinations(range(len(numel)), n)
        if sum(numel[b] for b in chosen) <= budget
        and layer[chosen[0]] == layer[0]
        and max(Counter(layer[b] for b in chosen).values()) <= quota
    )
    widest = max(kept_width(chosen, layer, width) for chosen in admissible)
    assert kept_width(active, layer, width) > widest - 2 * max(width)


@pytest.mark.parametrize(("budget", "expected"), [(9, [1, 4]), (21, [2, 4]), (22, [2, 3]), (31, [2, 5])])
def test_costliest_spends_what_a_quota_leaves_over(budget, expected):
    # Per parameter 1 is the widest of layer 0 and 4 of layer 1, but 2 and 5 keep more where they fit; 3 is larger.
    candidates = make([6, 4, 16, 6, 4, 15], layer=[0, 0, 0, 1, 1, 1])
    assert costliest(candidates, np.array([4, 4, 9, 4, 4, 9]), budget, None, 1).tolist() == expected


def test_costliest_counts_a_shared_input_once():
    # Layer 0: q, k, v share the input of width 8, down has its own. Two of the sharing three bring nothing new.
    candidates = make([8, 8, 8, 24, 16], layer=[0, 0, 0, 0, 1])
    active = costliest(candidates, np.array([8, 8, 8, 16, 8]), 32, None)
    assert active.tolist() == [0, 3]


def test_costliest_shares_nothing_in_unknown_layers():
    numel, width = [4, 4, 8], np.array([8, 8, 8])
    assert costliest(make(numel, layer=[0, 0, 0]), width, 12, None).tolist() == [0, 2]
    assert costliest(make(numel, layer=[-1, -1, -1]), width, 12, None).tolist() == [0, 1]


# Options

BAD = {
    "eta": [-1.0, math.nan, math.inf, "fast", None, True],
    "perplexity": [0, -0.5, math.nan, math.inf, "0.5", None, True],
    "importance_beta": [-0.1, 1, 1.5, math.nan, None, False],
    "importance_norm": ["mean", "max", None, 2],
    "exponent_clip": [0, -5, math.inf, math.nan, "5", True],
    "least_recent": [-1, 1.0, "2", None, True],
    "least_recent_share": [0, 1.01, -0.5, math.nan, None, True],
    "depth_window": [0, -3, 2.0, "4", True],
    "max_per_layer": [0, -3, 2.0, "4", True],
    "granularity": ["block", None, 1],
    "oversized": ["skip", None, True],
}


@pytest.mark.parametrize("sampler", [ImportanceSampler, UniformSampler, CyclicSampler])
@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD for value in BAD[name]])
def test_bad_option_raises_with_name_value_and_rule(sampler, name, value):
    if name not in {field.name for field in dataclasses.fields(sampler)}:
        with pytest.raises(TypeError, match=name):
            sampler(**{name: value})
        return
    options = {"eta": 1.0} if name == "exponent_clip" else {}
    with pytest.raises(ValueError) as raised:
        sampler(**options, **{name: value})
    assert str(raised.value).startswith(f"{name}={value!r} must be ")


def test_exponent_clip_needs_a_number_as_eta():
    with pytest.raises(ValueError, match=r"exponent_clip=5.0 must be None with eta='auto'.*give eta a "):
        ImportanceSampler(exponent_clip=5.0)


def test_ends_of_the_ranges_are_accepted():
    ImportanceSampler(eta=0, importance_beta=0, least_recent=0, least_recent_share=1, depth_window=1)
    ImportanceSampler(eta=np.float32(2), exponent_clip=np.float64(5), least_recent=np.int64(1), perplexity=3)
    UniformSampler(depth_window=None, granularity="layer", oversized="split")


@pytest.mark.parametrize("sampler", [ImportanceSampler, UniformSampler, CyclicSampler])
def test_options_go_by_name_and_stay(sampler):
    with pytest.raises(TypeError):
        sampler("module")
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler().granularity = "layer"
    assert sampler() == sampler()
    assert (sampler().importance_beta, sampler().importance_norm) == (0.8, "sum")


def test_a_subclass_may_have_options_of_its_own():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Cooled(ImportanceSampler):
        temperature: float = 2.0

    assert Cooled(perplexity=0.25).temperature == 2.0
    with pytest.raises(ValueError, match="perplexity=-1 must be"):
        Cooled(perplexity=-1)
