"""Rounding onto the E2M1, E4M3 and E5M2 grids, elementwise and without any scale.

One idea: on E2M1 the spacing of the grid is half of the value's power of two, held at 0.5 below 1 (`step =
max(2^floor(log2 |y|), 1) / 2`). Dividing by it is exact, so nearest rounding is one `round` (ties to even,
and an even multiple of the step is an even code) and stochastic rounding one `floor` and one comparison of
integers. No table, no search.

Results are *values on the grid* in fp32, which is what CPU emulation multiplies; codes are made on request.

Traps:
* Sign: the code's sign bit is set when the input is strictly negative. So -0.0 becomes +0.0 (code 0), while a
  negative value that rounds to zero becomes -0.0 (code 8). The value's own sign bit carries that.
* NaN: nearest rounding gives code 0 (as Transformer Engine's reference, where no comparison matches),
  stochastic rounding +6 (as its software path). FP4 cannot carry a NaN; the block scale does.
* `torch`'s casts to FP8 do not saturate: above the largest number they give NaN (E4M3) or infinity (E5M2).
  `round_to_fp8` clamps first; callers of `round_to_e4m3` do it themselves.
* FP8 elements keep the sign of -0.0 and can be NaN, unlike E2M1.

Shape letters: R, C any matrix; every function takes any shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metis.errors import ConfigError, ShapeError
from metis.formats import (
    E2M1_MAGNITUDES,
    E2M1_MAX,
    E2M1_SIGN_BIT,
    E4M3_MAX,
    E5M2_MAX,
    FLOAT32_EXPONENT_MASK,
    FP8_NAN_BYTE,
)

RANDOM_BIT_WIDTHS = (8, 16, 24)
"""8: what Transformer Engine's software path and the hardware use. 24: bias below 2^-24 of a step."""

FP8_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_FP8_MAX = {"e4m3": E4M3_MAX, "e5m2": E5M2_MAX}

_WORD_BITS = 32


def round_to_e2m1_rne(y: Tensor) -> Tensor:
    """Round to the nearest E2M1 value, ties to the even code: `step(|y|) * rint(y / step(|y|))`.

    y: fp32, any shape. Returns fp32 values on the grid; |y| > 6 gives 6, NaN gives +0, -0.0 gives +0.0.

    Midpoints 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5 give 0, 1, 1, 2, 2, 4, 4. Source: NVFP4 reference
    quantiser of Transformer Engine at d0067d0da6 (`reference_nvfp4.py`).
    """
    _require_float32(y)
    q = (y + 0.0).clamp_(-E2M1_MAX, E2M1_MAX)  # -0.0 + 0.0 is +0.0, the sign rule
    step = _grid_step(q)
    return q.div_(step).round_().mul_(step).nan_to_num_(nan=0.0)


def round_to_e2m1_stochastic(y: Tensor, words: Tensor, num_random_bits: int = 16) -> Tensor:
    """Round to one of the two neighbouring E2M1 values, up in magnitude with the probability of the rest.

    y: fp32, any shape; words: int64 of the same shape, 32 random bits each in [0, 2^32).
    num_random_bits: b = 24 uses the top bits of a word (`word >> 8`), b = 16 and b = 8 the lowest bits.
    Returns fp32 values on the grid.

    With lower neighbour lo, grid step d, `f = (|y| - lo) / d` and random integer k: up iff `k + floor(2^b
    f) >= 2^b`, so `P(up) = floor(2^b f) / 2^b` exactly: short of f by less than 2^-b. Values on the grid
    never move, |y| > 6 gives 6, NaN gives +6. The sum is not formed in fp32, where it could round across a
    grid point. Raises ConfigError for another number of bits. Source: `transformer_engine/common` software
    form of `cvt.rs.e2m1` at d0067d0da6, generalised in b.
    """
    _require_float32(y)
    if words.shape != y.shape or words.dtype != torch.int64:
        raise ShapeError(
            "round_to_e2m1_stochastic",
            f"words must be int64 of shape {tuple(y.shape)}, received {tuple(words.shape)} {words.dtype}",
        )
    if num_random_bits == 24:
        random_integer = words >> (_WORD_BITS - 24)
    elif num_random_bits in RANDOM_BIT_WIDTHS:
        random_integer = words & (2**num_random_bits - 1)
    else:
        raise ConfigError(
            "num_random_bits", f"must be one of {RANDOM_BIT_WIDTHS}, received {num_random_bits}"
        )
    scale = float(2**num_random_bits)
    magnitude = y.abs().clamp_(max=E2M1_MAX)
    step = _grid_step(magnitude)
    magnitude.div_(step)
    multiple = magnitude.floor()
    # Integers up to 2^24 are exact in fp32, and so is every operation on them below.
    threshold = magnitude.sub_(multiple).mul_(scale).floor_().neg_().add_(scale)
    multiple.add_(random_integer.to(torch.float32).ge_(threshold))
    return multiple.mul_(step).copysign_(y + 0.0).nan_to_num_(nan=E2M1_MAX)


def round_to_e4m3(x: Tensor) -> Tensor:
    """Round fp32 to the nearest E4M3 value, ties to even, subnormals kept; returns the value in fp32.

    x: fp32, |x| <= 448 (the caller saturates); NaN stays NaN. |x| <= 2^-10 gives zero.
    """
    _require_float32(x)
    return x.to(torch.float8_e4m3fn).to(torch.float32)


def round_up_to_e4m3(x: Tensor) -> Tensor:
    """Return the smallest E4M3 value that is not below x, in fp32; x: fp32 in [0, 448]; NaN stays NaN.

    Zero stays zero, anything else below 2^-9 gives 2^-9.
    """
    nearest = round_to_e4m3(x)
    # Codes of non-negative values are in order, and x <= 448 leaves room for one more.
    above = (nearest.to(torch.float8_e4m3fn).view(torch.uint8) + 1).view(torch.float8_e4m3fn)
    return torch.where(nearest < x, above.to(torch.float32), nearest)


def round_to_fp8(y: Tensor, element: str) -> Tensor:
    """Round to the nearest FP8 value, ties to even, saturating; returns the value in fp32.

    y: fp32, any shape; element: "e4m3" (max 448) or "e5m2" (max 57344). Infinity gives the largest number,
    NaN stays NaN, -0.0 stays -0.0, subnormals are kept.
    """
    _require_float32(y)
    limit = _FP8_MAX[element]
    return y.clamp(-limit, limit).to(FP8_DTYPES[element]).to(torch.float32)


def values_to_fp8_bytes(values: Tensor, element: str) -> Tensor:
    """Return the FP8 bytes (uint8) of fp32 values on the grid of `element`; every NaN gives 0x7F."""
    _require_float32(values)
    codes = values.to(FP8_DTYPES[element]).view(torch.uint8)
    return codes.masked_fill_(values.isnan(), FP8_NAN_BYTE)


def fp8_bytes_to_values(codes: Tensor, element: str) -> Tensor:
    """Return the fp32 values of FP8 bytes (uint8)."""
    if codes.dtype != torch.uint8:
        raise ShapeError("fp8_bytes_to_values", f"codes must be uint8, received {codes.dtype}")
    return codes.view(FP8_DTYPES[element]).to(torch.float32)


def values_to_codes(values: Tensor) -> Tensor:
    """Return the 4-bit codes (uint8, 0..15) of fp32 values that lie on the E2M1 grid; -0.0 is code 8."""
    _require_float32(values)
    doubled = (values.abs() * 2.0).to(torch.int32)
    code_of_doubled = torch.zeros(int(2 * E2M1_MAX) + 1, dtype=torch.uint8, device=values.device)
    for code, magnitude in enumerate(E2M1_MAGNITUDES):
        code_of_doubled[int(2 * magnitude)] = code
    codes = code_of_doubled.index_select(0, doubled.flatten()).view(values.shape)
    return codes.add_(torch.signbit(values), alpha=E2M1_SIGN_BIT)


def codes_to_values(codes: Tensor) -> Tensor:
    """Return the fp32 values of 4-bit codes (uint8, 0..15); code 8 gives -0.0."""
    if codes.dtype != torch.uint8:
        raise ShapeError("codes_to_values", f"codes must be uint8, received {codes.dtype}")
    signed = E2M1_MAGNITUDES + tuple(-magnitude for magnitude in E2M1_MAGNITUDES)
    table = torch.tensor(signed, dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)


def _grid_step(y: Tensor) -> Tensor:
    """Return the grid step at |y| <= 6 as a new fp32 tensor: 0.5 below 2, 1 below 4, 2 from there."""
    power_of_two = y.abs().clamp_(min=1.0)
    power_of_two.view(torch.int32).bitwise_and_(FLOAT32_EXPONENT_MASK)
    return power_of_two.mul_(0.5)


def _require_float32(x: Tensor) -> None:
    if x.dtype != torch.float32:
        raise ShapeError("metis.rounding", f"input must be float32, received {x.dtype}")
