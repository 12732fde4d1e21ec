"""Does another update rule than AdamW reach more in equal bytes, under MISA's modules and under slices?

From the repository's root: `python -m benchmarks.quality run --model small-rules [--workers N]` trains what is missing,
as often as it is started; `python -m benchmarks.quality table --model small-rules` writes benchmarks/results/rules.json
and rules.md. Beside the `train` extra it needs `pip install came-pytorch torchao`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import record
from benchmarks.quality import regime, regime_table
from benchmarks.quality.equal_bytes import parameters
from benchmarks.quality.regime_runs import SCALES, Job
from benchmarks.quality.rules_runs import DELTA, RULES, SEARCHES, WHERE, Rule, split
from benchmarks.quality.searches import outcome, read, run_all
from benchmarks.tables import cells

RESULTS = regime.RESULTS
RUNS = "rules-runs.jsonl"
SCALE = SCALES["5m"]
# Standard errors from which on a difference counts.
ERRORS = 2.0
# Over lr, from which on updates of a state that has just begun are too long for lr to be a step size.
TOO_LONG = 4.0
Runs = Sequence[dict[str, Any]]


def run_missing(workers: int) -> dict[Job, str]:
    """Train what the table wants and has not; return the error of each run that failed."""
    regime.base_weights(SCALE)
    return run_all(SEARCHES, partial(regime.execute, SCALE), RESULTS / RUNS, Job, workers)


def longest_update(rule: Rule) -> float:
    """Return the largest RMS of the first ten updates over lr, of a new state by gradients of normal noise."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(128, 64, generator=generator))
    lengths, lr = [], 1e-3
    optimizer = rule.make([weight], lr)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for _ in range(10):
        before = weight.detach().clone()
        weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        lengths.append((weight.detach() - before).square().mean().sqrt().item() / lr)
    return max(lengths)


def arms(reporting: Runs, tuning: Runs) -> dict[tuple[str, str], Runs]:
    """Return runs at the rates found by rule and what is drawn, each with its share of AdamW's improvement and time.

    int8 AdamW goes by the name of "int8 AdamW".
    """
    ours = {method: where for where, method in WHERE.items()}
    found: dict[tuple[str, str], Runs] = {}
    for key, runs in regime_table.arms_of(tuning, reporting).items():
        method = key[1]
        if method in ours:
            found["int8 AdamW", ours[method]] = runs
        elif split(method) is not None:
            name, _, where = method.rpartition(", ")
            found[name, where] = runs
    return found


def verdict(lead: float, error: float, early: float) -> str:
    """Return in words what was measured.

    Args:
        lead: Share of AdamW's improvement less that of int8 AdamW.
        error: Its standard error.
        early: The longest of the first updates over lr.
    """
    ahead = f"{100 * lead:+.1f} ± {100 * error:.1f}"
    if lead > ERRORS * error:
        return f"better than int8 AdamW here: {ahead}"
    if early > TOO_LONG:
        return f"does not work from zero state, its first updates are {early:.0f} lr: {ahead}"
    if lead < -ERRORS * error:
        return f"no better: {ahead}"
    return f"no better, level: {ahead}"


def summary(tuning: Runs, reporting: Runs) -> list[dict[str, Any]]:
    """Return the rows of the table as plain types: the best of each kind of draw first."""
    found = arms(reporting, tuning)
    rows = []
    for (name, where), runs in found.items():
        key = tuple(runs[0][field] for field in regime_table.KEY)
        row = regime_table.row_of(key, runs) | {"rule": name, "where": where}
        reference = {run["seed"]: run["share"] for run in found.get(("int8 AdamW", where), ())}
        differences = [run["share"] - reference[run["seed"]] for run in runs if run["seed"] in reference]
        if name != "int8 AdamW" and len(differences) > 1:
            early = longest_update(RULES[name])
            error = statistics.stdev(differences) / math.sqrt(len(differences))
            lead = statistics.mean(differences)
            row |= {"lead": lead, "error": error, "early": early, "verdict": verdict(lead, error, early)}
        rows.append(row)
    rows.sort(key=lambda row: (list(WHERE).index(row["where"]), -row["share"]))
    return rows


def table(rows: Runs, where: str) -> list[str]:
    """Return the rules under one kind of draw as a Markdown table."""
    header = "rule | δ | state, bytes a parameter | training kB | lr | share of AdamW's gain, % | time / AdamW's"
    header += " | first updates / lr | verdict, % of AdamW's gain, seeds paired, ± SE"
    lines = []
    for row in rows:
        if row["where"] == where:
            is_ours = row["rule"] == "int8 AdamW"
            held = 2.0625 if is_ours else getattr(RULES[row["rule"]], where)
            lines.append(
                (
                    row["rule"],
                    f"{row['delta']:g}",
                    f"{held:.2f}",
                    f"{row['training_bytes'] / 1e3:,.0f}",
                    f"{row['lr']:g}",
                    regime_table.spread(row, "share", 100, 1),
                    "" if row["time"] is None else f"{row['time']:.2f}",
                    "" if "early" not in row else f"{row['early']:.1f}",
                    "the fused default" if is_ours else row.get("verdict", ""),
                )
            )
    return cells(header, lines)


def markdown(content: Mapping[str, Any]) -> str:
    """Return the tables with what they mean and the losses by learning rate."""
    shape = content["scale"]["shape"]
    found = [
        "# Other update rules in the bytes of int8 AdamW",
        "",
        "```",
        "python -m benchmarks.quality run --model small-rules",
        "python -m benchmarks.quality table --model small-rules",
        "```",
        "",
        f"Fine-tuning as in `benchmarks/results/regime.md`: a byte-level LLaMA of {shape['layers']} layers with 7 "
        f"matrices, {content['scale']['parameters'] / 1e6:.1f} million float32 parameters, from Python to C++ headers, "
        f"{content['scale']['steps']} steps of {content['scale']['batch'] * shape['context']} bytes, on a CPU. "
        "Each rule runs as `MISA(rule=...)`, at the δ at which its states and the gradients take as many bytes as int8 "
        f"AdamW at δ = {DELTA:g}: a rule that keeps less trains more. *Slices* are columns of each down projection, "
        "fixed for the run; *modules* are drawn anew every 5 steps. Learning rates: three, a factor 2 apart, and one "
        "more while the best lies at an end, on a seed and a text of their own. The share is of AdamW's improvement on "
        "text that was neither trained nor tuned on, mean ± standard deviation over 3 seeds; time is CPU time of the "
        "training, one thread. *First updates / lr*: the longest of the first ten updates of a new state, in the mean "
        "square, where gradients are normal noise; AdamW's is 1. In the last column, seeds are paired.",
        "",
        regime_table.ran(content),
        "",
    ]
    for where in WHERE:
        found += [f"### {where.capitalize()}", "", *table(content["rows"], where)]
    found += ["### Losses by learning rate, on the tuning text", ""]
    tried = (
        (
            search["method"],
            f"{search['delta']:g}",
            ", ".join(f"{lr}: {loss:.4f}" for lr, loss in search["losses"].items()),
        )
        for search in content["tuning"]
    )
    return "\n".join([*found, *cells("method | δ | lr: nats", tried)])


def lines(content: Mapping[str, Any]) -> list[str]:
    """Return the tables in Markdown, for the page of all results."""
    found = [line for where in WHERE for line in (f"{where.capitalize()}:", "", *table(content["rows"], where))]
    return [*found, "What the columns mean, and losses by learning rate: [rules.md](results/rules.md).", ""]


def write_tables() -> None:
    """Write rules.json and rules.md from the finished runs."""
    tuning, reporting, missing = outcome(SEARCHES, results := read(RESULTS / RUNS, Job))
    scale = asdict(SCALE) | {"parameters": parameters(regime.new_model(SCALE))}
    content = record.environment(torch.device("cpu")) | {
        "scale": scale,
        "rows": summary(tuning, reporting),
        "tuning": regime_table.searches(tuning),
        "machines": regime_table.machines(tuning, reporting),
        "missing": missing,
    }
    record.write(RESULTS, "rules", content)
    (RESULTS / "rules.md").write_text(markdown(content), encoding="utf-8")
    print(markdown(content))
    print(f"{len(results)} runs, {missing} more wanted; written: {RESULTS}/rules.json, .md")
