"""Do shares, times, goals and budgets of the benchmark of small δ mean what its table says?"""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from benchmarks.gpu import stages as gpu
from benchmarks.quality import equal_bytes, methods, regime, regime_table
from benchmarks.quality.regime_runs import CPU_SEARCHES, GPU_SEARCHES, LAYERS, SCALES, TASKS, TUNING_SEED, VARIANTS, Job
from benchmarks.quality.searches import reported
from examples.demo.model import Llama
from misa_kernels import MISA, ImportanceSampler

SCALE = SCALES["5m"]
MISA_JOB = Job("fine-tuning", "MISA", "int8", 0.03, 0, 1, 1)
METHODS = ("AdamW", *equal_bytes.LOW_RANK, "BAdam", "LISA", "uniform", "MISA", "slices", *VARIANTS)


def built(job: Job, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    return methods.build(job, model, regime.lr_of(job, SCALE), SCALE.steps, methods.size_of(job, model))


def run_of(job: Job, loss: float, seconds: float = 50.0) -> dict:
    figures = {"lr": regime.lr_of(job, SCALE), "size": 0.5, "training_bytes": 1000, "rounds_of": 5, "machine": "this"}
    curve = [(20, seconds / 2, loss + 1), (40, seconds, loss)]
    return asdict(job) | figures | {
        "training_s": seconds, "curve": curve, "loss_before": 3.0, "loss": loss, "tuning_loss": loss
    }  # fmt: skip


def content_of(misa_losses: tuple[float, ...], power: int = 1) -> dict:
    adamw = replace(MISA_JOB, method="AdamW", state="fp32", delta=1.0, power=0)
    runs = [run_of(replace(adamw, seed=seed), 1.0, 100.0) for seed in (1, 2)]
    runs += [run_of(replace(MISA_JOB, power=power, seed=seed), loss) for seed, loss in enumerate(misa_losses, 1)]
    where = {"scale": asdict(SCALE) | {"parameters": 4_855_936}, "device": {"type": "cpu"}}
    return where | regime_table.summary([run_of(replace(MISA_JOB, seed=TUNING_SEED), 1.5)], runs)


def test_share_and_time_are_over_adamw_of_the_same_seed() -> None:
    # There is no AdamW of the third seed.
    rows = {row["method"]: row for row in content_of((1.4, 1.6, 0.0))["rows"]}
    assert rows["MISA"]["share"] == pytest.approx((0.8 + 0.7) / 2)
    assert rows["MISA"]["share_sd"] == pytest.approx(0.1 / 2**0.5)
    assert (rows["MISA"]["time"], rows["MISA"]["seeds"]) == (0.5, [1, 2])
    assert (rows["AdamW"]["share"], rows["AdamW"]["time"]) == (1.0, 1.0)


def test_the_chart_leaves_out_variants_that_the_table_has() -> None:
    adamw = replace(MISA_JOB, method="AdamW", state="fp32", delta=1.0)
    changes = ({"state": "fp32"}, {"inner_steps": 25}, {"method": "MISA, window"}, {"delta": 0.01}, {"method": "LISA"})
    content = regime_table.summary(
        [], [run_of(job, 1.0) for job in (adamw, *(replace(MISA_JOB, **c) for c in changes))]
    )
    assert len(content["rows"]) == 6
    assert set(content["curves"]["fine-tuning"]) == {"AdamW", "MISA int8, δ = 0.01", "LISA"}
    slices = [run_of(replace(MISA_JOB, method="slices", delta=delta), 1.0) for delta in (0.01, 0.03, 0.05, 0.25)]
    drawn = regime_table.summary([], [run_of(adamw, 1.0), *slices])["curves"]["fine-tuning"]
    assert set(drawn) == {"AdamW", "slices int8, δ = 0.03", "slices int8, δ = 0.25"}


def test_time_is_over_that_of_adamw_on_the_same_machine() -> None:
    """Twice as fast a machine, where AdamW was run in the other task alone, and one where it was not run."""
    adamw = replace(MISA_JOB, method="AdamW", state="fp32", delta=1.0, power=0)
    runs = [run_of(adamw, 1.0, 100.0), run_of(replace(adamw, seed=2), 1.0, 140.0)]
    runs += [run_of(replace(MISA_JOB, seed=1), 1.5, 60.0), run_of(replace(MISA_JOB, seed=2), 1.5, 36.0)]
    runs[-1]["machine"] = "fast"
    runs.append(run_of(replace(MISA_JOB, method="uniform"), 1.5, 30.0) | {"machine": "third"})
    tuning = [run_of(replace(adamw, task="pre-training", seed=TUNING_SEED), 1.0, 60.0) | {"machine": "fast"}]
    content = regime_table.summary(tuning, runs)
    rows = {row["method"]: row for row in content["rows"]}
    assert rows["MISA"]["time"] == pytest.approx((60 / 120 + 36 / 60) / 2)
    assert rows["uniform"]["time"] is None and rows["uniform"]["share"] == 0.75
    assert content["curves"]["fine-tuning"]["uniform int8, δ = 0.03"] == []
    assert "| 75.0 |  | 1.500 | 1 |" in regime_table.table([rows["uniform"]])[-2]


def test_forgetting_is_the_rise_on_the_source_text_where_runs_measured_it() -> None:
    adamw = replace(MISA_JOB, method="AdamW", state="fp32", delta=1.0, power=0)
    seeds = [replace(job, seed=seed) for job in (adamw, replace(MISA_JOB, method="slices")) for seed in (1, 2)]
    runs = [run_of(job, 1.0) for job in seeds]
    for run, source_loss in zip(runs[1:], (2.5, 1.75, 1.25), strict=True):
        run |= {"source_loss": source_loss, "source_loss_before": 1.0}
    adamw_row, row = regime_table.summary([], runs)["rows"]
    assert (row["forgetting"], row["forgetting_sd"]) == (0.5, pytest.approx(0.5 / 2**0.5))
    assert (adamw_row["forgetting"], adamw_row["forgetting_seeds"]) == (1.5, 1)
    text = "\n".join(regime_table.table([adamw_row, row]))
    assert "| 1.000 ± 0.000 | 2 | 1.500 (of 1) |" in text and "| 2 | 0.500 ± 0.354 |" in text
    assert "| 1.600 | 1 |  |" in "\n".join(regime_table.table(content_of((1.6,))["rows"]))


def test_what_is_forgotten_is_what_pretraining_reports() -> None:
    tiny = SCALES["tiny"]
    model = regime.new_model(tiny)
    losses = regime.held_out_losses("fine-tuning", model, tiny)
    assert losses["source_loss"] == regime.held_out_losses("pre-training", model, tiny)["loss"] != losses["loss"]


def test_leads_of_slices_are_of_the_same_seeds_and_in_no_fewer_bytes() -> None:
    adamw = replace(MISA_JOB, method="AdamW", state="fp32", delta=1.0, power=0)
    slices = replace(MISA_JOB, method="slices")
    arms = {slices: 1.2, replace(MISA_JOB, delta=0.01): 1.1, MISA_JOB: 1.6, replace(MISA_JOB, inner_steps=25): 1.1}
    arms |= {replace(MISA_JOB, method="LoRA", delta=0.25): 1.3, replace(MISA_JOB, method="MISA, window"): 1.4}
    arms |= {replace(slices, state="fp32"): 1.1, replace(MISA_JOB, state="fp32"): 1.1}
    # The seeds differ by more than the methods, and two of slices have no partner.
    runs = [run_of(replace(job, seed=seed), loss - seed / 10) for job, loss in arms.items() for seed in (1, 2)]
    runs += [run_of(replace(slices, seed=seed), 0.5) for seed in (3, 4)]
    runs += [run_of(replace(adamw, seed=seed), 1.0) for seed in (1, 2, 3, 4)]
    runs[-1]["loss"] = 0.9
    runs = [run | {"training_bytes": 3000 if run["method"] == "LoRA" else 1000} for run in runs]
    lora, misa = regime_table.summary([], runs)["leads"]
    assert (lora["method"], lora["bytes"], lora["seeds"]) == ("LoRA", 3, 2)
    assert (lora["lead"], lora["error"]) == (pytest.approx(0.05), pytest.approx(0, abs=1e-12))
    assert (misa["method"], misa["delta"], misa["lead"]) == ("MISA", 0.03, pytest.approx(0.2))
    assert "| 0.03 | LoRA | 3.00 | +5.0 ± 0.0 | 2 |" in regime_table.lead_lines([lora, misa])


@pytest.mark.parametrize(("losses", "met"), [((1.4, 1.5), True), ((1.6, 1.5), False)])
def test_the_goal_of_the_share_is_three_quarters_at_three_per_cent(losses: tuple[float, ...], met: bool) -> None:
    (line,) = [line for line in content_of(losses)["goals"] if line["goal"].startswith("share")]
    assert (line["limit"], line["met"]) == (0.75, met)


@pytest.mark.parametrize(("power", "ratio", "met"), [(1, 2, True), (2, 4, False), (-1, 0.5, True), (-2, 0.25, False)])
def test_the_goal_of_the_learning_rate_is_twice_or_half(power: int, ratio: float, met: bool) -> None:
    (line,) = [line for line in content_of((1.4, 1.5), power)["goals"] if line["goal"].startswith("learning")]
    assert (line["value"], line["met"]) == (ratio, met)


def test_the_table_has_all_arms_and_searches() -> None:
    text = regime_table.markdown(content_of((1.4, 1.6)))
    assert "24 layers with 7 matrices each, 4.9 million float32 parameters, on a CPU, 400 steps of 256 bytes." in text
    assert "| MISA | int8 | 0.03 | 0.5 | 5 | 1 | 0.004 | 75.0 ± 7.1 | 0.50 | 1.500 ± 0.141 | 2 |" in text
    assert "| share of AdamW's improvement | MISA int8, δ = 0.03 | 0.75 | 0.75 | met |" in text
    assert "| fine-tuning | MISA int8, δ = 0.03 | 0.004: 1.5000 |" in text


def test_curves_are_means_over_seeds(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    curves = content_of((1.4, 1.6))["curves"]
    assert curves["fine-tuning"]["MISA int8, δ = 0.03"] == [[20, 0.25, 2.5], [40, 0.5, 1.5]]
    path = regime_table.draw(curves, tmp_path / "regime.png")
    assert path is not None and path.stat().st_size > 4_000


@pytest.fixture(scope="module")
def model() -> Llama:
    return regime.new_model(SCALE)


def test_every_search_asks_for_jobs_that_exist(model: Llama) -> None:
    jobs = {job for search in CPU_SEARCHES for job in reported(search, 0)}
    assert {job for search in GPU_SEARCHES for job in reported(search, 0)} < jobs
    assert {job.task for job in jobs} == set(TASKS) and {job.method for job in jobs} == set(METHODS)
    for job in jobs:
        if job.method in equal_bytes.LOW_RANK:
            misa = equal_bytes.misa_bytes(model, job.state, job.delta)
            assert 0.6 * misa < methods.training_bytes(job, model, methods.size_of(job, model)) <= misa


# Of other methods when this research is what changes; MISA's are as quick as they are.
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("AdamW", "BAdam", "LISA", "uniform", "MISA, window")]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", ["MISA", *OTHERS])
def test_what_is_trained_is_what_the_task_says(task: str, method: str, model: Llama) -> None:
    if method == "BAdam":
        pytest.importorskip("badam")
    state = "fp32" if method in ("AdamW", "BAdam", "LISA") else "int8"
    fresh = regime.new_model(SCALE)
    job = Job(task, method, state, 0.05, 16 if method in ("BAdam", "LISA") else 0, 0, 1)
    trained, optimizer = built(job, fresh)
    tokens = torch.randint(256, (1, 17), generator=torch.Generator().manual_seed(0))
    # The first step of a round of BAdam's package fills its copies; a matrix that is drawn moves at once.
    for _ in range(2):
        nn.functional.cross_entropy(trained(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    pairs = zip(model.named_parameters(), fresh.named_parameters(), strict=True)
    moved = {name: new.numel() for (name, old), (_, new) in pairs if not torch.equal(old, new)}
    matrices = [name for name in moved if "layers." in name and fresh.get_parameter(name).dim() == 2]
    always = method == "AdamW" or task == "pre-training"
    assert all((name in moved) == always for name in ("embedding.weight", "norm.weight"))
    if method == "AdamW":
        assert len(matrices) == 168
    else:
        whole = methods.layer_share(model) if method in ("BAdam", "LISA") else 0.05
        budget = whole * equal_bytes.parameters(model)
        assert 0.5 * budget < sum(moved[name] for name in matrices) <= budget + 1


def test_slices_are_columns_of_every_down_projection(model: Llama) -> None:
    fresh = regime.new_model(SCALE)
    _, optimizer = built(Job("fine-tuning", "slices", "int8", 0.03, 0, 0, 1), fresh)
    tokens = torch.randint(256, (1, 17), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        nn.functional.cross_entropy(fresh(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    pairs = zip(model.named_parameters(), fresh.named_parameters(), strict=True)
    moved = {name: (old != new).any(dim=0) for (name, old), (_, new) in pairs if not torch.equal(old, new)}
    assert len(moved) == LAYERS and all(name.endswith("down_proj.weight") for name in moved)
    budget = 0.03 * equal_bytes.parameters(model)
    assert 0.95 * budget < 128 * sum(int(columns.sum()) for columns in moved.values()) <= budget


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("method", "package"), [("LoRA", "peft"), ("GaLore", "galore_torch")])
def test_low_rank_methods_train_the_rest_in_pretraining_alone(task: str, method: str, package: str) -> None:
    for name in (package, "bitsandbytes"):
        pytest.importorskip(name)
    fresh = regime.new_model(SCALE)
    begin = {name: parameter.detach().clone() for name, parameter in fresh.named_parameters()}
    trained, optimizer = built(Job(task, method, "int8", 0.25, 0, 0, 1), fresh)
    tokens = torch.randint(256, (1, 17), generator=torch.Generator().manual_seed(0))
    # LoRA's B begins at zero, so that A has no gradient in the first step.
    for _ in range(2):
        nn.functional.cross_entropy(trained(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    now = {name.removeprefix("base_model.model."): parameter for name, parameter in trained.named_parameters()}
    rest = methods.always_trained(regime.new_model(SCALE))
    assert all(torch.equal(now[name], begin[name]) != (task == "pre-training") for name in rest)
    if method == "LoRA":
        frozen = "layers.0.attention.q_proj.base_layer.weight"
        assert torch.equal(now[frozen], begin[frozen.replace("base_layer.", "")])
        assert all(parameter.any() for name, parameter in now.items() if "lora_B" in name)
    else:
        assert not any(torch.equal(now[name], begin[name]) for name in begin if name not in rest)


def test_variants_are_draws_of_another_kind() -> None:
    default = ImportanceSampler()
    for method, options in VARIANTS.items():
        _, optimizer = built(Job("fine-tuning", method, "int8", 0.03, 0, 0, 1), regime.new_model(SCALE))
        assert isinstance(optimizer, MISA) and optimizer.sampler == replace(default, **options) != default


def test_scales_are_as_large_as_they_are_called(model: Llama) -> None:
    with torch.device("meta"):
        large = Llama(SCALES["128m"].shape)
    assert equal_bytes.parameters(model) == pytest.approx(4.9e6, rel=0.02)
    assert equal_bytes.parameters(large) == pytest.approx(128e6, rel=0.01)
    lora = [search.first for search in GPU_SEARCHES if search.first.method == "LoRA"]
    # A rank is 307,200 parameters of 10.03 bytes; there are 3.8 and 32 million to be trained, of 6.06 bytes.
    assert {job.delta: methods.size_of(job, large) for job in lora} == {0.03: 7, 0.25: 62}
    assert {len(Llama(scale.shape).layers) for scale in SCALES.values() if scale.device == "cpu"} == {LAYERS}


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """A folder with the runs of two searches that are over, each with a run left, and of a third without package."""
    adamw, misa = (next(search for search in GPU_SEARCHES if search.first.method == name) for name in ("AdamW", "MISA"))
    lora = next(search for search in GPU_SEARCHES if search.first.method == "LoRA")
    few = [replace(adamw, arms=(({"delta": 1.0}, 1),)), replace(misa, arms=(({"delta": 0.03}, 1),)), lora]
    monkeypatch.setattr(regime, "GPU_SEARCHES", few)
    monkeypatch.setattr(regime, "PACKAGES", {"LoRA": ("no_such_package",)})
    # Where the weights to begin with are kept.
    monkeypatch.chdir(tmp_path)
    tuning = [
        run_of(replace(search.first, power=search.first.power + offset), 1.0 + offset**2)
        for search in few[:2]
        for offset in (-1, 0, 1)
    ]
    (tmp_path / regime.RUNS).write_text("".join(json.dumps(run) + "\n" for run in tuning))
    return tmp_path


def stage(folder, *more: str) -> tuple[int, dict]:
    code = gpu.main(["--stage", "regime", "--device", "cpu", "--out", str(folder), *more])
    return code, json.loads((folder / "regime.json").read_text())


@pytest.mark.slow
def test_the_stage_trains_what_is_missing_and_goes_on_where_it_stopped(searched) -> None:
    code, content = stage(searched, "--time-limit", "0")
    assert (code, content["missing"], content["rows"]) == (0, 2, [])
    code, content = stage(searched)
    assert (code, content["missing"], content["failed"]) == (0, 0, {})
    rows = {row["method"]: row for row in content["rows"]}
    assert set(rows) == {"AdamW", "MISA"} and rows["AdamW"]["share"] == 1 and rows["MISA"]["seeds"] == [1]
    assert [point[0] for point in content["curves"]["fine-tuning"]["AdamW"]] == [4, 8]
    assert content["scale"]["name"] == "tiny" and content["absent"] == {"LoRA": "no_such_package is not installed"}
    assert "LoRA: no_such_package is not installed." in (searched / "regime.md").read_text()
    finished = (searched / regime.RUNS).read_text()
    assert len(finished.splitlines()) == 8
    assert stage(searched)[1]["rows"] == content["rows"]
    assert (searched / regime.RUNS).read_text() == finished


@pytest.mark.parametrize(("method", "code"), [("MISA", 1), ("uniform", 1), ("LoRA", 0)])
def test_the_stage_fails_if_a_run_of_ours_fails(method: str, code: int, searched, monkeypatch) -> None:
    failed = {replace(MISA_JOB, method=method): "ValueError: a reason"}
    monkeypatch.setattr(regime, "run_all", lambda *arguments: failed)
    found, content = stage(searched)
    assert (found, content["failed"]) == (code, {method: "ValueError: a reason"})
    assert f"{method}: ValueError: a reason." in (searched / "regime.md").read_text()
