"""What a checkpoint holds, as megatron-core's sharded state dict, and how ranks agree on an error.

One idea: saving and loading describe the same content through one function, `build_sharded_state_dict`, so
they cannot drift apart. Weights and optimizer state describe themselves (`sharded_state_dict`), Metis
layers with their basis state included; this module adds counters, schedule, random state and arguments in
the reference trainer's names.

Traps: the arguments land in `common.pt`, which is read back with weights-only unpickling, hence plain
values only. Keys that differ between ranks (rank, local_rank) are left out, for megatron-core compares the
common part across ranks. Random state belongs to a (pipeline, tensor) position, where all
data-parallel ranks hold the same one, and has no meaning at any other.
"""

from __future__ import annotations

import random
from argparse import Namespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from metis.errors import CheckpointError
from metis.training.state import TrainState

CHECKPOINT_VERSION = 3.0
FULLY_RESHARDABLE = "fully_reshardable"
DP_RESHARDABLE = "dp_reshardable"
NO_SHARDING = "none"
EXTRA_STATE = "_extra_state"

RNG_KEY = "rng_state"
FULLY_RESHARDABLE_MAX_PARAMETERS = 13_000_000_000
"""Up to this model size gathering the optimizer state on save is cheap enough to be the default."""

_RANK_FIELDS = ("rank", "local_rank")
_PLAIN = (str, int, float, bool, type(None))


def agree(where: str, error: str | None) -> None:
    """Raise CheckpointError(where, ...) on every rank if any rank passes an error; a collective call."""
    if not dist.is_initialized():
        errors: list[Any] = [error]
    else:
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    failed = [(rank, text) for rank, text in enumerate(errors) if text is not None]
    if failed:
        rank, text = failed[0]
        raise CheckpointError(where, text if len(errors) == 1 else f"{text} (on rank {rank})")


def describe_cause(error: BaseException) -> str:
    """Return the innermost cause of `error` in one line, without the traceback that torch adds."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def from_rank_0(value: Any) -> Any:
    """Return rank 0's `value` on every rank; a collective call."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def optimizer_sharding_type(args: Namespace, model: list[torch.nn.Module]) -> str:
    """Return how optimizer state is laid out: `fully_reshardable`, `dp_reshardable`, or `none` without
    ZeRO-1.

    `args.dist_ckpt_optim_fully_reshardable` decides; None chooses by the number of parameters, summed over
    the model-parallel ranks (replicated ones count once per rank, which errs towards `dp_reshardable`).
    """
    if getattr(args, "no_save_optim", False) or not getattr(args, "use_distributed_optimizer", False):
        return NO_SHARDING
    choice = getattr(args, "dist_ckpt_optim_fully_reshardable", None)
    if choice is None:
        count = sum(parameter.numel() for chunk in model for parameter in chunk.parameters())
        total = torch.tensor([count], dtype=torch.int64, device=getattr(args, "device", "cpu"))
        dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
        choice = total.item() <= FULLY_RESHARDABLE_MAX_PARAMETERS
    return FULLY_RESHARDABLE if choice else DP_RESHARDABLE


def content_metadata(sharding_type: str) -> dict[str, Any]:
    """Return what decides the form of the sharded state dicts; stored with the checkpoint, used again on
    load.
    """
    metadata: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if sharding_type != NO_SHARDING:
        metadata["distrib_optim_sharding_type"] = sharding_type
    return metadata


def data_parallel_group() -> dist.ProcessGroup:
    """Return the ranks that hold the same model shard, data- and context-parallel together."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def model_parallel_position() -> str:
    """Return `[ t a/b, p c/d ]`, this rank's tensor and pipeline position counted from 1."""
    tensor_rank = parallel_state.get_tensor_model_parallel_rank() + 1
    pipeline_rank = parallel_state.get_pipeline_model_parallel_rank() + 1
    return (
        f"[ t {tensor_rank}/{parallel_state.get_tensor_model_parallel_world_size()}, "
        f"p {pipeline_rank}/{parallel_state.get_pipeline_model_parallel_world_size()} ]"
    )


def model_keys(model: list[torch.nn.Module]) -> list[str]:
    """Return the names of the model chunks: `model`, or `model0`, `model1`, ... with virtual stages."""
    return ["model"] if len(model) == 1 else [f"model{index}" for index in range(len(model))]


def without_extra_state(sharded: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a module but the `_extra_state` objects of Transformer Engine.

    They hold scaling state of its FP8 recipes, which are not used here. Kept per layer as pieces of one
    object, they would make a checkpoint of a model that has its modules in some layers only impossible, and
    tie a checkpoint to the implementation that wrote it.
    """
    return {name: value for name, value in sharded.items() if not name.endswith(EXTRA_STATE)}


def build_sharded_state_dict(
    model: list[torch.nn.Module],
    optimizer: Any,
    metadata: dict[str, Any],
    *,
    rng: bool,
    is_loading: bool = False,
) -> dict[str, Any]:
    """Return model chunks, optimizer state (unless `optimizer` is None) and, with `rng`, random state, all
    sharded.

    `metadata` is `content_metadata`'s or the stored one. The optimizer's sharded dict needs the model's, so
    both are built here in that order.
    """
    metadata = {**metadata, "dp_cp_group": data_parallel_group()}
    sharded: dict[str, Any] = {}
    for key, chunk in zip(model_keys(model), unwrap_model(model), strict=True):
        sharded[key] = without_extra_state(chunk.sharded_state_dict(metadata=metadata))
    if optimizer is not None:
        sharded["optimizer"] = optimizer.sharded_state_dict(
            dict(sharded), is_loading=is_loading, metadata=metadata
        )
    if rng:
        sharded[RNG_KEY] = _sharded_rng_state()
    return sharded


def common_content(args: Namespace, state: TrainState, scheduler: Any) -> dict[str, Any]:
    """Return the part that is the same on all ranks, under the reference trainer's names plus
    `train_state`.
    """
    stored = {name: plain(value) for name, value in vars(args).items() if name not in _RANK_FIELDS}
    stored.update(
        iteration=state.iteration,
        consumed_train_samples=state.consumed_train_samples,
        consumed_valid_samples=state.consumed_valid_samples,
        skipped_train_samples=state.skipped_train_samples,
    )
    common: dict[str, Any] = {
        "args": Namespace(**stored),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": state.iteration,
        "num_floating_point_operations_so_far": state.num_floating_point_operations,
        "train_state": state.to_dict(),
    }
    if scheduler is not None:
        common["opt_param_scheduler"] = scheduler.state_dict()
    return common


def plain(value: Any) -> Any:
    """Return `value` in types that weights-only unpickling accepts; other objects become their text."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return str(value)


def _sharded_rng_state() -> ShardedObject:
    states: dict[str, Any] = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        states["cuda_rng_state"] = torch.cuda.get_rng_state()
    pipeline_size = parallel_state.get_pipeline_model_parallel_world_size()
    tensor_size = parallel_state.get_tensor_model_parallel_world_size()
    return ShardedObject(
        RNG_KEY,
        [states],
        (pipeline_size, tensor_size),
        (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def restore_rng_state(stored: list[dict[str, Any]]) -> None:
    """Set Python's, NumPy's, torch's and megatron-core's generators to what `_sharded_rng_state` has
    stored.
    """
    states = stored[0]
    random.setstate(_as_tuple(states["random_rng_state"]))
    np.random.set_state(states["np_rng_state"])
    torch.set_rng_state(states["torch_rng_state"])
    if torch.cuda.is_available() and "cuda_rng_state" in states:
        torch.cuda.set_rng_state(states["cuda_rng_state"])
    if states["rng_tracker_states"]:
        tensor_parallel.get_cuda_rng_tracker().set_states(states["rng_tracker_states"])


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, (list, tuple)) else value
