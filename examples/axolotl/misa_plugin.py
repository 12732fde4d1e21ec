"""How does axolotl train with MISA? With this plugin, named in the YAML under `plugins`."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from misa_kernels import MISA, ImportanceSampler, param_groups
from misa_kernels.integrations.transformers import MISACallback


class MISAArgs(BaseModel):
    """What the plugin adds to the YAML.

    Attributes:
        misa: Keyword arguments of `MISA`, with `sampler` as a mapping of keyword arguments of `ImportanceSampler`.
    """

    misa: dict[str, Any] = {}


class Callback(MISACallback):
    """Also lets backward stop at the lowest active layer."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take back the input gradients that Trainer has asked for, which only re-entrant checkpointing needs."""
        if not (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", True):
            kwargs["model"].disable_input_require_grads()
        super().on_train_begin(args, state, control, **kwargs)


class MISAPlugin(BasePlugin):
    """Gives axolotl's trainer MISA as its optimizer."""

    def get_input_args(self) -> str:
        """Return where the schema of the plugin's part of the YAML is."""
        return f"{__name__}.MISAArgs"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Set the optimizer and the callback: axolotl 0.19 never calls the `create_optimizer` of a plugin.

        Raises:
            ValueError: With an adapter.
        """
        if cfg.adapter:
            raise ValueError(f"adapter={cfg.adapter} must be left out: MISA needs no adapter")
        args = trainer.args
        settings = dict(cfg.misa or {})
        trainer.optimizer = MISA(
            param_groups(trainer.model),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            total_steps=args.max_steps,
            **{**settings, "sampler": ImportanceSampler(**settings.get("sampler", {}))},
        )
        trainer.add_callback(Callback())
