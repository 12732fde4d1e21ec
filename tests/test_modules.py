"""Does `param_groups` sort the parameters of real and odd models as their authors would?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

from misa_kernels.modules import param_groups

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
    # Vision: class, patch and position embedding, first norm; 6 biases and 2 norms a layer; last norm. Projector.
    "LLaVA": Expected(
        llava,
        stack("model.vision_tower.encoder.layers", CLIP, CLIP) | stack("model.language_model.layers", LLAMA, LLAMA),
        (3 + 2 + 2 * 10 + 2) + 4 + LLAMA_REST,
        {
            "model.vision_tower.embeddings.class_embedding": "model.vision_tower.encoder.layers.0",
            "model.vision_tower.embeddings.patch_embedding.weight": "model.vision_tower.encoder.layers.0",
            "model.vision_tower.post_layernorm.weight": "model.language_model.layers.0",
            "model.multi_modal_projector.linear_1.weight": "model.language_model.layers.0",
            "model.language_model.embed_tokens.weight": "model.language_model.layers.0",
            "model.language_model.norm.weight": None,
            "lm_head.weight": None,
        },
    ),
    # Patch embedding; 4 biases and 2 norms a layer; merger of a norm and two linear ones. Qwen2 as above.
    "Qwen2-VL": Expected(
        qwen2_vl,
        stack("model.visual.blocks", *2 * [["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]])
        | stack("model.language_model.layers", LLAMA, LLAMA),
        (1 + 2 * 8 + 6) + LLAMA_REST + 2 * 3,
        {
            "model.visual.patch_embed.proj.weight": "model.visual.blocks.0",
            "model.visual.merger.mlp.0.weight": "model.language_model.layers.0",
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
            hidden_size=16,
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
    # The weight-normed convolution between the stacks consists of two 3-D tensors, and is none of their layers.
    "wav2vec 2.0": Expected(
        wav2vec2,
        stack("wav2vec2.feature_extractor.conv_layers", ["conv"], ["conv"])
        | stack(
            "wav2vec2.encoder.layers",
            *2
            * [
                ["attention.k_proj", "attention.v_proj", "attention.q_proj", "attention.out_proj"]
                + ["feed_forward.intermediate_dense", "feed_forward.output_dense"]
            ],
        ),
        1 + 2 + 4 + 3 + 2 + 2 * 10 + 2,
        {
            "wav2vec2.feature_extractor.conv_layers.0.layer_norm.weight": "wav2vec2.feature_extractor.conv_layers.0",
            "wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1": "wav2vec2.encoder.layers.0",
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
        stack(
            "resnet.encoder.stages",
            ["layers.0.layer.0.convolution", "layers.0.layer.1.convolution"],
            ["layers.0.shortcut.convolution", "layers.0.layer.0.convolution", "layers.0.layer.1.convolution"]
            + ["layers.1.layer.0.convolution", "layers.1.layer.1.convolution"],
        ),
        3 + 2 * 2 + 2 * 5 + 2,
        {
            "resnet.embedder.embedder.convolution.weight": "resnet.encoder.stages.0",
            "resnet.encoder.stages.1.layers.0.shortcut.normalization.bias": "resnet.encoder.stages.1",
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


def flat(groups: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """One value a parameter, by the parameter's name."""
    return {
        name: group["role"] if key == "role" else group[key][i]
        for group in groups
        for i, (name, _) in enumerate(group["params"])
    }


def sampled_modules(groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Names of the sampled modules of each layer, as often as they are named."""
    layers: dict[str, list[str]] = {}
    for group in groups:
        if group["role"] == "sampled":
            for entry, layer in zip(group["modules"], group["layers"], strict=True):
                layers.setdefault(layer, []).extend([entry] if isinstance(entry, str) else entry)
    return layers


@pytest.mark.parametrize("expected", MODELS.values(), ids=MODELS.keys())
def test_the_modules_of_each_layer(expected: Expected):
    found = {layer: set(names) for layer, names in sampled_modules(param_groups(expected.build())).items()}
    wanted = {
        layer: {f"{layer}.{name}" if name else layer for name in names} for layer, names in expected.layers.items()
    }
    assert found == wanted
    assert list(found) == list(wanted)


@pytest.mark.parametrize("expected", MODELS.values(), ids=MODELS.keys())
def test_the_rest_is_frozen_or_dense_by_mode(expected: Expected):
    model = expected.build()
    for mode, role in (("finetune", "frozen"), ("pretrain", "dense")):
        rest = [group for group in param_groups(model, mode) if group["role"] != "sampled"]
        assert [(group["role"], len(group["params"])) for group in rest] == [(role, expected.rest)]


@pytest.mark.parametrize("expected", MODELS.values(), ids=MODELS.keys())
def test_lowest_layers(expected: Expected):
    layers = flat(param_groups(expected.build(), "pretrain"), "layers")
    assert {name: layers[name] for name in expected.lowest} == expected.lowest


@pytest.mark.parametrize("build", [*(expected.build for expected in MODELS.values()), lora], ids=[*MODELS, "LoRA"])
@pytest.mark.parametrize("options", [{}, {"mode": "pretrain", "experts": "whole"}], ids=["defaults", "others"])
def test_every_parameter_once_and_nothing_changed(build: Callable[[], nn.Module], options: dict[str, str]):
    model = build()
    before = {name: (p, p.requires_grad, p._version) for name, p in model.named_parameters()}
    groups = param_groups(model, **options)
    listed = [pair for group in groups for pair in group["params"]]
    assert sorted(name for name, _ in listed) == sorted(before)
    for name, param in listed:
        assert param is before[name][0]
        assert (param.requires_grad, param._version) == before[name][1:]
    for group in groups:
        assert list(group) == ["params", "role", "modules", "layers"]
        assert len(group["params"]) == len(group["modules"]) == len(group["layers"]) > 0
    # torch's optimizers take the groups as they are.
    torch.optim.SGD(groups, lr=0.1)


TOKENS = torch.tensor([[3, 1, 4, 1, 5]])
IMAGE = {"input_ids": torch.tensor([[3, 31, 31, 31, 31, 5]]), "pixel_values": torch.ones(1, 3, 8, 8)}
INPUTS = {
    "LLaMA": {"input_ids": TOKENS},
    "GPT-2": {"input_ids": TOKENS},
    "BERT": {"input_ids": TOKENS},
    "T5": {"input_ids": TOKENS, "decoder_input_ids": TOKENS},
    "LLaVA": IMAGE,
}
# The norm behind LLaVA's vision tower takes part in nothing.
UNUSED = {"model.vision_tower.post_layernorm.weight", "model.vision_tower.post_layernorm.bias"}


@pytest.mark.parametrize("name", INPUTS)
def test_layers_are_where_autograd_says(name: str):
    expected = MODELS[name]
    model = expected.build().eval()
    reached: list[str] = []

    def note(layer: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                reached.append(layer)

        return hook

    for layer in expected.layers:
        model.get_submodule(layer).register_forward_hook(note(layer))
    lowest = flat(param_groups(model), "layers")
    model.requires_grad_(False)
    for parameter, layer in lowest.items():
        if parameter not in UNUSED:
            reached.clear()
            model.get_parameter(parameter).requires_grad_(True)
            model(**INPUTS[name])
            model.get_parameter(parameter).requires_grad_(False)
            assert (reached[0] if reached else None) == layer, parameter


def test_an_expert_is_one_module_of_two_tensors():
    model = MODELS["Mixtral"].build()
    modules = flat(param_groups(model), "modules")
    names = ["model.layers.1.mlp.experts.0", "model.layers.1.mlp.experts.1", "model.layers.1.mlp.experts.2"]
    assert modules["model.layers.1.mlp.experts.gate_up_proj"] == names
    assert modules["model.layers.1.mlp.experts.down_proj"] == names
    assert modules["model.layers.1.mlp.gate.weight"] == "model.layers.1.mlp.gate"


def test_stacks_of_experts_as_a_whole():
    modules = flat(param_groups(MODELS["GPT-OSS"].build(), experts="whole"), "modules")
    for weight in ("gate_up_proj", "down_proj"):
        assert modules[f"model.layers.0.mlp.experts.{weight}"] == f"model.layers.0.mlp.experts.{weight}"


def test_a_single_expert_is_no_stack():
    model = nn.ModuleList([MODELS["Mixtral"].build().model.layers[0]])
    experts = model[0].mlp.experts
    experts.gate_up_proj = nn.Parameter(torch.zeros(1, 48, 16))
    assert flat(param_groups(model), "modules")["0.mlp.experts.gate_up_proj"] == "0.mlp.experts.gate_up_proj"


def test_quantised_and_user_frozen_parameters_stay_frozen():
    model = MODELS["LLaMA"].build()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[1].mlp
    attention.q_proj.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    mlp.up_proj.weight.requires_grad_(False)
    model.model.norm.weight.requires_grad_(False)
    groups = param_groups(model, "pretrain", dense=[model.model.layers[1].mlp])
    assert [name for name, role in flat(groups, "role").items() if role == "frozen"] == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
    ]
    # What is frozen keeps its place, so that the layers stay in order.
    assert groups[-1]["layers"] == ["model.layers.0", "model.layers.1", None]
    assert mlp.up_proj.weight.requires_grad is False
    assert sum(len(names) for names in sampled_modules(groups).values()) == 14 - 1 - 3


def test_lora_trains_its_adapters():
    model = lora()
    attention = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.default"
    wanted = [attention.format(n, m, side) for n in (0, 1) for m in ("q_proj", "v_proj") for side in ("A", "B")]
    groups = param_groups(model)
    assert [name for names in sampled_modules(groups).values() for name in names] == wanted
    assert list(sampled_modules(groups)) == ["base_model.model.model.layers.0", "base_model.model.model.layers.1"]
    assert [(g["role"], len(g["params"])) for g in groups] == [("sampled", 8), ("frozen", 14 + LLAMA_REST)]


def test_dense_by_module_and_by_parameter():
    model = MODELS["BERT"].build()
    bias = model.bert.encoder.layer[1].output.dense.bias
    groups = param_groups(model, dense=iter([model.classifier, model.bert.pooler.dense.weight, bias]))
    assert [name for name, role in flat(groups, "role").items() if role == "dense"] == [
        "bert.encoder.layer.1.output.dense.bias",
        "bert.pooler.dense.weight",
        "classifier.weight",
        "classifier.bias",
    ]
    assert groups[1]["layers"] == ["bert.encoder.layer.1", None, None, None]
    assert groups[1]["modules"] == [name for name, _ in groups[1]["params"]]


def test_dense_takes_matrices_out_of_the_sampling():
    model = MODELS["LLaMA"].build()
    groups = param_groups(model, dense=[model.model.layers[0]])
    assert list(sampled_modules(groups)) == ["model.layers.1"]
    assert len(groups[1]["params"]) == 9


def test_dense_head_that_is_tied():
    model = MODELS["LLaMA, tied"].build()
    (pair,) = param_groups(model, dense=[model.lm_head])[1]["params"]
    assert pair[0] == "model.embed_tokens.weight" and pair[1] is model.lm_head.weight


def test_a_layer_shared_by_two_stacks_counts_where_it_comes_first():
    a, shared, b = Block(), Block(), Block()
    model = nn.ModuleDict({"a": nn.ModuleList([a, shared]), "b": nn.ModuleList([shared, b])})
    assert sampled_modules(param_groups(model)) == {"a.0": ["a.0.mix"], "a.1": ["a.1.mix"], "b.1": ["b.1.mix"]}


def frozen_head() -> dict[str, Any]:
    model = Staged()
    model.out.requires_grad_(False)
    return {"model": model, "dense": [model.out]}


ERRORS = {
    "mode": (
        lambda: {"model": Staged(), "mode": "train"},
        ValueError,
        "mode='train' must be 'finetune' (the rest is frozen) or 'pretrain' (the rest is dense)",
    ),
    "experts": (
        lambda: {"model": Staged(), "experts": "all"},
        ValueError,
        "experts='all' must be 'each' (an expert is a module) or 'whole' (a stack of them is)",
    ),
    "model": (
        lambda: {"model": list(Staged().parameters())},
        TypeError,
        "model is list and must be an nn.Module: pass the model itself",
    ),
    "name": (
        lambda: {"model": Staged(), "dense": ["out"]},
        TypeError,
        "dense[0] is str and must be a module or a parameter of the model: pass the object itself, not its name",
    ),
    "module without list": (
        lambda: {"model": Staged(), "dense": nn.Linear(2, 2)},
        TypeError,
        "dense is a single Linear and must be a list: write dense=[...]",
    ),
    "parameter without list": (
        lambda: {"model": Staged(), "dense": nn.Parameter(torch.zeros(2))},
        TypeError,
        "dense is a single Parameter and must be a list: write dense=[...]",
    ),
    "another model's": (
        lambda: {"model": Staged(), "dense": [Staged().out]},
        ValueError,
        "dense[0], Linear of 10 elements, must lie in the model: take it from the one given to param_groups",
    ),
    "frozen": (
        frozen_head,
        ValueError,
        "dense[0], Linear of 10 elements, must hold a floating-point parameter with requires_grad=True to train: "
        "set that, or leave it out",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(arguments: Callable[[], dict[str, Any]], error: type[Exception], message: str):
    with pytest.raises(error) as raised:
        param_groups(**arguments())
    assert str(raised.value) == message


def test_twenty_thousand_parameters_of_one_module_do_not_take_quadratic_time():
    model = nn.Module()
    model.weights = nn.ParameterList(nn.Parameter(torch.zeros(2, 2)) for _ in range(20_000))
    start = time.process_time()
    groups = param_groups(model)
    assert time.process_time() - start < 5
    assert len(groups[0]["params"]) == 20_000
    assert groups[0]["layers"][:2] == ["weights.0", "weights.1"]
