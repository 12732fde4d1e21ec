"""What the state of a tensor is made of: its bytes, and 16-bit weights that lose nothing."""

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from misa_kernels import MISA, CyclicSampler, kernels, param_groups
from misa_kernels.memory.codec import FORMATS
from misa_kernels.memory.storage import PRECISIONS, Storage, join, split

# Bytes a parameter of both moments, scales included, in groups of 128.
STATE_BYTES = {"fp32": 8, "bf16": 4, "int8": 2 + 8 / 128, "fp8": 2 + 16 / 128, "int8+int4": 1.5 + 8 / 128}
WEIGHT_BYTES = {"master": 4, "split": 2, "stochastic": 0}


def backends(storage):
    """The backends of this machine that have a storage."""
    found = ["reference"]
    if kernels.unusable("cpu") is None and storage in kernels._storages("cpu"):
        found.append("cpu")
    return found


def with_backends(storages):
    return [(storage, backend) for storage in storages for backend in backends(storage)]


# Bytes


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("state_dtype", FORMATS)
def test_bytes_of_a_parameter_are_those_of_its_tensors(state_dtype, precision):
    assert STATE_BYTES.keys() == FORMATS.keys()
    p = nn.Parameter(torch.zeros(64, 128, dtype=torch.bfloat16))
    optimizer = MISA([p], delta=1.0, state_dtype=state_dtype, param_precision=precision, backend="reference")
    p.grad = torch.ones_like(p)
    optimizer.step()
    tensors = {name: t for name, t in optimizer.state[p].items() if t.numel() > 1 and t.ndim}
    expected = STATE_BYTES[state_dtype] + WEIGHT_BYTES[precision]
    assert sum(t.nbytes for t in tensors.values()) == expected * p.numel() == optimizer.state_bytes
    assert sum(t.untyped_storage().nbytes() for t in tensors.values()) == optimizer.state_bytes
    for name, buffer in Storage(state_dtype, precision).buffers(p.dtype).items():
        assert tensors[name].dtype == buffer.dtype


def test_a_step_moves_few_bytes():
    """bfloat16 weights, read and written, and gradients: 6 bytes; each moment is read and written."""
    moved = {
        name: 6
        + 2
        * sum(b.dtype.itemsize * b.numel(128) for b in Storage(name, "stochastic").buffers(torch.bfloat16).values())
        / 128
        for name in FORMATS
    }
    assert moved["int8"] <= 10.2 and moved["fp8"] <= 10.5 and moved["int8+int4"] <= 9.6
    assert moved == {name: 6 + 2 * number for name, number in STATE_BYTES.items()}


# Split weights


def float32_numbers():
    """Every sign and exponent with mantissas around the edges of bfloat16's steps, and random ones."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    random = np.random.default_rng(0)
    edges = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    bits = np.concatenate([upper | edge for edge in edges] + [upper | random.integers(0, 1 << 16, 1 << 16, np.uint32)])
    return torch.from_numpy(bits.view(np.float32))


def test_split_and_join_lose_nothing():
    x = float32_numbers()
    weight, residual = split(x)
    assert weight.dtype == torch.bfloat16 and residual.dtype == torch.int16
    back, nan = join(weight, residual), x.isnan()
    assert torch.equal(back.view(torch.int32)[~nan], x.view(torch.int32)[~nan])
    assert back[nan].isnan().all() and weight[nan].isnan().all() and (residual[nan] == 0).all()


def test_the_weight_of_a_split_is_the_nearest_ties_away_from_zero():
    x = float32_numbers()
    x = x[x.isfinite()]
    weight = split(x)[0].double()
    inner = weight.isfinite()
    # The neighbour towards zero and the one beyond, from the bits: sign and magnitude.
    bits = x[inner].view(torch.int32)
    low = (bits & ~0xFFFF).view(torch.float32).double()
    high = ((bits & ~0xFFFF) + 0x10000).view(torch.float32).double()
    exact = x[inner].double()
    expected = torch.where((exact - low).abs() < (high - exact).abs(), low, high)
    # Beyond the largest finite number lies an infinity, which is nobody's nearest.
    finite = high.isfinite()
    assert torch.equal(weight[inner][finite], expected[finite])
    ties = x.view(torch.int32) & 0xFFFF == 0x8000
    assert (weight[ties].abs() > x[ties].abs().double()).all()
    # As PyTorch rounds, but for ties.
    assert torch.equal(weight[~ties], x[~ties].bfloat16().double())


@pytest.mark.parametrize(("storage", "backend"), with_backends(Storage(name, "split") for name in FORMATS))
def test_split_weights_are_a_float32_run_bit_for_bit(storage, backend):
    results = {}
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(rows, 50).bfloat16().to(dtype)) for rows in (3, 40)]
        optimizer = MISA(
            params,
            delta=1.0,
            lr=1e-3,
            weight_decay=0.1,
            state_dtype=storage.state_dtype,
            param_precision="split",
            max_grad_norm=5.0,
            backend=backend,
        )
        for step in range(30):
            for n, p in enumerate(params):
                p.grad = None if (step, n) == (7, 1) else torch.randn(p.shape).bfloat16().to(dtype)
            optimizer.step()
        results[dtype] = params, optimizer
    params, optimizer = results[torch.bfloat16]
    for p, exact in zip(params, results[torch.float32][0], strict=True):
        theta = join(p.detach().flatten(), optimizer.state[p]["residual"].flatten())
        assert torch.equal(theta, exact.detach().flatten())
        assert (p != exact).any()


# Weights that bfloat16 would hold still


@pytest.mark.parametrize(
    ("storage", "backend"),
    with_backends(Storage(state, precision) for state in ("fp32", "int8") for precision in PRECISIONS),
)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_weight_decay_survives_bfloat16(storage, backend, share):
    """Nearest rounding leaves such weights at 1.000 for ever: lr * wd = 1e-4 is below half an ulp of 2^-8."""
    params = [nn.Parameter(torch.ones(32, 64, dtype=torch.bfloat16)) for _ in range(round(1 / share))]
    optimizer = MISA(
        [{"params": params, "role": "sampled"}],
        delta=share,
        lr=1e-2,
        weight_decay=1e-2,
        inner_steps=5,
        sampler=CyclicSampler(),
        keep_states="none",
        state_dtype=storage.state_dtype,
        param_precision=storage.param_precision,
        backend=backend,
    )
    for _ in range(round(1000 / share)):
        for p in params:
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
    for p in params:
        assert p.float().mean().item() == pytest.approx((1 - 1e-4) ** 1000, abs=2e-3)


def train_some(precision, steps=3, backend="reference", **options):
    model = tiny.build(dtype=torch.bfloat16)
    options = {"delta": 0.3, "inner_steps": 4, "lr": 1e-3} | options
    optimizer = MISA(param_groups(model), param_precision=precision, backend=backend, **options)
    tiny.train(model, optimizer, steps)
    return model, optimizer


def test_what_leaves_is_written_back_with_its_residual_and_what_stays_keeps_it():
    model, optimizer = train_some("split")
    before = {}
    tiny.loss_of(model, tiny.batch(3)).backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p, own in optimizer.state.items():
        if "residual" in own:
            before[p] = own["residual"].clone(), p.detach().clone()
    optimizer.step()
    assert len(optimizer.monitor.rounds) == 2
    left = moved = 0
    for p, (residual, weight) in before.items():
        theta = join(weight.flatten(), residual.flatten())
        if p.requires_grad:
            assert torch.equal(optimizer.state[p]["residual"], residual) and torch.equal(p, weight)
            continue
        left += 1
        assert "residual" not in optimizer.state[p]
        bits = theta.view(torch.int32) & ~0xFFFF
        low, high = bits.view(torch.float32), (bits + 0x10000).view(torch.float32)
        now = p.detach().float().flatten()
        assert ((now == low) | (now == high)).all()
        moved += (now != weight.float().flatten()).float().mean().item()
        # Unbiased: 5 standard errors of roundings, each by at most half the step between the neighbours.
        step = (high - low).abs()
        assert ((now - theta) / step).mean().abs() < 5 * 0.5 / len(theta) ** 0.5
    assert left and moved


def test_release_writes_the_residual_back():
    model, optimizer = train_some("split")
    trained = {
        p: join(p.detach().flatten(), own["residual"].flatten())
        for p, own in optimizer.state.items()
        if "residual" in own
    }
    optimizer.release()
    for p, theta in trained.items():
        bits = theta.view(torch.int32) & ~0xFFFF
        now = p.detach().float().flatten()
        assert ((now == bits.view(torch.float32)) | (now == (bits + 0x10000).view(torch.float32))).all()


@pytest.mark.parametrize("backend", backends(Storage("fp32", "split")))
def test_weights_loaded_in_mid_round_drop_the_residual(backend):
    model, optimizer = train_some("split", backend=backend, inner_steps=100)
    assert any(own["residual"].any() for own in optimizer.state.values() if "residual" in own)
    loaded = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}
    model.load_state_dict(loaded)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    tiny.train(model, optimizer, 1)
    for p in model.parameters():
        assert (p == 0.5).all()
        if "residual" in optimizer.state[p]:
            assert not optimizer.state[p]["residual"].any()
