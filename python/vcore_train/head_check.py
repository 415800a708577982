"""Whether the library's picture of a model's head is the model's own."""

from dataclasses import replace
from weakref import WeakSet

import torch
from torch import Tensor, nn

from vcore_train.modeling import Head, causal_lm, head_of, hidden_states, probing
from vcore_train.sharding import reshard, vocabulary_parallel, within_forward

_verified: WeakSet[nn.Module] = WeakSet()


def verify_head(model: nn.Module) -> None:
    """Compares this module's picture of ``model`` with the model's own logits, once per model.

    An architecture may scale its logits, or transform its hidden states, in a way that
    :func:`head_of` does not know. Silently wrong losses would follow, so they are compared on four
    tokens.

    Raises:
        ValueError: they differ, with by how much; or the model's own are not finite.
    """
    # A head that is sharded along the vocabulary serves the operators, and may not serve the
    # model's own forward; a model that is verified before its head is sharded stays so.
    if model in _verified or vocabulary_parallel(model):
        return
    lm = causal_lm(model)
    vocabulary = lm.config.get_text_config().vocab_size
    device = lm.get_output_embeddings().weight.device
    input_ids = (torch.arange(4, device=device) % vocabulary)[None]

    def here() -> tuple[Tensor, Head]:
        head = head_of(model)
        hidden = hidden_states(model, {"input_ids": input_ids}).to(head.weight.dtype)
        logits = head.scale * nn.functional.linear(hidden, head.weight, head.bias).float()
        return logits, replace(head, weight=head.weight[:0], bias=None)

    attention = "eager" if lm._can_set_attn_implementation() else None
    with torch.no_grad(), probing(model, attention=attention):
        expected = model(input_ids=input_ids, use_cache=False).logits.float()
        logits, head = within_forward(model, model, here)
        reshard(model)
    if not expected.isfinite().all():
        raise ValueError(
            f"{type(lm).__name__} gives NaN or infinite logits for the first four tokens of its "
            "vocabulary. Its weights are not finite (load an earlier checkpoint), or they overflow "
            f"in {head.weight.dtype}."
        )
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    agree = expected.shape == logits.shape
    error = (
        float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        if agree
        else None
    )
    if error is None or not error < 0.05:
        what = (
            f"relative difference {error:.3g}" if agree else f"{logits.shape} and {expected.shape}"
        )
        raise ValueError(
            f"{type(lm).__name__} does not form its logits as softcap(scale * (hidden @ weight.T + "
            f"bias)) with scale={head.scale}, softcap={head.softcap} from its configuration "
            f"({what}). This architecture is not supported; its rule belongs in "
            "vcore_train/modeling.py."
        )
    _verified.add(model)
