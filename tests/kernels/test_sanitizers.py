"""The CPU library under AddressSanitizer, UBSan and ThreadSanitizer, in the drivers of tests/native."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tables import missing

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-g", "-pthread"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-sanitize-recover=all"]
INSTRUCTIONS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-DMISA_X86")
    INSTRUCTIONS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTIONS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]


def build(folder, flags, sources):
    """Compile chunk.cpp for every instruction set, and link it with the sources; skip without the runtime."""
    compiler = shutil.which("g++")
    if compiler is None:
        missing("needs g++")

    def compile_(*arguments):
        return subprocess.run([compiler, *FLAGS, *flags, *map(str, arguments)], capture_output=True, text=True)

    probe, program = folder / "probe.cpp", folder / "driver"
    probe.write_text("int main() {}\n")
    if compile_(probe, "-o", program).returncode or subprocess.run([program], capture_output=True).returncode:
        missing(f"{compiler} has no working runtime for {' '.join(flags)}")
    objects = [folder / f"{name}.o" for name in INSTRUCTIONS]
    commands = [
        [
            "-O2",
            *INSTRUCTIONS[file.stem],
            f"-DMISA_INSTRUCTIONS=chunk_{file.stem}",
            "-c",
            ROOT / "csrc/chunk.cpp",
            "-o",
            file,
        ]
        for file in objects
    ]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/native'}"]
    for command in (*commands, [*includes, *sources, *objects, "-o", program]):
        done = compile_(*command)
        assert done.returncode == 0, done.stderr
    return program


def run(program, *arguments, **options):
    # ThreadSanitizer of older compilers does not know the layouts that newer kernels draw.
    setarch = shutil.which("setarch")
    command = [*([setarch, "-R"] if setarch else []), program, *arguments]
    # Threads that wait for work would take the core from those that have some.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **options}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    sources = [ROOT / "csrc/adamw_cpu.cpp", ROOT / "tests/native/memory.cpp"]
    return build(
        tmp_path_factory.mktemp("memory"), ["-fsanitize=address,undefined,float-cast-overflow", "-fopenmp"], sources
    )


@pytest.fixture(scope="module")
def races(tmp_path_factory):
    return build(tmp_path_factory.mktemp("races"), ["-fsanitize=thread"], [ROOT / "tests/native/races.cpp"])


@pytest.mark.slow
def test_no_step_reaches_beyond_its_buffers(memory):
    done = run(memory)
    if "LeakSanitizer has encountered a fatal error" in done.stderr:
        # It cannot stop the threads of a process that is traced itself.
        done = run(memory, ASAN_OPTIONS="detect_leaks=0")
    assert done.returncode == 0 and not done.stderr, done.stderr
    walks, pitched, refusals, openmp = map(int, re.findall(r"\d+", done.stdout))
    assert walks >= 8 * (11 * (8 + 2 * 2) + 4 * 3 * 2) and refusals > 110 and openmp == 1
    assert pitched == 8 * 24 * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "planted, report", [("overrun", "heap-buffer-overflow"), ("overflow", "signed integer overflow")]
)
def test_what_is_planted_in_memory_is_seen(memory, planted, report):
    done = run(memory, planted)
    assert done.returncode != 0 and report in done.stderr


@pytest.mark.slow
def test_threads_never_touch_the_same_memory(races):
    done = run(races)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert re.fullmatch(r"\d+ steps\n", done.stdout)


@pytest.mark.slow
def test_a_planted_race_is_seen(races):
    done = run(races, "race", TSAN_OPTIONS="halt_on_error=1")
    assert done.returncode != 0 and "data race" in done.stderr
