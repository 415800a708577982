"""The group of processes is told apart from being alone, and ends when it is destroyed."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from vcore_train.processes import Processes


def test_alone():
    alone = Processes()
    assert (alone.group, alone.count, alone.rank) == (None, 1, 0)
    x = torch.ones(2)
    assert alone.sum(x) is x
    assert alone.gather(x) == [x]


def _of_group():
    processes = Processes(dist.new_group([0, 1]))
    total = processes.sum(torch.tensor([1.0 + processes.rank]))
    before = processes.group is not None and processes.count == 2
    dist.destroy_process_group(processes.group)
    try:
        processes.sum(total)
    except RuntimeError as error:
        return total.item(), before, str(error)
    return total.item(), before, ""


@pytest.mark.distributed
def test_destroyed_group_is_not_kept():
    """Neither kept alive, which aborts processes at their exit, nor taken for no group at all."""
    for total, before, message in run_ranks(2, _of_group):
        assert total == 3
        assert before
        assert "the process group was destroyed" in message
