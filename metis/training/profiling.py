"""`--profile`: torch's profiler into the TensorBoard directory, or a range for nsys; memory history
snapshots.

For nsys, start the job under `nsys profile -s none -t cuda,nvtx --capture-range=cudaProfilerApi
--capture-range-end=stop`; the range is `[--profile-step-start, --profile-step-end)` on `--profile-ranks`.
"""

from __future__ import annotations

from argparse import Namespace
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from metis.errors import ConfigError


class Profiler:
    """Context manager around the training loop; call `after_step(iteration)` once per iteration.

    Raises ConfigError when the chosen profiler cannot work: torch's without `--tensorboard-dir`, nsys or
    memory history without a GPU.
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.active = bool(args.profile) and dist.get_rank() in args.profile_ranks
        self.torch_profiler: Any = None
        on_gpu = args.device == "cuda"
        if args.profile and args.use_pytorch_profiler and not args.tensorboard_dir:
            raise ConfigError("--use-pytorch-profiler", "needs --tensorboard-dir to write its trace to")
        if args.profile and not args.use_pytorch_profiler and not on_gpu:
            raise ConfigError("--profile", "without a GPU needs --use-pytorch-profiler (nsys sees CUDA only)")
        if args.record_memory_history and not on_gpu:
            raise ConfigError("--record-memory-history", "needs a GPU, received --device cpu")

    def __enter__(self) -> Profiler:
        args = self.args
        if args.record_memory_history:
            torch.cuda.memory._record_memory_history(max_entries=100_000)
        if self.active and args.use_pytorch_profiler:
            start, end = args.profile_step_start, args.profile_step_end
            schedule = torch.profiler.schedule(
                wait=max(start - 1, 0), warmup=1 if start > 0 else 0, active=end - start, repeat=1
            )
            self.torch_profiler = torch.profiler.profile(
                schedule=schedule,
                on_trace_ready=torch.profiler.tensorboard_trace_handler(args.tensorboard_dir),
                record_shapes=True,
            )
            self.torch_profiler.start()
        elif self.active and args.profile_step_start == 0:
            torch.cuda.cudart().cudaProfilerStart()
        return self

    def after_step(self, iteration: int) -> None:
        """Note that `iteration` steps are complete."""
        if self.torch_profiler is not None:
            self.torch_profiler.step()
        elif self.active and iteration == self.args.profile_step_start:
            torch.cuda.cudart().cudaProfilerStart()
        elif self.active and iteration == self.args.profile_step_end:
            torch.cuda.cudart().cudaProfilerStop()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.torch_profiler is not None:
            self.torch_profiler.stop()
        if self.args.record_memory_history and dist.get_rank() in self.args.profile_ranks:
            torch.cuda.memory._dump_snapshot(self.args.memory_snapshot_path)
