"""Refuses the one pipeline setting of megatron-core that trains on wrong numbers.

With two pipeline stages, previous and next rank are the same process. Batched point-to-point messages between
two processes are matched by order alone, and the interleaved schedule sends forward and backward messages in
different orders on the two sides: activations and gradients are mixed up without any error. Unbatched
messages use a group for each direction and are right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_patches.registry import Patch, Target


def _replace(original: Callable[..., None], path: str) -> Callable[..., None]:
    def __init__(self: Any, pp_group: Any, config: Any) -> None:  # noqa: N807
        """As upstream, after refusing batched messages for two interleaved stages."""
        virtual = config.virtual_pipeline_model_parallel_size
        if pp_group.size() == 2 and virtual is not None and config.batch_p2p_comm:
            raise ValueError(
                f"two pipeline stages with virtual_pipeline_model_parallel_size={virtual} and "
                "batch_p2p_comm=True mix up activations silently; set overlap_p2p_comm=True and "
                "batch_p2p_comm=False"
            )
        original(self, pp_group, config)

    return __init__


PATCH = Patch(
    name="no_batched_p2p_with_two_interleaved_stages",
    why="two interleaved pipeline stages with batched p2p train on wrong numbers, silently",
    reaches="every pipeline schedule, when it creates its communicator",
    upstream="megatron/core/pipeline_parallel/p2p_communication.py lines 18-55 and 162-184",
    delete_when="megatron-core refuses the setting or separates the two directions of batched messages",
    targets=(
        Target(
            path="megatron.core.pipeline_parallel.p2p_communication.P2PCommunicator.__init__",
            source_hash="d805305f3cb9bf9537687bf21d814f94d23ff3e50cb2c1557f23cc88ec005b85",
        ),
    ),
    replace=_replace,
)
