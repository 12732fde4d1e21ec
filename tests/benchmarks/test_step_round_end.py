"""The benchmark of rounds' ends, run whole on tiny matrices: who leaves, what is timed, what is counted."""

from __future__ import annotations

import itertools
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from forks import CONTEXT

from benchmarks.gpu import stages as gpu
from benchmarks.step import round_end

pytestmark = pytest.mark.filterwarnings("ignore:MISA samples:UserWarning")
CPU = torch.device("cpu")
ELEMENTS = 4096


def test_cases_are_every_precision_and_state_with_and_without_flush():
    made = {name: round_end.Rounds(name, 2, ELEMENTS, CPU) for name in round_end.CASES}
    for rounds in made.values():
        rounds.times(1, CPU)
        rounds.ready()()
    assert len(made) == 4 * 2 * 2
    for name, rounds in made.items():
        weight = rounds.optimizer.param_groups[0]["params"][rounds.optimizer.active[0]]
        state = rounds.optimizer.state[weight]
        kept = {"bf16 master": "master", "bf16 split": "residual"}.get(name.split(",")[0])
        assert {"master", "residual"} & state.keys() == ({kept} if kept else set()), name
        assert weight.dtype == (torch.float32 if name.startswith("fp32") else torch.bfloat16)
        assert state["exp_avg"].element_size() == (1 if "int8" in name else 4)


def test_all_that_is_active_leaves_and_has_had_its_gradients():
    rounds = round_end.Rounds("bf16 master, fp32 states, flush", 3, ELEMENTS, CPU)
    had = []
    weights = rounds.optimizer.param_groups[0]["params"]
    rounds.optimizer.register_step_pre_hook(
        lambda *_: had.append((list(rounds.optimizer.active), [n for n, w in enumerate(weights) if w.grad is not None]))
    )
    seconds = rounds.times(4, CPU)
    assert {kind: len(of) for kind, of in seconds.items()} == dict.fromkeys(round_end.KINDS, 4)
    assert len(had) == 12 and all(len(active) == 3 and active == graded for active, graded in had)
    sets = [had[first][0] for first in range(0, 12, 3)]
    assert all(had[n][0] == sets[n // 3] for n in range(12))
    assert all(not set(a) & set(b) for a, b in itertools.pairwise(sets))
    # Each round's last step is the one that is called its end.
    assert len(rounds.optimizer.monitor.rounds) == 5


def test_times_are_those_of_the_kind_they_are_named_for():
    rounds = round_end.Rounds("fp32, fp32 states", 1, ELEMENTS, CPU)
    rounds.times(1, CPU)
    step, slow = rounds.optimizer.step, {1: 0.02, 2: 0.05}
    number = itertools.count()

    def slower():
        step()
        until = time.process_time() + slow.get(next(number) % 3, 0.0)
        while time.process_time() < until:
            pass

    rounds.optimizer.step = slower
    first, plain, end = rounds.times(2, CPU).values()
    assert max(first) < 0.02 <= min(plain) <= max(plain) < 0.05 <= min(end)


def counted(extra_at):
    """Return what is counted where a step of each round allocates more."""
    rounds = round_end.Rounds("fp32, fp32 states", 2, ELEMENTS, CPU)
    rounds.times(1, CPU)
    step, number = rounds.optimizer.step, itertools.count()

    def more():
        step()
        if next(number) % 3 == extra_at:
            torch.empty(10**6, dtype=torch.uint8)

    rounds.optimizer.step = more
    return rounds.counts(CPU)


def test_counts_are_of_the_end_alone():
    # In a process of its own: where another test has counted, what lies at an address that was seen then, and is
    # given back now, counts as given back, see `PeakMemory`.
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as fresh:
        nowhere, first, plain, end = fresh.map(counted, (None, 0, 1, 2))
    assert first == nowhere and nowhere["operators"] > 0
    # Half an operator for each of two that leave.
    assert plain == nowhere | {"operators": nowhere["operators"] - 0.5}
    assert end["operators"] == nowhere["operators"] + 0.5
    assert nowhere["extra_bytes"] < 10**6 <= end["extra_bytes"] < 10**6 + nowhere["extra_bytes"]


def test_the_record_has_every_case_and_its_goals(monkeypatch, tmp_path, capsys):
    names = ("bf16 split, fp32 states", "fp32, int8 states, flush")
    monkeypatch.setattr(round_end, "CASES", {name: round_end.CASES[name] for name in names})
    monkeypatch.setattr(round_end.measure, "__defaults__", (2, (ELEMENTS, 4 * ELEMENTS)))
    threads = torch.get_num_threads()
    assert round_end.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    content = json.loads((tmp_path / "round_end.json").read_text())
    assert [case["case"] for case in content["cases"]] == list(names) and content["device"]["threads"] == 1
    for case in content["cases"]:
        assert list(case["ms"]) == list(round_end.KINDS) and case["larger"]["elements"] == 4 * ELEMENTS
        assert case["ratio"]["median"] > 0 and case["operators"] > 0 and case["extra_bytes"] > 0
    assert len(content["goals"]) == 1 + 1 + 2
    assert all(name in capsys.readouterr().out for name in names[:1])


def test_goals_of_known_figures():
    def case(name, ratio, operators, extra, larger_operators, larger_extra):
        return {
            **{"case": name, "active": 8, "elements": 2**20, "ratio": {"median": ratio}},
            **{"operators": operators, "extra_bytes": extra},
            "larger": {"elements": 2**22, "operators": larger_operators, "extra_bytes": larger_extra},
        }

    cases = [
        case("bf16 master", 4.0, 20.0, 4e6, 20.0, 4e6),
        case("bf16 split", 4.1, 20.0, 3e6, 20.0, 3e6),
        # No goal of time, but of the others.
        case("fp32", 9.0, 10.0, 2e6, 11.0, 5e6),
        {"case": "bf16 stochastic", "left_out": "time limit"},
    ]
    found = round_end.goals(cases)
    assert [(line["value"], line["limit"], line["met"]) for line in found] == [
        (4.0, 4.0, True),
        (4.1, 4.0, False),
        (1.1, 1.0, False),
        (4.0, 4.0, True),
        (5.0, 4.0, False),
    ]
    assert [line["where"] for line in found[2:]] == ["fp32: 11", "bf16 master, 8 x 1M", "fp32, 8 x 4M"]
    assert round_end.goals(cases[-1:]) == []


def test_time_and_memory_leave_out_cases(monkeypatch):
    # After each case garbage is collected.
    monkeypatch.setattr(round_end, "CASES", dict(list(round_end.CASES.items())[:2]))
    left = list(round_end.measure(CPU, time.monotonic() - 1, 1))
    assert [case["left_out"] for case in left] == ["time limit"] * len(round_end.CASES)
    assert "left out: time limit" in "\n".join(round_end.lines({"cases": left, "goals": []}))

    def none(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(round_end, "Rounds", none)
    assert {case["left_out"] for case in round_end.measure(CPU, math.inf, 1)} == {"memory: CUDA out of memory."}


def test_the_stage_of_growth_shares_its_time(monkeypatch, tmp_path):
    """And reports what failed."""
    deadlines = {}

    def run(name, code):
        return lambda device, deadline, out: deadlines.update({name: deadline}) or code

    monkeypatch.setattr("benchmarks.step.growth.run", run("growth", 0))
    monkeypatch.setattr("benchmarks.step.round_end.run", run("round_end", 1))
    started = time.monotonic()
    options = ["--stage", "growth", "--device", "cpu", "--time-limit", "100"]
    assert gpu.main([*options, "--out", str(tmp_path)]) == 1
    assert list(deadlines) == ["round_end", "growth"]
    assert deadlines["round_end"] - started == pytest.approx(50, abs=5)
    assert deadlines["growth"] - started == pytest.approx(100, abs=5)
