"""How do figures and goals become tables: in Markdown for the page, and the same with aligned columns in a terminal?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

MIB, GIB = 2**20, 2**30


def cells(header: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table in Markdown; the header's columns are separated by bars, and rows are filled up to them."""
    columns = header.count("|") + 1
    filled = ([*row, *[""] * (columns - len(row))] for row in rows)
    return [f"| {header} |", "|---" * columns + "|", *("| " + " | ".join(row) + " |" for row in filled), ""]


def aligned(lines: Iterable[str]) -> str:
    """Return lines of Markdown for a terminal: tables without their rules, with columns one below the other."""
    found: list[str] = []
    for is_table, group in groupby(lines, lambda line: line.startswith("|")):
        if not is_table:
            found += group
            continue
        rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in group if not line.startswith("|---")]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for first, *others in rows:
            right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
            found.append("  ".join([first.ljust(widths[0]), *right]).rstrip())
    return "\n".join(found)


def spread(values: Mapping[str, float] | None, digits: int = 1) -> str:
    """Return mean or median, and p10 to p90."""
    if values is None:
        return ""
    middle = values["mean"] if "mean" in values else values["median"]
    return f"{middle:,.{digits}f} ({values['p10']:,.{digits}f} to {values['p90']:,.{digits}f})"


def goal(name: str, where: str, limit: float, value: float | None, least: bool = False) -> dict[str, Any]:
    """Return what was asked for, where, its limit, the figure measured or None, and whether it is met.

    Args:
        name: What was asked for.
        where: Of what.
        limit: The most that the figure may be.
        value: The figure; None where it was not measured.
        least: Whether the limit is the least instead.
    """
    met = value is not None and (value >= limit if least else value <= limit)
    return {"goal": name, "where": where, "limit": limit, "value": value, "met": met}


def goal_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of goals, for those who want to know what was asked for."""

    def rows() -> Iterator[tuple[str, ...]]:
        for line in found:
            value = "not measured" if line["value"] is None else f"{line['value']:.3g}"
            yield line["goal"], line["where"], f"{line['limit']:g}", value, "met" if line["met"] else "**not met**"

    return cells("goal | where | limit | measured | ", rows()) if found else []
