"""Bad input: one sentence with the value, the rule and the remedy, and nothing changed."""

import re
import warnings

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from misa_kernels import MISA, ImportanceSampler, kernels, paper, param_groups

BACKENDS = ["reference", *(name for name in ("cpu",) if kernels.unusable(name) is None)]

RANGES = [
    ("lr", -1.0),
    ("lr", float("nan")),
    ("lr", float("inf")),
    ("lr", "fast"),
    ("lr", torch.tensor(-1.0)),
    ("betas", (0.9,)),
    ("betas", (0.9, 1.0)),
    ("betas", (-0.1, 0.9)),
    ("betas", 0.9),
    ("eps", -1e-8),
    ("weight_decay", -0.1),
    ("delta", 0.0),
    ("delta", 1.5),
    ("delta", float("nan")),
    ("delta", "3 %"),
    ("delta", True),
    ("inner_steps", 0),
    ("inner_steps", 2.5),
    ("inner_steps", "many"),
    ("total_steps", 0),
    ("total_steps", 1e3),
    ("sampler", "uniform"),
    ("sampler", ImportanceSampler),
    ("keep_states", "all"),
    ("momentum_flush", "yes"),
    ("param_precision", "half"),
    ("state_dtype", "int3"),
    ("max_grad_norm", 0.0),
    ("max_grad_norm", float("inf")),
    ("skip_nonfinite", None),
    ("seed", -1),
    ("seed", 0.5),
    ("seed", 2**63),
    ("process_group", object()),
    ("backend", "triton"),
    ("backend", "gpu"),
    ("amsgrad", True),
    ("maximize", True),
    ("foreach", True),
    ("fused", True),
    ("capturable", True),
    ("differentiable", True),
    ("momentum", 0.9),
]


def flags_and_grads(model):
    return [(p.requires_grad, p.grad is None) for p in model.parameters()]


@pytest.mark.parametrize(("name", "value"), RANGES, ids=[f"{name}={value!r:.20}" for name, value in RANGES])
def test_argument_out_of_range(name, value):
    model = tiny.build()
    tiny.loss_of(model, tiny.batch(0)).backward()
    before = flags_and_grads(model)
    with pytest.raises((ValueError, TypeError)) as error:
        MISA(param_groups(model), **{"delta": 0.3, name: value})
    message = str(error.value)
    assert name in message
    # One sentence: no line break, no full stop but that of an attribute or a number.
    assert "\n" not in message and ". " not in message
    assert flags_and_grads(model) == before
    # And nothing is left behind that would keep the next one from being built.
    MISA(param_groups(model), delta=0.3)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("v_floor", lambda: MISA(param_groups(tiny.build()), delta=0.3, v_floor=True)),
        ("v_floor", lambda: MISA(param_groups(tiny.build()), **paper(delta=0.3, v_floor=True))),
        ("first_visits", lambda: ImportanceSampler(first_visits="sweep")),
    ],
)
def test_an_option_of_before_0_2_is_unknown(name, make):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        make()


def test_a_norm_of_before_0_2_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="^importance_norm='mean' must be 'sum' or 'norm'$"):
        ImportanceSampler(importance_norm="mean")


def test_defaults_of_adamw_are_accepted():
    defaults = {"amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "fused": None}
    MISA(param_groups(tiny.build()), delta=0.3, differentiable=False, **defaults)


def test_numbers_of_numpy_are_numbers():
    options = {"lr": np.float32(1e-3), "delta": np.float64(0.3), "inner_steps": np.int64(3), "seed": np.int32(1)}
    model = tiny.build()
    optimizer = MISA(param_groups(model), **options)
    tiny.train(model, optimizer, 4)
    assert len(optimizer.monitor.rounds) == 2


def parameters(*shapes, **options):
    return [nn.Parameter(torch.zeros(shape, **options)) for shape in shapes]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (lambda: [], "params is empty"),
        (lambda: [{"params": []}], "params is empty"),
        (lambda: [{"params": parameters((2, 2))}, *parameters((2, 2))], "either"),
        (lambda: parameters((2, 2))[0], "give a list"),
        (lambda: set(parameters((2, 2))), "give a list"),
        (lambda: parameters((2, 2)) * 2, "given twice"),
        (lambda: [{"params": (p := parameters((2, 2)))}, {"params": p}], "given twice"),
        (lambda: parameters((5,), (3,)), "be sampled"),
        (lambda: parameters((2, 2), (10, 10)), "must not exceed the budget"),
        (lambda: parameters((2, 2), dtype=torch.complex64), "must be real|real parameters"),
        (lambda: [{"params": parameters((2, 2)), "role": "trained"}], "role='trained'"),
        (lambda: [{"params": parameters((2, 2)), "seed": 3}], "seed=3 stands in a param group"),
        (lambda: [{"params": parameters((2, 2)), "lr": -3.0}], "lr=-3.0"),
        (lambda: [{"params": parameters((2, 2)), "amsgrad": True}], "amsgrad=True"),
        (lambda: [nn.Parameter(torch.zeros(4, 4).t()[:, :2])], "contiguous"),
        (
            lambda: [{"params": [nn.Parameter(torch.zeros(2, 2).int(), requires_grad=False)], "role": "dense"}],
            "floating",
        ),
        (lambda: [nn.Parameter(torch.zeros(2, 2).to(torch.float8_e4m3fn)) for _ in range(4)], "MISA trains float32"),
    ],
)
def test_parameters_that_cannot_be_optimized(params, message):
    with pytest.raises((ValueError, TypeError), match=message):
        MISA(params(), delta=0.3)


def test_group_without_params_is_one_sentence():
    with pytest.raises(ValueError, match="group 0 has no 'params'"):
        MISA([{"role": "sampled"}])


def test_float16_needs_a_master():
    with pytest.raises(ValueError, match="use 'master'"):
        MISA(parameters((2, 2), dtype=torch.float16), delta=1.0, param_precision="stochastic")


def test_sparse_gradient_is_refused_and_changes_nothing():
    embedding = nn.Embedding(10, 4, sparse=True)
    other = nn.Parameter(torch.ones(4, 4))
    optimizer = MISA([other, embedding.weight], delta=1.0)
    other.grad = torch.ones(4, 4)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(other, torch.ones(4, 4))
    assert optimizer.state_dict()["param_groups"][0]["steps"] == 0


def test_weights_on_several_devices_or_none_are_refused():
    optimizer = MISA([nn.Parameter(torch.ones(2, 2, device="meta")), nn.Parameter(torch.ones(2, 2))], delta=1.0)
    with pytest.raises(RuntimeError, match="cpu, meta"):
        optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {"lr": torch.tensor(1e-3, device="meta")},
        {"betas": (0.9, torch.tensor(0.99, device="meta"))},
        {"eps": torch.tensor(1e-8, device="meta")},
        {"weight_decay": torch.tensor(0.1, device="meta")},
    ],
)
@pytest.mark.parametrize("in_group", [True, False])
def test_a_number_on_a_device_is_refused_at_construction(options, in_group):
    """ "meta" stands for any device that would have to be waited for."""
    (name,) = options
    group = {"params": parameters((2, 2)), **(options if in_group else {})}
    with pytest.raises(TypeError, match=f"^{name} is a tensor on meta, .*: use a float or a tensor on the CPU$"):
        MISA([group], delta=1.0, **({} if in_group else options))


@pytest.mark.parametrize("release_gradients", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_learning_rate_on_a_device_is_refused_before_anything_of_a_step(backend, steps, release_gradients):
    def make():
        model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(2))).bfloat16()
        for weight in model.parameters():
            nn.init.eye_(weight)
        options = {"delta": 1.0, "inner_steps": 2, "release_gradients": release_gradients}
        return model, MISA(model.parameters(), backend=backend, **options)

    def train(model, optimizer, steps=1):
        for step in range(steps):
            model(torch.full((2, 4), step + 1.0).bfloat16()).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    (model, optimizer), (other, twin) = make(), make()
    train(model, optimizer, steps)
    train(other, twin, steps)
    group = optimizer.param_groups[0]
    before, weights = optimizer.state_dict(), [p.detach().clone() for p in model.parameters()]
    lr, group["lr"] = group["lr"], torch.tensor(1e-3, device="meta")
    with pytest.raises(TypeError, match="^lr is a tensor on meta, .*: use a float or a tensor on the CPU$"):
        train(model, optimizer)
    assert all(map(torch.equal, model.parameters(), weights))
    group["lr"] = lr
    assert str(optimizer.state_dict()) == str(before)
    optimizer.zero_grad()
    train(model, optimizer, 3)
    train(other, twin, 3)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_as_learning_rate_is_the_number_that_it_holds(backend, shape):
    lr, trained = torch.full(shape, 3e-3), []
    for each in (lr, lr.item()):
        (param,) = parameters((4, 4))
        optimizer = MISA([param], lr=each, delta=1.0, inner_steps=2, momentum_flush=True, backend=backend)
        for step in range(3):
            param.grad = torch.full((4, 4), step + 1.0)
            optimizer.step()
        optimizer.release()
        trained.append(param.detach())
    assert torch.equal(*trained) and trained[0].abs().min() > 3e-3


class Vocabulary(nn.Module):
    """Four layers of two matrices between two tables that dwarf them."""

    def __init__(self, size=3000):
        super().__init__()
        self.emb = nn.Embedding(size, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)) for _ in range(4))
        self.head = nn.Linear(16, size, bias=False)


def warned(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = make()
    return made, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("size", [3000, 3001, 150_000])
def test_a_budget_for_all_that_is_sampled_is_said_with_a_delta_that_draws(size):
    total = 2 * 16 * size + 4 * (2 * 512 + 48)
    model = Vocabulary(size)
    optimizer, said = warned(lambda: MISA(param_groups(model), delta=0.05))
    assert len(optimizer.active) == len(optimizer.modules) == 8
    assert len(said) == 1
    assert f"delta=0.05 of {total:,} parameters has room for all 4,096 that are sampled, so nothing is drawn" in said[0]
    enough = float(re.search(r"with delta=([^,]+), 1[23]% of what is sampled", said[0]).group(1))
    optimizer.release()
    optimizer, said = warned(lambda: MISA(param_groups(model), delta=enough))
    assert len(optimizer.active) == 1 and said == []


def test_a_budget_for_all_is_not_said_where_something_is_drawn_or_nothing_is_to_be():
    model = Vocabulary()
    for options in ({"delta": 1.0}, {"delta": 0.03}, {"delta": 0.05, "sampler": ImportanceSampler(max_per_layer=1)}):
        optimizer, said = warned(lambda options=options: MISA(param_groups(model), **options))
        assert said == []
        optimizer.release()
    alone = [{"params": [nn.Parameter(torch.ones(4, 4))], "role": "sampled"}]
    alone.append({"params": [nn.Parameter(torch.ones(8, 4))], "role": "frozen"})
    said = warned(lambda: MISA(alone, delta=0.5))[1]
    assert len(said) == 1 and "the only module is trained all the time: torch.optim.AdamW does the same" in said[0]


def test_dense_parameters_of_the_size_of_the_model_are_said_to_be_adamw():
    model = Vocabulary()
    optimizer, said = warned(lambda: MISA(param_groups(model, "pretrain"), delta=0.03))
    assert len(said) == 1
    assert "10 dense tensors hold 96,192 of 100,288 parameters, the largest of them emb.weight, 48,000" in said[0]
    assert "96% of the memory of AdamW's moments" in said[0] and "mode='finetune'" in said[0]
    optimizer.release()
    # A quarter of it in 8 bits, and with delta=1 MISA is AdamW.
    for options in ({"state_dtype": "int8", "delta": 0.03}, {"delta": 1.0}):
        optimizer, said = warned(lambda options=options: MISA(param_groups(model, "pretrain"), **options))
        assert said == []
        optimizer.release()
    # Half of it is where it begins.
    halves = [{"params": [nn.Parameter(torch.ones(8, 4)) for _ in range(4)], "role": "sampled"}]
    for rows, count in ((32, 0), (33, 1)):
        dense = {"params": [nn.Parameter(torch.ones(rows, 4))], "role": "dense"}
        assert len(warned(lambda dense=dense: MISA([*halves, dense], delta=0.2))[1]) == count
