"""The vocabulary-parallel head in 2 and 4 processes against float64 in one."""

from dataclasses import dataclass, field, replace

import oracle
import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.distributed as dist
import torch.utils.checkpoint
from ranks import run_ranks

from vcore_kernels import (
    backends,
    gibbs_weights,
    linear_nll,
    linear_nll_jvp,
    linear_nll_pair,
    weighted_linear_nll,
)
from vcore_kernels.backends.triton import INTERPRETED

pytestmark = pytest.mark.distributed

needs_cpp = pytest.mark.skipif(not backends()["cpp"], reason=backends()["cpp"].reason)
BACKENDS = ["reference", pytest.param("cpp", marks=needs_cpp)]
worlds = pytest.mark.parametrize("world", [2, 4])
forms = pytest.mark.parametrize("form", ["dtensor", "group"])
over_backends = pytest.mark.parametrize("backend", BACKENDS)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...] = (40, 24)  # of target
    h: int = 24
    v: int = 103
    dtype: torch.dtype = torch.float32
    bias: bool = False
    ignored: float = 0.2
    std: float = 1.0
    options: dict = field(default_factory=dict)
    sizes: tuple[int, ...] | None = None  # of the shards with a group; DTensor's otherwise

    def tensors(self, dtype=None):
        """The same in every process: values rounded to the case's dtype, in ``dtype``."""
        g = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=g).to(self.dtype).to(dtype or self.dtype)

        shape, h, v = self.shape, self.h, self.v
        t = {
            "hidden": randn(*shape, h),
            "weight": (torch.randn(v, h, generator=g) * self.std / h**0.5).to(self.dtype),
            "bias": randn(v) if self.bias else None,
            "d_hidden": randn(*shape, h),
            "d_weight": randn(v, h) / 4,
            "d_bias": randn(v) if self.bias else None,
            "target": torch.randint(0, v, shape, generator=g),
            "factor": torch.randn(shape, generator=g),
        }
        t["weight"] = t["weight"].to(dtype or self.dtype)
        ignore = self.options.get("ignore_index", -100)
        t["target"][torch.rand(shape, generator=g) < self.ignored] = ignore
        t["factor"][torch.rand(shape, generator=g) < 0.2] = 0
        return t

    def shard_sizes(self, world):
        if self.sizes:
            return self.sizes
        return [len(part) for part in dtensor_chunks(torch.arange(self.v), world)]


def dtensor_chunks(x, world):
    parts = list(x.chunk(world))
    return parts + [x[:0]] * (world - len(parts))


def the_mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (dist.get_world_size(),))


def distributed(form, x, case):
    """This process's part of ``x``, [V, ...], and the keywords that go with it."""
    if x is None:
        return None
    if form == "dtensor":
        from torch.distributed.tensor import Shard, distribute_tensor

        return distribute_tensor(x, the_mesh(), [Shard(0)])
    return x.split(list(case.shard_sizes(dist.get_world_size())))[dist.get_rank()].clone()


def keywords(form, case, backend):
    group = {"group": dist.group.WORLD} if form == "group" else {}
    return {**case.options, **group, "backend": backend}


def local(x):
    return x.to_local() if hasattr(x, "to_local") else x


def everything(case, form, backend):
    """All three functions on one rank: losses, gradients, tangents."""
    t = case.tensors()
    kw = keywords(form, case, backend)

    def leaves(trained):
        hidden = t["hidden"].clone().requires_grad_()
        head = [distributed(form, t[name], case) for name in ("weight", "bias")]
        return hidden, *(x if x is None else x.requires_grad_(trained) for x in head)

    out = {}
    for trained in (True, False):
        kind = "trained" if trained else "frozen"
        for known in (False, True):
            hidden, weight, bias = leaves(trained)
            if known:
                loss, nll = weighted_linear_nll(
                    hidden, weight, t["target"], t["factor"], bias=bias, **kw
                )
                assert not nll.requires_grad
                out[f"loss {kind}"] = loss.detach()
            else:
                nll = linear_nll(hidden, weight, t["target"], bias=bias, **kw)
                loss = (nll * t["factor"].to(nll.dtype)).sum()
            loss.backward()
            out[f"nll {kind} {known}"] = nll.detach()
            out[f"hidden {kind} {known}"] = hidden.grad
            for name, x in (("weight", weight), ("bias", bias)):
                if x is not None and trained:
                    if form == "dtensor":
                        assert x.grad.placements == x.placements
                        assert x.grad.shape == x.shape
                    out[f"{name} {kind} {known}"] = local(x.grad)
                elif x is not None:
                    assert x.grad is None
    for moving in (True, False):
        _, weight, bias = leaves(False)
        tangents = [distributed(form, t[name], case) for name in ("d_weight", "d_bias")]
        nll, tangent = linear_nll_jvp(
            t["hidden"],
            weight,
            t["target"],
            t["d_hidden"],
            tangents[0] if moving else None,
            bias=bias,
            bias_tangent=tangents[1],
            **kw,
        )
        out[f"nll jvp {moving}"], out[f"tangent {moving}"] = nll, tangent
    return out


def truth(case, dtype):
    """The same by the textbook, in one process; ``dtype`` of the arithmetic."""
    t = case.tensors(dtype)
    options = dict(case.options)
    shift = options.pop("shift", 0)
    ignore = options.get("ignore_index", -100)

    def nll_of(hidden, weight, bias):
        target, rows = t["target"], hidden
        if shift:  # label t is predicted from position t - 1
            target, rows = target[..., 1:], hidden[..., :-1, :]
        rows, flat = rows.reshape(-1, case.h), target.reshape(-1)
        nll = oracle.head_nll(rows, weight, flat, bias, **options).reshape(target.shape)
        return torch.nn.functional.pad(nll, (1, 0)) if shift else nll

    leaves = [t[n] if t[n] is None else t[n].requires_grad_() for n in ("hidden", "weight", "bias")]
    nll = nll_of(*leaves)
    factor = t["factor"].to(nll.dtype)
    loss = (nll * factor).sum()
    grads = torch.autograd.grad(loss, [x for x in leaves if x is not None])
    grads = dict(zip(("hidden", "weight", "bias"), grads, strict=False))
    out = {"loss": loss.detach(), "size": (nll * factor).abs().sum().item(), "nll": nll.detach()}
    assert (out["nll"][t["target"] == ignore] == 0).all()
    for moving in (True, False):
        d_weight = t["d_weight"] if moving else torch.zeros_like(t["d_weight"])
        primals = [x.detach() for x in leaves if x is not None]
        tangents = [t["d_hidden"], d_weight, *([t["d_bias"]] if case.bias else [])]
        call = nll_of if case.bias else lambda h, w: nll_of(h, w, None)
        out[f"tangent {moving}"] = torch.func.jvp(call, tuple(primals), tuple(tangents))[1]
    return out | grads


def check(case, results, exact):
    """By dtype: 1e-5 of the largest in float32, roundings in float64, the error rule in 16 bits
    and for huge logits."""
    statistics = torch.float64 if case.dtype == torch.float64 else torch.float32
    by_rule = case.std > 100 or case.dtype not in (torch.float32, torch.float64)
    wide = truth(case, statistics) if by_rule else None
    plain = truth(case, case.dtype) if by_rule else None
    for key in results[0]:
        name = key.split()[0]
        of = key if name == "tangent" else name
        if name in ("weight", "bias"):
            value = torch.cat([rank[key] for rank in results])
        else:
            value = results[0][key]
            for rank in results[1:]:  # the processes agree to the last bit
                assert torch.equal(rank[key], value), f"{case} {key}: ranks differ"
        is_grad = name in ("hidden", "weight", "bias")
        assert value.dtype == (case.dtype if is_grad else statistics), key
        expected = exact[of]
        assert value.shape == expected.shape, (case, key)
        scale = exact["size"] if name == "loss" else None
        if wide and plain:
            eager = (plain if is_grad else wide)[of]
            if scale is None:
                scale = expected.abs().max().item() if expected.numel() else 0.0
            if name == "tangent":  # a difference of tangents of logits
                scale = 4 * scale
            dtype = case.dtype if is_grad else statistics
            oracle.assert_as_good_as_eager(
                value, expected, eager, dtype, f"{case} {key}", None if scale == 0 else 2 * scale
            )
            continue
        tolerance = 1e-5 if case.dtype == torch.float32 else 2e-14
        if scale is None:
            scale = expected.abs().max().item() if expected.numel() else 0.0
        error = oracle.max_error(value, expected)
        assert error <= tolerance * scale, f"{case} {key}: {error:.2e} of {scale:.2e}"


CASES = [
    Case(),
    Case(bias=True, options={"softcap": 3.0, "scale": 0.7}),
    Case(options={"softcap": 2.0, "scale": 3.0, "shift": 1}),
    Case(bias=True, options={"shift": 1}, shape=(5, 7)),
    Case(v=1),
    Case(v=3, bias=True, options={"softcap": 3.0}),  # empty shards of four, shards of one entry
    Case(v=5),  # DTensor's ceil-split of four: 2, 2, 1, 0
    Case(shape=(3, 0)),
    Case(shape=(0,), bias=True),
    Case(ignored=2.0, bias=True),
    Case(options={"ignore_index": 0}, v=9, bias=True),
    Case(options={"ignore_index": 7}, v=9, shape=(200,)),
    Case(shape=(600,), h=17, v=2100, std=3.0),  # several tiles and chunks
]


@pytest.mark.parametrize(("world", "form"), [(2, "dtensor"), (4, "dtensor"), (4, "group")])
@over_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_losses_gradients_and_tangents(world, form, backend, dtype):
    cases = [replace(case, dtype=dtype) for case in CASES]
    ranks = run_ranks(world, run_cases, cases, form, backend)
    for i, case in enumerate(cases):
        check(case, [rank[i] for rank in ranks], truth(case, torch.float64))


def run_cases(cases, form, backend):
    return [everything(case, form, backend) for case in cases]


@over_backends
@pytest.mark.parametrize(
    ("world", "dtype"), [(2, torch.bfloat16), (4, torch.bfloat16), (4, torch.float16)]
)
def test_sixteen_bits_by_the_error_rule(world, backend, dtype):
    cases = [replace(case, dtype=dtype) for case in CASES]
    ranks = run_ranks(world, run_cases, cases, "dtensor", backend)
    for i, case in enumerate(cases):
        check(case, [rank[i] for rank in ranks], truth(case, torch.float64))


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_triton_kernels():
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    options = {"softcap": 3.0, "scale": 0.7}
    cases = [Case(shape=(9,), v=41, dtype=x, bias=True, options=options) for x in dtypes]
    ranks = run_ranks(2, run_cases, cases, "dtensor", "triton")
    for i, case in enumerate(cases):
        check(case, [rank[i] for rank in ranks], truth(case, torch.float64))


def test_a_group_takes_shards_of_any_sizes():
    cases = [
        Case(sizes=(0, 100, 3, 0), bias=True),
        Case(sizes=(1, 1, 1, 100), options={"softcap": 4.0, "shift": 1}),
    ]
    ranks = run_ranks(4, run_cases, cases, "group", "auto")
    for i, case in enumerate(cases):
        check(case, [rank[i] for rank in ranks], truth(case, torch.float64))


# ------------------------------------------------------------------------------------- confidence


def confident(form, backend):
    """Labels of probability 1 - 1e-7 and closer, whose rivals live in any shard."""
    case = Case(v=300)
    hidden = torch.eye(5, 8).requires_grad_()
    weight = torch.zeros(300, 8)
    rows = torch.arange(5)
    target = torch.tensor([0, 80, 299, 150, 10])
    weight[target, rows] = torch.tensor([18.0, 25.0, 60.0, 30.0, 21.0])
    weight[11, 4] = 2.0  # a rival in the label's own shard
    weight[299, 3] = 5.0  # and one elsewhere
    tangent = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    shard = distributed(form, weight, case)
    kw = keywords(form, case, backend)
    out = {"inputs": (hidden.detach(), weight, target, tangent)}
    for kind, trained in (("frozen", False), ("trained", True)):
        leaf = shard.detach().requires_grad_(trained)
        nll = linear_nll(hidden, leaf, target, **kw)
        out[kind] = (nll.detach(), torch.autograd.grad(nll.sum(), hidden)[0])
    out["jvp"] = linear_nll_jvp(hidden.detach(), shard, target, tangent, **kw)
    return out


@worlds
@over_backends
def test_confident_tokens_keep_their_relative_accuracy(world, backend):
    for form in ("dtensor", "group"):
        out = run_ranks(world, confident, form, backend)[-1]
        hidden, weight, target, tangent = (
            x.double() if x.is_floating_point() else x for x in out["inputs"]
        )

        def truth(h, weight=weight, target=target):
            logits = h @ weight.T
            others = logits.scatter(1, target.unsqueeze(1), -torch.inf).logsumexp(1)
            return torch.log1p((others - logits.gather(1, target.unsqueeze(1)).squeeze(1)).exp())

        nll, exact_tangent = torch.func.jvp(truth, (hidden,), (tangent,))
        assert nll.max() < 1e-4
        assert nll.min() < 1e-20
        gradient = torch.func.grad(lambda h: truth(h).sum())(hidden)
        for kind in ("frozen", "trained"):
            close(out[kind][0], nll, 1e-5)
            close(out[kind][1], gradient, 1e-4)
        close(out["jvp"][0], nll, 1e-5)
        close(out["jvp"][1], exact_tangent, 1e-4)


def close(value, expected, rtol):
    torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=0)


@over_backends
def test_huge_logits(backend):
    cases = [
        Case(std=1e4, ignored=0.0),
        Case(std=1e4, dtype=torch.float64, bias=True),
    ]
    ranks = run_ranks(4, run_cases, cases, "dtensor", backend)
    for i, case in enumerate(cases):
        check(case, [rank[i] for rank in ranks], truth(case, torch.float64))


# ------------------------------------------------------------------------------------ collectives


class Collectives:
    """The calls of torch.distributed that communicate, as (name, dtype, elements)."""

    def __enter__(self):
        self.calls, self.patch = [], pytest.MonkeyPatch()
        self.patch.setattr(dist, "all_reduce", self.record("all_reduce", dist.all_reduce))
        from torch.distributed.tensor.debug import CommDebugMode

        self.debug = CommDebugMode()
        self.debug.__enter__()
        return self

    def record(self, name, function):
        def call(tensor, *args, **kwargs):
            self.calls.append((name, tensor.dtype, tensor.numel()))
            return function(tensor, *args, **kwargs)

        return call

    def __exit__(self, *_):
        self.debug.__exit__(None, None, None)
        self.patch.undo()
        assert self.debug.get_total_counts() == len(self.calls)  # and no other


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Which raw operators of the library ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vcore_kernels":
            self.names.append(func.name().split("::")[1])
        return func(*args, **(kwargs or {}))


def communication(form, backend, dtype, shape):
    case = Case(shape=shape, dtype=dtype, v=50, bias=True)
    t, kw = case.tensors(), keywords(form, case, backend)
    weight, bias = (distributed(form, t[name], case) for name in ("weight", "bias"))
    hidden = t["hidden"].requires_grad_()
    out = {}
    for kind, trained in (("frozen", False), ("trained", True)):
        leaves = [x.detach().requires_grad_(trained) for x in (weight, bias)]
        with Collectives() as forward, Operators() as operators:
            nll = linear_nll(hidden, leaves[0], t["target"], bias=leaves[1], **kw)
        with Collectives() as backward, operators:
            nll.sum().backward()
        out[kind] = (forward.calls, backward.calls, operators.names)
    leaf = weight.detach().requires_grad_()
    with Collectives() as forward:
        loss, _ = weighted_linear_nll(
            hidden.detach(), leaf, t["target"], t["factor"], bias=bias, **kw
        )
    with Collectives() as backward:
        loss.backward()
    out["head alone"] = (forward.calls, backward.calls, None)
    with Collectives() as forward:
        linear_nll_jvp(hidden.detach(), weight, t["target"], t["d_hidden"], bias=bias, **kw)
    out["jvp"] = (forward.calls, [], None)
    return out


@pytest.mark.parametrize("shape", [(6, 5), (0, 4)], ids=str)
@forms
def test_two_small_collectives_forward_and_one_backward(form, shape):
    n, dtype = shape[0] * shape[1], torch.bfloat16
    backend = "cpp" if backends()["cpp"] else "reference"
    sizes = [] if form == "dtensor" else [("all_reduce", torch.int64, 4)]
    small = [*sizes, *(("all_reduce", torch.float64, k * n) for k in (1, 3))]
    tangent = [*sizes, *(("all_reduce", torch.float64, k * n) for k in (1, 5))]
    gradient = [("all_reduce", torch.float32, n * 24)]
    for out in run_ranks(4, communication, form, backend, dtype, shape):
        assert out["frozen"][:2] == (small, gradient)
        assert out["trained"][:2] == (small, gradient)
        assert out["head alone"][:2] == (small, [])
        assert out["jvp"][0] == tangent
        if backend == "cpp":  # a frozen head keeps its rows: no second look at the logits
            assert out["frozen"][2] == ["linear_nll_forward"]
            assert out["trained"][2] == ["linear_nll_forward", "linear_nll_backward"]


def different_targets():
    rank = torch.distributed.get_rank()
    hidden, weight = torch.ones(3, 4), torch.ones(5, 4)
    for call in (
        lambda t: linear_nll(hidden, weight, t, group=torch.distributed.group.WORLD),
        lambda t: linear_nll_jvp(hidden, weight, t, hidden, group=torch.distributed.group.WORLD),
    ):
        with pytest.raises(ValueError, match="the processes of the group have different targets"):
            call(torch.tensor([1, 9 - 5 * rank, -100]))


def test_processes_with_other_batches_are_told_apart():
    """As the ranks of FSDP would be, whose weights look like vocabulary-parallel ones."""
    run_ranks(2, different_targets)


# --------------------------------------------------------------------- placements, autocast, modes


def placements(backend):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    case = Case(v=37, bias=True)
    t = case.tensors()
    out = {"inputs": t}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def run(mesh, placement, hidden_placement=None):
        head = [
            distribute_tensor(t[n], mesh, placement).requires_grad_() for n in ("weight", "bias")
        ]
        hidden, target = t["hidden"].clone().requires_grad_(), t["target"]
        if hidden_placement:
            hidden = distribute_tensor(hidden.detach(), mesh, hidden_placement).requires_grad_()
            target = distribute_tensor(target, mesh, hidden_placement)
        nll = linear_nll(hidden, head[0], target, bias=head[1], backend=backend)
        (nll * t["factor"]).sum().backward()
        assert type(nll) is torch.Tensor
        assert head[0].grad.placements == head[0].placements
        if hidden_placement:
            assert hidden.grad.placements == hidden.placements
        return nll.detach(), local(hidden.grad), *(x.grad.full_tensor() for x in head)

    both = [Replicate(), Replicate()]
    out["second"] = run(mesh, [Replicate(), Shard(0)], both)
    out["first"] = run(mesh, [Shard(0), Replicate()])
    out["slice"] = run(mesh["tp"], [Shard(0)])
    out["replicated"] = run(mesh, both, both)
    return out


@over_backends
def test_meshes_with_a_replicated_dimension_and_replicated_heads(backend):
    case = Case(v=37, bias=True)
    exact = truth(case, torch.float64)
    for out in run_ranks(4, placements, backend):
        for kind in ("second", "first", "slice", "replicated"):
            for value, name in zip(out[kind], ("nll", "hidden", "weight", "bias"), strict=True):
                error = oracle.max_error(value, exact[name])
                assert error <= 1e-5 * exact[name].abs().max().item(), (kind, name)


def under_autocast(form):
    case = Case(bias=True)
    t, kw = case.tensors(), keywords(form, case, "auto")
    head = [distributed(form, t[n], case).requires_grad_() for n in ("weight", "bias")]
    hidden = t["hidden"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        nll = linear_nll(hidden, head[0], t["target"], bias=head[1], **kw)
    (nll * t["factor"]).sum().backward()
    rounded = [t["hidden"].detach().bfloat16(), *(x.detach().bfloat16() for x in head)]
    other = linear_nll(rounded[0], rounded[1], t["target"], bias=rounded[2], **kw)
    return nll.detach(), other, hidden.grad, *(local(x.grad) for x in head)


@forms
def test_autocast_rounds_the_inputs_as_for_a_linear_layer(form):
    exact = truth(Case(bias=True), torch.float64)
    ranks = run_ranks(2, under_autocast, form)
    for nll, other, hidden, weight, bias in ranks:
        assert torch.equal(nll, other)
        assert {x.dtype for x in (hidden, weight, bias)} == {torch.float32}
        assert oracle.max_error(hidden, exact["hidden"]) < 0.02 * exact["hidden"].abs().max()
    weight = torch.cat([rank[3] for rank in ranks])
    assert oracle.max_error(weight, exact["weight"]) < 0.02 * exact["weight"].abs().max()


def forward_mode(backend):
    case = Case(v=30, bias=True, options={"softcap": 4.0})
    t, kw = case.tensors(), keywords("group", case, backend)
    names = ("weight", "bias", "d_weight", "d_bias")
    weight, bias, d_weight, d_bias = (distributed("group", t[n], case) for n in names)
    dtensor = distributed("dtensor", t["weight"], case)
    hidden, d_hidden, target = t["hidden"], t["d_hidden"], t["target"]

    def nll(h, w, b):
        return linear_nll(h, w, target, bias=b, **kw)

    def loss(h, w, b):
        return weighted_linear_nll(h, w, target, t["factor"], bias=b, **kw)[0]

    primals, tangents = (hidden, weight, bias), (d_hidden, d_weight, d_bias)
    out = {
        "explicit": linear_nll_jvp(
            hidden, weight, target, d_hidden, d_weight, bias=bias, bias_tangent=d_bias, **kw
        )
    }
    out["func"] = torch.func.jvp(nll, primals, tangents)
    out["weighted"] = torch.func.jvp(loss, primals, tangents)
    out["grad"] = torch.func.grad(lambda h: loss(h, weight, bias))(hidden)
    leaf = hidden.clone().requires_grad_()
    with fwAD.dual_level():
        duals = [fwAD.make_dual(*pair) for pair in zip(primals, tangents, strict=True)]
        out["dual"] = tuple(fwAD.unpack_dual(nll(*duals)))
        dual = linear_nll(fwAD.make_dual(leaf, d_hidden), dtensor, target, backend=backend)
        out["hidden alone"] = fwAD.unpack_dual(dual).tangent.detach()
        with pytest.raises(RuntimeError, match=r"second derivatives .*full_tensor"):
            torch.autograd.grad(fwAD.unpack_dual(dual).tangent.sum(), leaf)
    leaf.grad = None
    checkpointed = torch.utils.checkpoint.checkpoint(nll, leaf, weight, bias, use_reentrant=False)
    (checkpointed * t["factor"]).sum().backward()
    out["checkpointed"] = leaf.grad
    out["no weight"] = linear_nll_jvp(hidden, dtensor, target, d_hidden, backend=backend)[1]
    first = torch.autograd.grad(nll(leaf, weight, bias).square().sum(), leaf, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"second derivatives .*full_tensor"):
        torch.autograd.grad(first.sum(), leaf)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda h: linear_nll(h.unsqueeze(0), weight, target[:1, 0], **kw))(hidden[0])
    return out


@over_backends
def test_forward_mode_and_refused_second_derivatives(backend):
    case = Case(v=30, bias=True, options={"softcap": 4.0})
    exact, factor = truth(case, torch.float64), case.tensors()["factor"].double()
    for out in run_ranks(2, forward_mode, backend):
        for name in ("explicit", "func", "dual"):
            nll, tangent = out[name]
            assert oracle.max_error(nll, exact["nll"]) < 1e-5 * exact["nll"].max()
            scale = exact["tangent True"].abs().max()
            assert oracle.max_error(tangent, exact["tangent True"]) < 1e-5 * scale
        loss, tangent = out["weighted"]
        expected = (factor * exact["tangent True"]).sum()
        size = (factor * exact["tangent True"]).abs().sum()
        assert abs(loss - exact["loss"]) < 1e-5 * exact["size"]
        assert abs(tangent - expected) < 1e-5 * size
        assert oracle.max_error(out["grad"], exact["hidden"]) < 1e-5 * exact["hidden"].abs().max()
        assert torch.equal(out["checkpointed"], out["grad"])
        assert torch.equal(out["hidden alone"], out["no weight"])


def compiled():
    case = Case(v=30)
    t = case.tensors()
    weight = distributed("dtensor", t["weight"], case)
    function = torch.compile(lambda h: linear_nll(h * 2, weight, t["target"]) * 2, backend="eager")
    return function(t["hidden"]), linear_nll(t["hidden"] * 2, weight, t["target"]) * 2


def test_torch_compile_breaks_the_graph_and_is_right():
    for value, expected in run_ranks(2, compiled):
        assert torch.equal(value, expected)


# ---------------------------------------------------------------------------------------- hostile


def hostile(backend):
    case = Case(v=12, bias=True, ignored=0.0)
    t, kw = case.tensors(torch.float64), keywords("group", case, backend)
    out = {}
    target = t["target"] % 6
    bias = t["bias"].clone()
    bias[9:] = -torch.inf  # the whole last shard; and the first entry of each
    bias[[0, 3, 6]] = -torch.inf
    target[target % 3 == 0] += 1
    shards = [distributed("group", x, case) for x in (t["weight"], bias)]
    for trained in (True, False):
        hidden = t["hidden"].clone().requires_grad_()
        weight = shards[0].clone().requires_grad_(trained)
        nll = linear_nll(hidden, weight, target, bias=shards[1], **kw)
        nll.sum().backward()
        out[trained] = (nll.detach(), hidden.grad, weight.grad)
    out["tangent"] = linear_nll_jvp(
        t["hidden"], shards[0], target, t["d_hidden"], bias=shards[1], **kw
    )
    # a row without upstream gradient gives none, whatever it holds
    for trained in (True, False):
        hidden = t["hidden"].clone()
        hidden[0, 0] = torch.inf
        hidden.requires_grad_()
        weight = shards[0].clone().requires_grad_(trained)
        nll = linear_nll(hidden, weight, target, **kw)
        nll[1:].sum().backward()
        assert (hidden.grad[0] == 0).all()
        assert hidden.grad.isfinite().all()
        assert weight.grad is None or weight.grad.isfinite().all()
        # and a label of probability 0 costs infinitely much, as in one process
        masked = torch.full_like(target, 9)
        nll = linear_nll(t["hidden"], weight, masked, bias=shards[1], **kw)
        assert (nll == torch.inf).all()
    return out, (target, bias)


@over_backends
def test_masked_entries_and_rows_that_do_not_count(backend):
    case = Case(v=12, bias=True, ignored=0.0)
    t = case.tensors(torch.float64)
    ranks = run_ranks(4, hostile, backend)
    target, bias = ranks[0][1]
    hidden, weight = t["hidden"].requires_grad_(), t["weight"].requires_grad_()

    def nll_of(h):
        return oracle.head_nll(h.flatten(0, 1), weight, target.flatten(), bias).view_as(target)

    nll = nll_of(hidden)
    exact = torch.autograd.grad(nll.sum(), [hidden, weight])
    tangent = torch.func.jvp(nll_of, (hidden.detach(),), (t["d_hidden"],))[1].detach()
    for out, _ in ranks:
        for value, d_hidden, _ in (out[True], out[False]):
            assert oracle.max_error(value, nll) < 1e-12
            assert oracle.max_error(d_hidden, exact[0]) < 1e-12
        assert oracle.max_error(out["tangent"][0], nll) < 1e-12
        assert oracle.max_error(out["tangent"][1], tangent) < 1e-12
    d_weight = torch.cat([out[True][2] for out, _ in ranks])
    assert oracle.max_error(d_weight, exact[1]) < 1e-12


def mistakes():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    t, mesh = Case(v=12, bias=True).tensors(), the_mesh()
    hidden, target, d_hidden = t["hidden"], t["target"], t["d_hidden"]
    weight = distribute_tensor(t["weight"], mesh, [Shard(0)])

    def value_error(match, function, *args, **kw):
        with pytest.raises(ValueError, match=match):
            function(*args, **kw)

    columns = distribute_tensor(t["weight"], mesh, [Shard(1)])
    partial = DTensor.from_local(t["weight"], mesh, [Partial()])
    rows = distribute_tensor(hidden, mesh, [Shard(0)])
    outside = target.clone()
    outside[0, 0] = 12
    for function, rest in (
        (linear_nll, ()),
        (weighted_linear_nll, (t["factor"],)),
        (linear_nll_jvp, (d_hidden,)),
    ):
        args, op = (target, *rest), function.__name__
        value_error(
            rf"{op}: weight .*Shard\(dim=1\).*full_tensor", function, hidden, columns, *args
        )
        value_error(rf"{op}: weight .*Partial.*full_tensor", function, hidden, partial, *args)
        value_error(rf"{op}: hidden .*Redistribute", function, rows, weight, *args)
        value_error(
            f"{op}: weight is sharded.*bias is a plain",
            function,
            hidden,
            weight,
            *args,
            bias=t["bias"],
        )
        value_error(f"{op}: target 12 .*ulary of 12 ", function, hidden, weight, outside, *rest)
        world = {"group": dist.group.WORLD}
        value_error(f"{op}: group was given with", function, hidden, weight, *args, **world)
    value_error("linear_nll: weight has 24 col", linear_nll, hidden[..., :3], weight, target)

    twice = distribute_tensor(t["weight"], init_device_mesh("cpu", (1, 2)), [Shard(0), Shard(0)])
    value_error("expected Shard", linear_nll, hidden, twice, target)
    odd = DTensor.from_local(
        t["weight"][: 4 + 4 * dist.get_rank()],
        mesh,
        [Shard(0)],
        run_check=False,
        shape=torch.Size((12, 24)),
        stride=(24, 1),
    )
    value_error("shard of weight on rank . has . rows", linear_nll, hidden, odd, target)

    jvp = (linear_nll_jvp, hidden, weight, target, d_hidden)
    value_error("weight_tangent is a plain tensor", *jvp, t["d_weight"])
    bias = distribute_tensor(t["bias"], mesh, [Shard(0)])
    d_bias = distribute_tensor(t["d_bias"], mesh, [Replicate()])
    value_error("bias_tangent is .*Replicate", *jvp, bias=bias, bias_tangent=d_bias)
    short = t["factor"][:1]
    value_error("token_weight has shape", weighted_linear_nll, hidden, weight, target, short)
    with pytest.raises(TypeError, match="linear_nll_pair: weight is a DTensor"):
        linear_nll_pair(hidden, hidden, weight, target)

    alone = dist.new_group([0])
    if dist.get_rank() == 1:
        value_error("not in group", linear_nll, hidden, t["weight"], target, group=alone)
    else:  # a group of one has the whole head
        nll = linear_nll(hidden, t["weight"], target, group=alone)
        torch.testing.assert_close(nll, linear_nll(hidden, t["weight"], target))


def test_mistakes_raise_in_every_process():
    run_ranks(2, mistakes)


# --------------------------------------------------------------------------------------- training


def data():
    g = torch.Generator().manual_seed(3)
    inputs = torch.randn(6, 4, 9, 12, generator=g)
    target = torch.randint(0, 23, (6, 4, 9), generator=g)
    target[:, :, :2] = -100
    return inputs, target, torch.rand(6, 4, 9, generator=g)


def train(optimizer, form):
    """Six steps of a layer and its head; VCORE weights from the head's own tangents."""
    torch.manual_seed(5)
    layer = torch.nn.Linear(12, 16)
    weight, bias = torch.randn(23, 16) / 4, torch.randn(23) / 4
    case = Case(v=23)
    if form:
        weight, bias = (distributed(form, x, case) for x in (weight, bias))
    kw = keywords(form, case, "auto") if form else {}
    weight, bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    parameters = [*layer.parameters(), weight, bias]
    step = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.3, momentum=0.9),
        "adam": lambda: torch.optim.Adam(parameters, lr=1e-2, eps=1e-4, foreach=False),
    }[optimizer]()
    all_weights = []
    for x, target, factor in zip(*data(), strict=True):
        hidden = layer(x).tanh()
        with torch.no_grad():
            _, utility = linear_nll_jvp(
                hidden,
                weight.detach(),
                target,
                hidden.roll(1, -1),
                bias=bias.detach(),
                shift=1,
                **kw,
            )
            q = gibbs_weights(utility, mask=target != -100, kl_budget=0.05).q
        all_weights.append(q)
        loss, _ = weighted_linear_nll(hidden, weight, target, q / 28, bias=bias, shift=1, **kw)
        late = linear_nll(hidden, weight, target, bias=bias, **kw)
        loss = loss + (late * factor).mean()
        step.zero_grad()
        loss.backward()
        step.step()
    return (
        [x.detach() for x in layer.parameters()],
        [local(x).detach() for x in (weight, bias)],
        all_weights,
    )


@worlds
@pytest.mark.parametrize(("optimizer", "form"), [("sgd", "group"), ("adam", "dtensor")])
def test_training_gives_the_parameters_of_one_process(world, optimizer, form):
    layer, head, weights = train(optimizer, None)
    assert torch.stack(weights).std() > 0.05  # not uniform
    ranks = run_ranks(world, train, optimizer, form)
    for rank in ranks:
        for a, b in zip(rank[0] + rank[2], layer + weights, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for i, expected in enumerate(head):
        torch.testing.assert_close(
            torch.cat([rank[1][i] for rank in ranks]), expected, rtol=1e-5, atol=1e-5
        )
