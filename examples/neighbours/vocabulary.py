"""What does training save where an embedding has only the rows that data uses? Measured on MiniLM and docstrings.

From the repository's root: `python -m examples.neighbours.vocabulary [--quick]`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import describe_device
from examples import classify
from examples.neighbours.pruned_embedding import PrunedEmbedding
from misa_kernels import MISA, param_groups

Build = Callable[[classify.Classifier, float, int, int], torch.optim.Optimizer]


def tokens_of(comparison: classify.Comparison) -> Tensor:
    """Return the token numbers of all texts that are learned from or held out, and the special ones."""
    texts = [*classify.corpus("training").texts, *classify.corpus("reporting").texts]
    encoded = comparison.tokenizer(texts, truncation=True, max_length=classify.TOKENS)["input_ids"]
    return torch.tensor([*itertools.chain(*encoded), *comparison.tokenizer.all_special_ids])


def methods(tokens: Callable[[], Tensor], folder: Path) -> dict[str, classify.Method]:
    """Return AdamW, and MISA with the embedding always on, with all rows and with those of some tokens.

    Args:
        tokens: Returns these, once the tokenizer is there.
        folder: For the whole table.
    """

    def pruned(build: Build) -> Build:
        def build_pruned(model: classify.Classifier, *others: Any) -> torch.optim.Optimizer:
            PrunedEmbedding(model.encoder, tokens(), file=folder / "table.bin")
            return build(model, *others)

        return build_pruned

    def misa(model: classify.Classifier, lr: float, steps: int, seed: int) -> MISA:
        groups = param_groups(model, dense=[model.head, model.encoder.get_input_embeddings()])
        for group in groups:
            group["lr"] = classify.HEAD_LR if group["role"] == "dense" else lr
        # As much as is drawn of the whole model.
        embedding = model.encoder.get_input_embeddings()
        given = sum(param.numel() for param in model.parameters())
        whole = given + (model.encoder.config.vocab_size - embedding.num_embeddings) * embedding.embedding_dim
        return MISA(groups, delta=classify.DELTA * whole / given, total_steps=steps, seed=seed)

    found = {}
    for name, lr, build in (("AdamW", 2e-4, classify.adamw), ("MISA, embedding dense", 4e-4, misa)):
        found[name] = classify.Method(lr, (), build)
        found[f"{name}, pruned"] = classify.Method(lr, (), pruned(build))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure with the command-line arguments given, those of the process if None."""
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m examples.neighbours.vocabulary", description=about)
    parser.add_argument("--quick", action="store_true", help="a few steps each: shows that it runs")
    parser.add_argument("--out", type=Path, default=Path("out/neighbours"), help="where to write (%(default)s)")
    options = parser.parse_args(arguments)
    if sentence := classify.missing():
        raise SystemExit(sentence.replace("examples.classify", "examples.neighbours.vocabulary"))
    options.out.mkdir(parents=True, exist_ok=True)
    tokens = cache(lambda: tokens_of(comparison))
    settings = classify.QUICK if options.quick else classify.FULL
    comparison = classify.Comparison(settings, methods(tokens, options.out))
    runs, peaks = [], {}
    for name, method in comparison.methods.items():
        peaks[name] = comparison.peak_bytes(name)
        runs.append(comparison.run(name, method.lr, 0, "reporting"))
    (options.out / "table.bin").unlink()
    rows, whole, device = len(tokens().unique()), len(comparison.tokenizer), describe_device(torch.device("cpu"))
    lines = [
        "```",
        "python -m examples.neighbours.vocabulary" + (" --quick" if options.quick else ""),
        "```",
        "",
        *classify.table(runs, peaks),
        "",
        f"MiniLM as in `examples/classify.py`, one seed; its texts have {rows:,} of {whole:,} tokens. "
        f"{device['name']}, {device['threads']} threads.",
    ]
    (options.out / "vocabulary.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
