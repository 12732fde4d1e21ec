"""`python -m misa_kernels info`: what was built, and what each device uses."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

import misa_kernels
from misa_kernels import kernels
from misa_kernels.__main__ import main
from misa_kernels.kernels import native


@pytest.fixture
def info(capsys):
    """The output's lines by the word they begin with; a list, since `auto` and `not usable` may come again."""

    def lines() -> list[tuple[str, str]]:
        assert main(["info"]) == 0
        text = capsys.readouterr().out
        return [tuple(part.strip() for part in line.split("  ", 1)) for line in text.replace("\n  ", "\n").splitlines()]

    return lines


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins for the built libraries, each by its name."""
    built: dict[str, SimpleNamespace] = {}

    def library(name: str) -> SimpleNamespace:
        if name not in built:
            raise RuntimeError("was not built")
        return built[name]

    monkeypatch.setattr(native, "library", library)
    monkeypatch.setattr(native, "path", lambda name: native.FOLDER / f"libmisa_{name}.so" if name in built else None)
    return built


def fake_cpu(openmp: int) -> SimpleNamespace:
    return SimpleNamespace(
        misa_cpu_built=lambda: b"avx2 baseline",
        misa_cpu_instructions=lambda: b"baseline",
        misa_cpu_openmp=lambda: openmp,
    )


def fake_cuda(driver: int) -> SimpleNamespace:
    return SimpleNamespace(
        misa_cuda_built=lambda: b"80 90",
        misa_cuda_runtime_version=lambda: 12080,
        misa_cuda_driver_version=lambda: driver,
    )


def test_versions_are_those_of_the_packages(info):
    lines = dict(info())
    assert lines["misa_kernels"] == misa_kernels.__version__
    assert lines["torch"] == torch.__version__
    assert lines["Python"].split()[0] == sys.version.split()[0]


def test_nothing_built_leaves_plain_pytorch(info, libraries):
    lines = info()
    assert ("CPU library", "none") in lines and ("CUDA library", "none") in lines
    assert ("auto", "reference for float32, bfloat16, float16, float64") in lines
    assert {("not usable", f"{name!r} was not built") for name in ("cpu", "cuda")} <= set(lines)


@pytest.mark.parametrize(
    ("openmp", "threads"), [(1, f"{torch.get_num_threads()}, OpenMP"), (0, "1, built without OpenMP")]
)
def test_the_cpu_library_serves_what_it_was_built_for(info, libraries, openmp, threads):
    libraries["cpu"] = fake_cpu(openmp)
    lines = info()
    assert ("CPU library", "libmisa_cpu.so") in lines
    assert ("instructions", "avx2 baseline; in use: baseline") in lines
    assert ("threads", threads) in lines
    assert [text for name, text in lines if name == "auto"][:2] == [
        "cpu for float32, bfloat16",
        "reference for float16, float64",
    ]


@pytest.mark.parametrize(("driver", "text"), [(13010, "for CUDA 13.1"), (0, "none")])
def test_the_cuda_library_is_described_without_a_gpu(info, libraries, driver, text):
    libraries["cuda"] = fake_cuda(driver)
    lines = dict(info())
    assert lines["CUDA library"] == "libmisa_cuda.so"
    assert lines["architectures"] == "sm_80 sm_90"
    assert lines["CUDA runtime"] == "12.8"
    assert lines["driver"] == text


def test_a_gpu_is_named_with_the_backends_it_gets(info, libraries, monkeypatch):
    libraries["cuda"] = fake_cuda(13010)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "_no_triton", lambda: "needs Triton 3.6")
    lines = info()
    at = lines.index(("cuda:0", "A GPU, sm_90"))
    assert lines[at + 1 : at + 3] == [
        ("auto", "cuda for float32, bfloat16"),
        ("auto", "reference for float16, float64"),
    ]
    assert ("not usable", "'triton' needs Triton 3.6") in lines
    assert not any(text.startswith("'cuda'") for _, text in lines)
