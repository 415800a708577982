"""What engines return: the policy's own distribution, cut at its end, decided by the seed."""

import sys
import types

import pytest
import torch
from rollouts import END, TOKENIZER, policy
from tiny import with_lora
from vcore_train.gvm.engines import Response, Sampling, TransformersEngine, cut_at_end
from vcore_train.gvm.vllm_engine import VllmEngine
from vcore_train.modeling import causal_lm

PROMPTS = [[9, 8, 7], [9, 8, 7, 6, 5, 4], [20]]
FEW = Sampling(max_new_tokens=4)


@pytest.fixture
def engine():
    engine = TransformersEngine(TOKENIZER)
    engine.load(policy())
    return engine


def test_cut_at_the_first_end():
    assert cut_at_end([4, 5, END, 7, END], [END]) == Response([4, 5, END], True)
    assert cut_at_end([4, 5], [END]) == Response([4, 5], False)
    assert cut_at_end([4, 5, END], [END, 4]) == Response([4], True)
    assert cut_at_end([], [END]) == Response([], False)


def test_as_many_responses_as_asked_for(engine):
    responses = engine.sample(PROMPTS, [2, 0, 3], FEW, seed=1)
    assert [len(rows) for rows in responses] == [2, 0, 3]
    for response in responses[0] + responses[2]:
        assert 1 <= len(response.tokens) <= 4
        assert response.finished == (response.tokens[-1] == END)
        assert END not in response.tokens[:-1]
    assert engine.sample(PROMPTS, [0, 0, 0], FEW, seed=1) == [[], [], []]


def test_seeds_decide_and_the_global_state_is_left(engine):
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    first = engine.sample(PROMPTS, [4, 4, 4], FEW, seed=5)
    assert torch.equal(torch.rand(1), expected)
    assert engine.sample(PROMPTS, [4, 4, 4], FEW, seed=5) == first
    assert engine.sample(PROMPTS, [4, 4, 4], FEW, seed=6) != first
    assert engine.model.training


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_distribution_is_the_models(engine, temperature):
    """First tokens of many samples against the softmax, prompts padded or not."""
    count = 6000
    sampling = Sampling(max_new_tokens=1, temperature=temperature)
    responses = engine.sample(PROMPTS[:2], [count, count], sampling, seed=3)
    for prompt, rows in zip(PROMPTS, responses, strict=False):
        with torch.no_grad():
            logits = engine.model(torch.tensor([prompt])).logits[0, -1] / temperature
        p = logits.double().softmax(-1)
        seen = torch.bincount(torch.tensor([r.tokens[0] for r in rows]), minlength=len(p))
        error = (p * (1 - p) / count).sqrt()
        assert ((seen / count - p).abs() <= 5 * error + 1e-4).all()


def test_the_models_own_generation_defaults_do_not_apply(engine):
    plain = engine.sample(PROMPTS, [8, 8, 8], FEW, seed=2)
    generation = engine.model.generation_config
    generation.top_k, generation.temperature, generation.repetition_penalty = 1, 0.1, 5.0
    generation.top_p = 0.1
    assert engine.sample(PROMPTS, [8, 8, 8], FEW, seed=2) == plain
    only = engine.sample(PROMPTS, [8, 8, 8], Sampling(4, top_k=1), seed=2)
    assert all(row == rows[0] for rows in only for row in rows)
    greedy = engine.sample(PROMPTS, [1, 1, 1], Sampling(4, temperature=0.0), seed=0)
    assert greedy == [rows[:1] for rows in only]


@pytest.mark.parametrize(
    "defaults",
    [
        {"num_return_sequences": 2},
        {"suppress_tokens": [7, 8, 9]},
        {"begin_suppress_tokens": list(range(3, 90))},
        {"bad_words_ids": [[9]]},
        {"stop_strings": ["a"]},
        {"return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 3},
        {"max_time": 1e-9},
        {"guidance_scale": 3.0},
        {"min_new_tokens": 4},
        {"do_sample": False, "num_beams": 3},
    ],
    ids=lambda defaults: next(iter(defaults)),
)
@pytest.mark.parametrize("lora", [False, True])
def test_no_default_of_the_model_reaches_the_samples(engine, defaults, lora):
    if lora:
        engine.load(with_lora(policy()))
    plain = engine.sample(PROMPTS, [2, 2, 2], FEW, seed=2)
    generation = causal_lm(engine.model).generation_config
    for name, value in defaults.items():
        setattr(generation, name, value)
    assert engine.sample(PROMPTS, [2, 2, 2], FEW, seed=2) == plain
    assert causal_lm(engine.model).generation_config is generation


def test_several_tokens_may_end_a_response(engine):
    plain = engine.sample(PROMPTS, [1, 1, 1], Sampling(4, temperature=0.0), seed=0)
    second = plain[0][0].tokens[1]
    engine.model.generation_config.eos_token_id = [END, second]
    stopped = engine.sample(PROMPTS, [1, 1, 1], Sampling(4, temperature=0.0), seed=0)
    tokens = plain[0][0].tokens
    assert stopped[0][0] == Response(tokens[: tokens.index(second) + 1], True)


def test_dropout_is_off_and_adapters_are_on():
    model = with_lora(policy(attention_dropout=0.5), lora_dropout=0.5)
    engine = TransformersEngine(TOKENIZER)
    engine.load(model)
    greedy = Sampling(4, temperature=0.0)
    adapted = engine.sample(PROMPTS, [1, 1, 1], greedy, seed=0)
    assert engine.sample(PROMPTS, [1, 1, 1], greedy, seed=1) == adapted
    with model.disable_adapter():
        assert engine.sample(PROMPTS, [1, 1, 1], greedy, seed=0) != adapted


def test_load_comes_first():
    with pytest.raises(RuntimeError, match="call load"):
        TransformersEngine(TOKENIZER).sample(PROMPTS, [1, 1, 1], FEW, seed=0)


# ---- vLLM, of which only the calls can be tested here ----


class FakeLlm:
    """Greedy samples by the weights that were handed over, under the names that vLLM reads."""

    def __init__(self, model, **options):
        self.model_name, self.options = model, options
        self.policy, self.resets = policy(seed=9), 0
        runner = types.SimpleNamespace(model=self)
        worker = types.SimpleNamespace(model_runner=runner)
        self.llm_engine = types.SimpleNamespace(
            model_executor=types.SimpleNamespace(driver_worker=worker)
        )

    def load_weights(self, weights):
        own = dict(self.policy.named_parameters())
        for name, value in weights:
            with torch.no_grad():
                own.pop(name).copy_(value)
        assert not own

    def reset_prefix_cache(self):
        self.resets += 1

    def generate(self, prompts, parameters, use_tqdm):
        assert not use_tqdm
        outputs = []
        for prompt, wanted in zip(prompts, parameters, strict=True):
            engine = TransformersEngine(TOKENIZER)
            engine.load(self.policy)
            sampling = Sampling(wanted.max_tokens, temperature=0.0)
            (row,) = engine.sample([prompt["prompt_token_ids"]], [1], sampling, seed=0)
            one = types.SimpleNamespace(token_ids=tuple(row[0].tokens))
            outputs.append(types.SimpleNamespace(outputs=[one] * wanted.n))
        return outputs


@pytest.fixture
def vllm(monkeypatch):
    module = types.ModuleType("vllm")
    module.__spec__ = types.SimpleNamespace()
    module.LLM = FakeLlm
    module.SamplingParams = lambda **options: types.SimpleNamespace(**options)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    return module


@pytest.mark.parametrize("lora", [False, True])
def test_vllm_samples_with_the_weights_of_the_policy(vllm, lora):
    model = with_lora(policy(seed=2)) if lora else policy(seed=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    engine = VllmEngine("somewhere", TOKENIZER, max_model_len=99)
    assert engine.llm.options["max_model_len"] == 99
    engine.load(model)
    assert engine.llm.resets == 1
    plain = TransformersEngine(TOKENIZER)
    plain.load(model)
    expected = plain.sample(PROMPTS, [1, 1, 1], Sampling(4, temperature=0.0), seed=0)
    responses = engine.sample(PROMPTS, [2, 0, 1], FEW, seed=0)
    assert responses == [expected[0] * 2, [], expected[2]]
    assert engine.sample(PROMPTS, [0, 0, 0], FEW, seed=0) == [[], [], []]
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name


def test_vllm_that_is_not_installed():
    with pytest.raises(ValueError, match="vllm is not installed"):
        VllmEngine("somewhere", TOKENIZER)
