"""Are quantised weights left alone by bit, whatever MISA trains around them or in adapters on top of them?"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import peft
import pytest
import tiny
import torch
from libraries import required
from torch import Tensor, nn

from misa_kernels import MISA, param_groups

LAYERS, WIDTH, HIDDEN = 2, 64, 128
QUANTISED = ("q", "gate")


def bitsandbytes(make: Callable[[Any, nn.Linear], nn.Linear]) -> nn.Module:
    bnb = required("bitsandbytes")
    model = tiny.build(LAYERS, width=WIDTH, hidden=HIDDEN)
    for block in model.blocks:
        for name in QUANTISED:
            # The move to a device is what quantises.
            setattr(block, name, make(bnb, getattr(block, name)).to("cpu"))
    return model


def four_bits(bnb: Any, linear: nn.Linear) -> nn.Linear:
    quantised = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32)
    quantised.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    return quantised


def eight_bits(bnb: Any, linear: nn.Linear) -> nn.Linear:
    quantised = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
    quantised.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    return quantised


def torchao_int8() -> nn.Module:
    quantization = required("torchao.quantization")
    model = tiny.build(LAYERS, width=WIDTH, hidden=HIDDEN)
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and name.rpartition(".")[2] in QUANTISED,
    )
    return model


MODELS = {
    "bitsandbytes, 4 bits": lambda: bitsandbytes(four_bits),
    "bitsandbytes, 8 bits": lambda: bitsandbytes(eight_bits),
    "torchao, int8": torchao_int8,
}
build = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


def base_weights(model: nn.Module) -> list[nn.Parameter]:
    """The quantised weights, in order of layers."""
    bare = [module.base_layer if hasattr(module, "base_layer") else module for module in model.modules()]
    kinds = [m for m in bare if isinstance(m, nn.Linear) and type(getattr(m, "weight", None)) is not nn.Parameter]
    return [module.weight for module in dict.fromkeys(kinds)]


def bits(weight: Tensor) -> list[Tensor]:
    """Copies of the plain tensors that a weight consists of."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight.detach().as_subclass(Tensor).clone()]
    return [getattr(weight, name).clone() for name in weight.__tensor_flatten__()[0]]


def check_untouched(model: nn.Module, groups: list[dict[str, Any]], **options: Any) -> MISA:
    """Train, and see that the quantised weights keep their bits and flags and everything sampled changes."""
    weights = base_weights(model)
    assert len(weights) == LAYERS * len(QUANTISED)
    before = [bits(weight) for weight in weights]
    sampled = {n: p.detach().clone() for g in groups if g["role"] == "sampled" for n, p in g["params"]}
    assert sampled and not {id(weight) for weight in weights} & {id(model.get_parameter(name)) for name in sampled}
    flags = {name: param.requires_grad for name, param in model.named_parameters()}
    optimizer = MISA(groups, lr=1e-2, inner_steps=1, **options)
    for step in range(12):
        tiny.train(model, optimizer, 1, start=step)
        assert not any(weight.requires_grad or weight.grad is not None for weight in weights)
    optimizer.release()
    assert {name: param.requires_grad for name, param in model.named_parameters()} == flags
    assert [id(weight) for weight in base_weights(model)] == [id(weight) for weight in weights]
    for weight, old in zip(weights, before, strict=True):
        assert all(map(torch.equal, bits(weight), old))
    unchanged = [name for name, old in sampled.items() if torch.equal(model.get_parameter(name), old)]
    assert not unchanged
    return optimizer


@build
def test_adapters_on_quantised_weights(build: Callable[[], nn.Module]):
    model = peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=[*QUANTISED]))
    assert not any(type(module) is nn.Linear for name, module in model.named_modules() if name.endswith(".q"))
    optimizer = check_untouched(model, param_groups(model), delta=0.5)
    places = [f"base_model.model.blocks.{n}.{name}" for n in range(LAYERS) for name in QUANTISED]
    assert [module.name for module in optimizer.modules] == places
    # Rank 2, for q of 64 -> 64 and gate of 64 -> 128.
    assert optimizer._partition.total_numel == LAYERS * 2 * (64 + 64 + 64 + 128)


@build
def test_the_rest_of_a_model_with_quantised_weights(build: Callable[[], nn.Module]):
    model = build()
    optimizer = check_untouched(model, param_groups(model), delta=0.5)
    rest = [f"blocks.{n}.{name}" for n in range(LAYERS) for name in ("k", "v", "o", "up", "down")]
    assert [module.name for module in optimizer.modules] == rest
    # Embedding, head, two norms a layer and the last one, and what is sampled.
    norms, sampled = (2 * LAYERS + 1) * 2 * WIDTH, LAYERS * (3 * WIDTH**2 + 2 * WIDTH * HIDDEN)
    assert optimizer._partition.total_numel == 2 * tiny.VOCABULARY * WIDTH + norms + sampled


@build
def test_quantised_weights_without_param_groups(build: Callable[[], nn.Module]):
    model = build()
    with pytest.warns(UserWarning, match="by their shapes alone"):
        optimizer = MISA(model.named_parameters(), delta=0.5)
    names = {module.name for module in optimizer.modules}
    assert "blocks.0.k.weight" in names and not names & {f"blocks.0.{name}.weight" for name in QUANTISED}
    assert not any(weight.requires_grad for weight in base_weights(model))


def test_a_quantised_weight_that_asks_for_gradients_is_refused_in_a_sentence():
    model = torchao_int8()
    model.blocks[1].gate.weight.requires_grad_(True)
    message = "blocks.1.gate.weight is a Int8Tensor and must be a plain tensor or a DTensor to be sampled: freeze it"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        MISA(param_groups(model), delta=0.5)
    model.blocks[1].gate.weight.requires_grad_(False)
    MISA(param_groups(model), delta=0.5)
