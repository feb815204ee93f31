"""Saving and loading checkpoints: megatron-core writes the shards, this file makes the whole thing
all-or-nothing.

One idea: a save has three parts. Every rank describes its state; megatron-core writes the shards into a
staging directory (now, or in a forked process with `--async-save`); then `_commit`, on rank 0 and only if
every rank succeeded, adds `metadata.json` and `run_config.json`, renames the directory and replaces the
tracker. Every failure ends in the same CheckpointError on all ranks while the earlier checkpoint stays what
the tracker names.

Traps: rank 0 alone writes `common.pt` and `.metadata`; an exception there would leave the other ranks
waiting in a collective call, so such failures are recorded (`_Failures`) and raised together afterwards.
torch's CheckpointException is a BaseException. The first save of a process starts a helper process that
imports the main module again, so an entry script must be guarded.
"""

from __future__ import annotations

import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import (
    StrategyAction,
    get_default_strategy,
    register_default_strategy,
)
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from metis.errors import CheckpointError, ConfigError
from metis.training import checkpoint_content as content
from metis.training import retention
from metis.training.checkpoint_load import load_checkpoint
from metis.training.outputs import print_rank_0
from metis.training.run_config import RUN_CONFIG_NAME, build_run_config, load_args_from_checkpoint, to_json
from metis.training.state import TrainState

__all__ = [
    "close_async_queue",
    "finalize_async_saves",
    "load_args_from_checkpoint",
    "load_checkpoint",
    "make_async_queue",
    "save_checkpoint",
]

FORMAT_NAME = "torch_dist"
ASYNC_POLL_SECONDS = 0.2
_SAVE_ERROR = "cannot hold the checkpoint, {}; free or choose another disk"

_SHARDING_NOTES = {
    content.FULLY_RESHARDABLE: "loads at any tensor, pipeline and data parallel size",
    content.DP_RESHARDABLE: "loads at any data parallel size, but only at the same tensor and pipeline size",
}


class _Failures:
    """What went wrong on this rank during one save, kept until all ranks can raise it together."""

    def __init__(self) -> None:
        self.text: str | None = None

    def record(self, error: BaseException) -> None:
        if self.text is None:
            self.text = content.describe_cause(error)

    @contextmanager
    def catch(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            self.record(error)


class _CommonStrategy(TorchCommonSaveStrategy):
    """Writes `common.pt` on rank 0 and records a failure instead of leaving the other ranks behind."""

    def __init__(self, failures: _Failures) -> None:
        super().__init__("torch", 1)
        self._failures = failures

    def save_common(self, common_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Write the common part; failures are raised after the collective calls that follow."""
        with self._failures.catch():
            super().save_common(common_state_dict, checkpoint_dir)


class _ShardStrategy(TorchDistSaveShardedStrategy):
    """megatron-core's torch_dist writer, with rank 0's `.metadata` failure recorded as above."""

    def __init__(self, failures: _Failures) -> None:
        super().__init__(FORMAT_NAME, 1)
        self._failures = failures

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        write_metadata = writer.finish

        def finish(metadata: Any, results: Any) -> None:
            with self._failures.catch():
                write_metadata(metadata, results)

        writer.finish = finish
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)


@contextmanager
def _common_strategy(failures: _Failures) -> Iterator[None]:
    """Register our writer of `common.pt` for one save: megatron-core takes it from its registry only."""
    default = get_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1)
    register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, _CommonStrategy(failures))
    try:
        yield
    finally:
        register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, default)


def make_async_queue(args: Namespace) -> AsyncCallsQueue | None:
    """Return the queue for `--async-save`, or None without it.

    Raises ConfigError for `--use-persistent-ckpt-worker` on the CPU, where megatron-core's worker cannot
    start.
    """
    persistent = bool(getattr(args, "use_persistent_ckpt_worker", False))
    if persistent and args.device == "cpu":
        raise ConfigError(
            "--use-persistent-ckpt-worker", "needs a GPU, received device 'cpu'; drop the option"
        )
    return AsyncCallsQueue(persistent=persistent) if getattr(args, "async_save", False) else None


def save_checkpoint(
    args: Namespace,
    state: TrainState,
    model: list[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
    *,
    async_queue: AsyncCallsQueue | None = None,
    on_complete: Callable[[], None] | None = None,
) -> None:
    """Write `SAVE/iter_XXXXXXX` in torch_dist format and point the tracker at it; collective, on every rank.

    With `async_queue` the shards are written by a forked process and the checkpoint becomes valid in a later
    `finalize_async_saves`; an unfinished earlier save is awaited first. `on_complete` runs on every rank
    after the commit. Options read: save, no_save_optim, no_save_rng, ckpt_fully_parallel_save,
    dist_ckpt_optim_fully_reshardable, save_retain_interval, keep_last_checkpoints.

    Raises CheckpointError on all ranks, naming the path and the first cause; the earlier checkpoint then
    stays valid.
    """
    started = time.time()
    root, iteration = Path(args.save), state.iteration
    if async_queue is not None:
        finalize_async_saves(async_queue, blocking=True, save=args.save)
    print_rank_0(f"saving checkpoint at iteration {iteration:7d} to {args.save} in {FORMAT_NAME} format")
    failures = _Failures()
    if dist.get_rank() == 0:
        with failures.catch():
            retention.prepare_staging(root, iteration)
    staging = retention.staging_directory(root, iteration)
    content.agree(str(root), _save_error(failures))

    sharding_type = content.optimizer_sharding_type(args, model)
    if sharding_type in _SHARDING_NOTES:
        print_rank_0(f"  optimizer state stored as {sharding_type}: {_SHARDING_NOTES[sharding_type]}")
    with_optimizer = optimizer is not None and not getattr(args, "no_save_optim", False)
    metadata = content.content_metadata(sharding_type)
    sharded = content.build_sharded_state_dict(
        model,
        optimizer if with_optimizer else None,
        metadata,
        rng=not getattr(args, "no_save_rng", False),
    )
    sharded |= content.common_content(args, state, scheduler if with_optimizer else None)
    config_text = to_json(build_run_config(args, iteration, sharding_type))

    def commit() -> None:
        _commit(args, iteration, config_text, failures)
        print_rank_0(
            f"  successfully saved checkpoint from iteration {iteration:7d} to {args.save} "
            f"{content.model_parallel_position()} in {time.time() - started:.1f} s"
        )
        if on_complete is not None:
            on_complete()

    with _common_strategy(failures), _as_checkpoint_error(root):
        request = dist_checkpointing.save(
            sharded,
            str(staging),
            _shard_strategy(args, failures),
            async_sharded_save=True,
            content_metadata=metadata,
        )
        # The last of megatron-core's own finalizers writes metadata.json and then waits in a barrier;
        # `_commit` does the same work in a form that survives a full disk on rank 0.
        request = request._replace(finalize_fns=[*request.finalize_fns[:-1], commit])
        if async_queue is None:
            request.execute_sync()
        else:
            async_queue.schedule_async_request(request)
            print_rank_0(f"  scheduled an async checkpoint save at iteration {iteration:7d} to {args.save}")


def _save_error(failures: _Failures) -> str | None:
    return None if failures.text is None else _SAVE_ERROR.format(failures.text)


def _shard_strategy(args: Namespace, failures: _Failures) -> Any:
    strategy: Any = _ShardStrategy(failures)
    if getattr(args, "ckpt_fully_parallel_save", True):
        return FullyParallelSaveStrategyWrapper(strategy, content.data_parallel_group())
    return strategy


@contextmanager
def _as_checkpoint_error(root: Path) -> Iterator[None]:
    """Turn what a save raises into one CheckpointError on all ranks, and give the staging space back."""
    try:
        yield
    except CheckpointError:
        _discard_staging(root)
        raise
    except (CheckpointException, OSError, RuntimeError) as error:
        _discard_staging(root)
        # megatron-core tells the cause to one rank only; the others raise an exception without any.
        known = not isinstance(error, CheckpointException) or bool(error.failures)
        cause: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(cause, content.describe_cause(error) if known else None)
        text = next((text for text in cause if text is not None), "a writer failed")
        raise CheckpointError(str(root), _SAVE_ERROR.format(text)) from error


def _discard_staging(root: Path) -> None:
    if dist.get_rank() == 0:
        for leftover in root.glob(".iter_*.incomplete"):
            shutil.rmtree(leftover, ignore_errors=True)
    dist.barrier()


def _commit(args: Namespace, iteration: int, config_text: str, failures: _Failures) -> None:
    """Make the written shards a checkpoint if no rank has failed; then apply the retention rules."""
    root = Path(args.save)
    content.agree(str(root), _save_error(failures))
    if dist.get_rank() == 0:
        with failures.catch():
            staging = retention.staging_directory(root, iteration)
            retention.write_atomically(staging / RUN_CONFIG_NAME, config_text)
            save_config(CheckpointingConfig(FORMAT_NAME, 1), str(staging))
            retention.commit(root, iteration)
            retention.write_atomically(root / RUN_CONFIG_NAME, config_text)
    content.agree(str(root), _save_error(failures))
    if dist.get_rank() == 0:
        _apply_retention(args, iteration)
    dist.barrier()


def _apply_retention(args: Namespace, iteration: int) -> None:
    for old in retention.iterations_to_delete(
        retention.list_iterations(args.save),
        iteration,
        retain_interval=getattr(args, "save_retain_interval", None),
        keep_last=getattr(args, "keep_last_checkpoints", None),
    ):
        try:
            retention.delete_checkpoint(args.save, old)
        except OSError as error:  # an undeletable old checkpoint is no reason to end the run
            print_rank_0(f"WARNING: could not delete the checkpoint of iteration {old}: {error}")
        else:
            print_rank_0(f"  deleted checkpoint of iteration {old:7d}")


def finalize_async_saves(
    async_queue: AsyncCallsQueue | None,
    *,
    blocking: bool = False,
    save: str | None = None,
    timeout_seconds: float | None = None,
) -> int:
    """Commit the async saves that are written; with `blocking` wait for all. Return how many; collective.

    `save` is the save directory, for messages. Raises CheckpointError on all ranks when a save failed or when
    `timeout_seconds` have passed on rank 0 with one unfinished; its writer processes are then killed.
    """
    if async_queue is None:
        return 0
    root, started, finished = Path(save or "."), time.monotonic(), 0
    with _as_checkpoint_error(root):
        while async_queue.get_num_unfinalized_calls() > 0:
            finished += len(async_queue.maybe_finalize_async_calls(blocking=False))
            if not blocking or async_queue.get_num_unfinalized_calls() == 0:
                break
            waited = time.monotonic() - started
            if content.from_rank_0(timeout_seconds is not None and waited > timeout_seconds):
                for call in async_queue.async_calls:
                    call.async_caller.close(abort=True)
                raise CheckpointError(
                    str(root),
                    f"the asynchronous save must finish within {timeout_seconds:g} s; is the storage stuck?",
                )
            time.sleep(ASYNC_POLL_SECONDS)
    return finished


def close_async_queue(async_queue: AsyncCallsQueue | None, *, save: str | None = None) -> None:
    """Finish all async saves and end the persistent worker, if there is one; at the end of a run, on every
    rank.
    """
    if async_queue is not None:
        finalize_async_saves(async_queue, blocking=True, save=save)
        async_queue.close()
