"""The factor of an NVFP4 product, and its inverse, on the device: two numbers from two tensor amaxes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from metis.kernels.arguments import require_amax
from metis.kernels.launching import Launcher, layout

SMALLEST_INVERTIBLE = 2.0**-100
"""Where the inverse is used, alpha is held at this: what multiplies it and its inverse stays finite."""


_SMALLEST = tl.constexpr(SMALLEST_INVERTIBLE)


@triton.jit
def write_gemm_scales(amax_a, amax_b, out, reciprocal, INVERTIBLE: tl.constexpr):
    """Write alpha, and 1 / alpha behind it where it is asked for, from pointers to the two amaxes."""
    a = tl.load(amax_a)
    b = tl.load(amax_b)
    alpha = (a * b) * reciprocal
    if INVERTIBLE:
        # A zero amax means codes of zero, which any factor suits; NaN passes both comparisons.
        alpha = tl.where((a == 0.0) | (b == 0.0), 1.0, tl.where(alpha < _SMALLEST, _SMALLEST, alpha))
        tl.store(out + 1, tl.div_rn(1.0, alpha))
    tl.store(out, alpha)


@triton.jit
def _gemm_scales_kernel(amax_a, amax_b, out, reciprocal, INVERTIBLE: tl.constexpr):
    write_gemm_scales(amax_a, amax_b, out, reciprocal, INVERTIBLE)


_scales = Launcher(_gemm_scales_kernel)


def gemm_scales(
    amax_a: Tensor, amax_b: Tensor, reciprocal_target: float, *, invertible: bool
) -> tuple[Tensor, Tensor]:
    """Return (alpha, 1 / alpha), fp32 0-dim: `alpha = fp32(fp32(amax_a * amax_b) * reciprocal_target)`.

    The bits are those of `metis.quantize.gemm_alpha`; reciprocal_target is `fp32(1 / (target_a * target_b))`.
    invertible: alpha is 1 where an amax is zero and never below 2^-100; without it the second value is unset.
    """
    key = (layout(amax_a), layout(amax_b), reciprocal_target, invertible)
    ready = _scales.ready(key)
    if ready is None:
        require_amax("gemm_scales", amax_a, amax_a.device)
        require_amax("gemm_scales", amax_b, amax_a.device)
        ready = _scales.prepare(
            key, (1, 1), (reciprocal_target,), (invertible,), num_warps=1, enable_fp_fusion=False
        )
    out = torch.empty(2, dtype=torch.float32, device=amax_a.device)
    ready((amax_a, amax_b, out))
    alpha, inverse = out.unbind()
    return alpha, inverse
