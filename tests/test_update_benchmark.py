"""The GPU benchmark's bench and test stages: bench whole on the CPU, and the output of NVIDIA's tools as recorded."""

from __future__ import annotations

import json
import math
import sys
import time

import pytest
import torch

from benchmarks import goals, gpu, nvidia, update
from benchmarks.peers import PEERS

MEMCHECK = "...\n6 passed in 40.1s\n========= ERROR SUMMARY: {} errors\n"
RACECHECK = "...\n6 passed in 40.1s\n========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)\n"
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
        for key in ("device_us", "host_us", "wall_us"):
            assert 0 < peer[key]["p10"] <= peer[key]["median"] <= peer[key]["p90"]
        assert peer["gb_per_s"] == pytest.approx(peer["moved_bytes"] / peer["device_us"]["median"] / 1e3)
        assert peer["extra_bytes"] >= 0


def test_bench_says_where_it_ran_and_what_is_absent(content):
    assert content["stage"] == "bench" and content["commit"] and content["versions"]["torch"] == torch.__version__
    assert content["cold"]["first_step_s"] > 0 and content["cold"]["variants"] == []
    assert content["dram"] == {"absent": "no CUDA device"}
    assert {"host us", "cold first step s"} & {goal["goal"] for goal in content["goals"]}


def test_time_limit_leaves_out_cases():
    cases = [update.Case(6000, 7), update.Case(60_000, 60)]
    left = list(update.measure(cases, torch.device("cpu"), time.monotonic() - 1, repeats=2))
    assert [case["left_out"] for case in left] == ["time limit"] * 2
    assert "left out: time limit" in goals.table(left)


def test_a_peer_without_memory_is_left_out_and_the_others_stay(monkeypatch):
    def too_large(weights):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    keep = {name: PEERS[name] for name in ("fp32 fused", "fp32 fused+clip")}
    monkeypatch.setattr(update, "PEERS", keep | {"bf16 foreach": update.Peer(torch.bfloat16, 40, too_large)})
    (case,) = update.measure([update.Case(600, 2)], torch.device("cpu"), math.inf, repeats=2)
    assert case["peers"]["bf16 foreach"] == {"error": "OutOfMemoryError: CUDA out of memory."}
    assert case["peers"]["fp32 fused+clip"]["device_us"]["median"] > 0


def test_every_gpu_case_has_about_its_elements():
    for case in update.CASES["cuda"]:
        assert 0.99 * case.elements < case.numel() <= case.elements


def test_goals_of_known_figures():
    def peer(elements, moved, us):
        return {
            **{key: {"median": us} for key in ("device_us", "wall_us")},
            "host_us": {"median": 70.0},
            "moved_bytes": moved * elements,
            "gb_per_s": moved * elements / us / 1e3,
        }

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
        {"ph": "X", "cat": "kernel", "name": "step_kernel"},
        {"ph": "X", "cat": "kernel", "name": "step_kernel"},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD"},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "Optimizer.step#MISA.step"},
        {"ph": "X", "cat": "cuda_driver", "name": "cuLaunchKernelEx"},
        {"ph": "M", "name": "process_name"},
    ]
    counted = {"kernel": 2, "gpu_memcpy": 1, "gpu_memset": 0, "names": {"step_kernel": 2}}
    assert update.count_launches(events) == counted


@pytest.mark.parametrize(
    "code, output, ok, found",
    [
        (0, MEMCHECK.format(0), True, 0),
        (99, MEMCHECK.format(3), False, 3),
        (0, RACECHECK.format(0, 0), True, 0),
        (99, RACECHECK.format(2, 2), False, 2),
        (1, MEMCHECK.format(0).replace("6 passed", "1 failed, 5 passed"), False, 0),
        (5, "no tests ran in 1s\n========= ERROR SUMMARY: 0 errors", False, 0),
        (0, "6 passed", False, 0),
    ],
)
def test_sanitizer_output(code, output, ok, found):
    result = nvidia.judge(code, output)
    assert result["ok"] is ok and result["found"] == found
    assert ("tail" in result) is not ok


@pytest.mark.parametrize("code, output", [(1, "========= Device not supported."), (None, "...")])
def test_a_sanitizer_that_cannot_look_is_absent(code, output):
    result = nvidia.judge(code, output)
    assert result["ok"] is True and "compute-sanitizer" in result["absent"]


def test_missing_tools_are_said_in_a_sentence(monkeypatch):
    monkeypatch.setattr(nvidia, "find", lambda tool: None)
    assert nvidia.sanitize("memcheck", math.inf)["absent"].startswith("compute-sanitizer is neither")
    assert nvidia.dram_bytes(math.inf)["absent"].startswith("ncu is neither")


def test_ncu_output(monkeypatch):
    monkeypatch.setattr(nvidia, "find", lambda tool: "/usr/bin/ncu")
    monkeypatch.setattr(nvidia, "run", lambda command, deadline: (0, NCU))
    expected = {"read_bytes": 1.0738e9, "written_bytes": 8.2e8, "counted_bytes": 1879067392}
    assert nvidia.dram_bytes(math.inf) == expected
    monkeypatch.setattr(nvidia, "run", lambda command, deadline: (9, "==ERROR== LibraryNotLoaded"))
    assert "LibraryNotLoaded" in nvidia.dram_bytes(math.inf)["absent"]


def test_a_tool_is_stopped_with_what_it_started():
    child = "import subprocess, sys; print('on', flush=True); subprocess.run([sys.executable, '-c', 'input()'])"
    started = time.monotonic()
    code, output = nvidia.run([sys.executable, "-c", child + "\nimport time; time.sleep(60)"], started + 1.5)
    assert code is None and output.startswith("on") and time.monotonic() - started < 20


@pytest.mark.parametrize("hazards, code", [(0, 0), (2, 1)])
def test_test_stage_writes_what_the_sanitizers_found(monkeypatch, tmp_path, hazards, code):
    passed = {"passed": 3, "failed": 0, "skipped": 0, "ok": True}
    outputs = {"memcheck": (0, MEMCHECK.format(0)), "racecheck": (99 * (hazards > 0), RACECHECK.format(hazards, 0))}
    monkeypatch.setattr(gpu, "run_gpu_tests", lambda deadline: passed)
    monkeypatch.setattr(nvidia, "find", lambda tool: f"/cuda/{tool}")
    monkeypatch.setattr(nvidia, "run", lambda command, deadline, **variables: outputs[command[2]])
    assert gpu.main(["--stage", "test", "--device", "cpu", "--out", str(tmp_path)]) == code
    content = json.loads((tmp_path / "test.json").read_text())
    assert [(result["tool"], result["found"]) for result in content["sanitizer"]] == [
        ("memcheck", 0),
        ("racecheck", hazards),
    ]
