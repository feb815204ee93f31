"""NVFP4 with each block's maximum at 6 or at 4, whichever errs less: twin of `quantize(four_over_six=...)`.

One idea: both candidates are rounded in registers and compared there. The error of a block is a sum of fp32
numbers whose order is part of the specification (columns one after the other, then rows as a tree), so a
thread takes whole rows of blocks, as two halves of eight columns, and adds them in that order.

What the definition divides per number, this divides twice per block: a number decodes to the power of two
below its E2M1 value times that of 1 or of 1.5, exactly, because scaling by powers of two commutes with
rounding. Not where a product overflows or is subnormal: there (`_MIN_AMAX`, `_MAX_AMAX`) every number is
decoded by itself. x / 1536 is the fp64 product with 1/1536, rounded to fp32: no fp64 quotient by three times
a power of two lies so near the middle between two fp32 numbers that the second rounding could go wrong.

Shape letters: R rows, C columns of a tile; B = C / 16 blocks along them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metis import formats
from metis.kernels.arguments import (
    KernelOutput,
    ceil_div,
    empty_output,
    is_column_major,
    is_hopper,
    next_power_of_two,
)
from metis.kernels.blockwise import Tile, block_amax, spread_blocks, store_tile
from metis.kernels.elementary import (
    E4M3_MAX,
    EXPONENT_BITS,
    block_encode_scale,
    code_bits,
    code_of,
    e4m3_byte,
    exact_bf16_bits,
    larger_magnitude,
    load_float32,
    round_to_e2m1,
    round_to_e4m3,
    tensor_scales,
    with_sign,
)
from metis.kernels.launching import Launcher

_TARGET = tl.constexpr(formats.E2M1_MAX * formats.FOUR_OVER_SIX_E4M3_BOUND)
_RECIPROCAL_TARGET = tl.constexpr(1.0 / (formats.E2M1_MAX * formats.FOUR_OVER_SIX_E4M3_BOUND))
_RECIPROCAL_6 = tl.constexpr(1.0 / formats.E2M1_MAX)
_HALF = tl.constexpr(8)
_ONE_AND_A_HALF = tl.constexpr(0x00400000)
"""Set in the bits of 1.5 times a power of two, not in those of a power of two."""

_MIN_AMAX = tl.constexpr(2.0**-105)
_MAX_AMAX = tl.constexpr(2.0**116)
"""Between them, `0.5 * 2^-9 * amax / 1536` is normal and `6 * 448 * amax` finite."""


@triton.jit
def _divide(x, RECIPROCAL: tl.constexpr):
    """Return fp32 x / d, correctly rounded, for d three times a power of two and RECIPROCAL = fp64(1 / d)."""
    return (x.to(tl.float64) * tl.full([], RECIPROCAL, tl.float64)).to(tl.float32)


@triton.jit
def _halves(x, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """Split [A, B, 2 N] into its first and second half along the last axis."""
    return tl.split(tl.permute(tl.reshape(x, [A, B, 2, N]), (0, 1, 3, 2)))


@triton.jit
def _columns_of_four(x, A: tl.constexpr, B: tl.constexpr):
    """Return the four columns of x [A, B, 4]."""
    left, right = _halves(x, A, B, 2)
    first, second = tl.split(left)
    third, fourth = tl.split(right)
    return first, second, third, fourth


@triton.jit
def _sum_of_columns(left, right, A: tl.constexpr, B: tl.constexpr):
    """Return the sum of the eight columns of left and of right [A, 8 B], one after the other: [A, B]."""
    x0, x1 = _halves(tl.reshape(left, [A, B, 8]), A, B, 4)
    x2, x3 = _halves(tl.reshape(right, [A, B, 8]), A, B, 4)
    a, b, c, d = _columns_of_four(x0, A, B)
    total = ((a + b) + c) + d
    a, b, c, d = _columns_of_four(x1, A, B)
    total = (((total + a) + b) + c) + d
    a, b, c, d = _columns_of_four(x2, A, B)
    total = (((total + a) + b) + c) + d
    a, b, c, d = _columns_of_four(x3, A, B)
    return (((total + a) + b) + c) + d


@triton.jit
def _sum_of_rows(total, BLOCK_R: tl.constexpr, TILE_R: tl.constexpr, B: tl.constexpr):
    """Return the sum of every BLOCK_R = 1 or 16 rows of [TILE_R, B], as a tree of rows 8, 4, 2, 1 apart."""
    if BLOCK_R > 1:
        for level in tl.static_range(4):
            pairs = tl.reshape(total, [TILE_R // 16, 2, 8 >> level, B])
            upper, lower = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
            total = upper + lower
        total = tl.reshape(total, [TILE_R // 16, B])
    return total


@triton.jit
def _term(difference, SQUARED: tl.constexpr):
    """Return what a number adds to the error of its block: |d| or d*d."""
    return difference * difference if SQUARED else tl.abs(difference)


@triton.jit
def _terms_by_table(
    x,
    value,
    of_1,
    of_1_5,
    SQUARED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILE_R: tl.constexpr,
    B: tl.constexpr,
):
    """Return the terms of a half [TILE_R, 8 B]. value: magnitudes; of_1, of_1_5: decoded, per block."""
    bits = value.to(tl.int32, bitcast=True)
    power = (bits & EXPONENT_BITS).to(tl.float32, bitcast=True)
    of_1 = spread_blocks(of_1, BLOCK_R, _HALF, TILE_R, _HALF * B)
    of_1_5 = spread_blocks(of_1_5, BLOCK_R, _HALF, TILE_R, _HALF * B)
    factor = tl.where((bits & _ONE_AND_A_HALF) != 0, of_1_5, of_1)
    return _term(power * factor - tl.abs(x), SQUARED)


@triton.jit
def _terms_by_number(
    x, value, scale, amax, SQUARED: tl.constexpr, BLOCK_R: tl.constexpr, TILE_R: tl.constexpr, B: tl.constexpr
):
    """Return the terms of a half as the definition has them: `|value| * scale * amax / 1536 - |x|`."""
    decoded = value * spread_blocks(scale, BLOCK_R, _HALF, TILE_R, _HALF * B) * amax
    return _term(_divide(decoded, _RECIPROCAL_TARGET) - tl.abs(x), SQUARED)


@triton.jit
def _candidate(base, tensor_decode, STRETCH: tl.constexpr, NATIVE: tl.constexpr):
    """Return (scale, encode scale) of every block: `E4M3(min(base * STRETCH, 448))`."""
    raw = tl.minimum(base * STRETCH, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    scale = round_to_e4m3(raw)
    return scale, block_encode_scale(scale, tensor_decode, NATIVE)


@triton.jit
def _rounded(x, encode, BLOCK_R: tl.constexpr, TILE_R: tl.constexpr, B: tl.constexpr):
    """Return the E2M1 magnitudes of a half under one candidate."""
    return round_to_e2m1(tl.abs(x) * spread_blocks(encode, BLOCK_R, _HALF, TILE_R, _HALF * B))


@triton.jit
def _error(
    left, right, value_left, value_right, scale, amax, SQUARED: tl.constexpr, BLOCK_R: tl.constexpr,
    TILE_R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Return the error of every block [TILE_R / BLOCK_R, B] under one candidate."""
    if (amax >= _MIN_AMAX) & (amax <= _MAX_AMAX):
        of_1 = _divide(scale * amax, _RECIPROCAL_TARGET)
        of_1_5 = _divide(scale * 1.5 * amax, _RECIPROCAL_TARGET)
        total = _sum_of_columns(
            _terms_by_table(left, value_left, of_1, of_1_5, SQUARED, BLOCK_R, TILE_R, B),
            _terms_by_table(right, value_right, of_1, of_1_5, SQUARED, BLOCK_R, TILE_R, B),
            TILE_R, B)  # fmt: skip
    else:
        total = _sum_of_columns(
            _terms_by_number(left, value_left, scale, amax, SQUARED, BLOCK_R, TILE_R, B),
            _terms_by_number(right, value_right, scale, amax, SQUARED, BLOCK_R, TILE_R, B),
            TILE_R, B)  # fmt: skip
    return _sum_of_rows(total, BLOCK_R, TILE_R, B)


@triton.jit
def _places(row_start, col_start, num_rows, num_cols, stride_r, stride_c, NARROW: tl.constexpr,
            TILE_R: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """Return (offsets, mask) of the left half of every block of a tile: [TILE_R, 8 B].

    NARROW: a thread takes two neighbouring rows, and so all columns of a block.
    """
    rows = tl.arange(0, TILE_R)
    if NARROW:
        rows = tl.max_contiguous(rows, 2)
    col = tl.arange(0, _HALF * B)
    block = (col // _HALF) * (2 * _HALF)
    offsets = rows[:, None] * stride_r + (block + col % _HALF)[None, :] * stride_c
    return offsets, (row_start + rows < num_rows)[:, None] & (col_start + block < num_cols)[None, :]


@triton.jit
def _write_half(x, value_6, value_4, take_4, scale, encode, operand, packed, offsets, mask, row_start,
                col_start, num_rows, num_cols, H: tl.constexpr, BLOCK_R: tl.constexpr,
                WANT_PACKED: tl.constexpr, WANT_OPERAND: tl.constexpr, TILE_R: tl.constexpr,
                B: tl.constexpr):  # fmt: skip
    """Write operand and codes of a half; scale, encode, take_4: of the chosen candidate, per block."""
    take_4 = spread_blocks(take_4, BLOCK_R, _HALF, TILE_R, _HALF * B) != 0
    y = x * spread_blocks(encode, BLOCK_R, _HALF, TILE_R, _HALF * B) + 0.0
    value = with_sign(tl.where(take_4, value_4, value_6), y)
    if WANT_OPERAND:
        decoded = value * spread_blocks(scale, BLOCK_R, _HALF, TILE_R, _HALF * B)
        tl.store(operand + offsets, exact_bf16_bits(decoded), mask=mask)
    if WANT_PACKED:
        code = tl.where(y == y, code_of(code_bits(value)), 0)
        low, high = tl.split(tl.reshape(code, [TILE_R, 4 * B, 2]))
        rows = row_start + tl.arange(0, TILE_R)
        byte = tl.arange(0, 4 * B)
        block = col_start // 2 + (byte // 4) * _HALF
        inside = (rows < num_rows)[:, None] & (block < num_cols // 2)[None, :]
        base = packed + rows.to(tl.int64)[:, None] * (num_cols // 2)
        tl.store(base + (block + 4 * H + byte % 4)[None, :], (low | (high << 4)).to(tl.uint8), mask=inside)


@triton.jit
def _four_over_six_kernel(
    x,
    amax,
    packed,
    scale_bytes,
    operand,
    num_rows,
    num_cols,
    stride_r,
    stride_c,
    operand_stride_r,
    operand_stride_c,
    IS_BF16: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NATIVE: tl.constexpr,
    NARROW: tl.constexpr,
    WANT_PACKED: tl.constexpr,
    WANT_OPERAND: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    B: tl.constexpr = TILE_C // 16
    tiles_per_row = tl.cdiv(num_cols, TILE_C)
    row_start = (tl.program_id(0) // tiles_per_row) * TILE_R
    col_start = (tl.program_id(0) % tiles_per_row) * TILE_C
    offsets, mask = _places(row_start, col_start, num_rows, num_cols, stride_r, stride_c, NARROW, TILE_R, B)
    start = x + row_start.to(tl.int64) * stride_r + col_start.to(tl.int64) * stride_c
    left = load_float32(start, offsets, mask, IS_BF16, NATIVE)
    right = load_float32(start + _HALF * stride_c, offsets, mask, IS_BF16, NATIVE)
    amax_value = tl.load(amax)
    tensor_encode, tensor_decode = tensor_scales(amax_value, _TARGET, NATIVE)
    largest = larger_magnitude(block_amax(left, 1, _HALF, TILE_R, _HALF * B, NATIVE),
                               block_amax(right, 1, _HALF, TILE_R, _HALF * B, NATIVE))  # fmt: skip
    if BLOCK_R > 1:
        largest = block_amax(largest, BLOCK_R, 1, TILE_R, B, NATIVE)
    base = _divide(largest, _RECIPROCAL_6) * tensor_encode
    scale_6, encode_6 = _candidate(base, tensor_decode, 1.0, NATIVE)
    scale_4, encode_4 = _candidate(base, tensor_decode, 1.5, NATIVE)
    left_6 = _rounded(left, encode_6, BLOCK_R, TILE_R, B)
    right_6 = _rounded(right, encode_6, BLOCK_R, TILE_R, B)
    error_6 = _error(left, right, left_6, right_6, scale_6, amax_value, SQUARED, BLOCK_R, TILE_R, B)
    left_4 = _rounded(left, encode_4, BLOCK_R, TILE_R, B)
    right_4 = _rounded(right, encode_4, BLOCK_R, TILE_R, B)
    error_4 = _error(left, right, left_4, right_4, scale_4, amax_value, SQUARED, BLOCK_R, TILE_R, B)
    take_4 = error_4 < error_6
    scale = tl.where(take_4, scale_4, scale_6)
    encode = tl.where(take_4, encode_4, encode_6)
    take_4 = take_4.to(tl.int32)
    offsets, mask = _places(row_start, col_start, num_rows, num_cols, operand_stride_r, operand_stride_c,
                            NARROW, TILE_R, B)  # fmt: skip
    if WANT_OPERAND:
        operand += row_start.to(tl.int64) * operand_stride_r + col_start.to(tl.int64) * operand_stride_c
    _write_half(left, left_6, left_4, take_4, scale, encode, operand, packed, offsets, mask, row_start,
                col_start, num_rows, num_cols, 0, BLOCK_R, WANT_PACKED, WANT_OPERAND, TILE_R, B)  # fmt: skip
    _write_half(right, right_6, right_4, take_4, scale, encode, operand, packed,
                offsets + _HALF * operand_stride_c, mask, row_start, col_start, num_rows, num_cols, 1,
                BLOCK_R, WANT_PACKED, WANT_OPERAND, TILE_R, B)  # fmt: skip
    if WANT_PACKED:
        store_tile(scale_bytes, e4m3_byte(scale).to(tl.uint8), row_start // BLOCK_R, col_start // 16,
                   num_rows // BLOCK_R, num_cols // 16, num_cols // 16, 1, TILE_R // BLOCK_R, B)  # fmt: skip


_launch = Launcher(_four_over_six_kernel)


def _tile_of(x: Tensor, block_shape: tuple[int, int]) -> Tile:
    """Return the tile for a matrix: one or two blocks for a thread, and sixteen rows within a warp.

    More blocks take more registers than are there; fewer leave nothing to share what is done once per thread.
    """
    if is_column_major(x):
        rows = min(128, max(16, next_power_of_two(x.shape[0])))
        return Tile(rows, 16, max(1, rows // 64))
    if block_shape[0] > 1:
        return Tile(16, max(16, min(64, next_power_of_two(x.shape[1]))), 1)
    cols = max(16, min(256, next_power_of_two(x.shape[1])))
    return Tile(2048 // cols, cols, 4)


def launch_four_over_six(
    x: Tensor,
    amax: Tensor,
    *,
    block_shape: tuple[int, int],
    error: str,
    want_packed: bool,
    want_operand: bool,
    operand_out: Tensor | None = None,
    tile: Tile | None = None,
) -> KernelOutput:
    """Run the kernel on checked arguments; the decoded number is `e2m1 * scale * amax / 1536`."""
    tile = tile or _tile_of(x, block_shape)
    output = empty_output(x, block_shape, want_packed, want_operand, operand_out)
    _launch(
        (ceil_div(x.shape[0], tile.rows) * ceil_div(x.shape[1], tile.cols), 1),
        (x, amax, output.packed, output.scale_bytes, output.operand, *x.shape, *x.stride(),
         *output.operand_strides()),
        (x.dtype == torch.bfloat16, error == "mse", block_shape[0], is_hopper(x), is_column_major(x),
         want_packed, want_operand, tile.rows, tile.cols),
        num_warps=tile.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return output
