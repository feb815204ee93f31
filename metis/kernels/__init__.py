"""Triton twins of what `metis.quantize` computes: the same bits, one pass over memory.

One idea: a kernel may differ from its oracle in speed only. Every operation is one IEEE fp32 operation in the
oracle's order (no contraction into FMA, correctly rounded division, denormals kept, NaN carried along),
random words come from the counters of `metis.rng`, and tests compare bytes.

    amax, rotate                      largest magnitude (also of the rotated matrix); Hadamard rotation
    quantize_nvfp4, quantize_mxfp4    packed codes and scales, and/or the decoded bf16 operand
    amax_both                         of a matrix and of its rotated transpose, in one read
    project, fold, residual           P = x V in canonical chunks, R = x - P V^T (own bits, see projection.py)
    split                             the three in one launch, for many rows
    decode_operand, dequantize        bytes back to numbers
    place                             thin factors of a product beside its operands
    gemm_scales                       what multiplies an NVFP4 product, and its inverse

Traps:
* Names are loaded on first use: a machine without Triton can import this package and ask `is_available`.
* On a CPU the kernels run under Triton's interpreter (TRITON_INTERPRET=1 in the environment before Triton is
  first imported): right, and thousands of times too slow for training.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "GemmScales": "arguments",
    "KernelNoise": "arguments",
    "KernelOutput": "arguments",
    "amax": "reduction",
    "amax_both": "reduction",
    "decode_operand": "decoding",
    "dequantize": "decoding",
    "fold": "projection",
    "gemm_scales": "scales",
    "Thin": "arguments",
    "is_aligned": "projection",
    "is_available": "availability",
    "place": "placing",
    "project": "projection",
    "quantize_mxfp4": "mxfp4",
    "quantize_nvfp4": "nvfp4",
    "residual": "projection",
    "rotate": "rotation",
    "can_split": "splitting",
    "can_widen": "widening",
    "split": "splitting",
    "widen": "widening",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Load the module that defines a public name (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value
