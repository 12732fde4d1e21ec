"""Is training memory counted as it is, and do the searches for learning rates do what they say?"""

from __future__ import annotations

import json
import operator
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.quality.equal_bytes import LOW_RANK, largest_rank, misa_bytes
from benchmarks.quality.regime_runs import PACKAGES, Job, at, first
from benchmarks.quality.searches import Search, outcome, run_all, wanted
from examples.demo.data import finetuning_corpus, halves, header_files, split
from examples.demo.model import Llama, LlamaConfig
from examples.demo.train import batch_loss
from misa_kernels import MISA, param_groups

BUDGET_BYTES = 700_000
REQUIRED = {name: PACKAGES[name] for name in LOW_RANK}
# Of the whole model, the bytes of int8 states and gradients are 1.9 million.
DELTA = 0.3


def storages(value: object) -> dict[int, int]:
    """Return address and bytes of the memory behind all tensors in a state."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()} if storage.nbytes() else {}
    if isinstance(value, (dict, list, tuple)):
        parts = value.values() if isinstance(value, dict) else value
        return {address: size for part in parts for address, size in storages(part).items()}
    return storages(vars(value)) if hasattr(value, "ortho_matrix") else {}


def held_bytes(base: Llama, model: nn.Module, optimizer: torch.optim.Optimizer, before: int) -> int:
    """Return the bytes of states, of gradients at their peak in a backward, and of weights that the model had not."""
    if isinstance(optimizer, MISA):
        optimizer.rehearse()
    peak = 0

    def count(grad: torch.Tensor) -> None:
        nonlocal peak
        held = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        peak = max(peak, held + grad.nbytes)

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(count)
    tokens = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))
    batch_loss(model, (tokens[:, :-1], tokens[:, 1:])).backward()
    optimizer.step()
    extra = sum(p.nbytes for p in model.parameters()) - before
    return sum(storages(list(optimizer.state.values())).values()) + peak + extra


@pytest.mark.parametrize(
    "name", ["GaLore", *(pytest.param(n, marks=pytest.mark.slow) for n in ("LoRA", "LoRA, down", "DoRA"))]
)
def test_training_bytes_are_those_of_the_tensors_and_the_largest_rank_within_the_budget(name: str) -> None:
    for package in REQUIRED[name]:
        pytest.importorskip(package)
    base = Llama(LlamaConfig(context=16))
    before = sum(p.nbytes for p in base.parameters())
    training_bytes, build = LOW_RANK[name]
    rank = largest_rank(name, base, BUDGET_BYTES)
    counted = training_bytes(base, rank)
    assert counted <= BUDGET_BYTES < training_bytes(base, rank + 1)
    assert counted * 0.99 <= held_bytes(base, *build(base, rank, 1e-3, 0), before) <= counted * 1.01


@pytest.mark.parametrize("state", ["fp32", "int8"])
def test_training_bytes_of_misa_are_those_of_its_tensors(state: str) -> None:
    base = Llama(LlamaConfig(context=16))
    before = sum(p.nbytes for p in base.parameters())
    optimizer = MISA(param_groups(base), delta=DELTA, total_steps=100, state_dtype=state)
    counted = misa_bytes(base, state, DELTA)
    # The active set leaves less than its smallest module, a thirteenth of the budget, unused.
    assert counted * 0.92 <= held_bytes(base, base, optimizer, before) <= counted * 1.01


def test_tuning_and_reporting_text_share_no_file_and_are_the_validation_text() -> None:
    files = split(header_files())[1]
    tuning, reporting = halves(header_files())
    for text, part in ((tuning, files[0::2]), (reporting, files[1::2])):
        assert len(text) == sum(path.stat().st_size for path in part) + len(part) - 1
    assert len(tuning) + 1 + len(reporting) == len(finetuning_corpus().validation)


FIRST = first("MISA")
SEARCH = Search(2, FIRST, (*at(1, 0.03, method="uniform", state="fp32"), *at(2, 0.01)))
EARLIER = Search(1, first("LoRA"), at(1, 0.03))


def powers_asked(optimum: int) -> list[int]:
    """Return the powers, in order, that are run where the loss grows with the distance from an optimum."""
    losses: dict[Job, float] = {}
    while tuning := [job for job in wanted([SEARCH], losses) if job.seed == FIRST.seed]:
        losses[tuning[0]] = abs(tuning[0].power - optimum)
    return [job.power for job in losses]


@pytest.mark.parametrize(("optimum", "powers"), [(1, [1, 0, 2]), (2, [1, 0, 2, 3]), (-1, [1, 0, 2, -1, -2])])
def test_search_goes_on_until_the_best_has_worse_neighbours(optimum: int, powers: list[int]) -> None:
    assert powers_asked(optimum) == powers


def test_a_search_can_report_its_own_best_run() -> None:
    search = Search(1, FIRST, at(0, 0.03))
    results = {
        replace(FIRST, power=power): {"tuning_loss": float(abs(power - 1)), "power": power} for power in range(3)
    }
    # Of another search, with the same seed.
    results[replace(FIRST, method="uniform")] = {"tuning_loss": 0.5, "power": 1}
    tuning, reporting, missing = outcome([search], results)
    assert [run["power"] for run in tuning] == [0, 1, 2] and [run["power"] for run in reporting] == [1]
    assert missing == 0


def test_runs_go_by_stage_and_in_a_stage_by_seed() -> None:
    losses = {replace(FIRST, power=power): float(abs(power - 2)) for power in range(4)}
    lora = [replace(EARLIER.first, power=power) for power in (1, 0, 2)]
    found = [
        Job("fine-tuning", "uniform", "fp32", 0.03, 0, 2, 1),
        Job("fine-tuning", "MISA", "int8", 0.01, 0, 2, 1),
        Job("fine-tuning", "MISA", "int8", 0.01, 0, 2, 2),
    ]
    assert wanted([SEARCH, EARLIER], losses) == lora + found
    losses |= {job: abs(job.power - 1.0) for job in lora} | {found[0]: 1.0}
    reported = Job("fine-tuning", "LoRA", "int8", 0.03, 0, 1, 1)
    assert wanted([SEARCH, EARLIER], losses) == [reported, *found[1:]]


def test_finished_runs_are_not_run_again(tmp_path: Path) -> None:
    losses = {replace(FIRST, power=power): float(abs(power - 2)) for power in range(4)}
    losses |= dict.fromkeys(wanted([SEARCH], losses), 1.0)
    before = "".join(json.dumps(asdict(job) | {"tuning_loss": loss}) + "\n" for job, loss in losses.items())
    (tmp_path / "runs.jsonl").write_text(before)
    run_all([SEARCH], lambda job: pytest.fail(f"{job} was run again"), tmp_path / "runs.jsonl", Job, 1)
    assert (tmp_path / "runs.jsonl").read_text() == before


def test_a_run_that_fails_is_named_and_what_does_not_wait_for_it_goes_on(tmp_path: Path) -> None:
    missing = wanted([SEARCH], {})
    # What fails in another process must come over: a function that both find.
    failed = run_all([SEARCH], operator.attrgetter("no_such_field"), tmp_path / "runs.jsonl", Job, 1)
    assert list(failed) == missing and len(missing) == 3
    assert all(error.startswith("AttributeError: ") and "no_such_field" in error for error in failed.values())
    assert not (tmp_path / "runs.jsonl").exists()


def test_no_run_begins_after_the_deadline(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    assert run_all([SEARCH], operator.attrgetter("no_such_field"), path, Job, 1, deadline=time.monotonic()) == {}
