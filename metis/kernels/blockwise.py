"""The one quantising kernel: load a tile, rotate it, find block scales, round, write what was asked for.

One idea: a tile lives in registers from load to store, so every variant costs one read and one write of
memory. Formats differ in one function from a block's amax to (byte, scale, encode scale); rounding, rotation,
outputs and noise are compile-time switches.

Traps:
* Tile shapes follow the memory order of the input: a transposed view is read, rotated and reduced down its
  columns, its operand written back in the same order. Packed bytes are row-major, so they alone are turned.
* Ragged edges are whole blocks (sizes are multiples of the block), so a mask never cuts a block.

Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from metis import formats
from metis.kernels import tuning
from metis.kernels.arguments import (
    GemmScales,
    KernelNoise,
    KernelOutput,
    ceil_div,
    empty_operand,
    empty_output,
    indices_of,
    is_column_major,
    is_hopper,
    next_power_of_two,
    rotation_of,
)
from metis.kernels.elementary import (
    E4M3_MAX,
    E8M0_NAN_BYTE,
    EXPONENT_BITS,
    RECIPROCAL_6,
    block_encode_scale,
    code_bits,
    code_of,
    e4m3_byte,
    e4m3_value,
    e8m0_value,
    exact_bf16_bits,
    larger_magnitude,
    load_float32,
    magnitude_bits,
    operand_of_codes,
    random_integers,
    rotate_tile,
    round_to_bf16,
    round_to_e2m1,
    round_to_e2m1_stochastic,
    round_to_e4m3,
    tensor_scales,
    with_sign,
)
from metis.kernels.launching import Key, Launcher, Prepared, layout
from metis.kernels.scales import write_gemm_scales

_TARGET = tl.constexpr(formats.TENSOR_SCALE_TARGET)
_E8M0_MAX_BYTE = tl.constexpr(formats.E8M0_MAX_EXPONENT + formats.E8M0_EXPONENT_BIAS)
NAN_CODE = tl.constexpr(formats.E2M1_MAGNITUDES.index(formats.E2M1_MAX))
_E2M1_MAX_EXPONENT = tl.constexpr(formats.E2M1_MAX_EXPONENT)

# Scale rules, as compile-time numbers.
NVFP4_STANDARD, NVFP4_UP, MXFP4_STANDARD, MXFP4_EVEN, MXFP4_UP = range(5)
_NVFP4_UP = tl.constexpr(NVFP4_UP)
_MXFP4_STANDARD = tl.constexpr(MXFP4_STANDARD)
_MXFP4_EVEN = tl.constexpr(MXFP4_EVEN)
_MXFP4_UP = tl.constexpr(MXFP4_UP)
_RULE_NAMES = ("nvfp4", "nvfp4 up", "mxfp4", "mxfp4 even", "mxfp4 up")

MAX_GRID_HEIGHT = 65535
"""CUDA's. More rows of tiles are counted along the grid's first axis: a division in every program."""

_STEP_DEPENDENT = ("key_0", "key_1")


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program works on: a shape (powers of two) and the warps that share it."""

    rows: int
    cols: int
    num_warps: int


def tile_of(x: Tensor, block_shape: tuple[int, int], rotation_size: int) -> Tile:
    """Return the tile for a matrix: long along its contiguous axis, whole blocks and rotations along C."""
    min_rows, min_cols = block_shape[0], max(block_shape[1], rotation_size)
    if is_column_major(x):
        # One warp holds whole blocks of a few neighbouring rows, so maxima and butterflies need no exchange.
        rows = min(128, max(16, next_power_of_two(x.shape[0])))
        return Tile(rows, min_cols, max(1, rows * min_cols // 2048))
    cols = max(min_cols, min(256, next_power_of_two(x.shape[1])))
    return Tile(max(min_rows, 4096 // cols), cols, 4)


def candidates(x: Tensor, block_shape: tuple[int, int], rotation_size: int) -> tuple[tuning.Choice, ...]:
    """Return the tiles to choose from, that of `tile_of` first."""
    constant = tile_of(x, block_shape, rotation_size)
    least = (block_shape[0], max(block_shape[1], rotation_size))
    return tuning.around(
        (constant.rows, constant.cols, constant.num_warps), least, tuple(map(next_power_of_two, x.shape)),
        is_column_major=is_column_major(x),
    )  # fmt: skip


@triton.jit
def load_tile(
    x,
    signs,
    rotation_scale,
    row_start,
    col_start,
    num_rows,
    num_cols,
    stride_r,
    stride_c,
    IS_BF16: tl.constexpr,
    ROTATION: tl.constexpr,
    NATIVE: tl.constexpr,
    NARROW: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Return a tile as fp32 [TILE_R, TILE_C], rotated and rounded to bf16 if ROTATION > 0; zero outside.

    NARROW: a thread takes four neighbouring rows instead of eight, and so all columns of a block.
    """
    rows = tl.arange(0, TILE_R)
    if NARROW:
        rows = tl.max_contiguous(rows, 4)
    cols = tl.arange(0, TILE_C)
    base = x + row_start.to(tl.int64) * stride_r + col_start.to(tl.int64) * stride_c
    mask = (row_start + rows < num_rows)[:, None] & (col_start + cols < num_cols)[None, :]
    tile = load_float32(base, rows[:, None] * stride_r + cols[None, :] * stride_c, mask, IS_BF16, NATIVE)
    if ROTATION > 0:
        tile = rotate_tile(tile, signs, rotation_scale, ROTATION, NATIVE, TILE_R, TILE_C)
    return tile


@triton.jit
def block_amax(
    x,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
    NATIVE: tl.constexpr = False,
):
    """Return `max |x|` per block, fp32 [TILE_R / BLOCK_R, TILE_C / BLOCK_C]; NaN propagates.

    NATIVE: on a GPU, which takes absolute values for nothing; the interpreter is quick with integers only.
    """
    if NATIVE:
        largest = tl.reduce(tl.reshape(x, [TILE_R, TILE_C // BLOCK_C, BLOCK_C]), 2, larger_magnitude)
        if BLOCK_R > 1:
            largest = tl.reduce(tl.reshape(largest, [TILE_R // BLOCK_R, BLOCK_R, TILE_C // BLOCK_C]), 1,
                                larger_magnitude)  # fmt: skip
        return largest
    bits = tl.max(tl.reshape(magnitude_bits(x), [TILE_R, TILE_C // BLOCK_C, BLOCK_C]), axis=2)
    if BLOCK_R > 1:
        bits = tl.max(tl.reshape(bits, [TILE_R // BLOCK_R, BLOCK_R, TILE_C // BLOCK_C]), axis=1)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def times_blocks(
    x, factor, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr
):
    """Multiply a tile by one factor per block."""
    return x * spread_blocks(factor, BLOCK_R, BLOCK_C, TILE_R, TILE_C)


@triton.jit
def spread_blocks(
    factor, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TILE_R: tl.constexpr, TILE_C: tl.constexpr
):
    """Return a tile with the number of its block in every place."""
    if BLOCK_R > 1:
        factor = tl.broadcast_to(factor[:, None, :], [TILE_R // BLOCK_R, BLOCK_R, TILE_C // BLOCK_C])
        factor = tl.reshape(factor, [TILE_R, TILE_C // BLOCK_C])
    factor = tl.broadcast_to(factor[:, :, None], [TILE_R, TILE_C // BLOCK_C, BLOCK_C])
    return tl.reshape(factor, [TILE_R, TILE_C])


@triton.jit
def nvfp4_scales(block_amax, amax, SCALE_RULE: tl.constexpr, NATIVE: tl.constexpr):
    """Return (byte, scale, encode scale) of every block, in the order of `metis.quantize.nvfp4`."""
    tensor_encode, tensor_decode = tensor_scales(amax, _TARGET, NATIVE)
    raw = block_amax * (tensor_encode * RECIPROCAL_6)
    raw = tl.minimum(raw, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    scale = round_to_e4m3(raw)
    byte = e4m3_byte(scale)
    if SCALE_RULE == _NVFP4_UP:
        byte = tl.where(scale < raw, byte + 1, byte)
        scale = e4m3_value(byte)
    return byte, scale, block_encode_scale(scale, tensor_decode, NATIVE)


@triton.jit
def mxfp4_scales(block_amax, SCALE_RULE: tl.constexpr):
    """Return (byte, scale, encode scale) of every block, in the order of `metis.quantize.scales`."""
    bits = block_amax.to(tl.int32, bitcast=True)
    finite = bits < EXPONENT_BITS
    if SCALE_RULE == _MXFP4_STANDARD:
        added = bits
    elif SCALE_RULE == _MXFP4_EVEN:
        added = tl.add(bits, 1 << 21, sanitize_overflow=False)
    else:
        added = tl.add(bits, (1 << 22) - 1, sanitize_overflow=False)
    byte = tl.minimum(tl.maximum((added >> 23) - _E2M1_MAX_EXPONENT, 0), _E8M0_MAX_BYTE)
    byte = tl.where(finite, byte, E8M0_NAN_BYTE)
    scale = e8m0_value(byte)
    encode = ((254 - tl.where(finite, byte, 0)) << 23).to(tl.float32, bitcast=True)
    return byte, scale, tl.where(finite, encode, float("nan"))


@triton.jit
def encode_tile(
    tile,
    whole,
    amax,
    tokens,
    features,
    position,
    packed,
    scale_bytes,
    operand,
    row_start,
    col_start,
    num_rows,
    num_cols,
    operand_stride_r,
    operand_stride_c,
    key_0,
    key_1,
    SCALE_RULE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_RANDOM_BITS: tl.constexpr,
    TOKENS_ARE_COLS: tl.constexpr,
    ALIGNED: tl.constexpr,
    NATIVE: tl.constexpr,
    NARROW: tl.constexpr,
    MERGE: tl.constexpr,
    WANT_PACKED: tl.constexpr,
    WANT_OPERAND: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Find block scales of a tile in registers, round it and write what was asked for.

    MERGE: the tile is what is left of `whole`; the operand is `bf16(whole + (decoded - tile))`.
    """
    random = 0
    if NUM_RANDOM_BITS > 0:
        # First: this is done while the tile is on its way.
        random = random_integers(tokens, features, row_start, col_start, num_rows, num_cols, key_0, key_1,
                                 position, NUM_RANDOM_BITS, TOKENS_ARE_COLS, ALIGNED, NATIVE, TILE_R,
                                 TILE_C)  # fmt: skip
    maxima = block_amax(tile, BLOCK_R, BLOCK_C, TILE_R, TILE_C, NATIVE)
    if SCALE_RULE >= _MXFP4_STANDARD:
        byte, scale, encode = mxfp4_scales(maxima, SCALE_RULE)
    else:
        byte, scale, encode = nvfp4_scales(maxima, tl.load(amax), SCALE_RULE, NATIVE)
    # A zero that is positive: the sign of a code is that of a strictly negative number.
    y = times_blocks(tile, encode, BLOCK_R, BLOCK_C, TILE_R, TILE_C) + 0.0
    if NUM_RANDOM_BITS > 0:
        bits = round_to_e2m1_stochastic(y, random, NUM_RANDOM_BITS, NATIVE)
        scales = spread_blocks(scale, BLOCK_R, BLOCK_C, TILE_R, TILE_C)
        number = operand_of_codes(bits, scales, NATIVE and SCALE_RULE < _MXFP4_STANDARD)
    else:
        value = with_sign(round_to_e2m1(y), y)
        bits = code_bits(value)
        # The upper half of the bits is the bf16 number, exactly; a NaN is NaN through its scale.
        number = exact_bf16_bits(times_blocks(value, scale, BLOCK_R, BLOCK_C, TILE_R, TILE_C))
    if MERGE:
        decoded = (number.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        if SCALE_RULE < _MXFP4_STANDARD:
            decoded = decoded * tl.div_rn(tl.load(amax), _TARGET)
        number = exact_bf16_bits(round_to_bf16(whole + (decoded - tile), NATIVE))
    write_outputs(number, code_of(bits), y, byte, packed, scale_bytes, operand, row_start, col_start,
                  num_rows, num_cols, operand_stride_r, operand_stride_c, BLOCK_R, BLOCK_C,
                  NAN_CODE if NUM_RANDOM_BITS > 0 else 0, NARROW, WANT_PACKED, WANT_OPERAND,
                  TILE_R, TILE_C)  # fmt: skip


@triton.jit(do_not_specialize=_STEP_DEPENDENT, do_not_specialize_on_alignment=("position",))
def _quantize_kernel(
    x,
    whole,
    amax,
    signs,
    tokens,
    features,
    packed,
    scale_bytes,
    operand,
    other_amax,
    alpha,
    position,
    num_rows,
    num_cols,
    stride_r,
    stride_c,
    whole_stride_r,
    whole_stride_c,
    operand_stride_r,
    operand_stride_c,
    rotation_scale,
    reciprocal,
    key_0,
    key_1,
    IS_BF16: tl.constexpr,
    SCALE_RULE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROTATION: tl.constexpr,
    NUM_RANDOM_BITS: tl.constexpr,
    TOKENS_ARE_COLS: tl.constexpr,
    ALIGNED: tl.constexpr,
    NATIVE: tl.constexpr,
    NARROW: tl.constexpr,
    MERGE: tl.constexpr,
    WANT_ALPHA: tl.constexpr,
    INVERTIBLE: tl.constexpr,
    WANT_PACKED: tl.constexpr,
    WANT_OPERAND: tl.constexpr,
    FLAT: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    if WANT_ALPHA:
        if tl.program_id(0) + tl.program_id(1) == 0:
            write_gemm_scales(amax, other_amax, alpha, reciprocal, INVERTIBLE)
    if FLAT:
        tiles_per_row = tl.cdiv(num_cols, TILE_C)
        row_start = (tl.program_id(0) // tiles_per_row) * TILE_R
        col_start = (tl.program_id(0) % tiles_per_row) * TILE_C
    else:
        row_start = tl.program_id(1) * TILE_R
        col_start = tl.program_id(0) * TILE_C
    tile = load_tile(x, signs, rotation_scale, row_start, col_start, num_rows, num_cols, stride_r, stride_c,
                     IS_BF16, ROTATION, NATIVE, NARROW, TILE_R, TILE_C)  # fmt: skip
    source = tile
    if MERGE:
        source = load_tile(whole, signs, rotation_scale, row_start, col_start, num_rows, num_cols,
                           whole_stride_r, whole_stride_c, IS_BF16, ROTATION, NATIVE, NARROW, TILE_R,
                           TILE_C)  # fmt: skip
    encode_tile(tile, source, amax, tokens, features, position, packed, scale_bytes, operand, row_start,
                col_start, num_rows, num_cols, operand_stride_r, operand_stride_c, key_0, key_1, SCALE_RULE,
                BLOCK_R, BLOCK_C, NUM_RANDOM_BITS, TOKENS_ARE_COLS, ALIGNED, NATIVE, NARROW, MERGE,
                WANT_PACKED, WANT_OPERAND, TILE_R, TILE_C)  # fmt: skip


@triton.jit
def write_outputs(
    number,
    code,
    y,
    byte,
    packed,
    scale_bytes,
    operand,
    row_start,
    col_start,
    num_rows,
    num_cols,
    operand_stride_r,
    operand_stride_c,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CODE_OF_NAN: tl.constexpr,
    NARROW: tl.constexpr,
    WANT_PACKED: tl.constexpr,
    WANT_OPERAND: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Write operand, codes and scale bytes of a tile.

    number: bf16 bits, int16. code: 0..15, int32. y: what was rounded. byte: per block.
    """
    if WANT_OPERAND:
        store_tile(operand, number, row_start, col_start, num_rows, num_cols, operand_stride_r,
                   operand_stride_c, TILE_R, TILE_C, NARROW)  # fmt: skip
    if WANT_PACKED:
        # y is NaN where its block's scale is, and nowhere else.
        code = tl.where(y == y, code, CODE_OF_NAN)
        low, high = tl.split(tl.reshape(code, [TILE_R, TILE_C // 2, 2]))
        store_tile(packed, (low | (high << 4)).to(tl.uint8), row_start, col_start // 2, num_rows,
                   num_cols // 2, num_cols // 2, 1, TILE_R, TILE_C // 2)  # fmt: skip
        store_tile(scale_bytes, byte.to(tl.uint8), row_start // BLOCK_R, col_start // BLOCK_C,
                   num_rows // BLOCK_R, num_cols // BLOCK_C, num_cols // BLOCK_C, 1, TILE_R // BLOCK_R,
                   TILE_C // BLOCK_C)  # fmt: skip


@triton.jit
def store_tile(
    out,
    value,
    row_start,
    col_start,
    num_rows,
    num_cols,
    stride_r,
    stride_c,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
    NARROW: tl.constexpr = False,
):
    """Write a tile [TILE_R, TILE_C] where it lies inside the matrix."""
    rows = tl.arange(0, TILE_R)
    if NARROW:
        rows = tl.max_contiguous(rows, 4)
    cols = tl.arange(0, TILE_C)
    base = out + row_start.to(tl.int64) * stride_r + col_start.to(tl.int64) * stride_c
    mask = (row_start + rows < num_rows)[:, None] & (col_start + cols < num_cols)[None, :]
    tl.store(base + rows[:, None] * stride_r + cols[None, :] * stride_c, value, mask=mask)


_quantizers = Launcher(_quantize_kernel)


def launch(
    x: Tensor,
    amax: Tensor | None,
    *,
    check: Callable[[], None],
    scale_rule: int,
    block_shape: tuple[int, int],
    sign_vector: tuple[int, ...] | None,
    noise: KernelNoise | None,
    num_random_bits: int,
    want_packed: bool,
    want_operand: bool,
    operand_out: Tensor | None = None,
    gemm_scales: GemmScales | None = None,
    whole: Tensor | None = None,
    tile: Tile | None = None,
) -> KernelOutput:
    """Run the kernel; `check` refuses wrong arguments, `tile` overrides `tile_of` (for measuring).

    gemm_scales: what else to write, from the amax of this matrix and of another one. whole: what x is the
    residual of, of the same shape, dtype and memory order; added back to the operand.
    """
    key = (
        layout(x), layout(whole), layout(operand_out), scale_rule, block_shape, sign_vector,
        None if noise is None else (noise.tokens, noise.features, noise.tokens_are_cols, num_random_bits),
        want_packed, want_operand,
        None if gemm_scales is None else (gemm_scales.reciprocal_target, gemm_scales.invertible), tile,
    )  # fmt: skip
    ready = _quantizers.ready(key)
    if ready is None:
        check()
        ready = _prepare(
            key, x, whole, operand_out, scale_rule, block_shape, sign_vector, noise, num_random_bits,
            want_packed, want_operand, gemm_scales, tile,
        )  # fmt: skip
    output = empty_output(x, block_shape, want_packed, want_operand, operand_out)
    other = (None, None) if gemm_scales is None else (gemm_scales.other_amax, gemm_scales.out)
    key_words, position = ((0, 0), None) if noise is None else noise.counter_words(x.device)
    ready(
        (x, whole, amax, *ready.kept, output.packed, output.scale_bytes, output.operand, *other, position),
        key_words,
    )
    return output


def _prepare(
    key: Key,
    x: Tensor,
    whole: Tensor | None,
    operand_out: Tensor | None,
    scale_rule: int,
    block_shape: tuple[int, int],
    sign_vector: tuple[int, ...] | None,
    noise: KernelNoise | None,
    num_random_bits: int,
    want_packed: bool,
    want_operand: bool,
    gemm_scales: GemmScales | None,
    tile: Tile | None,
) -> Prepared:
    num_rows, num_cols = x.shape
    signs, rotation, rotation_scale = rotation_of(sign_vector, x.device)
    strides = (0, 0)
    if want_operand:
        strides = empty_operand(x).stride() if operand_out is None else operand_out.stride()
    tokens = features = None
    if noise is not None:
        tokens, features = (indices_of(runs, x.device) for runs in (noise.tokens, noise.features))
    turned = is_column_major(x)
    aligned = noise is not None and noise.features_are_aligned(num_random_bits)
    constants = (
        x.dtype == torch.bfloat16, scale_rule, *block_shape, rotation,
        0 if noise is None else num_random_bits, noise is not None and noise.tokens_are_cols,
        aligned, is_hopper(x), turned, whole is not None, gemm_scales is not None,
        gemm_scales is not None and gemm_scales.invertible, want_packed, want_operand,
    )  # fmt: skip
    reciprocal = 0.0 if gemm_scales is None else gemm_scales.reciprocal_target
    whole_strides = (0, 0) if whole is None else whole.stride()

    def build(choice: tuning.Choice) -> Prepared:
        rows, cols, num_warps = choice
        grid = ceil_div(num_cols, cols), ceil_div(num_rows, rows)
        is_flat = grid[1] > MAX_GRID_HEIGHT
        return _quantizers.prepare(
            key, (grid[0] * grid[1], 1) if is_flat else grid,
            (num_rows, num_cols, *x.stride(), *whole_strides, *strides, rotation_scale, reciprocal),
            (*constants, is_flat, rows, cols), (signs, tokens, features), num_warps=num_warps,
            enable_fp_fusion=False,
        )  # fmt: skip

    if tile is not None:
        return build((tile.rows, tile.cols, tile.num_warps))
    variant = (
        _RULE_NAMES[scale_rule], "x".join(map(str, block_shape)), rotation,
        "rne" if noise is None else f"sr {num_random_bits} {'aligned' if aligned else 'apart'}",
        tuning.dtype_name(x.dtype),
        f"{'columns' if turned else 'rows'} to {'columns' if strides[0] < strides[1] else 'rows'}",
        "+".join(["packed"] * want_packed + ["operand"] * want_operand + ["head"] * (whole is not None)),
    )  # fmt: skip
    name = tuning.key_of("quantize", variant, x.shape)
    return tuning.prepare(name, candidates(x, block_shape, rotation), x.device, build)
