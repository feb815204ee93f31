"""A quantised matrix that carries everything needed to decode it: values, the very scales used, the amax.

One idea: two decodings. `operand()` leaves the tensor scale out: E2M1 times E4M3 has at most six
significant bits, so it is exact in bf16 and a bf16 GEMM with fp32 accumulation forms the very products of
an FP4 tensor core; `gemm_alpha` then goes onto the accumulator. `dequantize()` gives the numbers
themselves, with the extra roundings that such a decoding has.

Traps:
* What is stored is the fp32 amax, not a scale. Block scales are decode scales already multiplied by the
  encode scale of the tensor.
* A block scale of zero is legal: the block decodes to zero even where its codes are +-6.
* amax above FLT_MAX / 448 overflows in `dequantize` (as it does in the hardware path).

Shape letters: R rows, C columns; blocks run along C, the contraction axis of the GEMM that will read the
matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metis.errors import ShapeError
from metis.formats import (
    BLOCK_SHAPES,
    GEMM_ALPHA_DIVISOR,
    NVFP4_BLOCK_SIZE,
    RECIPROCAL_GEMM_ALPHA_DIVISOR_F32,
    TENSOR_SCALE_TARGET,
    as_float32,
)
from metis.quantize.packing import pack_codes, unpack_codes
from metis.rounding import codes_to_values, values_to_codes


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """An NVFP4 matrix [R, C]: true value = `e2m1 * block_scale * amax / scale_target`.

    values: E2M1 values, fp32 [R, C]; -0.0 stands for code 8.
    block_scale: E4M3 values in fp32, [R, C / 16] for blocks (1, 16), [R / 16, C / 16] for (16, 16).
    amax: fp32, 0-dim: the largest magnitude the tensor scale was made from (global, when reduced over ranks).
    block_shape: (1, 16) or (16, 16).
    scale_target: what amax was scaled to: 2688 = 6 * 448, or 1536 = 6 * 256 under 4-over-6.
    """

    values: Tensor
    block_scale: Tensor
    amax: Tensor
    block_shape: tuple[int, int]
    scale_target: float = TENSOR_SCALE_TARGET

    @classmethod
    def from_bytes(
        cls,
        packed: Tensor,
        block_scale_bytes: Tensor,
        amax: Tensor,
        block_shape: tuple[int, int],
        scale_target: float = TENSOR_SCALE_TARGET,
    ) -> QuantizedTensor:
        """Rebuild a tensor from `packed()` [R, C / 2], `block_scale_bytes()` and `amax`, bit for bit."""
        block_shape = require_block_shape(block_shape)
        values = codes_to_values(unpack_codes(packed))
        block_scale = block_scale_bytes.view(torch.float8_e4m3fn).to(torch.float32)
        expected = (values.shape[0] // block_shape[0], values.shape[1] // block_shape[1])
        if tuple(block_scale.shape) != expected:
            raise ShapeError(
                "QuantizedTensor",
                f"block scales of a {tuple(values.shape)} matrix with blocks {block_shape} must have shape "
                f"{expected}, received {tuple(block_scale.shape)}",
            )
        return cls(values, block_scale, amax, block_shape, scale_target)

    @property
    def shape(self) -> torch.Size:
        """[R, C]."""
        return self.values.shape

    def codes(self) -> Tensor:
        """Return the 4-bit codes, uint8 [R, C], 0..15."""
        return values_to_codes(self.values)

    def packed(self) -> Tensor:
        """Return two codes per byte, uint8 [R, C / 2], the even column in the low nibble."""
        return pack_codes(self.codes())

    def block_scale_bytes(self) -> Tensor:
        """Return the E4M3 bytes of `block_scale`, uint8 of the same shape; NaN is 0x7F."""
        # A scale is never negative; only a NaN can bring a sign bit.
        return self.block_scale.to(torch.float8_e4m3fn).view(torch.uint8) & 0x7F

    def operand(self, dtype: torch.dtype) -> Tensor:
        """Return `e2m1 * block_scale` [R, C], no tensor scale in it: exact in bf16, fp16, fp32, fp64."""
        return self._times_blocks(self.block_scale).to(dtype)

    def tensor_scale(self) -> Tensor:
        """Return the decode scale `fp32(amax / scale_target)`, fp32 0-dim, as torch's scaled_mm takes it."""
        # A full tensor as divisor: CUDA multiplies by the reciprocal when the divisor is a Python number.
        return self.amax / torch.full_like(self.amax, self.scale_target)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the decoded matrix [R, C] in `dtype`.

        `f = fp32(fp32(block_scale * amax) * fp32(1 / scale_target))`, then `fp32(e2m1 * f)`, cast to `dtype`.
        Source: dequantise kernel of Transformer Engine at d0067d0da6.
        """
        factor = (self.block_scale * self.amax) * as_float32(1 / self.scale_target)
        return self._times_blocks(factor).to(dtype)

    def _times_blocks(self, factor: Tensor) -> Tensor:
        """Multiply every value by its block's fp32 factor."""
        return multiply_blocks(self.values, factor, self.block_shape)


def multiply_blocks(x: Tensor, factor: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """Multiply x [R, C] by one factor per block, [R / block_rows, C / 16] of the same dtype."""
    columns = x.unflatten(1, (-1, NVFP4_BLOCK_SIZE))
    if block_shape[0] == 1:
        return (columns * factor[:, :, None]).flatten(1)
    tiles = columns.unflatten(0, (-1, block_shape[0]))
    return (tiles * factor[:, None, :, None]).flatten(2).flatten(0, 1)


def gemm_alpha(
    amax_a: Tensor,
    amax_b: Tensor,
    target_a: float = TENSOR_SCALE_TARGET,
    target_b: float = TENSOR_SCALE_TARGET,
) -> Tensor:
    """Return what multiplies the accumulator of `operand_a @ operand_b`: fp32 0-dim.

    `alpha = fp32(fp32(amax_a * amax_b) * fp32(1 / (target_a * target_b)))`; the product of the default
    targets is 36 * 448 * 448. A zero amax gives zero. Source: NVFP4 GEMM of Transformer Engine at
    d0067d0da6.
    """
    reciprocal = RECIPROCAL_GEMM_ALPHA_DIVISOR_F32
    if target_a * target_b != GEMM_ALPHA_DIVISOR:
        reciprocal = as_float32(1 / (target_a * target_b))
    return (amax_a * amax_b) * reciprocal


def require_block_shape(block_shape: tuple[int, int]) -> tuple[int, int]:
    """Return `block_shape` as a tuple, or raise ShapeError when NVFP4 has no such block."""
    if tuple(block_shape) not in BLOCK_SHAPES:
        raise ShapeError("block_shape", f"must be one of {BLOCK_SHAPES}, received {tuple(block_shape)}")
    return tuple(block_shape)
