"""The engine's part of the exact mode: float64 parameters, and every norm summed in float64 and rounded once.

In that test mode the whole model has float64 parameters and gradients, so a sum that a layout can split (a
GEMM over shards, gradient accumulation, data-parallel reduction, the loss over the vocabulary, the gradient
norm) is formed in float64: layouts differ by 1e-16 instead of 1e-7, and what is rounded to lower precision
afterwards is the same number everywhere. megatron-core knows float32 and the 16-bit types only; these patches
let float64 through the optimizer, the clipping and the loss. Applied by `patch_exact_grad_norm`, never by
default.

Traps: `grad_reduce_in_fp32` must be off (gradient buffers then take the parameters' dtype), `pipeline_dtype`
must be float64, and no Float16Module is used. A fused Adam (Transformer Engine, Apex) computes in float32:
use torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_patches.cuda_on_cpu import called_from_engine, is_type_query
from megatron_patches.registry import Patch, Target

_CLIP = "megatron.core.optimizer.clip_grads"
_OPTIMIZER = "megatron.core.optimizer.optimizer"
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
_CROSS_ENTROPY = "megatron.core.tensor_parallel.cross_entropy.VocabParallelCrossEntropy"


class DoubleCountsAsFloat(TorchFunctionMode):
    """Answers `tensor.type()` with the CUDA float32 name for float64 tensors when megatron-core asks."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one torch call; see the class."""
        kwargs = kwargs or {}
        if is_type_query(func, args, kwargs) and args[0].dtype == torch.float64 and called_from_engine(1):
            return "torch.cuda.FloatTensor"
        return func(*args, **kwargs)


class _Float32AsFloat64(TorchFunctionMode):
    """Creates float64 tensors where float32 ones are asked for."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one torch call; see the class."""
        kwargs = kwargs or {}
        if kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def _enter_mode() -> bool:
    stack = torch.overrides._get_current_function_mode_stack()
    if any(isinstance(mode, DoubleCountsAsFloat) for mode in stack):
        return False
    DoubleCountsAsFloat().__enter__()  # for the life of the process
    return True


def exact_grad_norm(
    grads_for_norm: list[torch.Tensor] | torch.Tensor,
    norm_type: float = 2,
    grad_stats_parallel_group: torch.distributed.ProcessGroup | None = None,
) -> float:
    """Return the p-norm of all gradients of a process group: float64 sums, one rounding to float32 at the
    end.

    norm = fp32((sum over ranks and gradients of sum |g|^p)^(1/p)), for p = inf the largest |g|. Gradients of
    any dtype; the same arguments as megatron-core's `get_grad_norm_fp32`, whose place it takes.
    """
    grads = [grads_for_norm] if isinstance(grads_for_norm, torch.Tensor) else list(grads_for_norm)
    device = grads[0].device if grads else torch.zeros((), device="cuda").device
    total = torch.zeros((), dtype=torch.float64, device=device)
    operation = torch.distributed.ReduceOp.SUM
    if norm_type == math.inf:
        operation = torch.distributed.ReduceOp.MAX
        for grad in grads:
            total = torch.maximum(total, grad.detach().abs().max().double())
    else:
        for grad in grads:
            total = total + grad.detach().double().abs().pow(norm_type).sum()
    torch.distributed.all_reduce(total, op=operation, group=grad_stats_parallel_group)
    norm = total if norm_type == math.inf else total ** (1.0 / norm_type)
    return float(norm.to(torch.float32))


def exact_clip(
    parameters: Iterable[torch.Tensor] | torch.Tensor,
    max_norm: float,
    total_norm: float,
    use_decoupled_grad: bool = False,
) -> None:
    """Scale gradients in place by max_norm / (total_norm + 1e-6) if that is below 1, in the gradients' own
    dtype.

    The same arguments as megatron-core's `clip_grad_by_total_norm_fp32`, whose place it takes.
    """
    coefficient = max_norm / (total_norm + 1.0e-6)
    if coefficient >= 1.0:
        return
    attribute = "decoupled_grad" if use_decoupled_grad else "grad"
    for param in [parameters] if isinstance(parameters, torch.Tensor) else parameters:
        grad = getattr(param, attribute, None)
        if grad is not None:
            grad.detach().mul_(coefficient)


def _replace_norm(original: Callable[..., float], path: str) -> Callable[..., float]:
    def get_grad_norm_fp32(*args: Any, **kwargs: Any) -> float:
        """See `exact_grad_norm`."""
        return exact_grad_norm(*args, **kwargs)

    return get_grad_norm_fp32


def _replace_clip(original: Callable[..., None], path: str) -> Callable[..., None]:
    def clip_grad_by_total_norm_fp32(*args: Any, **kwargs: Any) -> None:
        """See `exact_clip`."""
        exact_clip(*args, **kwargs)

    return clip_grad_by_total_norm_fp32


def _replace_copy_grads(original: Callable[..., None], path: str) -> Callable[..., None]:
    def _copy_model_grads_to_main_grads(self: Any) -> None:
        """As upstream, then float64 parameters get float64 gradients instead of float32 ones."""
        for group in () if self.is_stub_optimizer else self.model_fp32_groups:
            for param in group:
                assert param.dtype != torch.float64 or param.main_grad.dtype == torch.float64
        with _KeepFloat64():
            original(self)

    return _copy_model_grads_to_main_grads


class _KeepFloat64(TorchFunctionMode):
    """Leaves float64 tensors as they are when they are asked for as float32 with `.float()`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one torch call; see the class."""
        if func == torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def _replace_gather(original: Callable[..., Any], path: str) -> Callable[..., Any]:
    def get_parameter_state_dp_zero(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As upstream; a float64 model's state is gathered in float64."""
        if any(buffer.param_dtype == torch.float64 for buffer in self.buffers):
            with _Float32AsFloat64():
                return original(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    return get_parameter_state_dp_zero


def _replace_logits_max(original: Callable[..., Any], path: str) -> Callable[..., Any]:
    def calculate_logits_max(vocab_parallel_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As upstream; float64 logits stay float64 (a copy, because the caller subtracts in place)."""
        if vocab_parallel_logits.dtype != torch.float64:
            return original(vocab_parallel_logits)
        logits = vocab_parallel_logits.clone()
        return logits, torch.max(logits, dim=-1)[0]

    return calculate_logits_max


PATCHES = (
    Patch(
        name="exact_float64_type",
        why="the optimizers accept float32 and 16-bit parameters only, by the name of their type",
        reaches="FP32 and distributed optimizers, gradient clipping",
        upstream="megatron/core/optimizer/optimizer.py:690, distrib_optimizer.py:420, clip_grads.py:167",
        delete_when="megatron-core accepts float64 parameters",
        only_exact=True,
        activate=_enter_mode,
    ),
    Patch(
        name="exact_grad_norm",
        why="the gradient norm is summed and reduced in float32, in an order that depends on the layout",
        reaches="MegatronOptimizer.get_grad_norm and clip_grad_norm, ChainedOptimizer.step",
        upstream="megatron/core/optimizer/clip_grads.py lines 51-135, imported by name in optimizer.py:50",
        delete_when="the norm can be computed in float64 by an option",
        only_exact=True,
        targets=(
            Target(
                path=f"{_CLIP}.get_grad_norm_fp32",
                source_hash="7fa2ba2493d43f1d3693ee62b5558ffccf3b0b2976bf746613187ff3bbc8b86f",
            ),
            Target(
                path=f"{_OPTIMIZER}.get_grad_norm_fp32",
                source_hash="7fa2ba2493d43f1d3693ee62b5558ffccf3b0b2976bf746613187ff3bbc8b86f",
            ),
        ),
        replace=_replace_norm,
    ),
    Patch(
        name="exact_clip",
        why="fused scaling kernels do not take float64 gradients",
        reaches="MegatronOptimizer.clip_grad_norm, ChainedOptimizer.step",
        upstream="megatron/core/optimizer/clip_grads.py lines 138-177, imported by name in optimizer.py:50",
        delete_when="clip_grad_by_total_norm_fp32 takes float64 gradients",
        only_exact=True,
        targets=(
            Target(
                path=f"{_CLIP}.clip_grad_by_total_norm_fp32",
                source_hash="8edb9da5365045a5d1c21c4ca81697412bbdbab725209db8df00dc90d03363e1",
            ),
            Target(
                path=f"{_OPTIMIZER}.clip_grad_by_total_norm_fp32",
                source_hash="8edb9da5365045a5d1c21c4ca81697412bbdbab725209db8df00dc90d03363e1",
            ),
        ),
        replace=_replace_clip,
    ),
    Patch(
        name="exact_distributed_optimizer_grads",
        why="the distributed optimizer hands float32 gradients to float64 parameters",
        reaches="DistributedOptimizer.prepare_grads",
        upstream="megatron/core/optimizer/distrib_optimizer.py lines 2386-2427",
        delete_when="gradients are cast to the dtype of the main parameter",
        only_exact=True,
        targets=(
            Target(
                path=f"{_DISTRIBUTED}._copy_model_grads_to_main_grads",
                source_hash="ffcdecd38d14405a4123f2654005250a3dda27b373038e9b998b726bae80e9ad",
            ),
        ),
        replace=_replace_copy_grads,
    ),
    Patch(
        name="exact_distributed_optimizer_checkpoint",
        why="fully_reshardable checkpoints gather parameters and moments in float32",
        reaches="the distributed optimizer's fully_reshardable and dp_zero_gather_scatter checkpoints",
        upstream="megatron/core/optimizer/distrib_optimizer.py lines 977-1124",
        delete_when="state is gathered in the dtype of the main parameters",
        only_exact=True,
        targets=(
            Target(
                path=f"{_DISTRIBUTED}.get_parameter_state_dp_zero",
                source_hash="812c52ea4568b0ffae6132290b6bffe247fa0c44e42835be3e1ae55cbadd838b",
            ),
        ),
        replace=_replace_gather,
    ),
    Patch(
        name="exact_cross_entropy",
        why="the loss over the vocabulary is summed in float32, per tensor-parallel rank first",
        reaches="vocab_parallel_cross_entropy and the unfused half of the fused one",
        upstream="megatron/core/tensor_parallel/cross_entropy.py lines 22-33",
        delete_when="float64 logits are not converted",
        only_exact=True,
        targets=(
            Target(
                path=f"{_CROSS_ENTROPY}.calculate_logits_max",
                source_hash="b0f98c9624e79107dee2a05e0846aaf846bca50762bf739253a5813e7266ef2a",
            ),
        ),
        replace=_replace_logits_max,
    ),
)
