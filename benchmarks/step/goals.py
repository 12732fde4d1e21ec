"""Does the step reach its goals? The figures of an update benchmark beside what was asked for, and its table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.step.peers import FORMATS, PEERS
from benchmarks.step.update import TIMES
from benchmarks.tables import goal

M = 2**20
HEAD = f"{'elements':>8} {'in':>3} {'peer':<21}{'device us':>10}{'GB/s':>6}{'copy':>6}{'host us':>8}{'wall us':>9}"
HEADS = f"{'new gradients and lr':>{len(HEAD)}}{'steady':>18}", f"{HEAD}{'host us':>9}{'wall us':>9}{'extra MiB':>10}"
OURS = {name for name in (*PEERS, *FORMATS) if " misa" in name}
# Ours, torch's at the same bytes or doing the same work.
SAME_BYTES = (("fp32 misa", "fp32 fused"), ("bf16 misa", "fp32 fused"))
SAME_WORK = (("fp32 misa clip", "fp32 fused+clip"), ("bf16 misa clip", "bf16 masters+clip"))
EIGHT_BITS = (("bf16 misa int8", "bf16 bnb 8bit"), ("bf16 misa int8", "bf16 torchao 8bit"))
# Of the copy bandwidth, for large cases; of compressed formats int8 alone has a goal.
FRACTIONS = {"bf16 misa int8": 0.8} | {name: 0.92 for name in PEERS if " misa" in name}


def measured(cases: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float, dict[str, Any]]]:
    """Yield each measured case, its millions of elements, and its peers without those that failed."""
    for case in cases:
        peers = {name: peer for name, peer in case.get("peers", {}).items() if "error" not in peer}
        if peers:
            yield case, case["elements"] / M, peers


def goals(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what was asked for, where, the limit, the figure measured, and whether it is met."""
    found: list[dict[str, Any]] = []

    def at_least(name: str, where: str, limit: float, value: float) -> None:
        found.append(goal(name, where, limit, value, least=True))

    def at_most(name: str, where: str, limit: float, value: float) -> None:
        found.append(goal(name, where, limit, value))

    for case, millions, peers in measured(content["cases"]):
        copy = case["copy_gb_per_s"]["median"]
        where = f"{millions:.0f}M in {case['tensors']}"
        for name in sorted(OURS & peers.keys()):
            peer, place = peers[name], f"{where}, {name}"
            floor_us = peer["moved_bytes"] / copy / 1e3
            # A division by the number of tensors leaves somewhat less than the round number.
            if millions > 63:
                if name in FRACTIONS:
                    at_least("fraction of copy bandwidth", place, FRACTIONS[name], peer["gb_per_s"] / copy)
            elif 3.9 < millions < 33 and name in PEERS:
                at_most("device us", place, 1.15 * floor_us + 8, peer["device_us"]["median"])
            limit = {60: 60.0, 300: 120.0}.get(case["tensors"])
            if limit:
                at_most("host us", place, limit, peer["host_us"]["median"])
        for ours, theirs in SAME_BYTES:
            if peers.keys() >= {ours, theirs}:
                ratio = peers[theirs]["device_us"]["median"] / peers[ours]["device_us"]["median"]
                at_least("speed, same bytes, device", f"{where}, {ours} / {theirs}", 1.0, ratio)
        for ours, theirs in SAME_WORK:
            if peers.keys() >= {ours, theirs}:
                ratio = peers[theirs]["wall_us"]["median"] / peers[ours]["wall_us"]["median"]
                limit = 1.35 if millions < 65 else 1.25
                at_least("speed, same work, with host", f"{where}, {ours} / {theirs}", limit, ratio)
        for ours, theirs in EIGHT_BITS:
            if peers.keys() >= {ours, theirs} and millions > 63:
                for key, name in (("device_us", "speed, 8 bits, device"), ("wall_us", "speed, 8 bits, with host")):
                    ratio = peers[theirs][key]["median"] / peers[ours][key]["median"]
                    at_least(name, f"{where}, {ours} / {theirs}", 3.0, ratio)
    cold, dram = content.get("cold", {}), content.get("dram", {})
    if "first_step_s" in cold:
        at_most("cold first step s", "ordinary run", 5.0, cold["first_step_s"])
        at_most("compiled variants", "ordinary run", 4, sum(name.startswith("step") for name in cold["variants"]))
    if "read_bytes" in dram:
        moved = dram["read_bytes"] + dram["written_bytes"]
        at_most(
            "DRAM bytes / counted", f"64M in 60, {dram.get('peer', 'bf16 misa')}", 1.03, moved / dram["counted_bytes"]
        )
    return found


def table(cases: list[dict[str, Any]]) -> str:
    """Return the measurements as lines of text, a peer each."""
    lines = list(HEADS)
    for case in cases:
        head = f"{case['elements'] / M:>7.2f}M {case['tensors']:>3} "
        if "left_out" in case:
            lines.append(f"{head}left out: {case['left_out'][:80]}")
            continue
        copy = case["copy_gb_per_s"]["median"]
        for name, peer in case["peers"].items():
            if "error" in peer:
                lines.append(f"{head}{name:<21} {peer['error'][:60]}")
                continue
            times = [peer[key]["median"] for key in TIMES]
            lines.append(
                f"{head}{name:<21}{times[0]:>9.1f}{'*' if peer['host_bound'] else ' '}{peer['gb_per_s']:>6.0f}"
                f"{peer['gb_per_s'] / copy:>6.0%}{times[1]:>8.0f}"
                + "".join(f"{us:>9.0f}" for us in times[2:])
                + f"{peer['extra_bytes'] / M:>10.1f}"
            )
    return "\n".join([*lines, "* the device waited for the host"])


def launched(launches: dict[str, dict[str, Any]]) -> str:
    """Return the kernels of a step of each peer, and the microseconds they took under torch's profiler."""
    return ", ".join(f"{name} {counts['kernel']} ({counts['kernel_us']:.0f} us)" for name, counts in launches.items())


def verdict(found: list[dict[str, Any]]) -> str:
    """Return a line for each goal: how often it is met, and where it is missed the most."""
    lines = [f"{'goal':<29}{'met':>9}  nearest to its limit, or farthest beyond"]
    for name in dict.fromkeys(line["goal"] for line in found):
        of_goal = [line for line in found if line["goal"] == name]
        upper = name in ("device us", "host us", "cold first step s", "compiled variants", "DRAM bytes / counted")
        worst = max(of_goal, key=lambda line: (line["value"] / line["limit"]) * (1 if upper else -1))
        met = f"{sum(line['met'] for line in of_goal)} of {len(of_goal)}"
        sign = "<=" if upper else ">="
        lines.append(f"{name:<29}{met:>9}  {worst['value']:.3g} {sign} {worst['limit']:.3g}: {worst['where']}")
    return "\n".join(lines)
