"""The largest magnitude of a matrix, also of its rotation, in one read: twin of `metis.quantize.tensor_amax`.

One idea: magnitudes are compared as integers. There NaN is the largest (so it propagates), and a maximum of
integers does not depend on order, so one atomic per program is deterministic.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from metis.errors import ShapeError
from metis.kernels import blockwise, tuning
from metis.kernels.arguments import (
    ceil_div,
    is_column_major,
    is_native,
    next_power_of_two,
    require_matrix,
    rotation_of,
)
from metis.kernels.blockwise import Tile, load_tile
from metis.kernels.elementary import (
    EXPONENT_BITS,
    QUIET_NAN_BITS,
    as_int_pointer,
    magnitude_bits,
    rotate_tile,
)
from metis.kernels.launching import Key, Launcher, Prepared, layout

_FLAT_CANDIDATES = ((1, 4096, 4), (1, 2048, 4), (1, 4096, 8), (1, 8192, 4), (1, 8192, 8))
"""Rows, columns and warps for dense memory, which is one long row; the constant first."""
_PROGRAMS_PER_MULTIPROCESSOR = 8
_PROGRAMS_UNDER_INTERPRETER = 3


@triton.jit
def _amax_kernel(
    x,
    signs,
    out,
    num_rows,
    num_cols,
    stride_r,
    stride_c,
    rotation_scale,
    num_tiles,
    IS_BF16: tl.constexpr,
    ROTATION: tl.constexpr,
    NATIVE: tl.constexpr,
    NARROW: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    tiles_per_row = tl.cdiv(num_cols, TILE_C)
    largest = tl.zeros([TILE_R, TILE_C], dtype=tl.int32)
    index = tl.program_id(0)
    while index < num_tiles:
        row_start = (index // tiles_per_row) * TILE_R
        col_start = (index % tiles_per_row) * TILE_C
        tile = load_tile(x, signs, rotation_scale, row_start, col_start, num_rows, num_cols, stride_r,
                         stride_c, IS_BF16, ROTATION, NATIVE, NARROW, TILE_R, TILE_C)  # fmt: skip
        largest = tl.maximum(largest, magnitude_bits(tile))
        index += tl.num_programs(0)
    result = tl.max(tl.max(largest, axis=1), axis=0)
    tl.atomic_max(as_int_pointer(out), tl.where(result > EXPONENT_BITS, QUIET_NAN_BITS, result))


@triton.jit
def _amax_both_kernel(
    x,
    signs,
    plain_out,
    turned_out,
    num_rows,
    num_cols,
    stride_r,
    rotation_scale,
    num_tiles,
    IS_BF16: tl.constexpr,
    ROTATION: tl.constexpr,
    NATIVE: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    tiles_per_row = tl.cdiv(num_cols, TILE_C)
    plain = tl.zeros([TILE_C], dtype=tl.int32)
    turned = tl.zeros([TILE_C], dtype=tl.int32)
    index = tl.program_id(0)
    while index < num_tiles:
        row_start = (index // tiles_per_row) * TILE_R
        col_start = (index % tiles_per_row) * TILE_C
        tile = load_tile(x, signs, rotation_scale, row_start, col_start, num_rows, num_cols, stride_r, 1,
                         IS_BF16, 0, NATIVE, False, TILE_R, TILE_C)  # fmt: skip
        plain = tl.maximum(plain, tl.max(magnitude_bits(tile), axis=0))
        rotated = rotate_tile(tl.trans(tile), signs, rotation_scale, ROTATION, NATIVE, TILE_C, TILE_R)
        turned = tl.maximum(turned, tl.max(magnitude_bits(rotated), axis=1))
        index += tl.num_programs(0)
    result = tl.max(plain, axis=0)
    tl.atomic_max(as_int_pointer(plain_out), tl.where(result > EXPONENT_BITS, QUIET_NAN_BITS, result))
    result = tl.max(turned, axis=0)
    tl.atomic_max(as_int_pointer(turned_out), tl.where(result > EXPONENT_BITS, QUIET_NAN_BITS, result))


_amaxes, _amaxes_both = Launcher(_amax_kernel), Launcher(_amax_both_kernel)


def amax_both(x: Tensor, sign_vector: tuple[int, ...], out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return `amax(x)` and `amax(x.t(), sign_vector)` from one read.

    x: [R, C] fp32, bf16 or fp16, contiguous along C, R a multiple of the rotation's size. out: as `amax`,
    two.
    """
    key = (layout(x), sign_vector)
    ready = _amaxes_both.ready(key) or _prepare_both(key, x, sign_vector)
    out = torch.zeros(2, dtype=torch.float32, device=x.device) if out is None else out
    plain, turned = out.unbind()
    ready((x, *ready.kept, plain, turned))
    return plain, turned


def amax(
    x: Tensor,
    sign_vector: tuple[int, ...] | None = None,
    tile: Tile | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return `max |x|`, or of the rotated and bf16-rounded matrix, as fp32 0-dim; NaN propagates.

    x: [R, C] fp32, bf16 or fp16, any strides. sign_vector: rotate along C first, see `quantize_nvfp4`. tile:
    for measuring; None chooses. out: fp32 0-dim that holds zero (or an amax to be raised), None: a new one. A
    NaN result has the bits 0x7FC00000.
    """
    key = (layout(x), sign_vector, tile)
    ready = _amaxes.ready(key) or _prepare(key, x, sign_vector, tile)
    out = torch.zeros((), dtype=torch.float32, device=x.device) if out is None else out
    ready((x, *ready.kept, out))
    return out


def candidates(x: Tensor, rotation: int) -> tuple[tuning.Choice, ...]:
    """Return the tiles to choose from, the constant first; x: as it is read."""
    if x.shape[0] == 1 and rotation == 0:
        longest = next_power_of_two(x.shape[1])
        return (_FLAT_CANDIDATES[0], *(tile for tile in _FLAT_CANDIDATES[1:] if tile[1] <= longest))
    return blockwise.candidates(x, (1, 1), rotation)


def candidates_both(x: Tensor, rotation: int) -> tuple[tuning.Choice, ...]:
    """Return the tiles of `amax_both` to choose from, the constant first: whole rotations down the rows."""
    warps = rotation // 16
    tiles = ((256, warps), (256, 2 * warps), (128, warps), (512, 2 * warps), (128, max(1, warps // 2)))
    limit = max(256, next_power_of_two(x.shape[1]))
    return tuple(
        dict.fromkeys((rotation, cols, count) for cols, count in tiles if cols <= limit and count <= 8)
    )


def _prepare(key: Key, x: Tensor, sign_vector: tuple[int, ...] | None, tile: Tile | None) -> Prepared:
    require_matrix("amax", x, (1, 1), sign_vector)
    signs, rotation, rotation_scale = rotation_of(sign_vector, x.device)
    shape = x.shape
    if rotation == 0:
        # A maximum has no order: dense memory is one long row, everything else is read along its grain.
        x = x.t() if is_column_major(x) else x
        x = x.reshape(1, -1) if x.is_contiguous() else x

    def build(choice: tuning.Choice) -> Prepared:
        rows, cols, num_warps = choice
        num_tiles = ceil_div(x.shape[0], rows) * ceil_div(x.shape[1], cols)
        return _amaxes.prepare(
            key, (min(num_tiles, _max_programs(x.device)), 1),
            (*x.shape, *x.stride(), rotation_scale, num_tiles),
            (x.dtype == torch.bfloat16, rotation, is_native(x), is_column_major(x), rows, cols), (signs,),
            num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip

    if tile is not None:
        return build((tile.rows, tile.cols, tile.num_warps))
    order = "flat" if x.shape[0] == 1 and rotation == 0 else "columns" if is_column_major(x) else "rows"
    name = tuning.key_of("amax", (rotation, tuning.dtype_name(x.dtype), order), shape)
    return tuning.prepare(name, candidates(x, rotation), x.device, build)


def _prepare_both(key: Key, x: Tensor, sign_vector: tuple[int, ...]) -> Prepared:
    require_matrix("amax_both", x.t(), (1, 1), sign_vector)
    if x.stride(1) != 1:
        raise ShapeError("amax_both", f"needs a row-major matrix, received strides {x.stride()}")
    signs, rotation, rotation_scale = rotation_of(sign_vector, x.device)

    def build(choice: tuning.Choice) -> Prepared:
        rows, cols, num_warps = choice
        num_tiles = ceil_div(x.shape[0], rows) * ceil_div(x.shape[1], cols)
        return _amaxes_both.prepare(
            key, (min(num_tiles, 2 * _max_programs(x.device)), 1),
            (*x.shape, x.stride(0), rotation_scale, num_tiles),
            (x.dtype == torch.bfloat16, rotation, is_native(x), rows, cols), (signs,),
            num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip

    name = tuning.key_of("amax_both", (rotation, tuning.dtype_name(x.dtype)), x.shape)
    return tuning.prepare(name, candidates_both(x, rotation), x.device, build)


@lru_cache(maxsize=64)
def _max_programs(device: torch.device) -> int:
    if device.type == "cpu":
        return _PROGRAMS_UNDER_INTERPRETER
    return _PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
