"""A recomputed forward sees the context variables of its first forward.

A layer that must know which microbatch it is computing reads a `contextvars.ContextVar`. By the time the
engine recomputes that layer, in the middle of the backward pass and on a GPU in another thread, the variable
holds a later microbatch. So the function given to a checkpoint remembers the context it was first called in
and is rerun in a copy of it.

The first call is untouched: it runs in the caller's context, and what it sets there stays set. Autograd
modes, function modes and RNG states are not context variables and are handled by the engine as before. A copy
per rerun, because a context cannot be entered twice at once (nested checkpoints).
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

from megatron_patches.registry import Patch, Target


def rerun_in_first_context(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, whose calls after the first run in a copy of the context of the first call."""
    first_context: contextvars.Context | None = None

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal first_context
        if first_context is None:
            first_context = contextvars.copy_context()
            return function(*args, **kwargs)
        return first_context.copy().run(function, *args, **kwargs)

    return run


def _replace(original: Callable[..., Any], path: str) -> Callable[..., Any]:
    if path.endswith("CheckpointWithoutOutput.checkpoint"):

        def checkpoint(self: Any, run_function: Callable[..., Any], *args: Any) -> Any:
            """As upstream, with the context of this call kept for the recomputation."""
            return original(self, rerun_in_first_context(run_function), *args)

        return checkpoint

    def checkpoint_function(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As upstream, with the context of this call kept for the recomputation."""
        return original(rerun_in_first_context(function), *args, **kwargs)

    return checkpoint_function


PATCH = Patch(
    name="recompute_in_forward_context",
    why="recomputation runs after the microbatch has changed, so context variables are wrong in it",
    reaches="full and selective recompute, with and without output, Transformer Engine's checkpoint too",
    upstream=(
        "megatron/core/tensor_parallel/random.py lines 573-576 and 643-663; "
        "megatron/core/extensions/transformer_engine.py lines 2262-2288"
    ),
    delete_when="megatron-core tells a layer its microbatch, in the recomputation as well",
    targets=(
        Target(
            path="megatron.core.tensor_parallel.random.checkpoint",
            source_hash="a8902a1c3e85f604f84422f857c02887240ea656c419c28561958f49d33ce1ec",
        ),
        Target(
            path="megatron.core.tensor_parallel.checkpoint",
            source_hash="a8902a1c3e85f604f84422f857c02887240ea656c419c28561958f49d33ce1ec",
        ),
        Target(
            path="megatron.core.tensor_parallel.random.CheckpointWithoutOutput.checkpoint",
            source_hash="79eb4b7dbae8bf6745913ffc47eb38f048da993ba3520bd4de701cb37898ef99",
        ),
        Target(
            path="megatron.core.extensions.transformer_engine.te_checkpoint",
            source_hash="1de08e8bca5afd2dffd695355945ac16a2c33d8429f1dfb5f89975d3653976fd",
        ),
        Target(
            path="megatron.core.transformer.transformer_block.te_checkpoint",
            source_hash="1de08e8bca5afd2dffd695355945ac16a2c33d8429f1dfb5f89975d3653976fd",
            optional=True,
        ),
        Target(
            path="megatron.core.transformer.moe.moe_layer.te_checkpoint",
            source_hash="1de08e8bca5afd2dffd695355945ac16a2c33d8429f1dfb5f89975d3653976fd",
            optional=True,
        ),
    ),
    replace=_replace,
)
