"""Gradient norms of 64 responses of 128 tokens beside a plain pass and a loop over responses.

    python -m pytest benchmarks/bench_gradient_norms.py -q (--benchmark-json=FILE keeps the figures)

The model is that of ``vcore demo`` (float32; its head tied to the embeddings, and untied). "ratio"
is in units of one forward and backward pass of the same batch as this library trains with, through
``weighted_linear_nll``, gradients by all parameters included; the pass of transformers, which
stores the logits, stands beside it. The loop takes a forward and a backward pass for each response,
by the norm's weight alone.

Peak memory is what PyTorch's allocator has handed out and not got back, at its highest, beyond what
stood before the call: PyTorch's profiler reports every allocation and release, those inside
operators and of the autograd graph included. The gradients of the plain pass count; workspaces that
a BLAS library allocates for itself do not.
"""

import pytest
import torch
from torch.profiler import profile

from benchmarks.measure import compare
from vcore_kernels import weighted_linear_nll

RESPONSES, LENGTH = 64, 128


def peak_bytes(call) -> int:
    """See the module's docstring."""
    call()  # what is allocated once and kept
    with profile(profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradient_norms(benchmark, tied, capsys):
    transformers = pytest.importorskip("transformers")
    from vcore_train import sequence_grad_norms
    from vcore_train.demo import FULL
    from vcore_train.modeling import head_of, hidden_states, token_nll

    torch.manual_seed(0)
    config = FULL.size.config()
    config.vocab_size, config.tie_word_embeddings = FULL.vocab_size, tied
    model = transformers.Qwen3ForCausalLM(config).train()
    ids = torch.randint(0, FULL.vocab_size, (RESPONSES, LENGTH))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    token_weight = torch.ones(ids.shape)

    def plain():
        head = head_of(model)
        hidden = hidden_states(model, inputs)
        weighted_linear_nll(hidden, head.weight, ids, token_weight, shift=1)[0].backward()
        model.zero_grad(set_to_none=True)

    def with_logits():
        model(**inputs, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    def loop(weight):
        norms = []
        for i in range(RESPONSES):
            nll = token_nll(model, {key: value[i : i + 1] for key, value in inputs.items()})
            norms.append(torch.autograd.grad(nll.sum(), [weight])[0].norm())
        return torch.stack(norms)

    embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
    subjects = {
        "forward and backward": plain,
        "forward and backward, logits stored": with_logits,
        "embeddings": lambda: sequence_grad_norms(model, inputs),
        "lm_head": lambda: sequence_grad_norms(model, inputs, params="lm_head"),
        "all-linear": lambda: sequence_grad_norms(model, inputs, params="all-linear"),
        "embeddings, a pass for each response": lambda: loop(embeddings),
        "lm_head, a pass for each response": lambda: loop(head),
    }
    if tied:  # one matrix
        subjects = {name: call for name, call in subjects.items() if "lm_head" not in name}
    for params, weight in (("embeddings", embeddings), ("lm_head", head)):
        norms = sequence_grad_norms(model, inputs, params=params)
        torch.testing.assert_close(norms, loop(weight), rtol=1e-5, atol=0)

    title = f"{RESPONSES} x {LENGTH} tokens, demo model, {'tied' if tied else 'untied'}"
    compare(benchmark, capsys, title, subjects)
    unit = peak_bytes(plain)
    lines = []
    for name, call in subjects.items():
        peak = peak_bytes(call)
        benchmark.extra_info[name] |= {"peak bytes": peak, "peak ratio": peak / unit}
        lines.append(f"  {name:36s} {peak / 1e6:8.1f} MB   ratio {peak / unit:.2f}")
    with capsys.disabled():
        print("peak memory\n" + "\n".join(lines))
