"""RMSNorm and LayerNorm for layer specs, with sequence parallelism.

megatron-core's fallback without Apex or Transformer Engine is plain torch norms, which refuse sequence
parallelism: each rank then sees a part of the tokens, so the weight's gradient has to be summed over the TP
group. The engine does that in `finalize_model_grads` for parameters that carry `sequence_parallel = True`;
these classes set it.

The one idea of `RMSNorm`: keep only the input for backward and normalise again there. It costs one more pass
over the activation and saves one bf16 copy of it per norm. With `config.persist_layer_norm` (Megatron's name
for fused norms) both directions are one Triton kernel each, `metis.mcore.fused_norm`.

Traps: LLaMA rounds the normalised value to the activation dtype *before* it multiplies by the weight, torch's
`nn.RMSNorm` after; in bf16 the two differ. `build_module` returns plain functions uncalled, so a spec needs
the class (`norm_class`), not `build_norm`.

Letters: h hidden size; leading dimensions are any.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from metis.errors import ConfigError
from metis.kernels.availability import is_available

MAX_COLUMNS = 16384
"""Longest row of the fused kernel."""
_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _RMSNormFunction(torch.autograd.Function):
    """y = round(x * rsqrt(mean(x^2) + eps)) * w; saves x and w."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return functional.rms_norm(x, weight.shape, eps=eps).mul_(weight.to(x.dtype))

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        with torch.enable_grad():
            x = x.detach().requires_grad_(need_x)
            normalized = functional.rms_norm(x, weight.shape, eps=ctx.eps)
        grad_x = grad_weight = None
        if need_x:
            grad_x = torch.autograd.grad(normalized, x, grad_output * weight.to(x.dtype))[0]
        if need_weight:
            # Products of two bf16 values are exact in FP32, and tokens are many: sum there.
            accumulate = torch.promote_types(x.dtype, torch.float32)
            product = grad_output.to(accumulate, copy=True).mul_(normalized.detach())
            grad_weight = product.reshape(-1, weight.numel()).sum(0).to(weight.dtype)
        return grad_x, grad_weight, None


class RMSNorm(torch.nn.Module):
    """y = (x * rsqrt(mean(x^2) + eps)) * w over the last dimension, in LLaMA's order of roundings.

    x [..., h] in fp64, fp32, bf16 or fp16; statistics and the first product in fp32 (fp64 for fp64), rounded
    to x's dtype, then times w [h]. The constructor takes what megatron's `WrappedTorchNorm` takes;
    `normalization` selects classes there and is read by nobody here. `persist_layer_norm`, here or in the
    config, selects the fused kernels where they run. w is in `config.params_dtype`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str = "RMSNorm",
    ) -> None:
        super().__init__()
        _refuse_zero_centered(config, zero_centered_gamma)
        self.hidden_size = hidden_size
        self.eps = eps
        self.fused = (persist_layer_norm or config.persist_layer_norm) and hidden_size <= MAX_COLUMNS
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x [..., h]; returns the same shape and dtype."""
        if self.fused and x.dtype in _FUSED_DTYPES and x.numel() > 0 and is_available(x.device):
            from metis.mcore.fused_norm import rms_norm

            return rms_norm(x, self.weight, self.eps)
        return _RMSNormFunction.apply(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        return f"{self.hidden_size}, eps={self.eps}"


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm (statistics in fp32, fp64 for fp64) whose parameters the engine reduces over TP.

    Constructor as `RMSNorm`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str = "LayerNorm",
    ) -> None:
        _refuse_zero_centered(config, zero_centered_gamma)
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
        self.bias.sequence_parallel = config.sequence_parallel


NORMS: dict[str, type[torch.nn.Module]] = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}


def norm_class(normalization: str) -> type[torch.nn.Module]:
    """Return the class for `--normalization`, as a layer spec holds it; `ConfigError` if unknown."""
    if normalization not in NORMS:
        raise ConfigError("--normalization", f"must be one of {', '.join(NORMS)}, got {normalization}")
    return NORMS[normalization]


def build_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
    """Build the norm that `config.normalization` names over a last dimension of `hidden_size`."""
    return norm_class(config.normalization)(config, hidden_size, eps)


def _refuse_zero_centered(config: TransformerConfig, zero_centered_gamma: bool) -> None:
    if config.layernorm_zero_centered_gamma or zero_centered_gamma:
        raise ConfigError("--apply-layernorm-1p", "norm weights stored around zero are not supported")
