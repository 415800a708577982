"""Training layer of vcore_kernels: probes, directions, trainers, data and the ``vcore`` command.

Names are resolved on first use, so that importing the package needs neither transformers nor
any other part of the ``train`` extra.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vcore_train.config import VcoreConfig, VcoreOptions, with_vcore_options
    from vcore_train.directions import descent_direction
    from vcore_train.gradient_norms import sequence_grad_norms
    from vcore_train.gvm.config import GvmConfig
    from vcore_train.gvm.trainer import GvmTrainer
    from vcore_train.loss_function import vcore_loss_func
    from vcore_train.mixin import VcoreMixin
    from vcore_train.reuse import forward_with_utilities
    from vcore_train.sft_trainer import VcoreSFTConfig, VcoreSFTTrainer
    from vcore_train.trainer import VcoreTrainer
    from vcore_train.utilities import token_utilities

__all__ = [
    "GvmConfig",
    "GvmTrainer",
    "VcoreConfig",
    "VcoreMixin",
    "VcoreOptions",
    "VcoreSFTConfig",
    "VcoreSFTTrainer",
    "VcoreTrainer",
    "descent_direction",
    "forward_with_utilities",
    "sequence_grad_norms",
    "token_utilities",
    "vcore_loss_func",
    "with_vcore_options",
]

_HOME = {
    "GvmConfig": "gvm.config",
    "GvmTrainer": "gvm.trainer",
    "VcoreConfig": "config",
    "VcoreMixin": "mixin",
    "VcoreOptions": "config",
    "VcoreSFTConfig": "sft_trainer",
    "VcoreSFTTrainer": "sft_trainer",
    "VcoreTrainer": "trainer",
    "descent_direction": "directions",
    "forward_with_utilities": "reuse",
    "sequence_grad_norms": "gradient_norms",
    "token_utilities": "utilities",
    "vcore_loss_func": "loss_function",
    "with_vcore_options": "config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
