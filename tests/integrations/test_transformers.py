"""Does Trainer train with MISA as a plain loop does, resume in mid-round, and end with the weights it should?"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if "CI" not in os.environ:
    for library in ("transformers", "accelerate", "tensorboard"):
        pytest.importorskip(library)

from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from examples.demo import data
from misa_kernels import MISA, UniformSampler, param_groups
from misa_kernels.integrations.transformers import MISACallback

BATCH, LENGTH, STEPS, INNER_STEPS = 2, 24, 10, 4
# In the middle of the second round.
SAVED = 6
FIGURES = {"round", "active_fraction", "perplexity_fraction", "backward_depth", "skipped_steps"}


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        # Gradients that differ from step to step, so that clipping them is more than a factor.
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype)


def misa(model: nn.Module, **changes: Any) -> MISA:
    return MISA(param_groups(model), **{"lr": 1e-2, "delta": 0.3, "inner_steps": INNER_STEPS, **changes})


def text(rows: int, start: int = 0) -> list[dict[str, Tensor]]:
    tokens = data.pretraining_corpus().train[start : start + rows * LENGTH].long().view(rows, LENGTH)
    return [{"input_ids": row, "labels": row} for row in tokens]


class Moving(Trainer):
    """Moves the model, as Trainer does from the host to a GPU: the parameters stay, their memory changes."""

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        super()._move_model_to_device(model, device)
        for param in model.parameters():
            param.data = param.data.clone()


def trainer(model: nn.Module, out: Path, *callbacks: TrainerCallback, optimizer: Any = None, **changes: Any) -> Trainer:
    """Return a Trainer of `STEPS` steps that logs each; `optimizer` is None, a MISA, or a class with its kwargs."""
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(output_dir=str(out), **{**defaults, **changes})
    chosen = {"optimizer_cls_and_kwargs": optimizer} if isinstance(optimizer, tuple) else {}
    return Moving(
        model=model,
        args=args,
        train_dataset=text(BATCH * STEPS * args.gradient_accumulation_steps),
        eval_dataset=text(4, start=50_000),
        callbacks=list(callbacks),
        **chosen or {"optimizers": (optimizer, None)},
    )


def losses(trained: Trainer, kind: str = "loss") -> list[float]:
    return [entry[kind] for entry in trained.state.log_history if kind in entry]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")


def plain_loop(
    model: nn.Module, optimizer: MISA, accumulation: int = 1
) -> tuple[list[float], dict[str, Tensor], list[float]]:
    """Return the losses, the weights after `SAVED` steps, and the learning rates; the rate falls to 0 in a line."""
    rows = torch.stack([row["input_ids"] for row in text(BATCH * STEPS * accumulation)])
    seen, rates, saved = [], [], {}
    for step, batch in enumerate(rows.split(BATCH * accumulation)):
        rates.append(1e-2 * (1 - step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        seen.append(0.0)
        for part in batch.split(BATCH):
            loss = model(input_ids=part, labels=part).loss / accumulation
            loss.backward()
            seen[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == SAVED:
            saved = weights(model)
    return seen, saved, rates


@pytest.mark.parametrize(
    ("dtype", "misa_changes", "trainer_changes"),
    [
        (torch.float32, {}, {}),
        pytest.param(torch.float32, {}, {"gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        pytest.param(torch.float32, {}, {"activation_checkpointing": True}, marks=pytest.mark.slow),
        (torch.bfloat16, {"param_precision": "master"}, {}),
        pytest.param(
            torch.bfloat16, {"param_precision": "stochastic", "state_dtype": "int8"}, {}, marks=pytest.mark.slow
        ),
    ],
    ids=["float32", "accumulation", "checkpointing", "bfloat16 master", "bfloat16 stochastic"],
)
def test_a_run_and_its_resumption_in_mid_round_equal_a_plain_loop(
    dtype: torch.dtype, misa_changes: dict[str, Any], trainer_changes: dict[str, Any], tmp_path: Path, monkeypatch
) -> None:
    accumulation = trainer_changes.get("gradient_accumulation_steps", 1)
    plain = llama(dtype)
    plain_optimizer = misa(plain, **misa_changes)
    expected, saved, rates = plain_loop(plain, plain_optimizer, accumulation)

    loaded = Counter()
    load = MISA.load_state_dict
    monkeypatch.setattr(MISA, "load_state_dict", lambda self, saved: (loaded.update([id(self)]), load(self, saved))[1])

    def run(resume: str | None = None) -> Trainer:
        model = llama(dtype)
        before = [param.data_ptr() for param in model.parameters()]
        optimizer = misa(model, **misa_changes)
        evaluated = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": SAVED}
        done = trainer(model, tmp_path, optimizer=optimizer, **evaluated, **trainer_changes)
        done.train(resume_from_checkpoint=resume)
        # What the test is about did happen.
        assert isinstance(done.optimizer, AcceleratedOptimizer)
        assert loaded[id(optimizer)] == (1 if resume is None else 2)
        assert all(param.data_ptr() != pointer for param, pointer in zip(model.parameters(), before, strict=True))
        assert len(losses(done, "eval_loss")) == 4
        return done

    whole = run()
    checkpoint = tmp_path / f"checkpoint-{SAVED}"
    resumed = run(str(checkpoint))

    assert losses(whole, "learning_rate") == pytest.approx(rates)
    # Trainer divides the loss of two parts by their tokens, the loop takes a mean of means: other roundings, which
    # Adam's division passes on to an update where a gradient is next to nothing.
    if accumulation > 1:
        assert losses(whole) == pytest.approx(expected, rel=1e-5)
        assert losses(resumed) == losses(whole)
        assert_same(weights(resumed.model), weights(whole.model))
        return
    assert losses(whole) == expected
    assert losses(resumed) == expected
    for done in (whole, resumed):
        assert_same(weights(done.model), weights(plain))
        assert done.optimizer.optimizer.active == plain_optimizer.active
    assert_same(load_file(checkpoint / "model.safetensors"), saved)
    # The state before the last step differs, so the comparison is of something.
    assert any(not torch.equal(saved[name], weight) for name, weight in weights(plain).items())


@pytest.mark.slow
def test_optimizer_class_and_kwargs_make_the_same_run(tmp_path: Path) -> None:
    models = [llama(), llama()]
    given = trainer(models[0], tmp_path, optimizer=misa(models[0]))
    kwargs = {"params": param_groups(models[1]), "lr": 1e-2, "delta": 0.3, "inner_steps": INNER_STEPS}
    made = trainer(models[1], tmp_path, optimizer=(MISA, kwargs))
    given.train()
    made.train()
    assert losses(made) == losses(given)
    assert_same(weights(models[1]), weights(models[0]))


@pytest.mark.slow
def test_groups_of_trainer_train_by_shape_alone_or_are_refused_by_name(tmp_path: Path) -> None:
    model = llama()
    before = weights(model)
    kwargs = {"lr": 1e-2, "delta": 0.5, "inner_steps": 1}
    without_roles = trainer(model, tmp_path, optimizer=(MISA, kwargs), weight_decay=0.25)
    with pytest.warns(UserWarning, match=r"MISA samples 23 modules .*: param_groups\(model\) also freezes embeddings"):
        without_roles.train()
    moved = {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])}
    assert "model.embed_tokens.weight" in moved
    assert moved == {name for name, weight in before.items() if weight.ndim == 2}
    # Trainer's own groups: decay and no decay.
    assert [group["weight_decay"] for group in without_roles.optimizer.param_groups] == [0.25, 0]

    small = trainer(llama(), tmp_path, optimizer=(MISA, {"delta": 0.1}))
    with pytest.raises(ValueError, match=r"embed_tokens|parameter 0.*param_groups\(model\)"):
        small.train()


@pytest.mark.slow
def test_trainer_and_misa_do_not_clip_twice_but_importance_sees_what_trainer_clipped(tmp_path: Path) -> None:
    bound = 0.5

    def run(theirs: float, ours: float | None) -> tuple[Trainer, float]:
        model = llama()
        # Uniform, or the scores that clipping changes would change the draws. Two rounds, of which the first ends.
        optimizer = misa(model, max_grad_norm=ours, inner_steps=5, sampler=UniformSampler())
        done = trainer(model, tmp_path, optimizer=optimizer, max_grad_norm=theirs, max_steps=9)
        done.train()
        scores = torch.from_numpy(optimizer.monitor.current.importance)
        assert 0 < scores.isnan().sum() < len(scores)
        return done, scores.nansum().item()

    runs = {(t, o): run(t, o) for t, o in [(bound, None), (0.0, bound), (bound, bound), (0.0, None)]}
    norms = {key: losses(done, "grad_norm") for key, (done, _) in runs.items()}
    for done, _ in runs.values():
        # Trainer logs the norm before anybody clips, of what is trained: all steps are ones that clipping acts on.
        assert all(norm > bound for norm in losses(done, "grad_norm"))
    theirs, ours, both, none = runs
    for other in (ours, both):
        for name, weight in weights(runs[theirs][0].model).items():
            # A ten-thousandth of an update; 1e-6 in the divisor of the factor, applied once or twice.
            torch.testing.assert_close(weights(runs[other][0].model)[name], weight, rtol=0, atol=1e-6)
    assert any(
        (weights(runs[none][0].model)[n] - w).abs().max() > 1e-3 for n, w in weights(runs[ours][0].model).items()
    )
    # The sum over the active modules of their mean squared norms is the mean of the global one: the bound's square
    # where Trainer clipped, and that of the gradient as it was where MISA did.
    assert runs[theirs][1] == pytest.approx(bound**2, rel=1e-4)
    assert runs[both][1] == pytest.approx(bound**2, rel=1e-4)
    for unclipped in (ours, none):
        assert runs[unclipped][1] == pytest.approx(sum(n * n for n in norms[unclipped][:5]) / 5, rel=1e-4)


def test_a_rehearsed_set_survives_what_accelerate_does_at_the_start(tmp_path: Path) -> None:
    model = llama()
    optimizer = misa(model)
    drawn = optimizer.active
    optimizer.rehearse()
    rehearsed = optimizer.active
    assert rehearsed != drawn
    first = Recorder()
    trainer(model, tmp_path, first, optimizer=optimizer, max_steps=1).train()
    assert first.active == [rehearsed]


class Recorder(TrainerCallback):
    """Notes before each step what is active, and after it what a monitor shows and what was logged."""

    def __init__(self) -> None:
        self.active: list[list[int]] = []
        self.shown: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.active.append(kwargs["optimizer"].optimizer.active)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        current = kwargs["optimizer"].optimizer.monitor.current
        self.shown.append({f"misa_{name}": getattr(current, name) for name in FIGURES - {"skipped_steps"}})

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logged.append(dict(kwargs["logs"]))


def test_figures_of_the_monitor_are_logged_beside_the_loss_and_nowhere_else(tmp_path: Path) -> None:
    model = llama()
    recorder = Recorder()
    optimizer = misa(model, skip_nonfinite=True)
    evaluated = {"eval_strategy": "steps", "eval_steps": 5, "report_to": "tensorboard"}
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "events")
    try:
        done = trainer(model, tmp_path, recorder, optimizer=optimizer, **evaluated)
        done.callback_handler.callbacks.insert(0, MISACallback())
        # The third step is left out, and known to be when its round has ended, after the fourth.
        done.add_callback(Poison(step=2))
        end = done.train().metrics
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    assert [shown["misa_round"] for shown in recorder.shown] == [0] * 3 + [1] * 4 + [2] * 3
    expected = [
        {**shown, "misa_skipped_steps": int(step >= INNER_STEPS)} for step, shown in enumerate(recorder.shown, start=1)
    ]
    assert len({figures["misa_perplexity_fraction"] for figures in expected}) > 1
    for logs in (recorder.logged, done.state.log_history):
        training = [entry for entry in logs if "loss" in entry]
        assert [{name: v for name, v in entry.items() if name.startswith("misa_")} for entry in training] == expected
        others = [entry for entry in logs if "loss" not in entry]
        assert len(others) == 3
        assert not any(name.startswith("misa_") for entry in [*others, end] for name in entry)

    events = EventAccumulator(str(tmp_path / "events")).Reload()
    for name in FIGURES:
        scalars = events.Scalars(f"train/misa_{name}")
        assert [scalar.step for scalar in scalars] == list(range(1, STEPS + 1))
        assert [s.value for s in scalars] == pytest.approx([figures[f"misa_{name}"] for figures in expected])


class Poison(TrainerCallback):
    """Makes the gradients of one step NaN."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            for param in kwargs["model"].parameters():
                if param.grad is not None:
                    param.grad.fill_(torch.nan)


def test_figures_are_in_the_history_too_when_the_callback_is_given_as_others_are(tmp_path: Path) -> None:
    model = llama()
    done = trainer(model, tmp_path, MISACallback(), optimizer=misa(model))
    done.train()
    assert all({f"misa_{name}" for name in FIGURES} < entry.keys() for entry in done.state.log_history[:-1])


def test_layers_that_are_not_known_are_neither_watched_nor_logged(tmp_path: Path) -> None:
    model = llama()
    kwargs = {"lr": 1e-2, "delta": 0.5, "inner_steps": 1}
    done = trainer(model, tmp_path, MISACallback(), optimizer=(MISA, kwargs))
    with pytest.warns(UserWarning, match="by their shapes alone"):
        done.train()
    assert done.state.log_history[0]["misa_active_fraction"] > 0
    assert "misa_backward_depth" not in done.state.log_history[0]


def said(done: Trainer) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done.train()
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize(
    ("misa_changes", "trainer_changes", "sentence"),
    [
        ({"inner_steps": 10, "delta": 0.9}, {}, "a run of 10 steps in rounds of 10 visits each of the 21 modules"),
        ({"max_grad_norm": 2.0}, {"max_grad_norm": 1.5}, "max_grad_norm=1.5 clips before MISA's max_grad_norm=2.0"),
        ({}, {"max_grad_norm": 1.5}, None),
        ({"max_grad_norm": 2.0}, {}, None),
    ],
)
def test_what_a_training_would_regret_is_said_at_its_start(
    misa_changes: dict[str, Any], trainer_changes: dict[str, Any], sentence: str | None, tmp_path: Path
) -> None:
    model = llama()
    optimizer = misa(model, **{"inner_steps": 1, **misa_changes})
    sentences = said(trainer(model, tmp_path, MISACallback(), optimizer=optimizer, **trainer_changes))
    assert [sentence in each for each in sentences] == [True] if sentence else not sentences, sentences


def test_backward_is_watched_during_the_training_and_not_after(tmp_path: Path) -> None:
    model = llama()
    model.enable_input_require_grads()
    hooks = hooks_of(model)
    done = trainer(
        model, tmp_path, MISACallback(), optimizer=misa(model, inner_steps=1, sampler=UniformSampler(depth_window=1))
    )
    assert any("something makes an input require a gradient" in sentence for sentence in said(done))
    assert hooks_of(model) == hooks
    assert not done.optimizer.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("reentrant", [None, True], ids=["default", "re-entrant"])
def test_checkpointing_does_not_drive_backward_below_the_lowest_active_layer(
    reentrant: bool | None, tmp_path: Path
) -> None:
    model = llama()
    kwargs = None if reentrant is None else {"use_reentrant": reentrant}
    optimizer = misa(model, inner_steps=1, sampler=UniformSampler(depth_window=1))
    depths: list[tuple[int, int]] = []
    reached: set[int] = set()
    for number, layer in enumerate(model.model.layers):
        # Runs again when the layer is recomputed, which is when backward comes to it; hooks of the layer do not.
        layer.mlp.register_forward_pre_hook(
            lambda *_, number=number: reached.add(number) if torch._C._current_graph_task_id() != -1 else None
        )

    class Depths(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            depths.append((3 - min(reached), optimizer.monitor.current.backward_depth))
            reached.clear()

    changes = {"activation_checkpointing": True, "activation_checkpointing_kwargs": kwargs}
    trainer(model, tmp_path, MISACallback(), Depths(), optimizer=optimizer, **changes).train()
    assert len({needed for _, needed in depths}) > 1
    # What re-entrant checkpointing needs, it keeps.
    assert all(ran == (needed if reentrant is None else 3) for ran, needed in depths), depths


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_the_end_gives_every_parameter_its_flag_again_and_frees_the_state(tmp_path: Path) -> None:
    model = llama()
    model.lm_head.weight.requires_grad_(False)
    flags = {name: param.requires_grad for name, param in model.named_parameters()}
    optimizer = misa(model)
    assert flags != {name: param.requires_grad for name, param in model.named_parameters()}
    trainer(model, tmp_path, MISACallback(), optimizer=optimizer).train()
    assert flags == {name: param.requires_grad for name, param in model.named_parameters()}
    assert optimizer.state_bytes == 0


@pytest.mark.parametrize("momentum_flush", [False, True])
@pytest.mark.parametrize("best", [4, 8], ids=["best in the middle", "best at the end"])
def test_the_best_weights_survive_the_release(best: int, momentum_flush: bool, tmp_path: Path) -> None:
    model = llama(torch.bfloat16)
    # Small steps, so that masters differ from the weights by parts of an ulp, which write-back rounds either way.
    optimizer = misa(model, lr=1e-4, momentum_flush=momentum_flush)
    choose = {"greater_is_better": best == 4, "learning_rate": 0.0}
    every = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    done = trainer(model, tmp_path, MISACallback(), optimizer=optimizer, load_best_model_at_end=True, **every, **choose)
    done.train()
    assert done.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert_same(weights(model), load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors"))
    assert all(param.requires_grad for param in model.parameters())


def test_a_second_training_needs_a_new_optimizer_where_the_first_was_released(tmp_path: Path) -> None:
    model = llama()
    done = trainer(model, tmp_path, MISACallback(), optimizer=misa(model))
    done.train()
    after, start = weights(model), losses(done)[0]
    with pytest.raises(RuntimeError, match=r"set trainer.optimizer = MISA\(\.\.\.\) before it"):
        done.train()
    assert_same(weights(model), after)
    done.optimizer = misa(model)
    done.train()
    assert losses(done)[0] < start
    assert any(not torch.equal(weight, after[name]) for name, weight in weights(model).items())


@pytest.mark.slow
def test_a_second_training_without_the_callback_goes_on_with_the_same_optimizer(tmp_path: Path) -> None:
    model = llama()
    done = trainer(model, tmp_path, optimizer=misa(model))
    done.train()
    assert done.optimizer.optimizer.monitor.current.round == STEPS // INNER_STEPS
    done.train()
    assert done.optimizer.optimizer.monitor.current.round == 2 * STEPS // INNER_STEPS


def test_another_optimizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"Trainer's optimizer is AdamW and must be MISA"):
        trainer(llama(), tmp_path, MISACallback()).train()
