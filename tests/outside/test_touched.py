"""What does MISA make of what others do between its steps: to calls, to weights and to `requires_grad`?

Optimizers, models and state that are copied, dropped, cleared or loaded are in `test_touched_state.py`.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import warnings

import pytest
import tiny
import torch
import torch._dynamo
from torch import nn

from misa_kernels import MISA, ImportanceSampler, kernels, param_groups

BACKENDS = ["reference", *(name for name in ("cpu",) if kernels.unusable(name) is None)]
# A step of `tiny` takes Triton's interpreter seconds, one of a few matrices does not.
TINIEST = [*BACKENDS, "triton"] if os.environ.get("TRITON_INTERPRET") == "1" else BACKENDS
STORAGES = {
    "fp32": (torch.float32, {}),
    "fp32 int8": (torch.float32, {"state_dtype": "int8"}),
    "master": (torch.bfloat16, {}),
    "master bf16": (torch.bfloat16, {"state_dtype": "bf16"}),
    "master int8": (torch.bfloat16, {"state_dtype": "int8"}),
    "split": (torch.bfloat16, {"param_precision": "split"}),
    "stochastic": (torch.bfloat16, {"param_precision": "stochastic", "state_dtype": "bf16"}),
}
LR = 1e-2
OPTIONS = {"delta": 0.3, "inner_steps": 3, "lr": LR, "weight_decay": 0.1}
ROWS, COLUMNS = 8, 6

pytestmark = pytest.mark.filterwarnings("ignore:MISA samples")
on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
on_tiniest_backends = pytest.mark.parametrize("backend", TINIEST)
with_each_storage = pytest.mark.parametrize("storage", STORAGES)


def build(backend="reference", mode="finetune", dtype=torch.float32, layers=2, frozen=(), **options):
    model = tiny.build(layers=layers, dtype=dtype)
    for part in frozen:
        model.get_submodule(part).requires_grad_(False)
    return model, MISA(param_groups(model, mode), backend=backend, **(OPTIONS | options))


def plain(backend="reference", dtype=torch.float32, count=4, **options):
    """Matrices of one size, each a module; by default all are trained."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(ROWS, COLUMNS).to(dtype)) for _ in range(count)]
    options = {"delta": 1.0, "inner_steps": 4, "lr": LR, "weight_decay": 0.0} | options
    return params, MISA(params, backend=backend, **options)


def fill_gradients(params, seed=0, skip=()):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        g = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = g if p.requires_grad and not any(p is other for other in skip) else None


def flags(model):
    return {name for name, param in model.named_parameters() if param.requires_grad}


def names(optimizer):
    return {optimizer.modules[number].name for number in optimizer.active}


def heard(call):
    """Messages of the UserWarnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def train_or_not(model, optimizer, steps, start=0):
    """Take steps, without gradients where nothing requires one."""
    for step in range(start, start + steps):
        if flags(model):
            tiny.loss_of(model, tiny.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_in(model, optimizer, rounds, start=0):
    """Names of the weights that change in some rounds."""
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    train_or_not(model, optimizer, rounds * optimizer.inner_steps, start=start)
    return {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}


def same_state(a, b):
    ours, theirs = (optimizer.state_dict()["state"] for optimizer in (a, b))
    assert ours.keys() == theirs.keys()
    for index, own in ours.items():
        assert own.keys() == theirs[index].keys()
        for name, value in own.items():
            assert torch.equal(value, theirs[index][name]), (index, name)


# Compiled calls.


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function):
    """Traced by dynamo, run as it is."""
    return torch.compile(function, backend="eager")


@pytest.mark.parametrize("backend, storage", [(BACKENDS[-1], "fp32"), ("reference", "master"), (BACKENDS[-1], "split")])
def test_a_compiled_step_is_the_eager_one(dynamo, backend, storage):
    dtype, options = STORAGES[storage]
    runs = [build(backend, dtype=dtype, layers=1, delta=0.5, inner_steps=2, **options) for _ in range(2)]
    steps = [runs[0][1].step, compiled(runs[1][1].step)]
    for number in range(5):
        for (model, optimizer), step in zip(runs, steps, strict=True):
            tiny.loss_of(model, tiny.batch(number)).backward()
            step()
            optimizer.zero_grad()
    assert len(runs[1][1].monitor.rounds) == 3
    assert all(map(torch.equal, runs[0][0].parameters(), runs[1][0].parameters()))
    same_state(runs[0][1], runs[1][1])


@pytest.mark.parametrize("backend, is_closed", [("reference", True), (BACKENDS[-1], False)])
def test_a_compiled_train_step_is_the_eager_one(dynamo, backend, is_closed):
    def train_step(model, optimizer, tokens):
        def closure():
            optimizer.zero_grad()
            loss = tiny.loss_of(model, tokens)
            loss.backward()
            return loss

        if is_closed:
            return optimizer.step(closure)
        loss = closure()
        optimizer.step()
        return loss

    runs = [build(backend, layers=1, delta=0.5, inner_steps=2) for _ in range(2)]
    losses = [
        [float(call(*run, tiny.batch(number))) for number in range(5)]
        for run, call in zip(runs, (train_step, compiled(train_step)), strict=True)
    ]
    assert losses[0] == losses[1] and losses[0][-1] != losses[0][0]
    assert all(map(torch.equal, runs[0][0].parameters(), runs[1][0].parameters()))
    same_state(runs[0][1], runs[1][1])


@pytest.mark.parametrize("backend, storage", [("reference", "fp32"), (BACKENDS[-1], "master")])
def test_released_gradients_under_compiled_autograd_are_the_eager_ones(dynamo, backend, storage):
    dtype, options = STORAGES[storage]
    runs = [plain(backend, dtype, count=2, delta=0.5, inner_steps=1, release_gradients=True, **options) for _ in "ab"]
    for number in range(3):
        for (params, optimizer), is_compiled in zip(runs, (False, True), strict=True):
            x = torch.linspace(-1, 1, COLUMNS, dtype=dtype) + number
            loss = (params[0] @ x * (params[1] @ x)).square().sum()
            if is_compiled:
                with torch._dynamo.compiled_autograd._enable(compiled):
                    loss.backward()
            else:
                loss.backward()
            assert all(p.grad is None for p in params)
            optimizer.step()
    assert len(set(map(tuple, (record.active for record in runs[0][1].monitor.rounds)))) == 2
    assert all(map(torch.equal, runs[0][0], runs[1][0]))
    same_state(runs[0][1], runs[1][1])


@pytest.mark.parametrize("backend", BACKENDS[-1:])
@pytest.mark.parametrize("call", ["load_state_dict", "state_dict", "rehearse", "release", "thawed", "zero_grad"])
def test_whatever_is_called_in_a_compiled_function_is_as_eager(dynamo, backend, call):
    runs = [build(backend, dtype=torch.bfloat16, layers=1, delta=0.5) for _ in range(2)]
    saved = build(backend, dtype=torch.bfloat16, layers=1, delta=0.5, seed=5)
    tiny.train(*saved, 4)
    state = saved[1].state_dict()
    for (model, optimizer), wrap in zip(runs, (lambda function: function, compiled), strict=True):
        if call != "rehearse":
            tiny.train(model, optimizer, 2)

        def function(x, optimizer=optimizer, model=model):
            if call == "load_state_dict":
                optimizer.load_state_dict(state)
            elif call == "thawed":
                with optimizer.thawed():
                    return x + len([p for p in model.parameters() if p.requires_grad])
            else:
                getattr(optimizer, call)()
            return x + 1

        result = wrap(function)(torch.ones(3))
        assert result.tolist() == [1.0 + (len(list(model.parameters())) if call == "thawed" else 1)] * 3
        if call != "release":
            tiny.train(model, optimizer, 4, start=7)
    (model, optimizer), (other, theirs) = runs
    assert optimizer.active == theirs.active and optimizer.is_released == theirs.is_released == (call == "release")
    assert flags(model) == flags(other)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    same_state(optimizer, theirs)


# Weights of another size or dtype.


def put(param, rows, around=None):
    """Give a parameter other memory: `rows` of its rows, repeated where it grows, in the midst of sevens."""
    with torch.no_grad():
        value = param.detach().repeat(-(-rows // len(param)), 1)[:rows].clone()
    memory = torch.full((value.numel() + 128,), 7.0, dtype=param.dtype)
    inner = memory[64:-64].view(value.shape)
    inner.copy_(value)
    param.data = inner
    param.grad = None
    return memory


@on_tiniest_backends
@with_each_storage
@pytest.mark.parametrize("rows", [5, 8, 13], ids=["shrunk", "moved", "grown"])
@pytest.mark.parametrize("when", ["constructed", "loaded"])
def test_plain_weights_of_another_size_before_the_first_step_are_adamws(backend, storage, rows, when):
    dtype, options = STORAGES[storage]
    params, optimizer = plain(backend, dtype, **options)
    if when == "loaded":
        fill_gradients(params)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    around = [put(param, rows) for param in params]
    expected = [nn.Parameter(p.detach().float().clone()) for p in params]
    adamw = torch.optim.AdamW(expected, lr=LR, weight_decay=0.0)
    if when == "loaded" and rows == ROWS:
        # Nothing of the state is lost by a move.
        earlier, _ = plain(backend, dtype)
        fill_gradients(earlier)
        for q, p in zip(expected, earlier, strict=True):
            q.grad = p.grad.float()
        held = [q.detach().clone() for q in expected]
        adamw.step()
        with torch.no_grad():
            for q, value in zip(expected, held, strict=True):
                q.copy_(value)
    for seed in (1, 2):
        fill_gradients(params, seed)
        for q, p in zip(expected, params, strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        adamw.step()
    # One bfloat16 is 2^-8 of its size; compressed moments move a step by a few per cent of lr.
    atol = 1e-6 if storage == "fp32" else 0.3 * LR
    rtol = 2.0**-6 if dtype == torch.bfloat16 else 1e-6
    for param, q, memory in zip(params, expected, around, strict=True):
        assert param.shape == (rows, COLUMNS)
        torch.testing.assert_close(param.float(), q, rtol=rtol, atol=atol)
        assert (memory[:64] == 7).all() and (memory[-64:] == 7).all()


@on_each_backend
@pytest.mark.parametrize("kind", ["grown", "shrunk", "exchanged", "cast"])
def test_what_was_changed_before_the_first_step_trains_as_constructed_on_it(backend, kind):
    def change(model):
        if kind == "grown":
            put(model.blocks[0].up.weight, 48)
            put(model.blocks[0].gate.weight, 48)
            model.blocks[0].down = nn.Linear(48, 16, bias=False) if optimizer is None else model.blocks[0].down
            model.blocks[0].down.weight.data = torch.linspace(-0.3, 0.3, 16 * 48).view(16, 48)
        elif kind == "shrunk":
            put(model.embedding.weight, 12)
            put(model.head.weight, 12)
        elif kind == "exchanged":
            model.load_state_dict({n: v + 0.01 for n, v in model.state_dict().items()})
            for p in model.parameters():
                p.data = p.data.clone()
        else:
            model.bfloat16()

    def tokens(number):
        return tiny.batch(number) % 12

    options = {"delta": 0.35, "inner_steps": 2, "lr": LR, "backend": backend}
    optimizer, expected = None, tiny.build(layers=2)
    change(expected)
    theirs = MISA(param_groups(expected), **options)
    model = tiny.build(layers=2)
    optimizer = MISA(param_groups(model), **options)
    change(model)
    for number in range(5):
        for network, own in ((model, optimizer), (expected, theirs)):
            tiny.loss_of(network, tokens(number)).backward()
            own.step()
            own.zero_grad()
        assert kind not in ("exchanged", "cast") or optimizer.active == theirs.active
        used = sum(optimizer.modules[number].numel for number in optimizer.active)
        assert used <= math.floor(options["delta"] * sum(p.numel() for p in model.parameters()))
    assert optimizer._partition.budget == theirs._partition.budget
    assert [m.numel for m in optimizer.modules] == [m.numel for m in theirs.modules]
    assert kind not in ("exchanged", "cast") or all(map(torch.equal, model.parameters(), expected.parameters()))


@on_each_backend
@pytest.mark.parametrize("granularity", ["module", "layer"])
def test_the_budget_follows_what_shrinks_before_the_first_step(backend, granularity):
    """What is active would be more than delta allows of the smaller model."""
    delta = 0.3 if granularity == "module" else 0.445
    sampler = ImportanceSampler(granularity=granularity)
    model, optimizer = build(backend, delta=delta, sampler=sampler)
    put(model.embedding.weight, 4)
    total = sum(param.numel() for param in model.parameters())
    tiny.loss_of(model, tiny.batch(0) % 4).backward()
    optimizer.step()
    assert f"{total:,} parameters" in repr(optimizer)
    assert sum(param.numel() for param in model.parameters() if param.requires_grad) <= math.floor(delta * total)


REFUSED = {
    "a module above the budget": ({}, lambda m: put(m.blocks[1].up.weight, 400), ValueError, "blocks.1.up"),
    "float16 in split": ({"param_precision": "split"}, lambda m: m.half(), ValueError, "float16"),
    "float16 in stochastic": ({"param_precision": "stochastic"}, lambda m: m.half(), ValueError, "float16"),
    "float64 in int8": ({"state_dtype": "int8"}, lambda m: m.double(), ValueError, "float64"),
    "float8": ({}, lambda m: m.to(torch.float8_e4m3fn), TypeError, "float8"),
}


@pytest.mark.parametrize("when", ["constructed", "loaded"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_constructor_would_refuse_is_refused_at_the_first_step(kind, when):
    options, change, error, word = REFUSED[kind]
    model, optimizer = build(**options)
    if when == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
    change(model)
    before, on = {name: value.clone() for name, value in model.state_dict().items()}, flags(model)
    with pytest.raises(error, match=word) as first:
        optimizer.step()
    other = tiny.build(layers=2)
    change(other)
    with pytest.raises(error) as constructor:
        MISA(param_groups(other), delta=0.3, **options)
    assert str(first.value) == str(constructor.value)
    assert flags(model) == on
    assert all(torch.equal(p.float(), before[name].float()) for name, p in model.named_parameters())
    optimizer.release()
    assert all(param.requires_grad for param in model.parameters())


@pytest.fixture(params=[("reference", "master"), (BACKENDS[-1], "fp32"), (BACKENDS[-1], "split")])
def mid_round(request):
    """A run after one step of a round of three, and what it has."""
    backend, storage = request.param
    dtype, options = STORAGES[storage]
    model, optimizer = build(backend, dtype=dtype, delta=0.4, **options)
    tiny.train(model, optimizer, 4)
    return model, optimizer


def snapshot(model, optimizer):
    values = {name: value.clone() for name, value in model.state_dict().items()}
    for param, own in optimizer.state.items():
        values |= {(id(param), name): value.clone() for name, value in own.items()}
    return values, flags(model), optimizer.active


def unchanged(model, optimizer, before):
    values, on, active = snapshot(model, optimizer)
    assert values.keys() == before[0].keys() and on == before[1] and active == before[2]
    for name, value in values.items():
        assert torch.equal(value, before[0][name]), name


@on_tiniest_backends
def test_a_weight_of_the_same_memory_under_another_shape_is_trained_on(backend):
    weight = torch.arange(48.0).view(6, 8) / 7
    param, twin = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    mine = MISA([param], lr=LR, delta=1.0, backend=backend)
    right = torch.optim.AdamW([twin], lr=LR)
    for step in range(4):
        if step == 2:
            param.data = param.data.view(-1)
        grad = torch.sin(weight + step)
        param.grad, twin.grad = grad.clone().view(param.shape), grad
        mine.step()
        right.step()
        torch.testing.assert_close(param.detach().view(6, 8), twin.detach(), rtol=2e-6, atol=1e-6)


CHANGES = {
    "shrunk": (lambda p: put(p, len(p) - 3), lambda p: str(tuple(p.shape))),
    "grown": (lambda p: put(p, 2 * len(p)), lambda p: str(tuple(p.shape))),
    "transposed": (lambda p: setattr(p, "data", p.data.t()), lambda p: str(tuple(p.shape))),
    "cast": (lambda p: setattr(p, "data", p.data.half()), lambda p: str(p.dtype)),
    "strided": (lambda p: setattr(p, "data", p.data.repeat(1, 2)[:, ::2]), lambda p: str(p.stride())),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_an_active_weight_of_another_form_is_refused_in_every_step(mid_round, change):
    model, optimizer = mid_round
    name = next(name for name in sorted(flags(model)) if len(set(model.get_parameter(name).shape)) == 2)
    param = model.get_parameter(name)
    tiny.loss_of(model, tiny.batch(9)).backward()
    was = {key: str(getattr(param, key) if key == "dtype" else tuple(param.shape)) for key in ("dtype", "shape")}
    CHANGES[change][0](param)
    param.grad = torch.ones_like(param)
    before = snapshot(model, optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError) as refused:
            optimizer.step()
        assert name in str(refused.value) and CHANGES[change][1](param) in str(refused.value)
        assert was["dtype" if change == "cast" else "shape"] in str(refused.value)
        unchanged(model, optimizer, before)
    held = param.detach().clone()
    optimizer.release()
    assert torch.equal(param, held) and param.stride() == held.stride() or change == "strided"
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("change", ["shrunk", "grown", "cast"])
def test_another_form_of_what_is_off_is_refused_at_the_end_of_the_round(mid_round, change):
    model, optimizer = mid_round
    off = next(m for number, m in enumerate(optimizer.modules) if number not in optimizer.active)
    param = off.blocks[0].param
    was = str(param.dtype if change == "cast" else tuple(param.shape))
    tiny.loss_of(model, tiny.batch(9)).backward()
    held = {p: p.grad for p in model.parameters() if p.grad is not None}
    CHANGES[change][0](param)
    optimizer.step()
    for p, grad in held.items():
        p.grad = grad
    before = snapshot(model, optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError) as refused:
            optimizer.step()
        assert off.name in str(refused.value) and was in str(refused.value)
        assert CHANGES[change][1](param) in str(refused.value)
        unchanged(model, optimizer, before)
    optimizer.release()
    assert CHANGES[change][1](param) in (str(tuple(param.shape)), str(param.dtype))


@on_tiniest_backends
def test_release_writes_back_all_but_what_was_resized(backend):
    """The written-back ones are their masters rounded; masters of the resized ones are lost."""
    params, optimizer = plain(backend, torch.bfloat16)
    for seed in range(3):
        fill_gradients(params, seed)
        optimizer.step()
    masters = [optimizer.state[p]["master"].clone() for p in params]
    with torch.no_grad():
        params[1].add_(1)
    memory = put(params[0], 5)
    held = [p.detach().clone() for p in params[:2]]
    optimizer.release()
    assert all(map(torch.equal, params, held)) and (memory[:64] == 7).all() and (memory[-64:] == 7).all()
    # Rounded stochastically, to one of its neighbours.
    torch.testing.assert_close(params[2].float(), masters[2], rtol=2.0**-7, atol=1e-9)
    assert optimizer.is_released


def test_a_mended_weight_is_trained_on():
    params, optimizer = plain()
    fill_gradients(params)
    optimizer.step()
    kept = params[0].detach().clone()
    params[0].data = torch.zeros(3, 3)
    fill_gradients(params)
    with pytest.raises(RuntimeError, match="first step"):
        optimizer.step()
    params[0].data = kept.clone()
    fill_gradients(params)
    optimizer.step()
    assert not torch.equal(params[0], kept) and optimizer.state[params[0]]["age"].item() == 2


# Writes to weights.

FIVE = 5.0


def by_numpy(params, value=FIVE):
    for p in params:
        words = p.data.view(torch.int16) if p.dtype == torch.bfloat16 else p.data
        words.numpy()[...] = torch.full_like(p, value).detach().view(words.dtype).numpy()


def by_dlpack(params, value=FIVE):
    for p in params:
        torch.from_dlpack(p.detach()).copy_(torch.full_like(p, value))


def by_no_grad(params, value=FIVE):
    with torch.no_grad():
        for p in params:
            p.fill_(value)


WRITES = {
    "no_grad": by_no_grad,
    "data": lambda params, value=FIVE: [p.data.fill_(value) for p in params],
    "foreach": lambda params, value=FIVE: torch._foreach_copy_(
        [p.data for p in params], [torch.full_like(p, value) for p in params]
    ),
    "numpy": by_numpy,
    "dlpack": by_dlpack,
    "exchanged": lambda params, value=FIVE: [setattr(p, "data", torch.full_like(p, value).detach()) for p in params],
}
# Half an ulp of bfloat16 at five, on either side, where the residual cannot tell.
SPLIT = 2.0**-5
write_all_ways = pytest.mark.parametrize("how", WRITES)


def near(param, storage, value=FIVE):
    error = (param.detach().float() - value).abs().max().item()
    assert error <= (SPLIT if storage == "split" else 0.0), error


@on_tiniest_backends
@with_each_storage
@write_all_ways
def test_what_is_written_before_release_stays(backend, storage, how):
    dtype, options = STORAGES[storage]
    params, optimizer = plain(backend, dtype, **options)
    for seed in range(3):
        fill_gradients(params, seed)
        optimizer.step()
    kept = params[0].detach().clone()
    WRITES[how](params[1:])
    optimizer.release()
    for param in params[1:]:
        near(param, storage)
    assert torch.equal(params[0], kept) or storage not in ("fp32", "fp32 int8", "stochastic")
    # At most the rounding of its own residual or master.
    assert (params[0].float() - kept.float()).abs().max() <= 2.0**-6


@on_tiniest_backends
@pytest.mark.parametrize("storage", ["fp32", "master", "master int8", "split", "stochastic"])
@pytest.mark.parametrize("how", ["no_grad", "foreach", "numpy", "exchanged"])
@pytest.mark.parametrize("keep_states", ["staying", "none"])
def test_what_is_written_before_a_switch_stays_with_all(backend, storage, how, keep_states):
    """Those that leave and those that stay have no gradient in the step that ends the round."""
    dtype, options = STORAGES[storage]
    params, optimizer = plain(
        backend, dtype, count=6, delta=0.5, inner_steps=3, keep_states=keep_states, seed=1, **options
    )
    stayed = left = 0
    for number in range(3):
        # Another value each time: what a weight has already, nobody can be seen to write.
        value = FIVE + number / 2
        before = [p for p in params if p.requires_grad]
        for seed in range(2):
            fill_gradients(params, 10 * number + seed)
            optimizer.step()
        WRITES[how](before, value)
        optimizer.zero_grad()
        optimizer.step()
        for param in before:
            near(param, storage, value)
            stayed, left = stayed + param.requires_grad, left + (not param.requires_grad)
        # And those that stay go on from there: an update of Adam is a few lr at most.
        fill_gradients(params, 7)
        optimizer.step()
        for param in before:
            error = (param.detach().float() - value).abs().max().item()
            assert error <= 8 * LR + SPLIT and (error > 0 or not param.requires_grad or dtype == torch.bfloat16)
        for _ in range(2):
            optimizer.step()
    assert stayed > 0 and left > 0


@on_each_backend
@with_each_storage
@write_all_ways
def test_what_is_written_before_saving_is_saved(backend, storage, how):
    dtype, options = STORAGES[storage]
    params, optimizer = plain(backend, dtype, **options)
    for seed in range(3):
        fill_gradients(params, seed)
        optimizer.step()
    WRITES[how](params[1:])
    state = optimizer.state_dict()
    for index in range(1, 4):
        if "master" in state["state"][index]:
            assert (state["state"][index]["master"] == FIVE).all()
    again, resumed = plain(backend, dtype, **options)
    with torch.no_grad():
        for p, q in zip(again, params, strict=True):
            p.copy_(q)
    resumed.load_state_dict(state)
    # Saving has brought the running one to the same masters.
    for own, run in ((params, optimizer), (again, resumed)):
        fill_gradients(own, 8)
        run.step()
        for param in own[1:]:
            assert (param.detach().float() - FIVE).abs().max() <= 2 * LR + SPLIT
    assert all(map(torch.equal, params, again))


@on_tiniest_backends
@pytest.mark.parametrize("storage", ["fp32", "master", "split"])
@pytest.mark.parametrize("how", ["no_grad", "exchanged"])
def test_what_torch_tells_of_counts_from_the_next_step(backend, storage, how):
    dtype, options = STORAGES[storage]
    params, optimizer = plain(backend, dtype, **options)
    expected = [nn.Parameter(p.detach().float().clone()) for p in params]
    adamw = torch.optim.AdamW(expected, lr=LR, weight_decay=0.0)
    for seed in range(3):
        if seed == 2:
            WRITES[how](params)
            by_no_grad(expected)
        fill_gradients(params, seed)
        for p, q in zip(params, expected, strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        adamw.step()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.float(), q, rtol=2.0**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@on_each_backend
@pytest.mark.parametrize("storage", ["fp32", "stochastic"])
@write_all_ways
def test_without_a_master_every_write_counts_at_once(backend, storage, how):
    dtype, options = STORAGES[storage]
    params, optimizer = plain(backend, dtype, **options)
    fill_gradients(params)
    optimizer.step()
    WRITES[how](params)
    fill_gradients(params, 1)
    optimizer.step()
    for param in params:
        error = (param.detach().float() - FIVE).abs().max()
        assert error <= 2 * LR + SPLIT and (error > 0 or dtype == torch.bfloat16)


# Flags.


def total(model, frozen=()):
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(tuple(frozen)))


def active_layers(optimizer):
    return {optimizer.monitor.layers[optimizer.modules[number].layer] for number in optimizer.active}


@on_each_backend
@pytest.mark.parametrize("mode", ["finetune", "pretrain"])
@pytest.mark.parametrize("granularity", ["module", "layer"])
@pytest.mark.parametrize("is_thawed", [False, True], ids=["bare", "in thawed()"])
def test_a_layer_frozen_in_mid_run_is_never_trained_again(backend, mode, granularity, is_thawed):
    delta = 0.3 if granularity == "module" else 0.4
    sampler = ImportanceSampler(granularity=granularity)
    model, optimizer = build(backend, mode, layers=3, delta=delta, sampler=sampler)
    tiny.train(model, optimizer, 4)
    layer = max(active_layers(optimizer))
    part = model.get_submodule(layer)
    if is_thawed:
        with optimizer.thawed():
            assert all(p.requires_grad for p in model.parameters()) or mode == "finetune"
            part.requires_grad_(False)
    else:
        part.requires_grad_(False)
        part.zero_grad()
        # Where the round had nothing else to train, it may be for a while only, until another round without a gradient.
        said = heard(lambda: train_or_not(model, optimizer, 5, start=4))
        assert any(layer in sentence and "switched off" in sentence for sentence in said)
        assert len(said) <= 2
    trained = trained_in(model, optimizer, 8, start=9)
    assert trained and not any(name.startswith(layer) for name in trained)
    assert not any(module.name.startswith(layer) for module in optimizer.modules)
    # N stays: memory that was counted is there.
    assert f"{total(model):,} parameters" in repr(optimizer)
    optimizer.release()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.startswith(layer)
    }


@on_each_backend
def test_one_active_matrix_frozen_leaves_the_rest_of_its_layer(backend):
    model, optimizer = build(backend, layers=2, delta=0.45)
    tiny.train(model, optimizer, 1)
    ours = [name for name in sorted(names(optimizer)) if name.startswith("blocks.1.")]
    assert len(ours) >= 2
    model.get_submodule(ours[0]).requires_grad_(False)
    model.get_submodule(ours[0]).weight.grad = None
    trained_in(model, optimizer, 1, start=1)
    drawable = {module.name for module in optimizer.modules}
    assert ours[0] not in drawable and len(drawable) == 13
    assert f"{ours[0]}.weight" not in trained_in(model, optimizer, 6, start=5)


@on_each_backend
@pytest.mark.parametrize("is_thawed", [False, True], ids=["bare", "in thawed()"])
@pytest.mark.parametrize("mode", ["finetune", "pretrain"])
def test_a_layer_thawed_in_mid_run_is_drawn_and_the_others_keep_what_they_have(backend, is_thawed, mode):
    model, optimizer = build(backend, mode, layers=3, frozen=["blocks.0"])
    tiny.train(model, optimizer, 10)
    scores = dict(zip(optimizer.monitor.names, optimizer._run.scores.candidates.importance.tolist(), strict=True))
    assert {layer for layer in optimizer.monitor.layers if layer != "blocks.0"} == {"blocks.1", "blocks.2"}
    assert f"{total(model, ['blocks.0']):,} parameters" in repr(optimizer)
    ages = {name: own["age"].clone() for name, p in model.named_parameters() if "age" in (own := optimizer.state[p])}
    if is_thawed:
        with optimizer.thawed():
            assert not any(p.requires_grad for p in model.blocks[0].parameters())
            model.blocks[0].requires_grad_(True)
        said = heard(lambda: tiny.train(model, optimizer, 2, start=10))
        assert not said
    else:
        model.blocks[0].requires_grad_(True)
        said = heard(lambda: tiny.train(model, optimizer, 2, start=10))
        # One for what can be drawn, one for norms that are never trained in fine-tuning.
        assert len(said) == 1 and all("blocks.0." in sentence for sentence in said)
    assert optimizer.monitor.layers == ["blocks.0", "blocks.1", "blocks.2"] == sorted(optimizer.monitor.layers)
    order = [module.name for module in optimizer.modules]
    assert len(order) == 21
    assert f"{total(model):,} parameters" in repr(optimizer)
    candidates = optimizer._run.scores.candidates
    after = dict(zip(optimizer.monitor.names, candidates.importance.tolist(), strict=True))
    layers = dict(zip(optimizer.monitor.names, candidates.layer.tolist(), strict=True))
    assert all(layers[name] == int(name.split(".")[1]) for name in order)
    # Those that were active in the round that ended have been measured once more.
    same = [name for name in scores if after[name] == scores[name]]
    assert len(same) >= 7 and any(scores[name] for name in scores)
    assert all(after[name] for name in scores if scores[name])
    assert all(optimizer.state[p]["age"] >= 0 for p in model.blocks[1].q.parameters()) and ages
    trained = trained_in(model, optimizer, 8, start=12)
    assert {"blocks.0.q.weight", "blocks.0.up.weight", "blocks.1.q.weight"} <= trained
    assert any(name.startswith("blocks.0.norm") for name in trained) == (mode == "pretrain")
    assert sum(optimizer.modules[n].numel for n in optimizer.active) <= math.floor(0.3 * total(model))


@on_each_backend
@pytest.mark.parametrize("takes_back", ["zero_grad", "step"])
@pytest.mark.parametrize("is_frozen_after", [False, True])
def test_gradients_held_stay_at_delta_where_all_is_toggled(backend, takes_back, is_frozen_after):
    model, optimizer = build(backend, inner_steps=2, frozen=["norm"])
    said = []
    for number in range(8):
        model.requires_grad_(True)

        def one(number=number):
            if takes_back == "zero_grad":
                optimizer.zero_grad()
            tiny.loss_of(model, tiny.batch(number)).backward()
            optimizer.step()

        said += heard(one)
        held = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
        assert 0 < held <= 0.3 * total(model, ["norm"])
        if is_frozen_after:
            model.requires_grad_(False)
    assert len(said) == 1 and "thawed()" in said[0]
    assert len({record.active for record in optimizer.monitor.rounds}) > 1
    model.requires_grad_(True)
    optimizer.zero_grad()
    on = flags(model)
    assert on == {f"{name}.weight" for name in names(optimizer)}
    optimizer.release()
    assert flags(model) == {name for name, _ in model.named_parameters() if not name.startswith("norm.")}


@on_each_backend
def test_all_switched_off_stays_off_until_thawed(backend):
    model, optimizer = build(backend, inner_steps=2)
    tiny.train(model, optimizer, 2)
    active = optimizer.active
    model.requires_grad_(False)
    optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(5):
            optimizer.step()
            assert not flags(model) and optimizer.active == active
    assert all(map(torch.equal, before, model.parameters()))
    model.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert trained_in(model, optimizer, 6, start=3)
    assert len(optimizer.modules) == 14 and flags(model) == {f"{name}.weight" for name in names(optimizer)}


@on_each_backend
def test_one_that_is_merely_off_is_put_back_with_the_round(backend):
    model, optimizer = build(backend, inner_steps=3)
    tiny.train(model, optimizer, 1)
    off = next(m.name for m in optimizer.modules if m.name not in names(optimizer))
    other = next(m.name for m in optimizer.modules[::-1] if m.name not in names(optimizer))
    before = model.get_submodule(other).weight.detach().clone()
    for name in (off, other):
        model.get_submodule(name).requires_grad_(True)
    said = heard(lambda: tiny.train(model, optimizer, 2, start=1))
    assert len(said) == 1 and off in said[0]
    assert torch.equal(model.get_submodule(other).weight, before)
    assert flags(model) == {f"{name}.weight" for name in names(optimizer)} and len(optimizer.modules) == 14


def test_in_thawed_no_step_is_taken_and_gradients_of_what_is_off_go():
    model, optimizer = build(frozen=["blocks.1.norm1"])
    tiny.train(model, optimizer, 1)
    on = flags(model)
    with optimizer.thawed(), optimizer.thawed():
        assert flags(model) == {n for n, _ in model.named_parameters() if not n.startswith("blocks.1.norm1")}
        gradients = torch.autograd.grad(
            tiny.loss_of(model, tiny.batch(1)), [p for p in model.parameters() if p.requires_grad]
        )
        assert all(g is not None for g in gradients)
        tiny.loss_of(model, tiny.batch(1)).backward()
        before = snapshot(model, optimizer)
        with pytest.raises(RuntimeError, match=r"thawed\(\)"):
            optimizer.step()
        unchanged(model, optimizer, before)
    assert flags(model) == on
    assert {n for n, p in model.named_parameters() if p.grad is not None} == on


def test_a_block_that_raises_gives_the_round_back():
    model, optimizer = build()
    on = flags(model)
    with pytest.raises(KeyError), optimizer.thawed():
        raise KeyError
    assert flags(model) == on
    optimizer.step()
    assert optimizer.state_bytes > 0


@on_each_backend
@pytest.mark.parametrize("when", ["constructed", "loaded"])
def test_flags_changed_in_thawed_before_the_first_step_count_from_it(backend, when):
    model, optimizer = build(backend, layers=3, frozen=["blocks.0"], delta=0.35)
    if when == "loaded":
        tiny.train(model, optimizer, 4)
        optimizer.load_state_dict(optimizer.state_dict())
    with optimizer.thawed():
        model.blocks[0].requires_grad_(True)
        model.blocks[2].requires_grad_(False)
    trained = trained_in(model, optimizer, 8, start=20)
    assert {name[:8] for name in trained} == {"blocks.0", "blocks.1"}
    assert {module.name[:8] for module in optimizer.modules} == {"blocks.0", "blocks.1"}
    assert f"{total(model):,} parameters" in repr(optimizer)


def test_what_is_thawed_and_cannot_be_trained_stays_frozen_with_a_sentence():
    """It is larger than the budget, of which the constructor would complain."""
    model = tiny.build(layers=2)
    big = model.blocks[0].big = nn.Linear(16, 400, bias=False).requires_grad_(False)
    optimizer = MISA(param_groups(model), delta=0.3, inner_steps=2, backend="reference")
    tiny.train(model, optimizer, 3)
    big.requires_grad_(True)
    said = heard(lambda: tiny.train(model, optimizer, 4, start=3))
    assert any("blocks.0.big" in sentence and "stays frozen" in sentence for sentence in said)
    assert not big.weight.requires_grad and len(optimizer.modules) == 14
    assert f"{total(model, ['blocks.0.big']):,} parameters" in repr(optimizer)
    optimizer.release()
    assert flags(model) == {name for name, _ in model.named_parameters() if "big" not in name}


@on_each_backend
def test_what_is_thawed_to_be_frozen_changes_no_flag(backend):
    """An embedding, in fine-tuning: it counts in N from then on, as at construction, and is never trained."""
    model, optimizer = build(backend, frozen=["embedding"], inner_steps=2)
    before = model.embedding.weight.detach().clone()
    model.embedding.requires_grad_(True)
    tiny.train(model, optimizer, 6)
    assert torch.equal(model.embedding.weight, before) and not model.embedding.weight.requires_grad
    assert f"{total(model):,} parameters" in repr(optimizer)
    optimizer.release()
    assert model.embedding.weight.requires_grad


@on_tiniest_backends
def test_a_gradient_of_another_size_is_refused_before_anything_changes(backend):
    """It was left from a time when the weight was smaller; what lies behind it is no gradient."""
    first, second = nn.Parameter(torch.ones(8, 4)), nn.Parameter(torch.ones(8, 4))
    optimizer = MISA([first, second], lr=LR, delta=1.0, backend=backend)
    first.grad, second.grad = torch.ones(8, 4), torch.ones(8, 4)
    optimizer.step()
    whole = second.data
    second.grad = None
    second.data = torch.ones(3, 4)
    second.grad = torch.ones(3, 4)
    second.data = whole
    before = first.detach().clone(), second.detach().clone()
    with pytest.raises(RuntimeError, match=r"12 elements and its weight 32.*zero_grad\(\)"):
        optimizer.step()
    assert torch.equal(first, before[0]) and torch.equal(second, before[1])
    second.grad = torch.ones(8, 4)
    optimizer.step()
    assert not torch.equal(first, before[0])


@pytest.mark.filterwarnings("ignore:MISA steps in plain PyTorch")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_float64_gradients_of_float32_weights_are_used_where_a_backend_can(backend):
    weight = torch.arange(32.0).view(8, 4)
    param, twin = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    param.grad_dtype = torch.float64
    optimizer = MISA([param], lr=LR, delta=1.0, backend=backend)
    right = torch.optim.AdamW([twin], lr=LR)
    for step in range(3):
        grad = torch.sin(weight + step)
        param.grad, twin.grad = grad.double(), grad
        optimizer.step()
        right.step()
    torch.testing.assert_close(param.detach(), twin.detach(), rtol=1e-6, atol=1e-6)
    assert optimizer.backend == "reference"


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the CPU library")
def test_a_backend_that_cannot_use_float64_gradients_names_one_that_can():
    param = nn.Parameter(torch.ones(8, 4))
    param.grad_dtype = torch.float64
    optimizer = MISA([param], delta=1.0, backend="cpu")
    param.grad = torch.ones(8, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float64 weights or gradients on cpu.*use backend='auto'"):
        optimizer.step()


@pytest.mark.parametrize("end", ["release", "another", "delete"])
def test_a_run_that_ends_within_thawed_leaves_the_users_flags(end):
    model, optimizer = build("reference")
    tiny.train(model, optimizer, 4)
    model.blocks[0].k.requires_grad_(model.blocks[0].k.weight.requires_grad)
    other = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with optimizer.thawed():
            model.blocks[0].q.requires_grad_(False)
            if end == "release":
                optimizer.release()
            elif end == "another":
                other = MISA(param_groups(model), delta=0.3)
            else:
                optimizer = None
                gc.collect()
            if other is None:
                assert flags(model) == {n for n, _ in model.named_parameters()} - {"blocks.0.q.weight"}
    if other is None:
        assert flags(model) == {n for n, _ in model.named_parameters()} - {"blocks.0.q.weight"}
    else:
        assert flags(model) == {f"{name}.weight" for name in names(other)}
        other.release()
        assert flags(model) == {n for n, _ in model.named_parameters()} - {"blocks.0.q.weight"}


def test_thawed_within_thawed_changes_nothing():
    model, optimizer = build("reference")
    tiny.train(model, optimizer, 1)
    with optimizer.thawed():
        model.blocks[0].requires_grad_(False)
        with optimizer.thawed():
            assert not any(param.requires_grad for param in model.blocks[0].parameters())
        assert not any(param.requires_grad for param in model.blocks[0].parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.train(model, optimizer, 12, start=1)
    assert not any(module.name.startswith("blocks.0.") for module in optimizer.modules)


@on_each_backend
def test_what_is_frozen_is_not_flushed(backend):
    model, optimizer = build(backend, momentum_flush=True, inner_steps=6)
    tiny.train(model, optimizer, 3)
    frozen = next(name for name in sorted(flags(model)))
    with optimizer.thawed():
        model.get_parameter(frozen).requires_grad_(False)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.train(model, optimizer, 9, start=3)
    assert torch.equal(model.get_parameter(frozen), before[frozen])
    assert any(not torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_a_copy_within_thawed_has_what_was_changed_there():
    model, optimizer = build("reference")
    tiny.train(model, optimizer, 1)
    with optimizer.thawed():
        model.blocks[0].requires_grad_(False)
        twin, other = copy.deepcopy((model, optimizer))
    for own, its in ((model, optimizer), (twin, other)):
        tiny.train(own, its, 12, start=1)
    assert len(optimizer.modules) == len(other.modules) < 14
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_a_state_is_read_joined_and_lent_as_a_dict():
    model, optimizer = build("reference")
    tiny.train(model, optimizer, 1)
    param = next(param for param in model.parameters() if param.requires_grad)
    for copied in (optimizer.state.copy(), copy.copy(optimizer.state), optimizer.state | {}):
        assert type(copied) is dict and copied.keys() == optimizer.state.keys()
    state = optimizer.state
    state |= {param: {}}
    tiny.train(model, optimizer, 1, start=1)
    assert int(optimizer.state[param]["age"].max()) == 1
    other, second = build("reference")
    tiny.train(other, second, 1)
    second.state = optimizer.state
    tiny.train(other, second, 1, start=1)
    assert not set(second.state) & set(model.parameters()) and set(optimizer.state) <= set(model.parameters())
    assert {int(own["age"].max()) for param, own in second.state.items() if param.requires_grad} == {1}


@pytest.mark.parametrize("how", ["constructed so", "as at first"])
def test_a_run_with_frozen_layers_is_resumed_as_the_sentence_says(how):
    model, optimizer = build("reference")
    tiny.train(model, optimizer, 1)
    with optimizer.thawed():
        model.blocks[0].requires_grad_(False)
    tiny.train(model, optimizer, 12, start=1)
    saved, weights = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    tiny.train(model, optimizer, 8, start=13)
    other = tiny.build(layers=len(model.blocks))
    other.load_state_dict(weights)
    if how == "constructed so":
        other.blocks[0].requires_grad_(False)
    resumed = MISA(param_groups(other), backend="reference", **OPTIONS)
    with pytest.raises(ValueError, match="repeat that within `with optimizer.thawed"):
        resumed.load_state_dict(saved)
    if how == "as at first":
        with resumed.thawed():
            other.blocks[0].requires_grad_(False)
        resumed.load_state_dict(saved)
        tiny.train(other, resumed, 8, start=13)
        assert all(map(torch.equal, model.parameters(), other.parameters()))
