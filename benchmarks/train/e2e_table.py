"""What the iteration benchmark found: its goals, its tables and its chart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks import charts
from benchmarks.tables import GIB, MIB, cells, goal, goal_lines, spread

TIMES = ("forward_ms", "backward_ms", "optimizer_ms", "switch_ms")
# What was asked for: of tokens per second at equal batch, of the time of an iteration.
GOALS = (
    ("misa", "adamw", 1.45),
    ("misa", "lora", 1.15),
    ("misa", "badam_package", 1.0),
    ("misa_window", "misa", 1.25),
    ("misa_slices", "lora", 1.25),
    ("misa_slices_compiled", "misa_slices", 1.0),
)
OPTIMIZER_SHARE = 0.01
# Of what LoRA of all matrices keeps for backward, what slices may keep.
KEPT = 0.75
# Steps of a round in an ordinary run, MISA's default and BAdam's; the measured rounds are shorter, to see many draws.
ROUND = 50


def goals(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what was asked for, where, the limit, the figure in rounds of 50 steps, and whether it is met."""
    found = []
    for shape in records:
        peers = {name: peer["in_rounds_of_50"] for name, peer in shape["peers"].items() if "error" not in peer}
        where = shape["plan"]["shape"]
        for ours, theirs, limit in GOALS:
            if peers.keys() >= {ours, theirs}:
                value = peers[ours]["tokens_per_second"] / peers[theirs]["tokens_per_second"]
                found.append(goal(f"tokens/s, {ours} / {theirs}", where, limit, value, least=True))
        if "misa" in peers:
            share = peers["misa"]["optimizer_share"]
            found.append(goal("optimizer's share of misa's iteration", where, OPTIMIZER_SHARE, share))
        kept = {name: peer["kept_bytes"] for name, peer in shape["peers"].items() if "kept_bytes" in peer}
        if kept.keys() >= {"misa_slices", "lora"}:
            found.append(goal("kept for backward, misa_slices / lora", where, KEPT, kept["misa_slices"] / kept["lora"]))
    return found


def table(records: list[dict[str, Any]]) -> str:
    """Return the measurements as lines of text, a peer each."""
    lines = [
        f"{'shape':<6}{'peer':<14}{'tokens/s':>10}{'forward':>9}{'backward':>10}{'step':>8}{'switch':>8} ms"
        f"{'share':>7}{'T=50':>9}{'share':>7}{'MFU':>7}{'peak GiB':>10}{'reserved':>9}{'depth':>7}"
    ]
    for content in records:
        for name, peer in content["peers"].items():
            head = f"{content['plan']['shape']:<6}{name:<14}"
            if "error" in peer:
                lines.append(f"{head} {peer['error'][:70]}")
                continue
            ordinary = peer["in_rounds_of_50"]
            times = [peer[key]["mean"] if peer[key] else math.nan for key in TIMES]
            peak, reserved = ((peer[key] or math.nan) / GIB for key in ("peak_allocated_bytes", "peak_reserved_bytes"))
            lines.append(
                f"{head}{peer['tokens_per_second']:>10,.0f}{times[0]:>9.2f}{times[1]:>10.2f}{times[2]:>8.2f}"
                f"{times[3]:>8.2f}   {peer['optimizer_share']:>7.2%}{ordinary['tokens_per_second']:>9,.0f}"
                f"{ordinary['optimizer_share']:>7.2%}{peer['mfu']:>7.1%}{peak:>10.1f}{reserved:>9.1f}"
                f"{peer['backward_depth']['mean']:>7.1f}"
            )
    return "\n".join(lines)


def lines(content: dict[str, Any]) -> list[str]:
    """Return whole iterations at equal batch as tables in Markdown, and the goals."""
    found: list[str] = []
    for shape in content["shapes"]:
        plan = shape["plan"]
        found += [
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
                rows.append((name, peer["error"]))
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
                    *([f"{peer['kept_bytes'] / 1e6:.1f}"] if "kept_bytes" in peer else []),
                )
            )
        header = f"peer | tokens/s in rounds of {ROUND} | tokens/s measured | forward ms | backward ms | step ms | "
        header += "switch ms | optimizer's share | utilization | layers of backward"
        more = any("kept_bytes" in peer for peer in shape["peers"].values())
        found += cells(header + " | kept for backward, MB" * more, rows)
    return [*found, *goal_lines(content.get("goals", []))]


def caps_lines(content: dict[str, Any]) -> list[str]:
    """Return the largest batches under caps of memory as tables in Markdown."""
    found: list[str] = []
    for shape in content["shapes"]:
        plan = shape["plan"]
        found += [
            f"LLaMA of {shape['parameters'] / 1e6:,.1f}M parameters, {plan['dtype']}, sequences of {plan['sequence']} "
            f"tokens: the largest batch of 1, 2, 4, ... {plan['largest_batch']} sequences whose peak in the costliest "
            "round stays under the cap, and tokens per second with it, over a few rounds of one step.",
            "",
        ]
        rows = []
        for name, peer in shape["peers"].items():
            if "error" in peer:
                rows.append((name, peer["error"]))
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
        found += cells(f"peer | {header}", rows)
    return found


def draw(records: list[dict[str, Any]], path: Path) -> Path | None:
    """Draw the mean times of an iteration as bars; None without matplotlib."""
    charted = {
        f"{content['plan']['shape']}, {content['plan']['tokens']} tokens a batch": {
            name: {key: peer[key]["mean"] * share for key, share in parts(peer)}
            for name, peer in content["peers"].items()
            if "error" not in peer
        }
        for content in records
    }
    label = f"milliseconds of an iteration, mean in rounds of {ROUND} steps"
    return charts.bars(path, charted, label, source=records)


def parts(peer: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the times of an iteration with the share of iterations that have them, in rounds of `ROUND` steps."""
    switches = 1 / ROUND if peer["rounds"] else 0.0
    shares = zip(TIMES, (1.0, 1.0, 1.0 - switches, switches), strict=True)
    return [(name, share) for name, share in shares if peer[name] is not None]
