"""The regression gate: what is counted beside what is committed, and that each count sees what it is there to see."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest
import torch
from tables import missing

from benchmarks.gate import counts as gate
from misa_kernels.kernels import native

needs_library = pytest.mark.skipif(native.unusable("cpu") is not None, reason="the library for CPUs was not built")


@pytest.fixture(scope="module")
def content():
    return json.loads(gate.RECORD.read_text())


def held(kind, content):
    """Compare one kind of figure; with other tools than those recorded there is nothing to compare."""
    found, wrong = gate.check(kind, content)
    if wrong is None:
        pytest.skip(f"recorded with {content['tools'].get(kind)}, here {gate.tools()[kind]}")
    assert wrong == []
    return found


@needs_library
def test_instructions_of_the_cpu_step(content):
    if shutil.which("valgrind") is None or shutil.which("g++") is None:
        missing("needs valgrind and g++")
    found = held("instructions", content)
    # A float32 step on 8 elements at a time: three dozen instructions, four loads and three stores among them.
    assert 7 / 8 < found["avx2, fp32"] < 4


@needs_library
def test_calls_operators_and_allocations_of_a_step(content):
    found = held("host", content)
    few = {name: count for name, count in found.items() if str(gate.MANY) not in name}
    assert few == {name: found[name.replace(str(gate.FEW), str(gate.MANY))] for name in few} and len(few) == 8


def test_released_gradients_are_as_recorded(content):
    assert len(held("released", content)) == 8


def test_the_cost_of_released_gradients_is_linear_in_their_number():
    found = gate.released()
    few, many = (
        {name.partition(", ")[2]: count for name, count in found.items() if name.startswith(f"{layers} layers")}
        for layers in gate.RELEASED
    )
    # What an iteration has once makes a layer of fewer dearer.
    assert [name for name, count in many.items() if count > few[name]] == []


@pytest.mark.slow
def test_launches_of_a_step_on_a_gpu(content):
    found = held("launches", content)
    assert found["bf16, launches"] == 1 and found["fp32 and bf16 clipped, launches"] == 4


def test_every_variant_of_the_gpu_step_is_in_the_record(content):
    pytest.importorskip("triton")
    names = {name.rpartition(", ")[0] for name in content["figures"]["machine code"]}
    assert names == {f"sm_{gate.CAPABILITY}, {variant}" for variant in gate.variants()}


@pytest.mark.slow
def test_machine_code_of_the_gpu_step(content):
    found = held("machine code", content)
    assert all(count == 0 for name, count in found.items() if name.endswith("spills"))


@pytest.mark.parametrize(
    "kind, recorded, found, sentences",
    [
        ("instructions", 100.0, 102.0, 0),
        ("instructions", 100.0, 102.1, 1),
        ("machine code", 0.0, 1.0, 1),
        ("host", 58.0, 59.0, 1),
        ("host", 58.0, 58.0, 0),
        ("host", 58.0, 40.0, 0),
    ],
)
def test_what_grows_beyond_its_tolerance_is_said(kind, recorded, found, sentences):
    wrong = list(gate.compare(kind, {"some": found}, {"some": recorded}))
    assert len(wrong) == sentences
    assert all(f"some grew from {recorded:.4g} to {found:.4g}" in sentence for sentence in wrong)


def test_a_figure_that_only_one_side_has_is_said():
    assert "is new" in next(gate.compare("host", {"some": 1.0}, {}))
    assert "is not measured any more" in next(gate.compare("host", {}, {"some": 1.0}))


def test_a_call_and_an_allocation_are_counted():
    def step():
        return torch.ones(5), len("x")

    calls, more = Counter(), Counter()
    gate.counted(step, calls)
    gate.counted(lambda: step(), more)
    assert more["call"] == calls["call"] + 1 and calls["c_call"] >= 2
    assert gate.allocated_bytes(step) == 20 and gate.allocated_bytes(lambda: None) == 0
    with gate.Operators() as operators:
        step()
    assert operators.count == 1


def test_bytecodes_see_the_loop_that_calls_do_not():
    def looped(length):
        def step():
            return [number for number in range(length)]

        calls = Counter()
        gate.counted(step, calls)
        return calls["call"], gate.bytecodes(step)

    (few_calls, few), (many_calls, many) = looped(100), looped(1000)
    assert few_calls == many_calls and 900 * 2 <= many - few < 900 * 10
    assert looped(100) == (few_calls, few)


def test_a_kind_that_was_never_recorded_is_not_compared(monkeypatch):
    monkeypatch.setattr(gate, "COUNTS", {"released": lambda: {"some": 1.0}})
    tools = {"released": gate.tools()["released"]}
    assert gate.check("released", {"tools": {}, "figures": {}}) == ({"some": 1.0}, None)
    found, wrong = gate.check("released", {"tools": tools, "figures": {"released": {"some": 0.5}}})
    assert len(wrong) == 1


def test_other_tools_are_not_compared(monkeypatch, capsys, tmp_path, content):
    monkeypatch.setattr(gate, "COUNTS", {"host": lambda: {"some": 2.0}})
    monkeypatch.setattr(gate, "RECORD", tmp_path / "gate.json")
    assert gate.main(["--update"]) == 0 and gate.main([]) == 0
    monkeypatch.setattr(gate, "COUNTS", {"host": lambda: {"some": 3.0}})
    assert gate.main([]) == 1
    assert "some grew from 2 to 3" in capsys.readouterr().out
    monkeypatch.setattr(gate, "tools", lambda: {"host": "another Python"})
    assert gate.main([]) == 0
    assert "here another Python: not compared" in capsys.readouterr().out
