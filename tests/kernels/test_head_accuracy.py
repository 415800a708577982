"""The four head operators against float64, on ragged, empty, huge and hostile inputs."""

from dataclasses import dataclass

import oracle
import pytest
import torch

from vcore_kernels import (
    backends,
    linear_nll,
    linear_nll_jvp,
    linear_nll_pair,
    weighted_linear_nll,
)
from vcore_kernels.backends.triton import INTERPRETED


@dataclass
class Case:
    hidden: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    token_weight: torch.Tensor
    bias: torch.Tensor | None
    options: dict

    def inputs(self, dtype):
        """Copies in dtype that require grad: hidden, weight, bias."""
        return [
            None if x is None else x.detach().to(dtype, copy=True).requires_grad_()
            for x in (self.hidden, self.weight, self.bias)
        ]


def make_case(n, h, v, dtype, *, bias=False, std=1.0, ignored=0.2, **options):
    target = torch.randint(0, v, (n,))
    target[torch.rand(n) < ignored] = -100
    token_weight = torch.randn(n)  # negative ones included
    token_weight[torch.rand(n) < 0.2] = 0
    return Case(
        hidden=torch.randn(n, h).to(dtype),
        weight=(torch.randn(v, h) * std / h**0.5).to(dtype),
        target=target,
        token_weight=token_weight,
        bias=torch.randn(v).to(dtype) if bias else None,
        options=options,
    )


def gradients(loss, inputs):
    wanted = [x for x in inputs if x is not None]
    return torch.autograd.grad(loss, wanted)


def eager(case, dtype):
    inputs = case.inputs(dtype)
    nll = oracle.head_nll(inputs[0], inputs[1], case.target, inputs[2], **case.options)
    return nll.detach(), gradients((nll * case.token_weight.to(nll.dtype)).sum(), inputs)


def check_losses_and_gradients(case, dtype, backend):
    truth_nll, truth = eager(case, torch.float64)
    eager_nll = eager(case, torch.float64 if dtype == torch.float64 else torch.float32)[0]
    _, eager_grads = eager(case, dtype)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32

    def check(nll, grads, what):
        assert nll.dtype == statistics
        oracle.assert_as_good_as_eager(nll, truth_nll, eager_nll, statistics, f"{what} nll")
        for name, grad, exact, plain in zip("hwb", grads, truth, eager_grads, strict=False):
            assert grad.dtype == dtype
            oracle.assert_as_good_as_eager(grad, exact, plain, dtype, f"{what} d{name}")

    # Late weights, trained head.
    inputs = case.inputs(dtype)
    nll = linear_nll(
        inputs[0], inputs[1], case.target, bias=inputs[2], backend=backend, **case.options
    )
    check(nll.detach(), gradients((nll * case.token_weight).sum(), inputs), "late")
    # Late weights, frozen head: the rows kept in forward.
    frozen_bias = None if inputs[2] is None else inputs[2].detach()
    nll = linear_nll(
        inputs[0],
        inputs[1].detach(),
        case.target,
        bias=frozen_bias,
        backend=backend,
        **case.options,
    )
    check(nll.detach(), torch.autograd.grad((nll * case.token_weight).sum(), inputs[0]), "frozen")
    # Known weights.
    loss, nll = weighted_linear_nll(
        *inputs[:2],
        case.target,
        case.token_weight,
        bias=inputs[2],
        backend=backend,
        **case.options,
    )
    assert not nll.requires_grad
    exact = (truth_nll * case.token_weight).sum()
    size = (truth_nll * case.token_weight).abs().sum().item()
    assert abs(loss.item() - exact.item()) <= 4 * torch.finfo(statistics).eps * size
    check(nll, gradients(loss, inputs), "known")


SHAPES = [(0, 64, 1000), (1, 64, 1000), (257, 64, 1000), (33, 65, 301), (17, 127, 7), (5, 64, 1)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": True}, {"softcap": 5.0}, {"bias": True, "softcap": 3.0, "scale": 0.3}],
    ids=str,
)
def test_losses_and_gradients(shape, dtype, options, backend):
    check_losses_and_gradients(make_case(*shape, dtype, **options), dtype, backend)


@pytest.mark.parametrize(
    "shape", [(3, 64, 151936), (2, 64, 129920), (9, 4096, 1000), (40, 2048, 517)], ids=str
)
def test_real_vocabularies_and_widths(shape, backend):
    if INTERPRETED:  # minutes a call; what is special in these numbers survives
        shape = (*shape[:2], shape[2] % 16384)
    check_losses_and_gradients(make_case(*shape, torch.bfloat16), torch.bfloat16, backend)


@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 5.0, "scale": 1.5}], ids=str)
@pytest.mark.parametrize("shape", [(257, 64, 1000), (33, 65, 301)], ids=str)
def test_every_engine_for_bf16(shape, options, bf16_engine):
    check_losses_and_gradients(make_case(*shape, torch.bfloat16, **options), torch.bfloat16, "cpp")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_chunks(dtype, backend):
    """More rows than a chunk holds, and a zero-weight group that starts a chunk of its own."""
    check_losses_and_gradients(make_case(1100, 16, 600, dtype), dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_logits(dtype, backend):
    case = make_case(31, 64, 400, dtype, std=1e4 if dtype != torch.float16 else 1e2)
    check_losses_and_gradients(case, dtype, backend)


def test_every_row_ignored(backend):
    case = make_case(6, 16, 50, torch.float32, ignored=2.0)
    hidden, weight, _ = case.inputs(torch.float32)
    nll = linear_nll(hidden, weight, case.target, backend=backend)
    loss, known_nll = weighted_linear_nll(
        hidden, weight, case.target, case.token_weight, backend=backend
    )
    for value in (nll, known_nll, loss):
        assert (value == 0).all()
    for value in (nll.sum(), loss):
        for grad in torch.autograd.grad(value, [hidden, weight]):  # a zero that is connected
            assert (grad == 0).all()


def test_bf16_inputs_give_fp32_losses(backend):
    """From bf16 inputs, |logit| about 20, within 1e-3 of float64 (bf16 products: 0.1 and more)."""
    hidden = torch.randn(64, 1024).bfloat16()
    weight = (torch.randn(5000, 1024) * 6 / 32).bfloat16()
    target = torch.randint(0, 5000, (64,))
    logits = hidden.double() @ weight.double().T
    assert 15 < logits.abs().max() < 40
    truth = oracle.head_nll(hidden.double(), weight.double(), target)
    assert oracle.max_error(linear_nll(hidden, weight, target, backend=backend), truth) < 1e-3
    assert oracle.max_error(oracle.head_nll(hidden, weight, target), truth) > 1e-2


def test_confident_tokens_keep_their_relative_accuracy(backend):
    """p(target) = 1 - 1e-8: the loss is 1e-8, not the rounding noise of two numbers near 20."""
    hidden = torch.eye(3, 8)
    weight = torch.zeros(300, 8)
    weight[0, 0], weight[1, 1], weight[2, 2] = 18.0, 25.0, 60.0
    target = torch.tensor([0, 1, 2])
    truth_inputs = [hidden.double().requires_grad_(), weight.double()]
    logits = oracle.head_logits(*truth_inputs)
    others = logits.scatter(1, target.unsqueeze(1), -torch.inf).logsumexp(1)
    truth = torch.log1p((others - logits.gather(1, target.unsqueeze(1)).squeeze(1)).exp())
    hidden.requires_grad_()
    nll = linear_nll(hidden, weight, target, backend=backend)
    torch.testing.assert_close(nll.double(), truth, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(nll.sum(), hidden)[0].double(),
        torch.autograd.grad(truth.sum(), truth_inputs[0])[0],
        rtol=1e-4,
        atol=0,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (600, 16, 600)], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 4.0, "scale": 0.7}], ids=str)
def test_tangents(shape, dtype, options, backend):
    case = make_case(*shape, dtype, **options)
    tangents = [
        None if x is None else torch.randn_like(x) for x in (case.hidden, case.weight, case.bias)
    ]

    def jvp(function, dtype, with_weight):
        primals = [x.to(dtype) for x in (case.hidden, case.weight)]
        d_hidden, d_weight, d_bias = (None if x is None else x.to(dtype) for x in tangents)
        if not with_weight:
            d_weight = torch.zeros_like(d_weight)
        if case.bias is None:
            return torch.func.jvp(
                lambda h, w: function(h, w, None), (*primals,), (d_hidden, d_weight)
            )
        bias = case.bias.to(dtype)
        return torch.func.jvp(function, (*primals, bias), (d_hidden, d_weight, d_bias))

    def truth(h, w, b):
        return oracle.head_nll(h, w, case.target, b, **case.options)

    # The tangent is a difference of tangents of logits.
    terms = [
        case.hidden.double() @ tangents[1].double().T,
        tangents[0].double() @ case.weight.double().T,
    ]
    scale = max((term.abs().max().item() for term in terms if term.numel()), default=0.0)
    for with_weight in (True, False):
        exact_nll, exact = jvp(truth, torch.float64, with_weight)
        statistics = torch.float64 if dtype == torch.float64 else torch.float32
        # From the same inputs in the statistics' dtype: the fair rival, since bf16 logits are
        # hopeless.
        eager_nll, plain = jvp(truth, statistics, with_weight)
        nll, tangent = linear_nll_jvp(
            case.hidden,
            case.weight,
            case.target,
            tangents[0],
            tangents[1] if with_weight else None,
            bias=case.bias,
            bias_tangent=tangents[2],
            backend=backend,
            **case.options,
        )
        assert nll.dtype == tangent.dtype == statistics
        oracle.assert_as_good_as_eager(nll, exact_nll, eager_nll, statistics, "nll")
        oracle.assert_as_good_as_eager(tangent, exact, plain, statistics, "tangent", scale)
        assert (tangent[case.target == -100] == 0).all()


def in_float64(case, perturbed):
    hidden, weight, bias = perturbed
    base = oracle.head_nll(
        case.hidden.double(),
        case.weight.double(),
        case.target,
        None if case.bias is None else case.bias.double(),
        **case.options,
    )
    other = oracle.head_nll(
        hidden.double(),
        weight.double(),
        case.target,
        None if bias is None else bias.double(),
        **case.options,
    )
    return base, base - other


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 4.0, "scale": 0.7}], ids=str)
@pytest.mark.parametrize("step", [1e-5, 1e-2, 1.0, 300.0])
@pytest.mark.parametrize("moves_weight", [False, True])
def test_pairs(dtype, options, step, moves_weight, backend):
    case = make_case(70, 65, 530, dtype, **options)

    def move(x):
        return None if x is None else (x.double() + step * torch.randn(x.shape).double()).to(dtype)

    perturbed = (
        move(case.hidden),
        move(case.weight) if moves_weight else case.weight,
        move(case.bias),
    )
    nll, difference = linear_nll_pair(
        case.hidden,
        perturbed[0],
        case.weight,
        case.target,
        perturbed[1] if moves_weight else None,
        bias=case.bias,
        bias_perturbed=perturbed[2],
        backend=backend,
        **case.options,
    )
    exact_nll, exact = in_float64(case, perturbed)
    scale = exact.abs().max().item()
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert oracle.max_error(nll, exact_nll) <= 16 * eps * exact_nll.abs().max().item()
    if (
        backend == "reference" or dtype == torch.float64
    ):  # plain subtraction: error relative to the losses
        bound = 64 * eps * max(scale, exact_nll.abs().max().item())
    else:  # the difference of the inputs rounded once: relative to the change of the logits
        change = (
            perturbed[0].double() @ perturbed[1].double().T
            - case.hidden.double() @ case.weight.double().T
        )
        scale = max(scale, change.abs().max().item())
        bound = (2 * torch.finfo(dtype).eps if dtype != torch.float32 else 32 * eps) * scale
    assert oracle.max_error(difference, exact) <= bound


@pytest.mark.skipif(not backends()["cpp"], reason=backends()["cpp"].reason)
def test_pair_is_exact_where_subtraction_is_noise():
    """A step of 1e-7 in float32: subtracting losses reads rounding, the pair the derivative."""
    hidden, weight = torch.randn(64, 128), torch.randn(1000, 128) / 11
    target, direction = torch.randint(0, 1000, (64,)), torch.randn(64, 128)
    perturbed = hidden - 1e-7 * direction
    case = Case(hidden, weight, target, None, None, {})
    _, exact = in_float64(case, (perturbed, weight, None))
    _, pair = linear_nll_pair(hidden, perturbed, weight, target, backend="cpp")
    plain = linear_nll(hidden, weight, target) - linear_nll(perturbed, weight, target)
    scale = exact.abs().max().item()
    assert oracle.max_error(pair, exact) < 1e-3 * scale
    assert oracle.max_error(plain, exact) > 0.1 * scale


@pytest.mark.slow
def test_more_logits_than_an_int32_counts():
    """N * V > 2^31, against the same rows one by one."""
    n, v, h = 14336, 151936, 4
    hidden, weight = torch.randn(n, h).bfloat16(), torch.randn(v, h).bfloat16()
    target = torch.randint(0, v, (n,))
    assert n * v > 2**31
    nll = linear_nll(hidden, weight, target)
    for row in (0, 1, n // 2, n - 1):
        truth = oracle.head_nll(
            hidden[row : row + 1].double(), weight.double(), target[row : row + 1]
        )
        assert oracle.max_error(nll[row : row + 1], truth) < 1e-5
