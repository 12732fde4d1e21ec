"""Does every command of the benchmarks that a page or the Makefile names parse as it stands there?"""

from __future__ import annotations

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from benchmarks import page, record
from benchmarks.gpu import stages

MAKEFILE = record.ROOT / "Makefile"
PAGES = [record.ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
PAGES += sorted((record.ROOT / "docs").glob("*.md"))
# They have no options.
WITHOUT_OPTIONS = ("benchmarks.page", "benchmarks.gpu.wheels", "benchmarks.gpu.nvcc")


def text_of(path: Path) -> str:
    """The text, without commands of another commit, and with the Makefile's variables at their defaults."""
    text = path.read_text().replace("<what failed>", "step")
    if path == MAKEFILE:
        defaults = dict(re.findall(r"^(\w+) [?:]?= ?(.*)$", text, flags=re.MULTILINE))
        return re.sub(r"\$\((\w+)\)", lambda name: defaults.get(name[1], ""), text)
    # A command may be broken where a line of prose is.
    text = re.sub(r"(?<=-m)\n", " ", text)
    return re.sub(r"git checkout [0-9a-f]+ && [^`\n]*", "", text)


def commands_in(text: str) -> set[str]:
    found = re.findall(r"python3? (?:-W ignore )?-m (benchmarks[^`\n&|;#]*)", text)
    return {command.strip() for command in found}


TEXTS = [*map(text_of, [*PAGES, MAKEFILE]), *page.ON_A_CPU.values()]
COMMANDS = sorted(set().union(*map(commands_in, TEXTS)))


class Parsed(Exception):
    """Raised in the place of what a command would do."""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_named_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, *arguments = shlex.split(command)
    if module in WITHOUT_OPTIONS:
        assert importlib.util.find_spec(module) and not arguments
        return
    parse = argparse.ArgumentParser.parse_args

    def parsed(*given: object) -> argparse.Namespace:
        found = parse(*given)
        if "measurement" in found:
            return found
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def test_the_pages_name_what_users_run() -> None:
    wanted = {"page", "gate", "gate --update", "quality run", "quality table", "gpu.wheels", "gpu.codegen"}
    wanted |= {"step launcher --out benchmarks/results", "train memory --out benchmarks/results"}
    assert {f"benchmarks.{command}" for command in wanted} <= set(COMMANDS) and len(COMMANDS) > 20


@pytest.mark.parametrize("path", [*PAGES, MAKEFILE], ids=lambda path: str(path.relative_to(record.ROOT)))
def test_stages_on_a_gpu_that_are_named_parse(path: Path) -> None:
    for command in re.findall(r"make gpu ((?:\w+=(?:'[^']*'|[^\s`'\"]+) ?)+)", text_of(path)):
        given = dict(part.split("=", 1) for part in shlex.split(command))
        options = ["--stage", given.get("STAGE", "first"), "--parts", given.get("PARTS", "")]
        stages.parser().parse_args([*options, *shlex.split(given.get("ARGS", ""))])


def test_modules_that_are_started_by_their_names_are_there() -> None:
    """A stage on a GPU would find out there, and not say so."""
    found: set[str] = set()
    for path in (record.ROOT / "benchmarks").rglob("*.py"):
        found |= set(re.findall(r"\"-[mp]\", \"(benchmarks[\w.]*)\"", path.read_text()))
    assert len(found) > 5 and all(map(importlib.util.find_spec, found))


def test_the_makefile_runs_files_that_are_there() -> None:
    files = re.findall(r"\b(?:tests|benchmarks)/[\w/]+\.py", MAKEFILE.read_text())
    assert len(files) > 5 and all((record.ROOT / file).exists() for file in files)
