"""Does `param_groups` sort the parameters of real and odd models as their authors would?"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import LLAMA_REST, MODELS, Block, Expected, Staged, lora
from torch import nn

from misa_kernels.draw.groups import param_groups


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
        assert list(group)[:4] == ["params", "role", "modules", "layers"]
        assert len(group["params"]) == len(group["modules"]) == len(group["layers"]) > 0
        is_users = group["role"] == "frozen" and not all(param.requires_grad for _, param in group["params"])
        assert len(group.get("thawed", [])) in ({len(group["params"])} if is_users else {0})
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
    # Twice each, for A and for B; tests/integrations/test_peft.py has the rest.
    attention = "base_model.model.model.layers.{}.self_attn.{}"
    wanted = [attention.format(n, m) for n in (0, 1) for m in ("q_proj", "q_proj", "v_proj", "v_proj")]
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


def half_foreign() -> dict[str, Any]:
    model = Staged()
    return {"model": model, "dense": [nn.Sequential(model.out, nn.Linear(2, 5))]}


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
    "partly another model's": (
        half_foreign,
        ValueError,
        "dense[0], Sequential of 25 elements, must lie in the model: take it from the one given to param_groups",
    ),
    "frozen": (
        frozen_head,
        ValueError,
        "dense[0], Linear of 10 elements, must hold a parameter with requires_grad=True to train: set that, or leave "
        "it out",
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
