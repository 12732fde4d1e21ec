"""The stage `first` of the GPU benchmark: whole on the CPU with tiny sizes, killed in the middle, and its judgement."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import record
from benchmarks.gpu import stages as gpu
from benchmarks.gpu.first import engagement, parity, stage, table, train
from benchmarks.gpu.first import part as part_of_the_stage
from benchmarks.gpu.first.part import MARK, kill_tree
from benchmarks.step.peers import FORMATS, PEERS, SLICES
from benchmarks.train import training_memory
from misa_kernels.memory.storage import Storage

CPU = torch.device("cpu")


def within(seconds=60):
    return time.monotonic() + seconds


def read(out):
    path = out / "first.json"
    return json.loads(path.read_text()) if path.exists() else {"parts": {}}


def wait_until(condition, what, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not come within {seconds} s"
        time.sleep(0.02)


def descendants(pid):
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found


def gone(pids):
    """Whether none runs; what nobody waits for may still be listed, as a zombie."""
    states = (Path(f"/proc/{pid}/stat") for pid in pids)
    return all(not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z" for path in states)


def test_a_kill_in_the_middle_of_a_part_loses_that_part_alone(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage", "first", "--device", "cpu", "--out", str(tmp_path)]
    process = subprocess.Popen([*command, "--parts", "engagement,step"], cwd=record.ROOT)
    wait_until(lambda: read(tmp_path)["parts"].get("step", {}).get("state") == "running", "the second part")
    # The record names a part before its process begins.
    wait_until(lambda: len(descendants(process.pid)) > 1, "its process")
    pids = descendants(process.pid)
    process.kill()
    process.wait()
    parts = read(tmp_path)["parts"]
    assert [part["state"] for part in parts.values()] == ["done", "running"]
    assert parts["engagement"]["step"]["off"] == 0 and parts["engagement"]["copy_gb_per_s"]["median"] > 0
    # What was measuring must not go on: nobody would read it, and the next call would be timed beside it.
    wait_until(lambda: gone(pids), "the end of all processes", 20)


def in_this_process(main):
    """Run a `main`; return what it prints, whatever the capture of pytest sees."""
    with contextlib.redirect_stdout(io.StringIO()) as found:
        assert main() == 0
    return found.getvalue()


def test_the_other_parts_run_to_their_end(tmp_path, capsys, monkeypatch):
    """All in this process, as which each imports torch and peft once more: those above are in their own."""

    def reports(command, until):
        arguments = [argument for argument in command[3:] if argument != "--leashed"]
        assert command[:3] == [sys.executable, "-m", "benchmarks.gpu.first.part"]
        # However slow this machine is.
        arguments[arguments.index("--until") + 1] = str(within(1000))
        yield from filter(
            None, map(stage.read, in_this_process(lambda: part_of_the_stage.main(arguments)).splitlines())
        )
        yield {"state": "done"}

    real = subprocess.run

    def run(command, **options):
        if tuple(command[1:4]) != ("-m", "benchmarks.train", "memory"):
            return real(command, **options)
        printed = in_this_process(lambda: training_memory.main(command[4:]))
        return SimpleNamespace(returncode=0, stdout=printed, stderr="")

    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(stage, "reports", reports)
    monkeypatch.setattr(training_memory.subprocess, "run", run)
    command = ["--stage", "first", "--device", "cpu", "--out", str(tmp_path), "--parts", "step,train,eight,sanitizer"]
    assert gpu.main(command) == 0
    content = read(tmp_path)
    assert content["stage"] == "first" and content["commit"] and content["device"]["type"] == "cpu"
    step, train, eight, sanitizer = content["parts"].values()
    assert {part["state"] for part in content["parts"].values()} == {"done"}
    # Its figures are of steps that nobody has looked at.
    assert set(step["unproven"]) == {name for name in step["cases"][0]["peers"] if " misa" in name}
    for case in step["cases"]:
        running = {name for name, peer in case["peers"].items() if "error" not in peer}
        assert running >= {"bf16 misa", "bf16 misa int8", "fp32 misa clip", "fp32 fused+norm", "bf16 fused+clip"}
    assert step["launches"]["bf16 misa"]["names"] == {}
    goals = table.goals({"step": step})
    assert "host us" in {goal["goal"] for goal in goals}
    assert any("not looked at by parity" in line for line in table.step_lines(step, goals))
    assert list(train["peers"]) == ["adamw", "lora", "misa_slices", "misa", "badam", "lora_down", "misa_window"]
    assert all(peer["tokens_per_second"] > 0 for peer in train["peers"].values())
    assert list(eight["peers"]) == ["misa_slices", "lora", "misa"]
    for peer in eight["peers"].values():
        assert peer["tokens_per_second"] > 0 and peer["planned"]["peak"] > 0 and peer["reserved_bytes"] > 0
    assert sanitizer["absent"] == "no CUDA device"
    printed = capsys.readouterr().out
    assert "tokens/s, misa / adamw, tiny" in printed and "GiB: <= LoRA + 1 GiB, 8B, misa" in printed
    assert {goal["goal"] for goal in content["goals"]} >= {"tokens/s, misa / lora"}


def test_parity_is_a_part_in_which_a_variant_that_kills_its_process_condemns_no_other(monkeypatch):
    """In this process, and two variants in their own; all are checked below."""
    real = subprocess.run

    def run(command, **options):
        dies = "dies" in command
        return real([sys.executable, "-c", "import os; os.abort()"] if dies else command, **options)

    monkeypatch.setattr(parity.subprocess, "run", run)
    monkeypatch.setitem(parity.VARIANTS, "dies", parity.VARIANTS["bf16 misa"])
    monkeypatch.setattr(parity, "FIRST", ("dies", "fp32 misa", "fp32 misa cuda"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    printed = in_this_process(lambda: part_of_the_stage.main(["parity", "--device", "cpu"]))
    *_, found = filter(None, map(stage.read, printed.splitlines()))
    assert list(found["variants"]) == found["wanted"] == ["dies", "fp32 misa"]
    assert found["variants"]["fp32 misa"]["ok"]
    assert found["variants"]["dies"] == {"ok": False, "error": "exit code -6: nothing"}


@pytest.mark.parametrize("name", [name for name in parity.FIRST if "cuda" not in name])
def test_every_variant_is_right_on_a_cpu(name):
    assert parity.check(name, "cpu")["ok"]


def part(code):
    """The command of a part that runs these lines."""
    return [sys.executable, "-c", "import json, subprocess, sys, time\n" + code]


def reported(value):
    return f"print({MARK!r} + json.dumps({value!r}), flush=True)\n"


def test_a_part_that_takes_too_long_is_stopped_with_what_it_started():
    """A tool in a session of its own too, which a signal to the group would miss."""
    child = "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)\n"
    code = child + f"print({MARK!r} + json.dumps({{'pid': p.pid}}), flush=True)\ntime.sleep(60)"
    found = stage.reports(part(code), time.monotonic() + 3)
    pid = next(found)["pid"]
    assert not gone([pid])
    assert [*found] == [{"state": "stopped at its limit", "tail": []}]
    wait_until(lambda: gone([pid]), "the end of the child", 20)


def test_what_is_no_report_is_kept_as_a_line_and_loses_none():
    code = f"print({MARK!r} + '{{bad')\nprint({MARK!r} + 'null')\nsys.stderr.write('no end')\n" + reported({"a": 1})
    found, end = stage.reports(part(code.replace(f"print({MARK!r} + json", f"print('\\n' + {MARK!r} + json")), within())
    assert found == {"a": 1} and end == {"state": "done"}


def test_a_part_that_goes_on_without_its_output_is_stopped():
    started = time.monotonic()
    code = "import os; os.close(1); os.close(2); time.sleep(60)"
    (end,) = stage.reports(part(code), time.monotonic() + 2)
    assert end["state"] == "stopped at its limit" and time.monotonic() - started < 20


def test_the_record_names_the_part_that_runs_before_it_reports(tmp_path, monkeypatch):
    seen = []

    def reports(command, until):
        seen.append(read(tmp_path)["parts"])
        yield {"state": "done", "absent": "nothing"}

    monkeypatch.setattr(stage, "reports", reports)
    assert stage.run(CPU, ("sanitizer",), tmp_path, within()) == 0
    assert seen[0]["sanitizer"]["state"] == "running"


def test_nobody_has_to_read_what_it_prints(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage", "first", "--device", "cpu", "--out", str(tmp_path)]
    process = subprocess.Popen([*command, "--parts", "sanitizer"], cwd=record.ROOT, stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(120) == 0
    assert {part["state"] for part in read(tmp_path)["parts"].values()} == {"done"} and "goals" in read(tmp_path)


def test_a_part_that_prints_without_end_is_stopped():
    *_, end = stage.reports(part("while True: print('x')"), time.monotonic() + 0.5)
    assert end["state"] == "stopped at its limit" and len(end["tail"]) == stage.TAIL


def test_a_part_that_fails_keeps_what_it_had_found_and_says_why():
    code = reported({"first": 1}) + "print('a line')\n" + reported({"first": 1, "second": 2}) + "raise OSError('why')"
    *found, end = stage.reports(part(code), time.monotonic() + 60)
    assert found == [{"first": 1}, {"first": 1, "second": 2}]
    assert end["state"] == "failed with exit code 1"
    assert end["tail"][0] == "a line" and end["tail"][-1] == "OSError: why"


def test_a_failing_part_leaves_the_others_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage, "PARTS", {"train": 60.0, "nothing": 60.0, "sanitizer": 60.0})
    monkeypatch.setitem(table.LINES_OF, "nothing", lambda part, goals: iter(()))
    assert stage.run(CPU, ("sanitizer", "nothing"), tmp_path, time.monotonic() + 60) == 1
    nothing, sanitizer = read(tmp_path)["parts"].values()
    assert nothing["state"] == "failed with exit code 1" and "ModuleNotFoundError" in nothing["tail"][-1]
    assert sanitizer["state"] == "done"
    assert "No module named 'benchmarks.gpu.first.nothing'" in capsys.readouterr().out


def test_nothing_begins_when_the_time_is_up(tmp_path):
    assert stage.run(CPU, ("step", "train"), tmp_path, time.monotonic() + 1) == 0
    states = {name: part["state"] for name, part in read(tmp_path)["parts"].items()}
    assert states == dict.fromkeys(("step", "train"), "left out at the time limit")


def test_a_part_ends_with_whoever_started_it():
    command = [
        sys.executable,
        "-c",
        "from benchmarks.gpu.first.part import end_with_stdin as end; end(); print('went on')",
    ]
    process = subprocess.Popen(command, cwd=record.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.close()
    assert process.wait(60) == -signal.SIGKILL and process.stdout.read() == b""


def test_the_dead_are_no_error():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    kill_tree(process.pid)


def test_parts_are_named_on_the_command_line(capsys):
    assert gpu.parts_of("") == tuple(stage.PARTS)
    assert gpu.parts_of("step,train") == ("step", "train")
    with pytest.raises(SystemExit):
        gpu.main(["--stage", "first", "--parts", "stepp"])
    assert "stepp must be of engagement, parity, step" in capsys.readouterr().err


def test_all_parts_end_within_the_limit():
    """What users are promised, with room for torch's import before and the table after."""
    assert stage.LIMIT_S <= 280 - 15
    # All begin on the slowest day, but the last, which has what the others leave.
    *parts, eight, _ = stage.PARTS.values()
    assert sum(parts) + eight / 2 <= stage.LIMIT_S


@pytest.mark.parametrize("name", parity.VARIANTS)
def test_what_is_looked_at_is_what_is_timed(name):
    variant = parity.VARIANTS[name]
    if variant.sliced:
        weight = torch.ones(32, 16, dtype=variant.dtype)
        weight.grad = torch.ones_like(weight)
        made = SLICES[name].make([weight])
        made.step()
        (wide,) = (row.param for row in made.rows)
        assert SLICES[name].dtype == wide.dtype == variant.dtype and wide.shape == (32, 64)
        # At age 1 the step is lr, whatever the gradient.
        torch.testing.assert_close(wide[:, 16:32].float(), torch.full((32, 16), -0.01), rtol=2**-8, atol=0)
        assert not wide[:, :16].any() and not wide[:, 32:].any()
        return
    peer = (PEERS | FORMATS).get(name)
    if peer is None:
        assert name in ("bf16 misa split", "fp16 misa")
        return
    assert peer.dtype == variant.dtype
    weight = torch.ones(4, 4, dtype=peer.dtype, requires_grad=True)
    if variant.backend == "cuda":
        with pytest.raises(ValueError, match="backend='cuda'"):
            peer.make([weight])
        return
    optimizer = peer.make([weight])
    options = variant.options
    storage = Storage(options.get("state_dtype", "fp32"), options.get("param_precision", "master"))
    # float32 weights need no master, whatever is said.
    assert optimizer._run.storage == storage
    assert optimizer.max_grad_norm == options.get("max_grad_norm")


FAULTS = {
    "decay": lambda group: group.update(weight_decay=0.1001),
    "lr": lambda group: group.update(lr=0.010001),
    "beta1": lambda group: group.update(betas=(0.90001, 0.99)),
    "beta2": lambda group: group.update(betas=(0.9, 0.99001)),
    "eps": lambda group: group.update(eps=1e-5),
}


@pytest.mark.parametrize("name", ["fp32 misa", "bf16 misa", "bf16 misa clip"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_formula_is_found(name, fault, monkeypatch):
    make = parity.make

    def wrong(rows, variant, backend):
        made = make(rows, variant, backend)
        if backend == "auto":
            for group in made.param_groups:
                FAULTS[fault](group)
        return made

    monkeypatch.setattr(parity, "make", wrong)
    assert parity.check(name, "cpu")["ok"] is False


def take_other_step(change):
    """A step after which ours, and nobody else's, is changed."""
    take_step = parity.take_step

    def other(rows, optimizer, step):
        take_step(rows, optimizer, step)
        if optimizer.backend == "cpu" and step == 1:
            change(rows)

    return other


@pytest.mark.parametrize("value", [float("nan"), 3.0])
def test_one_wrong_element_is_found(value, monkeypatch):
    def change(rows):
        with torch.no_grad():
            rows.weights[7][0, 77] = value

    monkeypatch.setattr(parity, "take_step", take_other_step(change))
    found = parity.check("fp32 misa", "cpu")
    assert not found["ok"] and found["wrong"]["theta"] == 2 and found["wrong"]["v"] == 0


def test_one_write_beside_a_row_is_found(monkeypatch):
    def change(rows):
        weight = rows.weights[4]
        weight.detach().as_strided((1,), (1,), weight.storage_offset() + weight.numel()).fill_(1.0)

    monkeypatch.setattr(parity, "take_step", take_other_step(change))
    found = parity.check("fp32 misa", "cpu")
    assert not found["ok"] and found["spoilt"] == 1 and not any(found["wrong"].values())


def test_other_bits_than_the_cpu_librarys_are_found(monkeypatch):
    """Rounding that no error shows."""

    def change(rows):
        with torch.no_grad():
            rows.weights[7][0, 77] = torch.nextafter(rows.weights[7][0, 77], torch.tensor(9.0))

    ours = []
    change_ours = take_other_step(change)

    def once(rows, optimizer, step):
        # The first that steps; the library is asked again for its bits.
        ours[:] = ours or [optimizer]
        (change_ours if optimizer is ours[0] else TAKE_STEP)(rows, optimizer, step)

    monkeypatch.setattr(parity, "take_step", once)
    found = parity.check("fp32 misa", "cpu")
    # The weight alone, for its moments never see it.
    assert found["other_bits"] == 1 and not found["ok"] and not any(found["wrong"].values())


TAKE_STEP = parity.take_step


def test_what_cannot_run_is_said(monkeypatch):
    monkeypatch.setattr(parity, "make", lambda *arguments: 1 / 0)
    assert parity.check("fp32 misa", "cpu") == {"ok": False, "error": "ZeroDivisionError: division by zero"}


def test_engagement_keeps_what_one_look_fails_at(monkeypatch):
    monkeypatch.setattr(engagement, "equals_reference", lambda device: 1 / 0)
    *_, found = engagement.measure(CPU, time.monotonic() + 60, {})
    assert found["step"] == {"error": "ZeroDivisionError: division by zero"}
    assert found["backends"]["bf16 master, int8"] == "cpu" and "needs a CUDA device" in found["backends"]["no triton"]
    assert found["asks"]["step"]["syncs"] is None and found["copy_gb_per_s"]["median"] > 0
    assert not table.sound({"engagement": found | {"state": "done"}})


def test_engagement_finds_a_step_that_is_off(monkeypatch):
    small_run = engagement.small_run

    def other(device, backend):
        optimizer, weights, feed = small_run(device, backend)
        if backend == "auto":
            for group in optimizer.param_groups:
                group["lr"] = 1.1e-2
        return optimizer, weights, feed

    monkeypatch.setattr(engagement, "small_run", other)
    assert engagement.equals_reference(CPU)["off"] > 100


def times(us):
    return {"median": us, "p10": us, "p20": us, "p80": us, "p90": us}


def gpu_record():
    """A record as a GPU may give it on its worst day, every list at its longest."""
    variants = {
        name: {
            "ok": number > 5,
            "times_plain": {"theta": 1.0, "m": 0.9, "v": 2.5 if number <= 5 else 0.8, "norm": 0.1},
            "wrong": {"theta": 0, "m": 0, "v": 7},
            "spoilt": 0,
            "other_bits": 5,
        }
        for number, name in enumerate(parity.FIRST)
    }
    variants["bf16 misa cuda"] = {"ok": False, "error": "ValueError: backend='cuda' " + "x" * 300}
    peers = {
        name: {
            **{key: times(1234.5) for key in ("device_us", "host_us", "wall_us")},
            "host_bound": 3,
            "moved_bytes": 28 * 240 * 2**20,
            "gb_per_s": 2900.0,
            "extra_bytes": 0,
        }
        for name in (*table.STEPPED[63], *table.TORCH)
    }
    cases = [
        {"elements": n * 2**20, "tensors": tensors, "copy_gb_per_s": times(3000.0), "peers": peers}
        for n, tensors in ((32, 7), (240, 13), (4, 4), (1, 60))
    ]
    cases.append({"elements": 2**30, "tensors": 60, "left_out": "memory: " + "x" * 300})
    iteration = {
        **{key: {"mean": 100.0} for key in ("forward_ms", "backward_ms", "optimizer_ms", "switch_ms")},
        **{"tokens_per_second": 50_000.0, "optimizer_share": 0.02, "mfu": 0.4, "backward_depth": {"mean": 16.0}},
        **{"peak_allocated_bytes": 2**35, "peak_reserved_bytes": 2**35},
        "in_rounds_of_50": {"tokens_per_second": 50_000.0, "optimizer_share": 0.02},
    }
    peak = {"reserved_bytes": 21 * 2**30, "allocated_bytes": 20 * 2**30, "planned": {"peak": 19.5 * 2**30}}
    goals = [
        {"peer": "misa", "goal": f"goal {n}", "bytes": 2**34, "limit_bytes": 2**33, "met": False} for n in range(3)
    ]
    asks = {"syncs": 2, "launches": {"kernel": 3, "gpu_memcpy": 1}}
    return {
        "commit": "0123456789abcdef",
        "device": {"name": "NVIDIA H100 80GB HBM3"},
        "versions": {"torch": "2.11.0+cu130", "triton": "3.6.0"},
        "parts": {
            "engagement": {
                "state": "done",
                "backends": {"fp32, fp32": "triton", "bf16 master, fp32": "triton", "fp16 master, fp32": "triton"},
                "step": {"off": 3, "other_sets": 0},
                "asks": {"step": asks, "end_of_round": asks},
                "copy_gb_per_s": times(3000.0),
            },
            "parity": {"state": "failed with exit code 1", "variants": variants, "tail": ["x" * 300]},
            "step": {"state": "done", "cases": cases, "refused": list(parity.FIRST), "unproven": list(parity.FIRST)},
            "train": {
                "state": "stopped at its limit",
                "plan": {"shape": "1b"},
                "peers": dict.fromkeys(train.NAMES, iteration),
                "left_out": ["1b: misa_window, turn 2"] * 5,
                "refused": ["misa"],
            },
            "eight": {
                "state": "done",
                "goals": goals,
                "peers": {
                    "misa_slices": peak | {"tokens_per_second": 9000.0},
                    "misa": peak | {"tokens_per_second": 9000.0},
                    "lora": {"error": "OutOfMemoryError: " + "x" * 300},
                },
            },
            "sanitizer": {"state": "done", "ok": False, "found": 3, "passed": 9},
        },
    }


def test_the_table_has_every_figure_beside_its_goal_in_few_lines():
    content = gpu_record()
    for number, name in enumerate(content["parts"]):
        content["parts"][name] |= {"seconds": 10.0 * number, "limit_s": 60.0}
    content["goals"] = table.goals(content["parts"])
    lines = table.table(content).splitlines()
    assert len(lines) <= table.LINES and max(map(len, lines)) <= 140
    text = "\n".join(lines)
    for figure in (
        "3 <= 0       MISSED elements or draws off the reference",
        "3 <= 1       MISSED kernels of a step",
        "2 <= 0       MISSED waits of a step",
        "2.5 <= 2       MISSED bf16 misa, error / plain PyTorch's",
        "97% >= 92%",
        "1,234* <= 2,709",
        "1,234 <= 60",
        "1 >= 1.45    MISSED tokens/s, misa / adamw, 1b",
        "16 <= 8       MISSED GiB: goal 0, 8B, misa",
        "0.025 <= 0.05    met    planner's peak off the one allocated, 8B, misa",
        "3 found in 9 tests: FAILED",
    ):
        assert figure in text, figure
    assert lines[-1].startswith("goals met: ")


def test_an_unsound_record_is_one_in_which_something_of_ours_failed():
    parts = gpu_record()["parts"]
    assert not table.sound(parts)
    nothing = {name: {"state": "stopped at its limit"} for name in stage.PARTS}
    assert not table.sound(nothing)
    assert table.sound({name: {"state": "left out at the time limit"} for name in stage.PARTS})
    good = {
        "engagement": {"state": "done", "step": {"off": 0, "other_sets": 0}},
        "parity": {
            "state": "stopped at its limit",
            "variants": {"b": parts["parity"]["variants"]["bf16 misa cuda"]},
            "wanted": ["b"],
        },
        "step": {"state": "done", "cases": [{"elements": 1, "peers": {"bf16 bnb 8bit": {"error": "ImportError: no"}}}]},
        "train": {"state": "done", "plan": {"shape": "1b"}, "peers": {"lora": {"error": "ImportError: peft"}}},
        "sanitizer": {"state": "left out at the time limit"},
    }
    assert table.sound(good)
    for name, change in (
        ("engagement", {"step": {"off": 1, "other_sets": 0}}),
        ("engagement", {"asks": {"error": "RuntimeError: no"}}),
        ("parity", {"wanted": ["a", "b"]}),
        ("parity", {"variants": {"b": {"ok": False, "error": "RuntimeError: PTX"}}}),
        ("step", {"cases": [{"elements": 1, "peers": {"bf16 misa": {"error": "RuntimeError: no"}}}]}),
        ("train", {"peers": {"misa": {"error": "RuntimeError: no"}}}),
        ("train", {"peers": {"misa": {"later_error": "RuntimeError: no"}}}),
        ("train", {"state": "stopped at its limit", "peers": {}}),
        # Not to fit is what this part is to refute.
        ("eight", {"state": "done", "peers": {"misa": {"error": "OutOfMemoryError: CUDA out of memory."}}}),
        ("eight", {"state": "done", "peers": {"misa": {"error": "exit code 1"}}}),
        ("sanitizer", {"state": "failed with exit code 1"}),
    ):
        assert not table.sound(good | {name: good.get(name, {}) | change}), (name, change)
