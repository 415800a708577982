"""A small policy, prompts, and engines whose responses are known, for the tests of GVM."""

import random

from tiny import tiny_model
from vcore_train import GvmConfig, GvmTrainer
from vcore_train.gvm.engines import Response
from vcore_train.tokenizer import train_tokenizer
from vcore_train.verifiers import Verdict

VOCABULARY = 270
TOKENIZER = train_tokenizer(["ask one two three #### 12\n"] * 4, vocab_size=VOCABULARY, window=128)
END = TOKENIZER.eos_token_id


def policy(**options):
    options = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 128, **options}
    model = tiny_model("qwen3", **options)
    model.config.eos_token_id = model.generation_config.eos_token_id = END
    model.config.pad_token_id = TOKENIZER.pad_token_id
    return model


def prompts(count=6):
    return [{"prompt": f"ask {'very ' * i}much", "answer": str(i)} for i in range(count)]


class RandomEngine:
    """Random tokens by the seed, whatever the weights; ``short``: drops so many of each call."""

    def __init__(self, *, longest=5, short=0, crash_at=None, finish=True):
        self.longest, self.short, self.crash_at, self.finish = longest, short, crash_at, finish
        self.calls, self.sampled, self.loads = 0, 0, 0

    def load(self, model):
        self.loads += 1

    def sample(self, prompts, counts, sampling, *, seed):
        if self.calls == self.crash_at:
            raise KeyboardInterrupt
        self.calls += 1
        rng = random.Random(seed)
        responses = []
        for n in counts:
            rows = []
            for _ in range(n):
                tokens = [rng.randrange(5, 250) for _ in range(rng.randint(1, self.longest))]
                ends = self.finish and rng.random() < 0.8
                rows.append(Response([*tokens, END] if ends else tokens, ends))
            responses.append(rows)
        for _ in range(self.short):
            longest = max(responses, key=len)
            if longest:
                longest.pop()
        self.sampled += sum(map(len, responses))
        return responses


class Judge:
    """Stands for a Verification: accepts by a function of (text, answer)."""

    def __init__(self, accepts=lambda text, answer: len(text) % 2):
        self.accepts, self.judged = accepts, 0

    def judge(self, pairs, advance=None):
        self.judged += len(pairs)
        return [Verdict(float(self.accepts(*pair)), None) for pair in pairs]

    def close(self):
        pass


def make_trainer(folder, *, model=None, engine=None, judge=None, data=None, **options):
    keywords = {
        name: options.pop(name)
        for name in ("eval_dataset", "ref_model", "callbacks", "verifier", "optimizers")
        if name in options
    }
    options = {
        "output_dir": str(folder),
        "iterations": 2,
        "samples_per_prompt": 6,
        "steps_per_iteration": 2,
        "max_new_tokens": 6,
        "generation_batch_size": 5,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "seed": 7,
        **options,
    }
    trainer = GvmTrainer(
        policy() if model is None else model,
        GvmConfig(**options),
        train_dataset=prompts() if data is None else data,
        processing_class=TOKENIZER,
        engine=RandomEngine() if engine is None else engine,
        **{"verifier": "exact", **keywords},
    )
    if "verifier" not in keywords:
        trainer.verification = Judge() if judge is None else judge
    return trainer


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
