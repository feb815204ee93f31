"""The random Hadamard rotation alone: twin of `metis.quantize.random_hadamard`.

Quantising kernels rotate in registers; this writes what they quantise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metis.kernels.arguments import (
    as_loadable,
    ceil_div,
    empty_operand,
    is_column_major,
    is_native,
    require_matrix,
    rotation_of,
)
from metis.kernels.blockwise import Tile, load_tile, store_tile, tile_of
from metis.kernels.elementary import exact_bf16_bits


@triton.jit
def _rotate_kernel(
    x,
    signs,
    out,
    num_rows,
    num_cols,
    stride_r,
    stride_c,
    out_stride_r,
    out_stride_c,
    rotation_scale,
    IS_BF16: tl.constexpr,
    ROTATION: tl.constexpr,
    NATIVE: tl.constexpr,
    NARROW: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    tiles_per_row = tl.cdiv(num_cols, TILE_C)
    row_start = (tl.program_id(0) // tiles_per_row) * TILE_R
    col_start = (tl.program_id(0) % tiles_per_row) * TILE_C
    tile = load_tile(x, signs, rotation_scale, row_start, col_start, num_rows, num_cols, stride_r, stride_c,
                     IS_BF16, ROTATION, NATIVE, NARROW, TILE_R, TILE_C)  # fmt: skip
    store_tile(out, exact_bf16_bits(tile), row_start, col_start, num_rows, num_cols, out_stride_r,
               out_stride_c, TILE_R, TILE_C, NARROW)  # fmt: skip


def rotate(x: Tensor, sign_vector: tuple[int, ...], tile: Tile | None = None) -> Tensor:
    """Rotate every len(sign_vector) consecutive columns; returns bf16 [R, C] in the memory order of x.

    x: [R, C] fp32, bf16 or fp16, any strides, C a multiple of the size (16, 32, 64 or 128). tile: for
    measuring; None chooses.
    """
    signs, rotation, rotation_scale = rotation_of(sign_vector, x.device)
    require_matrix("rotate", x, (1, 1), sign_vector)
    tile = tile or tile_of(x, (1, 1), rotation)
    out = empty_operand(x)
    grid = (ceil_div(x.shape[0], tile.rows) * ceil_div(x.shape[1], tile.cols),)
    _rotate_kernel[grid](
        as_loadable(x), signs, out.view(torch.int16), *x.shape, *x.stride(), *out.stride(), rotation_scale,
        IS_BF16=x.dtype == torch.bfloat16, ROTATION=rotation, NATIVE=is_native(x), NARROW=is_column_major(x),
        TILE_R=tile.rows, TILE_C=tile.cols, num_warps=tile.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out
