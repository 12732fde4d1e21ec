"""The benchmark of growing cost, run whole on small sizes: its points, its slopes, its chart."""

from __future__ import annotations

import json
import time

import pytest
import torch

from benchmarks.step import growth


def test_every_series_is_measured_and_drawn(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(growth, "SECONDS", 0.0)
    assert growth.run(torch.device("cpu"), time.monotonic() + 100, tmp_path, largest=150) == 0
    content = json.loads((tmp_path / "growth.json").read_text())
    series = content["series"]
    assert list(series) == ["elements", "tensors", "modules", "bf16 modules", "released"]
    assert [line["where"] for line in content["goals"]] == ["50 tensors", "100 tensors", "50 to 100 tensors"]
    points = {name: [point["n"] for point in of] for s in series.values() for name, of in s["lines"].items()}
    assert points == {
        "MISA": [1, 10, 100],
        "torch fused": [1, 10, 100],
        "step that switches": [100],
        "step within a round": [100],
        "held": [50, 100],
        "released": [50, 100],
    }
    for found in series.values():
        for name, of in found["lines"].items():
            assert all(0 < point["us"]["p10"] <= point["us"]["p90"] for point in of)
            assert (found["slopes"][name] is None) == (len(of) < 2)
    pytest.importorskip("matplotlib")
    assert (tmp_path / "growth.png").stat().st_size > 4_000
    assert "slope" in capsys.readouterr().out


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_slope_of_the_larger_half(power):
    # What does not grow yet plays no part.
    assert growth.slope([(1, 9.0), (10, 9.0), *((n, 3.0 * n**power) for n in (100, 1000, 10_000))]) == pytest.approx(
        power
    )
    assert growth.slope([(1, 9.0)]) is None


def test_elements_end_where_the_memory_does(monkeypatch):
    monkeypatch.setattr(growth, "MEMORY_BYTES", {"cpu": 5000 * growth.BYTES_AN_ELEMENT})
    assert [n for n, _ in growth.over_elements(torch.device("cpu"), None)] == [1024, 4096]


def test_the_time_limit_ends_every_series():
    *_, found = growth.measure(torch.device("cpu"), time.monotonic() - 1)
    assert all(series["left_out"] == ["time limit"] and series["lines"] == {} for series in found.values())


def test_goals_of_known_figures():
    def line(*us):
        return [{"n": n, "us": {"median": float(u)}} for n, u in zip((50, 100, 200, 400), us, strict=True)]

    lines = {"held": line(10, 20, 40, 80), "released": line(20, 50, 101, 320)}
    *ratios, of = growth.goals({"released": {"lines": lines}})
    assert [(line["value"], line["met"]) for line in ratios] == [(2.0, True), (2.5, True), (2.525, False), (4.0, False)]
    # Eight times the tensors, sixteen times the time.
    assert of["value"] == pytest.approx(4 / 3) and not of["met"]
    assert growth.goals({"released": {"lines": {}}}) == growth.goals({}) == []


@pytest.fixture
def made(monkeypatch):
    """The optimizers that a benchmark makes."""
    found = []

    def make(*arguments, **options):
        found.append(original(*arguments, **options))
        return found[-1]

    original = growth.MISA
    monkeypatch.setattr(growth, "MISA", make)
    return found


def weights_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def test_an_iteration_that_releases_gradients_does_the_same(made):
    ((n, runs),) = growth.over_released(torch.device("cpu"), 50)
    assert n == 50 and list(runs) == ["held", "released"]
    held, released = map(weights_of, made)
    had = [[] for _ in made]
    for optimizer, weights, found in zip(made, (held, released), had, strict=True):
        optimizer.register_step_pre_hook(lambda *_, w=weights, f=found: f.append([p.grad is not None for p in w]))
    before = [weight.detach().clone() for weight in held]
    for _ in range(2):
        for run in runs.values():
            run()
    assert had == [[[True] * 50] * 2, [[False] * 50] * 2]
    assert all(map(torch.equal, held, released)) and not any(map(torch.equal, held, before))


@pytest.mark.filterwarnings("ignore:MISA samples:UserWarning")
def test_bf16_modules_have_masters_and_gradients_and_all_switch(made):
    ((n, steps),) = growth.over_modules(torch.device("cpu"), 100, growth.BF16)
    switches, within = made
    for step in steps.values():
        for _ in range(3):
            step.prepare()
            step()
    assert n == 100 and list(steps) == ["step that switches", "step within a round"]
    assert [len(optimizer.monitor.rounds) for optimizer in made] == [4, 1]
    for optimizer in made:
        active = [weights_of(optimizer)[number] for number in optimizer.active]
        assert len(active) == 3 and all(weight.dtype == torch.bfloat16 for weight in active)
        assert all(optimizer.state[weight]["master"].dtype == torch.float32 for weight in active)
    assert all(weights_of(within)[number].grad is not None for number in within.active)


@pytest.mark.filterwarnings("ignore:MISA samples:UserWarning")
def test_a_switch_has_gradients_for_what_is_active():
    weights = [torch.ones(4, 4, requires_grad=True) for _ in range(50)]
    optimizer = growth.MISA(weights, delta=0.1, inner_steps=1)
    step = growth.switching(weights, optimizer)
    for round_ in range(1, 4):
        step.prepare()
        assert all(weights[number].grad is not None for number in optimizer.active)
        step()
        assert len(optimizer.monitor.rounds) == round_ + 1
