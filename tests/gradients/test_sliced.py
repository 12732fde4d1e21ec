"""`SlicedGradient`: what loops do with it gives what the dense gradient gives, and the zeros are not made."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from misa_kernels.gradients.sliced import SlicedGradient, part_of

ROWS, COLUMNS = 40, 64
PLACES = {"columns": (1, 16, 24), "rows": (0, 3, 9), "one column": (1, 63, 64), "all": (0, 0, 40)}


def pair(place="columns", seed=0, dtype=torch.float32):
    """Return a sliced gradient, and the dense one that it stands for."""
    axis, first, last = PLACES[place]
    shape = [ROWS, COLUMNS]
    shape[axis] = last - first
    part = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    dense = torch.zeros(ROWS, COLUMNS, dtype=dtype)
    dense[(slice(None),) * axis + (slice(first, last),)] = part
    return SlicedGradient(part.clone(), (ROWS, COLUMNS), axis, first), dense


def dense_of(tensor):
    """Return all elements of a tensor, read one by one where it is sliced."""
    return torch.tensor(tensor.tolist(), dtype=tensor.dtype) if isinstance(tensor, SlicedGradient) else tensor


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operator makes, within those on sliced gradients, too."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(value, SlicedGradient) for value in tree_leaves((args, kwargs))):
            with self:
                made = SlicedGradient.__torch_dispatch__(func, types, args, kwargs)
        else:
            made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(value, torch.Tensor) and not isinstance(value, SlicedGradient):
                self.numel = max(self.numel, value.numel())
        return made


def params(place="columns", dtype=torch.float32):
    """Return two lists of parameters, with a sliced and a dense gradient each beside two plain ones."""
    lists = []
    for grad in pair(place, dtype=dtype):
        own = nn.Parameter(torch.ones(ROWS, COLUMNS, dtype=dtype), requires_grad=False)
        own.grad = grad
        others = [nn.Parameter(torch.ones(5, dtype=dtype)) for _ in range(2)]
        for i, other in enumerate(others):
            other.grad = torch.arange(5, dtype=dtype) - i
        lists.append([others[0], own, others[1]])
    return lists


def assert_same(ours, theirs):
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(dense_of(p.grad), q.grad, rtol=1e-6, atol=0)


def test_it_is_a_tensor_of_the_weight_s_form_that_holds_its_slice():
    grad, dense = pair("rows")
    assert (grad.shape, grad.dtype, grad.device) == (dense.shape, dense.dtype, dense.device)
    assert grad.numel() == dense.numel() and grad.size(0) == ROWS and grad.is_contiguous() and not grad.requires_grad
    assert part_of(grad).shape == (6, COLUMNS) and part_of(dense) is dense
    assert repr(grad) == "SlicedGradient([3:9] of (40, 64), dtype=torch.float32, device='cpu')"
    assert torch.equal(dense_of(grad), dense) and (grad.numpy() == dense.numpy()).all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 0.5, float("inf"), float("-inf"), 0.0])
def test_clipping_by_the_norm(place, foreach, norm_type):
    ours, theirs = params(place)
    total = nn.utils.get_total_norm([p.grad for p in ours], norm_type, foreach=foreach)
    norms = [nn.utils.clip_grad_norm_(own, 0.3, norm_type, foreach=foreach) for own in (ours, theirs)]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0)
    assert torch.equal(total, norms[0]) and type(ours[1].grad) is SlicedGradient
    assert_same(ours, theirs)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_clipping_by_the_value(foreach):
    ours, theirs = params()
    for own in (ours, theirs):
        nn.utils.clip_grad_value_(own, 0.2, foreach=foreach)
    assert_same(ours, theirs)
    assert ours[1].grad.abs().max() == 0.2


@pytest.mark.parametrize("is_finite", [True, False])
def test_a_scaler(is_finite):
    found = []
    for own in params():
        if not is_finite:
            grad = own[1].grad
            part_of(grad)[3, 2 if isinstance(grad, SlicedGradient) else 18] = torch.inf
        optimizer = torch.optim.SGD(own, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        found.append([scaler.get_scale(), *(dense_of(p.grad) for p in own), *(p.detach() for p in own)])
    for ours, theirs in zip(*found, strict=True):
        assert ours == theirs if isinstance(ours, float) else torch.allclose(ours, theirs, rtol=1e-6, equal_nan=True)
    assert found[0][0] == (4.0 if is_finite else 2.0)


@pytest.mark.parametrize("foreach", [True, False])
def test_set_to_zero(foreach):
    ours, _ = params()
    grad = ours[1].grad
    torch.optim.SGD(ours, lr=0.1, foreach=foreach).zero_grad(set_to_none=False)
    assert ours[1].grad is grad and not grad.part.any()
    torch.optim.SGD(ours, lr=0.1).zero_grad()
    assert ours[1].grad is None
    module = nn.Linear(COLUMNS, ROWS).requires_grad_(False)
    module.weight.grad = pair()[0]
    module.zero_grad(set_to_none=False)
    assert not module.weight.grad.part.any()


READS = {
    "sum": lambda g: g.sum(),
    "mean": lambda g: g.mean(),
    "abs max": lambda g: g.abs().max(),
    "max": lambda g: (-g.abs()).max(),
    "min": lambda g: (g.abs() + 0.5).min(),
    "norm": lambda g: g.norm(),
    "norm 1": lambda g: g.norm(1),
    "vector_norm": lambda g: torch.linalg.vector_norm(g, 3.0),
    "squares": lambda g: g.float().square().sum(),
    "finite": lambda g: torch.isfinite(g).all(),
    "none nan": lambda g: g.isnan().any(),
    "infinite": lambda g: torch.isinf(g).any(),
    "zeros": lambda g: (g == 0).sum(),
    "positive": lambda g: (g > 0).any(),
    "not negative": lambda g: (g >= 0).logical_not().any(),
    "scaled": lambda g: (g * 2.0 / torch.tensor(3.0)).sum(),
    "half": lambda g: g.to(torch.bfloat16).abs().sum(dtype=torch.float32),
    "added": lambda g: (g + g.clone() * 3).sum(),
    "shifted": lambda g: (g + 1).sum(),
    "inverse": lambda g: g.abs().add(1).pow(-1).sum(),
    "data": lambda g: g.data.detach().sum(),
    "foreach": lambda g: torch._foreach_norm(torch._foreach_mul(torch._foreach_abs([g]), 2.0))[0],
    "foreach max": lambda g: torch._foreach_max([g])[0],
    "clamped": lambda g: g.clamp(0.1, 0.3).sum(),
}
# Of these nothing is known: they are given a dense copy.
DENSE = {
    "rows": lambda g: g.norm(dim=1),
    "least": lambda g: torch.linalg.vector_norm(g, float("-inf")),
    "least of a list": lambda g: torch._foreach_norm([g], float("-inf"))[0],
    "product": lambda g: g @ torch.ones(COLUMNS),
    "turned": lambda g: g.t()[3],
    "flat": lambda g: g.flatten()[7:99],
    "mixed": lambda g: g + torch.ones(ROWS, COLUMNS),
    "factors": lambda g: torch.arange(COLUMNS) * g,
    "histogram": lambda g: torch.histc(g, 5),
    "several": lambda g: torch.stack([g, g]).sum(0),
    "quantile": lambda g: g.quantile(0.9),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [*READS, *DENSE])
def test_whatever_is_read_is_what_the_dense_one_gives(name, place):
    grad, dense = pair(place)
    before = grad.part.clone()
    read = (READS | DENSE)[name]
    with Largest() as largest:
        ours = read(grad)
    torch.testing.assert_close(ours, read(dense), rtol=1e-5, atol=1e-6)
    assert torch.equal(grad.part, before)
    assert largest.numel >= dense.numel() if name in DENSE else largest.numel <= grad.part.numel()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen(bad):
    grad, _ = pair()
    assert torch.isfinite(grad).all()
    grad.part[2, 1] = bad
    assert not torch.isfinite(grad).all() and (grad.isnan() | grad.isinf()).any()
    assert not torch.isfinite(grad.sum()) and not torch.isfinite(nn.utils.get_total_norm([grad]))
    # As a loop that goes on with a norm that is not finite does; the zeros are not there to become NaN.
    grad.mul_(torch.tensor(torch.nan))
    assert grad.part.isnan().all() and grad.count_nonzero() == grad.part.numel()


WRITES = {
    "mul_": lambda g, h: g.mul_(0.3),
    "mul_ by a tensor": lambda g, h: g.mul_(torch.tensor(0.3)),
    "div_": lambda g, h: g.div_(torch.tensor(3.0)),
    "neg_": lambda g, h: g.neg_(),
    "add_": lambda g, h: g.add_(h, alpha=-2.0),
    "sub_": lambda g, h: g.sub_(h),
    "copy_": lambda g, h: g.copy_(h),
    "zero_": lambda g, h: g.zero_(),
    "clamp_": lambda g, h: g.clamp_(-0.1, 0.2),
    "nan_to_num_": lambda g, h: g.nan_to_num_(),
    "foreach mul_": lambda g, h: torch._foreach_mul_([g], 0.3),
    "foreach div_": lambda g, h: torch._foreach_div_([g], torch.tensor(0.3)),
    "foreach add_": lambda g, h: torch._foreach_add_([g], [h], alpha=0.5),
    "foreach lists": lambda g, h: torch._foreach_mul_([g, torch.ones(3)], [0.3, 2.0]),
    "foreach copy_": lambda g, h: torch._foreach_copy_([g], [h]),
    "foreach unscale": lambda g, h: torch._amp_foreach_non_finite_check_and_unscale_(
        [g], torch.zeros(1), torch.full((1,), 0.3)
    ),
    "foreach clamp_max_": lambda g, h: torch._foreach_clamp_max_([g], 0.3),
}
WRITES_DENSE = {
    "addcmul_": lambda g, h: g.addcmul_(h, h, value=0.5),
    "lerp_": lambda g, h: g.lerp_(h, 0.25),
    "mask": lambda g, h: g.mul_(torch.arange(COLUMNS) % 3),
    "masked_fill_": lambda g, h: g.masked_fill_(h > 1, 5.0),
    "copy_ a dense one": lambda g, h: g.copy_(h + torch.zeros(ROWS, COLUMNS)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [*WRITES, *WRITES_DENSE])
def test_whatever_is_written_in_place_is_what_the_dense_one_becomes(name, place):
    (grad, dense), (other, other_dense) = pair(place), pair(place, seed=1)
    write = (WRITES | WRITES_DENSE)[name]
    part = grad.part
    with Largest() as largest:
        returned = write(grad, other)
    write(dense, other_dense)
    torch.testing.assert_close(dense_of(grad), dense, rtol=1e-6, atol=1e-7)
    assert grad.part is part and (returned is grad or "foreach" in name)
    assert largest.numel >= dense.numel() if name in WRITES_DENSE else largest.numel <= grad.part.numel()


@pytest.mark.parametrize(
    "write",
    [
        lambda g: g.add_(1),
        lambda g: g.add_(torch.ones(ROWS, COLUMNS)),
        lambda g: g.clamp_(min=0.5),
        lambda g: g.fill_(2.0),
        lambda g: g.copy_(pair("rows")[0]),
        lambda g: g.normal_(),
        lambda g: torch._foreach_add_([g], 1.0),
        lambda g: nn.init.ones_(g),
    ],
)
def test_what_would_write_beside_the_slice_is_refused_and_changes_nothing(write):
    grad, dense = pair()
    sentence = (
        r"_ on a gradient of shape \(40, 64\) would change elements beside 16:24 of axis 1, which are not trained"
    )
    with pytest.raises(RuntimeError, match=sentence):
        write(grad)
    assert torch.equal(dense_of(grad), dense)


def test_a_dense_tensor_takes_it():
    grad, dense = pair()
    total = torch.ones(ROWS, COLUMNS)
    assert torch.equal(total.add_(grad), dense + 1) and torch.equal(torch.empty_like(total).copy_(grad), dense)
    assert torch.equal(torch.stack([grad, total]), torch.stack([dense, dense + 1]))
    assert grad.equal(dense) and torch.equal(grad, grad.clone()) and not torch.equal(grad, total)


def test_copies_share_nothing_and_are_of_the_same_slice():
    grad, dense = pair("rows")
    file = io.BytesIO()
    torch.save(grad, file)
    file.seek(0)
    copies = [copy.deepcopy(grad), pickle.loads(pickle.dumps(grad)), grad.clone(), torch.load(file, weights_only=False)]
    for made in copies:
        assert made.fits(grad) and torch.equal(dense_of(made), dense)
        made.zero_()
    assert torch.equal(dense_of(grad), dense)
    twice = copy.deepcopy([grad, grad])
    assert twice[0] is twice[1]
    # .data and detach() share, as ever.
    grad.data.mul_(2)
    assert torch.equal(grad.detach().part, grad.part) and torch.equal(dense_of(grad), 2 * dense)
    assert grad.to("cpu") is grad and grad.to(torch.float64).part.dtype == torch.float64
    assert grad.to("meta").part.is_meta and grad.to("meta").shape == grad.shape


@pytest.mark.parametrize("place", PLACES)
def test_what_is_assigned_to_data_is_the_gradient(place):
    # Loops of old write `p.grad.data = p.grad.data / n`.
    ours, theirs = params(place)
    for own in (ours, theirs):
        for p in own:
            p.grad.data = p.grad.data / 4
            p.grad.data = 3 * p.grad.data
    assert isinstance(ours[1].grad, SlicedGradient)
    assert_same(ours, theirs)
    ours[1].grad.data = theirs[1].grad * 2
    assert torch.equal(dense_of(ours[1].grad), theirs[1].grad * 2)
    if place != "all":
        with pytest.raises(RuntimeError, match="would change elements beside"):
            ours[1].grad.data = torch.ones(ROWS, COLUMNS)


def test_another_optimizer_can_step_with_it():
    # Plain torch reads a dense copy.
    results = []
    for own in params():
        own[1].requires_grad_(True)
        optimizer = torch.optim.AdamW(own, lr=0.1)
        for _ in range(2):
            optimizer.step()
        results.append([p.detach() for p in own])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
