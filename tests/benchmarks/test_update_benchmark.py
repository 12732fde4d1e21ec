"""The GPU benchmark's bench and test stages: bench whole on the CPU, and the output of NVIDIA's tools as recorded."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import nvidia
from benchmarks.gpu import stages as gpu
from benchmarks.step import apart as steps
from benchmarks.step import goals, update
from benchmarks.step.peers import BF16, FORMATS, PEERS, badam_block, check_compressible

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


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("bench")
    assert gpu.main(["--stage", "bench", "--device", "cpu", "--out", str(out)]) == 0
    return json.loads((out / "bench.json").read_text())


def test_bench_measures_every_peer(content):
    (case,) = content["cases"]
    assert case["tensors"] == 7 and case["elements"] == 7 * 13 * 64
    assert case["copy_gb_per_s"]["median"] > 0
    assert list(case["peers"]) == list(PEERS)
    # Without a GPU the CUDA library cannot run, and says so.
    running = [name for name, peer in case["peers"].items() if "backend='cuda'" not in peer.get("error", "")]
    assert list(content["launches"]) == running and len(running) == len(PEERS) - 3
    for name in running:
        peer = case["peers"][name]
        assert "error" not in peer, (name, peer)
        for key in ("device_us", "host_us", "wall_us", "steady_host_us", "steady_wall_us"):
            assert 0 < peer[key]["p10"] <= peer[key]["median"] <= peer[key]["p90"]
        assert peer["gb_per_s"] == pytest.approx(peer["moved_bytes"] / peer["device_us"]["median"] / 1e3)
        assert peer["extra_bytes"] >= 0
    head, columns, *rows = goals.table(content["cases"]).splitlines()
    assert head.split("  ")[-1].strip() == "steady" and "new gradients and lr" in head
    # Each title ends where its last column does.
    assert [head.index("lr") + 2, len(head)] == [columns.index("wall us") + 7, columns.rindex("wall us") + 7]
    assert len(rows) == len(PEERS) + 1


def test_bench_says_where_it_ran_and_what_is_absent(content):
    assert (
        content["stage"] == "bench"
        and content["commit"]
        and content["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    )
    assert content["cold"]["first_step_s"] > 0 and content["cold"]["variants"] == []
    assert content["dram"] == {"absent": "no CUDA device"}
    assert {"host us", "cold first step s"} & {goal["goal"] for goal in content["goals"]}


def needs(package):
    """Mark a test of a peer that users need not have."""
    missing = importlib.util.find_spec(package) is None and "CI" not in os.environ
    return pytest.mark.skipif(missing, reason=f"needs {package}")


OURS = [name for name in FORMATS if " misa" in name]
TORCHAO = [name for name in FORMATS if " torchao" in name]


def measured(names):
    peers = {name: FORMATS[name] for name in names}
    (case,) = update.measure(update.FORMAT_CASES["cpu"], torch.device("cpu"), math.inf, 1, peers)
    return case["peers"]


def test_formats_say_what_ran_them():
    peers = measured(OURS)
    assert [name for name, peer in peers.items() if "error" in peer] == []
    # What the C++ library lacks.
    slow = {"bf16 misa fp8", "bf16 misa int8+int4"}
    assert {name for name, peer in peers.items() if peer["backend"] == "reference"} >= slow
    assert {peer["backend"] for name, peer in peers.items() if name not in slow} <= {"cpu", "reference"}


@pytest.mark.parametrize("name", OURS)
def test_formats_move_weight_gradient_and_state(name):
    weight = torch.ones(512, 128, dtype=BF16, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optimizer = FORMATS[name].make([weight])
    optimizer.step()
    # A weight that has a master is written, not read.
    moved = (4 if "master" in name else 6) + 2 * optimizer.state_bytes / weight.numel()
    assert FORMATS[name].moved_bytes == pytest.approx(moved, rel=2e-3)


def states(case, names):
    """The optimizers of peers after their warm-up, and the state of their first weight."""
    device = torch.device("cpu")
    ready, errors = update.prepare(case, update.Timer(device), device, {name: FORMATS[name] for name in names})
    assert errors == {}
    return {name: optimizer.state[weights[0]] for name, (_, weights, optimizer) in ready.items()}


@needs("bitsandbytes")
def test_bitsandbytes_updates_in_the_bits_it_is_named_for():
    (case,) = update.FORMAT_CASES["cpu"]
    found = states(case, ["bf16 bnb 8bit", "bf16 bnb 32bit"])
    assert [state[key].dtype for state in found.values() for key in ("state1", "state2")] == [
        torch.uint8,
        torch.uint8,
        torch.float32,
        torch.float32,
    ]


@pytest.mark.slow
@needs("bitsandbytes")
@needs("torchao")
def test_formats_stage_measures_every_format(tmp_path):
    assert gpu.main(["--stage", "formats", "--device", "cpu", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "formats.json").read_text())
    (case,) = content["cases"]
    assert content["stage"] == "formats" and list(case["peers"]) == list(FORMATS)
    # FlashOptim needs a GPU, and the rest is not among what is installed for development.
    failed = {name for name, peer in case["peers"].items() if "error" in peer}
    assert {name.split()[1] for name in failed} <= {"flashoptim", "optimi", "badam", "galore"}
    assert set(content["launches"]) == set(FORMATS) - failed


@pytest.mark.slow
@needs("torchao")
def test_torchao_updates_in_the_bits_it_is_named_for():
    (case,) = update.FORMAT_CASES["cpu"]
    found = states(case, TORCHAO)
    kinds = {name: {type(state[key]).__name__ for key in ("exp_avg", "exp_avg_sq")} for name, state in found.items()}
    assert kinds == {
        "bf16 torchao 8bit": {"OptimState8bit"},
        "bf16 torchao fp8": {"OptimStateFp8"},
        "bf16 torchao 4bit": {"OptimState4bit"},
    }
    assert all(peer["device_us"]["median"] > 0 for peer in measured(TORCHAO).values())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("bf16 bnb 8bit", marks=needs("bitsandbytes")),
        # Its import takes seconds.
        pytest.param("bf16 torchao 8bit", marks=[needs("torchao"), pytest.mark.slow]),
    ],
)
def test_tensors_that_a_package_would_not_compress_are_an_error(name):
    """And no time of what it does instead."""
    (case,) = update.measure([update.Case(6000, 7)], torch.device("cpu"), math.inf, 1, {name: FORMATS[name]})
    assert case["peers"][name]["error"].startswith("ValueError: a tensor has 832 elements, which must be 4096 or more")


def test_every_format_case_is_of_whole_blocks():
    for case in (case for cases in update.FORMAT_CASES.values() for case in cases):
        assert 0.99 * case.elements < case.numel() <= case.elements
        check_compressible([torch.empty(case.shape(), device="meta")], 256)
    with pytest.raises(ValueError, match="4224 elements, .* a multiple of 256"):
        check_compressible([torch.empty(33, 128)], 256)


def test_a_package_that_is_missing_is_listed_with_its_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashoptim", None)
    peers = measured(["bf16 flashoptim", "bf16 fused"])
    assert "flashoptim" in peers["bf16 flashoptim"]["error"] and peers["bf16 flashoptim"].keys() == {"error"}
    assert peers["bf16 fused"]["wall_us"]["median"] > 0


def test_time_limit_leaves_out_cases():
    cases = [update.Case(6000, 7), update.Case(60_000, 60)]
    left = list(update.measure(cases, torch.device("cpu"), time.monotonic() - 1, repeats=2))
    assert [case["left_out"] for case in left] == ["time limit"] * 2
    assert "left out: time limit" in goals.table(left)


def test_a_peer_without_memory_is_left_out_and_the_others_stay():
    def too_large(weights):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    peers = {name: PEERS[name] for name in ("fp32 fused", "fp32 fused+clip")}
    peers["bf16 foreach"] = update.Peer(torch.bfloat16, 40, too_large)
    (case,) = update.measure([update.Case(600, 2)], torch.device("cpu"), math.inf, 2, peers)
    assert case["peers"]["bf16 foreach"] == {"error": "OutOfMemoryError: CUDA out of memory."}
    assert case["peers"]["fp32 fused+clip"]["device_us"]["median"] > 0


def test_a_step_that_finds_no_memory_once_all_peers_are_there_is_left_out_alone():
    class Late(torch.optim.SGD):
        steps = 0

        def step(self):
            self.steps += 1
            if self.steps > update.WARM_UP:
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    peers = {"late": update.Peer(torch.float32, 8, Late), "fp32 fused": PEERS["fp32 fused"]}
    (case,) = update.measure([update.Case(600, 2)], torch.device("cpu"), math.inf, 2, peers)
    assert case["peers"]["late"] == {"error": "OutOfMemoryError: CUDA out of memory."}
    assert case["peers"]["fp32 fused"]["device_us"]["median"] > 0


def test_every_timed_step_but_a_steady_one_has_gradients_and_a_learning_rate_of_its_own():
    """Or there would be nothing to upload, and the figures would be too good."""
    seen = []

    class Seeing(torch.optim.SGD):
        def step(self):
            grads = [param.grad for param in self.param_groups[0]["params"]]
            seen.append((tuple(grad.data_ptr() for grad in grads), self.param_groups[0]["lr"]))

    peers = {"seeing": update.Peer(torch.float32, 8, lambda weights: Seeing(weights, lr=1e-4))}
    (case,) = update.measure([update.Matrices({(16, 32): 2, (8, 8): 1})], torch.device("cpu"), math.inf, 3, peers)
    assert (case["elements"], case["tensors"]) == (1088, 3)
    # Three a turn, after the warm-up and before the step whose memory is counted; the third is steady.
    timed = seen[update.WARM_UP - 1 : -1]
    changed = [(a[0] != b[0], a[1] != b[1]) for a, b in itertools.pairwise(timed)]
    assert changed == [(True, True), (True, True), (False, False)] * 3


@needs("badam")
@pytest.mark.filterwarnings("ignore")
def test_badam_has_the_gradients_it_was_given_last():
    """Its package takes them away in every step, and steady steps need them."""
    weight = torch.ones(4, 4, requires_grad=True)
    weight.grad = torch.ones(4, 4)
    optimizer = badam_block([weight])
    for _ in range(2):
        weight.grad = gradient = torch.full((4, 4), -1.0)
        optimizer.step()
        assert weight.grad is gradient
    assert (weight > 1).all()


def test_every_gpu_case_has_about_its_elements():
    for case in update.CASES["cuda"]:
        assert 0.99 * case.elements < case.numel() <= case.elements


def peer(elements, moved, us, wall_us=None):
    return {
        "device_us": {"median": us},
        "wall_us": {"median": wall_us or us},
        "host_us": {"median": 70.0},
        "moved_bytes": moved * elements,
        "gb_per_s": moved * elements / us / 1e3,
    }


@pytest.mark.parametrize("millions, held", [(16, False), (64, True)])
def test_goals_of_the_formats(millions, held):
    elements = millions * 2**20
    # At 4000 GB/s the 10.125 bytes of 64M elements take 170 microseconds.
    peers = {
        "bf16 misa int8": peer(elements, 10.125, 200.0, 230.0),
        "bf16 misa fp8": peer(elements, 10.25, 900.0),
        "bf16 bnb 8bit": peer(elements, 10.0625, 610.0, 700.0),
        "bf16 torchao 8bit": peer(elements, 10.0625, 590.0, 680.0),
    }
    case = {"elements": elements, "tensors": 16, "copy_gb_per_s": {"median": 4000.0}, "peers": peers}
    found = {(line["goal"], line["where"].split(", ")[-1]): line for line in goals.goals({"cases": [case]})}
    values = {key: (line["value"], line["limit"], line["met"]) for key, line in found.items()}
    expected = {
        ("fraction of copy bandwidth", "bf16 misa int8"): (pytest.approx(0.84934, rel=1e-4), 0.8, True),
        ("speed, 8 bits, device", "bf16 misa int8 / bf16 bnb 8bit"): (pytest.approx(3.05), 3.0, True),
        ("speed, 8 bits, with host", "bf16 misa int8 / bf16 bnb 8bit"): (pytest.approx(3.0435, rel=1e-4), 3.0, True),
        ("speed, 8 bits, device", "bf16 misa int8 / bf16 torchao 8bit"): (pytest.approx(2.95), 3.0, False),
        ("speed, 8 bits, with host", "bf16 misa int8 / bf16 torchao 8bit"): (pytest.approx(2.9565, 1e-4), 3.0, False),
    }
    assert values == (expected if held else {})


def test_goals_of_known_figures():
    elements = 64 * 2**20
    # At 4000 GB/s the 28 bytes take 470 microseconds.
    peers = {"fp32 misa": peer(elements, 28, 500.0), "fp32 fused": peer(elements, 28, 550.0)}
    peers |= {"fp32 misa clip": peer(elements, 32, 560.0), "fp32 fused+clip": peer(elements, 40, 700.0)}
    case = {"elements": elements, "tensors": 60, "copy_gb_per_s": {"median": 4000.0}, "peers": peers}
    dram = {"read_bytes": 700, "written_bytes": 320, "counted_bytes": 1000}
    cold = {"first_step_s": 6.0, "variants": ["collect_kernel", "step_kernel", "step_kernel"]}
    found = goals.goals({"cases": [case], "cold": cold, "dram": dram})
    met = {(line["goal"], line["where"].split(", ")[-1]): (line["value"], line["met"]) for line in found}
    assert met["fraction of copy bandwidth", "fp32 misa"] == (pytest.approx(0.93952, rel=1e-4), True)
    assert met["speed, same bytes, device", "fp32 misa / fp32 fused"] == (pytest.approx(1.1), True)
    assert met["speed, same work, with host", "fp32 misa clip / fp32 fused+clip"] == (pytest.approx(1.25), False)
    assert met["host us", "fp32 misa"] == (70.0, False)
    assert met["cold first step s", "ordinary run"] == (6.0, False)
    assert met["compiled variants", "ordinary run"] == (2, True)
    assert met["DRAM bytes / counted", "bf16 misa"] == (pytest.approx(1.02), True)
    assert "1.25 >= 1.35" in goals.verdict(found)


def test_launches_are_counted_by_kind():
    events = [
        {"ph": "X", "cat": "kernel", "name": "step_kernel", "dur": 12.5},
        {"ph": "X", "cat": "kernel", "name": "step_kernel", "dur": 10.0},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "dur": 3.0},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "Optimizer.step#MISA.step"},
        {"ph": "X", "cat": "cuda_driver", "name": "cuLaunchKernelEx"},
        {"ph": "M", "name": "process_name"},
    ]
    counted = {"kernel": 2, "gpu_memcpy": 1, "gpu_memset": 0, "kernel_us": 22.5, "names": {"step_kernel": 2}}
    assert update.count_launches(events) == counted
    assert goals.launched({"bf16 misa": counted}) == "bf16 misa 2 (22 us)"


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


@pytest.mark.parametrize("peer, counted", [("bf16 misa", 28), ("bf16 misa int8", 10.125), ("bf16 fused", 14)])
def test_the_profiled_run_counts_the_bytes_of_its_peer(peer, counted, capsys):
    assert steps.main(["profile", "--device", "cpu", "--peer", peer]) == 0
    assert json.loads(capsys.readouterr().out) == {"counted_bytes": counted * 60 * 64}


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
