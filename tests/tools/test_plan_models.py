"""What the planner says of any model of transformers, against the model itself, built, run and measured on the CPU."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from benchmarks.memory import PeakMemory
from misa_kernels import MISA, param_groups
from misa_kernels.__main__ import main
from misa_kernels.tools.planner import dry
from misa_kernels.tools.planner.methods import METHODS, Setup, fit, memory
from misa_kernels.tools.planner.model import Model, build, load
from misa_kernels.tools.planner.shapes import LlamaShape, from_config

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEXT = SIZES | {"num_key_value_heads": 2}
WIDE = TEXT | {"head_dim": 8}
T5 = {"vocab_size": 96, "d_model": 32, "d_ff": 48, "num_heads": 4, "d_kv": 8, "num_layers": 2}
VISION = {key: value for key, value in SIZES.items() if key != "vocab_size"} | {"image_size": 16, "patch_size": 4}
ENCODER = {f"{part}_layers": 2 for part in ("encoder", "decoder")} | {"vocab_size": 96, "d_model": 32}
ENCODER |= {f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")}
ENCODER |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
SOUND = {"num_mel_bins": 8, "max_source_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WAVES = {"conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2]}
WAVES |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
DEEPSEEK = {"n_routed_experts": 4, "moe_intermediate_size": 16, "q_lora_rank": 8, "kv_lora_rank": 8}
DEEPSEEK |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 2, "topk_group": 1}
# Class, model type, fields of its configuration.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("llama", TEXT),
    "Gemma2ForCausalLM": ("gemma2", WIDE),
    "Gemma3ForCausalLM": ("gemma3_text", WIDE),
    "Phi3ForCausalLM": ("phi3", TEXT),
    "Olmo2ForCausalLM": ("olmo2", TEXT),
    "Starcoder2ForCausalLM": ("starcoder2", TEXT),
    "CohereForCausalLM": ("cohere", TEXT),
    "GPT2LMHeadModel": ("gpt2", GPT2),
    "GPTNeoXForCausalLM": ("gpt_neox", SIZES),
    "OPTForCausalLM": ("opt", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "BloomForCausalLM": ("bloom", SIZES),
    "FalconForCausalLM": ("falcon", SIZES),
    "MixtralForCausalLM": ("mixtral", TEXT | {"num_local_experts": 4}),
    "Qwen2MoeForCausalLM": ("qwen2_moe", TEXT | EXPERTS | {"shared_expert_intermediate_size": 16}),
    "Qwen3MoeForCausalLM": ("qwen3_moe", WIDE | EXPERTS),
    "GptOssForCausalLM": ("gpt_oss", WIDE | {"num_local_experts": 4}),
    "DeepseekV3ForCausalLM": ("deepseek_v3", TEXT | DEEPSEEK | {"num_experts_per_tok": 2, "first_k_dense_replace": 1}),
    "MambaForCausalLM": ("mamba", SIZES | {"state_size": 4}),
    "BertForSequenceClassification": ("bert", SIZES),
    "BertForMaskedLM": ("bert", SIZES),
    "RobertaForTokenClassification": ("roberta", SIZES),
    "DebertaV2ForQuestionAnswering": ("deberta-v2", SIZES),
    "ModernBertForMaskedLM": ("modernbert", SIZES),
    "AlbertForMaskedLM": ("albert", SIZES | {"embedding_size": 16}),
    "T5ForConditionalGeneration": ("t5", T5),
    "SwitchTransformersForConditionalGeneration": ("switch_transformers", T5 | {"num_experts": 4}),
    "BartForConditionalGeneration": ("bart", ENCODER),
    "WhisperForConditionalGeneration": ("whisper", ENCODER | SOUND | {"decoder_start_token_id": 1}),
    "Wav2Vec2ForCTC": ("wav2vec2", SIZES | WAVES),
    "ViTForImageClassification": ("vit", VISION),
    "LlamaForSequenceClassification": ("llama", TEXT),
}
# No dropout: the mask of GPUs has a byte an element, on CPUs it is as large as the input.
STILL = ("dropout", "dropout_rate", "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout")
STILL += ("activation_dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop")


def config_of(name: str, **changes: Any) -> Any:
    kind, fields = KINDS[name]
    config = transformers.AutoConfig.for_model(kind, **fields | changes)
    config.architectures = [name]
    for field in STILL:
        if hasattr(config, field):
            setattr(config, field, 0.0)
    return config


def planned(name: str, dtype: str = "float32", **changes: Any) -> Model:
    return build(config_of(name, **changes), dtype)


@pytest.mark.parametrize("name", KINDS)
def test_parameters_are_those_of_the_model_itself(tmp_path: Path, name: str) -> None:
    config_of(name).save_pretrained(tmp_path)
    model = load(str(tmp_path))
    assert isinstance(model, Model)
    real = getattr(transformers, name)(config_of(name))
    assert type(model.module) is type(real)
    # `parameters()` has what is tied once.
    assert model.numel == sum(param.numel() for param in real.parameters())
    groups = {group["role"]: sum(param.numel() for _, param in group["params"]) for group in param_groups(real)}
    said = model.summary(0.25)
    assert {role: said[role] for role in groups} == groups and said["dense"] == 0
    assert said["budget"] == model.numel // 4
    modules = MISA(param_groups(real), delta=1.0).modules
    assert said["modules"] == len(modules) and model.largest == max(module.numel for module in modules)
    plan = memory("AdamW", model, Setup(sequence=16))
    assert plan.weights == sum(param.nbytes for param in real.to(torch.bfloat16).parameters())
    assert plan.states == 12 * model.numel
    assert not [note for note in model.notes if "cannot be run" in note]


def test_classifiers_have_no_head_over_the_vocabulary() -> None:
    shape = from_config(config_of("LlamaForCausalLM").to_dict())
    classifier = planned("LlamaForSequenceClassification")
    assert classifier.numel == shape.numel - 96 * 32 + 2 * 32
    tied = planned("LlamaForCausalLM", tie_word_embeddings=True)
    assert tied.numel == shape.numel - 96 * 32
