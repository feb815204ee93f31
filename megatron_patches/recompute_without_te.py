"""Recomputing a layer norm (or MLA's projections) works without Transformer Engine.

`CheckpointWithoutOutput(fp8=False)` asks `fp8 is not None`, so its own default means "on" and the first
forward fails on a name that only Transformer Engine provides. Without it, FP8 cannot be on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from megatron_patches.registry import Patch, Target


def _replace(original: Callable[..., None], path: str) -> Callable[..., None]:
    engine = sys.modules["megatron.core.tensor_parallel.random"]

    def __init__(self: Any, fp8: bool | None = False) -> None:  # noqa: N807
        """As upstream; without Transformer Engine, no FP8 whatever was asked."""
        original(self, fp8 if engine.HAVE_TE else None)

    return __init__


PATCH = Patch(
    name="recompute_without_te",
    why="selective recompute of layer norms fails with a NameError without Transformer Engine",
    reaches="--recompute-modules layernorm, mla_up_proj, moe_act",
    upstream="megatron/core/tensor_parallel/random.py lines 634-641, `fp8=False` tested with `is not None`",
    delete_when="the constructor's default is None or its test is for truth",
    targets=(
        Target(
            path="megatron.core.tensor_parallel.random.CheckpointWithoutOutput.__init__",
            source_hash="72036565b77136f2579f36e1f34fcc29706746f7515fa9711bf73eb78b1c5f07",
        ),
    ),
    replace=_replace,
)
