"""Are the bytes that backward keeps counted as they are, and what does the record of slices beside LoRA hold?"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.train import e2e, e2e_table, slices
from benchmarks.train.trainers import PLANS

TINY = replace(PLANS["tiny"], turns=1, checkpointing=False, lora_rank=1)


def test_kept_are_the_inputs_of_layers_and_whole_where_a_part_of_them_is_kept() -> None:
    first, second = nn.Linear(8, 16, bias=False), nn.Linear(4, 2, bias=False)
    x = torch.zeros(5, 8)
    # The first layer's input, and of its output, whose first columns are the second's input, all; no weight.
    assert slices.kept_bytes(nn.Sequential(first, Columns(), second), x) == 4 * 5 * (8 + 16)
    # Nothing is asked of the first layer.
    assert slices.kept_bytes(nn.Sequential(first.requires_grad_(False), Columns(), second), x) == 4 * 5 * 16


class Columns(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :4]


def test_slices_keep_their_columns_alone() -> None:
    kept = {name: slices.kept_by(name, TINY, 2) for name in ("adamw", "misa", "misa_slices")}
    assert kept["misa_slices"]["kept_bytes"] < 0.75 * kept["adamw"]["kept_bytes"]
    model = e2e.build_model(TINY, torch.device("cpu"))
    budget = TINY.delta * sum(weight.numel() for weight in model.parameters())
    assert all(0.7 * budget < kept[name]["trained"] <= budget for name in ("misa", "misa_slices"))


@pytest.mark.slow
def test_the_record_has_all_peers_and_both_goals() -> None:
    pytest.importorskip("peft")
    *_, content = slices.measure(TINY, math.inf)
    (shape,) = content["shapes"]
    peers = shape["peers"]
    assert list(peers) == list(slices.NAMES)
    found = {line["goal"]: line for line in content["goals"]}
    kept = found["kept for backward, misa_slices / lora"]
    assert kept["value"] == peers["misa_slices"]["kept_bytes"] / peers["lora"]["kept_bytes"] < 1
    assert kept["limit"] == 0.75 and found["tokens/s, misa_slices / lora"]["limit"] == 1.25
    # As many parameters in adapters of the down projections alone, but for less than a rank.
    trained = [peers[name]["trained"] for name in ("lora_down", "lora")]
    assert trained[0] <= trained[1] < trained[0] + 4 * (32 + 88)
    lines = e2e_table.lines(content)
    megabytes = f"{peers['misa_slices']['kept_bytes'] / 1e6:.1f}"
    assert any(line.startswith("| misa_slices |") and line.endswith(f"| {megabytes} |") for line in lines)


@pytest.mark.slow
def test_compiled_layers_are_measured_beside_eager_ones() -> None:
    torch._dynamo.reset()
    # Each with a model of its own, which begins alike.
    plan = replace(TINY, dtype="float32", together=True)
    *_, content = slices.measure_compiled(plan, math.inf)
    (shape,) = content["shapes"]
    assert list(shape["peers"]) == list(slices.BESIDE_COMPILED)
    losses = {name: peer["loss"] for name, peer in shape["peers"].items()}
    for name in ("adamw", "misa_slices"):
        assert losses[f"{name}_compiled"] == pytest.approx(losses[name], rel=1e-5)
    # Layers were compiled, and those of eager peers were not.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    (goal,) = (line for line in content["goals"] if line["goal"] == "tokens/s, misa_slices_compiled / misa_slices")
    assert goal["limit"] == 1.0
    model = e2e.build_model(TINY, torch.device("cpu"))
    peer = e2e.begin(model, e2e.tokens_of(TINY, torch.device("cpu")), "misa_slices_compiled", TINY, 0)
    assert all(layer._compiled_call_impl is not None for layer in model.layers)
    peer.close()
    assert all(layer._compiled_call_impl is None for layer in model.layers)
