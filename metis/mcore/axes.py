"""Logical axes of the parallel linears: which columns, rows and tokens a rank holds, in Hugging Face order.

The engine stores fused projections in its own order (query groups interleave q, k and v; each rank stacks its
piece of gate on its piece of up). Random bits are looked up by logical coordinates, so each local position is
mapped to the index it has in the unfused, unsharded matrices stacked as Hugging Face names them: q, k, v and
gate, up.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from metis.operand import Axis


def compress(indices: list[int]) -> tuple[tuple[int, int], ...]:
    """Return the runs (first, length) of consecutive integers in `indices`, in order."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][0] + runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([index, 1])
    return tuple((first, length) for first, length in runs)


def sharded_axis(size: int, *, shard: int, num_shards: int, group: Any, parts: int = 1) -> Axis:
    """Return an axis cut evenly over ranks; with two `parts` a rank holds a piece of both (gate|up)."""
    width = size // parts
    local = width // num_shards
    runs = tuple((part * width + shard * local, local) for part in range(parts))
    return Axis(size=size, runs=runs, parts=parts, shard=shard, num_shards=num_shards, group=group)


@lru_cache(maxsize=8)
def _qkv_order(num_groups: int, heads_per_group: int, head_dim: int) -> tuple[int, ...]:
    """Return the Hugging Face row of every row of the engine's fused qkv matrix."""
    num_q = num_groups * heads_per_group * head_dim
    num_k = num_groups * head_dim
    order: list[int] = []
    for group in range(num_groups):
        first = group * heads_per_group * head_dim
        order.extend(range(first, first + heads_per_group * head_dim))
        order.extend(range(num_q + group * head_dim, num_q + (group + 1) * head_dim))
        order.extend(range(num_q + num_k + group * head_dim, num_q + num_k + (group + 1) * head_dim))
    return tuple(order)


def qkv_axis(
    num_groups: int, heads_per_group: int, head_dim: int, *, shard: int, num_shards: int, group: Any
) -> Axis:
    """Return the output axis of the fused qkv projection: query groups in order, cut evenly over ranks."""
    order = _qkv_order(num_groups, heads_per_group, head_dim)
    local = len(order) // num_shards
    runs = compress(list(order[shard * local : (shard + 1) * local]))
    return Axis(size=len(order), runs=runs, shard=shard, num_shards=num_shards, group=group)


@lru_cache(maxsize=64)
def token_axis(sequence: int, batch: int, *, cp_rank: int = 0, cp_size: int = 1, group: Any = None) -> Axis:
    """Return the token axis of hidden states [sequence, batch, h] flattened to rows: position * batch +
    sample.

    sequence: positions held by this rank. Under context parallelism the rank holds chunks i and 2 cp - 1 - i
    of the whole sequence (zigzag), each of sequence / 2 positions.
    """
    rows = sequence * batch
    if cp_size == 1:
        return Axis(size=rows, runs=((0, rows),))
    chunk = rows // 2
    runs = ((cp_rank * chunk, chunk), ((2 * cp_size - 1 - cp_rank) * chunk, chunk))
    return Axis(size=rows * cp_size, runs=runs, parts=2, shard=cp_rank, num_shards=cp_size, group=group)


@lru_cache(maxsize=64)
def sequence_shard_axis(
    tokens: Axis, *, tp_rank: int, tp_size: int, shard: int, num_shards: int, group: Any
) -> Axis:
    """Return the axis of the tokens that one rank holds under sequence parallelism.

    tokens: what the tensor-parallel ranks hold together (`token_axis`); each holds a contiguous tp_size-th of
    it. shard, num_shards, group: this rank among all that hold tokens of the microbatch (tensor and context
    parallel).
    """
    length = tokens.local_size // tp_size
    first, runs = tp_rank * length, []
    for start, run in tokens.runs:
        low, high = max(first, 0), min(first + length, run)
        if low < high:
            runs.append((start + low, high - low))
        first -= run
    return Axis(size=tokens.size, runs=tuple(runs), shard=shard, num_shards=num_shards, group=group)
