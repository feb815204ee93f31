"""Which passes of a training step are fused: the `--no-...-fusion` switches meet the device here.

One idea: everything that can be fused is fused on a GPU unless a switch says no, and what is left unfused is
printed once with its reason. On the CPU nothing is: there the engine's plain functions are the oracle, and
their bits stay. Under `--exact-reductions` nothing is either, because fused kernels sum in fp32.

What the engine finds through Transformer Engine or Apex it uses itself; ours takes the place of what is
missing.
"""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

import megatron_patches
from metis.errors import ConfigError
from metis.kernels.availability import reason_unavailable
from metis.training.outputs import print_rank_0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusions:
    """What is fused in this run.

    weight_gradients: products of weight gradients add to the fp32 main gradient themselves.
    rotary: query and key are rotated in one pass. rotary_qkv: in the copy that cuts the QKV projection.
    norm: norms are one kernel in each direction. cross_entropy: the loss reads the logits once.
    """

    weight_gradients: bool = False
    rotary: bool = False
    rotary_qkv: bool = False
    norm: bool = False
    cross_entropy: bool = False


def resolve_fusions(args: Namespace, use_transformer_engine: bool) -> Fusions:
    """Return what is fused for `args` on the resolved `args.device`, prepare the engine for it, and print it.

    On the CPU nothing is printed, and only what was asked for is fused: the engine's own cross entropy.
    Raises `ConfigError` where `--cross-entropy-loss-fusion` was asked for and cannot be had.
    """
    if args.device != "cuda":
        return Fusions(cross_entropy=args.cross_entropy_loss_fusion)
    reasons = {
        "weight_gradients": _weight_gradients(args),
        "rotary": _rotary(args, use_transformer_engine),
        "norm": _norm(args, use_transformer_engine),
        "cross_entropy": _cross_entropy(args),
    }
    unfused = [f"{name} ({reason})" for name, reason in reasons.items() if reason is not None]
    fused = [name for name, reason in reasons.items() if reason is None]
    for title, names in (("fused", fused), ("not fused", unfused)):
        if names:
            print_rank_0(f" > {title}: {', '.join(names).replace('_', ' ')}")
    # A norm per head stands between cutting and rotating.
    rotary_qkv = "rotary" in fused and not (use_transformer_engine or args.qk_layernorm)
    return Fusions(**dict.fromkeys(fused, True), rotary_qkv=rotary_qkv)


def _no_kernels(args: Namespace) -> str | None:
    """Return why our Triton kernels are out of the question, None when they are not."""
    return "--exact-reductions" if args.exact_reductions else reason_unavailable(args.device)


def _rotary(args: Namespace, use_transformer_engine: bool) -> str | None:
    """Return why the rotation is not fused; None after the engine has been given what it needs."""
    if args.position_embedding_type != "rope":
        return f"--position-embedding-type {args.position_embedding_type}"
    if not args.apply_rope_fusion:
        return "--no-rope-fusion"
    if use_transformer_engine:
        return None  # its own
    if args.rotary_interleaved:
        return "--rotary-interleaved"
    if reason := _no_kernels(args):
        return reason
    megatron_patches.patch_rotary(*_fused_rotary())
    return None


def _fused_rotary() -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """Return both functions of one `FusedRotary`; loads Triton."""
    from metis.mcore.rotary import FusedRotary

    fused = FusedRotary()
    return fused.rotate, fused.rotate_qkv


def _norm(args: Namespace, use_transformer_engine: bool) -> str | None:
    if use_transformer_engine or args.normalization == "LayerNorm":
        return None  # Transformer Engine's and torch's are one kernel by themselves
    if args.no_persist_layer_norm:
        return "--no-persist-layer-norm"
    if args.spec:
        return "--spec"  # megatron-core's own norms refuse the config field that asks for ours
    return _no_kernels(args)


def _cross_entropy(args: Namespace) -> str | None:
    if args.no_cross_entropy_loss_fusion:
        return "--no-cross-entropy-loss-fusion"
    reason = _no_kernels(args)
    if reason is not None and args.cross_entropy_loss_fusion:
        raise ConfigError(
            "--cross-entropy-loss-fusion",
            f"must be left out, the fused kernels cannot run here: {reason}",
        )
    return reason


def _weight_gradients(args: Namespace) -> str | None:
    """Return why weight gradients are not fused; None after the engine has been given what it needs."""
    if not args.gradient_accumulation_fusion:
        return "--no-gradient-accumulation-fusion"
    if args.exact_reductions:
        return "--exact-reductions"
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None:
        return None
    from metis.gemm import cublas

    if not cublas.is_available():
        return "no cuBLAS, and Apex is not installed"
    megatron_patches.patch_weight_gradients(accumulate_weight_gradient)
    return None


def accumulate_weight_gradient(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """Add grad_output^T input to main_grad in one product; fp32 sums, one rounding to main_grad's dtype.

    total_input [M, K], grad_output [M, N] of one dtype; main_grad [N, K] fp32 or of that dtype. The signature
    is that of Apex's `wgrad_gemm_accum_fp32`.
    """
    from metis.gemm import cublas

    cublas.gemm(grad_output.t(), total_input.t(), main_grad, accumulate=True)
