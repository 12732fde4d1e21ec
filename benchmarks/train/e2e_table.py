"""What the iteration benchmark found: its goals, its tables and its chart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks import charts
from benchmarks.train.trainers import GIB

TIMES = ("forward_ms", "backward_ms", "optimizer_ms", "switch_ms")
# What was asked for: of tokens per second at equal batch, of the time of an iteration.
GOALS = (
    ("misa", "adamw", 1.45),
    ("misa", "lora", 1.15),
    ("misa", "badam_package", 1.0),
    ("misa_window", "misa", 1.25),
)
OPTIMIZER_SHARE = 0.01
# Steps of a round in an ordinary run, MISA's default and BAdam's; the measured rounds are shorter, to see many draws.
ROUND = 50


def goals(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what was asked for, where, the limit, the figure in rounds of 50 steps, and whether it is met."""
    found = []
    for shape in records:
        peers = {name: peer for name, peer in shape["peers"].items() if "error" not in peer}
        where = shape["plan"]["shape"]
        for ours, theirs, limit in GOALS:
            if peers.keys() >= {ours, theirs}:
                value, other = (peers[n]["in_rounds_of_50"]["tokens_per_second"] for n in (ours, theirs))
                value /= other
                goal = f"tokens/s, {ours} / {theirs}"
                found.append({"goal": goal, "where": where, "limit": limit, "value": value, "met": value >= limit})
        if "misa" in peers:
            value = peers["misa"]["in_rounds_of_50"]["optimizer_share"]
            goal, met = "optimizer's share of misa's iteration", value <= OPTIMIZER_SHARE
            found.append({"goal": goal, "where": where, "limit": OPTIMIZER_SHARE, "value": value, "met": met})
    return found


def verdict(found: list[dict[str, Any]]) -> str:
    """Return a line for each goal."""
    return "\n".join(
        f"{'met' if line['met'] else 'NOT MET':<8}{line['value']:>7.3f} "
        f"{'<=' if line['limit'] == OPTIMIZER_SHARE else '>='} {line['limit']:.2f}  {line['goal']}, {line['where']}"
        for line in found
    )


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


def caps_table(records: list[dict[str, Any]]) -> str:
    """Return what was measured under caps as lines of text, a peer each: sequences in a batch, tokens per second."""
    lines = []
    for content in records:
        caps = content["plan"]["caps_bytes"]
        lines.append(f"{content['plan']['shape']:<20}" + "".join(f"{cap / 2**20:>16,.1f} MiB" for cap in caps))
        for name, peer in content["peers"].items():
            if "error" in peer:
                lines.append(f"{name:<20}{peer['error'][:70]}")
                continue
            reached = (
                "does not fit" if cap["batch"] is None else f"{cap['batch']} x: {cap['tokens_per_second']:,.0f}"
                for cap in peer["caps"]
            )
            lines.append(f"{name:<20}" + "".join(f"{text:>20}" for text in reached))
    return "\n".join(lines)


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
