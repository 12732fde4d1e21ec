"""Are slices equally wide parts of the right matrices, within the budget, and drawn one of each?"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from misa_kernels import CyclicSampler, Draw, ImportanceSampler, Sampler, UniformSampler, param_groups
from misa_kernels.draw.candidates import Candidates
from misa_kernels.draw.partition import Block, partition
from misa_kernels.draw.sampler import checked, described, held
from misa_kernels.draw.slices import Matrix, slicing, starts_of

SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4}
SAMPLERS = [ImportanceSampler, UniformSampler, CyclicSampler]


def sliced(model: nn.Module, delta: float = 0.05, slices: str = "auto", **options):
    groups = torch.optim.SGD(param_groups(model, **options), lr=0.1).param_groups
    return partition(groups, delta, "slice", "error", slices=slices)


def names(found) -> set[str]:
    """The sliced matrices, with the axis."""
    within_layer = (re.sub(r"^.*?\.\d+\.", "", module.name.split("[")[0]) for module in found.modules)
    return {f"{name} {module.blocks[0].axis}" for name, module in zip(within_layer, found.modules, strict=True)}


def candidates(numel: int, matrices: int, each: int) -> Candidates:
    count = matrices * each
    rival = np.repeat(np.arange(matrices), each)
    return Candidates.fresh(np.full(count, numel), rival, rival)


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES))


@pytest.mark.parametrize(
    ("model", "down", "output", "others"),
    [
        (llama, {"mlp.down_proj 1"}, {"self_attn.o_proj 1"}, {"self_attn.q_proj 0", "mlp.up_proj 0"}),
        (
            lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=32, n_positions=16)),
            {"mlp.c_proj 0"},
            {"attn.c_proj 0"},
            {"attn.c_attn 1", "mlp.c_fc 1"},
        ),
        (
            lambda: BertModel(BertConfig(**SIZES)),
            {"output.dense 1"},
            {"attention.output.dense 1"},
            {"attention.self.query 0", "intermediate.dense 0"},
        ),
        (
            lambda: ViTModel(ViTConfig(**{k: v for k, v in SIZES.items() if k != "vocab_size"}, image_size=32)),
            {"mlp.fc2 1"},
            {"attention.o_proj 1"},
            {"mlp.fc1 0"},
        ),
        (
            # As in Qwen3 of 0.6B, key and value are as wide as the stream, query and output twice as wide.
            lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16)),
            {"mlp.down_proj 1"},
            {"self_attn.o_proj 1"},
            {"self_attn.v_proj 0", "self_attn.q_proj 0"},
        ),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=96, num_layers=2, num_heads=4)
            ),
            {"layer.1.DenseReluDense.wo 1", "layer.2.DenseReluDense.wo 1"},
            {"layer.0.SelfAttention.o 1"},
            {"layer.0.SelfAttention.q 0"},
        ),
    ],
    ids=["llama", "gpt2", "bert", "vit", "qwen3", "t5"],
)
def test_which_matrices_and_along_which_axis(model, down, output, others):
    model = model()
    found = names(sliced(model, 0.02, "down"))
    assert found == down
    with_output = names(sliced(model, 0.02, "output"))
    assert output <= with_output - found
    assert others <= names(sliced(model, 0.3, "all")) - with_output


def test_a_larger_budget_reaches_further():
    model = llama()
    total = sum(p.numel() for p in model.parameters())
    down = 2 * 32 * 96
    reaches = [sliced(model, share * down / total).slicing.reach for share in (0.1, 0.49, 0.51)]
    assert reaches == ["down", "down", "output"]
    assert sliced(model, 0.5).slicing.reach == "all"


@pytest.mark.parametrize(
    ("slices", "delta"),
    [
        (slices, delta)
        for slices, deltas in {
            "auto": (0.004, 0.01, 0.03, 0.1, 0.25, 0.6, 1.0),
            "down": (0.004, 0.03, 0.3, 1.0),
            "output": (0.01, 0.1, 0.6),
            "all": (0.03, 0.25, 0.9, 1.0),
        }.items()
        for delta in deltas
    ],
)
def test_one_slice_of_each_fits_and_all_slices_reach_everything(delta, slices):
    found = sliced(llama(), delta, slices)
    of: dict[int, list] = {}
    for module in found.modules:
        (block,) = module.blocks
        assert module.rival == block.index
        of.setdefault(block.index, []).append(block)
    assert sum(own[0].numel for own in of.values()) <= found.budget
    for own in of.values():
        touched = torch.zeros_like(own[0].param, dtype=torch.int32)
        widths = set()
        for block in own:
            first, last = block.ends
            touched.narrow(block.axis, first, last - first).add_(1)
            widths.add(last - first)
            assert block.numel == (last - first) * block.param.shape[1 - block.axis]
        assert len(widths) == 1
        assert bool((touched > 0).all())
    assert len(found.frozen) == sum(1 for p in llama().parameters()) - len(of)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 64)), min_size=1, max_size=12),
    share=st.floats(0.01, 1.2),
)
def test_a_budget_is_spent_in_nearly_equal_shares(sizes, share):
    matrices = [Matrix("down", 1, size, line) for size, line in sizes]
    numels = [size * line for size, line in sizes]
    budget = int(share * sum(numels))
    try:
        found = slicing(matrices, numels, budget, "down")
    except ValueError as error:
        assert "raise delta" in str(error)
        assert sum(line for _, line in sizes) > budget
        return
    spent = sum(line * width for (_, line), width in zip(sizes, found.widths, strict=True))
    assert spent <= budget
    assert found.share == spent / sum(numels)
    wanted = min(1.0, budget / sum(numels))
    for (size, _), width in zip(sizes, found.widths, strict=True):
        assert 1 <= width <= size
        # Where lines are few, each matrix has one before any has more.
        assert abs(width - wanted * size) < 16 or min(found.widths) == 1


def test_single_lines_that_are_left_go_first_to_matrices_without_one():
    matrices = [Matrix("down", 1, 2, 60), *[Matrix("down", 1, 100, 10)] * 10]
    numels = [matrix.size * matrix.line for matrix in matrices]
    # An equal share is 0.42 of a line of 60, and 20.86 lines of 10.
    found = slicing(matrices, numels, 2111, "down")
    assert found.widths == [1, *[20] * 5, *[21] * 5]
    # Where that is too much, others give lines.
    found = slicing(matrices, numels, 2034, "down")
    assert sorted(found.widths) == [1, *[19] * 3, *[20] * 7]
    assert found.trained == 2030


def test_a_large_model_is_cut_into_units_of_16_and_spends_its_budget():
    matrices = [Matrix("down", 1, 14_336, 4096)] * 32
    numels = [14_336 * 4096] * 32
    budget = int(0.03 * 8_030_261_248)
    found = slicing(matrices, numels, budget, "auto")
    assert all(width % 16 == 0 for width in found.widths)
    assert 0 <= budget - sum(4096 * width for width in found.widths) < 16 * 4096
    assert max(found.widths) - min(found.widths) == 16
    assert all(start % 16 == 0 for width in found.widths for start in starts_of(14_336, width))
    assert str(found) == "32 x down: 1824 to 1840 of 14336 columns"


@given(size=st.integers(1, 5000), width=st.integers(1, 5000))
def test_starts_reach_all_of_a_matrix(size, width):
    width = min(width, size)
    starts = starts_of(size, width)
    assert (starts[0], starts[-1]) == (0, size - width)
    assert len(starts) == -(-size // width)
    assert all(0 < b - a <= width for a, b in zip(starts, starts[1:], strict=False))


def test_a_slice_knows_its_place():
    param = nn.Parameter(torch.arange(48.0).reshape(6, 8))
    rows, columns = Block(param, 0, 0, 16, 32, 0), Block(param, 0, 1, 2, 5 * 8 + 5, 1)
    assert (rows.ends, rows.numel, rows.width, rows.pitch) == ((2, 4), 16, 0, 0)
    assert (columns.ends, columns.numel, columns.width, columns.pitch) == ((2, 5), 18, 3, 8)
    whole = Block(param, 0, 0, 0, 48, 1)
    assert (whole.ends, whole.numel, whole.width, whole.pitch) == ((0, 8), 48, 0, 0)


def test_what_cannot_be_sliced():
    moe = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_key_value_heads=4))
    found = sliced(moe, 0.005)
    assert names(found) == {"self_attn.o_proj 1"}
    # Experts and routers.
    assert found.slicing.uncut == 2 * (4 * 3 * 32 * 96 + 4 * 32)
    with pytest.raises(ValueError, match=r"finds no matrix to slice.*param_groups\(model\)"):
        partition([{"params": list(llama().parameters())}], 0.1, "slice", "error")
    falcon = FalconForCausalLM(FalconConfig(vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    with pytest.raises(ValueError, match="with linear layers that keep the forward of nn.Linear"):
        sliced(falcon, 0.1)
    with pytest.raises(ValueError, match=r"slices='down' finds none of 2 matrices.*slices='all'"):
        sliced(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 0.5, "down")
    with pytest.raises(ValueError, match="no room for one line of 32 parameters of each of 2 matrices, which are 64"):
        sliced(llama(), 0.0005)


def test_a_group_may_say_otherwise():
    model = llama()
    groups = param_groups(model)
    kinds = dict(zip(groups[0]["modules"], groups[0]["slices"], strict=True))
    assert kinds["model.layers.0.mlp.down_proj"] == ("down", 1)
    assert kinds["model.layers.0.mlp.gate_proj"] == ("up", 0)
    # Only gates, by columns, and before everything else.
    groups[0]["slices"] = [("down", 1) if "gate" in name else None for name in groups[0]["modules"]]
    found = partition(torch.optim.SGD(groups, lr=0.1).param_groups, 0.03, "slice", "error")
    assert names(found) == {"mlp.gate_proj 1"}
    groups[0]["slices"] = [("down", 2)] * len(groups[0]["modules"])
    with pytest.raises(ValueError, match=r"must be None, or the part and 0 for rows or 1 for columns"):
        partition(torch.optim.SGD(groups, lr=0.1).param_groups, 0.03, "slice", "error")
    groups[0]["slices"] = [None]
    with pytest.raises(ValueError, match="'slices' of group 0 has 1 entries"):
        partition(torch.optim.SGD(groups, lr=0.1).param_groups, 0.03, "slice", "error")


def test_a_module_of_several_tensors_is_not_sliced():
    groups = param_groups(llama())
    groups[0]["modules"] = ["one" if "layers.0" in name else name for name in groups[0]["modules"]]
    found = partition(torch.optim.SGD(groups, lr=0.1).param_groups, 0.05, "slice", "error")
    assert {module.layer for module in found.modules} == {1}


def run(sampler: Sampler, known: Candidates, budget: int, rounds: int, seed: int = 0) -> list[list[int]]:
    """Draw rounds as an optimizer does."""
    sets = []
    for number in range(rounds):
        draw = checked(sampler.draw(known, budget, number, seed), known, budget, sampler)
        known.last_round[draw.active] = number
        sets.append(draw.active.tolist())
    return sets


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize(("hold", "distinct"), [("auto", 1), ("run", 1), (3, 3), (1, 9)])
def test_a_round_trains_one_slice_of_each_matrix_and_may_hold_it(kind, hold, distinct):
    known = candidates(10, matrices=5, each=8)
    sets = run(kind(granularity="slice", hold_rounds=hold), known, 59, 9)
    assert all(len(own) == 5 and len({b // 8 for b in own}) == 5 for own in sets)
    changes = 1 + sum(a != b for a, b in zip(sets, sets[1:], strict=False))
    assert changes == distinct


def test_modules_may_be_held_too():
    known = Candidates.fresh(np.full(12, 10), np.arange(12))
    sets = run(UniformSampler(hold_rounds=4), known, 35, 12)
    assert [sets[n] == sets[n - 1] for n in range(1, 12)] == [n % 4 != 0 for n in range(1, 12)]


def test_cyclic_slices_take_turns_within_each_matrix():
    known = candidates(10, matrices=2, each=3)
    sets = run(CyclicSampler(granularity="slice", hold_rounds=1), known, 20, 4)
    assert sets == [[0, 3], [1, 4], [2, 5], [0, 3]]


def test_importance_prefers_slices_of_large_gradients():
    known = candidates(10, matrices=4, each=5)
    known.importance[:], known.count[:] = 1e-3, 3
    loud = [2, 7, 12, 17]
    known.importance[loud] = 1.0
    sampler = ImportanceSampler(granularity="slice", hold_rounds=1, least_recent=0)
    drawn = [sampler.draw(known, 40, 1, seed).active.tolist() for seed in range(50)]
    assert sum(b in loud for own in drawn for b in own) > 0.8 * 200


def test_what_is_silent_is_not_held():
    known = candidates(10, matrices=3, each=4)
    sampler = UniformSampler(granularity="slice")
    (first,) = run(sampler, known, 30, 1)
    known.unheard[first[1]] = 3
    assert held(sampler, known, 1).tolist() == [first[0], first[2]]


def test_rivals_are_refused():
    class Twice(Sampler):
        def draw(self, candidates, budget, round, seed):
            return Draw(np.array([0, 1]), np.full(candidates.numel.size, 0.1), 1.0, 0.0)

    known = candidates(10, 2, 5)
    with pytest.raises(ValueError, match="two slices of one matrix"):
        checked(Twice().draw(known, 20, 0, 0), known, 20, Twice())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"granularity": "slices"}, "granularity='slices' must be 'module', 'layer' or 'slice'"),
        ({"granularity": "slice", "slices": "gate"}, "slices='gate' must be 'auto', 'down', 'output' or 'all'"),
        ({"hold_rounds": 0}, "hold_rounds=0 must be 'auto', 'run' or an integer from 1 on"),
        ({"hold_rounds": True}, "hold_rounds=True must be"),
    ],
)
@pytest.mark.parametrize("kind", SAMPLERS)
def test_options_are_checked(kind, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        kind(**options)


@pytest.mark.parametrize("option", ["depth_window", "max_per_layer"])
@pytest.mark.parametrize("kind", SAMPLERS[:2])
def test_slices_lie_in_every_layer(kind, option):
    with pytest.raises(ValueError, match=f"{option}=1 must be None with granularity='slice'"):
        kind(granularity="slice", **{option: 1})


def test_a_sampler_without_new_options_is_described_as_before():
    assert "hold_rounds" not in described(UniformSampler())
    assert "slices" not in described(ImportanceSampler())
    own = [described(UniformSampler(granularity="slice", slices=slices)) for slices in ("auto", "all")]
    assert own[0] != own[1]
    assert described(UniformSampler(hold_rounds=2)) != described(UniformSampler())
