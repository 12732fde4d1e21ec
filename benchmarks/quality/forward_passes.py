"""Without a backward pass, how far does training come, by number of forward passes, beside training with one?

From the repository's root: `python -m benchmarks.quality run --model small-forward [--workers N]` trains what is
missing, as often as it is started; `table` writes benchmarks/results/forward_passes.{json,md,png}. What has a backward
pass comes from the runs of `update_rules.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks import charts, record
from benchmarks.quality import regime, regime_table, update_rules
from benchmarks.quality.equal_bytes import parameters
from benchmarks.quality.methods import Plan, follow
from benchmarks.quality.regime_runs import SCALES, Job, at, first
from benchmarks.quality.rules_runs import REFERENCES
from benchmarks.quality.searches import Search, outcome, read, run_all
from benchmarks.quality.update_rules import Runs
from benchmarks.tables import cells
from examples.demo.data import Batch, finetuning_corpus, random_batches
from examples.demo.train import batch_loss, warmup_cosine
from examples.neighbours.forward_only import ForwardGradients
from misa_kernels import MISA, UniformSampler, param_groups, slices

RESULTS = regime.RESULTS
RUNS = "forward_passes-runs.jsonl"
SCALE = SCALES["5m"]
# As many forward passes as the 400 steps with backward come to.
STEPS, WINDOW = 600, 30
DELTA = 0.03
# A backward pass costs two forward ones, where all layers pass gradients on.
PASSES_OF_A_STEP = 3
# The same with a backward pass, by the names that they have in `update_rules.py`.
BESIDE = {"AdamW": "AdamW", "slices": "slices", "MISA": "modules"}


@dataclass(frozen=True)
class Kind:
    """What moves along a random direction, and how.

    Attributes:
        drawn: "slices", "modules" or "all", the published MeZO's.
        power: Of the learning rate in the middle of the search, see `regime.lr_of`.
        rank: Of the subspaces, see `ForwardGradients`.
        is_adamw: Whether AdamW makes the update of the estimate; if not, SGD.
    """

    drawn: str
    power: int
    rank: int | None = None
    is_adamw: bool = False


KINDS = {
    "MeZO": Kind("all", -5),
    "MeZO, modules": Kind("modules", 0),
    "MeZO, slices": Kind("slices", 0),
    "MeZO, slices, AdamW": Kind("slices", 0, is_adamw=True),
    "SubZero, modules": Kind("modules", 4, rank=16),
    "SubZero, slices": Kind("slices", 4, rank=16),
}


def search(method: str) -> Search:
    """Return the search for a method's learning rate, and its reported runs."""
    kind = KINDS[method]
    delta = 1.0 if kind.drawn == "all" else DELTA
    return Search(1 + kind.is_adamw, first(method, "fp32", delta, power=kind.power), at(3, delta))


SEARCHES = tuple(map(search, KINDS))


def build(job: Job, model: nn.Module, lr: float) -> MISA:
    """Return the optimizer of a run; without a rule there are no moments."""
    kind = KINDS[job.method]
    update: dict[str, Any] = {"lr": lr}
    if not kind.is_adamw:
        update = {"rule": lambda params: torch.optim.SGD(params, lr=lr)}
    drawn: dict[str, dict[str, Any]] = {
        "slices": slices(),
        "modules": {"sampler": UniformSampler(), "total_steps": STEPS},
        # All matrices are in every round; embedding and norms are trained beside them.
        "all": {},
    }
    groups = param_groups(model, "pretrain" if kind.drawn == "all" else "finetune")
    return MISA(groups, delta=job.delta, seed=job.seed, **drawn[kind.drawn], **update)


def train(
    model: nn.Module, optimizer: MISA, batches: Iterator[Batch], steps: int, *, gradients: ForwardGradients
) -> Iterator[tuple[int, float]]:
    """Train as the demo's loop, by gradients of two forward passes."""
    schedule = LambdaLR(optimizer, warmup_cosine(steps))
    for step in range(1, steps + 1):
        loss = gradients(partial(batch_loss, model, next(batches)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield step, loss


def by_passes(run: Mapping[str, Any], a_step: int) -> dict[str, Any]:
    """Return a run's steps, the forward passes that they come to, and its curve by these."""
    steps = run["curve"][-1][0]
    curve = [(a_step * step, loss) for step, _, loss in run["curve"]]
    return {"steps": steps, "passes": a_step * steps, "curve": curve}


def execute(job: Job, steps: int = STEPS, window: int = WINDOW) -> dict[str, Any]:
    """Train once and return key and result of the run as plain types; the curve is by forward passes."""
    torch.set_num_threads(1)
    model, lr = regime.new_model(SCALE), regime.lr_of(job, SCALE)
    model.load_state_dict(regime.base_weights(SCALE))
    before = regime.losses_before(job.task, SCALE)
    batches = random_batches(finetuning_corpus().train, SCALE.batch, SCALE.shape.context, job.seed)
    optimizer = build(job, model, lr)
    gradients = ForwardGradients(optimizer, rank=KINDS[job.method].rank, seed=job.seed)
    found = follow(model, optimizer, batches, Plan(lr, steps, window), partial(train, gradients=gradients))
    found |= by_passes(found, gradients.forwards // steps)
    return asdict(job) | {"lr": lr} | found | before | regime.held_out_losses(job.task, model, SCALE)


def run_missing(workers: int) -> dict[Job, str]:
    """Train what the table wants and has not; return the error of each run that failed."""
    regime.base_weights(SCALE)
    return run_all(SEARCHES, execute, RESULTS / RUNS, Job, workers)


def beside() -> list[dict[str, Any]]:
    """Return the reported runs with a backward pass, with the passes that their steps come to."""
    _, reporting, _ = outcome(REFERENCES, read(RESULTS / update_rules.RUNS, Job))
    return [
        run | {"method": f"{BESIDE[run['method']]}, backward"} | by_passes(run, PASSES_OF_A_STEP) for run in reporting
    ]


def summary(tuning: Runs, reporting: Runs, first_order: Runs) -> dict[str, Any]:
    """Return rows, the best first, curves and searches as plain types.

    Args:
        tuning: Runs of the searches for learning rates.
        reporting: Runs at the rates found.
        first_order: What `beside` returns; shares are of what AdamW gains there with the same seed.
    """
    gains = {run["seed"]: run["loss_before"] - run["loss"] for run in first_order if run["method"] == "AdamW, backward"}
    arms: dict[str, list[dict[str, Any]]] = {}
    for run in (*first_order, *reporting):
        if run["seed"] in gains:
            share = (run["loss_before"] - run["loss"]) / gains[run["seed"]]
            arms.setdefault(run["method"], []).append(run | {"share": share})
    rows = []
    for runs in arms.values():
        row = {name: runs[0][name] for name in ("method", "delta", "lr", "steps", "passes")}
        rows.append(row | regime_table.means(runs, "share", "loss") | {"seeds": sorted(run["seed"] for run in runs)})
    rows.sort(key=lambda row: -row["share"])
    curves = {
        row["method"]: [
            [statistics.mean(values) for values in zip(*point, strict=True)]
            for point in zip(*(run["curve"] for run in arms[row["method"]]), strict=True)
        ]
        for row in rows
    }
    found = {"rows": rows, "curves": curves, "tuning": regime_table.searches(tuning)}
    return found | {"machines": regime_table.machines(tuning, reporting, first_order)}


def lines(content: Mapping[str, Any]) -> list[str]:
    """Return the table in Markdown."""
    found = (
        (
            row["method"],
            f"{row['delta']:g}",
            f"{row['steps']:,}",
            f"{row['passes']:,}",
            f"{row['lr']:g}",
            regime_table.spread(row, "share", 100, 1),
            regime_table.spread(row, "loss", 1, 3),
            str(len(row["seeds"])),
        )
        for row in content["rows"]
    )
    header = "method | δ | steps | forward passes | lr | share of AdamW's gain, % | loss, nats a byte | seeds"
    return cells(header, found)


def markdown(content: Mapping[str, Any]) -> str:
    """Return the table with what it means, and the losses by learning rate."""
    tried = (
        (search["method"], ", ".join(f"{lr}: {loss:.4f}" for lr, loss in search["losses"].items()))
        for search in content["tuning"]
    )
    shape, millions = content["scale"]["shape"], content["scale"]["parameters"] / 1e6
    found = [
        "# Without a backward pass",
        "",
        "```",
        "python -m benchmarks.quality run --model small-forward",
        "python -m benchmarks.quality table --model small-forward",
        "```",
        "",
        "Fine-tuning as in `benchmarks/results/rules.md`, from which the lines with *backward* are: a byte-level "
        f"LLaMA of {shape['layers']} layers, {millions:.1f} million float32 parameters, from Python to C++ "
        f"headers, {content['scale']['batch'] * shape['context']} bytes a step, on a CPU. A backward pass counts "
        "as two forward ones. *MeZO* moves all weights, the others modules drawn uniformly or slices of each down "
        f"projection at δ = {DELTA:g}; updates are those of SGD unless AdamW is named. *SubZero*: 16 directions on "
        "each side of a matrix, for 100 steps. Learning rates: three, a factor 2 apart, and one more while the "
        "best lies at an end, on a seed and a text of their own; up for a tenth of the steps, then down along a "
        "cosine. The share is of AdamW's improvement on text that was neither trained nor tuned on, mean ± "
        "standard deviation over 3 seeds.",
        "",
        regime_table.ran(content),
        "",
        *lines(content),
        "### Losses by learning rate, on the tuning text",
        "",
        *cells("method | lr: nats", tried),
    ]
    return "\n".join(found)


def draw(curves: Mapping[str, Any], path: Path) -> Path | None:
    """Draw the training loss against steps and against forward passes; None without matplotlib."""
    by_step = {
        name: [(passes / (PASSES_OF_A_STEP if name.endswith("backward") else 2), loss) for passes, loss in points]
        for name, points in curves.items()
    }
    panels = {"by step": ("steps", by_step), "by forward pass": ("forward passes", curves)}
    return charts.lines(path, panels, "training loss, nats a byte", curves, powers=False)


def write_tables() -> None:
    """Write forward_passes.json, .md and .png from the finished runs."""
    tuning, reporting, missing = outcome(SEARCHES, results := read(RESULTS / RUNS, Job))
    scale = asdict(SCALE) | {"parameters": parameters(regime.new_model(SCALE))}
    content = record.environment(torch.device("cpu")) | {"scale": scale, "missing": missing}
    content |= summary(tuning, reporting, beside())
    record.write(RESULTS, "forward_passes", content)
    (RESULTS / "forward_passes.md").write_text(markdown(content), encoding="utf-8")
    print(markdown(content), draw(content["curves"], RESULTS / "forward_passes.png"))
    print(f"{len(results)} runs, {missing} more wanted; written: {RESULTS}/forward_passes.json, .md, .png")
