"""Does MISA save the memory that it says it saves? Counted allocation by allocation on a small LLaMA."""

from __future__ import annotations

import itertools
import json
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import record
from benchmarks.gpu import stages as gpu
from benchmarks.memory import PeakMemory
from benchmarks.train import training_memory
from benchmarks.train.llama import LINEARS, SHAPES, Llama, Shape
from misa_kernels import MISA, ImportanceSampler, UniformSampler, authors, badam, lisa, paper, param_groups
from misa_kernels.draw.sampler import Draw
from misa_kernels.memory.codec import FORMATS
from misa_kernels.memory.storage import PRECISIONS
from misa_kernels.optimizer import end_round
from misa_kernels.outside import copies

SHAPE, TOKENS = SHAPES["tiny"], 32
# Of its 62,752 parameters; a layer has 11,520.
DELTAS = (0.1, 0.2, 0.4, 0.6)


def model_and_tokens(checkpointing: bool = False) -> tuple[Llama, torch.Tensor]:
    torch.manual_seed(0)
    return Llama(SHAPE, checkpointing), torch.randint(SHAPE.vocab, (1, TOKENS))


def train_step(model: Llama, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    model(tokens).backward()
    optimizer.step()
    optimizer.zero_grad()


def gradient_and_state_bytes(delta: float, **options: Any) -> tuple[int, int, int]:
    """Bytes of gradients that a backward pass leaves and of state that the first step leaves, and active parameters."""
    model, tokens = model_and_tokens()
    optimizer = MISA(param_groups(model), delta=delta, inner_steps=100, **options)
    with PeakMemory() as gradients:
        model(tokens).backward()
    with PeakMemory() as state:
        optimizer.step()
    return gradients.held_bytes, state.held_bytes, sum(optimizer.modules[number].numel for number in optimizer.active)


def test_gradients_and_states_are_in_proportion_to_delta():
    total = sum(p.numel() for p in Llama(SHAPE).parameters())
    largest = SHAPE.hidden * SHAPE.intermediate
    for delta in DELTAS:
        gradients, state, active = gradient_and_state_bytes(delta)
        assert gradients == 4 * active
        # What does not fit any more is smaller than the largest module.
        assert delta * total - largest < active <= delta * total
        # Two moments in float32 for the budget, in groups of 128; then a few numbers for each of 28 modules.
        beyond = state - 8 * 128 * -(-int(delta * total) // 128)
        assert 0 <= beyond <= 28 * 96, beyond


class Chosen(UniformSampler):
    """Draws the modules with these numbers, always."""

    def __init__(self, numbers: tuple[int, ...]) -> None:
        super().__init__()
        # Samplers are frozen dataclasses.
        object.__setattr__(self, "numbers", numbers)

    def draw(self, candidates: Any, budget: int, round: int, seed: int) -> Draw:
        size = candidates.numel.size
        return Draw(np.array(self.numbers), np.full(size, 1 / size), perplexity=float(size), eta=0.0)


def activations(*names: str, checkpointing: bool = False) -> int:
    """Bytes that a forward pass leaves for backward with these modules active."""
    model, tokens = model_and_tokens(checkpointing)
    # Seven modules a layer, in the order of LINEARS.
    numbers = tuple(sorted(7 * int(name.split(".")[1]) + LINEARS.index(name.split(".")[-1]) for name in names))
    optimizer = MISA(param_groups(model), delta=0.8, sampler=Chosen(numbers))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == len(names) and all(any(name in n for n in trained) for name in names)
    with PeakMemory() as memory:
        loss = model(tokens)
    assert loss.requires_grad and len(optimizer.active) == len(names)
    return memory.held_bytes


# The input that each linear of the layer needs for its own gradient alone: hidden or intermediate numbers a token.
# That of o_proj is what attention keeps anyhow.
INPUTS = {
    "q_proj": SHAPE.hidden,
    "k_proj": SHAPE.hidden,
    "o_proj": 0,
    "gate_proj": SHAPE.hidden,
    "up_proj": SHAPE.hidden,
    "down_proj": SHAPE.intermediate,
}


@pytest.mark.parametrize("linear", INPUTS)
def test_the_input_of_a_linear_is_kept_only_while_it_is_trained(linear):
    lower = "layers.1.self_attn.q_proj"
    without, with_it = activations(lower), activations(lower, f"layers.3.{block(linear)}.{linear}")
    assert with_it - without == 4 * TOKENS * INPUTS[linear]


def test_linears_that_share_their_input_keep_it_once():
    lower = "layers.1.self_attn.q_proj"
    three = [f"layers.3.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    assert activations(lower, *three) - activations(lower) == 4 * TOKENS * SHAPE.hidden


def test_layers_below_the_lowest_active_one_keep_nothing():
    """Each layer above it keeps as much as any other; with checkpointing its input alone, wherever it lies."""
    kept = [activations(f"layers.{number}.self_attn.q_proj") for number in range(SHAPE.layers)]
    steps = {lower - upper for lower, upper in zip(kept, kept[1:], strict=False)}
    assert len(steps) == 1 and steps.pop() > 4 * TOKENS * (3 * SHAPE.intermediate + 2 * SHAPE.hidden)


def block(linear: str) -> str:
    return "self_attn" if linear in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"


SAVING: dict[str, dict[str, Any]] = {
    "default": {},
    "window": {"sampler": ImportanceSampler(depth_window=2)},
    "int8, split, released": {"state_dtype": "int8", "param_precision": "split", "release_gradients": True},
}


@pytest.mark.parametrize("name", ["default", pytest.param("int8, split, released", marks=pytest.mark.slow)])
def test_nothing_is_left_behind_after_200_switches(monkeypatch, name):
    # Of each round that is remembered there are a few weights; with room for two it is full when the count begins.
    monkeypatch.setattr(copies, "_rounds", OrderedDict())
    monkeypatch.setattr(copies, "REMEMBERED", 2)
    tokens = torch.randint(16, (1, 4))
    # All in contexts: a release counts only if the allocation was seen.
    with PeakMemory():
        model = Llama(Shape(vocab=16, hidden=16, intermediate=24, layers=1, heads=1, kv_heads=1)).bfloat16()
        optimizer = MISA(param_groups(model), delta=0.5, inner_steps=1, **SAVING[name])
        for _ in range(3):
            train_step(model, optimizer, tokens)
    states, rounds = optimizer.state_bytes, len(optimizer.monitor.rounds)
    with PeakMemory() as memory:
        for _ in range(200):
            train_step(model, optimizer, tokens)
    assert optimizer.monitor.current.round == 203 and rounds == 4
    assert memory.held_bytes == 0 and len(copies._rounds) == 2
    assert optimizer.state_bytes == states
    assert all(p.grad is None for p in model.parameters())


def step_peaks(steps: int, inner_steps: int, name: str, checkpointing: bool, rehearsed: bool) -> list[int]:
    model, tokens = model_and_tokens(checkpointing)
    optimizer = MISA(param_groups(model), lr=1e-3, delta=0.2, inner_steps=inner_steps, **SAVING[name])
    if rehearsed:
        optimizer.rehearse()
    # The first step allocates the state after its backward pass, which is there throughout all later ones.
    train_step(model, optimizer, tokens)
    peaks = []
    for _ in range(steps):
        with PeakMemory() as memory:
            train_step(model, optimizer, tokens)
        peaks.append(memory.peak_bytes)
    return peaks


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("default", False), ("default", True), ("window", False), ("int8, split, released", True)],
)
def test_no_round_takes_more_than_the_rehearsed_one(name, checkpointing):
    (rehearsed,) = step_peaks(1, 100, name, checkpointing, rehearsed=True)
    later = step_peaks(20, 1, name, checkpointing, rehearsed=False)
    assert len(set(later)) > 1 or checkpointing
    assert max(later) <= rehearsed, later


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": paper(),
    "authors": authors(),
    "badam": badam(),
    "lisa": lisa(),
    "released": {"release_gradients": True},
}
# Every precision and format with one of the presets, and every preset with one of them.
REHEARSED = [
    (list(PRESETS)[number % len(PRESETS)], precision, state_dtype)
    for number, (precision, state_dtype) in enumerate(itertools.product(PRECISIONS, FORMATS))
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("preset, precision, state_dtype", REHEARSED)
@pytest.mark.filterwarnings("ignore:MISA steps in plain PyTorch")
def test_whole_rounds_take_no_more_than_the_first_two_steps_after_a_rehearsal(
    monkeypatch, preset, precision, state_dtype, backend
):
    """Ends of rounds included, in bfloat16 with checkpointing, where little else is held."""
    # A few weights of each round that is remembered would count.
    monkeypatch.setattr(copies, "_rounds", OrderedDict())
    monkeypatch.setattr(copies, "REMEMBERED", 0)
    model, tokens = model_and_tokens(checkpointing=True)
    model = model.bfloat16()
    options = {"param_precision": precision, "state_dtype": state_dtype, "backend": backend} | PRESETS[preset]
    optimizer = MISA(param_groups(model), lr=1e-3, delta=0.25, inner_steps=2, **options)
    optimizer.rehearse()
    peaks, held = [], 0
    for _ in range(9):
        with PeakMemory() as memory:
            train_step(model, optimizer, tokens)
        peaks.append(held + memory.peak_bytes)
        held += memory.held_bytes
    assert len(optimizer.monitor.rounds) == 5
    # The tables of a round grow with the number of its modules, of which the costliest set has few.
    assert max(peaks[2:]) <= max(peaks[:2]) + 32 * len(optimizer.modules), peaks


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("numel, backend", [(1 << 22, "auto"), (1 << 18, "reference")])
def test_the_end_of_a_round_takes_little_memory_whatever_the_size_of_a_matrix(precision, flush, numel, backend):
    """8 to 12 MB of moments and masters a matrix; plain PyTorch's own steps take more than its ends, and run before."""
    params = [torch.nn.Parameter(torch.randn(numel // 512, 512).bfloat16()) for _ in range(3)]
    options = {"param_precision": precision, "momentum_flush": flush, "keep_states": "none", "backend": backend}
    optimizer = MISA(params, delta=1.0, inner_steps=10**6, **options)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    optimizer.zero_grad()
    run = optimizer._run
    with PeakMemory() as memory:
        end_round(run)
    assert len(optimizer.monitor.rounds) == 2
    assert memory.peak_bytes <= 4e6


@pytest.mark.parametrize("state_dtype, precision", [("int8", "split"), ("fp8", "master")])
@pytest.mark.filterwarnings("ignore:MISA converts", "ignore:MISA steps in plain PyTorch")
def test_a_state_of_another_format_is_converted_in_little_memory(state_dtype, precision):
    def build(**options: Any) -> MISA:
        params = [torch.nn.Parameter(torch.ones(1024, 512, dtype=torch.bfloat16)) for _ in range(2)]
        return MISA(params, delta=1.0, inner_steps=10**6, **options)

    saved = build()
    for param in saved.param_groups[0]["params"]:
        param.grad = torch.randn_like(param)
    saved.step()
    optimizer = build(state_dtype=state_dtype, param_precision=precision)
    optimizer.load_state_dict(saved.state_dict())
    with PeakMemory() as memory:
        optimizer._run.make_ready()
    assert memory.peak_bytes - memory.held_bytes <= 5e6


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", [pytest.param("lora", marks=pytest.mark.slow), "badam", "misa", "misa_lean"])
def test_the_formula_tells_what_a_small_model_takes(name, checkpointing):
    """Within the tolerance of the table; small numbers weigh more here than in the record."""
    plan = replace(training_memory.PLANS["tiny"], dtype="float32", checkpointing=checkpointing)
    if name == "lora":
        pytest.importorskip("peft")
    seen, said = training_memory.measured(name, plan), training_memory.planned(name, plan, fused_norms=False)
    for part in ("weights", "activations", "gradients", "peak"):
        assert said[part] == pytest.approx(seen[part], rel=0.05, abs=1), (part, seen, said)


def test_goals_are_judged_by_the_figures():
    gib = 2**30
    figures = {"lora": (17, 17), "badam": (19, 19), "misa": (18.5, 18), "misa_lean": (17.9, 17.9)}
    peers = {
        name: {"reserved_bytes": most * gib, "rehearsed_reserved_bytes": rehearsed * gib}
        for name, (most, rehearsed) in figures.items()
    }
    found = {(goal["peer"], goal["goal"]): goal["met"] for goal in training_memory.goals(peers)}
    assert len(found) == 8
    assert {key for key, met in found.items() if not met} == {("misa", "<= LoRA + 1 GiB")}
    peers["misa"]["reserved_bytes"] = 20.5 * gib
    found = {goal["goal"] for goal in training_memory.goals(peers) if goal["peer"] == "misa" and not goal["met"]}
    assert len(found) == 4


def test_stage_keeps_the_plan_of_a_peer_that_was_left_out(tmp_path):
    command = ["--stage", "memory", "--device", "cpu", "--shape", "tiny", "--out", str(tmp_path), "--time-limit", "0"]
    assert gpu.main(command) == 0
    (shape,) = json.loads((tmp_path / "memory.json").read_text())["shapes"]
    assert shape["left_out"] == list(shape["peers"]) == list(training_memory.PEERS)
    assert all(peer["planned"]["peak"] > 0 for peer in shape["peers"].values())


@pytest.mark.slow
def test_stage_measures_every_peer_in_a_process_of_its_own(tmp_path, capsys):
    pytest.importorskip("peft")
    command = ["--stage", "memory", "--device", "cpu", "--shape", "tiny", "--out", str(tmp_path)]
    assert gpu.main(command) == 0
    (shape,) = json.loads((tmp_path / "memory.json").read_text())["shapes"]
    assert shape["left_out"] == []
    for name, peer in shape["peers"].items():
        assert "error" not in peer, (name, peer)
        assert peer["rounds"] >= 12
        assert peer["reserved_bytes"] >= peer["rehearsed_reserved_bytes"] > 0
    assert len(shape["goals"]) == 4 * sum(name.startswith("misa") for name in shape["peers"])
    assert "1.03 x" in capsys.readouterr().out


def test_record_holds_every_peer():
    """The record in the repository is that of the table beside it."""
    path = record.ROOT / "benchmarks" / "results" / "training_memory.json"
    content = json.loads(path.read_text())
    kinds = {(case["dtype"], case["checkpointing"]) for case in content["cases"]}
    assert len(kinds) == 4 and len(content["cases"]) == 4 * len(training_memory.PEERS)
    assert training_memory.markdown(content) == path.with_suffix(".md").read_text()
