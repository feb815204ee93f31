"""The 16-point random Hadamard transform that spreads an outlier over its block before wgrad is quantised.

One idea: a fixed orthogonal rotation of every 16 consecutive tokens. Both wgrad operands are rotated along
the contraction axis, so that in exact arithmetic the rotation cancels in their product.

The result is *defined* by its order of operations, so that every implementation agrees to the bit: multiply
by the signs, four fp32 butterfly stages (strides 1, 2, 4, 8), times 0.25, rounded to bf16. As a matrix on
row vectors it is `R[i, j] = sign[i] * (-1)^popcount(i & j) / 4` with `R R^T = I`.

Traps:
* Signs are fixed and act before the butterflies (they flip rows of H, not columns).
* The tensor amax of a rotated operand is taken after the rotation and its rounding to bf16.
* Tiles run along the last axis: for wgrad pass the transposed matrix [features, tokens]. A transposed view is
  fine and fastest, since the butterflies then run over whole rows of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metis.errors import ShapeError
from metis.formats import RHT_SCALE, RHT_SIGN_VECTOR, RHT_SIZE


def random_hadamard_16(x: Tensor) -> Tensor:
    """Rotate every 16 consecutive elements of the last axis; returns bf16 of the same shape.

    x: [..., C] fp32, bf16 or fp16, C a multiple of 16. The rotation runs in fp32.
    `y_j = bf16(0.25 * sum_i sign_i x_i (-1)^popcount(i & j))` within each tile, in the order of this module.
    Raises ShapeError for another dtype or size. Source: arXiv 2509.25149, section 4.2; signs and order of
    Transformer Engine at d0067d0da6.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ShapeError(
            "random_hadamard_16", f"input must be float32, bfloat16 or float16, received {x.dtype}"
        )
    if x.dim() == 0 or x.shape[-1] % RHT_SIZE:
        raise ShapeError(
            "random_hadamard_16",
            f"the last size must be a multiple of {RHT_SIZE}, received shape {tuple(x.shape)}; "
            "pad the tokens or change the sequence length",
        )
    signs = torch.tensor(RHT_SIGN_VECTOR, dtype=torch.float32, device=x.device)
    tiles = x.to(torch.float32).unflatten(-1, (-1, RHT_SIZE)) * signs
    stride = 1
    while stride < RHT_SIZE:
        pairs = tiles.unflatten(-1, (-1, 2, stride))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        difference = first - second
        first.add_(second)
        second.copy_(difference)
        stride *= 2
    return tiles.mul_(RHT_SCALE).to(torch.bfloat16).flatten(-2)
