"""Saved state: complete, plain, on any device, bitwise in mid-round; and refused where it does not fit."""

import copy
import io

import pytest
import tiny
import torch
from torch import nn

from misa_kernels import MISA, CyclicSampler, ImportanceSampler, UniformSampler, authors, paper, param_groups

VARIANTS = {
    "default": {},
    "clip and skip": {"max_grad_norm": 0.1, "skip_nonfinite": True},
    "paper": paper(),
    "paper with floor": paper(v_floor=True),
    "authors": authors(),
    "window": {"sampler": ImportanceSampler(depth_window=2)},
    "uniform": {"sampler": UniformSampler()},
    "cyclic layers": {"sampler": CyclicSampler(granularity="layer"), "keep_states": "none"},
    "stochastic": {"param_precision": "stochastic"},
}


def build(dtype=torch.float32, mode="pretrain", seed=0, **options):
    model = tiny.build(dtype=dtype)
    options = {"delta": 0.3, "inner_steps": 4, "lr": 3e-3, "weight_decay": 0.1} | options
    return model, MISA(param_groups(model, mode), seed=seed, **options)


def saved(model, optimizer):
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 1, 6, 8])
def test_resume_is_bitwise_no_interruption(variant, dtype, steps):
    options = VARIANTS[variant]
    model, optimizer = build(dtype, **options)
    tiny.train(model, optimizer, steps)
    checkpoint = saved(model, optimizer)
    losses = tiny.train(model, optimizer, 11, start=steps)

    again, resumed = build(dtype, seed=99, **options)
    # Some steps of its own, so that nothing of a fresh optimizer can pass for loaded.
    tiny.train(again, resumed, 3, start=50)
    again.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["optimizer"])
    assert resumed.active == list(resumed.monitor.current.active)
    assert tiny.train(again, resumed, 11, start=steps) == losses
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert same(optimizer.state_dict(), resumed.state_dict())


def test_saving_perturbs_nothing():
    plain = build(torch.bfloat16)
    watched = build(torch.bfloat16)
    for step in range(10):
        a, b = (tiny.train(model, optimizer, 1, step) for model, optimizer in (plain, watched))
        assert a == b
        saved(*watched)
        # As accelerate does when it prepares an optimizer.
        watched[1].load_state_dict(watched[1].state_dict())
    assert same(plain[1].state_dict(), watched[1].state_dict())


def test_saved_state_stands_still():
    model, optimizer = build()
    tiny.train(model, optimizer, 2)
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    tiny.train(model, optimizer, 9, start=2)
    assert same(state, before)


def test_state_is_tensors_and_plain_types_for_every_candidate():
    model, optimizer = build()
    assert set(optimizer.state) == {block.param for module in optimizer.modules for block in module.blocks}
    tiny.train(model, optimizer, 5)
    state = optimizer.state_dict()
    assert state.keys() == {"state", "param_groups"}
    sampled = [i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]) if p.ndim == 2]
    for i in sampled[: len(optimizer.modules)]:
        assert {"importance", "importance_count", "last_round", "active", "age"} <= state["state"][i].keys()
    assert all(isinstance(v, torch.Tensor) for own in state["state"].values() for v in own.values())
    position = {k: state["param_groups"][0][k] for k in ("round", "round_step", "steps", "seed", "skipped_steps")}
    assert position == {"round": 1, "round_step": 1, "steps": 5, "seed": 0, "skipped_steps": 0}


def test_moments_of_bfloat16_weights_stay_float32():
    model, optimizer = build(torch.bfloat16)
    tiny.train(model, optimizer, 2)
    again, resumed = build(torch.bfloat16)
    resumed.load_state_dict(optimizer.state_dict())
    tiny.train(again, resumed, 1)
    for own in resumed.state.values():
        for name in own.keys() & {"exp_avg", "exp_avg_sq", "master"}:
            assert own[name].dtype == torch.float32


def test_what_left_is_not_saved():
    model, optimizer = build()
    tiny.train(model, optimizer, 13)
    state = optimizer.state_dict()["state"]
    moments = sum(own["exp_avg"].numel() for own in state.values() if "exp_avg" in own)
    current = optimizer.monitor.current
    total = sum(p.numel() for p in model.parameters())
    assert moments == round((current.active_fraction + current.dense_fraction) * total)
    # A storage on disk is no larger than the tensor it holds: no arena is dragged along.
    for own in state.values():
        if "exp_avg" in own:
            assert own["exp_avg"].untyped_storage().nbytes() == own["exp_avg"].numel() * 4


def test_position_of_split_blocks_and_experts_survives():
    def make():
        torch.manual_seed(1)
        wide, experts = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.randn(4, 3, 2))
        groups = [
            {"params": [wide], "role": "sampled", "modules": ["wide"]},
            {"params": [experts], "role": "sampled", "modules": [[f"expert.{e}" for e in range(4)]]},
        ]
        with pytest.warns(UserWarning, match="row blocks"):
            sampler = ImportanceSampler(oversized="split")
            return [wide, experts], MISA(groups, delta=0.3, inner_steps=3, sampler=sampler)

    def steps(params, optimizer, first, count):
        for step in range(first, first + count):
            for n, p in enumerate(params):
                if p.requires_grad:
                    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + n))
            optimizer.step()

    params, optimizer = make()
    steps(params, optimizer, 0, 7)
    state, weights = optimizer.state_dict(), [p.detach().clone() for p in params]
    assert any("." in name for own in state["state"].values() for name in own)
    steps(params, optimizer, 7, 8)
    again, resumed = make()
    with torch.no_grad():
        for p, w in zip(again, weights, strict=True):
            p.copy_(w)
    resumed.load_state_dict(state)
    steps(again, resumed, 7, 8)
    assert all(map(torch.equal, params, again))


def test_hyperparameters_and_group_identity_survive_loading():
    model, optimizer = build()
    optimizer.param_groups[0]["lr"] = 0.125
    again, resumed = build()
    identity = [id(group) for group in resumed.param_groups]
    scheduler = torch.optim.lr_scheduler.StepLR(resumed, 1)
    resumed.load_state_dict(optimizer.state_dict())
    assert [id(group) for group in resumed.param_groups] == identity
    assert resumed.param_groups[0]["lr"] == 0.125
    tiny.train(again, resumed, 1)
    scheduler.step()
    assert resumed.param_groups[0]["lr"] == pytest.approx(0.0125)


def test_hooks_of_torch_run():
    model, optimizer = build()
    calls = []
    optimizer.register_load_state_dict_pre_hook(lambda o, s: calls.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("post"))
    optimizer.register_state_dict_post_hook(lambda o, s: calls.append(s["param_groups"][0]["round"]))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == [0, "pre", "post"]


def another_model():
    return build()[1].state_dict() | {"param_groups": tiny_groups(layers=3)}


def tiny_groups(layers):
    model = tiny.build(layers)
    return MISA(param_groups(model, "pretrain"), delta=0.3).state_dict()["param_groups"]


def renamed():
    state = build()[1].state_dict()
    state["param_groups"][0]["modules"] = [name + "x" for name in state["param_groups"][0]["modules"]]
    return state


def other_roles():
    state = build()[1].state_dict()
    state["param_groups"][1]["role"] = "frozen"
    return state


def wider():
    model = tiny.build(width=32)
    optimizer = MISA(param_groups(model, "pretrain"), delta=0.3)
    tiny.train(model, optimizer, 1)
    state = optimizer.state_dict()
    return state


def larger_delta():
    model, optimizer = build(delta=0.9)
    return optimizer.state_dict()


def scoreless():
    state = build()[1].state_dict()
    state["state"] = {}
    return state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.optim.AdamW(tiny.build().parameters()).state_dict(), "not saved by MISA"),
        (another_model, "belongs to another model"),
        (renamed, "build the groups as they were"),
        (other_roles, "names 'frozen' in role of group 1 where this optimizer has 'dense'"),
        (wider, "belongs to another model"),
        (larger_delta, "use the delta it was saved with"),
        (scoreless, "no scores"),
    ],
)
def test_state_that_does_not_fit_is_refused_and_changes_nothing(make, message):
    state = make()
    model, optimizer = build()
    tiny.train(model, optimizer, 2)
    before, flags = optimizer.state_dict(), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert same(before, optimizer.state_dict())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert not model.training or tiny.train(model, optimizer, 1, start=2)


@pytest.mark.gpu
def test_state_moves_between_devices():
    model, optimizer = build()
    tiny.train(model, optimizer, 5)
    state = optimizer.state_dict()
    again = tiny.build(device="cuda")
    resumed = MISA(param_groups(again, "pretrain"), delta=0.3, inner_steps=4, lr=3e-3, weight_decay=0.1)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    cpu, gpu = tiny.train(model, optimizer, 6, start=5), tiny.train(again, resumed, 6, start=5)
    assert cpu == pytest.approx(gpu, rel=1e-4)
    back = resumed.state_dict()
    optimizer.load_state_dict(back)
    tiny.train(model, optimizer, 1)
