"""What the planner says of a model against what models of transformers have, and what training them takes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from benchmarks.memory import PeakMemory
from misa_kernels import MISA, ImportanceSampler, badam, lisa, param_groups
from misa_kernels.planner import methods
from misa_kernels.planner.methods import Options, memory
from misa_kernels.planner.shapes import LINEARS, PRESETS, LlamaShape, from_config, read

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
# Every type that is known, with the fields that change its parameters.
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "head_dim": 8, "attention_bias": True, "mlp_bias": True}),
    ("mistral", {"head_dim": 24}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 32}),
    ("qwen3", {"attention_bias": True}),
    ("smollm3", {}),
    ("smollm3", {"tie_word_embeddings": False, "mlp_bias": True}),
    ("gemma", {"head_dim": 32}),
    ("gemma3_text", {"head_dim": 32, "attention_bias": True}),
    ("gemma3_text", {}),
]


def config_of(kind: str, **changes: Any) -> Any:
    return transformers.AutoConfig.for_model(kind, **SIZES | changes)


@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_parameters_are_those_of_transformers(tmp_path, kind, changes):
    config = config_of(kind, **changes)
    # What is planned is read from the file, where fields at their defaults may be missing.
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shape = read(str(tmp_path))
    assert shape.numel == sum(param.numel() for param in model.parameters())
    assert read(str(tmp_path / "config.json")) == shape
    layer = model.model.layers[-1]
    assert shape.layer_numel == sum(param.numel() for param in layer.parameters())
    linears = {name.rpartition(".")[2]: part for name, part in layer.named_modules() if hasattr(part, "in_features")}
    assert shape.matrices == {name: (linears[name].out_features, linears[name].in_features) for name in LINEARS}


def test_every_known_type_is_tried():
    from misa_kernels.planner import shapes

    assert {kind for kind, _ in KINDS} == set(shapes._TYPES)
