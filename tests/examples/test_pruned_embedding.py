"""A model whose embedding has lost the rows that are never looked up trains as the whole one, and is saved as that."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from examples.neighbours.pruned_embedding import PrunedEmbedding
from misa_kernels import MISA, param_groups

VOCABULARY, USED = 96, (3, 4, 7, 20, 21, 22, 50, 95)


def build(tied=False, padding=None):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=padding,
    )
    return LlamaForCausalLM(config)


def batch(step, length=12):
    generator = torch.Generator().manual_seed(step)
    return torch.tensor(USED)[torch.randint(len(USED), (3, length), generator=generator)]


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)


def misa(model):
    groups = param_groups(model, dense=[model.get_input_embeddings()])
    # As many matrices as of the whole model.
    delta = 0.3 * sum(p.numel() for p in build().parameters()) / sum(p.numel() for p in model.parameters())
    return MISA(groups, lr=1e-2, weight_decay=0.0, delta=delta, inner_steps=2)


def train(model, optimizer, steps=6, mask=False):
    losses = []
    for step in range(steps):
        tokens = batch(step)
        labels = tokens.masked_fill(torch.arange(tokens.shape[1]) < 4, -100) if mask else tokens
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("make", [adamw, misa])
@pytest.mark.parametrize("padding", [None, 7, 0])
def test_it_trains_as_the_whole_model_to_the_bit(make, padding, tmp_path):
    model, whole = build(padding=padding), build(padding=padding)
    pruned = PrunedEmbedding(model, torch.tensor(USED), file=tmp_path / "table")
    rows = len(USED) + (padding == 0)
    assert model.get_input_embeddings().weight.shape == (rows, 16) and len(pruned.kept) == rows
    optimizer, other = make(model), make(whole)
    assert train(model, optimizer, mask=True) == train(whole, other, mask=True)
    assert states_equal(model.state_dict(), whole.state_dict())
    state = next(own for param, own in optimizer.state.items() if param is model.get_input_embeddings().weight)
    assert state["exp_avg"].shape == (rows, 16)
    pruned.restore()
    assert states_equal(model.state_dict(), whole.state_dict())
    assert model.get_input_embeddings().padding_idx == whole.get_input_embeddings().padding_idx
    tokens = torch.arange(VOCABULARY)[None]
    assert torch.equal(model(input_ids=tokens).logits, whole(input_ids=tokens).logits)


def test_a_tied_head_needs_a_word_and_then_chooses_among_the_tokens():
    model = build(tied=True)
    with pytest.raises(ValueError, match=r"the output head lm_head is tied to the embedding: give head=True"):
        PrunedEmbedding(model, torch.tensor(USED))
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY
    whole = copy.deepcopy(model)
    pruned = PrunedEmbedding(model, torch.tensor(USED), head=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    optimizer, other = adamw(model), adamw(whole)
    losses = train(model, optimizer)
    for step, loss in enumerate(losses):
        tokens = batch(step)
        logits = whole(input_ids=tokens).logits[:, :-1, list(USED)]
        targets = torch.searchsorted(torch.tensor(USED), tokens[:, 1:])
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        expected.backward()
        other.step()
        other.zero_grad()
    pruned.restore()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-3, atol=1e-5, msg=name)
    tokens = batch(0)
    assert torch.equal(
        model(input_ids=tokens, labels=tokens).loss, LlamaForCausalLM.forward(model, tokens, labels=tokens).loss
    )
    assert model.lm_head.out_features == VOCABULARY and model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_the_whole_model(tied, tmp_path):
    model = build(tied)
    before = copy.deepcopy(model.state_dict())
    PrunedEmbedding(model, torch.tensor(USED), head=tied)
    assert states_equal(model.state_dict(), before)
    train(model, adamw(model))
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert states_equal(again.state_dict(), model.state_dict())
    table, old = again.get_input_embeddings().weight, before["model.embed_tokens.weight"]
    unused = [token for token in range(VOCABULARY) if token not in USED]
    assert torch.equal(table[unused], old[unused]) and not torch.equal(table[list(USED)], old[list(USED)])
    # And the way back, into a pruned one.
    other = build(tied)
    pruned = PrunedEmbedding(other, torch.tensor(USED), head=tied)
    other.load_state_dict(again.state_dict())
    assert states_equal(other.state_dict(), again.state_dict())
    pruned.restore()
    assert states_equal(other.state_dict(), again.state_dict())


def test_it_moves_and_is_cast_with_the_model():
    model = build()
    PrunedEmbedding(model, torch.tensor(USED))
    model.bfloat16()
    table = model.state_dict()["model.embed_tokens.weight"]
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16 and table.shape == (VOCABULARY, 16)
    train(model, adamw(model), 1)


def test_what_cannot_be_is_refused_and_changes_nothing():
    model = build()
    kept = dict(model.named_parameters())
    with pytest.raises(ValueError, match="head=True needs an output head that is tied"):
        PrunedEmbedding(model, torch.tensor(USED), head=True)
    for tokens in (torch.tensor([], dtype=torch.int64), torch.tensor([3, VOCABULARY]), torch.tensor([-1])):
        with pytest.raises(ValueError, match=f"tokens must be numbers from 0 to {VOCABULARY - 1}"):
            PrunedEmbedding(model, tokens)
    model.model.other = torch.nn.Embedding(VOCABULARY, 16)
    model.model.other.weight = model.get_input_embeddings().weight
    with pytest.raises(ValueError, match=r"model\.other have the weight of the embedding, too"):
        PrunedEmbedding(model, torch.tensor(USED))
    del model.model.other
    assert all(param is kept[name] for name, param in model.named_parameters())
    PrunedEmbedding(model, torch.tensor(USED))
    with pytest.raises(IndexError, match="token 5 was not among those"):
        model(input_ids=torch.tensor([[3, 5]]))


def test_a_copy_of_the_model_is_its_own():
    model = build()
    pruned = PrunedEmbedding(model, torch.tensor(USED))
    other, averaged = copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model)
    other.get_input_embeddings().weight.data.add_(1)
    name = "model.embed_tokens.weight"
    assert torch.equal(other.state_dict()[name][list(USED)], model.state_dict()[name][list(USED)] + 1)
    train(model, adamw(model), 2)
    averaged.update_parameters(model)
    assert torch.equal(averaged.state_dict()[f"module.{name}"], model.state_dict()[name])
    pruned.restore()
    assert torch.isfinite(other(input_ids=batch(0)).logits).all()
    other.load_state_dict(model.state_dict())
    assert states_equal(other.state_dict(), model.state_dict())
    pruned.restore()


def test_a_pruned_head_maps_shifted_labels_and_refuses_to_generate():
    model, tokens = build(tied=True), batch(0)
    pruned = PrunedEmbedding(model, torch.tensor(USED), head=True)
    shifted = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    expected = model(input_ids=tokens, labels=tokens).loss
    found = model(input_ids=tokens, labels=tokens, shift_labels=shifted).loss
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(RuntimeError, match=r"call restore\(\) before generate\(\)"):
        model.generate(tokens)
    pruned.restore()
    assert model.generate(tokens, max_new_tokens=2, do_sample=False).shape == (3, 14)


def test_tokens_by_name_are_looked_up_and_negative_ones_refused(tmp_path):
    model = build()
    pruned = PrunedEmbedding(model, torch.tensor(USED), file=tmp_path / "table")
    embedding, tokens = model.get_input_embeddings(), batch(0)
    assert torch.equal(embedding(input=tokens), embedding(tokens))
    with pytest.raises(IndexError, match="token -1 was not among those"):
        embedding(torch.tensor([3, -1]))
    model.bfloat16()
    assert model.state_dict()["model.embed_tokens.weight"].dtype == torch.bfloat16
    pruned.restore()
    (tmp_path / "table").write_bytes(b"")
    train(model, adamw(model), 1)


def test_a_tied_table_that_was_cast_is_saved_once(tmp_path):
    model = build(tied=True)
    PrunedEmbedding(model, torch.tensor(USED), head=True)
    model.bfloat16()
    saved = model.state_dict()
    assert saved["model.embed_tokens.weight"].data_ptr() == saved["lm_head.weight"].data_ptr()
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight and again.lm_head.weight.shape[0] == VOCABULARY
