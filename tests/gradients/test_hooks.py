"""Gradients of slices: those that autograd gives where it makes all of them, whatever the model and the loop do."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from misa_kernels.gradients.axes import Slice, input_axis
from misa_kernels.gradients.hooks import SliceHooks
from misa_kernels.gradients.sliced import SlicedGradient

transformers.logging.set_verbosity_error()

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
T5 = {"vocab_size": 32, "d_model": 16, "d_ff": 24, "num_heads": 4, "d_kv": 4, "num_layers": 1, "dropout_rate": 0.0}
NONE = {"bos_token_id": None, "eos_token_id": None}
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, **NONE}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VISION = {name: size for name, size in SIZES.items() if name != "vocab_size"}
# And how many layers have a weight that slices can be trained of.
MODELS = {
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)), 15),
    # Biases at query, key and value.
    "qwen2": (lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT)), 15),
    # Query, key and value in one, gate and up in one.
    "phi3": (lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**TEXT)), 9),
    "gpt2": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)), 9),
    "bert": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **STILL)), 14),
    "t5": (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)), 17),
    "vit": (
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**VISION, **STILL, image_size=8, patch_size=4)
        ),
        13,
    ),
}


def build(name):
    torch.manual_seed(0)
    model = MODELS[name][0]()
    # Embedding and head share their weight in some, which autograd then gives more than what the head has.
    if getattr(model.config, "tie_word_embeddings", False) and model.get_output_embeddings() is not None:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
    return model.train()


def loss_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if hasattr(model.config, "image_size"):
        return model(torch.randn(2, 3, 8, 8, generator=generator)).logits.float().square().mean()
    tokens = torch.randint(32, (2, 6), generator=generator)
    more = {"decoder_input_ids": tokens.flip(1)} if model.config.is_encoder_decoder else {}
    logits = model(input_ids=tokens, **more).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten().roll(1))


def layers_of(model):
    return [module for module in model.modules() if input_axis(module) is not None]


def every_slice(model, number=0):
    """Return a slice of each layer's weight: of inputs or outputs in turn, now and then the whole."""
    slices = {}
    for i, layer in enumerate(layers_of(model)):
        axis = (i + number) % 2
        size = layer.weight.shape[axis]
        first = (3 * i + number) % (size // 2)
        slices[layer.weight] = (
            Slice(axis, 0, size) if i % 5 == 4 else Slice(axis, first, first + max(size // 4, 1)),
            [layer],
        )
    return slices


def freeze(model, weights):
    for weight in weights:
        weight.requires_grad_(False)


def cut(full, piece):
    return full.narrow(piece.axis, piece.first, piece.last - piece.first)


def assert_gradients(slices, full, rtol=1e-5):
    """Compare the gradients of slices with gradients of whole weights, by weight or in the same order."""
    full = [full[weight] for weight in slices] if isinstance(full, dict) else full
    for (weight, (piece, _)), whole in zip(slices.items(), full, strict=True):
        assert type(weight.grad) is SlicedGradient and weight.grad.part.is_contiguous() and not weight.requires_grad
        assert (weight.grad.axis, weight.grad.first) == piece[:2] and weight.grad.part.dtype == weight.dtype
        atol = rtol * float(whole.abs().max())
        torch.testing.assert_close(weight.grad.part, cut(whole, piece), rtol=rtol, atol=atol)


def sliced(model, number=0):
    """Return gradients of slices that train every layer of a model, the slices, and autograd's gradients of a copy."""
    whole = copy.deepcopy(model)
    loss_of(whole).backward()
    slices = every_slice(model, number)
    freeze(model, slices)
    gradients = SliceHooks()
    gradients.train(slices)
    return gradients, slices, whole


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_a_model(name, number):
    model = build(name)
    assert len(layers_of(model)) == MODELS[name][1]
    gradients, slices, whole = sliced(model, number)
    loss_of(model).backward()
    assert_gradients(slices, [layer.weight.grad for layer in layers_of(whole)])
    # All else is as it was: biases, norms, embeddings.
    theirs = dict(whole.named_parameters())
    for key, param in model.named_parameters():
        if param.requires_grad and theirs[key].grad is not None:
            torch.testing.assert_close(param.grad, theirs[key].grad)
    gradients.close()
    assert all(weight.grad is None for weight in slices)
    assert not any(module._forward_hooks or module._forward_hooks_with_kwargs for module in model.modules())


def test_a_loop_that_clips_and_scales_sees_the_masked_gradients():
    model = build("llama")
    _, slices, whole = sliced(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(model)).backward()
    scaler.unscale_(torch.optim.SGD(model.parameters(), lr=0.1))
    masked = [torch.zeros_like(layer.weight) for layer in layers_of(whole)]
    for layer, mask, (piece, _) in zip(layers_of(whole), masked, slices.values(), strict=True):
        cut(mask, piece).copy_(cut(layer.weight.grad, piece))
        layer.weight.grad = mask
    norms = [nn.utils.clip_grad_norm_(own.parameters(), 0.1) for own in (model, whole)]
    torch.testing.assert_close(*norms)
    assert_gradients(slices, masked)
    model.zero_grad()
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("is_reentrant", [True, False])
def test_checkpoints_of_transformers(name, is_reentrant):
    model = build(name)
    _, slices, whole = sliced(model)
    model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
    if is_reentrant:
        model.enable_input_require_grads()
    loss_of(model).backward()
    assert_gradients(slices, [layer.weight.grad for layer in layers_of(whole)])


def test_accumulation_adds_to_one_gradient():
    model = build("qwen2")
    _, slices, whole = sliced(model)
    loss_of(model).backward()
    parts = [weight.grad.part for weight in slices]
    for seed in (1, 2):
        loss_of(model, seed).backward()
        loss_of(whole, seed).backward()
    assert_gradients(slices, [layer.weight.grad for layer in layers_of(whole)])
    assert all(weight.grad.part is part for weight, part in zip(slices, parts, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_other_formats(dtype):
    model = build("gpt2").to(dtype)
    _, slices, whole = sliced(model)
    loss_of(model).backward()
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-12
    assert_gradients(slices, [layer.weight.grad for layer in layers_of(whole)], rtol)


class Layer(nn.Module):
    """A linear layer or a Conv1D of 12 inputs and 8 outputs, and what is done to its output."""

    def __init__(self, kind, then=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(12, 8, bias=kind != "bare") if kind != "conv1d" else Conv1D(8, 12)
        self.then = then or (lambda out: out)

    def forward(self, x):
        return self.then(self.layer(x))


KINDS = ["linear", "bare", "conv1d"]
SLICES = {"inputs": (True, 2, 7), "all inputs": (True, 0, 12), "outputs": (False, 3, 8), "all outputs": (False, 0, 8)}


def small(kind, which, then=None):
    """Return a layer, the gradients of a slice of it, the slices, and a copy that is trained as a whole."""
    model = Layer(kind, then)
    whole = copy.deepcopy(model)
    is_input, first, last = SLICES[which]
    axis = input_axis(model.layer)
    piece = Slice(axis if is_input else 1 - axis, first, last)
    model.layer.weight.requires_grad_(False)
    gradients = SliceHooks()
    slices = {model.layer.weight: (piece, [model.layer])}
    gradients.train(slices)
    return model, gradients, slices, whole


def plus_one(out):
    out += 1
    return F.relu(out, inplace=True)


def viewed(out):
    out.view(-1)[::2].mul_(2.0)
    return out.sigmoid_()


@pytest.mark.parametrize("then", [None, plus_one, viewed], ids=["as is", "in place", "through a view"])
@pytest.mark.parametrize("shape", [(12,), (1, 12), (5, 12), (2, 3, 12), (2, 1, 3, 12), (0, 12)])
@pytest.mark.parametrize("which", SLICES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_of_any_input_and_what_follows_it(kind, which, shape, then):
    model, _, slices, whole = small(kind, which, then)
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    outputs = [own(x) for own, x in zip((model, whole), inputs, strict=True)]
    assert torch.equal(*outputs)
    for out in outputs:
        out.square().sum().backward()
    assert_gradients(slices, [whole.layer.weight.grad])
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    if kind != "bare":
        assert torch.equal(model.layer.bias.grad, whole.layer.bias.grad)


@pytest.mark.parametrize("which", SLICES)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, which):
    model, _, slices, whole = small(kind, which)
    x = torch.randn(5, 12)
    for own in (model, whole):
        with torch.autocast("cpu", torch.bfloat16):
            out = own(x)
            assert out.dtype == torch.bfloat16
            loss = (out * out.detach()).sum()
        loss.backward()
    assert_gradients(slices, [whole.layer.weight.grad], rtol=1e-6)


@pytest.mark.parametrize("is_reentrant", [True, False])
def test_a_layer_that_is_called_twice_within_checkpoints(is_reentrant):
    for use in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=is_reentrant)):
        model, _, slices, whole = small("linear", "inputs")
        x = torch.randn(5, 12, requires_grad=True)
        for own in (model, whole):
            (use(own, x).square().sum() + use(own, 2 * x).sum()).backward()
        assert_gradients(slices, [whole.layer.weight.grad])
        losses = [own(x).square().sum() for own in (model, whole)]
        for loss in losses * 2:
            loss.backward(retain_graph=True)
        assert_gradients(slices, [whole.layer.weight.grad])


def test_a_weight_of_two_layers_and_a_layer_that_is_not_called():
    model = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
    model[1].weight = model[0].weight
    weight, unused = model[0].weight, model[2].weight
    x = torch.randn(4, 6)
    model[1](model[0](x).relu()).square().sum().backward()
    full, weight.grad = weight.grad, None
    slices = {weight: (Slice(1, 1, 3), [model[0], model[1]]), unused: (Slice(0, 0, 2), [model[2]])}
    freeze(model, slices)
    gradients = SliceHooks()
    gradients.train(slices)
    model[1](model[0](x).relu()).square().sum().backward()
    torch.testing.assert_close(weight.grad.part, full[:, 1:3])
    assert unused.grad is None
    # One of its layers leaves: the other goes on, and the gradient stays.
    grad = weight.grad
    gradients.train({weight: (Slice(1, 1, 3), [model[1]])})
    assert weight.grad is grad and not model[0]._forward_hooks and len(model[1]._forward_hooks) == 1


def bytes_saved(model, run):
    """Return the bytes that are kept for backward: of whole storages, so that a view counts as what it keeps."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(model)
    return total


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_nothing_of_the_input_is_kept_but_the_slices_columns(name):
    model = build(name).requires_grad_(False)
    embeddings = torch.randn(2, 6, 16, requires_grad=True)
    run = lambda model: model(inputs_embeds=embeddings)  # noqa: E731
    frozen = bytes_saved(model, run)
    axes = {layer.weight: input_axis(layer) for layer in layers_of(model)}
    slices = {layer.weight: (Slice(axes[layer.weight], 2, 5), [layer]) for layer in layers_of(model)}
    gradients = SliceHooks()
    gradients.train(slices)
    assert bytes_saved(model, run) - frozen == len(slices) * 12 * 3 * 4
    model.to(torch.bfloat16)
    embeddings.data = embeddings.data.to(torch.bfloat16)
    gradients.close()
    frozen = bytes_saved(model, run)
    gradients.train(slices)
    assert bytes_saved(model, run) - frozen == len(slices) * 12 * 3 * 2
    with torch.no_grad():
        assert bytes_saved(model, run) == 0


@pytest.mark.parametrize("which, cost", [("inputs", 5 * 5 * 4), ("all inputs", 5 * 12 * 4), ("outputs", 5 * 12 * 4)])
def test_what_one_layer_keeps(which, cost):
    model, gradients, _, _ = small("linear", which)
    model.requires_grad_(False)
    x = torch.randn(5, 12)
    assert bytes_saved(model, lambda model: model(x)) == cost
    # A single row, whose columns are contiguous as they are.
    row = torch.randn(1, 12)
    assert bytes_saved(model, lambda model: model(row)) == cost // 5


def test_the_gradient_is_made_once_and_is_of_the_slice_alone():
    model, _, slices, _ = small("linear", "inputs")
    (weight,) = slices
    with torch.profiler.profile(record_shapes=True) as profile:
        model(torch.randn(4, 12)).square().sum().backward()
    shapes = [event.input_shapes for event in profile.events() if event.name == "aten::mm"]
    assert shapes == [[[8, 4], [4, 5]]]
    assert weight.grad.part.untyped_storage().nbytes() == 8 * 5 * 4
    assert not [event for event in profile.events() if event.name == "aten::clone" and event.input_shapes[0] == [8, 5]]


def test_hooks_for_gradients_that_have_come_are_called():
    model, _, slices, whole = small("linear", "inputs")
    (weight,) = slices
    # Only a tensor that requires a gradient takes one.
    weight.requires_grad_(True)
    seen = []
    weight.register_post_accumulate_grad_hook(lambda param: seen.append((param, param.grad.sum().item())))
    weight.requires_grad_(False)
    x = torch.randn(5, 12)
    for _ in range(2):
        model(x).sum().backward()
        whole(x).sum().backward()
    assert [param is weight for param, _ in seen] == [True, True] and seen[1][1] == pytest.approx(2 * seen[0][1])
    # As `release_gradients` does.
    weight.requires_grad_(True)
    weight.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
    weight.requires_grad_(False)
    for _ in range(2):
        model(x).sum().backward()
    assert weight.grad is None and seen[3][1] == pytest.approx(seen[0][1])


def test_a_whole_gradient_that_is_wanted_is_made_as_ever_and_added_to():
    model, _, slices, whole = small("linear", "inputs")
    (weight,) = slices
    x = torch.randn(5, 12)
    weight.requires_grad_(True)
    model(x).sum().backward()
    whole(x).sum().backward()
    assert type(weight.grad) is torch.Tensor and torch.equal(weight.grad, whole.layer.weight.grad)
    weight.requires_grad_(False)
    model(x).sum().backward()
    expected = whole.layer.weight.grad.clone()
    expected[:, 2:7] *= 2
    assert type(weight.grad) is torch.Tensor and torch.allclose(weight.grad, expected)


def test_slices_that_stay_keep_their_hooks_and_gradients():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)).requires_grad_(False)
    a, b, c = model
    gradients = SliceHooks()
    gradients.train({m.weight: (Slice(1, 0, 2), [m]) for m in (a, b)})
    model(torch.randn(4, 6)).sum().backward()
    hooks, grad = dict(a._forward_hooks), a.weight.grad
    gradients.train({a.weight: (Slice(1, 0, 2), [a]), b.weight: (Slice(1, 2, 4), [b]), c.weight: (Slice(0, 1, 2), [c])})
    assert dict(a._forward_hooks) == hooks and a.weight.grad is grad
    assert b.weight.grad is None and c.weight.grad is None and [len(m._forward_hooks) for m in model] == [1, 1, 1]
    out = model(torch.randn(4, 6)).sum()
    # Backward of what has left in the meantime gives nothing.
    gradients.train({c.weight: (Slice(0, 1, 2), [c])})
    out.backward()
    assert a.weight.grad is None and b.weight.grad is None and c.weight.grad.part.shape == (1, 6)
    assert not any(param.requires_grad for param in model.parameters())


def test_nothing_happens_without_gradients_or_within_transforms():
    model, _, slices, whole = small("linear", "inputs")
    model.requires_grad_(False)
    x = torch.randn(5, 12)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), torch.profiler.profile() as profile:
            assert not model(x).requires_grad
        assert not {event.name for event in profile.events()} & {"aten::slice", "aten::detach", "aten::_to_copy"}
    assert torch.func.vmap(model)(x).shape == (5, 8)
    grads = [torch.func.grad(lambda x, own=own: own(x).square().sum())(x) for own in (model, whole)]
    assert torch.equal(*grads)
    # The gradient of a gradient would lack the slice's.
    (grad,) = torch.autograd.grad(model(x.requires_grad_()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


@pytest.mark.parametrize("how", ["trace", "export"])
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning", "ignore:.torch.jit.trace:FutureWarning")
def test_a_traced_or_exported_model_is_an_ordinary_one(how):
    model, gradients, _, whole = small("linear", "inputs")
    x = torch.randn(5, 12)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*trained in slices")
        made = torch.jit.trace(model, (x,)) if how == "trace" else torch.export.export(model, (x,)).module()
    gradients.close()
    assert torch.equal(made(x), whole(x))
    if how == "trace":
        torch.jit.save(made, io.BytesIO())
        assert "Tie" not in str(made.inlined_graph)


def test_inputs_given_by_name_and_other_hooks():
    model, gradients, slices, whole = small("linear", "inputs")
    gradients.close()
    for own in (model, whole):
        own.layer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {"input": 2 * kwargs["input"]}), with_kwargs=True
        )
        own.layer.register_forward_hook(lambda module, args, out: 3 * out)
    # Before those that were there: the output is the layer's own.
    gradients.train(slices)
    for own in (model, whole):
        own.layer(input=torch.ones(5, 12)).square().sum().backward()
    assert_gradients(slices, [whole.layer.weight.grad])


@pytest.mark.parametrize("which", SLICES)
def test_hooks_of_the_weight_change_its_gradient(which):
    model, gradients, slices, whole = small("linear", which)
    (weight,) = slices
    gradients.close()
    seen, mask = [], torch.rand(8, 12)
    for own in (weight.requires_grad_(True), whole.layer.weight):
        # The first keeps it sliced, the second makes it dense, the third only looks.
        own.register_hook(lambda grad: 2 * grad)
        own.register_hook(lambda grad: grad * mask)
        own.register_hook(lambda grad: seen.append(type(grad)))
    weight.requires_grad_(False)
    gradients.train(slices)
    x = torch.randn(5, 12)
    for own in (model, whole):
        for factor in (1, 3):
            own(factor * x).square().sum().backward()
    assert_gradients(slices, [whole.layer.weight.grad])
    assert seen == [SlicedGradient] * 2 + [torch.Tensor] * 2


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch has gradients of the weight's dtype only")
@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_gradients_of_another_dtype_than_the_weight(dtype):
    model, gradients, slices, whole = small("linear", "inputs")
    (weight,) = slices
    for own in (model.bfloat16(), whole.bfloat16()):
        own.layer.weight.grad_dtype = dtype
    x = torch.randn(5, 12).bfloat16()
    for own in (model, whole):
        own(x).square().sum().backward()
        own(3 * x).square().sum().backward()
    assert weight.grad.dtype == whole.layer.weight.grad.dtype
    torch.testing.assert_close(weight.grad.part, cut(whole.layer.weight.grad, slices[weight][0]), rtol=1e-2, atol=1e-2)


def test_a_hook_that_is_put_before_this_one_is_said_once_and_comes_after_it_from_then_on():
    model, gradients, slices, whole = small("linear", "inputs")
    x = torch.randn(5, 12)
    for own in (model, whole):
        own.layer.register_forward_hook(lambda module, args, out: 3 * out, prepend=True)
    with pytest.warns(UserWarning, match="registered with prepend=True on the layer of a weight") as said:
        model(x).square().sum().backward()
    model.zero_grad()
    model.layer.weight.grad = None
    for own in (model, whole):
        own(x).square().sum().backward()
    assert_gradients(slices, [whole.layer.weight.grad])
    assert len(said) == 1
    gradients.close()
    assert len(model.layer._forward_hooks) == 1


def test_an_exchanged_weight_is_said_once_and_not_trained():
    model, gradients, slices, _ = small("linear", "inputs")
    (weight,) = slices
    model.layer.weight = nn.Parameter(torch.randn(8, 12), requires_grad=False)
    with pytest.warns(
        UserWarning, match="^a weight is trained in slices, and its layer is called with another"
    ) as said:
        model(torch.randn(5, 12)).sum().backward()
        model(torch.randn(5, 12)).sum().backward()
    assert len(said) == 1 and weight.grad is None and model.layer.weight.grad is None
    gradients.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(5, 12))


@pytest.mark.parametrize("how", ["parametrized", "resized"])
def test_a_weight_that_is_computed_or_resized_is_said_by_its_name(how):
    model, gradients, slices, _ = small("linear", "inputs")
    (weight,) = slices
    gradients.close()
    gradients.train(slices, {weight: "layer.weight"})
    if how == "parametrized":
        parametrize.register_parametrization(model.layer, "weight", nn.Softplus(), unsafe=True)
    else:
        weight.data = weight.data[:, :6]
    with pytest.warns(UserWarning, match="^layer.weight is trained in slices"):
        model(torch.randn(5, 12 if how == "parametrized" else 6)).sum().backward()
    assert weight.grad is None


def test_a_model_that_is_moved_or_cast_goes_on():
    model, _, slices, whole = small("linear", "inputs")
    model(torch.randn(5, 12)).sum().backward()
    model.zero_grad()
    x = torch.randn(5, 12)
    for own in (model, whole):
        own.double()(x.double()).square().sum().backward()
    assert_gradients(slices, [whole.layer.weight.grad])


def as_pickled(model):
    return pickle.loads(pickle.dumps(model))


def as_saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, as_pickled, as_saved])
def test_a_copy_is_an_ordinary_model(how):
    model = build("llama")
    _, slices, whole = sliced(model)
    loss_of(model).backward()
    copied = how(model)
    assert all(param.grad is None for param in copied.parameters())
    for module in layers_of(copied):
        module.weight.requires_grad_(True)
    loss_of(copied).backward()
    for ours, theirs in zip(layers_of(copied), layers_of(whole), strict=True):
        assert type(ours.weight.grad) is torch.Tensor and torch.allclose(ours.weight.grad, theirs.weight.grad)
    assert not any(module._forward_hooks or module._forward_hooks_with_kwargs for module in copied.modules())
    assert copied.state_dict().keys() == whole.state_dict().keys()
    # The model itself is trained on.
    model.zero_grad()
    loss_of(model).backward()
    assert_gradients(slices, [layer.weight.grad for layer in layers_of(whole)])


def test_a_model_is_freed_without_garbage_collection():
    model, gradients, slices, _ = small("linear", "inputs")
    model(torch.randn(5, 12)).sum().backward()
    (weight,) = slices
    gone = weakref.ref(weight)
    gc.disable()
    try:
        del model, gradients, slices, weight
        assert gone() is None
    finally:
        gc.enable()


def test_which_axis_is_the_input_s():
    assert input_axis(nn.Linear(3, 4)) == 1 and input_axis(Conv1D(4, 3)) == 0
    attention = nn.MultiheadAttention(4, 2)
    others = [nn.Embedding(3, 4), nn.LayerNorm(4), nn.Conv1d(4, 4, 1), nn.Bilinear(2, 3, 4), nn.ReLU(), attention]
    assert not [module for module in [*others, attention.out_proj] if input_axis(module) is not None]

    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)

    class Named(nn.Linear):
        """As a linear layer is, by another name."""

    assert input_axis(Scaled(3, 4)) is None and input_axis(Named(3, 4)) == 1
    packed, patched = nn.Linear(4, 4), nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(8, 1), requires_grad=False)
    patched.forward = lambda x: x
    computed = parametrize.register_parametrization(nn.Linear(4, 4), "weight", nn.Identity())
    assert [input_axis(module) for module in (packed, patched, computed)] == [None] * 3
    for name, arguments in (("Conv1D", {}), ("Linear", {})):
        kind = type(name, (nn.Module,), arguments)
        other = kind()
        other.weight = nn.Parameter(torch.zeros(3, 4))
        assert input_axis(other) is None


def test_what_cannot_be_is_refused_and_changes_nothing():
    layer, embedding = nn.Linear(6, 6), nn.Embedding(6, 6)
    gradients = SliceHooks()
    for piece in (Slice(1, 4, 7), Slice(0, 3, 3), Slice(0, -1, 2)):
        with pytest.raises(ValueError, match=r"must be a range within a weight of shape \(6, 6\)"):
            gradients.train({layer.weight: (piece, [layer])})
    with pytest.raises(ValueError, match="an? Embedding cannot be trained in slices"):
        gradients.train({layer.weight: (Slice(1, 0, 2), [layer]), embedding.weight: (Slice(1, 0, 2), [embedding])})
    assert not layer._forward_hooks and not embedding._forward_hooks


@pytest.mark.parametrize("is_late", [False, True])
def test_a_compiled_model_trains_the_slices_of_every_round(is_late):
    # Not above: what it imports would outlive what `conftest.py` freezes.
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = nn.Sequential(*(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.ReLU()) for _ in range(3)))
    linears = [layer[1] for layer in model]
    freeze(model, [linear.weight for linear in linears])
    gradients = SliceHooks()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    x = torch.randn(4, 6)
    if is_late:
        compiled(x).sum().backward()
    counts = []
    for number in range(6):
        # First each slice in turn, then slices of other layers.
        own = linears if number < 4 else linears[:2]
        slices = {linear.weight: (Slice(number % 2, number % 3, number % 3 + 2), [linear]) for linear in own}
        gradients.train(slices)
        model.zero_grad()
        compiled(x).square().sum().backward()
        found = {weight: weight.grad for weight in slices}
        model.zero_grad()
        model(x).square().sum().backward()
        for weight, grad in found.items():
            assert grad is not None and torch.allclose(grad.part, weight.grad.part, atol=1e-6)
        counts.append(counter.frame_count)
    assert len(set(counts[:4])) == 1
