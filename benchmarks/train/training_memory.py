"""How much memory does a training step take with MISA and with its peers, beside what the formula says?

python -m benchmarks.train memory --out benchmarks/results    training_memory.json and .md, ten minutes on a CPU
python -m benchmarks.train memory --peer misa --plan 8b --device cuda    one peer under the cap, a line of JSON

On the CPU the model is Llama 3 8B at a 32nd of its widths, all 32 layers, on a 32nd of 2048 tokens, so that weights,
activations and logits keep their proportions; bytes are counted allocation by allocation. Only LoRA's rank cannot
shrink so far: 1 is twice its share.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import commands, record
from benchmarks.memory import PeakMemory
from benchmarks.tables import GIB, MIB, cells
from benchmarks.train import llama, trainers
from benchmarks.train.llama import SHAPES, Llama
from benchmarks.train.trainers import Plan
from misa_kernels import MISA, slices
from misa_kernels.gradients.axes import Slice
from misa_kernels.run.arrivals import HELD_BYTES, LAUNCHES
from misa_kernels.tools.planner.draws import by_layer, slices_of
from misa_kernels.tools.planner.step import Workload, count

# Larger differences of the formula are named under the table.
TOLERANCE = 0.05
# A peer that takes longer hangs.
PEER_LIMIT_S = 90.0
# Two moments of a byte and a scale of four for every 128.
INT8 = 2 + 2 * 4 / 128


PLANS = {
    "8b": replace(trainers.PLANS["8b"], batch=1, sequence=4096),
    "8b x 2": trainers.PLANS["8b"],
    # With room for one whole layer, which BAdam and LISA need.
    "8b/1024": replace(trainers.PLANS["8b"], shape="8b/1024", batch=1, sequence=64, chunk=8, lora_rank=1),
    "tiny": replace(trainers.PLANS["tiny"], batch=1, chunk=8, lora_rank=1),
}


@dataclass(frozen=True)
class Peer:
    """A way to train.

    Attributes:
        title: What it is, for people.
        make: As in `trainers.PEERS`.
        state_bytes: Bytes of moments, masters or residuals a parameter with state, for bfloat16 and float32 weights.
    """

    title: str
    make: Callable[[Llama, Plan, int], trainers.Peer]
    state_bytes: tuple[float, float] = (12.0, 8.0)


def misa_lean(model: Llama, plan: Plan, seed: int, **draw: Any) -> trainers.Peer:
    """MISA in the fewest bytes; with full precision there are no bits to split off."""
    precision = {"param_precision": "split"} if plan.dtype == "bfloat16" else {}
    return trainers.sampled(model, plan, seed, state_dtype="int8", release_gradients=True, **precision, **draw)


PEERS: dict[str, Peer] = {
    # Both keep moments in the weights' dtype, the smallest and fastest that torch's AdamW offers.
    "adamw": Peer("AdamW", trainers.full_adamw, (4.0, 8.0)),
    "lora": Peer("LoRA", trainers.lora, (4.0, 8.0)),
    "badam": Peer("BAdam", trainers.badam_layers),
    "lisa": Peer("LISA", trainers.lisa_layers),
    "misa": Peer("MISA", trainers.misa_modules),
    "misa_int8": Peer("MISA int8", partial(trainers.sampled, state_dtype="int8"), (INT8 + 4, INT8)),
    "misa_lean": Peer("MISA int8, split, released", misa_lean, (INT8 + 2, INT8)),
    "misa_window": Peer("MISA window", trainers.misa_window),
    "misa_slices": Peer("slices", trainers.PEERS["misa_slices"]),
    "misa_slices_lean": Peer("slices int8, split, released", partial(misa_lean, **slices()), (INT8 + 2, INT8)),
}


def build(plan: Plan, device: torch.device) -> Llama:
    """Return the model with random weights, made where and in what it shall be."""
    return llama.build(SHAPES[plan.shape], plan.dtype, plan.checkpointing, plan.chunk, device)


def trained_with(model: Llama, name: str, plan: Plan, inner_steps: int) -> torch.optim.Optimizer:
    """Return the optimizer of a peer, LoRA's adapters attached to the model, MISA's first round the costliest."""
    made = PEERS[name].make(model, replace(plan, inner_steps=inner_steps), 0).optimizer
    if isinstance(made, MISA):
        made.rehearse()
    return made


def planned(name: str, plan: Plan, fused_norms: bool) -> dict[str, float]:
    """Return what the formula says of a peer in the costliest round it may draw, from a model without data."""
    peer, shape = PEERS[name], SHAPES[plan.shape]
    active: dict[int, set[str]] = {}
    sliced: dict[int, dict[str, Slice]] = {}
    if name == "lora":
        elements = shape.lora_numel(plan.lora_rank)
    elif "slices" in name:
        pieces, cut = slices_of(shape, plan.delta)
        elements, sliced = cut.trained, by_layer(pieces)
    else:
        model = build(plan, torch.device("meta"))
        elements = total = sum(p.numel() for p in model.parameters())
        optimizer = None
        if name != "adamw":
            elements = int(plan.delta * total)
            optimizer = trained_with(model, name, plan, inner_steps=100)
        for number, layer in enumerate(model.layers):
            linears = ((path, part) for path, part in layer.named_modules() if isinstance(part, nn.Linear))
            active[number] = {path.rpartition(".")[2] for path, part in linears if part.weight.requires_grad}
        # Not before: of an optimizer that is gone the flags show nothing.
        del optimizer
    narrow = plan.dtype == "bfloat16"
    element = 2 if narrow else 4
    found = count(
        Workload(
            shape=shape,
            tokens=plan.tokens,
            element=element,
            chunk=plan.chunk,
            checkpointing=plan.checkpointing,
            active=active,
            sliced=sliced,
            dense=name == "adamw",
            outside=name == "adamw",
            rank=plan.lora_rank if name == "lora" else 0,
            adapter_element=element,
            state_elements=elements,
            state_bytes=peer.state_bytes[0 if narrow else 1],
            released=name.endswith("_lean"),
            waiting=HELD_BYTES,
            alone=LAUNCHES,
            norms="fused" if fused_norms else "torch",
        )
    )
    return {
        "weights": found.weights,
        "states": found.states,
        "activations": found.kept,
        "gradients": found.gradients,
        "during the step": found.peak - found.weights - found.states,
        "peak": found.peak,
    }


def measured(name: str, plan: Plan) -> dict[str, int]:
    """Count the bytes of a peer's training step on the CPU, in the costliest round it may draw.

    Returns:
        "weights", those of the model and LoRA's; "states"; "activations", what a forward pass leaves; "gradients", held
        after the backward pass; "during the step", the most that a whole step takes beyond weights and states; "peak".
    """
    torch.manual_seed(0)
    tokens = torch.randint(SHAPES[plan.shape].vocab, (1, plan.tokens))
    with PeakMemory() as weights:
        model = build(plan, tokens.device)
        optimizer = trained_with(model, name, plan, inner_steps=100)
    with PeakMemory() as first:
        train_step(model, tokens, optimizer)
    with PeakMemory() as passes:
        model(tokens).backward()
    with PeakMemory() as update:
        optimizer.step()
        optimizer.zero_grad()
    left = passes.held_bytes + update.held_bytes
    if left:
        raise RuntimeError(f"a step of {name} left {left} bytes behind: it must leave none")
    with PeakMemory() as forward:
        loss = model(tokens)
    parts = {"weights": weights.held_bytes, "states": first.held_bytes, "activations": forward.held_bytes}
    parts["gradients"] = passes.held_bytes
    parts["during the step"] = max(passes.peak_bytes, passes.held_bytes + update.peak_bytes)
    del loss
    return parts | {"peak": weights.held_bytes + first.held_bytes + parts["during the step"]}


def train_step(model: Llama, tokens: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Train once and drop the gradients."""
    model(tokens).backward()
    optimizer.step()
    optimizer.zero_grad()


def on_the_cpu(plan: Plan) -> Iterator[dict[str, Any]]:
    """Yield, for every dtype, with and without checkpointing, and every peer, what is measured and what is counted."""
    for dtype in ("bfloat16", "float32"):
        for checkpointing in (True, False):
            chosen = replace(plan, dtype=dtype, checkpointing=checkpointing)
            for name in PEERS:
                case = {"peer": name, "dtype": dtype, "checkpointing": checkpointing}
                yield case | {"measured": measured(name, chosen), "formula": planned(name, chosen, fused_norms=False)}


def markdown(content: dict[str, Any]) -> str:
    """Return the record as tables of measured bytes beside the formula's, and a line on each larger difference."""
    cases, plan = content["cases"], content["plan"]
    differences: list[str] = []
    lines = [
        "# Memory of a training step: measured / formula, MiB",
        "",
        f"`{content['command']}`, commit {content['commit']}, torch {content['versions']['torch']}, CPU.",
        f"Shape {plan['shape']}, {plan['tokens']} tokens, LoRA of rank {plan['rank']}, delta = {plan['delta']:.0%}, in "
        "which a whole layer, for BAdam and LISA, fits. These and MISA in the costliest round they may draw.",
    ]
    parts = tuple(cases[0]["measured"])
    for dtype, checkpointing in dict.fromkeys((case["dtype"], case["checkpointing"]) for case in cases):
        title = f"{dtype}, {'with' if checkpointing else 'without'} checkpointing"
        chosen = [case for case in cases if (case["dtype"], case["checkpointing"]) == (dtype, checkpointing)]
        rows = ((PEERS[case["peer"]].title, *beside_formula(case, parts)) for case in chosen)
        lines += ["", f"## {title}", "", *cells(f"| {' | '.join(parts)}", rows)[:-1]]
        for case, part in itertools.product(chosen, parts):
            seen, said = case["measured"][part], case["formula"][part]
            if abs(said - seen) > TOLERANCE * max(seen, 1):
                figures = f"{part} {seen:,} bytes, formula {said:,.0f} ({said - seen:+,.0f})"
                differences.append(f"- {title}, {PEERS[case['peer']].title}: {figures}")
    none = f"None is above {TOLERANCE:.0%}."
    return "\n".join([*lines, "", f"## Differences above {TOLERANCE:.0%}", "", *(differences or [none])]) + "\n"


def beside_formula(case: dict[str, Any], parts: Sequence[str]) -> Iterator[str]:
    """Yield MiB measured and by the formula."""
    return (f"{case['measured'][part] / MIB:.2f} / {case['formula'][part] / MIB:.2f}" for part in parts)


def lines(content: dict[str, Any]) -> list[str]:
    """Return the half of the record that was taken with checkpointing as a table in Markdown."""
    parts = ("weights", "states", "gradients", "peak")
    rows = (
        (case["peer"], case["dtype"], *beside_formula(case, parts))
        for case in content["cases"]
        if case["checkpointing"]
    )
    text = "MiB measured / by the formula, with checkpointing; the rest is in"
    table = cells(f"peer | dtype | {' | '.join(parts)}", rows)
    return [*table, f"{text} [training_memory.md](results/training_memory.md).", ""]


def rounds_of(name: str, plan: Plan, device: torch.device, rounds: int = 12, inner_steps: int = 2) -> dict[str, Any]:
    """Train a peer for `rounds` after the rehearsed round; return its peaks in bytes, weights included, and its speed.

    On a GPU memory is capped, and reserved memory is what the allocator took from the device; nothing calls
    `empty_cache`, so that it only grows. On a CPU the profiler that counts takes a part of the time.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_per_process_memory_fraction(plan.caps_bytes[0] / torch.cuda.mem_get_info()[1])
    torch.manual_seed(0)
    tokens = torch.randint(SHAPES[plan.shape].vocab, (plan.batch, plan.sequence), device=device)
    with PeakMemory(device) as first:
        model = build(plan, device)
        optimizer = trained_with(model, name, plan, inner_steps)
        for _ in range(inner_steps):
            train_step(model, tokens, optimizer)
    reserved = [torch.cuda.max_memory_reserved() if cuda else first.peak_bytes]
    with PeakMemory(device) as later:
        started = time.perf_counter()
        for _ in range(rounds * inner_steps):
            train_step(model, tokens, optimizer)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    reserved.append(torch.cuda.max_memory_reserved() if cuda else first.held_bytes + later.peak_bytes)
    return {
        "rounds": rounds,
        "tokens_per_second": plan.tokens * rounds * inner_steps / seconds,
        "rehearsed_reserved_bytes": reserved[0],
        "reserved_bytes": max(reserved),
        "allocated_bytes": max(first.peak_bytes, first.held_bytes + later.peak_bytes),
        "alloc_retries": torch.cuda.memory_stats()["num_alloc_retries"] if cuda else 0,
        "loss": float(model(tokens).detach()),
    }


def under_the_cap(
    plan_name: str, device: torch.device, deadline: float, names: Sequence[str] = tuple(PEERS), rounds: int = 12
) -> Iterator[dict[str, Any]]:
    """Yield the record after every peer, each in a process of its own.

    Args:
        plan_name: Key of `PLANS`.
        device: Where.
        deadline: Reading of `time.monotonic` at which a peer is stopped, and after which none starts.
        names: Keys of `PEERS`, in the order in which they run.
        rounds: How many each trains after the costliest.
    """
    plan = PLANS[plan_name]
    content: dict[str, Any] = {"plan": asdict(plan) | {"tokens": plan.tokens}, "peers": {}, "left_out": [], "goals": []}
    for name in names:
        peer: dict[str, Any] = {"planned": planned(name, plan, fused_norms=device.type == "cuda")}
        left = min(deadline - time.monotonic(), PEER_LIMIT_S)
        command = [sys.executable, "-m", "benchmarks.train", "memory", "--peer", name, "--plan", plan_name]
        command += ["--device", device.type, "--rounds", str(rounds)]
        if left <= 0:
            content["left_out"].append(name)
        else:
            try:
                done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, timeout=left)
                lines = done.stdout.splitlines()
                failed = {"error": f"exit code {done.returncode}: {done.stderr.strip()[-300:]}"}
                peer |= json.loads(lines[-1]) if done.returncode == 0 and lines else failed
            except subprocess.TimeoutExpired:
                peer["error"] = f"TimeoutExpired: not done after {left:.0f} s"
        content["peers"][name] = peer
        content["goals"] = goals(content["peers"])
        yield content


def goals(peers: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the goals of each of our peers that has run, with figures and whether they are met."""
    reserved = {name: peer["reserved_bytes"] for name, peer in peers.items() if "reserved_bytes" in peer}
    limits = {"peak reserved <= 20 GiB": 20 * GIB}
    if "badam" in reserved:
        limits["not above BAdam"] = reserved["badam"]
    if "lora" in reserved:
        limits["<= LoRA + 1 GiB"] = reserved["lora"] + GIB
    found = []
    for name in [name for name in reserved if name.startswith("misa")]:
        own = limits | {"<= 1.03 x the costliest round": 1.03 * peers[name]["rehearsed_reserved_bytes"]}
        for goal, limit in own.items():
            met = reserved[name] <= limit
            found.append({"peer": name, "goal": goal, "bytes": reserved[name], "limit_bytes": limit, "met": met})
    return found


def summary(content: dict[str, Any]) -> str:
    """Return the peers and the goals of `under_the_cap` as lines of text."""
    lines = [f"{'peer':<12}{'reserved':>10}{'rehearsed':>10}{'allocated':>10}{'planned':>10} MiB"]
    for name, peer in content["peers"].items():
        keys = ("reserved_bytes", "rehearsed_reserved_bytes", "allocated_bytes")
        figures = "".join(f"{peer[key] / MIB:>10,.1f}" for key in keys) if "reserved_bytes" in peer else f"{'':>30}"
        lines.append(f"{name:<12}{figures}{peer['planned']['peak'] / MIB:>10,.1f} {peer.get('error', '')[:90]}")
    for goal in content["goals"]:
        verdict = "met" if goal["met"] else "MISSED"
        figures = f"{goal['bytes'] / MIB:>10,.1f} {goal['limit_bytes'] / MIB:>10,.1f}"
        lines.append(f"{goal['peer']:<12}{goal['goal']:<32}{figures} {verdict}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Write the CPU's record, or print one peer's peaks as JSON; return the exit code."""
    parser = commands.parser("train memory", __doc__)
    parser.add_argument("--peer", choices=PEERS, help="print its peaks; without, the record of a CPU is made")
    parser.add_argument("--plan", choices=PLANS, default="8b/1024")
    parser.add_argument("--rounds", type=int, default=12, help="that a peer trains after the costliest")
    args = commands.parse(parser, argv)
    plan = PLANS[args.plan]
    if args.peer:
        try:
            found = rounds_of(args.peer, plan, args.device, args.rounds)
        except torch.OutOfMemoryError as error:
            found = {"error": f"OutOfMemoryError: {error}".splitlines()[0][:300]}
        print(json.dumps(found))
        return 0
    found_so_far: list[dict[str, Any]] = []

    def states() -> Iterator[dict[str, Any]]:
        for case in on_the_cpu(plan):
            found_so_far.append(case)
            yield {"plan": asdict(plan) | {"tokens": plan.tokens, "rank": plan.lora_rank}, "cases": found_so_far}

    content = commands.measured("training_memory", torch.device("cpu"), args.out, states(), lines)
    if args.out is not None:
        (args.out / "training_memory.md").write_text(markdown(content))
    return 0
