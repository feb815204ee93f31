"""Block scales in the order in which FP4 tensor cores read them ("128x4", torch's SWIZZLE_32_4_4).

One idea: the scale matrix [R, C] (R rows of the operand, C = K / 16 or K / 32 blocks along the contraction
axis) is cut into tiles of 128 x 4 scales, 512 bytes each, tiles in row-major order; within a tile the four
scales of a row lie together and rows r, r + 32, r + 64, r + 96 lie side by side:

    offset(r, c) = ((r // 128 * ceil(C / 4) + c // 4) * 32 + r % 32) * 16 + (r % 128) // 32 * 4 + c % 4

Traps:
* Storage is padded to whole tiles, with zeros; a GEMM wants exactly that length.
* Tensor cores know rows of blocks only: a 16x16 tile's scale is repeated for its 16 rows first
  (`expand_tile_scales`).

Source: cuBLAS documentation, layout of 1-D block scaling factors. Shape letters: R, C as above.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from metis.errors import ShapeError

TILE_ROWS = 128
TILE_COLS = 4
_ROW_GROUP = 32
_TILE_HEIGHT_16X16 = 16


def swizzle_block_scales(scale_bytes: Tensor) -> Tensor:
    """Return scale bytes [R, C] in the order of this module: uint8 [roundup(R, 128) * roundup(C, 4)]."""
    if scale_bytes.dim() != 2 or scale_bytes.dtype != torch.uint8 or scale_bytes.numel() == 0:
        raise ShapeError(
            "swizzle_block_scales",
            f"scales must be a non-empty uint8 matrix [R, C], received {tuple(scale_bytes.shape)} "
            f"{scale_bytes.dtype}",
        )
    rows, cols = _padded_shape(*scale_bytes.shape)
    padded = pad(scale_bytes, (0, cols - scale_bytes.shape[1], 0, rows - scale_bytes.shape[0]))
    return _tiles(padded).permute(0, 3, 2, 1, 4).flatten()


def unswizzle_block_scales(flat: Tensor, num_rows: int, num_cols: int) -> Tensor:
    """Return the scale bytes [num_rows, num_cols] of what `swizzle_block_scales` made."""
    rows, cols = _padded_shape(num_rows, num_cols)
    if flat.dim() != 1 or flat.dtype != torch.uint8 or flat.numel() != rows * cols:
        raise ShapeError(
            "unswizzle_block_scales",
            f"swizzled scales of a [{num_rows}, {num_cols}] matrix must be uint8 of {rows * cols} bytes, "
            f"received {tuple(flat.shape)} {flat.dtype}",
        )
    tiles = flat.view(rows // TILE_ROWS, cols // TILE_COLS, _ROW_GROUP, -1, TILE_COLS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, cols)[:num_rows, :num_cols].contiguous()


def expand_tile_scales(scale_bytes: Tensor) -> Tensor:
    """Repeat the scale of each 16x16 tile for its rows: [R / 16, C / 16] -> [R, C / 16], same dtype."""
    if scale_bytes.dim() != 2:
        raise ShapeError(
            "expand_tile_scales", f"scales must be a matrix, received shape {tuple(scale_bytes.shape)}"
        )
    return scale_bytes.repeat_interleave(_TILE_HEIGHT_16X16, dim=0)


def _padded_shape(num_rows: int, num_cols: int) -> tuple[int, int]:
    return -(-num_rows // TILE_ROWS) * TILE_ROWS, -(-num_cols // TILE_COLS) * TILE_COLS


def _tiles(padded: Tensor) -> Tensor:
    """View [R, C] of whole tiles as [R / 128, 4, 32, C / 4, 4]."""
    return padded.unflatten(0, (-1, TILE_ROWS // _ROW_GROUP, _ROW_GROUP)).unflatten(3, (-1, TILE_COLS))
