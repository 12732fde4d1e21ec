"""What has been measured, on one page: benchmarks/README.md and its charts, made from benchmarks/results.

python -m benchmarks.page    writes the page, and draws the charts whose measurements are not those drawn
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import charts, record
from benchmarks.gpu.first import table as first_table
from benchmarks.quality import regime_table
from benchmarks.step import cpu, growth, round_end
from benchmarks.train import e2e_table
from benchmarks.train.e2e_table import ROUND

RESULTS = Path("benchmarks/results")
PAGE = Path("benchmarks/README.md")
MIB = 2**20
Record = dict[str, Any]

HEAD = """# What has been measured

Made by `python -m benchmarks.page` from the records in [results](results); a test compares. Every section begins with
its command, machine and commit ("+" where files differed from it). The machine is shared with other work, so that
only figures of one section, taken in turns, can be compared.
"""
# What a GPU's records are made by, in the order of the page; none of them needs a network.
STAGES = {
    "first": "whether the step is right, how long it and whole iterations take, Llama 3 8B under 24 GiB: five minutes",
    "test": "the tests marked gpu, some under compute-sanitizer",
    "bench": "a step beside torch's AdamW, launches, bytes of device memory",
    "formats": "a step with compressed moments beside bitsandbytes, torchao, FlashOptim and optimi",
    "growth": "a step against elements and tensors, a switch against modules, released gradients against held ones",
    "round_end": "the step that ends a round beside a plain one",
    "e2e": "tokens per second of 130M, 1B and 8B LLaMAs at equal batch",
    "caps": "the same at the largest batch under 24, 48 and 80 GiB",
    "memory": "peak memory of the 8B shape under 24 GiB",
    "regime": "share of AdamW's improvement at small δ, a LLaMA of 128M parameters",
}

# The stage that makes it, where that has another name.
STAGE_OF = {"round_end": "growth"}


def cells(header: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table in Markdown; the header's columns are separated by bars."""
    return [
        f"| {header} |",
        "|---" * (header.count("|") + 1) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def spread(values: Record | None, digits: int = 1, scale: float = 1.0) -> str:
    """Return mean or median, and p10 to p90."""
    if values is None:
        return ""
    middle = values["mean"] if "mean" in values else values["median"]
    low, high = values["p10"] * scale, values["p90"] * scale
    return f"{middle * scale:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def goal_lines(found: list[Record]) -> list[str]:
    """Return a table of goals, for those who want to know what was asked for."""
    if not found:
        return []
    rows = [
        (
            line["goal"],
            line["where"],
            f"{line['limit']:g}",
            "not measured" if line["value"] is None else f"{line['value']:.3g}",
            "met" if line["met"] else "**not met**",
        )
        for line in found
    ]
    return cells("goal | where | limit | measured | ", rows)


def iterations(content: Record) -> list[str]:
    """Whole training iterations at equal batch."""
    lines: list[str] = []
    for shape in content["shapes"]:
        plan = shape["plan"]
        lines += [
            f"LLaMA of {shape['parameters'] / 1e6:,.1f}M parameters ({plan['shape']}), {plan['dtype']}, "
            f"{plan['batch']} sequences of {plan['sequence']} tokens, "
            f"checkpointing {'on' if plan['checkpointing'] else 'off'}, "
            f"δ = {plan['delta']:g}, LoRA of rank {plan['lora_rank']}, rounds of {plan['inner_steps']} steps; each "
            f"peer had {plan['turns']} turns. Means, in parentheses p10 to p90. A switch is the step that ends a "
            f'round; "in rounds of {ROUND}" counts it once in so many steps, as in an ordinary run. Utilization '
            "is of a forward and a full backward pass (6 operations a weight and token, attention besides), whoever "
            f"does less, over {shape['peak_flops'] / 1e9:,.0f} GFLOP/s: {shape['peak_flops_from']}.",
            "",
        ]
        rows = []
        for name, peer in shape["peers"].items():
            if "error" in peer:
                rows.append((name, peer["error"], *[""] * 8))
                continue
            ordinary = peer["in_rounds_of_50"]
            rows.append(
                (
                    name,
                    f"{ordinary['tokens_per_second']:,.0f}",
                    f"{peer['tokens_per_second']:,.0f}",
                    *(spread(peer[key], 1) for key in ("forward_ms", "backward_ms")),
                    *(spread(peer[key], 2) for key in ("optimizer_ms", "switch_ms")),
                    f"{ordinary['optimizer_share']:.1%}",
                    f"{peer['mfu']:.0%}",
                    f"{peer['backward_depth']['mean']:.1f}",
                )
            )
        lines += cells(
            f"peer | tokens/s in rounds of {ROUND} | tokens/s measured | forward ms | backward ms | step ms | "
            "switch ms | optimizer's share | utilization | layers of backward",
            rows,
        )
    return [*lines, *goal_lines(content.get("goals", []))]


def capped(content: Record) -> list[str]:
    """The largest batches under caps of memory."""
    lines: list[str] = []
    for shape in content["shapes"]:
        plan = shape["plan"]
        lines += [
            f"LLaMA of {shape['parameters'] / 1e6:,.1f}M parameters, {plan['dtype']}, sequences of {plan['sequence']} "
            f"tokens: the largest batch of 1, 2, 4, ... {plan['largest_batch']} sequences whose peak in the costliest "
            "round stays under the cap, and tokens per second with it, over a few rounds of one step.",
            "",
        ]
        rows = []
        for name, peer in shape["peers"].items():
            if "error" in peer:
                rows.append((name, peer["error"], *[""] * (len(plan["caps_bytes"]) - 1)))
                continue
            rows.append(
                (
                    name,
                    *(
                        "does not fit" if cap["batch"] is None else f"{cap['batch']}: {cap['tokens_per_second']:,.0f}"
                        for cap in peer["caps"]
                    ),
                )
            )
        header = " | ".join(f"{cap / MIB:,.0f} MiB" for cap in plan["caps_bytes"])
        lines += cells(f"peer | {header}", rows)
    return lines


def steps(content: Record) -> list[str]:
    """A step on a CPU beside other packages'."""
    lines: list[str] = []
    for case in content["cases"]:
        model = f"LLaMA of {case['model']} at δ = 3 %: " if "model" in case else ""
        rates = ", ".join(f"{name} {rate['median']:.1f} GB/s" for name, rate in case["gb_per_s"].items())
        lines += [f"{model}{case['elements'] / MIB:.0f}M elements in {case['tensors']} tensors; memory: {rates}.", ""]
        rows = []
        for name, peer in case["peers"].items():
            if "error" in peer:
                rows.append((name, peer["error"], *[""] * 6))
                continue
            known = bool(peer["bytes"])
            rows.append(
                (
                    name,
                    spread(peer["ms"]),
                    f"{peer['bytes']:g}" if known else "",
                    f"{peer['gb_per_s']:.1f}" if known else "",
                    f"{peer['of_copy']:.0%}" if known and "of_copy" in peer else "",
                    f"{peer['of_memory']:.0%}" if known else "",
                    spread(peer["times_ours"], 2),
                    f"{peer['extra_bytes'] / 1e6:.1f}" if "extra_bytes" in peer else "",
                )
            )
        lines += cells(
            "peer | ms | bytes an element | GB/s | of copy | of sum | times MISA's | peak extra MB",
            rows,
        )
    # Records of before had steady steps alone.
    kinds = {title: content[kind]["peers"] for kind, title in cpu.HOST_KINDS.items() if kind in content}
    host = content["host"]
    lines += [f"Host time: {host['tensors']} tensors of {host['elements'] // host['tensors']} elements.", ""]
    lines += cells(
        " | ".join(["peer", *(f"µs, {title} | times MISA's" for title in kinds)]),
        (
            (name, peer["error"], *[""] * (2 * len(kinds) - 1))
            if "error" in peer
            else (
                name,
                *(
                    spread(peers[name][key], digits)
                    for peers in kinds.values()
                    for key, digits in (("us", 0), ("times_ours", 2))
                ),
            )
            for name, peer in host["peers"].items()
        ),
    )
    return [*lines, *goal_lines(content.get("goals", []))]


def grown(content: Record) -> list[str]:
    """How cost grows."""
    rows = []
    for series in content["series"].values():
        for name, points in series["lines"].items():
            slope = series["slopes"][name]
            first, last = points[0], points[-1]
            rows.append(
                (
                    series["axis"],
                    name,
                    *(f"{point['n']:,}: {point['us']['median']:,.0f}" for point in (first, last)),
                    "" if slope is None else f"{slope:.2f}",
                )
            )
    note = (
        "Slopes are those of the larger half of the points on logarithmic axes: 1 is twice the time for twice as many."
    )
    table = cells("against | what | µs of the fewest | µs of the most | slope", rows)
    return [*table, note, "", *goal_lines(content.get("goals", []))]


def ends(content: Record) -> list[str]:
    """What ends of rounds cost."""
    first = content["cases"][0]
    text = (
        f"{round_end.size(first)} elements leave and as many enter; medians. Operators of torch are those beyond a "
        f"plain step's, a module that leaves; they and the most extra memory once more for {round_end.LARGER // MIB}M "
        "elements a matrix."
    )
    table = cells(" | ".join(round_end.COLUMNS), round_end.rows(content["cases"]))
    return [text, "", *table, *goal_lines(content["goals"])]


def quality(content: Record) -> list[str]:
    """Share of AdamW's improvement in equal bytes."""
    rows = [
        (
            row["model"],
            row["method"],
            row["state"],
            f"{row['size']:.3g}",
            f"{row['training_bytes'] / 1e3:,.0f}",
            f"{row['share']:.1%}" + (f" ± {row['share_sd']:.1%}" if row.get("share_sd") is not None else ""),
            str(len(row["seeds"])),
        )
        for row in content["rows"]
    ]
    header = "model | method | states | δ or rank | training kB | share of AdamW's improvement | seeds"
    return [*cells(header, rows), "Learning rates, losses and what is missing: [quality.md](results/quality.md).", ""]


def regime(content: Record) -> list[str]:
    """Share of AdamW's improvement, and time, where δ is small and the model deep."""
    lines: list[str] = []
    for task in dict.fromkeys(row["task"] for row in content["rows"]):
        chosen = [row for row in content["rows"] if row["task"] == task]
        lines += [f"{task.capitalize()}:", "", *regime_table.table(chosen)]
    lines += goal_lines(content["goals"])
    path = "results/gpu/regime.md" if content["device"]["type"] == "cuda" else "results/regime.md"
    return [*lines, f"What the columns mean, and losses by learning rate: [regime.md]({path}).", ""]


def memory(content: Record) -> list[str]:
    """Peaks of whole steps beside the formula."""
    wanted = [case for case in content["cases"] if case["checkpointing"]]
    rows = [
        (
            case["peer"],
            case["dtype"],
            *(
                f"{case['measured'][part] / MIB:.2f} / {case['formula'][part] / MIB:.2f}"
                for part in ("weights", "states", "gradients", "peak")
            ),
        )
        for case in wanted
    ]
    header = "peer | dtype | weights | states | gradients | peak"
    text = "MiB measured / by the formula, with checkpointing; the rest is in"
    return [*cells(header, rows), f"{text} [training_memory.md](results/training_memory.md).", ""]


def compiled(content: Record) -> list[str]:
    """What torch.compile pays."""
    rows = [
        (
            name,
            str(row["graphs"]),
            f"{row['compile_s']:,.0f}",
            f"{row['tokens_per_second_without_compiling']:,.0f}",
            f"{row['speed_without_compiling']:.2f}",
            "" if row["steps_until_it_pays"] is None else f"{row['steps_until_it_pays']:,}",
        )
        for name, row in content["variants"].items()
    ]
    return cells("variant | graphs | seconds compiling | tokens/s | speed | steps until it pays", rows)


def classified(content: Record) -> list[str]:
    """Fine-tuning of a pretrained encoder."""
    rows = []
    for method, peak in content["peak_bytes"].items():
        runs = [run for run in content["runs"] if run["method"] == method]
        accuracy = [100 * run["accuracy"] for run in runs]
        deviation = f" ± {statistics.stdev(accuracy):.1f}" if len(accuracy) > 1 else ""
        seconds = statistics.mean(run["cpu_seconds"] for run in runs)
        rows.append(
            (
                method,
                f"{statistics.mean(accuracy):.1f}{deviation}",
                f"{runs[0]['state_bytes'] / 1e6:.2f}",
                f"{peak / 1e6:.0f}",
                f"{seconds:.0f}",
            )
        )
    return cells("method | accuracy, % | state, MB | peak memory, MB | CPU s", rows)


def first(content: Record) -> list[str]:
    """The table that the stage prints."""
    return ["```", *first_table.table(content).splitlines(), "```", ""]


def launcher(content: Record) -> list[str]:
    """What a step on a GPU takes of the host's time."""
    parts = list(next(iter(content["host_us"].values())))
    rows = [
        (name, *(f"{us['median']:.0f} ({us['p20']:.0f} to {us['p80']:.0f})" for us in of.values()))
        for name, of in content["host_us"].items()
    ]
    text = "Microseconds on a stub of Triton's driver, medians, in parentheses p20 to p80: without CUDA's own launch."
    return [text, "", *cells(f"a step of | {' | '.join(parts)}", rows)]


def counts(content: Record) -> list[str]:
    """What the gate counts."""
    lines = [
        "Counted, not timed; `tests/benchmarks/test_gate.py` fails where a figure grows. "
        + "; ".join(f"{kind}: {tool}" for kind, tool in content["tools"].items() if tool)
        + ".",
        "",
    ]
    code: dict[str, dict[str, float]] = {}
    for name, value in content["figures"]["machine code"].items():
        variant, _, figure = name.rpartition(", ")
        code.setdefault(variant, {})[figure] = value
    lines += cells(
        "Triton kernel | registers | spills | instructions an element",
        (
            (name, f"{of['registers']:.0f}", f"{of['spills']:.0f}", f"{of['instructions']:.1f}")
            for name, of in code.items()
        ),
    )
    titles = {"instructions": "instructions an element (a tensor), CPU library", "host": "host, a step"}
    titles |= {"released": "an iteration that releases gradients", "launches": "launches, a step"}
    for kind, title in titles.items():
        figures = content["figures"].get(kind, {})
        lines += cells(f"{title} | ", ((name, f"{value:.4g}") for name, value in figures.items())) if figures else []
    return lines


# Of each record its title and what makes its text, in the order of the page.
SECTIONS: dict[str, tuple[str, Callable[[Record], list[str]]]] = {
    "first": ("The first five minutes", first),
    "e2e": ("Tokens per second", iterations),
    "caps": ("Tokens per second at the largest batch under a cap of memory", capped),
    "cpu": ("The step on a CPU", steps),
    "growth": ("How cost grows", grown),
    "round_end": ("The end of a round", ends),
    "launcher": ("The host's time of a step on a GPU", launcher),
    "quality": ("Quality at equal training bytes", quality),
    "regime": ("Quality where δ is small and the model deep", regime),
    "training_memory": ("Memory of a training step", memory),
    "classify": ("A pretrained encoder", classified),
    "compiled": ("torch.compile", compiled),
    "gate": ("Counts that noise cannot touch", counts),
}
# What makes those that only a machine without other work can give.
ON_A_CPU = {
    "e2e": "python -m benchmarks.train e2e --device cpu --out benchmarks/results",
    "caps": "python -m benchmarks.train e2e --device cpu --caps --out benchmarks/results",
    "cpu": "python -m benchmarks.step cpu --out benchmarks/results",
    "growth": "python -m benchmarks.step growth --device cpu --out benchmarks/results",
    "round_end": "python -m benchmarks.step round_end --device cpu --out benchmarks/results",
    "regime": "python -m benchmarks.quality run && python -m benchmarks.quality table",
}
# Of the charts that this module draws: the part of the record that they show, and what draws it.
CHARTS: dict[str, tuple[str, Callable[[Any, Path], Path | None]]] = {
    "e2e": ("shapes", e2e_table.draw),
    "cpu": ("cases", cpu.draw),
    "growth": ("series", growth.draw),
    "regime": ("curves", regime_table.draw),
}


def origin(content: Record) -> list[str]:
    """Return the command of a record and where it ran."""
    where = content.get("environment", content)
    device = where["device"]
    driver = f", driver {device['driver']}" if device.get("driver") else f", {device['threads']} threads"
    commit = where["commit"].rstrip("+")[:12] + ("+" if where["commit"].endswith("+") else "")
    load = f", load before {content['load_before']:.1f}" if "load_before" in content else ""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    return [
        "```",
        re.sub(" (-W ignore|--out [^ ]*)", "", where["command"]),
        "```",
        "",
        f"{device['name']}{driver}{load}; commit {commit}, {where['date'][:10]}; {versions}.",
        "",
    ]


def page(results: Path) -> str:
    """Return the page for the records in a folder and in its folder gpu.

    Raises:
        ValueError: A record has no section, so that the page would not be all there is.
    """
    unknown = {path.stem for path in results.glob("*.json")} - SECTIONS.keys()
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} must have a section in benchmarks/page.py")
    lines = [HEAD]
    for name, (title, text) in SECTIONS.items():
        for folder, suffix in ((results, ""), (results / "gpu", ", on a GPU")):
            if (folder / f"{name}.json").exists():
                content = json.loads((folder / f"{name}.json").read_text())
                lines += [f"## {title}{suffix}", "", *origin(content)]
                if (folder / f"{name}.png").exists():
                    lines += [f"![{title}]({(folder / name).relative_to(results.parent)}.png)", ""]
                lines += text(content)
    missing = [stage for stage in STAGES if not (results / "gpu" / f"{stage}.json").exists()]
    unmeasured = [name for name in ON_A_CPU if not (results / f"{name}.json").exists()]
    if unmeasured:
        lines += ["## What has not been measured on a CPU", ""]
        lines += cells(
            "command | what it measures", ((f"`{ON_A_CPU[name]}`", SECTIONS[name][0]) for name in unmeasured)
        )
    if missing:
        lines += ["## What has not been measured on a GPU", ""]
        lines += cells(
            "command | what it measures",
            ((f"`make gpu STAGE={STAGE_OF.get(stage, stage)}`", STAGES[stage]) for stage in missing),
        )
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Write the page and draw what is out of date."""
    for folder in (RESULTS, RESULTS / "gpu"):
        for name, (part, draw) in CHARTS.items():
            if (folder / f"{name}.json").exists():
                shown = json.loads((folder / f"{name}.json").read_text())[part]
                if not charts.shows(folder / f"{name}.png", shown):
                    print(draw(shown, folder / f"{name}.png"))
    (record.ROOT / PAGE).write_text(page(RESULTS))
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
