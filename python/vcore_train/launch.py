"""Commands in several processes, as torchrun and ``accelerate launch`` start them.

Who is the main process is told by the environment, so that it is known before PyTorch is imported
and before the processes have met. :func:`together` and :func:`on_main` need their group, which
``VcoreConfig`` forms; in one process both do the plain thing.
"""

import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

# torchrun and accelerate launch; mpirun of MPICH and Intel, Open MPI, MVAPICH.
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

Result = TypeVar("Result")


class OtherProcessError(RuntimeError):
    """Another process failed and says why: this one ends, and says nothing."""


def launched() -> bool:
    """Whether a launcher started this process, be it alone."""
    return any(name in os.environ for name in RANKS)


def process_number() -> int:
    """The number of this process, 0 for the main one and where there is no other."""
    return next((int(os.environ[name]) for name in RANKS if name in os.environ), 0)


def process_count() -> int:
    """How many processes the launcher started, over all machines; 1 without one."""
    if not launched():
        return 1
    return next((int(os.environ[name]) for name in SIZES if name in os.environ), 1)


def is_main() -> bool:
    return process_number() == 0


@contextmanager
def together() -> Iterator[None]:
    """Every process gets through the body, or every process raises.

    The main process raises its own error, or the first of another process as RuntimeError with its
    number; the others raise :class:`OtherProcessError`, so that a mistake is reported once. All
    processes must come here.
    """
    if not _in_group():
        yield
        return
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    texts = _gathered(None if mine is None else str(mine) or type(mine).__name__)
    failed = next((number for number, text in enumerate(texts) if text is not None), None)
    if failed is None:
        return
    if not is_main():
        raise OtherProcessError(f"process {failed}: {texts[failed]}") from mine
    if mine is not None:
        raise mine
    raise RuntimeError(f"process {failed}: {texts[failed]}")


def on_main(function: Callable[[], Result]) -> Result:
    """``function()`` of the main process, on every process; it raises as in :func:`together`."""
    if not _in_group():
        return function()
    import torch.distributed as dist

    result = None
    with together():
        if is_main():
            result = function()
            pickle.dumps(result)  # or it would fail in the broadcast, where the others wait

    box = [result]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def check_same(values: Mapping[str, int], mend: str) -> None:
    """Raises ValueError, on every process, where one has other ``values`` than the main one."""
    if not _in_group():
        return
    of_all = _gathered(dict(values))
    for number, other in enumerate(of_all):
        for name, value in of_all[0].items():
            if other[name] != value:
                raise ValueError(
                    f"process {number} has {other[name]} {name}, process 0 has {value}. {mend}"
                )


def lost_contact(error: BaseException) -> bool:
    """Whether ``error`` says that another process is gone, or did not answer in time."""
    if not _in_group():
        return False
    import torch.distributed as dist

    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text


def leave() -> None:
    """Ends the group that the launcher's processes formed, one alone too, as PyTorch asks for."""
    import torch.distributed as dist

    if launched() and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _in_group() -> bool:
    if process_count() == 1:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gathered(value: Result) -> list[Result]:
    import torch.distributed as dist

    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
