"""Do the slices of the benchmark of draws learn as they should, and its table count as it says?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.quality import draws
from benchmarks.quality.draws import Job
from examples.demo.model import Llama, LlamaConfig
from examples.demo.train import batch_loss

JOB = Job("small", "slices", "all", "contiguous", 0.1, 0.01, 1, steps=2)
TEXT = torch.randint(0, 256, (3000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TEXTS = draws.Texts(TEXT, TEXT, TEXT, TEXT)


def llama() -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig(width=32, hidden=96, layers=2, heads=2, context=128))


@pytest.mark.parametrize("columns", draws.DRAWS)
def test_slices_have_autograds_gradient_and_nothing_else_moves(columns: str) -> None:
    model, reference = llama(), llama()
    optimizer = draws.slices(replace(JOB, columns=columns), model, TEXTS)
    batch = next(draws.random_batches(TEXT, 2, 16, 0))
    batch_loss(model, batch).backward()
    batch_loss(reference, batch).backward()
    weights = dict(reference.named_parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moved = dict.fromkeys(weights, 0)
    for one in optimizer.slices:
        expected = weights[names[id(one.weight)]].grad.index_select(one.axis, one.index)
        torch.testing.assert_close(one.piece.grad, expected, rtol=1e-4, atol=1e-7)
        moved[names[id(one.weight)]] = one.piece.numel()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert (parameter != weights[name]).sum() == moved[name], name
    total = sum(moved.values())
    assert 0.08 < total / sum(weight.numel() for weight in weights.values()) <= 0.1


def test_quiet_columns_have_less_energy_than_loud_ones() -> None:
    energy = torch.rand(96, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    sums = {name: energy[draw(energy, 32, generator)].sum() for name, draw in draws.DRAWS.items()}
    assert sums["quiet columns"] < sums["quiet"] <= sums["quiet range"]
    assert sums["quiet"] < sums["medium"] < sums["loud"] and sums["quiet half"] < sums["loud half"]
    assert all(len(set(draw(energy, 32, generator).tolist())) == 32 for draw in draws.DRAWS.values())


def test_a_rate_over_the_root_mean_square_scales_the_groups_updates() -> None:
    energy = torch.cat([torch.full((16,), 1.0), torch.full((16,), 16.0)])
    job = replace(JOB, columns="loud", scale=1.0)
    _, factors = draws.drawing(job, 32, 32, energy, torch.Generator())()
    assert factors is not None
    torch.testing.assert_close(factors, torch.cat([torch.full((16,), 2.0), torch.full((16,), 0.5)]))


def test_a_new_draw_begins_from_the_weights_as_they_are() -> None:
    model = llama()
    optimizer = draws.slices(replace(JOB, matrices="down", redraw=2), model, TEXTS)
    drawn = []
    for batch, _ in zip(draws.random_batches(TEXT, 2, 16, 0), range(4), strict=False):
        batch_loss(model, batch).backward()
        drawn.append([one.index for one in optimizer.slices])
        optimizer.step()
        optimizer.zero_grad()
        for one in optimizer.slices:
            assert torch.equal(one.piece, one.weight.index_select(1, one.index))
    assert all(map(torch.equal, drawn[0], drawn[1])) and not all(map(torch.equal, drawn[1], drawn[2]))


def test_the_table_has_the_share_at_the_rate_that_the_tuning_text_chooses() -> None:
    def run(method: str, lr: float, seed: int, tuning: float, loss: float) -> tuple[Job, dict]:
        job = Job("small", method, "", "", 1.0, lr, seed)
        return job, {"tuning": tuning, "loss": loss, "other": 3.0, "trained": 1000, "s": 2.0}

    runs = dict([
        run("none", 0.0, 0, 3.0, 3.0),
        run("AdamW", 0.1, 1, 2.0, 2.0),
        run("AdamW", 0.2, 1, 2.5, 1.0),
        run("slices", 0.1, 1, 2.5, 2.4),
        run("slices", 0.2, 1, 2.6, 2.0),
        run("slices", 0.1, 2, 2.5, 2.6),
    ])  # fmt: skip
    # Of the second seed there is no AdamW.
    adamw, slices = draws.rows(runs)
    assert adamw[7:10] == ["0.1", "100.0", "100.0"]
    assert slices[7:11] == ["0.1", "50.0 ± 0.0", "50.0 ± 14.1", "1 2"]


@pytest.mark.parametrize("method", ["none", "AdamW", "slices"])
def test_a_run_ends_with_its_losses(method: str) -> None:
    result = draws.execute(replace(JOB, method=method), llama(), TEXTS, (8, 8, 8))
    assert all(4 < result[kind] < 7 for kind in ("tuning", "loss", "other"))
    assert (result["trained"] > 0) == (method != "none")
