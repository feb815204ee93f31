"""Facts about the 4-bit and 8-bit floating-point formats, in one place and without torch.

Everything here is a constant of a format (NVFP4, MXFP4, FP8) or of the NVFP4 recipe; nothing here decides
anything. Slow reference, vectorised torch and Triton kernels all read these numbers, so that a constant
cannot be mistyped in one of them.

Traps:
* "Encode" multiplies before rounding to FP4, "decode" multiplies afterwards. What a tensor stores is its
  amax.
* Constants that the hardware holds in fp32 are given as the exact value of that fp32 number (`*_F32`),
  because 1/6 in double precision and 1/6 in single precision round products differently.
* A 4-bit code is sign (bit 3), two exponent bits, one mantissa bit: codes 0..7 are `E2M1_MAGNITUDES` in
  order and code 8 is minus zero. There is no infinity and no NaN.
"""

from __future__ import annotations

import struct


def as_float32(value: float) -> float:
    """Return `value` rounded once to IEEE fp32 (nearest, ties to even), as a Python float."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


FLOAT32_MAX = 3.4028234663852886e38
"""Largest finite fp32 number; reciprocals that overflow are capped here."""
FLOAT32_MANTISSA_BITS = 23
FLOAT32_EXPONENT_BIAS = 127
FLOAT32_EXPONENT_MASK = 0x7F800000

# --- E2M1, the element ------------------------------------------------------------------------------------

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude of codes 0..7. Grid step: 0.5 on [0, 2), 1 on [2, 4), 2 on [4, 6]."""

E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Midpoint i lies between codes i and i + 1. A tie goes to the even code: 0, 1, 1, 2, 2, 4, 4."""

E2M1_MAX = 6.0
E2M1_MAX_EXPONENT = 2
"""floor(log2 6): what a power-of-two scale leaves to the element."""
E2M1_MANTISSA_BITS = 1
E2M1_SIGN_BIT = 8
E2M1_BITS = 4

# --- E4M3 (float8_e4m3fn), NVFP4's block scale and an FP8 element -----------------------------------------

E4M3_MAX = 448.0
E4M3_MAX_BYTE = 0x7E
E4M3_NAN_BYTE = 0x7F
E4M3_MANTISSA_BITS = 3
E4M3_EXPONENT_BIAS = 7
E4M3_MIN_NORMAL = 2.0**-6
E4M3_MIN_SUBNORMAL = 2.0**-9
"""Also the spacing of the subnormals. A magnitude of half of it, 2^-10, is a tie and rounds to zero."""

# --- E5M2 (float8_e5m2), an FP8 element -------------------------------------------------------------------

E5M2_MAX = 57344.0
E5M2_MAX_BYTE = 0x7B
"""The next byte, 0x7C, is infinity, which a saturating cast never gives."""
E5M2_MANTISSA_BITS = 2
E5M2_EXPONENT_BIAS = 15

FP8_NAN_BYTE = 0x7F
"""NaN of both FP8 elements as it is written here; E5M2 reads 0x7D and 0x7E as NaN too."""

# --- E8M0 (float8_e8m0fnu), MXFP4's block scale: a bare exponent -------------------------------------------

E8M0_EXPONENT_BIAS = 127
"""Byte b is 2^(b - 127). There is no zero and no sign."""
E8M0_MIN_EXPONENT = -127
E8M0_MAX_EXPONENT = 127
E8M0_NAN_BYTE = 0xFF

# --- Which blocks a format has ----------------------------------------------------------------------------

FORMAT_BLOCK_SHAPES: dict[str, tuple[tuple[int, int] | None, ...]] = {
    "nvfp4": ((1, 16), (16, 16)),  # tiles for weights: both contraction directions decode to the same values
    "mxfp4": ((1, 32),),
    "fp8_e4m3": (None, (1, 128), (128, 128)),
    "fp8_e5m2": (None, (1, 128), (128, 128)),
}
"""[rows, columns] that share a scale, columns along the contraction axis; None: the whole tensor."""

FORMAT_ELEMENT_MAX = {"nvfp4": E2M1_MAX, "mxfp4": E2M1_MAX, "fp8_e4m3": E4M3_MAX, "fp8_e5m2": E5M2_MAX}
"""Largest magnitude of an element before its scales."""

MXFP4_BLOCK_SIZE = 32
FP8_BLOCK_SIZE = 128

# --- NVFP4: two levels of scale ---------------------------------------------------------------------------

NVFP4_BLOCK_SIZE = 16
NVFP4_BITS_PER_ELEMENT = E2M1_BITS + 8 / NVFP4_BLOCK_SIZE

TENSOR_SCALE_TARGET = E2M1_MAX * E4M3_MAX
"""2688: what the tensor's amax is scaled to. True value = e2m1 * block_scale * amax / 2688."""

RECIPROCAL_6_F32 = as_float32(1 / E2M1_MAX)
"""fp32(1/6) = 0x3E2AAAAB; folded into the tensor scale before it meets a block's maximum."""
RECIPROCAL_2688_F32 = as_float32(1 / TENSOR_SCALE_TARGET)

FOUR_OVER_SIX_E4M3_BOUND = 256.0
"""Block-scale bound under 4-over-6: 1.5 * 256 = 384 still fits in E4M3; the tensor target becomes 6 * 256."""

# --- The random Hadamard transform ------------------------------------------------------------------------

RHT_SIZE = 16
RHT_SIGN_VECTOR = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""Fixed signs shared by every layer, rank and step (minus positions: mask 0xD7E8, bit i for entry i)."""
RHT_SIZES = (16, 32, 64, 128)
RHT_SCALES_F32 = {size: as_float32(size**-0.5) for size in RHT_SIZES}
"""fp32(1 / sqrt(size)), which makes the rotation orthogonal; exact for 16 and 64 (1/4 and 1/8)."""
