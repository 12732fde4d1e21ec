"""Every figure of the stage `first` beside its goal, in at most 58 lines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.first.parity import FIRST, TIMES_PLAIN, VARIANTS, excused
from benchmarks.step.goals import M, measured
from benchmarks.step.goals import goals as step_goals
from benchmarks.train import e2e_table
from benchmarks.train.trainers import OURS
from benchmarks.train.training_memory import GIB

LINES = 58
# Of the planner's peak and the one measured, either way.
PLANNED_WITHIN = 0.05
# Lines of the step by how many millions of elements there are at least: in large cases the memory decides, in the
# smallest the host.
STEPPED = {
    63: ("bf16 misa", "bf16 misa stochastic", "bf16 misa int8", "fp32 misa", "bf16 misa cuda", "bf16 misa slices"),
    2: ("bf16 misa", "bf16 misa int8", "fp32 misa"),
    0: ("bf16 misa",),
}
# Of torch's AdamW at the bytes of float32 states, which ours are compared with.
TORCH = ("fp32 fused", "fp32 fused+norm", "fp32 fused+clip")
Parts = dict[str, dict[str, Any]]


def goals(parts: Parts) -> list[dict[str, Any]]:
    """Return of every goal where it holds, its limit, the figure, and whether it is met; nothing of what is absent."""
    found: list[dict[str, Any]] = []

    def at_most(part: str, goal: str, limit: float, value: float | None) -> None:
        if value is not None:
            found.append({"goal": goal, "where": part, "limit": limit, "value": value, "met": value <= limit})

    step = parts.get("engagement", {}).get("step", {})
    if "error" not in step and step:
        at_most("engagement", "elements or draws off the reference", 0, step["off"] + step["other_sets"])
    asks = parts.get("engagement", {}).get("asks", {})
    for key, waits, where in (("step", 0, "a step"), ("end_of_round", 1, "a round's end")):
        if key in asks:
            at_most("engagement", f"waits of {where}", waits, asks[key].get("syncs"))
    kernels = asks.get("step", {}).get("launches", {}).get("kernel")
    # On a CPU there is none, and a profiler that sees none on a GPU sees nothing.
    at_most("engagement", "kernels of a step", 1, kernels or None)
    for name, variant in parts.get("parity", {}).get("variants", {}).items():
        if "error" not in variant:
            if "times_plain" in variant:
                # NaN is beyond all, and JSON's.
                worst = max(math.inf if math.isnan(times) else times for times in variant["times_plain"].values())
                at_most("parity", f"{name}, error / plain PyTorch's", TIMES_PLAIN, worst)
            wrong = sum(variant.get("wrong", {}).values()) + variant["spoilt"]
            at_most("parity", f"{name}, wrong elements", 0, wrong)
            if isinstance(variant["other_bits"], int):
                at_most("parity", f"{name}, other bits than the CPU's", 0, variant["other_bits"])
    found += step_goals({"cases": parts.get("step", {}).get("cases", [])})
    if "peers" in parts.get("train", {}):
        found += e2e_table.goals([parts["train"]])
    eight = parts.get("eight", {})
    for line in eight.get("goals", []):
        at_most(f"8B, {line['peer']}", f"GiB: {line['goal']}", line["limit_bytes"] / GIB, line["bytes"] / GIB)
    for name, peer in eight.get("peers", {}).items():
        if "error" in peer and name.startswith("misa"):
            found.append({"goal": "trains under the cap", "where": f"8B, {name}", "limit": 1, "value": 0, "met": False})
        if "reserved_bytes" in peer:
            off = abs(peer["planned"]["peak"] / peer["allocated_bytes"] - 1)
            at_most(f"8B, {name}", "planner's peak off the one allocated", PLANNED_WITHIN, off)
    return found


def sound(parts: Parts) -> bool:
    """Return whether nothing of ours failed, was wrong or came to no result.

    What the time limit left out, and what is absent, is no failure; nor are more waits or kernels than the goals allow.
    """
    engagement, parity, eight = (parts.get(name, {}) for name in ("engagement", "parity", "eight"))
    ours = [peer for name, peer in parts.get("train", {}).get("peers", {}).items() if name in OURS]
    ours += [peer for name, peer in eight.get("peers", {}).items() if name.startswith("misa")]
    cases = parts.get("step", {}).get("cases", [])
    stepped = [peer for case in cases for name, peer in case.get("peers", {}).items() if name in VARIANTS]
    variants = parity.get("variants", {})
    begun = {name for name, part in parts.items() if part["state"] != "left out at the time limit"}
    results = {
        "engagement": "step" in engagement,
        "parity": variants.keys() >= set(parity.get("wanted", FIRST)),
        "step": bool(cases),
        "train": bool(parts.get("train", {}).get("peers")),
        "eight": bool(eight.get("peers")),
    }
    return (
        not any(part["state"].startswith("failed") for part in parts.values())
        and all(result for name, result in results.items() if name in begun)
        and not any("error" in look for look in engagement.values() if isinstance(look, dict))
        and not any(engagement.get("step", {}).get(key) for key in ("off", "other_sets"))
        and all(variant["ok"] or excused(variant) for variant in variants.values())
        and not any("error" in peer and not excused(peer) for peer in stepped)
        and not any({"error", "later_error"} & peer.keys() for peer in ours)
        and parts.get("sanitizer", {}).get("ok", True)
    )


def table(content: dict[str, Any]) -> str:
    """Return the record as lines of text."""
    parts: Parts = content["parts"]
    versions, seconds = content["versions"], sum(part.get("seconds", 0.0) for part in parts.values())
    where = f"{content['device']['name']}, torch {versions['torch']}, triton {versions['triton']}"
    lines = [f"{where}, commit {content['commit'][:12]}, {seconds:.0f} s"]
    for name, part in parts.items():
        head = f"{name:<12}{part['state']}, {part.get('seconds', 0.0):.0f} of {part['limit_s']:.0f} s"
        found = list(LINES_OF[name](part, goals({name: part})))
        # Beside it, where that is no head of a table.
        beside_it = name not in ("step", "train") and found
        lines += [f"{head}; {found[0].strip()}", *found[1:]] if beside_it else [head, *found]
        if part["state"].startswith("failed"):
            lines.append(f"  {(part.get('tail') or ['printed nothing'])[-1][:110]}")
    reached = content.get("goals", [])
    met = f"goals met: {sum(goal['met'] for goal in reached)} of {len(reached)}; * the device waited for the host"
    return "\n".join([*lines[: LINES - 1], met])


def beside(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for each goal."""
    for goal in found:
        sign = ">=" if goal["goal"].startswith("tokens/s") else "<="
        figures = f"{goal['value']:>9.3g} {sign} {goal['limit']:<7.3g} {'met' if goal['met'] else 'MISSED':<7}"
        yield f"  {figures}{goal['goal']}, {goal['where']}"


def engagement_lines(part: dict[str, Any], found: list[dict[str, Any]]) -> Iterator[str]:
    """Who steps, what the memory gives, and the goals."""
    steppers = part.get("backends", {})
    usual = (("fp32", "fp32, fp32"), ("bf16", "bf16 master, fp32"), ("fp16", "fp16 master, fp32"))
    steps = ", ".join(f"{name} {steppers[way]}" for name, way in usual if way in steppers)
    copy = part.get("copy_gb_per_s", {}).get("median", math.nan)
    yield f"  copy {copy:,.0f} GB/s; who steps: {steps}"
    for name in ("backends", "step", "asks", "copy_gb_per_s"):
        if "error" in part.get(name, {}):
            yield f"  {name}: {part[name]['error'][:100]}"
    yield from beside(found)


def parity_lines(part: dict[str, Any], found: list[dict[str, Any]]) -> Iterator[str]:
    """How many variants are right, the largest error, and who is wrong."""
    variants = part.get("variants", {})
    right = [name for name, variant in variants.items() if variant["ok"]]
    yield f"  right: {len(right)} of {len(part.get('wanted', variants))} variants"
    largest = max((goal for goal in found if "error" in goal["goal"]), key=lambda goal: goal["value"], default=None)
    if largest:
        yield from beside([largest])
    same = [goal for goal in found if "bits" in goal["goal"]]
    if same:
        every = {"value": sum(goal["value"] for goal in same), "met": all(goal["met"] for goal in same)}
        yield from beside([same[0] | every | {"goal": f"elements of {len(same)} variants with bits not the CPU's"}])
    wrong = [name for name in variants if name not in right]
    for name in wrong[:3]:
        variant = variants[name]
        yield f"  WRONG {name}: {str(variant.get('error') or wrong_in(variant))[:100]}"
    if wrong[3:]:
        yield f"  WRONG too: {', '.join(wrong[3:])}"


def wrong_in(variant: dict[str, Any]) -> dict[str, Any]:
    """Return the figures by which a variant is judged."""
    of_slices = {key: variant[key] for key in ("other_bits", "spoilt") if "wrong" not in variant}
    return {**variant.get("wrong", {}), **variant.get("times_plain", {}), **of_slices}


def step_lines(part: dict[str, Any], found: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each of ours: time, share of the copy bandwidth, host, and how many times as long torch takes."""
    head = f"{'us':>14} {'p20 to p80':<17}{'of copy':>11}{'host us':>13}"
    yield f"  {'elements in':>10} {'':<20}{head}   torch fp32 fused / ours, +norm, +norm+clip"
    limits = {(goal["goal"], goal["where"]): goal["limit"] for goal in found}
    for case, millions, peers in measured(part.get("cases", [])):
        copy = case["copy_gb_per_s"]["median"]
        names = next(names for least, names in STEPPED.items() if millions >= least)
        for name in [name for name in names if name in peers]:
            peer, where = peers[name], f"{millions:.0f}M in {case['tensors']}, {name}"
            us, host = peer["device_us"], peer["host_us"]["median"]
            time = beside_limit(
                f"{us['median']:,.0f}{'*' * bool(peer['host_bound'])}", limits.get(("device us", where))
            )
            share = f"{peer['gb_per_s'] / copy:.0%}"
            if ("fraction of copy bandwidth", where) in limits:
                share += f" >= {limits['fraction of copy bandwidth', where]:.0%}"
            ratios = (peers[name]["device_us"]["median"] / us["median"] for name in TORCH if name in peers)
            yield (
                f"  {millions:>6.1f}M {case['tensors']:>2} {name:<20}{time:>14} "
                f"{us['p20']:>7,.0f} to {us['p80']:<6,.0f}{share:>11}"
                f"{beside_limit(f'{host:,.0f}', limits.get(('host us', where))):>13}   "
                f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}"
            )
    for case in part.get("cases", []):
        if "left_out" in case:
            yield f"  {case['elements'] / M:>6.1f}M {case['tensors']:>2} left out: {case['left_out'][:80]}"
    yield from notes(part, refused="wrong by parity", unproven="not looked at by parity")


def notes(part: dict[str, Any], **titles: str) -> Iterator[str]:
    """Yield at most one line, of the lists in a part that are not empty."""
    texts = [f"{title}: {', '.join(part[key])}"[: 110 // len(titles)] for key, title in titles.items() if part.get(key)]
    if texts:
        yield f"  {'; '.join(texts)}"


def beside_limit(figure: str, limit: float | None) -> str:
    """Return a figure and, if there is one, the limit that it is not to exceed."""
    return figure if limit is None else f"{figure} <= {limit:,.0f}"


def train_lines(part: dict[str, Any], found: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each peer, as the stage e2e has it."""
    if "peers" not in part:
        return
    head, *rows = e2e_table.table([part]).splitlines()
    yield f"  {head}"
    yield from (f"  {row}" for row in rows)
    yield from beside(found)
    yield from notes(part, refused="wrong by parity", left_out="left out")


def eight_lines(part: dict[str, Any], found: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each peer: speed, peaks, and what the planner says."""
    for name, peer in part.get("peers", {}).items():
        if "reserved_bytes" not in peer:
            error = (peer.get("error", "").strip().splitlines() or [""])[-1]
            yield f"  {name:<6}{error[:100]}"
            continue
        figures = (("reserved", "reserved_bytes"), ("allocated", "allocated_bytes"))
        bytes_ = ", ".join(f"{label} {peer[key] / GIB:.2f}" for label, key in figures)
        planned = peer["planned"]["peak"] / GIB
        yield f"  {name:<6}{peer['tokens_per_second']:,.0f} tokens/s; GiB {bytes_}, planned {planned:.2f}"
    yield from beside([goal for goal in found if not goal["met"] or "misa" in goal["where"]])


def sanitizer_lines(part: dict[str, Any], found: list[dict[str, Any]]) -> Iterator[str]:
    """What memcheck found."""
    if "absent" in part:
        yield f"  {part['absent']}"
    elif "found" in part:
        others = "".join(f", {key} {part[key]}" for key in ("warnings", "planted", "stopped") if part.get(key))
        yield f"  {part['found']} found in {part['passed']} tests{others}{'' if part['ok'] else ': FAILED'}"[:120]


LINES_OF = {
    "engagement": engagement_lines,
    "parity": parity_lines,
    "step": step_lines,
    "train": train_lines,
    "eight": eight_lines,
    "sanitizer": sanitizer_lines,
}
