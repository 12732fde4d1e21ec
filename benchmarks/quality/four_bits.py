"""Over a base of 4 bits, are slices as good as QLoRA's adapters in as many bytes, as quick, and in no more memory?

SmolLM2 as in `pretrained.py`, its matrices in NF4: `python -m benchmarks.quality run --model smollm2-4bit` trains what
is missing, as often as it is started, and `table` writes benchmarks/results/four_bits.{json,md}. Beside the `bench`
extra it needs `pip install bitsandbytes peft`.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from torch import nn

from benchmarks import record
from benchmarks.memory import PeakMemory
from benchmarks.quality import pretrained, pretrained_table, texts
from benchmarks.quality.equal_bytes import (
    FP32_BYTES,
    LOW_RANK,
    MISA_STATE_BYTES,
    layers_of,
    lora,
    lora_bytes,
    misa_adamw,
    misa_bytes,
    nearest_rank,
    parameters,
)
from benchmarks.quality.methods import follow
from benchmarks.quality.pretrained import TASKS, first, searched
from benchmarks.quality.regime_runs import Job
from benchmarks.quality.regime_table import Runs, arms_of, machines, ran, row_of, searches
from benchmarks.quality.searches import outcome, read, run_all
from benchmarks.tables import cells
from examples.demo.train import train
from examples.neighbours import trained_scales
from examples.neighbours.four_bits import quantise
from misa_kernels.slice_adapters import add_slices

RESULTS, RUNS = pretrained.RESULTS, "four_bits-runs.jsonl"
SLICES, PEERS = "slices, 4 bits", ("QLoRA", "QLoRA, down")
DELTA = 0.03
# What trains scales alone, and what LoRA trains in as many bytes over the same integers, by their bits.
SCALES = {"PEQA, 4 bits": 4, "PEQA, 3 bits": 3}
OVER_INTEGERS = {"LoRA, 4 bits": 4, "LoRA, 3 bits": 3}
GROUP = 64
# There are so many scales, as a fraction of the parameters: 106 of 134.5 million are in matrices.
SCALES_DELTA = 0.0123
# The same over a base of float32, and what all shares are of.
REFERENCES = ("AdamW", "slices", "LoRA", "LoRA, down")
# Of a parameter beside the base: itself, its gradient, its moments.
ADAPTER_BYTES = 2 * FP32_BYTES + MISA_STATE_BYTES["int8"]
SEARCHES = (
    *(searched(stage, first(task, own, DELTA, 5)) for stage, task in enumerate(TASKS, 1) for own in (SLICES, *PEERS)),
    *(searched(3, first(TASKS[0], method, SCALES_DELTA, 3)) for method in SCALES),
    *(searched(3, first(TASKS[0], method, SCALES_DELTA, 5)) for method in OVER_INTEGERS),
)


@cache
def base() -> texts.Logits:
    """Return SmolLM2 with the matrices of its layers in 4 bits; whoever trains it copies it."""
    model = copy.deepcopy(texts.base())
    quantise(model.model)
    return model


def integers(bits: int) -> tuple[texts.Logits, list[nn.Parameter]]:
    """Return SmolLM2 with the matrices of its layers as integers, and their scales, which alone require a gradient."""
    model = copy.deepcopy(texts.base()).requires_grad_(False)
    (group,) = trained_scales.quantise(layers_of(model), bits, GROUP)
    return model, group["params"]


def dequantised(model: nn.Module) -> None:
    """Replace layers of integers by plain ones with the same weights, which LoRA knows, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, trained_scales.ScaledLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight = nn.Parameter(layer.weight(layer.scale.detach()), requires_grad=False)
            model.set_submodule(name, plain)


def build(job: Job, lr: float) -> tuple[nn.Module, torch.optim.Optimizer, float, int]:
    """Return what to train over the base, its optimizer, its size, a fraction or a rank, and its training bytes."""
    plain, bits = texts.base(), SCALES.get(job.method) or OVER_INTEGERS.get(job.method)
    if bits is not None:
        model, params = integers(bits)
        numel = sum(param.numel() for param in params)
        # The scales themselves are in the base.
        held = math.ceil(numel * (FP32_BYTES + MISA_STATE_BYTES["int8"]))
        if job.method in SCALES:
            return model, misa_adamw(params, lr), numel / parameters(plain), held
        dequantised(model)
        rank = nearest_rank("LoRA", plain, held)
        trained, optimizer = lora(model, rank, lr, job.seed, adamw=misa_adamw)
        return trained, optimizer, rank, lora_bytes(plain, rank)
    model, budget = copy.deepcopy(base()), misa_bytes(plain, job.state, job.delta)
    if job.method == SLICES:
        # Half a parameter more, as a fraction is rounded.
        delta = (int(budget / ADAPTER_BYTES) + 0.5) / parameters(plain)
        layers = add_slices(model, delta, seed=job.seed)
        params = [layer.delta for layer in layers.values()]
        numel = sum(param.numel() for param in params)
        return model, misa_adamw(params, lr), numel / parameters(plain), math.ceil(numel * ADAPTER_BYTES)
    kind = job.method[1:]
    rank = nearest_rank(kind, plain, budget)
    trained, optimizer = LOW_RANK[kind][1](model, rank, lr, job.seed, adamw=misa_adamw)
    return trained, optimizer, rank, LOW_RANK[kind][0](plain, rank)


def peak_bytes(job: Job) -> int:
    """Return the most bytes that tensors take in two training steps, weights and all."""
    plan = pretrained.plan_of(job)
    base()
    # Apart, as quantising passes through a copy in float32.
    with PeakMemory() as weights:
        trained, optimizer, _, _ = build(job, plan.lr)
    with PeakMemory() as memory:
        for _ in train(trained, optimizer, pretrained.batches_of(job), 2):
            pass
    return weights.held_bytes + memory.peak_bytes


def execute(job: Job) -> dict[str, Any]:
    """Train once and return key and result of the run as plain types."""
    torch.set_num_threads(1)
    plan, before = pretrained.plan_of(job), pretrained.losses_before(job.task)
    trained, optimizer, size, held = build(job, plan.lr)
    found = asdict(job) | {"lr": plan.lr, "size": size, "training_bytes": held}
    found |= follow(trained, optimizer, pretrained.batches_of(job), plan) | {"rounds_of": 0}
    # Shares are of what AdamW gains on the model as it was, so that what quantisation costs counts.
    found |= before | pretrained.held_out_losses(job, trained)
    return found | ({"peak_bytes": peak_bytes(job)} if job.seed == 1 else {})


def run_missing(workers: int) -> dict[Job, str]:
    """Train what the table wants and has not; return the error of each run that failed."""
    return run_all(SEARCHES, execute, RESULTS / RUNS, Job, workers)


def summary(tuning: Runs, reporting: Runs) -> dict[str, Any]:
    """Return rows, and by how much slices are ahead, by task, as plain types, with runs over float32 beside them."""
    tasks = [task for task in TASKS if any(run["task"] == task for run in reporting)]
    theirs, known, _ = outcome(pretrained.SEARCHES, read(RESULTS / pretrained.RUNS, Job))
    beside = [run for run in known if run["method"] in REFERENCES and run["delta"] in (1.0, DELTA)]
    arms = arms_of([*tuning, *theirs], [*reporting, *(run for run in beside if run["task"] in tasks)])
    rows = [row_of(key, runs) | {"peak_bytes": pretrained_table.peak_of(runs)} for key, runs in arms.items()]
    rows.sort(key=lambda row: (tasks.index(row["task"]), -row["share"]))
    shares = {
        (runs[0]["task"], runs[0]["method"]): {run["seed"]: run["share"] for run in runs} for runs in arms.values()
    }
    ahead = []
    pairs = [*((SLICES, peer) for peer in PEERS), *zip(SCALES, OVER_INTEGERS, strict=True)]
    for task, (method, beside) in ((task, pair) for task in tasks for pair in pairs):
        ours, peer = shares.get((task, method), {}), shares.get((task, beside), {})
        differences = [ours[seed] - peer[seed] for seed in ours.keys() & peer.keys()]
        if len(differences) > 1:
            error = statistics.stdev(differences) / math.sqrt(len(differences))
            lead = {"lead": statistics.mean(differences), "error": error}
            ahead.append({"task": task, "method": method, "beside": beside} | lead)
    return {"rows": rows, "leads": ahead, "tuning": searches(tuning), "machines": machines(tuning, reporting)}


def lines(content: Mapping[str, Any]) -> list[str]:
    """Return the tables in Markdown, one a task, and who is ahead."""
    found: list[str] = []
    for task in dict.fromkeys(row["task"] for row in content["rows"]):
        own = [pretrained_table.cells_of(row) for row in content["rows"] if row["task"] == task]
        found += [f"{task}:", "", *cells(pretrained_table.HEADER, own)]
    ahead = (
        (line["task"], line["method"], line["beside"], f"{100 * line['lead']:+.1f} ± {100 * line['error']:.1f}")
        for line in content["leads"]
    )
    return [*found, *cells("text | method | beside | ahead by, % of AdamW's gain, seeds paired, ± SE", ahead)]


def markdown(content: Mapping[str, Any]) -> str:
    """Return the tables with what they mean, and the losses by learning rate."""
    tried = (
        (search["task"], search["method"], ", ".join(f"{lr}: {loss:.4f}" for lr, loss in search["losses"].items()))
        for search in content["tuning"]
    )
    found = [
        "# Over a base of 4 bits",
        "",
        "```",
        "python -m benchmarks.quality run --model smollm2-4bit",
        "python -m benchmarks.quality table --model smollm2-4bit",
        "```",
        "",
        "As in `benchmarks/results/pretrained.md`, from which the lines over a base of float32 are: AdamW, slices and "
        f"LoRA at δ = {DELTA:g}. *Slices, 4 bits* and *QLoRA* have the matrices of the layers in NF4, of bitsandbytes, "
        "and train float32 beside them, with MISA's 8-bit AdamW, in the training bytes of slices, which are adapters "
        "of a slice of the input of each down projection (`misa_kernels.slice_adapters`). Shares are of "
        "what AdamW gains on the model as it was, so that what quantisation costs counts. *PEQA* trains the scales of "
        f"integers in groups of {GROUP} (`examples/neighbours/trained_scales.py`), and LoRA beside it is over the same "
        "integers in as many bytes; its time and peak are those of a base of float32, as peft knows no such format.",
        "",
        ran(content),
        "",
        *lines(content),
        "### Losses by learning rate, on the tuning text",
        "",
        *cells("text | method | lr: nats", tried),
    ]
    return "\n".join(found)


def write_tables() -> None:
    """Write four_bits.json and four_bits.md from the finished runs."""
    tuning, reporting, missing = outcome(SEARCHES, results := read(RESULTS / RUNS, Job))
    content = record.environment(torch.device("cpu")) | summary(tuning, reporting) | {"missing": missing}
    record.write(RESULTS, "four_bits", content)
    (RESULTS / "four_bits.md").write_text(markdown(content), encoding="utf-8")
    print(markdown(content))
    print(f"{len(results)} runs, {missing} more wanted; written: {RESULTS}/four_bits.json, .md")
