import pytest
import torch

from vcore_kernels import backends


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


def backend_params():
    return [
        "reference",
        pytest.param(
            "cpp", marks=pytest.mark.skipif(not backends()["cpp"], reason=backends()["cpp"].reason)
        ),
    ]


@pytest.fixture(params=backend_params())
def backend(request):
    return request.param
