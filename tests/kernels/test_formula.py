"""The update of one element in csrc/adamw.h, and reference.py beside it, against float64 and torch."""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from misa_kernels import reference
from misa_kernels.memory import storage

ROOT = Path(__file__).parents[2]
# Half the spacing of float32 numbers relative to their size: one correctly rounded operation.
U32 = 2.0**-24
SIZES = [0, 1, 15, 1023, 4097]
COMPILERS = ("c++", "g++", "clang++", "cl")

pytestmark = pytest.mark.skipif(
    "CXX" not in os.environ and not any(map(shutil.which, COMPILERS)), reason="needs a C++ compiler"
)


class Hyper(NamedTuple):
    decay: float
    step_size: float
    beta1: float
    beta2: float
    one_minus_beta1: float
    one_minus_beta2: float
    denom_scale: float
    eps: float


def hyper_at(t: int, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2) -> Hyper:
    """What the t-th update needs, in float64; each of ours rounds it to float32 once."""
    step_size = lr / (1 - beta1**t)
    denom_scale = 1 / math.sqrt(1 - beta2**t)
    return Hyper(1 - lr * weight_decay, step_size, beta1, beta2, 1 - beta1, 1 - beta2, denom_scale, eps)


def build(flags: str, folder: Path) -> ctypes.CDLL:
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DMISA_TESTS=ON"]
    # CMake and ninja may have been installed beside this Python alone.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in ([*configure, f"-DCMAKE_CXX_FLAGS={flags}"], ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    (library,) = (path for path in folder.glob("*adamw_check.*") if path.suffix in {".so", ".dylib", ".dll"})
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> list[ctypes.CDLL]:
    """The header without optimisation, and with everything that may legally contract or vectorise."""
    flags = ["-O0 -ffp-contract=off", "-O3 -march=native -ffp-contract=fast"]
    return [build(flag, tmp_path_factory.mktemp("build")) for flag in flags]


def array_pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def header_adamw(library, theta, g, m, v, hyper: Hyper):
    theta, m, v = theta.copy(), m.copy(), v.copy()
    floats = [ctypes.c_float(x) for x in hyper]
    library.check_adamw(ctypes.c_int64(theta.size), *map(array_pointer, (theta, g, m, v)), *floats)
    return theta, m, v


def reference_adamw(theta, g, m, v, hyper: Hyper):
    tensors = (torch.from_numpy(x.copy()) for x in (theta, g, m, v))
    step_size, denom_scale = torch.tensor([hyper.step_size, hyper.denom_scale])
    out = reference.adamw(*tensors, hyper.decay, step_size, hyper.beta1, hyper.beta2, denom_scale, hyper.eps)
    return tuple(x.numpy() for x in out)


def header_noise16(library, index: np.ndarray, key: int) -> np.ndarray:
    out = np.full(index.size, 0xFFFFFFFF, np.uint32)
    arguments = array_pointer(index), ctypes.c_uint32(key), array_pointer(out)
    library.check_noise16(ctypes.c_int64(index.size), *arguments)
    return out


def header_stochastic(library, x: np.ndarray, noise: np.ndarray) -> np.ndarray:
    out = np.full(x.size, 0x7FC1, np.uint16)
    noise = np.ascontiguousarray(noise, np.uint32)
    library.check_bf16_stochastic(ctypes.c_int64(x.size), *map(array_pointer, (x, noise, out)))
    return out


def header_nearest(library, x: np.ndarray) -> np.ndarray:
    out = np.full(x.size, 0x7FC1, np.uint16)
    library.check_bf16_nearest(ctypes.c_int64(x.size), *map(array_pointer, (x, out)))
    return out


def torch_bits(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """A bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def draw_state(n: int, seed: int, fresh: bool):
    """Weights near 1, gradients over 15 orders of magnitude, and moments such as they leave behind."""
    rng = np.random.default_rng(seed)
    theta = rng.standard_normal(n)
    g = rng.standard_normal(n) * 10.0 ** rng.uniform(-12, 3, n)
    m = np.zeros(n) if fresh else g * rng.uniform(-2, 2, n)
    v = np.zeros(n) if fresh else np.square(g) * rng.uniform(0.01, 4, n)
    return tuple(x.astype(np.float32) for x in (theta, g, m, v))


def adamw_float64(theta, g, m, v, hyper: Hyper):
    """Decoupled weight decay, then Adam (Loshchilov and Hutter 2019, algorithm 2), in float64."""
    theta, g, m, v = (x.astype(np.float64) for x in (theta, g, m, v))
    m_new = hyper.beta1 * m + hyper.one_minus_beta1 * g
    v_new = hyper.beta2 * v + hyper.one_minus_beta2 * g**2
    update = hyper.step_size * m_new / (np.sqrt(v_new) * hyper.denom_scale + hyper.eps)
    return hyper.decay * theta - update, m_new, v_new


def rounding_bounds(theta, g, m, v, hyper: Hyper, roundings: dict[str, int]):
    """Largest error that counted float32 roundings can leave in theta, m and v.

    Every operation errs by at most U32 of its result. m may cancel, so its error is relative to its terms;
    v and the denominator are sums of positive terms, so theirs are relative to the value.
    """
    theta, g, m, v = (np.abs(x.astype(np.float64)) for x in (theta, g, m, v))
    v_new = hyper.beta2 * v + hyper.one_minus_beta2 * g**2
    m_terms = hyper.beta1 * m + hyper.one_minus_beta1 * g
    denom = np.sqrt(v_new) * hyper.denom_scale + hyper.eps
    m_bound = roundings["m"] * U32 * m_terms
    v_bound = roundings["v"] * U32 * v_new
    # sqrt halves the relative error of v and rounds once; then come the denominator's own operations.
    denom_error = roundings["v"] / 2 + 1 + roundings["denom"]
    update = hyper.step_size * m_terms / denom
    update_bound = (roundings["m"] + denom_error + roundings["update"]) * U32 * update
    theta_bound = update_bound + roundings["theta"] * U32 * (hyper.decay * theta + update)
    # Products of these errors are 1e-7 of them; the last term is the smallest float32.
    return tuple(1.001 * bound + 2.0**-149 for bound in (theta_bound, m_bound, v_bound))


# Roundings in a row, each constant's own included. m: constant, product, sum (or fma). v: the same and g * g.
# denom: constant and fma, or constant, product, sum. update: constant and division; the reference's
# product besides, which the header's last fma keeps exact. theta: constant, product, sum.
ROUNDINGS = {
    "header": {"m": 3, "v": 4, "denom": 2, "update": 2, "theta": 3},
    "reference": {"m": 3, "v": 4, "denom": 3, "update": 3, "theta": 3},
}


@pytest.mark.parametrize("t", [1, 2, 50, 100_000])
@pytest.mark.parametrize("n", SIZES)
def test_update_matches_float64(libraries, n, t):
    hyper = hyper_at(t)
    state = draw_state(n, seed=n + t, fresh=t == 1)
    expected = adamw_float64(*state, hyper)
    results = {
        "header": header_adamw(libraries[0], *state, hyper),
        "reference": reference_adamw(*state, hyper),
    }
    for name, result in results.items():
        bounds = rounding_bounds(*state, hyper, ROUNDINGS[name])
        for letter, got, want, bound in zip(("theta", "m", "v"), result, expected, bounds, strict=True):
            excess = np.abs(got - want) - bound
            assert got.dtype == np.float32
            assert (excess <= 0).all(), f"{name}: {letter} is off by {excess.max()} more than roundings explain"


@given(
    lr=st.floats(1e-7, 1.0),
    beta1=st.floats(0.0, 0.99),
    beta2=st.floats(0.5, 0.99999),
    eps=st.floats(1e-12, 1e-2),
    weight_decay=st.floats(0.0, 0.9),
    t=st.integers(1, 1_000_000),
    seed=st.integers(0, 2**32 - 1),
)
def test_update_matches_float64_for_any_hyperparameters(libraries, lr, beta1, beta2, eps, weight_decay, t, seed):
    hyper = hyper_at(t, lr, beta1, beta2, eps, weight_decay)
    state = draw_state(64, seed, fresh=False)
    bounds = rounding_bounds(*state, hyper, ROUNDINGS["header"])
    result = header_adamw(libraries[0], *state, hyper)
    for got, want, bound in zip(result, adamw_float64(*state, hyper), bounds, strict=True):
        assert (np.abs(got - want) <= bound).all()


def test_compiler_flags_change_no_bit(libraries):
    hyper = hyper_at(3)
    state = draw_state(4097, seed=0, fresh=False)
    plain, optimised = (header_adamw(library, *state, hyper) for library in libraries)
    for a, b in zip(plain, optimised, strict=True):
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def test_update_of_unaligned_views(libraries):
    hyper = hyper_at(2)
    state = draw_state(1024, seed=5, fresh=False)
    whole = header_adamw(libraries[1], *state, hyper)
    part = header_adamw(libraries[1], *(x[1:] for x in state), hyper)
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[1:], b)


def test_zero_gradient_decays_only(libraries):
    theta = np.float32([1.0, -2.0, 0.0])
    zero = np.zeros(3, np.float32)
    new_theta, m, v = header_adamw(libraries[0], theta, zero, zero, zero, hyper_at(1))
    np.testing.assert_array_equal(new_theta, theta * np.float32(1 - 1e-5))
    assert not m.any() and not v.any()


def test_gradient_whose_square_underflows_stays_finite(libraries):
    theta = np.ones(2, np.float32)
    zero = np.zeros(2, np.float32)
    g = np.float32([1e-30, -1e-38])
    new_theta, m, v = header_adamw(libraries[0], theta, g, zero, zero, hyper_at(1))
    assert not v.any() and m.all()
    np.testing.assert_allclose(new_theta, 1.0, rtol=2e-5)


def float32_samples() -> np.ndarray:
    """All upper halves with the lower halves that decide a rounding: every exponent, ties, subnormals."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.uint32([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return (upper[:, None] | lower).ravel().view(np.float32)


@pytest.mark.parametrize("which", [0, 1])
def test_nearest_is_torchs(libraries, which):
    x = float32_samples()
    bits = header_nearest(libraries[which], x)
    nan = np.isnan(x)
    # torch's own NaN pattern differs between its scalar and its vector code, so only being NaN counts.
    assert np.isnan(bf16_values(bits[nan])).all()
    np.testing.assert_array_equal(bits[~nan], torch_bits(torch.from_numpy(x[~nan]).to(torch.bfloat16)))


def test_bf16_to_float_is_torchs(libraries):
    bits = np.arange(1 << 16, dtype=np.uint16)
    out = np.zeros(bits.size, np.float32)
    libraries[0].check_bf16_to_float(ctypes.c_int64(bits.size), array_pointer(bits), array_pointer(out))
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(out, expected)


def header_join(library, upper: np.ndarray, residual: np.ndarray) -> np.ndarray:
    out = np.zeros(upper.size, np.float32)
    library.check_bf16_join(ctypes.c_int64(upper.size), *map(array_pointer, (upper, residual, out)))
    return out


@pytest.mark.parametrize("which", [0, 1])
def test_split_and_join_are_storages(libraries, which):
    """Bit for bit, NaNs included; joined again, every number but a NaN is what it was."""
    x = float32_samples()
    upper, residual = np.full(x.size, 0x7FC1, np.uint16), np.full(x.size, 0x7FA1, np.int16)
    libraries[which].check_bf16_split(ctypes.c_int64(x.size), *map(array_pointer, (x, upper, residual)))
    weight, lower = storage.split(torch.from_numpy(x))
    np.testing.assert_array_equal(upper, torch_bits(weight))
    np.testing.assert_array_equal(residual, lower.numpy())
    joined, nan = header_join(libraries[which], upper, residual), np.isnan(x)
    np.testing.assert_array_equal(joined[~nan].view(np.uint32), x[~nan].view(np.uint32))
    assert np.isnan(joined[nan]).all() and not residual[nan].any()


@pytest.mark.parametrize("which", [0, 1])
def test_join_is_storages_for_any_two_parts(libraries, which):
    """As somebody's checkpoint may hold them, whatever `split` makes."""
    upper = np.repeat(np.arange(1 << 16, dtype=np.uint16), 5)
    residual = np.resize(np.int16([-(2**15), -1, 0, 1, 2**15 - 1]), upper.size)
    expected = storage.join(torch.from_numpy(upper.view(np.int16)).view(torch.bfloat16), torch.from_numpy(residual))
    joined = header_join(libraries[which], upper, residual)
    np.testing.assert_array_equal(joined.view(np.uint32), expected.numpy().view(np.uint32))


def random_floats(n: int, seed: int) -> np.ndarray:
    """Random bit patterns whose rounding stays finite: all exponents and subnormals alike."""
    x = np.random.default_rng(seed).integers(0, 2**32, n, dtype=np.uint32).view(np.float32)
    largest = bf16_values(np.uint16([0x7F7F]))[0]
    return np.where(np.abs(x) <= largest, x, np.float32(1.5))


@pytest.mark.parametrize("which", [0, 1])
def test_stochastic_gives_a_neighbour(libraries, which):
    x = random_floats(1 << 16, seed=1)
    noise = np.random.default_rng(2).integers(0, 1 << 16, x.size)
    got = bf16_values(header_stochastic(libraries[which], x, noise)).astype(np.float64)
    toward_zero = bf16_values((x.view(np.uint32) >> 16).astype(np.uint16)).astype(np.float64)
    away = bf16_values(((x.view(np.uint32) >> 16) + 1).astype(np.uint16)).astype(np.float64)
    exact = toward_zero == x
    assert (got[exact] == x[exact]).all()
    assert ((got == toward_zero) | (got == away)).all()
    assert (got != toward_zero).any() and (got != away).any()


@pytest.mark.parametrize("value", [1.0 + 2**-9, -3.14159, 1e-3, 7.7e-39, 65504.3, 2.0])
def test_stochastic_over_all_noise_means_the_value(libraries, value):
    """Over all 65536 noises the mean is the value itself, exactly: the lower half counts the carries."""
    x = np.full(1 << 16, value, np.float32)
    rounded = bf16_values(header_stochastic(libraries[0], x, np.arange(1 << 16)))
    assert math.fsum(rounded.tolist()) / (1 << 16) == float(x[0])


def test_stochastic_is_unbiased_with_hashed_noise(libraries):
    n = 1 << 20
    x = np.random.default_rng(3).standard_normal(n).astype(np.float32)
    noise = header_noise16(libraries[0], np.arange(n, dtype=np.uint64), key=12345)
    rounded = bf16_values(header_stochastic(libraries[0], x, noise)).astype(np.float64)
    error = rounded - x
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(n)
    # Rounding to nearest has a third of this variance: noise that is not used would show here.
    low = bf16_values((x.view(np.uint32) >> 16).astype(np.uint16)).astype(np.float64)
    high = bf16_values(((x.view(np.uint32) >> 16) + 1).astype(np.uint16)).astype(np.float64)
    variance = np.abs(x - low) * np.abs(high - x)
    assert np.square(error).mean() == pytest.approx(variance.mean(), rel=0.01)


def test_stochastic_keeps_nan_and_infinity(libraries):
    bits = np.uint32([0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x7FC00000])
    noise = np.full(bits.size, 0xFFFF)
    rounded = bf16_values(header_stochastic(libraries[0], bits.view(np.float32), noise))
    np.testing.assert_array_equal(rounded, np.float32([np.inf, -np.inf, np.nan, np.nan, np.nan]))


def noise16_by_hand(index: int, key: int) -> int:
    def mix(x: int) -> int:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            x = (x ^ (x >> shift)) * factor % 2**32
        return x

    high, low = divmod(index, 2**32)
    if high:
        key = mix(key ^ high)
    return mix(low ^ key) % 2**16


@given(
    indices=st.lists(st.integers(0, 2**40), min_size=1, max_size=50),
    key=st.integers(0, 2**32 - 1),
)
def test_noise_is_the_definition(libraries, indices, key):
    expected = [noise16_by_hand(i, key) for i in indices]
    assert header_noise16(libraries[0], np.array(indices, np.uint64), key).tolist() == expected
    assert reference.noise16(torch.tensor(indices), key).tolist() == expected


@pytest.mark.parametrize("first", [0, 2**32 - 512 * 1024, 2**33 + 7])
@pytest.mark.parametrize("key", [0, 1, 0xDEADBEEF])
def test_noise_is_uniform(libraries, first, key):
    """Chi-square over 256 classes of the upper and of the lower byte; the bound is 6 deviations."""
    n = 1 << 20
    noise = header_noise16(libraries[0], np.arange(first, first + n, dtype=np.uint64), key)
    for byte in (noise >> 8, noise & 0xFF):
        counts = np.bincount(byte, minlength=256)
        chi_square = np.square(counts - n / 256).sum() / (n / 256)
        assert abs(chi_square - 255) < 6 * math.sqrt(2 * 255)


def test_noise_of_other_keys_is_unrelated(libraries):
    index = np.arange(1 << 18, dtype=np.uint64)
    a, b = (header_noise16(libraries[0], index, key).astype(np.float64) for key in (7, 8))
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(index.size)


def test_reference_rounds_as_the_header(libraries):
    """Bit for bit, over all exponents and subnormals."""
    x = random_floats(1 << 18, seed=4)
    noise = header_noise16(libraries[0], np.arange(x.size, dtype=np.uint64), key=99)
    ours = reference.round_stochastic(torch.from_numpy(x), torch.bfloat16, torch.from_numpy(noise.astype(np.int64)))
    np.testing.assert_array_equal(torch_bits(ours), header_stochastic(libraries[0], x, noise))


def test_reference_rounds_nonfinite_as_the_header(libraries):
    bits = np.uint32([0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF])
    noise = torch.full((bits.size,), 0xFFFF)
    x = torch.from_numpy(bits.view(np.float32))
    ours = bf16_values(torch_bits(reference.round_stochastic(x, torch.bfloat16, noise)))
    theirs = bf16_values(header_stochastic(libraries[0], bits.view(np.float32), noise.numpy()))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_gpu_code_rounds_whatever_the_flags_say(tmp_path):
    """The flags that would make division and square root approximate reach nothing in the header."""
    source = tmp_path / "one.cu"
    source.write_text(
        '#include "adamw.h"\n'
        "__global__ void one(float* theta, float g, float* m, float* v, float a, float b, std::uint16_t* out) {\n"
        "  misa::adamw(*theta, g, *m, *v, a, b, a, b, a, b, a, b);\n"
        "  *out = misa::bf16_stochastic(*theta, misa::noise16(7, 3));\n"
        "}\n"
    )
    flags = ["-prec-div=false", "-prec-sqrt=false", "-fmad=true", "-arch=sm_80"]
    command = ["nvcc", "-ptx", *flags, f"-I{ROOT / 'csrc'}", "-o", str(tmp_path / "one.ptx"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ptx = (tmp_path / "one.ptx").read_text()
    counts = {name: len(re.findall(rf"\b{re.escape(name)}\b", ptx)) for name in ("div.rn.f32", "sqrt.rn.f32")}
    assert counts == {"div.rn.f32": 1, "sqrt.rn.f32": 1}
    assert ptx.count("fma.rn.f32") == 4
    assert "approx" not in ptx and "div.full" not in ptx
