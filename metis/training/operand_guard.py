"""`--nonfinite-operands`: what happens when an operand of a low-precision GEMM holds NaN or infinity.

FP4 has neither, so a quantiser may turn them into ordinary numbers, and what reaches the loss or the
gradients says nothing about where it began. The clock's `OperandWatch` sees every operand before that; here
all ranks agree, once per step and before the optimizer, on whether one was seen anywhere: one message of two
flags, names only when a flag is set.

* stop (default): every rank raises the same error, which names iteration, layer and cell; nothing is saved.
* skip: no update, no new bases, the learning rate stays where it is; counted as skipped and as NaN iteration.
* ignore: nobody looks, and the engine's own checks of loss and gradients are all there is.

Traps:
* The engine looks at gradients inside backward and raises on one rank, before an operand could be named and a
  step be skipped. So where a linear of ours exists and the mode is not `ignore`, its check is switched off
  and made here, after the operands'; also where it may not look inside backward, which is being captured.
* The first of many names is where it began: forward before backward, forward from the first stage on,
  backward from the last one. Behind it NaN spreads, so most other names are its consequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metis.clock import TrainingClock
from metis.errors import MetisError
from metis.mcore.state import recipe_linears

_SHOWN_IN_WARNING = 3


class NonFiniteError(MetisError, RuntimeError):
    """A loss or gradient that is NaN or infinite, found by the rank that raises."""

    found_by_one_rank = True


class AgreedNonFiniteError(NonFiniteError):
    """An operand or gradient that is NaN or infinite, raised by all ranks alike."""

    found_by_one_rank = False


@dataclass(frozen=True, slots=True)
class Finding:
    """What held NaN or infinity anywhere: (layer, cell) where it began first; parameters by gradient."""

    operands: tuple[tuple[str, str], ...] = ()
    gradients: tuple[str, ...] = ()

    def warning(self, where: str, what: str) -> str:
        """Return one line that names operands: `what` was done about them."""
        names = ", ".join(f"{layer} {cell}" for layer, cell in self.operands[:_SHOWN_IN_WARNING])
        return (
            f"WARNING: {where}: NaN or infinity in {names}{_more(self.operands, _SHOWN_IN_WARNING)}; {what}"
        )


class OperandGuard:
    """Asks all ranks for non-finite operands; `is_active` where there is something to ask about."""

    def __init__(
        self,
        mode: str,
        model: list[nn.Module],
        clock: TrainingClock,
        check_gradients: bool,
        engine_may_check: bool = True,
    ) -> None:
        self.mode, self._model, self._watch = mode, model, clock.watch
        here = torch.tensor([int(bool(recipe_linears(model)))], device=_device())
        dist.all_reduce(here, op=dist.ReduceOp.MAX)
        self.is_active = mode != "ignore" and bool(here.item())
        self._checks_gradients = check_gradients and (self.is_active or not engine_may_check)
        if self._checks_gradients:
            for chunk in model:
                chunk.ddp_config.check_for_nan_in_grad = False  # type: ignore[union-attr]

    def after_backward(self) -> Finding:
        """Return what the step that was just made found, on all ranks; call it before the optimizer."""
        if not self.is_active and not self._checks_gradients:
            return Finding()
        return self._agreed(self._watch.take_nonfinite() if self.is_active else [], self._checks_gradients)

    def after_evaluation(self) -> Finding:
        """Return what forward passes without backward found, so that no training step is blamed for it."""
        return self._agreed(self._watch.take_nonfinite(), False) if self.is_active else Finding()

    def _agreed(self, operands: list[tuple[str, str]], with_gradients: bool) -> Finding:
        buffers = _gradient_buffers(self._model) if with_gradients else []
        flags = torch.tensor([int(bool(operands)), 0], device=_device())
        if buffers:
            largest = torch.stack([torch.linalg.vector_norm(buffer, ord=torch.inf) for buffer in buffers])
            flags[1] = (~torch.isfinite(largest)).any()
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        bad_operand, bad_gradient = flags.tolist()
        if not bad_operand and not bad_gradient:
            return Finding()
        gradients = _bad_gradients(self._model) if bad_gradient else []
        by_rank: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(by_rank, (operands, gradients))
        return Finding(
            operands=_by_cause([names for names, _ in by_rank]),
            gradients=tuple(dict.fromkeys(name for _, names in by_rank for name in names)),
        )


def operand_error(finding: Finding, where: str, batch_to_skip: int | None) -> AgreedNonFiniteError:
    """Return the error of a step (or, without a batch to skip, of an evaluation)."""
    layer, cell = finding.operands[0]
    skip = "" if batch_to_skip is None else f"skip the batch with --iterations-to-skip {batch_to_skip}, "
    return AgreedNonFiniteError(
        f"{where}, {layer}, {cell}",
        f"must be finite, received NaN or infinity{_more(finding.operands, 1)}; resume from the last "
        f"checkpoint, {skip}or go on with --nonfinite-operands skip or ignore",
    )


def gradient_error(finding: Finding, iteration: int) -> AgreedNonFiniteError:
    """Return the error of gradients that are not finite although all operands were; iteration from 0."""
    return AgreedNonFiniteError(
        f"iteration {iteration + 1}",
        f"a gradient ({finding.gradients[0]}{_more(finding.gradients, 1)}) must be finite; resume from the "
        f"last checkpoint, skip the batch with --iterations-to-skip {iteration}, or go on regardless with "
        "--no-check-for-nan-in-loss-and-grad",
    )


def _more(names: tuple[Any, ...], shown: int) -> str:
    return f" (and in {len(names) - shown} more)" if len(names) > shown else ""


def _by_cause(by_rank: list[list[tuple[str, str]]]) -> tuple[tuple[str, str], ...]:
    """Return every name once: forward cells from the first rank on, then backward ones from the last.

    Each rank lists its operands in the order in which they were first encoded; ranks of later pipeline stages
    have higher numbers.
    """
    forward = [key for keys in by_rank for key in keys if key[1].startswith("fprop")]
    backward = [key for keys in reversed(by_rank) for key in keys if not key[1].startswith("fprop")]
    return tuple(dict.fromkeys(forward + backward))


def _gradient_buffers(model: list[nn.Module]) -> list[Tensor]:
    return [
        buffer.grad_data
        for chunk in model
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)  # type: ignore[misc]
    ]


def _bad_gradients(model: list[nn.Module]) -> list[str]:
    """Return the parameters of this rank whose accumulated gradient holds NaN or infinity."""
    return [
        name.replace("module.", "")
        for chunk in model
        for name, parameter in chunk.named_parameters()
        if getattr(parameter, "main_grad", None) is not None
        and not bool(torch.isfinite(parameter.main_grad).all())  # type: ignore[arg-type]
    ]


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
