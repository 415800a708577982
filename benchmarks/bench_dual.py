"""Values and tangents together: single operators, and the dual pass of a whole model.

    python -m pytest benchmarks/bench_dual.py --benchmark-only

Operators are bound by memory, and their unit is a copy of one of their inputs, which stays in the
cache as theirs do; PyTorch's own forward mode stands beside them. The unit of the dual pass
(utilities of 4 x 512 tokens, 6-layer Qwen3 with H = 512, bf16) is a plain forward pass of the same
batch: arithmetic asks for 2 of them with LoRA and for 3 with all parameters.
"""

import functools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vcore_train.bench_record import Row

from benchmarks.measure import Call
from benchmarks.suite import Bench, gate, relative_error
from vcore_kernels import gated_jvp, rms_norm_jvp

# ---- operators ----


class Operator:
    """An operator's inputs with their tangents, and PyTorch's arithmetic of it."""

    def __init__(self, name: str, quick: bool, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        rows, width = (8, 32) if quick else (2048, 512)
        if name == "gated_jvp":
            width *= 3

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device, torch.bfloat16)

        second = (rows, width) if name == "gated_jvp" else (width,)
        self.name = name
        self.values = normal(rows, width), normal(*second)
        self.tangents = normal(rows, width), normal(*second)
        self.out = torch.empty_like(self.values[0])

    @property
    def title(self) -> str:
        rows, width = self.values[0].shape
        return f"{self.name}: bf16 {rows} x {width}"

    @property
    def moved(self) -> float:
        """Bytes: values and tangents read once, two results written."""
        read = sum(t.nbytes for t in (*self.values, *self.tangents))
        return float(read + 2 * self.out.nbytes)

    def function(self, first: Tensor, second: Tensor) -> Tensor:
        """In float32 or wider, rounded once, as transformers has it."""
        wide = torch.promote_types(first.dtype, torch.float32)
        x = first.to(wide)
        if self.name == "gated_jvp":
            return F.silu(first) * second
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return second * x.to(first.dtype)

    def ours(self) -> tuple[Tensor, Tensor]:
        if self.name == "gated_jvp":
            return gated_jvp(*self.values, *self.tangents, activation="silu")
        return rms_norm_jvp(*self.values, *self.tangents, eps=1e-6)

    def eager(self, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
        values, tangents = (
            tuple(t.to(dtype) for t in part) for part in (self.values, self.tangents)
        )
        return torch.func.jvp(self.function, values, tangents)


@pytest.mark.parametrize("subject", ["here", "eager"])
@pytest.mark.parametrize("name", ["rms_norm_jvp", "gated_jvp"])
def test_operator(bench: Bench, device, quick, name, subject):
    operator = Operator(name, quick, device)
    labels = ("value", "tangent")
    truth, eager = operator.eager(torch.float64), operator.eager()
    eps = torch.finfo(torch.bfloat16).eps
    allowed = {
        n: 2 * relative_error(e, t) + eps for n, e, t in zip(labels, eager, truth, strict=True)
    }
    row = Row(
        operator.title,
        subject,
        "ours" if subject == "here" else "peer",
        unit="copy of an input",
        bytes=operator.moved,
    )
    with torch.no_grad():
        bench.measure(
            row,
            lambda: operator.ours if subject == "here" else operator.eager,
            lambda: operator.out.copy_(operator.values[0]),
            lambda result: gate(
                {n: relative_error(r, t) for n, r, t in zip(labels, result, truth, strict=True)},
                allowed,
            ),
            unit_row=Row(row.group, row.unit, "yardstick", bytes=2.0 * operator.out.nbytes),
            memory="allocator",
        )


# ---- a whole model ----

TRAINED = ("LoRA", "LoRA, fp32 adapters", "all parameters")


class DualPass:
    def __init__(self, trained: str, quick: bool, device: torch.device):
        import transformers
        from vcore_train.modeling import trainable_parameters

        torch.manual_seed(0)
        wide, layers, vocab, batch = (32, 2, 128, (2, 16)) if quick else (512, 6, 8192, (4, 512))
        config = transformers.Qwen3Config(
            vocab_size=vocab,
            hidden_size=wide,
            intermediate_size=3 * wide,
            num_hidden_layers=layers,
            num_attention_heads=wide // 64 or 1,
            num_key_value_heads=wide // 128 or 1,
            head_dim=64,
        )
        model: Any = transformers.Qwen3ForCausalLM(config).bfloat16()
        if trained != "all parameters":
            import peft

            model = peft.get_peft_model(
                model, peft.LoraConfig(r=8, target_modules="all-linear")
            )  # makes fp32 adapters
            if trained == "LoRA":
                model = model.bfloat16()
        self.model = model.eval().to(device)
        ids = torch.randint(vocab, batch).to(device)
        self.inputs = {"input_ids": ids, "labels": ids}
        parameters = trainable_parameters(self.model)
        self.direction = {n: torch.randn_like(p) for n, p in parameters.items()}
        last = f".layers.{layers - 1}."
        self.last = {n: g for n, g in self.direction.items() if last in n}
        self.title = f"dual pass, {trained}: Qwen3 {layers} x {wide}, {batch[0]} x {batch[1]}, bf16"

    def forward(self) -> Tensor:
        from vcore_train.modeling import token_nll

        with torch.no_grad():
            return token_nll(self.model, self.inputs)

    def ours(self, direction: dict[str, Tensor]) -> Tensor:
        from vcore_train import utilities

        return utilities.token_utilities(self.model, self.inputs, direction)

    def by_pytorch(self) -> Tensor:
        """The same with PyTorch's own tangents but for attention, which has none."""
        from vcore_train import utilities

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(utilities, "dual_layers", lambda model: nullcontext())
            return self.ours(self.direction)

    def call(self, name: str) -> Call:
        return {
            "dual pass": lambda: self.ours(self.direction),
            "dual pass of the last layer": lambda: self.ours(self.last),
            "dual pass, PyTorch's own tangents": self.by_pytorch,
        }[name]


@functools.lru_cache(maxsize=1)
def dual_pass(trained: str, quick: bool, device: torch.device) -> DualPass:
    return DualPass(trained, quick, device)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("dual pass", id="all"),
        pytest.param("dual pass of the last layer", id="last"),
        pytest.param("dual pass, PyTorch's own tangents", id="pytorch"),
    ],
)
@pytest.mark.parametrize(
    "trained", [pytest.param(t, id=t.replace(",", "").replace(" ", "-")) for t in TRAINED]
)
def test_dual_pass(bench: Bench, device, quick, trained, name):
    pytest.importorskip("peft")
    subject = dual_pass(trained, quick, device)
    ours = "PyTorch" not in name
    row = Row(subject.title, name, "ours" if ours else "peer", unit="forward pass")

    def check(utility: Tensor) -> str:
        """Utilities in bf16 by two ways correlate."""
        from vcore_train.experiments.statistics import pearson

        if "last" in name:
            return "" if torch.isfinite(utility).all() else gate({"r": float("nan")}, {"r": 0.0})
        other = subject.by_pytorch() if ours else subject.ours(subject.direction)
        r = pearson(utility.flatten().cpu(), other.flatten().cpu())
        return gate({"1 - r": 1 - r}, {"1 - r": 0.01})

    bench.measure(row, lambda: subject.call(name), subject.forward, check, memory="allocator")
