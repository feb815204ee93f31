"""NVFP4 with each block's maximum at 6 or at 4, whichever errs less: twin of `quantize(four_over_six=...)`.

One idea: both candidates are rounded in registers and compared there. The error of a block is a sum of fp32
numbers whose order is part of the specification (columns one after the other, then rows as a tree), so
columns are taken apart and added by hand instead of reduced in whatever order a GPU likes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metis import formats
from metis.kernels.arguments import (
    KernelOutput,
    as_loadable,
    ceil_div,
    empty_output,
)
from metis.kernels.blockwise import Tile, block_amax, load_tile, tile_of, times_blocks, write_outputs
from metis.kernels.elementary import (
    E2M1_MAX,
    E4M3_MAX,
    block_encode_scale,
    e4m3_byte,
    round_to_e2m1,
    round_to_e4m3,
    sign_bits,
    tensor_scales,
)

_TARGET = tl.constexpr(formats.E2M1_MAX * formats.FOUR_OVER_SIX_E4M3_BOUND)


@triton.jit
def _halves(x, A: tl.constexpr, B: tl.constexpr, N: tl.constexpr):
    """Split [A, B, 2 N] into its first and second half along the last axis."""
    return tl.split(tl.permute(tl.reshape(x, [A, B, 2, N]), (0, 1, 3, 2)))


@triton.jit
def _add_four(total, x, A: tl.constexpr, B: tl.constexpr):
    """Add the four columns of x [A, B, 4] to total [A, B] one after the other."""
    left, right = _halves(x, A, B, 2)
    first, second = tl.split(left)
    third, fourth = tl.split(right)
    return (((total + first) + second) + third) + fourth


@triton.jit
def _sum_of_columns(x, A: tl.constexpr, B: tl.constexpr):
    """Return the sum of the sixteen columns of x [A, B, 16], non-negative, one after the other."""
    left, right = _halves(x, A, B, 8)
    first, second = _halves(left, A, B, 4)
    third, fourth = _halves(right, A, B, 4)
    total = _add_four(tl.zeros([A, B], dtype=tl.float32), first, A, B)
    total = _add_four(total, second, A, B)
    return _add_four(_add_four(total, third, A, B), fourth, A, B)


@triton.jit
def _block_error(
    difference, SQUARED: tl.constexpr, BLOCK_R: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr
):
    """Return the sum of |d| or d*d per block, fp32 [TILE_R / BLOCK_R, TILE_C / 16], in the order above."""
    if SQUARED:
        terms = difference * difference
    else:
        terms = tl.abs(difference)
    COLS: tl.constexpr = TILE_C // 16
    total = _sum_of_columns(tl.reshape(terms, [TILE_R, COLS, 16]), TILE_R, COLS)
    if BLOCK_R > 1:
        for level in tl.static_range(4):
            pairs = tl.reshape(total, [TILE_R // 16, 2, 8 >> level, COLS])
            upper, lower = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
            total = upper + lower
        total = tl.reshape(total, [TILE_R // 16, COLS])
    return total


@triton.jit
def _candidate(
    x,
    base,
    amax,
    tensor_decode,
    STRETCH: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Return (value, code, y, scale, error) of the block scale `E4M3(min(base * STRETCH, 448))`."""
    raw = tl.minimum(base * STRETCH, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    scale = round_to_e4m3(raw)
    y = times_blocks(x, block_encode_scale(scale, tensor_decode), BLOCK_R, 16, TILE_R, TILE_C)
    value, code = round_to_e2m1(y, 0, 0, False)
    signed = (value.to(tl.int32, bitcast=True) | sign_bits(y)).to(tl.float32, bitcast=True)
    decoded = times_blocks(signed, scale, BLOCK_R, 16, TILE_R, TILE_C) * amax
    error = _block_error(tl.div_rn(decoded, _TARGET) - x, SQUARED, BLOCK_R, TILE_R, TILE_C)
    return value, code, y, scale, error


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
    WANT_PACKED: tl.constexpr,
    WANT_OPERAND: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    tiles_per_row = tl.cdiv(num_cols, TILE_C)
    row_start = (tl.program_id(0) // tiles_per_row) * TILE_R
    col_start = (tl.program_id(0) % tiles_per_row) * TILE_C
    tile = load_tile(x, None, 1.0, row_start, col_start, num_rows, num_cols, stride_r, stride_c, IS_BF16, 0,
                     False, False, TILE_R, TILE_C)  # fmt: skip
    amax_value = tl.load(amax)
    tensor_encode, tensor_decode = tensor_scales(amax_value, _TARGET)
    base = tl.div_rn(block_amax(tile, BLOCK_R, 16, TILE_R, TILE_C), E2M1_MAX) * tensor_encode
    value_6, code_6, y_6, scale_6, error_6 = _candidate(tile, base, amax_value, tensor_decode, 1.0, SQUARED,
                                                        BLOCK_R, TILE_R, TILE_C)  # fmt: skip
    value_4, code_4, y_4, scale_4, error_4 = _candidate(tile, base, amax_value, tensor_decode, 1.5, SQUARED,
                                                        BLOCK_R, TILE_R, TILE_C)  # fmt: skip
    take_4 = error_4 < error_6
    scale = tl.where(take_4, scale_4, scale_6)
    one = tl.full([TILE_R, TILE_C], 1.0, dtype=tl.float32)
    take_4 = times_blocks(one, take_4.to(tl.float32), BLOCK_R, 16, TILE_R, TILE_C) != 0.0
    write_outputs(tl.where(take_4, value_4, value_6), tl.where(take_4, code_4, code_6),
                  tl.where(take_4, y_4, y_6), scale, e4m3_byte(scale), packed, scale_bytes, operand,
                  row_start, col_start, num_rows, num_cols, operand_stride_r, operand_stride_c, BLOCK_R, 16,
                  0, False, WANT_PACKED, WANT_OPERAND, TILE_R, TILE_C)  # fmt: skip


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
    tile = tile or tile_of(x, block_shape, 0)
    output = empty_output(x, block_shape, want_packed, want_operand, operand_out)
    grid = (ceil_div(x.shape[0], tile.rows) * ceil_div(x.shape[1], tile.cols),)
    _four_over_six_kernel[grid](
        as_loadable(x), amax, *output.pointers(), *x.shape, *x.stride(), *output.operand_strides(),
        IS_BF16=x.dtype == torch.bfloat16, SQUARED=error == "mse", BLOCK_R=block_shape[0],
        WANT_PACKED=want_packed, WANT_OPERAND=want_operand, TILE_R=tile.rows, TILE_C=tile.cols,
        num_warps=tile.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return output
