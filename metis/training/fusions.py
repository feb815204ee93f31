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
from dataclasses import dataclass, fields

from torch import Tensor

import megatron_patches
from metis.training.outputs import print_rank_0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusions:
    """What is fused in this run.

    weight_gradients: products of weight gradients add to the fp32 main gradient themselves.
    """

    weight_gradients: bool = False


def resolve_fusions(args: Namespace) -> Fusions:
    """Return what is fused for `args` on the resolved `args.device`, prepare the engine for it, and print it.

    Prints nothing on the CPU.
    """
    if args.device != "cuda":
        return Fusions()
    reasons = {"weight_gradients": _weight_gradients(args)}
    fused = [field.name for field in fields(Fusions) if reasons[field.name] is None]
    unfused = [f"{name} ({reason})" for name, reason in reasons.items() if reason is not None]
    for title, names in (("fused", fused), ("not fused", unfused)):
        if names:
            print_rank_0(f" > {title}: {', '.join(names).replace('_', ' ')}")
    return Fusions(**{name: True for name in fused})


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
