"""Does MISA train peft's adapters: one module each, in its layer, and nothing else than what peft trains?"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import TEXT, Block
from torch import nn

from misa_kernels import MISA, CyclicSampler, UniformSampler, param_groups

LAYER = "base_model.model.model.layers.{}"
Q, DOWN = f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.down_proj"
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))


def adapted(config: Any = None, **options: Any) -> peft.PeftModel:
    """A LLaMA with adapters on a matrix of 16 x 16 and one of 24 x 16 in each of two layers."""
    options = {"target_modules": ["q_proj", "down_proj"], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama(), (config or peft.LoraConfig)(**options))
    torch.manual_seed(1)
    for param in model.parameters():
        # LoRA's B starts at zero, and nothing would pass through it to A.
        if param.requires_grad and not param.any():
            nn.init.normal_(param, std=0.1)
    return model


def sampled(groups: list[dict[str, Any]]) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of the sampled tensors by the module that they make."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for group in groups:
        if group["role"] == "sampled":
            for (_, param), module in zip(group["params"], group["modules"], strict=True):
                found.setdefault(module, []).append(tuple(param.shape))
    return found


def names(groups: list[dict[str, Any]], role: str) -> list[str]:
    return [name for group in groups if group["role"] == role for name, _ in group["params"]]


def both(q: list[tuple[int, ...]], down: list[tuple[int, ...]]) -> dict[str, list[tuple[int, ...]]]:
    return {place.format(n): shapes for n in (0, 1) for place, shapes in ((Q, q), (DOWN, down))}


def only(q: list[tuple[int, ...]]) -> dict[str, list[tuple[int, ...]]]:
    return {Q.format(n): q for n in (0, 1)}


# Shapes as the papers of the methods have them, for 16 -> 16 and 24 -> 16 features.
LORA = both([(2, 16), (16, 2)], [(2, 24), (16, 2)])
KINDS = {
    "LoRA": (peft.LoraConfig, {"r": 2}, LORA),
    "LoRA with biases": (
        peft.LoraConfig,
        {"r": 2, "lora_bias": True},
        both([(2, 16), (16, 2), (16,)], [(2, 24), (16, 2), (16,)]),
    ),
    "DoRA": (peft.LoraConfig, {"r": 2, "use_dora": True}, both([(2, 16), (16, 2), (16,)], [(2, 24), (16, 2), (16,)])),
    "AdaLoRA": (
        peft.AdaLoraConfig,
        {"init_r": 2, "total_step": 10},
        both([(2, 16), (16, 2), (2, 1)], [(2, 24), (16, 2), (2, 1)]),
    ),
    "LoHa": (
        peft.LoHaConfig,
        {"r": 2},
        both([(16, 2), (2, 16), (16, 2), (2, 16)], [(16, 2), (2, 24), (16, 2), (2, 24)]),
    ),
    "LoKr": (peft.LoKrConfig, {"r": 2}, both([(4, 4), (4, 4)], [(4, 4), (4, 2), (2, 6)])),
    "IA3": (peft.IA3Config, {"feedforward_modules": ["down_proj"]}, both([(16, 1)], [(1, 24)])),
    "VeRA": (peft.VeraConfig, {"r": 2, "target_modules": ["q_proj"]}, only([(16,), (2,)])),
    "OFT": (peft.OFTConfig, {"r": 0, "oft_block_size": 4, "target_modules": ["q_proj"]}, only([(4, 6)])),
    # The bank of vectors that all places share is none of theirs. Three dimensions, and no experts.
    "VB-LoRA": (
        peft.VBLoRAConfig,
        {"r": 2, "num_vectors": 8, "vector_length": 4, "target_modules": ["q_proj"]},
        only([(2, 4, 8), (4, 2, 8)]),
    ),
}


@pytest.mark.parametrize(("config", "options", "expected"), KINDS.values(), ids=KINDS.keys())
def test_an_adapter_is_one_module_in_its_layer(config: type, options: dict[str, Any], expected: dict[str, Any]):
    model = adapted(config, **options)
    groups = param_groups(model)
    found = sampled(groups)
    assert {module: sorted(shapes) for module, shapes in found.items()} == {
        module: sorted(shapes) for module, shapes in expected.items()
    }
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    assert sorted(names(groups, "sampled") + names(groups, "dense")) == sorted(trained)
    assert len(names(groups, "dense")) == (config is peft.VBLoRAConfig)
    optimizer = MISA(groups, delta=1.0)
    assert [module.layer for module in optimizer.modules] == [int(module.split("layers.")[1][0]) for module in found]
    assert optimizer._partition.layers == [LAYER.format(0), LAYER.format(1)]
    assert optimizer._partition.total_numel == sum(model.get_parameter(name).numel() for name in trained)


def test_delta_is_a_fraction_of_what_peft_trains():
    # 2 layers x 2 x (16 + 16) and 2 x 2 x (24 + 16), rank 2: 288 parameters of 4,000 in all.
    optimizer = MISA(param_groups(adapted(r=2)), delta=0.5)
    assert (optimizer._partition.total_numel, optimizer._partition.budget) == (288, 144)
    assert sum(optimizer.modules[number].numel for number in optimizer.active) <= 144


def test_several_adapters_are_named_and_an_inactive_one_stays_frozen():
    model = adapted(r=2)
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["q_proj"]))
    groups = param_groups(model)
    q = [Q.format(n) + ".default" for n in (0, 1)]
    assert list(sampled(groups)) == [q[0], DOWN.format(0), q[1], DOWN.format(1)]
    second = {n: p.detach().clone() for n, p in model.named_parameters() if ".second." in n}
    assert len(second) == 4
    optimizer = MISA(groups, lr=0.1, delta=0.5, inner_steps=1)
    learn(model, optimizer, 6)
    optimizer.release()
    for name, before in second.items():
        param = model.get_parameter(name)
        assert torch.equal(param, before) and not param.requires_grad
    model.base_model.set_adapter(["default", "second"])
    assert {Q.format(0) + ".default", Q.format(0) + ".second"} < set(sampled(param_groups(model)))


def test_what_peft_trains_beside_the_layers_is_dense():
    model = adapted(r=2, modules_to_save=["lm_head"], target_modules=["q_proj", "embed_tokens"])
    groups = param_groups(model)
    assert list(sampled(groups)) == [Q.format(0), Q.format(1)]
    assert names(groups, "dense") == [
        "base_model.model.model.embed_tokens.lora_embedding_A.default",
        "base_model.model.model.embed_tokens.lora_embedding_B.default",
        "base_model.model.lm_head.modules_to_save.default.weight",
    ]
    # Backward must reach the bottom for the embedding's sake, and no layer for the head's.
    assert [group for group in groups if group["role"] == "dense"][0]["layers"] == [*2 * [LAYER.format(0)], None]


def test_a_head_with_children_is_no_stack_of_layers():
    config = transformers.RobertaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    )
    model = peft.get_peft_model(
        transformers.RobertaForSequenceClassification(config),
        peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]),
    )
    groups = param_groups(model)
    layers = {layer for group in groups for layer in group["layers"]}
    assert layers == {*(f"base_model.model.roberta.encoder.layer.{n}" for n in (0, 1)), None}
    assert len(sampled(groups)) == 2
    assert len(names(groups, "dense")) == 4


def test_a_matrix_of_the_base_that_is_trained_too_is_its_own_module():
    model = adapted(r=2)
    model.get_submodule(Q.format(0)).base_layer.weight.requires_grad_(True)
    assert set(sampled(param_groups(model))) == {*LORA, Q.format(0) + ".base_layer"}


def test_without_a_stack_an_adapted_matrix_is_a_layer():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["0", "2", "4"]))
    groups = param_groups(model)
    places = [f"base_model.model.net.{n}" for n in (0, 2, 4)]
    assert list(sampled(groups)) == places
    assert [dict.fromkeys(group["layers"]) for group in groups] == 2 * [dict.fromkeys(places)]


def test_an_adapted_projector_is_no_stack_of_layers():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projector = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4))
            self.stages = nn.ModuleList([Block(), Block()])

    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["projector.0", "projector.2", "mix"]))
    groups = param_groups(model)
    assert list(sampled(groups)) == [f"base_model.model.stages.{n}.mix" for n in (0, 1)]
    assert len(names(groups, "dense")) == 4


def test_a_layer_that_is_trained_whole_is_a_layer_still():
    model = nn.Sequential(nn.Embedding(5, 4), Block(), Block(), nn.LayerNorm(4), nn.Linear(4, 5))
    config = peft.LoraConfig(r=2, target_modules=["1.mix"], modules_to_save=["2"])
    groups = param_groups(peft.get_peft_model(model, config))
    layers = [f"base_model.model.{n}" for n in (1, 2)]
    assert list(sampled(groups)) == [f"{layers[0]}.mix", f"{layers[1]}.modules_to_save.default.mix"]
    assert groups[0]["layers"] == [layers[0], *2 * layers[:1], layers[1]][1:]


def test_dense_takes_an_adapter():
    model = adapted(r=2)
    groups = param_groups(model, dense=[model.get_submodule(Q.format(0))])
    assert set(sampled(groups)) == set(LORA) - {Q.format(0)}
    assert len(names(groups, "dense")) == 2


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, between: Callable[[], None] | None = None):
    """Train on one text; `between` runs before each forward pass."""
    for _ in range(steps):
        if between is not None:
            between()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in peft.get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_delta_of_one_is_adamw(options: dict[str, Any]):
    results = []
    for build in (
        lambda model: MISA(param_groups(model), lr=1e-2, delta=1.0, weight_decay=0.1),
        lambda model: torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, weight_decay=0.1),
    ):
        model = adapted(r=2, **options)
        before = adapters(model)
        learn(model, build(model), 5)
        results.append(adapters(model))
        assert all((results[-1][name] - before[name]).abs().max() > 1e-3 for name in before)
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-5, atol=1e-6)


def test_a_step_changes_the_active_adapters_and_nothing_else():
    model = adapted(r=2)
    optimizer = MISA(param_groups(model), lr=1e-2, delta=0.5, inner_steps=2)
    seen = set()
    for _ in range(8):
        own = {optimizer.modules[number].name for number in optimizer.active}
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        learn(model, optimizer, 1)
        changed = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
        assert changed == {f"{module}.{side}.default.weight" for module in own for side in ("lora_A", "lora_B")}
        seen |= own
    assert seen == set(LORA)


def test_importance_is_that_of_both_matrices():
    model = adapted(r=2)
    # One round of all modules and one step, so that G / (1 - beta) is the squared norm of the step.
    optimizer = MISA(param_groups(model), lr=1e-2, delta=1.0, inner_steps=1)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    expected = {
        module: sum(
            float(model.get_parameter(f"{module}.{side}.default.weight").grad.double().square().sum())
            for side in ("lora_A", "lora_B")
        )
        for module in LORA
    }
    optimizer.step()
    for module in LORA:
        a, b = (
            optimizer.state[model.get_parameter(f"{module}.{side}.default.weight")]["importance"].item()
            for side in ("lora_A", "lora_B")
        )
        assert a == b == pytest.approx((1 - 0.8) * expected[module], rel=1e-5)


@pytest.mark.parametrize("sampler", [UniformSampler, CyclicSampler])
def test_whole_layers_of_adapters(sampler: type):
    optimizer = MISA(param_groups(adapted(r=2)), delta=0.5, inner_steps=1, sampler=sampler(granularity="layer"))
    assert [(module.name, module.numel) for module in optimizer.modules] == [
        (LAYER.format(0), 144),
        (LAYER.format(1), 144),
    ]


def test_merging_and_saving_after_release(tmp_path: Path):
    model = adapted(r=2)
    optimizer = MISA(param_groups(model), lr=1e-2, delta=0.5, inner_steps=2)
    learn(model, optimizer, 5)
    optimizer.release()
    assert all(param.requires_grad == ("lora_" in name) for name, param in model.named_parameters())
    with torch.no_grad():
        trained = model(input_ids=TOKENS).logits
        untrained = adapted(r=2)(input_ids=TOKENS).logits
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
        assert torch.equal(loaded(input_ids=TOKENS).logits, trained)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=TOKENS).logits, trained, rtol=1e-4, atol=1e-5)
    assert (untrained - trained).abs().max() > 1e-2


def test_saving_in_mid_round_changes_nothing(tmp_path: Path):
    runs = []
    for saves in (False, True):
        model = adapted(r=2)
        save = partial(model.save_pretrained, tmp_path) if saves else None
        learn(model, MISA(param_groups(model), lr=1e-2, delta=0.5, inner_steps=2), 5, save)
        runs.append(adapters(model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_reference_pass_without_adapters_changes_no_weight():
    """As DPO does: peft then makes all adapters require gradients again, which costs memory and no result."""
    runs = []
    for disable in (False, True):
        model = adapted(r=2)

        def reference(model: Any = model) -> None:
            with torch.no_grad(), model.disable_adapter():
                model(input_ids=TOKENS)

        learn(model, MISA(param_groups(model), lr=1e-2, delta=0.5, inner_steps=2), 6, reference if disable else None)
        runs.append(adapters(model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_peft_is_not_imported_by_the_package():
    code = (
        "import sys, torch, misa_kernels\n"
        "misa_kernels.param_groups(torch.nn.Sequential(torch.nn.Linear(2, 2)))\n"
        "sys.exit('peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
