"""How fast is MISA's step on this CPU, beside other packages' optimizers, and beside what the memory allows?

python -m benchmarks.step cpu --out DIR    tables and the goals; DIR/cpu.json and DIR/cpu.png

Peers of one dtype take turns, as many at a time as the memory holds and always MISA among them, each with weights,
gradients and state of its own, so that nobody finds another's data in a cache. MISA's step takes the norms of all
gradients, which its sampler needs: "+norm" is the same work. Torch's clipping has them inside, so "+clip" takes them
once, and writes the gradients back, as its users do. Where a step is all overhead it is timed twice: steady, and with
gradients at other addresses and another learning rate in every step, as training has them.
"""

from __future__ import annotations

import gc
import itertools
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import charts, commands
from benchmarks.memory import PeakMemory
from benchmarks.step.peers import (
    BF16,
    FORMATS,
    FP32,
    GALORE_RANK,
    LR,
    MAX_NORM,
    PEERS,
    Peer,
    badam_block,
    bitsandbytes,
    clip,
    flashoptim,
    foreach,
    galore,
    misa,
    norms,
    optimi,
    torchao,
)
from benchmarks.step.update import WARM_UP, Case, M, Task, failure, quantiles, random, renew, take_turns, whole_step
from benchmarks.tables import cells, goal, goal_lines, spread
from misa_kernels.kernels import native

# What is active of a LLaMA of 130M, 1B and 8B parameters at a delta of 3 %; of one shape, since torchao compiles for
# every other again.
CASES = {name: Case(millions * M, millions, columns=256) for name, millions in (("130M", 4), ("1B", 37), ("8B", 240))}
REPEATS = 9
# Elements of the buffers that are copied, at most: beyond every cache.
BUFFER = 64 * M
# What all peers at a time may take, and an element at most: weight, gradient, moments, and as much on the way.
MEMORY_BYTES, ELEMENT_BYTES = 13 * 2**30, 26
# Whoever would need longer to be built and warmed up, by the elements, is left out.
PATIENCE_S = 25.0
# So small that a step is all overhead.
HOST_CASE = Case(300 * 16, 300, columns=16)
HOST_REPEATS = 100
# Relative and absolute, of weights and second moments after the warm-up: without weight decay they would be 3e-6 of
# themselves elsewhere. The norm that torch clips 64M elements by is 6.5e-4 too small, since it adds up in float32.
# bfloat16 weights are rounded thrice at worst; torch's moments of them are bfloat16 too.
TOLERANCES = {FP32: ((1e-6, 3e-7), (3e-3, 0.0)), BF16: ((2**-5, 1e-3), (3e-2, 0.0))}
# Where moments are others: the cosine between the updates of the warm-up, of weights so small that bfloat16 holds them.
COSINE, SMALL_WEIGHT = 0.9, 2**-8
# What is another algorithm, and not compared.
OTHERS = ("galore",)
# Whose second moments are corrected for their beginning in place, and other numbers than AdamW's.
CORRECTED = ("optimi",)


def deepspeed(weights: list[Tensor]) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW for CPUs, compiled at its first use."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    # Torch's and MISA's default, not its own.
    return DeepSpeedCPUAdam(weights, lr=LR, weight_decay=1e-2)


def own(name: str) -> bool:
    """Return whether a peer is ours."""
    return " misa" in name


ours = partial(misa, backend="cpu")
# Bytes as in `PEERS` and `FORMATS`. Those of the reference, a pass for each operation, and of GaLore's products are not
# counted.
CPU_PEERS = {
    "fp32 misa": Peer(FP32, 28, ours),
    "fp32 misa clip": Peer(FP32, 32, partial(ours, max_grad_norm=MAX_NORM)),
    "fp32 misa int8": Peer(FP32, 16.125, partial(ours, state_dtype="int8")),
    **{name: PEERS[name] for name in ("fp32 fused", "fp32 fused+norm", "fp32 fused+clip", "fp32 foreach")},
    "fp32 foreach+clip": Peer(FP32, 92, foreach, clip),
    "fp32 deepspeed": Peer(FP32, 28, deepspeed),
    "fp32 deepspeed+norm": Peer(FP32, 32, deepspeed, norms),
    "fp32 deepspeed+clip": Peer(FP32, 40, deepspeed, clip),
    # Its copies of float32 weights are others.
    "fp32 badam": Peer(FP32, 36, badam_block),
    "fp32 bnb 32bit": Peer(FP32, 28, bitsandbytes(32)),
    "fp32 bnb 8bit": Peer(FP32, 16.0625, bitsandbytes(8)),
    "fp32 torchao 8bit": Peer(FP32, 16.0625, torchao("AdamW8bit", 256)),
    "fp32 torchao fp8": Peer(FP32, 16.0625, torchao("AdamWFp8", 256)),
    "fp32 torchao 4bit": Peer(FP32, 14.125, torchao("AdamW4bit", 128)),
    "fp32 flashoptim": Peer(FP32, 16.25, flashoptim(None)),
    "fp32 optimi": Peer(FP32, 28, optimi),
    "fp32 galore": Peer(FP32, 0, galore(GALORE_RANK)),
    "fp32 reference": Peer(FP32, 0, misa),
    "bf16 misa": Peer(BF16, 28, ours),
    "bf16 misa clip": Peer(BF16, 30, partial(ours, max_grad_norm=MAX_NORM)),
    "bf16 misa stochastic": Peer(BF16, 22, partial(ours, param_precision="stochastic")),
    "bf16 misa int8": Peer(BF16, 10.125, partial(ours, param_precision="stochastic", state_dtype="int8")),
    **{name: PEERS[name] for name in ("bf16 fused", "bf16 fused+norm", "bf16 fused+clip", "bf16 foreach")},
    "bf16 deepspeed+norm": Peer(BF16, 24, deepspeed, norms),
    **{name: FORMATS[name] for name in ("bf16 bnb 32bit", "bf16 bnb 8bit", "bf16 torchao 8bit", "bf16 torchao fp8")},
    **{
        name: FORMATS[name]
        for name in ("bf16 torchao 4bit", "bf16 flashoptim", "bf16 optimi", "bf16 badam", "bf16 galore")
    },
}
# Of theirs, how many times as long as ours a step must take.
GOALS = {"fp32 fused+norm": 1.6, "fp32 fused+clip": 1.5, "fp32 fused": 1.0, "fp32 deepspeed+norm": 1.5}
HOST_GOAL = 5.0
# By the name that the record has for a case of nothing but overhead.
HOST_KINDS = {"host": "steady", "host_renewed": "new gradients and lr"}


def counterpart(name: str) -> str:
    """Return which of ours does the work of a peer."""
    return f"{name[:4]} misa{' clip' if 'clip' in name else ''}"


def measure(case: Case, dtype: torch.dtype, repeats: int, smaller: dict[str, Any] | None = None) -> dict[str, Any]:
    """Time all peers of a dtype in turns, and before them what the memory gives.

    "copy" reads one buffer and writes another, 8 bytes an element. "sum" adds one to another in place, 12 bytes an
    element: two reads and a write of what was read, which is as near as a single operation comes to the step's four
    reads and three writes of what was read.

    Args:
        case: What is updated.
        dtype: Of whom.
        repeats: Turns of each.
        smaller: The record of a smaller case, by which those are left out that would take too long.

    Returns:
        "elements", "tensors", "gb_per_s" of "copy" and "sum", and "peers"; see `figures`. A peer that failed, or
        computed something else than MISA, has an "error" instead.
    """
    rates = memory_rates(case, repeats)
    peers = {name: peer for name, peer in CPU_PEERS.items() if peer.dtype == dtype}
    start = initial(case, dtype)
    found = {} if smaller is None else too_slow(case, smaller)
    for sitting in sittings(case, {name: peer for name, peer in peers.items() if name not in found}):
        tasks: dict[str, Task] = {}
        states: dict[str, list[list[Tensor]]] = {}
        seconds: dict[str, float] = {}
        for name in sitting:
            started = time.perf_counter()
            try:
                step, states[name], _ = prepare(peers[name], start)
                seconds[name] = time.perf_counter() - started
                if name[5:] in CORRECTED:
                    del states[name][1:]
                if not own(name) and name[5:] not in OTHERS:
                    check(states[name], states[counterpart(name)], dtype, start[0])
                tasks[name] = step
            # Whatever one peer fails at, the numbers of the others are kept; the record shows the failure.
            except Exception as error:
                found[name] = failure(error)
        times = take_turns(tasks, repeats)
        for name, step in tasks.items():
            with PeakMemory() as memory:
                step()
            more = {"extra_bytes": memory.peak_bytes, "prepare_s": seconds[name]}
            found.setdefault(name, figures(name, case, times, rates) | more)
        tasks.clear()
        states.clear()
        step = None
        gc.collect()
    return {
        "elements": case.numel(),
        "tensors": case.tensors,
        "gb_per_s": rates,
        "peers": {name: found[name] for name in peers},
    }


def too_slow(case: Case, smaller: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return an error for each peer that would take too long to be built and warmed up."""
    times = case.numel() / smaller["elements"]
    return {
        name: {
            "error": f"left out: {WARM_UP} first steps of {smaller['tensors']} tensors took {peer['prepare_s']:.1f} s"
        }
        for name, peer in smaller["peers"].items()
        if not own(name) and peer.get("prepare_s", 0.0) * times > PATIENCE_S
    }


def memory_rates(case: Case, repeats: int) -> dict[str, dict[str, float]]:
    """Return what the memory gives in GB/s, see `measure`."""
    size = min(case.numel(), BUFFER)
    # Four, so that neither finds the other's in a cache.
    a, b, c, d = (torch.ones(size) for _ in range(4))
    times = take_turns({"copy": lambda: a.copy_(b), "sum": lambda: c.add_(d)}, repeats)
    return {name: quantiles(moved * size / times[name] / 1e9) for name, moved in (("copy", 8), ("sum", 12))}


def sittings(case: Case, peers: dict[str, Peer]) -> Iterator[list[str]]:
    """Yield the names of those that take turns: as many as the memory holds, after what of ours they are beside."""
    room = max(MEMORY_BYTES // (ELEMENT_BYTES * case.numel()), 2)
    sitting: list[str] = []
    for name in peers:
        more = [other for other in dict.fromkeys((counterpart(name), name)) if other not in sitting]
        if sitting and len(sitting) + len(more) > room:
            yield sitting
            sitting, more = [], list(dict.fromkeys((counterpart(name), name)))
        sitting += more
    yield sitting


def initial(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights and gradients that all peers start with."""
    generator = torch.Generator().manual_seed(0)
    return random(case, dtype, generator), random(case, dtype, generator)


def prepare(peer: Peer, start: tuple[list[Tensor], list[Tensor]]) -> tuple[Task, list[list[Tensor]], Task]:
    """Build a peer on copies of `start` and warm it up.

    Returns:
        Its step; its weights and its second moments, if any; and what gives it other gradients and another lr.
    """
    weights, gradients = ([tensor.clone() for tensor in tensors] for tensors in start)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.requires_grad_().grad = gradient
    optimizer = peer.make(weights)
    step = whole_step(peer, weights, optimizer)
    for _ in range(WARM_UP):
        step()
    moments = [optimizer.state[weight].get("exp_avg_sq") for weight in weights if weight in optimizer.state]
    plain = len(moments) == len(weights) and all(type(moment) is Tensor for moment in moments)
    same = plain and all(m.dtype.itemsize > 1 and m.shape == w.shape for m, w in zip(moments, weights, strict=True))
    turns = itertools.count(1)

    def renewed() -> None:
        if len(sets) < 2:
            sets.append([gradient.clone() for gradient in gradients])
        renew(weights, optimizer, sets, turns)

    sets = [gradients]
    return step, [weights, moments] if same else [weights], renewed


@torch.no_grad()
def check(found: list[list[Tensor]], expected: list[list[Tensor]], dtype: torch.dtype, before: list[Tensor]) -> None:
    """Raise ArithmeticError where the update is not MISA's: the time would be of something else.

    Args:
        found: Weights, and second moments where they are kept as AdamW has them.
        expected: MISA's.
        dtype: Of the weights.
        before: The weights that both began with.
    """
    if len(found) == 1:
        small = [weight.abs() < SMALL_WEIGHT for weight in before]
        first, second = (
            torch.cat([(w - b)[at].double() for w, b, at in zip(of[0], before, small, strict=True)])
            for of in (found, expected)
        )
        cosine = float(torch.nn.functional.cosine_similarity(first, second, dim=0))
        if not cosine > COSINE:
            raise ArithmeticError(f"the update's cosine to MISA's is {cosine:.3f}, and must be above {COSINE}")
        return
    names = "weights", "second moments"
    for name, values, others, (rtol, atol) in zip(names, found, expected, TOLERANCES[dtype], strict=True):
        for a, b in zip(values, others, strict=True):
            if not torch.allclose(a.float(), b.float(), rtol=rtol, atol=atol):
                raise ArithmeticError(f"the {name} are not MISA's to {rtol:.0e} of their values")


def figures(name: str, case: Case, times: dict[str, np.ndarray], rates: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return "ms", "bytes" that must move for an element, "gb_per_s", "of_memory", "of_copy" and "times_ours".

    The last is the time over that of MISA's step in the same turn; it and "ms" have median, p10 and p90.
    """
    moved = CPU_PEERS[name].moved_bytes
    taken = ~np.isnan(times[name])
    seconds = times[name][taken]
    rate = moved * case.numel() / float(np.median(seconds)) / 1e9
    beside = times.get(counterpart(name))
    ratio = None if beside is None else times[name] / beside
    return {
        "ms": quantiles(seconds * 1e3),
        "bytes": moved,
        "gb_per_s": rate,
        "of_memory": rate / rates["sum"]["median"],
        "of_copy": rate / rates["copy"]["median"],
        "times_ours": None if ratio is None else quantiles(ratio[~np.isnan(ratio)]),
    }


def measure_host(case: Case, repeats: int) -> dict[str, dict[str, Any]]:
    """Return for each of `HOST_KINDS` "elements", "tensors" and the microseconds of all "peers" with little to do."""
    start = initial(case, FP32)
    failed: dict[str, dict[str, Any]] = {}
    tasks: dict[str, Task] = {}
    before: dict[str, Task] = {}
    for name, peer in CPU_PEERS.items():
        if peer.dtype == FP32 and peer.moved_bytes:
            try:
                tasks[name], _, before[name] = prepare(peer, start)
            # As in `measure`.
            except Exception as error:
                failed[name] = failure(error)
    found = {}
    for kind, renewals in zip(HOST_KINDS, (None, before), strict=True):
        peers = dict(failed)
        times = take_turns(tasks, repeats, renewals)
        for name, seconds in times.items():
            ratio = seconds / times["fp32 misa"]
            kept = ~np.isnan(ratio)
            peers[name] = {"us": quantiles(seconds[kept] * 1e6), "times_ours": quantiles(ratio[kept])}
        found[kind] = {"elements": case.numel(), "tensors": case.tensors, "peers": peers}
    return found


def goals(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what was asked for, where, the limit, the figure measured or None, and whether it is met."""
    wanted = [
        (name, case, f"{case['tensors']} x {case['elements'] / case['tensors'] / M:.0f}M", limit)
        for name, limit in GOALS.items()
        for case in content["cases"]
        if name in case["peers"]
    ]
    for kind, title in HOST_KINDS.items():
        host = content[kind]
        wanted.append(("fp32 fused", host, f"host time of {host['tensors']} tiny tensors, {title}", HOST_GOAL))
    found = []
    for name, case, where, limit in wanted:
        ratio = case["peers"][name].get("times_ours")
        value = None if ratio is None else ratio["median"]
        found.append(goal(f"{name} / {counterpart(name)}", where, limit, value, least=True))
    return found


def lines(content: dict[str, Any]) -> list[str]:
    """Return the record as tables in Markdown: a case after the other, the host's times, the goals."""
    found: list[str] = []
    for case in content["cases"]:
        model = f"LLaMA of {case['model']} at δ = 3 %: " if "model" in case else ""
        rates = ", ".join(f"{name} {rate['median']:.1f} GB/s" for name, rate in case["gb_per_s"].items())
        found += [f"{model}{case['elements'] / M:.0f}M elements in {case['tensors']} tensors; memory: {rates}.", ""]
        rows = ((name, *cells_of(peer)) for name, peer in case["peers"].items())
        found += cells("peer | ms | bytes an element | GB/s | of copy | of sum | times MISA's | peak extra MB", rows)
    # Records of before had steady steps alone.
    kinds = {title: content[kind]["peers"] for kind, title in HOST_KINDS.items() if kind in content}
    host = content["host"]
    found += [f"Host time: {host['tensors']} tensors of {host['elements'] // host['tensors']} elements.", ""]
    rows = (
        (name, peer["error"])
        if "error" in peer
        else (name, *(text for of in kinds.values() for text in (spread(of[name]["us"], 0), ratio_of(of[name]))))
        for name, peer in host["peers"].items()
    )
    found += cells(" | ".join(["peer", *(f"µs, {title} | times MISA's" for title in kinds)]), rows)
    return [*found, *goal_lines(content.get("goals", []))]


def cells_of(peer: dict[str, Any]) -> list[str]:
    """Return what the table of a case says of a peer."""
    if "error" in peer:
        return [peer["error"]]
    moved = [""] * 4
    if peer["bytes"]:
        copy = f"{peer['of_copy']:.0%}" if "of_copy" in peer else ""
        moved = [f"{peer['bytes']:g}", f"{peer['gb_per_s']:.1f}", copy, f"{peer['of_memory']:.0%}"]
    extra = f"{peer['extra_bytes'] / 1e6:.1f}" if "extra_bytes" in peer else ""
    return [spread(peer["ms"]), *moved, ratio_of(peer), extra]


def ratio_of(peer: dict[str, Any]) -> str:
    """Return how many times as long as ours a peer takes."""
    return spread(peer["times_ours"], 2)


def states(repeats: int) -> Iterator[dict[str, Any]]:
    """Yield what the record holds after every case."""
    found: dict[str, Any] = {"instructions": native.library("cpu").misa_cpu_instructions().decode(), "cases": []}
    # First: the profiler that counts memory leaves hooks behind, which add microseconds to what comes later.
    found |= measure_host(HOST_CASE, HOST_REPEATS)
    smaller: dict[torch.dtype, dict[str, Any]] = {}
    for name, case in CASES.items():
        for dtype in (FP32, BF16):
            smaller[dtype] = {"model": name} | measure(case, dtype, repeats, smaller.get(dtype))
            found["cases"].append(smaller[dtype])
            print(f"{name}, {dtype}: measured", flush=True)
            yield found
    yield found | {"goals": goals(found)}


def main(argv: list[str] | None = None) -> int:
    """Print the tables and the goals."""
    parser = commands.parser("step cpu", __doc__, threads=2, device=False)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="turns of each peer")
    args = commands.parse(parser, argv)
    missing = native.unusable("cpu")
    if missing:
        print(f"nothing to time: the library for CPUs {missing}", file=sys.stderr)
        return 1
    # The notice of what is sampled is for people who train.
    warnings.filterwarnings("ignore", "MISA samples")
    content = commands.measured("cpu", args.device, args.out, states(args.repeats), lines)
    if args.out:
        draw(content["cases"], args.out / "cpu.png")
    return 0


def draw(cases: list[dict[str, Any]], path: Path) -> Path | None:
    """Draw how many times as long as MISA's step each takes, up to ten; None without matplotlib."""
    panels = {
        f"{case['elements'] / M:.0f}M elements in {case['tensors']} tensors, {next(iter(case['peers']))[:4]}": {
            name[5:]: {"time": peer["times_ours"]["median"]}
            for name, peer in case["peers"].items()
            if peer.get("times_ours") and peer["times_ours"]["median"] < 10
        }
        for case in cases
    }
    label = "time of a step over that of MISA's which does the same, median; up to 10"
    return charts.bars(path, panels, label, source=cases)
