"""Which text is a pretrained model trained and judged on? Files that Linux machines have, and its own answers."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.demo.data import header_files, split

OUT = Path("out/pretrained")
ANSWERS = Path("benchmarks/results/pretrained-answers.jsonl")
MANUALS = Path("/usr/share/man/de")
# Shorter pages say no more than which other page to read.
LEAST_BYTES = 500
# What people ask a small chat model. Its answers, as they are before the training, are what it must not forget.
QUESTIONS = (
    "Why is the sky blue?",
    "Write a short story about a fox who finds a lantern.",
    "How do I boil an egg?",
    "What is the difference between weather and climate?",
    "Give me three tips for learning a new language.",
    "Who was Marie Curie?",
    "Explain photosynthesis to a child.",
    "Write an email asking for a day off.",
    "What are the planets of the solar system?",
    "Summarize why exercise is good for health.",
    "How does a bicycle stay upright?",
    "Describe a quiet morning by the sea.",
    "What is the capital of Japan, and what is it known for?",
    "How do vaccines work?",
    "What should I pack for a hike in the mountains?",
    "Tell me about the history of the printing press.",
)
ANSWER_TOKENS = 128


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


def kept(name: str, make: Callable[[], Any]) -> Any:
    """Return what a file in `OUT` holds, after making it where it is missing."""
    path = OUT / name
    if not path.exists():
        OUT.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        torch.save(make(), unfinished)
        unfinished.replace(path)
    return torch.load(path, weights_only=False)


@cache
def base() -> Logits:
    """Return SmolLM2 with its own weights in float32, 134.5 million; whoever trains it copies it."""
    from examples.finetune import load

    return Logits(kept("smollm2.pt", lambda: load(None, torch.float32)[0].eval()))


@cache
def tokenizer() -> Any:
    """Return SmolLM2's tokenizer."""
    from transformers import AutoTokenizer

    from examples.finetune import source

    return AutoTokenizer.from_pretrained(**source(None))


@dataclass(frozen=True)
class Texts:
    """The tokens of a kind of text in three parts without a file in common, int64, each (tokens,).

    Attributes:
        train: Of nine tenths of the files.
        tuning: Of half of the others: learning rates are chosen on it.
        reporting: Of the other half.
    """

    train: Tensor
    tuning: Tensor
    reporting: Tensor


def manual_files() -> list[Path]:
    """Return the German manual pages, sorted by path, without those that only name another.

    Raises:
        FileNotFoundError: If there are too few for three parts.
    """
    files = sorted(path for path in MANUALS.rglob("*.gz") if not path.is_symlink())
    files = [path for path in files if len(gzip.decompress(path.read_bytes())) >= LEAST_BYTES]
    if len(files) < 20:
        raise FileNotFoundError(f"{MANUALS} has {len(files)} German manual pages, 20 are needed: install manpages-de")
    return files


# By task.
FILES: dict[str, Callable[[], list[Path]]] = {"C++ headers": header_files, "German manuals": manual_files}


@cache
def texts(task: str) -> Texts:
    """Return the tokens of a task's text."""

    def tokens(files: list[Path]) -> Tensor:
        plain = (gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes() for p in files)
        text = b"\n".join(plain).decode(errors="replace")
        # In pieces: the tokenizer's time grows faster than the text.
        pieces = (text[start : start + 20_000] for start in range(0, len(text), 20_000))
        return torch.tensor(list(itertools.chain(*(tokenizer()(piece)["input_ids"] for piece in pieces))))

    def parts() -> list[Tensor]:
        train, validation = split(FILES[task]())
        return [tokens(files) for files in (train, validation[::2], validation[1::2])]

    return Texts(*kept(f"{task.replace(' ', '-')}.pt", parts))


def sample_answers() -> list[tuple[list[int], int]]:
    """Return what the model says by itself: of each question the tokens, and where the answer begins."""
    torch.manual_seed(0)
    found = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        asked = tokenizer().apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        said = base().model.generate(asked, do_sample=True, top_k=0, temperature=1.0, max_new_tokens=ANSWER_TOKENS)
        found.append((said[0].tolist(), asked.shape[1]))
    return found


@cache
def answers() -> list[tuple[Tensor, int]]:
    """Return the answers of the record, each as tokens (1, tokens) and where it begins; sample them if it has none.

    They are kept there since another processor rounds otherwise, and soon says something else.
    """
    if not ANSWERS.exists():
        lines = (json.dumps(answer, separators=(",", ":")) + "\n" for answer in sample_answers())
        ANSWERS.write_text("".join(lines))
    return [(torch.tensor([said]), begin) for said, begin in map(json.loads, ANSWERS.read_text().splitlines())]


@torch.no_grad()
def answers_loss(model: nn.Module) -> float:
    """Return the mean loss of a model on the answers, in nats a token.

    What it is above the untrained model's estimates the Kullback-Leibler divergence of the two, since that one's own
    distribution is what was sampled.
    """
    losses = [
        F.cross_entropy(model(said[:, :-1])[0, begin - 1 :], said[0, begin:], reduction="none")
        for said, begin in answers()
    ]
    return torch.cat(losses).mean().item()


def sequences(text: Tensor, count: int, context: int, batch: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the same held-out batches at every call, spread evenly over a text; see `random_batches`."""
    windows = text.unfold(0, context + 1, 1)
    for part in torch.linspace(0, len(windows) - 1, count).long().split(batch):
        yield windows[part][:, :-1], windows[part][:, 1:]
