"""The run's data for this rank: datasets built by megatron-core, their index cache, one iterator per split.

One idea: megatron-core builds the datasets (`GPTDataset`, `BlendedMegatronDatasetBuilder`), `data_source`
says what to build, `batches` says who reads what when; this module joins the three and makes every rank
agree, so that an error found by one rank is raised by all.

Traps:
- Index files are written by global rank 0 only and read by everybody: their directory must be shared between
  nodes.
- The printed index hash names the order of the samples: another hash on resume means another order.
- A blend with a cache directory asks torch.distributed for its rank even in a single process;
  `ensure_process_group` gives tools a process group of one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import socket
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from metis.errors import ConfigError
from metis.training.batches import (
    TRAINING_FIELDS,
    BatchStream,
    CoordinateStream,
    MicrobatchSampler,
    RepeatedOrder,
    SequentialOrder,
    ShuffledOrder,
    batch_on_this_cp_rank,
)
from metis.training.data_source import SPLITS, DataSource, checked_source, sample_counts, token_entropy_nats
from metis.training.validation_checks import warn

if TYPE_CHECKING:
    from metis.training.state import TrainState

__all__ = [
    "Stream",
    "batch_on_this_cp_rank",
    "build_data_iterators",
    "build_datasets",
    "ensure_process_group",
    "token_entropy_nats",
]

Stream = BatchStream | CoordinateStream
# One stream, one per virtual pipeline chunk, or None where the split does not exist.
Streams = Stream | list[Stream] | None
T = TypeVar("T")

_NUM_DIGESTED = 4
"""Samples by which an order is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataLayout:
    """This rank's place: data-parallel coordinates, and which of its model chunks read data."""

    dp_rank: int
    dp_size: int
    chunk_needs_data: tuple[bool, ...]

    @classmethod
    def current(cls, args: Namespace) -> DataLayout:
        """Read it from megatron-core; a process without model-parallel groups is the only rank.

        Only the first chunk of the first stage (tokens) and the last chunk of the last stage (labels) need
        data, and every chunk where documents have masks of their own.
        """
        from megatron.core import parallel_state

        if not parallel_state.model_parallel_is_initialized():
            return cls(dp_rank=0, dp_size=1, chunk_needs_data=(True,))
        stage = parallel_state.get_pipeline_model_parallel_rank()
        last_stage = parallel_state.get_pipeline_model_parallel_world_size() - 1
        num_chunks = getattr(args, "virtual_pipeline_model_parallel_size", None) or 1
        return cls(
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            chunk_needs_data=tuple(
                (stage == 0 and chunk == 0)
                or (stage == last_stage and chunk == num_chunks - 1)
                or getattr(args, "reset_attention_mask", False)
                for chunk in range(num_chunks)
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitDatasets:
    """Datasets by split number (None on ranks that read none) and their sizes, which every rank knows."""

    datasets: tuple[Any, Any, Any]
    sizes: tuple[int, int, int]


def build_data_iterators(
    args: Namespace, state: TrainState, tokenizer: Any
) -> tuple[Streams, Streams, Streams]:
    """Build this rank's training, validation and test iterators; collective, every rank must call it.

    The training stream starts at `state.consumed_train_samples`, validation at
    `state.consumed_valid_samples`, test at 0. Validation and test repeat from their beginning when they run
    out. With virtual pipeline stages each result is a list with one iterator per model chunk. Chunks that
    read no data get batches with `first_sample` alone. A split with no samples to read is None. With
    `--full-validation`, `args.eval_iters` becomes the number of global batches in one pass over the
    validation set; `args.test_eval_iters` keeps the number asked for.

    Raises:
        ConfigError: on every rank alike, when the options contradict each other, a file is missing, a split
            has no documents, the cache directory cannot be used, or the data holds fewer samples than the run
            asks for.
    """
    layout = DataLayout.current(args)
    counts = sample_counts(args)
    built = build_datasets(args, tokenizer, counts, built_here=any(layout.chunk_needs_data))
    _check_training_size(args, counts[0], built.sizes[0])
    _compare_order(args, state, built)
    period = built.sizes[1]
    args.test_eval_iters = args.eval_iters
    if args.eval_iters and getattr(args, "full_validation", False) and built.sizes[1]:
        args.eval_iters = -(-built.sizes[1] // args.global_batch_size)
        period = args.eval_iters * args.global_batch_size

    train = valid = test = None
    if built.sizes[0] and not getattr(args, "skip_train", False):
        train = _streams(args, layout, built, 0, state.consumed_train_samples, built.sizes[0])
    if built.sizes[1]:
        valid = _streams(args, layout, built, 1, state.consumed_valid_samples, period)
    if built.sizes[2]:
        test = _streams(args, layout, built, 2, 0, built.sizes[2])
    return train, valid, test


def _streams(
    args: Namespace, layout: DataLayout, built: SplitDatasets, split: int, consumed: int, period: int
) -> Streams:
    size = built.sizes[split]
    order, end = RepeatedOrder(size, max(period, size)), None
    if split == 0:
        cyclic = getattr(args, "dataloader_type", None) == "cyclic"
        order, end = (ShuffledOrder(size, args.seed), None) if cyclic else (SequentialOrder(), size)
    exhausted = (
        f"all {size} training samples are consumed; lower --train-iters or --train-samples, or add data"
    )
    fields = (*TRAINING_FIELDS, "attention_mask") if args.reset_attention_mask else TRAINING_FIELDS
    streams: list[Stream] = []
    for needs_data in layout.chunk_needs_data:
        sampler = MicrobatchSampler(
            order,
            consumed=consumed,
            end=end,
            micro_batch_size=args.micro_batch_size,
            dp_rank=layout.dp_rank,
            dp_size=layout.dp_size,
        )
        if not needs_data:
            streams.append(CoordinateStream(sampler, exhausted=exhausted))
            continue
        streams.append(
            BatchStream(
                built.datasets[split],
                sampler,
                fields=fields,
                num_workers=args.num_workers,
                pin_memory=getattr(args, "device", "cpu") == "cuda",
                exhausted=exhausted,
            )
        )
    return streams if getattr(args, "virtual_pipeline_model_parallel_size", None) else streams[0]


def _check_training_size(args: Namespace, asked: int, size: int) -> None:
    if (
        size >= asked
        or getattr(args, "dataloader_type", None) == "cyclic"
        or getattr(args, "skip_train", False)
    ):
        return
    raise ConfigError(
        "--data-path",
        f"a blend without weights is read once: its train part holds {size} samples of {args.seq_length} "
        f"tokens, the run asks for {asked}; give weights (they repeat the data), add data, or run less",
    )


def _compare_order(args: Namespace, state: TrainState, built: SplitDatasets) -> None:
    """Warn where a run goes on in data that lies in another order than before, and note the order."""
    is_cyclic = getattr(args, "dataloader_type", None) == "cyclic"
    order = _on_rank_zero(lambda: _digest(built.datasets[0], with_size=is_cyclic))
    if state.consumed_train_samples and order and state.data_order not in ("", order):
        warn(
            args,
            "the training samples lie in another order than before the resume, because the data or the "
            f"number of passes over it has changed: after {state.consumed_train_samples} samples some come "
            "again and some later; ask for the whole length from the start and leave early with "
            "--exit-interval",
        )
    state.data_order = order or state.data_order


def _digest(dataset: Any, *, with_size: bool) -> str:
    """Return a digest of the first samples, and of their number; nothing without data."""
    if dataset is None or not len(dataset):
        return ""
    digest = hashlib.sha256(str(len(dataset) if with_size else "").encode())
    for index in range(min(_NUM_DIGESTED, len(dataset))):
        digest.update(np.asarray(dataset[index]["tokens"]).tobytes())
    return digest.hexdigest()[:16]


def build_datasets(
    args: Namespace, tokenizer: Any, counts: tuple[int, int | None, int], *, built_here: bool = True
) -> SplitDatasets:
    """Build the three datasets; collective when a process group exists, rank 0 first so that it writes the
    caches.

    Args:
        args: the run's options.
        tokenizer: gives the vocabulary size, the end-of-document id and its part of the cache description.
        counts: samples asked for per split; None means one whole pass.
        built_here: whether this rank reads data. Rank 0 always builds.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset

    wanted = tuple(count is None or count > 0 for count in counts)
    source = _on_rank_zero(lambda: checked_source(args, counts))
    cache = _on_rank_zero(lambda: _writable_cache_directory(args, source))
    _check_cache_visible(cache)
    parts = [(source, wanted)]
    if counts[1] is None and source.blend is not None and source.blend[1] is not None:
        # megatron-core takes one blend for all splits, and no weights where it makes one whole pass.
        whole = dataclasses.replace(source, blend=(source.blend[0], None))
        parts = [(source, (wanted[0], False, wanted[2])), (whole, (False, True, False))]
    datasets: tuple[Any, ...] = (None, None, None)
    for part, kept in parts:
        builder = BlendedMegatronDatasetBuilder(
            MockGPTDataset if part.is_mock else GPTDataset,
            [count if keep else 0 for count, keep in zip(counts, kept, strict=True)],
            lambda: built_here or _rank() == 0,
            _dataset_config(args, tokenizer, part, cache, kept),
        )
        built = builder.build()
        datasets = tuple(new if keep else old for new, old, keep in zip(built, datasets, kept, strict=True))
    sizes = _on_rank_zero(lambda: tuple(0 if d is None else len(d) for d in datasets))
    if _rank() == 0:
        _report(datasets, counts, cache)
    return SplitDatasets(datasets=datasets, sizes=sizes)


def _dataset_config(
    args: Namespace, tokenizer: Any, source: DataSource, cache: str | None, wanted: tuple[bool, ...]
) -> Any:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    blend_per_split = source.blend_per_split
    if blend_per_split is not None:
        blend_per_split = [
            blend if keep else None for blend, keep in zip(blend_per_split, wanted, strict=True)
        ]
        valid = blend_per_split[1]
        if getattr(args, "full_validation", False) and valid is not None:
            blend_per_split[1] = (valid[0], None)  # one pass over each dataset, whatever its weight
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=source.blend,
        blend_per_split=blend_per_split,
        split=source.split,
        num_dataset_builder_threads=getattr(args, "num_dataset_builder_threads", 1),
        path_to_cache=cache,
        mmap_bin_files=getattr(args, "mmap_bin_files", True),
        tokenizer=tokenizer,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        # Causal masking is implied by the attention; a mask in memory is needed only to separate documents.
        create_attention_mask=args.reset_attention_mask,
        full_validation=getattr(args, "full_validation", False),
        mid_level_dataset_surplus=getattr(args, "mid_level_dataset_surplus", 0.005),
    )
    if config.split_matrix is not None:  # a part that nobody reads need not have documents
        config.split_matrix = [
            part if keep else None for part, keep in zip(config.split_matrix, wanted, strict=True)
        ]
    return config


def _writable_cache_directory(args: Namespace, source: DataSource) -> str | None:
    """Directory of index files: `--data-cache-path`, else `cache/GPTDataset_indices` by the first dataset."""
    cache = args.data_cache_path
    if cache is None:
        if source.is_mock:
            return None
        blend = next(blend for blend in map(source.blend_of, range(3)) if blend is not None)
        cache = os.path.join(os.path.dirname(os.path.abspath(blend[0][0])), "cache", "GPTDataset_indices")
    try:
        os.makedirs(cache, exist_ok=True)
        probe = os.path.join(cache, f".write-probe-{os.getpid()}")
        with open(probe, "w"):
            pass
        os.remove(probe)
    except OSError as error:
        raise ConfigError(
            "--data-cache-path",
            f"must be a writable directory on storage that all nodes share, got {cache} ({error.strerror}); "
            "name another one with --data-cache-path",
        ) from error
    return cache


def _check_cache_visible(cache: str | None) -> None:
    if cache is None or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    blind: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(blind, None if os.path.isdir(cache) else socket.gethostname())
    hosts = sorted({host for host in blind if host is not None})
    if hosts:
        raise ConfigError(
            "--data-cache-path",
            f"{cache} must be on storage that all nodes share, {', '.join(hosts)} cannot see it; "
            "name a shared directory",
        )


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _on_rank_zero(compute: Callable[[], T]) -> T:
    """Compute on global rank 0 and give every rank the result, or the same ConfigError."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return compute()
    outcome: list[Any] = [None, None]
    if _rank() == 0:
        try:
            outcome[0] = compute()
        except ConfigError as error:
            outcome[1] = (error.where, error.message)
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ConfigError(*outcome[1])
    return outcome[0]


def ensure_process_group() -> None:
    """Start a gloo group of one for single-process tools, unless a process group exists."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )


def _report(datasets: tuple[Any, ...], counts: tuple[int | None, ...], cache: str | None) -> None:
    """Print per split: samples asked for and prepared, passes over the data, and the index hash."""
    for name, dataset, count in zip(SPLITS, datasets, counts, strict=True):
        if dataset is None:
            continue
        indices = getattr(dataset, "indices", None)
        passes = "" if indices is None else f", {len(dataset.document_index) // len(indices)} pass(es)"
        asked = "all" if count is None else count
        print(
            f" > {name} data: {asked} samples asked for, {len(dataset)} prepared{passes}, "
            f"index {dataset.unique_description_hash[:8]}",
            flush=True,
        )
    print(f" > index cache: {cache or 'none (mock data)'}", flush=True)
