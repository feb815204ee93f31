"""FP8 quantisation with current scaling: per tensor, per 128 elements or per tile of 128 x 128.

One idea: one level of scale in fp32, which takes the largest magnitude to the largest FP8 number. Per tensor
the scale belongs on the accumulator of the GEMM; per block it belongs on each block's partial sum.

    scale = f(element_max / amax), see `scales.fp8_encode_scale`
    y = f(x * scale), code = FP8(min(max(y, -element_max), element_max)), true value = f(fp8 * f(1 / scale))

Traps:
* `power_of_two_scales` cuts the scale's mantissa off: exact scaling and operands that are exact in bf16, at
  up to one bit of range.
* An infinity turns off the scaling of its tensor or block and saturates to the largest number: it is seen in
  `amax` only. A NaN turns off the scaling too and stays a NaN.
* Amax of a tensor that is split over ranks must be reduced first; blocks need no reduction.

Source: Transformer Engine, `compute_scale_from_amax` and its current-scaling and block-scaling recipes. Shape
letters: R rows, C columns; blocks run along C, the contraction axis.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from metis.errors import ConfigError
from metis.formats import FORMAT_ELEMENT_MAX
from metis.quantize.blocks import (
    block_amax,
    multiply_blocks,
    require_amax,
    require_block_shape,
    require_matrix,
)
from metis.quantize.scales import fp8_encode_scale
from metis.quantize.tensor import QuantizedTensor
from metis.rounding import round_to_fp8

Fp8Element = Literal["e4m3", "e5m2"]


def quantize_fp8(
    x: Tensor,
    *,
    element: Fp8Element,
    block_shape: tuple[int, int] | None,
    power_of_two_scales: bool = False,
    amax: Tensor | None = None,
) -> QuantizedTensor:
    """Quantise a matrix to FP8 by the formulas of this module, always to nearest, ties to even.

    x: [R, C] fp32, bf16 or fp16; both sizes multiples of the block's; any strides. block_shape: None (one
    scale for the tensor), (1, 128) or (128, 128). amax: fp32 0-dim, the reduced amax of a tensor of which x
    is a shard; without blocks only. Raises ShapeError for shapes and dtypes, ConfigError for an unknown
    element and for an amax given with blocks.
    """
    if element not in ("e4m3", "e5m2"):
        raise ConfigError("element", f"must be 'e4m3' or 'e5m2', received {element!r}")
    format_name = f"fp8_{element}"
    block_shape = require_block_shape(block_shape, format_name)
    require_matrix(x, block_shape, "quantize_fp8")
    if amax is not None:
        require_amax(amax)
        if block_shape is not None:
            raise ConfigError("amax", f"must be None with blocks {block_shape}, which have their own")
    x = x.to(torch.float32)
    element_max = FORMAT_ELEMENT_MAX[format_name]
    if block_shape is None:
        amax = x.abs().amax() if amax is None else amax
        y = x * fp8_encode_scale(amax, element_max, power_of_two_scales)
        block_scale = None
    else:
        amaxes = block_amax(x, block_shape)
        amax = amaxes.amax()
        encode_scale = fp8_encode_scale(amaxes, element_max, power_of_two_scales)
        y = multiply_blocks(x, encode_scale, block_shape)
        block_scale = encode_scale.reciprocal()
    return QuantizedTensor(
        round_to_fp8(y, element),
        block_scale,
        amax,
        block_shape,
        format=format_name,
        power_of_two_scales=power_of_two_scales,
    )
