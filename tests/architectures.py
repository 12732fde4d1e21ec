"""Models of many architectures, and what we read off their definitions by eye."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
import transformers
from torch import nn

transformers.logging.set_verbosity_error()

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
T5 = {"vocab_size": 32, "d_model": 16, "d_ff": 24, "num_heads": 4, "d_kv": 4}
VISION = {k: v for k, v in SIZES.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LLAMA = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
CLIP = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
GPT2 = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
BERT = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
BERT += ["intermediate.dense", "output.dense"]
T5_ATTENTION = ["layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"]
T5_ATTENTION += ["layer.0.SelfAttention.o"]
T5_ENCODER = [*T5_ATTENTION, "layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"]
T5_DECODER = [*T5_ATTENTION, "layer.1.EncDecAttention.q", "layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"]
T5_DECODER += ["layer.1.EncDecAttention.o", "layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo"]
SWITCH = ["router.classifier", "experts.expert_0.wi", "experts.expert_0.wo", "experts.expert_1.wi"]
SWITCH += ["experts.expert_1.wo"]
SWITCH_ENCODER = [*T5_ATTENTION, *(f"layer.1.mlp.{name}" for name in SWITCH)]
SWITCH_DECODER = [*T5_DECODER[:8], *(f"layer.2.mlp.{name}" for name in SWITCH)]
EXPERTS = ["mlp.experts.0", "mlp.experts.1", "mlp.experts.2"]
RESNET = ["layer.0.convolution", "layer.1.convolution"]
POSITIONS = "wav2vec2.encoder.pos_conv_embed.conv"
MAMBA = ["mixer.A_log", "mixer.conv1d", "mixer.in_proj", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"]


class Block(nn.Module):
    """A layer by another name, with a bias and a norm."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(self.norm(x))


class Mixer(Block):
    """A layer of another class."""


class Staged(nn.Module):
    """No transformer, and nothing in it is called a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.stages = nn.Sequential(Block(), Mixer(), Block())
        self.out = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.stages(self.stem(x)))


class Attention(nn.Module):
    """A layer that holds matrices of its own and in a list: nothing but the structure tells what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(5, 4))
        self.heads = nn.ParameterList([nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.zeros(4, 2))])
        self.attention = nn.MultiheadAttention(4, 2)


class Raw(nn.Module):
    """Parameters without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.first = nn.Parameter(torch.zeros(3, 4))
        self.second = nn.Parameter(torch.zeros(4, 2))
        self.bias = nn.Parameter(torch.zeros(2))


def pairs_in_lists() -> nn.Module:
    """Each layer is a bare ModuleList of an attention and a feed-forward module."""
    layers = [nn.ModuleList([nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), Block()]) for _ in range(2)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers)})


def lora() -> nn.Module:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(**VISION)
    text = transformers.LlamaConfig(**TEXT)
    # The last hidden state, so that all vision layers are in use.
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=31, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0]}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(text_config={**TEXT, "rope_scaling": rope}, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)


def gpt_oss() -> nn.Module:
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**TEXT, num_local_experts=3, head_dim=4))


def wav2vec2() -> nn.Module:
    convolutions = {"conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2]}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**SIZES, **convolutions, **positions))


def causal(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A decoder by the prefix of its classes' names."""
    config, model = getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")
    return lambda: model(config(**TEXT, **options))


def make(model: type, config: type, **options: Any) -> Callable[[], nn.Module]:
    return lambda: model(config(**options))


@dataclass(frozen=True)
class Expected:
    """What we read off a model's definition by eye.

    Attributes:
        build: Makes the model.
        layers: The layers in order, each with the modules in it, named from the layer on.
        rest: How many other parameters there are.
        lowest: The layer that some parameters belong to or stand in front of; None behind the last.
    """

    build: Callable[[], nn.Module]
    layers: dict[str, list[str]]
    rest: int
    lowest: dict[str, str | None] = field(default_factory=dict)


def stack(path: str, *layers: list[str]) -> dict[str, list[str]]:
    return {f"{path}.{number}": modules for number, modules in enumerate(layers)}


DECODER = {
    "model.embed_tokens.weight": "model.layers.0",
    "model.layers.0.input_layernorm.weight": "model.layers.0",
    "model.layers.1.mlp.down_proj.weight": "model.layers.1",
    "model.norm.weight": None,
    "lm_head.weight": None,
}
MOE = {k: v for k, v in DECODER.items() if "mlp" not in k}
# Embedding, two norms a layer, last norm, head.
LLAMA_REST = 7

MODELS = {
    "LLaMA": Expected(causal("Llama"), stack("model.layers", LLAMA, LLAMA), LLAMA_REST, DECODER),
    "LLaMA, tied": Expected(
        causal("Llama", tie_word_embeddings=True),
        stack("model.layers", LLAMA, LLAMA),
        LLAMA_REST - 1,
        {k: v for k, v in DECODER.items() if "lm_head" not in k},
    ),
    "LLaMA, one layer": Expected(
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TEXT, "num_hidden_layers": 1})),
        stack("model.layers", LLAMA),
        LLAMA_REST - 2,
    ),
    "Mistral": Expected(causal("Mistral"), stack("model.layers", LLAMA, LLAMA), LLAMA_REST, DECODER),
    # Biases of q, k and v.
    "Qwen2": Expected(causal("Qwen2"), stack("model.layers", LLAMA, LLAMA), LLAMA_REST + 2 * 3, DECODER),
    # Norms of q and k.
    "Qwen3": Expected(causal("Qwen3", head_dim=4), stack("model.layers", LLAMA, LLAMA), LLAMA_REST + 2 * 2, DECODER),
    # Two embeddings, of them one tied to the head; 4 biases and 2 norms of 2 tensors a layer; last norm.
    "GPT-2": Expected(
        make(
            transformers.GPT2LMHeadModel,
            transformers.GPT2Config,
            vocab_size=32,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=16,
            bos_token_id=None,
            eos_token_id=None,
        ),
        stack("transformer.h", GPT2, GPT2),
        2 + 2 * 8 + 2,
        {
            "transformer.wte.weight": "transformer.h.0",
            "transformer.wpe.weight": "transformer.h.0",
            "transformer.h.1.mlp.c_fc.bias": "transformer.h.1",
            "transformer.ln_f.weight": None,
        },
    ),
    # Three embeddings and their norm; 6 biases and 2 norms a layer; pooler and classifier with biases.
    "BERT": Expected(
        make(transformers.BertForSequenceClassification, transformers.BertConfig, **SIZES),
        stack("bert.encoder.layer", BERT, BERT),
        5 + 2 * 10 + 4,
        {
            "bert.embeddings.token_type_embeddings.weight": "bert.encoder.layer.0",
            "bert.embeddings.LayerNorm.bias": "bert.encoder.layer.0",
            "bert.pooler.dense.weight": None,
            "classifier.weight": None,
        },
    ),
    # Shared embedding; in each stack one relative bias, 2 or 3 norms a layer, a last norm.
    "T5": Expected(
        make(transformers.T5ForConditionalGeneration, transformers.T5Config, num_layers=2, **T5),
        stack("encoder.block", T5_ENCODER, T5_ENCODER) | stack("decoder.block", T5_DECODER, T5_DECODER),
        1 + (1 + 2 * 2 + 1) + (1 + 2 * 3 + 1),
        {
            "shared.weight": "encoder.block.0",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "encoder.block.0",
            "encoder.final_layer_norm.weight": "decoder.block.0",
            "decoder.block.1.layer.2.layer_norm.weight": "decoder.block.1",
            "decoder.final_layer_norm.weight": None,
        },
    ),
    "T5, one layer": Expected(
        make(transformers.T5ForConditionalGeneration, transformers.T5Config, num_layers=1, **T5),
        stack("encoder.block", T5_ENCODER) | stack("decoder.block", T5_DECODER),
        1 + (1 + 2 + 1) + (1 + 3 + 1),
    ),
    # Vision: class, patch and position embedding, first norm; 6 biases and 2 norms a layer; last norm. Two biases of
    # the projector, which lies between layers.
    "LLaVA": Expected(
        llava,
        stack("model.vision_tower.encoder.layers", CLIP, CLIP)
        | {f"model.multi_modal_projector.linear_{n}": [""] for n in (1, 2)}
        | stack("model.language_model.layers", LLAMA, LLAMA),
        (3 + 2 + 2 * 10 + 2) + 2 + LLAMA_REST,
        {
            "model.vision_tower.embeddings.class_embedding": "model.vision_tower.encoder.layers.0",
            "model.vision_tower.embeddings.patch_embedding.weight": "model.vision_tower.encoder.layers.0",
            "model.vision_tower.post_layernorm.weight": "model.multi_modal_projector.linear_1",
            "model.multi_modal_projector.linear_1.bias": "model.multi_modal_projector.linear_1",
            "model.language_model.embed_tokens.weight": "model.language_model.layers.0",
            "model.language_model.norm.weight": None,
            "lm_head.weight": None,
        },
    ),
    # Patch embedding; 4 biases and 2 norms a layer; of the merger, between the towers, a norm and two biases. Qwen2 as
    # above.
    "Qwen2-VL": Expected(
        qwen2_vl,
        stack("model.visual.blocks", *2 * [["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]])
        | {f"model.visual.merger.mlp.{n}": [""] for n in (0, 2)}
        | stack("model.language_model.layers", LLAMA, LLAMA),
        (1 + 2 * 8 + 4) + LLAMA_REST + 2 * 3,
        {
            "model.visual.patch_embed.proj.weight": "model.visual.blocks.0",
            "model.visual.merger.ln_q.weight": "model.visual.merger.mlp.0",
            "model.visual.merger.mlp.2.weight": "model.visual.merger.mlp.2",
        },
    ),
    "Mixtral": Expected(
        causal("Mixtral", num_local_experts=3),
        stack("model.layers", *2 * [[*ATTENTION, "mlp.gate", *EXPERTS]]),
        LLAMA_REST,
        MOE,
    ),
    "Qwen3-MoE": Expected(
        causal("Qwen3Moe", num_experts=3, moe_intermediate_size=8),
        stack("model.layers", *2 * [[*ATTENTION, "mlp.gate", *EXPERTS]]),
        LLAMA_REST + 2 * 2,
        MOE,
    ),
    # A layer has 4 biases and sinks in attention, one of the router, and those of the experts, stacked twice.
    "GPT-OSS": Expected(
        gpt_oss,
        stack("model.layers", *2 * [[*ATTENTION, "mlp.router", *EXPERTS]]),
        LLAMA_REST + 2 * (5 + 1 + 2),
        {**MOE, "model.layers.1.mlp.experts.gate_up_proj_bias": "model.layers.1"},
    ),
    # Experts are modules in a dict, and each stack has a single layer.
    "Switch Transformer, one layer": Expected(
        make(
            transformers.SwitchTransformersForConditionalGeneration,
            transformers.SwitchTransformersConfig,
            **T5,
            num_layers=1,
            num_decoder_layers=1,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            num_experts=2,
        ),
        stack("encoder.block", SWITCH_ENCODER) | stack("decoder.block", SWITCH_DECODER),
        1 + (1 + 2 + 1) + (1 + 3 + 1),
    ),
    # One layer, used twice.
    "ALBERT": Expected(
        make(transformers.AlbertModel, transformers.AlbertConfig, **SIZES, embedding_size=8),
        stack(
            "encoder.albert_layer_groups",
            [f"albert_layers.0.{m}" for m in ["attention.query", "attention.key", "attention.value", "attention.dense"]]
            + ["albert_layers.0.ffn", "albert_layers.0.ffn_output"],
        ),
        5 + 2 + 10 + 2,
        {"encoder.embedding_hidden_mapping_in.weight": "encoder.albert_layer_groups.0", "pooler.bias": None},
    ),
    # A norm, D and the biases of conv1d and dt_proj a layer; embedding, tied to the head, and last norm.
    "Mamba": Expected(
        make(
            transformers.MambaForCausalLM,
            transformers.MambaConfig,
            vocab_size=32,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=4,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        ),
        stack("backbone.layers", MAMBA, MAMBA),
        2 * 4 + 2,
        {"backbone.embeddings.weight": "backbone.layers.0", "backbone.norm_f.weight": None},
    ),
    # Between the stacks lie a projection and a weight-normed convolution, whose norms are a vector.
    "wav2vec 2.0": Expected(
        wav2vec2,
        stack("wav2vec2.feature_extractor.conv_layers", ["conv"], ["conv"])
        | {"wav2vec2.feature_projection.projection": [""]}
        | {POSITIONS: ["parametrizations.weight"]}
        | stack(
            "wav2vec2.encoder.layers",
            *2
            * [
                ["attention.k_proj", "attention.v_proj", "attention.q_proj", "attention.out_proj"]
                + ["feed_forward.intermediate_dense", "feed_forward.output_dense"]
            ],
        ),
        1 + 2 + 3 + 2 + 2 + 2 * 10 + 2,
        {
            "wav2vec2.feature_extractor.conv_layers.0.layer_norm.weight": "wav2vec2.feature_extractor.conv_layers.0",
            f"{POSITIONS}.parametrizations.weight.original0": POSITIONS,
            "lm_head.bias": None,
        },
    ),
    "ResNet": Expected(
        make(
            transformers.ResNetForImageClassification,
            transformers.ResNetConfig,
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 2],
            layer_type="basic",
        ),
        stack("resnet.encoder.stages.0.layers", RESNET)
        | stack("resnet.encoder.stages.1.layers", ["shortcut.convolution", *RESNET], RESNET),
        3 + 2 * 2 + 2 * 5 + 2,
        {
            "resnet.embedder.embedder.convolution.weight": "resnet.encoder.stages.0.layers.0",
            "resnet.encoder.stages.1.layers.0.shortcut.normalization.bias": "resnet.encoder.stages.1.layers.0",
            "classifier.1.weight": None,
        },
    ),
    "stages of two classes": Expected(
        Staged,
        stack("stages", ["mix"], ["mix"], ["mix"]),
        2 + 3 * 3 + 2,
        {"stem.weight": "stages.0", "stages.1.norm.bias": "stages.1", "out.weight": None},
    ),
    "a pipeline in one Sequential": Expected(
        lambda: nn.Sequential(nn.Embedding(5, 4), Block(), Block(), nn.LayerNorm(4), nn.Linear(4, 5)),
        {"1": ["mix"], "2": ["mix"]},
        1 + 2 * 3 + 2 + 2,
        {"0.weight": "1", "3.weight": None, "4.weight": None},
    ),
    "Sequential of backbone and head": Expected(
        lambda: nn.Sequential(Staged(), nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2))),
        stack("0.stages", ["mix"], ["mix"], ["mix"]),
        13 + 4,
        {"1.1.weight": None},
    ),
    "towers in a ModuleDict": Expected(
        lambda: nn.ModuleDict({"a": Staged(), "b": nn.Sequential(Mixer(), Mixer())}),
        stack("a.stages", ["mix"], ["mix"], ["mix"]) | stack("b", ["mix"], ["mix"]),
        13 + 6,
        {"a.out.weight": "b.0"},
    ),
    "towers of one class in a ModuleDict": Expected(
        lambda: nn.ModuleDict({"a": Staged(), "b": Staged()}),
        stack("a.stages", ["mix"], ["mix"], ["mix"]) | stack("b.stages", ["mix"], ["mix"], ["mix"]),
        13 + 13,
        {"a.out.weight": "b.stages.0"},
    ),
    "a Sequential of stages": Expected(
        lambda: nn.Sequential(nn.Sequential(Block(), Block()), nn.Sequential(Block(), Block())),
        {"0": ["0.mix", "1.mix"], "1": ["0.mix", "1.mix"]},
        4 * 3,
    ),
    # Three-dimensional, but a convolution's all the same.
    "a weight-normed convolution": Expected(
        lambda: nn.ModuleList([nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 5)), Block())]),
        {"0": ["0.parametrizations.weight", "1.mix"]},
        2 + 3,
    ),
    "layers in a ModuleDict": Expected(
        lambda: nn.ModuleDict({"in": nn.Linear(4, 4), "one": Block(), "two": Block()}),
        {"one": ["mix"], "two": ["mix"]},
        2 + 6,
        {"in.weight": "one"},
    ),
    "a ModuleDict as a name space": Expected(
        lambda: nn.ModuleDict({"wte": nn.Embedding(5, 4), "h": nn.ModuleList([Block()]), "ln_f": nn.LayerNorm(4)}),
        {"h.0": ["mix"]},
        1 + 3 + 2,
        {"wte.weight": "h.0", "ln_f.weight": None},
    ),
    "layers as lists": Expected(
        pairs_in_lists,
        stack("layers", ["0.1", "1.mix"], ["0.1", "1.mix"]),
        2 * (2 + 1 + 3),
        {"layers.1.1.norm.weight": "layers.1"},
    ),
    "a layer with dropped neighbours": Expected(
        lambda: nn.ModuleList([nn.Identity(), Block(), nn.Identity(), Block()]), {"1": ["mix"], "3": ["mix"]}, 6
    ),
    "matrices without modules of their own": Expected(
        lambda: nn.ModuleList([Attention()]),
        {"0": ["position", "heads.0", "heads.1", "attention.in_proj_weight", "attention.out_proj"]},
        2,
    ),
    "no stack": Expected(
        lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.ReLU(), nn.LayerNorm(3), nn.Linear(3, 2)),
        {"1": [""], "4": [""]},
        1 + 1 + 2 + 1,
        {"0.weight": "1", "1.bias": "1", "3.weight": "4", "4.bias": "4"},
    ),
    # Of which matrix the vectors are is unknown: the lowest is on the safe side.
    "no modules": Expected(
        Raw, {"first": [""], "second": [""]}, 2, {"scale": "first", "second": "second", "bias": "first"}
    ),
    "a norm alone": Expected(lambda: nn.LayerNorm(4), {}, 2, {"weight": None, "bias": None}),
}
