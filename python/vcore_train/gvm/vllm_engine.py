"""Rollouts by vLLM, in this process: a second copy of the weights, loaded anew each iteration."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from vcore_train.gvm.engines import Response, Sampling, cut_at_end, end_tokens
from vcore_train.modeling import causal_lm


class VllmEngine:
    """Samples with ``vllm.LLM``. Nothing of vLLM is imported before the engine is made.

    Args:
        model: path or name that vLLM reads the architecture (and first weights) from.
        tokenizer: gives the end-of-sequence token.
        **options: of ``vllm.LLM``, such as ``gpu_memory_utilization``, ``max_model_len`` or
            ``dtype``.

    Raises:
        ValueError: vLLM is not installed.
    """

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase, **options: Any):
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "VllmEngine: vllm is not installed. Run pip install vllm, or use the engine "
                "'transformers'."
            )
        # The weights are handed over within this process.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm

        self.tokenizer, self._vllm = tokenizer, vllm
        self.llm: Any = vllm.LLM(model=model, **{"gpu_memory_utilization": 0.3, **options})
        self._ends = [tokenizer.eos_token_id]

    def load(self, model: nn.Module) -> None:
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        runner.model.load_weights(plain_weights(model))
        self.llm.reset_prefix_cache()  # it holds keys and values of the weights before
        self._ends = end_tokens(model, self.tokenizer)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        counts: Sequence[int],
        sampling: Sampling,
        *,
        seed: int,
    ) -> list[list[Response]]:
        wanted = [i for i, n in enumerate(counts) if n > 0]
        if not wanted:
            return [[] for _ in prompts]
        parameters = [
            self._vllm.SamplingParams(
                n=counts[i],
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k or -1,
                max_tokens=sampling.max_new_tokens,
                seed=(seed + i) % 2**63,
                stop_token_ids=self._ends,
                detokenize=False,
            )
            for i in wanted
        ]
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompts[i])} for i in wanted], parameters, use_tqdm=False
        )
        responses: list[list[Response]] = [[] for _ in prompts]
        for i, output in zip(wanted, outputs, strict=True):
            responses[i] = [cut_at_end(list(one.token_ids), self._ends) for one in output.outputs]
        return responses


def plain_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values as the architecture has them without PEFT, active LoRA adapters added.

    The model's own weights are not touched: merging and unmerging would round them each time.
    """
    lm = causal_lm(model)
    for name, parameter in lm.named_parameters():
        if "lora_" in name or ".original_module." in name:
            continue
        value = parameter.detach()
        prefix, adapted, kind = name.partition(".base_layer.")
        if adapted:
            layer: Any = lm.get_submodule(prefix)
            if LoraLayer not in type(layer).__mro__:
                raise ValueError(
                    f"VllmEngine: {prefix} has a {type(layer).__name__}; only LoRA adapters can be "
                    "added to the weights. Use the engine 'transformers'."
                )
            if kind == "weight" and not layer.disable_adapters:
                for adapter in layer.active_adapters:
                    if adapter in layer.scaling:
                        value = value + layer.get_delta_weight(adapter)
        name = f"{prefix}.{kind}" if adapted else name
        yield name.replace(".modules_to_save.default", ""), value
