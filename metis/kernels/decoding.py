"""Packed codes and block scales back to numbers: twins of `QuantizedTensor.operand` and `.dequantize`.

One idea: as there, two decodings. `decode_operand` leaves the tensor scale out and is exact in bf16;
`dequantize` gives the numbers themselves, with the roundings of its formula. What several ranks have sent is
decoded in one launch, each piece into its place.

Shape letters: T pieces, R rows, C columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metis.errors import ConfigError, ShapeError
from metis.formats import FORMAT_BLOCK_SHAPES, TENSOR_SCALE_TARGET, as_float32
from metis.kernels import tuning
from metis.kernels.arguments import (
    INPUT_DTYPES,
    ceil_div,
    is_native,
    next_power_of_two,
    require_amax,
    require_device,
)
from metis.kernels.blockwise import store_tile, times_blocks
from metis.kernels.elementary import e2m1_value, e4m3_value, e8m0_value, exact_bf16_bits, round_to_bf16
from metis.kernels.launching import Key, Launcher, Prepared, layout

_FORMATS = ("nvfp4", "mxfp4")
_TILE, _TURNED_TILE = (16, 256, 4), (64, 64, 4)
"""Rows, columns and warps of one program, for an output contiguous along its rows or down its columns."""


@triton.jit
def _decode_kernel(
    packed,
    scale_bytes,
    amax,
    out,
    num_rows,
    num_cols,
    packed_stride,
    scale_stride,
    out_stride,
    out_stride_r,
    out_stride_c,
    reciprocal_target,
    HAS_AMAX: tl.constexpr,
    IS_BF16: tl.constexpr,
    NATIVE: tl.constexpr,
    IS_E8M0: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    tiles_per_row = tl.cdiv(num_cols, TILE_C)
    row_start = (tl.program_id(0) // tiles_per_row) * TILE_R
    col_start = (tl.program_id(0) % tiles_per_row) * TILE_C
    piece = tl.program_id(1).to(tl.int64)
    packed += piece * packed_stride
    scale_bytes += piece * scale_stride
    out += piece * out_stride
    byte = load_bytes(packed, row_start, col_start // 2, num_rows, num_cols // 2, TILE_R, TILE_C // 2)
    code = tl.reshape(tl.join(byte & 0xF, byte >> 4), [TILE_R, TILE_C])
    scale_byte = load_bytes(scale_bytes, row_start // BLOCK_R, col_start // BLOCK_C, num_rows // BLOCK_R,
                            num_cols // BLOCK_C, TILE_R // BLOCK_R, TILE_C // BLOCK_C)  # fmt: skip
    if IS_E8M0:
        factor = e8m0_value(scale_byte)
    else:
        factor = e4m3_value(scale_byte)
    if HAS_AMAX:
        factor = (factor * tl.load(amax)) * reciprocal_target
    decoded = times_blocks(e2m1_value(code), factor, BLOCK_R, BLOCK_C, TILE_R, TILE_C)
    if IS_BF16:
        decoded = exact_bf16_bits(round_to_bf16(decoded, NATIVE))
    store_tile(out, decoded, row_start, col_start, num_rows, num_cols, out_stride_r, out_stride_c, TILE_R,
               TILE_C)  # fmt: skip


@triton.jit
def load_bytes(pointer, row_start, col_start, num_rows, num_cols, TILE_R: tl.constexpr, TILE_C: tl.constexpr):
    """Load a tile of a row-major byte matrix as int32; zero outside."""
    rows = tl.arange(0, TILE_R)
    cols = tl.arange(0, TILE_C)
    mask = (row_start + rows < num_rows)[:, None] & (col_start + cols < num_cols)[None, :]
    base = pointer + row_start.to(tl.int64) * num_cols + col_start
    return tl.load(base + rows[:, None] * num_cols + cols[None, :], mask=mask, other=0).to(tl.int32)


_decoders = Launcher(_decode_kernel)


def decode_operand(
    packed: Tensor,
    scale_bytes: Tensor,
    *,
    block_shape: tuple[int, int] = (1, 16),
    format: str = "nvfp4",
    operand_out: Tensor | None = None,
) -> Tensor:
    """Return `e2m1 * block_scale`, bf16 [R, C], exact, no tensor scale in it.

    packed: uint8 [R, C / 2]; scale_bytes: uint8 [R / block_rows, C / block_cols], both row-major; or
    [T, ...], T such matrices at any distance. format: "nvfp4" (E4M3 scales) or "mxfp4" (E8M0). operand_out:
    bf16 [R, C] or [T, R, C] of any strides for the result, None: a new tensor.
    """
    return _launch(
        packed, scale_bytes, None, block_shape, format, TENSOR_SCALE_TARGET, torch.bfloat16, operand_out
    )


def dequantize(
    packed: Tensor,
    scale_bytes: Tensor,
    amax: Tensor | None = None,
    *,
    block_shape: tuple[int, int] = (1, 16),
    format: str = "nvfp4",
    scale_target: float = TENSOR_SCALE_TARGET,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the decoded matrix [R, C] in `dtype` (fp32, bf16 or fp16).

    NVFP4: `f = fp32(fp32(block_scale * amax) * fp32(1 / scale_target))`, then `fp32(e2m1 * f)`, cast.
    MXFP4, which has no amax: `fp32(e2m1 * block_scale)`, cast. Arguments as `decode_operand`; amax: fp32
    0-dim.
    """
    if (amax is None) != (format == "mxfp4"):
        raise ConfigError("dequantize amax", "must be given for format 'nvfp4' and for no other")
    if dtype not in INPUT_DTYPES:
        raise ShapeError("dequantize", f"dtype must be float32, bfloat16 or float16, received {dtype}")
    return _launch(packed, scale_bytes, amax, block_shape, format, scale_target, dtype)


def _launch(
    packed: Tensor,
    scale_bytes: Tensor,
    amax: Tensor | None,
    block_shape: tuple[int, int],
    format: str,
    scale_target: float,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    key = (
        layout(packed), layout(scale_bytes), layout(out), amax is None, block_shape, format, scale_target,
        dtype,
    )  # fmt: skip
    ready = _decoders.ready(key)
    shape = (*packed.shape[:-1], 2 * packed.shape[-1])
    if ready is None:
        _require_bytes(packed, scale_bytes, tuple(block_shape), format)
        if amax is not None:
            require_amax("dequantize", amax, packed.device)
        if out is not None and (tuple(out.shape), out.dtype, out.device) != (shape, dtype, packed.device):
            raise ShapeError(
                "operand_out", f"must be {dtype} {shape}, received {out.dtype} {tuple(out.shape)}"
            )
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    if ready is None:
        ready = _prepare(
            key, packed, scale_bytes, amax is not None, tuple(block_shape), format, scale_target, out
        )
    ready((packed, scale_bytes, amax, out))
    return out


def candidates(out: Tensor, block_shape: tuple[int, int]) -> tuple[tuning.Choice, ...]:
    """Return the tiles to choose from, the constant first; out: [R, C] or [T, R, C]."""
    turned = out.stride(-1) > out.stride(-2)
    most = tuple(map(next_power_of_two, out.shape[-2:]))
    return tuning.around(_TURNED_TILE if turned else _TILE, block_shape, most, is_column_major=turned)


def _prepare(
    key: Key,
    packed: Tensor,
    scale_bytes: Tensor,
    has_amax: bool,
    block_shape: tuple[int, int],
    format: str,
    scale_target: float,
    out: Tensor,
) -> Prepared:
    *pieces, num_rows, num_cols = out.shape
    *distance, stride_r, stride_c = out.stride()

    def build(choice: tuning.Choice) -> Prepared:
        tile_r, tile_c, num_warps = choice
        return _decoders.prepare(
            key, (ceil_div(num_rows, tile_r) * ceil_div(num_cols, tile_c), *(pieces or (1,))),
            (num_rows, num_cols, _distance(packed), _distance(scale_bytes), *(distance or (0,)), stride_r,
             stride_c, as_float32(1 / scale_target)),
            (has_amax, out.dtype == torch.bfloat16, is_native(packed), format == "mxfp4", *block_shape,
             tile_r, tile_c),
            num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip

    variant = (
        format, "x".join(map(str, block_shape)), tuning.dtype_name(out.dtype),
        "columns" if stride_c > stride_r else "rows",
    )  # fmt: skip
    name = tuning.key_of("decode", variant, (num_rows * (pieces or (1,))[0], num_cols))
    return tuning.prepare(name, candidates(out, block_shape), packed.device, build)


def _distance(pieces: Tensor) -> int:
    """Return how far apart matrices [T, ...] lie, 0 for a single one."""
    return pieces.stride(0) if pieces.dim() == 3 else 0


def _require_bytes(packed: Tensor, scale_bytes: Tensor, block_shape: tuple[int, int], format: str) -> None:
    if format not in _FORMATS:
        raise ConfigError("format", f"must be one of {_FORMATS}, received {format!r}")
    if block_shape not in FORMAT_BLOCK_SHAPES[format]:
        raise ShapeError(
            "block_shape", f"must be one of {FORMAT_BLOCK_SHAPES[format]}, received {block_shape}"
        )
    for name, matrix in (("packed codes", packed), ("scale bytes", scale_bytes)):
        is_row_major = (
            matrix.is_contiguous() if matrix.dim() == 2 else matrix.dim() == 3 and matrix[0].is_contiguous()
        )
        if matrix.dtype != torch.uint8 or not is_row_major:
            raise ShapeError(
                name, f"must be a row-major uint8 matrix, received {matrix.dtype} {tuple(matrix.shape)}"
            )
    *pieces, num_rows, half_cols = packed.shape
    num_cols = 2 * half_cols
    expected = (*pieces, num_rows // block_shape[0], num_cols // block_shape[1])
    if tuple(scale_bytes.shape) != expected or packed.numel() == 0 or num_cols % block_shape[1]:
        raise ShapeError(
            "scale bytes",
            f"of a {(num_rows, num_cols)} matrix with blocks {block_shape} must have shape {expected}, "
            f"received {tuple(scale_bytes.shape)}",
        )
    if scale_bytes.device != packed.device:
        raise ShapeError(
            "scale bytes", f"must be on {packed.device} like the codes, received {scale_bytes.device}"
        )
    require_device("decode", packed.device)
