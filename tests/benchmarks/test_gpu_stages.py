"""The stages on a GPU, without one: which tests they run and count, what NVIDIA's tools said, and what they carry."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import nvidia, outcomes, wheels
from benchmarks.gpu import stages as gpu
from benchmarks.gpu.first import parity
from benchmarks.step.peers import PEERS as PEERS_OF_THE_STEP

MEMCHECK = "...\n6 passed in 40.1s\n========= ERROR SUMMARY: {} errors\n"
RACECHECK = "...\n6 passed in 40.1s\n========= RACECHECK SUMMARY: {} hazards displayed ({} errors, {} warnings)\n"
NCU = """==PROF== Connected to process 77 (/usr/bin/python3.12)
==PROF== Profiling "step_kernel" - 0: 0%....50%....100% - 1 pass
{"counted_bytes": 1879067392}
==PROF== Disconnected from process 77
"ID","Process ID","Process Name","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","77","python3.12","step_kernel","dram__bytes_read.sum","byte","1,073,800,000"
"0","77","python3.12","step_kernel","dram__bytes_write.sum","byte","820000000"
"""


def test_a_test_counts_once_as_the_worst_that_became_of_it(tmp_path):
    lines = [("a", "passed"), ("b", "failed"), ("c", "passed"), ("c", "failed"), ("d", "skipped"), ("b", "passed")]
    path = tmp_path / "tests.jsonl"
    path.write_text("".join(json.dumps({"test": test, "outcome": outcome}) + "\n" for test, outcome in lines))
    assert outcomes.count(path) == {"passed": 1, "failed": 2, "skipped": 1}
    assert outcomes.count(tmp_path / "none") == {"passed": 0, "failed": 0, "skipped": 0}


@pytest.fixture
def other_project(tmp_path, monkeypatch):
    """A checkout with four GPU tests, which need none, and one test that must not run."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "test_some.py").write_text(
        "import os, time, pytest\n"
        "@pytest.mark.gpu\ndef test_passes(): pass\n"
        "@pytest.mark.gpu\ndef test_skips(): pytest.skip()\n"
        "@pytest.mark.gpu\ndef test_hangs(): time.sleep(float(os.environ.get('HANGS', 0)))\n"
        "@pytest.mark.gpu\ndef test_fails(): assert not __file__.endswith('failing.py')\n"
        "def test_other(): assert False\n"
    )
    monkeypatch.setattr(gpu.record, "ROOT", tmp_path)
    return tmp_path


def test_smoke_runs_the_gpu_tests_and_no_others(other_project):
    path = other_project / "out" / "smoke.jsonl"
    counts = gpu.run_gpu_tests(time.monotonic() + 60, path)
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (3, 0, 1)
    assert counts["ok"] is True and counts["timed_out"] is False
    (other_project / "test_some.py").rename(other_project / "test_failing.py")
    counts = gpu.run_gpu_tests(time.monotonic() + 60, path)
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (2, 1, 1)
    assert counts["ok"] is False and counts["exit_code"] == 1


def test_smoke_keeps_what_had_ended_at_the_time_limit(other_project, monkeypatch):
    monkeypatch.setenv("HANGS", "60")
    path, process = other_project / "smoke.jsonl", []
    started = time.monotonic()
    # Until the tests before the one that hangs have ended, however slow this machine is.
    monkeypatch.setattr(gpu.subprocess, "Popen", waiting_for(path, lines=2, process=process))
    counts = gpu.run_gpu_tests(started + 1, path)
    assert counts["timed_out"] is True and counts["ok"] is False
    assert (counts["passed"], counts["skipped"]) == (1, 1)
    assert process[0].poll() is not None


def waiting_for(path, lines, process):
    """What starts a process, and returns when a file has so many lines."""
    popen = subprocess.Popen

    def start(*arguments, **options):
        process.append(popen(*arguments, **options))
        while not path.exists() or len(path.read_text().splitlines()) < lines:
            time.sleep(0.05)
        return process[0]

    return start


def test_records_say_which_tests_had_passed_at_their_commit(tmp_path):
    (tmp_path / "gpu").mkdir()
    for path, commit in (("smoke.json", "abc"), ("gpu/smoke.json", "abc"), ("gpu/test.json", "old")):
        (tmp_path / path).write_text(json.dumps({"commit": commit, "tests": {"passed": len(path)}}))
    folders = (tmp_path, tmp_path / "gpu")
    assert gpu.tests_at("abc", folders) == {"smoke": {"passed": len("smoke.json")}}
    assert gpu.tests_at("old", folders) == {"test": {"passed": len("gpu/test.json")}}
    assert gpu.tests_at("new", folders) == {}


def test_no_figure_of_a_step_that_is_wrong(monkeypatch, tmp_path, capsys):
    """On a CPU the variants are not looked at; here they are, and one is wrong."""

    def check_all(names, device):
        yield {name: {"ok": name != "fp32 misa clip"} for name in names}

    monkeypatch.setattr(parity, "check_all", check_all)
    look = gpu.look
    monkeypatch.setattr(
        gpu, "look", lambda content, names, device, out: look(content, names, torch.device("cuda"), out)
    )
    few = {name: PEERS_OF_THE_STEP[name] for name in ("fp32 misa", "fp32 misa clip", "fp32 fused")}
    monkeypatch.setattr("benchmarks.step.peers.PEERS", few)
    # It takes a process of its own.
    monkeypatch.setattr("benchmarks.step.apart.cold", lambda device, deadline: {"absent": "not asked"})
    assert gpu.main(["--stage", "bench", "--device", "cpu", "--out", str(tmp_path)]) == 1
    content = json.loads((tmp_path / "bench.json").read_text())
    assert list(content["cases"][0]["peers"]) == ["fp32 misa", "fp32 fused"]
    assert content["parity"]["fp32 misa clip"] == {"ok": False} and content["tests"] == {}
    assert "WRONG fp32 misa clip" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_gpu_stage_without_gpu_says_so(tmp_path, capsys):
    assert gpu.main(["--stage", "smoke", "--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages of a thousand bytes and a library, the second of which pip installs if `packages` holds it."""
    there = {"first==1", "second==2"}

    def run(command, **options):
        if command[-1] not in there:
            return SimpleNamespace(returncode=1, stderr="some\nERROR: No matching distribution found\n")
        name = command[-1].split("=")[0]
        folder = Path(command[command.index("--target") + 1]) / name
        folder.mkdir()
        (folder / "code.py").write_bytes(b"#" * 1000)
        (folder / f"lib{name}.so").write_bytes(b"x" * 200)
        (folder / "libother.so").write_bytes(b"x" * 9000)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    monkeypatch.setattr(wheels, "ROOT", tmp_path)
    monkeypatch.setattr(wheels, "FOLDER", tmp_path / "out" / "peers")
    monkeypatch.setattr(wheels, "PACKAGES", {"first==1": ("libfirst.so",), "second==2": ()})
    wheels.FOLDER.mkdir(parents=True)
    (wheels.FOLDER / "of another version").touch()
    return there


def folder_of_peers():
    return {str(path.relative_to(wheels.FOLDER)) for path in wheels.FOLDER.rglob("*") if path.is_file()}


def test_peers_travel_without_the_libraries_of_other_devices(packages):
    assert wheels.main() == 0
    assert folder_of_peers() == {"first/code.py", "first/libfirst.so", "second/code.py"}


def test_peers_that_do_not_fit_are_left_out_with_a_message(packages, monkeypatch, capsys):
    monkeypatch.setattr(wheels, "LIMIT_BYTES", wheels.TRACKED_BYTES + 2000)
    assert wheels.main() == 1
    assert folder_of_peers() == {"first/code.py", "first/libfirst.so"}
    assert "second==2: left out: 0.0 MiB do not fit into the 0.0 that are left" in capsys.readouterr().out


def test_peers_that_pip_does_not_find_are_left_out_with_its_message(packages, capsys):
    packages.remove("first==1")
    assert wheels.main() == 1
    assert folder_of_peers() == {"second/code.py"}
    assert "first==1: left out: ERROR: No matching distribution found" in capsys.readouterr().out


def test_what_is_tracked_leaves_the_room_that_the_peers_count_on():
    files = subprocess.run(["git", "ls-files", "-z"], cwd=wheels.ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("no git checkout")
    paths = [wheels.ROOT / name for name in files.stdout.split("\0") if name]
    assert 0 < sum(path.stat().st_size for path in paths if path.is_file()) < wheels.TRACKED_BYTES


@pytest.mark.parametrize(
    "code, output, ok, found",
    [
        (0, MEMCHECK.format(0), True, 0),
        (99, MEMCHECK.format(3), False, 3),
        (0, RACECHECK.format(0, 0, 0), True, 0),
        (99, RACECHECK.format(2, 2, 0), False, 2),
        (99, RACECHECK.format(3, 1, 2), False, 1),
        (99, RACECHECK.format(1, 0, 0).replace("0 errors", "1 error"), False, 1),
        # An exit code that nothing explains.
        (99, MEMCHECK.format(0), False, 0),
        (1, MEMCHECK.format(0).replace("6 passed", "1 failed, 5 passed"), False, 0),
        (99, RACECHECK.format(1, 0, 1).replace("6 passed", "1 failed, 5 passed"), False, 0),
        (0, MEMCHECK.format(0).replace("6 passed", "5 passed, 1 error"), False, 0),
        (5, "no tests ran in 1.00s\n========= ERROR SUMMARY: 0 errors", False, 0),
        (0, "6 passed in 1.00s", False, 0),
        # Killed before the summary, after it had something to say.
        (None, "..========= Invalid __global__ write of size 4 bytes\n", False, 1),
        (None, "..\n========= Invalid __global__ read of size 16 bytes\n", False, 1),
        (None, "..\n========= Error: Race reported between Write access at step_kernel\n", False, 1),
    ],
)
def test_sanitizer_output(code, output, ok, found):
    result = nvidia.judge(code, output)
    assert result["ok"] is ok and result["found"] == found
    assert ("tail" in result) is not ok


@pytest.mark.parametrize("code", [0, 99])
def test_hazards_that_racecheck_only_warns_of_are_recorded(code):
    result = nvidia.judge(code, RACECHECK.format(2, 0, 2))
    assert (result["ok"], result["found"], result["warnings"]) == (True, 0, 2) and "2 warnings" in result["tail"]


@pytest.mark.parametrize("code, output", [(1, "========= Device not supported."), (None, "...")])
def test_a_sanitizer_that_cannot_look_is_absent(code, output):
    result = nvidia.judge(code, output)
    assert result["ok"] is True and "compute-sanitizer" in result["absent"]


# Runs what follows its options as compute-sanitizer does, and finds what the environment says.
SANITIZER = """#!{python}
import os, subprocess, sys
command = sys.argv[sys.argv.index(sys.executable):]
planted = "nvidia.overrun()" in command[-1]
code = 0 if planted else subprocess.run(command).returncode
print("=========     at step_kernel+0x90" if planted and "SEES" in os.environ else "", flush=True)
print("========= ERROR SUMMARY: 0 errors")
sys.exit(code)
"""
TESTS = """
import time, pytest
def test_quick():
    pass
@pytest.mark.parametrize("seconds", {seconds})
def test_slow(seconds):
    time.sleep(seconds)
"""


@pytest.mark.parametrize("seconds, sees, passed", [([0], True, 2), ([0], False, 2), ([0, 60, 0], True, 2)])
def test_sanitized_tests_end_in_time_with_what_was_seen(monkeypatch, tmp_path, seconds, sees, passed):
    tool, tests = tmp_path / "compute-sanitizer", tmp_path / "test_some.py"
    tool.write_text(SANITIZER.format(python=sys.executable))
    tool.chmod(0o755)
    tests.write_text(TESTS.format(seconds=seconds))
    if sees:
        monkeypatch.setenv("SEES", "1")
    monkeypatch.setattr(nvidia, "find", lambda name: str(tool))
    monkeypatch.setattr(nvidia, "SMALL_TESTS", (str(tests),))
    monkeypatch.setattr(nvidia, "WARM_UP", 0.0)
    monkeypatch.setattr(nvidia, "GRACE_S", 4.0)
    started = time.monotonic()
    result = nvidia.sanitize("memcheck", started + (9 if 60 in seconds else 40))
    assert (result["ok"], result["found"], result["passed"]) == (True, 0, passed), result
    if 60 in seconds:
        assert result["stopped"] and 4 < time.monotonic() - started < 9 and "planted" not in result
    else:
        assert result["planted"] == ["step"] * sees and ("absent" in result) is not sees


def test_the_overrun_that_is_planted_is_there(monkeypatch):
    """Or memcheck would see none, and be called absent."""
    ran = []
    monkeypatch.setattr(nvidia, "find", lambda name: name)
    monkeypatch.setattr(
        nvidia, "run", lambda command, *_, **variables: ran.append(command[-1]) or (0, MEMCHECK.format(0))
    )
    nvidia.sanitize("memcheck", time.monotonic() + 100)
    found = {}
    exec(ran[-1].removesuffix("; nvidia.overrun()"), found)
    assert ran[-1].endswith("nvidia.overrun()") and callable(found["nvidia"].overrun)


def test_missing_tools_are_said_in_a_sentence(monkeypatch):
    monkeypatch.setattr(nvidia, "find", lambda tool: None)
    assert nvidia.sanitize("memcheck", math.inf)["absent"].startswith("compute-sanitizer is neither")
    assert nvidia.dram_bytes(math.inf, "bf16 misa")["absent"].startswith("ncu is neither")


def test_ncu_output(monkeypatch):
    monkeypatch.setattr(nvidia, "find", lambda tool: "/usr/bin/ncu")
    monkeypatch.setattr(nvidia, "run", lambda command, deadline: (0, NCU))
    expected = {"peer": "bf16 misa", "read_bytes": 1.0738e9, "written_bytes": 8.2e8, "counted_bytes": 1879067392}
    assert nvidia.dram_bytes(math.inf, "bf16 misa") == expected
    monkeypatch.setattr(nvidia, "run", lambda command, deadline: (9, "==ERROR== LibraryNotLoaded"))
    assert "LibraryNotLoaded" in nvidia.dram_bytes(math.inf, "bf16 misa")["absent"]


def alive(pid):
    """Whether a process is there and does not only wait for its new parent to take note of its end."""
    try:
        return Path("/proc", pid, "stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_tool_is_stopped_with_what_it_started():
    """In a session of its own too, and with our output still open."""
    sleeper = "import time; time.sleep(60)"
    child = f"import subprocess, sys, time; command = [sys.executable, '-c', '{sleeper}']\n"
    child += "print(subprocess.Popen(command, start_new_session=True).pid, 'on', flush=True); time.sleep(60)"
    started = time.monotonic()
    code, output = nvidia.run([sys.executable, "-c", child], started + 2)
    assert code is None and output.endswith(" on\n") and time.monotonic() - started < 20
    # A signal takes a moment to be obeyed.
    while alive(output.split()[0]):
        assert time.monotonic() - started < 20
        time.sleep(0.01)


@pytest.mark.parametrize("hazards, warnings, code", [(0, 0, 0), (0, 3, 0), (2, 0, 1)])
def test_test_stage_writes_what_the_sanitizers_found(monkeypatch, tmp_path, hazards, warnings, code):
    passed = {"passed": 3, "failed": 0, "skipped": 0, "ok": True}
    found = RACECHECK.format(hazards + warnings, hazards, warnings)
    outputs = {"memcheck": (0, MEMCHECK.format(0)), "racecheck": (99 * (hazards + warnings > 0), found)}
    monkeypatch.setattr(gpu, "run_gpu_tests", lambda deadline, path: passed)
    monkeypatch.setattr(nvidia, "find", lambda tool: f"/cuda/{tool}")
    # Before and after the tool's run there are others, without it and of an overrun that it must see.
    monkeypatch.setattr(
        nvidia,
        "run",
        lambda command, deadline, **variables: (
            outputs[command[2]] if command[2] in outputs and "overrun" not in command[-1] else (0, "=   at step_kernel")
        ),
    )
    assert gpu.main(["--stage", "test", "--device", "cpu", "--out", str(tmp_path)]) == code
    content = json.loads((tmp_path / "test.json").read_text())
    assert [(result["tool"], result["found"]) for result in content["sanitizer"]] == [
        ("memcheck", 0),
        ("racecheck", hazards),
    ]
