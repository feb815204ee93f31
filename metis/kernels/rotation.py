"""The random Hadamard rotation alone: twin of `metis.quantize.random_hadamard`.

Quantising kernels rotate in registers; this writes what they quantise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metis.kernels import tuning
from metis.kernels.arguments import (
    ceil_div,
    empty_operand,
    is_column_major,
    is_native,
    require_matrix,
    rotation_of,
)
from metis.kernels.blockwise import Tile, candidates, load_tile, store_tile
from metis.kernels.elementary import exact_bf16_bits
from metis.kernels.launching import Key, Launcher, Prepared, layout


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


_rotations = Launcher(_rotate_kernel)


def rotate(x: Tensor, sign_vector: tuple[int, ...], tile: Tile | None = None) -> Tensor:
    """Rotate every len(sign_vector) consecutive columns; returns bf16 [R, C] in the memory order of x.

    x: [R, C] fp32, bf16 or fp16, any strides, C a multiple of the size (16, 32, 64 or 128). tile: for
    measuring; None chooses.
    """
    key = (layout(x), sign_vector, tile)
    ready = _rotations.ready(key) or _prepare(key, x, sign_vector, tile)
    out = empty_operand(x)
    ready((x, *ready.kept, out))
    return out


def _prepare(key: Key, x: Tensor, sign_vector: tuple[int, ...], tile: Tile | None) -> Prepared:
    signs, rotation, rotation_scale = rotation_of(sign_vector, x.device)
    require_matrix("rotate", x, (1, 1), sign_vector)
    turned = is_column_major(x)

    def build(choice: tuning.Choice) -> Prepared:
        rows, cols, num_warps = choice
        return _rotations.prepare(
            key, (ceil_div(x.shape[0], rows) * ceil_div(x.shape[1], cols), 1),
            (*x.shape, *x.stride(), *empty_operand(x).stride(), rotation_scale),
            (x.dtype == torch.bfloat16, rotation, is_native(x), turned, rows, cols), (signs,),
            num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip

    if tile is not None:
        return build((tile.rows, tile.cols, tile.num_warps))
    variant = (rotation, tuning.dtype_name(x.dtype), "columns" if turned else "rows")
    name = tuning.key_of("rotate", variant, x.shape)
    return tuning.prepare(name, candidates(x, (1, 1), rotation), x.device, build)
