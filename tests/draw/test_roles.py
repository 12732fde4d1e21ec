"""Is each tensor taken for what it is, by its shape, its owner and what lies beside it?"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from misa_kernels import MISA, param_groups

WIDTH, INNER, EXPERTS = 16, 24, 4


class Layer(nn.Module):
    """A norm and a feed-forward network, with tensors beside them."""

    def __init__(self, **tensors: torch.Tensor | nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        for name, tensor in tensors.items():
            setattr(self, name, tensor if isinstance(tensor, nn.Module) else nn.Parameter(tensor))


class Bank(nn.Module):
    """A module of nothing but tensors."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))


def sampled(make: Callable[[], nn.Module], **options: Any) -> dict[str, tuple[str, ...]]:
    """Which tensors of the second of two layers are sampled beside its network, and as which modules."""
    groups = param_groups(nn.ModuleList([make(), make()]), **options)
    return {
        found.name.removeprefix("1."): tuple(name.removeprefix("1.") for name in found.modules)
        for found in groups.found
        if found.role == "sampled" and found.layer == "1" and found.name not in ("1.up.weight", "1.down.weight")
    }


VECTORS = {
    "a scale a head": (4, 1, 1),
    "a mix of time": (1, 1, WIDTH),
    "a scale a channel": (WIDTH, 1, 1),
    "a column": (WIDTH, 1),
    "a single number": (1, 1),
}
TABLES = {
    "relative positions of heads": (49, 4),
    "relative positions of a head's width": (13, 4),
    "biases a head": (4, 4),
    "segments": (2, 4, 4),
    "positions with an axis for the batch": (1, 6, WIDTH),
}
MATRICES = {
    "a square": (WIDTH, WIDTH),
    "to a low rank": (3, WIDTH),
    "by heads": (WIDTH, 4, 4),
    "a kernel": (WIDTH, WIDTH, 3),
    "the blocks of a diagonal": (4, 4, 4),
    "of the inner width": (INNER, 5),
}


@pytest.mark.parametrize("shape", [*VECTORS.values(), *TABLES.values()], ids=[*VECTORS, *TABLES])
def test_what_is_no_matrix_is_not_sampled(shape: tuple[int, ...]):
    assert sampled(lambda: Layer(own=torch.zeros(shape))) == {}
    assert sampled(lambda: Layer(own=Bank(first=shape, second=shape))) == {}
    groups = param_groups(nn.ModuleList([Layer(own=torch.zeros(shape)) for _ in range(2)]), "pretrain")
    assert {found.role for found in groups.found if found.name.endswith("own")} == {"dense"}


@pytest.mark.parametrize("shape", MATRICES.values(), ids=MATRICES)
def test_what_is_a_matrix_is_sampled_whole(shape: tuple[int, ...]):
    assert sampled(lambda: Layer(own=torch.zeros(shape))) == {"own": ("own",)}


def test_vectors_of_known_modules():
    found = sampled(
        lambda: Layer(attention=nn.MultiheadAttention(WIDTH, 2, add_bias_kv=True), ff=weight_norm(nn.Linear(16, 16)))
    )
    assert found == {
        "attention.in_proj_weight": ("attention.in_proj_weight",),
        "attention.out_proj.weight": ("attention.out_proj",),
        "ff.parametrizations.weight.original1": ("ff.parametrizations.weight",),
    }


UP, DOWN = (EXPERTS, 2 * INNER, WIDTH), (EXPERTS, WIDTH, INNER)
EACH = tuple(f"experts.{expert}" for expert in range(EXPERTS))
BANKS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[str, ...]]]] = {
    "two stacks": (
        lambda: Layer(experts=Bank(up=UP, down=DOWN)),
        {"experts.up": EACH, "experts.down": EACH},
    ),
    "one stack and a router": (
        lambda: Layer(experts=Bank(both=DOWN), router=nn.Linear(WIDTH, EXPERTS)),
        {"experts.both": EACH, "router.weight": ("router",)},
    ),
    "one stack, and nothing that says so": (
        lambda: Layer(experts=Bank(both=DOWN)),
        {"experts.both": ("experts",)},
    ),
    "with a bias each": (
        lambda: Layer(experts=Bank(up=UP, up_bias=UP[:2], down=DOWN, down_bias=DOWN[:2])),
        {"experts.up": EACH, "experts.down": EACH},
    ),
    "with a router in the same module": (
        lambda: Layer(experts=Bank(gate=(EXPERTS, WIDTH), up=UP, down=DOWN)),
        {"experts.gate": ("experts.gate",), "experts.up": EACH, "experts.down": EACH},
    ),
    "with biases and a router in the same module": (
        lambda: Layer(experts=Bank(gate=(EXPERTS, WIDTH), up=UP, up_bias=UP[:2], down=DOWN, down_bias=DOWN[:2])),
        {"experts.gate": ("experts.gate",), "experts.up": EACH, "experts.down": EACH},
    ),
    "with biases, and a router elsewhere": (
        lambda: Layer(experts=Bank(up=UP, bias=UP[:2], down=DOWN), router=nn.Linear(WIDTH, EXPERTS)),
        {"experts.up": EACH, "experts.down": EACH, "router.weight": ("router",)},
    ),
    "as many as another module's": (
        lambda: Layer(experts=Bank(a=(4, INNER, WIDTH), b=(4, WIDTH, INNER), c=(3, INNER, WIDTH), d=(3, WIDTH, INNER))),
        {
            **{f"experts.{name}": tuple(f"experts.{name}.{n}" for n in range(4)) for name in "ab"},
            **{f"experts.{name}": tuple(f"experts.{name}.{n}" for n in range(3)) for name in "cd"},
        },
    ),
    "two matrices by heads, as wide as the stream": (
        lambda: Layer(own=Bank(query=(WIDTH, 4, 4), key=(WIDTH, 4, 4))),
        {"own.query": ("own.query",), "own.key": ("own.key",)},
    ),
}


@pytest.mark.parametrize(("make", "found"), BANKS.values(), ids=BANKS)
def test_experts_need_evidence(make: Callable[[], nn.Module], found: dict[str, tuple[str, ...]]):
    assert sampled(make) == found
    whole = {name: modules if len(modules) == 1 else (name,) for name, modules in found.items()}
    assert sampled(make, experts="whole") == whole


class Adapted(nn.Linear):
    """A linear layer with an adapter of its own, and a frozen weight."""

    def __init__(self, reads: int, writes: int) -> None:
        super().__init__(reads, writes)
        self.a, self.b = nn.Parameter(torch.zeros(4, reads)), nn.Parameter(torch.zeros(writes, 4))
        self.scale = nn.Parameter(torch.zeros(writes, 1))
        self.weight.requires_grad_(False)


def test_tensors_beside_the_weight_of_a_known_class():
    assert sampled(lambda: Layer(own=Adapted(WIDTH, INNER))) == {"own.a": ("own.a",), "own.b": ("own.b",)}


def test_splines_by_the_outputs_are_no_experts():
    """As in efficient-kan: of two matrices and a tensor of three axes, as many rows each, nothing tells of experts."""
    model = nn.ModuleList(
        [Bank(base=(12, 8), spline=(12, 8, 5), scaler=(12, 8)), Bank(base=(8, 12), spline=(8, 12, 5))]
    )
    groups = param_groups(model)
    assert all(len(found.modules) == 1 for found in groups.found)
    assert {found.role for found in groups.found} == {"sampled"}


def test_complex_tensors_are_frozen_and_said():
    model = nn.ModuleList([Layer(filters=torch.zeros(WIDTH, 3, dtype=torch.complex64)) for _ in range(2)])
    with pytest.warns(UserWarning, match=r"0\.filters and 1 other tensors: MISA trains real tensors"):
        groups = param_groups(model, "pretrain")
    assert [found.why for found in groups.found if found.role == "frozen"] == ["complex64", "complex64"]
    MISA(groups, delta=0.5)


@pytest.mark.parametrize(
    "tuning",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    ],
    ids=["prompt tuning", "P-tuning"],
)
def test_prompts_of_peft_are_dense(tuning: Any):
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), tuning)
    roles = {found.role for found in param_groups(model).found if found.param.requires_grad}
    assert roles == {"dense"}


def overridden() -> nn.Module:
    return nn.ModuleDict({"emb": nn.Embedding(9, WIDTH), "layers": nn.ModuleList([Layer(), Layer()]), "head": head()})


def head() -> nn.Module:
    return nn.Linear(WIDTH, 9)


def test_roles_that_the_user_names():
    model = overridden()
    first = model["layers"][0]
    groups = param_groups(model, sampled=[model["head"].weight], dense=[first.up], frozen=[first.down.weight])
    roles = {found.name: found.role for found in groups.found}
    assert {name for name, role in roles.items() if role == "sampled"} == {
        "layers.1.up.weight",
        "layers.1.down.weight",
        "head.weight",
    }
    assert {name for name, role in roles.items() if role == "dense"} == {"layers.0.up.weight", "layers.0.up.bias"}
    assert {found.why for found in groups.found if found.name == "head.weight"} == {"named in sampled=[...]"}
    assert {module.name for module in MISA(groups, delta=0.5).modules} == {"layers.1.up", "layers.1.down", "head"}


def test_layers_that_the_user_names():
    model = overridden()
    groups = param_groups(model, layers=[model["layers"][1]])
    assert groups.layers == ["layers.1"]
    assert {found.name for found in groups.found if found.role == "sampled"} == {
        "layers.1.up.weight",
        "layers.1.down.weight",
    }


ERRORS: dict[str, tuple[Callable[[nn.Module], dict[str, Any]], type[Exception], str]] = {
    "in two lists": (
        lambda model: {"sampled": [model["head"]], "frozen": [model["head"].bias]},
        ValueError,
        "frozen[0], Parameter of 9 elements, must not be in sampled, too: name it in one of the lists",
    ),
    "a name": (
        lambda model: {"frozen": ["head"]},
        TypeError,
        "frozen[0] is str and must be a module or a parameter of the model: pass the object itself, not its name",
    ),
    "a layer by its name": (
        lambda model: {"layers": ["layers.0"]},
        TypeError,
        "layers[0] is str and must be a module of the model",
    ),
    "another model's layer": (
        lambda model: {"layers": [Layer()]},
        ValueError,
        "layers[0], Layer, must lie in the model: take it from the one given to param_groups",
    ),
    "no layers": (
        lambda model: {"layers": []},
        ValueError,
        "layers is empty and must hold the modules that are the layers, or be left out to have them found",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(options: Callable[[nn.Module], dict[str, Any]], error: type[Exception], message: str):
    model = overridden()
    with pytest.raises(error) as raised:
        param_groups(model, **options(model))
    assert str(raised.value) == message


def test_the_table_of_what_was_found():
    model = overridden()
    model["layers"][1].norm.bias.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = str(param_groups(model, dense=[model["head"].weight])).splitlines()
    assert [" | ".join(part.strip() for part in line.split("  ") if part.strip()) for line in table] == [
        "layer | tensor | shape | role | why",
        "emb.weight | 9 x 16 | frozen | embedding",
        "layers.0-1 | norm.weight | 16 | frozen | vector of a layer",
        "layers.0 | norm.bias | 16 | frozen | vector of a layer",
        "layers.0-1 | up.weight | 24 x 16 | sampled | matrix of a layer, reads the stream as up",
        "layers.0-1 | up.bias | 24 | frozen | vector of a layer",
        "layers.0-1 | down.weight | 16 x 24 | sampled | matrix of a layer, writes the stream as down",
        "layers.0-1 | down.bias | 16 | frozen | vector of a layer",
        "layers.1 | norm.bias | 16 | frozen | you froze it (vector of a layer)",
        "head.weight | 9 x 16 | dense | named in dense=[...]",
        "head.bias | 9 | frozen | vector",
        "77.7% sampled (4 tensors), 7.3% dense (1 tensors), 15.0% frozen (10 tensors), in 2 layers",
    ]


def test_parts_of_a_layer():
    model = nn.ModuleList([Layer(attention=nn.MultiheadAttention(WIDTH, 2)) for _ in range(2)])
    found = {f.name: (f.stream, f.part) for f in param_groups(model).found if f.role == "sampled" and f.layer == "1"}
    assert found == {
        "1.up.weight": ("reads", "up"),
        "1.down.weight": ("writes", "down"),
        "1.attention.in_proj_weight": ("reads", "qkv"),
        "1.attention.out_proj.weight": ("writes", "output"),
    }


def test_parts_of_a_layer_without_a_norm():
    model = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 32), "down": nn.Linear(32, 8)}) for _ in range(2)])
    parts = [found.part for found in param_groups(model).found if found.role == "sampled"]
    assert parts == ["up", "down", "up", "down"]
