"""Weights as W = U S V^T + W_R with all four trained: the paper's main scheme (arXiv 2509.00404 v4,
appendix).

    y = U (S o (V^T x)) + W_R x

U [N, r], S [r], V [K, r] and W_R [N, K] come once from an SVD of the initial weight and are never split
again. This changes the optimisation problem, so what is claimed with it needs the same split in high
precision as a control. With G = g^T x the gradients are dU = G V S, dS = diag(U^T G V), dV = G^T U S,
computed from thin products.

Trap: a replicated factor sees only this rank's part of the sum over the sharded axis; its gradient is summed
over the ranks here, in backward, and must not be reduced again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from metis.config import QuantizerConfig, Recipe, ReparametrisationConfig
from metis.errors import ConfigError
from metis.gemm import product
from metis.operand import Axis, encode


def split_by_svd(
    weight: Tensor, rank: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (u [N, r], s [r], v [K, r], residual [N, K]) in `dtype` with weight = u diag(s) v^T + residual.

    The SVD runs in float64; the residual is formed from the factors as rounded to `dtype`, the parameters'
    own, so the sum gives the weight back. Raises ConfigError when the rank exceeds min(N, K).
    """
    if rank > min(weight.shape):
        raise ConfigError(
            "reparametrisation.rank",
            f"must be at most min(out_features, in_features) = {min(weight.shape)}, received {rank}; lower "
            "rank.fixed or rank.minimum",
        )
    full = weight.detach().to(torch.float64)
    u, s, vh = torch.linalg.svd(full, full_matrices=False)
    u, s, v = (t.to(dtype) for t in (u[:, :rank], s[:rank], vh[:rank].t()))
    residual = full - (u.double() * s.double()) @ v.double().t()
    return u.contiguous(), s, v.contiguous(), residual.to(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorPath:
    """The thin path U (S o (V^T x)) of a reparametrised linear, for the axes this rank holds."""

    config: ReparametrisationConfig
    in_features: Axis
    out_features: Axis
    amax_scope: str

    def under(self, recipe: Recipe) -> FactorPath:
        """Return the path of the same factors under another reparametrised recipe."""
        assert recipe.reparametrisation is not None
        return replace(self, config=recipe.reparametrisation, amax_scope=recipe.amax_scope)

    def __call__(self, x: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
        """Return this rank's [M, N] contribution for x [M, K], in x's dtype."""
        with torch.autocast(x.device.type, enabled=False):  # it would turn fp32 accumulation into bf16
            return _FactorPath.apply(x, u, s, v, self)

    def quantized(self, factor: Tensor, axis: Axis, along_rank: bool) -> Tensor:
        """Return a factor as it enters the products: NVFP4 and back if asked, blocks along r or along K."""
        quantizer: QuantizerConfig | None = self.config.factor_quantizer
        if quantizer is None:
            return factor
        rank = Axis.whole(factor.shape[1])
        if along_rank:
            return encode(factor, quantizer, axis, rank, amax_scope=self.amax_scope).dequantize(factor.dtype)
        encoded = encode(factor.t().contiguous(), quantizer, rank, axis, amax_scope=self.amax_scope)
        return encoded.dequantize(factor.dtype).t()


class _FactorPath(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, s: Tensor, v: Tensor, path: FactorPath) -> Tensor:
        ctx.path = path
        ctx.save_for_backward(x, u, s, v)
        accumulate = torch.promote_types(x.dtype, torch.float32)
        u_q, v_q = path.quantized(u, path.out_features, True), path.quantized(v, path.in_features, False)
        a = product(x, v_q.t(), accumulate)
        return product((a * s).to(x.dtype), u_q, accumulate).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(g.device.type, enabled=False):
            return _FactorPath._backward(ctx, g)

    @staticmethod
    def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, u, s, v = ctx.saved_tensors
        path: FactorPath = ctx.path
        accumulate = torch.promote_types(x.dtype, torch.float32)
        u_q, v_q = path.quantized(u, path.out_features, True), path.quantized(v, path.in_features, False)
        a = product(x, v_q.t(), accumulate)
        h = product(g, u_q.t(), accumulate)
        du = product(g.t(), (a * s).to(x.dtype).t(), accumulate)
        ds = (h * a).sum(dim=0)
        scaled = (h * s).to(x.dtype)
        dv = product(x.t(), scaled.t(), accumulate)
        dx = product(scaled, v_q, accumulate).to(x.dtype)
        if path.out_features.is_sharded:
            path.out_features.sum(dv)
            path.out_features.sum(ds)
        if path.in_features.is_sharded:
            path.in_features.sum(du)
            path.in_features.sum(ds)
        return dx, du.to(u.dtype), ds.to(s.dtype), dv.to(v.dtype), None
