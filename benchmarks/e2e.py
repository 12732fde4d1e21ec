"""How many tokens a second does a whole training iteration reach with MISA, and with its peers?

python -m benchmarks.e2e --device cpu --out DIR           at equal batch: a table, the goals, DIR/e2e.json and .png
python -m benchmarks.e2e --device cpu --caps --out DIR    at the largest batch under caps of memory: DIR/caps.json

Every peer trains the same model on the same batch in turns of one process, each built anew and freed, or where there is
room all beside one another: turn 1 in the order of `PEERS`, turn 2 in reverse, so that a drift of the clocks hits all
alike.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import charts, llama, record
from benchmarks.llama import LINEARS, Llama, Shape
from benchmarks.memory import PeakMemory
from misa_kernels import MISA, ImportanceSampler, badam, lisa, param_groups

# Small, because the weights are random and only time counts; the update costs the same.
LR = 1e-5
LORA_RANK = 16
GIB = 2**30
TIMES = ("forward_ms", "backward_ms", "optimizer_ms", "switch_ms")
# As deep as the small models that people train, and of a size that two cores train on.
SHAPES = llama.SHAPES | {"11m": Shape(vocab=2048, hidden=192, intermediate=512, layers=24, heads=6, kv_heads=6)}
# Dense bfloat16 operations a second that the makers state for tensor cores, by a part of the device's name.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989.4e12, "H200": 989.4e12, "A100": 312e12, "B200": 2250e12}
# What was asked for: of tokens per second at equal batch, of the time of an iteration.
GOALS = (
    ("misa", "adamw", 1.45),
    ("misa", "lora", 1.15),
    ("misa", "badam_package", 1.0),
    ("misa_window", "misa", 1.25),
)
OPTIMIZER_SHARE = 0.01
# Steps of a round in an ordinary run, MISA's default and BAdam's; the rounds here are shorter, to see many draws.
ROUND = 50
OURS = ("badam", "lisa", "misa", "misa_window")


@dataclass(frozen=True)
class Plan:
    """What is trained, and how long.

    Attributes:
        shape: A key of `SHAPES`.
        batch: Sequences in a batch.
        sequence: Tokens in a sequence.
        delta: MISA's and BAdam's budget: room for one whole layer, which BAdam needs.
        checkpointing: Keep the layers' inputs alone and compute activations again in the backward pass.
        inner_steps: Steps in a round of a sampler: few, so that many draws are seen.
        rounds: Rounds of a sampler in a turn, an even number for the two halves of the window; BAdam gets as
            many more as it needs to visit each layer equally often.
        steps: Iterations in a turn of a peer without rounds.
        turns: How often each peer has its turn.
        together: Whether all peers stay, each with a model of its own, and take short turns of `rounds` rounds, so that
            what else the machine does hits all alike; turns times rounds are then to visit all layers equally often.
        dtype: Of the weights.
        caps_bytes: Memory under which the largest batch is looked for, up to `largest_batch` sequences.
        largest_batch: Where the search ends.
    """

    shape: str
    batch: int
    sequence: int
    delta: float
    checkpointing: bool
    inner_steps: int
    rounds: int
    steps: int = 20
    turns: int = 2
    together: bool = False
    dtype: str = "bfloat16"
    caps_bytes: tuple[int, ...] = (24 * GIB, 48 * GIB, 80 * GIB)
    largest_batch: int = 16

    @property
    def tokens(self) -> int:
        """Tokens in a batch."""
        return self.batch * self.sequence


# In the order of their worth: what the time limit cuts off is at the end.
PLANS = {
    "8b": Plan("8b", 2, 2048, delta=0.03, checkpointing=True, inner_steps=2, rounds=12),
    "1b": Plan("1b", 4, 2048, delta=0.05, checkpointing=False, inner_steps=5, rounds=12),
    "130m": Plan("130m", 32, 512, delta=0.06, checkpointing=False, inner_steps=5, rounds=12),
    # Of float32, which CPUs multiply fastest. 1.5, 3 and 5 times the weights' bytes, as 24, 48 and 80 GiB are of 8B's.
    "11m": Plan(
        shape="11m",
        batch=2,
        sequence=128,
        delta=0.05,
        checkpointing=True,
        inner_steps=2,
        rounds=1,
        steps=2,
        turns=24,
        together=True,
        dtype="float32",
        caps_bytes=tuple(int(times * 45_650_000) for times in (1.5, 3, 5)),
    ),
    "tiny": Plan(
        shape="tiny",
        batch=2,
        sequence=32,
        delta=0.2,
        checkpointing=True,
        inner_steps=2,
        rounds=4,
        steps=4,
        caps_bytes=(450_000, 650_000),
        largest_batch=4,
    ),
}


@dataclass
class Peer:
    """An optimizer at work on the model.

    Attributes:
        optimizer: What trains.
        close: Takes back what it changed in the model.
        rounds: Rounds of a turn, 0 for an optimizer without rounds.
        early: Steps before the last of a round in which the switch to the next is made.
    """

    optimizer: torch.optim.Optimizer
    close: Callable[[], object]
    rounds: int = 0
    early: int = 0


def nothing() -> None:
    """Take nothing back."""


def full_adamw(model: Llama, plan: Plan, seed: int) -> Peer:
    """AdamW of every weight; its moments have the weights' dtype, the smallest and fastest it offers."""
    return Peer(torch.optim.AdamW(model.parameters(), lr=LR, fused=True), nothing)


def adamw_8bit(model: Llama, plan: Plan, seed: int) -> Peer:
    """Bitsandbytes' AdamW of every weight, moments in 8 bits."""
    from bitsandbytes.optim import AdamW8bit

    return Peer(AdamW8bit(model.parameters(), lr=LR), nothing)


def flash_adamw(model: Llama, plan: Plan, seed: int) -> Peer:
    """FlashOptim's AdamW of every weight, moments in 8 bits, bfloat16 weights with 8 bits of correction."""
    from flashoptim import FlashAdamW

    bits = 24 if plan.dtype == "bfloat16" else None
    return Peer(FlashAdamW(model.parameters(), lr=LR, master_weight_bits=bits), nothing)


def lora(model: Llama, plan: Plan, seed: int) -> Peer:
    """AdamW of peft's LoRA adapters on all linear layers of the blocks, in the weights' dtype, its fastest form."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=list(LINEARS))
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    return Peer(torch.optim.AdamW(trained, lr=LR, fused=True), adapted.unload)


def sampled(model: Llama, plan: Plan, seed: int, **options: Any) -> Peer:
    """MISA with the draw that `options` describe."""
    optimizer = MISA(param_groups(model), lr=LR, delta=plan.delta, inner_steps=plan.inner_steps, seed=seed, **options)
    return Peer(optimizer, optimizer.release, plan.rounds)


def whole_cycles(plan: Plan) -> int:
    """Return the rounds of a turn in which each layer is visited equally often."""
    layers = SHAPES[plan.shape].layers
    return layers * math.ceil(plan.rounds / layers)


def badam_package(model: Llama, plan: Plan, seed: int) -> Peer:
    """BAdam's own package: fused AdamW of float32 copies of one layer's weights and norms, the first layer first."""
    from badam import BlockOptimizer

    class Quiet(BlockOptimizer):
        # It prints the names of each layer, whatever `verbose` says.
        def switch_trainable_params(self, verbose: int | None = 0) -> None:
            super().switch_trainable_params(verbose)

    base = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # Float32 weights are not what it is made for, it says.
        warnings.simplefilter("ignore")
        optimizer = Quiet(
            base,
            list(model.named_parameters()),
            switch_block_every=plan.inner_steps,
            switch_mode="ascending",
            verbose=0,
        )
    return Peer(optimizer, nothing, whole_cycles(plan), early=1)


def badam_layers(model: Llama, plan: Plan, seed: int) -> Peer:
    """The BAdam preset: whole layers in turn."""
    return replace(sampled(model, plan, seed, **badam()), rounds=whole_cycles(plan))


def lisa_layers(model: Llama, plan: Plan, seed: int) -> Peer:
    """The LISA preset: whole layers at random; embedding and head frozen, as with the other samplers here."""
    return sampled(model, plan, seed, **lisa())


def misa_modules(model: Llama, plan: Plan, seed: int) -> Peer:
    """MISA with its defaults."""
    return sampled(model, plan, seed)


def misa_window(model: Llama, plan: Plan, seed: int) -> Peer:
    """MISA that draws each round from a window of half the layers."""
    window = SHAPES[plan.shape].layers // 2
    return sampled(model, plan, seed, sampler=ImportanceSampler(depth_window=window))


PEERS: dict[str, Callable[[Llama, Plan, int], Peer]] = {
    "adamw": full_adamw,
    "adamw_8bit": adamw_8bit,
    "flashoptim": flash_adamw,
    "lora": lora,
    "badam_package": badam_package,
    "badam": badam_layers,
    "lisa": lisa_layers,
    "misa": misa_modules,
    "misa_window": misa_window,
}


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
    peer = PEERS[name](model, plan, turn)
    for _ in range(plan.inner_steps):
        iterate(model, tokens, peer.optimizer, Clock(tokens.device))
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
        ends_round = peer.rounds and (number + peer.early) % plan.inner_steps == 0
        (samples.switch_ms if ends_round else samples.optimizer_ms).append(clock.ms(backward, end))
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
    optimizer_ms = sum(samples.optimizer_ms) + sum(samples.switch_ms)
    return {
        "tokens_per_second": tokens * iterations / seconds,
        "tokens_per_second_by_turn": [tokens * n / s for n, s in zip(samples.iterations, samples.wall_s, strict=True)],
        "iterations": iterations,
        "rounds": samples.rounds,
        **{
            name: spread(getattr(samples, name))
            for name in ("forward_ms", "backward_ms", "optimizer_ms", "switch_ms", "iteration_ms")
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


def measure(plan: Plan, device: torch.device, deadline: float) -> Iterator[dict[str, Any]]:
    """Measure all peers on one shape, and yield the record so far after each turn.

    Args:
        plan: What to train.
        device: Where.
        deadline: Reading of `time.monotonic` after which no turn starts that is not expected to end by then.

    Yields:
        A dict with the plan under "plan", a summary of each peer (or its error) under "peers", and the turns
        that the deadline left out under "left_out".
    """
    model, tokens = build_model(plan, device), tokens_of(plan, device)
    content = head_of(plan, model)
    peak, content["peak_flops_from"] = peak_flops(plan, device)
    flops = model_flops(plan)
    content |= {"peak_flops": peak, "model_flops": flops}
    taken = {name: Samples() for name in PEERS}
    standing: dict[str, tuple[Llama, Peer]] = {}
    longest = 0.0
    for turn in range(plan.turns):
        for name in list(PEERS)[:: -1 if turn % 2 else 1]:
            if "error" in content["peers"].get(name, {}):
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
                content["peers"][name] = failure(error)
            longest = max(longest, time.monotonic() - started)
            # In the order of `PEERS`, which the turns are not.
            content["peers"] = {peer: content["peers"][peer] for peer in PEERS if peer in content["peers"]}
            yield content


def failure(error: Exception) -> dict[str, Any]:
    """Return what the record says of a peer that failed."""
    return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def head_of(plan: Plan, model: Llama) -> dict[str, Any]:
    """Return what the record of a shape begins with."""
    return {
        "plan": asdict(plan) | {"tokens": plan.tokens, "lr": LR, "lora_rank": LORA_RANK},
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
    """Return the model on the device, its weights drawn there."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, plan.dtype))
    try:
        with device:
            return Llama(SHAPES[plan.shape], plan.checkpointing)
    finally:
        torch.set_default_dtype(default)


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
        print(caps_table(content["shapes"]))
    else:
        content["goals"] = goals(content["shapes"])
        print(table(content["shapes"]) + "\n" + verdict(content["goals"]))
    print(f"commit {content['commit']}, {content['device']['name']}, torch {torch.__version__}")
    if out is not None:
        print(record.write(out, name, content))
        if not caps:
            draw(content["shapes"], out / "e2e.png")
    return content["shapes"]


def main(argv: list[str] | None = None) -> int:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.e2e", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--shape", action="append", choices=PLANS, help="may be repeated; default 11m on a CPU, else 1b"
    )
    parser.add_argument("--caps", action="store_true", help="at the largest batch under caps of memory")
    parser.add_argument("--out", type=Path, help="folder of the record and the chart")
    parser.add_argument("--threads", type=int, help="of a CPU; default what torch takes")
    parser.add_argument("--time-limit", type=float, default=440.0, help="seconds after which nothing new starts")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    names = args.shape or ["11m" if args.device == "cpu" else "1b"]
    run(names, torch.device(args.device), time.monotonic() + args.time_limit, args.caps, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
