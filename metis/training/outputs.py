"""Where a run's messages go: terminal lines by rank, TensorBoard and wandb, memory reports, the progress
file.

One idea: each function here knows which rank speaks, so that callers run the same code on all of them.

Traps: rank 0 prints setup lines and the last rank prints losses. `print_datetime` is collective.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
from argparse import Namespace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from metis.errors import ConfigError
from metis.training.state import TrainState

_MEGABYTE = 1024.0 * 1024.0


def rank_and_size() -> tuple[int, int]:
    """Return `(rank, world size)`, `(0, 1)` before the process group exists."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def print_rank_0(message: str) -> None:
    """Print on the first rank only, at once."""
    if rank_and_size()[0] == 0:
        print(message, flush=True)


def print_rank_last(message: str) -> None:
    """Print on the last rank only, at once; it is the one that knows the loss."""
    rank, size = rank_and_size()
    if rank == size - 1:
        print(message, flush=True)


def print_datetime(label: str) -> None:
    """Print `[label] datetime: YYYY-MM-DD HH:MM:SS` on rank 0 after all ranks have arrived."""
    if dist.is_initialized():
        dist.barrier()
    print_rank_0(f"[{label}] datetime: {datetime.now().strftime('%Y-%m-%d %H:%M:%S')} ")


def configure_logging(logging_level: int | None = None) -> None:
    """Make megatron-core's timer block visible, and its other messages from `logging_level` upwards.

    `Timers.log` speaks through the logging module at INFO, which is silent by default. `logging_level` is
    `--logging-level`; None reads MEGATRON_LOGGING_LEVEL, else WARNING.
    """
    level = logging_level if logging_level is not None else os.environ.get("MEGATRON_LOGGING_LEVEL")
    if level is not None:
        logging.basicConfig()  # without a handler of its own, the root logger shows warnings at most
        logging.getLogger().setLevel(int(level))
    timers_logger = logging.getLogger("megatron.core.timers")
    timers_logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _StdoutHandler) for handler in timers_logger.handlers):
        timers_logger.addHandler(_StdoutHandler())
    timers_logger.propagate = False


class _StdoutHandler(logging.Handler):
    """Prints the bare message to the standard output of the moment (which tests replace)."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stdout, flush=True)


def open_tensorboard(args: Namespace, iteration: int = 0) -> Any:
    """Return a SummaryWriter for `--tensorboard-dir` holding every argument as text; None elsewhere than
    last rank.

    Raises ConfigError when the directory cannot be written.
    """
    rank, size = rank_and_size()
    if not getattr(args, "tensorboard_dir", None) or rank != size - 1:
        return None
    # Imported here: it takes seconds, and most ranks have no use for it.
    from torch.utils.tensorboard import SummaryWriter

    try:
        writer = SummaryWriter(log_dir=args.tensorboard_dir, max_queue=args.tensorboard_queue_size)
    except OSError as error:
        raise ConfigError(
            "--tensorboard-dir", f"must be writable, received: {error}; choose another"
        ) from error
    for name, value in vars(args).items():
        writer.add_text(name, str(value), global_step=iteration)
    return writer


def open_wandb(args: Namespace) -> Any:
    """Return a wandb run for `--wandb-project` on the last rank, None elsewhere or when not asked for.

    Raises ConfigError without `--wandb-exp-name` or without the wandb package.
    """
    rank, size = rank_and_size()
    if not getattr(args, "wandb_project", None):
        return None
    if not getattr(args, "wandb_exp_name", None):
        raise ConfigError("--wandb-exp-name", "must be given with --wandb-project; pass a name for the run")
    if rank != size - 1:
        return None
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "--wandb-project", "needs the wandb package; pip install wandb or drop it"
        ) from error
    directory = args.wandb_save_dir or os.path.join(args.save or ".", "wandb")
    os.makedirs(directory, exist_ok=True)
    return wandb.init(
        dir=directory,
        name=args.wandb_exp_name,
        project=args.wandb_project,
        entity=getattr(args, "wandb_entity", None),
        config=vars(args),
    )


def report_memory(label: str) -> None:
    """Print this rank's memory in MB on every data-parallel rank 0, one line per (tensor, pipeline) position.

    On a GPU: allocated, max allocated, reserved, max reserved; on the CPU: the process's resident and peak
    size.
    """
    from megatron.core import parallel_state

    if (
        parallel_state.is_initialized()
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0
    ):
        return
    if torch.cuda.is_available():
        sizes = {
            "allocated": torch.cuda.memory_allocated(),
            "max allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "max reserved": torch.cuda.max_memory_reserved(),
        }
    else:
        import psutil

        peak_kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sizes = {"resident": psutil.Process().memory_info().rss, "max resident": peak_kilobytes * 1024}
    text = "".join(f" | {name}: {size / _MEGABYTE:.1f}" for name, size in sizes.items())
    print(f"[Rank {rank_and_size()[0]}] {label} memory (MB){text}", flush=True)


def theoretical_memory_line(args: Namespace, num_parameters: int, num_buffer_bytes: int = 0) -> str:
    """Return the estimate for weights, gradients and optimizer of one rank with `num_parameters` parameters.

    Bytes per parameter: weight 4 (fp32) or 2, gradient 4, fp32 main copy 0 (fp32) or 4, two Adam moments 8.
    The distributed optimizer divides main copy and moments by the data-parallel size. `num_buffer_bytes` is
    what layers keep besides parameters. Activations are not included.
    """
    is_fp32 = args.params_dtype_name == "fp32"
    replicated = (4 if is_fp32 else 2) + 4
    sharded = (0 if is_fp32 else 4) + 8
    if getattr(args, "use_distributed_optimizer", False):
        sharded /= args.data_parallel_size * getattr(args, "context_parallel_size", 1)
    size = num_parameters * (replicated + sharded)
    return (
        f"Theoretical memory footprints: weight and optimizer={size / _MEGABYTE:.2f} MB "
        f"({replicated + sharded:.2f} bytes per parameter), buffers={num_buffer_bytes / _MEGABYTE:.2f} MB, "
        f"total without activations={(size + num_buffer_bytes) / _MEGABYTE:.2f} MB"
    )


class ProgressFile:
    """`SAVE/progress.txt` of `--log-progress`: tab-separated events of all jobs that worked on a run.

    Each line: time, Slurm job id, number of ranks, event. A save adds the iteration, TFLOP/s per rank of
    this job and since the first job's start, FLOPs and billions of tokens so far. Rank 0 writes.
    """

    def __init__(self, args: Namespace, state: TrainState) -> None:
        self._enabled = (
            bool(getattr(args, "log_progress", False)) and bool(args.save) and rank_and_size()[0] == 0
        )
        self._seq_length = args.seq_length
        self._started, self._flops_at_start = time.time(), state.num_floating_point_operations
        if self._enabled:
            self._path = Path(args.save) / "progress.txt"
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._append("Starting job")
            self._first_start = self._read_first_start()

    def _append(self, event: str) -> None:
        job = os.environ.get("SLURM_JOB_ID", "")
        stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        with open(self._path, "a") as stream:
            stream.write(f"{stamp}\tJob ID: {job}\t# GPUs: {rank_and_size()[1]}\t{event}\n")

    def _read_first_start(self) -> float:
        with open(self._path) as stream:
            return datetime.strptime(stream.readline().split("\t")[0], "%Y-%m-%d %H:%M:%S").timestamp()

    def saved(self, state: TrainState, *, scheduled: bool = False) -> None:
        """Append a line for the checkpoint just written (`scheduled`: handed to the async writer)."""
        if not self._enabled:
            return
        now, size, flops = time.time(), rank_and_size()[1], state.num_floating_point_operations
        job = (flops - self._flops_at_start) / (max(now - self._started, 1e-9) * 1e12 * size)
        cumulative = flops / (max(now - self._first_start, 1e-9) * 1e12 * size)
        tokens = state.consumed_train_samples * self._seq_length / 1e9
        event = "Saving async checkpoint" if scheduled else "Saved checkpoint"
        self._append(
            f"{event}\tIteration: {state.iteration}\tJob throughput: {job:.1f} TFLOP/s/GPU\t"
            f"Cumulative throughput: {cumulative:.1f} TFLOP/s/GPU\tFloating-point operations: {flops:.2e}\t"
            f"Tokens (in billions): {tokens:.2f}"
        )
