"""Tiny random models and batches for the tests of vcore_train."""

import warnings

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 61
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}
CONFIGS = {
    "qwen3": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False, "attention_bias": True, "attention_dropout": 0.3},
    "gemma2": {
        "tie_word_embeddings": True,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 3.0,
        "sliding_window": 4,
        "query_pre_attn_scalar": 8,
        "attention_dropout": 0.3,
    },
    "gemma3_text": {
        "tie_word_embeddings": True,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    "mistral": {"tie_word_embeddings": False, "sliding_window": 4},
    "phi3": {"tie_word_embeddings": False},
}


def tiny_model(model_type, *, seed=0, attention=None, dtype=torch.float32, **overrides):
    """A random causal LM of ``model_type``, in training mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type, **{**_COMMON, **CONFIGS.get(model_type, {}), **overrides}
    )
    kwargs = {} if attention is None else {"attn_implementation": attention}
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **kwargs).train()


def untied_twin(model):
    """The same function with a head of its own."""
    twin = tiny_model(model.config.model_type, tie_word_embeddings=False)
    twin.load_state_dict(model.state_dict())
    return twin


def with_lora(model, *, seed=0, targets=("q_proj", "v_proj", "down_proj"), **options):
    """A LoRA adapter on ``model`` with a B that is not zero, so that A has a gradient too."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **options)
    with warnings.catch_warnings():  # PEFT on merging adapters of tied heads, or with a bias
        warnings.simplefilter("ignore", UserWarning)
        model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def padded_batch(lengths=(9, 5, 7), *, prompt=2, side="right", seed=0, vocabulary=VOCABULARY):
    """Sequences of ``lengths`` tokens padded on ``side``, supervised after ``prompt`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    input_ids = torch.zeros(shape, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, -100)
    for row, length in enumerate(lengths):
        start = 0 if side == "right" else shape[1] - length
        tokens = torch.randint(3, vocabulary, (length,), generator=generator)
        input_ids[row, start : start + length] = tokens
        attention_mask[row, start : start + length] = 1
        labels[row, start + prompt : start + length] = tokens[prompt:]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def packed_batch(lengths=(9, 5, 7), *, prompt=2, seed=0):
    """The same sequences as :func:`padded_batch`, as DataCollatorWithFlattening packs them."""
    from transformers import DataCollatorWithFlattening

    padded = padded_batch(lengths, prompt=prompt, seed=seed)
    rows = [
        {"input_ids": ids[:n].tolist(), "labels": labels[:n].tolist()}
        for ids, labels, n in zip(padded["input_ids"], padded["labels"], lengths, strict=True)
    ]
    return DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)(rows)


def unpacked(rows, lengths):
    """Per-token values [1, sum(lengths)] of a packed batch as the padded [B, T]."""
    out = rows.new_zeros(len(lengths), max(lengths))
    for row, (values, n) in enumerate(zip(rows[0].split(list(lengths)), lengths, strict=True)):
        out[row, :n] = values
    return out
