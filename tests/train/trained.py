"""Small models trained for a few seconds on generated arithmetic: losses like real ones."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vcore_train.arithmetic import generate_problems
from vcore_train.modeling import token_nll


def arithmetic_batches(count, *, size=8, seed=0):
    """Batches of byte-level arithmetic problems, padded on the right, the response supervised."""
    problems = generate_problems(count * size, seed=seed)
    batches = []
    for first in range(0, len(problems), size):
        rows = [
            (p.prompt.encode() + b"\n", p.response.encode() + b"\0")
            for p in problems[first : first + size]
        ]
        width = max(len(prompt) + len(response) for prompt, response in rows)
        batch = {
            "input_ids": torch.zeros(size, width, dtype=torch.int64),
            "attention_mask": torch.zeros(size, width, dtype=torch.int64),
            "labels": torch.full((size, width), -100),
        }
        for row, (prompt, response) in enumerate(rows):
            tokens = torch.tensor(list(prompt + response))
            batch["input_ids"][row, : len(tokens)] = tokens
            batch["attention_mask"][row, : len(tokens)] = 1
            batch["labels"][row, len(prompt) : len(tokens)] = tokens[len(prompt) :]
        batches.append(batch)
    return batches


def trained_qwen3(steps=60, *, seed=0, layers=4, hidden=128, **overrides):
    """A byte-level Qwen3 after ``steps`` of AdamW, fp32 weights."""
    return trained_model("qwen3", steps, seed=seed, layers=layers, hidden=hidden, **overrides)


def trained_model(model_type, steps, *, seed=0, layers=2, hidden=64, **overrides):
    """A byte-level causal LM of ``model_type`` after ``steps`` of AdamW, fp32 weights."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": 128,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }
    config = AutoConfig.for_model(model_type, **{**options, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    train(model, arithmetic_batches(steps, seed=seed), 3e-3)
    return model


def train(model, batches, learning_rate):
    """One AdamW step a batch on the mean loss of its supervised tokens."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, (step + 1) / 10)
        nll = token_nll(model, batch)
        (nll.sum() / (nll != 0).sum()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
