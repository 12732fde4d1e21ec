"""What does MISA make of what others do with it whole: failing, dropped, constructed twice, copied, cleared, loaded?"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import os
import pickle
import warnings
import weakref
from collections import defaultdict

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from misa_kernels import MISA, Candidates, Draw, ImportanceSampler, Sampler, UniformSampler, kernels, param_groups

BACKENDS = ["reference", *(name for name in ("cpu",) if kernels.unusable(name) is None)]
STORAGES = {
    "fp32": (torch.float32, {}),
    "master": (torch.bfloat16, {}),
    "split bf16": (torch.bfloat16, {"param_precision": "split", "state_dtype": "bf16"}),
    "stochastic int8": (torch.bfloat16, {"param_precision": "stochastic", "state_dtype": "int8"}),
}
LR = 1e-2

on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
with_each_storage = pytest.mark.parametrize("storage", STORAGES)


def make(model, mode="finetune", **options):
    options = {"delta": 0.3, "inner_steps": 3, "lr": LR, "weight_decay": 0.1, "backend": "reference"} | options
    return MISA(param_groups(model, mode), **options)


def build(dtype=torch.float32, frozen=("norm",), mode="finetune", layers=2, **options):
    model = tiny.build(layers=layers, dtype=dtype)
    for part in frozen:
        model.get_submodule(part).requires_grad_(False)
    return model, make(model, mode, **options)


def flags(model):
    return {name for name, param in model.named_parameters() if param.requires_grad}


def users(model, frozen=("norm",)):
    """Names of what `build` leaves trainable."""
    return {name for name, _ in model.named_parameters() if not name.startswith(tuple(f"{part}." for part in frozen))}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def heard(call):
    """UserWarnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [warning for warning in caught if issubclass(warning.category, UserWarning)]


def check_sentence(warning):
    """One sentence, at a line of this file."""
    message = str(warning.message)
    assert "\n" not in message and ". " not in message and not message.endswith(".") and len(message) > 20, message
    assert warning.filename == __file__, (warning.filename, message)


# Constructors that fail.


class Choosy(Sampler):
    def draw(self, candidates, budget, round, seed):
        raise LookupError("nothing is good enough")


FAILING = {
    "too large": (ValueError, {"delta": 0.05}),
    "lr": (ValueError, {"lr": -1.0}),
    "unknown argument": (TypeError, {"momentum": 0.9}),
    "no such backend": (ValueError, {"backend": "tpu"}),
    "amsgrad": (ValueError, {"amsgrad": True}),
    "seed": (ValueError, {"seed": -1}),
    "its sampler": (LookupError, {"sampler": Choosy()}),
    "depth window": (ValueError, {"sampler": ImportanceSampler(depth_window=1), "groups": "plain"}),
    "group's lr": (ValueError, {"groups": "lr"}),
    "float8": (TypeError, {"groups": "float8"}),
}


@pytest.mark.parametrize("after", ["nothing", "a MISA"])
@pytest.mark.parametrize("kind", FAILING)
def test_a_constructor_that_fails_changes_nothing(kind, after):
    error, options = FAILING[kind]
    model = tiny.build(layers=2)
    model.norm.requires_grad_(False)
    earlier = None
    if after == "a MISA":
        earlier = make(model)
        tiny.train(model, earlier, 2)
        saved = copy.deepcopy(earlier.state_dict())
    elif kind == "float8":
        model.head.to(torch.float8_e4m3fn)
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.full_like(param, 0.5, dtype=param.dtype)
    before, on = {name: value.clone() for name, value in model.state_dict().items()}, flags(model)
    grads = {name: param.grad for name, param in model.named_parameters()}
    options = dict(options)
    how = options.pop("groups", "groups")
    groups = param_groups(model, dense=[model.head] if how == "float8" else [])
    if how == "plain":
        groups = [param for param in model.parameters() if param.ndim == 2]
    if how == "lr":
        groups[-1]["lr"] = float("nan")
    if how == "float8" and earlier is not None:
        pytest.skip("weights of a run are not cast")
    with pytest.raises(error), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        MISA(groups, **({"delta": 0.3} | options))
    assert flags(model) == on and all(param.grad is grads[name] for name, param in model.named_parameters())
    assert all(torch.equal(value.float(), before[name].float()) for name, value in model.state_dict().items())
    if earlier is not None:
        assert same(earlier.state_dict(), saved) and not earlier.is_released
        earlier.step()


def test_another_default_device_is_of_no_account_or_changes_nothing():
    model = tiny.build(layers=2)
    expected, theirs = build(frozen=())
    torch.set_default_device("meta")
    try:
        optimizer = make(model)
        assert flags(model) == flags(expected)
    finally:
        torch.set_default_device(None)
    assert tiny.train(model, optimizer, 7) == tiny.train(expected, theirs, 7)


# Dropped, and constructed again.


@pytest.mark.parametrize("backend", BACKENDS[-1:])
@with_each_storage
@pytest.mark.parametrize("steps", [0, 4])
def test_a_dropped_optimizer_gives_flags_back_and_leaves_weights(backend, storage, steps):
    dtype, options = STORAGES[storage]
    model, optimizer = build(dtype, backend=backend, **options)
    tiny.train(model, optimizer, steps)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    alive = weakref.ref(optimizer)
    assert flags(model) != users(model)
    del optimizer
    gc.collect()
    assert alive() is None and flags(model) == users(model)
    assert same(dict(model.state_dict()), before)
    # And the next one knows of nothing.
    again = None

    def construct():
        nonlocal again
        again = make(model, backend=backend, **options)

    assert not heard(construct) and len(again.modules) == 14
    tiny.train(model, again, 4)


def test_dropping_gives_back_what_was_thawed_and_frozen_in_mid_run():
    model, optimizer = build()
    tiny.train(model, optimizer, 1)
    with optimizer.thawed():
        model.norm.requires_grad_(True)
        model.blocks[0].requires_grad_(False)
    del optimizer
    gc.collect()
    assert flags(model) == users(model, ["blocks.0"])


@pytest.fixture
def no_collector():
    """Python collects when a test asks for it."""
    gc.disable()
    yield
    gc.enable()


def test_one_in_a_cycle_is_taken_over_and_its_end_changes_nothing(no_collector):
    model, optimizer = build()
    tiny.train(model, optimizer, 4)
    optimizer.itself, alive = optimizer, weakref.ref(optimizer)
    del optimizer
    again = []
    (said,) = heard(lambda: again.append(make(model)))
    check_sentence(said)
    assert alive() is not None and len(again[0].modules) == 14
    tiny.train(model, again[0], 1)
    before = flags(model)
    gc.collect()
    assert alive() is None and flags(model) == before != users(model)
    again[0].release()
    assert flags(model) == users(model)


@pytest.mark.parametrize("change", ["all on", "only the head", "one frozen", "none"])
def test_one_collected_late_leaves_the_flags_that_were_set_since(no_collector, change):
    """Python's collector comes when it comes: other code may train the model by then."""
    model, optimizer = build(frozen=("norm", "head"))
    tiny.train(model, optimizer, 4)
    optimizer.itself, alive = optimizer, weakref.ref(optimizer)
    del optimizer
    theirs = users(model, ("norm", "head"))
    if change == "all on":
        model.requires_grad_(True)
        theirs = flags(model)
    elif change == "only the head":
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        theirs = {"head.weight"}
    elif change == "one frozen":
        # Of three in its layer.
        frozen = max(flags(model))
        model.get_parameter(frozen).requires_grad_(False)
        theirs -= {frozen}
    assert alive() is not None
    gc.collect()
    assert alive() is None and flags(model) == theirs


def test_a_monitor_a_scaler_and_hooks_keep_no_optimizer(no_collector):
    # torch's first optimizer in a process hangs in a cycle.
    build()
    gc.collect()
    model, optimizer = build()
    monitor, scaler = optimizer.monitor, torch.amp.GradScaler("cpu")
    for step in range(4):
        scaler.scale(tiny.loss_of(model, tiny.batch(step))).backward()
        scaler.step(optimizer)
        scaler.update()
    alive = weakref.ref(optimizer)
    del optimizer
    assert alive() is None and flags(model) == users(model)
    assert len(monitor.rounds) == 2 and str(monitor)


@on_each_backend
def test_one_dropped_within_backward_lets_go_of_what_comes_after(no_collector, backend):
    build()
    gc.collect()
    model, optimizer = build(layers=4, backend=backend, release_gradients=True)
    tiny.train(model, optimizer, 3)
    alive, held = weakref.ref(optimizer), [optimizer]
    del optimizer

    def drop(module, inputs, output):
        output.register_hook(lambda grad: held.clear())

    handle = model.blocks[2].register_forward_hook(drop)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    on = flags(model)
    tiny.loss_of(model, tiny.batch(3)).backward()
    handle.remove()
    assert alive() is None and flags(model) == users(model)
    updated = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    # What came before the drop was used up, what came after it is left to whoever is next.
    assert updated and {name for name, param in model.named_parameters() if param.grad is not None} == on - updated
    adamw = torch.optim.AdamW(model.parameters(), lr=LR)
    tiny.train(model, adamw, 1)
    changed = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert changed >= users(model) - {"embedding.weight"}


@on_each_backend
@with_each_storage
def test_a_second_one_releases_the_first(backend, storage):
    """As release() and a new MISA, weights included."""
    dtype, options = STORAGES[storage]
    (model, first), (other, released) = (build(dtype, backend=backend, **options) for _ in range(2))
    for run in ((model, first), (other, released)):
        tiny.train(*run, 4)
    second = None

    def construct():
        nonlocal second
        second = make(model, backend=backend, seed=3, **options)

    (warning,) = heard(construct)
    check_sentence(warning)
    released.release()
    assert first.is_released and flags(model) != users(model)
    expected = make(other, backend=backend, seed=3, **options)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert second.active == expected.active and flags(model) == flags(other) and len(second.modules) == 14
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="another MISA"):
        first.step()
    with pytest.raises(RuntimeError, match="another MISA"):
        first.load_state_dict(released.state_dict())
    first.release()
    first.zero_grad()
    del first
    gc.collect()
    assert same(dict(model.state_dict()), before) and flags(model) == flags(other)
    assert tiny.train(model, second, 7) == tiny.train(other, expected, 7)


# Copies.


def duplicate(how, thing):
    return copy.deepcopy(thing) if how == "deepcopy" else pickle.loads(pickle.dumps(thing))


copy_both_ways = pytest.mark.parametrize("how", ["deepcopy", "pickle"])


@copy_both_ways
@pytest.mark.parametrize("steps", [0, 4, 6])
def test_a_copy_of_the_model_alone_is_recognised(how, steps):
    model, optimizer = build(layers=3)
    tiny.train(model, optimizer, steps)
    twin = duplicate(how, model)
    assert flags(twin) == flags(model) != users(model)
    second = None

    def construct():
        nonlocal second
        second = make(twin)

    (warning,) = heard(construct)
    check_sentence(warning)
    assert "copy" in str(warning.message)
    assert len(second.modules) == len(optimizer.modules) and not optimizer.is_released
    assert tiny.train(twin, second, 4) != [] and tiny.train(model, optimizer, 4, start=steps)
    second.release()
    assert flags(twin) == users(twin)


@copy_both_ways
def test_a_copy_made_in_thawed_needs_no_guess(how):
    model, optimizer = build(layers=3)
    tiny.train(model, optimizer, 4)
    with optimizer.thawed():
        twin = duplicate(how, model)
    assert flags(twin) == users(model)
    keep = []
    assert not heard(lambda: keep.append(make(twin)))
    assert len(keep[0].modules) == len(optimizer.modules)


def test_who_freezes_just_so_by_hand_is_not_taken_for_a_copy():
    """The same flags as in a round of before, and other weights."""
    model, optimizer = build(layers=2, frozen=())
    tiny.train(model, optimizer, 4)
    on = flags(model)
    other = tiny.build(layers=2)
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(1.5)
    for name, param in other.named_parameters():
        param.requires_grad_(name in on)
    keep = []
    for warning in heard(lambda: keep.append(make(other, delta=0.6))):
        check_sentence(warning)
        assert "is a copy" not in str(warning.message)
    assert {f"{module.name}.weight" for module in keep[0].modules} == on
    keep[0].release()
    assert flags(other) == on


STATES = {
    "before the first step": lambda model, optimizer: None,
    "rehearsed": lambda model, optimizer: optimizer.rehearse(),
    "in mid-round": lambda model, optimizer: tiny.train(model, optimizer, 4),
    "at the end of a round": lambda model, optimizer: tiny.train(model, optimizer, 6),
    "loaded": lambda model, optimizer: (
        tiny.train(model, optimizer, 4),
        optimizer.load_state_dict(optimizer.state_dict()),
    ),
    "with changes to take over": lambda model, optimizer: change(model, optimizer, 4),
    "with changes before the first step": lambda model, optimizer: change(model, optimizer, 0),
    "after changes": lambda model, optimizer: (change(model, optimizer, 4), tiny.train(model, optimizer, 3)),
    "with state cleared": lambda model, optimizer: (tiny.train(model, optimizer, 4), optimizer.state.clear()),
    "with written weights": lambda model, optimizer: (
        tiny.train(model, optimizer, 4),
        [p.data.mul_(1.25) for p in model.parameters()],
    ),
}


def change(model, optimizer, steps):
    tiny.train(model, optimizer, steps)
    with optimizer.thawed():
        model.norm.requires_grad_(True)
        model.blocks[0].q.requires_grad_(False)


@pytest.mark.parametrize(
    "backend, storage, how",
    [("reference", "fp32", "deepcopy"), (BACKENDS[-1], "master", "pickle"), (BACKENDS[-1], "split bf16", "deepcopy")],
)
@pytest.mark.parametrize("state", STATES)
def test_a_copy_of_both_goes_on_to_the_bit(backend, how, storage, state):
    dtype, options = STORAGES[storage]
    model, optimizer = build(dtype, mode="pretrain", backend=backend, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        STATES[state](model, optimizer)
        schedule.step()
        twin, other, next_schedule = duplicate(how, (model, optimizer, schedule))
        assert flags(twin) == flags(model) and other.active == optimizer.active
        assert next_schedule.optimizer is other
        assert {id(p) for group in other.param_groups for p in group["params"]} == {id(p) for p in twin.parameters()}
        for step in range(7):
            losses = [tiny.train(*run, 1, start=20 + step) for run in ((model, optimizer), (twin, other))]
            assert losses[0] == losses[1], step
            schedule.step()
            next_schedule.step()
            assert flags(twin) == flags(model), step
    assert schedule.get_last_lr() == next_schedule.get_last_lr() != [LR]
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert same(optimizer.state_dict(), other.state_dict())
    optimizer.release()
    assert not other.is_released and flags(twin) != flags(model)
    other.release()
    assert flags(twin) == flags(model) and all(map(torch.equal, model.parameters(), twin.parameters()))


@copy_both_ways
def test_a_copy_of_a_released_one_is_released(how):
    model, optimizer = build()
    tiny.train(model, optimizer, 2)
    optimizer.release()
    twin, other = duplicate(how, (model, optimizer))
    assert other.is_released and flags(twin) == flags(model) == users(model)
    with pytest.raises(RuntimeError, match="release"):
        other.step()


def test_a_shallow_copy_is_refused():
    model, optimizer = build()
    with pytest.raises(TypeError, match="deepcopy"):
        copy.copy(optimizer)
    tiny.train(model, optimizer, 4)


def test_a_subclass_is_copied_as_such():
    class Own(MISA):
        pass

    model = tiny.build(layers=2)
    optimizer = Own(param_groups(model), delta=0.3, backend="reference")
    _, other = copy.deepcopy((model, optimizer))
    assert type(other) is Own


# State.


def matrix(backend, dtype=torch.float32, **options):
    p = nn.Parameter(torch.zeros(8, 8, dtype=dtype))
    options = {"lr": 0.125, "delta": 1.0, "weight_decay": 0.0, "inner_steps": 50, "backend": backend} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return p, MISA([p], **options)


RESETS = {
    "cleared": lambda o, p: o.state.clear(),
    "assigned": lambda o, p: setattr(o, "state", defaultdict(dict)),
    "assigned a dict": lambda o, p: setattr(o, "state", {}),
    "deleted": lambda o, p: o.state.__delitem__(p),
    "popped": lambda o, p: o.state.pop(p),
    "empty": lambda o, p: o.state.__setitem__(p, {}),
    "entry cleared": lambda o, p: o.state[p].clear(),
    "a moment deleted": lambda o, p: o.state[p].pop("exp_avg"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_saved", [False, True], ids=["", "saved between"])
@pytest.mark.parametrize("storage", ["fp32", "master"])
@pytest.mark.parametrize("reset", RESETS)
def test_what_is_missing_in_state_begins_anew(backend, storage, reset, is_saved):
    """AdamW's first update is lr against the gradient's sign; after twenty steps the momentum goes on the other way."""
    p, optimizer = matrix(backend, STORAGES[storage][0])
    for _ in range(20):
        p.grad = torch.ones_like(p)
        optimizer.step()
    RESETS[reset](optimizer, p)
    if is_saved:
        state = optimizer.state_dict()
        optimizer.load_state_dict(state)
    before = p.detach().clone()
    p.grad = -torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(p - before, torch.full_like(p, 0.125), rtol=2.0**-6, atol=2.0**-6)
    own = optimizer.state_dict()["state"][0]
    assert own["age"].item() == 1 and own["updates"].item() == (21 if reset in ("a moment deleted",) else 1)
    torch.testing.assert_close(own["exp_avg"].float(), torch.full((8, 8), -0.1))


@on_each_backend
def test_scores_begin_anew_with_the_state(backend):
    model, optimizer = build(backend=backend)
    tiny.train(model, optimizer, 10)
    assert optimizer._run.scores.candidates.count.any()
    optimizer.state.clear()
    tiny.train(model, optimizer, 1, start=10)
    candidates = optimizer._run.scores.candidates
    assert not candidates.importance.any() and not candidates.count.any()
    assert set(np.flatnonzero(candidates.last_round >= 0).tolist()) == set(optimizer.active)
    own = optimizer.state_dict()["state"]
    assert all("importance" in entry for entry in own.values()) and len(own) >= 14


@on_each_backend
@pytest.mark.parametrize("how", ["replaced", "in place", "entry", "assigned"])
def test_tensors_written_into_state_count_from_the_next_step(backend, how):
    p, optimizer = matrix(backend)
    q = nn.Parameter(p.detach().clone())
    adamw = torch.optim.AdamW([q], lr=0.125, weight_decay=0.0)
    m, v = torch.linspace(-1, 1, 64).view(8, 8), torch.linspace(1, 2, 64).view(8, 8)
    for number in range(3):
        if number == 2:
            adamw.state[q] |= {"exp_avg": m.clone(), "exp_avg_sq": v.clone()}
            own = optimizer.state[p]
            if how == "replaced":
                own["exp_avg"], own["exp_avg_sq"] = m.clone(), v.clone()
            elif how == "in place":
                own["exp_avg"].copy_(m)
                own["exp_avg_sq"].copy_(v)
            elif how == "entry":
                optimizer.state[p] = {**own, "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
            else:
                optimizer.state = defaultdict(dict, {p: {**own, "exp_avg": m.clone(), "exp_avg_sq": v.clone()}})
        for param, run in ((p, optimizer), (q, adamw)):
            param.grad = torch.linspace(-3, 2, 64).view(8, 8)
            run.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], adamw.state[q]["exp_avg"])


@on_each_backend
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "age", "master"])
def test_a_tensor_of_another_size_is_refused(backend, name):
    p, optimizer = matrix(backend, torch.bfloat16)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = p.detach().clone()
    held = optimizer.state[p][name]
    optimizer.state[p][name] = torch.ones(7)
    for _ in range(2):
        with pytest.raises(ValueError, match=name):
            optimizer.step()
        assert torch.equal(p, before)
    optimizer.state[p][name] = held
    optimizer.step()
    assert optimizer.state[p]["age"].item() == 2


# Wrapped by frameworks.


@pytest.mark.parametrize("kind", ["fabric", "lightning"])
def test_a_frameworks_wrapper_shares_the_run(kind):
    if "CI" not in os.environ:
        pytest.importorskip("lightning")
    model, inner = build(layers=3)
    if kind == "fabric":
        import lightning

        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        wrapped, optimizer = fabric.setup(model, inner)
    else:
        from lightning.pytorch.core.optimizer import LightningOptimizer

        wrapped, optimizer = model, LightningOptimizer(inner)
    assert isinstance(optimizer, MISA) and optimizer is not inner
    optimizer.rehearse()
    expected, theirs = build(layers=3)
    theirs.rehearse()
    assert optimizer.active == inner.active == theirs.active
    for step in range(7):
        for network, own in ((wrapped, optimizer), (expected, theirs)):
            loss = tiny.loss_of(network, tiny.batch(step))
            loss.backward()
            if own is optimizer and kind == "lightning":
                inner.step()
            else:
                own.step()
            own.zero_grad()
        assert optimizer.active == inner.active == theirs.active
        assert optimizer.monitor is inner.monitor and optimizer.state is inner.state
        assert repr(inner) == repr(theirs)
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    with optimizer.thawed(), pytest.raises(RuntimeError, match="thawed"):
        inner.step()
    optimizer.state.clear()
    tiny.train(model, inner, 1)
    assert int(next(inner.state[p]["age"] for p in model.parameters() if p.requires_grad)) == 1
    optimizer.release()
    assert inner.is_released and optimizer.is_released and flags(model) == users(model)
    with pytest.raises(RuntimeError, match="release"):
        inner.step()


def test_a_wrapper_that_goes_ends_nothing():
    if "CI" not in os.environ:
        pytest.importorskip("lightning")
    import lightning

    model, inner = build()
    on = flags(model)
    wrapped, optimizer = lightning.Fabric(accelerator="cpu", devices=1).setup(model, inner)
    del wrapped, optimizer
    gc.collect()
    assert flags(model) == on and not inner.is_released
    tiny.train(model, inner, 4)


# Loading.


def first_active(state):
    return next(own for own in state["state"].values() if bool(own.get("active", torch.zeros(1)).any()))


CORRUPT = {
    "a score is missing": lambda s: s["state"][3].pop("importance"),
    "all scores are missing": lambda s: s["state"].clear(),
    "active is missing": lambda s: s["state"][3].pop("active"),
    "nothing is active": lambda s: [own["active"].zero_() for own in s["state"].values() if "active" in own],
    "all is active": lambda s: [own["active"].fill_(True) for own in s["state"].values() if "active" in own],
    "a moment's size": lambda s: first_active(s).update(exp_avg=torch.zeros(7)),
    "an age's size": lambda s: first_active(s).update(age=torch.zeros(3, dtype=torch.int32)),
    "a score's size": lambda s: s["state"][3].update(importance=torch.zeros(2)),
    "a module's number": lambda s: s["state"][3].update(module=s["state"][3]["module"] + 1),
    "a negative round": lambda s: s["param_groups"][0].update(round=-1),
    "a fraction of a step": lambda s: s["param_groups"][0].update(steps=1.5),
    "a negative seed": lambda s: s["param_groups"][0].update(seed=-3),
    "no position": lambda s: s["param_groups"][0].pop("round_step"),
    "lr": lambda s: s["param_groups"][0].update(lr=-1.0),
    "lr without a value": lambda s: s["param_groups"][0].update(lr=torch.tensor(1e-3, device="meta")),
    "lr of the last group": lambda s: s["param_groups"][-1].update(lr="fast"),
    "betas": lambda s: s["param_groups"][0].update(betas=(0.9, 1.0)),
    "weight decay": lambda s: s["param_groups"][-1].update(weight_decay=-0.1),
    "storage": lambda s: s["param_groups"][0].update(state_dtype="fp2"),
    "a group is missing": lambda s: s["param_groups"].pop(),
    "no groups": lambda s: s["param_groups"].clear(),
    "a parameter is missing": lambda s: s["param_groups"][0]["params"].pop(),
    "a role": lambda s: s["param_groups"][0].update(role="dense"),
    "names": lambda s: s["param_groups"][0]["modules"].reverse(),
}
OTHERS = {
    "granularity": lambda: build(sampler=ImportanceSampler(granularity="layer"), delta=0.42),
    "frozen": lambda: build(frozen=["norm", "blocks.0"], delta=0.35),
    "not frozen": lambda: build(frozen=[], delta=0.3, mode="pretrain"),
    "oversized": lambda: build(sampler=ImportanceSampler(oversized="split"), delta=0.06),
    "delta": lambda: build(delta=0.9),
    "layers": lambda: build(layers=3),
}


@pytest.mark.filterwarnings("ignore:oversized")
@pytest.mark.parametrize("backend, when", [("reference", "constructed"), (BACKENDS[-1], "in mid-round")])
@pytest.mark.parametrize("kind", [*CORRUPT, *OTHERS, "AdamW", "not one"])
def test_a_state_dict_that_does_not_fit_changes_nothing(backend, when, kind):
    model, optimizer = build(backend=backend)
    if when == "in mid-round":
        tiny.train(model, optimizer, 4)
    other, saving = OTHERS[kind]() if kind in OTHERS else build(backend=backend, seed=4)
    tiny.train(other, saving, 4)
    state = copy.deepcopy(saving.state_dict())
    if kind in CORRUPT:
        CORRUPT[kind](state)
    elif kind == "AdamW":
        state = torch.optim.AdamW(other.parameters()).state_dict()
    elif kind == "not one":
        state = {"state": {}, "param_groups": []}
    before, on, active = copy.deepcopy(optimizer.state_dict()), flags(model), optimizer.active
    weights, records = {n: v.clone() for n, v in model.state_dict().items()}, len(optimizer.monitor.rounds)
    with pytest.raises((ValueError, TypeError)) as refused:
        optimizer.load_state_dict(state)
    assert "\n" not in str(refused.value) and ". " not in str(refused.value)
    assert same(optimizer.state_dict(), before) and flags(model) == on and optimizer.active == active
    assert same(dict(model.state_dict()), weights) and len(optimizer.monitor.rounds) == records
    expected, theirs = build(backend=backend)
    if when == "in mid-round":
        tiny.train(expected, theirs, 4)
    assert tiny.train(model, optimizer, 7, start=9) == tiny.train(expected, theirs, 7, start=9)


@pytest.mark.parametrize(
    "name, options",
    [
        ("inner_steps", {"inner_steps": 7}),
        ("sampler", {"sampler": UniformSampler()}),
        ("sampler", {"sampler": ImportanceSampler(eta=1.0)}),
        ("delta", {"delta": 0.45}),
        ("", {}),
    ],
)
def test_other_arguments_than_were_saved_are_named(name, options):
    model, optimizer = build(**options)
    other, saving = build()
    tiny.train(other, saving, 4)
    said = heard(lambda: optimizer.load_state_dict(saving.state_dict()))
    assert len(said) == bool(name)
    for warning in said:
        check_sentence(warning)
        message = str(warning.message)
        assert f"{name}=" in message
        assert not any(
            f"{other}=" in message for other in {"inner_steps", "sampler", "delta"} - {name} if name != "sampler"
        )
    assert optimizer.active == saving.active
    tiny.train(model, optimizer, 8)


@pytest.mark.parametrize("given", [{"total_steps": 300}, {}, {"inner_steps": 7}])
def test_another_length_of_the_rounds_that_auto_made_is_told(given):
    options = {"delta": 0.3, "lr": LR, "backend": "reference"}
    saving, loading = (
        MISA(param_groups(tiny.build(layers=2), "pretrain"), **options, **own)
        for own in ({"inner_steps": "auto", "total_steps": 100}, given)
    )
    saved, ours = saving.inner_steps, loading.inner_steps
    assert 5 < saved < 50 and saved != ours
    (said,) = heard(lambda: loading.load_state_dict(saving.state_dict()))
    check_sentence(said)
    made = "" if "inner_steps" in given else f" ('auto' with total_steps={given.get('total_steps')})"
    assert f"saved with inner_steps={saved} where this optimizer has {ours}{made}, which holds" in str(said.message)
    # Where it comes to the same, nothing is to be told.
    same_length = MISA(param_groups(tiny.build(layers=2), "pretrain"), **options, inner_steps=saved)
    assert not heard(lambda: same_length.load_state_dict(saving.state_dict()))


def test_a_state_dict_from_a_file_is_checked_as_well(tmp_path):
    model, optimizer = build(torch.bfloat16)
    tiny.train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again, resumed = build(torch.bfloat16)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    assert tiny.train(again, resumed, 7, start=4) == tiny.train(model, optimizer, 7, start=4)


# Samplers of one's own.


class Greedy(Sampler):
    """As in the docstring of `Sampler`."""

    def draw(self, candidates, budget, round, seed):
        score = np.where(candidates.count > 0, candidates.importance, np.inf)
        order = np.argsort(-score, kind="stable")
        active = order[np.cumsum(candidates.numel[order]) <= budget]
        chance = np.full(score.size, 1 / score.size)
        return Draw(np.sort(active), probability=chance, perplexity=float(score.size), eta=0.0)


def test_the_docstrings_example_is_the_one_tested():
    lines = Sampler.__doc__.split("class Greedy(Sampler):")[1].split("optimizer =")[0]
    ours = functools.reduce(lambda text, gap: text.replace(gap, ""), [" ", "\n"], lines)
    source = inspect.getsource(Greedy.draw)
    assert ours == functools.reduce(lambda text, gap: text.replace(gap, ""), [" ", "\n"], source)


@on_each_backend
@pytest.mark.parametrize("granularity", ["module", "layer"])
def test_a_greedy_sampler_visits_all_and_then_the_most_important(backend, granularity):
    class Own(Greedy):
        pass

    Own.granularity = granularity
    model, optimizer = build(backend=backend, sampler=Own(), delta=0.45, inner_steps=2)
    seen = set()
    for number in range(8):
        candidates = optimizer._run.scores.candidates
        score = np.where(candidates.count > 0, candidates.importance, np.inf)
        order = np.argsort(-score, kind="stable")
        seen |= set(optimizer.active)
        # What is left out is no more important than the least important that fitted, in order.
        assert order[0] in optimizer.active
        tiny.train(model, optimizer, 2, start=2 * number)
    assert seen == set(range(len(optimizer.modules)))


def draw_of(active, size=None):
    class Wrong(Sampler):
        def draw(self, candidates, budget, round, seed):
            numbers = np.array(active(candidates), dtype=np.int64)
            count = candidates.numel.size if size is None else size
            return Draw(numbers, np.full(count, 1 / count), float(count), 0.0)

    return Wrong()


WRONG = {
    "empty": draw_of(lambda c: []),
    "out of range": draw_of(lambda c: [0, c.numel.size]),
    "negative": draw_of(lambda c: [-1, 0]),
    "unsorted": draw_of(lambda c: [3, 1]),
    "repeated": draw_of(lambda c: [1, 1]),
    "over budget": draw_of(lambda c: range(c.numel.size)),
    "probabilities": draw_of(lambda c: [0], size=3),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_draws_are_refused(kind):
    model = tiny.build(layers=2)
    with pytest.raises(ValueError, match=r"Wrong\.draw"):
        make(model, sampler=WRONG[kind])
    assert flags(model) == users(model, ())


def test_a_wrong_draw_in_mid_run_is_refused():
    class Tiring(Greedy):
        def draw(self, candidates, budget, round, seed):
            drawn = super().draw(candidates, budget, round, seed)
            return drawn if round < 2 else Draw(drawn.active[:0], drawn.probability, drawn.perplexity, drawn.eta)

    model, optimizer = build(sampler=Tiring())
    tiny.train(model, optimizer, 5)
    with pytest.raises(ValueError, match=r"Tiring\.draw"):
        tiny.train(model, optimizer, 1)


def test_a_draw_gets_what_it_may_look_at():
    seen = []

    class Curious(Greedy):
        def draw(self, candidates, budget, round, seed):
            seen.append((type(candidates), candidates.numel.sum(), budget, round, seed))
            return super().draw(candidates, budget, round, seed)

    model, optimizer = build(sampler=Curious(), seed=11)
    tiny.train(model, optimizer, 6)
    numel = sum(module.numel for module in optimizer.modules)
    budget = int(0.3 * sum(p.numel() for name, p in model.named_parameters() if name in users(model)))
    assert seen == [(Candidates, numel, budget, number, 11) for number in range(3)]


# Warnings.


def plainly(model):
    return MISA(model.parameters(), delta=0.5, backend="reference")


def test_warnings_are_one_sentence_at_the_users_line():
    model, keep = tiny.build(layers=2), []
    said = heard(lambda: keep.append(plainly(model)))
    keep.clear()
    gc.collect()
    said += heard(lambda: keep.append(make(model, total_steps=5)))
    said += heard(lambda: keep.append(make(model)))
    optimizer = keep[-1]

    def train(steps):
        for step in range(steps):
            tiny_loss = tiny.loss_of(model, tiny.batch(step))
            tiny_loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    train(1)
    off = next(m for number, m in enumerate(optimizer.modules) if number not in optimizer.active)
    model.get_submodule(off.name).requires_grad_(True)
    said += heard(lambda: train(2))
    on = optimizer.modules[optimizer.active[0]]
    model.get_submodule(on.name).requires_grad_(False)
    model.zero_grad()
    said += heard(lambda: train(3))
    model.embedding.requires_grad_(True)
    model.get_submodule(on.name).requires_grad_(True)
    said += heard(lambda: train(3))
    said += heard(lambda: [optimizer.step() for _ in range(3)])
    model.requires_grad_(True)
    said += heard(lambda: optimizer.zero_grad())
    assert len(said) >= 6
    for warning in said:
        check_sentence(warning)


@pytest.mark.parametrize("precision", ["master", "split"])
@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_weights_cast_between_a_load_and_the_next_step_go_on_as_they_are(precision, stored):
    """What the state holds beyond 16-bit weights means nothing to wider ones."""
    weight = torch.arange(48.0).view(8, 6) / 7

    def make(dtype):
        param = nn.Parameter(weight.to(dtype))
        options = {"param_precision": precision, "state_dtype": stored, "backend": "reference"}
        return param, MISA([param], lr=1e-2, delta=1.0, weight_decay=0.0, **options)

    param, optimizer = make(torch.bfloat16)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
    param.grad = None
    optimizer.load_state_dict(optimizer.state_dict())
    param.data = param.data.float()
    before = param.detach().clone()
    param.grad = torch.ones_like(param)
    optimizer.step()
    # Gradients of 1 throughout: the update is lr.
    torch.testing.assert_close(param.detach(), before - 1e-2, rtol=0, atol=2e-4)
