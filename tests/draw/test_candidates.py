"""What is known of candidates that training does not reach, and how seldom are they drawn?"""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from misa_kernels import MISA, Candidates, CyclicSampler, Draw, ImportanceSampler, Sampler, UniformSampler, param_groups
from misa_kernels.draw.candidates import hear

SAMPLERS = {
    "importance": ImportanceSampler(),
    "uniform": UniformSampler(),
    "cyclic": CyclicSampler(),
    "layers": ImportanceSampler(granularity="layer"),
    "layers in turn": CyclicSampler(granularity="layer"),
    "window": ImportanceSampler(depth_window=4, max_per_layer=1),
}


# Of which a gradient is asked, or backward would fail in rounds that train nothing of what a batch reaches.
INPUT = torch.ones(2, 8, requires_grad=True)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Towers(nn.Module):
    """An image tower and a text model; a batch without images reaches the second only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vision = nn.ModuleList(Block() for _ in range(6))
        self.text = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x, has_image):
        for block in (*self.vision, *self.text) if has_image else self.text:
            x = block(x)
        return x


def train(model, optimizer, rounds, has_image=False):
    """Train whole rounds of two steps; return the share of what was active in them that lies in the image tower."""
    numel = {True: 0, False: 0}
    for _ in range(rounds):
        for number in optimizer.active:
            module = optimizer.modules[number]
            numel[module.name.startswith("vision")] += module.numel
        for _ in range(2):
            (model(INPUT, has_image) - 1).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return numel[True] / sum(numel.values())


def build(sampler=None, **options):
    model = Towers()
    return model, MISA(param_groups(model), sampler=sampler, **{"lr": 1e-3, "delta": 0.17, "inner_steps": 2} | options)


def forget(optimizer, model, rounds=60):
    """Train on text until the image tower is silent."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no gradient, or zeros only")
        train(model, optimizer, rounds)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_never_has_a_gradient_takes_little_of_the_budget_and_is_drawn_again_once_it_has(name):
    model, optimizer = build(SAMPLERS[name])
    with pytest.warns(UserWarning, match="vision.* had no gradient, or zeros only, in 3 rounds") as caught:
        train(model, optimizer, 100)
    # Said once, with what to do; another one is about a round that trained nothing at all.
    said = [str(warning.message) for warning in caught if "zeros only" in str(warning.message)]
    assert len(said) == 1 and "freeze with requires_grad_(False)" in said[0]
    before = {number: own for number, own in enumerate(optimizer.monitor.table()["last_round"])}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Layers take the whole budget of a round, one round in eight.
        assert 0 < train(model, optimizer, 200) < (0.13 if "layers" in name else 0.1)
        after = optimizer.monitor.table()["last_round"]
        # All of them come up again now and then, or nobody would see that gradients came.
        assert all(after[number] > last for number, last in before.items())
        train(model, optimizer, 60, has_image=True)
        assert not optimizer.state_dict()["param_groups"][0]["unheard"]
        assert train(model, optimizer, 60, has_image=True) > 0.3


def test_where_every_module_has_gradients_all_are_candidates_and_nothing_is_counted():
    model, optimizer = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 40, has_image=True)
    assert optimizer.state_dict()["param_groups"][0]["unheard"] == []
    assert (optimizer.monitor.current.probability > 0).all()


def test_experts_of_a_stacked_weight_to_which_no_token_comes_have_gradients_of_zeros():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4, 4) / 4)
            # That there is a number for each makes experts of them.
            self.router = nn.Linear(4, 8).requires_grad_(False)

        def forward(self, x):
            return x + sum(torch.tanh(x @ self.weight[number]) for number in (0, 5))

    model = nn.Sequential(Experts(), Experts(), Experts())
    optimizer = MISA(param_groups(model), delta=0.2, inner_steps=1)
    drawn = []
    with pytest.warns(UserWarning, match=r"\d\.[1-7].* had no gradient, or zeros only"):
        for _ in range(160):
            drawn.append([optimizer.modules[number].name[-1] in "05" for number in optimizer.active])
            model(torch.ones(2, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    used = np.concatenate(drawn[100:])
    # 6 of 24 experts, where a round has room for 4.8.
    assert used.mean() > 0.9


def test_a_saved_state_knows_what_is_silent_and_goes_on_with_the_same_draws():
    model, optimizer = build()
    forget(optimizer, model, 61)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    unheard = saved[1]["param_groups"][0]["unheard"]
    names = [optimizer.modules[number].name for number in unheard[::2]]
    assert names and all(name.startswith("vision") for name in names)
    other, resumed = build()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    copied, also = copy.deepcopy((model, optimizer))
    sets = []
    for each, its in ((model, optimizer), (other, resumed), (copied, also)):
        forget(its, each, 20)
        sets.append([record.active for record in list(its.monitor.rounds)[-20:]])
    assert sets[0] == sets[1] == sets[2]
    # A state of before knows nothing of it, and begins to count.
    del saved[1]["param_groups"][0]["unheard"]
    resumed.load_state_dict(saved[1])
    assert resumed.state_dict()["param_groups"][0]["unheard"] == []


@pytest.mark.parametrize("unheard", [[24, 3], [0, -1], [0], [0, 3.0], "0 3", [True, 2], None])
def test_a_saved_state_with_other_numbers_is_refused(unheard):
    optimizer = build()[1]
    saved = optimizer.state_dict()
    saved["param_groups"][0]["unheard"] = unheard
    with pytest.raises(ValueError, match="unheard=.*must be numbers below 24 of modules"):
        optimizer.load_state_dict(saved)


def test_rounds_that_say_nothing_do_not_count():
    model, optimizer = build(skip_nonfinite=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(10):
            # All is off, as where a GAN trains its other half.
            model.requires_grad_(False)
            optimizer.step()
            optimizer.step()
    held = optimizer.state_dict()["param_groups"][0]["unheard"]
    # The first round may be one in which all that was drawn was frozen.
    assert max(held[1::2], default=0) <= 1
    model, optimizer = build(skip_nonfinite=True)
    for _ in range(10):
        for step in range(2):
            (model(INPUT, False) * (1 if step else float("nan"))).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.skipped_steps == 10
    assert optimizer.state_dict()["param_groups"][0]["unheard"] == []


def test_other_modules_and_a_cleared_state():
    model, optimizer = build()
    forget(optimizer, model)
    silent = {optimizer.modules[n].name for n in optimizer.state_dict()["param_groups"][0]["unheard"][::2]}
    with optimizer.thawed():
        model.text[0].requires_grad_(False)
        model.vision[0].requires_grad_(False)
    forget(optimizer, model, 1)
    left = {optimizer.modules[n].name for n in optimizer.state_dict()["param_groups"][0]["unheard"][::2]}
    assert left == {name for name in silent if not name.startswith("vision.0")}
    optimizer.state.clear()
    forget(optimizer, model, 1)
    # What is active now has been so for a round.
    assert max(optimizer.state_dict()["param_groups"][0]["unheard"][1::2], default=0) <= 1


def test_a_sampler_of_somebody_else_sees_all_and_may_ask():
    seen = []

    class Own(Sampler):
        def draw(self, candidates, budget, round, seed):
            seen.append((candidates.numel.size, candidates.heard(round).size))
            order = np.roll(np.arange(candidates.numel.size), -round)
            active = np.sort(order[np.cumsum(candidates.numel[order]) <= budget])
            return Draw(active, np.full(order.size, 1 / order.size), float(order.size), 0.0)

    model, optimizer = build(Own())
    forget(optimizer, model)
    assert {size for size, _ in seen} == {24}
    assert [heard for _, heard in seen][0] == 24 and {heard for _, heard in seen[-20:]} <= {12, 13}


def test_silence_and_who_is_let_in_by_hand():
    candidates = Candidates.fresh(np.ones(5, dtype=np.int64), np.arange(5))
    candidates.last_round[:] = [7, 3, 9, 4, 8]
    which = np.array([1, 3])
    for expected in ([], [], [1, 3], []):
        assert hear(candidates, which, np.array([False, False])).tolist() == expected
    assert candidates.unheard.tolist() == [0, 4, 0, 4, 0]
    # Of the two silent ones the later was active in round 4, the other has waited longer.
    assert candidates.heard(11).tolist() == [0, 2, 4]
    assert candidates.heard(12).tolist() == [0, 1, 2, 4]
    hear(candidates, which[:1], np.array([True]))
    assert candidates.heard(5).tolist() == [0, 1, 2, 4]
    # Where nobody is heard, nobody is left out.
    candidates.unheard[:] = 3
    assert candidates.heard(10).tolist() == [0, 1, 2, 3, 4]
