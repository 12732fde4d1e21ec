"""MISA on a fused kernel equals MISA on the reference: whole rounds, on a CPU, in Triton's interpreter or on a GPU."""

import os

import numpy as np
import pytest
import tiny
import torch
from interpreter import quicken
from pairs import pairwise
from torch import nn

from misa_kernels import MISA, UniformSampler, authors, kernels, paper, param_groups
from misa_kernels.kernels import native
from misa_kernels.memory.storage import KEYS, Storage

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    quicken()
    # A program's second block would be empty for each of these tensors, and takes as long as the first.
    from misa_kernels.kernels import launch

    launch.BLOCKS, launch.TritonTable.chunk = 1, launch.BLOCK


def built(name):
    return pytest.mark.skipif(native.path(name) is None, reason=f"the library {name} is not built")


on_each_backend = pytest.mark.parametrize(
    "backend, device",
    [
        pytest.param("cpu", "cpu", marks=built("cpu")),
        pytest.param("triton", "cpu") if INTERPRETED else pytest.param("triton", "cuda", marks=pytest.mark.gpu),
        pytest.param("cuda", "cuda", marks=[pytest.mark.gpu, built("cuda")]),
    ],
)

VARIANTS = {
    "default": {},
    "clip": {"max_grad_norm": 0.1},
    "clip and skip": {"max_grad_norm": 0.1, "skip_nonfinite": True},
    "stochastic": {"param_precision": "stochastic"},
    "split": {"param_precision": "split", "max_grad_norm": 0.1},
    "bf16": {"state_dtype": "bf16", "param_precision": "stochastic"},
    "int8": {"state_dtype": "int8", "skip_nonfinite": True},
    "split int8": {"state_dtype": "int8", "param_precision": "split"},
    "flush": paper(),
    "norms": authors(),
}


SHAPES = [(8, 6), (5, 7), (16, 3), (3, 9), (8, 6), (1, 11), (5,)]


def build(backend, device, dtype=torch.float32, **options):
    """Six matrices, two or three of them active, and an always-on vector: a program takes the interpreter 30 ms."""
    storage = Storage(options.get("state_dtype", "fp32"), options.get("param_precision", "master"))
    if backend != "reference" and storage not in kernels._storages(backend):
        pytest.skip(f"{backend} has no {storage}")
    torch.manual_seed(0)
    model = nn.ParameterList(nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in SHAPES)
    groups = [
        {"params": list(model)[:6], "role": "sampled", "weight_decay": 0.3},
        {"params": list(model)[6:], "role": "dense", "lr": 1e-2},
    ]
    options = {"delta": 0.5, "inner_steps": 3, "lr": 3e-3, "weight_decay": 0.1} | options
    return model, MISA(groups, backend=backend, **options)


def walk(model, optimizer, gradients, first, count):
    """Take steps with given gradients, so that rounding cannot feed back into them."""
    for step in range(first, first + count):
        for p, g in zip(model.parameters(), gradients[step], strict=True):
            p.grad = None if g is None or not p.requires_grad else g.clone()
        optimizer.step()


def gradients(steps, dtype, device, nonfinite=(), missing=()):
    """Gradients of each step, with a NaN in the steps `nonfinite`, None for (step, number mod 3) in `missing`."""
    rng = torch.Generator().manual_seed(0)
    rows = []
    for step in range(steps):
        row = [(torch.randn(s, generator=rng) * 10.0 ** (i % 5 - 3)).to(device, dtype) for i, s in enumerate(SHAPES)]
        for g in row:
            if step in nonfinite:
                g.view(-1)[0] = float("nan")
        rows.append([None if (step, i % 3) in missing else g for i, g in enumerate(row)])
    return rows


CODES = ("exp_avg", "exp_avg_sq")


def unpacked(optimizer, params):
    """The state dict's state, its moments and 16-bit weights in float32."""
    storage, unpacked = optimizer._run.storage, {}
    for i, (own, p) in enumerate(zip(optimizer.state_dict()["state"].values(), params, strict=True)):
        views = {name: own[name].reshape(-1) for name in own.keys() & set(KEYS)}
        unpacked[i] = {name: value for name, value in own.items() if name not in KEYS}
        if views:
            unpacked[i]["theta"] = storage.theta(views, p.detach().reshape(-1))
            unpacked[i] |= {name: storage.decode(name, views, p.numel()) for name in storage.codecs}
    return unpacked


@on_each_backend
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_equal_those_of_the_reference(backend, device, variant, dtype):
    skips, compressed = VARIANTS[variant].get("skip_nonfinite"), "state_dtype" in VARIANTS[variant]
    given = gradients(10, dtype, device, nonfinite=(2, 5) if skips else (), missing={(4, 1), (7, 0), (7, 1)})
    pairs = [build(name, device, dtype, **VARIANTS[variant]) for name in ("reference", backend)]
    for step in range(10):
        for model, optimizer in pairs:
            walk(model, optimizer, given, step, 1)
        (reference, expected), (model, optimizer) = pairs
        assert optimizer.active == expected.active
        for name, p, q in zip(
            dict(reference.named_parameters()), reference.parameters(), model.parameters(), strict=True
        ):
            # A bfloat16 weight may round the other way where the last bit of its master differs: one ulp.
            rtol, atol = 1e-6 if dtype == torch.float32 else 2.0**-7, 1e-3 if compressed else 1e-6
            torch.testing.assert_close(q, p, rtol=rtol, atol=atol, msg=f"{name} in step {step}: {p} {q}")
        assert expected.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
        a, b = (unpacked(each, model.parameters()) for model, each in pairs)
        for i, own in a.items():
            assert own.keys() == b[i].keys()
            for name, value in own.items():
                # Terms of either sign up to 10 add up in m: 2^-24 of the largest is lost, whatever the sum. Where that
                # decides how a code is rounded, it is the next one, at most 1/32 of the largest away.
                atol = 1e-3 if name == "theta" else float(value.abs().max()) / 32 if name in CODES else 0.0
                atol = 2e-6 + compressed * atol
                torch.testing.assert_close(b[i][name], value, rtol=2e-6, atol=atol)


RESUMED = ["default", "stochastic", "norms", "clip and skip", "split", "bf16", "split int8"]


@on_each_backend
@pytest.mark.parametrize(("variant", "dtype", "steps"), pairwise(RESUMED, [torch.float32, torch.bfloat16], [0, 4, 6]))
def test_resume_is_bitwise_no_interruption(backend, device, variant, dtype, steps):
    given = gradients(10, dtype, device)
    model, optimizer = build(backend, device, dtype, **VARIANTS[variant])
    walk(model, optimizer, given, 0, steps)
    state, weights = optimizer.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    walk(model, optimizer, given, steps, 10 - steps)
    again, resumed = build(backend, device, dtype, **VARIANTS[variant])
    walk(again, resumed, given, 0, 1)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    walk(again, resumed, given, steps, 10 - steps)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    for i, own in optimizer.state_dict()["state"].items():
        for name, value in own.items():
            assert torch.equal(value, resumed.state_dict()["state"][i][name]), (i, name)


@on_each_backend
def test_state_of_one_backend_loads_into_the_other(backend, device):
    given = gradients(8, torch.bfloat16, device)
    model, optimizer = build("reference", device, torch.bfloat16)
    walk(model, optimizer, given, 0, 5)
    again, resumed = build(backend, device, torch.bfloat16)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for m, o in ((model, optimizer), (again, resumed)):
        walk(m, o, given, 5, 3)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=2.0**-7, atol=1e-6)


@on_each_backend
def test_row_blocks_experts_and_pairs(backend, device):
    def make(name):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape).to(device)) for shape in [(12, 4), (4, 3, 2), (6, 2), (2, 6)]]
        names = [["wide.0", "wide.1", "wide.2"], [f"expert.{e}" for e in range(4)], "pair", "pair"]
        groups = [{"params": [p], "role": "sampled", "modules": [n]} for p, n in zip(params, names, strict=True)]
        return params, MISA(groups, delta=0.4, inner_steps=2, sampler=UniformSampler(), backend=name)

    (reference, expected), (params, optimizer) = make("reference"), make(backend)
    for step in range(12):
        for n, (p, q) in enumerate(zip(reference, params, strict=True)):
            if p.requires_grad and (step + n) % 5:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + n)).to(device)
                q.grad = p.grad.clone()
            else:
                p.grad = q.grad = None
        expected.step()
        optimizer.step()
        assert optimizer.active == expected.active
        for p, q in zip(reference, params, strict=True):
            torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(expected.monitor.current.importance, optimizer.monitor.current.importance, rtol=1e-6)


@on_each_backend
def test_rounds_of_slices_equal_those_of_the_reference(backend, device):
    """From the layers' hooks to the weights: columns of some matrices and rows of others, drawn anew."""

    def make(name):
        model = tiny.build(layers=1, device=device)
        sampler = UniformSampler(granularity="slice", slices="all", hold_rounds=1)
        # With less, the sign of a gradient that is only rounding would decide a step.
        options = {"lr": 1e-2, "eps": 1e-4, "delta": 0.2, "inner_steps": 2}
        return model, MISA(param_groups(model), sampler=sampler, backend=name, **options)

    (reference, expected), (model, optimizer) = make("reference"), make(backend)
    before = [p.detach().clone() for p in model.parameters()]
    for each, its in ((reference, expected), (model, optimizer)):
        tiny.train(each, its, 5)
    assert optimizer.backend == backend and len(optimizer.monitor.rounds) == 3
    assert {piece.axis for piece in optimizer.trained.values() if piece} == {0, 1}
    assert sum(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)) == 7
    for p, q in zip(reference.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(expected.monitor.current.importance, optimizer.monitor.current.importance, rtol=1e-4)


@on_each_backend
@pytest.mark.parametrize("variant", ["default", "bf16", "split int8"])
def test_fresh_state_is_never_read(backend, device, variant):
    options = {**VARIANTS[variant], "inner_steps": 2}
    model, optimizer = build(backend, device, torch.bfloat16, **options)
    given = gradients(9, torch.bfloat16, device)
    peer, expected = build("reference", device, torch.bfloat16, **options)
    for step in range(9):
        walk(model, optimizer, given, step, 1)
        walk(peer, expected, given, step, 1)
        # Brings the ages that `state` shows up to date.
        optimizer.state_dict()
        for own in optimizer.state.values():
            if "exp_avg" in own and int(own["age"]) == 0:
                for name in own.keys() & set(KEYS):
                    own[name].fill_(float("nan") if own[name].is_floating_point() else 77)
    for p, q in zip(peer.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=2.0**-7, atol=1e-6 if variant == "default" else 1e-3)


@on_each_backend
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_unscales_and_skips_in_the_step(backend, device, fused):
    names = backend if fused else "reference", "reference"
    scaled, plain = (build(name, device, skip_nonfinite=True, max_grad_norm=0.5) for name in names)
    given = gradients(6, torch.float32, device)
    scale = torch.tensor(1024.0, device=device)
    for step in range(6):
        overflow = step in (1, 4)
        for p, q, g in zip(scaled[0].parameters(), plain[0].parameters(), given[step], strict=True):
            p.grad = g * scale if p.requires_grad else None
            q.grad = torch.full_like(g, float("inf")) if overflow else g.clone()
            if not q.requires_grad:
                q.grad = None
        scaled[1].grad_scale, scaled[1].found_inf = scale, torch.tensor(float(overflow), device=device)
        scaled[1].step()
        del scaled[1].grad_scale, scaled[1].found_inf
        plain[1].step()
        assert scaled[1].active == plain[1].active
    assert scaled[1].skipped_steps == plain[1].skipped_steps == 2
    for p, q in zip(scaled[0].parameters(), plain[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@on_each_backend
def test_learning_rate_may_be_a_tensor_on_the_cpu_only(backend, device):
    given = gradients(3, torch.float32, device)
    (model, optimizer), (peer, expected) = build(backend, device), build(backend, device)
    optimizer.param_groups[0]["lr"] = torch.tensor(3e-3, dtype=torch.float64)
    for m, o in ((model, optimizer), (peer, expected)):
        walk(m, o, given, 0, 3)
    assert all(map(torch.equal, model.parameters(), peer.parameters()))
    # "meta" stands for any device that would have to be waited for.
    optimizer.param_groups[0]["lr"] = torch.tensor(3e-3, device="meta")
    with pytest.raises(TypeError, match="use a float"):
        optimizer.step()


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_release_in_mid_round_flushes_and_writes_back(backend, device, dtype):
    given = gradients(5, dtype, device)
    pairs = [build(name, device, dtype, **paper()) for name in ("reference", backend)]
    for model, optimizer in pairs:
        walk(model, optimizer, given, 0, 5)
        before = [p.detach().clone() for p in model.parameters()]
        trained = [p.requires_grad for p in model.parameters()][:-1]
        optimizer.release()
        # The always-on vector is no module and is not flushed.
        assert trained == [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)][:-1]
    (reference, _), (model, _) = pairs
    for p, q in zip(reference.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6 if dtype == torch.float32 else 2.0**-7, atol=1e-6)


@on_each_backend
@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch before 2.10 has no grad_dtype")
def test_gradient_of_another_dtype_is_refused(backend, device):
    model, optimizer = build(backend, device, torch.bfloat16)
    walk(model, optimizer, gradients(1, torch.bfloat16, device), 0, 1)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
        if p.requires_grad:
            p.grad_dtype = torch.float32
            p.grad = torch.ones(p.shape, device=device)
    with pytest.raises(TypeError, match="grad_dtype before the first step"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


@on_each_backend
def test_sparse_gradient_is_refused_and_changes_nothing(backend, device):
    embedding, other = nn.Embedding(10, 4, sparse=True).to(device), nn.Parameter(torch.ones(4, 4, device=device))
    optimizer = MISA([other, embedding.weight], delta=1.0, backend=backend)
    other.grad = torch.ones_like(other)
    embedding(torch.tensor([1, 2], device=device)).sum().backward()
    with pytest.raises(TypeError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(other, torch.ones_like(other))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_a_thousand_steps_and_twenty_switches_compile_nothing_new():
    from misa_kernels.kernels.triton import step_kernel

    params = [nn.Parameter(torch.randn(64, 64, device="cuda")) for _ in range(8)]
    groups = [
        {"params": params[:4], "role": "sampled"},
        {"params": params[4:], "role": "sampled", "betas": (0.8, 0.99)},
    ]
    optimizer = MISA(groups, delta=0.5, inner_steps=50, backend="triton", max_grad_norm=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=1100)
    variants = None
    for _ in range(1000):
        for p in params:
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()
        scheduler.step()
        compiled = sum(len(cache[0]) for cache in step_kernel.device_caches.values())
        variants = compiled if variants is None else variants
    assert len(optimizer.monitor.rounds) == 21
    assert compiled == variants
