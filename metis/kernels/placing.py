"""Thin factors into their places beside the operands of a product, up to two of them in one launch.

A factor comes as partial sums in fp32 (added here in their tree), as one fp32 matrix or as a bf16 one, is
multiplied by 1 / alpha where the product's epilogue will multiply it by alpha, is rounded to bf16 once, and
may be turned on the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metis.errors import ShapeError
from metis.kernels import tuning
from metis.kernels.arguments import Thin, ceil_div, is_native
from metis.kernels.elementary import exact_bf16_bits, round_to_bf16
from metis.kernels.launching import Key, Launcher, Prepared, layout

CANDIDATES = ((32, 64, 4), (32, 64, 8), (16, 64, 4), (32, 32, 4), (64, 32, 4), (64, 64, 8))
"""Rows, columns and warps of one program to choose from, the constant first."""
_CLASS_COLUMNS = 64


@triton.jit
def _place_one(
    source,
    factor,
    out,
    index,
    num_rows,
    num_cols,
    source_stride_c,
    source_stride_r,
    source_stride_k,
    out_stride_r,
    out_stride_k,
    COUNT: tl.constexpr,
    IS_BF16: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    NATIVE: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    tiles_per_row = tl.cdiv(num_cols, TILE_C)
    rows = (index // tiles_per_row) * TILE_R + tl.arange(0, TILE_R)
    cols = (index % tiles_per_row) * TILE_C + tl.arange(0, TILE_C)
    mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    offsets = rows.to(tl.int64)[:, None] * source_stride_r + cols.to(tl.int64)[None, :] * source_stride_k
    if COUNT > 1:
        which = tl.arange(0, COUNT).to(tl.int64)[:, None, None] * source_stride_c
        sums = tl.load(source + which + offsets[None, :, :], mask=mask[None, :, :], other=0.0)
        for level in tl.static_range(5):
            if (COUNT >> level) > 1:
                pairs = tl.reshape(sums, [COUNT >> (level + 1), 2, TILE_R, TILE_C])
                first, second = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
                sums = first + second
        value = tl.reshape(sums, [TILE_R, TILE_C])
    elif IS_BF16:
        raw = tl.load(source + offsets, mask=mask, other=0)
        value = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = tl.load(source + offsets, mask=mask, other=0.0)
    if HAS_FACTOR:
        value = value * tl.load(factor)
    places = rows.to(tl.int64)[:, None] * out_stride_r + cols.to(tl.int64)[None, :] * out_stride_k
    tl.store(out + places, exact_bf16_bits(round_to_bf16(value, NATIVE)), mask=mask)


@triton.jit
def _place_kernel(
    factor,
    source_a,
    out_a,
    source_b,
    out_b,
    tiles_a,
    num_rows_a,
    num_cols_a,
    source_stride_c_a,
    source_stride_r_a,
    source_stride_k_a,
    out_stride_r_a,
    out_stride_k_a,
    num_rows_b,
    num_cols_b,
    source_stride_c_b,
    source_stride_r_b,
    source_stride_k_b,
    out_stride_r_b,
    out_stride_k_b,
    COUNT_A: tl.constexpr,
    IS_BF16_A: tl.constexpr,
    HAS_FACTOR_A: tl.constexpr,
    COUNT_B: tl.constexpr,
    IS_BF16_B: tl.constexpr,
    HAS_FACTOR_B: tl.constexpr,
    HAS_B: tl.constexpr,
    NATIVE: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    index = tl.program_id(0)
    if index < tiles_a:
        _place_one(source_a, factor, out_a, index, num_rows_a, num_cols_a, source_stride_c_a,
                   source_stride_r_a, source_stride_k_a, out_stride_r_a, out_stride_k_a, COUNT_A, IS_BF16_A,
                   HAS_FACTOR_A, NATIVE, TILE_R, TILE_C)  # fmt: skip
    elif HAS_B:
        _place_one(source_b, factor, out_b, index - tiles_a, num_rows_b, num_cols_b, source_stride_c_b,
                   source_stride_r_b, source_stride_k_b, out_stride_r_b, out_stride_k_b, COUNT_B, IS_BF16_B,
                   HAS_FACTOR_B, NATIVE, TILE_R, TILE_C)  # fmt: skip


_places = Launcher(_place_kernel)


def place(first: Thin, second: Thin | None = None, factor: Tensor | None = None) -> None:
    """Write one or two factors to their places.

    factor: fp32 0-dim, multiplies those that say `is_scaled`; None: nothing is multiplied.
    """
    key = (
        layout(first.source), layout(first.out), first.is_scaled, factor is None,
        *(() if second is None else (layout(second.source), layout(second.out), second.is_scaled)),
    )  # fmt: skip
    ready = _places.ready(key) or _prepare(key, first, second, factor)
    a, b = (first.source, first.out), (None, None) if second is None else (second.source, second.out)
    ready((first.source if factor is None else factor, *a, *b))


def _prepare(key: Key, first: Thin, second: Thin | None, factor: Tensor | None) -> Prepared:
    numbers_a, constants_a = _described(first, factor)
    numbers_b, constants_b = (0,) * 7, (1, False, False)
    if second is not None:
        numbers_b, constants_b = _described(second, factor)

    def build(choice: tuning.Choice) -> Prepared:
        rows, cols, num_warps = choice
        tiles_a, tiles_b = (
            ceil_div(numbers[0], rows) * ceil_div(numbers[1], cols) for numbers in (numbers_a, numbers_b)
        )
        return _places.prepare(
            key, (tiles_a + tiles_b, 1), (tiles_a, *numbers_a, *numbers_b),
            (*constants_a, *constants_b, second is not None, is_native(first.source), rows, cols),
            num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip

    thins = (first,) if second is None else (first, second)
    elements = sum(thin.out.numel() for thin in thins)
    shape = (ceil_div(elements, _CLASS_COLUMNS), _CLASS_COLUMNS)
    name = tuning.key_of("place", ["+".join(map(_variant, thins))], shape)
    return tuning.prepare(name, CANDIDATES, first.source.device, build)


def _variant(thin: Thin) -> str:
    """Return what a factor is, for the name of a kind of launch: 8 fp32 rows to columns."""
    count = thin.source.shape[0] if thin.source.dim() == 3 else 1
    source, out = (
        "columns" if tensor.stride(-1) > tensor.stride(-2) else "rows" for tensor in (thin.source, thin.out)
    )
    return f"{count} {tuning.dtype_name(thin.source.dtype)} {source} to {out}"


def _described(thin: Thin, factor: Tensor | None) -> tuple[tuple[int, ...], tuple[int, bool, bool]]:
    """Return (sizes and strides, compile-time constants) of a factor."""
    source, out = thin.source, thin.out
    count = source.shape[0] if source.dim() == 3 else 1
    num_rows, num_cols = out.shape
    if source.shape[-2:] != out.shape or count & (count - 1) or count > 32 or out.dtype != torch.bfloat16:
        raise ShapeError(
            "place",
            f"needs [C, rows, cols] with C a power of two up to 32 and bf16 [rows, cols], received "
            f"{tuple(source.shape)} and {out.dtype} {tuple(out.shape)}",
        )
    strides = (source.stride(0) if source.dim() == 3 else 0, source.stride(-2), source.stride(-1))
    constants = (count, source.dtype == torch.bfloat16, thin.is_scaled and factor is not None)
    return (num_rows, num_cols, *strides, *out.stride()), constants
