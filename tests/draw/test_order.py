"""Do the layers count in the order in which they run, from an example or from the first step on?"""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from misa_kernels import MISA, UniformSampler, param_groups
from misa_kernels.draw.order import Order, merged

TEXT = [f"text.{number}" for number in range(3)]
VISION = [f"vision.{number}" for number in range(3)]


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Towers(nn.Module):
    """The vision model is registered behind the text model, and runs before it."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.ModuleList([Block() for _ in range(3)])
        self.vision = nn.ModuleList([Block() for _ in range(3)])
        self.norm = nn.BatchNorm1d(16)

    def forward(self, tokens: Tensor, pixels: Tensor | None = None) -> Tensor:
        if pixels is not None:
            for layer in self.vision:
                pixels = layer(pixels)
            tokens = torch.cat([self.norm(pixels.mean(1)).unsqueeze(1), tokens], 1)
        for layer in self.text:
            tokens = layer(tokens)
        return tokens


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 16, generator=generator), torch.randn(2, 32, 16, generator=generator)


def towers() -> Towers:
    torch.manual_seed(0)
    return Towers()


def make(model: nn.Module, **options: Any) -> MISA:
    defaults: dict[str, Any] = {"lr": 1e-2, "delta": 0.2, "inner_steps": 2}
    return MISA(param_groups(model), **(defaults | options))


def step(model: nn.Module, optimizer: MISA, *given: Tensor) -> None:
    model(*given).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("example", [inputs(), {"tokens": inputs()[0], "pixels": inputs()[1]}], ids=["tuple", "dict"])
def test_an_example_shows_the_order(example: Any):
    groups = param_groups(towers(), example=example)
    assert groups.layers == VISION + TEXT and groups.order.is_known


def test_an_example_without_a_tower_leaves_that_to_the_first_steps():
    model = towers()
    groups = param_groups(model, example=inputs()[0])
    assert groups.layers == TEXT + VISION and not groups.order.is_known
    optimizer = MISA(groups, lr=1e-2, delta=0.2, inner_steps=2)
    step(model, optimizer, *inputs())
    assert optimizer.monitor.layers == VISION + TEXT and hooks(model) == 0


@pytest.mark.parametrize(
    "copied",
    [
        lambda groups: [{**group, "lr": 1e-3} for group in groups],
        list,
        lambda groups: sorted(groups, key=lambda group: group["role"]),
        lambda groups: [*groups[1:], groups[0]],
    ],
    ids=["dicts", "list", "sorted", "rotated"],
)
def test_copies_of_the_groups_have_the_order(copied: Callable[[Any], Any]):
    model = towers()
    groups = copied(param_groups(model, example=inputs()))
    assert MISA(groups, delta=0.2).monitor.layers == VISION + TEXT
    groups = copied(param_groups(model))
    optimizer = MISA(groups, lr=1e-2, delta=0.2, inner_steps=2)
    step(model, optimizer, *inputs())
    assert optimizer.monitor.layers == VISION + TEXT


def test_the_order_of_a_part_is_not_that_of_the_model():
    model = towers()
    groups = param_groups(model, example=inputs(), sampled=[model.norm.weight])
    param_groups(model.text)
    layers = MISA(groups, delta=0.2).monitor.layers
    # The norm is a layer of its own.
    assert [name for name in layers if name != "norm.weight"] == VISION + TEXT


def test_parameters_without_layers_are_not_watched():
    model = towers()
    groups = param_groups(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "MISA samples")
        optimizer = MISA(model.parameters(), delta=0.2)
        optimizer.rehearse()
    assert hooks(model) == 0 and not groups.order.is_known


def test_an_order_lives_no_longer_than_its_model():
    model = towers()
    order = weakref.ref(param_groups(model).order)
    del model
    gc.collect()
    assert order() is None


def test_an_example_changes_nothing():
    model = towers().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    param_groups(model, example=inputs())
    assert hooks(model) == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())


def test_an_example_leaves_buffers_that_are_assigned():
    class Counting(Towers):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, tokens: Tensor, pixels: Tensor | None = None) -> Tensor:
            self.count = self.count + 1
            return super().forward(tokens, pixels)

    model = Counting()
    param_groups(model, example=inputs())
    assert model.count == 0


def test_an_example_of_a_traced_model_runs_without_hooks():
    tokens = torch.ones(2, 16)
    groups = param_groups(torch.jit.trace(nn.Sequential(Block(), Block()), tokens), example=(tokens,))
    assert groups.layers == ["0", "1"]


def test_an_example_runs_what_is_compiled_as_it_is():
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    groups = param_groups(torch.compile(towers(), backend=backend), example=inputs())
    assert [name.removeprefix("_orig_mod.") for name in groups.layers] == VISION + TEXT and not graphs


def test_an_example_that_fails_leaves_no_hooks():
    model = towers()
    with pytest.raises(RuntimeError):
        param_groups(model, example=torch.ones(2, 4, 7))
    assert hooks(model) == 0 and int(model.norm.num_batches_tracked) == 0


def test_layers_that_are_named_run_in_that_order():
    model = towers()
    groups = param_groups(model, layers=[*model.vision, *model.text])
    assert groups.layers == VISION + TEXT and groups.order.is_known
    optimizer = MISA(groups, delta=0.2)
    assert hooks(model) == 0
    assert [optimizer.modules[0].name, optimizer.modules[0].layer] == ["text.0.up", 3]


def test_the_first_step_shows_the_order():
    model = towers()
    optimizer = make(model)
    assert optimizer.monitor.layers == TEXT + VISION and hooks(model) == 7
    active = optimizer.active
    step(model, optimizer, *inputs())
    assert optimizer.monitor.layers == VISION + TEXT and hooks(model) == 0
    # Modules keep their numbers, and the round goes on.
    assert optimizer.active == active
    assert [optimizer.modules[0].name, optimizer.modules[0].layer] == ["text.0.up", 3]
    lowest = min(optimizer.modules[number].layer for number in active)
    assert optimizer.monitor.current.backward_depth == 6 - lowest


def test_a_tower_without_inputs_is_waited_for():
    model = towers()
    optimizer = make(model)
    for _ in range(4):
        step(model, optimizer, inputs()[0])
    assert optimizer.monitor.layers == TEXT + VISION and hooks(model) == 7
    # The first micro-batch has text alone.
    model(inputs()[0]).pow(2).mean().backward()
    step(model, optimizer, *inputs())
    step(model, optimizer, *inputs())
    assert optimizer.monitor.layers == VISION + TEXT and hooks(model) == 0


def test_one_stack_is_not_watched():
    model = nn.Sequential(*[Block() for _ in range(4)])
    optimizer = make(model, delta=0.4)
    assert hooks(model) == 0 and optimizer.monitor.layers == ["0", "1", "2", "3"]


@pytest.mark.parametrize("end", ["release", "delete"])
def test_the_end_leaves_no_hooks(end: str):
    model = towers()
    optimizer = make(model)
    if end == "release":
        optimizer.release()
    else:
        del optimizer
    assert hooks(model) == 0


def test_copies_of_a_watched_model_and_whole_files_of_it():
    model = towers()
    optimizer = make(model)
    other, twin = copy.deepcopy((model, optimizer))
    file = io.BytesIO()
    torch.save(model, file)
    step(model, optimizer, *inputs())
    step(other, twin, *inputs())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("precision", [{}, {"sampler": UniformSampler(depth_window=2)}], ids=["default", "window"])
def test_a_resumed_run_draws_in_the_same_order(precision: dict[str, Any]):
    def train(steps: range, model: Towers, optimizer: MISA) -> None:
        for number in steps:
            step(model, optimizer, *inputs(number))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "depth_window=2 counts the layers")
        model = towers()
        optimizer = make(model, **precision)
        train(range(3), model, optimizer)
        weights, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        assert saved["param_groups"][0]["layer_order"] == VISION + TEXT
        train(range(3, 15), model, optimizer)
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        other = towers()
        other.load_state_dict(weights)
        resumed = make(other, **precision)
        resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.monitor.layers == VISION + TEXT
    train(range(3, 15), other, resumed)
    assert resumed.active == optimizer.active
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_an_order_that_was_saved_under_a_wrapper(wrap: Callable[[nn.Module], nn.Module]):
    model = towers()
    optimizer = MISA(param_groups(wrap(model), example=inputs()), delta=0.2)
    resumed = make(towers())
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.monitor.layers == VISION + TEXT
    back = make(wrap(towers()))
    back.load_state_dict(resumed.state_dict())
    assert [".".join(name.split(".")[-2:]) for name in back.monitor.layers] == VISION + TEXT


def kept_bytes(model: nn.Module, optimizer: MISA) -> int:
    """What one step keeps for backward, beside the parameters."""
    own = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(*inputs()).pow(2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return sum(kept.values())


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize(("has_example", "bound"), [(True, 1.05), (False, 1.3)])
def test_rehearsal_of_towers(window: int | None, has_example: bool, bound: float):
    model = towers()
    example = inputs() if has_example else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "depth_window=2 counts the layers")
        groups = param_groups(model, example=example)
        optimizer = MISA(groups, lr=0.0, delta=0.2, inner_steps=1, sampler=UniformSampler(depth_window=window))
    optimizer.rehearse()
    first = kept_bytes(model, optimizer)
    worst = max(kept_bytes(model, optimizer) for _ in range(30))
    assert worst <= bound * first


def test_a_window_over_stacks_of_unknown_order_says_so():
    with pytest.warns(UserWarning, match=r"depth_window=2 counts the layers of several stacks .*text\.0 first"):
        make(towers(), sampler=UniformSampler(depth_window=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MISA(param_groups(towers(), example=inputs()), delta=0.2, sampler=UniformSampler(depth_window=2))


def test_a_model_compiled_as_a_whole_says_that_nothing_is_seen():
    model = towers().eval()
    compiled = torch.compile(model, backend="eager")
    optimizer = MISA(param_groups(compiled), lr=1e-2, delta=0.2, inner_steps=2)
    with pytest.warns(UserWarning, match="no layer was seen to run in round 0"):
        for _ in range(2):
            step(compiled, optimizer, *inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            step(compiled, optimizer, *inputs())


@pytest.mark.parametrize(
    ("calls", "order"),
    [
        ({}, "abcd"),
        ({"a": 0, "b": 1, "c": 2, "d": 3}, "abcd"),
        ({"c": 0, "d": 1, "a": 2, "b": 3}, "cdab"),
        ({"c": 0, "a": 1}, "cdab"),
        ({"d": 0}, "abcd"),
    ],
    ids=["none", "as registered", "later first", "some", "the last alone"],
)
def test_what_was_not_called_stays_behind_its_predecessor(calls: dict[str, int], order: str):
    assert "".join(merged("abcd", calls)) == order


def test_ranks_take_the_order_of_the_first():
    model = towers()
    layers = {name: model.get_submodule(name) for name in TEXT + VISION}
    orders = [Order(model, layers, {name: name[:4] for name in layers}) for _ in range(2)]
    given: list[str] = []

    def share(own: str) -> str:
        given.append(own)
        return given[0]

    orders[0].watch()
    model(*inputs())
    orders[1].watch()
    model(inputs()[0])
    assert orders[0].learn(share) is True and orders[1].learn(share) is True
    assert orders[0].names == orders[1].names == VISION + TEXT
    assert hooks(model) == 0


def test_hooks_break_no_compiled_layer():
    model = towers().eval()
    for layer in (*model.text, *model.vision):
        layer.compile(backend="eager", fullgraph=True)
    optimizer = make(model)
    with pytest.warns(UserWarning, match="no layer was seen to run in round 0"):
        for _ in range(2):
            step(model, optimizer, *inputs())
