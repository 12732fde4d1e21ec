"""Do loops train slices as a plain loop does: Trainer, TRL, accelerate, Lightning, peft, averages of weights?"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

if "CI" not in os.environ:
    for library in ("transformers", "accelerate", "peft"):
        pytest.importorskip(library)

import peft
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch._dynamo.backends.debugging import aot_eager
from torch.optim.swa_utils import AveragedModel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from misa_kernels import MISA, UniformSampler, param_groups
from misa_kernels.gradients.sliced import SlicedGradient
from misa_kernels.integrations.transformers import MISACallback
from misa_kernels.tools.backward import watch_backward

KINDS = ["llama", "gpt2"]
VOCABULARY, LENGTH, STEPS, ROUND, PARTS, BATCH = 64, 16, 8, 3, 2, 2
# In the middle of the second round.
SAVED = 4
# Less than any norm, so that all steps are clipped.
BOUND, LR = 0.05, 1e-2


def build(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    changes = {"vocab_size": VOCABULARY, "initializer_range": 0.1, "bos_token_id": None, "eos_token_id": None} | changes
    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(**sizes, **changes)).to(dtype)
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **drops, **changes)).to(dtype)


def misa(model: nn.Module, hold: int | str = 1, reach: str = "all", **changes: Any) -> MISA:
    sampler = UniformSampler(granularity="slice", slices=reach, hold_rounds=hold)
    options = {"lr": LR, "delta": 0.2, "inner_steps": ROUND, "sampler": sampler} | changes
    return MISA(param_groups(model), **options)


def text(rows: int, start: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(7 + start)
    steps = torch.randint(1, 4, (rows, LENGTH), generator=generator)
    return steps.cumsum(1) % VOCABULARY


def dataset(rows: int, start: int = 0) -> list[dict[str, Tensor]]:
    # Nothing predicts the first token, and yet Trainer may count it.
    return [{"input_ids": row, "labels": torch.cat([row.new_tensor([-100]), row[1:]])} for row in text(rows, start)]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


def draws(optimizer: MISA) -> dict[int, tuple[int, ...]]:
    return {record.round: tuple(record.active) for record in optimizer.monitor.rounds}


class Seen:
    """What a plain loop of accumulated, clipped steps with a falling rate has seen."""

    def __init__(self, kind: str, mixed: bool = False) -> None:
        model = build(kind)
        optimizer = misa(model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        self.losses: list[float] = []
        self.norms: list[float] = []
        for number, batch in enumerate(text(BATCH * PARTS * STEPS).split(BATCH)):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = loss_of(model, batch)
            self.losses.append(loss.item())
            (loss / PARTS).backward()
            if number % PARTS == PARTS - 1:
                self.norms.append(nn.utils.clip_grad_norm_(model.parameters(), BOUND).item())
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        self.weights, self.draws = weights(model), draws(optimizer)
        assert min(self.norms) > BOUND
        assert self.losses[-1] < self.losses[0]
        assert len(self.draws) == STEPS // ROUND + 1

    @property
    def means(self) -> list[float]:
        return [sum(self.losses[n : n + PARTS]) / PARTS for n in range(0, len(self.losses), PARTS)]


plain = cache(Seen)


# Trainer


def trainer(
    model: nn.Module, optimizer: MISA, out: Path, *callbacks: TrainerCallback, kind: type = Trainer, **changes: Any
) -> Trainer:
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": PARTS,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": BOUND,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": SAVED,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return kind(
        model=model,
        args=TrainingArguments(output_dir=str(out), **(defaults | changes)),
        train_dataset=dataset(BATCH * PARTS * STEPS),
        eval_dataset=dataset(4, start=1),
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )


def logged(done: Trainer, kind: str = "loss") -> list[float]:
    return [entry[kind] for entry in done.state.log_history if kind in entry]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("callback", [False, True], ids=["alone", "callback"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
def test_trainer_is_the_plain_loop_and_resumes_in_mid_round(kind, callback, checkpointing, tmp_path, recwarn):
    expected = plain(kind)

    def run(resume: str | None = None) -> tuple[Trainer, MISA]:
        model = build(kind)
        optimizer = misa(model)
        done = trainer(
            model,
            optimizer,
            tmp_path,
            *([MISACallback()] if callback else []),
            activation_checkpointing=checkpointing,
            eval_strategy="steps",
            eval_steps=3,
        )
        done.train(resume_from_checkpoint=resume)
        return done, optimizer

    whole, optimizer = run()
    assert logged(whole) == pytest.approx(expected.means, rel=1e-5)
    assert logged(whole, "grad_norm") == pytest.approx(expected.norms, rel=1e-4)
    assert draws(optimizer) == expected.draws
    for name, weight in weights(whole.model).items():
        # Trainer divides by tokens, the loop takes a mean of means.
        torch.testing.assert_close(weight, expected.weights[name], rtol=0, atol=LR * 1e-2, msg=name)
    resumed, again = run(str(tmp_path / f"checkpoint-{SAVED}"))
    assert logged(resumed) == logged(whole)
    assert logged(resumed, "grad_norm") == logged(whole, "grad_norm")
    assert again.active == optimizer.active
    assert_same(weights(resumed.model), weights(whole.model))
    assert is_ordinary(whole.model) == callback
    assert not [str(w.message) for w in recwarn if "MISA" in str(w.message) or "backward" in str(w.message)]


def is_ordinary(model: nn.Module) -> bool:
    return all(param.requires_grad for param in model.parameters()) and not any(
        module._forward_hooks for module in model.modules()
    )


def test_trainer_in_bfloat16_autocast_is_the_plain_loop(tmp_path):
    expected = plain("llama", True)
    model = build("llama")
    optimizer = misa(model)
    done = trainer(model, optimizer, tmp_path, MISACallback(), bf16=True)
    done.train()
    # The first step has no update behind it; each later one adds Adam's roundings of gradients in eight bits.
    assert logged(done)[0] == pytest.approx(expected.means[0], rel=1e-5)
    assert logged(done) == pytest.approx(expected.means, rel=2e-3)
    assert logged(done, "grad_norm") == pytest.approx(expected.norms, rel=2e-2)
    assert draws(optimizer) == expected.draws


def test_trainer_ends_with_the_best_weights(tmp_path):
    from safetensors.torch import load_file

    model = build("llama", torch.bfloat16)
    done = trainer(
        model,
        misa(model, lr=1e-3),
        tmp_path,
        MISACallback(),
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        # The worst is the first.
        greater_is_better=True,
        eval_strategy="steps",
        eval_steps=SAVED,
    )
    done.train()
    assert done.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{SAVED}")
    assert_same(weights(model), load_file(tmp_path / f"checkpoint-{SAVED}" / "model.safetensors"))
    assert is_ordinary(model)


@pytest.mark.parametrize("ours", [None, BOUND])
def test_both_clippings_of_trainer_are_one_and_that_is_said_once(ours, tmp_path):
    model = build("llama")
    done = trainer(model, misa(model, max_grad_norm=ours), tmp_path, MISACallback(), save_strategy="no")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done.train()
    said = [str(warning.message) for warning in caught if "clips before MISA" in str(warning.message)]
    assert len(said) == (ours is not None)
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, plain("llama").weights[name], rtol=0, atol=LR * 1e-2, msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a run of")
def test_sft_trainer_trains_slices_and_resumes_in_mid_round(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from test_trl import tokenizer
    from trl import SFTConfig, SFTTrainer

    def run(resume: str | None = None) -> tuple[list[float], nn.Module, MISA]:
        model = build("llama", vocab_size=258)
        optimizer = misa(model)
        args = SFTConfig(
            output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=4, max_length=64, logging_steps=1,
            save_steps=SAVED, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, max_grad_norm=BOUND,
        )  # fmt: skip
        rows = Dataset.from_dict({"text": [f"{n} and {n + 1} are {2 * n + 1}" for n in range(64)]})
        done = SFTTrainer(
            model,
            args=args,
            train_dataset=rows,
            processing_class=tokenizer(),
            optimizers=(optimizer, None),
            callbacks=[MISACallback()],
        )
        done.train(resume_from_checkpoint=resume)
        return logged(done), done.model, optimizer

    losses, model, optimizer = run()
    again, resumed, _ = run(str(tmp_path / f"checkpoint-{SAVED}"))
    assert len(losses) == STEPS and losses[-1] < losses[0]
    assert again == losses
    assert_same(weights(resumed), weights(model))
    assert is_ordinary(model)
    assert len(optimizer.monitor.rounds) == 3


# accelerate


@pytest.fixture
def one_accelerator() -> Iterator[None]:
    """Its state is the process's, and refuses another precision."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.usefixtures("one_accelerator")
def test_accelerate_is_the_plain_loop(kind, mixed, tmp_path):
    expected = plain(kind, mixed)

    def prepared() -> tuple[Any, ...]:
        accelerator = Accelerator(
            gradient_accumulation_steps=PARTS, cpu=True, mixed_precision="bf16" if mixed else "no"
        )
        model = build(kind)
        optimizer = misa(model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        return accelerator, optimizer, *accelerator.prepare(model, optimizer, schedule)

    def train(parts: tuple[Any, ...], batches: Tensor) -> tuple[list[float], list[float]]:
        accelerator, _, model, optimizer, schedule = parts
        losses, norms = [], []
        for batch in batches.split(BATCH):
            with accelerator.accumulate(model):
                loss = loss_of(model, batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms.append(accelerator.clip_grad_norm_(model.parameters(), BOUND).item())
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        return losses, norms

    parts, rows = prepared(), text(BATCH * PARTS * STEPS)
    assert train(parts, rows) == (expected.losses, expected.norms)
    assert draws(parts[1]) == expected.draws
    assert_same(weights(parts[2]), expected.weights)
    # Saved, and loaded into others, in mid-round.
    first, then = rows.split([SAVED * PARTS * BATCH, (STEPS - SAVED) * PARTS * BATCH])
    parts = prepared()
    train(parts, first)
    parts[0].save_state(str(tmp_path))
    resumed = prepared()
    resumed[0].load_state(str(tmp_path))
    assert train(resumed, then)[0] == expected.losses[SAVED * PARTS :]
    assert_same(weights(resumed[2]), expected.weights)


@pytest.mark.usefixtures("one_accelerator")
def test_gradients_that_accelerates_scaler_unscales():
    """On the CPU accelerate makes no scaler, so it is given one, as on a GPU in fp16."""
    models = [build("llama"), build("llama")]
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model, optimizer = accelerator.prepare(models[0], misa(models[0]))
    optimizer.scaler = accelerator.scaler
    # Only now, so that the model computes in float32.
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    other = misa(models[1])
    for batch in text(BATCH * STEPS).split(BATCH):
        accelerator.backward(loss_of(model, batch))
        norm = accelerator.clip_grad_norm_(model.parameters(), BOUND)
        optimizer.step()
        optimizer.zero_grad()
        loss_of(models[1], batch).backward()
        assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(models[1].parameters(), BOUND).item(), rel=1e-5)
        other.step()
        other.zero_grad()
    # Powers of two.
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


# Lightning


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_lightning_is_the_plain_loop(kind, tmp_path):
    lightning = pytest.importorskip("lightning")
    expected = plain(kind)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = build(kind), []

        def training_step(self, batch: Any, number: int) -> Tensor:
            loss = loss_of(self.model, batch[0])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            self.optimizer = misa(self.model)
            schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / STEPS)
            return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def fit(module: Any, rows: Tensor, checkpoint: str | None = None, callbacks: Any = ()) -> None:
        lightning.Trainer(
            accelerator="cpu",
            max_steps=STEPS,
            accumulate_grad_batches=PARTS,
            gradient_clip_val=BOUND,
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=bool(callbacks),
            callbacks=list(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), BATCH), ckpt_path=checkpoint)

    rows = text(BATCH * PARTS * STEPS)
    module, resumed = Module(), Module()
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=SAVED, save_top_k=-1)
    fit(module, rows, callbacks=[saving])
    assert module.losses == expected.losses
    assert draws(module.optimizer) == expected.draws
    assert_same(weights(module.model), expected.weights)
    fit(resumed, rows[SAVED * PARTS * BATCH :], str(tmp_path / f"step={SAVED}.ckpt"))
    assert resumed.losses == expected.losses[SAVED * PARTS :]
    assert_same(weights(resumed.model), expected.weights)


# Closures


@pytest.mark.parametrize("kind", KINDS)
def test_a_closure_is_called_with_gradients(kind):
    closed, plainly = build(kind), build(kind)
    ours, theirs = misa(closed), misa(plainly)
    for batch in text(BATCH * STEPS).split(BATCH):

        def closure(batch: Tensor = batch) -> Tensor:
            ours.zero_grad()
            loss = loss_of(closed, batch)
            loss.backward()
            return loss

        loss = loss_of(plainly, batch)
        loss.backward()
        assert ours.step(closure).item() == loss.item()
        theirs.step()
        theirs.zero_grad()
    assert_same(weights(closed), weights(plainly))


# What is made of the model in mid-round


def begun(kind: str, steps: int = ROUND + 1, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, MISA]:
    """A model in the middle of its second round."""
    model = build(kind, dtype)
    optimizer = misa(model, **changes)
    advance(model, optimizer, steps)
    return model, optimizer


def advance(model: nn.Module, optimizer: MISA, steps: int, start: int = 0) -> list[float]:
    losses = []
    for batch in text(BATCH * 30).split(BATCH)[start : start + steps]:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_in_mid_round_loads_and_generates_the_same(kind, dtype, tmp_path):
    model, optimizer = begun(kind, dtype=dtype)
    loss_of(model, text(BATCH)).backward()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert is_ordinary(loaded)
    assert_same(weights(loaded), weights(model))
    prompt, options = text(2)[:, :5], {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(prompt, **options)
    assert torch.equal(tokens, loaded.generate(prompt, **options))
    assert tokens.shape == (2, 13)
    # Neither has harmed the gradients that were there.
    assert all(isinstance(param.grad, SlicedGradient) for param in optimizer.trained)
    loss = loss_of(loaded, text(BATCH))
    loss.backward()
    assert all(type(param.grad) is Tensor for param in loaded.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_of_the_weights_is_begun_in_mid_round(kind):
    model, optimizer = begun(kind)
    loss_of(model, text(BATCH)).backward()
    averaged = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer.step()
    optimizer.zero_grad()
    expected = weights(model)
    averaged.update_parameters(model)
    assert_same(weights(averaged.module), expected)
    for step in range(STEPS):
        advance(model, optimizer, 1, step)
        averaged.update_parameters(model)
        expected = {name: 0.5 * expected[name] + 0.5 * weight for name, weight in weights(model).items()}
    for name, weight in weights(averaged.module).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
    # It is a model like any other.
    averaged.requires_grad_(True)
    loss_of(averaged, text(BATCH)).backward()
    assert all(type(param.grad) is Tensor for param in averaged.parameters())
    assert not any(module._forward_hooks for module in averaged.modules())


# What is made of the model's layers


def adapted(model: nn.Module, *targets: str) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(targets), lora_dropout=0.0))


@pytest.mark.parametrize("when", [0, 1], ids=["before the first step", "in mid-round"])
@pytest.mark.parametrize(
    ("kind", "target", "layer"),
    [
        ("llama", "down_proj", "model.layers.0.mlp.down_proj"),
        # Not one of those that are sliced.
        ("llama", "q_proj", "model.layers.0.self_attn.q_proj"),
        ("gpt2", "mlp.c_proj", "transformer.h.0.mlp.c_proj"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
def test_adapters_that_come_later_are_noticed(kind, target, layer, when):
    """peft wraps the layer, whose weight is trained as before, and makes parameters that the optimizer lacks."""
    model = build(kind)
    optimizer = misa(model, "run", "down")
    sliced = [optimizer.modules[number].name.partition("[")[0] for number in optimizer.active]
    advance(model, optimizer, when)
    wrapped = adapted(model, target)
    before = weights(wrapped)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        advance(wrapped, optimizer, 3 * ROUND, when)
    said = [str(warning.message) for warning in caught]
    assert len(said) == 1
    assert said[0].startswith(
        f"where the layer with the weight {layer}.weight was, there is a Linear now, as when adapters are attached, "
        "and MISA does not train what it has of its own, such as lora_A.default.weight: call "
    )
    moved = {name for name, weight in weights(wrapped).items() if not torch.equal(weight, before[name])}
    plain_names = {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in moved}
    assert plain_names == {f"{name}.weight" for name in sliced}


def test_a_wrapper_without_parameters_of_its_own_is_none_of_ours(recwarn):
    model = build("llama")
    optimizer = misa(model, "run", "down")
    mlp = model.model.layers[1].mlp
    mlp.down_proj = nn.Sequential(mlp.down_proj, nn.Identity())
    frozen = adapted(model, "up_proj").requires_grad_(False)
    advance(frozen, optimizer, 2 * ROUND)
    assert not [str(warning.message) for warning in recwarn if "MISA" in str(warning.message)]


def test_a_layer_that_is_exchanged_is_noticed():
    model = build("llama")
    optimizer = misa(model, "run", "down")
    advance(model, optimizer, 1)
    model.model.layers[2].mlp.down_proj = nn.Linear(96, 32, bias=False)
    with pytest.warns(
        UserWarning, match=r"layers\.2\.mlp\.down_proj\.weight was, there is a Linear now.*such as weight"
    ):
        advance(model, optimizer, ROUND)


def test_adapters_that_were_there_are_not_sliced_and_one_sentence_says_so():
    model = adapted(build("llama"), "down_proj", "q_proj")
    with pytest.raises(ValueError, match=r"granularity='module'") as caught:
        MISA(param_groups(model), delta=0.3, sampler=UniformSampler(granularity="slice"))
    assert "adapters" in str(caught.value)


def test_a_weight_that_is_exchanged_is_noticed():
    model = build("llama")
    optimizer = misa(model, "run", "down")
    advance(model, optimizer, 1)
    layer = model.model.layers[2].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    with pytest.warns(UserWarning, match="is trained in slices, and its layer is called with another weight"):
        advance(model, optimizer, 1)


def test_embeddings_are_resized_and_tied_in_mid_round():
    model, other = build("llama"), build("llama")
    optimizer, same = misa(model), misa(other)
    advance(model, optimizer, ROUND - 1)
    advance(other, same, ROUND - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(VOCABULARY + 8)
        model.tie_weights()
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY + 8
    # Losses have more classes, so the two go apart, and yet both train slices of the same layers.
    before = weights(model)
    advance(model, optimizer, 4 * ROUND)
    advance(other, same, 4 * ROUND)
    moved = {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name, _ in model.named_parameters() if "proj" in name}
    assert draws(optimizer) == draws(same)


def test_a_model_that_is_cast_after_the_first_step_is_refused():
    model, optimizer = begun("llama")
    model.to(torch.bfloat16)
    before = weights(model)
    loss_of(model, text(BATCH)).backward()
    with pytest.raises(RuntimeError, match=r"bfloat16 .*but was torch.float32 .* in the first step"):
        optimizer.step()
    assert_same(weights(model), before)


# What watches backward


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_watch_backward_says_nothing_of_a_run_that_is_as_it_should_be(kind, checkpointing, recwarn):
    model = build(kind)
    optimizer = misa(model, reach="down")
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    model.train()
    with watch_backward(model, optimizer):
        advance(model, optimizer, 4 * ROUND)
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize("kind", KINDS)
def test_re_entrant_checkpointing_without_an_input_that_requires_gradients_is_noticed(kind):
    model = build(kind)
    optimizer = misa(model, reach="down")
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.disable_input_require_grads()
    model.train()
    with watch_backward(model, optimizer):
        with pytest.warns(UserWarning, match=r"0 trains in round 0 but ran with gradients off .*use_reentrant=False"):
            loss_of(model, text(BATCH))


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_that_requires_gradients_is_noticed(kind):
    model = build(kind)
    # Slices of the uppermost layer alone, so that backward must not run below.
    head = [name for name, _ in model.named_children()][0]
    layers = getattr(model, head).layers if kind == "llama" else getattr(model, head).h
    layers[:2].requires_grad_(False)
    optimizer = misa(model, reach="down", delta=0.05)
    model.enable_input_require_grads()
    with watch_backward(model, optimizer), pytest.warns(UserWarning, match="backward ran down to the input of"):
        advance(model, optimizer, 1)


# torch.compile


class Counting:
    """AOTAutograd, which makes backward graphs but compiles nothing, and counts the graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return aot_eager(graph, inputs)


@pytest.mark.parametrize(
    ("how", "hold", "reach"),
    [
        ("whole", 1, "all"),
        ("layers", 1, "down"),
        pytest.param("whole", "run", "down", marks=pytest.mark.slow),
        pytest.param("layers", "run", "all", marks=pytest.mark.slow),
        pytest.param("layers", 1, "all", marks=pytest.mark.slow),
    ],
)
def test_compiled_models_train_slices_as_eager_ones_do(how, hold, reach):
    torch._dynamo.reset()
    models = [tiny.build(layers=2, hidden=48) for _ in range(2)]
    counting = Counting()
    called: Any = models[0]
    if how == "layers":
        for block in called.blocks:
            block.compile(backend=counting)
    else:
        called = torch.compile(called, backend=counting)
    optimizers = [misa(model, hold, reach, inner_steps=2) for model in models]
    losses: list[list[float]] = [[], []]
    graphs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(16):
            for n, model in enumerate((called, models[1])):
                loss = tiny.loss_of(model, tiny.batch(step))
                loss.backward()
                losses[n].append(loss.item())
            for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
                assert (ours.grad is None) == (theirs.grad is None), (step, name)
                if ours.grad is not None:
                    torch.testing.assert_close(ours.grad.part, theirs.grad.part, rtol=1e-4, atol=1e-6)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            graphs.append(counting.graphs)
    torch._dynamo.reset()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    assert {len(own.monitor.rounds) for own in optimizers} == {9}
    # Hooks of slices are not traced, and break graphs; where a slice begins makes no new ones.
    assert 0 < graphs[1] == graphs[-1] < 8


@pytest.mark.slow
@pytest.mark.parametrize(("reach", "most"), [("down", 6), ("all", 16)])
def test_a_hundred_draws_make_no_graph_more_than_the_first(reach, most, caplog):
    """Up to each hooked matrix, of it, and behind the last; once more for a layer whose input needs no gradient."""
    torch._dynamo.reset()
    model, counting = tiny.build(layers=4, hidden=48), Counting()
    for block in model.blocks:
        block.compile(backend=counting)
    optimizer = misa(model, 1, reach, inner_steps=1)
    with caplog.at_level(logging.WARNING):
        tiny.train(model, optimizer, 2)
        first = counting.graphs
        tiny.train(model, optimizer, 100)
    torch._dynamo.reset()
    assert 0 < first == counting.graphs <= most
    assert "recompile_limit" not in caplog.text and len(optimizer.monitor.rounds) > 100
