"""Does `partition` cut param groups into the modules, roles and budget that they describe?"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from fractions import Fraction
from typing import Any

import pace
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from misa_kernels.draw.groups import param_groups
from misa_kernels.draw.partition import Block, Module, Partition, partition

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
# q and o 256, k and v 128, gate, up and down 384.
LLAMA_LAYER = 2 * 256 + 2 * 128 + 3 * 384
# Two layers with two norms, the last norm, embedding and head.
LLAMA = 2 * (LLAMA_LAYER + 2 * 16) + 16 + 2 * 512


def parameter(*shape: int, **options: Any) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape), **options)


def cut(groups: Any, delta: float = 0.5, granularity: str = "module", oversized: str = "error") -> Partition:
    """Partition what torch's optimizers make of parameters, named ones, or groups of either."""
    return partition(torch.optim.SGD(groups, lr=0.1).param_groups, delta, granularity, oversized)


def ranges(module: Module) -> list[tuple[int, int, int, int]]:
    return [(block.index, block.number, block.start, block.stop) for block in module.blocks]


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def test_llama():
    model = llama()
    result = cut(param_groups(model, dense=[model.model.layers[1].input_layernorm]))
    assert (result.total_numel, result.budget) == (LLAMA, LLAMA // 2)
    assert [module.name for module in result.modules[7:]] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert [module.numel for module in result.modules] == 2 * [256, 128, 128, 256, 384, 384, 384]
    assert [module.width for module in result.modules] == 2 * [16, 16, 16, 16, 16, 16, 24]
    assert [module.layer for module in result.modules] == 7 * [0] + 7 * [1]
    assert result.layers == ["model.layers.0", "model.layers.1"]
    assert [block.param for block in result.dense] == [model.model.layers[1].input_layernorm.weight]
    assert result.dense_layer == 1
    assert len(result.frozen) == 6
    assert result.split == []


def test_names_and_blocks_follow_the_optimizers_order():
    model = llama()
    groups = torch.optim.SGD(param_groups(model), lr=0.1).param_groups
    result = partition(groups, 0.5, "module", "error")
    order = [param for group in groups for param in group["params"]]
    assert [model.get_parameter(name) for name in result.names] == order
    for module in result.modules:
        (block,) = module.blocks
        assert block.param is order[block.index]
        assert (block.number, block.start, block.stop) == (0, 0, block.param.numel())


def test_the_experts_of_mixtral():
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3))
    modules = {module.name: module for module in cut(param_groups(model)).modules}
    experts = model.model.layers[1].mlp.experts
    for number in range(3):
        module = modules[f"model.layers.1.mlp.experts.{number}"]
        assert module.numel == 48 * 16 + 16 * 24
        assert module.layer == 1
        with torch.no_grad():
            for block in module.blocks:
                block.param.view(-1)[block.start : block.stop] = number + 1
    for stack in (experts.gate_up_proj, experts.down_proj):
        assert [expert.unique().tolist() for expert in stack] == [[1.0], [2.0], [3.0]]
    assert len(modules) == 2 * (4 + 1 + 3)


def test_granularity_layer_joins_all_modules_of_a_layer():
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3))
    first, second = cut(param_groups(model), granularity="layer").modules
    assert (first.name, second.name) == ("model.layers.0", "model.layers.1")
    assert (first.layer, second.layer) == (0, 1)
    assert first.numel == 2 * 256 + 2 * 128 + 3 * 16 + 3 * (48 * 16 + 16 * 24)
    # Experts that are always drawn together need no blocks of their own.
    assert len(first.blocks) == 4 + 1 + 2


def test_plain_parameters():
    params = [parameter(6, 5), parameter(4), parameter(2, 3, 4)]
    result = cut(params, delta=0.8)
    assert [(m.name, m.layer, ranges(m)) for m in result.modules] == [
        ("group 0, parameter 0", -1, [(0, 0, 0, 30)]),
        ("group 0, parameter 2", -1, [(2, 0, 0, 24)]),
    ]
    assert [m.width for m in result.modules] == [5, 4]
    assert result.frozen == [params[1]]
    assert result.dense == []
    assert (result.layers, result.dense_layer) == ([], None)
    assert (result.total_numel, result.budget) == (58, 46)


def test_named_parameters_in_two_groups():
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    groups = [{"params": list(first.named_parameters("a"))}, {"params": list(second.named_parameters("b"))}]
    result = cut(groups, delta=0.6)
    assert [module.name for module in result.modules] == ["a.weight", "b.weight"]
    assert result.names == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert [ranges(module) for module in result.modules] == [[(0, 0, 0, 12)], [(2, 0, 0, 8)]]


def test_delta_one_trains_vectors_as_well():
    params = [parameter(6, 5), parameter(4), parameter()]
    result = cut(params, delta=1.0)
    assert result.dense == [Block(params[1], 1, 0, 0, 4), Block(params[2], 2, 0, 0, 1)]
    # Which layer those lie in is unknown.
    assert result.dense_layer == -1
    assert result.frozen == []
    assert result.budget == result.total_numel == 35


def test_explicit_roles():
    vector, matrix, fixed, scalar = parameter(4), parameter(3, 3), parameter(2, 2), parameter()
    result = cut(
        [
            {"params": [vector, scalar], "role": "sampled"},
            {"params": [matrix], "role": "dense"},
            {"params": [fixed], "role": "frozen"},
        ],
        delta=1.0,
    )
    assert [module.name for module in result.modules] == ["group 0, parameter 0", "group 0, parameter 1"]
    assert [module.width for module in result.modules] == [4, 1]
    assert result.dense == [Block(matrix, 2, 0, 0, 9)]
    assert result.frozen == [fixed]
    assert result.total_numel == 4 + 1 + 9 + 4


def test_what_the_user_froze_stays_frozen_and_does_not_count():
    frozen, quantised = parameter(5, 5, requires_grad=False), nn.Parameter(torch.zeros(7, 7, dtype=torch.int8), False)
    empty, matrix = parameter(0, 3), parameter(2, 2)
    result = cut([{"params": [frozen, empty, matrix], "role": "sampled"}, {"params": [quantised]}], delta=1.0)
    assert [ranges(module) for module in result.modules] == [[(2, 0, 0, 4)]]
    assert result.frozen == [frozen, empty, quantised]
    assert result.total_numel == 4
    assert not frozen.requires_grad and matrix.requires_grad


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_given_twice_counts_at_its_first_place():
    one, two = parameter(3, 4), parameter(2, 4)
    result = cut([one, one, two], delta=1.0)
    assert [ranges(module) for module in result.modules] == [[(0, 0, 0, 12)], [(2, 0, 0, 8)]]
    assert result.total_numel == 20


def test_equal_names_join_in_order_of_first_appearance():
    a, b, c, d = parameter(4, 6), parameter(2, 3), parameter(6, 2), parameter(4, 9)
    groups = [
        {"params": [a, b], "modules": [["x", "y"], "z"], "layers": ["up", "low"]},
        {"params": [c, d], "modules": [["y", "x", "w"], "z"], "layers": ["low", "up"]},
    ]
    result = cut(groups, delta=1.0)
    assert [(module.name, ranges(module)) for module in result.modules] == [
        ("x", [(0, 0, 0, 12), (2, 1, 4, 8)]),
        ("y", [(0, 1, 12, 24), (2, 0, 0, 4)]),
        ("z", [(1, 0, 0, 6), (3, 0, 0, 36)]),
        ("w", [(2, 2, 8, 12)]),
    ]
    # The lowest of the layers that the tensors of a module lie in; "up" comes first here.
    assert [module.layer for module in result.modules] == [0, 0, 0, 1]
    assert [module.width for module in result.modules] == [6, 6, 9, 2]


def group(role: str, *layers: str | None, known: bool = True) -> dict[str, Any]:
    """A group of a 2 x 2 matrix for each of the layers."""
    made: dict[str, Any] = {"params": [parameter(2, 2) for _ in layers], "role": role}
    return made | ({"layers": list(layers)} if known else {})


LAYER_ORDERS = {
    "as they appear": ([group("sampled", "b", "a", "b", "c")], ["b", "a", "c"]),
    "sampled groups first": ([group("frozen", "a", "b", "c"), group("sampled", "c", "a")], ["c", "a", "b"]),
    "two sampled groups": ([group("sampled", "b", "d"), group("sampled", "a", "d", "c")], ["b", "d", "a", "c"]),
    "frozen layers between": (
        [group("sampled", "b", "d"), group("frozen", "a", "b", "c", "d", "e")],
        ["a", "b", "c", "d", "e"],
    ),
    "in several other groups": (
        [group("dense", "a", "a", "d"), group("sampled", "c", "e"), group("frozen", "b", "c", "d", None)],
        ["b", "a", "d", "c", "e"],
    ),
    "without layers": ([group("sampled", "a", known=False), group("dense", "b", known=False)], []),
    "some without layers": ([group("sampled", "a", known=False), group("dense", "b")], ["b"]),
}


@pytest.mark.parametrize(("groups", "layers"), LAYER_ORDERS.values(), ids=LAYER_ORDERS.keys())
def test_order_of_layers(groups: list[dict[str, Any]], layers: list[str]):
    result = cut(groups, delta=1.0)
    assert result.layers == layers
    for module in result.modules:
        sampled = [g for g in groups if g["role"] == "sampled" and "layers" in g]
        named = {id(p): layer for g in sampled for p, layer in zip(g["params"], g["layers"], strict=True)}
        layer = named.get(id(module.blocks[0].param))
        assert module.layer == (-1 if layer is None else layers.index(layer))


DENSE_LAYERS = {
    "embedding": (group("dense", "a", "c", None), 0),
    "norm in the middle": (group("dense", "b", "c"), 1),
    "head": (group("dense", None, None), None),
    "none": (group("frozen", "a"), None),
    "unknown": (group("dense", "x", known=False), -1),
}


@pytest.mark.parametrize(("dense", "lowest"), DENSE_LAYERS.values(), ids=DENSE_LAYERS.keys())
def test_lowest_layer_of_dense_parameters(dense: dict[str, Any], lowest: int | None):
    assert cut([group("sampled", "a", "b", "c"), dense], delta=1.0).dense_layer == lowest


@pytest.mark.parametrize("granularity", ["module", "layer"])
def test_a_sampled_head_is_a_layer_of_its_own(granularity: str):
    params = [("layer.weight", parameter(2, 2)), ("head.weight", parameter(2, 3))]
    groups = [{"params": params, "modules": ["layer", "head"], "layers": ["layer", None]}]
    result = cut(groups, delta=1.0, granularity=granularity)
    assert result.layers == ["layer", "head"]
    assert [(module.name, module.layer, module.numel) for module in result.modules] == [
        ("layer", 0, 4),
        ("head", 1, 6),
    ]


shapes = st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple)
tensors = st.tuples(shapes, st.booleans(), st.booleans(), st.booleans())
# A multiple of 1/64 times a small integer is exact in binary.
deltas = st.just(1.0) | st.integers(1, 64).map(lambda sixtyfourths: sixtyfourths / 64)


@given(
    st.lists(
        st.tuples(st.sampled_from([None, "sampled", "dense", "frozen"]), st.lists(tensors, max_size=4)), max_size=4
    ),
    deltas,
)
def test_totals_and_roles_by_brute_force(described: list[tuple[str | None, list[Any]]], delta: float):
    groups: list[dict[str, Any]] = []
    every: list[nn.Parameter] = []
    kinds: dict[str, list[int]] = {"sampled": [], "dense": [], "frozen": []}
    total = 0
    for role, members in described:
        params: list[nn.Parameter] = []
        for shape, trainable, integer, repeated in members:
            integer = integer and role in (None, "frozen")
            param = nn.Parameter(torch.zeros(shape, dtype=torch.uint8 if integer else torch.float32), False)
            if repeated and params:
                params.append(params[0])
            params.append(param)
            every.append(param)
            numel = math.prod(shape)
            if trainable and not integer:
                param.requires_grad_(True)
                total += numel
            if not trainable or integer or numel == 0 or role == "frozen":
                kind = "frozen"
            elif role is not None:
                kind = role
            elif len(shape) > 1:
                kind = "sampled"
            else:
                kind = "dense" if delta == 1 else "frozen"
            kinds[kind].append(id(param))
        groups.append({"params": params} | ({} if role is None else {"role": role}))
    flags = [param.requires_grad for param in every]
    budget = math.floor(Fraction(delta) * total)
    sizes = {id(param): param.numel() for param in every}
    if not kinds["sampled"] or max(sizes[i] for i in kinds["sampled"]) > budget:
        with pytest.raises(ValueError):
            partition(groups, delta, "module", "error")
        return
    result = partition(groups, delta, "module", "error")
    assert (result.total_numel, result.budget) == (total, budget)
    assert [id(module.blocks[0].param) for module in result.modules] == kinds["sampled"]
    assert [id(block.param) for block in result.dense] == kinds["dense"]
    assert [id(param) for param in result.frozen] == kinds["frozen"]
    assert [param.requires_grad for param in every] == flags


@given(st.integers(1, 60), st.lists(st.integers(1, 4), max_size=2), st.integers(0, 200), deltas)
def test_split_blocks_tile_the_tensor(rows: int, row: list[int], rest: int, delta: float):
    param, fixed = parameter(rows, *row), parameter(rest)
    row_numel = math.prod(row)
    budget = math.floor(Fraction(delta) * (rows * row_numel + rest))
    groups = [{"params": [param], "role": "sampled"}, {"params": [fixed], "role": "frozen"}]
    if row_numel > budget:
        with pytest.raises(ValueError, match="whose rows fit"):
            partition(groups, delta, "module", "split")
        return
    result = partition(groups, delta, "module", "split")
    blocks = [block for module in result.modules for block in module.blocks]
    assert len(blocks) == len(result.modules)
    covered = torch.zeros(param.numel(), dtype=torch.int64)
    for number, block in enumerate(blocks):
        assert block.param is param and block.number == number
        covered[block.start : block.stop] += 1
    assert covered.eq(1).all()
    lengths = [(block.stop - block.start) / row_numel for block in blocks]
    assert all(length.is_integer() for length in lengths)
    assert max(lengths) - min(lengths) <= 1
    assert max(module.numel for module in result.modules) <= budget
    fewest = next(pieces for pieces in range(1, rows + 1) if math.ceil(rows / pieces) * row_numel <= budget)
    assert len(blocks) == fewest
    assert result.split == (["group 0, parameter 0"] if fewest > 1 else [])


def test_names_of_split_blocks():
    group = {"params": [("embedding.weight", parameter(10, 3)), ("head.weight", parameter(4, 3))]}
    group |= {"modules": ["embedding", "head"], "layers": ["embedding", "head"]}
    result = cut([group], delta=0.3, oversized="split")
    assert result.budget == 12
    assert [(module.name, module.layer, ranges(module)) for module in result.modules] == [
        ("embedding[rows 0:3]", 0, [(0, 0, 0, 9)]),
        ("embedding[rows 3:6]", 0, [(0, 1, 9, 18)]),
        ("embedding[rows 6:10]", 0, [(0, 2, 18, 30)]),
        ("head", 1, [(1, 0, 0, 12)]),
    ]
    assert result.split == ["embedding"]


def matrices(*shapes: tuple[int, ...], **lists: Any) -> list[dict[str, Any]]:
    return [{"params": [(f"w{i}", parameter(*shape)) for i, shape in enumerate(shapes)], **lists}]


OVERSIZED = {
    "one": (
        matrices((60, 20), (40, 20), (50, 20)),
        {"delta": 0.35},
        "w0 has 1,200 parameters and must not exceed the budget of 1,050, delta=0.35 of 3,000: make the groups with "
        "param_groups(model), raise delta to 0.4, give it the role 'frozen', or cut it into row blocks with "
        "oversized='split'",
    ),
    "the largest of two": (
        matrices((60, 20), (40, 20), (51, 20)),
        {"delta": 0.3},
        "w0 (the largest of 2 such modules) has 1,200 parameters and must not exceed the budget of 906, delta=0.3 of "
        "3,020: make the groups with param_groups(model), raise delta to 0.3974, give it the role 'frozen', or cut "
        "it into row blocks with oversized='split'",
    ),
    "rows too large": (
        matrices((2, 300), (100, 4)),
        {"delta": 0.25, "oversized": "split"},
        "w0 has 600 parameters and must not exceed the budget of 250, delta=0.25 of 1,000, and oversized='split' cuts "
        "only single whole tensors whose rows fit: make the groups with param_groups(model), raise delta to 0.6, or "
        "give it the role 'frozen'",
    ),
    "row blocks": (
        matrices((60, 10), (40, 10), modules=[["a", "b"], "c"]),
        {"delta": 0.25, "oversized": "split"},
        "a (the largest of 2 such modules) has 300 parameters and must not exceed the budget of 250, delta=0.25 of "
        "1,000, and oversized='split' cuts only single whole tensors whose rows fit: make the groups with "
        "param_groups(model), raise delta to 0.3, or give it the role 'frozen'",
    ),
    "joined": (
        matrices((30, 10), (30, 10), (40, 10), modules=["a", "a", "b"]),
        {"delta": 0.5, "oversized": "split"},
        "a has 600 parameters and must not exceed the budget of 500, delta=0.5 of 1,000, and oversized='split' cuts "
        "only single whole tensors whose rows fit: make the groups with param_groups(model), raise delta to 0.6, or "
        "give it the role 'frozen'",
    ),
    "layer": (
        matrices((30, 10), (30, 10), (40, 10), layers=["a", "a", "b"]),
        {"delta": 0.5, "granularity": "layer"},
        "a has 600 parameters and must not exceed the budget of 500, delta=0.5 of 1,000: make the groups with "
        "param_groups(model), raise delta to 0.6, give it the role 'frozen', or draw modules with "
        "granularity='module'",
    ),
}


@pytest.mark.parametrize(("groups", "options", "message"), OVERSIZED.values(), ids=OVERSIZED.keys())
def test_a_module_larger_than_the_budget(groups: list[dict[str, Any]], options: dict[str, Any], message: str):
    with pytest.raises(ValueError) as raised:
        cut(groups, **options)
    assert str(raised.value) == message


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_the_delta_that_the_error_names_is_enough(numel: int, rest: int):
    # Meta tensors have sizes and no memory.
    group = {
        "params": [nn.Parameter(torch.empty(numel, device="meta")), nn.Parameter(torch.empty(rest, device="meta"))]
    }
    group |= {"role": "sampled", "modules": ["w", "v"]}
    with pytest.raises(ValueError) as raised:
        partition([group], 1e-7, "module", "error")
    enough = float(str(raised.value).split("raise delta to ")[1].split(",")[0])
    assert 0 < enough <= 1
    assert partition([group], enough, "module", "error").budget >= max(numel, rest)
    assert enough <= max(numel, rest) / (numel + rest) + 2e-4


COMPLEX = [{"params": [("w", nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)))]}]


def integers(role: str) -> list[dict[str, Any]]:
    return [{"params": [("w", nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), False))], "role": role}]


ERRORS = {
    "role": (matrices((2, 2), role="active"), {}, ValueError, "role='active' of group 0 must be 'sampled', 'dense' or"),
    "few modules": (
        matrices((2, 2), (2, 2), modules=["a"]),
        {},
        ValueError,
        "'modules' of group 0 has 1 entries and must have one for each of its 2 parameters: make the groups with",
    ),
    "many layers": (
        matrices((2, 2), layers=["a", "b"]),
        {},
        ValueError,
        "'layers' of group 0 has 2 entries and must have one for each of its 1 parameters",
    ),
    "row blocks": (
        matrices((5, 2), modules=[["a", "b"]]),
        {},
        ValueError,
        "w0 has 5 rows and 2 names in 'modules', which must divide the rows equally: give it one name, or one for",
    ),
    "no row blocks": (matrices((5, 2), modules=[[]]), {}, ValueError, "w0 has 5 rows and 0 names in 'modules'"),
    "no layers": (
        [group("sampled", "a"), group("sampled", "b", known=False)],
        {"granularity": "layer", "delta": 1.0},
        ValueError,
        "granularity='layer' needs the layer of every sampled parameter, and group 1 has no 'layers': make the groups "
        "with param_groups(model)",
    ),
    "nothing to sample": (
        matrices((4,), (3,)),
        {"delta": 1.0},
        ValueError,
        "none of the 2 parameters can be sampled, and one must be: pass weight matrices with requires_grad=True,",
    ),
    "prompt tuning": (
        [
            {"params": [("prompt", parameter(4, 4))], "role": "dense"},
            {
                "params": [(name, nn.Parameter(torch.zeros(4, 4), requires_grad=False)) for name in ("emb", "q", "k")],
                "role": "frozen",
                "thawed": ["frozen", "sampled", "sampled"],
            },
        ],
        {"delta": 1.0},
        ValueError,
        "with the role 'sampled', that is, set it for q and 1 more; or use torch.optim.AdamW, since there is nothing "
        "to sample where all that is trained is dense, here prompt",
    ),
    "only dense": (
        matrices((4, 4), (3,), role="dense"),
        {},
        ValueError,
        "with the role 'sampled'; or use torch.optim.AdamW, since there is nothing to sample where all that is trained "
        "is dense, here w0 and 1 more",
    ),
    "all frozen": (matrices((4, 4), role="frozen"), {}, ValueError, "none of the 1 parameters can be sampled"),
    "complex": (COMPLEX, {}, TypeError, "w is torch.complex64 and must be real to be sampled: freeze it"),
    "integer, sampled": (
        integers("sampled"),
        {},
        TypeError,
        "w is torch.int8 and must be of a floating dtype to be sampled: freeze it",
    ),
    "integer, dense": (integers("dense"), {}, TypeError, "must be of a floating dtype to be dense"),
    "transposed": (
        [{"params": [("w", nn.Parameter(torch.zeros(2, 3).T))]}],
        {"delta": 1.0},
        ValueError,
        "w has strides (1, 3) for shape (3, 2) and must be contiguous to be sampled: set param.data = ",
    ),
    "channels last": (
        [{"params": [("w", nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)))]}],
        {"delta": 1.0},
        ValueError,
        "w has strides (60, 1, 15, 3) for shape (2, 3, 4, 5) and must be contiguous",
    ),
}


@pytest.mark.parametrize(("groups", "options", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(groups: list[dict[str, Any]], options: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error) as raised:
        cut(groups, **options)
    assert message in str(raised.value)


def test_what_cannot_be_trained_may_be_frozen():
    transposed, matrix = nn.Parameter(torch.zeros(2, 3).T), parameter(2, 2)
    fixed = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    result = cut([{"params": [transposed, fixed], "role": "frozen"}, {"params": [matrix]}], delta=1.0)
    assert result.frozen == [transposed, fixed]
    assert result.total_numel == 14


def test_a_parameter_subclass_over_plain_memory_passes():
    class Weight(nn.Parameter):
        pass

    assert len(cut([Weight(torch.zeros(2, 2))], delta=1.0).modules) == 1


@pytest.fixture
def sharded() -> Iterator[nn.Parameter]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield nn.Parameter(distribute_tensor(torch.zeros(4, 4), init_device_mesh("cpu", (1,))))
    finally:
        dist.destroy_process_group()


def test_a_sharded_parameter_counts_whole_and_is_never_cut(sharded: nn.Parameter):
    result = cut([sharded], delta=1.0)
    assert (result.total_numel, result.modules[0].numel, len(result.modules)) == (16, 16, 1)
    with pytest.raises(ValueError, match="oversized='split' cuts only single whole tensors, not sharded ones"):
        cut([sharded], delta=0.5, oversized="split")
    with pytest.raises(ValueError, match="is sharded and holds 2 modules, and must be one to be sharded"):
        cut([{"params": [sharded], "modules": [["a", "b"]]}], delta=1.0)
    result = cut([{"params": [sharded], "role": "frozen"}, {"params": [parameter(4, 4)]}])
    assert (result.total_numel, len(result.frozen)) == (32, 1)


def test_a_partition_is_a_value():
    param = parameter(2, 2)
    first, second = cut([param], delta=1.0), cut([param], delta=1.0)
    assert first.modules == second.modules and hash(first.modules[0]) == hash(second.modules[0])
    assert repr(first.modules[0].blocks[0]) == "Block(index=0, number=0, start=0, stop=4)"
    with pytest.raises(FrozenInstanceError):
        first.budget = 5


@pytest.mark.parametrize("known", [True, False])
def test_twenty_thousand_modules(known: bool):
    groups = torch.optim.SGD([parameter(4, 4) for _ in range(20_000)], lr=0.1).param_groups
    if known:
        groups[0]["layers"] = groups[0]["modules"] = [f"layer {i}" for i in range(20_000)]
    times = []
    for _ in range(3):
        start = time.process_time()
        result = partition(groups, 0.03, "module", "error")
        times.append(time.process_time() - start)
    assert len(result.modules) == 20_000
    assert min(times) < 0.5 * pace.slowness()
