"""Spans in a profile, and what Proton is told of each kernel launch."""

import inspect
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import vcore_kernels as vk
from vcore_kernels.backends.triton import INTERPRETED
from vcore_kernels.spans import span

torch.manual_seed(0)
HIDDEN, WEIGHT = torch.randn(6, 16), torch.randn(32, 16)
TARGET = torch.tensor([3, 1, 31, -100, 0, 7])
LOSSES, UTILITY = torch.rand(2, 5) + 0.1, torch.randn(2, 5)
MASK = torch.ones(2, 5, dtype=torch.bool)
REWARD, GROUP = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
HEADS = torch.randn(1, 2, 4, 8)
RATE, NORM = torch.tensor([0.5, 0.25]), torch.tensor([1.0, 2.0])


def perturb_and_restore():
    vk.restore_(vk.perturb_([torch.ones(3)], [torch.ones(3)], 0.5))


def perturbed():
    with vk.perturbed([torch.ones(3)], [torch.ones(3)], 0.5):
        pass


# A call of every public function: the spans in its profile are these names, no others.
CALLS = {
    "linear_nll": lambda: vk.linear_nll(HIDDEN, WEIGHT, TARGET),
    "weighted_linear_nll": lambda: vk.weighted_linear_nll(HIDDEN, WEIGHT, TARGET, torch.ones(6)),
    "linear_nll_jvp": lambda: vk.linear_nll_jvp(HIDDEN, WEIGHT, TARGET, HIDDEN),
    "linear_nll_pair": lambda: vk.linear_nll_pair(HIDDEN, HIDDEN + 0.1, WEIGHT, TARGET),
    "linear_nll_grad_norms": lambda: vk.linear_nll_grad_norms(
        HIDDEN[None], WEIGHT, TARGET[None], shift=0
    ),
    "attention_jvp": lambda: vk.attention_jvp(
        *(HEADS,) * 6, causal=True, scale=0.3, key_mask=None, cu_seqlens=None
    ),
    "rms_norm_jvp": lambda: vk.rms_norm_jvp(HIDDEN, torch.ones(16), HIDDEN, None, eps=1e-6),
    "gated_jvp": lambda: vk.gated_jvp(HIDDEN, HIDDEN, HIDDEN, None, activation="silu"),
    "gibbs_weights": lambda: vk.gibbs_weights(UTILITY, kl_budget=0.02),
    "variance_control": lambda: vk.variance_control(UTILITY, torch.full((2, 5), 0.2)),
    "vcore_loss": lambda: vk.vcore_loss(LOSSES, UTILITY, kl_budget=0.02),
    "sft_loss": lambda: vk.sft_loss(LOSSES),
    "dft_loss": lambda: vk.dft_loss(LOSSES),
    "iw_sft_loss": lambda: vk.iw_sft_loss(LOSSES, -LOSSES),
    "random_supervision": lambda: vk.random_supervision(MASK, 0.5),
    "raft_loss": lambda: vk.raft_loss(-LOSSES, -LOSSES, REWARD),
    "grpo_advantages": lambda: vk.grpo_advantages(REWARD, GROUP),
    "group_metrics": lambda: vk.group_metrics(REWARD, GROUP),
    "grpo_loss": lambda: vk.grpo_loss(-LOSSES, -LOSSES, REWARD, clip_low=0.2, clip_high=0.2),
    "aggregation_items": lambda: vk.aggregation_items(MASK, "token-mean"),
    "prompt_weights": lambda: vk.prompt_weights(GROUP, "token_mean"),
    "gvm_allocate": lambda: vk.gvm_allocate(NORM, RATE, 8),
    "allocate": lambda: vk.allocate("uniform", 8, prompts=2),
    "gvm_variance": lambda: vk.gvm_variance(NORM, NORM, RATE, torch.tensor([4, 4])),
    "gvm_variance_bound": lambda: vk.gvm_variance_bound(NORM, RATE, 8),
    "perturb_ restore_": perturb_and_restore,
    "perturbed": perturbed,
}
SPANS = {"perturb_ restore_": {"perturb_", "restore_"}, "perturbed": {"perturb_", "restore_"}}


@contextmanager
def profiled():
    """A list that holds the profile's events when the block has ended."""
    events = []
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        yield events
    events += profiler.events()


def names(events):
    return {e.name.removeprefix("vcore::") for e in events if e.name.startswith("vcore::")}


def test_every_public_function_has_a_call_here():
    public = {name for name in vk.__all__ if inspect.isfunction(getattr(vk, name))}
    called = {name for key in CALLS for name in key.split()}
    assert public - called == {"backends", "free_backup_buffers"}
    assert called <= public


@pytest.mark.parametrize("name", CALLS)
def test_spans_of_an_operator(name):
    with profiled() as events:
        CALLS[name]()
    assert names(events) == SPANS.get(name, {name})


def test_an_operator_keeps_its_signature_and_errors():
    assert next(iter(inspect.signature(vk.sft_loss).parameters)) == "nll"
    with profiled(), pytest.raises(ValueError, match=r"^linear_nll: weight has 15 columns"):
        vk.linear_nll(HIDDEN, WEIGHT[:, 1:], TARGET)


def test_spans_nest():
    with profiled() as events, span("outer"):
        vk.sft_loss(LOSSES)
    outer, inner = (
        next(e for e in events if e.name == f"vcore::{name}") for name in ("outer", "sft_loss")
    )
    assert inner.cpu_parent is outer
    assert outer.time_range.start <= inner.time_range.start
    assert inner.time_range.end <= outer.time_range.end


def test_a_span_is_nothing_without_a_profiler():
    with profiled() as events:
        pass
    with span("unseen"):
        pass
    assert not names(events)


def test_a_span_begins_with_its_block():
    with profiled() as events:
        made = span("late")
        vk.sft_loss(LOSSES)
        with made:
            vk.dft_loss(LOSSES)
        with made:  # once more
            pass
    spans = [e for e in events if e.name == "vcore::late"]
    parents = {e.name: e.cpu_parent for e in events if e.name.startswith("vcore::")}
    assert len(spans) == 2
    assert parents["vcore::sft_loss"] is None
    assert parents["vcore::dft_loss"] is spans[0]


def test_a_span_that_proton_refuses_is_left(monkeypatch):
    proton = pytest.importorskip("triton.profiler")

    def scope(name):
        raise RuntimeError("no session")

    monkeypatch.setattr(proton, "scope", scope)
    flags = sys.modules["triton.profiler.flags"].flags
    with profiled() as events:
        with monkeypatch.context() as patch:
            patch.setattr(flags, "profiling_on", True)
            with pytest.raises(RuntimeError, match="no session"), span("refused"):
                pass
        with span("next"):
            pass
    assert next(e for e in events if e.name == "vcore::next").cpu_parent is None


def test_a_span_ends_where_an_error_leaves_it():
    with profiled() as events:
        with pytest.raises(KeyError), span("broken"):
            raise KeyError
        with span("next"):
            pass
    assert next(e for e in events if e.name == "vcore::next").cpu_parent is None


def test_compiled_code_has_no_graph_breaks_under_a_profiler():
    def loss(hidden, weight):
        return vk.linear_nll(hidden, weight, TARGET).sum()

    hidden = HIDDEN.clone().requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with profiled():
        value = compiled(hidden, WEIGHT)
    torch.testing.assert_close(value, loss(hidden, WEIGHT))


def test_forward_mode_under_a_profiler():
    def loss(hidden):
        return vk.sft_loss(vk.linear_nll(hidden, WEIGHT, TARGET), mask=TARGET >= 0)

    plain = torch.func.jvp(loss, (HIDDEN,), (WEIGHT[:6],))
    with profiled() as events:
        recorded = torch.func.jvp(loss, (HIDDEN,), (WEIGHT[:6],))
    assert names(events) == {"linear_nll", "sft_loss"}
    assert [x.item() for x in recorded] == [x.item() for x in plain]


def test_proton_gets_the_same_names(monkeypatch):
    proton = pytest.importorskip("triton.profiler")
    entered = []

    @contextmanager
    def scope(name):
        entered.append(name)
        yield

    monkeypatch.setattr(proton, "scope", scope)
    vk.sft_loss(LOSSES)
    assert entered == []
    monkeypatch.setattr(sys.modules["triton.profiler.flags"].flags, "profiling_on", True)
    with span("outer"):
        vk.sft_loss(LOSSES)
    assert entered == ["vcore::outer", "vcore::sft_loss"]


# ---- launches ----

compiled_triton = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no launch metadata")


def launches_of(call, monkeypatch):
    from vcore_kernels.triton import common

    monkeypatch.setattr(common, "recorded", [])
    call()
    return common.recorded


def told(launch):
    """What Proton is told of a recorded launch."""
    kernel = launch.kernel
    args = dict(zip(kernel.arg_names, launch.args, strict=False)) | launch.constants
    assert set(args) == set(kernel.arg_names)
    return kernel.launch_metadata((1,), SimpleNamespace(name=kernel.__name__), args)


@compiled_triton
@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
def test_every_kernel_tells_its_work(architecture):
    """All launches that the ahead-of-time report compiles, with and without descriptors."""
    pytest.importorskip("triton")
    from benchmarks import aot

    launches = list(aot.recorded_launches(architecture))
    kernels = {launch.kernel.__name__ for launch in launches}
    assert len(kernels) == 17
    products = set()
    for launch in launches:
        found = told(launch)
        assert found["name"].startswith(f"{launch.kernel.__name__} [")
        assert found["bytes"] > 0
        flops = [name for name in found if name.startswith("flops")]
        assert len(flops) <= 1
        assert all(found[name] > 0 for name in flops)
        products |= {launch.kernel.__name__ for _ in flops}
    assert products == {
        *("_logit_tiles", "_hidden_gradient", "_weight_gradient", "_squares_of_products"),
        *("_gram_of_gradients", "_squares_of_grams", "_attention"),
    }


@compiled_triton
@pytest.mark.parametrize(
    ("dtype", "key"), [(torch.bfloat16, "flops16"), (torch.float32, "flops32")], ids=["bf16", "f32"]
)
def test_products_of_a_head(monkeypatch, dtype, key):
    """1 product of N x V x H for losses, 2 with a frozen head, 3 with a trained one; N is not a
    multiple of a chunk's rows."""
    pytest.importorskip("triton")
    from vcore_kernels.triton import head

    n, v, h = 200, 512, 64
    hidden, weight = torch.empty(n, h, dtype=dtype), torch.empty(v, h, dtype=dtype)
    operands = hidden, weight, torch.zeros(n, dtype=torch.int64)
    options = 0.0, 1.0, -100

    def flops(call):
        found = [told(launch) for launch in launches_of(call, monkeypatch)]
        return sum(metrics.get(key, 0) for metrics in found)

    product = 2 * n * v * h
    assert flops(lambda: head.linear_nll_forward(*operands, None, *options, False)) == product
    assert flops(lambda: head.linear_nll_forward(*operands, None, *options, True)) == 2 * product
    assert (
        flops(lambda: head.linear_nll_jvp(*operands, hidden, None, None, None, *options))
        == 2 * product
    )
    assert (
        flops(lambda: head.linear_nll_jvp(*operands, hidden, weight, None, None, *options))
        == 3 * product
    )
    # d_weight is told of in whole chunks: 256 rows
    trained = flops(
        lambda: head.weighted_linear_nll_forward(
            *operands, torch.empty(n), None, *options, True, True, False
        )
    )
    assert trained == 2 * product + 2 * 256 * v * h


@compiled_triton
def test_bytes_of_the_losses(monkeypatch):
    """The weight and the rows once; no logits."""
    pytest.importorskip("triton")
    from vcore_kernels.triton import head

    n, v, h = 128, 512, 64
    hidden = torch.empty(n, h, dtype=torch.bfloat16)
    weight = torch.empty(v, h, dtype=torch.bfloat16)
    target = torch.zeros(n, dtype=torch.int64)
    found = launches_of(
        lambda: head.linear_nll_forward(hidden, weight, target, None, 0.0, 1.0, -100, False),
        monkeypatch,
    )
    by_kernel = {launch.kernel.__name__: told(launch)["bytes"] for launch in found}
    assert by_kernel["_logit_tiles"] == 2 * (v * h + n * h)
    assert by_kernel["_gather_rows"] == 2 * 2 * n * h


@compiled_triton
@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({"causal": False, "window": 0}, 64 * 64),
        ({"causal": True, "window": 0}, 64 * 65 // 2),
        ({"causal": True, "window": 4}, 4 * 5 // 2 + 60 * 4),
    ],
    ids=["full", "causal", "window"],
)
def test_products_of_attention(monkeypatch, options, pairs):
    pytest.importorskip("triton")
    from vcore_kernels.triton import attention_jvp

    q, k = torch.empty(2, 4, 64, 32), torch.empty(2, 2, 64, 32)

    def flops(dq, dk, dv):
        (launch,) = launches_of(
            lambda: attention_jvp.attention_jvp(
                *(q, k, k, dq, dk, dv, None, None),
                causal=options["causal"],
                scale=1.0,
                softcap=0.0,
                window=options["window"],
            ),
            monkeypatch,
        )
        return told(launch)["flops32"]

    product = 2 * 2 * 4 * pairs * 32
    assert flops(q, k, k) == 6 * product
    assert flops(None, None, k) == 3 * product
    assert flops(None, None, None) == 2 * product


@compiled_triton
@pytest.mark.aot
def test_triton_compiles_a_kernel_with_the_hook(monkeypatch):
    """The hook as Triton itself calls it: from a compiled kernel, with the launch's arguments."""
    triton = pytest.importorskip("triton")
    from triton.compiler import ASTSource

    from benchmarks import aot

    launch = next(
        launch
        for launch in aot.recorded_launches("sm90")
        if launch.kernel.__name__ == "_scale_cast"
    )
    source, target = aot.source_of(launch, aot.TARGETS["sm90"]), aot.TARGETS["sm90"]
    ast = ASTSource(source.kernel, source.signature, source.constants, source.attributes)
    compiled = triton.compile(ast, target=target.gpu, options=source.options)
    monkeypatch.setattr(compiled, "_init_handles", lambda: None)  # loads the binary into a GPU
    constants = [launch.constants[name] for name in ("ROWS", "COLUMNS")]
    args = (*launch.args, *constants)
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda metadata: None)
    compiled.function = None
    metadata = compiled.launch_metadata((1, 1, 1), 0, *args).get()
    assert metadata["name"] == "_scale_cast [N=256 H=512]"
    assert metadata["bytes"] == 256 * 512 * (2 + 2)
