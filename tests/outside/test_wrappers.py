"""Does a run go on without the wrappers that it was saved with, and the other way round, and only that run?"""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from misa_kernels import MISA, param_groups
from misa_kernels.outside.wrappers import is_same, unwrapped


def blocks(width=8):
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(4)])


class Held(nn.Module):
    """A model that has an attribute of DataParallel's name, and another one beside it."""

    def __init__(self):
        super().__init__()
        self.module, self.head = blocks(), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.module(x))


class Outer(nn.Module):
    """A wrapper whose attribute has any name, as FSDP1 and DDP have theirs, without a process group."""

    def __init__(self, model, name):
        super().__init__()
        self.name = name
        self.add_module(name, model)

    def forward(self, x):
        return getattr(self, self.name)(x)


def checkpointed(model):
    for number, block in enumerate(model):
        model[number] = checkpoint_wrapper(block)
    return model


WRAPS = {
    "nothing": lambda model: model,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "compiled DataParallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "DataParallel of compiled": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "FSDP1": lambda model: Outer(model, "_fsdp_wrapped_module"),
    "checkpoint wrapper": checkpointed,
}
OTHERS = ("compiled DataParallel", "DataParallel of compiled")
GROUPS = {
    "param_groups": param_groups,
    "names": lambda model: list(model.named_parameters()),
    "parameters": lambda model: list(model.parameters()),
}


def optimizer_of(model, how="param_groups", **options):
    with warnings.catch_warnings():
        # Without groups it says what it samples.
        warnings.simplefilter("ignore")
        return MISA(GROUPS[how](model), **{"delta": 0.4, "inner_steps": 2, "lr": 1e-2} | options)


def train(model, optimizer, steps):
    for step in range(steps):
        # Made up, since torch.compile takes its time.
        for number, param in enumerate(model.parameters()):
            if param.requires_grad:
                param.grad = torch.full_like(param, (step + number) % 3 - 1)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("before", "after"), [*((name, "nothing") for name in WRAPS), *(("nothing", name) for name in WRAPS), OTHERS]
)
@pytest.mark.parametrize("how", GROUPS)
def test_a_run_goes_on_in_other_wrappers(before, after, how):
    torch.manual_seed(0)
    inner = blocks()
    other = copy.deepcopy(inner)
    wrapped, rewrapped = WRAPS[before](inner), WRAPS[after](other)
    optimizer = optimizer_of(wrapped, how)
    train(wrapped, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        for own, its in zip(rewrapped.parameters(), wrapped.parameters(), strict=True):
            own.copy_(its)
    resumed = optimizer_of(rewrapped, how)
    names = [resumed.param_groups[0].get(key) for key in ("modules", "layers", "param_names")]
    resumed.load_state_dict(saved)
    # Modules are known by them when some are frozen.
    assert [resumed.param_groups[0].get(key) for key in ("modules", "layers", "param_names")] == names
    for each, its in ((wrapped, optimizer), (rewrapped, resumed)):
        train(each, its, 2)
        with its.thawed():
            list(each.parameters())[0].requires_grad_(False)
        train(each, its, 8)
    assert all(map(torch.equal, wrapped.parameters(), rewrapped.parameters()))


@pytest.mark.parametrize("how", ["param_groups", "names"])
def test_an_attribute_called_module_is_not_a_wrapper(how):
    optimizer = optimizer_of(Held(), how)
    optimizer.load_state_dict(optimizer_of(nn.DataParallel(Held()), how).state_dict())
    optimizer.load_state_dict(optimizer_of(torch.compile(Held(), backend="eager"), how).state_dict())

    class Renamed(Held):
        def __init__(self):
            super().__init__()
            self._modules = {"body": self.module, "head": self.head}

    # The same tensors in the same order, under another name.
    with pytest.raises(ValueError, match=r"names 'body\.0\.0.* in .* where this optimizer has 'module\.0\.0"):
        optimizer.load_state_dict(optimizer_of(Renamed(), how).state_dict())


def test_a_model_of_one_matrix_has_a_name_in_a_wrapper_only():
    saved = optimizer_of(nn.DataParallel(nn.Linear(8, 8)), delta=1.0).state_dict()
    optimizer_of(nn.Linear(8, 8), delta=1.0).load_state_dict(saved)


def test_names_by_hand():
    names = [["module._orig_mod.a.b", None, ["module.a.0", "module.a.1"]], None, ["module.module.c"]]
    assert unwrapped(names) == [["a.b", None, ["a.0", "a.1"]], None, ["module.c"]]
    # One of all lies outside.
    assert unwrapped([["module.a"], ["head"]]) == [["module.a"], ["head"]]
    assert unwrapped([["modules.a", "module_a"]]) == [["modules.a", "module_a"]]
    assert unwrapped([["a._checkpoint_wrapped_module", 3, None]]) == [["a", "3", None]]
    assert unwrapped([]) == [] and unwrapped([[]]) == [[]]
    assert is_same("", "weight") and is_same("a.b", "a.b") and is_same(None, None)
    assert not (is_same("", "a.weight") or is_same("a", "b") or is_same(None, "a"))
