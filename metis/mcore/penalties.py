"""Terms that recipes add to the loss for their weights' sake: put into the main gradients once per optimizer
step.

One idea: the gradient of such a term needs no forward pass, no microbatch and no other rank, so each rank
adds it to its own buffers after the schedule has finished them (summed, averaged, divided by tokens) and
before the optimizer clips and steps. Data-parallel ranks add the same numbers to the same sums. With the
distributed optimizer a rank's buffer is finished only in the slice that it owns, and only that slice is read
afterwards, so adding to all of it is harmless.

Traps: the optimizer divides by the loss scale, so the term is multiplied by it here. Gradients are of the
weights as the model holds them (bf16 under --bf16), not of the optimizer's fp32 copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from metis.mcore.state import recipe_linears
from metis.regularize import dual_range_gradient, dual_range_loss


@torch.no_grad()
def add_weight_penalties(model_chunks: Sequence[nn.Module], loss_scale: float = 1.0) -> float:
    """Add the gradient of the dual-range regulariser, times `loss_scale`, to `main_grad`; return its loss.

    The loss is summed over all linears of the model whose recipe has the regulariser (of reparametrised ones
    the residual weight counts), before this step's update and without the loss scale; 0.0 if there are none.
    Collective over the model-parallel ranks.
    """
    total = torch.zeros((), dtype=torch.float64, device=next(model_chunks[0].parameters()).device)
    for linear in recipe_linears(model_chunks):
        config = linear.core.recipe.dual_range
        if config is None:
            continue
        weight = linear.weight
        num_entries = linear.core.out_features.size * linear.core.in_features.size
        weight.main_grad.add_(dual_range_gradient(weight, config, num_entries), alpha=loss_scale)
        total += dual_range_loss(weight, config, num_entries)
    # A parallel linear shards its weight over the tensor-parallel ranks, so that each entry counts once.
    dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return float(total)
