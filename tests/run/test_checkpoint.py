"""Saved state: complete, plain, on any device, bitwise in mid-round; and refused where it does not fit."""

import copy
import io

import pytest
import tiny
import torch
from pairs import pairwise
from torch import nn

from misa_kernels import MISA, CyclicSampler, ImportanceSampler, UniformSampler, authors, paper, param_groups
from misa_kernels.memory.codec import FORMATS
from misa_kernels.memory.storage import PRECISIONS, Storage

VARIANTS = {
    "default": {},
    "clip and skip": {"max_grad_norm": 0.1, "skip_nonfinite": True},
    "paper": paper(),
    "paper, reference": paper(backend="reference"),
    "authors": authors(),
    "window": {"sampler": ImportanceSampler(depth_window=2)},
    "uniform": {"sampler": UniformSampler()},
    "cyclic layers": {"sampler": CyclicSampler(granularity="layer"), "keep_states": "none"},
    "stochastic": {"param_precision": "stochastic"},
}


def build(dtype=torch.float32, mode="pretrain", seed=0, layers=4, **options):
    model = tiny.build(layers, dtype=dtype)
    options = {"delta": 0.3, "inner_steps": 4, "lr": 3e-3, "weight_decay": 0.1} | options
    return model, MISA(param_groups(model, mode), seed=seed, **options)


def saved(model, optimizer):
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        # By their bytes: torch.equal knows no float8.
        words = [t.contiguous().flatten().view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*words)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize(
    ("variant", "dtype", "steps"), pairwise(VARIANTS, [torch.float32, torch.bfloat16], [0, 1, 6, 8])
)
def test_resume_is_bitwise_no_interruption(variant, dtype, steps):
    check_resume(dtype, steps, **VARIANTS[variant])


@pytest.mark.parametrize(("state_dtype", "precision", "steps"), pairwise(FORMATS, PRECISIONS, [3, 6]))
def test_every_storage_resumes_bitwise(state_dtype, precision, steps):
    check_resume(
        torch.bfloat16, steps, state_dtype=state_dtype, param_precision=precision, backend="reference", layers=2
    )


def check_resume(dtype, steps, **options):
    model, optimizer = build(dtype, **options)
    tiny.train(model, optimizer, steps)
    checkpoint = saved(model, optimizer)
    losses = tiny.train(model, optimizer, 11, start=steps)

    again, resumed = build(dtype, seed=99, **options)
    # Some steps of its own, so that nothing of a fresh optimizer can pass for loaded.
    tiny.train(again, resumed, 3, start=50)
    again.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["optimizer"])
    loaded = {index: own for index, own in resumed.state_dict()["state"].items() if own}
    assert same(loaded, checkpoint["optimizer"]["state"])
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


def moments(optimizer, storage):
    """m, v and the weight with all its bits of everything that has a state, in float32."""
    found = {}
    for number, (p, own) in enumerate(optimizer.state.items()):
        if "exp_avg" in own:
            views = {name: own[name].flatten() for name in storage.buffers(p.dtype)}
            found[number] = [storage.decode(name, views, p.numel()).clone() for name in storage.codecs]
            found[number].append(storage.theta(views, p.detach().flatten()).clone())
    return found


# Of the largest of a group: what conversion into a format may move a moment by, on top of rounding to bfloat16.
CONVERSION = {"fp32": (1e-6, 1e-6), "bf16": (0.008, 0.008), "int8": (0.017, 0.009), "fp8": (0.15, 0.2)}
CONVERSION["int8+int4"] = (0.017, 0.13)
PAIRS = [(Storage(a, "split"), Storage(b, "split")) for a in FORMATS for b in FORMATS if a != b]
PAIRS += [(Storage("int8", a), Storage("int8", b)) for a in PRECISIONS for b in PRECISIONS if a != b]
PAIRS += [
    (Storage("fp32", "master"), Storage("fp8", "stochastic")),
    (Storage("fp8", "split"), Storage("bf16", "master")),
]


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_another_storage_is_converted_and_said(source, target):
    def make(storage):
        own = {"state_dtype": storage.state_dtype, "param_precision": storage.param_precision}
        return build(torch.bfloat16, layers=2, backend="reference", inner_steps=20, **own)

    model, optimizer = make(source)
    tiny.train(model, optimizer, 6)
    before = moments(optimizer, source)
    again, resumed = make(target)
    again.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="converts a state dict") as warned:
        resumed.load_state_dict(saved(model, optimizer)["optimizer"])
    assert str(source) in str(warned[0].message) and str(target) in str(warned[0].message)
    # Until the first step it is what was loaded.
    assert same(resumed.state_dict(), optimizer.state_dict())
    # Without gradients: converted, and nothing else.
    resumed.step()
    after = moments(resumed, target)
    assert before.keys() == after.keys() and before
    for number, (*old, theta) in before.items():
        for a, b, limit in zip(old, after[number], CONVERSION[target.state_dtype], strict=False):
            assert (a - b).abs().max() <= limit * a.abs().max(), number
        if target.param_precision == "stochastic" or source.param_precision == "stochastic":
            continue
        # But for ties, which "master" rounds to even and "split" away from zero.
        assert (theta == after[number][2]).float().mean() > 0.99
    ours, theirs = tiny.train(again, resumed, 10, start=6), tiny.train(model, optimizer, 10, start=6)
    assert ours == pytest.approx(theirs, rel=0.02)
    assert {p.dtype for own in resumed.state.values() for name, p in own.items() if name == "exp_avg"} == {
        target.codecs["exp_avg"].dtype
    }


def test_compressed_moments_of_float32_weights_load_into_float64():
    model, optimizer = build(state_dtype="int8", backend="reference", layers=2)
    tiny.train(model, optimizer, 3)
    again, resumed = build(torch.float64, backend="reference", layers=2)
    again.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="converts a state dict"):
        resumed.load_state_dict(optimizer.state_dict())
    assert tiny.train(again, resumed, 5, start=3) == pytest.approx(tiny.train(model, optimizer, 5, start=3), rel=0.01)


@pytest.mark.parametrize("state_dtype", FORMATS)
def test_missing_gradients_and_skipped_steps_leave_every_byte(state_dtype):
    storage = {"state_dtype": state_dtype, "param_precision": "split", "backend": "reference"}
    params = [nn.Parameter(torch.randn(3, 67).bfloat16()) for _ in range(2)]
    optimizer = MISA(params, delta=1.0, skip_nonfinite=True, inner_steps=50, **storage)

    def step(*scales):
        for p, scale in zip(params, scales, strict=True):
            p.grad = None if scale is None else torch.randn_like(p) * scale
        before = copy.deepcopy(optimizer.state_dict()["state"]), [p.detach().clone() for p in params]
        optimizer.step()
        state = optimizer.state_dict()["state"]
        return [same(state[n], before[0][n]) and same(params[n].detach(), before[1][n]) for n in range(2)]

    step(1.0, 1.0)
    assert step(1.0, 1.0) == [False, False]
    assert step(1.0, None) == [False, True]
    assert step(1.0, float("inf")) == [True, True]
    assert step(None, 1.0) == [True, False]


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


@pytest.mark.parametrize("state_dtype", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_position_of_split_blocks_and_experts_survives(state_dtype, dtype):
    storage = {"state_dtype": state_dtype, "param_precision": "split", "backend": "reference"}

    def make():
        torch.manual_seed(1)
        wide, experts = (nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((12, 4), (4, 3, 2)))
        groups = [
            {"params": [wide], "role": "sampled", "modules": ["wide"]},
            {"params": [experts], "role": "sampled", "modules": [[f"expert.{e}" for e in range(4)]]},
        ]
        with pytest.warns(UserWarning, match="row blocks"):
            sampler = ImportanceSampler(oversized="split")
            return [wide, experts], MISA(groups, delta=0.3, inner_steps=3, sampler=sampler, **storage)

    def steps(params, optimizer, first, count):
        for step in range(first, first + count):
            for n, p in enumerate(params):
                if p.requires_grad:
                    # Now and then none.
                    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + n)).to(dtype)
                    p.grad = None if (step + n) % 5 == 0 else p.grad
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


class Elsewhere(torch.Tensor):
    """A tensor that is on a device, as far as this machine can have one."""

    device = torch.device("cuda")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_a_learning_rate_that_was_moved_with_a_state_dict_comes_back():
    """`torch.load(map_location=...)` and accelerate's `prepare` move it with all else."""
    model, optimizer = build(lr=torch.tensor(0.125))
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["lr"] = group["lr"].as_subclass(Elsewhere)
    again, resumed = build()
    resumed.load_state_dict(state)
    for group in resumed.param_groups:
        assert type(group["lr"]) is torch.Tensor and group["lr"] == 0.125
    tiny.train(again, resumed, 1)


@pytest.mark.gpu
def test_a_learning_rate_that_was_moved_to_a_gpu_comes_back():
    model, optimizer = build(lr=torch.tensor(0.125))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, resumed = build()
    resumed.load_state_dict(torch.load(file, map_location="cuda", weights_only=True))
    assert all(group["lr"].device.type == "cpu" and group["lr"] == 0.125 for group in resumed.param_groups)
    tiny.train(again, resumed, 1)


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


def short_scales():
    model, optimizer = build(state_dtype="int8", backend="reference")
    tiny.train(model, optimizer, 1)
    state = optimizer.state_dict()
    for own in state["state"].values():
        if "exp_avg_scale" in own:
            own["exp_avg_scale"] = own["exp_avg_scale"][:-1]
    return state


def from_the_future():
    state = build()[1].state_dict()
    state["param_groups"][0]["state_dtype"] = "fp2"
    return state


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
        (short_scales, r"exp_avg_scale of 1 elements for blocks\.0\.q\.weight but this optimizer needs 2:"),
        (from_the_future, "state_dtype='fp2'.*does not know"),
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


def test_a_round_has_one_record_however_often_its_state_is_loaded():
    model = tiny.build()
    optimizer = MISA(param_groups(model), delta=0.3, inner_steps=4)
    # What accelerate does before the first step.
    optimizer.load_state_dict(optimizer.state_dict())
    tiny.train(model, optimizer, 10)
    early = optimizer.state_dict()
    assert [r.round for r in optimizer.monitor.rounds] == [0, 1, 2]
    tiny.train(model, optimizer, 8, start=10)
    assert [r.round for r in optimizer.monitor.rounds] == [0, 1, 2, 3, 4]
    optimizer.load_state_dict(early)
    assert [r.round for r in optimizer.monitor.rounds] == [0, 1, 2]
