"""Splitting in kernels: coefficients P = x V, and the residual R = x - P V^T with what it is asked for.

One idea: x is read twice, once for P and once for R, and everything else that a training step wants of R (its
largest magnitude, the thin product R F) comes out of the second read. Products run on the tensor cores, bf16
times bf16 with fp32 sums. Unlike the other kernels these have no bitwise twin in torch: P and R are within
fp32 rounding of `metis.decompose.projector`, and what is quantised later is this R, bit for bit.

Layouts change no bit of P or R: the feature axis is cut into canonical chunks (`metis.decompose.projector`),
each summed in one fixed order, chunks added in a fixed binary tree; rows are independent of each other. Tile
shapes are therefore constants and never tuned.

Shape letters: M rows, K features held here, r columns of V, q columns of F, C chunks held here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metis.errors import ShapeError
from metis.kernels.arguments import (
    ceil_div,
    is_native,
    next_power_of_two,
    require_device,
)
from metis.kernels.elementary import (
    EXPONENT_BITS,
    QUIET_NAN_BITS,
    as_int_pointer,
    exact_bf16_bits,
    magnitude_bits,
    round_to_bf16,
)
from metis.kernels.launching import Key, Launcher, Prepared, layout

MAX_RANK = 128
"""Columns of V that one program holds."""

Shape = tuple[int, int, int, int, int | None]
"""Rows and features of a tile, warps, stages of the software pipeline, largest number of registers."""

_PROJECT_SHAPE: Shape = (64, 64, 4, 3, None)
_RESIDUAL_SHAPE: Shape = (64, 64, 4, 3, None)
_RESIDUAL_AND_PRODUCT_SHAPE: Shape = (128, 64, 4, 3, None)
_WIDE_RESIDUAL_AND_PRODUCT_SHAPE: Shape = (64, 64, 4, 4, None)
"""Where r and q together exceed 128, which would take more registers than there are."""

_MAX_RESIDUAL_CHUNKS, _MIN_TILES_PER_CHUNK = 8, 4
"""Programs that share a row of tiles, and tiles of each at least: every one writes sums of its own."""

ALIGNMENT = 16
"""Of addresses in bytes and of rows in numbers: what Triton looks at."""

_MIN_DOT = 16
_FOLD_BLOCK = 1024


@triton.jit
def load_operand(pointer, offsets, mask, IS_BF16: tl.constexpr, NATIVE: tl.constexpr, EVEN: tl.constexpr):
    """Load numbers as a dot reads them: bf16 on a GPU, fp32 otherwise (the interpreter cannot multiply bf16).

    EVEN: the mask is true everywhere, and is not looked at.
    """
    if IS_BF16 and NATIVE:  # what is loaded goes to the tensor cores as it lies
        source = pointer.to(tl.pointer_type(tl.bfloat16))
    else:
        source = pointer
    if EVEN:
        number = tl.load(source + offsets)
    else:
        number = tl.load(source + offsets, mask=mask, other=0)
    if not (IS_BF16 and NATIVE):
        number = _widened(number, IS_BF16)
    return number


@triton.jit
def _widened(raw, IS_BF16: tl.constexpr):
    """Return loaded numbers (bf16 as int16) in fp32."""
    if IS_BF16:
        number = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        number = raw.to(tl.float32)
    return number


@triton.jit
def _project_kernel(
    x,
    v,
    partials,
    num_rows,
    stride_r,
    stride_v,
    rank,
    width,
    chunk,
    num_parts,
    IS_BF16: tl.constexpr,
    NATIVE: tl.constexpr,
    EVEN: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, columns = tl.arange(0, BLOCK_R), tl.arange(0, RANK)
    row_start = tl.program_id(0) * BLOCK_R
    row_mask = (row_start + rows < num_rows)[:, None]
    # Long distances are scalars: a tile's own offsets fit 32 bits, and registers are short.
    x += row_start.to(tl.int64) * stride_r
    block = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_R, RANK], dtype=tl.float32)
    for part in range(num_parts):
        first = part * width + tl.program_id(1) * chunk
        for start in range(0, chunk, BLOCK_K):
            mask = start + block < chunk
            tile = load_operand(x + (first + start), rows[:, None] * stride_r + block[None, :],
                                row_mask & mask[None, :], IS_BF16, NATIVE, EVEN)  # fmt: skip
            basis = load_operand(v + (first + start).to(tl.int64) * stride_v,
                                 block[:, None] * stride_v + columns[None, :],
                                 mask[:, None] & (columns < rank)[None, :], True, NATIVE and IS_BF16,
                                 EVEN)  # fmt: skip
            total = tl.dot(tile, basis, total, input_precision="ieee")
    partials += tl.program_id(1).to(tl.int64) * num_rows * rank + row_start.to(tl.int64) * rank
    tl.store(partials + rows[:, None] * rank + columns[None, :], total,
             mask=row_mask & (columns < rank)[None, :])  # fmt: skip


@triton.jit
def _fold_kernel(
    partials,
    out,
    other_out,
    zeroed,
    numel,
    num_columns,
    out_stride,
    other_stride,
    COUNT: tl.constexpr,
    TO_BF16: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    HAS_ZEROED: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add COUNT partial sums pairwise, neighbours first; to one or two places. A launch that comes later
    finds zero in `zeroed`.
    """
    if HAS_ZEROED:
        if tl.program_id(0) == 0:
            tl.store(zeroed, 0.0)
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < numel
    which = tl.arange(0, COUNT).to(tl.int64)
    sums = tl.load(partials + which[:, None] * numel + places[None, :], mask=mask[None, :], other=0.0)
    for level in tl.static_range(5):
        if (COUNT >> level) > 1:
            pairs = tl.reshape(sums, [COUNT >> (level + 1), 2, BLOCK])
            first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
            sums = first + second
    total = tl.reshape(sums, [BLOCK])
    row, column = places // num_columns, places % num_columns
    if TO_BF16:
        bits = exact_bf16_bits(round_to_bf16(total, NATIVE))
        tl.store(out + row * out_stride + column, bits, mask=mask)
        if HAS_OTHER:
            tl.store(other_out + row * other_stride + column, bits, mask=mask)
    else:
        tl.store(out + row * out_stride + column, total, mask=mask)


@triton.jit
def subtract_head(
    x,
    v,
    f,
    residual,
    coefficients,
    begin,
    end,
    row_mask,
    num_features,
    stride_r,
    stride_v,
    stride_f,
    rank,
    num_f,
    IS_BF16: tl.constexpr,
    NATIVE: tl.constexpr,
    EVEN: tl.constexpr,
    RANK: tl.constexpr,
    NUM_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write R = x - P V^T for features [begin, end); return its largest magnitudes and the sum of R F.

    x, residual: begin at the tile's first row. coefficients: P [BLOCK_R, RANK] as a dot reads it. Returns
    int32 [BLOCK_R, 8], bits of magnitudes, and fp32 [BLOCK_R, NUM_F] (nothing for NUM_F = 0).
    """
    rows, columns, block = tl.arange(0, BLOCK_R), tl.arange(0, RANK), tl.arange(0, BLOCK_K)
    x_offsets = rows[:, None] * stride_r + block[None, :]
    out_offsets = rows[:, None] * num_features + block[None, :]
    largest = tl.zeros([BLOCK_R, 8], dtype=tl.int32)
    f_columns = tl.arange(0, NUM_F if NUM_F > 0 else 1)
    total = tl.zeros([BLOCK_R, NUM_F if NUM_F > 0 else 1], dtype=tl.float32)
    # Without a second product the compiler does not read ahead, so one tile is read ahead here.
    if NUM_F == 0:
        inside = begin + block < num_features
        ahead = tl.load(x + begin + x_offsets, mask=row_mask & inside[None, :], other=0)
    for number in range((end - begin) // BLOCK_K):
        start = begin + number * BLOCK_K
        inside = start + block < num_features
        mask = row_mask & inside[None, :]
        if NUM_F == 0:
            tile = _widened(ahead, IS_BF16)
            following = start + BLOCK_K
            if EVEN:
                more = tl.zeros([1, 1], dtype=tl.int32) + following < end  # the interpreter wants a tensor
            else:
                more = row_mask & (following + block < tl.minimum(end, num_features))[None, :]
            ahead = tl.load(x + following + x_offsets, mask=more, other=0)
        elif EVEN:
            tile = _widened(tl.load(x + start + x_offsets), IS_BF16)
        else:
            tile = _widened(tl.load(x + start + x_offsets, mask=mask, other=0), IS_BF16)
        basis = load_operand(v + start.to(tl.int64) * stride_v,
                              block[None, :] * stride_v + columns[:, None],
                              (columns < rank)[:, None] & inside[None, :], True, NATIVE and IS_BF16,
                              EVEN)  # fmt: skip
        left = tile - tl.dot(coefficients, basis, input_precision="ieee")
        if IS_BF16:
            left = round_to_bf16(left, NATIVE)
            stored = exact_bf16_bits(left)
        else:
            stored = left
        if EVEN:
            tl.store(residual + start + out_offsets, stored)
        else:  # where the mask is false x and V are zero, and so is what is left
            tl.store(residual + start + out_offsets, stored, mask=mask)
        groups = tl.reshape(magnitude_bits(left), [BLOCK_R, BLOCK_K // 8, 8])
        largest = tl.maximum(largest, tl.max(groups, axis=1))
        if NUM_F > 0:
            factor = load_operand(f + start.to(tl.int64) * stride_f,
                                   block[:, None] * stride_f + f_columns[None, :],
                                   inside[:, None] & (f_columns < num_f)[None, :], True, NATIVE and IS_BF16,
                                   EVEN)  # fmt: skip
            if IS_BF16 and NATIVE:
                total = tl.dot(exact_bf16_bits(left).to(tl.bfloat16, bitcast=True), factor, total)
            else:
                total = tl.dot(left, factor, total, input_precision="ieee")
    return largest, total


@triton.jit
def _residual_kernel(
    x,
    p,
    v,
    f,
    residual,
    amax,
    partials,
    num_rows,
    num_features,
    stride_r,
    stride_v,
    stride_f,
    rank,
    num_f,
    IS_BF16: tl.constexpr,
    NATIVE: tl.constexpr,
    EVEN: tl.constexpr,
    RANK: tl.constexpr,
    NUM_F: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows, columns = tl.arange(0, BLOCK_R), tl.arange(0, RANK)
    row_start = tl.program_id(0) * BLOCK_R
    row_mask = (row_start + rows < num_rows)[:, None]
    # Whole tiles, as evenly over the programs as they go.
    num_tiles = tl.cdiv(num_features, BLOCK_K)
    begin = (tl.program_id(1) * num_tiles // NUM_CHUNKS) * BLOCK_K
    end = ((tl.program_id(1) + 1) * num_tiles // NUM_CHUNKS) * BLOCK_K
    # Long distances are scalars: a tile's own offsets fit 32 bits, and registers are short.
    x += row_start.to(tl.int64) * stride_r
    residual += row_start.to(tl.int64) * num_features
    coefficients = load_operand(p + row_start.to(tl.int64) * rank, rows[:, None] * rank + columns[None, :],
                                 row_mask & (columns < rank)[None, :], True, NATIVE and IS_BF16,
                                 EVEN)  # fmt: skip
    largest, total = subtract_head(x, v, f, residual, coefficients, begin, end, row_mask, num_features,
                                   stride_r, stride_v, stride_f, rank, num_f, IS_BF16, NATIVE, EVEN, RANK,
                                   NUM_F, BLOCK_R, BLOCK_K)  # fmt: skip
    result = tl.max(tl.max(largest, axis=1), axis=0)
    tl.atomic_max(as_int_pointer(amax), tl.where(result > EXPONENT_BITS, QUIET_NAN_BITS, result))
    if NUM_F > 0:
        f_columns = tl.arange(0, NUM_F)
        partials += tl.program_id(1).to(tl.int64) * num_rows * num_f + row_start.to(tl.int64) * num_f
        tl.store(partials + rows[:, None] * num_f + f_columns[None, :], total,
                 mask=row_mask & (f_columns < num_f)[None, :])  # fmt: skip


_projections, _folds, _residuals = (
    Launcher(kernel) for kernel in (_project_kernel, _fold_kernel, _residual_kernel)
)


def project(x: Tensor, v: Tensor, num_chunks: int, parts: int = 1, shape: Shape = _PROJECT_SHAPE) -> Tensor:
    """Return the partial sums of x V over the canonical chunks held here: fp32 [C, M, r].

    x: [M, K] bf16 or fp32, contiguous along K; K = parts * width, `parts` matrices side by side, chunk c the
    c-th slice of every one. v: [K, r] bf16, contiguous along r. num_chunks: C, dividing the width. Each chunk
    is summed in ascending features on the tensor cores (fp32 products for fp32 x). `fold` adds the chunks.
    shape: for measuring; another one may change last bits.
    """
    key = (layout(x), layout(v), num_chunks, parts, shape)
    ready = _projections.ready(key) or _prepare_projection(key, x, v, num_chunks, parts, shape)
    partials = torch.empty(num_chunks, x.shape[0], v.shape[1], dtype=torch.float32, device=x.device)
    ready((x, v, partials))
    return partials


def _prepare_projection(
    key: Key, x: Tensor, v: Tensor, num_chunks: int, parts: int, shape: Shape
) -> Prepared:
    require_factors("project", x, v)
    num_rows, num_features = x.shape
    width = num_features // parts
    if num_features % parts or width % num_chunks:
        raise ShapeError(
            "project", f"{num_features} features must divide into {parts} parts of {num_chunks} chunks"
        )
    rank, chunk = v.shape[1], width // num_chunks
    block_rows, block_features, num_warps, num_stages, maxnreg = shape
    is_even = num_rows % block_rows == 0 and chunk % block_features == 0 and rank == padded(rank)
    return _projections.prepare(
        key, (ceil_div(num_rows, block_rows), num_chunks),
        (num_rows, x.stride(0), v.stride(0), rank, width, chunk, parts),
        (x.dtype == torch.bfloat16, is_native(x), is_even, padded(rank), block_rows, block_features),
        num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg,
    )  # fmt: skip


def fold(
    partials: Tensor,
    out: Tensor | None = None,
    other_out: Tensor | None = None,
    zeroed: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return the sum over the first axis, neighbours first in a binary tree: [M, r] in `dtype`.

    partials: fp32 [C, M, r], C a power of two up to 32, contiguous. out, other_out: where to write (bf16 [M,
    r], contiguous along r; the second is a copy); None: a new tensor. zeroed: fp32 0-dim, set to zero on the
    way.
    """
    if out is None:
        out = torch.empty(*partials.shape[1:], dtype=dtype, device=partials.device)
    key = (layout(partials), layout(out), layout(other_out), zeroed is None)
    ready = _folds.ready(key) or _prepare_fold(key, partials, out, other_out, zeroed is not None)
    ready((partials, out, other_out, zeroed))
    return out


def _prepare_fold(
    key: Key, partials: Tensor, out: Tensor, other_out: Tensor | None, has_zeroed: bool
) -> Prepared:
    count, num_rows, num_columns = partials.shape
    if count & (count - 1) or count > 32 or not partials.is_contiguous():
        raise ShapeError("fold", f"needs a power of two of partial sums up to 32, received {count}")
    assert out.stride(1) == 1 and (other_out is None or other_out.stride(1) == 1)
    to_bf16 = out.dtype == torch.bfloat16
    assert other_out is None or (to_bf16 and other_out.dtype == torch.bfloat16)
    numel = num_rows * num_columns
    other_stride = 0 if other_out is None else other_out.stride(0)
    return _folds.prepare(
        key, (ceil_div(numel, _FOLD_BLOCK), 1), (numel, num_columns, out.stride(0), other_stride),
        (count, to_bf16, other_out is not None, has_zeroed, is_native(partials), _FOLD_BLOCK),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def residual(
    x: Tensor,
    p: Tensor,
    v: Tensor,
    amax: Tensor,
    factor: Tensor | None = None,
    shape: Shape | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return R = c(x - p v^T) and, with a factor F, the partial sums of R F.

    x: [M, K] bf16 or fp32 (the dtype c of R), contiguous along K. p: [M, r], v: [K, r], factor: [K, q], all
    bf16, contiguous along r and q (p as a whole). amax: fp32 0-dim, raised to max |R| (NaN propagates). The
    product p v^T is summed in fp32 in ascending order of r; R is rounded once. Partial sums: fp32 [C, M, q]
    for `fold`. With a factor, V and F must be `is_aligned`.
    """
    if shape is None:
        shape = _residual_shape(v, factor)
    key = (layout(x), layout(p), layout(v), layout(factor), shape)
    num_chunks = _num_residual_chunks(x.shape[1], shape)
    ready = _residuals.ready(key) or _prepare_residual(key, x, p, v, factor, shape)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partials = None
    if factor is not None:
        size = (num_chunks, x.shape[0], factor.shape[1])
        partials = torch.empty(size, dtype=torch.float32, device=x.device)
    ready((x, p, v, factor, out, amax, partials))
    return out, partials


def _residual_shape(v: Tensor, factor: Tensor | None) -> Shape:
    if factor is None:
        return _RESIDUAL_SHAPE
    is_narrow = v.shape[1] + factor.shape[1] <= 128
    return _RESIDUAL_AND_PRODUCT_SHAPE if is_narrow else _WIDE_RESIDUAL_AND_PRODUCT_SHAPE


def _num_residual_chunks(num_features: int, shape: Shape) -> int:
    pieces = ceil_div(num_features, shape[1]) // _MIN_TILES_PER_CHUNK
    return min(_MAX_RESIDUAL_CHUNKS, 1 << max(0, pieces.bit_length() - 1))


def _prepare_residual(
    key: Key, x: Tensor, p: Tensor, v: Tensor, factor: Tensor | None, shape: Shape
) -> Prepared:
    require_factors("residual", x, v)
    num_rows, num_features = x.shape
    if p.shape != (num_rows, v.shape[1]) or not p.is_contiguous() or p.dtype != torch.bfloat16:
        raise ShapeError(
            "residual",
            f"needs p bf16 [{num_rows}, {v.shape[1]}] contiguous, received {tuple(p.shape)} {p.dtype}",
        )
    if factor is not None:
        require_factors("residual", x, factor)
        if not is_aligned(v, factor):
            raise ShapeError(
                "residual",
                f"with a factor needs V and F whose columns and rows are multiples of {ALIGNMENT} numbers "
                f"apart, received V {tuple(v.shape)} and F {tuple(factor.shape)}; project R by F instead",
            )
    rank, num_f = v.shape[1], 0 if factor is None else factor.shape[1]
    block_rows, block_features, num_warps, num_stages, maxnreg = shape
    num_chunks = _num_residual_chunks(num_features, shape)
    is_even = num_rows % block_rows == 0 and num_features % block_features == 0
    is_even = is_even and rank == padded(rank) and num_f == padded(num_f)
    stride_f = 0 if factor is None else factor.stride(0)
    return _residuals.prepare(
        key, (ceil_div(num_rows, block_rows), num_chunks),
        (num_rows, num_features, x.stride(0), v.stride(0), stride_f, rank, num_f),
        (x.dtype == torch.bfloat16, is_native(x), is_even, padded(rank), padded(num_f), num_chunks,
         block_rows, block_features),
        num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg,
    )  # fmt: skip


def is_aligned(*matrices: Tensor) -> bool:
    """Whether the copy engine takes matrices, in the widest words.

    Of a loop with two products, of which one gets its factor through registers, ptxas 12.8 (Triton 3.6) makes
    code that reads registers which nothing has written: wrong sums, or an illegal address.
    tests/gpu/machine_code.py looks for that.
    """
    return all(
        m.shape[1] % ALIGNMENT == 0 and m.stride(0) % ALIGNMENT == 0 and m.data_ptr() % ALIGNMENT == 0
        for m in matrices
    )


def padded(rank: int) -> int:
    """Return the columns that a dot works on, 0 for none."""
    return 0 if rank == 0 else max(_MIN_DOT, next_power_of_two(rank))


def require_factors(where: str, x: Tensor, v: Tensor) -> None:
    """Refuse a matrix and a factor of its features that kernels here cannot read."""
    require_device(where, x.device)
    if x.dim() != 2 or x.dtype not in (torch.bfloat16, torch.float32) or x.stride(1) != 1:
        raise ShapeError(
            where,
            f"needs a bf16 or fp32 matrix contiguous along its columns, received {tuple(x.shape)} {x.dtype}",
        )
    if v.dim() != 2 or v.shape[0] != x.shape[1] or v.dtype != torch.bfloat16 or v.stride(1) != 1:
        raise ShapeError(
            where,
            f"needs a bf16 factor over {x.shape[1]} features, contiguous along its columns, received "
            f"{tuple(v.shape)} {v.dtype}",
        )
    if not 1 <= v.shape[1] <= MAX_RANK:
        raise ShapeError(where, f"needs 1 to {MAX_RANK} columns, received {v.shape[1]}")
