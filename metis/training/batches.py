"""From datasets to microbatches: which sample is read when, by which rank, and under which global number.

One idea: a *stream position* (how many samples the run has consumed before this one) decides everything. A
microbatch covers `micro_batch_size` consecutive positions; microbatch j of data-parallel rank d covers the
positions from `consumed + (j * dp + d) * micro_batch_size`. Nothing else is remembered, so a run that resumes
at `consumed`, with any layout and in the middle of a batch-size ramp-up, reads what the uninterrupted run
would have read.

Every batch carries `first_sample`, its first stream position: the logical coordinate that random numbers are
keyed by. Pipeline stages that read no data get the same coordinates from `CoordinateStream`, so all stages
agree.

Traps: `torch.utils.data.DataLoader` draws a seed from torch's global generator whenever an iterator starts,
which would make the random state depend on when validation first ran; a private generator prevents that.
Iterators start at the first request, so a split that is never read starts no worker processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from metis.errors import ConfigError, ShapeError

Batch = dict[str, Any]
SampleOrder = Callable[[int], "int | None"]

TRAINING_FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


class SequentialOrder:
    """Position p reads dataset index p; megatron-core's datasets are shuffled already (`single`)."""

    def __call__(self, position: int) -> int:
        """Dataset index at `position`."""
        return position


class ShuffledOrder:
    """Position p reads entry p mod size of a permutation that is drawn anew for each pass (`cyclic`).

    The permutation depends on `(seed, pass)` only, hence not on the parallel layout. Megatron's sampler
    shuffles inside one bucket per data-parallel rank instead, so its order changes with the layout.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self._pass = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def __call__(self, position: int) -> int:
        """Dataset index at `position`."""
        number, offset = divmod(position, self.size)
        if number != self._pass:
            self._permutation = np.random.default_rng([self.seed, number]).permutation(self.size)
            self._pass = number
        return int(self._permutation[offset])


class RepeatedOrder:
    """Position p reads index p mod period, or padding (None) where that is past the end of the dataset.

    A `period` that is the size rounded up to whole global batches makes each pass start at index 0 with a
    fresh
    batch: full validation.
    """

    def __init__(self, size: int, period: int) -> None:
        assert 1 <= size <= period
        self.size = size
        self.period = period

    def __call__(self, position: int) -> int | None:
        """Dataset index at `position`, or None for padding."""
        index = position % self.period
        return index if index < self.size else None


class MicrobatchSampler:
    """The microbatches of one data-parallel rank as lists of (stream position, dataset index).

    Stops before the first block of `micro_batch_size * dp_size` positions that is not complete below `end`
    (drop last); `end=None` never stops.
    """

    def __init__(
        self,
        order: SampleOrder,
        *,
        consumed: int,
        end: int | None,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        assert 0 <= dp_rank < dp_size and micro_batch_size > 0 and consumed >= 0
        self.order = order
        self.consumed = consumed
        self.end = end
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size

    def first_samples(self) -> Iterator[int]:
        """Stream positions at which this rank's microbatches begin."""
        block = self.micro_batch_size * self.dp_size
        start = self.consumed
        while self.end is None or start + block <= self.end:
            yield start + self.dp_rank * self.micro_batch_size
            start += block

    def __iter__(self) -> Iterator[list[tuple[int, int | None]]]:
        for first in self.first_samples():
            yield [
                (position, self.order(position)) for position in range(first, first + self.micro_batch_size)
            ]


class _PositionedDataset(torch.utils.data.Dataset):
    """A dataset indexed by (position, index); index None gives a sample whose loss is masked out entirely."""

    def __init__(self, dataset: Any, fields: Sequence[str]) -> None:
        self.dataset = dataset
        self.fields = tuple(fields)

    def __getitem__(self, key: tuple[int, int | None]) -> Batch:
        position, index = key
        sample = self.dataset[0 if index is None else index]
        item = {name: sample[name] for name in self.fields}
        if index is None:
            item["loss_mask"] = torch.zeros_like(item["loss_mask"])
        item["position"] = position
        return item


def _collate(samples: list[Batch]) -> Batch:
    batch = {name: torch.stack([s[name] for s in samples]) for name in samples[0] if name != "position"}
    batch["first_sample"] = samples[0]["position"]
    return batch


def _start_worker(worker_id: int) -> None:
    # A forked Rust tokenizer with its own threads warns or deadlocks; workers read ids and need no tokenizer
    # threads.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)


class BatchStream:
    """Microbatches of one rank, in stream order, read by `num_workers` processes (0: by this one).

    Batch fields, b = micro_batch_size, s = seq_length: `tokens`, `labels`, `position_ids` int64 [b, s];
    `loss_mask` fp32 [b, s]; `attention_mask` bool [b, 1, s, s], True = masked, only where documents are
    separated; `first_sample` int, the stream position of the first row.

    Raises:
        ConfigError: at the request after the last complete block, with the words of `exhausted`.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: MicrobatchSampler,
        *,
        fields: Sequence[str],
        num_workers: int,
        pin_memory: bool,
        exhausted: str = "",
    ) -> None:
        self._loader = torch.utils.data.DataLoader(
            _PositionedDataset(dataset, fields),
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=_start_worker if num_workers > 0 else None,
            generator=torch.Generator(),
        )
        self._exhausted = exhausted
        self._iterator: Iterator[Batch] | None = None

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._loader)
        try:
            return next(self._iterator)
        except StopIteration:
            raise ConfigError("--data-path", self._exhausted) from None


class CoordinateStream:
    """`{"first_sample": position}` per microbatch, for pipeline stages and model chunks that read no data."""

    def __init__(self, sampler: MicrobatchSampler, *, exhausted: str = "") -> None:
        self._iterator = sampler.first_samples()
        self._exhausted = exhausted

    def __iter__(self) -> CoordinateStream:
        return self

    def __next__(self) -> Batch:
        try:
            return {"first_sample": next(self._iterator)}
        except StopIteration:
            raise ConfigError("--data-path", self._exhausted) from None


def batch_on_this_cp_rank(batch: Batch, cp_rank: int, cp_size: int) -> Batch:
    """Keep this context-parallel rank's part of the sequence.

    The sequence is cut into 2 * cp_size chunks; rank r keeps chunks r and 2 * cp_size - 1 - r, which balances
    causal attention (`megatron.core.utils.get_batch_on_this_cp_rank`). Tensors are cut along dimension 1, the
    attention mask along its query dimension 2, everything else is kept. With cp_size > 1 the result has
    `position_index`, int64 [s / cp_size]: the global position of each local token. With cp_size 1 the batch
    comes back as it is.

    Raises:
        ShapeError: a sequence length that 2 * cp_size does not divide.
    """
    if cp_size == 1:
        return batch
    local = dict(batch)
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            continue
        dim = 2 if name == "attention_mask" else 1
        index = cp_position_index(value.shape[dim], cp_rank, cp_size).to(value.device)
        local[name] = value.index_select(dim, index)
        local.setdefault("position_index", index)
    return local


def cp_position_index(seq_length: int, cp_rank: int, cp_size: int) -> torch.Tensor:
    """Global positions, int64 [seq_length / cp_size], of the tokens that `cp_rank` holds, in local order."""
    if seq_length % (2 * cp_size):
        raise ShapeError(
            "--seq-length",
            f"must be divisible by 2 * context-parallel size = {2 * cp_size}, got {seq_length}; "
            "change one of them",
        )
    chunk = seq_length // (2 * cp_size)
    chunks = torch.arange(seq_length).view(2 * cp_size, chunk)
    return torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])
