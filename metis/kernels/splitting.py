"""Splitting in one launch: P = x V, R = x - P V^T, its largest magnitude and R F, of whole rows.

One idea: a program that holds whole rows knows their P, so it may subtract at once: x comes from memory the
first time and from the cache the second, and neither partial sums nor another launch are needed. P and R have
the bits of `metis.kernels.projection`, whose chunks and tiles these are; partial sums of R F are one instead
of several.

Only for many rows: each program does a tile of them from one end to the other, and there must be more tiles
than multiprocessors (`MIN_ROWS`).

Trap: the largest magnitude of all rows is found by the program that comes last, from a scratch number that
every launch finds zero and leaves zero. So launches on one device must not overlap.

Shape letters: M rows, K features, r columns of V, q columns of F, C chunks (up to 8).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from metis.errors import ShapeError
from metis.kernels.arguments import ceil_div, is_native
from metis.kernels.elementary import EXPONENT_BITS, QUIET_NAN_BITS, exact_bf16_bits, round_to_bf16
from metis.kernels.launching import Key, Launcher, Prepared, layout
from metis.kernels.projection import padded, project_chunk, require_factors, subtract_head

MIN_ROWS = 16384
"""Two tiles and more for each of the 132 multiprocessors of a Hopper GPU."""

MAX_CHUNKS = 8
MAX_COLUMNS = 128
"""Of V and F together, which one program can hold."""

_COPIED_TOGETHER = 8
"""bf16 numbers in the widest word."""

_BLOCK_ROWS, _BLOCK_FEATURES, _NUM_WARPS, _NUM_STAGES = 64, 64, 4, 3


@triton.jit
def _split_kernel(
    x,
    v,
    f,
    p,
    beside,
    residual,
    amax,
    sums,
    scratch,
    num_rows,
    num_features,
    stride_r,
    stride_v,
    stride_f,
    beside_stride,
    rank,
    num_f,
    width,
    chunk,
    num_parts,
    IS_BF16: tl.constexpr,
    NATIVE: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BESIDE: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    RANK: tl.constexpr,
    NUM_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, columns = tl.arange(0, BLOCK_R), tl.arange(0, RANK)
    row_start = tl.program_id(0) * BLOCK_R
    row_mask = (row_start + rows < num_rows)[:, None]
    x += row_start.to(tl.int64) * stride_r
    residual += row_start.to(tl.int64) * num_features
    # Chunks are added pairwise, neighbours first: what waits for its neighbour, one for each level.
    single = tl.zeros([BLOCK_R, RANK], dtype=tl.float32)
    pair = tl.zeros([BLOCK_R, RANK], dtype=tl.float32)
    four = tl.zeros([BLOCK_R, RANK], dtype=tl.float32)
    total = tl.zeros([BLOCK_R, RANK], dtype=tl.float32)
    for index in range(NUM_CHUNKS):
        first = project_chunk(x, v, index, row_mask, stride_r, stride_v, rank, width, chunk, num_parts,
                              IS_BF16, NATIVE, EVEN, RANK, BLOCK_R, BLOCK_K)  # fmt: skip
        second = single + first
        third = pair + second
        if NUM_CHUNKS == 1:
            total = first
        elif NUM_CHUNKS == 2:
            total = second
        elif NUM_CHUNKS == 4:
            total = third
        else:
            total = four + third
        four = tl.where(index == 3, third, four)
        pair = tl.where((index & 3) == 1, second, pair)
        single = tl.where((index & 1) == 0, first, single)
    rounded = round_to_bf16(total, NATIVE)
    if not EVEN:  # an infinity times no column of V is NaN
        rounded = tl.where((columns < rank)[None, :], rounded, 0.0)
    bits = exact_bf16_bits(rounded)
    mask = row_mask & (columns < rank)[None, :]
    tl.store(p + row_start.to(tl.int64) * rank + rows[:, None] * rank + columns[None, :], bits, mask=mask)
    if HAS_BESIDE:
        beside += row_start.to(tl.int64) * beside_stride
        tl.store(beside + rows[:, None] * beside_stride + columns[None, :], bits, mask=mask)
    if IS_BF16 and NATIVE:
        coefficients = bits.to(tl.bfloat16, bitcast=True)
    else:
        coefficients = rounded
    end = tl.cdiv(num_features, BLOCK_K) * BLOCK_K
    largest, product = subtract_head(x, v, f, residual, coefficients, 0, end, row_mask, num_features,
                                     stride_r, stride_v, stride_f, rank, num_f, IS_BF16, NATIVE, EVEN, RANK,
                                     NUM_F, BLOCK_R, BLOCK_K)  # fmt: skip
    if NUM_F > 0:
        f_columns = tl.arange(0, NUM_F)
        sums += row_start.to(tl.int64) * num_f
        tl.store(sums + rows[:, None] * num_f + f_columns[None, :], product,
                 mask=row_mask & (f_columns < num_f)[None, :])  # fmt: skip
    result = tl.max(tl.max(largest, axis=1), axis=0)
    tl.atomic_max(scratch, tl.where(result > EXPONENT_BITS, QUIET_NAN_BITS, result))
    if tl.atomic_add(scratch + 1, 1) == tl.num_programs(0) - 1:
        tl.store(amax, tl.atomic_xchg(scratch, 0).to(tl.float32, bitcast=True))
        tl.atomic_xchg(scratch + 1, 0)


_splits = Launcher(_split_kernel)


@lru_cache(maxsize=16)
def _scratch(device: torch.device) -> Tensor:
    """Return int32 [2], zero between launches: bits of a magnitude, and how many programs are done."""
    with torch.inference_mode(False):
        return torch.zeros(2, dtype=torch.int32, device=device)


def can_split(x: Tensor, v: Tensor, factor: Tensor | None, num_chunks: int) -> bool:
    """Whether `split` takes these, and is worth it."""
    columns = v.shape[1] + (0 if factor is None else factor.shape[1])
    if x.shape[0] < MIN_ROWS or num_chunks > MAX_CHUNKS or columns > MAX_COLUMNS:
        return False
    # What the copy engine cannot take goes through registers, and ptxas 12.8 compiles that wrongly
    # (tests/gpu/machine_code.py finds it at 200 features and 7 columns of F).
    if any(t is not None and t.stride(0) % _COPIED_TOGETHER for t in (x, v, factor)):
        return False
    # Made before anything is captured: a replay must not find what another one has freed.
    return not x.is_cuda or not torch.cuda.is_current_stream_capturing() or _scratch.cache_info().currsize > 0


def split(
    x: Tensor,
    v: Tensor,
    num_chunks: int,
    parts: int = 1,
    beside: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (P, amax of R, R, sums of R F), all of the feature axis.

    x: [M, K] bf16 or fp32, contiguous along K, `parts` matrices side by side. v: [K, r], factor: [K, q],
    bf16, contiguous along r and q. num_chunks: C, of every part. beside: where P goes as well, bf16 [M, r],
    contiguous along r. P: bf16 [M, r]. amax: fp32 0-dim (NaN propagates). R: as x. Sums: fp32 [1, M, q], for
    `place`.
    """
    key = (layout(x), layout(v), layout(beside), layout(factor), num_chunks, parts)
    ready = _splits.ready(key) or _prepare(key, x, v, num_chunks, parts, beside, factor)
    p = torch.empty(x.shape[0], v.shape[1], dtype=torch.bfloat16, device=x.device)
    amax = torch.empty((), dtype=torch.float32, device=x.device)
    residual = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = None
    if factor is not None:
        sums = torch.empty(1, x.shape[0], factor.shape[1], dtype=torch.float32, device=x.device)
    ready((x, v, factor, p, beside, residual, amax, sums, _scratch(x.device)))
    return p, amax, residual, sums


def _prepare(
    key: Key,
    x: Tensor,
    v: Tensor,
    num_chunks: int,
    parts: int,
    beside: Tensor | None,
    factor: Tensor | None,
) -> Prepared:
    require_factors("split", x, v)
    if factor is not None:
        require_factors("split", x, factor)
    num_rows, num_features = x.shape
    width = num_features // parts
    if num_features % parts or width % num_chunks or num_chunks not in (1, 2, 4, MAX_CHUNKS):
        raise ShapeError(
            "split",
            f"{num_features} features must divide into {parts} parts of 1, 2, 4 or 8 chunks, received "
            f"{num_chunks} chunks",
        )
    rank, num_f = v.shape[1], 0 if factor is None else factor.shape[1]
    chunk = width // num_chunks
    is_even = num_rows % _BLOCK_ROWS == 0 and chunk % _BLOCK_FEATURES == 0
    is_even = is_even and rank == padded(rank) and num_f == padded(num_f)
    return _splits.prepare(
        key, (ceil_div(num_rows, _BLOCK_ROWS), 1),
        (num_rows, num_features, x.stride(0), v.stride(0), 0 if factor is None else factor.stride(0),
         0 if beside is None else beside.stride(0), rank, num_f, width, chunk, parts),
        (x.dtype == torch.bfloat16, is_native(x), is_even, beside is not None, num_chunks, padded(rank),
         padded(num_f), _BLOCK_ROWS, _BLOCK_FEATURES),
        num_warps=_NUM_WARPS, num_stages=_NUM_STAGES,
    )  # fmt: skip
