"""MXFP4 quantisation: 32 elements in E2M1 under one power of two, and nothing else.

One idea: scaling by a power of two is exact, so that the whole error is the rounding of the elements; the
price is a scale up to twice too large or, under the two rules that allow it, one that clips.

    exponent = by one of three rules from the block's amax, see `scales`
    y = f(x * 2^-exponent), code = E2M1(y), true value = e2m1 * 2^exponent

Where the block's maximum lands, as a multiple of 2^exponent: `standard` [4, 8), so that up to a quarter of it
is clipped at 6; `even` [3.5, 7); `up` (3, 6], nothing is clipped and stochastic rounding is unbiased.

Edge cases:
* A block of zeros, or below 2^-125: exponent -127 (byte 0x00); zeros have code 0.
* A NaN or infinity in a block: scale byte 0xFF, the block decodes to NaN; its codes are 0 (7 under
  stochastic rounding).
* The sign is that of y: a negative x that underflows to -0.0 in y has code 0, as -0.0 itself.
* A block maximum above 3.5 * 2^126 under `even` or `up` rounds to 2^128, which decodes to infinity.

Sources: OCP Microscaling Formats v1.0; torchao `ScaleCalculationMode` FLOOR, EVEN, RCEIL. Shape letters: R
rows, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metis.errors import ConfigError, nearest_name
from metis.formats import MXFP4_BLOCK_SIZE
from metis.quantize.blocks import Rounding, block_amax, multiply_blocks, require_matrix, require_noise
from metis.quantize.scales import E8m0Rounding, e8m0_bytes_from_amax, e8m0_values
from metis.quantize.tensor import QuantizedTensor
from metis.rounding import round_to_e2m1_rne, round_to_e2m1_stochastic

BLOCK_SHAPE = (1, MXFP4_BLOCK_SIZE)


def quantize_mxfp4(
    x: Tensor,
    *,
    rounding: Rounding = "rne",
    noise_words: Tensor | None = None,
    num_random_bits: int = 16,
    scale_rounding: E8m0Rounding = "standard",
) -> QuantizedTensor:
    """Quantise a matrix to MXFP4, blocks of 32 along the last axis, by the formulas of this module.

    x: [R, C] fp32, bf16 or fp16, C a multiple of 32; any strides. rounding, noise_words [R, C],
    num_random_bits: of the elements, as `nvfp4.quantize`. scale_rounding: "standard", "even" or "up". There
    is no tensor scale, so a shard's codes are those of the whole without any reduction; `amax` of the result
    is the shard's own.

    Raises ShapeError for shapes and dtypes, ConfigError for arguments that do not go together.
    """
    require_matrix(x, BLOCK_SHAPE, "quantize_mxfp4")
    require_noise(x, rounding, noise_words)
    if scale_rounding not in ("standard", "even", "up"):
        raise ConfigError(
            "scale_rounding",
            f"must be 'standard', 'even' or 'up', received {scale_rounding!r}"
            f"{nearest_name(str(scale_rounding), ('standard', 'even', 'up'))}",
        )
    x = x.to(torch.float32)
    amaxes = block_amax(x, BLOCK_SHAPE)
    block_scale = e8m0_values(e8m0_bytes_from_amax(amaxes, scale_rounding))
    # Exponents stay within [-127, 126], whose reciprocals are normal numbers: exact.
    y = multiply_blocks(x, block_scale.reciprocal(), BLOCK_SHAPE)
    if noise_words is None:
        values = round_to_e2m1_rne(y)
    else:
        values = round_to_e2m1_stochastic(y, noise_words, num_random_bits)
    return QuantizedTensor(values, block_scale, amaxes.amax(), BLOCK_SHAPE, format="mxfp4")
