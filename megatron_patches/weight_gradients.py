"""`gradient_accumulation_fusion` without Apex: the caller's function takes the place of Apex's extension.

megatron-core's own linears can add the weight gradient to the fp32 main gradient inside the product, but only
through Apex's extension module `fused_weight_gradient_mlp_cuda`; without it the option is refused, and every
microbatch rounds the gradient to bf16 and reads and writes the main gradient once more. Here the engine finds
an object with the extension's two functions, which both are the function that is handed in.

Trap: the engine returns an uninitialised gradient beside it, so that backward hooks still run, and marks the
parameter with `grad_added_to_main_grad`. Megatron's data-parallel wrapper sets and reads that mark; a model
without the wrapper has no main gradient and cannot be trained with the option on.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor

from megatron_patches.registry import Patch, Target

_LAYERS = "megatron.core.tensor_parallel.layers"
_EXTENSION = "fused_weight_gradient_mlp_cuda"

Accumulate = Callable[[Tensor, Tensor, Tensor], object]


def with_function(accumulate: Accumulate) -> Patch:
    """Return the patch that puts `accumulate` behind both names; see `patch_weight_gradients`."""
    return dataclasses.replace(PATCH, activate=lambda: _activate(accumulate))


def _activate(accumulate: Accumulate) -> bool:
    layers: Any = importlib.import_module(_LAYERS)
    present = getattr(layers, _EXTENSION, None)
    if isinstance(present, ModuleType):
        return False
    if present is not None and present.wgrad_gemm_accum_fp32 is accumulate:
        return False
    stand_in = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate)
    setattr(layers, _EXTENSION, stand_in)
    layers._grad_accum_fusion_available = True
    return True


PATCH = Patch(
    name="weight_gradients_without_apex",
    why="the weight gradient is added to the main gradient in a pass of its own unless Apex is installed",
    reaches="ColumnParallelLinear and RowParallelLinear with config.gradient_accumulation_fusion",
    upstream="megatron/core/tensor_parallel/layers.py lines 44-48, 561-615 and 924-932",
    delete_when="megatron-core accumulates with torch's or its own product",
    on_request=True,
    relies_on=(
        Target(
            path=f"{_LAYERS}.LinearWithGradAccumulationAndAsyncCommunication.backward",
            source_hash="b50b2ea4a1c9027040516475a8b40a0bd86ddf9e17fcb5c2c56feb3156c3ae3e",
        ),
        Target(
            path=f"{_LAYERS}.ColumnParallelLinear.__init__",
            source_hash="57fbefee15486f998bd6a2d64b2a0c3cd2faebdfaa736ab58c0cbd6a40cb87f0",
        ),
    ),
)
