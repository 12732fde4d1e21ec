"""A plugin of pytest, `-p benchmarks.gpu.outcomes --outcomes FILE`: a line of JSON for each test, written as it ends.

JUnit's report is written at the very end, and lost where a time limit comes first.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--outcomes", type=Path, required=True)


def pytest_configure(config: pytest.Config) -> None:
    """Write in the process that all workers of pytest-xdist report to."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(config.getoption("outcomes")))


class Outcomes:
    """Writes "test", "outcome" and "seconds" of the phases that decide: the call, and what failed or was skipped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write a line."""
        if report.when == "call" or report.outcome != "passed":
            line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def count(path: Path) -> dict[str, int]:
    """Return how many tests passed, failed and were skipped; one that fails twice counts once."""
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    found: dict[str, str] = {}
    for line in lines:
        # A call may pass, and what cleans up after it fail.
        if found.get(line["test"]) != "failed":
            found[line["test"]] = line["outcome"]
    counts = Counter(found.values())
    return {outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")}
