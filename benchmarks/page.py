"""What has been measured, on one page: benchmarks/README.md and its charts, made from benchmarks/results.

python -m benchmarks.page    writes the page, and draws the charts whose measurements are not those drawn
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import charts, record
from benchmarks.gate import counts
from benchmarks.gpu.first import table as first_table
from benchmarks.quality import forward_passes, four_bits, pretrained_table, regime_table, update_rules
from benchmarks.step import cpu, growth, launcher, round_end
from benchmarks.tables import cells
from benchmarks.train import e2e_table, training_memory

RESULTS = Path("benchmarks/results")
PAGE = Path("benchmarks/README.md")
Record = dict[str, Any]

HEAD = """# What has been measured

Made by `python -m benchmarks.page` from the records in [results](results); a test compares. Every section begins with
its command, machine and commit ("+" where files differed from it). The machine is shared with other work, so that
only figures of one section, taken in turns, can be compared.

| in | is asked | with |
|---|---|---|
| `step/` | how long does the update take: beside others, as it grows, where it ends a round, of the host's time? | \
`python -m benchmarks.step cpu`, `growth`, `round_end` or `launcher` |
| `train/` | how fast is a whole iteration, and what memory does it take? | \
`python -m benchmarks.train e2e`, `memory`, `slices` |
| `gate/` | has the code become dearer? Counts, beside those recorded | `python -m benchmarks.gate` |
| `quality/` | how well does a model learn in the same memory? Hours | `python -m benchmarks.quality run` |
| `gpu/` | what has to be looked at on a GPU, and what machine code do its kernels become? | \
`make gpu STAGE=first`, `python -m benchmarks.gpu.codegen` |
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


# Of each record its title and what makes its text, in the order of the page.
SECTIONS: dict[str, tuple[str, Callable[[Record], list[str]]]] = {
    "first": ("The first five minutes", first),
    "e2e": ("Tokens per second", e2e_table.lines),
    "caps": ("Tokens per second at the largest batch under a cap of memory", e2e_table.caps_lines),
    "slices": ("Slices beside LoRA: time and activations", e2e_table.lines),
    "slices_compiled": ("Slices under torch.compile, layer by layer", e2e_table.lines),
    "cpu": ("The step on a CPU", cpu.lines),
    "growth": ("How cost grows", growth.lines),
    "round_end": ("The end of a round", round_end.lines),
    "launcher": ("The host's time of a step on a GPU", launcher.lines),
    "quality": ("Quality at equal training bytes", quality),
    "pretrained": ("Real weights", pretrained_table.lines),
    "regime": ("Quality where δ is small and the model deep", regime_table.lines),
    "four_bits": ("Over a base of 4 bits", four_bits.lines),
    "rules": ("Other update rules in the bytes of int8 AdamW", update_rules.lines),
    "forward_passes": ("Without a backward pass", forward_passes.lines),
    "training_memory": ("Memory of a training step", training_memory.lines),
    "classify": ("A pretrained encoder", classified),
    "compiled": ("torch.compile", compiled),
    "gate": ("Counts that noise cannot touch", counts.lines),
}
# What makes those that only a machine without other work can give.
ON_A_CPU = {
    "e2e": "python -m benchmarks.train e2e --device cpu --out benchmarks/results",
    "caps": "python -m benchmarks.train e2e --device cpu --caps --out benchmarks/results",
    "cpu": "python -m benchmarks.step cpu --out benchmarks/results",
    "growth": "python -m benchmarks.step growth --device cpu --out benchmarks/results",
    "round_end": "python -m benchmarks.step round_end --device cpu --out benchmarks/results",
    "regime": "python -m benchmarks.quality run && python -m benchmarks.quality table",
    "pretrained": "python -m benchmarks.quality run --model smollm2",
    "four_bits": "python -m benchmarks.quality run --model smollm2-4bit",
    "rules": "python -m benchmarks.quality run --model small-rules",
    "forward_passes": "python -m benchmarks.quality run --model small-forward",
}
# Of the charts that this module draws: the part of the record that they show, and what draws it.
CHARTS: dict[str, tuple[str, Callable[[Any, Path], Path | None]]] = {
    "e2e": ("shapes", e2e_table.draw),
    "cpu": ("cases", cpu.draw),
    "growth": ("series", growth.draw),
    "regime": ("curves", regime_table.draw),
    "pretrained": ("rows", pretrained_table.draw),
    "forward_passes": ("curves", forward_passes.draw),
}


# Whose questions are answered and whose code is gone: it is in the commit that the record names.
CLOSED = ("quality", "compiled")
# Commands of records that were made before there were folders, and what they are called now.
RENAMED = {name: f"step {name}" for name in ("cpu", "growth", "round_end", "launcher")}
RENAMED |= {"e2e": "train e2e", "training_memory": "train memory", "regime": "quality"}


def origin(name: str, content: Record) -> list[str]:
    """Return the command of a record, what to check out before where its code is gone, and where it ran."""
    where = content.get("environment", content)
    device = where["device"]
    driver = f", driver {device['driver']}" if device.get("driver") else f", {device['threads']} threads"
    commit = where["commit"].rstrip("+")[:12] + ("+" if where["commit"].endswith("+") else "")
    load = f", load before {content['load_before']:.1f}" if "load_before" in content else ""
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
    command = re.sub(" (-W ignore|--out [^ ]*)", "", where["command"])
    if name in CLOSED:
        command = f"git checkout {commit.rstrip('+')} && {command}"
    else:
        command = re.sub(r"(?<=-m benchmarks\.)(\w+)", lambda found: RENAMED.get(found[1], found[1]), command)
    return [
        "```",
        command,
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
                lines += [f"## {title}{suffix}", "", *origin(name, content)]
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
