"""Do the pages hold: every reference, path and command exists, every example runs, every public name is explained?"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import zlib
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch

import misa_kernels
from benchmarks.quality import pretrained_table, regime_table
from benchmarks.quality.pretrained import LONG
from benchmarks.quality.pretrained import TASKS as TEXTS
from benchmarks.quality.regime_runs import TASKS
from misa_kernels.__main__ import COMMANDS, main
from misa_kernels.tools.planner.draws import SLICES
from misa_kernels.tools.planner.methods import Setup, memory
from misa_kernels.tools.planner.shapes import PRESETS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
EVERYWHERE = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "examples").glob("*/README.md"))]
# Where a page may leave out the beginning of a path.
FOLDERS = [
    ROOT,
    *(ROOT / name for name in ("docs", "csrc", "misa_kernels", "misa_kernels/tools", "benchmarks/results")),
    *(
        ROOT / "misa_kernels" / room
        for room in ("run", "draw", "memory", "gradients", "kernels", "outside", "ranks", "rules")
    ),
]
# Modules all of whose public names are for users.
PLANNER = ("shapes", "model", "training", "draws", "methods", "states", "step", "fsdp", "cards")
MODULES = ("tools.plots", *(f"tools.planner.{name}" for name in PLANNER))
names = [str(page.relative_to(ROOT)) for page in EVERYWHERE]


def build(builder: str, out: Path) -> str:
    """Run Sphinx as `make docs` does; return what it said if it failed."""
    if not all(importlib.util.find_spec(name) for name in ("sphinx", "myst_parser", "furo")):
        sentence = "needs sphinx, myst-parser and furo: pip install -e '.[docs]'"
        (pytest.fail if "CI" in os.environ else pytest.skip)(sentence)
    command = [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going", "-b", builder, "docs", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else ""


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs")
    said = build("html", out)
    assert not said, said
    return out


@pytest.fixture(scope="module")
def explained(html: Path) -> set[str]:
    """Full names of all that the API reference holds, read from the inventory that the build leaves."""
    lines = (html / "objects.inv").read_bytes().split(b"\n", 4)[4]
    entries = [line.split(" ") for line in zlib.decompress(lines).decode().splitlines()]
    return {name for name, domain, _, where, *_ in entries if domain.startswith("py:") and where.startswith("api.html")}


@pytest.mark.slow
def test_every_name_that_users_write_is_in_the_api_reference(explained: set[str]) -> None:
    wanted = {f"misa_kernels.{name}" for name in misa_kernels.__all__ if not name.startswith("__")}
    for module in (importlib.import_module(f"misa_kernels.{name}") for name in MODULES):
        own = {name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
        wanted |= {f"{module.__name__}.{name}" for name in own if not name.startswith("_")}
    for path in [*EVERYWHERE, *(ROOT / "examples").rglob("*.py")]:
        for module, imported in re.findall(r"from (misa_kernels[\w.]*) import ([\w, ]+)", path.read_text()):
            wanted |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    assert len(wanted) > 40
    assert not sorted(wanted - explained)


@pytest.mark.slow
def test_every_public_method_of_the_optimizer_is_in_the_api_reference(explained: set[str]) -> None:
    held = {**vars(misa_kernels.interface.Interface), **vars(misa_kernels.MISA)}
    methods = {name for name, value in held.items() if inspect.isfunction(value)}
    own = {name for name in methods | {"backend", "active", "state_bytes"} if not name.startswith("_")}
    assert {"step", "release", "rehearse", "coverage"} <= own
    assert not {f"misa_kernels.MISA.{name}" for name in own} - explained


@pytest.mark.slow
def test_pages_have_no_markup_left(html: Path) -> None:
    for page in html.glob("*.html"):
        if page.stem in ("genindex", "search", "py-modindex"):
            continue
        text = re.sub(r"<(script|style|pre|code).*?</\1>", "", page.read_text(), flags=re.DOTALL)
        text = re.sub(r"<[^>]*>", "", text)
        left = re.findall(r".*(?:\|---|\*\*[a-zA-Z ]+\*\*|```|:\w+:`|\]\(|``).*", text)
        assert not left, f"{page.name}: {left[:3]}"
        assert "problematic" not in page.read_text()


@pytest.mark.slow
def test_examples_of_pages_and_docstrings_run(tmp_path: Path) -> None:
    said = build("doctest", tmp_path)
    assert not said, said
    ran = re.search(r"(\d+) tests\n\s+0 failures in tests", (tmp_path / "output.txt").read_text())
    assert ran and int(ran[1]) > 60


def test_what_the_design_names_is_there() -> None:
    trees = [ast.parse(path.read_text()) for path in (ROOT / "misa_kernels").rglob("*.py")]
    classes = {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}

    def has(name: str, member: str) -> bool:
        node = classes[name]
        own = {part.name for part in ast.walk(node) if isinstance(part, ast.FunctionDef)}
        own |= {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
        own |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
        return member in own or any(has(base, member) for base in bases)

    said = re.findall(r"`([A-Z]\w+)\.(\w+)[(`]", (ROOT / "docs" / "design.md").read_text())
    ours = [(name, member) for name, member in said if name in classes]
    assert len(ours) > 30 and not [pair for pair in ours if not has(*pair)]


def test_what_is_said_of_muon_is_what_the_record_has() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "rules.json").read_text())
    found = {row["where"]: row for row in record["rows"] if row["rule"] == "Muon"}
    assert all(abs(row["lead"]) < 2 * row["error"] and len(row["seeds"]) == 3 for row in found.values())
    said = {where: f"{100 * row['lead']:+.1f} ± {100 * row['error']:.1f}" for where, row in found.items()}
    page = " ".join((ROOT / "docs" / "rules.md").read_text().split())
    assert f"by {said['slices']} % of AdamW's gain under slices and {said['modules']} under modules" in page


@pytest.mark.parametrize("where", ["slices", "modules"])
def test_the_rules_that_are_called_better_are_those_of_the_record(where: str) -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "rules.json").read_text())
    others = [row for row in record["rows"] if row["where"] == where and row["rule"] != "int8 AdamW"]
    assert record["missing"] == 0 and len(others) == 17 and all(len(row["seeds"]) == 3 for row in others)
    better = [
        f"{row['rule']} ({100 * row['lead']:+.1f} ± {100 * row['error']:.1f})"
        for row in others
        if row["lead"] > 2 * row["error"]
    ]
    page = " ".join((ROOT / "docs" / "rules.md").read_text().split())
    said = re.search(rf"Under {where},? (.*?)\.(?= [A-Z])", page)
    assert said is not None and said[1].count(" ± ") == len(better)
    assert all(rule in said[1] for rule in better)


def test_what_is_said_of_4_bits_is_what_the_record_has() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "four_bits.json").read_text())
    page = " ".join((ROOT / "docs" / "neighbours.md").read_text().split())
    assert record["missing"] == 0 and all(len(row["seeds"]) == 3 for row in record["rows"])
    rows = {(row["task"], row["method"]): row for row in record["rows"]}
    for line in record["leads"]:
        assert f"{100 * line['lead']:+.1f} ± {100 * line['error']:.1f}" in page, line
        for name in ("method", "beside"):
            assert f"{100 * rows[line['task'], line[name]]['share']:.1f}" in page, line
    ours, theirs = (rows["German manuals", method] for method in ("slices, 4 bits", "QLoRA"))
    assert f"{ours['peak_bytes'] / 1e6:.0f} MB instead of {theirs['peak_bytes'] / 1e6:.0f}" in page
    assert f"{ours['time'] / theirs['time']:.2f} of its time" in page


def test_what_is_said_of_forward_passes_is_what_the_record_has() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "forward_passes.json").read_text())
    page = " ".join((ROOT / "docs" / "neighbours.md").read_text().split())
    assert record["missing"] == 0 and all(len(row["seeds"]) == 3 for row in record["rows"])
    # As many forward passes with backward as without.
    assert len({row["passes"] for row in record["rows"]}) == 1
    for row in record["rows"]:
        assert f"{row['method'].removesuffix(', backward')} {100 * row['share']:.1f}" in page, row["method"]


def test_the_page_of_slices_shows_what_its_example_prints() -> None:
    page = (ROOT / "docs" / "slices.md").read_text()
    example, shown = re.search(r"```py\n(.*?)```", page, re.DOTALL), re.search(r"^slices: .*$", page, re.MULTILINE)
    assert example is not None and shown is not None
    scope: dict[str, Any] = {}
    exec(example[1], scope)
    assert str(scope["optimizer"]).splitlines()[1] == shown[0]


@pytest.mark.parametrize("page", EVERYWHERE, ids=names)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if not link.startswith("https://")]
    missing = [link for link in links if not (page.parent / link).exists()]
    # In backticks, and after a program that runs a file.
    paths = re.findall(r"`([\w./*-]+\.(?:py|md|json|jsonl|h|cpp|cu|toml|txt|png))`", text)
    paths += re.findall(r"(?:python3?|pytest|torchrun [\w -]*|include\}) ([\w./-]+\.\w+)", text)
    # What a reader has, not the checkout.
    paths = [path for path in paths if path not in ("config.json", "train.py", "memory.png")]
    missing += [path for path in paths if not any((folder / path).exists() for folder in [page.parent, *FOLDERS])]
    assert not missing


@pytest.mark.parametrize("page", EVERYWHERE, ids=names)
def test_commands_exist(page: Path) -> None:
    # A command may be broken where a line of prose is.
    text = re.sub(r"(?<=-m)\n", " ", page.read_text())
    # Those of another commit are not in this one; that those of benchmarks parse is their own tests' business.
    text = re.sub(r"git checkout [0-9a-f]+ && [^`\n]*", "", text)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for module, argument in re.findall(r"python3? (?:-W ignore )?-m ([\w.]+)(?: (\w+))?", text):
        if module == "misa_kernels":
            assert not argument or argument in COMMANDS, f"{module} {argument}"
        else:
            assert importlib.util.find_spec(module), module
    used = set(re.findall(r"`make ([a-z]+)", text)) | set(re.findall(r"^make ([a-z]+)", text, flags=re.MULTILINE))
    assert used <= targets


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_explain_themselves(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"python -m misa_kernels {command}" in capsys.readouterr().out


def test_commands_print_what_the_pages_show(capsys: pytest.CaptureFixture[str]) -> None:
    shown = 0
    for page in PAGES:
        for fence in re.findall(r"^```console\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
            for session in fence.split("$ ")[1:]:
                command, _, expected = session.partition("\n")
                python, m, package, *arguments = shlex.split(command)
                assert (python, m, package) == ("python", "-m", "misa_kernels")
                assert main(arguments) == 0
                # "..." stands for anything, further lines included.
                pattern = re.sub(r"([\[\]?*])", r"[\1]", expected.strip()).replace("...", "*")
                printed = capsys.readouterr().out.strip()
                assert fnmatchcase(printed, pattern), f"{page.name}, {command} prints now:\n{printed}"
                shown += 1
    assert shown >= 4


def test_the_page_of_8b_on_24_gb_shows_what_its_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "8b-on-24gb.md").read_text()
    commands = re.findall(r"^python -m misa_kernels (.*)$", page, re.MULTILINE)
    plans = []
    for command in [*commands, f"{commands[0]} --offload-activations"]:
        assert main([*shlex.split(command), "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    columns, room = [plan["methods"] for plan in plans[:4]], 23 * 2**30
    rows = re.findall(r"^\| ([\w, -]+) \| (\d.*) \|$", page.split("```")[0], re.MULTILINE)
    assert [name for name, _ in rows] == list(columns[0])
    for name, cells in rows:
        peaks = [column[name]["peak"] for column in columns]
        assert cells == " | ".join(f"{peak / 2**30:.2f}" + " fits" * (peak <= room) for peak in peaks)
    # There and back.
    moved = plans[3]["methods"]["AdamW paged"]["paged"], *(plan["methods"]["MISA"]["offloaded"] for plan in plans[3:])
    assert re.findall(r"^\| .* \| (\d+\.\d) \|$", page, re.MULTILINE) == [f"{2 * size / 1e9:.1f}" for size in moved]
    assert f"wants {moved[0] / 2**30:.0f} GiB of host memory" in page
    assert f"have {columns[0]['LISA']['states'] / 2**30:.1f} GiB of states" in page
    # Half a unit in the last place of what is above, against a whole step of the learning rate.
    assert torch.tensor(0.004, dtype=torch.bfloat16) - 1e-5 == torch.tensor(0.004, dtype=torch.bfloat16)
    assert torch.tensor(0.0038, dtype=torch.bfloat16) - 1e-5 != torch.tensor(0.0038, dtype=torch.bfloat16)


def test_slices_fit_up_to_the_delta_that_the_page_of_8b_on_24_gb_gives_for_misa() -> None:
    sessions = (ROOT / "docs" / "8b-on-24gb.md").read_text().split("```console")[1].split("$ ")[1:]
    assert len(sessions) == 4
    for session in sessions:
        offers = {name: f"--{name}" in session for name in ("loss-chunk", "release-gradients", "offload-activations")}
        lean = {"state_dtype": "int8", "param_precision": "split"} if "--state-dtype int8" in session else {}
        options = Setup(
            batch=2,
            loss_chunk=1024 * offers["loss-chunk"],
            release_gradients=offers["release-gradients"],
            offload_activations=offers["offload-activations"],
            **lean,
        )
        (said,) = re.findall(r"--delta (0\.\d+)\.", session)
        inside, beyond = (
            memory(SLICES, PRESETS["llama3-8b"], replace(options, delta=float(said) + more)).peak for more in (0, 1e-4)
        )
        assert inside <= 23 * 2**30 < beyond


def test_the_design_names_every_file() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    sources = [*(ROOT / "misa_kernels").rglob("*.py"), *(ROOT / "csrc").iterdir()]
    missing = [path for path in sources if path.name != "__init__.py" and f"{path.name}`" not in text]
    assert len(sources) > 40
    assert not missing


def test_the_table_of_the_step_is_that_of_the_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())
    text = (ROOT / "docs" / "performance.md").read_text()
    rows = {
        "MISA": "fp32 misa",
        "torch fused AdamW, no norms": "fp32 fused",
        "torch fused AdamW + `_foreach_norm`": "fp32 fused+norm",
        "DeepSpeedCPUAdam + `_foreach_norm`": "fp32 deepspeed+norm",
        "BAdam's package (of float32 copies), no norms": "fp32 badam",
        "optimi, no norms": "fp32 optimi",
        "bitsandbytes, 32 bits, no norms": "fp32 bnb 32bit",
        "MISA, int8 moments": "fp32 misa int8",
        "bitsandbytes, 8 bits, no norms": "fp32 bnb 8bit",
        "MISA, clipped": "fp32 misa clip",
        "torch fused AdamW, clipped": "fp32 fused+clip",
        "DeepSpeedCPUAdam, clipped by torch": "fp32 deepspeed+clip",
    }
    cases = [case for case in record["cases"] if "fp32 misa" in case["peers"]]
    assert [case["model"] for case in cases] == ["130M", "1B", "8B"]
    for name, peer in rows.items():
        expected = []
        for case in cases:
            ours = case["peers"][peer]
            ratio = ours["times_ours"]["median"]
            expected += [f"{ours['ms']['median']:.1f}", "1" if ratio == 1 else f"{ratio:.2f}"]
        assert f"| {name} | {' | '.join(expected)} |" in text


def test_shares_of_improvement_are_those_of_the_record() -> None:
    record = (ROOT / "benchmarks" / "results" / "quality.md").read_text()
    text = (ROOT / "docs" / "choosing.md").read_text()
    rows = re.findall(r"^\| gradients (released|held), (\S+) \| (\S+) \| (.*?) \| (\d+) \|$", text, flags=re.MULTILINE)
    assert len(rows) > 4
    for gradients, state, delta, share, seeds in rows:
        method = "MISA" + ", released" * (gradients == "released")
        row = rf"\| {method} \| {re.escape(state)} \| 0{delta} \|.*\| {share} \|.*\| {seeds} \|"
        assert re.search(row, record), row
    record += (ROOT / "benchmarks" / "results" / "regime.md").read_text()
    record += (ROOT / "benchmarks" / "results" / "pretrained.md").read_text()
    assert set(re.findall(r"\d+\.\d ± \d\.\d", text)) <= set(re.findall(r"\d+\.\d ± \d\.\d", record))


def test_the_tables_of_small_deltas_are_those_of_the_record() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "regime.json").read_text())["rows"]
    text = (ROOT / "docs" / "choosing.md").read_text()
    table = r"^\| (.+), δ = (\.\d+), T = (\d+) \| (.*?) \| (.*?) \|$"
    for task, part in zip(TASKS, text.split("**Pre-training"), strict=True):
        chosen = re.findall(table, part, flags=re.MULTILINE)
        assert len(chosen) > 4
        for method, delta, rounds, share, time in chosen:
            (row,) = [
                row
                for row in rows
                if (row["task"], row["state"], row["method"]) == (task, "int8", method)
                and (row["delta"], row["rounds_of"]) == (float(delta), int(rounds))
            ]
            assert share == regime_table.spread(row, "share", 100, 1)
            assert time == f"{row['time']:.2f}"


def test_the_table_that_the_readme_begins_with_is_that_of_the_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "pretrained.json").read_text())
    text = (ROOT / "README.md").read_text()
    assert "\n".join(pretrained_table.in_short(record, "benchmarks/results/pretrained.md")).strip() in text
    said = re.findall(r"\d+\.\d ± \d+\.\d", text.split("## What it buys")[1].split("\n## ")[0].split("\n\n")[-1])
    written = (ROOT / "benchmarks" / "results" / "pretrained.md").read_text()
    assert len(said) == 2 and set(said) <= set(re.findall(r"\+(\d+\.\d ± \d+\.\d)", written))


def test_what_is_said_of_a_quarter_is_what_the_record_has() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "pretrained.json").read_text())
    rows = {(row["task"], row["method"], row["delta"]): row for row in record["rows"]}
    manuals, headers = (
        next(line for line in record["leads"][task] if (line["method"], line["delta"]) == ("LoRA", 0.25))
        for task in TEXTS
    )
    # Level, and ahead.
    assert abs(manuals["lead"]) < manuals["error"] and headers["lead"] < -2 * headers["error"]
    ahead = f"{-100 * headers['lead']:.1f}"
    assert ahead == "2.5"
    for delta in pretrained_table.SHORT:
        for task in TEXTS:
            slices, lora = (rows[task, method, delta] for method in ("slices", "LoRA"))
            # Above the LoRA of the down projections alone.
            assert lora["share"] >= rows[task, "LoRA, down", delta]["share"]
            assert slices["forgetting"] < lora["forgetting"] and slices["peak_bytes"] < lora["peak_bytes"]
            assert round(lora["time"] / slices["time"], 1) == 1.1
            if delta == 0.25:
                assert round(lora["forgetting"] / slices["forgetting"]) == 2
    shares = {
        method: [100 * rows[task, method, 0.03]["share"] for task in TEXTS] for method in ("BAdam", "LISA", "MISA")
    }
    bytes_of = {method: rows[TEXTS[0], method, 0.03]["training_bytes"] for method in (*shares, "slices")}
    more = [f"{bytes_of[method] / bytes_of['slices']:.1f}" for method in ("BAdam", "LISA")]
    least, most = (f"{limit(shares['BAdam'] + shares['LISA']):.0f}" for limit in (min, max))
    assert float(most) < min(shares["MISA"])
    own, slow = rows[TEXTS[0], "slices", 0.03], ("DoRA", "GaLore")
    times = " and ".join(f"{rows[TEXTS[0], method, 0.03]['time'] / own['time']:.1f}" for method in slow)
    reached = [" and ".join(f"{100 * rows[task, method, 0.03]['share']:.0f}" for method in slow) for task in TEXTS]
    sentence = f"reach {reached[0]} on manuals and {reached[1]} on headers, in {times} times the time of slices"
    assert sentence in " ".join((ROOT / "README.md").read_text().split())
    performance = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    for delta, begin in ((0.03, "in the bytes of .03"), (0.01, "in those of .01")):
        ahead_of = []
        for task in TEXTS:
            found = {line["method"]: line for line in record["leads"][task] if line["delta"] == delta}
            assert {found[method]["seeds"] for method in slow} == {3}
            leads = (f"{100 * found[method]['lead']:.1f} ± {100 * found[method]['error']:.1f}" for method in slow)
            ahead_of.append(" and ".join(leads))
        assert f"{begin} by {ahead_of[0]} points on manuals and {ahead_of[1]} on headers" in performance
    assert f"they take {times} times the time of slices" in performance
    quarter = [
        next(line for line in record["leads"][task] if (line["method"], line["delta"]) == ("GaLore", 0.25))
        for task in TEXTS
    ]
    assert abs(quarter[0]["lead"]) < quarter[0]["error"] and {line["seeds"] for line in quarter} == {3}
    level, behind = (f"{100 * line['lead']:.1f} ± {100 * line['error']:.1f}" for line in quarter)
    longer = f"{rows[TEXTS[0], 'GaLore', 0.25]['time'] / rows[TEXTS[0], 'slices', 0.25]['time']:.1f}"
    sentence = f"ahead of GaLore by {level} points on manuals, which is level, and {behind} on headers"
    assert f"{sentence}, and it takes {longer} times their time" in performance and not record["missing"]
    whole_layers = f"one layer of 30 at a time in {more[0]} and {more[1]} times the bytes of"
    size = f"{rows[TEXTS[0], 'LoRA', 0.25]['size']:.0f}"
    said = {
        "README.md": f"LoRA of rank {size} is level with them on manuals and two and a half points ahead on headers",
        "docs/performance.md": f"LoRA has rank {size}, it is level on manuals and {ahead} points ahead on headers",
        "docs/choosing.md": f"LoRA, of rank {size}, is level with them on manuals and {ahead} points ahead on headers",
    }
    for page, sentence in said.items():
        assert sentence in " ".join((ROOT / page).read_text().split()), page
    for page, bytes_of_what in {"README.md": "3 %", "docs/performance.md": ".03"}.items():
        text = " ".join((ROOT / page).read_text().split())
        assert f"{whole_layers} {bytes_of_what}, reach {least} to {most}" in text, page


def test_what_a_larger_delta_gains_on_real_weights_is_what_the_record_has() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "pretrained.json").read_text())
    share = {(row["task"], row["method"], row["delta"]): 100 * row["share"] for row in record["rows"]}
    gains = [
        round(share[task, method, 0.25] - share[task, method, 0.03]) for method in ("MISA", "slices") for task in TEXTS
    ]
    assert gains == [23, 27, 0, 1]
    text = " ".join((ROOT / "docs" / "choosing.md").read_text().split())
    assert "On SmolLM2 modules gain 23 and 27 points, on manuals and on headers, and slices, which" in text
    assert "which have little left to gain, none and 1." in text


def test_iterations_with_slices_are_those_of_the_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "slices.json").read_text())
    peers = record["shapes"][0]["peers"]
    order = ("lora", "lora_down", "misa", "misa_slices", "adamw")
    speed = [f"{peers[name]['in_rounds_of_50']['tokens_per_second']:,.0f}" for name in order]
    kept = [f"{peers[name]['kept_bytes'] / 1e6:.1f}" for name in order]
    assert (
        f"tokens a second of LoRA on all matrices {speed[0]}, on the down projections {speed[1]}, MISA's modules "
        f"{speed[2]}, slices {speed[3]}, AdamW {speed[4]}; kept for backward {', '.join(kept[:4])} and {kept[4]} MB"
    ) in (ROOT / "README.md").read_text()


def test_what_is_said_of_compiled_slices_is_what_the_record_has() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "slices_compiled.json").read_text())
    speed = {name: peer["in_rounds_of_50"]["tokens_per_second"] for name, peer in record["shapes"][0]["peers"].items()}
    slices, adamw = (f"{speed[f'{name}_compiled'] / speed[name]:.2f}" for name in ("misa_slices", "adamw"))
    sentence = f"train {slices} times as many tokens a second as eager ones, AdamW's {adamw} times (12 layers, one core"
    assert sentence in " ".join((ROOT / "docs" / "slices.md").read_text().split())


def test_what_is_said_of_long_runs_is_what_the_record_has() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "pretrained.json").read_text())
    rows = {row["method"]: row for row in record["rows"] if row["task"] == LONG}
    share = {method: f"{100 * row['share']:.1f}" for method, row in rows.items()}
    forgotten = {method: f"{row['forgetting']:.2f}" for method, row in rows.items()}
    fixed, redrawn, lora = share["slices"], share["slices, redrawn"], share["LoRA"]
    time = f"{rows['slices']['time'] / rows['LoRA']['time']:.2f}".lstrip("0")
    anew, kept = forgotten["slices, redrawn"], forgotten["slices"]
    said = {
        "README.md": f"slices reach {fixed} % of what AdamW gains, four sets in turn {redrawn} and LoRA {lora}; "
        f"there slices forget {kept} nats, more than LoRA's {forgotten['LoRA']}",
        "docs/slices.md": f"a fixed set reaches {fixed} % of what AdamW gains, four sets one after another {redrawn}, "
        f"and forget less, {anew} nats instead of {kept}",
        "docs/performance.md": f"{fixed} % of what AdamW gains beside LoRA's {lora}, in {time} of its time",
        "docs/choosing.md": f"{fixed} % of what AdamW gains beside LoRA's {lora} on German manuals",
    }
    for page, sentence in said.items():
        assert sentence in " ".join((ROOT / page).read_text().split()), page


def test_methods_are_compared_on_a_small_model_as_the_record_does() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "regime.json").read_text())
    rows = {
        (row["method"], row["delta"]): row
        for row in record["rows"]
        if (row["task"], row["state"], row["inner_steps"]) == ("fine-tuning", "int8", 0)
    }
    lines = re.findall(
        r"^\| (slices|LoRA|LoRA, down|MISA) \| (.+) \| ([\d.]+) \|$",
        (ROOT / "docs" / "choosing.md").read_text(),
        re.MULTILINE,
    )
    assert len(lines) == 4
    for method, cells, time in lines:
        for delta, cell in zip((0.01, 0.03, 0.05, 0.25), cells.split(" | "), strict=True):
            row = rows.get((method, delta))
            assert cell == ("does not fit" if row is None else regime_table.spread(row, "share", 100, 1))
        assert time == f"{rows[method, 0.03]['time']:.2f}"


def test_best_rates_over_adamws_are_those_of_the_records() -> None:
    def over_adamw(record: str, task: str, method: str, delta: float) -> str:
        tried = json.loads((ROOT / "benchmarks" / "results" / f"{record}.json").read_text())["tuning"]
        best = {
            (search["method"], search["delta"]): pretrained_table.least(search["losses"])
            for search in tried
            if search["task"] == task and not search["inner_steps"]
        }
        return f"{best[method, delta] / best['AdamW', 1.0]:.2g}"

    small = [over_adamw("regime", task, "slices", delta) for task in TASKS for delta in (0.03, 0.25)]
    assert small == ["8.9", "3", "3.8", "1.4"]
    real = [over_adamw("pretrained", task, "MISA", delta) for delta in (0.03, 0.01) for task in TEXTS]
    assert real == ["8.8", "9.3", "13", "16"]
    text = " ".join((ROOT / "docs" / "choosing.md").read_text().split())
    assert "slices were 9 times AdamW's at δ = .03 and 3 times at .25 in fine-tuning, 3.8 and 1.4 times in pre" in text
    assert "on SmolLM2 9 times it was best at δ = .03, and 13 and 16 times at .01" in text


def test_the_leads_of_slices_are_those_of_the_record() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "regime.json").read_text())["leads"]
    known = {
        (line["delta"], line["method"]): f"{100 * line['lead']:.1f} ± {100 * line['error']:.1f}" for line in record
    }
    fits = {(line["delta"], line["method"]) for line in record if line["bytes"] < 1.05}
    table = (ROOT / "docs" / "choosing.md").read_text().split("| δ | LoRA, all matrices |")[1].split("\n\n")[0]
    lines = re.findall(r"^\| (\.\d+) \| (.*) \|$", table, re.MULTILINE)
    assert [float(delta) for delta, _ in lines] == sorted({delta for delta, _ in fits})
    for delta, cells in lines:
        for method, cell in zip(("LoRA", "LoRA, down", "DoRA", "GaLore", "MISA"), cells.split(" | "), strict=True):
            key = float(delta), method
            assert cell.strip() == (known[key] if key in fits else "")


def test_tables_of_choices_are_those_of_their_runs(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("choices", ROOT / "docs" / "choices.py")
    assert spec and spec.loader
    choices = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(choices)
    runs = [json.loads(line) for line in choices.OUT.read_text().splitlines()]
    for name in choices.BASE:
        choices.table(name, runs)
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "choosing.md").read_text()
