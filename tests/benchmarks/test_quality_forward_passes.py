"""Are runs without a backward pass those that the table says, and does it set them beside runs with one?"""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.quality import forward_passes, regime, update_rules
from benchmarks.quality.equal_bytes import parameters
from benchmarks.quality.forward_passes import DELTA, KINDS, PASSES_OF_A_STEP, SEARCHES, STEPS, WINDOW
from benchmarks.quality.regime_runs import SCALES, TUNING_SEED
from misa_kernels import MISA

TINY = SCALES["tiny"]


@pytest.fixture
def tiny_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(forward_passes, "SCALE", TINY)
    monkeypatch.setattr(regime, "OUT", tmp_path)


@pytest.mark.parametrize("method", KINDS)
def test_a_run_has_no_backward_pass_and_trains_what_it_says(method, tiny_scale, monkeypatch):
    found: list[MISA] = []
    make = forward_passes.build
    monkeypatch.setattr(forward_passes, "build", lambda *given: found.append(make(*given)) or found[-1])
    torch.set_num_threads(1)
    regime.base_weights(TINY)
    monkeypatch.setattr(torch.Tensor, "backward", None)
    (own,) = (search for search in SEARCHES if search.first.method == method)
    run = forward_passes.execute(own.first, 4, 2)
    assert (run["passes"], run["steps"]) == (8, 4) and [passes for passes, _ in run["curve"]] == [4, 8]
    assert run["loss"] != run["loss_before"] and abs(run["loss"] - run["loss_before"]) < 0.1
    # All of it, or within the budget whole modules, or a part of each down projection.
    kind, (optimizer,) = KINDS[method], found
    pieces, whole = optimizer.trained, parameters(regime.new_model(TINY))
    numel = sum(p.numel() if piece is None else p.shape[0] * (piece.last - piece.first) for p, piece in pieces.items())
    if kind.drawn == "all":
        assert numel == whole
    else:
        assert 0.01 * whole < numel <= DELTA * whole
        axes = {None if piece is None else piece.axis for piece in pieces.values()}
        assert axes == ({None} if kind.drawn == "modules" else {1})
    if kind.drawn == "slices":
        assert len(pieces) == TINY.shape.layers


def test_all_are_searched_alike():
    assert [search.first.method for search in SEARCHES] == list(KINDS)
    assert all(
        search.first.delta == (1.0 if KINDS[search.first.method].drawn == "all" else DELTA) for search in SEARCHES
    )
    assert {count for search in SEARCHES for _, count in search.arms} == {3} and STEPS % WINDOW == 0


def test_shares_are_of_what_adamw_gains_with_the_same_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(forward_passes, "RESULTS", tmp_path)
    first_order = [
        {
            "task": "fine-tuning",
            "method": method,
            "state": "fp32",
            "delta": delta,
            "inner_steps": 0,
            "power": power,
            "seed": seed,
            "lr": 2e-3,
            "loss_before": 3.0,
            "loss": 3.0 - seed * share,
            "tuning_loss": loss,
            "curve": [[200, 1.0, 2.5], [400, 2.0, 2.0]],
            "machine": "a CPU",
        }
        for method, delta, share, middle in (("AdamW", 1.0, 0.1, 0), ("slices", 0.03, 0.08, 2))
        for seed in (TUNING_SEED, 1, 2, 3)
        for power, loss in ((middle - 1, 2.1), (middle, 2.0), (middle + 1, 2.2))
    ]
    for run in first_order:
        if run["method"] == "slices":
            run["state"] = "int8"
    method = "MeZO, slices"
    middle = KINDS[method].power
    own = [
        first_order[0]
        | {
            "method": method,
            "delta": 0.03,
            "power": power,
            "seed": seed,
            "loss": 3.0 - seed * share,
            "tuning_loss": loss,
        }
        | {"curve": [[1000, 2.9], [2000, 2.8]], "steps": 1000, "passes": 2000}
        for seed, share in ((TUNING_SEED, 0.0), (1, 0.01), (2, 0.02), (3, 0.03))
        for power, loss in ((middle - 1, 2.9), (middle, 2.8), (middle + 1, 2.9))
    ]
    (tmp_path / update_rules.RUNS).write_text("\n".join(map(json.dumps, first_order)))
    (tmp_path / forward_passes.RUNS).write_text("\n".join(map(json.dumps, own)))
    forward_passes.write_tables()
    content = json.loads((tmp_path / "forward_passes.json").read_text())
    rows = {row["method"]: row for row in content["rows"]}
    assert list(rows) == ["AdamW, backward", "slices, backward", method] and content["missing"] == 3 * (len(KINDS) - 1)
    assert [round(row["share"], 6) for row in rows.values()] == [1.0, 0.8, 0.2]
    assert rows[method]["share_sd"] == pytest.approx(0.1) and rows[method]["passes"] == 2000
    assert rows["slices, backward"]["passes"] == PASSES_OF_A_STEP * 400
    assert content["curves"]["slices, backward"] == [[600, 2.5], [1200, 2.0]]
    assert content["curves"][method] == [[1000, 2.9], [2000, 2.8]]
    page = (tmp_path / "forward_passes.md").read_text()
    assert "| MeZO, slices | 0.03 | 1,000 | 2,000 | 0.002 | 20.0 ± 10.0 |" in page
