"""The CPU benchmark, run whole on tiny tensors: what it measures, what it refuses to time, and its goals."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import cpu
from benchmarks.peers import PEERS, Peer
from misa_kernels.kernels import native

needs_library = pytest.mark.skipif(native.unusable("cpu") is not None, reason="the library for CPUs was not built")
CASE = cpu.Case(6400, 5)


@pytest.fixture
def content(tmp_path, monkeypatch):
    # DeepSpeed's compiles for a minute at its first use.
    monkeypatch.setattr(cpu, "CPU_PEERS", {n: peer for n, peer in cpu.CPU_PEERS.items() if "deepspeed" not in n})
    monkeypatch.setattr(cpu, "CASES", (CASE,))
    monkeypatch.setattr(cpu, "HOST_REPEATS", 3)
    threads = torch.get_num_threads()
    assert cpu.main(["--out", str(tmp_path), "--repeats", "3", "--threads", "1"]) == 0
    torch.set_num_threads(threads)
    return json.loads((tmp_path / "cpu.json").read_text())


@needs_library
def test_every_peer_is_measured_beside_ours(content, capsys):
    assert content["device"]["threads"] == 1 and content["commit"] and content["instructions"]
    assert [case["elements"] for case in content["cases"]] == [CASE.numel()] * 2
    peers = {name: peer for case in content["cases"] for name, peer in case["peers"].items()}
    assert list(peers) == list(cpu.CPU_PEERS)
    for name, peer in peers.items():
        assert "error" not in peer, (name, peer)
        for key in ("ms", "times_ours"):
            assert 0 < peer[key]["p10"] <= peer[key]["median"] <= peer[key]["p90"]
        assert peer["gb_per_s"] == pytest.approx(peer["bytes"] * CASE.numel() / peer["ms"]["median"] / 1e6)
    for name in ("fp32 misa", "fp32 misa clip", "bf16 misa"):
        assert peers[name]["times_ours"] == {"median": 1.0, "p10": 1.0, "p90": 1.0}
    assert content["host"]["peers"]["fp32 fused"]["us"]["median"] > 0
    assert len(content["goals"]) == 4


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
    assert "ImportError: No module named 'deepspeed'" in cpu.table(case)
    host = {"tensors": 300, "elements": 4800, "peers": {"fp32 fused": {"times_ours": {"median": 5.5}}}}
    found = cpu.goals({"cases": [case], "host": host})
    by_goal = {line["goal"]: line for line in found}
    missed = by_goal["fp32 deepspeed+norm / fp32 misa"]
    assert missed["value"] is None and not missed["met"] and "NOT MET" in cpu.verdict(found)
    assert found[-1]["value"] == 5.5 and found[-1]["met"]


def test_goals_of_known_figures():
    peers = {name: {"times_ours": {"median": 1.5}} for name in cpu.GOALS}
    cases = [{"tensors": 4, "elements": 64 * 2**20, "peers": peers}]
    host = {"tensors": 300, "elements": 4800, "peers": {"fp32 fused": {"times_ours": {"median": 4.9}}}}
    met = {line["goal"]: line["met"] for line in cpu.goals({"cases": cases, "host": host})[:-1]}
    assert met == {
        "fp32 fused+norm / fp32 misa": False,
        "fp32 fused+clip / fp32 misa clip": True,
        "fp32 fused / fp32 misa": True,
        "fp32 deepspeed+norm / fp32 misa": True,
    }
    assert not cpu.goals({"cases": [], "host": host})[0]["met"]


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
