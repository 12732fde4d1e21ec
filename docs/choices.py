"""How much do δ, T and perplexity matter? The demo's fine-tuning with MISA, one of the three changed at a time.

From the repository's root: `python docs/choices.py` trains what is missing in docs/choices.jsonl, as often as it is
started, and prints the tables of docs/choosing.md; `--table` only prints. A run takes about 40 s of one core.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import torch

# Started as a file, Python looks for `examples` beside it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.demo.data import finetuning_corpus, random_batches, validation_batches
from examples.demo.methods import DELTA, METHODS
from examples.demo.runs import Settings, new_model, pretrain
from examples.demo.train import mean_loss, train
from misa_kernels import MISA, ImportanceSampler, param_groups

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "choices.jsonl"
LR = METHODS["MISA"].lr
# What `inner_steps="auto"` takes for 600 steps at this δ.
BASE = {"delta": DELTA, "inner_steps": 26, "perplexity": 0.5}
CHANGES = (
    {},
    {"inner_steps": 5},
    {"inner_steps": 75},
    {"perplexity": 0.25},
    {"perplexity": 2.0},
    {"delta": 0.03},
    {"delta": 0.25},
    {"delta": 0.5},
    {"inner_steps": 13},
    {"inner_steps": 150},
    {"perplexity": 1.0},
    {"delta": 0.06},
)
SEEDS = (0, 1)


def main() -> None:
    """Train what is missing, unless `--table` is given, and print the tables."""
    done = [json.loads(line) for line in OUT.read_text().splitlines()] if OUT.exists() else []
    settings = Settings()
    if "--table" not in sys.argv:
        weights = pretrained(settings)
        for seed in SEEDS:
            for choice in ({**BASE, **change, "seed": seed} for change in CHANGES):
                if any(choice.items() <= run.items() for run in done):
                    continue
                done.append({**choice, **run(settings, weights, **choice)})
                with OUT.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    for name in BASE:
        table(name, done)


def pretrained(settings: Settings) -> dict[str, torch.Tensor]:
    """Return the demo's pre-trained weights, kept for the next start."""
    path = ROOT / "out" / "choices.pt"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        torch.save(pretrain(settings, "cpu", lambda _: None), path)
    return torch.load(path)


def run(settings: Settings, weights: dict, delta: float, inner_steps: int, perplexity: float, seed: int) -> dict:
    """Fine-tune once; return the validation loss in nats a byte, and figures of the rounds."""
    corpus = finetuning_corpus()
    model = new_model(settings, "cpu")
    model.load_state_dict(weights)
    sampler = ImportanceSampler(perplexity=perplexity)
    optimizer = MISA(param_groups(model), lr=LR, delta=delta, inner_steps=inner_steps, sampler=sampler, seed=seed)
    batches = random_batches(corpus.train, settings.batch, settings.context, seed + 1)
    for _ in train(model, optimizer, batches, settings.finetune_steps):
        pass
    held_out = validation_batches(corpus.validation, 32, settings.context, settings.validation_batches)
    rounds = [record for record in optimizer.monitor.rounds if record.first_step < settings.finetune_steps]
    visited = [number for record in rounds for number in record.active]
    return {
        "loss": mean_loss(model, held_out),
        "visits": len(visited) / len(optimizer.modules),
        "unvisited": len(
            set(range(len(optimizer.modules))) - {number for record in rounds for number in record.active}
        ),
        "spread": statistics.mean(record.perplexity for record in rounds),
    }


def table(name: str, done: list[dict]) -> None:
    """Print what changing one argument did."""
    print(f"\n| `{name}` | loss | runs | visits of a module | never visited | exp(H(p)) |\n|---|---|---|---|---|---|")
    values = sorted({run[name] for run in done})
    for value in values:
        runs = [run for run in done if {**BASE, name: value}.items() <= run.items()]
        if runs:
            mean = {key: statistics.mean(run[key] for run in runs) for key in ("loss", "visits", "unvisited", "spread")}
            losses = ", ".join(f"{run['loss']:.3f}" for run in runs)
            print(
                f"| {value:g} | {losses} | {len(runs)} | {mean['visits']:.1f} | {mean['unvisited']:g} of 56 "
                f"| {mean['spread']:.1f} |"
            )


if __name__ == "__main__":
    main()
