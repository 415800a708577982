"""VcoreSFTTrainer against TRL's SFTTrainer, in all forms of data."""

import os
import warnings

import pytest
import torch
from datasets import Dataset
from ranks import run_ranks
from tiny import tiny_model
from training import SHORT, logged, parameters
from vcore_train.tokenizer import END, train_tokenizer

trl = pytest.importorskip("trl")
from vcore_train import VcoreSFTConfig, VcoreSFTTrainer, with_vcore_options  # noqa: E402

TEXT = "what is 12 plus 30? it is 42, since 2 plus 0 is 2 and 1 plus 3 is 4. user assistant"
# In a template whose assistant turns are marked, as assistant_only_loss needs it.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# SFTConfig sets an option that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")


def make_tokenizer():
    tokenizer = train_tokenizer([TEXT], vocab_size=280)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("CI", "1")


def pairs(count=12):
    for n in range(count):
        a, b = 3 * n + 1, 7 * n % 20
        work = ", ".join(f"{a} and {k}" for k in range(n % 4))
        yield f"what is {a} plus {b}?", f" {work} it is {a + b}"


FORMS = {
    "text": [{"text": question + answer} for question, answer in pairs()],
    "prompt-completion": [{"prompt": q, "completion": a} for q, a in pairs()],
    "messages": [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in pairs()
    ],
    "conversational prompt-completion": [
        {
            "prompt": [{"role": "user", "content": q}],
            "completion": [{"role": "assistant", "content": a}],
        }
        for q, a in pairs()
    ],
}
SETTINGS = {
    "text": ("text", {}),
    "completion": ("prompt-completion", {}),
    "whole sequence": ("prompt-completion", {"completion_only_loss": False}),
    "assistant": ("messages", {"assistant_only_loss": True}),
    "chat completion": ("conversational prompt-completion", {}),
    "packed": ("prompt-completion", {"packing": True, "max_length": 96}),
    "packed assistant": (
        "messages",
        {"packing": True, "max_length": 96, "assistant_only_loss": True},
    ),
    "wrapped": ("text", {"packing": True, "packing_strategy": "wrapped", "max_length": 48}),
    "padding-free": ("prompt-completion", {"padding_free": True, "max_length": None}),
}


def options_of(folder, **options):
    return {
        **SHORT,
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.05,
        "bf16": False,
        **options,
    }


def run(kind, config, folder, tokenizer, setting, *, peft=False, train=True, model=None, **options):
    form, data_options = SETTINGS[setting]
    keywords = {}
    if peft:
        from peft import LoraConfig

        keywords["peft_config"] = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        )
    model = model or tiny_model(
        "qwen3", vocab_size=len(tokenizer), max_position_embeddings=256, attention="eager"
    )
    trainer = kind(
        model,
        config(**options_of(folder, **data_options, **options)),
        train_dataset=Dataset.from_list(FORMS[form]),
        processing_class=tokenizer,
        **keywords,
    )
    if train:
        trainer.train()
    return trainer


def ours(folder, tokenizer, setting, **options):
    return run(VcoreSFTTrainer, VcoreSFTConfig, folder, tokenizer, setting, **options)


def theirs(folder, tokenizer, setting, **options):
    return run(trl.SFTTrainer, trl.SFTConfig, folder, tokenizer, setting, **options)


def assert_same(left, right, atol=1e-6):
    left, right = parameters(left), parameters(right)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(
            value, right[name], atol=atol, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("setting", SETTINGS)
def test_sft_is_what_trl_trains(tmp_path, tokenizer, setting):
    left = ours(tmp_path, tokenizer, setting, method="sft")
    right = theirs(tmp_path, tokenizer, setting)
    assert_same(left, right)
    for name in ("loss", "num_tokens", "grad_norm"):
        assert logged(left, name) == pytest.approx(logged(right, name), rel=1e-4), name
    assert len(logged(left, "loss")) == 3


def test_dft_is_what_trl_trains(tmp_path, tokenizer):
    left = ours(tmp_path, tokenizer, "completion", method="dft")
    right = theirs(tmp_path, tokenizer, "completion", loss_type="dft")
    assert_same(left, right)


def test_adapters_are_what_trl_trains(tmp_path, tokenizer):
    left = ours(tmp_path, tokenizer, "completion", method="sft", peft=True)
    right = theirs(tmp_path, tokenizer, "completion", peft=True)
    assert_same(left, right)
    assert {name for name, p in left.model.named_parameters() if p.requires_grad} == {
        name for name in parameters(left) if "lora_" in name
    }


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_tokens_are_weighted(tmp_path, tokenizer, setting, peft):
    trainer = ours(tmp_path, tokenizer, setting, kl_budget=0.1, peft=peft)
    uniform = ours(tmp_path, tokenizer, setting, method="sft", peft=peft)
    assert logged(trainer, "kl") == pytest.approx([0.1] * 3, rel=0.02)
    assert logged(trainer, "fallback_steps") == [0, 0, 0]
    assert min(logged(trainer, "utility_std")) > 0
    assert logged(trainer, "num_tokens") == logged(uniform, "num_tokens")
    assert "mean_token_accuracy" not in trainer.state.log_history[0]
    left, right = parameters(trainer), parameters(uniform)
    assert max(float((left[name] - right[name]).abs().max()) for name in left) > 1e-4


def test_forms_that_hold_the_same_tokens_train_the_same(tmp_path, tokenizer):
    # A padded batch, and the same examples as one row with boundaries.
    padded = ours(tmp_path, tokenizer, "completion", kl_budget=0.1)
    flat = ours(tmp_path, tokenizer, "padding-free", kl_budget=0.1)
    assert_same(padded, flat)
    assert logged(padded, "alpha") == pytest.approx(logged(flat, "alpha"), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"activation_checkpointing_kwargs": {"selective": True}},
        {"reuse_forward": True},
    ],
)
def test_checkpointed_layers_change_nothing(tmp_path, tokenizer, options):
    if "activation_checkpointing_kwargs" in options:
        pytest.importorskip("trl", minversion="1.16")
    plain = ours(tmp_path, tokenizer, "completion", gradient_checkpointing=False)
    checkpointed = ours(tmp_path, tokenizer, "completion", **options)
    assert checkpointed.args.gradient_checkpointing  # TRL's default
    assert_same(plain, checkpointed)


def test_bfloat16_is_trls_default(tmp_path, tokenizer):
    trainer = ours(tmp_path, tokenizer, "packed", bf16=None)
    assert trainer.args.bf16
    assert all(torch.isfinite(torch.tensor(logged(trainer, "loss"))))
    assert logged(trainer, "fallback_steps") == [0, 0, 0]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, tokenizer):
    options = {"direction": "ema", "max_steps": 4}
    whole = ours(tmp_path / "whole", tokenizer, "completion", **options)
    cut = ours(
        tmp_path / "cut", tokenizer, "completion", save_strategy="steps", save_steps=2, **options
    )
    assert_same(whole, cut, atol=0)
    resumed = ours(tmp_path / "cut", tokenizer, "completion", train=False, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert_same(whole, resumed, atol=0)
    assert "tags:" in (tmp_path / "cut" / "README.md").read_text()  # TRL's model card


def train_on_a_rank(folder, method):
    """What TRL's trainer, or ours with a method, trains and logs as one of several processes."""
    warnings.simplefilter("ignore")
    os.environ["CI"] = "1"
    kind = theirs if method is None else ours
    options = {} if method is None else {"method": method, "kl_budget": 0.1, "probe_batch_size": 4}
    size = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    trainer = kind(
        folder,
        make_tokenizer(),
        "completion",
        per_device_train_batch_size=size,
        gradient_accumulation_steps=1,
        activation_checkpointing_kwargs={"use_reentrant": False},
        **options,
    )
    names = ("num_tokens", "alpha", "supervised_tokens")
    return parameters(trainer), {name: logged(trainer, name) for name in names}


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes(tmp_path):
    plain, sft, vcore = (
        run_ranks(2, train_on_a_rank, str(tmp_path / str(method)), method)[0]
        for method in (None, "sft", "vcore")
    )
    with warnings.catch_warnings():
        alone = train_on_a_rank(str(tmp_path / "alone"), "vcore")
    assert sft[1]["num_tokens"] == plain[1]["num_tokens"] == alone[1]["num_tokens"]
    assert vcore[1]["alpha"] == pytest.approx(alone[1]["alpha"], rel=1e-4)
    assert vcore[1]["supervised_tokens"] == alone[1]["supervised_tokens"]
    for left, right in ((sft, plain), (vcore, alone)):
        for name, value in right[0].items():
            torch.testing.assert_close(
                left[0][name.removeprefix("module.")], value, atol=2e-6, rtol=1e-5
            )


def test_evaluation_is_trls_own(tmp_path, tokenizer):
    data = Dataset.from_list(FORMS["prompt-completion"][:5])
    left = ours(tmp_path, tokenizer, "completion", train=False).evaluate(data)
    right = theirs(tmp_path, tokenizer, "completion", train=False).evaluate(data)
    names = {"eval_loss", "eval_mean_token_accuracy", "eval_entropy"}
    assert names <= left.keys()
    for name in names:
        assert left[name] == right[name], name


def test_options_beside_an_sft_config(tmp_path, tokenizer):
    def config(**options):
        return with_vcore_options(trl.SFTConfig(**options), kl_budget=0.1)

    other = run(VcoreSFTTrainer, config, tmp_path, tokenizer, "completion")
    assert_same(other, ours(tmp_path, tokenizer, "completion", kl_budget=0.1))


# ---- what would be ignored ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dft"}, r"VcoreSFTConfig: loss_type='dft' goes by .* method='dft'"),
        ({"loss_type": "chunked_nll"}, r"VcoreSFTConfig: loss_type='chunked_nll' .*method="),
        ({"use_liger_kernel": True}, "VcoreSFTConfig: use_liger_kernel=True .* forward derivative"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
        ({"method": "iw_sft"}, "method must be one of sft, random, dft, vcore"),
    ],
)
def test_options_that_would_be_ignored(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        VcoreSFTConfig(**options_of(tmp_path, **options))


def test_arguments_of_the_wrong_kind(tmp_path, tokenizer):
    with pytest.raises(TypeError, match=r"args must be a VcoreSFTConfig, got SFTConfig"):
        run(VcoreSFTTrainer, trl.SFTConfig, tmp_path, tokenizer, "completion")
    args = with_vcore_options(trl.SFTConfig(**options_of(tmp_path, loss_type="dft")))
    with pytest.raises(ValueError, match=r"loss_type='dft' goes by"):
        VcoreSFTTrainer(tiny_model("qwen3"), args, train_dataset=None)


@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning")
def test_a_loss_function(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="compute_loss_func would replace the objective"):
        VcoreSFTTrainer(
            tiny_model("qwen3", vocab_size=len(tokenizer)),
            VcoreSFTConfig(**options_of(tmp_path)),
            train_dataset=Dataset.from_list(FORMS["text"]),
            processing_class=tokenizer,
            compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum(),
        )


def test_a_load_balancing_loss(tmp_path, tokenizer):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    experts |= {"vocab_size": len(tokenizer), "attention": "eager"}
    with pytest.raises(ValueError, match=r"load-balancing loss .*router_aux_loss_coef=0.0"):
        ours(tmp_path, tokenizer, "text", train=False, model=tiny_model("qwen3_moe", **experts))
    without = {"router_aux_loss_coef": 0.0, "method": "sft"}
    left = ours(tmp_path, tokenizer, "text", model=tiny_model("qwen3_moe", **experts), **without)
    without.pop("method")
    right = theirs(tmp_path, tokenizer, "text", model=tiny_model("qwen3_moe", **experts), **without)
    assert_same(left, right)


def test_a_stream(tmp_path, tokenizer):
    stream = Dataset.from_list(FORMS["text"]).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"direction='probe' draws examples by number"):
        VcoreSFTTrainer(
            tiny_model("qwen3", vocab_size=len(tokenizer)),
            VcoreSFTConfig(**options_of(tmp_path)),
            train_dataset=stream,
            processing_class=tokenizer,
        )


def test_the_end_token_is_supervised(tokenizer, tmp_path):
    # What TRL adds to a completion reaches the batches that the mixin weighs.
    trainer = ours(tmp_path, tokenizer, "completion", train=False)
    batch = trainer._collated_examples([0, 1])
    assert (batch["labels"] == tokenizer.convert_tokens_to_ids(END)).sum() == 2
