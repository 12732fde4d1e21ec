"""What Trainer, of transformers and TRL, needs beside `optimizers=(MISA(...), None)`: warnings, figures, an end."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from misa_kernels.optimizer import MISA
from misa_kernels.tools.backward import watch_backward


class MISACallback(TrainerCallback):
    """Warns at the start of a training what it would regret, adds the monitor to what is logged, ends the run.

    At the start it warns where the training is too short to visit the modules (`MISA.coverage`), where Trainer and
    MISA both clip, and during it, where backward does not run as the draw needs (`watch_backward`). It takes back the
    input gradients that Trainer's checkpointing asks for, unless that is re-entrant.

    Beside the loss it logs, for the round that the next step belongs to, `misa_round`, `misa_active_fraction`,
    `misa_perplexity_fraction`, `misa_backward_depth` (where layers are known; all fields of `monitor.Round`), and
    `misa_skipped_steps`, those of the rounds that have ended; none waits for the device. `trainer.state.log_history`
    and the progress bar have them in any case, but Trainer runs the reporters of `report_to` before the callbacks
    given to it: for TensorBoard, W&B and so on put this one before them.

    At the end it calls `MISA.release()`, so that every parameter has its `requires_grad` again, and leaves the weights
    that `load_best_model_at_end` loaded as they are. For a second `train()` set `trainer.optimizer = MISA(...)`;
    without this callback the first MISA goes on.

    Raises:
        TypeError: At the start of a training whose optimizer is not MISA.
        RuntimeError: At the start of a second training with the same MISA.

    Example::

        trainer = Trainer(model, args, train_dataset=dataset, optimizers=(MISA(param_groups(model), lr=1e-5), None))
        trainer.callback_handler.callbacks.insert(0, MISACallback())  # or callbacks=[MISACallback()], see above
        trainer.train()
    """

    def __init__(self) -> None:
        self._watch: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warn of what can be known now, and watch the backward passes."""
        optimizer = _misa(kwargs["optimizer"])
        # Who asks lets go of the weights that FSDP2 has sharded since then, or these would stay whole until the step.
        assert optimizer.modules
        if optimizer.is_released:
            raise RuntimeError(
                "train() came again, but MISA was released at the end of the first: set trainer.optimizer = MISA(...) "
                "before it, or leave MISACallback out"
            )
        planned = optimizer.coverage(state.max_steps)
        if planned.advice is not None and state.max_steps != optimizer.total_steps:
            warnings.warn(planned.advice, stacklevel=2)
        ours = optimizer.max_grad_norm
        if ours is not None and args.max_grad_norm > 0:
            warnings.warn(
                f"TrainingArguments.max_grad_norm={args.max_grad_norm} clips before MISA's max_grad_norm={ours}, so "
                "the smaller bound acts and importance is that of clipped gradients: set "
                "TrainingArguments(max_grad_norm=0)",
                stacklevel=2,
            )
        model = kwargs["model"]
        # Transformers' default is not re-entrant, and only re-entrant checkpointing needs an input with a gradient,
        # which drives backward down to the embeddings.
        options = args.gradient_checkpointing_kwargs
        reentrant = isinstance(options, dict) and options.get("use_reentrant", False)
        if args.gradient_checkpointing and not reentrant and hasattr(model, "disable_input_require_grads"):
            model.disable_input_require_grads()
        # A training that was interrupted has had no end.
        self._unwatch()
        if optimizer.monitor.layers:
            self._watch = watch_backward(model, optimizer)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the figures to a log of the training, not to one of an evaluation or of the whole run."""
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        optimizer = _misa(kwargs["optimizer"])
        current = optimizer.monitor.current
        figures = {name: getattr(current, name) for name in ("round", "active_fraction", "perplexity_fraction")}
        if current.backward_depth is not None:
            figures["backward_depth"] = current.backward_depth
        # `optimizer.skipped_steps` would wait for the device.
        figures["skipped_steps"] = optimizer.monitor.skipped_steps
        figures = {f"misa_{name}": figure for name, figure in figures.items()}
        logs.update(figures)
        # Written before the callbacks run.
        state.log_history[-1].update(figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Release the optimizer."""
        optimizer = _misa(kwargs["optimizer"])
        self._unwatch()
        kept = []
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # Loaded by now; the flush, and the rounding of masters, would move them.
            kept = [(param, param.detach().clone()) for param in optimizer.trained]
        optimizer.release()
        with torch.no_grad():
            for param, best in kept:
                param.copy_(best)

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None


def _misa(optimizer: Any) -> MISA:
    """Return the optimizer inside accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, MISA):
        raise TypeError(
            f"Trainer's optimizer is {type(inner).__name__} and must be MISA for MISACallback: give Trainer "
            "optimizers=(MISA(param_groups(model), ...), None)"
        )
    return inner
