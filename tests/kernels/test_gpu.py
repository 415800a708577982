"""What only shows on a device: graphs, streams, synchronisation, size. And ragged shapes of every
operator, which also run under the interpreter and are what memcheck looks at (benchmarks/gpu.py).
"""

import pytest
import torch
import torch.nn.functional as F

from vcore_kernels import (
    gibbs_weights,
    linear_nll,
    linear_nll_grad_norms,
    linear_nll_jvp,
    linear_nll_pair,
    perturbed,
    vcore_loss,
    weighted_linear_nll,
)
from vcore_kernels.backends import last_used, supports
from vcore_kernels.backends.triton import INTERPRETED

no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
on_gpu = [pytest.mark.gpu, no_cuda]


@pytest.fixture(params=[pytest.param("cuda", marks=on_gpu)])
def cuda(request):
    return torch.device(request.param)


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.interpreter)]
    if INTERPRETED
    else [pytest.param("cuda", marks=on_gpu)]
)
def device(request):
    return torch.device(request.param)


class Head:
    """Inputs of one shape; a fifth of the targets is ignored."""

    def __init__(self, n, h, v, dtype, device, bias=False, seed=0):
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size, scale=1.0):
            values = torch.randn(*size, generator=generator, device=device)
            return (values * scale).to(dtype)

        self.hidden = normal(n, h).requires_grad_()
        self.weight = normal(v, h, scale=3 / h**0.5).requires_grad_()
        self.bias = normal(v).requires_grad_() if bias else None
        self.target = torch.randint(v, (n,), generator=generator, device=device)
        self.target[torch.rand(n, generator=generator, device=device) < 0.2] = -100
        self.token_weight = torch.rand(n, generator=generator, device=device)
        self.hidden_tangent = normal(n, h)
        self.weight_tangent = normal(v, h, scale=3 / h**0.5)
        self.offsets = torch.tensor([0, n // 3, n // 3, n], dtype=torch.int32, device=device)

    @property
    def wanted(self):
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def known(self, **options):
        loss, nll = weighted_linear_nll(
            self.hidden,
            self.weight,
            self.target,
            self.token_weight,
            bias=self.bias,
            backend="triton",
            **options,
        )
        return nll, *torch.autograd.grad(loss, self.wanted)

    def late(self, **options):
        nll = linear_nll(
            self.hidden,
            self.weight,
            self.target,
            bias=self.bias,
            backend="triton",
            **options,
        )
        return nll.detach(), *torch.autograd.grad((nll * self.token_weight).sum(), self.wanted)

    def jvp(self, backend="triton", **options):
        return linear_nll_jvp(
            self.hidden.detach(),
            self.weight.detach(),
            self.target,
            self.hidden_tangent,
            self.weight_tangent,
            backend=backend,
            **options,
        )

    def norms(self):
        """Of padded sequences, and of packed ones."""
        tensors = self.hidden, self.weight, self.target
        padded = self.hidden.unflatten(0, (4, -1)), self.weight, self.target.unflatten(0, (4, -1))
        options = {"bias": self.bias, "softcap": 30.0, "backend": "triton"}
        return (
            linear_nll_grad_norms(*padded, **options),
            linear_nll_grad_norms(*tensors, cu_seqlens=self.offsets, **options),
        )

    def pair(self, backend="triton", **options):
        return linear_nll_pair(
            self.hidden.detach(),
            self.hidden.detach() + 0.01 * self.hidden_tangent,
            self.weight.detach(),
            self.target,
            backend=backend,
            **options,
        )

    def truth(self, softcap=None):
        """nll and gradients of the weighted sum in float64."""
        leaves = [t.detach().double().requires_grad_() for t in self.wanted]
        logits = F.linear(*leaves)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        nll = F.cross_entropy(logits, self.target, reduction="none")
        grads = torch.autograd.grad((nll * self.token_weight.double()).sum(), leaves)
        return nll.detach(), *grads


def close(got, expected, dtype, factor=8.0, scale=0.0):
    """Within ``factor`` roundings of the largest entry, or of ``scale``; a NaN is not."""
    for a, b in zip(got, expected, strict=True):
        largest = b.double().abs().max().clamp(min=scale)
        error = (a.double() - b.double()).abs().max()
        assert error <= factor * torch.finfo(dtype).eps * largest, (error, largest)


def fill_free_memory_with_nan(device):
    if device.type == "cuda":
        for size in (1 << 26, 1 << 22, 1 << 16, 1 << 9):
            del_me = torch.full((size // 4,), torch.nan, device=device)
            del del_me


# ---- ragged shapes: also under memcheck ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 3), (5, 24, 131), (67, 40, 257)], ids=str)
def test_ragged_head(device, dtype, shape):
    head = Head(*shape, dtype, device, bias=shape[0] == 5)
    softcap = 5.0 if shape[0] == 5 else None
    fill_free_memory_with_nan(device)
    expected = head.truth(softcap)
    # Products of 16-bit numbers round the logits' gradients; losses are sums in float32.
    for got in (head.known(softcap=softcap), head.late(softcap=softcap)):
        close(got[:1], expected[:1], torch.float32, factor=64, scale=1)
        close(got[1:], expected[1:], dtype)
    close(head.jvp(), head.jvp(backend="reference"), torch.float32, factor=64, scale=1)
    # The difference of the inputs is rounded to their dtype, the reference's to that of its losses.
    got, expected = head.pair(), head.pair(backend="reference")
    close(got[:1], expected[:1], torch.float32, factor=64, scale=1)
    close(got[1:], expected[1:], dtype, factor=2, scale=4e-6 / torch.finfo(dtype).eps)
    assert last_used["linear_nll_pair"] == "reference"


@pytest.mark.parametrize("rule", [{"kl_budget": 0.3}, {"kl_budget": 0.3, "kl_scope": "batch"}])
def test_ragged_gibbs(device, rule):
    lengths = torch.tensor([1, 0, 3, 257, 64, 1000])
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32).to(device)
    utility = torch.randn(int(lengths.sum())).to(device)
    nll = utility.abs()
    fill_free_memory_with_nan(device)
    got = vcore_loss(nll, utility, cu_seqlens=offsets, backend="triton", **rule)
    expected = vcore_loss(nll, utility, cu_seqlens=offsets, backend="reference", **rule)
    for name in ("loss", "weights", "alpha", "tau", "kl", "ess"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_ragged_perturb(device, dtype, rounding):
    params = [torch.randn(size).to(device, dtype) for size in (1, 7, 1025, 4096)]
    direction = [torch.randn(p.shape).to(device, dtype) for p in params]
    before = [p.clone() for p in params]
    with perturbed(params, direction, 0.1, rounding=rounding, backend="triton"):
        for p, old, g in zip(params, before, direction, strict=True):
            close([p], [old.float() - 0.1 * g.float()], dtype, factor=2)
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


# ---- the same bits ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_row_alone_equals_row_in_batch(device, dtype):
    """Bit for bit: a row's loss does not depend on what stands beside it."""
    head = Head(70, 48, 300, dtype, device)
    weight = head.weight.detach()

    def nll(rows):
        return linear_nll(head.hidden.detach()[rows], weight, head.target[rows], backend="triton")

    whole = nll(slice(None))
    for start, stop in ((0, 1), (17, 18), (69, 70), (3, 40)):
        assert torch.equal(nll(slice(start, stop)), whole[start:stop])


def test_two_runs_are_equal(device):
    head = Head(70, 48, 300, torch.bfloat16, device)
    for call in (head.known, head.late, head.jvp, head.pair):
        for a, b in zip(call(), call(), strict=True):
            assert torch.equal(a, b)


def test_non_contiguous_inputs(device):
    """Columns of a wider tensor, a transposed weight, every second target."""
    head = Head(24, 32, 131, torch.bfloat16, device)
    expected = head.known()
    wide = torch.zeros(24, 80, dtype=torch.bfloat16, device=device)
    wide[:, 5:37] = head.hidden.detach()
    tall = head.weight.detach().T.contiguous()
    targets = torch.stack([head.target, head.target], 1).flatten()
    weights = torch.stack([head.token_weight, head.token_weight], 1).flatten()
    head.hidden = wide[:, 5:37].requires_grad_()
    head.weight = tall.T.requires_grad_()
    head.target, head.token_weight = targets[::2], weights[::2]
    assert not any(t.is_contiguous() for t in (head.hidden, head.weight, head.target))
    for a, b in zip(head.known(), expected, strict=True):
        assert torch.equal(a, b)


# ---- graphs, synchronisation, compilation ----


def captured(call):
    """A CUDA graph of ``call`` and the tensors that each replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.mark.parametrize("name", ["known", "late", "jvp", "pair", "norms"])
def test_cuda_graph_of_the_head(cuda, name):
    head, other = (Head(300, 64, 1000, torch.bfloat16, cuda, seed=seed) for seed in (0, 1))
    graph, results = captured(getattr(head, name))
    with torch.no_grad():  # other data, other ignored rows, in the same memory
        for attribute in ("hidden", "weight", "target", "token_weight", "hidden_tangent"):
            getattr(head, attribute).copy_(getattr(other, attribute))
        head.weight_tangent.copy_(other.weight_tangent)
    for result in results:
        result.fill_(torch.nan)
    graph.replay()
    for a, b in zip(results, getattr(other, name)(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scope", ["trajectory", "batch"])
def test_cuda_graph_of_vcore_loss(cuda, scope):
    offsets = torch.tensor([0, 40, 41, 500, 1000], dtype=torch.int32, device=cuda)
    utility, nll, other = torch.randn(3, 1000, device=cuda).unbind()
    options = {"cu_seqlens": offsets, "kl_budget": 0.2, "kl_scope": scope, "backend": "triton"}
    graph, result = captured(lambda: vcore_loss(nll, utility, **options))
    utility.copy_(other)
    result.weights.fill_(torch.nan)
    graph.replay()
    expected = vcore_loss(nll, other, **options)
    for name in ("loss", "weights", "alpha", "tau", "kl", "ess"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name


def test_nothing_waits_for_the_device(cuda):
    head = Head(100, 64, 500, torch.bfloat16, cuda)
    utility = torch.randn(4, 100, device=cuda)
    mask = torch.rand(4, 100, device=cuda) < 0.8

    def everything():
        head.known(), head.late(), head.jvp(), head.pair(), head.norms()
        for scope in ("trajectory", "batch"):
            options = {"mask": mask, "kl_budget": 0.2, "kl_scope": scope, "backend": "triton"}
            gibbs_weights(utility, **options)
            vcore_loss(utility.abs(), utility, **options)

    everything()  # the first call compiles
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_compiled_equals_eager(cuda):
    head = Head(100, 64, 500, torch.bfloat16, cuda)

    def loss(hidden, weight, target, token_weight):
        known, nll = weighted_linear_nll(hidden, weight, target, token_weight, backend="triton")
        late = linear_nll(hidden, weight, target, backend="triton")
        return known + (late * token_weight).sum(), nll

    args = head.hidden, head.weight, head.target, head.token_weight
    compiled = torch.compile(loss, fullgraph=True)
    results = []
    for function in (loss, compiled):
        value, nll = function(*args)
        results.append((nll, *torch.autograd.grad(value, head.wanted)))
    assert torch.equal(results[0][0], results[1][0])
    close(results[1][1:], results[0][1:], torch.bfloat16, factor=2)


def test_autocast(cuda):
    head = Head(100, 64, 500, torch.float32, cuda)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = head.known()
    assert [t.dtype for t in got] == [torch.float32] * 3
    low = Head(100, 64, 500, torch.bfloat16, cuda)
    for name in ("hidden", "weight"):
        value = getattr(head, name).detach().to(torch.bfloat16)
        setattr(low, name, value.requires_grad_())
    low.target, low.token_weight = head.target, head.token_weight
    close(got, low.known(), torch.bfloat16, factor=2)


def test_another_device_than_the_current_one(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("one device only")
    head = Head(100, 64, 500, torch.bfloat16, torch.device("cuda:1"))
    here = Head(100, 64, 500, torch.bfloat16, torch.device("cuda:0"))
    for name in ("hidden", "weight", "target", "token_weight"):
        value = getattr(head, name).detach().to("cuda:0")
        setattr(here, name, value.requires_grad_(value.is_floating_point()))
    assert torch.cuda.current_device() == 0
    for a, b in zip(head.known(), here.known(), strict=True):
        assert a.device.index == 1
        assert torch.equal(a.to("cuda:0"), b)


def test_side_stream(cuda):
    head = Head(300, 64, 1000, torch.bfloat16, cuda)
    expected = head.known()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = head.known()
    stream.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_auto_takes_triton(cuda):
    head = Head(10, 32, 100, torch.bfloat16, cuda)
    assert supports("triton", "linear_nll", head.hidden)
    linear_nll(head.hidden, head.weight, head.target)
    assert last_used["linear_nll"] == "triton"


# ---- size ----


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", ["known", "late"])
def test_beyond_2_to_the_31_logits(cuda, trained, name):
    """N*V = 4.98e9: sampled rows against float64, and the memory bound of 1/16 of bf16 logits."""
    n, h, v = 32768, 256, 151936
    head = Head(n, h, v, torch.bfloat16, cuda)
    if not trained:
        head.weight = head.weight.detach()
    wanted = [head.hidden, head.weight] if trained else [head.hidden]

    def call():
        if name == "known":
            loss, nll = weighted_linear_nll(
                head.hidden, head.weight, head.target, head.token_weight, backend="triton"
            )
        else:
            nll = linear_nll(head.hidden, head.weight, head.target, backend="triton")
            loss = (nll * head.token_weight).sum()
        return nll.detach(), *torch.autograd.grad(loss, wanted)

    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in results)
    extra -= 4 * v * h if trained else 0  # the float32 accumulator of d_weight
    assert extra <= 2 * n * v / 16, f"{extra / 2**20:.0f} MiB"

    rows = torch.tensor([0, 1, 14135, 14136, 20001, n - 2, n - 1], device=cuda)
    rows = rows[head.target[rows] != -100]
    hidden = head.hidden.detach()[rows].double().requires_grad_()
    logits = hidden @ head.weight.detach().double().T
    nll = F.cross_entropy(logits, head.target[rows], reduction="none")
    loss = (nll * head.token_weight[rows].double()).sum()
    (d_hidden,) = torch.autograd.grad(loss, hidden)
    close([results[0][rows]], [nll.detach()], torch.float32, factor=64)
    close([results[1][rows]], [d_hidden], torch.bfloat16)
    assert all(bool(t.isfinite().all()) for t in results)


def kernels_of(call):
    """Names of the kernels that ``call`` runs on the device."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memset", "Memcpy"))
    ]


def test_gibbs_is_one_launch(cuda):
    lengths = torch.randint(1, 2000, (64,))
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(cuda)
    utility = torch.randn(int(lengths.sum()), device=cuda)
    operator = torch.ops.vcore_kernels.gibbs_variance
    names = kernels_of(lambda: operator(utility, None, offsets, 0.1, "trajectory", 1e-6))
    # beside it PyTorch's kernel that zeroes the ticket
    assert len([name for name in names if "FillFunctor" not in name]) == 1, names
