"""Fused kernels for token-weighted training of language models. docs/design.md says how and why."""

from vcore_kernels._apportion import NothingToAllocateError
from vcore_kernels._library import check_compiled
from vcore_kernels.aggregation import aggregation_items
from vcore_kernels.allocation import ALLOCATION_RULES, Evidence, allocate
from vcore_kernels.attention_jvp import attention_jvp
from vcore_kernels.backends import BackendError, backends
from vcore_kernels.dft_loss import dft_loss
from vcore_kernels.gated_jvp import gated_jvp
from vcore_kernels.gibbs_weights import GibbsWeights, gibbs_weights
from vcore_kernels.grpo_advantages import GroupMetrics, group_metrics, grpo_advantages
from vcore_kernels.grpo_loss import grpo_loss
from vcore_kernels.gvm_allocate import gvm_allocate
from vcore_kernels.gvm_variance import gvm_variance, gvm_variance_bound
from vcore_kernels.iw_sft_loss import iw_sft_loss
from vcore_kernels.linear_nll import linear_nll
from vcore_kernels.linear_nll_grad_norms import linear_nll_grad_norms
from vcore_kernels.linear_nll_jvp import linear_nll_jvp
from vcore_kernels.linear_nll_pair import linear_nll_pair
from vcore_kernels.perturbed import (
    NonFiniteDirectionError,
    StalledPerturbationWarning,
    free_backup_buffers,
    perturb_,
    perturbed,
    restore_,
)
from vcore_kernels.prompt_weights import prompt_weights
from vcore_kernels.raft_loss import raft_loss
from vcore_kernels.random_supervision import random_supervision
from vcore_kernels.rms_norm_jvp import rms_norm_jvp
from vcore_kernels.sft_loss import sft_loss
from vcore_kernels.variance_control import variance_control
from vcore_kernels.vcore_loss import VcoreLoss, vcore_loss
from vcore_kernels.weighted_linear_nll import weighted_linear_nll

check_compiled()

__all__ = [
    "ALLOCATION_RULES",
    "BackendError",
    "Evidence",
    "GibbsWeights",
    "GroupMetrics",
    "NonFiniteDirectionError",
    "NothingToAllocateError",
    "StalledPerturbationWarning",
    "VcoreLoss",
    "aggregation_items",
    "allocate",
    "attention_jvp",
    "backends",
    "dft_loss",
    "free_backup_buffers",
    "gated_jvp",
    "gibbs_weights",
    "group_metrics",
    "grpo_advantages",
    "grpo_loss",
    "gvm_allocate",
    "gvm_variance",
    "gvm_variance_bound",
    "iw_sft_loss",
    "linear_nll",
    "linear_nll_grad_norms",
    "linear_nll_jvp",
    "linear_nll_pair",
    "perturb_",
    "perturbed",
    "prompt_weights",
    "raft_loss",
    "random_supervision",
    "restore_",
    "rms_norm_jvp",
    "sft_loss",
    "variance_control",
    "vcore_loss",
    "weighted_linear_nll",
]
__version__ = "0.1.0"
