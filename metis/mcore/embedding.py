"""The word embedding whose gradient goes straight into the fp32 main gradient.

The plain gradient is a matrix as large as the vocabulary, of zeros but for the rows of the microbatch's
tokens: 1 GB in bf16 for 128256 x 4096, filled, then added to the main gradient, every microbatch. Here only
the rows of tokens are added, in fp32 and in a fixed order, so the bits repeat.

It belongs to `gradient_accumulation_fusion` and speaks its language: `grad_added_to_main_grad` is set, and
autograd gets an uninitialised gradient, so that the hooks of data parallelism run.

Traps: a row that this rank does not hold must be looked up somewhere; they are spread over the rows, because
many additions to one row happen one after another. Where the output layer shares the weight on the same stage
(`zero_out_wgrad`), its gradient starts the hooks, and another one would be added to the main gradient.

Letters: s sequence, b batch, V/tp rows of this rank, h hidden size.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional


class _Lookup(torch.autograd.Function):
    """Rows of a weight; backward adds to `weight.main_grad`."""

    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(rows)
        return functional.embedding(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, None]:
        weight, (rows,) = ctx.weight, ctx.saved_tensors
        main_grad = weight.main_grad
        values = grad.reshape(-1, grad.shape[-1]).to(main_grad.dtype)
        main_grad.index_put_((rows.reshape(-1),), values, accumulate=True)
        weight.grad_added_to_main_grad = True
        if getattr(weight, "zero_out_wgrad", False):
            return None, None
        return torch.empty(main_grad.shape, dtype=weight.dtype, device=weight.device), None


class MainGradEmbedding(VocabParallelEmbedding):
    """megatron-core's embedding with another backward; without a main gradient it is the engine's own."""

    @classmethod
    def take_over(cls, embedding: VocabParallelEmbedding) -> None:
        """Turn an embedding of the engine into one of this class, weight and all."""
        embedding.__class__ = cls

    def forward(self, input_: Tensor) -> Tensor:
        """Return the embeddings of token ids [b, s]: [b, s, h], or this rank's part of [s, b, h] under
        sequence parallelism, with the values of the base class.
        """
        if not hasattr(self.weight, "main_grad") or self.deterministic_mode:
            return super().forward(input_)
        if self.tp_group.size() == 1:
            hidden = _Lookup.apply(self.weight, input_)
        else:
            rows = input_ - self.vocab_start_index
            is_elsewhere = (rows < 0) | (rows >= self.num_embeddings_per_partition)
            spread = torch.arange(rows.numel(), device=rows.device) % self.num_embeddings_per_partition
            rows = torch.where(is_elsewhere, spread.view_as(rows), rows)
            hidden = _Lookup.apply(self.weight, rows).masked_fill(is_elsewhere.unsqueeze(-1), 0.0)
        if self.reduce_scatter_embeddings:
            hidden = hidden.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(hidden, group=self.tp_group)
