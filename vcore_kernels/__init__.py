"""Fused kernels for token-weighted training of language models. See DESIGN in docs/."""

from vcore_kernels.backends import BackendError, backends
from vcore_kernels.linear_nll import linear_nll
from vcore_kernels.linear_nll_jvp import linear_nll_jvp
from vcore_kernels.linear_nll_pair import linear_nll_pair
from vcore_kernels.weighted_linear_nll import weighted_linear_nll

__all__ = [
    "BackendError",
    "backends",
    "linear_nll",
    "linear_nll_jvp",
    "linear_nll_pair",
    "weighted_linear_nll",
]
__version__ = "0.1.0"
