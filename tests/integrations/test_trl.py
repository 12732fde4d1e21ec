"""TRL's SFTTrainer: MISA in place of its optimizer, on real text, and its resume in mid-round."""

from __future__ import annotations

import math
import os

import pytest
import torch

if "CI" not in os.environ:
    pytest.importorskip("trl")
    pytest.importorskip("datasets")

from examples.demo.data import pretraining_corpus
from misa_kernels import MISA, param_groups
from misa_kernels.integrations.transformers import MISACallback

pytestmark = pytest.mark.slow

STEPS, ROUND = 10, 4


def tokenizer():
    """A byte is a token, and so are the end of a text and its padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate([*alphabet, "<end>", "<pad>"])}
    bytewise = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    bytewise.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), pre_tokenizers.Split("", "isolated")]
    )
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>", pad_token="<pad>")


def trainer_of(folder, **options):
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=258, max_position_embeddings=64, **sizes))
    text = bytes(pretraining_corpus().train[:20_000].tolist()).decode("latin-1")
    dataset = Dataset.from_dict({"text": [text[start : start + 60] for start in range(0, len(text), 60)]})
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        max_length=64,
        logging_steps=1,
        save_steps=6,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataset_num_proc=None,
        **options,
    )
    optimizer = MISA(param_groups(model), lr=1e-2, delta=0.2, inner_steps=ROUND)
    return SFTTrainer(
        model,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer(),
        optimizers=(optimizer, None),
        callbacks=[MISACallback()],
    ), optimizer


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:a run of 10 steps")
def test_sft_trainer_trains_the_active_modules_and_resumes_in_mid_round(tmp_path):
    trainer, optimizer = trainer_of(tmp_path)
    start = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    trainer.train()
    losses = losses_of(trainer)
    assert len(losses) == STEPS and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    drawn = {optimizer.modules[number].name for record in optimizer.monitor.rounds for number in record.active}
    changed = {name for name, param in trainer.model.named_parameters() if not torch.equal(param, start[name])}
    assert len(optimizer.monitor.rounds) == 3
    assert {name.removesuffix(".weight") for name in changed} == drawn
    # Released at the end.
    assert all(param.requires_grad for param in trainer.model.parameters())

    # The checkpoint of step 6 lies in the second round.
    resumed, again = trainer_of(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert losses_of(resumed) == losses
    assert again.active == optimizer.active
    for (name, param), other in zip(resumed.model.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(param, other), name
