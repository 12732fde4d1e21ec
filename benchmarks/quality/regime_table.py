"""What do the runs of the benchmark of small δ say? Shares of AdamW's improvement, times, learning rates, curves."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import charts
from benchmarks.tables import cells, goal, goal_lines

Runs = Sequence[dict[str, Any]]
KEY = ("task", "method", "state", "delta", "inner_steps")
# Of AdamW's improvement, by method and δ, in fine-tuning with int8 states.
GOALS = {
    ("MISA", 0.03): 0.75,
    ("MISA", 0.05): 0.85,
    ("MISA", 0.25): 0.95,
    ("slices", 0.01): 0.69,
    ("slices", 0.03): 0.82,
}
# The best learning rate over AdamW's, at most.
LR_GOAL = 2.0
# At which δ there are curves of other methods than MISA.
CHARTED = (0.03, 0.25)
# Methods that no δ applies to.
WHOLE = ("AdamW", "BAdam", "LISA")


def notes(content: Mapping[str, Any]) -> list[str]:
    """Return what was trained and what the columns mean."""
    scale, on_a_gpu = content["scale"], content["device"]["type"] == "cuda"
    shape, millions = scale["shape"], scale["parameters"] / 1e6
    command = "python -m benchmarks.quality run && python -m benchmarks.quality table"
    where = "in TF32 on a GPU" if on_a_gpu else "on a CPU"
    return [
        "# Quality where δ is small and the model deep",
        "",
        "```",
        "make gpu STAGE=regime" if on_a_gpu else command,
        "```",
        "",
        f"A byte-level LLaMA of {shape['layers']} layers with 7 matrices each, {millions:.1f} million float32 "
        f"parameters, {where}, {scale['steps']} steps of {scale['batch'] * shape['context']:,} bytes. "
        f"*Fine-tuning*: from Python source, {scale['base_steps']} steps of AdamW, to C++ headers. "
        "*Pre-training*: on Python source from random weights; embedding and norms are trained at every step by all "
        "methods, their bytes left out here. LoRA (peft, bitsandbytes' AdamW; *down*: of the down projections alone), "
        "DoRA (peft) and GaLore (`galore-torch`, 8 bits) have the rank that needs as many bytes as MISA at this δ with "
        "int8 states: states, gradients held at once, extra weights. *Slices* (`**slices()`) are columns of each down "
        "projection, fixed for the run; at δ = .25 of more matrices. BAdam is its package and, like LISA, trains a "
        "whole layer in rounds of 16 steps: it cannot do with less. T is what MISA takes by itself unless it is given.",
        "",
        "The share is of AdamW's improvement on text that is neither trained nor tuned on, AdamW having had the same "
        f"batches. Time is {'that of the training' if on_a_gpu else 'CPU time of the training, one thread'}, over the "
        "mean of AdamW's on the same machine. Learning rates: steps of a factor 2, three and one more while the best "
        "lies at an end, on a seed of its own and other validation text; arms without a search take the rate of the "
        "nearest δ. Mean ± standard deviation over seeds, which move batches, draws and adapters. Forgetting is by how "
        "much the loss on held-out Python source rises in fine-tuning; older runs did not measure it. The chart leaves "
        "out variants, and at other δ than .03 and .25 what is not MISA; a point is a mean over the steps since the "
        "one before.",
        "",
        f"Runs by machine: {'; '.join(f'{name}: {runs}' for name, runs in content['machines'].items())}.",
        "",
        *(f"{method}: {why}." for method, why in (content.get("absent", {}) | content.get("failed", {})).items()),
    ]


def arms_of(tuning: Runs, reporting: Runs) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Return runs by what they are called in the table, each with what it reached.

    That is "share" of AdamW's improvement with the same seed, "forgetting", "time" over AdamW's on the same machine,
    and "curve" with such times.

    Args:
        tuning: Runs of the searches for learning rates.
        reporting: Runs at the rates found; those of a seed without AdamW are left out.
    """
    adamw = {(run["task"], run["seed"]): run for run in reporting if run["method"] == "AdamW"}
    # Of all tasks with as many steps: finished runs may come from several machines.
    adamw_s: dict[tuple[str, int], list[float]] = {}
    for run in (*tuning, *reporting):
        if run["method"] == "AdamW":
            adamw_s.setdefault((run["machine"], run["curve"][-1][0]), []).append(run["training_s"])
    arms: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in reporting:
        reference = adamw.get((run["task"], run["seed"]))
        if reference is None:
            continue
        gain = reference["loss_before"] - reference["loss"]
        of_adamw = adamw_s.get((run["machine"], run["curve"][-1][0]))
        whole_s = None if of_adamw is None else statistics.mean(of_adamw)
        more = {
            "share": (run["loss_before"] - run["loss"]) / gain,
            "forgetting": run["source_loss"] - run["source_loss_before"] if "source_loss" in run else None,
            "time": None if whole_s is None else run["training_s"] / whole_s,
            "curve": [] if whole_s is None else [(step, at_s / whole_s, loss) for step, at_s, loss in run["curve"]],
        }
        arms.setdefault(tuple(run[name] for name in KEY), []).append(run | more)
    return arms


def summary(tuning: Runs, reporting: Runs) -> dict[str, Any]:
    """Return rows, goals, searches, curves and the number of runs by machine, as plain types; see `arms_of`."""
    arms = arms_of(tuning, reporting)
    rows = [row_of(key, runs) for key, runs in arms.items()]
    rows.sort(key=lambda row: (row["task"], -row["share"]))
    return {
        "rows": rows,
        "leads": leads(arms),
        "goals": goals(rows),
        "tuning": searches(tuning),
        "curves": curves(arms),
        "machines": machines(tuning, reporting),
    }


def machines(*runs: Runs) -> dict[str, int]:
    """Return the number of runs by machine."""
    return dict(Counter(run["machine"] for own in runs for run in own))


def ran(content: Mapping[str, Any]) -> str:
    """Return in a sentence on which machines runs were made, and how many are missing."""
    by_machine = "; ".join(f"{name}: {runs}" for name, runs in content["machines"].items())
    return f"Runs by machine: {by_machine}. Wanted and missing: {content['missing']}."


def row_of(key: tuple[Any, ...], runs: Runs) -> dict[str, Any]:
    """Return the row of an arm, with means and standard deviations over its seeds."""
    row = dict(zip(KEY, key, strict=True))
    row |= {name: runs[0][name] for name in ("size", "training_bytes", "lr", "rounds_of")}
    row["seeds"] = sorted(run["seed"] for run in runs)
    row["forgetting_seeds"] = sum(run["forgetting"] is not None for run in runs)
    return row | means(runs, "loss", "share", "time", "forgetting")


def means(runs: Runs, *names: str) -> dict[str, Any]:
    """Return mean and standard deviation ("_sd") of each figure over the runs that have it; None of nothing."""
    found: dict[str, Any] = {}
    for name in names:
        values = [run[name] for run in runs if run[name] is not None]
        found[name] = statistics.mean(values) if values else None
        found[name + "_sd"] = statistics.stdev(values) if len(values) > 1 else None
    return found


def leads(arms: Mapping[tuple[Any, ...], Runs], task: str = "fine-tuning") -> list[dict[str, Any]]:
    """Return by how much slices with int8 states are ahead of each other method in a task, at each δ.

    Seeds are paired. A method without runs at this δ is taken at the next larger one that it has, to its favour.
    """
    tuned = [(dict(zip(KEY, key, strict=True)), runs) for key, runs in arms.items() if key[0] == task]

    def by_cost(entry: tuple[dict[str, Any], Runs]) -> tuple[Any, ...]:
        # Among equals the defaults: int8 states, and the rounds that MISA takes by itself.
        return entry[0]["delta"], entry[0]["state"] != "int8", entry[0]["inner_steps"]

    found = []
    for slices, own in tuned:
        if (slices["method"], slices["state"]) != ("slices", "int8"):
            continue
        peers: dict[str, Runs] = {}
        for arm, runs in sorted(tuned, key=by_cost):
            is_as_large = arm["delta"] >= slices["delta"] or arm["method"] in WHOLE
            if is_as_large and arm["method"] not in ("AdamW", "slices") and not arm["method"].startswith("MISA, "):
                peers.setdefault(arm["method"], runs)
        for method, runs in peers.items():
            theirs = {run["seed"]: run["share"] for run in runs}
            differences = [run["share"] - theirs[run["seed"]] for run in own if run["seed"] in theirs]
            if len(differences) > 1:
                found.append(
                    {
                        "delta": slices["delta"],
                        "method": method,
                        "bytes": runs[0]["training_bytes"] / own[0]["training_bytes"],
                        "lead": statistics.mean(differences),
                        "error": statistics.stdev(differences) / len(differences) ** 0.5,
                        "seeds": len(differences),
                    }
                )
    return sorted(found, key=lambda line: (line["delta"], line["lead"]))


def lead_lines(found: Runs, task: str = "fine-tuning") -> list[str]:
    """Return a table of leads under its heading; nothing of none."""
    rows = (
        (
            f"{line['delta']:g}",
            line["method"],
            f"{line['bytes']:.2f}",
            f"{100 * line['lead']:+.1f} ± {100 * line['error']:.1f}",
            str(line["seeds"]),
        )
        for line in found
    )
    header = "δ of slices | beside | its bytes over theirs | slices ahead by, % of AdamW's gain, ± SE | seeds"
    return [f"### Slices beside the others, {task}, seeds paired", "", *cells(header, rows)] if found else []


def goals(rows: Runs) -> list[dict[str, Any]]:
    """Return what was asked for, where, the limit, the figure measured and whether it is met."""
    found = []
    reference = [row["lr"] for row in rows if (row["task"], row["method"]) == ("fine-tuning", "AdamW")]
    for row in rows:
        method, delta = row["method"], row["delta"]
        if (row["task"], row["state"], row["inner_steps"]) != ("fine-tuning", "int8", 0):
            continue
        where = f"{method} int8, δ = {delta:g}"
        if (method, delta) in GOALS:
            limit = GOALS[method, delta]
            found.append(goal("share of AdamW's improvement", where, limit, row["share"], least=True))
        if method == "MISA":
            ratio = row["lr"] / reference[0]
            line = goal("learning rate over AdamW's, from 1/2", where, LR_GOAL, ratio)
            found.append(line | {"met": line["met"] and ratio >= 1 / LR_GOAL})
    return sorted(found, key=lambda line: (line["goal"], line["where"]))


def searches(tuning: Runs) -> list[dict[str, Any]]:
    """Return for each search the loss on the tuning text by learning rate."""
    by_key: dict[tuple[Any, ...], dict[str, float]] = {}
    for run in sorted(tuning, key=lambda run: run["lr"]):
        by_key.setdefault(tuple(run[name] for name in KEY), {})[f"{run['lr']:g}"] = run["tuning_loss"]
    return [dict(zip(KEY, key, strict=True)) | {"losses": losses} for key, losses in by_key.items()]


def curves(arms: Mapping[tuple[Any, ...], Runs]) -> dict[str, dict[str, list[list[float]]]]:
    """Return by task and arm the points (steps, time over AdamW's whole time, training loss), means over seeds.

    MISA has a curve for each δ alone, and others have one at two of them: a chart of all that is in the table could not
    be read.
    """
    found: dict[str, dict[str, list[list[float]]]] = {}
    for key, runs in arms.items():
        arm = dict(zip(KEY, key, strict=True))
        default = (arm["state"], arm["inner_steps"]) == ("int8", 0)
        if arm["method"].startswith("MISA, ") or (arm["method"] in ("MISA", "slices") and not default):
            continue
        if arm["method"] not in ("MISA", *WHOLE) and arm["delta"] not in CHARTED:
            continue
        # Later runs have fewer points.
        most = max(len(run["curve"]) for run in runs)
        points = zip(*(run["curve"] for run in runs if run["curve"] and len(run["curve"]) == most), strict=True)
        means = [[statistics.mean(values) for values in zip(*point, strict=True)] for point in points]
        found.setdefault(key[0], {})[name_of(arm)] = means
    return found


def name_of(row: Mapping[str, Any]) -> str:
    """Return what an arm is called in a chart."""
    if row["method"] in WHOLE:
        return f"{row['method']}"
    rounds = f", T = {row['inner_steps']}" if row["inner_steps"] else ""
    return f"{row['method']} {row['state']}, δ = {row['delta']:g}{rounds}"


def table(rows: Runs) -> list[str]:
    """Return the rows of a task as a Markdown table."""
    header = "method | states | δ, or δ of equal bytes | trained at a time, or rank | T | training kB | lr"
    header += " | share of AdamW's gain, % | time / AdamW's | loss, nats a byte | seeds | forgetting, nats"
    return cells(header, map(cells_of, rows))


def cells_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the table says of an arm."""
    measured = row["forgetting_seeds"]
    return (
        row["method"],
        row["state"],
        "" if row["method"] in WHOLE else f"{row['delta']:g}",
        f"{row['size']:.3g}",
        str(row["rounds_of"] or ""),
        f"{row['training_bytes'] / 1e3:,.0f}",
        f"{row['lr']:g}",
        spread(row, "share", 100, 1),
        "" if row["time"] is None else f"{row['time']:.2f}",
        spread(row, "loss", 1, 3),
        str(len(row["seeds"])),
        spread(row, "forgetting", 1, 3) + (f" (of {measured})" if 0 < measured < len(row["seeds"]) else ""),
    )


def spread(row: Mapping[str, Any], name: str, factor: float, digits: int) -> str:
    """Return mean and standard deviation, the latter where there is one; nothing of nothing."""
    if row[name] is None:
        return ""
    deviation = row[name + "_sd"]
    mean = f"{factor * row[name]:.{digits}f}"
    return mean if deviation is None else f"{mean} ± {factor * deviation:.{digits}f}"


def tasks(content: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the table of each task, by its name."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in content["rows"]:
        by_task.setdefault(row["task"].capitalize(), []).append(row)
    return {name: table(rows) for name, rows in by_task.items()}


def markdown(content: Mapping[str, Any]) -> str:
    """Return the summary as Markdown tables, with notes and the losses by learning rate."""
    lines = [*notes(content), ""]
    for name, rows in tasks(content).items():
        lines += [f"### {name}", "", *rows]
    lines += lead_lines(content["leads"])
    lines += ["### Goals", "", *goal_lines(content["goals"]), "### Losses by learning rate, on the tuning text", ""]
    tried = (
        (search["task"], name_of(search), ", ".join(f"{lr}: {loss:.4f}" for lr, loss in search["losses"].items()))
        for search in content["tuning"]
    )
    return "\n".join([*lines, *cells("task | of | lr: nats", tried)])


def lines(content: Mapping[str, Any]) -> list[str]:
    """Return the tables of the summary in Markdown, for the page of all results."""
    found = [line for name, rows in tasks(content).items() for line in (f"{name}:", "", *rows)]
    path = "results/gpu/regime.md" if content["device"]["type"] == "cuda" else "results/regime.md"
    more = f"What the columns mean, and losses by learning rate: [regime.md]({path})."
    return [*found, *goal_lines(content["goals"]), more, ""]


def draw(content: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], path: Path) -> Path | None:
    """Draw the training loss of every task against steps and against time; None without matplotlib."""
    panels = {
        # The steep beginning would squeeze all that differs.
        f"{task}, by {by}": (
            label,
            {arm: [(p[at], p[2]) for p in of if 6 * p[0] > of[-1][0]] for arm, of in arms.items()},
        )
        for task, arms in content.items()
        for at, by, label in ((0, "step", "steps"), (1, "time", "time, of AdamW's whole training"))
    }
    return charts.lines(path, panels, "training loss, nats a byte", content, powers=False)
