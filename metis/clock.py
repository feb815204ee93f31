"""Where in training a forward pass is: the one piece of context that layers need and the engine does not
hand them.

The engine's own microbatch counter is rank-local and has moved on by backward. The clock holds the logical
position instead: the optimizer step, and the microbatch as first consumed sample // micro_batch_size, which
is the same for any data-parallel layout. The microbatch lives in a ContextVar, so that a recomputation that
runs in the context of its forward (as the engine is made to do) sees the forward's microbatch; backward uses
what forward captured. A thread in which none was announced, such as autograd's, sees the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metis.rng import NoisePosition

_KEPT_AMAXES = 32
"""Amaxes of one operand that wait for their maximum to be taken."""


@dataclass(frozen=True, slots=True)
class NotedAmaxes:
    """Amaxes, fp32 [n], and (layer, cell) of each; None for none."""

    keys: list[tuple[str, str]]
    values: Tensor | None


class OperandWatch:
    """Told about every operand that is quantised; remembers which were not finite until somebody asks.

    FP4 has no NaN and no infinity, and a quantiser may turn them into ordinary numbers; so the scales are
    looked at where they are made. The amaxes of each operand are kept on the device (a maximum carries
    NaN and infinity along): asking costs one synchronisation for all layers.
    observer: called with (plan, cell name, source matrix, its split, its codes) for each operand while set.
    """

    def __init__(self) -> None:
        self.observer: Callable[..., None] | None = None
        self._amaxes: dict[tuple[str, str], list[Tensor]] = {}
        self._put_back: list[NotedAmaxes] = []

    def note(self, plan: Any, cell_name: str, source: Tensor | None, split: Any, encoded: Any) -> None:
        """Take in one operand of layer `plan.layer`."""
        self.note_amax(plan.layer, cell_name, encoded.amax)
        if self.observer is not None:
            self.observer(plan, cell_name, source, split, encoded)

    def note_amax(self, layer: str, cell_name: str, amax: Tensor) -> None:
        """Take in the amax of one operand, fp32 0-dim; of many they are put together now and then, in one
        launch.
        """
        amaxes = self._amaxes.setdefault((layer, cell_name), [])
        if amaxes and amaxes[-1] is amax:  # a weight is encoded once for many microbatches
            return
        amaxes.append(amax)
        if len(amaxes) == _KEPT_AMAXES:
            amaxes[:] = [torch.stack(amaxes).amax()]

    def take_noted(self) -> NotedAmaxes:
        """Return the amaxes noted since they were last taken, in one tensor, and forget them."""
        taken, self._amaxes = self._amaxes, {}
        keys = [key for key, amaxes in taken.items() for _ in amaxes]
        values = [amax for amaxes in taken.values() for amax in amaxes]
        return NotedAmaxes(keys, torch.stack(values) if values else None)

    def put_back(self, noted: NotedAmaxes) -> None:
        """Note again what `take_noted` returned, with what its tensor holds when somebody asks."""
        if not any(noted is other for other in self._put_back):
            self._put_back.append(noted)

    def take_nonfinite(self) -> list[tuple[str, str]]:
        """Return (layer, cell) of every operand noted since the last call that held NaN or infinity, in the
        order in which they were first noted.
        """
        taken, self._put_back = [*self._put_back, self.take_noted()], []
        found: dict[tuple[str, str], None] = {}
        for noted in taken:
            if noted.values is not None:
                flags = torch.isfinite(noted.values).tolist()
                found |= {key: None for key, good in zip(noted.keys, flags, strict=True) if not good}
        return list(found)


class TrainingClock:
    """Position in training, shared by all layers of a run; owned and advanced by the training loop.

    seed: of all counter-based randomness. step: optimizer step, from 0. num_tokens_per_step: tokens of the
    whole global batch of this step, which decides how densely rows are sampled. watch: told about every
    quantised operand.
    """

    def __init__(self, seed: int = 0, num_tokens_per_step: int = 1) -> None:
        self.seed = seed
        self.step = 0
        self.num_tokens_per_step = num_tokens_per_step
        self.watch = OperandWatch()
        self._microbatch: ContextVar[tuple[int, Tensor | None]] = ContextVar("metis_microbatch")
        self._latest: tuple[int, Tensor | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A ContextVar can be neither copied nor pickled; a copied clock gets one of its own.
        microbatch = self.position.microbatch if self.is_announced else None
        return {**vars(self), "watch": None, "_latest": None, "_microbatch": microbatch}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["seed"], state["num_tokens_per_step"])  # type: ignore[misc]
        self.step = state["step"]
        if state["_microbatch"] is not None:
            self.begin_microbatch(state["_microbatch"])

    @property
    def is_announced(self) -> bool:
        """Whether anybody has announced a microbatch."""
        return self._latest is not None

    def begin_step(self, step: int, num_tokens_per_step: int) -> None:
        """Enter optimizer step `step`."""
        self.step = step
        self.num_tokens_per_step = num_tokens_per_step

    def begin_microbatch(self, microbatch: int, words: Tensor | None = None) -> None:
        """Enter the forward pass of logical microbatch `microbatch` of this step.

        words: where kernels read the position, of `NoisePosition`; the caller keeps them current.
        """
        self._latest = microbatch, words
        self._microbatch.set(self._latest)

    @property
    def position(self) -> NoisePosition:
        """The position that a forward pass started now belongs to."""
        microbatch, words = self._microbatch.get(self._latest) or (0, None)
        return NoisePosition(step=self.step, microbatch=microbatch, words=words)
