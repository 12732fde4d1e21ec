"""Do the examples do what they claim: text without overlap, a causal model, equal state, a demo that runs?"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from examples.demo import compare as demo
from examples.demo import data
from examples.demo.measure import Cost, Depth
from examples.demo.methods import DELTA, METHODS, lora_rank, state_bytes
from examples.demo.model import Llama, LlamaConfig, rotary_angles, rotate
from examples.demo.runs import Run, Settings, drawn
from examples.demo.train import batch_loss, train, warmup_cosine
from misa_kernels import MISA

LIMITED = [name for name in METHODS if name != "AdamW"]


def random_tokens(batch: int, positions: int) -> Tensor:
    return torch.randint(256, (batch, positions), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("files", [data.python_files, data.header_files])
def test_training_and_validation_share_no_file(files) -> None:
    everything = files()
    train_files, validation_files = data.split(everything)
    assert not {*train_files} & {*validation_files}
    assert {*train_files} | {*validation_files} == {*everything}
    assert len(validation_files) == len(everything) // 10 > 0
    assert everything == files() == sorted({*everything})


def test_corpora_hold_the_bytes_of_their_files_and_differ_in_kind() -> None:
    python, headers = data.pretraining_corpus(), data.finetuning_corpus()
    for corpus, files in ((python, data.python_files()), (headers, data.header_files())):
        parts = data.split(files)
        for text, part in zip((corpus.train, corpus.validation), parts, strict=True):
            # One newline between two files.
            assert len(text) == sum(path.stat().st_size for path in part) + len(part) - 1
    python_text, header_text = (bytes(corpus.train[:1_000_000].tolist()) for corpus in (python, headers))
    assert python_text.count(b"\ndef ") > 100 > 10 > header_text.count(b"\ndef ")
    assert header_text.count(b"#include") > 100 > 10 > python_text.count(b"#include")


def test_too_few_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "only.py").write_text("pass")
    with pytest.raises(FileNotFoundError, match=r"files=1 of a text found"):
        data.read("a text", [tmp_path / "only.py"])


def test_targets_are_the_next_tokens_and_seeds_repeat() -> None:
    text = torch.arange(250, dtype=torch.uint8)
    inputs, targets = next(data.random_batches(text, 6, 16, seed=3))
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (6, 16)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, next(data.random_batches(text, 6, 16, seed=3))[0])
    assert not torch.equal(inputs, next(data.random_batches(text, 6, 16, seed=4))[0])


def test_validation_covers_the_text_from_its_first_to_its_last_token() -> None:
    text = torch.arange(250, dtype=torch.uint8)
    inputs, targets = (torch.cat(part) for part in zip(*data.validation_batches(text, 4, 16, 3), strict=True))
    assert len(inputs) == 12
    assert inputs.min() == 0 and targets.max() == 249
    assert torch.equal(targets, inputs + 1)


def test_a_later_token_does_not_change_earlier_scores() -> None:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(layers=2))
    tokens = random_tokens(2, 40)
    changed = tokens.clone()
    changed[:, 25] = (changed[:, 25] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :25], before[:, :25], rtol=0, atol=1e-6)
    differs = (after[:, 25:] - before[:, 25:]).abs().amax(dim=(0, 2))
    assert (differs > 1e-4).all(), differs


def test_rotation_is_multiplication_by_a_complex_number() -> None:
    positions, width = 50, 16
    x = torch.randn(2, 3, positions, width, generator=torch.Generator().manual_seed(0))
    angles = rotary_angles(positions, width)
    turned = rotate(x, angles.cos(), angles.sin()).double().numpy()

    z = x[..., : width // 2].double().numpy() + 1j * x[..., width // 2 :].double().numpy()
    pair, position = np.arange(width // 2), np.arange(positions)[:, None]
    z = z * np.exp(1j * position * 10000.0 ** (-2 * pair / width))
    # The angle reaches 49 radians, of which float32 keeps 2e-6.
    np.testing.assert_allclose(turned[..., : width // 2], z.real, atol=2e-5)
    np.testing.assert_allclose(turned[..., width // 2 :], z.imag, atol=2e-5)


def test_the_model_has_the_modules_the_demo_speaks_of() -> None:
    model = Llama()
    assert sum(parameter.numel() for parameter in model.parameters()) == 418_880
    optimizer = METHODS["MISA"].build(model, 1e-3, 100, 0)[1]
    assert isinstance(optimizer, MISA)
    assert [module.layer for module in optimizer.modules] == [layer for layer in range(8) for _ in range(7)]
    assert sum(module.numel for module in optimizer.modules) == 8 * (4 * 64 * 64 + 3 * 64 * 176)


@pytest.mark.parametrize("method", LIMITED)
def test_state_fills_the_budget_but_for_a_few_per_cent(method: str) -> None:
    model, optimizer = METHODS[method].build(Llama(LlamaConfig(context=16)), 1e-3, 20, 0)
    # Two averages of four bytes each for every parameter of the budget.
    budget_bytes = 8 * int(DELTA * 418_880)
    filled = []
    for _ in train(model, optimizer, data.random_batches(random_tokens(1, 500)[0].byte(), 1, 16, 0), 16):
        filled.append(state_bytes(optimizer) / budget_bytes)
    assert max(filled) <= 1
    assert max(filled) > 0.93, filled


def test_lora_starts_from_the_model_and_trains_its_additions_only() -> None:
    torch.manual_seed(0)
    base = Llama(LlamaConfig(context=16))
    tokens = random_tokens(2, 16)
    before = base(tokens)
    rank = lora_rank(base)
    model, _ = METHODS["LoRA"].build(base, 1e-3, 10, 0)
    torch.testing.assert_close(model(tokens), before, rtol=0, atol=0)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 56
    assert sum(trained.values()) <= DELTA * 418_880 < sum(trained.values()) * (rank + 1) / rank


def test_learning_rate_rises_in_a_line_and_falls_along_a_cosine() -> None:
    factor = warmup_cosine(110, warmup=10 / 110)
    assert [factor(step) for step in range(10)] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert factor(10) == 1
    assert factor(60) == pytest.approx(0.5)
    assert factor(35) == pytest.approx((2 + math.sqrt(2)) / 4)
    assert 0 < factor(109) < 1e-3


def test_counted_depth_is_the_depth_the_optimizer_reports() -> None:
    base = Llama(LlamaConfig(context=16))
    depth = Depth(base)
    model, optimizer = METHODS["MISA, window"].build(base, 1e-3, 40, 0)
    assert isinstance(optimizer, MISA)
    steps = 0
    for _ in train(model, optimizer, data.random_batches(random_tokens(1, 500)[0].byte(), 1, 16, 0), 40):
        steps += 1
    rounds = drawn(optimizer, steps)
    assert len(rounds.backward_depth) == 40 // optimizer.inner_steps
    assert depth.mean() == pytest.approx(sum(rounds.backward_depth) / len(rounds.backward_depth))
    assert depth.mean() < 8


def test_loss_of_a_model_that_knows_nothing_is_the_logarithm_of_the_vocabulary() -> None:
    model = Llama(LlamaConfig(layers=1))
    torch.nn.init.zeros_(model.norm.weight)
    tokens = random_tokens(2, 17)
    loss = batch_loss(model, (tokens[:, :-1], tokens[:, 1:]))
    assert loss.item() == pytest.approx(math.log(256), rel=1e-6)


def test_table_compares_with_the_gain_of_adamw() -> None:
    runs = [
        Run("AdamW", [0, 10], [3.0, 1.0], 4000, None),
        Run("LoRA", [0, 10], [3.0, 1.5], 2000, None),
    ]
    costs = {"AdamW": Cost(10, 2000, 3_000_000, 8), "LoRA": Cost(20, 1000, 1_500_000, 8)}
    lines = demo.table(runs, costs)
    assert lines[-2].split() == ["AdamW", "1.000", "100%", "4", "3.0", "2,000", "8.0"]
    assert lines[-1].split() == ["LoRA", "1.500", "75%", "2", "1.5", "1,000", "8.0"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.slow
def test_demo_from_start_to_end(tmp_path: Path) -> None:
    settings = Settings(
        pretrain_steps=6,
        pretrain_batch=2,
        finetune_steps=20,
        batch=2,
        context=32,
        evaluations=2,
        validation_batches=1,
        timing_rounds=1,
    )
    demo.compare(settings, "cpu", tmp_path)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "results.json").read_text())
    assert [result["method"] for result in written["results"]] == list(METHODS)
    for result in written["results"]:
        assert result["steps"] == [0, 10, 20]
        assert result["losses"][0] == written["results"][0]["losses"][0]
        assert result["losses"][-1] < result["losses"][0]
        assert result["cost"]["peak_bytes"] > result["state_bytes"] > 0
        assert result["cost"]["tokens_per_second"] > 0
    table = (tmp_path / "table.txt").read_text()
    assert all(method in table for method in METHODS)


def test_what_processes_look_up_by_name_is_not_in_what_is_started():
    """A process that is spawned imports no package's `__main__`."""
    root = Path(demo.__file__).parents[2]
    started = [*root.glob("examples/*/__main__.py"), *root.glob("benchmarks/*/__main__.py")]
    assert len(started) == 6 and not [path for path in started if "\ndef " in path.read_text()]
