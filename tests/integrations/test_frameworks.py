"""LLaMA-Factory and axolotl really train with MISA, through the files in examples/ and their own entry points.

Both pin other versions of transformers than this project tests with, so each runs in an environment of its own (see the
README beside the files) and is skipped in all others.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from examples.demo.data import header_files
from misa_kernels import MISA

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 12


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(library) is None, reason=f"needs {library} in its own environment"
    )


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of four layers whose tokens are bytes, as a local checkpoint."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "<pad>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, max_position_embeddings=512, **sizes, **ids)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text in the form that both libraries read: the first half of a header, to be continued."""
    path = tmp_path_factory.mktemp("records") / "code.json"
    texts = [file.read_text()[:100] for file in header_files()[:64]]
    path.write_text(json.dumps([{"instruction": text[:50], "input": "", "output": text[50:]} for text in texts]))
    return path


def recorder(base: type) -> type:
    """Return MISACallback which also records, at each step, what was active and which weights changed."""

    class Recorder(base):
        steps: list[tuple[set[str], set[str]]] = []
        optimizer: Any = None
        all_trainable_at_end = False

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = kwargs["optimizer"]
            Recorder.optimizer = getattr(optimizer, "optimizer", optimizer)
            self.before = {name: param.detach().clone() for name, param in kwargs["model"].named_parameters()}
            self.grad = {name for name, param in kwargs["model"].named_parameters() if param.requires_grad}

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            after = dict(kwargs["model"].named_parameters())
            changed = {name for name, weight in self.before.items() if not torch.equal(weight, after[name])}
            Recorder.steps.append((self.grad, changed))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_train_end(args, state, control, **kwargs)
            Recorder.all_trainable_at_end = all(param.requires_grad for param in kwargs["model"].parameters())

    return Recorder


def assert_misa_trained(record: Any, recwarn: pytest.WarningsRecorder, first: Path, last: Path) -> None:
    """Check what was recorded, and that the saved model is the trained one."""
    from safetensors.torch import load_file

    assert isinstance(record.optimizer, MISA)
    assert len(record.steps) == STEPS
    for number, (active, changed) in enumerate(record.steps):
        # The first step of a warm-up may have a learning rate of 0.
        assert changed == active or (number == 0 and not changed)
        assert 0 < len(active) < 28 and all(".layers." in name and "norm" not in name for name in active)
    # Rounds of five steps.
    rounds = [{frozenset(active) for active, _ in record.steps[at : at + 5]} for at in (0, 5, 10)]
    assert [len(sets) for sets in rounds] == [1, 1, 1] and len(set.union(*rounds)) > 1
    assert record.all_trainable_at_end
    # watch_backward would say so if it had not stopped at the lowest active layer.
    assert not [warning for warning in recwarn if str(warning.message).startswith("backward")]

    before, after = (load_file(folder / "model.safetensors") for folder in (first, last))
    moved = {name for name in after if not torch.equal(before[name].float(), after[name].float())}
    assert moved == set.union(*(changed for _, changed in record.steps))


@needs("llamafactory")
def test_llamafactory(
    model_dir: Path,
    records: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    from examples.llamafactory import train_misa

    (records.parent / "dataset_info.json").write_text(json.dumps({"code": {"file_name": records.name}}))
    monkeypatch.setattr(train_misa, "MISACallback", recorder(train_misa.MISACallback))
    overrides = {
        "misa.delta": 0.2,
        "misa.sampler.depth_window": 2,
        "model_name_or_path": model_dir,
        "dataset": "code",
        "dataset_dir": records.parent,
        "template": "default",
        "cutoff_len": 512,
        "output_dir": tmp_path / "out",
        "max_steps": STEPS,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        # LLaMA-Factory asks a CUDA device for it.
        "pure_bf16": "false",
        "use_cpu": "true",
        "report_to": "none",
    }
    yaml_file = str(EXAMPLES / "llamafactory" / "misa.yaml")
    monkeypatch.setattr(sys, "argv", ["train_misa.py", yaml_file, *(f"{k}={v}" for k, v in overrides.items())])
    train_misa.main()
    assert_misa_trained(train_misa.MISACallback, recwarn, model_dir, tmp_path / "out")


@needs("llamafactory")
@pytest.mark.parametrize(
    ("override", "message"),
    [("finetuning_type=lora", "finetuning_type=lora must be full"), ("max_steps=-1", "max_steps=-1 must be positive")],
)
def test_llamafactory_refuses(override: str, message: str) -> None:
    from types import SimpleNamespace

    from examples.llamafactory import train_misa

    settings = {"finetuning_type": "full", "max_steps": 12} | dict([override.split("=")])
    args = SimpleNamespace(max_steps=int(settings["max_steps"]), finetuning_type=settings["finetuning_type"])
    with pytest.raises(ValueError, match=message):
        train_misa.create_optimizer({}, torch.nn.Linear(1, 1), args, args)


@needs("axolotl")
def test_axolotl(
    model_dir: Path,
    records: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "axolotl"))
    import misa_plugin
    from axolotl.cli.train import do_cli

    monkeypatch.setattr(misa_plugin, "Callback", recorder(misa_plugin.Callback))
    monkeypatch.setattr(sys, "argv", ["axolotl"])
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    config = yaml.safe_load((EXAMPLES / "axolotl" / "misa.yaml").read_text())
    config["misa"] |= {"delta": 0.2, "sampler": {"depth_window": 2}}
    config |= {
        "base_model": str(model_dir),
        "datasets": [{"path": str(records), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "sequence_len": 512,
        "output_dir": str(tmp_path / "out"),
        "max_steps": STEPS,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        # Its own 16-bit mode asks for a device that has one.
        "bf16": False,
    }
    path = tmp_path / "misa.yaml"
    path.write_text(yaml.safe_dump(config))
    do_cli(str(path))
    assert_misa_trained(misa_plugin.Callback, recwarn, model_dir, tmp_path / "out")
