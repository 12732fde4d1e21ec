"""Does accelerate drive MISA as a plain loop does: prepare, accumulate, clip, bfloat16, save and load in mid-round?"""

from __future__ import annotations

import os

import pytest
import tiny
import torch

from misa_kernels import MISA, param_groups

if "CI" not in os.environ:
    pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed

from examples.loops import loop_accelerate

ACCUMULATE = 2


@pytest.fixture(autouse=True)
def one_accelerator():
    """Its state is the process's, and refuses another precision."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def build():
    model = tiny.build(layers=2)
    optimizer = MISA(param_groups(model), lr=3e-3, delta=0.3, inner_steps=3)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)


def loader(start=0, steps=8):
    tokens = torch.cat([tiny.batch(step) for step in range(start, start + steps * ACCUMULATE)])
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), batch_size=4)


def draws(misa):
    """By round: `prepare` loads the state that it has just saved, and the monitor then begins the round again."""
    return {record.round: record.active for record in misa.monitor.rounds}


def plain(mixed=False):
    model, optimizer, scheduler = build()
    losses = []
    for number, (tokens,) in enumerate(loader()):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = tiny.loss_of(model, tokens)
        (loss / ACCUMULATE).backward()
        losses.append(loss.item())
        if (number + 1) % ACCUMULATE == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return losses, draws(optimizer)


def prepared(mixed_precision="no"):
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE, cpu=True, mixed_precision=mixed_precision)
    model, misa, scheduler = build()
    return accelerator, misa, *accelerator.prepare(model, misa, scheduler)


def train(parts, batches):
    accelerator, _, model, optimizer, scheduler = parts
    losses = []
    for (tokens,) in accelerator.prepare(batches):
        with accelerator.accumulate(model):
            loss = tiny.loss_of(model, tokens)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_losses_and_draws_are_those_of_a_plain_loop(mixed_precision):
    parts = prepared(mixed_precision)
    losses = train(parts, loader())
    assert (losses, draws(parts[1])) == plain(mixed_precision == "bf16")
    assert len(set(draws(parts[1]).values())) == 3


def test_saved_and_loaded_in_mid_round_it_goes_on_to_the_bit(tmp_path):
    whole = prepared()
    expected = train(whole, loader())
    interrupted = prepared()
    first = train(interrupted, loader(steps=4))
    interrupted[0].save_state(str(tmp_path))
    set_seed(5)
    resumed = prepared()
    resumed[0].load_state(str(tmp_path))
    assert resumed[1].param_groups[0]["lr"] == interrupted[1].param_groups[0]["lr"] != 3e-3
    assert first + train(resumed, loader(start=4 * ACCUMULATE, steps=4)) == expected
    # The monitor of the second life begins with the round that was running.
    running = interrupted[1].monitor.current.round
    assert running > 0
    assert draws(resumed[1]) == {number: drawn for number, drawn in draws(whole[1]).items() if number >= running}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a run of")
def test_the_example_trains():
    losses = loop_accelerate.main(steps=6)
    assert len(losses) == 12 and losses[-1] < losses[0]
