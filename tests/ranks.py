"""Runs a function in several processes that form a gloo group."""

import io
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

# Processes are forked from a server that has imported these, so that starting one is quick.
_PRELOADED = ["torch", "torch.distributed.fsdp", "transformers", "peft", "vcore_kernels"]


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 180
) -> list[Any]:
    """``function(*args)`` in ``world_size`` processes of one gloo group; what each returned.

    ``function`` stands at the top of a module; arguments can be pickled, results saved by
    ``torch.save``. ``LOCAL_RANK``, ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``
    are set as by torchrun. Raises AssertionError with the traceback of a rank that raises, with
    its number where one dies, and where they take longer than ``timeout`` seconds; none survives.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            context.Process(
                target=_rank, args=(rank, world_size, folder, writer, function, args), daemon=True
            )
            for rank, (_, writer) in enumerate(pipes)
        ]
        for process, (_, writer) in zip(processes, pipes, strict=True):
            process.start()
            writer.close()
        try:
            return _results([reader for reader, _ in pipes], timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _results(readers: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(readers):
        pending = [r for rank, r in enumerate(readers) if rank not in results]
        ready = wait(pending, max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank in range(len(readers)) if rank not in results]
            raise AssertionError(f"ranks {late} did not finish within {timeout} s")
        for reader in ready:
            rank = readers.index(reader)  # type: ignore[arg-type]
            try:
                failed, content = reader.recv()  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            if failed:
                raise AssertionError(f"rank {rank}:\n{content}")
            results[rank] = torch.load(io.BytesIO(content), weights_only=False)
    return [results[rank] for rank in range(len(readers))]


def _rank(rank, world_size, folder, writer, function, args) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        content = io.BytesIO()
        torch.save(function(*args), content)
        writer.send((False, content.getvalue()))
        dist.barrier()  # nobody leaves while another still talks to it
        dist.destroy_process_group()
    except BaseException:
        writer.send((True, traceback.format_exc()))
