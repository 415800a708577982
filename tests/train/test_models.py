import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vcore_train import models
from vcore_train.models import Size, load_model, new_model
from vcore_train.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A Qwen3 stored in 32 bits, one in 16, and a model without support for flash-attn."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["1 + 1"], vocab_size=258)
    model = new_model(Size(1, 32, 2).config(), tokenizer, seed=0)
    model.save_pretrained(folder / "float32")
    model.bfloat16().save_pretrained(folder / "bfloat16")
    other = AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=1, state_size=4)
    new_model(other, tokenizer, seed=0).save_pretrained(folder / "mamba")
    return folder


@pytest.mark.parametrize(
    ("name", "options", "there", "fused"),
    [
        ("float32", {"bf16": True}, True, True),
        ("float32", {"dtype": "bfloat16"}, True, True),
        ("bfloat16", {"dtype": "auto"}, True, True),
        ("float32", {"dtype": "auto"}, True, False),
        ("float32", {}, True, False),
        ("float32", {"bf16": True, "cpu": True}, True, False),
        ("float32", {"bf16": True}, False, False),
        ("mamba", {"bf16": True}, True, False),
    ],
)
def test_fused_attention_where_it_serves(checkpoints, monkeypatch, name, options, there, fused):
    asked = []
    load = AutoModelForCausalLM.from_pretrained

    def watched(name, *, attn_implementation=None, **kwargs):
        asked.append(attn_implementation)
        return load(name, **kwargs)  # flash-attn itself need not be here

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", watched)
    monkeypatch.setattr(models, "is_flash_attn_2_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    load_model(str(checkpoints / name), **options)
    assert asked == ["flash_attention_2" if fused else None]


def test_broken_weights_are_named(checkpoints, tmp_path):
    (tmp_path / "config.json").write_bytes((checkpoints / "float32/config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\1" * 100)
    with pytest.raises(ValueError, match="the weights are not readable"):
        load_model(str(tmp_path))
