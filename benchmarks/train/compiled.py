"""Does torch.compile pay when the active set changes: eager, layer by layer, and the whole model?

Every variant trains a copy of one model on the same batches with the same draws, in turns of a few rounds each in
one process. A step in which dynamo made a graph counts as compiling: what it took beyond the variant's median step is
reported apart, and is part of the time "in all". Caches of compiled code are off.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks import record
from examples.model import Llama, LlamaConfig
from misa_kernels import MISA, ImportanceSampler, param_groups

# What the losses of two variants may differ by, relatively: float32 sums in another order, over hundreds of steps.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Plan:
    """What is trained, and how long.

    Attributes:
        config: Sizes of the model.
        batch: Sequences in a batch.
        sequence: Tokens in a sequence.
        delta: MISA's budget.
        inner_steps: Steps in a round.
        rounds: Rounds of every variant.
        turn: Rounds in a turn; divides `rounds`.
        backend: torch.compile's.
    """

    config: LlamaConfig = field(default_factory=lambda: LlamaConfig(width=128, hidden=352, layers=4))
    batch: int = 8
    sequence: int = 128
    delta: float = 0.1
    inner_steps: int = 5
    rounds: int = 100
    turn: int = 10
    backend: str = "inductor"


QUICK = Plan(LlamaConfig(width=32, hidden=88, layers=2), 2, 32, delta=0.25, inner_steps=2, rounds=12, turn=4)


def eager(model: Llama, backend: str) -> nn.Module:
    """Compile nothing."""
    return model


def by_layer(model: Llama, backend: str) -> nn.Module:
    """Compile each layer by itself; layers of one class share their graphs."""
    for layer in model.layers:
        layer.compile(backend=backend)
    return model


def whole(model: Llama, backend: str) -> nn.Module:
    """Compile the model as one."""
    return torch.compile(model, backend=backend)


# How to compile, and dynamo's limit: the documented one, and torch's default.
VARIANTS: dict[str, tuple[Callable[[Llama, str], nn.Module], int]] = {
    "eager": (eager, 8),
    "by_layer": (by_layer, 32),
    "whole": (whole, 8),
}


@dataclass
class Run:
    """A variant at work.

    Attributes:
        model: What is called.
        optimizer: What trains it.
        limit: dynamo's recompile_limit.
        step_s: Seconds of each step.
        graphs: Graphs that each step made.
        losses: Loss of each step.
        warned: Round after which the optimizer warned of recompilations, or None.
    """

    model: nn.Module
    optimizer: MISA
    limit: int
    step_s: list[float] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    warned: int | None = None

    def step(self, tokens: Tensor) -> None:
        """Take one training step."""
        torch._dynamo.config.recompile_limit = self.limit
        before = counters["stats"]["unique_graphs"]
        start = time.perf_counter()
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_s.append(time.perf_counter() - start)
        self.graphs.append(counters["stats"]["unique_graphs"] - before)
        self.losses.append(loss.item())
        if self.warned is None and any("torch.compile" in str(warning.message) for warning in caught):
            self.warned = len(self.step_s) // self.optimizer.inner_steps


def measure(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Train all variants in turns and return what they took.

    Raises:
        ArithmeticError: The variants did not do the same training, so that their times mean nothing.
    """
    torch._dynamo.reset()
    torch._inductor.config.force_disable_caches = True
    # The fall-back to eager is part of what is measured; the record has it as `warned` and `graphs`.
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    generator = torch.Generator().manual_seed(0)
    shape = (32, plan.batch, plan.sequence + 1)
    batches = torch.randint(plan.config.vocabulary, shape, generator=generator).to(device)
    runs = {}
    for name, (compiled, limit) in VARIANTS.items():
        torch.manual_seed(0)
        model = Llama(plan.config).to(device)
        sampler = ImportanceSampler(max_per_layer=1)
        options = {"delta": plan.delta, "inner_steps": plan.inner_steps, "sampler": sampler}
        optimizer = MISA(param_groups(model), lr=1e-4, **options)
        runs[name] = Run(compiled(model, plan.backend), optimizer, limit)
    for turn in range(plan.rounds // plan.turn):
        order = list(runs.values())
        for run in order if turn % 2 == 0 else order[::-1]:
            for _ in range(plan.turn * plan.inner_steps):
                run.step(batches[len(run.step_s) % len(batches)])
        took = ", ".join(f"{name} {sum(run.step_s):.1f} s, {sum(run.graphs)} graphs" for name, run in runs.items())
        print(f"after {(turn + 1) * plan.turn} rounds: {took}", flush=True)
    expected = torch.tensor(runs["eager"].losses)
    for name, run in runs.items():
        difference = float(((torch.tensor(run.losses) - expected).abs() / expected).max())
        if not difference < TOLERANCE:
            raise ArithmeticError(f"losses of {name} differ by {difference:.1e} from eager and must by < {TOLERANCE}")
    return {name: summary(run, runs["eager"], plan) for name, run in runs.items()}


def summary(run: Run, baseline: Run, plan: Plan) -> dict[str, Any]:
    """Return times and rates of a variant, beside those of eager."""
    tokens = plan.batch * plan.sequence
    typical = median(s for s, made in zip(run.step_s, run.graphs, strict=True) if not made)
    compiling = [max(s - typical, 0.0) for s, made in zip(run.step_s, run.graphs, strict=True) if made]
    total, compile_s, steps = sum(run.step_s), sum(compiling), len(run.step_s)
    # Turn by turn, so that what else the machine does meanwhile hits both.
    size = plan.turn * plan.inner_steps
    ratios = [
        sum(baseline.step_s[i : i + size]) / sum(run.step_s[i : i + size])
        for i in range(0, steps, size)
        if not any(run.graphs[i : i + size])
    ]
    saved = (sum(baseline.step_s) - (total - compile_s)) / steps
    return {
        "graphs": sum(run.graphs),
        "graphs_by_turn": [sum(run.graphs[i : i + size]) for i in range(0, steps, size)],
        "recompile_limit": run.limit,
        "warned_after_round": run.warned,
        "compile_s": compile_s,
        "seconds_in_all": total,
        "tokens_per_second_in_all": tokens * steps / total,
        "tokens_per_second_without_compiling": tokens * steps / (total - compile_s),
        "speed_by_turn_without_compiling": ratios,
        "speed_without_compiling": sum(baseline.step_s) / (total - compile_s),
        "speed_in_all": sum(baseline.step_s) / total,
        "steps_until_it_pays": math.ceil(compile_s / saved) if compile_s and saved > 0 else None,
        "first_loss": run.losses[0],
        "last_loss": run.losses[-1],
    }


def table(variants: dict[str, Any]) -> str:
    """Return the figures that matter, as lines of text."""
    titles = ("graphs", 8), ("compiling", 12), ("tokens/s", 12), ("in all", 10), ("speed", 8), ("in all", 8)
    lines = [" " * 10 + "".join(f"{title:>{width}}" for title, width in (*titles, ("pays after", 14)))]
    for name, row in variants.items():
        pays = row["steps_until_it_pays"]
        lines.append(
            f"{name:10}{row['graphs']:8}{row['compile_s']:10.1f} s{row['tokens_per_second_without_compiling']:12,.0f}"
            f"{row['tokens_per_second_in_all']:10,.0f}{row['speed_without_compiling']:8.2f}{row['speed_in_all']:8.2f}"
            f"{'' if pays is None else f'{pays:,} steps':>14}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table and write compiled.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train compiled", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds")
    parser.add_argument("--backend", default="inductor", help="torch.compile's (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for compiled.json")
    options = parser.parse_args(arguments)
    plan = QUICK if options.quick else Plan()
    plan = Plan(**{**vars(plan), "backend": options.backend})
    device = torch.device(options.device)
    variants = measure(plan, device)
    print(table(variants))
    content = record.environment(device) | {"plan": asdict(plan), "variants": variants}
    print(record.write(options.out, "compiled", content))


if __name__ == "__main__":
    main()
