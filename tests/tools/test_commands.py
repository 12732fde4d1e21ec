"""`python -m misa_kernels`: what each command prints, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from misa_kernels.__main__ import COMMANDS, main
from misa_kernels.tools.planner.methods import METHODS, Setup, memory
from misa_kernels.tools.planner.shapes import PRESETS, LlamaShape

GIB = 2**30


def refused(capsys: Any, *arguments: str) -> str:
    """Return the one line on stderr of a call that exits with code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    return err


def planned(capsys: Any, *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_can_be_parsed(capsys, monkeypatch, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    examples = [line.strip() for line in text.splitlines() if line.startswith(f"  python -m misa_kernels {command}")]
    assert examples
    module = sys.modules[f"misa_kernels.tools.commands.{command}"]
    ran = []
    monkeypatch.setattr(module, "run", lambda options: ran.append(options) or 0)
    for example in examples:
        words = example.partition("   ")[0].replace('"RTX 4090"', "RTX_4090").split()[3:]
        assert main(words) == 0
    assert len(ran) == len(examples)


def test_commands_are_listed_and_others_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {command} " in text and what in text for command, what in COMMANDS.items())
    assert "`make demo` in a clone of the repository" in text
    assert "a command is missing, one of plan, bench, info" in refused(capsys)
    assert "invalid choice: 'plans'" in refused(capsys, "plans")
    assert "unrecognized arguments: --json" in refused(capsys, "info", "--json")


def test_a_plan_as_text(capsys):
    assert main(["plan", "llama3-8b", "--gpu", "24GB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("llama3-8b, 8.03 billion parameters: 1 x 2048 tokens, bfloat16, with checkpointing, all")
    rows = {method: next(line for line in lines if line.startswith(method.ljust(14))) for method in METHODS}
    for method, row in rows.items():
        plan = memory(method, PRESETS["llama3-8b"], Setup())
        sizes = (plan.weights, plan.gradients, plan.states, plan.activations, plan.peak)
        figures, verdict = row[14:].split()[:5], " ".join(row[14:].split()[5:])
        assert figures == [f"{size / GIB:.2f}" for size in sizes]
        assert verdict == ("fits" if plan.peak <= 23 * GIB else "too large")
    assert lines[-1].startswith("MISA fits, up to --delta 0.05")
    assert not any("\x1b" in line for line in lines)


def test_a_plan_says_what_lies_in_host_memory_and_whose_gradients_are_released(capsys):
    assert main(["plan", "llama3-8b", "--release-gradients", "--offload-activations"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "with checkpointing, activations offloaded, all logits" in lines[0]
    assumed = {line[2:15].strip(): line for line in lines[lines.index(next(x for x in lines if "rows assume" in x)) :]}
    released = {
        "AdamW 8-bit",
        "AdamW paged",
        "AdamW 4-bit",
        "FlashOptim",
        "APOLLO",
        "APOLLO-Mini",
        "MISA",
        "MISA, slices",
        "4-bit slices",
    }
    assert {method for method, line in assumed.items() if "gradients released" in line} == released
    # Two bytes for each parameter but the norms'.
    in_host = 2 * (PRESETS["llama3-8b"].numel - 65 * 4096) / GIB
    assert f"where the GPU is full: {in_host:.2f} GiB there" in assumed["AdamW paged"]
    assert main(["plan", "llama3-8b", "--release-gradients", "--world-size", "2"]) == 0
    apollo = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  APOLLO")]
    assert len(apollo) == 2 and not any("released" in line for line in apollo)


@pytest.mark.parametrize(
    ("terminal", "no_color", "coloured"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_colours_are_for_terminals(capsys, monkeypatch, terminal, no_color, coloured):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    main(["plan", "llama3-8b", "--gpu", "24GB"])
    assert ("\x1b[32mfits\x1b[0m" in capsys.readouterr().out) == (terminal and not no_color)


def test_a_plan_as_json_holds_all_that_it_was_made_from(capsys, tmp_path):
    flags = "--batch 2 --sequence 512 --no-checkpointing --delta 0.1 --depth-window 8 --state-dtype int8"
    content = planned(capsys, "llama3.2-1b", *flags.split(), "--release-gradients", "--loss-chunk", "256")
    options = Setup(**content["options"])
    assert options == Setup(2, 512, "bfloat16", False, 256, 0.1, 8, "int8", "master", True)
    shape = LlamaShape(**content["shape"] | {"biased": tuple(content["shape"]["biased"])})
    assert shape == PRESETS["llama3.2-1b"]
    for method, row in content["methods"].items():
        assert row["peak"] == memory(method, shape, options).peak
        held = row["weights"] + row["states"] + row["peak_gradients"] + row["peak_activations"]
        assert row["peak"] == held and row["fits"] is None


def test_a_method_that_cannot_be_does_not_keep_the_others_from_being_planned(capsys):
    content = planned(capsys, "llama3-8b", "--delta", "0.001")
    assert set(content["methods"]) == set(METHODS) - {"MISA"}
    assert "delta=0.001 must leave room for the largest matrix" in content["errors"]["MISA"]
    assert main(["plan", "llama3-8b", "--delta", "0.001", "--gpu", "24GB"]) == 0
    assert "MISA            delta=0.001 must leave room" in capsys.readouterr().out


def test_fit_plans_with_the_largest_delta(capsys):
    content = planned(capsys, "llama3-8b", "--gpu", "24GB", "--fit")
    assert content["options"]["delta"] == content["largest_delta"] > 0.03
    assert content["methods"]["MISA"]["peak"] <= content["cap_bytes"] == 23 * GIB
    assert planned(capsys, "llama3-70b", "--gpu", "24GB", "--fit")["largest_delta"] is None


def test_a_number_of_parameters_gives_what_depends_on_nothing_else(capsys):
    content = planned(capsys, "--params", "8e9")
    assert content["methods"]["AdamW"] == {"weights": 16e9, "gradients": 16e9, "states": 96e9}
    assert main(["plan", "--params", "8e9"]) == 0
    text = capsys.readouterr().out
    assert "says nothing of activations" in text and "\nLoRA" not in text
    assert content["methods"]["AdamW paged"]["states"] == 8e9 * 2 * 4 / 256
    assert f"AdamW paged has {2 * 8e9 / GIB:.2f} GiB of states in host memory, too." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give either CONFIG or --params, one of the two"),
        ("llama3-8b --params 1e9", "give either CONFIG or --params"),
        ("nowhere", "'nowhere' must be a config.json of transformers"),
        ("llama3-8b --gpu 24", "--gpu='24' must be a size such as 24GB"),
        ("llama3-8b --fit", "--fit needs --gpu"),
        ("--params 1e9 --fit --gpu 24GB", "--params knows no activations"),
        ("--params -1", "'-1' must be a number of parameters"),
        ("--params many", "argument --params"),
        ("llama3-8b --delta 1.5", "'1.5' must be in (0, 1]"),
        ("llama3-8b --batch 0", "'0' must be a whole number above 0"),
        ("llama3-8b --dtype float32 --param-precision split", "--param-precision=split needs --dtype=bfloat16"),
        ("llama3-8b --plot nowhere/memory.png", "No such file or directory"),
    ],
)
def test_arguments_that_cannot_be_planned(capsys, arguments, message):
    assert message in refused(capsys, "plan", *arguments.split())


def test_the_plot_is_a_png_and_names_what_it_needs(capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "memory.png"
    assert main(["plan", "llama3-8b", "--gpu", "24GB", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "--plot needs matplotlib: pip install matplotlib" in refused(
        capsys, "plan", "llama3-8b", "--plot", str(path)
    )


def test_plan_neither_loads_what_is_optional_nor_minds_a_closed_pipe():
    code = """
import os, sys, misa_kernels
assert not [name for name in sys.modules if name.startswith("misa_kernels.tools.") and "backward" not in name]
from misa_kernels.__main__ import main
before = set(sys.modules)
code = main(["plan", "llama3-8b"])
assert not {"transformers", "matplotlib", "tqdm", "peft"} & (set(sys.modules) - before)
sys.exit(code)
"""
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_bench_times_three_steps(capsys):
    assert main(["bench", "--device", "cpu", "--elements", "4e4", "--tensors", "4", "--repeats", "3", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["elements"] == 40_000 and content["torch"] == torch.__version__
    steps = content["steps"]
    assert list(steps) == ["MISA", "AdamW", "AdamW and norms"] and steps["MISA"]["times_misa"] == 1
    for name, moved in (("MISA", 28), ("AdamW and norms", 32)):
        assert steps[name]["gb_per_s"] == pytest.approx(moved * 40_000 / steps[name]["ms"] / 1e6)
    assert main(["bench", "--device", "cpu", "--dtype", "bfloat16", "--elements", "4e4", "--repeats", "1"]) == 0
    assert "bfloat16; cpu" in capsys.readouterr().out


def test_bench_steps_of_one_dtype_do_the_same():
    """Timed against each other can be only what computes the same; after the warm-up, within float32's rounding."""
    from misa_kernels.tools.commands.bench import prepare

    steps, _ = prepare("cpu", torch.float32, 2, 1000)
    misa, adamw = (step.__self__ for step in (steps["MISA"], steps["AdamW"]))
    ours, theirs = (optimizer.param_groups[0] for optimizer in (misa, adamw))
    assert all(ours[name] == theirs[name] for name in ("lr", "betas", "eps", "weight_decay"))
    for a, b in zip(ours["params"], theirs["params"], strict=True):
        assert a.data_ptr() != b.data_ptr()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=3e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--elements 3 --tensors 4", "--elements=3 --tensors=4 --repeats=15 must be numbers above 0"),
        ("--tensors 0", "must be numbers above 0"),
        ("--repeats 0", "--repeats=0 must"),
    ],
)
def test_bench_refuses_what_leaves_nothing_to_time(capsys, arguments, message):
    assert message in refused(capsys, "bench", *arguments.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_bench_needs_the_device_it_is_given(capsys):
    assert "--device=cuda needs a CUDA device" in refused(capsys, "bench", "--device", "cuda")
