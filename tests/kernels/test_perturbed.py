"""perturbed, perturb_ and restore_: same bits from every backend, exact restore, refusals."""

import gc
import importlib
import math
import warnings

import pytest
import torch

from vcore_kernels import (
    NonFiniteDirectionError,
    StalledPerturbationWarning,
    free_backup_buffers,
    perturb_,
    perturbed,
    restore_,
)
from vcore_kernels.backends import last_used

module = importlib.import_module(
    "vcore_kernels.perturbed"
)  # the package's attribute is the function
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BITS = {torch.float64: torch.int64, torch.float32: torch.int32}
ROUNDINGS = [(dtype, "nearest") for dtype in DTYPES] + [(d, "stochastic") for d in DTYPES[:3]]
SIZES = [1, 63, 1023, 1024, 1025, 32 * 1024 + 17, 100_003]


@pytest.fixture
def backend(perturb_backend):
    return perturb_backend


def bits(tensor):
    return tensor.detach().view(BITS.get(tensor.dtype, torch.int16)).clone()


def some_params(dtype, sizes=(3, 1, 1025, 4096 * 5 + 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(size, generator=generator, device="cpu") for size in sizes]
    return [p.to(torch.get_default_device(), dtype) for p in params]


def every_bit_pattern(dtype):
    """All values of a 16-bit dtype, else special ones and their neighbours; NaN payloads too."""
    if dtype in (torch.bfloat16, torch.float16):
        return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    width = BITS[dtype]
    exponents = torch.arange(0, 256 if dtype == torch.float32 else 2048, dtype=width)
    shift = 23 if dtype == torch.float32 else 52
    mantissas = torch.tensor([0, 1, 2, 5, (1 << shift) - 1, 1 << (shift - 1)], dtype=width)
    positive = ((exponents << shift)[:, None] | mantissas).flatten()
    return torch.cat([positive, positive | torch.iinfo(width).min]).view(dtype)


# ---- what it computes ----


@pytest.mark.parametrize("g_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_moves_by_a_step_formed_in_fp32_and_rounded_once(dtype, g_dtype, backend):
    params = some_params(dtype)
    direction = some_params(g_dtype, seed=1)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    expected = [
        (p.to(acc) - g.to(acc) * 0.37).to(dtype) for p, g in zip(params, direction, strict=True)
    ]
    before, kept = [bits(p) for p in params], [bits(g) for g in direction]
    with perturbed(params, direction, 0.37, backend=backend):
        for p, want in zip(params, expected, strict=True):
            assert torch.equal(p, want)
        assert last_used["perturb_"] == backend
    assert all(torch.equal(bits(p), b) for p, b in zip(params, before, strict=True))
    assert all(torch.equal(bits(g), b) for g, b in zip(direction, kept, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_step_is_within_rounding_of_float64(dtype, backend):
    p, g = torch.randn(5000).to(dtype), torch.randn(5000).to(dtype)
    truth = p.double() - 0.01 * g.double()
    with perturbed([p], [g], 0.01, backend=backend):
        ulp = torch.finfo(dtype).eps * truth.abs().clamp_min(torch.finfo(dtype).tiny)
        step_error = torch.finfo(torch.float32).eps * (0.01 * g.double()).abs()
        assert ((p.double() - truth).abs() <= 0.5 * ulp * 1.01 + step_error).all()


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "rounding"), ROUNDINGS)
def test_backends_give_the_same_bits(dtype, size, rounding, consume, backend):
    results = []
    for name in ("reference", backend):
        params, direction = (some_params(dtype, (size, 5), s) for s in (0, 1))
        generator = torch.Generator().manual_seed(7)
        with perturbed(
            params,
            direction,
            0.1,
            rounding=rounding,
            consume_direction=consume,
            generator=generator,
            backend=name,
        ) as perturbation:
            results.append(([bits(p) for p in params], perturbation.stalled))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(a, b)
    assert results[0][1] == results[1][1]


@pytest.mark.filterwarnings("ignore::vcore_kernels.StalledPerturbationWarning")
@pytest.mark.parametrize(("dtype", "rounding"), ROUNDINGS)
def test_backends_agree_on_every_bit_pattern(dtype, rounding, backend):
    theta = every_bit_pattern(dtype)
    results = []
    for name in ("reference", backend):
        p = theta.clone()
        g = p.nan_to_num(0.0, 1.0, -1.0).flip(0).contiguous()
        generator = torch.Generator().manual_seed(2)
        with perturbed([p], [g], 1e-3, rounding=rounding, generator=generator, backend=name):
            results.append(p.clone())
        assert torch.equal(bits(p), bits(theta))
    assert torch.equal(results[0].isnan(), results[1].isnan())
    assert torch.equal(bits(results[0].nan_to_num()), bits(results[1].nan_to_num()))


@pytest.mark.parametrize("g_dtype", DTYPES)
@pytest.mark.parametrize(("dtype", "rounding"), ROUNDINGS)
def test_counts_and_saved_bits_of_the_kernels(dtype, g_dtype, rounding, backend):
    """The operators themselves, on tensors at odd places in memory as well."""
    results = []
    for name in ("reference", backend):
        kernels = module._kernels(name)
        params = some_params(dtype, (5000, 1024, 3, 40_000, 1025))
        params[1], params[3] = params[1][1:], params[3][1:]
        direction = some_params(g_dtype, [p.numel() for p in params], seed=1)
        direction[0][::3] = 0
        direction[3][7] = math.nan
        direction[4] *= 1e-7
        before = [bits(p) for p in params]
        saved = [torch.zeros(p.nbytes + 64, dtype=torch.uint8) for p in params]
        counts = torch.full((5, 3), -1)
        kernels.perturb_(
            params, direction, saved, 0.1, 9 if rounding == "stochastic" else None, counts
        )
        counts[:, 2] = counts[:, 2] != 0
        for b, keep in zip(before, saved, strict=True):
            assert torch.equal(keep[: b.nbytes], b.view(torch.uint8))
            assert not keep[b.nbytes :].any()
        results.append((counts.cpu(), [p.nan_to_num(1e3) for p in params]))
        kernels.restore_(params, saved)
        assert all(torch.equal(bits(p), b) for p, b in zip(params, before, strict=True))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(bits(a), bits(b))
    assert results[0][0][0, 0] == 5000 - 1667


# ---- restore ----


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_restores_every_bit_pattern(dtype, consume, backend):
    p = every_bit_pattern(dtype)
    before = bits(p)
    g = torch.ones_like(p)
    with perturbed([p], [g], 0.5, consume_direction=consume, backend=backend):
        assert not torch.equal(bits(p), before)
    assert torch.equal(bits(p), before)


def test_restores_when_the_body_raises_or_writes(backend):
    params, direction = some_params(torch.bfloat16), some_params(torch.bfloat16, seed=1)
    before = [bits(p) for p in params]

    def body():
        with perturbed(params, direction, 0.1, backend=backend):
            params[0].zero_()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        body()
    assert all(torch.equal(bits(p), b) for p, b in zip(params, before, strict=True))
    with perturbed(params, direction, 0.1, backend=backend):
        pass  # and the tensors are free again


def test_perturb_and_restore_without_the_context(backend):
    params, direction = some_params(torch.float32), some_params(torch.float32, seed=1)
    before = [p.clone() for p in params]
    perturbation = perturb_(params, direction, 0.1, backend=backend)
    assert not torch.equal(params[2], before[2])
    restore_(perturbation)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    with pytest.raises(RuntimeError, match="restored already"):
        restore_(perturbation)


def test_restoring_inside_the_block_is_enough(backend):
    p = torch.ones(5)
    with perturbed([p], [torch.ones(5)], 0.5, backend=backend) as perturbation:
        restore_(perturbation)
        p.add_(1)
    assert torch.equal(p, torch.full((5,), 2.0))


def test_replaced_storage_is_reported_and_the_rest_restored(backend):
    params = [torch.ones(4), torch.ones(4)]
    with (
        pytest.raises(RuntimeError, match=r"storage of parameters \[0\] was replaced"),
        perturbed(params, [torch.ones(4), torch.ones(4)], 0.5, backend=backend),
    ):
        params[0].data = torch.zeros(4)
    assert torch.equal(params[1], torch.ones(4))


def test_consumed_direction_holds_the_old_values_and_no_memory_is_taken(backend):
    free_backup_buffers()
    p, g = torch.randn(5000), torch.randn(5000)
    before = p.clone()
    with perturbed([p], [g], 0.1, consume_direction=True, backend=backend) as perturbation:
        assert torch.equal(g, before)
        assert perturbation.buffers == []
    assert torch.equal(p, before)
    assert not module._free_buffers


def test_one_backup_buffer_is_used_again_and_can_be_freed(backend):
    free_backup_buffers()
    p, g = torch.randn(5000), torch.randn(5000)
    addresses = set()
    for size in (5000, 5000, 1000):
        with perturbed([p[:size]], [g[:size]], 0.1, backend=backend) as perturbation:
            addresses.add(perturbation.buffers[0].data_ptr())
    assert len(addresses) == 1
    assert len(module._free_buffers) == 1
    free_backup_buffers()
    assert not module._free_buffers


def test_dropping_the_perturbation_makes_the_move_permanent(backend):
    p = torch.ones(5)
    perturb_([p], [torch.ones(5)], 0.5, backend=backend)
    gc.collect()
    assert torch.equal(p, torch.full((5,), 0.5))
    with perturbed([p], [torch.ones(5)], 0.25, backend=backend):
        assert torch.equal(p, torch.full((5,), 0.25))
    assert torch.equal(p, torch.full((5,), 0.5))


# ---- shapes, layouts, ties ----


def test_empty_lists_and_empty_tensors(backend):
    with perturbed([], [], 0.1, backend=backend):
        pass
    params = [torch.empty(0), torch.ones(()), torch.empty(3, 0), torch.ones(1)]
    with perturbed(params, [torch.ones_like(p) for p in params], 0.5, backend=backend):
        assert params[1].item() == params[3].item() == 0.5
    with perturbed([torch.empty(0)], [torch.empty(0)], 0.5, backend=backend):
        pass


def test_many_small_tensors_beside_a_large_one(backend):
    params = [torch.full((n % 7 + 1,), float(n)) for n in range(500)] + [torch.zeros(200_001)]
    before = [p.clone() for p in params]
    with perturbed(params, [torch.ones_like(p) for p in params], 1.0, backend=backend):
        for p, b in zip(params, before, strict=True):
            assert torch.equal(p, b - 1)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_large_enough_for_streaming_stores_at_odd_alignment(backend):
    storage, g = torch.randn(3_000_001), torch.randn(3_000_001)
    before = storage.clone()
    with perturbed([storage[1:]], [g[1:]], 0.1, backend=backend):
        assert torch.equal(storage[1:], before[1:] - g[1:] * 0.1)
        assert storage[0] == before[0]
    assert torch.equal(storage, before)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_permuted_parameters_and_directions(backend, rounding):
    p = torch.randn(40, 70).t()
    before = p.clone()
    for g in (torch.randn(40, 70).t(), torch.randn(70, 40), torch.randn(70, 80)[:, ::2]):
        with perturbed([p], [g], 1.0, rounding=rounding, backend=backend):
            torch.testing.assert_close(p, before - g)
        assert torch.equal(p, before)


def test_channels_last(backend):
    p = torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last)
    g, before = torch.randn(2, 3, 5, 7), p.clone()
    with perturbed([p], [g], 1.0, backend=backend):
        assert torch.equal(p, before - g)
    assert torch.equal(p, before)


@pytest.mark.parametrize(
    "make", [lambda: torch.randn(10, 4)[:, :2], lambda: torch.randn(4, 1).expand(4, 3)]
)
def test_view_with_gaps_or_overlaps_is_refused(make, backend):
    p = make()
    with pytest.raises(ValueError, match=r"params\[0\].*gaps or overlaps"):
        perturb_([p], [torch.ones(p.shape)], 0.1, backend=backend)


@pytest.mark.parametrize("consume", [False, True])
def test_tied_tensors_move_once(backend, consume):
    p = torch.ones(2000)
    tied = p.view(2000)
    g = torch.ones(2000)
    for other in (g, g.clone()):
        with perturbed([p, tied], [g, other], 0.25, consume_direction=consume, backend=backend):
            assert torch.equal(p, torch.full((2000,), 0.75))
        assert torch.equal(p, torch.ones(2000))
        g.fill_(1)
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] are tied.*differ"):
        perturb_([p, tied], [g, 2 * g], 0.25, backend=backend)


def test_partly_shared_memory_is_refused(backend):
    p = torch.ones(100)
    ones = torch.ones(60)
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] share part"):
        perturb_([p[:60], p[40:]], [ones, ones.clone()], 0.1, backend=backend)
    with pytest.raises(ValueError, match="share part of their memory"):
        perturb_([p], [p.view(100)], 0.1, backend=backend)
    with pytest.raises(ValueError, match=r"direction\[0\] and direction\[1\] share part"):
        perturb_(
            [p[:50], p[50:]], [ones[:50], ones[10:]], 0.1, consume_direction=True, backend=backend
        )
    with perturbed([p[:50], p[50:]], [ones[:50], ones[10:]], 0.5, backend=backend):
        assert torch.equal(p, torch.full((100,), 0.5))


# ---- autograd ----


def test_autograd_sees_the_write(backend):
    p = torch.nn.Parameter(torch.ones(3))
    x = torch.ones(3, requires_grad=True)
    loss = (p * x).sum()
    with perturbed([p], [torch.ones(3)], 0.5, backend=backend):
        assert p.requires_grad
        assert p.is_leaf
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # p is back, but autograd cannot know that


@pytest.mark.parametrize("consume", [False, True])
def test_version_counters(backend, consume):
    p, g = torch.ones(3), torch.ones(3)
    versions = p._version, g._version
    perturbation = perturb_([p], [g], 0.5, consume_direction=consume, backend=backend)
    assert p._version > versions[0]
    assert (g._version > versions[1]) == consume
    middle = p._version
    restore_(perturbation)
    assert p._version > middle


def test_gradients_inside_the_block_are_those_at_the_perturbed_point(backend):
    p = torch.nn.Parameter(torch.tensor([3.0]))
    with perturbed([p], [torch.tensor([1.0])], 1.0, backend=backend):
        (p**2).sum().backward()
    assert p.grad.item() == 4.0
    assert p.item() == 3.0


def test_inference_mode_leaves_a_buffer_usable_outside(backend):
    free_backup_buffers()
    p, g = torch.ones(2000), torch.ones(2000)
    with torch.inference_mode(), perturbed([p], [g], 0.5, backend=backend):
        assert p[0] == 0.5
    with perturbed([p], [g], 0.5, backend=backend):
        assert p[0] == 0.5
    assert p[0] == 1


# ---- stochastic rounding ----


@pytest.mark.parametrize(
    ("dtype", "theta", "step"),
    [
        (
            torch.bfloat16,
            1.0,
            2.0**-10,
        ),  # an eighth of the spacing 2**-7 (below 1: a quarter of 2**-8)
        (torch.bfloat16, -0.75, 2.0**-11),
        (torch.bfloat16, 1e-39, 3e-41),  # subnormal
        (torch.float16, 1.5, 2.0**-13),
        (torch.float16, 3e-5, 1e-8),  # subnormal: spacing 6e-8
        (torch.float32, 1.5, 2.0**-26),
        (torch.float32, 1e-39, 3e-46),
    ],
)
def test_stochastic_rounding_is_unbiased(dtype, theta, step, backend):
    n = 200_000
    p = torch.full((n,), theta).to(dtype)
    start = p[0].double()
    g = torch.ones(n, dtype=torch.float64 if dtype == torch.float32 else torch.float32)
    epsilon, g = (step, g) if step > 1e-30 else (1e-30, g * (step / 1e-30))
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    want = (start.to(wide) - (g[0].to(wide) * epsilon)).double()
    generator = torch.Generator().manual_seed(11)
    with perturbed([p], [g], epsilon, rounding="stochastic", generator=generator, backend=backend):
        values = p.double().unique()
        assert len(values) == 2  # the two neighbours of the exact result
        low, high = values.tolist()
        assert low < want.item() < high
        chance = (want.item() - low) / (high - low)
        z = ((p.double() == high).double().mean().item() - chance) / math.sqrt(
            chance * (1 - chance) / n
        )
    assert abs(z) < 4.5


def test_stochastic_rounding_moves_what_nearest_does_not(backend):
    p, g = torch.ones(10_000, dtype=torch.bfloat16), torch.ones(10_000)
    with pytest.warns(StalledPerturbationWarning, match="100%"):
        perturbation = perturb_([p], [g], 1e-4, backend=backend)
    assert perturbation.stalled == 1
    assert (p == 1).all()
    restore_(perturbation)
    with perturbed([p], [g], 1e-4, rounding="stochastic", backend=backend) as moved:
        assert 0.9 < moved.stalled < 1
        assert 0 < (p != 1).sum() < 1000


def test_stochastic_rounding_leaves_exact_results_alone(backend):
    p = torch.randn(5000).bfloat16()
    before = p.clone()
    with perturbed([p], [torch.zeros(5000)], 1.0, rounding="stochastic", backend=backend):
        assert torch.equal(p, before)


def test_stochastic_rounding_is_reproducible(backend):
    def draw(generator):
        p, g = torch.ones(3000, dtype=torch.bfloat16), torch.ones(3000)
        with perturbed([p], [g], 1e-3, rounding="stochastic", generator=generator, backend=backend):
            return p.clone()

    first = draw(torch.Generator().manual_seed(1))
    assert torch.equal(first, draw(torch.Generator().manual_seed(1)))
    assert not torch.equal(first, draw(torch.Generator().manual_seed(2)))
    torch.manual_seed(1)
    assert torch.equal(first, draw(None))
    state = torch.get_rng_state()
    p = torch.ones(10)
    with perturbed([p], [p.clone()], 0.1, backend=backend):
        pass
    assert torch.equal(state, torch.get_rng_state())  # nearest rounding draws nothing


def test_random_bits_differ_between_tensors_and_blocks(backend):
    params = [torch.ones(4096, dtype=torch.bfloat16) for _ in range(2)]
    with perturbed(params, [torch.ones(4096)] * 2, 2e-3, rounding="stochastic", backend=backend):
        rows = torch.stack([part for p in params for part in p.float().view(4, 1024)])
    moved = (rows != 1).double()
    agreement = torch.corrcoef(moved) - torch.eye(8)
    assert agreement.abs().max() < 5 / math.sqrt(1024)


def test_result_does_not_depend_on_the_number_of_threads(backend):
    def draw(threads):
        torch.set_num_threads(threads)
        params = [torch.ones(300_001, dtype=torch.bfloat16), torch.ones(70_000)]
        generator = torch.Generator().manual_seed(5)
        direction = [torch.ones_like(p) for p in params]
        options = {"rounding": "stochastic", "generator": generator, "backend": backend}
        with perturbed(params, direction, 1e-3, **options):
            return [bits(p) for p in params]

    threads = torch.get_num_threads()
    try:
        for one, three in zip(draw(1), draw(3), strict=True):
            assert torch.equal(one, three)
    finally:
        torch.set_num_threads(threads)


# ---- warnings and errors ----


def test_warns_only_when_most_entries_stall(backend):
    p = torch.ones(100, dtype=torch.bfloat16)
    g = torch.full((100,), 1e-6)
    g[:60] = 1.0
    with perturbed([p], [g], 0.1, backend=backend) as moved:
        assert moved.stalled == pytest.approx(0.4)
    with perturbed([p], [torch.zeros(100)], 0.1, backend=backend) as moved:
        assert moved.stalled == 0  # no step was asked for
    g[:60] = 1e-6
    with pytest.warns(StalledPerturbationWarning, match="100%.*stochastic"):
        restore_(perturb_([p], [g], 0.1, backend=backend))


def test_warning_turned_into_an_error_restores(backend):
    p, g = torch.ones(10, dtype=torch.bfloat16), torch.full((10,), 1e-6)
    g[0] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(StalledPerturbationWarning):
            perturb_([p], [g], 0.1, backend=backend)
    assert torch.equal(p, torch.ones(10, dtype=torch.bfloat16))
    with pytest.warns(StalledPerturbationWarning):
        restore_(perturb_([p], [g], 0.1, backend=backend))


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_direction_leaves_the_parameters(dtype, bad, consume, backend):
    params, direction = some_params(dtype), some_params(dtype, seed=1)
    before = [bits(p) for p in params]
    direction[2][-1] = bad
    with pytest.raises(NonFiniteDirectionError, match=r"1 of 4 parameters.*\[1025\]"):
        perturb_(params, direction, 0.1, consume_direction=consume, backend=backend)
    assert all(torch.equal(bits(p), b) for p, b in zip(params, before, strict=True))
    with perturbed(params, some_params(dtype, seed=1), 0.1, backend=backend):
        pass  # the tensors are free again


@pytest.mark.parametrize("consume", [False, True])
def test_refuses_to_nest_on_the_same_memory(backend, consume):
    p, other = torch.ones(100), torch.ones(10)
    g = torch.ones(100)
    with perturbed([p], [g], 0.5, consume_direction=consume, backend=backend):
        with pytest.raises(RuntimeError, match=r"params\[0\] is perturbed already"):
            perturb_([p[20:30]], [torch.ones(10)], 0.5, backend=backend)
        if consume:
            with pytest.raises(RuntimeError, match="is perturbed already"):
                perturb_([other], [g[:10]], 0.5, backend=backend)
        with perturbed([other], [torch.ones(10)], 0.25, backend=backend):
            assert torch.equal(other, torch.full((10,), 0.75))
            assert torch.equal(p, torch.full((100,), 0.5))
        assert torch.equal(other, torch.ones(10))
    assert torch.equal(p, torch.ones(100))


@pytest.mark.parametrize("epsilon", [0, -1e-3, math.nan, math.inf, 1e-50])
def test_epsilon_must_be_positive_and_finite(epsilon):
    with pytest.raises(ValueError, match="epsilon must be positive"):
        perturb_([torch.ones(2)], [torch.ones(2)], epsilon)


@pytest.mark.parametrize(
    ("params", "direction", "error", "message"),
    [
        ([torch.ones(2)], [], ValueError, "1 params but 0 tensors in direction"),
        ([torch.ones(2)], [torch.ones(3)], ValueError, r"direction\[0\] has shape \[3\]"),
        ([torch.ones(2)], [None], TypeError, r"direction\[0\] is NoneType.*Leave parameters"),
        ({"w": torch.ones(2)}, [torch.ones(2)], TypeError, r"params\[0\] is str"),
        ([torch.ones(2).to(torch.uint8)], [torch.ones(2)], TypeError, "uint8.*quantised"),
        ([torch.ones(2).to(torch.float8_e4m3fn)], [torch.ones(2)], TypeError, "float8"),
        ([torch.ones(2).to_sparse()], [torch.ones(2)], TypeError, "sparse"),
        ([torch.ones(2)], [torch.ones(2, device="meta")], ValueError, "on meta, params"),
    ],
)
def test_arguments_that_do_not_fit(params, direction, error, message):
    with pytest.raises(error, match=message):
        perturb_(params, direction, 0.1)


def test_other_errors():
    p = torch.ones(2)
    with pytest.raises(ValueError, match="rounding must be 'nearest' or 'stochastic', got 'up'"):
        perturb_([p], [p.clone()], 0.1, rounding="up")
    with pytest.raises(TypeError, match="float64, which rounding='stochastic' does not serve"):
        perturb_([p.double()], [p], 0.1, rounding="stochastic")
    with pytest.raises(ValueError, match=r"must have the dtype and strides of params\[0\]"):
        perturb_([p], [p.double()], 0.1, consume_direction=True)
    with pytest.raises(ValueError, match=r"must have the dtype and strides of params\[0\]"):
        perturb_([torch.ones(2, 3)], [torch.ones(3, 2).t()], 0.1, consume_direction=True)
    assert torch.equal(p, torch.ones(2))


def test_operators_pass_opcheck(backend):
    if backend == "reference":
        pytest.skip("the reference is no operator")
    ops = torch.ops.vcore_kernels
    p, g, saved = torch.ones(70), torch.ones(70), torch.empty(320, dtype=torch.uint8)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    counts = torch.zeros(1, 3, dtype=torch.int64)
    torch.library.opcheck(ops.perturb_, ([p], [g], [saved], 0.5, None, counts), test_utils=checks)
    torch.library.opcheck(ops.perturb_swap_, ([p], [g], 0.5, 3, counts), test_utils=checks)
    with pytest.raises(ValueError, match="counts must be"):
        ops.perturb_([p], [g], [saved], 0.5, None, counts[:0])
    torch.library.opcheck(ops.restore_, ([p], [g]), test_utils=checks)


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("entry", [perturb_, perturbed])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_around_the_move_restores(monkeypatch, backend, consume, entry, when):
    """Ctrl-C is raised where the operator returns to Python, with everything moved already."""
    module = importlib.import_module("vcore_kernels.perturbed")
    move = module._move

    def interrupted(*args):
        if when == "after":
            move(*args)
        raise KeyboardInterrupt

    params, direction = [torch.randn(300), torch.randn(7)], [torch.ones(300), torch.ones(7)]
    before = [p.clone() for p in params]
    monkeypatch.setattr(module, "_move", interrupted)
    options = {"backend": backend, "consume_direction": consume}

    def call():
        if entry is perturb_:
            return perturb_(params, direction, 0.1, **options)
        with perturbed(params, direction, 0.1, **options):
            return pytest.fail("the body must not run")

    with pytest.raises(KeyboardInterrupt):
        call()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    monkeypatch.undo()
    with perturbed(params, [torch.ones(300), torch.ones(7)], 0.1, **options):  # nothing is held
        assert not torch.equal(params[0], before[0])


def test_an_interrupt_between_tensors_restores_those_that_moved(monkeypatch):
    module = importlib.import_module("vcore_kernels.backends.reference_perturb")
    one, calls = module._perturb_one, []

    def second_is_interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        one(*args)

    monkeypatch.setattr(module, "_perturb_one", second_is_interrupted)
    params = [torch.randn(5), torch.randn(6), torch.randn(7)]
    before = [p.clone() for p in params]
    with pytest.raises(KeyboardInterrupt):
        perturb_(params, [torch.ones_like(p) for p in params], 0.1, backend="reference")
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_the_stalled_warning_names_the_caller():
    param, direction = torch.full((100,), 1.0).bfloat16(), torch.ones(100)
    with pytest.warns(StalledPerturbationWarning) as caught, perturbed([param], [direction], 1e-6):
        pass
    assert caught[0].filename == __file__
    with pytest.warns(StalledPerturbationWarning) as caught:
        restore_(perturb_([param], [direction], 1e-6))
    assert caught[0].filename == __file__


def test_a_dimension_of_one_has_no_stride():
    param = torch.randn(1, 5)
    direction = torch.ones(5, 1).t()
    direction = direction.as_strided((1, 5), (1, 1))
    before = param.clone()
    with perturbed([param], [direction], 0.5, consume_direction=True):
        torch.testing.assert_close(param, before - 0.5)
    assert torch.equal(param, before)


def test_tied_parameters_with_nan_in_their_direction():
    param = torch.ones(3)
    direction = torch.tensor([1.0, torch.nan, 1.0])
    with pytest.raises(NonFiniteDirectionError):
        perturb_([param, param], [direction, direction.clone()], 0.1)
    assert torch.equal(param, torch.ones(3))
