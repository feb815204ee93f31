"""Scale rules of MXFP4 and FP8: from a block's largest magnitude to the factor that its elements get.

One idea: exponents are read from and written into the bits of fp32 numbers. `log2` in floating point rounds
2^k - tiny up to k; bits do not.

E8M0 holds 2^(byte - 127) and nothing else. With `bits` the fp32 bits of a block's amax, the three rules
differ in what is added before the mantissa is cut off:

    exponent = ((bits + add) >> 23) - 127 - 2, clamped to [-127, 127]
    standard   add 0             OCP MX v1.0: floor(log2 amax) - floor(log2 6)
    even       add 2^21          amax rounded to E2M1's one mantissa bit first (from 1.75 * 2^k up to 2^(k+1))
    up         add 2^22 - 1      the smallest exponent with amax <= 6 * 2^exponent

Traps:
* Subnormal bits have exponent field 0, and the clamp gives -127 for them under every rule, as it should: all
  lie below 6 * 2^-127. So does a block of zeros (byte 0x00, scale 2^-127, codes 0 or 8).
* Only a NaN or infinity in a block gives the NaN scale.
* FP8 in Transformer Engine: an amax of zero, infinity or NaN gives scale 1, so that infinities saturate to
  the largest number *silently* while a NaN stays one.

Sources: OCP Microscaling Formats v1.0, section 6.3; torchao `ScaleCalculationMode`; Transformer Engine
`recipe_common.cuh`, `compute_scale_from_amax`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from metis.formats import (
    E2M1_MANTISSA_BITS,
    E2M1_MAX_EXPONENT,
    E8M0_EXPONENT_BIAS,
    E8M0_MAX_EXPONENT,
    E8M0_NAN_BYTE,
    FLOAT32_EXPONENT_MASK,
    FLOAT32_MANTISSA_BITS,
    FLOAT32_MAX,
)

E8m0Rounding = Literal["standard", "even", "up"]

_ADDED_BEFORE_CUT = {
    "standard": 0,
    "even": 1 << (FLOAT32_MANTISSA_BITS - E2M1_MANTISSA_BITS - 1),
    "up": (1 << (FLOAT32_MANTISSA_BITS - 1)) - 1,
}
_NAN_BITS = 0x7FC00000
_SMALLEST_SCALE_BITS = 1 << (FLOAT32_MANTISSA_BITS - 1)
"""fp32 bits of 2^-127, the one E8M0 value that is subnormal in fp32."""


def e8m0_bytes_from_amax(block_amax: Tensor, scale_rounding: E8m0Rounding) -> Tensor:
    """Return the E8M0 byte of every block for E2M1 elements, uint8: the rule of this module.

    block_amax: fp32, non-negative, any shape; infinity and NaN give 0xFF.
    """
    bits = block_amax.contiguous().view(torch.int32)
    field = (bits + _ADDED_BEFORE_CUT[scale_rounding]) >> FLOAT32_MANTISSA_BITS
    # fp32 and E8M0 share their bias, so the field less 2 is the byte.
    byte = (field - E2M1_MAX_EXPONENT).clamp_(0, E8M0_MAX_EXPONENT + E8M0_EXPONENT_BIAS)
    return byte.masked_fill_(~block_amax.isfinite(), E8M0_NAN_BYTE).to(torch.uint8)


def e8m0_values(scale_bytes: Tensor) -> Tensor:
    """Return the scales 2^(byte - 127) of E8M0 bytes (uint8) in fp32; 0xFF gives NaN."""
    byte = scale_bytes.to(torch.int32)
    bits = (byte << FLOAT32_MANTISSA_BITS).masked_fill_(byte == 0, _SMALLEST_SCALE_BITS)
    return bits.masked_fill_(byte == E8M0_NAN_BYTE, _NAN_BITS).view(torch.float32)


def e8m0_bytes_of_values(scale: Tensor) -> Tensor:
    """Return the E8M0 bytes (uint8) of fp32 scales that are powers of two in [2^-127, 2^127] or NaN."""
    # A NaN of either sign has an exponent field of 255 = 0xFF; 2^-127 has 0.
    return ((scale.contiguous().view(torch.int32) >> FLOAT32_MANTISSA_BITS) & 0xFF).to(torch.uint8)


def fp8_encode_scale(amax: Tensor, element_max: float, power_of_two: bool) -> Tensor:
    """Return what elements are multiplied by before the cast to FP8, fp32 of the shape of amax.

    `scale = min(f(element_max / amax), FLT_MAX)`; 1 where amax is zero, infinite or NaN. power_of_two: the
    mantissa is cut off, which lowers the scale and so never saturates more. Always a normal number, at least
    element_max / FLT_MAX. Source: Transformer Engine, `compute_scale_from_amax` (with epsilon 0).
    """
    # A full tensor as dividend and divisor: CUDA multiplies by a reciprocal when one is a Python number.
    scale = (torch.full_like(amax, element_max) / amax).clamp_(max=FLOAT32_MAX)
    if power_of_two:
        scale.view(torch.int32).bitwise_and_(FLOAT32_EXPONENT_MASK)
    usable = (amax > 0) & (amax < float("inf"))
    return torch.where(usable, scale, torch.ones_like(scale))
