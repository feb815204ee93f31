"""Gradient norm, clipping and the copy back into the parameters as one pass each, without TE and Apex.

megatron-core's own stand-ins for the multi-tensor kernels of Transformer Engine and Apex loop over tensors:
the norm waits for the GPU once per tensor, scaling writes a temporary and copies it, and the parameters are
copied one by one in any case. torch's `_foreach` functions do each in a few launches.

Traps: the names are imported into two modules, and with Transformer Engine or Apex they hold its kernels,
which stay. The copy into the parameters is replaced wherever all of them are plain tensors.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_patches.registry import Patch, Target

_UTILS = "megatron.core.utils"
_OPTIMIZER = "megatron.core.optimizer.optimizer"
_CLIP = "megatron.core.optimizer.clip_grads"
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer"


def foreach_l2_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], per_tensor: bool, *args: Any
) -> tuple[Tensor, None]:
    """Return (the l2 norm over all tensors of the lists, fp32 [1] on their device; None).

    The arguments are those of `local_multi_tensor_l2_norm`, whose place it takes; nothing waits for the GPU.
    """
    norms = [norm for tensors in tensor_lists for norm in torch._foreach_norm(list(tensors))]
    return torch.linalg.vector_norm(torch.stack(norms).float()).reshape(1), None


def foreach_scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], scale: float
) -> None:
    """Write source * scale into each destination, in place where both are one tensor.

    The arguments are those of `local_multi_tensor_scale`.
    """
    sources, destinations = (list(tensors) for tensors in tensor_lists)
    if any(source.data_ptr() != to.data_ptr() for source, to in zip(sources, destinations, strict=True)):
        torch._foreach_copy_(destinations, sources)
    if scale != 1.0:
        torch._foreach_mul_(destinations, scale)


def _activate() -> bool:
    """Put both functions where the stand-ins were imported; nothing where Transformer Engine or Apex is."""
    utils: Any = importlib.import_module(_UTILS)
    stand_ins = {
        utils.local_multi_tensor_l2_norm: foreach_l2_norm,
        utils.local_multi_tensor_scale: foreach_scale,
    }
    changed = False
    for module_name in (_CLIP, _OPTIMIZER):
        module: Any = importlib.import_module(module_name)
        for name in ("l2_norm_impl", "multi_tensor_scale_impl"):
            replacement = stand_ins.get(getattr(module, name, None))
            if replacement is not None:
                setattr(module, name, replacement)
                changed = True
    return changed


def _replace_copy(original: Callable[..., None], path: str) -> Callable[..., None]:
    def _multi_tensor_copy_this_to_that(
        this: list[Tensor], that: list[Tensor], overflow_buf: Tensor | None = None
    ) -> None:
        """As upstream, but without an overflow buffer in one call."""
        if overflow_buf is not None:
            original(this, that, overflow_buf)
        elif this:
            torch._foreach_copy_(that, this)

    return _multi_tensor_copy_this_to_that


def _replace_distributed_copy(original: Callable[..., None], path: str) -> Callable[..., None]:
    module: Any = importlib.import_module(_DISTRIBUTED)

    def _copy_main_params_to_model_params(self: Any) -> None:
        """As upstream; the shards of plain parameters are copied in one call per list."""
        if self.is_stub_optimizer or not _is_plain(self, module.is_float8tensor):
            original(self)
            return
        for shards, params in (
            (self.shard_fp32_from_float16_groups, self.model_float16_groups),
            (self.shard_fp32_groups, self.model_fp32_groups),
        ):
            pairs = list(_shards(self, shards, params))
            if pairs:
                sources, destinations = zip(*pairs, strict=True)
                torch._foreach_copy_(list(destinations), list(sources))

    return _copy_main_params_to_model_params


def _is_plain(optimizer: Any, is_float8: Callable[[Any], bool]) -> bool:
    """Whether every parameter is an ordinary tensor with a main copy that the engine holds."""
    config, ddp_config = optimizer.config, optimizer.ddp_config
    if ddp_config.use_megatron_fsdp or config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        return False
    groups = (*optimizer.model_float16_groups, *optimizer.model_fp32_groups)
    return not any(is_float8(param) for group in groups for param in group)


def _shards(optimizer: Any, shard_groups: Any, param_groups: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (main shard, its place in the parameter buffer) of every parameter that this rank owns a part
    of.
    """
    for shards, params in zip(shard_groups, param_groups, strict=True):
        for shard, param in zip(shards, params, strict=True):
            where = optimizer._get_model_param_range_map(param)["gbuf_world_in_bucket"]
            assert where.size == shard.nelement()
            buffer, _, bucket = optimizer.model_param_gbuf_map[param]
            data = optimizer.buffers[buffer].buckets[bucket].param_data
            if where.size:
                yield shard.detach(), data.view(-1)[where.start : where.end]


PATCHES = (
    Patch(
        name="foreach_norm_and_scale",
        why="without TE and Apex the gradient norm waits for the GPU once per tensor, and scaling takes two "
        "passes",
        reaches="get_grad_norm_fp32, clip_grad_by_total_norm_fp32, copies with an overflow buffer (fp16)",
        upstream="megatron/core/utils.py lines 1193-1215, imported in optimizer/clip_grads.py:35 and "
        "optimizer.py:34",
        delete_when="the local multi-tensor functions use torch's foreach functions",
        devices=("cuda",),
        on_request=True,
        relies_on=(
            Target(
                path=f"{_UTILS}.local_multi_tensor_l2_norm",
                source_hash="01526c55444a73bd00bebbf536bc92f9ac80eadca0cbbbfbd3a1d8c99cb07548",
            ),
            Target(
                path=f"{_UTILS}.local_multi_tensor_scale",
                source_hash="a271d86b61250d2f00bad84f72ecd194291f5be4a5e1c80a24703dafe25d9171",
            ),
        ),
        activate=_activate,
    ),
    Patch(
        name="foreach_copy_to_parameters",
        why="main parameters are copied into the model's one launch per parameter",
        reaches="Float16OptimizerWithFloat16Params with bf16",
        upstream="megatron/core/optimizer/optimizer.py lines 78-94",
        delete_when="_multi_tensor_copy_this_to_that copies bf16 in one call",
        devices=("cuda",),
        on_request=True,
        targets=(
            Target(
                path=f"{_OPTIMIZER}._multi_tensor_copy_this_to_that",
                source_hash="2788b0572db3ae06792290baeaf36b75a6ab33ab539a019e88817597adcac75c",
            ),
        ),
        replace=_replace_copy,
    ),
    Patch(
        name="foreach_copy_to_parameter_shards",
        why="main shards are copied into the parameter buffer one launch per parameter",
        reaches="DistributedOptimizer.step",
        upstream="megatron/core/optimizer/distrib_optimizer.py lines 2429-2479",
        delete_when="the distributed optimizer copies its shards in one call",
        devices=("cuda",),
        on_request=True,
        targets=(
            Target(
                path=f"{_DISTRIBUTED}.DistributedOptimizer._copy_main_params_to_model_params",
                source_hash="b92274c3f2e1e847cd02c2e45a473d8bfa37a8004292ae6c6496bdab2a2a212c",
            ),
        ),
        replace=_replace_distributed_copy,
    ),
)
