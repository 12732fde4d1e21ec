"""The CPU benchmark, run whole on tiny tensors: what it measures, what it refuses to time, and its goals."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re

import numpy as np
import pytest
import torch
from tables import missing

from benchmarks.step import cpu
from benchmarks.step.peers import PEERS, Peer
from misa_kernels.kernels import native

needs_library = pytest.mark.skipif(native.unusable("cpu") is not None, reason="the library for CPUs was not built")
CASE = cpu.Case(6400, 5)


@pytest.fixture
def content(tmp_path, monkeypatch):
    # DeepSpeed's and torchao's compile for a minute at their first use, and the rest users need not have.
    packages = ("deepspeed", "torchao", "bnb", "badam", "optimi", "flashoptim", "galore")
    kept = {n: peer for n, peer in cpu.CPU_PEERS.items() if not any(package in n for package in packages)}
    monkeypatch.setattr(cpu, "CPU_PEERS", kept)
    monkeypatch.setattr(cpu, "CASES", {"130M": CASE})
    monkeypatch.setattr(cpu, "HOST_REPEATS", 3)
    threads = torch.get_num_threads()
    assert cpu.main(["--out", str(tmp_path), "--repeats", "3", "--threads", "1"]) == 0
    torch.set_num_threads(threads)
    return json.loads((tmp_path / "cpu.json").read_text())


@needs_library
def test_every_peer_is_measured_beside_ours(content, tmp_path):
    assert content["device"]["threads"] == 1 and content["commit"] and content["instructions"]
    assert [case["elements"] for case in content["cases"]] == [CASE.numel()] * 2
    peers = {name: peer for case in content["cases"] for name, peer in case["peers"].items()}
    assert list(peers) == list(cpu.CPU_PEERS)
    for name, peer in peers.items():
        assert "error" not in peer, (name, peer)
        for key in ("ms", "times_ours"):
            assert 0 < peer[key]["p10"] <= peer[key]["median"] <= peer[key]["p90"]
        assert peer["extra_bytes"] >= 0 and peer["of_copy"] >= 0
        assert peer["gb_per_s"] == pytest.approx(peer["bytes"] * CASE.numel() / peer["ms"]["median"] / 1e6)
    assert (tmp_path / "cpu.png").stat().st_size > 4_000
    for name in ("fp32 misa", "fp32 misa clip", "bf16 misa"):
        assert set(peers[name]["times_ours"].values()) == {1.0}
    for kind in ("host", "host_renewed"):
        assert content[kind]["peers"]["fp32 fused"]["us"]["median"] > 0
    assert len(content["goals"]) == 5
    *_, head, rule, first = cpu.lines(content | {"goals": []})[: -len(content["host"]["peers"])]
    assert rule.startswith("|---") and head.endswith("| µs, new gradients and lr | times MISA's |")
    assert first.count(" to ") == 4


def different(**options):
    return lambda weights: torch.optim.AdamW(weights, **{"lr": cpu.LR, "fused": True} | options)


@needs_library
@pytest.mark.parametrize(
    "dtype, make, before, differs",
    [
        (torch.float32, different(weight_decay=0.0), None, "weights"),
        (torch.float32, different(lr=1.01 * cpu.LR), None, "weights"),
        (torch.float32, different(betas=(0.9, 0.9989)), None, "second moments"),
        (torch.float32, different(), cpu.clip, "second moments"),
        (torch.bfloat16, different(betas=(0.9, 0.99)), None, "second moments"),
    ],
)
def test_what_computes_something_else_is_not_timed(monkeypatch, dtype, make, before, differs):
    ours = "fp32 misa" if dtype == torch.float32 else "bf16 misa"
    monkeypatch.setattr(
        cpu, "CPU_PEERS", {ours: cpu.CPU_PEERS[ours], f"{ours[:4]} other": Peer(dtype, 28, make, before)}
    )
    measured = cpu.measure(CASE, dtype, repeats=2)["peers"]
    assert measured[ours]["ms"]["median"] > 0
    assert measured[f"{ours[:4]} other"]["error"].startswith(f"ArithmeticError: the {differs} are not MISA's")


@needs_library
def test_a_peer_that_cannot_run_is_listed_with_its_error(monkeypatch):
    def absent(weights):
        raise ImportError("No module named 'deepspeed'")

    keep = {name: cpu.CPU_PEERS[name] for name in ("fp32 misa", "fp32 fused")}
    monkeypatch.setattr(cpu, "CPU_PEERS", keep | {"fp32 deepspeed+norm": Peer(torch.float32, 32, absent)})
    case = cpu.measure(CASE, torch.float32, repeats=2)
    host = {"tensors": 300, "elements": 4800, "peers": {"fp32 fused": {"times_ours": {"median": 5.5}}}}
    slow = {"tensors": 300, "elements": 4800, "peers": {"fp32 fused": {"times_ours": {"median": 4.5}}}}
    found = cpu.goals({"cases": [case], "host": host, "host_renewed": slow})
    by_goal = {line["goal"]: line for line in found}
    shown = "\n".join(cpu.lines({"cases": [case], "host": host | {"peers": {}}, "host_renewed": slow, "goals": found}))
    assert "| fp32 deepspeed+norm | ImportError: No module named 'deepspeed' |" in shown
    missed = by_goal["fp32 deepspeed+norm / fp32 misa"]
    assert missed["value"] is None and not missed["met"]
    assert re.search(r"\| fp32 deepspeed\+norm / fp32 misa \| .* \| 1.5 \| not measured \| \*\*not met\*\* \|", shown)
    assert [(line["where"].split(", ")[1], line["value"], line["met"]) for line in found[-2:]] == [
        ("steady", 5.5, True),
        ("new gradients and lr", 4.5, False),
    ]


def test_goals_of_known_figures():
    peers = {name: {"times_ours": {"median": 1.5}} for name in cpu.GOALS}
    cases = [{"tensors": 4, "elements": 64 * 2**20, "peers": peers}]
    host = {"tensors": 300, "elements": 4800, "peers": {"fp32 fused": {"times_ours": {"median": 4.9}}}}
    hosts = dict.fromkeys(cpu.HOST_KINDS, host)
    met = {line["goal"]: line["met"] for line in cpu.goals({"cases": cases, **hosts})[:-2]}
    assert met == {
        "fp32 fused+norm / fp32 misa": False,
        "fp32 fused+clip / fp32 misa clip": True,
        "fp32 fused / fp32 misa": True,
        "fp32 deepspeed+norm / fp32 misa": True,
    }
    assert not cpu.goals({"cases": [], **hosts})[0]["met"]


PACKAGES = {
    "bitsandbytes": ("fp32 bnb 32bit", "fp32 bnb 8bit", "bf16 bnb 8bit"),
    "badam": ("fp32 badam", "bf16 badam"),
    "optimi": ("fp32 optimi", "bf16 optimi"),
    "galore_torch": ("fp32 galore", "bf16 galore"),
    "torchao": ("fp32 torchao fp8",),
}


@needs_library
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "package", [pytest.param(name, marks=pytest.mark.slow if name == "torchao" else ()) for name in PACKAGES]
)
def test_other_packages_do_the_same_as_ours(package, monkeypatch):
    if importlib.util.find_spec(package) is None:
        missing(f"needs {package}")
    peers = cpu.CPU_PEERS
    for name in PACKAGES[package]:
        kept = {n: peers[n] for n in (cpu.counterpart(name), name)}
        monkeypatch.setattr(cpu, "CPU_PEERS", kept)
        peer = cpu.measure(cpu.Case(12 * 4096, 3, columns=256), kept[name].dtype, repeats=1)["peers"][name]
        assert "error" not in peer, (name, peer)


@needs_library
def test_an_update_of_another_direction_is_not_timed(monkeypatch):
    """Where moments are kept otherwise the update is what is compared."""

    class Backwards(torch.optim.SGD):
        def step(self):
            for weight in self.param_groups[0]["params"]:
                weight.data += 1e-4 * weight.grad.sign()

    other = Peer(torch.float32, 28, lambda weights: Backwards(weights, lr=1.0))
    monkeypatch.setattr(cpu, "CPU_PEERS", {"fp32 misa": cpu.CPU_PEERS["fp32 misa"], "fp32 other": other})
    case = cpu.Case(256 * 4096, 4, columns=256)
    error = cpu.measure(case, torch.float32, repeats=1)["peers"]["fp32 other"]["error"]
    assert error.startswith("ArithmeticError: the update's cosine to MISA's is -")


def test_sittings_hold_what_the_memory_does_and_always_ours(monkeypatch):
    peers = {name: cpu.CPU_PEERS[name] for name in ("fp32 misa", "fp32 fused", "fp32 fused+clip", "fp32 foreach")}
    assert list(cpu.sittings(CASE, peers)) == [
        ["fp32 misa", "fp32 fused", "fp32 misa clip", "fp32 fused+clip", "fp32 foreach"]
    ]
    monkeypatch.setattr(cpu, "MEMORY_BYTES", 1)
    assert list(cpu.sittings(CASE, peers)) == [
        ["fp32 misa", "fp32 fused"],
        ["fp32 misa clip", "fp32 fused+clip"],
        ["fp32 misa", "fp32 foreach"],
    ]


def test_those_that_would_take_too_long_are_left_out():
    smaller = {
        "elements": 100,
        "tensors": 4,
        "peers": {"fp32 fused": {"prepare_s": 1.0}, "fp32 slow": {"prepare_s": 9}},
    }
    smaller["peers"]["fp32 misa"] = {"prepare_s": 99.0}
    large = cpu.Case(100 * 64 * 10, 10)
    assert cpu.too_slow(large, smaller | {"elements": large.numel() // 10}) == {
        "fp32 slow": {"error": "left out: 3 first steps of 4 tensors took 9.0 s"}
    }


def test_slow_tasks_sit_out_the_turns_beyond_their_time(monkeypatch):
    monkeypatch.setattr("benchmarks.step.update.SECONDS", 0.0)
    times = cpu.take_turns({"slow": lambda: None}, 5)["slow"]
    assert np.isnan(times).tolist() == [False, False, False, True, True]


@needs_library
def test_all_but_steady_steps_have_gradients_and_a_learning_rate_of_their_own(monkeypatch):
    """Or there would be nothing new to tell the kernel, and the host's time would be too good."""
    seen = []

    class Seeing(torch.optim.SGD):
        def step(self):
            grads = [param.grad for param in self.param_groups[0]["params"]]
            seen.append((tuple(grad.data_ptr() for grad in grads), self.param_groups[0]["lr"]))

    other = Peer(torch.float32, 8, lambda weights: Seeing(weights, lr=cpu.LR))
    monkeypatch.setattr(cpu, "CPU_PEERS", {"fp32 misa": cpu.CPU_PEERS["fp32 misa"], "fp32 other": other})
    found = cpu.measure_host(CASE, repeats=3)
    assert all(list(of["peers"]) == ["fp32 misa", "fp32 other"] for of in found.values())
    changed = [(a[0] != b[0], a[1] != b[1]) for a, b in itertools.pairwise(seen[cpu.WARM_UP - 1 :])]
    assert changed == [(False, False)] * 3 + [(True, True)] * 3
    # No address of the one before is another tensor's now.
    assert not set(seen[-1][0]) & set(seen[-2][0])


def test_turns_alternate_their_order():
    order = []
    times = cpu.take_turns({name: lambda name=name: order.append(name) for name in "abc"}, 2)
    assert "".join(order) == "abccba" and all(len(times[name]) == 2 for name in "abc")


def test_every_peer_has_one_of_ours_beside_it():
    assert {cpu.counterpart(name) for name in cpu.CPU_PEERS} <= cpu.CPU_PEERS.keys()
    # Theirs come after ours, with whose weights theirs are compared.
    names = list(cpu.CPU_PEERS)
    assert all(names.index(cpu.counterpart(name)) <= names.index(name) for name in names)
    assert all(cpu.CPU_PEERS[name] is PEERS[name] for name in names if "fused" in name)
