"""How is an embedding trained without the rows of tokens that never occur? They are taken out while it is trained.

A table of 128,256 tokens of Llama 3 8B takes 1 GB in bfloat16, and its gradient and moments in float32 five times as
much; a data set of one domain has a tenth of these tokens. What is never looked up has no gradient, so training is the
same without. `examples/neighbours/vocabulary.py` measures it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Labels that do not count, as for `F.cross_entropy`.
IGNORED = -100


class _Save:
    """Puts the whole table into a state dict; a copy of the model has one of its own, and torch may mark it."""

    def __init__(self, owner: PrunedEmbedding) -> None:
        self.owner = owner

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        state_dict[f"{prefix}weight"] = self.owner.whole()


def _refuse(*_: Any, **__: Any) -> None:
    raise RuntimeError("a pruned output head numbers tokens in its own way: call restore() before generate()")


class PrunedEmbedding:
    """The rows of a model's input embedding that data uses, in the place of all of them, until `restore()`.

    Token numbers stay those of the tokenizer: a hook looks up where the rows are now. `model.state_dict()` holds the
    whole table, and `load_state_dict` takes it, so that what is saved is the model as it was. Make the optimizer
    afterwards: the rows are a parameter of their own.

    Args:
        model: With `get_input_embeddings()`, as those of transformers.
        tokens: int64 of any shape, all token numbers that will come, those of evaluation and special ones included.
        head: Whether to prune the output head, too, which is tied to the embedding: the model then chooses among these
            tokens only, so its loss is another one. Labels are looked up where a model of transformers calls its
            `loss_function`, elsewhere with `rows_of`. `generate()` has to wait for `restore()`.
        file: Where the whole table lies meanwhile, mapped into memory; None: on the CPU.

    Attributes:
        kept: int64[k], the tokens whose rows are there, ascending.

    Raises:
        TypeError: If the embedding is no plain `nn.Embedding`, or the head no `nn.Linear` without bias.
        ValueError: If the head is tied and `head` is not given, or the other way round, or others share the weight.
    """

    def __init__(self, model: nn.Module, tokens: Tensor, *, head: bool = False, file: Path | None = None) -> None:
        embedding = model.get_input_embeddings()
        if type(embedding).forward is not nn.Embedding.forward:
            raise TypeError(f"the embedding is a {type(embedding).__name__} and must be a plain nn.Embedding")
        weight = embedding.weight
        users = {name: m for name, m in model.named_modules() if any(p is weight for p in m._parameters.values())}
        others = {name: module for name, module in users.items() if module is not embedding}
        output = getattr(model, "get_output_embeddings", lambda: None)()
        if others and not (len(others) == 1 and output in others.values()):
            raise ValueError(f"{', '.join(others)} have the weight of the embedding, too, and need all of its rows")
        if head != bool(others):
            raise ValueError(
                f"the output head {next(iter(others))} is tied to the embedding: give head=True if the model shall "
                "choose among these tokens only, or untie it"
                if others
                else "head=True needs an output head that is tied to the embedding, which this model has not: leave it "
                "out, as the head has rows of its own"
            )
        if others and (type(output).forward is not nn.Linear.forward or output.bias is not None):
            raise TypeError(f"the head is a {type(output).__name__} and must be an nn.Linear without bias")
        used = tokens.detach().reshape(-1).cpu()
        if (padding := embedding.padding_idx) is not None:
            used = torch.cat([used, torch.tensor([padding])])
        self.kept = used.unique()
        if not len(used) or not 0 <= int(self.kept[0]) <= int(self.kept[-1]) < len(weight):
            raise ValueError(f"tokens must be numbers from 0 to {len(weight) - 1}, those that will come")
        self._modules: list[nn.Module] = [embedding, *others.values()]
        self._model, self._padding, self._size = model, padding, len(weight)
        self._whole = weight.detach().cpu()
        if file is not None:
            mapped = torch.from_file(str(file), shared=True, size=weight.numel(), dtype=weight.dtype)
            self._whole = mapped.view(weight.shape).copy_(weight.detach())
        places = torch.full((len(weight),), -1)
        places[self.kept] = torch.arange(len(self.kept))
        # Moves with the model, and is not saved.
        embedding.register_buffer("places", places.to(weight.device), persistent=False)
        self._put(weight, weight.detach()[self.kept.to(weight.device)].clone())
        embedding.padding_idx = None if padding is None else int(places[padding])
        self._handles = [embedding.register_forward_pre_hook(self._look_up, with_kwargs=True)]
        for module in self._modules:
            self._handles.append(module.register_state_dict_post_hook(_Save(self)))
            self._handles.append(module.register_load_state_dict_pre_hook(self._load))
        is_known = head and isinstance(getattr(type(model), "loss_function", None), property)
        self._loss, self._own_loss = model.loss_function if is_known else None, vars(model).get("_loss_function")
        if is_known:
            model.loss_function = self._loss_of_rows
        if head:
            model.generate = _refuse

    def rows_of(self, tokens: Tensor) -> Tensor:
        """Return where the rows of tokens are, int64 of the same shape; labels that do not count stay as they are.

        Raises:
            IndexError: For a token without a row; on a GPU the lookup fails there.
        """
        is_label = tokens != IGNORED
        rows = torch.where(is_label, self._modules[0].places[tokens.clamp(min=0)], tokens)
        if tokens.device.type == "cpu" and bool((without := is_label & ((rows < 0) | (tokens < 0))).any()):
            lost = int(tokens[without][0])
            raise IndexError(f"token {lost} was not among those that PrunedEmbedding was given, and has no row")
        return rows

    def _look_up(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        if args:
            return (self.rows_of(args[0]), *args[1:]), named
        return args, named | {"input": self.rows_of(named["input"])}

    def _loss_of_rows(self, logits: Tensor, labels: Tensor | None, vocab_size: int, **others: Any) -> Tensor:
        assert self._loss is not None
        labels = None if labels is None else self.rows_of(labels)
        if others.get("shift_labels") is not None:
            others["shift_labels"] = self.rows_of(others["shift_labels"])
        return self._loss(logits=logits, labels=labels, vocab_size=len(self.kept), **others)

    def _put(self, before: nn.Parameter, rows: Tensor) -> None:
        """Let all who share a weight have another one, with its flag."""
        after = nn.Parameter(rows, requires_grad=before.requires_grad)
        for module in self._modules:
            module.weight = after
            setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", len(after))

    def whole(self) -> Tensor:
        """Return the whole table with the rows as they are now, on the CPU; the next call writes to the same one."""
        rows = self._modules[0].weight.detach().cpu()
        if self._whole.dtype != rows.dtype:
            # The model was cast since; both that share the table save one.
            self._whole = self._whole.to(rows.dtype)
        self._whole[self.kept] = rows
        return self._whole

    def _load(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        saved = state_dict.get(f"{prefix}weight")
        if saved is not None and len(saved) == self._size:
            self._whole.copy_(saved)
            state_dict[f"{prefix}weight"] = saved[self.kept.to(saved.device)]

    def restore(self) -> None:
        """Give the model its whole table back, with what was trained; a second call does nothing."""
        embedding = self._modules[0]
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._loss is not None:
            vars(self._model).pop("_loss_function")
            if self._own_loss is not None:
                self._model.loss_function = self._own_loss
        vars(self._model).pop("generate", None)
        self._put(embedding.weight, self.whole().clone().to(embedding.weight.device))
        embedding.padding_idx = self._padding
        del embedding.places
