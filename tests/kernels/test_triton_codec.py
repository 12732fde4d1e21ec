"""Formats of the Triton step equal those of `codec.py`: tiles and whole rounds, in the interpreter or on a GPU."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from test_fused import walk
from torch import nn

from misa_kernels import MISA
from misa_kernels.memory.codec import E4M3, FORMATS, GROUP, Codec
from misa_kernels.memory.storage import PRECISIONS, Storage, join

triton = pytest.importorskip("triton")
tl = triton.language

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if not INTERPRETED:
    pytestmark.append(pytest.mark.gpu)
DEVICE = "cpu" if INTERPRETED else "cuda"


class Bounds(NamedTuple):
    """How far a step of the kernel may be from one of the reference.

    Attributes:
        off: Share of the codes that may be off by one, where a last bit before the rounding decides.
        moment: What may differ in a moment then, relative to itself and to the largest of its tensor.
        weight: Of a step: what differs in a weight, in units of lr.
    """

    off: float
    moment: float
    weight: float


BOUNDS = {
    "fp32": Bounds(0.0, 2e-6, 1e-4),
    "bf16": Bounds(2e-3, 2.0**-7, 0.02),
    "int8": Bounds(2e-3, 1 / 32, 0.05),
    "fp8": Bounds(1e-2, 1 / 8, 0.25),
    "int8+int4": Bounds(5e-3, 1 / 8, 0.5),
}
SCALED = {f"{name}-{key}": codec for name, codecs in FORMATS.items() for key, codec in codecs.items() if codec.scales}
STORAGES = [(name, torch.bfloat16, precision) for name in FORMATS for precision in PRECISIONS]
STORAGES += [(name, torch.float32, "master") for name in FORMATS]
SOME_STORAGES = [(name, torch.bfloat16, "stochastic") for name in FORMATS]
SOME_STORAGES += [("fp32", torch.bfloat16, "split"), ("int8", torch.float32, "master")]
LR = 3e-3
NOISE = torch.randint(1 << 16, (8, GROUP), generator=torch.Generator().manual_seed(1))
# One group and less, groups and a rest, one chunk and a rest of it; the odd ones are not aligned.
SHAPES = [(8, 6), (16, 40), (3, 43), (7, 1201), (100, 84), (5,)]


@triton.jit
def encode_kernel(x_ptr, noise_ptr, code_ptr, scale_ptr, offset, limit, BLOCK: tl.constexpr, CODEC: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    noise = tl.load(noise_ptr + tl.arange(0, BLOCK)).to(tl.uint32)
    triton_codec.store(x, noise, code_ptr, scale_ptr, offset, 0, limit, CODEC, False)


@triton.jit
def decode_kernel(x_ptr, code_ptr, scale_ptr, offset, limit, BLOCK: tl.constexpr, CODEC: tl.constexpr):
    x = triton_codec.load(code_ptr, scale_ptr, offset, 0, limit, BLOCK, CODEC, False)
    tl.store(x_ptr + tl.arange(0, BLOCK), x)


if INTERPRETED or torch.cuda.is_available():
    from misa_kernels.kernels import triton_codec


class Tile:
    """Buffers of eight groups behind one that is not to be touched."""

    BLOCK = 1024

    def __init__(self, codec: Codec):
        self.codec = codec
        self.number = triton_codec.CODECS.index(codec)
        per_code = GROUP // codec.elements
        self.codes = torch.full((9, per_code), 77, dtype=torch.uint8, device=DEVICE)
        self.scales = torch.full((9, codec.scales), -7.0, device=DEVICE)
        self.typed = self.codes.view(codec.dtype)

    def _run(self, kernel, *tensors: torch.Tensor, limit: int) -> None:
        codes = self.codes if self.codec.dtype == E4M3.dtype else self.typed
        kernel[(1,)](*tensors, codes, self.scales, GROUP, limit, BLOCK=self.BLOCK, CODEC=self.number)

    def encode(self, x: torch.Tensor, limit: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
        self._run(encode_kernel, x.contiguous(), NOISE.to(DEVICE, torch.int32), limit=limit)
        assert (self.codes[0] == 77).all() and (self.scales[0] == -7).all()
        return self.typed[1:], self.scales[1:]

    def decode(self, limit: int = BLOCK) -> torch.Tensor:
        x = torch.full((8, GROUP), float("nan"), device=DEVICE)
        self._run(decode_kernel, x, limit=limit)
        return x


def moments(codec: Codec) -> torch.Tensor:
    """Groups of normal numbers of several sizes and spreads, one of zeros and one with a single number."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(8, GROUP, generator=rng) * torch.logspace(-12, 3, 8)[:, None]
    x[3] *= torch.logspace(-4, 0, GROUP)
    x[4] = 0
    x[5, 1:] = 0
    x[6, ::3] = 0
    return (x if codec.dtype in (torch.int8, torch.float8_e4m3fn) else x.square()).to(DEVICE)


def steps_apart(codec: Codec, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many codes lie between two, element by element."""
    if codec.elements == 2:
        a, b = (torch.stack([x & 15, x >> 4], dim=-1) for x in (a, b))
    if codec.dtype == E4M3.dtype:
        a, b = (torch.where(x < 128, x, 128 - x) for x in (a.view(torch.uint8).int(), b.view(torch.uint8).int()))
    return (a.int() - b.int()).abs().flatten()


@pytest.mark.parametrize("name", SCALED)
def test_a_tile_equals_its_codec(name):
    codec, tile = SCALED[name], Tile(SCALED[name])
    x = moments(codec)
    codes, scales = tile.encode(x)
    expected_codes, expected_scales = codec.encode(x, NOISE.to(DEVICE))
    # log2 and exp2 of numbers of 2^40 lose 40 ulps; the power is a floor, and 1 / 16 off where that is near.
    torch.testing.assert_close(scales, expected_scales, rtol=1e-4 if codec.dtype == E4M3.dtype else 1e-6, atol=0)
    apart = steps_apart(codec, expected_codes, codes)
    assert apart.max() <= 1 and (apart > 0).float().mean() < 5e-3
    torch.testing.assert_close(tile.decode(), codec.decode(codes, scales), rtol=1e-4, atol=0)
    assert (tile.decode()[4] == 0).all() and scales[4, 0] == 0


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("limit", [0, 1, 127, 128, 300, 513])
def test_a_partial_tile_leaves_the_rest_alone(name, limit):
    codec, tile = SCALED[name], Tile(SCALED[name])
    x = moments(codec)
    # What does not exist is 0 in the kernel; here it is what a code of 0 may stand for.
    x.view(-1)[limit:] = 0
    codes, scales = tile.encode(x, limit)
    expected_codes, expected_scales = codec.encode(x, NOISE.to(DEVICE))
    groups, entries = -(-limit // GROUP), -(-limit // codec.elements)
    torch.testing.assert_close(scales[:groups], expected_scales[:groups], rtol=1e-4, atol=0)
    apart = steps_apart(codec, expected_codes.view(-1)[:entries], codes.view(-1)[:entries])
    assert apart.numel() == 0 or apart.max() <= 1
    assert (tile.codes[1:].view(-1)[entries:] == 77).all() and (scales[groups:] == -7).all()
    back = tile.decode(limit).view(-1)
    expected = codec.decode(codes, scales).view(-1)
    torch.testing.assert_close(back[:limit], expected[:limit], rtol=1e-4, atol=0)
    # Nothing beyond the limit is read, and none of it can be the largest of a group.
    beyond = back[limit:]
    assert beyond.isfinite().all() and (limit == 0 or beyond.abs().max() <= back[:limit].abs().max())


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_keeps_to_its_group(name, bad):
    codec, tile = SCALED[name], Tile(SCALED[name])
    x = moments(codec)
    x[1] = torch.arange(1, GROUP + 1)
    x[1, 5] = bad
    tile.encode(x)
    back = tile.decode()
    assert not back[1].isfinite().any()
    assert back[0].isfinite().all() and back[2:].isfinite().all()


def build(backend, state_dtype, dtype, precision, **options):
    torch.manual_seed(0)
    model = nn.ParameterList(nn.Parameter(torch.randn(shape).to(DEVICE, dtype)) for shape in SHAPES)
    groups = [
        {"params": list(model)[:5], "role": "sampled", "weight_decay": 0.3},
        {"params": list(model)[5:], "role": "dense"},
    ]
    options = {"delta": 0.9, "inner_steps": 3, "lr": LR} | options
    return model, MISA(groups, backend=backend, state_dtype=state_dtype, param_precision=precision, **options)


def gradients(steps, dtype, missing=()):
    """Gradients of each step; None for (step, number) in `missing`."""
    rng = torch.Generator().manual_seed(0)
    given = []
    for step in range(steps):
        row = [(torch.randn(s, generator=rng) * 10.0 ** (i % 5 - 3)).to(DEVICE, dtype) for i, s in enumerate(SHAPES)]
        given.append([None if (step, i) in missing else g for i, g in enumerate(row)])
    return given


def stored(optimizer) -> list[torch.Tensor]:
    """All of the state, as bytes."""
    own = optimizer.state_dict()["state"]
    tensors = [own[i][key] for i in own for key in sorted(own[i]) if torch.is_tensor(own[i][key])]
    return [tensor.reshape(-1).clone().view(torch.uint8) for tensor in tensors if tensor.numel()]


def same(a, b) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def check_moment(storage: Storage, name: str, expected, own) -> None:
    """One moment of one tensor, given the state of both backends."""
    codec, bounds = storage.codecs[name], BOUNDS[storage.state_dtype]
    expected, own = (
        {key: state[key].reshape(-1) for key in (name, f"{name}_scale") if key in state} for state in (expected, own)
    )
    numel = len(expected[name]) * codec.elements
    x, y = (storage.decode(name, state, numel).float() for state in (expected, own))
    # A momentum of which little is left has no bits in common with the reference's.
    atol = x.abs().max().item() * bounds.moment
    torch.testing.assert_close(y, x, rtol=bounds.moment, atol=atol)
    if codec.scales:
        apart = steps_apart(codec, expected[name], own[name])
        if codec.dtype == E4M3.dtype:
            # Nor has then its scale, which is made of the smallest.
            scales = (state[f"{name}_scale"].view(-1, 2) for state in (expected, own))
            apart = apart[torch.isclose(*scales, rtol=1e-4).all(dim=1).repeat_interleave(GROUP)[: len(apart)]]
            assert name == "exp_avg" or len(apart) > 0.9 * numel
        assert apart.sum() == (apart > 0).sum()
    else:
        apart = (x - y).abs() > 2e-6 * x.abs().max()
    assert (apart > 0).sum() <= max(bounds.off * numel, 4)


@pytest.mark.parametrize(("state_dtype", "dtype", "precision"), STORAGES)
def test_rounds_equal_those_of_the_reference(state_dtype, dtype, precision):
    given = gradients(7, dtype, missing={(1, 3), (4, 0), (4, 1)})
    (reference, expected), (model, optimizer) = (
        build(backend, state_dtype, dtype, precision) for backend in ("reference", "triton")
    )
    storage, bounds = Storage(state_dtype, precision), BOUNDS[state_dtype]
    for step in range(7):
        walk(reference, expected, given, step, 1)
        walk(model, optimizer, given, step, 1)
        assert optimizer.active == expected.active
        a, b = expected.state_dict()["state"], optimizer.state_dict()["state"]
        for i, (p, q) in enumerate(zip(reference.parameters(), model.parameters(), strict=True)):
            assert a[i].keys() == b[i].keys()
            for name in storage.codecs:
                if name in a[i] and int(a[i]["age"]):
                    check_moment(storage, name, a[i], b[i])
            rtol = 2.0**-7 if dtype == torch.bfloat16 else 1e-6
            if "residual" in a[i] and int(a[i]["age"]):
                p, q = (join(w.detach().view(-1), own[i]["residual"].view(-1)) for w, own in ((p, a), (q, b)))
                rtol = 1e-6
            torch.testing.assert_close(q, p, rtol=rtol, atol=LR * bounds.weight * (step + 1))


@pytest.mark.parametrize(("state_dtype", "dtype", "precision"), SOME_STORAGES)
def test_a_missing_gradient_and_a_skipped_step_change_nothing(state_dtype, dtype, precision):
    model, optimizer = build("triton", state_dtype, dtype, precision, skip_nonfinite=True, inner_steps=100)
    given = gradients(4, dtype)
    walk(model, optimizer, given, 0, 2)
    before = [p.detach().clone() for p in model.parameters()], stored(optimizer)
    given[2] = [torch.full_like(g, float("nan")) for g in given[2]]
    walk(model, optimizer, given, 2, 1)
    assert optimizer.skipped_steps == 1
    assert same(before[0], list(model.parameters())) and same(before[1], stored(optimizer))
    given[3] = [None] * len(SHAPES)
    walk(model, optimizer, given, 3, 1)
    assert same(before[0], list(model.parameters())) and same(before[1], stored(optimizer))


@pytest.mark.parametrize(("state_dtype", "dtype", "precision"), SOME_STORAGES)
def test_resume_is_bitwise_no_interruption(state_dtype, dtype, precision):
    given = gradients(7, dtype)
    model, optimizer = build("triton", state_dtype, dtype, precision)
    walk(model, optimizer, given, 0, 4)
    state, weights = optimizer.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    walk(model, optimizer, given, 4, 3)
    again, resumed = build("triton", state_dtype, dtype, precision)
    walk(again, resumed, given, 0, 1)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    walk(again, resumed, given, 4, 3)
    assert same(list(model.parameters()), list(again.parameters()))
    assert same(stored(optimizer), stored(resumed))


@pytest.mark.parametrize(("state_dtype", "dtype", "precision"), SOME_STORAGES)
def test_fresh_state_is_never_read(state_dtype, dtype, precision):
    given = gradients(8, dtype)
    clean, spoiled = (build("triton", state_dtype, dtype, precision, delta=0.5, inner_steps=2) for _ in range(2))
    filled = 0
    for step in range(8):
        for model, optimizer in (clean, spoiled):
            walk(model, optimizer, given, step, 1)
            # Brings the ages that `state` shows up to date.
            optimizer.state_dict()
        for own in spoiled[1].state.values():
            if "exp_avg" in own and int(own["age"]) == 0:
                for name in own.keys() & {"exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "residual"}:
                    words = own[name].view(torch.uint8) if own[name].dtype == E4M3.dtype else own[name]
                    words.fill_(float("nan") if words.dtype.is_floating_point else 77)
                    filled += 1
    assert filled > 4
    assert same(list(clean[0].parameters()), list(spoiled[0].parameters()))
