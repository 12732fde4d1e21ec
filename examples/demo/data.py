"""Where does the text come from? From files that every machine with Python and PyTorch has: no download."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# Not all installations ship the tests; the other three are tables and generated text rather than code.
SKIPPED_PYTHON = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "lib2to3"}
VALIDATION_EVERY = 10

# Tokens and, for each, the token that follows it.
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Corpus:
    """Text of one kind, cut into two parts that have no file in common.

    Attributes:
        name: What the text is.
        train: Bytes of nine tenths of the files, uint8, shape (bytes,).
        validation: Bytes of every tenth file, uint8, shape (bytes,).
    """

    name: str
    train: Tensor
    validation: Tensor


def python_files() -> list[Path]:
    """Return the source files of Python's standard library, sorted by path."""
    library = Path(sysconfig.get_path("stdlib"))
    files = library.rglob("*.py")
    return sorted(path for path in files if not SKIPPED_PYTHON & {*path.relative_to(library).parts})


def header_files() -> list[Path]:
    """Return the C++ headers inside the installed torch package, sorted by path, without generated ones."""
    headers = Path(torch.__file__).parent / "include"
    files = (path for part in ("c10", "torch/csrc") for path in (headers / part).rglob("*.h"))
    return sorted(path for path in files if "generated" not in path.parts)


def split(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Divide a list of files into training and validation files.

    Args:
        files: Paths in a fixed order.

    Returns:
        The training files and the validation files; every tenth file is for validation.
    """
    validation = files[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]
    return [path for number, path in enumerate(files) if (number + 1) % VALIDATION_EVERY], validation


def read(name: str, files: list[Path]) -> Corpus:
    """Read files as bytes; a byte is a token.

    Args:
        name: What the text is.
        files: Paths in a fixed order; an empty file adds nothing.

    Returns:
        The corpus.

    Raises:
        FileNotFoundError: If there are too few files for a validation part.
    """
    train, validation = (b"\n".join(path.read_bytes() for path in part) for part in split(files))
    if not validation:
        raise FileNotFoundError(
            f"files={len(files)} of {name} found, at least {VALIDATION_EVERY} are needed: "
            "reinstall Python with its library sources and torch from a wheel"
        )
    return Corpus(name, _tensor(train), _tensor(validation))


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


@cache
def pretraining_corpus() -> Corpus:
    """Return the text that the model learns from scratch: Python's standard library."""
    return read("Python standard library", python_files())


@cache
def finetuning_corpus() -> Corpus:
    """Return the text that the model is then adapted to: the C++ headers of PyTorch."""
    return read("PyTorch C++ headers", header_files())


def halves(files: list[Path]) -> tuple[Tensor, Tensor]:
    """Return the validation text of files in two parts without a file in common, uint8, shape (bytes,).

    Learning rates chosen on the first say nothing about the second.
    """
    validation = split(files)[1]
    tuning, reporting = (b"\n".join(path.read_bytes() for path in validation[half::2]) for half in (0, 1))
    return _tensor(tuning), _tensor(reporting)


def random_batches(text: Tensor, batch: int, context: int, seed: int) -> Iterator[Batch]:
    """Yield training batches for ever; the same seed yields the same batches.

    Args:
        text: Tokens, uint8, shape (tokens,).
        batch: Sequences in a batch.
        context: Tokens in a sequence.
        seed: Seed of the places from which sequences are taken.

    Yields:
        Inputs and targets, int64, both (batch, context); a target is the input's next token.
    """
    generator = torch.Generator().manual_seed(seed)
    windows = text.unfold(0, context + 1, 1)
    while True:
        starts = torch.randint(len(windows), (batch,), generator=generator)
        tokens = windows[starts].long()
        yield tokens[:, :-1], tokens[:, 1:]


def validation_batches(text: Tensor, batch: int, context: int, batches: int) -> Iterator[Batch]:
    """Yield the same validation batches at every call, spread evenly over the text.

    Args:
        text: Tokens, uint8, shape (tokens,).
        batch: Sequences in a batch.
        context: Tokens in a sequence.
        batches: Number of batches.

    Yields:
        Inputs and targets as from `random_batches`.
    """
    windows = text.unfold(0, context + 1, 1)
    starts = torch.linspace(0, len(windows) - 1, batch * batches).long()
    for part in starts.split(batch):
        tokens = windows[part].long()
        yield tokens[:, :-1], tokens[:, 1:]
