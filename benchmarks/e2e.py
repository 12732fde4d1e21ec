"""How many tokens a second does a whole training iteration reach with MISA, and with its peers?

Every peer trains the same model on the same batch in turns of one process, each built anew and freed:
turn 1 in the order of `PEERS`, turn 2 in reverse, so that a drift of the clocks hits all alike.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.llama import LINEARS, SHAPES, Llama
from misa_kernels import MISA, ImportanceSampler, badam, param_groups

# Small, because the weights are random and only time counts; the update costs the same.
LR = 1e-5
LORA_RANK = 16
GIB = 2**30
TIMES = ("forward_ms", "backward_ms", "optimizer_ms", "switch_ms")


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

    @property
    def tokens(self) -> int:
        """Tokens in a batch."""
        return self.batch * self.sequence


# In the order of their worth: what the time limit cuts off is at the end.
PLANS = {
    "8b": Plan("8b", 2, 2048, delta=0.03, checkpointing=True, inner_steps=2, rounds=12),
    "1b": Plan("1b", 4, 2048, delta=0.05, checkpointing=False, inner_steps=5, rounds=12),
    "130m": Plan("130m", 32, 512, delta=0.06, checkpointing=False, inner_steps=5, rounds=12),
    "tiny": Plan("tiny", 2, 32, delta=0.2, checkpointing=True, inner_steps=2, rounds=4, steps=4),
}


@dataclass
class Peer:
    """An optimizer at work on the model.

    Attributes:
        optimizer: What trains.
        close: Takes back what it changed in the model.
        rounds: Rounds of a turn, 0 for an optimizer without rounds.
    """

    optimizer: torch.optim.Optimizer
    close: Callable[[], object]
    rounds: int = 0


def full_adamw(model: Llama, plan: Plan, seed: int) -> Peer:
    """AdamW of every weight; its moments have the weights' bfloat16, the smallest and fastest it offers."""
    return Peer(torch.optim.AdamW(model.parameters(), lr=LR, fused=True), close=lambda: None)


def lora(model: Llama, plan: Plan, seed: int) -> Peer:
    """AdamW of peft's LoRA adapters on all linear layers of the blocks; bfloat16 too, its fastest form."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=list(LINEARS))
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    return Peer(torch.optim.AdamW(trained, lr=LR, fused=True), adapted.unload)


def sampled(model: Llama, plan: Plan, seed: int, **options: Any) -> Peer:
    """MISA with the draw that `options` describe."""
    optimizer = MISA(param_groups(model), lr=LR, delta=plan.delta, inner_steps=plan.inner_steps, seed=seed, **options)
    return Peer(optimizer, optimizer.release, plan.rounds)


def badam_layers(model: Llama, plan: Plan, seed: int) -> Peer:
    """The BAdam preset: whole layers in turn."""
    layers = SHAPES[plan.shape].layers
    rounds = layers * math.ceil(plan.rounds / layers)
    return replace(sampled(model, plan, seed, **badam()), rounds=rounds)


def misa_modules(model: Llama, plan: Plan, seed: int) -> Peer:
    """MISA with its defaults."""
    return sampled(model, plan, seed)


def misa_window(model: Llama, plan: Plan, seed: int) -> Peer:
    """MISA that draws each round from a window of half the layers."""
    window = SHAPES[plan.shape].layers // 2
    return sampled(model, plan, seed, sampler=ImportanceSampler(depth_window=window))


PEERS: dict[str, Callable[[Llama, Plan, int], Peer]] = {
    "adamw": full_adamw,
    "lora": lora,
    "badam": badam_layers,
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
    """Build the peer `name`, warm it up for a round, measure its turn into `samples`, and free it.

    Raises:
        ArithmeticError: The loss is not finite, so that what was timed was no training.
    """
    clock = Clock(tokens.device)
    reset(model)
    peer = PEERS[name](model, plan, turn)
    iterations = peer.rounds * plan.inner_steps or plan.steps
    try:
        for _ in range(plan.inner_steps):
            iterate(model, tokens, peer.optimizer, clock)
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
    finally:
        peer.close()
    if not math.isfinite(samples.loss):
        raise ArithmeticError(f"loss={samples.loss} must be finite: times of diverged weights mean nothing")
    samples.iterations.append(iterations)
    samples.rounds += peer.rounds
    for number, (start, forward, backward, end) in enumerate(marks, start=1):
        samples.forward_ms.append(clock.ms(start, forward))
        samples.backward_ms.append(clock.ms(forward, backward))
        ends_round = peer.rounds and number % plan.inner_steps == 0
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


def summary(samples: Samples, tokens: int) -> dict[str, Any]:
    """Return mean, p10 and p90 of the times, tokens per second over all turns, memory and depth."""
    seconds = sum(samples.wall_s)
    return {
        "tokens_per_second": tokens * sum(samples.iterations) / seconds,
        "tokens_per_second_by_turn": [tokens * n / s for n, s in zip(samples.iterations, samples.wall_s, strict=True)],
        "iterations": sum(samples.iterations),
        "rounds": samples.rounds,
        **{
            name: spread(getattr(samples, name))
            for name in ("forward_ms", "backward_ms", "optimizer_ms", "switch_ms", "iteration_ms")
        },
        "backward_depth": spread(samples.backward_depth),
        "peak_allocated_bytes": max(samples.allocated_bytes, default=None),
        "peak_reserved_bytes": max(samples.reserved_bytes, default=None),
        "loss": samples.loss,
    }


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
    torch.manual_seed(0)
    model = build_model(plan, device)
    tokens = torch.randint(model.shape.vocab, (plan.batch, plan.sequence), device=device)
    record: dict[str, Any] = {
        "plan": asdict(plan) | {"lr": LR, "lora_rank": LORA_RANK, "dtype": "bfloat16"},
        "parameters": sum(p.numel() for p in model.parameters()),
        "peers": {},
        "left_out": [],
    }
    taken = {name: Samples() for name in PEERS}
    longest = 0.0
    for turn in range(plan.turns):
        for name in list(PEERS)[:: -1 if turn % 2 else 1]:
            if "error" in record["peers"].get(name, {}):
                continue
            started = time.monotonic()
            if started + longest > deadline:
                record["left_out"].append(f"{plan.shape}: {name}, turn {turn + 1}")
                yield record
                continue
            try:
                run_turn(model, tokens, name, plan, turn, taken[name])
                record["peers"][name] = summary(taken[name], plan.tokens)
            # Whatever one peer fails at, the numbers of the others are kept; the record shows the failure.
            except Exception as error:
                record["peers"][name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            longest = max(longest, time.monotonic() - started)
            yield record


def build_model(plan: Plan, device: torch.device) -> Llama:
    """Return the model in bfloat16 on the device, its weights drawn there."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return Llama(SHAPES[plan.shape], plan.checkpointing)
    finally:
        torch.set_default_dtype(default)


def table(records: list[dict[str, Any]]) -> str:
    """Return the measurements as lines of text, a peer each."""
    lines = [
        f"{'shape':<6}{'peer':<13}{'tokens/s':>10}{'forward':>9}{'backward':>10}{'step':>8}{'switch':>8} ms"
        f"{'peak GiB':>10}{'reserved':>9}{'depth':>7}"
    ]
    for record in records:
        for name, peer in record["peers"].items():
            head = f"{record['plan']['shape']:<6}{name:<13}"
            if "error" in peer:
                lines.append(f"{head} {peer['error'][:70]}")
                continue
            times = [peer[key]["mean"] if peer[key] else math.nan for key in TIMES]
            peak, reserved = ((peer[key] or math.nan) / GIB for key in ("peak_allocated_bytes", "peak_reserved_bytes"))
            lines.append(
                f"{head}{peer['tokens_per_second']:>10,.0f}{times[0]:>9.2f}{times[1]:>10.2f}{times[2]:>8.2f}"
                f"{times[3]:>8.2f}   {peak:>10.1f}{reserved:>9.1f}{peer['backward_depth']['mean']:>7.1f}"
            )
    return "\n".join(lines)
