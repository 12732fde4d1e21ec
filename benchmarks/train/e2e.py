"""How many tokens a second does a whole training iteration reach with MISA, and with its peers?

python -m benchmarks.train e2e --device cpu --out DIR         at equal batch: a table, the goals, DIR/e2e.json and .png
python -m benchmarks.train e2e --device cpu --caps --out DIR  at the largest batch under caps of memory: DIR/caps.json

Every peer trains the same model on the same batch in turns of one process, each built anew and freed, or where there is
room all beside one another: turn 1 in the order of `PEERS`, turn 2 in reverse, so that a drift of the clocks hits all
alike.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import commands, record
from benchmarks.memory import PeakMemory
from benchmarks.tables import aligned, goal_lines
from benchmarks.train.e2e_table import ROUND, TIMES, caps_lines, draw, goals, table
from benchmarks.train.llama import Llama, build
from benchmarks.train.trainers import COMPILED, LR, PEERS, PLANS, SHAPES, Peer, Plan
from misa_kernels import MISA

# Dense bfloat16 operations a second that the makers state for tensor cores, by a part of the device's name.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989.4e12, "H200": 989.4e12, "A100": 312e12, "B200": 2250e12}
# A machine with a GPU is lent for ten minutes at a time.
GPU_LIMIT_S = 440.0


class Clock:
    """Marks in the stream of a GPU, or readings of the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """Return a point in time; on a GPU without waiting for it."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, earlier: Any, later: Any) -> float:
        """Return the milliseconds between two marks that have passed."""
        return earlier.elapsed_time(later) if self.device.type == "cuda" else (later - earlier) * 1e3

    def wait(self) -> None:
        """Wait until everything asked for so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class Samples:
    """What was measured of one peer, over its turns; one entry an iteration in the lists of times.

    Attributes:
        forward_ms: Forward pass and loss.
        backward_ms: Backward pass, with what checkpointing computes again.
        optimizer_ms: `step()` and `zero_grad()`, for steps within a round.
        switch_ms: The same for steps that end a round.
        iteration_ms: All three.
        wall_s: Seconds of each turn by the host's clock, from an idle device to an idle device.
        iterations: Iterations of each turn.
        backward_depth: Layers that the backward pass ran through.
        allocated_bytes: Highest memory in use, per turn.
        reserved_bytes: Highest memory taken from the device, per turn.
        rounds: Rounds of a sampler over all turns, 0 for others.
        loss: Loss of the last iteration, to show that there was one.
        first_ms: `step()` and `zero_grad()` where a round begins: what has entered has no state to be read, and such
            steps are too fast to stand for the others.
    """

    forward_ms: list[float] = field(default_factory=list)
    backward_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    switch_ms: list[float] = field(default_factory=list)
    iteration_ms: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)
    backward_depth: list[int] = field(default_factory=list)
    allocated_bytes: list[int] = field(default_factory=list)
    reserved_bytes: list[int] = field(default_factory=list)
    rounds: int = 0
    loss: float = math.nan
    first_ms: list[float] = field(default_factory=list)


def run_turn(model: Llama, tokens: Tensor, name: str, plan: Plan, turn: int, samples: Samples) -> None:
    """Build the peer `name`, warm it up, measure its turn into `samples`, and free it; raises as `timed` does."""
    peer = begin(model, tokens, name, plan, turn)
    try:
        timed(model, tokens, peer, plan, peer.rounds, samples)
    finally:
        peer.close()


def begin(model: Llama, tokens: Tensor, name: str, plan: Plan, turn: int) -> Peer:
    """Return the peer `name` after a round."""
    reset(model)
    peer = (PEERS | COMPILED)[name](model, plan, turn)
    try:
        for _ in range(plan.inner_steps):
            iterate(model, tokens, peer.optimizer, Clock(tokens.device))
    except BaseException:
        # The model is the next peer's.
        peer.close()
        raise
    return peer


def timed(model: Llama, tokens: Tensor, peer: Peer, plan: Plan, rounds: int, samples: Samples) -> None:
    """Measure so many rounds of a peer, or a turn of one without rounds, into `samples`.

    Raises:
        ArithmeticError: The loss is not finite, so that what was timed was no training.
    """
    clock = Clock(tokens.device)
    iterations = rounds * plan.inner_steps or plan.steps
    clock.wait()
    if tokens.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    marks = []
    for _ in range(iterations):
        marks.append(iterate(model, tokens, peer.optimizer, clock))
        samples.backward_depth.append(model.backward_depth)
    clock.wait()
    samples.wall_s.append(time.perf_counter() - started)
    if tokens.is_cuda:
        samples.allocated_bytes.append(torch.cuda.max_memory_allocated())
        samples.reserved_bytes.append(torch.cuda.max_memory_reserved())
    with torch.no_grad():
        samples.loss = float(model(tokens))
    if not math.isfinite(samples.loss):
        raise ArithmeticError(f"loss={samples.loss} must be finite: times of diverged weights mean nothing")
    samples.iterations.append(iterations)
    samples.rounds += rounds
    for number, (start, forward, backward, end) in enumerate(marks, start=1):
        samples.forward_ms.append(clock.ms(start, forward))
        samples.backward_ms.append(clock.ms(forward, backward))
        # Of a peer without rounds every step is within one.
        place = (number + peer.early) % plan.inner_steps if peer.rounds else -1
        times = samples.switch_ms if place == 0 else samples.optimizer_ms
        # Rounds of two steps have no others, and what begins them has to stand for those.
        if place == 1 and plan.inner_steps > 2:
            times = samples.first_ms
        times.append(clock.ms(backward, end))
        samples.iteration_ms.append(clock.ms(start, end))


def iterate(model: Llama, tokens: Tensor, optimizer: torch.optim.Optimizer, clock: Clock) -> tuple[Any, ...]:
    """Run one training iteration; return marks of its start, and after forward, backward and step."""
    start = clock.mark()
    loss = model(tokens)
    forward = clock.mark()
    loss.backward()
    backward = clock.mark()
    optimizer.step()
    optimizer.zero_grad()
    return start, forward, backward, clock.mark()


def reset(model: Llama) -> None:
    """Make every weight trainable, drop gradients and give cached memory back."""
    for param in model.parameters():
        param.requires_grad_(True)
        param.grad = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def summary(samples: Samples, tokens: int, flops: float, peak_flops: float) -> dict[str, Any]:
    """Return mean, p10 and p90 of the times, tokens per second over all turns, utilization, memory and depth.

    Args:
        samples: What was measured.
        tokens: Of a batch.
        flops: Operations of an iteration, see `model_flops`.
        peak_flops: What the device does of them in a second.
    """
    seconds, iterations = sum(samples.wall_s), sum(samples.iterations)
    optimizer_ms = sum(samples.optimizer_ms) + sum(samples.first_ms) + sum(samples.switch_ms)
    return {
        "tokens_per_second": tokens * iterations / seconds,
        "tokens_per_second_by_turn": [tokens * n / s for n, s in zip(samples.iterations, samples.wall_s, strict=True)],
        "iterations": iterations,
        "rounds": samples.rounds,
        **{
            name: spread(getattr(samples, name))
            for name in ("forward_ms", "backward_ms", "optimizer_ms", "first_ms", "switch_ms", "iteration_ms")
        },
        "optimizer_share": optimizer_ms / sum(samples.iteration_ms),
        "in_rounds_of_50": in_rounds(samples, tokens),
        "mfu": flops * iterations / seconds / peak_flops,
        "backward_depth": spread(samples.backward_depth),
        "peak_allocated_bytes": max(samples.allocated_bytes, default=None),
        "peak_reserved_bytes": max(samples.reserved_bytes, default=None),
        "loss": samples.loss,
    }


def in_rounds(samples: Samples, tokens: int) -> dict[str, float]:
    """Return "tokens_per_second" and "optimizer_share" where a round has `ROUND` steps, from the means measured."""
    forward, backward, step, switch = (np.mean(getattr(samples, name) or math.nan) for name in TIMES)
    if samples.rounds:
        within = 0.0 if math.isnan(step) else step
        step = ((ROUND - 1) * within + switch) / ROUND
    total = forward + backward + step
    return {"tokens_per_second": float(tokens / total * 1e3), "optimizer_share": float(step / total)}


def model_flops(plan: Plan) -> float:
    """Return the operations of a forward and a full backward pass, whatever a peer leaves out or does twice.

    6 a token for each weight that is multiplied, and 6 for each pair of tokens and hidden unit of causal attention.
    """
    shape = SHAPES[plan.shape]
    with torch.device("meta"):
        model = Llama(shape)
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    if not shape.tied:
        weights -= model.embed_tokens.weight.numel()
    return 6.0 * plan.tokens * (weights + shape.layers * shape.hidden * plan.sequence)


def peak_flops(plan: Plan, device: torch.device) -> tuple[float, str]:
    """Return the operations a second that utilization is measured by, and where they are from."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for part, flops in PEAK_FLOPS.items():
        if part in name:
            return flops, f"the data sheet of {part}"
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, plan.dtype)) for _ in range(2))
    clock, times = Clock(device), []
    begun = time.monotonic()
    # Some CPUs take a second for one product in bfloat16.
    while len(times) < 2 or (len(times) < 30 and time.monotonic() - begun < 0.5):
        start = clock.mark()
        torch.mm(a, b)
        end = clock.mark()
        clock.wait()
        times.append(clock.ms(start, end))
    return 2 * size**3 / min(times) * 1e3, f"the fastest product of two {size} x {size} matrices in this run"


def spread(values: list[float] | list[int]) -> dict[str, float] | None:
    """Return mean, p10 and p90, or None of nothing."""
    if not values:
        return None
    p10, p90 = np.percentile(values, [10, 90])
    return {"mean": float(np.mean(values)), "p10": float(p10), "p90": float(p90)}


def measure(
    plan: Plan, device: torch.device, deadline: float, peers: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Measure peers on one shape, and yield the record so far after each turn.

    Args:
        plan: What to train.
        device: Where.
        deadline: Reading of `time.monotonic` after which no turn starts that is not expected to end by then.
        peers: Keys of `PEERS` or `COMPILED`; all of `PEERS` if None.

    Yields:
        A dict with the plan under "plan", a summary of each peer (or its error) under "peers", and the turns
        that the deadline left out under "left_out".
    """
    model, tokens = build_model(plan, device), tokens_of(plan, device)
    content = head_of(plan, model)
    peak, content["peak_flops_from"] = peak_flops(plan, device)
    flops = model_flops(plan)
    content |= {"peak_flops": peak, "model_flops": flops}
    names = list(PEERS if peers is None else peers)
    taken = {name: Samples() for name in names}
    standing: dict[str, tuple[Llama, Peer]] = {}
    longest = 0.0
    for turn in range(plan.turns):
        for name in names[:: -1 if turn % 2 else 1]:
            if not {"error", "later_error"}.isdisjoint(content["peers"].get(name, {})):
                continue
            started = time.monotonic()
            if started + longest > deadline:
                content["left_out"].append(f"{plan.shape}: {name}, turn {turn + 1}")
                yield content
                continue
            try:
                if plan.together:
                    if name not in standing:
                        own = build_model(plan, device)
                        standing[name] = own, begin(own, tokens, name, plan, turn)
                    own, peer = standing[name]
                    timed(own, tokens, peer, plan, min(peer.rounds, plan.rounds), taken[name])
                else:
                    run_turn(model, tokens, name, plan, turn, taken[name])
                content["peers"][name] = summary(taken[name], plan.tokens, flops, peak)
            # Whatever one peer fails at, the numbers of the others are kept; the record shows the failure.
            except Exception as error:
                # A turn that went well stays.
                before = content["peers"].get(name, {})
                content["peers"][name] = before | {"later_error": failure(error)["error"]} if before else failure(error)
            longest = max(longest, time.monotonic() - started)
            # In their order, which that of the turns is not.
            content["peers"] = {peer: content["peers"][peer] for peer in names if peer in content["peers"]}
            yield content


def failure(error: Exception) -> dict[str, Any]:
    """Return what the record says of a peer that failed."""
    return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def head_of(plan: Plan, model: Llama) -> dict[str, Any]:
    """Return what the record of a shape begins with."""
    return {
        "plan": asdict(plan) | {"tokens": plan.tokens, "lr": LR},
        "parameters": sum(p.numel() for p in model.parameters()),
        "peers": {},
        "left_out": [],
    }


def tokens_of(plan: Plan, device: torch.device) -> Tensor:
    """Return the batch that everybody trains on."""
    generator = torch.Generator().manual_seed(0)
    shape = (plan.batch, plan.sequence)
    return torch.randint(SHAPES[plan.shape].vocab, shape, generator=generator).to(device)


def measure_caps(plan: Plan, device: torch.device, deadline: float) -> Iterator[dict[str, Any]]:
    """Measure tokens per second at the largest batch, of 1, 2, 4, ... sequences, that fits under each cap.

    Peaks are those of two steps of the costliest round that a sampler may draw: bytes that the allocator has taken
    from a GPU; on a CPU those of all tensors. What fits is then timed for a few rounds.

    Yields:
        The record so far after each peer: under "peers" of each the peaks by batch, and under "caps" by cap the batch
        and its tokens per second, or None where not even one sequence fits.
    """
    model = build_model(plan, device)
    content = head_of(plan, model)
    longest = 0.0
    for name in PEERS:
        started = time.monotonic()
        if started + longest > deadline:
            content["left_out"].append(f"{plan.shape}: {name}")
            yield content
            continue
        try:
            content["peers"][name] = caps_of(model, name, plan, device)
        # As in `measure`.
        except Exception as error:
            content["peers"][name] = failure(error)
        longest = max(longest, time.monotonic() - started)
        yield content


def caps_of(model: Llama, name: str, plan: Plan, device: torch.device) -> dict[str, Any]:
    """Return the peaks of one peer and what it reaches under each cap; see `measure_caps`."""
    peaks: dict[int, int] = {}
    batch = 1
    while batch <= plan.largest_batch:
        peak = peak_bytes(model, name, replace(plan, batch=batch), device)
        if peak is None:
            break
        peaks[batch] = peak
        if peak > max(plan.caps_bytes):
            break
        batch *= 2
    speeds: dict[int, float] = {}
    caps = []
    for cap in plan.caps_bytes:
        largest = max((batch for batch, peak in peaks.items() if peak <= cap), default=None)
        if largest is not None and largest not in speeds:
            samples = Samples()
            # Few, since a large batch takes long; all layers once for those that go through them.
            few = replace(plan, batch=largest, inner_steps=1, rounds=8, steps=8)
            run_turn(model, tokens_of(few, device), name, few, 0, samples)
            speeds[largest] = few.tokens * sum(samples.iterations) / sum(samples.wall_s)
        caps.append(
            {"cap_bytes": cap, "batch": largest, "tokens_per_second": None if largest is None else speeds[largest]}
        )
    return {"peak_bytes": {str(batch): peak for batch, peak in peaks.items()}, "caps": caps}


def peak_bytes(model: Llama, name: str, plan: Plan, device: torch.device) -> int | None:
    """Return the peak of two steps of the costliest round, or None where the device has not got it."""
    reset(model)
    tokens, clock = tokens_of(plan, device), Clock(device)
    weights = sum(param.nbytes for param in model.parameters())
    try:
        with PeakMemory(device) as memory:
            # Two steps of one round.
            peer = PEERS[name](model, replace(plan, inner_steps=8), 0)
            try:
                if isinstance(peer.optimizer, MISA):
                    peer.optimizer.rehearse()
                for _ in range(2):
                    iterate(model, tokens, peer.optimizer, clock)
            finally:
                peer.close()
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else weights + memory.peak_bytes


def build_model(plan: Plan, device: torch.device) -> Llama:
    """Return the model on the device, its weights always the same."""
    torch.manual_seed(0)
    return build(SHAPES[plan.shape], plan.dtype, plan.checkpointing, plan.chunk, device)


def run(
    names: list[str], device: torch.device, deadline: float, caps: bool, out: Path | None, **changes: Any
) -> list[dict[str, Any]]:
    """Measure the shapes, write e2e.json or caps.json after every measurement, print what was found; return it.

    Args:
        names: Keys of `PLANS`.
        device: Where.
        deadline: Reading of `time.monotonic` after which nothing new starts.
        caps: Look for the largest batch under caps of memory instead of measuring at equal batch.
        out: Folder of the record; none is written if None.
        **changes: What the record says besides, and "plan", with what is other than in `PLANS`.
    """
    name = "caps" if caps else "e2e"
    changed = changes.pop("plan", {})
    content = record.environment(device) | {"stage": name, "load_before": os.getloadavg()[0]} | changes | {"shapes": []}
    for shape in names:
        content["shapes"].append(None)
        for measured in (measure_caps if caps else measure)(replace(PLANS[shape], **changed), device, deadline):
            content["shapes"][-1] = measured
            if out is not None:
                record.write(out, name, content)
    left_out = [line for shape in content["shapes"] for line in shape["left_out"]]
    if left_out:
        print(f"left out at the time limit: {'; '.join(left_out)}")
    if caps:
        print(aligned(caps_lines(content)))
    else:
        content["goals"] = goals(content["shapes"])
        print(table(content["shapes"]) + "\n" + aligned(goal_lines(content["goals"])))
    print(f"commit {content['commit']}, {content['device']['name']}, torch {torch.__version__}")
    if out is not None:
        print(record.write(out, name, content))
        if not caps:
            draw(content["shapes"], out / "e2e.png")
    return content["shapes"]


def main(argv: list[str] | None = None) -> int:
    """Measure what the command line names."""
    parser = commands.parser("train e2e", __doc__)
    parser.add_argument(
        "--shape", action="append", choices=PLANS, help="may be repeated; default 11m on a CPU, else 1b"
    )
    parser.add_argument("--caps", action="store_true", help="at the largest batch under caps of memory")
    limits = f"default {GPU_LIMIT_S:.0f} on a GPU, none on a CPU"
    parser.add_argument("--time-limit", type=float, help=f"seconds after which nothing new starts; {limits}")
    args = commands.parse(parser, argv)
    on_a_cpu = args.device.type == "cpu"
    if args.time_limit is None and not on_a_cpu:
        args.deadline = time.monotonic() + GPU_LIMIT_S
    run(args.shape or ["11m" if on_a_cpu else "1b"], args.device, args.deadline, args.caps, args.out)
    return 0
