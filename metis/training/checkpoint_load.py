"""Loading a checkpoint: find it, refuse what cannot fit, read it, put every piece back.

One idea: rank 0 looks first. It reads the small files (tracker, run config, `common.pt`, `.metadata`),
checks that all shards have their full length and that model, recipe and layout fit, and every rank raises
the same one-line error or goes on; only then are weights read.

Traps: weights load at any layout, optimizer state only as it was stored (`fully_reshardable` at any,
`dp_reshardable` at the same tensor and pipeline size), random state only at the same (tensor, pipeline)
sizes and device. Word embeddings may differ in padding, which depends on the tensor-parallel size;
megatron-core allows that.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from metis.errors import CheckpointError
from metis.training import checkpoint_content as content
from metis.training import retention
from metis.training.outputs import print_rank_0
from metis.training.run_config import PARALLEL_FIELDS, SHAPE_FIELDS, check_compatible, read_run_config
from metis.training.state import TrainState

_EXTRA_STATE = "_extra_state"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What rank 0 has learnt about the checkpoint."""

    directory: str
    root: str
    iteration: int
    release: bool
    finetune: bool
    config: dict[str, Any]
    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...] | None]
    """Of every stored tensor, by key; None for objects."""

    @property
    def keys(self) -> frozenset[str]:
        """Names of all stored tensors and objects."""
        return frozenset(self.shapes)


def load_checkpoint(
    args: Namespace,
    state: TrainState,
    model: list[torch.nn.Module],
    optimizer: Any,
    scheduler: Any,
    *,
    prepare: Callable[[int], Any] | None = None,
) -> bool:
    """Load what `--load` (or `--pretrained-checkpoint`) names; return whether a checkpoint was there.
    Collective.

    Fills `state`, the model chunks, optimizer, scheduler and random state in place. `--finetune`, converted
    (`release`) and pretrained weights start at iteration 0 with a fresh optimizer; `--no-load-optim` and
    `--no-load-rng` leave out that part. `optimizer` and `scheduler` may be None (evaluation, conversion).
    `prepare` is called with the number of steps done (0 for fresh starts) before the model's state is
    described.

    Raises CheckpointError on all ranks for a damaged or incompatible checkpoint, and for a missing one under
    `--exit-on-missing-checkpoint`.
    """
    if not getattr(args, "load", None) and not getattr(args, "pretrained_checkpoint", None):
        return False
    found = _look(args)
    if found is None:
        return False
    print_rank_0(f" loading distributed checkpoint from {found.root} at iteration {found.iteration}")
    fresh = found.release or found.finetune
    if prepare is not None:
        prepare(0 if fresh else found.iteration)
    load_optimizer = optimizer is not None and not fresh and not getattr(args, "no_load_optim", False)
    load_rng = not fresh and not getattr(args, "no_load_rng", False) and _rng_fits(args, found)
    if load_optimizer and found.iteration == 0:
        print_rank_0("  the checkpoint was made before the first step: the optimizer starts fresh")
        load_optimizer = False
    if load_optimizer:
        content.agree(found.directory, _optimizer_obstacle(args, found))
    sharded = content.build_sharded_state_dict(
        model, optimizer if load_optimizer else None, found.metadata, rng=load_rng, is_loading=True
    )
    tolerated = _drop_absent(sharded, found)
    loaded = _read(args, sharded, found)
    _restore_model(model, loaded, tolerated, found)
    if load_optimizer:
        _restore_optimizer(optimizer, scheduler, loaded, found)
    elif optimizer is not None and not getattr(optimizer, "is_stub_optimizer", False):
        optimizer.reload_model_params()
    if load_rng:
        content.restore_rng_state(loaded[content.RNG_KEY])
    if not fresh:
        _restore_state(state, loaded)
        if scheduler is not None and not load_optimizer:  # its place in the schedule is the run's
            scheduler.step(increment=state.consumed_train_samples - state.skipped_train_samples)
    dist.barrier()
    print_rank_0(
        f"  successfully loaded checkpoint from {found.root} {content.model_parallel_position()} "
        f"at iteration {state.iteration}"
    )
    return True


def _look(args: Namespace) -> _Found | None:
    """Examine the checkpoint on rank 0; return the findings, or None after the warning when there is none."""
    found, error, where = None, None, str(args.load or args.pretrained_checkpoint)
    if dist.get_rank() == 0:
        try:
            found = _examine(args)
        except CheckpointError as failure:
            error, where = failure.message, failure.where
    where = content.from_rank_0(where)
    content.agree(where, error)
    found = content.from_rank_0(found)
    if found is None:
        tracker = Path(where) / retention.TRACKER_NAME
        if getattr(args, "exit_on_missing_checkpoint", False):
            raise CheckpointError(
                str(tracker), "must exist under --exit-on-missing-checkpoint, and it does not"
            )
        print_rank_0(f"WARNING: could not find the metadata file {tracker}")
        print_rank_0("    will not load any checkpoints and will start from random")
    return found


def _examine(args: Namespace) -> _Found | None:
    root, finetune = args.load, bool(getattr(args, "finetune", False))
    located = None
    if root:
        try:
            retention.recover_interrupted_swap(root)
        except OSError as error:
            raise CheckpointError(str(root), f"must be a readable directory, received: {error}") from error
        located = retention.find_checkpoint(root, getattr(args, "ckpt_step", None))
    pretrained = getattr(args, "pretrained_checkpoint", None)
    if located is None and pretrained:
        root, finetune = pretrained, True
        located = retention.find_checkpoint(root, None)
        if located is None:
            raise CheckpointError(
                "--pretrained-checkpoint", f"must hold a checkpoint, received none in {root}"
            )
    if located is None:
        return None
    directory, iteration, release = located
    config = read_run_config(directory)
    if config is not None:
        check_compatible(str(directory), config, args, finetune=finetune or release)
    shapes = _verify_files(directory)
    common = _read_common(directory)
    if config is None:
        stored = vars(common["args"]) if "args" in common else {}
        config = {
            "model": {name: stored[name] for name in SHAPE_FIELDS if name in stored},
            "parallel": {name: stored[name] for name in PARALLEL_FIELDS if name in stored},
            "training": {name: stored[name] for name in ("params_dtype_name",) if name in stored},
        }
        check_compatible(str(directory), config, args, finetune=True)
    return _Found(
        directory=str(directory),
        root=str(root),
        iteration=0 if release else int(common.get("iteration", iteration)),
        release=release,
        finetune=finetune,
        config=config,
        metadata=dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {},
        shapes=shapes,
    )


def _read_common(directory: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load_common_state_dict(str(directory))
    except Exception as error:  # unpickling a damaged file can raise nearly anything
        raise CheckpointError(
            str(directory / "common.pt"), f"is damaged or missing: {content.describe_cause(error)}"
        ) from error


def _verify_files(directory: Path) -> dict[str, tuple[int, ...] | None]:
    """Check that every shard file is as long as `.metadata` says; return the shape of every stored tensor by
    key, None for objects.
    """
    try:
        metadata = FileSystemReader(str(directory)).read_metadata()
    except Exception as error:
        raise CheckpointError(
            str(directory / ".metadata"), f"is damaged or missing: {content.describe_cause(error)}"
        ) from error
    needed: dict[str, int] = {}
    for storage in metadata.storage_data.values():
        end = storage.offset + storage.length
        needed[storage.relative_path] = max(end, needed.get(storage.relative_path, 0))
    for name, size in sorted(needed.items()):
        path = directory / name
        actual = path.stat().st_size if path.is_file() else None
        if actual is None or actual < size:
            received = "no such file" if actual is None else f"{actual} bytes"
            raise CheckpointError(
                str(path),
                f"is damaged: must have {size} bytes, received {received}; use --ckpt-step for another",
            )
    # Objects are stored under `key/shard_i_n`, tensors under their key.
    return {
        key.split("/shard_")[0]: tuple(value.size) if isinstance(value, TensorStorageMetadata) else None
        for key, value in metadata.state_dict_metadata.items()
    }


def _rng_fits(args: Namespace, found: _Found) -> bool:
    parallel = found.config["parallel"]
    stored = (parallel.get("tensor_model_parallel_size", 1), parallel.get("pipeline_model_parallel_size", 1))
    current = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
    if stored != current:
        print_rank_0(
            f"(TP, PP) mismatch after resume ({current} vs {stored} from checkpoint): RNG state ignored"
        )
        return False
    device, stored_device = getattr(args, "device", None), parallel.get("device")
    if stored_device is not None and stored_device != device:
        print_rank_0(
            f"device mismatch after resume ({device} vs {stored_device} from checkpoint): RNG state ignored"
        )
        return False
    if content.RNG_KEY not in found.keys:
        print_rank_0("the checkpoint holds no RNG state: it is left as initialized")
        return False
    return True


def _optimizer_obstacle(args: Namespace, found: _Found) -> str | None:
    """Return why the stored optimizer state cannot be loaded into this run, or None."""
    way_out = "pass --no-load-optim for weights and iteration, or --finetune for weights alone"
    if not any(key.startswith(("optimizer.", "chained_")) for key in found.keys):
        return f"holds no optimizer state (--no-save-optim?); {way_out}"
    parallel, training = found.config["parallel"], found.config.get("training", {})
    sharding = found.metadata.get("distrib_optim_sharding_type")
    distributed = bool(getattr(args, "use_distributed_optimizer", False))
    if (sharding is not None) != distributed:
        saved = "with" if sharding is not None else "without"
        return f"was saved {saved} --use-distributed-optimizer, this run must be too; {way_out}"
    if sharding == content.DP_RESHARDABLE:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            if parallel.get(name, getattr(args, name)) != getattr(args, name):
                return (
                    f"holds dp_reshardable optimizer state, which needs {name} {parallel[name]}, received "
                    f"{getattr(args, name)}; save with --dist-ckpt-optim-fully-reshardable, or {way_out}"
                )
    stored_dtype, dtype = training.get("params_dtype_name"), getattr(args, "params_dtype_name", None)
    if sharding is None and stored_dtype not in (None, dtype):
        return f"holds the optimizer state of {stored_dtype} parameters, received {dtype}; {way_out}"
    return None


def _drop_absent(sharded: dict[str, Any], found: _Found) -> set[str]:
    """Take what the checkpoint does not hold out of `sharded`; return the model entries that keep their
    fresh values.

    Extra state (which other layer implementations lack) may be absent. With other weights as the start,
    buffers such as basis state may be absent or of another size (another rank). Anything else raises
    CheckpointError on all ranks.
    """
    keys, fresh = found.keys, found.finetune or found.release

    def is_buffer(value: Any) -> bool:
        return isinstance(value, ShardedTensor) and not isinstance(value.data, torch.nn.Parameter)

    def absent(value: Any) -> bool:
        if not isinstance(value, ShardedBase):
            return False
        resized = fresh and is_buffer(value) and found.shapes.get(value.key) != tuple(value.global_shape)
        return resized or not _keys_of(value) <= keys

    tolerated: set[str] = set()
    refused: list[str] = []
    for part in list(sharded):
        entries = sharded[part] if isinstance(sharded[part], dict) else {part: sharded[part]}
        missing, present = extract_matching_values(entries, absent)
        if not _num_leaves(missing):
            continue
        sharded[part] = present
        for name, value in missing.items() if part.startswith("model") else ():
            if _EXTRA_STATE in name or (fresh and is_buffer(value)):
                tolerated.add(name)
            else:
                refused.append(name)
        if not part.startswith("model"):
            refused += sorted({key for value in nested_values(missing) for key in _keys_of(value)} - keys)
    error = None
    if refused:
        shown = ", ".join(sorted(refused)[:5]) + (f" and {len(refused) - 5} more" if len(refused) > 5 else "")
        error = f"lacks what this run needs: {shown}; give the run the options it was saved with"
    content.agree(found.directory, error)
    buffers = sorted(name for name in tolerated if _EXTRA_STATE not in name)
    if buffers:
        print_rank_0(
            f"  {len(buffers)} buffers are not in the checkpoint, or of another size there, and start fresh, "
            f"{buffers[0]} the first"
        )
    return tolerated


def _num_leaves(tree: Any) -> int:
    return sum(1 for _ in nested_values(tree))


def _keys_of(value: ShardedBase) -> set[str]:
    if isinstance(value, ShardedTensorFactory):
        return {part.key for part in nested_values(value.build())}
    assert isinstance(value, (ShardedTensor, ShardedObject)), type(value)
    return {value.key}


def _read(args: Namespace, sharded: dict[str, Any], found: _Found) -> dict[str, Any]:
    strategy = get_default_load_sharded_strategy(found.directory)
    if getattr(args, "ckpt_fully_parallel_load", False):
        strategy = FullyParallelLoadStrategyWrapper(strategy, content.data_parallel_group())
    error, loaded = None, None
    try:
        strictness = getattr(args, "dist_ckpt_strictness", None) or "assume_ok_unexpected"
        loaded = dist_checkpointing.load(sharded, found.directory, strategy, strict=strictness)
    except (
        CheckpointException,
        Exception,
    ) as failure:  # torch's is a BaseException; each rank may raise its own
        error = f"could not be read: {content.describe_cause(failure)}"
    content.agree(found.directory, error)
    return loaded[0] if isinstance(loaded, tuple) else loaded


def _restore_model(
    model: list[torch.nn.Module], loaded: dict[str, Any], tolerated: set[str], found: _Found
) -> None:
    problems: list[str] = []
    for key, chunk in zip(content.model_keys(model), unwrap_model(model), strict=True):
        result = chunk.load_state_dict(loaded[key], strict=False)
        missing = [name for name in result.missing_keys if _EXTRA_STATE not in name and name not in tolerated]
        problems += [f"{name} was not loaded" for name in missing]
        problems += [f"{name} has no place in the model" for name in result.unexpected_keys]
    content.agree(found.directory, "; ".join(problems[:5]) or None)


def _restore_optimizer(optimizer: Any, scheduler: Any, loaded: dict[str, Any], found: _Found) -> None:
    if not getattr(optimizer, "is_stub_optimizer", False):
        optimizer.load_state_dict(loaded["optimizer"])
    error = None
    if scheduler is not None:
        try:
            scheduler.load_state_dict(loaded["opt_param_scheduler"])
        except AssertionError as failure:
            error = (
                f"has another schedule ({failure}); pass --override-opt_param-scheduler to use this "
                "run's values or --use-checkpoint-opt_param-scheduler to use the stored ones"
            )
    content.agree(found.directory, error)


def _restore_state(state: TrainState, loaded: dict[str, Any]) -> None:
    if "train_state" in loaded:
        state.restore(loaded["train_state"])
        return
    stored = vars(loaded["args"])
    names = ("consumed_train_samples", "consumed_valid_samples", "skipped_train_samples")
    state.restore({name: stored[name] for name in names if stored.get(name) is not None})
    state.iteration = int(loaded["iteration"])
    state.num_floating_point_operations = float(loaded.get("num_floating_point_operations_so_far", 0))
