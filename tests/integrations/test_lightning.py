"""Does Lightning drive MISA: automatic and manual optimisation, accumulation, clipping, checkpoints in mid-round?"""

from __future__ import annotations

import os

import pytest
import torch

if "CI" not in os.environ:
    pytest.importorskip("lightning")
import lightning

from examples.demo.train import batch_loss
from examples.loops.loop_accelerate import loader
from examples.loops.loop_lightning import LanguageModel, main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
STEPS = 10


def module(kind=LanguageModel):
    torch.manual_seed(0)
    return kind(STEPS, inner_steps=4)


def batches(skip=0):
    dataset = loader(8 * STEPS).dataset
    return torch.utils.data.DataLoader(torch.utils.data.Subset(dataset, range(4 * skip, len(dataset))), 4)


def fit(model, steps, folder, callbacks=(), checkpoint=None, skip=0, plugins=()):
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=2 if model.automatic_optimization else 1,
        gradient_clip_val=0.5 if model.automatic_optimization else None,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        plugins=list(plugins),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches(skip), ckpt_path=checkpoint)
    return trainer


class Manual(LanguageModel):
    """The same steps, written out."""

    automatic_optimization = False

    def __init__(self, steps, inner_steps):
        super().__init__(steps, inner_steps)
        self.automatic_optimization = False

    def training_step(self, batch, number):
        optimizer = self.optimizers()
        loss = batch_loss(self.model, batch)
        self.losses.append(loss.item())
        self.manual_backward(loss / 2)
        if number % 2:
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()
            self.lr_schedulers().step()
            optimizer.zero_grad()


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=256.0)


def by_hand(scaled=False):
    model = module()
    # Where it is not enabled, it does nothing.
    scale = scaler() if scaled else torch.amp.GradScaler("cpu", enabled=False)
    built = model.configure_optimizers()
    optimizer, schedule = built["optimizer"], built["lr_scheduler"]["scheduler"]
    losses = []
    for number, batch in enumerate(batches()):
        with torch.autocast("cpu", torch.float16, enabled=scaled):
            loss = batch_loss(model.model, batch)
        losses.append(loss.item())
        scale.scale(loss / 2).backward()
        if number % 2:
            scale.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scale.step(optimizer)
            scale.update()
            schedule.step()
            optimizer.zero_grad()
    return losses, [record.active for record in optimizer.monitor.rounds]


@pytest.mark.parametrize("kind", [LanguageModel, Manual])
def test_losses_and_draws_are_those_of_a_plain_loop(kind, tmp_path):
    model = module(kind)
    trainer = fit(model, STEPS, tmp_path)
    losses, draws = by_hand()
    assert model.losses == pytest.approx(losses, rel=1e-6)
    assert [record.active for record in trainer.optimizers[0].monitor.rounds] == draws and len(draws) == 3
    # Released in on_fit_end.
    assert all(p.requires_grad for p in model.parameters())


def test_resumed_in_mid_round_it_goes_on_to_the_bit(tmp_path):
    whole, resumed = module(), module()
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)
    fit(whole, STEPS, tmp_path, callbacks=[saving])
    # Lightning counts batches on but begins a plain loader anew.
    fit(resumed, STEPS, tmp_path, checkpoint=tmp_path / "step=6.ckpt", skip=12)
    assert len(resumed.losses) == 8
    assert resumed.losses == whole.losses[12:]


def test_the_example_trains():
    losses = main(steps=6)
    assert len(losses) == 12 and losses[-1] < losses[0]


class Measured(LanguageModel):
    """Notes the norm of the gradients that each step gets."""

    def configure_optimizers(self):
        built = super().configure_optimizers()
        self.norms = []
        built["optimizer"].register_step_pre_hook(lambda optimizer, args, kwargs: self.norms.append(self.norm()))
        return built

    def norm(self):
        squares = [param.grad.double().square().sum() for param in self.parameters() if param.grad is not None]
        return sum(squares).sqrt().item()


def test_in_fp16_gradients_are_unscaled_and_clipped(tmp_path):
    model = module(Measured)
    mixed = lightning.pytorch.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler=scaler())
    trainer = fit(model, STEPS, tmp_path, plugins=[mixed])
    losses, draws = by_hand(scaled=True)
    assert model.norms == pytest.approx([0.5] * STEPS, rel=1e-4)
    # The order in which float16 adds up is not that of the loop.
    assert model.losses == pytest.approx(losses, rel=1e-3)
    assert [record.active for record in trainer.optimizers[0].monitor.rounds] == draws and len(draws) == 3
