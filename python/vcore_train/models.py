"""Models for the command line: pretrained, from a configuration file, or small and from scratch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)
from transformers.utils import is_flash_attn_2_available

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Size:
    """A small Qwen3 model. ``kv_heads`` and ``intermediate`` follow from the others where None."""

    layers: int = 6
    hidden: int = 256
    heads: int = 4
    kv_heads: int | None = None
    intermediate: int | None = None
    window: int = 2048

    def config(self) -> Qwen3Config:
        """Raises ValueError where the heads do not divide the width, or are not groups."""
        kv_heads = self.kv_heads or max(1, self.heads // 2)
        if self.layers < 1 or self.heads < 1 or self.hidden < 2 or self.window < 2:
            raise ValueError("--layers and --heads must be at least 1, --hidden and --window 2.")
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"--hidden {self.hidden} is not an even multiple of --heads "
                f"{self.heads}: rotary embeddings need heads of an even width."
            )
        if self.heads % kv_heads:
            raise ValueError(f"--heads {self.heads} is not a multiple of --kv-heads {kv_heads}.")
        return Qwen3Config(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate or 3 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=kv_heads,
            head_dim=self.hidden // self.heads,
            max_position_embeddings=self.window,
            tie_word_embeddings=True,
        )


def read_config(path: str | Path) -> PretrainedConfig:
    """A transformers configuration from a JSON file that names its ``model_type``."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f"{path}: expected an object with a model_type, such as 'qwen3'.")
    return AutoConfig.for_model(**values)


def new_model(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> PreTrainedModel:
    """A randomly initialised float32 model whose vocabulary and special tokens are the tokenizer's.

    The same for the same seed; the global random state is left as it was.
    """
    config.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with a padding token."""
    check_place(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{name}: no tokenizer there ({_first_line(error)})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str, *, dtype: str = "float32", bf16: bool = False, cpu: bool = False
) -> PreTrainedModel:
    """A checkpoint by path or name, its weights in ``dtype`` (``"auto"``: as they were saved).

    ``bf16``: it will run under bfloat16 autocast. ``cpu``: it will not run on a GPU. With both see
    :func:`fused_attention`.
    """
    check_place(name)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"--dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}.")
    options: dict[str, Any] = {"dtype": DTYPES.get(dtype, dtype)}
    try:
        if not cpu and fused_attention(name, dtype=dtype, bf16=bf16):
            options["attn_implementation"] = "flash_attention_2"
        return AutoModelForCausalLM.from_pretrained(name, **options)
    except OSError as error:
        raise FileNotFoundError(f"{name}: no model there ({_first_line(error)})") from error
    except SafetensorError as error:
        raise ValueError(f"{name}: the weights are not readable ({error}).") from error


def fused_attention(name: str, *, dtype: str, bf16: bool) -> bool:
    """Whether flash-attn serves this checkpoint: installed, on a GPU, in 16 bits, by its model."""
    if not (torch.cuda.is_available() and is_flash_attn_2_available()):
        return False
    if not (Path(name) / "config.json").exists() and Path(name).exists():
        return False  # an adapter, whose model is known only once it is loaded
    config = AutoConfig.from_pretrained(name)
    stored = text_config(config).dtype if dtype == "auto" else DTYPES[dtype]
    if not bf16 and stored not in (torch.bfloat16, torch.float16):
        return False
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return bool(getattr(kind, "_supports_flash_attn", False))


def check_place(name: str) -> None:
    """Raises for a path that is no checkpoint; anything else may be a name on the hub."""
    path = Path(name)
    if path.exists():
        if not any((path / file).exists() for file in ("config.json", "adapter_config.json")):
            raise ValueError(f"{name}: not a checkpoint, it holds no config.json.")
    elif name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{name}: no such folder.")


def window_of(model: PreTrainedModel | PretrainedConfig) -> int:
    """Tokens that the model can attend to."""
    return getattr(text_config(model), "max_position_embeddings", None) or 2**31 - 1


def text_config(model: PreTrainedModel | PretrainedConfig) -> Any:
    """The configuration of the language model, which in a multimodal one is a part of the whole."""
    config: Any = getattr(model, "config", model)
    return config.get_text_config()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
