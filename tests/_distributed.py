"""Runs a function on several gloo ranks from an ordinary test, so that many ranks are one pytest away.

`run_ranks(fn, world_size, *args)` calls `fn(rank, world_size, *args)` in `world_size` fresh processes that
already share a gloo process group, and returns the results in rank order. `fn` is a module-level function;
its arguments and its result are pickled.

Processes are forked from a server that has imported torch and megatron-core once and applied the CPU patches,
because importing both costs about five seconds a rank. A test of the *unpatched* engine passes
`patched=False`; its ranks start from a new interpreter (spawn).

Traps: put several cases into one `run_ranks` call when they can share a process group; a rank starts with one
OpenMP thread; the first save of a torch_dist checkpoint starts a manager process (about five seconds) unless
`use_fast_checkpoint_queue()` was called in the rank before it.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PRELOADED_MODULE = "tests._distributed_preload"


class RankError(AssertionError):
    """A rank raised, died or did not finish in time; the message holds its traceback."""


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, patched: bool = True
) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on every rank of a gloo group and return the results by rank.

    `timeout` is in seconds for the whole call. Raises `RankError` with the traceback of the rank that failed
    first; the other ranks (and their children) are then killed. With `patched=False` the ranks start without
    `megatron_patches` and with nothing imported.
    """
    context = _patched_context() if patched else multiprocessing.get_context("spawn")
    payload = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder, _start_environment():
        port = _free_port()
        ranks = []
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main,
                    args=(payload, rank, world_size, f"{folder}/store", port, sender, patched),
                    name=f"rank{rank}",
                )
                process.start()
                sender.close()
                ranks.append((process, receiver))
            return _collect(ranks, time.monotonic() + timeout, timeout)
        finally:
            for process, receiver in ranks:
                _kill(process)
                receiver.close()


def use_fast_checkpoint_queue() -> None:
    """Let this rank's torch_dist saves report through a forked manager instead of a newly started
    interpreter.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()


@contextmanager
def _start_environment() -> Iterator[None]:
    """Environment that new processes inherit: one thread each, and this repository importable."""
    paths = [str(REPOSITORY), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    changed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _patched_context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED_MODULE])  # read when the server starts, no effect afterwards
    return context


def _free_port() -> int:
    """A port that was free a moment ago, for code that reads MASTER_PORT; the group itself meets through a
    file.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_main(
    payload: bytes,
    rank: int,
    world_size: int,
    store: str,
    port: int,
    sender: multiprocessing.connection.Connection,
    patched: bool,
) -> None:
    os.setsid()  # so that a kill reaches checkpoint writers as well
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        if patched:
            from megatron_patches import apply_patches

            apply_patches("cpu")
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        # Unpickled after the patches: it imports the function's module, and that may import megatron-core.
        fn, args = pickle.loads(payload)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        result = fn(rank, world_size, *args)
        sender.send_bytes(pickle.dumps((True, result)))
        sender.close()
        # A rank that leaves early would break the connections of one that is still computing.
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        try:
            sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
        except OSError:
            pass
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _collect(
    ranks: list[tuple[multiprocessing.Process, multiprocessing.connection.Connection]],
    deadline: float,
    timeout: float,
) -> list[Any]:
    """Wait for one message per rank, in the order in which they come; the first failure ends the wait."""
    results: dict[int, Any] = {}
    waiting = {receiver: rank for rank, (_, receiver) in enumerate(ranks)}
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting.values())} did not finish within {timeout:g} s")
        for receiver in ready:
            rank = waiting.pop(receiver)
            try:
                succeeded, value = pickle.loads(receiver.recv_bytes())
            except EOFError:
                ranks[rank][0].join(5)
                raise RankError(
                    f"rank {rank} died without a result, exit code {ranks[rank][0].exitcode}"
                ) from None
            if not succeeded:
                raise RankError(f"rank {rank} of {len(ranks)} failed:\n{value}")
            results[rank] = value
    for process, _ in ranks:
        process.join(max(0.1, min(10.0, deadline - time.monotonic())))
    return [results[rank] for rank in range(len(ranks))]


def _kill(process: multiprocessing.Process) -> None:
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()
    process.join(5)
