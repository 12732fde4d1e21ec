"""How moments are stored: every codec against an account in float64 NumPy that shares no code with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from misa_kernels.memory.codec import BF16, E4M3, E4M3_DITHERED, FORMATS, FP32, GROUP, ROOT4, ROOT8, SOFT_SIGN, Codec
from misa_kernels.memory.storage import Storage, state_noise
from misa_kernels.reference import noise16, noise_key

INF = float("inf")
SIZES = [0, 1, 2, 15, 127, 128, 129, 1023, 4097]


def e4m3_values() -> np.ndarray:
    """The 127 numbers >= 0 of E4M3 by the definition of its bits: 4 of exponent, bias 7, 3 of mantissa, no infinity."""
    exponent, mantissa = np.divmod(np.arange(127), 8)
    return np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def to_e4m3(y: np.ndarray) -> np.ndarray:
    """The nearest number of E4M3, ties to the even code."""
    values, size = e4m3_values(), np.abs(y)
    above = np.clip(np.searchsorted(values, size), 1, 126)
    low, high = values[above - 1], values[above]
    up = (size - low > high - size) | ((size - low == high - size) & (above % 2 == 0))
    return np.copysign(np.where(up, high, low), y)


def share(x: np.ndarray, s: np.ndarray) -> np.ndarray:
    return np.divide(x, s, out=np.zeros_like(x), where=s > 0)


def largest(x: np.ndarray) -> np.ndarray:
    return np.abs(x).max(1, keepdims=True)


def soft_sign(x: np.ndarray, s: np.ndarray) -> np.ndarray:
    y = share(x, s)
    return 127 * 4 * y / (1 + 3 * np.abs(y))


def soft_sign_value(code: np.ndarray, s: np.ndarray) -> np.ndarray:
    f = code / 127
    return f / (4 - 3 * np.abs(f)) * s


def root(levels: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda x, s: np.clip(levels * share(np.sqrt(x), s), 1, levels) - 1


def root_scale(x: np.ndarray) -> np.ndarray:
    return np.sqrt(largest(x))


def root_value(levels: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda code, s: ((code + 1) * s / levels) ** 2


def expansion(x: np.ndarray) -> np.ndarray:
    """COAT: s = sqrt(max min), k = floor(16 log2(448^2 / 2) / log2(max / min)) / 16."""
    size, most = np.abs(x), largest(x)
    least = np.where(most > 0, np.where(size > 0, size, np.inf).min(1, keepdims=True), 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        k = np.clip(np.floor(16 * np.log2(448**2 / 2) / np.log2(most / least)) / 16, 1 / 16, 16)
    return np.concatenate([np.sqrt(most * least), np.where(most > 0, k, 1)], 1)


def expanded(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.sign(x) * share(np.abs(x), scale[:, :1]) ** scale[:, 1:]


def expanded_value(code: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.sign(code) * np.abs(code) ** (1 / scale[:, 1:]) * scale[:, :1]


@dataclass(frozen=True)
class Account:
    """What a codec must do.

    Attributes:
        codec: The codec.
        signed: Whether it stores numbers below 0.
        scale: Scales of float64 groups.
        encode: Maps groups and scales to codes before they are rounded.
        decode: Maps codes and scales to groups.
        unpack: Codes of the codec as numbers, one an element.
        round: Rounds a code.
        bound: Largest error that the format promises, from the group and its scales.
    """

    codec: Codec
    signed: bool
    scale: Callable[[np.ndarray], np.ndarray]
    encode: Callable[[np.ndarray, np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray, np.ndarray], np.ndarray]
    unpack: Callable[[torch.Tensor], np.ndarray]
    round: Callable[[np.ndarray], np.ndarray]
    bound: Callable[[np.ndarray, np.ndarray], np.ndarray]


def numbers(code: torch.Tensor) -> np.ndarray:
    return code.double().numpy()


def halves(code: torch.Tensor) -> np.ndarray:
    """Byte i holds element 2i in its lower and 2i + 1 in its upper half."""
    byte = code.numpy().astype(np.int64)
    return np.stack([byte % 16, byte // 16], 2).reshape(len(byte), -1).astype(float)


def soft_sign_bound(x: np.ndarray, s: np.ndarray) -> np.ndarray:
    # Half a step of 1/127 over the slope of the curve; a twentieth more, since the slope changes within the step.
    y = share(np.abs(x), s)
    return 1.05 * (1 + 3 * y) ** 2 / 4 / 254 * s


def root_bound(levels: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    def bound(x: np.ndarray, s: np.ndarray) -> np.ndarray:
        # Half a step of the root, a whole one below the first code: |a² - b²| = |a - b| (a + b).
        r = np.sqrt(x)
        step = np.where(r < 0.5 * s / levels, 1.0, 0.5) * s / levels
        return step * (2 * r + step)

    return bound


def expanded_bound(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    # 1/16 of the code, or half of 2^-9 among the subnormal ones, through the power 1/k.
    s, k = scale[:, :1], scale[:, 1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        code = np.where(x != 0, share(np.abs(x), s) ** k, 1)
        relative = np.maximum(1 / 16, 2.0**-10 / code)
        return np.abs(x) * np.maximum((1 + relative) ** (1 / k) - 1, 1 - (1 - relative) ** (1 / k))


# A new format adds a line here.
TABLE = {
    "int8, soft sign": Account(SOFT_SIGN, True, largest, soft_sign, soft_sign_value, numbers, np.rint, soft_sign_bound),
    "8 bits of the root": Account(
        ROOT8, False, root_scale, root(256), root_value(256), numbers, np.rint, root_bound(256)
    ),
    "4 bits of the root": Account(ROOT4, False, root_scale, root(16), root_value(16), halves, np.rint, root_bound(16)),
    "E4M3": Account(E4M3, True, expansion, expanded, expanded_value, numbers, to_e4m3, expanded_bound),
}
SCALED = pytest.mark.parametrize("account", TABLE.values(), ids=TABLE.keys())


def groups(signed: bool) -> dict[str, torch.Tensor]:
    """float32 groups of every kind."""
    random = np.random.default_rng(0)
    normal = random.standard_normal((40, GROUP))
    one = np.zeros((1, GROUP))
    one[0, 77] = 0.3
    found = {
        "normal": normal,
        "wide": normal * 10 ** random.uniform(-6, 6, (40, GROUP)),
        "sparse": normal * (random.random((40, GROUP)) < 0.05),
        "scales beside each other": normal * 10.0 ** np.arange(-20, 20)[:, None],
        "constant": np.full((1, GROUP), 0.7),
        "one": one,
        "subnormal": normal * 1e-42,
        "huge": normal / np.abs(normal).max() * 3e38,
        "largest": np.full((1, GROUP), np.finfo(np.float32).max),
        "smallest": np.full((1, GROUP), 1e-45),
        # Beyond 2^256, which no gradients span, |x| / s of E4M3 would overflow.
        "232 octaves": np.geomspace(1e-40, 1e30, GROUP)[None],
        "zeros": np.zeros((2, GROUP)),
        "ties": np.arange(-64, 64)[None] / 64,
    }
    return {name: torch.from_numpy(x if signed else np.abs(x)).float() for name, x in found.items()}


def test_every_codec_is_accounted_for():
    stored = {codec for names in FORMATS.values() for codec in names.values()}
    assert stored == {account.codec for account in TABLE.values()} | {FP32, BF16, E4M3_DITHERED}


@SCALED
def test_codes_and_scales_are_those_of_the_formulas(account):
    for name, x in groups(account.signed).items():
        code, scale = account.codec.encode(x, None)
        assert code.dtype == account.codec.dtype and scale.dtype == torch.float32, name
        assert code.shape == (len(x), GROUP // account.codec.elements), name
        assert scale.shape == (len(x), account.codec.scales), name
        scales = account.scale(x.double().numpy())
        # A root is rounded once, a product of two roots three times, by half of 2^-23 each.
        np.testing.assert_allclose(scale[:, 0], scales[:, 0], rtol=3e-7, atol=1.5e-45, err_msg=name)
        if account.codec.scales == 2:
            # A multiple of 1/16 on both sides, one step apart where what the floor is taken of is a whole number.
            power = scale[:, 1].numpy()
            assert np.abs(power - scales[:, 1]).max() <= 1 / 16 and (power == scales[:, 1]).mean() >= 0.9, name
        exact = account.encode(x.double().numpy(), scale.double().numpy())
        ours, theirs = account.unpack(code), account.round(exact)
        # A code may be its neighbour where the exact one is a tie but for float32 arithmetic.
        margin = 1e-5 * np.abs(exact) + 1e-6
        low, high = account.round(exact - margin), account.round(exact + margin)
        assert ((low <= ours) & (ours <= high)).all(), name
        assert (ours == theirs).mean() > 0.99, name


@SCALED
def test_decoding_is_that_of_the_formulas(account):
    for name, x in groups(account.signed).items():
        code, scale = account.codec.encode(x, None)
        expected = account.decode(account.unpack(code), scale.double().numpy())
        # E4M3: log2 and exp2 of numbers up to 2^138 cost their exponents' bits, 140 ulps of 2^-24.
        rtol = 2e-5 if account.codec is E4M3 else 5e-7
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(
                account.codec.decode(code, scale), expected.astype(np.float32), rtol=rtol, atol=3e-45, err_msg=name
            )


@SCALED
def test_round_trip_error_is_what_the_format_promises(account):
    for name, x in groups(account.signed).items():
        code, scale = account.codec.encode(x, None)
        exact = x.double().numpy()
        error = np.abs(account.codec.decode(code, scale).double().numpy() - exact)
        allowed = account.bound(exact, scale.double().numpy())
        # Float32 arithmetic adds as in the two tests above; the smallest number is 1.4e-45.
        slack = 1e-4 * np.abs(exact) if account.codec is E4M3 else 1e-6 * largest(exact)
        assert (error <= 1.001 * allowed + slack + 3e-45).all(), (name, (error / (allowed + slack + 3e-45)).max())


@SCALED
def test_nothing_that_is_not_zero_decodes_to_zero(account):
    for name, x in groups(account.signed).items():
        # The root of the smallest number over 256, squared, is below float32.
        if not account.signed and x.max() * 2.0**-16 < 1e-45:
            continue
        back = account.codec.decode(*account.codec.encode(x, None))
        if account.codec is SOFT_SIGN:
            # The first code is 1/508 of the largest.
            x = torch.where(x.abs() > x.abs().amax(1, keepdim=True) / 1000, x, 0.0)
        assert (back[x != 0] != 0).all(), name


@SCALED
def test_a_zero_scale_decodes_to_zero_whatever_the_codes(account):
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 120, (3, GROUP // account.codec.elements), generator=random, dtype=torch.uint8)
    scale = torch.zeros(3, account.codec.scales)
    for power in (1.0, 1 / 16, 16.0) if account.codec.scales == 2 else (0.0,):
        scale[:, 1:] = power
        back = account.codec.decode(codes.view(account.codec.dtype), scale)
        assert back.shape == (3, GROUP) and (back == 0).all()
    code, scale = account.codec.encode(torch.zeros(2, GROUP), None)
    assert (scale[:, 0] == 0).all() and (account.codec.decode(code, scale) == 0).all()


@SCALED
def test_order_is_kept(account):
    for name, x in groups(account.signed).items():
        ordered = x.sort(dim=1).values
        back = account.codec.decode(*account.codec.encode(ordered, None))
        assert (back.diff(dim=1) >= 0).all(), name


@SCALED
@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_what_is_not_finite_stays_so_and_keeps_to_its_group(account, bad):
    x = torch.ones(3, GROUP).cumsum(1)
    x[1, 5] = bad
    back = account.codec.decode(*account.codec.encode(x, None))
    assert back[[0, 2]].isfinite().all()
    # A finite v beside a momentum that is lost would make an update without bound; none is left in the group.
    assert not back[1].isfinite().any()
    lonely = torch.zeros(1, GROUP)
    lonely[0, 5] = bad
    assert not account.codec.decode(*account.codec.encode(lonely, None))[0, 5].isfinite()


@pytest.mark.parametrize(
    ("codec", "codes"),
    [(SOFT_SIGN, range(-127, 128)), (ROOT8, range(256)), (ROOT4, range(16))],
    ids=["int8, soft sign", "8 bits of the root", "4 bits of the root"],
)
@pytest.mark.parametrize("scale", [1.0, 0.3, 1e-15, 1e15])
def test_every_code_is_reached_and_stands_for_itself(codec, codes, scale):
    """Each group also holds the largest code, which decodes to the scale."""
    padded = torch.tensor([*codes, *[codes[-1]] * (-len(codes) % (GROUP - 1))])
    code = torch.cat([padded.view(-1, GROUP - 1), torch.full((len(padded) // (GROUP - 1), 1), codes[-1])], dim=1)
    code = code.to(codec.dtype)
    if codec.elements == 2:
        code = code[:, 0::2] | code[:, 1::2] << 4
    scales = torch.full((len(code), 1), scale)
    again, same = codec.encode(codec.decode(code, scales), None)
    assert torch.equal(again, code)
    torch.testing.assert_close(same, scales, rtol=2.0**-23, atol=0)


def test_e4m3_uses_the_codes_of_its_range():
    # log2 of the quotient is 16.6, of the power 1: all numbers of E4M3 from 1/316 to 316.
    x = torch.from_numpy(np.concatenate([np.geomspace(1 / 316, 316, GROUP)] * 3).reshape(3, -1)).float()
    x[1] *= -1
    x[2] = torch.from_numpy(np.geomspace(1 / 316, 316, 10 * GROUP)[::10]).float()
    code, scale = E4M3.encode(x, None)
    assert (scale[:2, 1] == 1).all()
    values = e4m3_values()
    inside = values[(values >= 2.0**-8) & (values <= 288)]
    # 128 steps on a logarithmic line pass by every third of 8 mantissas in an octave.
    assert set(code[0].double().tolist()) <= set(inside.tolist()) | {320.0}
    assert len(set(code[0].double().tolist())) > 0.7 * len(inside)
    # A group of one size stands for itself.
    same = torch.full((1, GROUP), -0.7)
    torch.testing.assert_close(E4M3.decode(*E4M3.encode(same, None)), same, rtol=1e-6, atol=0)


def test_four_bits_are_packed_lower_half_first():
    # Roots 1/16, 2/16, ... of a maximum of 16.
    x = (torch.arange(GROUP) % 16 + 1).float().square()[None]
    code, scale = ROOT4.encode(x, None)
    assert scale.item() == 16
    assert code[0, :9].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE, 0x10]
    assert torch.equal(ROOT4.decode(code, scale), x)


@pytest.mark.parametrize("state_dtype", FORMATS)
@pytest.mark.parametrize("numel", SIZES)
def test_partial_groups_are_stored_as_if_zeros_followed(state_dtype, numel):
    storage = Storage(state_dtype)
    random = torch.Generator().manual_seed(numel)
    noise = state_noise(0, numel, 5, torch.device("cpu"))
    for name, codec in storage.codecs.items():
        x = torch.randn(numel, generator=random).square() * 1e-3
        kinds = {key: kind for key, kind in storage.buffers(torch.float32).items() if key.startswith(name)}
        if name == "exp_avg":
            kinds = {key: kind for key, kind in kinds.items() if "sq" not in key}
        views = {key: torch.zeros(kind.numel(numel), dtype=kind.dtype) for key, kind in kinds.items()}
        assert views[name].numel() == -(-numel // codec.elements)
        if codec.scales:
            assert views[f"{name}_scale"].numel() == -(-numel // GROUP) * codec.scales
        storage.encode(name, views, x, noise[name])
        padded, padded_noise = torch.zeros(2, -(-numel // GROUP) * GROUP)
        padded[:numel], padded_noise[:numel] = x, noise[name]
        codes, scales = codec.encode(padded.view(-1, GROUP), padded_noise.long().view(-1, GROUP))
        expected = codec.decode(codes, scales).flatten()[:numel]
        assert torch.equal(storage.decode(name, views, numel), expected)
        kept = {key: view.clone() for key, view in views.items()}
        storage.encode(name, views, x + 1, noise[name], keep=torch.tensor(True))
        assert all(torch.equal(view.view(torch.uint8), kept[key].view(torch.uint8)) for key, view in views.items())


@pytest.mark.parametrize(
    ("account", "codec"),
    [(TABLE["8 bits of the root"], ROOT8), (TABLE["4 bits of the root"], ROOT4), (TABLE["E4M3"], E4M3_DITHERED)],
    ids=["8 bits of the root", "4 bits of the root", "E4M3"],
)
def test_codes_of_a_second_moment_are_unbiased_and_neighbours(account, codec):
    x = torch.randn(1, GROUP, generator=torch.Generator().manual_seed(0)).square()
    x[0, :3] = torch.tensor([1e-5, 1e-4, 9.0])
    repeats = 4000
    noise = state_noise(0, repeats * GROUP, noise_key(0, 0, 0), torch.device("cpu"))["exp_avg_sq"]
    code, scale = codec.encode(x.repeat(repeats, 1), noise.view(repeats, GROUP))
    assert (scale == scale[0]).all()
    codes = account.unpack(code)
    exact = account.encode(x.double().numpy(), scale[:1].double().numpy())[0]
    step = np.ptp(codes, axis=0)
    # But for those below the first code, which all have it.
    assert (step > 0).mean() > 0.8
    spacing = np.maximum(2.0**-9, exact / 8) if codec is E4M3_DITHERED else 1
    assert (step <= 1.0001 * spacing).all()
    assert (np.abs(codes - exact) <= step + 1e-4 * exact).all()
    # 5 standard errors of a mean of roundings, each to one of two neighbours.
    assert (np.abs(codes.mean(0) - exact) <= 5 * 0.5 * step / repeats**0.5 + 1e-4 * exact).all()


def test_bf16_is_unbiased_with_the_noise_of_a_step():
    count = 1 << 16
    for key in range(4):
        noise = state_noise(1 << 33, count, noise_key(7, key, 3), torch.device("cpu"))
        for name in ("exp_avg", "exp_avg_sq"):
            for share in (0.1, 0.5, 0.93):
                # bfloat16 steps by 2^-7 from 1 to 2.
                x = torch.full((count,), -1 - share * 2.0**-7)
                back = BF16.decode(*BF16.encode(x[None], noise[name][None]))[0]
                assert set(back.tolist()) == {-1.0, -1 - 2.0**-7}
                up = (back != -1).double().mean().item()
                # 5 standard errors of a share among 65536.
                assert up == pytest.approx(share, abs=5 * (share * (1 - share) / count) ** 0.5)


def test_bf16_lets_a_slow_average_decay():
    # Nearest rounding would leave 1 where it is: .1 % is below half a step.
    v = torch.ones(1, 4096)
    for step in range(1000):
        noise = state_noise(0, 4096, noise_key(0, step, 0), torch.device("cpu"))["exp_avg_sq"]
        v = BF16.decode(*BF16.encode(0.999 * v, noise[None]))
    # 1000 roundings by at most half of 2^-8 each: a standard deviation of .03 an element, .0005 of the mean.
    assert v.mean().item() == pytest.approx(0.999**1000, abs=0.003)


def test_noise_of_weight_and_moments_is_independent():
    count, device = 1 << 16, torch.device("cpu")
    keys = [noise_key(11, step, 2) for step in (4, 6)]
    draws = {}
    for step, key in zip((4, 6), keys, strict=True):
        draws[f"weight {step}"] = noise16(torch.arange(count), key)
        draws |= {f"{name} {step}": bits for name, bits in state_noise(0, count, key, device).items()}
    draws["m, next element"] = draws["exp_avg 4"].roll(1)
    names = list(draws)
    for bits in draws.values():
        assert bits.min() >= 0 and bits.max() < 65536
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            # χ² of 16 by 16 cells, 225 degrees of freedom: beyond 360 once in 10^8.
            cells = torch.bincount((draws[a] >> 12) * 16 + (draws[b] >> 12), minlength=256).double()
            expected = count / 256
            chi = ((cells - expected) ** 2 / expected).sum().item()
            assert chi < 360, (a, b)


def test_noise_of_a_block_is_that_of_its_place_in_the_parameter():
    whole = state_noise(0, 500, 9, torch.device("cpu"))
    part = state_noise(200, 100, 9, torch.device("cpu"))
    for name, bits in whole.items():
        assert torch.equal(bits[200:300], part[name])
