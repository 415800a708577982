import pytest
import torch

from vcore_kernels import backends
from vcore_kernels.backends.triton import INTERPRETED


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["auto", "float", "brgemm"])
def bf16_engine(request):
    """Every way this machine has of multiplying bf16; the choice is put back afterwards."""
    if not backends()["cpp"]:
        pytest.skip(backends()["cpp"].reason)
    choose = torch.ops.vcore_kernels.set_bf16_engine
    if not choose(request.param):
        pytest.skip(f"no {request.param} products of bf16 on this machine")
    yield request.param
    choose("auto")


def backend_params(*on_gpu):
    """Every backend that serves all operators, and those of ``on_gpu``.

    Under Triton's interpreter (marker interpreter) the Triton kernels alone.
    """
    if INTERPRETED:
        return [pytest.param("triton", marks=pytest.mark.interpreter)]
    unless = {
        name: pytest.mark.skipif(not support, reason=support.reason)
        for name, support in backends().items()
    }
    return [
        "reference",
        pytest.param("cpp", marks=unless["cpp"]),
        *(
            pytest.param(name, marks=[pytest.mark.gpu, unless[name]])
            for name in ("triton", *on_gpu)
        ),
    ]


@pytest.fixture(params=backend_params("cuda"))
def perturb_backend(request):
    """As ``backend``, and the compiled CUDA library, which has the in-place perturbation alone."""
    yield from _made_for(request.param)


@pytest.fixture(params=backend_params())
def backend(request):
    """With kernels for a GPU, whatever a test makes is made there."""
    _skip_wide_products(request)
    yield from _made_for(request.param)


def _skip_wide_products(request):
    wide = request.node.callspec.params.get("dtype") == torch.float64
    if wide and request.param == "triton" and "test_head" in request.node.nodeid:
        pytest.skip("the Triton kernels have no float64 products")


def _made_for(backend):
    if backend in ("triton", "cuda") and not INTERPRETED:
        torch.set_default_device("cuda")
    yield backend
    torch.set_default_device(None)
