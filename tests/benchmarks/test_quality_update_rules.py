"""Do rules get the bytes of int8 AdamW, and does the table say of them what was measured?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from libraries import required
from torch import nn

from benchmarks.quality import methods, regime, update_rules
from benchmarks.quality.equal_bytes import parameters
from benchmarks.quality.regime_runs import SCALES, Job
from benchmarks.quality.rules_runs import (
    DELTA,
    GRADIENT_BYTES,
    INT8_BYTES,
    REFERENCES,
    RULES,
    SEARCHES,
    WHERE,
    delta_of,
    split,
)
from benchmarks.quality.update_rules import longest_update, verdict

NEEDS = {"CAME": "came_pytorch", "AdamW, 4 bits": "torchao"}


# torchao compiles its update for every shape.
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "4 bits" in name else name for name in RULES]
)
def test_a_rule_gets_as_many_bytes_as_int8_adamw(name: str, where: str) -> None:
    required(NEEDS.get(name, "torch"))
    rule, scale = RULES[name], SCALES["5m"]
    model = regime.new_model(scale)
    job = Job("fine-tuning", f"{name}, {where}", "rule", delta_of(rule, where), 0, 0, 1)
    size = methods.size_of(job, model)
    trained, optimizer = methods.build(job, model, 1e-4, scale.steps, size)
    tokens = torch.randint(256, (1, 16), generator=torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(trained(tokens).flatten(0, 1), tokens.flatten()).backward()
    numel = sum(optimizer.modules[number].numel for number in optimizer.active)
    optimizer.step()
    # What Shampoo keeps of a matrix hangs on its shape, and so on the draw and the width of slices.
    close = 0.12 if "Shampoo" in name else 0.01
    assert optimizer.state_bytes / numel == pytest.approx(getattr(rule, where), rel=close, abs=0.005)
    most = DELTA * parameters(model) * (GRADIENT_BYTES + INT8_BYTES)
    assert numel * (GRADIENT_BYTES + optimizer.state_bytes / numel) <= (1 + close) * most
    assert methods.training_bytes(job, model, size) == pytest.approx(most, rel=0.02)


def test_every_rule_is_searched_under_both() -> None:
    found = {split(search.first.method) for search in SEARCHES} - {None}
    assert found == {(rule, where) for rule in RULES.values() for where in WHERE}
    assert split("MISA, window") is None and split("LoRA, down") is None
    assert {search.first.method for search in REFERENCES} == {"AdamW", *WHERE.values()}


def test_a_run_of_a_rule_trains() -> None:
    job = Job("fine-tuning", "FOAM, slices", "rule", 0.2, 0, 2, 1)
    found = regime.execute(SCALES["tiny"], job)
    assert found["method"] == "FOAM, slices" and found["loss"] < found["loss_before"]


def test_first_updates_are_in_units_of_lr() -> None:
    assert longest_update(RULES["FOAM"]) == pytest.approx(0.72, abs=0.02)
    required(NEEDS["CAME"])
    # As published, its statistics of the residual are not corrected for age.
    assert longest_update(RULES["CAME"]) == pytest.approx(11.1, abs=0.2)


@pytest.mark.parametrize(
    ("lead", "error", "early", "said"),
    [
        (0.03, 0.01, 1.0, "better than int8 AdamW here: +3.0 ± 1.0"),
        (0.03, 0.01, 11.0, "better than int8 AdamW here: +3.0 ± 1.0"),
        (0.02, 0.01, 1.0, "no better, level: +2.0 ± 1.0"),
        (-0.02, 0.01, 1.0, "no better, level: -2.0 ± 1.0"),
        (-0.03, 0.01, 1.0, "no better: -3.0 ± 1.0"),
        (-0.03, 0.01, 11.1, "does not work from zero state, its first updates are 11 lr: -3.0 ± 1.0"),
    ],
)
def test_the_verdict_is_what_was_measured(lead: float, error: float, early: float, said: str) -> None:
    assert verdict(lead, error, early) == said


def run_of(job: Job, loss: float) -> dict:
    figures = {"lr": 1e-3, "size": 0.03, "training_bytes": 1000, "rounds_of": 50, "machine": "this", "training_s": 50.0}
    losses = {"loss_before": 3.0, "loss": loss, "tuning_loss": loss}
    names = ("task", "method", "state", "delta", "inner_steps", "power", "seed")
    return {name: getattr(job, name) for name in names} | figures | losses | {"curve": [(80, 50.0, loss)]}


def test_leads_are_over_int8_adamw_of_the_same_draw_and_seed() -> None:
    adamw = Job("fine-tuning", "AdamW", "fp32", 1.0, 0, 0, 1)
    ours = replace(adamw, method="slices", state="int8", delta=0.03)
    theirs = replace(ours, method="FOAM, slices", state="rule", delta=0.0303)
    modules = replace(ours, method="MISA")
    runs = [run_of(replace(adamw, seed=seed), 1.0) for seed in (1, 2, 3)]
    for seed, (own, other) in enumerate([(1.5, 1.4), (1.6, 1.4), (1.4, 1.4)], 1):
        runs += [run_of(replace(ours, seed=seed), own), run_of(replace(theirs, seed=seed), other)]
        runs.append(run_of(replace(modules, seed=seed), 1.9))
    rows = update_rules.summary([], runs)
    assert [(row["rule"], row["where"]) for row in rows] == [
        ("FOAM", "slices"), ("int8 AdamW", "slices"), ("int8 AdamW", "modules")
    ]  # fmt: skip
    assert rows[0]["lead"] == pytest.approx(0.05) and rows[0]["error"] == pytest.approx(0.05 / 3**0.5)
    assert rows[0]["verdict"] == "no better, level: +5.0 ± 2.9"
    table = update_rules.table(rows, "slices")
    assert "the fused default" in table[3] and "| FOAM | 0.0303 | 2.00 |" in table[2]
