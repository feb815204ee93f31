"""Vocabulary-parallel cross entropy over the true vocabulary.

The vocabulary is padded to a multiple that depends on TP. megatron-core lets the dummy tokens take part in
the softmax, so its loss depends on the padding, and with it on the layout: at initialisation the loss of a
100-token vocabulary padded to 256 is log 256, not log 100. Here the dummy columns leave the softmax, and the
rest is megatron's own function.

The one idea: overwrite the dummy logits with the lowest finite value. Their probability is then exactly 0, so
is their gradient, and backward needs nothing. Only ranks that own padding do any work.

On GPUs `metis.mcore.fused_cross_entropy` computes the same loss without a copy of the logits.

Traps: the logits are overwritten in place (megatron's function does so too for fp32). The lowest *finite*
value, not -inf: a label that points at a dummy token then gives a huge loss that a zero loss mask can still
remove, not a NaN.

Letters: s sequence, b batch, V padded vocabulary, tp ranks that share it.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

from metis.errors import ShapeError
from metis.kernels.availability import is_available


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, vocab_size: int, fusion: bool = False
) -> torch.Tensor:
    """Return log(sum_v exp(logits_v)) - logits_label for every token, v < `vocab_size` only.

    `logits` [s, b, V/tp] in fp32, bf16, fp16 or fp64, rank r holding columns from r*V/tp; overwritten.
    `labels` int64 [s, b], global token ids. Returns [s, b] in fp32, or fp64 for fp64 logits: there every sum
    over the vocabulary and over ranks is in fp64. The gradient has the dtype of the logits.

    `fusion` takes the Triton kernels where they run, for all dtypes but fp64: sums over a block of columns at
    a time, the gradient written over the logits. Elsewhere it takes megatron's fused form (one reduction
    instead of two), which rounds the gradient to bf16, so it is used for bf16 logits and the plain form for
    the others. Otherwise, without padding, the result is bitwise that of
    `megatron.core.tensor_parallel.vocab_parallel_cross_entropy` (0.16.1) for fp32, bf16 and fp16.

    Raises `ShapeError` where the ranks together hold fewer columns than `vocab_size`.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    num_columns = logits.shape[-1]
    if num_columns * group.size() < vocab_size:
        raise ShapeError(
            "output_layer",
            f"logits must cover the vocabulary of {vocab_size}, got {group.size()} x {num_columns} columns",
        )
    num_true_columns = min(max(vocab_size - group.rank() * num_columns, 0), num_columns)
    if fusion and logits.dtype != torch.float64 and is_available(logits.device):
        from metis.mcore.fused_cross_entropy import fused_cross_entropy

        return fused_cross_entropy(logits, labels, num_true_columns, group)
    if num_true_columns < num_columns:
        logits = _ExcludeColumns.apply(logits, num_true_columns)
    if logits.dtype == torch.float64:
        return _CrossEntropyFloat64.apply(logits, labels, group)
    if fusion and logits.dtype == torch.bfloat16:
        return fused_vocab_parallel_cross_entropy(logits, labels, group)
    return tensor_parallel.vocab_parallel_cross_entropy(logits, labels)


class _ExcludeColumns(torch.autograd.Function):
    """Set columns from `first` on to the lowest finite value, in place.

    Backward is the identity: the softmax gives these columns probability 0, so their gradient already is 0.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, logits: torch.Tensor, first: int) -> torch.Tensor:
        logits[..., first:] = torch.finfo(logits.dtype).min
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_logits: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        return grad_logits, None


class _CrossEntropyFloat64(torch.autograd.Function):
    """The fp64 twin of megatron's function, which converts every logit to fp32."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        logits: torch.Tensor,
        labels: torch.Tensor,
        group: torch.distributed.ProcessGroup,
    ) -> torch.Tensor:
        maximum = logits.amax(dim=-1)
        torch.distributed.all_reduce(maximum, op=torch.distributed.ReduceOp.MAX, group=group)
        shifted = logits - maximum.unsqueeze(-1)
        local_labels = labels - group.rank() * logits.shape[-1]
        is_local = (local_labels >= 0) & (local_labels < logits.shape[-1])
        local_labels = local_labels.where(is_local, 0).unsqueeze(-1)
        of_label = shifted.gather(-1, local_labels).squeeze(-1).where(is_local, 0.0)
        softmax = shifted.exp_()
        sums = torch.stack((of_label, softmax.sum(dim=-1)))
        torch.distributed.all_reduce(sums, group=group)
        softmax /= sums[1].unsqueeze(-1)
        ctx.save_for_backward(softmax, local_labels, is_local)
        return sums[1].log() - sums[0]

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_loss: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        softmax, local_labels, is_local = ctx.saved_tensors
        grad = softmax.scatter_add(-1, local_labels, -is_local.to(softmax.dtype).unsqueeze(-1))
        return grad.mul_(grad_loss.unsqueeze(-1)), None, None
