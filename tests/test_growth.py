"""The benchmark of growing cost, run whole on small sizes: its points, its slopes, its chart."""

from __future__ import annotations

import json
import time

import pytest
import torch

from benchmarks import growth


def test_every_series_is_measured_and_drawn(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(growth, "SECONDS", 0.0)
    assert growth.run(torch.device("cpu"), time.monotonic() + 100, tmp_path, largest=150) == 0
    series = json.loads((tmp_path / "growth.json").read_text())["series"]
    assert list(series) == ["elements", "tensors", "modules"]
    points = {name: [point["n"] for point in of] for s in series.values() for name, of in s["lines"].items()}
    assert points == {
        "MISA": [1, 10, 100],
        "torch fused": [1, 10, 100],
        "step that switches": [100],
        "step within a round": [100],
    }
    for found in series.values():
        for name, of in found["lines"].items():
            assert all(0 < point["us"]["p10"] <= point["us"]["p90"] for point in of)
            assert (found["slopes"][name] is None) == (len(of) < 2)
    pytest.importorskip("matplotlib")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
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
