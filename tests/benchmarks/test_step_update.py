"""The time of the update beside its peers: the stage bench whole on the CPU, its cases, peers and goals."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import sys
import time

import pytest
import torch

from benchmarks.gpu import stages as gpu
from benchmarks.step import apart as steps
from benchmarks.step import goals, update
from benchmarks.step.peers import BF16, FORMATS, PEERS, badam_block, check_compressible


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


@pytest.mark.parametrize("peer, counted", [("bf16 misa", 28), ("bf16 misa int8", 10.125), ("bf16 fused", 14)])
def test_the_profiled_run_counts_the_bytes_of_its_peer(peer, counted, capsys):
    assert steps.main(["profile", "--device", "cpu", "--peer", peer]) == 0
    assert json.loads(capsys.readouterr().out) == {"counted_bytes": counted * 60 * 64}
