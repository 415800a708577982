"""Labels of which a random part stays supervised, for method "random"."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vcore_kernels import random_supervision
from vcore_train.modeling import IGNORE_INDEX
from vcore_train.supervised import SupervisedTokens


def random_labels(batch: Mapping[str, Any], keep: float, entropy: tuple[int, ...]) -> Tensor:
    """``batch["labels"]`` with a share ``keep`` of each trajectory left, the rest -100.

    Tokens of ``answer_mask``, where the batch has one, all stay. ``entropy`` (seed, step, ...)
    alone decides the choice, so that a resumed run repeats it.
    """
    labels, tokens = batch["labels"], SupervisedTokens.of([batch])
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
    answer = batch.get("answer_mask")
    kept = random_supervision(
        torch.ones(tokens.count, dtype=torch.bool, device=labels.device),
        keep,
        always=None if answer is None else tokens.packed([answer]).bool(),
        cu_seqlens=tokens.cu_seqlens,
        generator=torch.Generator().manual_seed(seed),
    )
    return labels.where(tokens.unpacked(kept)[0], IGNORE_INDEX)
