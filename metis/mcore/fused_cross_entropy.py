"""Vocabulary-parallel cross entropy that reads the logits once and turns them into their gradient in place.

megatron-core converts the logits to fp32 and makes about eight passes over that copy, 2 GB for 4096 tokens of
a vocabulary of 128256. Here forward is one pass that keeps three numbers per token (the running maximum, the
sum of exponentials relative to it, the label's logit); ranks combine those. Backward reads each logit again
and overwrites it with its gradient.

The loss is that of `metis.mcore.cross_entropy`: padding leaves the softmax, a label inside it gives a huge
finite loss. Everything is fp32, the gradient rounded once to the logits' dtype.

Traps: importing this module imports Triton. The logits hold their gradient after backward, so backward runs
once; a second one raises.

Letters: T tokens, V/tp columns of this rank, of which the first `num_true` are no padding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COLUMNS_FORWARD = 8192
_COLUMNS_BACKWARD = 4096
_LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _statistics_kernel(logits, labels, maximum, total, of_label, num_cols, num_true, first, lowest,
                       COLS: tl.constexpr):  # fmt: skip
    """One token: m = max x, sum exp(x - m) over the true columns, and the label's logit if it is here."""
    token = tl.program_id(0).to(tl.int64)
    logits += token * num_cols
    top = tl.full([], _LOWEST, tl.float32)
    sum_exp = tl.zeros([], tl.float32)
    start = 0
    while start < num_true:
        col = start + tl.arange(0, COLS)
        x = tl.load(logits + col, mask=col < num_true, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, axis=0))
        sum_exp = sum_exp * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top), axis=0)
        top = new_top
        start += COLS
    label = tl.load(labels + token) - first
    here = (label >= 0) & (label < num_cols)
    x = tl.load(logits + label, mask=here & (label < num_true), other=0.0).to(tl.float32)
    tl.store(maximum + token, top)
    tl.store(total + token, sum_exp)
    tl.store(of_label + token, tl.where(here & (label >= num_true), lowest, x))


@triton.jit
def _gradient_kernel(logits, labels, maximum, total, grad_loss, num_cols, num_true, first,
                     COLS: tl.constexpr):  # fmt: skip
    """(exp(x - m) / sum - [column is the label]) * grad, over the logits."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    logits += token * num_cols + col
    label = tl.load(labels + token) - first
    grad = tl.load(grad_loss + token)
    top = tl.load(maximum + token)
    scale = 1.0 / tl.load(total + token)
    x = tl.load(logits, mask=col < num_true, other=float("-inf")).to(tl.float32)
    probability = tl.exp(x - top) * scale
    result = (probability - tl.where(col == label, 1.0, 0.0)) * grad
    tl.store(logits, result.to(logits.dtype.element_ty), mask=col < num_cols)


def row_statistics(
    logits: Tensor, labels: Tensor, first: int, num_true: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return fp32 [T]: the largest true logit, the sum of exp(logit - largest), and the label's logit or 0.

    logits [T, V/tp] contiguous, columns from the global id `first` on. labels int64 [T], global ids. A rank
    of padding alone gives the lowest fp32 number, 0 and 0; a label in the padding gives the lowest number of
    the logits' dtype.
    """
    num_tokens, num_cols = logits.shape
    maximum, total, of_label = torch.empty(3, num_tokens, dtype=torch.float32, device=logits.device)
    _statistics_kernel[(num_tokens,)](
        logits, labels, maximum, total, of_label, num_cols, num_true, first,
        torch.finfo(logits.dtype).min, COLS=min(_COLUMNS_FORWARD, triton.next_power_of_2(num_cols)),
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return maximum, total, of_label


def write_gradient(
    logits: Tensor, labels: Tensor, first: int, num_true: int, maximum: Tensor, total: Tensor, grad: Tensor
) -> None:
    """Overwrite logits [T, V/tp] with (softmax - onehot(label)) * grad; maximum and total over all ranks."""
    num_tokens, num_cols = logits.shape
    cols = min(_COLUMNS_BACKWARD, triton.next_power_of_2(num_cols))
    _gradient_kernel[(num_tokens, triton.cdiv(num_cols, cols))](
        logits, labels, maximum, total, grad, num_cols, num_true, first, COLS=cols, num_warps=8,
        enable_fp_fusion=True,
    )  # fmt: skip


class _FusedCrossEntropy(torch.autograd.Function):
    """See `fused_cross_entropy`; saves the logits themselves and two numbers per token."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        logits: Tensor,
        labels: Tensor,
        num_true: int,
        group: torch.distributed.ProcessGroup,
    ) -> Tensor:
        rows = logits.view(-1, logits.shape[-1])
        flat_labels = labels.reshape(-1)
        first = group.rank() * rows.shape[1]
        maximum, total, of_label = row_statistics(rows, flat_labels, first, num_true)
        is_here = (flat_labels >= first) & (flat_labels < first + rows.shape[1])
        if group.size() > 1:
            local_maximum = maximum.clone()
            torch.distributed.all_reduce(maximum, op=torch.distributed.ReduceOp.MAX, group=group)
            total *= torch.exp(local_maximum - maximum)
        shifted = torch.where(is_here, of_label - maximum, 0.0)
        if group.size() > 1:
            sums = torch.stack((total, shifted))
            torch.distributed.all_reduce(sums, group=group)
            total, shifted = sums
        ctx.save_for_backward(logits, flat_labels, maximum, total)
        ctx.first, ctx.num_true, ctx.consumed = first, num_true, False
        return (total.log() - shifted).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, maximum, total = ctx.saved_tensors
        if ctx.consumed:
            raise RuntimeError("fused cross entropy: backward has run, and the logits hold their gradient")
        ctx.consumed = True
        grad = grad_loss.reshape(-1).float().contiguous()
        write_gradient(
            logits.view(-1, logits.shape[-1]), labels, ctx.first, ctx.num_true, maximum, total, grad
        )
        return logits, None, None, None


def fused_cross_entropy(
    logits: Tensor, labels: Tensor, num_true: int, group: torch.distributed.ProcessGroup
) -> Tensor:
    """Return log(sum_v exp(logits_v)) - logits_label, fp32 [s, b], v over the true columns of all ranks.

    logits [s, b, V/tp] fp32, bf16 or fp16, rank r holding columns from r V/tp; overwritten with their
    gradient in backward. labels int64 [s, b], global ids; one that no rank holds counts as logit `max`.
    num_true: columns of this rank that are no padding.
    """
    return _FusedCrossEntropy.apply(logits.contiguous(), labels.contiguous(), num_true, group)
