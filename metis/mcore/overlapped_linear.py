"""megatron-core's parallel linears in high precision, with the messages of sequence parallelism beside their
products (`--tp-comm-overlap` without Transformer Engine).

The engine gathers, then multiplies; multiplies, then scatters; only what backward gathers for wgrad and
scatters of dx runs beside a product. Here every message does (`metis.exchange`):

    column-parallel   forward   gather x       beside the product of the own tokens
                      backward  gather x       beside dx;  scatter dx beside dw
    row-parallel      forward   scatter y      beside the product of the own tokens
                      backward  gather g       beside the own tokens' dx

The products are the engine's, cut along tokens. Without an exchange, and wherever the engine would send no
message of this kind, its own code runs.

Trap: a linear that overrides `_forward_impl` must also keep `forward` of the row-parallel class from coming
here (`MetisRowParallelLinear`).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.autograd.function import once_differentiable

from metis.exchange import Exchange, gathered_product, scattered_product, start_scatter
from metis.functional import as_placeholder


class OverlappedColumnParallelLinear(ColumnParallelLinear):
    """The engine's class; exchange: of the tensor-parallel group, None: nothing is overlapped."""

    def __init__(self, *args: Any, exchange: Exchange | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.exchange = exchange

    @classmethod
    def take_over(cls, linear: ColumnParallelLinear, exchange: Exchange) -> None:
        """Make an engine's linear one of this class, as it is."""
        linear.__class__ = cls
        linear.exchange = exchange

    def _forward_impl(self, **call: Any) -> Tensor:  # type: ignore[override]
        if self.exchange is None or not call["sequence_parallel"]:
            return super()._forward_impl(**call)
        x, bias, fused = call["input"], call["bias"], call["gradient_accumulation_fusion"]
        y = _ColumnProduct.apply(x, call["weight"], self.exchange, fused)
        return y if bias is None else y + bias


class OverlappedRowParallelLinear(RowParallelLinear):
    """The engine's class; exchange: of the tensor-parallel group, None: nothing is overlapped."""

    def __init__(self, *args: Any, exchange: Exchange | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.exchange = exchange

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (output, bias) as the engine's class does."""
        if self.exchange is None or not (self.sequence_parallel and self.input_is_parallel):
            return super().forward(input_)
        y = _RowProduct.apply(_rows(input_), self.weight, self.exchange, self.gradient_accumulation_fusion)
        output = y.view(-1, *input_.shape[1:-1], y.shape[1])
        if self.bias is not None and not self.skip_bias_add:
            return output + self.bias, None
        return output, self.bias


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


class _ColumnProduct(torch.autograd.Function):
    """y = x w^T of all tokens, [T s, b, N], for x of the own ones, [s, b, K].

    y is no view: the loss may overwrite logits in place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, exchange: Exchange, fused: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.exchange, ctx.fused = weight, exchange, fused
        y = x.new_empty(exchange.size * x.shape[0], *x.shape[1:-1], weight.shape[0])
        gathered_product(exchange, _rows(x), _rows(y), _times(weight.t()), whole=False)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        exchange: Exchange = ctx.exchange
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        dx, dw, finish, shape = None, None, None, x.shape
        x, g = _rows(x), _rows(g)
        gathering = exchange.gather(x) if needs_dw else None
        sums = g @ weight if needs_dx else None
        every = None if gathering is None else gathering.wait()
        if sums is not None:
            finish = start_scatter(exchange, sums)
        if every is not None:
            dw = _weight_gradient(ctx.weight, g, every, ctx.fused)
        if finish is not None:
            dx = finish().view(shape)
        return dx, dw, None, None


class _RowProduct(torch.autograd.Function):
    """y = x w^T summed over ranks, of the own tokens, [m, N], for x of all of them, [T m, K]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, exchange: Exchange, fused: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.exchange, ctx.fused = weight, exchange, fused
        right, y = weight.t(), x.new_empty(x.shape[0], weight.shape[0])
        return scattered_product(exchange, y, lambda some, out: torch.mm(x[some], right, out=out))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        exchange: Exchange = ctx.exchange
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        dx = dw = None
        g = g.contiguous()
        if needs_dx:
            dx = torch.empty_like(x)
            every = gathered_product(exchange, g, dx, _times(weight), whole=needs_dw)
        else:
            every = exchange.gather(g).wait()
        if needs_dw:
            dw = _weight_gradient(ctx.weight, every, x, ctx.fused)
        return dx, dw, None, None


def _times(right: Tensor) -> Any:
    """Return what writes the product of some rows with `right`."""
    return lambda rows, out: torch.mm(rows, right, out=out)


def _weight_gradient(weight: Tensor, g: Tensor, x: Tensor, fused: bool) -> Tensor:
    """Return what stands for dw = g^T x [N, K], added to the engine's accumulator where that is fused."""
    main_grad: Tensor | None = getattr(weight, "main_grad", None) if fused else None
    if main_grad is None:
        return g.t() @ x
    extension = layers.fused_weight_gradient_mlp_cuda  # Apex's, or what stands for it
    in_fp32 = main_grad.dtype == torch.float32
    add = extension.wgrad_gemm_accum_fp32 if in_fp32 else extension.wgrad_gemm_accum_fp16
    add(x, g, main_grad)
    return as_placeholder(weight)
