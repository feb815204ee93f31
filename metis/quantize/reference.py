"""The slow twin of `nvfp4.quantize`: one element at a time, obviously right, for tests only.

One idea: share nothing with the fast code but the facts in `formats`. Scalars are numpy fp32, one operation
per line, in the order of the specification; rounding to E2M1 compares with the midpoints, rounding to E4M3
searches the list of all its values in exact arithmetic, stochastic rounding uses fractions. Blocks are
Python loops.

bf16 and fp16 inputs are passed as fp32 arrays, which hold them exactly (a maximum is the same in either).

Traps: keep it slow and plain. A trick here that the fast code shares would hide a mistake in both. Source:
Transformer Engine d0067d0da6, `custom_recipes/reference_nvfp4.py`, checked on the worked example of tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from metis.formats import (
    E2M1_MAGNITUDES,
    E2M1_MIDPOINTS,
    E2M1_SIGN_BIT,
    E4M3_MAX_BYTE,
    E4M3_NAN_BYTE,
    FLOAT32_MAX,
    FOUR_OVER_SIX_E4M3_BOUND,
    NVFP4_BLOCK_SIZE,
    RHT_SIGN_VECTOR,
)

_F = np.float32
_TIE_WINNERS = (0, 2, 2, 4, 4, 6, 6)
"""Code that each of `E2M1_MIDPOINTS` rounds to: the even one of its two neighbours."""


@dataclass(frozen=True)
class ReferenceQuantized:
    """codes: uint8 [R, C]; block_scale_bytes: uint8 [R / block_rows, C / 16]; amax: fp32; scale_target."""

    codes: np.ndarray
    block_scale_bytes: np.ndarray
    amax: np.float32
    scale_target: float


def reference_e2m1_rne(y: float) -> int:
    """Return the code nearest to y, ties to the even code; NaN gives 0, |y| > 6 gives 7."""
    magnitude = abs(float(y))
    if math.isnan(magnitude):
        return 0
    code = 0
    for lower_code, midpoint in enumerate(E2M1_MIDPOINTS):
        if magnitude > midpoint:
            code = lower_code + 1
        elif magnitude == midpoint:
            code = _TIE_WINNERS[lower_code]
            break
        else:
            break
    return code + (E2M1_SIGN_BIT if y < 0 else 0)


def reference_e2m1_stochastic(y: float, word: int, num_random_bits: int) -> int:
    """Return the code of y rounded by a random word, in exact fractions; NaN gives +6 (code 7)."""
    magnitude = abs(float(y))
    if math.isnan(magnitude):
        return 7
    sign = E2M1_SIGN_BIT if y < 0 else 0
    if magnitude >= E2M1_MAGNITUDES[-1]:
        return 7 + sign
    code = max(c for c, grid in enumerate(E2M1_MAGNITUDES) if grid <= magnitude)
    lower, upper = Fraction(E2M1_MAGNITUDES[code]), Fraction(E2M1_MAGNITUDES[code + 1])
    rest = (Fraction(magnitude) - lower) / (upper - lower)
    integer = word // 2**8 if num_random_bits == 24 else word % 2**num_random_bits
    goes_up = integer + math.floor(rest * 2**num_random_bits) >= 2**num_random_bits
    return code + int(goes_up) + sign


def reference_e4m3_value(byte: int) -> float:
    """Return the value of a non-negative E4M3 byte (0x00..0x7F) from its bit fields."""
    if byte == E4M3_NAN_BYTE:
        return math.nan
    exponent, mantissa = byte >> 3, byte & 7
    return mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)


_E4M3_VALUES = [Fraction(reference_e4m3_value(byte)) for byte in range(E4M3_MAX_BYTE + 1)]


def reference_e4m3_byte(x: float) -> int:
    """Return the byte nearest to x in [0, 448], ties to the even byte; NaN gives 0x7F."""
    if math.isnan(x):
        return E4M3_NAN_BYTE
    exact = Fraction(float(x))
    upper = next(byte for byte, value in enumerate(_E4M3_VALUES) if value >= exact)
    if upper == 0:
        return 0
    to_lower, to_upper = exact - _E4M3_VALUES[upper - 1], _E4M3_VALUES[upper] - exact
    if to_lower == to_upper:
        return upper if upper % 2 == 0 else upper - 1
    return upper if to_upper < to_lower else upper - 1


def reference_quantize(
    x: np.ndarray,
    block_shape: tuple[int, int],
    amax: np.float32 | None = None,
    noise_words: np.ndarray | None = None,
    num_random_bits: int = 16,
    four_over_six: str | None = None,
    scale_rounding: str = "standard",
) -> ReferenceQuantized:
    """Quantise an fp32 array [R, C]; arguments as `nvfp4.quantize` (noise words mean stochastic rounding)."""
    assert x.dtype == np.float32
    rows, columns = x.shape
    codes = np.zeros((rows, columns), dtype=np.uint8)
    scales = np.zeros((rows // block_shape[0], columns // NVFP4_BLOCK_SIZE), dtype=np.uint8)
    target = 6.0 * (FOUR_OVER_SIX_E4M3_BOUND if four_over_six else 448.0)
    with np.errstate(all="ignore"):
        amax = _F(np.max(np.abs(x))) if amax is None else _F(amax)
        encode = np.minimum(_F(target) / amax, _F(FLOAT32_MAX))
        if encode == 0:
            encode = _F(1)
        decode = _F(1) / encode
        for where, block in _blocks(x, block_shape):
            words = None if noise_words is None else noise_words[where]
            if four_over_six:
                byte, block_codes = _block_four_over_six(block, amax, encode, decode, four_over_six)
            else:
                byte = _plain_scale_byte(block, encode, scale_rounding)
                block_codes = _block_codes(block, byte, decode, words, num_random_bits)
            codes[where] = block_codes
            scales[where[0].start // block_shape[0], where[1].start // NVFP4_BLOCK_SIZE] = byte
    return ReferenceQuantized(codes, scales, amax, target)


def reference_dequantize(quantized: ReferenceQuantized, block_shape: tuple[int, int]) -> np.ndarray:
    """Decode to fp32 [R, C]: `f = f32(f32(s * amax) * f32(1 / target))`, then `f32(e2m1 * f)`."""
    out = np.zeros(quantized.codes.shape, dtype=np.float32)
    reciprocal = _F(1 / quantized.scale_target)
    with np.errstate(all="ignore"):
        for row, col in np.ndindex(*out.shape):
            byte = quantized.block_scale_bytes[row // block_shape[0], col // NVFP4_BLOCK_SIZE]
            factor = (_F(reference_e4m3_value(int(byte))) * quantized.amax) * reciprocal
            out[row, col] = _code_value(int(quantized.codes[row, col])) * factor
    return out


def reference_hadamard_matrix(signs: tuple[int, ...] = RHT_SIGN_VECTOR) -> np.ndarray:
    """Return R, float64 [size, size]: `R[i, j] = sign[i] * (-1)^popcount(i & j) / sqrt(size)`."""
    size = len(signs)
    return np.array(
        [
            [sign * (-1) ** (i & j).bit_count() / math.sqrt(size) for j in range(size)]
            for i, sign in enumerate(signs)
        ]
    )


def reference_hadamard(x: np.ndarray, signs: tuple[int, ...] = RHT_SIGN_VECTOR) -> np.ndarray:
    """Rotate tiles of len(signs) along the last axis of an fp32 [R, C] array: fp32 butterflies, then bf16.

    Returns an fp32 array of bf16 values. Finite inputs only.
    """
    size = len(signs)
    scale = _F(1 / math.sqrt(size))
    out = np.zeros(x.shape, dtype=np.float32)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], size):
            tile = [_F(sign) * x[row, start + i] for i, sign in enumerate(signs)]
            stride = 1
            while stride < size:
                tile = [
                    tile[i] + tile[i + stride] if (i // stride) % 2 == 0 else tile[i - stride] - tile[i]
                    for i in range(size)
                ]
                stride *= 2
            out[row, start : start + size] = [reference_bf16(value * scale) for value in tile]
    return out


def reference_bf16(value: np.float32) -> np.float32:
    """Round a finite fp32 number to bf16 (nearest, ties to even) on its bits."""
    bits = int(np.float32(value).view(np.uint32))
    upper, rest = bits >> 16, bits & 0xFFFF
    if rest > 0x8000 or (rest == 0x8000 and upper % 2 == 1):
        upper += 1
    return np.uint32(upper << 16).view(np.float32)


def _blocks(x: np.ndarray, block_shape: tuple[int, int]) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    for row in range(0, x.shape[0], block_shape[0]):
        for col in range(0, x.shape[1], block_shape[1]):
            where = (slice(row, row + block_shape[0]), slice(col, col + block_shape[1]))
            yield where, x[where]


def _plain_scale_byte(block: np.ndarray, encode: np.float32, scale_rounding: str) -> int:
    multiplier = encode * (_F(1) / _F(6))
    raw = _F(np.max(np.abs(block))) * multiplier
    raw = np.minimum(np.minimum(raw, _F(FLOAT32_MAX)), _F(448))
    if scale_rounding == "up" and not math.isnan(raw):
        return next(byte for byte, value in enumerate(_E4M3_VALUES) if value >= Fraction(float(raw)))
    return reference_e4m3_byte(raw)


def _block_codes(
    block: np.ndarray, byte: int, decode: np.float32, words: np.ndarray | None, num_random_bits: int
) -> np.ndarray:
    block_encode = np.minimum(_F(1) / (_F(reference_e4m3_value(byte)) * decode), _F(FLOAT32_MAX))
    codes = np.zeros(block.shape, dtype=np.uint8)
    for index in np.ndindex(*block.shape):
        y = block[index] * block_encode
        if words is None:
            codes[index] = reference_e2m1_rne(y)
        else:
            codes[index] = reference_e2m1_stochastic(y, int(words[index]), num_random_bits)
    return codes


def _block_four_over_six(
    block: np.ndarray, amax: np.float32, encode: np.float32, decode: np.float32, error: str
) -> tuple[int, np.ndarray]:
    base = (_F(np.max(np.abs(block))) / _F(6)) * encode
    candidates = []
    for stretch in (_F(1), _F(1.5)):
        byte = reference_e4m3_byte(np.minimum(base * stretch, _F(448)))
        codes = _block_codes(block, byte, decode, None, 0)
        row_sums = []
        for row, row_codes in zip(block, codes, strict=True):
            total = None
            for value, code in zip(row, row_codes, strict=True):
                decoded = (_code_value(int(code)) * _F(reference_e4m3_value(byte))) * amax
                d = decoded / _F(6.0 * FOUR_OVER_SIX_E4M3_BOUND) - value
                term = abs(d) if error == "mae" else d * d
                total = term if total is None else total + term
            row_sums.append(total)
        while len(row_sums) > 1:
            half = len(row_sums) // 2
            row_sums = [row_sums[i] + row_sums[i + half] for i in range(half)]
        candidates.append((row_sums[0], byte, codes))
    six, four = candidates
    return four[1:] if four[0] < six[0] else six[1:]


def _code_value(code: int) -> np.float32:
    magnitude = E2M1_MAGNITUDES[code & 7]
    return _F(-magnitude if code & E2M1_SIGN_BIT else magnitude)
