"""How does LLaMA-Factory train with MISA? `python train_misa.py misa.yaml`, in place of `llamafactory-cli train`."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from llamafactory.hparams.parser import read_args
from llamafactory.train.tuner import run_exp

from misa_kernels import MISA, ImportanceSampler, param_groups
from misa_kernels.integrations.transformers import MISACallback


def create_optimizer(settings: dict[str, Any], model: Any, training_args: Any, finetuning_args: Any) -> MISA:
    """Return what LLaMA-Factory's trainers take in place of their own optimizer.

    Args:
        settings: `misa` of the YAML: keyword arguments of `MISA`, with `sampler` as those of `ImportanceSampler`.
        model: The model that is trained.
        training_args: Learning rate, betas, epsilon, weight decay and steps.
        finetuning_args: Must ask for full fine-tuning.

    Raises:
        ValueError: Without `finetuning_type: full` or `max_steps`.
    """
    if finetuning_args.finetuning_type != "full":
        raise ValueError(
            f"finetuning_type={finetuning_args.finetuning_type} must be full: MISA trains the model itself"
        )
    if training_args.max_steps <= 0:
        raise ValueError(f"max_steps={training_args.max_steps} must be positive: the length of rounds follows from it")
    if not (training_args.gradient_checkpointing_kwargs or {}).get("use_reentrant", True):
        # Only the re-entrant kind needs the input gradients that Trainer has asked for, and they cost a whole backward.
        model.disable_input_require_grads()
    return MISA(
        param_groups(model),
        lr=training_args.learning_rate,
        betas=(training_args.adam_beta1, training_args.adam_beta2),
        eps=training_args.adam_epsilon,
        weight_decay=training_args.weight_decay,
        total_steps=training_args.max_steps,
        **{**settings, "sampler": ImportanceSampler(**settings.get("sampler", {}))},
    )


def main() -> None:
    """Train as the configuration named on the command line says."""
    if not isinstance(config := read_args(), dict):
        raise SystemExit("usage: python train_misa.py CONFIG.yaml [KEY=VALUE ...]")
    settings = config.pop("misa", {})
    # Each stage's trainer has this function, under its own name, from `llamafactory.train.trainer_utils`.
    stage = importlib.import_module(f"llamafactory.train.{config.get('stage', 'sft')}.trainer")
    stage.create_custom_optimizer = partial(create_optimizer, settings)
    run_exp(config, callbacks=[MISACallback()])


if __name__ == "__main__":
    main()
