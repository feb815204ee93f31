"""Where in training a forward pass is: the one piece of context that layers need and the engine does not
hand them.

The engine's own microbatch counter is rank-local and has moved on by backward. The clock holds the logical
position
instead: the optimizer step, and the microbatch as first consumed sample // micro_batch_size, which is the
same for any data-parallel layout. The microbatch lives in a ContextVar, so that a recomputation that runs in
the context of its forward (as the engine is made to do) sees the forward's microbatch; backward uses what
forward captured.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from metis.rng import NoisePosition

_KEPT_AMAXES = 32
"""Amaxes of one operand that wait for their maximum to be taken."""


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
        if len(amaxes) >= _KEPT_AMAXES:
            amaxes[:] = [torch.stack(amaxes).amax()]

    def take_noted(self) -> dict[tuple[str, str], list[Tensor]]:
        """Return the amaxes noted so far, by (layer, cell), and forget them."""
        taken, self._amaxes = self._amaxes, {}
        return taken

    def put_back(self, noted: dict[tuple[str, str], list[Tensor]]) -> None:
        """Note amaxes again that `take_noted` returned."""
        for key, amaxes in noted.items():
            kept = self._amaxes.setdefault(key, [])
            kept.extend([amax for amax in amaxes if not any(amax is other for other in kept)])

    def take_nonfinite(self) -> list[tuple[str, str]]:
        """Return (layer, cell) of every operand noted since the last call that held NaN or infinity."""
        taken = self.take_noted()
        if not taken:
            return []
        finite = torch.isfinite(torch.stack([amax for amaxes in taken.values() for amax in amaxes])).tolist()
        ends = list(accumulate(map(len, taken.values())))
        return [
            key for key, end in zip(taken, ends, strict=True) if not all(finite[end - len(taken[key]) : end])
        ]


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
        self._microbatch: ContextVar[tuple[int, Tensor | None]] = ContextVar(
            "metis_microbatch", default=(0, None)
        )

    def __getstate__(self) -> dict[str, int]:
        # A ContextVar can be neither copied nor pickled; a copied clock gets one of its own.
        state = {**vars(self), "_microbatch": self._microbatch.get()[0]}
        del state["watch"]
        return state

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["seed"], state["num_tokens_per_step"])  # type: ignore[misc]
        self.step = state["step"]
        self._microbatch.set((state["_microbatch"], None))

    def begin_step(self, step: int, num_tokens_per_step: int) -> None:
        """Enter optimizer step `step`."""
        self.step = step
        self.num_tokens_per_step = num_tokens_per_step

    def begin_microbatch(self, microbatch: int, words: Tensor | None = None) -> None:
        """Enter the forward pass of logical microbatch `microbatch` of this step.

        words: where kernels read the position, of `NoisePosition`; the caller keeps them current.
        """
        self._microbatch.set((microbatch, words))

    @property
    def position(self) -> NoisePosition:
        """The position that a forward pass started now belongs to."""
        microbatch, words = self._microbatch.get()
        return NoisePosition(step=self.step, microbatch=microbatch, words=words)
