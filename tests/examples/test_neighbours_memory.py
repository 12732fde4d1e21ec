"""Peaks of the ways around MISA, counted on a small model: all of them run, and the order is what each is for."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

import pytest
import torch
from libraries import required
from transformers import LlamaConfig, LlamaForCausalLM

from examples.neighbours import memory

warnings.filterwarnings("ignore", module="bitsandbytes")


@pytest.fixture
def small(monkeypatch) -> Iterator[None]:
    for name in ("bitsandbytes", "peft"):
        required(name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=8,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    monkeypatch.setattr(memory, "load", lambda folder, dtype: (model, None))
    # Larger than any matrix of so few.
    monkeypatch.setattr(memory, "DELTA", 0.06)


def test_every_way_takes_what_it_is_for(small, monkeypatch, tmp_path, capsys):
    measured = list(memory.peaks(memory.load(None, torch.float32)[0], 192))
    monkeypatch.setattr(memory, "peaks", lambda model, tokens: iter(measured))
    memory.main(["--tokens", "192", "--out", str(tmp_path)])
    page = (tmp_path / "memory.md").read_text()
    assert page == capsys.readouterr().out
    assert len(re.findall(r"^\| .* \| [\d,]+ \| [\d,]+ \|$", page, re.MULTILINE)) == len(memory.METHODS) == 12
    names = ["inference", "AdamW", "LoRA", "modules", "slices", "forward", "inference4", "QLoRA", "sliced4", "scales4"]
    held, found = {}, {}
    for name, (_, weights, peak) in zip([*names, "side", "late"], measured, strict=True):
        held[name], found[name] = weights, peak
    assert held["inference4"] < 0.3 * held["inference"]
    assert found["slices"] < found["AdamW"] and found["modules"] < found["AdamW"] and found["LoRA"] < found["AdamW"]
    assert found["inference"] < found["forward"] < found["LoRA"]
    assert found["inference4"] < found["QLoRA"] and max(found["side"], found["late"]) < found["QLoRA"]
    assert found["QLoRA"] < found["LoRA"] and found["sliced4"] < found["slices"]
