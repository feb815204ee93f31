"""Matrices cut into blocks: maxima per block, one factor per block, and what may be cut.

One idea: every format here has blocks of `block_rows x block_cols` along both axes of a matrix [R, C] and one
number per block, in an array [R / block_rows, C / block_cols]. C is the contraction axis of the GEMM that
will read the matrix.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from metis.errors import ConfigError, ShapeError, nearest_name
from metis.formats import FORMAT_BLOCK_SHAPES

Rounding = Literal["rne", "stochastic"]

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def multiply_blocks(x: Tensor, factor: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """Multiply x [R, C] by one factor per block, [R / block_rows, C / block_cols] of the same dtype."""
    columns = x.unflatten(1, (-1, block_shape[1]))
    if block_shape[0] == 1:
        return (columns * factor[:, :, None]).flatten(1)
    tiles = columns.unflatten(0, (-1, block_shape[0]))
    return (tiles * factor[:, None, :, None]).flatten(2).flatten(0, 1)


def block_amax(x: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """Return `max |x|` per block, of the dtype of x: [R / block_rows, C / block_cols]; NaN propagates."""
    magnitude = x.abs()
    if block_shape[0] != 1:
        magnitude = magnitude.unflatten(0, (-1, block_shape[0])).amax(1)
    blocks = magnitude.unflatten(1, (-1, block_shape[1]))
    # Halving is about twice as fast on a CPU as a reduction over a short inner axis (of 2^n elements).
    width = block_shape[1] // 2
    while width:
        blocks = torch.maximum(blocks[..., :width], blocks[..., width : 2 * width])
        width //= 2
    return blocks.squeeze(-1)


def require_block_shape(
    block_shape: tuple[int, int] | None, format_name: str = "nvfp4"
) -> tuple[int, int] | None:
    """Return `block_shape` as a tuple (or None), or raise when the format or such a block does not exist."""
    if format_name not in FORMAT_BLOCK_SHAPES:
        raise ConfigError(
            "format",
            f"must be one of {tuple(FORMAT_BLOCK_SHAPES)}, received {format_name!r}"
            f"{nearest_name(str(format_name), FORMAT_BLOCK_SHAPES)}",
        )
    block_shape = None if block_shape is None else tuple(block_shape)
    known = FORMAT_BLOCK_SHAPES[format_name]
    if block_shape not in known:
        raise ShapeError(
            "block_shape", f"must be one of {known} for format {format_name!r}, received {block_shape}"
        )
    return block_shape


def require_input_dtype(x: Tensor, where: str) -> None:
    """Raise ShapeError unless x is fp32, bf16 or fp16."""
    if x.dtype not in INPUT_DTYPES:
        raise ShapeError(
            where,
            f"the input must be float32, bfloat16 or float16, received {x.dtype}; round it to float32 first",
        )


def require_matrix(x: Tensor, block_shape: tuple[int, int] | None, where: str) -> None:
    """Raise ShapeError unless x is a non-empty matrix of a known dtype made of whole blocks."""
    require_input_dtype(x, where)
    if x.dim() != 2 or x.numel() == 0:
        raise ShapeError(
            where, f"the input must be a non-empty matrix [R, C], received shape {tuple(x.shape)}"
        )
    for axis, multiple in enumerate(block_shape or ()):
        if x.shape[axis] % multiple:
            raise ShapeError(
                where,
                f"axis {axis} must be a multiple of {multiple} for blocks {block_shape}, "
                f"received shape {tuple(x.shape)}; pad it or keep this layer in BF16",
            )


def require_noise(x: Tensor, rounding: Rounding, noise_words: Tensor | None) -> None:
    """Raise unless `rounding` is known and comes with the random words [R, C] that it needs, or with none."""
    if rounding not in ("rne", "stochastic"):
        raise ConfigError("rounding", f"must be 'rne' or 'stochastic', received {rounding!r}")
    if rounding == "stochastic" and (noise_words is None or noise_words.shape != x.shape):
        received = "none" if noise_words is None else f"shape {tuple(noise_words.shape)}"
        raise ShapeError("noise_words", f"must have the input's shape {tuple(x.shape)}, received {received}")
    if rounding == "rne" and noise_words is not None:
        raise ConfigError("noise_words", "must be None with rounding 'rne', which uses no random bits")


def require_amax(amax: Tensor) -> None:
    """Raise ShapeError unless `amax` is an fp32 0-dim tensor."""
    if amax.dim() != 0 or amax.dtype != torch.float32:
        raise ShapeError("amax", f"must be a 0-dim float32 tensor, received {tuple(amax.shape)} {amax.dtype}")
