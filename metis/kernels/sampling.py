"""Which rows of a microbatch the next basis is made from, and those rows, without asking the host anything.

One idea: a boolean mask makes the host wait for the number of rows. Here the rows go to the first places of
an array of fixed size instead, in the order of the matrix, each with a one behind it that says the place is
used; all else is zero and adds nothing to any sum. The choice is that of
`metis.decompose.sampling.sample_rows`, row for row: the same hash, the same pinned rows, the same ties.

Three launches: the largest magnitude of every row; what a block of rows has, its largest key and how many of
its rows are sampled; then the choice and the copy. Each program of the last finds the pinned rows again, from
the blocks, because that is cheaper than a launch that does it once.

Traps:
* A number that changes from step to step may not be specialised (it would compile anew), nor change its type:
  the threshold, which needs 33 bits, travels as two numbers.
* Rows that find no place are dropped, those of the highest local index, which depends on the layout. With
  `metis.decompose.sampling.row_capacity` places that happens once in 1e18 microbatches.

Shape letters: M rows held here, A rows of the whole microbatch (over all ranks), K columns, n places.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metis.errors import ShapeError
from metis.kernels.arguments import as_signed, ceil_div, next_power_of_two, position_words, require_matrix
from metis.kernels.elementary import (
    EXPONENT_BITS,
    MAGNITUDE_BITS,
    QUIET_NAN_BITS,
    as_int_pointer,
    load_float32,
    load_position,
    magnitude_bits,
    philox4x32,
)
from metis.kernels.launching import Launcher
from metis.rng import NoisePosition

_AMAX_TILE = (8, 512)
_BLOCK_ROWS = 64
_MAX_BLOCKS = 4096
_MAX_COPY_COLUMNS = 2048
_BLOCKS_PER_WARP = 512


@triton.jit
def _row_amax_kernel(
    x,
    out,
    num_rows,
    num_cols,
    stride_r,
    IS_BF16: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    rows = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)
    inside = (rows < num_rows)[:, None]
    base = rows.to(tl.int64)[:, None] * stride_r
    largest = tl.zeros([TILE_R, TILE_C], dtype=tl.int32)
    for start in range(0, num_cols, TILE_C):
        cols = (start + tl.arange(0, TILE_C))[None, :]
        values = load_float32(x, base + cols, inside & (cols < num_cols), IS_BF16)
        largest = tl.maximum(largest, magnitude_bits(values))
    result = tl.max(largest, axis=1)
    result = tl.where(result > EXPONENT_BITS, QUIET_NAN_BITS, result)
    tl.store(as_int_pointer(out) + rows, result, mask=rows < num_rows)


@triton.jit
def _rank_keys(amax, index, rows, mask):
    """Return int64 keys that order rows as `pinned_rows` does: by amax, then the lower index; -1 outside."""
    bits = (tl.load(as_int_pointer(amax) + rows, mask=mask, other=0) & MAGNITUDE_BITS).to(tl.int64)
    bits = tl.where(bits > EXPONENT_BITS, QUIET_NAN_BITS, bits)
    lower_first = 0x7FFFFFFF - tl.load(index + rows, mask=mask, other=0).to(tl.int64)
    return tl.where(mask, (bits << 32) | lower_first, -1)


@triton.jit
def _are_sampled(index, rows, mask, position, threshold_high, threshold_low, key_0, key_1):
    """Return 1 for every row whose hash is below the threshold, else 0: int32."""
    k0 = key_0.to(tl.uint32, bitcast=True)
    k1 = key_1.to(tl.uint32, bitcast=True)
    c2, c3 = load_position(position)
    threshold = (threshold_high.to(tl.int64) << 16) + threshold_low
    row = tl.load(index + rows, mask=mask, other=0).to(tl.uint32)
    word, _, _, _ = philox4x32(tl.full(row.shape, 0xFFFFFFFF, tl.uint32), row, c2, c3, k0, k1)
    return ((word.to(tl.int64) < threshold) & mask).to(tl.int32)


@triton.jit(
    do_not_specialize=("threshold_high", "threshold_low", "key_0", "key_1"),
    do_not_specialize_on_alignment=("position",),
)
def _sum_up_kernel(
    amax,
    index,
    tops,
    counts,
    position,
    shift,
    num_all,
    threshold_high,
    threshold_low,
    key_0,
    key_1,
    BLOCK: tl.constexpr,
):
    """Write the largest key of a block of rows, and how many of them their hash samples."""
    rows = tl.program_id(0) * BLOCK - shift + tl.arange(0, BLOCK)
    mask = (rows >= 0) & (rows < num_all)
    sampled = _are_sampled(index, rows, mask, position, threshold_high, threshold_low, key_0, key_1)
    tl.store(tops + tl.program_id(0), tl.max(_rank_keys(amax, index, rows, mask), axis=0))
    tl.store(counts + tl.program_id(0), tl.sum(sampled, axis=0))


@triton.jit(
    do_not_specialize=("threshold_high", "threshold_low", "key_0", "key_1"),
    do_not_specialize_on_alignment=("position",),
)
def _take_rows_kernel(
    x,
    amax,
    index,
    tops,
    counts,
    out,
    position,
    first,
    shift,
    num_rows,
    num_all,
    num_cols,
    stride_r,
    stride_out,
    num_places,
    num_blocks,
    threshold_high,
    threshold_low,
    key_0,
    key_1,
    IS_BF16: tl.constexpr,
    NUM_PINNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    blocks, inside = tl.arange(0, BLOCKS), tl.arange(0, BLOCK)
    first_block = (first + shift) // BLOCK
    own_block = first_block + tl.program_id(0)
    # Places taken by rows before this program's: those that hashes sample, and pinned rows that they do not.
    is_before = (blocks >= first_block) & (blocks < own_block)
    place = tl.sum(tl.load(counts + blocks, mask=is_before, other=0), axis=0)
    # The key of the last pinned row: each round takes the largest that is left, and its block names the next.
    left = tl.load(tops + blocks, mask=blocks < num_blocks, other=-1)
    cut = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    for _ in range(NUM_PINNED):
        cut = tl.max(left, axis=0)
        block = tl.max(tl.where(left == cut, blocks, 0), axis=0)
        rows = block * BLOCK - shift + inside
        mask = (rows >= 0) & (rows < num_all)
        keys = _rank_keys(amax, index, rows, mask)
        sampled = _are_sampled(index, rows, mask, position, threshold_high, threshold_low, key_0, key_1)
        is_new = (keys == cut) & mask & (sampled == 0) & (block >= first_block) & (block < own_block)
        place += tl.sum(is_new.to(tl.int32), axis=0)
        left = tl.where(blocks == block, tl.max(tl.where(keys < cut, keys, -1), axis=0), left)
    own = tl.program_id(0) * BLOCK
    mask = own + inside < num_rows
    keys = _rank_keys(amax, index, first + own + inside, mask)
    sampled = _are_sampled(index, first + own + inside, mask, position, threshold_high, threshold_low, key_0,
                           key_1)  # fmt: skip
    chosen = (((sampled > 0) | (keys >= cut)) & mask).to(tl.int32)
    order = tl.cumsum(chosen, axis=0) * chosen
    one = 0x3F80 if IS_BF16 else 1
    mark = tl.full([], one, tl.int32).to(out.dtype.element_ty)
    for number in range(1, tl.minimum(tl.sum(chosen, axis=0), num_places - place) + 1):
        row = own + tl.sum(tl.where(order == number, inside, 0), axis=0)
        source = x + row.to(tl.int64) * stride_r
        target = out + (place + number - 1).to(tl.int64) * stride_out
        for start in range(0, num_cols, TILE_C):
            cols = start + tl.arange(0, TILE_C)
            tl.store(target + cols, tl.load(source + cols, mask=cols < num_cols), mask=cols < num_cols)
        tl.store(target + num_cols, mark)


_launch_row_amax, _launch_sum_up, _launch_take_rows = (
    Launcher(kernel) for kernel in (_row_amax_kernel, _sum_up_kernel, _take_rows_kernel)
)


def row_amax(x: Tensor) -> Tensor:
    """Return the largest magnitude of every row, fp32 [M]; a row with a NaN gives the NaN 0x7FC00000.

    x: [M, K] fp32, bf16 or fp16, contiguous along K.
    """
    _require_rows("row_amax", x)
    num_rows, num_cols = x.shape
    out = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    height, width = _AMAX_TILE
    _launch_row_amax(
        (ceil_div(num_rows, height), 1), (x, out, num_rows, num_cols, x.stride(0)),
        (x.dtype == torch.bfloat16, height, width), num_warps=4,
    )  # fmt: skip
    return out


def take_rows(
    x: Tensor,
    amax: Tensor,
    index: Tensor,
    *,
    key: tuple[int, int],
    position: NoisePosition,
    threshold: int,
    num_pinned_rows: int,
    num_places: int,
    num_mark_columns: int,
    first: int = 0,
) -> Tensor:
    """Return the sampled and the pinned rows of x in the first of n places: [n, K + num_mark_columns] in x's
    dtype.

    x: [M, K] as for `row_amax`. amax: fp32 [A] and index: int32 [A], of all rows of the microbatch, of which
    x holds those from `first` on. key, position: of the hash; threshold in [0, 2^32]: a row whose word is
    below it is sampled. Column K is one where the place is used, and all else is zero.
    """
    _require_rows("take_rows", x)
    num_rows, num_cols = x.shape
    num_all = amax.numel()
    if index.shape != amax.shape or index.dtype != torch.int32 or first + num_rows > num_all:
        raise ShapeError(
            "take_rows",
            f"needs an amax and an int32 index of all rows, received {tuple(amax.shape)} maxima, "
            f"{tuple(index.shape)} {index.dtype} for rows {first} to {first + num_rows}",
        )
    block = max(_BLOCK_ROWS, next_power_of_two(ceil_div(num_all, _MAX_BLOCKS - 1)))
    shift = -first % block  # so that the rows held here begin with a block
    num_blocks = ceil_div(num_all + shift, block)
    words, device = position_words(position, x.device), x.device
    volatile = threshold >> 16, threshold & 0xFFFF, as_signed(key[0]), as_signed(key[1])
    tops = torch.empty(num_blocks, dtype=torch.int64, device=device)
    counts = torch.empty(num_blocks, dtype=torch.int32, device=device)
    _launch_sum_up(
        (num_blocks, 1), (amax, index, tops, counts, words, shift, num_all), (block,), volatile, num_warps=1
    )
    out = torch.zeros(num_places, num_cols + num_mark_columns, dtype=x.dtype, device=device)
    padded_blocks = next_power_of_two(num_blocks)
    _launch_take_rows(
        (ceil_div(num_rows, block), 1),
        (x, amax, index, tops, counts, out, words, first, shift, num_rows, num_all, num_cols, x.stride(0),
         out.stride(0), num_places, num_blocks),
        (x.dtype == torch.bfloat16, num_pinned_rows, block, padded_blocks,
         min(_MAX_COPY_COLUMNS, next_power_of_two(num_cols))),
        volatile, num_warps=max(1, padded_blocks // _BLOCKS_PER_WARP),
    )  # fmt: skip
    return out


def _require_rows(where: str, x: Tensor) -> None:
    require_matrix(where, x, (1, 1), None)
    if x.stride(1) != 1:
        raise ShapeError(where, f"needs a row-major matrix, received strides {x.stride()}")
