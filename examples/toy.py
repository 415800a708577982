"""Arithmetic problems, a tokenizer and a small random model: what the examples here train on.

None of it is downloaded, so that each example runs anywhere in seconds. In your own script a
checkpoint, its tokenizer and your data take their place.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vcore_train.arithmetic import generate_problems
from vcore_train.models import Size, new_model
from vcore_train.tokenizer import train_tokenizer

PROBLEMS = generate_problems(256, seed=0)
# Options of any TrainingArguments: a line of log for each step, and nothing left behind.
OPTIONS = {
    "max_steps": 5,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": not torch.accelerator.is_available(),
}


def load(name=None):
    """A model and its tokenizer: the checkpoint ``name``, or new ones."""
    if name is not None:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
        return model, AutoTokenizer.from_pretrained(name)
    texts = [f"{problem.prompt}\n{problem.response}" for problem in PROBLEMS]
    tokenizer = train_tokenizer(texts, vocab_size=400)
    return new_model(Size(layers=2, hidden=64).config(), tokenizer, seed=0), tokenizer


def rows(tokenizer):
    """Tokenised problems: ``input_ids``, and ``labels`` with -100 for the prompt."""
    out = []
    for problem in PROBLEMS:
        prompt = tokenizer(f"{problem.prompt}\n", add_special_tokens=False)["input_ids"]
        response = tokenizer(problem.response, add_special_tokens=False)["input_ids"]
        response = [*response, tokenizer.eos_token_id]
        out.append({"input_ids": prompt + response, "labels": [-100] * len(prompt) + response})
    return out


def show(trainer):
    """The figures that a trainer logged, a line for each step."""
    for line in trainer.state.log_history:
        names = ("loss", "nll", "kl", "ess", "alpha", "num_tokens")
        found = [f"{name} {line[name]:.4g}" for name in names if name in line]
        if "loss" in line:
            print(f"step {line['step']}:", ", ".join(found))
