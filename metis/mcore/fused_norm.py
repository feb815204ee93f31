"""RMSNorm as one kernel forward and one backward, for `metis.mcore.norm.RMSNorm` on GPUs.

The same function with the same roundings: statistics in fp32, the normalised value rounded to the activation
dtype, then times the weight. Backward keeps only the input, as there, and normalises again in registers. The
weight's gradient is summed in fp32 by a fixed number of programs, each over its own rows, and the partial
sums by torch: no atomics, so the bits repeat.

Traps: importing this module imports Triton. A row must fit one program (`MAX_COLUMNS`).

Letters: M rows, h hidden size.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from metis.mcore.norm import MAX_COLUMNS

_ELEMENTS_PER_TILE = 4096
_PROGRAMS_PER_MULTIPROCESSOR = 3
_PROGRAMS_UNDER_INTERPRETER = 3


@triton.jit
def _forward_kernel(x, weight, y, num_rows, num_cols, eps, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    mask = (row < num_rows) & (col < num_cols)
    offset = row * num_cols + col
    values = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=1, keep_dims=True) / num_cols + eps)
    dtype = y.dtype.element_ty
    normalized = (values * scale).to(dtype).to(tl.float32)
    w = tl.load(weight + col, mask=col < num_cols, other=0.0).to(dtype).to(tl.float32)
    tl.store(y + offset, (normalized * w).to(dtype), mask=mask)


@triton.jit
def _backward_kernel(
    x, weight, grad_y, grad_x, partial, num_rows, num_cols, eps, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """dx = r (g w - n mean(g w n)) with n = r x; the program's part of dw = sum over rows of g round(n)."""
    col = tl.arange(0, COLS)[None, :]
    dtype = grad_x.dtype.element_ty
    w = tl.load(weight + col, mask=col < num_cols, other=0.0).to(dtype).to(tl.float32)
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    start = tl.program_id(0) * ROWS
    while start < num_rows:
        row = start.to(tl.int64) + tl.arange(0, ROWS)[:, None]
        mask = (row < num_rows) & (col < num_cols)
        offset = row * num_cols + col
        values = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_y + offset, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values, axis=1, keep_dims=True) / num_cols + eps)
        normalized = values * scale
        total += grad * normalized.to(dtype).to(tl.float32)
        weighted = grad * w
        mean = tl.sum(weighted * normalized, axis=1, keep_dims=True) / num_cols
        tl.store(grad_x + offset, (scale * (weighted - normalized * mean)).to(dtype), mask=mask)
        start += tl.num_programs(0) * ROWS
    column = tl.arange(0, COLS)
    place = partial + tl.program_id(0).to(tl.int64) * num_cols + column
    tl.store(place, tl.sum(total, axis=0), mask=column < num_cols)


def _tile(num_cols: int) -> tuple[int, int, int]:
    """Return (rows, columns, warps) of a tile over whole rows."""
    cols = triton.next_power_of_2(num_cols)
    return max(1, _ELEMENTS_PER_TILE // cols), cols, 16 if cols > _ELEMENTS_PER_TILE else 8


@lru_cache(maxsize=16)
def _max_programs(device: torch.device) -> int:
    if device.type == "cpu":
        return _PROGRAMS_UNDER_INTERPRETER
    return _PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


class _FusedRMSNorm(torch.autograd.Function):
    """y = round(x * rsqrt(mean(x^2) + eps)) * w; saves x and w."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        num_cols = x.shape[-1]
        num_rows = x.numel() // num_cols
        rows, cols, warps = _tile(num_cols)
        _forward_kernel[(triton.cdiv(num_rows, rows),)](
            x, weight, y, num_rows, num_cols, eps, ROWS=rows, COLS=cols, num_warps=warps,
            enable_fp_fusion=True,
        )  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        grad_x = torch.empty_like(x)
        num_cols = x.shape[-1]
        num_rows = x.numel() // num_cols
        rows, cols, warps = _tile(num_cols)
        programs = min(triton.cdiv(num_rows, rows), _max_programs(x.device))
        partial = torch.empty(programs, num_cols, dtype=torch.float32, device=x.device)
        _backward_kernel[(programs,)](
            x, weight, grad_y, grad_x, partial, num_rows, num_cols, ctx.eps, ROWS=rows, COLS=cols,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
        return grad_x, partial.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return round(x * rsqrt(mean(x^2) + eps)) * w for x [..., h] and w [h], in x's dtype.

    x: fp32, bf16 or fp16, h <= `MAX_COLUMNS`, not empty. Gradients: x's in x's dtype, w's summed over rows in
    fp32 and rounded to w's dtype.
    """
    assert x.shape[-1] == weight.numel() <= MAX_COLUMNS and x.numel() > 0
    return _FusedRMSNorm.apply(x, weight, eps)
