"""Runs of a study side by side, each in a process of its own with one thread."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from vcore_train.console import quiet_other_libraries
from vcore_train.experiments.setting import Context

Result = TypeVar("Result")


@contextmanager
def workers() -> Iterator[ProcessPoolExecutor]:
    """As many processes as PyTorch has threads; what has not begun is dropped on leaving."""
    pool = ProcessPoolExecutor(
        torch.get_num_threads(),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_prepare,
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def in_workers(
    context: Context, what: str, function: Callable[..., Result], jobs: Sequence[tuple[Any, ...]]
) -> list[Result]:
    """``function(*job)`` of each job, in the order of ``jobs``, with a progress bar.

    ``function`` is one of a module, and jobs and results can be pickled.
    """
    with workers() as pool:
        return in_pool(pool, context, what, function, jobs)


def in_pool(
    pool: Executor,
    context: Context,
    what: str,
    function: Callable[..., Result],
    jobs: Sequence[tuple[Any, ...]],
) -> list[Result]:
    """The same in processes that are there, which keep what they have read and imported."""
    futures = [pool.submit(function, *job) for job in jobs]
    for future in context.track(as_completed(futures), what, len(futures)):
        future.result()  # the first that fails ends the study
    return [future.result() for future in futures]


def _prepare() -> None:
    quiet_other_libraries()
    torch.set_num_threads(1)
