"""The head operators where others break: second derivatives, extremes, wrong sizes."""

import oracle
import pytest
import torch
import torch.autograd.forward_ad as fwAD

import vcore_kernels
from vcore_kernels import linear_nll, linear_nll_jvp, linear_nll_pair, weighted_linear_nll

ops = torch.ops.vcore_kernels
needs_cpp = pytest.mark.skipif(
    not vcore_kernels.backends()["cpp"], reason=vcore_kernels.backends()["cpp"].reason
)


def inputs(n=12, h=16, v=40, dtype=torch.float32, grad=False):
    hidden = torch.randn(n, h, dtype=dtype, requires_grad=grad)
    weight = torch.randn(v, h, dtype=dtype, requires_grad=grad)
    return hidden, weight, torch.randint(0, v, (n,)), torch.randn(n, dtype=dtype)


@needs_cpp
def test_second_derivatives_under_transforms_are_refused_rather_than_zero():
    hidden, weight, target, token_weight = inputs(dtype=torch.float64)

    def late(h):
        return linear_nll(h, weight, target).sum() + 0.5 * (h**2).sum()

    def known(h):
        return weighted_linear_nll(h, weight, target, token_weight)[0] + 0.5 * (h**2).sum()

    for loss in (late, known):
        grad = torch.func.grad(loss)
        assert grad(hidden).abs().sum() > 0
        second = {
            "reverse over reverse": lambda h, g=grad: torch.func.grad(lambda x: g(x).sum())(h),
            "reverse over forward": torch.func.grad(
                lambda h, f=loss: torch.func.jvp(f, (h,), (hidden,))[1]
            ),
            "forward over reverse": lambda h, g=grad: torch.func.jvp(g, (h,), (hidden,))[1],
        }
        for name, call in second.items():
            with pytest.raises(RuntimeError, match=r"second derivatives|no forward derivative"):
                pytest.fail(f"{name} gave {call(hidden)}")
    leaf = hidden.clone().requires_grad_()
    with fwAD.dual_level():
        tangent = fwAD.unpack_dual(late(fwAD.make_dual(leaf, hidden))).tangent
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(tangent, leaf)


@needs_cpp
def test_vmap_says_what_to_do():
    hidden, weight, target, _ = inputs()
    with pytest.raises(RuntimeError, match="no vmap rule in this backend"):
        torch.vmap(lambda h: linear_nll(h.unsqueeze(0), weight, target[:1]))(hidden)


@needs_cpp
def test_a_row_without_upstream_gradient_gets_none_whatever_it_holds():
    hidden, weight, target, _ = inputs(grad=True)
    with torch.no_grad():
        hidden[3] = torch.inf
    for frozen in (False, True):
        nll = linear_nll(hidden, weight.detach() if frozen else weight, target)
        grad = torch.autograd.grad(nll[torch.arange(12) != 3].sum(), hidden)[0]
        assert (grad[3] == 0).all()
        assert grad.isfinite().all()


def test_float16_gradients_survive_small_weights_under_a_loss_scale(backend):
    hidden, weight, target, _ = inputs(64, 32, 100, torch.float16, grad=True)
    token_weight = torch.full((64,), 1 / 200_000)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = torch.autograd.grad(oracle.head_nll(*exact, target).sum() / 200_000 * 65536, exact)
    loss, _ = weighted_linear_nll(hidden, weight, target, token_weight, backend=backend)
    for grad, expected in zip(
        torch.autograd.grad(loss * 65536, [hidden, weight]), truth, strict=True
    ):
        assert oracle.max_error(grad, expected) < 2e-3 * expected.abs().max().item()


@pytest.mark.parametrize("scale", [64.0, 2.0**-14, 0.0])
@pytest.mark.parametrize("known", [False, True], ids=["late", "known"])
def test_float16_gradients_survive_the_scale_of_the_logits(known, scale, backend):
    for trained in (False, True):
        hidden, weight, target, _ = inputs(64, 32, 100, torch.float16, grad=True)
        weight = (weight.detach() / 16).requires_grad_(trained)
        leaves = [hidden, weight] if trained else [hidden]
        exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        truth = torch.autograd.grad(oracle.head_nll(*exact, target, scale=scale).sum() * 5, exact)
        if known:
            factor = torch.full((64,), 5.0)
            loss, _ = weighted_linear_nll(
                hidden, weight, target, factor, scale=scale, backend=backend
            )
        else:
            loss = linear_nll(hidden, weight, target, scale=scale, backend=backend).sum() * 5
        grads = torch.autograd.grad(loss, leaves)
        for grad, expected in zip(grads, truth, strict=False):
            # where the result is small, the steps of float16 itself
            bound = 4e-3 * expected.abs().max().item() + 2.0**-24
            assert oracle.max_error(grad, expected) <= bound


def test_the_tangent_of_a_bias_may_be_strided(backend):
    hidden, weight, target, _ = inputs()
    bias, tangent = torch.randn(40), torch.randn(80)
    for strided in (tangent[::2], tangent[:1].expand(40)):
        results = [
            linear_nll_jvp(
                hidden, weight, target, hidden, bias=bias, bias_tangent=each, backend=backend
            )
            for each in (strided, strided.clone(memory_format=torch.contiguous_format))
        ]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_a_width_of_zero(backend):
    hidden, weight = torch.randn(3, 0, requires_grad=True), torch.randn(7, 0, requires_grad=True)
    target = torch.tensor([0, 1, 2])
    for loss in (
        linear_nll(hidden, weight, target, backend=backend).sum(),
        linear_nll(hidden, weight.detach(), target, backend=backend).sum(),
        weighted_linear_nll(hidden, weight, target, torch.ones(3), backend=backend)[0],
    ):
        torch.testing.assert_close(loss, 3 * torch.tensor(7.0).log())
        assert torch.autograd.grad(loss, hidden)[0].shape == (3, 0)


def test_expanded_tensors_in_a_tangent(backend):
    hidden, weight = torch.randn(1, 4).expand(3, 4), torch.randn(1, 4).expand(7, 4)
    tangents = torch.randn(3, 4), torch.randn(7, 4)
    target = torch.tensor([0, 1, 2])
    given = linear_nll_jvp(hidden, weight, target, *tangents, backend=backend)
    expected = linear_nll_jvp(hidden.clone(), weight.clone(), target, *tangents, backend=backend)
    for one, other in zip(given, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_sequences_of_length_zero(backend):
    hidden, weight = torch.randn(2, 0, 4), torch.randn(7, 4)
    labels = torch.zeros(2, 0, dtype=torch.int64)
    assert linear_nll(hidden, weight, labels, shift=1, backend=backend).shape == (2, 0)
    loss, nll = weighted_linear_nll(
        hidden, weight, labels, torch.ones(2, 0), shift=1, backend=backend
    )
    assert nll.shape == (2, 0)
    assert loss == 0


@needs_cpp
def test_a_masked_class_stays_masked_in_a_pair():
    hidden, weight, target, _ = inputs()
    bias = torch.zeros(40)
    bias[20:] = -torch.inf
    target = target.clamp(max=19)
    options = {"bias": bias, "bias_perturbed": bias}
    _, difference = linear_nll_pair(hidden, hidden * 1.01, weight, target, **options)
    truth = oracle.head_nll(hidden, weight[:20], target) - oracle.head_nll(
        hidden * 1.01, weight[:20], target
    )
    torch.testing.assert_close(difference, truth, rtol=1e-3, atol=1e-4)


@needs_cpp
def test_raw_operators_check_every_tensor():
    """A tensor of the wrong size is refused, not read beyond its end."""
    hidden, weight, target, _ = inputs()
    bias, options, short = torch.zeros(40), (0.0, 1.0, -100), torch.ones(1)
    nll, lse, _ = ops.linear_nll_forward(hidden, weight, target, bias, *options, False)
    head = (hidden, weight, target)
    needs = (True, True, True)
    calls = [
        lambda: ops.linear_nll_backward(short, *head, bias, nll, lse, *options, *needs),
        lambda: ops.linear_nll_backward(nll, *head, bias, short, lse, *options, *needs),
        lambda: ops.linear_nll_backward(nll, *head, bias, nll, nll, *options, *needs),
        lambda: ops.weighted_linear_nll_forward(*head, short, bias, *options, *needs),
        lambda: ops.linear_nll_jvp(*head, hidden, None, bias, short, *options),
        lambda: ops.linear_nll_jvp(*head, hidden[:3], None, bias, None, *options),
        lambda: ops.linear_nll_pair(*head, hidden, weight[:3], bias, None, *options),
        lambda: ops.scale_cast(hidden, short, torch.float32),
    ]
    for call in calls:
        with pytest.raises((ValueError, RuntimeError), match="expected"):
            call()
    assert not ops.set_bf16_engine("no such engine")
