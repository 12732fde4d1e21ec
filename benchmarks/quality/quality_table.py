"""What do the runs of the quality benchmark say? Shares of AdamW's improvement, paired differences, a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

# Draws into files, on machines without a display too.
matplotlib.use("Agg")

from matplotlib import pyplot as plt

Runs = Sequence[dict[str, Any]]
# Okabe and Ito's palette, which the colour-blind can tell apart.
COLOURS = {"MISA": "#D55E00", "uniform": "#CC79A7", "BAdam": "#56B4E9", "LoRA": "#E69F00", "GaLore": "#009E73"}
KEY = ("model", "rank", "budget_state", "method", "state")
NOTES = (
    "# Quality at equal training bytes",
    "",
    "```",
    "python -m benchmarks.quality.quality run && python -m benchmarks.quality.quality table",
    "```",
    "",
    "A byte-level LLaMA pre-trained on Python source is fine-tuned on C++ headers, 600 steps, float32 weights, CPU.",
    "Training bytes are optimizer states, gradients held at once and extra weights: for MISA, BAdam and uniform",
    "those of the active set; for LoRA adapters, all their gradients and states; for GaLore projectors, states and",
    "one matrix's gradient, since it updates each matrix within backward. *Released* means that MISA and LoRA do so,",
    "too. The share is of AdamW's improvement (all parameters, fp32, memory not limited) over the pre-trained model,",
    "on C++ text that is neither trained nor tuned on.",
    "",
    "Learning rates: steps of a factor 1.5, three tried and one more while the best lies at an end, on a seed of its",
    "own and other validation text. What has no search of its own takes the rate found for the method at the nearest",
    "δ or rank. GaLore projects anew every 50 steps. Figures are mean ± standard deviation over seeds, which move",
    "batches, draws and adapters; differences are paired by seed, ± standard error.",
)
RELEASED = ", released"
# What is compared with what, pairwise, seed by seed: each with the states that did best on the tuning text.
PAIRS = (
    ("MISA, released", "LoRA, released"),
    ("MISA, released", "LoRA"),
    ("MISA, released", "GaLore"),
    ("MISA", "LoRA"),
    ("MISA", "GaLore"),
    ("MISA", "BAdam"),
    ("MISA", "uniform"),
)


def shares(reporting: Runs) -> list[dict[str, Any]]:
    """Add to each run the share of AdamW's improvement, AdamW having had the same batches.

    Args:
        reporting: Runs on reporting seeds; those of a seed without AdamW are left out.
    """
    gains = {(run["model"], run["seed"]): run["loss_before"] - run["loss"] for run in reporting if is_adamw(run)}
    return [
        run | {"share": (run["loss_before"] - run["loss"]) / gains[run["model"], run["seed"]]}
        for run in reporting
        if (run["model"], run["seed"]) in gains
    ]


def is_adamw(run: dict[str, Any]) -> bool:
    """Whether a run is the upper bound, to which no budget applies."""
    return run["method"] == "AdamW"


def rows(with_shares: Runs) -> list[dict[str, Any]]:
    """Return one row a method, format and budget, with means and standard deviations over seeds."""
    arms: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in with_shares:
        arms.setdefault(tuple(run[name] for name in KEY), []).append(run)
    table = []
    for key, runs in arms.items():
        row = dict(zip(KEY, key, strict=True)) | {name: runs[0][name] for name in ("size", "training_bytes", "lr")}
        row["seeds"] = sorted(run["seed"] for run in runs)
        for name in ("loss", "share"):
            values = [run[name] for run in runs]
            row[name] = statistics.mean(values)
            row[name + "_sd"] = statistics.stdev(values) if len(values) > 1 else None
        table.append(row)
    return sorted(table, key=lambda row: (row["model"] != "8 layers", row["rank"], -row["share"]))


def best_states(tuning: Runs) -> dict[tuple[str, str], str]:
    """Return for each model and method the format of states with the lowest loss on the tuning text."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for run in tuning:
        key = run["model"], run["method"]
        if key not in best or run["tuning_loss"] < best[key]["tuning_loss"]:
            best[key] = run
    return {key: run["state"] for key, run in best.items()}


def paired(with_shares: Runs, states: dict[tuple[str, str], str]) -> list[dict[str, Any]]:
    """Return the mean differences of `PAIRS` over the seeds that both have, with standard errors."""
    arms: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for run in with_shares:
        arms.setdefault(tuple(run[name] for name in KEY), {})[run["seed"]] = run
    table = []
    for model, rank, budget_state in dict.fromkeys(key[:3] for key in arms):
        for names in PAIRS:
            pair = [(name, states.get((model, name.removesuffix(RELEASED)), "int8")) for name in names]
            ours, theirs = (arms.get((model, rank, budget_state, *arm), {}) for arm in pair)
            seeds = sorted({*ours} & {*theirs})
            if len(seeds) < 2:
                continue
            row: dict[str, Any] = {"model": model, "rank": rank, "budget_state": budget_state, "seeds": seeds}
            row |= {"ours": " ".join(pair[0]), "theirs": " ".join(pair[1])}
            for name in ("loss", "share"):
                differences = [ours[seed][name] - theirs[seed][name] for seed in seeds]
                row[name] = statistics.mean(differences)
                row[name + "_se"] = statistics.stdev(differences) / len(differences) ** 0.5
            row["standard_errors"] = row["share"] / row["share_se"] if row["share_se"] else None
            table.append(row)
    return table


def summary(tuning: Runs, reporting: Runs) -> dict[str, Any]:
    """Return rows, paired differences and the runs themselves, as plain types.

    Args:
        tuning: Runs of the searches for learning rates.
        reporting: Runs at the learning rates found.
    """
    with_shares = shares(reporting)
    states = best_states(tuning)
    return {
        "rows": rows(with_shares),
        "paired": paired(with_shares, states),
        "best_states": {" ".join(key): state for key, state in states.items()},
        "tuning": tuning,
        "runs": with_shares,
    }


def markdown(content: dict[str, Any]) -> str:
    """Return the summary as Markdown tables."""
    lines = [*NOTES, ""]
    for model, rank, state in dict.fromkeys(budget(row) for row in content["rows"] if not is_adamw(row)):
        chosen = [
            row
            for row in content["rows"]
            if budget(row) == (model, rank, state) or is_adamw(row) and row["model"] == model
        ]
        chosen.sort(key=is_adamw, reverse=True)
        lines += [
            f"### {model}, the bytes of LoRA with {state} states at rank {rank}",
            "",
            "| method | states | δ or rank | training kB | lr | share of AdamW's gain, % | loss, nats a byte | seeds |",
            "|---|---|---|---|---|---|---|---|",
            *(
                f"| {row['method']} | {row['state']} | {row['size']:.3g} | {row['training_bytes'] / 1e3:,.0f} "
                f"| {row['lr']:.4f} | {spread(row, 'share', 100, 1)} | {spread(row, 'loss', 1, 4)} "
                f"| {len(row['seeds'])} |"
                for row in chosen
            ),
            "",
        ]
    lines += [
        "### Paired differences, the first less the second, each with its best states",
        "",
        "| model | budget | difference | points of share | nats | standard errors | seeds |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['model']} | LoRA {row['budget_state']} rank {row['rank']} | {row['ours']} − {row['theirs']} "
            f"| {100 * row['share']:+.2f} ± {100 * row['share_se']:.2f} | {row['loss']:+.4f} ± {row['loss_se']:.4f} "
            f"| {row['standard_errors']:+.1f} | {len(row['seeds'])} |"
            for row in content["paired"]
        ),
        "",
        "### Learning rates, loss on the tuning text",
        "",
        "| model | method | states | δ or rank | lr: nats |",
        "|---|---|---|---|---|",
    ]
    searches: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in sorted(content["tuning"], key=lambda run: run["lr"]):
        searches.setdefault((run["model"], run["method"], run["state"], f"{run['size']:.3g}"), []).append(run)
    for key, runs in sorted(searches.items()):
        tried = ", ".join(f"{run['lr']:.4f}: {run['tuning_loss']:.4f}" for run in runs)
        lines.append(f"| {' | '.join(key)} | {tried} |")
    return "\n".join(lines) + "\n"


def budget(row: dict[str, Any]) -> tuple[str, int, str]:
    """Return what says the bytes of a row."""
    return row["model"], row["rank"], row["budget_state"]


def spread(row: dict[str, Any], name: str, factor: float, digits: int) -> str:
    """Return mean and standard deviation, the latter where there is one."""
    deviation = row[name + "_sd"]
    mean = f"{factor * row[name]:.{digits}f}"
    return mean if deviation is None else f"{mean} ± {factor * deviation:.{digits}f}"


def draw(content: dict[str, Any], path: Path) -> None:
    """Draw every method's share by budget and write it as a PNG."""
    budgets = list(dict.fromkeys(budget(row) for row in content["rows"] if not is_adamw(row)))
    figure, all_axes = plt.subplots(
        1, len(budgets), figsize=(1 + 4.6 * len(budgets), 4.4), layout="constrained", squeeze=False
    )
    for axes, key in zip(all_axes[0], budgets, strict=True):
        chosen = [row for row in content["rows"] if budget(row) == key and not is_adamw(row)][::-1]
        for row in chosen:
            axes.errorbar(
                100 * row["share"],
                f"{row['method']}, {row['state']}",
                xerr=100 * (row["share_sd"] or 0),
                color=COLOURS[row["method"].removesuffix(RELEASED)],
                marker="o",
                markersize=8,
                capsize=4,
            )
        axes.margins(y=0.1)
        model, rank, state = key
        kb = max(row["training_bytes"] for row in chosen) / 1e3
        axes.set_title(f"{model}, {kb:,.0f} kB\n(LoRA's at rank {rank}, {state} states)", fontsize=10)
        axes.set_xlabel("share of AdamW's improvement, %")
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
