"""The dual-range regulariser of weights (arXiv 2509.00404 v1): large entries are held down, small ones off
zero.

    L(w) = strength / E * (square_weight * sum w^2 + inverse_weight * sum 1 / (w^2 + eps))
    dL/dw = strength / E * (2 * square_weight * w - 2 * inverse_weight * w / (w^2 + eps)^2)

One idea: E counts the entries of the *whole* matrix, so that each entry's gradient depends on that entry
alone and is bitwise the same for any sharding. It is added once per optimizer step, to the finished sum over
microbatches, before clipping; the loss that is trained and logged as such stays the model's.

Traps: eps stands outside the square; the public form (w + eps)^2 is singular at w = -eps. A weight that is
exactly zero has no gradient. Of a reparametrised linear the residual W_R is regularised, since it is what is
quantised, not the product with the factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metis.config import DualRangeConfig


def dual_range_loss(weight: Tensor, config: DualRangeConfig, num_entries: int) -> Tensor:
    """Return this piece's share of L(w), a float64 scalar that can be differentiated.

    weight: any shape, a shard or the whole. num_entries: entries of the whole matrix. The shares of all
    shards add up to the loss. Terms are formed in fp32 (float64 for a float64 weight) and summed in float64.
    """
    square = weight.to(_working_dtype(weight)).square()
    total = config.square_weight * square.sum(dtype=torch.float64)
    total = total + config.inverse_weight * (square + config.eps).reciprocal().sum(dtype=torch.float64)
    return config.strength / num_entries * total


@torch.no_grad()
def dual_range_gradient(weight: Tensor, config: DualRangeConfig, num_entries: int) -> Tensor:
    """Return dL/dw of the whole matrix's loss at the entries of `weight`: its shape, fp32 (or float64 for
    float64).

    num_entries: entries of the whole matrix, whatever part of it `weight` is.
    """
    w = weight.detach().to(_working_dtype(weight))
    scale = 2.0 * config.strength / num_entries
    inverse = (w.square() + config.eps).square().reciprocal_()
    return w * (scale * (config.square_weight - config.inverse_weight * inverse))


def _working_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
