"""NVFP4 quantisation, operation for operation as Transformer Engine's reference does it.

One idea: two levels of scale. The tensor's amax is scaled to 2688 = 6 * 448, so that a block's scale
`block_amax / 6`, seen at that level, fits in E4M3; elements are divided by the *rounded* block scale and
rounded to E2M1. Blocks run along the last axis, the contraction axis of the GEMM that reads the matrix; for
the other GEMM the transposed matrix is quantised, from high precision again, never from FP4.

The order of operations is the specification (`f` is one rounding to fp32, nothing is fused):

    S_enc = min(f(2688 / amax), FLT_MAX), 1 if that is 0
    S_dec = f(1 / S_enc)                                    mult = f(S_enc * f(1/6))
    block_scale = E4M3(min(f(block_amax * mult), 448))      nearest, or upwards with scale_rounding "up"
    enc = min(f(1 / f(block_scale * S_dec)), FLT_MAX)       code = E2M1(f(x * enc))

Two details look simplifiable and are not: 1/6 goes into the tensor scale (`block_amax / 6 * S_enc` changes
3.5e-4 of the scales), and elements are multiplied by a reciprocal (a division changes 3.8e-5 of the codes).

Traps:
* No epsilon and no lower clamp: a block below 2.2e-6 of amax gets scale zero and decodes to zero.
* The block maximum lands in [5.65, 6.35] and is clipped whenever its scale rounded down, which biases
  stochastic rounding too. `scale_rounding="up"` ends that: the smallest E4M3 scale not below the exact one.
* A NaN anywhere makes every scale NaN and every code 0 (6 under stochastic rounding): lost, and visibly so.
* Denormals count: a process that flushes them (`torch.set_flush_denormal(True)`) leaves the specification.
* Python-number divisors are avoided: CUDA would multiply by their reciprocal.

Source: Transformer Engine d0067d0da6, `custom_recipes/reference_nvfp4.py`; the paper (arXiv 2509.25149,
appendix B) writes a different order. Shape letters: R rows, C columns.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from metis.errors import ConfigError, ShapeError
from metis.formats import (
    E2M1_MAX,
    E4M3_MAX,
    FLOAT32_MAX,
    FOUR_OVER_SIX_E4M3_BOUND,
    NVFP4_BLOCK_SIZE,
    RECIPROCAL_6_F32,
    TENSOR_SCALE_TARGET,
)
from metis.quantize.blocks import (
    Rounding,
    block_amax,
    multiply_blocks,
    require_amax,
    require_block_shape,
    require_input_dtype,
    require_matrix,
    require_noise,
)
from metis.quantize.tensor import QuantizedTensor
from metis.rounding import (
    round_to_e2m1_rne,
    round_to_e2m1_stochastic,
    round_to_e4m3,
    round_up_to_e4m3,
)

FourOverSixError = Literal["mae", "mse"]
E4m3Rounding = Literal["standard", "up"]


def tensor_amax(x: Tensor) -> Tensor:
    """Return `max |x|` as fp32 0-dim, exact; a NaN propagates.

    x: non-empty fp32, bf16 or fp16 of any shape. A tensor that is split over ranks needs the maximum of
    these over its shards (all-reduce MAX) before `quantize`.
    """
    require_input_dtype(x, "tensor_amax")
    if x.numel() == 0:
        raise ShapeError("tensor_amax", f"the tensor must not be empty, received shape {tuple(x.shape)}")
    return x.abs().amax().to(torch.float32)


def quantize(
    x: Tensor,
    *,
    block_shape: tuple[int, int],
    rounding: Rounding = "rne",
    amax: Tensor | None = None,
    noise_words: Tensor | None = None,
    num_random_bits: int = 16,
    four_over_six: FourOverSixError | None = None,
    scale_rounding: E4m3Rounding = "standard",
) -> QuantizedTensor:
    """Quantise a matrix to NVFP4 by the formulas of this module.

    x: [R, C] fp32, bf16 or fp16 (fp64 is refused: which rounding to fp32 is meant is the caller's business).
    C, and R too for (16, 16) blocks, a multiple of 16. Any strides; a transposed view is not copied first.
    block_shape: (1, 16) or (16, 16). rounding: of the elements only. amax: fp32 0-dim, the reduced amax of a
    tensor of which x is a shard; default `tensor_amax(x)`. noise_words: [R, C] int64 random words
    (`metis.rng.random_words` at global coordinates), for "stochastic" only. num_random_bits: 8, 16 or 24 of a
    word, see `round_to_e2m1_stochastic`. four_over_six: try each block also with its maximum at 4 and keep
    the smaller error, see `_four_over_six`. scale_rounding: "standard", block scales to nearest; "up",
    upwards, so that no element exceeds 6 (by more than fp32 roundings) unless its scale is cut off at 448.

    Raises ShapeError for shapes and dtypes, ConfigError for arguments that do not go together.
    """
    block_shape = require_block_shape(block_shape)
    require_matrix(x, block_shape, "quantize")
    require_noise(x, rounding, noise_words)
    _require_compatible(rounding, four_over_six, scale_rounding)
    x = x.to(torch.float32)
    amaxes = block_amax(x, block_shape)
    if amax is None:
        amax = amaxes.amax()
    require_amax(amax)
    if four_over_six is not None:
        return _four_over_six(x, amaxes, amax, block_shape, four_over_six)
    encode_scale, decode_scale = _tensor_scales(amax, TENSOR_SCALE_TARGET)
    raw_scale = (amaxes * (encode_scale * RECIPROCAL_6_F32)).clamp_(max=E4M3_MAX)
    block_scale = round_up_to_e4m3(raw_scale) if scale_rounding == "up" else round_to_e4m3(raw_scale)
    y = multiply_blocks(x, _block_encode_scale(block_scale, decode_scale), block_shape)
    if noise_words is None:
        values = round_to_e2m1_rne(y)
    else:
        values = round_to_e2m1_stochastic(y, noise_words, num_random_bits)
    return QuantizedTensor(values, block_scale, amax, block_shape)


def _tensor_scales(amax: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """Return (S_enc, S_dec), fp32 0-dim: `min(target / amax, FLT_MAX)`, 1 for zero; its reciprocal."""
    encode_scale = (torch.full_like(amax, target) / amax).clamp_(max=FLOAT32_MAX)
    encode_scale = torch.where(encode_scale == 0, torch.ones_like(amax), encode_scale)
    return encode_scale, encode_scale.reciprocal()


def _block_encode_scale(block_scale: Tensor, decode_scale: Tensor) -> Tensor:
    """Return what a block's elements are multiplied by; a zero scale gives FLT_MAX, not infinity."""
    return (block_scale * decode_scale).reciprocal_().clamp_(max=FLOAT32_MAX)


def _four_over_six(
    x: Tensor, amaxes: Tensor, amax: Tensor, block_shape: tuple[int, int], error: FourOverSixError
) -> QuantizedTensor:
    """Quantise with each block's maximum at 6 or at 4, whichever leaves the strictly smaller error (ties: 6).

    `base = f(f(block_amax / 6) * S_enc)` with `S_enc = 6 * 256 / amax` (this order, unlike the plain recipe);
    candidates `E4M3(min(base, 448))` and `E4M3(min(1.5 base, 448))`. Bound 256 lets 1.5 * 256 = 384 fit.
    Source: Transformer Engine d0067d0da6, `nvfp4_4over6`; idea of arXiv 2512.02010.
    """
    target = E2M1_MAX * FOUR_OVER_SIX_E4M3_BOUND
    encode_scale, decode_scale = _tensor_scales(amax, target)
    base = (amaxes / torch.full_like(amaxes, E2M1_MAX)) * encode_scale
    candidates = []
    for stretch in (1.0, 1.5):
        block_scale = round_to_e4m3((base * stretch).clamp_(max=E4M3_MAX))
        values = round_to_e2m1_rne(
            multiply_blocks(x, _block_encode_scale(block_scale, decode_scale), block_shape)
        )
        decoded = multiply_blocks(values, block_scale, block_shape) * amax
        difference = decoded / torch.full_like(amax, target) - x
        candidates.append((block_scale, values, _block_error(difference, block_shape, error)))
    (scale_6, values_6, error_6), (scale_4, values_4, error_4) = candidates
    take_4 = error_4 < error_6
    take_4_elements = multiply_blocks(torch.ones_like(x), take_4.to(x.dtype), block_shape) != 0
    return QuantizedTensor(
        torch.where(take_4_elements, values_4, values_6),
        torch.where(take_4, scale_4, scale_6),
        amax,
        block_shape,
        target,
    )


def _block_error(difference: Tensor, block_shape: tuple[int, int], error: FourOverSixError) -> Tensor:
    """Return the sum of |d| or d*d per block in the specified fp32 order: columns, then rows as a tree."""
    terms = difference.abs() if error == "mae" else difference * difference
    columns = terms.unflatten(1, (-1, NVFP4_BLOCK_SIZE))
    total = columns[..., 0]
    for index in range(1, NVFP4_BLOCK_SIZE):
        total = total + columns[..., index]
    rows = block_shape[0]
    total = total.unflatten(0, (-1, rows))
    while rows > 1:
        rows //= 2
        total = total[:, :rows] + total[:, rows : 2 * rows]
    return total.squeeze(1)


def _require_compatible(
    rounding: Rounding, four_over_six: FourOverSixError | None, scale_rounding: E4m3Rounding
) -> None:
    if four_over_six not in (None, "mae", "mse"):
        raise ConfigError("four_over_six", f"must be None, 'mae' or 'mse', received {four_over_six!r}")
    if scale_rounding not in ("standard", "up"):
        raise ConfigError("scale_rounding", f"must be 'standard' or 'up', received {scale_rounding!r}")
    if four_over_six is not None and (rounding == "stochastic" or scale_rounding == "up"):
        raise ConfigError(
            "four_over_six",
            "must be None with stochastic rounding or scales rounded up; use 'rne' and 'standard' for this "
            "operand",
        )
