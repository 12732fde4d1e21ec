"""How is a causal LM fine-tuned with MISA under Trainer? `python -m examples.loops.finetune_trainer --model DIR`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from examples.demo.data import finetuning_corpus
from misa_kernels import MISA, param_groups
from misa_kernels.integrations.transformers import MISACallback

LENGTH, BATCH, EVALUATED = 128, 4, 32
# What a tokenizer reads is far more than a short run trains on, and tokens are a few bytes each.
BYTES_PER_TOKEN = 8


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each of the 256 bytes and no others."""
    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def model_and_tokenizer(directory: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return what a directory holds, or a small model without training; bytes are tokens where no tokenizer is."""
    if directory is None:
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=None,
            eos_token_id=None,
        )
        return LlamaForCausalLM(config), byte_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    has_tokenizer = any((directory / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    return model, AutoTokenizer.from_pretrained(directory, local_files_only=True) if has_tokenizer else byte_tokenizer()


def rows(text: Tensor, count: int, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Return up to `count` sequences of `LENGTH` tokens, from the beginning of a text of bytes."""
    start = bytes(text[: count * LENGTH * BYTES_PER_TOKEN].tolist()).decode(errors="replace")
    tokens = tokenizer(start, add_special_tokens=False, verbose=False)["input_ids"]
    cut = [tokens[begin : begin + LENGTH] for begin in range(0, len(tokens) - LENGTH + 1, LENGTH)][:count]
    return [{"input_ids": row, "labels": row} for row in cut]


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Fine-tune on the C++ headers of PyTorch and return the held-out loss before and after, in nats a token."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="directory of a causal LM; without it, a small one is made")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of 4 x 128 tokens (default: 200)")
    parser.add_argument("--lr", type=float, help="learning rate (default: 1e-5 with --model, 4e-3 without)")
    parser.add_argument("--out", type=Path, help="where to save the result (default: nowhere)")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model, tokenizer = model_and_tokenizer(options.model)
    lr = options.lr or (4e-3 if options.model is None else 1e-5)
    groups = param_groups(model, mode="pretrain" if options.model is None else "finetune")
    optimizer = MISA(groups, lr=lr, delta=0.2, total_steps=options.steps)
    corpus = finetuning_corpus()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=str(options.out or scratch),
                max_steps=options.steps,
                per_device_train_batch_size=BATCH,
                warmup_steps=options.steps // 20,
                max_grad_norm=1.0,
                logging_steps=max(options.steps // 10, 1),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=rows(corpus.train, options.steps * BATCH, tokenizer),
            eval_dataset=rows(corpus.validation, EVALUATED, tokenizer),
            optimizers=(optimizer, None),
        )
        # Before the callbacks that report, so that they have its figures.
        trainer.callback_handler.callbacks.insert(0, MISACallback())
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    trained = {number for record in optimizer.monitor.rounds for number in record.active}
    print(
        f"held-out loss {before:.3f} -> {after:.3f} nats a token in {options.steps} steps; "
        f"{len(trained)} of {len(optimizer.modules)} modules were trained in {len(optimizer.monitor.rounds)} rounds, "
        f"{optimizer.monitor.current.active_fraction:.1%} of their parameters at a time"
    )
    if options.out:
        trainer.save_model()
        tokenizer.save_pretrained(options.out)
        print(f"the model is in {options.out}")
    return before, after


if __name__ == "__main__":
    main()
