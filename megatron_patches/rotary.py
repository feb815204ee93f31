"""`apply_rope_fusion` without Transformer Engine: the caller's functions take the place of its kernels.

megatron-core rotates query and key by a dozen elementwise operations unless Transformer Engine is installed,
whose two fused functions it imports by name. Here those names hold functions that are handed in.

Trap: the form for the whole projection (`fused_single_qkv_rope`) skips the step that picks a rank's queries
when there are fewer key/value groups than tensor-parallel ranks; its caller must not switch it on there.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_patches.registry import Patch, Target

_ROPE = "megatron.core.models.common.embeddings.rope_utils"
_ATTENTION = "megatron.core.transformer.attention"

Rotate = Callable[..., Tensor]
RotateQkv = Callable[..., tuple[Tensor, Tensor, Tensor]]


def with_functions(rotate: Rotate, rotate_qkv: RotateQkv) -> Patch:
    """Return the patch that puts the two functions in place; see `patch_rotary`."""
    return dataclasses.replace(PATCH, activate=lambda: _activate(rotate, rotate_qkv))


def _activate(rotate: Rotate, rotate_qkv: RotateQkv) -> bool:
    rope: Any = importlib.import_module(_ROPE)
    attention: Any = importlib.import_module(_ATTENTION)
    if rope.fused_apply_rotary_pos_emb == rotate:
        return False
    rope.fused_apply_rotary_pos_emb = rotate
    attention.apply_fused_qkv_rotary_pos_emb = rotate_qkv
    attention.HAVE_FUSED_QKV_ROPE = True
    return True


PATCH = Patch(
    name="rotary_without_te",
    why="fused rotary embedding needs Transformer Engine; unfused it costs a dozen passes over query and key",
    reaches="apply_rotary_pos_emb with config.apply_rope_fusion, Attention with config.fused_single_qkv_rope",
    upstream="megatron/core/models/common/embeddings/rope_utils.py lines 17-21 and 239-298, "
    "transformer/attention.py lines 112-117 and 956-978",
    delete_when="the fused functions are an argument of the config or of the layer spec",
    on_request=True,
    relies_on=(
        Target(
            path=f"{_ROPE}.apply_rotary_pos_emb",
            source_hash="2752798f27ef46ca8a977e6f63e3f001cd0e56aca59ec920483094e4336a7d0f",
        ),
        Target(
            path=f"{_ATTENTION}.Attention.forward",
            source_hash="0e779c3e4ce2b5947e0aa546570f494c0f0f5db5c216c7e1fbef4d1e2750af8a",
        ),
        Target(
            path=f"{_ATTENTION}.SelfAttention.get_query_key_value_tensors",
            source_hash="c2416ff2504e51b3ac4cd1f33dead833ed617f5fbb867be5491a20b26048cd53",
        ),
    ),
)
