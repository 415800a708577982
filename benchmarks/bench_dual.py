"""The dual pass of a model (values and tangents together) beside its plain forward pass.

    python -m pytest benchmarks/bench_dual.py -q (--benchmark-json=FILE keeps the figures)

Times in turn as in bench_attention.py; memory is what a call holds at its peak beyond what was
there before it.
"""

from contextlib import nullcontext

import pytest
import torch

from benchmarks.bench_attention import compare


@pytest.mark.parametrize("trained", ["all parameters", "LoRA", "LoRA, fp32 adapters"])
def test_dual_pass(benchmark, trained, capsys):
    """Utilities of 4 x 512 tokens, 6-layer Qwen3 with H = 512, bf16, in units of a forward pass."""
    transformers = pytest.importorskip("transformers")
    import peft
    from vcore_train import utilities
    from vcore_train.experiments.measuring import peak_bytes
    from vcore_train.modeling import token_nll, trainable_parameters

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    )
    model = transformers.Qwen3ForCausalLM(config).bfloat16()
    if trained != "all parameters":
        lora = peft.LoraConfig(r=8, target_modules="all-linear")
        model = peft.get_peft_model(model, lora)  # makes fp32 adapters
        if trained == "LoRA":
            model = model.bfloat16()
    model.eval()
    inputs = {"input_ids": torch.randint(0, 8192, (4, 512))}
    inputs["labels"] = inputs["input_ids"]
    direction = {n: torch.randn_like(p) for n, p in trainable_parameters(model).items()}
    last = {n: g for n, g in direction.items() if ".layers.5." in n}

    def ours(direction=direction):
        return utilities.token_utilities(model, inputs, direction)

    def by_pytorch():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(utilities, "dual_layers", lambda model: nullcontext())
            return ours()

    agreement = torch.corrcoef(torch.stack([ours().flatten(), by_pytorch().flatten()]))
    assert agreement[0, 1] > 0.99
    subjects = {
        "forward, SDPA": torch.no_grad()(lambda: token_nll(model, inputs)),
        "dual pass": ours,
        "dual pass of the last layer": lambda: ours(last),
        "dual pass, PyTorch's own": by_pytorch,
    }
    compare(benchmark, capsys, f"Qwen3, 6 layers, 4 x 512, {trained}", subjects)
    with capsys.disabled():
        for name, call in subjects.items():
            size = benchmark.extra_info[name]["peak bytes"] = peak_bytes(call)
            print(f"  {name:36s} {size / 2**20:8.1f} MiB at the peak")
