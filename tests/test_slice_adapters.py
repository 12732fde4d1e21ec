"""Slices as adapters: the same training as MISA's over a plain base, and over one of 4 bits what they say."""

from __future__ import annotations

import copy
import warnings

import pytest
import tiny
import torch
import transformers
from libraries import required
from torch import nn

from benchmarks.memory import PeakMemory
from examples.neighbours.four_bits import quantise
from misa_kernels import MISA, UniformSampler, param_groups
from misa_kernels.slice_adapters import SlicedLinear, add_slices, load_slices, numel_of, slices_of

warnings.filterwarnings("ignore", module="bitsandbytes")


def build(hidden=64, bias=False):
    model = tiny.build(3, width=32, hidden=hidden)
    if bias:
        for block in model.blocks:
            block.down = nn.Linear(hidden, 32)
    return model


def share(model, width):
    """The δ of so many columns of each of three layers, half a parameter more."""
    return (32 * 3 * width + 0.5) / sum(p.numel() for p in model.parameters())


def train(model, optimizer, steps=5):
    return tiny.train(model, optimizer, steps)


def test_over_a_plain_base_it_is_misa_s_slices():
    model, other = build(), build()
    sampler = UniformSampler(granularity="slice", slices="down")
    optimizer = MISA(param_groups(model), lr=1e-2, weight_decay=0.0, delta=0.1, backend="reference", sampler=sampler)
    pieces = {name: optimizer.trained[p] for name, p in model.named_parameters() if p in optimizer.trained}
    width = max(p.last - p.first for p in pieces.values())
    layers = add_slices(other, share(other, width))
    assert len(layers) == len(pieces) == 3
    for name, layer in layers.items():
        piece = pieces[f"{name}.weight"]
        layer.first, layer.last = piece.first, piece.last
        layer.delta = nn.Parameter(torch.zeros(32, piece.last - piece.first))
    params = [param for param in other.parameters() if param.requires_grad]
    assert params == [layer.delta for layer in layers.values()]
    ours, theirs = train(model, optimizer), train(other, torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0))
    assert ours == pytest.approx(theirs, rel=1e-5)
    for name, layer in layers.items():
        torch.testing.assert_close(
            layer.merged(torch.float32).weight, model.get_submodule(name).weight, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("bias", [False, True])
def test_it_begins_as_the_base_and_is_merged_into_a_plain_layer(bias):
    model = build(1100, bias)
    whole, tokens = copy.deepcopy(model), tiny.batch(0)
    layers = add_slices(model, share(model, 100), seed=3)
    assert torch.equal(model(tokens), whole(tokens))
    assert {layer.last - layer.first for layer in layers.values()} == {100}
    assert len({layer.first for layer in layers.values()}) == 3
    train(model, torch.optim.AdamW([layer.delta for layer in layers.values()], lr=1e-2))
    trained = model(tokens)
    assert not torch.allclose(trained, whole(tokens))
    for name, layer in layers.items():
        model.set_submodule(name, layer.merged(torch.float32))
    torch.testing.assert_close(model(tokens), trained, rtol=1e-4, atol=1e-5)
    for name, layer in layers.items():
        before, now = whole.get_submodule(name), model.get_submodule(name)
        changed = (now.weight - before.weight).abs().amax(0) > 1e-5
        assert changed[layer.first : layer.last].all() and changed.sum() == 100
        assert not bias or torch.equal(now.bias, before.bias)


def test_what_is_saved_are_the_slices_alone():
    model = build()
    layers = add_slices(model, share(model, 8), seed=1)
    train(model, torch.optim.AdamW([layer.delta for layer in layers.values()], lr=1e-2))
    saved = copy.deepcopy(slices_of(layers))
    assert sum(own["delta"].numel() for own in saved.values()) == 32 * 3 * 8
    other = build()
    load_slices(again := add_slices(other, share(other, 8), seed=2), saved)
    assert torch.equal(other(tiny.batch(0)), model(tiny.batch(0))) and again.keys() == layers.keys()
    with pytest.raises(ValueError, match=r"blocks\.0\.down has \(32, 4\), and \(32, 8\) was saved"):
        load_slices(add_slices(build(), share(build(), 4)), saved)


def test_forward_keeps_the_slice_of_the_input_alone():
    class Frozen(nn.Module):
        in_features, out_features = 4096, 8

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 4096), requires_grad=False)

        def forward(self, x):
            return x @ self.weight.T

    layer = SlicedLinear(Frozen(), 100, 116)
    with PeakMemory() as memory:
        y = layer(torch.zeros(64, 4096))
    # The slice and its output; the input of 1 MB is gone.
    assert y.requires_grad and memory.held_bytes <= 4 * 64 * (16 + 2 * 8)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="none of the model's layers is called down_proj: say how"):
        add_slices(build(), names=["down_proj"])
    with pytest.raises(ValueError, match=r"must leave room for a column of each of 3 layers, 96 of .* give 0\.00\d+"):
        add_slices(build(), 1e-3)
    with pytest.raises(ValueError, match=r"delta=0 must be in \(0, 1\]"):
        add_slices(build(), 0)
    with pytest.raises(ValueError, match="columns 60 to 70 must be some of the 64 that the layer has"):
        SlicedLinear(nn.Linear(64, 32), 60, 70)
    with pytest.raises(ValueError, match=r"does not see .* name them, as in names=\['down_proj'\]"):
        add_slices(nn.Sequential(nn.Linear(8, 8)))


def test_the_least_delta_that_is_said_is_enough():
    with pytest.raises(ValueError, match="give") as raised:
        add_slices(build(), 1e-3)
    layers = add_slices(build(), float(str(raised.value).split()[-3]))
    assert {layer.last - layer.first for layer in layers.values()} == {1}


def test_over_four_bits_it_learns_and_the_base_stays():
    required("bitsandbytes")
    model = build(128)
    whole = copy.deepcopy(model)
    quantise(model)
    packed = {name: p.detach().clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    plain = [module.weight.numel() for module in whole.blocks.modules() if isinstance(module, nn.Linear)]
    assert len(packed) == len(plain) and 2 * sum(p.numel() for p in packed.values()) == sum(plain)
    tokens = tiny.batch(0)
    assert 0 < (model(tokens) - whole(tokens)).abs().mean() < 0.5 * whole(tokens).abs().mean()
    layers = add_slices(model, share(whole, 16))
    optimizer = MISA([layer.delta for layer in layers.values()], lr=3e-3, delta=1.0, state_dtype="int8")
    losses = train(model, optimizer, 30)
    assert sum(losses[-5:]) < sum(losses[:5])
    optimizer.release()
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.uint8:
            assert torch.equal(parameter, packed[name.replace("base.", "")])
    trained = model(tokens)
    for name, layer in layers.items():
        model.set_submodule(name, layer.merged(torch.float32))
    torch.testing.assert_close(model(tokens), trained, rtol=1e-3, atol=1e-4)


def test_a_state_dict_says_where_the_slices_lie():
    model, other = build(), build()
    layers = add_slices(model, share(model, 8), names="down", seed=1)
    train(model, torch.optim.AdamW([layer.delta for layer in layers.values()], lr=1e-2))
    others = add_slices(other, share(other, 8), names=["blocks.0.down", "blocks.1.down", "blocks.2.down"], seed=2)
    assert [layer.first for layer in layers.values()] != [layer.first for layer in others.values()]
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tiny.batch(0)), model(tiny.batch(0)))


def test_it_is_merged_into_another_dtype():
    layer = SlicedLinear(nn.Linear(64, 32), 3, 9)
    nn.init.normal_(layer.delta)
    merged, x = layer.merged(torch.bfloat16), torch.randn(5, 64)
    assert merged.weight.dtype == torch.bfloat16
    torch.testing.assert_close(merged(x.bfloat16()).float(), layer(x), rtol=0.05, atol=0.1)


def test_other_layers_and_other_slices_are_refused():
    model = build()
    layers = add_slices(model, share(model, 8))
    with pytest.raises(ValueError, match=r"blocks\.0\.down is a SlicedLinear and must be a linear layer"):
        add_slices(model, names="down")
    with pytest.raises(ValueError, match=r"blocks\.0\.norm1 is a LayerNorm and must be a linear layer"):
        add_slices(build(), names=["norm1"])
    with pytest.raises(ValueError, match=r"none of the model's layers is called upp: say"):
        add_slices(build(), names=["down", "upp"])
    for names in ([], [build().blocks[0].down]):
        with pytest.raises(TypeError, match="must be names of layers, such as"):
            add_slices(build(), names=names)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    with pytest.raises(ValueError, match=r"layers\.0\.linear2 lies in an nn\.TransformerEncoderLayer"):
        add_slices(encoder, 0.1)
    before = {name: layer.delta.detach().clone() for name, layer in layers.items()}
    saved = slices_of(layers)
    for change, sentence in (
        ({"blocks.2.down": {"delta": torch.ones(32, 8)}}, r"blocks\.2\.down must be saved as \{'first'"),
        ({"blocks.2.down": torch.ones(32, 8)}, r"blocks\.2\.down must be saved as \{'first'"),
        ({"blocks.2.down": {"first": 60, "delta": torch.ones(32, 8)}}, "columns 60 to 68 must be some of the 64"),
    ):
        other = {name: {"first": 0, "delta": torch.ones(32, 8)} for name in saved} | change
        with pytest.raises(ValueError, match=sentence):
            load_slices(layers, other)
    assert all(torch.equal(layer.delta, before[name]) for name, layer in layers.items())
    saved.pop("blocks.1.down")
    with pytest.raises(ValueError, match=r"slices of blocks\.0\.down, blocks\.2\.down were saved"):
        load_slices(layers, saved)


def test_a_refusal_changes_nothing_and_slices_of_before_stay():
    model = build()
    with pytest.raises(ValueError, match="must leave room"):
        add_slices(model, 1e-5)
    assert all(p.requires_grad for p in model.parameters())
    first = add_slices(model, 0.05, names="down")
    second = add_slices(model, 0.05, names="up")
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(layer.delta) for layer in (*first.values(), *second.values())}


def test_a_layer_at_several_places_has_one_slice():
    model = build()
    for block in model.blocks:
        block.down = model.blocks[0].down
    for given in (None, ["blocks.1.down"]):
        other = copy.deepcopy(model)
        layers = add_slices(other, 0.05, names=given)
        assert len(layers) == 1
        assert all(block.down is next(iter(layers.values())) for block in other.blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_does_not_round_what_is_merged(dtype):
    base = nn.Linear(64, 32).to(dtype)
    nn.init.constant_(base.bias, 5.0)
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    merged = SlicedLinear(base, 0, 4).merged(torch.float32)
    assert torch.equal(merged.weight, weight.float()) and torch.equal(merged.bias, bias.float())
    assert torch.equal(base.bias, bias) and base.training


def test_a_base_is_merged_as_it_is_in_evaluation():
    base = nn.Sequential(nn.Dropout(0.9), nn.Linear(64, 32))
    base.in_features, base.out_features = 64, 32
    merged = SlicedLinear(base, 0, 4).merged(torch.float32)
    torch.testing.assert_close(merged.weight, base[1].weight + 0.0, rtol=0, atol=1e-6)


def test_t5_reads_the_dtype_of_its_weights():
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model, tokens = transformers.T5ForConditionalGeneration(config), torch.arange(1, 9).view(1, 8)
    layers = add_slices(model, 0.1)
    assert {name.rpartition(".")[2] for name in layers} == {"wo"}
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(layer.delta.grad is not None and layer.delta.grad.any() for layer in layers.values())


def test_a_packed_weight_counts_as_what_it_stands_for():
    required("bitsandbytes")
    model = build(128)
    numel = sum(p.numel() for p in model.parameters())
    assert numel_of(model) == numel
    quantise(model)
    assert sum(p.numel() for p in model.parameters()) < numel == numel_of(model)
    # Tied weights count once, and formats with other parameters, or without any, by their sizes.
    tied = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    tied[1].weight = tied[0].weight
    packed = nn.Module()
    packed.in_features, packed.out_features = 10, 3
    assert numel_of(tied) == 16 and numel_of(nn.ModuleList([tied, packed])) == 46
    packed.W_q, packed.bias = nn.Parameter(torch.zeros(15)), nn.Parameter(torch.zeros(3))
    assert numel_of(packed) == 33


def test_what_is_trained_has_the_dtype_of_the_model_or_the_one_that_is_given():
    for dtype in (torch.float32, torch.bfloat16):
        layers = add_slices(build().to(dtype), 0.1)
        assert {layer.delta.dtype for layer in layers.values()} == {dtype}
    scaled = build()
    scaled.register_parameter("first", nn.Parameter(torch.zeros(4).to(torch.float8_e4m3fn), requires_grad=False))
    assert {layer.delta.dtype for layer in add_slices(scaled, 0.1).values()} == {torch.float32}
    layers = add_slices(build().bfloat16(), 0.1, dtype=torch.float32)
    assert {layer.delta.dtype for layer in layers.values()} == {torch.float32}


def save_llama(folder):
    """Write a small LLaMA of bfloat16 into a folder, as one of a hub."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=100, **sizes)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def test_transformers_trainer_trains_and_resumes_over_four_bits(tmp_path):
    required("bitsandbytes")
    save_llama(tmp_path)
    packed = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    rows = [{"input_ids": torch.arange(32) % 7, "labels": torch.arange(32) % 7}] * 16
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"),
        max_steps=8,
        per_device_train_batch_size=2,
        save_steps=4,
        logging_steps=1,
        gradient_checkpointing=True,
        use_cpu=True,
        report_to=[],
    )

    def trained(seed, resume=None):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=packed, dtype=torch.bfloat16
        )
        layers = add_slices(model, 0.05, seed=seed)
        # Trainer takes quantised models with peft's adapters alone.
        model.is_quantized = False
        params = [layer.delta for layer in layers.values()]
        precision = {"state_dtype": "int8", "param_precision": "split"}
        optimizer = MISA(params, lr=1e-2, delta=1.0, **precision)
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
        trainer.train(resume_from_checkpoint=resume)
        return layers, [line["loss"] for line in trainer.state.log_history if "loss" in line]

    layers, losses = trained(0)
    assert list(layers) == [f"model.layers.{number}.mlp.down_proj" for number in range(3)]
    assert losses[-1] < losses[0] - 0.1
    again, _ = trained(5, str(tmp_path / "run" / "checkpoint-4"))
    for name, layer in layers.items():
        assert again[name].first == layer.first and torch.equal(again[name].delta, layer.delta)


def test_slices_over_4_bits_go_into_the_model_of_16_bits(tmp_path):
    required("bitsandbytes")
    save_llama(tmp_path)

    def load(folder, **options):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)

    packed = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    trained = add_slices(load(tmp_path, quantization_config=packed), 0.05, seed=3)
    for layer in trained.values():
        nn.init.normal_(layer.delta, std=0.1)
    model = load(tmp_path)
    layers = add_slices(model, 0.05)
    load_slices(layers, slices_of(trained))
    for name, layer in layers.items():
        model.set_submodule(name, layer.merged(torch.bfloat16))
    model.save_pretrained(tmp_path / "merged")
    plain, merged = (dict(load(folder).named_parameters()) for folder in (tmp_path, tmp_path / "merged"))
    for name, before in plain.items():
        layer = trained.get(name.removesuffix(".weight"))
        expected = before.clone()
        if layer is not None:
            expected[:, layer.first : layer.last] += layer.delta
        assert torch.equal(merged[name], expected), name
