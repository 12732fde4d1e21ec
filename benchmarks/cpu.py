"""How fast is MISA's step on this CPU, beside torch's AdamW and DeepSpeed's, and beside what the memory allows?

python -m benchmarks.cpu --out DIR    two tables and the goals; DIR/cpu.json

Peers of one dtype take turns, each with weights, gradients and state of its own, so that nobody finds another's data
in a cache. MISA's step takes the norms of all gradients, which its sampler needs: "+norm" is the same work. Torch's
clipping has them inside, so "+clip" takes them once, and writes the gradients back, as its users do.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import record
from benchmarks.peers import BF16, FP32, LR, MAX_NORM, PEERS, Peer, clip, misa, norms
from benchmarks.update import WARM_UP, Case, M, quantiles, random, whole_step
from misa_kernels.kernels import native

CASES = (Case(40 * M, 40), Case(64 * M, 4))
REPEATS = 9
# So small that a step is all overhead.
HOST_CASE = Case(300 * 16, 300, columns=16)
HOST_REPEATS = 400
# Relative and absolute, of weights and second moments after the warm-up: without weight decay they would be 3e-6 of
# themselves elsewhere. The norm that torch clips 64M elements by is 6.5e-4 too small, since it adds up in float32.
# bfloat16 weights are rounded thrice at worst; torch's moments of them are bfloat16 too.
TOLERANCES = {FP32: ((1e-6, 3e-7), (3e-3, 0.0)), BF16: ((2**-5, 1e-3), (3e-2, 0.0))}


def deepspeed(weights: list[Tensor]) -> torch.optim.Optimizer:
    """DeepSpeed's AdamW for CPUs, compiled at its first use."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    # Torch's and MISA's default, not its own.
    return DeepSpeedCPUAdam(weights, lr=LR, weight_decay=1e-2)


ours = partial(misa, backend="cpu")
# Bytes as in `PEERS`. Those of the reference, a pass for each operation, are not counted.
CPU_PEERS = {
    "fp32 misa": Peer(FP32, 28, ours),
    "fp32 misa clip": Peer(FP32, 32, partial(ours, max_grad_norm=MAX_NORM)),
    **{name: PEERS[name] for name in ("fp32 fused", "fp32 fused+norm", "fp32 fused+clip", "fp32 foreach")},
    "fp32 deepspeed+norm": Peer(FP32, 32, deepspeed, norms),
    "fp32 deepspeed+clip": Peer(FP32, 40, deepspeed, clip),
    "fp32 reference": Peer(FP32, 0, misa),
    "bf16 misa": Peer(BF16, 28, ours),
    "bf16 misa clip": Peer(BF16, 30, partial(ours, max_grad_norm=MAX_NORM)),
    "bf16 misa stochastic": Peer(BF16, 22, partial(ours, param_precision="stochastic")),
    **{name: PEERS[name] for name in ("bf16 fused", "bf16 fused+norm", "bf16 fused+clip")},
}
# Of theirs, how many times as long as ours a step must take.
GOALS = {"fp32 fused+norm": 1.6, "fp32 fused+clip": 1.5, "fp32 fused": 1.0, "fp32 deepspeed+norm": 1.5}
HOST_GOAL = 5.0
Task = Callable[[], object]


def counterpart(name: str) -> str:
    """Return which of ours does the work of a peer."""
    return f"{name[:4]} misa{' clip' if 'clip' in name else ''}"


def measure(case: Case, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Time all peers of a dtype in turns, and between them what the memory gives.

    "copy" reads one buffer and writes another, 8 bytes an element. "sum" adds one to another in place, 12 bytes an
    element: two reads and a write of what was read, which is as near as a single operation comes to the step's four
    reads and three writes of what was read.

    Returns:
        "elements", "tensors", "gb_per_s" of "copy" and "sum", and "peers"; see `figures`. A peer that failed, or
        computed something else than MISA, has an "error" instead.
    """
    # Four, so that neither finds the other's in a cache.
    a, b, c, d = (torch.ones(case.numel()) for _ in range(4))
    tasks: dict[str, Task] = {"copy": lambda: a.copy_(b), "sum": lambda: c.add_(d)}
    errors, states = {}, {}
    peers = {name: peer for name, peer in CPU_PEERS.items() if peer.dtype == dtype}
    start = initial(case, dtype)
    for name, peer in peers.items():
        try:
            step, states[name] = prepare(peer, start)
            check(states[name], states[counterpart(name)], dtype)
            tasks[name] = step
        # Whatever one peer fails at, the numbers of the others are kept; the record shows the failure.
        except Exception as error:
            errors[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    times = take_turns(tasks, repeats)
    rates = {name: quantiles(moved * case.numel() / times[name] / 1e9) for name, moved in (("copy", 8), ("sum", 12))}
    return {
        "elements": case.numel(),
        "tensors": case.tensors,
        "gb_per_s": rates,
        "peers": {
            name: errors[name] if name in errors else figures(name, case, times, rates["sum"]["median"])
            for name in peers
        },
    }


def initial(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights and gradients that all peers start with."""
    generator = torch.Generator().manual_seed(0)
    return random(case, dtype, generator), random(case, dtype, generator)


def prepare(peer: Peer, start: tuple[list[Tensor], list[Tensor]]) -> tuple[Task, list[list[Tensor]]]:
    """Build a peer on copies of `start` and warm it up; return its step, its weights and its second moments."""
    weights, gradients = ([tensor.clone() for tensor in tensors] for tensors in start)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.requires_grad_().grad = gradient
    optimizer = peer.make(weights)
    step = whole_step(peer, weights, optimizer)
    for _ in range(WARM_UP):
        step()
    return step, [weights, [optimizer.state[weight]["exp_avg_sq"] for weight in weights]]


@torch.no_grad()
def check(found: list[list[Tensor]], expected: list[list[Tensor]], dtype: torch.dtype) -> None:
    """Raise ArithmeticError where weights or second moments are not MISA's: the time would be of something else."""
    names = "weights", "second moments"
    for name, values, others, (rtol, atol) in zip(names, found, expected, TOLERANCES[dtype], strict=True):
        for a, b in zip(values, others, strict=True):
            if not torch.allclose(a.float(), b.float(), rtol=rtol, atol=atol):
                raise ArithmeticError(f"the {name} are not MISA's to {rtol:.0e} of their values")


def take_turns(tasks: dict[str, Task], repeats: int) -> dict[str, np.ndarray]:
    """Return the seconds of every repetition of each task, one after another, in reverse order every other time."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(repeats):
        for name in list(tasks)[:: -1 if number % 2 else 1]:
            started = time.perf_counter()
            tasks[name]()
            times[name].append(time.perf_counter() - started)
    return {name: np.array(seconds) for name, seconds in times.items()}


def figures(name: str, case: Case, times: dict[str, np.ndarray], memory_gb_per_s: float) -> dict[str, Any]:
    """Return "ms", "bytes" that must move for an element, "gb_per_s", "of_memory" and "times_ours".

    The last is the time over that of MISA's step in the same turn; it and "ms" have median, p10 and p90.
    """
    moved = CPU_PEERS[name].moved_bytes
    rate = moved * case.numel() / float(np.median(times[name])) / 1e9
    beside = times.get(counterpart(name))
    return {
        "ms": quantiles(times[name] * 1e3),
        "bytes": moved,
        "gb_per_s": rate,
        "of_memory": rate / memory_gb_per_s,
        "times_ours": None if beside is None else quantiles(times[name] / beside),
    }


def measure_host(case: Case, repeats: int) -> dict[str, Any]:
    """Return "elements", "tensors" and the microseconds of a step of a few "peers", in which there is little to do."""
    start = initial(case, FP32)
    tasks = {name: prepare(CPU_PEERS[name], start)[0] for name in ("fp32 misa", "fp32 misa clip", "fp32 fused")}
    times = take_turns(tasks, repeats)
    beside = times["fp32 misa"]
    return {
        "elements": case.numel(),
        "tensors": case.tensors,
        "peers": {
            name: {"us": quantiles(seconds * 1e6), "times_ours": quantiles(seconds / beside)}
            for name, seconds in times.items()
        },
    }


def goals(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what was asked for, where, the limit, the figure measured or None, and whether it is met."""
    wanted = [
        (name, case, f"{case['tensors']} x {case['elements'] / case['tensors'] / M:.0f}M", limit)
        for name, limit in GOALS.items()
        for case in content["cases"]
        if name in case["peers"]
    ]
    host = content["host"]
    wanted.append(("fp32 fused", host, f"host time of {host['tensors']} tiny tensors", HOST_GOAL))
    found = []
    for name, case, where, limit in wanted:
        ratio = case["peers"][name].get("times_ours")
        value = None if ratio is None else ratio["median"]
        found.append({"goal": f"{name} / {counterpart(name)}", "where": where, "limit": limit, "value": value})
        found[-1]["met"] = value is not None and value >= limit
    return found


def table(case: dict[str, Any]) -> str:
    """Return the measurements of a case as lines of text, a peer each."""
    rates = case["gb_per_s"]
    lines = [
        f"{case['tensors']} tensors, {case['elements'] / M:.0f}M elements; memory: "
        + ", ".join(f"{name} {rate['median']:.1f} GB/s" for name, rate in rates.items()),
        f"{'peer':<21}{'ms':>8}{'p10':>8}{'p90':>8}{'bytes':>7}{'GB/s':>7}{'of sum':>8}"
        f"{'x MISA':>8}{'p10':>6}{'p90':>6}",
    ]
    for name, peer in case["peers"].items():
        if "error" in peer:
            lines.append(f"{name:<21} {peer['error'][:90]}")
            continue
        times = "".join(f"{peer['ms'][key]:>8.1f}" for key in ("median", "p10", "p90"))
        moved = f"{peer['bytes']:>7}{peer['gb_per_s']:>7.1f}{peer['of_memory']:>8.0%}" if peer["bytes"] else " " * 22
        ratio = peer["times_ours"] or dict.fromkeys(("median", "p10", "p90"), float("nan"))
        lines.append(f"{name:<21}{times}{moved}{ratio['median']:>8.2f}{ratio['p10']:>6.2f}{ratio['p90']:>6.2f}")
    return "\n".join(lines)


def host_table(host: dict[str, Any]) -> str:
    """Return the host's times as lines of text."""
    lines = [f"{host['tensors']} tensors of {host['elements'] // host['tensors']} elements"]
    lines.append(f"{'peer':<21}{'us':>8}{'p10':>8}{'p90':>8}{'x MISA':>8}")
    for name, peer in host["peers"].items():
        times = "".join(f"{peer['us'][key]:>8.0f}" for key in ("median", "p10", "p90"))
        lines.append(f"{name:<21}{times}{peer['times_ours']['median']:>8.2f}")
    return "\n".join(lines)


def verdict(found: list[dict[str, Any]]) -> str:
    """Return a line for each goal."""
    return "\n".join(
        f"{'met' if line['met'] else 'NOT MET':<8}"
        f"{'-' if line['value'] is None else format(line['value'], '.2f'):>5} >= {line['limit']:.1f}  "
        f"{line['goal']}, {line['where']}"
        for line in found
    )


def main(argv: list[str] | None = None) -> int:
    """Print the tables and the goals."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the JSON record")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="turns of each peer")
    args = parser.parse_args(argv)
    missing = native.unusable("cpu")
    if missing:
        print(f"nothing to time: the library for CPUs {missing}", file=sys.stderr)
        return 1
    torch.set_num_threads(args.threads)
    content = record.environment(torch.device("cpu")) | {
        "instructions": native.library("cpu").misa_cpu_instructions().decode(),
        "load_before": os.getloadavg()[0],
        "cases": [],
    }
    print(f"{args.threads} threads, {content['instructions']}, torch {torch.__version__}, commit {content['commit']}\n")
    for case in CASES:
        for dtype in (FP32, BF16):
            content["cases"].append(measure(case, dtype, args.repeats))
            print(table(content["cases"][-1]) + "\n", flush=True)
    content["host"] = measure_host(HOST_CASE, HOST_REPEATS)
    content["goals"] = goals(content)
    print(host_table(content["host"]) + "\n\n" + verdict(content["goals"]))
    print(f"load of the machine before: {content['load_before']:.1f}")
    if args.out:
        print(record.write(args.out, "cpu", content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
