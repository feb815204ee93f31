"""Splitting in one launch: P = x V, R = x - P V^T, its largest magnitude and R F, of whole rows.

One idea: a program that holds whole rows knows their P, so it may subtract at once: x comes from memory the
first time and from the cache the second, and neither partial sums nor another launch are needed. P and R have
the bits of `metis.kernels.projection`, whose chunks these are, summed in the same order; partial sums of R F
are one instead of several.

Only for many rows: each program does a tile of them from one end to the other, and there must be more tiles
than multiprocessors (`MIN_ROWS`).

Trap: the largest magnitude of all rows is found by the program that comes last, from a scratch number that
every launch finds zero and leaves zero; there is one for each stream.

Shape letters: M rows, K features, r columns of V, q columns of F, C chunks (up to 8).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metis.errors import ShapeError
from metis.kernels.arguments import ceil_div, is_native
from metis.kernels.elementary import EXPONENT_BITS, QUIET_NAN_BITS, exact_bf16_bits, round_to_bf16
from metis.kernels.launching import Key, Launcher, Prepared, layout
from metis.kernels.projection import (
    ALIGNMENT,
    is_aligned,
    load_operand,
    padded,
    require_factors,
    subtract_head,
)

MIN_ROWS = 16384
"""256 tiles: about two for each of the 132 multiprocessors of a Hopper GPU."""

MAX_CHUNKS = 8
MAX_COLUMNS = 64
"""Of V and of F, padded: what one program holds beside a tile without spilling."""

_BLOCK_ROWS, _NUM_WARPS = 64, 4
_NARROW_TILE, _WIDE_TILE = (64, 4), (128, 3)
"""Features of a tile, and stages of the software pipeline; found on one H200."""

_MOST_COLUMNS_OF_WIDE = 64
"""Of V and F together, padded: more leave room for one program on a multiprocessor only."""


@triton.jit
def project_rows(
    x,
    v,
    row_mask,
    stride_r,
    stride_v,
    rank,
    width,
    chunk,
    num_parts,
    IS_BF16: tl.constexpr,
    NATIVE: tl.constexpr,
    EVEN: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return x V, fp32 [BLOCK_R, RANK]: chunks summed as `project` does, and added pairwise as `fold` does.

    One loop over the tiles of all chunks, so that reading ahead does not stop where a chunk ends.
    """
    rows, columns, block = tl.arange(0, BLOCK_R), tl.arange(0, RANK), tl.arange(0, BLOCK_K)
    tiles = tl.cdiv(chunk, BLOCK_K)
    last = num_parts * tiles - 1
    # What waits for its neighbour, one for each level of the tree.
    single = tl.zeros([BLOCK_R, RANK], dtype=tl.float32)
    pair = tl.zeros([BLOCK_R, RANK], dtype=tl.float32)
    four = tl.zeros([BLOCK_R, RANK], dtype=tl.float32)
    total = tl.zeros([BLOCK_R, RANK], dtype=tl.float32)
    for number in range(NUM_CHUNKS * num_parts * tiles):
        index, within = number // (last + 1), number % (last + 1)
        start = (within % tiles) * BLOCK_K
        first = (within // tiles) * width + index * chunk + start
        mask = start + block < chunk
        tile = load_operand(x + first, rows[:, None] * stride_r + block[None, :], row_mask & mask[None, :],
                            IS_BF16, NATIVE, EVEN)  # fmt: skip
        basis = load_operand(v + first.to(tl.int64) * stride_v,
                             block[:, None] * stride_v + columns[None, :],
                             mask[:, None] & (columns < rank)[None, :], True, NATIVE and IS_BF16,
                             EVEN)  # fmt: skip
        total = tl.dot(tile, basis, tl.where(within == 0, 0.0, total), input_precision="ieee")
        if NUM_CHUNKS > 1:
            is_done = within == last
            two = single + total
            if NUM_CHUNKS > 2:
                three = pair + two
                if NUM_CHUNKS > 4:
                    four = tl.where(is_done & (index == 3), three, four)
                pair = tl.where(is_done & ((index & 3) == 1), two, pair)
            single = tl.where(is_done & ((index & 1) == 0), total, single)
    if NUM_CHUNKS > 1:
        total = single + total
    if NUM_CHUNKS > 2:
        total = pair + total
    if NUM_CHUNKS > 4:
        total = four + total
    return total


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
    EVEN_CHUNKS: tl.constexpr,
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
    total = project_rows(x, v, row_mask, stride_r, stride_v, rank, width, chunk, num_parts, IS_BF16, NATIVE,
                         EVEN_CHUNKS, NUM_CHUNKS, RANK, BLOCK_R, BLOCK_K)  # fmt: skip
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


_scratches: dict[tuple[int, int], Tensor] = {}


def _scratch_key(x: Tensor) -> tuple[int, int]:
    """Return device and stream: launches of one stream do not overlap."""
    return x.get_device(), torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0


def _scratch(x: Tensor) -> Tensor:
    """Return int32 [2], zero between launches: bits of a magnitude, and how many programs are done."""
    key = _scratch_key(x)
    if key not in _scratches:
        with torch.inference_mode(False):
            _scratches[key] = torch.zeros(2, dtype=torch.int32, device=x.device)
    return _scratches[key]


def can_split(x: Tensor, v: Tensor, factor: Tensor | None, num_chunks: int) -> bool:
    """Whether `split` takes these, and is worth it."""
    if x.shape[0] < MIN_ROWS or num_chunks > MAX_CHUNKS or not _is_covered(x, v, factor):
        return False
    # Made before anything is captured: a replay must not find what another one has freed.
    key = _scratch_key(x)
    return key in _scratches or not x.is_cuda or not torch.cuda.is_current_stream_capturing()


def _is_covered(*tensors: Tensor | None) -> bool:
    """Whether x, V and F are such that the copy engine takes them and nothing spills.

    What goes through registers instead is compiled wrongly by ptxas 12.8, which tests/gpu/machine_code.py
    finds at 200 features and at a matrix that begins one number late.
    """
    given = [t for t in tensors if t is not None]
    is_bf16 = all(t.dtype == torch.bfloat16 for t in given)
    return is_bf16 and is_aligned(*given) and all(padded(t.shape[1]) <= MAX_COLUMNS for t in given[1:])


def split(
    x: Tensor,
    v: Tensor,
    num_chunks: int,
    parts: int = 1,
    beside: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (P, amax of R, R, sums of R F), all of the feature axis.

    x: [M, K] bf16, contiguous along K, `parts` matrices side by side. v: [K, r], factor: [K, q],
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
    ready((x, v, factor, p, beside, residual, amax, sums, _scratch(x)))
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
    if not _is_covered(x, v, factor):
        raise ShapeError(
            "split",
            f"needs bf16 matrices whose sizes, strides and addresses are multiples of {ALIGNMENT}, and up "
            f"to {MAX_COLUMNS} columns, received x {tuple(x.shape)} {x.dtype}, v {tuple(v.shape)} and factor "
            f"{None if factor is None else tuple(factor.shape)}; use project, fold and residual",
        )
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
    columns = padded(rank), padded(num_f)
    is_wide = chunk > _NARROW_TILE[0] and sum(columns) <= _MOST_COLUMNS_OF_WIDE
    block_features, num_stages = _WIDE_TILE if is_wide else _NARROW_TILE
    is_even = num_rows % _BLOCK_ROWS == 0 and (rank, num_f) == columns
    evens = is_even and chunk % block_features == 0, is_even and num_features % block_features == 0
    return _splits.prepare(
        key, (ceil_div(num_rows, _BLOCK_ROWS), 1),
        (num_rows, num_features, x.stride(0), v.stride(0), 0 if factor is None else factor.stride(0),
         0 if beside is None else beside.stride(0), rank, num_f, width, chunk, parts),
        (x.dtype == torch.bfloat16, is_native(x), *evens, beside is not None, num_chunks, *columns,
         _BLOCK_ROWS, block_features),
        num_warps=_NUM_WARPS, num_stages=num_stages,
    )  # fmt: skip
