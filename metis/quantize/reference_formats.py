"""The slow twins of MXFP4, FP8 and the scale swizzle: block by block, obviously right, for tests only.

One idea: share nothing with the fast code but the facts in `formats`. Where the fast code reads exponents
from bits, this one takes them from `math.frexp`; where the fast code divides by a grid step or casts, this
one looks up a list of all values of the element and their midpoints. Blocks are Python loops; the arithmetic
that must round as fp32 does is numpy fp32, one operation per line.

bf16 and fp16 inputs are passed as fp32 arrays, which hold them exactly.

Trap: keep it plain. A trick here that the fast code shares would hide a mistake in both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from metis.formats import (
    E2M1_MAGNITUDES,
    E2M1_MAX,
    E4M3_EXPONENT_BIAS,
    E4M3_MANTISSA_BITS,
    E4M3_MAX_BYTE,
    E5M2_EXPONENT_BIAS,
    E5M2_MANTISSA_BITS,
    E5M2_MAX_BYTE,
    E8M0_NAN_BYTE,
    FLOAT32_MAX,
    FP8_NAN_BYTE,
)

_F = np.float32


@dataclass(frozen=True)
class ReferenceBlocks:
    """codes: uint8 [R, C]; scale: fp32 per block (or 0-dim for a whole tensor), decode direction;
    scale_bytes: uint8 of that shape for MXFP4, else None.
    """

    codes: np.ndarray
    scale: np.ndarray
    scale_bytes: np.ndarray | None = None


def reference_element_values(element: str) -> list[float]:
    """Return the values of all finite non-negative codes of "e2m1", "e4m3" or "e5m2", in code order."""
    if element == "e2m1":
        return list(E2M1_MAGNITUDES)
    bits, bias, last = {
        "e4m3": (E4M3_MANTISSA_BITS, E4M3_EXPONENT_BIAS, E4M3_MAX_BYTE),
        "e5m2": (E5M2_MANTISSA_BITS, E5M2_EXPONENT_BIAS, E5M2_MAX_BYTE),
    }[element]
    values = []
    for byte in range(last + 1):
        exponent, mantissa = byte >> bits, byte & (2**bits - 1)
        hidden = 0 if exponent == 0 else 2**bits
        values.append((hidden + mantissa) * 2.0 ** (max(exponent, 1) - bias - bits))
    return values


_VALUES = {element: np.array(reference_element_values(element)) for element in ("e2m1", "e4m3", "e5m2")}
_MIDPOINTS = {element: (values[1:] + values[:-1]) / 2 for element, values in _VALUES.items()}


def reference_nearest_code(y: np.ndarray, element: str) -> np.ndarray:
    """Return the code of the nearest magnitude, ties to the even code, of non-NaN numbers; no sign, int64.

    Numbers above the largest value get its code. Every midpoint is exact in float64.
    """
    magnitude = np.abs(y.astype(np.float64))
    fewest = np.searchsorted(_MIDPOINTS[element], magnitude, side="left")
    most = np.searchsorted(_MIDPOINTS[element], magnitude, side="right")
    return np.where(fewest % 2 == 0, fewest, most)  # they differ by one, and at ties only


def reference_e8m0_byte(amax: np.float32, scale_rounding: str) -> int:
    """Return the E8M0 byte of a block of E2M1 elements from its largest magnitude, by exact comparisons."""
    value = float(amax)
    if not math.isfinite(value):
        return E8M0_NAN_BYTE
    if value == 0.0:
        return 0
    mantissa, exponent = math.frexp(value)  # value = mantissa * 2^exponent, mantissa in [1/2, 1)
    floor_log2 = exponent - 1
    if scale_rounding == "even" and 2 * mantissa >= 1.75:
        floor_log2 += 1
    scale_exponent = floor_log2 - 2
    if scale_rounding == "up":
        while Fraction(value) > Fraction(6) * Fraction(2) ** scale_exponent:
            scale_exponent += 1
    return min(max(scale_exponent, -127), 127) + 127


def reference_quantize_mxfp4(
    x: np.ndarray,
    scale_rounding: str = "standard",
    noise_words: np.ndarray | None = None,
    num_random_bits: int = 16,
) -> ReferenceBlocks:
    """Quantise an fp32 array [R, C] to MXFP4; arguments as `mxfp4.quantize_mxfp4`."""
    codes = np.zeros(x.shape, dtype=np.uint8)
    scale = np.zeros((x.shape[0], x.shape[1] // 32), dtype=np.float32)
    scale_bytes = np.zeros(scale.shape, dtype=np.uint8)
    for row, index in np.ndindex(*scale.shape):
        where = (row, slice(32 * index, 32 * index + 32))
        byte = reference_e8m0_byte(np.max(np.abs(x[where])), scale_rounding)
        scale_bytes[row, index] = byte
        if byte == E8M0_NAN_BYTE:
            scale[row, index] = np.nan
            codes[where] = 0 if noise_words is None else 7
            continue
        scale[row, index] = 2.0 ** (byte - 127)
        # Scaling in float64 is exact; the one rounding to fp32 is that of the definition.
        y = (x[where].astype(np.float64) * 2.0 ** (127 - byte)).astype(np.float32)
        if noise_words is None:
            magnitude = reference_nearest_code(y, "e2m1")
        else:
            magnitude = _stochastic_codes(y, noise_words[where], num_random_bits)
        codes[where] = magnitude + 8 * (y < 0)
    return ReferenceBlocks(codes, scale, scale_bytes)


def reference_quantize_fp8(
    x: np.ndarray,
    element: str,
    block_shape: tuple[int, int] | None,
    power_of_two_scales: bool = False,
    amax: np.float32 | None = None,
) -> ReferenceBlocks:
    """Quantise an fp32 array [R, C] to FP8; arguments as `fp8.quantize_fp8`."""
    rows, cols = block_shape or x.shape
    codes = np.zeros(x.shape, dtype=np.uint8)
    scale = np.zeros((x.shape[0] // rows, x.shape[1] // cols), dtype=np.float32)
    for i, j in np.ndindex(*scale.shape):
        where = (slice(rows * i, rows * i + rows), slice(cols * j, cols * j + cols))
        encode = _fp8_encode_scale(
            np.max(np.abs(x[where])) if amax is None else amax, element, power_of_two_scales
        )
        with np.errstate(all="ignore"):
            y = x[where] * encode
            scale[i, j] = _F(1) / encode
        block_codes = reference_nearest_code(np.where(np.isnan(y), 0, y), element) + 128 * np.signbit(y)
        codes[where] = np.where(np.isnan(y), FP8_NAN_BYTE, block_codes)
    return ReferenceBlocks(codes, scale if block_shape else scale[0, 0])


def reference_decode(
    quantized: ReferenceBlocks, element: str, block_shape: tuple[int, int] | None
) -> np.ndarray:
    """Decode to fp32 [R, C]: `f32(value * scale)`."""
    values = _VALUES[element]
    sign_bit = 8 if element == "e2m1" else 128
    rows, cols = block_shape or quantized.codes.shape
    scale = np.reshape(quantized.scale, (quantized.codes.shape[0] // rows, -1))
    out = np.zeros(quantized.codes.shape, dtype=np.float32)
    for i, j in np.ndindex(*scale.shape):
        where = (slice(rows * i, rows * i + rows), slice(cols * j, cols * j + cols))
        codes = quantized.codes[where]
        nan = codes % sign_bit >= len(values)
        magnitude = np.where(nan, np.nan, values[np.where(nan, 0, codes % sign_bit)])
        signed = np.where(codes >= sign_bit, -magnitude, magnitude).astype(np.float32)
        with np.errstate(all="ignore"):
            out[where] = signed * scale[i, j]
    return out


def reference_swizzle_offset(row: int, col: int, num_cols: int) -> int:
    """Return where the scale of (row, col) lies in a swizzled array of a matrix with num_cols columns."""
    tile = row // 128 * math.ceil(num_cols / 4) + col // 4
    return (tile * 32 + row % 32) * 16 + row % 128 // 32 * 4 + col % 4


def _stochastic_codes(y: np.ndarray, words: np.ndarray, num_random_bits: int) -> np.ndarray:
    """Return magnitudes' codes of fp32 numbers rounded by random words: up iff k + floor(2^b f) >= 2^b."""
    values = _VALUES["e2m1"]
    codes = np.zeros(y.shape, dtype=np.int64)
    for index, (number, word) in enumerate(zip(y.tolist(), words.tolist(), strict=True)):
        magnitude = abs(number)
        if magnitude >= E2M1_MAX:
            codes[index] = len(values) - 1
            continue
        code = int(np.searchsorted(values, magnitude, side="right")) - 1
        lower, upper = Fraction(values[code]), Fraction(values[code + 1])
        rest = (Fraction(magnitude) - lower) / (upper - lower)
        integer = word // 2**8 if num_random_bits == 24 else word % 2**num_random_bits
        codes[index] = code + (integer + math.floor(rest * 2**num_random_bits) >= 2**num_random_bits)
    return codes


def _fp8_encode_scale(amax: np.float32, element: str, power_of_two: bool) -> np.float32:
    """Return what Transformer Engine multiplies by: element_max / amax, capped; 1 for unusable maxima."""
    if amax == 0 or not math.isfinite(float(amax)):
        return _F(1)
    with np.errstate(over="ignore"):
        scale = _F(_VALUES[element][-1]) / _F(amax)
    if np.isinf(scale):
        scale = _F(FLOAT32_MAX)
    if power_of_two:
        scale = _F(2.0 ** (math.frexp(float(scale))[1] - 1))
    return scale
