"""Bring up a run: device, process groups, seeds, microbatch calculator. Importing this file imports torch.

Order matters: the patches of megatron-core go in before any of its model code is imported (it decides at
import whether functions are compiled), and process groups exist before anything collective.
"""

from __future__ import annotations

import datetime
import logging
import os
import random
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

import megatron_patches
from metis.errors import ConfigError

PIPELINE_SEED_STRIDE = 100  # the reference trainer's: stages draw different dropout masks


def select_device(args: Namespace) -> None:
    """Resolve `args.device` and `args.distributed_backend`, bind this process to its GPU.

    Raises ConfigError when a GPU is asked for and none is there, or NCCL without GPUs.
    """
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda":
        count = torch.cuda.device_count()
        if args.local_rank >= count:
            raise ConfigError(
                "--device",
                f"needs one GPU per process on a node, received local rank {args.local_rank} and {count} "
                "visible GPUs; "
                "start fewer processes or use --device cpu",
            )
        torch.cuda.set_device(args.local_rank)
    if args.distributed_backend == "auto":
        args.distributed_backend = "nccl" if args.device == "cuda" else "gloo"
    if args.distributed_backend == "nccl" and args.device == "cpu":
        raise ConfigError("--distributed-backend", "must be gloo (or auto) on the CPU, received nccl")


_EXPECTED_WARNINGS = (
    # Both are optional, and what takes their place is printed at start.
    r".*(Apex|Transformer Engine|TransformerEngine).*not installed.*",
    # megatron-core 0.16.1 fills its own config field with a value that it calls deprecated.
    r"full scope is deprecated",
    # It warns about Transformer Engine's attention whatever the implementation in use.
    r"If you are using transformer_engine as the transformer implementation, the core_attn",
    # Names that torch has replaced and megatron-core still uses; they work as before.
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    r"`load_state_dict` is deprecated",
    r"Please use DTensor instead",
    # Its distributed optimizer keeps gradients on the slices of parameters that a rank owns.
    r"The \.grad attribute of a Tensor that is not a leaf Tensor",
)
"""Python warnings that a user of the trainer can do nothing about."""

_EXPECTED_ON_CPU = (
    r"When using sequence parallelism it is recommended to set .* CUDA_DEVICE_MAX_CONNECTIONS",
)
"""Advice about GPUs."""

_EXPECTED_MESSAGES = (
    # Announced at warning level; the machine is switched off here.
    ("megatron.core.rerun_state_machine", "RerunStateMachine initialized"),
    # True of all mock data, which live in memory.
    ("megatron.core.datasets.gpt_dataset", "Unable to save MockGPTDataset indexes"),
)
"""(logger, first words) of log records of the same kind."""


def _silence_expected_warnings(device: str) -> None:
    for message in _EXPECTED_WARNINGS + (_EXPECTED_ON_CPU if device == "cpu" else ()):
        warnings.filterwarnings("ignore", message=message)
    for name, start in _EXPECTED_MESSAGES:
        logging.getLogger(name).addFilter(_Dropped(start))


@dataclass(frozen=True, slots=True)
class _Dropped:
    """Log filter that drops records beginning with `start`; equal filters are added to a logger once."""

    start: str

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.start)


def initialize(args: Namespace) -> None:
    """Patch the engine, create all process groups, seed all generators."""
    select_device(args)
    _silence_expected_warnings(args.device)
    megatron_patches.apply_patches(args.device)
    if args.exact_reductions:
        megatron_patches.patch_exact_grad_norm()
    _initialize_distributed(args)
    if args.cuda_graph_impl == "local" and args.device == "cuda":
        # Autograd adds gradients on the stream that the model was built on, and the default one can be part
        # of no capture: so everything runs on another.
        torch.cuda.set_stream(torch.cuda.Stream())
    _set_seeds(args)
    if args.deterministic_mode:
        # cuBLAS repeats its bits only with a fixed workspace, read when the first matrix is multiplied.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # Transformer Engine's attention
        torch.use_deterministic_algorithms(True)

    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.rerun_state_machine import RerunMode, initialize_rerun_state_machine

    init_num_microbatches_calculator(
        args.rank,
        args.rampup_batch_size,
        args.global_batch_size,
        args.micro_batch_size,
        args.data_parallel_size,
    )
    initialize_rerun_state_machine(mode=RerunMode.DISABLED)


def _initialize_distributed(args: Namespace) -> None:
    from megatron.core import parallel_state

    timeout = datetime.timedelta(minutes=args.distributed_timeout_minutes)
    if dist.is_initialized():
        pass  # a caller that makes several runs in one process group
    elif args.world_size == 1 and "MASTER_ADDR" not in os.environ:
        # Alone and started without a launcher: no port to agree on, and none to collide with.
        dist.init_process_group(
            args.distributed_backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    else:
        dist.init_process_group(
            args.distributed_backend, rank=args.rank, world_size=args.world_size, timeout=timeout
        )
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
        create_gloo_process_groups=True,
    )
    if args.rank == 0:
        print(
            f"using world size: {args.world_size}, data-parallel size: {args.data_parallel_size}, "
            f"context-parallel size: {args.context_parallel_size}, "
            f"tensor-model-parallel size: {args.tensor_model_parallel_size}, "
            f"pipeline-model-parallel size: {args.pipeline_model_parallel_size}, "
            f"device: {args.device}, backend: {args.distributed_backend}",
            flush=True,
        )


def lower_timeout(args: Namespace) -> None:
    """Give all process groups the timeout `--distributed-timeout-seconds-after-init`; collective.

    Called after the first iteration, which takes longer than all others.
    """
    from megatron.core import parallel_state

    seconds = args.distributed_timeout_seconds_after_init
    if seconds is None:
        return
    dist.barrier()
    if args.device == "cuda":
        torch.cuda.synchronize()
    # torch has no public way; this is the one that megatron-core's `update_pg_timeout` takes (GPUs only).
    for group in (None, *parallel_state._global_process_group_list[1:]):
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def _set_seeds(args: Namespace) -> None:
    from megatron.core import parallel_state, tensor_parallel

    seed = args.seed + PIPELINE_SEED_STRIDE * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


_AT_SHUT_DOWN: list[Callable[[], object]] = []


def at_shut_down(release: Callable[[], object]) -> None:
    """Have `release` called once, by the next `shut_down`, while all process groups still exist."""
    _AT_SHUT_DOWN.append(release)


def shut_down(*, keep_process_group: bool = False) -> None:
    """Undo `initialize`: drop model-parallel groups, calculators and, unless kept, the process group."""
    while _AT_SHUT_DOWN:
        _AT_SHUT_DOWN.pop()()
    if not dist.is_initialized():
        return  # it failed before there was anything to undo
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine

    num_microbatches_calculator.destroy_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()
    parallel_state.destroy_model_parallel()
    if not keep_process_group:
        dist.destroy_process_group()
