"""Do slices and adapters over 4 bits get the same bytes, and does the table say of them what was measured?"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict

import pytest
import torch
from libraries import required

from benchmarks.quality import four_bits, pretrained, texts
from benchmarks.quality.four_bits import ADAPTER_BYTES, DELTA, OVER_INTEGERS, PEERS, SCALES, SEARCHES, SLICES
from benchmarks.quality.regime_runs import TUNING_SEED, Job

warnings.filterwarnings("ignore", module="bitsandbytes")


@pytest.fixture
def small(monkeypatch):
    """Return the methods' base, a small one of the same form."""
    transformers = pytest.importorskip("transformers")
    required("bitsandbytes")
    required("peft")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )
    model = texts.Logits(transformers.LlamaForCausalLM(config))
    monkeypatch.setattr(texts, "base", lambda: model)
    four_bits.base.cache_clear()
    yield model
    four_bits.base.cache_clear()


@pytest.mark.parametrize("method", [SLICES, *PEERS])
def test_each_trains_over_four_bits_in_the_bytes_of_slices(method, small):
    # In a model so small a rank is a large step.
    job = Job("C++ headers", method, "int8", 0.2, 0, 5, 1)
    model, optimizer, size, held = four_bits.build(job, 1e-2)
    budget = int(0.2 * sum(p.numel() for p in small.parameters())) * (4 + 2.0625)
    assert held == pytest.approx(budget, rel=0.11)
    packed = [p for p in model.parameters() if p.dtype == torch.uint8]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(packed) == 3 * 7 and not any(p.requires_grad for p in packed)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, trained))
    if method == SLICES:
        numel = sum(p.numel() for p in trained)
        assert held == pytest.approx(numel * ADAPTER_BYTES, abs=1) and size < 1
    before = [p.detach().clone() for p in packed]
    tokens = torch.randint(61, (1, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1)[:-1], tokens.flatten()[1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(map(torch.equal, packed, before))


@pytest.mark.parametrize("method", [*SCALES, *OVER_INTEGERS])
def test_scales_and_adapters_over_the_same_integers(method, small):
    job = Job("German manuals", method, "int8", 0.0123, 0, 5, 1)
    model, optimizer, size, held = four_bits.build(job, 1e-2)
    numel = sum(p.numel() for p in texts.base().parameters() if p.ndim == 2) - 61 * 64
    trained = [p for p in model.parameters() if p.requires_grad]
    if method in SCALES:
        assert held == pytest.approx(numel // four_bits.GROUP * (4 + 2.0625), abs=1) and len(trained) == 3 * 7
        assert all(layer.planes.shape[0] == SCALES[method] for layer in model.modules() if hasattr(layer, "planes"))
    else:
        # Rank 1 is the least there is.
        assert size == 1 and len(trained) == 2 * 3 * 7
        own, _ = four_bits.integers(OVER_INTEGERS[method])
        tokens = torch.arange(16).unsqueeze(0)
        torch.testing.assert_close(model(tokens), own(tokens), rtol=1e-4, atol=1e-5)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, trained))


def test_the_peak_of_scales_is_not_that_of_quantising(small, monkeypatch):
    monkeypatch.setattr(pretrained, "batches_of", lambda job: iter([(ids, ids)] * 2))
    ids = torch.arange(8).unsqueeze(0)
    peak = four_bits.peak_bytes(Job("German manuals", "PEQA, 4 bits", "int8", 0.0123, 0, 5, 1))
    assert peak < 4 * sum(p.numel() for p in small.parameters())


def test_all_are_searched_alike():
    found = [(search.first.task, search.first.method) for search in SEARCHES]
    both = [(task, method) for task in pretrained.TASKS for method in (SLICES, *PEERS)]
    assert found == both + [(pretrained.TASKS[0], method) for method in (*SCALES, *OVER_INTEGERS)]
    assert {search.first.state for search in SEARCHES} == {"int8"} and {len(search.arms) for search in SEARCHES} == {1}


def test_scales_are_the_fraction_that_is_said():
    # SmolLM2: 30 layers of width 576 with 3 of 9 heads for keys, 1536 within, and 49,152 tokens.
    matrices = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    whole = matrices + 49152 * 576 + 61 * 576
    assert matrices / four_bits.GROUP / whole == pytest.approx(four_bits.SCALES_DELTA, rel=0.01)


def test_the_table_pairs_seeds_and_has_the_runs_over_float32_beside(tmp_path, monkeypatch):
    known = [json.loads(line) for line in (pretrained.RESULTS / pretrained.RUNS).read_text().splitlines()]
    task = pretrained.TASKS[0]
    like = next(run for run in known if (run["task"], run["method"], run["seed"]) == (task, "slices", 1))
    adamw = {run["seed"]: run for run in known if (run["task"], run["method"], run["power"]) == (task, "AdamW", 1)}

    def run(method, seed, power, share):
        gain = adamw[seed]["loss_before"] - adamw[seed]["loss"] if seed in adamw and "loss" in adamw[seed] else 0.0
        key = asdict(Job(task, method, "int8", DELTA, 0, power, seed))
        losses = {"loss": like["loss_before"] - share * gain, "loss_before": adamw.get(seed, like).get("loss_before")}
        return like | key | losses | {"tuning_loss": abs(power - 5) + 2.0, "lr": 1e-4 * 2**power}

    runs = [run(method, TUNING_SEED, power, 0.0) for method in (SLICES, *PEERS) for power in (4, 5, 6)]
    shares = {SLICES: (0.9, 0.92, 0.94), "QLoRA": (0.8, 0.84, 0.82), "QLoRA, down": (0.9, 0.92, 0.94)}
    for method, reached in shares.items():
        for seed, share in enumerate(reached, 1):
            own = run(method, seed, 5, share)
            own["loss"] = own["loss_before"] - share * (adamw[seed]["loss_before"] - adamw[seed]["loss"])
            runs.append(own)
    (tmp_path / pretrained.RUNS).write_text("\n".join(map(json.dumps, known)))
    (tmp_path / four_bits.RUNS).write_text("\n".join(map(json.dumps, runs)))
    monkeypatch.setattr(four_bits, "RESULTS", tmp_path)
    four_bits.write_tables()
    content = json.loads((tmp_path / "four_bits.json").read_text())
    leads = {line["beside"]: (round(line["lead"], 4), round(line["error"], 4)) for line in content["leads"]}
    # Differences of .1, .08 and .12.
    assert leads == {"QLoRA": (0.1, 0.0115), "QLoRA, down": (0.0, 0.0)}
    methods = [row["method"] for row in content["rows"]]
    assert set(methods) == {SLICES, *PEERS, "AdamW", "slices", "LoRA", "LoRA, down"} and content["missing"] == 21
    page = (tmp_path / "four_bits.md").read_text()
    assert "| German manuals | slices, 4 bits | QLoRA | +10.0 ± 1.2 |" in page and "Wanted and missing: 21" in page
