"""Rows in float64, cut into chunks of their features: what sketches multiply.

One idea: the rows of a basis lie in several matrices and are wanted chunk by chunk, in numbers four times as
wide. Each matrix is read once and written where it belongs; torch would first put them together and then copy
them into another order and type.

Exact: bf16, fp16 and fp32 are in float64 what they were.

Shape letters: G bases, n rows of each, K features, C chunks, w features of a chunk of one part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from metis.errors import ShapeError
from metis.kernels.arguments import INPUT_DTYPES, ceil_div, next_power_of_two, require_device
from metis.kernels.elementary import load_float32
from metis.kernels.launching import Launcher

_TILE_NUMEL, _MAX_TILE_COLS, _NUM_WARPS = 4096, 512, 4


@triton.jit
def _widen_kernel(
    x,
    out,
    num_rows,
    stride_r,
    out_rows,
    width,
    num_chunks,
    num_parts,
    IS_BF16: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    tiles = tl.cdiv(width, TILE_C)
    rows = (tl.program_id(0) // tiles) * TILE_R + tl.arange(0, TILE_R)
    cols = (tl.program_id(0) % tiles) * TILE_C + tl.arange(0, TILE_C)
    piece = tl.program_id(1)  # of the features: a chunk of a part
    part, chunk = piece // num_chunks, piece % num_chunks
    mask = (rows < num_rows)[:, None] & (cols < width)[None, :]
    x += piece.to(tl.int64) * width
    number = load_float32(x, rows.to(tl.int64)[:, None] * stride_r + cols[None, :], mask, IS_BF16)
    out += (chunk.to(tl.int64) * out_rows * num_parts + part) * width
    places = rows.to(tl.int64)[:, None] * (num_parts * width) + cols[None, :]
    tl.store(out + places, number.to(tl.float64), mask=mask)


_widen = Launcher(_widen_kernel)


def can_widen(rows: Tensor) -> bool:
    """Whether `widen` takes such a matrix, where there are kernels."""
    return rows.dtype in INPUT_DTYPES and rows.dim() == 2 and rows.stride(1) == 1


def widen(
    bases: Sequence[Sequence[Tensor]], start: int, stop: int, num_features: int, parts: int, num_chunks: int
) -> Tensor:
    """Return rows [start, stop) of every basis in chunks, float64 [G C, stop - start, K / C].

    bases: for each, matrices [n_i, K or more] bf16, fp16 or fp32, contiguous along K, whose rows follow each
    other. A row of chunk c holds the c-th slice of each of the `parts` matrices that K features are, side by
    side.
    """
    first = bases[0][0]
    require_device("widen", first.device)
    width = num_features // (parts * num_chunks)
    if width * parts * num_chunks != num_features:
        raise ShapeError("widen", f"{num_features} features must divide into {parts} parts of {num_chunks}")
    size = num_chunks, stop - start, parts * width
    out = torch.empty(len(bases), *size, dtype=torch.float64, device=first.device)
    tile_cols = min(_MAX_TILE_COLS, next_power_of_two(width))
    tile_rows = _TILE_NUMEL // tile_cols
    for matrices, places in zip(bases, out.unbind(), strict=True):
        begin = 0
        for matrix in matrices:
            if not can_widen(matrix):
                raise ShapeError(
                    "widen",
                    "needs bf16, fp16 or fp32 matrices contiguous along their columns, received "
                    f"{matrix.dtype} {tuple(matrix.shape)} with strides {matrix.stride()}",
                )
            wanted = matrix[max(0, start - begin) : max(0, stop - begin)]
            if wanted.shape[0]:
                row = max(begin, start) - start
                _widen(
                    (ceil_div(wanted.shape[0], tile_rows) * ceil_div(width, tile_cols), parts * num_chunks),
                    (wanted, places[:, row : row + wanted.shape[0]], wanted.shape[0], wanted.stride(0),
                     size[1], width, num_chunks, parts),
                    (matrix.dtype == torch.bfloat16, tile_rows, tile_cols), num_warps=_NUM_WARPS,
                )  # fmt: skip
            begin += matrix.shape[0]
        if begin < stop:
            raise ShapeError("widen", f"needs {stop} rows of every basis, received {begin}")
    return out.flatten(0, 1)
