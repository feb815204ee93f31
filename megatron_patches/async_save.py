"""Refuses megatron-core's persistent checkpoint worker on the CPU, where it divides by the number of GPUs and
hangs.

The worker is a spawned process, in which no patch is active: it computes `rank % torch.cuda.device_count()`,
dies, and the trainer waits for it forever. The forking caller (asynchronous save without a persistent worker)
works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_patches.registry import Patch, Target


def _replace(original: Callable[..., None], path: str) -> Callable[..., None]:
    def __init__(self: Any) -> None:  # noqa: N807
        """Refuse; the two attributes are what `__del__` reads."""
        self.process = self.start_time = None
        raise RuntimeError(
            "the persistent asynchronous checkpoint worker needs a GPU, the device is 'cpu'; "
            "save asynchronously without it, or synchronously"
        )

    return __init__


PATCH = Patch(
    name="no_persistent_async_worker_on_cpu",
    why="the persistent checkpoint worker dies without a GPU and the trainer waits for it forever",
    reaches="AsyncCallsQueue(persistent=True) at the first asynchronous save",
    upstream="megatron/core/dist_checkpointing/strategies/async_utils.py lines 296-311 and async_loop",
    delete_when="PersistentAsyncCaller.async_loop handles torch.cuda.device_count() == 0",
    devices=("cpu",),
    targets=(
        Target(
            path="megatron.core.dist_checkpointing.strategies.async_utils.PersistentAsyncCaller.__init__",
            source_hash="80aabc15c35e4a56e438c2f816cc7076b5ece0ed27200fb05bec14b5c0f3f10e",
        ),
    ),
    relies_on=(
        Target(
            path="megatron.core.dist_checkpointing.strategies.async_utils.PersistentAsyncCaller.async_loop",
            source_hash="6327dd5d6c61e7f3b736d6a9060fdaf33fb1516271955e9934a54e76cc493a69",
        ),
    ),
    replace=_replace,
)
