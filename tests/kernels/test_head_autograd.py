"""Derivatives, transforms, compilation, autocast and layout of the head operators."""

import oracle
import pytest
import torch
import torch.autograd.forward_ad as fwAD

import vcore_kernels.backends
from vcore_kernels import linear_nll, linear_nll_jvp, linear_nll_pair, weighted_linear_nll

ops = torch.ops.vcore_kernels
needs_cpp = pytest.mark.skipif(
    not vcore_kernels.backends()["cpp"], reason=vcore_kernels.backends()["cpp"].reason
)


def inputs(n=12, h=16, v=40, dtype=torch.float32, grad=True):
    hidden = torch.randn(n, h, dtype=dtype, requires_grad=grad)
    weight = torch.randn(v, h, dtype=dtype, requires_grad=grad)
    target = torch.randint(0, v, (n,))
    target[::5] = -100
    return hidden, weight, target, torch.randn(n, dtype=dtype)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "scale": 0.5}], ids=str)
def test_gradcheck_in_both_modes(options, backend):
    if backend == "triton":
        pytest.skip("the Triton kernels have no float64 products")
    if backend == "triton":
        pytest.skip("the Triton kernels have no float64 products")
    hidden, weight, target, token_weight = inputs(5, 6, 9, torch.float64)
    bias = torch.randn(9, dtype=torch.float64, requires_grad=True)

    def late(h, w, b):
        return linear_nll(h, w, target, bias=b, backend=backend, **options)

    def known(h, w, b):
        args = (h, w, target, token_weight)
        return weighted_linear_nll(*args, bias=b, backend=backend, **options)[0]

    for function in (late, known):
        assert torch.autograd.gradcheck(function, (hidden, weight, bias), check_forward_ad=True)


def test_backward_twice_gives_the_same(backend):
    hidden, weight, target, token_weight = inputs()
    nll = linear_nll(hidden, weight, target, backend=backend)
    frozen = linear_nll(hidden, weight.detach(), target, backend=backend)
    known, _ = weighted_linear_nll(hidden, weight, target, token_weight, backend=backend)
    for loss, wrt in (
        ((nll * token_weight).sum(), [hidden, weight]),
        ((frozen * token_weight).sum(), [hidden]),
        (known, [hidden, weight]),
    ):
        first = torch.autograd.grad(loss, wrt, retain_graph=True)
        first = [g.clone() for g in first]
        for g in torch.autograd.grad(loss, wrt, retain_graph=True):
            g.mul_(7)  # whoever gets the gradient may write to it
        for a, b in zip(first, torch.autograd.grad(loss, wrt), strict=True):
            assert torch.equal(a, b)


def test_upstream_gradient_of_known_weights(backend):
    hidden, weight, target, token_weight = inputs()
    loss, _ = weighted_linear_nll(hidden, weight, target, token_weight, backend=backend)
    one = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
    three = torch.autograd.grad(3 * loss, [hidden, weight])
    for a, b in zip(one, three, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_second_derivatives_are_refused_rather_than_wrong():
    hidden, weight, target, _ = inputs()
    if not vcore_kernels.backends()["cpp"]:
        pytest.skip("the reference backend is plain PyTorch and has them")
    for loss in (
        linear_nll(hidden, weight, target).sum(),
        linear_nll(hidden, weight.detach(), target).sum(),
        weighted_linear_nll(hidden, weight, target, torch.ones(12))[0],
    ):
        grad = torch.autograd.grad(loss + (hidden**2).sum(), hidden, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(grad.sum(), hidden)


def test_only_wanted_gradients(backend):
    hidden, weight, target, token_weight = inputs()
    for h, w in ((hidden, weight.detach()), (hidden.detach(), weight)):
        for loss in (
            linear_nll(h, w, target, backend=backend).sum(),
            weighted_linear_nll(h, w, target, token_weight, backend=backend)[0],
        ):
            wanted = h if h.requires_grad else w
            assert torch.autograd.grad(loss, wanted)[0].abs().sum() > 0
    assert not linear_nll(hidden.detach(), weight.detach(), target, backend=backend).requires_grad
    with torch.no_grad():
        assert not linear_nll(hidden, weight, target, backend=backend).requires_grad


# ---- forward mode ----


def exact_tangent(hidden, weight, target, d_hidden, d_weight):
    def loss(h, w):
        return oracle.head_nll(h, w, target)

    args = [x.detach().double() for x in (hidden, weight)]
    return torch.func.jvp(loss, tuple(args), (d_hidden.double(), d_weight.double()))[1]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_no_way_in_loses_the_tangent(backend, requires_grad):
    hidden, weight, target, token_weight = inputs(grad=requires_grad)
    d_hidden, d_weight = torch.randn_like(hidden), torch.randn_like(weight)
    truth = exact_tangent(hidden, weight, target, d_hidden, d_weight)
    assert truth.abs().max() > 1

    def late(h, w):
        return linear_nll(h, w, target, backend=backend)

    def known(h, w):
        return weighted_linear_nll(h, w, target, token_weight, backend=backend)[0]

    for function, exact in ((late, truth), (known, (truth * token_weight).sum())):
        primals, tangents = (hidden, weight), (d_hidden, d_weight)
        _, tangent = torch.func.jvp(function, primals, tangents)
        torch.testing.assert_close(tangent.double(), exact, rtol=1e-4, atol=1e-4)
        with fwAD.dual_level():
            duals = [fwAD.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
            tangent = fwAD.unpack_dual(function(*duals)).tangent
        torch.testing.assert_close(tangent.double(), exact, rtol=1e-4, atol=1e-4)
        # A tangent on the head alone.
        _, part = torch.func.jvp(lambda w, f=function: f(hidden, w), (weight,), (d_weight,))
        assert part.abs().max() > 0


@needs_cpp
def test_raw_operators_refuse_dual_tensors():
    hidden, weight, target, _ = inputs(grad=False)
    rest = (weight, target, None, 0.0, 1.0, -100, False)
    calls = {
        "linear_nll_forward": lambda h: ops.linear_nll_forward(h, *rest),
        "linear_nll_jvp": lambda h: ops.linear_nll_jvp(
            h, weight, target, hidden, None, None, None, 0.0, 1.0, -100
        ),
        "linear_nll_pair": lambda h: ops.linear_nll_pair(
            h, weight, target, hidden, None, None, None, 0.0, 1.0, -100
        ),
    }
    for name, call in calls.items():
        message = f"{name} has no forward derivative"
        with fwAD.dual_level(), pytest.raises(RuntimeError, match=message):
            call(fwAD.make_dual(hidden, hidden))
        with pytest.raises(RuntimeError, match=message):
            torch.func.jvp(call, (hidden,), (hidden,))
    with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
        torch.func.jvp(lambda h: ops.linear_nll(h, *rest)[0], (hidden,), (hidden,))
    with fwAD.dual_level():  # this one has a derivative, also in forward mode
        dual = ops.linear_nll(fwAD.make_dual(hidden, hidden), *rest)[0]
        assert fwAD.unpack_dual(dual).tangent.abs().max() > 0


def test_no_tangent_is_lost_under_compile(backend):
    """Compiled forward AD works or raises; it never yields a zero tangent."""
    hidden, weight, target, _ = inputs(grad=False)
    tangent = torch.randn_like(hidden)

    def utilities(h, t):
        def loss(x):
            return linear_nll(x, weight, target, backend=backend)

        return torch.func.jvp(loss, (h,), (t,))[1]

    expected = utilities(hidden, tangent)
    compiled = torch.compile(utilities, backend="aot_eager")
    try:
        result = compiled(hidden, tangent)
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException):
        return
    torch.testing.assert_close(result, expected)


def test_func_grad(backend):
    hidden, weight, target, token_weight = inputs(grad=False)

    def loss(h):
        return (linear_nll(h, weight, target, backend=backend) * token_weight).sum()

    def exact(h):
        return (oracle.head_nll(h, weight, target) * token_weight).sum()

    torch.testing.assert_close(torch.func.grad(loss)(hidden), torch.func.grad(exact)(hidden))


# ---- compile and opcheck ----


def test_compiles_with_dynamic_shapes_and_options(backend):
    hidden, weight, target, token_weight = inputs(grad=False)

    def everything(h, y, w, scale):
        options = {"scale": scale, "softcap": 3.0 * scale, "backend": backend}
        loss, nll = weighted_linear_nll(h, weight, y, w, **options)
        return loss + linear_nll(h, weight, y, **options).sum(), nll

    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, scale in ((12, 1.0), (7, 0.5), (3, 2.0)):
        args = (hidden[:n], target[:n], token_weight[:n], scale)
        for a, b in zip(compiled(*args), everything(*args), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", [False, True])
def test_compiles_without_a_graph_break(backend, frozen):
    hidden, weight, target, token_weight = inputs()
    weight = weight.detach() if frozen else weight
    wrt = [hidden] if frozen else [hidden, weight]

    def late(h, w):
        return (linear_nll(h * 1.0, w, target, backend=backend) * token_weight).sum()

    def known(h, w):
        return weighted_linear_nll(h * 1.0, w, target, token_weight, backend=backend)[0]

    for function in (late, known):
        expected = function(hidden, weight)
        loss = torch.compile(function, fullgraph=True, backend="aot_eager")(hidden, weight)
        torch.testing.assert_close(loss, expected)
        for a, b in zip(
            torch.autograd.grad(loss, wrt), torch.autograd.grad(expected, wrt), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_tangent_and_pair_compile(backend):
    hidden, weight, target, _ = inputs(grad=False)

    def both(h, w):
        _, tangent = linear_nll_jvp(h, w, target, h, backend=backend)
        _, difference = linear_nll_pair(h, h * 1.01, w, target, backend=backend)
        return tangent, difference

    if backend == "reference":
        # Its tangent is PyTorch's own forward AD, which torch.compile does not trace; no graph
        # break is promised.
        compiled = torch.compile(both, backend="aot_eager")
    else:
        compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(hidden, weight), both(hidden, weight), strict=True):
        torch.testing.assert_close(a, b)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck(dtype):
    hidden, weight, target, token_weight = inputs(dtype=dtype)
    bias = torch.randn(40, dtype=dtype)
    fixed = [x.detach() for x in (hidden, weight)]
    options = (0.0, 1.0, -100)
    nll, lse, _ = ops.linear_nll_forward(*fixed, target, bias, *options, False)
    token_weight = token_weight.float()
    raw = {
        ops.linear_nll_forward: (*fixed, target, bias, *options, True),
        ops.linear_nll_backward: (
            *(token_weight, *fixed, target, bias, nll, lse),
            *(*options, True, True, True),
        ),
        ops.weighted_linear_nll_forward: (
            *(*fixed, target, token_weight, bias),
            *(*options, True, True, True),
        ),
        ops.linear_nll_jvp: (*fixed, target, fixed[0], fixed[1], bias, bias, *options),
        ops.linear_nll_pair: (*fixed, target, fixed[0], fixed[1], bias, bias, *options),
        ops.scale_cast: (fixed[0], nll, torch.bfloat16),
        ops.linear_nll: (hidden, weight, target, bias, *options, False),
        ops.weighted_linear_nll: (
            *(hidden, weight, target, token_weight, bias),
            *(*options, True, True, False),
        ),
    }
    for op, args in raw.items():
        torch.library.opcheck(op.default, args)


# ---- layout and dtypes ----


def test_shift_is_the_labels_of_a_language_model(backend):
    hidden, weight = torch.randn(3, 7, 16, requires_grad=True), torch.randn(40, 16)
    labels = torch.randint(0, 40, (3, 7))
    labels[0, :3] = -100
    token_weight = torch.rand(3, 7)
    nll = linear_nll(hidden, weight, labels, shift=1, backend=backend)
    assert nll.shape == labels.shape
    expected = torch.zeros(3, 7)
    for b in range(3):
        for t in range(1, 7):
            expected[b, t] = oracle.head_nll(
                hidden[b, t - 1].unsqueeze(0), weight, labels[b, t].unsqueeze(0)
            ).squeeze()
    torch.testing.assert_close(nll, expected)
    loss, known = weighted_linear_nll(
        hidden, weight, labels, token_weight, shift=1, backend=backend
    )
    torch.testing.assert_close(known, expected)
    torch.testing.assert_close(loss, (expected * token_weight).sum())
    late = torch.autograd.grad((nll * token_weight).sum(), hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], late)
    assert (late[:, -1] == 0).all()  # the last position predicts nothing
    _, tangent = linear_nll_jvp(
        hidden.detach(), weight, labels, torch.ones_like(hidden), shift=1, backend=backend
    )
    _, pair = linear_nll_pair(
        hidden.detach(), hidden.detach() + 1e-3, weight, labels, shift=1, backend=backend
    )
    torch.testing.assert_close(pair, -1e-3 * tangent, rtol=2e-2, atol=1e-4)
    packed = linear_nll(hidden[1], weight, labels[1], shift=1, backend=backend)
    torch.testing.assert_close(packed, expected[1])


def test_ignore_index_can_be_a_vocabulary_entry(backend):
    hidden, weight, _, _ = inputs()
    target = torch.arange(12)
    nll = linear_nll(hidden, weight, target, ignore_index=3, backend=backend)
    assert nll[3] == 0
    assert (nll[4:] > 0).all()


def test_autocast_casts_as_a_linear_layer_does(backend):
    hidden, weight, target, token_weight = inputs()
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        nll = linear_nll(hidden, weight, target, backend=backend)
        loss, _ = weighted_linear_nll(hidden, weight, target, token_weight, backend=backend)
    expected = linear_nll(hidden.bfloat16(), weight.bfloat16(), target, backend=backend)
    assert torch.equal(nll, expected)
    assert nll.dtype == torch.float32
    for grad in torch.autograd.grad(loss, [hidden, weight]):
        assert grad.dtype == torch.float32
        assert grad.abs().sum() > 0


def test_non_contiguous_inputs(backend):
    hidden, weight, target, _ = inputs()
    strided_hidden = torch.randn(16, 12).T
    strided_weight = torch.randn(16, 80)[:, ::2].T
    nll = linear_nll(strided_hidden, strided_weight, target, backend=backend)
    copies = (strided_hidden.contiguous(), strided_weight.contiguous())
    assert torch.equal(nll, linear_nll(*copies, target, backend=backend))
    spread = torch.randint(0, 40, (24,))[::2]
    late = linear_nll(hidden, weight, spread, backend=backend)
    assert torch.equal(late, linear_nll(hidden, weight, spread.clone(), backend=backend))


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_row_alone_equals_the_row_in_a_batch(dtype, monkeypatch):
    hidden, weight, target, _ = inputs(700, 48, 600, dtype, grad=False)
    target[:] = torch.randint(0, 600, (700,))
    batch = linear_nll(hidden, weight, target, backend="cpp")
    assert torch.equal(batch, linear_nll(hidden, weight, target, backend="cpp"))
    for row in (0, 13, 511, 512, 699):
        alone = linear_nll(hidden[row : row + 1], weight, target[row : row + 1], backend="cpp")
        assert torch.equal(alone, batch[row : row + 1])
    threads = torch.get_num_threads()
    try:  # nor does it depend on how many threads share the vocabulary
        torch.set_num_threads(threads + 1)
        assert torch.equal(batch, linear_nll(hidden, weight, target, backend="cpp"))
    finally:
        torch.set_num_threads(threads)


def test_two_runs_are_equal_bit_for_bit(backend):
    hidden, weight, target, token_weight = inputs(300, 64, 1000, torch.bfloat16)
    runs = []
    for _ in range(2):
        loss, _ = weighted_linear_nll(hidden, weight, target, token_weight.float(), backend=backend)
        runs.append([loss, *torch.autograd.grad(loss, [hidden, weight])])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_a_nan_row_stays_alone(backend):
    hidden, weight, target, _ = inputs(grad=False)
    hidden[7] = torch.nan
    nll = linear_nll(hidden, weight, target, backend=backend)
    assert nll[7].isnan()
    assert nll[torch.arange(12) != 7].isfinite().all()
    # ... and with weight 0 it costs the others nothing.
    hidden.requires_grad_()
    token_weight = torch.ones(12)
    token_weight[7] = 0
    loss, known = weighted_linear_nll(hidden, weight, target, token_weight, backend=backend)
    assert loss.isfinite()
    assert known[7].isnan()
    if backend == "cpp":
        weight.requires_grad_()
        loss, _ = weighted_linear_nll(hidden, weight, target, token_weight, backend=backend)
        for grad in torch.autograd.grad(loss, [hidden, weight]):
            assert grad.isfinite().all()


def test_masked_vocabulary(backend):
    """A bias of -inf takes classes out: their probability and gradient are exactly 0."""
    hidden, weight, target, _ = inputs()
    bias = torch.zeros(40)
    bias[20:] = -torch.inf
    target = target.clamp(max=19)
    nll = linear_nll(hidden, weight, target, bias=bias, backend=backend)
    truth = oracle.head_nll(hidden, weight[:20], target)
    torch.testing.assert_close(nll, truth)
    grad = torch.autograd.grad(nll.sum(), weight)[0]
    assert (grad[20:] == 0).all()
    _, tangent = linear_nll_jvp(
        hidden.detach(), weight.detach(), target, hidden.detach(), bias=bias, backend=backend
    )
    expected = torch.func.jvp(
        lambda h: oracle.head_nll(h, weight.detach()[:20], target),
        (hidden.detach(),),
        (hidden.detach(),),
    )[1]
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-5)


# ---- dispatch and mistakes ----


def test_which_backend_ran():
    hidden, weight, target, _ = inputs()
    linear_nll(hidden, weight, target)
    best = "cpp" if vcore_kernels.backends()["cpp"] else "reference"
    used = vcore_kernels.backends.__globals__["last_used"]
    assert used["linear_nll"] == best
    linear_nll(hidden, weight, target, backend="reference")
    assert used["linear_nll"] == "reference"
    with pytest.raises(ValueError, match="unknown backend 'metal'"):
        linear_nll(hidden, weight, target, backend="metal")


def test_a_named_backend_that_cannot_serve_says_why():
    meta = [x.to("meta") for x in inputs(grad=False)[:3]]
    with pytest.raises(vcore_kernels.BackendError, match="cpp"):
        linear_nll(*meta, backend="cpp")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.randn(40, 17)}, ValueError, "weight has 17 columns, hidden has 16"),
        ({"weight": torch.randn(40)}, ValueError, r"weight \[V, H\]"),
        ({"weight": torch.randn(0, 16)}, ValueError, "empty vocabulary"),
        (
            {"weight": torch.randn(40, 16, dtype=torch.float64)},
            TypeError,
            "hidden is torch.float32",
        ),
        ({"hidden": torch.randint(0, 3, (12, 16))}, TypeError, "floating point"),
        ({"target": torch.zeros(11, dtype=torch.int64)}, ValueError, "one target for each row"),
        ({"target": torch.zeros(12, dtype=torch.int32)}, TypeError, "int64"),
        ({"target": torch.full((12,), 40)}, ValueError, "target 40 at flat position 0"),
        ({"target": torch.full((12,), -1)}, ValueError, "outside the vocabulary of 40"),
        ({"bias": torch.zeros(39)}, ValueError, r"bias has shape \[39\]"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"softcap": float("nan")}, ValueError, "softcap"),
        ({"scale": float("inf")}, ValueError, "scale"),
        ({"shift": 2}, ValueError, "shift must be 0 or 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_mistakes_are_named(change, error, message):
    hidden, weight, target, token_weight = inputs()
    call = {"hidden": hidden, "weight": weight, "target": target} | change
    with pytest.raises(error, match=message):
        linear_nll(**call)
    with pytest.raises(error, match=message):
        weighted_linear_nll(**call, token_weight=token_weight)
    with pytest.raises(error, match=message):
        linear_nll_jvp(**call, hidden_tangent=hidden)
    with pytest.raises(error, match=message):
        linear_nll_pair(**call, hidden_perturbed=hidden)


def test_mistakes_of_single_functions():
    hidden, weight, target, _ = inputs()
    with pytest.raises(ValueError, match="token_weight has shape"):
        weighted_linear_nll(hidden, weight, target, torch.ones(3))
    with pytest.raises(ValueError, match="hidden_tangent has shape"):
        linear_nll_jvp(hidden, weight, target, torch.ones(3, 16))
    with pytest.raises(ValueError, match="hidden_tangent has shape"):  # batch and time swapped
        linear_nll_jvp(hidden.view(3, 4, 16), weight, target.view(3, 4), torch.ones(4, 3, 16))
    with pytest.raises(TypeError, match="token_weight must be a tensor"):
        weighted_linear_nll(hidden, weight, target, [1.0] * 12)
    with pytest.raises(TypeError, match="bias must be floating point"):
        linear_nll(hidden, weight, target, bias=torch.zeros(40, dtype=torch.int64))
    with pytest.raises(ValueError, match="bias_tangent was given without bias"):
        linear_nll_jvp(hidden, weight, target, hidden, bias_tangent=torch.ones(40))
    with pytest.raises(ValueError, match="weight_perturbed has shape"):
        linear_nll_pair(hidden, hidden, weight, target, torch.ones(3, 16))
    with pytest.raises(TypeError, match="token_weight must be a real number"):
        weighted_linear_nll(hidden, weight, target, torch.ones(12, dtype=torch.bool))


def test_a_library_of_another_version_is_not_used(monkeypatch):
    from vcore_kernels import _library

    monkeypatch.setattr(_library, "WHY_NOT_COMPILED", None)
    monkeypatch.setattr(_library, "_compiled", ["linear_nll_forward", "linear_nll"])
    with pytest.warns(RuntimeWarning, match=r"without its compiled kernels.*it lacks"):
        _library.check_compiled()
    assert "it lacks linear_nll. Build" in vcore_kernels.backends()["cpp"].reason.replace(
        "linear_nll_forward, ", ""
    )
    hidden, weight, target, _ = inputs()
    linear_nll(hidden, weight, target)
    assert vcore_kernels.backends.__globals__["last_used"]["linear_nll"] == "reference"
