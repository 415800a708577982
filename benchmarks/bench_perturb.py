"""In-place perturbation of 50M parameters beside what PyTorch has for it.

    python -m pytest benchmarks/bench_perturb.py --benchmark-only

The unit is one ``torch._foreach_add_`` in the same round, which moves the parameters and cannot
move them back. *% of ceiling* counts the bytes that the subject must move once: a perturbation
reads theta and g and writes theta and the old values (4 x the parameters), a restore reads and
writes (2 x), clone + add + copy back is 2 + 3 + 2 = 7 x. Memory is that of a first call: the backup
is kept for later ones.
"""

import functools

import pytest
import torch
from torch import Tensor
from vcore_train.bench_record import Row

from benchmarks.measure import Call
from benchmarks.suite import Bench
from vcore_kernels import free_backup_buffers, perturb_, restore_

PARAMETERS, QUICK_PARAMETERS = 50_000_000, 20_000
EPSILON = 1e-2
UNIT = "_foreach_add_"
# Bytes moved, in units of the bytes of the parameters.
MOVED = {
    "perturb_ and restore_": 6,
    "perturb_ and restore_, consume": 6,
    "perturb_ and restore_, stochastic": 6,
    "clone + add + copy back": 7,
}


class Parameters:
    """One tensor, or 400 of growing size as in a model."""

    def __init__(self, dtype: torch.dtype, layout: str, count: int, device: torch.device):
        step = count // 80_000 or 1
        sizes = [count] if layout == "one" else [n * step + 1 for n in range(400)]
        generator = torch.Generator().manual_seed(0)
        block = torch.randn(1 << 20, generator=generator).to(device, dtype)

        def make() -> list[Tensor]:
            return [block.repeat(-(-size // block.numel()))[:size].clone() for size in sizes]

        self.params, self.direction = make(), make()
        self.before = [p.clone() for p in self.params]
        self.pristine = [d.clone() for d in self.direction]
        self.bytes = sum(p.nbytes for p in self.params)

    def reset(self) -> None:
        torch._foreach_copy_(self.params, self.before)
        torch._foreach_copy_(self.direction, self.pristine)

    def call(self, name: str) -> Call:
        """Moved there and back; returns nothing that counts as memory."""
        if name == "clone + add + copy back":

            def copies() -> None:
                backup = [p.clone() for p in self.params]
                self.add()
                torch._foreach_copy_(self.params, backup)

            return copies
        options = {
            "consume": {"consume_direction": True},
            "stochastic": {"rounding": "stochastic"},
        }.get(name.split(", ")[-1], {})

        def perturbed() -> None:
            restore_(perturb_(self.params, self.direction, EPSILON, **options))

        return perturbed

    def add(self) -> None:
        torch._foreach_add_(self.params, self.direction, alpha=-EPSILON)

    def check(self, name: str) -> str:
        """Moved as PyTorch moves it, and restored bit for bit."""
        if name == "perturb_ and restore_, stochastic":
            self.reset()
            self.call(name)()
        assert all(torch.equal(p, b) for p, b in zip(self.params, self.before, strict=True)), (
            "not restored"
        )
        if "perturb_" not in name or "stochastic" in name:
            return "restored bit for bit"
        self.reset()
        perturbation = perturb_(
            self.params, self.direction, EPSILON, consume_direction="consume" in name
        )
        acc = torch.promote_types(self.params[0].dtype, torch.float32)
        for p, b, d in zip(self.params, self.before, self.pristine, strict=True):
            assert torch.equal(p, (b.to(acc) - d.to(acc) * EPSILON).to(p.dtype)), "moved wrongly"
        restore_(perturbation)
        self.reset()
        return "exact, restored bit for bit"


@functools.lru_cache(maxsize=1)
def parameters(dtype: torch.dtype, layout: str, count: int, device: torch.device) -> Parameters:
    free_backup_buffers()
    return Parameters(dtype, layout, count, device)


@pytest.mark.parametrize("name", [pytest.param(n, id=n.replace(" ", "_")) for n in MOVED])
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        pytest.param(torch.float32, "one", id="float32-one"),
        pytest.param(torch.float32, "many", id="float32-many"),
        pytest.param(torch.bfloat16, "many", id="bfloat16-many"),
    ],
)
def test_perturb(bench: Bench, device, quick, dtype, layout, name):
    count = QUICK_PARAMETERS if quick else PARAMETERS
    subject = parameters(dtype, layout, count, device)
    tensors = "one tensor" if layout == "one" else f"{len(subject.params)} tensors"
    row = Row(
        f"perturbation: {str(dtype).removeprefix('torch.')} {count / 1e6:g}M in {tensors}",
        name,
        "ours" if "perturb_" in name else "peer",
        unit=UNIT,
        bytes=float(MOVED[name] * subject.bytes),
        ceiling="copy",
    )
    bench.measure(
        row,
        lambda: subject.call(name),
        subject.add,
        lambda _: subject.check(name),
        unit_row=Row(row.group, UNIT, "yardstick", bytes=3.0 * subject.bytes),
        memory="allocator",
        before=subject.reset,
        cold=free_backup_buffers,
    )
