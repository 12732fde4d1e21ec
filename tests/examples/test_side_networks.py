"""Networks beside a frozen model: they begin as it, learn, and backward does not run through it, or its end alone."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from libraries import required
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.memory import PeakMemory
from examples.neighbours.four_bits import quantise
from examples.neighbours.late_layers import LateTuned
from examples.neighbours.side_tuning import SideTuned
from misa_kernels import MISA, UniformSampler

warnings.filterwarnings("ignore", module="bitsandbytes")


def build(layers=6, four_bits=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    if four_bits:
        required("bitsandbytes")
        quantise(model)
    return model


def tokens(step=0, length=24, batch=4):
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(step))


def of_kind(name, base):
    torch.manual_seed(1)
    return SideTuned(base, reduction=4) if name == "side" else LateTuned(base, late=2)


KINDS = ["side", "late"]


@pytest.mark.parametrize("four_bits", [False, True], ids=["float32", "4 bits"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_the_base_and_learns(kind, four_bits):
    base = build(four_bits=four_bits)
    before, ids = copy.deepcopy(base.state_dict()), tokens()
    expected = base(input_ids=ids, labels=ids)
    model = of_kind(kind, base)
    found = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
    trained = [param for param in model.parameters() if param.requires_grad]
    assert sum(p.numel() for p in trained) < 0.5 * sum(p.numel() for p in build().parameters())
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for step in range(40):
        ids = tokens(step % 2)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items() if name in before)
    assert all(param.grad is None for param in base.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_misa_draws_among_the_matrices_of_the_network_beside(kind):
    model, ids = of_kind(kind, build()), tokens()
    own = model.side if kind == "side" else model.early
    # What begins at zero lets no gradient past it, so it is always on.
    last = (model.side["up"] if kind == "side" else model.early["widen"]).weight
    sampled = [(name, param) for name, param in own.named_parameters() if param.ndim == 2 and param is not last]
    groups = [{"params": sampled, "role": "sampled"}, {"params": [("last", last)], "role": "dense"}]
    optimizer = MISA(groups, lr=1e-2, delta=0.3, inner_steps=5, sampler=UniformSampler())
    losses = []
    for _ in range(40):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4]) and len({r.active for r in optimizer.monitor.rounds}) > 2


def backwards(model, base, ids):
    """Return how many layers of the base get a gradient of their output."""
    reached = set()

    def hook(number):
        def note(module, given, output):
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _: reached.add(number))

        return note

    handles = [layer.register_forward_hook(hook(n)) for n, layer in enumerate(base.get_decoder().layers)]
    model(input_ids=ids, labels=ids).loss.backward()
    for handle in handles:
        handle.remove()
    return reached


@pytest.mark.parametrize(("kind", "reached"), [("side", set()), ("late", {4, 5})])
def test_backward_reaches_no_more_than_it_says(kind, reached):
    base = build()
    model = of_kind(kind, base)
    # What begins at zero lets no gradient further.
    nn.init.normal_((model.side["up"] if kind == "side" else model.early["widen"]).weight, std=0.02)
    assert backwards(model, base, tokens()) == reached
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_its_peak_is_below_lora_s(kind):
    peft = required("peft")
    ids = tokens(length=128, batch=2)
    base = build(layers=12)
    adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules="all-linear"))
    peaks = {}
    for name, model in (("lora", adapted), (kind, of_kind(kind, base))):
        with PeakMemory() as memory:
            model(input_ids=ids, labels=ids).loss.backward()
        peaks[name] = memory.peak_bytes
    assert peaks[kind] < 0.6 * peaks["lora"]


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_nothing_is_kept_and_the_mode_is_left_as_it_was(kind):
    model = of_kind(kind, build())
    with torch.no_grad():
        assert not model(input_ids=tokens()).logits.requires_grad and not torch.is_grad_enabled()
    assert model(input_ids=tokens()).logits.requires_grad and torch.is_grad_enabled()
    with pytest.raises((RuntimeError, ValueError, IndexError, TypeError)):
        model(input_ids=torch.tensor([[10**6]]))
    assert torch.is_grad_enabled()
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.base.get_decoder().layers)


def test_what_does_not_divide_or_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"reduction=7, heads=2 must divide the hidden size 64"):
        SideTuned(build(), reduction=7)
    for late in (0, 6):
        with pytest.raises(ValueError, match=f"late={late} must be 1 to 5 of the 6 layers"):
            LateTuned(build(), late=late)


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_bases_that_scale_their_logits_and_call_their_layers_otherwise(kind):
    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    granite = transformers.GraniteConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, logits_scaling=3.0)
    gpt = transformers.GPT2Config(vocab_size=61, n_embd=64, n_layer=4, n_head=4)
    ids = tokens()
    for config in (granite, gpt):
        torch.manual_seed(0)
        base = transformers.AutoModelForCausalLM.from_config(config).eval()
        expected = base(input_ids=ids, labels=ids)
        found = of_kind(kind, base)(input_ids=ids, labels=ids, use_cache=True)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
        found.loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing_and_it_is_cast_as_a_whole(kind):
    model = of_kind(kind, build()).eval()
    for name, param in model.named_parameters():
        if name.endswith(("up.weight", "widen.weight")) and param.requires_grad:
            nn.init.normal_(param, std=0.1)
    ids, padded = tokens(length=10), torch.nn.functional.pad(tokens(length=10), (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    places = mask.cumsum(-1).sub(1).clamp(min=0)
    found = model(input_ids=padded, attention_mask=mask, position_ids=places).logits[:, 3:]
    torch.testing.assert_close(found, model(input_ids=ids).logits, rtol=1e-3, atol=1e-4)
    model.bfloat16()(input_ids=ids, labels=ids).loss.backward()
