"""A quantised matrix that carries everything needed to decode it: values, the very scales used, the amax.

One idea: two decodings. `operand()` leaves the tensor scale out; it goes onto the accumulator (`gemm_alpha`).
For NVFP4 and MXFP4 the operand is exact in bf16 (E2M1 times E4M3 has at most six significant bits, times a
power of two only two), and so are FP8 values alone or times a power of two; a bf16 GEMM with fp32
accumulation then forms the very products of an FP4 or FP8 tensor core. `dequantize()` gives the numbers
themselves, with the extra roundings that such a decoding has.

| format | element | block scale | tensor scale |
| --- | --- | --- | --- |
| nvfp4 | E2M1 | E4M3 per 1x16 or 16x16, already multiplied by the tensor's encode scale | amax / 2688 |
| mxfp4 | E2M1 | E8M0 per 1x32 | none |
| fp8_e4m3, fp8_e5m2, no blocks | FP8 | none | 1 / encode scale of amax |
| fp8_e4m3, fp8_e5m2, blocks | FP8 | fp32 per 1x128 or 128x128 | none |

Traps:
* What is stored for the tensor is its fp32 amax, not a scale; every scale follows from it.
* An NVFP4 block scale of zero is legal: the block decodes to zero even where its codes are +-6.
* NVFP4 with amax above FLT_MAX / 448 overflows in `dequantize` (as it does in the hardware path), and so does
  an MXFP4 block whose maximum rounds up to 2^128.
* FP8 blocks with fp32 scales are not exact in bf16 nor in fp32: the GEMM applies such scales to partial sums.
* Exact means within the range of bf16: FP8 block scales below 2^-117 reach under its smallest subnormal.

Shape letters: R rows, C columns; blocks run along C, the contraction axis of the GEMM that will read the
matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metis.errors import ShapeError
from metis.formats import FORMAT_ELEMENT_MAX, TENSOR_SCALE_TARGET, as_float32
from metis.quantize.blocks import multiply_blocks, require_block_shape
from metis.quantize.packing import pack_codes, unpack_codes
from metis.quantize.scales import e8m0_bytes_of_values, e8m0_values, fp8_encode_scale
from metis.rounding import codes_to_values, fp8_bytes_to_values, values_to_codes, values_to_fp8_bytes

Format = Literal["nvfp4", "mxfp4", "fp8_e4m3", "fp8_e5m2"]

_AMAX_BYTES = 4


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A matrix [R, C] as elements and scales: true value = `value * block_scale * tensor_scale()`.

    values: on the grid of the element, fp32 [R, C]; in E2M1 -0.0 stands for code 8.
    block_scale: values of the scale format in fp32, [R / block_rows, C / block_cols]; None without blocks.
    amax: fp32, 0-dim: the largest magnitude of the tensor (global, when reduced over ranks); the tensor scale
    of NVFP4 and of FP8 without blocks is made from it, elsewhere it is information.
    block_shape: one of `FORMAT_BLOCK_SHAPES[format]`; None: one scale for the whole tensor (FP8 only).
    scale_target: NVFP4 only, what amax was scaled to: 2688 = 6 * 448, or 1536 = 6 * 256 under 4-over-6.
    power_of_two_scales: FP8 only, whether scales had their mantissa cut off.
    """

    values: Tensor
    block_scale: Tensor | None
    amax: Tensor
    block_shape: tuple[int, int] | None
    scale_target: float = TENSOR_SCALE_TARGET
    format: Format = "nvfp4"
    power_of_two_scales: bool = False

    @classmethod
    def from_bytes(
        cls,
        packed: Tensor,
        block_scale_bytes: Tensor | None,
        amax: Tensor,
        block_shape: tuple[int, int] | None,
        scale_target: float = TENSOR_SCALE_TARGET,
        format: Format = "nvfp4",
        power_of_two_scales: bool = False,
    ) -> QuantizedTensor:
        """Rebuild a tensor from `packed()`, `block_scale_bytes()` and `amax`, bit for bit.

        Raises ShapeError when the scales are not those of such a matrix.
        """
        block_shape = require_block_shape(block_shape, format)
        if format.startswith("fp8"):
            values = fp8_bytes_to_values(packed, _element(format))
        else:
            values = codes_to_values(unpack_codes(packed))
        block_scale = _scale_values(block_scale_bytes, format)
        expected, received = None, None if block_scale is None else tuple(block_scale.shape)
        if block_shape is not None:
            expected = (values.shape[0] // block_shape[0], values.shape[1] // block_shape[1])
        if received != expected:
            raise ShapeError(
                "QuantizedTensor",
                f"block scales of a {tuple(values.shape)} matrix with blocks {block_shape} must have shape "
                f"{expected}, received {received}",
            )
        return cls(values, block_scale, amax, block_shape, scale_target, format, power_of_two_scales)

    @property
    def shape(self) -> torch.Size:
        """[R, C]."""
        return self.values.shape

    @property
    def device(self) -> torch.device:
        """Where the tensor lies."""
        return self.values.device

    @property
    def element_max(self) -> float:
        """Largest magnitude that an element can have before its scales: 6, 448 or 57344."""
        return FORMAT_ELEMENT_MAX[self.format]

    @property
    def has_tensor_scale(self) -> bool:
        """Whether `tensor_scale()` can differ from 1: NVFP4, and FP8 without blocks."""
        return self.format == "nvfp4" or self.block_shape is None

    @property
    def is_exact_in_bf16(self) -> bool:
        """Whether `operand(torch.bfloat16)` is exact; not so for FP8 blocks with scales of 24 bits."""
        if not self.format.startswith("fp8"):
            return True
        return self.block_shape is None or self.power_of_two_scales

    @property
    def num_bytes(self) -> int:
        """Bytes that `packed()`, `block_scale_bytes()` and `amax` hold; a tile's scale counts once."""
        bits = 8 if self.format.startswith("fp8") else 4
        scales = 0 if self.block_scale is None else self.block_scale.numel()
        bytes_per_scale = 4 if self.format.startswith("fp8") else 1
        return self.values.numel() * bits // 8 + scales * bytes_per_scale + _AMAX_BYTES

    def codes(self) -> Tensor:
        """Return the codes, uint8 [R, C]: 4 bits (0..15) or, for FP8, the byte (NaN is 0x7F)."""
        if self.format.startswith("fp8"):
            return values_to_fp8_bytes(self.values, _element(self.format))
        return values_to_codes(self.values)

    def packed(self) -> Tensor:
        """Return the codes as stored: uint8 [R, C / 2] with the even column in the low nibble; FP8 [R, C]."""
        codes = self.codes()
        return codes if self.format.startswith("fp8") else pack_codes(codes)

    def block_scale_bytes(self) -> Tensor | None:
        """Return the bytes of `block_scale`, uint8, or None without blocks.

        NVFP4: E4M3 (NaN is 0x7F); MXFP4: E8M0 (NaN is 0xFF), both of the shape of `block_scale`. FP8: fp32 in
        memory order, [R / block_rows, 4 * C / block_cols].
        """
        if self.block_scale is None:
            return None
        if self.format == "mxfp4":
            return e8m0_bytes_of_values(self.block_scale)
        if self.format.startswith("fp8"):
            return self.block_scale.contiguous().view(torch.uint8)
        # A scale is never negative; only a NaN can bring a sign bit.
        return self.block_scale.to(torch.float8_e4m3fn).view(torch.uint8) & 0x7F

    def operand(self, dtype: torch.dtype) -> Tensor:
        """Return `value * block_scale` [R, C], no tensor scale in it: exact where `is_exact_in_bf16`.

        Exact then in bf16, fp32 and fp64, and for NVFP4 in fp16 too. FP8 blocks with fp32 scales are exact in
        fp64 only.
        """
        if self.block_scale is None:
            return self.values.to(dtype)
        if not self.is_exact_in_bf16 and dtype == torch.float64:
            return multiply_blocks(self.values.to(dtype), self.block_scale.to(dtype), self.block_shape)
        return multiply_blocks(self.values, self.block_scale, self.block_shape).to(dtype)

    def tensor_scale(self) -> Tensor:
        """Return the decode scale that belongs on the accumulator, fp32 0-dim.

        NVFP4: `f(amax / scale_target)`, as torch's scaled_mm takes it. FP8 without blocks: `f(1 / scale)`
        with the encode scale of `fp8_encode_scale`. Everything else: 1.
        """
        if self.format == "nvfp4":
            # A full tensor as divisor: CUDA multiplies by the reciprocal when the divisor is a Python number.
            return self.amax / torch.full_like(self.amax, self.scale_target)
        if self.block_shape is None:
            return fp8_encode_scale(self.amax, self.element_max, self.power_of_two_scales).reciprocal_()
        return torch.ones_like(self.amax)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the decoded matrix [R, C] in `dtype`.

        NVFP4: `f = fp32(fp32(block_scale * amax) * fp32(1 / scale_target))`, then `fp32(e2m1 * f)`. The
        others: `fp32(value * scale)`. Cast to `dtype` at the end. Source: dequantise kernels of Transformer
        Engine at d0067d0da6.
        """
        if self.block_scale is None:
            return (self.values * self.tensor_scale()).to(dtype)
        factor = self.block_scale
        if self.format == "nvfp4":
            factor = (factor * self.amax) * as_float32(1 / self.scale_target)
        return multiply_blocks(self.values, factor, self.block_shape).to(dtype)


def gemm_alpha(a: QuantizedTensor, b: QuantizedTensor) -> Tensor:
    """Return what multiplies the accumulator of `operand_a @ operand_b`: fp32 0-dim.

    NVFP4 twice: `alpha = fp32(fp32(amax_a * amax_b) * fp32(1 / (target_a * target_b)))`; the product of the
    default targets is 36 * 448 * 448, and a zero amax gives zero. Otherwise the product of the two tensor
    scales: 1 for MXFP4 and FP8 blocks. Source: NVFP4 GEMM of Transformer Engine at d0067d0da6.
    """
    if a.format == b.format == "nvfp4":
        return (a.amax * b.amax) * as_float32(1 / (a.scale_target * b.scale_target))
    return a.tensor_scale() * b.tensor_scale()


def _element(format_name: str) -> str:
    return format_name.removeprefix("fp8_")


def _scale_values(scale_bytes: Tensor | None, format_name: str) -> Tensor | None:
    """Return the fp32 values of `block_scale_bytes()` of a format."""
    if scale_bytes is None:
        return None
    if format_name == "mxfp4":
        return e8m0_values(scale_bytes)
    if format_name.startswith("fp8"):
        return scale_bytes.contiguous().view(torch.float32)
    return scale_bytes.view(torch.float8_e4m3fn).to(torch.float32)
